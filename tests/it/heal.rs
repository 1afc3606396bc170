//! What other programs do to our state, and how soon the policy is in force again.

use std::cell::Cell;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use libc::c_int;
use nix::sys::socket::{
    recv, send, socket, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType,
};

use crate::client::{expect, under, Client, Proto, PATIENCE, SILENCE};
use crate::daemon::{Daemon, POLICY, UNOWNED};
use crate::gateway::Lan;
use crate::ground::{addr, here, ip_batch, Ground, REMOTE4, REMOTE6};
use crate::kernel::{await_member, nft, residue, state, table, Owner};
use crate::routes::{tunnel_up, GATEWAYS};
use crate::world::{interface_index, World, PROXY};
use crate::{sized, wait_until};

/// Runs a command line of ip or nft; whether it succeeded. (nft is refused where somebody else's
/// transaction, such as a repair, comes between its look and its own.)
fn shell(line: &str) -> bool {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().unwrap_or_default());
    let out = command.args(words).output().expect("start a command");
    out.status.success()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// `nft monitor` or `ip monitor`: its lines with the moment at which each was read.
struct Monitor {
    child: Child,
    lines: Receiver<(Instant, String)>,
    program: &'static str,
    marks: Cell<u32>,
}

impl Monitor {
    /// `program` is nft or ip.
    fn start(program: &'static str) -> Monitor {
        let what: &[&str] = match program {
            "nft" => &["monitor"],
            _ => &["monitor", "rule", "route"],
        };
        let mut command = Command::new(program);
        command.args(what).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start a monitor");
        let out = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let (send, lines) = channel();
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if send.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        let marks = Cell::new(20_000);
        let monitor = Monitor { child, lines, program, marks };
        // it listens once it tells of a mark
        let listens = wait_until(PATIENCE, || {
            let mark = monitor.mark();
            let next = || monitor.lines.recv_timeout(Duration::from_millis(100)).ok();
            std::iter::from_fn(next).any(|line| line.1.contains(&mark))
        });
        assert!(listens, "{program} monitor tells nothing");
        monitor
    }

    /// Does something that it tells of and that changes nothing of ours; returns how it is told.
    fn mark(&self) -> String {
        let number = self.marks.replace(self.marks.get() + 1);
        if self.program == "nft" {
            let line = format!("nft add table ip mark{number}");
            assert!(wait_until(PATIENCE, || shell(&line)), "{line}");
            return format!("mark{number}");
        }
        for verb in ["add", "del"] {
            assert!(shell(&format!("ip rule {verb} pref {number} blackhole")));
        }
        format!("Deleted {number}:")
    }

    /// The moments of all that has happened since the last call, or none where it may have missed some:
    /// its program is slow, and what it has not read in time is lost, the mark as well as the rest.
    fn told(&self) -> Vec<Instant> {
        let own = ["table ip mark", "# new generation", "blackhole"];
        let mut moments = Vec::new();
        for lost in (0..30).map(|tries| tries > 0) {
            let mark = self.mark();
            while let Ok((at, line)) = self.lines.recv_timeout(PATIENCE / 30) {
                match line.contains(&mark) {
                    true if lost => return Vec::new(),
                    true => return moments,
                    false if own.iter().any(|word| line.contains(word)) => {}
                    false => moments.push(at),
                }
            }
        }
        panic!("{} monitor tells nothing any more", self.program);
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How long something that was done took whoever did it, and how long its repair.
#[derive(Debug, Clone, Copy)]
struct Repair {
    harm: Duration,
    repair: Duration,
}

/// Does `harm` again and again. Each repair takes to its last notification: from the harm's first one
/// where nft does it, whose start takes longer than the repair, else from the start of ip, which may
/// have been repaired before the monitor has read anything.
fn repairs(daemon: &Daemon, monitor: &Monitor, times: usize, harm: &str) -> Vec<Repair> {
    let whole = state();
    let mut took = Vec::new();
    for i in 0..times {
        monitor.told();
        let mut start = Instant::now();
        let harmed = wait_until(PATIENCE, || {
            start = Instant::now();
            shell(harm)
        });
        assert!(harmed, "{harm}");
        let by_others = start.elapsed();
        let healed = wait_until(PATIENCE, || state() == whole);
        assert!(healed, "{harm}, time {i}: not repaired\n{}", daemon.logs());
        if let [first, .., last] = monitor.told()[..] {
            let start = if monitor.program == "nft" { first } else { start };
            took.push(Repair { harm: by_others, repair: last - start });
        }
    }
    assert!(took.len() >= times / 2, "{harm}: {} times told of {times}", took.len());
    took
}

/// Asserts that repairs take no longer than a few times what they mend took: on a machine that is slow,
/// or that others keep busy, both take longer, and both wait for its kernel.
#[track_caller]
fn assert_soon(took: &[Repair], daemon: &Daemon) {
    let [harm, repair] = [|one: &Repair| one.harm, |one: &Repair| one.repair]
        .map(|of| median(took.iter().map(of).collect()));
    println!("repaired: median {repair:?} of {}, done in {harm:?}", took.len());
    assert!(repair < 10 * harm, "{took:?}\n{}", daemon.logs());
}

/// Where the kernel lets us own our table, nobody else changes it, and not a packet leaks.
#[test]
fn an_owned_table_cannot_be_touched() {
    let (ground, mut world, _proxy) = scene!("owned", proxy);
    let (dropped, proxied) = (ground.cgroup("/drop"), ground.cgroup("/proxied"));
    let daemon = Daemon::start(&ground, POLICY, &[]);
    let whole = state();
    let floods = [REMOTE4, REMOTE6].map(|ip| {
        [&dropped, &proxied].map(|cgroup| Client::udp(cgroup, addr(ip, 7)).flood().spawn())
    });
    world.wire.packets();
    for _ in 0..100 {
        assert!(shell("nft flush ruleset"));
    }
    for harm in [
        "delete table inet cgtproxy",
        "flush chain inet cgtproxy output",
        "delete set inet cgtproxy cg_drop",
        "flush set inet cgtproxy cg_drop",
        "add rule inet cgtproxy output accept",
    ] {
        assert!(!nft(&["-f", "-"], harm).status.success(), "{harm}");
    }
    assert_eq!(state(), whole);
    let leaked = world.wire.to_remote();
    println!("{} packets leaked in 100 flushes", leaked.len());
    assert_eq!(leaked, []);
    drop(floods);
    daemon.stop_clean();
}

/// As on kernels before 6.9, where a table cannot be owned for good.
#[test]
fn a_table_that_others_change_is_repaired() {
    let (ground, mut world, _proxy) = scene!("unowned", proxy);
    let (dropped, proxied) = (ground.cgroup("/drop"), ground.cgroup("/proxied"));
    let start = || Daemon::start_in(&ground, POLICY, &[], &[UNOWNED]);
    let id = ground.at("/drop");
    let id = id.strip_prefix("/sys/fs/cgroup").expect("below the mount");
    let monitor = Monitor::start("nft");
    let element = format!("nft delete element inet cgtproxy cg_drop {{ \"{}\" }}", id.display());
    let mut all = Vec::new();
    let mut daemon = start();
    for harm in [
        "nft flush ruleset",
        "nft delete table inet cgtproxy",
        "nft flush table inet cgtproxy",
        "nft flush chain inet cgtproxy output",
        "nft flush chain inet cgtproxy prerouting",
        "nft flush set inet cgtproxy cg_drop",
        &element,
        "nft insert rule inet cgtproxy output accept",
        "nft add chain inet cgtproxy foreign",
    ] {
        all.extend(repairs(&daemon, &monitor, 5, harm));
        let log = daemon.logs();
        assert!(log.contains("the table was changed by nft (pid "), "{log}");
        // what repairs may take at once is a second, which a slow machine takes for all of these; from
        // then on there are pauses (see below), so each begins with a second of its own
        assert!(daemon.stop().success());
        daemon = start();
    }
    assert_soon(&all, &daemon);
    expect(&[(&dropped, under("drop")), (&proxied, under(PROXY))]);

    let floods = [&dropped, &proxied].map(|cgroup| {
        let flood = Client::udp(cgroup, addr(REMOTE4, 7)).flood();
        flood.spawn()
    });
    world.wire.packets();
    for _ in 0..100 {
        assert!(shell("nft flush ruleset"));
    }
    let leaked = world.wire.to_remote().len();
    println!("{leaked} packets of two floods leaked in 100 flushes");
    drop(floods);
    daemon.stop_clean();
}

/// Whoever deletes our rules and routes, or all rules, or takes lo down: all is mended soon, and nothing
/// leaks meanwhile.
#[test]
fn rules_and_routes_that_others_delete_are_repaired() {
    let (ground, mut world, _proxy) = scene!("rules", proxy);
    let (dropped, proxied) = (ground.cgroup("/drop"), ground.cgroup("/proxied"));
    let daemon = Daemon::start(&ground, POLICY, &[]);
    let floods = [REMOTE4, REMOTE6].map(|ip| {
        [&dropped, &proxied].map(|cgroup| Client::udp(cgroup, addr(ip, 7)).flood().spawn())
    });
    world.wire.packets();
    let mut took = Vec::new();
    let monitor = Monitor::start("ip");
    for harm in [
        "ip rule del pref 100",
        "ip -6 rule del pref 100",
        "ip route del local default dev lo table 300",
        "ip -6 route del local default dev lo table 300",
    ] {
        took.extend(repairs(&daemon, &monitor, 10, harm));
    }
    assert_soon(&took, &daemon);

    // netifd's first load; the main rules have to come back for anything to be routed at all
    for family in ["-4", "-6"] {
        assert!(shell(&format!("ip {family} rule flush")));
        let _ = shell(&format!("ip {family} rule add pref 32766 lookup main"));
    }
    assert!(shell("ip link set lo down"));
    assert!(shell("ip link set lo up"));
    let healed = wait_until(PATIENCE, || {
        let now = residue();
        ["2 default dev lo table 300", "iif lo lookup 300"]
            .iter()
            .all(|part| now.matches(part).count() >= 2)
    });
    assert!(healed, "{}\n{}", residue(), daemon.logs());
    let leaked = world.wire.to_remote();
    println!("{} packets leaked", leaked.len());
    assert_eq!(leaked, [], "the guard drops what the routing misses");
    drop(floods);
    expect(&[(&dropped, under("drop")), (&proxied, under(PROXY))]);
}

/// Repairs take a share of the time, whatever others do, so the last of them is not far off.
#[test]
fn a_program_that_keeps_deleting() {
    let (ground, mut world, _proxy) = scene!("pauses", proxy);
    let proxied = ground.cgroup("/proxied");
    for (harm, whole, env) in [
        ("ip rule del pref 100", "iif lo lookup 300", &[][..]),
        ("ip -6 route del local default dev lo table 300", "2 default dev lo", &[]),
        ("nft flush ruleset", "table inet cgtproxy", &[UNOWNED]),
    ] {
        let daemon = Daemon::start_in(&ground, POLICY, &[], env);
        await_member(&proxied, "mihomo");
        let (before, busy) = (residue().matches(whole).count(), daemon.busy());
        let flood = Client::udp(&proxied, addr(REMOTE4, 7)).flood().spawn();
        let start = Instant::now();
        let (mut deleted, mut tries, mut last) = (0, 0, start);
        // where a try takes long, as many as are to succeed
        while start.elapsed() < Duration::from_secs(10) || (deleted <= 15 && tries < 100) {
            deleted += usize::from(shell(harm));
            (tries, last) = (tries + 1, Instant::now());
        }
        // pauses take half a second, and do not grow
        let healed =
            wait_until(Duration::from_secs(3), || residue().matches(whole).count() == before);
        let (after, took, busy) = (last.elapsed(), start.elapsed(), daemon.busy() - busy);
        println!("{harm}: {deleted} of {tries}, {busy:?} of {took:?}, well {after:?} after");
        assert!(healed, "{after:?}\n{}", daemon.logs());
        assert!(deleted > 15, "{deleted} of {tries}");
        // the work that may be done at once, and a twentieth of the time
        assert!(busy < here(Duration::from_millis(1300) + took / 20), "{busy:?} of {took:?}");
        let lines = daemon.logs().lines().count();
        assert!(lines < 500, "{lines} lines");
        drop(flood);
        if env.is_empty() {
            assert_eq!(world.wire.to_remote(), [], "the guard drops what the routing misses");
        }
        expect(&[(&proxied, under(PROXY))]);
        world.wire.packets();
        assert!(daemon.stop().success());
    }
}

/// A table that is known to be out has to wait for its turn, whatever is repaired of the routing
/// meanwhile, and has then what changed there.
#[test]
fn the_routing_is_repaired_while_the_table_is_out() {
    let (ground, _world) = scene!("outtable");
    ground.cgroup("/drop");
    let config = "[route vpn]\ntable = 1000\n[rules]\nvpn = /vpn\ndrop = /drop\n";
    tunnel_up(&ground);
    let daemon = Daemon::start_in(&ground, config, &[], &[UNOWNED]);
    let owner = Owner::take();
    assert!(daemon.wait_log("trying again in 2 s", PATIENCE), "{}", daemon.logs());
    let rules = || residue().matches("lookup 1000").count();
    let whole = rules();
    assert_ne!(whole, 0, "{}", residue());
    for round in 0..6 {
        let dev = ["in0", "vpn0"][round % 2];
        ip_batch(&[], &format!("route replace default dev {dev} table 1000\n"));
        ip_batch(&["-4"], "rule del lookup 1000\n");
        assert!(wait_until(PATIENCE, || rules() == whole), "{}\n{}", residue(), daemon.logs());
    }
    let log = daemon.logs();
    assert!(!log.contains("replacing the table"), "{log}");

    drop(owner);
    let led = || table().contains("\"vpn0\"") && !table().contains("\"in0\"");
    assert!(wait_until(PATIENCE, led), "{}\n{}", table(), daemon.logs());
    daemon.stop_clean();
}

/// As where this program is started before the network is (OpenWrt): the kernel takes no IPv6 route
/// over lo while that is down.
#[test]
fn lo_may_be_down_at_the_start() {
    let (ground, mut world, _proxy) = scene!("lodown", proxy);
    let lan = Lan::new(&ground);
    let (dropped, proxied) = (ground.cgroup("/drop"), ground.cgroup("/proxied"));
    ip_batch(&[], "link set lo down\n");
    let config = format!("{POLICY}[gateway lan]\ninterface = br-lan\ntarget = mihomo\n");
    let daemon = Daemon::start(&ground, &config, &[]);
    await_member(&proxied, "mihomo");
    // in force: nothing of a tproxy goes anywhere, and the rest as ever
    world.wire.packets();
    expect(&[(&dropped, under("drop"))]);
    for proto in [Proto::Tcp, Proto::Udp] {
        for to in [REMOTE4, REMOTE6].map(|ip| addr(ip, 80)) {
            let client = Client::new(&proxied, proto, to).timeout(SILENCE);
            assert_eq!(client.run().who(), "nobody");
            // the kernel does take the IPv4 route, which is all that those of the LAN need
            let client = Client::new(&ground.root, proto, to).timeout(SILENCE);
            let who = lan.client(0).run(|| client.run()).who();
            assert!(who == "nobody" || who == format!("{PROXY} {to}"), "{who}");
        }
    }
    assert_eq!(world.wire.to_remote(), []);

    // said once, also where something else is repaired meanwhile
    for family in ["-4", "-6"] {
        assert!(shell(&format!("ip {family} rule del pref 100 iif lo")));
    }
    let rules = || residue().matches("iif lo").count() == 2;
    assert!(wait_until(PATIENCE, rules), "{}\n{}", residue(), daemon.logs());
    assert_eq!(daemon.logs().matches("lo is down").count(), 1, "{}", daemon.logs());
    assert!(!daemon.logs().contains("trying again"), "{}", daemon.logs());

    let up = Instant::now();
    ip_batch(&[], "link set lo up\n");
    let routes = || residue().matches("2 default dev lo table 300").count() == 2;
    assert!(wait_until(PATIENCE, routes), "{}\n{}", residue(), daemon.logs());
    println!("routes {:?} after lo was up", up.elapsed());
    expect(&[(&dropped, under("drop")), (&proxied, under(PROXY))]);
    lan.proxied(0);

    // and at run time
    ip_batch(&[], "link set lo down\nlink set lo up\n");
    assert!(wait_until(PATIENCE, routes), "{}\n{}", residue(), daemon.logs());
    expect(&[(&proxied, under(PROXY))]);
}

/// A start that fails leaves the rules and routes as they were.
#[test]
fn a_table_that_another_owns() {
    let ground = ground!("another");
    // without one in a set, the start would fail before it adds any rule
    ground.cgroup("/proxied");
    let owner = Owner::take();
    let before = residue();
    let start = || {
        let mut daemon = Daemon::spawn(&ground, POLICY, &[], &[]);
        assert!(!daemon.ready());
        assert_eq!(daemon.wait().code(), Some(1));
        let log = daemon.logs();
        assert!(log.contains("table inet cgtproxy is owned by another process"), "{log}");
    };
    start();
    assert_eq!(residue(), before);

    // What an older one left belongs to the table that is there, as far as anybody can tell.
    let rule = "pref 100 iif lo fwmark 0x1000000/0xff000000 lookup 300 protocol 99";
    ip_batch(&["-4"], &format!("rule add {rule}\n"));
    let before = residue();
    start();
    assert_eq!(residue(), before);

    drop(owner);
    assert!(Daemon::start(&ground, POLICY, &[]).stop().success());
    assert_eq!(residue(), "");
}

/// A default route of ours: its family, table, interface and metric, if that matters.
type OfOurs = (c_int, u32, &'static str, u32);

/// Deletes one; false where it is not there. Without another process: most of that time nothing would be
/// deleted.
fn delete_route(socket: &OwnedFd, route: &OfOurs) -> bool {
    const RTM_DELROUTE: u8 = 25;
    const RT_SCOPE_HOST: u8 = 254;
    const RT_SCOPE_NOWHERE: u8 = 255;
    const RTN_UNICAST: u8 = 1;
    const RTN_LOCAL: u8 = 2;
    let (family, table, interface, metric) = *route;
    let mut request = vec![0u8; 28];
    request[4] = RTM_DELROUTE;
    // NLM_F_REQUEST | NLM_F_ACK
    request[6] = 5;
    // struct rtmsg
    request[16] = family as u8;
    (request[22], request[23]) = match interface {
        "lo" => (RT_SCOPE_HOST, RTN_LOCAL),
        _ => (RT_SCOPE_NOWHERE, RTN_UNICAST),
    };
    // RTA_TABLE, RTA_OIF, RTA_PRIORITY: 0 is any
    for (attribute, value) in [(15u16, table), (4, interface_index(interface)), (6, metric)] {
        request.extend([8u16, attribute].map(u16::to_ne_bytes).concat());
        request.extend(value.to_ne_bytes());
    }
    request[0] = request.len() as u8;
    let mut answer = [0u8; 4096];
    send(socket.as_raw_fd(), &request, MsgFlags::empty()).expect("send");
    recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).expect("an answer");
    answer[16..20] == [0; 4]
}

/// The kernel tells of an IPv4 route before it is gone: whoever lists it at once may see it still. Those
/// that lead to the proxies, out by an interface, and nowhere where that is not there.
#[test]
fn a_route_that_is_about_to_go_is_repaired() {
    let (ground, _world, _proxy) = scene!("going", proxy);
    tunnel_up(&ground);
    let lan = "[gateway lan]\ninterface = br-lan\ntarget = vpn\n";
    let way = format!("[route vpn]\ninterface = vpn0\n{GATEWAYS}");
    let daemon = Daemon::start(&ground, &format!("{way}{POLICY}{lan}"), &[]);
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    );
    let socket = socket.expect("a socket");
    for family in [libc::AF_INET, libc::AF_INET6] {
        for route in
            [(family, 300, "lo", 0), (family, 301, "vpn0", 0), (family, 301, "lo", u32::MAX)]
        {
            let began = Instant::now();
            let mut times = 0;
            while began.elapsed() < Duration::from_secs(sized(2, 5) as u64) {
                let there = wait_until(PATIENCE, || delete_route(&socket, &route));
                assert!(there, "{route:?}: not repaired after {times} times\n{}", daemon.logs());
                times += 1;
            }
            println!("deleted {route:?} {times} times");
        }
    }
    assert!(daemon.stop().success());
}
