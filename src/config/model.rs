//! A validated configuration, what can be wrong with one, and where its text comes from. Pure.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::pattern::Pattern;
use crate::error::printable;
use crate::log::Level;
use crate::net::{
    holds, Family, Interface, Mac, Mark, Owner, Range, Ranges, L4, LAST_PRIORITY, MOST_PRIORITIES,
};
use crate::small::SmallSet;

/// Longest message, in characters.
const MAX_MESSAGE: usize = 1000;

/// Where text comes from; the real one is [`file::Files`]. What is left out has nothing: no includes,
/// no users and no groups.
pub trait Source {
    /// The text of a file. Errors: why it cannot be used, without its name.
    fn read(&self, path: &Path) -> Result<String, String>;
    /// The text of a list of addresses, which may be longer.
    fn list(&self, path: &Path) -> Result<String, String> {
        self.read(path)
    }
    /// The files that an include pattern matches, sorted. Errors: why it cannot be used.
    fn glob(&self, _pattern: &Path) -> Result<Vec<PathBuf>, String> {
        Ok(Vec::new())
    }
    /// The uid of a user name.
    fn uid(&self, _name: &str) -> Option<u32> {
        None
    }
    /// The gid of a group name.
    fn gid(&self, _name: &str) -> Option<u32> {
        None
    }
}

/// Where a packet of a cgroup goes. Tproxies are numbered in file order, and so are routes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    #[default]
    Direct,
    Drop,
    Tproxy(u16),
    Route(u8),
}

/// What an outlet does with a protocol or a family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Take {
    #[default]
    Yes,
    /// Leave it alone.
    No,
    Drop,
    /// Drop it, and say so to whoever sent it.
    Reject,
}

/// What sections that are targets have in common: what of a cgroup's traffic they take out of its
/// hands, and the mark by which it is known from there on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outlet {
    pub name: String,
    /// Within the mask, not zero, not any other's.
    pub mark: u32,
    pub tcp: Take,
    pub udp: Take,
    pub ipv4: Take,
    pub ipv6: Take,
    /// Of what `udp` takes: HTTP/3, by its ports.
    pub quic: Take,
    /// Sorted and apart; empty: every one.
    pub tcp_ports: Vec<Range<u16>>,
    pub udp_ports: Vec<Range<u16>>,
    /// Destinations that are left alone; merged.
    pub bypass: Ranges,
    /// Those that alone are taken; none where that is so of all. Merged.
    pub only: Option<Ranges>,
    /// Where hijacked DNS goes, by family.
    pub resolvers: [Option<SocketAddr>; 2],
    pub dns_tcp: bool,
    /// Hijack DNS that is addressed to this host or to a bypassed address as well.
    pub dns_local: bool,
}

/// The UDP ports of HTTP/3.
pub const QUIC_PORTS: [u16; 2] = [80, 443];

impl Outlet {
    /// What it does with a protocol, and the ports that it does so with; none are all.
    pub fn protocol(&self, l4: L4) -> (Take, &[Range<u16>]) {
        match l4 {
            L4::Tcp => (self.tcp, &self.tcp_ports),
            L4::Udp => (self.udp, &self.udp_ports),
        }
    }

    pub fn family(&self, family: Family) -> Take {
        match family {
            Family::V4 => self.ipv4,
            Family::V6 => self.ipv6,
        }
    }

    pub fn hijacks_dns(&self) -> bool {
        self.dns().next().is_some()
    }

    /// Whether a port is among those that it takes, where it takes some alone.
    pub fn takes_port(&self, l4: L4, port: u16) -> bool {
        let (_, ports) = self.protocol(l4);
        ports.is_empty() || holds(ports, port)
    }

    /// What it does with TCP or UDP to a destination; without one, as far as can be said of all. The
    /// rules of the kernel say the same (nft/table/target.rs), but for DNS.
    pub fn take(&self, l4: L4, family: Family, to: Option<SocketAddr>) -> Take {
        let (take, _) = self.protocol(l4);
        let stops = |take| [Take::Drop, Take::Reject].contains(&take);
        let mut takes = vec![self.family(family), take];
        if let Some(to) = to {
            if self.bypass.holds(to.ip()) {
                return Take::No;
            }
            match &self.only {
                Some(only) if only.has(family) && !only.holds(to.ip()) => return Take::No,
                Some(only) if !only.has(family) && !stops(self.family(family)) => return Take::No,
                Some(only) if !only.has(family) => return self.family(family),
                _ => {}
            }
            if l4 == L4::Udp && QUIC_PORTS.contains(&to.port()) {
                takes.push(self.quic);
            }
            if !self.takes_port(l4, to.port()) {
                takes.push(Take::No);
            }
        }
        let of = |take: &Take| takes.contains(take);
        let order = [Take::Drop, Take::Reject, Take::No];
        order.into_iter().find(of).unwrap_or(Take::Yes)
    }

    /// What it does with protocols and families, by key.
    fn switches(&self) -> [(&'static str, Take); 5] {
        [
            ("tcp", self.tcp),
            ("udp", self.udp),
            ("ipv4", self.ipv4),
            ("ipv6", self.ipv6),
            ("quic", self.quic),
        ]
    }

    /// What it does not take of TCP and UDP, in the words of its keys.
    pub fn limits(&self) -> Vec<String> {
        let words = |take| match take {
            Take::Yes => None,
            Take::No => Some("no"),
            Take::Drop => Some("drop"),
            Take::Reject => Some("reject"),
        };
        let switches = self.switches().into_iter();
        let mut limits: Vec<String> =
            switches.filter_map(|(key, take)| Some(format!("{key} = {}", words(take)?))).collect();
        for (key, ports) in [("tcp-ports", &self.tcp_ports), ("udp-ports", &self.udp_ports)] {
            let ports: Vec<String> = ports.iter().map(Range::to_string).collect();
            if !ports.is_empty() {
                limits.push(format!("{key} = {}", ports.join(" ")));
            }
        }
        let lists = [("bypass", Some(&self.bypass)), ("only", self.only.as_ref())];
        for (key, ranges) in lists {
            match ranges.map(Ranges::len) {
                None => {}
                Some(0) if key == "bypass" => {}
                Some(1) => limits.push(format!("{key} 1 range")),
                Some(ranges) => limits.push(format!("{key} {ranges} ranges")),
            }
        }
        limits
    }

    pub(super) fn merge(&mut self) {
        self.bypass.merge();
        if let Some(only) = &mut self.only {
            only.merge();
        }
    }

    /// Whether destinations decide.
    pub fn picks(&self) -> bool {
        !self.bypass.is_empty() || self.only.is_some()
    }

    /// Whether it rejects anything.
    pub fn rejects(&self) -> bool {
        self.switches().iter().any(|(_, take)| *take == Take::Reject)
    }

    /// Where DNS goes.
    pub fn dns(&self) -> impl Iterator<Item = SocketAddr> {
        self.resolvers.into_iter().flatten()
    }

    /// The protocols whose port 53 is hijacked.
    pub fn dns_protocols(&self) -> impl Iterator<Item = L4> {
        let tcp = self.dns_tcp.then_some(L4::Tcp);
        let udp = self.hijacks_dns().then_some(L4::Udp);
        udp.into_iter().chain(tcp.filter(|_| self.hijacks_dns()))
    }
}

/// A `[tproxy NAME]` section.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tproxy {
    pub outlet: Outlet,
    pub port: u16,
    /// By family.
    pub addresses: [Option<IpAddr>; 2],
}

/// A `[route NAME]` section: a way out of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Route {
    pub outlet: Outlet,
    /// The interface to leave by; empty where another program's table is to be asked.
    pub interface: String,
    /// The next hops, by family.
    pub gateways: [Option<IpAddr>; 2],
    /// That table; 0 for none.
    pub table: u32,
    /// `None`: as [`Route::masquerades`] has it.
    pub masquerade: Option<bool>,
    /// Of what is routed for others, where anything is.
    pub forward_mark: u32,
}

impl Route {
    /// Whether packets get the source address of the interface that they leave by.
    pub fn masquerades(&self) -> bool {
        self.masquerade.unwrap_or(!self.interface.is_empty())
    }

    /// Whether what local processes send from a loopback address may leave by its interface: DNS that
    /// they send to a resolver on this host goes to one behind it.
    pub fn sends_from_loopback(&self) -> bool {
        let away = self.outlet.dns().any(|to| to.is_ipv4() && !to.ip().is_loopback());
        !self.interface.is_empty() && self.outlet.dns_local && away
    }
}

/// One line of `[rules]`, or one of the patterns that it stands for: these follow one another.
#[derive(Debug, Clone)]
pub struct PatternRule {
    pub target: Target,
    /// As it was written.
    pub text: Rc<str>,
    pub pattern: String,
    /// Anchored at both ends.
    pub regex: Pattern,
    pub place: Place,
}

/// A `hold` line: below a cgroup that it matches nothing goes out that has not been looked at.
#[derive(Debug, Clone)]
pub struct HoldLine {
    pub pattern: String,
    /// Anchored at both ends.
    pub regex: Pattern,
    pub place: Place,
}

impl AsRef<Pattern> for HoldLine {
    fn as_ref(&self) -> &Pattern {
        &self.regex
    }
}

impl AsRef<Pattern> for PatternRule {
    fn as_ref(&self) -> &Pattern {
        &self.regex
    }
}

/// A line of `[rules]` for the owners of sockets, in whatever cgroup.
#[derive(Debug, Clone)]
pub struct OwnerRule {
    pub target: Target,
    /// As it was written.
    pub text: Rc<str>,
    pub owners: Vec<Owner>,
    pub place: Place,
    /// How many of [`Config::rules`] stand before it.
    pub after: usize,
    /// Those that no pattern stands between are one class; from 1 on.
    pub class: u16,
}

/// A line of `[rules]`: the patterns that it stands for, or owners.
#[derive(Debug, Clone, Copy)]
pub enum RuleLine<'a> {
    Patterns(&'a [PatternRule]),
    Owners(&'a OwnerRule),
}

impl<'a> RuleLine<'a> {
    fn parts(self) -> (&'a Place, &'a str, Target) {
        match self {
            RuleLine::Patterns(rules) => (&rules[0].place, &rules[0].text, rules[0].target),
            RuleLine::Owners(rule) => (&rule.place, &rule.text, rule.target),
        }
    }

    pub fn place(self) -> &'a Place {
        self.parts().0
    }

    pub fn text(self) -> &'a str {
        self.parts().1
    }

    pub fn target(self) -> Target {
        self.parts().2
    }
}

/// What a pattern or the default comes to for a cgroup: its target, for the sockets that no line for
/// owners before it covers. These lines are those of the classes up to this one; of class 0, none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Outcome {
    pub target: Target,
    pub class: u16,
}

impl From<Target> for Outcome {
    /// Whoever the owner is.
    fn from(target: Target) -> Outcome {
        Outcome { target, class: 0 }
    }
}

/// A `[gateway NAME]` section: traffic that this host routes for others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gateway {
    pub name: String,
    /// One at least.
    pub interfaces: Vec<Interface>,
    /// Merged; empty: every one. Else those of a family that has none are left out.
    pub sources: Ranges,
    /// Empty: every one.
    pub macs: Vec<Mac>,
    pub target: Target,
    pub place: Place,
    /// Not of the file: what containers of that target send, known by its mark.
    pub containers: bool,
}

/// What the names of the sections for containers begin with, which no name of a file does.
pub const CONTAINERS: &str = "containers.";

/// File and line of a setting.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub file: Rc<PathBuf>,
    pub line: u32,
}

impl Place {
    /// A path that is relative to the file.
    pub(super) fn beside(&self, path: &str) -> PathBuf {
        self.file.parent().unwrap_or(Path::new(".")).join(path)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExit {
    Remove,
    Keep,
}

/// A validated configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// `None`: auto.
    pub cgroup_root: Option<PathBuf>,
    pub default: Target,
    pub route_table: u32,
    pub rule_priority: u32,
    pub mask: u32,
    /// Merged.
    pub bypass: Ranges,
    pub bypass_marks: Vec<Mark>,
    pub bypass_dscps: Vec<u8>,
    pub bypass_users: Vec<u32>,
    pub on_exit: OnExit,
    pub log_level: Level,
    pub counters_per_cgroup: bool,
    /// A rule for a cgroup covers what comes in by the veth of its network namespace.
    pub containers: bool,
    pub holds: Vec<HoldLine>,
    pub tproxies: Vec<Tproxy>,
    pub routes: Vec<Route>,
    pub rules: Vec<PatternRule>,
    /// In file order.
    pub owner_rules: Vec<OwnerRule>,
    pub gateways: Vec<Gateway>,
    /// Not of the file: by which mark flows are to be known from now on that are known by another of
    /// before, which stands for nothing else; `None` where their way is no more.
    pub moving: Vec<(u32, Option<u32>)>,
    /// Not of the file: flows with these marks of before are cut until conntrack knows them by none.
    pub unclear: Vec<Mark>,
    /// Every file that was read, the first one first.
    pub files: Vec<PathBuf>,
    /// Those of them without any section, which may be about to be written.
    pub hollow: Vec<PathBuf>,
}

impl Default for Config {
    /// Everything direct.
    fn default() -> Config {
        Config {
            cgroup_root: None,
            default: Target::Direct,
            route_table: 300,
            rule_priority: 100,
            mask: 0xff00_0000,
            bypass: Ranges::default(),
            bypass_marks: Vec::new(),
            bypass_dscps: Vec::new(),
            bypass_users: Vec::new(),
            on_exit: OnExit::Remove,
            log_level: Level::Notice,
            counters_per_cgroup: false,
            containers: true,
            holds: Vec::new(),
            tproxies: Vec::new(),
            routes: Vec::new(),
            rules: Vec::new(),
            owner_rules: Vec::new(),
            gateways: Vec::new(),
            moving: Vec::new(),
            unclear: Vec::new(),
            files: Vec::new(),
            hollow: Vec::new(),
        }
    }
}

/// See [`Config::spoofed_mark`].
pub fn spoofed_mark(mask: u32) -> u32 {
    mask & mask.wrapping_sub(1)
}

/// That of flows, where there is any.
pub fn spoofed_flows(mask: u32) -> Option<Mark> {
    Some(Mark { value: spoofed_mark(mask), mask }).filter(|own| own.value != 0)
}

impl Config {
    /// All targets, in the order of their sets: direct, drop, tproxies and routes in file order.
    pub fn targets(&self) -> impl Iterator<Item = Target> {
        let tproxies = (0..self.tproxies.len() as u16).map(Target::Tproxy);
        let routes = (0..self.routes.len() as u8).map(Target::Route);
        [Target::Direct, Target::Drop].into_iter().chain(tproxies).chain(routes)
    }

    /// What targets have in common, of all that have it: of tproxies, then of routes, each in file order.
    pub fn outlets(&self) -> impl Iterator<Item = &Outlet> + Clone {
        let routes = self.routes.iter().map(|route| &route.outlet);
        self.tproxies.iter().map(|tproxy| &tproxy.outlet).chain(routes)
    }

    pub(super) fn outlets_mut(&mut self) -> impl Iterator<Item = &mut Outlet> {
        let routes = self.routes.iter_mut().map(|route| &mut route.outlet);
        self.tproxies.iter_mut().map(|tproxy| &mut tproxy.outlet).chain(routes)
    }

    pub(super) fn outlet_mut(&mut self, target: Target) -> Option<&mut Outlet> {
        match target {
            Target::Direct | Target::Drop => None,
            Target::Tproxy(index) => Some(&mut self.tproxies[usize::from(index)].outlet),
            Target::Route(index) => Some(&mut self.routes[usize::from(index)].outlet),
        }
    }

    /// The outlet of a target; direct and drop have none.
    pub fn outlet(&self, target: Target) -> Option<&Outlet> {
        match target {
            Target::Direct | Target::Drop => None,
            Target::Tproxy(index) => self.tproxies.get(usize::from(index)).map(|t| &t.outlet),
            Target::Route(index) => self.routes.get(usize::from(index)).map(|r| &r.outlet),
        }
    }

    /// The target of that name.
    pub fn named(&self, name: &str) -> Option<Target> {
        self.targets().find(|target| self.target_name(*target) == name)
    }

    pub fn target_name(&self, target: Target) -> &str {
        match target {
            Target::Direct => "direct",
            Target::Drop => "drop",
            Target::Tproxy(index) => &self.tproxies[usize::from(index)].outlet.name,
            Target::Route(index) => &self.routes[usize::from(index)].outlet.name,
        }
    }

    /// The ct mark of a flow that is known to go direct, where any flow is marked so.
    pub fn direct_mark(&self) -> u32 {
        self.mask
    }

    /// The ct mark of a flow that began with a packet that this host sent from a foreign address:
    /// a proxy speaks for a remote host, and conntrack has forgotten, or never known, who spoke
    /// first. The mask without its lowest bit, whatever else the configuration says: a reload must
    /// not change what the marks of flows mean.
    pub fn spoofed_mark(&self) -> u32 {
        spoofed_mark(self.mask)
    }

    /// The marks of flows that are a proxy's or a route's, or were.
    pub fn taken_marks(&self) -> Vec<Mark> {
        let routed = self.routes.iter().map(|route| route.forward_mark).filter(|mark| *mark != 0);
        let moving = self.moving.iter().map(|(was, _)| *was);
        let marks = self.outlets().map(|outlet| outlet.mark).chain(routed).chain(moving);
        let marks = SmallSet::from_iter(marks).into_iter();
        let marks = marks.map(|value| Mark { value, mask: self.mask });
        marks.chain(spoofed_flows(self.mask)).chain(self.unclear.iter().copied()).collect()
    }

    /// The mark that a flow is to be known by which is known by this one, if that is another.
    pub fn moves(&self, mark: u32) -> Option<Option<u32>> {
        self.moving.iter().find(|(was, _)| *was == mark & self.mask).map(|(_, now)| *now)
    }

    /// The mark of before that a flow with this one is known by, where it is unclear whose it is.
    pub fn unclear_as(&self, mark: u32) -> Option<Mark> {
        self.unclear.iter().copied().find(|own| mark & own.mask == own.value)
    }

    /// Gives the sections that have the mark of flows that move another one, as far as there are any.
    pub fn give_way(&mut self) {
        if self.moving.is_empty() {
            // where few marks are free, it takes long to find that out
            return;
        }
        let most = self.outlets().count() + self.routes.len();
        let free: Vec<u32> = self.low_free_marks().take(most).collect();
        let mut free = free.into_iter();
        let moving = std::mem::take(&mut self.moving);
        let mut give_way = |mark: &mut u32| {
            if moving.iter().any(|(was, _)| was == mark) {
                *mark = free.next().unwrap_or(*mark);
            }
        };
        self.outlets_mut().for_each(|outlet| give_way(&mut outlet.mark));
        self.routes.iter_mut().for_each(|route| give_way(&mut route.forward_mark));
        self.moving = moving;
    }

    /// The mark of routed packets that go to a tproxy. Not the tproxy's own: with src_valid_mark=1
    /// the kernel looks up the way back with `iif lo` and the packet's mark, would meet the rule
    /// for local traffic, and take the packet for a martian. The same number as a spoofed flow's:
    /// where another program restores that into a client's packet, nothing is lost.
    pub fn gateway_mark(&self) -> u32 {
        self.spoofed_mark()
    }

    /// The mark of what a container sends, from where it comes in to the section of its target; `None`
    /// where the mask has no value left for it. What is to be dropped bears the same whatever the policy,
    /// but where that is an outlet's: the table of before may have marked what meets the next one. (That
    /// of spoofed flows is a routed packet's on its way to a tproxy.)
    pub fn container_mark(&self, target: Target) -> Option<u32> {
        let whole = self.mask;
        let taken = self.moves(whole).is_some() || self.outlets().any(|own| own.mark == whole);
        match (target, self.outlet(target)) {
            (_, Some(outlet)) => Some(outlet.mark),
            (Target::Drop, _) if !taken => Some(whole),
            (Target::Drop, _) => self.free_marks().next(),
            _ => self.free_marks().nth(usize::from(taken)),
        }
    }

    /// Whether flows of a section are known by that mark, or such as go directly.
    pub fn uses(&self, mark: u32) -> bool {
        self.outlets().any(|outlet| outlet.mark == mark)
            || self.routes.iter().any(|route| route.forward_mark == mark)
            || mark == self.direct_mark() && self.marks_direct()
    }

    /// The values of the mask that stand for nothing, the largest first. Those are for packets that are a
    /// container's, so that the sections that come and go leave them the same.
    fn free_marks(&self) -> impl Iterator<Item = u32> + '_ {
        let below = |mark: &u32| Some((mark - 1) & self.mask).filter(|mark| *mark != 0);
        std::iter::successors(below(&self.mask), below).filter(|mark| self.is_free(*mark))
    }

    /// The same, the smallest first: for flows.
    fn low_free_marks(&self) -> impl Iterator<Item = u32> + '_ {
        let above = |mark: &u32| Some(mark.wrapping_sub(self.mask) & self.mask).filter(|n| *n != 0);
        std::iter::successors(above(&0), above).filter(|mark| self.is_free(*mark))
    }

    fn is_free(&self, mark: u32) -> bool {
        let taken = [self.spoofed_mark(), self.direct_mark()].contains(&mark)
            || self.uses(mark)
            || self.moves(mark).is_some()
            || self.bypass_marks.iter().any(|bypass| {
                bypass.mask & self.mask != 0 && mark & bypass.mask == bypass.value & self.mask
            });
        !taken
    }

    /// The same policy with a section for what containers of each target send, ahead of all others;
    /// `None` where marks or priorities do not suffice.
    pub fn with_containers(&self) -> Option<Config> {
        let mut config = self.clone();
        for index in 0..config.routes.len() {
            if config.routes[index].forward_mark == 0 {
                let free = config.low_free_marks().next()?;
                config.routes[index].forward_mark = free;
            }
        }
        let targets = config.targets().filter(|target| config.container_mark(*target).is_some());
        let sections = targets.map(|target| Gateway {
            name: format!("{CONTAINERS}{}", self.target_name(target)),
            // one ip rule for all of them, whatever comes and goes
            interfaces: vec![Interface { name: String::new(), prefix: true }],
            target,
            containers: true,
            ..Gateway::default()
        });
        let sections: Vec<Gateway> = sections.collect();
        config.gateways.splice(0..0, sections);
        (self.rule_priority + MOST_PRIORITIES <= LAST_PRIORITY + 1).then_some(config)
    }

    /// Whether it has these sections.
    pub fn has_containers(&self) -> bool {
        self.gateways.iter().any(|gateway| gateway.containers)
    }

    /// Whether routed traffic may belong to a tproxy: a flow stays with it when a reload has given
    /// its gateway another target.
    pub fn routes_to_tproxy(&self) -> bool {
        !self.gateways.is_empty() && !self.tproxies.is_empty()
    }

    /// Each line of `[rules]`, in file order.
    pub fn rule_lines(&self) -> impl Iterator<Item = RuleLine<'_>> {
        let mut lines = self.rules.chunk_by(|a, b| a.place == b.place);
        let mut owners = self.owner_rules.iter().peekable();
        let mut at = 0;
        std::iter::from_fn(move || {
            if let Some(rule) = owners.next_if(|rule| rule.after <= at) {
                return Some(RuleLine::Owners(rule));
            }
            let line = lines.next()?;
            at += line.len();
            Some(RuleLine::Patterns(line))
        })
    }

    /// The lines for owners that come before what is of that class.
    pub fn owner_rules_before(&self, class: u16) -> &[OwnerRule] {
        &self.owner_rules[..self.owner_rules.partition_point(|rule| rule.class <= class)]
    }

    /// What a pattern comes to, by its place among all; behind the last, the default.
    pub fn outcome(&self, at: usize) -> Outcome {
        let target = self.rules.get(at).map_or(self.default, |rule| rule.target);
        let before = self.owner_rules.partition_point(|rule| rule.after <= at);
        let class = before.checked_sub(1).map_or(0, |last| self.owner_rules[last].class);
        Outcome { target, class }
    }

    /// What the default comes to.
    pub fn default_outcome(&self) -> Outcome {
        self.outcome(self.rules.len())
    }

    /// Whether a line of [rules] or the default leads to a target.
    pub fn decides(&self, target: Target) -> bool {
        self.default == target
            || self.rules.iter().any(|rule| rule.target == target)
            || self.owner_rules.iter().any(|rule| rule.target == target)
    }

    /// What may hold cgroups, in the order of the sets: each target whoever the owner is, then what
    /// the patterns come to behind lines for owners.
    pub fn outcomes(&self) -> impl Iterator<Item = Outcome> {
        let behind = (0..self.rules.len()).map(|at| self.outcome(at));
        let behind: SmallSet<Outcome> = behind.filter(|outcome| outcome.class > 0).collect();
        self.targets().map(Outcome::from).chain(behind)
    }

    /// Whether routes may take what is routed for others: that has a mark of its own by each.
    pub fn forwards(&self) -> bool {
        !self.gateways.is_empty() && !self.routes.is_empty()
    }

    /// The route table of our own that the rules of a route lead to, behind the one that the tproxies
    /// share.
    pub fn table_of(&self, route: usize) -> u32 {
        self.route_table.saturating_add(1).saturating_add(route as u32)
    }

    /// The interfaces of all gateway sections, in file order.
    pub fn gateway_interfaces(&self) -> Vec<&Interface> {
        let all = self.gateways.iter().flat_map(|gateway| &gateway.interfaces);
        all.collect()
    }

    /// Whether any flow gets a ct mark.
    pub fn marks_flows(&self) -> bool {
        self.outlets().next().is_some() || self.marks_direct()
    }

    /// Whether flows that go direct get one: where the kernel's own packets for them, which have no
    /// cgroup or no owner, would go another way.
    pub fn marks_direct(&self) -> bool {
        let spared = self.owner_rules.iter().any(|rule| rule.target != Target::Drop);
        let taken = |outcome: Outcome| outcome.class > 0 && outcome.target != Target::Direct;
        self.default != Target::Direct || spared && self.outcomes().any(taken)
    }

    /// What an outcome of another configuration comes to in this one, by the name of its target.
    pub fn outcome_named(&self, name: &str, class: u16) -> Option<Outcome> {
        let target = self.named(name)?;
        let same = self.outcomes().find(|outcome| *outcome == Outcome { target, class });
        Some(same.unwrap_or(target.into()))
    }
}

/// One thing that is wrong with a configuration; prints as `FILE:LINE: message`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub file: PathBuf,
    /// 0 where the file as a whole is meant.
    pub line: u32,
    pub message: String,
}

impl Problem {
    pub(super) fn at(place: &Place, message: &str) -> Problem {
        let message = match message.char_indices().nth(MAX_MESSAGE) {
            Some((end, _)) => printable(&message[..end]) + "...",
            None => printable(message),
        };
        Problem { file: place.file.to_path_buf(), line: place.line, message }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.message),
            line => write!(f, "{}:{line}: {}", self.file.display(), self.message),
        }
    }
}
