//! Ip rules and routes as rtnetlink has them: the messages that add, delete and list them, the one
//! reader of each, and their text. Pure; what is wanted of them, and what others' mean to it, is
//! decided in [`crate::route`].
//! Source: rtnetlink(7), include/uapi/linux/fib_rules.h; bytes as iproute2 sends them.

use std::cmp::Ordering;
use std::fmt;
use std::net::IpAddr;

use super::msg::{Batch, Open};
use super::parse::{self, Attrs, Message};
use super::uapi::*;
use crate::bpf;
use crate::net::{Family, Mark};

/// `ip rule … pref PRIORITY iif IIF fwmark MARK/MASK ACTION`
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct IpRule {
    pub family: Family,
    pub priority: u32,
    /// Empty: any.
    pub iif: String,
    /// A mask of 0: any.
    pub mark: Mark,
    pub action: FibAction,
}

/// What a rule does with the look-ups that it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FibAction {
    /// Asks this table.
    Lookup(u32),
    /// Goes on at the first rule of this priority.
    Goto(u32),
    /// Nothing: a place to go on at.
    Nop,
    /// Ends the look-up in failure (`FR_ACT_*`); none of ours does.
    Refuse(u8),
}

/// `ip route … default … table TABLE`
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct IpRoute {
    pub family: Family,
    pub table: u32,
    /// 0 for none.
    pub metric: u32,
    pub way: Way,
}

/// Where a route leads to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// `local default dev lo`: to this host itself
    Here,
    /// `default via GATEWAY dev INTERFACE onlink`, or without a gateway
    Out { device: Device, gateway: Option<IpAddr> },
}

/// An interface, which is the one of that index.
#[derive(Debug, Clone)]
pub struct Device {
    pub index: u32,
    /// Empty where only the index is known.
    pub name: String,
}

impl PartialEq for Device {
    fn eq(&self, other: &Device) -> bool {
        self.index == other.index
    }
}

impl Eq for Device {}

impl PartialOrd for Device {
    fn partial_cmp(&self, other: &Device) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Device {
    fn cmp(&self, other: &Device) -> Ordering {
        self.index.cmp(&other.index)
    }
}

/// A rule as the kernel tells of it, whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenRule {
    pub rule: IpRule,
    pub protocol: u8,
    pub inverted: bool,
    /// It asks for an output interface or a VRF, which a look-up of what we have marked does not
    /// name. (A socket that is bound to a device does: the table drops what is marked there.)
    pub elsewhere: bool,
    /// What else it asks for, as iproute2 writes it and with a blank before each; empty in ours.
    pub more: String,
    /// It does not take a route whose prefix is no longer than this.
    pub suppressed: Option<u32>,
}

/// A route as the kernel tells of it, whoever made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenRoute {
    pub route: IpRoute,
    pub protocol: u8,
    /// `RTN_*`
    pub kind: u8,
    /// Lengths of its prefix, and of that of the sources that it is for.
    pub length: u8,
    pub from: u8,
    pub tos: u8,
}

/// Index of `lo` in every network namespace (`LOOPBACK_IFINDEX`).
const LO: u32 = 1;

/// `struct rtmsg`, or `struct fib_rule_hdr`, which has the action where that has the type.
#[derive(Default)]
struct Header {
    family: u8,
    /// Lengths of the prefixes.
    to: u8,
    from: u8,
    tos: u8,
    /// `RT_TABLE_UNSPEC` where an attribute has it.
    table: u8,
    protocol: u8,
    scope: u8,
    kind: u8,
    flags: u32,
}

impl Header {
    fn of(family: Family) -> Header {
        Header { family: family.number(), ..Header::default() }
    }

    /// What a message of these kinds begins with, and the attributes behind that.
    fn read<'a>(message: &Message<'a>, kinds: &[u16]) -> Option<(Header, Attrs<'a>)> {
        let [family, to, from, tos, table, protocol, scope, kind, ..] = *message.body else {
            return None;
        };
        let flags = message.body.get(8..).and_then(parse::u32_ne)?;
        let header = Header { family, to, from, tos, table, protocol, scope, kind, flags };
        kinds.contains(&message.kind).then(|| (header, Attrs::after(message.body, 12)))
    }

    fn begin(&self, batch: &mut Batch, kind: u16, flags: u16) -> Open {
        let open = batch.begin(kind, NLM_F_REQUEST | flags);
        let Header { family, to, from, tos, table, protocol, scope, kind, flags } = *self;
        let [a, b, c, d] = flags.to_ne_bytes();
        batch.header(&[family, to, from, tos, table, protocol, scope, kind, a, b, c, d]);
        open
    }

    fn family(&self) -> Option<Family> {
        Family::BOTH.into_iter().find(|family| family.number() == self.family)
    }
}

/// The table for the 8-bit header field, as iproute2 fills it.
fn small_table(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(RT_TABLE_UNSPEC)
}

const ADD: u16 = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;

/// What a message does with a rule or a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Add,
    /// Adds a route of a table that has another of ours, which no packet meets from then on.
    Supersede,
    Delete,
}

impl IpRule {
    pub fn encode(&self, batch: &mut Batch, verb: Verb) {
        let add = verb != Verb::Delete;
        let (table, action) = match self.action {
            FibAction::Lookup(table) => (small_table(table), if add { FR_ACT_TO_TBL } else { 0 }),
            FibAction::Goto(_) => (RT_TABLE_UNSPEC, FR_ACT_GOTO),
            FibAction::Nop => (RT_TABLE_UNSPEC, FR_ACT_NOP),
            FibAction::Refuse(kind) => (RT_TABLE_UNSPEC, kind),
        };
        let header = Header { table, kind: action, ..Header::of(self.family) };
        let open = match add {
            true => header.begin(batch, RTM_NEWRULE, ADD),
            false => header.begin(batch, RTM_DELRULE, NLM_F_ACK),
        };
        batch.u32_ne(FRA_PRIORITY, self.priority);
        if !self.iif.is_empty() {
            batch.str_z(FRA_IIFNAME, &self.iif);
        }
        if self.mark.mask != 0 {
            batch.u32_ne(FRA_FWMARK, self.mark.value);
            batch.u32_ne(FRA_FWMASK, self.mark.mask);
        }
        match self.action {
            FibAction::Lookup(id) if table == RT_TABLE_UNSPEC => batch.u32_ne(FRA_TABLE, id),
            FibAction::Goto(priority) => batch.u32_ne(FRA_GOTO, priority),
            _ => {}
        }
        batch.u8(FRA_PROTOCOL, RTPROT_CGTPROXY);
        batch.end(open);
    }

    /// As iproute2 writes it. A mark of ours is written in full, whatever its mask.
    fn write(&self, f: &mut fmt::Formatter, not: &str, more: &str, ours: bool) -> fmt::Result {
        write!(f, "pref {}{not}{more}", self.priority)?;
        if !self.iif.is_empty() {
            write!(f, " iif {}", self.iif)?;
        }
        let Mark { value, mask } = self.mark;
        match mask {
            0 => {}
            _ if ours => write!(f, " fwmark {value:#010x}/{mask:#010x}")?,
            u32::MAX => write!(f, " fwmark {value:#x}")?,
            _ => write!(f, " fwmark {value:#x}/{mask:#x}")?,
        }
        write!(f, " {}", self.action)
    }
}

impl IpRoute {
    pub fn encode(&self, batch: &mut Batch, verb: Verb) {
        let is_v4 = self.family == Family::V4;
        let (kind, scope, oif, gateway) = match &self.way {
            Way::Here => (RTN_LOCAL, RT_SCOPE_HOST, LO, None),
            Way::Out { device, gateway: None } => (RTN_UNICAST, RT_SCOPE_LINK, device.index, None),
            Way::Out { device, gateway } => {
                (RTN_UNICAST, RT_SCOPE_UNIVERSE, device.index, *gateway)
            }
        };
        let header = Header {
            table: small_table(self.table),
            protocol: RTPROT_CGTPROXY,
            // IPv6 knows one scope only
            scope: if is_v4 { scope } else { RT_SCOPE_UNIVERSE },
            kind,
            // whether there is a route to the next hop, or will be, is not asked
            flags: if gateway.is_some() { RTNH_F_ONLINK } else { 0 },
            ..Header::of(self.family)
        };
        let (kind, flags) = match verb {
            Verb::Delete => (RTM_DELROUTE, NLM_F_ACK),
            // before those with the same key, as `ip route prepend`
            _ if is_v4 => (RTM_NEWROUTE, ADD & !NLM_F_EXCL),
            Verb::Supersede => (RTM_NEWROUTE, ADD & !NLM_F_EXCL | NLM_F_REPLACE),
            Verb::Add => (RTM_NEWROUTE, ADD),
        };
        let open = header.begin(batch, kind, flags);
        if !is_v4 {
            // `default` is no destination to IPv4 and :: to IPv6
            batch.raw(RTA_DST, &[0; 16]);
        }
        gateway.into_iter().for_each(|ip| batch.ip(RTA_GATEWAY, ip));
        if header.table == RT_TABLE_UNSPEC {
            batch.u32_ne(RTA_TABLE, self.table);
        }
        if self.metric != 0 {
            batch.u32_ne(RTA_PRIORITY, self.metric);
        }
        batch.u32_ne(RTA_OIF, oif);
        batch.end(open);
    }
}

/// Asks for all ip rules of a family.
pub fn get_rules(batch: &mut Batch, family: Family) {
    let open = Header::of(family).begin(batch, RTM_GETRULE, NLM_F_DUMP);
    batch.end(open);
}

/// Asks for all routes of a family in one table. Kernels before 4.20 ignore the filter and send all.
pub fn get_table(batch: &mut Batch, family: Family, table: u32) {
    let open = Header::of(family).begin(batch, RTM_GETROUTE, NLM_F_DUMP);
    batch.u32_ne(RTA_TABLE, table);
    batch.end(open);
}

/// Asks for all routes of a family that carry our protocol number. Kernels before 4.20 ignore the
/// filter and send all.
pub fn get_routes(batch: &mut Batch, family: Family) {
    let header = Header { protocol: RTPROT_CGTPROXY, ..Header::of(family) };
    let open = header.begin(batch, RTM_GETROUTE, NLM_F_DUMP);
    batch.end(open);
}

/// Asks which way packets to an address go that have this mark.
pub fn get_way(batch: &mut Batch, address: IpAddr, mark: u32) {
    let to = if address.is_ipv4() { 32 } else { 128 };
    let header = Header { to, ..Header::of(Family::of(&address)) };
    let open = header.begin(batch, RTM_GETROUTE, NLM_F_ACK);
    batch.ip(RTA_DST, address);
    if mark != 0 {
        batch.u32_ne(RTA_MARK, mark);
    }
    batch.end(open);
}

/// Which way packets go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Course {
    /// They stay on this host, or go to all of a network.
    pub here: bool,
    /// Index of the interface that they leave by; 0 for none.
    pub device: u32,
    /// The source address that they get where they have none.
    pub source: Option<IpAddr>,
}

/// Reads an answer to [`get_way`].
pub fn parse_way(message: &Message) -> Option<Course> {
    let (header, attrs) = Header::read(message, &[RTM_NEWROUTE])?;
    Some(Course {
        here: [u32::from(RTN_LOCAL), RTN_BROADCAST].contains(&header.kind.into()),
        device: attrs.u32_ne(RTA_OIF).unwrap_or(0),
        source: attrs.get(RTA_PREFSRC).and_then(parse::ip),
    })
}

impl SeenRule {
    /// Reads one rule that was dumped or notified of, deleted ones too.
    pub fn read(message: &Message) -> Option<SeenRule> {
        let (header, attrs) = Header::read(message, &[RTM_NEWRULE, RTM_DELRULE])?;
        let number = |attr| attrs.u32_ne(attr);
        let value = number(FRA_FWMARK).unwrap_or(0);
        // a mark without a mask is compared whole
        let whole = if value == 0 { 0 } else { u32::MAX };
        let rule = IpRule {
            family: header.family()?,
            // the rule for the local table has none
            priority: number(FRA_PRIORITY).unwrap_or(0),
            iif: attrs.text(FRA_IIFNAME).unwrap_or_default().into_owned(),
            mark: Mark { value, mask: number(FRA_FWMASK).unwrap_or(whole) },
            action: match header.kind {
                FR_ACT_TO_TBL => {
                    FibAction::Lookup(number(FRA_TABLE).unwrap_or(header.table.into()))
                }
                FR_ACT_GOTO => FibAction::Goto(number(FRA_GOTO).unwrap_or(0)),
                FR_ACT_NOP => FibAction::Nop,
                other => FibAction::Refuse(other),
            },
        };
        let (mut more, mut elsewhere) = (String::new(), false);
        for (kind, data) in attrs.clone() {
            let byte = || data.first().copied().unwrap_or(0);
            let words = match kind {
                FRA_SRC => format!("from {}/{}", address(data), header.from),
                FRA_DST => format!("to {}/{}", address(data), header.to),
                FRA_OIFNAME => format!("oif {}", parse::str_z(data)),
                FRA_L3MDEV => "l3mdev".into(),
                FRA_UID_RANGE => format!("uidrange {}", span(data)),
                FRA_IP_PROTO => format!("ipproto {}", byte()),
                FRA_SPORT_RANGE => format!("sport {}", span(data)),
                FRA_DPORT_RANGE => format!("dport {}", span(data)),
                FRA_TUN_ID => "tun_id".into(),
                FRA_DSCP => format!("dscp {}", byte()),
                FRA_FLOWLABEL => "flowlabel".into(),
                _ => continue,
            };
            elsewhere |= [FRA_OIFNAME, FRA_L3MDEV].contains(&kind);
            more += " ";
            more += &words;
        }
        if header.tos != 0 {
            more += &format!(" tos {:#x}", header.tos);
        }
        Some(SeenRule {
            rule,
            protocol: attrs.byte(FRA_PROTOCOL).unwrap_or(0),
            inverted: header.flags & FIB_RULE_INVERT != 0,
            elsewhere,
            more,
            suppressed: number(FRA_SUPPRESS_PREFIXLEN).filter(|length| *length != u32::MAX),
        })
    }
}

fn address(data: &[u8]) -> String {
    parse::ip(data).map_or(String::new(), |ip| ip.to_string())
}

/// `FROM-TO` of a structure of two numbers.
fn span(data: &[u8]) -> String {
    let (from, to) = data.split_at(data.len() / 2);
    let [from, to] = [from, to].map(|half| match *half {
        [a, b] => u32::from(u16::from_ne_bytes([a, b])),
        _ => parse::u32_ne(half).unwrap_or(0),
    });
    format!("{from}-{to}")
}

impl SeenRoute {
    /// Reads one route that was dumped or notified of, deleted ones too.
    pub fn read(message: &Message) -> Option<SeenRoute> {
        let (header, attrs) = Header::read(message, &[RTM_NEWROUTE, RTM_DELROUTE])?;
        let gateway = attrs.get(RTA_GATEWAY).and_then(parse::ip);
        let device = Device { index: attrs.u32_ne(RTA_OIF).unwrap_or(0), name: String::new() };
        let route = IpRoute {
            family: header.family()?,
            table: attrs.u32_ne(RTA_TABLE).unwrap_or(header.table.into()),
            metric: attrs.u32_ne(RTA_PRIORITY).unwrap_or(0),
            way: match header.kind {
                RTN_LOCAL => Way::Here,
                _ => Way::Out { device, gateway },
            },
        };
        let Header { to: length, from, tos, protocol, kind, .. } = header;
        Some(SeenRoute { route, protocol, kind, length, from, tos })
    }
}

/// The interfaces that a route of one table leads out by, in the answer to [`get_table`].
pub fn devices(message: &Message, table: u32) -> Vec<u32> {
    let Some((header, attrs)) = Header::read(message, &[RTM_NEWROUTE]) else {
        return Vec::new();
    };
    let own = attrs.u32_ne(RTA_TABLE).unwrap_or(header.table.into());
    if header.kind != RTN_UNICAST || own != table {
        return Vec::new();
    }
    let mut found = Vec::from_iter(attrs.u32_ne(RTA_OIF));
    // struct rtnexthop: length, flags, weight, interface; attributes
    let mut rest = attrs.get(RTA_MULTIPATH).unwrap_or(&[]);
    while let Some(&[a, b, ..]) = rest.get(..8) {
        found.extend(parse::u32_ne(&rest[4..]));
        let length = usize::from(u16::from_ne_bytes([a, b])).max(8);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    found
}

/// A socket filter that passes the notifications of rules, of routes with our protocol number or in
/// one of these tables, those that [`lo_revives`] could be about, and where `links` says so those of
/// all interfaces and addresses, or where `new` does those of new interfaces; and keeps all others
/// (routes come and go on a router) from waking us.
pub fn event_filter(tables: &[u32], links: bool, new: bool) -> Vec<libc::sock_filter> {
    // where the attributes of a route begin
    let attributes = (NLMSG_HDRLEN + 12) as u32;
    let tables = &tables[..tables.len().min(MOST_TABLES)];
    // where the program goes on
    let (own, table, drop) = (9, 11, 17 + tables.len());
    let (lo, pass) = (drop + 1, drop + if new { 6 } else { 4 });
    let (gone, come) = if links { (pass, pass) } else { (drop, lo) };
    // nlmsg_type
    let mut program = vec![bpf::load(libc::BPF_H, 4)];
    // goes on there, or behind itself
    let equal = |program: &mut Vec<libc::sock_filter>, k: u32, to: usize| {
        program.push(bpf::equal(k, (to - program.len() - 1) as u8, 0));
    };
    for (message, to) in [
        (RTM_DELRULE, pass),
        (RTM_NEWRULE, pass),
        (RTM_DELLINK, gone),
        (RTM_DELADDR, gone),
        (RTM_NEWLINK, come),
        (RTM_NEWADDR, come),
        (RTM_DELROUTE, own),
    ] {
        equal(&mut program, bpf::half(message), to);
    }
    let others = (drop - 9) as u8;
    program.push(bpf::equal(bpf::half(RTM_NEWROUTE), 2, others));
    program.push(bpf::load(libc::BPF_B, 21)); // own: rtm_protocol
    equal(&mut program, u32::from(RTPROT_CGTPROXY), pass);
    program.push(bpf::set(libc::BPF_LD, attributes)); // table: where RTA_TABLE is
    program.push(bpf::set(libc::BPF_LDX, u32::from(RTA_TABLE)));
    program.push(bpf::load(libc::BPF_W, SKF_AD_OFF + SKF_AD_NLATTR));
    equal(&mut program, 0, drop);
    program.push(bpf::op(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0));
    program.push(bpf::op(libc::BPF_LD | libc::BPF_IND | libc::BPF_W, NLA_HDRLEN as u32, 0, 0));
    tables.iter().for_each(|table| equal(&mut program, bpf::word(*table), pass));
    program.push(bpf::answer(0)); // drop
    program.push(bpf::load(libc::BPF_W, 20)); // lo: ifi_index or ifa_index
    equal(&mut program, bpf::word(LO), pass);
    if new {
        program.push(bpf::load(libc::BPF_W, 28)); // ifi_change: all of it
        equal(&mut program, u32::MAX, pass);
    }
    program.push(bpf::answer(0));
    program.push(bpf::answer(u32::MAX)); // pass
    debug_assert_eq!((table, pass), (own + 2, program.len() - 1));
    program
}

/// Jumps are no longer than 255 instructions.
const MOST_TABLES: usize = 230;

/// Whether a notification tells that lo is up, or has a new address: what was refused before may be
/// possible now. (Going down it loses the IPv4 route without a word; an IPv6 address on it means
/// that IPv6 has been switched on.)
pub fn lo_revives(message: &Message) -> bool {
    // struct ifinfomsg: index at 4, flags at 8; struct ifaddrmsg: index at 4
    let word = |at: usize| message.body.get(at..).and_then(parse::u32_ne);
    let up = match message.kind {
        RTM_NEWLINK => word(8).is_some_and(|flags| flags & IFF_UP != 0),
        RTM_NEWADDR => true,
        _ => false,
    };
    up && word(4) == Some(LO)
}

/// The program that handles rules and routes of a family.
pub fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

impl fmt::Display for FibAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FibAction::Lookup(table) => write!(f, "lookup {table}"),
            FibAction::Goto(priority) => write!(f, "goto {priority}"),
            FibAction::Nop => f.write_str("nop"),
            FibAction::Refuse(FR_ACT_UNREACHABLE) => f.write_str("unreachable"),
            FibAction::Refuse(FR_ACT_PROHIBIT) => f.write_str("prohibit"),
            FibAction::Refuse(_) => f.write_str("blackhole"),
        }
    }
}

impl fmt::Display for IpRule {
    /// The arguments of `ip rule` behind the verb.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, "", "", true)?;
        write!(f, " protocol {RTPROT_CGTPROXY}")
    }
}

impl fmt::Display for IpRoute {
    /// The arguments of `ip route` behind the verb.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.way {
            Way::Here => f.write_str("local default dev lo")?,
            Way::Out { device, gateway: None } => write!(f, "default dev {device}")?,
            Way::Out { device, gateway: Some(gateway) } => {
                write!(f, "default via {gateway} dev {device}")?
            }
        }
        write!(f, " table {} proto {RTPROT_CGTPROXY}", self.table)?;
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        match self.way {
            Way::Out { gateway: Some(_), .. } => f.write_str(" onlink"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Device {
    /// As iproute2 takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name.is_empty() {
            true => write!(f, "if{}", self.index),
            false => f.write_str(&self.name),
        }
    }
}

impl fmt::Display for SeenRule {
    /// As iproute2 lists it, with numbers for names.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rule ", ip(self.rule.family))?;
        let not = if self.inverted { " not" } else { "" };
        self.rule.write(f, not, &self.more, false)?;
        self.suppressed.map_or(Ok(()), |length| write!(f, " suppress_prefixlength {length}"))
    }
}

impl fmt::Display for SeenRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (family, protocol, length) = (self.route.family, self.protocol, self.length);
        write!(f, "{} route of protocol {protocol} and prefix length {length}", ip(family))
    }
}
