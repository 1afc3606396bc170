//! `exec`: what runs under a target, and where it must not run.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::{Terminal, CONFIG};
use crate::daemon::{binary, run_at, run_with, Daemon, Said};
use crate::ground::{ip_batch, Ground, CGROUPS};
use crate::kernel::{await_member, load, SETTLE};
use crate::world::{Server, World};
use crate::{sized, wait_until};

/// The shell's words for "ask the remote host who answers, at once".
const ASK: &str =
    "exec 3<>/dev/udp/203.0.113.7/80; echo who >&3; timeout 30 dd bs=512 count=1 <&3 2>/dev/null";

#[test]
fn exec_leaks_nothing() {
    let (ground, mut world) = scene!("exec-leak");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let rounds = sized(200, 2000);
    let mut longest = Duration::ZERO;
    world.wire.packets();
    for round in 0..rounds {
        let start = Instant::now();
        let asked = daemon.ask(&["exec", "mihomo", "--", "bash", "-c", ASK]);
        longest = longest.max(start.elapsed());
        assert!(
            asked.out.starts_with("proxy mihomo 203.0.113.7:80 from"),
            "round {round}: {} {}",
            asked.out,
            asked.err
        );
        // each third time as if for the first time: everything has to be made and classified anew
        if round % 3 == 0 {
            let made = ground.at("/cgtproxy/mihomo");
            let pids = fs::read_dir(&made).expect("list").flatten();
            let dirs = pids.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
            dirs.for_each(|e| fs::remove_dir(e.path()).expect("remove what exec made"));
            fs::remove_dir(&made).expect("remove the target's cgroup");
        }
    }
    assert_eq!(world.wire.to_remote(), [], "left the host in {rounds} runs");
    println!("{rounds} runs, the longest {longest:?}");
    // the same words outside of exec do leave, so the wire would have seen them
    let direct = daemon.ask(&["exec", "direct", "--", "bash", "-c", ASK]);
    assert!(direct.out.starts_with("remote"), "{} {}", direct.out, direct.err);
    assert_ne!(world.wire.to_remote(), []);
}

/// Many at once, while the cgroups of those before are being removed.
#[test]
fn exec_many_at_once() {
    let ground = ground!("exec-many");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    for _ in 0..sized(5, 50) {
        let start = |i: usize| {
            let target = ["mihomo", "drop", "direct"][i % 3];
            let words = "exec grep -h ^0:: /proc/self/cgroup";
            let mut command = daemon.command(&["exec", target, "sh", "-c", words]);
            let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
            (target, child.expect("start cgtproxy"))
        };
        let all: Vec<_> = (0..12).map(start).collect();
        for (target, child) in all {
            let pid = child.id();
            let said = Said::from(child.wait_with_output().expect("wait"));
            let want = format!("/cgtproxy/{target}/{pid}\n");
            assert!(said.out.ends_with(&want), "{} {} is not {want}", said.out, said.err);
        }
    }
    daemon.ask(&["exec", "direct", "true"]);
    let left = |target: &str| {
        let entries = fs::read_dir(ground.at(&format!("/cgtproxy/{target}"))).expect("list");
        entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).count()
    };
    assert_eq!((left("mihomo"), left("drop")), (0, 0), "leftovers");
    assert!(left("direct") <= 1);
}

#[test]
fn exec_passes_everything_on() {
    let ground = ground!("exec-status");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let exec = |args: &[&str]| {
        let out = daemon.command(&[&["exec"], args].concat()).output();
        out.expect("start cgtproxy")
    };
    for (args, code) in [
        (&["drop", "true"][..], 0),
        (&["drop", "--", "sh", "-c", "exit 7"], 7),
        (&["drop", "sh", "-c", "exit 255"], 255),
        (&["mihomo", "no-such-command"], 127),
        (&["mihomo", "/nonexistent/x"], 127),
        (&["mihomo", "/etc"], 126),
        (&["mihomo", "/etc/passwd"], 126),
    ] {
        let out = exec(args);
        assert_eq!(out.status.code(), Some(code), "{args:?}");
        let lines = String::from_utf8_lossy(&out.stderr).lines().count();
        assert_eq!(lines, usize::from((126..128).contains(&code)), "{args:?}");
    }
    assert_eq!(exec(&["drop", "sh", "-c", "kill -TERM $$"]).status.signal(), Some(15));
    // options behind CMD are CMD's, and so is what follows --
    let echoed = |args: &[&str]| String::from_utf8(exec(args).stdout).expect("UTF-8");
    assert_eq!(echoed(&["drop", "echo", "-u", "-c", "--help", "--", "x"]), "-u -c --help -- x\n");
    assert_eq!(echoed(&["drop", "--", "echo", "-v"]), "-v\n");
    assert_eq!(echoed(&["-v", "drop", "echo", "x"]), "x\n");
    // bytes that are not UTF-8 arrive as they are
    let mut raw = daemon.command(&["exec", "drop", "printf", "%s"]);
    let bytes = std::os::unix::ffi::OsStrExt::from_bytes(b"a\xffb");
    let bytes: &std::ffi::OsStr = bytes;
    assert_eq!(raw.arg(bytes).output().expect("start cgtproxy").stdout, b"a\xffb");
    // no descriptor of ours, no signal ignored, that the command would not have had without us
    let words = "ls /proc/self/fd; grep -E 'Sig[PBIC]|Shd' /proc/self/status; env; ulimit -a";
    let mut without = Command::new("sh");
    without.args(["-c", words]).stdin(Stdio::null());
    let without = without.output().expect("start sh").stdout;
    let with = exec(&["drop", "sh", "-c", words]).stdout;
    assert_eq!(String::from_utf8_lossy(&with), String::from_utf8_lossy(&without));
}

#[test]
fn exec_as_another_user() {
    let ground = ground!("exec-user");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let words =
        "id -u; id -g; id -G; grep -h ^CapEff /proc/self/status; grep -h ^0:: /proc/self/cgroup";
    for args in [
        &["exec", "-u", "nobody", "drop", "sh", "-c", words][..],
        &["exec", "--user", "65534", "drop", "--", "sh", "-c", words],
        &["exec", "drop", "-u", "nobody", "--", "sh", "-c", words],
    ] {
        let said = daemon.ask(args);
        let want = "65534\n65534\n65534\nCapEff:\t0000000000000000\n";
        assert!(said.out.starts_with(want), "{args:?}: {} {}", said.out, said.err);
        assert!(said.out.contains("/cgtproxy/drop/"), "{}", said.out);
    }
    // a uid that no user has comes with the gid of that number and without the groups of root
    let unnamed = daemon.ask(&["exec", "-u", "1234567", "drop", "sh", "-c", words]);
    let want = "1234567\n1234567\n1234567\nCapEff:\t0000000000000000\n";
    assert!(unnamed.out.starts_with(want), "{} {}", unnamed.out, unnamed.err);
    // -1 means "leave it" to setuid(2)
    for odd in ["4294967295", "4294967296", "-1", ""] {
        let said = daemon.ask(&["exec", "--user", odd, "drop", "id", "-u"]);
        assert_ne!(said.code, Some(0), "{odd:?}");
        assert_eq!((&*said.out, said.err.lines().count()), ("", 1), "{odd:?}");
    }
    // a user who can do nothing more with the cgroups than before
    let daemon_group = daemon.ask(&[
        "exec",
        "-u",
        "nobody",
        "drop",
        "sh",
        "-c",
        "echo $$ > /sys/fs/cgroup/cgroup.procs",
    ]);
    assert_ne!(daemon_group.code, Some(0));
    let unknown = daemon.ask(&["exec", "-u", "no-such-user", "drop", "true"]);
    assert_eq!((unknown.code, &*unknown.err), (Some(2), "error: no such user: \"no-such-user\"\n"));
}

#[test]
fn exec_moves_only_itself() {
    let ground = ground!("exec-moves");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let home = fs::read_to_string("/proc/self/cgroup").expect("read");
    let mut child =
        daemon.command(&["exec", "mihomo", "sleep", "100"]).spawn().expect("start cgtproxy");
    let dir = ground.at(&format!("/cgtproxy/mihomo/{}", child.id()));
    let entered = || {
        fs::read_to_string(dir.join("cgroup.procs")).is_ok_and(|t| t == format!("{}\n", child.id()))
    };
    assert!(wait_until(SETTLE, entered), "not alone in {dir:?}");
    assert_eq!(fs::read_to_string("/proc/self/cgroup").expect("read"), home);
    // another exec does not take it for a leftover, nor a stopped one
    daemon.ask(&["exec", "mihomo", "true"]);
    assert!(dir.exists());
    // signals are CMD's own
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("kill");
    assert_eq!(child.wait().expect("wait").signal(), Some(15));
    daemon.ask(&["exec", "mihomo", "true"]);
    assert!(!dir.exists(), "the leftover is still there");
}

/// An interactive shell stops and continues it as any other job.
#[test]
fn exec_is_a_job_of_the_shell() {
    let ground = ground!("exec-jobs");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let mut shell = Terminal::open(&["bash", "--norc", "--noprofile", "-i"]);
    shell.say("PS1='ready> '; bind 'set enable-bracketed-paste off'\n");
    shell.expect("ready> ");
    let exec =
        format!("{} -c {} exec mihomo sleep 1234\n", binary().display(), daemon.config.display());
    shell.say(&exec);
    let dir = ground.at("/cgtproxy/mihomo");
    let running = || {
        let all = fs::read_dir(&dir).into_iter().flatten().flatten();
        let procs = all.filter_map(|e| fs::read_to_string(e.path().join("cgroup.procs")).ok());
        procs.flat_map(|t| t.lines().map(str::to_owned).collect::<Vec<_>>()).next()
    };
    let is_sleep = |pid: &String| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "sleep\n")
    };
    assert!(wait_until(SETTLE, || running().as_ref().is_some_and(is_sleep)), "{}", shell.seen);
    shell.say("\x1a"); // Ctrl-Z
    shell.expect("Stopped");
    shell.say("jobs -l\n");
    shell.expect("sleep 1234");
    shell.say("fg\n");
    shell.expect("sleep 1234");
    let state = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.split(' ').nth(2).map(str::to_owned)
    };
    let pid = running().expect("the job");
    assert!(wait_until(SETTLE, || state(&pid).as_deref() == Some("S")));
    // the terminal is the job's, not the shell's: Ctrl-C goes to it
    let in_front = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // pgrp and tpgid of proc_pid_stat(5); the name holds no blank
        let fields: Vec<&str> = stat.split(' ').collect();
        fields.len() > 7 && fields[4] == fields[7]
    };
    assert!(wait_until(SETTLE, in_front), "{}", shell.seen);
    shell.say("\x03"); // Ctrl-C
    shell.expect("ready> ");
    shell.say("echo status $?\n");
    shell.expect("status 130");
}

/// Asserts that `exec` under mihomo is refused, with that reason, and runs nothing.
#[track_caller]
fn expect_refused(ground: &Ground, ask: impl Fn(&[&str]) -> Said, why: &str) {
    let witness = ground.dir.join("ran");
    let said = ask(&["exec", "mihomo", "touch", witness.to_str().expect("a UTF-8 path")]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    let want = "error: unable to exec: target mihomo is not in force: ";
    assert!(said.err.starts_with(want) && said.err.contains(why), "{} is not {why}", said.err);
    assert_eq!(said.err.lines().count(), 1);
    assert!(!witness.exists(), "it ran");
    let dir = ground.at("/cgtproxy/mihomo").read_dir().expect("list").flatten();
    let cgroups = dir.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    assert_eq!(cgroups.count(), 0, "a refusal leaves no cgroup");
}

#[test]
fn exec_refuses_where_there_is_no_table() {
    let ground = ground!("exec-none");
    let ask = |args: &[&str]| run_with(&ground, CONFIG, args);
    expect_refused(&ground, ask, "there is no table inet cgtproxy, and no cgtproxy is running");
    // everything is direct then, for everybody
    assert_eq!(ask(&["exec", "direct", "true"]).code, Some(0));
}

/// A target that the daemon does not know, and one that has another mark there.
#[test]
fn exec_refuses_a_policy_that_has_not_been_loaded() {
    let ground = ground!("exec-unloaded");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    daemon.configure(&CONFIG.replace("[rules]", "[tproxy other]\nport = 1\n[rules]"));
    let unknown = daemon.ask(&["exec", "other", "true"]);
    assert_eq!(unknown.code, Some(1));
    let why = "table inet cgtproxy has no chain to_other (reload cgtproxy)";
    assert!(unknown.err.contains(why), "{}", unknown.err);
    daemon.configure(&CONFIG.replace("port = 7893", "port = 7893\nmark = 0x7000000"));
    let why = "chain to_mihomo does not set mark 0x7000000 (reload cgtproxy)";
    expect_refused(&ground, |args| daemon.ask(args), why);
    daemon.stop_clean();
}

/// An ip rule is gone, then a route, and the daemon cannot mend it.
#[test]
fn exec_refuses_without_its_rules_and_routes() {
    let ground = ground!("exec-routing");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    await_member(&ground.cgroup("/cgtproxy/mihomo"), "mihomo");
    daemon.signal(Signal::SIGSTOP);
    let ask = |args: &[&str]| daemon.ask(args);
    ip_batch(&["-4"], "rule del pref 100\n");
    let why = "missing: ip rule add pref 100 iif lo fwmark 0x01000000/0xff000000 lookup 300";
    expect_refused(&ground, ask, why);
    let rule = "rule add pref 100 iif lo fwmark 0x1000000/0xff000000 lookup 300 protocol 99\n";
    ip_batch(&["-4"], rule);
    ip_batch(&["-6"], "route flush table 300\n");
    let why = "missing: ip -6 route add local default dev lo table 300";
    expect_refused(&ground, ask, why);
    daemon.signal(Signal::SIGCONT);
    daemon.stop_clean();
}

/// The rules stay, but nobody classifies: what is put in by hand is as good as by the daemon, for what
/// counts is what the kernel holds.
#[test]
fn exec_asks_the_kernel_and_not_the_daemon() {
    let (ground, mut world, _proxy) = scene!("exec-kernel", proxy);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let file = daemon.config.clone();
    let ask = |args: &[&str]| run_at(&file, args);
    daemon.kill9();
    let why = "cgroup /cgtproxy/mihomo is not in set cg_mihomo, and no cgtproxy is running";
    expect_refused(&ground, ask, why);
    let path = ground.at("/cgtproxy/mihomo");
    let name = path.strip_prefix(CGROUPS).expect("below the mount").display().to_string();
    load(&format!("add element inet cgtproxy cg_mihomo {{ \"{name}\" }}\n"));
    load("flush chain inet cgtproxy output\n");
    expect_refused(&ground, ask, "chain output has no rule for set cg_mihomo at level 3");
    load("add rule inet cgtproxy output socket cgroupv2 level 3 @cg_mihomo goto to_mihomo\n");
    let ran = ask(&["exec", "mihomo", "--", "bash", "-c", ASK]);
    assert!(ran.out.starts_with("proxy mihomo"), "{} {}", ran.out, ran.err);
    assert_eq!(world.wire.to_remote(), []);
}

/// One that others have flushed, or made dormant, is there and does nothing.
#[test]
fn a_table_that_does_nothing_is_not_in_force() {
    let ground = ground!("exec-idle");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let file = daemon.config.clone();
    let ask = |args: &[&str]| run_at(&file, args);
    let headline = || ask(&["status"]).out.lines().next().map(str::to_string);
    daemon.kill9();
    let in_force = "table inet cgtproxy: in force, default direct; no cgtproxy is running";
    assert_eq!(headline().as_deref(), Some(in_force));
    load("flush table inet cgtproxy\n");
    let empty = "table inet cgtproxy: without rules, not in force; no cgtproxy is running";
    assert_eq!(headline().as_deref(), Some(empty));
    assert!(ask(&["status", "--json"]).out.contains("\"in_force\":false"));
    // a table that persists cannot be made dormant, one of before Linux 6.9 can
    load("delete table inet cgtproxy\n");
    let table = "table inet cgtproxy {\n";
    load(&(ask(&["show"]).out).replace(table, &format!("{table}flags dormant\n")));
    expect_refused(&ground, ask, "table inet cgtproxy is dormant");
}

/// It waits for a daemon that is late, as long as is sensible.
#[test]
fn exec_waits_for_the_classification() {
    let ground = ground!("exec-waits");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    daemon.signal(Signal::SIGSTOP);
    let child = daemon
        .command(&["exec", "mihomo", "echo", "ran"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start cgtproxy");
    let made = || ground.at(&format!("/cgtproxy/mihomo/{}", child.id())).exists();
    assert!(wait_until(SETTLE, made));
    daemon.signal(Signal::SIGCONT);
    let out = child.wait_with_output().expect("wait");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "ran\n");
    // and gives up on one that does not answer
    let made = ground.at("/cgtproxy/drop");
    daemon.signal(Signal::SIGSTOP);
    let start = Instant::now();
    let said = daemon.ask(&["exec", "drop", "true"]);
    assert!(start.elapsed().as_secs() >= 4, "{:?}", start.elapsed());
    assert_eq!(said.code, Some(1));
    assert!(
        said.err.contains("cgroup /cgtproxy/drop is not in set cg_drop after 5 s"),
        "{}",
        said.err
    );
    daemon.signal(Signal::SIGCONT);
    await_member(&made, "drop");
}

/// Whatever rules cover `/cgtproxy`, TARGET is what was asked for.
#[test]
fn exec_comes_before_every_rule() {
    let (ground, mut world, _proxy) = scene!("exec-first", proxy);
    for (config, default) in [
        (
            "[global]\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /.*\n",
            "proxy",
        ),
        ("[tproxy mihomo]\nport = 7893\n[rules]\ndrop = /cgtproxy.*\n", "remote"),
    ] {
        let config = config.replacen("[global]\n", "", 1);
        let global = if default == "proxy" { "default = mihomo\n" } else { "" };
        let config = config.replacen("default = mihomo\n", "", 1);
        let config = format!("[global]\ncgroup-root = {}\n{global}{config}", ground.root.display());
        let daemon = Daemon::start(&ground, &config, &[]);
        for (target, who) in
            [("mihomo", "proxy mihomo"), ("direct", "remote"), ("mihomo", "proxy mihomo")]
        {
            world.wire.packets();
            let said = daemon.ask(&["exec", target, "bash", "-c", ASK]);
            assert!(said.out.starts_with(who), "{target}: {} {}", said.out, said.err);
            let left = world.wire.to_remote();
            assert_eq!(left.is_empty(), target == "mihomo", "{left:?}");
        }
        daemon.stop();
        for target in ["mihomo", "direct"] {
            let dir = ground.at(&format!("/cgtproxy/{target}"));
            let pids = fs::read_dir(&dir).expect("list").flatten();
            pids.for_each(|e| drop(fs::remove_dir(e.path())));
            fs::remove_dir(dir).expect("remove");
        }
        fs::remove_dir(ground.at("/cgtproxy")).expect("remove");
    }
}
