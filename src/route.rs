//! Policy routing: the ip rules that send marked packets to our route table, and the route there
//! that delivers them locally. Pure: what is wanted, what a dump says is there, the difference, and
//! the messages. Everything of ours carries the routing protocol number 99.
//! Source: rtnetlink(7), include/uapi/linux/fib_rules.h; bytes as iproute2 sends them.

use std::collections::BTreeSet;
use std::fmt;
use std::mem::discriminant;
use std::net::IpAddr;

use crate::config::Config;
use crate::netlink::msg::Batch;
use crate::netlink::parse::{self, Attrs};
use crate::netlink::uapi::*;
use crate::nft::expr::{Family, Interface, Mark};

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
}

/// `ip route … local default dev lo table TABLE`
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    pub family: Family,
    pub table: u32,
}

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX`).
const LO: u32 = 1;

/// A rule or a route of ours; ordered so that routes stand before the rules that lead to them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    Route(Route),
    Rule(IpRule),
}

/// What the kernel should hold of one family.
pub fn wanted(config: &Config, family: Family) -> BTreeSet<Entry> {
    let mark = |value| Mark { value, mask: config.mask };
    let marks: Vec<Mark> = config.tproxies.iter().map(|t| mark(t.mark)).collect();
    let gateway =
        Gateway { mark: mark(config.gateway_mark()), interfaces: config.gateway_interfaces() };
    let (priority, table) = (config.rule_priority, config.route_table);
    entries(family, priority, table, &marks, &gateway)
}

/// What is routed for others to a tproxy: its mark, and where it comes in.
pub struct Gateway<'a> {
    pub mark: Mark,
    pub interfaces: Vec<&'a Interface>,
}

/// What the kernel should hold of one family for what this host sends with one of `marks`, and for
/// what it routes: rules from `priority` on, and a route in `table`. Nothing without marks.
pub fn entries(
    family: Family,
    priority: u32,
    table: u32,
    marks: &[Mark],
    gateway: &Gateway,
) -> BTreeSet<Entry> {
    let mut wanted = BTreeSet::new();
    if marks.is_empty() {
        return wanted;
    }
    let mut rule = |offset, iif: &str, mark, action| {
        wanted.insert(Entry::Rule(IpRule {
            family,
            priority: priority.saturating_add(offset),
            iif: iif.into(),
            mark,
            action,
        }));
    };
    let lookup = Action::Lookup(table);
    (marks.iter()).for_each(|mark| rule(0, "lo", *mark, lookup));
    if gateway.interfaces.iter().any(|interface| interface.prefix) {
        // A rule cannot name a prefix, so one rule takes every interface but lo. (The look-up of
        // the way back says `iif lo` and must not meet it, see `Config::gateway_mark`.)
        let over = Action::Goto(priority.saturating_add(2));
        rule(0, "lo", gateway.mark, over);
        rule(1, "", gateway.mark, lookup);
        rule(2, "", Mark { value: 0, mask: 0 }, Action::Nop);
    } else {
        for interface in &gateway.interfaces {
            rule(0, &interface.name, gateway.mark, lookup);
        }
    }
    wanted.insert(Entry::Route(Route { family, table }));
    wanted
}

/// A rule that does nothing, whether it is there or not.
pub fn passing(config: &Config, family: Family) -> Entry {
    Entry::Rule(IpRule {
        family,
        priority: config.rule_priority,
        iif: "lo".into(),
        mark: Mark { value: 0, mask: 0 },
        action: Action::Nop,
    })
}

/// The priorities of the ip rules that the kernel should hold.
pub fn priorities(config: &Config) -> Vec<u32> {
    let mut all = Vec::new();
    // of both families the same, and in this order
    for entry in wanted(config, Family::V4) {
        if let Entry::Rule(rule) = entry {
            all.push(rule.priority);
        }
    }
    all.dedup();
    all
}

impl Entry {
    pub fn family(&self) -> Family {
        match self {
            Entry::Route(route) => route.family,
            Entry::Rule(rule) => rule.family,
        }
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
    fn encode(&self, batch: &mut Batch, add: bool) {
        let (kind, flags) = verb(add, RTM_NEWROUTE, RTM_DELROUTE);
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

/// Asks for all routes of a family that carry our protocol number. Kernels before 4.20 ignore the
/// filter and send all.
pub fn get_routes(batch: &mut Batch, family: Family) {
    let open = batch.begin(RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP);
    batch.header(&[family.number(), 0, 0, 0, 0, RTPROT_CGTPROXY, 0, 0, 0, 0, 0, 0]);
    batch.end(open);
}

/// Reads one dumped rule or route; `None` for what is not ours. The protocol number alone does not
/// make it ours, for others use it too (Open/R has it in iproute2's list): the shape counts as well.
pub fn parse(message: &parse::Message) -> Option<Entry> {
    let family = match *message.body.first()? {
        AF_INET => Family::V4,
        AF_INET6 => Family::V6,
        _ => return None,
    };
    let attrs = Attrs::after(message.body, 12);
    let number = |attr| attrs.clone().get(attr).and_then(parse::u32_ne);
    // struct fib_rule_hdr and struct rtmsg: prefix lengths at 1 and 2, action or type at 7
    let whole = message.body.get(1..3)? == [0, 0];
    let small_table = u32::from(*message.body.get(4)?);
    let action = *message.body.get(7)?;
    match message.kind {
        RTM_NEWRULE => {
            let tagged = attrs.clone().get(FRA_PROTOCOL) == Some(&[RTPROT_CGTPROXY]);
            let action = match action {
                FR_ACT_TO_TBL => Action::Lookup(number(FRA_TABLE).unwrap_or(small_table)),
                FR_ACT_GOTO => Action::Goto(number(FRA_GOTO)?),
                FR_ACT_NOP => Action::Nop,
                _ => return None,
            };
            let iif = attrs.clone().get(FRA_IIFNAME).unwrap_or(b"");
            let rule = IpRule {
                family,
                priority: number(FRA_PRIORITY)?,
                iif: parse::str_z(iif).into_owned(),
                mark: Mark {
                    value: number(FRA_FWMARK).unwrap_or(0),
                    mask: number(FRA_FWMASK).unwrap_or(0),
                },
                action,
            };
            // all of ours ask for a mark, but for the place that one of them goes on at
            let ours = tagged && whole && (rule.mark.mask != 0 || action == Action::Nop);
            ours.then_some(Entry::Rule(rule))
        }
        RTM_NEWROUTE => {
            let ours = *message.body.get(5)? == RTPROT_CGTPROXY && whole && action == RTN_LOCAL;
            let table = number(RTA_TABLE).unwrap_or(small_table);
            ours.then_some(Entry::Route(Route { family, table }))
        }
        _ => None,
    }
}

/// A socket filter that passes the notifications which [`is_deletion`], [`is_revival`] and
/// [`overtakes`] could be about, and keeps all others (routes come and go on a router) from waking us.
pub fn event_filter() -> [libc::sock_filter; 12] {
    // BPF loads big-endian; the header and interface indexes are in host order
    let kind = |kind: u16| u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
    let index = |index: u32| u32::from_be_bytes(index.to_ne_bytes());
    let op = |code: u32, k: u32, jt: u8, jf: u8| {
        let code = code as u16;
        libc::sock_filter { code, jt, jf, k }
    };
    let load = |size: u32, at: u32| op(libc::BPF_LD | libc::BPF_ABS | size, at, 0, 0);
    let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let equal = |k: u32, yes: u8, no: u8| op(jump, k, yes, no);
    let answer = |k: u32| op(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    [
        load(libc::BPF_H, 4), // 0: nlmsg_type
        equal(kind(RTM_DELRULE), 9, 0),
        equal(kind(RTM_NEWRULE), 8, 0),
        equal(kind(RTM_DELROUTE), 2, 0),
        equal(kind(RTM_NEWLINK), 3, 0),
        equal(kind(RTM_NEWADDR), 2, 4),
        load(libc::BPF_B, 21), // 6: rtm_protocol
        equal(u32::from(RTPROT_CGTPROXY), 3, 2),
        load(libc::BPF_W, 20), // 8: ifi_index or ifa_index
        equal(index(LO), 1, 0),
        answer(0),        // 10
        answer(u32::MAX), // 11
    ]
}

/// Whether a notification tells that a rule or a route of ours was deleted.
pub fn is_deletion(message: &parse::Message) -> bool {
    let kind = match message.kind {
        RTM_DELRULE => RTM_NEWRULE,
        RTM_DELROUTE => RTM_NEWROUTE,
        _ => return false,
    };
    parse(&parse::Message { kind, ..*message }).is_some()
}

/// Reads one dumped or notified rule: its priority, where it is another's, stands before ours, and
/// may match what we have marked. The kernel puts a rule that asks for no priority (wg-quick's)
/// before all others.
pub fn overtakes(config: &Config, message: &parse::Message) -> Option<u32> {
    if message.kind != RTM_NEWRULE || parse(message).is_some() || config.tproxies.is_empty() {
        return None;
    }
    let attrs = Attrs::after(message.body, 12);
    let number = |attr| attrs.clone().get(attr).and_then(parse::u32_ne);
    // the rule for the local table has no priority attribute
    let priority = number(FRA_PRIORITY).filter(|priority| *priority < config.rule_priority)?;
    // struct fib_rule_hdr: prefix lengths at 1 and 2, flags at 8
    let whole = message.body.get(1..3)? == [0, 0];
    let inverted = message.body.get(8..).and_then(parse::u32_ne)? & FIB_RULE_INVERT != 0;
    let other_iif = (attrs.clone().get(FRA_IIFNAME)).is_some_and(|name| parse::str_z(name) != "lo");
    let (value, mask) = (number(FRA_FWMARK).unwrap_or(0), number(FRA_FWMASK).unwrap_or(0));
    let own = |mark: u32| (mark ^ value) & mask & config.mask == 0;
    let marked = config.tproxies.iter().any(|tproxy| own(tproxy.mark));
    (inverted || whole && !other_iif && marked).then_some(priority)
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

/// Asks for all routes of a family.
pub fn get_all_routes(batch: &mut Batch, family: Family) {
    let open = batch.begin(RTM_GETROUTE, NLM_F_REQUEST | NLM_F_DUMP);
    batch.header(&[family.number(), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    batch.end(open);
}

/// A rule or route that is not ours, as far as it could be in our way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Other {
    Rule {
        family: Family,
        priority: u32,
        /// Zeroes where it does not look at the mark.
        mark: Mark,
        table: u32,
    },
    /// A route in the table that was asked about.
    Route { family: Family, protocol: u8 },
}

/// Reads one dumped rule or route; `None` for ours and for routes in other tables than `wanted`.
pub fn parse_other(message: &parse::Message, wanted: u32) -> Option<Other> {
    let family = match *message.body.first()? {
        AF_INET => Family::V4,
        AF_INET6 => Family::V6,
        _ => return None,
    };
    let attrs = Attrs::after(message.body, 12);
    let number = |attr| attrs.clone().get(attr).and_then(parse::u32_ne);
    let small_table = u32::from(*message.body.get(4)?);
    match message.kind {
        RTM_NEWRULE if attrs.clone().get(FRA_PROTOCOL) != Some(&[RTPROT_CGTPROXY]) => {
            let value = number(FRA_FWMARK).unwrap_or(0);
            // a mark without a mask is compared whole
            let whole = if value == 0 { 0 } else { u32::MAX };
            Some(Other::Rule {
                family,
                priority: number(FRA_PRIORITY).unwrap_or(0),
                mark: Mark { value, mask: number(FRA_FWMASK).unwrap_or(whole) },
                table: number(FRA_TABLE).unwrap_or(small_table),
            })
        }
        RTM_NEWROUTE => {
            let protocol = *message.body.get(5)?;
            let table = number(RTA_TABLE).unwrap_or(small_table);
            (table == wanted && protocol != RTPROT_CGTPROXY)
                .then_some(Other::Route { family, protocol })
        }
        _ => None,
    }
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Other::Rule { family, priority, mark: Mark { value, mask }, table } => {
                write!(f, "{} rule pref {priority}", ip(*family))?;
                if *mask != 0 {
                    write!(f, " fwmark {value:#x}/{mask:#x}")?;
                }
                match table {
                    0 => Ok(()),
                    table => write!(f, " lookup {table}"),
                }
            }
            Other::Route { family, protocol } => {
                write!(f, "{} route of protocol {protocol}", ip(*family))
            }
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
                match rule.action {
                    Action::Lookup(table) => write!(f, " lookup {table}")?,
                    Action::Goto(priority) => write!(f, " goto {priority}")?,
                    Action::Nop => write!(f, " nop")?,
                }
                write!(f, " protocol {RTPROT_CGTPROXY}")
            }
            Entry::Route(Route { table, .. }) => {
                write!(f, "local default dev lo table {table} proto {RTPROT_CGTPROXY}")
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

    fn entries() -> Vec<Entry> {
        let mark = Mark { value: 0x0100_0000, mask: 0xff00_0000 };
        let mut all = Vec::new();
        for family in Family::BOTH {
            for table in [200, 300] {
                let iif = "lo".to_string();
                all.extend([Action::Lookup(table), Action::Goto(102), Action::Nop].map(|action| {
                    Entry::Rule(IpRule { family, priority: 100, iif: iif.clone(), mark, action })
                }));
                all.push(Entry::Route(Route { family, table }));
            }
        }
        all
    }

    #[test]
    fn a_dumped_entry_is_the_one_that_was_added() {
        for entry in entries() {
            let mut batch = Batch::new(0);
            entry.encode(&mut batch, true);
            let message = Messages::new(batch.bytes()).next().unwrap();
            assert_eq!(parse(&message).as_ref(), Some(&entry), "{}", entry.command("add"));
        }
    }

    #[test]
    fn foreign_entries_are_not_ours() {
        for entry in entries() {
            let mut batch = Batch::new(0);
            entry.encode(&mut batch, true);
            let mut bytes = batch.bytes().to_vec();
            for at in 16..bytes.len() {
                if bytes[at] == RTPROT_CGTPROXY {
                    bytes[at] = 3;
                }
            }
            assert_eq!(parse(&Messages::new(&bytes).next().unwrap()), None);
        }
    }
}
