//! Ways out of this host: what a [route] takes leaves by its interface and by nothing else.
//!
//! ```text
//!   vpn0  10.8.0.1/24  fd00:8::1/64 ==== vout0  10.8.0.2/24  fd00:8::2/64  (outside)
//! ```
//!
//! The remote hosts are behind both interfaces; who asked tells the server by which.

use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::client::{Client, Outcome, Proto, SILENCE};
use crate::daemon::Daemon;
use crate::ground::{addr, ip_batch, Ground, REMOTE4, REMOTE6};
use crate::kernel::await_member;
use crate::wait_until;
use crate::world::World;

const GATEWAYS: &str = "gateway = 10.8.0.2\ngateway = fd00:8::2\n";

/// A cgroup by the interface.
fn policy() -> String {
    format!("[route vpn]\ninterface = vpn0\n{GATEWAYS}[rules]\nvpn = /vpn\ndrop = /drop\n")
}

/// This host's addresses in the tunnel.
const TUNNEL: [&str; 2] = ["10.8.0.1", "fd00:8::1"];

/// Makes the interface, with its addresses, and waits until packets pass.
fn tunnel_up(ground: &Ground) {
    let outside = ground.outside(|| File::open("/proc/thread-self/ns/net").expect("a namespace"));
    let path = format!("/proc/{}/fd/{}", std::process::id(), outside.as_raw_fd());
    ip_batch(
        &[],
        &format!(
            "link add vpn0 address 02:00:00:00:08:01 type veth peer name vout0 address \
             02:00:00:00:08:02 netns {path}\n\
             addr add 10.8.0.1/24 dev vpn0\n\
             addr add fd00:8::1/64 dev vpn0 nodad\n"
        ),
    );
    ground.outside(|| {
        ip_batch(
            &[],
            "addr add 10.8.0.2/24 dev vout0\n\
             addr add fd00:8::2/64 dev vout0 nodad\n\
             neigh add 10.8.0.1 lladdr 02:00:00:00:08:01 dev vout0\n\
             neigh add fd00:8::1 lladdr 02:00:00:00:08:01 dev vout0\n\
             link set vout0 up\n",
        );
    });
    set("up");
}

/// `ip link set vpn0 up` or down.
fn set(state: &str) {
    let neighbours = "neigh replace 10.8.0.2 lladdr 02:00:00:00:08:02 dev vpn0\n\
                      neigh replace fd00:8::2 lladdr 02:00:00:00:08:02 dev vpn0\n";
    let v6 = "addr replace fd00:8::1/64 dev vpn0 nodad\n";
    let more = if state == "up" { [v6, neighbours].concat() } else { String::new() };
    ip_batch(&[], &format!("link set vpn0 {state}\n{more}"));
}

fn ask(cgroup: &Path, proto: Proto, to: IpAddr, patience: Duration) -> (Outcome, Duration) {
    Client::new(cgroup, proto, addr(to, 80)).timeout(patience).spawn().wait()
}

const CASES: [(Proto, IpAddr); 6] = [
    (Proto::Tcp, REMOTE4),
    (Proto::Tcp, REMOTE6),
    (Proto::Udp, REMOTE4),
    (Proto::Udp, REMOTE6),
    (Proto::Icmp, REMOTE4),
    (Proto::Icmp, REMOTE6),
];

/// Asserts that the remote hosts answer, and that it was by the tunnel's addresses that they were asked.
#[track_caller]
fn passes(world: &mut World, cgroup: &Path) {
    for (proto, to) in CASES {
        let (outcome, _) = ask(cgroup, proto, to, Duration::from_secs(5));
        let Outcome::Answer(text) = &outcome else { panic!("{proto:?} to {to}: {outcome:?}") };
        if proto != Proto::Icmp {
            let client: SocketAddr = text.split(" from ").nth(1).expect(text).parse().expect(text);
            let own = TUNNEL[usize::from(to.is_ipv6())];
            assert_eq!(client.ip().to_string(), own, "{proto:?} to {to}");
        }
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// Asserts that TCP is refused at once, the rest unanswered, and that nothing leaves.
#[track_caller]
fn refused(world: &mut World, cgroup: &Path) {
    for (proto, to) in CASES {
        let patience = if proto == Proto::Tcp { Duration::from_secs(5) } else { SILENCE };
        let (outcome, took) = ask(cgroup, proto, to, patience);
        match proto {
            Proto::Tcp => {
                assert_eq!(outcome, Outcome::Refused, "TCP to {to}");
                assert!(took < Duration::from_millis(500), "refused after {took:?}");
            }
            _ => assert_ne!(outcome.who(), "remote", "{proto:?} to {to}: {outcome:?}"),
        }
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// How long it takes until a request is answered.
fn until_passes(cgroup: &Path, to: IpAddr) -> Duration {
    let start = Instant::now();
    let passed = wait_until(Duration::from_secs(5), || {
        let (outcome, _) = ask(cgroup, Proto::Tcp, to, Duration::from_millis(200));
        matches!(outcome, Outcome::Answer(_))
    });
    assert!(passed, "TCP to {to} never passes");
    start.elapsed()
}

fn until_refused(cgroup: &Path, to: IpAddr) {
    let refused = wait_until(Duration::from_secs(5), || {
        ask(cgroup, Proto::Tcp, to, Duration::from_millis(200)).0 == Outcome::Refused
    });
    assert!(refused, "TCP to {to} is not refused");
}

#[test]
fn by_its_interface_and_by_nothing_else() {
    let ground = ground!("route");
    let mut world = World::new(&ground);
    let cgroup = ground.cgroup("/vpn");
    let _daemon = Daemon::start(&ground, &policy(), &[]);
    await_member(&cgroup, "vpn");
    // what goes on and on must not leave by the other way at any moment
    let floods: Vec<_> = CASES[..4]
        .iter()
        .map(|(proto, to)| Client::new(&cgroup, *proto, addr(*to, 80)).flood().spawn())
        .collect();
    refused(&mut world, &cgroup);
    tunnel_up(&ground);
    for to in [REMOTE4, REMOTE6] {
        println!("{to}: {:?} after it came", until_passes(&cgroup, to));
    }
    passes(&mut world, &cgroup);
    let all = |world: &mut World, change: &dyn Fn(), back: &dyn Fn(), what: &str| {
        change();
        for to in [REMOTE4, REMOTE6] {
            until_refused(&cgroup, to);
        }
        refused(world, &cgroup);
        back();
        for to in [REMOTE4, REMOTE6] {
            println!("{to}: {:?} after {what}", until_passes(&cgroup, to));
        }
        passes(world, &cgroup);
    };
    all(&mut world, &|| set("down"), &|| set("up"), "down and up");
    let peer = |state: &str| {
        ground.outside(|| ip_batch(&[], &format!("link set vout0 {state}\n")));
    };
    let peer_up = || {
        peer("up");
        ground.outside(|| {
            let lines = "addr replace fd00:8::2/64 dev vout0 nodad\n\
                         neigh replace 10.8.0.1 lladdr 02:00:00:00:08:01 dev vout0\n\
                         neigh replace fd00:8::1 lladdr 02:00:00:00:08:01 dev vout0\n";
            ip_batch(&[], lines);
        });
        set("up");
    };
    all(&mut world, &|| peer("down"), &peer_up, "its carrier was lost");
    let bare = || ip_batch(&[], "addr flush dev vpn0\n");
    let addressed = || {
        ip_batch(&[], "addr add 10.8.0.1/24 dev vpn0\naddr add fd00:8::1/64 dev vpn0 nodad\n");
        set("up");
    };
    all(&mut world, &bare, &addressed, "it had no address");
    all(&mut world, &|| ip_batch(&[], "link del vpn0\n"), &|| tunnel_up(&ground), "it was away");
    drop(floods);
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}
