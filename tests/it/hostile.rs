//! What an unprivileged user can do with names and numbers of cgroups in a sub-tree that was
//! delegated to him.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    bind, connect, listen, socket, AddressFamily, Backlog, SockFlag, SockType, UnixAddr,
};

use crate::client::{again, socket_in, udp_in, Client, Proto, PATIENCE, SILENCE};
use crate::daemon::{run_at, run_with, write_private, Daemon};
use crate::gateway::{Lan, LAN4, LAN6};
use crate::ground::{addr, chmod, here, ip, ip_batch, Ground, Netns, HOSTS, REMOTE4, REMOTES};
use crate::kernel::{await_exactly, cgroup_id, load, output, residue, set_ids, SETTLE};
use crate::routes::tunnel_up;
use crate::world::{bind_at, raw_addr, set, Server, World, PROXY};
use crate::{sized, wait_until};

/// What a terminal, nft, printf, a shell or a careless reader of lines would choke on.
const NAMES: [&[u8]; 14] = [
    b"\x1b[2J\x1b]0;owned\x07",
    &[b'x'; 255],
    b"\xff\xfe\x80",
    b"\xc3\x28",
    b"}; flush ruleset; table inet x {",
    b"\" } delete table inet cgtproxy; \"",
    b"%s%n%1000000d",
    b"$(reboot)`reboot`",
    b"'quotes\"",
    b"# comment",
    b"back\\slash\\n",
    b"tab\tand\rreturn",
    b"*?[a-z]",
    b" blanks ",
];

/// A name that a terminal, nft or a shell would choke on is matched, and harms neither log nor `show`.
#[test]
fn hostile_names() {
    let (ground, mut world) = scene!("hostile");
    let config = "[rules]\ndrop = /u/.*\n";
    let daemon = Daemon::start(&ground, config, &["-v", "-v"]);
    let user = ground.cgroup("/u");
    let paths = NAMES.map(|name| user.join(OsStr::from_bytes(name)));
    for path in &paths {
        fs::create_dir(path).unwrap_or_else(|e| panic!("mkdir {path:?}: {e}"));
    }
    // a newline is nothing that the kernel takes
    assert!(fs::create_dir(user.join("a\nb")).is_err());
    // nft could not print the others so that they load again: they are matched by a hash
    let printed = paths.iter().filter(|path| !path.as_os_str().as_bytes().contains(&b'"'));
    let ids = printed.map(|p| cgroup_id(p).expect("an id")).collect();
    await_exactly("cg_drop", &ids, SETTLE);
    let told = || daemon.logs().matches(": drop\n").count();
    assert!(wait_until(SETTLE, || told() >= NAMES.len()), "{}", daemon.logs());
    for path in &paths {
        let client = Client::udp(path, addr(REMOTE4, 80)).timeout(Duration::from_millis(50));
        assert_eq!(client.run().who(), "nobody", "{path:?}");
    }
    assert_eq!(world.wire.to_remote(), []);

    let show = run_with(&ground, config, &["show"]);
    assert_eq!(show.code, Some(0));
    let log = daemon.logs();
    assert_eq!(log.matches(": drop\n").count(), NAMES.len(), "{log}");
    for text in [&log, &show.out] {
        let odd = text.chars().find(|c| !matches!(c, ' '..='~' | '\n'));
        assert_eq!(odd, None, "{text}");
    }
    assert!(daemon.stop().success());

    // What `show` prints loads, does nothing else, and holds every name that nft can be told.
    load("table inet bystander { }");
    load(&show.out);
    let shown = set_ids("cg_drop").expect("the set");
    println!("{} of {} names can be shown to nft", shown.len(), ids.len());
    assert!(shown.is_subset(&ids) && !shown.is_empty());
    load("delete table inet bystander; delete table inet cgtproxy");
}

/// A user who nests cgroups that a rule matches, as deep as the kernel takes them, taxes himself:
/// what others send costs what it did, whether a rule decides for them or none does.
#[test]
fn nested_cgroups_tax_nobody_else() {
    const LEVELS: usize = 240;
    let ground = ground!("nested");
    // what is sent ends at the door
    let sink = "table netdev sink { chain in {
        type filter hook ingress device out0 priority 0; policy drop;
    }\n}";
    ground.outside(|| load(sink));
    let config = "[rules]\ndrop = /delegated/.*app\ndrop = /dropped\ndirect = /dropped/.*/e\n";
    let paths = ["/other/b/c/d/e", "/dropped/b/c/d", "/dropped/b/c/d/e"];
    let cgroups = paths.map(|path| ground.cgroup(path));
    let daemon = Daemon::start(&ground, config, &[]);
    let sockets = cgroups.map(|cgroup| {
        let socket = udp_in(&cgroup, REMOTE4);
        socket.connect(addr(REMOTE4, 9)).expect("connect");
        socket
    });
    // the same way through the kernel where no table is
    let bare = Netns::new();
    let bare = bare.run(|| {
        ip_batch(&[], "link set lo up\n");
        let sink = UdpSocket::bind(("127.0.0.1", 9)).expect("bind");
        let socket = UdpSocket::bind(("127.0.0.1", 0)).expect("bind");
        socket.connect(("127.0.0.1", 9)).expect("connect");
        (socket, sink)
    });
    let costs = || sockets.each_ref().map(|socket| cost(socket, &bare.0));
    costs();
    let before = costs();
    let deep = (1..=LEVELS).map(|n| format!("/delegated{}/app", "/x".repeat(n)));
    let deep: Vec<PathBuf> = deep.map(|path| ground.cgroup(&path)).collect();
    let own = ground.at("/dropped");
    let ids = deep.iter().chain([&own]);
    let ids = ids.map(|path| cgroup_id(path).expect("an id")).collect();
    await_exactly("cg_drop", &ids, SETTLE);
    let after = costs();
    println!("{paths:?}: {before:?} x a bare packet, beside {LEVELS} nested levels {after:?}");
    for (before, after) in before.iter().zip(after) {
        assert!(after < 1.5 * before, "{before} x a bare packet, and then {after}");
    }
    assert!(daemon.stop().success());
}

/// What a datagram costs whoever sends it, as a multiple of a bare one in the same moments, of which the
/// best tenth counts.
fn cost(socket: &UdpSocket, bare: &UdpSocket) -> f64 {
    let chunk = |socket: &UdpSocket| {
        let start = Instant::now();
        // where it is dropped, an error says so
        (0..64).for_each(|_| drop(socket.send(b"payload")));
        start.elapsed()
    };
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..400 {
        times[0].push(chunk(socket));
        times[1].push(chunk(bare));
    }
    let [own, bare] = times.map(|mut times| {
        times.sort();
        times[times.len() / 10].as_secs_f64()
    });
    own / bare
}

/// How soon a new cgroup is to be in force, whatever another user does.
const SOON: Duration = Duration::from_millis(10);

/// The least that any watcher needs, beside the program: one event, one look at the cgroup.
struct Least {
    dir: PathBuf,
    seen: Option<mpsc::Receiver<()>>,
    thread: Option<thread::JoinHandle<()>>,
    samples: usize,
}

impl Least {
    fn start(dir: PathBuf) -> Least {
        let inotify = inotify(&dir);
        let (tell, seen) = mpsc::channel();
        let watched = dir.clone();
        let thread = thread::spawn(move || {
            for number in 0.. {
                let mut event = [0; 4096];
                nix::unistd::read(&inotify, &mut event).expect("read inotify");
                cgroup_id(&watched.join(number.to_string())).expect("look");
                if tell.send(()).is_err() {
                    return;
                }
            }
        });
        Least { dir, seen: Some(seen), thread: Some(thread), samples: 0 }
    }

    fn sample(&mut self) -> Duration {
        let start = Instant::now();
        fs::create_dir(self.dir.join(self.samples.to_string())).expect("mkdir");
        self.samples += 1;
        let seen = self.seen.as_ref().map(|seen| seen.recv());
        seen.expect("not dropped").expect("the watcher lives");
        start.elapsed()
    }
}

impl Drop for Least {
    fn drop(&mut self) {
        // nobody waits for the last event, which ends the thread
        self.seen = None;
        let _ = fs::create_dir(self.dir.join(self.samples.to_string()));
        let _ = self.thread.take().map(|thread| thread.join());
    }
}

fn inotify(dir: &Path) -> OwnedFd {
    let path = CString::new(dir.as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: a NUL-terminated path; the descriptor is new, hence ours.
    unsafe {
        let fd = libc::inotify_init1(libc::IN_CLOEXEC);
        assert!(libc::inotify_add_watch(fd, path.as_ptr(), libc::IN_CREATE) >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

/// How long a new cgroup of another is not in force, by a packet that is refused.
fn latency(apps: &Path, name: &str) -> Duration {
    let path = apps.join(name);
    fs::create_dir(&path).expect("mkdir");
    Client::udp(&path, addr(REMOTE4, 9)).until_denied().spawn().wait().1
}

/// The same, and some time until the next one.
fn spaced_latency(apps: &Path, name: &str) -> Duration {
    let time = latency(apps, name);
    thread::sleep(Duration::from_millis(20));
    time
}

/// Sorts and tells latencies; the median, the ninth tenth and the longest.
fn told(what: &str, took: &mut [Duration]) -> [Duration; 3] {
    took.sort();
    let n = took.len();
    let [median, most, longest] = [n / 2, n * 9 / 10, n - 1].map(|at| took[at]);
    println!(
        "{n} cgroups of another {what}: median {median:?}, 90 % {most:?}, longest {longest:?}"
    );
    [median, most, longest]
}

/// Does something again and again while a thread works, and at least so many times.
fn while_it_works(work: impl FnOnce() + Send, least: usize, mut again: impl FnMut(usize)) {
    thread::scope(|scope| {
        let work = scope.spawn(work);
        for number in 0.. {
            if number >= least && work.is_finished() {
                return;
            }
            again(number);
        }
    });
}

/// Whoever makes cgroups without end keeps nobody waiting, costs little memory and few lines of log; and
/// all is gone with them.
#[test]
fn a_hundred_thousand_cgroups() {
    let ground = ground!("many");
    let count = sized(8_000, 100_000);
    let config = "[rules]\ndrop = /user/.*\ndrop = /apps/.*\n";
    let (user, apps) = (ground.cgroup("/user"), ground.cgroup("/apps"));
    let daemon = Daemon::start(&ground, config, &["-v"]);
    let at_rest = daemon.footprint().1;
    let mut alone: Vec<Duration> =
        (0..50).map(|i| spaced_latency(&apps, &format!("before{i}"))).collect();
    let mut least = Least::start(ground.cgroup("/least"));
    let (mut took, mut control) = (Vec::new(), Vec::new());
    let names: Vec<PathBuf> = (0..count).map(|i| user.join(format!("u{i}"))).collect();

    let start = Instant::now();
    let make = || names.iter().for_each(|path| fs::create_dir(path).expect("mkdir"));
    while_it_works(make, 1, |i| {
        took.push(spaced_latency(&apps, &format!("during{i}")));
        control.push(least.sample());
    });
    println!("{count} cgroups made in {:?}", start.elapsed());
    drop(least);
    let others = alone.len() + took.len();
    let all = || set_ids("cg_drop").map_or(0, |ids| ids.len()) == count + others;
    assert!(wait_until(Duration::from_secs(120), all));
    let time_to_classify = start.elapsed();

    let lines = daemon.logs().lines().count();
    let each = (daemon.footprint().1 - at_rest) * 1024 / count;
    println!("classified in {time_to_classify:?}: {each} bytes each, {lines} lines of log");
    assert!(each < 512, "bytes a cgroup");
    // a burst of 200, then 20 a second, and what is said of the start
    let most = 250 + 20 * time_to_classify.as_secs() as usize;
    assert!(lines < most, "{lines} lines of log");
    told("before", &mut alone);
    let ours = told("meanwhile", &mut took);
    let bare = told("meanwhile, only looked at", &mut control);
    // What the scheduler and the kernel's locks cost any watcher is not the program's, nor what the
    // other tests of the short form cost beside this one.
    let soon = SOON * sized(10, 1) as u32;
    assert!(ours[0] < soon + 4 * bare[0], "{took:?} {control:?}");
    assert!(sized(0, 1) == 0 || ours[1] < SOON + 4 * bare[1]);
    // by itself: what is late beyond a bare watcher's is one in a hundred at most
    let late = |took: &[Duration]| took.iter().filter(|t| **t > SOON).count();
    println!("{} and {} over {SOON:?}", late(&took), late(&control));
    assert!(sized(0, 1) == 0 || late(&took) <= 2 * late(&control) + took.len() / 100);

    // all at once, which for most of them is not told
    let start = Instant::now();
    names.iter().for_each(|path| fs::remove_dir(path).expect("rmdir"));
    let gone = || set_ids("cg_drop").map_or(0, |ids| ids.len()) == others;
    assert!(wait_until(Duration::from_secs(120), gone));
    let watches = || daemon.footprint().0 == 6 + others + control.len();
    assert!(wait_until(SETTLE, watches), "{:?}", daemon.footprint());
    println!("removed in {:?}: {} KiB", start.elapsed(), daemon.footprint().1);
}

/// The deepest cgroup of a chain whose paths keep the rules of [`dear_rules`] busy, made.
fn dear_chain(dir: &Path, number: usize) {
    let mut path = dir.join(number.to_string());
    for level in 0..15 {
        path.push(format!("app-x{level}-{}.scope", "a".repeat(225)));
    }
    fs::create_dir_all(&path).expect("mkdir");
}

/// Ordinary rules, none of which matches.
fn dear_rules(flags: &str, count: usize) -> String {
    let rule = |i| format!("drop = {flags}/user/.*/app-x{i}-[0-9]+\\.scope.*\n");
    (0..count).map(rule).collect()
}

/// A user whose paths are dear to match keeps nobody waiting: while he makes them, at a reload and
/// at a start over them.
#[test]
fn dear_paths() {
    let ground = ground!("dear");
    let config = format!("[rules]\n{}drop = /apps/.*\n", dear_rules("", 20));
    let (user, apps) = (ground.cgroup("/user"), ground.cgroup("/apps"));
    std::os::unix::fs::chown(&user, Some(1000), None).expect("chown");
    let daemon = Daemon::start(&ground, &config, &[]);
    let mut alone: Vec<_> = (0..30).map(|i| latency(&apps, &format!("alone{i}"))).collect();
    told("alone", &mut alone);
    let make = || (0..100).for_each(|i| dear_chain(&user, i));
    let reload = || (0..5).for_each(|_| drop(daemon.reload()));
    let works: [(_, _, _, &(dyn Fn() + Sync)); 2] =
        // once it took 3 s
        [("during 1,600 paths", 100, 1, &make), ("during 5 reloads", 1, 2, &reload)];
    for (what, least, seconds, work) in works {
        let before = daemon.busy();
        let mut took = Vec::new();

        while_it_works(work, least, |i| took.push(latency(&apps, &format!("{what}{i}"))));

        let [median, _, longest] = told(what, &mut took);
        let spent = daemon.busy() - before;
        println!("{spent:?} of processor time {what}");
        assert!(spent < here(Duration::from_secs(seconds)), "{spent:?}");
        // beside other tests, the processor is not ours
        assert!(sized(0, 1) == 0 || median < SOON, "{median:?}");
        assert!(sized(0, 1) == 0 || longest < Duration::from_millis(50), "{longest:?}");
    }
    assert!(daemon.stop().success());

    let start = Instant::now();
    let daemon = Daemon::start(&ground, &config, &[]);
    let spent = daemon.busy();
    println!("ready after {:?}, {spent:?} of processor time", start.elapsed());
    assert!(spent < here(Duration::from_secs(1)), "{spent:?}");
    assert!(daemon.stop().success());
}

/// Who owns the cgroup root cannot choose his way by the name of a cgroup of `exec`.
#[test]
fn a_cgroup_of_exec_by_another() {
    let (ground, mut world) = scene!("exec-squat");
    let before = ground.cgroup("/cgtproxy/direct");
    let give = |path: &Path| std::os::unix::fs::chown(path, Some(1000), None).expect("chown");
    [&ground.root, &ground.at("/cgtproxy"), &before].into_iter().for_each(|path| give(path));
    let config = "[rules]\ndrop = /.*\n";
    let daemon = Daemon::start(&ground, config, &[]);
    let denied = |path: &Path| {
        let client = Client::udp(path, addr(REMOTE4, 80)).uid(0).timeout(Duration::from_millis(50));
        assert_eq!(client.run().who(), "nobody", "{path:?}");
    };
    denied(&before);
    denied(&ground.cgroup("/cgtproxy/direct/1"));
    daemon.reload();
    denied(&before);
    assert_eq!(world.wire.to_remote(), []);

    // and that is what is said of it, by path and by process
    let said = |args: &[&str]| daemon.ask(args).out;
    let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
    let pid = child.id().to_string();
    std::fs::write(before.join("1/cgroup.procs"), &pid).expect("move it");
    let paths = ["/cgtproxy/direct", "/cgtproxy/direct/1", "/cgtproxy/direct/2"];
    let of_paths = paths.map(|path| vec!["explain", path]);
    for args in of_paths.iter().chain([&vec!["explain", "--pid", &pid]]) {
        let text = said(args);
        assert!(text.contains("    target  drop\n") && !text.contains("built in"), "{text}");
        assert!(text.contains("owner   /cgtproxy/direct was made by another user"), "{text}");
    }
    assert!(!said(&["explain", "/cgtproxy/drop"]).contains("owner"));
    child.kill().and_then(|()| child.wait()).expect("end it");
    // this directory, /cgtproxy and its two
    assert!(said(&["check"]).contains("drop = /.*: decides for 3 cgroups"), "{}", said(&["check"]));
    assert!(!said(&["show"]).contains("cgtproxy/direct\""), "{}", said(&["show"]));
    let exec = daemon.ask(&["exec", "direct", "true"]);
    let why = "cgroup /cgtproxy/direct was made by another user than root";
    assert!(exec.code == Some(1) && exec.err.contains(why), "{exec:?}");

    // made by root, it is what it was
    crate::ground::remove_tree(&before);
    let own = ground.cgroup("/cgtproxy/direct");
    await_exactly("cg_direct", &[cgroup_id(&own).expect("an id")].into(), SETTLE);
    assert!(said(&["explain", "/cgtproxy/direct"]).contains("    target  direct\n"));
    // what the daemon sees while it runs
    crate::ground::remove_tree(&ground.at("/cgtproxy"));
    assert!(daemon.stop().success());
}

/// A start that takes long is given up at once, and leaves nothing.
#[test]
fn stopped_during_a_long_start() {
    let ground = ground!("long-start");
    let user = ground.cgroup("/user");
    (0..60).for_each(|i| dear_chain(&user, i));
    // such flags are left to the regex
    let config = format!("[rules]\n{}", dear_rules("(?i)", 40));
    for signal in [nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGINT] {
        let mut daemon = Daemon::spawn(&ground, &config, &[], &[]);
        // it takes signals by then, and is at its work
        let begun = || daemon.blocks(signal) && daemon.busy() > Duration::from_millis(100);
        assert!(wait_until(SETTLE, begun), "{}", daemon.logs());
        let start = Instant::now();
        daemon.signal(signal);
        let status = daemon.wait();
        println!("ended after {:?}", start.elapsed());
        assert!(!daemon.logs().contains("started:"), "{}", daemon.logs());
        assert_eq!(status.code(), Some(0), "{}", daemon.logs());
        assert_eq!(residue(), "");
    }
}

/// tests/config.rs holds the whole list against the reader; here it is `run` that refuses.
#[test]
fn hostile_configurations_are_refused() {
    let ground = ground!("refuse");
    let dir = &ground.dir;
    let good = "[rules]\ndrop = /x\n";
    let at = |name: &str| dir.join(name);
    write_private(&at("world"), good);
    chmod(&at("world"), 0o666);
    write_private(&at("nul"), "[rules]\ndrop = /x\0y\n");
    fs::create_dir(at("directory")).expect("mkdir");
    let fifo = at("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status();
    assert!(made.expect("start mkfifo").success());
    write_private(&at("sparse"), "");
    let sparse = fs::File::options().write(true).open(at("sparse"));
    sparse.expect("open").set_len(1 << 30).expect("grow");
    std::os::unix::fs::symlink(at("world"), at("link")).expect("symlink");
    for (name, reason) in [
        ("world", "writable"),
        ("nul", "nul"),
        ("directory", "directory"),
        ("fifo", "fifo"),
        ("sparse", "1 mib"),
        ("link", "writable"),
        ("absent", "no such file"),
    ] {
        let start = Instant::now();
        let file = at(name);
        let said = run_at(&file, &["run"]);
        assert_eq!(said.code, Some(2), "{name}: {said:?}");
        assert!(said.err.to_lowercase().contains(reason), "{name}: {said:?}");
        assert!(start.elapsed() < PATIENCE, "{name}");
    }
    assert_eq!(residue(), "");
}

/// A thread of an unprivileged user that has bound an abstract name, and listens or not, with its
/// backlog full. (The raw call changes the user of this thread alone.)
struct Squatter {
    go: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Squatter {
    fn start(name: &str, listens: bool) -> Squatter {
        let address = UnixAddr::new_abstract(name.as_bytes()).expect("a short name");
        let (go, stop) = mpsc::channel::<()>();
        let (tell, bound) = mpsc::channel();
        let thread = thread::spawn(move || {
            // SAFETY: integers only.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
            let new = || {
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                socket(AddressFamily::Unix, SockType::Stream, flags, None).expect("a socket")
            };
            let listener = new();
            bind(listener.as_raw_fd(), &address).expect("bind");
            let mut queued = Vec::new();
            if listens {
                listen(&listener, Backlog::new(0).expect("0 is a backlog")).expect("listen");
                queued.push(new());
                while connect(queued[queued.len() - 1].as_raw_fd(), &address).is_ok() {
                    queued.push(new());
                }
            }
            tell.send(()).expect("the test waits");
            let _ = stop.recv();
        });
        bound.recv().expect("bound");
        Squatter { go: Some(go), thread: Some(thread) }
    }
}

impl Drop for Squatter {
    fn drop(&mut self) {
        self.go = None;
        let _ = self.thread.take().map(|thread| thread.join());
    }
}

/// A user without privileges can neither fake the lock nor make anybody wait for it by what it was
/// once, the abstract socket of our name.
#[test]
fn nobody_else_has_the_lock() {
    let ground = ground!("lock");
    let config = "[rules]\ndrop = /x\n";
    let said = |args: &[&str]| {
        let start = Instant::now();
        let said = run_with(&ground, config, args).all();
        assert!(start.elapsed() < PATIENCE, "{args:?} took {:?}", start.elapsed());
        said
    };
    for listens in [false, true] {
        let squatter = Squatter::start("cgtproxy", listens);
        let status = said(&["status"]);
        assert!(status.contains("no cgtproxy is running"), "{status}");
        assert!(said(&["exec", "drop", "true"]).contains("no cgtproxy is running"));
        assert_eq!(said(&["flush"]), "nothing to remove\n");
        let daemon = Daemon::start(&ground, config, &[]);
        let pid = format!("pid {}", daemon.pid());
        let status = said(&["status"]);
        assert!(status.contains(&pid), "{status}");
        let flush = said(&["flush"]);
        assert!(flush.contains(&pid) && flush.contains("stop it first"), "{flush}");
        assert!(daemon.stop().success());
        drop(squatter);
    }
    assert_eq!(residue(), "");
}

/// The table that is the lock: not to be had without privileges, nor with those over a user namespace of
/// one's own; and once it is held, not by root either.
#[test]
fn nobody_else_has_the_table_that_is_the_lock() {
    let ground = ground!("locktable");
    let config = "[rules]\ndrop = /x\n";
    let status = || run_with(&ground, config, &["status"]).all();
    let as_nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups ";
    let take = "'add table inet cgtproxy-lock { comment \"held by pid 1\"; }'";
    let fails = |command: &str| {
        let out = Command::new("sh").args(["-c", command]).output().expect("start sh");
        let error = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && error.contains("not permitted"), "{command}: {error}");
    };
    for way in ["", "unshare --user --map-root-user "] {
        fails(&format!("{as_nobody}{way}nft {take}"));
    }
    assert!(status().contains("no cgtproxy is running"));

    let daemon = Daemon::start(&ground, config, &[]);
    fails("nft delete table inet cgtproxy-lock");
    load("flush ruleset");
    let pid = daemon.pid();
    assert!(status().contains(&format!("pid {pid}")), "{}", status());
    let list = output("nft", &["list", "table", "inet", "cgtproxy-lock"]);
    assert!(list.contains(&format!("comment \"held by pid {pid}\"")), "{list}");
    daemon.kill9();
    assert!(status().contains("no cgtproxy is running"));

    // who owns it without a word holds it, by no pid that is known
    let mut nft = Command::new("nft");
    let mut nft = nft.arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("start");
    let words = b"add table inet cgtproxy-lock { flags owner; }\n";
    nft.stdin.as_mut().expect("stdin is piped").write_all(words).expect("feed nft");
    assert!(wait_until(SETTLE, || status().contains("; cgtproxy runs\n")), "{}", status());
    drop(nft.stdin.take());
    nft.wait().expect("wait for nft");

    // what root makes without owning it is no lock
    load("add table inet cgtproxy-lock { comment \"held by pid 1\"; }");
    assert!(status().contains("no cgtproxy is running"));
    assert!(Daemon::start(&ground, config, &[]).stop().success());
    assert_eq!(residue(), "");
}

/// Of several that start at the same moment, one runs.
#[test]
fn one_of_many() {
    let ground = ground!("one");
    for round in 0..sized(4, 40) {
        let start = |_| Daemon::spawn(&ground, "[rules]\ndrop = /x\n", &[], &[]);
        let mut all: Vec<Daemon> = (0..6).map(start).collect();
        let up: Vec<bool> = all.iter_mut().map(Daemon::ready).collect();
        assert_eq!(up.iter().filter(|up| **up).count(), 1, "round {round}");
        let at = up.iter().position(|up| *up).expect("counted");
        let one = all.remove(at);
        for mut other in all {
            assert_eq!(other.wait().code(), Some(1));
            let log = other.logs();
            assert!(log.contains(&format!("already running with pid {}", one.pid())), "{log}");
        }
        assert!(one.stop().success());
        assert_eq!(residue(), "");
    }
}

/// Who owns a directory above the configuration swaps what is below it, while it is read.
#[test]
fn the_configuration_is_swapped_while_it_is_read() {
    let ground = ground!("swap");
    let home = ground.dir.join("home");
    for dir in ["root", "root/etc", "user", "user/etc"] {
        fs::create_dir_all(home.join(dir)).expect("mkdir");
    }
    let good = format!("[global]\ncgroup-root = {}\n[rules]\ndrop = /x\n", ground.root.display());
    write_private(&home.join("root/etc/conf"), &good);
    write_private(&home.join("user/etc/conf"), "[global]\ndefault = direct\n");
    chmod(&home.join("user/etc/conf"), 0o644);
    let daemon = Daemon::start(&ground, "[rules]\ndrop = /x\n", &[]);
    fs::remove_file(&daemon.config).expect("remove");
    std::os::unix::fs::symlink(home.join("root/etc/conf"), &daemon.config).expect("symlink");
    assert!(daemon.reload().contains("rules: 1"));
    let chown = |path: &str| {
        std::os::unix::fs::chown(home.join(path), Some(65534), Some(65534)).expect("chown")
    };
    ["", "user", "user/etc", "user/etc/conf"].into_iter().for_each(chown);
    // the sub-tree of root is not the user's, but the directory that it is in
    chmod(&ground.dir, 0o755);
    let on = AtomicUsize::new(1);
    thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: integers only; the raw call concerns this thread alone.
            unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            let name = |name: &str| CString::new(home.join(name).as_os_str().as_bytes());
            let (a, b) = (name("root").expect("no NUL"), name("user").expect("no NUL"));
            while on.load(Ordering::Relaxed) == 1 {
                // SAFETY: NUL-terminated paths. musl has no function for it before 1.2.6.
                let rc = unsafe {
                    let cwd = libc::AT_FDCWD;
                    let exchange = libc::RENAME_EXCHANGE;
                    libc::syscall(libc::SYS_renameat2, cwd, a.as_ptr(), cwd, b.as_ptr(), exchange)
                };
                assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
            }
        });
        for _ in 0..300 {
            daemon.refuse();
        }
        on.store(0, Ordering::Relaxed);
    });
    assert!(daemon.logs().contains("is in a directory that others may write"));
    assert!(daemon.stop().success());
}

/// A socket of an ordinary user that is bound to a port, in the network namespace of this thread.
fn user_socket(at: SocketAddr, kind: SockType, options: &[libc::c_int]) -> nix::Result<UdpSocket> {
    let options = options.to_vec();
    let bound = thread::spawn(move || {
        // SAFETY: integers only; the raw call concerns this thread alone.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        let family = if at.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(family, kind, flags, None).expect("a socket");
        for option in options {
            match option {
                libc::IPV6_V6ONLY => set(&fd, libc::SOL_IPV6, option, 1),
                _ => set(&fd, libc::SOL_SOCKET, option, 1),
            }
        }
        let (raw, len) = raw_addr(at);
        // SAFETY: a sockaddr of the length that goes with it.
        let rc = unsafe { libc::bind(fd.as_raw_fd(), (&raw const raw).cast(), len) };
        Errno::result(rc).map(|_| UdpSocket::from(fd))
    });
    bound.join().expect("no panic")
}

/// Addresses that a user may bind beside a socket for all of them, with the options that it takes, and
/// which families are his then.
const BESIDE: [(&str, &[libc::c_int], [bool; 2]); 8] = [
    ("127.0.0.1", &[libc::SO_REUSEADDR], [true, false]),
    ("127.0.0.1", &[libc::SO_REUSEADDR, libc::SO_REUSEPORT], [true, false]),
    ("0.0.0.0", &[libc::SO_REUSEADDR], [true, false]),
    ("0.0.0.0", &[libc::SO_REUSEADDR, libc::SO_REUSEPORT], [true, false]),
    ("::1", &[libc::SO_REUSEADDR], [false, true]),
    ("::", &[libc::SO_REUSEADDR, libc::IPV6_V6ONLY], [false, true]),
    ("::", &[libc::SO_REUSEADDR], [false, true]),
    ("::ffff:127.0.0.1", &[libc::SO_REUSEADDR], [true, false]),
];

/// A user's socket beside the proxy's on a UDP port: the proxy is silenced in that family, nothing goes
/// out, `check` and `status` say so. Of TCP there is none beside it, nor on ports where no user can bind
/// one, nor beside a UDP socket that does not let others.
#[test]
fn a_socket_beside_the_proxy() {
    let (ground, mut world) = scene!("beside");
    let proxy = Server::start(PROXY, &[7893, 893]);
    let config = "[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = /x\n";
    let cgroup = ground.cgroup("/x");
    let daemon = Daemon::start(&ground, config, &[]);
    let asked = REMOTES.map(|remote| addr(remote, 80));
    let mut reach = |silent: [bool; 2], when: &str| {
        for (to, silent) in asked.into_iter().zip(silent) {
            let want = if silent { "nobody".into() } else { format!("{PROXY} {to}") };
            let client = Client::udp(&cgroup, to);
            let client = if silent { client.timeout(SILENCE) } else { client };
            // a process that another test has forked may hold a copy of what was closed, for an instant
            let mut who = String::new();
            let is = wait_until(PATIENCE, || {
                who = client.run().who();
                who == want || silent
            });
            assert!(is && who == want, "{when}: {to}: {who}");
            let tcp = Client::tcp(&cgroup, to).run().who();
            assert_eq!(tcp, format!("{PROXY} {to}"), "{when}");
        }
        assert_eq!(world.wire.to_remote(), [], "{when}");
    };
    let several = "[tproxy mihomo]: port 7893 has sockets of several users (uids 0, 65534)";
    let said = || ["check", "status"].map(|command| daemon.ask(&[command]).all());
    assert!(!said().concat().contains("several users"), "{:?}", said());

    for (at, options, silent) in BESIDE {
        let at = addr(ip(at), 7893);
        let other = user_socket(at, SockType::Datagram, options).expect("bind beside the proxy");
        reach(silent, &format!("{at} {options:?}"));
        assert!(said().iter().all(|said| said.contains(several)), "{at}: {:?}", said());
        drop(other);
        reach([false; 2], &format!("without {at}"));

        let stream = user_socket(at, SockType::Stream, options).err();
        assert_eq!(stream, Some(Errno::EADDRINUSE), "{at} {options:?}");
        let low = user_socket(addr(at.ip(), 893), SockType::Datagram, options).err();
        assert_eq!(low, Some(Errno::EACCES), "{at} {options:?}");
    }
    // connected with one application, it is that one's alone
    for (to, (own, lo)) in asked.into_iter().zip(HOSTS.into_iter().zip(["127.0.0.1", "::1"])) {
        let app = UdpSocket::from(socket_in(&cgroup, libc::SOCK_DGRAM, own));
        bind_at(&app, addr(own, 0));
        let answered = |patience| {
            app.set_read_timeout(Some(patience)).expect("a timeout");
            app.send_to(b"who?", to).expect("send");
            again(|| app.recv(&mut [0; 64])).is_ok()
        };
        assert!(answered(PATIENCE), "{to}");
        let at = addr(ip(lo), 7893);
        let other = user_socket(at, SockType::Datagram, &[libc::SO_REUSEADDR]).expect("bind");
        other.connect(app.local_addr().expect("its address")).expect("connect");
        assert!(!answered(SILENCE), "{to}");
        assert!(said().iter().all(|said| said.contains(several)), "{at}: {:?}", said());
        drop(other);
        assert!(wait_until(PATIENCE, || answered(SILENCE)), "{to}");
    }
    daemon.reconfigure(&config.replace("7893", "893"));
    reach([false; 2], "below 1024");
    drop(proxy);

    for options in [&[][..], &[libc::SO_REUSEPORT]] {
        let alone = |host| {
            let fd = socket_in(&ground.root, libc::SOCK_DGRAM, ip(host));
            options.iter().for_each(|option| set(&fd, libc::SOL_SOCKET, *option, 1));
            bind_at(&fd, addr(ip(host), 7893));
            fd
        };
        let _proxy = alone("::");
        for (at, of_user, _) in BESIDE {
            let refused = user_socket(addr(ip(at), 7893), SockType::Datagram, of_user).err();
            assert_eq!(refused, Some(Errno::EADDRINUSE), "{at} {of_user:?} beside {options:?}");
        }
    }
    assert!(daemon.stop().success());
}

/// A user's socket beside the resolver's has the queries: of a tproxy and of a route, and of a gateway's
/// clients at this host's address there. `check` and `status` say so, not of sockets that get none.
#[test]
fn a_socket_beside_the_resolver() {
    let (ground, _world) = scene!("besidedns");
    let lan = Lan::new(&ground);
    tunnel_up(&ground);
    let cgroup = ground.cgroup("/x");
    let here = ["127.0.0.1", "::1"].map(|host| addr(ip(host), 1053));
    let _resolver =
        Server::at("dns", &[here[0], here[1], addr(ip(LAN4), 1053), addr(ip(LAN6), 1053)]);
    for (head, kind) in
        [("[tproxy x]\nport = 7893", "tproxy"), ("[route x]\ninterface = vpn0", "route")]
    {
        let config = format!(
            "{head}\ndns-hijack = {}\ndns-hijack = {}\ndns-hijack-tcp = yes\n[rules]\nx = /x\n",
            here[0], here[1]
        );
        let gateway = format!("{config}[gateway lan]\ninterface = br-lan\ntarget = x\n");
        let daemon = Daemon::start(&ground, &config, &[]);
        let said = || ["check", "status"].map(|command| daemon.ask(&[command]).all());
        let ask = |routed: bool, to: SocketAddr, patience| match routed {
            true => lan.ask_within(0, Proto::Udp, to, patience),
            false => Client::udp(&cgroup, to).timeout(patience).run().who(),
        };
        for (routed, at) in [
            (false, "127.0.0.1"),
            (false, "::1"),
            (true, LAN4),
            (true, LAN6),
            (false, "192.0.2.1"),
            (false, "2001:db8:1::1"),
        ] {
            daemon.reconfigure(if routed { &gateway } else { &config });
            let at = addr(ip(at), 1053);
            let is_his = routed || at.ip().is_loopback();
            let to = addr(REMOTES[usize::from(at.is_ipv6())], 53);
            let other = user_socket(at, SockType::Datagram, &[libc::SO_REUSEADDR]).expect("bind");
            let who = ask(routed, to, if is_his { SILENCE } else { PATIENCE });
            let has = other.recv(&mut [0; 64]).is_ok();
            assert_eq!((has, who == "nobody"), (is_his, is_his), "{kind} {at}: {who}");
            let end = here[usize::from(at.is_ipv6())];
            let several = format!(
                "[{kind} x]: {end}, where its DNS goes, has sockets of several users (uids 0, 65534)"
            );
            for said in said() {
                assert_eq!(said.contains(&several), is_his, "{at}: {said}");
                assert_eq!(said.contains("several users"), is_his, "{at}: {said}");
            }
            drop(other);
            assert!(wait_until(PATIENCE, || ask(routed, to, SILENCE).starts_with("dns")));
            if is_his {
                let stream = user_socket(at, SockType::Stream, &[libc::SO_REUSEADDR]).err();
                assert_eq!(stream, Some(Errno::EADDRINUSE), "{at}");
            }
        }
        assert!(daemon.stop().success());
    }
}
