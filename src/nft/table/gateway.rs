//! What is routed for others: by section in hook prerouting ([`gateways_chain`]), what their targets do
//! with it (`forward_NAME`), what arrives at this host ([`input_chain`]), and containers' entrances.

use super::dns::{dns_first, dns_rules, forwarded_dns_chain, rules_to_dns};
use super::sets::{range_name, SOURCE};
use super::shape::Entrances;
use super::spared::{contained_rules, spared_rules, CONTAINED};
use super::target::{bypass_rules, keep_chain, known_rules, sorting_rules};
use super::words::*;
use super::{Chain, Rule};
use crate::config::{Config, Gateway, Outlet, Route, Target, Tproxy};
use crate::net::{Family, Interface, L4};
use crate::netlink::uapi::*;
use crate::nft::stmt::Stmt;
use crate::small::SmallSet;

/// The hooks of what is routed for others, and what they go to.
pub(super) fn chains(config: &Config) -> Vec<Chain> {
    let mut chains = Vec::new();
    if config.routes_to_tproxy() {
        chains.extend(config.tproxies.iter().flat_map(|t| forward_chains(config, &t.outlet)));
    }
    if config.forwards() {
        let routes = || config.routes.iter();
        chains.extend(routes().filter_map(|route| forwarded_dns_chain(config, route)));
        chains.extend(routes().map(|route| forward_way_chain(config, route)));
    }
    if hands_over(config) {
        chains.extend([routed_chain(config), input_chain(config)]);
    }
    let empty = by_entrances(config, &Entrances::default()).into_iter();
    chains.extend(empty.map(|(name, rules)| chain(name, rules)));
    chains.extend(config.gateways.iter().map(|gateway| gateway_chain(config, gateway)));
    if !config.gateways.is_empty() {
        let last = [astray_clients_chain(config), older_chain(config), gateways_chain(config)];
        chains.extend(last);
    }
    chains
}

/// What is routed for others, by section. Before addresses are translated. A mark that says which
/// container's a packet is has to be read before others restore that of its flow.
fn gateways_chain(config: &Config) -> Chain {
    let mut rules = vec![vec![Stmt::IifLo, Stmt::accept()]];
    let none = mark(config, 0);
    let by = interfaces(config).map(Stmt::Iifname);
    let of_containers = config.has_containers().then_some(Stmt::NotPacketMark(none));
    rules.extend(by.chain(of_containers).map(|client| {
        vec![client, Stmt::New, Stmt::CtMark(none), Stmt::ComesAstray, Stmt::jump(ASTRAY)]
    }));
    rules.extend(config.gateways.iter().flat_map(|g| gateway_rules(config, g)));
    let takes = config.gateways.iter().any(|gateway| gateway.target != Target::Direct);
    if takes {
        let unknown = vec![Stmt::New, Stmt::CtMark(none), Stmt::GoesOn];
        rules.push([unknown, jump(OLDER)].concat());
    }
    if hands_over(config) {
        rules.push(vec![Stmt::CtMarked(config.mask), Stmt::goto("routed")]);
    }
    prerouting("gateways", priority_of_gateways(config.has_containers()), rules)
}

/// Who speaks in another's name, to himself or another client by us: whom that is sent to would seem to
/// answer, whatever his target is by then. To elsewhere it may be a client whose answers come by another
/// way, and is left as it is.
fn astray_clients_chain(config: &Config) -> Chain {
    let back = std::iter::once(Stmt::LeadsBack);
    let to = back.chain(interfaces(config).map(Stmt::LeadsTo));
    chain(ASTRAY, to.map(|to| vec![to, Stmt::SetCtMark(spoofed(config))]).collect())
}

const ASTRAY: &str = "astray";

/// Who goes on with a routed connection of which conntrack knows nothing (it is older than the table) did
/// not begin it: the client's packets are no answers.
fn older_chain(config: &Config) -> Chain {
    let set = vec![Stmt::SetCtMark(spoofed(config))];
    chain(OLDER, vec![vec![Stmt::Local, Stmt::back()], set])
}

const OLDER: &str = "older";

/// Where that chain stands.
pub fn priority_of_gateways(has_containers: bool) -> i32 {
    match has_containers {
        true => NF_IP_PRI_CONNTRACK + 1,
        false => NF_IP_PRI_MANGLE,
    }
}

/// One rule for each interface, and for each family where there are sources.
fn gateway_rules(config: &Config, gateway: &Gateway) -> Vec<Rule> {
    if gateway.containers {
        // while flows move there may be none left, and without a mark is what everybody sends
        let known = config.container_mark(gateway.target).map(|value| {
            vec![Stmt::PacketMark(mark(config, value)), Stmt::goto(gateway_name(gateway))]
        });
        return known.into_iter().collect();
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
    if gateway.target != Target::Direct && knows_spoofed(config) {
        // to a process of this host, in the name of who that wants to speak to. TCP is more than one
        // packet, and its services answer whoever asks
        let other = vec![Stmt::NotL4proto(L4::Tcp)];
        rules.push([other, begins_spoofed(config, Stmt::ComesAstray)].concat());
    }
    // as in `drop_rules`
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
            // bridged by this host, where br_netfilter shows us what is bridged; what is routed has
            // but the type of such
            rules.push(vec![Stmt::NeighbourDiscovery, Stmt::LeadsBack, Stmt::accept()]);
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

/// What a route takes of what is routed for others.
fn forward_way_chain(config: &Config, route: &Route) -> Chain {
    let outlet = &route.outlet;
    let mut rules = bypass_rules(outlet, &Stmt::accept());
    let dns = rules_to_dns(outlet, &own_chain("dnsf", outlet));
    rules.extend(sorting_rules(outlet, dns, &Stmt::accept()));
    let own = mark(config, route.forward_mark);
    rules.push(refuse_stale());
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
    rules.extend([refuse_stale(), set_ct_mark(own), take]);
    chains.push(chain(own_chain("forward", outlet), rules));
    chains
}

/// Routed flows that are known by their ct mark: they stay with their proxy until they end. A connection
/// that nobody has answered has not begun; a route's is bound to the address that it left with.
fn routed_chain(config: &Config) -> Chain {
    let mut rules = vec![vec![Stmt::Reply, Stmt::accept()]];
    if config.routes_to_tproxy() {
        let routes = config.routes.iter().flat_map(|route| ct_marks(config, route));
        let others = routes.chain([spoofed(config)]).map(Stmt::NotCtMark);
        let begins = [Stmt::Begins].into_iter().chain(others).chain(make_unknown(config));
        rules.push(begins.chain([Stmt::accept()]).collect());
    }
    let stay = |outlet| (routed_ct_mark(config, outlet).value, on_to("forward", outlet));
    let map = config.outlets().map(stay).collect();
    rules.push(vec![Stmt::CtMarkMap { mask: config.mask, map }]);
    chain("routed", rules)
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

/// The chain that hooks in where a veth's packets come in, ahead of any bridge; by its index.
pub fn veth_name(index: u32) -> String {
    format!("veth_{index}")
}

/// Its one rule: from here on the packet is known as one of a container with that target. `None`
/// where that is not needed, or no mark is left to say so.
pub fn veth_rule(config: &Config, target: Target) -> Option<Rule> {
    match (config.container_mark(target), target) {
        // the chain of before stands behind it for a moment more, with another mark
        (Some(value), _) => {
            Some(vec![Stmt::PacketMark(mark(config, 0)), Stmt::SetPacketMark(mark(config, value))])
        }
        (None, Target::Drop) => Some(vec![Stmt::drop()]),
        (None, _) => None,
    }
}

/// The chains whose rules depend on where containers come in, with their rules.
pub fn by_entrances(config: &Config, entrances: &Entrances) -> Vec<(String, Vec<Rule>)> {
    let mut chains = vec![(BRIDGED.into(), bridged_rules(&entrances.bridges))];
    if config.routes_to_tproxy() {
        chains.push((CONTAINED.into(), contained_rules(entrances)));
    }
    chains.retain(|_| config.has_containers());
    chains
}

/// What containers send to others on the bridge that they are on.
const BRIDGED: &str = "bridged";

/// What a container sends to others on its bridge. Without br_netfilter it is not seen, and with it
/// it has to be left alone as well.
fn bridged_rules(bridges: &SmallSet<String>) -> Vec<Rule> {
    let rule = |name: &String| {
        let bridge = Interface { name: name.clone(), prefix: false };
        vec![Stmt::Iifname(bridge.clone()), Stmt::LeadsTo(bridge), Stmt::accept()]
    };
    bridges.iter().map(rule).collect()
}
