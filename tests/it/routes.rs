//! Ways out of this host: what a [route] takes leaves by its interface and by nothing else.
//!
//! ```text
//!   vpn0  10.8.0.1/24  fd00:8::1/64 ==== vout0  10.8.0.2/24  fd00:8::2/64  (outside)
//! ```
//!
//! The remote hosts are behind both interfaces; who asked tells the server by which.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::client::{
    again, connect, floods, socket_in, tcp_in, udp_in, Client, Outcome, Proto, AT_ONCE, CASES,
    PATIENCE, SILENCE,
};
use crate::containers::live;
use crate::daemon::{run_with, Daemon};
use crate::gateway::{bridge_netfilter, Lan};
use crate::ground::{
    addr, await_link, ip, ip_batch, ip_lines, sysctl, Ground, HOST4, HOST6, HOSTS, REMOTE4,
    REMOTE6, REMOTES,
};
use crate::kernel::{await_member, forget_flows, ip_routes, output};
use crate::tunnels::bulk;
use crate::wait_until;
use crate::world::{bind, bind_at, bind_fd, set as set_option, Server, World, STREAM_PORT};

pub const GATEWAYS: &str = "gateway = 10.8.0.2\ngateway = fd00:8::2\n";

/// A cgroup by the interface.
pub fn policy() -> String {
    format!("[route vpn]\ninterface = vpn0\n{GATEWAYS}[rules]\nvpn = /vpn\ndrop = /drop\n")
}

/// This host's addresses in the tunnel.
pub const TUNNEL: [&str; 2] = ["10.8.0.1", "fd00:8::1"];

/// Makes the interface, with its addresses, and waits until packets pass.
pub fn tunnel_up(ground: &Ground) {
    let path = ground.outside_path();
    ip_lines(&format!(
        "link add vpn0 address 02:00:00:00:08:01 type veth peer name vout0 address \
         02:00:00:00:08:02 netns {path}\n\
         addr add 10.8.0.1/24 dev vpn0\n\
         addr add fd00:8::1/64 dev vpn0 nodad\n"
    ));
    ground.outside(|| {
        ip_lines(
            "addr add 10.8.0.2/24 dev vout0\n\
             addr add fd00:8::2/64 dev vout0 nodad\n\
             neigh add 10.8.0.1 lladdr 02:00:00:00:08:01 dev vout0\n\
             neigh add fd00:8::1 lladdr 02:00:00:00:08:01 dev vout0\n\
             link set vout0 up\n",
        );
    });
    set("up");
    await_link(&[("10.8.0.1", "10.8.0.2"), ("fd00:8::1", "fd00:8::2")]);
}

/// A point-to-point interface of that name, as a tunnel's is: 10.8.0.2 and fd00:8::2 here, and .1
/// outside.
pub fn tunnel_to(ground: &Ground, name: &str) {
    let path = ground.outside_path();
    // without ARP each end sends to its own address, which is the other's as well
    let address = "address 02:00:00:00:08:01";
    ip_lines(&format!(
        "link add {name} {address} arp off type veth peer name peer0 {address} netns {path}\n\
         addr add 10.8.0.2/24 dev {name}\naddr add fd00:8::2/64 dev {name} nodad\n\
         link set {name} up\n"
    ));
    ground.outside(|| {
        let lines = "link set peer0 arp off up\naddr add 10.8.0.1/24 dev peer0\n\
                     addr add fd00:8::1/64 dev peer0 nodad\n";
        ip_lines(lines);
    });
    await_link(&[("10.8.0.2", "10.8.0.1"), ("fd00:8::2", "fd00:8::1")]);
}

const NEIGHBOURS: &str = "neigh replace 10.8.0.2 lladdr 02:00:00:00:08:02 dev vpn0\n\
                          neigh replace fd00:8::2 lladdr 02:00:00:00:08:02 dev vpn0\n";

/// `ip link set vpn0 up` or down.
pub fn set(state: &str) {
    let more = match state {
        "up" => ["addr replace fd00:8::1/64 dev vpn0 nodad\n", NEIGHBOURS].concat(),
        _ => String::new(),
    };
    // in one, so that both families have their way at once
    ip_lines(&format!("link set vpn0 {state}\n{more}"));
}

/// The world with a tunnel, and a cgroup whose way that is.
pub fn tunneled(ground: &Ground) -> (World, PathBuf, Daemon) {
    let (world, cgroup) = (World::new(ground), ground.cgroup("/vpn"));
    tunnel_up(ground);
    let daemon = Daemon::start(ground, &policy(), &[]);
    await_member(&cgroup, "vpn");
    (world, cgroup, daemon)
}

pub fn ask(cgroup: &Path, proto: Proto, to: IpAddr, patience: Duration) -> (Outcome, Duration) {
    Client::new(cgroup, proto, addr(to, 80)).timeout(patience).spawn().wait()
}

/// Asserts that the remote hosts answer, and that it was by the tunnel's addresses that they were asked.
#[track_caller]
pub fn passes(world: &mut World, cgroup: &Path) {
    for (proto, to) in CASES {
        // nobody sends a datagram again: one is dropped while things come and go, or beside a flood
        let tries = if proto == Proto::Tcp { 1 } else { 10 };
        let mut asked = (0..tries).map(|_| ask(cgroup, proto, to, PATIENCE / tries).0);
        let outcome = asked.find(|outcome| *outcome != Outcome::Timeout);
        let outcome = outcome.unwrap_or(Outcome::Timeout);
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
pub fn refused(world: &mut World, cgroup: &Path) {
    for (proto, to) in CASES {
        let patience = if proto == Proto::Tcp { PATIENCE } else { SILENCE };
        let (outcome, took) = ask(cgroup, proto, to, patience);
        match proto {
            Proto::Tcp => {
                assert_eq!(outcome, Outcome::Refused, "TCP to {to}");
                // A port that the interface has just masqueraded is refused with the second SYN, for
                // the kernel drops the first; floods leave few others. The next port is a new one.
                let again = || ask(cgroup, proto, to, patience).1;
                let took = if took < AT_ONCE { took } else { again() };
                assert!(took < AT_ONCE, "refused after {took:?}");
            }
            _ => assert!(!matches!(outcome, Outcome::Answer(_)), "{proto:?} to {to}: {outcome:?}"),
        }
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// How long it takes until a request is answered.
pub fn until_passes(cgroup: &Path, to: IpAddr) -> Duration {
    let start = Instant::now();
    // an answer beside floods is long in coming on a slow machine
    let passed = wait_until(PATIENCE, || {
        let (outcome, _) = ask(cgroup, Proto::Tcp, to, Duration::from_secs(3));
        matches!(outcome, Outcome::Answer(_))
    });
    assert!(passed, "TCP to {to} never passes");
    start.elapsed()
}

pub fn until_refused(cgroup: &Path, to: IpAddr) {
    let refused = wait_until(PATIENCE, || {
        ask(cgroup, Proto::Tcp, to, Duration::from_millis(200)).0 == Outcome::Refused
    });
    assert!(refused, "TCP to {to} is not refused");
}

/// Waits until TCP of both families is refused.
pub fn until_closed(cgroup: &Path) {
    REMOTES.iter().for_each(|to| until_refused(cgroup, *to));
}

/// Waits until both are answered.
pub fn until_open(cgroup: &Path) {
    for to in REMOTES {
        until_passes(cgroup, to);
    }
}

/// What a route takes leaves by its interface and by nothing else at any moment, whatever becomes of the
/// interface; it leaves again once that is a way.
#[test]
fn by_its_interface_and_by_nothing_else() {
    let (ground, mut world) = scene!("route");
    let cgroup = ground.cgroup("/vpn");
    let _daemon = Daemon::start(&ground, &policy(), &[]);
    await_member(&cgroup, "vpn");
    // what goes on and on must not leave by the other way at any moment
    let floods = floods(&cgroup);
    refused(&mut world, &cgroup);
    tunnel_up(&ground);
    for to in REMOTES {
        println!("{to}: {:?} after it came", until_passes(&cgroup, to));
    }
    passes(&mut world, &cgroup);

    let mut over = |what: &str, change: &dyn Fn(), back: &dyn Fn()| {
        change();
        until_closed(&cgroup);
        refused(&mut world, &cgroup);
        back();
        for to in REMOTES {
            println!("{to}: {:?} after {what}", until_passes(&cgroup, to));
        }
        passes(&mut world, &cgroup);
    };
    over("down and up", &|| set("down"), &|| set("up"));
    let peer = |lines: &str| ground.outside(|| ip_lines(lines));
    let peer_up = || {
        peer(
            "link set vout0 up\n\
             addr replace fd00:8::2/64 dev vout0 nodad\n\
             neigh replace 10.8.0.1 lladdr 02:00:00:00:08:01 dev vout0\n\
             neigh replace fd00:8::1 lladdr 02:00:00:00:08:01 dev vout0\n",
        );
        set("up");
    };
    over("its carrier was lost", &|| peer("link set vout0 down\n"), &peer_up);
    let addressed = || {
        ip_lines("addr add 10.8.0.1/24 dev vpn0\naddr add fd00:8::1/64 dev vpn0 nodad\n");
        set("up");
    };
    over("it had no address", &|| ip_lines("addr flush dev vpn0\n"), &addressed);
    over("it was away", &|| ip_lines("link del vpn0\n"), &|| tunnel_up(&ground));

    drop(floods);
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// By a socket that is bound to the other interface or to the address of that: by the route or not at all.
#[test]
fn by_no_other_way_whatever_it_is_bound_to() {
    let ground = ground!("bound");
    let (mut world, cgroup, daemon) = tunneled(&ground);
    passes(&mut world, &cgroup);
    for (remote, host) in REMOTES.into_iter().zip(HOSTS) {
        for to_device in [true, false] {
            let socket = udp_in(&cgroup, remote);
            match to_device {
                true => bind_to_device(&socket, "in0"),
                false => bind_at(&socket, addr(host, 0)),
            }

            let _ = socket.send_to(b"who?", addr(remote, 80));

            let patience = if to_device { SILENCE } else { PATIENCE };
            socket.set_read_timeout(Some(patience)).expect("a timeout");
            let answered = again(|| socket.recv(&mut [0; 64])).is_ok();
            // one that is bound to an address has the tunnel's on its way
            assert_eq!(answered, !to_device, "{remote} bound to a device: {to_device}");
        }
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");

    // the kernel's own errors go back by the tunnel too
    let closed = udp_in(&cgroup, REMOTE4);
    closed.send_to(b"who?", addr(REMOTE4, 80)).expect("send");
    drop(closed);
    // answers to what nobody waits for
    Client::udp(&cgroup, addr(REMOTE4, 80)).send_and_close().run();
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
    daemon.stop_clean();
}

/// With the rules or the table gone, after a reload, with no daemon and with the next one: by the interface
/// or not at all.
#[test]
fn by_no_other_way_whatever_is_deleted() {
    let ground = ground!("deleted");
    let (mut world, cgroup, daemon) = tunneled(&ground);
    let floods = floods(&cgroup);
    for (family, remote) in [("-4", REMOTE4), ("-6", REMOTE6)] {
        for _ in 0..5 {
            ip_batch(&[family], "route flush table 301\n");
            until_passes(&cgroup, remote);
            ip_batch(&[family], "rule flush\nrule add pref 32766 lookup main\n");
            until_passes(&cgroup, remote);
        }
    }
    passes(&mut world, &cgroup);

    daemon.reload();
    daemon.kill9();
    passes(&mut world, &cgroup);
    set("down");
    refused(&mut world, &cgroup);
    set("up");
    let daemon = Daemon::start(&ground, &policy(), &[]);
    passes(&mut world, &cgroup);
    daemon.leave();
    passes(&mut world, &cgroup);
    let daemon = Daemon::start(&ground, &policy(), &[]);
    passes(&mut world, &cgroup);

    drop(floods);
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
    daemon.stop_clean();
}

pub fn bind_to_device(socket: &UdpSocket, name: &str) {
    let name = std::ffi::CString::new(name).expect("no NUL");
    // SAFETY: reads the name, within its length.
    let rc = unsafe {
        let len = name.as_bytes().len() as libc::socklen_t;
        let (level, option) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
        libc::setsockopt(socket.as_raw_fd(), level, option, name.as_ptr().cast(), len)
    };
    assert_eq!(rc, 0, "bind to {name:?}");
}

/// A datagram socket that sends on while the interface is away must be heard once it is back: what
/// was refused must not have settled its source address.
#[test]
fn what_was_refused_flows_once_it_is_back() {
    let ground = ground!("back");
    let (mut world, cgroup, _daemon) = tunneled(&ground);
    for remote in REMOTES {
        let socket = udp_in(&cgroup, remote);
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
        let heard = || {
            let _ = socket.send_to(b"who?", addr(remote, 80));
            again(|| socket.recv(&mut [0; 64])).is_ok()
        };
        assert!(wait_until(PATIENCE, heard), "{remote} before");

        set("down");
        for _ in 0..5 {
            assert!(!heard(), "{remote} while it is down");
        }
        set("up");
        assert!(wait_until(PATIENCE, heard), "{remote} is not heard again");
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// Whether the kernel says that an interface runs (IFF_RUNNING). Asking for it by netlink, as `ip link`
/// does, would have the kernel look at once.
fn runs(name: &str) -> bool {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
    // SAFETY: all zeros are a request for no interface.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    // SAFETY: reads and writes one such request, and the flags are what it has written.
    let (rc, flags) = unsafe {
        let rc = libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &mut request);
        (rc, request.ifr_ifru.ifru_flags)
    };
    assert_eq!(rc, 0, "flags of {name}: {}", std::io::Error::last_os_error());
    libc::c_int::from(flags) & libc::IFF_RUNNING != 0
}

/// An interface that is up and has its carrier is a way out at once. That it runs the kernel says when
/// it says so of another one that came up just before: up to a second later.
#[test]
fn it_is_back_before_the_kernel_says_that_it_runs() {
    let ground = ground!("early");
    let (mut world, cgroup, _daemon) = tunneled(&ground);
    // of one number in both namespaces, as the tunnel: of others the kernel tells at once
    let path = ground.outside_path();
    let peer = format!("peer name beside1 index 77 netns {path}");
    ip_lines(&format!("link add beside0 index 77 type veth {peer}\n"));
    ground.outside(|| ip_lines("link set beside1 up\n"));
    let address = "addr replace fd00:8::1/64 dev vpn0 nodad\n";
    for (remote, more) in [(REMOTE4, ""), (REMOTE6, address)] {
        let socket = udp_in(&cgroup, remote);
        socket.set_read_timeout(Some(Duration::from_millis(10))).expect("a timeout");
        let heard = || {
            let _ = socket.send_to(b"who?", addr(remote, 80));
            again(|| socket.recv(&mut [0; 64])).is_ok()
        };
        // at any moment of that second
        let early = (0..20).any(|_| {
            ip_lines("link set vpn0 down\nlink set beside0 down\n");
            let up = "link set beside0 up\nlink set vpn0 up\n";
            ip_lines(&format!("{up}{more}{NEIGHBOURS}"));
            assert!(wait_until(PATIENCE, heard), "{remote} is not heard again");
            !runs("beside0")
        });
        assert!(early, "{remote} is heard once the kernel says that interfaces run");
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// One that waits for somebody else, as for 802.1X, is none yet.
#[test]
fn a_dormant_one_is_no_way_out() {
    let ground = ground!("dormant");
    let (mut world, cgroup, _daemon) = tunneled(&ground);
    ip_lines("link set vpn0 mode dormant\n");
    set("down");
    set("up");
    until_closed(&cgroup);
    let says = |state: &str| output("ip", &["link", "show", "vpn0"]).contains(state);
    assert!(wait_until(PATIENCE, || says(" state DORMANT ")), "it is not dormant");
    until_closed(&cgroup);
    refused(&mut world, &cgroup);

    ip_lines("link set vpn0 mode default\nlink set vpn0 state up\n");
    assert!(wait_until(PATIENCE, || says(" state UP ")), "it is not up");
    until_open(&cgroup);
    passes(&mut world, &cgroup);
}

/// TCP connects again from the same port once the interface is back, while conntrack still knows the
/// attempt that was refused.
#[test]
fn a_refused_port_connects_once_it_is_back() {
    let ground = ground!("again");
    let (mut world, cgroup, _daemon) = tunneled(&ground);
    let connect = |from: SocketAddr, to: IpAddr| {
        let socket = socket_in(&cgroup, libc::SOCK_STREAM, to);
        bind_fd(&socket, from);
        // gives up after two more SYNs: 7 s
        set_option(&socket, libc::IPPROTO_TCP, libc::TCP_SYNCNT, 2);
        connect(&socket, addr(to, 80)).map(|()| TcpStream::from(socket)).map_err(|e| e.kind())
    };
    let cases = [("0.0.0.0:40001", REMOTE4), ("[::]:40001", REMOTE6)]
        .map(|(any, to)| (any.parse::<SocketAddr>().expect("an address"), to));
    let bound = [(addr(HOST4, 40002), REMOTE4), (addr(HOST6, 40002), REMOTE6)];
    for (from, to) in cases.into_iter().chain(bound) {
        set("down");
        until_refused(&cgroup, to);
        for _ in 0..2 {
            let refused = connect(from, to).map(drop);
            assert_eq!(refused, Err(ErrorKind::ConnectionRefused), "{to} from {from}");
        }
        set("up");
        until_passes(&cgroup, to);
        let start = Instant::now();
        let stream = connect(from, to);
        let mut stream = stream.unwrap_or_else(|error| panic!("{to} from {from}: {error}"));
        println!("{to} from {from}: {:?} after it was refused", start.elapsed());
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut text = [0; 256];
        let len = again(|| stream.read(&mut text)).expect("an answer");
        let text = String::from_utf8_lossy(&text[..len]);
        assert!(text.contains(TUNNEL[usize::from(to.is_ipv6())]), "{text}");
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// The address goes and nobody has noticed yet: what leaves then must not have that of another
/// interface, to which the answers would come.
#[test]
fn nothing_leaves_with_another_interfaces_address() {
    let ground = ground!("sourceless");
    let (mut world, cgroup, daemon) = tunneled(&ground);
    passes(&mut world, &cgroup);
    daemon.kill9();
    ip_lines("addr flush dev vpn0\n");
    assert!(ip_routes("-6", "301").contains("dev vpn0"), "no way by the interface is there");
    // the neighbours are known without an address
    ip_lines(NEIGHBOURS);

    for (proto, to) in CASES {
        let (outcome, _) = ask(&cgroup, proto, to, SILENCE);
        assert!(!matches!(outcome, Outcome::Answer(_)), "{proto:?} to {to}: {outcome:?}");
    }
    let sent = world.wire.packets();
    assert!(sent.iter().all(|p| ![REMOTE4, REMOTE6].contains(&p.dst.ip())), "{sent:?}");
}

/// rp_filter of either value, and what check says of it.
#[test]
fn answers_pass_rp_filter() {
    let (ground, mut world) = scene!("rpfilter");
    let cgroup = ground.cgroup("/vpn");
    tunnel_up(&ground);
    sysctl("net/ipv4/conf/all/rp_filter", "0");
    let _daemon = Daemon::start(&ground, &policy(), &[]);
    await_member(&cgroup, "vpn");
    let says = |what: &str| run_with(&ground, &policy(), &["check"]).out.contains(what);
    for (filter, valid_mark, passes_it) in
        [("0", "0", true), ("2", "0", true), ("1", "1", true), ("1", "0", false)]
    {
        sysctl("net/ipv4/conf/vpn0/rp_filter", filter);
        sysctl("net/ipv4/conf/vpn0/src_valid_mark", valid_mark);
        match passes_it {
            true => passes(&mut world, &cgroup),
            false => {
                let (outcome, _) = ask(&cgroup, Proto::Tcp, REMOTE4, SILENCE);
                assert_eq!(outcome, Outcome::Timeout);
            }
        }
        assert_eq!(says("set net.ipv4.conf.vpn0.src_valid_mark = 1"), !passes_it);
    }
}

/// A service of the route's cgroup that others ask by the interface answers by it, and what it is
/// asked by the other interface it answers by that.
#[test]
fn services_answer_by_where_they_were_asked() {
    let ground = ground!("inbound");
    let (mut world, cgroup, _daemon) = tunneled(&ground);
    // by the main table the answers would leave by the other interface
    ground.outside(|| ip_lines("addr add 203.0.113.7/32 dev lo\n"));
    let _service = Client::tcp(&cgroup, addr(ip("0.0.0.0"), 4000)).serve();
    let root = ground.root.clone();
    let dial = |host: &str| {
        let to = SocketAddr::new(host.parse().expect("an address"), 4000);
        ground.outside(|| {
            let route =
                format!("route replace {host}/32 via {host} dev DEV onlink src 203.0.113.7\n");
            let device = if host.starts_with("10.") { "vout0" } else { "out0" };
            ip_lines(&route.replace("DEV", device));
            Client::tcp(&root, to).run().who()
        })
    };
    assert_eq!(dial("10.8.0.1"), "service");
    assert_eq!(world.wire.to_remote(), [], "answered by another interface");
    assert_eq!(dial("192.0.2.1"), "service");
    assert_ne!(world.wire.to_remote(), [], "answered by where it was not asked");
}

/// DNS of the route goes to a resolver in the tunnel, also what is addressed to one on this host.
fn dns_policy(local: bool) -> String {
    let local = if local { "dns-hijack-local = yes\n" } else { "" };
    let dns = "dns-hijack = 10.8.0.2\ndns-hijack = fd00:8::2\ndns-hijack-tcp = yes\n";
    policy().replace("[rules]", &format!("{dns}{local}[rules]"))
}

/// Which resolver is asked, which one answers, and as whom the tunnel asks it.
const DNS: [(&str, &str, &str); 4] = [
    ("203.0.113.7", "10.8.0.2:53", "10.8.0.1"),
    ("127.0.0.53", "10.8.0.2:53", "10.8.0.1"),
    ("192.0.2.1", "10.8.0.2:53", "10.8.0.1"),
    ("2001:db8:2::7", "[fd00:8::2]:53", "fd00:8::1"),
];

#[track_caller]
fn resolves(world: &mut World, cgroup: &Path) {
    for (asked, resolver, own) in DNS {
        for proto in [Proto::Udp, Proto::Tcp] {
            let outcome = Client::new(cgroup, proto, addr(ip(asked), 53)).run();
            let Outcome::Answer(text) = &outcome else { panic!("{proto:?} {asked}: {outcome:?}") };
            assert_eq!(outcome.who(), format!("remote {resolver}"), "{proto:?} {asked}");
            let by = [format!(" from {own}"), format!("[{own}]")];
            assert!(by.iter().any(|by| text.contains(by)), "{text}");
        }
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// DNS goes into the tunnel, and while there is no way nobody here answers instead.
#[test]
fn dns_goes_into_the_tunnel() {
    let (ground, mut world) = scene!("routedns");
    let cgroup = ground.cgroup("/vpn");
    tunnel_up(&ground);
    let _local = Server::start("local", &[53]);
    let _daemon = Daemon::start(&ground, &dns_policy(true), &[]);
    resolves(&mut world, &cgroup);

    set("down");
    until_refused(&cgroup, REMOTE4);
    for (asked, ..) in DNS {
        let to = addr(ip(asked), 53);
        assert_eq!(Client::tcp(&cgroup, to).run(), Outcome::Refused, "{asked}");
        let udp = Client::udp(&cgroup, to).timeout(SILENCE).run();
        assert!(!matches!(udp, Outcome::Answer(_)), "{asked}: {udp:?}");
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");

    set("up");
    until_open(&cgroup);
    resolves(&mut world, &cgroup);
}

/// For that the tunnel's interface is opened to loopback addresses, which nobody in the tunnel can reach for
/// all that; whoever takes over knows that it was opened by us, and puts it back; one that was open before
/// stays so.
#[test]
fn the_interface_is_opened_to_loopback_addresses() {
    let (ground, mut world) = scene!("routelocal");
    let cgroup = ground.cgroup("/vpn");
    tunnel_up(&ground);
    let _local = Server::start("local", &[53]);
    let localnet = || {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/conf/vpn0/route_localnet");
        text.expect("a sysctl").trim() == "1"
    };
    ground.outside(|| {
        let by_us = "route add 127.0.0.9 via 10.8.0.1 dev vout0\n";
        ip_lines(&format!("route del local 127.0.0.0/8 dev lo table local\n{by_us}"));
        sysctl("net/ipv4/conf/vout0/route_localnet", "1");
    });
    let ask = || Client::udp(&ground.root, addr(ip("127.0.0.9"), 53)).timeout(SILENCE).run().who();
    // with nobody to prevent it
    sysctl("net/ipv4/conf/vpn0/route_localnet", "1");
    assert_eq!(ground.outside(ask), "local 127.0.0.9:53");
    sysctl("net/ipv4/conf/vpn0/route_localnet", "0");

    let daemon = Daemon::start(&ground, &dns_policy(true), &[]);
    assert!(localnet());
    assert_eq!(ground.outside(ask), "nobody");

    daemon.kill9();
    let daemon = Daemon::start(&ground, &dns_policy(true), &[]);
    resolves(&mut world, &cgroup);
    daemon.kill9();
    let daemon = Daemon::start(&ground, &dns_policy(false), &[]);
    assert!(!localnet());
    daemon.reconfigure(&dns_policy(true));
    daemon.stop_clean();
    assert!(!localnet());

    sysctl("net/ipv4/conf/vpn0/route_localnet", "1");
    let daemon = Daemon::start(&ground, &dns_policy(true), &[]);
    daemon.reconfigure(&dns_policy(false));
    daemon.reconfigure(&dns_policy(true));
    daemon.stop_clean();
    assert!(localnet());
}

/// Clients of a router leave by the route too, and are refused while it is closed.
#[test]
fn clients_of_a_router_leave_by_it() {
    let (ground, mut world) = scene!("routelan");
    tunnel_up(&ground);
    let lan = Lan::new(&ground);
    let gateway = "[gateway lan]\ninterface = br-lan\nsource = 198.51.100.10\nsource = \
                   2001:db8:3::10\ntarget = vpn\n";
    for (valid_mark, interface) in [("0", "br-lan"), ("1", "br-lan"), ("0", "br*"), ("1", "br*")] {
        sysctl("net/ipv4/conf/all/src_valid_mark", valid_mark);
        let gateway = gateway.replace("br-lan", interface);
        let _daemon = Daemon::start(&ground, &format!("{}{gateway}", policy()), &[]);
        world.wire.packets();
        lan.expect(0, ["remote"; 6]);
        assert_eq!(world.wire.to_remote(), [], "left by another interface");
        lan.expect(1, ["remote"; 6]);
        assert_ne!(world.wire.to_remote(), [], "no rule covers this client");

        set("down");
        let to = addr(REMOTE4, 80);
        let refused = wait_until(PATIENCE, || lan.ask(0, Proto::Tcp, to) == "refused");
        assert!(refused, "a client is not refused");
        lan.expect(0, ["refused", "refused", "nobody", "nobody", "nobody", "nobody"]);
        assert_eq!(world.wire.to_remote(), [], "left by another interface");
        set("up");
        let passes = wait_until(PATIENCE, || lan.ask(0, Proto::Tcp, to).starts_with("remote"));
        assert!(passes, "a client is not let out again");
    }
}

/// A container that a rule for its cgroup gives a route.
#[test]
fn a_container_leaves_by_it() {
    let (ground, mut world) = scene!("routebox");
    tunnel_up(&ground);
    let lan = Lan::new(&ground);
    let _process = live(lan.client(0), &ground.cgroup("/vpn"));
    for (valid_mark, bridged) in [("0", false), ("1", false), ("0", true)] {
        sysctl("net/ipv4/conf/all/src_valid_mark", valid_mark);
        // it needs no socket
        bridge_netfilter(bridged);
        let mut daemon = Daemon::start(&ground, &policy(), &[]);
        let mut left =
            |what: &str| assert_eq!(world.wire.to_remote(), [], "{what}: by another way");
        left("before");
        for end in [Daemon::leave, Daemon::kill9] {
            lan.expect(0, ["remote"; 6]);
            left("up");
            set("down");
            let to = addr(REMOTE4, 80);
            let refused = || lan.ask(0, Proto::Tcp, to) == "refused";
            assert!(wait_until(PATIENCE, refused), "a container is not refused");
            lan.expect(0, ["refused", "refused", "nobody", "nobody", "nobody", "nobody"]);
            left("down");
            set("up");
            let passes = || {
                let all = REMOTES.map(|to| lan.ask(0, Proto::Tcp, addr(to, 80)));
                all.iter().all(|who| who.starts_with("remote"))
            };
            assert!(wait_until(PATIENCE, passes), "a container is not let out again");
            end(daemon);
            lan.expect(0, ["remote"; 6]);
            left("without the daemon");
            daemon = Daemon::start(&ground, &policy(), &[]);
        }
        lan.expect(1, ["remote"; 6]);
        assert_ne!(world.wire.to_remote(), [], "no rule covers this client");
        daemon.stop_clean();
    }
}

/// Rules of others that would take it are evaded as those that would take what is proxied, and what
/// they would take is called what it is.
#[test]
fn rules_of_others_would_take_it() {
    let ground = ground!("wouldtake");
    let (mut world, cgroup, daemon) = tunneled(&ground);
    let lines = "route add 203.0.113.0/24 via 192.0.2.2 dev in0 table 51820\n\
                 rule add pref 98 lookup 51820\n";

    ip_batch(&["-4"], lines);

    let said = "ip rules of others would take traffic of a route (ip rule pref 98 ";
    assert!(daemon.wait_log(said, PATIENCE), "{}", daemon.logs());
    passes(&mut world, &cgroup);
    let text = run_with(&ground, &policy(), &["check"]).out;
    assert!(text.contains(" would take traffic of a route: run has its own rules"), "{text}");
    ip_batch(&["-4"], "rule del pref 98\nroute flush table 51820\n");
    daemon.stop_clean();
}

/// A way by a table that somebody else keeps.
const BY_TABLE: &str = "[route vpn]\ntable = 1000\nmasquerade = yes\n[rules]\nvpn = /vpn\n";

/// Where that table leads.
fn lead(four: &str, six: &str) {
    let way = |by: &str| format!("route replace default table 1000 {by}\n");
    ip_lines(&(way(four) + &way(six)));
}

fn lead_into_the_tunnel() {
    lead("via 10.8.0.2", "via fd00:8::2 dev vpn0");
}

/// [`tunneled`] by such a table, which has no route yet.
fn tunneled_by_table(ground: &Ground) -> (World, PathBuf, Daemon) {
    let (world, cgroup) = (World::new(ground), ground.cgroup("/vpn"));
    tunnel_up(ground);
    let daemon = Daemon::start(ground, BY_TABLE, &[]);
    await_member(&cgroup, "vpn");
    (world, cgroup, daemon)
}

/// Where the table has a route, traffic leaves by that, wherever it leads; where it has none, it is refused.
#[test]
fn by_a_table_of_others() {
    let ground = ground!("routetable");
    let (mut world, cgroup, daemon) = tunneled_by_table(&ground);
    refused(&mut world, &cgroup);
    lead_into_the_tunnel();
    passes(&mut world, &cgroup);

    // elsewhere, and back
    let by = |address: &str| {
        let to = if address.contains(':') { REMOTE6 } else { REMOTE4 };
        let answer = || ask(&cgroup, Proto::Udp, to, Duration::from_millis(200)).0;
        let there = || matches!(answer(), Outcome::Answer(text) if text.contains(address));
        let start = Instant::now();
        assert!(wait_until(PATIENCE, there), "not by {address}");
        println!("by {address} after {:?}", start.elapsed());
    };
    lead("via 192.0.2.2", "via 2001:db8:1::2 dev in0");
    HOSTS.iter().for_each(|host| by(&host.to_string()));
    lead_into_the_tunnel();
    TUNNEL.iter().for_each(|own| by(own));

    // two at once are both right
    ip_lines("neigh replace fd00:8::3 lladdr 02:00:00:00:08:02 dev vpn0\n");
    lead(
        "nexthop via 10.8.0.2 nexthop via 10.8.0.2",
        "nexthop via fd00:8::2 dev vpn0 nexthop via fd00:8::3 dev vpn0",
    );
    world.wire.packets();
    passes(&mut world, &cgroup);
    let shown = run_with(&ground, BY_TABLE, &["show"]).out;
    assert!(shown.contains("oifname \"vpn0\" accept"), "{shown}");

    ip_batch(&["-4"], "route flush table 1000\n");
    ip_batch(&["-6"], "route flush table 1000\n");
    refused(&mut world, &cgroup);
    daemon.stop_clean();
}

/// No other way, whatever is deleted or bound to, and with no daemon: the interfaces are those that the
/// table names.
#[test]
fn by_no_way_that_the_table_does_not_name() {
    let ground = ground!("routetable-only");
    let (mut world, cgroup, daemon) = tunneled_by_table(&ground);
    lead_into_the_tunnel();
    passes(&mut world, &cgroup);

    let floods = floods(&cgroup);
    let _bound = REMOTES.map(|remote| {
        let socket = udp_in(&cgroup, remote);
        bind_to_device(&socket, "in0");
        let _ = socket.send_to(b"who?", addr(remote, 80));
        socket
    });
    let flush = |family| ip_batch(&[family], "rule flush\nrule add pref 32766 lookup main\n");
    for (family, remote) in [("-4", REMOTE4), ("-6", REMOTE6)] {
        flush(family);
        until_passes(&cgroup, remote);
    }
    passes(&mut world, &cgroup);

    daemon.kill9();
    ["-4", "-6"].into_iter().for_each(flush);
    for (proto, to) in CASES {
        let (outcome, _) = ask(&cgroup, proto, to, SILENCE);
        assert!(!matches!(outcome, Outcome::Answer(_)), "{proto:?} to {to}: {outcome:?}");
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");

    let daemon = Daemon::start(&ground, BY_TABLE, &[]);
    passes(&mut world, &cgroup);
    drop(floods);
    daemon.stop_clean();
}

/// A reload that gives a cgroup the route, another target, or takes the route away.
#[test]
fn a_reload_moves_what_began_by_it() {
    let (ground, mut world) = scene!("routereload");
    let cgroup = ground.cgroup("/vpn");
    tunnel_up(&ground);
    let daemon = Daemon::start(&ground, "[rules]\ndirect = /vpn\n", &[]);
    let following = || Client::tcp(&cgroup, addr(REMOTE4, STREAM_PORT)).follow().spawn();
    let direct = following();
    assert!(wait_until(PATIENCE, || !world.wire.to_remote().is_empty()));

    daemon.reconfigure(&policy());
    // cut at once
    let (outcome, _) = direct.wait();
    assert!(matches!(outcome, Outcome::Failed(_) | Outcome::Refused), "{outcome:?}");
    // what is left of a flow that began directly ends directly, as long as the remote host sends
    let flows = || {
        let port = format!(":{STREAM_PORT}");
        let list = ground.outside(|| output("ss", &["-Htan", "sport", &port]));
        list.lines().filter(|line| !line.starts_with("LISTEN")).count()
    };
    assert!(wait_until(PATIENCE, || flows() == 0), "the remote host sends on");
    world.wire.packets();
    passes(&mut world, &cgroup);

    let routed = following();
    daemon.reconfigure(&policy().replace("vpn = /vpn", "drop = /vpn"));
    let (outcome, _) = routed.wait();
    assert!(!matches!(outcome, Outcome::Answer(_)), "{outcome:?}");
    daemon.reconfigure(&policy());
    passes(&mut world, &cgroup);

    daemon.reconfigure("[rules]\ndirect = /vpn\n");
    for (proto, to) in CASES {
        let (outcome, _) = ask(&cgroup, proto, to, PATIENCE);
        assert!(matches!(outcome, Outcome::Answer(_)), "{proto:?} to {to}: {outcome:?}");
    }
    assert_ne!(world.wire.to_remote(), [], "still by the route");
}

/// Whole files each way over an interface with a small MTU.
#[test]
fn bulk_passes_a_small_mtu() {
    let (ground, _world) = scene!("mtu");
    let cgroup = ground.cgroup("/vpn");
    tunnel_up(&ground);
    ip_lines("link set vpn0 mtu 1280\n");
    ground.outside(|| ip_lines("link set vout0 mtu 1280\n"));
    set("up");
    let _daemon = Daemon::start(&ground, &policy(), &[]);
    await_member(&cgroup, "vpn");
    for remote in REMOTES {
        let took = bulk(&ground, &cgroup, remote);
        println!("{remote}: 10 MiB each way in {took:?}");
    }
}

/// Conntrack translates the first packet of a flow or none: what a socket began by another way must
/// not tell whoever is behind the route this host's address.
#[test]
fn no_datagram_leaves_with_the_address_of_before() {
    let (ground, mut world) = scene!("routeold");
    let cgroup = ground.cgroup("/vpn");
    tunnel_up(&ground);
    let spares = "bypass = 203.0.113.0/24\nbypass = 2001:db8:2::/64\n[rules]";
    let daemon = Daemon::start(&ground, &policy().replace("[rules]", spares), &[]);
    await_member(&cgroup, "vpn");
    let flows = REMOTES.map(|to| (udp_in(&cgroup, to), to));
    let answered = |(socket, to): &(UdpSocket, IpAddr), own: &str| {
        socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        socket.send_to(b"?", addr(*to, 80)).unwrap_or_else(|e| panic!("send to {to}: {e}"));
        let mut text = [0; 256];
        let len =
            again(|| socket.recv(&mut text)).unwrap_or_else(|e| panic!("answer of {to}: {e}"));
        let text = String::from_utf8_lossy(&text[..len]);
        assert!(
            text.contains(&format!(" from {own}")) || text.contains(&format!("[{own}]")),
            "{text}"
        );
    };
    for (flow, own) in flows.iter().zip([HOST4, HOST6]) {
        answered(flow, &own.to_string());
    }
    assert_ne!(world.wire.to_remote(), []);

    daemon.reconfigure(&policy());

    for (flow, own) in flows.iter().zip(TUNNEL) {
        answered(flow, own);
    }
    passes(&mut world, &cgroup);
}

/// Conntrack has forgotten a flow whose source address was translated, and the remote host speaks: to
/// the tunnel's address, where nobody is. What this host says to that goes back by the tunnel.
#[test]
fn what_is_said_to_forgotten_flows() {
    let (ground, mut world) = scene!("routeforgot");
    let cgroup = ground.cgroup("/vpn");
    tunnel_up(&ground);
    ip_batch(
        &[],
        "route add default via 10.8.0.2 table 1000\n\
         route add default via fd00:8::2 dev vpn0 table 1000\n",
    );
    let tcp = ground.outside(|| TcpListener::bind(addr(ip("::"), 8080)).expect("listen"));
    for way in [format!("interface = vpn0\n{GATEWAYS}"), "table = 1000\nmasquerade = yes\n".into()]
    {
        let config = format!("[route vpn]\n{way}[rules]\nvpn = /vpn\n");
        let daemon = Daemon::start(&ground, &config, &[]);
        await_member(&cgroup, "vpn");
        // what was closed before has said goodbye while there was no table
        world.wire.packets();
        for remote in REMOTES {
            let udp = ground.outside(|| bind(addr(remote, 8080), libc::SOCK_DGRAM));
            let udp = UdpSocket::from(udp);
            let _own = tcp_in(&cgroup, addr(remote, 8080));
            let (mut end, client) = tcp.accept().expect("accept");
            let own = udp_in(&cgroup, remote);
            own.connect(addr(remote, 8080)).expect("connect");
            own.send(b"hello").expect("send");
            udp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            let (_, asker) = udp.recv_from(&mut [0; 9]).expect("it comes by the tunnel");
            let by = TUNNEL[usize::from(remote.is_ipv6())];
            let all = [client, asker].map(|client| client.ip().to_canonical());
            assert_eq!(all, [ip(by); 2]);
            forget_flows();
            end.write_all(b"more").expect("write");
            end.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            let told = again(|| end.read(&mut [0; 9]));
            assert!(told.is_err(), "{told:?}");
            udp.connect(asker).expect("connect");
            udp.send(b"more").expect("send");
            let told = again(|| udp.recv(&mut [0; 9])).expect_err("nobody is there");
            assert_eq!(told.kind(), ErrorKind::ConnectionRefused);
        }
        assert_eq!(world.wire.to_remote(), [], "{way}");
        daemon.stop_clean();
    }
}
