//! `status --watch`: what it shows, and what it does with a terminal; and `status --prometheus`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::sys::termios::{tcgetattr, LocalFlags};
use nix::unistd::Pid;

use crate::client::{Client, PATIENCE};
use crate::daemon::{binary, run_at, run_with, Daemon, UNOWNED};
use crate::gateway::Lan;
use crate::ground::{addr, ip_batch, sysctl, Ground, REMOTE4};
use crate::kernel::{await_member, forget_flows, load, table_plain};
use crate::tools::{query, Terminal};
use crate::wait_until;
use crate::world::{World, PROXY};

const CONFIG: &str = "[tproxy mihomo]\nport = 7893\n[tproxy idle]\nport = 7894\n\
                      [rules]\nidle = /idle\nmihomo = /busy\ndirect = /busy/free\n";

/// The first frames, as lists of lines.
fn frames(daemon: &Daemon, count: usize) -> Vec<Vec<String>> {
    let mut command = daemon.command(&["status", "--watch"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("start cgtproxy");
    let lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    let mut frames: Vec<Vec<String>> = Vec::new();
    for line in lines.map_while(Result::ok) {
        if line.starts_with("table inet") {
            if frames.len() == count {
                break;
            }
            frames.push(Vec::new());
        }
        frames.last_mut().expect("a headline").push(line);
    }
    let _ = child.kill();
    let _ = child.wait();
    frames
}

fn rows<'a>(frame: &'a [String], title: &str) -> Vec<Vec<&'a str>> {
    let table = frame.iter().skip_while(|line| !line.starts_with(title));
    let lines = table.skip(1).take_while(|line| !line.is_empty());
    lines.map(|line| line.split("  ").map(str::trim).filter(|c| !c.is_empty()).collect()).collect()
}

/// Each picture shows what went since the last one, of targets and gateways the busiest first; what came
/// back only where the kernel counts it.
#[test]
fn both_directions_and_the_busiest_first() {
    let (ground, _world, _proxy) = scene!("watch-both", proxy);
    let [busy, free] = ground.cgroups(["/busy", "/busy/free"]);
    let lan = Lan::new(&ground);
    let config = format!(
        "[global]\ncounters = cgroup\n{CONFIG}\
         [gateway quiet]\ninterface = br-guest\ntarget = idle\n\
         [gateway lan]\ninterface = br-lan\ntarget = mihomo\n"
    );
    let daemon = Daemon::start(&ground, &config, &[]);
    // whoever gets more of the processors
    let flood = |cgroup: &PathBuf| Client::udp(cgroup, addr(REMOTE4, 80)).flood().spawn();
    let _floods = [&busy, &busy, &busy, &free].map(flood);
    let _client = lan.client(1).run(|| flood(&ground.root));
    for counts in [false, true] {
        sysctl("net/netfilter/nf_conntrack_acct", if counts { "1" } else { "0" });
        forget_flows();

        let shown = frames(&daemon, 3);

        let targets = rows(&shown[2], "TARGET");
        let names: Vec<&str> = targets.iter().map(|row| row[0]).collect();
        assert_eq!(names[..2], ["mihomo", "direct"], "{:#?}", shown[2]);
        assert_ne!(targets[1][2], "0", "direct by its cgroup: {targets:?}");
        let back = targets[0][4];
        match counts {
            false => assert_eq!(back, "-", "{targets:?}"),
            true => assert!(!["-", "0 B"].contains(&back), "{targets:?}"),
        }
        let gateways = rows(&shown[2], "GATEWAY");
        assert_eq!(gateways[0][..2], ["lan", "mihomo"], "{gateways:?}");
        assert_ne!(gateways[0][2], "0", "{gateways:?}");
        assert_eq!(gateways[1], ["quiet", "idle", "0", "0 B"]);
    }
    daemon.stop_clean();
}

/// Rows and columns of the terminal.
fn resize(terminal: &Terminal, ws_row: u16, ws_col: u16) {
    let size = libc::winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: reads one live struct winsize.
    let rc = unsafe { libc::ioctl(terminal.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    assert_eq!(rc, 0);
}

fn echoes(terminal: &Terminal) -> bool {
    let flags = tcgetattr(&terminal.master).expect("the terminal's settings").local_flags;
    flags.contains(LocalFlags::ECHO | LocalFlags::ICANON)
}

/// Keys and the terminal's size are met at once, and the terminal is left as it was, however it ends.
#[test]
fn a_terminal_is_left_as_it_was() {
    let ground = ground!("watch-terminal");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let (program, file) = (binary(), daemon.config.clone());
    let command = [program.to_str(), Some("-c"), file.to_str(), Some("status"), Some("--watch")];
    let command = command.map(|word| word.expect("UTF-8"));

    let mut terminal = Terminal::open(&command);
    resize(&terminal, 24, 80);
    terminal.expect("TARGET");
    assert!(!echoes(&terminal), "keys come one by one");

    // another size is met at once, not with the next picture, and lines are cut
    let redrawn = (0..10).any(|_| {
        terminal.expect("\x1b[H\x1b[J");
        terminal.expect("mihomo");
        let began = std::time::Instant::now();
        resize(&terminal, 3, 12);
        terminal.expect("\x1b[H\x1b[J");
        terminal.expect("table inet c\r\n\r\n");
        let took = began.elapsed();
        resize(&terminal, 24, 80);
        took < Duration::from_millis(500)
    });
    assert!(redrawn, "it is not drawn anew at once");

    terminal.say("xyz");
    terminal.expect("TARGET");
    terminal.say("q");
    let ended = wait_until(PATIENCE, || terminal.child.try_wait().is_ok_and(|s| s.is_some()));
    assert!(ended, "q does not end it");
    assert_eq!(terminal.child.wait().expect("wait").code(), Some(0));
    assert!(echoes(&terminal), "the terminal is not as it was");

    // a signal ends it as it would without a terminal
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut terminal = Terminal::open(&command);
        terminal.expect("TARGET");
        assert!(!echoes(&terminal));
        kill(Pid::from_raw(terminal.child.id() as i32), signal).expect("kill");
        assert_eq!(terminal.child.wait().expect("wait").signal(), Some(signal as i32));
        assert!(echoes(&terminal), "{signal}");
    }
    daemon.stop_clean();
}

/// A family: its kind, and the value of each sample by its labels.
type Family = (String, BTreeMap<BTreeMap<String, String>, f64>);

/// Reads the text format strictly: each family in one piece, HELP and TYPE in front, each sample
/// once.
fn parse(text: &str) -> Result<BTreeMap<String, Family>, String> {
    let name = |name: &str, colon: bool| {
        let first = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
        let is = |c: char| c.is_ascii_alphanumeric() || c == '_' || colon && c == ':';
        (first && name.chars().all(is)).then(|| name.to_owned()).ok_or(format!("name {name:?}"))
    };
    let mut all: BTreeMap<String, Family> = BTreeMap::new();
    let mut helped: BTreeSet<String> = BTreeSet::new();
    let mut open: Option<String> = None;
    if !text.ends_with('\n') {
        return Err("no newline at the end".into());
    }
    for line in text.lines() {
        let wrong = |why: &str| format!("{why}: {line:?}");
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (family, help) = rest.split_once(' ').ok_or(wrong("no help"))?;
            let new = !help.is_empty() && helped.insert(name(family, true)?);
            open = Some(family.into()).filter(|_| new);
            open.as_ref().ok_or(wrong("told twice"))?;
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (family, kind) = rest.split_once(' ').ok_or(wrong("no type"))?;
            let known = ["counter", "gauge"].contains(&kind) && open.as_deref() == Some(family);
            let total = (kind == "counter") == family.ends_with("_total");
            let new = all.insert(family.into(), (kind.into(), BTreeMap::new())).is_none();
            (known && total && new).then_some(()).ok_or(wrong("bad type"))?;
        } else {
            let (series, value) = line.rsplit_once(' ').ok_or(wrong("no value"))?;
            let (family, labels) = match series.split_once('{') {
                None => (series, ""),
                Some((family, rest)) => (family, rest.strip_suffix('}').ok_or(wrong("no end"))?),
            };
            (open.as_deref() == Some(family)).then_some(()).ok_or(wrong("not in its place"))?;
            let mut found = BTreeMap::new();
            for label in labels.split(',').filter(|label| !label.is_empty()) {
                let (key, value) = label.split_once("=\"").ok_or(wrong("bad label"))?;
                let value = value.strip_suffix('"').ok_or(wrong("no quote"))?;
                let new =
                    !value.contains('"') && found.insert(name(key, false)?, value.into()).is_none();
                new.then_some(()).ok_or(wrong("bad label"))?;
            }
            let value: f64 = value.parse().map_err(|_| wrong("no number"))?;
            let family = all.get_mut(family).ok_or(wrong("no type"))?;
            family.1.insert(found, value).map_or(Ok(()), |_| Err(wrong("twice")))?;
        }
    }
    Ok(all)
}

/// `status --prometheus` has every family that the manual page names, well formed, whether anything is in
/// force or not.
#[test]
fn metrics_in_the_text_format() {
    let (ground, _world, _proxy) = scene!("metrics", proxy);
    let busy = ground.cgroup("/busy");
    let config = format!(
        "[global]\nhold = /none\n{CONFIG}[gateway lan]\ninterface = br-lan\ntarget = mihomo\n\
         [route out]\ninterface = in0\n[route vpn]\ninterface = wg0\n"
    );
    let daemon = Daemon::start(&ground, &config, &[]);
    await_member(&busy, "mihomo");
    let to = addr(REMOTE4, 80);
    assert_eq!(Client::udp(&busy, to).run().who(), format!("{PROXY} {to}"));

    let text = daemon.ask(&["status", "--prometheus"]).out;

    let found = parse(&text).unwrap_or_else(|why| panic!("{why}\n{text}"));
    let target = |name| ("target", name);
    let (tcp4, udp6) = ([("protocol", "tcp"), IPV4], [("protocol", "udp"), ("family", "ipv6")]);
    for (family, labels, want) in [
        ("in_force", &[][..], Some(1.0)),
        ("daemon_up", &[], Some(1.0)),
        ("target_packets_total", &[target("mihomo")], Some(1.0)),
        ("target_cgroups", &[target("mihomo")], Some(1.0)),
        ("target_refused_packets_total", &[target("mihomo")], Some(0.0)),
        ("target_packets_total", &[target("direct")], None),
        ("target_listener_up", &[target("mihomo"), tcp4[0], tcp4[1]], Some(1.0)),
        ("target_listener_up", &[target("idle"), udp6[0], udp6[1]], Some(0.0)),
        ("target_route_up", &[target("out"), IPV4], Some(1.0)),
        ("target_route_up", &[target("vpn"), IPV4], Some(0.0)),
        ("held_packets_total", &[], Some(0.0)),
        ("repairs_total", &[("of", "table")], Some(0.0)),
        ("reloads_total", &[("result", "refused")], Some(0.0)),
        ("gateway_bytes_total", &[("gateway", "lan"), target("mihomo")], Some(0.0)),
    ] {
        let by = labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let samples = found.get(&format!("cgtproxy_{family}")).map(|(_, samples)| samples);
        let value = samples.and_then(|samples| samples.get(&by)).copied();
        assert_eq!(value, want, "{family} {labels:?}\n{text}");
    }
    let page = std::fs::read_to_string("conf/man/cgtproxy.8").expect("read the manual page");
    let words = page.split(|c: char| !(c.is_ascii_lowercase() || c == '_'));
    let named: BTreeSet<&str> = words.filter(|word| word.starts_with("cgtproxy_")).collect();
    assert_eq!(named, found.keys().map(String::as_str).collect(), "the page (left)");

    daemon.stop_clean();
    let text = run_with(&ground, CONFIG, &["status", "--prometheus"]).out;
    assert_eq!(parse(&text).expect("metrics")["cgtproxy_in_force"].1[&BTreeMap::new()], 0.0);
}

const IPV4: (&str, &str) = ("family", "ipv4");

/// Repairs of the table and of the routing, reloads that were taken and refused, as the kernel tells
/// them; `None` where it does not.
fn deeds(daemon: &Daemon) -> Option<[f64; 4]> {
    let all = parse(&daemon.ask(&["status", "--prometheus"]).out).expect("metrics");
    let value = |family: &str, label: &str, is: &str| {
        let labels = BTreeMap::from([(label.to_string(), is.to_string())]);
        all.get(family).map(|(_, samples)| samples[&labels])
    };
    let repairs = ["table", "routing"].map(|of| value("cgtproxy_repairs_total", "of", of));
    let reloads = ["taken", "refused"].map(|is| value("cgtproxy_reloads_total", "result", is));
    let found = [repairs, reloads].concat();
    let known: Option<Vec<f64>> = found.iter().copied().collect();
    assert!(known.is_some() || found == [None; 4], "{found:?}");
    known?.try_into().ok()
}

#[track_caller]
fn await_deeds(daemon: &Daemon, want: [f64; 4]) {
    let there = wait_until(PATIENCE, || deeds(daemon) == Some(want));
    assert!(there, "{:?}, not {want:?}\n{}", deeds(daemon), daemon.logs());
}

/// Where the daemon owns its table, so that nobody else can take it away, and where it does not.
const OWNERS: [&[(&str, &str)]; 2] = [&[], &[UNOWNED]];

/// How often something was repaired or reloaded is counted with the kernel, each deed by itself, and told
/// where there is something to tell.
#[test]
fn repairs_and_reloads_are_counted() {
    for env in OWNERS {
        let ground = ground!("deeds");
        ground.cgroup("/busy");
        let daemon = Daemon::start_in(&ground, CONFIG, &[], env);
        assert_eq!(deeds(&daemon), Some([0.0; 4]));
        assert!(!daemon.shown().contains("repairs"), "nothing to tell: {}", daemon.shown());

        daemon.reload();
        await_deeds(&daemon, [0.0, 0.0, 1.0, 0.0]);
        // a refused one changes nothing else
        let listed = table_plain(&[]);
        daemon.configure("[rules]\nnobody = /x\n");
        daemon.refuse();
        daemon.configure(CONFIG);
        await_deeds(&daemon, [0.0, 0.0, 1.0, 1.0]);
        assert_eq!(table_plain(&[]), listed);
        ip_batch(&["-4"], "rule del pref 100 iif lo fwmark 0x1000000/0xff000000 lookup 300\n");
        await_deeds(&daemon, [0.0, 1.0, 1.0, 1.0]);
        ip_batch(&["-6"], "route del local default dev lo table 300\n");
        await_deeds(&daemon, [0.0, 2.0, 1.0, 1.0]);

        let line = "\nrepairs: 0 of the table, 2 of ip rules and routes; reloads: 1, refused: 1\n";
        assert!(daemon.shown().contains(line), "{}", daemon.shown());
        let told = "({'table': 0, 'routing': 2}, {'taken': 1, 'refused': 1})";
        assert_eq!(daemon.json("d['repairs'], d['reloads']"), told);
        daemon.stop_clean();
    }
}

/// The counts outlive the table: others take it away one time after the other, as fast as nft goes, and
/// just before a reload.
#[test]
fn counts_outlive_the_table() {
    let ground = ground!("deeds-table");
    let busy = ground.cgroup("/busy");
    let daemon = Daemon::start_in(&ground, CONFIG, &[], &[UNOWNED]);
    ip_batch(&["-6"], "route del local default dev lo table 300\n");
    let mut want = [0.0, 1.0, 0.0, 0.0];
    await_deeds(&daemon, want);

    for _ in 0..3 {
        load("delete table inet cgtproxy");
        want[0] += 1.0;
        await_deeds(&daemon, want);
    }
    for _ in 0..50 {
        load("flush ruleset");
        let now = deeds(&daemon).unwrap_or(want);
        assert!(now[0] >= want[0] && now[1..] == want[1..], "{now:?} after {want:?}");
        want = now;
    }
    await_member(&busy, "mihomo");

    load("flush ruleset");
    daemon.reload();
    want[2] += 1.0;
    assert!(wait_until(PATIENCE, || deeds(&daemon).is_some()));
    want[0] = deeds(&daemon).expect("a table")[0];
    await_deeds(&daemon, want);
    await_member(&busy, "mihomo");
    daemon.stop_clean();
}

/// They outlive who has done it, as long as the table stays.
#[test]
fn counts_outlive_the_daemon() {
    for env in OWNERS {
        let ground = ground!("deeds-daemon");
        let start = || Daemon::start_in(&ground, CONFIG, &[], env);
        let mut daemon = start();
        ip_batch(&["-6"], "route del local default dev lo table 300\n");
        let mut want = [0.0, 1.0, 0.0, 0.0];
        await_deeds(&daemon, want);
        for end in [Daemon::kill9, Daemon::leave] {
            let file = daemon.config.clone();
            end(daemon);
            let json = run_at(&file, &["status", "--json"]).out;
            let told = query(&json, "[*d['repairs'].values(), *d['reloads'].values()]");
            assert_eq!(told, format!("{:?}", want.map(|count| count as u64)));

            daemon = start();
            assert_eq!(deeds(&daemon), Some(want));
            daemon.reload();
            want[2] += 1.0;
            await_deeds(&daemon, want);
        }
        daemon.stop_clean();

        let daemon = start();
        assert_eq!(deeds(&daemon), Some([0.0; 4]), "with another table");
        daemon.stop_clean();
    }
}

/// As a version of before has left it.
#[test]
fn a_table_that_counts_nothing_of_that() {
    let ground = ground!("nodeeds");
    ground.cgroup("/busy");
    let shown = run_with(&ground, CONFIG, &["show"]).out;
    let mut lines = shown.lines();
    let mut text = String::new();
    while let Some(line) = lines.next() {
        match line.starts_with("  counter ") {
            true => assert_eq!(lines.next(), Some("  }")),
            false => text += &format!("{line}\n"),
        }
    }
    assert!(text.len() < shown.len());
    load(&text);

    let status = run_with(&ground, CONFIG, &["status", "--json"]);
    let told = query(&status.out, "d['in_force'], d['repairs'], d['reloads']['taken']");
    assert_eq!(told, "(True, {'table': None, 'routing': None}, None)", "{}", status.err);
    let metrics = run_with(&ground, CONFIG, &["status", "--prometheus"]).out;
    assert!(!metrics.contains("repairs") && metrics.contains("cgtproxy_in_force 1"), "{metrics}");
    let text = run_with(&ground, CONFIG, &["status"]).out;
    assert!(text.contains("in force") && !text.contains("repairs"), "{text}");

    let daemon = Daemon::start(&ground, CONFIG, &[]);
    assert_eq!(deeds(&daemon), Some([0.0; 4]));
    daemon.stop_clean();
}

/// So that the tests above can fail.
#[test]
fn the_parser_is_strict() {
    let good = "# HELP a A.\n# TYPE a gauge\na{b=\"c\"} 1\na 2\n";
    assert_eq!(parse(good).expect("good")["a"].1.len(), 2);
    for bad in [
        "# HELP a A.\n# TYPE a gauge\na 1",
        "# TYPE a gauge\na 1\n",
        "# HELP a A.\na 1\n",
        "# HELP a A.\n# TYPE a gauge\na 1\na 1\n",
        "# HELP a A.\n# TYPE a counter\na 1\n",
        "# HELP a A.\n# TYPE a gauge\nb 1\n",
        "# HELP a A.\n# TYPE a gauge\na{b=c} 1\n",
        "# HELP a A.\n# TYPE a gauge\na x\n",
        "# HELP a A.\n# TYPE a gauge\na 1\n# HELP a A.\n",
        "# HELP a-b A.\n# TYPE a-b gauge\na-b 1\n",
    ] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}
