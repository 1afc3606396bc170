//! `exec`: runs a command under a target. This process enters a new cgroup of its own and becomes
//! the command, so nobody else is moved, and signals, job control and the exit status need no help.
//!
//! It becomes the command only once the kernel is seen to hold all that the target needs. What it
//! waits for, the daemon's classification, is announced by nf_tables.

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::SockProtocol;
use nix::unistd::{geteuid, initgroups, setgid, setgroups, setuid, Gid, Uid, User};

use crate::cgroup::mount::{self, Root};
use crate::cgroup::watch;
use crate::config::{Config, Outcome, Take, Target};
use crate::error::{errno, io_reason, Error, Result};
use crate::kernel::{self, Inventory, Kernel};
use crate::net::{Family, Mark};
use crate::netlink::socket::Socket;
use crate::netlink::uapi::{NFNLGRP_NFTABLES, NFT_TABLE_F_DORMANT};
use crate::nft::table::{KNOWN, TABLE};
use crate::nft::view::Step;
use crate::options::Options;
use crate::plan;
use crate::route::Entry;
use crate::small::SmallMap;
use crate::{confine, instance, log, policy, sys};

/// How long the daemon may take to classify a new cgroup.
const PATIENCE: Duration = Duration::from_secs(5);

/// Exit statuses of shells for a command that is not there, or cannot be run.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// Returns only where the command was not run.
pub fn exec(
    options: &Options,
    target: &str,
    user: Option<&str>,
    command: &[OsString],
) -> Result<ExitCode> {
    confine::require_net_admin("exec")?;
    let config = options.load_or_default(false)?;
    let target =
        (config.targets().find(|t| config.target_name(*t) == target)).ok_or_else(|| {
            let names: Vec<&str> = config.targets().map(|t| config.target_name(t)).collect();
            let names = names.join(", ");
            Error::Usage(vec![format!("undefined target \"{target}\" (there are {names})")])
        })?;
    let user = user.map(find_user).transpose()?;
    let uid = user.as_ref().map_or(geteuid(), |user| user.uid);
    if target != Target::Direct && config.bypass_users.contains(&uid.as_raw()) {
        let name = config.target_name(target);
        return Err(Error::State(format!(
            "unable to exec: target {name} is not in force for uid {uid}: it is a bypass-user"
        )));
    }
    let root = mount::find(config.cgroup_root.as_deref())?;
    remove_leftovers(&root.dir);
    let mut tries = 8;
    let cgroup = loop {
        tries -= 1;
        let cgroup = OwnCgroup::make(&root, config.target_name(target))?;
        if let Err(error) = await_force(&config, target, &root, &cgroup) {
            let _ = fs::remove_dir(&cgroup.dir);
            return Err(error);
        }
        match cgroup.enter() {
            Ok(()) => break cgroup,
            // another exec took it for a leftover
            Err(Errno::ENODEV | Errno::ENOENT) if tries > 0 => continue,
            Err(errno) => {
                let _ = fs::remove_dir(&cgroup.dir);
                let what = format!("unable to enter cgroup {}", cgroup.dir.display());
                return Err(Error::system(what, errno));
            }
        }
    };
    log!(Info, "running in cgroup {}", cgroup.dir.display());
    if let Some(user) = user {
        become_user(&user)?;
    }
    let mut becomes = Command::new(&command[0]);
    becomes.args(&command[1..]);
    sys::pass_sigpipe_on(&mut becomes);
    let error = becomes.exec();
    let why = io_reason(&error);
    log!(Error, "unable to run {}: {why}", command[0].to_string_lossy());
    Ok(ExitCode::from(match error.kind() {
        ErrorKind::NotFound => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    }))
}

/// Whom the command is run as.
struct Identity {
    /// Whose groups it gets; a uid that no user has comes without.
    name: Option<String>,
    uid: Uid,
    gid: Gid,
}

/// A user by name or uid. A uid that no user has gets the gid of the same number and no other
/// groups: anything but those of root.
fn find_user(given: &str) -> Result<Identity> {
    // parse() would take a sign
    let uid = given.parse().ok().filter(|_| given.bytes().all(|b| b.is_ascii_digit()));
    let found = match uid {
        Some(uid) => User::from_uid(Uid::from_raw(uid)),
        None => User::from_name(given),
    };
    match (found, uid) {
        (Ok(Some(user)), _) => Ok(Identity { name: Some(user.name), uid: user.uid, gid: user.gid }),
        // without /etc/passwd, nobody has it
        (Ok(None) | Err(Errno::ENOENT), Some(uid)) => {
            Ok(Identity { name: None, uid: Uid::from_raw(uid), gid: Gid::from_raw(uid) })
        }
        (Ok(None), None) => Err(Error::Usage(vec![format!("no such user: \"{given}\"")])),
        (Err(errno), _) => {
            let what = format!("unable to look up user {given}");
            Err(Error::system(what, errno))
        }
    }
}

fn become_user(user: &Identity) -> Result<()> {
    let refused = |errno| Error::system(format!("unable to become user {}", user.uid), errno);
    match &user.name {
        Some(name) => {
            let name = CString::new(name.as_bytes()).map_err(|_| refused(Errno::EINVAL))?;
            initgroups(&name, user.gid)
        }
        None => setgroups(&[]),
    }
    .map_err(refused)?;
    setgid(user.gid).map_err(refused)?;
    setuid(user.uid).map_err(refused)
}

/// A cgroup that was made for this process, with the file that lets it in held open: should the
/// cgroup be removed meanwhile, entering fails even if there is another one of that name by then.
struct OwnCgroup {
    dir: PathBuf,
    /// From the cgroup root.
    path: Vec<u8>,
    procs: File,
}

impl OwnCgroup {
    fn make(root: &Root, target: &str) -> Result<OwnCgroup> {
        let above = format!("{}/{target}", policy::EXEC);
        let pid = std::process::id();
        // a number of the pid's may be in use still: by children of an earlier process of that pid
        for serial in 0..100 {
            let name = match serial {
                0 => pid.to_string(),
                n => format!("{pid}-{n}"),
            };
            let path = format!("{above}/{name}");
            let dir = root.dir.join(&path[1..]);
            let parent = dir.parent().unwrap_or(&root.dir);
            let made = fs::create_dir_all(parent).and_then(|()| match fs::create_dir(&dir) {
                // an empty one of that name is a leftover
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                    fs::remove_dir(&dir).and_then(|()| fs::create_dir(&dir))
                }
                made => made,
            });
            let opened =
                made.and_then(|()| File::options().write(true).open(dir.join("cgroup.procs")));
            match opened {
                Ok(procs) => {
                    let path = path.into_bytes();
                    return Ok(OwnCgroup { dir, path, procs });
                }
                Err(e) if is_busy(&e) || e.kind() == ErrorKind::NotFound => continue,
                Err(e) => {
                    let what = format!("unable to make cgroup {}", dir.display());
                    let error = Error::system(what, errno(&e));
                    return Err(match errno(&e) {
                        Errno::EACCES | Errno::EPERM | Errno::EROFS => {
                            error.hint("that needs root and a writable cgroup file system")
                        }
                        _ => error,
                    });
                }
            }
        }
        Err(Error::State(format!("unable to make a cgroup below {above}: all names are in use")))
    }

    /// Moves this process, and no other.
    fn enter(&self) -> nix::Result<()> {
        (&self.procs).write_all(b"0").map_err(|e| errno(&e))
    }
}

/// In use, has children, or was made by somebody else just now.
fn is_busy(error: &std::io::Error) -> bool {
    matches!(errno(error), Errno::EBUSY | Errno::ENOTEMPTY | Errno::EEXIST)
}

/// Removes the cgroups of processes that are gone. rmdir(2) spares those that somebody is in.
fn remove_leftovers(root: &Path) {
    let alive = |name: &str| Path::new("/proc").join(name).exists();
    for target in subdirectories(&root.join(&policy::EXEC[1..])) {
        for dir in subdirectories(&target) {
            let name = dir.file_name().and_then(|name| name.to_str());
            let pid = name.map(|name| name.split('-').next().unwrap_or(name));
            let is_pid = |pid: &&str| pid.bytes().all(|b| b.is_ascii_digit());
            // that of a living process may be waiting for it to enter
            if pid.filter(is_pid).is_some_and(|pid| !alive(pid)) {
                remove_empty(&dir);
            }
        }
    }
}

/// Removes the cgroups that `exec` made, with the one above them where that is empty then; tells
/// whether it is gone.
pub fn tidy(root: &Path) -> bool {
    remove_leftovers(root);
    let above = root.join(&policy::EXEC[1..]);
    for target in subdirectories(&above) {
        let _ = fs::remove_dir(target);
    }
    fs::remove_dir(above).is_ok()
}

fn remove_empty(dir: &Path) {
    subdirectories(dir).iter().for_each(|dir| remove_empty(dir));
    let _ = fs::remove_dir(dir);
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.map(|entry| entry.path()).collect()
}

/// Returns once the target is in force for the cgroup.
///
/// Errors: what is missing, after a while if a daemon runs that could add it.
fn await_force(config: &Config, target: Target, root: &Root, cgroup: &OwnCgroup) -> Result<()> {
    let wanted = Wanted::new(config, target, root, &cgroup.path)?;
    let mut kernel = Kernel::open()?;
    // before the first look, so that no change goes by unseen
    let mut changes = Socket::open(SockProtocol::NetlinkNetFilter, &[NFNLGRP_NFTABLES])?;
    let deadline = Instant::now() + PATIENCE;
    let refuse = |why: String| {
        let name = config.target_name(target);
        let why = format!("unable to exec: target {name} is not in force: {why}");
        Err(Error::State(why))
    };
    let mut torn = 0;
    loop {
        let missing = wanted.missing(&mut kernel)?;
        let changed = drain(&mut changes)?;
        match missing {
            // a change in the middle of the look may have made us see what never was
            None if changed && torn < 16 => torn += 1,
            None => break,
            Some(_) if changed => {}
            Some(Missing::Never(what)) => return refuse(what),
            Some(Missing::Yet(what)) if instance::holder(&mut kernel)?.is_none() => {
                return refuse(format!("{what}, and no cgtproxy is running"));
            }
            Some(Missing::Yet(what)) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let waited = PATIENCE.as_secs();
                    return refuse(format!("{what} after {waited} s"));
                }
                let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
                match poll(&mut [PollFd::new(changes.as_fd(), PollFlags::POLLIN)], timeout) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(errno) => return Err(Error::system("unable to poll", errno)),
                }
            }
        }
    }
    // the daemon adds rules and routes before the table, so they are there by now or never
    wanted.missing_routing(&mut kernel)?.map_or(Ok(()), refuse)
}

/// Forgets the notifications that have come; true where there were any, or some were lost.
fn drain(changes: &mut Socket) -> Result<bool> {
    let mut any = false;
    loop {
        match changes.notification() {
            Ok(None) => return Ok(any),
            Ok(Some(_)) | Err(Errno::ENOBUFS) => any = true,
            Err(errno) => return Err(Error::system("unable to read notifications", errno)),
        }
    }
}

/// What keeps a target from being in force.
enum Missing {
    /// The daemon adds that sooner or later.
    Yet(String),
    /// Waiting does not help.
    Never(String),
}

/// What the kernel must hold before the command may run.
struct Wanted<'a> {
    config: &'a Config,
    target: Target,
    /// The id of the cgroup and of its ancestors below the cgroup root, by level.
    ids: SmallMap<u32, u64>,
    /// Those of them that the policy gives an element of their own, outermost first: level, id, path,
    /// target.
    elements: Vec<(u32, u64, String, Outcome)>,
    /// Below a held cgroup: it has to be looked at as well.
    held: bool,
}

impl<'a> Wanted<'a> {
    fn new(config: &'a Config, target: Target, root: &Root, path: &[u8]) -> Result<Wanted<'a>> {
        let held = policy::held_by(config, path).is_some();
        let mut wanted =
            Wanted { config, target, ids: SmallMap::default(), elements: Vec::new(), held };
        let mut parent = config.default_outcome();
        let refused = |errno| {
            let path = String::from_utf8_lossy(path);
            Error::system(format!("unable to identify cgroup {path}"), errno)
        };
        let name = |path: &[u8]| CString::new(path).map_err(|_| refused(Errno::EINVAL));
        let dir = name(root.dir.as_os_str().as_bytes())?;
        let dir = sys::open_path(&dir).map_err(refused)?;
        if let Some(dir) = watch::foreign_exec(&root.dir, path) {
            let dir = String::from_utf8_lossy(dir);
            return Err(Error::State(format!(
                "unable to exec: cgroup {dir} was made by another user than root, and has no \
                 target by its name: remove it"
            )));
        }
        for (depth, (end, rank)) in policy::ranks(config, path, false).enumerate() {
            let level = (root.level + depth + 1) as u32;
            let own = policy::outcome(config, rank);
            // without the slash in front, for it is looked up from the root
            let id = sys::cgroup_id(dir.as_fd(), &path[1..end]).map_err(refused)?;
            wanted.ids.insert(level, id);
            if own != parent {
                let path = String::from_utf8_lossy(&path[..end]).into_owned();
                wanted.elements.push((level, id, path, own));
            }
            parent = own;
        }
        Ok(wanted)
    }

    /// What of the table is missing, if anything is.
    fn missing(&self, kernel: &mut Kernel) -> Result<Option<Missing>> {
        Ok(match kernel.inventory()? {
            // as for everybody else then
            None if self.target == Target::Direct => None,
            None => Some(Missing::Yet(format!("there is no table inet {TABLE}"))),
            Some(inventory) => match self.missing_of(&inventory) {
                None if self.held && inventory.view.unknown.is_some() => self.unknown(kernel)?,
                missing => missing,
            },
        })
    }

    /// Whether nothing of the cgroup would leave, for the daemon has not looked at it yet.
    fn unknown(&self, kernel: &mut Kernel) -> Result<Option<Missing>> {
        let id = self.ids.values().next_back();
        let known = kernel.elements(KNOWN)?.iter().any(|element| Some(&element.id) == id);
        Ok((!known).then(|| Missing::Yet("the cgroup has not been looked at".into())))
    }

    fn missing_of(&self, inventory: &Inventory) -> Option<Missing> {
        let name = self.config.target_name(self.target);
        if inventory.flags & NFT_TABLE_F_DORMANT != 0 {
            return Some(Missing::Never(format!("table inet {TABLE} is dormant")));
        }
        let Some(target) = inventory.view.target(name) else {
            let what = format!("table inet {TABLE} has no chain to_{name} (reload cgtproxy)");
            return Some(Missing::Never(what));
        };
        if let Some(outlet) = self.config.outlet(self.target) {
            let mark = outlet.mark;
            let same = |m: Mark| (m.value, m.mask) == (mark, self.config.mask);
            if !target.mark.is_some_and(same) {
                let what = format!("chain to_{name} does not set mark {mark:#x} (reload cgtproxy)");
                return Some(Missing::Never(what));
            }
        }
        let known = inventory.outcomes();
        for (level, id, path, own) in &self.elements {
            let (class, own) = (own.class, self.config.target_name(own.target));
            let of = |step: &&Step| {
                let same = step.set == own && step.target == own && step.class == class;
                same && step.level == *level
            };
            if !inventory.view.steps.iter().filter(of).any(|step| inventory.holds(step, *id)) {
                let what = match known(*id) == Some((own, class)) {
                    true => format!("chain output has no rule for set cg_{own} at level {level}"),
                    false => format!("cgroup {path} is not in set cg_{own}"),
                };
                return Some(Missing::Yet(what));
            }
        }
        let (verdict, class) =
            inventory.view.verdict(&self.ids, |step, id| inventory.holds(step, id));
        let what = || format!("the table sends the cgroup to {verdict}");
        ((verdict, class) != (name, 0)).then(|| Missing::Yet(what()))
    }

    fn missing_routing(&self, kernel: &mut Kernel) -> Result<Option<String>> {
        let Some(outlet) = self.config.outlet(self.target) else {
            return Ok(None);
        };
        // while the interface of a route is not there, what it takes is refused
        let table = match self.target {
            Target::Route(index) => self.config.table_of(usize::from(index)),
            _ => self.config.route_table,
        };
        let mut needs = plan::needs(self.config);
        needs.links = kernel.links_of(&needs);
        for family in Family::BOTH {
            let is_on = family == Family::V4 || kernel::routing::ipv6_is_on();
            if outlet.family(family) != Take::Yes || !is_on {
                continue;
            }
            let seen = kernel.seen(family, &needs.tables())?;
            let missing = seen.missing(&needs, family);
            let needed = missing.iter().find(|entry| match entry {
                Entry::Rule(rule) => rule.mark.value == outlet.mark,
                Entry::Route(route) => route.table == table,
            });
            if let Some(entry) = needed {
                return Ok(Some(format!("missing: {}", entry.command("add"))));
            }
        }
        Ok(None)
    }
}
