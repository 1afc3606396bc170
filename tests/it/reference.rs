//! The fixtures against a hand-written table. A failure here is one of the test ground (or of the
//! kernel), not of the program. Each behaviour is shown to hang on its rule: without it, the
//! outcome differs.

use crate::client::{expect, under, Client, Outcome, Proto, AT_ONCE, PATIENCE, SILENCE};
use crate::ground::{addr, ip_batch, Ground, REMOTE4, REMOTE6};
use crate::kernel::{self, cgroup_id, set_ids};
use crate::wait_until;
use crate::world::{Server, World, STREAM_PORT};

const RULESET: &str = r#"
table inet cgtproxy {
  set bypass4 {
    type ipv4_addr
    flags interval
    elements = { 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255 }
  }
  set bypass6 {
    type ipv6_addr
    flags interval
    elements = { fe80::/10, ff00::/8 }
  }
  set cg_drop { type cgroupsv2; }
  set cg_mihomo { type cgroupsv2; }
  chain bypass {
    ct direction reply accept
    ip daddr @bypass4 accept
    ip6 daddr @bypass6 accept
  }
  chain to_drop {
    jump bypass
    counter drop
  }
  chain to_mihomo {
    jump bypass
    counter
    meta l4proto != { tcp, udp } accept
    ct mark set ct mark and 0x00ffffff or 0x01000000
    meta mark set meta mark and 0x00ffffff or 0x01000000 accept
  }
  chain sticky {
    ct mark and 0xff000000 vmap { 0x01000000 : goto to_mihomo }
  }
  chain output {
    type route hook output priority mangle; policy accept;
    oif "lo" accept
    socket cgroupv2 level 2 @cg_drop goto to_drop
    socket cgroupv2 level 2 @cg_mihomo goto to_mihomo
    ct mark and 0xff000000 != 0 goto sticky
  }
  chain nat_output {
    type nat hook output priority -100; policy accept;
    meta mark and 0xff000000 == 0x01000000 udp dport 53 dnat ip to 127.0.0.1:1053
    meta mark and 0xff000000 == 0x01000000 udp dport 53 dnat ip6 to [::1]:1053
  }
  chain tproxy_mihomo {
    ct status dnat accept
    meta l4proto { tcp, udp } tproxy to :7893 accept
    meta l4proto tcp counter reject with tcp reset
    counter drop
  }
  chain prerouting {
    type filter hook prerouting priority mangle; policy accept;
    iif "lo" meta mark and 0xff000000 vmap { 0x01000000 : goto tproxy_mihomo }
  }
}
"#;

pub const ROUTING: &str = "\
rule add iif lo fwmark 0x01000000/0xff000000 lookup 300 pref 100
route add local default dev lo table 300
";

/// Loads the table without the lines that hold `without`, and fills its sets with the cgroups
/// `/drop` and `/mihomo`.
pub fn load(ground: &Ground, without: Option<&str>) {
    let keep = |line: &&str| without.is_none_or(|text| !line.contains(text));
    let kept: Vec<&str> = RULESET.lines().filter(keep).collect();
    let sub_tree = ground.root.file_name().and_then(|n| n.to_str()).expect("a name");
    let mut script = kept.join("\n");
    for target in ["drop", "mihomo"] {
        let path = ground.cgroup(target);
        assert!(path.ends_with(format!("{sub_tree}/{target}")));
        script += &format!("\nadd element inet cgtproxy cg_{target} {{ \"{sub_tree}/{target}\" }}");
    }
    kernel::load(&script);
    ip_batch(&["-4"], ROUTING);
    ip_batch(&["-6"], ROUTING);
}

/// Without a table everybody reaches the remote host, and the wire tells each packet once.
#[test]
fn bare_ground() {
    let (ground, mut world) = scene!("bare");
    expect(&[(&ground.cgroup("/any"), under("direct"))]);
    let packets = world.wire.to_remote();
    for proto in [Proto::Tcp, Proto::Udp, Proto::Icmp] {
        for ip in [REMOTE4, REMOTE6] {
            let count = packets.iter().filter(|p| p.proto == proto && p.dst.ip() == ip).count();
            assert_eq!(count > 1, proto == Proto::Tcp, "{proto:?} {ip}: {packets:?}");
            assert!(count > 0, "{proto:?} {ip}: {packets:?}");
        }
    }
    assert_eq!(world.wire.packets(), [], "the wire is read once");
}

/// The wire has what was sent before it is read, no less and no more.
#[test]
fn wire_is_exact() {
    let (_ground, mut world) = scene!("exact");
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("bind");
    for count in 0..100 {
        for _ in 0..count {
            // Nobody listens there, nobody answers there.
            socket.send_to(b"x", addr(REMOTE4, 81)).expect("send");
        }
        assert_eq!(world.wire.to_remote().len(), count);
    }
}

/// The hand-written table drops, proxies and leaves alone as the program's does.
#[test]
fn targets() {
    let (ground, mut world, _proxy) = scene!("targets", proxy);
    load(&ground, None);

    expect(&[(&ground.cgroup("/drop/child"), under("drop"))]);
    assert_eq!(world.wire.to_remote(), []);
    expect(&[(&ground.cgroup("/mihomo/child"), under("proxy mihomo"))]);
    let packets = world.wire.to_remote();
    assert!(packets.iter().all(|p| p.proto == Proto::Icmp) && packets.len() == 2, "{packets:?}");
    expect(&[(&ground.cgroup("/other"), under("direct"))]);
    assert!(!world.wire.to_remote().is_empty());
}

/// A set that is there is read as cgroup ids, and one that is not is told apart from an empty one.
#[test]
fn sets_are_read_as_ids() {
    let ground = ground!("ids");
    assert_eq!(set_ids("cg_mihomo"), None);
    load(&ground, None);
    let id = cgroup_id(&ground.at("/mihomo")).expect("an id");
    assert_eq!(set_ids("cg_mihomo"), Some([id].into()));
    assert_eq!(set_ids("cg_none"), None);
    assert!(cgroup_id(&ground.at("/none")).is_err());
}

/// It is the mark by which a packet comes to the proxy.
#[test]
fn without_the_mark_nothing_is_proxied() {
    let (ground, _world, _proxy) = scene!("nomark", proxy);
    load(&ground, Some("meta mark set"));
    expect(&[(&ground.cgroup("/mihomo"), under("direct"))]);
}

/// It is the DNAT that leads to the hijacker, and its test that keeps the proxy from that.
#[test]
fn dns_goes_to_the_hijacker() {
    for (rule, want) in [(None, "dns local"), (Some("ct status dnat"), "proxy mihomo")] {
        let (ground, _world, _proxy) = scene!("dns", proxy);
        let _dns = Server::start("dns local", &[1053]);
        load(&ground, rule);
        let cgroup = ground.at("/mihomo");
        for (ip, local) in [(REMOTE4, "127.0.0.1:1053"), (REMOTE6, "[::1]:1053")] {
            let who = Client::udp(&cgroup, addr(ip, 53)).run().who();
            assert_eq!(who, format!("{want} {local}"));
        }
    }
}

/// Without a proxy, it is the rules behind tproxy that refuse and drop.
#[test]
fn proxy_down() {
    // without them local listeners are reached
    for rule in [None, Some("counter reject"), Some("counter drop")] {
        let (ground, mut world) = scene!("down");
        let _local = Server::start("local", &[80]);
        load(&ground, rule);
        let cgroup = ground.at("/mihomo");
        for ip in [REMOTE4, REMOTE6] {
            let (tcp, took) = Client::tcp(&cgroup, addr(ip, 80)).timeout(SILENCE).spawn().wait();
            let udp = Client::udp(&cgroup, addr(ip, 80)).timeout(SILENCE).run();
            if rule.is_none() {
                assert_eq!((tcp, udp), (Outcome::Refused, Outcome::Timeout));
                assert!(took < AT_ONCE, "{took:?}");
            } else if rule == Some("counter reject") {
                assert_eq!((tcp, udp), (Outcome::Timeout, Outcome::Timeout));
            } else {
                let who = addr(ip, 80);
                assert_eq!(tcp, Outcome::Refused);
                assert_eq!(udp.who(), format!("local {who}"));
            }
        }
        assert_eq!(world.wire.to_remote(), []);
    }
}

/// It is the ct mark by which packets without a socket go the way of their flow.
#[test]
fn packets_without_a_socket_stay_proxied() {
    for (rule, quiet) in [(None, true), (Some("goto sticky"), false)] {
        let (ground, mut world) = scene!("early");
        let _proxy = Server::stream("proxy mihomo", &[7893]);
        load(&ground, rule);
        let cgroup = ground.at("/mihomo");
        let mut leaked = Vec::new();
        // Data that is still on its way meets a closed socket: in one of a hundred closes or more
        // rarely, by the processors' turns.
        let mut rounds = 0;
        wait_until(PATIENCE, || {
            for ip in [REMOTE4, REMOTE6] {
                let client = Client::tcp(&cgroup, addr(ip, STREAM_PORT)).close_early(20);
                assert_eq!(client.run(), Outcome::Answer(String::new()));
            }
            rounds += 1;
            leaked.extend(world.wire.to_remote());
            !leaked.is_empty() || quiet && rounds == 20
        });
        wait_until(SILENCE, || {
            leaked.extend(world.wire.to_remote());
            !leaked.is_empty()
        });
        assert_eq!(leaked.is_empty(), quiet, "{rounds}: {leaked:?}");
    }
}
