//! `exec`: what runs under a target, and where it must not run.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::{Terminal, CONFIG};
use crate::daemon::{binary, run_at, run_with, Daemon, Said};
use crate::ground::{ip_batch, Ground, CGROUPS};
use crate::kernel::{await_member, load, SETTLE};
use crate::world::{World, PROXY};
use crate::{sized, wait_until};

/// The shell's words for "ask the remote host who answers, at once".
const ASK: &str =
    "exec 3<>/dev/udp/203.0.113.7/80; echo who >&3; timeout 30 dd bs=512 count=1 <&3 2>/dev/null";

/// The cgroups below a target's.
fn cgroups_of(ground: &Ground, target: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(ground.at(&format!("/cgtproxy/{target}"))).expect("list").flatten();
    let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.map(|entry| entry.path()).collect()
}

/// Removes what `exec` has made for a target, as if nobody had asked for it yet.
fn forget(ground: &Ground, target: &str) {
    for path in cgroups_of(ground, target) {
        fs::remove_dir(path).expect("remove what exec made");
    }
    fs::remove_dir(ground.at(&format!("/cgtproxy/{target}"))).expect("remove the target's cgroup");
}

/// No packet of a command goes another way than its target's, whether that has cgroups already or not.
#[test]
fn exec_leaks_nothing() {
    let (ground, mut world, _proxy) = scene!("exec-leak", proxy);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let rounds = sized(200, 2000);
    let mut longest = Duration::ZERO;
    world.wire.packets();
    for round in 0..rounds {
        let start = Instant::now();
        let asked = daemon.ask(&["exec", "mihomo", "--", "bash", "-c", ASK]);
        longest = longest.max(start.elapsed());
        let proxied = asked.out.starts_with("proxy mihomo 203.0.113.7:80 from");
        assert!(proxied, "round {round}: {}", asked.all());
        // each third time everything has to be made and classified anew
        if round % 3 == 0 {
            forget(&ground, "mihomo");
        }
    }
    println!("{rounds} runs, the longest {longest:?}");
    assert_eq!(world.wire.to_remote(), [], "left the host in {rounds} runs");
    // the same words do leave where they may, so the wire would have seen them
    let direct = daemon.ask(&["exec", "direct", "--", "bash", "-c", ASK]);
    assert!(direct.out.starts_with("remote"), "{}", direct.all());
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
            assert!(said.out.ends_with(&want), "{} is not {want}", said.all());
        }
    }

    daemon.ask(&["exec", "direct", "true"]);

    let left = ["mihomo", "drop", "direct"].map(|target| cgroups_of(&ground, target).len());
    assert!(left[..2] == [0, 0] && left[2] <= 1, "leftovers: {left:?}");
}

/// CMD's exit status is passed on; where there is no CMD to run, one line says why.
#[test]
fn exec_passes_everything_on() {
    let ground = ground!("exec-status");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    for (args, code) in [
        (&["drop", "true"][..], 0),
        (&["drop", "--", "sh", "-c", "exit 7"], 7),
        (&["drop", "sh", "-c", "exit 255"], 255),
        (&["mihomo", "no-such-command"], 127),
        (&["mihomo", "/nonexistent/x"], 127),
        (&["mihomo", "/etc"], 126),
        (&["mihomo", "/etc/passwd"], 126),
    ] {
        let said = daemon.ask(&[&["exec"], args].concat());
        assert_eq!(said.code, Some(code), "{args:?}");
        let lines = usize::from((126..128).contains(&code));
        assert_eq!(said.err.lines().count(), lines, "{args:?}");
    }
    let mut killed = daemon.command(&["exec", "drop", "sh", "-c", "kill -TERM $$"]);
    assert_eq!(killed.status().expect("start cgtproxy").signal(), Some(15));
}

/// Options behind CMD are CMD's, and so is what follows `--`; bytes that are no UTF-8 arrive as they
/// are.
#[test]
fn exec_leaves_the_words_of_the_command_alone() {
    let ground = ground!("exec-words");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    for (args, want) in [
        (&["drop", "echo", "-u", "-c", "--help", "--", "x"][..], "-u -c --help -- x\n"),
        (&["drop", "--", "echo", "-v"], "-v\n"),
        (&["-v", "drop", "echo", "x"], "x\n"),
    ] {
        assert_eq!(daemon.ask(&[&["exec"], args].concat()).out, want);
    }
    let mut raw = daemon.command(&["exec", "drop", "printf", "%s"]);
    let out = raw.arg(OsStr::from_bytes(b"a\xffb")).output().expect("start cgtproxy");
    assert_eq!(out.stdout, b"a\xffb");
}

/// CMD has no descriptor, signal, variable or limit that it would not have had without us.
#[test]
fn exec_adds_nothing() {
    let ground = ground!("exec-adds");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let words = "ls /proc/self/fd; grep -E 'Sig[PBIC]|Shd' /proc/self/status; env; ulimit -a";
    // as a shell has it, and as systemd has it for its services
    for before in ["", "trap '' PIPE; "] {
        let said = |command: &Command| {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("{before}exec \"$0\" \"$@\"")]).stdin(Stdio::null());
            shell.arg(command.get_program()).args(command.get_args());
            Said::from(shell.output().expect("start sh")).fine()
        };

        let without = said(Command::new("sh").args(["-c", words]));
        let with = said(&daemon.command(&["exec", "drop", "sh", "-c", words]));

        assert_eq!(with, without);
    }
}

/// With `-u`, CMD is that user with his groups and without any capability, who can do nothing to the
/// cgroups.
#[test]
fn exec_as_another_user() {
    let ground = ground!("exec-user");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let words =
        "id -u; id -g; id -G; grep -h ^CapEff /proc/self/status; grep -h ^0:: /proc/self/cgroup";
    for (args, id) in [
        (&["-u", "nobody", "drop"][..], 65534),
        (&["--user", "65534", "drop", "--"], 65534),
        (&["drop", "-u", "nobody", "--"], 65534),
        // a uid that no user has comes with the gid of that number and without the groups of root
        (&["-u", "1234567", "drop"], 1234567),
    ] {
        let out = daemon.ask(&[&["exec"], args, &["sh", "-c", words]].concat()).fine();
        let want = format!("{id}\n{id}\n{id}\nCapEff:\t0000000000000000\n");
        assert!(out.starts_with(&want), "{args:?}: {out}");
        assert!(out.contains("/cgtproxy/drop/"), "{out}");
    }
    let moves = "echo $$ > /sys/fs/cgroup/cgroup.procs";
    let said = daemon.ask(&["exec", "-u", "nobody", "drop", "sh", "-c", moves]);
    assert_ne!(said.code, Some(0));
    assert!(said.err.starts_with("sh: ") && said.err.contains("ermission denied"), "{}", said.err);
}

/// Who is no user is refused with a line, and not taken for root.
#[test]
fn exec_as_no_user() {
    let ground = ground!("exec-nobody");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    // -1 means "leave it" to setuid(2)
    for odd in ["4294967295", "4294967296", "-1", "+1", ""] {
        let said = daemon.ask(&["exec", "--user", odd, "drop", "id", "-u"]);
        assert_ne!(said.code, Some(0), "{odd:?}");
        assert_eq!((&*said.out, said.err.lines().count()), ("", 1), "{odd:?}");
    }
    let unknown = daemon.ask(&["exec", "-u", "no-such-user", "drop", "true"]);
    assert_eq!((unknown.code, &*unknown.err), (Some(2), "error: no such user: \"no-such-user\"\n"));
}

/// CMD alone enters the new cgroup, which stays while it lives and goes with the next exec.
#[test]
fn exec_moves_only_itself() {
    let ground = ground!("exec-moves");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let home = || fs::read_to_string("/proc/self/cgroup").expect("read");
    let before = home();

    let mut command = daemon.command(&["exec", "mihomo", "sleep", "100"]);
    let mut child = command.spawn().expect("start cgtproxy");

    let dir = ground.at(&format!("/cgtproxy/mihomo/{}", child.id()));
    let alone = format!("{}\n", child.id());
    let entered = || fs::read_to_string(dir.join("cgroup.procs")).is_ok_and(|t| t == alone);
    assert!(wait_until(SETTLE, entered), "not alone in {dir:?}");
    assert_eq!(home(), before);
    // another exec does not take it for a leftover
    daemon.ask(&["exec", "mihomo", "true"]).fine();
    assert!(dir.exists());
    // signals are CMD's own
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("kill");
    assert_eq!(child.wait().expect("wait").signal(), Some(15));
    daemon.ask(&["exec", "mihomo", "true"]).fine();
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
    let dir = ground.at("/cgtproxy/mihomo");
    // proc_pid_stat(5) of the job, whose name holds no blank
    let fields = || -> Vec<String> {
        let all = fs::read_dir(&dir).into_iter().flatten().flatten();
        let procs = all.filter_map(|e| fs::read_to_string(e.path().join("cgroup.procs")).ok());
        let pid = procs.flat_map(|t| t.lines().map(str::to_owned).collect::<Vec<_>>()).next();
        let stat = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/stat")).ok());
        stat.unwrap_or_default().split(' ').map(str::to_owned).collect()
    };
    let [program, config] = [binary(), daemon.config.clone()].map(|p| p.display().to_string());

    shell.say(&format!("{program} -c {config} exec mihomo sleep 1234\n"));
    let sleeps = || fields().get(1).is_some_and(|name| name == "(sleep)");
    assert!(wait_until(SETTLE, sleeps), "{}", shell.seen);
    shell.say("\x1a"); // Ctrl-Z
    shell.expect("Stopped");
    shell.say("jobs -l\n");
    shell.expect("sleep 1234");

    shell.say("fg\n");
    shell.expect("sleep 1234");
    assert!(wait_until(SETTLE, || fields().get(2).is_some_and(|state| state == "S")));
    // the terminal is the job's, not the shell's (pgrp, tpgid): Ctrl-C goes to it
    let in_front = || {
        let fields = fields();
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
    assert_eq!(cgroups_of(ground, "mihomo").len(), 0, "a refusal leaves no cgroup");
}

/// Without a table every target is refused but direct, where everything is direct for everybody.
#[test]
fn exec_refuses_where_there_is_no_table() {
    let ground = ground!("exec-none");
    let ask = |args: &[&str]| run_with(&ground, CONFIG, args);
    expect_refused(&ground, ask, "there is no table inet cgtproxy, and no cgtproxy is running");
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

    let rule = "rule add pref 100 iif lo fwmark 0x01000000/0xff000000 lookup 300";
    ip_batch(&["-4"], "rule del pref 100\n");
    expect_refused(&ground, ask, &format!("missing: ip {rule}"));
    ip_batch(&["-4"], &format!("{rule} protocol 99\n"));

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
    let headline = |want: &str| {
        let out = ask(&["status"]).out;
        let want = format!("table inet cgtproxy: {want}; no cgtproxy is running");
        assert_eq!(out.lines().next(), Some(&*want));
    };
    daemon.kill9();
    headline("in force, default direct");

    load("flush table inet cgtproxy\n");
    headline("without rules, not in force");
    assert!(ask(&["status", "--json"]).out.contains("\"in_force\":false"));

    // a table that persists cannot be made dormant, one of before Linux 6.9 can
    load("delete table inet cgtproxy\n");
    let table = "table inet cgtproxy {\n";
    load(&(ask(&["show"]).out).replace(table, &format!("{table}flags dormant\n")));
    expect_refused(&ground, ask, "table inet cgtproxy is dormant");
}

/// It waits for a daemon that is late.
#[test]
fn exec_waits_for_the_classification() {
    let ground = ground!("exec-waits");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    daemon.signal(Signal::SIGSTOP);
    let mut command = daemon.command(&["exec", "mihomo", "echo", "ran"]);
    let child = command.stdout(Stdio::piped()).spawn().expect("start cgtproxy");
    let made = || ground.at(&format!("/cgtproxy/mihomo/{}", child.id())).exists();
    assert!(wait_until(SETTLE, made));

    daemon.signal(Signal::SIGCONT);

    let out = child.wait_with_output().expect("wait");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "ran\n");
}

/// It gives up on a daemon that does not answer, after as long as is sensible.
#[test]
fn exec_waits_no_longer_than_is_sensible() {
    let ground = ground!("exec-gives-up");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    daemon.signal(Signal::SIGSTOP);

    let start = Instant::now();
    let said = daemon.ask(&["exec", "drop", "true"]);

    assert!(start.elapsed().as_secs() >= 4, "{:?}", start.elapsed());
    assert_eq!(said.code, Some(1));
    let why = "cgroup /cgtproxy/drop is not in set cg_drop after 5 s";
    assert!(said.err.contains(why), "{}", said.err);
    daemon.signal(Signal::SIGCONT);
    await_member(&ground.at("/cgtproxy/drop"), "drop");
}

/// Whatever rules cover `/cgtproxy`, TARGET is what was asked for.
#[test]
fn exec_comes_before_every_rule() {
    let (ground, mut world, _proxy) = scene!("exec-first", proxy);
    for config in [
        "[global]\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /.*\n",
        "[tproxy mihomo]\nport = 7893\n[rules]\ndrop = /cgtproxy.*\n",
    ] {
        let daemon = Daemon::start(&ground, config, &[]);
        for (target, who) in [("mihomo", PROXY), ("direct", "remote"), ("mihomo", PROXY)] {
            world.wire.packets();
            let said = daemon.ask(&["exec", target, "bash", "-c", ASK]);
            assert!(said.out.starts_with(who), "{target}: {}", said.all());
            let left = world.wire.to_remote();
            assert_eq!(left.is_empty(), target == "mihomo", "{left:?}");
        }
        daemon.stop();
        ["mihomo", "direct"].iter().for_each(|target| forget(&ground, target));
        fs::remove_dir(ground.at("/cgtproxy")).expect("remove");
    }
}
