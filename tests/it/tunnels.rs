//! A VPN of user space, from one end to the other: a program holds a tun device, and carries what it
//! reads there in datagrams of its own to a peer outside, which has one too. It is this test's own;
//! tests/real has WireGuard's.
//!
//! ```text
//!   vpn0  10.8.0.1  fd00:8::1 -- program ==UDP 192.0.2.1 to 192.0.2.2:5555== peer -- vout0  .2  ::2
//! ```

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::client::{
    again, connect, floods, fork_into, socket_in, Client, Outcome, Proto, AT_ONCE, PATIENCE,
    SILENCE,
};
use crate::daemon::{run_with, Daemon, UNOWNED};
use crate::gateway::Lan;
use crate::ground::{
    addr, any_of, ip, ip_lines, pipe, sh, Ground, GATE4, GATE6, HOST4, HOST6, REMOTE4, REMOTES,
};
use crate::kernel::{await_member, forget_flows, load, table};
use crate::lifecycle::Unmount;
use crate::routes::{
    passes, refused, until_closed, until_open, until_passes, until_refused, TUNNEL,
};
use crate::wait_until;
use crate::world::{raw_addr, Server, World};

pub const PORT: u16 = 5555;

/// `struct ifreq` of linux/if.h, as far as TUNSETIFF reads it.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// One end of the tunnel: a process in a cgroup, which ends with this.
pub struct End(Pid);

impl Drop for End {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

impl End {
    /// Makes the tun device `name` here and carries its packets from the address `own` to `peer`.
    pub fn start(cgroup: &Path, name: &str, own: SocketAddr, peer: SocketAddr) -> End {
        let mut request = IfReq { name: [0; libc::IFNAMSIZ], flags: 0, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        let device = CString::new("/dev/net/tun").expect("no NUL");
        let (own, peer) = (raw_addr(own), raw_addr(peer));
        let (read, write) = pipe();
        let write = write.as_raw_fd();
        let dir = File::open(cgroup).expect("open the cgroup");
        let child = || {
            // SAFETY: system calls on live buffers of the lengths that go with them.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::dup2(write, 0);
                libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0);
                let tun = libc::open(device.as_ptr(), libc::O_RDWR);
                let made = libc::ioctl(tun, libc::TUNSETIFF as _, &raw const request);
                let family = i32::from(own.0.ss_family);
                let udp = libc::socket(family, libc::SOCK_DGRAM, 0);
                let bound = libc::bind(udp, (&raw const own.0).cast(), own.1);
                let connected = libc::connect(udp, (&raw const peer.0).cast(), peer.1);
                let well = [tun, made, udp, bound, connected].iter().all(|rc| *rc >= 0);
                libc::write(0, [u8::from(well)].as_ptr().cast(), 1);
                carry(tun, udp)
            }
        };
        // SAFETY: the child makes system calls only.
        let pid = unsafe { fork_into(&dir, child) }.expect("fork into the cgroup");
        let end = End(pid);
        let mut well = [0];
        File::from(read).read_exact(&mut well).expect("the tunnel reports");
        assert_eq!(well, [1], "a tunnel cannot be made: {name}");
        end
    }
}

/// Packets both ways, one a datagram, until killed.
///
/// # Safety
/// Descriptors of this process; makes system calls only.
unsafe fn carry(tun: RawFd, udp: RawFd) -> i32 {
    let mut packet = [0u8; 2048];
    loop {
        let mut fds = [tun, udp].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        // SAFETY: two live pollfds, and buffers with their lengths.
        unsafe {
            libc::poll(fds.as_mut_ptr(), 2, -1);
            for (from, to) in [(0, 1), (1, 0)] {
                if fds[from].revents != 0 {
                    let room = packet.as_mut_ptr().cast();
                    let n = libc::read(fds[from].fd, room, packet.len());
                    if n > 0 {
                        libc::write(fds[to].fd, packet.as_ptr().cast(), n as usize);
                    }
                }
            }
        }
    }
}

/// Brings the device up, with this host's addresses in the tunnel.
pub fn up(mtu: u32) {
    ip_lines(&format!(
        "link set vpn0 mtu {mtu} up\naddr replace 10.8.0.1/24 dev vpn0\n\
         addr replace fd00:8::1/64 dev vpn0 nodad\n"
    ));
}

/// The peer outside, and the program here in its cgroup.
fn tunnel(ground: &Ground, mtu: u32) -> (End, End) {
    let peer = ground.outside(|| {
        let any = ip("0.0.0.0");
        let end = End::start(&ground.cgroup("/peer"), "vout0", addr(any, PORT), addr(HOST4, PORT));
        ip_lines(&format!(
            "link set vout0 mtu {mtu} up\naddr add 10.8.0.2/24 dev vout0\n\
             addr add fd00:8::2/64 dev vout0 nodad\n"
        ));
        end
    });
    let own = here(ground);
    up(mtu);
    (peer, own)
}

fn here(ground: &Ground) -> End {
    End::start(&ground.cgroup("/tunnel"), "vpn0", addr(HOST4, PORT), addr(GATE4, PORT))
}

/// Everything by the tunnel, but for the program behind it.
pub const ALL: &str =
    "[global]\ndefault = vpn\n[route vpn]\ninterface = vpn0\n[rules]\ndirect = /tunnel\n";

pub fn by_cgroup(more: &str) -> String {
    format!("[route vpn]\ninterface = vpn0\n{more}[rules]\nvpn = /vpn\n")
}

/// Asserts that what left by the other interface since the last look were the tunnel's own packets,
/// and that there were some.
#[track_caller]
pub fn only_its_own(world: &mut World) {
    let packets = world.wire.packets();
    let own = packets.iter().filter(|packet| packet.dst == addr(GATE4, PORT)).count();
    let others: Vec<_> =
        packets.iter().filter(|p| p.dst != addr(GATE4, PORT) && p.proto != Proto::Icmp).collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(own > 0, "nothing went by the tunnel");
}

/// Whatever becomes of the program and its interface, what is to go by it goes by nothing else; it goes
/// again as soon as the interface can be used.
#[test]
fn a_program_holds_the_interface() {
    let (ground, mut world) = scene!("tun");
    let cgroup = ground.cgroup("/vpn");
    let (_peer, own) = tunnel(&ground, 1500);
    let daemon = Daemon::start(&ground, &by_cgroup(""), &[]);
    await_member(&cgroup, "vpn");
    passes(&mut world, &cgroup);
    only_then(&mut world, &cgroup);
    // all by it, the tunnel's own packets too but for a rule
    daemon.reconfigure(ALL);
    passes(&mut world, &ground.cgroup("/any"));
    daemon.reconfigure(&by_cgroup(""));

    let floods = floods(&cgroup);
    let none_passes = |world: &mut World| {
        until_closed(&cgroup);
        refused(world, &cgroup);
    };
    // the program ends, and its interface with it
    drop(own);
    refused(&mut world, &cgroup);
    let own = here(&ground);
    refused(&mut world, &cgroup);
    ip_lines("link set vpn0 up\n");
    refused(&mut world, &cgroup);
    let came = Instant::now();
    up(1500);
    let took = came.elapsed();
    for to in REMOTES {
        println!("{to}: {:?} after it came, of which ip took {took:?}", until_passes(&cgroup, to));
    }
    passes(&mut world, &cgroup);

    for end in ["link set vpn0 down\n", "addr flush dev vpn0\n"] {
        ip_lines(end);
        none_passes(&mut world);
        up(1500);
        until_open(&cgroup);
        passes(&mut world, &cgroup);
    }

    // killed while packets are under way
    drop(own);
    none_passes(&mut world);
    drop(floods);
    assert_eq!(world.wire.to_remote(), [], "left by another interface");
}

/// One request, and that what carried it were the tunnel's packets.
fn only_then(world: &mut World, cgroup: &Path) {
    world.wire.packets();
    let outcome = Client::tcp(cgroup, addr(REMOTE4, 80)).run();
    assert!(matches!(outcome, Outcome::Answer(_)), "{outcome:?}");
    only_its_own(world);
}

/// From the moment the interface can be used, as the kernel tells of it, to the first answer: five
/// times, each with a new device.
#[test]
fn it_is_back_at_once() {
    let (ground, _world) = scene!("tunback");
    let cgroup = ground.cgroup("/vpn");
    let (_peer, own) = tunnel(&ground, 1500);
    let mut own = Some(own);
    let _daemon = Daemon::start(&ground, &by_cgroup(""), &[]);
    await_member(&cgroup, "vpn");
    until_passes(&cgroup, REMOTE4);

    let all = [0; 5].map(|_| {
        own.take();
        until_refused(&cgroup, REMOTE4);
        own = Some(here(&ground));
        up(1500);
        until_passes(&cgroup, REMOTE4)
    });

    println!("back after {all:?}");
    // others may keep the processors busy for a while: none of them for all of the five
    assert!(all.iter().any(|took| *took < AT_ONCE / 2), "{all:?}");
}

/// Whole files each way, over an interface with a small MTU.
#[test]
fn bulk_passes_a_small_mtu() {
    let (ground, mut world) = scene!("tunmtu");
    let (_peer, _own) = tunnel(&ground, 1280);
    let _daemon = Daemon::start(&ground, ALL, &[]);
    let cgroup = ground.cgroup("/any");
    for remote in REMOTES {
        until_passes(&cgroup, remote);
        world.wire.packets();

        let took = bulk(&ground, &cgroup, remote);

        println!("{remote}: 10 MiB each way in {took:?}");
        only_its_own(&mut world);
    }
}

/// 10 MiB each way without a stall, seen by the remote host as from the tunnel.
pub fn bulk(ground: &Ground, cgroup: &Path, remote: IpAddr) -> Duration {
    const SIZE: usize = 10 << 20;
    let any = addr(any_of(remote), 0);
    let listener = ground.outside(|| TcpListener::bind(any)).expect("listen outside");
    let port = listener.local_addr().expect("its address").port();
    let server = std::thread::spawn(move || {
        let (mut stream, from) = listener.accept().expect("a client");
        let (mut got, mut buffer) = (0, vec![0; 1 << 16]);
        while got < SIZE {
            got += again(|| stream.read(&mut buffer)).expect("read");
        }
        stream.write_all(&vec![b'x'; SIZE]).expect("send back");
        from.ip()
    });
    let socket = socket_in(cgroup, libc::SOCK_STREAM, remote);
    connect(&socket, addr(remote, port)).expect("connect");
    let mut stream = TcpStream::from(socket);
    for set in [TcpStream::set_read_timeout, TcpStream::set_write_timeout] {
        set(&stream, Some(PATIENCE)).expect("a timeout");
    }
    let start = Instant::now();
    stream.write_all(&vec![b'y'; SIZE]).expect("send, no stall");
    let (mut got, mut buffer) = (0, vec![0; 1 << 16]);
    while got < SIZE {
        got += again(|| stream.read(&mut buffer)).expect("no stall");
    }
    let took = start.elapsed();
    let from = server.join().expect("the server").to_string();
    assert_eq!(from, TUNNEL[usize::from(remote.is_ipv6())]);
    took
}

/// Every resolver that is asked is the one in the tunnel, those of this host included.
#[test]
fn dns_goes_into_it() {
    let (ground, mut world) = scene!("tundns");
    let cgroup = ground.cgroup("/vpn");
    let _local = Server::start("local", &[53]);
    let (_peer, own) = tunnel(&ground, 1500);
    let _daemon = Daemon::start(&ground, &by_cgroup(DNS), &[]);
    await_member(&cgroup, "vpn");
    resolves(&mut world, &cgroup);

    drop(own);
    until_refused(&cgroup, REMOTE4);
    resolves_nothing(&mut world, &cgroup);
}

/// The resolver behind the tunnel.
pub const DNS: &str = "dns-hijack = 10.8.0.2\ndns-hijack = fd00:8::2\ndns-hijack-tcp = yes\n\
                       dns-hijack-local = yes\n";

/// Resolvers that are asked, and the one that has to answer.
const ASKED: [(&str, &str); 4] = [
    ("203.0.113.7", "10.8.0.2:53"),
    ("127.0.0.53", "10.8.0.2:53"),
    ("192.0.2.1", "10.8.0.2:53"),
    ("2001:db8:2::7", "[fd00:8::2]:53"),
];

fn query(cgroup: &Path, proto: Proto, asked: &str, patience: Duration) -> Outcome {
    let to = SocketAddr::new(asked.parse().expect("an address"), 53);
    Client::new(cgroup, proto, to).timeout(patience).run()
}

#[track_caller]
pub fn resolves(world: &mut World, cgroup: &Path) {
    for proto in [Proto::Udp, Proto::Tcp] {
        for (asked, resolver) in ASKED {
            world.wire.packets();
            let outcome = query(cgroup, proto, asked, PATIENCE);
            assert_eq!(outcome.who(), format!("remote {resolver}"), "{proto:?} {asked}");
            only_its_own(world);
        }
    }
}

/// Nor does anybody here answer in its place.
#[track_caller]
pub fn resolves_nothing(world: &mut World, cgroup: &Path) {
    for (asked, _) in ASKED {
        let tcp = query(cgroup, Proto::Tcp, asked, PATIENCE);
        assert_eq!(tcp, Outcome::Refused, "{asked}");
        let who = query(cgroup, Proto::Udp, asked, SILENCE).who();
        assert!(!["local", "remote"].iter().any(|name| who.starts_with(name)), "{asked}: {who}");
    }
    let packets = world.wire.packets();
    assert!(packets.iter().all(|p| p.dst.port() != 53), "{packets:?}");
}

/// The lines of `check` about loops.
fn loops(ground: &Ground, config: &str) -> Vec<String> {
    let text = run_with(ground, config, &["check"]).out;
    text.lines().filter(|line| line.contains("loop: ")).map(str::to_owned).collect()
}

/// `check` sees that the own packets of a tunnel's program would come back to it.
#[test]
fn a_tunnel_that_carries_itself_is_seen() {
    let (ground, _world) = scene!("tunloop");
    let (_peer, _own) = tunnel(&ground, 1500);
    let all = |from, to| ALL.replace(from, to);
    let some = |to: &str| by_cgroup("").replace("vpn = /vpn", to);
    for (config, seen) in [
        (ALL.to_owned(), false),
        (all("direct = /tunnel", "direct = /other"), true),
        (by_cgroup(""), false),
        (some("vpn = /tunnel"), true),
        (some("direct = /tunnel\nvpn = /.*"), false),
        (all("direct = /tunnel", "vpn = user:root"), true),
        (all("direct", "vpn").replace("default = vpn", "bypass-user = root"), false),
        // another interface's program
        (some("vpn = /tunnel").replace("vpn0", "vpn1"), false),
    ] {
        let lines = loops(&ground, &config);
        assert_eq!(lines.len(), usize::from(seen), "{config}{lines:?}");
        for line in lines {
            let (tunnel, cgroup) = ("vpn0 of [route vpn]", "/tunnel; begin [rules]");
            assert!(line.contains(tunnel) && line.contains(cgroup), "{line}");
        }
    }
}

/// The same where a part of the tree is mounted, whose root is not that of the namespace.
#[test]
fn a_tunnel_below_a_mounted_part_is_seen() {
    let (ground, _world) = scene!("tunpart");
    let (_peer, _own) = tunnel(&ground, 1500);
    let part = ground.dir.join("part");
    fs::create_dir(&part).expect("mkdir");
    sh(&format!("mount --bind {} {}", ground.root.display(), part.display()));
    let _unmount = Unmount(&part);
    let config = by_cgroup("").replace("vpn = /vpn", "vpn = /tunnel");

    let config = format!("[global]\ncgroup-root = {}\n{config}", part.display());
    let lines = loops(&ground, &config);

    assert!(lines.len() == 1 && lines[0].contains("vpn0 of [route vpn]"), "{lines:?}");
}

/// The same of a program outside of the cgroup root, which has no path there: a line for its owner comes
/// before the default, for what it sends and for what is said of it.
#[test]
fn a_tunnel_outside_the_cgroup_root_is_seen() {
    let (ground, _world) = scene!("tunoutside");
    let (_peer, _own) = tunnel(&ground, 1500);
    let root = ground.cgroup("/root");
    let apps = ground.cgroup("/root/apps");
    let config = |more: &str| {
        format!("[global]\ncgroup-root = {}\n{}{more}", root.display(), by_cgroup(""))
            .replace("vpn = /vpn\n", "")
    };
    for (more, default, carries) in [
        ("direct = user:root\n", "vpn", true),
        ("direct = user:1\n", "vpn", false),
        ("vpn = /apps\nvpn = user:root\n", "direct", false),
        ("vpn = /apps\nvpn = user:1\n", "direct", true),
    ] {
        let config =
            config(more).replace("[global]\n", &format!("[global]\ndefault = {default}\n"));
        let daemon = Daemon::start(&ground, &config, &[]);
        let client = Client::tcp(&apps, addr(REMOTE4, 80)).uid(1000).timeout(4 * SILENCE);
        let goes = wait_until(PATIENCE, || {
            // the peer may have spoken first, and what answers it is left alone
            forget_flows();
            matches!(client.run(), Outcome::Answer(_)) == carries
        });
        assert!(goes, "{more}");
        let lines = loops(&ground, &config);
        assert_eq!(lines.len(), usize::from(!carries), "{more}{lines:?}");
        daemon.stop_clean();
    }
}

/// A tunnel of the kernel has no process: `check` sees it by the default, or by a rule.
#[test]
fn a_tunnel_of_the_kernel_that_carries_itself_is_seen() {
    let ground = ground!("tunloopk");
    ip_lines("link add vx0 type vxlan id 7 remote 192.0.2.2 dstport 4789\n");
    let all = "[global]\ndefault = vpn\n[route vpn]\ninterface = vx0\n[rules]\ndirect = /x\n";
    let by_rule = "[global]\nbypass = private\n[route vpn]\ninterface = vx0\n[rules]\nvpn = /x\n";
    for config in [all, by_rule] {
        let lines = loops(&ground, config);
        assert!(lines[0].contains("keeps the cgroup"), "{config}{lines:?}");
    }
    for (from, to) in [
        ("[global]\n", "[global]\nbypass = 192.0.2.2\n"),
        ("[global]\n", "[global]\nbypass-mark = 0xca6c\n"),
        // for gateways alone
        ("default = vpn\n", ""),
    ] {
        let lines = loops(&ground, &all.replace(from, to));
        assert!(lines.is_empty(), "{to}{lines:?}");
    }
}

/// The daemon tells of one of the kernel, at the start and when it comes.
#[test]
fn a_tunnel_of_the_kernel_that_carries_itself_is_logged() {
    let ground = ground!("tunlog");
    let config = "[global]\ndefault = vpn\n[route vpn]\ninterface = vx0\n";
    let said = "warning: loop: what the tunnel vx0 of [route vpn] sends itself comes back to it: ";
    let daemon = Daemon::start(&ground, config, &[]);
    assert!(daemon.wait_log("started:", PATIENCE), "{}", daemon.logs());
    assert!(!daemon.logs().contains("loop:"), "{}", daemon.logs());

    ip_lines("link add vx0 type vxlan id 7 remote 192.0.2.2 dstport 4789\n");
    assert!(daemon.wait_log(said, PATIENCE), "{}", daemon.logs());
    assert_eq!(daemon.logs().matches(said).count(), 1, "{}", daemon.logs());
    assert!(daemon.stop().success());

    let daemon = Daemon::start(&ground, config, &[]);
    assert!(daemon.wait_log(said, PATIENCE), "{}", daemon.logs());
    let exempt = config.replace("default", "bypass = 192.0.2.2\ndefault");
    let log = daemon.reconfigure(&exempt);
    assert!(!log.contains("loop:"), "{log}");
    daemon.stop_clean();
}

/// One end of a VXLAN. All that goes by it is of one flow, as WireGuard's; by static neighbours, so that
/// nothing that the kernel asks of itself is waited for.
fn vxlan(name: &str, remote: IpAddr, own: u8, other: u8) {
    ip_lines(&format!(
        "link add {name} address 02:00:00:00:08:0{own} mtu 1300 type vxlan id 7 \
         remote {remote} dstport {PORT} srcport 5554 5555\n\
         link set {name} up\naddr add 10.8.0.{own}/24 dev {name}\n\
         addr add fd00:8::{own}/64 dev {name} nodad\n\
         neigh replace 10.8.0.{other} lladdr 02:00:00:00:08:0{other} dev {name}\n\
         neigh replace fd00:8::{other} lladdr 02:00:00:00:08:0{other} dev {name}\n"
    ));
}

/// Who sends by it: a cgroup that nothing covers, three that rules cover, owners that rules cover, and a
/// client of the LAN.
struct Senders<'a> {
    lan: Lan<'a>,
    cgroups: [PathBuf; 4],
}

impl Senders<'_> {
    /// Asserts that those pass whom no rule covers, and whether the others do.
    #[track_caller]
    fn pass(&self, covered: bool, when: &str) {
        let [free, dropped, proxied, routed] = &self.cgroups;
        for to in ["10.8.0.2", "fd00:8::2"].map(|inside| addr(ip(inside), 80)) {
            let remote = format!("remote {to}");
            assert_eq!(Client::udp(free, to).run().who(), remote, "{when}");
            let (want, patience) = if covered { (&*remote, PATIENCE) } else { ("nobody", SILENCE) };
            let ask = |cgroup, uid, proto| {
                Client::new(cgroup, proto, to).uid(uid).timeout(patience).spawn()
            };
            let cgroups = [dropped, proxied, routed].map(|cgroup| (cgroup, 0));
            let senders = cgroups.into_iter().chain([12345, 12346, 12347].map(|uid| (free, uid)));
            let asked = senders.flat_map(|(cgroup, uid)| {
                [Proto::Tcp, Proto::Udp].map(|p| (ask(cgroup, uid, p), cgroup, uid, p))
            });
            for (running, cgroup, uid, proto) in asked.collect::<Vec<_>>() {
                let who = running.wait().0.who();
                assert_eq!(who, want, "{when}: {cgroup:?} {uid} {proto:?} {to}");
            }
            // the flow was the proxy's last, as far as it has been
            ask(proxied, 0, Proto::Udp).wait();
            assert_eq!(self.lan.ask(0, Proto::Tcp, to), remote, "{when}: a client");
        }
    }
}

/// A tunnel of the kernel sends what it carries with the socket of who sent that, so a rule that has
/// let it into the tunnel decides about it once more: by cgroup or by owner, whatever the target. What
/// a gateway's clients send by it has none, and is nobody's, though it is of the same flow. VXLAN
/// stands for WireGuard here; tests/real has that where the kernel does, as the interface of a route.
#[test]
fn a_tunnel_of_the_kernel() {
    let (ground, _world) = scene!("tunkern");
    let cgroups = ground.cgroups(["/any", "/drop", "/proxied", "/vpn"]);
    let senders = Senders { lan: Lan::new(&ground), cgroups };
    // neither the proxy nor vpn0 is there, so what they get is refused
    let policy = |more: &str| {
        format!(
            "[global]\nbypass = 10.8.0.0/24\nbypass = fd00:8::/64\n{more}\
             [tproxy mihomo]\nport = 7893\n[route vpn]\ninterface = vpn0\n\
             [gateway lan]\ninterface = br-lan\ntarget = direct\n\
             [rules]\ndrop = /drop\nmihomo = /proxied\nvpn = /vpn\n\
             drop = user:12345\nmihomo = user:12346\nvpn = user:12347\n"
        )
    };
    let start = |more: &str| Daemon::start_in(&ground, &policy(more), &[], &[UNOWNED]);
    for (peer, host) in [(GATE4, HOST4), (GATE6, HOST6)] {
        ground.outside(|| vxlan("vout0", host, 2, 1));
        vxlan("vx0", peer, 1, 2);

        let daemon = start("");
        senders.pass(false, "started");
        daemon.kill9();
        senders.pass(false, "killed");
        let daemon = start("");
        senders.pass(false, "started again");
        load("flush table inet cgtproxy");
        let back = || table().contains("socket cgroupv2");
        assert!(wait_until(PATIENCE, back), "{}", daemon.logs());
        senders.pass(false, "repaired");

        let spared = format!("bypass = {peer}\n");
        daemon.reconfigure(&policy(&spared));
        senders.pass(true, "spared");
        daemon.leave();
        senders.pass(true, "left");
        let daemon = start(&spared);
        senders.pass(true, "taken over");

        daemon.stop_clean();
        ip_lines("link del vx0\n");
        ground.outside(|| ip_lines("link del vout0\n"));
    }
}

/// What it is about: with such a policy nothing passes, for the tunnel's packets come back to it.
#[test]
fn a_tunnel_that_carries_itself_carries_nothing() {
    let (ground, _world) = scene!("tunself");
    let (_peer, _own) = tunnel(&ground, 1500);
    let daemon = Daemon::start(&ground, ALL, &[]);
    let any = ground.cgroup("/any");
    until_passes(&any, REMOTE4);

    daemon.reconfigure(&ALL.replace("direct = /tunnel", "direct = /other"));

    let outcome = Client::tcp(&any, addr(REMOTE4, 80)).timeout(2 * SILENCE).run();
    assert!(!matches!(outcome, Outcome::Answer(_)), "{outcome:?}");
    daemon.reconfigure(ALL);
    until_passes(&any, REMOTE4);
}
