//! Where packets end up: who answers, with which original destination, and what leaves the host.

use std::collections::BTreeSet;
use std::net::{SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::client::{
    answers, expect, expect_as, under, Client, Outcome, Proto, AT_ONCE, CASES, PATIENCE, SILENCE,
};
use crate::daemon::{by_default, Daemon, POLICY};
use crate::ground::{addr, ip, ip_lines, sh, Ground, GATE6, HOST4, HOST6, REMOTE4, REMOTE6};
use crate::kernel::{await_connection, await_member, ip_rules, load, output};
use crate::routes::{tunnel_up, GATEWAYS};
use crate::wait_until;
use crate::world::{interface_index, Packet, Server, World, PROXY, RST, STREAM_PORT, SYN};

/// Asserts who answers a request from `cgroup`.
#[track_caller]
fn check(proto: Proto, cgroup: &Path, to: SocketAddr, want: &str) {
    let patience = if want == "nobody" { SILENCE } else { PATIENCE };
    let who = Client::new(cgroup, proto, to).timeout(patience).run().who();
    assert_eq!(who, want, "{proto:?} {to} from {cgroup:?}");
}

const MATRIX: &str = "
[tproxy mihomo]
port = 7893
[rules]
mihomo = /drop/child/proxied
drop   = /proxied/child/dropped
direct = /.*/child/free
drop   = /direct/child/dropped
direct = /direct
drop   = /drop
mihomo = /proxied
direct = /drop/child/late
mihomo = /services/mihomo
";

/// Each cgroup of the matrix, with the target that decides.
const MATRIX_CGROUPS: [(&str, &str); 17] = [
    ("/direct", "direct"),
    ("/direct/child", "direct"),
    ("/direct/child/dropped", "drop"),
    ("/drop", "drop"),
    ("/drop/child", "drop"),
    ("/drop/child/proxied", PROXY),
    ("/drop/child/free", "direct"),
    ("/drop/child/late", "drop"),
    ("/proxied", PROXY),
    ("/proxied/child", PROXY),
    ("/proxied/child/dropped", "drop"),
    ("/proxied/child/free/deeper/still", "direct"),
    ("/", "direct"),
    ("/unmatched/child", "direct"),
    ("/services/mihomo/instance1", PROXY),
    ("/services/mihomo-helper", "direct"),
    ("/x/services/mihomo", "direct"),
];

/// Nothing of a dropped cgroup leaves, and of a proxied one only pings.
fn check_matrix(ground: &Ground, world: &mut World) {
    let cgroups = MATRIX_CGROUPS.map(|(path, target)| (ground.at(path), target));
    for target in ["drop", PROXY, "direct"] {
        let these = cgroups.iter().filter(|c| c.1 == target);
        let these: Vec<_> = these.map(|c| (c.0.as_path(), under(c.1))).collect();
        expect(&these);
        let mut left = world.wire.to_remote();
        match target {
            "drop" => assert_eq!(left, [], "left a dropped cgroup"),
            "direct" => assert!(left.len() > 6 * these.len()),
            _ => {
                left.retain(|p| p.proto != Proto::Icmp);
                assert_eq!(left, [], "left a proxied cgroup");
            }
        }
    }
}

/// A cgroup that is older than the daemon goes the way of the first rule that covers it.
#[test]
fn matrix_of_cgroups_that_exist() {
    let (ground, mut world, _proxy) = scene!("matrix", proxy);
    ground.cgroups(MATRIX_CGROUPS.map(|(path, _)| path));

    let _daemon = Daemon::start(&ground, MATRIX, &[]);

    check_matrix(&ground, &mut world);
}

/// So does one that is made while the daemon runs.
#[test]
fn matrix_of_cgroups_made_later() {
    let (ground, mut world, _proxy) = scene!("later", proxy);
    let _daemon = Daemon::start(&ground, MATRIX, &[]);

    ground.cgroups(MATRIX_CGROUPS.map(|(path, _)| path));

    // Those whose target differs from the parent's; every other cgroup inherits.
    for (path, target) in [
        ("/direct/child/dropped", "drop"),
        ("/drop", "drop"),
        ("/drop/child/proxied", "mihomo"),
        ("/drop/child/free", "direct"),
        ("/proxied", "mihomo"),
        ("/proxied/child/dropped", "drop"),
        ("/proxied/child/free", "direct"),
        ("/services/mihomo", "mihomo"),
    ] {
        await_member(&ground.at(path), target);
    }
    check_matrix(&ground, &mut world);
}

/// A tproxy `tN` on port 7000 + N with each of these keys, for the cgroup `/tN`: the configuration,
/// the cgroups, and the proxy that listens on all these ports.
fn tproxies<const N: usize>(ground: &Ground, keys: [&str; N]) -> (String, [PathBuf; N], Server) {
    let ports: Vec<u16> = (7000..).take(N).collect();
    let mut targets = String::new();
    let mut rules = "[rules]\n".to_owned();
    for (i, keys) in keys.iter().enumerate() {
        targets += &format!("[tproxy t{i}]\nport = {}\n{keys}\n", ports[i]);
        rules += &format!("t{i} = /t{i}\n");
    }
    let cgroups = std::array::from_fn(|i| ground.cgroup(&format!("/t{i}")));
    (targets + &rules, cgroups, Server::start(PROXY, &ports))
}

/// What a tproxy leaves alone leaves this host as it is, and what it drops does not leave; ping is left
/// alone whatever the setting.
#[test]
fn parts_that_a_tproxy_leaves_alone_or_drops() {
    let (ground, mut world) = scene!("parts");
    // TCP over IPv4 and IPv6, UDP over both
    let (p, r, n) = (PROXY, "remote", "nobody");
    let parts = [
        ("tcp = no", [r, r, p, p]),
        ("tcp = drop", [n, n, p, p]),
        ("udp = no", [p, p, r, r]),
        ("udp = drop", [p, p, n, n]),
        ("ipv4 = no", [r, p, r, p]),
        ("ipv4 = drop", [n, p, n, p]),
        ("ipv6 = no", [p, r, p, r]),
        ("ipv6 = drop", [p, n, p, n]),
        ("tcp = no\nudp = drop", [r, r, n, n]),
        ("ipv6 = no\nipv4 = drop", [n, r, n, r]),
        // What is to be dropped in one respect must not leave by another.
        ("tcp = no\nipv6 = drop", [r, n, p, n]),
        ("ipv4 = no\nudp = drop", [r, p, n, n]),
        ("tcp = yes", [p, p, p, p]),
    ];
    let (config, cgroups, _proxies) = tproxies(&ground, parts.map(|(keys, _)| keys));
    let _daemon = Daemon::start(&ground, &config, &[]);

    for ((keys, who), cgroup) in parts.into_iter().zip(&cgroups) {
        println!("{keys:?}");
        let [a, b, c, d] = who;
        expect(&[(cgroup, answers([a, b, c, d, r, r]))]);
        // what the remote does not answer has not been sent to it either
        let left = world.wire.to_remote();
        for (who, (proto, ip)) in who.into_iter().zip(CASES) {
            let any = left.iter().any(|p| p.proto == proto && p.dst.ip() == ip);
            assert_eq!(any, who == r, "{keys}: {proto:?} {ip} {left:?}");
        }
    }
}

/// What goes to a bypassed destination is left alone, also in a cgroup that is dropped.
#[test]
fn bypass_destinations() {
    let (ground, _world, _proxy) = scene!("bypass", proxy);
    // More of the world answers.
    ground.outside(|| {
        let extra = ["10.9.9.9", "172.16.9.9", "192.168.9.9", "100.64.9.9", "fd00:9::9"];
        ip_lines(&extra.map(|a| format!("route add local {a} dev lo\n")).concat());
    });
    let config = format!(
        "[global]
         bypass = 203.0.113.96/28
         bypass = 203.0.113.100
         bypass = 203.0.113.104/29
         bypass = 2001:db8:2::ff00/120
         bypass = private
         {POLICY}"
    );
    let [proxied, dropped] = ground.cgroups(["/proxied", "/drop"]);
    let _daemon = Daemon::start(&ground, &config, &[]);

    for (to, bypassed) in [
        ("203.0.113.95", false),
        ("203.0.113.96", true),
        ("203.0.113.100", true),
        ("203.0.113.111", true),
        ("203.0.113.112", false),
        ("2001:db8:2::feff", false),
        ("2001:db8:2::ff00", true),
        ("2001:db8:2::ffff", true),
        ("2001:db8:2::1:0", false),
        ("10.9.9.9", true),
        ("172.16.9.9", true),
        ("192.168.9.9", true),
        ("100.64.9.9", true),
        ("fd00:9::9", true),
    ] {
        let to = addr(ip(to), 80);
        let by = |name| format!("{name} {to}");
        let [of_proxied, of_dropped] = match bypassed {
            true => [by("remote"), by("remote")],
            false => [by(PROXY), "nobody".to_owned()],
        };
        check(Proto::Udp, &proxied, to, &of_proxied);
        check(Proto::Udp, &dropped, to, &of_dropped);
        check(Proto::Tcp, &proxied, to, &of_proxied);
    }
}

/// Whether a datagram from `cgroup` to `to` gets as far as the wire.
fn reaches_wire(world: &mut World, cgroup: &Path, to: SocketAddr) -> bool {
    world.wire.packets();
    Client::udp(cgroup, to).timeout(Duration::from_millis(1)).run();
    world.wire.packets().iter().any(|p| (p.dst.ip(), p.dst.port()) == (to.ip(), to.port()))
}

/// What is meant for the link or for many is nobody's to take, also in a cgroup that is dropped.
#[test]
fn multicast_broadcast_and_link_local_are_left_alone() {
    let (ground, mut world, _proxy) = scene!("multicast", proxy);
    let cgroups = ground.cgroups(["/proxied", "/drop"]);
    ip_lines("neigh add fe80::9 lladdr 02:00:00:00:00:02 dev in0\n");
    let _daemon = Daemon::start(&ground, POLICY, &[]);

    for cgroup in &cgroups {
        assert!(!reaches_wire(&mut world, cgroup, addr(REMOTE4, 5353)));
        for to in ["224.0.0.251", "239.1.2.3", "255.255.255.255", "192.0.2.255", "169.254.9.9"] {
            let to = addr(ip(to), 5353);
            assert!(reaches_wire(&mut world, cgroup, to), "{to} from {cgroup:?}");
        }
        for to in ["ff02::fb", "ff0e::1", "fe80::9"] {
            let to = to.parse().expect("an address");
            let to = SocketAddrV6::new(to, 5353, 0, interface_index("in0"));
            assert!(reaches_wire(&mut world, cgroup, to.into()), "{to} from {cgroup:?}");
        }
    }
}

/// What carries a bypass mark is left alone, also in a cgroup that is dropped: the whole value, or the
/// bits of its mask.
#[test]
fn bypass_marks() {
    let (ground, _world, _proxy) = scene!("bymark", proxy);
    let config = format!("[global]\nbypass-mark = 0xff\nbypass-mark = 0x100/0x100\n{POLICY}");
    let [proxied, dropped] = ground.cgroups(["/proxied", "/drop"]);
    let _daemon = Daemon::start(&ground, &config, &[]);

    for (mark, left_alone) in [(0, false), (0xfe, false), (0xff, true), (0x1fe, true)] {
        println!("mark {mark:#x}");
        let [a, b] = if left_alone { ["direct"; 2] } else { [PROXY, "drop"] };
        let cases = [(proxied.as_path(), under(a)), (&dropped, under(b))];
        expect_as(|client| client.mark(mark), &cases);
    }
}

/// What a bypass user sends is left alone, whichever way the user is named.
#[test]
fn bypass_users() {
    let (ground, _world, _proxy) = scene!("byuser", proxy);
    // By name (uid 1 wherever there is a passwd file) and by number.
    let config = format!("[global]\nbypass-user = daemon\nbypass-user = 4711\n{POLICY}");
    let [proxied, dropped] = ground.cgroups(["/proxied", "/drop"]);
    let _daemon = Daemon::start(&ground, &config, &[]);

    for (uid, left_alone) in [(0, false), (1, true), (4710, false), (4711, true), (4712, false)] {
        println!("uid {uid}");
        let [a, b] = if left_alone { ["direct"; 2] } else { [PROXY, "drop"] };
        let cases = [(proxied.as_path(), under(a)), (&dropped, under(b))];
        expect_as(|client| client.uid(uid), &cases);
    }
}

/// A service in `cgroup`, asked from outside: who answers over TCP and UDP, IPv4 and IPv6.
fn ask_service(ground: &Ground, cgroup: &Path) -> Vec<String> {
    let mut who = Vec::new();
    for host in [HOST4, HOST6] {
        for proto in [Proto::Tcp, Proto::Udp] {
            let to = addr(host, 8080);
            let service = Client::new(cgroup, proto, to);
            let _service = service.serve();
            let client = Client::new(&ground.root, proto, to);
            who.push(ground.outside(|| client.run()).who());
        }
    }
    who
}

/// A service answers whoever asks it, whatever its cgroup and the default; it cannot begin a
/// conversation for all that.
#[test]
fn services_stay_reachable() {
    let (ground, mut world, _proxy) = scene!("services", proxy);
    let cgroups = ground.cgroups(["/drop", "/proxied", "/direct"]);
    for default in ["direct", "drop", "mihomo"] {
        let _daemon = Daemon::start(&ground, &by_default(default), &[]);

        for cgroup in &cgroups {
            assert_eq!(ask_service(&ground, cgroup), ["service"; 4], "default = {default}");
        }
        // among processes of this host, whatever the address
        let _local = Server::start("local", &[8081]);
        for host in [HOST4, HOST6, ip("127.0.0.1"), ip("::1")] {
            let to = addr(host, 8081);
            check(Proto::Tcp, &cgroups[0], to, &format!("local {to}"));
            check(Proto::Udp, &cgroups[0], to, &format!("local {to}"));
        }
        world.wire.packets();
        expect(&[(&cgroups[0], under("drop"))]);
        assert_eq!(world.wire.to_remote(), []);
    }
}

/// DNS goes to the resolver of its target, for the families and the protocols that this names, also
/// where the target takes nothing else; all else goes the target's way.
#[test]
fn dns_hijack() {
    let (ground, _world) = scene!("hijack");
    let _dns = Server::start("dns local", &[1053]);
    let _far = ground.outside(|| Server::start("dns far", &[5353]));
    let both = "dns-hijack = 127.0.0.1:1053\ndns-hijack = [::1]:1053\ndns-hijack-tcp = yes\n";
    let keys = [
        both,
        "dns-hijack = 127.0.0.1:1053",
        &format!("{both}udp = no\ntcp = no"),
        "dns-hijack = 203.0.113.53:5353\ndns-hijack = [2001:db8:2::53]:5353",
    ];
    let (config, targets, _proxies) = tproxies(&ground, keys);
    let other = ground.cgroup("/other");
    let _daemon = Daemon::start(&ground, &config, &[]);

    let asked = [
        (Proto::Udp, addr(REMOTE4, 53)),
        (Proto::Udp, addr(REMOTE6, 53)),
        (Proto::Tcp, addr(REMOTE4, 53)),
        (Proto::Tcp, addr(REMOTE6, 53)),
        (Proto::Udp, addr(REMOTE4, 80)),
        (Proto::Tcp, addr(REMOTE4, 80)),
    ];
    let (dns4, dns6) = ("dns local 127.0.0.1:1053", "dns local [::1]:1053");
    let (far4, far6) = ("dns far 203.0.113.53:5353", "dns far [2001:db8:2::53]:5353");
    let (p, r) = (PROXY, "remote");
    let answered = [
        [dns4, dns6, dns4, dns6, p, p],
        [dns4, p, p, p, p, p],
        [dns4, dns6, dns4, dns6, r, r],
        [far4, far6, p, p, p, p],
        [r; 6],
    ];
    for (cgroup, answered) in targets.iter().chain([&other]).zip(answered) {
        for ((proto, to), want) in asked.into_iter().zip(answered) {
            match want {
                "remote" | PROXY => check(proto, cgroup, to, &format!("{want} {to}")),
                _ => check(proto, cgroup, to, want),
            }
        }
    }
}

/// What is asked of a loopback address comes from one, which a resolver on another host does not answer, but
/// by a route over IPv4; `check` and `status` say so where that is whom this host asks.
#[test]
fn dns_hijack_to_another_host_of_what_is_asked_here() {
    let (ground, _world) = scene!("loopdns");
    tunnel_up(&ground);
    ip_lines(
        "route add default via 192.0.2.2 table 1000\n\
         route add default via 2001:db8:1::2 dev in0 table 1000\n",
    );
    let etc = ground.dir.join("etc");
    std::fs::create_dir(&etc).expect("make a directory");
    sh(&format!("mount --bind {} /etc", etc.display()));
    let _local = Server::start("local", &[53, 1053]);
    let cgroup = ground.cgroup("/x");
    let far = ["203.0.113.53", "[2001:db8:2::53]"];
    let tunnel = format!("[route x]\ninterface = vpn0\n{GATEWAYS}");
    for (head, to, answered) in [
        ("[tproxy x]\nport = 7893\n", far, [false, false]),
        (&tunnel, far, [true, false]),
        (&format!("{tunnel}masquerade = no\n"), far, [false, false]),
        ("[route x]\ntable = 1000\n", far, [false, false]),
        ("[route x]\ntable = 1000\nmasquerade = yes\n", far, [false, false]),
        ("[tproxy x]\nport = 7893\n", ["127.0.0.1:1053", "[::1]:1053"], [true, true]),
        ("[tproxy x]\nport = 7893\n", ["192.0.2.1:1053", "[2001:db8:1::1]:1053"], [true, true]),
    ] {
        let config = format!(
            "{head}dns-hijack = {}\ndns-hijack = {}\ndns-hijack-tcp = yes\n\
             dns-hijack-local = yes\n[rules]\nx = /x\n",
            to[0], to[1]
        );
        let daemon = Daemon::start(&ground, &config, &[]);
        let cases = [("127.0.0.53", answered[0]), ("::1", answered[1])];
        // from no loopback address
        let own = [("192.0.2.1", true), ("2001:db8:1::1", true)];
        let own = own.into_iter().filter(|_| !head.contains("masquerade = no"));
        for (asked, answered) in cases.into_iter().chain(own) {
            for proto in [Proto::Udp, Proto::Tcp] {
                let client = Client::new(&cgroup, proto, addr(ip(asked), 53));
                let client = if answered { client } else { client.timeout(SILENCE) };
                let outcome = client.run();
                let is = matches!(outcome, Outcome::Answer(_));
                assert_eq!(is, answered, "{config}{proto:?} {asked}: {outcome:?}");
            }
            let lines = format!("search lan\nnameserver {asked}\n");
            std::fs::write(etc.join("resolv.conf"), lines).expect("write it");
            for command in ["check", "status"] {
                let said = daemon.ask(&[command]).all();
                let tells = said.contains(&format!("/etc/resolv.conf names {asked}, and"));
                assert_eq!(tells, !answered, "{config}{asked}: {said}");
            }
        }
        assert!(daemon.stop().success());
    }
}

/// A resolver that does not care by which of this host's addresses it was asked (no IP_PKTINFO), and
/// applications that take an answer from nobody but whom they asked.
#[test]
fn dns_hijack_to_a_simple_resolver() {
    let (ground, _world, _proxy) = scene!("simple", proxy);
    let cgroup = ground.cgroup("/proxied");
    let any = |family: &str| ip(if family == "v4" { "0.0.0.0" } else { "::" });
    // for each family a socket of its own, or one for both
    for sockets in [&["v4"][..], &["v6"]] {
        let serve = |family: &&str| {
            let at = addr(any(family), 1053);
            let server = |proto| Client::new(&ground.root, proto, at).serve();
            [Proto::Udp, Proto::Tcp].map(server)
        };
        let _resolver: Vec<_> = sockets.iter().map(serve).collect();
        for local in ["", "dns-hijack-local = yes\n"] {
            let here = ["dns-hijack = 127.0.0.1:1053\n", "dns-hijack = [::1]:1053\n"];
            let here = &here[..if sockets == ["v4"] { 1 } else { 2 }];
            let config = format!(
                "[tproxy mihomo]\nport = 7893\n{}dns-hijack-tcp = yes\n{local}\
                 [rules]\nmihomo = /proxied\n",
                here.concat()
            );
            let daemon = Daemon::start(&ground, &config, &[]);

            let remote = [REMOTE4, REMOTE6];
            let own = [HOST4, ip("127.0.0.1"), ip("127.0.0.53"), HOST6, ip("::1")];
            let asked = remote.iter().chain(own.iter().filter(|_| !local.is_empty()));
            for to in asked.filter(|to| to.is_ipv4() || here.len() == 2) {
                for proto in [Proto::Udp, Proto::Tcp] {
                    for _ in 0..3 {
                        check(proto, &cgroup, addr(*to, 53), "service");
                    }
                }
            }
            assert!(daemon.stop().success());
        }
    }
}

/// Without dns-hijack-local, a resolver of this host or behind a bypassed address is asked as ever.
#[test]
fn dns_of_this_host_and_of_bypassed_addresses_is_left_alone() {
    let (ground, _world) = scene!("nohijack");
    let _dns = Server::start("dns local", &[1053]);
    let _own = Server::start("own", &[53]);
    let config = "
        [global]
        bypass = 203.0.113.64/26
        [tproxy mihomo]
        port = 7893
        dns-hijack = 127.0.0.1:1053
        dns-hijack = [::1]:1053
        [rules]
        mihomo = /proxied
    ";
    let cgroup = ground.cgroup("/proxied");
    let _daemon = Daemon::start(&ground, config, &[]);

    check(Proto::Udp, &cgroup, addr(REMOTE4, 53), "dns local 127.0.0.1:1053");
    for (to, who) in [
        ("203.0.113.65", "remote 203.0.113.65:53"),
        ("192.0.2.1", "own 192.0.2.1:53"),
        ("127.0.0.1", "own 127.0.0.1:53"),
        ("::1", "own [::1]:53"),
    ] {
        check(Proto::Udp, &cgroup, addr(ip(to), 53), who);
    }
}

/// While the proxy is not there its traffic goes nowhere, and TCP is told so at once: neither out, nor to
/// this host's own listeners on the very ports that the clients dial.
#[test]
fn proxy_down() {
    let (ground, mut world) = scene!("down");
    let _local = Server::start("local", &[80, 443]);
    let config = "
        [tproxy any]
        port = 7001
        [tproxy named]
        port = 7002
        address = 127.0.0.1
        address = ::1
        [rules]
        any   = /any
        named = /named
    ";
    let cgroups = ground.cgroups(["/any", "/named"]);
    let _daemon = Daemon::start(&ground, config, &[]);

    for round in ["before it starts", "after it stops"] {
        for (cgroup, port) in cgroups.iter().zip([7001, 7002]) {
            for to in [REMOTE4, REMOTE6].map(|ip| addr(ip, 80)) {
                let (outcome, took) = Client::tcp(cgroup, to).spawn().wait();
                assert_eq!(outcome, Outcome::Refused, "{to} {round}");
                assert!(took < AT_ONCE, "refused after {took:?} {round}");
                assert_eq!(Client::udp(cgroup, to).timeout(SILENCE).run(), Outcome::Timeout);
            }
            assert_eq!(world.wire.to_remote(), [], "{round}");
            let _proxy = Server::start(PROXY, &[port]);
            expect(&[(cgroup, under(PROXY))]);
            world.wire.packets();
        }
    }
}

/// The TCP connections in `packets` that got as far as the wire: (opened, ended by a reset).
fn connections(packets: &[Packet]) -> (usize, usize) {
    let with = |flag| {
        let these = packets.iter().filter(move |p| p.flags & flag != 0);
        these.map(|p| p.src).collect::<BTreeSet<_>>()
    };
    (with(SYN).len(), with(SYN).intersection(&with(RST)).count())
}

/// Connections that the application closes early, while data arrives: `times` over each family.
fn close_early(cgroup: &Path, times: u32) {
    for ip in [REMOTE4, REMOTE6] {
        let client = Client::tcp(cgroup, addr(ip, STREAM_PORT)).close_early(times);
        assert_eq!(client.run(), Outcome::Answer(String::new()));
    }
    // Data on its way meets the closed sockets; that no more comes is announced by nothing.
    std::thread::sleep(Duration::from_millis(100));
}

/// What the kernel says for a socket that is gone goes to the proxy, not to the true destination, by
/// whichever way the flow became the proxy's.
#[test]
fn early_closes_send_nothing_to_the_true_destination() {
    let (ground, mut world) = scene!("early");
    let _proxy = Server::stream(PROXY, &[7893]);
    let cgroup = ground.cgroup("/proxied");
    for (default, of_default) in [("direct", 0), ("mihomo", 20)] {
        let daemon = Daemon::start(&ground, &by_default(default), &[]);

        close_early(&cgroup, 100);
        close_early(&ground.root, of_default);

        assert_eq!(world.wire.to_remote(), [], "default = {default}");
        assert!(daemon.stop().success());
    }
}

/// That of a direct flow reaches the peer, which would go on sending otherwise.
#[test]
fn early_closes_of_direct_flows_reach_their_peer() {
    let (ground, mut world) = scene!("reset");
    let _proxy = Server::stream(PROXY, &[7893]);
    let cgroup = ground.cgroup("/direct");
    for default in ["direct", "mihomo", "drop"] {
        let daemon = Daemon::start(&ground, &by_default(default), &[]);

        close_early(&cgroup, 20);

        let mut packets = Vec::new();
        wait_until(PATIENCE, || {
            packets.extend(world.wire.to_remote());
            connections(&packets) == (40, 40)
        });
        let (opened, reset) = connections(&packets);
        assert_eq!((opened, reset), (40, 40), "default = {default}: {packets:?}");
        assert!(daemon.stop().success());
    }
}

/// What no rule covers goes where the default says, the cgroup root and what is outside of it included;
/// what a rule covers goes its way.
#[test]
fn everything_by_default() {
    let (ground, mut world, _proxy) = scene!("default", proxy);
    let [direct, drop, proxied] = ground.cgroups(["/direct/child", "/drop", "/proxied"]);
    let [other, root] = ground.cgroups(["/other/child", "/"]);
    // of the test's own process
    let elsewhere = Path::new(crate::ground::CGROUPS);
    for (default, want) in [("drop", "drop"), ("mihomo", PROXY), ("direct", "direct")] {
        println!("default = {default}");
        let daemon = Daemon::start(&ground, &by_default(default), &[]);

        world.wire.packets();
        expect(&[(&other, under(want)), (&root, under(want)), (elsewhere, under(want))]);
        if want == "drop" {
            assert_eq!(world.wire.to_remote(), []);
        }
        expect(&[(&direct, under("direct")), (&drop, under("drop")), (&proxied, under(PROXY))]);
        assert!(daemon.stop().success());
    }
}

/// The kernel answers neighbour solicitations without a socket and without a tracked flow. Were
/// those answers dropped, the host would be lost to its own link.
#[test]
fn default_drop_keeps_the_host_on_its_link() {
    let (ground, _world) = scene!("ndp");
    let cgroup = ground.cgroup("/direct");
    let _daemon = Daemon::start(&ground, &by_default("drop"), &[]);

    ground.outside(|| {
        ip_lines("neigh del 2001:db8:1::1 dev out0\nneigh del 192.0.2.1 dev out0\n");
        for host in [HOST4, HOST6] {
            let who = Client::ping(&ground.root, host).run().who();
            assert_eq!(who, format!("echo {host}"));
        }
    });
    assert_eq!(Client::ping(&cgroup, GATE6).run().who(), format!("echo {GATE6}"));
}

/// Each target has its own proxy, by its port or by its address, whatever its name and mark.
#[test]
fn several_proxies() {
    let (ground, _world) = scene!("several");
    let _a = Server::start("proxy a", &[7001]);
    let _b = Server::start("proxy b", &[7002]);
    // `address` wins over any other listener of the port.
    let own = [HOST4, HOST6].map(|host| addr(host, 7003));
    let _own = Server::at("proxy own", &own);
    let lo = [ip("127.0.0.1"), ip("::1")].map(|host| addr(host, 7003));
    let _lo = Server::at("proxy lo", &lo);
    // Names that are nft keywords, and marks of the configuration's choice.
    let config = "
        [tproxy mark]
        port = 7001
        mark = 0x55000000
        [tproxy socket]
        port = 7002
        [tproxy own]
        port = 7003
        address = 192.0.2.1
        address = 2001:db8:1::1
        [tproxy lo]
        port = 7003
        address = 127.0.0.1
        address = ::1
        [rules]
        socket = /a/b
        mark   = /a
        own    = /own
        lo     = /lo
    ";
    let cgroups = ground.cgroups(["/a/b/c", "/a", "/own", "/lo"]);
    let _daemon = Daemon::start(&ground, config, &[]);

    for (cgroup, who) in cgroups.iter().zip(["proxy b", "proxy a", "proxy own", "proxy lo"]) {
        expect(&[(cgroup, under(who))]);
    }
}

/// Counts packets whose foreign mark bits are as another program has set them.
const WATCH: &str = "
table inet watch {
  chain tag {
    type filter hook output priority -199; policy accept;
    ct mark set ct mark or 0x00000077
  }
  chain see {
    type filter hook prerouting priority 0; policy accept;
    iif lo tcp dport 80 meta mark and 0x00ffffff == 0x00123456 counter comment \"kept\"
    iif lo tcp dport 80 meta mark and 0x00ffffff != 0x00123456 counter comment \"lost\"
    iif lo tcp dport 80 ct mark and 0x00ffffff == 0x00000077 counter comment \"ct kept\"
    iif lo tcp dport 80 ct mark and 0x00ffffff != 0x00000077 counter comment \"ct lost\"
  }
}
";

/// The bits outside fwmark-mask stay as others have set them, in the packet's mark and in the flow's.
#[test]
fn foreign_mark_bits_stay() {
    let (ground, _world, _proxy) = scene!("bits", proxy);
    let cgroup = ground.cgroup("/proxied");
    load(WATCH);
    let _daemon = Daemon::start(&ground, POLICY, &[]);

    expect_as(|client| client.mark(0x123456), &[(&cgroup, under(PROXY))]);

    let list = output("nft", &["list", "chain", "inet", "watch", "see"]);
    for line in list.lines().filter(|line| line.contains("counter")) {
        let none = line.contains("packets 0 ");
        assert_eq!(none, line.contains("lost"), "{list}");
    }
    assert_eq!(list.matches("counter").count(), 4, "{list}");
}

/// Traffic is proxied by whichever mask, route table and priority are configured.
#[test]
fn another_mask_and_table() {
    let (ground, _world, _proxy) = scene!("mask", proxy);
    let cgroup = ground.cgroup("/proxied");
    let config = format!(
        "[global]\nfwmark-mask = 0x0000ff00\nroute-table = 4711\nrule-priority = 77\n{POLICY}"
    );
    let _daemon = Daemon::start(&ground, &config, &[]);

    expect_as(|client| client.mark(0xab0000cd), &[(&cgroup, under(PROXY))]);
    for family in ["-4", "-6"] {
        let rules = ip_rules(family);
        let want = "77:\tfrom all fwmark 0x100/0xff00 iif lo lookup 4711 proto 99";
        assert!(rules.lines().any(|line| line.trim() == want), "{rules}");
    }
}

/// What becomes of a flow of `/app/child` when the rules (and the default) change from `old` to
/// `new`: who has served it to its end in good order, or None where it was cut, or silent for as
/// long as `patience`.
fn flow_over_reload(old: &str, new: &str, patience: Duration) -> Option<String> {
    let ground = Ground::new("change").expect("root, as the test has seen");
    let mut world = World::new(&ground);
    let far = ground.outside(|| Server::stream("far", &[9001]));
    let proxy = Server::stream(PROXY, &[7893]);
    let cgroup = ground.cgroup("/app/child");
    let config = |policy: &str| {
        let (default, rules) = policy.split_once('|').expect("default|rules");
        format!("[global]\ndefault={default}\n[tproxy mihomo]\nport=7893\n[rules]\n{rules}\n")
    };
    let daemon = Daemon::start(&ground, &config(old), &[]);
    let to = addr(REMOTE4, 9001);
    let flow = Client::tcp(&cgroup, to).timeout(patience).follow().spawn();
    await_connection(to);

    let log = daemon.reconfigure(&config(new));
    assert!(!log.contains("error"), "{log}");

    world.wire.packets();
    // silence is what is looked for, which nothing announces: 60 of the server's intervals
    std::thread::sleep(Duration::from_millis(300));
    let mut sent = world.wire.to_remote();
    // the kernel's own, as for any port that nobody has: a socket that was ended is gone
    sent.retain(|p| p.flags & RST == 0);
    // A flow that is cut falls silent or is reset by now; then the others end.
    std::thread::sleep(Duration::from_millis(400));
    drop((far, proxy));
    let outcome = flow.wait().0;
    let served = matches!(outcome, Outcome::Answer(_)).then(|| outcome.who());
    let direct = served.as_ref().is_some_and(|who| who.starts_with("far"));
    assert_eq!(!sent.is_empty(), direct, "{old} to {new}: {outcome:?}, on the wire {sent:?}");
    served
}

/// A reload cuts a direct flow whose cgroup is now proxied or dropped, and a proxied one whose cgroup is
/// dropped; every other flow goes on to its end.
#[test]
fn a_policy_change_cuts_what_was_direct_and_spares_what_was_proxied() {
    let _ground = ground!("changes");
    let (cut, far, proxied) = (None, Some("far"), Some(PROXY));
    let changes = [
        ("direct|", "direct|mihomo = /app", cut),
        ("direct|", "direct|drop = /app", cut),
        ("direct|", "direct|drop = /else", far),
        ("direct|mihomo = /app", "direct|", proxied),
        ("direct|mihomo = /app", "direct|direct = /app/child\nmihomo = /app", proxied),
        ("direct|mihomo = /app", "direct|drop = /app", cut),
        ("mihomo|", "mihomo|direct = /app", proxied),
        ("mihomo|direct = /app", "mihomo|direct = /app\ndrop = /else", far),
        ("mihomo|direct = /app", "mihomo|", cut),
        ("drop|direct = /app", "drop|", cut),
        ("drop|direct = /app", "drop|direct = /app/child", far),
    ];
    // Each on a ground, hence a thread, of its own.
    let results = changes.map(|(old, new, want)| {
        let patience = if want.is_some() { PATIENCE } else { 2 * SILENCE };
        (std::thread::spawn(move || flow_over_reload(old, new, patience)), old, new, want)
    });
    for (result, old, new, want) in results {
        let served = result.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let want = want.map(|name| format!("{name} {}", addr(REMOTE4, 9001)));
        assert_eq!(served, want, "from {old} to {new}");
    }
}
