//! What a packet pays, and what a proxied stream gets.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::thread;

use nix::sched::{unshare, CloneFlags};

use crate::daemon::write_private;
use crate::ground::{addr, ip_batch, sysctl, Ground, REMOTE4};
use crate::kernel::load;
use crate::latency::Pinned;
use crate::reference;
use crate::report::{Report, Target};
use crate::senders::{connects, download, flood, relay, round_trips, Acceptor, Echo, SOURCE_PORT};
use crate::start::prefixes;
use crate::ways::{
    by_a_route_of_hand, look_up, one_set, one_user, other_build, six_levels, thirty_pairs, unload,
    Table, Xtables, BARE, CONFIG, CONNTRACK, DECIDED, FORWARD_BARE, PROXY_PORT, TABLE_BY_HAND,
};
use crate::world::bind;
use crate::{go_on, sized};

/// With an element for a direct cgroup too: that of [`CONFIG`] has the target of its parent, so it
/// has none that could count it.
const COUNTED: &str = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /proxied/b/c/d/direct\n\
    mihomo = /proxied\n";

/// Packets that reach the outside end at its door.
fn sink(ground: &Ground) {
    ground.outside(|| {
        load(
            "table netdev sink {
                chain in { type filter hook ingress device out0 priority 0; policy drop; }
            }",
        );
    });
}

/// The network namespace that this thread is in.
fn this_network() -> File {
    File::open("/proc/thread-self/ns/net").expect("open a namespace")
}

/// And proxied ones in a receive buffer that is full.
fn full_proxy() -> OwnedFd {
    bind(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), PROXY_PORT), libc::SOCK_DGRAM)
}

/// Who sends, at level 6, as deep as the six levels look.
const KINDS: [&str; 4] = ["undecided", "direct", "proxied", "dropped"];

fn senders(ground: &Ground) -> [PathBuf; 4] {
    let trees = ["/undecided", "/direct", "/proxied", "/drop"];
    trees.map(|tree| ground.cgroup(&format!("{tree}/b/c/d/e")))
}

/// What was measured by turns: by way and by kind.
#[derive(Default)]
struct Taken(BTreeMap<(String, &'static str), Vec<f64>>);

impl Taken {
    fn take(&mut self, way: &str, kind: &'static str, sample: f64) {
        self.0.entry((way.to_string(), kind)).or_default().push(sample);
    }

    fn of(&self, way: &str, kind: &'static str) -> Option<&Vec<f64>> {
        self.0.get(&(way.to_string(), kind))
    }

    /// What one way costs more than another, round by round.
    fn over(&self, way: &str, kind: &'static str, base: &[f64]) -> Option<Vec<f64>> {
        let samples = self.of(way, kind)?;
        Some(samples.iter().zip(base).map(|(own, base)| own - base).collect())
    }
}

const OURS: &str = "ours";
const MANY: &str = "ours, 30 pairs";
const OTHER: &str = "the other build";
const OTHER_MANY: &str = "the other build, 30 pairs";
const LEVELS: &str = "one look-up a level, six levels";
const SET: &str = "one rule of one set";
const USER: &str = "one rule for a user";
const LEGACY: &str = "cgproxy's rules, iptables-legacy";
const COMPAT: &str = "cgproxy's rules, iptables-nft";

pub fn packet_cost(report: &mut Report) {
    // what iptables-legacy has registered once costs every packet of its namespace from then on
    let apart = Ground::new("legacy").expect("root");
    let namespace = this_network();
    sink(&apart);
    let _apart_proxy = full_proxy();
    let ground = Ground::new("packet").expect("root");
    let cgroups = senders(&ground);
    let (many, paths) = thirty_pairs();
    DECIDED.iter().copied().chain(paths.iter().map(String::as_str)).for_each(|path| {
        ground.cgroup(path);
    });
    sink(&ground);
    let _proxy = full_proxy();
    let all = |taken: &mut Taken, way: &str, kinds: &[usize]| {
        for kind in kinds {
            taken.take(way, KINDS[*kind], flood(&cgroups[*kind]));
        }
    };
    let other = other_build();
    let mut xtables: Vec<_> = [(COMPAT, Xtables::Nft), (LEGACY, Xtables::Legacy)].into();
    let mut taken = Taken::default();
    let (mut none, mut conntrack, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..sized(9, 21) {
        go_on();
        none.push(flood(&cgroups[0]));
        for (script, kind, into) in [(CONNTRACK, 0, &mut conntrack), (BARE, 2, &mut bare)] {
            let _table = Table::script(script);
            into.push(flood(&cgroups[kind]));
        }
        for (way, script, kinds) in [
            (LEVELS, six_levels(&ground), &[0, 1, 2, 3][..]),
            (SET, one_set(&ground), &[0, 3]),
            (USER, one_user(), &[0]),
        ] {
            let _table = Table::script(&script);
            all(&mut taken, way, kinds);
        }
        xtables.retain(|(way, which)| {
            let mut measure = || {
                let _table = Table::like_cgproxy(*which, &ground)?;
                all(&mut taken, way, &[0, 1, 2]);
                Ok::<(), String>(())
            };
            let done = match which {
                Xtables::Legacy => ground.within(&namespace, measure),
                Xtables::Nft => measure(),
            };
            done.map_err(|reason| report.skip(way, &reason)).is_ok()
        });
        for (way, other_way, config) in [(OURS, OTHER, CONFIG), (MANY, OTHER_MANY, &many)] {
            if let Some(path) = &other {
                let _table = Table::of_build(path, &ground, config);
                all(&mut taken, other_way, &[0, 1, 2, 3]);
            }
            let _table = Table::ours(&ground, config);
            all(&mut taken, way, &[0, 1, 2, 3]);
        }
    }
    report.alone("packet, no table (a)", &none, "ns", Target::None);
    report.beside("packet, conntrack only (b)", &conntrack, "ns", ("(a)", &none), Target::None);
    let way = |samples: &[f64]| -> Vec<f64> {
        samples.iter().zip(&conntrack).map(|(own, base)| own - base).collect()
    };
    let lo = "packet, all to the proxy and none classified (d), over (b)";
    report.alone(lo, way(&bare), "ns", Target::None);
    for (own, own_name, kind) in
        [(OURS, "", 0), (MANY, ", 30 pairs", 0), (OURS, "", 1), (OURS, "", 2), (OURS, "", 3)]
    {
        let kind = KINDS[kind];
        let figure = format!("packet, {kind}{own_name}");
        if let Some(samples) = taken.of(own, kind) {
            report.alone(&figure, samples, "ns", Target::None);
        }
        // most of a proxied packet's cost is the way through lo, which every table takes
        let (base, name) = match kind {
            "proxied" => (&bare, "(d)"),
            _ => (&conntrack, "(b)"),
        };
        let figure = format!("{figure}, over {name}");
        let Some(ours) = taken.over(own, kind, base) else { continue };
        for other in [LEVELS, COMPAT, LEGACY, SET, USER] {
            // what is dropped costs less than to be sent
            if kind == "dropped" && other == LEVELS {
                continue;
            }
            let Some(theirs) = taken.over(other, kind, base) else { continue };
            let target = match (kind, other) {
                ("undecided" | "direct", LEVELS) => Target::RatioAtMost(0.6),
                ("proxied", LEVELS) => Target::RatioAtMost(1.0),
                _ => Target::None,
            };
            report.beside(&figure, &ours, "ns", (other, &theirs), target);
        }
    }
    for (own, other, name) in [(OURS, OTHER, ""), (MANY, OTHER_MANY, ", 30 pairs")] {
        for kind in KINDS {
            let both = [own, other].map(|way| taken.over(way, kind, &conntrack));
            if let [Some(ours), Some(theirs)] = both {
                let figure = format!("packet, {kind}{name}, over (b)");
                report.beside(figure, &ours, "ns", (OTHER, &theirs), Target::None);
                let [ours, theirs] = [own, other].map(|way| taken.of(way, kind).cloned());
                let more = ours.iter().flatten().zip(theirs.iter().flatten());
                let more: Vec<f64> = more.map(|(own, other)| own - other).collect();
                let figure = format!("packet, {kind}{name}, more than {OTHER}");
                report.alone(figure, more, "ns", Target::None);
            }
        }
    }
}

/// The measure for what a rule adds to a packet: one rule that looks its cgroup up, by hand.
struct LookUp {
    cgroup: PathBuf,
    with: String,
    samples: [Vec<f64>; 2],
}

impl LookUp {
    const NAME: &str = "one look-up of a cgroup, more";

    fn new(ground: &Ground) -> LookUp {
        ground.cgroup("/drop");
        let cgroup = ground.cgroup("/undecided/b");
        LookUp { cgroup, with: look_up(ground), samples: [Vec::new(), Vec::new()] }
    }

    fn take(&mut self) {
        for (script, into) in [CONNTRACK, &self.with].into_iter().zip(&mut self.samples) {
            let _table = Table::script(script);
            into.push(flood(&self.cgroup));
        }
    }

    fn more(&self) -> Vec<f64> {
        more(&self.samples[1], &self.samples[0])
    }
}

/// What it costs to count each cgroup.
pub fn counters(report: &mut Report) {
    let ground = Ground::new("counters").expect("root");
    sink(&ground);
    let _proxy = full_proxy();
    let configs = ["target", "cgroup"].map(|what| {
        let root = ground.root.display();
        format!("[global]\ncounters = {what}\ncgroup-root = {root}\n{COUNTED}")
    });
    let counted = [("direct", "/proxied/b/c/d/direct"), ("proxied", "/proxied/b/c/d/e")];
    let counted = counted.map(|(kind, path)| (kind, ground.cgroup(path)));
    // by what is counted, then by kind
    let mut samples = [const { [const { Vec::new() }; 2] }; 2];
    for _ in 0..sized(9, 21) {
        go_on();
        for (config, into) in configs.iter().zip(&mut samples) {
            let _table = Table::ours(&ground, config);
            for ((_, cgroup), into) in counted.iter().zip(into) {
                into.push(flood(cgroup));
            }
        }
    }
    let [off, on] = &samples;
    for ((kind, _), (off, on)) in counted.iter().zip(off.iter().zip(on)) {
        let name = format!("packet, {kind}, counters = cgroup");
        report.beside(&name, on, "ns", ("= target", off), Target::None);
        report.alone(name + ", more", more(on, off), "ns", Target::None);
    }
}

/// Round by round.
fn more(with: &[f64], without: &[f64]) -> Vec<f64> {
    with.iter().zip(without).map(|(with, without)| with - without).collect()
}

/// A host behind this one: its network namespace.
fn client_of(ground: &Ground) -> File {
    let namespace = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare the network");
        this_network()
    });
    let namespace = namespace.join().expect("a namespace");
    sysctl("net/ipv4/ip_forward", "1");
    let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    ip_batch(
        &[],
        &format!(
            "link add lan0 type veth peer name eth0 address 02:00:00:00:01:10 netns {path}\n\
             link set lan0 address 02:00:00:00:01:00\n\
             addr add 198.51.100.1/24 dev lan0\n\
             link set lan0 up\n"
        ),
    );
    ground.within(&namespace, || {
        ip_batch(
            &[],
            "link set lo up\n\
             addr add 198.51.100.10/24 dev eth0\n\
             link set eth0 up\n\
             neigh add 198.51.100.1 lladdr 02:00:00:00:01:00 dev eth0\n\
             route add default via 198.51.100.1\n",
        );
    });
    namespace
}

/// What is routed for others: by no section, and to a proxy.
pub fn forwarded(report: &mut Report) {
    let ground = Ground::new("forward").expect("root");
    DECIDED.iter().for_each(|path| drop(ground.cgroup(path)));
    let client = client_of(&ground);
    sink(&ground);
    let _proxy = full_proxy();
    let client = || ground.within(&client, || flood(&ground.root));
    let section = format!("{CONFIG}[gateway lan]\ninterface = lan0\ntarget = mihomo\n");
    let configs = [("by no section", CONFIG, CONNTRACK), ("to the proxy", &section, FORWARD_BARE)];
    let other = other_build();
    let mut samples = [const { [const { Vec::new() }; 3] }; 2];
    for _ in 0..sized(9, 21) {
        go_on();
        for ((_, config, bare), [ours, least, before]) in configs.iter().zip(&mut samples) {
            let table = Table::script(bare);
            least.push(client());
            drop(table);
            if let Some(path) = &other {
                let _table = Table::of_build(path, &ground, config);
                before.push(client());
            }
            let _table = Table::ours(&ground, config);
            ours.push(client());
        }
    }
    for ((name, ..), [ours, least, before]) in configs.iter().zip(&samples) {
        let figure = format!("packet, forwarded {name}");
        let reference = match *name {
            "to the proxy" => "one rule that hands it over",
            _ => "conntrack only",
        };
        report.beside(&figure, ours, "ns", (reference, least), Target::None);
        report.alone(format!("{figure}, more"), more(ours, least), "ns", Target::None);
        if !before.is_empty() {
            report.beside(&figure, ours, "ns", (OTHER, before), Target::None);
        }
    }
}

/// New connections a second, and how often a byte goes there and back, on one processor.
pub fn streams(report: &mut Report) {
    let _pinned = Pinned::new();
    let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    let echoes = |ground: &Ground| {
        [ground.outside(|| Echo::start(any(SOURCE_PORT))), Echo::start(any(PROXY_PORT))]
    };
    let apart = Ground::new("legacy").expect("root");
    let namespace = this_network();
    let _apart_echoes = echoes(&apart);
    let ground = Ground::new("streams").expect("root");
    let _echoes = echoes(&ground);
    let cgroups = senders(&ground);
    DECIDED.iter().for_each(|path| drop(ground.cgroup(path)));
    let to = addr(REMOTE4, SOURCE_PORT);
    let mut taken = Taken::default();
    let all = |taken: &mut Taken, way: &str, kinds: &[usize]| {
        for kind in kinds {
            let rate = |nanoseconds: f64| 1e9 / nanoseconds;
            taken.take(&format!("{way} new"), KINDS[*kind], rate(connects(&cgroups[*kind], to)));
            taken.take(
                &format!("{way} trip"),
                KINDS[*kind],
                rate(round_trips(&cgroups[*kind], to)),
            );
        }
    };
    const LEAST: &str = "none classified";
    let mut xtables: Vec<_> = [(COMPAT, Xtables::Nft), (LEGACY, Xtables::Legacy)].into();
    for _ in 0..sized(9, 21) {
        go_on();
        for (way, script, kinds) in [
            (LEAST, CONNTRACK.to_string(), &[1][..]),
            (LEAST, BARE.to_string(), &[2]),
            (LEVELS, six_levels(&ground), &[1, 2]),
        ] {
            let _table = Table::script(&script);
            all(&mut taken, way, kinds);
        }
        xtables.retain(|(way, which)| {
            let mut measure = || {
                let _table = Table::like_cgproxy(*which, &ground)?;
                all(&mut taken, way, &[1, 2]);
                Ok::<(), String>(())
            };
            let done = match which {
                Xtables::Legacy => ground.within(&namespace, measure),
                Xtables::Nft => measure(),
            };
            done.map_err(|reason| report.skip(way, &reason)).is_ok()
        });
        let _table = Table::ours(&ground, CONFIG);
        all(&mut taken, OURS, &[1, 2]);
    }
    for (what, name) in [("new", "TCP connects"), ("trip", "round trips of a byte")] {
        for kind in ["direct", "proxied"] {
            let Some(ours) = taken.of(&format!("{OURS} {what}"), kind) else { continue };
            for way in [LEAST, LEVELS, COMPAT, LEGACY] {
                let Some(theirs) = taken.of(&format!("{way} {what}"), kind) else { continue };
                let target = match way {
                    LEVELS => Target::RatioAtLeast(0.95),
                    _ => Target::None,
                };
                report.beside(format!("{name}, {kind}"), ours, "/s", (way, theirs), target);
            }
        }
    }
}

/// What a line for a user adds to packets, his own and others'. The sender is root.
pub fn user_line(report: &mut Report) {
    let ground = Ground::new("user").expect("root");
    let cgroups =
        ["/free/b", "/proxied/first/b", "/proxied/second/b"].map(|path| ground.cgroup(path));
    sink(&ground);
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
    let mut look_up = LookUp::new(&ground);
    for _ in 0..sized(9, 21) {
        go_on();
        look_up.take();
        for (config, into) in configs.iter().zip(&mut taken) {
            let table = Table::ours(&ground, config);
            for (cgroup, into) in cgroups.iter().zip(into) {
                into.push(flood(cgroup));
            }
            drop(table);
        }
    }
    let [without, others, own, between] = &taken;
    let most = Target::RatioAtMost(1.3);
    for (name, with, at, target) in [
        ("undecided, another user's line", others, 0, most),
        ("direct behind another user's line", others, 2, most),
        ("undecided, direct by the user's line", own, 0, most),
        ("direct by the user's line, in a cgroup", own, 2, most),
        ("direct before another user's line", between, 1, most),
        ("direct behind that, in a set of its own", between, 2, Target::None),
    ] {
        let reference = (LookUp::NAME, look_up.more());
        let more = more(&with[at], &without[at]);
        report.beside(format!("packet, {name}, more"), more, "ns", reference, target);
    }
}

/// What ports and destinations of a target cost its packets, and those of others: nothing.
pub fn destinations(report: &mut Report) {
    let ground = Ground::new("destinations").expect("root");
    let [others, own] = ["undecided", "proxied"].map(|kind| ground.cgroup(&format!("/{kind}/b")));
    sink(&ground);
    let _proxy = full_proxy();
    let list = |count| {
        let file = ground.dir.join(format!("{count}.txt"));
        write_private(&file, &prefixes(count));
        format!("bypass-file = {}\n", file.display())
    };
    let most = Target::RatioAtMost(1.3);
    let kinds = [
        ("a port list", "udp-ports = 1-79 443 8000-8999\n".to_string(), most),
        ("quic = reject", "quic = reject\n".to_string(), most),
        ("100 prefixes", list(100), Target::None),
        ("10000 prefixes", list(10_000), most),
        ("100000 prefixes", list(100_000), Target::None),
    ];
    let config = |lines: &str| CONFIG.replace("port = 7893\n", &format!("port = 7893\n{lines}"));
    let mut plain = [const { Vec::new() }; 2];
    let mut with = [const { [const { Vec::new() }; 2] }; 5];
    let measure = |lines: &str, into: &mut [Vec<f64>; 2]| {
        let table = Table::ours(&ground, &config(lines));
        for (cgroup, into) in [&others, &own].into_iter().zip(into) {
            into.push(flood(cgroup));
        }
        drop(table);
    };
    let mut look_up = LookUp::new(&ground);
    for _ in 0..sized(9, 21) {
        go_on();
        look_up.take();
        measure("", &mut plain);
        for ((_, lines, _), into) in kinds.iter().zip(&mut with) {
            measure(lines, into);
        }
    }
    for ((name, _, target), with) in kinds.into_iter().zip(&with) {
        for (of, (plain, with)) in ["undecided", "proxied"].iter().zip(plain.iter().zip(with)) {
            let target = if *of == "proxied" { target } else { Target::None };
            let reference = ("without", plain);
            let figure = format!("packet, {of}, {name}");
            report.beside(&figure, with, "ns", reference, Target::None);
            let reference = (LookUp::NAME, look_up.more());
            report.beside(figure + ", more", more(with, plain), "ns", reference, target);
        }
    }
}

/// What leaves by a route, beside the same by rules that a person would write for that alone: a mark,
/// which has the kernel look for the way once more, and the source address that goes with it. And
/// what packets of others pay for there being one: nothing.
pub fn route(report: &mut Report) {
    let ground = Ground::new("route").expect("root");
    let [others, own] = ["undecided", "vpn"].map(|kind| ground.cgroup(&format!("/{kind}/b")));
    sink(&ground);
    let plain = "[rules]\ndrop = /drop\n";
    let ours = "[route vpn]\ninterface = in0\ngateway = 192.0.2.2\n[rules]\nvpn = /vpn\n";
    let by_hand = by_a_route_of_hand(&ground, "in0");
    let ways = format!(
        "rule add pref 90 fwmark 0x01000000/0xff000000 lookup {TABLE_BY_HAND}\n\
         route add default via 192.0.2.2 dev in0 table {TABLE_BY_HAND}\n"
    );
    let mut undecided = [const { Vec::new() }; 2];
    let mut routed = [const { Vec::new() }; 3];
    let mut look_up = LookUp::new(&ground);
    for _ in 0..sized(9, 21) {
        go_on();
        look_up.take();
        let table = Table::ours(&ground, &plain.replace("/drop", "/elsewhere"));
        undecided[0].push(flood(&others));
        routed[0].push(flood(&own));
        drop(table);
        load(&by_hand);
        ip_batch(&["-4"], &ways);
        routed[1].push(flood(&own));
        ip_batch(&["-4"], &ways.replace(" add ", " del "));
        assert!(crate::kernel::nft(&["flush", "ruleset"], "").status.success());
        let table = Table::ours(&ground, &format!("{ours}drop = /elsewhere\n"));
        undecided[1].push(flood(&others));
        routed[2].push(flood(&own));
        drop(table);
    }
    let [without, with] = &undecided;
    let name = "packet, undecided, beside a route";
    report.beside(name, with, "ns", ("without a route", without), Target::RatioAtMost(1.05));
    let [direct, by_hand, ours] = &routed;
    let reference = ("by hand", more(by_hand, direct));
    report.beside(
        "packet, by a route, over direct",
        more(ours, direct),
        "ns",
        reference,
        Target::None,
    );
    let name = "packet, by a route, over rules by hand";
    let reference = (LookUp::NAME, look_up.more());
    report.beside(name, more(ours, by_hand), "ns", reference, Target::RatioAtMost(1.3));
}

/// What a packet of a TCP flow that is known passes where anything is held, of a datagram.
const KNOWN_TCP: &str = "meta l4proto != udp drop\nct state invalid,untracked drop\n";

/// What `hold` costs packets: of TCP flows that are known, and all others below the held cgroup, some
/// levels deeper, and elsewhere.
pub fn hold(report: &mut Report) {
    let ground = Ground::new("hold").expect("root");
    let kinds = ["right below", "four below", "elsewhere"];
    let cgroups = ["/held/b", "/held/b/c/d/e", "/free/b"].map(|path| ground.cgroup(path));
    sink(&ground);
    let configs = [CONFIG.to_string(), format!("[global]\nhold = /held\n{CONFIG}")];
    let known = "ct state invalid accept\n";
    let scripts = [
        CONNTRACK.to_string(),
        CONNTRACK.replace("ct state invalid accept\n", &format!("{known}{KNOWN_TCP}")),
    ];
    let mut look_up = LookUp::new(&ground);
    // without and with, by cgroup
    let mut taken = [const { [const { Vec::new() }; 3] }; 2];
    let mut tcp = [const { Vec::new() }; 2];
    for _ in 0..sized(9, 21) {
        go_on();
        look_up.take();
        for which in [0, 1] {
            let table = Table::ours(&ground, &configs[which]);
            for (cgroup, into) in cgroups.iter().zip(&mut taken[which]) {
                into.push(flood(cgroup));
            }
            drop(table);
            let _table = Table::script(&scripts[which]);
            tcp[which].push(flood(&cgroups[2]));
        }
    }
    let name = "packet, hold, known TCP flow, more";
    let reference = (LookUp::NAME, look_up.more());
    report.beside(name, more(&tcp[1], &tcp[0]), "ns", reference, Target::RatioAtMost(0.6));
    for (at, kind) in kinds.iter().enumerate() {
        // below a held cgroup each level is asked for
        let most = if *kind == "elsewhere" { Target::RatioAtMost(2.5) } else { Target::None };
        let reference = (LookUp::NAME, look_up.more());
        let name = format!("packet, hold, {kind}, more");
        report.beside(name, more(&taken[1][at], &taken[0][at]), "ns", reference, most);
    }
}

/// What a user who was given a directory can cost everybody: a packet that no rule decides, beside
/// cgroups below `/delegated` that a rule with `.*` matches at as many levels as can be.
pub fn nested_levels(report: &mut Report) {
    const LEVELS: usize = 240;
    let ground = Ground::new("nested").expect("root");
    let undecided = ground.cgroup("/undecided/b/c/d/e");
    sink(&ground);
    let config = format!("{CONFIG}mihomo = /delegated/.*app\n");
    DECIDED.iter().for_each(|path| drop(ground.cgroup(path)));
    let deep: Vec<String> =
        (1..=LEVELS).map(|n| format!("/delegated{}/app", "/x".repeat(n))).collect();
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..sized(5, 15) {
        go_on();
        for (paths, into) in [(&[][..], &mut alone), (&deep, &mut beside)] {
            for path in paths {
                ground.cgroup(path);
            }
            let table = Table::ours(&ground, &config);
            into.push(flood(&undecided));
            drop(table);
            crate::ground::remove_tree(&ground.at("/delegated"));
        }
    }
    let name = format!("packet, undecided, {LEVELS} levels of a user");
    report.beside(name, &beside, "ns", ("without", &alone), Target::RatioAtMost(1.1));
}

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
        let reference = ("the reference table", &theirs);
        let figure = format!("proxied throughput, {streams} streams");
        report.beside(figure, &ours, "Gbit/s", reference, Target::RatioAtLeast(0.97));
    }
}
