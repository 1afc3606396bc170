//! The table `inet cgtproxy` as data: its sets, chains and rules for a configuration, and the one
//! chain that depends on which cgroups exist. Pure. Which chains there are, and in what order, says
//! [`Table::new`]; the order of rules in `output` is that of [`output_rules`]. Why the rules stand in
//! their order is told where each chain is built; the shape was verified with traffic
//! (tests/it/reference.rs).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::expr::Verdict;
use super::stmt::Stmt;
use crate::config::{Config, Gateway, Outcome, Outlet, Route, Take, Target, Tproxy, QUIC_PORTS};
use crate::net::{Family, Interface, Mark, Owner, Range, Ranges, L4};
use crate::netlink::uapi::*;

/// Name of our one table, in family inet.
pub const TABLE: &str = "cgtproxy";

/// A cgroup's place in the kernel's sets: what it comes to, matched at which level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    pub level: u8,
    pub outcome: Outcome,
    /// Of cgroups that are matched by their hash; see [`crate::cgroup::dying`].
    pub hashed: bool,
    /// Of removed ones of which nothing tells what gates they were below.
    pub loose: bool,
}

/// The depths of gates below the cgroup root. Each leads to the pairs from there to the next one.
pub const DEPTHS: [usize; 5] = [1, 2, 4, 8, 16];

/// The place of a depth in [`DEPTHS`].
pub type Stage = usize;

/// The depths from a stage's gates to the next.
fn depths(stage: Stage) -> std::ops::Range<usize> {
    DEPTHS[stage]..DEPTHS.get(stage + 1).copied().unwrap_or(usize::MAX)
}

/// What the rules that classify depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shape {
    /// Level of the cgroup root.
    pub base: usize,
    pub pairs: BTreeSet<Pair>,
    /// The stages that have gates by their hashes.
    pub hashed: BTreeSet<Stage>,
    /// What is held, where anything is.
    pub holding: Option<Holding>,
}

impl Shape {
    /// Whether there are pairs or gates that another one has no rules for.
    pub fn leads_further(&self, other: &Shape) -> bool {
        !self.pairs.is_subset(&other.pairs) || !self.hashed.is_subset(&other.hashed)
    }
}

/// The levels of held cgroups and of those that are known below them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// Every cgroup but the root of all is below a held one.
    pub all: bool,
    pub roots: BTreeSet<u8>,
    /// The deepest one that is known.
    pub last: u8,
    /// The deepest one that the kernel takes.
    pub deepest: u8,
}

/// Where what containers send comes into this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entrances {
    /// The host's ends of their veths, by index: name, and the target of what comes in there.
    pub veths: BTreeMap<u32, (String, Target)>,
    /// The bridges that these are ports of.
    pub bridges: BTreeSet<String>,
}

/// The interfaces that route tables of others lead out by, by table.
pub type Devices = BTreeMap<u32, BTreeSet<String>>;

/// What the daemon has done since the table is there: a counter of the table for each, which no
/// packet meets, so that the kernel holds that too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    TableRepair,
    RoutingRepair,
    Reload,
    RefusedReload,
}

/// How often, in the order of [`Deed`].
pub type Deeds = [u64; 4];

/// The names of their counters.
pub const DEEDS: [&str; 4] = ["table_repairs", "routing_repairs", "reloads", "refused_reloads"];

/// Sets, chains and static rules; everything but the elements of the cgroup sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub sets: Vec<Set>,
    pub chains: Vec<Chain>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    pub name: String,
    pub content: Content,
}

/// What a set holds. Elements of `Cgroups` are the core's business and kept elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    V4(Vec<Range<Ipv4Addr>>),
    V6(Vec<Range<Ipv6Addr>>),
    Cgroups {
        counters: bool,
    },
    /// Cgroup ids as [`Stmt::CgroupHash`] makes them; the core's business too.
    Hashes,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub name: String,
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

pub type Rule = Vec<Stmt>;

/// What makes a chain a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    pub kind: &'static str,
    pub hook: u32,
    pub priority: i32,
}

/// The name of the set that holds the cgroups of an outcome.
pub fn set_name(config: &Config, outcome: Outcome) -> String {
    named("cg", config, outcome)
}

/// The names of the sets that hold the gates of a stage, by their ids and by their hashes.
pub fn gate_names(stage: Stage) -> [&'static str; 2] {
    const NAMES: [[&str; 2]; DEPTHS.len()] = [
        ["gate_1", "gone_1"],
        ["gate_2", "gone_2"],
        ["gate_4", "gone_4"],
        ["gate_8", "gone_8"],
        ["gate_16", "gone_16"],
    ];
    NAMES[stage]
}

/// The chain that a stage's gates lead to.
pub fn below_name(stage: Stage) -> String {
    format!("below_{}", DEPTHS[stage])
}

/// The set of the cgroups below which nothing leaves before it has been looked at.
pub const HELD: &str = "held";

/// The set of these and of those below them that have been looked at.
pub const KNOWN: &str = "known";

/// The name of the set that holds cgroups by their hashes: removed ones, and those whose path nft
/// cannot print.
pub fn dying_name(config: &Config, outcome: Outcome) -> String {
    named("dying", config, outcome)
}

fn named(kind: &str, config: &Config, outcome: Outcome) -> String {
    class_name(kind, config.target_name(outcome.target), outcome.class)
}

/// `KIND_TARGET`, and `KIND1_TARGET` and so on behind lines for owners.
pub fn class_name(kind: &str, target: &str, class: u16) -> String {
    match class {
        0 => [kind, "_", target].concat(),
        class => format!("{kind}{class}_{target}"),
    }
}

impl Table {
    /// The table for a configuration, with an empty `output` chain where the pairs belong.
    pub fn new(config: &Config) -> Table {
        let set = |name, content| Set { name, content };
        let plain = || Content::Cgroups { counters: false };
        let counted = || Content::Cgroups { counters: config.counters_per_cgroup };
        let mut sets = Vec::new();
        if config.bypass.has(Family::V4) {
            sets.push(set("bypass4".into(), Content::V4(bypass4(config))));
        }
        if config.bypass.has(Family::V6) {
            sets.push(set("bypass6".into(), Content::V6(bypass6(config))));
        }
        sets.extend(config.outcomes().map(|of| set(set_name(config, of), counted())));
        sets.extend(config.outcomes().map(|of| set(dying_name(config, of), Content::Hashes)));
        sets.extend((0..DEPTHS.len()).flat_map(|stage| {
            let [ids, hashes] = gate_names(stage);
            [set(ids.into(), plain()), set(hashes.into(), Content::Hashes)]
        }));
        sets.extend(hold_sets(config));
        sets.extend(config.gateways.iter().flat_map(|g| range_sets(SOURCE, &g.name, &g.sources)));
        sets.extend(config.outlets().flat_map(destination_sets));
        // chains stand before those that go to them, which `nft -f` does not ask for but readers do
        let mut chains = Vec::new();
        let (proxies, takes) = (!config.tproxies.is_empty(), has_outlets(config));
        chains.extend(proxies.then(|| lo_chain(config)));
        chains.extend(config.marks_direct().then(|| leave_chain(config)));
        chains.extend(hijacks_local(config).then(|| chain(EXEMPT, exempt_rules(config))));
        chains.extend([bypass_chain(config), drop_chain(config)]);
        chains.extend(config.outlets().any(Outlet::rejects).then(refuse_chain));
        for outlet in config.outlets() {
            chains.extend(outlet.hijacks_dns().then(|| dns_chain(config, outlet)));
            match route_of(config, outlet) {
                None => chains.extend(to_chains(config, outlet)),
                Some(route) => chains.extend(way_chains(config, route)),
            }
        }
        chains.extend(proxies.then(|| spoofed_chain(config)));
        let is_direct = config.default == Target::Direct;
        chains.extend((takes && is_direct).then(ownerless_chain));
        chains.extend(config.marks_flows().then(|| sticky_chain(config)));
        chains.push(direct_chain(config));
        let behind = || config.outcomes().filter(|outcome| outcome.class > 0);
        let many = |class: &u16| owner_rules(config, *class).len() > FEW;
        let classes = behind().map(|outcome| outcome.class).filter(many);
        let default = Some(config.default_outcome().class).filter(|class| *class > 0);
        let classes: BTreeSet<u16> = classes.chain(default).collect();
        let owners = |class| chain(owners_name(class), owner_rules(config, class));
        chains.extend(classes.into_iter().map(owners));
        chains.extend(behind().map(|outcome| behind_owners_chain(config, outcome)));
        chains.extend((!config.holds.is_empty()).then(|| unknown_chain(config)));
        let hold = hold_rules(config, None).into_iter().map(|(name, _)| name);
        let deepest_first = (0..DEPTHS.len()).rev().map(below_name);
        let marked = config.marks_flows().then(|| MARKED.to_string());
        let empty = hold.chain(deepest_first).chain(marked);
        chains.extend(empty.map(|name| chain(name, Vec::new())));
        // the type that routes again when a chain changes the mark
        let output = chain(OUTPUT, output_rules(config, &Shape::default()));
        chains.push(output.hooked("route", NF_INET_LOCAL_OUT, NF_IP_PRI_MANGLE));
        if config.outlets().any(Outlet::hijacks_dns) {
            chains.push(nat_chain(config, "nat_output", NF_INET_LOCAL_OUT));
            let routed = || nat_chain(config, "nat_prerouting", NF_INET_PRE_ROUTING);
            chains.extend(hands_over(config).then(routed));
            chains.extend(routed_answer_chain(config));
        }
        chains.extend(source_chain(config));
        chains.extend(sourceless_chain(config));
        chains.extend(proxies.then(|| strayed_chain(config)));
        chains.extend(config.tproxies.iter().map(|t| astray_chain(&t.outlet)));
        chains.extend(config.routes.iter().flat_map(off_course_chains));
        chains.extend(config.routes.iter().map(|route| here_chain(&route.outlet)));
        chains.extend((!config.routes.is_empty()).then(|| home_chain(config)));
        chains.extend(takes.then(|| guard_chain(config)));
        chains.extend(config.tproxies.iter().map(|t| receive_chain(config, t)));
        chains.extend(config.routes.iter().map(|route| closed_chain(&route.outlet)));
        if config.routes_to_tproxy() {
            chains.push(unmark_chain(config));
            let tproxies = config.tproxies.iter();
            chains.extend(tproxies.flat_map(|t| forward_chains(config, &t.outlet)));
        }
        if config.forwards() {
            let dns = config.routes.iter().filter(|route| route.outlet.hijacks_dns());
            chains.extend(dns.map(|route| forwarded_dns_chain(config, route)));
            chains.extend(config.routes.iter().map(|route| forward_way_chain(config, route)));
        }
        if hands_over(config) {
            chains.extend([routed_chain(config), input_chain(config)]);
        }
        chains.extend(config.has_containers().then(|| chain(BRIDGED, Vec::new())));
        chains.extend(config.gateways.iter().map(|g| gateway_chain(config, g)));
        chains.extend((!config.gateways.is_empty()).then(|| gateways_chain(config)));
        chains.extend(proxies.then(|| regain_chain(config)));
        chains.extend(config.routes_to_tproxy().then(|| remark_chain(config)));
        chains.extend(takes.then(|| prerouting_chain(config)));
        chains.extend(martians_chain(config));
        Table { sets, chains }
    }
}

fn has_outlets(config: &Config) -> bool {
    config.outlets().next().is_some()
}

/// The route that an outlet is of, if it is one's.
fn route_of<'a>(config: &'a Config, outlet: &Outlet) -> Option<&'a Route> {
    config.routes.iter().find(|route| route.outlet == *outlet)
}

/// `KIND_NAME`: a chain of an outlet's own.
fn own_chain(kind: &str, outlet: &Outlet) -> String {
    format!("{kind}_{}", outlet.name)
}

/// An entry of a map: packets with its mark go there.
fn by_mark(kind: &str, outlet: &Outlet) -> (u32, Verdict) {
    (outlet.mark, on_to(kind, outlet))
}

/// On to such a chain.
fn on_to(kind: &str, outlet: &Outlet) -> Verdict {
    Verdict::Goto(own_chain(kind, outlet))
}

/// Whether what is routed for others may belong to an outlet.
fn hands_over(config: &Config) -> bool {
    config.routes_to_tproxy() || config.forwards()
}

/// The chain that hooks in where a veth's packets come in, ahead of any bridge; by its index.
pub fn veth_name(index: u32) -> String {
    format!("veth_{index}")
}

/// Its one rule: from here on the packet is known as one of a container with that target. `None`
/// where that is not needed, or no mark is left to say so.
pub fn veth_rule(config: &Config, target: Target) -> Option<Rule> {
    match (config.container_mark(target), target) {
        (Some(value), _) => Some(vec![Stmt::SetPacketMark(mark(config, value))]),
        (None, Target::Drop) => Some(vec![Stmt::drop()]),
        (None, _) => None,
    }
}

/// The chain whose rules depend on the bridges that containers are on.
pub const BRIDGED: &str = "bridged";

/// What a container sends to others on its bridge. Without br_netfilter it is not seen, and with it
/// it has to be left alone as well.
pub fn bridged_rules(bridges: &BTreeSet<String>) -> Vec<Rule> {
    let rule = |name: &String| {
        let iif = Stmt::Iifname(Interface { name: name.clone(), prefix: false });
        vec![iif, Stmt::LeadsTo(name.clone()), Stmt::accept()]
    };
    bridges.iter().map(rule).collect()
}

/// The chain whose rules depend on the cgroups that exist.
pub const OUTPUT: &str = "output";

/// The chain for packets of flows that are marked.
const MARKED: &str = "marked";

/// The chains whose rules depend on the cgroups that exist, with their rules.
pub fn classifying(config: &Config, shape: &Shape) -> Vec<(String, Vec<Rule>)> {
    let stages = 0..DEPTHS.len();
    let below = stages.map(|stage| (below_name(stage), below_rules(config, shape, stage)));
    let hold = hold_rules(config, shape.holding.as_ref());
    let marked = config.marks_flows().then(|| (MARKED.into(), marked_rules(config, shape)));
    let output = (OUTPUT.into(), output_rules(config, shape));
    below.chain(hold).chain(marked).chain([output]).collect()
}

/// The chain that asks whether a packet is of a cgroup below a held one.
pub const HOLD: &str = "hold";

/// Down to this level each has a chain of its own that asks for the next one, so that a packet pays
/// for the levels of its own cgroup and not for those of others.
const SHALLOW: u8 = 8;

/// How many levels below the deepest one that is known are asked for beneath these. One would do,
/// but for a packet that meets the rules of before a transaction and the sets of after it.
const AHEAD: u8 = 2;

/// The chain that asks whether what is below that level has been looked at.
fn hold_name(level: u8) -> String {
    match level {
        0..=SHALLOW => format!("{HOLD}_{level}"),
        _ => format!("{HOLD}_deep"),
    }
}

/// The sets that these look into; none where nothing is configured to be held.
pub fn hold_sets(config: &Config) -> Vec<Set> {
    let set = |name: &str| {
        let content = Content::Cgroups { counters: false };
        Set { name: name.into(), content }
    };
    let names = [HELD, KNOWN].iter().filter(|_| !config.holds.is_empty());
    names.map(|name| set(name)).collect()
}

/// Rules of the chains that hold; none of them where nothing is configured to be held.
pub fn hold_rules(config: &Config, holding: Option<&Holding>) -> Vec<(String, Vec<Rule>)> {
    if config.holds.is_empty() {
        return Vec::new();
    }
    let known = |level| Stmt::Cgroup { level, set: KNOWN.into() };
    let unknown = |level| vec![Stmt::OtherCgroup { level, set: KNOWN.into() }, Stmt::goto(UNKNOWN)];
    let hold = |holding: &Holding| match holding.all {
        true => vec![vec![Stmt::goto(hold_name(0))]],
        false => {
            let held = |level| Stmt::Cgroup { level, set: HELD.into() };
            let levels = holding.roots.iter();
            levels.map(|level| vec![held(*level), Stmt::goto(hold_name(*level))]).collect()
        }
    };
    let shallow = |level: u8| {
        let next = level + 1;
        vec![vec![known(next), Stmt::goto(hold_name(next))], unknown(next)]
    };
    // whether one has been looked at is said at its own level, which is the deepest one that it has
    // an ancestor at: below what is not known nothing is
    let deep = |holding: &Holding| {
        let last = holding.last.max(SHALLOW + 1);
        let levels = (SHALLOW + 1..=last.saturating_add(AHEAD).min(holding.deepest)).rev();
        let one = |level| {
            let known = (level <= last).then(|| vec![known(level), Stmt::back()]);
            known.into_iter().chain([unknown(level)])
        };
        levels.flat_map(one).collect()
    };
    let of = |rules: &dyn Fn(&Holding) -> Vec<Rule>| holding.map(rules).unwrap_or_default();
    let levels = (0..=SHALLOW).rev().map(|level| {
        let rules = of(&|holding| match level < holding.deepest {
            true => shallow(level),
            false => Vec::new(),
        });
        (hold_name(level), rules)
    });
    let deepest = (hold_name(SHALLOW + 1), of(&deep));
    [deepest].into_iter().chain(levels).chain([(HOLD.to_string(), of(&hold))]).collect()
}

/// The chain that drops what new cgroups send: TCP tries again by itself.
pub const UNKNOWN: &str = "unknown";

/// What is left alone whatever the target goes no wrong way.
fn unknown_chain(config: &Config) -> Chain {
    let mut rules = match hijacks_local(config) {
        // a target may hijack DNS whatever its address
        true => vec![jump(EXEMPT), vec![Stmt::NotDport(53), Stmt::jump("bypass")]],
        false => vec![jump_bypass()],
    };
    // sent by the kernel itself, in a network namespace that such a cgroup has made
    rules.push(vec![Stmt::NeighbourDiscovery, Stmt::accept()]);
    rules.push(vec![Stmt::Counter, Stmt::drop()]);
    chain(UNKNOWN, rules)
}

/// The pairs between a stage's gates and the next ones, in the order in which they are tried: the
/// deepest level first, so that the nearest ancestor with an element decides.
fn pairs_of(shape: &Shape, stage: Stage) -> Vec<&Pair> {
    let depth = |pair: &Pair| usize::from(pair.level).saturating_sub(shape.base);
    let own = |pair: &&Pair| !pair.loose && depths(stage).contains(&depth(pair));
    let mut pairs: Vec<&Pair> = shape.pairs.iter().filter(own).collect();
    pairs.sort_unstable_by_key(|pair| in_order(pair));
    pairs
}

/// Of a level, what is dropped comes first: all that it has is the look-ups.
fn in_order(pair: &Pair) -> impl Ord {
    let target = (pair.outcome.target != Target::Drop, pair.outcome);
    (Reverse(pair.level), pair.outcome.class, pair.hashed, target)
}

fn pair_rule(config: &Config, pair: &Pair) -> Rule {
    let (level, outcome) = (pair.level, pair.outcome);
    let of = match pair.hashed {
        false => Stmt::Cgroup { level, set: set_name(config, outcome) },
        true => Stmt::CgroupHash { level, set: dying_name(config, outcome) },
    };
    match outcome.class {
        0 => vec![of, enter(config, outcome.target)],
        _ => vec![of, Stmt::goto(named("in", config, outcome))],
    }
}

/// Whether a packet is below a gate of this stage, or of the next one that leads to pairs: what is
/// not pays for that one look-up.
fn gate_rules(shape: &Shape, from: Stage) -> Vec<Rule> {
    let used = |stage: &Stage| !pairs_of(shape, *stage).is_empty();
    let Some(stage) = (from..DEPTHS.len()).find(used) else {
        return Vec::new();
    };
    let Ok(level) = u8::try_from(shape.base + DEPTHS[stage]) else {
        return Vec::new();
    };
    let [ids, hashes] = gate_names(stage);
    let of = Stmt::Cgroup { level, set: ids.into() };
    let mut rules = vec![vec![of, Stmt::jump(below_name(stage))]];
    if shape.hashed.contains(&stage) {
        let of = Stmt::CgroupHash { level, set: hashes.into() };
        rules.push(vec![of, Stmt::jump(below_name(stage))]);
    }
    rules
}

/// Rules of the chain that a stage's gates lead to.
fn below_rules(config: &Config, shape: &Shape, stage: Stage) -> Vec<Rule> {
    let pairs = pairs_of(shape, stage);
    if pairs.is_empty() {
        return Vec::new();
    }
    let mut rules = gate_rules(shape, stage + 1);
    rules.extend(pairs.into_iter().map(|pair| pair_rule(config, pair)));
    rules
}

/// Rules of `output`. A packet that no target takes passes no address look-up here.
pub fn output_rules(config: &Config, shape: &Shape) -> Vec<Rule> {
    let mut rules = Vec::new();
    // cheapest test first; covers every local address, for those leave by lo
    match (config.tproxies.is_empty(), hijacks_local(config)) {
        (true, false) => rules.push(leaves_by_lo()),
        (true, true) => rules.push(vec![Stmt::OifLo, Stmt::NotDport(53), Stmt::accept()]),
        (false, false) => rules.push(vec![Stmt::OifLo, Stmt::goto("lo")]),
        // the targets' chains let the rest of lo pass
        (false, true) => rules.push(vec![Stmt::OifLo, Stmt::jump("lo")]),
    }
    if !config.holds.is_empty() {
        // a SYN begins a flow; a datagram from a port that somebody else's has come from goes on with
        // that one, as far as conntrack knows
        let hold = Stmt::jump(HOLD);
        rules.push(vec![Stmt::NotL4proto(L4::Tcp), hold.clone()]);
        rules.push(vec![Stmt::L4proto(L4::Tcp), Stmt::Fresh, hold]);
    }
    // the proxy's answers to a router's clients leave by their interface; few other sockets are
    // transparent, and to ask for that is cheaper than to look up the address of every packet
    if config.routes_to_tproxy() {
        let mut rule = spoofed_rule(config);
        rule.insert(1, Stmt::Transparent);
        rules.push(rule);
    }
    if config.marks_flows() {
        let mut marked = vec![Stmt::CtMarked(config.mask)];
        if config.default == Target::Direct && config.marks_direct() {
            // what is known as direct needs no look-ups that find what proxies take: where no rule
            // decides it goes directly, whoever sends it
            marked.push(Stmt::NotCtMark(mark(config, config.direct_mark())));
        }
        marked.push(Stmt::goto(MARKED));
        rules.push(marked);
    }
    rules.extend(loose_rules(config, shape));
    rules.extend(gate_rules(shape, 0));
    rules.extend(default_owner_rule(config));
    rules.extend(default_rule(config));
    rules
}

/// So few pairs are tried without a gate.
const FEW_PAIRS: usize = 4;

/// What [`output_rules`] does with packets of flows that are marked: nearly all that proxies take. With
/// few pairs they need no gate, since most of them are in one of these sets, and not in that of what
/// is dropped.
fn marked_rules(config: &Config, shape: &Shape) -> Vec<Rule> {
    let mut rules = loose_rules(config, shape);
    let mut pairs: Vec<&Pair> = shape.pairs.iter().filter(|pair| !pair.loose).collect();
    if pairs.len() <= FEW_PAIRS {
        // of a level, those with an outlet first
        pairs.sort_unstable_by_key(|pair| {
            (Reverse(pair.level), pair.outcome.class, pair.hashed, Reverse(pair.outcome))
        });
        rules.extend(pairs.into_iter().map(|pair| pair_rule(config, pair)));
    } else {
        rules.extend(gate_rules(shape, 0));
    }
    rules.extend(default_owner_rule(config));
    // a packet without a socket (RST or ACK after the application closed), or of a flow that began
    // under a target that its cgroup no longer has
    rules.push(jump("sticky"));
    rules.extend(default_rule(config));
    rules
}

/// What is below a removed cgroup has been removed as well: none of the others is nearer.
fn loose_rules(config: &Config, shape: &Shape) -> Vec<Rule> {
    let mut loose: Vec<&Pair> = shape.pairs.iter().filter(|pair| pair.loose).collect();
    loose.sort_unstable_by_key(|pair| in_order(pair));
    loose.into_iter().map(|pair| pair_rule(config, pair)).collect()
}

/// The lines for owners that come before the default.
fn default_owner_rule(config: &Config) -> Option<Rule> {
    let class = config.default_outcome().class;
    (class > 0).then(|| jump(&owners_name(class)))
}

/// What becomes of packets that no rule decides.
fn default_rule(config: &Config) -> Option<Rule> {
    match config.default {
        // such a packet of a flow that conntrack has forgotten
        Target::Direct if has_outlets(config) => {
            Some(vec![Stmt::L4proto(L4::Tcp), Stmt::Invalid, Stmt::goto("ownerless")])
        }
        Target::Direct => None,
        default => Some(vec![enter(config, default)]),
    }
}

fn owners_name(class: u16) -> String {
    format!("user{class}")
}

/// The lines for owners that come before what is of that class. What a target's chain is given does
/// not come back from there.
fn owner_rules(config: &Config, class: u16) -> Vec<Rule> {
    let lines = config.owner_rules_before(class).iter();
    let rules = lines.flat_map(|line| {
        let rule = |owner: &Owner| vec![Stmt::Owner(*owner), enter(config, line.target)];
        line.owners.iter().map(rule)
    });
    rules.collect()
}

/// So many are said in each chain that begins with them: a jump costs a packet some nanoseconds.
const FEW: usize = 4;

/// Sockets of cgroups that come behind lines for owners. What the kernel sends for a socket that no
/// process has any more has no owner, and goes where its flow went.
fn behind_owners_chain(config: &Config, outcome: Outcome) -> Chain {
    let to = enter(config, outcome.target);
    let mut rules = owner_rules(config, outcome.class);
    if rules.len() > FEW {
        rules = vec![jump(&owners_name(outcome.class))];
    }
    if config.marks_flows() {
        // a flow that is the target's already, which costs less to see than an owner
        let own = match (config.outlet(outcome.target), outcome.target) {
            (Some(outlet), _) => outlet.mark,
            (None, Target::Direct) if config.marks_direct() => config.direct_mark(),
            _ => 0,
        };
        rules.push(vec![Stmt::CtMark(mark(config, own)), to.clone()]);
        rules.push(vec![Stmt::HasOwner, to.clone()]);
        rules.push(vec![Stmt::CtMarked(config.mask), Stmt::jump("sticky")]);
    }
    rules.push(vec![to]);
    chain(named("in", config, outcome), rules)
}

/// Of packets that conntrack can make nothing of, those that no process sends: nothing tells any
/// more that their flow was not a proxy's.
fn ownerless_chain() -> Chain {
    chain("ownerless", vec![vec![Stmt::HasOwner, Stmt::accept()], vec![Stmt::drop()]])
}

/// What this host sends from a foreign address begins a flow: a proxy speaks for a remote host, and
/// to conntrack it spoke first, since the application's flow has been forgotten. What the
/// application sends are replies then, which are no less its own. The packet itself goes its way,
/// which is its cgroup's: an unprivileged process can send from foreign addresses too (IPV6_FREEBIND).
fn spoofed_rule(config: &Config) -> Rule {
    vec![
        Stmt::New,
        Stmt::CtMark(mark(config, 0)),
        Stmt::ForeignSource,
        Stmt::SetCtMark(spoofed(config)),
    ]
}

/// What leaves by lo.
fn lo_chain(config: &Config) -> Chain {
    let mut last = vec![Stmt::accept()];
    if hijacks_local(config) {
        last.insert(0, Stmt::NotDport(53));
    }
    chain("lo", vec![spoofed_rule(config), last])
}

/// The ct mark of flows that [`spoofed_rule`] has found.
fn spoofed(config: &Config) -> Mark {
    mark(config, config.spoofed_mark())
}

/// A packet that answers whoever spoke first, if that was not a proxy for somebody else.
fn answers(config: &Config) -> Vec<Stmt> {
    let mut test = vec![Stmt::Reply];
    if !config.tproxies.is_empty() {
        test.push(Stmt::NotCtMark(spoofed(config)));
    }
    test
}

fn accept_answers(config: &Config) -> Rule {
    [answers(config), vec![Stmt::accept()]].concat()
}

/// The statement that hands a packet to a target.
fn enter(config: &Config, target: Target) -> Stmt {
    Stmt::goto(format!("to_{}", config.target_name(target)))
}

/// The verdict for traffic that is to go as if we were not there.
fn leave(config: &Config) -> Stmt {
    match config.marks_direct() {
        false => Stmt::accept(),
        true => Stmt::goto("leave"),
    }
}

fn mark(config: &Config, value: u32) -> Mark {
    Mark { value, mask: config.mask }
}

fn chain(name: impl Into<String>, rules: Vec<Rule>) -> Chain {
    Chain { name: name.into(), base: None, rules }
}

impl Chain {
    fn hooked(self, kind: &'static str, hook: u32, priority: i32) -> Chain {
        Chain { base: Some(Base { kind, hook, priority }), ..self }
    }

    fn unless_empty(self) -> Option<Chain> {
        Some(self).filter(|chain| !chain.rules.is_empty())
    }
}

/// Flows that go direct say so in their ct mark where the default is not direct, or lines for owners
/// come first: the kernel's own packets for them have no socket, or no owner, and would go another
/// way. Two rules, since a packet without
/// conntrack ends the first one early. A proxy's flow stays known as such.
fn leave_chain(config: &Config) -> Chain {
    let direct = mark(config, config.direct_mark());
    let mut set = vec![Stmt::SetCtMark(direct)];
    if !config.tproxies.is_empty() {
        set.insert(0, Stmt::NotCtMark(spoofed(config)));
    }
    chain("leave", vec![set, vec![Stmt::accept()]])
}

fn leaves_by_lo() -> Rule {
    vec![Stmt::OifLo, Stmt::accept()]
}

/// Whether DNS that stays on this host may be hijacked, so that `output` cannot pass all of lo.
fn hijacks_local(config: &Config) -> bool {
    config.outlets().any(|outlet| outlet.dns_local)
}

/// What `bypass` is made of where DNS is hijacked whatever its address.
const EXEMPT: &str = "exempt";

/// What is left alone whatever the target and the address.
fn exempt_rules(config: &Config) -> Vec<Rule> {
    let mut rules = vec![accept_answers(config)];
    rules.extend(config.bypass_marks.iter().map(|m| vec![Stmt::PacketMark(*m), leave(config)]));
    rules.extend(config.bypass_dscps.iter().flat_map(|dscp| {
        Family::BOTH.map(|family| vec![Stmt::Dscp(family, *dscp), leave(config)])
    }));
    rules.extend(
        config
            .bypass_users
            .iter()
            .map(|uid| vec![Stmt::Owner(Owner::Users(*uid, *uid)), leave(config)]),
    );
    rules
}

/// What is left alone whatever the target.
fn bypass_chain(config: &Config) -> Chain {
    chain("bypass", spared_rules(config))
}

fn spared_rules(config: &Config) -> Vec<Rule> {
    let of = |family| spared_of(config, family);
    [spared_by_others(config), of(Family::V4), of(Family::V6)].concat()
}

/// By anything but where it goes.
fn spared_by_others(config: &Config) -> Vec<Rule> {
    match hijacks_local(config) {
        true => vec![jump(EXEMPT)],
        false => exempt_rules(config),
    }
}

/// By where it goes.
fn spared_of(config: &Config, family: Family) -> Vec<Rule> {
    let set = ["bypass4", "bypass6"][family as usize].into();
    let mut all: Vec<Rule> = match (config.bypass.has(family), family) {
        (true, _) => vec![vec![Stmt::Destination { family, set }]],
        // to compare with a few costs half of a look-up
        (false, Family::V4) => ALWAYS4.map(|(ip, n)| vec![Stmt::ToNet(ip.into(), n)]).to_vec(),
        (false, Family::V6) => ALWAYS6.map(|(ip, n)| vec![Stmt::ToNet(ip.into(), n)]).to_vec(),
    };
    if family == Family::V4 {
        all.push(vec![Stmt::Nfproto(Family::V4), Stmt::Broadcast]);
    }
    all.iter_mut().for_each(|rule| rule.push(Stmt::accept()));
    all
}

fn jump(chain: &str) -> Rule {
    vec![Stmt::Verdict(Verdict::Jump(chain.into()))]
}

fn jump_bypass() -> Rule {
    jump("bypass")
}

/// The first rules of the targets' chains: what `output` has not let pass itself.
fn local_rules(config: &Config) -> Vec<Rule> {
    match hijacks_local(config) {
        true => vec![leaves_by_lo()],
        false => Vec::new(),
    }
}

fn drop_chain(config: &Config) -> Chain {
    chain("to_drop", [local_rules(config), drop_rules(config)].concat())
}

/// Each packet comes by here: a jump would cost it as much as two of these rules, and what is another
/// family's as much as all else.
fn drop_rules(config: &Config) -> Vec<Rule> {
    let drop = || vec![Stmt::Counter, Stmt::drop()];
    let mut rules = [spared_by_others(config), spared_of(config, Family::V4)].concat();
    rules.push([vec![Stmt::Nfproto(Family::V4)], drop()].concat());
    rules.extend(spared_of(config, Family::V6));
    // sent by the kernel itself: with default = drop, IPv6 neighbours would be lost
    rules.push(vec![Stmt::NeighbourDiscovery, Stmt::accept()]);
    rules.push(drop());
    rules
}

/// A TCP flow that began proxied could not survive a move to another path, so it stays.
fn direct_chain(config: &Config) -> Chain {
    let direct = mark(config, config.direct_mark());
    let mut rules = local_rules(config);
    if config.marks_direct() {
        rules.push(vec![Stmt::CtMark(direct), Stmt::accept()]);
    }
    if config.marks_flows() {
        rules.push(vec![Stmt::CtMarked(config.mask), Stmt::jump("sticky")]);
    }
    rules.push(vec![leave(config)]);
    chain("to_direct", rules)
}

/// A rule that makes a flow known: the flow of who spoke first. What is left of a flow that a proxy
/// began is known by that.
fn set_ct_mark(own: Mark) -> Rule {
    vec![Stmt::Original, Stmt::SetCtMark(own)]
}

/// DNS of a target that hijacks it: the ct mark alone selects it for `nat_output`. With the packet
/// mark too, a query for a resolver on another host would be routed to lo. A flow that is older
/// than the hijacking cannot be translated any more and goes on as the target's other traffic, or
/// nowhere (`query_rules`).
///
/// By a route the resolver is reached as everything is: the packet has its mark.
fn dns_chain(config: &Config, outlet: &Outlet) -> Chain {
    let packet = route_of(config, outlet).map(|_| mark(config, outlet.mark));
    marked_dns_chain(mark(config, outlet.mark), own_chain("dns", outlet), packet)
}

/// The same for what is routed for others.
fn forwarded_dns_chain(config: &Config, route: &Route) -> Chain {
    let own = mark(config, route.forward_mark);
    marked_dns_chain(own, own_chain("dnsf", &route.outlet), Some(own))
}

fn marked_dns_chain(own: Mark, name: String, packet: Option<Mark>) -> Chain {
    let accept = || {
        let set = packet.map(Stmt::SetPacketMark);
        set.into_iter().chain([Stmt::accept()])
    };
    let mut rules = vec![set_ct_mark(own)];
    rules.push([Stmt::Unconfirmed, Stmt::CtMark(own)].into_iter().chain(accept()).collect());
    rules.push([Stmt::Dnatted].into_iter().chain(accept()).collect());
    chain(name, rules)
}

/// The rules that send DNS of a target to `dns_chain`.
fn dns_rules(outlet: &Outlet) -> Vec<Rule> {
    rules_to_dns(outlet, &own_chain("dns", outlet))
}

fn rules_to_dns(outlet: &Outlet, chain: &str) -> Vec<Rule> {
    let family = match outlet.resolvers {
        [Some(_), None] => Some(Stmt::Nfproto(Family::V4)),
        [None, Some(_)] => Some(Stmt::Nfproto(Family::V6)),
        // with neither, there are no protocols
        _ => None,
    };
    let rule = |l4| {
        let dns = Stmt::jump(chain);
        let mut rule = Vec::from_iter(family.clone());
        rule.extend([Stmt::Dport(l4, 53), dns]);
        rule
    };
    outlet.dns_protocols().map(rule).collect()
}

/// DNS that `dns_chain` could not take, where the target leaves other traffic alone: it must not get
/// to the resolver that was asked.
fn query_rules(outlet: &Outlet) -> Vec<Rule> {
    let mut rules = Vec::new();
    for l4 in outlet.dns_protocols() {
        let (take, ports) = outlet.protocol(l4);
        let others = ports.iter().any(|ports| (ports.first..=ports.last).contains(&53));
        let spares = take == Take::No || !(ports.is_empty() || others) || outlet.only.is_some();
        for family in outlet.dns().map(|to| Family::of(&to.ip())) {
            if spares || outlet.family(family) == Take::No {
                rules.push(vec![Stmt::Nfproto(family), Stmt::Dport(l4, 53), Stmt::drop()]);
            }
        }
    }
    rules
}

/// What an outlet does with protocols and families. `leave` is the verdict for what it leaves alone.
fn switch_rules(outlet: &Outlet, leave: &Stmt) -> Vec<Rule> {
    let mut rules = Vec::new();
    // drop before no: what is to be dropped in one respect must not leave by another
    for verdict in [Take::Drop, Take::Reject, Take::No] {
        rules.extend(switches(outlet, verdict, leave));
    }
    rules.extend(port_rules(outlet, L4::Tcp, leave));
    rules.extend(port_rules(outlet, L4::Udp, leave));
    rules
}

/// The ports that are left alone, where some are taken alone.
fn port_rules(outlet: &Outlet, l4: L4, leave: &Stmt) -> Option<Rule> {
    let (_, ports) = outlet.protocol(l4);
    (!ports.is_empty()).then(|| vec![Stmt::OtherDports(l4, ports.to_vec()), leave.clone()])
}

/// The switches that are set to `take`.
fn switches(outlet: &Outlet, take: Take, leave: &Stmt) -> Vec<Rule> {
    let verdict = match take {
        Take::Yes => return Vec::new(),
        Take::No => leave.clone(),
        Take::Drop => Stmt::drop(),
        Take::Reject => Stmt::goto(REFUSE),
    };
    let [http, https] = QUIC_PORTS.map(|port| (Stmt::Dport(L4::Udp, port), outlet.quic));
    let switches = [
        (Stmt::Nfproto(Family::V4), outlet.ipv4),
        (Stmt::Nfproto(Family::V6), outlet.ipv6),
        (Stmt::L4proto(L4::Tcp), outlet.tcp),
        (Stmt::L4proto(L4::Udp), outlet.udp),
        http,
        https,
    ];
    let those = switches.into_iter().filter(|(_, is)| *is == take);
    those.map(|(what, _)| vec![what, verdict.clone()]).collect()
}

/// What is rejected is dropped and said to be: applications fail at once, and browsers whose QUIC
/// is refused go on by TCP. An unreachable port is what they take for an answer in both families.
const REFUSE: &str = "refuse";

fn refuse_chain() -> Chain {
    chain(REFUSE, vec![vec![Stmt::L4proto(L4::Tcp), Stmt::Reset], vec![Stmt::Unreachable]])
}

/// The sets of some addresses, by family.
fn range_sets(kind: &str, name: &str, ranges: &Ranges) -> Vec<Set> {
    let set = |family, content| Set { name: range_name(kind, family, name), content };
    let v4 = ranges.has(Family::V4).then(|| set(Family::V4, Content::V4(ranges.v4.clone())));
    let v6 = ranges.has(Family::V6).then(|| set(Family::V6, Content::V6(ranges.v6.clone())));
    v4.into_iter().chain(v6).collect()
}

/// `KIND4_NAME` and `KIND6_NAME`, of a target's or a gateway section's name.
fn range_name(kind: &str, family: Family, name: &str) -> String {
    format!("{kind}{}_{name}", ["4", "6"][family as usize])
}

/// The sets of the destinations that decide for a target.
fn destination_sets(outlet: &Outlet) -> Vec<Set> {
    let only = outlet.only.iter().flat_map(|only| range_sets(ONLY, &outlet.name, only));
    range_sets(BYPASS, &outlet.name, &outlet.bypass).into_iter().chain(only).collect()
}

const BYPASS: &str = "bypass";
const ONLY: &str = "only";
/// What a gateway section takes by where it comes from.
const SOURCE: &str = "gw";

/// Destinations that a target leaves alone.
fn bypass_rules(outlet: &Outlet, leave: &Stmt) -> Vec<Rule> {
    let families = Family::BOTH.into_iter().filter(|family| outlet.bypass.has(*family));
    let rule = |family| {
        let set = range_name(BYPASS, family, &outlet.name);
        vec![Stmt::Destination { family, set }, leave.clone()]
    };
    families.map(rule).collect()
}

/// The others, where it takes some alone. A family of which it takes none is left alone, or dropped
/// where its switch says so.
fn only_rules(outlet: &Outlet, leave: &Stmt) -> Vec<Rule> {
    let rule = |family, only: &Ranges| {
        let others = match only.has(family) {
            true => {
                let set = range_name(ONLY, family, &outlet.name);
                Stmt::OtherDestination { family, set }
            }
            false if [Take::Drop, Take::Reject].contains(&outlet.family(family)) => return None,
            false => Stmt::Nfproto(family),
        };
        Some(vec![others, leave.clone()])
    };
    let only = outlet.only.iter();
    only.flat_map(|only| Family::BOTH.into_iter().filter_map(|family| rule(family, only))).collect()
}

/// Whether what a TCP flow is to do may change by a reload while its target stays.
fn spares_tcp(outlet: &Outlet) -> bool {
    [outlet.tcp, outlet.ipv4, outlet.ipv6].contains(&Take::No)
        || !outlet.tcp_ports.is_empty()
        || outlet.picks()
}

/// Flows that need not be asked for their destination again (`keep`), by their ct mark. TCP that has
/// a proxy stays with it until it ends, whatever the target leaves alone by now: it could not
/// survive a move. A UDP flow that is the target's has its destination from when it began: in a long
/// list, to look that up for each packet would cost more than all else.
fn known_rules(config: &Config, outlet: &Outlet, keep: &str) -> Vec<Rule> {
    let mut tcp = vec![Stmt::L4proto(L4::Tcp), Stmt::CtMarked(config.mask)];
    if config.default != Target::Direct {
        tcp.push(Stmt::NotCtMark(mark(config, config.direct_mark())));
    }
    let udp = vec![Stmt::L4proto(L4::Udp), Stmt::CtMark(mark(config, outlet.mark))];
    let all = [Some(tcp).filter(|_| spares_tcp(outlet)), Some(udp).filter(|_| outlet.picks())];
    let rule = |which: Rule| [which, vec![Stmt::Counter, Stmt::goto(keep)]].concat();
    all.into_iter().flatten().map(rule).collect()
}

/// Such flows. Of UDP, all but the destination decides as for others; TCP is dropped and rejected
/// no less. `take` is what is done with the rest.
fn keep_chain(outlet: &Outlet, name: String, take: Rule, leave: &Stmt) -> Chain {
    let mut rules = Vec::new();
    if outlet.hijacks_dns() {
        rules.push(vec![Stmt::Dnatted, Stmt::accept()]);
    }
    for verdict in [Take::Drop, Take::Reject] {
        rules.extend(switches(outlet, verdict, leave));
    }
    if outlet.picks() {
        let udp = query_rules(outlet).into_iter().chain(switches(outlet, Take::No, leave));
        let of_udp = |rule: Rule| [vec![Stmt::L4proto(L4::Udp)], rule].concat();
        rules.extend(udp.map(of_udp));
        rules.extend(port_rules(outlet, L4::Udp, leave));
    }
    rules.push(take);
    chain(name, rules)
}

/// Most packets of a target: those of a flow that was found to be its own. Nothing that may have
/// changed since is left out but ports (`other_udp_ports`): what the target does not take, where TCP
/// does not stay with it, DNS that is translated, and marks and users that are left alone. What the bypass of all targets has
/// got since then holds for new flows, and so do the destinations of a target for UDP (`known_rules`).
fn short_cuts(config: &Config, outlet: &Outlet) -> Vec<Rule> {
    let family = match (outlet.ipv4 == Take::Yes, outlet.ipv6 == Take::Yes) {
        (true, true) => None,
        (true, false) => Some(Stmt::Nfproto(Family::V4)),
        (false, true) => Some(Stmt::Nfproto(Family::V6)),
        (false, false) => return Vec::new(),
    };
    if !config.bypass_dscps.is_empty() {
        // they are looked at in `bypass`, by family
        return Vec::new();
    }
    // of a query that is older than the hijacking `keep_chain` knows more
    let udp = outlet.udp == Take::Yes && !(outlet.picks() && outlet.hijacks_dns());
    let others = other_udp_ports(outlet);
    let protocols = match (outlet.tcp == Take::Yes, udp, others.is_empty()) {
        (true, true, true) => vec![Stmt::TcpOrUdp],
        (tcp, udp, all) => {
            let tcp = tcp.then_some(Stmt::L4proto(L4::Tcp));
            let of_udp = match all {
                true => Stmt::L4proto(L4::Udp),
                false => Stmt::OtherDports(L4::Udp, others),
            };
            tcp.into_iter().chain(udp.then_some(of_udp)).collect()
        }
    };
    let own = mark(config, outlet.mark);
    let rule = |protocol| {
        let mut rule = vec![Stmt::CtMark(own), Stmt::Original];
        rule.extend(family.clone());
        match protocol {
            // what is not TCP ends here, where it has a rule of its own
            Stmt::L4proto(L4::Tcp) => rule.insert(0, protocol),
            _ => rule.push(protocol),
        }
        if outlet.hijacks_dns() {
            rule.push(Stmt::NotDnatted);
        }
        rule.extend(config.bypass_marks.iter().map(|mark| Stmt::NotPacketMark(*mark)));
        rule.extend(config.bypass_users.iter().map(|uid| Stmt::NotUid(*uid)));
        rule.extend([Stmt::Counter, Stmt::SetPacketMark(own), Stmt::accept()]);
        rule
    };
    protocols.into_iter().map(rule).collect()
}

/// The UDP ports of flows that may be known as a target's and that it does not, or not always, take:
/// those with a switch of their own, and queries that are older than the hijacking. Whether a port is
/// listed is asked when a flow begins, and a reload has conntrack know those that are not any more as
/// nobody's (`stale::flows`).
fn other_udp_ports(outlet: &Outlet) -> Vec<Range<u16>> {
    let mut others = Vec::new();
    if outlet.quic != Take::Yes {
        others.extend(QUIC_PORTS);
    }
    let hijacks = outlet.dns_protocols().any(|l4| l4 == L4::Udp);
    if hijacks && !outlet.takes_port(L4::Udp, 53) {
        others.push(53);
    }
    others.sort_unstable();
    others.into_iter().map(|port| Range { first: port, last: port }).collect()
}

/// What becomes of packets of an outlet by their protocol, port and destination: hijacked (by `dns`),
/// left alone or refused.
fn sorting_rules(outlet: &Outlet, dns: Vec<Rule>, leave: &Stmt) -> Vec<Rule> {
    let (only, switches) = (only_rules(outlet, leave), switch_rules(outlet, leave));
    [dns, query_rules(outlet), only, switches].concat()
}

/// DNS that is hijacked whatever its address, ahead of everything; or else where it has its turn.
fn dns_first(outlet: &Outlet, dns: Vec<Rule>) -> [Vec<Rule>; 2] {
    match outlet.dns_local {
        true => [[vec![jump(EXEMPT)], dns].concat(), Vec::new()],
        false => [Vec::new(), dns],
    }
}

/// The chains by which a target takes packets of this host's processes.
fn to_chains(config: &Config, outlet: &Outlet) -> Vec<Chain> {
    let [mut rules, dns] = dns_first(outlet, dns_rules(outlet));
    rules.extend(local_rules(config));
    rules.extend(short_cuts(config, outlet));
    rules.push(jump_bypass());
    let own = mark(config, outlet.mark);
    let take = vec![Stmt::SetPacketMark(own), Stmt::accept()];
    let mut chains = Vec::new();
    let known = known_rules(config, outlet, &own_chain("keep", outlet));
    if !known.is_empty() {
        rules.extend(known);
        chains.push(keep_chain(outlet, own_chain("keep", outlet), take.clone(), &leave(config)));
    }
    // the kernel's answer (port unreachable) to what the proxy sent on the remote host's behalf:
    // it would leave for the true destination
    rules.push(vec![Stmt::NotTcpOrUdp, Stmt::CtMark(own), Stmt::drop()]);
    rules.push(vec![Stmt::NotTcpOrUdp, leave(config)]);
    rules.extend(bypass_rules(outlet, &leave(config)));
    rules.push(vec![Stmt::Counter]);
    rules.extend(sorting_rules(outlet, dns, &leave(config)));
    rules.extend([set_ct_mark(own), take]);
    chains.push(chain(own_chain("to", outlet), rules));
    chains
}

/// What a route takes leaves by it: every protocol.
///
/// What conntrack has of a flow is bound to the source address that it left with, so it goes on by
/// the way that it began by, the kernel's own errors and what answers others by the same interface
/// too; and what began by another cannot go on by this: TCP is told so.
fn way_chains(config: &Config, route: &Route) -> Vec<Chain> {
    let (outlet, own) = (&route.outlet, mark(config, route.outlet.mark));
    let out = vec![Stmt::SetPacketMark(own), Stmt::accept()];
    let known = [Stmt::CtMark(own), Stmt::Counter];
    let (mut rules, mut chains) = (Vec::new(), Vec::new());
    let cuts = [Take::Drop, Take::Reject].map(|take| switches(outlet, take, &Stmt::accept()));
    match cuts.concat() {
        cuts if cuts.is_empty() => rules.push([&known, &out[..]].concat()),
        cuts => {
            // what is dropped and rejected is so in what began before too
            let mut keep = vec![[&[Stmt::Dnatted], &out[..]].concat()];
            keep.extend(cuts);
            keep.push(out.clone());
            chains.push(chain(own_chain("keep", outlet), keep));
            rules.push([&known[..], &[Stmt::goto(own_chain("keep", outlet))]].concat());
        }
    }
    let [first, dns] = dns_first(outlet, dns_rules(outlet));
    rules.extend(first);
    rules.extend(local_rules(config));
    rules.push(jump_bypass());
    // sent by the kernel itself, where this is the default
    rules.push(vec![Stmt::NeighbourDiscovery, Stmt::accept()]);
    rules.extend(bypass_rules(outlet, &leave(config)));
    rules.push(vec![Stmt::Counter]);
    rules.extend(sorting_rules(outlet, dns, &leave(config)));
    rules.push(vec![Stmt::L4proto(L4::Tcp), Stmt::Confirmed, Stmt::Reset]);
    // what began with another address goes on with it, and would tell whoever is behind the route
    if route.masquerades() {
        rules.push(vec![Stmt::Confirmed, Stmt::drop()]);
    }
    rules.extend([set_ct_mark(own), out]);
    chains.push(chain(own_chain("to", outlet), rules));
    chains
}

/// What a route takes of what is routed for others.
fn forward_way_chain(config: &Config, route: &Route) -> Chain {
    let outlet = &route.outlet;
    let mut rules = bypass_rules(outlet, &Stmt::accept());
    let dns = rules_to_dns(outlet, &own_chain("dnsf", outlet));
    rules.extend(sorting_rules(outlet, dns, &Stmt::accept()));
    let own = mark(config, route.forward_mark);
    // as in `way_chains`: what began otherwise cannot go on by this
    let other = [Stmt::NotCtMark(own), Stmt::Confirmed];
    rules.push([&[Stmt::L4proto(L4::Tcp)], &other[..], &[Stmt::Reset]].concat());
    if route.masquerades() {
        rules.push([&other[..], &[Stmt::drop()]].concat());
    }
    rules.push(set_ct_mark(own));
    rules.push(vec![Stmt::SetPacketMark(own), Stmt::accept()]);
    chain(own_chain("forward", outlet), rules)
}

/// Routed packets of a target. The mark makes the route look-up deliver them here.
fn forward_chains(config: &Config, outlet: &Outlet) -> Vec<Chain> {
    let own = mark(config, outlet.mark);
    let here = Stmt::SetPacketMark(mark(config, config.gateway_mark()));
    let take = vec![here.clone(), Stmt::goto(own_chain("tproxy", outlet))];
    let (mut rules, mut chains) = (Vec::new(), Vec::new());
    let known = known_rules(config, outlet, &own_chain("fwkeep", outlet));
    if !known.is_empty() {
        rules.extend(known);
        let (name, leave) = (own_chain("fwkeep", outlet), Stmt::accept());
        chains.push(keep_chain(outlet, name, take.clone(), &leave));
    }
    // a client's ICMP error (packet too big) about a flow that ends at the proxy is the proxy's
    for known in [own, spoofed(config)] {
        rules.push(vec![Stmt::NotTcpOrUdp, Stmt::CtMark(known), here.clone(), Stmt::accept()]);
    }
    rules.push(vec![Stmt::NotTcpOrUdp, Stmt::accept()]);
    rules.extend(bypass_rules(outlet, &Stmt::accept()));
    rules.extend(sorting_rules(outlet, dns_rules(outlet), &Stmt::accept()));
    rules.extend([set_ct_mark(own), take]);
    chains.push(chain(own_chain("forward", outlet), rules));
    chains
}

/// The ct mark of routed flows of a target. With a route another than that of this host's own, since
/// what this host sends in those (a reset) goes to the client.
fn routed_ct_mark(config: &Config, outlet: &Outlet) -> Mark {
    mark(config, route_of(config, outlet).map_or(outlet.mark, |route| route.forward_mark))
}

/// Routed flows that are known by their ct mark: they stay with their proxy until they end.
fn routed_chain(config: &Config) -> Chain {
    let stay = |outlet| (routed_ct_mark(config, outlet).value, on_to("forward", outlet));
    let known = Stmt::CtMarkMap { mask: config.mask, map: config.outlets().map(stay).collect() };
    chain("routed", vec![vec![Stmt::Reply, Stmt::accept()], vec![known]])
}

/// Where bridged packets pass the IP hooks (br_netfilter), those that are for this host come to it with
/// all that the hooks have done but the socket, and pass no hook any more: br_netfilter stands at the
/// first priority and takes them out. So here they get their socket, just before: of chains of one
/// priority, that which was hooked in last comes first.
pub fn again_chain(config: &Config) -> Option<Chain> {
    let to = |tproxy: &Tproxy| (tproxy.outlet.mark, on_to("tproxy", &tproxy.outlet));
    let map: Vec<_> = config.tproxies.iter().map(to).collect();
    let known = match &map[..] {
        [(_, to)] => Stmt::Verdict(to.clone()),
        // the socket that is for the address of a flow which a proxy began finds it by itself
        _ => Stmt::CtMarkMap { mask: config.mask, map },
    };
    let routed = Stmt::PacketMark(mark(config, config.gateway_mark()));
    // by lo, what the proxy itself sends: others have restored the mark of its flow
    let chain = prerouting("again", i32::MIN, vec![vec![routed, Stmt::NotIifLo, known]]);
    config.routes_to_tproxy().then_some(chain)
}

/// Routed packets that were handed to a proxy and have lost its socket since, as bridged ones do
/// ([`again_chain`]). They must not reach this host's own wildcard sockets. And those of a route that
/// leads nowhere.
fn input_chain(config: &Config) -> Chain {
    let routed = Stmt::PacketMark(mark(config, config.gateway_mark()));
    let rule = |last: &[Stmt]| [std::slice::from_ref(&routed), last].concat();
    let mut rules = Vec::new();
    if config.routes_to_tproxy() {
        rules.extend([
            // the same mark of the proxy's own packets was restored by others
            rule(&[Stmt::IifLo, Stmt::accept()]),
            rule(&[Stmt::Transparent, Stmt::accept()]),
            rule(&[Stmt::L4proto(L4::Tcp), Stmt::Counter, Stmt::Reset]),
            rule(&[Stmt::L4proto(L4::Udp), Stmt::Counter, Stmt::drop()]),
        ]);
    }
    if config.forwards() {
        let refuse = |route: &Route| (route.forward_mark, on_to("closed", &route.outlet));
        let map = config.routes.iter().map(refuse).collect();
        rules.push(vec![Stmt::PacketMarkMap { mask: config.mask, map }]);
    }
    chain("input", rules).hooked("filter", NF_INET_LOCAL_IN, NF_IP_PRI_MANGLE)
}

/// What a gateway section does with the packets that it matches.
fn gateway_chain(config: &Config, gateway: &Gateway) -> Chain {
    let mut rules = Vec::new();
    if gateway.containers {
        // with it the kernel would look for the way back among what this host sends
        rules.push(vec![Stmt::SetPacketMark(mark(config, 0))]);
        rules.push(jump(BRIDGED));
    }
    if let Some(outlet) = config.outlet(gateway.target) {
        let [first, _] = dns_first(
            outlet,
            match gateway.target {
                Target::Route(_) => rules_to_dns(outlet, &own_chain("dnsf", outlet)),
                _ => dns_rules(outlet),
            },
        );
        rules.extend(first);
    }
    // as in `drop_chain`
    rules.extend(spared_rules(config));
    rules.push(vec![Stmt::Local, Stmt::accept()]);
    match gateway.target {
        Target::Direct => {
            rules.push(vec![Stmt::Counter]);
            if hands_over(config) {
                rules.push(vec![Stmt::CtMarked(config.mask), Stmt::goto("routed")]);
            }
            rules.push(vec![Stmt::accept()]);
        }
        Target::Drop => {
            // bridged by this host, where br_netfilter shows us what is bridged
            rules.push(vec![Stmt::NeighbourDiscovery, Stmt::accept()]);
            rules.push(vec![Stmt::Counter, Stmt::drop()]);
        }
        Target::Tproxy(_) | Target::Route(_) => {
            let forward = format!("forward_{}", config.target_name(gateway.target));
            rules.push(vec![Stmt::Counter, Stmt::goto(forward)]);
        }
    }
    chain(gateway_name(gateway), rules)
}

fn gateway_name(gateway: &Gateway) -> String {
    format!("gw_{}", gateway.name)
}

/// One rule for each interface, and for each family where there are sources.
fn gateway_rules(config: &Config, gateway: &Gateway) -> Vec<Rule> {
    if gateway.containers {
        let value = config.container_mark(gateway.target).unwrap_or_default();
        let goto = Stmt::goto(gateway_name(gateway));
        return vec![vec![Stmt::PacketMark(mark(config, value)), goto]];
    }
    let families = Family::BOTH.into_iter().filter(|family| gateway.sources.has(*family));
    let mut families: Vec<Option<Family>> = families.map(Some).collect();
    if families.is_empty() {
        families.push(None);
    }
    let mut macs = gateway.macs.clone();
    macs.sort_unstable();
    macs.dedup();
    let mut rules = Vec::new();
    for interface in &gateway.interfaces {
        for family in &families {
            let mut rule = vec![Stmt::Iifname(interface.clone())];
            let set = |family| range_name(SOURCE, family, &gateway.name);
            rule.extend(family.map(|family| Stmt::Source { family, set: set(family) }));
            if !macs.is_empty() {
                rule.push(Stmt::EtherSource(macs.clone()));
            }
            rule.push(Stmt::goto(gateway_name(gateway)));
            rules.push(rule);
        }
    }
    rules
}

/// What is left of a flow that a proxy began. The kernel's own packets for an application's TCP
/// socket that is gone, or for one whose cgroup has no target any more, are the proxy's: the
/// `tproxy` of any target finds the very socket that they are for. Port unreachable and the like
/// would tell the true destination. What the proxy itself sends, and what a process sends by UDP,
/// goes where its cgroup is to go.
fn spoofed_chain(config: &Config) -> Chain {
    let any = config.tproxies.first().map_or(0, |tproxy| tproxy.outlet.mark);
    let own = Stmt::SetPacketMark(mark(config, any));
    let rules = vec![
        vec![Stmt::Original, Stmt::back()],
        vec![Stmt::L4proto(L4::Tcp), own, Stmt::accept()],
        vec![Stmt::HasOwner, Stmt::back()],
        vec![Stmt::drop()],
    ];
    chain("spoofed", rules)
}

/// Flows that are known by their ct mark. Marks that we do not know (of a tproxy that a reload took
/// away) fall through to the end of `output`: they go where what is not known goes. Of UDP, what a
/// process sends is not known by its flow: another may have used the port before.
fn sticky_chain(config: &Config) -> Chain {
    let direct = config.direct_mark();
    let of_process = [Stmt::L4proto(L4::Udp), Stmt::HasOwner];
    let mut rules = Vec::new();
    if !config.routes.is_empty() {
        // by the way that it began by, in either direction
        let map = config.routes.iter().map(|route| by_mark("to", &route.outlet)).collect();
        rules.push(vec![Stmt::CtMarkMap { mask: config.mask, map }]);
    }
    if !config.tproxies.is_empty() {
        rules.push(vec![Stmt::CtMark(spoofed(config)), Stmt::goto("spoofed")]);
        let forget = [Stmt::Original, Stmt::SetCtMark(mark(config, 0))];
        rules.push([&of_process[..], &forget].concat());
    }
    rules.push([&of_process[..], &[Stmt::back()]].concat());
    let mut map: Vec<_> = config.tproxies.iter().map(|t| by_mark("to", &t.outlet)).collect();
    if config.default != Target::Direct {
        // a process's own packets of a flow that began direct: its cgroup has no target any more,
        // so the default cuts it; the kernel's packets for such a flow still go direct
        rules.push(vec![
            Stmt::CtMark(mark(config, direct)),
            Stmt::HasOwner,
            enter(config, config.default),
        ]);
    }
    if config.marks_direct() {
        map.push((direct, Verdict::Accept));
    }
    if !map.is_empty() {
        rules.push(vec![Stmt::CtMarkMap { mask: config.mask, map }]);
    }
    chain("sticky", rules)
}

/// The hijacking itself, of flows that `dns_chain` has chosen. A router's clients cannot be sent to
/// a loopback address: for them it stands for this host's address on their interface.
fn nat_chain(config: &Config, name: &str, hook: u32) -> Chain {
    let mut rules = Vec::new();
    for outlet in config.outlets() {
        for l4 in outlet.dns_protocols() {
            rules.extend(outlet.dns().map(|to| {
                let own = Stmt::CtMark(match hook {
                    NF_INET_PRE_ROUTING => routed_ct_mark(config, outlet),
                    _ => mark(config, outlet.mark),
                });
                let dport = Stmt::Dport(l4, 53);
                match to.ip().is_loopback() && hook == NF_INET_PRE_ROUTING {
                    false => vec![own, dport, Stmt::Dnat(to)],
                    true => {
                        let family = Stmt::Nfproto(Family::of(&to.ip()));
                        vec![own, family, dport, Stmt::Redirect(to.port())]
                    }
                }
            }));
        }
    }
    // the first chain that translates a flow decides: before others, whoever came first
    chain(name, rules).hooked("nat", hook, NF_IP_PRI_NAT_DST - 1)
}

/// A resolver on a wildcard address answers from the address that leads to whoever asked, unless it
/// goes to some lengths (IP_PKTINFO). Asked from a loopback address, it answers from that.
fn answer_rules(config: &Config) -> Vec<Rule> {
    let mut rules = Vec::new();
    for outlet in config.outlets() {
        for l4 in outlet.dns_protocols() {
            let here = outlet.dns().filter(|to| to.ip().is_loopback());
            rules.extend(here.map(|to| {
                let from = match to.ip() {
                    IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                    IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
                };
                vec![
                    Stmt::OifLo,
                    Stmt::CtMark(mark(config, outlet.mark)),
                    Stmt::Dnatted,
                    Stmt::Nfproto(Family::of(&from)),
                    Stmt::Dport(l4, to.port()),
                    Stmt::Snat(from),
                ]
            }));
        }
    }
    rules
}

/// The ct marks of a route's flows: this host's, and routed ones.
fn ct_marks(config: &Config, route: &Route) -> impl Iterator<Item = Mark> {
    let own = mark(config, route.outlet.mark);
    let routed = config.forwards().then(|| mark(config, route.forward_mark));
    std::iter::once(own).chain(routed)
}

/// What leaves by a route has the source address that the application's own way would have given it.
/// TCP that is refused leaves by lo, and conntrack knows it for a while. It is masqueraded as well,
/// since the kernel forgets a flow that was so by another interface: the next connection from the
/// same port would go on untranslated, and now has the right address with its second SYN.
fn masquerade_rules<'a>(config: &'a Config) -> Vec<Rule> {
    let rules = |route: &'a Route| {
        ct_marks(config, route).flat_map(|own| {
            let rule = |out: Option<Stmt>| {
                std::iter::once(Stmt::CtMark(own)).chain(out).chain([Stmt::Masquerade]).collect()
            };
            match &*route.interface {
                "" => vec![rule(None)],
                name => vec![rule(Some(Stmt::Oifname(name.into()))), rule(Some(Stmt::OifLo))],
            }
        })
    };
    let masqueraded = config.routes.iter().filter(|route| route.masquerades());
    let mut rules: Vec<Rule> = masqueraded.flat_map(rules).collect();
    if !rules.is_empty() {
        // on its way to a resolver here
        rules.insert(0, vec![Stmt::OifLo, Stmt::Local, Stmt::accept()]);
    }
    rules
}

/// An interface that has just lost its address: masquerading would have taken that of another, and
/// the answers would come in by that. Behind it, and before conntrack knows the flow.
fn sourceless_chain(config: &Config) -> Option<Chain> {
    let masqueraded = config.routes.iter().filter(|route| route.masquerades());
    let mut rules: Vec<Rule> = masqueraded
        .filter(|route| !route.interface.is_empty())
        .flat_map(|route| {
            ct_marks(config, route).map(|own| {
                let out = Stmt::Oifname(route.interface.clone());
                let other = Stmt::SourceOfOther;
                vec![Stmt::CtMark(own), out, other, Stmt::drop()]
            })
        })
        .collect();
    if !rules.is_empty() {
        // nearly every packet ends here
        rules.insert(0, vec![Stmt::Confirmed, Stmt::accept()]);
    }
    chain("sourceless", rules)
        .hooked("filter", NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC + 1)
        .unless_empty()
}

/// Where source addresses are translated.
fn source_chain(config: &Config) -> Option<Chain> {
    let rules = [answer_rules(config), masquerade_rules(config)].concat();
    // before others, as in `nat_chain`
    chain("nat_postrouting", rules)
        .hooked("nat", NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC - 1)
        .unless_empty()
}

/// The same for a router's clients: what comes in by another interface cannot come from a loopback
/// address, but from the very address that was asked. Of several that their interface has, that is
/// the first, which need not be the one that leads to the client. TCP knows by which it was asked.
/// To a link-local address there is a way back by its interface alone.
fn routed_answer_chain(config: &Config) -> Option<Chain> {
    let mut rules = Vec::new();
    let udp = |outlet: &&Outlet| outlet.dns_protocols().any(|l4| l4 == L4::Udp);
    for outlet in config.outlets().filter(udp).filter(|_| hands_over(config)) {
        let here = outlet.dns().filter(|to| to.ip().is_loopback());
        rules.extend(here.map(|to| {
            let own = Stmt::CtMark(routed_ct_mark(config, outlet));
            let port = Stmt::Dport(L4::Udp, to.port());
            let family = Family::of(&to.ip());
            let mut rule = vec![own, Stmt::Dnatted];
            if family == Family::V6 {
                rule.push(Stmt::NotLinkLocal);
            }
            rule.extend([port, Stmt::SnatToDestination(family)]);
            rule
        }));
    }
    // before others, as in `nat_chain`
    chain("nat_input", rules).hooked("nat", NF_INET_LOCAL_IN, NF_IP_PRI_NAT_SRC - 1).unless_empty()
}

/// A marked packet that is not on its way to lo: the ip rules or the route are missing. It must not
/// leave by another interface. In postrouting, since `oif` of the output hook stays what it was
/// before the mark.
fn guard_chain(config: &Config) -> Chain {
    let mut map: Vec<_> = config.tproxies.iter().map(|t| by_mark("astray", &t.outlet)).collect();
    if !map.is_empty() {
        // others restore the mark of a flow that a proxy began into packets of it
        map.push((config.spoofed_mark(), Verdict::Goto("strayed".into())));
    }
    for route in config.routes.iter().filter(|route| keeps_course(route)) {
        map.push(by_mark("astray", &route.outlet));
        if config.forwards() {
            map.push((route.forward_mark, on_to("astray", &route.outlet)));
        }
    }
    let home = match config.routes.is_empty() {
        true => Stmt::accept(),
        false => Stmt::goto("home"),
    };
    // nearly every packet ends here, without a look-up
    let mut rules = vec![vec![Stmt::PacketMark(mark(config, 0)), Stmt::accept()]];
    if let Some(first) = config.routes.iter().find(|route| !route.interface.is_empty()) {
        // most often the only one: to compare costs less than to look up
        let own = Stmt::PacketMark(mark(config, first.outlet.mark));
        rules.push(vec![own, Stmt::Oifname(first.interface.clone()), Stmt::accept()]);
    }
    rules.push(vec![Stmt::OifLo, home]);
    if !map.is_empty() {
        rules.push(vec![Stmt::PacketMarkMap { mask: config.mask, map }]);
    }
    chain("guard", rules).hooked("filter", NF_INET_POST_ROUTING, NF_IP_PRI_MANGLE)
}

/// Packets of a route that are about to leave by another interface than its own: bound to a device,
/// or the ip rules or the table are not what they should be. What came in by its interface, for a
/// router's client, has the mark for the look-up of the way back alone.
fn off_course_chains(route: &Route) -> Vec<Chain> {
    let name = own_chain("astray", &route.outlet);
    let rest = vec![Stmt::Counter, Stmt::drop()];
    match (keeps_course(route), &*route.interface) {
        (false, _) => Vec::new(),
        (true, "") => vec![
            chain(ways_name(route), Vec::new()),
            chain(name, vec![jump(&ways_name(route)), rest]),
        ],
        (true, own) => vec![chain(name, [course_rules([own].into_iter()), vec![rest]].concat())],
    }
}

/// Whether it is known by which interfaces a route leaves. By the main table that may be any.
fn keeps_course(route: &Route) -> bool {
    !(253..=255).contains(&route.table)
}

/// The rules that let packets leave by these interfaces.
fn course_rules<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<Rule> {
    let leave = names.clone().map(|name| vec![Stmt::Oifname(name.into()), Stmt::accept()]);
    leave.chain(names.map(|name| vec![iifname(name), Stmt::Reply, Stmt::accept()])).collect()
}

/// The chain whose rules depend on what another program's table holds.
fn ways_name(route: &Route) -> String {
    own_chain("ways", &route.outlet)
}

/// Those chains, with their rules.
pub fn ways(config: &Config, devices: &Devices) -> Vec<(String, Vec<Rule>)> {
    let learned = config.routes.iter().filter(|route| route.table != 0 && keeps_course(route));
    let chain = |route: &Route| {
        let names = devices.get(&route.table).into_iter().flatten().map(String::as_str);
        (ways_name(route), course_rules(names))
    };
    learned.map(chain).collect()
}

fn iifname(name: &str) -> Stmt {
    Stmt::Iifname(Interface { name: name.into(), prefix: false })
}

/// What is marked and on its way to this host.
fn home_chain(config: &Config) -> Chain {
    let map = config.routes.iter().map(|route| by_mark("here", &route.outlet)).collect();
    chain("home", vec![vec![Stmt::PacketMarkMap { mask: config.mask, map }]])
}

/// What a route has no way for. TCP is told so where it comes back in; what else goes on to be sent
/// must not become known to conntrack, which would keep it from getting the right source address once
/// there is a way.
fn here_chain(outlet: &Outlet) -> Chain {
    let rules = vec![
        vec![Stmt::L4proto(L4::Tcp), Stmt::accept()],
        vec![Stmt::Dnatted, Stmt::Local, Stmt::accept()],
        vec![Stmt::Reply, Stmt::Local, Stmt::accept()],
        vec![Stmt::Counter, Stmt::drop()],
    ];
    chain(own_chain("here", outlet), rules)
}

/// Where it comes back in, by lo, or as a packet for this host. It must not reach this host's own
/// wildcard sockets. Hijacked DNS may go to a resolver here.
fn closed_chain(outlet: &Outlet) -> Chain {
    let rules = vec![
        vec![Stmt::Dnatted, Stmt::Local, Stmt::accept()],
        vec![Stmt::Reply, Stmt::Local, Stmt::accept()],
        vec![Stmt::L4proto(L4::Tcp), Stmt::Counter, Stmt::Reset],
        vec![Stmt::Counter, Stmt::drop()],
    ];
    chain(own_chain("closed", outlet), rules)
}

/// Such packets of a target: most often of a socket that is bound to another device.
fn astray_chain(outlet: &Outlet) -> Chain {
    chain(own_chain("astray", outlet), vec![vec![Stmt::Counter, Stmt::drop()]])
}

/// The same for routed packets. Answers to them may bear their mark (the sysctls fwmark_reflect and
/// tcp_fwmark_accept) and go their way.
fn strayed_chain(config: &Config) -> Chain {
    let rules = vec![
        accept_answers(config),
        vec![Stmt::Original, Stmt::CtMark(spoofed(config)), Stmt::accept()],
        vec![Stmt::Counter, Stmt::drop()],
    ];
    chain("strayed", rules)
}

/// Others restore the ct mark into packets (CONNMARK --restore-mark): a proxy's answers to a
/// router's clients, and DNS on its way to a resolver elsewhere, must not be routed to lo by that.
/// Behind theirs; a change makes the kernel route anew.
fn unmark_chain(config: &Config) -> Chain {
    let none = Stmt::SetPacketMark(mark(config, 0));
    let mut rules = vec![vec![Stmt::PacketMark(mark(config, 0)), Stmt::accept()]];
    if !config.routes.is_empty() {
        // these go by their mark in either direction, to a resolver too
        let map = config.routes.iter().map(|route| (route.outlet.mark, Verdict::Accept)).collect();
        rules.push(vec![Stmt::PacketMarkMap { mask: config.mask, map }]);
    }
    rules.push([answers(config), vec![none.clone(), Stmt::accept()]].concat());
    rules.push(vec![Stmt::Dnatted, none, Stmt::accept()]);
    chain("unmark", rules).hooked("route", NF_INET_LOCAL_OUT, NF_IP_PRI_SECURITY)
}

/// Where the packets come back in by lo. With no listener evaluation goes on behind `tproxy`, and
/// the packet would reach this host's own wildcard sockets: so refuse it.
fn receive_chain(config: &Config, tproxy: &Tproxy) -> Chain {
    let port = tproxy.port;
    let to = |family, address: Option<IpAddr>| {
        let tproxy = Stmt::Tproxy { family, address, port };
        vec![Stmt::TcpOrUdp, tproxy, Stmt::accept()]
    };
    // marked by others, which restore the ct mark into packets: the proxy's answers, hijacked DNS
    let mut rules = vec![accept_answers(config)];
    if tproxy.outlet.hijacks_dns() {
        rules.push(vec![Stmt::Dnatted, Stmt::accept()]);
    }
    match tproxy.addresses {
        [None, None] => rules.push(to(None, None)),
        addresses => rules.extend(Family::BOTH.map(|f| to(Some(f), addresses[f as usize]))),
    }
    rules.push(vec![Stmt::L4proto(L4::Tcp), Stmt::Counter, Stmt::Reset]);
    rules.push(vec![Stmt::Counter, Stmt::drop()]);
    chain(own_chain("tproxy", &tproxy.outlet), rules)
}

/// What is routed for others, by section. Before addresses are translated. A mark that says which
/// container's a packet is has to be read before others restore that of its flow.
fn gateways_chain(config: &Config) -> Chain {
    let mut rules = vec![vec![Stmt::IifLo, Stmt::accept()]];
    rules.extend(config.gateways.iter().flat_map(|g| gateway_rules(config, g)));
    if hands_over(config) {
        rules.push(vec![Stmt::CtMarked(config.mask), Stmt::goto("routed")]);
    }
    prerouting("gateways", priority_of_gateways(config.has_containers()), rules)
}

/// Where that chain stands.
pub fn priority_of_gateways(has_containers: bool) -> i32 {
    match has_containers {
        true => NF_IP_PRI_CONNTRACK + 1,
        false => NF_IP_PRI_MANGLE,
    }
}

/// Where the packets of local processes come back in. Late, since Linux takes no packet that has
/// its socket for a loopback one any more: firewalld's look-up of the way back, in a chain of
/// priority 10, would drop it.
fn prerouting_chain(config: &Config) -> Chain {
    let mask = config.mask;
    let mut local: Vec<_> = config.tproxies.iter().map(|t| by_mark("tproxy", &t.outlet)).collect();
    if !local.is_empty() {
        local.push((config.spoofed_mark(), Verdict::Goto("regain".into())));
    }
    local.extend(config.routes.iter().map(|route| by_mark("closed", &route.outlet)));
    let mut others: Vec<Rule> =
        config.routes.iter().flat_map(|route| return_rules(config, route)).collect();
    if config.routes_to_tproxy() {
        let map = config.tproxies.iter().map(|t| (t.outlet.mark, Verdict::Goto("remark".into())));
        others.push(vec![Stmt::PacketMarkMap { mask, map: map.collect() }]);
    }
    // where nothing else is asked of what comes in by another interface, that ends with one comparison
    let (mut rules, by_lo) = match others.is_empty() {
        true => (vec![vec![Stmt::NotIifLo, Stmt::accept()]], None),
        false => (Vec::new(), Some(Stmt::IifLo)),
    };
    let mut push = |rest: Rule| rules.push(by_lo.iter().cloned().chain(rest).collect());
    if let Some(first) = config.tproxies.first() {
        // most often the only one: to compare costs less than to look up
        let own = Stmt::PacketMark(mark(config, first.outlet.mark));
        push(vec![own, Stmt::goto(own_chain("tproxy", &first.outlet))]);
    }
    push(vec![Stmt::PacketMarkMap { mask, map: local }]);
    rules.extend(others);
    prerouting("prerouting", NF_IP_PRI_SECURITY, rules)
}

/// What comes in by a route: a look-up of the way back (rp_filter with src_valid_mark = 1) has to find
/// its interface, and what others begin by it is answered by it, where the main table would lead
/// elsewhere.
fn return_rules(config: &Config, route: &Route) -> Vec<Rule> {
    let own = mark(config, route.outlet.mark);
    let mut rules = Vec::new();
    let first = match &*route.interface {
        "" => Stmt::Reply,
        name => {
            let begins = [iifname(name), Stmt::New, Stmt::CtMark(mark(config, 0)), Stmt::Local];
            let elsewhere = Stmt::ComesFromElsewhere(name.to_string());
            rules.push([&begins[..], &[elsewhere, Stmt::SetCtMark(own)]].concat());
            iifname(name)
        }
    };
    let known = ct_marks(config, route);
    rules.extend(known.map(|ct| vec![first.clone(), Stmt::CtMark(ct), Stmt::SetPacketMark(own)]));
    rules
}

/// The mark of an application's packet was overwritten with that of a flow that a proxy began: by
/// another program that restores ct marks. Where there is one proxy, it is known which. Else the
/// packet finds the proxy by the socket that is for its address alone, or is no more: it must not
/// reach this host's own wildcard sockets.
fn regain_chain(config: &Config) -> Chain {
    let rules = match &config.tproxies[..] {
        [tproxy] => {
            let own = Stmt::SetPacketMark(mark(config, tproxy.outlet.mark));
            vec![vec![Stmt::Reply, own, Stmt::goto(own_chain("tproxy", &tproxy.outlet))]]
        }
        _ => vec![
            vec![Stmt::Reply, Stmt::Transparent, Stmt::accept()],
            vec![Stmt::Reply, Stmt::drop()],
        ],
    };
    chain("regain", rules)
}

/// The same for a routed packet that has its socket already, and is to be routed to it. Hijacked DNS
/// goes where it was translated to.
fn remark_chain(config: &Config) -> Chain {
    let set = |value| Stmt::SetPacketMark(mark(config, value));
    let rules = vec![
        accept_answers(config),
        vec![Stmt::Dnatted, set(0), Stmt::accept()],
        vec![set(config.gateway_mark()), Stmt::accept()],
    ];
    chain("remark", rules)
}

/// The name of the chain that keeps others from this host's loopback addresses.
pub const MARTIANS: &str = "martians";

/// Where answers to a process that has asked from a loopback address may come in by an interface
/// (route_localnet), nothing else may. Before addresses are translated.
fn martians_chain(config: &Config) -> Option<Chain> {
    let open = config.routes.iter().filter(|route| route.sends_from_loopback());
    let rule = |route: &Route| {
        vec![
            iifname(&route.interface),
            Stmt::ToNet(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
            Stmt::drop(),
        ]
    };
    let rules: Vec<Rule> = open.map(rule).collect();
    prerouting(MARTIANS, NF_IP_PRI_RAW, rules).unless_empty()
}

fn prerouting(name: &str, priority: i32, rules: Vec<Rule>) -> Chain {
    chain(name, rules).hooked("filter", NF_INET_PRE_ROUTING, priority)
}

/// Link-local and multicast. The broadcast address of all networks is known to the kernel as such.
const ALWAYS4: [(Ipv4Addr, u32); 2] =
    [(Ipv4Addr::new(224, 0, 0, 0), 4), (Ipv4Addr::new(169, 254, 0, 0), 16)];
const ALWAYS6: [(Ipv6Addr, u32); 2] = [
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
];

/// These, broadcast, and what the configuration adds; sorted and apart.
pub fn bypass4(config: &Config) -> Vec<Range<Ipv4Addr>> {
    let always = ALWAYS4.into_iter().chain([(Ipv4Addr::BROADCAST, 32)]);
    let always = always.map(|(ip, length)| Range::prefix(ip, length));
    Range::merge(always.chain(config.bypass.v4.iter().copied()).collect())
}

pub fn bypass6(config: &Config) -> Vec<Range<Ipv6Addr>> {
    let always = ALWAYS6.into_iter().map(|(ip, length)| Range::prefix(ip, length));
    Range::merge(always.chain(config.bypass.v6.iter().copied()).collect())
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hook = match self.hook {
            NF_INET_LOCAL_OUT => "output",
            NF_INET_POST_ROUTING => "postrouting",
            NF_INET_LOCAL_IN => "input",
            NF_INET_INGRESS => "ingress",
            _ => "prerouting",
        };
        // nft has no name for mangle in a nat chain's neighbourhood; numbers are always right
        write!(f, "type {} hook {hook} priority {}; policy accept;", self.kind, self.priority)
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  chain {} {{", self.name)?;
        if let Some(base) = &self.base {
            writeln!(f, "    {base}")?;
        }
        for rule in &self.rules {
            let text: Vec<String> = rule.iter().map(Stmt::to_string).collect();
            writeln!(f, "    {}", text.join(" "))?;
        }
        writeln!(f, "  }}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn udp_ports_that_have_no_short_cut() {
        let others = |lines: &str| {
            let text = format!("[tproxy p]\nport = 1\n{lines}");
            let config = testing::config(text.leak());
            let ranges = other_udp_ports(&config.tproxies[0].outlet);
            ranges.iter().map(Range::to_string).collect::<Vec<_>>().join(" ")
        };
        for (lines, want) in [
            ("", ""),
            ("udp-ports = 1-79 443\n", ""),
            ("udp-ports = 1-79 443\ndns-hijack = 127.0.0.1\n", ""),
            ("udp-ports = 443\ndns-hijack = 127.0.0.1\n", "53"),
            ("dns-hijack = 127.0.0.1\n", ""),
            ("quic = reject\n", "80 443"),
            ("quic = no\nudp-ports = 1-9\ndns-hijack = 127.0.0.1\n", "53 80 443"),
        ] {
            assert_eq!(others(lines), want, "{lines}");
        }
    }
}
