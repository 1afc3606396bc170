//! Cgroups come and go, in any order and at any speed: the sets follow.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{expect, under, Client, Outcome, SILENCE};
use crate::daemon::Daemon;
use crate::ground::{addr, moment, sh, Ground, REMOTE4};
use crate::kernel::{await_exactly, await_member, cgroup_id, set_ids, SETTLE};
use crate::world::World;
use crate::{sized, wait_until};

const TPROXY: &str = "[tproxy mihomo]\nport = 7893\n[rules]\n";

fn id(path: &Path) -> u64 {
    cgroup_id(path).unwrap_or_else(|e| panic!("the id of {path:?}: {e}"))
}

fn ids(paths: &[PathBuf]) -> BTreeSet<u64> {
    paths.iter().map(|path| id(path)).collect()
}

fn rmdir(path: &Path) {
    fs::remove_dir(path).unwrap_or_else(|e| panic!("unable to remove {path:?}: {e}"));
}

/// A cgroup gets an element only where its target is not its parent's, whether it was there before the
/// daemon or came later.
#[test]
fn only_cgroups_whose_target_differs_from_the_parents() {
    let ground = ground!("differs");
    // the second comes after the first, which covers it; the default is direct already
    let rules =
        "drop = /a/b\ndirect = /a/b/c\nmihomo = /a\ndirect = /d\ndrop = /d/.*/f\ndrop = /end";
    for path in ["/a/x", "/a/b/c/d", "/d/e/f"] {
        ground.cgroup(path);
    }
    let [mihomo, drop] = ["/a", "/a/b"].map(|path| id(&ground.at(path)));
    let _daemon = Daemon::start(&ground, &format!("{TPROXY}{rules}"), &[]);
    let held = |drops: BTreeSet<u64>| {
        assert_eq!(set_ids("cg_drop"), Some(drops));
        assert_eq!(set_ids("cg_mihomo"), Some([mihomo].into()));
        assert_eq!(set_ids("cg_direct").unwrap_or_default(), BTreeSet::new());
    };
    // who is ready has classified what existed
    held([drop].into());

    for path in ["/a/y", "/a/b/z", "/d/g", "/d/h/i"] {
        ground.cgroup(path);
    }
    let end = ground.cgroup("/end");
    // what came before it has been handled
    await_member(&end, "drop");

    held([drop, id(&end)].into());
}

/// Levels that are made before the daemon can look are all classified.
#[test]
fn nested_back_to_back() {
    let ground = ground!("nested");
    let rules = r"direct = /n\d+/a/b/c/d/e
        drop = /n\d+/a/b/c
        mihomo = /n\d+";
    let _daemon = Daemon::start(&ground, &format!("{TPROXY}{rules}"), &[]);
    for i in 0..300 {
        ground.cgroup(&format!("/n{i}/a/b/c/d/e"));
    }
    for (set, below) in [("cg_mihomo", ""), ("cg_drop", "/a/b/c"), ("cg_direct", "/a/b/c/d/e")] {
        let paths: Vec<_> = (0..300).map(|i| ground.at(&format!("/n{i}{below}"))).collect();
        await_exactly(set, &ids(&paths), SETTLE);
    }
}

/// The first cgroups of targets at their levels come in any order: the nearest one decides, of flows
/// that go on as well.
#[test]
fn the_first_of_each_kind() {
    let (ground, _world, _proxy) = scene!("kinds", proxy);
    let rules = "drop = /n/.+/.+/d\nmihomo = /n/.+/.+/m\ndrop = /n/.+/d\ndirect = /n/.+/o\n\
        mihomo = /n/.+/m\ndrop = /n/d\nmihomo = /n/m\n";
    ground.cgroup("/n");
    let daemon = Daemon::start(&ground, &format!("{TPROXY}{rules}"), &[]);
    let mut all = Vec::new();
    for path in ["/n/m", "/n/m/d", "/n/m/o", "/n/d", "/n/d/o", "/n/d/m", "/n/m/o/m", "/n/m/o/d"] {
        let cgroup = ground.cgroup(path);
        let (target, way) = match &path[path.len() - 1..] {
            "m" => ("mihomo", "proxy mihomo"),
            "d" => ("drop", "drop"),
            _ => ("direct", "direct"),
        };
        await_member(&cgroup, target);
        all.push((cgroup, way));
        let ways: Vec<_> = all.iter().map(|(path, way)| (&**path, under(way))).collect();
        expect(&ways);
    }
    daemon.stop_clean();
}

/// A cgroup of an old name is a new one, whatever came and went in between.
#[test]
fn one_path_removed_and_made_again() {
    let ground = ground!("again");
    let _daemon = Daemon::start(&ground, &format!("{TPROXY}drop = /p/q"), &[]);
    let path = ground.cgroup("/p/q");
    let mut former = id(&path);
    for i in 1..=300 {
        rmdir(&path);
        fs::create_dir(&path).expect("mkdir");
        let live = id(&path);
        assert_ne!(live, former);
        former = live;
        if i % 50 == 0 {
            await_exactly("cg_drop", &[live].into(), SETTLE);
        }
    }

    // with the parent in between
    for _ in 0..300 {
        rmdir(&path);
        rmdir(&ground.at("/p"));
        ground.cgroup("/p/q");
    }
    await_exactly("cg_drop", &[id(&path)].into(), SETTLE);
    rmdir(&path);
    await_exactly("cg_drop", &BTreeSet::new(), SETTLE);
}

/// Thousands of cgroups at once are classified and watched, and cost no memory once they are gone.
#[test]
fn burst() {
    // a leak of one small allocation a cgroup is seen in either form
    let all = sized(3_000, 10_000);
    let ground = ground!("burst");
    let rules = "mihomo = /apps/a.*5\ndrop = /apps/a.*";
    let apps = ground.cgroup("/apps");
    let daemon = Daemon::start(&ground, &format!("{TPROXY}{rules}"), &[]);
    let paths: Vec<_> = (0..all).map(|i| apps.join(format!("a{i}"))).collect();
    let at_rest = daemon.footprint();
    let footprints = [all; 8].map(|count| {
        let paths = &paths[..count];
        let (mut some, mut most) = (Vec::new(), Vec::new());
        let start = Instant::now();
        for (i, path) in paths.iter().enumerate() {
            fs::create_dir(path).expect("mkdir");
            if i % 10 == 5 { &mut some } else { &mut most }.push(path.clone());
        }
        let made = start.elapsed();
        await_exactly("cg_mihomo", &ids(&some), SETTLE);
        await_exactly("cg_drop", &ids(&most), SETTLE);
        let classified = start.elapsed();
        // classified first, watched then
        let watches = || daemon.footprint().0 - at_rest.0;
        assert!(wait_until(SETTLE, || watches() == count), "{} of {count} watched", watches());
        let memory = daemon.footprint().1;
        println!("{count} cgroups made in {made:?}, classified in {classified:?}: {memory} KiB");
        for path in paths {
            rmdir(path);
        }
        for set in ["cg_mihomo", "cg_drop"] {
            await_exactly(set, &BTreeSet::new(), SETTLE);
        }
        let left = || daemon.footprint().0 - at_rest.0;
        assert!(wait_until(SETTLE, || left() == 0), "{} watches are left", left());
        daemon.footprint().1
    });
    println!("{} KiB at first, {footprints:?} after each burst", at_rest.1);
    // An allocator keeps some for reuse, for elements, gates and what is dying, of which there may be
    // none or a thousand; a leak grows with every burst.
    let [first, second, .., last] = footprints;
    assert!(first <= at_rest.1 + 3072 && last <= first.max(second) + 512);
    // And it still works.
    await_member(&ground.cgroup("/apps/a5"), "mihomo");
}

/// Where the queue of events has run over, all is as if none had been lost.
#[test]
fn overflow() {
    const COUNT: usize = 20_000;
    let ground = ground!("overflow");
    let daemon = Daemon::start(&ground, &format!("{TPROXY}drop = /apps/.*"), &[]);
    let kept = ["/apps/old", "/apps/gone"].map(|path| ground.cgroup(path));
    for path in &kept {
        await_member(path, "drop");
    }
    let before = daemon.footprint().0;
    // Each cgroup makes two events, or the queue would not overflow.
    let queue = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("read");
    assert!(queue.trim().parse::<usize>().expect("a number") < COUNT);

    daemon.signal(Signal::SIGSTOP);
    let apps = ground.at("/apps");
    let mut live = vec![kept[0].clone()];
    for i in 0..COUNT {
        let path = apps.join(format!("s{i}"));
        fs::create_dir(&path).expect("mkdir");
        if i % 1000 == 999 {
            live.push(path);
        } else {
            rmdir(&path);
        }
    }
    // After the queue is full, hence without events: gone, made again, and new in new places.
    rmdir(&kept[1]);
    rmdir(&kept[0]);
    fs::create_dir(&kept[0]).expect("mkdir");
    live.push(ground.cgroup("/apps/late/later"));
    live.push(ground.cgroup("/apps/late"));
    daemon.signal(Signal::SIGCONT);

    live.retain(|path| !path.ends_with("later"));
    await_exactly("cg_drop", &ids(&live), SETTLE);
    let watches = before - 1 + live.len();
    let mut have = 0;
    let same = wait_until(SETTLE, || {
        have = daemon.footprint().0;
        have == watches
    });
    assert!(same, "{have} watches for {watches} cgroups");
    // What the rescan has found is watched as well.
    await_exactly("cg_drop", &ids(&live), SETTLE);
    fs::remove_dir(ground.at("/apps/late/later")).expect("rmdir");
    fs::remove_dir(ground.at("/apps/late")).expect("rmdir");
    live.retain(|path| !path.ends_with("late"));
    await_exactly("cg_drop", &ids(&live), SETTLE);
}

/// A name may hold any bytes: rules match it, and the log has it escaped.
#[test]
fn names_of_any_bytes() {
    let ground = ground!("names");
    let rules = "drop = /b.d\nmihomo = /.*\\x1b.*\ndirect = /.*";
    let daemon = Daemon::start(&ground, &format!("{TPROXY}{rules}"), &["-v", "-v"]);
    let odd: [&[u8]; 5] = [b"b\xffd", b"\x1b[31mred", b"a b", b"d\"q", &[b'n'; 255]];
    let paths = odd.map(|name| ground.root.join(OsStr::from_bytes(name)));
    for path in &paths {
        fs::create_dir(path).expect("mkdir");
    }
    await_exactly("cg_drop", &[id(&paths[0])].into(), SETTLE);
    await_exactly("cg_mihomo", &[id(&paths[1])].into(), SETTLE);
    let log = daemon.logs();
    assert!(log.contains("/\\x1b[31mred: mihomo\n") && !log.contains('\x1b'), "{log}");
    for path in &paths {
        rmdir(path);
    }
    await_exactly("cg_drop", &BTreeSet::new(), SETTLE);
    await_exactly("cg_mihomo", &BTreeSet::new(), SETTLE);
}

/// Any level will do; nothing is known of levels in advance.
#[test]
fn a_deep_tree() {
    let ground = ground!("deep");
    let path = (1..=40).map(|i| format!("/d{i}")).collect::<String>();
    let (half, _) = path.split_at(path.find("/d20").expect("there"));
    let _daemon = Daemon::start(&ground, &format!("{TPROXY}drop = {path}\nmihomo = {half}"), &[]);

    ground.cgroup(&path);

    // `mihomo` comes second, but no rule before it takes what lies above {path}.
    await_member(&ground.at(half), "mihomo");
    await_member(&ground.at(&path), "drop");
}

/// cgroup-root = auto finds cgroup2 on its own, and below v1 on a hybrid host.
#[test]
fn the_root_is_found() {
    let ground = ground!("auto");
    let name = ground.root.file_name().and_then(OsStr::to_str).expect("a name").to_owned();
    let config = format!("[global]\ncgroup-root = auto\n[rules]\ndrop = /{name}/x");
    let daemon = Daemon::start(&ground, &config, &[]);
    let path = ground.cgroup("/x/y");
    await_member(&ground.at("/x"), "drop");
    drop(daemon);

    // a hybrid host: v1 in the usual place, cgroup2 below it.
    sh("umount -l /sys/fs/cgroup && mount -t tmpfs none /sys/fs/cgroup && \
        mkdir /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified");
    let daemon = Daemon::start(&ground, &config, &[]);
    let below = Path::new("/sys/fs/cgroup/unified").join(name);
    let found = set_ids("cg_drop") == Some([id(&below.join("x"))].into());
    let later = daemon.logs();
    drop(daemon);
    // The ground finds its sub-tree where it made it.
    sh("umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup");
    assert!(path.exists());
    assert!(found, "{later}");
}

/// A child goes the way of its parent from its first packet on.
#[test]
fn born_under_a_parent_with_the_same_target() {
    let (ground, mut world, _proxy) = scene!("born", proxy);
    let rules = "drop = /drop\nmihomo = /proxied";
    let parents = ["/proxied", "/drop"].map(|path| ground.cgroup(path));
    let _daemon = Daemon::start(&ground, &format!("{TPROXY}{rules}"), &[]);
    let to = addr(REMOTE4, 80);
    for i in 0..100 {
        for parent in &parents {
            let child = parent.join(format!("c{i}"));
            fs::create_dir(&child).expect("mkdir");
            let udp = Client::udp(&child, to).timeout(SILENCE * 4).spawn();
            if parent.ends_with("proxied") {
                let tcp = Client::tcp(&child, to).run();
                assert_eq!(tcp.who(), format!("proxy mihomo {to}"));
                assert_eq!(udp.wait().0.who(), format!("proxy mihomo {to}"));
            } else {
                assert_eq!(udp.wait().0.who(), "nobody");
            }
            rmdir(&child);
        }
    }
    assert_eq!(world.wire.to_remote(), [], "a packet has leaked");
}

/// Where child and parent differ, the daemon is woken: the parent's way ends within moments.
#[test]
fn window_under_a_parent_with_another_target() {
    let (ground, mut world) = scene!("window");
    let _daemon = Daemon::start(&ground, &format!("{TPROXY}drop = /w.*"), &[]);
    let times = sized(50, 500);
    let (mut windows, mut leaked, mut moments) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..times {
        let cgroup = ground.cgroup(&format!("/w{i}"));
        let client = Client::udp(&cgroup, addr(REMOTE4, 9)).until_denied();
        let (outcome, window) = client.spawn().wait();
        assert_eq!(outcome, Outcome::Answer(String::new()), "{cgroup:?} is not dropped");
        windows.push(window);
        leaked.push(world.wire.to_remote().len());
        rmdir(&cgroup);
        moments.extend((i % 5 == 0).then(moment));
    }
    windows.sort();
    leaked.sort();
    moments.sort();
    println!(
        "window of a new cgroup: median {:?}, longest {:?}; packets in it: median {}, most {}; {:?} \
         for a program",
        windows[times / 2],
        windows[times - 1],
        leaked[times / 2],
        leaked[times - 1],
        moments[moments.len() / 2],
    );
    // events wake the daemon; if it looked now and then, that would be tenths of a second
    assert!(windows[times / 2] < 30 * moments[moments.len() / 2], "{windows:?} {moments:?}");
}

/// Whatever the order in which events and packets come, a flow that began in the window does not
/// go on outside the policy.
#[test]
fn a_flow_of_the_window_is_cut() {
    let (ground, mut world) = scene!("cut");
    let daemon = Daemon::start(&ground, &format!("{TPROXY}drop = /w"), &[]);
    let cgroup = ground.cgroup("/w");
    let _flood = Client::udp(&cgroup, addr(REMOTE4, 9)).flood().spawn();
    await_member(&cgroup, "drop");
    world.wire.packets();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(world.wire.to_remote(), []);
    // it has sent on all the time
    daemon.stop_clean();
    assert!(wait_until(SETTLE, || !world.wire.to_remote().is_empty()));
}
