//! Hook output: what this host's processes send. The order of the rules is that of [`output_rules`] and
//! [`deciding_rules`], and for flows that are known by their ct mark that of [`marked_rules`]; the other
//! chains stand below them in the order in which they are gone to.

use std::cmp::Reverse;

use super::hold::{hold_rules, HOLD};
use super::moved::moving_first;
use super::sets::{dying_name, gate_names, named, set_name};
use super::shape::{depths, Pair, Shape, Stage, DEPTHS};
use super::spared::{leaves_by_lo, CLIENTS};
use super::target::cut_rules;
use super::words::*;
use super::{Chain, Rule};
use crate::config::{Config, Outcome, Target};
use crate::net::{Owner, L4};
use crate::netlink::uapi::*;
use crate::nft::expr::Verdict;
use crate::nft::stmt::Stmt;
use crate::small::SmallSet;

/// The chain whose rules depend on the cgroups that exist.
pub const OUTPUT: &str = "output";

/// The chain for packets of flows that are marked.
const MARKED: &str = "marked";

/// The chains whose rules depend on the cgroups that exist, with their rules.
pub fn classifying(config: &Config, shape: &Shape) -> Vec<(String, Vec<Rule>)> {
    let stages = 0..DEPTHS.len();
    let below = stages.map(|stage| (below_name(stage), below_rules(config, shape, stage)));
    let mut hold = hold_rules(config, shape.holding.as_ref());
    // what is not held goes on as in `output`, so that no packet is asked twice
    hold.last_mut().into_iter().for_each(|(_, rules)| rules.extend(deciding_rules(config, shape)));
    let marked = config.marks_flows().then(|| (MARKED.into(), marked_rules(config, shape)));
    let output = (OUTPUT.into(), output_rules(config, shape));
    below.chain(marked).chain(hold).chain([output]).collect()
}

/// These chains as they are without cgroups: `output` alone has rules.
pub(super) fn classifying_chains(config: &Config) -> Vec<Chain> {
    let deepest_first = (0..DEPTHS.len()).rev().map(below_name);
    let marked = config.marks_flows().then(|| MARKED.to_string());
    let hold = hold_rules(config, None).into_iter().map(|(name, _)| name);
    let empty = deepest_first.chain(marked).chain(hold).map(|name| chain(name, Vec::new()));
    // the type that routes again when a chain changes the mark
    let output = chain(OUTPUT, output_rules(config, &Shape::default()));
    empty.chain([output.hooked("route", NF_INET_LOCAL_OUT, NF_IP_PRI_MANGLE)]).collect()
}

/// Rules of `output`. A packet that no target takes passes no address look-up here.
fn output_rules(config: &Config, shape: &Shape) -> Vec<Rule> {
    let mut rules = Vec::from_iter(moving_first(config));
    // cheapest test first; covers every local address, for those leave by lo
    match knows_spoofed(config) {
        false => rules.push(leaves_by_lo()),
        true => rules.push(vec![Stmt::OifLo, Stmt::jump("lo")]),
    }
    if !config.holds.is_empty() {
        // what comes from a port that was somebody else's goes on with his flow, as far as conntrack
        // knows: a datagram, and a SYN where nobody was told that his connection is over
        let hold = Stmt::goto(HOLD);
        let first = [Stmt::NotL4proto(L4::Tcp), Stmt::Fresh, Stmt::Begins];
        rules.extend(first.map(|first| vec![first, hold.clone()]));
    }
    rules.extend(deciding_rules(config, shape));
    rules
}

/// Rules of `output` for what leaves by another interface than lo and is not held.
fn deciding_rules(config: &Config, shape: &Shape) -> Vec<Rule> {
    let mut rules = Vec::new();
    // the proxy's answers to a router's clients leave by their interface; few other sockets are
    // transparent, and to ask for that is cheaper than to look up the address of every packet
    if config.routes_to_tproxy() {
        let mut rule = spoofed_rule(config);
        rule.insert(1, Stmt::Transparent);
        rules.push(rule);
    }
    if config.tproxies.is_empty() && config.gateways.iter().any(|g| g.target != Target::Direct) {
        // a client spoke in the name of who it wants to speak to, whom the kernel would answer; where
        // there is a tproxy, `spoofed_chain` does that
        let answer = [Stmt::NotTcpOrUdp, Stmt::Reply, Stmt::CtMark(spoofed(config))];
        rules.push([&answer[..], &[Stmt::drop()]].concat());
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
    if tells_clients(config) {
        rules.push(vec![Stmt::IsReset, Stmt::jump(TOLD)]);
    }
    rules.extend(default_rules(config));
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
    // what a process sends goes nowhere where its target by now, the default, has it so
    let cuts = match (config.default, config.outlet(config.default)) {
        (Target::Drop, _) => vec![vec![enter(config, Target::Drop)]],
        (_, outlet) => outlet.map_or(Vec::new(), cut_rules),
    };
    for own in [Stmt::Original, Stmt::CtMark(spoofed(config))] {
        rules.extend(cuts.iter().map(|cut| [&[own.clone(), Stmt::HasOwner], &cut[..]].concat()));
    }
    // a packet without a socket (RST or ACK after the application closed), or of a flow that began
    // under a target that its cgroup no longer has
    rules.push(jump("sticky"));
    rules.extend(default_rules(config));
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
fn default_rules(config: &Config) -> Vec<Rule> {
    // such a packet of a flow that conntrack has forgotten
    let ownerless = vec![Stmt::L4proto(L4::Tcp), Stmt::Unheard, Stmt::goto("ownerless")];
    let first = drops_ownerless(config).then_some(ownerless);
    let enters = config.default != Target::Direct;
    let last = enters.then(|| vec![enter(config, config.default)]);
    first.into_iter().chain(last).collect()
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

/// The chain that a stage's gates lead to.
fn below_name(stage: Stage) -> String {
    format!("below_{}", DEPTHS[stage])
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

fn owners_name(class: u16) -> String {
    format!("user{class}")
}

/// The chains of lines for owners, and of what comes behind such lines.
pub(super) fn owner_chains(config: &Config) -> Vec<Chain> {
    let behind = || config.outcomes().filter(|outcome| outcome.class > 0);
    let many = |class: &u16| owner_rules(config, *class).len() > FEW;
    let default = Some(config.default_outcome().class).filter(|class| *class > 0);
    let classes = behind().map(|outcome| outcome.class).filter(many).chain(default);
    let owners = |class| chain(owners_name(class), owner_rules(config, class));
    let owners = SmallSet::from_iter(classes).into_iter().map(owners);
    owners.chain(behind().map(|outcome| behind_owners_chain(config, outcome))).collect()
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
        let mut known = vec![Stmt::CtMark(mark(config, own)), to.clone()];
        let lines = config.owner_rules_before(outcome.class);
        let some_taken = lines.iter().any(|line| config.outlet(line.target).is_some());
        if own == 0 && outcome.target == Target::Direct && some_taken {
            // one that has just begun may be an owner's that conntrack has forgotten
            known.insert(1, Stmt::Heard);
        }
        rules.push(known);
        rules.push(vec![Stmt::HasOwner, to.clone()]);
        rules.push(vec![Stmt::CtMarked(config.mask), Stmt::jump("sticky")]);
        // nothing tells any more that it was not another target's
        if parts_owners(config, outcome) {
            rules.push(vec![Stmt::Unheard, Stmt::GoesOn, Stmt::drop()]);
        }
    }
    rules.push(vec![to]);
    chain(named("in", config, outcome), rules)
}

/// Whether lines for owners send elsewhere what some sockets of these cgroups send.
fn parts_owners(config: &Config, outcome: Outcome) -> bool {
    let lines = config.owner_rules_before(outcome.class);
    lines.iter().any(|line| line.target != outcome.target)
}

/// What the flow of a packet decides, where its cgroup does not.
pub(super) fn flow_chains(config: &Config) -> Vec<Chain> {
    let mut chains = Vec::from_iter(spoofed_chain(config));
    chains.extend(ownerless_chain(config).when(drops_ownerless(config)));
    chains.extend(told_chain().when(tells_clients(config)));
    chains.extend(sticky_chain(config));
    chains
}

/// Whether the default would keep from a client that its flow is over: the kernel resets it for a proxy,
/// or by `refuse_stale`, and Linux 6.12 knows no owner of that, and no cgroup. `ownerless_chain` tells of
/// flows that are unknown, too.
fn tells_clients(config: &Config) -> bool {
    config.routes_to_tproxy() && config.default != Target::Direct
}

/// Resets that no process sends, for a remote host, to a client: nobody else sends what has its address.
fn told_chain() -> Chain {
    let rules =
        [vec![Stmt::HasOwner, Stmt::back()], vec![Stmt::ForeignSource, Stmt::jump(CLIENTS)]];
    chain(TOLD, rules.to_vec())
}

const TOLD: &str = "told";

/// Of packets that go on with a connection of which conntrack knows nothing, those that no process
/// sends: nothing tells any more that it was not a proxy's. For a remote host it is a proxy's socket
/// that speaks, to a client whose flow is over; Linux 6.12 knows no owner of that. Sockets that no
/// process has any more have their cgroup, but not the owner by whom a line may have decided; those of
/// the kernel are in none below the root; and what is left of one (TIME_WAIT) has neither.
fn ownerless_chain(config: &Config) -> Chain {
    let go = match config.default {
        Target::Direct => Stmt::accept(),
        other => enter(config, other),
    };
    let mut rules = vec![vec![Stmt::HasOwner, go.clone()]];
    if config.routes_to_tproxy() {
        rules.push(spoofed_rule(config));
    }
    if parts_owners(config, config.default_outcome()) {
        // the address of one may be gone as well, which over IPv6 sends on; no cgroup that is here is in
        // that set
        let below_root = Stmt::OtherCgroup { level: 1, set: set_name(config, Target::Drop.into()) };
        rules.push(vec![Stmt::ForeignSource, Stmt::Transparent, Stmt::accept()]);
        rules.push(vec![below_root, Stmt::GoesOn, Stmt::drop()]);
    }
    rules.push(vec![Stmt::ForeignSource, Stmt::accept()]);
    rules.push(vec![Stmt::Invalid, Stmt::drop()]);
    rules.push(vec![Stmt::Bound, go.clone()]);
    rules.push(vec![Stmt::GoesOn, Stmt::drop()]);
    rules.extend((config.default != Target::Direct).then(|| vec![go]));
    chain("ownerless", rules)
}

/// What this host sends from a foreign address begins a flow: a proxy speaks for a remote host, and
/// to conntrack it spoke first, since the application's flow has been forgotten. What the
/// application sends are replies then, which are no less its own. The packet itself goes its way,
/// which is its cgroup's: an unprivileged process can send from foreign addresses too (IPV6_FREEBIND),
/// and would have what it sends next pass for answers, with a proxy or without.
fn spoofed_rule(config: &Config) -> Rule {
    begins_spoofed(config, Stmt::ForeignSource)
}

/// What leaves by lo. A process that may not speak for others and does goes where its cgroup is to go:
/// its own listener, or the kernel, would answer whom it wants to speak to.
pub(super) fn lo_chain(config: &Config) -> Option<Chain> {
    let spoofed = [spoofed_rule(config), vec![Stmt::HasOwner, Stmt::NotTransparent, Stmt::back()]];
    let mut last = vec![Stmt::accept()];
    if hijacks_local(config) {
        // the targets' chains let the rest pass
        last.insert(0, Stmt::NotDport(53));
    }
    chain("lo", vec![spoofed.concat(), last]).when(knows_spoofed(config))
}

/// Flows that are known by their ct mark. Marks that we do not know (of a tproxy that a reload took
/// away) fall through to the end of `output`: they go where what is not known goes. UDP is not
/// known by its flow: another may have used the port before, and what has no owner is a tunnel's of the
/// kernel, one flow of which carries what all kinds of processes and a router's clients send.
fn sticky_chain(config: &Config) -> Option<Chain> {
    let direct = config.direct_mark();
    let udp = Stmt::L4proto(L4::Udp);
    // whatever the flow was that its remote host began (`refuse_answer`): this does not go on with it
    let asks = vec![Stmt::Reply, Stmt::Asks, Stmt::SetCtMark(mark(config, 0)), Stmt::back()];
    let mut rules = vec![asks];
    if !config.routes.is_empty() {
        // by the way that it began by, in either direction
        let map = config.routes.iter().map(|route| by_mark("to", &route.outlet)).collect();
        rules.push(vec![Stmt::CtMarkMap { mask: config.mask, map }]);
    }
    if !config.tproxies.is_empty() {
        rules.push(vec![Stmt::CtMark(spoofed(config)), Stmt::goto("spoofed")]);
        let first = [udp.clone(), Stmt::Begins];
        rules.extend(
            first.map(|first| [vec![first, Stmt::Original], make_unknown(config)].concat()),
        );
    }
    rules.extend([udp, Stmt::Begins].map(|first| vec![first, Stmt::back()]));
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
    chain("sticky", rules).when(config.marks_flows())
}

/// What is left of a flow that a proxy began. The kernel's own packets for an application's TCP
/// socket that is gone, or for one whose cgroup has no target any more, are the proxy's: the
/// `tproxy` of any target finds the very socket that they are for. Port unreachable and the like
/// would tell the true destination. What the proxy itself sends, and what a process sends by UDP,
/// goes where its cgroup is to go.
fn spoofed_chain(config: &Config) -> Option<Chain> {
    let any = config.tproxies.first().map_or(0, |tproxy| tproxy.outlet.mark);
    let own = Stmt::SetPacketMark(mark(config, any));
    let rules = vec![
        vec![Stmt::Original, Stmt::back()],
        vec![Stmt::L4proto(L4::Tcp), own, Stmt::accept()],
        vec![Stmt::HasOwner, Stmt::back()],
        vec![Stmt::drop()],
    ];
    chain("spoofed", rules).when(!config.tproxies.is_empty())
}

/// Others restore the ct mark into packets (CONNMARK --restore-mark): a proxy's answers to a
/// router's clients, and DNS on its way to a resolver elsewhere, must not be routed to lo by that.
/// Behind theirs; a change makes the kernel route anew.
pub(super) fn unmark_chain(config: &Config) -> Option<Chain> {
    let none = Stmt::SetPacketMark(mark(config, 0));
    let mut rules = vec![vec![Stmt::PacketMark(mark(config, 0)), Stmt::accept()]];
    if !config.routes.is_empty() {
        // these go by their mark in either direction, to a resolver too
        let map = config.routes.iter().map(|route| (route.outlet.mark, Verdict::Accept)).collect();
        rules.push(vec![Stmt::PacketMarkMap { mask: config.mask, map }]);
    }
    rules.push([answers(config), vec![none.clone(), Stmt::accept()]].concat());
    rules.push(vec![Stmt::Dnatted, none, Stmt::accept()]);
    let unmark = chain("unmark", rules).hooked("route", NF_INET_LOCAL_OUT, NF_IP_PRI_SECURITY);
    unmark.when(config.routes_to_tproxy())
}
