//! Restarts as service scripts and upgrades do them: the next daemon takes over what the last one
//! has left, and there is no moment without rules.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{Client, Running, PATIENCE};
use crate::daemon::{run_at, Daemon, POLICY, UNOWNED};
use crate::ground::{addr, Ground, REMOTE4, REMOTE6};
use crate::kernel::{await_member, ip_rules, residue, state};
use crate::world::{Server, World};
use crate::{sized, wait_until};

/// Floods out of a dropped and a proxied cgroup: TCP and UDP, both families.
fn floods(ground: &Ground) -> Vec<Running> {
    let cgroups = ["/drop", "/proxied"].map(|path| ground.cgroup(path));
    let kinds = cgroups.iter().flat_map(|cgroup| {
        let to = |ip| [Client::udp(cgroup, addr(ip, 7)), Client::tcp(cgroup, addr(ip, 7))];
        [REMOTE4, REMOTE6].into_iter().flat_map(to)
    });
    kinds.map(|client| client.flood().spawn()).collect()
}

/// The floods do reach the wire where nothing holds them back.
fn floods_are_seen(ground: &Ground, world: &mut World) {
    let direct = ground.cgroup("/direct");
    for client in [Client::udp(&direct, addr(REMOTE4, 7)), Client::tcp(&direct, addr(REMOTE6, 7))] {
        let _flood = client.flood().spawn();
        assert!(wait_until(PATIENCE, || !world.wire.to_remote().is_empty()));
    }
}

/// What is done to ip rules and routes, as `ip monitor` tells it.
struct Monitor {
    child: Child,
    file: PathBuf,
}

impl Monitor {
    fn start(ground: &Ground) -> Monitor {
        let file = ground.dir.join("monitor");
        let out = File::create(&file).expect("make a file");
        let mut ip = Command::new("ip");
        ip.args(["-N", "monitor", "rule", "route"]).stdin(Stdio::null()).stdout(out);
        let monitor = Monitor { child: ip.spawn().expect("start ip"), file };
        // listening once it tells of a rule that comes and goes
        let told = wait_until(PATIENCE, || {
            for verb in ["add", "del"] {
                let rule = ["rule", verb, "pref", "7", "fwmark", "0x7", "lookup", "7"];
                assert!(Command::new("ip").args(rule).status().expect("start ip").success());
            }
            monitor.lines().iter().any(|line| line.contains("Deleted"))
        });
        assert!(told, "ip monitor tells nothing");
        monitor
    }

    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.file).expect("read what ip monitor says");
        text.lines().map(str::to_owned).collect()
    }

    fn deleted(&self) -> Vec<String> {
        let mut lines = self.lines();
        lines.retain(|line| line.contains("Deleted") && !line.contains("fwmark 0x7 "));
        lines
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// SIGUSR2, SIGTERM with on-exit = keep and SIGKILL by turns, each followed by a start.
fn hand_overs(ground: &Ground, env: &[(&str, &str)]) {
    let mut world = World::new(ground);
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let start = |config: &str| Daemon::start_in(ground, config, &[], env);
    let keep = format!("[global]\non-exit = keep\n{POLICY}");
    let mut daemon = start(POLICY);
    let floods = floods(ground);
    await_member(&ground.at("/proxied"), "mihomo");
    let before = state();
    let monitor = Monitor::start(ground);
    world.wire.packets();
    let times = sized(21, 210);
    let mut leaked = Vec::new();
    for i in 0..times {
        let end = i % 3;
        match end {
            0 => daemon.leave(),
            1 => assert_eq!(daemon.stop().code(), Some(0)),
            _ => daemon.kill9(),
        }
        leaked.extend(world.wire.to_remote());
        assert_eq!(state(), before, "restart {i}: between the two");
        daemon = start(if end == 0 { &keep } else { POLICY });
        leaked.extend(world.wire.to_remote());
        assert_eq!(state(), before, "restart {i}");
    }
    println!("{} packets of {} floods leaked in {times} restarts", leaked.len(), floods.len());
    assert_eq!(leaked, []);
    assert_eq!(monitor.deleted(), [""; 0], "rules and routes are taken over as they are");
    drop(floods);
    floods_are_seen(ground, &mut world);
    // a stop with another configuration removes all
    daemon.reconfigure(POLICY);
    daemon.stop_clean();
}

/// However one ends and the next one begins, nothing leaks, and nothing is taken away in between.
#[test]
fn a_restart_leaves_no_moment_without_rules() {
    hand_overs(&ground!("restart"), &[]);
}

/// The same on kernels before 6.9.
#[test]
fn nor_where_the_table_cannot_be_owned() {
    hand_overs(&ground!("restart-old"), &[UNOWNED]);
}

/// The next one may start while the last one still runs: it waits for its end.
#[test]
fn the_next_one_waits_for_the_last() {
    let (ground, mut world, _proxy) = scene!("overlap", proxy);
    let mut daemon = Daemon::start(&ground, POLICY, &[]);
    let floods = floods(&ground);
    await_member(&ground.cgroup("/drop"), "drop");
    await_member(&ground.cgroup("/proxied"), "mihomo");
    let before = state();
    world.wire.packets();
    for i in 0..sized(20, 200) {
        let mut next = Daemon::spawn(&ground, POLICY, &[], &[]);
        // before, while and after the next one looks
        std::thread::sleep(Duration::from_millis(i as u64 % 20));
        daemon.leave();
        assert!(next.ready(), "{i}: {}", next.logs());
        assert_eq!(state(), before, "{i}");
        daemon = next;
    }
    assert_eq!(world.wire.to_remote(), []);
    drop(floods);

    // not for ever
    let start = Instant::now();
    let mut second = Daemon::spawn(&ground, POLICY, &[], &[]);
    assert_eq!(second.wait().code(), Some(1));
    assert!(second.logs().contains("already running"), "{}", second.logs());
    println!("refused after {:?}", start.elapsed());
    assert_eq!(state(), before);
    daemon.stop_clean();
}

/// Who waits for the lock, or to try again, ends at once when told to.
#[test]
fn a_waiting_start_ends_at_once() {
    let ground = ground!("impatient");
    let daemon = Daemon::start(&ground, POLICY, &[]);
    let before = state();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR2] {
        let mut second = Daemon::spawn(&ground, POLICY, &[], &[]);
        assert!(wait_until(PATIENCE, || second.blocks(signal)), "{}", second.logs());
        second.signal(signal);
        let status = second.wait();
        assert_eq!(status.code(), Some(0), "{signal}: {}", second.logs());
        assert!(second.logs().contains("stopped while it started"), "{}", second.logs());
        assert_eq!(state(), before, "{signal}");
    }
    daemon.stop_clean();
}

/// Until the next one starts, `status` says that nothing keeps the table in step, since when if the
/// last one had a chance to note it, and how many cgroups have come.
#[test]
fn status_without_a_daemon() {
    let ground = ground!("alone");
    let daemon = Daemon::start(&ground, POLICY, &[]);
    let config = daemon.config.clone();
    let status = |args: &[&str]| run_at(&config, &[&["status"], args].concat()).out;
    let headline = |text: &str| text.lines().take(2).collect::<Vec<_>>().join("\n");
    let text = status(&[]);
    assert!(headline(&text).contains(&format!("runs with pid {}", daemon.pid())), "{text}");
    assert!(!text.contains("nothing new"), "{text}");
    assert!(status(&["--json"]).contains("\"left\":null"), "{}", status(&["--json"]));

    daemon.leave();
    for path in ["/drop", "/proxied", "/proxied/x", "/none"] {
        ground.cgroup(path);
    }
    let text = status(&[]);
    let said = "nothing new is classified since the last one left ";
    assert!(text.contains("in force, default direct; no cgtproxy is running"), "{text}");
    assert!(text.contains(said) && text.contains(" s ago"), "{text}");
    assert!(text.contains("; cgroups that the table does not know: 2\n"), "{text}");
    let json = status(&["--json"]);
    let left = json.split("\"left\":").nth(1).and_then(|rest| rest.split(',').next());
    assert!(left.is_some_and(|n| n.parse::<u64>().is_ok_and(|n| n < 60)), "{json}");
    assert!(json.contains("\"unknown\":2") && json.contains("\"daemon\":null"), "{json}");

    // one that is killed has no chance to say when
    Daemon::start(&ground, POLICY, &[]).kill9();
    let text = status(&[]);
    let said = "nothing new is classified; cgroups that the table does not know: 0\n";
    assert!(text.contains(said), "{text}");

    // without a table there is nothing to know
    assert!(Daemon::start(&ground, POLICY, &[]).stop().success());
    let text = status(&[]);
    assert_eq!(text.lines().next().map(|line| line.contains("not there")), Some(true), "{text}");
    assert!(!text.contains("nothing new"), "{text}");
    assert_eq!(residue(), "");
}

/// Whatever on-exit says, and at any moment: also while it starts.
#[test]
fn left_at_any_moment() {
    let ground = ground!("leave");
    for i in 0..300 {
        ground.cgroup(&format!("/drop/{i}"));
    }
    ground.cgroup("/proxied");
    let pidfile = ground.dir.join("pid");
    let options = ["-p", pidfile.to_str().expect("UTF-8")];
    let daemon = Daemon::start(&ground, POLICY, &options);
    let before = state();
    assert!(pidfile.exists());
    let log = daemon.config.with_extension("log");
    daemon.leave();
    assert!(!pidfile.exists());
    let said = fs::read_to_string(log).expect("read the log");
    assert!(said.contains("left in force for the next start"), "{said}");
    assert_eq!(state(), before);
    for i in 0..sized(30, 300) {
        let mut daemon = Daemon::spawn(&ground, POLICY, &options, &[]);
        std::thread::sleep(Duration::from_micros(i as u64 * 577 % 20_000));
        daemon.signal(Signal::SIGUSR2);
        let status = daemon.wait();
        // before it has blocked signals, this one ends it; it has touched nothing then
        let by_itself = status.signal() == Some(Signal::SIGUSR2 as i32);
        assert!(status.code() == Some(0) || by_itself, "{status}: {}", daemon.logs());
        assert_eq!(state(), before, "{status}");
    }
    assert!(!ip_rules("-4").is_empty());
    assert!(Daemon::start(&ground, POLICY, &[]).stop().success());
    assert_eq!(residue(), "");
}
