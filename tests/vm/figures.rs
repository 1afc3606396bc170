//! What the program costs in instructions. The driver lets the guest's clock count them, one a
//! nanosecond (see `run.py --figures`), so what is timed here is a count: it follows from the
//! architecture and the kernel, and no machine that emulates them makes it another. Each stands
//! beside the same without the program.

use std::arch::asm;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cgtproxy::config::{self, Source};
use cgtproxy::kernel::Kernel;
use cgtproxy::net::Mark;
use cgtproxy::netlink::parse::Messages;
use cgtproxy::netlink::socket::Socket;
use cgtproxy::netlink::uapi::{
    NFNLGRP_NFTABLES, NFNL_SUBSYS_NFTABLES, NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM,
    NF_INET_LOCAL_OUT, NF_INET_PRE_ROUTING, NF_IP_PRI_MANGLE,
};
use cgtproxy::nft::message::Transaction;
use cgtproxy::nft::stmt::Stmt;
use cgtproxy::nft::table::{Base, Chain, Content, Rule, Set, Table};
use cgtproxy::{plan, sys};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::SockProtocol;

use crate::ground::Ground;
use crate::world::bind;
use crate::{at, make, wait_until, Daemon, CONFIG, PATIENCE};

#[allow(dead_code)]
#[path = "../bench/senders.rs"]
mod senders;

use senders::flood;

const PROXY_PORT: u16 = 7893;
/// As tests/bench/ways.rs: three pairs of a level and a target.
const POLICY: &str = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /direct\n\
    mihomo = /proxied\nmihomo = /desktop/b/c/d\ndrop = /drop\n";
const DECIDED: [&str; 3] = ["/proxied", "/desktop/b/c/d", "/drop"];
/// As tests/bench/latency.rs.
const APPS: &str = "[global]\ncontainers = no\n[tproxy mihomo]\nport = 7893\n[rules]\n\
    direct = /services/mihomo\ndrop = /services/telemetry\nmihomo = /apps/.+\n";
const CGROUPS: usize = 50;
const MARK: Mark = Mark { value: 0x0100_0000, mask: 0xff00_0000 };

/// How the bench takes samples (senders.rs): emulated, few; and they hardly differ.
pub fn sized(quick: usize, _: usize) -> usize {
    quick
}

pub fn quick_run() -> bool {
    true
}

/// Prints `VM FIGURE NAME: INSTRUCTIONS` for each.
pub fn measure(ground: &Ground) {
    let loops = 1_000_000;
    let start = Instant::now();
    spin(loops);
    let each = start.elapsed().as_nanos() as f64 / f64::from(loops);
    assert!((1.99..2.05).contains(&each), "two instructions take {each} ns");
    packets(ground);
    births();
}

/// Two instructions, so many times.
fn spin(times: u32) {
    // SAFETY: registers only.
    unsafe {
        #[cfg(any(target_arch = "mips", target_arch = "mips64"))]
        asm!(".set push", ".set noat", ".set noreorder", "2:", "bnez {n}, 2b", "addiu {n}, {n}, -1", ".set pop",
            n = inout(reg) times - 1 => _);
        #[cfg(target_arch = "arm")]
        asm!("2:", "subs {n}, {n}, #1", "bne 2b", n = inout(reg) times => _);
        #[cfg(target_arch = "aarch64")]
        asm!("2:", "subs {n:w}, {n:w}, #1", "b.ne 2b", n = inout(reg) times => _);
        #[cfg(any(target_arch = "riscv32", target_arch = "riscv64"))]
        asm!("2:", "addi {n}, {n}, -1", "bnez {n}, 2b", n = inout(reg) times => _);
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        asm!("2:", "dec {n:e}", "jnz 2b", n = inout(reg) times => _);
    }
}

fn say(name: &str, instructions: f64) {
    println!("\nVM FIGURE {name}: {instructions:.0}");
}

/// A packet of a process at level 5.
fn packets(ground: &Ground) {
    let any = |port| bind(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port), libc::SOCK_DGRAM);
    // receive buffers that are full: what is sent ends there
    let _world: OwnedFd = ground.outside(|| any(9));
    let _proxy = any(PROXY_PORT);
    let kinds = ["undecided", "direct", "proxied", "dropped"];
    let trees = ["/undecided", "/direct", "/proxied", "/drop"];
    let cgroups = trees.map(|tree| {
        make(&format!("{tree}/b/c/d/e"));
        at(&format!("{tree}/b/c/d/e"))
    });
    DECIDED.iter().for_each(|path| make(path));
    say("packet, no table", flood(&cgroups[0]));
    let mut kernel = Kernel::open().expect("open netlink");
    conntrack(&mut kernel);
    say("packet, conntrack only", flood(&cgroups[0]));
    fs::write(CONFIG, POLICY).expect("write the configuration");
    let config = config::load(&Read, Path::new(CONFIG)).expect("a valid configuration");
    bare(&mut kernel);
    kernel.add_routing(plan::needs(&config)).1.expect("add the routing");
    say("packet, all to the proxy and none classified", flood(&cgroups[2]));
    kernel.trim_routing(&Default::default()).expect("remove the routing");
    kernel.remove_table().expect("remove the table");
    drop(kernel);
    let daemon = Daemon::start();
    for (kind, cgroup) in kinds.iter().zip(&cgroups) {
        say(&format!("packet, {kind}"), flood(cgroup));
    }
    daemon.stop();
}

struct Read;

impl Source for Read {
    fn read(&self, path: &Path) -> Result<String, String> {
        fs::read_to_string(path).map_err(|e| e.to_string())
    }
}

/// Puts a table of these base chains and sets into the program's place.
fn load(kernel: &mut Kernel, sets: Vec<Set>, chains: &[(&'static str, &str, u32, &[Rule])]) {
    let chains = chains.iter().map(|(kind, name, hook, rules)| Chain {
        name: name.to_string(),
        base: Some(Base { kind, hook: *hook, priority: NF_IP_PRI_MANGLE }),
        rules: rules.to_vec(),
    });
    let table = Table { sets, chains: chains.collect() };
    let mut transaction = Transaction::new(kernel.batch());
    transaction.replace(&table, None);
    kernel.commit(transaction).expect("load a table");
}

/// `ct state invalid accept`: conntrack and nothing else.
fn conntrack(kernel: &mut Kernel) {
    let rule = vec![Stmt::Invalid, Stmt::accept()];
    load(kernel, Vec::new(), &[("filter", "output", NF_INET_LOCAL_OUT, &[rule])]);
}

/// Every packet goes to the proxy and none is classified: less than that nobody can do for one.
fn bare(kernel: &mut Kernel) {
    let tproxy = Stmt::Tproxy { family: None, address: None, port: PROXY_PORT };
    let marks = vec![Stmt::SetCtMark(MARK), Stmt::SetPacketMark(MARK)];
    let taken = vec![Stmt::IifLo, Stmt::PacketMark(MARK), Stmt::TcpOrUdp, tproxy, Stmt::accept()];
    let to_itself = vec![Stmt::OifLo, Stmt::accept()];
    let chains: &[(_, _, _, &[Rule])] = &[
        ("route", "output", NF_INET_LOCAL_OUT, &[to_itself, marks]),
        ("filter", "prerouting", NF_INET_PRE_ROUTING, &[taken]),
    ];
    load(kernel, Vec::new(), chains);
}

/// A new cgroup, from mkdir until its element is there.
fn births() {
    let dir = at("/apps");
    (0..CGROUPS).for_each(|i| make(&format!("/apps/{i}")));
    say("new cgroup, mkdir alone", median(|number| birth(&dir, number, None)));
    // whoever waits goes before those who work, and sees an element when that is there
    schedule(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1);
    let floor = Command::new("/proc/self/exe").arg(FLOOR).arg(&dir).spawn();
    let mut floor = floor.expect("start the floor");
    let mut kernel = Kernel::open().expect("open netlink");
    let mut there = || kernel.table_owner().is_ok_and(|owner| owner.is_some());
    assert!(wait_until(PATIENCE, &mut there), "the floor has no table");
    let mut news =
        Socket::open(SockProtocol::NetlinkNetFilter, &[NFNLGRP_NFTABLES]).expect("open nfnetlink");
    say("new cgroup, the least", median(|number| birth(&dir, number, Some(&mut news))));
    floor.kill().expect("end the floor");
    floor.wait().expect("wait for the floor");
    drop(news);
    fs::write(CONFIG, APPS).expect("write the configuration");
    let daemon = Daemon::start();
    let mut news =
        Socket::open(SockProtocol::NetlinkNetFilter, &[NFNLGRP_NFTABLES]).expect("open nfnetlink");
    say("new cgroup", median(|number| birth(&dir, number, Some(&mut news))));
    daemon.stop();
}

fn median(mut sample: impl FnMut(usize) -> f64) -> f64 {
    const SAMPLES: usize = 101;
    let mut samples: Vec<f64> = (0..SAMPLES).map(&mut sample).collect();
    samples.sort_by(f64::total_cmp);
    samples[SAMPLES / 2]
}

/// One cgroup made and removed; nanoseconds until its element is there, if somebody adds one.
fn birth(dir: &Path, number: usize, mut news: Option<&mut Socket>) -> f64 {
    let path = dir.join(format!("x{number}"));
    let mut see = |kind| news.iter_mut().for_each(|news| await_kind(news, kind));
    let start = Instant::now();
    fs::create_dir(&path).expect("mkdir");
    see(NFT_MSG_NEWSETELEM);
    let took = start.elapsed().as_nanos() as f64;
    fs::remove_dir(&path).expect("rmdir");
    see(NFT_MSG_DELSETELEM);
    // the next one finds all asleep
    std::thread::sleep(Duration::from_millis(1));
    took
}

/// Waits for a notification of that type.
fn await_kind(news: &mut Socket, kind: u16) {
    loop {
        let mut fds = [PollFd::new(news.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::from(60_000u16)).expect("poll");
        assert!(ready > 0, "no element");
        let datagram = news.notification().expect("read from netlink").unwrap_or_default();
        if Messages::new(datagram).any(|message| message.is_nfnl(NFNL_SUBSYS_NFTABLES, kind)) {
            return;
        }
    }
}

/// The scheduling of this thread, see sched(7).
fn schedule(policy: i32, priority: i32) {
    // SAFETY: plain integers, for which zero is valid.
    let mut param: libc::sched_param = unsafe { std::mem::zeroed() };
    param.sched_priority = priority;
    // SAFETY: reads one live parameter.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const param) };
    assert_eq!(rc, 0, "sched_setscheduler: {}", std::io::Error::last_os_error());
}

/// The argument that makes this program the floor.
pub const FLOOR: &str = "floor";

/// The least that a classifier can do for a new cgroup, as tests/bench/floor.rs: read inotify, ask
/// for the id, send one element.
pub fn floor(dir: &str) {
    const SEEN: &str = "seen";
    let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).expect("inotify");
    inotify.add_watch(dir, flags).expect("watch a cgroup");
    let dir = File::open(dir).expect("open a cgroup");
    let mut kernel = Kernel::open().expect("open netlink");
    let content = Content::Cgroups { counters: false };
    load(&mut kernel, vec![Set { name: SEEN.into(), content }], &[]);
    // each is removed before the next one is made
    let mut id = 0;
    loop {
        for event in inotify.read_events().expect("read events") {
            let name = event.name.expect("the name of a cgroup");
            let mut transaction = Transaction::new(kernel.batch());
            if event.mask.contains(AddWatchFlags::IN_CREATE) {
                id = sys::cgroup_id(dir.as_fd(), name.as_bytes()).expect("the cgroup id");
                transaction.add_cgroups(SEEN, std::iter::once(id));
            } else {
                transaction.delete_cgroups(SEEN, std::iter::once(id));
            }
            kernel.commit(transaction).expect("change an element");
        }
    }
}
