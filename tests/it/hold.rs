//! `hold`: below a held cgroup nothing leaves before the daemon has looked at the cgroup that sends
//! it, whatever the daemon does meanwhile.

use std::fs::{self, File};
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cgtproxy::kernel::Kernel;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{waitpid, WaitStatus};

use crate::client::{
    again, connect, expect, fork_into, socket_in, tcp_in, udp_in, under, Client, Outcome, Proto,
    Running, FLOWS, PATIENCE, SILENCE,
};
use crate::daemon::{run_at, run_with, Daemon, UNOWNED};
use crate::flood::{Flood, Stall};
use crate::forgotten::{Takers, ASKED};
use crate::ground::{addr, remove_tree, Ground, HOST4, HOST6, REMOTE4, REMOTE6, REMOTES};
use crate::kernel::{await_connection, await_member, cgroup_id, load, set_ids, table, SETTLE};
use crate::stale::bind_to;
use crate::world::{raw_addr, Packet, Server, World, STREAM_PORT, SYN};
use crate::{sized, wait_until};

/// What is born below /held goes directly but for what a rule names.
const POLICY: &str = "[tproxy mihomo]\nport = 7893\n\
    [rules]\ndrop = /held/(.*/)?d[0-9]+\nmihomo = /held/(.*/)?p[0-9]+\n";
const HOLD: &str = "[global]\nhold = /held\n";

/// Where those ask that the policy drops, those that it proxies, and all others.
const DROPPED: u16 = 7001;
const PROXIED: u16 = 7002;
const DIRECT: u16 = 80;

fn held() -> String {
    format!("{HOLD}{POLICY}")
}

/// Births of the most different kinds, one after the other.
struct Births<'a> {
    ground: &'a Ground,
    world: World,
    _proxy: Server,
    count: usize,
}

/// How some of them fared.
#[derive(Debug, Default)]
struct Fared {
    born: usize,
    /// Packets that the policy drops or proxies, on the wire.
    leaked: Vec<Packet>,
    /// Births that go directly, and those of which the first packet was on the wire.
    direct: usize,
    at_once: usize,
}

impl<'a> Births<'a> {
    fn new(ground: &'a Ground) -> Births<'a> {
        ground.cgroup("/held");
        let (world, proxy) = World::with_proxy(ground);
        Births { ground, world, _proxy: proxy, count: 0 }
    }

    /// One cgroup is made, a process is born in it and sends at once, and both are gone.
    fn one(&mut self) -> bool {
        let i = self.count;
        self.count += 1;
        let (kind, port) = [("d", DROPPED), ("p", PROXIED), ("o", DIRECT)][i % 3];
        let proto = if i / 3 % 2 == 0 { Proto::Tcp } else { Proto::Udp };
        let ip = if i / 6 % 2 == 0 { REMOTE4 } else { REMOTE6 };
        let path = self.ground.at(&format!("/held/{kind}{i}"));
        fs::create_dir(&path).expect("make a cgroup");
        be_born(&path, proto, addr(ip, port));
        // EBUSY until the process has left it
        assert!(wait_until(PATIENCE, || fs::remove_dir(&path).is_ok()));
        port == DIRECT
    }

    fn some(&mut self, births: usize) -> Fared {
        let mut fared = Fared { born: births, ..Fared::default() };
        self.world.wire.packets();
        for i in 0..births {
            fared.direct += usize::from(self.one());
            if i % 1000 == 999 {
                self.look(&mut fared);
            }
        }
        self.look(&mut fared);
        fared
    }

    fn look(&mut self, fared: &mut Fared) {
        for packet in self.world.wire.to_remote() {
            let first = packet.proto == Proto::Udp || packet.flags == SYN;
            match packet.dst.port() {
                DIRECT => fared.at_once += usize::from(first),
                // the kernel answers what comes for a process that is gone
                0 => {}
                _ => fared.leaked.push(packet),
            }
        }
    }
}

/// A process of that cgroup sends one packet, and ends. Gives the errno.
fn be_born(cgroup: &Path, proto: Proto, to: SocketAddr) -> i32 {
    let cgroup = File::open(cgroup).expect("open the cgroup");
    let (raw, len) = raw_addr(to);
    let family = i32::from(raw.ss_family);
    let kind = if proto == Proto::Tcp { libc::SOCK_STREAM } else { libc::SOCK_DGRAM };
    // SAFETY: system calls on integers and live buffers only.
    let child = || unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_NONBLOCK, 0);
        let mut rc = libc::connect(fd, (&raw const raw).cast(), len) as isize;
        if kind == libc::SOCK_DGRAM {
            rc = libc::send(fd, b"?".as_ptr().cast(), 1, 0);
        }
        if rc < 0 {
            Errno::last_raw()
        } else {
            0
        }
    };
    // SAFETY: the child makes system calls only.
    let pid = unsafe { fork_into(&cgroup, child) }.expect("fork into the cgroup");
    match waitpid(pid, None) {
        Ok(WaitStatus::Exited(_, errno)) => errno,
        other => panic!("{other:?}"),
    }
}

/// A SYN begins a connection, also from a port that conntrack knows as that of another one, which the
/// far end was not told the end of.
#[test]
fn a_port_that_was_anothers() {
    let (ground, mut world) = scene!("hold-port");
    let before = ["/direct", "/held/p1"].map(|path| ground.cgroup(path));
    let _takers = Takers::new(&ground, &before[0]);
    let daemon = Daemon::start(&ground, &held(), &[]);
    let mut births = Vec::new();
    for (ip, host) in [(REMOTE4, HOST4), (REMOTE6, HOST6)] {
        for cgroup in &before {
            let (to, own) = (addr(ip, ASKED), addr(host, 6000 + births.len() as u16));
            let socket = socket_in(cgroup, libc::SOCK_STREAM, ip);
            bind_to(&socket, own);
            connect(&socket, to).expect("connect");
            // SAFETY: a live buffer; with it the kernel closes a socket and says nothing
            let silent = unsafe {
                let (on, fd): (libc::c_int, _) = (1, socket.as_raw_fd());
                let on = (&raw const on).cast();
                libc::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_REPAIR, on, 4)
            };
            assert_eq!(silent, 0);
            births.push((cgroup, own, to));
        }
    }
    world.wire.packets();

    let mut leaked = Vec::new();
    for (n, (cgroup, own, to)) in births.iter().enumerate() {
        daemon.while_stopped(|| {
            let new = ground.cgroup(&format!("/held/d{n}"));
            let socket = socket_in(&new, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, to.ip());
            bind_to(&socket, *own);
            let _ = connect(&socket, *to);
        });
        leaked.extend(world.wire.to_remote().into_iter().map(|packet| (cgroup, packet)));
    }
    assert_eq!(leaked, []);
    daemon.stop_clean();
}

/// Makes and removes cgroups elsewhere without pause, so that the daemon is never idle.
fn while_busy<T>(ground: &Ground, run: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let many = ground.cgroup("/many");
        let stop = &stop;
        scope.spawn(move || {
            for i in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                let path = many.join(format!("d{}", i % 2000));
                let _ = fs::create_dir(&path).or_else(|_| fs::remove_dir(&path));
            }
        });
        let result = run();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// Through all that a daemon does and all that is done to it.
fn births(ground: &Ground, config: &str, times: usize) -> Vec<(&'static str, Fared)> {
    let mut births = Births::new(ground);
    let mut all = Vec::new();
    let mut daemon = Daemon::start(ground, config, &[]);
    all.push(("idle", births.some(times)));
    all.push(("busy", while_busy(ground, || births.some(times))));
    all.push(("stopped", daemon.while_stopped(|| births.some(times))));
    daemon.kill9();
    all.push(("dead", births.some(times)));
    daemon = Daemon::start(ground, config, &[]);
    // what is born while the next one starts, and while one hands over to it
    let mut starting = Fared::default();
    let mut ends = [Daemon::kill9 as fn(Daemon), Daemon::leave].into_iter().cycle();
    births.world.wire.packets();
    while starting.born < times {
        ends.next().expect("no end")(daemon);
        daemon = Daemon::spawn(ground, config, &[], &[]);
        let ready = AtomicBool::new(false);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let is = daemon.ready();
                ready.store(true, Ordering::Relaxed);
                is
            });
            while !ready.load(Ordering::Relaxed) {
                starting.direct += usize::from(births.one());
                starting.born += 1;
            }
            assert!(waiting.join().expect("a thread"), "it starts");
        });
        births.look(&mut starting);
    }
    all.push(("starting", starting));
    daemon.stop_clean();
    for (when, fared) in &all {
        println!("{when}: {fared:?}");
    }
    all
}

/// Nothing that the policy drops or proxies leaves at a cgroup's birth, whatever the daemon does meanwhile;
/// while it does nothing, nothing leaves at all.
#[test]
fn nothing_leaves_at_birth() {
    let ground = ground!("births");
    for (when, fared) in births(&ground, &held(), sized(300, 10_000)) {
        assert_eq!(fared.leaked, [], "{when}: {fared:?}");
        if ["stopped", "dead"].contains(&when) {
            assert_eq!(fared.at_once, 0, "{when}: {fared:?}");
        }
    }
}

/// So that the test above can fail.
#[test]
fn without_hold_births_leak() {
    let ground = ground!("births-control");
    for (when, fared) in births(&ground, POLICY, 60) {
        if ["stopped", "dead"].contains(&when) {
            assert!(fared.leaked.len() >= fared.born - fared.direct, "{when}: {fared:?}");
            assert_eq!(fared.at_once, fared.direct, "{when}");
        }
    }
}

/// A connection by a process of a cgroup that is new to the daemon.
struct Connecting {
    begun: Instant,
    /// How many SYNs had gone again in this network namespace.
    before: u64,
    running: Running,
}

impl Connecting {
    fn begin(cgroup: &Path, to: SocketAddr) -> Connecting {
        let (begun, before) = (Instant::now(), syns_again());
        Connecting { begun, before, running: Client::tcp(cgroup, to).spawn() }
    }

    /// Who answers, how many times its SYN went again, and how long all took. That is not one time more
    /// than it was for want of the daemon's look, which is over when this is called: a SYN goes again
    /// after 1 s, and after twice that each time.
    #[track_caller]
    fn end(self) -> (String, u64, Duration) {
        let looked = self.begun.elapsed();
        let (outcome, took) = self.running.wait();
        let times = syns_again() - self.before;
        let last_but_one = Duration::from_secs((1 << times.saturating_sub(1)) - 1);
        assert!(last_but_one <= looked, "{times} times, {looked:?} until it was looked at");
        (outcome.who(), times, took)
    }
}

/// How many SYNs have gone again in this network namespace.
fn syns_again() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/netstat").expect("read netstat");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let mut line = || lines.next().expect("a line of TcpExt").split_whitespace();
    let mut both = line().zip(line());
    let (_, count) = both.find(|(name, _)| *name == "TCPSynRetrans").expect("a counter of SYNs");
    count.parse().expect("a number")
}

/// What is held and then allowed connects by itself, with the first SYN after that.
#[test]
fn what_is_allowed_connects_by_itself() {
    let (ground, _world, _proxy) = scene!("hold-connects", proxy);
    ground.cgroup("/held");
    let daemon = Daemon::start(&ground, &held(), &[]);
    let births = sized(60, 300);
    let (mut took, mut held) = (Vec::new(), 0);

    for i in 0..births {
        let (name, who) = if i % 2 == 0 { ("o", "remote") } else { ("p", "proxy mihomo") };
        let cgroup = ground.cgroup(&format!("/held/{name}{i}"));
        let to = addr(if i / 2 % 2 == 0 { REMOTE4 } else { REMOTE6 }, DIRECT);
        let connecting = Connecting::begin(&cgroup, to);
        await_member_of_known(&cgroup);
        let (answer, times, time) = connecting.end();
        assert_eq!(answer, format!("{who} {to}"));
        held += u64::from(times > 0);
        took.push(time);
    }
    took.sort();
    let (median, worst) = (took[births / 2], took[births - 1]);
    println!("{births} births, daemon idle: {held} held, median {median:?}, worst {worst:?}");

    // held for sure
    let to = addr(REMOTE4, DIRECT);
    for (path, who) in [("/held/o-stopped", "remote"), ("/held/p99999", "proxy mihomo")] {
        let cgroup = ground.at(path);
        let connecting = daemon.while_stopped(|| {
            ground.cgroup(path);
            let connecting = Connecting::begin(&cgroup, to);
            assert_eq!(Client::udp(&cgroup, to).run(), Outcome::Failed(Errno::EPERM));
            // longer than what is found late may be late
            thread::sleep(Duration::from_millis(300));
            connecting
        });
        await_member_of_known(&cgroup);
        let (answer, times, time) = connecting.end();
        assert_eq!(answer, format!("{who} {to}"), "{}", daemon.logs());
        println!("held for sure: {times} SYNs went again, {time:?}");
        assert!(times > 0);
    }
    daemon.stop_clean();
}

/// Whether what a process of that cgroup sends leaves: TCP and UDP, both families.
#[track_caller]
fn leaves(cgroup: &Path) -> bool {
    let ask = |proto, ip, patience| {
        Client::new(cgroup, proto, addr(ip, DIRECT)).timeout(patience).run().who()
    };
    // who sends a datagram is told at once
    let mut asked = REMOTES.map(|ip| ask(Proto::Udp, ip, PATIENCE)).to_vec();
    let patience = if asked[0] == "nobody" { SILENCE } else { PATIENCE };
    asked.extend(REMOTES.map(|ip| ask(Proto::Tcp, ip, patience)));
    let held = asked.iter().filter(|who| *who == "nobody").count();
    assert!([0, asked.len()].contains(&held), "{cgroup:?}: {asked:?}");
    held == 0
}

/// A process right after the birth of its cgroup, which is one of these, and whether it is held.
fn held_at_birth(ground: &Ground, paths: &[(&str, bool)]) {
    let held = |path: &str| !leaves(&ground.cgroup(path));
    let found: Vec<_> = paths.iter().map(|(path, _)| (*path, held(path))).collect();
    assert_eq!(found, paths);
    paths.iter().for_each(|(path, _)| drop(fs::remove_dir(ground.at(path))));
}

/// The held cgroup itself, what is above and beside it, and what is known pass; what is new below
/// does not, however deep.
#[test]
fn what_is_held_and_what_is_not() {
    let (ground, _world, _proxy) = scene!("hold-scope", proxy);
    let deep = "/held/a".to_string() + &"/b".repeat(30);
    let threaded = ground.cgroup("/held/t/h");
    let config = "[global]\nhold = /held\nhold = /x/.*/held\nhold = /held/a\n".to_string() + POLICY;
    for path in ["/held/a/b", "/x/held/c", "/x/y/held/c", "/beside", &deep] {
        ground.cgroup(path);
    }
    fs::write(threaded.join("cgroup.type"), "threaded").expect("a threaded cgroup");
    let daemon = Daemon::start(&ground, &config, &[]);
    await_member_of_known(&ground.at(&deep));
    daemon.kill9();

    for path in ["", "/held", "/held/a", "/held/a/b", "/x", "/x/held", "/beside", "/held/t", &deep]
    {
        assert!(leaves(&ground.at(path)), "{path}");
    }
    held_at_birth(
        &ground,
        &[
            ("/held/new", true),
            ("/held/new/below", true),
            ("/held/a/new", true),
            ("/held/a/b/new", true),
            (&(deep.clone() + "/new"), true),
            (&(deep + "/new/below/that"), true),
            ("/x/y/held/new", true),
            ("/x/held/new", false),
            ("/new", false),
            ("/beside/new", false),
            ("/heldnot/new", false),
        ],
    );

    // another one of the same name
    fs::remove_dir(ground.at("/x/y/held/c")).expect("remove it");
    held_at_birth(&ground, &[("/x/y/held/c", true)]);

    let daemon = Daemon::start(&ground, &config, &[]);
    let new = ground.cgroup("/held/new/below");
    await_member_of_known(&new);
    assert!(leaves(&new));
    daemon.stop_clean();
    held_at_birth(&ground, &[("/held/new2", false)]);
}

/// The cgroup has been looked at.
#[track_caller]
fn await_member_of_known(path: &Path) {
    let id = cgroup_id(path).expect("a cgroup");
    let is = || set_ids("known").is_some_and(|ids| ids.contains(&id));
    assert!(wait_until(SETTLE, is), "{path:?} is not known");
}

/// `/` stands for the cgroup root, whether that is the root of all or not.
#[test]
fn the_root_is_held() {
    let (ground, _world, _proxy) = scene!("hold-root", proxy);
    let known = ground.cgroup("/known");
    let whole = "[global]\ncgroup-root = /sys/fs/cgroup\nhold = /\n";
    for config in ["[global]\nhold = /\n", "[global]\nhold = /.*\n", whole] {
        let daemon = Daemon::start(&ground, config, &[]);
        await_member_of_known(&known);
        daemon.kill9();

        assert!(leaves(&known) && leaves(&ground.root), "{config}");
        held_at_birth(&ground, &[("/new", true), ("/known/new", true)]);
        let beside = ground.root.with_extension("beside");
        fs::create_dir(&beside).expect("make a cgroup");
        let held = !leaves(&beside);
        remove_tree(&beside);
        assert_eq!(held, config == whole, "{config}");
        Daemon::start(&ground, config, &[]).stop_clean();
    }
}

/// A reload that holds disturbs nothing that there is, nor does one that holds no more.
#[test]
fn a_reload_that_holds() {
    let (ground, mut world, _proxy) = scene!("hold-reload", proxy);
    let held = held();
    let cgroups = ground.cgroups(["/held/o1", "/held/p1", "/held/a/o2"]);
    let daemon = Daemon::start(&ground, POLICY, &[]);
    await_member(&cgroups[1], "mihomo");
    let floods = cgroups.each_ref().map(|cgroup| {
        let flood = Client::udp(cgroup, addr(REMOTE4, 7)).until_denied();
        flood.timeout(Duration::from_secs(2)).spawn()
    });

    for i in 0..20 {
        daemon.reconfigure(if i % 2 == 0 { &held } else { POLICY });
    }
    for flood in floods {
        assert_eq!(flood.wait().0, Outcome::Timeout, "nothing is denied to what was there");
    }

    daemon.reconfigure(&held);
    world.wire.packets();
    let born = [("/held/d7", true), ("/held/a/o7", true)];
    daemon.while_stopped(|| held_at_birth(&ground, &born));
    assert_eq!(world.wire.to_remote(), []);

    daemon.reconfigure(POLICY);
    assert!(!table().contains("known"), "{}", table());
    daemon.while_stopped(|| held_at_birth(&ground, &[("/held/o8", false)]));
    daemon.stop_clean();
}

/// Between a daemon and the next one, and where others have flushed the table.
#[test]
fn it_goes_on_holding() {
    let (ground, _world, _proxy) = scene!("hold-on", proxy);
    ground.cgroup("/held/o1");
    for env in [&[][..], &[UNOWNED]] {
        let start = || Daemon::start_in(&ground, &held(), &[], env);
        for end in [Daemon::kill9, Daemon::leave] {
            end(start());
            held_at_birth(&ground, &[("/held/o2", true)]);

            let old = ground.cgroup("/held/o3");
            let daemon = start();
            // what the dead one has not seen is known to the next one from its first moment on
            assert!(leaves(&old) && leaves(&ground.at("/held/o1")));
            remove_tree(&old);
            daemon.while_stopped(|| held_at_birth(&ground, &[("/held/o4", true)]));
            daemon.leave();
        }

        let daemon = start();
        if !env.is_empty() {
            load("flush table inet cgtproxy");
            let back = || table().contains("known") && table().contains("chain hold");
            assert!(wait_until(PATIENCE, back), "{}", daemon.logs());
            await_member_of_known(&ground.at("/held/o1"));
        }
        daemon.while_stopped(|| held_at_birth(&ground, &[("/held/o5", true)]));
        daemon.stop_clean();
    }
}

/// What goes nowhere wrong is not held: what stays on this host, answers, what is left alone
/// whatever the target. DNS that is to be hijacked wherever it goes is.
#[test]
fn what_is_left_alone_is_not_held() {
    let (ground, _world, _proxy) = scene!("hold-spares", proxy);
    let _resolver = Server::start("resolver", &[53]);
    ground.cgroup("/held");
    let spares = format!("bypass = {REMOTE6}\nbypass-mark = 0x7\n");
    let hijack = "dns-hijack = 127.0.0.1:1053\ndns-hijack = [::1]:1053\ndns-hijack-local = yes\n";
    for hijack in ["", hijack] {
        let policy = POLICY.replace("[rules]", &format!("{hijack}[rules]"));
        let daemon = Daemon::start(&ground, &format!("{HOLD}{spares}{policy}"), &[]);
        daemon.kill9();
        let new = ground.cgroup("/held/new");

        let who = |client: Client| client.timeout(SILENCE).run().who();
        for ip in [IpAddr::from([127, 0, 0, 1]), HOST4] {
            assert_eq!(who(Client::udp(&new, addr(ip, 7893))), format!("proxy mihomo {ip}:7893"));
            let dns = who(Client::udp(&new, addr(ip, 53)));
            assert_eq!(dns == "nobody", !hijack.is_empty(), "{dns}");
        }
        assert_eq!(who(Client::udp(&new, addr(REMOTE4, DIRECT))), "nobody");
        for client in [
            Client::udp(&new, addr(REMOTE6, DIRECT)),
            Client::tcp(&new, addr(REMOTE6, DIRECT)),
            Client::udp(&new, addr(REMOTE4, DIRECT)).mark(7),
        ] {
            assert!(who(client).starts_with("remote "));
        }
        let dns = who(Client::udp(&new, addr(REMOTE6, 53)));
        assert_eq!(dns == "nobody", !hijack.is_empty(), "{dns}");
        // services of a cgroup that nobody has looked at stay reachable
        for proto in [Proto::Tcp, Proto::Udp] {
            let _service = Client::new(&new, proto, addr(HOST4, 8080)).serve();
            ground.outside(|| {
                let asked = Client::new(&ground.root, proto, addr(HOST4, 8080)).run();
                assert_eq!(asked, Outcome::Answer("service".into()));
            });
        }
        remove_tree(&new);
        Daemon::start(&ground, POLICY, &[]).stop_clean();
    }
}

/// A datagram from the port that another's came from is of that flow, to conntrack, and to the policy
/// it is the new cgroup's.
#[test]
fn the_port_of_another_flow() {
    let (ground, mut world) = scene!("hold-port");
    let known = ground.cgroup("/held/o1");
    let daemon = Daemon::start(&ground, &held(), &[]);
    await_member_of_known(&known);
    daemon.signal(Signal::SIGSTOP);
    let new = ground.cgroup("/held/d1");
    let ask = |cgroup: &Path, ip: IpAddr| {
        let socket = udp_in(cgroup, ip);
        bind_to(&socket, addr(if ip.is_ipv4() { HOST4 } else { HOST6 }, 5353));
        socket.connect(addr(ip, DIRECT)).expect("connect");
        let sent = socket.send(b"?");
        sent.and_then(|_| again(|| socket.recv(&mut [0; 64]))).map_err(|e| e.raw_os_error())
    };

    // a query, and then a stream of more than two seconds
    for pause in [0, 2200] {
        thread::sleep(Duration::from_millis(pause));
        for ip in REMOTES {
            assert!(ask(&known, ip).is_ok());
        }
        world.wire.packets();
        for ip in REMOTES {
            assert_eq!(ask(&new, ip), Err(Some(libc::EPERM)));
        }
        assert_eq!(world.wire.to_remote(), []);
    }
    daemon.signal(Signal::SIGCONT);
    daemon.stop_clean();
}

/// Connections live on in a socket whose cgroup has been removed; nothing else leaves by it.
#[test]
fn sockets_of_removed_cgroups() {
    let (ground, _world, _proxy) = scene!("hold-removed", proxy);
    let known = ground.cgroup("/held/o1");
    let daemon = Daemon::start(&ground, &held(), &[]);
    await_member_of_known(&known);
    let id = cgroup_id(&known).expect("a cgroup");
    let mut tcp = tcp_in(&known, addr(REMOTE4, STREAM_PORT));
    let udp = udp_in(&known, REMOTE4);
    udp.connect(addr(REMOTE4, DIRECT)).expect("connect");
    udp.send(b"?").expect("known");

    fs::remove_dir(&known).expect("remove it");
    let gone = || set_ids("known").is_some_and(|ids| !ids.contains(&id));
    assert!(wait_until(PATIENCE, gone));

    assert_eq!(udp.send(b"?").map_err(|e| e.raw_os_error()), Err(Some(libc::EPERM)));
    // more than any buffer had when it was removed
    let mut read = 0;
    while read < 3 << 20 {
        read += again(|| tcp.read(&mut [0; 65536])).expect("the stream goes on");
    }
    daemon.stop_clean();
}

/// What is known pays nothing for hold being dropped in between, and long flows live through all.
#[test]
fn flows_that_go_on_are_not_held() {
    let (ground, world, _proxy) = scene!("hold-flows", proxy);
    let known = ground.cgroup("/held/o1");
    let daemon = Daemon::start(&ground, &held(), &[]);
    await_member_of_known(&known);
    let stream = addr(REMOTE4, STREAM_PORT);
    let follow = Client::tcp(&known, stream).follow().spawn();
    await_connection(stream);

    // new flows of what is known too
    daemon.kill9();
    assert!(leaves(&known));
    let daemon = Daemon::start(&ground, &held(), &[]);
    assert!(leaves(&known));
    daemon.leave();
    assert!(leaves(&known));

    drop(world);
    assert!(matches!(follow.wait().0, Outcome::Answer(_)));
    Daemon::start(&ground, &held(), &[]).stop_clean();
}

/// A name that nft cannot show stays closed, with all that is below it; the listing loads again.
#[test]
fn listings_and_names() {
    let (ground, _world, _proxy) = scene!("hold-names", proxy);
    let (quoted, plain) = (ground.cgroup("/held/a\"b"), ground.cgroup("/held/o 1"));
    let below = ground.cgroup("/held/a\"b/c");
    let daemon = Daemon::start(&ground, &held(), &[]);
    await_member_of_known(&plain);
    assert!(leaves(&plain) && !leaves(&quoted) && !leaves(&below));

    // which it would take away with it
    let listed = table().replace("flags owner", "");
    daemon.stop_clean();
    let shown = run_with(&ground, &held(), &["show"]).fine();
    for (path, text) in [("/held/new", listed), ("/held/new2", shown)] {
        load(&text);
        assert!(!leaves(&ground.cgroup(path)) && leaves(&plain), "{text}");
        load("delete table inet cgtproxy");
    }

    let args = ["explain", "/held/a\"b", "/held/x", "/held"];
    let text = run_with(&ground, &held(), &args).out;
    assert!(text.contains("for the quote in the path"), "{text}");
    assert_eq!(text.matches("hold = /held\n    below   /held: ").count(), 2, "{text}");
}

/// `exec` waits until its cgroup has been looked at, and refuses where nobody is there to do that.
#[test]
fn exec_waits_to_be_looked_at() {
    let (ground, _world, _proxy) = scene!("hold-exec", proxy);
    let config = format!("[global]\nhold = /cgtproxy\n{POLICY}");
    ground.cgroup("/cgtproxy/direct");
    let daemon = Daemon::start(&ground, &config, &[]);

    let script = "exec 3<>/dev/udp/203.0.113.7/80 && echo >&3 && timeout 30 head -n1 <&3";
    for _ in 0..sized(5, 50) {
        let said = daemon.ask(&["exec", "direct", "--", "bash", "-c", script]);
        assert!(said.out.starts_with("remote 203.0.113.7:80"), "{} {}", said.out, said.err);
    }

    let file = daemon.config.clone();
    daemon.kill9();
    let said = run_at(&file, &["exec", "direct", "--", "true"]);
    let why = "the cgroup has not been looked at, and no cgtproxy is running";
    assert!(said.code == Some(1) && said.err.contains(why), "{said:?}");
    Daemon::start(&ground, &config, &[]).stop_clean();
}

/// `check` tells what each hold line holds, and why one holds nothing.
#[test]
fn check_tells_what_is_held() {
    let ground = ground!("hold-check");
    ground.cgroups(["/held/o1", "/leaf"]);
    let config = format!("{HOLD}hold = /leaf\nhold = /none\nhold = none\nhold = /\n{POLICY}");

    let said = run_with(&ground, &config, &["check"]).out;

    for (line, text) in [
        ("hold = /held: ", "holds what is born below 1 cgroups"),
        ("hold = /leaf: ", "nothing is below what it matches"),
        ("hold = /none: ", "no such cgroup is there"),
        ("hold = none: ", "can match nothing: every path begins with"),
        ("hold = /: ", "holds what is born below 1 cgroups"),
    ] {
        assert!(said.lines().any(|l| l.contains(line) && l.contains(text)), "{line}: {said}");
    }
}

/// `status` counts what was held, and tells where nobody is there to let it out.
#[test]
fn status_tells_what_was_held() {
    let (ground, _world, _proxy) = scene!("hold-said", proxy);
    ground.cgroup("/held/o1");
    let daemon = Daemon::start(&ground, &held(), &[]);
    assert!(daemon.ask(&["status"]).out.contains("held: 0 packets of cgroups"));

    let new = ground.at("/held/o2");
    daemon.while_stopped(|| {
        ground.cgroup("/held/o2");
        assert_eq!(be_born(&new, Proto::Udp, addr(REMOTE4, DIRECT)), libc::EPERM);
        assert_eq!(daemon.json("d['held']"), "1");
        let metrics = daemon.ask(&["status", "--prometheus"]).out;
        assert!(metrics.contains("\ncgtproxy_held_packets_total 1\n"), "{metrics}");
    });

    let config = daemon.config.clone();
    daemon.kill9();
    let text = run_at(&config, &["status"]).out;
    assert!(text.contains("what is new below held ones has no way out"), "{text}");
    Daemon::start(&ground, &held(), &[]).stop_clean();
    expect(&[(&new, under("direct"))]);
}

/// The first cgroup of a target at its level comes with rules of its own: a packet that has met those
/// of before is not taken for one of a cgroup that has been looked at. Levels in vain make packets
/// slow, so that many meet both. By the cgroup's birth alone, with a reload, and with a repair.
#[test]
fn the_first_of_its_kind() {
    let (ground, mut world, _proxy) = scene!("hold-first", proxy);
    let mut above = String::new();
    for _ in 0..60 {
        ground.cgroup(&format!("{above}/held"));
        above += "/x";
    }
    let policy = |bypass: &str| {
        format!(
            "[global]\nhold = (/x)*/held\nbypass = {bypass}\n[tproxy mihomo]\nport = 7893\n\
             [tproxy no]\nport = 7894\ntcp = reject\nudp = reject\n[route away]\ninterface = none\n\
             [rules]\ndrop = .*/held/.*d[0-9]+\nmihomo = .*/held/.*p[0-9]+\n\
             no = .*/held/.*n[0-9]+\naway = .*/held/.*a[0-9]+\n"
        )
    };
    let mut floods = Vec::new();
    for depth in 0..sized(6, 60) {
        let parent = format!("{above}/held{}", "/x".repeat(depth));
        ground.cgroup(&parent);
        let proto = if depth % 2 == 0 { Proto::Tcp } else { Proto::Udp };
        for (n, kind) in ["d", "p", "n", "a"].iter().enumerate() {
            let to = if (depth / 2 + n) % 2 == 0 { REMOTE4 } else { REMOTE6 };
            floods.push((format!("{parent}/{kind}{depth}"), proto, addr(to, DROPPED), depth % 3));
        }
    }
    let daemon = Daemon::start_in(&ground, &policy("198.18.0.1"), &[], &[UNOWNED]);
    world.wire.packets();

    let mut leaked = Vec::new();
    for (n, (path, proto, to, by)) in floods.iter().enumerate() {
        let path = ground.at(path);
        let flood = daemon.while_stopped(|| {
            fs::create_dir(&path).expect("make a cgroup");
            let flood = Flood::start(&path, *proto, None, *to);
            match by {
                0 => {}
                1 => {
                    daemon.configure(&policy(&format!("198.18.1.{n}")));
                    daemon.signal(Signal::SIGHUP);
                }
                _ => load("add rule inet cgtproxy output counter"),
            }
            flood
        });
        await_member_of_known(&path);
        drop(flood);
        leaked.extend(world.wire.to_remote().into_iter().filter(|packet| packet.dst.port() != 0));
    }
    assert_eq!(leaked, [], "{} of {}", leaked.len(), floods.len());
    daemon.stop_clean();
}

/// The same for a packet that waits in a chain while others are at work: in chains that stay, the kernel
/// has it go on by the rules of the transaction after next. The rules that it comes back to are those of
/// before, without the first gate.
#[test]
fn a_packet_that_waits_in_a_chain() {
    let (ground, mut world) = scene!("hold-waits");
    let mut above = String::new();
    for _ in 0..60 {
        above += "/x";
        ground.cgroup(&format!("{above}/held"));
    }
    let config = "[global]\nhold = (/x)*/held\n[rules]\ndrop = .*/held/d[0-9]+\n";
    let mut others = Kernel::open().expect("open netlink");

    let births = sized(12, 100);
    let mut leaked = Vec::new();
    for birth in 0..births {
        let Some(mut stall) = Stall::new() else { return };
        let ip = if birth % 2 == 0 { REMOTE4 } else { REMOTE6 };
        let proto = if birth / 2 % 2 == 0 { Proto::Udp } else { Proto::Tcp };
        let path = ground.at(&format!("{above}/held/d{birth}"));
        let daemon = Daemon::start(&ground, config, &[]);
        world.wire.packets();
        daemon.signal(Signal::SIGSTOP);
        fs::create_dir(&path).expect("make a cgroup");
        let flood = Flood::start_with(Some(&mut stall), &path, proto, None, addr(ip, DROPPED));
        stall.meanwhile(&flood, &daemon, || {
            let end = Instant::now() + Duration::from_millis(50);
            while Instant::now() < end {
                others.probe_cgroups().expect("a transaction");
            }
        });
        await_member_of_known(&path);
        drop(flood);
        leaked.extend(world.wire.to_remote().into_iter().filter(|packet| packet.dst.port() != 0));
        daemon.stop_clean();
        remove_tree(&path);
    }
    assert_eq!(leaked, [], "{} of {births}", leaked.len());
}

/// Where only `drop` is configured, nothing stands between the rules for what is held and the others:
/// a gate that comes at a held one's level, from elsewhere, is not asked before.
#[test]
fn a_gate_at_the_held_level() {
    let (ground, mut world) = scene!("hold-gate");
    ground.cgroup("/up/held");
    let config = "[global]\nhold = /up/held\n\
        [rules]\ndrop = .*/d[0-9]+\ndirect = .*/x/y\ndrop = .*/x\n";
    let daemon = Daemon::start(&ground, config, &[]);
    // the shapes are all there before anything is below the held one
    await_member(&ground.cgroup("/other/a/x"), "drop");
    await_member(&ground.cgroup("/other/a/x/y"), "direct");
    let parent = ground.cgroup("/up/held/x/y");
    await_member_of_known(&parent);
    assert!(leaves(&parent));

    let mut born = 0;
    let mut some = || {
        for (proto, to) in FLOWS {
            born += 1;
            let to = addr(to.ip(), DROPPED);
            be_born(&ground.cgroup(&format!("/up/held/x/y/d{born}")), proto, to);
        }
    };
    some();
    daemon.while_stopped(&mut some);
    some();

    let mut packets = world.wire.to_remote();
    packets.retain(|packet| packet.dst.port() == DROPPED);
    assert_eq!(packets, []);
    daemon.stop_clean();
}
