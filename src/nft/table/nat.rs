//! Addresses that are translated: of hijacked DNS, to the resolver and back; of a route, what it sends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::words::*;
use super::{Chain, Rule};
use crate::config::{Config, Outlet, Route};
use crate::net::{Family, L4};
use crate::netlink::uapi::*;
use crate::nft::stmt::Stmt;

pub(super) fn chains(config: &Config) -> Vec<Chain> {
    let mut chains = Vec::from_iter(nat_chain(config, "nat_output", NF_INET_LOCAL_OUT));
    if hands_over(config) {
        chains.extend(nat_chain(config, "nat_prerouting", NF_INET_PRE_ROUTING));
    }
    chains.extend(routed_answer_chain(config));
    chains.extend(source_chain(config));
    chains
}

/// The hijacking itself, of flows that `dns_chain` has chosen. A router's clients cannot be sent to
/// a loopback address: for them it stands for this host's address on their interface.
fn nat_chain(config: &Config, name: &str, hook: u32) -> Option<Chain> {
    let routed = hook == NF_INET_PRE_ROUTING;
    let rule = |(outlet, l4, to): (&Outlet, L4, SocketAddr)| {
        let own = Stmt::CtMark(match routed {
            true => routed_ct_mark(config, outlet),
            false => mark(config, outlet.mark),
        });
        let dport = Stmt::Dport(l4, 53);
        match routed && to.ip().is_loopback() {
            false => vec![own, dport, Stmt::Dnat(to)],
            true => {
                let family = Stmt::Nfproto(Family::of(&to.ip()));
                vec![own, family, dport, Stmt::Redirect(to.port())]
            }
        }
    };
    let rules = hijacked(config).map(rule).collect();
    // the first chain that translates a flow decides: before others, whoever came first
    chain(name, rules).hooked("nat", hook, NF_IP_PRI_NAT_DST - 1).unless_empty()
}

/// DNS that is hijacked: whose, of which protocol, and where it goes.
fn hijacked(config: &Config) -> impl Iterator<Item = (&Outlet, L4, SocketAddr)> {
    config.outlets().flat_map(|outlet| {
        let to = move |l4| outlet.dns().map(move |to| (outlet, l4, to));
        outlet.dns_protocols().flat_map(to)
    })
}

/// That which goes to a resolver here.
fn hijacked_here(config: &Config) -> impl Iterator<Item = (&Outlet, L4, SocketAddr)> {
    hijacked(config).filter(|(_, _, to)| to.ip().is_loopback())
}

/// The same for a router's clients: what comes in by another interface cannot come from a loopback
/// address, but from the very address that was asked. Of several that their interface has, that is
/// the first, which need not be the one that leads to the client. TCP knows by which it was asked.
/// To a link-local address there is a way back by its interface alone.
fn routed_answer_chain(config: &Config) -> Option<Chain> {
    let udp = |(_, l4, _): &(&Outlet, L4, SocketAddr)| *l4 == L4::Udp && hands_over(config);
    let rule = |(outlet, l4, to): (&Outlet, L4, SocketAddr)| {
        let family = Family::of(&to.ip());
        let mut rule = vec![Stmt::CtMark(routed_ct_mark(config, outlet)), Stmt::Dnatted];
        rule.extend((family == Family::V6).then_some(Stmt::NotLinkLocal));
        rule.extend([Stmt::Dport(l4, to.port()), Stmt::SnatToDestination(family)]);
        rule
    };
    let rules = hijacked_here(config).filter(udp).map(rule).collect();
    // before others, as in `nat_chain`
    chain("nat_input", rules).hooked("nat", NF_INET_LOCAL_IN, NF_IP_PRI_NAT_SRC - 1).unless_empty()
}

/// Where source addresses are translated.
fn source_chain(config: &Config) -> Option<Chain> {
    let rules = [answer_rules(config), masquerade_rules(config)].concat();
    // before others, as in `nat_chain`
    chain("nat_postrouting", rules)
        .hooked("nat", NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC - 1)
        .unless_empty()
}

/// A resolver on a wildcard address answers from the address that leads to whoever asked, unless it
/// goes to some lengths (IP_PKTINFO). Asked from a loopback address, it answers from that.
fn answer_rules(config: &Config) -> Vec<Rule> {
    let rule = |(outlet, l4, to): (&Outlet, L4, SocketAddr)| {
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
    };
    hijacked_here(config).map(rule).collect()
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
                name => vec![rule(Some(oifname(name))), rule(Some(Stmt::OifLo))],
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
