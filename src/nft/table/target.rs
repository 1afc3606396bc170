//! The chains that a packet comes to once its target is known: `to_drop`, `to_direct`, and `to_NAME` of a
//! tproxy ([`to_chains`]) or a route ([`way_chains`]). Below these, what both have in common with what
//! is routed for others: switches, ports, destinations.

use super::dns::{dns_chain, dns_first, dns_rules, query_rules};
use super::sets::{has_ranges, ports_name, range_name, BYPASS, ONLY};
use super::spared::{local_rules, neighbour_discovery, spared_by_others, spared_of};
use super::words::*;
use super::{Chain, Rule};
use crate::config::{Config, Outlet, Route, Take, QUIC_PORTS};
use crate::net::{Family, Ranges, L4};
use crate::nft::stmt::Stmt;

/// The chains of all targets but direct, whose chain leads back to these by the marks of flows.
pub(super) fn chains(config: &Config) -> Vec<Chain> {
    let mut chains = vec![chain("to_drop", [local_rules(config), drop_rules(config)].concat())];
    chains.extend(refuse_chain().when(config.outlets().any(Outlet::rejects)));
    for outlet in config.outlets() {
        chains.extend(cut_chain(outlet));
        chains.extend(dns_chain(config, outlet));
        chains.extend(match route_of(config, outlet) {
            None => to_chains(config, outlet),
            Some(route) => way_chains(config, route),
        });
    }
    chains
}

/// Each packet comes by here: a jump would cost it as much as two of these rules, and what is another
/// family's as much as all else.
fn drop_rules(config: &Config) -> Vec<Rule> {
    let drop = || vec![Stmt::Counter, Stmt::drop()];
    let mut rules = [spared_by_others(config), spared_of(config, Family::V4)].concat();
    rules.push([vec![Stmt::Nfproto(Family::V4)], drop()].concat());
    rules.extend(spared_of(config, Family::V6));
    // with default = drop, IPv6 neighbours would be lost
    rules.push(neighbour_discovery());
    rules.push(drop());
    rules
}

/// A TCP flow that began proxied could not survive a move to another path, so it stays.
pub(super) fn direct_chain(config: &Config) -> Chain {
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

/// The chains by which a target takes packets of this host's processes.
fn to_chains(config: &Config, outlet: &Outlet) -> Vec<Chain> {
    let [mut rules, dns] = dns_first(outlet, dns_rules(outlet));
    rules.extend(local_rules(config));
    rules.extend(short_cuts(config, outlet));
    rules.push(jump("bypass"));
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
    rules.extend([drop_for_others(), refuse_stale(), set_own_ct_mark(config, own), take]);
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
    match cut_rules(outlet) {
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
    rules.push(jump("bypass"));
    // where this is the default
    rules.push(neighbour_discovery());
    rules.extend(bypass_rules(outlet, &leave(config)));
    rules.push(vec![Stmt::Counter]);
    rules.extend(sorting_rules(outlet, dns, &leave(config)));
    rules.extend([drop_for_others(), refuse_stale()]);
    rules.push(vec![Stmt::L4proto(L4::Tcp), Stmt::Confirmed, Stmt::Reset]);
    // what began with another address goes on with it, and would tell whoever is behind the route
    if route.masquerades() {
        rules.push(vec![Stmt::Confirmed, Stmt::drop()]);
    }
    rules.extend([set_own_ct_mark(config, own), out]);
    chains.push(chain(own_chain("to", outlet), rules));
    chains
}

/// Most packets of a target: those of a flow that was found to be its own. Nothing that may have
/// changed since is left out but ports (`other_udp_ports`): what the target does not take, where TCP
/// does not stay with it, DNS that is translated, and marks and users that are left alone. What the
/// bypass of all targets has got since then holds for new flows, and so do the destinations of a
/// target for UDP (`known_rules`).
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
fn other_udp_ports(outlet: &Outlet) -> Vec<u16> {
    let mut others = Vec::new();
    if outlet.quic != Take::Yes {
        others.extend(QUIC_PORTS);
    }
    let hijacks = outlet.dns_protocols().any(|l4| l4 == L4::Udp);
    if hijacks && !outlet.takes_port(L4::Udp, 53) {
        others.push(53);
    }
    others.sort_unstable();
    others
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
pub(super) fn known_rules(config: &Config, outlet: &Outlet, keep: &str) -> Vec<Rule> {
    let mut tcp = vec![Stmt::L4proto(L4::Tcp), Stmt::CtMarked(config.mask)];
    // one that began directly under a policy before may bear its mark, whether or not this one marks any
    if config.outlets().all(|outlet| outlet.mark != config.direct_mark()) {
        tcp.push(Stmt::NotCtMark(mark(config, config.direct_mark())));
    }
    tcp.push(Stmt::GoesOn);
    let udp = vec![Stmt::L4proto(L4::Udp), Stmt::CtMark(mark(config, outlet.mark))];
    let all = [Some(tcp).filter(|_| spares_tcp(outlet)), Some(udp).filter(|_| outlet.picks())];
    let rule = |which: Rule| [which, vec![Stmt::Counter, Stmt::goto(keep)]].concat();
    all.into_iter().flatten().map(rule).collect()
}

/// Such flows. Of UDP, all but the destination decides as for others; TCP is dropped and rejected
/// no less. `take` is what is done with the rest.
pub(super) fn keep_chain(outlet: &Outlet, name: String, take: Rule, leave: &Stmt) -> Chain {
    let mut rules = Vec::new();
    if outlet.hijacks_dns() {
        rules.push(vec![Stmt::Dnatted, Stmt::accept()]);
    }
    rules.extend(cut_rules(outlet));
    if outlet.picks() {
        rules.extend(query_rules(outlet, L4::Udp));
        let of_udp = |rule: Rule| [vec![Stmt::L4proto(L4::Udp)], rule].concat();
        rules.extend(switches(outlet, Take::No, leave).into_iter().map(of_udp));
        rules.extend(port_rules(outlet, L4::Udp, leave));
    }
    rules.push(take);
    chain(name, rules)
}

/// What becomes of packets of an outlet by their protocol, port and destination: hijacked (by `dns`),
/// left alone or refused.
pub(super) fn sorting_rules(outlet: &Outlet, dns: Vec<Rule>, leave: &Stmt) -> Vec<Rule> {
    let queries = [L4::Udp, L4::Tcp].map(|l4| query_rules(outlet, l4)).concat();
    [dns, queries, only_rules(outlet, leave), switch_rules(outlet, leave)].concat()
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
    let others = match has_ranges(ports) {
        true => Stmt::OutOfPorts { l4, set: ports_name(l4, outlet) },
        false => Stmt::OtherDports(l4, ports.iter().map(|range| range.first).collect()),
    };
    (!ports.is_empty()).then(|| vec![others, leave.clone()])
}

/// What an outlet drops or rejects, by its switches, of what began before. Of TCP that is not what it
/// leaves alone by now for its destination; of UDP that is not looked up ([`known_rules`]).
pub(super) fn cut_rules(outlet: &Outlet) -> Vec<Rule> {
    let mut cuts = all_cuts(outlet);
    if !cuts.is_empty() && outlet.picks() {
        cuts.iter_mut().for_each(|rule| rule.insert(0, Stmt::NotL4proto(L4::Tcp)));
        cuts.push(vec![Stmt::L4proto(L4::Tcp), Stmt::jump(own_chain("cut", outlet))]);
    }
    cuts
}

/// The chain that these rules jump to.
fn cut_chain(outlet: &Outlet) -> Option<Chain> {
    let cuts = all_cuts(outlet);
    let spared = [bypass_rules(outlet, &Stmt::back()), only_rules(outlet, &Stmt::back())].concat();
    let is_used = !cuts.is_empty() && outlet.picks();
    is_used.then(|| chain(own_chain("cut", outlet), [spared, cuts].concat()))
}

fn all_cuts(outlet: &Outlet) -> Vec<Rule> {
    [Take::Drop, Take::Reject].map(|take| switches(outlet, take, &Stmt::accept())).concat()
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
    let told = [vec![Stmt::L4proto(L4::Tcp), Stmt::Reset], vec![Stmt::Unreachable]];
    chain(REFUSE, [&[drop_for_others()], &told[..]].concat())
}

/// Destinations that a target leaves alone.
pub(super) fn bypass_rules(outlet: &Outlet, leave: &Stmt) -> Vec<Rule> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn udp_ports_that_have_no_short_cut() {
        let others = |lines: &str| {
            let text = format!("[tproxy p]\nport = 1\n{lines}");
            let config = testing::config(text.leak());
            let ports = other_udp_ports(&config.tproxies[0].outlet);
            ports.iter().map(u16::to_string).collect::<Vec<_>>().join(" ")
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
