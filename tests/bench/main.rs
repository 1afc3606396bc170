//! `make bench`: what the program costs, beside a floor and beside other ways of doing it.
//!
//! Needs root, and makes namespaces of its own. Every figure stands beside a reference that was
//! measured in the same run, by turns with it, so the ratios hold on a busy machine too.
//!
//! | module | figures |
//! |---|---|
//! | `latency` | classification and no-op latency, burst, churn |
//! | `start` | start, reload, memory, binary, rules |
//! | `sockets` | who talks |
//! | `answers` | how soon what happens is answered: repairs, routes that come back, reloads |
//! | `traffic` | cost of a packet, of a connection, proxied throughput |
//! | `ways` | what packets are measured under: this program, another build of it, and other ways |
//! | `senders` | processes that send, and how long that takes |
//! | `floor` | the least that a classifier can do, and the listener that sees its effect |
//! | `report` | the table, and results.json |
//!
//! Environment: `CGTPROXY_BIN` names the program under test, `BESIDE` another build of it that the
//! groups `packet` and `forwarded` measure by turns with it, `QUICK=1` takes fewer samples, and
//! arguments that are not options pick figures by the name of their group.

// What the integration tests stand on; not all of it is used here.
#[allow(dead_code)]
#[path = "../it/client.rs"]
mod client;
#[allow(dead_code)]
#[path = "../it/daemon.rs"]
mod daemon;
#[allow(dead_code)]
#[path = "../it/ground.rs"]
mod ground;
#[allow(dead_code)]
#[path = "../it/kernel.rs"]
mod kernel;
#[allow(dead_code, unused_imports)]
#[path = "../it/reference.rs"]
mod reference;
#[allow(dead_code)]
#[path = "../it/world.rs"]
mod world;

mod answers;
mod floor;
mod latency;
mod report;
mod senders;
mod sockets;
mod start;
mod traffic;
mod ways;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use report::Report;

/// Polls `cond` until it holds. For conditions that nothing announces.
fn wait_until(timeout: Duration, mut cond: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !cond() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    true
}

/// `full`, or `quick` where QUICK=1.
fn sized(quick: usize, full: usize) -> usize {
    match quick_run() {
        true => quick,
        false => full,
    }
}

fn quick_run() -> bool {
    std::env::var("QUICK").is_ok_and(|v| v == "1")
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Ends the run, cleaning up, where the user has asked for it.
fn go_on() {
    assert!(!INTERRUPTED.load(Ordering::Relaxed), "interrupted");
}

extern "C" fn interrupt(_: i32) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("bench: needs root for namespaces and cgroups");
        std::process::exit(1);
    }
    let handler: extern "C" fn(i32) = interrupt;
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler stores one atomic, which is async-signal-safe.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
    let picked: Vec<String> = (std::env::args().skip(1)).filter(|a| !a.starts_with('-')).collect();
    type Group = (&'static str, fn(&mut Report));
    let groups: &[Group] = &[
        ("binary", start::binary),
        ("rules", start::rules),
        ("start", start::start),
        ("reload", start::reload),
        ("lists", start::lists),
        ("latency", latency::latency),
        ("first", latency::first_of_a_pair),
        ("burst", latency::burst),
        ("churn", latency::churn),
        ("apps", sockets::apps),
        ("heal", answers::heal),
        ("dear", answers::dear),
        ("swept", answers::swept),
        ("moved", answers::moved),
        ("back", answers::back),
        ("stalled", answers::stalled),
        ("packet", traffic::packet_cost),
        ("counters", traffic::counters),
        ("forwarded", traffic::forwarded),
        ("streams", traffic::streams),
        ("user", traffic::user_line),
        ("destinations", traffic::destinations),
        ("route", traffic::route),
        ("nested", traffic::nested_levels),
        ("hold", traffic::hold),
        ("throughput", traffic::throughput),
    ];
    let mut report = Report::new();
    for (name, measure) in groups {
        if picked.is_empty() || picked.iter().any(|p| p == name) {
            let began = Instant::now();
            measure(&mut report);
            eprintln!("bench: {name} took {:.1} s", began.elapsed().as_secs_f64());
        }
    }
    print!("{}", report.table());
    if picked.is_empty() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/bench/results.json");
        std::fs::write(path, report.json()).expect("write results.json");
    }
}
