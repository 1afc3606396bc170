//! Hook prerouting, late: what comes back in by lo is handed to its proxy ([`prerouting_chain`]), and
//! what comes in by a route finds its way. What is routed for others is in `gateway`.

use std::net::{IpAddr, Ipv4Addr};

use super::words::*;
use super::{Chain, Rule};
use crate::config::{Config, Outlet, Route, Tproxy};
use crate::net::{Family, L4};
use crate::netlink::uapi::*;
use crate::nft::expr::Verdict;
use crate::nft::stmt::Stmt;

/// What each target of its own goes on to: those of `gateway` do so, too.
pub(super) fn target_chains(config: &Config) -> Vec<Chain> {
    let mut chains = Vec::new();
    chains.extend(config.tproxies.iter().map(|tproxy| receive_chain(config, tproxy)));
    chains.extend(config.routes.iter().map(|route| closed_chain(&route.outlet)));
    chains
}

/// The hook, and what it alone goes to.
pub(super) fn chains(config: &Config) -> Vec<Chain> {
    let mut chains = Vec::from_iter(regain_chain(config));
    chains.extend(remark_chain(config));
    chains.extend(prerouting_chain(config));
    chains.extend(martians_chain(config));
    chains
}

/// Where the packets of local processes come back in. Late, since Linux takes no packet that has
/// its socket for a loopback one any more: firewalld's look-up of the way back, in a chain of
/// priority 10, would drop it.
fn prerouting_chain(config: &Config) -> Option<Chain> {
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
    prerouting("prerouting", NF_IP_PRI_SECURITY, rules).when(has_outlets(config))
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

/// What comes in by a route: a look-up of the way back (rp_filter with src_valid_mark = 1) has to find
/// its interface, and what others begin by it is answered by it.
fn return_rules(config: &Config, route: &Route) -> Vec<Rule> {
    let own = mark(config, route.outlet.mark);
    let (begun, first) = match &*route.interface {
        "" => (
            keeps_course(route).then(|| vec![Stmt::New, Stmt::jump(back_name(route))]),
            Stmt::Reply,
        ),
        name => (Some(begun_rule(config, route, name)), iifname(name)),
    };
    let known = ct_marks(config, route);
    let known = known.map(|ct| vec![first.clone(), Stmt::CtMark(ct), Stmt::SetPacketMark(own)]);
    begun.into_iter().chain(known).collect()
}

/// The chain for what comes in by the interfaces that a table of others leads out by.
pub(super) fn back_name(route: &Route) -> String {
    own_chain("back", &route.outlet)
}

/// What others begin by an interface of a route, or go on with when conntrack has forgotten it, where
/// the main table would lead elsewhere.
pub(super) fn begun_rule(config: &Config, route: &Route, name: &str) -> Rule {
    vec![
        iifname(name),
        Stmt::New,
        Stmt::CtMark(mark(config, 0)),
        Stmt::Local,
        Stmt::ComesFromElsewhere(name.into()),
        Stmt::SetCtMark(mark(config, route.outlet.mark)),
    ]
}

/// The mark of an application's packet was overwritten with that of a flow that a proxy began: by
/// another program that restores ct marks. Where there is one proxy, it is known which. Else the
/// packet finds the proxy by the socket that is for its address alone, or is no more: it must not
/// reach this host's own wildcard sockets.
fn regain_chain(config: &Config) -> Option<Chain> {
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
    chain("regain", rules).when(!config.tproxies.is_empty())
}

/// A routed packet that has its socket already gets the mark by which it is routed to that. Hijacked
/// DNS goes where it was translated to.
fn remark_chain(config: &Config) -> Option<Chain> {
    let set = |value| Stmt::SetPacketMark(mark(config, value));
    let rules = vec![
        accept_answers(config),
        vec![Stmt::Dnatted, set(0), Stmt::accept()],
        vec![set(config.gateway_mark()), Stmt::accept()],
    ];
    chain("remark", rules).when(config.routes_to_tproxy())
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
