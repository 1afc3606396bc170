//! What a reload does to packets in flight: each goes by the policy of before or by that of after, so that
//! what these have in common holds all the time.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{udp_in, Proto, PATIENCE};
use crate::daemon::{Daemon, UNOWNED};
use crate::gateway::Lan;
use crate::ground::{addr, any_of, ip, Ground, Netns};
use crate::kernel::{load, residue, table_plain};
use crate::wait_until;
use crate::world::Wire;

/// Datagrams as fast as can be, each of a flow of its own.
struct Flood {
    stop: Arc<AtomicBool>,
    /// How many were sent, and how many denied.
    counts: Arc<[AtomicU64; 2]>,
    thread: Option<JoinHandle<()>>,
}

impl Flood {
    fn start(socket: UdpSocket, to: IpAddr) -> Flood {
        let stop = Arc::new(AtomicBool::new(false));
        let counts = Arc::new([0, 0].map(AtomicU64::new));
        let (stopping, count) = (stop.clone(), counts.clone());
        let flood = move || {
            // SAFETY: integers only. The daemon and whoever else is at work go first.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
            let ports = (2000..10_000).cycle();
            for port in ports.take_while(|_| !stopping.load(Ordering::Relaxed)) {
                let sent = socket.send_to(b"?", SocketAddr::new(to, port));
                let denied = sent.is_err_and(|e| e.kind() == ErrorKind::PermissionDenied);
                count[usize::from(denied)].fetch_add(1, Ordering::Relaxed);
            }
        };
        Flood { stop, counts, thread: Some(thread::spawn(flood)) }
    }

    /// Of a process.
    fn of(cgroup: &Path, to: IpAddr) -> Flood {
        Flood::start(udp_in(cgroup, to), to)
    }

    fn counts(&self) -> [u64; 2] {
        [0, 1].map(|at| self.counts[at].load(Ordering::Relaxed))
    }

    /// Whether that many have had their way: others may keep the machine busy.
    fn is_enough(&self) -> bool {
        self.counts().iter().sum::<u64>() > 1000
    }

    /// How many were sent, and how many denied, in all.
    fn end(mut self) -> [u64; 2] {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs").join().expect("a flood");
        self.counts()
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Nothing listens there: what is taken goes nowhere.
const POLICY: &str = "\
[global]
bypass = 203.0.113.128/25
bypass = 2001:db8:2::80:0/112
[tproxy only]
port = 7893
only = 203.0.113.0/25
only = 2001:db8:2::/112
[tproxy ports]
port = 7894
udp-ports = 1000-5000 5002-20000
[rules]
drop = /drop
only = /only
ports = /ports
[gateway lan]
interface = br-lan
source = 198.51.100.0/24
source = 2001:db8:3::/64
target = drop
";

/// The same, but for what none of these packets meets: the first set of addresses, and the last one.
fn other(first: bool, last: bool) -> String {
    let mut policy = POLICY.to_owned();
    if first {
        policy = policy.replacen("[global]\n", "[global]\nbypass = 192.0.2.0/24\n", 1);
    }
    if last {
        policy = policy.replace("5002-20000", "5002-20000 30000-30001");
    }
    policy
}

/// Reloads for that long at least, with and without a change, and lets another daemon take over now and
/// then, while these send.
fn reload(ground: &Ground, mut daemon: Daemon, time: Duration, floods: &[Flood]) -> Daemon {
    let start = Instant::now();
    let goes_on = || start.elapsed() < time || !floods.iter().all(Flood::is_enough);
    let patience = || start.elapsed() < PATIENCE;
    for turn in (0..7).cycle().take_while(|_| patience() && goes_on()) {
        let policy = match turn {
            6 => {
                daemon.kill9();
                daemon = Daemon::start(ground, POLICY, &[]);
                continue;
            }
            5 => format!("{POLICY}[tproxy more]\nport = 7895\n"),
            _ => other(turn & 1 == 1, turn & 2 == 2),
        };
        daemon.reconfigure(&policy);
    }
    daemon
}

/// Each set is there once, by its own name, and the table loads again.
fn is_tidy() {
    let listed = table_plain(&[]);
    let sets = listed.lines().filter_map(|line| line.trim().strip_prefix("set bypass"));
    assert_eq!(sets.collect::<Vec<_>>(), ["4 {", "6 {"], "{listed}");
    Netns::new().run(|| load(&listed));
}

/// What is left alone is so without a gap.
#[test]
fn bypassed_packets_over_reloads() {
    let ground = ground!("flight-bypass");
    let dropped = ground.cgroup("/drop");
    let daemon = Daemon::start(&ground, POLICY, &[]);
    let floods = ["203.0.113.200", "2001:db8:2::80:1"].map(|to| Flood::of(&dropped, ip(to)));
    let daemon = reload(&ground, daemon, Duration::from_secs(5), &floods);
    for flood in floods {
        let [sent, denied] = flood.end();
        println!("{sent} sent, {denied} denied");
        assert!(sent > 1000 && denied == 0, "{denied} of {sent}");
    }
    is_tidy();
    daemon.stop_clean();
}

/// What is dropped or taken, by its destination, port or source, does not leave.
#[test]
fn taken_packets_over_reloads() {
    let ground = ground!("flight-taken");
    let lan = Lan::new(&ground);
    let [dropped, only, ports] = ["/drop", "/only", "/ports"].map(|path| ground.cgroup(path));
    let daemon = Daemon::start(&ground, POLICY, &[]);
    let mut wire = Wire::open(&ground);
    let client = |to| {
        let socket = lan.client(0).run(|| UdpSocket::bind(addr(any_of(to), 0)).expect("bind"));
        Flood::start(socket, to)
    };
    let floods = [
        client(ip("203.0.113.1")),
        client(ip("2001:db8:2::1")),
        Flood::of(&only, ip("203.0.113.2")),
        Flood::of(&only, ip("2001:db8:2::2")),
        Flood::of(&ports, ip("203.0.113.3")),
        Flood::of(&dropped, ip("203.0.113.4")),
    ];
    let daemon = reload(&ground, daemon, Duration::from_secs(10), &floods);
    drop(floods);
    let mut left = wire.packets();
    // the one port that is not listed
    left.retain(|packet| packet.dst.port() != 5001 && packet.proto == Proto::Udp);
    assert_eq!(left, [], "{} have left", left.len());
    daemon.stop_clean();
}

/// The sets of intervals, in the order of the listing, each with its handle.
fn handles() -> Vec<String> {
    let listed = table_plain(&["-a"]);
    let blocks = listed.split("\tset ").skip(1);
    let intervals = blocks.filter(|block| block.contains("flags interval"));
    intervals.filter_map(|block| Some(block.split_once('\n')?.0.to_owned())).collect()
}

/// What a reload finds as it is to be is neither sent nor gone for a moment, as far as the order of the
/// listing allows that, which is that of a start.
#[test]
fn sets_that_are_wanted_stay() {
    let ground = ground!("flight-stay");
    let without = POLICY.replace("bypass = 203.0.113.128/25\n", "");
    let swapped = POLICY.replace("1000-5000", "2000-5000").replace("198.51.100.0", "198.51.101.0");
    for (before, after, stay) in [
        (POLICY.to_owned(), POLICY.to_owned(), 7),
        (POLICY.to_owned(), other(false, true), 6),
        (POLICY.to_owned(), other(true, false), 0),
        (POLICY.to_owned(), other(true, true), 0),
        (POLICY.to_owned(), swapped, 2),
        (POLICY.to_owned(), format!("{POLICY}[tproxy more]\nport = 1\nonly = 192.0.2.1\n"), 7),
        (format!("{POLICY}[tproxy more]\nport = 1\nonly = 192.0.2.1\n"), POLICY.to_owned(), 7),
        (POLICY.to_owned(), without.clone(), 0),
        (without, POLICY.to_owned(), 0),
    ] {
        let daemon = Daemon::start(&ground, &before, &[]);
        let old = handles();
        assert!(old.len() >= 6, "{old:?}");
        for policy in [&after, &before, &after] {
            daemon.reconfigure(policy);
        }
        let (there, listed) = (handles(), table_plain(&[]));
        let same = old.iter().zip(&there).take_while(|(old, new)| old == new).count();
        assert_eq!(same, stay, "{old:?}\n{there:?}\n{after}");
        daemon.stop_clean();
        let daemon = Daemon::start(&ground, &after, &[]);
        assert_eq!(listed, table_plain(&[]), "{after}");
        daemon.stop_clean();
    }
}

/// What others have done to a set just before a reload that leaves it where it is does not stay.
#[test]
fn a_set_that_others_change_comes_back() {
    let ground = ground!("flight-others");
    let daemon = Daemon::start_in(&ground, POLICY, &[], &[UNOWNED]);
    daemon.reload();
    let whole = table_plain(&[]);
    for harm in [
        "flush set inet cgtproxy bypass4",
        "add element inet cgtproxy only4_only { 192.0.2.1 }",
        "delete element inet cgtproxy udp_ports { 1000-5000 }",
    ] {
        daemon.while_stopped(|| {
            load(harm);
            daemon.signal(Signal::SIGHUP);
        });
        let back = wait_until(PATIENCE, || table_plain(&[]) == whole);
        assert!(back, "{harm}: {}\n{}", table_plain(&[]), daemon.logs());
    }
    daemon.stop_clean();
}

/// As [`bypassed_packets_over_reloads`], where the kernel has no memory now and then, or its answer is lost.
#[test]
fn bypassed_packets_over_faults() {
    let ground = ground!("flight-faults");
    let dropped = ground.cgroup("/drop");
    for fault in ["sendto:error=ENOMEM:when=60+41", "recvfrom:error=ENOBUFS:when=90+37"] {
        let (call, inject) = (fault.split(':').next().expect("a call"), format!("inject={fault}"));
        let trace = format!("trace={call}");
        let by = ["strace", "-D", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
        let mut daemon = Daemon::spawn_by(&ground, POLICY, &by, &["--no-seccomp"], &[]);
        assert!(daemon.ready(), "{}", daemon.logs());
        let floods = ["203.0.113.200", "2001:db8:2::80:1"].map(|to| Flood::of(&dropped, ip(to)));
        let start = Instant::now();
        let goes_on = || start.elapsed() < PATIENCE && !floods.iter().all(Flood::is_enough);
        let turns = (0..).take_while(|turn| *turn < 12 || goes_on());
        let taken = turns.filter(|turn| {
            daemon.configure(&other(turn & 1 == 1, turn & 2 == 2));
            daemon.hup().is_ok()
        });
        let taken = taken.count();
        for flood in floods {
            let [sent, denied] = flood.end();
            println!("{fault}: {taken} reloads, {sent} sent, {denied} denied");
            assert!(sent > 1000 && taken > 5 && denied == 0, "{denied} of {sent}");
        }
        daemon.kill9();
    }
    Daemon::start(&ground, POLICY, &[]).stop_clean();
}

/// More than a rule may have.
fn refused() -> String {
    let users: String = (1..200).map(|uid| format!("bypass-user = {uid}\n")).collect();
    POLICY.replace("[global]\n", &format!("[global]\n{users}"))
}

/// What the kernel refuses leaves nothing behind, and the next reload is none the worse for it.
#[test]
fn nothing_is_left_of_a_refused_reload() {
    let ground = ground!("flight-refused");
    let daemon = Daemon::start(&ground, POLICY, &[]);
    daemon.configure(&refused());
    let said = daemon.refuse();
    assert!(said.contains("unable to change "), "{said}");
    is_tidy();
    daemon.reconfigure(POLICY);
    is_tidy();
    daemon.stop_clean();
}

/// Nor does a start: what was in force stays as it was.
#[test]
fn nothing_is_left_of_a_refused_start() {
    let ground = ground!("flight-refused-start");
    let refuse = || {
        let mut daemon = Daemon::spawn(&ground, &refused(), &[], &[]);
        assert!(!daemon.ready());
        assert_eq!(daemon.wait().code(), Some(1), "{}", daemon.logs());
    };
    refuse();
    assert_eq!(residue(), "");
    Daemon::start(&ground, POLICY, &[]).kill9();
    let (listed, left) = (table_plain(&[]), residue());
    refuse();
    assert_eq!((table_plain(&[]), residue()), (listed, left));
    Daemon::start(&ground, POLICY, &[]).stop_clean();
}
