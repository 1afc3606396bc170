//! `status`: what the kernel holds now, as text and as JSON.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cgtproxy::config::file::Files;
use cgtproxy::config::Config;
use cgtproxy::kernel::Kernel;
use cgtproxy::nft::expr::{Expr, SetRef};
use cgtproxy::nft::table::{again_chain, classifying, Chain, Rule, Shape, Table};
use cgtproxy::nft::view::RuleView;
use nix::sys::signal::Signal;

use super::{columns, query, CONFIG};
use crate::client::{Client, Proto, SILENCE};
use crate::daemon::{run_with, write_private, Daemon};
use crate::gateway::Lan;
use crate::ground::{addr, ip, ip_batch, sh, Ground, REMOTE4};
use crate::json::is_documented;
use crate::kernel::counters;
use crate::world::{Server, World, PROXY};

/// Where nothing of ours is in the kernel, that is said, and it is no error.
#[test]
fn status_of_a_kernel_without_us() {
    let ground = ground!("status-none");

    let [text, json] =
        [&["status"][..], &["status", "--json"]].map(|args| run_with(&ground, CONFIG, args).fine());

    let want = "table inet cgtproxy: not there, nothing is classified; no cgtproxy is running\n";
    assert_eq!(text, want);
    assert_eq!(query(&json, "[d['in_force'], d['targets'], d['daemon']]"), "[False, [], None]");
}

/// A target's line has its mark and its port, whether somebody listens there, and what nft counts.
#[test]
fn status_counts_what_nft_counts() {
    let (ground, _world) = scene!("status");
    let proxied = ground.cgroup("/services/aria2");
    let dropped = ground.cgroup("/services/telemetry");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let none = ["mihomo", "0x01000000", "7893", "no", "1", "0", "0 B", "0"];
    assert_eq!(daemon.target("mihomo"), none);

    let to = addr(REMOTE4, 80);
    assert_eq!(Client::tcp(&proxied, to).run().who(), "refused");
    {
        let _proxy = Server::start(PROXY, &[7893]);
        assert_eq!(Client::udp(&proxied, to).run().who(), format!("{PROXY} {to}"));
        assert_eq!(daemon.target("mihomo")[3], "tcp udp");
    }
    assert_eq!(daemon.target("mihomo")[3], "no");
    assert_eq!(Client::udp(&dropped, to).timeout(SILENCE).run().who(), "nobody");

    let listed = |chain: &str| {
        let (packets, bytes): (Vec<u64>, Vec<u64>) = counters(chain).into_iter().unzip();
        let packets = packets.iter().sum::<u64>();
        assert_ne!(packets, 0, "{chain}");
        (packets.to_string(), bytes.iter().sum::<u64>())
    };
    let row = daemon.target("mihomo");
    let (packets, bytes) = listed("to_mihomo");
    assert!(packets.parse::<u32>().is_ok_and(|n| n >= 2), "{packets}");
    assert_eq!((&row[5], &row[6]), (&packets, &format!("{bytes} B")));
    assert_eq!(row[7], listed("tproxy_mihomo").0, "refused");
    let row = daemon.target("drop");
    assert_eq!(row[5], listed("to_drop").0);
    assert_eq!(row[1..4], ["-", "-", "-"]);
    assert_eq!(daemon.target("direct")[5..], ["-", "-", "-"]);
}

/// A configuration with all kinds of sections, or nearly so.
const ALL_KINDS: &str = "
[global]
default = drop
bypass-mark = 0xff
bypass-user = 65533
[tproxy one]
port = 7893
address = 127.0.0.1
dns-hijack = 127.0.0.1:1053
dns-hijack = 2001:db8:3::1
dns-hijack-local = yes
[tproxy two]
port = 7894
udp = drop
[gateway lan]
interface = br-lan
interface = wlan*
source = 192.0.2.0/24
source-mac = 02:00:00:00:00:01
source-mac = 02:00:00:00:00:02
target = one
";

/// The rules of all chains that `run` sends, but for `again` where the kernel has none.
fn sent(config: &Config, held: &[RuleView]) -> Vec<(String, Vec<Expr>)> {
    let mut chains = Table::new(config).chains;
    // where br_netfilter is loaded
    let is_there = |name: &str| held.iter().any(|rule| rule.chain == name);
    chains.extend(again_chain(config).filter(|chain| is_there(&chain.name)));
    for (name, rules) in classifying(config, &Shape::default()) {
        chains.iter_mut().find(|chain| chain.name == name).expect("a chain").rules = rules;
    }
    let lowered = |rule: &Rule| {
        let mut exprs = Vec::new();
        rule.iter().for_each(|stmt| stmt.lower(&mut exprs));
        exprs
    };
    let of = |chain: &Chain| -> Vec<_> {
        chain.rules.iter().map(|rule| (chain.name.clone(), lowered(rule))).collect()
    };
    chains.iter().flat_map(of).collect()
}

/// Every instruction of a table with all kinds of sections is known by what the kernel tells of it.
#[test]
fn rules_read_back_as_they_were_sent() {
    let ground = ground!("read-back");
    let daemon = Daemon::start(&ground, ALL_KINDS, &[]);
    let config = cgtproxy::config::load(&Files::new(false), &daemon.config);
    let config = config.expect("a configuration");

    let held = Kernel::open().and_then(|mut kernel| kernel.rules());
    let held = held.expect("the rules of the table");

    let mut sent = sent(&config, &held);
    let mut held: Vec<_> = held.into_iter().map(|rule| (rule.chain, rule.exprs)).collect();
    for rules in [&mut sent, &mut held] {
        // the kernel tells chains in an order of its own
        rules.sort_by(|a, b| a.0.cmp(&b.0));
        // and in rules an anonymous set goes by the name that the kernel gave it
        for expr in rules.iter_mut().flat_map(|rule| &mut rule.1) {
            if let Expr::Lookup { set, .. } | Expr::LookupVerdict { set, .. } = expr {
                if !matches!(set, SetRef::Named(name) if !name.starts_with("__")) {
                    *set = SetRef::Named(String::new());
                }
            }
        }
    }
    assert!(sent.len() > 50, "{}", sent.len());
    assert_eq!(held, sent);
}

/// [`CONFIG`] with numbers of its own for the routing.
fn numbered(ground: &Ground) -> String {
    let root = ground.root.display();
    format!("[global]\nroute-table = 4242\nrule-priority = 77\ncgroup-root = {root}\n{CONFIG}")
}

/// An ip rule or route that has gone is told as the command that brings it back.
#[test]
fn status_tells_missing_rules_and_routes() {
    let ground = ground!("status-missing");
    let daemon = Daemon::start(&ground, &numbered(&ground), &[]);
    assert!(!daemon.shown().contains("missing"), "{}", daemon.shown());
    assert_eq!(daemon.shown().matches("present").count(), 4);

    // or it would mend them
    daemon.signal(Signal::SIGSTOP);
    ip_batch(&["-4"], "rule del pref 77\n");
    ip_batch(&["-6"], "route flush table 4242\n");

    let status = daemon.shown();
    let missing = [
        "missing  ip rule add pref 77 iif lo fwmark 0x01000000/0xff000000 lookup 4242 protocol 99\n",
        "missing  ip -6 route add local default dev lo table 4242 proto 99 metric 1\n",
    ];
    assert_eq!(status.matches("missing").count(), 2, "{status}");
    for line in missing {
        assert!(status.contains(line), "{status}");
        sh(line.trim().strip_prefix("missing  ").expect("a command"));
    }
    assert_eq!(daemon.shown().matches("present").count(), 4);
    let all = "[r['present'] for r in d['rules'] + d['routes']]";
    assert_eq!(daemon.json(all), "[True, True, True, True]");
}

/// Takes each of the ip rules `wants` away, of both families, under a daemon with gateways of `br-lan`
/// and of `second`: it is told, and nothing else, as the command that brings it back.
fn tells_missing(ground: &Ground, second: &str, wants: &[String]) {
    // both sections have the first interface
    let config = format!(
        "{}[gateway first]\ninterface = br-lan\nsource = 198.51.100.9\ntarget = direct\n\
         [gateway lan]\ninterface = br-lan\ninterface = {second}\ntarget = mihomo\n",
        numbered(ground)
    );
    let daemon = Daemon::start(ground, &config, &[]);
    let status = daemon.shown();
    assert!(!status.contains("missing"), "{status}");
    assert_eq!(status.matches("present").count(), 2 * (2 + wants.len()), "{status}");
    // or it would mend them
    daemon.signal(Signal::SIGSTOP);
    let without = config.split("[gateway").next().expect("the rest");
    write_private(&daemon.config, without);
    for (family, ip) in [("-4", "ip"), ("-6", "ip -6")] {
        for want in wants {
            ip_batch(&[family], &format!("rule del {want}\n"));

            let status = daemon.shown();
            let line = format!("missing  {ip} rule add {want} protocol 99\n");
            assert!(status.contains(&line), "no {line} in {status}");
            assert_eq!(status.matches("missing").count(), 1, "{status}");
            let missing = "[(r['family'], r['text']) for r in d['rules'] if not r['present']]";
            let version = family.replace('-', "ipv");
            assert_eq!(daemon.json(missing), format!("[('{version}', '{want} protocol 99')]"));

            ip_batch(&[family], &format!("rule add {want} protocol 99\n"));
            assert!(!daemon.shown().contains("missing"));
        }
    }
    daemon.signal(Signal::SIGCONT);
    daemon.stop();
}

/// The ip rules of gateways: by what the table routes, whatever the configuration has become.
#[test]
fn status_tells_missing_rules_of_gateways() {
    let ground = ground!("status-gw");
    let routed = "fwmark 0xfe000000/0xff000000";
    let by_name = |interface| format!("pref 77 iif {interface} {routed} lookup 4242");
    tells_missing(&ground, "br-guest", &["br-lan", "br-guest"].map(by_name));
    let by_prefix = [
        format!("pref 77 iif lo {routed} goto 79"),
        format!("pref 78 {routed} lookup 4242"),
        "pref 79 nop".to_string(),
    ];
    tells_missing(&ground, "br-*", &by_prefix);
}

/// Sections in the order in which they are tried, each with what its counter has seen.
#[test]
fn status_counts_by_gateway_section() {
    let (ground, _world, _proxy) = scene!("status-gwcount", proxy);
    let lan = Lan::new(&ground);
    let config = "[tproxy mihomo]\nport = 7893\n\
        [gateway zoo]\ninterface = br-guest\ntarget = direct\n\
        [gateway one]\ninterface = br-lan\nsource = 198.51.100.10\ntarget = drop\n\
        [gateway all]\ninterface = br-lan\ninterface = br-guest\ntarget = mihomo\n";
    let daemon = Daemon::start(&ground, config, &[]);

    let to = addr(REMOTE4, 80);
    assert_eq!(lan.ask(1, Proto::Udp, to), format!("{PROXY} {to}"));
    assert_eq!(lan.ask_within(0, Proto::Udp, to, SILENCE), "nobody");

    let sections = [("zoo", "direct"), ("one", "drop"), ("all", "mihomo")];
    let counts = sections.map(|(name, _)| counters(&format!("gw_{name}"))[0]);
    assert_eq!(counts[0].0, 0);
    assert!(counts[1].0 > 0 && counts[2].0 > 0, "{counts:?}");
    let status = daemon.shown();
    let table = status.split("\n\n").nth(2).expect("a third paragraph");
    let rows: Vec<Vec<&str>> = table.lines().map(columns).collect();
    assert_eq!(rows[0], ["GATEWAY", "TARGET", "PACKETS", "BYTES"]);
    let mut members = Vec::new();
    for (row, ((name, target), (packets, bytes))) in
        rows[1..].iter().zip(sections.iter().zip(counts))
    {
        let want = [*name, *target, &packets.to_string(), &format!("{bytes} B")];
        assert_eq!(row[..], want, "{status}");
        members.push(format!("('{name}', '{target}', {packets}, {bytes})"));
    }
    assert_eq!(members.len(), 3, "{status}");
    let found = daemon.json("[tuple(g.values()) for g in d['gateways']]");
    assert_eq!(found, format!("[{}]", members.join(", ")));
    daemon.reconfigure("[tproxy mihomo]\nport = 7893\n");
    assert!(!daemon.shown().contains("GATEWAY"));
}

/// Thousands of cgroups are counted, all of them, also where transactions interrupt the kernel's dump.
#[test]
fn status_with_thousands_of_cgroups_and_while_they_change() {
    let ground = ground!("status-many");
    // the dump has many parts
    const MANY: usize = 4_000;
    let dir = ground.cgroup("/many");
    for i in 0..MANY {
        fs::create_dir(dir.join(format!("d{i}"))).expect("make a cgroup");
    }
    let rules = "[tproxy mihomo]\nport = 7893\n[rules]\ndrop = /many/d.*\nmihomo = /many/x.*\n";
    let daemon = Daemon::start(&ground, rules, &[]);

    let start = Instant::now();
    let counts = daemon.json("[(t['name'], t['cgroups']) for t in d['targets']]");
    println!("status --json with {MANY} elements: {:?}", start.elapsed());
    assert_eq!(counts, format!("[('direct', 0), ('drop', {MANY}), ('mihomo', 0)]"));

    // an interrupted dump must be asked for again, not be cut short
    let (on, made) = (AtomicBool::new(true), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while on.load(Ordering::Relaxed) {
                let done =
                    fs::create_dir(dir.join("x")).and_then(|()| fs::remove_dir(dir.join("x")));
                made.fetch_add(usize::from(done.is_ok()), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(2));
            }
        });
        let counts = [(); 10].map(|()| daemon.target("drop")[4].clone());
        on.store(false, Ordering::Relaxed);
        assert_eq!(counts, [(); 10].map(|()| MANY.to_string()));
    });
    assert!(made.load(Ordering::Relaxed) > 10, "nothing has changed meanwhile");
}

/// The members of the documented shape, and nothing else.
#[test]
fn json_has_the_documented_shape() {
    let ground = ground!("json");
    // a container, behind in0
    let id = "0123456789ab".repeat(5) + "cdef";
    let cgroup = ground.cgroup(&format!("/services/telemetry/docker-{id}.scope"));
    let _process = ground.outside(|| Client::udp(&cgroup, addr(ip("127.0.0.1"), 7)).serve());
    let more = "[gateway lan]\ninterface = br-lan\ntarget = mihomo\n[route vpn]\ninterface = wg0\n";
    let daemon = Daemon::start(&ground, &format!("{CONFIG}{more}"), &[]);

    let text = daemon.ask(&["status"]).out;
    let json = daemon.ask(&["status", "--json"]).out;

    assert!(text.contains("in0   drop    docker 0123456789ab"), "{text}");
    let container = format!(
        "{{'veth': 'in0', 'target': 'drop', 'in_force': True, 'container': 'docker 0123456789ab', \
         'cgroup': '/services/telemetry/docker-{id}.scope'}}"
    );
    for (expression, want) in [
        ("d['containers']", &*format!("[{container}]")),
        (
            "list(d)",
            "['version', 'in_force', 'daemon', 'left', 'unknown', 'rootless', 'default', \
             'targets', 'ways', 'gateways', 'containers', 'repairs', 'reloads', 'held', 'rules', \
             'routes', 'hindrances', 'loops', 'warnings']",
        ),
        ("d['version'], d['in_force'], d['default']", "(1, True, 'direct')"),
        ("d['daemon']", &daemon.pid().to_string()),
        (
            "list(d['targets'][2])",
            "['name', 'kind', 'mark', 'mask', 'port', 'listens', 'cgroups', 'packets', 'bytes', \
             'refused']",
        ),
        ("[t['kind'] for t in d['targets']]", "['direct', 'drop', 'tproxy', 'route']"),
        (
            "d['ways'][0]",
            "{'name': 'vpn', 'interface': 'wg0', 'table': None, 'ipv4': 'absent', \
             'ipv6': 'absent'}",
        ),
        ("d['gateways'][0]['name']", "containers.direct"),
        ("list(d['gateways'][0])", "['name', 'target', 'packets', 'bytes']"),
        ("list(d['rules'][0])", "['family', 'text', 'present']"),
    ] {
        assert_eq!(query(&json, expression), want, "{expression}");
    }
    is_documented("status", &json);
}
