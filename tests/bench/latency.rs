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
use crate::floor::{schedstat, Floor, Kind, Listener, NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM};
use crate::ground::Ground;
use crate::kernel::{await_exactly, await_member, cgroup_id, set_ids};
use crate::report::{quantile, Report, Target};
use crate::{go_on, sized, wait_until};

/// Everything below /ours/apps needs an element of its own, nothing below /ours/apps/keep does.
/// The veth of the ground is not a container's: to look for one, which goes on for some seconds after
/// many cgroups have come, would be measured with the rest.
fn config(ground: &Ground) -> String {
    format!(
        "[global]\ncgroup-root = {}/ours\ncontainers = no\n[tproxy mihomo]\nport = 7893\n[rules]\n\
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

/// Lets the program go back to sleep. Nothing announces that it does, so the sign is that it does
/// not want to run and that its CPU time stands still for a while.
fn settle(daemon: &Daemon) {
    let mut last = 0;
    let still = wait_until(Duration::from_secs(60), || {
        let before = std::mem::replace(&mut last, cpu(daemon));
        thread::sleep(Duration::from_millis(20));
        before == last && !daemon.process("State").starts_with('R')
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
pub struct Pinned(CpuSet);

impl Pinned {
    pub fn new() -> Pinned {
        let this = Pid::from_raw(0);
        let before = sched_getaffinity(this).expect("the processors of this thread");
        let mut one = CpuSet::new();
        let cpu = (0..CpuSet::count()).find(|cpu| before.is_set(*cpu) == Ok(true));
        one.set(cpu.expect("a processor")).expect("its number");
        sched_setaffinity(this, &one).expect("one processor");
        Pinned(before)
    }

    /// This thread goes before those that it starts, too: it sees an element when that is there, and
    /// not when whoever put it in has done all else that it does.
    fn ahead() -> Pinned {
        schedule(THIS, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 2);
        Pinned::new()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        schedule(THIS, libc::SCHED_OTHER, 0);
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

/// Has a process go before all others of this machine but who measures: what it waits for is what it
/// is asked, whoever else is busy.
fn before_others(pid: Pid) {
    schedule(pid, libc::SCHED_FIFO, 1);
}

/// The caller, for the kernel.
const THIS: Pid = Pid::from_raw(0);

/// The scheduling of a process, or of this thread, see sched(7).
fn schedule(pid: Pid, policy: i32, priority: i32) {
    // SAFETY: plain integers, for which zero is valid.
    let mut param: libc::sched_param = unsafe { std::mem::zeroed() };
    param.sched_priority = priority;
    // SAFETY: reads one live parameter.
    let rc = unsafe { libc::sched_setscheduler(pid.as_raw(), policy, &param) };
    assert_eq!(rc, 0, "sched_setscheduler: {}", std::io::Error::last_os_error());
}

pub fn latency(report: &mut Report) {
    let _pinned = Pinned::ahead();
    // one more, that stays small: the machine's pace changes while the other grows
    let small = ground();
    let small_daemon = Daemon::start(&small, &config(&small), &[]);
    fill(&small, 0..50);
    settle(&small_daemon);
    before_others(small_daemon.pid());
    let mut small_news = Listener::new();
    let ground = ground();
    let daemon = Daemon::start(&ground, &config(&ground), &[]);
    let mut floor = Floor::start(&ground, Kind::Set);
    let mut verdicts = Floor::start(&ground, Kind::VerdictMap);
    [daemon.pid(), floor.pid, verdicts.pid].into_iter().for_each(before_others);
    let (mut ours, mut least);
    let (samples, block) = (sized(150, 500), 25);
    let mut there = 0;
    for cgroups in [50, 2_000, 10_000] {
        let mut grown = ground.outside(Listener::new);
        for i in there..cgroups {
            fill(&ground, i..i + 1);
            fs::create_dir(floor.dir.join(i.to_string())).expect("mkdir");
            if i % 1000 == 0 {
                // the floor's inotify queue is as finite as any
                await_member(&ground.at(&format!("/ours/apps/{i}")), "mihomo");
            }
        }
        settle(&daemon);
        // The program goes first on their one processor, so that the floor may have thousands left by
        // then: their elements would be taken for those of samples, which would be gone when it looks.
        assert_eq!(grown.count_new(cgroups - there), cgroups - there, "the floor lags behind");
        there = cgroups;
        floor.fill(cgroups as u64);
        verdicts.fill(cgroups as u64);
        let (mut ours_us, mut least_us) = (Vec::new(), Vec::new());
        let (mut verdicts_us, mut small_us) = (Vec::new(), Vec::new());
        // what the growth above has sent
        (ours, least) = (Listener::new(), ground.outside(Listener::new));
        // this ratio is the closest to its target: with as many as at the others the row may not decide
        let samples = if cgroups == 2_000 { 2 * samples } else { samples };
        for number in 0..samples {
            go_on();
            ours_us.push(sample(&ground.at("/ours/apps"), number, &mut ours));
            if number % block == block - 1 {
                for _ in 0..block {
                    least_us.push(sample(&floor.dir, number, &mut least));
                    verdicts_us.push(sample(&verdicts.dir, number, &mut least));
                }
                for _ in 0..if cgroups == 10_000 { block } else { 0 } {
                    small_us.push(sample(&small.at("/ours/apps"), number, &mut small_news));
                }
            }
        }
        let figure = format!("latency p50, {cgroups} cgroups");
        let target = Target::RatioAtMost(1.5);
        report.beside(&figure, &ours_us, "us", ("floor", &least_us), target);
        let reference = ("floor with a verdict map", &verdicts_us);
        report.beside(&figure, &ours_us, "us", reference, Target::None);
        // What the slowest tenth waits for is the machine, for the floor as for us: of 407 such samples
        // that were traced, 226 had RCU's callbacks in a softirq on their processor, ahead of every
        // process, for some 120 us (of 3,747 others 56 had), 71 the tick, and 102 nothing that is told of.
        for (name, q) in [("p90", 0.9), ("p99", 0.99)] {
            let figure = format!("latency {name}, {cgroups} cgroups");
            let reference = ("floor", quantile(&least_us, q));
            report.beside(figure, quantile(&ours_us, q), "us", reference, Target::None);
        }
        if cgroups == 50 {
            no_op(report, &ground, &daemon, &floor);
        }
        if cgroups == 10_000 {
            let target = Target::RatioAtMost(1.25);
            report.beside(&figure, &ours_us, "us", ("at 50", &small_us), target);
        }
    }
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
    let reference = ("inotify read alone", &least);
    report.beside("no-op, CPU a mkdir+rmdir", &ours, "us", reference, Target::None);
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
    report.alone("burst of 10000, lost", lost as f64, "cgroups", Target::AtMost(0.0));
    let reference = ("mkdir loop", &loops);
    let figure = "burst, last element after last mkdir";
    report.beside(figure, &delays, "ms", reference, Target::RatioAtMost(0.3));
    report.beside("burst, first mkdir to last element", &totals, "ms", reference, Target::None);
    free_loops.iter_mut().for_each(|ms: &mut f64| *ms /= 1e3);
    let reference = ("mkdir loop, not watched", &free_loops);
    report.beside("burst, CPU", &cpus, "s", reference, Target::None);
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

/// The first cgroup of a target at its level, whose rule has to be made with it, beside the next one.
pub fn first_of_a_pair(report: &mut Report) {
    let _pinned = Pinned::ahead();
    let ground = ground();
    let config = format!("{}drop = /pairs/.+\n", config(&ground));
    ground.cgroup("/ours/pairs");
    let daemon = Daemon::start(&ground, &config, &[]);
    before_others(daemon.pid());
    fill(&ground, 0..50);
    let (mut first, mut next) = (Vec::new(), Vec::new());
    for number in 0..sized(30, 150) {
        go_on();
        // a new policy has no rules but those that it needs
        daemon.reload();
        settle(&daemon);
        thread::sleep(Duration::from_millis(50));
        let mut listener = Listener::new();
        for into in [&mut first, &mut next] {
            into.push(sample(&ground.at("/ours/pairs"), number, &mut listener));
            settle(&daemon);
            // so does the kernel: for what it frees of a transaction, the next one has to wait
            thread::sleep(Duration::from_millis(50));
        }
    }
    let reference = ("the next one", &next);
    let target = Target::RatioAtMost(1.2);
    report.beside("latency p50, the first of a pair", &first, "us", reference, target);
    assert!(daemon.stop().success());
}

pub fn churn(report: &mut Report) {
    let pairs = sized(5_000, 20_000);
    let ground = ground();
    let daemon = Daemon::start(&ground, &config(&ground), &[]);
    let dir = ground.at("/ours/apps");
    let keep = BTreeSet::from([cgroup_id(&dir.join("keep")).expect("an id")]);
    // microseconds for a pair, on the clock and of the program's processor time
    let churn = |together: usize| {
        settle(&daemon);
        let (before, start) = (cpu(&daemon), Instant::now());
        for i in 0..pairs {
            if i % together == 0 {
                go_on();
                settle(&daemon);
            }
            let path = dir.join(format!("c{i}"));
            fs::create_dir(&path).expect("mkdir");
            fs::remove_dir(&path).expect("rmdir");
        }
        let took = start.elapsed().as_secs_f64() * 1e6;
        await_exactly("cg_mihomo", &keep, Duration::from_secs(20));
        settle(&daemon);
        [took, (cpu(&daemon) - before) as f64 / 1e3].map(|us| us / pairs as f64)
    };
    let (watches, rss) = daemon.footprint();
    let [took, used] = churn(pairs);
    let reference = ("the pair itself", took);
    report.beside(format!("churn of {pairs}, CPU a pair"), used, "us", reference, Target::None);
    let (watches_after, rss_after) = daemon.footprint();
    let target = Target::RatioAtMost(1.0);
    let reference = ("before", watches as f64);
    report.beside("churn, watches after", watches_after as f64, "", reference, target);
    // code that was not called before, and pages that the allocator keeps for the next time
    let reference = ("before", rss as f64);
    report.beside("churn, RSS after", rss_after as f64, "KiB", reference, Target::None);
    // some at a time: how many wait, and need memory, depends on who else is busy, and a few pages
    // more or less one time says nothing: what leaks adds up
    let later = [(); 5].map(|()| {
        churn(200);
        daemon.footprint().1 as f64
    });
    let reference = ("after two", later[0].max(later[1]));
    let target = Target::RatioAtMost(1.02);
    let after = later[3..].iter().copied().fold(f64::MAX, f64::min);
    report.beside("churn, RSS after five", after, "KiB", reference, target);
    assert!(daemon.stop().success());
}
