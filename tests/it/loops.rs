//! A proxy's own traffic must not come back to it: three guards, each of which is enough, and what
//! is said where there is none.

use nix::sys::signal::Signal;

use crate::client::{udp_in, Client, Running, PATIENCE, SILENCE};
use crate::daemon::{run_with, Daemon};
use crate::ground::{addr, ip, Ground, HOST4, REMOTE4, REMOTE6};
use crate::kernel::await_member;
use crate::routes::bind_to_device;
use crate::world::{bind_at, World, SYN};
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

/// What is said of the proxy in `/proxy` that gets what it sends.
const SAID: &str =
    "loop: what [tproxy mihomo] sends comes back to it: its listener on port 7893 is in \
                    cgroup /proxy;";

#[track_caller]
fn await_start(daemon: &Daemon) {
    assert!(daemon.wait_log("started:", PATIENCE), "{}", daemon.logs());
    assert!(!daemon.logs().contains("loop:"), "{}", daemon.logs());
}

/// By its cgroup, its mark or its user a proxy's own traffic is left alone, whichever alone is configured;
/// of the last two nothing tells whether they are the proxy's.
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
        // by the proxy: each connection opened once on the wire
        let opened = world.wire.to_remote().iter().filter(|p| p.flags & SYN != 0).count();
        assert_eq!(opened, 2, "guarded by {guard} alone");
        let log = daemon.reload();
        let doubt = guard != "cgroup";
        assert_eq!(log.contains("loop:"), doubt, "{log}");
        assert_eq!(log.contains("unless it"), doubt, "{log}");
        assert!(daemon.stop().success());
    }
}

/// A policy for a cgroup root of its own, for what the other tests do beside it is told as well.
fn apart(ground: &Ground, policy: &str) -> String {
    let root = ground.cgroup("/own");
    format!("[global]\ncgroup-root = {}\n{policy}", root.display())
}

fn proxy_apart(ground: &Ground) -> Running {
    let proxy = Client::tcp(&ground.cgroup("/own/proxy"), addr(ip("::"), 7893));
    proxy.timeout(4 * PATIENCE).relay()
}

/// A loop that begins later is told of, though nobody asks and nothing is reloaded: once, and again to
/// whoever asks.
#[test]
fn a_loop_that_begins_later_is_told_once() {
    let ground = ground!("later");
    let config = apart(&ground, "default = mihomo\n[tproxy mihomo]\nport = 7893\n");
    let daemon = Daemon::start(&ground, &config, &[]);
    await_start(&daemon);

    let _proxy = proxy_apart(&ground);

    assert!(daemon.wait_log(SAID, PATIENCE), "{}", daemon.logs());
    let before = daemon.logs().len();
    daemon.signal(Signal::SIGUSR1);
    let again = || daemon.logs()[before..].contains(SAID);
    assert!(wait_until(PATIENCE, again), "{}", daemon.logs());
    assert_eq!(daemon.logs().matches(SAID).count(), 2);
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
    let policy = "default = direct\n[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = /proxy\n";
    let config = apart(&ground, policy);
    ground.cgroups(["/own/proxy", "/own/other"]);
    let daemon = Daemon::start(&ground, &config, &[]);
    await_start(&daemon);

    let _proxy = proxy_apart(&ground);
    // what goes directly, as its parent does
    ground.cgroup("/own/other/new");

    assert!(daemon.wait_log(SAID, 3 * PATIENCE), "{}", daemon.logs());
    assert_eq!(daemon.logs().matches(SAID).count(), 1);
    assert!(daemon.stop().success());
}

/// A loop is told by the daemon to whoever asks, and by `status` without it; and it is true.
#[test]
fn a_loop_is_told() {
    let (ground, mut world) = scene!("loop");
    let config = "[global]\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n";
    let daemon = Daemon::start(&ground, config, &[]);
    await_start(&daemon);
    world.wire.packets();

    let _proxy = proxy(&ground, |c| c);

    for _ in 0..2 {
        let before = daemon.logs().matches(SAID).count();
        daemon.signal(Signal::SIGUSR1);
        let told = wait_until(PATIENCE, || daemon.logs().matches(SAID).count() > before);
        assert!(told, "{}", daemon.logs());
    }
    for (args, said) in
        [(&["status"][..], SAID), (&["status", "--json"], "\"loops\":[\"loop: what")]
    {
        let text = run_with(&ground, config, args).out;
        assert!(text.contains(said), "{text}");
    }
    for who in ask(&ground) {
        assert!(!who.starts_with("remote"), "{who}");
    }
    assert_eq!(world.wire.to_remote(), []);
}

/// Two proxies each of which sends its traffic to the other are a loop; one that sends it to the other is
/// none.
#[test]
fn proxies_in_a_row() {
    let ground = ground!("loop-two");
    let _proxy = proxy(&ground, |c| c);
    let _other = Client::tcp(&ground.cgroup("/other"), addr(ip("0.0.0.0"), 7894)).relay();
    let chain =
        "[tproxy mihomo]\nport = 7893\n[tproxy other]\nport = 7894\n[rules]\nother = /proxy\n";
    let daemon = Daemon::start(&ground, chain, &[]);
    await_start(&daemon);

    daemon.reconfigure(&format!("{chain}mihomo = /other\n"));
    assert!(daemon.wait_log("[tproxy other] sends", PATIENCE), "{}", daemon.logs());
    let log = daemon.logs();
    assert!(log.contains("its listener on port 7894 is in cgroup /other;"), "{log}");

    let before = daemon.logs().len();
    daemon.reconfigure(chain);

    daemon.signal(Signal::SIGUSR1);
    let status = || daemon.logs()[before..].contains("status:");
    assert!(wait_until(PATIENCE, status));
    assert!(!daemon.logs()[before..].contains("loop:"), "{}", daemon.logs());
}

/// A cgroup with a socket that is bound to an interface, past where it is to go, so that what it sends
/// is dropped: told of in the same way.
#[test]
fn a_socket_that_goes_past_its_target_is_told_once() {
    let ground = ground!("past");
    let policy = "[tproxy mihomo]\nport = 7893\n[route vpn]\ninterface = vpn0\n\
                  [rules]\nmihomo = /proxied\nvpn = /vpn\n";
    let daemon = Daemon::start(&ground, &apart(&ground, policy), &[]);
    await_start(&daemon);

    let bound = |path| {
        let socket = udp_in(&ground.cgroup(path), REMOTE4);
        bind_to_device(&socket, "in0");
        socket
    };
    // what begins before its cgroup is known is ended
    let past = [("/own/proxied", "mihomo"), ("/own/vpn", "vpn")].map(|(path, target)| {
        let socket = bound(path);
        await_member(&ground.cgroup(path), target);
        socket
    });
    past.iter().for_each(|socket| socket.connect(addr(REMOTE4, 80)).expect("connect"));
    // what answers on a link
    let resolver = bound("/own/proxied/dnsmasq");
    bind_at(&resolver, addr(HOST4, 53));

    for (cgroup, target) in [("/proxied", "tproxy mihomo"), ("/vpn", "route vpn")] {
        let said = format!("sockets of cgroup {cgroup} are bound to in0, past [{target}]: what");
        assert!(daemon.wait_log(&said, PATIENCE), "{}", daemon.logs());
        assert_eq!(daemon.logs().matches(&said).count(), 1, "{}", daemon.logs());
    }
    assert!(!daemon.logs().contains("dnsmasq"), "{}", daemon.logs());
    assert!(daemon.stop().success());
}
