//! `status`: what the kernel holds now, as text and as JSON.

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{query, CONFIG};
use crate::client::{Client, Proto, SILENCE};
use crate::daemon::{run_with, write_private, Daemon, Said};
use crate::gateway::Lan;
use crate::ground::{addr, ip_batch, Ground, REMOTE4};
use crate::kernel::{counters, SETTLE};
use crate::world::{Server, World, PROXY};

#[test]
fn status_of_a_kernel_without_us() {
    let ground = ground!("status-none");
    let Said { code, out, err } = run_with(&ground, CONFIG, &["status"]);
    assert_eq!((code, &*err), (Some(0), ""));
    let want = "table inet cgtproxy: not there, nothing is classified; no cgtproxy is running\n";
    assert_eq!(out, want);
    let json = run_with(&ground, CONFIG, &["status", "--json"]).out;
    assert_eq!(query(&json, "[d['in_force'], d['targets'], d['daemon']]"), "[False, [], None]");
}

#[test]
fn status_counts_what_nft_counts() {
    let (ground, world) = scene!("status");
    let proxied = ground.cgroup("/services/aria2");
    let dropped = ground.cgroup("/services/telemetry");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let none = ["mihomo", "0x01000000", "7893", "no", "1", "0", "0 B", "0"];
    assert_eq!(daemon.target("mihomo"), none);
    let to = addr(REMOTE4, 80);
    assert_eq!(Client::tcp(&proxied, to).run().who(), "refused");
    {
        let _proxy = Server::start("proxy mihomo", &[7893]);
        let who = Client::udp(&proxied, to).run().who();
        assert_eq!(who, format!("proxy mihomo {to}"));
        assert_eq!(daemon.target("mihomo")[3], "tcp udp");
    }
    assert_eq!(daemon.target("mihomo")[3], "no");
    let quick = Duration::from_millis(50);
    assert_eq!(Client::udp(&dropped, to).timeout(quick).run().who(), "nobody");
    // counters as nft lists them
    let listed = |chain: &str| {
        let (packets, bytes): (Vec<u64>, Vec<u64>) = counters(chain).into_iter().unzip();
        (packets.iter().sum::<u64>().to_string(), bytes.iter().sum::<u64>())
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
    drop(world);
}

/// Every instruction of a table with all kinds of sections is known by what the kernel tells of it.
#[test]
fn rules_read_back_as_they_were_sent() {
    use cgtproxy::nft::expr::{Expr, SetRef};
    use cgtproxy::nft::table::{again_chain, classifying, Shape, Table};
    let ground = ground!("read-back");
    let text = "
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
    let daemon = Daemon::start(&ground, text, &[]);
    let files = cgtproxy::config::file::Files { trusted_only: false };
    let config = cgtproxy::config::load(&files, &daemon.config);
    let config = config.expect("a configuration");
    // in rules an anonymous set goes by the name that the kernel gave it
    let nameless = |mut exprs: Vec<Expr>| {
        for expr in &mut exprs {
            if let Expr::Lookup { set, .. } | Expr::LookupVerdict { set, .. } = expr {
                if !matches!(set, SetRef::Named(name) if !name.starts_with("__")) {
                    *set = SetRef::Named(String::new());
                }
            }
        }
        exprs
    };
    let lowered = |rule: &cgtproxy::nft::table::Rule| {
        let mut exprs = Vec::new();
        rule.iter().for_each(|stmt| stmt.lower(&mut exprs));
        nameless(exprs)
    };
    let held = cgtproxy::kernel::Kernel::open().and_then(|mut kernel| kernel.rules());
    let held = held.expect("the rules of the table");
    let mut chains = Table::new(&config).chains;
    // where br_netfilter is loaded
    let is_there = |name: &str| held.iter().any(|rule| rule.chain == name);
    chains.extend(again_chain(&config).filter(|chain| is_there(&chain.name)));
    for (name, rules) in classifying(&config, &Shape::default()) {
        chains.iter_mut().find(|chain| chain.name == name).expect("a chain").rules = rules;
    }
    let sent = chains
        .iter()
        .flat_map(|chain| chain.rules.iter().map(|rule| (chain.name.clone(), lowered(rule))));
    let mut sent: Vec<_> = sent.collect();
    let mut held: Vec<_> =
        held.into_iter().map(|rule| (rule.chain, nameless(rule.exprs))).collect();
    // the kernel tells chains in an order of its own
    sent.sort_by(|a, b| a.0.cmp(&b.0));
    held.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(sent.len() > 50, "{}", sent.len());
    assert_eq!(held, sent);
}

#[test]
fn status_tells_missing_rules_and_routes() {
    let ground = ground!("status-missing");
    let config = format!(
        "[global]\nroute-table = 4242\nrule-priority = 77\ncgroup-root = {}\n{CONFIG}",
        ground.root.display()
    );
    let daemon = Daemon::start(&ground, &config, &[]);
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
    for want in missing {
        assert!(status.contains(want), "{status}");
    }
    assert_eq!(status.matches("missing").count(), 2, "{status}");
    // what it prints is what mends it
    for line in missing {
        let command = line.trim().strip_prefix("missing  ").expect("a command");
        let done = Command::new("sh").args(["-c", command]).status().expect("start sh");
        assert!(done.success(), "{command}");
    }
    assert_eq!(daemon.shown().matches("present").count(), 4);
    let all = "[r['present'] for r in d['rules'] + d['routes']]";
    assert_eq!(daemon.json(all), "[True, True, True, True]");
}

/// The ip rules of gateways: by what the table routes, whatever the configuration has become.
#[test]
fn status_tells_missing_rules_of_gateways() {
    let ground = ground!("status-gw");
    let routed = "fwmark 0xfe000000/0xff000000";
    for (interfaces, wants) in [
        (
            &["br-lan", "br-guest"][..],
            [
                format!("pref 77 iif br-lan {routed} lookup 4242"),
                format!("pref 77 iif br-guest {routed} lookup 4242"),
            ]
            .to_vec(),
        ),
        (
            &["br-lan", "br-*"],
            [
                format!("pref 77 iif lo {routed} goto 79"),
                format!("pref 78 {routed} lookup 4242"),
                "pref 79 nop".to_string(),
            ]
            .to_vec(),
        ),
    ] {
        // both sections have the first interface
        let section = |name: &str, rest: &str| {
            let interface = interfaces[0];
            format!("[gateway {name}]\ninterface = {interface}\n{rest}")
        };
        let config = format!(
            "[global]\nroute-table = 4242\nrule-priority = 77\ncgroup-root = {}\n{CONFIG}{}{}",
            ground.root.display(),
            section("first", "source = 198.51.100.9\ntarget = direct\n"),
            section("lan", &format!("interface = {}\ntarget = mihomo\n", interfaces[1])),
        );
        let daemon = Daemon::start(&ground, &config, &[]);
        let status = daemon.shown();
        assert!(!status.contains("missing"), "{status}");
        let present = 2 * (2 + wants.len());
        assert_eq!(status.matches("present").count(), present, "{status}");
        // or it would mend them
        daemon.signal(Signal::SIGSTOP);
        let without = config.split("[gateway").next().expect("the rest");
        write_private(&daemon.config, without);
        for (family, ip) in [("-4", "ip"), ("-6", "ip -6")] {
            for want in &wants {
                ip_batch(&[family], &format!("rule del {want}\n"));
                let line = format!("missing  {ip} rule add {want} protocol 99\n");
                let status = daemon.shown();
                assert!(status.contains(&line), "no {line} in {status}");
                assert_eq!(status.matches("missing").count(), 1, "{status}");
                let missing = "[(r['family'], r['text']) for r in d['rules'] if not r['present']]";
                let version = family.replace('-', "ipv");
                let found = format!("[('{version}', '{want} protocol 99')]");
                assert_eq!(daemon.json(missing), found);
                // what it prints is what mends it
                ip_batch(&[family], &format!("rule add {want} protocol 99\n"));
                assert!(!daemon.shown().contains("missing"));
            }
        }
        daemon.signal(Signal::SIGCONT);
        daemon.stop();
    }
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
    let counts = ["zoo", "one", "all"].map(|name| counters(&format!("gw_{name}"))[0]);
    assert_eq!(counts[0].0, 0);
    assert!(counts[1].0 > 0 && counts[2].0 > 0, "{counts:?}");
    let status = daemon.shown();
    let table = status.split("\n\n").nth(2).expect("a third paragraph");
    let rows: Vec<Vec<&str>> = (table.lines())
        .map(|line| line.split("  ").map(str::trim).filter(|c| !c.is_empty()).collect())
        .collect();
    let targets = ["direct", "drop", "mihomo"];
    assert_eq!(rows[0], ["GATEWAY", "TARGET", "PACKETS", "BYTES"]);
    for (row, (name, (target, (packets, bytes)))) in
        (rows[1..].iter()).zip(["zoo", "one", "all"].iter().zip(targets.iter().zip(counts)))
    {
        let (packets, bytes) = (packets.to_string(), format!("{bytes} B"));
        assert_eq!(row[..], [*name, *target, &*packets, &*bytes], "{status}");
    }
    let [zoo, one, all] = counts;
    let want = format!(
        "[('zoo', 'direct', {}, {}), ('one', 'drop', {}, {}), ('all', 'mihomo', {}, {})]",
        zoo.0, zoo.1, one.0, one.1, all.0, all.1
    );
    assert_eq!(daemon.json("[tuple(g.values()) for g in d['gateways']]"), want);
    daemon.reconfigure("[tproxy mihomo]\nport = 7893\n");
    assert!(!daemon.shown().contains("GATEWAY"));
}

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
    let json = daemon.ask(&["status", "--json"]).out;
    println!("status --json with {MANY} elements: {:?}", start.elapsed());
    let counts = "[(t['name'], t['cgroups']) for t in d['targets']]";
    let want = format!("[('direct', 0), ('drop', {MANY}), ('mihomo', 0)]");
    assert_eq!(query(&json, counts), want);
    // transactions interrupt the dump: it must be asked for again, not be cut short
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::create_dir(dir.join("x"));
                let _ = fs::remove_dir(dir.join("x"));
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        for _ in 0..10 {
            let row = daemon.target("drop");
            assert_eq!(row[4], MANY.to_string());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// The members of the documented shape, and nothing else.
#[test]
fn json_has_the_documented_shape() {
    let ground = ground!("json");
    // a container, behind in0
    let id = "0123456789ab".repeat(5) + "cdef";
    let cgroup = ground.cgroup(&format!("/services/telemetry/docker-{id}.scope"));
    let at = addr(IpAddr::from([127, 0, 0, 1]), 7);
    let _process = ground.outside(|| Client::udp(&cgroup, at).timeout(SETTLE * 100).serve());
    let more = "[gateway lan]\ninterface = br-lan\ntarget = mihomo\n[route vpn]\ninterface = wg0\n";
    let daemon = Daemon::start(&ground, &format!("{CONFIG}{more}"), &[]);
    let text = daemon.ask(&["status"]).out;
    assert!(text.contains("in0   drop    docker 0123456789ab"), "{text}");
    let json = daemon.ask(&["status", "--json"]).out;
    let container = format!(
        "{{'veth': 'in0', 'target': 'drop', 'in_force': True, 'container': 'docker 0123456789ab', \
         'cgroup': '/services/telemetry/docker-{id}.scope'}}"
    );
    assert_eq!(query(&json, "d['containers']"), format!("[{container}]"));
    assert_eq!(
        query(&json, "list(d)"),
        "['version', 'in_force', 'daemon', 'left', 'unknown', 'rootless', 'default', 'targets', 'ways', 'gateways', 'containers', 'repairs', 'reloads', 'held', 'rules', 'routes', 'hindrances', 'loops', 'warnings']"
    );
    assert_eq!(query(&json, "d['version'], d['in_force'], d['default']"), "(1, True, 'direct')");
    assert_eq!(query(&json, "d['daemon']"), daemon.pid().to_string());
    let members = "['name', 'kind', 'mark', 'mask', 'port', 'listens', 'cgroups', 'packets', 'bytes', 'refused']";
    assert_eq!(query(&json, "list(d['targets'][2])"), members);
    assert_eq!(
        query(&json, "[t['kind'] for t in d['targets']]"),
        "['direct', 'drop', 'tproxy', 'route']"
    );
    let way =
        "{'name': 'vpn', 'interface': 'wg0', 'table': None, 'ipv4': 'absent', 'ipv6': 'absent'}";
    assert_eq!(query(&json, "d['ways'][0]"), way);
    assert_eq!(query(&json, "d['gateways'][0]['name']"), "containers.direct");
    assert_eq!(query(&json, "list(d['gateways'][0])"), "['name', 'target', 'packets', 'bytes']");
    assert_eq!(query(&json, "list(d['rules'][0])"), "['family', 'text', 'present']");
    crate::json::is_documented("status", &json);
}
