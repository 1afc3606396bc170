//! Every system call of the daemon fails once, at every place of a scripted run and with every
//! plausible errno: strace's injector does that to the shipped program. In the end the kernel holds
//! what a clean run gives, or the program has exited with a reason and left whole rules.
//!
//! The program runs with `--no-seccomp`: the kernel shows the system call filter the number -1 of
//! an injected call, which the filter kills, as it must.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Instant;

use libc::c_int;
use nix::sys::signal::Signal;

use crate::client::{descriptor_of, expect, under, Client, PATIENCE};
use crate::containers::{await_entrances, boxes, BOXES};
use crate::daemon::{binary, run, Daemon};
use crate::ground::{addr, remove_tree, Ground, REMOTE4};
use crate::kernel::{await_member, cgroup_id, residue, state, table};
use crate::world::{set, World};
use crate::{sized, wait_until};

const CONFIG: &str = "
[global]
bypass = 192.0.2.0/24
[tproxy mihomo]
port = 7893
tcp-ports = 80 1000-2000
[rules]
drop   = /n/.*/deep
drop   = /drop
direct = /proxied/a
mihomo = /n/[ac]
mihomo = /proxied
";

/// What a reload brings: another set, another mark, another priority of the rules, other ports.
const OTHER: &str = "
[global]
rule-priority = 90
bypass = 192.0.2.0/24
[tproxy mihomo]
port = 7893
tcp-ports = 80 1000-3000
[tproxy other]
port = 7894
[rules]
drop   = /n/.*/deep
drop   = /drop
direct = /proxied/a
mihomo = /n/[ac]
other  = /proxied
";

/// A system call as strace names it, and what it may fail with. Not ENOENT for a cgroup: the kernel
/// says so of a directory that is gone, which its parent's event then tells.
const CALLS: &[(&str, &[&str])] = &[
    ("inotify_init1", &["EMFILE", "ENOMEM"]),
    ("inotify_add_watch", &["ENOSPC", "ENOMEM", "EACCES"]),
    ("inotify_rm_watch", &["EINVAL"]),
    ("name_to_handle_at", &["EIO", "ENOMEM", "EACCES"]),
    ("newfstatat", &["EIO", "ENOMEM"]),
    ("fchdir", &["EACCES", "EIO"]),
    ("lstat", &["EIO", "ENOMEM"]),
    ("getdents64", &["EIO", "ENOMEM"]),
    ("open", &["EMFILE", "EACCES", "ENOMEM", "EINTR"]),
    ("sendto", &["ENOBUFS", "EINTR", "ENOMEM", "EAGAIN", "EPERM"]),
    ("recvfrom", &["ENOBUFS", "EINTR", "EAGAIN", "ENOMEM"]),
    ("read", &["EINTR", "EAGAIN", "EIO", "ENOMEM"]),
    ("poll", &["EINTR", "ENOMEM", "EAGAIN"]),
    ("socket", &["EMFILE", "ENOMEM", "ENOBUFS"]),
    ("bind", &["EADDRINUSE", "ENOMEM"]),
    ("getsockname", &["ENOBUFS"]),
    ("setsockopt", &["ENOPROTOOPT", "EPERM", "ENOMEM"]),
    ("signalfd4", &["EMFILE"]),
    ("fstat", &["EIO"]),
    ("write", &["EAGAIN", "EINTR", "EPIPE", "EIO"]),
    ("ftruncate", &["EIO", "ENOSPC"]),
    ("unlink", &["EACCES"]),
    ("prctl", &["EINVAL"]),
    ("capset", &["EPERM"]),
    ("prlimit64", &["EPERM"]),
];

/// The kernel's state with cgroups by path, so that two runs can be compared.
type Seen = (String, BTreeMap<String, BTreeSet<String>>);

fn seen(ground: &Ground) -> Seen {
    fn walk(dir: &Path, root: &Path, names: &mut BTreeMap<u64, String>) {
        let name = dir.strip_prefix(root).expect("below the root").display();
        names.extend(cgroup_id(dir).map(|id| (id, name.to_string())));
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), root, names);
            }
        }
    }
    let mut names = BTreeMap::new();
    walk(&ground.root, &ground.root, &mut names);
    let (text, sets) = state();
    let name = |id: u64| names.get(&id).cloned().unwrap_or(format!("stale {id}"));
    let sets = sets.into_iter();
    let sets = sets.map(|(set, ids)| (set, ids.into_iter().map(name).collect()));
    (text, sets.collect())
}

/// Takes the cgroups back to where the script begins.
fn set_up(ground: &Ground) {
    for entry in fs::read_dir(&ground.root).expect("list").flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    for path in ["/drop/x", "/proxied/a/b", "/n/a"] {
        ground.cgroup(path);
    }
}

fn shell(line: &str) {
    let out = Command::new("sh").args(["-c", line]).output();
    out.expect("start sh");
}

/// What happens to the program between its start and its end.
fn script(ground: &Ground, daemon: &mut Daemon) {
    ground.cgroup("/n/a/deep/er");
    ground.cgroup("/n/b/deep");
    for path in ["/drop/x", "/drop"] {
        fs::remove_dir(ground.at(path)).expect("rmdir");
    }
    ground.cgroup("/drop");
    shell("ip rule del pref 100; ip -6 route del local default dev lo table 300");
    daemon.configure(OTHER);
    for _ in 0..3 {
        let before = daemon.logs().len();
        if daemon.ended().is_some() {
            return;
        }
        daemon.signal(Signal::SIGHUP);
        let mut said = String::new();
        wait_until(PATIENCE, || {
            said = daemon.logs()[before..].to_owned();
            said.contains("reload") || daemon.ended().is_some()
        });
        if said.contains("reloaded") {
            break;
        }
    }
    ground.cgroup("/n/c/deep");
}

/// Brings the tree to where the script ends, whether or not the program lived to see it.
fn finish(ground: &Ground) {
    for path in ["/n/a/deep/er", "/n/b/deep", "/n/c/deep"] {
        ground.cgroup(path);
    }
    let _ = fs::remove_dir(ground.at("/drop/x"));
}

/// A daemon that meets a fault, `CALL:error=ERRNO:when=PLACE`.
struct Faulty {
    daemon: Daemon,
    ready: bool,
    call: String,
    trace: PathBuf,
    pidfile: PathBuf,
}

impl Faulty {
    fn start(ground: &Ground, fault: &str) -> Faulty {
        let [trace, pidfile] = ["trace", "pid"].map(|name| ground.dir.join(name));
        let _ = fs::remove_file(&pidfile);
        let call = fault.split(':').next().expect("a call").to_owned();
        let (only, inject) = (format!("trace={call}"), format!("inject={fault}"));
        let trace_name = trace.to_str().expect("UTF-8");
        let by = ["strace", "-D", "-f", "-qq", "-o", trace_name, "-e", &only, "-e", &inject];
        let args = ["--no-seccomp", "-p", pidfile.to_str().expect("UTF-8")];
        let mut daemon = Daemon::spawn_by(ground, CONFIG, &by, &args, &[]);
        // the fault may have hit the very word that it is ready
        let ready = daemon.ready() || daemon.ended().is_none() && daemon.logs().contains("started");
        Faulty { daemon, ready, call, trace, pidfile }
    }

    /// How it went: an outcome with the call that was injected, None where there was none to inject into,
    /// or what is wrong.
    fn verdict(&self, outcome: &str, wrong: Vec<String>) -> Result<Option<String>, String> {
        let trace = fs::read_to_string(&self.trace).unwrap_or_default();
        let hit = trace.lines().find(|line| line.contains("(INJECTED)"));
        match wrong.is_empty() {
            true => Ok(hit.map(|line| format!("{outcome}: {line}"))),
            false => Err(format!("{hit:?}\n{}\n{}", wrong.join("\n"), self.daemon.logs())),
        }
    }
}

/// What is wrong with an end, at which `left` was left: `early` where nobody had asked for it.
fn wrong_end(ready: bool, early: bool, end: ExitStatus, log: &str, left: &str) -> Option<String> {
    match end.code() {
        Some(0) if early => Some("it ended by itself".into()),
        Some(0) if !left.is_empty() => Some(format!("it left behind\n{left}")),
        Some(0) => None,
        Some(1) if !log.contains("unable to ") && !log.contains("already running") => {
            Some("no reason is given".into())
        }
        Some(1) if ready && early && !left.contains("table inet cgtproxy") => {
            Some(format!("the rules are not in force any more:\n{left}"))
        }
        Some(1) if !ready && !left.is_empty() => {
            Some(format!("a start that failed left behind\n{left}"))
        }
        Some(1) => None,
        // the configuration could not be read
        Some(2) if !ready && log.contains("error: ") && left.is_empty() => None,
        _ => Some(format!("{end}")),
    }
}

/// The script under one fault; see [`Faulty::verdict`].
fn with_fault(ground: &Ground, fault: &str, clean: &Seen) -> Result<Option<String>, String> {
    set_up(ground);
    let mut it = Faulty::start(ground, fault);
    let (ready, daemon) = (it.ready, &mut it.daemon);
    if ready {
        script(ground, daemon);
    }
    finish(ground);
    let mut last = None;
    let converged = ready
        && wait_until(PATIENCE, || {
            last = Some(seen(ground));
            last.as_ref() == Some(clean) || daemon.ended().is_some()
        });
    let early = daemon.ended().is_some();
    if !early && ready {
        daemon.signal(Signal::SIGTERM);
    }
    let end = daemon.wait();
    let (log, left) = (daemon.logs(), residue());

    let mut wrong = Vec::from_iter(wrong_end(ready, early, end, &log, &left));
    if log.contains("panicked") {
        wrong.push("it panicked".into());
    }
    if ready && !early && !converged {
        wrong.push(format!("it did not converge: {last:#?}\nnot {clean:#?}"));
    }
    if end.code() == Some(1) {
        // whatever it left, the next one takes over and leaves nothing
        let next = Daemon::start(ground, OTHER, &[]);
        if seen(ground) != *clean {
            wrong.push(format!("the next start has {:#?}", seen(ground)));
        }
        if !next.stop().success() || !residue().is_empty() {
            wrong.push(format!("the next one leaves {}", residue()));
        }
    } else if !left.is_empty() {
        run(&["flush"]);
    }
    let outcome = match (ready, end.code()) {
        (false, _) => "refused to start",
        (true, Some(0)) => "converged",
        _ => "ended",
    };
    it.verdict(outcome, wrong)
}

/// A daemon takes over what another has left, and leaves it in turn, with one fault on the way. What
/// is in force stays in force all the same. As [`with_fault`].
fn hand_over(ground: &Ground, fault: &str, before: &Seen) -> Result<Option<String>, String> {
    let mut it = Faulty::start(ground, fault);
    let ready = it.ready;
    if ready {
        wait_until(PATIENCE, || seen(ground) == *before);
        it.daemon.signal(Signal::SIGUSR2);
    }
    let code = it.daemon.wait().code();

    let log = it.daemon.logs();
    let mut wrong = Vec::new();
    match code {
        Some(0) if ready => {}
        Some(1) if log.contains("unable to ") => {}
        Some(2) if !ready && log.contains("error: ") => {}
        _ => wrong.push(format!("{code:?}, ready: {ready}")),
    }
    let after = seen(ground);
    if after != *before {
        wrong.push(format!("{after:#?} is in force, not {before:#?}"));
    }
    if it.call != "unlink" && it.pidfile.exists() {
        wrong.push("its pidfile stays".into());
    }
    it.verdict("handed over", wrong)
}

/// Runs something under each fault: each call with its first errno, or with all of them where `all`, at
/// one of its first places and at more that lie further and further apart by `next`, or at all in the
/// long form. Gives the calls that were never made.
fn each_fault(
    all: bool,
    next: impl Fn(usize) -> usize,
    mut run: impl FnMut(&str) -> Result<Option<String>, String>,
) -> Vec<&'static str> {
    // CGTPROXY_FAULTS=open,read: these calls alone
    let only = std::env::var("CGTPROXY_FAULTS").unwrap_or_default();
    let (start, long) = (Instant::now(), sized(0, 1) == 1);
    let (mut wrong, mut never) = (Vec::new(), Vec::new());
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    for (i, (call, errnos)) in CALLS.iter().enumerate() {
        if !only.is_empty() && !only.split(',').any(|name| name == *call) {
            continue;
        }
        let mut hits = 0;
        for errno in errnos.iter().take(if all { usize::MAX } else { 1 }) {
            let mut when = if long { 1 } else { 1 + i % 3 };
            loop {
                let fault = format!("{call}:error={errno}:when={when}");
                let told = Instant::now();
                match run(&fault) {
                    Ok(Some(how)) => {
                        hits += 1;
                        println!("{fault}: {how} ({:?})", told.elapsed());
                        let how = how.split(':').next().unwrap_or_default();
                        *outcomes.entry(how.to_owned()).or_default() += 1;
                    }
                    // it is made less often than that
                    Ok(None) if hits == 0 && when > 1 => {
                        when = 1;
                        continue;
                    }
                    Ok(None) => break,
                    Err(why) => {
                        println!("{fault}: WRONG");
                        wrong.push(format!("{fault}: {why}"));
                    }
                }
                when += if long { 1 } else { next(when) };
            }
        }
        never.extend((hits == 0).then_some(*call));
    }
    println!("faults in {:?}: {outcomes:?}, none in {never:?}", start.elapsed());
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    never
}

/// What is in force stays so over a hand-over, whichever call of the next one fails.
#[test]
fn a_hand_over_with_one_fault() {
    let ground = ground!("handover");
    set_up(&ground);
    let leave = || Daemon::start(&ground, CONFIG, &["--no-seccomp"]).leave();
    leave();
    let before = seen(&ground);

    let never = each_fault(
        false,
        |when| 3 + 4 * when,
        |fault| {
            let done = hand_over(&ground, fault, &before);
            if done.is_err() {
                run(&["flush"]);
                leave();
            }
            done
        },
    );

    // no cgroup goes
    assert!(never.iter().all(|call| *call == "inotify_rm_watch"), "{never:?}");
    assert!(Daemon::start(&ground, CONFIG, &[]).stop().success());
    assert_eq!(residue(), "");
}

/// Whichever call fails, in the end the kernel holds what it is to hold, or there is a reason, and whole
/// rules.
#[test]
fn each_system_call_fails_once() {
    let ground = ground!("faults");
    set_up(&ground);
    let mut daemon = Daemon::start(&ground, CONFIG, &["--no-seccomp"]);
    script(&ground, &mut daemon);
    let mut clean = seen(&ground);
    let settled = wait_until(PATIENCE, || {
        clean = seen(&ground);
        let size = |name: &str| clean.1.get(name).map_or(0, BTreeSet::len);
        size("cg_drop") == 4 && size("cg_mihomo") == 2
    });
    assert!(settled, "{clean:#?}");
    assert!(daemon.stop().success());

    let all = sized(0, 1) == 1;
    let never = each_fault(all, |when| 2 + 3 * when, |fault| with_fault(&ground, fault, &clean));

    assert_eq!(never, [""; 0], "calls that the script does not make");
}

/// Whichever message a daemon is killed at, over its start and a reload, the next one leaves nothing of it.
#[test]
fn killed_at_any_message() {
    let ground = ground!("killed");
    set_up(&ground);
    let take_over = || {
        let next = Daemon::start(&ground, OTHER, &[]);
        let there = seen(&ground);
        next.stop_clean();
        there
    };
    let clean = take_over();
    let mut when = 1;
    loop {
        let mut it = Faulty::start(&ground, &format!("sendto:signal=KILL:when={when}"));
        let (ready, daemon) = (it.ready, &mut it.daemon);
        if ready {
            daemon.configure(OTHER);
            daemon.signal(Signal::SIGHUP);
            let done = |daemon: &mut Daemon| daemon.logs().contains("reloaded");
            wait_until(PATIENCE, || daemon.ended().is_some() || done(daemon));
        }
        let survived = daemon.ended().is_none();
        println!("{when}: {}", if ready { "over the reload" } else { "over the start" });
        drop(it);
        assert_eq!(take_over(), clean, "killed at {when}");
        if survived {
            break;
        }
        when += sized(7, 1);
    }
}

/// `exec` waits for the daemon, not for a kernel that has stopped answering.
#[test]
fn exec_ends_where_the_kernel_answers_no_more() {
    let ground = ground!("execfaults");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let config = daemon.config.to_str().expect("UTF-8");
    let mut refused = 0;
    loop {
        let inject = format!("inject=recvfrom:error=EIO:when={}+", refused + 1);
        let mut command = Command::new("timeout");
        command.args(["-s", "KILL", "60", "strace", "-qq", "-o", "/dev/null", "-e", &inject]);
        command.arg(binary()).args(["-c", config, "exec", "drop", "true"]);
        let out = command.output().expect("start strace");
        let said = String::from_utf8_lossy(&out.stderr);
        match out.status.code() {
            // what it asks has been answered before
            Some(0) => break,
            Some(1) if said.contains("unable to ") => refused += 1,
            code => panic!("{code:?} from the answer {} on: {said}", refused + 1),
        }
    }
    assert!(refused > 5, "{refused}");
    daemon.stop_clean();
}

/// The daemon's sockets to nf_tables, which refuse what is longer than they are let until this is
/// dropped. Nothing tells the daemon of either.
struct Choked(Vec<OwnedFd>);

impl Choked {
    fn at(daemon: &Daemon, most: usize) -> Choked {
        let fds = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("list the descriptors");
        let fds = fds.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let all = fds.map(|fd| descriptor_of(daemon.pid(), fd));
        let choked = Choked(all.filter(is_to_netfilter).collect());
        assert!(!choked.0.is_empty());
        choked.set(most);
        choked
    }

    fn set(&self, most: usize) {
        for fd in &self.0 {
            // the kernel doubles it, for what it needs itself, and has a least
            set(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, most as i32 / 2);
        }
    }
}

impl Drop for Choked {
    fn drop(&mut self) {
        self.set(1 << 20);
    }
}

pub fn is_to_netfilter(fd: &OwnedFd) -> bool {
    let get = |option| {
        let (mut value, mut size) = (0, size_of::<c_int>() as libc::socklen_t);
        let out: *mut c_int = &mut value;
        // SAFETY: writes one c_int, and its size.
        let rc = unsafe {
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, out.cast(), &mut size)
        };
        (rc == 0).then_some(value)
    };
    get(libc::SO_DOMAIN) == Some(libc::AF_NETLINK)
        && get(libc::SO_PROTOCOL) == Some(libc::NETLINK_NETFILTER)
}

/// What is refused is tried again until it is taken, by itself: the table, with what came meanwhile.
#[test]
fn a_table_that_is_refused_for_some_time() {
    let (ground, mut world) = scene!("refused");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let choked = Choked::at(&daemon, 0);
    daemon.configure(OTHER);
    let log = daemon.refuse();
    assert!(log.contains("trying again in 1 s"), "{log}");
    let dropped = ground.cgroup("/drop");
    assert!(daemon.wait_log("trying again in 2 s", PATIENCE), "{}", daemon.logs());
    assert_eq!(Client::udp(&dropped, addr(REMOTE4, 80)).run().who(), "remote 203.0.113.7:80");

    drop(choked);
    await_member(&dropped, "drop");
    world.wire.packets();
    expect(&[(&dropped, under("drop"))]);
    assert_eq!(world.wire.to_remote(), []);
    // and what was refused is taken when it is asked for again
    daemon.reload();
    assert!(table().contains("cg_other"), "{}", table());
    daemon.stop_clean();
}

/// The same of where containers come in: all else is in force meanwhile, and they are soon.
#[test]
fn containers_that_are_refused_for_some_time() {
    let (ground, mut world, _proxy) = scene!("refusedboxes", proxy);
    let (lan, _boxes, daemon) = boxes(&ground);
    let choked = Choked::at(&daemon, 1 << 20);
    // somewhere between are a few hundred bytes with which the table is taken, but not with them
    let (mut refused, mut taken) = (0, 1 << 18);
    loop {
        assert!(taken - refused > 64, "{}", daemon.logs());
        let most = (refused + taken) / 2;
        choked.set(most);
        match daemon.hup() {
            Ok(log) if log.contains("; trying again\n") => break,
            Ok(_) => taken = most,
            Err(_) => refused = most,
        }
    }
    drop(choked);

    await_entrances(&daemon, &BOXES);
    world.wire.packets();
    lan.proxied(0);
    lan.dropped(1);
    world.wire.assert_only_pings();
}
