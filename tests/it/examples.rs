//! The ready-made configurations of conf/examples: each is taken by `check`, and does what it says.

use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::client::{
    answers, expect, expect_as, under, Answers, Client, Outcome, Proto, PATIENCE, SILENCE,
};
use crate::daemon::{run, run_with, write_private, Daemon};
use crate::gateway::{Lan, LAN4, LAN6};
use crate::ground::{addr, ip, ip_batch, remove_tree, sysctl, Ground, REMOTE4, REMOTE6, REMOTES};
use crate::kernel::SETTLE;
use crate::routes::tunnel_to;
use crate::wait_until;
use crate::world::{but_pings, Packet, Server, World, SYN};

fn dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/examples")
}

fn text(name: &str) -> String {
    let path = dir().join(format!("{name}.conf"));
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"))
}

/// What left for the remote hosts, but pings.
fn left(world: &mut World) -> Vec<Packet> {
    but_pings(world.wire.to_remote())
}

/// What an example promises, by itself: while the daemon runs, after it has stopped, after it was
/// killed, and after each next start.
fn through_life(ground: &Ground, text: &str, mut holds: impl FnMut(bool, &str)) {
    let mut holds = |governed: bool, when: &str| {
        println!("{when}");
        holds(governed, when);
    };
    let daemon = Daemon::start(ground, text, &[]);
    holds(true, "running");
    assert!(daemon.stop().success());
    holds(false, "stopped");
    let daemon = Daemon::start(ground, text, &[]);
    holds(true, "started again");
    daemon.kill9();
    // nothing is taken back where nobody could
    holds(true, "killed");
    let daemon = Daemon::start(ground, text, &[]);
    holds(true, "started after a kill");
    daemon.leave();
    holds(true, "in a restart");
    let _daemon = Daemon::start(ground, text, &[]);
    holds(true, "restarted");
}

/// Whether a daemon is there at that moment.
fn is_attended(when: &str) -> bool {
    !["stopped", "killed", "in a restart"].contains(&when)
}

/// Each file is taken as it is, and with what is commented out in it.
#[test]
fn every_example_passes_check() {
    let ground = ground!("excheck");
    let mut names: Vec<PathBuf> = fs::read_dir(dir())
        .expect("list the examples")
        .map(|entry| entry.expect("an example").path())
        .collect();
    names.push(dir().with_file_name("cgtproxy.conf"));
    assert!(names.len() > 5, "{names:?}");
    for name in names {
        let text = fs::read_to_string(&name).expect("read the example");
        // what may not be there
        let missing = |line: &str| ["user", "include", "-file"].iter().any(|w| line.contains(w));
        let in_full = |line: &str| match line.strip_prefix(';') {
            Some(line) if missing(line) => "#\n".to_owned(),
            meant => format!("{}\n", meant.unwrap_or(line)),
        };
        let all: String = text.lines().map(in_full).collect();

        let said = run_with(&ground, &text, &["check"]);
        assert!(said.code == Some(0) && !said.out.contains("error:"), "{name:?}: {}", said.out);
        let said = run_with(&ground, &all, &["check"]);
        assert_eq!(said.code, Some(0), "{name:?} in full: {}", said.out);
    }
}

/// Proxies as OpenWrt's packages run them are exempt by a rule, whatever the default.
#[test]
fn proxies_of_openwrt() {
    let ground = ground!("exopenwrt");
    let shipped = fs::read_to_string(dir().with_file_name("cgtproxy.conf")).expect("read it");
    let [nikki, sing_box, xray] =
        ["/services/nikki/nikki", "/services/sing-box/sing-box.main", "/services/xray/xray"];
    for (text, paths) in
        [(shipped, &[nikki, sing_box, xray][..]), (text("router-mihomo"), &[nikki])]
    {
        for path in paths {
            let said = run_with(&ground, &text, &["explain", path]).out;
            assert!(said.contains("target  direct\n    rule    /"), "{said}");
        }
    }
}

/// The LAN goes to mihomo with its DNS, the camera nowhere, and the router itself and mihomo directly.
#[test]
fn router_mihomo() {
    let (ground, mut world) = scene!("exrouter");
    let lan = Lan::new(&ground);
    let _proxy = Server::start("mihomo", &[7893]);
    let _dns = Server::start("dns", &[1053]);
    let _dnsmasq = Server::start("dnsmasq", &[53]);
    let p = "mihomo";
    through_life(&ground, &text("router-mihomo"), |governed, _| match governed {
        true => {
            lan.expect(0, [p, p, p, p, "remote", "remote"]);
            lan.dropped(1);
            lan.names_of("dns", 1053);
        }
        false => {
            [0, 1].into_iter().for_each(|i| lan.direct(i));
            lan.names_of("dnsmasq", 53);
        }
    });

    let _daemon = Daemon::start(&ground, &text("router-mihomo"), &[]);
    world.wire.packets();
    lan.expect(0, [p, p, p, p, "remote", "remote"]);
    for proto in [Proto::Udp, Proto::Tcp] {
        for (remote, own) in REMOTES.into_iter().zip([LAN4, LAN6]) {
            let asked = lan.ask(0, proto, addr(remote, 53));
            assert_eq!(asked, format!("dns {}", addr(ip(own), 1053)));
        }
    }
    // fake-ip
    let fake = addr(ip("198.18.3.4"), 443);
    assert_eq!(lan.ask(0, Proto::Tcp, fake), format!("mihomo {fake}"));
    assert_eq!(left(&mut world), []);

    // The camera has the address that the file names.
    lan.dropped(1);
    assert_eq!(world.wire.to_remote(), []);

    // The router itself, mihomo by its mark.
    expect(&[(&ground.cgroup("/services/mihomo"), under("direct"))]);
    let marked = Client::tcp(&ground.root, addr(REMOTE4, 80)).mark(0xff);
    assert_eq!(marked.run().who(), format!("remote {}", addr(REMOTE4, 80)));
}

impl Lan<'_> {
    /// The first client's queries to this router are answered by that server, at that port.
    #[track_caller]
    fn names_of(&self, server: &str, port: u16) {
        for (proto, own) in
            [(Proto::Udp, LAN4), (Proto::Udp, LAN6), (Proto::Tcp, LAN4), (Proto::Tcp, LAN6)]
        {
            let asked = self.ask(0, proto, addr(ip(own), 53));
            assert_eq!(asked, format!("{server} {}", addr(ip(own), port)), "{proto:?}");
        }
    }
}

/// An example with lines that are commented out in it.
fn with(example: &str, lines: &[&str]) -> String {
    lines.iter().fold(text(example), |text, line| {
        let all = text.lines().map(|own| match own.strip_prefix(';') {
            Some(meant) if meant.split_ascii_whitespace().eq(line.split(' ')) => {
                format!("{meant}\n")
            }
            _ => format!("{own}\n"),
        });
        let with: String = all.collect();
        assert_ne!(with, text, "no {line:?} in {example}");
        with
    })
}

/// What that router's file has in addition: for the router itself, with its names; for QUIC; for fake
/// addresses alone, or for all but a list. And it stays when it is stopped, where that is wanted.
#[test]
fn router_mihomo_with_what_is_commented_out() {
    let (ground, mut world) = scene!("exrouterall");
    let lan = Lan::new(&ground);
    let p = "mihomo";
    let _proxy = Server::start(p, &[7893]);
    let _dns = Server::start("dns", &[1053]);
    let _dnsmasq = Server::start("dnsmasq", &[53]);
    let [own, other, nikki, names] = ["transmission", "other", "nikki", "dnsmasq"]
        .map(|name| ground.cgroup(&format!("/services/{name}")));
    let own_too = with("router-mihomo", &["mihomo = service:transmission"]);
    through_life(&ground, &own_too, |governed, _| {
        world.wire.packets();
        expect(&[(&own, under(if governed { p } else { "direct" }))]);
        if governed {
            assert_eq!(left(&mut world), []);
        }
        expect(&[(&other, under("direct")), (&nikki, under("direct"))]);
        for (proto, asked) in [
            (Proto::Udp, "127.0.0.1"),
            (Proto::Udp, "::1"),
            (Proto::Tcp, "127.0.0.1"),
            (Proto::Tcp, "::1"),
        ] {
            let ask = |cgroup: &Path| Client::new(cgroup, proto, addr(ip(asked), 53)).run().who();
            let [dns, dnsmasq] = [("dns", 1053), ("dnsmasq", 53)]
                .map(|(who, port)| format!("{who} {}", addr(ip(asked), port)));
            assert_eq!(ask(&own), if governed { dns } else { dnsmasq.clone() }, "{proto:?}");
            assert_eq!(ask(&other), dnsmasq, "{proto:?}");
        }
    });

    // mihomo and dnsmasq in any case
    let all = own_too.replace("[global]\n", "[global]\ndefault = mihomo\n");
    let daemon = Daemon::start(&ground, &all, &[]);
    expect(&[(&other, under(p)), (&nikki, under("direct")), (&names, under("direct"))]);

    daemon.reconfigure(&with("router-mihomo", &["quic = reject"]));
    let quic = addr(REMOTE4, 443);
    assert_eq!(lan.ask(0, Proto::Udp, quic), "refused");
    assert_eq!(lan.ask(0, Proto::Tcp, quic), format!("{p} {quic}"));

    daemon.reconfigure(&with("router-mihomo", &["only = 198.18.0.0/15"]));
    lan.expect(0, ["remote"; 6]);
    let fake = addr(ip("198.18.3.4"), 80);
    assert_eq!(lan.ask(0, Proto::Udp, fake), format!("{p} {fake}"));

    listed(&ground);
    daemon.reconfigure(&with("router-mihomo", &["bypass-file = lists/direct.txt"]));
    lan.expect(0, ["remote", p, "remote", p, "remote", "remote"]);
    assert!(daemon.stop().success());

    stays(&ground, "router-mihomo", || lan.expect(0, [p, p, p, p, "remote", "remote"]));
}

/// The list that the examples name, with the remote host of one family.
fn listed(ground: &Ground) {
    fs::create_dir(ground.dir.join("lists")).expect("make a directory");
    write_private(&ground.dir.join("lists/direct.txt"), "203.0.113.0/24\n");
}

/// `on-exit = keep` is for those who want an example to hold when cgtproxy is stopped.
fn stays(ground: &Ground, example: &str, holds: impl Fn()) {
    let keep = text(example).replace("[global]\n", "[global]\non-exit = keep\n");
    let daemon = Daemon::start(ground, &keep, &[]);
    assert!(daemon.stop().success());
    holds();
    assert_eq!(run(&["flush"]).code, Some(0));
}

/// One browser and one slice go to the proxy, one application nowhere, the rest and the proxy directly.
#[test]
fn laptop_per_app() {
    let (ground, mut world) = scene!("exlaptop");
    let _proxy = Server::start("sing-box", &[7895]);
    let user = "/user.slice/user-1000.slice/user@1000.service";
    let [firefox, scope, zoom, shell, proxy] = [
        &format!("{user}/app.slice/app-org.mozilla.firefox-4711.scope"),
        &format!("{user}/proxied.slice/run-r1.scope"),
        &format!("{user}/app.slice/app-us.zoom.Zoom-12.scope"),
        &format!("{user}/app.slice/app-org.gnome.Terminal.slice/vte-1.scope"),
        "/system.slice/sing-box.service",
    ]
    .map(|path| ground.cgroup(path));
    through_life(&ground, &text("laptop-per-app"), |governed, when| {
        let of = |target| under(if governed { target } else { "direct" });
        expect(&[
            (&firefox, of("sing-box")),
            (&scope, of("sing-box")),
            (&zoom, of("drop")),
            (&shell, under("direct")),
            (&proxy, under("direct")),
        ]);
        let path = format!("{user}/app.slice/app-org.mozilla.firefox-1.scope");
        if when == "killed" {
            expect(&[(&ground.cgroup(&path), under("direct"))]);
        } else if when == "started after a kill" {
            expect(&[(&ground.at(&path), of("sing-box"))]);
        }
        // what bears sing-box's mark
        expect_as(|client| client.mark(0xff), &[(&firefox, under("direct"))]);
    });

    let _daemon = Daemon::start(&ground, &text("laptop-per-app"), &[]);
    world.wire.packets();
    expect(&[(&firefox, under("sing-box")), (&scope, under("sing-box")), (&zoom, under("drop"))]);
    assert_eq!(left(&mut world), []);
    expect(&[(&shell, under("direct")), (&proxy, under("direct"))]);
}

/// All goes to the proxy but for the proxy itself, by its cgroup or its mark, and the clock.
#[test]
fn everything_but() {
    let (ground, mut world) = scene!("exeverything");
    let [own, ntp, app] = ["/services/xray/instance1", "/system.slice/chrony.service", "/anything"]
        .map(|path| ground.cgroup(path));
    {
        let _proxy = Server::start("xray", &[12345]);
        through_life(&ground, &text("everything-but"), |governed, _| {
            let of = |target| under(if governed { target } else { "direct" });
            // a cgroup that nobody has classified is not named here either
            let new = ground.cgroup("/new");
            expect(&[
                (&app, of("xray")),
                (&new, of("xray")),
                (&ground.root, of("xray")),
                (&own, under("direct")),
                (&ntp, under("direct")),
            ]);
            remove_tree(&new);
            expect_as(|client| client.mark(0xff), &[(&app, under("direct"))]);
        });
    }

    // A real proxy: what goes by it reaches the world once.
    let any = addr(ip("::"), 12345);
    let _proxy = Client::tcp(&own, any).relay();
    let _daemon = Daemon::start(&ground, &text("everything-but"), &[]);
    for remote in [REMOTE4, REMOTE6] {
        for cgroup in [&app, &own, &ntp, &ground.root] {
            world.wire.packets();
            let to = addr(remote, 80);
            let who = Client::tcp(cgroup, to).run();
            assert_eq!(who.who(), format!("remote {to}"));
            let opened = left(&mut world).iter().filter(|p| p.flags & 0x02 != 0).count();
            assert_eq!(opened, 1, "{cgroup:?}");
        }
        // UDP is for the proxy too; this one takes none.
        let to = addr(remote, 443);
        assert_eq!(Client::udp(&app, to).timeout(SILENCE).run().who(), "nobody");
        assert_eq!(Client::udp(&ntp, to).run().who(), format!("remote {to}"));
    }
}

/// What else its header says: each guard is enough, a loop is told of where none holds, other tunnels are
/// left alone; and what is commented out in it.
#[test]
fn everything_but_with_what_is_commented_out() {
    let (ground, mut world) = scene!("exeverything2");
    let [app, vpn] = ["/app", "/system.slice/tailscaled.service"].map(|path| ground.cgroup(path));
    let any = addr(ip("::"), 12345);
    {
        let _proxy = Client::tcp(&app, any).relay();
        let daemon = Daemon::start(&ground, &text("everything-but"), &[]);
        daemon.signal(Signal::SIGUSR1);
        assert!(daemon.wait_log("loop: what [tproxy xray] sends", SETTLE), "{}", daemon.logs());
        assert!(daemon.stop().success());
    }
    let by_user = with("everything-but", &["bypass-user = xray"])
        .replace("= xray\n\n[tproxy", "= 2001\n\n[tproxy");
    for (uid, mark) in [(2001, 0), (0, 0xff)] {
        let _proxy = Client::tcp(&app, any).uid(uid).mark(mark).relay();
        let daemon = Daemon::start(&ground, &by_user, &[]);
        for remote in REMOTES {
            world.wire.packets();
            let to = addr(remote, 80);
            assert_eq!(Client::tcp(&app, to).run().who(), format!("remote {to}"), "{uid} {mark}");
            let opened = left(&mut world).iter().filter(|p| p.flags & SYN != 0).count();
            assert_eq!(opened, 1, "{uid} {mark}");
        }
        assert!(daemon.stop().success());
    }

    let x = "xray";
    let _proxy = Server::start(x, &[12345]);
    let daemon = Daemon::start(&ground, &with("everything-but", &["quic = reject"]), &[]);
    let quic = addr(REMOTE4, 443);
    let udp = Client::udp(&app, quic).timeout(SILENCE).run();
    assert!(!matches!(udp, Outcome::Answer(_)), "{udp:?}");
    assert_eq!(Client::tcp(&app, quic).run().who(), format!("{x} {quic}"));
    expect(&[(&vpn, under("direct"))]);

    listed(&ground);
    daemon.reconfigure(&with("everything-but", &["bypass-file = lists/direct.txt"]));
    expect(&[(&app, answers(["remote", x, "remote", x, "remote", "remote"]))]);
    assert!(daemon.stop().success());

    stays(&ground, "everything-but", || expect(&[(&app, under(x))]));
}

/// One user has Tor and its resolver and nothing else, in whatever cgroup; others know nothing of it.
#[test]
fn tor_user() {
    let (ground, mut world) = scene!("extor");
    let here = ["127.0.0.1", "::1"].map(|host| addr(ip(host), 9040));
    let _tor = Server::at("tor", &here);
    let _dns = Server::at("tor dns", &[addr(ip("127.0.0.1"), 9053)]);
    let _resolved = Server::start("resolved", &[53]);
    let user = ground.cgroup("/user.slice/user-1001.slice/session-2.scope");
    let other = ground.cgroup("/user.slice/user-1000.slice/session-1.scope");
    let his = |client: Client| client.uid(1001);
    let others = |client: Client| client.uid(1000);
    let tor = answers(["tor", "tor", "nobody", "nobody", "remote", "remote"]);
    through_life(&ground, &text("tor-user"), |_, _| {
        world.wire.packets();
        // a new one each time, which nobody has classified
        let job = ground.cgroup("/system.slice/job.service");
        expect_as(his, &[(&user, tor.clone()), (&job, tor.clone()), (&ground.root, tor.clone())]);
        let who = his(Client::udp(&job, addr(REMOTE4, 53))).run().who();
        assert_eq!(who, "tor dns 127.0.0.1:9053");
        assert_eq!(left(&mut world), []);
        expect_as(others, &[(&other, under("direct")), (&job, under("direct"))]);
        remove_tree(&job);
    });

    let _daemon = Daemon::start(&ground, &text("tor-user"), &[]);
    world.wire.packets();
    for remote in [REMOTE4, REMOTE6] {
        let to = addr(remote, 443);
        assert_eq!(his(Client::tcp(&user, to)).run().who(), format!("tor {to}"));
        assert_eq!(his(Client::udp(&user, to)).timeout(SILENCE).run().who(), "nobody");
    }
    for at in [REMOTE4, ip("127.0.0.53"), ip("192.0.2.1")] {
        let who = his(Client::udp(&user, addr(at, 53))).run().who();
        assert_eq!(who, "tor dns 127.0.0.1:9053", "{at}");
    }
    let over6 = his(Client::udp(&user, addr(REMOTE6, 53))).timeout(SILENCE);
    assert_eq!(over6.run().who(), "nobody");
    assert_eq!(left(&mut world), []);
    expect_as(others, &[(&other, under("direct"))]);
    // what root does there is not his
    expect(&[(&user, under("direct"))]);
    pings_can_be_taken(his(Client::ping(&user, REMOTE4)));
}

/// The sysctl that the examples name takes ping away.
fn pings_can_be_taken(ping: Client) {
    assert_eq!(ping.run().who(), format!("echo {REMOTE4}"));
    sysctl("net/ipv4/ping_group_range", "1 0");
    assert_eq!(ping.run(), Outcome::Failed(Errno::EACCES));
}

/// A service has the tunnel or nothing: whoever runs or not, also in a new cgroup of the old name.
#[test]
fn kill_switch() {
    let (ground, mut world) = scene!("exkill");
    let _dns = Server::start("dns", &[5300]);
    let service = ground.cgroup("/tunnel.slice/transmission-daemon.service");
    let other = ground.cgroup("/system.slice/other.service");
    // also once the service was restarted: in a new cgroup of the old name
    let mut closed = |when: &str| {
        world.wire.packets();
        for round in ["", ", the service restarted"] {
            for remote in [REMOTE4, REMOTE6] {
                let tcp = Client::tcp(&service, addr(remote, 80));
                assert_eq!(tcp.run(), Outcome::Refused, "{when}{round}");
                let udp = Client::udp(&service, addr(remote, 80)).timeout(SILENCE);
                assert_eq!(udp.run().who(), "nobody", "{when}{round}");
            }
            remove_tree(&service);
            fs::create_dir(&service).expect("make the cgroup again");
        }
        assert_eq!(left(&mut world), [], "{when}");
    };
    through_life(&ground, &text("kill-switch"), |_, when| closed(when));

    let _daemon = Daemon::start(&ground, &text("kill-switch"), &[]);
    {
        let _proxy = Server::start("tunnel", &[7896]);
        expect(&[(&service, under("tunnel")), (&other, under("direct"))]);
        let dns = Client::udp(&service, addr(ip("127.0.0.53"), 53)).run();
        assert_eq!(dns.who(), "dns 127.0.0.1:5300");
    }
    closed("when the proxy has gone");
    let _proxy = Server::start("tunnel", &[7896]);
    expect(&[(&service, under("tunnel"))]);
    pings_can_be_taken(Client::ping(&service, REMOTE4).uid(2001));
}

/// A cgroup of an example with `hold`, who answers it, and who its names.
type Held<'a> = (&'a str, Answers, &'a [(Proto, &'a str, &'a str)]);

/// What was started while somebody could look goes its way whoever is there; what is started while nobody
/// is has no way out until somebody is. `apart` is what has ways of its own; `direct` goes directly.
fn held_through_life(
    ground: &Ground,
    world: &mut World,
    text: &str,
    apart: &[Held],
    direct: &[&str],
) {
    let all = || apart.iter().map(|(path, ..)| *path).chain(direct.iter().copied());
    all().for_each(|path| drop(ground.cgroup(path)));
    let mut their_ways = || {
        world.wire.packets();
        for (path, answers, names) in apart {
            let cgroup = ground.at(path);
            expect(&[(&cgroup, answers.clone())]);
            for (proto, asked, want) in *names {
                let who = Client::new(&cgroup, *proto, addr(ip(asked), 53)).run().who();
                assert_eq!(who, *want, "{path} {proto:?} {asked}");
            }
        }
        // what went directly before may still say goodbye
        let mut begun = left(world);
        begun.retain(|p| p.proto == Proto::Udp || p.flags & SYN != 0);
        assert_eq!(begun, []);
        direct.iter().for_each(|path| expect(&[(&ground.at(path), under("direct"))]));
    };
    through_life(ground, text, |_, when| {
        // of the moment before, in which perhaps nobody was there
        their_ways();
        for cgroup in all().map(|path| ground.at(path)) {
            remove_tree(&cgroup);
            fs::create_dir(&cgroup).expect("make the cgroup again");
        }
        if !is_attended(when) {
            all().for_each(|path| expect(&[(&ground.at(path), under("drop"))]));
            return;
        }
        // a first SYN may come before the daemon, and goes again
        for (path, ..) in apart.iter().filter(|held| held.1[0] != "nobody") {
            Client::tcp(&ground.at(path), addr(REMOTE4, 80)).run();
        }
        for path in direct {
            Client::tcp(&ground.at(path), addr(REMOTE4, 80)).run();
        }
        their_ways();
    });
    assert_eq!(run(&["flush"]).code, Some(0));
}

/// As procd and OpenRC have their services: a rule covers one from birth where their directory is held, and
/// whatever is started there while cgtproxy is not there has no way out until it is. A drop rule takes every
/// protocol.
#[test]
fn kill_switch_holding_services() {
    let (ground, mut world) = scene!("exkillhold");
    let _dns = Server::start("dns", &[5300]);
    let _proxy = Server::start("tunnel", &[7896]);
    let names: Vec<_> = [Proto::Udp, Proto::Tcp]
        .into_iter()
        .flat_map(|proto| {
            [(proto, "127.0.0.53", "dns 127.0.0.1:5300"), (proto, "::1", "dns [::1]:5300")]
        })
        .collect();
    let procd = with("kill-switch", &["hold = /services"]);
    for (text, paths) in [
        (
            procd.clone(),
            ["/services/transmission/instance1", "/services/silent/one", "/services/other/one"],
        ),
        (
            procd.replace("= /services\n", "= /\n"),
            ["/openrc.transmission-daemon", "/openrc.silent", "/openrc.other"],
        ),
    ] {
        let text = format!("{text}drop = service:silent\n");
        let apart = [(paths[0], under("tunnel"), &names[..]), (paths[1], under("drop"), &[])];
        held_through_life(&ground, &mut world, &text, &apart, &[paths[2]]);
    }
}

/// Two applications have the tunnel and its resolver, and are refused where it is not there.
#[test]
fn vpn_per_app() {
    let (ground, mut world) = scene!("exvpn");
    let _resolved = Server::start("resolved", &[53]);
    let [app, sliced, service, other] = [
        "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.qbittorrent.qBittorrent-7.scope",
        "/user.slice/user-1000.slice/user@1000.service/vpn.slice/run-r1.scope",
        "/system.slice/transmission-daemon.service",
        "/system.slice/other.service",
    ]
    .map(|path| ground.cgroup(path));
    let refused = |world: &mut World, when: &str| {
        for cgroup in [&app, &service] {
            for remote in [REMOTE4, REMOTE6] {
                let tcp = Client::tcp(cgroup, addr(remote, 80)).run();
                assert_eq!(tcp, Outcome::Refused, "{when}");
                let udp = Client::udp(cgroup, addr(remote, 80)).timeout(SILENCE);
                assert_eq!(udp.run().who(), "nobody", "{when}");
            }
        }
        assert_eq!(world.wire.to_remote(), [], "{when}");
    };

    let daemon = Daemon::start(&ground, &text("vpn-per-app"), &[]);
    refused(&mut world, "before the tunnel is there");

    tunnel_to(&ground, "wg0");
    let up = || Client::tcp(&app, addr(REMOTE4, 80)).run() != Outcome::Refused;
    assert!(wait_until(PATIENCE, up));
    through_tunnel(&mut world, &[&app, &service, &sliced], "running");
    for (proto, at) in [Proto::Udp, Proto::Tcp]
        .into_iter()
        .flat_map(|proto| [REMOTE4, ip("127.0.0.53")].map(|at| (proto, at)))
    {
        let dns = Client::new(&app, proto, addr(at, 53)).run().who();
        assert_eq!(dns, "remote 10.8.0.1:53", "{proto:?} {at}");
    }
    assert_eq!(world.wire.to_remote(), []);
    expect(&[(&other, under("direct"))]);
    // the LAN, and WireGuard's own packets
    let nas = addr(ip("192.168.7.7"), 80);
    ground.outside(|| ip_batch(&[], "addr add 192.168.7.7/32 dev lo\n"));
    let by_lan = Client::tcp(&app, nas).run();
    let from = format!("remote {nas} from 192.0.2.1:");
    assert!(matches!(&by_lan, Outcome::Answer(text) if text.starts_with(&from)), "{by_lan:?}");
    expect_as(|client| client.mark(0xca6c), &[(&app, under("direct"))]);
    assert_ne!(world.wire.to_remote(), []);
    assert!(daemon.stop().success());

    through_life(&ground, &text("vpn-per-app"), |_, when| {
        let passes = || {
            let refused = |remote| Client::tcp(&app, addr(remote, 80)).run() == Outcome::Refused;
            !REMOTES.into_iter().any(refused)
        };
        assert!(wait_until(PATIENCE, passes), "{when}");
        world.wire.packets();
        through_tunnel(&mut world, &[&app, &service, &sliced], when);
        ip_batch(&[], "link set wg0 down\n");
        let down = || Client::tcp(&app, addr(REMOTE4, 80)).run() == Outcome::Refused;
        assert!(wait_until(PATIENCE, down), "{when}");
        refused(&mut world, when);
        expect(&[(&other, under("direct"))]);
        ip_batch(&[], "link set wg0 up\naddr replace fd00:8::2/64 dev wg0 nodad\n");
        assert!(!is_attended(when) || wait_until(PATIENCE, passes), "{when}");
        world.wire.packets();
    });
}

/// Asserts that these cgroups reach the remote hosts, and not by the wire.
#[track_caller]
fn through_tunnel(world: &mut World, cgroups: &[&PathBuf], when: &str) {
    for cgroup in cgroups {
        expect(&[(cgroup, under("direct"))]);
    }
    assert_eq!(world.wire.to_remote(), [], "{when}");
}

/// The browser goes by Tor, downloads by the tunnel, each with its resolver, from the first packet on.
#[test]
fn tor_and_vpn() {
    let (ground, mut world) = scene!("extorvpn");
    tunnel_to(&ground, "wg0");
    let here = ["127.0.0.1", "::1"].map(|host| addr(ip(host), 9040));
    let _tor = Server::at("tor", &here);
    let _dns = Server::at("tor dns", &[addr(ip("127.0.0.1"), 9053)]);
    let [browser, downloads, own] = [
        "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.mozilla.firefox-7.scope",
        "/system.slice/transmission-daemon.service",
        "/system.slice/tor.service",
    ]
    .map(|path| ground.cgroup(path));
    let daemon = Daemon::start(&ground, &text("tor-and-vpn"), &[]);
    world.wire.packets();
    through_tunnel(&mut world, &[&downloads], "downloads");
    for remote in [REMOTE4, REMOTE6] {
        let to = addr(remote, 80);
        assert_eq!(Client::tcp(&browser, to).run().who(), format!("tor {to}"));
        let udp = Client::udp(&browser, addr(remote, 443)).timeout(SILENCE).run();
        assert_eq!(udp.who(), "nobody");
    }
    for (cgroup, at, resolver) in [
        (&browser, REMOTE4, "tor dns 127.0.0.1:9053"),
        (&browser, ip("127.0.0.53"), "tor dns 127.0.0.1:9053"),
        (&downloads, REMOTE4, "remote 10.8.0.1:53"),
        (&downloads, ip("127.0.0.53"), "remote 10.8.0.1:53"),
    ] {
        assert_eq!(Client::udp(cgroup, addr(at, 53)).run().who(), resolver, "{at}");
    }
    assert_eq!(left(&mut world), []);
    expect(&[(&own, under("direct"))]);

    // from the first packet on, also while nobody is there who could look
    daemon.kill9();
    world.wire.packets();
    for path in [
        "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.mozilla.firefox-8.scope",
        "/system.slice/transmission.service",
    ] {
        let new = ground.cgroup(path);
        for client in [Client::tcp(&new, addr(REMOTE4, 80)), Client::udp(&new, addr(REMOTE6, 80))] {
            assert_eq!(client.timeout(SILENCE).run().who(), "nobody", "{path}");
        }
    }
    assert_eq!(left(&mut world), []);
}

/// So it stays when cgtproxy is stopped, killed or restarted; what is started in between has no way out until
/// it is there again.
#[test]
fn tor_and_vpn_through_its_life() {
    let (ground, mut world) = scene!("extorvpnlife");
    tunnel_to(&ground, "wg0");
    let here = ["127.0.0.1", "::1"].map(|host| addr(ip(host), 9040));
    let _tor = Server::at("tor", &here);
    let _dns = Server::at("tor dns", &[addr(ip("127.0.0.1"), 9053)]);
    let tor = answers(["tor", "tor", "nobody", "nobody", "remote", "remote"]);
    let names = |who| [(Proto::Udp, "203.0.113.7", who), (Proto::Udp, "127.0.0.53", who)];
    let apart = [
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.mozilla.firefox-7.scope",
            tor,
            &names("tor dns 127.0.0.1:9053")[..],
        ),
        (
            "/system.slice/transmission-daemon.service",
            under("direct"),
            &names("remote 10.8.0.1:53")[..],
        ),
    ];
    let direct = ["/system.slice/tor.service", "/user.slice/user-1000.slice/session-1.scope"];
    held_through_life(&ground, &mut world, &text("tor-and-vpn"), &apart, &direct);
}

/// Tor by the VPN, by the line that is commented out.
#[test]
fn tor_over_vpn() {
    let (ground, mut world) = scene!("extorover");
    tunnel_to(&ground, "wg0");
    let own = ground.cgroup("/system.slice/tor.service");
    let over =
        with("tor-and-vpn", &["vpn = service:tor"]).replace("direct         = service:tor\n", "");
    let _daemon = Daemon::start(&ground, &over, &[]);
    world.wire.packets();
    through_tunnel(&mut world, &[&own], "Tor over VPN");
    // WireGuard's own packets
    expect_as(|client| client.mark(0xca6c), &[(&own, under("direct"))]);
    assert_ne!(left(&mut world), []);
}

/// Guests of that router go directly.
#[test]
fn router_mihomo_guests() {
    let (ground, _world) = scene!("exguest");
    let lan = Lan::on(&ground, "br-guest");
    let _proxy = Server::start("mihomo", &[7893]);
    let _daemon = Daemon::start(&ground, &text("router-mihomo"), &[]);
    (0..2).for_each(|client| lan.direct(client));
}
