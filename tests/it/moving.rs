//! What happens while flows move to other marks: the flows of containers, what is asked of the program
//! and its end; and where they cannot move.

use std::collections::BTreeSet;
use std::fs::File;
use std::mem::size_of_val;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::client::{again, descriptor_of, family_of, fork_into, udp_in, Proto, PATIENCE};
use crate::containers::{await_entrances, live};
use crate::daemon::{run, Daemon};
use crate::faults::is_to_netfilter;
use crate::forgotten::proxies;
use crate::gateway::Lan;
use crate::ground::{addr, any_of, ip, sysctl, Ground, REMOTES};
use crate::kernel::{
    add_flows, conntrack_number, forget_flows, has_chain, load, output, residue, table, table_plain,
};
use crate::redirect::hoard;
use crate::routes::{tunnel_up, TUNNEL};
use crate::soak::Ends;
use crate::tools::query;
use crate::ways::{change, policy, sections, Scene, Talk, PORT, RELOAD};
use crate::world::{bind, bind_at, raw_addr, recv_datagram, Packet, Wire, World};
use crate::{sized, wait_until};

/// So many flows beside those that are looked at move long enough for something to be done meanwhile.
const MANY: usize = 4_000;

fn moves() -> bool {
    has_chain("moved")
}

/// Takes a configuration `to` follow another, and does something while flows move; the reload is over
/// then, or the daemon.
#[track_caller]
fn amid<T>(daemon: &Daemon, [from, to]: [&str; 2], act: impl FnOnce() -> T) -> T {
    for _ in 0..20 {
        let before = daemon.logs().len();
        daemon.configure(to);
        daemon.signal(Signal::SIGHUP);
        let over = || daemon.logs()[before..].contains("reloaded ");
        let since = Instant::now();
        while !moves() && !over() {
            assert!(since.elapsed() < PATIENCE, "{}", daemon.logs());
        }
        daemon.signal(Signal::SIGSTOP);
        if moves() {
            let result = act();
            daemon.signal(Signal::SIGCONT);
            // the line comes after the last flow, and the next reload's must not be taken for it
            let done = wait_until(PATIENCE, || over() || daemon.is_gone());
            assert!(done, "{}", daemon.logs());
            return result;
        }
        // others had the processor meanwhile
        daemon.signal(Signal::SIGCONT);
        wait_until(PATIENCE, over);
        daemon.reconfigure(from);
        await_end(daemon);
    }
    panic!("no flow moves for long enough\n{}", daemon.logs());
}

#[track_caller]
fn await_end(daemon: &Daemon) {
    let done = || has_chain("output") && !moves();
    assert!(wait_until(PATIENCE, done), "{}\n{}", daemon.logs(), table());
}

fn remotes(ground: &Ground) -> [UdpSocket; 2] {
    ground.outside(|| REMOTES.map(|ip| UdpSocket::from(bind(addr(ip, PORT), libc::SOCK_DGRAM))))
}

/// Each flow goes on; a connection may be told that it does not, where flows are forgotten or not listed.
#[track_caller]
fn go_on(talk: &mut Talk, forgotten: bool, when: &str) {
    for pair in &talk.udp {
        assert!(Talk::is_answered(pair), "{pair:?}, {when}");
    }
    for each in &mut talk.tcp {
        assert!(each.goes_on() || forgotten && each.is_cut(true), "{each:?}, {when}");
    }
}

const KILLED: &str = "kill -9";

/// The flows of a container by a route, and those of one that comes meanwhile, go on by that alone.
#[test]
fn flows_of_containers() {
    let ground = ground!("moving-boxes");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = remotes(&ground);
    let policy = |names: &str| {
        format!("{}[rules]\nvpn = /app\nvpn = /boxes/.*\ndrop = /drop\n", sections(names))
    };
    let _one = live(scene.lan.client(0), &ground.cgroup("/boxes/one"));
    for how in [RELOAD, KILLED] {
        let mut daemon = Daemon::start(&ground, &policy("vpn"), &[]);
        await_entrances(&daemon, &["lan0 0x01000000"]);
        let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
        add_flows(false, 0x0100_0000, MANY);
        scene.left();

        let mut late = None;
        daemon = talk.during(|| {
            let all = ["vpn", "two vpn", "vpn two", "mihomo none vpn", "two mihomo vpn", "vpn"];
            for names in all.windows(2) {
                let [from, to] = [names[0], names[1]].map(policy);
                amid(&daemon, [&from, &to], || {
                    let new = || live(scene.lan.client(1), &ground.cgroup("/boxes/two"));
                    late.get_or_insert_with(new);
                    if how == KILLED {
                        daemon.signal(Signal::SIGKILL);
                    }
                });
                if how == KILLED {
                    daemon.wait();
                    daemon = Daemon::start(&ground, &to, &[]);
                }
                await_end(&daemon);
            }
            daemon
        });

        let when = format!("{how}\n{}", daemon.logs());
        assert_eq!(scene.left(), [], "{when}");
        await_end(&daemon);
        await_entrances(&daemon, &["lan0 0x01000000", "lan1 0x01000000"]);
        go_on(&mut talk, false, &when);
        for remote in &remotes {
            let to = remote.local_addr().expect("its address");
            let any = addr(any_of(to.ip()), 0);
            let own = scene.lan.client(1).run(|| UdpSocket::bind(any).expect("bind"));
            own.connect(to).expect("connect");
            let pair = (own, remote.try_clone().expect("clone"));
            assert!(Talk::is_answered(&pair), "{pair:?}, {when}");
        }
        assert_eq!(scene.left(), [], "{when}");
        daemon.stop_clean();
        drop(late);
        std::fs::remove_dir(ground.at("/boxes/two")).expect("remove the cgroup");
        forget_flows();
    }
}

/// A process that asks for names at the remote hosts, each from a port of its own.
struct Asker(Pid);

impl Asker {
    fn start(cgroup: &Path) -> Asker {
        let cgroup = File::open(cgroup).expect("open the cgroup");
        let asked = REMOTES.map(|ip| (family_of(ip), raw_addr(addr(ip, 53))));
        let child = || loop {
            for (family, (raw, len)) in &asked {
                // SAFETY: system calls on integers and on what outlives them.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    let fd = libc::socket(*family, libc::SOCK_DGRAM, 0);
                    libc::sendto(fd, c"?".as_ptr().cast(), 1, 0, (&raw const *raw).cast(), *len);
                    libc::close(fd);
                    libc::usleep(100);
                }
            }
        };
        // SAFETY: the child makes system calls only.
        Asker(unsafe { fork_into(&cgroup, child) }.expect("fork into the cgroup"))
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// Queries that begin while marks move get to the resolver that the policy says, and nobody else.
#[test]
fn queries_that_begin_meanwhile() {
    let ground = ground!("moving-dns");
    let scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    sysctl("net/netfilter/nf_conntrack_udp_timeout", "1");
    // between the hooks of ours that say whose a query is and that translate it
    let slow = "meta l4proto udp udp sport 0 drop\n".repeat(5_000);
    load(&format!(
        "table inet slow {{\nchain o {{\ntype filter hook output priority -120\n{slow}}}\n\
         chain p {{\ntype filter hook prerouting priority -120\n{slow}}}\n}}\n"
    ));
    let counts = "table inet counts {\nchain c {\ntype filter hook prerouting priority -300\n\
                  udp dport 53 counter drop\nudp dport 5353 counter drop\n}\n}\n";
    ground.outside(|| load(counts));
    let come = || -> [u64; 2] {
        let text = ground.outside(|| output("nft", &["list", "table", "inet", "counts"]));
        let mut all = text.split("counter packets ").skip(1);
        [0; 2].map(|_| {
            let number = all.next().and_then(|rest| rest.split(' ').next());
            number.and_then(|number| number.parse().ok()).expect("a counter")
        })
    };
    let hijack = "dns-hijack = 203.0.113.53:5353\ndns-hijack = [2001:db8:2::53]:5353\n";
    for target in ["mihomo", "vpn"] {
        let policy = |names: &str| {
            let own = sections(target);
            policy(names, target).replace(&own, &format!("{own}{hijack}"))
        };
        let others =
            |first: bool| if first { format!("two {target}") } else { format!("{target} two") };
        let mut daemon = Daemon::start(&ground, &policy(&others(false)), &[]);
        let before = come();
        let askers =
            [Asker::start(&cgroup), scene.lan.client(0).run(|| Asker::start(&ground.root))];
        for turn in 0..sized(15, 60) {
            let next = policy(&others(turn % 2 == 0));
            let how = if turn % 5 == 4 { KILLED } else { RELOAD };
            daemon = change(&ground, daemon, how, &next);
            await_end(&daemon);
        }
        drop(askers);
        let after = come();
        let [left, resolved] = [0, 1].map(|n| after[n] - before[n]);
        assert!(left == 0 && resolved > 100, "{target}: {left} left, {resolved} resolved");
        assert!(daemon.stop().success());
        forget_flows();
    }
}

/// One that follows a daemon which left the table, or was killed, changes the one that it finds: in a new
/// one packets would meet both for a moment, also where marks move.
#[test]
fn a_table_that_was_left_stays() {
    let ground = ground!("moving-left");
    let scene = Scene::new(&ground);
    let _one = live(scene.lan.client(0), &ground.cgroup("/boxes/one"));
    let policy = |names: &str| format!("{}[rules]\nvpn = /boxes/.*\n", sections(names));
    let handle = || table_plain(&["-a"]).lines().next().map(str::to_owned);
    for how in ["restart", "kill -9"] {
        for (from, to) in
            [("vpn", "vpn"), ("vpn", "two vpn"), ("mihomo vpn", "vpn"), ("vpn", "mihomo vpn")]
        {
            let daemon = Daemon::start(&ground, &policy(from), &[]);
            let before = handle();
            assert!(before.as_ref().is_some_and(|line| line.contains("# handle")), "{before:?}");

            let daemon = change(&ground, daemon, how, &policy(to));

            await_end(&daemon);
            assert_eq!(handle(), before, "{how}, {from} to {to}\n{}", daemon.logs());
            daemon.stop_clean();
        }
    }
}

/// Where the mask has no value left meanwhile for what some containers send, others are not taken for
/// these.
#[test]
fn clients_beside_containers() {
    let (ground, mut world) = scene!("moving-narrow");
    let lan = Lan::new(&ground);
    let _process = live(lan.client(0), &ground.cgroup("/app"));
    let policy = |ports: &[u16]| {
        let section = |port: &u16| format!("[tproxy p{port}]\nport = {port}\n");
        let all: String = ports.iter().map(section).collect();
        format!(
            "[global]\nfwmark-mask = 0x0f000000\n{all}[gateway lan]\ninterface = br-lan\n\
             source = 198.51.100.11\nsource = 2001:db8:3::11\ntarget = drop\n\
             [rules]\np7893 = /app\n"
        )
    };
    let changes = [[7893, 7894, 7895, 7896, 7897, 7898], [7898, 7897, 7896, 7895, 7894, 7893]];
    let changes = changes.each_ref().map(|ports| policy(ports));
    let daemon = Daemon::start(&ground, &changes[0], &[]);
    await_entrances(&daemon, &["lan0 0x01000000"]);
    add_flows(false, 0x0100_0000, MANY);
    world.wire.packets();

    amid(&daemon, changes.each_ref().map(String::as_str), || lan.dropped(1));

    assert_eq!(world.wire.to_remote(), []);
    await_end(&daemon);
    lan.dropped(1);
    daemon.stop_clean();
}

/// What commands say meanwhile is true of the kernel, and nothing is amiss; what they say of the
/// configuration is what they say of it afterwards.
#[test]
fn what_is_said_meanwhile() {
    let ground = ground!("moving-said");
    let scene = Scene::new(&ground);
    let app = ground.cgroup("/app");
    let process = live(scene.lan.client(0), &app);
    let changes = ["vpn two mihomo", "mihomo two vpn"].map(|names| policy(names, "vpn"));
    let changes = changes.each_ref().map(String::as_str);
    let daemon = Daemon::start(&ground, changes[0], &[]);
    let _talk = Talk::new(&mut { scene }, &app, &remotes(&ground));
    add_flows(false, 0x0100_0000, MANY);
    let pid = process.pid().to_string();
    let of_the_file = || {
        [&["show"][..], &["explain", "/app"], &["explain", "--pid", &pid]]
            .map(|args| daemon.ask(args).fine())
    };
    let check = || daemon.ask(&["check"]).all();
    let status = || {
        let json = daemon.ask(&["status", "--json"]).fine();
        let of = |expr: &str| query(&json, expr);
        let marks = of("sorted(t['mark'] for t in d['targets'] if t['mark'] is not None)");
        let rest = "[d['in_force'], d['hindrances'], d['loops'], d['warnings'], \
                    [w for w in d['ways']], [r for r in d['rules'] + d['routes'] if not r['present']], \
                    sorted((t['name'], t['kind'], t['cgroups']) for t in d['targets']), \
                    [(g['name'], g['target']) for g in d['gateways']], len(d['rules'])]";
        (marks, of(rest))
    };

    let (said, checked, (marks, rest)) =
        amid(&daemon, changes, || (of_the_file(), check(), status()));
    await_end(&daemon);

    assert_eq!(said, of_the_file());
    assert_eq!(checked, check());
    let (after, rest_after) = status();
    assert_eq!(rest, rest_after);
    assert_ne!(marks, after);
    daemon.stop_clean();
}

/// What has left by the second tunnel without an address of that, or by none.
fn by_others(left: Vec<Packet>) -> Vec<Packet> {
    let strange = |packet: &Packet| {
        let from = packet.src.ip().to_string();
        !(from == "10.9.0.1" || from == "fd00:9::1")
    };
    left.into_iter().filter(strange).collect()
}

/// However the daemon leaves all in force meanwhile, and whatever follows it: each flow goes on by its way
/// alone.
#[test]
fn ends_meanwhile() {
    let ground = ground!("moving-ends");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = remotes(&ground);
    let keep = |names: &str| format!("[global]\non-exit = keep\n{}", policy(names, "vpn"));
    for end in ["keep", "leave, again meanwhile"] {
        let mut daemon = Daemon::start(&ground, &keep("vpn two"), &[]);
        let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
        add_flows(false, 0x0100_0000, MANY);
        scene.left();

        let mut amid_it = 0;
        daemon = talk.during(|| {
            let again = end.ends_with("meanwhile");
            let mut from = "vpn two";
            for next in ["two vpn", "mihomo two vpn", "vpn"] {
                let signal =
                    if end.starts_with("keep") { Signal::SIGTERM } else { Signal::SIGUSR2 };
                let changes = [from, "two mihomo vpn"].map(keep);
                amid(&daemon, changes.each_ref().map(String::as_str), || daemon.signal(signal));
                assert!(daemon.wait().success(), "{}", daemon.logs());
                // the last flow may have moved before the signal has its turn
                amid_it += usize::from(moves());
                daemon = Daemon::start(&ground, &keep(next), &[]);
                from = next;
                if !again {
                    await_end(&daemon);
                }
            }
            daemon
        });

        let when = format!("{end}\n{}", daemon.logs());
        assert!(amid_it > 0, "{when}");
        assert_eq!(scene.left(), [], "{when}");
        await_end(&daemon);
        go_on(&mut talk, false, &when);
        assert_eq!(scene.left(), [], "{when}");
        daemon.configure(&policy("vpn", "vpn"));
        daemon.reload();
        daemon.stop_clean();
        forget_flows();
    }
}

/// A flow of a table that was taken away is nobody's to the next one.
#[test]
fn nothing_is_known_any_more() {
    let ground = ground!("moving-forgotten");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = remotes(&ground);
    for end in ["remove", "flush", "flush of before"] {
        let mut daemon = Daemon::start(&ground, &policy("plain", "plain"), &[]);
        let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
        add_flows(false, 0x0100_0000, MANY);
        let signal = if end == "remove" { Signal::SIGTERM } else { Signal::SIGKILL };
        match end {
            "flush of before" => daemon.signal(signal),
            _ => {
                let changes = ["plain", "mihomo plain"].map(|names| policy(names, "plain"));
                amid(&daemon, changes.each_ref().map(String::as_str), || daemon.signal(signal));
            }
        }
        daemon.wait();
        if end != "remove" {
            run(&["flush"]).fine();
        }
        assert_eq!(residue(), "");

        let daemon = Daemon::start(&ground, &policy("two", "two"), &[]);
        scene.left();
        for (own, _) in &talk.udp {
            let _ = own.send(b"to remote");
        }
        for each in &mut talk.tcp {
            each.is_cut(true);
        }
        assert_eq!(by_others(scene.left()), [], "{end}\n{}", daemon.logs());
        daemon.stop_clean();
        forget_flows();
    }
}

/// A mask that leaves no other marks, or one: nothing of a flow leaves by a way that is not its own, with
/// an address of that.
#[test]
fn a_mask_that_is_full() {
    let ground = ground!("moving-full");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = remotes(&ground);
    let changes = [
        // one and the whole mask, for the gateway: nothing is left
        ("0x03000000", "plain", "plain", "two", "two"),
        // five, of which four are taken
        ("0x07000000", "plain two", "plain", "two plain", "two"),
        ("0x07000000", "plain two", "plain", "two plain", "plain"),
        // another mask
        ("0x00ff0000", "plain", "plain", "two", "two"),
    ];
    for (mask, old, was, new, is) in changes {
        for how in [RELOAD, "kill -9"] {
            let before = if mask == "0x00ff0000" { "0x0ff00000" } else { mask };
            let with = |mask: &str, names: &str, target: &str| {
                format!("[global]\nfwmark-mask = {mask}\n{}", policy(names, target))
            };
            let daemon = Daemon::start(&ground, &with(before, old, was), &[]);
            let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
            scene.left();
            // whose target stays has a socket that stays, while conntrack forgets the connection: who
            // speaks next by the main way, as answers to this route come, has begun it
            talk.hushed = was == is;

            let daemon = talk.during(|| change(&ground, daemon, how, &with(mask, new, is)));

            let when = format!("{mask}, {old} to {new}, {how}\n{}", daemon.logs());
            let left = by_others(scene.left());
            assert!(left.is_empty(), "{} of {:?}, {when}", left.len(), left[0]);
            await_end(&daemon);
            go_on(&mut talk, true, &when);
            assert_eq!(by_others(scene.left()), [], "{when}");
            daemon.stop_clean();
            forget_flows();
        }
    }
}

/// A remote host goes on speaking to who was heard directly and is proxied from a change on, which changes the
/// mask too: nobody answers it.
#[test]
fn remote_hosts_that_go_on_speaking() {
    let ground = ground!("moving-speaking");
    let scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let proxies = proxies(&ground.root, 7893);
    let mut world = Wire::open(&ground);
    let with = |mask: &str, target: &str| {
        format!("[global]\nfwmark-mask = {mask}\n{}", policy("mihomo vpn two", target))
    };
    let changes = [
        ("0xff000000", "mihomo"),
        ("0x0f000000", "direct"),
        ("0xff000000", "mihomo"),
        ("0xff000000", "direct"),
        ("0x00f00000", "mihomo"),
        ("0x0f000000", "mihomo"),
        // a route's addresses are not theirs
        ("0x0f000000", "vpn"),
        ("0x0f000000", "mihomo"),
        ("0x0f000000", "two"),
        ("0x0f000000", "vpn"),
        ("0xff000000", "two"),
        ("0x0f000000", "direct"),
        ("0x0f000000", "mihomo"),
    ];
    for how in [RELOAD, KILLED] {
        let remotes = remotes(&ground);
        let mut daemon = Daemon::start(&ground, &with("0x0f000000", "direct"), &[]);
        let pair = |remote: &UdpSocket, own: UdpSocket| {
            let to = remote.local_addr().expect("its address");
            own.send_to(b"hello", to).expect("send");
            let (_, from) = again(|| remote.recv_from(&mut [0; 16])).expect("it hears");
            (own, from, remote.try_clone().expect("clone"), to)
        };
        let pairs = remotes.iter().flat_map(|remote| {
            let any = addr(any_of(remote.local_addr().expect("its address").ip()), 0);
            let own = udp_in(&cgroup, any.ip());
            // one that somebody chose: its socket is not ended
            bind_at(&own, addr(any.ip(), if any.is_ipv4() { 3000 } else { 3001 }));
            let client = scene.lan.client(0).run(|| UdpSocket::bind(any).expect("bind"));
            [own, client].map(|own| pair(remote, own))
        });
        let pairs: Vec<_> = pairs.collect();
        let all: BTreeSet<SocketAddr> = pairs.iter().map(|(_, from, ..)| *from).collect();
        let (done, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));

        let daemon = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for (own, from, remote, to) in &pairs {
                        let _ = remote.send_to(b"on", from);
                        let _ = own.send_to(b"so", to);
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                    std::thread::yield_now();
                }
            });
            let _ends = Ends(&done);
            for (mask, target) in changes {
                daemon = change(&ground, daemon, how, &with(mask, target));
                let when = format!("{mask}, {target}, {how}\n{}", daemon.logs());
                world.packets();
                let heard = || proxies.iter().filter_map(recv_datagram).map(|(from, _)| from);
                while heard().next().is_some() {}
                let before = rounds.load(Ordering::Relaxed);
                let some = || rounds.load(Ordering::Relaxed) > before + 50;
                assert!(wait_until(PATIENCE, some));
                if target != "direct" {
                    let left = world.to_remote();
                    assert!(left.is_empty(), "{} of {:?}, {when}", left.len(), left[0]);
                }
                if target == "mihomo" {
                    let mut who = BTreeSet::new();
                    let every = || {
                        who.extend(heard());
                        who == all
                    };
                    let all_heard = wait_until(PATIENCE, every);
                    assert!(all_heard, "{who:?} of {all:?}, {when}");
                }
            }
            daemon
        });
        daemon.stop_clean();
        forget_flows();
    }
}

/// A daemon that changes the mask is killed before conntrack has forgotten what is known by the old one, and
/// what has these numbers in the new one moves with the next start: no flow is taken for one of that.
#[test]
fn a_change_of_the_mask_that_is_killed() {
    let ground = ground!("moving-mask");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let with = |mask: &str, names: &str| {
        format!("[global]\nfwmark-mask = {mask}\n{}", policy(names, "mihomo"))
    };
    for how in [RELOAD, KILLED] {
        let other = with("0xff000000", "two mihomo");
        let mut daemon = Daemon::slow(&ground, &with("0x0f000000", "mihomo two"), &[]);
        assert!(daemon.ready(), "{}", daemon.logs());
        let mut talk = Talk::proxied(&scene, &cgroup);
        scene.left();
        match how {
            RELOAD => {
                daemon.configure(&other);
                daemon.signal(Signal::SIGHUP);
            }
            _ => {
                daemon.kill9();
                daemon = Daemon::slow(&ground, &other, &[]);
            }
        }
        assert!(wait_until(PATIENCE, moves), "{}", daemon.logs());
        daemon.kill9();
        assert!(moves());

        let daemon = talk.during(|| {
            let mut daemon = Daemon::slow(&ground, &with("0xff000000", "mihomo two"), &[]);
            assert!(daemon.ready(), "{}", daemon.logs());
            daemon
        });

        let when = format!("{how}\n{}", daemon.logs());
        let left = scene.left();
        assert!(left.is_empty(), "{} of {:?}, {when}", left.len(), left[0]);
        await_end(&daemon);
        go_on(&mut talk, true, &when);
        assert_eq!(scene.left(), [], "{when}");
        daemon.stop_clean();
        forget_flows();
    }
}

/// Nor where another program has put flows in a zone.
#[test]
fn a_change_of_the_mask_beside_zones() {
    let ground = ground!("moving-zones");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let chain = |hook| {
        format!("chain {hook} {{\ntype filter hook {hook} priority raw;\nct zone set 7\n}}\n")
    };
    load(&format!("table inet zones {{\n{}{}}}\n", chain("prerouting"), chain("output")));
    let with = |mask: &str, names: &str| {
        format!("[global]\nfwmark-mask = {mask}\n{}", policy(names, "mihomo"))
    };
    let daemon = Daemon::start(&ground, &with("0x0f000000", "mihomo two"), &[]);
    let mut talk = Talk::proxied(&scene, &cgroup);
    scene.left();

    talk.during(|| daemon.reconfigure(&with("0xff000000", "two mihomo")));

    let when = daemon.logs();
    let left = scene.left();
    assert!(left.is_empty(), "{} of {:?}, {when}", left.len(), left[0]);
    go_on(&mut talk, true, &when);
    assert_eq!(scene.left(), [], "{when}");
}

/// Nor where the next change comes before all of them are nobody's.
#[test]
fn a_change_of_the_mask_amid_another() {
    let ground = ground!("moving-masks");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let with = |mask: &str, names: &str| {
        format!("[global]\nfwmark-mask = {mask}\n{}", policy(names, "mihomo"))
    };
    let first = with("0x0f000000", "mihomo two");
    let others = [
        ("0xff000000", "two mihomo vpn", "chain to_vpn "),
        ("0x0f000000", "two mihomo", "& 0x0f000000 "),
        ("0x00f00000", "mihomo", "& 0x00f00000 "),
    ];
    for (mask, names, sign) in others {
        let daemon = Daemon::start(&ground, &first, &[]);
        let mut talk = Talk::proxied(&scene, &cgroup);
        let _sockets = hoard(&cgroup, 5_000, addr(REMOTES[0], 80));
        add_flows(false, 0, MANY);
        scene.left();

        talk.during(|| {
            let changes = [first.clone(), with("0xff000000", "two mihomo")];
            amid(&daemon, changes.each_ref().map(String::as_str), || {
                daemon.configure(&with(mask, names));
                daemon.signal(Signal::SIGHUP);
            });
            let over = || {
                let table = table();
                table.contains(sign) && !table.contains("chain moved ")
            };
            assert!(wait_until(PATIENCE, over), "{}\n{}", daemon.logs(), table());
        });

        let when = format!("{mask}, {names}\n{}", daemon.logs());
        let left = scene.left();
        assert!(left.is_empty(), "{} of {:?}, {when}", left.len(), left[0]);
        go_on(&mut talk, true, &when);
        assert_eq!(scene.left(), [], "{when}");
        daemon.stop_clean();
        forget_flows();
    }
}

/// The mark of what goes directly is a section's afterwards, or was before: each goes its own way.
#[test]
fn the_mark_of_what_goes_directly() {
    let ground = ground!("moving-direct");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = remotes(&ground);
    let mut by_vpn = Wire::between(&ground, "vpn0", "vout0");
    let mut world = Wire::open(&ground);
    let marking = |target: &str, mark: &str| {
        format!(
            "[global]\ndefault = drop\n{}{mark}[rules]\n{target} = /app\n[gateway lan]\n\
             interface = br-lan\ntarget = {target}\n",
            sections("vpn")
        )
    };
    let whole = |target: &str| {
        format!(
            "{}mark = 0xff000000\n[rules]\n{target} = /app\n[gateway lan]\ninterface = br-lan\n\
             target = {target}\n",
            sections("vpn")
        )
    };
    for how in [RELOAD, "kill -9"] {
        let daemon = Daemon::start(&ground, &marking("direct", ""), &[]);
        let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
        by_vpn.packets();
        let daemon = talk.during(|| change(&ground, daemon, how, &whole("direct")));
        let when = format!("{how}\n{}", daemon.logs());
        let left = by_vpn.to_remote();
        assert!(left.is_empty(), "{} of {:?}, {when}", left.len(), left[0]);
        await_end(&daemon);
        for pair in &talk.udp {
            assert!(Talk::is_answered(pair), "{pair:?}, {when}");
        }
        for each in &mut talk.tcp {
            assert!(each.goes_on(), "{each:?}, {when}");
        }
        assert_eq!(by_vpn.to_remote(), [], "{when}");
        daemon.stop_clean();
        forget_flows();

        for is in ["vpn", "direct"] {
            let daemon = Daemon::start(&ground, &whole("vpn"), &[]);
            let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
            world.packets();
            let daemon = talk.during(|| change(&ground, daemon, how, &marking(is, "")));
            let when = format!("{how}, {is}\n{}", daemon.logs());
            await_end(&daemon);
            for pair in &talk.udp {
                assert!(Talk::is_answered(pair), "{pair:?}, {when}");
            }
            for each in &mut talk.tcp {
                assert!(each.goes_on() || each.is_cut(true), "{each:?}, {when}");
            }
            let mut left = world.to_remote();
            // that nobody has the port of a flow by the route goes back as it came
            left.retain(|packet| packet.proto != Proto::Icmp);
            left.retain(|packet| {
                is == "vpn" || ["10.8.0.1", "fd00:8::1"].contains(&&*packet.src.ip().to_string())
            });
            assert!(left.is_empty(), "{} of {:?}, {when}", left.len(), left[0]);
            daemon.stop_clean();
            forget_flows();
        }
    }
}

/// Where conntrack does not list its flows, each moves when it speaks, for as long as it takes; also where
/// it is still asked which of many sockets are stale.
#[test]
fn flows_that_are_not_listed() {
    let ground = ground!("moving-unlisted");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = remotes(&ground);
    let _sockets = hoard(&cgroup, 15_000, addr(REMOTES[0], 80));
    for how in ["", "kill -9", "another mask"] {
        let mut daemon = Daemon::start(&ground, &policy("vpn", "vpn"), &[]);
        let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
        scene.left();
        let listing =
            netfilter_sockets(&daemon).into_iter().nth(1).expect("a socket for what is listed");
        hear_nothing(listing.as_fd());
        if how == "another mask" {
            // nothing is known by that: flows begin anew
            let mask = "[global]\nfwmark-mask = 0x00f00000\n";
            daemon.reconfigure(&format!("{mask}{}", policy("two vpn", "vpn")));
            await_end(&daemon);
            go_on(&mut talk, true, &daemon.logs());
            assert_eq!(scene.left(), [], "{}", daemon.logs());
            daemon.stop_clean();
            break;
        }

        let log = daemon.reconfigure(&policy("two vpn", "vpn"));

        assert!(
            log.contains("unable to list conntrack's flows") || log.contains("netlink"),
            "{log}"
        );
        assert!(moves(), "{}", table());
        if how == "kill -9" {
            daemon = change(&ground, daemon, how, &policy("two vpn", "vpn"));
            await_end(&daemon);
        }
        go_on(&mut talk, false, &daemon.logs());
        assert_eq!(scene.left(), [], "{}", daemon.logs());
        daemon.reconfigure(&policy("two vpn", "vpn"));
        daemon.stop_clean();
        forget_flows();
    }
}

/// The daemon's sockets to netfilter, in the order in which they were made.
fn netfilter_sockets(daemon: &Daemon) -> Vec<OwnedFd> {
    let fds =
        std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("list the descriptors");
    let fds = fds.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut fds: Vec<i32> = fds.collect();
    fds.sort_unstable();
    let all = fds.into_iter().map(|fd| descriptor_of(daemon.pid(), fd));
    all.filter(is_to_netfilter).collect()
}

/// Nothing that comes to a socket is delivered any more.
pub fn hear_nothing(fd: BorrowedFd) {
    // BPF_RET | BPF_K: nothing of it is kept
    let nothing = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 };
    let filter = libc::sock_fprog { len: 1, filter: (&raw const nothing).cast_mut() };
    filter_what_comes(fd, libc::SO_ATTACH_FILTER, &filter);
}

/// It is again.
pub fn hear_again(fd: BorrowedFd) {
    let unused = libc::sock_fprog { len: 0, filter: std::ptr::null_mut() };
    filter_what_comes(fd, libc::SO_DETACH_FILTER, &unused);
}

fn filter_what_comes(fd: BorrowedFd, option: i32, filter: &libc::sock_fprog) {
    let size = size_of_val(filter) as libc::socklen_t;
    let (fd, filter) = (fd.as_raw_fd(), (&raw const *filter).cast());
    // SAFETY: reads a filter, of one instruction at most.
    let rc = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, filter, size) };
    assert_eq!(rc, 0, "setsockopt {option}");
}

/// A service is asked by the interface of a route, which the main table would not answer by: it answers by
/// that alone, whatever becomes of the mask meanwhile.
#[test]
fn services_that_are_asked_by_a_route() {
    let ground = ground!("moving-asked");
    let mut scene = Scene::new(&ground);
    let remotes = remotes(&ground);
    let with = |mask: &str| format!("[global]\nfwmark-mask = {mask}\n{}", policy("vpn", "vpn"));
    let pairs: Vec<_> = TUNNEL
        .iter()
        .zip(&remotes)
        .map(|(own, remote)| {
            let at = addr(ip(own), 4000);
            let service = UdpSocket::from(bind(at, libc::SOCK_DGRAM));
            service.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            remote.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            (service, remote, at)
        })
        .collect();
    for how in [RELOAD, KILLED] {
        let mut daemon = Daemon::start(&ground, &with("0x0f000000"), &[]);
        for mask in ["0x0f000000", "0xff000000", "0x00f00000"] {
            daemon = change(&ground, daemon, how, &with(mask));
            await_end(&daemon);
            scene.left();
            for (service, remote, at) in &pairs {
                let when = format!("{at}, {mask}, {how}\n{}", daemon.logs());
                remote.send_to(b"?", *at).expect("ask");
                let (_, from) = again(|| service.recv_from(&mut [0; 16])).expect("it is asked");
                service.send_to(b"!", from).expect("answer");
                let answered = again(|| remote.recv_from(&mut [0; 16]));
                assert_eq!(scene.left(), [], "{when}");
                assert!(answered.is_ok_and(|(_, from)| from == *at), "{when}");
            }
        }
        daemon.stop_clean();
        forget_flows();
    }
}

/// The mark of what a container sends directly is a route's by and by, or was: it goes directly all the
/// time.
#[test]
fn a_container_that_goes_directly() {
    let (ground, _world) = scene!("moving-box");
    tunnel_up(&ground);
    let lan = Lan::new(&ground);
    let _process = live(lan.client(0), &ground.cgroup("/boxes/one"));
    let policy = |mark: &str| {
        format!(
            "{}{mark}[rules]\ndirect = /boxes/.*\n[gateway lan]\ninterface = br-lan\ntarget = drop\n",
            sections("vpn")
        )
    };
    let whole = policy("mark = 0xff000000\n");
    let changes = [policy(""), whole];
    for (at, to, mark) in [(0, 1, 0x0100_0000), (1, 0, 0xff00_0000)] {
        let changes = [at, to].map(|n| &*changes[n]);
        let daemon = Daemon::start(&ground, changes[0], &[]);
        lan.direct(0);
        add_flows(false, mark, MANY);

        amid(&daemon, changes, || lan.direct(0));

        await_end(&daemon);
        lan.direct(0);
        daemon.stop_clean();
        forget_flows();
    }
}

/// A daemon that ends while the mask changes leaves nothing known by a mark of before: nobody tells the next
/// one of that.
#[test]
fn a_stop_amid_a_change_of_the_mask() {
    let ground = ground!("moving-stop");
    let with = |mask: &str| {
        format!("[global]\nfwmark-mask = {mask}\n{}[rules]\nmihomo = /app\n", sections("mihomo"))
    };
    let changes = ["0x0f000000", "0x00f00000"].map(with);
    // the last flow may have lost its mark before the signal has its turn
    let amid_it = (0..5).any(|_| {
        let mut daemon = Daemon::start(&ground, &changes[0], &[]);
        add_flows(false, 0x0100_0000, MANY);
        let stop = || daemon.signal(Signal::SIGTERM);
        amid(&daemon, changes.each_ref().map(String::as_str), stop);
        assert!(daemon.wait().success(), "{}", daemon.logs());
        let left = conntrack_number("count");
        forget_flows();
        left < MANY / 2
    });
    assert!(amid_it);
}

/// What goes directly is known by a number that is a section's of the next mask: it goes directly on.
#[test]
fn the_mark_of_what_goes_directly_in_another_mask() {
    let ground = ground!("moving-other");
    let mut scene = Scene::new(&ground);
    let cgroup = ground.cgroup("/app");
    let remotes = remotes(&ground);
    let mut by_vpn = Wire::between(&ground, "vpn0", "vout0");
    let with = |global: &str, mark: &str| {
        format!(
            "[global]\n{global}{}{mark}[rules]\ndirect = /app\n\
                 [gateway lan]\ninterface = br-lan\ntarget = direct\n",
            sections("vpn")
        )
    };
    let was = with("fwmark-mask = 0x0f000000\ndefault = drop\n", "");
    let is = with("fwmark-mask = 0xff000000\n", "mark = 0x0f000000\n");
    for how in [RELOAD, KILLED] {
        let daemon = Daemon::start(&ground, &was, &[]);
        let mut talk = Talk::new(&mut scene, &cgroup, &remotes);
        by_vpn.packets();

        let daemon = change(&ground, daemon, how, &is);

        await_end(&daemon);
        let when = format!("{how}\n{}", daemon.logs());
        go_on(&mut talk, false, &when);
        let mut left = by_vpn.packets();
        left.retain(|packet| REMOTES.contains(&packet.dst.ip()));
        assert_eq!(left, [], "{when}");
        daemon.stop_clean();
        forget_flows();
    }
}
