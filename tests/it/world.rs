//! Who answers: servers that say where a request ended up, and the wire as the outside sees it.

use std::collections::VecDeque;
use std::ffi::CString;
use std::fmt;
use std::io::{self, Write};
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::BorrowedFd;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use libc::c_int;
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::unistd::Pid;

use crate::client::{Proto, PATIENCE};
use crate::ground::{pipe, Ground, REMOTE4, REMOTE6};
use crate::wait_until;

/// Port of the remote host that streams (see [`Server::stream`]); every other one answers once.
pub const STREAM_PORT: u16 = 9000;

/// A server, TCP and UDP, IPv4 and IPv6, on the wildcard addresses of a network namespace.
///
/// It answers every TCP connection and every datagram with the line
/// `NAME DIALLED from CLIENT`, where DIALLED is the address that the request came with: that of
/// the remote host outside, or the original destination at a TPROXY server. The answer to a
/// datagram comes from the dialled address. Lives in the namespace of the thread that starts it.
pub struct Server {
    stop: Option<OwnedFd>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tcp {
    Answer,
    Stream,
}

/// What the proxy says who it is.
pub const PROXY: &str = "proxy mihomo";

impl Server {
    /// Listens on `ports`.
    pub fn start(name: &str, ports: &[u16]) -> Server {
        Server::launch(name, &wildcards(ports), Tcp::Answer)
    }

    /// Listens on these addresses only.
    pub fn at(name: &str, addresses: &[SocketAddr]) -> Server {
        Server::launch(name, addresses, Tcp::Answer)
    }

    /// A server whose TCP answer goes on and on after the first line, until the server is stopped;
    /// then each connection is closed in good order.
    pub fn stream(name: &str, ports: &[u16]) -> Server {
        Server::launch(name, &wildcards(ports), Tcp::Stream)
    }

    fn launch(name: &str, addresses: &[SocketAddr], mode: Tcp) -> Server {
        let mut tcp = Vec::new();
        let mut udp = Vec::new();
        for &at in addresses {
            let listener = TcpListener::from(bind(at, libc::SOCK_STREAM));
            // SAFETY: `listener` is an open socket.
            assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 512) }, 0);
            listener.set_nonblocking(true).expect("set O_NONBLOCK");
            tcp.push(listener);
            udp.push(UdpSocket::from(bind(at, libc::SOCK_DGRAM)));
        }
        let (quit, stop) = pipe();
        let stopping = Arc::new(AtomicBool::new(false));
        let serving = Serving { name: name.to_owned(), mode, stopping: stopping.clone() };
        let thread = thread::spawn(move || serving.serve(&tcp, udp, &quit));
        Server { stop: Some(stop), stopping, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn wildcards(ports: &[u16]) -> Vec<SocketAddr> {
    let any = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    ports.iter().flat_map(|port| any.map(|ip| SocketAddr::new(ip, *port))).collect()
}

struct Serving {
    name: String,
    mode: Tcp,
    stopping: Arc<AtomicBool>,
}

/// Connections, and datagrams of a socket, that are taken before the others have their turn: on a slow
/// machine a flood of either would leave nothing for the other.
const A_TURN: usize = 128;
const QUEUED: usize = 256;

impl Serving {
    fn serve(&self, tcp: &[TcpListener], mut udp: Vec<UdpSocket>, quit: &OwnedFd) {
        let mut streams = Vec::new();
        loop {
            let all = [quit.as_fd()].into_iter().chain(tcp.iter().map(AsFd::as_fd));
            let all: Vec<BorrowedFd> = all.chain(udp.iter().map(AsFd::as_fd)).collect();
            let mut fds: Vec<_> =
                all.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
            let _ = poll(&mut fds, PollTimeout::NONE);
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(true)).collect();
            if ready[0] {
                break;
            }
            for (listener, _) in tcp.iter().zip(&ready[1..]).filter(|x| *x.1) {
                for (conn, client) in (0..A_TURN).map_while(|_| listener.accept().ok()) {
                    streams.extend(self.answer_tcp(conn, client));
                }
            }
            for (i, _) in ready[1 + tcp.len()..].iter().enumerate().filter(|x| *x.1) {
                let asked: Vec<_> = (0..QUEUED).map_while(|_| recv_datagram(&udp[i])).collect();
                for (client, dialled) in asked {
                    let new = self.answer_udp(client, dialled, &udp);
                    udp.extend(new);
                }
            }
        }
        for listener in tcp {
            // A forked client may still hold a copy of the descriptor for an instant.
            // SAFETY: `listener` is an open socket.
            unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
        }
        for stream in streams {
            let _ = JoinHandle::join(stream);
        }
    }

    fn line(&self, dialled: SocketAddr, client: SocketAddr) -> String {
        format!("{} {dialled} from {client}\n", self.name)
    }

    fn answer_tcp(&self, mut conn: TcpStream, client: SocketAddr) -> Option<JoinHandle<()>> {
        let dialled = conn.local_addr().ok()?;
        let _ = conn.set_write_timeout(Some(Duration::from_millis(100)));
        let _ = conn.write_all(self.line(dialled, client).as_bytes());
        if self.mode == Tcp::Answer {
            return None;
        }
        let stopping = self.stopping.clone();
        Some(thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                match conn.write(&[b'.'; 2048]) {
                    Ok(_) => thread::sleep(Duration::from_millis(5)),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
        }))
    }

    /// Answers a datagram from the address that it was sent to, by that one of `sockets` which is
    /// bound to it, or by a new one. A new one is returned, to be kept and served: outside, it gets
    /// the next datagrams to its address.
    fn answer_udp(
        &self,
        client: SocketAddr,
        dialled: SocketAddr,
        sockets: &[UdpSocket],
    ) -> Option<UdpSocket> {
        let line = self.line(dialled, client);
        let bound = |s: &&UdpSocket| s.local_addr().is_ok_and(|local| local == dialled);
        if let Some(bound) = sockets.iter().find(bound) {
            let _ = bound.send_to(line.as_bytes(), client);
            return None;
        }
        let new = UdpSocket::from(bind(dialled, libc::SOCK_DGRAM));
        let _ = new.send_to(line.as_bytes(), client);
        Some(new)
    }
}

/// A transparent socket that is bound to `at`, reports original destinations, and shares its port
/// with sockets of other addresses.
pub fn bind(at: SocketAddr, kind: c_int) -> OwnedFd {
    let family = if at.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: integers only; the descriptor is new, hence ours.
    let fd = unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "socket: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    bind_fd(&fd, at);
    fd
}

/// As [`bind`], for a socket that is there.
pub fn bind_fd(fd: &OwnedFd, at: SocketAddr) {
    set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
    if at.is_ipv4() {
        set(fd, libc::SOL_IP, libc::IP_TRANSPARENT, 1);
        set(fd, libc::SOL_IP, libc::IP_RECVORIGDSTADDR, 1);
    } else {
        set(fd, libc::SOL_IPV6, libc::IPV6_V6ONLY, 1);
        set(fd, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1);
        set(fd, libc::SOL_IPV6, libc::IPV6_RECVORIGDSTADDR, 1);
    }
    bind_at(fd, at);
}

/// Binds a socket. A process that another test has forked may hold a copy of a socket that was closed
/// here, at the same address, for an instant.
pub fn bind_at(fd: &impl AsRawFd, at: SocketAddr) {
    let (raw, len) = raw_addr(at);
    let mut bound = Ok(0);
    wait_until(PATIENCE, || {
        // SAFETY: a sockaddr of the length that goes with it.
        bound = Errno::result(unsafe { libc::bind(fd.as_raw_fd(), (&raw const raw).cast(), len) });
        bound != Err(Errno::EADDRINUSE)
    });
    bound.unwrap_or_else(|error| panic!("unable to bind {at}: {error}"));
}

/// Sets a socket option that is an integer.
pub fn set(fd: &OwnedFd, level: c_int, option: c_int, value: c_int) {
    let size = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: reads one live c_int.
    let rc =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const value).cast(), size) };
    assert_eq!(rc, 0, "setsockopt {level}/{option}: {}", io::Error::last_os_error());
}

/// Sender and original destination of the next datagram, if one is there.
pub fn recv_datagram(socket: &UdpSocket) -> Option<(SocketAddr, SocketAddr)> {
    let mut data = [0u8; 2048];
    // SAFETY: the kernel writes within the buffers that msghdr names, all alive here; the control
    // messages are read with the kernel's own macros, within the length that it returned.
    unsafe {
        let mut from: libc::sockaddr_storage = zeroed();
        let mut control = [0u64; 32];
        let mut iov = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
        let mut msg: libc::msghdr = zeroed();
        msg.msg_name = (&raw mut from).cast();
        msg.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = size_of_val(&control) as _;
        if libc::recvmsg(socket.as_raw_fd(), &mut msg, libc::MSG_DONTWAIT) < 0 {
            return None;
        }
        let mut cmsg = libc::CMSG_FIRSTHDR(&msg);
        while let Some(header) = cmsg.as_ref() {
            let known = [
                (libc::SOL_IP, libc::IP_RECVORIGDSTADDR),
                (libc::SOL_IPV6, libc::IPV6_RECVORIGDSTADDR),
            ];
            if known.contains(&(header.cmsg_level, header.cmsg_type)) {
                let mut to: libc::sockaddr_storage = zeroed();
                let data = libc::CMSG_DATA(cmsg);
                #[allow(clippy::unnecessary_cast)] // the C libraries differ on its type
                let len = header.cmsg_len as usize - (data as usize - cmsg as usize);
                std::ptr::copy_nonoverlapping(data, (&raw mut to).cast(), len);
                return Some((from_raw(&from)?, from_raw(&to)?));
            }
            cmsg = libc::CMSG_NXTHDR(&msg, cmsg);
        }
    }
    None
}

/// `addr` as the kernel takes it, with the length of the part in use.
pub fn raw_addr(addr: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: every sockaddr is plain integers, and fits into sockaddr_storage.
    unsafe {
        let mut raw: libc::sockaddr_storage = zeroed();
        let len = match addr {
            SocketAddr::V4(a) => {
                let sin = &mut *(&raw mut raw).cast::<libc::sockaddr_in>();
                sin.sin_family = libc::AF_INET as _;
                sin.sin_port = a.port().to_be();
                sin.sin_addr.s_addr = u32::from_ne_bytes(a.ip().octets());
                size_of::<libc::sockaddr_in>()
            }
            SocketAddr::V6(a) => {
                let sin = &mut *(&raw mut raw).cast::<libc::sockaddr_in6>();
                sin.sin6_family = libc::AF_INET6 as _;
                sin.sin6_port = a.port().to_be();
                sin.sin6_addr.s6_addr = a.ip().octets();
                sin.sin6_scope_id = a.scope_id();
                size_of::<libc::sockaddr_in6>()
            }
        };
        (raw, len as libc::socklen_t)
    }
}

fn from_raw(raw: &libc::sockaddr_storage) -> Option<SocketAddr> {
    // SAFETY: the family says which sockaddr it is.
    unsafe {
        match c_int::from(raw.ss_family) {
            libc::AF_INET => {
                let sin = &*(&raw const *raw).cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(sin.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddr::new(ip.into(), u16::from_be(sin.sin_port)))
            }
            libc::AF_INET6 => {
                let sin = &*(&raw const *raw).cast::<libc::sockaddr_in6>();
                let ip = Ipv6Addr::from(sin.sin6_addr.s6_addr);
                Some(SocketAddr::new(ip.into(), u16::from_be(sin.sin6_port)))
            }
            _ => None,
        }
    }
}

/// The usual world: the remote host (`remote`) on ports 53, 80 and 443 and the streaming port, and
/// the wire to it.
pub struct World {
    pub wire: Wire,
    _remote: Server,
    _stream: Server,
}

impl World {
    /// The world of a ground, which listens when this returns.
    pub fn new(ground: &Ground) -> World {
        let wire = Wire::open(ground);
        ground.outside(|| World {
            wire,
            _remote: Server::start("remote", &[53, 80, 443]),
            _stream: Server::stream("remote", &[STREAM_PORT]),
        })
    }

    /// With the proxy that most configurations name, on this host.
    pub fn with_proxy(ground: &Ground) -> (World, Server) {
        (World::new(ground), Server::start(PROXY, &[7893]))
    }
}

/// A packet that reached the outside.
#[derive(Clone, PartialEq, Eq)]
pub struct Packet {
    pub proto: Proto,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    /// TCP flags, else 0.
    pub flags: u8,
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:?} {} > {} flags {:#04x}", self.proto, self.src, self.dst, self.flags)
    }
}

/// TCP flags.
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// Packets other than ICMP.
pub fn but_pings(mut packets: Vec<Packet>) -> Vec<Packet> {
    packets.retain(|p| p.proto != Proto::Icmp);
    packets
}

/// EtherType "local experimental": what the end marker of [`Wire::packets`] travels as.
const MARKER: u16 = 0x88b5;

/// The outside end of the veth pair: every TCP, UDP and ICMP packet that the host sends.
pub struct Wire {
    outside: OwnedFd,
    inside: OwnedFd,
    seen: VecDeque<Packet>,
}

impl Wire {
    /// Sees what the host sends from now on.
    pub fn open(ground: &Ground) -> Wire {
        Wire::between(ground, "in0", "out0")
    }

    /// The same of another pair of interfaces.
    pub fn between(ground: &Ground, inside: &str, outside: &str) -> Wire {
        let outside = ground.outside(|| packet_socket(outside, libc::ETH_P_ALL as u16));
        // Enough for some 50,000 packets between two calls of `packets`.
        set(&outside, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20);
        set(&outside, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1);
        Wire { outside, inside: packet_socket(inside, 0), seen: VecDeque::new() }
    }

    /// What the host sent since the last call. Exact: a packet that the host sent before this call
    /// is among them.
    pub fn packets(&mut self) -> Vec<Packet> {
        // A veth delivers through the backlog queue of the sending processor, in order. So when a
        // marker from each processor has come through, whatever went before it has as well.
        let home = sched_getaffinity(Pid::from_raw(0)).expect("read the affinity");
        let mut markers = 0;
        for cpu in (0..CpuSet::count()).filter(|cpu| home.is_set(*cpu) == Ok(true)) {
            let mut one = CpuSet::new();
            one.set(cpu).expect("a processor that exists");
            sched_setaffinity(Pid::from_raw(0), &one).expect("move to a processor");
            let mut frame = [0xffu8; 60];
            frame[12..14].copy_from_slice(&MARKER.to_be_bytes());
            let fd = self.inside.as_raw_fd();
            // SAFETY: reads `frame` only.
            let rc = unsafe { libc::send(fd, frame.as_ptr().cast(), frame.len(), 0) };
            assert_eq!(rc, 60, "unable to send a marker: {}", io::Error::last_os_error());
            markers += 1;
        }
        sched_setaffinity(Pid::from_raw(0), &home).expect("restore the affinity");
        while markers > 0 {
            let mut frame = [0u8; 128];
            let n = self.recv(&mut frame);
            let frame = &frame[..n];
            if frame.get(12..14) == Some(&MARKER.to_be_bytes()) {
                markers -= 1;
            } else {
                self.seen.extend(parse(frame));
            }
        }
        self.assert_none_lost();
        self.seen.drain(..).collect()
    }

    /// The packets since the last call of this or [`Wire::packets`] to the remote hosts.
    #[allow(clippy::wrong_self_convention)] // converts nothing
    pub fn to_remote(&mut self) -> Vec<Packet> {
        let mut packets = self.packets();
        packets.retain(|p| [REMOTE4, REMOTE6].contains(&p.dst.ip()));
        packets
    }

    /// Asserts that nothing but pings has left for the remote hosts since the last call of these.
    #[track_caller]
    pub fn assert_only_pings(&mut self) {
        assert_eq!(but_pings(self.to_remote()), [], "left for the world");
    }

    fn recv(&self, frame: &mut [u8]) -> usize {
        let mut fds = [PollFd::new(self.outside.as_fd(), PollFlags::POLLIN)];
        let n = poll(&mut fds, PATIENCE.as_millis() as u16).expect("poll the wire");
        assert_eq!(n, 1, "a marker was lost on the wire");
        let fd = self.outside.as_raw_fd();
        // SAFETY: writes within `frame`.
        let n = unsafe { libc::recv(fd, frame.as_mut_ptr().cast(), frame.len(), 0) };
        usize::try_from(n).expect("read the wire")
    }

    fn assert_none_lost(&self) {
        // struct tpacket_stats of linux/if_packet.h: packets, drops.
        let mut stats = [0u32; 2];
        let mut size = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: writes within `stats`.
        let rc = unsafe {
            let out = stats.as_mut_ptr().cast();
            let fd = self.outside.as_raw_fd();
            libc::getsockopt(fd, libc::SOL_PACKET, libc::PACKET_STATISTICS, out, &mut size)
        };
        assert_eq!((rc, stats[1]), (0, 0), "the wire's buffer has overflowed");
    }
}

/// The number of an interface of the calling thread's network namespace; 0 where there is none.
pub fn interface_index(name: &str) -> u32 {
    let name = CString::new(name).expect("no NUL");
    // SAFETY: a NUL-terminated name.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

/// A raw socket on an interface; protocol 0 receives nothing.
fn packet_socket(interface: &str, protocol: u16) -> OwnedFd {
    // SAFETY: integers, and a sockaddr with its size; the descriptor is new, hence ours.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        let mut at: libc::sockaddr_ll = zeroed();
        at.sll_family = libc::AF_PACKET as u16;
        at.sll_protocol = protocol.to_be();
        at.sll_ifindex = interface_index(interface) as c_int;
        let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        assert_eq!(libc::bind(fd, (&raw const at).cast(), size), 0, "bind to {interface}");
        OwnedFd::from_raw_fd(fd)
    }
}

/// An Ethernet frame's TCP, UDP or ICMP packet; None for anything else.
fn parse(frame: &[u8]) -> Option<Packet> {
    let ip = frame.get(14..)?;
    let (src, dst, proto, rest): (IpAddr, IpAddr, u8, &[u8]) = match ip.first()? >> 4 {
        4 => {
            let at = |n: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(n..n + 4)?).ok()?));
            let header = usize::from(ip[0] & 15) * 4;
            (at(12)?.into(), at(16)?.into(), *ip.get(9)?, ip.get(header..)?)
        }
        6 => {
            let at =
                |n: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(n..n + 16)?).ok()?));
            (at(8)?.into(), at(24)?.into(), *ip.get(6)?, ip.get(40..)?)
        }
        _ => return None,
    };
    let port = |n: usize| Some(u16::from_be_bytes([*rest.get(n)?, *rest.get(n + 1)?]));
    let (proto, ports, flags) = match proto {
        6 => (Proto::Tcp, (port(0)?, port(2)?), *rest.get(13)?),
        17 => (Proto::Udp, (port(0)?, port(2)?), 0),
        1 | 58 => (Proto::Icmp, (0, 0), 0),
        _ => return None,
    };
    let (src, dst) = (SocketAddr::new(src, ports.0), SocketAddr::new(dst, ports.1));
    Some(Packet { proto, src, dst, flags })
}
