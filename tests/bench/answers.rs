//! How soon the program answers to what happens: to others who damage its table or its rules, to an
//! interface that comes back, to an application that waits, and to anybody while it reloads for long.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{connect, socket_in, tcp_in, Client};
use crate::daemon::{run_with, Daemon, UNOWNED};
use crate::floor::{delete_table, Listener, NFT_MSG_NEWRULE};
use crate::ground::{addr, ip_batch, Ground, REMOTE4};
use crate::kernel::{add_flows, forget_flows, load};
use crate::report::{quantile, Report, Target};
use crate::senders::SOURCE_PORT;
use crate::sockets::{hold, ALL};
use crate::start::load_table;
use crate::ways::{by_a_route_of_hand, Table, CONFIG, DECIDED, PROXY_PORT, TABLE_BY_HAND};
use crate::world::bind;
use crate::{go_on, sized, wait_until};

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Somebody deletes the table. On Linux 6.9 and later nobody can, so the daemon is told to have it as
/// before.
pub fn heal(report: &mut Report) {
    let ground = Ground::new("heal").expect("root");
    DECIDED.iter().for_each(|path| drop(ground.cgroup(path)));
    let daemon = Daemon::start_in(&ground, CONFIG, &[], &[UNOWNED]);
    let table = run_with(&ground, CONFIG, &["show"]).fine();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..sized(9, 25) {
        go_on();
        let mut listener = Listener::new();
        let start = Instant::now();
        delete_table("cgtproxy");
        listener.await_kind(NFT_MSG_NEWRULE);
        ours.push(milliseconds(start));
        theirs.push(ground.outside(|| load_table(&table)));
        // so that it is put back at once, as it is where nobody fights for it
        thread::sleep(Duration::from_millis(300));
    }
    let reference = ("nft -f of the same table", &theirs);
    let target = Target::RatioAtMost(1.0);
    report.beside("heal, the table is deleted and back", &ours, "ms", reference, target);
    assert!(daemon.stop().success());
}

/// A user's paths are dear to match: what others wait for while the daemon reloads over them.
pub fn dear(report: &mut Report) {
    let ground = Ground::new("dear").expect("root");
    let rule = |i| format!("drop = /user/.*/app-x{i}-[0-9]+\\.scope.*\n");
    let rules: String = (0..20).map(rule).collect();
    let config = format!("[rules]\n{rules}drop = /apps/.*\n");
    ground.cgroup("/apps");
    for number in 0..100 {
        let levels = (0..15).map(|level| format!("/app-x{level}-{}.scope", "a".repeat(225)));
        ground.cgroup(&format!("/user/{number}{}", levels.collect::<String>()));
    }
    let daemon = Daemon::start(&ground, &config, &[]);
    let figure = "a new cgroup, beside a reload over dear paths";
    births(report, figure, &ground.at("/apps"), &|_| drop(daemon.reload()));
    assert!(daemon.stop().success());
}

/// Others have many sockets that a reload sends another way.
pub fn swept(report: &mut Report) {
    let ground = Ground::new("swept").expect("root");
    let config = |target| {
        format!(
            "[route vpn]\ninterface = vpn0\n[rules]\n{target} = /services/.*\ndrop = /apps/.*\n"
        )
    };
    ground.cgroup("/apps");
    let holders = hold(&ground, [libc::SOCK_DGRAM; 2]);
    let daemon = Daemon::start(&ground, &config("direct"), &[]);
    let figure = format!("a new cgroup, beside a reload that moves {ALL} sockets");
    births(report, &figure, &ground.at("/apps"), &|round| {
        daemon.reconfigure(&config(["vpn", "direct"][round % 2]));
        // what is left to look at
        thread::sleep(Duration::from_millis(50));
    });
    drop(holders);
    assert!(daemon.stop().success());
}

/// Others have many flows that a reload has known by other marks: what a new cgroup waits for, and who asks.
pub fn moved(report: &mut Report) {
    const FLOWS: usize = 200_000;
    let ground = Ground::new("moved").expect("root");
    let config = |names: [&str; 2]| {
        let routes = names.map(|name| format!("[route {name}]\ninterface = {name}\n")).concat();
        format!("{routes}[rules]\ndrop = /apps/.*\n")
    };
    ground.cgroup("/apps");
    let daemon = Daemon::start(&ground, &config(["vpn0", "vpn1"]), &[]);
    add_flows(false, 0x0100_0000, FLOWS);
    let said = |what: &str| daemon.logs().matches(what).count();
    let ask = || {
        let (before, start) = (said("status: "), Instant::now());
        daemon.signal(Signal::SIGUSR1);
        assert!(wait_until(Duration::from_secs(10), || said("status: ") > before));
        let took = milliseconds(start);
        thread::sleep(Duration::from_millis(20));
        took
    };
    let alone: Vec<f64> = (0..sized(5, 15)).map(|_| ask()).collect();
    let longest = Mutex::new(Vec::new());
    let figure = format!("a new cgroup, beside a reload that moves {FLOWS} flows");
    births(report, &figure, &ground.at("/apps"), &|round| {
        let before = said("reloaded ");
        daemon.configure(&config([["vpn1", "vpn0"], ["vpn0", "vpn1"]][round % 2]));
        daemon.signal(Signal::SIGHUP);
        let mut some = Vec::new();
        while said("reloaded ") == before {
            some.push(ask());
        }
        longest.lock().expect("no panic").push(quantile(&some, 1.0));
    });
    let figure = format!("SIGUSR1 beside a reload that moves {FLOWS} flows, longest of a round");
    let longest = longest.into_inner().expect("no panic");
    report.beside(&figure, &longest, "ms", ("alone", &alone), Target::AtMost(50.0));
    forget_flows();
    assert!(daemon.stop().success());
}

/// Until the packets of cgroups that come below `apps` are denied, alone and beside reloads.
fn births(report: &mut Report, figure: &str, apps: &Path, reload: &(dyn Fn(usize) + Sync)) {
    let birth = |name: String| {
        let path = apps.join(name);
        fs::create_dir(&path).expect("mkdir");
        let client = Client::udp(&path, addr(REMOTE4, 9)).until_denied();
        let took = client.timeout(Duration::from_secs(10)).spawn().wait().1.as_secs_f64() * 1e3;
        // thousands of them would make each replacement of the table a long one
        let _ = fs::remove_dir(&path);
        took
    };
    // all, and the longest of each round
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let (mut longest_alone, mut longest) = (Vec::new(), Vec::new());
    for round in 0..sized(5, 15) {
        go_on();
        let some: Vec<f64> = (0..40).map(|i| birth(format!("alone{round}.{i}"))).collect();
        longest_alone.push(quantile(&some, 1.0));
        alone.extend(some);
        let mut some = Vec::new();
        let reloading = AtomicBool::new(true);
        thread::scope(|scope| {
            scope.spawn(|| {
                reload(round);
                reloading.store(false, Ordering::Relaxed);
            });
            while reloading.load(Ordering::Relaxed) {
                some.push(birth(format!("beside{round}.{}", some.len())));
            }
        });
        longest.push(quantile(&some, 1.0));
        beside.extend(some);
    }
    // turns of a millisecond are a matter of the program, not of the machine
    report.beside(figure, &beside, "ms", ("alone", &alone), Target::AtMost(10.0));
    let figure = format!("{figure}, longest of a round");
    report.beside(figure, &longest, "ms", ("alone", &longest_alone), Target::AtMost(50.0));
}

/// The interface of a route comes back; until then its packets go nowhere.
pub fn back(report: &mut Report) {
    let ground = Ground::new("back").expect("root");
    let cgroup = ground.cgroup("/vpn/b");
    let outside =
        ground.outside(|| fs::File::open("/proc/thread-self/ns/net").expect("open a namespace"));
    let path = format!("/proc/{}/fd/{}", std::process::id(), outside.as_raw_fd());
    ip_batch(
        &[],
        &format!(
            "link add vpn0 type veth peer name vout0 address 02:00:00:00:08:02 netns {path}\n\
             addr add 10.8.0.1/24 dev vpn0\nlink set vpn0 up\n"
        ),
    );
    ground.outside(|| ip_batch(&[], "addr add 10.8.0.2/24 dev vout0\nlink set vout0 up\n"));
    let remote = ground.outside(|| UdpSocket::bind(addr(REMOTE4, 9)).expect("bind"));
    let config = "[route vpn]\ninterface = vpn0\ngateway = 10.8.0.2\n[rules]\nvpn = /vpn\n";
    let by_hand = by_a_route_of_hand(&ground, "vpn0");
    let way = format!("route add default via 10.8.0.2 dev vpn0 table {TABLE_BY_HAND}\n");
    // without the last route what is sent meanwhile would leave by the main table's, without an end
    let rule = format!(
        "rule add pref 90 fwmark 0x01000000/0xff000000 lookup {TABLE_BY_HAND}\n\
         route add unreachable default metric 9999 table {TABLE_BY_HAND}\n"
    );
    // as a tunnel's: asking for it is lost while the other end of the pair still wakes up, and is
    // tried again after a second
    let up = "link set vpn0 up\nneigh replace 10.8.0.2 lladdr 02:00:00:00:08:02 dev vpn0\n";
    let passes = |timeout| {
        remote.set_read_timeout(Some(Duration::from_millis(timeout))).expect("set a timeout");
        remote.recv(&mut [0; 64]).is_ok()
    };
    // down, and up again until a packet has left
    let take = |up: &str| {
        assert!(passes(10_000), "nothing leaves");
        ip_batch(&[], "link set vpn0 down\n");
        while passes(50) {}
        // The kernel tells of a carrier that comes back within a second only when that is over.
        thread::sleep(Duration::from_millis(1_200));
        let start = Instant::now();
        ip_batch(&[], up);
        assert!(passes(10_000), "nothing leaves any more");
        milliseconds(start)
    };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..sized(5, 15) {
        go_on();
        let table = Table::ours(&ground, config);
        let flood = Client::udp(&cgroup, addr(REMOTE4, 9)).flood().spawn();
        ours.push(take(up));
        drop(flood);
        drop(table);
        load(&by_hand);
        ip_batch(&["-4"], &format!("{rule}{way}"));
        let flood = Client::udp(&cgroup, addr(REMOTE4, 9)).flood().spawn();
        theirs.push(take(&format!("{up}{way}")));
        drop(flood);
        ip_batch(&["-4"], &format!("{rule}{way}").replace(" add ", " del "));
        assert!(crate::kernel::nft(&["flush", "ruleset"], "").status.success());
    }
    let reference = ("by hand", &theirs);
    let figure = "a route's interface is up, until packets leave";
    report.beside(figure, &ours, "ms", reference, Target::AtMost(50.0));
}

/// An application waits on a connection that is to go another way from now on.
pub fn stalled(report: &mut Report) {
    let ground = Ground::new("stalled").expect("root");
    let cgroup = ground.cgroup("/proxied/b");
    let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    let listen = |port| {
        let listener: OwnedFd = bind(any(port), libc::SOCK_STREAM);
        // SAFETY: an open socket.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 64) }, 0);
        TcpListener::from(listener)
    };
    let _remote = ground.outside(|| listen(SOURCE_PORT));
    let proxy = listen(PROXY_PORT);
    let to = addr(REMOTE4, SOURCE_PORT);
    let direct = "[tproxy mihomo]\nport = 7893\n[rules]\ndrop = /drop\n";
    let daemon = Daemon::start(&ground, direct, &[]);
    let (mut ours, mut reload) = (Vec::new(), Vec::new());
    for _ in 0..sized(9, 25) {
        go_on();
        let own = tcp_in(&cgroup, to);
        // made by the same process of the cgroup as the first, and as soon as that is ended
        let next = socket_in(&cgroup, libc::SOCK_STREAM, to.ip());
        daemon.configure(CONFIG);
        let reloads = || daemon.logs().matches("reloaded").count();
        let before = reloads();
        let mut listener = Listener::new();
        let start = Instant::now();
        let waiting = thread::spawn(move || {
            let end = std::io::Read::read(&mut &own, &mut [0; 8]);
            let ended = end.is_err_and(|e| e.kind() != std::io::ErrorKind::WouldBlock);
            let again = connect(&next, to).is_ok();
            (milliseconds(start), ended && again, next)
        });
        daemon.signal(Signal::SIGHUP);
        listener.await_kind(NFT_MSG_NEWRULE);
        reload.push(milliseconds(start));
        let (took, ended, next) = waiting.join().expect("the application does not panic");
        assert!(ended, "the application was not told");
        ours.push(took);
        proxy.accept().expect("it connects by the proxy");
        drop(next);
        // its line comes last, and would be taken for that of the next
        let done = wait_until(Duration::from_secs(10), || reloads() > before);
        assert!(done && daemon.reconfigure(direct).contains("reloaded"), "{}", daemon.logs());
    }
    let figure = "SIGHUP to the new connection of a stalled application";
    let reference = ("to the new table", &reload);
    report.beside(figure, &ours, "ms", reference, Target::None);
    assert!(daemon.stop().success());
}
