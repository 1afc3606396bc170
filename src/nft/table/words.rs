//! What all rooms of the table say: chains, names of a target's own, marks, and the questions to a
//! configuration that decide whether a rule is needed.

use super::{Base, Chain, Rule};
use crate::config::{Config, Outlet, Route, Target};
use crate::net::{Interface, Mark, KERNEL_TABLES};
use crate::netlink::uapi::*;
use crate::nft::expr::Verdict;
use crate::nft::stmt::Stmt;
use crate::small::SmallSet;

pub(super) fn mark(config: &Config, value: u32) -> Mark {
    Mark { value, mask: config.mask }
}

pub(super) fn chain(name: impl Into<String>, rules: Vec<Rule>) -> Chain {
    Chain { name: name.into(), base: None, rules }
}

impl Chain {
    pub(super) fn hooked(self, kind: &'static str, hook: u32, priority: i32) -> Chain {
        Chain { base: Some(Base { kind, hook, priority }), ..self }
    }

    pub(super) fn when(self, needed: bool) -> Option<Chain> {
        Some(self).filter(|_| needed)
    }

    pub(super) fn unless_empty(self) -> Option<Chain> {
        Some(self).filter(|chain| !chain.rules.is_empty())
    }
}

pub(super) fn prerouting(name: &str, priority: i32, rules: Vec<Rule>) -> Chain {
    chain(name, rules).hooked("filter", NF_INET_PRE_ROUTING, priority)
}

pub(super) fn jump(chain: &str) -> Rule {
    vec![Stmt::Verdict(Verdict::Jump(chain.into()))]
}

/// `KIND_NAME`: a chain of an outlet's own.
pub(super) fn own_chain(kind: &str, outlet: &Outlet) -> String {
    format!("{kind}_{}", outlet.name)
}

/// An entry of a map: packets with its mark go there.
pub(super) fn by_mark(kind: &str, outlet: &Outlet) -> (u32, Verdict) {
    (outlet.mark, on_to(kind, outlet))
}

/// On to such a chain.
pub(super) fn on_to(kind: &str, outlet: &Outlet) -> Verdict {
    Verdict::Goto(own_chain(kind, outlet))
}

pub(super) fn iifname(name: &str) -> Stmt {
    Stmt::Iifname(Interface { name: name.into(), prefix: false })
}

pub(super) fn oifname(name: &str) -> Stmt {
    Stmt::Oifname(Interface { name: name.into(), prefix: false })
}

/// All interfaces that clients come in by, but for containers'.
pub(super) fn interfaces(config: &Config) -> impl Iterator<Item = Interface> {
    let own = config.gateways.iter().filter(|gateway| !gateway.containers);
    let all: SmallSet<Interface> = own.flat_map(|own| own.interfaces.iter().cloned()).collect();
    all.into_iter()
}

/// The statement that hands a packet to a target.
pub(super) fn enter(config: &Config, target: Target) -> Stmt {
    Stmt::goto(format!("to_{}", config.target_name(target)))
}

/// The verdict for traffic that is to go as if we were not there.
pub(super) fn leave(config: &Config) -> Stmt {
    match leaves_marks(config) {
        false => Stmt::accept(),
        true => Stmt::goto("leave"),
    }
}

/// Whether there is more to that than to accept it.
pub(super) fn leaves_marks(config: &Config) -> bool {
    config.marks_direct() || !config.tproxies.is_empty()
}

pub(super) fn has_outlets(config: &Config) -> bool {
    config.outlets().next().is_some()
}

/// Whether what the default lets out may be what is left of a flow of some other outlet.
pub(super) fn drops_ownerless(config: &Config) -> bool {
    matches!(config.default, Target::Direct | Target::Route(_)) && has_outlets(config)
}

/// The route that an outlet is of, if it is one's.
pub(super) fn route_of<'a>(config: &'a Config, outlet: &Outlet) -> Option<&'a Route> {
    config.routes.iter().find(|route| route.outlet == *outlet)
}

/// Whether what is routed for others may belong to an outlet.
pub(super) fn hands_over(config: &Config) -> bool {
    config.routes_to_tproxy() || config.forwards()
}

/// Whether DNS that stays on this host may be hijacked, so that `output` cannot pass all of lo.
pub(super) fn hijacks_local(config: &Config) -> bool {
    config.outlets().any(|outlet| outlet.dns_local)
}

/// Whether flows that begin from foreign addresses are known as such: where anything is taken of what
/// processes or clients send, answers are spared, and nobody may make his own packets look like some.
pub(super) fn knows_spoofed(config: &Config) -> bool {
    let held = !config.holds.is_empty() || !config.gateways.is_empty();
    has_outlets(config) || config.decides(Target::Drop) || held
}

/// The ct mark of flows that a proxy began (`spoofed_rule`).
pub(super) fn spoofed(config: &Config) -> Mark {
    mark(config, config.spoofed_mark())
}

/// The rule that makes them known.
pub(super) fn begins_spoofed(config: &Config, from: Stmt) -> Rule {
    let unknown = Stmt::CtMark(mark(config, 0));
    vec![Stmt::New, unknown, from, Stmt::SetCtMark(spoofed(config))]
}

/// What a process that may not speak for others sends in another's name, which IPv6 lets everybody do
/// (IPV6_FREEBIND).
pub(super) fn for_others() -> Vec<Stmt> {
    vec![Stmt::HasOwner, Stmt::NotTransparent, Stmt::ForeignSource]
}

/// It would be answered by the proxy or the resolver, or refused, to who did not send it.
pub(super) fn drop_for_others() -> Rule {
    [vec![Stmt::Fresh], for_others(), vec![Stmt::drop()]].concat()
}

/// A packet that answers whoever spoke first, if that was not a proxy for somebody else.
pub(super) fn answers(config: &Config) -> Vec<Stmt> {
    let mut test = vec![Stmt::Reply];
    if knows_spoofed(config) {
        test.push(Stmt::NotCtMark(spoofed(config)));
    }
    test
}

pub(super) fn accept_answers(config: &Config) -> Rule {
    [answers(config), vec![Stmt::accept()]].concat()
}

/// What asks for a connection is no answer, though the remote host has tried to begin one between the
/// same ports before, as anybody can who knows whom his packets reach.
pub(super) fn refuse_answer(config: &Config) -> Option<Rule> {
    let refuse = vec![Stmt::Reply, Stmt::Asks, Stmt::SetCtMark(spoofed(config))];
    knows_spoofed(config).then_some(refuse)
}

/// Where its remote host has had a connection between these ports, which conntrack takes for alive, it
/// can make nothing of the SYN, and takes what follows for answers. Whoever sent it tries another port.
pub(super) fn refuse_stale() -> Rule {
    vec![Stmt::Invalid, Stmt::Asks, Stmt::Reset]
}

/// A rule that makes a flow known: the flow of who spoke first. What is left of a flow that a proxy
/// began is known by that.
pub(super) fn set_ct_mark(own: Mark) -> Rule {
    vec![Stmt::Original, Stmt::SetCtMark(own)]
}

/// The same for what this host sends. Of what a proxy begins for a remote host the client's packets are
/// no answers, whoever the flow is given to.
pub(super) fn set_own_ct_mark(config: &Config, own: Mark) -> Rule {
    let mut rule = set_ct_mark(own);
    if config.routes_to_tproxy() {
        rule.insert(1, Stmt::NotCtMark(spoofed(config)));
    }
    rule
}

/// What makes a flow one that nobody knows. Others restore the ct mark into packets (CONNMARK
/// --restore-mark), before us or behind us: this one has none, and none will be restored.
pub(super) fn make_unknown(config: &Config) -> Vec<Stmt> {
    let none = mark(config, 0);
    vec![Stmt::SetCtMark(none), Stmt::SetPacketMark(none)]
}

/// Whether it is known by which interfaces a route leaves. By the main table that may be any.
pub(super) fn keeps_course(route: &Route) -> bool {
    !KERNEL_TABLES.contains(&route.table)
}

/// The ct marks of a route's flows: this host's, and routed ones.
pub(super) fn ct_marks(config: &Config, route: &Route) -> impl Iterator<Item = Mark> {
    let own = mark(config, route.outlet.mark);
    let routed = config.forwards().then(|| mark(config, route.forward_mark));
    std::iter::once(own).chain(routed)
}

/// The ct mark of routed flows of a target. With a route another than that of this host's own, since
/// what this host sends in those (a reset) goes to the client.
pub(super) fn routed_ct_mark(config: &Config, outlet: &Outlet) -> Mark {
    mark(config, route_of(config, outlet).map_or(outlet.mark, |route| route.forward_mark))
}
