//! Start, reload, stop and sudden death, and what is left in the kernel by then.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::client::{again, expect, under, Client, PATIENCE};
use crate::daemon::{binary, run, run_with, write_private, Daemon, UNOWNED};
use crate::ground::{
    addr, chmod, ip_batch, remove_tree, sh, sysctl, Ground, HOST4, REMOTE4, REMOTE6,
};
use crate::kernel::{
    await_member, ip_routes, ip_rules, load, nft, output, residue, set_ids, state, table,
    table_plain, Owner, SETTLE,
};
use crate::world::{Server, World, PROXY, STREAM_PORT};
use crate::{sized, wait_until};

/// Two targets, of which most cgroups of the churn are in one.
const CONFIG: &str = r"
[tproxy mihomo]
port = 7893
[rules]
mihomo = /churn/\d*5
drop   = /churn/.*
mihomo = /proxied
drop   = /drop
";

/// A fast, small generator; the seed is printed, so a failure can be repeated.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let now = SystemTime::UNIX_EPOCH.elapsed().expect("a clock after 1970");
        let seed = now.as_nanos() as u64 | 1;
        println!("seed {seed}");
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A duration below `max`.
    fn below(&mut self, max: Duration) -> Duration {
        Duration::from_micros(self.next() % max.as_micros() as u64)
    }
}

/// A thread that makes and removes cgroups below `/churn`, of which some 100 are there at any time
/// and stay when it stops.
struct Churn {
    running: Arc<AtomicBool>,
    /// How many have been made.
    made: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Churn {
    fn start(ground: &Ground) -> Churn {
        remove_tree(&ground.at("/churn"));
        let dir = ground.cgroup("/churn");
        let running = Arc::new(AtomicBool::new(true));
        let made = Arc::new(AtomicU32::new(0));
        let (on, count) = (running.clone(), made.clone());
        let thread = thread::spawn(move || {
            const LIVE: u32 = 100;
            for i in 0.. {
                if !on.load(Ordering::Relaxed) {
                    break;
                }
                let path = |i: u32| dir.join(i.to_string());
                let _ = fs::create_dir_all(path(i).join("a/b"));
                if let Some(old) = i.checked_sub(LIVE).map(path) {
                    for dir in [old.join("a/b"), old.join("a"), old] {
                        let _ = fs::remove_dir(dir);
                    }
                }
                count.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_micros(200));
            }
        });
        Churn { running, made, thread: Some(thread) }
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.running.store(false, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Over whatever a killed one has left, the next one holds what one on a clean kernel holds.
#[test]
fn killed_at_any_moment() {
    let ground = ground!("kill9");
    let mut random = Random::new();
    for round in 0..5 {
        let churn = Churn::start(&ground);
        for _ in 0..10 {
            // Some die while they start.
            let daemon = Daemon::spawn(&ground, CONFIG, &[], &[]);
            thread::sleep(random.below(Duration::from_millis(80)));
            daemon.kill9();
        }

        let daemon = Daemon::start(&ground, CONFIG, &[]);
        assert!(churn.made.load(Ordering::Relaxed) > 0);
        drop(churn);
        // A marker through the whole pipeline: what came before it has been handled.
        await_member(&ground.cgroup(&format!("/churn/x{round}")), "drop");
        let over_leftovers = state();
        assert!(!over_leftovers.1["cg_drop"].is_empty());
        daemon.stop_clean();
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        assert_eq!(over_leftovers, state(), "round {round}");
        daemon.kill9();
    }
}

/// Policies that share nothing but the cgroups.
const POLICIES: [&str; 3] = [
    CONFIG,
    "
[global]
fwmark-mask = 0x00f00000
rule-priority = 50
default = drop
[tproxy a]
port = 7001
[tproxy b]
port = 7002
[rules]
a = /churn/.*
b = /drop
direct = /proxied
",
    "[rules]\ndirect = /drop\n",
];

/// Whatever came before, by a dead instance or by a reload, the kernel holds what a clean start
/// with the same configuration gives.
#[test]
fn the_configuration_alone_decides_what_is_in_the_kernel() {
    let ground = ground!("decides");
    for path in ["/churn/5", "/churn/6/x", "/drop", "/proxied/x"] {
        ground.cgroup(path);
    }
    let clean = POLICIES.map(|policy| {
        let daemon = Daemon::start(&ground, policy, &[]);
        let state = state();
        daemon.stop_clean();
        state
    });
    assert_ne!(clean[0], clean[1]);
    for (from, old) in POLICIES.iter().enumerate() {
        for (to, new) in POLICIES.iter().enumerate() {
            Daemon::start(&ground, old, &[]).kill9();
            let daemon = Daemon::start(&ground, new, &[]);
            assert_eq!(state(), clean[to], "{from} was killed, {to} started");
            assert!(daemon.stop().success());

            let daemon = Daemon::start(&ground, old, &[]);
            daemon.reconfigure(new);
            assert_eq!(state(), clean[to], "reload from {from} to {to}");
            daemon.stop_clean();
        }
    }
}

/// A stop leaves nothing, however busy it was.
#[test]
fn stopped_at_any_moment() {
    let ground = ground!("sigterm");
    let mut random = Random::new();
    let churn = Churn::start(&ground);
    for i in 0..100 {
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        thread::sleep(random.below(Duration::from_millis(20)));
        let log = daemon.config.with_extension("log");
        let status = daemon.stop();
        let log = fs::read_to_string(log).expect("read the log");
        assert_eq!(status.code(), Some(0), "stop {i}: {log}");
        assert_eq!(residue(), "", "stop {i}: {log}");
    }
    println!("{} cgroups made meanwhile", churn.made.load(Ordering::Relaxed));
}

/// Events that come faster than they can be handled must put off neither readiness nor the end.
#[test]
fn starts_and_stops_in_endless_churn() {
    let ground = ground!("endless");
    let on = AtomicBool::new(true);
    let paths: Vec<_> = (0..3).map(|i| ground.cgroup(&format!("/churn/{i}"))).collect();
    thread::scope(|scope| {
        for path in &paths {
            scope.spawn(|| {
                while on.load(Ordering::Relaxed) {
                    let _ = fs::create_dir(path.join("x"));
                    let _ = fs::remove_dir(path.join("x"));
                }
            });
        }
        for _ in 0..3 {
            let mut daemon = Daemon::spawn(&ground, CONFIG, &[], &[]);
            let up = daemon.ready();
            thread::sleep(Duration::from_millis(200));
            daemon.signal(Signal::SIGTERM);
            let status = daemon.wait();
            let log = daemon.logs();
            if !up || status.code() != Some(0) {
                on.store(false, Ordering::Relaxed);
            }
            assert!(up, "not ready: {log}");
            assert_eq!(status.code(), Some(0), "{log}");
        }
        on.store(false, Ordering::Relaxed);
    });
    assert_eq!(residue(), "");
}

/// Nor does one that comes while it starts.
#[test]
fn stopped_while_it_starts() {
    let ground = ground!("early-term");
    for i in 0..300 {
        ground.cgroup(&format!("/churn/{i}"));
    }
    let mut random = Random::new();
    for _ in 0..sized(30, 300) {
        let mut daemon = Daemon::spawn(&ground, CONFIG, &[], &[]);
        thread::sleep(random.below(Duration::from_millis(20)));
        daemon.signal(Signal::SIGTERM);
        let status = daemon.wait();
        // Before it has handlers, the signal itself ends it; then there is nothing to remove yet.
        let by_itself = status.signal() == Some(Signal::SIGTERM as i32);
        assert!(status.code() == Some(0) || by_itself, "{status}: {}", daemon.logs());
        assert_eq!(residue(), "", "{status}");
    }
}

/// A cgroup root that is removed and made again, alone or with what it is in, is classified as
/// before; and meanwhile that is said.
#[test]
fn the_cgroup_root_comes_back() {
    let (ground, _world) = scene!("root-back");
    let (above, root) = (ground.at("/above"), ground.cgroup("/above/root"));
    let config = format!("[global]\ncgroup-root = {}\n[rules]\ndrop = /apps\n", root.display());
    let apps = ground.cgroup("/above/root/apps");
    let daemon = Daemon::start(&ground, &config, &[]);
    expect(&[(&apps, under("drop"))]);
    for (number, gone) in [&root, &above, &root, &root].into_iter().enumerate() {
        remove_tree(gone);
        // the last time, there is no time to see it
        if number < 3 {
            let told = || daemon.logs().matches("nothing is classified").count() > number;
            assert!(wait_until(SETTLE, told), "{}", daemon.logs());
            let said = daemon.ask(&["status"]).out;
            assert!(said.contains("nothing is classified"), "{said}");
            assert!(daemon.json("d['rootless']").starts_with("unable to"));
        }
        if number == 2 {
            daemon.reload();
        }
        let apps = ground.cgroup("/above/root/apps");
        await_member(&apps, "drop");
        await_member(&ground.cgroup("/above/root/apps2").join("../apps"), "drop");
        expect(&[(&apps, under("drop"))]);
        let back = || daemon.logs().matches("is there anew").count() > number;
        assert!(wait_until(SETTLE, back), "{}", daemon.logs());
        assert_eq!(daemon.json("d['rootless']"), "None");
    }
    daemon.stop_clean();
}

/// However many reloads are asked for, all else has its turn between them, and the end comes first.
#[test]
fn a_flood_of_reloads() {
    let ground = ground!("hup-flood");
    let rules: String = (0..800).map(|i| format!("drop = /x{i}/.*/y\\d*\n")).collect();
    let mut daemon = Daemon::start(&ground, &format!("{CONFIG}{rules}"), &[]);
    let pid = daemon.pid();
    let on = AtomicBool::new(true);
    thread::scope(|scope| {
        scope.spawn(|| {
            while on.load(Ordering::Relaxed) && kill(pid, Signal::SIGHUP).is_ok() {
                thread::sleep(Duration::from_micros(500));
            }
        });
        assert!(daemon.wait_log("reloaded", SETTLE));
        let mut took = Vec::new();
        for i in 0..10 {
            let start = Instant::now();
            await_member(&ground.cgroup(&format!("/churn/x{i}")), "drop");
            took.push(start.elapsed());
        }
        // both signals are there when it looks
        daemon.signal(Signal::SIGSTOP);
        let log = daemon.config.with_extension("log");
        let reloads = || fs::read_to_string(&log).map_or(0, |log| log.matches("reloaded").count());
        let (before, start) = (reloads(), Instant::now());
        daemon.signal(Signal::SIGTERM);
        daemon.signal(Signal::SIGCONT);
        let status = daemon.wait();
        println!("in force after {took:?}, stopped after {:?}", start.elapsed());
        on.store(false, Ordering::Relaxed);
        assert_eq!(status.code(), Some(0));
        // the one that was under way, if any
        assert!(reloads() <= before + 1, "{} reloads after SIGTERM", reloads() - before);
    });
    assert_eq!(residue(), "");
}

/// A start that cannot write its pidfile fails, and leaves nothing.
#[test]
fn a_pidfile_that_cannot_be_written() {
    let ground = ground!("nopid");
    ground.cgroup("/drop");
    let said = run_with(&ground, CONFIG, &["-p", "/nowhere/pid", "run"]);
    let why = "unable to write pidfile /nowhere/pid";
    assert!(said.code == Some(1) && said.err.contains(why), "{said:?}");
    assert_eq!(residue(), "");
}

/// A pidfile is written whole or the start fails, nothing waits for a reader, and one that stays is
/// told of.
#[test]
fn a_pidfile_that_is_no_file_or_does_not_fit() {
    let ground = ground!("oddpid");
    ground.cgroup("/drop");
    let dir = ground.dir.join("small");
    fs::create_dir(&dir).expect("mkdir");
    let there = |line: &str| sh(&format!("cd {} && {line}", dir.display()));
    there("mount -t tmpfs -o size=4k none .");
    let _unmount = Unmount(&dir);
    there("mkfifo fifo; mkdir dir; ln -s dir/x link");
    let refused = |name: &str, why: &str| {
        let file = dir.join(name);
        let start = Instant::now();
        let args = ["-p", file.to_str().expect("UTF-8"), "run"];
        let said = run_with(&ground, CONFIG, &args);
        assert!(start.elapsed() < PATIENCE, "{name}");
        let pidfile = format!("unable to write pidfile {}: {why}", file.display());
        assert!(said.code == Some(1) && said.err.contains(&pidfile), "{name}: {said:?}");
        assert_eq!(residue(), "", "{name}");
    };
    for name in ["fifo", "dir", "link"] {
        refused(name, "not a regular file");
    }
    there("cat /dev/zero > full 2>/dev/null || true");
    refused("pid", "no space left on device");
    assert!(!dir.join("pid").exists(), "a part of it stays");
    there("rm full");

    let file = dir.join("pid");
    let mut daemon = Daemon::start(&ground, CONFIG, &["-p", file.to_str().expect("UTF-8")]);
    there("mount -o remount,ro .");
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    let said = format!("unable to remove pidfile {}: read-only file system", file.display());
    assert!(daemon.logs().contains(&said), "{}", daemon.logs());
    assert_eq!(residue(), "");
}

/// Takes away what a test has mounted there.
pub struct Unmount<'a>(pub &'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// A start that fails leaves nothing, or what was in force before.
#[test]
fn a_start_that_fails() {
    let ground = ground!("badstart");
    ground.cgroup("/drop");
    let other = "[global]\nrule-priority = 90\n[tproxy new]\nport = 1\n[rules]\nnew = /drop\n";
    let fails = |config: &str, args: &[&str]| {
        let said = run_with(&ground, config, &[args, &["run"]].concat());
        assert_eq!(said.code, Some(1));
        said.err
    };
    fails(CONFIG, &["-p", "/nowhere/pid"]);
    assert_eq!(residue(), "");

    // after a daemon that has left its rules: there are rules, and `status` knows since when
    Daemon::start(&ground, CONFIG, &[]).leave();
    let before = state();
    fails(other, &["-p", "/etc"]);
    assert_eq!(state(), before);
    fails(CONFIG, &["-p", "/nowhere/pid"]);
    assert_eq!(state(), before, "taken over, and left again");
    let status = run_with(&ground, CONFIG, &["status"]).out;
    assert!(status.contains("nothing new is classified since the last one left"), "{status}");
    assert_eq!(run(&["flush"]).code, Some(0));
    assert_eq!(residue(), "");
}

/// Another program's table of our name, which it owns: a start fails and says why, `check` knows before.
#[test]
fn a_start_beside_a_table_that_another_owns() {
    let ground = ground!("ownedstart");
    let owner = Owner::take();
    let owned = "table inet cgtproxy is owned by another process";

    let run = run_with(&ground, CONFIG, &["run"]);
    let check = run_with(&ground, CONFIG, &["check"]);

    assert_eq!((run.code, check.code), (Some(1), Some(1)), "run fails");
    assert!(run.err.contains(owned), "{}", run.err);
    assert!(check.out.contains(&format!("error: {owned}")), "{}", check.out);
    assert_eq!(residue(), "table inet cgtproxy\n");
    drop(owner);
    assert_eq!(residue(), "");
}

/// An editor that writes in place makes the file empty first.
#[test]
fn a_file_that_is_being_written() {
    let ground = ground!("inplace");
    let dropped = ground.cgroup("/drop");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let before = state();
    for text in ["", "\n", "# what this file is about\n"] {
        write_private(&daemon.config, text);
        let log = daemon.refuse();
        assert!(log.contains("rename it into place"), "{text:?}: {log}");
        assert_eq!(state(), before, "{text:?}");
    }
    expect(&[(&dropped, under("drop"))]);

    // whoever means it says so
    daemon.reconfigure("[rules]\n");
    // and where nothing is to be lost, nothing is refused
    write_private(&daemon.config, "");
    let log = daemon.reload();
    assert!(!log.contains("rename"), "{log}");
    assert!(daemon.stop().success());
}

/// A file that was cut behind a header, or whose last rule is meant to go: either is taken, and told
/// with what is in force now. Once: what has nothing has nothing to lose.
#[test]
fn the_last_rule_goes() {
    let ground = ground!("lastrule");
    let gateway = "[gateway lan]\ninterface = br-lan\ntarget = drop\n";
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    for (before, after, default) in [
        (CONFIG, "[global]\n", "direct"),
        (CONFIG, "[tproxy mihomo]\nport = 7893\n[rules]\n", "direct"),
        (CONFIG, "[global]\ndefault = drop\n", "drop"),
        ("[rules]\ndrop = user:12345\n", "[rules]\n", "direct"),
        (gateway, "[global]\n", "direct"),
        ("[global]\ndefault = drop\n", "[global]\n", "direct"),
    ] {
        daemon.reconfigure(before);
        let text =
            format!("no rule and no gateway is left: everything goes by default = {default}");
        let log = daemon.reconfigure(after);
        let line = log.lines().find(|line| line.contains(&text));
        assert!(line.is_some_and(|line| line.starts_with("warning: ")), "{after:?}: {log}");
        assert!(!daemon.reload().contains("is left"), "{after:?}, once more");
    }
    for more in [gateway, "[rules]\ndrop = /drop\n"] {
        daemon.reconfigure(CONFIG);
        assert!(!daemon.reconfigure(more).contains("is left"), "{more}");
    }
    daemon.stop_clean();
}

/// The same of one that the file includes.
#[test]
fn an_included_file_that_is_being_written() {
    let (ground, _world, _proxy) = scene!("inplace-named", proxy);
    let [proxied, dropped] = ["/proxied", "/drop"].map(|path| ground.cgroup(path));
    let (rules, whole) =
        (ground.dir.join("rules.conf"), "[rules]\nmihomo = /proxied\ndrop = /drop\n");
    write_private(&rules, whole);
    let config = "[global]\ninclude = rules.conf\n[tproxy mihomo]\nport = 7893\n";
    let daemon = Daemon::start(&ground, config, &[]);
    let before = state();
    for text in ["", "# rules\n"] {
        write_private(&rules, text);
        let log = daemon.refuse();
        assert!(log.contains("rename it into place"), "{text:?}: {log}");
        assert_eq!(state(), before, "{text:?}");
    }
    write_private(&rules, whole);
    expect(&[(&proxied, under(PROXY)), (&dropped, under("drop"))]);
    write_private(&rules, "[rules]\n");
    daemon.reload();
    expect(&[(&proxied, under("direct")), (&dropped, under("direct"))]);
}

/// The daemon changes its working directory; what was named from the first one stays right.
#[test]
fn relative_paths() {
    let ground = ground!("relative");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let (config, dir) = (daemon.config.clone(), ground.dir.clone());
    daemon.stop();
    let name = config.file_name().expect("a file");
    let mut child = Command::new(binary())
        .current_dir(&dir)
        .args(["-p", "pid", "-c"])
        .arg(name)
        .stderr(fs::File::create(dir.join("said")).expect("make a file"))
        .spawn()
        .expect("start cgtproxy");
    let said = || fs::read_to_string(dir.join("said")).expect("read");
    let pid = Pid::from_raw(child.id() as i32);
    let tells = |word: &str| wait_until(PATIENCE, || said().contains(word));
    let up = tells("started") && dir.join("pid").exists();
    kill(pid, Signal::SIGHUP).expect("reload");
    let again = tells("reloaded");
    kill(pid, Signal::SIGTERM).expect("stop");
    let status = child.wait().expect("wait");

    assert!(up && again && status.success(), "{status} {}", said());
    assert!(!dir.join("pid").exists(), "the pidfile stays");
}

/// Ctrl-C ends it as SIGTERM does.
#[test]
fn sigint_cleans_up_too() {
    let ground = ground!("sigint");
    let mut daemon = Daemon::start(&ground, CONFIG, &[]);
    assert_ne!(residue(), "");
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.wait().code(), Some(0));
    assert_eq!(residue(), "");
}

/// However often the policy changes, flows whose target stays go on, and nothing of a dropped cgroup gets
/// out.
#[test]
fn reload_under_traffic() {
    // each wakes two processes 200 times a second: many more are a load of their own
    const FLOWS: usize = 12;
    let (ground, mut world) = scene!("hup");
    let proxy = Server::stream(PROXY, &[7893]);
    let remote = ground.outside(|| Server::stream("far", &[9001]));
    let cgroups = ["/direct", "/proxied"].map(|path| ground.cgroup(path));
    let dropped = ground.cgroup("/drop");
    // Two policies that differ in rules, order, sets and tproxies, but not for these cgroups.
    let other = "
[tproxy new]
port = 7999
ipv6 = no
[tproxy mihomo]
port = 7893
mark = 0x01000000
[rules]
new    = /elsewhere/.*
direct = /direct
drop   = /drop
mihomo = /proxied
";
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let floods = [Client::udp(&dropped, addr(REMOTE4, 7)), Client::udp(&dropped, addr(REMOTE6, 7))]
        .map(|client| client.flood().spawn());
    let flow = |i: usize| {
        let to = addr([REMOTE4, REMOTE6][i / 2 % 2], 9001);
        Client::tcp(&cgroups[i % 2], to).follow().spawn()
    };
    let flows: Vec<_> = (0..FLOWS).map(flow).collect();
    thread::sleep(Duration::from_millis(100));
    world.wire.packets();

    let start = Instant::now();
    let mut leaked = Vec::new();
    for i in 0..200 {
        let log = daemon.reconfigure(if i % 2 == 0 { other } else { CONFIG });
        assert!(!log.contains("error"), "{log}");
        // A set of the other policy only.
        assert_eq!(set_ids("cg_new").is_some(), i % 2 == 0, "reload {i}: {log}");
        leaked.extend(world.wire.to_remote().into_iter().filter(|p| p.dst.port() == 7));
    }
    println!("200 reloads in {:?}", start.elapsed());
    assert_eq!(leaked, [], "packets of a dropped cgroup");
    drop(floods);
    // Both streams end in good order now, if they have lived.
    drop((proxy, remote));
    for (i, flow) in flows.into_iter().enumerate() {
        let who = flow.wait().0.who();
        let name = ["far", PROXY][i % 2];
        assert_eq!(who, format!("{name} {}", addr([REMOTE4, REMOTE6][i / 2 % 2], 9001)));
    }
}

/// A configuration that must not be accepted: what to write, and what the log has to hold.
type Broken = (&'static str, fn(&Path), &'static [&'static str]);

fn text(path: &Path, text: &str) {
    write_private(path, text);
}

/// `:LINE:` stands for the message of that line.
const BROKEN: [Broken; 24] = [
    ("no section", |p| text(p, "port = 1\n"), &[":1:"]),
    ("unknown section", |p| text(p, "[globl]\n"), &[":1:", "did you mean", "global"]),
    ("unknown key", |p| text(p, "[global]\nbypas = private\n"), &[":2:", "did you mean", "bypass"]),
    ("duplicate key", |p| text(p, "[global]\ndefault = direct\ndefault = drop\n"), &[":3:"]),
    ("no equals sign", |p| text(p, "[global]\n\ndefault\n"), &[":3:"]),
    ("unclosed header", |p| text(p, "[global\n"), &[":1:"]),
    ("undefined target", |p| text(p, "[rules]\nnone = /x\n"), &[":2:", "none"]),
    ("undefined default", |p| text(p, "[global]\ndefault = none\n"), &[":2:", "none"]),
    ("no port", |p| text(p, "[tproxy a]\n"), &[":1:", "port"]),
    ("port of 0", |p| text(p, "[tproxy a]\nport = 0\n"), &[":2:"]),
    ("port too large", |p| text(p, "[tproxy a]\nport = 65536\n"), &[":2:", "65536"]),
    ("bad regex", |p| text(p, "[rules]\ndirect = /ok\ndrop = /a(b\n"), &[":3:"]),
    ("reserved name", |p| text(p, "[tproxy drop]\nport = 1\n"), &[":1:", "drop"]),
    ("bad name", |p| text(p, "[tproxy a/b]\nport = 1\n"), &[":1:"]),
    ("same name twice", |p| text(p, "[tproxy a]\nport=1\n[tproxy a]\nport=2\n"), &[":3:"]),
    ("mark outside the mask", |p| text(p, "[tproxy a]\nport = 1\nmark = 0x1\n"), &[":3:"]),
    ("bad address", |p| text(p, "[global]\nbypass = 10.0.0.0/33\n"), &[":2:", "10.0.0.0/33"]),
    ("bad boolean", |p| text(p, "[tproxy a]\nport = 1\ntcp = perhaps\n"), &[":3:", "perhaps"]),
    (
        "several at once",
        |p| text(p, "[global]\ndefalt = drop\n[tproxy a]\nport = x\n[rules]\nb = /\n"),
        &[":2:", ":4:", ":6:"],
    ),
    ("not UTF-8", |p| fs::write(p, b"[global]\n# \xff\n").expect("write"), &["UTF-8"]),
    ("too long", |p| text(p, &"# padding\n".repeat(110_000)), &["1 MiB"]),
    ("a directory", |p| fs::create_dir(p).expect("mkdir"), &["directory"]),
    (
        "a fifo",
        |p| {
            let name = CString::new(p.as_os_str().as_bytes()).expect("no NUL");
            // SAFETY: a NUL-terminated path.
            assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        },
        &["regular file"],
    ),
    ("absent", |_| (), &["o such file"]),
];

/// A configuration with a mistake, or one that root alone does not control, is told and not taken.
#[test]
fn a_broken_file_changes_nothing() {
    let (ground, _world, _proxy) = scene!("broken", proxy);
    let [proxied, dropped] = ["/proxied", "/drop"].map(|path| ground.cgroup(path));
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let before = state();
    let mut wrong = Vec::new();
    let remove = |path: &Path| {
        let _ = fs::remove_file(path);
        let _ = fs::remove_dir(path);
    };
    for (what, make, said) in BROKEN {
        remove(&daemon.config);
        make(&daemon.config);
        let log = daemon.refuse();
        if !said.iter().all(|text| log.contains(text)) {
            wrong.push(format!("{what}: {log}"));
        }
        assert_eq!(state(), before, "{what}: {log}");
    }
    remove(&daemon.config);
    daemon.configure(CONFIG);
    chmod(&daemon.config, 0o666);
    let log = daemon.refuse();
    if !log.contains("writable") {
        wrong.push(format!("writable by others: {log}"));
    }
    assert_eq!(state(), before);
    expect(&[(&proxied, under(PROXY)), (&dropped, under("drop"))]);

    // A good one is taken as ever.
    chmod(&daemon.config, 0o600);
    daemon.reconfigure("[rules]\ndrop = /proxied\n");
    expect(&[(&proxied, under("drop")), (&dropped, under("direct"))]);
    assert!(wrong.is_empty(), "not said, of what is wrong with\n{}", wrong.join("\n"));
}

/// At a start it is told as well, and nothing is done.
#[test]
fn a_broken_file_at_start() {
    let ground = ground!("nostart");
    let mut daemon = Daemon::spawn(&ground, "[global]\ndefalt = drop\n", &[], &[]);
    assert!(!daemon.ready());
    assert_eq!(daemon.wait().code(), Some(2));
    assert!(daemon.logs().contains("did you mean"), "{}", daemon.logs());
    assert_eq!(residue(), "");
}

/// A second one is refused by the pid of the first, which is not disturbed.
#[test]
fn a_second_instance_is_refused() {
    let ground = ground!("second");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let before = state();
    let mut second = Daemon::spawn(&ground, "[rules]\ndrop = /.*\n", &[], &[]);
    assert!(!second.ready());
    assert_eq!(second.wait().code(), Some(1), "{}", second.logs());
    let log = second.logs();
    assert!(log.contains(&daemon.pid().to_string()), "names pid {}: {log}", daemon.pid());
    assert_eq!(state(), before);
    // The first is not disturbed, and its place is free once it is gone.
    await_member(&ground.cgroup("/drop"), "drop");
    assert!(daemon.stop().success());
    Daemon::start(&ground, CONFIG, &[]).kill9();
    assert!(Daemon::start(&ground, CONFIG, &[]).stop().success());
}

/// With on-exit = keep all stays in force, and the next one takes it over.
#[test]
fn kept_on_exit() {
    let (ground, _world, _proxy) = scene!("keep", proxy);
    let [proxied, dropped] = ["/proxied", "/drop"].map(|path| ground.cgroup(path));
    let daemon = Daemon::start(&ground, &format!("[global]\non-exit = keep\n{CONFIG}"), &[]);
    let before = state();
    assert_eq!(daemon.stop().code(), Some(0));
    assert_eq!(state(), before);
    expect(&[(&proxied, under(PROXY)), (&dropped, under("drop"))]);
    // The next instance takes over, and leaves nothing.
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    assert_eq!(state(), before);
    daemon.stop_clean();
}

/// `flush` is refused while one runs, be it one that could put its table back.
#[test]
fn flush_waits_for_the_end() {
    let ground = ground!("flushlive");
    for env in [&[][..], &[UNOWNED]] {
        let daemon = Daemon::start_in(&ground, CONFIG, &[], env);
        let before = state();

        let said = run(&["flush"]);

        assert_eq!(said.code, Some(1), "{said:?}");
        let why = format!("running with pid {}: stop it first", daemon.pid());
        assert!(said.all().contains(&why), "{said:?}");
        assert_eq!(state().1, before.1);
        daemon.stop_clean();
    }
}

/// `flush` removes all that one who was killed has left, says so, and touches nothing of others.
#[test]
fn flush_removes_everything() {
    let ground = ground!("flush");
    assert_eq!(run(&["flush"]).code, Some(0), "with nothing to remove");
    ip_batch(
        &[],
        "rule add fwmark 0x1 lookup 300 pref 99\nroute add 198.51.100.0/24 dev in0 table 300\n",
    );
    load("table inet other {}\n");
    Daemon::start_in(&ground, CONFIG, &[], &[UNOWNED]).kill9();
    assert!(!table().is_empty(), "it has died without a chance to clean up");

    let said = run(&["flush"]);

    assert_eq!(said.code, Some(0), "{said:?}");
    for what in ["table", "rule", "route"] {
        assert!(said.all().contains(what), "{what} is not among what was removed: {said:?}");
    }
    let left = residue();
    assert!(!left.contains("cgtproxy") && !left.contains("proto 99"), "{left}");
    let rules = ip_rules("-4");
    assert!(rules.contains("99:\tfrom all fwmark 0x1 lookup 300"), "{rules}");
    assert!(output("nft", &["list", "tables"]).contains("inet other"));
    let routes = ip_routes("-4", "300");
    assert!(routes.contains("198.51.100.0/24") && !routes.contains("local"), "{routes}");
}

/// A descriptor that takes nothing is told of and keeps nobody waiting: a pipe that is full, one that
/// nobody reads, and one to read from.
#[test]
fn a_ready_descriptor_that_takes_nothing() {
    let ground = ground!("ready-fd");
    let fifo = ground.dir.join("fifo");
    let path = fifo.to_str().expect("UTF-8");
    sh(&format!("mkfifo {path}"));
    let mut options = File::options();
    let options = options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let mut full = options.open(&fifo).expect("open the pipe");
    while full.write(b"xxxxxxxx").is_ok() {}
    while full.write(b"x").is_ok() {}
    for (redirected, why) in [
        (format!("3> {path}"), "try again"),
        (format!("3< {path}"), "try again"),
        ("3< /dev/null".into(), "bad file number"),
        ("3> /dev/full".into(), "no space left on device"),
    ] {
        let script = format!("exec \"$0\" \"$@\" {redirected}");
        let daemon = Daemon::spawn_by(&ground, CONFIG, &["sh", "-c", &script], &[], &[]);

        assert!(daemon.wait_log("started: ", PATIENCE), "{redirected}: {}", daemon.logs());
        let want = format!("warning: unable to write to --ready-fd: {why}\n");
        assert!(daemon.logs().contains(&want), "{redirected}: {}", daemon.logs());
        daemon.stop_clean();
    }
}

/// The next message that arrives at a NOTIFY_SOCKET.
fn notified(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 512];
    let n = again(|| socket.recv(&mut buffer)).expect("a notification");
    String::from_utf8_lossy(&buffer[..n]).into_owned()
}

/// READY=1 means that all is in force; a reload and the end are told as well.
#[test]
fn supervisors_are_told() {
    let ground = ground!("notify");
    let path = ground.dir.join("notify");
    let socket = UnixDatagram::bind(&path).expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    let pidfile = ground.dir.join("pid");
    let pidfile_text = pidfile.to_str().expect("UTF-8");
    let cgroup = ground.cgroup("/drop");
    let env = [("NOTIFY_SOCKET", path.to_str().expect("UTF-8"))];

    let mut daemon = Daemon::spawn(&ground, CONFIG, &["-p", pidfile_text], &env);
    assert!(notified(&socket).contains("READY=1"));
    // Ready means: all in force, the pidfile included.
    assert!(set_ids("cg_drop").is_some_and(|ids| ids.len() == 1), "{}", table());
    assert!(ip_rules("-6").contains("proto 99"), "{}", ip_rules("-6"));
    expect(&[(&cgroup, under("drop"))]);
    assert!(daemon.ready());
    let pid = fs::read_to_string(&pidfile).expect("read the pidfile");
    assert_eq!(pid.trim(), daemon.pid().to_string());

    daemon.configure("[rules]\ndirect = /none\n");
    daemon.signal(Signal::SIGHUP);
    let reloading = notified(&socket);
    assert!(reloading.contains("RELOADING=1"), "{reloading}");
    assert!(reloading.contains("MONOTONIC_USEC="), "what Type=notify-reload asks for: {reloading}");
    assert!(notified(&socket).contains("READY=1"));
    assert!(set_ids("cg_drop").is_none_or(|ids| ids.is_empty()), "{}", table());

    // a reload that fails ends as well
    daemon.configure("[global]\nnonsense\n");
    daemon.signal(Signal::SIGHUP);
    assert!(notified(&socket).contains("RELOADING=1"));
    assert!(notified(&socket).contains("READY=1"));

    daemon.signal(Signal::SIGTERM);
    assert!(notified(&socket).contains("STOPPING=1"));
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!pidfile.exists());
}

/// One that leads nowhere is told of, once, and keeps nothing from its work.
#[test]
fn a_notify_socket_that_is_not_there() {
    let ground = ground!("no-notify");
    for name in ["/nowhere/notify", "@cgtproxy-nobody", "nonsense"] {
        let mut daemon = Daemon::start_in(&ground, CONFIG, &[], &[("NOTIFY_SOCKET", name)]);
        daemon.reload();
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait().code(), Some(0));
        let told = format!("warning: unable to tell NOTIFY_SOCKET {name} of anything: ");
        assert_eq!(daemon.logs().matches(&told).count(), 1, "{}", daemon.logs());
    }
}

/// Too few files may be open: that is what is said, whatever it was that could not be opened.
#[test]
fn a_limit_of_open_files() {
    let ground = ground!("nofile");
    let file = ground.dir.join("nofile.conf");
    write_private(&file, &format!("[global]\ncgroup-root = {}\n", ground.root.display()));
    for limit in 7..=10 {
        let program = crate::daemon::binary();
        let (program, file) = (program.display(), file.display());
        let script = format!("ulimit -n {limit}; exec timeout 30 {program} -c {file} run");
        let out = Command::new("sh").args(["-c", &script]).output();
        let out = out.expect("start a shell");
        let said = String::from_utf8_lossy(&out.stderr);
        let last = said.lines().last().unwrap_or_default();
        println!("{limit}: {last}");
        // of the configuration, by its name
        let of_file = last.ends_with(": too many open files");
        let code = out.status.code();
        assert!(code == Some(1) && (of_file || last.contains("ulimit -n")), "{code:?} {said}");
        assert!(!said.contains("on cgroup2?"), "{said}");
    }
    assert_eq!(residue(), "");
}

/// A table that has our name and nothing else of ours is told of before it is replaced.
#[test]
fn a_table_of_our_name() {
    let ground = ground!("our-name");
    let cgroup = ground.cgroup("/drop");
    const TOLD: &str = "warning: table inet cgtproxy is there, and not of cgtproxy's making";
    let ask = |command| run_with(&ground, CONFIG, &[command]).out;
    crate::kernel::load(
        "table inet cgtproxy {
           chain output { type filter hook output priority 0; tcp dport 9 drop; }
         }\n",
    );
    let check = ask("check");
    assert!(check.contains(TOLD) && check.contains("run replaces it"), "{check}");
    let status = ask("status");
    assert!(status.contains("not of cgtproxy's making, not in force"), "{status}");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    assert_eq!(daemon.logs().matches(TOLD).count(), 1, "{}", daemon.logs());
    expect(&[(&cgroup, under("drop"))]);
    assert!(!ask("check").contains(TOLD) && ask("status").contains("in force, default"));

    // what another of ours has left is ours
    daemon.leave();
    assert!(!ask("check").contains(TOLD));
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    assert!(!daemon.logs().contains(TOLD), "{}", daemon.logs());
    assert!(daemon.stop().success());
    assert_eq!(residue(), "");
}

/// A supervisor may name a socket that is no file.
#[test]
fn an_abstract_notify_socket() {
    use std::os::linux::net::SocketAddrExt;
    let ground = ground!("abstract");
    let name = "cgtproxy-test";
    let at = std::os::unix::net::SocketAddr::from_abstract_name(name).expect("an address");
    let socket = UnixDatagram::bind_addr(&at).expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    let env = [("NOTIFY_SOCKET", format!("@{name}"))].map(|(k, v)| (k, v.leak() as &str));
    let mut daemon = Daemon::spawn(&ground, CONFIG, &[], &env);
    assert!(notified(&socket).contains("READY=1"));
    assert!(daemon.ready());
}

/// SIGUSR1 tells how things are, whatever the log level.
#[test]
fn sigusr1_tells_the_status() {
    let ground = ground!("sigusr1");
    for config in [CONFIG, &format!("[global]\nlog-level = error\n{CONFIG}")] {
        let daemon = Daemon::start(&ground, config, &[]);
        assert!(!daemon.logs().contains("status: "), "{}", daemon.logs());
        daemon.signal(Signal::SIGUSR1);
        assert!(daemon.wait_log("status: ", PATIENCE), "{}", daemon.logs());
        assert!(daemon.stop().success());
    }
}

/// What is asked for is on standard output with status 0, what is wrong with 2.
#[test]
fn command_line() {
    let ground = ground!("cli");
    for (args, want, said) in [
        (&["--help"][..], 0, "flush"),
        (&["-V"], 0, "cgtproxy"),
        (&["--verison"], 2, "verison"),
        (&["shwo"], 2, "shwo"),
        (&["-c", "/nowhere", "check"], 2, "/nowhere"),
        (&["-c", "/nowhere", "show"], 2, "/nowhere"),
    ] {
        let found = run(args);
        assert!(found.code == Some(want) && found.all().contains(said), "{args:?}: {found:?}");
    }
    let good = run_with(&ground, CONFIG, &["check"]);
    assert_eq!(good.code, Some(0), "{good:?}");
    let bad = run_with(&ground, "[global]\nbypas = private\nport = 1\n", &["check"]);
    let all = bad.all();
    assert_eq!(bad.code, Some(2), "{all}");
    assert!(all.contains(":3:") && all.contains(":4:") && all.contains("bypass"), "{all}");
    assert_eq!(residue(), "");
}

/// The system calls of the daemon while something is done, which is told what there is of them.
fn traced(ground: &Ground, daemon: &Daemon, act: impl FnOnce(&dyn Fn() -> String)) -> String {
    let file = ground.dir.join("strace");
    let _ = fs::remove_file(&file);
    let mut command = Command::new("strace");
    command.args(["-f", "-p", &daemon.pid().to_string(), "-o"]).arg(&file).stderr(Stdio::null());
    let mut strace = command.spawn().expect("start strace");
    let read = || fs::read_to_string(&file).unwrap_or_default();
    // attached once it has written what the program is waiting in
    assert!(wait_until(PATIENCE, || !read().is_empty()), "strace does not attach");
    act(&read);
    kill(Pid::from_raw(strace.id() as i32), Signal::SIGINT).expect("stop strace");
    strace.wait().expect("wait for strace");
    read()
}

/// Nothing wakes it that is not its own: no time that passes, no routes and interfaces of others.
#[test]
fn idle_without_a_system_call() {
    let ground = ground!("idle");
    for i in 0..100 {
        ground.cgroup(&format!("/own/churn/{i}"));
    }
    // what the other tests do beside the cgroup root is told as well, and whose interfaces go is looked
    // at where there may be containers
    let root = ground.at("/own");
    let root = format!("[global]\ncontainers = no\ncgroup-root = {}\n", root.display());
    let daemon = Daemon::start(&ground, &(root + CONFIG), &[]);
    await_member(&ground.cgroup("/own/drop"), "drop");
    daemon.await_rest(Duration::from_secs(1));
    let routes = |table: &str| {
        for (family, net) in [("-4", "198.51.100.0/24"), ("-6", "2001:db8:9::/64")] {
            let lines =
                format!("route add {net} dev in0 table {table}\nroute del {net} table {table}\n");
            ip_batch(&[family], &lines);
        }
    };

    let idle = traced(&ground, &daemon, |_| thread::sleep(Duration::from_secs(6)));
    let beside = traced(&ground, &daemon, |_| {
        ["main", "1", "255", "301", "4294967294"].iter().for_each(|table| routes(table));
        let veth = "link add veth0 type veth peer name veth1\nlink set veth0 up\nlink del veth0\n";
        ip_batch(&[], veth);
        thread::sleep(Duration::from_millis(500));
    });

    for calls in [idle, beside] {
        // the wait that strace interrupts and resumes
        assert!(calls.lines().count() == 1 && calls.contains("detached"), "{calls}");
    }
    // were there something to see, it would be seen
    let seen = |act: &dyn Fn(), what: &str| {
        let all = traced(&ground, &daemon, |read| {
            act();
            wait_until(PATIENCE, || read().contains(what));
        });
        assert!(all.contains(what), "{all}");
    };
    seen(&|| routes("300"), "RTM_NEWROUTE");
    seen(&|| drop(ground.cgroup("/own/churn/new")), "inotify_add_watch");
}

/// A configuration with all that shapes the table.
const RICH: &str = "
[global]
default = mihomo
bypass = private
bypass = 203.0.113.0/25
bypass = 2001:db8:77::/48
bypass-mark = 0xff
bypass-mark = 0x100/0x300
bypass-user = 4711
[tproxy mihomo]
port = 7893
dns-hijack = 127.0.0.1:1053
dns-hijack = [::1]:1053
dns-hijack-tcp = yes
[tproxy mark]
port = 7894
udp = no
ipv6 = drop
[tproxy socket]
port = 7895
address = 127.0.0.1
dns-hijack = 203.0.113.53
[rules]
drop = /a/b
direct = /a/.*/c
mark = /a
socket = /b
";

/// The same with routed traffic, and with DNS of this host.
fn router() -> String {
    let local =
        RICH.replace("dns-hijack-tcp = yes", "dns-hijack-tcp = yes\ndns-hijack-local = yes");
    format!(
        "{local}
[gateway lan]
interface = br-lan
interface = wg0
source = 198.51.100.0/24
source = 198.51.100.128/25
source = 2001:db8:3::/64
source-mac = 02:00:00:00:00:02
source-mac = 02:00:00:00:00:01
target = mihomo
[gateway socket]
interface = br-*
source-mac = 02:00:00:00:00:03
target = socket
[gateway drop]
interface = guest
source = 2001:db8:4::/64
target = drop
[gateway direct]
interface = br-*
target = direct
"
    )
}

/// Every kind of table.
fn configs() -> [String; 6] {
    let drops = "[global]\ndefault = drop\n";
    [
        CONFIG.into(),
        RICH.into(),
        router(),
        drops.into(),
        // lines for owners in front of, between and behind those for cgroups
        "[tproxy a]\nport = 1\n[rules]\ndrop = /a/b\ndirect = user:1000-1999,7\na = group:5\n\
         a = /a\ndirect = /b\ndrop = user:0-4294967294\ndirect = /a/x\ndrop = group:3-4\n"
            .into(),
        format!("{drops}[gateway a]\ninterface = eth1\ntarget = drop\n"),
    ]
}

/// What nft lists of our table loads again elsewhere, and is the same there.
#[test]
fn the_table_loads_again() {
    let ground = ground!("again");
    for path in ["/a/b/c", "/a/x/c", "/a/y", "/b/c"] {
        ground.cgroup(path);
    }
    for config in &configs() {
        let daemon = Daemon::start(&ground, config, &[]);
        let (list, plain) = (table(), table_plain(&[]));
        assert!(plain.lines().count() > 20, "{plain}");
        // The outside is a fresh network namespace.
        ground.outside(|| {
            load(&list);
            // A table that nft owns has gone with it; without the flag it is there.
            let again = list.lines().filter(|line| !line.contains("flags owner"));
            let again: String = again.map(|line| format!("{line}\n")).collect();
            load(&again);
            assert_eq!(table_plain(&[]), plain);
            load("delete table inet cgtproxy\n");
        });
        drop(daemon);
    }
}

/// Of each key of a target some value or none, in many combinations.
#[test]
fn the_table_of_any_target_loads_again() {
    const SWITCH: &[&str] = &["yes", "no", "drop", "reject"];
    const PORTS: &[&str] = &["53", "80 443", "1-52"];
    const RANGES: &[&str] = &["private", "203.0.113.0/24", "2001:db8::/32"];
    const KEYS: [(&str, &[&str]); 13] = [
        ("tcp", SWITCH),
        ("udp", SWITCH),
        ("ipv4", SWITCH),
        ("ipv6", SWITCH),
        ("quic", SWITCH),
        ("tcp-ports", PORTS),
        ("udp-ports", PORTS),
        ("bypass", RANGES),
        ("only", RANGES),
        ("dns-hijack", &["127.0.0.1", "10.8.0.1:1053"]),
        ("dns-hijack", &["[::1]:1053", "2001:db8::5"]),
        ("dns-hijack-tcp", &["yes"]),
        ("dns-hijack-local", &["yes"]),
    ];
    let ground = ground!("anytarget");
    let mut random = Random(11);
    for _ in 0..60 {
        let mut lines = String::new();
        for (key, values) in KEYS {
            let wanted = !key.starts_with("dns-hijack-") || lines.contains("dns-hijack = ");
            if let (true, Some(value)) =
                (wanted, values.get(random.next() as usize % (2 * values.len())))
            {
                lines += &format!("{key} = {value}\n");
            }
        }
        let config = format!(
            "[tproxy a]\nport = 1\n{lines}[route b]\ninterface = wg0\n{lines}\
             [gateway c]\ninterface = eth1\ntarget = a\n\
             [gateway d]\ninterface = eth2\ntarget = b\n[rules]\na = user:7\nb = /b\n"
        );
        let shown = run_with(&ground, &config, &["show"]);
        assert_eq!(shown.code, Some(0), "{config}{}", shown.err);
        let script = shown.out;
        ground.outside(|| {
            let loaded = nft(&["-f", "-"], &script);
            assert!(loaded.status.success(), "{config}{}", String::from_utf8_lossy(&loaded.stderr));
            let again = format!("delete table inet cgtproxy\n{}", table());
            let loaded = nft(&["-f", "-"], &again);
            assert!(loaded.status.success(), "{config}{}", String::from_utf8_lossy(&loaded.stderr));
        });
    }
}

/// `show` prints what nft takes, over a table that is there as well, and what `run` then has.
#[test]
fn show_prints_what_run_loads() {
    let ground = ground!("show");
    for path in ["/a/b/c", "/a/x/c", "/a/y", "/b/c"] {
        ground.cgroup(path);
    }
    for config in &configs() {
        assert_eq!(residue(), "");
        let script = run_with(&ground, config, &["show"]).fine();
        assert_eq!(residue(), "", "show changes nothing");
        let checked = nft(&["-c", "-f", "-"], &script);
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        if config.contains("tproxy") {
            assert!(
                script.contains("# ip rule add") || script.contains("# ip -4 rule add"),
                "{script}"
            );
        }
        // Twice: it replaces a table that is there.
        let shown = ground.outside(|| {
            for _ in 0..2 {
                load(&script);
            }
            let shown = table_plain(&[]);
            load("delete table inet cgtproxy\n");
            shown
        });
        let daemon = Daemon::start(&ground, config, &[]);
        assert_eq!(shown, table_plain(&[]));
        assert!(daemon.stop().success());
    }
}

/// Without IPv6 the other family works, and that is said once.
#[test]
fn a_host_without_ipv6() {
    let (ground, _world) = scene!("noipv6");
    let _proxy = Server::at(PROXY, &[addr(HOST4, 7893)]);
    for interface in ["all", "default", "lo"] {
        sysctl(&format!("net/ipv6/conf/{interface}/disable_ipv6"), "1");
    }
    let config = CONFIG.replace("port = 7893", "port = 7893\naddress = 192.0.2.1");
    let [proxied, dropped] = ["/proxied", "/drop"].map(|path| ground.cgroup(path));
    let daemon = Daemon::start(&ground, &config, &[]);
    let to = addr(REMOTE4, 80);
    assert_eq!(Client::tcp(&proxied, to).run().who(), format!("{PROXY} {to}"));
    assert_eq!(Client::udp(&proxied, to).run().who(), format!("{PROXY} {to}"));
    assert_eq!(Client::udp(&dropped, to).run().who(), "nobody");
    daemon.reload();
    let log = daemon.logs();
    assert_eq!(log.matches("IPv6").count(), 1, "said once: {log}");
    daemon.stop_clean();
}

/// A flow through the proxy goes on whoever kills the daemon, and however often.
#[test]
fn a_proxied_flow_outlives_the_daemon() {
    let (ground, mut world) = scene!("restart");
    let proxy = Server::stream(PROXY, &[7893]);
    let cgroup = ground.cgroup("/proxied");
    let mut daemon = Daemon::start(&ground, CONFIG, &[]);
    let to = addr(REMOTE4, STREAM_PORT);
    let flow = Client::tcp(&cgroup, to).follow().spawn();
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(20));
        daemon.kill9();
        thread::sleep(Duration::from_millis(20));
        daemon = Daemon::start(&ground, CONFIG, &[]);
    }
    assert_eq!(world.wire.to_remote(), [], "leaked over a restart");
    drop(proxy);
    assert_eq!(flow.wait().0.who(), format!("{PROXY} {to}"));
}
