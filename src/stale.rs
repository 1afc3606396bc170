//! Which sockets are stale: connected by a way that is not their cgroup's any more. What conntrack
//! tells of a flow's direction does not do for that, since it may have begun after the flow. Pure.
//!
//! A socket's owner may decide before its cgroup does: inet_diag tells the uid, not the group.
//! Never stale: listening sockets and what others connected to, UDP sockets of a port or an interface
//! that somebody chose, and what a target leaves alone. In doubt a flow that nobody listens for is
//! outbound.

pub mod flows;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::rc::Rc;

use crate::cgroup::core::Core;
use crate::config::{Config, Outcome, Take, Target};
use crate::net::{holds, Family, Owner, Range, L4};
use crate::netlink::diag::{SeenSocket, Witness, FEW_CGROUPS, TCP_STATES, UDP_STATES};
use crate::netlink::uapi::*;
use crate::nft::table;
use crate::policy;

/// The way of a socket has changed, or may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Suspect {
    now: Target,
    was: Was,
}

/// Which way a socket went before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Was {
    /// Directly: by its target, or because no table was in force.
    Direct,
    /// It was in the hands of a target that is no more its own, or has changed.
    Taken,
}

/// What a cgroup comes to, and came to before; `None` without a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    pub now: Outcome,
    pub was: Option<Outcome>,
}

/// The cgroups whose sockets may be stale, of some owners at least.
#[derive(Debug, Default)]
pub struct Suspects {
    /// By cgroup id; `None` for those that are known and beyond suspicion.
    pub known: HashMap<u64, Option<Case>>,
    /// Cgroups that are not known: outside the cgroup root, or removed.
    pub others: Option<Case>,
    /// The lines for owners of before.
    owners: Vec<OwnerLine>,
    /// The targets that take other packets than before.
    changed: Vec<Target>,
}

/// A line for owners that was in force: those of a class and of the ones below come before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerLine {
    pub class: u16,
    pub owners: Vec<Owner>,
    pub target: Target,
}

/// What was in force before, in the terms of the configuration that is in force now.
#[derive(Debug)]
pub struct Before {
    /// By cgroup id. Classes are those of before.
    outcomes: HashMap<u64, Outcome>,
    /// That of cgroups that are not known.
    default: Outcome,
    owners: Vec<OwnerLine>,
}

/// A tproxy that is no more.
const GONE: Target = Target::Tproxy(u16::MAX);

impl Before {
    /// Of the policy that the core still has, for a new one.
    pub fn of_policy(core: &Core, new: &Config) -> Before {
        let old = core.config();
        let now = |target| named(new, old.target_name(target));
        let outcome = |Outcome { target, class }| Outcome { target: now(target), class };
        let all = core.tree().iter();
        let outcomes = all.map(|(_, node)| (node.id, outcome(policy::outcome(old, node.rank))));
        let owners = lines(old).map(|line| OwnerLine { target: now(line.target), ..line });
        Before {
            outcomes: outcomes.collect(),
            default: outcome(old.default_outcome()),
            owners: owners.collect(),
        }
    }

    /// Of a table whose sets are known: `element` gives the name of the target whose set has an id,
    /// and the class; `owners` are the table's lines for owners.
    pub fn of_table<'a>(
        core: &Core,
        (default, class): (&str, u16),
        owners: impl Iterator<Item = (u16, Owner, &'a str)>,
        element: impl Fn(u64) -> Option<(&'a str, u16)>,
    ) -> Before {
        let config = core.config();
        let outcome = |(name, class)| Outcome { target: named(config, name), class };
        let default = outcome((default, class));
        let tree = core.tree();
        let outcomes = tree.indices().filter_map(|at| {
            let nearest = tree.up(at).find_map(|(_, node)| element(node.id));
            Some((tree.node(at)?.id, nearest.map_or(default, outcome)))
        });
        let owners = owners.map(|(class, owner, name)| OwnerLine {
            class,
            owners: vec![owner],
            target: named(config, name),
        });
        Before { outcomes: outcomes.collect(), default, owners: owners.collect() }
    }

    /// Everything went by the default of the policy that is in force.
    pub fn of_default(config: &Config) -> Before {
        let owners = lines(config).collect();
        Before { outcomes: HashMap::new(), default: config.default_outcome(), owners }
    }
}

/// The lines for owners of a configuration.
fn lines(config: &Config) -> impl Iterator<Item = OwnerLine> + '_ {
    config.owner_rules.iter().map(|rule| OwnerLine {
        class: rule.class,
        owners: rule.owners.clone(),
        target: rule.target,
    })
}

fn named(config: &Config, name: &str) -> Target {
    config.named(name).unwrap_or(GONE)
}

/// Whether a target takes the same packets under both configurations.
pub fn takes_the_same<'a>(old: &'a Config, new: &'a Config, target: Target) -> bool {
    let bypass =
        |c: &'a Config| (&c.bypass, &c.bypass_marks, &c.bypass_dscps, &c.bypass_users, c.mask);
    let name = new.target_name(target);
    let tproxy = |c: &'a Config| c.tproxies.iter().find(|tproxy| tproxy.outlet.name == name);
    let route = |c: &'a Config| c.routes.iter().find(|route| route.outlet.name == name);
    bypass(old) == bypass(new) && tproxy(old) == tproxy(new) && route(old) == route(new)
}

/// Whether the way of a socket has changed. What it was is `None` without a table.
fn suspect(now: Target, was: Option<Target>, changed: &[Target]) -> Option<Suspect> {
    match (now, was) {
        (Target::Direct, _) => None,
        (_, None | Some(Target::Direct)) => Some(Suspect { now, was: Was::Direct }),
        (_, Some(was)) if was == now && !changed.contains(&now) => None,
        _ => Some(Suspect { now, was: Was::Taken }),
    }
}

impl Suspects {
    /// Whose way has changed. Without `before` there was no table, and everything went directly.
    /// `same` tells whether a target takes what it took before.
    pub fn find(core: &Core, before: Option<Before>, same: impl Fn(Target) -> bool) -> Suspects {
        let config = core.config();
        let changed = config.targets().filter(|target| !same(*target)).collect();
        let (was, owners) = match before {
            None => (None, Vec::new()),
            Some(Before { outcomes, default, owners }) => (Some((outcomes, default)), owners),
        };
        let mut suspects = Suspects { owners, changed, ..Suspects::default() };
        let was_default = was.as_ref().map(|(_, default)| *default);
        suspects.others = suspects.case(config, config.default_outcome(), was_default);
        suspects.known = core
            .tree()
            .iter()
            .filter_map(|(_, node)| {
                let was = was.as_ref();
                let was = was.map(|(all, default)| all.get(&node.id).copied().unwrap_or(*default));
                let case = suspects.case(config, policy::outcome(config, node.rank), was);
                // where the others are suspect too, innocence has to be known
                (case.is_some() || suspects.others.is_some()).then_some((node.id, case))
            })
            .collect();
        suspects
    }

    /// Those cgroups of these ids that are there, which went by these ways until now.
    pub fn late(core: &Core, ways: &HashMap<u64, Outcome>) -> Suspects {
        let config = core.config();
        let mut suspects = Suspects { owners: lines(config).collect(), ..Suspects::default() };
        suspects.known = core
            .tree()
            .iter()
            .filter_map(|(_, node)| {
                let was = ways.get(&node.id).copied()?;
                let now = policy::outcome(config, node.rank);
                Some((node.id, suspects.case(config, now, Some(was))))
            })
            .collect();
        suspects
    }

    /// A cgroup whose sockets may be suspect, of some owner.
    fn case(&self, config: &Config, now: Outcome, was: Option<Outcome>) -> Option<Case> {
        let before = self.before(was.map_or(0, |was| was.class));
        let lines = config.owner_rules_before(now.class);
        let plain = suspect(now.target, was.map(|was| was.target), &self.changed).is_some();
        let targets = lines.iter().map(|rule| rule.target);
        let same = lines.iter().map(|rule| (&rule.owners, rule.target));
        let same = same.eq(before.iter().map(|line| (&line.owners, line.target)));
        let by_owner = match was.is_some() && same {
            true => targets.clone().any(|target| self.changed.contains(&target)),
            // some owner's may have changed, unless nothing is taken
            false => targets.chain([now.target]).any(|target| target != Target::Direct),
        };
        (plain || by_owner).then_some(Case { now, was })
    }

    /// The lines for owners that came before what was of that class.
    fn before(&self, class: u16) -> &[OwnerLine] {
        &self.owners[..self.owners.partition_point(|line| line.class <= class)]
    }

    /// Whether the way of a socket has changed, by its owner. Where that depends on his group, which
    /// nobody tells, it is left alone: its packets go as they should all the same. So is what no
    /// process has any more, which goes where its flow went.
    fn suspect(&self, config: &Config, socket: &SeenSocket) -> Option<Suspect> {
        let Case { now, was } = self.of(socket.cgroup?)?;
        let by_owner = now.class > 0 || was.is_some_and(|was| was.class > 0);
        if by_owner && socket.inode == 0 {
            return None;
        }
        let lines = was.map_or(&[][..], |was| self.before(was.class));
        let line = policy::covering(lines, |line| &line.owners, socket.uid, None).ok()?;
        let was = was.map(|was| line.map_or(was.target, |line| line.target));
        let now = policy::target_of(config, now, socket.uid, None)?;
        suspect(now, was, &self.changed)
    }

    pub fn is_empty(&self) -> bool {
        self.others.is_none() && self.known.values().all(Option::is_none)
    }

    /// The ids to ask for; `None` where all sockets have to be looked at.
    pub fn ids(&self) -> Option<Vec<u64>> {
        let ids = || self.known.iter().filter(|(_, case)| case.is_some()).map(|(id, _)| *id);
        (self.others.is_none() && ids().nth(FEW_CGROUPS).is_none()).then(|| ids().collect())
    }

    pub fn of(&self, cgroup: u64) -> Option<Case> {
        self.known.get(&cgroup).copied().unwrap_or(self.others)
    }
}

/// What becomes of a socket's packets: they are left alone, go the target's way, or nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Free,
    Taken,
    Cut,
}

/// What a configuration does with the packets of sockets.
struct Fates {
    config: Rc<Config>,
    bypass4: Vec<Range<Ipv4Addr>>,
    bypass6: Vec<Range<Ipv6Addr>>,
}

impl Fates {
    fn under(config: Rc<Config>) -> Fates {
        let (bypass4, bypass6) = (table::bypass4(&config), table::bypass6(&config));
        Fates { config, bypass4, bypass6 }
    }

    /// What is bypassed and spared left aside.
    fn of(&self, socket: &SeenSocket, target: Target) -> Fate {
        let outlet = match (target, self.config.outlet(target)) {
            (Target::Drop, _) => return Fate::Cut,
            (_, None) => return Fate::Free,
            (_, Some(outlet)) => outlet,
        };
        let l4 = if socket.protocol == IPPROTO_TCP { L4::Tcp } else { L4::Udp };
        let to = socket.is_connected().then_some(socket.remote);
        let way = |family| match outlet.take(l4, family, to) {
            Take::Drop | Take::Reject => Fate::Cut,
            Take::No => Fate::Free,
            Take::Yes => Fate::Taken,
        };
        let v4 = socket.speaks_ipv4().then_some(Family::V4);
        let v6 = socket.local.is_ipv6().then_some(Family::V6);
        v4.into_iter().chain(v6).map(way).max().unwrap_or(Fate::Free)
    }

    fn is_bypassed(&self, socket: &SeenSocket) -> bool {
        let config = &self.config;
        config.bypass_users.contains(&socket.uid)
            || config.bypass_dscps.contains(&socket.dscp)
            || config.bypass_marks.iter().any(|m| socket.mark & m.mask == m.value)
            // WireGuard marks its packets, and its socket tells nothing of that
            || (socket.unlimited && !config.bypass_marks.is_empty())
            || (socket.is_connected() && self.spares(socket.remote))
    }

    fn spares(&self, remote: SocketAddr) -> bool {
        match remote.ip() {
            ip if ip.is_loopback() => true,
            IpAddr::V4(ip) => holds(&self.bypass4, ip),
            IpAddr::V6(ip) => holds(&self.bypass6, ip),
        }
    }
}

/// How many sockets are at a local port that are not connected.
pub type Ports = BTreeMap<u16, usize>;

/// Judges sockets by a configuration.
pub struct Judge {
    fates: Fates,
    suspects: Suspects,
    /// The ports that the kernel gives to sockets that ask for none.
    chosen: RangeInclusive<u16>,
    /// Datagrams can be sent by a route whatever their flow began by ([`flows`]).
    moves: bool,
}

impl Judge {
    pub fn new(
        config: Rc<Config>,
        suspects: Suspects,
        chosen: RangeInclusive<u16>,
        moves: bool,
    ) -> Judge {
        Judge { fates: Fates::under(config), suspects, chosen, moves }
    }

    pub fn suspects(&self) -> &Suspects {
        &self.suspects
    }

    /// Whether the socket is to be asked about at all, by what it says itself.
    pub fn doubts(&self, socket: &SeenSocket) -> bool {
        let Some(suspect) = self.suspects.suspect(&self.fates.config, socket) else {
            return false;
        };
        let way = self.fates.of(socket, suspect.now);
        let is_udp = socket.protocol == IPPROTO_UDP;
        let moved = self.moves && is_udp && matches!(suspect.now, Target::Route(_));
        let began = match suspect.was {
            Was::Direct => !moved || way == Fate::Cut,
            // its packets are sent the new way, its proxied TCP flows stay where they are
            Was::Taken => !is_udp || way == Fate::Cut,
        };
        let states = if is_udp { UDP_STATES } else { TCP_STATES };
        // begun in this moment: its first packet goes as it should
        let begins = socket.state == TCP_SYN_SENT && !socket.waits;
        began
            && way != Fate::Free
            && !(begins && way == Fate::Taken)
            && states & 1u32.checked_shl(socket.state.into()).unwrap_or(0) != 0
            && !self.fates.is_bypassed(socket)
            && (socket.is_connected() || (is_udp && self.is_casual(socket)))
    }

    /// Whether nobody seems to have chosen how an unconnected socket is bound. Ending one takes its
    /// interface away and leaves it usable: what a VPN alone was to carry would later leave by the
    /// default route (`__udp_disconnect`, net/ipv4/udp.c).
    fn is_casual(&self, socket: &SeenSocket) -> bool {
        socket.device == 0 && self.chosen.contains(&socket.local.port())
    }

    /// Whether a socket that is in doubt is to be ended. `ports` are those of its protocol.
    pub fn ends(&self, socket: &SeenSocket, ports: &Ports, witness: Witness) -> bool {
        let Some(suspect) = self.suspects.suspect(&self.fates.config, socket) else {
            return false;
        };
        let way = self.fates.of(socket, suspect.now);
        let there = ports.get(&socket.local.port()).copied().unwrap_or(0);
        if !socket.is_connected() {
            // the kernel chooses no port that is in use: one that two sockets share, say WireGuard's
            // of either family, was chosen by their owner
            return way != Fate::Free && there < 2;
        }
        let inbound = match witness.flow {
            Some(flow) if socket.protocol == IPPROTO_TCP && !flow.midstream => !flow.outbound,
            // who spoke first after conntrack began says nothing; a proxy has its clients' connections
            // at the address of the remote host
            _ => there > 0 || socket.transparent == Some(true),
        };
        // a proxy that speaks first has not made the connection
        if witness.local || (inbound && !witness.proxied) {
            return false;
        }
        match way {
            Fate::Free => false,
            Fate::Cut => true,
            Fate::Taken => !self.is_on(suspect.now, witness),
        }
    }

    /// Whether the flow goes a way that it can stay on: with its proxy, whichever the target is, or by
    /// the very route; by any where no rule decides.
    fn is_on(&self, target: Target, witness: Witness) -> bool {
        let config = &self.fates.config;
        let moved = |mark| config.moves(mark).map_or(mark, Option::unwrap_or_default);
        let clear = witness.flow.filter(|flow| config.unclear_as(flow.mark).is_none());
        let known = clear.map(|flow| moved(flow.mark));
        let is = |mark| known.is_some_and(|known| known & config.mask == mark);
        match target {
            _ if target == config.default => {
                witness.proxied || config.outlets().any(|own| is(own.mark))
            }
            Target::Route(_) => config.outlet(target).is_some_and(|own| is(own.mark)),
            _ => witness.proxied || config.tproxies.iter().any(|own| is(own.outlet.mark)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::conntrack::Flow;
    use crate::netlink::diag::example;
    use crate::testing;

    const CONFIG: &str = "[global]\nbypass = 198.51.100.0/24\nbypass-mark = 7\nbypass-user = 5\n\
                          [tproxy p]\nport = 1\n[tproxy q]\nport = 2\nudp = no\nipv6 = drop\n";
    const LOCAL: &str = "192.0.2.1:40000";
    const REMOTE: &str = "203.0.113.7:80";
    const P: Target = Target::Tproxy(0);
    const Q: Target = Target::Tproxy(1);

    fn judge(now: Target, was: Was) -> Judge {
        let config = testing::config(CONFIG);
        let was = match was {
            Was::Direct => Target::Direct,
            Was::Taken => GONE,
        };
        let case = Case { now: now.into(), was: Some(was.into()) };
        let suspects = Suspects { known: HashMap::from([(1, Some(case))]), ..Suspects::default() };
        Judge::new(Rc::new(config), suspects, 32768..=60999, true)
    }

    fn tcp(state: u8) -> SeenSocket {
        example(IPPROTO_TCP, state, LOCAL, REMOTE)
    }

    fn udp(local: &str, remote: &str) -> SeenSocket {
        let state = if remote.is_empty() { TCP_CLOSE } else { TCP_ESTABLISHED };
        example(IPPROTO_UDP, state, local, remote)
    }

    fn but(socket: &SeenSocket, change: impl Fn(&mut SeenSocket)) -> SeenSocket {
        let mut socket = socket.clone();
        change(&mut socket);
        socket
    }

    fn ends(judge: &Judge, socket: &SeenSocket, ports: &[(u16, usize)], witness: Witness) -> bool {
        judge.doubts(socket) && judge.ends(socket, &ports.iter().copied().collect(), witness)
    }

    const NONE: Witness = Witness { local: false, proxied: false, flow: None };
    const KNOWN: Flow = Flow { outbound: true, midstream: false, mark: 0 };

    #[test]
    fn tcp_that_began_otherwise() {
        let with = |flow| Witness { flow: Some(flow), ..NONE };
        for now in [Target::Drop, P] {
            let judge = judge(now, Was::Direct);
            for state in [TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_CLOSE_WAIT] {
                assert!(ends(&judge, &tcp(state), &[], NONE), "{state}");
            }
            // one that has sent nothing yet begins as it should
            let begins = tcp(TCP_SYN_SENT);
            assert_eq!(ends(&judge, &begins, &[], NONE), now == Target::Drop);
            assert!(ends(&judge, &but(&begins, |s| s.waits = true), &[], NONE));
            for state in [TCP_LISTEN, TCP_TIME_WAIT, TCP_SYN_RECV, TCP_CLOSE, 12, 200] {
                assert!(!ends(&judge, &tcp(state), &[], NONE), "{state}");
            }
            let own = tcp(TCP_ESTABLISHED);
            // a listener is a witness for inbound, but one that saw it begin is a better one
            assert!(!ends(&judge, &own, &[(40000, 1)], NONE));
            assert!(ends(&judge, &own, &[(40000, 1)], with(KNOWN)));
            assert!(!ends(&judge, &own, &[], with(Flow { outbound: false, ..KNOWN })));
            let late = Flow { outbound: false, midstream: true, mark: 0 };
            assert!(ends(&judge, &own, &[], with(late)));
            assert!(!ends(&judge, &own, &[(40000, 1)], with(Flow { outbound: true, ..late })));
            assert!(!ends(&judge, &own, &[], Witness { local: true, ..NONE }));
            // proxied already: cut by drop alone
            let proxied = Witness { proxied: true, ..NONE };
            assert_eq!(ends(&judge, &own, &[], proxied), now == Target::Drop);
            let spoken = |mark| {
                let flow = Flow { outbound: false, mark, ..KNOWN };
                Witness { flow: Some(flow), ..proxied }
            };
            assert_eq!(ends(&judge, &own, &[], spoken(0)), now == Target::Drop);
            let marked = with(Flow { mark: 0x0200_0000, ..KNOWN });
            assert_eq!(ends(&judge, &own, &[], marked), now == Target::Drop);
            for spared in ["198.51.100.1:80", "127.0.0.1:80", "224.0.0.1:80", "169.254.1.1:80"] {
                let socket = example(IPPROTO_TCP, TCP_ESTABLISHED, LOCAL, spared);
                assert!(!ends(&judge, &socket, &[], NONE), "{spared}");
            }
            assert!(!ends(&judge, &but(&own, |s| s.uid = 5), &[], NONE));
            assert!(!ends(&judge, &but(&own, |s| s.mark = 7), &[], NONE));
            assert!(!ends(&judge, &but(&own, |s| s.cgroup = Some(2)), &[], NONE));
            assert!(!ends(&judge, &but(&own, |s| s.cgroup = None), &[], NONE));
        }
        assert!(!ends(&judge(Target::Direct, Was::Taken), &tcp(TCP_ESTABLISHED), &[], NONE));
    }

    #[test]
    fn udp_whose_port_nobody_chose() {
        let marked = Witness { flow: Some(Flow { mark: 0x0100_0000, ..KNOWN }), ..NONE };
        for now in [Target::Drop, P] {
            let direct = judge(now, Was::Direct);
            assert!(ends(&direct, &udp(LOCAL, REMOTE), &[], NONE));
            assert!(!ends(&direct, &udp(LOCAL, REMOTE), &[(40000, 1)], NONE), "a service's");
            assert_eq!(ends(&direct, &udp(LOCAL, REMOTE), &[], marked), now == Target::Drop);
            for any in ["0.0.0.0:40000", "[::]:40000"] {
                assert!(ends(&direct, &udp(any, ""), &[(40000, 1)], NONE));
                assert!(!ends(&direct, &udp(any, ""), &[(40000, 2)], NONE));
            }
            assert!(!ends(&direct, &udp("0.0.0.0:53", ""), &[(53, 1)], NONE));
            let bound = but(&udp("0.0.0.0:40000", ""), |s| s.device = 3);
            assert!(!ends(&direct, &bound, &[(40000, 1)], NONE), "its interface would be lost");
            let taken = judge(now, Was::Taken);
            assert_eq!(ends(&taken, &udp(LOCAL, REMOTE), &[], NONE), now == Target::Drop);
        }
    }

    #[test]
    fn what_a_tproxy_leaves_alone() {
        let judge = judge(Q, Was::Direct);
        assert!(ends(&judge, &tcp(TCP_ESTABLISHED), &[], NONE));
        assert!(!ends(&judge, &udp(LOCAL, REMOTE), &[], NONE));
        // ipv6 = drop
        let six = |protocol| {
            let state = TCP_ESTABLISHED;
            example(protocol, state, "[2001:db8::1]:40000", "[2001:db8::7]:80")
        };
        let proxied = Witness { proxied: true, ..NONE };
        assert!(ends(&judge, &six(IPPROTO_TCP), &[], proxied));
        assert!(ends(&judge, &six(IPPROTO_UDP), &[], proxied));
        // a dual-stack socket's IPv4
        let socket = but(&tcp(TCP_ESTABLISHED), |s| s.family = AF_INET6);
        assert!(!ends(&judge, &socket, &[], proxied));
    }

    #[test]
    fn few_are_asked_for_by_id() {
        let suspect = Some(Case { now: P.into(), was: None });
        let mut suspects = Suspects::default();
        assert!(suspects.is_empty());
        suspects.known.extend([(1, suspect), (2, None)]);
        assert_eq!(suspects.ids(), Some(vec![1]));
        suspects.others = suspect;
        assert_eq!(suspects.ids(), None);
        assert_eq!((suspects.of(2), suspects.of(3)), (None, suspect));
        suspects.others = None;
        suspects.known.extend((3..300).map(|id| (id, suspect)));
        assert_eq!(suspects.ids(), None);
    }
}
