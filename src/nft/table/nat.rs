//! Addresses that are translated: of hijacked DNS, to the resolver and back; of a route, what it sends.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::words::*;
use super::{Chain, Rule};
use crate::config::{Config, Outlet, Route};
use crate::net::{Family, L4};
use crate::netlink::uapi::*;
use crate::nft::stmt::Stmt;

/// The hijacking itself, of flows that `dns_chain` has chosen. A router's clients cannot be sent to
/// a loopback address: for them it stands for this host's address on their interface.
pub(super) fn nat_chain(config: &Config, name: &str, hook: u32) -> Chain {
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

/// The same for a router's clients: what comes in by another interface cannot come from a loopback
/// address, but from the very address that was asked. Of several that their interface has, that is
/// the first, which need not be the one that leads to the client. TCP knows by which it was asked.
/// To a link-local address there is a way back by its interface alone.
pub(super) fn routed_answer_chain(config: &Config) -> Option<Chain> {
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

/// Where source addresses are translated.
pub(super) fn source_chain(config: &Config) -> Option<Chain> {
    let rules = [answer_rules(config), masquerade_rules(config)].concat();
    // before others, as in `nat_chain`
    chain("nat_postrouting", rules)
        .hooked("nat", NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC - 1)
        .unless_empty()
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
