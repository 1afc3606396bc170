//! Everything at once, for as long as is asked for: cgroups come and go, others destroy, the policy
//! changes, limits are reached, and traffic flows all the while. In the end everything is back
//! where it was at the start, and not one packet has gone where the policy does not send it.

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{Client, Outcome, PATIENCE};
use crate::daemon::Daemon;
use crate::ground::{addr, remove_tree, sysctl, Ground, REMOTE4, REMOTE6};
use crate::kernel::{state, table};
use crate::wait_until;
use crate::world::{Packet, Server, World, PROXY};

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

fn sh(script: &str) {
    let out = Command::new("sh").args(["-c", script]).output();
    out.expect("start sh");
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

fn soak(time: Duration) {
    let (ground, mut world) = scene!("soak");
    let _proxy = Server::start(PROXY, &[7893, 7894]);
    // connections end as soon as they may, so that they can be counted
    let daemon = Daemon::start(&ground, POLICIES[0], &["-v"]);
    for (name, seconds) in [
        ("udp_timeout", "2"),
        ("udp_timeout_stream", "2"),
        ("tcp_timeout_time_wait", "2"),
        ("tcp_timeout_close", "2"),
        ("tcp_timeout_fin_wait", "2"),
        ("tcp_timeout_last_ack", "2"),
        ("tcp_timeout_close_wait", "2"),
        ("tcp_timeout_syn_sent", "2"),
        ("tcp_timeout_syn_recv", "2"),
        ("tcp_timeout_established", "10"),
        ("icmp_timeout", "2"),
        ("icmpv6_timeout", "2"),
    ] {
        sysctl(&format!("net/netfilter/nf_conntrack_{name}"), seconds);
    }
    let cgroups = ["/drop", "/proxied"].map(|path| ground.cgroup(path));
    let churn = ground.cgroup("/churn");
    // what once was used stays with the allocator: the first round is not the measure
    let warm_up = |from: usize| {
        for i in from..from + 500 {
            let _ = fs::create_dir_all(churn.join(i.to_string()).join("a/b"));
        }
        wait_until(PATIENCE, || daemon.footprint().0 == 5 + 1500);
        remove_tree(&churn);
        wait_until(PATIENCE, || daemon.footprint().0 == 4);
        ground.cgroup("/churn");
        wait_until(PATIENCE, || daemon.footprint().0 == 5);
    };
    warm_up(0);
    daemon.reload();
    let mut start = footprint(&daemon);
    wait_until(PATIENCE, || {
        start = footprint(&daemon);
        // nor is anything of the first round dying any more
        start.conntrack == 0 && !table().contains("jhash")
    });
    let (rss, whole) = (daemon.footprint().1, state());
    println!("at the start: {start:?}, {rss} KiB");

    let counts = Counts::default();
    let (on, busy, began) = (AtomicBool::new(true), daemon.busy(), Instant::now());
    let running = || on.load(Ordering::Relaxed);
    let mut leaked: Vec<Packet> = Vec::new();
    let mut wrong: Vec<String> = Vec::new();
    let mut most = rss;
    let count = |n: &AtomicUsize| n.fetch_add(1, Ordering::Relaxed);
    thread::scope(|scope| {
        // Cgroups come and go; now and then so many at once that events are lost.
        scope.spawn(|| {
            for i in 0.. {
                if !running() {
                    break;
                }
                let path = |i: usize| churn.join(i.to_string());
                let _ = fs::create_dir_all(path(i).join("a/b"));
                if let Some(old) = i.checked_sub(100) {
                    for dir in ["a/b", "a", ""] {
                        let _ = fs::remove_dir(path(old).join(dir));
                    }
                }
                if count(&counts.cgroups) % 10_000 == 9_999 {
                    daemon.signal(Signal::SIGSTOP);
                    for j in 0..9_000 {
                        let dir = churn.join(format!("burst{j}"));
                        let _ = fs::create_dir(&dir);
                        let _ = fs::remove_dir(&dir);
                    }
                    daemon.signal(Signal::SIGCONT);
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        // Others destroy what they can.
        scope.spawn(|| {
            let harms = [
                "nft flush ruleset",
                "ip rule del pref 100; ip rule del pref 90",
                "ip -6 rule del pref 100; ip -6 rule del pref 90",
                "ip route flush table 300",
                "ip -6 route flush table 300",
                "nft add table ip other; nft delete table ip other",
                "ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default",
                "ip link set lo down; ip link set lo up",
            ];
            for harm in harms.iter().cycle() {
                if !running() {
                    break;
                }
                sh(harm);
                count(&counts.destructions);
                thread::sleep(Duration::from_millis(700));
            }
        });
        // The policy changes, and now and then the new one is wrong.
        scope.spawn(|| {
            for i in 1.. {
                if !running() {
                    break;
                }
                let text = match i % 5 {
                    4 => "[rules]\nnowhere = /x\n",
                    _ => POLICIES[i % 2],
                };
                daemon.configure(text);
                daemon.signal(Signal::SIGHUP);
                count(&counts.reloads);
                thread::sleep(Duration::from_millis(330));
            }
        });
        // Descriptors run out for a while.
        scope.spawn(|| {
            let pid = daemon.pid();
            while running() {
                thread::sleep(Duration::from_secs(2));
                // of new descriptors; 0 to 2 are taken
                sh(&format!("prlimit --pid {pid} --nofile=3:4096"));
                thread::sleep(Duration::from_millis(500));
                sh(&format!("prlimit --pid {pid} --nofile=1024:4096"));
                count(&counts.limits);
            }
        });
        // Traffic, watched from outside. Whoever has no answer may have met a moment in which his
        // packets were dropped; nobody may have one from the remote host.
        let until = Instant::now() + time;
        while Instant::now() < until {
            for ip in [REMOTE4, REMOTE6] {
                let to = addr(ip, 80);
                let patience = Duration::from_millis(200);
                let clients = [
                    Client::udp(&cgroups[0], to).timeout(patience),
                    Client::tcp(&cgroups[0], to).timeout(patience),
                    Client::udp(&cgroups[1], to).timeout(patience),
                    Client::tcp(&cgroups[1], to).timeout(patience),
                ];
                let running: Vec<_> = clients.iter().map(|client| client.spawn()).collect();
                for (i, client) in running.into_iter().enumerate() {
                    count(&counts.requests);
                    let outcome = client.wait().0;
                    let answer = matches!(outcome, Outcome::Answer(_));
                    if answer && (i < 2 || outcome.who() != format!("{PROXY} {to}")) {
                        wrong.push(format!("{} to {to}: {outcome:?}", i));
                    }
                    if answer {
                        count(&counts.answered);
                    }
                }
            }
            leaked.extend(world.wire.to_remote());
            most = most.max(daemon.footprint().1);
        }
        on.store(false, Ordering::Relaxed);
    });
    println!("after {:?}: {counts:?}", began.elapsed());
    println!("processor time {:?}", daemon.busy() - busy);

    // back to where it began
    daemon.configure(POLICIES[0]);
    remove_tree(&churn);
    ground.cgroup("/churn");
    // a rule stays for a minute or two after its last cgroup, but not over a reload
    wait_until(PATIENCE, || daemon.footprint().0 == start.watches);
    let (Ok(reloaded) | Err(reloaded)) = daemon.hup();
    let mut end = footprint(&daemon);
    let back = wait_until(Duration::from_secs(90), || {
        end = footprint(&daemon);
        // the wrong configuration may have been the last
        end == start && state() == whole && !table().contains("jhash")
    });
    let rss_end = daemon.footprint().1;
    println!("at the end: {end:?}, {rss_end} KiB, {most} KiB at most");
    println!("{} packets leaked, {} wrong answers", leaked.len(), wrong.len());
    let log = daemon.logs();
    println!("{} lines of log; the last:\n{reloaded}", log.lines().count());
    assert!(leaked.is_empty(), "{} leaked: {:?}", leaked.len(), leaked[0]);
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(back, "{end:?}, not {start:?}\n{:#?}\nnot {whole:#?}", state());
    assert!(rss_end <= rss + 1024, "{rss_end} KiB, {rss} at the start");
    assert!(counts.answered.into_inner() > 0);
    daemon.stop_clean();
}

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
