//! DNS that a target hijacks: which packets they are. Where they are sent instead says `nat`.

use super::spared::EXEMPT;
use super::words::*;
use super::{Chain, Rule};
use crate::config::{Config, Outlet, Route, Take};
use crate::net::{Family, Mark, L4};
use crate::nft::stmt::Stmt;

/// DNS of a target that hijacks it: the ct mark alone selects it for `nat_output`. With the packet
/// mark too, a query for a resolver on another host would be routed to lo. A flow that is older
/// than the hijacking cannot be translated any more and goes on as the target's other traffic, or
/// nowhere (`query_rules`).
///
/// By a route the resolver is reached as everything is: the packet has its mark.
pub(super) fn dns_chain(config: &Config, outlet: &Outlet) -> Option<Chain> {
    let packet = route_of(config, outlet).map(|_| mark(config, outlet.mark));
    marked_dns_chain(outlet, mark(config, outlet.mark), "dns", packet)
}

/// The same for what is routed for others.
pub(super) fn forwarded_dns_chain(config: &Config, route: &Route) -> Option<Chain> {
    let own = mark(config, route.forward_mark);
    marked_dns_chain(&route.outlet, own, "dnsf", Some(own))
}

fn marked_dns_chain(outlet: &Outlet, own: Mark, kind: &str, packet: Option<Mark>) -> Option<Chain> {
    let accept = || {
        let set = packet.map(Stmt::SetPacketMark);
        set.into_iter().chain([Stmt::accept()])
    };
    let mut rules = vec![drop_for_others(), set_ct_mark(own)];
    rules.push([Stmt::Unconfirmed, Stmt::CtMark(own)].into_iter().chain(accept()).collect());
    rules.push([Stmt::Dnatted].into_iter().chain(accept()).collect());
    chain(own_chain(kind, outlet), rules).when(outlet.hijacks_dns())
}

/// The rules that send DNS of a target to `dns_chain`.
pub(super) fn dns_rules(outlet: &Outlet) -> Vec<Rule> {
    rules_to_dns(outlet, &own_chain("dns", outlet))
}

pub(super) fn rules_to_dns(outlet: &Outlet, chain: &str) -> Vec<Rule> {
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

/// DNS of a protocol that `dns_chain` could not take, where the target leaves other traffic alone: it
/// must not get to the resolver that was asked.
pub(super) fn query_rules(outlet: &Outlet, l4: L4) -> Vec<Rule> {
    let (take, ports) = outlet.protocol(l4);
    let others = ports.iter().any(|ports| (ports.first..=ports.last).contains(&53));
    let spares = take == Take::No || !(ports.is_empty() || others) || outlet.only.is_some();
    let hijacks = outlet.dns_protocols().any(|hijacked| hijacked == l4);
    let families = outlet.dns().map(|to| Family::of(&to.ip()));
    let families = families.filter(|family| spares || outlet.family(*family) == Take::No);
    let rule = |family| vec![Stmt::Nfproto(family), Stmt::Dport(l4, 53), Stmt::drop()];
    families.filter(|_| hijacks).map(rule).collect()
}

/// DNS that is hijacked whatever its address, ahead of everything; or else where it has its turn.
pub(super) fn dns_first(outlet: &Outlet, dns: Vec<Rule>) -> [Vec<Rule>; 2] {
    match outlet.dns_local {
        true => [[vec![jump(EXEMPT)], dns].concat(), Vec::new()],
        false => [Vec::new(), dns],
    }
}
