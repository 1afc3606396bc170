//! Every message that we build is the one that libnftnl or iproute2 would send for the same object,
//! byte by byte, header included.
#![cfg(target_env = "gnu")]

#[path = "encode/libnftnl.rs"]
mod libnftnl;
#[path = "encode/routing.rs"]
mod routing;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use cgtproxy::cgroup::core::{Delta, Snapshot};
use cgtproxy::cgroup::gates::Gate;
use cgtproxy::cgroup::holds::HoldElement;
use cgtproxy::cgroup::tally::Change;
use cgtproxy::config::{self, Config, Outcome, Source};
use cgtproxy::net::{Family, Interface, Mac, Mark, Owner, Range, L4};
use cgtproxy::netlink::{msg::Batch, uapi};
use cgtproxy::nft::expr::{Expr, SetRef, Verdict};
use cgtproxy::nft::message::{self, Present, Transaction};
use cgtproxy::nft::stmt::{cgroup_hash, Stmt};
use cgtproxy::nft::table::{
    classifying, dying_name, hold_rules, hold_sets, set_name, Base, Chain, Content, Holding, Pair,
    Set, Shape, Table, DEEDS, HOLD, OUTPUT,
};
use cgtproxy::plan;
use libnftnl::Reference;
use mnl::mnl_sys::{mnl_nlmsg_next, mnl_nlmsg_ok};

/// A sequence number that is not small, so that all of its bytes are compared.
const SEQ: u32 = 0x1234_5678;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Cuts a batch into its messages, the way libmnl does.
fn messages(batch: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    let mut rest = batch.len() as i32;
    let mut nlh: *const libc::nlmsghdr = batch.as_ptr().cast();
    // SAFETY: mnl_nlmsg_ok() says whether `rest`, which is what `nlh` has before it, holds a message
    unsafe {
        while mnl_nlmsg_ok(nlh, rest) {
            let at = batch.len() - rest as usize;
            found.push(&batch[at..at + (*nlh).nlmsg_len as usize]);
            nlh = mnl_nlmsg_next(nlh, &mut rest);
        }
    }
    assert_eq!(rest, 0, "a message that libmnl does not accept");
    found
}

/// Builds the same transaction with both encoders and holds one against the other.
fn same(what: &str, ours: impl FnOnce(&mut Transaction), theirs: impl FnOnce(&mut Reference)) {
    let mut transaction = Transaction::new(Batch::new(SEQ));
    ours(&mut transaction);
    same_batch(what, transaction, theirs);
}

fn same_batch(what: &str, ours: Transaction, theirs: impl FnOnce(&mut Reference)) {
    let mut reference = Reference::new(SEQ);
    theirs(&mut reference);
    let reference = reference.finish();
    let (batch, acknowledged) = ours.finish();
    assert_eq!(acknowledged, SEQ + reference.len() as u32 - 1, "{what}");
    let ours = messages(batch.bytes());
    for (n, (ours, theirs)) in ours.iter().zip(&reference).enumerate() {
        let kind = ours[4];
        if let Some(at) = (0..theirs.len()).find(|at| ours.get(*at) != Some(&theirs[*at])) {
            let (ours, theirs) = (hex(ours), hex(theirs));
            panic!(
                "{what}: message {n} of type {kind}, byte {at}\n  ours {ours}\nlibnftnl {theirs}"
            );
        }
        assert_eq!(ours.len(), theirs.len(), "{what}: message {n} of type {kind}");
    }
    assert_eq!(ours.len(), reference.len(), "{what}: messages");
}

/// A table comes with its flags, and goes.
#[test]
fn tables() {
    // owner, and owner with persist
    for flags in [None, Some(0), Some(0x2), Some(0x6)] {
        let (kind, create) = (libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE);
        same(
            "new table",
            |ours| ours.table_of("cgtproxy", kind as u16, create as u16, flags, None),
            |theirs| theirs.table(kind, create, flags),
        );
    }
    same("no table", Transaction::remove_table, Reference::remove_table);
}

/// Chains of all kinds, hooks and priorities, with names of all lengths.
#[test]
fn chains() {
    let mut bases = vec![None];
    for kind in ["filter", "nat", "route"] {
        for hook in 0..libc::NF_INET_NUMHOOKS as u32 {
            bases.extend([-150, -100, 0, 300].map(|priority| Some(Base { kind, hook, priority })));
        }
    }
    for base in bases {
        // names of all lengths modulo 4
        for name in ["a", "to", "nat", "dns_", "prerouting", "tproxy_a-name-of-15-"] {
            let chain = Chain { name: name.into(), base, rules: Vec::new() };
            same(name, |ours| ours.chain(&chain), |theirs| theirs.chain(&chain));
        }
    }
}

/// Sets of all kinds, with ranges that begin and end where a family does.
#[test]
fn sets() {
    let v4 = |address: [u8; 4], length| Range::prefix(Ipv4Addr::from(address), length);
    let v6 = |address: &str, length| Range::prefix(address.parse::<Ipv6Addr>().unwrap(), length);
    let contents = [
        Content::V4(vec![]),
        Content::V4(vec![v4([203, 0, 113, 7], 32)]),
        Content::V4(vec![v4([0; 4], 0)]),
        Content::V4(vec![v4([0; 4], 8), v4([10, 0, 0, 0], 8), v4([255; 4], 32)]),
        Content::V6(vec![v6("2001:db8::", 32), v6("ff00::", 8)]),
        Content::V6(vec![v6("::", 0)]),
        // enough for three messages
        Content::V4((0..2000u32).map(|n| Range::prefix((n << 8).into(), 32)).collect()),
        Content::V6((0..900u128).map(|n| Range::prefix((n << 8).into(), 128)).collect()),
        Content::Cgroups { counters: false },
        Content::Cgroups { counters: true },
        Content::Hashes,
        Content::Ports(ports(&[(22, 22), (8000, 8999), (65535, 65535)])),
        Content::Ports(ports(&[(1, 1023), (8000, 65535)])),
    ];
    for content in contents {
        let set = Set { name: "a_set".into(), content };
        same("set", |ours| ours.set(&set), |theirs| theirs.set(&set));
    }
    // ids within the transaction go on counting
    let set = |name: &str| Set { name: name.into(), content: Content::V4(vec![v4([1; 4], 8)]) };
    same(
        "three sets",
        |ours| ["a", "b", "c"].iter().for_each(|name| ours.set(&set(name))),
        |theirs| ["a", "b", "c"].iter().for_each(|name| theirs.set(&set(name))),
    );
}

/// Elements come and go, however many.
#[test]
fn cgroups() {
    for count in [1, 2, 1000, 10_000] {
        // the id of a 32-bit kernel has a generation in its upper half
        let ids: Vec<u64> = (0..count).map(|n| 0x1_0000_0016 + n * 0x0101).collect();
        same(
            "elements come",
            |ours| ours.add_cgroups("cg_mihomo", ids.iter().copied()),
            |theirs| theirs.add_cgroups("cg_mihomo", &ids),
        );
        same(
            "elements go",
            |ours| ours.delete_cgroups("cg_drop", ids.iter().copied()),
            |theirs| theirs.delete_cgroups("cg_drop", &ids),
        );
    }
}

/// Numbers that reach both encoders through our types, so that the bytes would not show a wrong one.
#[test]
fn numbers() {
    macro_rules! same {
        ($($name:ident)+) => {
            $(assert_eq!(i64::from(uapi::$name), i64::from(libc::$name), stringify!($name));)+
        };
    }
    same!(
        NFT_META_IIFNAME NFT_META_IIFTYPE NFT_PAYLOAD_LL_HEADER NF_INET_LOCAL_IN NF_IP_PRI_SECURITY
        NFT_META_MARK NFT_META_IIF NFT_META_OIF NFT_META_SKUID NFT_META_SKGID NFT_META_NFPROTO NFT_META_L4PROTO
        NFT_CT_STATE NFT_CT_DIRECTION NFT_CT_STATUS NFT_CT_MARK NFT_CMP_EQ NFT_CMP_NEQ NFT_CMP_LTE NFT_CMP_GTE NFT_REG_1
        NFT_REG_2 NFT_PAYLOAD_NETWORK_HEADER NFT_PAYLOAD_TRANSPORT_HEADER NFPROTO_IPV4 NFPROTO_IPV6
        NF_INET_PRE_ROUTING NF_INET_LOCAL_OUT NF_INET_POST_ROUTING NF_IP_PRI_MANGLE
        NF_IP_PRI_NAT_DST IPPROTO_TCP IPPROTO_UDP IPPROTO_ICMPV6
    );
}

/// Samples of every statement. One list serves as a `match` too, so that a new variant does not
/// compile until there is a line for it here.
macro_rules! samples {
    ($($variant:pat => $($sample:expr),+;)+) => {
        fn samples() -> Vec<Stmt> {
            fn of(stmt: &Stmt) -> &'static str {
                match stmt { $($variant => stringify!($variant)),+ }
            }
            let samples = vec![$($((stringify!($variant), $sample)),+),+];
            samples.iter().for_each(|(variant, sample)| assert_eq!(*variant, of(sample)));
            samples.into_iter().map(|(_, sample)| sample).collect()
        }
    };
}

const A_MARK: Mark = Mark { value: 0x0123_0000, mask: 0x0fff_0000 };

fn map(verdicts: &[Verdict]) -> Vec<(u32, Verdict)> {
    (1..).map(|n| n << 24).zip(verdicts.iter().cloned()).collect()
}

fn ports(ranges: &[(u16, u16)]) -> Vec<Range<u16>> {
    ranges.iter().map(|(first, last)| Range { first: *first, last: *last }).collect()
}

fn jump() -> Verdict {
    Verdict::Jump("bypass".into())
}

fn goto() -> Verdict {
    Verdict::Goto("to_mihomo".into())
}

samples! {
    Stmt::IifLo => Stmt::IifLo;
    Stmt::NotIifLo => Stmt::NotIifLo;
    Stmt::OifLo => Stmt::OifLo;
    Stmt::CgroupHash { .. } => Stmt::CgroupHash { level: 1, set: "dying_a".into() },
        Stmt::CgroupHash { level: 255, set: "dying_direct".into() };
    Stmt::Cgroup { .. } => Stmt::Cgroup { level: 1, set: "cg_a".into() },
        Stmt::Cgroup { level: 255, set: "cg_direct".into() };
    Stmt::OtherCgroup { .. } => Stmt::OtherCgroup { level: 2, set: "known".into() };
    Stmt::Iifname(_) =>
        Stmt::Iifname(Interface { name: "br-lan".into(), prefix: false }),
        Stmt::Iifname(Interface { name: "br-".into(), prefix: true }),
        Stmt::Iifname(Interface { name: "fifteen-letters".into(), prefix: false });
    Stmt::Oifname(_) =>
        Stmt::Oifname(Interface { name: "wg0".into(), prefix: false }),
        Stmt::Oifname(Interface { name: "wg".into(), prefix: true }),
        Stmt::Oifname(Interface { name: "fifteen-letters".into(), prefix: false });
    Stmt::Transparent => Stmt::Transparent;
    Stmt::NotTransparent => Stmt::NotTransparent;
    Stmt::Bound => Stmt::Bound;
    Stmt::HasOwner => Stmt::HasOwner;
    Stmt::Owner(_) => Stmt::Owner(Owner::Users(0, 0)), Stmt::Owner(Owner::Users(65534, 65534)),
        Stmt::Owner(Owner::Users(1000, 1999)), Stmt::Owner(Owner::Groups(5, 5)),
        Stmt::Owner(Owner::Groups(0, u32::MAX - 1));
    Stmt::NotUid(_) => Stmt::NotUid(65534);
    Stmt::PacketMark(_) => Stmt::PacketMark(A_MARK);
    Stmt::NotPacketMark(_) => Stmt::NotPacketMark(A_MARK);
    Stmt::CtMark(_) => Stmt::CtMark(A_MARK);
    Stmt::NotCtMark(_) => Stmt::NotCtMark(A_MARK);
    Stmt::CtMarked(_) => Stmt::CtMarked(0xff00_0000);
    Stmt::Original => Stmt::Original;
    Stmt::Reply => Stmt::Reply;
    Stmt::New => Stmt::New;
    Stmt::Invalid => Stmt::Invalid;
    Stmt::Unheard => Stmt::Unheard;
    Stmt::Heard => Stmt::Heard;
    Stmt::Unconfirmed => Stmt::Unconfirmed;
    Stmt::Confirmed => Stmt::Confirmed;
    Stmt::Fresh => Stmt::Fresh;
    Stmt::Dnatted => Stmt::Dnatted;
    Stmt::NotDnatted => Stmt::NotDnatted;
    Stmt::Destination { .. } => Stmt::Destination { family: Family::V4, set: "bypass4".into() },
        Stmt::Destination { family: Family::V6, set: "bypass6".into() };
    Stmt::OtherDestination { .. } =>
        Stmt::OtherDestination { family: Family::V4, set: "only4_a".into() },
        Stmt::OtherDestination { family: Family::V6, set: "only6_a".into() };
    Stmt::Dscp(..) => Stmt::Dscp(Family::V4, 46), Stmt::Dscp(Family::V6, 46);
    Stmt::Source { .. } => Stmt::Source { family: Family::V4, set: "gw4_a".into() },
        Stmt::Source { family: Family::V6, set: "gw6_a".into() };
    Stmt::EtherSource(_) => Stmt::EtherSource(vec![Mac([2, 0, 0, 0, 0, 1])]),
        Stmt::EtherSource(vec![Mac([2, 0, 0, 0, 0, 1]), Mac([2, 0, 0, 0, 0, 2])]);
    Stmt::Nfproto(_) => Stmt::Nfproto(Family::V4), Stmt::Nfproto(Family::V6);
    Stmt::L4proto(_) => Stmt::L4proto(L4::Tcp), Stmt::L4proto(L4::Udp);
    Stmt::NotL4proto(_) => Stmt::NotL4proto(L4::Tcp), Stmt::NotL4proto(L4::Udp);
    Stmt::GoesOn => Stmt::GoesOn;
    Stmt::Begins => Stmt::Begins;
    Stmt::Asks => Stmt::Asks;
    Stmt::IsReset => Stmt::IsReset;
    Stmt::TcpOrUdp => Stmt::TcpOrUdp;
    Stmt::NotTcpOrUdp => Stmt::NotTcpOrUdp;
    Stmt::Dport(..) => Stmt::Dport(L4::Tcp, 53), Stmt::Dport(L4::Udp, 53);
    Stmt::OtherDports(..) => Stmt::OtherDports(L4::Udp, vec![443]),
        Stmt::OtherDports(L4::Tcp, vec![80, 443]);
    Stmt::OutOfPorts { .. } => Stmt::OutOfPorts { l4: L4::Tcp, set: "tcp_a".into() };
    Stmt::NotDport(_) => Stmt::NotDport(53);
    Stmt::Local => Stmt::Local;
    Stmt::ForeignSource => Stmt::ForeignSource;
    Stmt::LeadsTo(_) => Stmt::LeadsTo(Interface { name: "docker0".into(), prefix: false }),
        Stmt::LeadsTo(Interface { name: "br-".into(), prefix: true });
    Stmt::LeadsBack => Stmt::LeadsBack;
    Stmt::ComesAstray => Stmt::ComesAstray;
    Stmt::SourceOfOther => Stmt::SourceOfOther;
    Stmt::ComesFromElsewhere(_) => Stmt::ComesFromElsewhere("wg0".into());
    Stmt::Broadcast => Stmt::Broadcast;
    Stmt::NeighbourDiscovery => Stmt::NeighbourDiscovery;
    Stmt::Counter => Stmt::Counter;
    Stmt::SetCtMark(_) => Stmt::SetCtMark(A_MARK);
    Stmt::SetPacketMark(_) => Stmt::SetPacketMark(A_MARK);
    Stmt::Tproxy { .. } =>
        Stmt::Tproxy { family: None, address: None, port: 7893 },
        Stmt::Tproxy { family: Some(Family::V4), address: None, port: 7893 },
        Stmt::Tproxy {
            family: Some(Family::V4),
            address: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            port: 1,
        },
        Stmt::Tproxy {
            family: Some(Family::V6),
            address: Some(IpAddr::V6(Ipv6Addr::LOCALHOST)),
            port: 65535,
        };
    Stmt::Dnat(_) => Stmt::Dnat("127.0.0.1:1053".parse().unwrap()),
        Stmt::Dnat("[2001:db8::1]:53".parse().unwrap());
    Stmt::Snat(_) => Stmt::Snat(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        Stmt::Snat(IpAddr::V6(Ipv6Addr::LOCALHOST));
    Stmt::ToNet(..) => Stmt::ToNet(Ipv4Addr::new(127, 0, 0, 0).into(), 8),
        Stmt::ToNet(Ipv4Addr::new(224, 0, 0, 0).into(), 4),
        Stmt::ToNet(Ipv4Addr::new(169, 254, 0, 0).into(), 16),
        Stmt::ToNet("ff00::".parse().unwrap(), 8), Stmt::ToNet("fe80::".parse().unwrap(), 10);
    Stmt::NotLinkLocal => Stmt::NotLinkLocal;
    Stmt::SnatToDestination(_) => Stmt::SnatToDestination(Family::V4),
        Stmt::SnatToDestination(Family::V6);
    Stmt::Masquerade => Stmt::Masquerade;
    Stmt::Redirect(_) => Stmt::Redirect(1053);
    Stmt::Reset => Stmt::Reset;
    Stmt::Unreachable => Stmt::Unreachable;
    Stmt::PacketMarkMap { .. } => Stmt::PacketMarkMap { mask: 0xff00_0000, map: map(&[goto()]) };
    Stmt::CtMarkMap { .. } => Stmt::CtMarkMap {
        mask: 0xff00_0000,
        map: map(&[goto(), jump(), Verdict::Accept, Verdict::Drop]),
    };
    Stmt::Verdict(_) => Stmt::accept(), Stmt::drop(), Stmt::back(), Stmt::Verdict(jump()), Stmt::Verdict(goto());
}

/// Each statement by itself, and all of them in one rule.
#[test]
fn statements() {
    for stmt in samples() {
        let what = stmt.to_string();
        let rule = vec![stmt];
        same(&what, |ours| ours.rule("a_chain", &rule), |theirs| theirs.rule("a_chain", &rule));
    }
    // all of them at once: several anonymous sets in one rule
    let rule = samples();
    same("all", |ours| ours.rule("output", &rule), |theirs| theirs.rule("output", &rule));
    same("no rules", |ours| ours.replace_rules(OUTPUT, &[]), |theirs| theirs.flush(Some(OUTPUT)));
}

/// The reader knows what the writer writes.
#[test]
fn instructions_read_back() {
    for stmt in samples() {
        let mut exprs = Vec::new();
        stmt.lower(&mut exprs);
        for mut expr in exprs {
            let mut batch = Batch::new(SEQ);
            expr.write(&mut batch);
            // an anonymous set goes by a name in rules
            if let Expr::Lookup { set, .. } | Expr::LookupVerdict { set, .. } = &mut expr {
                if let SetRef::Anonymous(content) = &set {
                    *set = SetRef::Named(content.name().into());
                }
            }
            assert_eq!(Expr::read(batch.bytes()), Some(expr), "{stmt}");
        }
    }
}

/// The request for our table.
#[test]
fn dump_request() {
    let mut batch = Batch::new(SEQ - 1);
    message::get_table(&mut batch);
    assert_eq!(hex(batch.bytes()), hex(&libnftnl::get_table(SEQ)));
}

/// A configuration in memory.
struct Text(String);

impl Source for Text {
    fn read(&self, _: &Path) -> Result<String, String> {
        Ok(self.0.clone())
    }
}

fn load(text: &str) -> Config {
    let problems = |problems: Vec<config::Problem>| -> Config {
        panic!("{}", problems.iter().map(|p| format!("{p}\n")).collect::<String>())
    };
    config::load(&Text(text.into()), Path::new("test.conf")).unwrap_or_else(problems)
}

const CONFIGS: [&str; 8] = [
    "",
    "[tproxy a]\nport = 1",
    "[global]\ndefault = drop",
    "[global]\ndefault = drop\n[tproxy a]\nport = 1\ntcp = drop\nudp = no\nipv6 = no",
    "[global]
     default = mihomo
     counters = cgroup
     bypass = private
     bypass = 2001:db8::/32
     bypass-mark = 0xff
     bypass-mark = 0x10/0xf0
     bypass-user = 65534
     [tproxy mihomo]
     port = 7893
     address = 127.0.0.1
     dns-hijack = 127.0.0.1:1053
     dns-hijack = [::1]:1053
     dns-hijack-tcp = yes
     [tproxy b-2]
     port = 7894
     address = ::1
     ipv4 = drop
     dns-hijack = 203.0.113.53
     [tproxy c_3]
     port = 7895
     address = 127.0.0.3
     address = ::1
     dns-hijack = 2001:db8::53",
    "[tproxy a]
     port = 1
     dns-hijack = 127.0.0.1:1053
     dns-hijack = [::1]:1053
     dns-hijack-local = yes
     [tproxy b]
     port = 2
     udp = no
     dns-hijack = 203.0.113.53
     [gateway lan]
     interface = br-lan
     interface = wg*
     source = 198.51.100.0/24
     source = 2001:db8::/32
     source-mac = 02:00:00:00:00:01
     source-mac = 02:00:00:00:00:02
     target = a
     [gateway b]
     interface = eth1
     target = b
     [gateway drop]
     interface = eth2
     target = drop
     [gateway direct]
     interface = eth3
     target = direct",
    "[tproxy a]
     port = 1
     dns-hijack = 127.0.0.1:1053
     [rules]
     drop = /first
     direct = user:1000-1999,7
     a = /x
     a = group:5-9
     drop = user:8
     direct = /y
     drop = group:10
     [gateway lan]
     interface = br-lan
     target = a",
    "[global]
     hold = /x
     hold = /y/.*
     [tproxy a]
     port = 1
     dns-hijack = 127.0.0.1:1053
     dns-hijack-local = yes",
];

fn configs() -> Vec<Config> {
    let many = |n: usize| -> String {
        (0..n).map(|n| format!("[tproxy t{n}]\nport = {}\n", 1000 + n)).collect()
    };
    let bypass: String = (0..3000)
        .map(|n| format!("bypass = 198.{}.{}.{}\n", n / 200, n % 200, n % 3 * 100))
        .collect();
    // verdict maps and intervals of more than one message
    let long = [
        format!("[global]\nfwmark-mask = 0x000fff00\n{}", many(700)),
        format!("[global]\n{bypass}"),
    ];
    CONFIGS.into_iter().chain(long.iter().map(|text| &**text)).map(load).collect()
}

/// Some cgroups for every outcome.
fn snapshot(config: &Config) -> Snapshot {
    let outcomes: Vec<Outcome> = config.outcomes().collect();
    let ids = |n: usize| (1..=1 + n as u64 * 700).map(|id| id << 8 | n as u64).collect();
    let levels = |outcome: &Outcome| {
        let levels = [(2, false, false), (3, false, false), (3, true, false), (7, true, true)];
        levels.map(|(level, hashed, loose)| Pair { level, outcome: *outcome, hashed, loose })
    };
    let hashes = |n: usize| (1..=n as u32 * 70).map(|hash| hash << 8 | n as u32).collect();
    Snapshot {
        dying: outcomes.iter().take(3).enumerate().map(|(n, o)| (*o, hashes(n))).collect(),
        elements: outcomes.iter().take(6).enumerate().map(|(n, o)| (*o, ids(n))).collect(),
        gates: gates(),
        held: if config.holds.is_empty() { Vec::new() } else { held() },
        shape: Shape {
            base: 1,
            pairs: outcomes.iter().flat_map(levels).collect(),
            hashed: [0].into(),
            holding: Some(Holding { all: false, roots: [1, 3].into(), last: 12, deepest: 13 }),
        },
    }
}

fn gates() -> Vec<Gate> {
    let ids = (1..900).map(|id| Gate::new(0, id, false));
    ids.chain((1..9).map(|id| Gate::new(1, id, true))).collect()
}

fn held() -> Vec<HoldElement> {
    let root = |id: u64| [HoldElement::Root(id), HoldElement::Known(id)];
    (1..9).flat_map(root).chain((10..4000).map(HoldElement::Known)).collect()
}

/// The sets of [`held`].
fn held_sets() -> [(&'static str, Vec<u64>); 2] {
    [("held", (1..9).collect()), ("known", (1..9).chain(10..4000).collect())]
}

/// The sets of [`gates`].
fn gate_sets() -> ([u64; 899], Vec<u32>) {
    (std::array::from_fn(|i| i as u64 + 1), (1..9).map(cgroup_hash).collect())
}

/// All of each configuration, with cgroups and without.
#[test]
fn replacements() {
    for config in configs() {
        for flags in [None, Some(0x6)] {
            for make in [|_: &Config| Snapshot::default(), snapshot] {
                let snapshot = make(&config);
                let ours = plan::contents(
                    &config,
                    make(&config),
                    &Default::default(),
                    &Default::default(),
                    DEEDS_DONE,
                    false,
                );
                let ours = ours.replacement(flags, Batch::new(SEQ));
                same_batch("replacement", ours, |theirs| {
                    let mut table = Table::new(&config);
                    for (name, rules) in classifying(&config, &snapshot.shape) {
                        let chain = table.chains.iter_mut().find(|chain| chain.name == name);
                        chain.unwrap().rules = rules;
                    }
                    theirs.replace(&table, flags);
                    for (outcome, ids) in &snapshot.elements {
                        theirs.add_cgroups(&set_name(&config, *outcome), ids);
                    }
                    let (ids, hashes) = gate_sets();
                    if !snapshot.gates.is_empty() {
                        theirs.add_cgroups("gate_1", &ids);
                    }
                    for (set, ids) in held_sets().iter().filter(|_| !snapshot.held.is_empty()) {
                        theirs.add_cgroups(set, ids);
                    }
                    for (outcome, hashes) in snapshot.dying.iter().filter(|d| !d.1.is_empty()) {
                        theirs.add_hashes(&dying_name(&config, *outcome), hashes);
                    }
                    if !snapshot.gates.is_empty() {
                        theirs.add_hashes("gone_2", &hashes);
                    }
                    DEEDS.iter().zip(DEEDS_DONE).for_each(|(name, n)| theirs.add_counter(name, n));
                });
            }
        }
    }
}

/// What a table holds replaced in two transactions: what is there under the same names, taken ones, but
/// for the first sets, which stay.
#[test]
fn exchanges() {
    for (config, same) in configs().into_iter().flat_map(|c| [0, 1, 99].map(|n| (c.clone(), n))) {
        let snapshot = Snapshot::default();
        let (all, deeds) = (Default::default(), DEEDS_DONE);
        let ours = plan::contents(&config, snapshot, &all, &Default::default(), deeds, false);
        let mut table = Table::new(&config);
        for (name, rules) in classifying(&config, &Shape::default()) {
            table.chains.iter_mut().find(|chain| chain.name == name).unwrap().rules = rules;
        }
        let hook = |base: Base| (base.hook, base.priority);
        let present = Present {
            chains: table.chains.iter().map(|c| (c.name.clone(), c.base.map(hook))).collect(),
            sets: table.sets.iter().map(|set| set.name.clone()).collect(),
            counters: DEEDS.iter().map(|name| name.to_string()).collect(),
        };
        let names = ours.names(&present, same);
        let (ranges, others) = table.sets.iter().cloned().partition(|set| set.content.is_ranges());
        let (ranges, others): (Vec<Set>, Vec<Set>) = (ranges, others);
        let stays = |name: &str| ranges.iter().take(same).any(|set| set.name == name);
        let taken = |name: &str| match stays(name) {
            true => name.to_string(),
            false => format!("{name}.2"),
        };
        let looks_up = |stmt: &mut Stmt| match stmt {
            Stmt::Destination { set, .. }
            | Stmt::OtherDestination { set, .. }
            | Stmt::Source { set, .. }
            | Stmt::OutOfPorts { set, .. } => *set = taken(set),
            _ => {}
        };
        let (kind, create) = (libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE);
        let ahead = ours.ahead(&present, &names, Some(0x6), Batch::new(SEQ));
        same_batch("ahead", ahead, |theirs| {
            theirs.table(kind, create, Some(0x6));
            for Set { name, content } in ranges.iter().filter(|set| !stays(&set.name)) {
                theirs.set(&Set { name: taken(name), content: content.clone() });
            }
        });
        let ours = ours.exchange(&present, &names, true, Some(0x6), Batch::new(SEQ));
        same_batch("exchange", ours, |theirs| {
            theirs.table(kind, create, Some(0x6));
            theirs.flush(None);
            let gone = present.sets.iter().filter(|set| !stays(set));
            gone.for_each(|set| theirs.delete_set(set));
            table.sets = others;
            for rule in table.chains.iter_mut().flat_map(|chain| &mut chain.rules) {
                rule.iter_mut().for_each(looks_up);
            }
            theirs.put(&table);
            for (name, count) in DEEDS.iter().zip(DEEDS_DONE) {
                theirs.delete_counter(name);
                theirs.add_counter(name, count);
            }
        });
    }
}

const DEEDS_DONE: [u64; 4] = [0, 7, u32::MAX as u64 + 1, u64::MAX];

/// What has been done is counted anew.
#[test]
fn counts() {
    let ours = plan::count(&DEEDS_DONE, Batch::new(SEQ));
    same_batch("counts", ours, |theirs| {
        for (name, count) in DEEDS.iter().zip(DEEDS_DONE) {
            theirs.delete_counter(name);
            theirs.add_counter(name, count);
        }
    });
}

/// A change of all that a snapshot has, as libnftnl sends it.
fn change_by(theirs: &mut Reference, config: &Config, all: &Snapshot, delta: &Delta) {
    let elements = || all.elements.iter().filter(|_| !delta.cgroups.is_empty());
    for (outcome, ids) in elements() {
        theirs.delete_cgroups(&set_name(config, *outcome), ids);
    }
    for (outcome, ids) in elements() {
        theirs.add_cgroups(&set_name(config, *outcome), ids);
    }
    let dying = || all.dying.iter().filter(|d| !delta.cgroups.is_empty() && !d.1.is_empty());
    for (outcome, hashes) in dying() {
        theirs.delete_hashes(&dying_name(config, *outcome), hashes);
    }
    for (outcome, hashes) in dying() {
        theirs.add_hashes(&dying_name(config, *outcome), hashes);
    }
    if !delta.gates.is_empty() {
        let (ids, hashes) = gate_sets();
        theirs.delete_cgroups("gate_1", &ids);
        theirs.delete_hashes("gone_2", &hashes);
        theirs.add_cgroups("gate_1", &ids);
        theirs.add_hashes("gone_2", &hashes);
    }
    let held = || held_sets().into_iter().filter(|_| !delta.held.is_empty());
    held().for_each(|(set, ids)| theirs.delete_cgroups(set, &ids));
    let renewed = delta.all_held.is_some();
    if renewed {
        let chains = hold_rules(config, None).into_iter();
        let chains = Vec::from_iter(chains.map(|(name, rules)| Chain { name, base: None, rules }));
        let (last, others) = chains.split_last().unwrap();
        theirs.flush(Some(&last.name));
        for chain in others.iter().rev() {
            theirs.chain(chain);
            theirs.delete_chain(&chain.name);
        }
        others.iter().for_each(|chain| theirs.chain(chain));
        for set in hold_sets(config) {
            theirs.delete_set(&set.name);
            theirs.set(&set);
        }
    }
    let held = || held_sets().into_iter().filter(|_| renewed || !delta.held.is_empty());
    held().for_each(|(set, ids)| theirs.add_cgroups(set, &ids));
    change_chains_by(theirs, config, delta);
}

/// The rules that a change brings, as libnftnl sends them: what stays the same is left alone.
fn change_chains_by(theirs: &mut Reference, config: &Config, delta: &Delta) {
    let renewed = delta.all_held.is_some();
    let [before, after] = &**delta.shape.as_ref().unwrap();
    let before = classifying(config, before);
    for (chain, rules) in classifying(config, after) {
        let empty = renewed && chain.starts_with(HOLD);
        let old = before.iter().find(|(name, _)| *name == chain).unwrap();
        match plan::ahead(&old.1, &rules) {
            _ if !empty && old.1 == rules => {}
            Some(more) if !empty => more.for_each(|rule| theirs.rule_ahead(&chain, rule)),
            _ => {
                if !empty {
                    theirs.flush(Some(&chain));
                }
                rules.iter().for_each(|rule| theirs.rule(&chain, rule));
            }
        }
    }
}

/// All kinds of changes under each configuration.
#[test]
fn changes() {
    for config in configs() {
        let all = snapshot(&config);
        let hashes = all
            .dying
            .iter()
            .flat_map(|(outcome, hashes)| hashes.iter().map(|hash| (*outcome, *hash)));
        let hashes: Vec<(Outcome, u32)> = hashes.collect();
        let flat =
            all.elements.iter().flat_map(|(outcome, ids)| ids.iter().map(|id| (*outcome, *id)));
        let flat: Vec<(Outcome, u64)> = flat.collect();
        let delta = Delta {
            cgroups: Change { delete: flat.clone(), add: flat },
            dying: Change { delete: hashes.clone(), add: hashes },
            gates: Change { delete: all.gates.clone(), add: all.gates.clone() },
            held: Change { delete: all.held.clone(), add: all.held.clone() },
            all_held: None,
            shape: Some(Box::new([Shape::default(), all.shape.clone()])),
        };
        let held = (!config.holds.is_empty()).then(|| delta.held.add.clone());
        let renewed = Delta { all_held: held, shape: delta.shape.clone(), ..Delta::default() };
        let none = Some(Box::new([all.shape.clone(), Shape::default()]));
        for delta in [delta, renewed, Delta { shape: none, ..Delta::default() }] {
            let ours = plan::change(&config, &delta, Batch::new(SEQ));
            same_batch("change", ours, |theirs| change_by(theirs, &config, &all, &delta));
        }
    }
}
