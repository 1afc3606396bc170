//! Flows that conntrack has forgotten, or knows the wrong way round, or never sees: what their
//! sockets' cgroups say holds all the same. The proxy itself is in `/direct`.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::client::{again, expect, socket_in, tcp_in, under, Client, Outcome, Proto, PATIENCE};
use crate::daemon::{run_with, Daemon, POLICY};
use crate::gateway::Lan;
use crate::ground::{
    addr, any_of, ip, remove_tree, sysctl, Ground, HOST4, HOST6, REMOTE4, REMOTE6,
};
use crate::kernel::{counters, forget_flows, load};
use crate::wait_until;
use crate::world::{
    bind_at, bind_fd, recv_datagram, set, Packet, Server, World, PROXY, STREAM_PORT,
};

const PORT: u16 = 80;

/// Of either family: the remote host, a neighbour of it that nobody asked, and this host.
fn places() -> [(SocketAddr, SocketAddr, IpAddr); 2] {
    [
        (addr(REMOTE4, PORT), addr(ip("203.0.113.8"), PORT), HOST4),
        (addr(REMOTE6, PORT), addr(ip("2001:db8:2::8"), PORT), HOST6),
    ]
}

/// A UDP socket of a cgroup, bound to `at`.
fn udp_of(cgroup: &Path, at: SocketAddr) -> UdpSocket {
    let fd = socket_in(cgroup, libc::SOCK_DGRAM, at.ip());
    set(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
    bind_at(&fd, at);
    patient(UdpSocket::from(fd))
}

fn patient(socket: UdpSocket) -> UdpSocket {
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    socket
}

/// A proxy's socket that sends as, and takes packets for, `at`.
fn spoof(cgroup: &Path, at: SocketAddr) -> UdpSocket {
    let fd = socket_in(cgroup, libc::SOCK_DGRAM, at.ip());
    bind_fd(&fd, at);
    patient(UdpSocket::from(fd))
}

/// Who a datagram of `socket` to `to` reaches: the proxy's listener or the socket that speaks for
/// the remote host; `remote` where the wire has it, else `nobody`.
fn reaches(
    socket: &UdpSocket,
    to: SocketAddr,
    proxies: &[&UdpSocket],
    world: &mut World,
) -> String {
    world.wire.packets();
    // a reload ends sockets whose way has changed, as which this one is told so once
    let sent = match socket.send_to(b"x", to) {
        Err(e) if e.kind() == ErrorKind::ConnectionAborted => socket.send_to(b"x", to),
        sent => sent,
    };
    let denied = match sent {
        Err(e) if e.kind() == ErrorKind::PermissionDenied => true,
        sent => sent.expect("send") != 1,
    };
    // both ways are short, and neither has a queue behind the sender
    let left = world.wire.packets();
    if left.iter().any(|p| p.proto == Proto::Udp && p.dst == to) {
        return "remote".into();
    }
    if denied {
        return "nobody".into();
    }
    let got = |s: &&UdpSocket| recv_datagram(s).is_some();
    // in moments that this thread has lived through, however busy the machine is
    let comes = (0..30).any(|_| {
        let is = proxies.iter().any(got);
        if !is {
            std::thread::sleep(Duration::from_millis(10));
        }
        is
    });
    if comes { "proxy" } else { "nobody" }.into()
}

/// What there is to make conntrack forget.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Flushed,
    Expired,
    /// It never knew: the proxy answers as somebody else.
    Never,
}

fn lose(loss: Loss) {
    match loss {
        Loss::Never => {}
        Loss::Flushed => forget_flows(),
        // a flow that is over its time is no more, though its entry is collected some time later
        Loss::Expired => std::thread::sleep(Duration::from_millis(1100)),
    }
}

fn short_lived_flows() {
    for name in ["udp_timeout", "udp_timeout_stream"] {
        sysctl(&format!("net/netfilter/nf_conntrack_{name}"), "1");
    }
}

/// The proxy speaks first, to conntrack; the application's next datagrams are still the proxy's.
#[test]
fn the_proxy_speaks_first() {
    let (ground, mut world) = scene!("forgot");
    let cgroups = ["/proxied", "/drop", "/direct", "/other"];
    let [proxied, dropped, direct, other] = cgroups.map(|path| ground.cgroup(path));
    let any = |family: IpAddr| match family {
        IpAddr::V4(_) => addr(Ipv4Addr::UNSPECIFIED.into(), 7893),
        IpAddr::V6(_) => addr(ip("::"), 7893),
    };
    short_lived_flows();
    for (default, of_default) in [("direct", "remote"), ("mihomo", "proxy"), ("drop", "nobody")] {
        let config = format!("[global]\ndefault = {default}\n{POLICY}");
        let daemon = Daemon::start(&ground, &config, &[]);
        for (remote, neighbour, host) in places() {
            let proxy = spoof(&direct, any(host));
            for loss in [Loss::Flushed, Loss::Expired, Loss::Never] {
                for (cgroup, want) in [
                    (&proxied, "proxy"),
                    (&dropped, "nobody"),
                    (&direct, "remote"),
                    (&other, of_default),
                ] {
                    // one is enough for what takes its time
                    if matches!(loss, Loss::Expired) && cgroup != &proxied {
                        continue;
                    }
                    let app = udp_of(cgroup, addr(host, 0));
                    let at = app.local_addr().expect("an address");
                    let to = if matches!(loss, Loss::Never) { neighbour } else { remote };
                    let speaker = spoof(&direct, to);
                    let what = format!("default {default}, {to} from {cgroup:?}, {loss:?}");
                    if !matches!(loss, Loss::Never) {
                        let who = reaches(&app, to, &[&proxy], &mut world);
                        assert_eq!(who, want, "{what}");
                    }
                    lose(loss);
                    for _ in 0..3 {
                        assert_eq!(speaker.send_to(b"y", at).expect("send"), 1);
                        assert_eq!(
                            again(|| app.recv_from(&mut [0; 8])).expect(&what).1,
                            to,
                            "{what}"
                        );
                        let who = reaches(&app, to, &[&proxy, &speaker], &mut world);
                        assert_eq!(who, want, "{what}");
                    }
                }
            }
        }
        assert!(daemon.stop().success());
    }
}

/// Forgets flows without end until `f` returns.
fn while_flows_are_forgotten<T>(f: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                forget_flows();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        done.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// No ACK and no reset of a proxied connection gets out, with and without its socket.
#[test]
fn connections_go_on_while_their_flows_are_forgotten() {
    let (ground, mut world) = scene!("forgottcp");
    let _proxy = Server::stream(PROXY, &[7893, 7894]);
    let cgroup = ground.cgroup("/proxied");
    for (default, more) in
        [("direct", ""), ("mihomo", ""), ("drop", ""), ("direct", "[tproxy other]\nport = 7894\n")]
    {
        let config = format!("[global]\ndefault = {default}\n{more}{POLICY}");
        let daemon = Daemon::start(&ground, &config, &[]);
        world.wire.packets();
        while_flows_are_forgotten(|| {
            for ip in [REMOTE4, REMOTE6] {
                let client = Client::tcp(&cgroup, addr(ip, STREAM_PORT)).close_early(60);
                assert_eq!(client.run(), Outcome::Answer(String::new()), "{default}");
            }
            // data on its way meets the closed sockets; that no more comes is announced by nothing
            std::thread::sleep(Duration::from_millis(200));
        });
        assert_eq!(world.wire.to_remote(), [], "default {default} {more}");
        assert!(daemon.stop().success());
    }
}

/// The same for a client of this router; the proxy's packets leave by the client's interface.
#[test]
fn flows_of_clients_are_forgotten() {
    let (ground, mut world) = scene!("forgotgw");
    let lan = Lan::new(&ground);
    let direct = ground.cgroup("/direct");
    short_lived_flows();
    let gateway = "[gateway lan]\ninterface = br-lan\ntarget = mihomo\n";
    let two = "[tproxy other]\nport = 7894\n";
    for (default, more, bridged) in [
        ("direct", "", false),
        ("direct", "", true),
        ("direct", two, true),
        ("mihomo", "", false),
        ("drop", "", false),
    ] {
        crate::gateway::bridge_netfilter(bridged);
        let config = format!("[global]\ndefault = {default}\n{more}{POLICY}{gateway}");
        let daemon = Daemon::start(&ground, &config, &[]);
        let hosts = [ip("198.51.100.10"), ip("2001:db8:3::10")];
        for ((remote, neighbour, host), client) in places().into_iter().zip(hosts) {
            let proxy = spoof(&direct, addr(any_of(host), 7893));
            for loss in [Loss::Flushed, Loss::Expired, Loss::Never] {
                let app = || UdpSocket::bind(addr(client, 0)).expect("bind");
                let app = patient(lan.client(0).run(app));
                let at = app.local_addr().expect("an address");
                let to = if matches!(loss, Loss::Never) { neighbour } else { remote };
                let speaker = spoof(&direct, to);
                let what = format!("default {default} {more} {bridged}, {to}, {loss:?}");
                if !matches!(loss, Loss::Never) {
                    assert_eq!(reaches(&app, to, &[&proxy], &mut world), "proxy", "{what}");
                }
                lose(loss);
                for _ in 0..3 {
                    assert_eq!(speaker.send_to(b"y", at).expect("send"), 1);
                    assert_eq!(again(|| app.recv_from(&mut [0; 8])).expect(&what).1, to, "{what}");
                    let who = reaches(&app, to, &[&proxy, &speaker], &mut world);
                    assert_eq!(who, "proxy", "{what}");
                }
            }
        }
        assert!(daemon.stop().success());
    }
    // TCP, with the proxy in a cgroup that is direct (here by default).
    let _proxy = Server::stream(PROXY, &[7893]);
    let _daemon = Daemon::start(&ground, &format!("{POLICY}{gateway}"), &[]);
    world.wire.packets();
    while_flows_are_forgotten(|| {
        for ip in [REMOTE4, REMOTE6] {
            let client = Client::tcp(&ground.root, addr(ip, STREAM_PORT)).close_early(60);
            let outcome = lan.client(0).run(|| client.run());
            assert_eq!(outcome, Outcome::Answer(String::new()));
        }
        std::thread::sleep(Duration::from_millis(200));
    });
    assert_eq!(world.wire.to_remote(), []);
}

/// Others keep packets from conntrack (`notrack`): what is proxied or dropped stays so. Nothing tells
/// whose the bare ACKs and resets are that the kernel sends for a socket that is gone.
#[test]
fn untracked_packets_are_classified() {
    let (ground, mut world, _proxy) = scene!("notrack", proxy);
    let cgroups = ["/proxied", "/drop", "/direct"].map(|path| ground.cgroup(path));
    for hooks in [&["output"][..], &["prerouting"], &["output", "prerouting"]] {
        let chain = |hook: &&str| {
            format!(
                "chain {hook} {{ type filter hook {hook} priority raw; policy accept;\n\
                 meta l4proto {{ tcp, udp }} notrack\n}}\n"
            )
        };
        let chains: String = hooks.iter().map(chain).collect();
        load(&format!("table inet others {{\n{chains}}}\n"));
        for default in ["direct", "mihomo", "drop"] {
            println!("{hooks:?} default {default}");
            let config = format!("[global]\ndefault = {default}\n{POLICY}");
            let daemon = Daemon::start(&ground, &config, &[]);
            let [proxied, dropped, direct] = cgroups.each_ref().map(|path| path.as_path());
            world.wire.packets();
            expect(&[(proxied, under(PROXY)), (dropped, under("drop"))]);
            let mut left = world.wire.to_remote();
            const ACK: u8 = 0x10;
            const RST: u8 = 0x04;
            let of_none = |p: &Packet| [ACK, RST, RST | ACK].contains(&p.flags);
            left.retain(|p| p.proto != Proto::Icmp && !of_none(p));
            assert_eq!(left, [], "{hooks:?} default {default}");
            expect(&[(direct, under("direct"))]);
            assert!(daemon.stop().success());
        }
        load("delete table inet others\n");
    }
}

/// Others restore the ct mark into packets: that of a flow that the proxy began is no target's.
#[test]
fn marks_of_forgotten_flows_are_restored_by_others() {
    let (ground, mut world) = scene!("forgotmark");
    let lan = Lan::new(&ground);
    let [proxied, direct] = ["/proxied", "/direct"].map(|path| ground.cgroup(path));
    let gateway = "[gateway lan]\ninterface = br-lan\ntarget = mihomo\n";
    for (more, proxies) in [("", 1), ("[tproxy other]\nport = 7894\n", 2)] {
        let _daemon = Daemon::start(&ground, &format!("{more}{POLICY}{gateway}"), &[]);
        for (hook, kind, priority) in [
            ("prerouting", "filter", -160),
            ("prerouting", "filter", -140),
            ("output", "route", -160),
            ("output", "route", -140),
            ("output", "filter", 0),
        ] {
            load(&format!(
                "table inet who {{\nchain who {{ type {kind} hook {hook} priority {priority};\n\
                 meta mark set ct mark\n}}\n}}\n"
            ));
            for (remote, _, host) in places() {
                let what = format!("{hook} {kind} {priority}, {remote}, {proxies}");
                let proxy = spoof(&direct, addr(any_of(host), 7893));
                let speaker = spoof(&direct, remote);
                let client = if host.is_ipv4() { "198.51.100.10" } else { "2001:db8:3::10" };
                let client = || UdpSocket::bind(addr(ip(client), 0)).expect("bind");
                let client = patient(lan.client(0).run(client));
                for app in [&udp_of(&proxied, addr(host, 0)), &client] {
                    let at = app.local_addr().expect("an address");
                    forget_flows();
                    for _ in 0..3 {
                        assert_eq!(speaker.send_to(b"y", at).expect("send"), 1);
                        assert_eq!(
                            again(|| app.recv_from(&mut [0; 8])).expect(&what).1,
                            remote,
                            "{what}"
                        );
                        let who = reaches(app, remote, &[&proxy, &speaker], &mut world);
                        // routed anew by that mark, the packet is not to leave; else it finds its way
                        let strays = at.ip() == host && (kind, priority) == ("route", -140);
                        let want = if strays { "nobody" } else { "proxy" };
                        assert_eq!(who, want, "{what} of {at}");
                    }
                }
            }
            load("delete table inet who\n");
        }
    }
}

/// A process that may not do more than others cannot pass for a proxy: IPv6 lets everybody send
/// from a foreign address.
#[test]
fn a_foreign_source_is_no_way_out() {
    let (ground, mut world) = scene!("freebind");
    let lan = Lan::new(&ground);
    const IPV6_FREEBIND: libc::c_int = 78;
    let gateway = "[gateway lan]\ninterface = br-lan\ntarget = mihomo\n";
    let _daemon = Daemon::start(&ground, &format!("{POLICY}{gateway}"), &[]);
    for path in ["/drop", "/proxied"] {
        let fd = socket_in(&ground.cgroup(path), libc::SOCK_DGRAM, REMOTE6);
        crate::kernel::await_member(&ground.at(path), &path[1..].replace("proxied", "mihomo"));
        set(&fd, libc::SOL_IPV6, IPV6_FREEBIND, 1);
        bind_at(&fd, addr(ip("2001:db8:3::77"), 0));
        let socket = UdpSocket::from(fd);
        for _ in 0..3 {
            let who = reaches(&socket, addr(REMOTE6, PORT), &[], &mut world);
            assert_eq!(who, "nobody", "{path}");
        }
    }
    drop(lan);
}

/// Nor can it speak first in the name of who it wants to speak to, so that what it sends then would be
/// answers: there is a proxy or not.
#[test]
fn nobody_answers_himself() {
    let (ground, mut world) = scene!("answers-himself");
    const IPV6_FREEBIND: libc::c_int = 78;
    ground.cgroup("/held");
    for (policy, path) in [
        ("[rules]\ndrop = /x\n", "/x"),
        ("[rules]\ndrop = user:0\n", "/x"),
        ("[global]\ndefault = drop\n", "/x"),
        ("[route vpn]\ninterface = vpn0\n[rules]\nvpn = /x\n", "/x"),
        ("[route vpn]\ninterface = vpn0\nmasquerade = no\n[rules]\nvpn = /x\n", "/x"),
        ("[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = /x\n", "/x"),
        ("[global]\nhold = /held\n", "/held/new"),
    ] {
        ground.cgroup("/x");
        forget_flows();
        let daemon = Daemon::start(&ground, policy, &[]);
        daemon.signal(Signal::SIGSTOP);
        let cgroup = ground.cgroup(path);
        for port in [5001, 5002] {
            let speaker = socket_in(&cgroup, libc::SOCK_DGRAM, REMOTE6);
            set(&speaker, libc::SOL_IPV6, IPV6_FREEBIND, 1);
            bind_at(&speaker, addr(REMOTE6, PORT));
            let own = UdpSocket::from(socket_in(&cgroup, libc::SOCK_DGRAM, REMOTE6));
            bind_at(&own, addr(HOST6, port));
            let own = patient(own);
            let spoken = UdpSocket::from(speaker).send_to(b"first", addr(HOST6, port));
            assert!(spoken.is_ok() && own.recv_from(&mut [0; 9]).is_ok());
            for _ in 0..3 {
                let _ = own.send_to(b"then", addr(REMOTE6, PORT));
            }
            assert_eq!(world.wire.to_remote(), [], "{policy}");
        }
        daemon.signal(Signal::SIGCONT);
        daemon.stop_clean();
        remove_tree(&ground.at("/held/new"));
    }
}

/// The same port to the same host, by a process of another cgroup: its cgroup decides.
#[test]
fn a_port_that_is_used_again() {
    let (ground, mut world) = scene!("reuse");
    let cgroups = ["/proxied", "/drop", "/direct", "/other"].map(|path| ground.cgroup(path));
    let proxies = [("0.0.0.0", 7893), ("::", 7893)];
    let proxies = proxies.map(|(any, port)| spoof(&cgroups[2], addr(ip(any), port)));
    for (default, of_default) in [("direct", "remote"), ("mihomo", "proxy"), ("drop", "nobody")] {
        let config = format!("[global]\ndefault = {default}\n{POLICY}");
        let daemon = Daemon::start(&ground, &config, &[]);
        for ((remote, _, host), proxy) in places().into_iter().zip(&proxies) {
            forget_flows();
            let mut at = addr(host, 0);
            let each = ["proxy", "nobody", "remote", of_default];
            let each: Vec<_> = cgroups.iter().zip(each).collect();
            // every one behind every other
            for (first, second) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
                for (cgroup, want) in [each[first], each[second]] {
                    let app = udp_of(cgroup, at);
                    at = app.local_addr().expect("an address");
                    for _ in 0..2 {
                        let who = reaches(&app, remote, &[proxy], &mut world);
                        assert_eq!(who, want, "default {default} {remote} from {cgroup:?}");
                    }
                }
            }
        }
        assert!(daemon.stop().success());
    }
}

/// A query by a port from which somebody else asked before, and got no answer: that flow cannot be
/// translated any more, and is not let out for it.
#[test]
fn a_query_from_a_port_that_is_used_again() {
    let (ground, mut world) = scene!("reusedns");
    let [proxied, direct] = ["/proxied", "/direct"].map(|path| ground.cgroup(path));
    let hijack = "dns-hijack = 127.0.0.1:1053\ndns-hijack = [::1]:1053\n";
    // with udp = no, what is not translated would leave as it is
    for (more, of_proxied) in [
        ("", "proxy"),
        ("udp = no\n", "nobody"),
        ("ipv4 = no\nipv6 = no\n", "nobody"),
        ("udp = no\ndns-hijack-local = yes\n", "nobody"),
    ] {
        let rules = format!("{hijack}{more}[rules]");
        let daemon = Daemon::start(&ground, &POLICY.replace("[rules]", &rules), &[]);
        // nobody is there
        for (to, host) in [("198.18.0.1", HOST4), ("2001:db8:ffff::1", HOST6)] {
            let proxy = spoof(&direct, addr(any_of(host), 7893));
            let to = addr(ip(to), 53);
            let mut at = addr(host, 0);
            for (cgroup, want) in [(&direct, "remote"), (&proxied, of_proxied)] {
                let app = udp_of(cgroup, at);
                at = app.local_addr().expect("an address");
                for _ in 0..2 {
                    assert_eq!(reaches(&app, to, &[&proxy], &mut world), want, "{to} {more}");
                }
            }
        }
        assert!(daemon.stop().success());
    }
}

/// A reload that gives marks another meaning: what a proxy began is the proxy's all the same.
#[test]
fn another_mask_by_a_reload() {
    let (ground, mut world) = scene!("remask");
    let [proxied, direct] = ["/proxied", "/direct"].map(|path| ground.cgroup(path));
    let proxies = [("0.0.0.0", 7893), ("::", 7893)];
    let proxies = proxies.map(|(any, port)| spoof(&direct, addr(ip(any), port)));
    let policy = |default: &str, mask: &str| {
        format!("[global]\ndefault = {default}\nfwmark-mask = {mask}\n{POLICY}")
    };
    for default in ["direct", "mihomo", "drop"] {
        let daemon = Daemon::start(&ground, &policy(default, "0xff000000"), &[]);
        for ((remote, _, host), proxy) in places().into_iter().zip(&proxies) {
            for mask in ["0x00ff0000", "0xf0000000", "0x0ff00000", "0xff000000"] {
                daemon.reconfigure(&policy(default, "0xff000000"));
                let app = udp_of(&proxied, addr(host, 0));
                let at = app.local_addr().expect("an address");
                let speaker = spoof(&direct, remote);
                for mask in ["", mask] {
                    if !mask.is_empty() {
                        daemon.reconfigure(&policy(default, mask));
                    }
                    assert_eq!(speaker.send_to(b"y", at).expect("send"), 1);
                    let who = reaches(&app, remote, &[proxy, &speaker], &mut world);
                    assert_eq!(who, "proxy", "default {default}, {mask:?}, {remote}");
                }
            }
        }
        assert!(daemon.stop().success());
    }
}

/// The same by a restart, after one that was killed, left things in force or removed them. Of TCP,
/// what only the kernel sends for a socket that is gone is the proxy's, by a reload too.
#[test]
fn another_mask_by_a_restart() {
    let (ground, mut world) = scene!("remask-restart");
    let [proxied, direct] = ["/proxied", "/direct"].map(|path| ground.cgroup(path));
    let proxies = [("0.0.0.0", 7893), ("::", 7893)];
    let listeners = proxies.map(|(any, port)| {
        let fd = socket_in(&direct, libc::SOCK_STREAM, ip(any));
        bind_fd(&fd, addr(ip(any), port));
        // SAFETY: an open socket.
        assert_eq!(unsafe { libc::listen(fd.as_raw_fd(), 8) }, 0);
        TcpListener::from(fd)
    });
    let proxies = proxies.map(|(any, port)| spoof(&direct, addr(ip(any), port)));
    let policy = |default: &str, mask: &str, more: &str| {
        format!("[global]\ndefault = {default}\nfwmark-mask = {mask}\n{more}{POLICY}")
    };
    for default in ["direct", "mihomo", "drop"] {
        let masks = ["0x00ff0000", "0xf0000000", "0x0ff00000"];
        let ends = ["kill", "keep", "remove", "reload"];
        for (mask, end) in masks.iter().flat_map(|mask| ends.map(|end| (mask, end))) {
            let keep = if end == "keep" { "on-exit = keep\n" } else { "" };
            let daemon = Daemon::start(&ground, &policy(default, "0xff000000", keep), &[]);
            let mut udp = Vec::new();
            let mut tcp = Vec::new();
            for (at, (remote, _, host)) in places().into_iter().enumerate() {
                // a port that was chosen: no start ends such a socket
                let app = udp_of(&proxied, addr(host, 20007));
                let own = app.local_addr().expect("an address");
                let speaker = spoof(&direct, remote);
                udp.push((app, own, speaker, remote, &proxies[at]));
                let app = tcp_in(&proxied, remote);
                let (mut end, _) = listeners[at].accept().expect("accept");
                drop(app);
                assert_eq!(again(|| end.read(&mut [0; 8])).expect("hear the end"), 0);
                tcp.push(end);
            }
            let mut check = |when: &str| {
                for (app, own, speaker, remote, proxy) in &udp {
                    assert_eq!(speaker.send_to(b"y", *own).expect("send"), 1);
                    let who = reaches(app, *remote, &[proxy, speaker], &mut world);
                    let what = format!("default {default}, {mask}, {end}, {remote}, {when}");
                    assert_eq!(who, "proxy", "{what}");
                }
            };
            check("before");
            let other = policy(default, mask, "");
            let daemon = match end {
                "reload" => {
                    daemon.configure(&other);
                    assert!(daemon.reload().contains("reloaded"), "{}", daemon.logs());
                    daemon
                }
                "kill" => {
                    daemon.kill9();
                    Daemon::start(&ground, &other, &[])
                }
                _ => {
                    assert_eq!(daemon.stop().code(), Some(0));
                    Daemon::start(&ground, &other, &[])
                }
            };
            check("after");
            world.wire.packets();
            for mut end in tcp {
                let refused = || end.write_all(b"more").is_err();
                assert!(wait_until(PATIENCE, refused), "no reset came to the proxy");
            }
            assert_eq!(world.wire.to_remote(), [], "default {default}, {mask}, {end}");
            assert!(daemon.stop().success());
        }
    }
}

/// A socket whose cgroup gets another target: of UDP, its next datagram goes there.
#[test]
fn datagrams_go_where_their_cgroup_is_to_go_now() {
    let (ground, mut world) = scene!("udpnow");
    let app_cgroup = ground.cgroup("/app");
    let direct = ground.cgroup("/direct");
    let proxies = [("0.0.0.0", 7893), ("::", 7893)];
    let proxies = proxies.map(|(any, port)| spoof(&direct, addr(ip(any), port)));
    let policy = |default: &str, target: &str| {
        let rule = match target {
            "" => String::new(),
            target => format!("{target} = /app\n"),
        };
        format!(
            "[global]\ndefault = {default}\n[tproxy mihomo]\nport = 7893\n\
             [rules]\ndirect = /direct\n{rule}"
        )
    };
    let daemon = Daemon::start(&ground, &policy("direct", ""), &[]);
    for ((remote, _, host), proxy) in places().into_iter().zip(&proxies) {
        let app = udp_of(&app_cgroup, addr(host, 0));
        for default in ["direct", "mihomo", "drop"] {
            for target in ["mihomo", "direct", "", "mihomo", "drop", "", "direct", "mihomo", ""] {
                daemon.reconfigure(&policy(default, target));
                let want = match if target.is_empty() { default } else { target } {
                    "mihomo" => "proxy",
                    "drop" => "nobody",
                    _ => "remote",
                };
                for _ in 0..2 {
                    let who = reaches(&app, remote, &[proxy], &mut world);
                    assert_eq!(who, want, "default {default}, {target:?}, {remote}");
                }
            }
        }
    }
}

/// A flow that is a proxy's own already takes a short cut to it: not beyond what its target takes by
/// now, what its packets bear, and who sends them.
#[test]
fn a_proxied_flow_is_looked_at_again() {
    let (ground, mut world) = scene!("again");
    let [cgroup, direct] = ["/proxied", "/direct"].map(|path| ground.cgroup(path));
    let proxies = [("0.0.0.0", 7893), ("::", 7893), ("0.0.0.0", 7894), ("::", 7894)];
    let proxies = proxies.map(|(any, port)| spoof(&direct, addr(ip(any), port)));
    let other = "[tproxy other]\nport = 7894\n[rules]\nother = /proxied\n";
    let daemon = Daemon::start(&ground, POLICY, &[]);
    for (n, (remote, _, host)) in places().into_iter().enumerate() {
        let family = if host.is_ipv4() { "ipv4" } else { "ipv6" };
        let (own, others) = (&proxies[n], &proxies[n + 2]);
        let app = udp_of(&cgroup, addr(host, 0));
        let fd = OwnedFd::from(app.try_clone().expect("clone"));
        let mark = |value| set(&fd, libc::SOL_SOCKET, libc::SO_MARK, value);
        let with = |key: &str| POLICY.replace("7893\n", &format!("7893\n{key}\n"));
        let global = |key: &str| format!("[global]\n{key}\n{POLICY}");
        for (config, want) in [
            (with("udp = no"), "remote"),
            (with("udp = drop"), "nobody"),
            (with(&format!("{family} = no")), "remote"),
            (with(&format!("{family} = drop")), "nobody"),
            (with("tcp = drop"), "proxy"),
            (global("bypass-user = 0"), "remote"),
            (POLICY.replace("[rules]", other), "other"),
            (POLICY.replace("mihomo = /proxied", "drop = /proxied"), "nobody"),
        ] {
            for (config, want) in [(POLICY, "proxy"), (&config, want)] {
                daemon.reconfigure(config);
                for _ in 0..2 {
                    let (proxy, want) = match want {
                        "other" => (others, "proxy"),
                        want => (own, want),
                    };
                    let who = reaches(&app, remote, &[proxy], &mut world);
                    assert_eq!(who, want, "{remote} with {config}");
                }
            }
        }
        daemon.reconfigure(&global("bypass-mark = 0xff"));
        for (value, want) in [(0, "proxy"), (0xff, "remote"), (0, "proxy"), (0xff, "remote")] {
            mark(value);
            assert_eq!(reaches(&app, remote, &[own], &mut world), want, "{remote} {value:#x}");
        }
    }
}

/// The second query of a socket goes to the resolver too, which may be on another host: by the mark
/// of its flow alone, not by that of a proxy's packets.
#[test]
fn queries_are_translated_again_and_again() {
    let (ground, _world) = scene!("queries");
    let cgroup = ground.cgroup("/proxied");
    let resolvers = [(REMOTE4, "203.0.113.53"), (REMOTE6, "2001:db8:2::53")];
    let rules =
        resolvers.map(|(_, ip)| format!("dns-hijack = {}\n", addr(crate::ground::ip(ip), 80)));
    let config = POLICY.replace("[rules]", &format!("{}[rules]", rules.concat()));
    let _daemon = Daemon::start(&ground, &config, &[]);
    for (remote, resolver) in resolvers {
        let host = if remote.is_ipv4() { HOST4 } else { HOST6 };
        let app = udp_of(&cgroup, addr(host, 0));
        for _ in 0..3 {
            app.send_to(b"who?", addr(remote, 53)).expect("send");
            let mut data = [0; 200];
            let n = again(|| app.recv(&mut data)).expect("an answer");
            let said = String::from_utf8_lossy(&data[..n]);
            let want = format!("remote {}", addr(ip(resolver), 80));
            assert!(said.starts_with(&want), "{said}");
        }
    }
}

/// The same for a client of this router, but that what a proxy has stays with it: the kernel has
/// settled how its addresses are translated. Whatever bits the marks have before and after.
#[test]
fn datagrams_of_clients_over_a_reload() {
    let (ground, mut world) = scene!("udpgw");
    let lan = Lan::new(&ground);
    let direct = ground.cgroup("/direct");
    let proxies = [("0.0.0.0", 7893), ("::", 7893)];
    let proxies = proxies.map(|(any, port)| spoof(&direct, addr(ip(any), port)));
    let policy = |mask: &str, target: &str| {
        format!(
            "[global]\nfwmark-mask = {mask}\n{POLICY}[gateway lan]\ninterface = br-lan\n\
             target = {target}\n"
        )
    };
    let (high, low) = ("0xff000000", "0x00ff0000");
    let steps = [
        (high, "direct", "remote"),
        (high, "mihomo", "proxy"),
        (high, "direct", "proxy"),
        (high, "drop", "nobody"),
        (high, "mihomo", "proxy"),
        (low, "mihomo", "proxy"),
        (low, "direct", "proxy"),
        (high, "mihomo", "proxy"),
        (low, "drop", "nobody"),
    ];
    let daemon = Daemon::start(&ground, &policy(high, "direct"), &[]);
    let hosts = [ip("198.51.100.10"), ip("2001:db8:3::10")];
    for (((remote, ..), proxy), client) in places().into_iter().zip(&proxies).zip(hosts) {
        let bind = || UdpSocket::bind(addr(client, 0)).expect("bind");
        let app = patient(lan.client(0).run(bind));
        for (mask, target, want) in steps {
            daemon.configure(&policy(mask, target));
            daemon.reload();
            for _ in 0..2 {
                let who = reaches(&app, remote, &[proxy], &mut world);
                assert_eq!(who, want, "{mask}, {target}, {remote}");
            }
            // one that nobody has sent by
            let fresh = patient(lan.client(0).run(bind));
            let want = match target {
                "mihomo" => "proxy",
                "drop" => "nobody",
                _ => "remote",
            };
            let who = reaches(&fresh, remote, &[proxy], &mut world);
            assert_eq!(who, want, "{mask}, {target}, {remote}, a fresh socket");
        }
    }
}

/// A client's connection that a proxy has goes on with it when a reload gives the marks other bits.
#[test]
fn connections_of_clients_over_another_mask() {
    let (ground, mut world) = scene!("tcpgw");
    let lan = Lan::new(&ground);
    let policy = |mask: &str| {
        format!(
            "[global]\nfwmark-mask = {mask}\n{POLICY}[gateway lan]\ninterface = br-lan\n\
             target = mihomo\n"
        )
    };
    for ip in [REMOTE4, REMOTE6] {
        let mut proxy = Some(Server::stream(PROXY, &[7893]));
        let daemon = Daemon::start(&ground, &policy("0xff000000"), &[]);
        let to = addr(ip, STREAM_PORT);
        let follow = Client::tcp(&ground.root, to).follow();
        let flow = lan.client(0).run(|| follow.spawn());
        let under_way = wait_until(PATIENCE, || {
            let mut list = std::process::Command::new("ss");
            list.args(["-Htn", "state", "established"]);
            let list = lan.client(0).run(|| list.output()).expect("run ss").stdout;
            String::from_utf8_lossy(&list).contains(&to.to_string())
        });
        assert!(under_way, "no connection");
        world.wire.packets();
        for mask in ["0x00ff0000", "0xf0000000", "0xff000000"] {
            daemon.configure(&policy(mask));
            let log = daemon.reload();
            assert!(log.contains("reloaded"), "{log}");
        }
        proxy.take();
        assert_eq!(flow.wait().0.who(), format!("{PROXY} {to}"));
        assert_eq!(world.wire.to_remote(), []);
        assert!(daemon.stop().success());
    }
}

/// A socket that is bound to a device leaves by no other way; it is refused, and counted so.
#[test]
fn sockets_of_a_device_are_refused() {
    let (ground, mut world, _proxy) = scene!("device", proxy);
    let cgroup = ground.cgroup("/proxied");
    let config = "[tproxy other]\nport = 7894\n".to_owned() + POLICY;
    let daemon = Daemon::start(&ground, &config, &[]);
    for (remote, _, _) in places() {
        let fd = socket_in(&cgroup, libc::SOCK_DGRAM, remote.ip());
        let name = b"in0\0";
        // SAFETY: reads `name`.
        let rc = unsafe {
            let (level, option) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
            libc::setsockopt(fd.as_raw_fd(), level, option, name.as_ptr().cast(), 4)
        };
        assert_eq!(rc, 0, "bind to a device: {}", std::io::Error::last_os_error());
        let socket = UdpSocket::from(fd);
        for _ in 0..5 {
            assert_eq!(reaches(&socket, remote, &[], &mut world), "nobody");
        }
    }
    let counted = counters("astray_mihomo");
    assert!(counted.iter().any(|(packets, _)| *packets == 10), "{counted:?}");
    let status = run_with(&ground, &config, &["status"]).out;
    let refused = |name: &str| {
        let line = status.lines().find(|line| line.split_whitespace().next() == Some(name));
        line.and_then(|line| line.split_whitespace().last().map(str::to_owned))
    };
    assert_eq!(refused("mihomo").as_deref(), Some("10"), "{status}");
    assert_eq!(refused("other").as_deref(), Some("0"), "{status}");
    drop(daemon);
}

/// A UDP service that speaks after conntrack has forgotten its client begins a flow, which is its
/// cgroup's: the manual page says so.
#[test]
fn a_service_that_speaks_too_late() {
    let (ground, mut world) = scene!("late");
    let direct = ground.cgroup("/direct");
    let proxies = [("0.0.0.0", 7893), ("::", 7893)];
    let proxies = proxies.map(|(any, port)| spoof(&direct, addr(ip(any), port)));
    let _daemon = Daemon::start(&ground, POLICY, &[]);
    for (cgroup, want) in [("/proxied", "proxy"), ("/drop", "nobody")] {
        let cgroup = ground.cgroup(cgroup);
        crate::kernel::await_member(&cgroup, if want == "proxy" { "mihomo" } else { "drop" });
        for ((remote, _, host), proxy) in places().into_iter().zip(&proxies) {
            let service = udp_of(&cgroup, addr(host, 7000));
            let client = addr(remote.ip(), 7001);
            let peer = ground.outside(|| crate::world::bind(client, libc::SOCK_DGRAM));
            let peer = patient(UdpSocket::from(peer));
            let mut ask = |what: &str, want: &str| {
                if what.contains("client") {
                    peer.send_to(b"?", addr(host, 7000)).expect("send");
                    again(|| service.recv_from(&mut [0; 8])).expect(what);
                }
                let who = reaches(&service, client, &[proxy], &mut world);
                assert_eq!(who, want, "{what}: {}, {client}", cgroup.display());
            };
            ask("the client asks", "remote");
            lose(Loss::Flushed);
            ask("the service speaks late", want);
            ask("the client speaks at once", if want == "proxy" { "proxy" } else { "remote" });
            lose(Loss::Flushed);
            ask("the client speaks after a silence", "remote");
        }
    }
}
