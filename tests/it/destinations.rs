//! What of a target's traffic it takes: ports, QUIC, what is rejected, and destinations. Packets
//! decide, of this host's processes and of a router's clients.

use std::io::Read;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use crate::client::{again, connect, socket_in, Client, Outcome, Proto, AT_ONCE, PATIENCE};
use crate::daemon::{run_with, write_private, Daemon, UNOWNED};
use crate::gateway::Lan;
use crate::ground::{addr, any_of, chmod, ip, Ground, Netns, REMOTE4, REMOTE6, REMOTES};
use crate::kernel::{await_connection, load, table_plain};
use crate::wait_until;
use crate::world::{bind_fd, set, Server, World, PROXY, STREAM_PORT};

use Proto::{Tcp, Udp};

/// Long enough for an answer that does not come.
const SILENCE: Duration = Duration::from_millis(400);

/// Who is asked of a client, and what is said of it: the answer without what it dialled, `nobody`,
/// or `refused`, which a datagram's sender learns by an error that is not silence.
type Case<'a> = (Proto, SocketAddr, &'a str);

fn who(outcome: Outcome, took: Duration, to: SocketAddr) -> String {
    match outcome {
        Outcome::Answer(text) => {
            let name = text.split(" from ").next().unwrap_or_default().to_owned();
            let dialled = format!(" {to}");
            name.strip_suffix(&dialled).map_or(name.clone(), str::to_owned)
        }
        Outcome::Timeout => "nobody".to_owned(),
        // the output hook's own word for what it drops, whatever else is said
        Outcome::Failed(nix::errno::Errno::EPERM) => "denied".to_owned(),
        Outcome::Refused if took < AT_ONCE => "refused".to_owned(),
        other => format!("{other:?} after {took:?}"),
    }
}

/// Asserts what becomes of each case, asked by `run`.
#[track_caller]
fn expect(what: &str, cases: &[Case], run: impl Fn(Client) -> (Outcome, Duration), from: &Path) {
    let mut wrong = Vec::new();
    for (proto, to, want) in cases {
        let patience = if ["nobody", "denied"].contains(want) { SILENCE } else { PATIENCE };
        let (outcome, took) = run(Client::new(from, *proto, *to).timeout(patience));
        let got = who(outcome, took, *to);
        if got != *want {
            wrong.push(format!("{proto:?} to {to}: {got}, not {want}"));
        }
    }
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
}

/// Of a process in a cgroup, which is there from before the daemon on.
#[track_caller]
fn here(cgroup: &Path, cases: &[Case]) {
    expect("here", cases, |client| client.spawn().wait(), cgroup);
}

/// Of a client of the router.
#[track_caller]
fn behind(ground: &Ground, lan: &Lan, cases: &[Case]) {
    let run = |client: Client| lan.client(0).run(|| client.spawn().wait());
    expect("a client", cases, run, &ground.root);
}

/// Of both.
#[track_caller]
fn everywhere(ground: &Ground, lan: &Lan, app: &Path, cases: &[Case]) {
    here(app, cases);
    behind(ground, lan, cases);
}

/// The cases for both families.
fn both(cases: &[(Proto, u16, &'static str)]) -> Vec<Case<'static>> {
    let all = cases
        .iter()
        .flat_map(|(proto, port, want)| REMOTES.map(|ip| (*proto, addr(ip, *port), *want)));
    all.collect()
}

const GATEWAY: &str = "[gateway lan]\ninterface = br-lan\ntarget = mihomo\n";

/// A policy for `/app` and for the router's clients.
fn policy(global: &str, lines: &str) -> String {
    format!(
        "[global]\n{global}[tproxy mihomo]\nport = 7893\n{lines}[rules]\nmihomo = /app\n{GATEWAY}"
    )
}

/// Ports that a target takes, and none of the others.
#[test]
fn ports() {
    let (ground, _world, _proxy) = scene!("dest-ports", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let lines = "tcp-ports = 443 8000-8999\ntcp-ports = 1-79\nudp-ports = 80\n";
    let daemon = Daemon::start(&ground, &policy("", lines), &[]);
    let cases = both(&[
        (Tcp, 53, PROXY),
        (Tcp, 80, "remote"),
        (Tcp, 443, PROXY),
        (Udp, 53, "remote"),
        (Udp, 80, PROXY),
        (Udp, 443, "remote"),
    ]);

    everywhere(&ground, &lan, &app, &cases);

    // where the default is not direct, the kernel's packets for what is left alone go direct too
    daemon.reconfigure(&policy("default = drop\n", lines));
    everywhere(&ground, &lan, &app, &cases);
    daemon.stop_clean();
}

/// HTTP/3 by its ports; other UDP is not concerned.
#[test]
fn quic() {
    let (ground, _world, _proxy) = scene!("dest-quic", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let daemon = Daemon::start(&ground, &policy("", ""), &[]);
    for (lines, udp, of_app, of_client) in [
        ("quic = no\n", PROXY, "remote", "remote"),
        ("quic = drop\n", PROXY, "denied", "nobody"),
        ("quic = reject\n", PROXY, "denied", "refused"),
        ("quic = yes\nudp = no\n", "remote", "remote", "remote"),
    ] {
        daemon.reconfigure(&policy("", lines));

        let of =
            |quic| both(&[(Tcp, 443, PROXY), (Udp, 53, udp), (Udp, 80, quic), (Udp, 443, quic)]);
        here(&app, &of(of_app));
        behind(&ground, &lan, &of(of_client));
    }
    daemon.stop_clean();
}

/// What is rejected fails at once, for this host's processes and for a router's clients; what is
/// dropped only shows to those who send datagrams here.
#[test]
fn rejected_at_once() {
    let (ground, mut world, _proxy) = scene!("dest-reject", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let daemon = Daemon::start(&ground, &policy("", "tcp = drop\nudp = drop\n"), &[]);
    here(&app, &both(&[(Tcp, 80, "nobody"), (Udp, 53, "denied")]));
    behind(&ground, &lan, &both(&[(Tcp, 80, "nobody"), (Udp, 53, "nobody")]));
    for lines in ["tcp = reject\nudp = reject\n", "ipv4 = reject\nipv6 = reject\n"] {
        daemon.reconfigure(&policy("", lines));
        here(&app, &both(&[(Tcp, 80, "refused"), (Udp, 53, "denied")]));
        behind(&ground, &lan, &both(&[(Tcp, 80, "refused"), (Udp, 53, "refused")]));
    }

    // one family alone; and drop comes first
    daemon.reconfigure(&policy("", "ipv6 = reject\nudp = drop\n"));
    let cases = [
        (Tcp, addr(REMOTE4, 80), PROXY),
        (Tcp, addr(REMOTE6, 80), "refused"),
        (Udp, addr(REMOTE6, 53), "nobody"),
    ];
    behind(&ground, &lan, &cases);
    assert_eq!(world.wire.to_remote(), [], "what is refused or proxied stays here");
    daemon.stop_clean();
}

/// How long each waits: printed for the manual, and held far below the kernel's own patience.
#[test]
fn how_long_a_refusal_takes() {
    let (ground, _world, _proxy) = scene!("dest-time", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let daemon = Daemon::start(&ground, &policy("", "tcp = reject\nudp = reject\n"), &[]);
    for (proto, name) in [(Tcp, "TCP"), (Udp, "UDP")] {
        for ip in REMOTES {
            let ask = |from: &Path| Client::new(from, proto, addr(ip, 443)).timeout(PATIENCE);
            let (own, took) = ask(&app).spawn().wait();
            let (its, waited) = lan.client(0).run(|| ask(&ground.root).spawn().wait());
            println!("{name} to {ip}: here {own:?} in {took:?}, a client {its:?} in {waited:?}");
            assert_eq!(own.who(), if proto == Tcp { "refused" } else { "nobody" });
            assert_eq!(its, Outcome::Refused);
            assert!(took.max(waited) < AT_ONCE, "{took:?} {waited:?}");
        }
    }
    daemon.stop_clean();
}

/// TCP that began proxied stays with its proxy, whatever the target leaves alone by now.
#[test]
fn proxied_tcp_stays_over_a_reload() {
    let (ground, mut world) = scene!("dest-stay");
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let proxy = Server::stream(PROXY, &[7893]);
    let daemon = Daemon::start(&ground, &policy("", ""), &[]);
    let follow = |from: &Path, ip| {
        let flow = Client::tcp(from, addr(ip, 80)).follow().spawn();
        await_connection(addr(ip, 80));
        flow
    };
    let here = REMOTES.map(|ip| follow(&app, ip));
    let behind = lan.client(0).run(|| REMOTES.map(|ip| follow(&ground.root, ip)));
    world.wire.packets();

    for lines in RELOADS {
        daemon.reconfigure(&policy("", lines));
        everywhere(&ground, &lan, &app, &both(&[(Tcp, 80, "remote")]));
    }

    drop(proxy);
    let left = world.wire.to_remote();
    for flow in here.into_iter().chain(behind) {
        let outcome = flow.wait().0;
        let Outcome::Answer(text) = &outcome else { panic!("{outcome:?}") };
        let (who, own) = text.split_once(" from ").expect(text);
        assert!(who.starts_with(PROXY), "{text}");
        assert!(left.iter().all(|packet| packet.src.to_string() != own), "{text}: {left:?}");
    }
    daemon.stop_clean();
}

const RELOADS: &[&str] = &[
    "tcp-ports = 443\n",
    "tcp = no\n",
    "bypass = 203.0.113.0/24\nbypass = 2001:db8:2::/64\n",
    "only = 198.18.0.0/15\n",
];

/// A socket that goes on sends as its ports have it by now, though its flow is known as the target's.
#[test]
fn datagrams_follow_the_ports_over_a_reload() {
    let (ground, _world, _proxy) = scene!("dest-again", proxy);
    let app = ground.cgroup("/app");
    let mut daemon = Daemon::start(&ground, &policy("", ""), &[]);
    let sockets = REMOTES.map(|ip| {
        let fd = socket_in(&app, libc::SOCK_DGRAM, ip);
        // of a chosen port, so that it is not ended where what it sends is dropped
        bind_fd(&fd, addr(any_of(ip), 6881));
        let socket = UdpSocket::from(fd);
        socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        (socket, addr(ip, 80))
    });
    let restart = "# a restart\n";
    for (lines, want) in [
        ("", "proxy"),
        ("udp-ports = 1-79 81-65535\n", "remote"),
        ("udp-ports = 80 443\n", "proxy"),
        ("# a restart\nudp-ports = 443\n", "remote"),
        ("# a restart\nudp-ports = 79-81\n", "proxy"),
        ("udp-ports = 53\ndns-hijack = 127.0.0.1:1053\n", "remote"),
        ("udp-ports = 80\n", "proxy"),
        ("quic = drop\n", "denied"),
        ("udp-ports = 80\nquic = no\n", "remote"),
        ("udp-ports = 1-1000\n", "proxy"),
        ("udp = no\n", "remote"),
        ("bypass = 198.18.0.0/15\nonly = 203.0.113.0/24\nonly = 2001:db8:2::/64\n", "proxy"),
        ("only = 203.0.113.0/24\nonly = 2001:db8:2::/64\nquic = drop\n", "denied"),
    ] {
        match lines.starts_with(restart) {
            true => {
                daemon.kill9();
                daemon = Daemon::start(&ground, &policy("", lines), &[]);
            }
            false => {
                daemon.reconfigure(&policy("", lines));
            }
        }
        for (socket, to) in &sockets {
            // twice: the second is of a flow that is known by now
            for _ in 0..2 {
                let mut text = [0; 256];
                let who =
                    match socket.send_to(b"?", to).and_then(|_| again(|| socket.recv(&mut text))) {
                        Ok(len) => String::from_utf8_lossy(&text[..len]).into_owned(),
                        Err(error) if error.raw_os_error() == Some(libc::EPERM) => "denied ".into(),
                        Err(error) => panic!("{lines}: {error}"),
                    };
                assert_eq!(who.split(' ').next(), Some(want), "{lines}{to}");
            }
        }
    }
    daemon.stop_clean();
}

/// A list as others write them: remarks, CRLF, overlaps, both families.
const LIST: &str = "# a list\r\n203.0.113.64/26\r\n\r\n203.0.113.96/27 # within\r\n\
                    203.0.113.200\r\n2001:db8:2::4:0/112 ; a remark\r\n";

fn write_list(ground: &Ground, name: &str, text: &str) {
    let dir = ground.dir.join("lists");
    let _ = std::fs::create_dir(&dir);
    chmod(&dir, 0o755);
    write_private(&dir.join(name), text);
}

fn to(text: &str, port: u16) -> SocketAddr {
    addr(ip(text), port)
}

/// TCP and UDP to the same places.
fn alike(places: &[(&str, &'static str)]) -> Vec<Case<'static>> {
    let each =
        |(ip, want): &(&str, &'static str)| [(Tcp, to(ip, 80), *want), (Udp, to(ip, 80), *want)];
    places.iter().flat_map(each).collect()
}

/// Destinations that a target leaves alone, by themselves and by a file.
#[test]
fn bypassed_destinations() {
    let (ground, _world, _proxy) = scene!("dest-bypass", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    write_list(&ground, "cn.txt", LIST);
    let lines = "bypass = 203.0.113.32\nbypass-file = lists/cn.txt\n";
    let cases = alike(&[
        ("203.0.113.7", PROXY),
        ("203.0.113.32", "remote"),
        ("203.0.113.63", PROXY),
        ("203.0.113.64", "remote"),
        ("203.0.113.100", "remote"),
        ("203.0.113.127", "remote"),
        ("203.0.113.128", PROXY),
        ("203.0.113.200", "remote"),
        ("2001:db8:2::7", PROXY),
        ("2001:db8:2::4:7", "remote"),
        ("2001:db8:2::5:0", PROXY),
    ]);
    let daemon = Daemon::start(&ground, &policy("", lines), &[]);

    everywhere(&ground, &lan, &app, &cases);
    daemon.reconfigure(&policy("default = drop\n", lines));
    here(&app, &cases);
    // the same where flows that go directly have a mark for another reason: a line for users
    let owned = policy("", lines).replace("[rules]\n", "[rules]\ndirect = user:4000\n");
    daemon.reconfigure(&owned);
    here(&app, &cases);

    // of all targets
    daemon.reconfigure(&policy(&format!("default = drop\n{lines}"), ""));
    everywhere(&ground, &lan, &app, &cases);
    here(&ground.cgroup("/other"), &[(Udp, to("203.0.113.100", 80), "remote")]);
    here(&ground.cgroup("/other"), &[(Udp, to("203.0.113.7", 80), "denied")]);

    // a reload reads the file anew
    write_list(&ground, "cn.txt", "203.0.113.7\n");
    daemon.reload();
    let cases = alike(&[("203.0.113.7", "remote"), ("203.0.113.64", PROXY)]);
    everywhere(&ground, &lan, &app, &cases);
    // and all of what it changes is refused where a line is wrong
    write_list(&ground, "cn.txt", "203.0.113.64/26\n10.0.0/8\n203.0.113/33\n");
    let said = daemon.refuse();
    let line = "lists/cn.txt:2: expected an address or a CIDR, not \"10.0.0/8\", did you mean \
                \"10.0.0.0/8\"?";
    assert!(said.contains(line) && said.contains("lists/cn.txt:3: "), "{said}");
    here(&app, &cases);
    daemon.stop_clean();
}

/// Destinations that alone are taken; DNS is hijacked whatever its destination.
#[test]
fn only_destinations() {
    let (ground, _world, _proxy) = scene!("dest-only", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let _dns = Server::start("dns", &[1053]);
    write_list(&ground, "via.txt", LIST);
    let lines = "only = 203.0.113.7\nonly-file = lists/via.txt\nbypass = 203.0.113.100\n\
                 quic = reject\ndns-hijack = 127.0.0.1:1053\n";
    let daemon = Daemon::start(&ground, &policy("", lines), &[]);
    let cases = [
        (Tcp, to("203.0.113.7", 80), PROXY),
        (Tcp, to("203.0.113.64", 80), PROXY),
        (Tcp, to("203.0.113.100", 80), "remote"),
        (Tcp, to("203.0.113.8", 80), "remote"),
        (Udp, to("203.0.113.8", 443), "remote"),
        (Tcp, to("2001:db8:2::4:7", 443), PROXY),
        (Tcp, to("2001:db8:2::7", 443), "remote"),
        (Udp, to("2001:db8:2::7", 443), "remote"),
    ];
    everywhere(&ground, &lan, &app, &cases);
    let dns = |client: Client| client.run().who();
    for ip in ["203.0.113.7", "203.0.113.8"] {
        let ask = |from: &Path| Client::udp(from, to(ip, 53));
        assert!(dns(ask(&app)).starts_with("dns "), "{ip}");
        let its = lan.client(0).run(|| dns(ask(&ground.root)));
        assert!(its.starts_with("dns "), "{ip}: {its}");
    }

    // bypassed: not without dns-hijack-local
    let ask = |from: &Path| dns(Client::udp(from, to("203.0.113.100", 53)));
    assert_eq!(ask(&app), "remote 203.0.113.100:53");
    daemon.reconfigure(&policy("", &format!("{lines}dns-hijack-local = yes\n")));
    assert!(ask(&app).starts_with("dns "));
    here(&app, &cases);

    // a family of which nothing is taken is left alone, or dropped as its switch says
    let four = "only = 203.0.113.7\n";
    daemon.reconfigure(&policy("", four));
    let six = |want| [(Tcp, to("203.0.113.7", 80), PROXY), (Tcp, addr(REMOTE6, 80), want)];
    everywhere(&ground, &lan, &app, &six("remote"));
    daemon.reconfigure(&policy("", &format!("{four}ipv6 = reject\n")));
    everywhere(&ground, &lan, &app, &six("refused"));
    daemon.stop_clean();
}

/// A target that is to take the destinations of an empty list takes none, and says so.
#[test]
fn a_list_of_nothing() {
    let (ground, _world, _proxy) = scene!("dest-nothing", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let daemon = Daemon::start(&ground, &policy("", "only = 203.0.113.7\n"), &[]);
    everywhere(&ground, &lan, &app, &alike(&[("203.0.113.7", PROXY)]));

    write_list(&ground, "via.txt", "# nothing\n");
    let said = daemon.reconfigure(&policy("", "only-file = lists/via.txt\n"));
    assert!(said.contains("only-file names no address"), "{said}");

    let none = alike(&[("203.0.113.7", "remote"), ("2001:db8:2::7", "remote")]);
    everywhere(&ground, &lan, &app, &none);
    daemon.stop_clean();
}

/// A socket of a cgroup that marks its packets with a DSCP, connected.
fn marked(cgroup: &Path, kind: i32, to: SocketAddr, dscp: i32) -> OwnedFd {
    let fd = socket_in(cgroup, kind, to.ip());
    let (level, option) = match to {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    };
    // with a bit of ECN, which is no part of it
    set(&fd, level, option, dscp << 2 | 2);
    connect(&fd, to).expect("connect");
    fd
}

/// What answers it at port 80.
fn with_dscp(cgroup: &Path, to: SocketAddr, dscp: i32) -> String {
    let fd = marked(cgroup, libc::SOCK_STREAM, to, dscp);
    let mut text = String::new();
    TcpStream::from(fd).read_to_string(&mut text).expect("an answer");
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// The same by a datagram.
fn udp_with_dscp(cgroup: &Path, to: SocketAddr, dscp: i32) -> String {
    let socket = UdpSocket::from(marked(cgroup, libc::SOCK_DGRAM, to, dscp));
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    socket.send(b"?").expect("send");
    let mut text = [0; 256];
    let len = again(|| socket.recv(&mut text)).expect("an answer");
    let text = String::from_utf8_lossy(&text[..len]);
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// Packets with one of these DSCPs are left alone, of both protocols, here and of a client.
#[test]
fn packets_with_a_dscp() {
    let (ground, _world, _proxy) = scene!("dest-dscp", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let global = "bypass-dscp = 4\nbypass-dscp = 0x2e\n";
    let daemon = Daemon::start(&ground, &policy(global, ""), &[]);
    for ip in REMOTES {
        for (dscp, want) in
            [(0, "proxy"), (4, "remote"), (5, "proxy"), (46, "remote"), (62, "proxy")]
        {
            let to = addr(ip, 80);
            assert_eq!(with_dscp(&app, to, dscp), want, "{dscp} to {to}");
            let its = lan.client(0).run(|| with_dscp(&ground.root, to, dscp));
            assert_eq!(its, want, "{dscp} to {to} of a client");
            assert_eq!(udp_with_dscp(&app, to, dscp), want, "UDP, {dscp} to {to}");
            let its = lan.client(0).run(|| udp_with_dscp(&ground.root, to, dscp));
            assert_eq!(its, want, "UDP, {dscp} to {to} of a client");
        }
    }
    daemon.stop_clean();
}

/// What is rejected or left alone by its port is so with a daemon that was killed, with the one that
/// takes over from it, and after another program has deleted all there was.
#[test]
fn ports_and_refusals_over_a_kill_and_a_repair() {
    let (ground, mut world, _proxy) = scene!("dest-heal", proxy);
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let lines = "tcp-ports = 443 80\nudp-ports = 80 443\nquic = reject\nipv6 = reject\n";
    let config = policy("", lines);
    let cases = |udp: &'static str| {
        [
            (Tcp, addr(REMOTE4, 443), PROXY),
            (Tcp, addr(REMOTE4, 53), "remote"),
            (Udp, addr(REMOTE4, 53), "remote"),
            (Tcp, addr(REMOTE6, 443), "refused"),
            (Udp, addr(REMOTE4, 443), udp),
            (Udp, addr(REMOTE6, 443), udp),
        ]
    };
    let mut all = |when: &str| {
        println!("{when}");
        here(&app, &cases("denied"));
        behind(&ground, &lan, &cases("refused"));
        let left = world.wire.to_remote();
        assert!(left.iter().all(|packet| packet.dst.port() == 53), "{when}: {left:?}");
    };

    let daemon = Daemon::start_in(&ground, &config, &[], &[UNOWNED]);
    all("at first");
    daemon.kill9();
    all("without a daemon");
    let daemon = Daemon::start_in(&ground, &config, &[], &[UNOWNED]);
    all("after kill -9");
    load("delete table inet cgtproxy");
    assert!(daemon.wait_log("in force again", PATIENCE), "{}", daemon.logs());
    all("after a repair");
    daemon.leave();
    let daemon = Daemon::start(&ground, &config, &[]);
    all("after a restart");
    daemon.stop_clean();
}

/// TCP that began directly stays so where its target leaves it alone by now, also where the policy
/// that it began under marked what goes directly and this one does not.
#[test]
fn direct_tcp_stays_over_a_reload() {
    let (ground, _world, _proxy) = scene!("dest-direct", proxy);
    let app = ground.cgroup("/app");
    let marking =
        "[global]\ndefault = drop\n[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /app\n";
    for lines in RELOADS {
        let daemon = Daemon::start(&ground, marking, &[]);
        let flows = REMOTES.map(|ip| {
            let fd = socket_in(&app, libc::SOCK_STREAM, ip);
            connect(&fd, addr(ip, STREAM_PORT)).expect("connect");
            TcpStream::from(fd)
        });

        daemon.reconfigure(&policy("", lines));

        for mut stream in flows {
            stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
            let mut data = vec![0; 1 << 16];
            // beyond what may be queued of an ended one
            let mut read = || again(|| stream.read(&mut data));
            let ended = (0..300).map(|_| read()).find(|read| !matches!(read, Ok(1..)));
            assert!(ended.is_none(), "{lines}to {:?}: {ended:?}", stream.peer_addr());
        }
        daemon.stop_clean();
    }
}

/// A flow that a target left alone, and that it takes by now, is ended.
#[test]
fn direct_tcp_is_ended_where_it_is_taken_now() {
    let (ground, mut world, _proxy) = scene!("dest-end", proxy);
    let app = ground.cgroup("/app");
    let all = "bypass = 203.0.113.0/24\nbypass = 2001:db8:2::/64\n";
    for lines in [all, "only = 198.18.0.0/15\n", "tcp-ports = 1\n"] {
        let daemon = Daemon::start(&ground, &policy("", lines), &[]);
        let follow = |ip| Client::tcp(&app, addr(ip, STREAM_PORT)).follow().spawn();
        let flows = REMOTES.map(follow);
        let mut seen = Vec::new();
        let streams = wait_until(PATIENCE, || {
            seen.extend(world.wire.to_remote());
            let of = |ip| seen.iter().filter(|packet| packet.dst.ip() == ip).count();
            of(REMOTE4).min(of(REMOTE6)) > 9
        });
        assert!(streams, "{lines}");

        daemon.reconfigure(&policy("", ""));

        // by the daemon, or by the proxy's reset where its own packet came first
        for flow in flows {
            let outcome = flow.wait().0;
            assert!(!matches!(outcome, Outcome::Answer(_)), "{lines}{outcome:?}");
        }
        here(&app, &both(&[(Tcp, 80, PROXY)]));
        daemon.stop_clean();
    }
}

/// What nft lists, and what `show` prints, loads again; names may be as long as can be, and lists.
#[test]
fn tables_load_again() {
    let ground = ground!("dest-load");
    let text: String = (0..10_000u32)
        .map(|i| format!("{}/29\n", std::net::Ipv4Addr::from(0x0b00_0000 + i * 16)))
        .chain((0..10_000u32).map(|i| format!("2001:db8:{:x}:{:x}::/64\n", i / 64, i % 64 * 2)))
        .collect();
    write_list(&ground, "long.txt", &text);
    let target = |name: &str| {
        format!(
            "[tproxy {name}]\nport = 7893\ntcp = reject\nquic = drop\ntcp-ports = 80 443\n\
             udp-ports = 1-79 65535\nbypass-file = lists/long.txt\nonly = 198.18.0.0/15\n\
             only = fd00::/8\ndns-hijack = 127.0.0.1:1053\n"
        )
    };
    let config = format!(
        "[global]\nbypass-dscp = 4\nbypass-file = lists/long.txt\n{}{}{GATEWAY}",
        target("socket"),
        target("fifteen-letters")
    );
    let config = config.replace("target = mihomo", "target = socket");
    let daemon = Daemon::start(&ground, &config, &[]);

    let listed = table_plain(&[]);
    assert!(listed.contains("11.0.0.16/29") && listed.contains("2001:db8:9c:1e::/64"));
    let shown = run_with(&ground, &config, &["show"]).fine();
    for script in [listed, shown] {
        Netns::new().run(|| load(&script));
    }
    daemon.stop_clean();
}

/// Files that are not to be trusted, or no files.
#[test]
fn lists_that_are_refused() {
    let ground = ground!("dest-hostile");
    let daemon = Daemon::start(&ground, &policy("", ""), &[]);
    let dir = ground.dir.join("lists");
    std::fs::create_dir(&dir).expect("make a directory");
    let refused = |name: &str, why: &str| {
        daemon.configure(&policy("", &format!("bypass-file = lists/{name}\n")));
        let said = daemon.refuse();
        assert!(said.contains(why) && said.contains(".conf:"), "{name}: {said}");
    };
    let path = |name: &str| dir.join(name);
    nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("make a FIFO");
    std::fs::create_dir(path("dir")).expect("make a directory");
    write_private(&path("writable"), "10.0.0.0/8\n");
    chmod(&path("writable"), 0o666);
    write_private(&path("large"), &"# remark\n".repeat(1 << 20));
    let many: String = (0..=100_000u32)
        .map(|i| format!("10.{}.{}.{}\n", i >> 16, i >> 8 & 255, i & 255))
        .collect();
    write_private(&path("many"), &many);
    std::fs::write(path("latin"), b"10.0.0.0/8\n# caf\xe9\n").expect("write");
    chmod(&path("latin"), 0o600);
    write_private(&path("noise"), &"nonsense\n".repeat(1000));

    refused("absent", "no such file");
    refused("fifo", "is not a regular file");
    refused("dir", "is a directory");
    refused("writable", "is writable by group or others");
    refused("large", "is over 8 MiB");
    refused("many", "over 100000 addresses");
    refused("latin", "is not UTF-8 (line 2)");
    refused("noise", "990 more lines are no addresses");

    // said once, whoever names it
    write_private(&path("wrong"), "10.0.0/8\n");
    let twice = "bypass-file = lists/wrong\nonly-file = lists/wrong\n";
    daemon.configure(&policy("bypass-file = lists/wrong\n", twice));
    let said = daemon.refuse();
    assert_eq!(said.matches("lists/wrong:1: ").count(), 1, "{said}");
    daemon.stop_clean();
}

/// `check` and `explain` say what a target does not take, and `check` what was likely not meant.
#[test]
fn check_and_explain() {
    let ground = ground!("dest-said");
    write_list(&ground, "cn.txt", LIST);
    write_list(&ground, "none.txt", "# later\n");
    let lines = "udp = drop\nquic = reject\ntcp-ports = 443 80\nbypass-file = lists/cn.txt\n";
    let said = |lines: &str, args: &[&str]| run_with(&ground, &policy("", lines), args).out;
    let limits = "udp = drop, quic = reject, tcp-ports = 80 443, bypass 3 ranges";
    let text = said(lines, &["explain", "/app"]);
    assert!(text.contains(&format!("    limits  {limits}\n")), "{text}");
    assert!(!said("", &["explain", "/app"]).contains("limits"));
    let text = said(lines, &["check"]);
    assert!(text.contains(&format!("ok: [tproxy mihomo]: {limits}\n")), "{text}");
    let text = said("only-file = lists/none.txt\nudp-ports = 53\nudp = no\n", &["check"]);
    assert!(text.contains("warning: [tproxy mihomo]: only-file names no address"), "{text}");
    assert!(text.contains("warning: [tproxy mihomo]: udp-ports says nothing"), "{text}");
}

/// What a policy leaves alone by its DSCP is no reason to end a flow.
#[test]
fn flows_with_a_dscp_are_spared() {
    let (ground, _world, _proxy) = scene!("dest-spare", proxy);
    let app = ground.cgroup("/app");
    let global = "bypass-dscp = 4\n";
    let before = policy(global, "").replace("mihomo = /app", "direct = /app");
    let daemon = Daemon::start(&ground, &before, &[]);
    let mut flows = Vec::new();
    for ip in REMOTES {
        for dscp in [4, 5] {
            let fd = marked(&app, libc::SOCK_STREAM, addr(ip, STREAM_PORT), dscp);
            flows.push((dscp, TcpStream::from(fd)));
        }
    }

    daemon.reconfigure(&policy(global, ""));

    for (dscp, mut stream) in flows {
        stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        let mut data = vec![0; 1 << 16];
        // beyond what may be queued of an ended one
        let mut read = || again(|| stream.read(&mut data));
        let ended = (0..300).map(|_| read()).find(|read| !matches!(read, Ok(1..)));
        assert_eq!(ended.is_none(), dscp == 4, "{dscp} to {:?}: {ended:?}", stream.peer_addr());
    }
    daemon.stop_clean();
}
