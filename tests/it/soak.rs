//! Everything at once, for as long as is asked for: cgroups come and go, others destroy, the policy
//! changes, limits are reached, and traffic flows all the while. In the end everything is back
//! where it was at the start, and not one packet has gone where the policy does not send it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{Client, Outcome, PATIENCE};
use crate::daemon::Daemon;
use crate::ground::{addr, remove_tree, sysctl, Ground, REMOTES};
use crate::kernel::{state, table, State};
use crate::wait_until;
use crate::world::{Server, World, PROXY};

/// Two policies that agree on the cgroups that the traffic comes from.
const POLICIES: [&str; 2] = [
    r"
[tproxy mihomo]
port = 7893
[rules]
drop   = /drop(/.*)?
mihomo = /proxied(/.*)?
mihomo = /churn/\d*5
drop   = /churn/.*
",
    r"
[global]
rule-priority = 90
[tproxy other]
port = 7894
[tproxy mihomo]
port = 7893
mark = 0x01000000
[rules]
other  = /churn/.*
mihomo = /proxied(/.*)?
drop   = /drop(/.*)?
",
];

/// What must be the same at the end as at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Footprint {
    descriptors: usize,
    watches: usize,
    conntrack: usize,
    elements: usize,
}

fn footprint(daemon: &Daemon) -> Footprint {
    let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    let count = count.expect("read the number of connections");
    Footprint {
        descriptors: daemon.descriptors(),
        watches: daemon.footprint().0,
        conntrack: count.trim().parse().expect("a number"),
        elements: state().1.values().map(|ids| ids.len()).sum(),
    }
}

/// What others do to this host, or try to.
const HARMS: [&str; 8] = [
    "nft flush ruleset",
    "ip rule del pref 100; ip rule del pref 90",
    "ip -6 rule del pref 100; ip -6 rule del pref 90",
    "ip route flush table 300",
    "ip -6 route flush table 300",
    "nft add table ip other; nft delete table ip other",
    "ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default",
    "ip link set lo down; ip link set lo up",
];

fn try_to(script: &str) {
    let out = Command::new("sh").args(["-c", script]).output();
    out.expect("start sh");
}

/// Connections end as soon as they may, so that they can be counted.
fn short_lived_connections() {
    let names = "icmp_timeout icmpv6_timeout udp_timeout udp_timeout_stream tcp_timeout_time_wait \
                 tcp_timeout_close tcp_timeout_fin_wait tcp_timeout_last_ack tcp_timeout_close_wait \
                 tcp_timeout_syn_sent tcp_timeout_syn_recv tcp_timeout_established";
    for name in names.split(' ') {
        let seconds = if name.ends_with("established") { "10" } else { "2" };
        sysctl(&format!("net/netfilter/nf_conntrack_{name}"), seconds);
    }
}

/// The daemon, and what happens to it.
struct Soak<'a> {
    daemon: &'a Daemon,
    churn: PathBuf,
    over: AtomicBool,
    counts: Counts,
}

/// How often each thing was done.
#[derive(Debug, Default)]
struct Counts {
    cgroups: AtomicUsize,
    destructions: AtomicUsize,
    reloads: AtomicUsize,
    limits: AtomicUsize,
    requests: AtomicUsize,
    answered: AtomicUsize,
}

fn count(n: &AtomicUsize) -> usize {
    n.fetch_add(1, Ordering::Relaxed)
}

impl Soak<'_> {
    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    /// So many cgroups come and go as will be there at a time: what once was used stays with the allocator.
    fn warm_up(&self, ground: &Ground) {
        let watched = |n: usize| {
            let there = wait_until(PATIENCE, || self.daemon.footprint().0 == n);
            assert!(there, "{} watches, not {n}", self.daemon.footprint().0);
        };
        for i in 0..500 {
            fs::create_dir_all(self.churn.join(i.to_string()).join("a/b")).expect("make cgroups");
        }
        watched(5 + 1500);
        remove_tree(&self.churn);
        watched(4);
        ground.cgroup("/churn");
        watched(5);
    }

    /// Cgroups come and go; now and then so many at once that events are lost.
    fn come_and_go(&self) {
        for i in (0..).take_while(|_| self.goes_on()) {
            let path = |i: usize| self.churn.join(i.to_string());
            let _ = fs::create_dir_all(path(i).join("a/b"));
            if let Some(old) = i.checked_sub(100) {
                for dir in ["a/b", "a", ""] {
                    let _ = fs::remove_dir(path(old).join(dir));
                }
            }
            if count(&self.counts.cgroups) % 10_000 == 9_999 {
                self.daemon.while_stopped(|| {
                    for j in 0..9_000 {
                        let dir = self.churn.join(format!("burst{j}"));
                        let _ = fs::create_dir(&dir);
                        let _ = fs::remove_dir(&dir);
                    }
                });
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Others destroy what they can.
    fn destroy(&self) {
        for harm in HARMS.iter().cycle().take_while(|_| self.goes_on()) {
            try_to(harm);
            count(&self.counts.destructions);
            thread::sleep(Duration::from_millis(700));
        }
    }

    /// The policy changes, and now and then the new one is wrong.
    fn reload(&self) {
        for i in (1..).take_while(|_| self.goes_on()) {
            let text = match i % 5 {
                4 => "[rules]\nnowhere = /x\n",
                _ => POLICIES[i % 2],
            };
            self.daemon.configure(text);
            self.daemon.signal(Signal::SIGHUP);
            count(&self.counts.reloads);
            thread::sleep(Duration::from_millis(330));
        }
    }

    /// Descriptors run out for a while.
    fn run_out(&self) {
        let limit =
            |n: usize| try_to(&format!("prlimit --pid {} --nofile={n}:4096", self.daemon.pid()));
        while self.goes_on() {
            thread::sleep(Duration::from_secs(2));
            // of new descriptors; 0 to 2 are taken
            limit(3);
            thread::sleep(Duration::from_millis(500));
            limit(1024);
            count(&self.counts.limits);
        }
    }

    /// Asks the remote hosts from a dropped cgroup and a proxied one. Whoever has no answer may have met a
    /// moment in which his packets were dropped; nobody may have one from the remote host.
    fn ask(&self, [dropped, proxied]: &[PathBuf; 2], wrong: &mut Vec<String>) {
        for to in REMOTES.map(|ip| addr(ip, 80)) {
            let clients = [
                Client::udp(dropped, to),
                Client::tcp(dropped, to),
                Client::udp(proxied, to),
                Client::tcp(proxied, to),
            ];
            let asked = clients.map(|client| client.timeout(Duration::from_millis(200)).spawn());
            for (i, client) in asked.into_iter().enumerate() {
                count(&self.counts.requests);
                let outcome = client.wait().0;
                if !matches!(outcome, Outcome::Answer(_)) {
                    continue;
                }
                count(&self.counts.answered);
                if i < 2 || outcome.who() != format!("{PROXY} {to}") {
                    wrong.push(format!("{i} to {to}: {outcome:?}"));
                }
            }
        }
    }
}

/// Ends what happens, also where this thread panics.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Puts the policy and the cgroups back, and waits until all is as it was at the start; with the memory.
#[track_caller]
fn settle(soak: &Soak, ground: &Ground, start: &Footprint, whole: &State) -> (Footprint, usize) {
    let daemon = soak.daemon;
    daemon.configure(POLICIES[0]);
    remove_tree(&soak.churn);
    ground.cgroup("/churn");
    assert!(
        wait_until(PATIENCE, || daemon.footprint().0 == start.watches),
        "{:?}",
        footprint(daemon)
    );
    // a rule stays for a minute or two after its last cgroup, but not over a reload; the wrong configuration
    // may have been the last
    let (Ok(log) | Err(log)) = daemon.hup();
    println!("{} lines of log; the last:\n{log}", daemon.logs().lines().count());
    let mut end = footprint(daemon);
    let back = wait_until(Duration::from_secs(90), || {
        end = footprint(daemon);
        end == *start && state() == *whole && !table().contains("jhash")
    });
    assert!(back, "{end:?}, not {start:?}\n{:#?}\nnot {whole:#?}", state());
    (end, daemon.footprint().1)
}

/// Whatever happens for that time, no packet goes where it is not to go, and all is as it was afterwards.
fn soak(time: Duration) {
    let (ground, mut world) = scene!("soak");
    let _proxy = Server::start(PROXY, &[7893, 7894]);
    let daemon = Daemon::start(&ground, POLICIES[0], &["-v"]);
    short_lived_connections();
    let cgroups = ground.cgroups(["/drop", "/proxied"]);
    let (over, counts) = (AtomicBool::new(false), Counts::default());
    let soak = Soak { daemon: &daemon, churn: ground.cgroup("/churn"), over, counts };
    soak.warm_up(&ground);
    daemon.reload();
    let mut start = footprint(&daemon);
    let rests = wait_until(PATIENCE, || {
        start = footprint(&daemon);
        // nor is anything of the first round dying any more
        start.conntrack == 0 && !table().contains("jhash")
    });
    assert!(rests, "{start:?}");
    let (rss, whole) = (daemon.footprint().1, state());
    println!("at the start: {start:?}, {rss} KiB");

    let (busy, began) = (daemon.busy(), Instant::now());
    let (mut leaked, mut wrong, mut most) = (Vec::new(), Vec::new(), rss);
    thread::scope(|scope| {
        let _ends = Ends(&soak.over);
        for happens in [Soak::come_and_go, Soak::destroy, Soak::reload, Soak::run_out] {
            let soak = &soak;
            scope.spawn(move || happens(soak));
        }
        while began.elapsed() < time {
            soak.ask(&cgroups, &mut wrong);
            leaked.extend(world.wire.to_remote());
            most = most.max(daemon.footprint().1);
        }
    });
    println!("after {:?}: {:?}", began.elapsed(), soak.counts);
    println!("processor time {:?}", daemon.busy() - busy);

    let (end, rss_end) = settle(&soak, &ground, &start, &whole);
    println!("at the end: {end:?}, {rss_end} KiB, {most} KiB at most");
    assert!(leaked.is_empty(), "{} leaked: {:?}", leaked.len(), leaked[0]);
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(rss_end <= rss + 1024, "{rss_end} KiB, {rss} at the start");
    assert!(soak.counts.answered.into_inner() > 0);
    daemon.stop_clean();
}

/// For some seconds, in every run.
#[test]
fn briefly() {
    soak(Duration::from_secs(10));
}

/// `make soak MINUTES=n`
#[test]
#[ignore = "takes as long as CGTPROXY_MINUTES says"]
fn at_length() {
    let minutes = std::env::var("CGTPROXY_MINUTES").unwrap_or("60".into());
    let minutes: u64 = minutes.parse().expect("a number of minutes");
    soak(Duration::from_secs(60 * minutes));
}
