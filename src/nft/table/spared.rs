//! What is left alone whatever the target: `bypass`, and the marks of what goes direct.

use super::sets::{ALWAYS4, ALWAYS6};
use super::shape::Entrances;
use super::words::*;
use super::{Chain, Rule};
use crate::config::Config;
use crate::net::{Family, Owner, L4};
use crate::nft::stmt::Stmt;
use crate::small::SmallSet;

/// `bypass`, and what is gone to from many chains.
pub(super) fn chains(config: &Config) -> Vec<Chain> {
    let mut chains = Vec::from_iter(leave_chain(config));
    chains.extend(chain(EXEMPT, exempt_rules(config)).when(hijacks_local(config)));
    chains.extend(local_chain(config).when(hijacks_local(config)));
    let clients = interfaces(config).map(|by| vec![Stmt::Oifname(by), Stmt::accept()]);
    let contained = config.has_containers().then(|| jump(CONTAINED));
    let clients = clients.chain(contained).collect();
    chains.extend(chain(CLIENTS, clients).when(config.routes_to_tproxy()));
    let mut bypass = spared_rules(config);
    if config.routes_to_tproxy() {
        // a proxy speaks for a remote host to its client, whose flow conntrack has forgotten: that is an
        // answer no less, where no rule names the proxy; so is a FIN or a reset, which begins no flow
        let speaks = [Stmt::CtMark(spoofed(config)), Stmt::Original, Stmt::Transparent];
        bypass.push([&speaks[..], &[Stmt::jump(CLIENTS)]].concat());
        bypass.push(vec![Stmt::Invalid, Stmt::Transparent, Stmt::jump(CLIENTS)]);
    }
    chains.extend([chain("bypass", bypass), neighbours_chain()]);
    chains
}

/// What leaves towards a router's clients, and containers.
pub(super) const CLIENTS: &str = "clients";

/// The part of it that depends on where containers come in.
pub(super) const CONTAINED: &str = "contained";

pub(super) fn contained_rules(entrances: &Entrances) -> Vec<Rule> {
    let veths = entrances.veths.values().map(|(name, _)| name);
    let all: SmallSet<&String> = veths.chain(&entrances.bridges).collect();
    all.into_iter().map(|name| vec![oifname(name), Stmt::accept()]).collect()
}

/// What `bypass` is made of where DNS is hijacked whatever its address.
pub(super) const EXEMPT: &str = "exempt";

/// What is left alone whatever the target and the address.
fn exempt_rules(config: &Config) -> Vec<Rule> {
    let mut rules = Vec::from_iter(refuse_answer(config));
    rules.push(accept_answers(config));
    rules.extend(config.bypass_marks.iter().map(|m| vec![Stmt::PacketMark(*m), leave(config)]));
    rules.extend(config.bypass_dscps.iter().flat_map(|dscp| {
        Family::BOTH.map(|family| vec![Stmt::Dscp(family, *dscp), leave(config)])
    }));
    let users = config.bypass_users.iter().map(|uid| Stmt::Owner(Owner::Users(*uid, *uid)));
    rules.extend(users.map(|users| vec![users, leave(config)]));
    rules
}

/// What is left alone whatever the target: `bypass`.
pub(super) fn spared_rules(config: &Config) -> Vec<Rule> {
    let of = |family| spared_of(config, family);
    [spared_by_others(config), of(Family::V4), of(Family::V6)].concat()
}

/// By anything but where it goes.
pub(super) fn spared_by_others(config: &Config) -> Vec<Rule> {
    match hijacks_local(config) {
        true => vec![jump(EXEMPT)],
        false => exempt_rules(config),
    }
}

/// By where it goes.
pub(super) fn spared_of(config: &Config, family: Family) -> Vec<Rule> {
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

/// What the kernel itself sends to find and tell IPv6 neighbours, to unicast addresses too. A process
/// may give its own packets that type.
pub(super) fn neighbour_discovery() -> Rule {
    vec![Stmt::NeighbourDiscovery, Stmt::jump(NEIGHBOURS)]
}

const NEIGHBOURS: &str = "neighbours";

fn neighbours_chain() -> Chain {
    chain(NEIGHBOURS, vec![vec![Stmt::HasOwner, Stmt::back()], vec![Stmt::accept()]])
}

pub(super) fn leaves_by_lo() -> Rule {
    vec![Stmt::OifLo, Stmt::accept()]
}

/// The first rules of the targets' chains: what `output` has not let pass itself, but for who speaks in
/// the name of others.
pub(super) fn local_rules(config: &Config) -> Vec<Rule> {
    match hijacks_local(config) {
        true => vec![vec![Stmt::OifLo, Stmt::jump(LOCAL)]],
        false => Vec::new(),
    }
}

const LOCAL: &str = "within";

fn local_chain(config: &Config) -> Chain {
    let own = [Stmt::New, Stmt::CtMark(spoofed(config)), Stmt::HasOwner, Stmt::NotTransparent];
    chain(LOCAL, vec![[&own[..], &[Stmt::back()]].concat(), vec![Stmt::accept()]])
}

/// What goes as if we were not there. Where somebody else's UDP has come from the port before, to
/// the same host, or his connection that nobody has answered, the flow is not known by that proxy any
/// more.
///
/// Flows that go direct say so in their ct mark where the default is not direct, or lines for owners
/// come first: the kernel's own packets for them have no socket, or no owner, and would go another
/// way. A proxy's flow stays known as such: one that it began, and one whose answers it sends, which
/// others began.
///
/// More rules than one, since a packet without conntrack ends each early.
fn leave_chain(config: &Config) -> Option<Chain> {
    let direct = mark(config, config.direct_mark());
    let mut own = vec![Stmt::Original];
    if knows_spoofed(config) {
        own.push(Stmt::NotCtMark(spoofed(config)));
    }
    // what most have is asked first
    let known = if config.marks_direct() { direct } else { mark(config, 0) };
    let mut rules = vec![vec![Stmt::CtMark(known), Stmt::accept()]];
    if !config.tproxies.is_empty() {
        // a route's is bound to the address that it left with
        let routes = config.routes.iter().flat_map(|route| ct_marks(config, route));
        let other: Rule = [Stmt::CtMarked(config.mask)]
            .into_iter()
            .chain(routes.map(Stmt::NotCtMark))
            .chain(own.clone())
            .collect();
        let rule = |first| [&[first], &other[..], &make_unknown(config)].concat();
        rules.extend([Stmt::L4proto(L4::Udp), Stmt::Begins].map(rule));
    }
    if config.marks_direct() {
        rules.push([own, vec![Stmt::SetCtMark(direct)]].concat());
    }
    rules.push(vec![Stmt::accept()]);
    chain("leave", rules).when(leaves_marks(config))
}
