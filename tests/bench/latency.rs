//! How soon a new cgroup is classified, and what that costs.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

use crate::daemon::Daemon;
use crate::floor::{schedstat, Floor, Listener, NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM};
use crate::ground::Ground;
use crate::kernel::{await_exactly, await_member, cgroup_id, set_ids};
use crate::report::{median, quantile, Report, Target};
use crate::{go_on, sized, wait_until};

/// Everything below /ours/apps needs an element of its own, nothing below /ours/apps/keep does.
fn config(ground: &Ground) -> String {
    format!(
        "[global]\ncgroup-root = {}/ours\n[tproxy mihomo]\nport = 7893\n[rules]\n\
         direct = /services/mihomo\ndrop = /services/telemetry\nmihomo = /apps/.+\n",
        ground.root.display()
    )
}

fn ground() -> Ground {
    let ground = Ground::new("bench").expect("root");
    ground.cgroup("/ours/apps/keep");
    ground
}

fn cpu(daemon: &Daemon) -> u64 {
    schedstat(&format!("/proc/{}/schedstat", daemon.pid()))
}

/// Lets the program go back to sleep. Nothing announces that it does, so CPU time that stands
/// still for a while is the sign.
fn settle(daemon: &Daemon) {
    let mut last = 0;
    let still = wait_until(Duration::from_secs(60), || {
        let before = std::mem::replace(&mut last, cpu(daemon));
        thread::sleep(Duration::from_millis(20));
        before == last
    });
    assert!(still, "the program does not come to rest");
}

/// One cgroup made and removed; the microseconds until its element is there.
fn sample(dir: &Path, number: usize, listener: &mut Listener) -> f64 {
    let path = dir.join(format!("x{number}"));
    let start = Instant::now();
    fs::create_dir(&path).expect("mkdir");
    listener.await_kind(NFT_MSG_NEWSETELEM);
    let took = start.elapsed().as_nanos() as f64 / 1e3;
    fs::remove_dir(&path).expect("rmdir");
    listener.await_kind(NFT_MSG_DELSETELEM);
    // the next one finds both asleep, as on a host where this happens now and then
    thread::sleep(Duration::from_millis(1));
    took
}

/// Keeps this thread, and what it starts, on one processor. Left alone they meet on one or two by
/// the scheduler's whim, and the way between two takes as long as all that is measured.
struct Pinned(CpuSet);

impl Pinned {
    fn new() -> Pinned {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).expect("the processors of this thread");
        let mut one = CpuSet::new();
        let cpu = (0..CpuSet::count()).find(|cpu| before.is_set(*cpu) == Ok(true));
        one.set(cpu.expect("a processor")).expect("its number");
        sched_setaffinity(this, &one).expect("one processor");
        Pinned(before)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

pub fn latency(report: &mut Report) {
    let _pinned = Pinned::new();
    // one more, that stays small: the machine's pace changes while the other grows
    let small = ground();
    let small_daemon = Daemon::start(&small, &config(&small), &[]);
    fill(&small, 0..50);
    settle(&small_daemon);
    let mut small_news = Listener::new();
    let ground = ground();
    let daemon = Daemon::start(&ground, &config(&ground), &[]);
    let mut floor = Floor::start(&ground);
    let mut ours = Listener::new();
    let mut least = ground.outside(Listener::new);
    let (samples, block) = (sized(150, 500), 25);
    let mut there = 0;
    for cgroups in [50, 2_000, 10_000] {
        for i in there..cgroups {
            fill(&ground, i..i + 1);
            fs::create_dir(floor.dir.join(i.to_string())).expect("mkdir");
            if i % 1000 == 0 {
                // the floor's inotify queue is as finite as any
                await_member(&ground.at(&format!("/ours/apps/{i}")), "mihomo");
            }
        }
        there = cgroups;
        settle(&daemon);
        floor.fill(cgroups as u64);
        let (mut ours_us, mut least_us, mut small_us) = (Vec::new(), Vec::new(), Vec::new());
        // what the growth above has sent
        (ours, least) = (Listener::new(), ground.outside(Listener::new));
        for number in 0..samples {
            go_on();
            ours_us.push(sample(&ground.at("/ours/apps"), number, &mut ours));
            if number % block == block - 1 {
                for _ in 0..block {
                    least_us.push(sample(&floor.dir, number, &mut least));
                }
                for _ in 0..if cgroups == 10_000 { block } else { 0 } {
                    small_us.push(sample(&small.at("/ours/apps"), number, &mut small_news));
                }
            }
        }
        for (name, q) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99)] {
            let target = match q == 0.5 {
                true => Target::RatioAtMost(1.5),
                false => Target::None,
            };
            report.beside(
                format!("latency {name}, {cgroups} cgroups"),
                quantile(&ours_us, q),
                "us",
                ("floor", quantile(&least_us, q)),
                target,
            );
        }
        if cgroups == 50 {
            no_op(report, &ground, &daemon, &floor);
        }
        if cgroups == 10_000 {
            let reference = ("at 50", median(&small_us));
            let target = Target::RatioAtMost(1.25);
            report.beside("latency p50, 10000 cgroups", median(&ours_us), "us", reference, target);
        }
    }
    let _ = (ours, least);
    assert!(daemon.stop().success() && small_daemon.stop().success());
}

/// Cgroups that need an element each.
fn fill(ground: &Ground, numbers: std::ops::Range<usize>) {
    for i in numbers {
        ground.cgroup(&format!("/ours/apps/{i}"));
    }
}

/// A cgroup whose target is its parent's: no transaction.
fn no_op(report: &mut Report, ground: &Ground, daemon: &Daemon, floor: &Floor) {
    let pairs = sized(300, 2_000);
    let inherits = ground.at("/ours/apps/keep");
    floor.transact(false);
    let (mut ours, mut least) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        for (dir, cpu_of, into) in [
            (&inherits, &(|| cpu(daemon)) as &dyn Fn() -> u64, &mut ours),
            (&floor.dir, &(|| floor.cpu()), &mut least),
        ] {
            settle(daemon);
            let before = cpu_of();
            paced_pairs(dir, pairs / 10);
            settle(daemon);
            into.push((cpu_of() - before) as f64 / (pairs / 10) as f64 / 1e3);
        }
    }
    floor.transact(true);
    let reference = ("inotify read alone", median(&least));
    report.beside("no-op, CPU a mkdir+rmdir", median(&ours), "us", reference, Target::None);
    // the second count proves that the first one could have been another than 0
    let sent = netlink_calls(daemon, || paced_pairs(&inherits, 100));
    let control = netlink_calls(daemon, || paced_pairs(&ground.at("/ours/apps"), 100));
    assert!(control > 0, "strace sees no messages");
    let reference = ("where an element is needed", control as f64);
    let figure = "no-op, netlink messages in 100 pairs";
    report.beside(figure, sent as f64, "", reference, Target::AtMost(0.0));
}

/// Pairs of mkdir and rmdir with time enough to see each by itself.
fn paced_pairs(dir: &Path, count: usize) {
    for i in 0..count {
        go_on();
        let path = dir.join(format!("p{i}"));
        fs::create_dir(&path).expect("mkdir");
        thread::sleep(Duration::from_micros(500));
        fs::remove_dir(&path).expect("rmdir");
        thread::sleep(Duration::from_micros(500));
    }
}

/// How many messages the program sends while `what` runs.
fn netlink_calls(daemon: &Daemon, what: impl FnOnce()) -> usize {
    let mut strace = Command::new("strace");
    strace.args(["-qq", "-e", "trace=sendto,sendmsg,sendmmsg", "-e", "signal=none", "-p"]);
    let strace = strace.arg(daemon.pid().to_string()).stderr(Stdio::piped());
    let strace = strace.spawn().expect("start strace");
    let status = format!("/proc/{}/status", daemon.pid());
    let attached = wait_until(Duration::from_secs(5), || {
        let text = fs::read_to_string(&status).unwrap_or_default();
        text.lines().any(|l| l.strip_prefix("TracerPid:").is_some_and(|p| p.trim() != "0"))
    });
    assert!(attached, "strace does not attach");
    what();
    settle(daemon);
    let pid = nix::unistd::Pid::from_raw(strace.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("end strace");
    let said = strace.wait_with_output().expect("wait for strace").stderr;
    String::from_utf8_lossy(&said).lines().filter(|l| l.contains("send")).count()
}

pub fn burst(report: &mut Report) {
    let count = 10_000;
    let runs = sized(1, 5);
    let (mut delays, mut totals, mut loops, mut free_loops, mut cpus) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut lost = 0;
    for _ in 0..runs {
        go_on();
        let ground = ground();
        let free = ground.cgroup("/free");
        let daemon = Daemon::start(&ground, &config(&ground), &[]);
        free_loops.push(mkdirs(&free, count));
        settle(&daemon);
        let before = cpu(&daemon);
        let mut listener = Listener::new();
        listener.timeout(Duration::from_secs(5));
        let counter = thread::spawn(move || (listener.count_new(count), Instant::now()));
        let dir = ground.at("/ours/apps");
        let start = Instant::now();
        loops.push(mkdirs(&dir, count));
        let (seen, last) = counter.join().expect("the counter does not panic");
        assert!(seen > 0, "no element at all");
        totals.push((last - start).as_secs_f64() * 1e3);
        delays.push((totals[totals.len() - 1] - loops[loops.len() - 1]).max(0.0));
        settle(&daemon);
        cpus.push((cpu(&daemon) - before) as f64 / 1e9);
        // what the listener saw is not what there is, if elements came and went
        let ids = (0..count).map(|i| cgroup_id(&dir.join(i.to_string())).expect("an id"));
        let want: BTreeSet<u64> = ids.collect();
        let have = set_ids("cg_mihomo").expect("the set");
        lost += want.difference(&have).count();
        assert!(daemon.stop().success());
    }
    let mkdir = median(&loops);
    report.alone("burst of 10000, lost", lost as f64, "cgroups", Target::AtMost(0.0));
    let most = f64::max(100.0, 0.3 * mkdir);
    let reference = ("mkdir loop", mkdir);
    let figure = "burst, last element after last mkdir";
    report.beside(figure, median(&delays), "ms", reference, Target::AtMost(most));
    report.beside(
        "burst, first mkdir to last element",
        median(&totals),
        "ms",
        reference,
        Target::None,
    );
    let reference = ("mkdir loop, not watched", median(&free_loops) / 1e3);
    report.beside("burst, CPU", median(&cpus), "s", reference, Target::None);
}

/// Milliseconds for `count` times mkdir as fast as they go.
fn mkdirs(dir: &Path, count: usize) -> f64 {
    let paths: Vec<_> = (0..count).map(|i| dir.join(i.to_string())).collect();
    let start = Instant::now();
    for path in &paths {
        fs::create_dir(path).expect("mkdir");
    }
    start.elapsed().as_secs_f64() * 1e3
}

pub fn churn(report: &mut Report) {
    let pairs = sized(5_000, 20_000);
    let ground = ground();
    let daemon = Daemon::start(&ground, &config(&ground), &[]);
    let dir = ground.at("/ours/apps");
    settle(&daemon);
    let (watches, rss) = daemon.footprint();
    let (before, start) = (cpu(&daemon), Instant::now());
    for i in 0..pairs {
        if i % 1000 == 0 {
            go_on();
        }
        let path = dir.join(format!("c{i}"));
        fs::create_dir(&path).expect("mkdir");
        fs::remove_dir(&path).expect("rmdir");
    }
    let took = start.elapsed().as_secs_f64() * 1e6 / pairs as f64;
    let keep = BTreeSet::from([cgroup_id(&dir.join("keep")).expect("an id")]);
    await_exactly("cg_mihomo", &keep, Duration::from_secs(20));
    settle(&daemon);
    let used = (cpu(&daemon) - before) as f64 / pairs as f64 / 1e3;
    let reference = ("the pair itself", took);
    report.beside(format!("churn of {pairs}, CPU a pair"), used, "us", reference, Target::None);
    let (watches_after, rss_after) = daemon.footprint();
    let target = Target::RatioAtMost(1.0);
    let reference = ("before", watches as f64);
    report.beside("churn, watches after", watches_after as f64, "", reference, target);
    // the allocator keeps some pages for the next time
    let target = Target::RatioAtMost(1.1);
    report.beside("churn, RSS after", rss_after as f64, "KiB", ("before", rss as f64), target);
    assert!(daemon.stop().success());
}
