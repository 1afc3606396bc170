//! Start, reload, size in memory and on disk, and the rules by themselves.

use std::fs::{self, File};
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cgtproxy::config::{self, Config, Source};
use cgtproxy::policy::{self, Memo};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::Signal;
use regex_lite::Regex;

use crate::daemon::{binary as program, run_with, write_private, Daemon};
use crate::floor::{schedstat, Listener, NFT_MSG_NEWRULE};
use crate::ground::Ground;
use crate::kernel::{cgroup_id, nft};
use crate::report::{Report, Target};
use crate::{go_on, sized};

const CONFIG: &str = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /services/mihomo\n\
    drop = /services/telemetry\nmihomo = /apps/.+\n";

pub fn binary(report: &mut Report) {
    let size = fs::metadata(program()).expect("stat the program").len();
    let gzip = Command::new("gzip")
        .args(["-9", "-c"])
        .stdin(File::open(program()).expect("open the program"))
        .stdout(Stdio::piped())
        .output()
        .expect("start gzip");
    assert!(gzip.status.success());
    let kib = |bytes: usize| bytes as f64 / 1024.0;
    report.alone("binary", kib(size as usize), "KiB", aimed_at(800.0));
    report.alone("binary, gzip -9", kib(gzip.stdout.len()), "KiB", aimed_at(380.0));
}

/// A size that is aimed at on x86_64 with pages of 4 KiB: elsewhere code and pages are of other sizes.
fn aimed_at(most: f64) -> Target {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    match cfg!(target_arch = "x86_64") && page == Ok(Some(4096)) {
        true => Target::AtMost(most),
        false => Target::None,
    }
}

pub fn start(report: &mut Report) {
    let ground = Ground::new("start").expect("root");
    let figures = [(50, 1.0), (1_000, 1.3), (10_000, 4.0)];
    let mut there = 0;
    for (cgroups, mebibytes) in figures {
        for i in there..cgroups {
            ground.cgroup(&format!("/apps/{i}"));
        }
        there = cgroups;
        let table = run_with(&ground, CONFIG, &["show"]).fine();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let mut cpu = Vec::new();
        let mut memory = [const { Vec::new() }; 3];
        for _ in 0..sized(5, if cgroups > 5_000 { 9 } else { 25 }) {
            go_on();
            let start = Instant::now();
            let mut daemon = Daemon::spawn(&ground, CONFIG, &[], &[]);
            assert!(daemon.ready(), "{}", daemon.logs());
            ours.push(start.elapsed().as_secs_f64() * 1e3);
            let used = schedstat(&format!("/proc/{}/schedstat", daemon.pid()));
            cpu.push(used as f64 / 1e6);
            let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()));
            let status = status.expect("the status of a live process");
            for (field, into) in ["VmRSS:", "RssAnon:", "VmHWM:"].iter().zip(&mut memory) {
                let line = status.lines().find_map(|l| l.strip_prefix(field));
                let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<f64>().ok());
                into.push(kib.expect("a number of KiB") / 1024.0);
            }
            assert!(daemon.stop().success());
            // what every program has to do that knows all cgroups, and is told of new ones
            let walk = walk(&ground.root);
            theirs.push(walk + ground.outside(|| load_table(&table)));
        }
        let target = Target::RatioAtMost(1.0);
        let figure = format!("start to ready, {cgroups} cgroups");
        report.beside(figure, &ours, "ms", ("watching each, and nft -f", &theirs), target);
        let figure = format!("start, CPU, {cgroups} cgroups");
        report.alone(figure, &cpu, "ms", Target::None);
        for (name, samples) in ["RSS", "RssAnon", "VmHWM"].iter().zip(&memory) {
            let target = match *name {
                "RSS" => aimed_at(mebibytes),
                _ => Target::None,
            };
            report.alone(format!("{name}, {cgroups} cgroups"), samples, "MiB", target);
        }
    }
}

/// Milliseconds to watch every cgroup below a directory and to learn the id of each.
fn walk(root: &Path) -> f64 {
    let start = Instant::now();
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC).expect("inotify");
    let mask = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        inotify.add_watch(&dir, mask).expect("watch a cgroup");
        black_box(cgroup_id(&dir).expect("an id"));
        let entries = fs::read_dir(&dir).expect("list a cgroup").flatten();
        left.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    start.elapsed().as_secs_f64() * 1e3
}

/// Milliseconds for `nft -f`.
pub fn load_table(script: &str) -> f64 {
    let start = Instant::now();
    let out = nft(&["-f", "-"], script);
    let took = start.elapsed().as_secs_f64() * 1e3;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    took
}

pub fn reload(report: &mut Report) {
    let ground = Ground::new("reload").expect("root");
    for i in 0..1_000 {
        ground.cgroup(&format!("/apps/{i}"));
    }
    // what matches stands last
    let text = |port: u16| {
        let rules: String = patterns(99).map(|p| format!("drop = {p}\n")).collect();
        format!("[tproxy mihomo]\nport = {port}\n[rules]\n{rules}mihomo = /apps/.+\n")
    };
    let daemon = Daemon::start(&ground, &text(7893), &[]);
    let table = run_with(&ground, &text(7893), &["show"]).fine();
    let mut listener = Listener::new();
    let (mut ours, mut theirs, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..sized(7, 25) {
        go_on();
        daemon.configure(&text(7894 + round as u16));
        let used = || schedstat(&format!("/proc/{}/schedstat", daemon.pid()));
        let (before, start) = (used(), Instant::now());
        daemon.signal(Signal::SIGHUP);
        listener.await_kind(NFT_MSG_NEWRULE);
        ours.push(start.elapsed().as_secs_f64() * 1e3);
        let line = format!("reloaded {}", daemon.config.display());
        assert!(daemon.wait_log(&line, Duration::from_secs(10)), "{}", daemon.logs());
        cpu.push((used() - before) as f64 / 1e6);
        theirs.push(ground.outside(|| load_table(&table)));
        // the rest of this transaction's messages
        listener = Listener::new();
    }
    let figure = "reload, 1000 cgroups, 100 rules";
    let reference = ("nft -f of the same table", &theirs);
    report.beside(figure, &ours, "ms", reference, Target::RatioAtMost(0.75));
    report.alone("reload, CPU", &cpu, "ms", Target::None);
    assert!(daemon.stop().success());
}

/// A list of so many prefixes that do not touch each other.
pub fn prefixes(count: u32) -> String {
    let prefix = |i: u32| format!("{}/24\n", std::net::Ipv4Addr::from((11 << 24) + i * 512));
    (0..count).map(prefix).collect()
}

/// What a list of addresses costs: start, reload and memory, beside the same without one.
pub fn lists(report: &mut Report) {
    let ground = Ground::new("lists").expect("root");
    ground.cgroup("/apps/1");
    let plain = CONFIG.to_string();
    for (count, milliseconds, mebibytes) in
        [(10_000, Target::RatioAtMost(1.0), aimed_at(3.0)), (100_000, Target::None, Target::None)]
    {
        let file = ground.dir.join(format!("{count}.txt"));
        write_private(&file, &prefixes(count));
        let line = format!("port = 7893\nbypass-file = {}", file.display());
        let listed = CONFIG.replace("port = 7893", &line);
        let tables = [&plain, &listed].map(|text| run_with(&ground, text, &["show"]).fine());
        // how much longer nft takes for the same
        let mut theirs = Vec::new();
        // without the list and with it
        let mut samples = [const { [const { Vec::new() }; 2] }; 6];
        for _ in 0..sized(5, 15) {
            go_on();
            for (with, text) in [&plain, &listed].into_iter().enumerate() {
                let start = Instant::now();
                let mut daemon = Daemon::spawn(&ground, text, &[], &[]);
                assert!(daemon.ready(), "{}", daemon.logs());
                let took = start.elapsed().as_secs_f64() * 1e3;
                let used = || schedstat(&format!("/proc/{}/schedstat", daemon.pid())) as f64 / 1e6;
                let (cpu, resident) = (used(), memory(&daemon));
                let start = Instant::now();
                daemon.signal(Signal::SIGHUP);
                assert!(daemon.wait_log("reloaded", Duration::from_secs(20)), "{}", daemon.logs());
                let reload = start.elapsed().as_secs_f64() * 1e3;
                let values = [took, cpu, resident, reload, used() - cpu, memory(&daemon)];
                for (into, value) in samples.iter_mut().zip(values) {
                    into[with].push(value);
                }
                assert!(daemon.stop().success());
            }
            let [without, with] = [0, 1].map(|i| ground.outside(|| load_table(&tables[i])));
            theirs.push(with - without);
        }
        let figures = [
            ("start to ready", "ms", milliseconds),
            ("start, CPU", "ms", Target::None),
            ("RSS", "MiB", mebibytes),
            ("reload", "ms", Target::None),
            ("reload, CPU", "ms", Target::None),
            ("RSS after it", "MiB", Target::None),
        ];
        for ((name, unit, target), [without, with]) in figures.into_iter().zip(&samples) {
            let figure = format!("{name}, {count} prefixes");
            report.beside(&figure, with, unit, ("without", without), Target::None);
            let more: Vec<f64> = with.iter().zip(without).map(|(a, b)| a - b).collect();
            let figure = figure + ", more";
            match name {
                "start to ready" => {
                    report.beside(figure, more, unit, ("nft -f of the same table", &theirs), target)
                }
                _ => report.alone(figure, more, unit, target),
            }
        }
    }
}

/// MiB that a daemon has resident.
fn memory(daemon: &Daemon) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()));
    let status = status.expect("the status of a live process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kib.expect("a number of KiB") / 1024.0
}

/// Rules of the shapes that the manual gives, by turns.
fn patterns(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|i| match i % 4 {
        0 => format!("/services/name{i}"),
        1 => format!("/services/(first{i}|second{i})"),
        2 => format!(r"/user\.slice/user-1000\.slice/.*/app-org\.name{i}.*"),
        _ => format!(r"/system\.slice/name{i}\.service"),
    })
}

/// Paths of the shapes that init systems and desktops give, which no rule matches.
fn paths(count: usize) -> Vec<(&'static str, String)> {
    let shape = |i: usize| match i % 4 {
        0 => ("procd", format!("/services/dnsmasq{i}/instance1")),
        1 => (
            "desktop",
            format!(
                "/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-thing-{i}.scope"
            ),
        ),
        2 => ("systemd", format!("/system.slice/cron{i}.service")),
        _ => ("container", format!("/system.slice/docker-{i:064x}.scope")),
    };
    (0..count).map(shape).collect()
}

/// A configuration file that is only in memory.
struct Text(String);

impl Source for Text {
    fn read(&self, _: &Path) -> Result<String, String> {
        Ok(self.0.clone())
    }
}

fn with_rules(count: usize) -> Config {
    let rules: String = patterns(count).map(|p| format!("drop = {p}\n")).collect();
    let text = Text(format!("[rules]\n{rules}"));
    let config = config::load(&text, Path::new("bench.conf")).expect("a valid configuration");
    assert_eq!(config.rules.len(), count);
    config
}

pub fn rules(report: &mut Report) {
    for count in [10, 100, 1_000] {
        let config = with_rules(count);
        let all = policy::root_rank(&config);
        let some = paths(40);
        // microseconds for one pass over all rules, of each path
        let pass = |classify: &dyn Fn(&str) -> bool, kind: Option<&str>| {
            let picked: Vec<_> = some.iter().filter(|p| kind.is_none_or(|k| k == p.0)).collect();
            (0..sized(5, 15))
                .map(|_| {
                    go_on();
                    let start = Instant::now();
                    for (_, path) in &picked {
                        assert!(!black_box(classify(black_box(path))), "{path} matches");
                    }
                    start.elapsed().as_secs_f64() * 1e6 / picked.len() as f64
                })
                .collect::<Vec<f64>>()
        };
        let ours = |path: &str| Memo::default().rank(&config, all, path.as_bytes(), false) != all;
        let regexes: Vec<Regex> = patterns(count)
            .map(|p| Regex::new(&format!(r"\A(?:{p})\z")).expect("a valid pattern"))
            .collect();
        let plain = |path: &str| regexes.iter().any(|regex| regex.is_match(path));
        let reference = ("every regex tried", pass(&plain, None));
        let target = match count {
            100 => Target::RatioAtMost(0.2),
            _ => Target::None,
        };
        report.beside(
            format!("a path against {count} rules"),
            pass(&ours, None),
            "us",
            reference,
            target,
        );
        if count == 100 {
            for kind in ["procd", "desktop", "systemd", "container"] {
                let reference = ("every regex tried", pass(&plain, Some(kind)));
                let figure = format!("a {kind} path against {count} rules");
                report.beside(figure, pass(&ours, Some(kind)), "us", reference, Target::None);
            }
        }
        let many = paths(sized(1_000, 10_000));
        let start = Instant::now();
        for (_, path) in &many {
            black_box(ours(path));
        }
        let took = start.elapsed().as_secs_f64() * 1e3;
        report.alone(
            format!("{} paths against {count} rules", many.len()),
            took,
            "ms",
            Target::None,
        );
    }
}
