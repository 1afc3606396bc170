//! Traffic that this host routes for others: two clients in a LAN behind it, and what of theirs
//! gets to the world.
//!
//! ```text
//!   client 0  198.51.100.10  2001:db8:3::10 ==+== br-lan  198.51.100.1  2001:db8:3::1  (inside)
//!   client 1  198.51.100.11  2001:db8:3::11 ==+
//! ```

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use libc::c_int;
use nix::sys::signal::Signal;

use crate::client::{
    again, answers, expect, socket_for, under, Client, Outcome, Proto, Running, AT_ONCE, PATIENCE,
    SILENCE,
};
use crate::containers::live;
use crate::daemon::Daemon;
use crate::ground::{
    addr, ip, ip_batch, ip_lines, sysctl, Ground, Netns, HOST4, HOST6, REMOTE4, REMOTE6, REMOTES,
};
use crate::kernel::{await_connection, counters, forget_flows, ip_rules, load, output};
use crate::routes::tunnel_up;
use crate::wait_until;
use crate::world::{bind, bind_at, but_pings, set, Packet, Server, World, PROXY, RST, STREAM_PORT};

/// This host's addresses in the LAN.
pub const LAN4: &str = "198.51.100.1";
pub const LAN6: &str = "2001:db8:3::1";
/// The same in the LAN's second subnet, see [`second_subnet`].
pub const FURTHER4: &str = "198.51.101.1";
pub const FURTHER6: &str = "2001:db8:5::1";

/// The LAN: two clients on a bridge of this host.
pub struct Lan<'a> {
    ground: &'a Ground,
    clients: [Netns; 2],
}

impl Lan<'_> {
    /// With `br-lan` as the bridge.
    pub fn new(ground: &Ground) -> Lan<'_> {
        Lan::on(ground, "br-lan")
    }

    pub fn on<'a>(ground: &'a Ground, bridge: &str) -> Lan<'a> {
        let clients = [Netns::new(), Netns::new()];
        sysctl("net/ipv4/ip_forward", "1");
        sysctl("net/ipv6/conf/all/forwarding", "1");
        bridge_netfilter(false);
        let mut lines = format!(
            "link add {bridge} address 02:00:00:00:01:00 type bridge forward_delay 0\n\
             addr add {LAN4}/24 dev {bridge}\n\
             addr add {LAN6}/64 dev {bridge} nodad\n\
             link set {bridge} up\n"
        );
        for (i, client) in clients.iter().enumerate() {
            lines += &format!(
                "link add lan{i} type veth peer name eth0 address 02:00:00:00:01:1{i} netns {}\n\
                 link set lan{i} master {bridge} up\n",
                client.path()
            );
        }
        ip_lines(&lines);
        for (i, client) in clients.iter().enumerate() {
            client.run(|| {
                sysctl("net/ipv4/ping_group_range", "0 2147483647");
                ip_lines(&format!(
                    "link set lo up\n\
                     addr add 198.51.100.1{i}/24 dev eth0\n\
                     addr add 2001:db8:3::1{i}/64 dev eth0 nodad\n\
                     link set eth0 up\n\
                     route add default via {LAN4}\n\
                     route add default via {LAN6} dev eth0\n"
                ));
            });
        }
        ground.outside(|| {
            let lines = "route add 198.51.100.0/24 via 192.0.2.1\n\
                         route add 2001:db8:3::/64 via 2001:db8:1::1\n";
            ip_lines(lines);
        });
        let lan = Lan { ground, clients };
        (0..2).for_each(|i| lan.await_link(i));
        lan
    }

    /// Returns once packets of client `i` pass, after its link or the bridge has come up: that moves in a
    /// kernel worker, and what is sent before is lost.
    #[track_caller]
    pub fn await_link(&self, i: usize) {
        for gate in [LAN4, LAN6] {
            let passed = wait_until(PATIENCE, || {
                self.ask_within(i, Proto::Icmp, addr(ip(gate), 0), SILENCE) != "nobody"
            });
            assert!(passed, "client {i} does not reach {gate}");
        }
    }

    pub fn client(&self, i: usize) -> &Netns {
        &self.clients[i]
    }

    pub fn ask_within(&self, i: usize, proto: Proto, to: SocketAddr, time: Duration) -> String {
        let client = Client::new(&self.ground.root, proto, to).timeout(time);
        self.clients[i].run(|| client.run()).who()
    }

    /// Who answers a request of client `i`.
    pub fn ask(&self, i: usize, proto: Proto, to: SocketAddr) -> String {
        self.ask_within(i, proto, to, PATIENCE)
    }

    /// Asserts who answers client `i` on port 80 of the remote hosts: TCP, UDP and ping, each over
    /// IPv4 and IPv6; `remote`, `nobody`, `refused` or the name of a proxy.
    #[track_caller]
    pub fn expect(&self, i: usize, want: [&str; 6]) {
        self.clients[i].run(|| expect(&[(&self.ground.root, answers(want))]));
    }

    #[track_caller]
    pub fn proxied(&self, i: usize) {
        self.expect(i, [PROXY, PROXY, PROXY, PROXY, "remote", "remote"]);
    }

    #[track_caller]
    pub fn direct(&self, i: usize) {
        self.expect(i, ["remote"; 6]);
    }

    #[track_caller]
    pub fn dropped(&self, i: usize) {
        self.expect(i, ["nobody"; 6]);
    }
}

/// Whether bridged packets pass the IP hooks too; on by default where that is in the kernel.
pub fn bridge_netfilter(on: bool) {
    for name in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
        let name = format!("net/bridge/{name}");
        if Path::new("/proc/sys").join(&name).exists() {
            sysctl(&name, if on { "1" } else { "0" });
        }
    }
}

/// Packets that the section's counters have seen.
fn counted(section: &str) -> u64 {
    counters(section).iter().map(|(packets, _)| packets).sum()
}

const BOTH: [Proto; 2] = [Proto::Tcp, Proto::Udp];

const BASIC: &str = "
[tproxy mihomo]
port = 7893
[gateway lan]
interface = br-lan
target = mihomo
";

/// Clients are proxied, and nothing of theirs is forwarded, whatever the sysctls that drop packets with
/// strange addresses; this host answers for itself as ever.
#[test]
fn clients_are_proxied_whatever_the_sysctls() {
    let (ground, mut world, _proxy) = scene!("gw", proxy);
    let lan = Lan::new(&ground);
    // Wildcard listeners of this host on the ports that the clients dial.
    let _own = Server::start("own", &[80, 8080]);
    lan.direct(0);
    for wildcard in [false, true] {
        let config = match wildcard {
            false => BASIC.to_owned(),
            true => BASIC.replace("br-lan", "br-*"),
        };
        let daemon = Daemon::start(&ground, &config, &[]);
        for (rp_filter, src_valid_mark) in [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)] {
            println!("wildcard {wildcard} rp_filter {rp_filter} src_valid_mark {src_valid_mark}");
            for interface in ["all", "br-lan", "lo", "in0"] {
                let at = |name| format!("net/ipv4/conf/{interface}/{name}");
                sysctl(&at("rp_filter"), &rp_filter.to_string());
                sysctl(&at("src_valid_mark"), &src_valid_mark.to_string());
            }
            world.wire.packets();

            lan.proxied(0);
            lan.proxied(1);
            world.wire.assert_only_pings();
            // This host itself, by all its addresses.
            for own in [ip(LAN4), ip(LAN6), HOST4, HOST6] {
                for proto in BOTH {
                    let to = addr(own, 8080);
                    assert_eq!(lan.ask(0, proto, to), format!("own {to}"));
                }
            }
        }
        daemon.stop_clean();
    }
    lan.direct(1);
}

/// Where bridged packets pass the IP hooks, the second pass is skipped and the first one's socket is
/// lost: they have to get it again, ahead of what skips the pass, which comes with the first bridge.
#[test]
fn bridges_that_pass_the_hooks() {
    let ground = ground!("gwbrnf");
    if !Path::new("/proc/sys/net/bridge").exists() {
        println!("SKIP: no br_netfilter in this kernel");
        return;
    }
    let (mut world, proxy) = World::with_proxy(&ground);
    // (The servers of `world` take packets for any address; this one does not.)
    let _own = BOTH.map(|proto| Client::new(&ground.root, proto, addr(ip("::"), 80)).serve());
    let other = Server::start("proxy other", &[7894]);
    let one = format!("[global]\nbypass = 198.51.100.0/24\nbypass = 2001:db8:3::/64\n{BASIC}");
    let two = format!("{one}[tproxy other]\nport = 7894\n");
    let daemon = Daemon::start(&ground, &one, &[]);
    let lan = Lan::new(&ground);
    bridge_netfilter(true);
    let to = addr(REMOTE4, 80);
    let proxied = || lan.ask(0, Proto::Tcp, to) == format!("{PROXY} {to}");
    assert!(wait_until(PATIENCE, proxied), "{}", daemon.logs());
    let (o, r, n, d) = ("proxy other", "refused", "nobody", "remote");
    for (config, who) in [
        (None, PROXY),
        (Some(two.clone()), PROXY),
        (Some(two.replace("target = mihomo", "target = other")), o),
    ] {
        config.into_iter().for_each(|config| drop(daemon.reconfigure(&config)));
        for rp_filter in ["0", "1", "2"] {
            sysctl("net/ipv4/conf/all/rp_filter", rp_filter);
            world.wire.packets();
            lan.expect(0, [who, who, who, who, d, d]);
            world.wire.assert_only_pings();
        }
        // what is bridged, and this host itself
        for other in ["198.51.100.11", "2001:db8:3::11"] {
            assert_eq!(lan.ask(0, Proto::Icmp, addr(ip(other), 0)), format!("echo {other}"));
        }
        for (own, proto) in [LAN4, LAN6].into_iter().flat_map(|own| BOTH.map(|p| (own, p))) {
            assert_eq!(lan.ask(0, proto, addr(ip(own), 80)), "service");
        }
    }

    // another bridge, and the table put back
    ip_lines("link add br-two type bridge\n");
    daemon.reload();
    lan.expect(0, [o, o, o, o, d, d]);
    drop(other);
    world.wire.packets();
    lan.expect(0, [r, r, n, n, d, d]);
    daemon.reconfigure("[gateway lan]\ninterface = br-lan\ntarget = drop\n");
    lan.dropped(0);
    world.wire.assert_only_pings();
    drop(proxy);
    daemon.stop_clean();
}

/// IPv6 neighbours are found by packets that may go to any address; anything can be sent with their
/// type. What a process sends as such, and what is routed, goes where it is to go.
#[test]
fn neighbour_discovery_is_no_way_out() {
    let (ground, mut world) = scene!("gwnd");
    let lan = Lan::new(&ground);
    let config = "[global]\nhold = /held\n[route vpn]\ninterface = none\n[gateway lan]\n\
                  interface = br-lan\ntarget = drop\n[rules]\ndrop = /drop\nvpn = /vpn\n";
    ground.cgroups(["/held", "/drop", "/vpn"]);
    let daemon = Daemon::start(&ground, config, &[]);
    daemon.signal(Signal::SIGSTOP);
    let cgroups = ground.cgroups(["/drop", "/vpn", "/held/new"]);
    // solicitations, advertisements, and what they are told from
    let send = |cgroup: &Path| {
        for kind in [135, 136, 128] {
            let socket = socket_for(cgroup, libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6);
            let socket = UdpSocket::from(socket);
            let data = [&[kind, 0, 0, 0][..], &[b'!'; 200]].concat();
            let _ = socket.send_to(&data, addr(REMOTE6, 0));
        }
    };

    send(&ground.root);
    assert_eq!(world.wire.to_remote().len(), 3, "nothing decides about these");
    for cgroup in &cgroups {
        send(cgroup);
        assert_eq!(world.wire.to_remote(), [], "{cgroup:?}");
    }
    lan.client(0).run(|| send(&ground.root));
    assert_eq!(world.wire.to_remote(), [], "of a client");

    // those of the clients find each other, and this host, where what is bridged passes the hooks
    bridge_netfilter(true);
    for to in ["2001:db8:3::11", LAN6] {
        let known = || {
            lan.ask_within(0, Proto::Icmp, addr(ip(to), 0), SILENCE);
            output("ip", &["-6", "neigh", "show", to]).contains("02:00:00:00:01:")
        };
        lan.client(0).run(|| ip_batch(&["-6"], "neigh flush dev eth0\n"));
        assert!(lan.client(0).run(|| wait_until(PATIENCE, known)), "{to} is not found");
    }
    daemon.signal(Signal::SIGCONT);
    daemon.stop_clean();
}

/// Packets may come from any address by these interfaces.
fn whatever_the_source(interfaces: &[&str]) {
    for at in interfaces {
        sysctl(&format!("net/ipv4/conf/{at}/rp_filter"), "0");
    }
}

/// A socket of the second client, to which the first one has spoken in the name of `remote`, and which is
/// connected with that.
fn spoken_to(lan: &Lan, at: SocketAddr, remote: SocketAddr) -> UdpSocket {
    let own = UdpSocket::from(lan.client(1).run(|| bind(at, libc::SOCK_DGRAM)));
    own.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let speaker = lan.client(0).run(|| bind(remote, libc::SOCK_DGRAM));
    UdpSocket::from(speaker).send_to(b"first", at).expect("speak");
    again(|| own.recv_from(&mut [0; 9])).expect("it comes by us");
    own.connect(remote).expect("connect");
    own
}

/// Nor has it this host answer whom it wants to speak to, which tells that one what was sent: where nobody
/// listens. (One that goes directly may.)
#[test]
fn no_client_has_this_host_answer() {
    let (ground, mut world) = scene!("gwanswered");
    let lan = Lan::new(&ground);
    whatever_the_source(&["all", "br-lan"]);
    sysctl("net/ipv4/icmp_ratelimit", "0");
    sysctl("net/ipv6/icmp/ratelimit", "0");
    for target in ["direct", "drop", "vpn", "mihomo"] {
        let section = match target {
            "vpn" => "[route vpn]\ninterface = vpn0\n",
            "mihomo" => "[tproxy mihomo]\nport = 7893\n",
            _ => "",
        };
        let config = format!("{section}[gateway lan]\ninterface = br-lan\ntarget = {target}\n");
        let daemon = Daemon::start(&ground, &config, &[]);
        for (remote, own) in REMOTES.into_iter().zip([LAN4, LAN6]) {
            let speaker = lan.client(0).run(|| bind(addr(remote, 5000), libc::SOCK_DGRAM));
            world.wire.packets();
            let sent =
                UdpSocket::from(speaker).send_to(b"what it wants to tell", addr(ip(own), 5003));
            assert!(sent.is_ok(), "{target} {own}");
            // it has come through once this has
            lan.ask(0, Proto::Icmp, addr(ip(own), 0));
            let left = world.wire.to_remote();
            assert_eq!(left.len(), usize::from(target == "direct"), "{target}: {left:?}");
        }
        daemon.stop_clean();
    }
}

/// Where the LAN is bypassed, a client can send to itself or to another one by this host in the name of
/// who it wants to speak to. What it sends there then is no answer.
#[test]
fn no_client_answers_itself() {
    let (ground, mut world) = scene!("gwanswers");
    let lan = Lan::new(&ground);
    whatever_the_source(&["all", "br-lan"]);
    let clients = [ip("198.51.100.11"), ip("2001:db8:3::11")];
    let by_us = format!(
        "route add {}/32 via {LAN4}\nroute add {}/128 via {LAN6} dev eth0\n",
        clients[0], clients[1]
    );
    lan.client(0).run(|| ip_lines(&by_us));
    let spared = "[global]\nbypass = 198.51.100.0/24\nbypass = 2001:db8:3::/64\n";
    for (name, outlet) in [
        ("drop", ""),
        ("mihomo", "[tproxy mihomo]\nport = 7893\n"),
        ("vpn", "[route vpn]\ninterface = none\n"),
    ] {
        let section = format!("[gateway lan]\ninterface = br-lan\ntarget = {name}\n");
        forget_flows();
        let config = format!("{spared}{outlet}{section}");
        let mut daemon = Daemon::start(&ground, &config, &[]);
        let own = [0, 1].map(|at| spoken_to(&lan, addr(clients[at], 5000), addr(REMOTES[at], 80)));
        let mut say_more = |when: &str| {
            for own in own.iter().cycle().take(6) {
                // what is known of the one before may come first
                let _ = own.send(b"then");
            }
            assert_eq!(world.wire.to_remote(), [], "{name}, {when}");
        };

        say_more("begun");
        daemon.reconfigure(&config);
        say_more("after a reload");
        let other =
            "[tproxy other]\nport = 7894\n[gateway other]\ninterface = none\ntarget = other\n";
        daemon.reconfigure(&format!("{config}{other}"));
        say_more("after a reload with another proxy");
        for leave in [Daemon::kill9 as fn(Daemon), Daemon::leave] {
            leave(daemon);
            say_more("between two daemons");
            daemon = Daemon::start(&ground, &config, &[]);
            say_more("after a restart");
        }
        daemon.stop_clean();
    }
}

/// A client that has closed its socket when the answer comes: its host says "port unreachable", and
/// says it to the remote host, which must not hear of it.
#[test]
fn icmp_errors_about_proxied_flows_stay() {
    // where flows that go direct are known as such, what the proxy answers is not taken for one
    let direct = "direct = user:0\nmihomo = /elsewhere\n";
    for (name, rules) in [("gwicmp", ""), ("gwicmpuser", direct)] {
        icmp_errors_stay(name, rules);
    }
}

fn icmp_errors_stay(name: &str, rules: &str) {
    let (ground, mut world, _proxy) = scene!(name, proxy);
    let lan = Lan::new(&ground);
    let cgroup = ground.cgroup("/proxied");
    let config = format!("{BASIC}[rules]\nmihomo = /proxied\n{rules}");
    let _daemon = Daemon::start(&ground, &config, &[]);
    world.wire.packets();
    for ip in REMOTES {
        let flood = Client::udp(&cgroup, addr(ip, 80)).send_and_close();
        for of_lan in [false, true] {
            let run = || assert_eq!(flood.run(), Outcome::Answer(String::new()));
            let unreachable = |netns: &str| {
                let text = std::fs::read_to_string(netns).expect("read snmp");
                let (v4, v6) = ("Icmp: ", "Icmp6OutDestUnreachs");
                let mut lines = text.lines().filter(|l| l.starts_with(v4));
                let names = lines.next().unwrap_or_default().split(' ');
                let of4 = names.zip(lines.next().unwrap_or_default().split(' '));
                let of4 = of4.filter(|(name, _)| *name == "OutDestUnreachs").map(|x| x.1);
                let of6 = text.lines().filter_map(|l| l.strip_prefix(v6));
                of4.chain(of6).filter_map(|n| n.trim().parse::<u64>().ok()).sum::<u64>()
            };
            let said = || {
                unreachable("/proc/thread-self/net/snmp")
                    + unreachable("/proc/thread-self/net/snmp6")
            };
            let count = || match of_lan {
                true => lan.client(0).run(said),
                false => said(),
            };
            let before = count();
            // the kernel limits how many it sends, for all tests together: so try until it does
            let some = wait_until(PATIENCE, || {
                match of_lan {
                    true => lan.client(0).run(run),
                    false => run(),
                }
                wait_until(Duration::from_millis(200), || count() > before)
            });
            assert!(some, "nobody said that a port is unreachable ({ip}, {of_lan})");
            assert_eq!(world.wire.to_remote(), [], "{ip}, of the LAN: {of_lan}");
        }
    }
}

/// While the proxy is not there, a client's TCP is refused at once, and nothing goes out or to this host.
#[test]
fn the_proxy_is_down() {
    let (ground, mut world) = scene!("gwdown");
    let lan = Lan::new(&ground);
    let _own = Server::start("own", &[80]);
    let _daemon = Daemon::start(&ground, BASIC, &[]);
    for _ in 0..2 {
        world.wire.packets();
        for to in REMOTES.map(|ip| addr(ip, 80)) {
            let ask = Client::tcp(&ground.root, to);
            let (outcome, took) = lan.client(0).run(|| ask.spawn()).wait();
            assert_eq!(outcome, Outcome::Refused, "{to}");
            assert!(took < AT_ONCE, "refused after {took:?}");
            assert_eq!(lan.ask_within(0, Proto::Udp, to, SILENCE), "nobody");
        }
        assert_eq!(world.wire.to_remote(), [], "forwarded");
        let _proxy = Server::start(PROXY, &[7893]);
        lan.proxied(0);
    }
}

/// The first section that a client's packet matches decides: by interface, address and MAC, all that it
/// names; each section counts what it has decided.
#[test]
fn sections_in_order() {
    let (ground, mut world, _proxy) = scene!("gworder", proxy);
    let lan = Lan::new(&ground);
    let all = "[gateway all]\ninterface = br-lan\ntarget = mihomo\n";
    let config = |first: &str| format!("[tproxy mihomo]\nport = 7893\n{first}{all}");
    let daemon = Daemon::start(&ground, &config(""), &[]);
    let a = |rest: &str| format!("[gateway a]\ninterface = br-lan\n{rest}\n");
    let (mac0, mac1) = ("source-mac = 02:00:00:00:01:10\n", "source-mac = 02:00:00:00:01:11\n");
    let (p, d, n) = (PROXY, "remote", "nobody");
    let (proxied, dropped) = ([p, p, p, p, d, d], [n; 6]);
    // who answers client 0 and client 1
    for (first, of0, of1) in [
        (a(&format!("{mac0}target = drop")), dropped, proxied),
        (a(&format!("{mac0}{mac1}target = drop")), dropped, dropped),
        (a("source = 198.51.100.10\ntarget = drop"), [n, p, n, p, n, d], proxied),
        (a("source = 2001:db8:3::11/128\ntarget = direct"), proxied, [p, d, p, d, d, d]),
        (
            a("source = 198.51.100.10/31\nsource = 2001:db8:3::10\ntarget = direct"),
            [d; 6],
            [d, p, d, p, d, d],
        ),
        (a(&format!("source = 198.51.100.11\n{mac0}target = drop")), proxied, proxied),
        (a("interface = br-guest\ntarget = drop"), dropped, dropped),
        (a("target = mihomo").replace("br-lan", "br-guest"), proxied, proxied),
    ] {
        println!("{first}");
        daemon.reconfigure(&config(&first));
        world.wire.packets();

        lan.expect(0, of0);
        lan.expect(1, of1);

        let left = world.wire.to_remote();
        if ![of0, of1].concat().contains(&d) {
            assert_eq!(left, []);
        }
        if [of0, of1] == [proxied; 2] {
            assert_eq!(but_pings(left), []);
        }
        assert_eq!(counted("gw_a") > 0, [of0, of1] != [proxied; 2], "{first}");
        assert!(counted("gw_all") > 0 || [of0, of1] == [dropped; 2]);
    }
}

/// Whatever the target, a section leaves alone what is bypassed, by address or mark, a client's answers,
/// and what clients send each other.
#[test]
fn what_gateways_leave_alone() {
    let (ground, _world) = scene!("gwalone");
    let lan = Lan::new(&ground);
    let config = "
        [global]
        bypass = 203.0.113.64/26
        bypass-mark = 0x100/0xf00
        [gateway lan]
        interface = br-lan
        target = drop
    ";
    let _daemon = Daemon::start(&ground, config, &[]);
    lan.dropped(0);

    let bypassed = addr(ip("203.0.113.65"), 80);
    assert_eq!(lan.ask(0, Proto::Tcp, bypassed), format!("remote {bypassed}"));
    // a service of a client: replies
    for (proto, port) in [(Proto::Tcp, 8080), (Proto::Udp, 8081)] {
        for host in ["198.51.100.10", "2001:db8:3::10"] {
            let at = addr(ip(host), port);
            let service = Client::new(&ground.root, proto, at);
            let _service = lan.client(0).run(|| service.serve());
            let ask = Client::new(&ground.root, proto, at).timeout(4 * SILENCE);
            let answered = wait_until(PATIENCE, || ground.outside(|| ask.run()).who() == "service");
            assert!(answered, "{proto:?} {at}");
        }
    }
    // between the clients
    assert_eq!(lan.ask(0, Proto::Icmp, addr(ip("198.51.100.11"), 0)), "echo 198.51.100.11");
    // a mark that another program sets before us
    load(
        "table inet other {\n chain pre {\n type filter hook prerouting priority -160; policy accept;\n \
         iifname br-lan tcp dport 443 meta mark set 0x00000123\n }\n}\n",
    );
    let marked = addr(REMOTE4, 443);
    assert_eq!(lan.ask(0, Proto::Tcp, marked), format!("remote {marked}"));
    lan.dropped(0);
}

/// An interface that appears after the start is a gateway's from then on, and so is the next one of its
/// name.
#[test]
fn an_interface_that_appears_later() {
    for (name, pattern) in [("br-later", "br-later"), ("br-later", "br-*")] {
        let (ground, mut world, _proxy) = scene!("gwlater", proxy);
        let config = BASIC.replace("br-lan", pattern);
        let _daemon = Daemon::start(&ground, &config, &[]);
        sysctl("net/ipv4/conf/all/src_valid_mark", "1");
        sysctl("net/ipv4/conf/all/rp_filter", "1");

        let lan = Lan::on(&ground, name);
        world.wire.packets();
        lan.proxied(0);
        world.wire.assert_only_pings();

        ip_lines(&format!("link del {name}\nlink del lan0\nlink del lan1\n"));
        drop(lan);
        ground.outside(|| {
            ip_lines("route del 198.51.100.0/24\nroute del 2001:db8:3::/64\n");
        });
        let lan = Lan::on(&ground, name);
        lan.proxied(1);
        let rules = ip_rules("-4");
        assert!(!rules.contains("detached"), "{rules}");
    }
}

/// DNS of clients goes to the target's resolver, here or elsewhere, by the protocols and to the addresses
/// that the target says; all else goes as ever.
#[test]
fn dns_of_clients() {
    let (ground, mut world, _proxy) = scene!("gwdns", proxy);
    let lan = Lan::new(&ground);
    let _dns = Server::start("dns", &[1053]);
    let _own = Server::start("own", &[53]);
    let _far = ground.outside(|| Server::start("far", &[5353]));
    let config = |dns: &str| {
        format!(
            "[global]\nbypass = 203.0.113.64/26\n[tproxy mihomo]\nport = 7893\n{dns}\
             [gateway lan]\ninterface = br-lan\ntarget = mihomo\n"
        )
    };
    let daemon = Daemon::start(&ground, &config(""), &[]);
    let asked = [
        (Proto::Udp, addr(REMOTE4, 53)),
        (Proto::Udp, addr(REMOTE6, 53)),
        (Proto::Tcp, addr(REMOTE4, 53)),
        (Proto::Tcp, addr(REMOTE6, 53)),
        (Proto::Udp, addr(ip(LAN4), 53)),
        (Proto::Udp, addr(ip(LAN6), 53)),
        // bypassed
        (Proto::Udp, addr(ip("203.0.113.65"), 53)),
    ];
    let here = "dns-hijack = 127.0.0.1:1053\ndns-hijack = [::1]:1053\n";
    let lan_address = "dns-hijack = 198.51.100.1:1053\ndns-hijack = [2001:db8:3::1]:1053\n";
    let far = "dns-hijack = 203.0.113.53:5353\ndns-hijack = [2001:db8:2::53]:5353\n";
    let (tcp, local) = ("dns-hijack-tcp = yes\n", "dns-hijack-local = yes\n");
    let (d4, d6) = ("dns 198.51.100.1:1053", "dns [2001:db8:3::1]:1053");
    let (f4, f6) = ("far 203.0.113.53:5353", "far [2001:db8:2::53]:5353");
    let (p, o, r) = (PROXY, "own", "remote");
    for (dns, want) in [
        (here, [d4, d6, p, p, o, o, r]),
        (&[here, tcp].concat(), [d4, d6, d4, d6, o, o, r]),
        (&[here, local].concat(), [d4, d6, p, p, d4, d6, d4]),
        (&[here, local, tcp].concat(), [d4, d6, d4, d6, d4, d6, d4]),
        (&[lan_address, local].concat(), [d4, d6, p, p, d4, d6, d4]),
        (&[far, tcp].concat(), [f4, f6, f4, f6, o, o, r]),
        (&[far, local].concat(), [f4, f6, p, p, f4, f6, f4]),
        ("dns-hijack = 127.0.0.1:1053\nudp = no\n", [d4, r, p, p, o, o, r]),
        (&[here, tcp, "tcp = no\n"].concat(), [d4, d6, d4, d6, o, o, r]),
        ("", [p, p, p, p, o, o, r]),
    ] {
        daemon.reconfigure(&config(dns));
        world.wire.packets();

        for ((proto, to), want) in asked.into_iter().zip(want) {
            let dialled = if [p, o, r].contains(&want) { format!(" {to}") } else { String::new() };
            assert_eq!(lan.ask(1, proto, to), format!("{want}{dialled}"), "{dns}{proto:?} {to}");
        }
        let mut left = world.wire.to_remote();
        left.retain(|p| !asked.iter().zip(want).any(|((_, to), who)| who == r && *to == p.dst));
        assert_eq!(left, [], "{dns}");
        lan.proxied_but_udp(dns);
    }
}

/// A resolver on a wildcard address that does not care by which address it was asked.
#[test]
fn dns_of_clients_to_a_simple_resolver() {
    let (ground, mut world) = scene!("gwsimple");
    let lan = Lan::new(&ground);
    let resolver = |proto| Client::new(&ground.root, proto, addr(ip("::"), 1053)).serve();
    let _resolver = [Proto::Udp, Proto::Tcp].map(resolver);
    for local in ["", "dns-hijack-local = yes\n"] {
        let config = format!(
            "[tproxy mihomo]\nport = 7893\ndns-hijack = 127.0.0.1:1053\n\
             dns-hijack = [::1]:1053\ndns-hijack-tcp = yes\n{local}\
             [gateway lan]\ninterface = br-lan\ntarget = mihomo\n"
        );
        let daemon = Daemon::start(&ground, &config, &[]);
        world.wire.packets();

        let own = [LAN4, LAN6].map(ip).into_iter().filter(|_| !local.is_empty());
        for to in REMOTES.into_iter().chain(own).map(|ip| addr(ip, 53)) {
            for proto in BOTH {
                assert_eq!(lan.ask(0, proto, to), "service", "{proto:?} {to}");
            }
        }
        assert_eq!(world.wire.to_remote(), []);
        assert!(daemon.stop().success());
    }
}

impl Lan<'_> {
    /// Port 80 is proxied as ever.
    fn proxied_but_udp(&self, dns: &str) {
        let of = |switch| if dns.contains(switch) { "remote" } else { PROXY };
        let (tcp, udp) = (of("\ntcp = no"), of("\nudp = no"));
        self.expect(0, [tcp, tcp, udp, udp, "remote", "remote"]);
    }
}

/// A reload by which one client's flow is proxied that was not, and another's is not that was, ends the
/// first one and leaves the second with its proxy.
#[test]
fn a_reload_spares_what_is_proxied_and_cuts_what_was_direct() {
    // With early demultiplexing the kernel finds an established socket before it asks for a route,
    // so that even a flow without a rule would live on for a while.
    for early_demux in ["0", "1"] {
        reload_under_flows(early_demux);
    }
}

fn reload_under_flows(early_demux: &str) {
    let (ground, mut world) = scene!("gwreload");
    let lan = Lan::new(&ground);
    let proxy = Server::stream(PROXY, &[7893]);
    sysctl("net/ipv4/ip_early_demux", early_demux);
    let to = addr(REMOTE4, STREAM_PORT);
    let follow = |i: usize| {
        let client = Client::tcp(&ground.root, to).timeout(Duration::from_millis(500));
        lan.client(i).run(|| client.follow().spawn())
    };
    let config = |first: usize| {
        format!(
            "[tproxy mihomo]\nport = 7893\n[gateway a]\ninterface = br-lan\n\
             source-mac = 02:00:00:00:01:1{first}\ntarget = mihomo\n\
             [gateway b]\ninterface = br-lan\ntarget = direct\n"
        )
    };
    let daemon = Daemon::start(&ground, &config(0), &[]);
    let [proxied, direct] = [follow(0), follow(1)];
    // both are under way, one with the proxy and one with the world
    for i in [0, 1] {
        lan.client(i).run(|| await_connection(to));
    }

    daemon.reconfigure(&config(1));

    world.wire.packets();
    let outcome = direct.wait().0;
    assert!(!matches!(outcome, Outcome::Answer(_)), "{outcome:?}");
    assert_eq!(world.wire.to_remote(), [], "a flow that was cut still sends");
    drop(proxy);
    assert_eq!(proxied.wait().0.who(), format!("{PROXY} {to}"));
    assert_eq!(world.wire.to_remote(), [], "a proxied flow has gone direct");
}

/// A router with one arm: clients and the uplink are on the same wire, and what is forwarded leaves
/// by the interface that it came in by.
#[test]
fn one_armed_router() {
    let (ground, mut world) = scene!("onearm");
    let client = Netns::new();
    sysctl("net/ipv4/ip_forward", "1");
    sysctl("net/ipv6/conf/all/forwarding", "1");
    for interface in ["all", "in0"] {
        sysctl(&format!("net/ipv4/conf/{interface}/send_redirects"), "0");
    }
    // The wire is a switch now; the gateway's addresses are on it, and so is its MAC.
    ground.outside(|| {
        bridge_netfilter(false);
        let lines = format!(
            "link add sw0 address 02:00:00:00:00:02 type bridge forward_delay 0\n\
             link add cl0 type veth peer name eth0 address 02:00:00:00:01:50 netns {}\n\
             addr flush dev out0\n\
             link set out0 master sw0\n\
             link set cl0 master sw0 up\n\
             link set sw0 up\n\
             addr add 192.0.2.2/24 dev sw0\n\
             addr add 2001:db8:1::2/64 dev sw0 nodad\n",
            client.path()
        );
        ip_lines(&lines);
    });
    client.run(|| {
        sysctl("net/ipv4/ping_group_range", "0 2147483647");
        let lines = "link set lo up\n\
                     addr add 192.0.2.50/24 dev eth0\n\
                     addr add 2001:db8:1::50/64 dev eth0 nodad\n\
                     link set eth0 up\n\
                     route add default via 192.0.2.1\n\
                     route add default via 2001:db8:1::1 dev eth0\n";
        ip_lines(lines);
    });
    for ip in REMOTES {
        let ping = Client::ping(&ground.root, ip).timeout(SILENCE);
        let passes = || client.run(|| ping.run()).who() == format!("echo {ip}");
        assert!(wait_until(PATIENCE, passes), "{ip}");
    }
    let _proxy = Server::start(PROXY, &[7893]);
    let config = BASIC.replace("br-lan", "in0\nsource = 192.0.2.0/24\nsource = 2001:db8:1::/64");
    let _daemon = Daemon::start(&ground, &config, &[]);
    for (rp_filter, src_valid_mark) in [("0", "0"), ("1", "1"), ("2", "1")] {
        sysctl("net/ipv4/conf/all/rp_filter", rp_filter);
        sysctl("net/ipv4/conf/all/src_valid_mark", src_valid_mark);
        world.wire.packets();
        client.run(|| expect(&[(&ground.root, under(PROXY))]));
        assert_eq!(but_pings(world.wire.to_remote()), []);
    }
}

/// A subnet of its own for the second client; by which link-local address, and port 53, it knows this host.
pub fn second_subnet(lan: &Lan) -> SocketAddr {
    ip_lines(&format!(
        "addr add {FURTHER4}/24 dev br-lan\n\
         addr add 2001:db8:4::1/64 dev br-lan nodad\n\
         addr add {FURTHER6}/64 dev br-lan nodad\n",
    ));
    lan.client(1).run(|| {
        ip_lines(&format!(
            "addr flush dev eth0 scope global\n\
             addr add 198.51.101.11/24 dev eth0\n\
             addr add 2001:db8:5::11/64 dev eth0 nodad\n\
             route add default via {FURTHER4}\n\
             route replace default via {FURTHER6} dev eth0\n",
        ));
    });
    let text = output("ip", &["-6", "-o", "addr", "show", "br-lan"]);
    let local = text.split([' ', '/']).find(|word| word.starts_with("fe80:"));
    let local = local.expect("a link-local address").parse().expect("an address");
    let far = interface_index_of(lan.client(1), "eth0");
    let local = SocketAddr::V6(SocketAddrV6::new(local, 53, 0, far));
    let passed = || lan.ask_within(1, Proto::Icmp, local, SILENCE) != "nobody";
    assert!(wait_until(PATIENCE, passed), "no way to {local}");
    local
}

/// Where the clients' interface has several addresses, such a resolver answers each client from the
/// one that leads to it, whichever it was asked by.
#[test]
fn dns_of_clients_in_several_subnets() {
    let (ground, mut world) = scene!("gwsubnets");
    let lan = Lan::new(&ground);
    let link_local = second_subnet(&lan);
    let resolvers: [(&str, &[&str]); 3] = [
        ("on ::", &["::"]),
        ("on 0.0.0.0", &["0.0.0.0"]),
        ("on each address", &[LAN4, LAN6, FURTHER4, "2001:db8:4::1", FURTHER6]),
    ];
    for (which, at) in resolvers {
        let both = at.iter().flat_map(|at| BOTH.map(|proto| (*at, proto)));
        let serve = |(at, proto)| Client::new(&ground.root, proto, addr(ip(at), 1053)).serve();
        let _resolver: Vec<Running> = both.map(serve).collect();
        for hijack_local in ["", "dns-hijack-local = yes\n"] {
            let config = format!(
                "[tproxy mihomo]\nport = 7893\ndns-hijack = 127.0.0.1:1053\n\
                 dns-hijack = [::1]:1053\ndns-hijack-tcp = yes\n{hijack_local}\
                 [gateway lan]\ninterface = br-lan\ntarget = mihomo\n"
            );
            let daemon = Daemon::start(&ground, &config, &[]);
            world.wire.packets();

            let own = [FURTHER4, FURTHER6, LAN4, LAN6].map(ip);
            let own = own.into_iter().filter(|_| !hijack_local.is_empty());
            let mut asked: Vec<_> = REMOTES.into_iter().chain(own).map(|ip| addr(ip, 53)).collect();
            asked.extend(Some(link_local).filter(|_| !hijack_local.is_empty() && which == "on ::"));
            asked.retain(|to| which != "on 0.0.0.0" || to.is_ipv4());
            for to in asked {
                for proto in BOTH {
                    for i in if to == link_local { 1..2 } else { 0..2 } {
                        let who = lan.ask(i, proto, to);
                        assert_eq!(who, "service", "{which}, {hijack_local}{proto:?} {to} by {i}");
                    }
                }
            }
            assert_eq!(world.wire.to_remote(), []);
            assert!(daemon.stop().success());
        }
    }
}

fn interface_index_of(net: &Netns, name: &str) -> u32 {
    net.run(|| crate::world::interface_index(name))
}

/// What a client can send of a protocol: a packet that begins a flow, and one that answers it.
const KINDS: [c_int; 3] = [libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_ICMP];

/// A raw socket of such a protocol, in the family of `at`, that sends from there, whoever's that is.
fn raw_at(at: IpAddr, protocol: c_int) -> UdpSocket {
    let (family, protocol) = match (at, protocol) {
        (IpAddr::V4(_), protocol) => (libc::AF_INET, protocol),
        (IpAddr::V6(_), libc::IPPROTO_ICMP) => (libc::AF_INET6, libc::IPPROTO_ICMPV6),
        (IpAddr::V6(_), protocol) => (libc::AF_INET6, protocol),
    };
    // SAFETY: integers only; the descriptor is new, hence ours.
    let fd = unsafe {
        let fd = libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol);
        assert!(fd >= 0, "a raw socket: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    match at {
        IpAddr::V4(_) => set(&fd, libc::SOL_IP, libc::IP_TRANSPARENT, 1),
        IpAddr::V6(_) => set(&fd, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1),
    }
    bind_at(&fd, addr(at, 0));
    let socket = UdpSocket::from(fd);
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket
}

/// What is sent there: from port 80 to 5000 and back, or a ping and its answer. Nobody asks for the
/// checksums (`nf_conntrack_checksum`).
fn raw_packet(ip: IpAddr, protocol: c_int, answer: bool) -> Vec<u8> {
    let (from, to) = if answer { (5000u16, 80u16) } else { (80, 5000) };
    let ports = [from.to_be_bytes(), to.to_be_bytes()].concat();
    let rest: &[u8] = match (protocol, answer) {
        // an acknowledgement: of a connection that conntrack has not seen begin
        (libc::IPPROTO_TCP, _) => &[0, 0, 0, 9, 0, 0, 0, 9, 0x50, 0x10, 16, 0, 0, 0, 0, 0],
        (libc::IPPROTO_UDP, _) => &[0, 8, 0, 0],
        _ => {
            let kind = match (ip, answer) {
                (IpAddr::V4(_), false) => 8,
                (IpAddr::V4(_), true) => 0,
                (IpAddr::V6(_), false) => 128,
                (IpAddr::V6(_), true) => 129,
            };
            // of IPv6 the kernel makes the checksum
            let sum = if kind == 8 { [0xf7, 0xf5] } else { [0xff, 0xf5] };
            return [&[kind, 0][..], &sum, &[0, 9, 0, 1]].concat();
        }
    };
    [&ports[..], rest].concat()
}

/// What the second client sends as an answer to a packet that it had sent to itself, of one protocol
/// and in the name of one remote host.
struct Prepared {
    protocol: c_int,
    client: IpAddr,
    remote: IpAddr,
    own: UdpSocket,
}

impl Prepared {
    /// One for each protocol and family.
    fn all(lan: &Lan) -> Vec<Prepared> {
        let clients = [ip("198.51.100.11"), ip("2001:db8:3::11")];
        let pairs = || clients.into_iter().zip(REMOTES);
        let kinds = KINDS.into_iter().flat_map(|kind| pairs().map(move |pair| (kind, pair)));
        let of = |(protocol, (client, remote))| {
            let own = lan.client(1).run(|| raw_at(client, protocol));
            Prepared { protocol, client, remote, own }
        };
        kinds.map(of).collect()
    }

    /// The first client speaks in the remote host's name, by this host.
    fn prepare(&self, lan: &Lan) {
        let speaker = lan.client(0).run(|| raw_at(self.remote, self.protocol));
        let packet = raw_packet(self.remote, self.protocol, false);
        speaker.send_to(&packet, addr(self.client, 0)).expect("speak");
        let heard = || again(|| self.own.recv_from(&mut [0; 64])).expect("it comes by us").1.ip();
        while heard() != self.remote {}
    }

    fn answer(&self) {
        let packet = raw_packet(self.remote, self.protocol, true);
        let _ = self.own.send_to(&packet, addr(self.remote, 0));
    }

    /// Asserts that each has been seen outside.
    #[track_caller]
    fn assert_said(said: &[Packet]) {
        for proto in [Proto::Tcp, Proto::Udp, Proto::Icmp] {
            for remote in REMOTES {
                let is = |p: &Packet| p.proto == proto && p.dst.ip() == remote;
                assert!(said.iter().any(is), "{proto:?} {remote} goes directly: {said:?}");
            }
        }
    }
}

/// A second link of the first client, `eth1` there, with these addresses of this host.
fn second_link(lan: &Lan, name: &str, own: [&str; 2]) {
    ip_lines(&format!(
        "link add {name} type veth peer name eth1 netns {}\nlink set {name} up\n\
         addr add {}/24 dev {name}\naddr add {}/64 dev {name} nodad\n",
        lan.client(0).path(),
        own[0],
        own[1]
    ));
}

/// A client that has one packet sent to it, by this host and by whoever is in its LAN, in the name of
/// who it wants to speak to, may do so while its target is `direct`, or while no section is for the one
/// who sends it. What it says afterwards is no answer.
#[test]
fn no_answer_is_prepared() {
    let (ground, mut world) = scene!("gwprepared");
    let lan = Lan::new(&ground);
    let side = ["198.51.103.1", "2001:db8:7::1"];
    second_link(&lan, "side", side);
    whatever_the_source(&["all", "br-lan", "side"]);
    sysctl("net/netfilter/nf_conntrack_checksum", "0");
    lan.client(0).run(|| {
        let lines = "link set eth1 up\naddr add 198.51.103.10/24 dev eth1\n\
                     addr add 2001:db8:7::10/64 dev eth1 nodad\n";
        ip_lines(lines);
    });
    let speak_by = |interface: &str, gates: [&str; 2]| {
        let lines = format!(
            "route replace 198.51.100.11 via {} dev {interface}\n\
             route replace 2001:db8:3::11 via {} dev {interface}\n",
            gates[0], gates[1]
        );
        lan.client(0).run(|| ip_lines(&lines));
    };
    let prepared = Prepared::all(&lan);
    // what is known of the one before may come first
    let say = || (0..3).for_each(|_| prepared.iter().for_each(Prepared::answer));
    let sourced = "source = 198.51.100.0/24\nsource = 2001:db8:3::/64\n";
    let mut wrong = Vec::new();
    for (name, outlet) in [
        ("drop", ""),
        ("mihomo", "[tproxy mihomo]\nport = 7893\n"),
        ("vpn", "[route vpn]\ninterface = none\n"),
        ("plain", "[route plain]\ntable = 1000\n"),
    ] {
        for (interface, gates, sources, before) in [
            ("eth0", [LAN4, LAN6], "", "direct"),
            ("eth0", [LAN4, LAN6], sourced, "direct"),
            ("eth0", [LAN4, LAN6], sourced, name),
            ("eth1", side, "", "direct"),
        ] {
            let config = |target: &str| {
                format!(
                    "{outlet}[gateway lan]\ninterface = br-lan\ninterface = side\n\
                     {sources}target = {target}\n"
                )
            };
            speak_by(interface, gates);
            forget_flows();
            let mut daemon = Daemon::start(&ground, &config(before), &[]);
            prepared.iter().for_each(|one| one.prepare(&lan));
            world.wire.packets();
            if before == "direct" {
                say();
                Prepared::assert_said(&world.wire.to_remote());
                daemon.reconfigure(&config(name));
            }

            let mut say_more = |when: &str| {
                world.wire.packets();
                say();
                let said = world.wire.to_remote();
                let said = if name == "mihomo" { but_pings(said) } else { said };
                if let Some(said) = said.first() {
                    wrong.push(format!("{before} to {name}, {sources:?}, {when}: {said:?}"));
                }
            };
            say_more("begun");
            for leave in [Daemon::kill9 as fn(Daemon), Daemon::leave] {
                leave(daemon);
                say_more("between two daemons");
                daemon = Daemon::start(&ground, &config(name), &[]);
                say_more("after a restart");
            }
            daemon.stop_clean();
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The first client gets addresses to which answers go by a link of their own, and sends by the LAN as
/// ever.
fn answers_go_another_way(lan: &Lan, ground: &Ground) {
    second_link(lan, "back", ["198.51.102.1", "2001:db8:6::1"]);
    whatever_the_source(&["all", "br-lan"]);
    lan.client(0).run(|| {
        whatever_the_source(&["all", "eth1"]);
        let (own4, own6) = ("198.51.102.10", "2001:db8:6::10");
        ip_lines(&format!(
            "addr add {own4}/32 dev eth1\naddr add {own6}/128 dev eth1 nodad\nlink set eth1 up\n\
             route add 198.51.102.1 dev eth1\nroute add 2001:db8:6::1 dev eth1\n\
             route replace default via {LAN4} src {own4}\n\
             route replace default via {LAN6} dev eth0 src {own6}\n\
             route replace 198.51.100.11 via {LAN4} src {own4}\n\
             route replace 2001:db8:3::11 via {LAN6} dev eth0 src {own6}\n"
        ));
    });
    ground.outside(|| {
        let lines = "route add 198.51.102.0/24 via 192.0.2.1\n\
                     route add 2001:db8:6::/64 via 2001:db8:1::1\n";
        ip_lines(lines);
    });
}

/// A client that answers reach by another way than it sends by: what it sends goes where its section
/// says, and it reaches what serves it, here and in its LAN.
#[test]
fn clients_whose_answers_go_another_way() {
    let (ground, _world, _proxy) = scene!("gwasym", proxy);
    let lan = Lan::new(&ground);
    answers_go_another_way(&lan, &ground);
    let _own = Server::start("own", &[8080]);
    let _other = lan.client(1).run(|| Server::start("other", &[8080]));
    let own = [ip(LAN4), ip(LAN6), HOST4, HOST6].map(|ip| addr(ip, 8080));
    let other = ["198.51.100.11", "2001:db8:3::11"].map(|of| addr(ip(of), 8080));
    let remote = REMOTES.map(|ip| addr(ip, 80));
    let config = |spared: &str, target: &str| {
        format!(
            "{spared}[tproxy mihomo]\nport = 7893\n[gateway lan]\ninterface = br-lan\n\
             target = {target}\n[gateway guests]\ninterface = guests\ntarget = drop\n"
        )
    };
    let daemon = Daemon::start(&ground, &config("", "direct"), &[]);
    let spared = "[global]\nbypass = 198.51.100.0/22\nbypass = 2001:db8:3::/64\n\
                  bypass = 2001:db8:6::/64\n";
    let mut wrong = Vec::new();
    let mut expect = |target: &str, to: &[SocketAddr], who: &str| {
        let time = if who == "nobody" { SILENCE } else { PATIENCE };
        for (proto, to) in BOTH.into_iter().flat_map(|proto| to.iter().map(move |to| (proto, *to)))
        {
            let want = if who == "nobody" { who.to_owned() } else { format!("{who} {to}") };
            let who = lan.ask_within(0, proto, to, time);
            if who != want {
                wrong.push(format!("{target}: {proto:?} {to}: {who}, not {want}"));
            }
        }
    };
    let mut all_expected = |target: &str, who: &str| {
        expect(target, &remote, who);
        expect(target, &own, "own");
        expect(target, &other, "other");
    };
    all_expected("direct", "remote");
    for (spared, target, who) in [
        ("", "direct", "remote"),
        (spared, "mihomo", PROXY),
        (spared, "drop", "nobody"),
        ("", "direct", "remote"),
    ] {
        daemon.reconfigure(&config(spared, target));
        all_expected(target, who);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// On a host where conntrack begins with the table, the first packet that it sees of an older connection
/// may be the remote host's: a client's are no answers for that, nor a container's.
#[test]
fn connections_older_than_the_daemon_are_cut() {
    let targets = ["drop", "mihomo", "vpn"];
    for (target, boxed) in targets.iter().flat_map(|target| [(target, false), (target, true)]) {
        let (ground, mut world, _proxy) = scene!("gwolder", proxy);
        let lan = Lan::new(&ground);
        tunnel_up(&ground);
        let cgroup = ground.cgroup("/box");
        let _boxed = boxed.then(|| live(lan.client(0), &cgroup));
        let mut flows = [REMOTE4, REMOTE6].map(|ip| {
            let at = addr(ip, 8080);
            let far = ground.outside(|| TcpListener::from(bind(at, libc::SOCK_STREAM)));
            // SAFETY: an open socket.
            assert_eq!(unsafe { libc::listen(far.as_raw_fd(), 8) }, 0);
            let own = lan.client(0).run(|| TcpStream::connect(at).expect("connect"));
            (own, far.accept().expect("accept").0)
        });
        let decides = match boxed {
            true => format!("[rules]\n{target} = /box\n"),
            false => format!("[gateway lan]\ninterface = br-lan\ntarget = {target}\n"),
        };
        let policy = "[tproxy mihomo]\nport = 7893\n[route vpn]\ninterface = vpn0\n";
        let daemon = Daemon::start(&ground, &format!("{policy}{decides}"), &[]);
        world.wire.packets();

        for (own, remote) in &mut flows {
            remote.write_all(b"from remote").expect("write");
            own.set_read_timeout(Some(SILENCE)).expect("set a timeout");
            let _ = own.read(&mut [0; 16]);
            (0..3).for_each(|_| drop(own.write(b"to remote")));
        }

        let mut left = world.wire.to_remote();
        left.retain(|packet| packet.proto == Proto::Tcp && packet.flags & RST == 0);
        assert_eq!(left, [], "{target}, a container: {boxed}");
        assert!(daemon.stop().success());
    }
}
