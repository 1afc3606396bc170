//! Which flows conntrack has that cannot go the way that is theirs by now: it translates the first
//! packet of a flow or none, so that one that began otherwise never leaves by a masqueraded route
//! with an address that answers come back to, and one of a route goes on by that. By what is in
//! force alone, whatever was before. Pure.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::{Fate, Fates};
use crate::cgroup::core::Core;
use crate::config::{spoofed_mark, Config, Gateway, Outcome, Route, Take, Target};
use crate::net::{Family, Mark, L4};
use crate::netlink::conntrack::Tracked;
use crate::netlink::diag::SeenSocket;
use crate::netlink::uapi::IPPROTO_UDP;
use crate::nft::view::View;
use crate::policy;
use crate::small::SmallSet;

/// What is to be done about a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cure {
    /// It begins anew with its next packet.
    Forget,
    /// It is to go on by the address and the port that are its own, with this mark.
    Release(Mark),
    /// It is to be known with this mark, and the address that packets of the route leave with. If it
    /// were forgotten and the remote host spoke first, whoever began it would seem to answer that, and
    /// answers are left alone.
    Move { mark: Mark, route: usize },
    /// It is to be known with this mark, and goes on as it is: the table decides about its next packet.
    Mark(Mark),
}

/// Of no way.
const NOBODY: Known =
    Known { name: "", interface: Some(""), masquerades: None, routed: false, mark: 0 };

/// What goes directly; flows may be known by the mask, unless they are others'.
const DIRECT: &str = "direct";

/// These, flows of theirs that are known by another mark still, and what goes directly.
fn with_moving<'a>(
    mut all: Vec<Known<'a>>,
    moving: impl Iterator<Item = (u32, Option<u32>)>,
    mask: u32,
) -> Vec<Known<'a>> {
    let still = moving.map(|(mark, now)| {
        let as_of = all.iter().find(|known| Some(known.mark) == now && known.mark != 0);
        let unknown = if now == Some(0) { DIRECT } else { "" };
        Known { mark, ..*as_of.unwrap_or(&Known { name: unknown, ..NOBODY }) }
    });
    let still: Vec<_> = still.collect();
    all.extend(still);
    let others = all.iter().any(|known| known.mark == mask);
    all.push(Known { name: DIRECT, mark: if others { 0 } else { mask }, ..NOBODY });
    all
}

/// Which flows are known by a mark: of this host or routed ones, of a tproxy or of a route.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    name: &'a str,
    /// That a route leads to, by name; empty where it names a table.
    interface: Option<&'a str>,
    /// `None` where that is not known.
    masquerades: Option<bool>,
    routed: bool,
    mark: u32,
}

impl Known<'_> {
    pub fn of(config: &Config) -> Vec<Known<'_>> {
        let tproxies = config.tproxies.iter().map(|tproxy| (&tproxy.outlet, None));
        let routes = config.routes.iter().map(|route| (&route.outlet, Some(route)));
        let all = tproxies.chain(routes).flat_map(|(outlet, route)| {
            let known = |mark, routed| Known {
                name: &outlet.name,
                interface: route.map(|route| &*route.interface),
                masquerades: route.map(Route::masquerades),
                routed,
                mark,
            };
            let routed = route.map(|route| known(route.forward_mark, true));
            [Some(known(outlet.mark, false)), routed]
        });
        let moving = config.moving.iter().copied();
        with_moving(all.flatten().collect(), moving, config.direct_mark())
    }

    /// The same once all flows have moved.
    pub fn settled(config: &Config) -> Vec<Known<'_>> {
        let mut all = Known::of(config);
        all.retain(|known| config.moves(known.mark).is_none());
        all
    }

    /// Of a table that is there, as far as it has that mask.
    pub fn of_view(view: &View, mask: u32) -> Vec<Known<'_>> {
        let all = view.targets.iter().flat_map(|target| {
            [(target.mark, false), (target.forwarded, true)].map(|(mark, routed)| {
                Some(Known {
                    name: &target.name,
                    interface: target.is_route.then(|| target.interface.as_deref().unwrap_or("")),
                    masquerades: None,
                    routed,
                    mark: mark.filter(|mark| mark.mask == mask)?.value,
                })
            })
        });
        // one that a proxy began stays so, where what was to be forgotten is of this mask again
        let moves = |was: &Mark| was.mask == mask && was.value != spoofed_mark(mask);
        let moving = view.moving.iter().filter(|(was, _)| moves(was));
        let moving = moving.map(|(was, now)| (was.value, *now));
        with_moving(all.flatten().collect(), moving, mask)
    }

    /// Whether flows of another way are on this one: a route of the same interface, or any tproxy,
    /// since each finds the socket of the one that has the flow.
    fn carries(&self, was: &Known) -> bool {
        let named = self.name == was.name || self.interface != Some("");
        let same = (self.interface, self.routed) == (was.interface, was.routed);
        named && same && was.masquerades.is_none_or(|was| Some(was) == self.masquerades)
    }
}

/// The marks of before that mean something else by now, each with the one that its flows are to be
/// known by from now on; `None` where their way is no more.
fn moved(was: &[Known], config: &Config) -> Vec<(u32, Option<u32>)> {
    let now = Known::of(config);
    let moved = was.iter().map(|was| {
        let like = || now.iter().filter(|now| now.carries(was));
        let same = like().find(|now| now.name == was.name).or(like().next());
        let is = |now: &&Known| now.mark != 0 || now.name == DIRECT;
        (was.mark, same.filter(is).map(|now| now.mark))
    });
    moved.filter(|(was, now)| Some(*was) != *now && *was != 0).collect()
}

/// The policy with marks that mean nothing else by which flows are known from before: they move to
/// these, and then to its own, so that at no time a mark means two things. Where there is no other, it
/// is unclear whose the flows of before are.
pub fn renumbered(was: &[Known], config: &Config) -> Config {
    let mut now = Config { moving: moved(was, config), ..config.clone() };
    now.give_way();
    let mut all = std::mem::take(&mut now.moving);
    // what goes directly leaves its mark to the section that gets it later
    all.retain(|(_, now)| *now == Some(0));
    let others = moved(was, &now).into_iter();
    let others = others.filter(|(was, _)| all.iter().all(|(left, _)| left != was));
    let others: Vec<_> = others.collect();
    all.extend(others);
    let (unclear, moving) = all.into_iter().partition(|(was, _)| now.uses(*was));
    let mark = |(value, _): (u32, _)| Mark { value, mask: config.mask };
    Config { moving, unclear: Vec::into_iter(unclear).map(mark).collect(), ..now }
}

/// The policy, as flows are held against it.
pub struct Flows {
    fates: Fates,
    outcomes: HashMap<u64, Outcome>,
    /// That of all other cgroups; `None` where the flows of those above are in question alone.
    others: Option<Outcome>,
    /// Addresses of before.
    gone: SmallSet<IpAddr>,
}

impl Flows {
    /// `None` where no flow can be in question; these addresses no interface has any more.
    pub fn of(core: &Core, gone: &SmallSet<IpAddr>) -> Option<Flows> {
        let config = core.config();
        let lists_ports = config.tproxies.iter().any(|t| !t.outlet.udp_ports.is_empty());
        if config.routes.is_empty() && !lists_ports && gone.is_empty() {
            return None;
        }
        let all = core.tree().iter();
        let outcomes = all.map(|(_, node)| (node.id, policy::outcome(config, node.rank))).collect();
        let fates = Fates::under(config.clone());
        let others = Some(config.default_outcome());
        Some(Flows { fates, outcomes, others, gone: gone.clone() })
    }

    /// Of these cgroups alone.
    pub fn of_some(core: &Core, outcomes: HashMap<u64, Outcome>) -> Flows {
        let fates = Fates::under(core.config().clone());
        Flows { fates, outcomes, others: None, gone: SmallSet::default() }
    }

    /// Whether a cgroup's flows are in question.
    pub fn asks_of(&self, cgroup: u64) -> bool {
        self.others.is_some() || self.outcomes.contains_key(&cgroup)
    }

    /// The cgroups whose flows are in question; `None` where those of all are.
    pub fn cgroups(&self) -> Option<Vec<u64>> {
        self.others.is_none().then(|| self.outcomes.keys().copied().collect())
    }

    fn config(&self) -> &Config {
        &self.fates.config
    }

    /// Whether flows are held against who began them, and not their marks alone.
    pub fn ask_for_owners(&self) -> bool {
        !self.config().routes.is_empty()
    }

    /// Whether what is routed for others is in question, as some of it goes by a route.
    pub fn forwards(&self) -> bool {
        self.others.is_some() && self.config().forwards()
    }

    /// The mark of what this host sends by a route, and the interface that it leaves by, if that is
    /// known.
    pub fn way(&self, route: usize) -> (u32, &str) {
        let route = &self.config().routes[route];
        (route.outlet.mark, &route.interface)
    }

    /// Whether one is translated to an address of before: of those that were moved the kernel does not
    /// see that by itself.
    pub fn is_lost(&self, entry: &Tracked) -> bool {
        entry.is_translated() && self.gone.contains(&entry.answers.1.ip())
    }

    /// What is to be done about one that is known as a tproxy's which does not take its port any more:
    /// the table looks for a port once, when a flow begins.
    pub fn released(&self, entry: &Tracked) -> Option<Cure> {
        let config = self.config();
        let known = entry.mark & config.mask;
        let of = config.tproxies.iter().find(|tproxy| tproxy.outlet.mark == known)?;
        let port = entry.to.port();
        let hijacked = of.outlet.hijacks_dns() && port == 53 && entry.is_translated();
        let keeps = hijacked || of.outlet.takes_port(L4::Udp, port);
        let none = Mark { value: 0, mask: config.mask };
        (entry.protocol == IPPROTO_UDP && !keeps).then_some(Cure::Mark(none))
    }

    /// What is to be done about one that a socket of this host began.
    pub fn own(&self, entry: &Tracked, socket: &SeenSocket) -> Option<Cure> {
        let outcome = self.outcomes.get(&socket.cgroup?).copied().or(self.others)?;
        // where that depends on a group, nobody tells
        let target = policy::target_of(self.config(), outcome, socket.uid, None)?;
        let mut socket = socket.clone();
        (socket.local, socket.remote) = (entry.from, entry.to);
        let taken =
            !self.fates.is_bypassed(&socket) && self.fates.of(&socket, target) == Fate::Taken;
        self.cure(entry, Some(target).filter(|_| taken), |route| route.outlet.mark)
    }

    /// The same for one that is routed for others and comes in by an interface, from a container with
    /// a target or from somebody else.
    pub fn routed(
        &self,
        entry: &Tracked,
        interface: &str,
        container: Option<Target>,
    ) -> Option<Cure> {
        let config = self.config();
        let covers = |gateway: &&Gateway| covers(gateway, interface, entry.from);
        let sections = config.gateways.iter().filter(|_| container.is_none());
        let section = sections.filter(|section| !section.containers).find(covers);
        let spared = self.fates.spares(entry.to);
        let target = container.or(section.map(|section| section.target));
        let target = target.unwrap_or(Target::Direct);
        let take =
            |route: &Route| route.outlet.take(L4::Udp, Family::of(&entry.to.ip()), Some(entry.to));
        let takes = self.route(target).is_some_and(|(_, route)| take(route) == Take::Yes);
        let sure = section.is_none_or(|section| section.macs.is_empty());
        let target = Some(target).filter(|_| takes && !spared);
        match self.cure(entry, target, |route| route.forward_mark) {
            // it may be another client's
            Some(Cure::Move { .. }) if !sure => Some(Cure::Forget),
            cure => cure,
        }
    }

    fn route(&self, target: Target) -> Option<(usize, &Route)> {
        match target {
            Target::Route(at) => Some((at.into(), self.config().routes.get(usize::from(at))?)),
            _ => None,
        }
    }

    /// What is to be done about a flow that its target takes, if that is a route, or that none takes,
    /// by the mark that those of a route have.
    fn cure(
        &self,
        entry: &Tracked,
        target: Option<Target>,
        mark: impl Fn(&Route) -> u32,
    ) -> Option<Cure> {
        let config = self.config();
        let known = entry.mark & config.mask;
        let none = Mark { value: 0, mask: config.mask };
        match target.and_then(|target| self.route(target)) {
            Some((_, route)) if mark(route) == known => None,
            Some((at, route)) if route.masquerades() => {
                // a query for a resolver elsewhere has to be translated as well
                let query = route.outlet.hijacks_dns() && entry.is_query();
                let mark = Mark { value: mark(route), mask: config.mask };
                Some(match query || entry.is_redirected() {
                    true => Cure::Forget,
                    false => Cure::Move { mark, route: at },
                })
            }
            // by others, by now
            Some(_) => entry.is_translated().then_some(Cure::Forget),
            None if config.routes.iter().any(|route| mark(route) == known) => {
                Some(match entry.is_translated() {
                    true => Cure::Release(none),
                    // the remote host may speak first: whoever he speaks to would seem to answer
                    false => Cure::Mark(none),
                })
            }
            None => {
                // what it sent next has made it the proxy's, which hears it from the route's address
                let taken = config.tproxies.iter().any(|tproxy| tproxy.outlet.mark == known);
                let strange = taken && entry.is_translated() && !entry.is_redirected();
                strange.then_some(Cure::Release(Mark { value: known, ..none }))
            }
        }
    }
}

/// What those cgroups come to by now that went by these ways until then, as far as that is or was a
/// route, of some owner at least.
pub fn late(core: &Core, ways: &HashMap<u64, Outcome>) -> HashMap<u64, Outcome> {
    let config = core.config();
    if config.routes.is_empty() {
        return HashMap::new();
    }
    let by_route = |outcome: Outcome| {
        let lines = config.owner_rules_before(outcome.class).iter().map(|rule| rule.target);
        lines.chain([outcome.target]).any(|target| matches!(target, Target::Route(_)))
    };
    let now = core.tree().iter().filter_map(|(_, node)| {
        let was = *ways.get(&node.id)?;
        let now = policy::outcome(config, node.rank);
        (by_route(was) || by_route(now)).then_some((node.id, now))
    });
    now.collect()
}

/// Whether a section covers what comes in by an interface from an address, whatever the client's
/// Ethernet address.
fn covers(gateway: &Gateway, interface: &str, from: SocketAddr) -> bool {
    let named = gateway.interfaces.iter().any(|own| own.covers(interface));
    named && (gateway.sources.is_empty() || gateway.sources.holds(from.ip()))
}

/// The sockets that flows are held against, in the order of their ports: in one piece, since there may
/// be 10,000s of them to let go at once.
#[derive(Default)]
pub struct Owners(Vec<SeenSocket>);

impl Owners {
    pub fn new(mut sockets: Vec<SeenSocket>) -> Owners {
        sockets.sort_unstable_by_key(|socket| socket.local.port());
        Owners(sockets)
    }

    pub fn has(&self, port: u16) -> bool {
        self.0.binary_search_by_key(&port, |socket| socket.local.port()).is_ok()
    }

    fn at(&self, port: u16) -> &[SeenSocket] {
        let first = self.0.partition_point(|socket| socket.local.port() < port);
        let own = self.0[first..].iter().take_while(|socket| socket.local.port() == port);
        &self.0[first..][..own.count()]
    }

    /// The socket that sends between two addresses: the one that is connected so, or bound to the
    /// address, or to any; none where several of different cgroups or users share that.
    pub fn of(&self, from: SocketAddr, to: SocketAddr) -> Option<&SeenSocket> {
        let fit = |socket: &&SeenSocket| {
            let own = socket.local.ip() == from.ip();
            match socket.is_connected() {
                true => (own && socket.remote == to).then_some(3),
                false if own => Some(2),
                false => {
                    let speaks =
                        if from.is_ipv4() { socket.speaks_ipv4() } else { socket.local.is_ipv6() };
                    (socket.local.ip().is_unspecified() && speaks).then_some(1)
                }
            }
        };
        let at = self.at(from.port());
        let best = at.iter().filter_map(|socket| fit(&socket)).max()?;
        let mut all = at.iter().filter(|socket| fit(socket) == Some(best));
        let first = all.next()?;
        let same = |socket: &SeenSocket| (socket.cgroup, socket.uid) == (first.cgroup, first.uid);
        all.all(same).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::conntrack::{self, parse_entry};
    use crate::netlink::diag::example;
    use crate::netlink::msg::Batch;
    use crate::netlink::parse::Messages;
    use crate::testing;

    const CONFIG: &str = "[global]\nbypass = 198.51.100.0/24\n[tproxy p]\nport = 1\n\
                          [route vpn]\ninterface = wg0\nudp-ports = 1-999\ndns-hijack = 10.8.0.2\n\
                          [route plain]\ntable = 1000\n[rules]\nvpn = user:1\nplain = user:2\n\
                          p = user:3\ndrop = group:7\n[gateway lan]\ninterface = br*\n\
                          source = 192.168.1.0/24\ntarget = vpn\n[gateway macs]\ninterface = eth1\n\
                          source-mac = 02:00:00:00:00:01\ntarget = vpn\n";

    fn flows(config: &'static str) -> Flows {
        let config = std::rc::Rc::new(testing::config(config));
        let others = Some(config.default_outcome());
        let fates = Fates::under(config);
        Flows { fates, outcomes: HashMap::new(), others, gone: SmallSet::default() }
    }

    /// A flow as conntrack has it, with our bits of its mark, and whether its source is translated.
    fn entry(from: &str, to: &str, mark: u32, translated: bool) -> Tracked {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut batch = Batch::new(0);
        conntrack::get(&mut batch, 17, from, to);
        let mut message = Messages::new(batch.bytes()).next().unwrap();
        let mut body = message.body.to_vec();
        // the tuple of answers is of the same form
        let mut answers = Batch::new(0);
        let elsewhere = if translated { "10.8.0.1:9".parse().unwrap() } else { from };
        conntrack::get(&mut answers, 17, to, elsewhere);
        let mut reply = Messages::new(answers.bytes()).next().unwrap().body[4..].to_vec();
        reply[2] = 2;
        body.extend(reply);
        message.kind = 0x100;
        let read = parse_entry(&crate::netlink::parse::Message { body: &body, ..message });
        let mut entry = read.unwrap();
        entry.mark = mark << 24 | 0x77;
        entry
    }

    #[test]
    fn what_is_done_about_a_sockets_flow() {
        // p is 1, vpn 2, plain 3, in the upper byte
        let flows = flows(CONFIG);
        let mark = Mark { value: 2 << 24, mask: 0xff00_0000 };
        let vpn = Some(Cure::Move { mark, route: 0 });
        let none = Some(Cure::Release(Mark { value: 0, ..mark }));
        let here = "192.0.2.1:4000";
        let of = |uid: u32, to: &str, mark, translated| {
            let mut socket = example(17, 7, "0.0.0.0:4000", "");
            socket.uid = uid;
            flows.own(&entry(here, to, mark, translated), &socket)
        };
        let there = "203.0.113.7:80";
        for (uid, mark, translated, want) in [
            (1, 0, false, vpn),
            (1, 1, false, vpn),
            (1, 2, true, None),
            (1, 3, true, vpn),
            (1, 0, true, vpn),
            // not masqueraded: what is not translated can go on
            (2, 0, false, None),
            (2, 2, true, Some(Cure::Forget)),
            (3, 1, false, None),
            // its packets were faster
            (3, 1, true, Some(Cure::Release(Mark { value: 1 << 24, ..mark }))),
            (3, 2, true, none),
            (4, 0, false, None),
            (4, 2, true, Some(Cure::Forget)),
            (4, 3, false, Some(Cure::Forget)),
        ] {
            let found = of(uid, there, mark, translated);
            // whose group nobody tells is left alone
            let want = if uid == 4 { None } else { want };
            assert_eq!(found, want, "uid {uid}, mark {mark}, translated {translated}");
        }
        // not taken: bypassed, or another port; queries have to be translated
        assert_eq!(of(1, "198.51.100.1:80", 0, false), None);
        assert_eq!(of(1, "203.0.113.7:8000", 0, false), None);
        assert_eq!(of(1, "203.0.113.7:8000", 2, true), none);
        assert_eq!(of(1, "203.0.113.7:53", 0, false), Some(Cure::Forget));
        let mut unknown = example(17, 7, "0.0.0.0:4000", "");
        unknown.cgroup = None;
        assert_eq!(flows.own(&entry(here, there, 0, false), &unknown), None);
        // WireGuard's packets may bear a mark that is bypassed
        let mut socket = example(17, 7, "0.0.0.0:4000", "");
        (socket.uid, socket.unlimited) = (1, true);
        assert_eq!(flows.own(&entry(here, there, 0, false), &socket), vpn);
        let marked = CONFIG.replace("[tproxy p]", "bypass-mark = 7\n[tproxy p]").leak();
        let marked = self::flows(marked);
        assert_eq!(marked.own(&entry(here, there, 0, false), &socket), None);
        assert_eq!(marked.own(&entry(here, there, 2, true), &socket), none);
        // of some cgroups alone
        socket.unlimited = false;
        let of_some = |cgroup| {
            let outcomes = [(cgroup, flows.config().default_outcome())].into();
            let fates = Fates::under(flows.fates.config.clone());
            let some = Flows { fates, outcomes, others: None, gone: SmallSet::default() };
            assert!(some.asks_of(cgroup) && !some.asks_of(cgroup + 1) && !some.forwards());
            some.own(&entry(here, there, 0, false), &socket)
        };
        let own = socket.cgroup.unwrap();
        assert_eq!((of_some(own), of_some(own + 1)), (vpn, None));
    }

    #[test]
    fn what_is_translated_to_an_address_of_before() {
        let mut flows = flows(CONFIG);
        let (from, to) = ("192.0.2.1:4000", "203.0.113.7:80");
        let lost = |flows: &Flows| [false, true].map(|t| flows.is_lost(&entry(from, to, 2, t)));
        assert_eq!(lost(&flows), [false, false]);
        flows.gone = ["10.8.0.1".parse().unwrap()].into();
        assert_eq!(lost(&flows), [false, true]);
    }

    #[test]
    fn what_is_done_about_a_port_that_is_listed_no_more() {
        let flows = flows(
            "[tproxy p]\nport = 1\nudp-ports = 80 443\ndns-hijack = 127.0.0.1\n[tproxy q]\n\
             port = 2\n[rules]\np = /p\n",
        );
        assert!(!flows.ask_for_owners());
        let none = Cure::Mark(Mark { value: 0, mask: 0xff00_0000 });
        for (to, mark, translated, want) in [
            ("203.0.113.7:80", 1, false, None),
            ("203.0.113.7:81", 1, false, Some(none)),
            ("203.0.113.7:81", 2, false, None),
            ("203.0.113.7:81", 0, false, None),
            // hijacked, and older than that
            ("203.0.113.7:53", 1, true, None),
            ("203.0.113.7:53", 1, false, Some(none)),
        ] {
            let found = flows.released(&entry("192.0.2.1:4000", to, mark, translated));
            assert_eq!(found, want, "{to}, mark {mark}, translated {translated}");
        }
    }

    #[test]
    fn marks_that_mean_something_else() {
        let p = "[tproxy p]\nport = 1\n";
        let q = "[tproxy q]\nport = 1\n";
        let a = "[route a]\ninterface = wg0\n";
        let b = "[route b]\ninterface = wg0\n";
        let c = "[route a]\ninterface = wg1\n";
        let t = "[route t]\ntable = 1000\n";
        for (old, new, want) in [
            (vec![p, a], vec![p, a], vec![]),
            (vec![p, a], vec![p, a, t], vec![]),
            (vec![p, a], vec![q, p, a], vec![(1, 2), (2, 3)]),
            (vec![p, a], vec![a, p], vec![(1, 2), (2, 1)]),
            // any proxy carries another's flows, and a route those of its interface
            (vec![p, a], vec![b, q], vec![(1, 2), (2, 1)]),
            (vec![a], vec![c], vec![(1, 0)]),
            (vec![p], vec![a], vec![(1, 0)]),
            (vec![a, t], vec![t], vec![(1, 0), (2, 1)]),
            (vec![a, t], vec![], vec![(1, 0), (2, 0)]),
        ] {
            let [old, new] = [old, new].map(|texts| testing::config(texts.concat().leak()));
            let known = Known::of(&old);
            let found = moved(&known, &new);
            let found = found.into_iter().map(|(was, now)| (was >> 24, now.unwrap_or(0) >> 24));
            let found: SmallSet<(u32, u32)> = found.collect();
            assert_eq!(found, want.into_iter().collect());
        }
    }

    #[test]
    fn what_is_done_about_a_clients_flow() {
        let flows = flows(CONFIG);
        let config = flows.config();
        let routed = config.routes[0].forward_mark;
        let own = Mark { value: routed, mask: 0xff00_0000 };
        let vpn = Some(Cure::Move { mark: own, route: 0 });
        let none = Some(Cure::Release(Mark { value: 0, ..own }));
        let (client, there) = ("192.168.1.9:4000", "203.0.113.7:80");
        let mark = routed >> 24;
        for (interface, from, mark, translated, want) in [
            ("br-lan", client, 0, false, vpn),
            ("br-lan", client, 0, true, vpn),
            ("br-lan", client, mark, true, None),
            ("br-lan", "192.168.2.9:4000", 0, false, None),
            ("br-lan", "192.168.2.9:4000", mark, true, none),
            ("eth0", client, 0, false, None),
            // whether it is the client of that address, nobody tells
            ("eth1", client, 0, false, Some(Cure::Forget)),
        ] {
            let found = flows.routed(&entry(from, there, mark, translated), interface, None);
            assert_eq!(found, want, "{interface} {from} {mark} {translated}");
        }
        // a container's target comes before sections
        for (target, mark, translated, want) in [
            (Target::Route(0), 0, false, vpn),
            (Target::Route(0), mark, true, None),
            (Target::Direct, mark, true, none),
            (Target::Direct, 0, false, None),
        ] {
            let entry = entry(client, there, mark, translated);
            assert_eq!(flows.routed(&entry, "br-lan", Some(target)), want, "{target:?} {mark}");
        }
    }

    #[test]
    fn whose_flow_it_is() {
        let wildcard = example(17, 7, "0.0.0.0:4000", "");
        let dual = example(17, 7, "[::]:4000", "");
        let mut bound = example(17, 7, "192.0.2.1:4000", "");
        bound.uid = 5;
        let connected = example(17, 1, "192.0.2.1:4000", "203.0.113.7:80");
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (here, there) = (at("192.0.2.1:4000"), at("203.0.113.7:80"));
        let owners = Owners::new(vec![wildcard.clone(), bound.clone(), connected.clone()]);
        assert_eq!(owners.of(here, there), Some(&connected));
        assert_eq!(owners.of(here, at("203.0.113.8:80")), Some(&bound));
        assert_eq!(owners.of(at("192.0.2.2:4000"), there), Some(&wildcard));
        assert_eq!(owners.of(at("192.0.2.1:4001"), there), None);
        assert_eq!(owners.of(at("[2001:db8::1]:4000"), at("[2001:db8::2]:80")), None);
        assert_eq!(Owners::new(vec![dual.clone()]).of(here, there), Some(&dual));
        let shared = |uid| {
            let mut other = wildcard.clone();
            other.uid = uid;
            Owners::new(vec![wildcard.clone(), other]).of(here, there).is_some()
        };
        assert!(shared(0) && !shared(1));
    }

    /// At no time does a mark mean two things, whatever of before has not moved yet, and in the end each
    /// section has its own.
    #[test]
    fn marks_mean_one_thing_at_a_time() {
        let section = |name: &str| match name {
            // flows that go directly are marked
            "drop" => "[global]\ndefault = drop\n".into(),
            // by the mark of this one
            "whole" => "[route whole]\ninterface = whole\nmark = 0xff000000\n".into(),
            _ => format!("[route {name}]\ninterface = {name}\n"),
        };
        let text = |names: &&str| {
            let all: String = names.split(' ').map(section).collect();
            let lan = "[gateway lan]\ninterface = br-lan\ntarget = direct\n";
            testing::config(format!("{all}{lan}").leak())
        };
        let key = |known: &Known| (known.name.to_string(), known.routed);
        let lists =
            ["a", "b a", "a b", "c", "b c a", "d c b a", "a whole", "whole b", "drop b a", "drop"];
        let mut random = testing::Random::new(3);
        for _ in 0..400 {
            let mut was = text(random.pick(&lists));
            for _ in 0..random.below(3) {
                was = renumbered(&Known::of(&was), &text(random.pick(&lists)));
                was.unclear.clear();
            }
            let last = text(random.pick(&lists));
            let mut steps = 0;
            loop {
                let all = if steps == 0 { Known::of(&was) } else { Known::settled(&was) };
                let now = renumbered(&all, &last);
                let unclear = |mark| now.unclear.iter().any(|unclear| unclear.value == mark);
                for known in all.iter().filter(|known| known.mark != 0) {
                    if unclear(known.mark) {
                        assert!(known.mark == now.mask && now.marks_direct());
                        continue;
                    }
                    let is = now.moves(known.mark);
                    assert!(is.is_none() || !now.uses(known.mark), "two meanings");
                    if known.name == DIRECT {
                        assert!(is.is_none_or(|is| is == Some(0)), "{is:?}");
                        continue;
                    }
                    let alone = Config { moving: Vec::new(), ..now.clone() };
                    let alone = Known::of(&alone);
                    let same = alone.iter().find(|new| key(new) == key(known)).map(|k| k.mark);
                    assert_eq!(is.unwrap_or(Some(known.mark)), same, "{:?}", key(known));
                }
                if now.moving.is_empty() {
                    let clear = Config { unclear: Vec::new(), ..now };
                    assert_eq!(clear.taken_marks(), last.taken_marks());
                    break;
                }
                // all have moved
                was = Config { unclear: Vec::new(), ..now };
                steps += 1;
                assert!(steps <= 2);
            }
        }
        // a table that was left amid the change from this mask to another one
        let now = text(&"a");
        let lost = now.taken_marks().into_iter().map(|was| (was, None)).collect();
        let view = View { moving: lost, ..View::default() };
        let back = renumbered(&Known::of_view(&view, now.mask), &now);
        assert_eq!((back.moves(now.spoofed_mark()), back.unclear), (None, vec![]));
        // nobody counts the marks of a wide mask
        let wide = |text: &str| {
            testing::config(format!("[global]\nfwmark-mask = 0xffffffff\n{text}").leak())
        };
        let [p, q] = ["[tproxy p]\nport = 1\n", "[tproxy q]\nport = 2\n"];
        let [was, now] = [[p, q].concat(), ["[route r]\ninterface = r\n", p, q].concat()];
        assert_eq!(renumbered(&Known::of(&wide(&was)), &wide(&now)).unclear, vec![]);
        // nothing is free: flows are forgotten
        let narrow =
            |text: &str| testing::config(format!("[global]\nfwmark-mask = 0x3\n{text}").leak());
        let tunnel = narrow("[route r]\ninterface = r\n");
        let now = renumbered(&Known::of(&tunnel), &narrow("[tproxy p]\nport = 1\n"));
        assert_eq!((now.unclear, now.moving), (vec![Mark { value: 1, mask: 3 }], vec![]));
    }
}
