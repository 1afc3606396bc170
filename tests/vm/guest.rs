//! The first process of a test guest (see `run.py`): sets the guest up as a host with a world
//! behind it, runs the packaged program there as a user would, and says `VM PASS` or `VM FAIL` on
//! the console. Fixtures are those of the integration tests, without `ip`, `nft` or a shell. Or it
//! counts what the program costs (`figures`).

// only the figures' own check has any
#![cfg_attr(target_arch = "mips", feature(asm_experimental_arch))]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

mod bridged;
#[allow(dead_code)]
#[path = "../it/client.rs"]
mod client;
mod figures;
mod ground;
mod netlink;
mod offload;
#[allow(dead_code)]
#[path = "../it/world.rs"]
mod world;

use client::{under, Client, Proto};
// for senders.rs
use figures::{quick_run, sized};
use ground::{Ground, REMOTE4};
use world::{Server, World};

const PROGRAM: &str = "/usr/sbin/cgtproxy";
/// As packaged. The driver puts it there.
const SHIPPED: &str = "/etc/cgtproxy/cgtproxy.conf.shipped";
const CONFIG: &str = "/etc/cgtproxy/cgtproxy.conf";
const CGROUPS: &str = "/sys/fs/cgroup";
const PIDFILE: &str = "/run/cgtproxy.pid";
const LOG: &str = "/run/cgtproxy.log";
/// For what takes the program milliseconds on the slowest emulated machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Written behind the shipped configuration, which ends in its `[rules]`.
const RULES: &str = "
mihomo = /drop/child/proxied
drop   = /proxied/child/dropped
direct = /.*/child/free
mihomo = /services/app
drop   = /drop
mihomo = /proxied
";
const CGROUPS_BEFORE: [(&str, &str); 8] = [
    ("/proxied", PROXY),
    ("/proxied/child", PROXY),
    ("/proxied/child/dropped", "drop"),
    ("/proxied/child/free/deeper/still", "direct"),
    ("/drop", "drop"),
    ("/drop/child/proxied", PROXY),
    ("/drop/child/free", "direct"),
    ("/other", "direct"),
];
const PROXY: &str = "proxy mihomo";

/// What a reload brings: everything the other way round.
const OTHER_RULES: &str = "
drop   = /proxied/child
mihomo = /drop
direct = /services/app
";
const CGROUPS_RELOADED: [(&str, &str); 5] = [
    ("/proxied", "direct"),
    ("/proxied/child/dropped", "drop"),
    ("/drop", PROXY),
    ("/drop/child/free", PROXY),
    ("/services/app/1", "direct"),
];

/// A section of each kind, and each kind of key.
const ALL_KINDS: &str = "
[global]
bypass      = 198.18.0.0/15
bypass-mark = 0xff
bypass-dscp = 4
hold        = /held
[tproxy mihomo]
port             = 7893
dns-hijack       = 127.0.0.1:1053
dns-hijack-tcp   = yes
dns-hijack-local = yes
[route vpn]
interface  = wg0
quic       = reject
dns-hijack = 10.8.0.1
[route other]
table     = 1000
udp-ports = 443
[rules]
drop   = user:4321
drop   = /drop
mihomo = /proxied
vpn    = /vpn
other  = /other
[gateway lan]
interface  = br-*
source     = 192.168.1.0/24
source-mac = 02:00:00:00:00:01
target     = mihomo
[gateway dmz]
interface = dmz0
target    = drop
[gateway guests]
interface = guests0
target    = vpn
[gateway free]
interface = free0
target    = direct
";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, what, dir] = &arguments[..] {
        if what == figures::FLOOR {
            return figures::floor(dir);
        }
    }
    std::panic::set_hook(Box::new(|info| {
        println!("{}", fs::read_to_string(LOG).unwrap_or_default());
        println!("\nVM FAIL {}", info.to_string().replace('\n', " "));
        power_off();
    }));
    ground::boot();
    match std::env::var("expect").as_deref() {
        // `expect=refusal` on the kernel's command line: it lacks what cgtproxy needs
        Ok("refusal") => {
            let _ground = Ground::new();
            refusal();
        }
        // its clock counts instructions
        Ok("figures") => {
            figures::measure(&Ground::new());
            println!("\nVM PASS measured");
        }
        _ => {
            let ground = Ground::new();
            let figures = lifecycle(&ground);
            all_kinds(&ground);
            let offload = offload::test(&ground);
            println!("\nVM PASS {figures}, {offload}, {}", bridged::test(&ground));
        }
    }
    power_off();
}

fn power_off() {
    // SAFETY: nothing of this machine is to be kept. (qemu ends instead of booting anew.)
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
}

/// Start, kill -9 and restart, reload, stop; with traffic at each step. Returns figures for people.
fn lifecycle(ground: &Ground) -> String {
    let mut world = World::new(ground);
    let _proxy = Server::start(PROXY, &[7893]);
    for (path, _) in CGROUPS_BEFORE {
        make(path);
    }
    configure(RULES);

    // start
    assert_eq!(netlink::residue(), BTreeSet::new());
    let daemon = Daemon::start();
    expect(&mut world, &CGROUPS_BEFORE);
    make("/services/app/1");
    await_answer("/services/app/1", PROXY);
    let rss = status_kib(daemon.pid(), "VmRSS");

    // kill -9: the rules stay, and the next instance takes them over
    daemon.kill();
    expect(&mut world, &CGROUPS_BEFORE);
    make("/drop/child/made/while/dead");
    let daemon = Daemon::start();
    make("/services/app/2");
    await_answer("/services/app/2", PROXY);
    expect(&mut world, &CGROUPS_BEFORE);
    expect(&mut world, &[("/drop/child/made/while/dead", "drop")]);
    let healed = heal(&mut world);

    // reload; first one that must change nothing
    configure("mihomo = (\n");
    daemon.reload();
    expect(&mut world, &CGROUPS_BEFORE);
    configure(OTHER_RULES);
    daemon.reload();
    expect(&mut world, &CGROUPS_RELOADED);

    // stop
    assert_ne!(netlink::residue(), BTreeSet::new());
    daemon.stop();
    assert_eq!(netlink::residue(), BTreeSet::new(), "left in the kernel");
    assert!(!Path::new(PIDFILE).exists(), "the pidfile is left");
    let direct = CGROUPS_RELOADED.map(|(path, _)| (path, "direct"));
    expect(&mut world, &direct);

    let dir = at("/proxied/child");
    let inode = fs::metadata(&dir).expect("stat a cgroup").ino();
    let root = File::open(CGROUPS).expect("open the cgroup root");
    let id = cgtproxy::sys::cgroup_id(root.as_fd(), b"proxied/child");
    format!(
        "linux {}, {} bit {} endian, cgroup id {:#x} (inode {inode:#x}), resident {rss} KiB, \
         {healed}",
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        usize::BITS,
        if cfg!(target_endian = "big") { "big" } else { "little" },
        id.expect("the cgroup id"),
    )
}

/// Somebody deletes the table once a second, while a dropped and a proxied cgroup send what they
/// can. Returns how soon it was back, and what got out meanwhile: 0 where the kernel has owners of
/// tables (6.9), and little where it has not.
fn heal(world: &mut World) -> String {
    const TIMES: usize = 10;
    let flood = |path| Client::udp(&at(path), (REMOTE4, 7).into()).flood().spawn();
    world.wire.packets();
    let floods = ["/drop", "/proxied"].map(flood);
    let mut took = Vec::new();
    for _ in 0..TIMES {
        let start = Instant::now();
        if !netlink::delete_table() {
            break;
        }
        let back = || netlink::residue().iter().any(|line| line.ends_with("table cgtproxy"));
        while !back() {
            assert!(start.elapsed() < PATIENCE, "the table does not come back");
        }
        took.push(start.elapsed());
        // so that it is put back at once, as it is where nobody fights for it
        std::thread::sleep(Duration::from_secs(1));
    }
    drop(floods);
    let left = world.wire.to_remote().len();
    took.sort();
    match took.get(took.len() / 2) {
        None => {
            assert_eq!(left, 0, "left though nobody could delete the table");
            "the table has an owner".into()
        }
        Some(median) => format!(
            "the table, deleted {TIMES} times, back after {:.1} ms (at most {:.1}), {left} packets \
             leaked",
            median.as_secs_f64() * 1e3,
            took.last().map_or(0.0, |most| most.as_secs_f64() * 1e3)
        ),
    }
}

/// The whole table, as far as a configuration can make it: loaded, taken over, and gone.
fn all_kinds(ground: &Ground) {
    let mut world = World::new(ground);
    let _proxy = Server::start(PROXY, &[7893]);
    let cgroups = [("/drop", "drop"), ("/proxied", PROXY), ("/free", "direct")];
    cgroups.iter().for_each(|(path, _)| make(path));
    fs::write(CONFIG, ALL_KINDS).expect("write the configuration");
    let daemon = Daemon::start();
    expect(&mut world, &cgroups);
    daemon.kill();
    let daemon = Daemon::start();
    expect(&mut world, &cgroups);
    daemon.stop();
    assert_eq!(netlink::residue(), BTreeSet::new(), "left in the kernel");
}

/// A kernel without what the table needs: `run` and `check` say so, and leave nothing behind.
fn refusal() {
    configure(RULES);
    let mut said = String::new();
    for command in ["run", "check"] {
        let out = Command::new(PROGRAM).arg(command).output().expect("start cgtproxy");
        let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        println!("\nVM {command}: {:?}: {text}", out.status.code());
        assert!(text.contains("5.13"), "{command} does not name the version: {text}");
        // what is wrong is the host, not the configuration
        assert_eq!(out.status.code(), Some(1), "{command}: {text}");
        said = text;
    }
    assert_eq!(netlink::residue(), BTreeSet::new(), "left in the kernel");
    println!("\nVM PASS refused: {}", said.trim().replace('\n', "; "));
}

fn at(path: &str) -> PathBuf {
    Path::new(CGROUPS).join(path.trim_start_matches('/'))
}

fn make(path: &str) {
    fs::create_dir_all(at(path)).expect("make a cgroup");
}

/// The shipped configuration with `rules` added.
fn configure(rules: &str) {
    let shipped = fs::read_to_string(SHIPPED).expect("read the shipped configuration");
    fs::write(CONFIG, shipped + rules).expect("write the configuration");
}

/// Who answers TCP, UDP and pings of both families, and that nothing else leaves the host.
#[track_caller]
fn expect(world: &mut World, cgroups: &[(&str, &str)]) {
    world.wire.packets();
    let mut direct = Vec::new();
    for target in ["direct", "drop", PROXY] {
        let these = cgroups.iter().filter(|c| c.1 == target);
        let these: Vec<_> = these.map(|c| (at(c.0), under(c.1))).collect();
        let these: Vec<_> = these.iter().map(|c| (c.0.as_path(), c.1.clone())).collect();
        client::expect(&these);
        let mut left = world.wire.to_remote();
        match target {
            "direct" => {
                direct = left;
                continue;
            }
            "drop" => {}
            // a proxy takes TCP and UDP, pings go out
            _ => left.retain(|p| p.proto != Proto::Icmp),
        }
        // the last that is said in a connection comes late where the processor is slow
        left.retain(|p| p.proto != Proto::Tcp || direct.iter().all(|d| d.src != p.src));
        assert_eq!(left, [], "left a cgroup of {target}");
    }
}

/// Waits until new connections of a cgroup are answered by `who`.
#[track_caller]
fn await_answer(cgroup: &str, who: &str) {
    let (cgroup, who) = (at(cgroup), format!("{who} {REMOTE4}:80"));
    let ask = || Client::tcp(&cgroup, (REMOTE4, 80).into()).run().who();
    assert!(wait_until(PATIENCE, || ask() == who), "{}: {}", cgroup.display(), ask());
}

fn status_kib(pid: Pid, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("read status");
    let line = text.lines().find(|l| l.starts_with(key)).expect("a status line");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

/// `cgtproxy`, started as packages start it, with the socket that it tells its state on.
struct Daemon {
    child: Child,
    state: UnixDatagram,
}

impl Daemon {
    fn start() -> Daemon {
        const NOTIFY: &str = "/run/notify";
        let _ = fs::remove_file(NOTIFY);
        let state = UnixDatagram::bind(NOTIFY).expect("bind the notify socket");
        state.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        let log = File::options().append(true).create(true).open(LOG).expect("open the log");
        let child = Command::new(PROGRAM)
            .args(["-p", PIDFILE])
            .env("NOTIFY_SOCKET", NOTIFY)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start cgtproxy");
        let daemon = Daemon { child, state };
        daemon.expect_state("READY=1");
        let pid = fs::read_to_string(PIDFILE).expect("read the pidfile");
        assert_eq!(pid.trim(), daemon.pid().to_string());
        daemon
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn expect_state(&self, want: &str) {
        let mut text = [0; 256];
        let length = self.state.recv(&mut text);
        let length = length.unwrap_or_else(|e| panic!("waiting for {want}: {e}"));
        let text = String::from_utf8_lossy(&text[..length]);
        assert!(text.starts_with(want), "cgtproxy says {text}, not {want}");
    }

    fn reload(&self) {
        kill(self.pid(), Signal::SIGHUP).expect("send SIGHUP");
        self.expect_state("RELOADING=1");
        self.expect_state("READY=1");
    }

    fn kill(mut self) {
        self.child.kill().expect("send SIGKILL");
        self.child.wait().expect("wait for cgtproxy");
    }

    fn stop(mut self) {
        kill(self.pid(), Signal::SIGTERM).expect("send SIGTERM");
        let status = self.child.wait().expect("wait for cgtproxy");
        assert!(status.success(), "cgtproxy ended with {status}");
    }
}

/// Polls `cond` until it holds. For conditions that nothing announces.
fn wait_until(timeout: Duration, mut cond: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !cond() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}
