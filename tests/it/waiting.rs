//! `run --wait`: a start that fails is tried again, and told once, as a supervisor with a small log
//! needs it.

use nix::sys::signal::Signal;

use crate::client::{expect, under};
use crate::daemon::Daemon;
use crate::ground::Ground;
use crate::kernel::SETTLE;
use crate::world::{Server, World};

const CONFIG: &str = "[rules]\ndrop = /drop\n";
const WRONG: &str = "[rules]\ndrp = /drop\n";

/// A start that fails is tried again at each SIGHUP, told of where it fails in another way, and taken once
/// it can be; what was in force before stays so meanwhile.
#[test]
fn a_start_that_fails_is_tried_again() {
    let (ground, _world) = scene!("wait");
    let _any = Server::start("any", &[1]);
    let cgroup = ground.cgroup("/drop");
    Daemon::start(&ground, CONFIG, &[]).leave();

    let mut daemon = Daemon::spawn(&ground, WRONG, &["--wait"], &[]);
    let told = |daemon: &Daemon| daemon.logs().matches("undefined target").count();
    assert!(daemon.wait_log("unable to start yet", SETTLE), "{}", daemon.logs());
    // what the last one left is in force meanwhile
    expect(&[(&cgroup, under("drop"))]);
    // tries that fail as the first did
    for _ in 0..5 {
        daemon.signal(Signal::SIGHUP);
    }
    assert!(daemon.ended().is_none());

    daemon.configure("[rules]\ndirct = /drop\n");
    daemon.signal(Signal::SIGHUP);
    assert!(daemon.wait_log("\"dirct\"", SETTLE), "{}", daemon.logs());
    assert_eq!(told(&daemon), 2, "{}", daemon.logs());

    daemon.configure("[rules]\ndirect = /drop\n");
    daemon.signal(Signal::SIGHUP);
    assert!(daemon.ready(), "{}", daemon.logs());
    expect(&[(&cgroup, under("direct"))]);
    assert!(daemon.stop().success());
}

/// A signal ends it while it waits; without the option it does not wait at all.
#[test]
fn it_ends_while_it_waits() {
    let ground = ground!("waitend");
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR2] {
        let mut daemon = Daemon::spawn(&ground, WRONG, &["-w"], &[]);
        assert!(daemon.wait_log("unable to start yet", SETTLE), "{}", daemon.logs());

        daemon.signal(signal);

        assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.logs());
    }
    let mut daemon = Daemon::spawn(&ground, WRONG, &[], &[]);
    assert_eq!(daemon.wait().code(), Some(2));
}
