//! Hook postrouting: nothing that is marked leaves by another interface than its own ([`guard_chain`]).

use super::prerouting::{back_name, begun_rule};
use super::shape::Devices;
use super::words::*;
use super::{Chain, Rule};
use crate::config::{Config, Outlet, Route};
use crate::net::L4;
use crate::netlink::uapi::*;
use crate::nft::expr::Verdict;
use crate::nft::stmt::Stmt;

/// The guard, and what it goes to.
pub(super) fn chains(config: &Config) -> Vec<Chain> {
    let mut chains = Vec::from_iter(sourceless_chain(config));
    chains.extend(strayed_chain(config));
    chains.extend(config.tproxies.iter().map(|tproxy| astray_chain(&tproxy.outlet)));
    chains.extend(config.routes.iter().flat_map(off_course_chains));
    chains.extend(config.routes.iter().map(|route| here_chain(&route.outlet)));
    chains.extend(home_chain(config));
    chains.extend(guard_chain(config));
    chains
}

/// A marked packet that is not on its way to lo: the ip rules or the route are missing. It must not
/// leave by another interface. In postrouting, since `oif` of the output hook stays what it was
/// before the mark.
fn guard_chain(config: &Config) -> Option<Chain> {
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
        rules.push(vec![own, oifname(&first.interface), Stmt::accept()]);
    }
    rules.push(vec![Stmt::OifLo, home]);
    if !map.is_empty() {
        rules.push(vec![Stmt::PacketMarkMap { mask: config.mask, map }]);
    }
    let guard = chain("guard", rules).hooked("filter", NF_INET_POST_ROUTING, NF_IP_PRI_MANGLE);
    guard.when(has_outlets(config))
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
            chain(back_name(route), Vec::new()),
            chain(name, vec![jump(&ways_name(route)), rest]),
        ],
        (true, own) => vec![chain(name, [course_rules([own].into_iter()), vec![rest]].concat())],
    }
}

/// The rules that let packets leave by these interfaces.
fn course_rules<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<Rule> {
    let leave = names.clone().map(|name| vec![oifname(name), Stmt::accept()]);
    leave.chain(names.map(|name| vec![iifname(name), Stmt::Reply, Stmt::accept()])).collect()
}

/// The chain whose rules depend on what another program's table holds.
fn ways_name(route: &Route) -> String {
    own_chain("ways", &route.outlet)
}

/// The chains whose rules depend on what tables of others hold, with these.
pub fn ways(config: &Config, devices: &Devices) -> Vec<(String, Vec<Rule>)> {
    let learned = config.routes.iter().filter(|route| route.table != 0 && keeps_course(route));
    let chains = |route: &Route| {
        let names = devices.get(&route.table).into_iter().flatten().map(String::as_str);
        let back = names.clone().map(|name| begun_rule(config, route, name)).collect();
        [(ways_name(route), course_rules(names)), (back_name(route), back)]
    };
    learned.flat_map(chains).collect()
}

/// What is marked and on its way to this host.
fn home_chain(config: &Config) -> Option<Chain> {
    let map = config.routes.iter().map(|route| by_mark("here", &route.outlet)).collect();
    let home = chain("home", vec![vec![Stmt::PacketMarkMap { mask: config.mask, map }]]);
    home.when(!config.routes.is_empty())
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

/// Such packets of a target: most often of a socket that is bound to another device.
fn astray_chain(outlet: &Outlet) -> Chain {
    chain(own_chain("astray", outlet), vec![vec![Stmt::Counter, Stmt::drop()]])
}

/// The same for routed packets. Answers to them may bear their mark (the sysctls fwmark_reflect and
/// tcp_fwmark_accept) and go their way.
fn strayed_chain(config: &Config) -> Option<Chain> {
    let rules = vec![
        accept_answers(config),
        vec![Stmt::Original, Stmt::CtMark(spoofed(config)), Stmt::accept()],
        vec![Stmt::Counter, Stmt::drop()],
    ];
    chain("strayed", rules).when(!config.tproxies.is_empty())
}

/// An interface that has just lost its address: masquerading would have taken that of another, and
/// the answers would come in by that. Behind it, and before conntrack knows the flow.
fn sourceless_chain(config: &Config) -> Option<Chain> {
    let masqueraded = config.routes.iter().filter(|route| route.masquerades());
    let mut rules: Vec<Rule> = masqueraded
        .filter(|route| !route.interface.is_empty())
        .flat_map(|route| {
            ct_marks(config, route).map(|own| {
                let out = oifname(&route.interface);
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
