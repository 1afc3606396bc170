//! Datagrams of sockets that live on while a reload gives what they send another way: they leave by
//! that, answered, whatever conntrack has of them.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeValLike;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::client::{
    again, connect, disconnect, family_of, fork_into, socket_for, socket_in, socket_of, udp_in,
    PATIENCE, SILENCE,
};
use crate::containers::live;
use crate::daemon::{run, Daemon};
use crate::gateway::Lan;
use crate::ground::{
    addr, any_of, ip, ip_batch, ip_lines, pipe, sysctl, Ground, HOST4, HOSTS, REMOTE4, REMOTES,
};
use crate::kernel::{await_member, forget_flows, load};
use crate::routes::{set, tunnel_up, until_passes, until_refused, GATEWAYS, TUNNEL};
use crate::ways::{change, RELOAD};
use crate::world::{
    bind, bind_at, bind_fd, raw_addr, set as set_option, Server, World, PROXY, STREAM_PORT,
};
use crate::{sized, wait_until};

/// A cgroup with a target, among others of each kind.
fn policy(target: &str) -> String {
    format!(
        "[tproxy mihomo]\nport = 7893\n[route vpn]\ninterface = vpn0\n{GATEWAYS}[rules]\n\
         {target} = /app\nvpn = /vpn\n"
    )
}

/// The same where nothing goes by a route, of which the policy has none.
fn without_route() -> String {
    let policy = policy("direct").replace("vpn = /vpn\n", "");
    policy.replace(&format!("[route vpn]\ninterface = vpn0\n{GATEWAYS}"), "")
}

/// Who answers a datagram, and the address that he was asked from.
fn ask(socket: &UdpSocket, to: SocketAddr) -> Option<(String, SocketAddr)> {
    let mut text = [0; 256];
    // an error that is left of what was sent before
    let _ = socket.take_error();
    let sent = match socket.peer_addr() {
        Ok(_) => socket.send(b"?"),
        Err(_) => socket.send_to(b"?", to),
    };
    sent.ok()?;
    let len = again(|| socket.recv(&mut text)).ok()?;
    let text = String::from_utf8_lossy(&text[..len]);
    let (who, client) = text.trim_end().split_once(" from ")?;
    let client: SocketAddr = client.parse().ok()?;
    Some((who.to_owned(), client))
}

/// The remote end of a socket speaks to it directly, whatever way its own datagrams go.
fn speak(ground: &Ground, socket: &UdpSocket, at: IpAddr, remote: SocketAddr) {
    let own = addr(at, socket.local_addr().expect("its address").port());
    let other = ground.outside(|| UdpSocket::from(bind(remote, libc::SOCK_DGRAM)));
    other.send_to(b"!", own).expect("speak");
    // one that is connected does not know him by the port that he has then
    if socket.peer_addr().is_err() {
        again(|| socket.recv(&mut [0; 9])).expect("it comes directly");
    }
}

/// Each with the kind that it is of, and its remote end.
type Sockets = Vec<(&'static str, UdpSocket, SocketAddr)>;

/// Sockets of a cgroup with a remote end each, as programs have them.
fn sockets(cgroup: &Path) -> Sockets {
    let mut all = Vec::new();
    for remote in REMOTES {
        for (at, kind) in
            ["any port", "its own port", "connected", "its address"].iter().enumerate()
        {
            let socket = socket_in(cgroup, libc::SOCK_DGRAM, remote);
            let mut own = addr(any_of(remote), 6881 + at as u16);
            if *kind == "its address" {
                own.set_ip(HOSTS[usize::from(remote.is_ipv6())]);
            }
            if *kind != "any port" && *kind != "connected" {
                bind_fd(&socket, own);
            }
            let socket = UdpSocket::from(socket);
            if *kind == "connected" {
                socket.connect(addr(remote, 80)).expect("connect");
            }
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            all.push((*kind, socket, addr(remote, 80)));
        }
    }
    all
}

/// Asserts that each socket is answered by whom its target says, at the address that is its own there.
#[track_caller]
fn go_by(target: &str, cgroup: &Path, sockets: &mut Sockets, world: &mut World, when: &str) {
    world.wire.packets();
    for (kind, socket, to) in sockets {
        // ended by what took it out of the hands of nobody
        if target == "mihomo" && socket.take_error().is_ok_and(|error| error.is_some()) {
            *socket = udp_in(cgroup, to.ip());
        }
        let answer = ask(socket, *to);
        let (who, from) =
            answer.unwrap_or_else(|| panic!("{when}: {kind} to {to} under {target}: no answer"));
        let want = if target == "mihomo" { PROXY } else { "remote" };
        assert_eq!(who, format!("{want} {to}"), "{when}: {kind} under {target}");
        let v6 = usize::from(to.is_ipv6());
        let own = socket.local_addr().expect("its address").port();
        let own = addr(HOSTS[v6], own);
        let own = if target == "vpn" { addr(ip(TUNNEL[v6]), from.port()) } else { own };
        assert_eq!(from, own, "{when}: {kind} to {to} under {target}");
    }
    let left = world.wire.to_remote();
    assert_eq!(left.is_empty(), target != "direct", "{when}, under {target}: {left:?}");
}

/// Through every target and back, in one life of the sockets.
#[test]
fn datagrams_of_a_socket_go_the_new_way() {
    let (ground, mut world) = scene!("redirect");
    let _proxy = Server::start(PROXY, &[7893]);
    let cgroup = ground.cgroup("/app");
    tunnel_up(&ground);
    let mut daemon = Daemon::start(&ground, &policy("direct"), &[]);
    let mut sockets = sockets(&cgroup);
    go_by("direct", &cgroup, &mut sockets, &mut world, "at first");
    for target in ["vpn", "direct", "vpn", "mihomo", "vpn", "mihomo", "direct", "vpn"] {
        daemon.reconfigure(&policy(target));
        go_by(target, &cgroup, &mut sockets, &mut world, "after a reload");
        if target == "vpn" {
            // to conntrack this is another flow, of the addresses that ours has when it comes back
            for (_, socket, to) in &sockets {
                speak(&ground, socket, HOSTS[usize::from(to.is_ipv6())], *to);
            }
        }
    }
    daemon.reconfigure(&without_route());
    go_by("direct", &cgroup, &mut sockets, &mut world, "without a route");
    for target in ["vpn", "direct", "vpn"] {
        daemon.kill9();
        daemon = Daemon::start(&ground, &policy(target), &[]);
        go_by(target, &cgroup, &mut sockets, &mut world, "after kill -9");
    }
}

/// The same where nothing is in force any more, or marks have other bits.
#[test]
fn datagrams_of_a_socket_once_the_table_is_gone() {
    let (ground, mut world) = scene!("redirect-end");
    let cgroup = ground.cgroup("/app");
    tunnel_up(&ground);
    // without one of others the kernel translates nothing any more once ours is gone
    load("table inet who {\nchain c {\ntype nat hook postrouting priority 100\n}\n}\n");
    for end in ["mask", "mask by a restart", "stop", "flush"] {
        let mut daemon = Daemon::start(&ground, &policy("vpn"), &[]);
        let mut sockets = sockets(&cgroup);
        go_by("vpn", &cgroup, &mut sockets, &mut world, "at first");
        for (_, socket, to) in &sockets {
            speak(&ground, socket, HOSTS[usize::from(to.is_ipv6())], *to);
        }
        let other = format!("[global]\nfwmark-mask = 0x00ff0000\n{}", policy("direct"));
        let daemon = match end {
            "mask" => Some(change(&ground, daemon, RELOAD, &other)),
            "mask by a restart" => Some(change(&ground, daemon, "restart", &other)),
            "flush" => {
                daemon.signal(Signal::SIGKILL);
                daemon.wait();
                run(&["flush"]).fine();
                None
            }
            _ => {
                assert!(daemon.stop().success());
                None
            }
        };
        go_by("direct", &cgroup, &mut sockets, &mut world, end);
        daemon.into_iter().for_each(|daemon| assert!(daemon.stop().success()));
        forget_flows();
    }
}

/// The interface has another address: what is sent from then on has that.
#[test]
fn datagrams_of_a_socket_take_the_new_address() {
    let (ground, mut world) = scene!("readdress");
    let cgroup = ground.cgroup("/app");
    tunnel_up(&ground);
    let daemon = Daemon::start(&ground, &policy("direct"), &[]);
    let mut sockets = sockets(&cgroup);
    go_by("direct", &cgroup, &mut sockets, &mut world, "at first");
    daemon.reconfigure(&policy("vpn"));
    go_by("vpn", &cgroup, &mut sockets, &mut world, "after a reload");

    ground.outside(|| {
        ip_batch(
            &[],
            "neigh add 10.8.0.9 lladdr 02:00:00:00:08:01 dev vout0\n\
             neigh add fd00:8::9 lladdr 02:00:00:00:08:01 dev vout0\n",
        );
    });
    ip_batch(
        &[],
        "addr del 10.8.0.1/24 dev vpn0\naddr add 10.8.0.9/24 dev vpn0\n\
         addr add fd00:8::9/64 dev vpn0 nodad\naddr del fd00:8::1/64 dev vpn0\n",
    );

    for (kind, socket, to) in &sockets {
        socket.set_read_timeout(Some(SILENCE)).expect("a timeout");
        let new = if to.is_ipv6() { "fd00:8::9" } else { "10.8.0.9" };
        let mut from = None;
        let moved = || {
            from = ask(socket, *to).map(|answer| answer.1.ip().to_string());
            from.as_deref() == Some(new)
        };
        assert!(wait_until(PATIENCE, moved), "{kind} to {to}: {from:?}");
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// The remote host sends on and on: if conntrack had just forgotten the flow, he would be who began
/// it, and whoever answers him would be left alone.
#[test]
fn a_remote_host_that_speaks_all_the_time() {
    let (ground, mut world) = scene!("talkative");
    let cgroup = ground.cgroup("/app");
    tunnel_up(&ground);
    let daemon = Daemon::start(&ground, &policy("direct"), &[]);
    for (remote, host) in REMOTES.into_iter().zip(HOSTS) {
        let own = socket_in(&cgroup, libc::SOCK_DGRAM, remote);
        bind_fd(&own, addr(any_of(remote), 7000));
        let own = UdpSocket::from(own);
        // an address of his host's alone by its route
        let at = addr(remote, 0);
        let other = ground.outside(|| UdpSocket::from(bind(at, libc::SOCK_DGRAM)));
        let to = other.local_addr().expect("its address");
        for round in 0..5 {
            own.send_to(b"hello", to).expect("send");
            let done = Arc::new(AtomicBool::new(false));
            let talks = {
                let (done, other) = (done.clone(), other.try_clone().expect("a copy"));
                std::thread::spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        let _ = other.send_to(b"and on", addr(host, 7000));
                        std::thread::yield_now();
                    }
                })
            };
            daemon.reconfigure(&policy("vpn"));
            world.wire.packets();
            for _ in 0..100 {
                let _ = own.send_to(b"to him", to);
            }
            let left = world.wire.to_remote();
            done.store(true, Ordering::Relaxed);
            talks.join().expect("the remote host");
            assert_eq!(left, [], "round {round}: left by another interface");
            daemon.reconfigure(&policy("direct"));
            own.send_to(b"hello", to).expect("send");
            let left = world.wire.to_remote();
            let sources: Vec<_> = left.iter().map(|packet| packet.src).collect();
            assert_eq!(sources, [addr(host, 7000)], "round {round}: not directly");
        }
    }
}

/// The way out opens after the reload.
#[test]
fn a_way_that_opens_later() {
    let (ground, mut world) = scene!("later");
    let cgroup = ground.cgroup("/app");
    let other = ground.cgroup("/vpn");
    tunnel_up(&ground);
    let daemon = Daemon::start(&ground, &policy("direct"), &[]);
    let sockets = sockets(&cgroup);
    for (kind, socket, to) in &sockets {
        assert!(ask(socket, *to).is_some(), "{kind} to {to}");
    }

    set("down");
    daemon.reconfigure(&policy("vpn"));
    until_refused(&other, REMOTE4);
    world.wire.packets();
    for (kind, socket, to) in &sockets {
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        assert_eq!(ask(socket, *to), None, "{kind} to {to}");
    }

    set("up");
    REMOTES.iter().for_each(|to| {
        until_passes(&other, *to);
    });
    for (kind, socket, to) in &sockets {
        socket.set_read_timeout(Some(SILENCE)).expect("a timeout");
        let heard =
            || ask(socket, *to).is_some_and(|(_, from)| TUNNEL.contains(&&*from.ip().to_string()));
        assert!(wait_until(PATIENCE, heard), "{kind} to {to}");
    }
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// A ping that runs on.
#[test]
fn pings_go_the_new_way() {
    let (ground, mut world) = scene!("pings");
    let cgroup = ground.cgroup("/app");
    tunnel_up(&ground);
    let daemon = Daemon::start(&ground, &policy("direct"), &[]);
    let pings = REMOTES.map(|remote| {
        let (family, protocol) = match remote {
            IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP),
            IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6),
        };
        let socket = UdpSocket::from(socket_for(&cgroup, family, libc::SOCK_DGRAM, protocol));
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        (socket, addr(remote, 0))
    });
    for target in ["direct", "vpn", "direct", "vpn"] {
        daemon.reconfigure(&policy(target));
        world.wire.packets();
        for (socket, to) in &pings {
            let request =
                if to.is_ipv4() { [8, 0, 0, 0, 0, 0, 0, 1] } else { [128, 0, 0, 0, 0, 0, 0, 1] };
            socket.send_to(&request, to).unwrap_or_else(|e| panic!("{to} under {target}: {e}"));
            again(|| socket.recv(&mut [0; 64]))
                .unwrap_or_else(|e| panic!("{to} under {target}: {e}"));
        }
        assert_eq!(world.wire.to_remote().is_empty(), target == "vpn", "under {target}");
    }
}

/// Of a router's clients too; what they began by TCP is refused, since it cannot go on.
#[test]
fn clients_of_a_router_go_the_new_way() {
    let ground = ground!("redirectlan");
    others_go_the_new_way(&ground, |target| {
        format!("{}[gateway lan]\ninterface = br-lan\ntarget = {target}\n", policy("direct"))
    });
}

/// Whose address another program translates is translated again once his flow goes directly.
#[test]
fn clients_that_others_translate() {
    let ground = ground!("redirectnat");
    let _world = World::new(&ground);
    let _proxy = Server::start(PROXY, &[7893]);
    tunnel_up(&ground);
    let lan = Lan::new(&ground);
    let private = ["10.77.0.9", "fd77::9"].map(ip);
    ip_lines("addr add 10.77.0.1/24 dev br-lan\naddr add fd77::1/64 dev br-lan nodad\n");
    lan.client(0).run(|| {
        ip_lines(
            "addr add 10.77.0.9/24 dev eth0\naddr add fd77::9/64 dev eth0 nodad\n\
             route replace default via 10.77.0.1\nroute replace default via fd77::1 dev eth0\n",
        );
    });
    load(
        "table inet others {\nchain nat {\ntype nat hook postrouting priority srcnat;\n\
         oifname in0 masquerade\n}\n}\n",
    );
    let policy = |target: &str| {
        format!("{}[gateway lan]\ninterface = br-lan\ntarget = {target}\n", policy("direct"))
    };
    let daemon = Daemon::start(&ground, &policy("direct"), &[]);
    let sockets = private.map(|own| {
        let socket = lan.client(0).run(|| UdpSocket::bind(addr(own, 6883)).expect("bind"));
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let remote = REMOTES[usize::from(own.is_ipv6())];
        (socket, own, addr(remote, 80))
    });
    for target in ["direct", "vpn", "direct", "mihomo", "vpn", "mihomo", "vpn", "direct"] {
        daemon.reconfigure(&policy(target));
        for (socket, own, to) in &sockets {
            let at = usize::from(to.is_ipv6());
            let answer = ask(socket, *to);
            let Some((who, from)) = answer else { panic!("{to} under {target}: no answer") };
            match target {
                "direct" => assert_eq!(from.ip(), HOSTS[at], "{to} under {target}"),
                "vpn" => assert_eq!(from.ip(), ip(TUNNEL[at]), "{to} under {target}"),
                _ => assert_eq!(who, format!("{PROXY} {to}"), "{own}"),
            }
        }
    }
}

/// And of containers: by which veth of the bridge it comes in is what counts, not what others there do.
#[test]
fn containers_go_the_new_way() {
    let ground = ground!("redirectbox");
    ground.cgroups(["/box", "/beside"]);
    others_go_the_new_way(&ground, |target| {
        format!("{}{target} = /box\ndirect = /beside\n{UNKNOWN}", policy("direct"))
    });
}

/// What comes in of no container that is known.
const UNKNOWN: &str = "[gateway unknown]\ninterface = br-lan\ntarget = drop\n";

/// What a container has sent before the daemon found it goes on by the way that is its own.
#[test]
fn a_container_that_is_found_late_goes_its_way() {
    let (ground, _world) = scene!("redirectlate");
    let cgroup = ground.cgroup("/box");
    tunnel_up(&ground);
    let lan = Lan::new(&ground);
    let daemon = Daemon::start(&ground, &format!("{}vpn = /box\n", policy("direct")), &[]);
    let way = |(socket, to): &(UdpSocket, SocketAddr)| ask(socket, *to).map(|(_, from)| from.ip());
    let (_process, sockets) = daemon.while_stopped(|| {
        let process = live(lan.client(0), &cgroup);
        let sockets = REMOTES.map(|remote| {
            let bound = lan.client(0).run(|| UdpSocket::bind((any_of(remote), 0)));
            let socket = bound.expect("bind");
            socket.set_read_timeout(Some(SILENCE)).expect("a timeout");
            (socket, addr(remote, 80))
        });
        for socket in &sockets {
            assert!(way(socket).is_some_and(|from| !TUNNEL.contains(&&*from.to_string())));
        }
        (process, sockets)
    });
    for socket in &sockets {
        let tunneled = || way(socket).is_some_and(|from| TUNNEL.contains(&&*from.to_string()));
        assert!(wait_until(PATIENCE, tunneled), "{}", daemon.logs());
    }
}

fn others_go_the_new_way(ground: &Ground, policy: impl Fn(&str) -> String) {
    let mut world = World::new(ground);
    let _proxy = Server::start(PROXY, &[7893]);
    let cgroup = ground.cgroup("/vpn");
    tunnel_up(ground);
    let lan = Lan::new(ground);
    let boxes = [(0, "/box"), (1, "/beside")].map(|(i, path)| (lan.client(i), ground.at(path)));
    let boxes = boxes.into_iter().filter(|(_, cgroup)| cgroup.exists());
    let _processes: Vec<_> = boxes.map(|(client, cgroup)| live(client, &cgroup)).collect();
    let daemon = Daemon::start(ground, &policy("direct"), &[]);
    await_member(&cgroup, "vpn");
    let clients: [IpAddr; 2] =
        ["198.51.100.10", "2001:db8:3::10"].map(|ip| ip.parse().expect("an address"));
    let sockets = REMOTES.map(|remote| {
        let any = if remote.is_ipv4() { "0.0.0.0:6881" } else { "[::]:6882" };
        let socket = lan.client(0).run(|| UdpSocket::bind(any).expect("bind"));
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        (socket, addr(remote, 80))
    });
    // what a proxy has of theirs stays with it where they are to go directly
    for target in ["direct", "vpn", "direct", "vpn", "mihomo", "vpn", "mihomo", "vpn", "direct"] {
        daemon.reconfigure(&policy(target));
        world.wire.packets();
        for (socket, to) in &sockets {
            let v6 = usize::from(to.is_ipv6());
            let answer = ask(socket, *to);
            let Some((who, from)) = answer else { panic!("{to} under {target}: no answer") };
            let want = if target == "mihomo" { PROXY } else { "remote" };
            assert_eq!(who, format!("{want} {to}"), "under {target}");
            let port = socket.local_addr().expect("its address").port();
            let own = addr(clients[v6], port);
            let own = if target == "vpn" { addr(ip(TUNNEL[v6]), from.port()) } else { own };
            assert_eq!(from, own, "{to} under {target}");
        }
        let left = world.wire.to_remote();
        assert_eq!(left.is_empty(), target != "direct", "under {target}: {left:?}");
        if target == "vpn" {
            for ((socket, to), own) in sockets.iter().zip(clients) {
                speak(ground, socket, own, *to);
            }
        }
    }

    let mut streams = REMOTES.map(|remote| {
        let stream = lan
            .client(0)
            .run(|| std::net::TcpStream::connect(addr(remote, STREAM_PORT)).expect("connect"));
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
    });
    daemon.reconfigure(&policy("vpn"));
    world.wire.packets();
    for stream in &mut streams {
        use std::io::Write;
        let refused = wait_until(PATIENCE, || stream.write_all(b"?").is_err());
        assert!(refused, "{:?} goes on", stream.peer_addr());
    }
    let left: Vec<_> = world.wire.to_remote();
    assert!(left.iter().all(|packet| packet.flags & 4 != 0), "{left:?}");
}

const NUMBERLESS: &str = "[route vpn]\ninterface = vpn0\ngateway = 10.8.0.2\ngateway = fd00:8::2\n\
                          [rules]\nvpn = /user/.*\n";

/// Somebody has so many flows that go directly; it lasts as long as the socket.
fn numberless(ground: &Ground, flows: u16) -> UdpSocket {
    // what is sent to nobody ends at the door
    let sink = "table netdev sink { chain in {
        type filter hook ingress device out0 priority 0; policy accept;
        udp dport > 1024 drop;
    }\n}";
    ground.outside(|| load(sink));
    // none ends while a slow machine is at it
    sysctl("net/netfilter/nf_conntrack_udp_timeout", "600");
    let many = udp_in(&ground.cgroup("/user"), REMOTE4);
    for port in 0..flows {
        many.send_to(b"?", addr(REMOTE4, 1025 + port)).expect("send");
    }
    many
}

/// Who has flows without number makes cgroups that are found late: his flows go by the route all the
/// same, and between two datagrams of a list of all, cgroups that come have their turn.
#[test]
fn flows_without_number_keep_nobody_waiting() {
    let (ground, _world) = scene!("numberless");
    tunnel_up(&ground);
    let (daemon, trace) = traced(&ground, NUMBERLESS);
    let _many = numberless(&ground, 60_000);
    let (begun, mut late) = (Instant::now(), Vec::new());
    for round in 0..5 {
        daemon.signal(Signal::SIGSTOP);
        let cgroup = ground.cgroup(&format!("/user/{round}"));
        let socket = socket_in(&cgroup, libc::SOCK_DGRAM, REMOTE4);
        bind_fd(&socket, addr(HOST4, 7000 + round));
        let socket = UdpSocket::from(socket);
        let to = addr(REMOTE4, 80);
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        assert_eq!(ask(&socket, to).map(|answer| answer.1.ip()), Some(HOST4));
        socket.set_read_timeout(Some(SILENCE)).expect("a timeout");
        // what is found within some 50 ms is not late
        let made = Instant::now();
        wait_until(Duration::from_secs(1), || made.elapsed() > Duration::from_millis(100));
        daemon.signal(Signal::SIGCONT);
        await_member(&cgroup, "vpn");
        late.push((socket, to));
    }
    for (socket, to) in &late {
        let moved = || ask(socket, *to).is_some_and(|(_, from)| from.ip().to_string() == TUNNEL[0]);
        // between two passes it rests some times what the last one has cost, and that one has been waited for
        let patience = PATIENCE + 10 * begun.elapsed();
        assert!(wait_until(patience, moved), "{:?}: {patience:?}", socket.local_addr());
    }
    assert!(daemon.stop().success());
    let (longest, all) = trace.answers();
    println!("{longest} of {all}");
    // a list is of some 400
    assert!(all > 300 && longest < 120, "{longest} of {all}");
}

/// A reload is done once the flows have moved, or have cost a second, also where the machine stands still
/// meanwhile, or others want its processors: that costs no time of the daemon.
#[test]
fn a_reload_waits_for_flows_in_its_own_time() {
    let (ground, _world) = scene!("standstill");
    tunnel_up(&ground);
    let daemon = Daemon::start(&ground, NUMBERLESS, &[]);
    let _many = numberless(&ground, 10_000);
    let other = ground.cgroup("/other");
    daemon.configure(&format!("{NUMBERLESS}drop = /other\nvpn = /user\n"));
    let busy = daemon.busy();
    daemon.signal(Signal::SIGHUP);
    // the table is in force, and the flows have their turn
    await_member(&other, "drop");
    daemon.while_stopped(|| {
        let begun = Instant::now();
        wait_until(PATIENCE, || begun.elapsed() > Duration::from_millis(1200));
    });
    // by the clock that may be any time, where others want the processors
    let reloaded = || daemon.logs().contains("reloaded ");
    let spent = || daemon.busy() - busy > Duration::from_secs(3);
    wait_until(10 * PATIENCE, || reloaded() || spent());
    assert!(reloaded(), "{}", daemon.logs());
    let busy = daemon.busy() - busy;
    let log = daemon.logs();
    let before = log.split("reloaded ").next().expect("some");
    let moved = before.contains("UDP flows that began another way");
    println!("moved: {moved}, busy for {busy:?}");
    assert!(moved || busy > Duration::from_millis(950), "{busy:?}: {log}");
    assert!(daemon.stop().success());
}

/// Nor need they wait for those of an address that the interface has no more.
#[test]
fn flows_of_an_address_that_has_gone_keep_nobody_waiting() {
    let (ground, _world) = scene!("numbergone");
    tunnel_up(&ground);
    let (daemon, trace) = traced(&ground, NUMBERLESS);
    let _many = numberless(&ground, 60_000);
    for _ in 0..5 {
        ip_batch(&[], "addr add 10.8.0.99/24 dev vpn0\n");
        // it knows of that then
        daemon.reload();
        let (_, before) = trace.answers();
        ip_batch(&[], "addr del 10.8.0.99/24 dev vpn0\n");
        // a list is of some 400
        assert!(wait_until(PATIENCE, || trace.answers().1 > before + 300));
    }
    assert!(daemon.stop().success());
    let (longest, all) = trace.answers();
    println!("{longest} of {all}");
    assert!(longest < 120, "{longest} of {all}");
}

/// A process of a cgroup with so many UDP sockets, each connected; returns when it has them.
pub fn hoard(cgroup: &Path, number: u32, to: SocketAddr) -> Hoard {
    let (read, write) = pipe();
    let (raw, len) = raw_addr(to);
    let child = || {
        // SAFETY: system calls on integers and live memory.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let most = libc::rlimit { rlim_cur: 20_000, rlim_max: 20_000 };
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const most);
            for _ in 0..number {
                let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
                if libc::connect(fd, (&raw const raw).cast(), len) != 0 {
                    return 1;
                }
            }
            libc::write(write.as_raw_fd(), b"x".as_ptr().cast(), 1);
            libc::pause();
        }
        0
    };
    let dir = File::open(cgroup).expect("open the cgroup");
    // SAFETY: the child makes system calls only.
    let pid = unsafe { fork_into(&dir, child) }.expect("fork into the cgroup");
    drop(write);
    File::from(read).read_exact(&mut [0]).expect("it has its sockets");
    Hoard(pid)
}

pub struct Hoard(Pid);

impl Drop for Hoard {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// Somebody has sockets without number, and a reload asks whose they are: between two datagrams of
/// that, cgroups that come have their turn.
#[test]
fn sockets_without_number_keep_nobody_waiting() {
    let (ground, _world) = scene!("socketful");
    tunnel_up(&ground);
    sysctl("net/ipv4/ip_local_port_range", "1024 65535");
    let config = |user: &str| {
        format!(
            "[tproxy mihomo]\nport = 7893\n[route vpn]\ninterface = vpn0\n{GATEWAYS}[rules]\n\
             {user} = /user/.*\ndrop = /apps/.*\n"
        )
    };
    let user = ground.cgroup("/user/x");
    let (daemon, trace) = traced(&ground, &config("direct"));
    let _hoards = hoards(&user);
    for target in ["vpn", "direct", "vpn"] {
        let (_, before) = trace.answers();
        daemon.reconfigure(&config(target));
        let new = ground.cgroup(&format!("/apps/{target}"));
        await_member(&new, "drop");
        std::fs::remove_dir(&new).expect("rmdir");
        // a list is of some 200, and may go on behind the reload
        assert!(wait_until(PATIENCE, || trace.answers().1 > before + 150));
    }
    assert!(daemon.stop().success());
    let (longest, all) = trace.answers();
    println!("{longest} of {all}");
    // once all of it came at once, twice for each reload
    assert!(longest < 120, "{longest} of {all}");
}

/// Nor where it is asked which removed cgroups they hold, some minutes after the last one that may be held.
#[test]
fn sockets_of_removed_cgroups_keep_nobody_waiting() {
    if sized(0, 1) == 0 {
        return;
    }
    let (ground, _world) = scene!("socketgone");
    sysctl("net/ipv4/ip_local_port_range", "1024 65535");
    let user = ground.cgroup("/user/x");
    let (daemon, trace) = traced(&ground, "[rules]\ndrop = /apps/.*\n");
    let _hoards = hoards(&user);
    let gone = ground.cgroup("/apps/gone");
    await_member(&gone, "drop");
    let socket = socket_in(&gone, libc::SOCK_DGRAM, REMOTE4);
    bind_fd(&socket, addr(HOST4, 0));

    std::fs::remove_dir(&gone).expect("rmdir");

    let asked = || trace.answers().1 > 150;
    assert!(wait_until(Duration::from_secs(400), asked), "{:?}", trace.answers());
    let new = ground.cgroup("/apps/new");
    await_member(&new, "drop");
    assert!(daemon.stop().success());
    let (longest, all) = trace.answers();
    println!("{longest} of {all}");
    assert!(longest < 120, "{longest} of {all}");
}

/// So many that a list of them is some 200 datagrams of the kernel; of several processes, for not every
/// machine lets one have so many.
fn hoards(cgroup: &Path) -> [Hoard; 3] {
    [15_000; 3].map(|number| hoard(cgroup, number, addr(REMOTE4, 80)))
}

/// What the daemon does from when it is ready: where that is written, and how long it was before.
struct Trace(PathBuf, u64);

fn traced(ground: &Ground, config: &str) -> (Daemon, Trace) {
    let trace = ground.dir.join("strace");
    let to = trace.to_str().expect("UTF-8");
    let calls = "trace=/^p?poll$,read,/^recv";
    let by = ["strace", "-D", "-f", "-qq", "-o", to, "-e", calls];
    let mut daemon = Daemon::spawn_by(ground, config, &by, &[], &[]);
    assert!(daemon.ready(), "{}", daemon.logs());
    // before 6.9 an answer to each message of the first transaction, which is refused
    let begun = trace.metadata().expect("stat the trace").len();
    (daemon, Trace(trace, begun))
}

impl Trace {
    /// How many datagrams of the kernel were read between two looks for what has happened, and in all.
    fn answers(&self) -> (usize, usize) {
        let text = std::fs::read_to_string(&self.0).expect("read the trace");
        let text = &text[self.1 as usize..];
        let (mut longest, mut now, mut all) = (0, 0, 0);
        for answer in text.split_inclusive('\n').map(|line| line.contains(" recv")) {
            now = if answer { now + 1 } else { 0 };
            longest = longest.max(now);
            all += usize::from(answer);
        }
        (longest, all)
    }
}

/// The targets of [`by_owners`], in order.
const TARGETS: [&str; 4] = ["direct", "mihomo", "vpn", "drop"];

/// A line for a user of each target in front of those for cgroups, and one for a group behind; those for
/// owners so many further on in [`TARGETS`].
fn by_owners(on: usize) -> String {
    let line = |at: usize, what: &str| format!("{} = {what}\n", TARGETS[(at + on) % 4]);
    let users: String = (0..4).map(|at| line(at, &format!("user:{}", 2001 + at))).collect();
    let groups: String = (0..4).map(|at| line(at, &format!("group:{}", 2011 + at))).collect();
    let cgroups = TARGETS.map(|target| format!("{target} = /{target}\n")).concat();
    format!(
        "[tproxy mihomo]\nport = 7893\n[route vpn]\ninterface = vpn0\n{GATEWAYS}[rules]\n\
         {users}{cgroups}{groups}"
    )
}

/// An application that has the target of that number by a line of that kind: its cgroup and its user.
fn owned(ground: &Ground, kind: &str, at: usize) -> (PathBuf, u32) {
    match kind {
        "cgroup" => (ground.at(TARGETS[at]), 0),
        // in front of its cgroup's line
        "user" => (ground.at(TARGETS[(at + 1) % 4]), 2001 + at as u32),
        _ => (ground.at("other"), 2011 + at as u32),
    }
}

/// A socket of that owner from `at`, of which nothing stays once it is closed.
fn bound_for((cgroup, uid): &(PathBuf, u32), kind: i32, at: SocketAddr) -> OwnedFd {
    let fd = socket_of(*uid, cgroup, family_of(at.ip()), kind, 0);
    set_option(&fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
    if kind == libc::SOCK_STREAM {
        let reset = libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&fd, sockopt::Linger, &reset).expect("set SO_LINGER");
    }
    bind_at(&fd, at);
    fd
}

/// Who answers that owner, as one of [`TARGETS`], from `at`, the port that it had, and whether a first
/// datagram was lost. It leaves for the world where it is `wanted` to, whether or not it is answered.
fn goes_by(
    owner: &(PathBuf, u32),
    (kind, wanted): (i32, &str),
    (at, to): (SocketAddr, SocketAddr),
    patience: Duration,
    world: &mut World,
) -> (String, SocketAddr, bool) {
    let fd = bound_for(owner, kind, at);
    world.wire.packets();
    let (answer, own, lost) = if kind == libc::SOCK_DGRAM {
        let socket = UdpSocket::from(fd);
        socket.set_read_timeout(Some(patience)).expect("a timeout");
        let own = socket.local_addr().expect("an address");
        let who = |(who, from): (String, SocketAddr)| (who, from.ip());
        let answers = [0, 1].map(|_| ask(&socket, to).map(who));
        assert!(answers[0].is_none() || answers[0] == answers[1], "{own} to {to}: {answers:?}");
        let [first, answer] = answers;
        let lost = first.is_none() && answer.is_some();
        (answer, own, lost)
    } else {
        let wait = nix::sys::time::TimeVal::milliseconds(patience.as_millis() as i64);
        setsockopt(&fd, sockopt::SendTimeout, &wait).expect("a timeout");
        let connected = connect(&fd, to);
        let mut stream = TcpStream::from(fd);
        stream.set_read_timeout(Some(patience)).expect("a timeout");
        let own = stream.local_addr().expect("an address");
        let mut text = String::new();
        let read = connected.and_then(|()| again(|| stream.read_to_string(&mut text)));
        let said = read.ok().and_then(|_| text.trim_end().split_once(" from "));
        let client = |text: &str| text.parse::<SocketAddr>().expect("an address").ip();
        disconnect(&stream);
        (said.map(|(who, from)| (who.to_owned(), client(from))), own, false)
    };
    let left = world.wire.to_remote();
    let v6 = usize::from(to.is_ipv6());
    let who = match answer {
        None => "drop".to_owned(),
        Some((who, _)) if who == format!("{PROXY} {to}") => "mihomo".into(),
        Some((_, from)) if from.to_string() == TUNNEL[v6] => "vpn".into(),
        Some((_, from)) if from == HOSTS[v6] => "direct".into(),
        other => format!("{other:?}"),
    };
    let may_leave = [&*who, wanted].contains(&"direct");
    assert!(left.is_empty() || may_leave, "{who}, not {wanted}, and yet it left: {left:?}");
    (who, own, lost)
}

/// By what a UDP flow goes whose port another one has just had, to the same host. What a route has
/// masqueraded, or not, stays so until conntrack forgets it.
fn behind(had: &str, target: &'static str) -> &'static str {
    match (had, target) {
        ("vpn", "direct") => "vpn",
        ("direct" | "mihomo", "vpn") => "drop",
        _ => target,
    }
}

/// The first of them.
const PORTS_OF_OWNERS: u16 = 20_000;

/// Two applications one after the other, from the same port to the same host, of which a line for users or
/// groups decides for one or both: each goes by its own target, as where their cgroups decide.
fn a_port_of_two_owners(kind: i32) {
    let (ground, mut world) = scene!("twoowners");
    let _proxy = Server::start(PROXY, &[7893]);
    ground.cgroups(["/direct", "/mihomo", "/vpn", "/drop", "/other"]);
    tunnel_up(&ground);
    let daemon = Daemon::start(&ground, &by_owners(0), &[]);
    let mut wrong = Vec::new();
    let mut asked: u16 = 0;
    let cases = [
        ("", "cgroup", "cgroup"),
        ("", "cgroup", "user"),
        ("", "user", "cgroup"),
        ("", "user", "group"),
        ("", "group", "cgroup"),
        ("the same", "cgroup", "user"),
        ("the same", "group", "user"),
        ("another", "user", "user"),
        ("another", "group", "cgroup"),
    ];
    for (round, (before, first, second)) in cases.into_iter().enumerate() {
        let pairs = (0..4).flat_map(|a| (0..4).map(move |b| (a, b)));
        // each pair with either family by turns, or with both
        let both =
            pairs.flat_map(|(a, b)| [(a, b, (a + b + round) % 2), (a, b, (a + b + round + 1) % 2)]);
        for (a, b, v6) in both.step_by(sized(2, 1)) {
            let to = addr(REMOTES[v6], 80);
            let moved = usize::from(before == "another");
            if moved == 1 {
                daemon.reconfigure(&by_owners(1));
            }
            let patience = |target: usize| if target == 3 { SILENCE } else { PATIENCE };
            let (had, had_by) = (owned(&ground, first, a), (a + moved) % 4);
            // of its own: what an earlier case began from it would be another flow of the port
            let at = addr(HOSTS[v6], PORTS_OF_OWNERS + asked);
            let (who, at, _) =
                goes_by(&had, (kind, TARGETS[had_by]), (at, to), patience(had_by), &mut world);
            assert_eq!(who, TARGETS[had_by], "{to}, {first}, at first");
            match before {
                "" => {}
                "the same" => drop(daemon.reload()),
                _ => drop(daemon.reconfigure(&by_owners(0))),
            }
            let has = owned(&ground, second, b);
            let patience = Duration::from_secs(5).min(patience(b));
            // a connection may be told that it has ended where it begins amid the look for stale ones,
            // and where the machine stands still, it has waited long enough at once
            let (want, tries) = match kind {
                libc::SOCK_DGRAM => (behind(TARGETS[had_by], TARGETS[b]), 1),
                _ => (TARGETS[b], 3),
            };
            asked += 1;
            let mut who = String::new();
            for _ in 0..tries {
                let lost;
                (who, _, lost) = goes_by(&has, (kind, want), (at, to), patience, &mut world);
                // what began by a route is given up with the first one that is to go to a proxy
                let given_up = (TARGETS[had_by], TARGETS[b]) == ("vpn", "mihomo");
                assert!(!lost || given_up, "{to}, {before:?}: {second} behind {first}");
                if who == want || who != "drop" {
                    break;
                }
            }
            if who != want {
                wrong.push(format!(
                    "{to}, {before:?} policy: {second} to {}, behind {first} to {}: by {who}",
                    TARGETS[b], TARGETS[had_by]
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {asked}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(daemon.stop().success());
}

#[test]
fn a_udp_port_of_two_owners() {
    a_port_of_two_owners(libc::SOCK_DGRAM);
}

#[test]
fn a_tcp_port_of_two_owners() {
    a_port_of_two_owners(libc::SOCK_STREAM);
}

/// What this host sends by a route that translates nothing is translated by another program, and again
/// whatever it was known by before.
#[test]
fn sockets_that_others_translate() {
    let (ground, _world) = scene!("redirectown");
    let cgroup = ground.cgroup("/app");
    tunnel_up(&ground);
    load(
        "table inet others {\nchain nat {\ntype nat hook postrouting priority srcnat;\n\
         oifname vpn0 masquerade\n}\n}\n",
    );
    let plain = format!("[route plain]\ninterface = vpn0\n{GATEWAYS}masquerade = no\n");
    let policy = |mask: &str, target: &str| {
        format!("[global]\nfwmark-mask = {mask}\n{plain}{}", policy(target))
    };
    let daemon = Daemon::start(&ground, &policy("0x0f000000", "plain"), &[]);
    let mut sockets = sockets(&cgroup);
    sockets.retain(|(kind, ..)| *kind != "its address");
    for (mask, target) in [
        ("0x0f000000", "plain"),
        ("0xff000000", "plain"),
        ("0xff000000", "vpn"),
        ("0xff000000", "plain"),
    ] {
        daemon.reconfigure(&policy(mask, target));
        for (kind, socket, to) in &sockets {
            let answer = ask(socket, *to);
            let when = format!("{kind} to {to} by {target}, {mask}\n{}", daemon.logs());
            let Some((_, from)) = answer else { panic!("no answer: {when}") };
            assert_eq!(from.ip(), ip(TUNNEL[usize::from(to.is_ipv6())]), "{when}");
        }
    }
}
