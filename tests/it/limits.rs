//! The limits of the kernel and of the process are reached: what works goes on, it is said once
//! with the remedy, and all is whole again by itself when the limit is gone.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::client::{expect, under, PATIENCE};
use crate::daemon::{binary, write_private, Daemon, UNOWNED};
use crate::ground::{here, ip_batch, sh, Ground};
use crate::kernel::{await_exactly, await_member, cgroup_id, nft, residue, set_ids, state, SETTLE};
use crate::world::World;
use crate::{sized, wait_until};

const CONFIG: &str = "
[tproxy mihomo]
port = 7893
[rules]
mihomo = /(apps|deep)/.*/x
drop   = /deep
drop   = /apps/.*
drop   = /drop
";

/// Longer than the daemon's pause between two looks, which is 5 s.
const LOOKED_AGAIN: Duration = Duration::from_secs(45);

/// A daemon in a user namespace of its own, which has its own limits (namespaces(7)), and hence in
/// a network namespace of its own. `limits` are files of /proc/sys/user.
fn in_a_user_namespace(ground: &Ground, limits: &[(&str, usize)]) -> Daemon {
    let set = |(name, value): &(&str, usize)| format!("echo {value} > /proc/sys/user/{name}; ");
    let limits: String = limits.iter().map(set).collect();
    let script = format!("{limits} ip link set lo up; exec \"$0\" \"$@\"");
    let by = ["unshare", "-r", "-n", "sh", "-c", &script];
    Daemon::spawn_by(ground, CONFIG, &by, &[], &[])
}

fn set_limit(daemon: &Daemon, name: &str, value: usize) {
    let pid = daemon.pid();
    sh(&format!("nsenter -t {pid} -U sh -c 'echo {value} > /proc/sys/user/{name}'"));
}

fn network(daemon: &Daemon) -> File {
    File::open(format!("/proc/{}/ns/net", daemon.pid())).expect("open the network namespace")
}

/// Without watches, what is below a watched cgroup is classified at once and the rest soon; with more of
/// them, all is watched again.
#[test]
fn watches_run_out() {
    let ground = ground!("watches");
    let dropped = ground.cgroup("/drop");
    let mut daemon = in_a_user_namespace(&ground, &[("max_inotify_watches", 10)]);
    assert!(daemon.ready(), "{}", daemon.logs());
    let net = network(&daemon);

    let apps: Vec<_> = (0..30).map(|i| ground.cgroup(&format!("/apps/a{i}"))).collect();
    let drops = apps.iter().chain([&dropped]);
    let drops = drops.map(|path| cgroup_id(path).expect("an id")).collect();
    // what is below a watched directory is classified at once, watched or not
    ground.within(&net, || await_exactly("cg_drop", &drops, Duration::from_secs(3)));
    // and watched afterwards, until there are no more
    assert!(daemon.wait_log("fs.inotify.max_user_watches", PATIENCE), "{}", daemon.logs());
    assert_eq!(daemon.footprint().0, 10);
    let log = daemon.logs();
    assert_eq!(log.matches("unable to watch").count(), 1, "{log}");
    // what is below an unwatched one, a few seconds later
    let below = ground.cgroup("/apps/a29/x");
    ground.within(&net, || {
        let id = cgroup_id(&below).expect("an id");
        let there = || set_ids("cg_mihomo").is_some_and(|ids| ids.contains(&id));
        assert!(wait_until(LOOKED_AGAIN, there));
    });

    set_limit(&daemon, "max_inotify_watches", 1000);
    // and the directory that the root is in
    let all = 35;
    let watched = || daemon.footprint().0 == all;
    assert!(wait_until(LOOKED_AGAIN, watched), "{:?}", daemon.logs());
    assert!(daemon.wait_log("every cgroup is watched again", PATIENCE));
    let below = ground.cgroup("/apps/a28/x");
    ground.within(&net, || await_member(&below, "mihomo"));
    let log = daemon.logs();
    assert_eq!(log.matches("unable to watch").count(), 1, "{log}");
    assert_eq!(daemon.stop().code(), Some(0));
    ground.within(&net, || assert_eq!(residue(), ""));
}

/// One user takes all watches, and then some: looking at his cgroups must not keep the program
/// from others'.
#[test]
fn many_unwatched_cgroups() {
    let ground = ground!("unwatched");
    let count = sized(20_000, 50_000);
    let (user, apps) = (ground.cgroup("/user"), ground.cgroup("/apps"));
    let mut daemon = in_a_user_namespace(&ground, &[("max_inotify_watches", 10)]);
    assert!(daemon.ready(), "{}", daemon.logs());
    let net = network(&daemon);
    for i in 0..count {
        fs::create_dir(user.join(format!("u{i}"))).expect("mkdir");
    }
    let before = daemon.busy();
    let start = Instant::now();
    let mut took = Vec::new();
    ground.within(&net, || {
        await_member(&ground.cgroup("/apps/first"), "drop");
        while start.elapsed() < Duration::from_secs(sized(6, 12) as u64) {
            let path = apps.join(took.len().to_string());
            let start = Instant::now();
            fs::create_dir(&path).expect("mkdir");
            await_member(&path, "drop");
            took.push(start.elapsed());
            fs::remove_dir(&path).expect("rmdir");
            thread::sleep(Duration::from_millis(5));
        }
    });
    let spent = daemon.busy() - before;
    took.sort();
    println!(
        "{count} unwatched cgroups: {} of others: median {:?}, 99 % {:?}, longest {:?}; {spent:?} of \
         processor time in {:?}",
        took.len(),
        took[took.len() / 2],
        took[took.len() * 99 / 100],
        took[took.len() - 1],
        start.elapsed()
    );
    // beside other tests, the processor is not ours
    assert!(took[took.len() * 99 / 100] < Duration::from_millis(sized(1000, 50) as u64));
    assert!(spent < here(Duration::from_millis(sized(900, 300) as u64)), "{spent:?}");
    set_limit(&daemon, "max_inotify_watches", 2 * count);
    let watched = || daemon.footprint().0 >= count + 3;
    assert!(wait_until(Duration::from_secs(180), watched));
    println!("all watched after {:?}", start.elapsed());
    assert!(daemon.stop().success());
}

/// Without an inotify instance a start fails; without a second one, a reload that needs it.
#[test]
fn instances_run_out() {
    let ground = ground!("instances");
    ground.cgroup("/drop");
    let mut daemon = in_a_user_namespace(&ground, &[("max_inotify_instances", 0)]);
    assert!(!daemon.ready());
    assert_eq!(daemon.wait().code(), Some(1));
    let log = daemon.logs();
    assert!(log.contains("fs.inotify.max_user_instances"), "{log}");

    // one is enough to run, not for a reload that goes to another root
    let mut daemon = in_a_user_namespace(&ground, &[("max_inotify_instances", 1)]);
    assert!(daemon.ready(), "{}", daemon.logs());
    let net = network(&daemon);
    let before = ground.within(&net, state);
    let other = ground.cgroup("/sub");
    let config = fs::read_to_string(&daemon.config).expect("read the configuration");
    let root = ground.root.to_str().expect("UTF-8");
    let moved = config.replace(root, other.to_str().expect("UTF-8"));
    daemon.configure(&moved);
    let log = daemon.refuse();
    assert!(log.contains("fs.inotify.max_user_instances"), "{log}");
    assert!(log.contains("the old configuration stays"), "{log}");
    ground.within(&net, || {
        assert_eq!(state(), before);
        await_member(&ground.cgroup("/apps/a"), "drop");
    });
    set_limit(&daemon, "max_inotify_instances", 10);
    daemon.reload();
    let member = ground.cgroup("/sub/apps/a");
    ground.within(&net, || await_member(&member, "drop"));
    assert!(daemon.stop().success());
}

/// Without descriptors, what it is told of is classified and what it cannot do is said once; with them,
/// all is whole again.
#[test]
fn descriptors_run_out() {
    let (ground, _world) = scene!("nofile");
    let dropped = ground.cgroup("/drop");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let limit = |n: usize| sh(&format!("prlimit --pid {} --nofile={n}:4096", daemon.pid()));
    // it bounds the numbers of new descriptors only, and 0 to 2 are taken
    limit(3);
    // what it is told of is classified, even where it cannot look inside
    let deep = ground.cgroup("/deep/b/c/x");
    await_member(&ground.at("/deep"), "drop");
    let told = daemon.wait_log("unable to watch", SETTLE);
    let log = daemon.logs();
    assert!(told && log.matches("unable to watch").count() == 1, "{log}");
    assert!(log.contains("raise the limit of open files"), "{log}");
    let log = daemon.refuse();
    assert!(log.contains("the old configuration stays"), "{log}");
    let before = daemon.busy();
    thread::sleep(Duration::from_secs(1));
    let spent = daemon.busy() - before;
    assert!(spent < here(Duration::from_millis(200)), "{spent:?} in a second");

    limit(1024);
    await_member(&deep, "mihomo");
    daemon.reload();
    let log = daemon.logs();
    assert!(log.contains("every cgroup is watched again"), "{log}");
    assert!(log.matches("unable to poll").count() <= 2, "{log}");
    expect(&[(&dropped, under("drop"))]);
    daemon.stop_clean();
}

/// Without memory nothing can go on, but the rules stay; with memory it goes on where it was.
#[test]
fn memory_runs_out() {
    let (ground, _world) = scene!("memory");
    let dropped = ground.cgroup("/drop");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let size = daemon.process("VmSize");
    let kib: usize = size.trim_end_matches(" kB").parse().expect("a size");
    let limit = |bytes: &str| sh(&format!("prlimit --pid {} --as={bytes}:", daemon.pid()));
    limit(&((kib + 512) * 1024).to_string());
    let apps = ground.cgroup("/apps");
    let mut made = 0;
    while !daemon.logs().contains("out of memory, waiting") {
        for _ in 0..100 {
            fs::create_dir(apps.join(format!("a{made}"))).expect("mkdir");
            made += 1;
        }
        assert!(made < 20_000, "{}", daemon.logs());
    }
    println!("waiting after {made} cgroups");
    let before = daemon.busy();
    thread::sleep(Duration::from_secs(1));
    let spent = daemon.busy() - before;
    assert!(spent < here(Duration::from_millis(200)), "{spent:?} in a second");
    expect(&[(&dropped, under("drop")), (&apps.join("a0"), under("drop"))]);

    limit("unlimited");
    await_member(&apps.join(format!("a{}", made - 1)), "drop");
    assert!(daemon.wait_log("memory had run out", SETTLE));
    let log = daemon.logs();
    assert!(log.matches("out of memory, waiting").count() == 1, "{log}");
    daemon.stop_clean();
}

/// A command ends at once, and says why.
#[test]
fn a_command_without_memory() {
    let ground = ground!("no-memory");
    let config = ground.dir.join("large.conf");
    let rules: String = (0..2000).map(|i| format!("drop = (?i)/a{i}/.*\n")).collect();
    write_private(&config, &format!("[rules]\n{rules}"));
    let program = binary();
    // the static program as it is shipped, and a dynamic one with its libraries
    for kib in [800, 1000, 1500, 2000, 8500, 9000, 9500, 10000] {
        let out = Command::new("sh")
            .args(["-c", &format!("ulimit -v {kib}; exec \"$0\" -c \"$1\" show")])
            .args([program.as_os_str(), config.as_os_str()])
            .output()
            .expect("run sh");
        let log = String::from_utf8_lossy(&out.stderr);
        let told = out.status.code() == Some(1) && log.contains("error: out of memory");
        // without memory for its own text no program begins
        let killed = out.status.signal() == Some(libc::SIGSEGV)
            || matches!(out.status.code(), Some(126 | 127));
        assert!(told || killed || out.status.success(), "{kib}: {out:?}");
        if told {
            return;
        }
    }
    panic!("it always had memory");
}

/// A daemon that `script` execs, in a mount namespace of its own; `ROOT` is the ground's sub-tree.
fn by_script(ground: &Ground, config: &str, script: &str) -> Daemon {
    let root = ground.root.to_str().expect("UTF-8");
    let script = script.replace("ROOT", root);
    Daemon::spawn_by(ground, config, &["unshare", "-m", "sh", "-ec", &script], &[], &[])
}

/// Levels are right whatever is mounted where and whichever namespace we are in, or it is said.
#[test]
fn levels_are_right_or_refused() {
    let (ground, _world) = scene!("levels");
    let apps = [ground.cgroup("/apps"), ground.cgroup("/ns/apps"), ground.cgroup("/ns/sub/apps")];
    let auto = "[global]\ncgroup-root = auto\n[rules]\ndrop = /apps\n";
    let sub = auto.replace("auto", &format!("{}/ns/sub", ground.root.display()));
    let enter = "echo $$ > ROOT/ns/cgroup.procs; exec unshare -C";
    let own = "sh -ec 'umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; \
               exec \"$0\" \"$@\"'";
    for (config, script, dropped) in [
        // a part of the tree hides the whole
        (auto, "mount --bind ROOT /sys/fs/cgroup; exec \"$0\" \"$@\"".to_owned(), &apps[0]),
        // in a namespace, with the mount of the host and with one of its own
        (&sub, format!("{enter} \"$0\" \"$@\""), &apps[2]),
        (auto, format!("{enter} -m {own} \"$0\" \"$@\""), &apps[1]),
    ] {
        let mut daemon = by_script(&ground, config, &script);
        assert!(daemon.ready(), "{script}: {}", daemon.logs());
        assert!(!daemon.logs().contains("warning"), "{}", daemon.logs());
        for path in &apps {
            let target = if path == dropped { "drop" } else { "direct" };
            expect(&[(path, under(target))]);
        }
        daemon.stop_clean();
    }
    let mut daemon = by_script(&ground, auto, &format!("{enter} \"$0\" \"$@\""));
    assert!(!daemon.ready());
    assert_eq!(daemon.wait().code(), Some(1));
    assert!(daemon.logs().contains("above the root of our cgroup namespace"), "{}", daemon.logs());
    assert_eq!(residue(), "");
}

/// A cgroup at a level that the kernel refuses costs no other its target, at the start or later.
#[test]
fn a_level_that_the_kernel_refuses() {
    let (ground, _world) = scene!("deepest");
    let config = "[global]\ncgroup-root = auto\n[rules]\ndrop = /apps.*\ndrop = (/a)*/x\n";
    let script = "echo $$ > ROOT/ns/cgroup.procs; exec unshare -C -m sh -ec \
                  'umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; \
                  exec \"$0\" \"$@\"' \"$0\" \"$@\"";
    let first = ground.cgroup("/ns/apps");
    let deep = format!("/ns{}/x", "/a".repeat(254));
    for at_start in [true, false] {
        if at_start {
            ground.cgroup(&deep);
        }
        let mut daemon = by_script(&ground, config, script);
        assert!(daemon.ready(), "{}", daemon.logs());
        if !at_start {
            ground.cgroup(&deep);
            assert!(daemon.wait_log("no cgroup deeper than level 253", SETTLE));
        }
        let later = ground.cgroup("/ns/apps2");
        await_member(&later, "drop");
        expect(&[(&first, under("drop")), (&later, under("drop"))]);
        let log = daemon.logs();
        assert_eq!(log.matches("no cgroup deeper than level 253").count(), 1, "{log}");
        crate::ground::remove_tree(&ground.at("/ns/a"));
        await_member(&ground.cgroup("/ns/x"), "drop");
        daemon.stop_clean();
    }
}

/// Notifications that the kernel has dropped, over all netlink sockets of this namespace.
fn dropped() -> u64 {
    let table = fs::read_to_string("/proc/thread-self/net/netlink").expect("read");
    let drops = table.lines().skip(1);
    let drops = drops.filter_map(|line| line.split_whitespace().nth(8)?.parse::<u64>().ok());
    drops.sum()
}

/// Rules that come and go, each of which is told.
fn foreign_rules(pairs: usize) -> String {
    let pair = "rule add pref 200 iif lo fwmark 0x7/0xff lookup 300 protocol 99\n\
                rule del pref 200 iif lo fwmark 0x7/0xff lookup 300 protocol 99\n";
    pair.repeat(pairs)
}

/// Repairs of the routing are refused until `said` is logged.
fn refused_until(daemon: &Daemon, harm: &str, said: &str) {
    let pid = daemon.pid().to_string();
    let calls = ["-e", "trace=sendto", "-e", "inject=sendto:error=ENOMEM"];
    let mut command = Command::new("strace");
    command.args(["-qq", "-o", "/dev/null", "-p", &pid]).args(calls);
    let mut strace = command.spawn().expect("start strace");
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read");
        !status.contains("TracerPid:\t0\n")
    };
    assert!(wait_until(PATIENCE, traced));
    sh(harm);
    let refused = daemon.wait_log(said, 2 * PATIENCE);
    // which lets the program go
    kill(Pid::from_raw(strace.id() as i32), Signal::SIGTERM).expect("end strace");
    strace.wait().expect("wait for strace");
    assert!(refused, "{}", daemon.logs());
}

/// What ends the pause between two repairs of the routing may be among what is lost.
#[test]
fn a_loss_ends_the_pause() {
    let ground = ground!("losspause");
    ground.cgroup("/drop");
    let daemon = Daemon::start(&ground, CONFIG, &["--no-seccomp"]);
    let whole = residue();
    // a longer one where others have kept the machine for all of a shorter
    let ends_in = |pause: u64| {
        refused_until(&daemon, "ip rule del pref 100", &format!("trying again in {pause} s"));
        let begun = Instant::now();
        daemon.signal(Signal::SIGSTOP);
        let before = dropped();
        ip_batch(&["-4"], &foreign_rules(4000));
        let lost = dropped();
        assert!(lost > before, "nothing was lost");
        sh("ip link set lo down; ip link set lo up");
        assert!(dropped() > lost);
        daemon.signal(Signal::SIGCONT);
        let healed = wait_until(2 * PATIENCE, || residue() == whole);
        assert!(healed, "{}\n{}", residue(), daemon.logs());
        let after = begun.elapsed();
        println!("whole {after:?} after a pause of {pause} s began");
        after < Duration::from_secs(pause)
    };
    assert!([8, 16, 32].into_iter().any(ends_in), "it sat every pause out");
}

/// Notifications are lost while the program cannot run, and the damage with them.
#[test]
fn notifications_are_lost() {
    let ground = ground!("enobufs");
    ground.cgroup("/drop");
    let daemon = Daemon::start_in(&ground, CONFIG, &[], &[UNOWNED]);
    let whole = state();
    let foreign_tables = |n: usize| -> String {
        let one = "add table ip other\nadd chain ip other c\nadd rule ip other c counter\n\
                   delete table ip other\n";
        one.repeat(n)
    };
    for round in 0..sized(1, 5) {
        let before = dropped();
        daemon.signal(Signal::SIGSTOP);
        ip_batch(&["-4"], &foreign_rules(4000));
        let out = nft(&["-f", "-"], &foreign_tables(2000));
        assert!(out.status.success(), "{out:?}");
        let lost = dropped();
        assert!(lost > before, "nothing was lost");
        // what follows is not in the queues any more
        sh("ip rule del pref 100; ip -6 rule del pref 100; ip route flush table 300; \
            ip -6 route flush table 300; nft delete table inet cgtproxy");
        assert!(dropped() > lost);
        assert_eq!(residue(), "table inet cgtproxy-lock\n");
        daemon.signal(Signal::SIGCONT);
        let healed = wait_until(PATIENCE, || state() == whole);
        println!("round {round}: {} notifications lost", dropped());
        assert!(healed, "{:?}\n{}", state(), daemon.logs());
    }
    let log = daemon.logs();
    assert!(log.contains("notifications were lost"), "{log}");
    daemon.stop_clean();
}
