//! A proxy's own traffic must not come back to it: three guards, each of which is enough, and what
//! is said where there is none.

use nix::sys::signal::Signal;

use crate::client::{Client, Running, PATIENCE, SILENCE};
use crate::daemon::{run_with, Daemon};
use crate::ground::{addr, ip, Ground, REMOTE4, REMOTE6};
use crate::world::World;
use crate::{sized, wait_until};

const USER: u32 = 4711;

/// A real proxy in the cgroup `/proxy`, for both families, as `change` makes it.
fn proxy(ground: &Ground, change: impl Fn(Client) -> Client) -> Running {
    let any = addr(ip("::"), 7893);
    change(Client::tcp(&ground.cgroup("/proxy"), any)).relay()
}

/// Who answers a client that nothing in the rules speaks of, over IPv4 and IPv6.
fn ask(ground: &Ground) -> [String; 2] {
    let cgroup = ground.cgroup("/anybody");
    [REMOTE4, REMOTE6].map(|ip| {
        let client = Client::tcp(&cgroup, addr(ip, 80));
        client.timeout(8 * SILENCE).run().who()
    })
}

#[test]
fn each_guard_alone_is_enough() {
    let (ground, mut world) = scene!("guards");
    type Change = fn(Client) -> Client;
    let guards: [(&str, &str, &str, Change); 3] = [
        ("cgroup", "", "direct = /proxy", |c| c),
        ("mark", "bypass-mark = 0xff", "", |c| c.mark(0xff)),
        ("user", "bypass-user = 4711", "", |c| c.uid(USER)),
    ];
    for (guard, global, rules, change) in guards {
        let config = format!(
            "[global]\ndefault = mihomo\n{global}\n[tproxy mihomo]\nport = 7893\n[rules]\n{rules}\n"
        );
        let _proxy = proxy(&ground, change);
        let daemon = Daemon::start(&ground, &config, &[]);
        world.wire.packets();
        let want = [REMOTE4, REMOTE6].map(|ip| format!("remote {}", addr(ip, 80)));
        assert_eq!(ask(&ground), want, "guarded by {guard} alone");
        // By the proxy: each connection opened once on the wire.
        let opened = world.wire.to_remote();
        let opened = opened.iter().filter(|p| p.flags & 0x02 != 0).count();
        assert_eq!(opened, 2, "guarded by {guard} alone");
        let log = daemon.reload();
        let doubt = guard != "cgroup";
        assert_eq!(log.contains("loop:"), doubt, "{log}");
        assert_eq!(log.contains("unless it"), doubt, "{log}");
        assert!(daemon.stop().success());
    }
}

/// Nobody asks, and nothing is reloaded.
#[test]
fn a_loop_that_begins_later_is_told_once() {
    let ground = ground!("later");
    // what the other tests do beside the cgroup root is told as well
    let root = ground.at("/own");
    ground.cgroup("/own");
    let config = format!(
        "[global]\ndefault = mihomo\ncgroup-root = {}\n[tproxy mihomo]\nport = 7893\n",
        root.display()
    );
    let daemon = Daemon::start(&ground, &config, &[]);
    // what is told at the start has been
    assert!(daemon.wait_log("started:", PATIENCE), "{}", daemon.logs());
    assert!(!daemon.logs().contains("loop:"), "{}", daemon.logs());
    let any = addr(ip("::"), 7893);
    let proxy = Client::tcp(&ground.cgroup("/own/proxy"), any);
    let _proxy = proxy.timeout(4 * PATIENCE).relay();
    let said = "loop: what [tproxy mihomo] sends comes back to it: its listener on port 7893 is \
                in cgroup /proxy;";
    assert!(daemon.wait_log(said, PATIENCE), "{}", daemon.logs());
    // asked for it is told again
    let before = daemon.logs().len();
    daemon.signal(Signal::SIGUSR1);
    let again = || daemon.logs()[before..].contains(said);
    assert!(wait_until(PATIENCE, again), "{}", daemon.logs());
    assert_eq!(daemon.logs().matches(said).count(), 2);
    assert!(daemon.stop().success());
}

/// The same in a cgroup that is older than the daemon: something else has to wake it. The pause
/// between two looks makes it a test of the long form.
#[test]
fn a_loop_in_a_cgroup_that_was_there_is_told() {
    if sized(0, 1) == 0 {
        return;
    }
    let ground = ground!("older");
    let root = ground.at("/own");
    let [own, _] = ["/own/proxy", "/own/other"].map(|path| ground.cgroup(path));
    let config = format!(
        "[global]\ndefault = direct\ncgroup-root = {}\n[tproxy mihomo]\nport = 7893\n[rules]\n\
         mihomo = /proxy\n",
        root.display()
    );
    let daemon = Daemon::start(&ground, &config, &[]);
    assert!(daemon.wait_log("started:", PATIENCE), "{}", daemon.logs());
    let any = addr(ip("::"), 7893);
    let _proxy = Client::tcp(&own, any).timeout(4 * PATIENCE).relay();
    // what goes directly, as its parent does
    ground.cgroup("/own/other/new");
    let said = "loop: what [tproxy mihomo] sends comes back to it: its listener on port 7893 is \
                in cgroup /proxy;";
    assert!(daemon.wait_log(said, 3 * PATIENCE), "{}", daemon.logs());
    assert_eq!(daemon.logs().matches(said).count(), 1);
    assert!(daemon.stop().success());
}

#[test]
fn a_loop_is_told() {
    let (ground, mut world) = scene!("loop");
    let config = "[global]\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n";
    let said = "loop: what [tproxy mihomo] sends comes back to it: its listener on port 7893 is \
                in cgroup /proxy;";
    // Before the proxy is there, nothing is known.
    let daemon = Daemon::start(&ground, config, &[]);
    assert!(!daemon.logs().contains("loop:"), "{}", daemon.logs());
    let _proxy = proxy(&ground, |c| c);
    for _ in 0..2 {
        let before = daemon.logs().matches(said).count();
        daemon.signal(Signal::SIGUSR1);
        let told = wait_until(PATIENCE, || daemon.logs().matches(said).count() > before);
        assert!(told, "{}", daemon.logs());
    }
    // Without the daemon's help, too.
    let text = run_with(&ground, config, &["status"]).out;
    assert!(text.contains(said), "{text}");
    let text = run_with(&ground, config, &["status", "--json"]).out;
    assert!(text.contains("\"loops\":[\"loop: what"), "{text}");
    // And it is true.
    world.wire.packets();
    for who in ask(&ground) {
        assert!(!who.starts_with("remote"), "{who}");
    }
    assert_eq!(world.wire.to_remote(), []);
    // Two proxies, each of which sends its traffic to the other.
    let other = ground.cgroup("/other");
    let any = addr(ip("0.0.0.0"), 7894);
    let _other = Client::tcp(&other, any).relay();
    daemon.configure(
        "[tproxy mihomo]\nport = 7893\n[tproxy other]\nport = 7894\n[rules]\n\
         other = /proxy\nmihomo = /other\n",
    );
    let mut log = daemon.reload();
    assert!(wait_until(PATIENCE, || {
        log = daemon.logs();
        log.contains("[tproxy other] sends")
    }));
    assert!(log.contains("its listener on port 7894 is in cgroup /other;"), "{log}");
    // One is a chain of the other: fine.
    let before = daemon.logs().len();
    daemon.reconfigure(
        "[tproxy mihomo]\nport = 7893\n[tproxy other]\nport = 7894\n[rules]\nother = /proxy\n",
    );
    daemon.signal(Signal::SIGUSR1);
    let status = || daemon.logs()[before..].contains("status:");
    assert!(wait_until(PATIENCE, status));
    assert!(!daemon.logs()[before..].contains("loop:"), "{}", daemon.logs());
}
