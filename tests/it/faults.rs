//! Every system call of the daemon fails once, at every place of a scripted run and with every
//! plausible errno: strace's injector does that to the shipped program. In the end the kernel holds
//! what a clean run gives, or the program has exited with a reason and left whole rules.
//!
//! The program runs with `--no-seccomp`: the kernel shows the system call filter the number -1 of
//! an injected call, which the filter kills, as it must.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::client::PATIENCE;
use crate::daemon::{binary, run, Daemon};
use crate::ground::{remove_tree, Ground};
use crate::kernel::{cgroup_id, residue, state};
use crate::{sized, wait_until};

const CONFIG: &str = "
[tproxy mihomo]
port = 7893
[rules]
drop   = /n/.*/deep
drop   = /drop
direct = /proxied/a
mihomo = /n/[ac]
mihomo = /proxied
";

/// What a reload brings: another set, another mark, another priority of the rules.
const OTHER: &str = "
[global]
rule-priority = 90
[tproxy mihomo]
port = 7893
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
    ("writev", &["EAGAIN", "EIO"]),
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

/// The script under one fault. Returns the injected call, or None where there was none to inject
/// into; an error says what went wrong.
fn with_fault(ground: &Ground, fault: &str, clean: &Seen) -> Result<Option<String>, String> {
    set_up(ground);
    let trace = ground.dir.join("trace");
    let pidfile = ground.dir.join("pid");
    let _ = fs::remove_file(&pidfile);
    let call = fault.split(':').next().expect("a call");
    let (only, inject) = (format!("trace={call}"), format!("inject={fault}"));
    let trace_name = trace.to_str().expect("UTF-8");
    let by = ["strace", "-D", "-f", "-qq", "-o", trace_name, "-e", &only, "-e", &inject];
    let pidfile = pidfile.to_str().expect("UTF-8");
    let args = ["--no-seccomp", "-p", pidfile];
    let mut daemon = Daemon::spawn_by(ground, CONFIG, &by, &args, &[]);
    // the fault may have hit the very word that it is ready
    let ready = daemon.ready() || daemon.ended().is_none() && daemon.logs().contains("started");
    if ready {
        script(ground, &mut daemon);
    }
    finish(ground);
    let mut last = None;
    let converged = ready
        && wait_until(PATIENCE, || {
            last = Some(seen(ground));
            last.as_ref() == Some(clean) || daemon.ended().is_some()
        });
    // the end
    let early = daemon.ended();
    let ended = match early {
        Some(status) => status,
        None if ready => {
            daemon.signal(Signal::SIGTERM);
            daemon.wait()
        }
        None => daemon.wait(),
    };
    let log = daemon.logs();
    let left = residue();
    let mut wrong = Vec::new();
    if log.contains("panicked") {
        wrong.push("it panicked".into());
    }
    if ready && early.is_none() && !converged {
        wrong.push(format!("it did not converge: {last:#?}\nnot {clean:#?}"));
    }
    match ended.code() {
        Some(0) if early.is_some() => wrong.push("it ended by itself".into()),
        Some(0) if !left.is_empty() => wrong.push(format!("it left behind\n{left}")),
        Some(0) => {}
        Some(1) if !log.contains("unable to ") && !log.contains("already running") => {
            wrong.push("no reason is given".into())
        }
        Some(1) if ready && early.is_some() && !left.contains("table inet cgtproxy") => {
            wrong.push(format!("the rules are not in force any more:\n{left}"));
        }
        Some(1) if !ready && !left.is_empty() => {
            wrong.push(format!("a start that failed left behind\n{left}"));
        }
        Some(1) => {}
        // the configuration could not be read
        Some(2) if !ready && log.contains("error: ") && left.is_empty() => {}
        _ => wrong.push(format!("{ended}")),
    }
    if ended.code() == Some(1) {
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
    let trace = fs::read_to_string(&trace).unwrap_or_default();
    let hit = trace.lines().find(|line| line.contains("(INJECTED)"));
    match wrong.is_empty() {
        true => Ok(hit.map(|line| {
            let how = match (ready, ended.code()) {
                (false, _) => "refused to start",
                (true, Some(0)) => "converged",
                _ => "ended",
            };
            format!("{how}: {line}")
        })),
        false => Err(format!("{hit:?}\n{}\n{log}", wrong.join("\n"))),
    }
}

/// A daemon takes over what another has left, and leaves it in turn, with one fault on the way. What
/// is in force stays in force all the same. As [`with_fault`].
fn hand_over(ground: &Ground, fault: &str, before: &Seen) -> Result<Option<String>, String> {
    let trace = ground.dir.join("trace");
    let call = fault.split(':').next().expect("a call");
    let (only, inject) = (format!("trace={call}"), format!("inject={fault}"));
    let trace_name = trace.to_str().expect("UTF-8");
    let by = ["strace", "-D", "-f", "-qq", "-o", trace_name, "-e", &only, "-e", &inject];
    let pidfile = ground.dir.join("pid");
    let args = ["--no-seccomp", "-p", pidfile.to_str().expect("UTF-8")];
    let mut daemon = Daemon::spawn_by(ground, CONFIG, &by, &args, &[]);
    let ready = daemon.ready() || daemon.ended().is_none() && daemon.logs().contains("started");
    let mut wrong = Vec::new();
    if ready {
        wait_until(PATIENCE, || seen(ground) == *before);
        daemon.signal(Signal::SIGUSR2);
    }
    let code = daemon.wait().code();
    let log = daemon.logs();
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
    if call != "unlink" && pidfile.exists() {
        wrong.push("its pidfile stays".into());
    }
    let _ = fs::remove_file(&pidfile);
    let trace = fs::read_to_string(&trace).unwrap_or_default();
    let hit = trace.lines().find(|line| line.contains("(INJECTED)"));
    match wrong.is_empty() {
        true => Ok(hit.map(str::to_owned)),
        false => Err(format!("{hit:?}\n{}\n{log}", wrong.join("\n"))),
    }
}

#[test]
fn a_hand_over_with_one_fault() {
    let ground = ground!("handover");
    set_up(&ground);
    Daemon::start(&ground, CONFIG, &["--no-seccomp"]).leave();
    let before = seen(&ground);
    let (mut runs, mut wrong) = (0, Vec::new());
    for (i, (call, errnos)) in CALLS.iter().enumerate() {
        let mut when = 1 + i % 3;
        loop {
            let fault = format!("{call}:error={}:when={when}", errnos[0]);
            match hand_over(&ground, &fault, &before) {
                Ok(Some(_)) => runs += 1,
                Ok(None) => break,
                Err(why) => {
                    wrong.push(format!("{fault}: {why}"));
                    run(&["flush"]);
                    Daemon::start(&ground, CONFIG, &["--no-seccomp"]).leave();
                }
            }
            when += if sized(0, 1) == 1 { 1 } else { 3 + 4 * when };
        }
    }
    println!("{runs} faults in hand-overs");
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(runs > 0);
    assert!(Daemon::start(&ground, CONFIG, &[]).stop().success());
    assert_eq!(residue(), "");
}

#[test]
fn each_system_call_fails_once() {
    let ground = ground!("faults");
    set_up(&ground);
    let mut daemon = Daemon::start(&ground, CONFIG, &["--no-seccomp"]);
    script(&ground, &mut daemon);
    let mut clean = seen(&ground);
    wait_until(PATIENCE, || {
        let now = seen(&ground);
        let set = |name: &str| now.1.get(name).map_or(0, BTreeSet::len);
        clean = now.clone();
        set("cg_drop") == 4 && set("cg_mihomo") == 2
    });
    assert_eq!(clean.1["cg_drop"].len(), 4, "{clean:#?}");
    assert!(daemon.stop().success());

    // CGTPROXY_FAULTS=open,read: these calls alone
    let only = std::env::var("CGTPROXY_FAULTS").unwrap_or_default();
    let start = Instant::now();
    let long = sized(0, 1) == 1;
    let (mut runs, mut wrong) = (0, Vec::new());
    let mut outcomes: BTreeMap<String, usize> = BTreeMap::new();
    for (i, (call, errnos)) in CALLS.iter().enumerate() {
        if !only.is_empty() && !only.split(',').any(|name| name == *call) {
            continue;
        }
        // the short form: one errno a call, at places that lie further and further apart
        for errno in errnos.iter().take(if long { usize::MAX } else { 1 }) {
            let mut when = if long { 1 } else { 1 + i % 3 };
            loop {
                let fault = format!("{call}:error={errno}:when={when}");
                let told = Instant::now();
                match with_fault(&ground, &fault, &clean) {
                    Ok(Some(how)) => {
                        runs += 1;
                        println!("{fault}: {how} ({:?})", told.elapsed());
                        let how = how.split(':').next().unwrap_or_default();
                        *outcomes.entry(how.to_owned()).or_default() += 1;
                    }
                    Ok(None) => break,
                    Err(why) => {
                        println!("{fault}: WRONG");
                        wrong.push(format!("{fault}: {why}"));
                    }
                }
                when += if long { 1 } else { 2 + 3 * when };
            }
        }
    }
    println!("{runs} faults in {:?}: {outcomes:?}", start.elapsed());
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(runs > 0);
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
