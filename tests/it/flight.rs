//! What a reload does to packets in flight: each goes by the policy of before or by that of after, so that
//! what these have in common holds all the time.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::client::{udp_in, Proto};
use crate::daemon::Daemon;
use crate::gateway::Lan;
use crate::ground::{addr, any_of, ip, Ground, Netns};
use crate::world::Wire;

/// Datagrams as fast as can be, each of a flow of its own.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<[u64; 2]>>,
}

impl Flood {
    fn start(socket: UdpSocket, to: IpAddr) -> Flood {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let flood = move || {
            // SAFETY: integers only. The daemon and whoever else is at work go first.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
            let mut counts = [0; 2];
            let ports = (2000..10_000).cycle();
            for port in ports.take_while(|_| !stopping.load(Ordering::Relaxed)) {
                let sent = socket.send_to(b"?", SocketAddr::new(to, port));
                let denied = sent.is_err_and(|e| e.kind() == ErrorKind::PermissionDenied);
                counts[usize::from(denied)] += 1;
            }
            counts
        };
        Flood { stop, thread: Some(thread::spawn(flood)) }
    }

    /// Of a process.
    fn of(cgroup: &Path, to: IpAddr) -> Flood {
        Flood::start(udp_in(cgroup, to), to)
    }

    /// How many were sent, and how many denied.
    fn end(mut self) -> [u64; 2] {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs").join().expect("a flood")
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

/// Reloads for that long, with and without a change, and lets another daemon take over now and then.
fn reload(ground: &Ground, mut daemon: Daemon, time: Duration) -> Daemon {
    let until = Instant::now() + time;
    for turn in (0..5).cycle().take_while(|_| Instant::now() < until) {
        match turn {
            4 => {
                daemon.kill9();
                daemon = Daemon::start(ground, POLICY, &[]);
            }
            3 => drop(daemon.reconfigure(&format!("{POLICY}[tproxy more]\nport = 7895\n"))),
            _ => drop(daemon.reconfigure(POLICY)),
        }
    }
    daemon
}

/// Each set is there once, by its own name, and the table loads again.
fn is_tidy() {
    let listed = crate::kernel::table_plain(&[]);
    let sets = listed.lines().filter_map(|line| line.trim().strip_prefix("set bypass"));
    assert_eq!(sets.collect::<Vec<_>>(), ["4 {", "6 {"], "{listed}");
    Netns::new().run(|| crate::kernel::load(&listed));
}

/// What is left alone is so without a gap.
#[test]
fn bypassed_packets_over_reloads() {
    let ground = ground!("flight-bypass");
    let dropped = ground.cgroup("/drop");
    let daemon = Daemon::start(&ground, POLICY, &[]);
    let floods = ["203.0.113.200", "2001:db8:2::80:1"].map(|to| Flood::of(&dropped, ip(to)));
    let daemon = reload(&ground, daemon, Duration::from_secs(5));
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
    let daemon = reload(&ground, daemon, Duration::from_secs(10));
    drop(floods);
    let mut left = wire.packets();
    // the one port that is not listed
    left.retain(|packet| packet.dst.port() != 5001 && packet.proto == Proto::Udp);
    assert_eq!(left, [], "{} have left", left.len());
    daemon.stop_clean();
}

/// What the kernel refuses leaves nothing behind, and the next reload is none the worse for it.
#[test]
fn nothing_is_left_of_a_refused_reload() {
    let ground = ground!("flight-refused");
    let daemon = Daemon::start(&ground, POLICY, &[]);
    // more than a rule may have
    let users: String = (1..200).map(|uid| format!("bypass-user = {uid}\n")).collect();
    daemon.configure(&POLICY.replace("[global]\n", &format!("[global]\n{users}")));
    let said = daemon.refuse();
    assert!(said.contains("unable to change "), "{said}");
    is_tidy();
    daemon.reconfigure(POLICY);
    is_tidy();
    daemon.stop_clean();
}
