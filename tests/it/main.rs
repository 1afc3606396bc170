//! Integration tests: the built program on a real kernel, with real traffic.
//!
//! Each test owns a [`ground::Ground`]: a network namespace, a mount namespace, a second network
//! namespace as the outside world, and a cgroup sub-tree. Nothing outlives the test, so tests run
//! side by side and in any order. They need root; without it they print SKIP (and fail where
//! `CI=true`).
//!
//! | module | holds |
//! |---|---|
//! | `ground` | namespaces, veth pair, cgroup sub-tree |
//! | `world` | servers that say who answered, and the wire seen from outside |
//! | `client` | processes that live in a cgroup from birth and talk to the world |
//! | `daemon` | cgtproxy itself, as a child process |
//! | `kernel` | what nf_tables, rules and routes hold, read without the program's own code |
//! | `reference` | the fixtures against a hand-written table: proves the ground, not the program |
//! | `real` | real proxies and real neighbours, for `make real-test` (tests/real) |
//! | `traffic`, `classify`, `lifecycle` and so on | the tests |
//!
//! Environment: `CGTPROXY_BIN` names the program under test, `CGTPROXY_LONG=1` runs the loops that
//! are cut short by default at their full length.

/// The ground of a test, which ends here where this user cannot make one.
macro_rules! ground {
    ($name:expr) => {
        match Ground::new($name) {
            Some(ground) => ground,
            None => return,
        }
    };
}

/// The same with the usual world around it, and with the proxy that most configurations name.
macro_rules! scene {
    ($name:expr) => {{
        let ground = ground!($name);
        let world = World::new(&ground);
        (ground, world)
    }};
    ($name:expr, proxy) => {{
        let ground = ground!($name);
        let (world, proxy) = World::with_proxy(&ground);
        (ground, world, proxy)
    }};
}

mod client;
mod daemon;
mod flood;
mod ground;
mod kernel;
mod world;

mod apps;
mod classify;
mod containers;
mod demo;
mod destinations;
mod dying;
mod examples;
mod faults;
mod flight;
mod forgotten;
mod gateway;
mod heal;
mod hold;
mod hostile;
mod json;
mod lifecycle;
mod limits;
mod logging;
mod loops;
mod moving;
mod others;
mod privileges;
#[path = "../real/mod.rs"]
mod real;
mod redirect;
mod reference;
mod restart;
mod routes;
mod soak;
mod stale;
mod tools;
mod traffic;
mod tunnels;
mod users;
mod waiting;
mod watch;
mod ways;

use std::time::{Duration, Instant};

/// Polls `cond` until it holds. For conditions that nothing announces. The time is counted in moments
/// that this process has lived through, so that one in which the whole machine stands still, or in
/// which others keep it from its processors, is no more than a moment.
fn wait_until(timeout: Duration, mut cond: impl FnMut() -> bool) -> bool {
    const MOMENT: Duration = Duration::from_millis(250);
    let mut left = timeout;
    let mut pause = Duration::from_micros(200);
    while !left.is_zero() {
        let start = Instant::now();
        if cond() {
            return true;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
        left = left.saturating_sub(start.elapsed().min(MOMENT));
    }
    cond()
}

/// `full` where `CGTPROXY_LONG=1`, else `quick`.
fn sized(quick: usize, full: usize) -> usize {
    if std::env::var("CGTPROXY_LONG").is_ok_and(|v| v == "1") {
        full
    } else {
        quick
    }
}
