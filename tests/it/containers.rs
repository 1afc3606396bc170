//! Rules for cgroups whose processes live in network namespaces of their own: what they send comes in
//! by a veth, on a bridge or not.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{Client, Proto, Running, PATIENCE, SILENCE};
use crate::daemon::{run_with, write_private, Daemon};
use crate::forgotten::proxies;
use crate::gateway::{self, Lan, LAN4, LAN6};
use crate::ground::{
    addr, any_of, await_link, ip, ip_lines, sysctl, Ground, Netns, HOSTS, REMOTE4, REMOTE6, REMOTES,
};
use crate::kernel::{add_flows, conntrack_number, load, table, table_plain};
use crate::soak::Ends;
use crate::tools::as_nobody;
use crate::ways::{change, RELOAD};
use crate::world::{interface_index, recv_datagram, Server, World, PROXY};
use crate::{sized, wait_until};

const CONFIG: &str = "
[global]
[tproxy mihomo]
port = 7893
[tproxy other]
port = 7894
[rules]
direct = /boxes/direct.*
drop = /boxes/drop.*
mihomo = /boxes/box.*
other = /boxes/other.*
";

/// A process that lives in `cgroup` and in that namespace until this is dropped: a service at port 7.
pub fn live(netns: &Netns, cgroup: &Path) -> Running {
    netns.run(|| Client::new(cgroup, Proto::Udp, addr(ip("::"), 7)).timeout(LONG).serve())
}

const LONG: Duration = Duration::from_secs(600);

/// How long the daemon looks for who has lost his cgroup, and after who may move on, and how long at most
/// it rests between two of these looks.
const LOOKED_FOR: Duration = Duration::from_secs(5);
const LOOKED_AGAIN: Duration = Duration::from_secs(1);

/// The chains of veths, by what their rules set.
fn entrances() -> Vec<String> {
    // for each cgroup in a set, nft would walk the whole tree, which may be that of many tests
    let table = table_plain(&["-t"]);
    let chains = table.split("chain ").filter(|chain| chain.starts_with("veth_"));
    let mut found: Vec<String> = chains
        .filter_map(|chain| {
            let name = chain.split("device \"").nth(1)?.split('"').next()?;
            let mark = chain.split("| ").nth(1).map(|rest| rest.split_whitespace().next());
            Some(format!("{name} {}", mark??))
        })
        .collect();
    found.sort();
    found
}

#[track_caller]
pub fn await_entrances(daemon: &Daemon, want: &[&str]) {
    let found = wait_until(PATIENCE, || entrances() == want);
    assert!(found, "{:?}, not {want:?}\n{}\n{}", entrances(), table(), daemon.logs());
}

/// The LAN with its clients as containers, the first one of which is proxied and the second one dropped,
/// and the daemon that has found them.
pub fn boxes(ground: &Ground) -> (Lan<'_>, [Running; 2], Daemon) {
    let lan = Lan::new(ground);
    let boxes = [(0, "/boxes/box1"), (1, "/boxes/drop1")];
    let processes = boxes.map(|(i, path)| live(lan.client(i), &ground.cgroup(path)));
    let daemon = Daemon::start(ground, CONFIG, &[]);
    assert_eq!(entrances(), BOXES);
    (lan, processes, daemon)
}

pub const BOXES: [&str; 2] = ["lan0 0x01000000", "lan1 0xff000000"];

/// A rule covers what comes in by the veth of its cgroup's namespace on its way to the world: neither this
/// host, nor a neighbour, nor a service of theirs is out of reach.
#[test]
fn a_rule_covers_a_container_on_a_bridge() {
    let (ground, mut world, _proxy) = scene!("boxes", proxy);
    let lan = Lan::new(&ground);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    assert_eq!(entrances(), [""; 0]);
    lan.direct(0);

    // cgroup, then process
    let _process = live(lan.client(0), &ground.cgroup("/boxes/box1"));
    await_entrances(&daemon, &BOXES[..1]);
    world.wire.packets();
    lan.proxied(0);
    world.wire.assert_only_pings();
    lan.direct(1);

    let _dropped = live(lan.client(1), &ground.cgroup("/boxes/drop1"));
    await_entrances(&daemon, &BOXES);
    world.wire.packets();
    lan.dropped(1);
    assert_eq!(world.wire.to_remote(), []);
    lan.proxied(0);

    let others = ["198.51.100.11", "2001:db8:3::11"];
    for (i, to) in [(0, LAN4), (0, LAN6), (1, LAN4), (1, LAN6), (0, others[0]), (0, others[1])] {
        assert_eq!(lan.ask(i, Proto::Icmp, addr(ip(to), 0)), format!("echo {to}"));
    }
    for service in ["198.51.100.10", "198.51.100.11", "2001:db8:3::10", "2001:db8:3::11"] {
        let client = Client::udp(&ground.root, addr(ip(service), 7));
        assert_eq!(client.run().who(), "service", "{service}");
    }
    daemon.stop_clean();
}

/// The daemon goes and comes back: what was in force stays so, and the next one's first table has it.
#[test]
fn what_is_in_force_outlives_the_daemon() {
    let (ground, mut world, _proxy) = scene!("boxes-on", proxy);
    let (lan, _processes, mut daemon) = boxes(&ground);
    world.wire.packets();
    for end in [Daemon::leave, Daemon::kill9] {
        end(daemon);
        lan.proxied(0);
        lan.dropped(1);

        daemon = Daemon::start(&ground, CONFIG, &[]);
        assert_eq!(entrances(), BOXES);
        lan.proxied(0);
        lan.dropped(1);
        world.wire.assert_only_pings();
    }
    daemon.stop_clean();
}

/// Each new policy is the containers' too: other numbers, another target, no rule, none of this.
#[test]
fn another_policy() {
    let (ground, _world, _proxy) = scene!("boxes-policy", proxy);
    let _other = Server::start("proxy other", &[7894]);
    let (lan, _processes, daemon) = boxes(&ground);
    let with = |from: &str, to: &str| CONFIG.replace(from, to);
    let (d, n) = (["remote"; 6], ["nobody"; 6]);
    let [p, o] = [PROXY, "proxy other"].map(|who| [who, who, who, who, "remote", "remote"]);
    for (config, found, asked) in [
        (
            with("[tproxy mihomo]", "[tproxy first]\nport = 7895\n[tproxy mihomo]"),
            &["lan0 0x02000000", BOXES[1]][..],
            [p, n],
        ),
        (with("mihomo = /boxes/box", "other = /boxes/box"), &["lan0 0x02000000", BOXES[1]], [o, n]),
        (with("drop = /boxes/drop", "drop = /boxes/none"), &BOXES[..1], [p, d]),
        (with("[global]", "[global]\ncontainers = no"), &[], [d, d]),
        (CONFIG.to_owned(), &BOXES, [p, n]),
    ] {
        daemon.reconfigure(&config);

        assert_eq!(entrances(), found, "{config}");
        asked.into_iter().enumerate().for_each(|(i, want)| lan.expect(i, want));
    }
    daemon.stop_clean();
}

/// A container that is dropped and one that is proxied send without end while sections change places, or
/// the bits that are ours, and with these the marks that what they send has from where it comes in. Nothing
/// gets to the remote hosts, and of what is dropped nothing to a proxy.
#[test]
fn marks_that_change() {
    let (ground, mut world) = scene!("boxes-marks");
    let lan = Lan::new(&ground);
    let [dropped, proxied] = ["/boxes/drop1", "/boxes/box1"].map(|path| ground.cgroup(path));
    let _processes = [live(lan.client(0), &dropped), live(lan.client(1), &proxied)];
    let with = |first, mask, more: &str| {
        let mut sections = ["[tproxy mihomo]\nport = 7893\n", "[tproxy other]\nport = 7894\n"];
        sections.rotate_left(first);
        let sections = sections.concat();
        let rules = "drop = /boxes/drop.*\nmihomo = /boxes/box.*\n";
        format!("[global]\nfwmark-mask = {mask:#x}\n{more}{sections}[rules]\n{rules}")
    };
    let sections = |first, mask| with(first, mask, "");
    let in_turn = [0, 1].map(|first| sections(first, 0xff00_0000_u32));
    let of_masks = [0x0f00_0000, 0xff00_0000, 0x00f0_0000].map(|mask| sections(0, mask));
    // others' marks within the mask come and go
    let spare = "bypass-mark = 0xfd000000\nbypass-mark = 0xfc000000\n";
    let spared = ["", spare, &spare[..25]].map(|spare| with(0, 0xff00_0000, spare));
    let bind = |to: IpAddr| UdpSocket::bind(addr(any_of(to), 0)).expect("bind");
    let own = ["198.51.100.11", "2001:db8:3::11"].map(ip);
    let bind = |client| lan.client(client).run(|| REMOTES.map(|to| (bind(to), addr(to, 80))));
    let sockets = [0, 1].map(bind);
    let proxies = [7893, 7894].map(|port| proxies(&ground.root, port));
    let all = [&in_turn[..], &of_masks, &spared].map(|changes| (changes, RELOAD));
    let killed = [&of_masks[..], &spared].map(|changes| (changes, "kill -9"));
    for (changes, how) in all.into_iter().chain(killed) {
        println!("{} policies, {how}", changes.len());
        let daemon = Daemon::start(&ground, &changes[0], &[]);
        let found = || entrances().len() == 2;
        assert!(wait_until(PATIENCE, found), "{:?}", entrances());
        world.wire.packets();
        let done = AtomicBool::new(false);

        let (daemon, heard) = thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut heard = BTreeSet::new();
                while !done.load(Ordering::Relaxed) {
                    for (socket, to) in sockets.iter().flatten() {
                        // where it is dropped nobody says so
                        let _ = socket.send_to(b"x", to);
                    }
                    let all = proxies.iter().flatten().filter_map(recv_datagram);
                    heard.extend(all.map(|(from, _)| from.ip()));
                }
                heard
            });
            let ends = Ends(&done);
            let turns = changes.iter().cycle().skip(1).take(sized(40, 400));
            let daemon = turns.fold(daemon, |daemon, to| change(&ground, daemon, how, to));
            drop(ends);
            (daemon, sender.join().expect("it has sent"))
        });

        assert_eq!(world.wire.to_remote(), []);
        assert_eq!(heard, BTreeSet::from(own), "of the proxied one alone");
        daemon.stop_clean();
    }
}

/// What a dropped container sends comes in with the mark that flows which go directly may have: these are not forgotten for that.
#[test]
fn what_goes_directly_is_known_on() {
    let (ground, _world) = scene!("boxknown");
    let lan = Lan::new(&ground);
    load(
        "table inet others {\nchain c {\ntype filter hook input priority 0;\nct state new\n}\n}\n",
    );
    let _process = live(lan.client(0), &ground.cgroup("/boxes/drop1"));
    let config = CONFIG.replace("[global]", "[global]\ndefault = drop");
    let daemon = Daemon::start(&ground, &config, &[]);
    await_entrances(&daemon, &["lan0 0xff000000"]);
    add_flows(false, 0xff00_0000, 500);

    assert!(daemon.stop().success());

    assert!(conntrack_number("count") >= 500);
}

/// A namespace whose cgroup is gone is nobody's after a while, and a veth that is gone leaves nothing.
#[test]
fn what_is_gone() {
    let (ground, _world, _proxy) = scene!("boxes-gone", proxy);
    let (lan, [_process, dropped], daemon) = boxes(&ground);

    drop(dropped);
    std::fs::remove_dir(ground.at("/boxes/drop1")).expect("remove the cgroup");
    lan.dropped(1);
    await_entrances(&daemon, &BOXES[..1]);
    lan.direct(1);

    ip_lines("link del lan0\n");
    await_entrances(&daemon, &[]);
    daemon.stop_clean();
}

/// A namespace behind a veth of its own, as nspawn and routed networks have it.
pub fn routed(ground: &Ground, veth: &str, number: u8) -> Netns {
    let netns = Netns::new();
    sysctl("net/ipv4/ip_forward", "1");
    sysctl("net/ipv6/conf/all/forwarding", "1");
    attach(&netns, veth, "eth0", number);
    leave_by(&netns, number);
    ground.outside(|| {
        let lines = "route replace 198.51.100.0/24 via 192.0.2.1\n\
                     route replace 2001:db8:3::/48 via 2001:db8:1::1\n";
        ip_lines(lines);
    });
    netns
}

/// Routes by [`attach`]'s veth.
fn leave_by(netns: &Netns, number: u8) {
    netns.run(|| {
        let [gate4, own4] = [1, 2].map(|end| format!("198.51.100.{}", number * 4 + end));
        let [gate6, own6] = [1, 2].map(|end| format!("2001:db8:3:{number}::{end}"));
        ip_lines(&format!(
            "route add default via {gate4} dev eth0\nroute add default via {gate6} dev eth0\n"
        ));
        await_link(&[(&own4, &gate4), (&own6, &gate6)]);
        sysctl("net/ipv4/ping_group_range", "0 2147483647");
    });
}

/// A veth to a namespace, with addresses and no route.
fn attach(netns: &Netns, veth: &str, inside: &str, number: u8) {
    let (gate, own) = (number * 4 + 1, number * 4 + 2);
    let mac = format!("02:00:00:00:02:{number:02x}");
    ip_lines(&format!(
        "link add {veth} address {mac} type veth peer name {inside} netns {}\n\
         addr add 198.51.100.{gate}/30 dev {veth}\n\
         addr add 2001:db8:3:{number}::1/64 dev {veth} nodad\n\
         link set {veth} up\n",
        netns.path()
    ));
    netns.run(|| {
        ip_lines(&format!(
            "link set lo up\n\
             addr add 198.51.100.{own}/30 dev {inside}\n\
             addr add 2001:db8:3:{number}::2/64 dev {inside} nodad\n\
             link set {inside} up\n\
             neigh replace 198.51.100.{gate} lladdr {mac} dev {inside}\n\
             neigh replace 2001:db8:3:{number}::1 lladdr {mac} dev {inside}\n"
        ));
    });
}

/// Who answers that namespace on port 80 of the remote hosts, TCP and UDP, and pings.
#[track_caller]
fn answered(ground: &Ground, netns: &Netns, want: [&str; 3]) {
    for (proto, want) in [Proto::Tcp, Proto::Udp, Proto::Icmp].into_iter().zip(want) {
        for remote in REMOTES {
            let to = addr(remote, 80);
            let patience = if want == "nobody" { SILENCE } else { PATIENCE };
            let client = Client::new(&ground.root, proto, to).timeout(patience);
            let who = netns.run(|| client.run()).who();
            let want = match want {
                "nobody" | "refused" => want.to_string(),
                "echo" => format!("echo {remote}"),
                name => format!("{name} {to}"),
            };
            assert_eq!(who, want, "{proto:?} to {remote}");
        }
    }
}

/// A container behind a veth without a bridge goes its rule's way, whatever the sysctls that drop packets
/// with strange addresses.
#[test]
fn a_routed_veth_whatever_the_sysctls() {
    let (ground, mut world, _proxy) = scene!("boxrouted", proxy);
    let box1 = routed(&ground, "ve-box1", 1);
    let _process = live(&box1, &ground.cgroup("/boxes/box1"));
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    assert_eq!(entrances(), ["ve-box1 0x01000000"]);
    for (rp_filter, src_valid_mark) in [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)] {
        println!("rp_filter {rp_filter} src_valid_mark {src_valid_mark}");
        for interface in ["all", "ve-box1", "lo", "in0"] {
            let at = |name| format!("net/ipv4/conf/{interface}/{name}");
            sysctl(&at("rp_filter"), &rp_filter.to_string());
            sysctl(&at("src_valid_mark"), &src_valid_mark.to_string());
        }
        world.wire.packets();

        answered(&ground, &box1, [PROXY, PROXY, "echo"]);
        world.wire.assert_only_pings();
    }
    daemon.stop_clean();
    answered(&ground, &box1, ["remote", "remote", "echo"]);
}

/// Before a [gateway] section, and whatever other programs do to marks behind where the packet comes
/// in.
#[test]
fn a_container_comes_before_a_gateway_section() {
    let (ground, mut world, _proxy) = scene!("boxgate", proxy);
    let _other = Server::start("proxy other", &[7894]);
    let lan = Lan::new(&ground);
    let config = format!("{CONFIG}[gateway lan]\ninterface = br-lan\ntarget = other\n");
    let daemon = Daemon::start(&ground, &config, &[]);
    let o = "proxy other";
    lan.expect(0, [o, o, o, o, "remote", "remote"]);

    let direct = live(lan.client(0), &ground.cgroup("/boxes/direct"));
    let boxed = live(lan.client(1), &ground.cgroup("/boxes/box"));
    await_entrances(&daemon, &["lan0 0xfd000000", "lan1 0x01000000"]);
    lan.direct(0);
    lan.proxied(1);

    for priority in [-190, -150, -140, 0] {
        let restore = format!(
            "table inet who {{ chain c {{ type filter hook prerouting priority {priority}; \
             meta mark set ct mark; }}\n}}\n"
        );
        load(&restore);
        daemon.reload();
        world.wire.packets();
        lan.proxied(1);
        world.wire.assert_only_pings();
        load("delete table inet who\n");
    }
    drop((direct, boxed));
    daemon.stop_clean();
}

/// Processes come before the veth, and after it; a namespace has two; and one visits another.
#[test]
fn whoever_comes_first() {
    let (ground, _world, _proxy) = scene!("boxorder", proxy);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let late = Netns::new();
    let _process = live(&late, &ground.cgroup("/boxes/box1"));
    attach(&late, "ve-late", "eth0", 1);
    await_entrances(&daemon, &["ve-late 0x01000000"]);

    // a second network, as in `docker network connect`
    attach(&late, "ve-two", "eth1", 2);
    await_entrances(&daemon, &["ve-late 0x01000000", "ve-two 0x01000000"]);
    ip_lines("link del ve-late\n");
    await_entrances(&daemon, &["ve-two 0x01000000"]);

    // made here, and moved
    let moved = Netns::new();
    let _moved = live(&moved, &ground.cgroup("/boxes/drop1"));
    ip_lines("link add ve-moved type veth peer name ve-peer\nlink set ve-moved up\n");
    ip_lines(&format!("link set ve-peer netns {}\n", moved.path()));
    let both = ["ve-moved 0xff000000", "ve-two 0x01000000"];
    await_entrances(&daemon, &both);

    // one network for two: `docker run --network container:X`; the first rule decides
    let joined = live(&late, &ground.cgroup("/boxes/drop2"));
    await_entrances(&daemon, &["ve-moved 0xff000000", "ve-two 0xff000000"]);
    drop(joined);
    std::fs::remove_dir(ground.at("/boxes/drop2")).expect("remove the cgroup");
    await_entrances(&daemon, &both);

    // an administrator of this host, in a session that a rule covers, looks around there
    let cgroup = ground.cgroup("/boxes/drop-session");
    let _shell = Client::new(&cgroup, Proto::Udp, addr(ip("127.0.0.1"), 7)).serve();
    let _visitor = live(&late, &cgroup);
    ip_lines("link set ve-two down\nlink set ve-two up\n");
    assert!(!wait_until(Duration::from_secs(2), || entrances() != both), "{:?}", entrances());
    daemon.stop_clean();
}

/// What starts a container within a container begins in the outer one's namespace: the inner one's rule
/// decides for the outer one for no longer than that.
#[test]
fn one_within_another() {
    let (ground, mut world, _proxy) = scene!("boxinbox", proxy);
    let lan = Lan::new(&ground);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let _outer = live(lan.client(0), &ground.cgroup("/boxes/box1"));
    let outer = &BOXES[..1];
    await_entrances(&daemon, outer);
    for (i, path, meanwhile) in [
        (0, "/boxes/drop1", &["lan0 0xff000000"][..]),
        // the outer one has no rule
        (1, "/boxes/drop2", &BOXES),
    ] {
        let mut followed = || {
            let since = Instant::now();
            let cgroup = ground.cgroup(path);
            let script = "echo $$ >\"$0\"; read -r _; exec unshare -n cat";
            let mut command = Command::new("sh");
            command.args(["-c", script]).arg(cgroup.join("cgroup.procs")).stdin(Stdio::piped());
            let mut inner = lan.client(i).run(|| command.spawn().expect("start a shell"));
            await_entrances(&daemon, meanwhile);
            let netns = format!("/proc/{}/ns/net", inner.id());
            let netns = || std::fs::read_link(&netns).expect("its namespace");
            let before = netns();
            let stdin = inner.stdin.as_mut().expect("its input");
            stdin.write_all(b"\n").expect("let it move on");
            assert!(wait_until(PATIENCE, || netns() != before), "it does not move on");
            let seen = since.elapsed() < LOOKED_FOR - LOOKED_AGAIN;
            if seen {
                await_entrances(&daemon, outer);
                world.wire.packets();
                lan.proxied(0);
                world.wire.assert_only_pings();
                lan.direct(1);
            }
            drop(inner.stdin.take());
            inner.wait().expect("wait for it");
            std::fs::remove_dir(cgroup).expect("remove the cgroup");
            await_entrances(&daemon, outer);
            seen
        };
        // once more where others have kept the machine for all of that time
        assert!((0..10).any(|_| followed()), "each time it took too long");
    }
    daemon.stop_clean();
}

/// What is paused (`docker pause`) keeps its rule.
#[test]
fn one_that_is_paused() {
    let (ground, _world, _proxy) = scene!("boxpause", proxy);
    let (lan, _processes, _daemon) = boxes(&ground);
    for (state, reached) in [("1", false), ("0", true)] {
        std::fs::write(ground.at("/boxes/box1/cgroup.freeze"), state).expect("freeze");

        lan.proxied(0);
        let patience = if reached { PATIENCE } else { SILENCE };
        let client = Client::udp(&ground.root, addr(ip("198.51.100.10"), 7)).timeout(patience);
        assert_eq!(client.run().who() == "service", reached, "frozen: {state}");
    }
}

/// What is published (`docker run -p`) is reached from the world, also where its container is dropped.
#[test]
fn published_ports() {
    let (ground, _world, _proxy) = scene!("boxpublish", proxy);
    let (lan, _processes, _daemon) = boxes(&ground);
    let _services = [(0, "/boxes/box1"), (1, "/boxes/drop1")].map(|(i, path)| {
        let tcp = Client::tcp(&ground.at(path), addr(ip("::"), 7)).timeout(LONG);
        lan.client(i).run(|| tcp.serve())
    });
    for (family, to) in [
        ("ip", ["198.51.100.10", "198.51.100.11"]),
        ("ip6", ["[2001:db8:3::10]", "[2001:db8:3::11]"]),
    ] {
        let mut rules = String::new();
        for (i, to) in to.iter().enumerate() {
            for l4 in ["tcp", "udp"] {
                rules += &format!("iifname \"in0\" {l4} dport 800{i} dnat to {to}:7; ");
            }
        }
        load(&format!(
            "table {family} published {{ chain c {{ type nat hook prerouting priority dstnat; \
             {rules} }}\n}}\n"
        ));
    }

    for (port, host) in [8000, 8001].into_iter().flat_map(|p| HOSTS.map(|h| (p, h))) {
        for proto in [Proto::Tcp, Proto::Udp] {
            let ask = Client::new(&ground.root, proto, addr(host, port));
            let who = ground.outside(|| ask.run()).who();
            assert_eq!(who, "service", "{proto:?} port {port} of {host}");
        }
    }
}

/// Its rule follows a container to another bridge (`docker network connect` and `disconnect`), to a veth of
/// another name and to a new process (`docker restart`).
#[test]
fn whatever_befalls_it() {
    let (ground, mut world, _proxy) = scene!("boxfate", proxy);
    let (lan, [process, _dropped], daemon) = boxes(&ground);
    world.wire.packets();

    ip_lines(
        "link add br-two address 02:00:00:00:01:00 type bridge forward_delay 0\n\
         addr add 198.51.100.1/32 dev br-two\naddr add 2001:db8:3::1/128 dev br-two nodad\n\
         link set br-two up\nlink set lan0 master br-two\n\
         route add 198.51.100.10/32 dev br-two\nroute add 2001:db8:3::10/128 dev br-two\n",
    );
    lan.await_link(0);
    lan.proxied(0);
    lan.dropped(1);

    ip_lines("link set lan0 down\nlink set lan0 name other0\nlink set other0 up\n");
    await_entrances(&daemon, &["lan1 0xff000000", "other0 0x01000000"]);
    lan.await_link(0);
    world.wire.packets();
    lan.proxied(0);

    drop(process);
    std::fs::remove_dir(ground.at("/boxes/box1")).expect("remove the cgroup");
    lan.proxied(0);
    let _process = live(lan.client(0), &ground.cgroup("/boxes/box1"));
    lan.proxied(0);
    world.wire.assert_only_pings();
    daemon.stop_clean();
}

/// What a container runs within goes by the rule of the outer one.
#[test]
fn one_within_that_sends_by_the_outer_one() {
    let (ground, mut world, _proxy) = scene!("boxwithin", proxy);
    let (lan, _processes, daemon) = boxes(&ground);
    let inner = Netns::new();
    lan.client(0).run(|| {
        sysctl("net/ipv4/ip_forward", "1");
        sysctl("net/ipv6/conf/all/forwarding", "1");
        attach(&inner, "ve-inner", "eth0", 9);
        for family in ["ip", "ip6"] {
            load(&format!(
                "table {family} nat {{ chain c {{ type nat hook postrouting priority srcnat; \
                 oifname \"eth0\" masquerade; }}\n}}\n"
            ));
        }
    });
    leave_by(&inner, 9);

    let _inner = live(&inner, &ground.cgroup("/boxes/box1/docker/inner"));

    world.wire.packets();
    answered(&ground, &inner, [PROXY, PROXY, "echo"]);
    world.wire.assert_only_pings();
    daemon.stop_clean();
}

/// DNS, and switches, as in a [gateway] section.
#[test]
fn what_its_target_takes() {
    let (ground, mut world, _proxy) = scene!("boxdns", proxy);
    let _resolver = Server::start("resolver", &[1053]);
    let lan = Lan::new(&ground);
    let config = CONFIG.replace(
        "port = 7893",
        "port = 7893\nudp = no\ndns-hijack = 127.0.0.1:1053\ndns-hijack = [::1]:1053",
    );
    let config = config.replace("[global]", "[global]\nbypass = 203.0.113.9");
    let _process = live(lan.client(0), &ground.cgroup("/boxes/box1"));
    let daemon = Daemon::start(&ground, &config, &[]);

    world.wire.packets();
    for remote in REMOTES {
        assert!(lan.ask(0, Proto::Udp, addr(remote, 53)).starts_with("resolver "));
        let to = addr(remote, 80);
        assert_eq!(lan.ask(0, Proto::Tcp, to), format!("{PROXY} {to}"));
    }
    world.wire.assert_only_pings();
    let to = addr(REMOTE4, 80);
    assert_eq!(lan.ask(0, Proto::Udp, to), format!("remote {to}"));
    let to = addr(ip("203.0.113.9"), 80);
    assert_eq!(lan.ask(0, Proto::Tcp, to), format!("remote {to}"));

    let list = ground.dir.join("list");
    write_private(&list, "203.0.113.8\n");
    let takes =
        format!("port = 7893\ntcp-ports = 443\nquic = reject\nbypass-file = {}", list.display());
    daemon.reconfigure(&CONFIG.replace("port = 7893", &takes));

    let [seven, eight] = [REMOTE4, ip("203.0.113.8")];
    for (proto, to, port, who) in [
        (Proto::Tcp, seven, 443, PROXY),
        (Proto::Tcp, seven, 80, "remote"),
        (Proto::Tcp, eight, 443, "remote"),
        (Proto::Tcp, REMOTE6, 443, PROXY),
        (Proto::Udp, seven, 443, "refused"),
        (Proto::Udp, REMOTE6, 443, "refused"),
        (Proto::Udp, eight, 443, "remote"),
        (Proto::Udp, seven, 53, PROXY),
    ] {
        let to = addr(to, port);
        let want = if who == "refused" { who.to_string() } else { format!("{who} {to}") };
        assert_eq!(lan.ask(0, proto, to), want, "{proto:?} {to}");
    }
    daemon.stop_clean();
}

/// Where bridged packets pass the IP hooks, as some engines have it: all goes as without, published
/// ports too, and containers on one bridge reach each other.
#[test]
fn bridge_netfilter() {
    let ground = ground!("boxbrnf");
    if !Path::new("/proc/sys/net/bridge").exists() {
        println!("SKIP: no br_netfilter in this kernel");
        return;
    }
    let (mut world, _proxy) = World::with_proxy(&ground);
    let (lan, _processes, daemon) = boxes(&ground);

    gateway::bridge_netfilter(true);
    world.wire.packets();
    lan.proxied(0);
    lan.dropped(1);
    world.wire.assert_only_pings();
    for port in [8000, 8001] {
        let family = ["ip", "ip6"][port - 8000];
        let to = ["198.51.100.10", "[2001:db8:3::10]"][port - 8000];
        load(&format!(
            "table {family} published {{ chain c {{ type nat hook prerouting priority dstnat; \
             iifname \"in0\" udp dport {port} dnat to {to}:7; }}\n}}\n"
        ));
        let ask = Client::udp(&ground.root, addr(HOSTS[port - 8000], port as u16));
        assert_eq!(ground.outside(|| ask.run()).who(), "service", "{to}");
    }
    for (from, to) in [(0, "198.51.100.11"), (0, "2001:db8:3::11"), (1, "198.51.100.10")] {
        let (cgroup, to) = (&ground.root, ip(to));
        let ping = Client::ping(cgroup, to);
        assert_eq!(lan.client(from).run(|| ping.run()).who(), format!("echo {to}"));
        let ask = Client::udp(cgroup, addr(to, 7));
        assert_eq!(lan.client(from).run(|| ask.run()).who(), "service");
    }
    load("delete table ip published\ndelete table ip6 published\n");

    // another network, whose bridge is new, and whose container is
    ip_lines("link add br-two type bridge\nlink set lan1 master br-two up\n");
    lan.proxied(0);
    daemon.reload();
    lan.proxied(0);
    daemon.stop_clean();
}

/// How long a container's packets go as if there were no rule: one that sends from its first moment on,
/// in a namespace that was ready before (as with podman), and one whose network comes last (as with
/// docker).
#[test]
fn the_window_is_short() {
    let (ground, _world, _proxy) = scene!("boxwindow", proxy);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let to = addr(REMOTE4, 80);
    let proxied = format!("{PROXY} {to}");
    let mut windows = Vec::new();
    for number in 1..=10 {
        let veth = format!("ve-{number}");
        let early = number % 2 == 0;
        let netns = Netns::new();
        let attach = || attach(&netns, &veth, "eth0", number);
        early.then(attach);
        let mut began = Instant::now();
        let _process = live(&netns, &ground.cgroup(&format!("/boxes/box{number}")));
        if !early {
            attach();
            began = Instant::now();
        }
        netns.run(|| {
            ip_lines(&format!("route add default via 198.51.100.{} dev eth0\n", number * 4 + 1))
        });
        if number == 1 {
            sysctl("net/ipv4/ip_forward", "1");
            ground.outside(|| ip_lines("route add 198.51.100.0/24 via 192.0.2.1\n"));
        }

        let mut last = Duration::ZERO;
        let done = wait_until(PATIENCE, || {
            let client = Client::udp(&ground.root, to).timeout(SILENCE);
            let who = netns.run(|| client.run()).who();
            if who != proxied {
                last = began.elapsed();
            }
            who == proxied
        });
        assert!(done, "{}", daemon.logs());
        windows.push((early, last));
    }
    println!("windows: {windows:?}");
    windows.sort_by_key(|(_, window)| *window);
    // some requests, each of which may have met it, and not the seconds between two looks
    assert!(windows[5].1 < 4 * SILENCE, "{windows:?}");
    daemon.stop_clean();
}

/// A namespace on the LAN's bridge, by that veth.
fn bridged(netns: &Netns, veth: &str, number: usize) {
    let path = netns.path();
    ip_lines(&format!(
        "link add {veth} type veth peer name eth0 netns {path}\n\
         link set {veth} master br-lan up\n"
    ));
    netns.run(|| {
        ip_lines(&format!(
            "link set lo up\naddr add 198.51.100.{number}/24 dev eth0\nlink set eth0 up\n\
             neigh replace {LAN4} lladdr 02:00:00:00:01:00 dev eth0\n\
             route add default via {LAN4}\n"
        ));
    });
}

/// A container of a new cgroup that floods from its first moment on; its network is ready before, as with
/// podman, or comes last, as with docker.
fn flood(ground: &Ground, number: usize, early: bool) -> (Netns, Running) {
    let (netns, veth) = (Netns::new(), format!("ve{number}"));
    let attach = || bridged(&netns, &veth, number);
    let cgroup = ground.cgroup(&format!("/boxes/box{number}"));
    early.then(attach);
    let flood = netns.run(|| Client::udp(&cgroup, addr(REMOTE4, 80)).flood().spawn());
    (!early).then(attach);
    (netns, flood)
}

/// What a container sends that floods from its first moment on, before its rule is in force: that is
/// told, and where a [gateway] section drops what no container is known for, it is nothing, also while
/// no daemon is there.
#[test]
fn packets_before_the_rule() {
    let (ground, mut world, _proxy) = scene!("boxfirst", proxy);
    let _lan = Lan::new(&ground);
    let gateway = "[gateway unknown]\ninterface = br-lan\ntarget = drop\n";
    let to = addr(REMOTE4, 80);
    for (closed, numbers) in [(false, 21..31), (true, 31..41)] {
        let config = format!("{CONFIG}{}", if closed { gateway } else { "" });
        let mut running = Some(Daemon::start(&ground, &config, &[]));
        let mut left = Vec::new();
        for number in numbers {
            let early = number % 2 == 0;
            let dead = closed && number > 38;
            if dead {
                running.take().into_iter().for_each(Daemon::kill9);
            }
            world.wire.packets();

            let (netns, flood) = flood(&ground, number, early);
            if dead {
                // some thousand packets, that nobody hears of
                std::thread::sleep(SILENCE);
                assert_eq!(world.wire.to_remote(), [], "left without a daemon");
            }
            let daemon = running.get_or_insert_with(|| Daemon::start(&ground, &config, &[]));
            await_entrances(daemon, &[&format!("ve{number} 0x01000000")]);
            drop(flood);
            netns.run(|| await_link(&[(&format!("198.51.100.{number}"), LAN4)]));

            let first = if early { "network first" } else { "process first" };
            left.push((first, world.wire.to_remote().len()));
            let who = netns.run(|| Client::udp(&ground.root, to).run()).who();
            assert_eq!(who, format!("{PROXY} {to}"));
            ip_lines(&format!("link del ve{number}\n"));
            await_entrances(daemon, &[]);
        }
        println!("closed: {closed}: {left:?}");
        assert!(!closed || left.iter().all(|(_, count)| *count == 0), "{left:?}");
        running.expect("it was started again").stop_clean();
    }
}

/// There, a container whose rule says `direct` goes directly.
#[test]
fn direct_before_a_section_that_drops() {
    let (ground, _world, _proxy) = scene!("boxdirect", proxy);
    let lan = Lan::new(&ground);
    let config = format!("{CONFIG}[gateway unknown]\ninterface = br-lan\ntarget = drop\n");
    let daemon = Daemon::start(&ground, &config, &[]);
    lan.dropped(0);

    let _process = live(lan.client(0), &ground.cgroup("/boxes/direct"));

    await_entrances(&daemon, &["lan0 0xfd000000"]);
    lan.direct(0);
    daemon.stop_clean();
}

/// One of those that come and go.
struct Brief {
    netns: Netns,
    process: Running,
    path: String,
    veth: String,
    want: String,
    /// When there was all that there is to know of it.
    made: Instant,
}

impl Brief {
    /// The process comes first, as with docker, or the network, as with podman.
    fn new(ground: &Ground, number: usize) -> Brief {
        let (kind, want) =
            [("box", PROXY), ("drop", "nobody"), ("other", "proxy other")][number % 3];
        let want = if want == "nobody" { want.into() } else { format!("{want} {}", Brief::asks()) };
        let (path, veth) = (format!("/boxes/{kind}{number}"), format!("ve{number}"));
        let (netns, cgroup) = (Netns::new(), ground.cgroup(&path));
        let net = format!("10.{}.{}", number / 250, number % 250);
        let early = (number % 2 == 0).then(|| live(&netns, &cgroup));
        let line = format!(
            "link add {veth} address 02:00:00:00:03:01 type veth peer name eth0 address \
             02:00:00:00:03:02 netns {}\naddr add {net}.1/30 dev {veth}\nlink set {veth} up\n\
             neigh replace {net}.2 lladdr 02:00:00:00:03:02 dev {veth}\n",
            netns.path()
        );
        ip_lines(&line);
        let mut made = Instant::now();
        netns.run(|| {
            let line = format!(
                "addr add {net}.2/30 dev eth0\nlink set eth0 up\n\
                 neigh replace {net}.1 lladdr 02:00:00:00:03:01 dev eth0\n\
                 route add default via {net}.1\n"
            );
            ip_lines(&line);
        });
        let process = early.unwrap_or_else(|| {
            made = Instant::now();
            live(&netns, &cgroup)
        });
        Brief { netns, process, path, veth, want, made }
    }

    fn asks() -> std::net::SocketAddr {
        addr(REMOTE4, 80)
    }

    fn ask(&self, ground: &Ground) -> Running {
        let patience = if self.want == "nobody" { SILENCE } else { PATIENCE };
        let client = Client::udp(&ground.root, Brief::asks()).timeout(patience);
        self.netns.run(|| client.spawn())
    }

    /// The veth goes by itself, or with its namespace.
    fn end(self, ground: &Ground, with_namespace: bool) {
        drop(self.process);
        if !with_namespace {
            ip_lines(&format!("link del {}\n", self.veth));
        }
        drop(self.netns);
        std::fs::remove_dir(ground.at(&self.path)).expect("remove a cgroup");
    }
}

/// When each veth's rule came, by index, as `nft monitor` tells.
fn watch_rules() -> (Child, Arc<Mutex<HashMap<u32, Instant>>>) {
    let mut monitor = Command::new("nft");
    monitor.args(["monitor", "new", "rules"]).stdin(Stdio::null()).stdout(Stdio::piped());
    monitor.stderr(Stdio::null());
    let mut monitor = monitor.spawn().expect("start nft");
    let seen = Arc::new(Mutex::new(HashMap::new()));
    let (lines, rules) = (monitor.stdout.take().expect("stdout is piped"), seen.clone());
    let listens = Arc::new(AtomicBool::new(false));
    let heard = listens.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(lines).lines().map_while(Result::ok) {
            heard.store(true, Ordering::Relaxed);
            let index = line.strip_prefix("add rule inet cgtproxy veth_");
            let index = index.and_then(|rest| rest.split(' ').next()?.parse().ok());
            let mut rules = rules.lock().expect("no panic");
            rules.extend(index.map(|index: u32| (index, Instant::now())));
        }
    });
    let there = wait_until(PATIENCE, || {
        load("table inet seen {\nchain c {\ncounter\n}\n}\n");
        load("delete table inet seen\n");
        listens.load(Ordering::Relaxed)
    });
    assert!(there, "nft monitor tells nothing");
    (monitor, seen)
}

/// When that veth's rule came.
#[track_caller]
fn await_rule(rules: &Mutex<HashMap<u32, Instant>>, index: u32) -> Instant {
    let came = || rules.lock().expect("no panic").get(&index).copied();
    assert!(wait_until(PATIENCE, || came().is_some()), "no rule for veth {index}");
    came().expect("it came")
}

/// The median, 90 % and the longest.
fn quantiles(mut times: Vec<Duration>) -> [Duration; 3] {
    times.sort();
    [50, 90, 100].map(|share| times[(times.len() - 1) * share / 100])
}

/// Containers that come and go, in the long form twenty a second for 25 seconds: each goes its way, and
/// what is gone leaves nothing.
#[test]
fn many_come_and_go() {
    let (ground, _world, _proxy) = scene!("boxmany", proxy);
    let _other = Server::start("proxy other", &[7894]);
    sysctl("net/ipv4/ip_forward", "1");
    let (all, at_once) = (sized(40, 500), sized(12, 100));
    let pace = Duration::from_millis(sized(0, 50) as u64);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    // from the first one on the table is ready for them
    let first = Brief::new(&ground, 240);
    await_entrances(&daemon, &["ve240 0x01000000"]);
    let (mut monitor, rules) = watch_rules();
    let (_, memory) = daemon.footprint();
    let (busy, began) = (daemon.busy(), Instant::now());
    let (mut living, mut asked) = (VecDeque::new(), VecDeque::new());
    let (mut windows, mut wrong, mut most) = (Vec::new(), Vec::new(), 0);

    for number in 0..all + at_once + ASKED {
        if number < all {
            std::thread::sleep((pace * number as u32).saturating_sub(began.elapsed()));
            let new = Brief::new(&ground, if number < 240 { number } else { number + 1 });
            living.push_back((interface_index(&new.veth), new));
        }
        most = most.max(if number % 16 == 0 { daemon.footprint().1 } else { 0 });
        if number >= at_once {
            asked.extend(living.pop_front().map(|(index, old)| (index, old.ask(&ground), old)));
        }
        if number % 16 == 0 {
            most = most.max(daemon.footprint().1);
        }
        if number >= at_once + ASKED {
            let (index, answer, old) = asked.pop_front().expect("it was asked");
            let who = answer.wait().0.who();
            if who != old.want {
                wrong.push(format!("{} behind {}: {who}", old.path, old.veth));
            }
            windows.push(await_rule(&rules, index).saturating_duration_since(old.made));
            old.end(&ground, number % 2 == 0);
        }
    }
    let (took, used) = (began.elapsed(), daemon.busy() - busy);
    let _ = monitor.kill().and_then(|()| monitor.wait());

    assert_eq!(wrong, [""; 0], "{}", daemon.logs());
    let at = quantiles(windows);
    println!(
        "{all} in {took:?}: rule after {at:?} (median, 90 %, longest); processor {used:?}; memory \
         {memory} KiB, {most} at most"
    );
    await_entrances(&daemon, &["ve240 0x01000000"]);
    first.end(&ground, true);
    assert!(wait_until(PATIENCE, || !table().contains("veth_")), "{}", table());
    let back = || daemon.footprint().1 <= memory + 1024;
    assert!(wait_until(PATIENCE, back), "{memory} KiB, then {:?}", daemon.footprint());
    daemon.stop_clean();
}

/// So many are asked at a time, so that a dropped one may be waited for.
const ASKED: usize = 8;

/// What the kernel refuses, a reload too, leaves those that lose their cgroup just then where they were, by
/// the old policy's numbers.
#[test]
fn a_reload_is_refused_while_one_ends() {
    let ground = ground!("boxrefused");
    let netns = Netns::new();
    attach(&netns, "ve-other", "eth0", 1);
    let stays = |in_one: bool| {
        let cgroup = ground.cgroup("/boxes/other1");
        let process = live(&netns, &cgroup);
        let daemon = Daemon::start(&ground, CONFIG, &["--no-seccomp"]);
        await_entrances(&daemon, &["ve-other 0x02000000"]);
        drop(process);
        let since = Instant::now();
        if in_one {
            daemon.signal(Signal::SIGSTOP);
        }
        std::fs::remove_dir(&cgroup).expect("remove the cgroup");
        let mut faults = refuse_requests(&daemon);
        let more = "[tproxy first]\nport = 7895\n[tproxy mihomo]";
        daemon.configure(&CONFIG.replace("[tproxy mihomo]", more));
        daemon.signal(Signal::SIGHUP);
        daemon.signal(Signal::SIGCONT);
        assert!(daemon.wait_log("reload", PATIENCE), "{}", daemon.logs());
        let log = daemon.logs();
        assert!(log.contains("the old configuration stays"), "{log}");
        faults.kill().and_then(|()| faults.wait()).expect("end strace");
        let repaired = daemon.wait_log("the table is in force again", PATIENCE);
        assert!(repaired, "{}", daemon.logs());
        let found = entrances();
        let stays = found == ["ve-other 0x02000000"];
        let over = found.is_empty() && since.elapsed() > LOOKED_FOR;
        assert!(stays || over, "{found:?}\n{}\n{}", table(), daemon.logs());
        daemon.stop_clean();
        stays
    };
    for in_one in [true, false] {
        // once more where others have kept the machine for all of that time
        assert!((0..10).any(|_| stays(in_one)), "each time it took too long");
    }
}

/// Has the kernel refuse whatever the daemon sends it, until this is killed.
fn refuse_requests(daemon: &Daemon) -> Child {
    let pid = daemon.pid().to_string();
    let inject = ["-qq", "-o", "/dev/null", "-e", "inject=sendto:error=ENOMEM", "-p", &pid];
    let strace = Command::new("strace").args(inject).spawn().expect("start strace");
    let attached = || daemon.process("TracerPid") != "0";
    assert!(wait_until(PATIENCE, attached), "strace does not attach");
    strace
}

/// What has not been found is looked for no longer than some seconds, and then nothing wakes the daemon.
#[test]
fn the_search_ends() {
    let ground = ground!("boxidle");
    let root = ground.cgroup("/own");
    let config = CONFIG.replace("[global]", &format!("[global]\ncgroup-root = {}", root.display()));
    // a veth that leads to nobody, and cgroups without processes
    let daemon = Daemon::start(&ground, &config, &[]);
    let old = ground.cgroup("/own/boxes/box1");
    // whoever may make cgroups of his own makes them deeper
    (0..300).for_each(|i| drop(ground.cgroup(&format!("/own/boxes/box3/{i}"))));
    let all = || daemon.watches();
    assert!(wait_until(PATIENCE, || all().0 > 300), "{:?} watches", all());
    let nobody = Netns::new();
    attach(&nobody, "ve-nobody", "eth0", 1);
    daemon.await_rest(Duration::from_secs(3));
    assert_eq!(all().1, 256, "watches for cgroups without a process");
    // who comes later is found all the same, also in a cgroup that is there
    let process = live(&nobody, &old);
    await_entrances(&daemon, &["ve-nobody 0x01000000"]);
    drop(process);
    std::fs::remove_dir(&old).expect("remove the cgroup");
    await_entrances(&daemon, &[]);
    let _process = live(&nobody, &ground.cgroup("/own/boxes/drop2"));
    await_entrances(&daemon, &["ve-nobody 0xff000000"]);
    // nothing is kept open where there is nothing to be told of
    assert_eq!(daemon.inotifies(), 2);
    for i in 0..300 {
        std::fs::remove_dir(ground.at(&format!("/own/boxes/box3/{i}"))).expect("remove a cgroup");
    }
    std::fs::remove_dir(ground.at("/own/boxes/box3")).expect("remove a cgroup");
    let closed = || daemon.inotifies() == 1;
    assert!(wait_until(Duration::from_secs(30), closed), "{:?} watches", all());
    daemon.stop_clean();
}

/// Whoever has no rule yet is told of as well, with a line for one.
#[test]
fn apps_shows_containers() {
    let ground = ground!("boxes-apps");
    let lan = Lan::new(&ground);
    let _ruled = live(lan.client(0), &ground.cgroup("/boxes/box1"));
    let _other = live(lan.client(1), &ground.cgroup("/docker/0f3a/inner"));
    let find = "[(a['cgroup'], a['veth'], a['target'], a['decides'], a['line'], a['flows']) \
                for a in d['apps'] if a['state'] == 'container']";
    let want = "[('/boxes/box1', 'lan0', 'mihomo', 'rule', None, None), \
                ('/docker/0f3a/inner', 'lan1', 'direct', 'default', \
                'mihomo = /docker/0f3a/inner', None)]";
    let said = || run_with(&ground, CONFIG, &["apps", "--json"]);
    let shown = || crate::tools::query(&said().out, find);
    assert!(wait_until(PATIENCE, || shown() == want), "{}", shown());
    let text = run_with(&ground, CONFIG, &["apps"]).out;
    assert!(text.contains("  behind lan1\n"), "{text}");
}

/// `explain --pid` and `status` tell by which veth a container comes in, and what it is called.
#[test]
fn it_is_told_what_is_a_container() {
    let ground = ground!("boxes-told");
    let lan = Lan::new(&ground);
    let path = format!("/boxes/box/docker-{}.scope", "0123456789abcdef".repeat(4));
    let process = live(lan.client(0), &ground.cgroup(&path));
    let daemon = Daemon::start(&ground, CONFIG, &[]);

    let said = daemon.ask(&["explain", "--pid", &process.pid().to_string()]).out;
    for text in ["behind lan0: the rule covers", "container docker 0123456789ab\n"] {
        assert!(said.contains(text), "{said}");
    }
    // which namespace that of others' processes is, not everybody may read
    let said = as_nobody(&["explain", "--pid", &process.pid().to_string()]).out;
    assert!(said.contains("    network another namespace"), "{said}");
    let find = "[(c['veth'], c['target'], c['in_force'], c['container'], c['cgroup']) \
                for c in d['containers']]";
    let want = format!("[('lan0', 'mihomo', True, 'docker 0123456789ab', '{path}')]");
    assert_eq!(daemon.json(find), want);
    let text = daemon.ask(&["status"]).out;
    assert!(text.contains("lan0  mihomo  docker 0123456789ab  /boxes/box/docker-"), "{text}");
    daemon.stop_clean();
}

/// Whoever names a cgroup so that a terminal would do something has it do nothing; for programs the name is
/// what it is.
#[test]
fn a_container_of_a_hostile_name() {
    let ground = ground!("boxes-hostile");
    let lan = Lan::new(&ground);
    let path = "/boxes/box\\x2d/machine-e\x1b[2J\tvil\"s.scope";
    let process = live(lan.client(0), &ground.cgroup(path));
    let daemon = Daemon::start(&ground, CONFIG, &[]);

    let pid = process.pid().to_string();
    for args in [&["explain", "--pid", &pid][..], &["status"]] {
        let said = daemon.ask(args).out;
        assert!(said.contains("e\\u{1b}[2J\\tvil\"s"), "{said}");
        assert!(said.lines().all(|line| !line.contains(char::is_control)), "{said:?}");
    }
    let find = "[(c['container'], c['cgroup']) for c in d['containers']]";
    let want = r#"[('e\x1b[2J\tvil"s', '/boxes/box\\x2d/machine-e\x1b[2J\tvil"s.scope')]"#;
    assert_eq!(daemon.json(find), want);
    daemon.stop_clean();
}
