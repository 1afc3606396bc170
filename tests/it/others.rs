//! Living with others: the objects that other programs put into the kernel, as they put them, and
//! what becomes of both.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{
    expect, expect_as, unanswered, under, Client, Proto, FLOWS, PATIENCE, SILENCE,
};
use crate::containers::live;
use crate::daemon::{run, Daemon};
use crate::forgotten::{places, proxies, reaches, speak, spoof, udp_of, Place};
use crate::gateway::Lan;
use crate::ground::{
    addr, here, ip, ip_batch, ip_both, ip_lines, sysctl, Ground, HOST4, REMOTE4, REMOTE6, REMOTES,
};
use crate::kernel::{await_member, ip_routes, ip_rules, load, nft, output, residue};
use crate::routes::tunnel_to;
use crate::wait_until;
use crate::world::{Server, World, PROXY, STREAM_PORT};

/// Local cgroups and a LAN.
const CONFIG: &str = "
[tproxy mihomo]
port = 7893
dns-hijack = 127.0.0.1:1053
dns-hijack = [::1]:1053
[rules]
mihomo = /proxied
drop = /drop
[gateway lan]
interface = br-lan
target = mihomo
";

/// The world, a LAN, and who answers there.
fn neighbourhood(ground: &Ground) -> (World, Lan<'_>, [Server; 2]) {
    (World::new(ground), Lan::new(ground), servers())
}

/// The whole of it works: local cgroups, the LAN, and DNS of both.
#[track_caller]
fn all_well(ground: &Ground, world: &mut World, lan: &Lan) {
    let [proxied, dropped, direct] = ground.cgroups(["/proxied", "/drop", "/direct"]);
    await_member(&proxied, "mihomo");
    await_member(&dropped, "drop");
    let before = world.wire.packets();
    expect(&[(&proxied, under(PROXY)), (&dropped, under("drop"))]);
    lan.proxied(0);
    lan.proxied(1);
    let mut left = world.wire.to_remote();
    // what went directly last time may acknowledge the end of it only now
    left.retain(|p| p.proto != Proto::Icmp && before.iter().all(|q| q.src != p.src));
    assert_eq!(left, [], "left for the world");
    expect(&[(&direct, under("direct"))]);
    for (ip, local, routed) in [
        (REMOTE4, "dns 127.0.0.1:1053", "dns 198.51.100.1:1053"),
        (REMOTE6, "dns [::1]:1053", "dns [2001:db8:3::1]:1053"),
    ] {
        let to = addr(ip, 53);
        assert_eq!(Client::udp(&proxied, to).run().who(), local);
        assert_eq!(lan.ask(0, Proto::Udp, to), routed);
    }
}

/// The policy without the LAN.
fn without_lan() -> &'static str {
    CONFIG.split("[gateway").next().expect("some")
}

/// Runs `f` while that table of another program is there.
fn while_there<T>(table: &str, f: impl FnOnce() -> T) -> T {
    load(table);
    let result = f();
    let name = table.split(" {").next().expect("a table");
    load(&format!("delete {name}\n"));
    result
}

fn servers() -> [Server; 2] {
    [Server::start(PROXY, &[7893]), Server::start("dns", &[1053])]
}

/// What fw4, firewalld and Docker load, cut down to what could meet ours: their base chains with
/// their types, hooks and priorities, and the rules that touch marks, NAT and what is forwarded.
const OTHERS: [(&str, &str); 3] = [
    (
        "fw4",
        r#"
table inet fw4 {
FLOWTABLE
  chain input {
    type filter hook input priority filter; policy drop;
    iif "lo" accept
    ct state vmap { established : accept, related : accept }
    iifname "br-lan" jump input_lan
    iifname "in0" icmp type echo-request accept
    iifname "in0" meta l4proto ipv6-icmp accept
  }
  chain input_lan {
    ct status dnat accept
    accept
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    OFFLOAD
    ct state vmap { established : accept, related : accept }
    iifname "br-lan" accept
    reject with icmpx type port-unreachable
  }
  chain output {
    type filter hook output priority filter; policy accept;
    oif "lo" accept
    ct state vmap { established : accept, related : accept }
  }
  chain prerouting {
    type filter hook prerouting priority filter; policy accept;
  }
  chain dstnat {
    type nat hook prerouting priority dstnat; policy accept;
    iifname "br-lan" udp dport 53 redirect to :5399
    iifname "br-lan" tcp dport 53 redirect to :5399
  }
  chain srcnat {
    type nat hook postrouting priority srcnat; policy accept;
    oifname "in0" meta nfproto ipv4 masquerade
  }
  chain raw_prerouting {
    type filter hook prerouting priority raw; policy accept;
  }
  chain mangle_prerouting {
    type filter hook prerouting priority mangle; policy accept;
  }
  chain mangle_output {
    type route hook output priority mangle; policy accept;
  }
  chain mangle_forward {
    type filter hook forward priority mangle; policy accept;
    iifname "in0" tcp flags syn tcp option maxseg size set rt mtu
    oifname "in0" tcp flags syn tcp option maxseg size set rt mtu
  }
}
"#,
    ),
    (
        "firewalld",
        r#"
table inet firewalld {
  chain mangle_PREROUTING {
    type filter hook prerouting priority mangle + 10; policy accept;
  }
  chain nat_PREROUTING {
    type nat hook prerouting priority dstnat + 10; policy accept;
  }
  chain nat_POSTROUTING {
    type nat hook postrouting priority srcnat + 10; policy accept;
    oifname "in0" meta nfproto ipv4 masquerade
  }
  chain nat_OUTPUT {
    type nat hook output priority -90; policy accept;
  }
  chain filter_PREROUTING {
    type filter hook prerouting priority filter + 10; policy accept;
    icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
    meta nfproto ipv6 fib saddr . mark . iif oif missing drop
  }
  chain filter_INPUT {
    type filter hook input priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    iifname "br-lan" accept
    meta l4proto { icmp, ipv6-icmp } accept
    reject with icmpx admin-prohibited
  }
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    iifname "br-lan" accept
    reject with icmpx admin-prohibited
  }
  chain filter_OUTPUT {
    type filter hook output priority filter + 10; policy accept;
    ct state { established, related } accept
    oifname "lo" accept
  }
}
"#,
    ),
    (
        "docker",
        r#"
table ip nat {
  chain DOCKER {
    iifname "docker0" return
    iifname != "docker0" tcp dport 8088 dnat to 172.17.0.2:80
  }
  chain PREROUTING {
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local jump DOCKER
  }
  chain OUTPUT {
    type nat hook output priority -100; policy accept;
    ip daddr != 127.0.0.0/8 fib daddr type local jump DOCKER
  }
  chain POSTROUTING {
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr 172.17.0.0/16 oifname != "docker0" masquerade
  }
}
table ip filter {
  chain DOCKER-USER {
    return
  }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    jump DOCKER-USER
    oifname "docker0" ct state related,established accept
    iifname "docker0" accept
    iifname "br-lan" accept
    oifname "br-lan" accept
  }
}
"#,
    ),
];

/// A table with the same name twice must not add to itself.
fn unload(name: &str) {
    let tables: &[&str] = match name {
        "docker" => &["ip nat", "ip filter"],
        "fw4" => &["inet fw4"],
        _ => &["inet firewalld"],
    };
    for table in tables {
        load(&format!("delete table {table}\n"));
    }
}

/// With the tables of a firewall that is there before the start or comes later all is well, nothing is told,
/// and theirs is as it was when we end.
#[test]
fn firewalls_before_and_after_us() {
    let ground = ground!("firewalls");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    // Offloading, where this kernel has it (fw4's `flow_offloading`).
    let flowtable = "flowtable ft {\nhook ingress priority 0;\ndevices = { br-lan, in0 };\n}\n";
    let offload = "meta l4proto { tcp, udp } flow offload @ft";
    let probe = format!("table inet probe {{\n{flowtable}chain c {{\n{offload}\n}}\n}}\n");
    let has_flowtables = nft(&["-c", "-f", "-"], &probe).status.success();
    if !has_flowtables {
        println!("no flowtables in this kernel: tested without");
    }
    for (name, script) in OTHERS {
        let script = match has_flowtables {
            true => script.replace("FLOWTABLE", flowtable).replace("OFFLOAD", offload),
            false => script.replace("FLOWTABLE", "").replace("OFFLOAD", ""),
        };
        let script = script.as_str();
        for first in [true, false] {
            println!("{name}, first: {first}");
            if first {
                load(script);
            }
            let daemon = Daemon::start(&ground, CONFIG, &[]);
            if !first {
                load(script);
            }
            all_well(&ground, &mut world, &lan);
            assert_eq!(told(&daemon), ["", ""]);
            let theirs = || {
                let text = output("nft", &["-s", "list", "ruleset"]);
                let tables = text.split("\ntable ").map(|t| t.trim_start_matches("table "));
                let tables = tables.filter(|t| !t.starts_with("inet cgtproxy"));
                tables.map(|t| t.trim().to_owned()).collect::<Vec<_>>()
            };
            let before = theirs();
            assert!(!before.is_empty());
            assert!(daemon.stop().success());
            assert_eq!(before, theirs());
            unload(name);
        }
    }
}

/// The marks of others, for bits that are not ours: each value as that program uses it.
#[test]
fn marks_of_others_are_kept_bit_for_bit() {
    let ground = ground!("othermarks");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    // (who, mark, mask): mwan3, Tailscale, pbr, Docker's swarm, wg-quick's fwmark 51820
    for (who, mark, mask) in [
        ("mwan3", 0x0000_0200u32, 0x0000_3f00u32),
        ("tailscale", 0x0004_0000, 0x00ff_0000),
        ("pbr", 0x0003_0000, 0x00ff_0000),
        ("all bits but ours", 0x00a5_5a5a, 0x00ff_ffff),
    ] {
        println!("{who}");
        let others = !mask;
        // Before us the program marks packets and flows; after us (and at a flow's later packets)
        // it finds what it has put there.
        load(&format!(
            "table inet who {{
              chain before_out {{
                type route hook output priority -160; policy accept;
                ct mark set ct mark & {others:#x} | {mark:#x}
                meta mark set meta mark & {others:#x} | {mark:#x}
              }}
              chain before_in {{
                type filter hook prerouting priority -160; policy accept;
                iifname \"br-lan\" ct mark set ct mark & {others:#x} | {mark:#x}
                iifname \"br-lan\" meta mark set meta mark & {others:#x} | {mark:#x}
              }}
              chain after {{
                type filter hook prerouting priority -140; policy accept;
                iifname {{ lo, br-lan }} ct mark & {mask:#x} == 0 meta l4proto {{ tcp, udp }} return
                iifname {{ lo, br-lan }} meta mark & 0xff000000 != 0 meta mark & {mask:#x} == {mark:#x} ct mark & {mask:#x} == {mark:#x} counter comment \"kept\"
                iifname {{ lo, br-lan }} meta mark & 0xff000000 != 0 meta mark & {mask:#x} != {mark:#x} counter comment \"lost\"
                iifname {{ lo, br-lan }} meta mark & 0xff000000 != 0 ct mark & {mask:#x} != {mark:#x} counter comment \"lost\"
              }}
            }}\n"
        ));
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        all_well(&ground, &mut world, &lan);
        let list = output("nft", &["list", "chain", "inet", "who", "after"]);
        for line in list.lines().filter(|line| line.contains("counter")) {
            let none = line.contains("packets 0 ");
            assert_eq!(none, line.contains("lost"), "{who}: {list}");
        }
        assert_eq!(list.matches("counter").count(), 3, "{list}");
        assert!(daemon.stop().success());
        load("delete table inet who\n");
    }
}

/// Others restore the ct mark into packets (CONNMARK --restore-mark, `meta mark set ct mark`): all of
/// it, or some bits, ours among them; in either hook, before us and behind us.
#[test]
fn connmarks_are_restored_by_others() {
    let ground = ground!("connmark");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let restores = [
        "meta mark set ct mark",
        "meta mark set ct mark and 0xffff0000",
        "ct mark != 0 meta mark set ct mark",
    ];
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    all_well(&ground, &mut world, &lan);
    let hooks = ["output", "prerouting"];
    for hooks in [&hooks[..1], &hooks[1..], &hooks] {
        for (restore, priority) in
            restores.iter().flat_map(|r| [-160, -150, -140, 0].map(|p| (r, p)))
        {
            let chain = |hook: &&str| {
                let kind = if *hook == "output" { "route" } else { "filter" };
                format!(
                    "chain {hook} {{ type {kind} hook {hook} priority {priority}; policy accept;\n                     {restore}\n}}\n"
                )
            };
            let chains: String = hooks.iter().map(chain).collect();
            println!("{hooks:?} {restore} {priority}");
            load(&format!("table inet who {{\n{chains}}}\n"));
            assert_eq!(told(&daemon), ["", ""]);
            all_well(&ground, &mut world, &lan);
            // of the same priority, who registered first is first: now theirs
            if priority == -150 {
                daemon.reload();
                all_well(&ground, &mut world, &lan);
            }
            load("delete table inet who\n");
        }
    }
}

/// The priorities of our rules in a family.
fn priorities(family: &str) -> BTreeSet<u32> {
    let rules = ip_rules(family);
    let ours = rules.lines().filter(|line| line.ends_with("proto 99"));
    ours.map(|line| line.split(':').next().unwrap_or("").parse().expect("a priority")).collect()
}

#[track_caller]
fn await_places(daemon: &Daemon, wanted: &[u32]) {
    let wanted: BTreeSet<u32> = wanted.iter().copied().collect();
    let there = || ["-4", "-6"].iter().all(|family| priorities(family) == wanted);
    assert!(wait_until(PATIENCE, there), "{}{}{}", ip_rules("-4"), ip_rules("-6"), daemon.logs());
}

/// wg-quick with a default route, its interface stood in for by another way to the same world:
/// everything but its own packets takes the tunnel's table, unless main knows better than by its
/// default route. It asks for no priority, so the kernel puts the rules before all others.
const WIREGUARD: &str = "route add default via GATE table 51820
rule add not fwmark 51820 table 51820
rule add table main suppress_prefixlength 0
";

fn wireguard(verb: &str) {
    ip_both(&WIREGUARD.replace(" add ", &format!(" {verb} ")));
}

/// Waits until all of ours are before wg-quick's, one of which may be seen before the other is there.
#[track_caller]
fn await_overtaking(daemon: &Daemon) {
    let there = || ["-4", "-6"].iter().all(|family| priorities(family).last() < Some(&98));
    assert!(wait_until(PATIENCE, there), "{}", daemon.logs());
}

/// A gateway's interface with the priorities of our rules before those of 98, and before those of 48.
const PLACES: [(&str, &[u32], &[u32]); 2] =
    [("br-lan", &[97], &[47]), ("br-*", &[95, 96, 97], &[45, 46, 47])];

/// Rules that come after ours and go before them: ours go before them again, as often as it takes,
/// and come back.
#[test]
fn overtaken_by_a_tunnel() {
    let ground = ground!("overtaken");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    for (interface, places_before, _) in PLACES {
        let daemon = Daemon::start(&ground, &CONFIG.replace("br-lan", interface), &[]);
        let home: Vec<u32> = (100..).take(places_before.len()).collect();
        all_well(&ground, &mut world, &lan);
        // what cannot match our packets is nobody's business
        let harmless = "rule add pref 50 fwmark 0x1/0xff000001 lookup main\n\
                        rule add pref 51 oif in0 lookup main\n\
                        rule add pref 52 iif in0 lookup main\n\
                        rule add pref 53 lookup 300\n";
        ip_batch(&["-4"], harmless);
        ip_batch(&["-4"], &harmless.replace(" add ", " del "));
        for time in 0..3 {
            println!("{interface}, time {time}");
            wireguard("add");
            await_overtaking(&daemon);
            all_well(&ground, &mut world, &lan);
            let status = daemon.ask(&["status"]).out;
            assert!(!status.contains("missing") && !status.contains("dropped"), "{status}");
            let exec = daemon.ask(&["exec", "mihomo", "--", "true"]);
            assert_eq!(exec.code, Some(0), "{exec:?}");

            wireguard("del");
            await_places(&daemon, &home);
        }
        let log = daemon.logs();
        assert!(!log.contains("of priority 5") && !log.contains("trying again"), "{log}");
        let said = "ip rules of others would take proxied traffic (ip rule pref ";
        assert!(log.contains(said) && log.contains("not fwmark 0xca6c lookup 51820"), "{log}");
        assert!(daemon.stop().success());
    }
}

/// The same before the start and at a reload. Whatever the place, all of it is found.
#[test]
fn overtaken_before_the_start() {
    let ground = ground!("overtaken-first");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    for (interface, before, other) in PLACES {
        let config = CONFIG.replace("br-lan", interface);
        ip_both("route add NET dev br-lan table 51820\n");
        ip_both(&WIREGUARD.replace("rule add", "rule add pref 98"));
        let daemon = Daemon::start(&ground, &config, &[]);
        await_places(&daemon, before);
        all_well(&ground, &mut world, &lan);

        ip_both("rule add pref 48 uidrange 0-4294967294 lookup 51820\n");
        await_places(&daemon, other);
        daemon.reconfigure(&format!("[global]\nrule-priority = 80\n{config}"));
        await_places(&daemon, other);
        all_well(&ground, &mut world, &lan);
        daemon.reconfigure(&format!("[global]\nrule-priority = 30\n{config}"));
        await_places(&daemon, &(30..).take(before.len()).collect::<Vec<_>>());
        all_well(&ground, &mut world, &lan);

        daemon.reconfigure(&config);
        await_places(&daemon, other);
        daemon.kill9();
        let text = run(&["flush"]).out;
        assert!(text.contains(&format!("did ip rule del pref {}", other[0])), "{text}");
        assert_eq!(residue(), "");
        ip_both("rule del pref 98\nrule del pref 98\nrule del pref 48\nroute flush table 51820\n");
    }
}

/// No place is left before another's rule: nothing of a proxied cgroup takes its way, and everybody
/// says so.
#[test]
fn a_rule_that_nothing_goes_before() {
    let ground = ground!("infront");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let cgroup = ground.cgroup("/proxied");
    await_member(&cgroup, "mihomo");
    all_well(&ground, &mut world, &lan);
    ip_both(
        "route add default via GATE table 51820\nroute add NET dev br-lan table 51820\n\
         rule add pref 0 not fwmark 51820 table 51820\n",
    );
    await_places(&daemon, &[0]);
    let said = "rule pref 0 not fwmark 0xca6c lookup 51820 takes it before ours of priority 0";
    for ip in ["ip", "ip -6"] {
        let said = format!("another program's {ip} {said}");
        assert!(daemon.wait_log(&said, PATIENCE), "{}", daemon.logs());
        for command in ["check", "status"] {
            let text = daemon.ask(&[command]).out;
            assert_eq!(text.matches(&said).count(), 1, "{command}: {text}");
        }
    }
    world.wire.packets();
    unanswered(&cgroup);
    // (of the cgroup it would be a container)
    lan.client(0).run(|| unanswered(&ground.root));
    assert_eq!(world.wire.to_remote(), []);

    // said again where somebody asks, and at a reload; and once otherwise
    let told = |text: &str| text.matches("before ours of priority 0").count();
    assert_eq!(told(&daemon.logs()), 2, "{}", daemon.logs());
    daemon.signal(Signal::SIGUSR1);
    let asked = || told(&daemon.logs()) == 4;
    assert!(wait_until(PATIENCE, asked), "{}", daemon.logs());

    ip_both("rule del pref 0 not fwmark 51820 table 51820\n");
    await_places(&daemon, &[100]);
    all_well(&ground, &mut world, &lan);

    // a rule of ours behind one of the same priority, and before it.
    for first in [true, false] {
        let same = "pref 100 not fwmark 51820 table 51820\n";
        if first {
            ip_both("rule add pref 99 not fwmark 51820 table 51820\n");
            await_places(&daemon, &[98]);
        }
        ip_both(&format!("rule add {same}"));
        if first {
            ip_both("rule del pref 99\n");
        }
        await_places(&daemon, &[if first { 99 } else { 100 }]);
        all_well(&ground, &mut world, &lan);
        ip_both(&format!("rule del {same}"));
        await_places(&daemon, &[100]);
    }
}

/// Waits until our routes are in our table, whatever else is there.
#[track_caller]
fn await_routes(daemon: &Daemon) {
    let route = |family| ip_routes(family, "300");
    let ours = || ["-4", "-6"].iter().all(|f| route(f).contains("2 default dev lo proto 99"));
    assert!(wait_until(PATIENCE, ours), "{}\n{}", residue(), daemon.logs());
}

/// Routes of others in our table, with our key or to our destination, come and go: ours stays beside
/// them, and theirs is left alone by our end.
#[test]
fn routes_of_others_with_the_destination_of_ours() {
    let ground = ground!("otherroutes");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    for line in [
        "local default dev lo table 300 proto boot",
        "local default dev lo table 300 proto static",
        "default via GATE dev in0 table 300 proto boot",
        "default via GATE dev in0 table 300 metric 50 proto boot",
        "unreachable default table 300 metric 7 proto boot",
    ] {
        println!("{line}");
        ip_both(&format!("route add {line}\n"));
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        let mut works = || {
            await_routes(&daemon);
            all_well(&ground, &mut world, &lan);
        };
        works();
        assert!(!daemon.logs().contains("warning"), "{}", daemon.logs());
        ip_both(&format!("route del {line}\n"));
        works();
        // and while it runs, in the place of ours where that can be had
        ip_both(&format!("route replace {line}\n"));
        works();
        ip_both(&format!("route del {line}\n"));
        works();
        ip_both(&format!("route replace {line}\n"));
        await_routes(&daemon);
        assert!(daemon.stop().success());
        let left = ["-4", "-6"].map(|family| ip_routes(family, "300"));
        assert!(left.iter().all(|left| left.lines().count() == 1), "{left:?}");
        ip_both(&format!("route del {line}\n"));
    }
}

/// Longer prefixes in our table take what they cover: nobody gets it, and everybody says so, before
/// READY where they are there by then.
#[test]
fn longer_prefixes_of_others_are_told_of() {
    let ground = ground!("longerroutes");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let cgroup = ground.cgroup("/proxied");
    let harm = |verb: &str| {
        let [net4, net6] = ["203.0.113.0/24", "2001:db8:2::/64"];
        ip_batch(&["-4"], &format!("route {verb} {net4} via 192.0.2.2 dev in0 table 300\n"));
        ip_batch(&["-6"], &format!("route {verb} {net6} via 2001:db8:1::2 dev in0 table 300\n"));
    };
    let told = |daemon: &Daemon| {
        let log = daemon.logs();
        ["ip route of protocol 3", "ip -6 route of protocol 3"].iter().all(|text| {
            let line = "warning: proxied traffic is dropped: another program's";
            log.contains(&format!("{line} {text}"))
        })
    };
    for before_ready in [true, false] {
        if before_ready {
            harm("add");
        }
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        assert_eq!(told(&daemon), before_ready, "{}", daemon.logs());
        if !before_ready {
            harm("add");
            let told = wait_until(PATIENCE, || told(&daemon));
            assert!(told, "{}", daemon.logs());
        }
        await_member(&cgroup, "mihomo");
        world.wire.packets();
        unanswered(&cgroup);
        assert_eq!(world.wire.to_remote(), []);
        for command in ["check", "status"] {
            let text = daemon.ask(&[command]).out;
            for family in ["ip", "ip -6"] {
                let said = format!("another program's {family} route of protocol 3");
                assert_eq!(text.matches(&said).count(), 1, "{command}: {text}");
            }
        }
        harm("del");
        all_well(&ground, &mut world, &lan);
        assert!(daemon.stop().success());
    }
}

/// A route of others that has the very place of ours is noticed, and so is that it goes.
#[test]
fn a_route_of_others_in_the_place_of_ours() {
    let ground = ground!("ourplace");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let place = "default via 2001:db8:1::2 dev in0 table 300 metric 1\n";
    ip_batch(&["-6"], &format!("route replace {place}"));
    let said = "program's ip -6 route of protocol 3 and prefix length 0 in table 300 takes it";
    assert!(daemon.wait_log(said, PATIENCE), "{}", daemon.logs());
    ip_batch(&["-6"], &format!("route del {place}"));
    await_routes(&daemon);
    all_well(&ground, &mut world, &lan);
}

/// A rule of others with the key of ours does what ours does; ours is there once it goes.
#[test]
fn a_rule_of_others_with_the_key_of_ours() {
    let ground = ground!("ourkey");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let rule = "pref 100 iif lo fwmark 0x1000000/0xff000000 lookup 300 protocol boot\n";
    for before_start in [false, true] {
        if before_start {
            ip_both(&format!("rule add {rule}"));
        }
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        if !before_start {
            ip_both(&format!("rule add {rule}"));
        }
        all_well(&ground, &mut world, &lan);
        ip_both(&format!("rule del {rule}"));
        await_places(&daemon, &[100]);
        all_well(&ground, &mut world, &lan);
        // and where it stands at our end
        ip_both(&format!("rule add {rule}"));
        assert!(daemon.stop().success());
        ip_both(&format!("rule del {rule}"));
    }
}

/// Two that go before each other: as often as that happens, and no more.
#[test]
fn a_program_that_wants_to_be_first_meets_pauses() {
    let ground = ground!("first");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let before = daemon.busy();
    let start = Instant::now();
    let mut added = 0;
    while start.elapsed() < Duration::from_secs(3) {
        ip_batch(&["-4"], "rule add not fwmark 51820 table 51820\nrule del not fwmark 51820\n");
        added += 1;
    }
    let busy = daemon.busy() - before;
    println!("{added} rules in 3 s, {busy:?} of the processor");
    assert!(busy < here(Duration::from_millis(1300)), "{busy:?}");
    await_places(&daemon, &[100]);
    let lines = daemon.logs().lines().count();
    assert!(lines < 10, "{lines} lines: {}", daemon.logs());
}

/// By mark, first the interface's rule, then the policy's, then unreachable.
const MWAN3: &str = "route add default via GATE table 1
route add NET dev br-lan table 1
rule add pref 1001 iif in0 lookup 1
rule add pref 2001 fwmark 0x100/0x3f00 lookup 1
rule add pref 2061 fwmark 0x3d00/0x3f00 blackhole
rule add pref 2062 fwmark 0x3e00/0x3f00 unreachable
";

const TAILSCALE: &str = "rule add pref 5210 fwmark 0x80000/0xff0000 lookup main
rule add pref 5230 fwmark 0x80000/0xff0000 lookup default
rule add pref 5250 fwmark 0x80000/0xff0000 unreachable
rule add pref 5270 lookup 52
";

/// Right before and right after ours.
const NEIGHBOURS: &str = "route add default via GATE table 77
rule add pref 99 fwmark 0x1/0xff lookup 77
rule add pref 100 fwmark 0x2/0xff lookup 77
rule add pref 101 fwmark 0x3/0xff lookup 77
rule add pref 102 fwmark 0x4/0xff lookup 77
";

/// wg-quick with a default route (its interface stands for the tunnel), mwan3, Tailscale: their ip
/// rules at their priorities, around ours.
#[test]
fn rules_of_others() {
    let ground = ground!("otherrules");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    for (who, lines) in [
        ("wg-quick", WIREGUARD),
        ("mwan3", MWAN3),
        ("tailscale", TAILSCALE),
        ("neighbours", NEIGHBOURS),
    ] {
        for first in [true, false] {
            for interface in ["br-lan", "br-*"] {
                println!("{who}, first: {first}, interface {interface}");
                let config = CONFIG.replace("br-lan", interface);
                if first {
                    ip_both(lines);
                }
                let before = ["-4", "-6"].map(ip_rules);
                let daemon = Daemon::start(&ground, &config, &[]);
                if !first {
                    ip_both(lines);
                }
                if who == "wg-quick" && !first {
                    await_overtaking(&daemon);
                }
                if who == "tailscale" {
                    sysctl("net/ipv4/conf/all/src_valid_mark", "1");
                    sysctl("net/ipv4/conf/all/rp_filter", "2");
                }
                all_well(&ground, &mut world, &lan);
                assert!(daemon.stop().success());
                let after = ["-4", "-6"].map(ip_rules);
                if first {
                    assert_eq!(before, after, "{who}'s rules are as they were");
                }
                ip_both(&lines.replace(" add ", " del "));
            }
        }
    }
}

/// A host without IPv6, or without an IPv4 address but on lo, has its other family proxied, for its clients
/// too.
#[test]
fn hosts_of_one_family_forward_too() {
    for off in ["-4", "-6"] {
        let (ground, _world, _proxy) = scene!("onefamily", proxy);
        let lan = Lan::new(&ground);
        match off {
            "-6" => {
                for interface in ["all", "default", "lo"] {
                    sysctl(&format!("net/ipv6/conf/{interface}/disable_ipv6"), "1");
                }
            }
            _ => ip_batch(&["-4"], "addr flush dev in0\naddr flush dev br-lan\n"),
        }
        let cgroup = ground.cgroup("/proxied");
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        let remote = if off == "-4" { REMOTE6 } else { REMOTE4 };
        for proto in [Proto::Tcp, Proto::Udp] {
            let to = addr(remote, 80);
            let want = format!("{PROXY} {to}");
            assert_eq!(Client::new(&cgroup, proto, to).run().who(), want);
            assert_eq!(lan.ask(0, proto, to), want);
        }
        assert!(daemon.stop().success());
    }
}

/// A VRF on this host: its rule stands before ours, its interfaces are not ours.
#[test]
fn a_vrf_is_present() {
    let ground = ground!("vrf");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let vrf = "link add vrf-x type vrf table 1010\nlink set vrf-x up\n\
               link add dummy0 type veth peer name dummy1\nlink set dummy0 master vrf-x\n\
               addr add 198.51.100.200/32 dev dummy0\nlink set dummy0 up\nlink set dummy1 up\n";
    let made =
        Command::new("ip").args(["link", "add", "vrf-t", "type", "vrf", "table", "9"]).output();
    if !made.is_ok_and(|out| out.status.success()) {
        println!("SKIP: no VRF in this kernel");
        return;
    }
    ip_lines(vrf);
    let _daemon = Daemon::start(&ground, CONFIG, &[]);
    all_well(&ground, &mut world, &lan);
}

/// A container: a bridge of its own, NAT, and the cgroup namespace that container engines give.
#[test]
fn containers() {
    let (ground, mut world) = scene!("containers");
    let lan = Lan::on(&ground, "docker0");
    let _servers = servers();
    let [container, slirp] =
        ground.cgroups(["/docker/0123456789ab", "/user.slice/libpod-1.scope/container"]);
    let config = "
        [global]
        containers = no
        [tproxy mihomo]
        port = 7893
        [rules]
        mihomo = /user\\.slice/libpod-.*
        drop = /docker
        [gateway containers]
        interface = docker0
        interface = br-*
        target = mihomo
    ";
    let _daemon = Daemon::start(&ground, config, &[]);
    // Rootful: what its processes send comes by the bridge, and their cgroup (which they see as /)
    // says nothing about it, since their sockets are not of this network namespace.
    world.wire.packets();
    for (proto, to) in FLOWS {
        let client = Client::new(&container, proto, to);
        let who = lan.client(0).run(|| client.run()).who();
        assert_eq!(who, format!("{PROXY} {to}"));
    }
    assert_eq!(world.wire.to_remote(), []);
    // Rootless: slirp4netns or pasta is a process of the host, in the container's cgroup.
    expect(&[(&slirp, under(PROXY))]);
    // Whatever namespace a process has, cgroups are known by where they are.
    expect_as(|client| client.in_cgroup_namespace(), &[(&slirp, under(PROXY))]);
}

/// Addresses that fake-ip resolvers hand out are no private ones.
#[test]
fn fake_addresses_reach_the_proxy() {
    let (ground, _world, _proxy) = scene!("fakeip", proxy);
    let lan = Lan::new(&ground);
    let cgroup = ground.cgroup("/proxied");
    let config = format!("[global]\nbypass = private\n{CONFIG}");
    let _daemon = Daemon::start(&ground, &config, &[]);
    for fake in ["198.18.0.1", "198.19.255.254", "2001:db8:ffff::1"] {
        for proto in [Proto::Tcp, Proto::Udp] {
            let to = addr(ip(fake), 443);
            let want = format!("{PROXY} {to}");
            assert_eq!(Client::new(&cgroup, proto, to).run().who(), want);
            assert_eq!(lan.ask(0, proto, to), want);
        }
    }
}

/// Proxies that take DNS that is addressed to this host: by UDP, by TCP too, and not at all.
const TAKERS_OF_DNS: &str = "
    [tproxy all]
    port = 7893
    dns-hijack = 127.0.0.1:1053
    dns-hijack = [::1]:1053
    dns-hijack-local = yes
    [tproxy tcp]
    port = 7894
    dns-hijack = 127.0.0.1:1053
    dns-hijack-tcp = yes
    dns-hijack-local = yes
    [tproxy none]
    port = 7894
    dns-hijack = 127.0.0.1:1053
    [rules]
    all  = /all
    tcp  = /tcp
    none = /none
    drop = /drop
    direct = /direct
";

/// DNS that is addressed to this host or to a bypassed address, of local cgroups.
#[test]
fn dns_of_this_host_by_default_direct() {
    dns_of_this_host(&ground!("dnslocal-direct"), "direct");
}

/// The same.
#[test]
fn dns_of_this_host_by_default_proxied() {
    dns_of_this_host(&ground!("dnslocal-all"), "all");
}

/// The same.
#[test]
fn dns_of_this_host_by_default_dropped() {
    dns_of_this_host(&ground!("dnslocal-drop"), "drop");
}

fn dns_of_this_host(ground: &Ground, default: &str) {
    let _world = World::new(ground);
    let _proxy = Server::start(PROXY, &[7893, 7894]);
    let _servers = (Server::start("dns", &[1053]), Server::start("own", &[53, 80]));
    let cgroups = ["/all", "/tcp", "/none", "/drop", "/direct", "/other"];
    let cgroups = cgroups.map(|path| (path, ground.cgroup(path)));
    let here = ["127.0.0.53", "127.0.0.1", "192.0.2.1", "::1"].map(ip);
    let bypassed = ip("203.0.113.65");
    let config = format!(
        "[global]\ndefault = {default}\nbypass = 203.0.113.64/26\nbypass-mark = 0xff\n\
         bypass-user = 4711\n{TAKERS_OF_DNS}"
    );
    let daemon = Daemon::start(ground, &config, &[]);
    for (path, cgroup) in &cgroups {
        let target = match *path {
            "/other" => default,
            path => &path[1..],
        };
        for proto in [Proto::Udp, Proto::Tcp] {
            for to in here {
                let own = format!("own {}", addr(to, 53));
                dns_comes_to(cgroup, proto, to, taker(target, proto, to).unwrap_or(&own));
                guarded_dns_comes_to(cgroup, proto, to, &own);
            }
            let remote = format!("remote {bypassed}:53");
            let want = taker(target, proto, bypassed).unwrap_or(&remote);
            dns_comes_to(cgroup, proto, bypassed, want);
            guarded_dns_comes_to(cgroup, proto, bypassed, &remote);
        }
        // other ports of this host are nobody's business
        for to in here.map(|to| addr(to, 80)) {
            assert_eq!(Client::tcp(cgroup, to).run().who(), format!("own {to}"), "{path}");
        }
        let pong = Client::ping(cgroup, HOST4).run().who();
        assert_eq!(pong, format!("echo {HOST4}"), "{path}");
    }
    // and afterwards too, what is not DNS is treated as ever
    let [all, .., dropped, direct, _] = cgroups.each_ref().map(|c| c.1.as_path());
    expect(&[(all, under(PROXY)), (dropped, under("drop")), (direct, under("direct"))]);
    assert!(daemon.stop().success());
}

/// Whom DNS that is not addressed to it comes to, by [`TAKERS_OF_DNS`].
fn taker(target: &str, proto: Proto, to: IpAddr) -> Option<&'static str> {
    match (target, proto, to.is_ipv4()) {
        ("all", Proto::Udp, true) | ("tcp", _, true) => Some("dns 127.0.0.1:1053"),
        ("all", Proto::Udp, false) => Some("dns [::1]:1053"),
        _ => None,
    }
}

fn dns_comes_to(cgroup: &Path, proto: Proto, to: IpAddr, want: &str) {
    comes_to(&Client::new(cgroup, proto, addr(to, 53)), proto, want);
}

/// The resolver's own queries, by each guard.
fn guarded_dns_comes_to(cgroup: &Path, proto: Proto, to: IpAddr, want: &str) {
    let client = Client::new(cgroup, proto, addr(to, 53));
    comes_to(&client.clone().uid(4711), proto, want);
    comes_to(&client.mark(0xff), proto, want);
}

fn comes_to(client: &Client, proto: Proto, want: &str) {
    let mut who = client.run().who();
    if who != want && proto == Proto::Udp {
        // by chance its port was that of an older flow, which stays what it was
        who = client.run().who();
    }
    assert_eq!(who, want, "{client:?}");
}

/// The nft chains of wg-quick for a default route, as its script writes them; `ip` or `ip6`.
fn wireguard_chains(family: &str, address: &str) -> String {
    format!(
        "add table {family} wg-quick-wg0
add chain {family} wg-quick-wg0 preraw {{ type filter hook prerouting priority -300; }}
add chain {family} wg-quick-wg0 premangle {{ type filter hook prerouting priority -150; }}
add chain {family} wg-quick-wg0 postmangle {{ type filter hook postrouting priority -150; }}
add rule {family} wg-quick-wg0 preraw iifname != \"wg0\" {family} daddr {address} fib saddr type != local drop
add rule {family} wg-quick-wg0 postmangle meta l4proto udp mark 51820 ct mark set mark
add rule {family} wg-quick-wg0 premangle meta l4proto udp meta mark set ct mark
"
    )
}

/// What `wg-quick up` does for a default route. The remote hosts answer what comes by it.
fn wg_quick_up(ground: &Ground) {
    tunnel_to(ground, "wg0");
    ip_both(
        "rule add not fwmark 51820 table 51820\nrule add table main suppress_prefixlength 0\n\
         route add default dev wg0 table 51820\n",
    );
    load(&wireguard_chains("ip", "10.8.0.2"));
    load(&wireguard_chains("ip6", "fd00:8::2"));
    sysctl("net/ipv4/conf/all/src_valid_mark", "1");
}

/// wg-quick with a default route: its rules, and its chains, which drop what a tproxy answers to
/// sockets that have the tunnel's address. Everybody says so, and the remedy that they name works.
#[test]
fn the_chains_of_wg_quick_are_there_first() {
    the_chains_of_wg_quick(&ground!("wgquick-first"), wg_quick_up, |_| {});
}

/// The same where it comes after us.
#[test]
fn the_chains_of_wg_quick_come_later() {
    the_chains_of_wg_quick(&ground!("wgquick-later"), |_| {}, wg_quick_up);
}

fn the_chains_of_wg_quick(ground: &Ground, first: fn(&Ground), later: fn(&Ground)) {
    let (mut world, lan, _servers) = neighbourhood(ground);
    let [proxied, dropped, direct] = ground.cgroups(["/proxied", "/drop", "/direct"]);
    let clients = |want: &dyn Fn(&str) -> String| {
        for (proto, to) in FLOWS {
            let want = want(&to.to_string());
            let patience = if want == "nobody" { 2 * SILENCE } else { PATIENCE };
            let client = Client::new(&proxied, proto, to).timeout(patience);
            assert_eq!(client.run().who(), want, "{proto:?} {to}");
        }
        // nor by the tunnel, which answers
        unanswered(&dropped);
        expect(&[(&direct, under("direct"))]);
    };
    first(ground);
    let daemon = Daemon::start(ground, CONFIG, &[]);
    later(ground);

    let named = |text: &str| {
        ["ip", "ip6"].iter().all(|family| {
            let place = format!("chain {family} wg-quick-wg0 preraw of another program drops");
            let remedy = format!("nft insert rule {family} wg-quick-wg0 preraw iif lo accept");
            text.matches(&place).count() == 1 && text.contains(&remedy)
        })
    };
    let told = || named(&daemon.logs());
    assert!(wait_until(PATIENCE, told), "{}", daemon.logs());
    let ask = |command| daemon.ask(&[command]).out;
    assert!(named(&ask("check")), "{}", ask("check"));
    assert!(named(&ask("status")), "{}", ask("status"));
    world.wire.packets();
    clients(&|_| "nobody".into());

    for family in ["ip", "ip6"] {
        load(&format!("insert rule {family} wg-quick-wg0 preraw iif lo accept\n"));
    }
    clients(&|to| format!("{PROXY} {to}"));
    for (proto, to) in FLOWS {
        assert_eq!(lan.ask(0, proto, to), format!("{PROXY} {to}"));
    }
    assert!(!ask("check").contains("wg-quick-wg0"), "{}", ask("check"));
    assert!(!ask("status").contains("wg-quick-wg0"), "{}", ask("status"));
    world.wire.assert_only_pings();
    assert!(daemon.stop().success());
}

/// What `check` and `status` say of chains of others.
#[track_caller]
fn told(daemon: &Daemon) -> [String; 2] {
    ["check", "status"].map(|command| {
        let text = daemon.ask(&[command]).out;
        text.lines().filter(|line| line.contains("of another program")).collect()
    })
}

/// A table of another program with one base chain.
fn who(hook: &str, priority: i32, rule: &str) -> String {
    let kind = if hook == "output" { "route" } else { "filter" };
    let chain = format!("type {kind} hook {hook} priority {priority};\n{rule}\n");
    format!("table inet who {{\nchain c {{\n{chain}}}\n}}\n")
}

/// By whose rule, in which words it is told, and the remedy that is named is one: then nothing is
/// told any more.
#[track_caller]
fn told_and_remedied(daemon: &Daemon, place: &str, what: &str) {
    let said = told(daemon);
    for text in &said {
        assert_eq!(text.matches(&format!("chain {place} of another program")).count(), 1, "{text}");
        assert!(text.contains(what), "{text}");
    }
    let remedy = said[0].split("`nft ").nth(1).and_then(|rest| rest.split('`').next());
    load(&format!("{}\n", remedy.expect("a remedy")));
    assert_eq!(told(daemon), ["", ""]);
}

/// Chains of others that overwrite the packet mark, where that breaks something: named, with a remedy
/// that is one.
#[test]
fn packet_marks_that_others_overwrite() {
    let ground = ground!("overwritten");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    all_well(&ground, &mut world, &lan);
    assert_eq!(told(&daemon), ["", ""]);
    let proxied = ground.cgroup("/proxied");
    const PACKET: &str = "overwrites the packet mark without sparing the bits 0xff000000";
    const XOR: &str =
        "meta mark 0x01000000 oifname != \"lo\" meta mark set 0x01020304 xor 0x2000000";
    for (hook, priority, rule) in [
        ("output", -149, "meta mark set 0"),
        ("output", 0, "meta mark set 0x5"),
        ("output", 300, "meta mark set meta mark & 0x00ffffff"),
        ("output", -140, "meta mark set ct mark & 0xffff"),
        ("output", -140, XOR),
        ("prerouting", -300, "iif lo meta mark set 0x1"),
        ("prerouting", 0, "meta l4proto tcp meta mark set ct mark map { 0x01000000 : 0x5 }"),
        ("postrouting", 0, "oifname { lo, eth0 } meta mark set 0x1"),
    ] {
        println!("{hook} {priority} {rule}");
        while_there(&who(hook, priority, rule), || {
            for to in REMOTES.map(|ip| addr(ip, 80)) {
                let client = Client::tcp(&proxied, to);
                match hook {
                    // by the way of the new mark
                    "output" => assert_eq!(client.run().who(), format!("remote {to}")),
                    _ => {
                        let who = client.timeout(SILENCE).run().who();
                        assert!(!who.starts_with(PROXY), "{who}");
                    }
                }
            }
            told_and_remedied(&daemon, "inet who c", PACKET);
            all_well(&ground, &mut world, &lan);
        });
    }
    assert!(daemon.stop().success());
}

/// Flow marks that others restore behind what makes up for it break what is routed, and are told of where
/// something is.
#[test]
fn flow_marks_that_are_restored_behind_us() {
    const PLACES: [(&str, i32); 3] = [("output", 60), ("prerouting", 60), ("postrouting", -160)];
    let restored = PLACES.map(|(hook, priority)| who(hook, priority, "meta mark set ct mark"));
    let ground = ground!("restored");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let proxied = ground.cgroup("/proxied");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    for table in &restored {
        while_there(table, || {
            assert_eq!(lan.ask_within(0, Proto::Udp, addr(REMOTE4, 80), SILENCE), "nobody");
            told_and_remedied(&daemon, "inet who c", "what is routed to a tproxy, or its answers");
            all_well(&ground, &mut world, &lan);
        });
    }
    assert!(daemon.stop().success());

    let daemon = Daemon::start(&ground, without_lan(), &[]);
    for table in &restored {
        while_there(table, || {
            assert_eq!(told(&daemon), ["", ""]);
            expect(&[(&proxied, under(PROXY))]);
        });
    }
}

/// The same for the mark by which a container's packets are known from where they come in.
#[test]
fn container_marks_that_others_overwrite() {
    let (ground, _world) = scene!("boxmarks");
    let lan = Lan::new(&ground);
    let _servers = servers();
    let _boxed = live(lan.client(1), &ground.cgroup("/drop/box"));
    // a policy without any tproxy too
    for config in [without_lan(), "[rules]\ndrop = /drop\n"] {
        let daemon = Daemon::start(&ground, config, &[]);
        lan.dropped(1);
        lan.direct(0);
        assert_eq!(told(&daemon), ["", ""]);
        for (priority, rule) in
            [(-300, "iifname \"br-lan\" meta mark set 0"), (-199, "meta mark set 0x70000000")]
        {
            while_there(&who("prerouting", priority, rule), || {
                let known = priority == -199;
                // loaded last it is first of equals
                lan.direct(1);
                let what = if known { "packet mark" } else { "goes as if no rule covered it" };
                told_and_remedied(&daemon, "inet who c", what);
                lan.dropped(1);
            });
        }
        // in other bits, or elsewhere
        for (priority, rule) in
            [(-300, "meta mark set meta mark | 0x1"), (-300, "iifname \"in0\" meta mark set 0")]
        {
            while_there(&who("prerouting", priority, rule), || {
                assert_eq!(told(&daemon), ["", ""]);
                lan.dropped(1);
            });
        }
        daemon.stop_clean();
    }
}

/// The same for the ct mark: by it the kernel's own packets for closed sockets are known, the DNS that is
/// hijacked, and the flow that a proxy goes on with when conntrack has forgotten it.
#[test]
fn flow_marks_that_others_overwrite() {
    const WELL: [&str; 2] = ["dns 127.0.0.1:1053", "dns [::1]:1053"];
    const FLOW: &str = "overwrites the ct mark without sparing the bits 0xff000000";
    for (hook, priority, rule, loses_dns, loses_forgotten) in [
        ("output", -160, "ct mark set 0x5", false, true),
        ("output", -140, "ct mark set 0x5", true, true),
        ("output", 0, "ct mark set ct mark & 0xffff", false, true),
        // CONNMARK --save-mark
        ("output", -140, "ct mark set meta mark", true, true),
        ("postrouting", 0, "ct mark set 0", false, true),
        ("prerouting", 0, "iif lo ct mark set 0", false, true),
        ("input", 0, "ct mark set ct mark | 0x2000000", false, false),
    ] {
        println!("{hook} {priority} {rule}");
        // with the remedy first: what has lost its mark sends on
        for remedied in [true, false] {
            let (ground, mut world) = scene!("flow-marks");
            let _proxy = Server::stream(PROXY, &[7893]);
            let _dns = Server::start("dns", &[1053]);
            let [proxied, direct] = ground.cgroups(["/proxied", "/direct"]);
            let daemon = Daemon::start(&ground, without_lan(), &[]);
            load(&who(hook, priority, rule));
            if remedied {
                told_and_remedied(&daemon, "inet who c", FLOW);
            }

            let lost = loses_dns && !remedied;
            let patience = if lost { SILENCE } else { PATIENCE };
            let ask = |ip| Client::udp(&proxied, addr(ip, 53)).timeout(patience).run().who();
            let dns = REMOTES.map(ask);
            assert_eq!(dns != WELL, lost, "{dns:?}");
            let lost = loses_forgotten && !remedied;
            for (Place { remote, host, .. }, proxy) in places().iter().zip(&proxies(&direct, 7893))
            {
                let (speaker, own) = (spoof(&direct, *remote), udp_of(&proxied, addr(*host, 0)));
                speak(&speaker, &own);
                let who = reaches(&own, *remote, &[proxy, &speaker], &mut world);
                assert_eq!(who, if lost { "remote" } else { "proxy" });
            }
            world.wire.packets();
            for ip in REMOTES {
                let to = addr(ip, STREAM_PORT);
                assert_eq!(Client::tcp(&proxied, to).close_early(50).run().who(), "");
            }
            // data on its way meets the closed sockets; that no more comes is announced by nothing
            std::thread::sleep(Duration::from_millis(100));
            let left = world.wire.to_remote();
            println!("{dns:?}, {} packets", left.len());
            assert_eq!(left.is_empty(), remedied, "{left:?}");
        }
    }
}

/// Rules of iptables' mangle table, and which of our marks they overwrite.
const IPTABLES: [(&str, Option<&str>); 17] = [
    ("OUTPUT -j MARK --set-mark 1", Some("packet mark")),
    ("OUTPUT -j MARK --set-xmark 0x0/0xff00ff00", Some("packet mark")),
    ("PREROUTING -i lo -m connmark ! --mark 0 -j MARK --set-mark 1", Some("packet mark")),
    ("OUTPUT -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffff", Some("packet mark")),
    ("OUTPUT -j CONNMARK --set-mark 7", Some("ct mark")),
    ("POSTROUTING -j CONNMARK --save-mark", Some("ct mark")),
    ("OUTPUT -j CONNMARK --restore-mark", None),
    ("PREROUTING -j CONNMARK --restore-mark", None),
    ("PREROUTING -i in0 -m mark --mark 0 -j MARK --set-mark 1", None),
    ("PREROUTING -i in+ -j CONNMARK --set-mark 1", None),
    ("OUTPUT -m mark --mark 0 -j MARK --set-mark 1", None),
    ("OUTPUT -m connmark --mark 5 -j CONNMARK --set-mark 6", None),
    ("OUTPUT -j MARK --set-xmark 0x40000/0xff0000", None),
    ("OUTPUT -j MARK --or-mark 0x4000", None),
    ("OUTPUT -j MARK --and-mark 0xff00ffff", None),
    ("POSTROUTING -j CONNMARK --save-mark --nfmask 0x3f00 --ctmask 0x3f00", None),
    ("OUTPUT -j CONNMARK --restore-mark --nfmask 0x3f00 --ctmask 0x3f00", None),
];

/// iptables has structs of its own in place of nft's expressions.
#[test]
fn marks_that_iptables_overwrites() {
    if Command::new("iptables-nft").arg("-V").output().is_err() {
        println!("SKIP: there is no iptables-nft");
        return;
    }
    let (ground, _world) = scene!("ipt-marks");
    let _servers = servers();
    let proxied = ground.cgroup("/proxied");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let iptables = |rule: &str| {
        let mut words = vec!["-t", "mangle"];
        words.extend(rule.split(' '));
        let out = Command::new("iptables-nft").args(&words).output();
        let out = out.expect("iptables");
        assert!(out.status.success(), "{rule}: {}", String::from_utf8_lossy(&out.stderr));
    };
    let to = addr(REMOTE4, 80);
    for (rule, what) in IPTABLES {
        println!("{rule}");
        iptables(&format!("-A {rule}"));
        let place = format!("ip mangle {}", rule.split(' ').next().expect("a chain"));
        match what {
            Some(what) => {
                let proxied = || Client::tcp(&proxied, to).timeout(SILENCE).run().who();
                if what == "packet mark" {
                    // what is loaded last comes first, of chains of one priority
                    daemon.reload();
                    assert!(!proxied().starts_with(PROXY), "{rule}: {}", proxied());
                }
                told_and_remedied(&daemon, &place, &format!("overwrites the {what}"));
            }
            None => assert_eq!(told(&daemon), ["", ""], "{rule}"),
        }
        assert_eq!(Client::tcp(&proxied, to).run().who(), format!("{PROXY} {to}"), "{rule}");
        load("delete table ip mangle\n");
    }
}

/// Neighbours that set marks as they should, or where none of ours are: none is told of.
#[test]
fn neighbours_that_leave_our_marks_alone() {
    let ground = ground!("good-neighbours");
    let (mut world, lan, _servers) = neighbourhood(&ground);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let mangle = |rules: &str| {
        format!(
            "table ip mangle {{
               chain PREROUTING {{ type filter hook prerouting priority mangle; policy accept; jump user; }}
               chain OUTPUT {{ type route hook output priority mangle; policy accept; jump user; }}
               chain POSTROUTING {{ type filter hook postrouting priority mangle; policy accept; jump user; }}
               chain user {{ {rules} }}
             }}\n"
        )
        .replace("; ", ";\n").replace("{ ", "{\n").replace(" }", "\n}")
    };
    for (name, script) in [
        ("Tailscale", mangle("meta mark set meta mark & 0xff00ffff ^ 0x40000; ")),
        ("mwan3", mangle("meta mark & 0x3f00 == 0 meta mark set meta mark & 0xffffc0ff | 0x100; ct mark set ct mark & 0xffffc0ff | 0x100; ")),
        ("kube-proxy", mangle("meta mark set meta mark | 0x4000; ")),
        // two uplinks: what comes in by one is marked, what answers goes by it
        ("uplinks", mangle("iifname \"in0\" ct state new ct mark set 0x1; ct mark 0x1 meta mark set 0x1; ")),
        ("unmarked only", mangle("meta mark != 0 return; meta mark set 0x7; ")),
        ("forwarded", "table inet f {\nchain f {\ntype filter hook forward priority 0;\nmeta mark set 0x1\n}\n}\n".into()),
        ("nobody goes there", "table inet f {\nchain f {\nmeta mark set 0x1\n}\n}\n".into()),
        ("before us", who("output", -160, "meta mark set 0x1")),
        ("wg-quick", "table ip wg-quick-wg0 {
chain postmangle {\ntype filter hook postrouting priority -150; policy accept;
meta l4proto udp meta mark 0x0000ca6c ct mark set meta mark\n}
chain premangle {\ntype filter hook prerouting priority -150; policy accept;
meta l4proto udp meta mark set ct mark\n}\n}\n".into()),
        ("another LAN", who("prerouting", -140, "iifname \"br-other\" meta mark set 0x1")),
        ("bridge", "table bridge b {\nchain c {\ntype filter hook output priority 0;\nmeta mark set 0x1\n}\n}\n".into()),
    ] {
        println!("{name}");
        while_there(&script, || {
            assert_eq!(told(&daemon), ["", ""], "{script}");
            all_well(&ground, &mut world, &lan);
        });
    }
}

/// What is said of it is so: hijacked DNS, and what the kernel sends for closed sockets.
#[test]
fn notrack_of_others_breaks_what_is_told() {
    let (ground, mut world) = scene!("notrack-dns");
    let _proxy = Server::stream(PROXY, &[7893]);
    let _dns = Server::start("dns", &[1053]);
    let proxied = ground.cgroup("/proxied");
    let daemon = Daemon::start(&ground, without_lan(), &[]);
    for rule in ["udp dport 53 notrack", "udp sport 1053 notrack"] {
        while_there(&who("output", -300, rule), || {
            for text in told(&daemon) {
                assert!(text.contains("hijacked DNS does not get to its resolver"), "{text}");
            }
            for ip in REMOTES {
                let who = Client::udp(&proxied, addr(ip, 53)).timeout(SILENCE).run().who();
                assert!(!who.starts_with("dns "), "{rule}: {who}");
            }
        });
    }

    load(&who("output", -300, "meta l4proto tcp notrack"));
    assert!(told(&daemon)[0].contains("closed sockets (acknowledgements, resets) goes to the true"));
    world.wire.packets();
    for ip in REMOTES {
        let to = addr(ip, STREAM_PORT);
        assert_eq!(Client::tcp(&proxied, to).close_early(50).run().who(), "");
    }
    assert!(wait_until(PATIENCE, || !world.wire.to_remote().is_empty()));
    load("delete table inet who\n");
}

/// What conntrack is kept from is told of: there, replies are not known.
#[test]
fn notrack_of_others_is_told_of() {
    let ground = ground!("notrack");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let ask = |command| daemon.ask(&[command]).out;
    load(
        "table inet other {
          chain out { type filter hook output priority raw; udp dport 9 notrack; }
          chain in { type filter hook prerouting priority raw; iif != lo fib saddr type != local drop; }
          chain of { type filter hook prerouting priority raw; iifname in0 fib saddr type != local drop; }
        }
        table netdev other { }\n",
    );
    for command in ["check", "status"] {
        let text = ask(command);
        assert!(text.contains("chain inet other out of another program keeps conntrack"), "{text}");
        assert!(!text.contains("other in") && !text.contains("other of"), "{text}");
    }
    load("delete table inet other\ndelete table netdev other\n");
    for command in ["check", "status"] {
        assert!(!ask(command).contains("another program"), "{}", ask(command));
    }
}
