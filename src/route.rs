//! Policy routing: the ip rules that send marked packets to our route table, and the route there
//! that delivers them locally. Pure: what is wanted, what a dump says is there, the difference, and
//! the messages. Everything of ours carries the routing protocol number 99.
//! Source: rtnetlink(7), include/uapi/linux/fib_rules.h; bytes as iproute2 sends them.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::mem::discriminant;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::net::{Family, Interface, Mark};
use crate::netlink::msg::Batch;
use crate::netlink::parse::{self, Attrs};
use crate::netlink::uapi::*;

/// `ip rule … pref PRIORITY iif IIF fwmark MARK/MASK lookup TABLE`
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct IpRule {
    pub family: Family,
    pub priority: u32,
    /// Empty: any.
    pub iif: String,
    /// A mask of 0: any.
    pub mark: Mark,
    pub action: Action,
}

/// What a rule does with the look-ups that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Asks this table.
    Lookup(u32),
    /// Goes on at the first rule of this priority.
    Goto(u32),
    /// Nothing: a place to go on at.
    Nop,
    /// Ends the look-up in failure (`FR_ACT_*`); none of ours does.
    Refuse(u8),
}

/// `ip route … local default dev lo table TABLE`
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub family: Family,
    pub table: u32,
    /// 0 for none.
    pub metric: u32,
}

/// IPv6 does not have two routes with one destination and metric in a table, and takes the smallest
/// metric first. (IPv4 does, and takes the one that was put before the others.) So ours holds
/// whatever others put there: by itself a route has 1024.
const METRIC6: u32 = 1;

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX`).
const LO: u32 = 1;

/// A rule or a route of ours; ordered so that routes stand before the rules that lead to them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    Route(Route),
    Rule(IpRule),
}

/// What is marked and has to be delivered here: all that rules and routes follow from. Of a
/// configuration see `plan::needs`.
pub struct Needs<'a> {
    /// Of the rules, unless others stand before it.
    pub priority: u32,
    pub table: u32,
    /// Of what this host sends; without any there is nothing to route.
    pub marks: Vec<Mark>,
    pub forwarded: Forwarded<'a>,
}

/// What is routed for others to a tproxy: its mark, and where it comes in.
pub struct Forwarded<'a> {
    pub mark: Mark,
    pub interfaces: Vec<&'a Interface>,
}

impl Needs<'_> {
    /// How many priorities the rules take.
    fn width(&self) -> u32 {
        match self.forwarded.interfaces.iter().any(|interface| interface.prefix) {
            true => 3,
            false => 1,
        }
    }

    /// What the kernel should hold of one family: rules from the priority `first` on, and a route.
    pub fn entries(&self, family: Family, first: u32) -> BTreeSet<Entry> {
        let mut wanted = BTreeSet::new();
        if self.marks.is_empty() {
            return wanted;
        }
        let forwarded = &self.forwarded;
        let mut rule = |offset, iif: &str, mark, action| {
            let priority = first.saturating_add(offset);
            wanted.insert(Entry::Rule(IpRule { family, priority, iif: iif.into(), mark, action }));
        };
        let lookup = Action::Lookup(self.table);
        (self.marks.iter()).for_each(|mark| rule(0, "lo", *mark, lookup));
        if self.width() > 1 {
            // A rule cannot name a prefix, so one rule takes every interface but lo. (The look-up of
            // the way back says `iif lo` and must not meet it, see `Config::gateway_mark`.)
            let over = Action::Goto(first.saturating_add(2));
            rule(0, "lo", forwarded.mark, over);
            rule(1, "", forwarded.mark, lookup);
            rule(2, "", Mark { value: 0, mask: 0 }, Action::Nop);
        } else {
            for interface in &forwarded.interfaces {
                rule(0, &interface.name, forwarded.mark, lookup);
            }
        }
        wanted.insert(Entry::Route(Route::new(family, self.table)));
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
        action: Action::Nop,
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
    pub fn is_among(&self, have: &BTreeSet<Entry>) -> bool {
        let same = |entry: &Entry| match (entry, self) {
            (Entry::Route(one), Entry::Route(other)) => {
                (one.family, one.table) == (other.family, other.table)
            }
            _ => false,
        };
        have.contains(self) || have.iter().any(same)
    }

    /// The message that adds this entry, or the one that deletes it.
    pub fn encode(&self, batch: &mut Batch, add: bool) {
        match self {
            Entry::Rule(rule) => rule.encode(batch, add),
            Entry::Route(route) => route.encode(batch, add),
        }
    }
}

impl IpRule {
    /// The priority that the rules start at, of which this is one.
    pub fn first_priority(&self) -> u32 {
        let offset = match self.action {
            Action::Nop => 2,
            Action::Lookup(_) if self.iif.is_empty() => 1,
            _ => 0,
        };
        self.priority.saturating_sub(offset)
    }

    /// Whether both do the same, whatever their priority and table.
    pub fn is_like(&self, other: &IpRule) -> bool {
        self.iif == other.iif
            && self.mark == other.mark
            && discriminant(&self.action) == discriminant(&other.action)
    }

    fn encode(&self, batch: &mut Batch, add: bool) {
        let (kind, flags) = verb(add, RTM_NEWRULE, RTM_DELRULE);
        let open = batch.begin(kind, flags);
        // struct fib_rule_hdr; a table above 255 stands in FRA_TABLE alone
        let (table, action) = match self.action {
            Action::Lookup(table) => (small_table(table), if add { FR_ACT_TO_TBL } else { 0 }),
            Action::Goto(_) => (RT_TABLE_UNSPEC, FR_ACT_GOTO),
            Action::Nop => (RT_TABLE_UNSPEC, FR_ACT_NOP),
            Action::Refuse(kind) => (RT_TABLE_UNSPEC, kind),
        };
        let family = self.family.number();
        batch.header(&[family, 0, 0, 0, table, 0, 0, action, 0, 0, 0, 0]);
        batch.u32_ne(FRA_PRIORITY, self.priority);
        if !self.iif.is_empty() {
            batch.str_z(FRA_IIFNAME, &self.iif);
        }
        if self.mark.mask != 0 {
            batch.u32_ne(FRA_FWMARK, self.mark.value);
            batch.u32_ne(FRA_FWMASK, self.mark.mask);
        }
        match self.action {
            Action::Lookup(id) if table == RT_TABLE_UNSPEC => batch.u32_ne(FRA_TABLE, id),
            Action::Goto(priority) => batch.u32_ne(FRA_GOTO, priority),
            _ => {}
        }
        batch.u8(FRA_PROTOCOL, RTPROT_CGTPROXY);
        batch.end(open);
    }
}

impl Route {
    pub fn new(family: Family, table: u32) -> Route {
        let metric = match family {
            Family::V4 => 0,
            Family::V6 => METRIC6,
        };
        Route { family, table, metric }
    }

    fn encode(&self, batch: &mut Batch, add: bool) {
        let (kind, mut flags) = verb(add, RTM_NEWROUTE, RTM_DELROUTE);
        if self.family == Family::V4 {
            // before those of others with the same key, as `ip route prepend`
            flags &= !NLM_F_EXCL;
        }
        let open = batch.begin(kind, flags);
        // struct rtmsg; IPv6 knows one scope only
        let scope = match self.family {
            Family::V4 => RT_SCOPE_HOST,
            Family::V6 => RT_SCOPE_UNIVERSE,
        };
        let table = small_table(self.table);
        let mut header = [0; 12];
        (header[0], header[4]) = (self.family.number(), table);
        (header[5], header[6], header[7]) = (RTPROT_CGTPROXY, scope, RTN_LOCAL);
        batch.header(&header);
        if self.family == Family::V6 {
            // `default` is no destination to IPv4 and :: to IPv6
            batch.raw(RTA_DST, &[0; 16]);
        }
        if table == RT_TABLE_UNSPEC {
            batch.u32_ne(RTA_TABLE, self.table);
        }
        if self.metric != 0 {
            batch.u32_ne(RTA_PRIORITY, self.metric);
        }
        batch.u32_ne(RTA_OIF, LO);
        batch.end(open);
    }
}

fn verb(add: bool, new: u16, delete: u16) -> (u16, u16) {
    match add {
        true => (new, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL),
        false => (delete, NLM_F_REQUEST | NLM_F_ACK),
    }
}

/// The table for the 8-bit header field, as iproute2 fills it.
fn small_table(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(RT_TABLE_UNSPEC)
}

/// Asks for all ip rules of a family.
pub fn get_rules(batch: &mut Batch, family: Family) {
    let open = batch.begin(RTM_GETRULE, NLM_F_REQUEST | NLM_F_DUMP);
    batch.header(&[family.number(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    batch.end(open);
}

/// Asks for all routes of a family in one table. Kernels before 4.20 ignore the filter and send all.
pub fn get_table(batch: &mut Batch, family: Family, table: u32) {
    let open = batch.begin(RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP);
    batch.header(&[family.number(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    batch.u32_ne(RTA_TABLE, table);
    batch.end(open);
}

/// Asks for all routes of a family that carry our protocol number. Kernels before 4.20 ignore the
/// filter and send all.
pub fn get_routes(batch: &mut Batch, family: Family) {
    let open = batch.begin(RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP);
    batch.header(&[family.number(), 0, 0, 0, 0, RTPROT_CGTPROXY, 0, 0, 0, 0, 0, 0]);
    batch.end(open);
}

/// A rule as the kernel tells of it, whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenRule {
    pub rule: IpRule,
    pub ours: bool,
    inverted: bool,
    /// It asks for an output interface or a VRF, which a look-up of what we have marked does not
    /// name. (A socket that is bound to a device does: the table drops what is marked there.)
    elsewhere: bool,
    /// What else it asks for, as iproute2 writes it and with a blank before each; empty in ours.
    more: String,
    /// It does not take a route whose prefix is no longer than this.
    suppressed: Option<u32>,
}

/// A route as the kernel tells of it, whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenRoute {
    pub route: Route,
    pub ours: bool,
    protocol: u8,
    /// `RTN_*`
    kind: u8,
    /// Length of its prefix.
    length: u8,
    tos: u8,
}

fn family(message: &parse::Message) -> Option<Family> {
    match *message.body.first()? {
        AF_INET => Some(Family::V4),
        AF_INET6 => Some(Family::V6),
        _ => None,
    }
}

impl SeenRule {
    /// Reads one rule that was dumped or notified of, deleted ones too.
    pub fn read(message: &parse::Message) -> Option<SeenRule> {
        if ![RTM_NEWRULE, RTM_DELRULE].contains(&message.kind) {
            return None;
        }
        // struct fib_rule_hdr: prefix lengths at 1 and 2, tos at 3, table at 4, action at 7, flags
        let [_, to, from, tos, small_table, _, _, action, ..] = *message.body else {
            return None;
        };
        let flags = message.body.get(8..).and_then(parse::u32_ne)?;
        let attrs = Attrs::after(message.body, 12);
        let number = |attr| attrs.clone().get(attr).and_then(parse::u32_ne);
        let text = |attr| attrs.clone().get(attr).map(|name| parse::str_z(name).into_owned());
        let value = number(FRA_FWMARK).unwrap_or(0);
        // a mark without a mask is compared whole
        let whole = if value == 0 { 0 } else { u32::MAX };
        let rule = IpRule {
            family: family(message)?,
            // the rule for the local table has none
            priority: number(FRA_PRIORITY).unwrap_or(0),
            iif: text(FRA_IIFNAME).unwrap_or_default(),
            mark: Mark { value, mask: number(FRA_FWMASK).unwrap_or(whole) },
            action: match action {
                FR_ACT_TO_TBL => {
                    Action::Lookup(number(FRA_TABLE).unwrap_or(u32::from(small_table)))
                }
                FR_ACT_GOTO => Action::Goto(number(FRA_GOTO).unwrap_or(0)),
                FR_ACT_NOP => Action::Nop,
                other => Action::Refuse(other),
            },
        };
        let (mut more, mut elsewhere) = (String::new(), false);
        let mut ask = |words: String| more.push_str(&format!(" {words}"));
        for (kind, data) in attrs.clone() {
            let pair = |size: usize| {
                let half = |at| data.get(at..at + size);
                let number = |bytes: &[u8]| match *bytes {
                    [a, b] => u32::from(u16::from_ne_bytes([a, b])),
                    _ => parse::u32_ne(bytes).unwrap_or(0),
                };
                half(0)
                    .zip(half(size))
                    .map_or(String::new(), |(from, to)| format!("{}-{}", number(from), number(to)))
            };
            match kind {
                FRA_SRC => ask(format!("from {}/{from}", address(data))),
                FRA_DST => ask(format!("to {}/{to}", address(data))),
                FRA_OIFNAME => {
                    elsewhere = true;
                    ask(format!("oif {}", parse::str_z(data)));
                }
                FRA_L3MDEV => {
                    elsewhere = true;
                    ask("l3mdev".into());
                }
                FRA_UID_RANGE => ask(format!("uidrange {}", pair(4))),
                FRA_IP_PROTO => ask(format!("ipproto {}", data.first().unwrap_or(&0))),
                FRA_SPORT_RANGE => ask(format!("sport {}", pair(2))),
                FRA_DPORT_RANGE => ask(format!("dport {}", pair(2))),
                FRA_TUN_ID => ask("tun_id".into()),
                FRA_DSCP => ask(format!("dscp {}", data.first().unwrap_or(&0))),
                FRA_FLOWLABEL => ask("flowlabel".into()),
                _ => {}
            }
        }
        if tos != 0 {
            ask(format!("tos {tos:#x}"));
        }
        let tagged = attrs.clone().get(FRA_PROTOCOL) == Some(&[RTPROT_CGTPROXY]);
        let inverted = flags & FIB_RULE_INVERT != 0;
        // the protocol number alone does not make it ours, for others use it too (Open/R has it in
        // iproute2's list). All of ours ask for a mark, but for the place that one goes on at
        let shape = match rule.action {
            Action::Lookup(_) | Action::Goto(_) => rule.mark.mask != 0,
            Action::Nop => true,
            Action::Refuse(_) => false,
        };
        let plain = more.is_empty() && to == 0 && from == 0 && !inverted;
        Some(SeenRule {
            ours: tagged && plain && shape,
            rule,
            inverted,
            elsewhere,
            more,
            suppressed: number(FRA_SUPPRESS_PREFIXLEN).filter(|length| *length != u32::MAX),
        })
    }

    /// Whether it may take a look-up of what is marked, if it stands before our rules, and lead
    /// elsewhere. Whom of them it takes is for the packet to tell: by addresses, ports, users.
    pub fn takes(&self, needs: &Needs) -> bool {
        let leads_elsewhere = match self.rule.action {
            Action::Lookup(table) => table != needs.table && table != RT_TABLE_LOCAL,
            Action::Goto(_) | Action::Refuse(_) => true,
            Action::Nop => false,
        };
        if self.ours || !leads_elsewhere || needs.marks.is_empty() {
            return false;
        }
        if self.inverted {
            return true;
        }
        let Mark { value, mask } = self.rule.mark;
        let asks_for = |own: &Mark| (own.value ^ value) & mask & own.mask == 0;
        let iif = &*self.rule.iif;
        let of_host = ["", "lo"].contains(&iif) && needs.marks.iter().any(asks_for);
        let covers = |interface: &&Interface| match interface.prefix {
            true => iif.starts_with(&*interface.name),
            false => iif == interface.name,
        };
        let interfaces = &needs.forwarded.interfaces;
        let routed = !interfaces.is_empty() && asks_for(&needs.forwarded.mark);
        !self.elsewhere && (of_host || routed && (iif.is_empty() || interfaces.iter().any(covers)))
    }
}

fn address(data: &[u8]) -> String {
    if let Ok(bytes) = <[u8; 4]>::try_from(data) {
        return Ipv4Addr::from(bytes).to_string();
    }
    <[u8; 16]>::try_from(data).map_or(String::new(), |bytes| Ipv6Addr::from(bytes).to_string())
}

impl SeenRoute {
    /// Reads one route that was dumped or notified of, deleted ones too.
    pub fn read(message: &parse::Message) -> Option<SeenRoute> {
        if ![RTM_NEWROUTE, RTM_DELROUTE].contains(&message.kind) {
            return None;
        }
        // struct rtmsg: prefix lengths at 1 and 2, tos, table, protocol, scope, type at 7
        let [_, length, from, tos, small_table, protocol, _, kind, ..] = *message.body else {
            return None;
        };
        let attrs = Attrs::after(message.body, 12);
        let number = |attr| attrs.clone().get(attr).and_then(parse::u32_ne);
        let route = Route {
            family: family(message)?,
            table: number(RTA_TABLE).unwrap_or(u32::from(small_table)),
            metric: number(RTA_PRIORITY).unwrap_or(0),
        };
        let plain = length == 0 && from == 0 && tos == 0 && kind == RTN_LOCAL;
        let ours = protocol == RTPROT_CGTPROXY && plain;
        Some(SeenRoute { route, ours, protocol, kind, length, tos })
    }
}

/// The rules of one family in the kernel's order, and its routes that could matter.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Seen {
    pub rules: Vec<SeenRule>,
    pub routes: Vec<SeenRoute>,
}

impl Seen {
    /// Those of ours.
    pub fn ours(&self) -> BTreeSet<Entry> {
        let rules = self.rules.iter().filter(|seen| seen.ours);
        let routes = self.routes.iter().filter(|seen| seen.ours);
        let rules = rules.map(|seen| Entry::Rule(seen.rule.clone()));
        rules.chain(routes.map(|seen| Entry::Route(seen.route))).collect()
    }

    /// The rules of others that stand, or would stand, before some rule of ours where these begin
    /// at `first`, and may take what is marked. The kernel appends a rule to those of the same
    /// priority.
    pub fn before(&self, needs: &Needs, family: Family, first: u32) -> Vec<&SeenRule> {
        let wanted = needs.entries(family, first);
        let lookups = wanted.iter().filter_map(|entry| match entry {
            Entry::Rule(rule) if rule.action != Action::Nop => Some(rule),
            _ => None,
        });
        let lookups: Vec<&IpRule> = lookups.collect();
        let stands_before = |at: usize, other: &SeenRule| {
            lookups.iter().any(|own| match other.rule.priority.cmp(&own.priority) {
                Ordering::Less => true,
                Ordering::Equal => {
                    !self.rules[..at].iter().any(|seen| seen.ours && seen.rule == **own)
                }
                Ordering::Greater => false,
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
        let mut places: BTreeSet<u32> = [needs.priority].into();
        places.extend(self.rules.iter().filter(|s| s.ours).map(|s| s.rule.first_priority()));
        let missing = |first| {
            let wanted = needs.entries(family, first).into_iter();
            wanted.filter(|entry| !entry.is_among(&ours)).collect::<Vec<_>>()
        };
        places.into_iter().map(missing).min_by_key(Vec::len).unwrap_or_default()
    }

    /// Routes of others in our table that take what ours should deliver.
    pub fn in_the_way(&self, table: u32) -> impl Iterator<Item = &SeenRoute> {
        let own = self.routes.iter().position(|seen| seen.ours && seen.route.table == table);
        let all = self.routes.iter().enumerate();
        let all = all.filter(move |(at, seen)| {
            let first = match seen.route.family {
                // the first of the same key counts; another tos or metric is another key
                Family::V4 => {
                    seen.tos != 0 || seen.route.metric == 0 && own.is_none_or(|own| *at < own)
                }
                Family::V6 => seen.route.metric <= METRIC6 && seen.kind != RTN_LOCAL,
            };
            seen.route.table == table
                && !seen.ours
                && seen.kind != RTN_LOCAL
                && (seen.length > 0 || first)
        });
        all.map(|(_, seen)| seen)
    }

    /// A line for each thing of others that is between us and what is marked, where our rules begin
    /// at `first`.
    pub fn hindrances(&self, needs: &Needs, family: Family, first: u32) -> Vec<String> {
        if needs.marks.is_empty() {
            return Vec::new();
        }
        let dropped = "proxied traffic is dropped: another program's";
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
        rules.chain(routes).collect()
    }
}

/// A socket filter that passes the notifications which [`is_change`] and [`is_revival`] could be
/// about, and keeps all others (routes come and go on a router) from waking us.
pub fn event_filter(table: u32) -> [libc::sock_filter; 20] {
    // BPF loads big-endian; the header, interface indexes and tables are in host order
    let kind = |kind: u16| u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
    let host = |word: u32| u32::from_be_bytes(word.to_ne_bytes());
    let op = |code: u32, k: u32, jt: u8, jf: u8| {
        let code = code as u16;
        libc::sock_filter { code, jt, jf, k }
    };
    let load = |size: u32, at: u32| op(libc::BPF_LD | libc::BPF_ABS | size, at, 0, 0);
    let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let equal = |k: u32, yes: u8, no: u8| op(jump, k, yes, no);
    let set = |register: u32, k: u32| op(register | libc::BPF_IMM, k, 0, 0);
    let answer = |k: u32| op(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    // where the attributes of a route begin
    let attributes = (NLMSG_HDRLEN + 12) as u32;
    [
        load(libc::BPF_H, 4), // 0: nlmsg_type
        equal(kind(RTM_DELRULE), 17, 0),
        equal(kind(RTM_NEWRULE), 16, 0),
        equal(kind(RTM_DELROUTE), 3, 0),
        equal(kind(RTM_NEWROUTE), 4, 0),
        equal(kind(RTM_NEWLINK), 10, 0),
        equal(kind(RTM_NEWADDR), 9, 11),
        load(libc::BPF_B, 21), // 7: rtm_protocol
        equal(u32::from(RTPROT_CGTPROXY), 10, 0),
        set(libc::BPF_LD, attributes), // 9: where RTA_TABLE is
        set(libc::BPF_LDX, u32::from(RTA_TABLE)),
        load(libc::BPF_W, SKF_AD_OFF + SKF_AD_NLATTR),
        equal(0, 5, 0),
        op(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0),
        op(libc::BPF_LD | libc::BPF_IND | libc::BPF_W, NLA_HDRLEN as u32, 0, 0),
        equal(host(table), 3, 2),
        load(libc::BPF_W, 20), // 16: ifi_index or ifa_index
        equal(host(LO), 1, 0),
        answer(0),        // 18
        answer(u32::MAX), // 19
    ]
}

/// Whether a notification tells of something that may cost us a rule or a route, or their place: a
/// rule or route of ours that was deleted, a rule of others that may take what is marked and came or
/// went, a route of others in our table.
pub fn is_change(needs: &Needs, message: &parse::Message) -> bool {
    if let Some(seen) = SeenRule::read(message) {
        return seen.takes(needs) || seen.ours && message.kind == RTM_DELRULE;
    }
    SeenRoute::read(message).is_some_and(|seen| match seen.ours {
        true => message.kind == RTM_DELROUTE,
        false => seen.route.table == needs.table,
    })
}

/// Whether a notification tells that lo is up, or has a new address: what was refused before may be
/// possible now. (Going down it loses the IPv4 route without a word; an IPv6 address on it means
/// that IPv6 has been switched on.)
pub fn is_revival(message: &parse::Message) -> bool {
    // struct ifinfomsg: index at 4, flags at 8; struct ifaddrmsg: index at 4
    let word = |at: usize| message.body.get(at..).and_then(parse::u32_ne);
    let up = match message.kind {
        RTM_NEWLINK => word(8).is_some_and(|flags| flags & IFF_UP != 0),
        RTM_NEWADDR => true,
        _ => false,
    };
    up && word(4) == Some(LO)
}

impl fmt::Display for SeenRule {
    /// As iproute2 lists it, with numbers for names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rule = &self.rule;
        let not = if self.inverted { " not" } else { "" };
        write!(f, "{} rule pref {}{not}{}", ip(rule.family), rule.priority, self.more)?;
        if !rule.iif.is_empty() {
            write!(f, " iif {}", rule.iif)?;
        }
        let Mark { value, mask } = rule.mark;
        match mask {
            0 => {}
            u32::MAX => write!(f, " fwmark {value:#x}")?,
            _ => write!(f, " fwmark {value:#x}/{mask:#x}")?,
        }
        write!(f, " {}", rule.action)?;
        self.suppressed.map_or(Ok(()), |length| write!(f, " suppress_prefixlength {length}"))
    }
}

impl fmt::Display for SeenRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (family, protocol, length) = (self.route.family, self.protocol, self.length);
        write!(f, "{} route of protocol {protocol} and prefix length {length}", ip(family))
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Lookup(table) => write!(f, "lookup {table}"),
            Action::Goto(priority) => write!(f, "goto {priority}"),
            Action::Nop => f.write_str("nop"),
            Action::Refuse(FR_ACT_UNREACHABLE) => f.write_str("unreachable"),
            Action::Refuse(FR_ACT_PROHIBIT) => f.write_str("prohibit"),
            Action::Refuse(_) => f.write_str("blackhole"),
        }
    }
}

fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

impl fmt::Display for Entry {
    /// The iproute2 arguments behind `ip rule` or `ip route` and the verb.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Entry::Rule(rule) => {
                write!(f, "pref {}", rule.priority)?;
                if !rule.iif.is_empty() {
                    write!(f, " iif {}", rule.iif)?;
                }
                let Mark { value, mask } = rule.mark;
                if mask != 0 {
                    write!(f, " fwmark {value:#010x}/{mask:#010x}")?;
                }
                write!(f, " {} protocol {RTPROT_CGTPROXY}", rule.action)
            }
            Entry::Route(Route { table, metric, .. }) => {
                write!(f, "local default dev lo table {table} proto {RTPROT_CGTPROXY}")?;
                match metric {
                    0 => Ok(()),
                    metric => write!(f, " metric {metric}"),
                }
            }
        }
    }
}

impl Entry {
    /// The iproute2 command with the given verb (`add`, `del`).
    pub fn command(&self, verb: &str) -> String {
        let object = match self {
            Entry::Rule(_) => "rule",
            Entry::Route(_) => "route",
        };
        format!("{} {object} {verb} {self}", ip(self.family()))
    }
}

/// Asks which way packets to an address go.
pub fn get_way(batch: &mut Batch, to: IpAddr) {
    let open = batch.begin(RTM_GETROUTE, NLM_F_REQUEST | NLM_F_ACK);
    let (family, octets) = match to {
        IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
    };
    // struct rtmsg
    let mut head = [0; 12];
    (head[0], head[1]) = (family, 8 * octets.len() as u8);
    batch.header(&head);
    batch.raw(RTA_DST, &octets);
    batch.end(open);
}

/// Reads an answer to [`get_way`]: whether they stay on this host, or go to all of a network.
pub fn parse_way(message: &parse::Message) -> Option<bool> {
    let kind = u32::from(*message.body.get(7)?);
    (message.kind == RTM_NEWROUTE).then(|| [u32::from(RTN_LOCAL), RTN_BROADCAST].contains(&kind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    const MARK: Mark = Mark { value: 0x0100_0000, mask: 0xff00_0000 };
    const ROUTED: Mark = Mark { value: 0xff00_0000, mask: 0xff00_0000 };
    const NONE: Mark = Mark { value: 0, mask: 0 };

    fn ip_rule(family: Family, priority: u32, iif: &str, mark: Mark, action: Action) -> IpRule {
        IpRule { family, priority, iif: iif.into(), mark, action }
    }

    fn entries() -> Vec<Entry> {
        let mut all = Vec::new();
        for family in Family::BOTH {
            for table in [200, 300] {
                all.extend(
                    [Action::Lookup(table), Action::Goto(102), Action::Nop]
                        .map(|action| Entry::Rule(ip_rule(family, 100, "lo", MARK, action))),
                );
                all.push(Entry::Route(Route::new(family, table)));
            }
        }
        all
    }

    fn seen(bytes: &[u8]) -> Seen {
        let rules = Messages::new(bytes).filter_map(|m| SeenRule::read(&m)).collect();
        let routes = Messages::new(bytes).filter_map(|m| SeenRoute::read(&m)).collect();
        Seen { rules, routes }
    }

    #[test]
    fn a_dumped_entry_is_the_one_that_was_added() {
        for entry in entries() {
            let mut batch = Batch::new(0);
            entry.encode(&mut batch, true);
            let ours = seen(batch.bytes()).ours();
            assert_eq!(ours, [entry.clone()].into(), "{}", entry.command("add"));
        }
    }

    #[test]
    fn foreign_entries_are_not_ours() {
        for entry in entries() {
            let mut batch = Batch::new(0);
            entry.encode(&mut batch, true);
            let mut bytes = batch.bytes().to_vec();
            for byte in bytes[16..].iter_mut().filter(|byte| **byte == RTPROT_CGTPROXY) {
                *byte = 3;
            }
            assert_eq!(seen(&bytes).ours(), BTreeSet::new());
        }
    }

    /// One of others.
    fn other(rule: IpRule) -> SeenRule {
        let more = String::new();
        let (ours, inverted, elsewhere, suppressed) = (false, false, false, None);
        SeenRule { rule, ours, inverted, elsewhere, more, suppressed }
    }

    fn needs(interfaces: Vec<&Interface>) -> Needs<'_> {
        let forwarded = Forwarded { mark: ROUTED, interfaces };
        Needs { priority: 100, table: 300, marks: vec![MARK], forwarded }
    }

    #[test]
    fn what_others_may_take() {
        let named = Interface { name: "br-lan".into(), prefix: false };
        let prefix = Interface { name: "br-".into(), prefix: true };
        let takes = |interface, change: &dyn Fn(&mut SeenRule)| {
            let lookup = Action::Lookup(77);
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
            (&|seen| seen.ours = true, [false; 3]),
            (&|seen| seen.elsewhere = true, [false; 3]),
            (&|seen| seen.rule.iif = "lo".into(), [true; 3]),
            (&|seen| seen.rule.iif = "br-lan".into(), [false, true, true]),
            (&|seen| seen.rule.iif = "br-x".into(), [false, false, true]),
            (&|seen| seen.rule.action = Action::Lookup(255), [false; 3]),
            (&|seen| seen.rule.action = Action::Lookup(300), [false; 3]),
            (&|seen| seen.rule.action = Action::Nop, [false; 3]),
            (&|seen| seen.rule.action = Action::Refuse(FR_ACT_UNREACHABLE), [true; 3]),
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
        add(list, other(ip_rule(Family::V4, priority, "", NONE, Action::Lookup(51820))));
        priority
    }

    /// Moves our rules to where they have to be; where that is.
    fn place(list: &mut Vec<SeenRule>, needs: &Needs) -> u32 {
        let seen = Seen { rules: list.clone(), routes: Vec::new() };
        let place = seen.place(needs, Family::V4);
        let (ours, wanted) = (seen.ours(), needs.entries(Family::V4, place));
        for entry in wanted.difference(&ours) {
            if let Entry::Rule(rule) = entry.clone() {
                add(list, SeenRule { ours: true, ..other(rule) });
            }
        }
        list.retain(|seen| !seen.ours || wanted.contains(&Entry::Rule(seen.rule.clone())));
        place
    }

    #[test]
    fn overtaken_ours_go_before_and_come_back() {
        let prefix = Interface { name: "br-".into(), prefix: true };
        for (interfaces, width) in [(Vec::new(), 1), (vec![&prefix], 3)] {
            let needs = needs(interfaces);
            let local = other(ip_rule(Family::V4, 0, "", NONE, Action::Lookup(RT_TABLE_LOCAL)));
            let main = other(ip_rule(Family::V4, 32766, "", NONE, Action::Lookup(254)));
            let mut list = vec![local, main];
            assert_eq!(place(&mut list, &needs), 100);
            let start = list.clone();
            for _ in 0..200 {
                assert_eq!([add_first(&mut list), add_first(&mut list)], [99, 98]);
                assert_eq!(place(&mut list, &needs), 98 - width);
                let seen = Seen { rules: list.clone(), routes: Vec::new() };
                assert_eq!(seen.place(&needs, Family::V4), 98 - width, "and there they stay");
                assert!(seen.before(&needs, Family::V4, 98 - width).is_empty());
                list.retain(|seen| seen.rule.action != Action::Lookup(51820));
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
        let same = || other(ip_rule(Family::V4, 100, "", NONE, Action::Lookup(77)));
        let ours = ip_rule(Family::V4, 100, "lo", MARK, Action::Lookup(300));
        let ours = || SeenRule { ours: true, ..other(ours.clone()) };
        let place = |rules| Seen { rules, routes: Vec::new() }.place(&needs, Family::V4);
        assert_eq!(place(vec![same()]), 99);
        assert_eq!(place(vec![same(), ours()]), 99);
        assert_eq!(place(vec![ours(), same()]), 100);
    }

    #[test]
    fn what_is_missing_is_so_at_the_place_where_ours_are() {
        let needs = needs(Vec::new());
        let at = |priority, route: bool| {
            let rule = ip_rule(Family::V6, priority, "lo", MARK, Action::Lookup(300));
            let rules = vec![SeenRule { ours: true, ..other(rule) }];
            let own = Route::new(Family::V6, 300);
            let (ours, protocol, kind) = (true, RTPROT_CGTPROXY, RTN_LOCAL);
            let own = SeenRoute { route: own, ours, protocol, kind, length: 0, tos: 0 };
            let routes = route.then_some(own).into_iter().collect();
            Seen { rules, routes }.missing(&needs, Family::V6)
        };
        assert_eq!(at(97, true), []);
        assert_eq!(at(97, false), [Entry::Route(Route::new(Family::V6, 300))]);
        assert_eq!(Seen::default().missing(&needs, Family::V6).len(), 2);
    }

    #[test]
    fn routes_of_others_that_come_first() {
        let ours = |family| SeenRoute {
            route: Route::new(family, 300),
            ours: true,
            protocol: RTPROT_CGTPROXY,
            kind: RTN_LOCAL,
            length: 0,
            tos: 0,
        };
        let via = |family, metric| SeenRoute {
            route: Route { metric, ..Route::new(family, 300) },
            ours: false,
            protocol: 3,
            kind: 1,
            ..ours(family)
        };
        let count = |routes: &[SeenRoute]| {
            let seen = Seen { rules: Vec::new(), routes: routes.to_vec() };
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
