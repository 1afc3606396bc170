//! Policy routing: the ip rules that send marked packets to our route tables, and the routes there
//! that deliver them locally, or lead out by the interface of a route section. Pure: what is wanted,
//! what is there, the difference, and what others' rules and routes mean to it. Everything of ours
//! carries the routing protocol number 99.

use std::cmp::Ordering;
use std::fmt;
use std::mem::discriminant;
use std::net::IpAddr;

use crate::net::{self, Family, Interface, Mark, KERNEL_TABLES, MOST_PRIORITIES};
use crate::netlink::fib;
use crate::netlink::fib::{Device, FibAction, IpRoute, IpRule, SeenRoute, SeenRule, Verb, Way};
use crate::netlink::link::{self, Link, LinkAddress};
use crate::netlink::msg::Batch;
use crate::netlink::parse::Message;
use crate::netlink::uapi::*;
use crate::small::SmallSet;

/// IPv6 does not have two routes with one destination and metric in a table, and takes the smallest
/// metric first. (IPv4 does, and takes the one that was put before the others.) So ours holds
/// whatever others put there: by itself a route has 1024.
const METRIC6: u32 = 1;

/// Of the way out of a route section, and of what stands behind it: while there is none, packets are
/// delivered here, where the table refuses them.
const METRIC_OUT: u32 = 1;
const METRIC_LAST: u32 = u32::MAX;

/// A rule or a route of ours; ordered so that routes stand before the rules that lead to them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    Route(IpRoute),
    Rule(IpRule),
}

/// What is marked and has to be delivered here: all that rules and routes follow from. Of a
/// configuration see `plan::needs`.
pub struct Needs<'a> {
    /// Of the rules, unless others stand before it.
    pub priority: u32,
    pub table: u32,
    /// Of what this host sends to tproxies.
    pub marks: Vec<Mark>,
    pub forwarded: Forwarded<'a>,
    pub ways: Vec<WayOut<'a>>,
    /// The interfaces of those, as far as they are there.
    pub links: Vec<Link>,
}

/// A way out of this host.
pub struct WayOut<'a> {
    pub name: &'a str,
    /// Of what this host sends by it.
    pub mark: Mark,
    /// Of what is routed for others.
    pub forwarded: Option<Mark>,
    /// Ours.
    pub table: u32,
    pub leads: Leads<'a>,
}

/// Where a way out leads.
pub enum Leads<'a> {
    /// To an interface, by a gateway of each family or none.
    Interface {
        name: &'a str,
        gateways: [Option<IpAddr>; 2],
        /// It needs an address there.
        masqueraded: bool,
    },
    /// Where a table of others says.
    Table(u32),
}

impl WayOut<'_> {
    /// The route by its interface, if that is there and can be used.
    fn route(&self, family: Family, links: &[Link]) -> Option<IpRoute> {
        let Leads::Interface { name, gateways, .. } = self.leads else {
            return None;
        };
        let link = links.iter().find(|link| link.name == name)?;
        if self.closed(family, links).is_some() {
            return None;
        }
        let device = Device { index: link.index, name: link.name.clone() };
        let way = Way::Out { device, gateway: gateways[family as usize] };
        Some(IpRoute { family, table: self.table, metric: METRIC_OUT, way })
    }

    /// The interface that it leads to.
    pub fn interface(&self) -> Option<&str> {
        match self.leads {
            Leads::Interface { name, .. } => Some(name),
            Leads::Table(_) => None,
        }
    }

    /// Why packets of a family have no way, as far as is known from here.
    pub fn closed(&self, family: Family, links: &[Link]) -> Option<&'static str> {
        let Leads::Interface { name, masqueraded, .. } = self.leads else {
            return None;
        };
        match links.iter().find(|link| link.name == name) {
            None => Some("absent"),
            Some(link) if !link.running => Some("down"),
            Some(link) if masqueraded && !link.has_address(family) => Some("no address"),
            Some(_) => None,
        }
    }

    /// How that stands, in a word or two.
    pub fn state(&self, links: &[Link]) -> &'static str {
        match Family::BOTH.map(|family| self.closed(family, links)) {
            [None, None] => "open",
            [None, Some(_)] => "IPv4 only",
            [Some(_), None] => "IPv6 only",
            [Some(why), Some(_)] => why,
        }
    }
}

/// What is routed for others to a tproxy: its mark, and where it comes in.
pub struct Forwarded<'a> {
    pub mark: Mark,
    pub interfaces: Vec<&'a Interface>,
}

impl Needs<'_> {
    /// Whether there is nothing to route.
    pub fn is_empty(&self) -> bool {
        self.marks.is_empty() && self.ways.is_empty()
    }

    /// What is marked, in the words of a message.
    pub fn marked(&self) -> &'static str {
        match self.marks.is_empty() {
            false => "proxied traffic",
            true => "traffic of a route",
        }
    }

    fn has_prefixes(&self) -> bool {
        self.forwarded.interfaces.iter().any(|interface| interface.prefix)
    }

    /// How many priorities the rules take.
    fn width(&self) -> u32 {
        let has_tables = self.ways.iter().any(|way| matches!(way.leads, Leads::Table(_)));
        net::priorities(has_tables, self.has_prefixes())
    }

    /// The route tables of ours.
    pub fn tables(&self) -> Vec<u32> {
        std::iter::once(self.table).chain(self.ways.iter().map(|way| way.table)).collect()
    }

    /// The tables of others that ways out lead to. By the main table everything may leave.
    pub fn tables_of_others(&self) -> SmallSet<u32> {
        let of = |way: &WayOut| match way.leads {
            Leads::Table(table) => Some(table).filter(|table| !KERNEL_TABLES.contains(table)),
            Leads::Interface { .. } => None,
        };
        self.ways.iter().filter_map(of).collect()
    }

    /// The tables whose changes concern us.
    pub fn watched(&self) -> Vec<u32> {
        self.tables().into_iter().chain(self.tables_of_others()).collect()
    }

    /// What the kernel should hold of one family: rules from the priority `first` on, and routes.
    pub fn entries(&self, family: Family, first: u32) -> SmallSet<Entry> {
        let mut wanted = SmallSet::default();
        if self.is_empty() {
            return wanted;
        }
        let mut rule = |offset, iif: &str, mark, action| {
            let priority = first.saturating_add(offset);
            wanted.insert(Entry::Rule(IpRule { family, priority, iif: iif.into(), mark, action }));
        };
        // each mark, that of what is routed for others with it, and the tables to ask
        let mut marked = Vec::new();
        marked.extend(self.marks.iter().map(|mark| (*mark, None, vec![self.table])));
        if !self.marks.is_empty() {
            let none = Mark { value: 0, mask: 0 };
            marked.push((none, Some(self.forwarded.mark), vec![self.table]));
        }
        marked.extend(self.ways.iter().map(|way| {
            let tables = match way.leads {
                Leads::Table(table) => vec![table, way.table],
                Leads::Interface { .. } => vec![way.table],
            };
            (way.mark, way.forwarded, tables)
        }));
        // where what is routed goes on
        let end = self.width() - 1;
        for (mark, forwarded, tables) in &marked {
            for (step, table) in (0..).zip(tables) {
                let lookup = FibAction::Lookup(*table);
                if mark.mask != 0 {
                    rule(step, "lo", *mark, lookup);
                }
                let Some(forwarded) = *forwarded else { continue };
                if self.has_prefixes() {
                    // A rule cannot name a prefix, so one rule takes every interface but lo. (The
                    // look-up of the way back says `iif lo` and must not meet it, see
                    // `Config::gateway_mark`.)
                    rule(0, "lo", forwarded, FibAction::Goto(first.saturating_add(end)));
                    rule(1 + step, "", forwarded, lookup);
                } else {
                    for interface in &self.forwarded.interfaces {
                        rule(step, &interface.name, forwarded, lookup);
                    }
                }
            }
        }
        if self.has_prefixes() {
            rule(end, "", Mark { value: 0, mask: 0 }, FibAction::Nop);
        }
        if !self.marks.is_empty() {
            wanted.insert(Entry::Route(IpRoute::new(family, self.table)));
        }
        for way in &self.ways {
            wanted.extend(way.route(family, &self.links).map(Entry::Route));
            wanted.insert(Entry::Route(IpRoute::last(family, way.table)));
        }
        wanted
    }

    /// The priorities of the rules, unless others stand before them.
    pub fn priorities(&self) -> std::ops::Range<u32> {
        self.priority..self.priority.saturating_add(self.width())
    }
}

/// A rule that does nothing, whether it is there or not.
pub fn passing(family: Family, priority: u32) -> Entry {
    Entry::Rule(IpRule {
        family,
        priority,
        iif: "lo".into(),
        mark: Mark { value: 0, mask: 0 },
        action: FibAction::Nop,
    })
}

impl Entry {
    pub fn family(&self) -> Family {
        match self {
            Entry::Route(route) => route.family,
            Entry::Rule(rule) => rule.family,
        }
    }

    /// Whether this is there, or a route that does the same with another metric.
    pub fn is_among(&self, have: &SmallSet<Entry>) -> bool {
        have.iter().any(|entry| match (entry, self) {
            (Entry::Route(one), Entry::Route(other)) => {
                (one.family, one.table, &one.way) == (other.family, other.table, &other.way)
            }
            _ => entry == self,
        })
    }

    /// The message that does that with this entry.
    pub fn encode(&self, batch: &mut Batch, verb: Verb) {
        match self {
            Entry::Rule(rule) => rule.encode(batch, verb),
            Entry::Route(route) => route.encode(batch, verb),
        }
    }

    /// The iproute2 command with the given verb (`add`, `del`).
    pub fn command(&self, verb: &str) -> String {
        let object = match self {
            Entry::Rule(_) => "rule",
            Entry::Route(_) => "route",
        };
        format!("{} {object} {verb} {self}", fib::ip(self.family()))
    }
}

impl IpRule {
    /// The priorities that the rules may start at, of which this is one.
    pub fn first_priorities(&self) -> impl Iterator<Item = u32> {
        let priority = self.priority;
        (0..MOST_PRIORITIES).map(move |offset| priority.saturating_sub(offset))
    }

    /// Whether both do the same, whatever their priority and table.
    pub fn is_like(&self, other: &IpRule) -> bool {
        self.iif == other.iif
            && self.mark == other.mark
            && discriminant(&self.action) == discriminant(&other.action)
    }
}

impl IpRoute {
    pub fn new(family: Family, table: u32) -> IpRoute {
        let metric = match family {
            Family::V4 => 0,
            Family::V6 => METRIC6,
        };
        IpRoute { family, table, metric, way: Way::Here }
    }

    /// What stands behind a way out.
    pub fn last(family: Family, table: u32) -> IpRoute {
        IpRoute { family, table, metric: METRIC_LAST, way: Way::Here }
    }

    /// Whether it leads out of this host.
    pub fn leads_out(&self) -> bool {
        matches!(self.way, Way::Out { .. })
    }
}

/// What a rule of whomever means to ours.
impl SeenRule {
    pub fn is_ours(&self) -> bool {
        // the protocol number alone does not make it ours, for others use it too (Open/R has it in
        // iproute2's list). All of ours ask for a mark, but for the place that one goes on at
        let shape = match self.rule.action {
            FibAction::Lookup(_) | FibAction::Goto(_) => self.rule.mark.mask != 0,
            FibAction::Nop => true,
            FibAction::Refuse(_) => false,
        };
        let plain = self.more.is_empty() && !self.inverted;
        self.protocol == RTPROT_CGTPROXY && plain && shape
    }

    /// Whether it asks for some of these bits of the mark.
    pub fn asks_for_bits(&self, mask: u32) -> bool {
        let mark = self.rule.mark;
        // one that is compared whole needs our bits to be zero, which they are elsewhere
        let whole = mark.mask == u32::MAX && mark.value & mask == 0;
        mark.mask & mask != 0 && !whole
    }

    /// Whether it may take a look-up of what is marked, if it stands before our rules, and lead
    /// elsewhere. Whom of them it takes is for the packet to tell: by addresses, ports, users.
    pub fn takes(&self, needs: &Needs) -> bool {
        let leads_elsewhere = match self.rule.action {
            FibAction::Lookup(table) => table != needs.table && table != RT_TABLE_LOCAL,
            FibAction::Goto(_) | FibAction::Refuse(_) => true,
            FibAction::Nop => false,
        };
        if self.is_ours() || !leads_elsewhere || needs.is_empty() {
            return false;
        }
        if self.inverted {
            return true;
        }
        let Mark { value, mask } = self.rule.mark;
        let asks_for = |own: &Mark| (own.value ^ value) & mask & own.mask == 0;
        let iif = &*self.rule.iif;
        let mut marks = needs.marks.iter().chain(needs.ways.iter().map(|way| &way.mark));
        let of_host = ["", "lo"].contains(&iif) && marks.any(asks_for);
        let covers = |interface: &&Interface| interface.covers(iif);
        let interfaces = &needs.forwarded.interfaces;
        let to_tproxy = Some(needs.forwarded.mark).filter(|_| !needs.marks.is_empty());
        let mut forwarded =
            to_tproxy.into_iter().chain(needs.ways.iter().filter_map(|w| w.forwarded));
        let routed = !interfaces.is_empty() && forwarded.any(|mark| asks_for(&mark));
        !self.elsewhere && (of_host || routed && (iif.is_empty() || interfaces.iter().any(covers)))
    }
}

impl SeenRoute {
    pub fn is_ours(&self) -> bool {
        let plain = self.length == 0 && self.from == 0 && self.tos == 0;
        let leads = match self.kind {
            RTN_LOCAL => true,
            // others that use the number have them elsewhere
            RTN_UNICAST => {
                self.route.metric == METRIC_OUT && !KERNEL_TABLES.contains(&self.route.table)
            }
            _ => false,
        };
        self.protocol == RTPROT_CGTPROXY && plain && leads
    }

    /// Whether it is in a table of a way out, and takes packets that are not for it.
    fn diverts(&self, needs: &Needs) -> bool {
        let there = needs.ways.iter().any(|way| way.table == self.route.table);
        there && !self.is_ours() && self.kind != RTN_LOCAL
    }
}

/// The rules of one family in the kernel's order, and its routes that could matter.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct SeenRouting {
    pub rules: Vec<SeenRule>,
    pub routes: Vec<SeenRoute>,
}

impl SeenRouting {
    /// What of that is ours.
    pub fn ours(&self) -> SmallSet<Entry> {
        let rules = self.rules.iter().filter(|seen| seen.is_ours());
        let routes = self.routes.iter().filter(|seen| seen.is_ours());
        let rules = rules.map(|seen| Entry::Rule(seen.rule.clone()));
        rules.chain(routes.map(|seen| Entry::Route(seen.route.clone()))).collect()
    }

    /// The rules of others that stand, or would stand, before some rule of ours where these begin
    /// at `first`, and may take what is marked. The kernel appends a rule to those of the same
    /// priority.
    pub fn before(&self, needs: &Needs, family: Family, first: u32) -> Vec<&SeenRule> {
        let wanted = needs.entries(family, first);
        let stands_before = |at: usize, other: &SeenRule| {
            let before = |own: &IpRule| match other.rule.priority.cmp(&own.priority) {
                Ordering::Equal => {
                    !self.rules[..at].iter().any(|seen| seen.is_ours() && seen.rule == *own)
                }
                order => order.is_lt(),
            };
            wanted.iter().any(|entry| match entry {
                Entry::Rule(own) => own.action != FibAction::Nop && before(own),
                Entry::Route(_) => false,
            })
        };
        let all = self.rules.iter().enumerate();
        let before = all.filter(|(at, other)| other.takes(needs) && stands_before(*at, other));
        before.map(|(_, other)| other).collect()
    }

    /// Where our rules have to begin, so that no rule of others takes what is marked: as the
    /// configuration has it, or before the first of those. (wg-quick puts its rules below whatever
    /// is there; as near to them as can be, so that they keep room to come back to.) At 0 where there
    /// is no such place.
    pub fn place(&self, needs: &Needs, family: Family) -> u32 {
        let before = self.before(needs, family, needs.priority);
        let first = before.iter().map(|other| other.rule.priority).min();
        first.map_or(needs.priority, |first| first.saturating_sub(needs.width()))
    }

    /// What of ours is missing; for whichever place of the rules most is there.
    pub fn missing(&self, needs: &Needs, family: Family) -> Vec<Entry> {
        let ours = self.ours();
        let mut places: SmallSet<u32> = [needs.priority].into();
        let ours_there = self.rules.iter().filter(|seen| seen.is_ours());
        places.extend(ours_there.flat_map(|seen| seen.rule.first_priorities()));
        let missing = |first| {
            let wanted = needs.entries(family, first).into_iter();
            wanted.filter(|entry| !entry.is_among(&ours)).collect::<Vec<_>>()
        };
        places.into_iter().map(missing).min_by_key(Vec::len).unwrap_or_default()
    }

    /// Routes of others in our table that take what ours should deliver.
    fn in_the_way(&self, table: u32) -> impl Iterator<Item = &SeenRoute> {
        let own = self.routes.iter().position(|seen| seen.is_ours() && seen.route.table == table);
        let all = self.routes.iter().enumerate();
        let all = all.filter(move |(at, seen)| {
            let first = match seen.route.family {
                // the first of the same key counts; another tos or metric is another key
                Family::V4 => {
                    seen.tos != 0 || seen.route.metric == 0 && own.is_none_or(|own| *at < own)
                }
                Family::V6 => seen.route.metric <= METRIC6,
            };
            // a local one does what ours does
            seen.route.table == table && seen.kind != RTN_LOCAL && (seen.length > 0 || first)
        });
        all.map(|(_, seen)| seen)
    }

    /// A line for each thing of others that is between us and what is marked, where our rules begin
    /// at `first`.
    pub fn hindrances(&self, needs: &Needs, family: Family, first: u32) -> Vec<String> {
        if needs.is_empty() {
            return Vec::new();
        }
        let dropped = format!("{} is dropped: another program's", needs.marked());
        let rules = self.before(needs, family, first).into_iter().map(|other| {
            let remedy = match first {
                0 => "no priority is left before it: give it a larger one, or remove it",
                _ => "let it have a larger priority, or set a smaller rule-priority",
            };
            format!("{dropped} {other} takes it before ours of priority {first}; {remedy}")
        });
        let table = needs.table;
        let routes = self.in_the_way(table).map(|other| {
            format!("{dropped} {other} in table {table} takes it; set another route-table")
        });
        let diverting = self.routes.iter().filter(|seen| seen.diverts(needs)).map(|other| {
            let table = other.route.table;
            format!(
                "traffic of a route is dropped: another program's {other} in table {table} takes \
                 some; set another route-table"
            )
        });
        rules.chain(routes.filter(|_| !needs.marks.is_empty())).chain(diverting).collect()
    }
}

/// Whether a notification tells of something that may cost us a rule or a route, or their place: a
/// rule or route of ours that was deleted, a rule of others that may take what is marked and came or
/// went, a route of others in our table or in one that a way out leads to.
pub fn is_change(needs: &Needs, message: &Message) -> bool {
    if let Some(seen) = SeenRule::read(message) {
        return seen.takes(needs) || seen.is_ours() && message.kind == RTM_DELRULE;
    }
    SeenRoute::read(message).is_some_and(|seen| match seen.is_ours() {
        true => message.kind == RTM_DELROUTE,
        false => needs.watched().contains(&seen.route.table),
    })
}

/// Whether a notification tells that a way out opens or closes, where the interfaces were these.
pub fn is_way_change(needs: &Needs, links: &[Link], message: &Message) -> bool {
    let known = |index| links.iter().find(|link| link.index == index);
    if let Some(now) = link::parse(message) {
        let wanted = needs.ways.iter().any(|way| way.interface() == Some(&now.name));
        let there = message.kind == RTM_NEWLINK;
        return match known(now.index) {
            Some(old) => !there || (&old.name, old.running) != (&now.name, now.running),
            None => wanted && there,
        };
    }
    let address = link::parse_address(message).filter(|address| address.wide);
    address.is_some_and(|LinkAddress { index, ip, .. }| {
        let news = |link: &Link| message.kind == RTM_DELADDR || !link.addresses.contains(&ip);
        known(index).is_some_and(news)
    })
}

impl fmt::Display for Entry {
    /// The iproute2 arguments behind `ip rule` or `ip route` and the verb.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Entry::Rule(rule) => rule.fmt(f),
            Entry::Route(route) => route.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    const MARK: Mark = Mark { value: 0x0100_0000, mask: 0xff00_0000 };
    const ROUTED: Mark = Mark { value: 0xff00_0000, mask: 0xff00_0000 };
    const NONE: Mark = Mark { value: 0, mask: 0 };

    fn ip_rule(family: Family, priority: u32, iif: &str, mark: Mark, action: FibAction) -> IpRule {
        IpRule { family, priority, iif: iif.into(), mark, action }
    }

    fn entries() -> Vec<Entry> {
        let mut all = Vec::new();
        for family in Family::BOTH {
            for table in [200, 300] {
                all.extend(
                    [FibAction::Lookup(table), FibAction::Goto(102), FibAction::Nop]
                        .map(|action| Entry::Rule(ip_rule(family, 100, "lo", MARK, action))),
                );
                all.push(Entry::Route(IpRoute::new(family, table)));
            }
        }
        all
    }

    fn seen(bytes: &[u8]) -> SeenRouting {
        let rules = Messages::new(bytes).filter_map(|m| SeenRule::read(&m)).collect();
        let routes = Messages::new(bytes).filter_map(|m| SeenRoute::read(&m)).collect();
        SeenRouting { rules, routes }
    }

    #[test]
    fn a_dumped_entry_is_the_one_that_was_added() {
        for entry in entries() {
            let mut batch = Batch::new(0);
            entry.encode(&mut batch, Verb::Add);
            let ours = seen(batch.bytes()).ours();
            assert_eq!(ours, [entry.clone()].into(), "{}", entry.command("add"));
        }
    }

    #[test]
    fn foreign_entries_are_not_ours() {
        for entry in entries() {
            let mut batch = Batch::new(0);
            entry.encode(&mut batch, Verb::Add);
            let mut bytes = batch.bytes().to_vec();
            for byte in bytes[16..].iter_mut().filter(|byte| **byte == RTPROT_CGTPROXY) {
                *byte = 3;
            }
            assert_eq!(seen(&bytes).ours(), SmallSet::default());
        }
    }

    /// One of others.
    fn other(rule: IpRule) -> SeenRule {
        let (protocol, more) = (0, String::new());
        let (inverted, elsewhere, suppressed) = (false, false, None);
        SeenRule { rule, protocol, inverted, elsewhere, more, suppressed }
    }

    /// The same as one of ours.
    fn own(rule: IpRule) -> SeenRule {
        SeenRule { protocol: RTPROT_CGTPROXY, ..other(rule) }
    }

    fn needs(interfaces: Vec<&Interface>) -> Needs<'_> {
        let forwarded = Forwarded { mark: ROUTED, interfaces };
        let (ways, links) = (Vec::new(), Vec::new());
        Needs { priority: 100, table: 300, marks: vec![MARK], forwarded, ways, links }
    }

    #[test]
    fn what_others_may_take() {
        let named = Interface { name: "br-lan".into(), prefix: false };
        let prefix = Interface { name: "br-".into(), prefix: true };
        let takes = |interface, change: &dyn Fn(&mut SeenRule)| {
            let lookup = FibAction::Lookup(77);
            let mut seen = other(ip_rule(Family::V4, 50, "", NONE, lookup));
            change(&mut seen);
            seen.takes(&needs(Option::into_iter(interface).collect()))
        };
        type Change<'a> = &'a dyn Fn(&mut SeenRule);
        let mark = |value, mask| move |seen: &mut SeenRule| seen.rule.mark = Mark { value, mask };
        let cases: [(Change, [bool; 3]); 16] = [
            (&|_| {}, [true; 3]),
            (&|seen| seen.more = " from 192.0.2.0/24".into(), [true; 3]),
            (&|seen| seen.inverted = true, [true; 3]),
            (
                &|seen| *seen = own(ip_rule(Family::V4, 50, "", MARK, FibAction::Lookup(77))),
                [false; 3],
            ),
            (&|seen| seen.elsewhere = true, [false; 3]),
            (&|seen| seen.rule.iif = "lo".into(), [true; 3]),
            (&|seen| seen.rule.iif = "br-lan".into(), [false, true, true]),
            (&|seen| seen.rule.iif = "br-x".into(), [false, false, true]),
            (&|seen| seen.rule.action = FibAction::Lookup(255), [false; 3]),
            (&|seen| seen.rule.action = FibAction::Lookup(300), [false; 3]),
            (&|seen| seen.rule.action = FibAction::Nop, [false; 3]),
            (&|seen| seen.rule.action = FibAction::Refuse(FR_ACT_UNREACHABLE), [true; 3]),
            (&mark(0x1, 0xff), [true; 3]),
            (&mark(0x1, 0xff00_0001), [false; 3]),
            (&mark(0xff00_0000, 0xff00_0000), [false, true, true]),
            (&mark(0xca6c, u32::MAX), [false; 3]),
        ];
        for (i, (change, wanted)) in cases.into_iter().enumerate() {
            let of = [None, Some(&named), Some(&prefix)];
            assert_eq!(of.map(|interface| takes(interface, change)), wanted, "case {i}");
        }
    }

    /// The kernel's list: each rule goes behind those of the same priority.
    fn add(list: &mut Vec<SeenRule>, rule: SeenRule) {
        let at = list.iter().position(|seen| seen.rule.priority > rule.rule.priority);
        list.insert(at.unwrap_or(list.len()), rule);
    }

    /// Adds a rule without a priority as the kernel does: before the second in the list.
    fn add_first(list: &mut Vec<SeenRule>) -> u32 {
        let second = list.get(1).map_or(0, |seen| seen.rule.priority);
        let priority = second.saturating_sub(1);
        add(list, other(ip_rule(Family::V4, priority, "", NONE, FibAction::Lookup(51820))));
        priority
    }

    /// Moves our rules to where they have to be; where that is.
    fn place(list: &mut Vec<SeenRule>, needs: &Needs) -> u32 {
        let seen = SeenRouting { rules: list.clone(), routes: Vec::new() };
        let place = seen.place(needs, Family::V4);
        let (ours, wanted) = (seen.ours(), needs.entries(Family::V4, place));
        for entry in wanted.difference(&ours) {
            if let Entry::Rule(rule) = entry.clone() {
                add(list, own(rule));
            }
        }
        list.retain(|seen| !seen.is_ours() || wanted.contains(&Entry::Rule(seen.rule.clone())));
        place
    }

    #[test]
    fn overtaken_ours_go_before_and_come_back() {
        let prefix = Interface { name: "br-".into(), prefix: true };
        for (interfaces, width) in [(Vec::new(), 1), (vec![&prefix], 3)] {
            let needs = needs(interfaces);
            let local = other(ip_rule(Family::V4, 0, "", NONE, FibAction::Lookup(RT_TABLE_LOCAL)));
            let main = other(ip_rule(Family::V4, 32766, "", NONE, FibAction::Lookup(254)));
            let mut list = vec![local, main];
            assert_eq!(place(&mut list, &needs), 100);
            let start = list.clone();
            for _ in 0..200 {
                assert_eq!([add_first(&mut list), add_first(&mut list)], [99, 98]);
                assert_eq!(place(&mut list, &needs), 98 - width);
                let seen = SeenRouting { rules: list.clone(), routes: Vec::new() };
                assert_eq!(seen.place(&needs, Family::V4), 98 - width, "and there they stay");
                assert!(seen.before(&needs, Family::V4, 98 - width).is_empty());
                list.retain(|seen| seen.rule.action != FibAction::Lookup(51820));
                assert_eq!(place(&mut list, &needs), 100);
                assert_eq!(list, start);
            }
            // somebody who goes below again and again, and takes none away
            let mut last = 100;
            for _ in 0..200 {
                add_first(&mut list);
                let now = place(&mut list, &needs);
                assert!(now < last || now == 0);
                last = now;
            }
            assert_eq!(last, 0);
        }
    }

    #[test]
    fn of_the_same_priority_the_first_counts() {
        let needs = needs(Vec::new());
        let same = || other(ip_rule(Family::V4, 100, "", NONE, FibAction::Lookup(77)));
        let ours = ip_rule(Family::V4, 100, "lo", MARK, FibAction::Lookup(300));
        let ours = || own(ours.clone());
        let place = |rules| SeenRouting { rules, routes: Vec::new() }.place(&needs, Family::V4);
        assert_eq!(place(vec![same()]), 99);
        assert_eq!(place(vec![same(), ours()]), 99);
        assert_eq!(place(vec![ours(), same()]), 100);
    }

    #[test]
    fn what_is_missing_is_so_at_the_place_where_ours_are() {
        let needs = needs(Vec::new());
        let at = |priority, route: bool| {
            let rule = ip_rule(Family::V6, priority, "lo", MARK, FibAction::Lookup(300));
            let rules = vec![own(rule)];
            let own = IpRoute::new(Family::V6, 300);
            let (protocol, kind) = (RTPROT_CGTPROXY, RTN_LOCAL);
            let own = SeenRoute { route: own, protocol, kind, length: 0, from: 0, tos: 0 };
            let routes = route.then_some(own).into_iter().collect();
            SeenRouting { rules, routes }.missing(&needs, Family::V6)
        };
        assert_eq!(at(97, true), []);
        assert_eq!(at(97, false), [Entry::Route(IpRoute::new(Family::V6, 300))]);
        assert_eq!(SeenRouting::default().missing(&needs, Family::V6).len(), 2);
    }

    #[test]
    fn routes_of_others_that_come_first() {
        let ours = |family| SeenRoute {
            route: IpRoute::new(family, 300),
            protocol: RTPROT_CGTPROXY,
            kind: RTN_LOCAL,
            length: 0,
            from: 0,
            tos: 0,
        };
        let via = |family, metric| SeenRoute {
            route: IpRoute { metric, ..IpRoute::new(family, 300) },
            protocol: 3,
            kind: 1,
            ..ours(family)
        };
        let count = |routes: &[SeenRoute]| {
            let seen = SeenRouting { rules: Vec::new(), routes: routes.to_vec() };
            seen.in_the_way(300).count()
        };
        let (v4, v6) = (Family::V4, Family::V6);
        assert_eq!(count(&[ours(v4), via(v4, 0)]), 0);
        assert_eq!(count(&[via(v4, 0), ours(v4)]), 1);
        assert_eq!(count(&[via(v4, 0)]), 1);
        assert_eq!(count(&[via(v4, 5), ours(v4)]), 0);
        assert_eq!(count(&[ours(v6), via(v6, 1024)]), 0);
        assert_eq!(count(&[via(v6, 1)]), 1);
        let local = |seen: SeenRoute| SeenRoute { kind: RTN_LOCAL, ..seen };
        assert_eq!(count(&[local(via(v4, 0)), ours(v4), local(via(v6, 1))]), 0);
        let net = SeenRoute { length: 8, ..via(v4, 9) };
        assert_eq!(count(&[ours(v4), net]), 1);
    }
}
