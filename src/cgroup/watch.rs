//! Watching the cgroup tree: one inotify watch a directory, which tells of an [`Event`], and looking
//! at a directory. What it has [`Seen`] goes to the core, with what can only be told here and now: whether
//! a cgroup was found late, and whether one that has its target by its name is not root's.
//!
//! Every look may find the directory gone, or another one under its name: that is normal, and the
//! events that say so are in the queue, because the parent was watched before.
//! Source: inotify(7), fs/notify/inotify, fs/kernfs.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path as FilePath, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::unistd::geteuid;

use super::event::{Event, Found, List, Listed, Look, Scan, Seen};
use super::tree::Path;
use crate::error::{errno, Error, Result};
use crate::policy;
use crate::sys;

/// The largest event: `struct inotify_event` and a name of NAME_MAX bytes with its end.
const EVENT: usize = 16 + 256;

/// One read takes at most this many bytes of events (some 200 of them), so that a flood of cgroups
/// cannot keep the loop from committing what it has.
const READ: usize = 8 * 1024;

/// How many processes of a cgroup are looked at.
const PROCESSES: usize = 64;

/// By number, as nix has no name for the last.
const MASK: AddWatchFlags = AddWatchFlags::from_bits_retain(
    libc::IN_CREATE
        | libc::IN_DELETE
        | libc::IN_ONLYDIR
        | libc::IN_DONT_FOLLOW
        | libc::IN_EXCL_UNLINK,
);

/// A new inotify instance. Errors: EMFILE at the limit of instances (the sysctl
/// `fs.inotify.max_user_instances`) or of descriptors.
pub fn inotify() -> nix::Result<Inotify> {
    Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
}

/// A cgroup that is found so long after somebody has used it is late.
const LATE: Duration = Duration::from_millis(50);

/// Looks at cgroup directories, and watches those it has looked at unless made with `look_only`.
pub struct Watcher {
    inotify: Option<Inotify>,
    root: Vec<u8>,
    /// The root as of its last look: what is looked up from it spares the way there.
    base: Option<OwnedFd>,
    /// Watches on the directories above the root: they tell where it goes and comes back.
    above: Vec<i32>,
    /// What is found from now on has come since everything was looked at.
    tells_late: bool,
    buf: Box<[u8; READ]>,
    /// How much of it is events.
    read: usize,
}

impl Watcher {
    pub fn new(root: &FilePath) -> Result<Watcher> {
        let inotify = inotify().map_err(|errno| {
            let error = Error::system("unable to make an inotify instance", errno);
            match errno {
                Errno::EMFILE => error.hint("raise the sysctl fs.inotify.max_user_instances"),
                _ => error,
            }
        })?;
        Ok(Watcher { inotify: Some(inotify), ..Watcher::look_only(root) })
    }

    /// A watcher that only looks, for commands that print what is there now.
    pub fn look_only(root: &FilePath) -> Watcher {
        let root = root.as_os_str().as_bytes();
        let root = root.strip_suffix(b"/").unwrap_or(root).to_vec();
        let (above, buf) = (Vec::new(), Box::new([0; READ]));
        Watcher { inotify: None, root, base: None, above, tells_late: false, buf, read: 0 }
    }

    /// Everything has been looked at: tells from now on of what is found whether it is late.
    pub fn tell_late(&mut self) {
        self.tells_late = true;
    }

    /// Whether it watches what it has looked at.
    pub fn is_following(&self) -> bool {
        self.inotify.is_some()
    }

    /// The descriptor to poll.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(|fd| fd.as_fd())
    }

    /// Reads one bufferful of [`Watcher::events`], and tells whether there may be more.
    pub fn read(&mut self) -> Result<bool> {
        let Some(inotify) = &self.inotify else {
            return Ok(false);
        };
        self.read = loop {
            match nix::unistd::read(inotify, &mut self.buf[..]) {
                Ok(length) => break length,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => break 0,
                Err(errno) => return Err(Error::system("unable to read inotify events", errno)),
            }
        };
        // what would have had room beside them would be among them
        Ok(self.buf.len() - self.read < EVENT)
    }

    /// What has been read.
    pub fn events(&self) -> RawEvents<'_> {
        RawEvents::new(&self.buf[..self.read])
    }

    /// Watches the directory that the root is in, if that is in `top` or below it: it tells when the
    /// root goes. Where it is gone, all that there are above tell when it comes back.
    pub fn guard(&mut self, top: &FilePath, gone: bool) {
        let Some(inotify) = &self.inotify else {
            return;
        };
        let root = FilePath::new(OsStr::from_bytes(&self.root));
        let above = root.ancestors().skip(1).take_while(|dir| dir.starts_with(top));
        let above = above.take(if gone { usize::MAX } else { 1 });
        let names = above.filter_map(|dir| CString::new(dir.as_os_str().as_bytes()).ok());
        let wds = names.filter_map(|dir| inotify.add_watch(&*dir, MASK).ok());
        let now: Vec<i32> = wds.map(|wd| wd.as_raw()).collect();
        let old = std::mem::replace(&mut self.above, now.clone());
        old.into_iter().filter(|wd| !now.contains(wd)).for_each(|wd| self.unwatch(wd));
    }

    /// The watches that [`Watcher::guard`] has made.
    pub fn above(&self) -> &[i32] {
        &self.above
    }

    pub fn look(&mut self, look: &Look) -> Seen {
        match look {
            Look::Scan(scan) => self.scan(scan),
            Look::Watch(found) => self.watch(found),
        }
    }

    /// Looks which cgroup there is under a path.
    fn scan(&mut self, scan: &Scan) -> Seen {
        let path = scan.path.clone();
        if path.is_empty() {
            // it may be another one by now
            let Some(name) = self.name(&path) else {
                return Seen::Gone { path };
            };
            self.base = match sys::open_path(&name) {
                Ok(base) => Some(base),
                Err(errno) => return failed(path, errno),
            };
        }
        let Some(base) = &self.base else {
            return Seen::Gone { path };
        };
        let (base, below) = (base.as_fd(), below(&path));
        match sys::cgroup_id(base, below) {
            Ok(id) => {
                let foreign =
                    policy::is_of_exec(&path) && is_foreign(base, below, self.inotify.is_none());
                Seen::Found(Found { path, id, deep: scan.deep, foreign, at: self.now() })
            }
            Err(errno) => failed(path, errno),
        }
    }

    /// Now, where it is told of what is found whether it is late.
    fn now(&self) -> Option<u64> {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.tells_late.then(|| now().as_nanos() as u64)
    }

    /// Watches and lists a cgroup that was found. The watch comes before the list, so that a child
    /// made in between is in the list or in the queue, or in both.
    fn watch(&self, found: &Found) -> Seen {
        let Found { path, id, foreign, at, .. } = found.clone();
        let (Some(base), Some(name)) = (&self.base, self.name(&path)) else {
            return Seen::Gone { path };
        };
        let (base, below) = (base.as_fd(), below(&path));
        let mut refused = None;
        let wd = match &self.inotify {
            None => None,
            Some(inotify) => match add_watch(inotify, base, below, &name) {
                Ok(wd) => Some(wd),
                Err(errno @ (Errno::ENOSPC | Errno::ENOMEM | Errno::EACCES)) => {
                    refused = Some(errno);
                    None
                }
                Err(errno) => return failed(path, errno),
            },
        };
        let look = || sys::directory(base, below);
        let listed = look().and_then(|seen| match seen.links {
            // no subdirectory: spares reading the list of its files
            2 => Ok((seen, Vec::new())),
            _ => subdirectories(&name).and_then(|children| Ok((look()?, children))),
        });
        match listed {
            // what was watched and listed is another one by now
            Ok((seen, _)) if seen.inode as u32 != id as u32 => {
                let seen = match sys::cgroup_id(base, below) {
                    Ok(id) => Seen::Found(Found { path, id, deep: true, foreign, at: self.now() }),
                    Err(errno) => failed(path, errno),
                };
                self.undo(wd, seen)
            }
            Ok((seen, children)) => {
                // events were lost, or we were stopped or busy
                let late = at.is_some_and(|at| at > (seen.changed + LATE).as_nanos() as u64);
                let list = Some(List { owner: seen.owner, late, children });
                Seen::Listed(Listed { path, id, wd, refused, list })
            }
            Err(errno) => match failed(path, errno) {
                Seen::Failed { path, errno } => {
                    let refused = refused.or(Some(errno));
                    Seen::Listed(Listed { path, id, wd, refused, list: None })
                }
                gone => self.undo(wd, gone),
            },
        }
    }

    /// The first processes of a cgroup, some at the most; none where that cannot be told.
    pub fn processes(&self, path: &[u8]) -> Vec<u32> {
        let file = self.file(path, b"/cgroup.procs");
        let Some(file) = file.and_then(|file| std::fs::File::open(file).ok()) else {
            return Vec::new();
        };
        let mut text = String::new();
        // ten digits and a line end each
        let _ = std::io::Read::take(file, 11 * PROCESSES as u64).read_to_string(&mut text);
        // those that this pid namespace does not have are 0
        let pids = text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0);
        pids.take(PROCESSES).collect()
    }

    /// How many cgroups are dying below one; `None` where the kernel does not tell.
    pub fn count_dying(&self, path: &[u8]) -> Option<u64> {
        let text = std::fs::read_to_string(self.file(path, b"/cgroup.stat")?).ok()?;
        text.lines().find_map(|line| line.strip_prefix("nr_dying_descendants "))?.parse().ok()
    }

    /// A file of a cgroup, from the root of the file system; `None` where its path is too long for one.
    pub fn file(&self, path: &[u8], name: &[u8]) -> Option<PathBuf> {
        let file = [&self.root, path, name].concat();
        (file.len() < libc::PATH_MAX as usize).then(|| OsString::from_vec(file).into())
    }

    /// Path of a cgroup from the root of the file system; `None` where it cannot be one.
    fn name(&self, path: &Path) -> Option<CString> {
        let mut name = Vec::with_capacity(self.root.len() + path.len() + 1);
        name.extend_from_slice(&self.root);
        name.extend_from_slice(path);
        CString::new(name).ok()
    }

    /// A watch on a directory that turned out to be gone would never be named again.
    fn undo(&self, wd: Option<i32>, seen: Seen) -> Seen {
        wd.into_iter().for_each(|wd| self.unwatch(wd));
        seen
    }

    /// Ends a watch. After rmdir the kernel keeps it, and the inode with it, until this call.
    pub fn unwatch(&self, wd: i32) {
        if let Some(inotify) = &self.inotify {
            // EINVAL: the kernel ended it already, which newer ones may
            let _ = sys::inotify_rm_watch(inotify.as_fd(), wd);
        }
    }
}

/// Watches the directory `below` of `base`, which is `name` from the root of the file system. The
/// call takes no directory to start from, and the way from there costs as much as the watch: so
/// `base` is made the working directory, which nothing else in the daemon goes by.
fn add_watch(inotify: &Inotify, base: BorrowedFd, below: &[u8], name: &CStr) -> nix::Result<i32> {
    let path = match nix::unistd::fchdir(base) {
        Ok(()) => below,
        Err(_) => name.to_bytes(),
    };
    inotify.add_watch(path, MASK).map(|wd| wd.as_raw())
}

/// Whether a directory is another's than root's and the daemon's. Who only looks at what a daemon
/// sees may be somebody who could not be one.
fn is_foreign(base: BorrowedFd, path: &[u8], only_looks: bool) -> bool {
    let owner = sys::directory(base, path).map(|seen| seen.owner);
    let own = |owner| owner == geteuid().as_raw() && (!only_looks || sys::has_net_admin());
    owner.is_ok_and(|owner| owner != 0 && !own(owner))
}

/// The cgroup of `exec` that a path is of, below a cgroup root, if it is another's than root's and
/// the daemon's: then it has no target by its name.
pub fn foreign_exec<'a>(root: &FilePath, path: &'a [u8]) -> Option<&'a [u8]> {
    let of_exec = policy::of_exec(path)?;
    let root = sys::open_path(&CString::new(root.as_os_str().as_bytes()).ok()?).ok()?;
    is_foreign(root.as_fd(), below(of_exec), true).then_some(of_exec)
}

/// Why nothing was found where a cgroup root should be.
pub fn unreadable(root: &FilePath) -> Error {
    let dir = root.display();
    let what = format!("unable to read cgroup root {dir}");
    match std::fs::read_dir(root) {
        Err(e) => Error::system(what, errno(&e)),
        Ok(_) => Error::State(format!("{what}: is it on cgroup2?")),
    }
}

/// What a look means that failed.
fn failed(path: Path, errno: Errno) -> Seen {
    match errno {
        // too deep to be named by a path: it inherits, as the kernel has it
        Errno::ENAMETOOLONG => Seen::Gone { path },
        Errno::ENOENT | Errno::ENOTDIR | Errno::ENODEV => Seen::Gone { path },
        errno => Seen::Failed { path, errno },
    }
}

/// The way to a cgroup from the root.
fn below(path: &[u8]) -> &[u8] {
    match path {
        [] => b".",
        [_, below @ ..] => below,
    }
}

/// The names of a directory's subdirectories.
fn subdirectories(path: &CString) -> nix::Result<Vec<Box<[u8]>>> {
    let list = || -> std::io::Result<_> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(OsStr::from_bytes(path.as_bytes()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                found.push(entry.file_name().as_bytes().into());
            }
        }
        Ok(found)
    };
    list().map_err(|e| errno(&e))
}

/// One event as inotify(7) hands it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawEvent<'a> {
    pub wd: i32,
    pub mask: u32,
    /// Without the padding NULs; empty where the event is about the watched directory itself.
    pub name: &'a [u8],
}

/// Iterates a buffer of `struct inotify_event`; a length that does not fit ends it.
#[derive(Debug, Clone)]
pub struct RawEvents<'a>(&'a [u8]);

impl<'a> RawEvents<'a> {
    pub fn new(bytes: &'a [u8]) -> RawEvents<'a> {
        RawEvents(bytes)
    }
}

impl<'a> Iterator for RawEvents<'a> {
    type Item = RawEvent<'a>;

    fn next(&mut self) -> Option<RawEvent<'a>> {
        let (head, rest) = self.0.split_at_checked(16)?;
        let word = |at: usize| [head[at], head[at + 1], head[at + 2], head[at + 3]];
        let length = u32::from_ne_bytes(word(12)) as usize;
        let (name, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        Some(RawEvent {
            wd: i32::from_ne_bytes(word(0)),
            mask: u32::from_ne_bytes(word(4)),
            name: &name[..end],
        })
    }
}

/// What an inotify event means to the core; `None` for what it need not know.
pub fn event(raw: RawEvent) -> Option<Event> {
    if raw.mask & libc::IN_Q_OVERFLOW != 0 {
        return Some(Event::Overflow);
    }
    if raw.mask & libc::IN_IGNORED != 0 {
        return Some(Event::Unwatched { wd: raw.wd });
    }
    let entry = raw.mask & (libc::IN_CREATE | libc::IN_DELETE) != 0;
    let named = !raw.name.is_empty() && !raw.name.contains(&b'/');
    (entry && raw.mask & libc::IN_ISDIR != 0 && named)
        .then(|| Event::Changed { wd: raw.wd, name: raw.name.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(wd: i32, mask: u32, name: &[u8], padded: usize) -> Vec<u8> {
        let mut bytes = wd.to_ne_bytes().to_vec();
        bytes.extend(mask.to_ne_bytes());
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend((padded as u32).to_ne_bytes());
        bytes.extend(name);
        bytes.resize(16 + padded, 0);
        bytes
    }

    #[test]
    fn events_are_read_and_hostile_lengths_end_the_buffer() {
        let dir = libc::IN_CREATE | libc::IN_ISDIR;
        let mut bytes = raw(1, dir, b"abc", 16);
        bytes.extend(raw(-1, libc::IN_Q_OVERFLOW, b"", 0));
        bytes.extend(raw(2, libc::IN_IGNORED, b"", 0));
        bytes.extend(raw(3, libc::IN_CREATE, b"a-file", 16));
        let events: Vec<_> = RawEvents::new(&bytes).filter_map(event).collect();
        assert_eq!(
            events,
            [
                Event::Changed { wd: 1, name: (*b"abc").into() },
                Event::Overflow,
                Event::Unwatched { wd: 2 }
            ]
        );
        for cut in 0..bytes.len() {
            assert!(RawEvents::new(&bytes[..cut]).count() <= 4);
        }
        bytes[12..16].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(RawEvents::new(&bytes).count(), 0);
        // a name that would lead out of the directory
        assert_eq!(event(RawEvent { wd: 1, mask: dir, name: b"a/b" }), None);
    }
}
