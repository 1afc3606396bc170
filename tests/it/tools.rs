//! What people type: check, explain, status, exec, and how the program answers to mistakes.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::client::{Client, Proto, PATIENCE, SILENCE};
use crate::daemon::{binary, run, run_at, run_with, write_private, Daemon, Said};
use crate::gateway::Lan;
use crate::ground::{addr, ip, ip_batch, sysctl, Ground, CGROUPS, HOST4, REMOTE4, REMOTE6};
use crate::kernel::{await_member, cgroup_id, counters, load, residue, set_ids, SETTLE};
use crate::world::{Server, World, PROXY};
use crate::{sized, wait_until};

const CONFIG: &str = "
[tproxy mihomo]
port = 7893
[rules]
direct = /services/mihomo
drop   = /services/telemetry
mihomo = /services/(transmission|aria2)
";

impl Daemon {
    pub fn shown(&self) -> String {
        self.ask(&["status"]).fine()
    }

    /// A Python expression over what `status --json` prints, `d`.
    #[track_caller]
    pub fn json(&self, expression: &str) -> String {
        query(&self.ask(&["status", "--json"]).out, expression)
    }

    /// The columns of one target's line.
    fn target(&self, name: &str) -> Vec<String> {
        let status = self.shown();
        let line = status.lines().find(|l| l.split_whitespace().next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{status}"));
        // two blanks or more stand between columns, "tcp udp" and "1.0 KiB" have one inside
        let columns = line.split("  ").map(str::trim).filter(|c| !c.is_empty());
        columns.map(str::to_owned).collect()
    }
}

// ------------------------------------------------------------------------------------- explain

#[test]
fn explain_names_the_rule_and_the_ancestor() {
    let ground = ground!("explain");
    let inside = ground.cgroup("/services/aria2/a/b");
    let whole = inside.to_str().expect("a UTF-8 path");
    let paths = ["/services/mihomo/x", "/services/x", whole, "/cgtproxy/drop/1", "/"];
    let Said { code, out, err } = run_with(&ground, CONFIG, &[&["explain"], &paths[..]].concat());
    assert_eq!((code, &*err), (Some(0), ""));
    let blocks: Vec<&str> = out.split_inclusive('\n').collect();
    let text = blocks.concat();
    let wants = [
        "/services/mihomo/x\n    target  direct\n",
        ":6: direct = /services/mihomo\n    matches /services/mihomo, an ancestor\n",
        "/services/x\n    target  direct\n    rule    no rule matches, so the default decides\n",
        "/services/aria2/a/b\n    target  mihomo\n",
        ":8: mihomo = /services/(transmission|aria2)\n    matches /services/aria2, an ancestor\n",
        "    target  drop\n    rule    built in: drop = /cgtproxy/drop\n",
    ];
    for want in wants {
        assert!(text.contains(want), "no {want:?} in\n{text}");
    }
    assert_eq!(residue(), "", "explain touches nothing");
}

/// Each argument gets its answer, or an error line of its own that says what is wrong with it.
#[test]
fn explain_answers_each_argument() {
    let ground = ground!("explain-each");
    let explain = |args: &[&str]| run_with(&ground, CONFIG, &[&["explain"], args].concat());
    let whole = ground.at("/./services//aria2/.");
    let whole = format!("/{}", whole.to_str().expect("a UTF-8 path"));
    let same = explain(&["//services/./aria2/", &whole]);
    assert_eq!((same.code, &*same.err), (Some(0), ""));
    let block = "/services/aria2\n    target  mihomo\n";
    assert_eq!(same.out.matches(block).count(), 2, "{}", same.out);

    let said = explain(&["/a/../b", "/services/telemetry", "services/\x1b[0m", "/x"]);
    assert_eq!(said.code, Some(2));
    let heads: Vec<&str> = said.out.lines().filter(|l| l.starts_with('/')).collect();
    assert_eq!(heads, ["/services/telemetry", "/x"]);
    let wants = [
        "error: not the path of a cgroup: \"/a/../b\" (\"..\" is not followed) (try cgtproxy --help)",
        "error: not the path of a cgroup: \"services/\\x1b[0m\" (they begin with \"/\") (try cgtproxy --help)",
    ];
    assert_eq!(said.err.lines().collect::<Vec<_>>(), wants);

    // processes that are gone are no wrong usage, one that is none is
    let pids = explain(&["--pid", "4194304", "1", "4194305"]);
    assert_eq!(pids.code, Some(1));
    assert!(pids.out.starts_with("pid 1: "), "{}", pids.out);
    assert_eq!(pids.err.matches("no such process\n").count(), 2);
    let pids = explain(&["--pid", "4194304", "1", "one"]);
    assert_eq!(pids.code, Some(2));
    assert!(pids.out.starts_with("pid 1: "), "{}", pids.out);
    assert_eq!(pids.err.lines().count(), 2, "{}", pids.err);
}

#[test]
fn explain_finds_processes() {
    let (ground, world) = scene!("explain-pid");
    let inside = ground.cgroup("/services/telemetry/x");
    let outside = Path::new(CGROUPS).to_owned();
    // a process that lives until it is killed
    let serve = |cgroup: &Path, port| Client::tcp(cgroup, addr(crate::ground::HOST4, port)).serve();
    let (_in, _out) = (serve(&inside, 7001), serve(&outside, 7002));
    let pid_in = |cgroup: &Path| {
        let text = fs::read_to_string(cgroup.join("cgroup.procs")).expect("list processes");
        text.lines().next().expect("a process").to_owned()
    };
    let Said { code, out, .. } = run_with(&ground, CONFIG, &["explain", "--pid", &pid_in(&inside)]);
    assert_eq!(code, Some(0));
    assert!(out.contains(": /services/telemetry/x\n    target  drop\n"), "{out}");
    let init = run_with(&ground, CONFIG, &["explain", "--pid", "1"]);
    assert!(
        init.out.contains("pid 1: outside the cgroup root\n    target  direct"),
        "{}",
        init.out
    );
    let gone = run_with(&ground, CONFIG, &["explain", "--pid", "4194304"]);
    assert_eq!(gone.code, Some(1));
    assert!(
        gone.err.contains("unable to find the cgroup of pid 4194304: no such process"),
        "{}",
        gone.err
    );
    drop(world);
}

/// A rule reaches a process in another network namespace by the veth that leads there.
#[test]
fn explain_tells_of_another_network_namespace() {
    let ground = ground!("explain-netns");
    let cgroup = ground.cgroup("/services/telemetry");
    let said = "network another namespace, behind in0: the rule covers what comes in there";
    for (outside, want) in [(false, false), (true, true)] {
        let run = || {
            let script = format!("echo $$ > {}/cgroup.procs; exec cat", cgroup.display());
            let mut command = Command::new("sh");
            command.args(["-c", &script]).stdin(Stdio::piped()).spawn().expect("start sh")
        };
        let mut child = if outside { ground.outside(run) } else { run() };
        let pid = child.id().to_string();
        let there =
            || fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|t| t.contains(&pid));
        assert!(wait_until(SETTLE, there));
        let told = said_of(&ground, &pid);
        assert!(told.contains("    target  drop\n"), "{told}");
        assert_eq!(told.contains(said), want, "{told}");
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn said_of(ground: &Ground, pid: &str) -> String {
    let Said { code, out, err } = run_with(ground, CONFIG, &["explain", "--pid", pid]);
    assert_eq!((code, &*err), (Some(0), ""));
    out
}

/// What explain says of a tree is what the kernel holds of it.
#[test]
fn explain_agrees_with_the_daemon() {
    let ground = ground!("explain-agrees");
    let rules =
        "[tproxy mihomo]\nport = 7893\n[rules]\ndrop = /a/b\nmihomo = /a\ndirect = .*/free\n\
                 mihomo = /cgtproxy\n";
    let paths = ["/a", "/a/b", "/a/b/free", "/c/free", "/c", "/cgtproxy", "/cgtproxy/direct"];
    for path in paths {
        ground.cgroup(path);
    }
    let daemon = Daemon::start(&ground, rules, &[]);
    for path in paths {
        let out = daemon.ask(&["explain", path]).out;
        let target = out.lines().find_map(|l| l.trim().strip_prefix("target  "));
        // the nearest ancestor with an element decides
        let mut at = ground.at(path);
        let found = loop {
            let id = cgroup_id(&at).expect("an id");
            let holds =
                |set: &&&str| set_ids(&format!("cg_{set}")).is_some_and(|s| s.contains(&id));
            if let Some(set) = ["direct", "drop", "mihomo"].iter().find(holds) {
                break *set;
            }
            if at == ground.root {
                break "direct";
            }
            at.pop();
        };
        assert_eq!(target, Some(found), "{path}");
    }
}

// -------------------------------------------------------------------------------------- status

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

/// Evaluates a Python expression over the JSON text `d`: a parser that is none of ours.
#[track_caller]
pub fn query(json: &str, expression: &str) -> String {
    let program = format!("import json, sys\nd = json.load(sys.stdin)\nprint(({expression}))");
    let mut python = Command::new("python3");
    python.args(["-c", &program]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = python.spawn().expect("start python3");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(json.as_bytes()).expect("feed python3");
    drop(stdin);
    let out = child.wait_with_output().expect("wait for python3");
    assert!(out.status.success(), "not JSON: {json}");
    String::from_utf8_lossy(&out.stdout).trim_end().to_owned()
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

/// Runs a shell command on a terminal and gives what it shows there.
fn on_terminal(command: &str, env: &[(&str, &str)]) -> String {
    let out = Command::new("script")
        .args(["-qec", command, "/dev/null"])
        .env_remove("NO_COLOR")
        .env("TERM", "xterm")
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("start script");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn colours_on_a_terminal_only() {
    let ground = ground!("colours");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let command = format!("{} -c {} status", binary().display(), daemon.config.display());
    let coloured = on_terminal(&command, &[]);
    assert!(coloured.contains("\x1b[31mno\x1b[0m"), "{coloured:?}");
    let plain = on_terminal(&command, &[("NO_COLOR", "1")]);
    assert!(plain.contains("mihomo") && !plain.contains('\x1b'), "{plain:?}");
    assert!(!on_terminal(&command, &[("TERM", "dumb")]).contains('\x1b'));
    assert!(!daemon.shown().contains('\x1b'));
    // columns are where they are without colour
    let strip =
        |text: &str| text.replace("\x1b[1m", "").replace("\x1b[31m", "").replace("\x1b[0m", "");
    assert_eq!(strip(&coloured), plain);
}

#[test]
fn watch_shows_rates_of_targets_and_cgroups() {
    let (ground, world) = scene!("watch");
    let busy = ground.cgroup("/services/aria2/busy");
    ground.cgroup("/services/transmission");
    let config =
        format!("[global]\ncounters = cgroup\ncgroup-root = {}\n{CONFIG}", ground.root.display());
    let daemon = Daemon::start(&ground, &config, &[]);
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let _flood = Client::udp(&busy, addr(REMOTE4, 80)).flood().spawn();
    let mut child = daemon
        .command(&["status", "--watch"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start cgtproxy");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    // the first frame has no rates yet, the second and third have
    let mut frames = Vec::new();
    let mut frame: Vec<String> = Vec::new();
    let start = Instant::now();
    while frames.len() < 3 {
        let line = lines.next().expect("a line").expect("UTF-8");
        if line.starts_with("table inet") && !frame.is_empty() {
            frames.push(std::mem::take(&mut frame));
        }
        frame.push(line);
    }
    assert!(start.elapsed() > Duration::from_secs(2), "a frame a second");
    let column = |frame: &[String], name: &str, nth: usize| {
        let line = frame.iter().find(|l| l.split_whitespace().next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {frame:#?}"));
        line.split_whitespace().nth(nth).expect("a column").to_owned()
    };
    assert_eq!(column(&frames[0], "mihomo", 2), "-");
    for frame in &frames[1..] {
        // the flood is some 2,000 datagrams a second; 5 bytes each, and 28 of headers
        let packets: u64 = column(frame, "mihomo", 2).parse().expect("a number");
        assert!((10..20_000).contains(&packets), "{frame:#?}");
        assert_eq!(column(frame, "/services/aria2", 1), "mihomo");
        let own: u64 = column(frame, "/services/aria2", 2).parse().expect("a number");
        assert!(own.abs_diff(packets) < packets / 2, "{frame:#?}");
        assert!(!frame.iter().any(|l| l.starts_with("/services/transmission")), "idle: {frame:#?}");
    }
    // the reader goes away: it ends, and says nothing
    drop(lines);
    let ended = wait_until(PATIENCE, || child.try_wait().is_ok_and(|s| s.is_some()));
    let _ = child.kill();
    assert!(ended, "status --watch outlives its reader");
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    drop(world);
}

#[test]
fn watch_redraws_within_the_screen() {
    let ground = ground!("watch-screen");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let (bin, file) = (binary(), daemon.config.display().to_string());
    let command = format!("stty rows 5; exec {} -c {file} status --watch", bin.display());
    let mut terminal = Terminal::open(&["sh", "-c", &command]);
    terminal.expect("\x1b[H\x1b[J");
    for _ in 0..2 {
        let frame = terminal.expect("\x1b[H\x1b[J");
        assert_eq!(frame.matches('\n').count(), 4, "{frame:?}");
        assert!(frame.contains("TARGET"), "{frame:?}");
    }
}

#[test]
fn watch_without_counters_says_how_to_have_them() {
    let ground = ground!("watch-none");
    ground.cgroup("/services/aria2");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let mut child = daemon
        .command(&["status", "--watch"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start cgtproxy");
    let lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    let first: Vec<String> = lines.map_while(Result::ok).take(8).collect();
    assert!(
        first.contains(&"for each cgroup: set counters = cgroup in [global]".into()),
        "{first:#?}"
    );
    let _ = child.kill();
    let _ = child.wait();
}

// ---------------------------------------------------------------------------------------- exec

/// The shell's words for "ask the remote host who answers, at once".
const ASK: &str =
    "exec 3<>/dev/udp/203.0.113.7/80; echo who >&3; timeout 30 dd bs=512 count=1 <&3 2>/dev/null";

#[test]
fn exec_leaks_nothing() {
    let (ground, mut world) = scene!("exec-leak");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let rounds = sized(200, 2000);
    let mut longest = Duration::ZERO;
    world.wire.packets();
    for round in 0..rounds {
        let start = Instant::now();
        let asked = daemon.ask(&["exec", "mihomo", "--", "bash", "-c", ASK]);
        longest = longest.max(start.elapsed());
        assert!(
            asked.out.starts_with("proxy mihomo 203.0.113.7:80 from"),
            "round {round}: {} {}",
            asked.out,
            asked.err
        );
        // each third time as if for the first time: everything has to be made and classified anew
        if round % 3 == 0 {
            let made = ground.at("/cgtproxy/mihomo");
            let pids = fs::read_dir(&made).expect("list").flatten();
            let dirs = pids.filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
            dirs.for_each(|e| fs::remove_dir(e.path()).expect("remove what exec made"));
            fs::remove_dir(&made).expect("remove the target's cgroup");
        }
    }
    assert_eq!(world.wire.to_remote(), [], "left the host in {rounds} runs");
    println!("{rounds} runs, the longest {longest:?}");
    // the same words outside of exec do leave, so the wire would have seen them
    let direct = daemon.ask(&["exec", "direct", "--", "bash", "-c", ASK]);
    assert!(direct.out.starts_with("remote"), "{} {}", direct.out, direct.err);
    assert_ne!(world.wire.to_remote(), []);
}

/// Many at once, while the cgroups of those before are being removed.
#[test]
fn exec_many_at_once() {
    let ground = ground!("exec-many");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    for _ in 0..sized(5, 50) {
        let start = |i: usize| {
            let target = ["mihomo", "drop", "direct"][i % 3];
            let words = "exec grep -h ^0:: /proc/self/cgroup";
            let mut command = daemon.command(&["exec", target, "sh", "-c", words]);
            let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
            (target, child.expect("start cgtproxy"))
        };
        let all: Vec<_> = (0..12).map(start).collect();
        for (target, child) in all {
            let pid = child.id();
            let said = Said::from(child.wait_with_output().expect("wait"));
            let want = format!("/cgtproxy/{target}/{pid}\n");
            assert!(said.out.ends_with(&want), "{} {} is not {want}", said.out, said.err);
        }
    }
    daemon.ask(&["exec", "direct", "true"]);
    let left = |target: &str| {
        let entries = fs::read_dir(ground.at(&format!("/cgtproxy/{target}"))).expect("list");
        entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).count()
    };
    assert_eq!((left("mihomo"), left("drop")), (0, 0), "leftovers");
    assert!(left("direct") <= 1);
}

#[test]
fn exec_passes_everything_on() {
    let ground = ground!("exec-status");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let exec = |args: &[&str]| {
        let out = daemon.command(&[&["exec"], args].concat()).output();
        out.expect("start cgtproxy")
    };
    for (args, code) in [
        (&["drop", "true"][..], 0),
        (&["drop", "--", "sh", "-c", "exit 7"], 7),
        (&["drop", "sh", "-c", "exit 255"], 255),
        (&["mihomo", "no-such-command"], 127),
        (&["mihomo", "/nonexistent/x"], 127),
        (&["mihomo", "/etc"], 126),
        (&["mihomo", "/etc/passwd"], 126),
    ] {
        let out = exec(args);
        assert_eq!(out.status.code(), Some(code), "{args:?}");
        let lines = String::from_utf8_lossy(&out.stderr).lines().count();
        assert_eq!(lines, usize::from((126..128).contains(&code)), "{args:?}");
    }
    assert_eq!(exec(&["drop", "sh", "-c", "kill -TERM $$"]).status.signal(), Some(15));
    // options behind CMD are CMD's, and so is what follows --
    let echoed = |args: &[&str]| String::from_utf8(exec(args).stdout).expect("UTF-8");
    assert_eq!(echoed(&["drop", "echo", "-u", "-c", "--help", "--", "x"]), "-u -c --help -- x\n");
    assert_eq!(echoed(&["drop", "--", "echo", "-v"]), "-v\n");
    assert_eq!(echoed(&["-v", "drop", "echo", "x"]), "x\n");
    // bytes that are not UTF-8 arrive as they are
    let mut raw = daemon.command(&["exec", "drop", "printf", "%s"]);
    let bytes = std::os::unix::ffi::OsStrExt::from_bytes(b"a\xffb");
    let bytes: &std::ffi::OsStr = bytes;
    assert_eq!(raw.arg(bytes).output().expect("start cgtproxy").stdout, b"a\xffb");
    // no descriptor of ours, no signal ignored, that the command would not have had without us
    let words = "ls /proc/self/fd; grep -E 'Sig[PBIC]|Shd' /proc/self/status; env; ulimit -a";
    let mut without = Command::new("sh");
    without.args(["-c", words]).stdin(Stdio::null());
    let without = without.output().expect("start sh").stdout;
    let with = exec(&["drop", "sh", "-c", words]).stdout;
    assert_eq!(String::from_utf8_lossy(&with), String::from_utf8_lossy(&without));
}

#[test]
fn exec_as_another_user() {
    let ground = ground!("exec-user");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let words =
        "id -u; id -g; id -G; grep -h ^CapEff /proc/self/status; grep -h ^0:: /proc/self/cgroup";
    for args in [
        &["exec", "-u", "nobody", "drop", "sh", "-c", words][..],
        &["exec", "--user", "65534", "drop", "--", "sh", "-c", words],
        &["exec", "drop", "-u", "nobody", "--", "sh", "-c", words],
    ] {
        let said = daemon.ask(args);
        let want = "65534\n65534\n65534\nCapEff:\t0000000000000000\n";
        assert!(said.out.starts_with(want), "{args:?}: {} {}", said.out, said.err);
        assert!(said.out.contains("/cgtproxy/drop/"), "{}", said.out);
    }
    // a uid that no user has comes with the gid of that number and without the groups of root
    let unnamed = daemon.ask(&["exec", "-u", "1234567", "drop", "sh", "-c", words]);
    let want = "1234567\n1234567\n1234567\nCapEff:\t0000000000000000\n";
    assert!(unnamed.out.starts_with(want), "{} {}", unnamed.out, unnamed.err);
    // -1 means "leave it" to setuid(2)
    for odd in ["4294967295", "4294967296", "-1", ""] {
        let said = daemon.ask(&["exec", "--user", odd, "drop", "id", "-u"]);
        assert_ne!(said.code, Some(0), "{odd:?}");
        assert_eq!((&*said.out, said.err.lines().count()), ("", 1), "{odd:?}");
    }
    // a user who can do nothing more with the cgroups than before
    let daemon_group = daemon.ask(&[
        "exec",
        "-u",
        "nobody",
        "drop",
        "sh",
        "-c",
        "echo $$ > /sys/fs/cgroup/cgroup.procs",
    ]);
    assert_ne!(daemon_group.code, Some(0));
    let unknown = daemon.ask(&["exec", "-u", "no-such-user", "drop", "true"]);
    assert_eq!((unknown.code, &*unknown.err), (Some(2), "error: no such user: \"no-such-user\"\n"));
}

#[test]
fn exec_moves_only_itself() {
    let ground = ground!("exec-moves");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let home = fs::read_to_string("/proc/self/cgroup").expect("read");
    let mut child =
        daemon.command(&["exec", "mihomo", "sleep", "100"]).spawn().expect("start cgtproxy");
    let dir = ground.at(&format!("/cgtproxy/mihomo/{}", child.id()));
    let entered = || {
        fs::read_to_string(dir.join("cgroup.procs")).is_ok_and(|t| t == format!("{}\n", child.id()))
    };
    assert!(wait_until(SETTLE, entered), "not alone in {dir:?}");
    assert_eq!(fs::read_to_string("/proc/self/cgroup").expect("read"), home);
    // another exec does not take it for a leftover, nor a stopped one
    daemon.ask(&["exec", "mihomo", "true"]);
    assert!(dir.exists());
    // signals are CMD's own
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("kill");
    assert_eq!(child.wait().expect("wait").signal(), Some(15));
    daemon.ask(&["exec", "mihomo", "true"]);
    assert!(!dir.exists(), "the leftover is still there");
}

/// An interactive shell stops and continues it as any other job.
#[test]
fn exec_is_a_job_of_the_shell() {
    let ground = ground!("exec-jobs");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let mut shell = Terminal::open(&["bash", "--norc", "--noprofile", "-i"]);
    shell.say("PS1='ready> '; bind 'set enable-bracketed-paste off'\n");
    shell.expect("ready> ");
    let exec =
        format!("{} -c {} exec mihomo sleep 1234\n", binary().display(), daemon.config.display());
    shell.say(&exec);
    let dir = ground.at("/cgtproxy/mihomo");
    let running = || {
        let all = fs::read_dir(&dir).into_iter().flatten().flatten();
        let procs = all.filter_map(|e| fs::read_to_string(e.path().join("cgroup.procs")).ok());
        procs.flat_map(|t| t.lines().map(str::to_owned).collect::<Vec<_>>()).next()
    };
    let is_sleep = |pid: &String| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "sleep\n")
    };
    assert!(wait_until(SETTLE, || running().as_ref().is_some_and(is_sleep)), "{}", shell.seen);
    shell.say("\x1a"); // Ctrl-Z
    shell.expect("Stopped");
    shell.say("jobs -l\n");
    shell.expect("sleep 1234");
    shell.say("fg\n");
    shell.expect("sleep 1234");
    let state = |pid: &str| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.split(' ').nth(2).map(str::to_owned)
    };
    let pid = running().expect("the job");
    assert!(wait_until(SETTLE, || state(&pid).as_deref() == Some("S")));
    // the terminal is the job's, not the shell's: Ctrl-C goes to it
    let in_front = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // pgrp and tpgid of proc_pid_stat(5); the name holds no blank
        let fields: Vec<&str> = stat.split(' ').collect();
        fields.len() > 7 && fields[4] == fields[7]
    };
    assert!(wait_until(SETTLE, in_front), "{}", shell.seen);
    shell.say("\x03"); // Ctrl-C
    shell.expect("ready> ");
    shell.say("echo status $?\n");
    shell.expect("status 130");
}

/// A program on a pseudo-terminal of its own.
pub struct Terminal {
    pub child: Child,
    pub master: OwnedFd,
    seen: String,
}

impl Terminal {
    pub fn open(command: &[&str]) -> Terminal {
        // SAFETY: integers and NUL-terminated strings; the descriptor is new, hence ours.
        let (master, name) = unsafe {
            let fd = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
            assert!(fd >= 0 && libc::grantpt(fd) == 0 && libc::unlockpt(fd) == 0);
            let mut name = [0; 64];
            assert_eq!(libc::ptsname_r(fd, name.as_mut_ptr(), name.len()), 0);
            let name = std::ffi::CStr::from_ptr(name.as_ptr()).to_owned();
            (<OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd), name)
        };
        let name: CString = name;
        let mut spawn = Command::new(command[0]);
        spawn.args(&command[1..]).env("TERM", "dumb");
        let hook = move || {
            // SAFETY: async-signal-safe calls on integers and a NUL-terminated path.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // a job in the background of a script ignores them, and so would all it starts
                for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                libc::setsid();
                let fd = libc::open(name.as_ptr(), libc::O_RDWR);
                (0..3).for_each(|to| {
                    libc::dup2(fd, to);
                });
                libc::ioctl(0, libc::TIOCSCTTY, 0);
            }
            Ok(())
        };
        // SAFETY: see the hook.
        unsafe { spawn.pre_exec(hook) };
        let child = spawn.spawn().expect("start a shell");
        let seen = String::new();
        Terminal { child, master, seen }
    }

    pub fn say(&mut self, text: &str) {
        nix::unistd::write(&self.master, text.as_bytes()).expect("type");
    }

    /// Waits until the screen has shown `text`; gives, and forgets, what was before it.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> String {
        let mut seen = std::mem::take(&mut self.seen);
        loop {
            if let Some(at) = seen.find(text) {
                self.seen = seen.split_off(at).split_off(text.len());
                return seen;
            }
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PATIENCE.as_millis() as u16).expect("poll the terminal");
            assert_eq!(ready, 1, "no {text:?} in {seen:?}");
            let mut buffer = [0; 4096];
            let n = nix::unistd::read(&self.master, &mut buffer).expect("read the terminal");
            seen += &String::from_utf8_lossy(&buffer[..n]);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asserts that `exec` under mihomo is refused, with that reason, and runs nothing.
#[track_caller]
fn expect_refused(ground: &Ground, ask: impl Fn(&[&str]) -> Said, why: &str) {
    let witness = ground.dir.join("ran");
    let said = ask(&["exec", "mihomo", "touch", witness.to_str().expect("a UTF-8 path")]);
    assert_eq!(said.code, Some(1), "{}", said.err);
    let want = "error: unable to exec: target mihomo is not in force: ";
    assert!(said.err.starts_with(want) && said.err.contains(why), "{} is not {why}", said.err);
    assert_eq!(said.err.lines().count(), 1);
    assert!(!witness.exists(), "it ran");
    let dir = ground.at("/cgtproxy/mihomo").read_dir().expect("list").flatten();
    let cgroups = dir.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    assert_eq!(cgroups.count(), 0, "a refusal leaves no cgroup");
}

#[test]
fn exec_refuses_where_there_is_no_table() {
    let ground = ground!("exec-none");
    let ask = |args: &[&str]| run_with(&ground, CONFIG, args);
    expect_refused(&ground, ask, "there is no table inet cgtproxy, and no cgtproxy is running");
    // everything is direct then, for everybody
    assert_eq!(ask(&["exec", "direct", "true"]).code, Some(0));
}

/// A target that the daemon does not know, and one that has another mark there.
#[test]
fn exec_refuses_a_policy_that_has_not_been_loaded() {
    let ground = ground!("exec-unloaded");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    daemon.configure(&CONFIG.replace("[rules]", "[tproxy other]\nport = 1\n[rules]"));
    let unknown = daemon.ask(&["exec", "other", "true"]);
    assert_eq!(unknown.code, Some(1));
    let why = "table inet cgtproxy has no chain to_other (reload cgtproxy)";
    assert!(unknown.err.contains(why), "{}", unknown.err);
    daemon.configure(&CONFIG.replace("port = 7893", "port = 7893\nmark = 0x7000000"));
    let why = "chain to_mihomo does not set mark 0x7000000 (reload cgtproxy)";
    expect_refused(&ground, |args| daemon.ask(args), why);
    daemon.stop_clean();
}

/// An ip rule is gone, then a route, and the daemon cannot mend it.
#[test]
fn exec_refuses_without_its_rules_and_routes() {
    let ground = ground!("exec-routing");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    await_member(&ground.cgroup("/cgtproxy/mihomo"), "mihomo");
    daemon.signal(Signal::SIGSTOP);
    let ask = |args: &[&str]| daemon.ask(args);
    ip_batch(&["-4"], "rule del pref 100\n");
    let why = "missing: ip rule add pref 100 iif lo fwmark 0x01000000/0xff000000 lookup 300";
    expect_refused(&ground, ask, why);
    let rule = "rule add pref 100 iif lo fwmark 0x1000000/0xff000000 lookup 300 protocol 99\n";
    ip_batch(&["-4"], rule);
    ip_batch(&["-6"], "route flush table 300\n");
    let why = "missing: ip -6 route add local default dev lo table 300";
    expect_refused(&ground, ask, why);
    daemon.signal(Signal::SIGCONT);
    daemon.stop_clean();
}

/// The rules stay, but nobody classifies: what is put in by hand is as good as by the daemon, for what
/// counts is what the kernel holds.
#[test]
fn exec_asks_the_kernel_and_not_the_daemon() {
    let (ground, mut world, _proxy) = scene!("exec-kernel", proxy);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let file = daemon.config.clone();
    let ask = |args: &[&str]| run_at(&file, args);
    daemon.kill9();
    let why = "cgroup /cgtproxy/mihomo is not in set cg_mihomo, and no cgtproxy is running";
    expect_refused(&ground, ask, why);
    let path = ground.at("/cgtproxy/mihomo");
    let name = path.strip_prefix(CGROUPS).expect("below the mount").display().to_string();
    load(&format!("add element inet cgtproxy cg_mihomo {{ \"{name}\" }}\n"));
    load("flush chain inet cgtproxy output\n");
    expect_refused(&ground, ask, "chain output has no rule for set cg_mihomo at level 3");
    load("add rule inet cgtproxy output socket cgroupv2 level 3 @cg_mihomo goto to_mihomo\n");
    let ran = ask(&["exec", "mihomo", "--", "bash", "-c", ASK]);
    assert!(ran.out.starts_with("proxy mihomo"), "{} {}", ran.out, ran.err);
    assert_eq!(world.wire.to_remote(), []);
}

/// One that others have flushed, or made dormant, is there and does nothing.
#[test]
fn a_table_that_does_nothing_is_not_in_force() {
    let ground = ground!("exec-idle");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let file = daemon.config.clone();
    let ask = |args: &[&str]| run_at(&file, args);
    let headline = || ask(&["status"]).out.lines().next().map(str::to_string);
    daemon.kill9();
    let in_force = "table inet cgtproxy: in force, default direct; no cgtproxy is running";
    assert_eq!(headline().as_deref(), Some(in_force));
    load("flush table inet cgtproxy\n");
    let empty = "table inet cgtproxy: without rules, not in force; no cgtproxy is running";
    assert_eq!(headline().as_deref(), Some(empty));
    assert!(ask(&["status", "--json"]).out.contains("\"in_force\":false"));
    // a table that persists cannot be made dormant, one of before Linux 6.9 can
    load("delete table inet cgtproxy\n");
    let table = "table inet cgtproxy {\n";
    load(&(ask(&["show"]).out).replace(table, &format!("{table}flags dormant\n")));
    expect_refused(&ground, ask, "table inet cgtproxy is dormant");
}

/// It waits for a daemon that is late, as long as is sensible.
#[test]
fn exec_waits_for_the_classification() {
    let ground = ground!("exec-waits");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    daemon.signal(Signal::SIGSTOP);
    let child = daemon
        .command(&["exec", "mihomo", "echo", "ran"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start cgtproxy");
    let made = || ground.at(&format!("/cgtproxy/mihomo/{}", child.id())).exists();
    assert!(wait_until(SETTLE, made));
    daemon.signal(Signal::SIGCONT);
    let out = child.wait_with_output().expect("wait");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "ran\n");
    // and gives up on one that does not answer
    let made = ground.at("/cgtproxy/drop");
    daemon.signal(Signal::SIGSTOP);
    let start = Instant::now();
    let said = daemon.ask(&["exec", "drop", "true"]);
    assert!(start.elapsed().as_secs() >= 4, "{:?}", start.elapsed());
    assert_eq!(said.code, Some(1));
    assert!(
        said.err.contains("cgroup /cgtproxy/drop is not in set cg_drop after 5 s"),
        "{}",
        said.err
    );
    daemon.signal(Signal::SIGCONT);
    await_member(&made, "drop");
}

/// Whatever rules cover `/cgtproxy`, TARGET is what was asked for.
#[test]
fn exec_comes_before_every_rule() {
    let (ground, mut world, _proxy) = scene!("exec-first", proxy);
    for (config, default) in [
        (
            "[global]\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /.*\n",
            "proxy",
        ),
        ("[tproxy mihomo]\nport = 7893\n[rules]\ndrop = /cgtproxy.*\n", "remote"),
    ] {
        let config = config.replacen("[global]\n", "", 1);
        let global = if default == "proxy" { "default = mihomo\n" } else { "" };
        let config = config.replacen("default = mihomo\n", "", 1);
        let config = format!("[global]\ncgroup-root = {}\n{global}{config}", ground.root.display());
        let daemon = Daemon::start(&ground, &config, &[]);
        for (target, who) in
            [("mihomo", "proxy mihomo"), ("direct", "remote"), ("mihomo", "proxy mihomo")]
        {
            world.wire.packets();
            let said = daemon.ask(&["exec", target, "bash", "-c", ASK]);
            assert!(said.out.starts_with(who), "{target}: {} {}", said.out, said.err);
            let left = world.wire.to_remote();
            assert_eq!(left.is_empty(), target == "mihomo", "{left:?}");
        }
        daemon.stop();
        for target in ["mihomo", "direct"] {
            let dir = ground.at(&format!("/cgtproxy/{target}"));
            let pids = fs::read_dir(&dir).expect("list").flatten();
            pids.for_each(|e| drop(fs::remove_dir(e.path())));
            fs::remove_dir(dir).expect("remove");
        }
        fs::remove_dir(ground.at("/cgtproxy")).expect("remove");
    }
}

// --------------------------------------------------------------------------------------- check

/// `check` in a mount namespace that the shell commands `setup` have changed.
fn check(ground: &Ground, config: &str, setup: &str) -> Said {
    let file = ground.dir.join("check.conf");
    let root = match config.contains("cgroup-root") {
        true => String::new(),
        false => format!("[global]\ncgroup-root = {}\n", ground.root.display()),
    };
    write_private(&file, &format!("{root}{config}"));
    let script = format!("{setup}\nexec {} -c {} check", binary().display(), file.display());
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-ec", &script]).current_dir(&ground.dir);
    command.output().expect("start unshare").into()
}

impl Said {
    /// Asserts that some line begins so and goes on with that, that the worst is last, with a
    /// count behind it, and that the exit status is that of a configuration that is fine.
    #[track_caller]
    fn finds(&self, kind: &str, text: &str) {
        let found = |l: &&str| l.starts_with(&format!("{kind}: ")) && l.contains(text);
        let any = self.out.lines().any(|l| found(&l));
        assert!(any, "no {kind} with {text:?} in\n{}{}", self.out, self.err);
        let kinds = ["ok: ", "warning: ", "error: "];
        let mut lines: Vec<&str> = self.out.lines().collect();
        let closing = lines.pop().expect("a last line");
        let kind = |line: &&str| kinds.iter().position(|kind| line.starts_with(kind));
        let found: Vec<Option<usize>> = lines.iter().map(kind).collect();
        assert!(!found.contains(&None) && found.is_sorted(), "{}", self.out);
        let [ok, warnings, errors] =
            [0, 1, 2].map(|kind| found.iter().filter(|found| **found == Some(kind)).count());
        let s = |n| if n == 1 { "" } else { "s" };
        let want =
            format!("{errors} error{}, {warnings} warning{}, {ok} ok", s(errors), s(warnings));
        assert_eq!(closing, want, "{}", self.out);
        let code = i32::from(errors > 0);
        assert_eq!((self.code, &*self.err), (Some(code), ""), "{}", self.out);
    }

    #[track_caller]
    fn finds_no(&self, kind: &str) {
        let kind = format!("{kind}: ");
        let found = self.out.lines().find(|l| l.starts_with(&kind));
        assert_eq!(found, None, "{}", self.out);
    }
}

/// Settings of the machine that the tests run on, out of the way.
const CLEAN: &str = "mount -t tmpfs none /proc/sys/net; mkdir -p empty; mount --bind empty /etc";

#[test]
fn check_finds_nothing_wrong_where_nothing_is() {
    let ground = ground!("check-clean");
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let clean = check(&ground, CONFIG, CLEAN);
    for (kind, text) in [
        ("ok", "check.conf: tproxies: 1, rules: 3"),
        ("ok", "cgroup v2 alone"),
        ("ok", "1 cgroups, and fs.inotify.max_user_watches is "),
        ("ok", "CAP_NET_ADMIN is in effect"),
        ("ok", "the kernel has nft socket cgroupv2, type route, ct mark, fib, tproxy, reject"),
        ("ok", "[tproxy mihomo]: TCP port 7893 is listened on"),
        ("ok", "[tproxy mihomo]: UDP port 7893 is listened on"),
        (
            "ok",
            "no ip rule or route of others uses mark bits 0xff000000, table 300 or priority 100",
        ),
    ] {
        clean.finds(kind, text);
    }
    clean.finds_no("warning");
    clean.finds_no("error");
    assert_eq!(residue(), "", "a probe is still there");
}

/// In the journal, each line has its priority, and only what is wrong is told.
/// The same findings as in text, each with an id; the exit status is the same too.
#[test]
fn check_in_json() {
    let ground = ground!("check-json");
    for (config, want) in [(CONFIG, Some(0)), ("[rules]\nmihomo = /a\n", Some(2))] {
        let [text, json] =
            [&["check"][..], &["check", "--json"]].map(|args| run_with(&ground, config, args));
        assert_eq!((text.code, json.code), (want, want), "{}", text.out);
        crate::json::is_documented("check", &json.out);
        let lines = query(
            &json.out,
            "'\\n'.join(sorted(f['severity'] + ': ' + f['text'] for f in d['findings']))",
        );
        let mut shown: Vec<&str> = text.out.lines().collect();
        let counts = shown.pop().expect("a summary");
        shown.sort_unstable();
        // the files' names differ by a number
        let without = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
        assert_eq!(without(&lines), without(&shown.join("\n")));
        let errors = query(&json.out, "d['errors']");
        assert!(counts.starts_with(&format!("{errors} error")), "{counts}");
        let about = |id: &str| {
            query(
                &json.out,
                &format!("[f['severity'] for f in d['findings'] if f['id'] == '{id}']"),
            )
        };
        match want {
            Some(0) => assert_eq!(about("listener"), "['warning', 'warning']"),
            _ => assert_eq!(about("config"), "['error']"),
        }
        assert_eq!(about("cgroup-root"), "['ok']");
        assert_eq!(about("kernel-feature"), "['ok']");
    }
}

#[test]
fn check_tells_the_journal_what_is_wrong() {
    let ground = ground!("check-journal");
    let journal = "exec > told; JOURNAL_STREAM=$(stat -L -c %d:%i /proc/$$/fd/1); \
                   export JOURNAL_STREAM";
    let wrong = "[tproxy mihomo]\nport = 7893\nudp = no\n[rules]\nmihomo = /a\ndrp = /b\n";
    let said = check(&ground, wrong, &format!("{CLEAN}; {journal}"));
    assert_eq!((said.code, &*said.out, &*said.err), (Some(2), "", ""));
    let told = || fs::read_to_string(ground.dir.join("told")).expect("read");
    let text = told();
    let lines: Vec<&str> = text.lines().collect();
    let begins = |at: usize, text: &str| lines.get(at).is_some_and(|line| line.starts_with(text));
    assert!(begins(0, "<3>error: ") && begins(1, "1 error, 0 warnings, "), "{text}");
    let warns = "[tproxy mihomo]\nport = 7893\nudp = no\n[rules]\nmihomo = /a\n";
    check(&ground, warns, &format!("{CLEAN}; {journal}"));
    assert!(told().starts_with("<4>warning: [tproxy mihomo]: nothing listens"), "{}", told());
    assert!(!told().contains("ok: "), "{}", told());
    // something else is written to than the journal
    let other = check(&ground, warns, &format!("{CLEAN}; export JOURNAL_STREAM=1:1"));
    other.finds("warning", "[tproxy mihomo]: nothing listens");
}

#[test]
fn check_tells_what_each_rule_decides() {
    let ground = ground!("check-rules");
    for path in ["/services/mihomo/one", "/services/aria2", "/apps/a"] {
        ground.cgroup(path);
    }
    let config = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /services/mihomo\n\
        mihomo = /services/.*\ndrop = /services/aria2\ndrop = /apps/none\ndrop = apps/a\n\
        drop = /apps/a/\ndrop = /sys/fs/cgroup/apps/a\ndrop = 0::/apps/a\n\
        drop = /apps/a\\x2db\ndrop = /apps/a # not now\n";
    let said = check(&ground, config, CLEAN);
    said.finds("ok", ":6: direct = /services/mihomo: decides for 2 cgroups");
    said.finds("ok", ":7: mihomo = /services/.*: decides for 1 cgroups");
    said.finds("ok", ":9: drop = /apps/none: decides for 0 cgroups");
    let nothing = "can match nothing: ";
    let covers = format!(":8: drop = /services/aria2: {nothing}");
    said.finds("warning", &covers);
    said.finds("warning", ":7 covers all of it before: mihomo = /services/.*");
    for (line, why) in [
        (10, "every path begins with \"/\""),
        (11, "no path ends with \"/\""),
        (12, "paths count from the cgroup root: leave out \"/sys/fs/cgroup\""),
        (13, "leave out the \"0::\" of /proc/PID/cgroup"),
        (14, "write \\\\x2d"),
        (15, "\"# not now\" is part of it: a comment needs a line of its own"),
    ] {
        let found =
            |l: &&str| l.starts_with("warning: ") && l.contains(&format!(":{line}: drop = "));
        let line = said.out.lines().find(found).unwrap_or_else(|| panic!("{line}: {}", said.out));
        assert!(line.contains(nothing) && line.contains(why), "{line}");
    }
}

/// Whoever brings the file of another program is told so once, not once a line.
#[test]
fn check_of_a_file_in_another_language() {
    let ground = ground!("check-yaml");
    let yaml = "version: 1\ncgroup-root: AUTO\ntproxies:\n  mihomo:\n    port: 7893\nrules:\n  \
                - match: \"/a=b\"\n    tproxy: mihomo\n";
    let json = "{\n  \"port\": 12345,\n  \"cgroup_proxy\": [\"/\"]\n}\n";
    for (text, want) in [(yaml, ":1: this is YAML, "), (json, ":1: this is JSON, ")] {
        let file = ground.dir.join("other.conf");
        write_private(&file, text);
        let said = run_at(&file, &["check"]);
        assert_eq!(said.code, Some(2), "{}", said.out);
        let errors: Vec<&str> = said.out.lines().filter(|l| l.starts_with("error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains(want), "{}", said.out);
        assert!(errors[0].contains("COMING FROM ELSEWHERE in cgtproxy-recipes(7)"), "{}", said.out);
    }
    let page = fs::read_to_string("conf/man/cgtproxy-recipes.7").expect("read the manual page");
    assert!(page.contains("\n.Sh COMING FROM ELSEWHERE\n"));
}

#[test]
fn check_of_a_wrong_configuration() {
    let ground = ground!("check-config");
    let wrong = check(&ground, "[rules]\ndrp = /a\n[nonsense]\n", CLEAN);
    assert_eq!(wrong.code, Some(2));
    assert_eq!(wrong.out.matches("error: ").count(), 2, "{}", wrong.out);
    let file = ground.dir.join("check.conf");
    assert!(
        wrong.out.contains(&format!("error: {}:4: undefined target \"drp\"", file.display())),
        "{}",
        wrong.out
    );
    // the host is looked at all the same
    assert!(wrong.out.contains("ok: the kernel has nft socket cgroupv2"), "{}", wrong.out);
    let open = check(&ground, CONFIG, &format!("{CLEAN}; chmod 666 check.conf"));
    assert_eq!(open.code, Some(2));
    assert!(
        open.out.contains("is writable by group or others (mode 0666; chmod go-w); run refuses it"),
        "{}",
        open.out
    );
}

#[test]
fn check_finds_the_cgroup_tree_or_says_what_to_do() {
    let ground = ground!("check-cgroups");
    let auto = format!("[global]\ncgroup-root = auto\n{CONFIG}");
    let none = "umount -l /sys/fs/cgroup";
    let v1 = "umount -l /sys/fs/cgroup; mount -t cgroup -o none,name=cgtp-test none /sys/fs/cgroup";
    let hybrid =
        "umount -l /sys/fs/cgroup; mount -t tmpfs none /sys/fs/cgroup; cd /sys/fs/cgroup; \
                  mkdir v1 unified; mount -t cgroup -o none,name=cgtp-test none v1; \
                  mount -t cgroup2 none unified; cd /";
    let in_v2 = |setup: &str| check(&ground, &auto, setup);
    in_v2(none).finds("error", "no cgroup2 file system is mounted (mount -t cgroup2 none");
    in_v2(v1)
        .finds("error", "only cgroup v1 is mounted; boot with cgroup v2 alone: systemd.unified");
    in_v2(hybrid)
        .finds("warning", "cgroup root /sys/fs/cgroup/unified, but cgroup v1 is mounted too");
    let elsewhere = "[global]\ncgroup-root = /tmp\n";
    check(&ground, elsewhere, "true").finds("error", "/tmp is not on a cgroup2 file system");
    let gone = "[global]\ncgroup-root = /sys/fs/cgroup/no/such\n";
    check(&ground, gone, "true").finds("error", "unable to use cgroup-root /sys/fs/cgroup/no/such");
}

#[test]
fn check_weighs_inotify_limits() {
    let ground = ground!("check-inotify");
    for i in 0..9 {
        ground.cgroup(&format!("/c{i}"));
    }
    let limit = |n: u32| {
        let over = "/proc/sys/fs/inotify/max_user_watches";
        check(&ground, CONFIG, &format!("{CLEAN}; echo {n} > limit; mount --bind limit {over}"))
    };
    limit(9).finds("warning", "10 cgroups, and fs.inotify.max_user_watches is 9: raise it");
    limit(19).finds("warning", "10 cgroups, and fs.inotify.max_user_watches is 19: raise it");
    limit(20).finds("ok", "10 cgroups, and fs.inotify.max_user_watches is 20");
    // a user namespace has limits of its own
    let script = format!(
        "echo 0 > /proc/sys/user/max_inotify_instances; exec {} -c {} check",
        binary().display(),
        ground.dir.join("check.conf").display()
    );
    let none = Command::new("unshare").args(["-Ur", "sh", "-ec", &script]).output();
    let none = Said::from(none.expect("start unshare"));
    none.finds(
        "error",
        "unable to make an inotify instance: too many open files; raise the sysctl",
    );
}

#[test]
fn check_knows_old_kernels_with_net_cls() {
    let ground = ground!("check-net-cls");
    let fake = |release: &str, hierarchy: u32| {
        let setup = format!(
            "{CLEAN}; echo {release} > release; mount --bind release /proc/sys/kernel/osrelease
             printf '#subsys_name\\thierarchy\\tnum_cgroups\\tenabled\\ncpu\\t0\\t9\\t1\\nnet_cls\\t{hierarchy}\\t1\\t1\\n' > v1
             mount --bind v1 /proc/cgroups"
        );
        check(&ground, CONFIG, &setup)
    };
    let why = "net_cls of cgroup v1 in use: before Linux 5.15 (this is 5.10) that ends cgroup v2";
    fake("5.10.0-8-amd64", 3).finds("error", why);
    fake("5.10.0-8-amd64", 0).finds_no("error");
    fake("5.15.1", 3).finds_no("error");
    fake("6.1.0", 3).finds_no("error");
}

#[test]
fn check_asks_the_kernel_what_it_can_do() {
    let ground = ground!("check-features");
    use cgtproxy::nft::expr::Expr;
    use cgtproxy::nft::message::Probe;
    use cgtproxy::nft::table::Base;
    // what no kernel has: the answer is about that alone
    let chain = |kind| Probe::Chain(Base { kind, hook: 3, priority: 0 });
    let counter = || Probe::Rule(vec![Expr::Counter]);
    let mut kernel = cgtproxy::kernel::Kernel::open().expect("open netlink");
    let said = kernel.probe(&[counter(), chain("nonesuch"), counter(), chain("route")]);
    let missing = Some(nix::errno::Errno::ENOENT);
    assert_eq!(said, Ok(vec![None, missing, None, None]));
    assert_eq!(residue(), "");

    // a kernel without nf_tables, by a filter that refuses its socket
    check(&ground, CONFIG, "true");
    let mut command = Command::new(binary());
    command.arg("-c").arg(ground.dir.join("check.conf")).arg("check");
    // SAFETY: the hook makes system calls on memory that is its own.
    unsafe { command.pre_exec(refuse_netfilter_sockets) };
    let said = Said::from(command.output().expect("start cgtproxy"));
    said.finds("error", "unable to open a netlink socket: protocol not supported; the kernel needs nf_tables (on OpenWrt: kmod-nft-core)");
}

/// Makes socket(AF_NETLINK, _, NETLINK_NETFILTER) fail as on a kernel that does not have it.
fn refuse_netfilter_sockets() -> std::io::Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // offsets in struct seccomp_data: nr 0, args[0] 16, args[2] 32 (low halves, little-endian)
    let filter = [
        op(LOAD, 0, 0, 0),
        op(EQUAL, 0, 5, libc::SYS_socket as u32),
        op(LOAD, 0, 0, 16),
        op(EQUAL, 0, 3, libc::AF_NETLINK as u32),
        op(LOAD, 0, 0, 32),
        op(EQUAL, 0, 1, libc::NETLINK_NETFILTER as u32),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPROTONOSUPPORT as u32),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program and its length are valid for the call.
    let rc = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
    };
    match rc {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[test]
fn check_without_the_capability() {
    let ground = ground!("check-nobody");
    check(&ground, CONFIG, "true");
    let nobody = as_nobody(&["check"]);
    nobody.finds(
        "warning",
        "without CAP_NET_ADMIN, what nf_tables can do is not looked at: check as root",
    );
}

/// What `check` warns of is in `status` too, as text and as JSON.
#[track_caller]
fn both_find(ground: &Ground, config: &str, text: &str) {
    check(ground, config, CLEAN).finds("warning", text);
    let daemon = Daemon::start(ground, config, &[]);
    let status = daemon.shown();
    assert!(status.lines().any(|line| line.contains(text)), "no {text:?} in {status}");
    let found = daemon.json("d['loops'] + d['warnings']");
    assert!(found.contains(text), "no {text:?} in {found}");
}

#[test]
fn check_tells_who_listens() {
    let (ground, _world) = scene!("check-listen");
    let cgroup = ground.cgroup("/services/aria2");
    let ask = |proto, ip| {
        let _daemon = Daemon::start(&ground, CONFIG, &[]);
        let patience = if proto == Proto::Udp { SILENCE } else { PATIENCE };
        Client::new(&cgroup, proto, addr(ip, 80)).timeout(patience).run().who()
    };
    let listens = || {
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        let each = "''.join(str(int(v)) for v in d['targets'][2]['listens'].values())";
        (daemon.target("mihomo")[3].clone(), daemon.json(each))
    };
    for protocol in ["TCP", "UDP"] {
        let text = format!("[tproxy mihomo]: nothing listens on {protocol} port 7893");
        both_find(&ground, CONFIG, &text);
    }
    assert_eq!(listens(), ("no".into(), "000000".into()));
    // who is there without IP_TRANSPARENT is not found by TPROXY
    {
        let port = addr(ip("0.0.0.0"), 7893);
        let _tcp = std::net::TcpListener::bind(port).expect("listen");
        let _udp = std::net::UdpSocket::bind(port).expect("bind");
        for protocol in ["TCP", "UDP"] {
            let opaque = format!(
                "[tproxy mihomo]: {protocol} port 7893: what listens there for IPv4 has not set \
                 IP_TRANSPARENT"
            );
            both_find(&ground, CONFIG, &opaque);
        }
        assert_eq!(listens(), ("no".into(), "000000".into()));
        assert_eq!(ask(Proto::Tcp, REMOTE4), "refused");
        assert_eq!(ask(Proto::Udp, REMOTE4), "nobody");
    }
    // of one family
    for (at, other, key, [v4, v6]) in [
        ("0.0.0.0:7893", "IPv6", "ipv6", ["proxy", "refused"]),
        ("[::]:7893", "IPv4", "ipv4", ["refused", "proxy"]),
    ] {
        let _half = Server::at("proxy", &[at.parse().expect("an address")]);
        for protocol in ["TCP", "UDP"] {
            let text = format!("{protocol} port 7893 is not listened on for {other}");
            both_find(&ground, CONFIG, &text);
        }
        let without = CONFIG.replace("port = 7893", &format!("port = 7893\n{key} = no"));
        check(&ground, &without, CLEAN).finds_no("warning");
        // a family of which no destination is named is left alone
        let only = if key == "ipv6" { "198.18.0.0/15" } else { "2001:db8::/32" };
        let only = CONFIG.replace("port = 7893", &format!("port = 7893\nonly = {only}"));
        check(&ground, &only, CLEAN).finds_no("warning");
        let (cell, each) = listens();
        let want = if v4 == "proxy" { ("tcp4 udp4", "111010") } else { ("tcp6 udp6", "110101") };
        assert_eq!((&*cell, &*each), want);
        assert!(ask(Proto::Tcp, REMOTE4).starts_with(v4), "{at}");
        assert!(ask(Proto::Tcp, REMOTE6).starts_with(v6), "{at}");
    }
    // elsewhere is not where TPROXY looks
    let lo = ["127.0.0.1", "::1"].map(|at| addr(ip(at), 7893));
    {
        let _lo = Server::at("proxy", &lo);
        check(&ground, CONFIG, CLEAN).finds_no("warning");
        let apart = CONFIG.replace("port = 7893", "port = 7893\nipv6 = no\naddress = 192.0.2.1");
        both_find(&ground, &apart, "nothing listens on TCP port 7893");
    }
    let _in0 = Server::at("proxy", &[addr(HOST4, 7893)]);
    let only4 = CONFIG.replace("port = 7893", "port = 7893\nipv6 = no");
    both_find(&ground, &only4, "but not where TPROXY looks for what this host sends");
    assert_eq!(ask(Proto::Tcp, REMOTE4), "refused");
    check(&ground, &only4.replace("ipv6 = no", "ipv6 = no\naddress = 192.0.2.1"), CLEAN)
        .finds_no("warning");
}

#[test]
fn check_tells_who_listens_for_gateways() {
    let (ground, _world) = scene!("check-gateway");
    let lan = Lan::new(&ground);
    let lo = ["127.0.0.1", "::1"].map(|at| addr(ip(at), 7893));
    let _lo = Server::at(PROXY, &lo);
    let config = "[tproxy mihomo]\nport = 7893\n[gateway lan]\ninterface = br-lan\n\
                  target = mihomo\n";
    for (protocol, family) in [("TCP", "IPv4"), ("UDP", "IPv6")] {
        let text = format!(
            "{protocol} port 7893 is listened on for {family}, but not where TPROXY looks for what \
             gateways hand to it"
        );
        both_find(&ground, config, &text);
    }
    let ask = |config: &str| {
        let _daemon = Daemon::start(&ground, config, &[]);
        lan.ask(0, Proto::Tcp, addr(REMOTE4, 80))
    };
    assert_eq!(ask(config), "refused");
    // as it says
    let named = config.replace("= 7893\n", "= 7893\naddress = 127.0.0.1\naddress = ::1\n");
    check(&ground, &named, CLEAN).finds_no("warning");
    assert!(ask(&named).starts_with(PROXY));
    // an interface that is not there, unless it is a prefix
    let gone = config.replace("br-lan", "br-gone");
    both_find(&ground, &gone, "[gateway lan]: there is no interface br-gone now");
    let prefix = named.replace("br-lan", "br-none*");
    check(&ground, &prefix, CLEAN).finds_no("warning");
}

#[test]
fn check_tells_whether_dns_is_answered() {
    let (ground, _world, _proxy) = scene!("check-dns", proxy);
    let with = |lines: &str| CONFIG.replace("port = 7893", &format!("port = 7893\n{lines}"));
    let both = "dns-hijack = 127.0.0.1:1053\ndns-hijack = [::1]:1053";
    for at in ["127.0.0.1:1053", "[::1]:1053"] {
        let text = format!("[tproxy mihomo]: nothing listens at {at} (UDP), where its DNS goes");
        both_find(&ground, &with(both), &text);
    }
    let local = with("dns-hijack = 192.0.2.1:1053\ndns-hijack-tcp = yes");
    both_find(&ground, &local, "nothing listens at 192.0.2.1:1053 (UDP and TCP)");
    // nothing gets to a tproxy then, whoever listens
    ip_batch(&[], "link set lo down\n");
    both_find(&ground, CONFIG, "lo is down: what goes to a tproxy is dropped until it is up");
    ip_batch(&[], "link set lo up\n");
    // who answers on another host is not known
    check(&ground, &with("dns-hijack = 203.0.113.7"), CLEAN).finds_no("warning");
    let udp = std::net::UdpSocket::bind("[::]:1053").expect("bind");
    check(&ground, &with(both), CLEAN).finds("ok", "127.0.0.1:1053 is listened on, for its DNS");
    check(&ground, &with(both), CLEAN).finds_no("warning");
    both_find(&ground, &local, "nothing listens at 192.0.2.1:1053 (TCP)");
    drop(udp);
    // gateways' clients ask this host's address on their interface
    let lan = Lan::new(&ground);
    let config = "[tproxy mihomo]\nport = 7893\ndns-hijack = 127.0.0.1:1053\n\
                  [gateway lan]\ninterface = br-lan\ntarget = mihomo\n";
    let lo = Server::at("resolver", &[addr(ip("127.0.0.1"), 1053)]);
    both_find(&ground, config, "what listens at 127.0.0.1:1053 (UDP) is not there for gateways");
    let ask = || {
        let _daemon = Daemon::start(&ground, config, &[]);
        lan.ask(0, Proto::Udp, addr(REMOTE4, 53))
    };
    assert!(!ask().starts_with("resolver"));
    drop(lo);
    let _any = Server::start("resolver", &[1053]);
    check(&ground, config, CLEAN).finds_no("warning");
    assert!(ask().starts_with("resolver"), "{}", ask());
    // what does not ask by port 53
    let names = |text: &str| {
        let setup = format!(
            "mount -t tmpfs none /proc/sys/net; mkdir -p etc; \
             printf '%s' '{text}' > etc/nsswitch.conf; mount --bind etc /etc"
        );
        check(&ground, config, &setup)
    };
    names("hosts: files resolve dns")
        .finds("warning", "/etc/nsswitch.conf has \"resolve\" in hosts");
    names("hosts: files dns").finds_no("warning");
}

#[test]
fn check_tells_of_loops() {
    let ground = ground!("check-loop");
    let config = "[global]\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n";
    let any = addr(ip("::"), 7893);
    let global = format!("cgroup-root = {}\n", ground.root.display());
    let config = config.replace("[global]\n", &format!("[global]\n{global}"));
    for (cgroup, remedy) in [
        ("/proxy", "is in cgroup /proxy; begin [rules] with a direct rule for that"),
        ("/", "is in cgroup /, which no rule covers: give it a cgroup of its own"),
    ] {
        let _proxy = Client::tcp(&ground.cgroup(cgroup), any).relay();
        both_find(&ground, &config, remedy);
    }
    let by_user = config.replace("default", "bypass-user = 0\ndefault");
    let _proxy = Client::tcp(&ground.root, any).relay();
    assert!(!check(&ground, &by_user, CLEAN).out.contains("loop:"));
}

/// A socket that is bound to an interface never comes to the proxy: it is dropped, and named.
#[test]
fn check_tells_of_sockets_bound_to_an_interface() {
    let (ground, mut world, _proxy) = scene!("check-bound", proxy);
    let cgroup = ground.cgroup("/services/aria2");
    let program = "import socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                   s.setsockopt(socket.SOL_SOCKET, 25, b'in0')\n\
                   \
try: s.sendto(b'who', ('203.0.113.7', 80))\nexcept OSError: pass\n\
                   print(flush=True)\nsys.stdin.read()";
    let start = |cgroup: &Path| {
        let script = format!("echo $$ > {}/cgroup.procs; exec python3 -c \"$0\"", cgroup.display());
        let mut command = Command::new("sh");
        command.args(["-c", &script, program]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start sh");
        let mut line = String::new();
        let out = child.stdout.take().expect("stdout is piped");
        BufReader::new(out).read_line(&mut line).expect("a line");
        child
    };
    let text = "sockets of cgroup /services/aria2 are bound to in0, past [tproxy mihomo]: what \
                they send is dropped";
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    world.wire.packets();
    let mut child = start(&cgroup);
    assert_eq!(world.wire.to_remote(), [], "it is true");
    assert!(!daemon.logs().contains(text), "{}", daemon.logs());
    daemon.signal(Signal::SIGUSR1);
    assert!(daemon.wait_log(text, SETTLE), "{}", daemon.logs());
    let log = daemon.reload();
    assert_eq!(log.matches("are bound to").count(), 1, "{log}");
    check(&ground, CONFIG, CLEAN).finds("warning", text);
    assert!(daemon.shown().contains(text), "{}", daemon.shown());
    assert!(daemon.json("d['warnings']").contains(text));
    let end = |child: &mut Child| {
        let _ = child.kill();
        let _ = child.wait();
    };
    end(&mut child);
    // elsewhere it may be what it likes
    let mut child = start(&ground.cgroup("/services/mihomo"));
    assert!(!check(&ground, CONFIG, CLEAN).out.contains("are bound to"));
    end(&mut child);
}

/// Nothing has to be done about the configuration as it is shipped.
#[test]
fn check_of_what_is_shipped_warns_of_nothing() {
    let ground = ground!("check-shipped");
    let shipped = fs::read_to_string("conf/cgtproxy.conf").expect("read");
    let shipped = shipped
        .replace("[global]\n", &format!("[global]\ncgroup-root = {}\n", ground.root.display()));
    for setup in [CLEAN, "mkdir -p empty; mount --bind empty /etc"] {
        let said = check(&ground, &shipped, setup);
        said.finds("ok", "[tproxy mihomo]: no rule and no gateway names it");
        said.finds_no("warning");
        said.finds_no("error");
    }
}

#[test]
fn check_finds_who_else_uses_our_numbers() {
    let ground = ground!("check-taken");
    for (family, add, del, want) in [
        ("-4", "rule add pref 100 from 198.51.100.1 lookup main", "rule del pref 100", "rule-priority 100 is used by others (ip rule pref 100 from 198.51.100.1/32 lookup 254): set another rule-priority"),
        ("-6", "rule add pref 9 fwmark 0x1000000/0x3000000 lookup main", "rule del pref 9", "bits of fwmark-mask 0xff000000 are used by others (ip -6 rule pref 9 fwmark 0x1000000/0x3000000 lookup 254): set another fwmark-mask"),
        ("-4", "rule add pref 9 from 198.51.100.1 lookup 300", "rule del pref 9", "route-table 300 is used by others (ip rule pref 9 from 198.51.100.1/32 lookup 300): set another route-table"),
        ("-6", "route add 2001:db8:9::/64 dev in0 table 300", "route flush table 300", "route-table 300 is used by others (ip -6 route of protocol 3 and prefix length 64): set another route-table"),
    ] {
        let clean = "no ip rule or route of others uses mark bits 0xff000000, table 300 or priority 100";
        check(&ground, CONFIG, CLEAN).finds("ok", clean);
        ip_batch(&[family], &format!("{add}\n"));
        check(&ground, CONFIG, CLEAN).finds("warning", want);
        ip_batch(&[family], &format!("{del}\n"));
    }
    // our own are no others
    let _daemon = Daemon::start(&ground, CONFIG, &[]);
    check(&ground, CONFIG, CLEAN).finds("ok", "no ip rule or route of others");
}

/// The priorities that are looked at are those that the configuration takes, and no others.
#[test]
fn check_finds_who_uses_the_priorities_behind_the_first() {
    let ground = ground!("check-behind");
    let gateway =
        |interface| format!("{CONFIG}[gateway lan]\ninterface = {interface}\ntarget = mihomo\n");
    let (named, prefix) = (gateway("br-lan"), gateway("br-*"));
    let clean = "table 300 or priority 100 to 102";
    check(&ground, &prefix, CLEAN).finds("ok", clean);
    for n in [1, 2] {
        for family in ["-4", "-6"] {
            let taken = format!("pref 10{n} from all lookup main\n");
            ip_batch(&[family], &format!("rule add {taken}"));
            let said = check(&ground, &prefix, CLEAN);
            said.finds("warning", "rule-priority 100 to 102 is used by others");
            let remedy = format!("rule pref 10{n} lookup 254): set another rule-priority");
            said.finds("warning", &remedy);
            for config in [CONFIG, &named] {
                check(&ground, config, CLEAN).finds("ok", "table 300 or priority 100");
                assert!(!check(&ground, config, CLEAN).out.contains("rule-priority"));
            }
            ip_batch(&[family], &format!("rule del {taken}"));
        }
    }
    // our own are no others
    let _daemon = Daemon::start(&ground, &prefix, &[]);
    check(&ground, &prefix, CLEAN).finds("ok", clean);
}

#[test]
fn check_finds_settings_that_break_tproxy() {
    let ground = ground!("check-sysctl");
    sysctl("net/ipv4/conf/in0/src_valid_mark", "1");
    check(&ground, CONFIG, "true").finds("ok", "net.ipv4.conf.in0.src_valid_mark is 1");
    // as it says, what this host sends itself is none the worse
    for interface in ["all", "lo", "in0"] {
        sysctl(&format!("net/ipv4/conf/{interface}/src_valid_mark"), "1");
        sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "1");
    }
    let cgroup = ground.cgroup("/services/aria2");
    let _daemon = Daemon::start(&ground, CONFIG, &[]);
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let to = addr(REMOTE4, 80);
    for client in [Client::tcp(&cgroup, to), Client::udp(&cgroup, to)] {
        assert_eq!(client.run().who(), format!("proxy mihomo {to}"));
    }
}

#[test]
fn check_finds_saved_rulesets_with_our_table() {
    let ground = ground!("check-saved");
    let saved = |file: &str, text: &str| {
        let setup = format!(
            "mkdir -p etc/{}; printf '%s' '{text}' > etc/{file}; mount --bind etc /etc",
            Path::new(file).parent().map_or(String::new(), |dir| dir.display().to_string())
        );
        let said = check(&ground, CONFIG, &setup);
        fs::remove_dir_all(ground.dir.join("etc")).expect("remove");
        said
    };
    let ours = "table inet filter {\n}\ntable inet cgtproxy {\n}\n";
    for file in
        ["nftables.conf", "nftables.nft", "nftables.d/10-all.nft", "sysconfig/nftables.conf"]
    {
        let want = format!("/etc/{file} holds table inet cgtproxy: it would not load at boot");
        saved(file, ours).finds("warning", &want);
        assert!(!saved(file, "table inet filter {\n}\n# table inet cgtproxy\n").out.contains(file));
    }
}

// ------------------------------------------------------------------------------------ mistakes

/// The program as a user without any capability.
pub fn as_nobody(args: &[&str]) -> Said {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(nobodys_binary());
    command.args(args).stdin(Stdio::null());
    command.output().expect("start setpriv").into()
}

/// The program where anybody may run it.
pub fn nobodys_binary() -> PathBuf {
    static ONCE: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let copy = ONCE.get_or_init(|| {
        let copy = std::env::temp_dir().join(format!("cgtp-{}-binary", std::process::id()));
        fs::create_dir_all(&copy).expect("make a directory");
        let file = copy.join("cgtproxy");
        fs::copy(binary(), &file).expect("copy the program");
        file
    });
    copy.clone()
}

#[test]
fn wrong_arguments_get_one_line_and_a_hint() {
    let _ground = ground!("usage");
    for args in [
        "--bad",
        "-X",
        "-c",
        "--ready-fd x run",
        "frobnicate",
        "run x",
        "check x",
        "show x",
        "flush x",
        "status x",
        "status --json --watch",
        "status --prometheus --json",
        "status --yaml",
        "apps x",
        "apps --json --suggest",
        "explain",
        "explain --pid",
        "explain x",
        "explain --pid x",
        "explain /a/../b",
        "exec",
        "exec drop",
        "exec drop --",
        "exec -u",
        "exec --frob drop true",
        "run --json",
        "exec --json drop true",
    ] {
        let args: Vec<&str> = args.split(' ').collect();
        let said = run(&args);
        assert_eq!((said.code, &*said.out), (Some(2), ""), "{args:?}");
        assert_eq!(said.err.lines().count(), 1, "{args:?}: {}", said.err);
        let hint =
            said.err.starts_with("error: ") && said.err.ends_with(" (try cgtproxy --help)\n");
        assert!(hint, "{args:?}: {}", said.err);
    }
    for (word, meant) in
        [("staus", "status"), ("aps", "apps"), ("Check", "check"), ("exce", "exec")]
    {
        let want = format!(
            "error: unknown command \"{word}\", did you mean \"{meant}\"? (try cgtproxy --help)\n"
        );
        assert_eq!(run(&[word]).err, want);
    }
    let help = run(&["status", "--help"]).fine();
    for name in ["run", "check", "explain", "show", "status", "apps", "flush", "exec"] {
        assert!(help.contains(&format!("\n    {name} ")), "{help}");
    }
}

/// Who made a cgroup of `exec` himself is told what the daemon thinks of it.
#[test]
fn explain_to_the_owner_of_a_cgroup_of_exec() {
    let ground = ground!("own-exec");
    std::os::unix::fs::chown(ground.cgroup("/cgtproxy/direct"), Some(65534), None).expect("chown");
    let dir = nobodys_binary().parent().expect("a directory").to_path_buf();
    let file = dir.join("own-exec.conf");
    let root = ground.root.display();
    fs::write(&file, format!("[global]\ncgroup-root = {root}\n[rules]\ndrop = /.*\n"))
        .expect("write");
    let said = as_nobody(&["-c", file.to_str().expect("UTF-8"), "explain", "/cgtproxy/direct"]);
    assert!(said.out.contains("    target  drop\n"), "{} {}", said.out, said.err);
}

#[test]
fn without_root_the_missing_capability_is_named() {
    let _ground = ground!("not-root");
    for (args, what) in [
        (&["run"][..], "run"),
        (&["flush"], "flush"),
        (&["status"], "look into the kernel"),
        (&["status", "--watch"], "look into the kernel"),
        (&["exec", "direct", "true"], "exec"),
    ] {
        let said = as_nobody(args);
        let want = format!(
            "error: unable to {what} without CAP_NET_ADMIN: run as root or grant that capability\n"
        );
        assert_eq!((said.code, said.out, said.err), (Some(1), String::new(), want), "{args:?}");
    }
    for args in [&["show"][..], &["explain", "/a"], &["check"]] {
        assert_eq!(as_nobody(args).code, Some(0), "{args:?}");
    }
}

#[test]
fn a_closed_or_full_output() {
    let ground = ground!("output");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    for args in [
        &["show"][..],
        &["status"],
        &["status", "--json"],
        &["status", "--watch"],
        &["apps"],
        &["check"],
        &["check", "--json"],
        &["explain", "/a"],
        &["--help"],
        &["--version"],
    ] {
        let (read, write) = crate::ground::pipe();
        drop(read);
        let mut command = daemon.command(args);
        let closed = command.stdout(write).stderr(Stdio::piped()).output();
        let closed = Said::from(closed.expect("start cgtproxy"));
        assert_eq!((closed.code, &*closed.err), (Some(0), ""), "{args:?}");
        let full = File::options().write(true).open("/dev/full").expect("open /dev/full");
        let full = Said::from(daemon.command(args).stdout(full).output().expect("start cgtproxy"));
        let want = "error: unable to write to standard output: no space left on device\n";
        assert_eq!((full.code, &*full.err), (Some(1), want), "{args:?}");
    }
}

// --------------------------------------------------------------------------------- what is shipped

/// Every option that the program knows has its place in the manual page.
#[test]
fn the_manual_page_names_every_option() {
    let main = fs::read_to_string("conf/man/cgtproxy.8").expect("read");
    let help = run(&["--help"]).out;
    let words = help.split_whitespace();
    let options: Vec<&str> = words.filter_map(|w| w.strip_prefix("--")).collect();
    assert!(options.len() >= 8);
    for option in options.iter().map(|o| o.trim_end_matches([',', ']'])) {
        assert!(main.contains(&format!("Fl -{option}")), "--{option} is not documented");
    }
}

/// What bash would offer behind `words`, of which the last is being typed.
fn complete(ground: &Ground, words: &[&str]) -> Vec<String> {
    let script = r#"
        . "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        complete -p cgtproxy > /dev/null || exit 1
        _cgtproxy
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/completion/cgtproxy.bash");
    let mut command = Command::new("bash");
    command.args(["--norc", "-c", script, "bash"]).arg(file).args(words);
    let said = Said::from(command.current_dir(&ground.dir).output().expect("start bash"));
    assert_eq!((said.code, &*said.err), (Some(0), ""), "{words:?}");
    let mut offers: Vec<String> =
        said.out.lines().filter(|l| !l.is_empty()).map(str::to_owned).collect();
    offers.sort();
    // as bash does
    offers.dedup();
    offers
}

#[test]
fn completion_for_bash() {
    let ground = ground!("completion");
    write_private(&ground.dir.join("a.conf"), CONFIG);
    for (words, want) in [
        (&["cgtproxy", "e"][..], &["exec", "explain"][..]),
        (
            &["cgtproxy", ""],
            &["apps", "check", "exec", "explain", "flush", "run", "show", "status"],
        ),
        (&["cgtproxy", "-v", "st"], &["status"]),
        (
            &["cgtproxy", "status", "--"],
            &["--config", "--help", "--json", "--prometheus", "--verbose", "--version", "--watch"],
        ),
        (
            &["cgtproxy", "apps", "--"],
            &["--config", "--help", "--json", "--suggest", "--verbose", "--version"],
        ),
        (&["cgtproxy", "-c", "a."], &["a.conf"]),
        (&["cgtproxy", "-c", "a.conf", "exec", ""], &["direct", "drop", "mihomo"]),
        (&["cgtproxy", "-c", "a.conf", "exec", "m"], &["mihomo"]),
        (&["cgtproxy", "exec", "-u", "nobo"], &["nobody"]),
        (&["cgtproxy", "-c", "a.conf", "exec", "drop", "--", "base3"], &["base32"]),
        (&["cgtproxy", "flush", ""], &[]),
    ] {
        assert_eq!(complete(&ground, words), want, "{words:?}");
    }
    let pids = complete(&ground, &["cgtproxy", "explain", "--pid", "1"]);
    assert!(pids.contains(&"1".to_owned()), "{pids:?}");
}
