//! What a packet pays, and what a proxied stream gets.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::sys::wait::waitpid;

use crate::client::fork_into;
use crate::daemon::{write_private, Daemon};
use crate::ground::{addr, ip_batch, pipe, Ground, REMOTE4};
use crate::kernel::load;
use crate::reference;
use crate::report::{median, Report, Target};
use crate::start::prefixes;
use crate::world::{bind, raw_addr};
use crate::{go_on, sized};

const PROXY_PORT: u16 = 7893;

/// Targets two levels below the cgroup2 root, as services are, and one deeper, as on desktops.
const CONFIG: &str = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /direct\n\
    mihomo = /proxied\nmihomo = /desktop/b/c/d\ndrop = /drop\n";

/// With an element for a direct cgroup too: that of the above has the target of its parent, so it
/// has none that could count it.
const COUNTED: &str = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /proxied/b/c/d/direct\n\
    mihomo = /proxied\n";

/// (b): conntrack and nothing else.
const CONNTRACK: &str = "table inet bench { chain output {
    type filter hook output priority mangle; policy accept;
    ct state invalid accept
}
}";

/// (c): reply and bypass tests in front, then a verdict map for each level, deepest first.
fn six_levels(ground: &Ground) -> String {
    let sub_tree = ground.root.file_name().and_then(|n| n.to_str()).expect("a name");
    let mut text = String::from(
        "table inet bench {
        set bypass4 { type ipv4_addr; flags interval; elements = { 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255 }; }
        set bypass6 { type ipv6_addr; flags interval; elements = { fe80::/10, ff00::/8 }; }
        chain to_mihomo {
            meta l4proto { tcp, udp } ct mark set 0x01000000 meta mark set 0x01000000 accept
        }
        chain to_drop { drop; }
        ",
    );
    let elements = |of: &[(&str, &str)]| {
        let each = of.iter().map(|(path, verdict)| format!("\"{sub_tree}/{path}\" : {verdict}"));
        format!("elements = {{ {} }};", each.collect::<Vec<_>>().join(", "))
    };
    for level in 1..=6 {
        let elements = match level {
            2 => elements(&[
                ("proxied", "goto to_mihomo"),
                ("direct", "accept"),
                ("drop", "goto to_drop"),
            ]),
            5 => elements(&[("desktop/b/c/d", "goto to_mihomo")]),
            _ => String::new(),
        };
        text += &format!("map level{level} {{ type cgroupsv2 : verdict; {elements} }}\n");
    }
    text += "chain output {
        type route hook output priority mangle; policy accept;
        oif lo accept
        ct direction reply accept
        ip daddr @bypass4 accept
        ip6 daddr @bypass6 accept
        ";
    for level in (1..=6).rev() {
        text += &format!("socket cgroupv2 level {level} vmap @level{level}\n");
    }
    text += "}
        chain prerouting {
            type filter hook prerouting priority mangle; policy accept;
            iif lo meta mark 0x01000000 meta l4proto { tcp, udp } tproxy to :7893 accept
        }
    }";
    text
}

/// (d): every packet goes to the proxy and none is classified. Less than that no program can do for
/// a proxied one.
const BARE: &str = "table inet bench {
    chain output {
        type route hook output priority mangle; policy accept;
        oif lo accept
        ct mark set 0x01000000 meta mark set 0x01000000
    }
    chain prerouting {
        type filter hook prerouting priority mangle; policy accept;
        iif lo meta mark 0x01000000 meta l4proto { tcp, udp } tproxy to :7893 accept
    }
}";

/// A way to handle packets, in force until it is dropped.
enum Table {
    Script,
    Ours(Option<Daemon>),
}

impl Table {
    fn script(text: &str) -> Table {
        load(text);
        for family in ["-4", "-6"] {
            ip_batch(&[family], reference::ROUTING);
        }
        Table::Script
    }

    fn ours(ground: &Ground, config: &str) -> Table {
        Table::Ours(Some(Daemon::start(ground, config, &[])))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        match self {
            Table::Ours(daemon) => {
                let stopped = daemon.take().map(Daemon::stop);
                assert!(thread::panicking() || stopped.is_some_and(|s| s.success()));
            }
            Table::Script => unload(),
        }
    }
}

/// Removes the reference tables and their routing.
fn unload() {
    let out = crate::kernel::nft(&["flush", "ruleset"], "");
    assert!(thread::panicking() || out.status.success());
    for family in ["-4", "-6"] {
        ip_batch(&[family], &reference::ROUTING.replace(" add ", " del "));
    }
}

pub fn packet_cost(report: &mut Report) {
    let ground = Ground::new("packet").expect("root");
    for path in ["/desktop/b/c/d", "/drop"] {
        ground.cgroup(path);
    }
    let kinds = ["unmatched", "direct", "proxied"];
    // processes at level 6, as deep as the six levels look
    let cgroups = kinds.map(|kind| ground.cgroup(&format!("/{kind}/b/c/d/e")));
    // packets that reach the outside end at its door
    ground.outside(|| {
        load(
            "table netdev sink {
                chain in { type filter hook ingress device out0 priority 0; policy drop; }
            }",
        );
    });
    // and proxied ones in a full receive buffer
    let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PROXY_PORT);
    let _proxy = bind(any, libc::SOCK_DGRAM);
    let reference = six_levels(&ground);
    let flood = |cgroup: &Path| flood(cgroup, addr(REMOTE4, 9));

    let (mut none, mut conntrack, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    let mut ours = [const { Vec::new() }; 3];
    let mut theirs = [const { Vec::new() }; 3];
    let counters = ["target", "cgroup"].map(|what| {
        let root = ground.root.display();
        format!("[global]\ncounters = {what}\ncgroup-root = {root}\n{COUNTED}")
    });
    let counted =
        [("direct", ground.cgroup("/proxied/b/c/d/direct")), ("proxied", cgroups[2].clone())];
    // by what is counted, then by kind
    let mut counting = [const { [const { Vec::new() }; 2] }; 2];
    for _ in 0..sized(9, 21) {
        go_on();
        none.push(flood(&cgroups[0]));
        let table = Table::script(CONNTRACK);
        conntrack.push(flood(&cgroups[0]));
        drop(table);
        let table = Table::script(BARE);
        bare.push(flood(&cgroups[2]));
        drop(table);
        let table = Table::script(&reference);
        cgroups.iter().zip(&mut theirs).for_each(|(c, into)| into.push(flood(c)));
        drop(table);
        let table = Table::ours(&ground, CONFIG);
        cgroups.iter().zip(&mut ours).for_each(|(c, into)| into.push(flood(c)));
        drop(table);
        for (config, into) in counters.iter().zip(&mut counting) {
            let table = Table::ours(&ground, config);
            for ((_, cgroup), into) in counted.iter().zip(into) {
                into.push(flood(cgroup));
            }
            drop(table);
        }
    }
    let base = median(&conntrack);
    report.alone("packet, no table (a)", median(&none), "ns", Target::None);
    let reference = ("no table", median(&none));
    report.beside("packet, conntrack only (b)", base, "ns", reference, Target::None);
    for (kind, (ours, theirs)) in kinds.iter().zip(ours.iter().zip(&theirs)) {
        let reference = ("six levels", median(theirs));
        report.beside(format!("packet, {kind}"), median(ours), "ns", reference, Target::None);
        // round by round, so that a busy moment takes part in both
        let over = |samples: &[f64], base: &[f64]| {
            let each: Vec<f64> = samples.iter().zip(base).map(|(s, c)| s - c).collect();
            median(&each)
        };
        // most of a proxied packet's cost is the way through lo, which every table takes
        let (base, name, target) = match *kind {
            "proxied" => (&bare, "all proxied (d)", Target::None),
            _ => (&conntrack, "(b)", Target::RatioAtMost(0.6)),
        };
        let reference = ("six levels", over(theirs, base));
        let name = format!("packet, {kind}, over {name}");
        report.beside(name, over(ours, base), "ns", reference, target);
        if *kind == "proxied" {
            let reference = ("all proxied (d)", over(&bare, &conntrack));
            let name = format!("packet, {kind}, over (b)");
            report.beside(name, over(ours, &conntrack), "ns", reference, Target::None);
            let reference = ("six levels", over(theirs, &conntrack));
            let name = "packet, all proxied (d), over (b)";
            report.beside(name, over(&bare, &conntrack), "ns", reference, Target::None);
        }
    }
    let [off, on] = &counting;
    for ((kind, _), (off, on)) in counted.iter().zip(off.iter().zip(on)) {
        let name = format!("packet, {kind}, counters = cgroup");
        let reference = ("= target", median(off));
        report.beside(&name, median(on), "ns", reference, Target::None);
        let more: Vec<f64> = on.iter().zip(off).map(|(on, off)| on - off).collect();
        report.alone(name + ", more", median(&more), "ns", Target::None);
    }
}

/// What a line for a user adds to packets, his own and others'. The sender is root.
pub fn user_line(report: &mut Report) {
    let ground = Ground::new("user").expect("root");
    let cgroups =
        ["/free/b", "/proxied/first/b", "/proxied/second/b"].map(|path| ground.cgroup(path));
    ground.outside(|| {
        load(
            "table netdev sink {
                chain in { type filter hook ingress device out0 priority 0; policy drop; }
            }",
        );
    });
    let config = |before: &str, behind: &str| {
        format!(
            "[tproxy mihomo]\nport = 7893\n[rules]\n{before}direct = /proxied/first\n{behind}\
             direct = /proxied/second\nmihomo = /proxied\n"
        )
    };
    let other = "drop = user:65533\n";
    // in front of all, and between two that would share a set
    let configs =
        [config("", ""), config(other, ""), config("direct = user:0\n", ""), config("", other)];
    let mut taken = [const { [const { Vec::new() }; 3] }; 4];
    for _ in 0..sized(9, 21) {
        go_on();
        for (config, into) in configs.iter().zip(&mut taken) {
            let table = Table::ours(&ground, config);
            for (cgroup, into) in cgroups.iter().zip(into) {
                into.push(flood(cgroup, addr(REMOTE4, 9)));
            }
            drop(table);
        }
    }
    let [without, others, own, between] = &taken;
    let most = Target::AtMost(40.0);
    for (name, with, at, target) in [
        ("unmatched, another user's line", others, 0, most),
        ("direct behind another user's line", others, 2, most),
        ("unmatched, direct by the user's line", own, 0, most),
        ("direct by the user's line, in a cgroup", own, 2, most),
        ("direct before another user's line", between, 1, most),
        ("direct behind that, in a set of its own", between, 2, Target::None),
    ] {
        let more: Vec<f64> = with[at].iter().zip(&without[at]).map(|(a, b)| a - b).collect();
        let reference = ("without, in all", median(&without[at]));
        report.beside(format!("packet, {name}, more"), median(&more), "ns", reference, target);
    }
}

/// What ports and destinations of a target cost its packets, and those of others: nothing.
pub fn destinations(report: &mut Report) {
    let ground = Ground::new("destinations").expect("root");
    let [others, own] = ["unmatched", "proxied"].map(|kind| ground.cgroup(&format!("/{kind}/b")));
    ground.outside(|| {
        load(
            "table netdev sink {
                chain in { type filter hook ingress device out0 priority 0; policy drop; }
            }",
        );
    });
    let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PROXY_PORT);
    let _proxy = bind(any, libc::SOCK_DGRAM);
    let list = |count| {
        let file = ground.dir.join(format!("{count}.txt"));
        write_private(&file, &prefixes(count));
        format!("bypass-file = {}\n", file.display())
    };
    let kinds = [
        ("a port list", "udp-ports = 1-79 443 8000-8999\n".to_string(), Target::AtMost(40.0)),
        ("quic = reject", "quic = reject\n".to_string(), Target::AtMost(40.0)),
        ("100 prefixes", list(100), Target::None),
        ("10000 prefixes", list(10_000), Target::AtMost(40.0)),
        ("100000 prefixes", list(100_000), Target::None),
    ];
    let config = |lines: &str| CONFIG.replace("port = 7893\n", &format!("port = 7893\n{lines}"));
    let mut plain = [const { Vec::new() }; 2];
    let mut with = [const { [const { Vec::new() }; 2] }; 5];
    let measure = |lines: &str, into: &mut [Vec<f64>; 2]| {
        let table = Table::ours(&ground, &config(lines));
        for (cgroup, into) in [&others, &own].into_iter().zip(into) {
            into.push(flood(cgroup, addr(REMOTE4, 9)));
        }
        drop(table);
    };
    for _ in 0..sized(9, 21) {
        go_on();
        measure("", &mut plain);
        for ((_, lines, _), into) in kinds.iter().zip(&mut with) {
            measure(lines, into);
        }
    }
    for ((name, _, target), with) in kinds.into_iter().zip(&with) {
        for (of, (plain, with)) in ["unmatched", "proxied"].iter().zip(plain.iter().zip(with)) {
            let target = if *of == "proxied" { target } else { Target::None };
            let reference = ("without", median(plain));
            let figure = format!("packet, {of}, {name}");
            report.beside(&figure, median(with), "ns", reference, Target::None);
            let more: Vec<f64> = with.iter().zip(plain).map(|(a, b)| a - b).collect();
            report.alone(figure + ", more", median(&more), "ns", target);
        }
    }
}

/// What leaves by a route, beside the same by rules that a person would write for that alone: a mark,
/// which has the kernel look for the way once more, and the source address that goes with it. And
/// what packets of others pay for there being one: nothing.
pub fn route(report: &mut Report) {
    let ground = Ground::new("route").expect("root");
    let [others, own] = ["unmatched", "vpn"].map(|kind| ground.cgroup(&format!("/{kind}/b")));
    ground.outside(|| {
        load(
            "table netdev sink {
                chain in { type filter hook ingress device out0 priority 0; policy drop; }
            }",
        );
    });
    let plain = "[rules]\ndrop = /drop\n";
    let ours = "[route vpn]\ninterface = in0\ngateway = 192.0.2.2\n[rules]\nvpn = /vpn\n";
    let sub_tree = ground.root.file_name().and_then(|n| n.to_str()).expect("a name");
    let by_hand = format!(
        "table inet bench {{
            set vpn {{ type cgroupsv2; elements = {{ \"{sub_tree}/vpn\" }}; }}
            chain output {{
                type route hook output priority mangle; policy accept;
                oif lo accept
                socket cgroupv2 level 2 @vpn ct direction original ct mark set 0x01000000 meta mark set 0x01000000
            }}
            chain nat {{
                type nat hook postrouting priority 99; policy accept;
                ct mark 0x01000000 oifname in0 masquerade
            }}
        }}"
    );
    let ways = [
        "rule add pref 90 fwmark 0x01000000/0xff000000 lookup 77\n",
        "route add default via 192.0.2.2 dev in0 table 77\n",
    ]
    .concat();
    let flood = |cgroup: &Path| flood(cgroup, addr(REMOTE4, 9));
    let mut unmatched = [const { Vec::new() }; 2];
    let mut routed = [const { Vec::new() }; 3];
    for _ in 0..sized(9, 21) {
        go_on();
        let table = Table::ours(&ground, &plain.replace("/drop", "/elsewhere"));
        unmatched[0].push(flood(&others));
        routed[0].push(flood(&own));
        drop(table);
        load(&by_hand);
        ip_batch(&["-4"], &ways);
        routed[1].push(flood(&own));
        ip_batch(&["-4"], &ways.replace(" add ", " del "));
        assert!(crate::kernel::nft(&["flush", "ruleset"], "").status.success());
        let table = Table::ours(&ground, &format!("{ours}drop = /elsewhere\n"));
        unmatched[1].push(flood(&others));
        routed[2].push(flood(&own));
        drop(table);
    }
    let more = |with: &[f64], without: &[f64]| {
        let each: Vec<f64> = with.iter().zip(without).map(|(a, b)| a - b).collect();
        median(&each)
    };
    let reference = ("without a route", median(&unmatched[0]));
    report.beside(
        "packet, unmatched, beside a route",
        median(&unmatched[1]),
        "ns",
        reference,
        Target::None,
    );
    let name = "packet, unmatched, beside a route, more";
    report.alone(name, more(&unmatched[1], &unmatched[0]), "ns", Target::AtMost(5.0));
    let reference = ("direct, in all", median(&routed[0]));
    let over = more(&routed[2], &routed[0]);
    report.beside("packet, by a route, over direct", over, "ns", reference, Target::None);
    let reference = ("by hand, over direct", more(&routed[1], &routed[0]));
    let over = more(&routed[2], &routed[1]);
    report.beside(
        "packet, by a route, over rules by hand",
        over,
        "ns",
        reference,
        Target::AtMost(40.0),
    );
}

/// What a user who was given a directory can cost everybody: a packet that no rule decides, beside
/// cgroups below `/delegated` that a rule with `.*` matches at as many levels as can be.
pub fn nested_levels(report: &mut Report) {
    const LEVELS: usize = 240;
    let ground = Ground::new("nested").expect("root");
    let unmatched = ground.cgroup("/unmatched/b/c/d/e");
    ground.outside(|| {
        load(
            "table netdev sink {
                chain in { type filter hook ingress device out0 priority 0; policy drop; }
            }",
        );
    });
    let config = format!("{CONFIG}mihomo = /delegated/.*app\n");
    let deep: Vec<String> =
        (1..=LEVELS).map(|n| format!("/delegated{}/app", "/x".repeat(n))).collect();
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..sized(3, 9) {
        go_on();
        for (paths, into) in [(&[][..], &mut alone), (&deep, &mut beside)] {
            for path in paths {
                ground.cgroup(path);
            }
            let table = Table::ours(&ground, &config);
            into.push(flood(&unmatched, addr(REMOTE4, 9)));
            drop(table);
            crate::ground::remove_tree(&ground.at("/delegated"));
        }
    }
    let reference = ("without", median(&alone));
    let name = format!("packet, unmatched, {LEVELS} levels of a user");
    report.beside(name, median(&beside), "ns", reference, Target::None);
}

/// Packets between two looks at the clock, and how often that is looked at: a chunk is much shorter
/// than a time slice, so few chunks have another process in them.
const CHUNK: u64 = 64;
const CHUNKS: usize = 800;

/// Nanoseconds a datagram, sent without pause by a process of that cgroup: the median of chunks.
fn flood(cgroup: &Path, to: SocketAddr) -> f64 {
    let (read, write) = pipe();
    let to = raw_addr(to);
    let chunks = sized(320, CHUNKS);
    let cgroup = File::open(cgroup).expect("open the cgroup");
    let child = || {
        let mut times = [0u64; CHUNKS];
        // SAFETY: system calls on memory that is alive, and nothing else (see `fork_into`).
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
            if libc::connect(fd, (&raw const to.0).cast(), to.1) != 0 {
                return 1;
            }
            let send = || {
                let start = now();
                for _ in 0..CHUNK {
                    libc::send(fd, b"payload".as_ptr().cast(), 7, 0);
                }
                now() - start
            };
            for _ in 0..32 {
                send();
            }
            times[..chunks].iter_mut().for_each(|time| *time = send());
            times[..chunks].sort_unstable();
            let middle = times[chunks / 2];
            libc::write(write.as_raw_fd(), (&raw const middle).cast(), 8);
        }
        0
    };
    // SAFETY: the child makes system calls only.
    let pid = unsafe { fork_into(&cgroup, child) }.expect("fork into the cgroup");
    drop(write);
    u64_from(read, pid) as f64 / CHUNK as f64
}

fn u64_from(read: OwnedFd, pid: nix::unistd::Pid) -> u64 {
    let mut bytes = [0; size_of::<u64>()];
    let got = File::from(read).read_exact(&mut bytes);
    let _ = waitpid(pid, None);
    got.expect("the child reports");
    u64::from_ne_bytes(bytes)
}

/// Nanoseconds on a monotonic clock; async-signal-safe.
fn now() -> u64 {
    // SAFETY: fills the timespec that it is given.
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

const SOURCE_PORT: u16 = 9100;

/// What the reference table does, but for DNS.
const AS_REFERENCE: &str =
    "[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = /mihomo\ndrop = /drop\n";

pub fn throughput(report: &mut Report) {
    let ground = Ground::new("through").expect("root");
    let cgroup = ground.cgroup("/mihomo");
    let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    let source = ground.outside(|| TcpListener::bind(any(SOURCE_PORT)).expect("bind"));
    let _source = Acceptor::start(source, |mut conn| {
        let chunk = vec![0x5a; 128 * 1024];
        while conn.write_all(&chunk).is_ok() {}
    });
    let listener = TcpListener::from(bind(any(PROXY_PORT), libc::SOCK_STREAM));
    // SAFETY: an open socket.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 64) }, 0);
    let relay = Acceptor::start(listener, relay);
    for streams in [1, 8] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..sized(5, 15) {
            go_on();
            for our_turn in [round % 2 == 0, round % 2 != 0] {
                if our_turn {
                    let _table = Table::ours(&ground, AS_REFERENCE);
                    ours.push(download(&cgroup, streams));
                } else {
                    reference::load(&ground, None);
                    theirs.push(download(&cgroup, streams));
                    unload();
                }
            }
        }
        let count = relay.count();
        assert!(count >= streams * 2, "{count} streams went through the relay");
        let reference = ("the reference table", median(&theirs));
        let figure = format!("proxied throughput, {streams} streams");
        report.beside(figure, median(&ours), "Gbit/s", reference, Target::RatioAtLeast(0.97));
    }
}

/// Serves each connection in a thread of its own, until it is dropped.
struct Acceptor {
    listener: TcpListener,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    fn start(listener: TcpListener, serve: fn(TcpStream)) -> Acceptor {
        let stop = Arc::new(AtomicBool::new(false));
        let accepted = Arc::new(AtomicUsize::new(0));
        let copy = listener.try_clone().expect("dup");
        let (end, count) = (stop.clone(), Arc::clone(&accepted));
        let thread = thread::spawn(move || {
            while let Ok((conn, _)) = copy.accept() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                thread::spawn(move || serve(conn));
            }
        });
        Acceptor { listener, stop, accepted, thread: Some(thread) }
    }

    fn count(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // SAFETY: an open socket; accept(2) returns with an error.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Relays from where the client wanted to go to the client, without copying.
fn relay(client: TcpStream) {
    let Ok(dialled) = client.local_addr() else {
        return;
    };
    let server = TcpStream::connect(dialled).expect("connect to the source");
    let (out, into) = pipe();
    const ROOM: usize = 1 << 20;
    // SAFETY: integers only.
    unsafe { libc::fcntl(into.as_raw_fd(), libc::F_SETPIPE_SZ, ROOM) };
    let splice = |from: i32, to: i32, length: usize| -> io::Result<usize> {
        let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_MOVE);
        // SAFETY: descriptors only; no offsets are given.
        let n = unsafe { libc::splice(from, none, to, none, length, flags) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    };
    while let Ok(mut left @ 1..) = splice(server.as_raw_fd(), into.as_raw_fd(), ROOM) {
        while left > 0 {
            match splice(out.as_raw_fd(), client.as_raw_fd(), left) {
                Ok(n @ 1..) => left -= n,
                _ => return,
            }
        }
    }
}

/// Gbit/s that as many processes in the cgroup receive together, each in one stream.
fn download(cgroup: &Path, streams: usize) -> f64 {
    let (warm_up, time) = match crate::quick_run() {
        true => (100_000_000, 300_000_000),
        false => (150_000_000, 600_000_000),
    };
    let to = raw_addr(addr(REMOTE4, SOURCE_PORT));
    let dir = File::open(cgroup).expect("open the cgroup");
    let clients: Vec<_> = (0..streams)
        .map(|_| {
            let (read, write) = pipe();
            let child = || {
                // SAFETY: system calls on memory that is alive, and nothing else. With MSG_TRUNC,
                // tcp(7) drops the data and writes none of it.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                    if libc::connect(fd, (&raw const to.0).cast(), to.1) != 0 {
                        return 1;
                    }
                    let (mut bytes, start) = (0u64, now());
                    let mut counting = 0;
                    loop {
                        let none = std::ptr::null_mut();
                        let n = libc::recv(fd, none, 1 << 20, libc::MSG_TRUNC);
                        if n <= 0 {
                            return 2;
                        }
                        let at = now();
                        if counting == 0 && at - start > warm_up {
                            counting = at;
                        } else if counting != 0 {
                            bytes += n as u64;
                            if at - counting > time {
                                let rate = bytes * 1_000_000 / ((at - counting) / 1_000);
                                libc::write(write.as_raw_fd(), (&raw const rate).cast(), 8);
                                return 0;
                            }
                        }
                    }
                }
            };
            // SAFETY: the child makes system calls only.
            let pid = unsafe { fork_into(&dir, child) }.expect("fork into the cgroup");
            (read, pid)
        })
        .collect();
    let rates = clients.into_iter().map(|(read, pid)| u64_from(read, pid));
    rates.sum::<u64>() as f64 * 8.0 / 1e9
}
