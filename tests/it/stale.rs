//! Flows that are older than the policy that they are under: their sockets are ended, so that no
//! packet goes the old way whoever speaks next, and the applications connect again at once.
//!
//! A new network namespace has no conntrack before there is our table, so for conntrack a flow that
//! began before that begins with whatever comes next: here the remote host speaks first.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{again, connect, socket_in, tcp_in, udp_in, Proto, PATIENCE, SILENCE};
use crate::daemon::{Daemon, UNOWNED};
use crate::ground::{addr, any_of, ip, sh, sysctl, Ground, HOST4, HOSTS, REMOTE4, REMOTES};
use crate::kernel::{cgroup_id, has_chain, load, set_ids};
use crate::wait_until;
pub use crate::world::bind_at as bind_to;
use crate::world::{bind, set, Packet, Wire, RST};

const PORT: u16 = 8080;
const PROXY_PORT: u16 = 7893;

const CONFIG: &str = "
[global]
bypass = 203.0.113.200/29
[tproxy mihomo]
port = 7893
[tproxy other]
port = 7894
[rules]
drop   = /drop
mihomo = /proxied
";

/// Everything direct, but in force.
const BEFORE: &str = "
[global]
bypass = 203.0.113.200/29
[tproxy mihomo]
port = 7893
[tproxy other]
port = 7894
[rules]
drop = /elsewhere
";

fn listen(fd: OwnedFd) -> TcpListener {
    // SAFETY: an open socket.
    assert_eq!(unsafe { libc::listen(fd.as_raw_fd(), 8) }, 0);
    TcpListener::from(fd)
}

/// A TCP listener of a cgroup.
fn listener_in(cgroup: &Path, at: SocketAddr) -> TcpListener {
    let fd = socket_in(cgroup, libc::SOCK_STREAM, at.ip());
    bind_to(&fd, at);
    listen(fd)
}

/// An application's end of a flow and the remote one.
enum Flow {
    Tcp {
        own: TcpStream,
        remote: TcpStream,
        from: SocketAddr,
    },
    /// Connected or not.
    Udp {
        own: UdpSocket,
        remote: UdpSocket,
        to: SocketAddr,
        from: SocketAddr,
    },
}

/// The remote host's sockets.
struct Remote {
    tcp: Vec<TcpListener>,
    udp: Vec<UdpSocket>,
}

impl Remote {
    fn new(ground: &Ground) -> Remote {
        ground.outside(|| {
            let tcp = |ip| listen(bind(addr(ip, PORT), libc::SOCK_STREAM));
            let udp = |ip| UdpSocket::from(bind(addr(ip, PORT), libc::SOCK_DGRAM));
            Remote { tcp: REMOTES.map(tcp).into(), udp: REMOTES.map(udp).into() }
        })
    }

    /// The flows of several cgroups.
    fn all_flows(&self, cgroups: &[PathBuf]) -> Vec<Flow> {
        cgroups.iter().flat_map(|cgroup| self.flows(cgroup)).collect()
    }

    /// One TCP flow, one connected UDP socket and one that is not, of each family; each has been
    /// used in both directions.
    fn flows(&self, cgroup: &Path) -> Vec<Flow> {
        sysctl("net/ipv4/ip_local_port_range", "30000 39999");
        let mut flows = Vec::new();
        for (at, ip) in REMOTES.into_iter().enumerate() {
            let to = addr(ip, PORT);
            let own = tcp_in(cgroup, to);
            let (remote, from) = self.tcp[at].accept().expect("accept outside");
            remote.set_nodelay(true).expect("set TCP_NODELAY");
            flows.push(Flow::Tcp { own, remote, from });
            for connected in [true, false] {
                let own = udp_in(cgroup, ip);
                match connected {
                    true => {
                        own.connect(to).expect("connect");
                        own.send(b"hello").expect("send")
                    }
                    false => own.send_to(b"hello", to).expect("send"),
                };
                let remote = self.udp[at].try_clone().expect("clone");
                let (_, from) = again(|| remote.recv_from(&mut [0; 16])).expect("receive outside");
                flows.push(Flow::Udp { own, remote, to, from });
            }
        }
        for flow in &mut flows {
            assert!(flow.talk(), "{:?} before", flow.from());
        }
        flows
    }
}

impl Flow {
    fn from(&self) -> SocketAddr {
        match self {
            Flow::Tcp { from, .. } | Flow::Udp { from, .. } => *from,
        }
    }

    /// Whether the kernel has ended the application's socket.
    fn is_ended(&self) -> bool {
        match self {
            Flow::Tcp { own, .. } => own.peer_addr().is_err(),
            Flow::Udp { own, .. } => own.local_addr().is_ok_and(|own| own.port() == 0),
        }
    }

    /// The remote host speaks, then the application; whether both were heard. An error of the
    /// application's socket does not keep it from sending.
    fn talk(&mut self) -> bool {
        let mut data = [0; 16];
        match self {
            Flow::Tcp { own, remote, .. } => {
                let _ = remote.write(b"from remote");
                let heard = again(|| own.read(&mut data)).is_ok_and(|n| n > 0);
                let sent = own.write(b"to remote").is_ok();
                let _ = remote.set_read_timeout(Some(PATIENCE));
                heard && sent && again(|| remote.read(&mut data)).is_ok_and(|n| n > 0)
            }
            Flow::Udp { own, remote, to, from } => {
                let _ = remote.send_to(b"from remote", *from);
                let heard = again(|| own.recv(&mut data)).is_ok();
                let sent = match own.peer_addr() {
                    Ok(_) => own.send(b"to remote"),
                    Err(_) => own.send_to(b"to remote", *to),
                };
                heard && sent.is_ok() && {
                    let _ = remote.set_read_timeout(Some(PATIENCE));
                    again(|| remote.recv_from(&mut data)).is_ok()
                }
            }
        }
    }
}

/// Packets to the remote host; without the kernel's answers (resets, port unreachable) to what it
/// sends to a socket that has been ended. They are nobody's, and what any closed port gives.
fn said(wire: &mut Wire) -> Vec<Packet> {
    let mut packets = wire.to_remote();
    packets.retain(|p| match p.proto {
        Proto::Tcp => p.flags & RST == 0,
        Proto::Udp => true,
        Proto::Icmp => false,
    });
    packets
}

/// Seven messages of each side, the remote's first; none may arrive there.
#[track_caller]
fn expect_silence(wire: &mut Wire, flows: &mut [Flow], when: &str) {
    // the next port of an ended socket must be none that the remote host speaks to: that would be a reply
    sysctl("net/ipv4/ip_local_port_range", "50000 59999");
    wire.packets();
    for _ in 0..7 {
        flows.iter_mut().for_each(|flow| {
            let mut data = [0; 16];
            match flow {
                Flow::Tcp { own, remote, .. } => {
                    let _ = remote.write(b"from remote");
                    let _ = own.set_read_timeout(Some(Duration::from_millis(5)));
                    let _ = own.read(&mut data);
                    let _ = own.write(b"to remote");
                }
                Flow::Udp { own, remote, to, from } => {
                    let _ = remote.send_to(b"from remote", *from);
                    let _ = own.set_read_timeout(Some(Duration::from_millis(5)));
                    let _ = own.recv(&mut data);
                    let _ = own.send(b"to remote").or_else(|_| own.send_to(b"to remote", *to));
                }
            }
        });
    }
    assert_eq!(said(wire), [], "{when}");
}

/// That the application learns of it at once.
#[track_caller]
fn expect_ended(daemon: &Daemon, flows: &mut [Flow]) {
    let text = format!("ended {} sockets", flows.len());
    assert!(daemon.wait_log(&text, PATIENCE), "not {text}:\n{}", daemon.logs());
    for flow in flows {
        let ended = match flow {
            Flow::Tcp { own, .. } => own.write(b"?").is_err(),
            Flow::Udp { own, .. } => {
                own.peer_addr().is_err() && own.local_addr().is_ok_and(|a| a.port() == 0)
            }
        };
        assert!(ended, "{} goes on", flow.from());
    }
}

/// How many the daemon has told that it ended.
fn ended(daemon: &Daemon) -> usize {
    let number = |line: &str| line.split_once("ended ")?.1.split(' ').next()?.parse::<usize>().ok();
    daemon.logs().lines().filter_map(number).sum()
}

/// That flows which are not the policy's go on.
#[track_caller]
fn expect_spared(flows: &mut [Flow]) {
    for flow in flows {
        assert!(flow.talk(), "{} was ended", flow.from());
    }
}

fn cgroups(ground: &Ground) -> [PathBuf; 2] {
    ground.cgroups(["/drop", "/proxied"])
}

/// Those, and one below each.
fn cgroups_and_below(ground: &Ground) -> [PathBuf; 4] {
    ground.cgroups(["/drop", "/proxied", "/drop/below", "/proxied/below"])
}

fn wire_and_remote(ground: &Ground) -> (Wire, Remote) {
    (Wire::open(ground), Remote::new(ground))
}

/// A start ends what began before it, unless that began under a daemon of the same policy.
#[test]
fn flows_older_than_the_daemon() {
    let ground = ground!("stale");
    let (mut wire, remote) = wire_and_remote(&ground);
    let cgroups = cgroups_and_below(&ground);
    for when in ["after a start", "after a restart"] {
        let mut old = remote.all_flows(&cgroups);

        let daemon = Daemon::start(&ground, CONFIG, &[]);

        expect_ended(&daemon, &mut old);
        expect_silence(&mut wire, &mut old, when);
        // on-exit = remove is the default
        assert!(daemon.stop().success());
    }
    let mut old = remote.all_flows(&cgroups);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    expect_ended(&daemon, &mut old);

    // takes over what is in force: nothing to end
    daemon.kill9();
    let daemon = Daemon::start(&ground, CONFIG, &[]);

    expect_silence(&mut wire, &mut old, "after kill -9");
    assert!(!daemon.logs().contains("ended"), "{}", daemon.logs());
}

/// A new rule ends what its cgroups began before it, by a reload and by a start that takes over.
#[test]
fn flows_older_than_the_rule() {
    let ground = ground!("stale-rule");
    let (mut wire, remote) = wire_and_remote(&ground);
    let cgroups = cgroups(&ground);
    let mut old = remote.all_flows(&cgroups);
    let mut others = remote.flows(&ground.cgroup("/other"));
    let daemon = Daemon::start(&ground, BEFORE, &[]);

    daemon.reconfigure(CONFIG);

    expect_ended(&daemon, &mut old);
    expect_silence(&mut wire, &mut old, "after a reload");
    expect_spared(&mut others);

    daemon.reconfigure(BEFORE);
    drop(old);
    let mut old = remote.all_flows(&cgroups);
    daemon.kill9();
    let daemon = Daemon::start(&ground, CONFIG, &[]);

    expect_ended(&daemon, &mut old);
    expect_silence(&mut wire, &mut old, "after kill -9 and another policy");
}

/// Where a daemon does not live to end what its table finds stale, the next one does that.
#[test]
fn a_daemon_that_is_killed_before_it_has_looked() {
    let ground = ground!("stale-killed");
    let (mut wire, remote) = wire_and_remote(&ground);
    let cgroups = cgroups(&ground);
    let dropped = cgroup_id(&cgroups[0]).expect("its id");
    for how in ["start", "reload", "start that takes over", "repair"] {
        let env = if how == "repair" { &[UNOWNED][..] } else { &[] };
        let slow = |config: &str| Daemon::slow(&ground, config, env);
        let mut old = Vec::new();
        let mut daemon = match how {
            "start" => {
                old = remote.all_flows(&cgroups);
                slow(CONFIG)
            }
            "repair" => slow(CONFIG),
            _ => slow(BEFORE),
        };
        assert!(how == "start" || daemon.ready(), "{}", daemon.logs());
        match how {
            "start" => {}
            "repair" => daemon.while_stopped(|| {
                sh("nft delete table inet cgtproxy");
                old = remote.all_flows(&cgroups);
            }),
            _ => old = remote.all_flows(&cgroups),
        }
        match how {
            "reload" => {
                daemon.configure(CONFIG);
                daemon.signal(Signal::SIGHUP);
            }
            "start that takes over" => {
                daemon.kill9();
                daemon = slow(CONFIG);
            }
            _ => {}
        }
        let in_force = || set_ids("cg_drop").is_some_and(|ids| ids.contains(&dropped));
        assert!(wait_until(PATIENCE, in_force), "{how}\n{}", daemon.logs());
        daemon.kill9();
        assert!(!old.iter().any(Flow::is_ended), "{how}: it was too fast");

        let daemon = Daemon::start(&ground, CONFIG, &[]);

        expect_ended(&daemon, &mut old);
        expect_silence(&mut wire, &mut old, how);
        daemon.kill9();
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        assert!(!daemon.logs().contains("ended"), "{how}\n{}", daemon.logs());
        daemon.stop_clean();
    }
}

/// Who is told that a start or a reload is done finds nothing in the table of a look that goes on, unless
/// that takes long.
#[test]
fn what_is_told_to_be_done_is_done() {
    let ground = ground!("stale-done");
    let remote = Remote::new(&ground);
    let cgroups = cgroups(&ground);
    for start in [BEFORE, CONFIG] {
        let _old = remote.all_flows(&cgroups);
        let mut daemon = Daemon::slow(&ground, start, &[]);
        assert!(daemon.ready(), "{}", daemon.logs());
        assert!(has_chain("output") && !has_chain("unjudged"), "start");
        if start == BEFORE {
            daemon.reconfigure(CONFIG);
            assert!(has_chain("output") && !has_chain("unjudged"), "reload");
        }
        assert_eq!(ended(&daemon), 12, "{}", daemon.logs());
        daemon.stop_clean();
    }
}

/// The default ends what no rule covers.
#[test]
fn flows_of_the_default() {
    let ground = ground!("stale-default");
    let (mut wire, remote) = wire_and_remote(&ground);
    let mut old = remote.flows(&ground.cgroup("/any"));
    let mut free = remote.flows(&ground.cgroup("/free"));

    let config = "[global]\ndefault = drop\n[rules]\ndirect = /free";
    let daemon = Daemon::start(&ground, config, &[]);

    expect_ended(&daemon, &mut old);
    expect_silence(&mut wire, &mut old, "by default");
    expect_spared(&mut free);
}

/// A repair ends what began while there was no table.
#[test]
fn flows_that_began_while_the_table_was_away() {
    let ground = ground!("stale-heal");
    let (mut wire, remote) = wire_and_remote(&ground);
    let cgroups = cgroups(&ground);
    let daemon = Daemon::start_in(&ground, CONFIG, &[], &[UNOWNED]);

    let mut old = daemon.while_stopped(|| {
        load("delete table inet cgtproxy");
        remote.all_flows(&cgroups)
    });

    expect_ended(&daemon, &mut old);
    expect_silence(&mut wire, &mut old, "after the repair");
}

/// The daemon is stopped when cgroups are made, and may lose the events about them.
#[test]
fn flows_of_cgroups_that_were_found_late() {
    let ground = ground!("stale-late");
    let (mut wire, remote) = wire_and_remote(&ground);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let many = ground.cgroup("/many");
    // the last round overflows the queue of events
    for (lost, made) in [(false, 0), (true, 17_000)] {
        let before = ended(&daemon);
        let (cgroups, mut old, mut others) = daemon.while_stopped(|| {
            for i in 0..made {
                std::fs::create_dir(many.join(i.to_string())).expect("make a cgroup");
            }
            let cgroups = cgroups_and_below(&ground);
            let (old, others) =
                (remote.all_flows(&cgroups), remote.flows(&ground.cgroup("/other")));
            // what is found within some 50 ms is not late
            std::thread::sleep(Duration::from_millis(100));
            (cgroups, old, others)
        });

        // not always all at once
        let told = || ended(&daemon) >= before + old.len();
        assert!(wait_until(PATIENCE, told), "{}", daemon.logs());
        // which is told behind the events that were kept
        let overflow = || daemon.logs().contains("events were lost");
        assert!(!lost || wait_until(PATIENCE, overflow), "{}", daemon.logs());
        expect_ended(&daemon, &mut old);
        expect_silence(&mut wire, &mut old, "found late");
        expect_spared(&mut others);

        drop(old);
        for cgroup in cgroups.iter().rev() {
            std::fs::remove_dir(cgroup).expect("remove a cgroup");
        }
    }
    assert!(daemon.stop().success());
}

/// The same for all cgroups below a root that is made again.
#[test]
fn flows_below_a_root_that_is_made_again() {
    let ground = ground!("stale-root");
    let (mut wire, remote) = wire_and_remote(&ground);
    let own = ground.cgroup("/own");
    let config = CONFIG.replace("[global]", &format!("[global]\ncgroup-root = {}", own.display()));
    let daemon = Daemon::start(&ground, &config, &[]);

    let mut old = daemon.while_stopped(|| {
        std::fs::remove_dir(&own).expect("remove the root");
        remote.all_flows(&ground.cgroups(["/own/drop", "/own/proxied"]))
    });

    expect_ended(&daemon, &mut old);
    expect_silence(&mut wire, &mut old, "in another root");
    assert!(daemon.stop().success());
}

/// What is to hold at the start of a policy, when it goes and when it comes by a reload; the log.
fn over_reloads(ground: &Ground, mut holds: impl FnMut(&str)) -> String {
    let daemon = Daemon::start(ground, CONFIG, &[]);
    holds("start");
    daemon.reconfigure(BEFORE);
    holds("direct");
    daemon.reconfigure(CONFIG);
    holds("reload");
    daemon.logs()
}

/// Services, and what others connected to, are never ended.
#[test]
fn services_are_never_ended() {
    let ground = ground!("stale-services");
    outlive(&ground);
}

/// Nor where a daemon was killed before it had put in any rule.
#[test]
fn services_are_never_ended_over_an_empty_table() {
    let ground = ground!("stale-empty");
    load("add table inet cgtproxy");
    outlive(&ground);
}

fn outlive(ground: &Ground) {
    let mut inbound = Vec::new();
    let mut services = Vec::new();
    for (at, cgroup) in (0..).zip(&cgroups(ground)) {
        for ip in HOSTS {
            let to = addr(ip, 41000 + at);
            let listener = listener_in(cgroup, to);
            let client = ground.outside(|| TcpStream::connect(to).expect("dial"));
            inbound.push((client, listener.accept().expect("accept").0));
            let udp = udp_in(cgroup, ip);
            bind_to(&udp, addr(ip, 20000 + at));
            let peer = ground.outside(|| UdpSocket::bind(addr(any_of(ip), 0)).expect("bind"));
            peer.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
            services.push((listener, udp, peer));
        }
    }
    inbound.iter_mut().for_each(|(client, service)| talk(client, service));

    let log = over_reloads(ground, |when| {
        // whoever speaks first
        for (client, service) in &mut inbound {
            talk(service, client);
            talk(client, service);
        }
        for (listener, udp, peer) in &services {
            let at = listener.local_addr().expect("still listening");
            let dialled = ground.outside(|| TcpStream::connect(at));
            dialled.unwrap_or_else(|e| panic!("{when}: {at} {e}"));
            let at = udp.local_addr().expect("still bound");
            peer.send_to(b"?", at).expect("send");
            let asked = again(|| udp.recv_from(&mut [0; 8]));
            let (_, from) = asked.unwrap_or_else(|e| panic!("{when}: {at} {e}"));
            udp.send_to(b"!", from).expect("answer");
            let answered = again(|| peer.recv(&mut [0; 8]));
            answered.unwrap_or_else(|e| panic!("{when}: answer of {at} {e}"));
        }
    });

    assert!(!log.contains("ended"), "{log}");
}

/// Nor are flows to this host itself, and to what is left alone.
#[test]
fn what_is_left_alone_is_never_ended() {
    let ground = ground!("stale-never");
    let spared = addr(ip("203.0.113.201"), PORT);
    let outside = ground.outside(|| listen(bind(spared, libc::SOCK_STREAM)));
    let here = HOSTS.map(|ip| TcpListener::bind(addr(ip, 42000)).expect("listen"));
    let cgroups = cgroups(&ground);
    let flow = |cgroup: &PathBuf, to: &TcpListener| {
        let own = tcp_in(cgroup, to.local_addr().expect("an address"));
        (own, to.accept().expect("accept").0)
    };
    let listeners = [&here[0], &here[1], &outside];
    let flows = cgroups.iter().flat_map(|cgroup| listeners.map(|to| flow(cgroup, to)));
    let mut flows: Vec<_> = flows.collect();

    let log = over_reloads(&ground, |_| flows.iter_mut().for_each(|(a, b)| talk(a, b)));

    assert!(!log.contains("ended"), "{log}");
}

/// Without its listener, conntrack knows who came.
#[test]
fn who_came_to_a_listener_that_is_gone() {
    let ground = ground!("stale-came");
    let [cgroup, _] = cgroups(&ground);
    let daemon = Daemon::start(&ground, BEFORE, &[]);
    let at = addr(HOST4, 41009);
    let listener = listener_in(&cgroup, at);
    let mut client = ground.outside(|| TcpStream::connect(at).expect("dial"));
    let (mut conn, _) = listener.accept().expect("accept");
    drop(listener);

    daemon.reconfigure(CONFIG);

    talk(&mut client, &mut conn);
}

/// The kernel takes its interface from an unconnected socket that is ended: it would send on by
/// whatever the main table says, once its cgroup is direct again.
#[test]
fn an_interface_is_never_lost() {
    let ground = ground!("stale-device");
    let cgroups = cgroups(&ground);
    let sockets: Vec<UdpSocket> = (cgroups.iter())
        .flat_map(|cgroup| REMOTES.map(|ip| (cgroup, ip)))
        .map(|(cgroup, ip)| {
            let socket = udp_in(cgroup, ip);
            // SAFETY: reads the name, of the length that goes with it.
            let rc = unsafe {
                let (level, option) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
                libc::setsockopt(socket.as_raw_fd(), level, option, c"in0".as_ptr().cast(), 4)
            };
            assert_eq!(rc, 0, "bind to a device: {}", std::io::Error::last_os_error());
            // a port of the kernel's choice
            socket.send_to(b"hello", addr(ip, PORT)).expect("send");
            socket
        })
        .collect();

    over_reloads(&ground, |when| {
        for socket in &sockets {
            let (mut name, mut len) = ([0u8; libc::IFNAMSIZ], libc::IFNAMSIZ as u32);
            // SAFETY: writes at most `len` bytes of the name.
            let rc = unsafe {
                let (level, option) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
                let to = name.as_mut_ptr().cast();
                libc::getsockopt(socket.as_raw_fd(), level, option, to, &raw mut len)
            };
            assert_eq!((rc, &name[..4]), (0, &b"in0\0"[..]), "{when}: {socket:?}");
        }
    });
}

/// Both ends of a connection hear each other.
#[track_caller]
fn talk(a: &mut TcpStream, b: &mut TcpStream) {
    for end in [&mut *a, &mut *b] {
        end.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    }
    let mut data = [0; 4];
    a.write_all(b"ping").expect("write");
    b.read_exact(&mut data).expect("hear the ping");
    b.write_all(b"pong").expect("write");
    a.read_exact(&mut data).expect("hear the pong");
}

/// A flow that a proxy has stays with it whatever the policy makes of its cgroup, but for `drop`.
#[test]
fn a_proxied_flow_stays() {
    let ground = ground!("stale-proxied");
    let mut wire = Wire::open(&ground);
    let proxied = &cgroups(&ground)[1];
    let proxies = REMOTES.map(|ip| listen(bind(addr(any_of(ip), PROXY_PORT), libc::SOCK_STREAM)));
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let mut flows = REMOTES.map(|ip| tcp_in(proxied, addr(ip, PORT)));
    let mut ends = proxies.each_ref().map(|proxy| proxy.accept().expect("accept").0);
    let mut check = |daemon: &Daemon| {
        for (own, end) in flows.iter_mut().zip(&mut ends) {
            talk(own, end);
        }
        assert!(!daemon.logs().contains("ended"), "{}", daemon.logs());
    };
    check(&daemon);

    for text in [
        // rules of others
        CONFIG.replace("/drop", "/dropped"),
        // another tproxy's, no one's, its own again
        CONFIG.replace("mihomo = /", "other = /"),
        BEFORE.to_string(),
        CONFIG.to_string(),
        // a section that changes
        CONFIG.replace("port = 7893", "port = 7893\nudp = no"),
    ] {
        daemon.reconfigure(&text);
        check(&daemon);
    }
    daemon.kill9();
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    check(&daemon);
    assert_eq!(said(&mut wire), []);

    daemon.reconfigure(&CONFIG.replace("mihomo = /proxied", "drop = /proxied"));
    assert!(daemon.wait_log("ended 2 sockets", PATIENCE), "{}", daemon.logs());
    assert!(flows[0].write(b"?").is_err());
}

/// From SIGHUP to the moment when an application that waits for an answer could connect again.
#[test]
fn a_stalled_application_learns_at_once() {
    let ground = ground!("stale-time");
    let remote = Remote::new(&ground);
    let cgroups = cgroups(&ground);
    for env in [&[UNOWNED][..], &[UNOWNED, ("CGTPROXY_NO_DESTROY", "1")]] {
        let daemon = Daemon::start_in(&ground, BEFORE, &[], env);
        for (at, cgroup) in cgroups.iter().enumerate() {
            let mut own = tcp_in(cgroup, addr(REMOTE4, PORT));
            let _end = remote.tcp[0].accept().expect("accept");
            own.write_all(b"a question").expect("write");
            // the kernel itself would take minutes
            let ends = env.len() == 1;
            let patience = if ends { PATIENCE } else { 8 * SILENCE };
            own.set_read_timeout(Some(patience)).expect("set a timeout");

            daemon.configure(CONFIG);
            let before = daemon.logs().len();
            let start = Instant::now();
            daemon.signal(Signal::SIGHUP);
            let error = again(|| own.read(&mut [0; 8])).expect_err("no answer");
            let (took, kind) = (start.elapsed(), error.kind());
            let target = ["drop", "proxied"][at];
            println!("to {target} with {} variables: {kind:?} after {took:?}", env.len());
            match ends {
                true => assert_eq!(kind, ErrorKind::ConnectionAborted),
                false => {
                    assert_eq!(kind, ErrorKind::WouldBlock, "it still waits");
                    let text = "unable to end sockets";
                    assert_eq!(daemon.logs().matches(text).count(), 1, "{}", daemon.logs());
                }
            }
            let reloaded = || daemon.logs()[before..].contains("reloaded");
            assert!(wait_until(PATIENCE, reloaded), "{}", daemon.logs());
            daemon.reconfigure(BEFORE);
        }
        assert!(daemon.stop().success());
    }
}

/// Where sockets cannot be ended, packets decide: what a process sends in a proxied flow is dropped once
/// its target does that, as a whole or to this protocol or family, be it by the default; else, also where
/// the target leaves the destination alone, the flow stays.
#[test]
fn what_is_dropped_by_now_is_cut_by_packets_too() {
    let ground = ground!("stale-default-cuts");
    let mut wire = Wire::open(&ground);
    let proxied = &cgroups(&ground)[1];
    let proxies = REMOTES.map(|ip| listen(bind(addr(any_of(ip), PROXY_PORT), libc::SOCK_STREAM)));
    let env = [("CGTPROXY_NO_DESTROY", "1")];
    let daemon = Daemon::start_in(&ground, CONFIG, &[], &env);
    let [none, both] = [[false; 2], [true; 2]];
    let mut wrong = Vec::new();
    let cases = [
        ("drop", "", both),
        ("other", "", none),
        ("other", "tcp = drop\n", both),
        ("other", "tcp = reject\n", both),
        ("other", "ipv4 = drop\n", [true, false]),
        ("other", "ipv6 = reject\n", [false, true]),
        ("other", "udp = drop\nquic = reject\n", none),
        ("other", "tcp = drop\nbypass = 203.0.113.0/24\n", [false, true]),
        ("other", "tcp = drop\nonly = 203.0.113.0/24\n", [true, false]),
        ("vpn", "", none),
        ("vpn", "tcp = drop\n", both),
    ];
    // by a rule, a route ends what has begun by a proxy
    let by_rule = cases.into_iter().filter(|case| case.0 != "vpn").map(|case| (true, case));
    for (rules, (default, switch, cuts)) in
        cases.map(|case| (false, case)).into_iter().chain(by_rule)
    {
        let config = |default: &str, rule: &str| {
            format!(
                "[global]\ndefault = {default}\n[tproxy mihomo]\nport = 7893\n[tproxy other]\n\
                 port = 7894\n{switch}[route vpn]\ninterface = none\n{switch}[rules]\n{rule}\n"
            )
        };
        daemon.reconfigure(&config("direct", "mihomo = /proxied"));
        let flows = REMOTES.map(|ip| tcp_in(proxied, addr(ip, PORT)));
        let ends = proxies.each_ref().map(|proxy| proxy.accept().expect("accept").0);
        match rules {
            false => daemon.reconfigure(&config(default, "drop = /elsewhere")),
            true => daemon.reconfigure(&config("direct", &format!("{default} = /proxied"))),
        };
        for ((mut own, mut end), cut) in flows.into_iter().zip(ends).zip(cuts) {
            end.set_read_timeout(Some(if cut { SILENCE } else { PATIENCE })).expect("a timeout");
            let _ = own.write(b"more");
            if again(|| end.read(&mut [0; 8])).is_ok() == cut {
                wrong.push(format!("{default}, {switch:?}, by a rule: {rules}: {own:?}"));
            }
        }
        assert_eq!(said(&mut wire), [], "{default}, {switch:?}, by a rule: {rules}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A connection that begins while sockets are looked at goes the right way: it is not ended.
#[test]
fn a_connection_that_begins_is_not_ended() {
    for at_start in [true, false] {
        let ground = ground!("stale-begins");
        let (remote, mut wire) = (Remote::new(&ground), Wire::open(&ground));
        let proxied = &cgroups(&ground)[1];
        let _proxies =
            REMOTES.map(|ip| listen(bind(addr(any_of(ip), PROXY_PORT), libc::SOCK_STREAM)));
        let before = (!at_start).then(|| Daemon::start(&ground, BEFORE, &[]));
        // connecting, to the kernel, until the first byte is written: TFO_CLIENT_NO_COOKIE
        sysctl("net/ipv4/tcp_fastopen", "5");
        let begun = REMOTES.map(|ip| {
            let fd = socket_in(proxied, libc::SOCK_STREAM, ip);
            set(&fd, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1);
            connect(&fd, addr(ip, 8081)).expect("connect");
            TcpStream::from(fd)
        });
        let stale = REMOTES.map(|ip| tcp_in(proxied, addr(ip, PORT)));
        let daemon = match before {
            None => Daemon::start(&ground, CONFIG, &[]),
            Some(daemon) => {
                daemon.reconfigure(CONFIG);
                daemon
            }
        };
        assert!(daemon.wait_log("ended ", PATIENCE), "{}", daemon.logs());
        assert!(daemon.logs().contains("ended 2 sockets"), "{}", daemon.logs());
        for mut stream in begun {
            stream.write_all(b"hello").expect("write");
            let connected = wait_until(PATIENCE, || {
                let error = stream.take_error().expect("ask for an error");
                assert!(error.is_none(), "{error:?}");
                stream.peer_addr().is_ok()
            });
            assert!(connected, "{stream:?}");
        }
        let mut left = wire.packets();
        left.retain(|packet| packet.dst.port() == 8081);
        assert_eq!(left, []);
        drop((stale, remote));
        daemon.stop_clean();
    }
}
