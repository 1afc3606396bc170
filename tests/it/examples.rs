//! The ready-made configurations of conf/examples: each is taken by `check`, and does what it says.

use std::fs;
use std::path::{Path, PathBuf};

use crate::client::{answers, expect, expect_as, under, Client, Outcome, Proto, PATIENCE, SILENCE};
use crate::daemon::{run_with, Daemon};
use crate::gateway::{Lan, LAN4};
use crate::ground::{addr, ip, remove_tree, Ground, REMOTE4, REMOTE6};
use crate::routes::tunnel_to;
use crate::world::{but_pings, Packet, Server, World};

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
fn through_life(ground: &Ground, example: &str, mut holds: impl FnMut(bool, &str)) {
    let mut holds = |governed: bool, when: &str| {
        println!("{when}");
        holds(governed, when);
    };
    let daemon = Daemon::start(ground, &text(example), &[]);
    holds(true, "running");
    assert!(daemon.stop().success());
    holds(false, "stopped");
    let daemon = Daemon::start(ground, &text(example), &[]);
    holds(true, "started again");
    daemon.kill9();
    // nothing is taken back where nobody could
    holds(true, "killed");
    let daemon = Daemon::start(ground, &text(example), &[]);
    holds(true, "started after a kill");
    daemon.leave();
    holds(true, "in a restart");
    let _daemon = Daemon::start(ground, &text(example), &[]);
    holds(true, "restarted");
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
    through_life(&ground, "router-mihomo", |governed, _| match governed {
        true => {
            lan.expect(0, [p, p, p, p, "remote", "remote"]);
            lan.dropped(1);
        }
        false => [0, 1].into_iter().for_each(|i| lan.direct(i)),
    });

    let _daemon = Daemon::start(&ground, &text("router-mihomo"), &[]);
    world.wire.packets();
    lan.expect(0, [p, p, p, p, "remote", "remote"]);
    for proto in [Proto::Udp, Proto::Tcp] {
        for at in [addr(ip(LAN4), 53), addr(REMOTE4, 53)] {
            assert_eq!(lan.ask(0, proto, at), format!("dns {LAN4}:1053"));
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
    through_life(&ground, "laptop-per-app", |governed, when| {
        let of = |target| under(if governed { target } else { "direct" });
        expect(&[
            (&firefox, of("sing-box")),
            (&scope, of("sing-box")),
            (&zoom, of("drop")),
            (&shell, under("direct")),
            (&proxy, under("direct")),
        ]);
        if when == "killed" {
            let path = format!("{user}/app.slice/app-org.mozilla.firefox-1.scope");
            let new = ground.cgroup(&path);
            expect(&[(&new, under("direct"))]);
            remove_tree(&new);
        }
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
        through_life(&ground, "everything-but", |governed, _| {
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
    through_life(&ground, "tor-user", |_, _| {
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
    through_life(&ground, "kill-switch", |_, when| closed(when));

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
}

/// Two applications have the tunnel and its resolver, and are refused where it is not there.
#[test]
fn vpn_per_app() {
    let (ground, mut world) = scene!("exvpn");
    let _resolved = Server::start("resolved", &[53]);
    let [app, service, other] = [
        "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.qbittorrent.qBittorrent-7.scope",
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
    assert!(crate::wait_until(PATIENCE, up));
    through_tunnel(&mut world, &[&app, &service], "running");
    for at in [REMOTE4, ip("127.0.0.53")] {
        let dns = Client::udp(&app, addr(at, 53)).run().who();
        assert_eq!(dns, "remote 10.8.0.1:53", "{at}");
    }
    assert_eq!(world.wire.to_remote(), []);
    expect(&[(&other, under("direct"))]);

    world.wire.packets();
    assert!(daemon.stop().success());
    through_tunnel(&mut world, &[&app, &service], "stopped");
    let daemon = Daemon::start(&ground, &text("vpn-per-app"), &[]);
    daemon.kill9();
    through_tunnel(&mut world, &[&app, &service], "killed");
    crate::ground::ip_batch(&[], "link del wg0\n");
    refused(&mut world, "killed, and the tunnel has gone");
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

/// Guests of that router go directly.
#[test]
fn router_mihomo_guests() {
    let (ground, _world) = scene!("exguest");
    let lan = Lan::on(&ground, "br-guest");
    let _proxy = Server::start("mihomo", &[7893]);
    let _daemon = Daemon::start(&ground, &text("router-mihomo"), &[]);
    (0..2).for_each(|client| lan.direct(client));
}
