//! Flows that are older than a policy in which the marks that they are known by mean something else: a
//! section has gone, or one has come before others. They go on by their own way or not at all.

use std::io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, WouldBlock};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};

use crate::client::{again, tcp_in, udp_in, Proto, PATIENCE, SILENCE};
use crate::daemon::{Daemon, UNOWNED};
use crate::gateway::Lan;
use crate::ground::{addr, any_of, await_link, ip_lines, sh, Ground, REMOTES};
use crate::kernel::{add_flows, await_member, forget_flows, table};
use crate::routes::{tunnel_up, GATEWAYS};
use crate::world::{bind, bind_at, Packet, Wire, RST};
use crate::{sized, wait_until};

pub const PORT: u16 = 8080;

/// Ways from one policy to the next.
pub const RELOAD: &str = "reload";
const CHANGES: [&str; 4] = [RELOAD, "restart", "kill -9", "stop"];

pub fn change(ground: &Ground, daemon: Daemon, how: &str, config: &str) -> Daemon {
    match how {
        RELOAD => {
            daemon.reconfigure(config);
            return daemon;
        }
        "restart" => daemon.leave(),
        "stop" => assert!(daemon.stop().success()),
        _ => daemon.kill9(),
    }
    Daemon::start(ground, config, &[])
}

/// A second tunnel, beside that of `routes`.
fn second_tunnel(ground: &Ground) {
    ip_lines(&format!(
        "link add vpn1 address 02:00:00:00:09:01 type veth peer name vout1 address \
         02:00:00:00:09:02 netns {}\n\
         addr add 10.9.0.1/24 dev vpn1\naddr add fd00:9::1/64 dev vpn1 nodad\n\
         neigh add 10.9.0.2 lladdr 02:00:00:00:09:02 dev vpn1\n\
         neigh add fd00:9::2 lladdr 02:00:00:00:09:02 dev vpn1\nlink set vpn1 up\n",
        ground.outside_path()
    ));
    ground.outside(|| {
        ip_lines(
            "addr add 10.9.0.2/24 dev vout1\naddr add fd00:9::2/64 dev vout1 nodad\n\
             neigh add 10.9.0.1 lladdr 02:00:00:00:09:01 dev vout1\n\
             neigh add fd00:9::1 lladdr 02:00:00:00:09:01 dev vout1\nlink set vout1 up\n",
        );
    });
    await_link(&[("10.9.0.1", "10.9.0.2"), ("fd00:9::1", "fd00:9::2")]);
}

pub fn sections(names: &str) -> String {
    let section = |name: &str| match name {
        "vpn" => format!("[route vpn]\ninterface = vpn0\n{GATEWAYS}"),
        // answers come in by the other interface
        "plain" => format!("[route plain]\ninterface = vpn0\n{GATEWAYS}masquerade = no\n"),
        "two" => "[route two]\ninterface = vpn1\ngateway = 10.9.0.2\ngateway = fd00:9::2\n".into(),
        "mihomo" => "[tproxy mihomo]\nport = 7893\n".into(),
        // its interface is not there
        "none" => "[route none]\ninterface = vpn2\n".into(),
        "drop" => String::new(),
        _ => format!("[tproxy {name}]\nport = 7999\n"),
    };
    names.split_whitespace().map(section).collect()
}

/// These sections, and a target for a cgroup and the LAN.
pub fn policy(names: &str, target: &str) -> String {
    format!(
        "{}[rules]\n{target} = /app\ndrop = /drop\n[gateway lan]\ninterface = br-lan\n\
         target = {target}\n",
        sections(names)
    )
}

/// The remote hosts, a proxy, and what leaves for the world and by the second tunnel.
pub struct Scene<'a> {
    ground: &'a Ground,
    pub lan: Lan<'a>,
    wires: [Wire; 2],
    listeners: Vec<TcpListener>,
}

/// A connection of the cgroup or of a client, and its other end.
#[derive(Debug)]
pub struct Connection {
    is_local: bool,
    pub own: TcpStream,
    pub end: TcpStream,
}

fn listen(at: SocketAddr) -> TcpListener {
    let fd = bind(at, libc::SOCK_STREAM);
    // SAFETY: an open socket.
    assert_eq!(unsafe { libc::listen(fd.as_raw_fd(), 8) }, 0);
    TcpListener::from(fd)
}

impl Scene<'_> {
    pub fn new(ground: &Ground) -> Scene<'_> {
        tunnel_up(ground);
        second_tunnel(ground);
        let wires = [Wire::open(ground), Wire::between(ground, "vpn1", "vout1")];
        let mut listeners = ground
            .outside(|| REMOTES.map(|ip| listen(addr(ip, PORT))))
            .into_iter()
            .collect::<Vec<_>>();
        listeners.extend(REMOTES.map(|ip| listen(addr(any_of(ip), 7893))));
        Scene { ground, lan: Lan::new(ground), wires, listeners }
    }

    fn start(&self, config: &str) -> Daemon {
        let daemon = Daemon::start(self.ground, config, &[]);
        await_member(&self.ground.cgroup("/drop"), "drop");
        daemon
    }

    /// One of each family, of the cgroup and of a client, whose other end is at a proxy or not.
    fn connections(&self, cgroup: &Path, proxied: bool) -> Vec<Connection> {
        let (remote, proxy) = self.listeners.split_at(2);
        let listeners = if proxied { proxy } else { remote };
        let all = REMOTES.into_iter().zip(listeners).flat_map(|(ip, listener)| {
            [true, false].map(|is_local| {
                let to = addr(ip, PORT);
                let own = match is_local {
                    true => tcp_in(cgroup, to),
                    false => self.lan.client(0).run(|| TcpStream::connect(to).expect("connect")),
                };
                // it ends by a reset: a FIN is sent again, and may be by another policy's way
                let at_once = libc::linger { l_onoff: 1, l_linger: 0 };
                setsockopt(&own, sockopt::Linger, &at_once).expect("set SO_LINGER");
                let (end, _) = listener.accept().expect("accept");
                Connection { is_local, own, end }
            })
        });
        let mut all: Vec<Connection> = all.collect();
        all.iter_mut().for_each(|each| assert!(each.talks(), "{each:?} at first"));
        all
    }

    /// What has left for the remote hosts, or with their addresses, by a wire that is not theirs; without
    /// resets.
    pub fn left(&mut self) -> Vec<Packet> {
        let mut left: Vec<Packet> = self.wires.iter_mut().flat_map(Wire::packets).collect();
        let remote = |end: SocketAddr| REMOTES.contains(&end.ip());
        left.retain(|packet| remote(packet.dst) || remote(packet.src));
        left.retain(|packet| packet.flags & RST == 0 && packet.proto != Proto::Icmp);
        left
    }
}

impl Connection {
    /// Whether each end hears the other, the remote one first.
    fn talks(&mut self) -> bool {
        let mut data = [0; 16];
        for end in [&self.own, &self.end] {
            end.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        }
        let _ = self.end.write(b"from remote");
        let heard = again(|| self.own.read(&mut data)).is_ok_and(|n| n > 0);
        let _ = self.own.write(b"to remote");
        heard && again(|| self.end.read(&mut data)).is_ok_and(|n| n > 0)
    }

    /// The same, whatever has been sent before.
    pub fn goes_on(&mut self) -> bool {
        for end in [&mut self.own, &mut self.end] {
            end.set_nonblocking(true).expect("set O_NONBLOCK");
            while end.read(&mut [0; 4096]).is_ok_and(|n| n > 0) {}
            end.set_nonblocking(false).expect("clear O_NONBLOCK");
        }
        self.talks()
    }

    /// Whether the application is told that it has ended, by and by or when it sends.
    pub fn is_cut(&mut self, sends: bool) -> bool {
        self.own.set_nonblocking(true).expect("set O_NONBLOCK");
        let mut data = [0; 16];
        wait_until(PATIENCE, || {
            let sent = !sends || self.own.write(b"to remote").is_ok();
            let read = self.own.read(&mut data);
            let waits = read.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
            !(sent && (waits || read.is_ok_and(|n| n > 0)))
        })
    }
}

/// What cannot go on is cut, this host's at once, and nothing that is sent in it leaves by another way:
/// the section that it was a flow of is no more, and another target has its mark.
#[test]
fn a_connection_whose_section_is_no_more() {
    let ground = ground!("ways");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    for how in CHANGES {
        for (old, new) in [
            ("vpn", "two"),
            ("vpn", "mihomo"),
            ("plain", "two"),
            ("plain", "mihomo"),
            ("mihomo", "two"),
            ("vpn", "drop"),
        ] {
            let daemon = scene.start(&policy(old, old));
            let mut all = scene.connections(&cgroup, old == "mihomo");
            // after a stop nothing is known of a client's
            all.retain(|each| each.is_local || how != "stop");
            scene.left();

            let daemon = change(&ground, daemon, how, &policy(new, new));

            for each in &mut all {
                let when = format!("{how}, {old} to {new}: {each:?}");
                if each.is_local {
                    assert!(each.is_cut(false), "{when}: not cut\n{}", daemon.logs());
                }
                let _ = each.end.write(b"from remote");
                let _ = each.own.write(b"to remote");
                assert!(each.is_local || new == "drop" || each.is_cut(true), "{when}: goes on");
                assert_eq!(scene.left(), [], "{when}");
            }
            daemon.stop_clean();
        }
    }
}

/// A client's that is to go on to a proxy is cut as well, whatever the default: that is not the proxy's.
#[test]
fn a_connection_of_a_client_whose_section_is_no_more() {
    let ground = ground!("ways-default");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    for how in &CHANGES[..3] {
        for (default, old) in [
            ("drop", "vpn"),
            ("drop", "plain"),
            ("mihomo", "vpn"),
            ("two", "vpn"),
            ("two", "plain"),
        ] {
            let config = |names: &str, target: &str| {
                let others = if default == "two" { "two" } else { "" };
                let proxy = if names.contains("mihomo") { "" } else { "mihomo" };
                let sections = policy(&format!("{names} {proxy} {others}"), target);
                format!("[global]\ndefault = {default}\nbypass-user = root\n{sections}")
            };
            let daemon = Daemon::start(&ground, &config(old, old), &[]);
            let mut all = scene.connections(&cgroup, false);
            all.retain(|each| !each.is_local);
            scene.left();

            let daemon = change(&ground, daemon, how, &config("mihomo", "mihomo"));

            for each in &mut all {
                let when = format!("default {default}, {how}, {old} to mihomo: {each:?}");
                let _ = each.end.write(b"from remote");
                let _ = each.own.write(b"to remote");
                assert!(each.is_cut(true), "{when}: goes on\n{}", daemon.logs());
                assert_eq!(scene.left(), [], "{when}");
            }
            daemon.stop_clean();
        }
    }
}

/// What has its way still goes on, whatever mark that has by now, where its target stays and where no
/// rule decides for it any more.
#[test]
fn a_connection_whose_section_has_moved() {
    let ground = ground!("ways-moved");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    for how in &CHANGES[..3] {
        for (old, was, new, is) in [
            ("vpn", "vpn", "first vpn", "vpn"),
            ("vpn", "vpn", "first two vpn", "direct"),
            ("vpn two", "vpn", "two vpn", "vpn"),
            ("mihomo", "mihomo", "two mihomo", "mihomo"),
            ("mihomo", "mihomo", "two mihomo", "direct"),
            ("mihomo two", "mihomo", "two mihomo", "direct"),
        ] {
            let daemon = scene.start(&policy(old, was));
            let mut all = scene.connections(&cgroup, was == "mihomo");
            scene.left();

            let daemon = change(&ground, daemon, how, &policy(new, is));

            for each in &mut all {
                let talks = each.talks();
                let log = daemon.logs();
                assert!(talks, "{how}, {old} to {new}, {is}: {each:?} was cut\n{log}");
            }
            assert_eq!(scene.left(), [], "{how}, {old} to {new}, {is}");
            daemon.stop_clean();
        }
    }
}

/// What a socket sends whose route did not masquerade, after the remote host has spoken: it is no
/// answer to that.
#[test]
fn datagrams_of_a_route_without_masquerading() {
    let ground = ground!("ways-plain");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let _proxies = REMOTES.map(|ip| bind(addr(any_of(ip), 7893), libc::SOCK_DGRAM));
    let remotes = ground
        .outside(|| REMOTES.map(|ip| UdpSocket::from(bind(addr(ip, PORT), libc::SOCK_DGRAM))));
    for how in &CHANGES[..3] {
        for (new, is) in
            [("plain", "drop"), ("", "drop"), ("plain mihomo", "mihomo"), ("mihomo", "mihomo")]
        {
            let daemon = scene.start(&policy("plain", "plain"));
            let mut all = Vec::new();
            for remote in &remotes {
                let to = remote.local_addr().expect("its address");
                let own = udp_in(&cgroup, to.ip());
                bind_at(&own, addr(any_of(to.ip()), 6881 + u16::from(to.is_ipv6())));
                let any = addr(any_of(to.ip()), 0);
                let client = scene.lan.client(0).run(|| UdpSocket::bind(any).expect("bind"));
                for own in [own, client] {
                    remote.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                    own.send_to(b"hello", to).expect("send");
                    let (_, from) = again(|| remote.recv_from(&mut [0; 16])).expect("receive");
                    all.push((own, remote, from, to));
                }
            }

            let daemon = change(&ground, daemon, how, &policy(new, is));

            scene.left();
            for _ in 0..3 {
                for (own, remote, from, to) in &all {
                    remote.send_to(b"from remote", *from).expect("send");
                    own.set_read_timeout(Some(SILENCE / 8)).expect("a timeout");
                    let _ = again(|| own.recv(&mut [0; 16]));
                    let _ = own.send_to(b"to remote", *to);
                }
            }
            assert_eq!(scene.left(), [], "{how}, {new:?}, {is}");
            daemon.stop_clean();
        }
    }
}

/// How long a sender pauses.
const PAUSE: Duration = Duration::from_millis(1);

/// What a cgroup and a client have with the remote hosts: TCP, UDP of both families, and who is at the
/// other end of the UDP of each.
pub struct Talk {
    pub tcp: Vec<Connection>,
    pub udp: Vec<(UdpSocket, UdpSocket)>,
    /// Datagrams that have no way, as their sender is told.
    refused: AtomicUsize,
    /// Whether the other ends are a proxy's.
    proxied: bool,
    /// The other ends of connections do not speak meanwhile.
    pub hushed: bool,
}

impl Talk {
    pub fn new(scene: &mut Scene, cgroup: &Path, remotes: &[UdpSocket]) -> Talk {
        let datagrams = |remote: &UdpSocket| {
            let to = remote.local_addr().expect("its address");
            let client = scene.lan.client(0);
            let any = addr(any_of(to.ip()), 0);
            let client = client.run(|| UdpSocket::bind(any).expect("bind"));
            [udp_in(cgroup, to.ip()), client].map(|own| {
                own.connect(to).expect("connect");
                (own, remote.try_clone().expect("clone"))
            })
        };
        let udp = remotes.iter().flat_map(datagrams).collect();
        let tcp = scene.connections(cgroup, false);
        let talk = Talk { tcp, udp, refused: AtomicUsize::new(0), proxied: false, hushed: false };
        assert!(talk.udp.iter().all(Talk::is_answered), "at first");
        talk
    }

    /// The same with a proxy; UDP of the client alone.
    pub fn proxied(scene: &Scene, cgroup: &Path) -> Talk {
        let datagrams = |ip: IpAddr| {
            let proxy = UdpSocket::from(bind(addr(any_of(ip), 7893), libc::SOCK_DGRAM));
            proxy.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            let (client, to) = (scene.lan.client(0), addr(ip, PORT));
            let own = client.run(|| UdpSocket::bind(addr(any_of(ip), 0)).expect("bind"));
            own.connect(to).expect("connect");
            own.send(b"hello").expect("send");
            let (_, from) = again(|| proxy.recv_from(&mut [0; 16])).expect("the proxy hears it");
            let end = UdpSocket::from(bind(to, libc::SOCK_DGRAM));
            end.connect(from).expect("connect");
            (own, end)
        };
        let udp = REMOTES.map(datagrams).into();
        let tcp = scene.connections(cgroup, true);
        let talk = Talk { tcp, udp, refused: AtomicUsize::new(0), proxied: true, hushed: false };
        assert!(talk.udp.iter().all(Talk::is_answered), "at first");
        talk
    }

    /// Whether the remote host hears of one from now on, and is heard.
    pub fn is_answered((own, remote): &(UdpSocket, UdpSocket)) -> bool {
        let mut data = [0; 16];
        for end in [own, remote] {
            end.set_nonblocking(true).expect("set O_NONBLOCK");
            // with the errors that are left of what was refused meanwhile
            while end.recv(&mut data).err().is_none_or(|error| error.kind() != WouldBlock) {}
            end.set_nonblocking(false).expect("clear O_NONBLOCK");
            end.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        }
        if let Err(error) = own.send(b"to remote") {
            println!("{error}");
            return false;
        }
        let heard = again(|| remote.recv_from(&mut data));
        heard.is_ok_and(|(_, from)| {
            remote.send_to(b"from remote", from).expect("send");
            again(|| own.recv(&mut data)).is_ok()
        })
    }

    /// Has all of them and their other ends send, again and again, while `f` runs.
    pub fn during<T>(&self, f: impl FnOnce() -> T) -> T {
        let done = AtomicBool::new(false);
        let wait = |on: bool| {
            for end in self.tcp.iter().flat_map(|each| [&each.own, &each.end]) {
                end.set_nonblocking(!on).expect("set O_NONBLOCK");
            }
        };
        wait(false);
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for (own, end) in &self.udp {
                        let _ = match self.proxied {
                            true => end.send(b"meanwhile"),
                            false => end.send_to(b"meanwhile", own.local_addr().expect("its own")),
                        };
                        let kind = own.send(b"meanwhile").map_err(|error| error.kind()).err();
                        if [ConnectionRefused, HostUnreachable, NetworkUnreachable]
                            .iter()
                            .any(|refused| kind == Some(*refused))
                        {
                            self.refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    for each in &self.tcp {
                        let ways = [(&each.own, &each.end), (&each.end, &each.own)];
                        for (mut from, mut to) in
                            ways.into_iter().take(2 - usize::from(self.hushed))
                        {
                            let _ = from.write(b"meanwhile");
                            let _ = to.read(&mut [0; 4096]);
                        }
                    }
                    std::thread::sleep(PAUSE);
                }
            });
            let result = std::panic::catch_unwind(AssertUnwindSafe(f));
            done.store(true, Ordering::Relaxed);
            sender.join().expect("a sender");
            wait(true);
            result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// However many flows there are that move too, and one change after the other: what is sent meanwhile
/// leaves by no other way, and goes on in the end. (Not what was sent without a table, which cuts flows.)
#[test]
fn flows_that_move_among_many() {
    let ground = ground!("ways-many");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = ground
        .outside(|| REMOTES.map(|ip| UdpSocket::from(bind(addr(ip, PORT), libc::SOCK_DGRAM))));
    let moves = || table().contains("chain moved ");
    for how in [RELOAD, "kill -9", "killed amid", "healed amid"] {
        let env = if how == "healed amid" { &[UNOWNED][..] } else { &[] };
        let mut daemon = Daemon::start_in(&ground, &policy("vpn", "vpn"), &[], env);
        let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
        add_flows(false, 0x0100_0000, 20_000);
        scene.left();

        daemon = talk.during(|| {
            for sections in ["two vpn", "vpn two", "mihomo none vpn", "two mihomo vpn", "vpn"] {
                let config = policy(sections, "vpn");
                if !how.ends_with("amid") {
                    daemon = change(&ground, daemon, how, &config);
                    continue;
                }
                daemon.configure(&config);
                daemon.signal(Signal::SIGHUP);
                assert!(wait_until(PATIENCE, moves), "{sections}\n{}", daemon.logs());
                match env {
                    [] => daemon = change(&ground, daemon, "kill -9", &config),
                    _ => sh("nft delete table inet cgtproxy"),
                }
            }
            daemon
        });

        let when = format!("{how}\n{}", daemon.logs());
        let left = scene.left();
        // without a table nothing is kept from leaving
        assert!(left.is_empty() || !env.is_empty(), "{left:?}, {when}");
        let done = || table().contains("chain output ") && !moves();
        assert!(wait_until(PATIENCE, done), "{when}\n{}", table());
        scene.left();
        for pair in &talk.udp {
            assert!(Talk::is_answered(pair) || !env.is_empty(), "{pair:?}, {when}");
        }
        for each in &mut talk.tcp {
            assert!(each.goes_on() || !env.is_empty(), "{each:?}, {when}");
        }
        assert_eq!(scene.left(), [], "{when}");
        daemon.stop_clean();
        forget_flows();
    }
}

/// Sections that say their marks keep them when they change places, and their routes go to other tables:
/// what a cgroup sends is never without a route, which would refuse it.
#[test]
fn routes_that_change_tables() {
    let ground = ground!("ways-tables");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = ground
        .outside(|| REMOTES.map(|ip| UdpSocket::from(bind(addr(ip, PORT), libc::SOCK_DGRAM))));
    // no gateway: the marks of what is routed go by the order
    let policy = |names: &str| {
        let section = |name: &str| {
            let mark = ["vpn", "two", "none"].iter().position(|own| *own == name);
            let mark = mark.expect("a route") + 1;
            sections(name).replacen('\n', &format!("\nmark = {mark:#x}000000\n"), 1)
        };
        let sections: String = names.split(' ').map(section).collect();
        format!("{sections}[rules]\nvpn = /app\n")
    };
    let daemon = Daemon::start(&ground, &policy("vpn two"), &[]);
    await_member(&cgroup, "vpn");
    let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
    // what clients send has no section
    talk.tcp.retain(|each| each.is_local);
    talk.udp = talk.udp.into_iter().step_by(2).collect();
    scene.left();

    talk.during(|| {
        for _ in 0..sized(10, 50) {
            for names in ["two vpn", "none two vpn", "vpn none two", "none vpn", "vpn two"] {
                daemon.reconfigure(&policy(names));
            }
        }
    });

    let log = daemon.logs();
    for each in &mut talk.tcp {
        assert!(each.goes_on(), "{each:?} was cut\n{log}");
    }
    assert!(talk.udp.iter().all(Talk::is_answered), "{log}");
    assert_eq!(talk.refused.into_inner(), 0, "datagrams refused\n{log}");
    assert_eq!(scene.left(), [], "{log}");
    daemon.stop_clean();
}

/// A reload waits for flows without number, and who asks meanwhile is answered at once.
#[test]
fn a_reload_that_moves_many_flows_answers_meanwhile() {
    let ground = ground!("ways-asked");
    let scene = Scene::new(&ground);
    let daemon = scene.start(&policy("vpn two", "vpn"));
    add_flows(false, 0x0100_0000, 10_000);
    let answered = ["two vpn", "vpn two"].into_iter().cycle().take(10).any(|sections| {
        let before = daemon.logs().len();
        daemon.configure(&policy(sections, "vpn"));
        daemon.signal(Signal::SIGHUP);
        let done = || daemon.logs()[before..].contains("reloaded ");
        let moves = || done() || table().contains("chain moved ");
        assert!(wait_until(PATIENCE, moves), "{}", daemon.logs());
        let in_time = daemon.while_stopped(|| {
            daemon.signal(Signal::SIGUSR1);
            !done()
        });
        let said = || ["status: ", "reloaded "].map(|what| daemon.logs()[before..].find(what));
        assert!(
            wait_until(2 * PATIENCE, || said().iter().all(Option::is_some)),
            "{}",
            daemon.logs()
        );
        let [status, reloaded] = said();
        // where the processor is another's, all may have been done before it was asked
        assert!(!in_time || status < reloaded, "{}", daemon.logs());
        in_time
    });
    assert!(answered, "{}", daemon.logs());
    daemon.stop_clean();
    forget_flows();
}

/// Nor does an application that has to connect again: it is told ahead of them.
#[test]
fn who_is_to_connect_again_does_not_wait_for_many_flows() {
    let ground = ground!("ways-told");
    let scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let daemon = scene.start(&policy("vpn two", "direct"));
    add_flows(false, 0x0100_0000, 10_000);
    let ahead = ["two vpn", "vpn two"].into_iter().cycle().take(10).any(|sections| {
        let mut all = scene.connections(&cgroup, false);
        all.retain(|each| each.is_local);
        let before = daemon.logs().len();
        daemon.configure(&policy(sections, "drop"));
        daemon.signal(Signal::SIGHUP);
        assert!(all.iter_mut().all(|each| each.is_cut(false)), "{}", daemon.logs());
        // where the processor is another's, all may have moved before that is seen
        let ahead = daemon.while_stopped(|| table().contains("chain moved "));
        let done = || daemon.logs()[before..].contains("reloaded ");
        assert!(wait_until(2 * PATIENCE, done), "{}", daemon.logs());
        daemon.reconfigure(&policy(sections, "direct"));
        ahead
    });
    assert!(ahead, "{}", daemon.logs());
    daemon.stop_clean();
    forget_flows();
}
