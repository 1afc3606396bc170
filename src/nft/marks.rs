//! What chains of other programs do to the marks that ours rely on: their rules are gone through with
//! the packets and flows that bear our marks, as far as is known what those are. What is not known
//! may hold. Pure. Source: what each hook and priority comes before and behind is told in
//! [`super::table`].

use std::collections::HashMap;

use super::expr::{Expr, Verdict};
use super::others::ForeignExpr::{self, Nft, Xt};
use super::others::{ForeignBase, ForeignRule, XtMark};
use super::table::priority_of_gateways;
use super::view::View;
use crate::config::{spoofed_mark, Config};
use crate::net::{Interface, Mark};
use crate::netlink::parse;
use crate::netlink::uapi::*;
use crate::small::{SmallMap, SmallSet};

/// What of our table matters here.
#[derive(Debug, Default)]
pub struct Ours {
    mask: u32,
    /// Of the tproxies.
    marks: SmallSet<u32>,
    /// Of gateways, where one may have a tproxy.
    interfaces: Vec<Interface>,
    /// Of containers: what they send bears these from where it comes in to where `gateways` reads it.
    entered: SmallSet<u32>,
    /// By which interfaces that is.
    enter: Vec<Interface>,
}

impl Ours {
    pub fn of(config: &Config) -> Ours {
        Ours {
            mask: config.mask,
            marks: config.outlets().map(|outlet| outlet.mark).collect(),
            interfaces: config.gateway_interfaces().into_iter().cloned().collect(),
            entered: match config.has_containers() {
                true => config.targets().filter_map(|t| config.container_mark(t)).collect(),
                false => SmallSet::default(),
            },
            enter: Vec::new(),
        }
    }

    /// Of a table that is there.
    pub fn of_view(view: &View) -> Ours {
        let marks: Vec<Mark> = view.targets.iter().filter_map(|target| target.mark).collect();
        Ours {
            mask: marks.first().or(view.entered.first()).map_or(0, |mark| mark.mask),
            marks: marks.iter().map(|mark| mark.value).collect(),
            interfaces: view.interfaces.clone(),
            entered: view.entered.iter().map(|mark| mark.value).collect(),
            enter: Vec::new(),
        }
    }

    /// The same where it is known by which interfaces containers come in: their veths and bridges.
    pub fn entered_by(mut self, names: impl IntoIterator<Item = String>) -> Ours {
        if self.entered.is_empty() {
            return self;
        }
        let any = Interface { name: String::new(), prefix: true };
        self.interfaces.retain(|interface| *interface != any);
        self.enter = names.into_iter().map(|name| Interface { name, prefix: false }).collect();
        self.interfaces.extend(self.enter.clone());
        self
    }

    /// Where `gateways` stands.
    fn gateways(&self) -> i32 {
        priority_of_gateways(!self.entered.is_empty())
    }

    /// What routed packets bear that go to a tproxy.
    fn routed(&self) -> u32 {
        spoofed_mark(self.mask)
    }
}

/// A number of which some bits are known.
#[derive(Debug, Clone, Copy)]
struct Bits {
    value: u32,
    known: u32,
}

impl Bits {
    fn all(value: u32) -> Bits {
        Bits { value, known: u32::MAX }
    }

    const NONE: Bits = Bits { value: 0, known: 0 };

    fn masked(self, mask: u32, xor: u32) -> Bits {
        Bits { value: self.value & mask ^ xor, known: self.known | !mask }
    }

    /// Where the bits of each come from one of the two.
    fn xor(self, other: Bits) -> Bits {
        Bits { value: self.value ^ other.value, known: self.known & other.known }
    }

    fn is(self, value: u32, mask: u32) -> Truth {
        match (self.value ^ value) & mask & self.known {
            0 if mask & !self.known == 0 => Truth::Yes,
            0 => Truth::Maybe,
            _ => Truth::No,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    No,
    Maybe,
    Yes,
}

impl Truth {
    fn is(self, equal: bool) -> Truth {
        match (self, equal) {
            (Truth::Yes, false) => Truth::No,
            (Truth::No, false) => Truth::Yes,
            _ => self,
        }
    }
}

/// Where a packet comes from or goes to.
#[derive(Debug, Clone, Copy)]
enum Side<'a> {
    Lo,
    Interface(&'a Interface),
    /// Any but lo.
    Out,
    /// A packet of this host comes from none, and one that comes in has none to go to yet.
    None,
}

impl Side<'_> {
    /// Whether it is the interface of that number or name; less than 16 bytes are of a prefix.
    fn is(self, data: &[u8]) -> Truth {
        let (number, name) = match data.len() {
            4 => (parse::u32_ne(data), None),
            _ => (None, Some(parse::str_z(data))),
        };
        let whole = data.len() >= 16;
        let lo = match &name {
            Some(name) if whole => name == "lo",
            Some(name) => "lo".starts_with(&**name),
            None => number == Some(1),
        };
        match (self, name) {
            (Side::Lo, _) if lo => Truth::Yes,
            (Side::Lo | Side::None, _) => Truth::No,
            (Side::Interface(_) | Side::Out, None) if lo => Truth::No,
            (Side::Out, Some(_)) if lo && whole => Truth::No,
            (Side::Interface(of), Some(name)) => match (of.prefix, whole) {
                (false, true) if of.name == name => Truth::Yes,
                (false, false) if of.name.starts_with(&*name) => Truth::Yes,
                (true, true) if name.starts_with(&of.name) => Truth::Maybe,
                (true, false) if of.name.starts_with(&*name) => Truth::Yes,
                (true, false) if name.starts_with(&of.name) => Truth::Maybe,
                _ => Truth::No,
            },
            _ => Truth::Maybe,
        }
    }
}

/// What a chain of others breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Breaks {
    /// A packet on its way to a tproxy loses its mark.
    Packet,
    /// What a container sends is not known as its any more.
    Entered,
    /// A routed packet, or the answer to one, gets another than it should have.
    Routed,
    /// A flow loses its mark.
    Next,
}

/// A packet with marks of ours, at one chain.
#[derive(Debug, Clone, Copy)]
struct Packet<'a> {
    breaks: Breaks,
    mark: Bits,
    ct: Bits,
    iif: Side<'a>,
    oif: Side<'a>,
}

/// Tproxies whose marks are tried: who overwrites one mostly overwrites all.
const MOST: usize = 16;

/// Packets that meet a chain of that hook and priority and depend on what it leaves of their marks.
/// Chains of one priority are in the order in which they were loaded, which may change.
fn packets<'a>(base: &ForeignBase, ours: &'a Ours) -> Vec<Packet<'a>> {
    // what others have set of the other bits is not known
    let of = |value| Bits { value, known: ours.mask };
    let (iif, oif) = match base.hook {
        NF_INET_PRE_ROUTING | NF_INET_LOCAL_IN => (Side::Lo, Side::None),
        NF_INET_LOCAL_OUT => (Side::None, Side::Out),
        NF_INET_POST_ROUTING => (Side::None, Side::Lo),
        _ => return Vec::new(),
    };
    let (hook, priority) = (base.hook, base.priority);
    let mut packets = Vec::new();
    if hook == NF_INET_PRE_ROUTING && priority <= ours.gateways() {
        let marks = ours.entered.iter().take(MOST);
        packets.extend(marks.flat_map(|mark| {
            ours.enter.iter().take(MOST).map(move |interface| Packet {
                breaks: Breaks::Entered,
                mark: of(*mark),
                ct: Bits::NONE,
                iif: Side::Interface(interface),
                oif,
            })
        }));
    }
    for own in ours.marks.iter().copied().take(MOST) {
        let packet = Packet { breaks: Breaks::Packet, mark: of(own), ct: of(own), iif, oif };
        // from where ours sets the mark to where ours reads it; over lo, a packet keeps its way
        let behind = priority >= NF_IP_PRI_MANGLE;
        let between = match hook {
            NF_INET_LOCAL_OUT => behind,
            NF_INET_POST_ROUTING => true,
            NF_INET_PRE_ROUTING => priority <= NF_IP_PRI_SECURITY,
            _ => false,
        };
        if between {
            packets.push(packet);
        }
        // the mark of a flow is there, and has to stay, wherever conntrack is
        if priority > NF_IP_PRI_CONNTRACK {
            let flow = Packet { breaks: Breaks::Next, ..packet };
            // the answers, and DNS on its way to a resolver, have none but that
            packets.extend([flow, Packet { mark: Bits::all(0), ..flow }]);
        }
        for interface in &ours.interfaces {
            let side = Side::Interface(interface);
            let routed = Packet { breaks: Breaks::Routed, ..packet };
            if hook == NF_INET_PRE_ROUTING && priority >= ours.gateways() {
                packets.push(Packet { mark: of(ours.routed()), iif: side, ..routed });
            }
            // behind `unmark`, a restored mark routes the answer to lo; `guard` drops it
            let restored = match hook {
                NF_INET_LOCAL_OUT => priority >= NF_IP_PRI_SECURITY,
                NF_INET_POST_ROUTING => priority <= NF_IP_PRI_MANGLE,
                _ => false,
            };
            if restored {
                packets.push(Packet { mark: of(0), oif: side, ..routed });
            }
        }
    }
    packets
}

/// How evaluation goes on behind a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    On,
    /// Not in this chain.
    Back,
    Done,
}

/// What a register holds.
#[derive(Debug, Clone, Copy)]
enum Register {
    Bits(Bits),
    Iif,
    Oif,
}

struct Walk<'a> {
    ours: &'a Ours,
    base: &'a ForeignBase,
    rules: &'a HashMap<&'a str, Vec<&'a ForeignRule>>,
    packet: Packet<'a>,
    /// Chains that were gone through, and whether evaluation ends in them.
    seen: HashMap<&'a str, bool>,
    /// The chains where the packet is broken.
    found: SmallSet<&'a str>,
}

impl<'a> Walk<'a> {
    /// Whether evaluation surely ends in that chain.
    fn chain(&mut self, place: &'a str) -> bool {
        if let Some(ends) = self.seen.get(place) {
            return *ends;
        }
        self.seen.insert(place, false);
        let (all, mut ends) = (self.rules, false);
        for rule in all.get(place).into_iter().flatten() {
            match self.rule(place, rule) {
                Next::On => continue,
                Next::Back => {}
                Next::Done => ends = true,
            }
            break;
        }
        self.seen.insert(place, ends);
        ends
    }

    fn rule(&mut self, place: &'a str, rule: &'a ForeignRule) -> Next {
        let mut registers = SmallMap::default();
        let mut matches = Truth::Yes;
        for expr in &rule.exprs {
            let still = match expr {
                Nft(Expr::Verdict(verdict)) => match self.verdict(verdict, matches) {
                    Next::On => Truth::Yes,
                    next => return next,
                },
                Nft(expr) => self.expr(place, expr, &mut registers, matches),
                Xt(xt) => self.xt(place, xt, matches),
                ForeignExpr::Notrack => Truth::Yes,
                ForeignExpr::ForeignSource | ForeignExpr::Other => {
                    registers.clear();
                    Truth::Maybe
                }
            };
            matches = matches.min(still);
            if matches == Truth::No {
                break;
            }
        }
        Next::On
    }

    /// How it goes on behind a verdict of a rule that `matches` until there.
    fn verdict(&mut self, verdict: &'a Verdict, matches: Truth) -> Next {
        let next = match verdict {
            Verdict::Jump(to) | Verdict::Goto(to) => {
                match (self.chain(to), matches!(verdict, Verdict::Jump(_))) {
                    (true, _) => Next::Done,
                    (false, true) => Next::On,
                    (false, false) => Next::Back,
                }
            }
            Verdict::Return => Next::Back,
            _ => Next::Done,
        };
        match matches {
            Truth::Yes => next,
            _ => Next::On,
        }
    }

    /// Whether a rule that `matches` until there does so behind that expression.
    fn expr(
        &mut self,
        place: &'a str,
        expr: &Expr,
        registers: &mut SmallMap<u32, Register>,
        matches: Truth,
    ) -> Truth {
        let bits = |reg: &u32| match registers.get(reg) {
            Some(Register::Bits(bits)) => *bits,
            _ => Bits::NONE,
        };
        let (dreg, loaded) = match expr {
            Expr::MetaLoad { key: NFT_META_IIF | NFT_META_IIFNAME, dreg } => (dreg, Register::Iif),
            Expr::MetaLoad { key: NFT_META_OIF | NFT_META_OIFNAME, dreg } => (dreg, Register::Oif),
            Expr::MetaLoad { key: NFT_META_MARK, dreg } => (dreg, Register::Bits(self.packet.mark)),
            Expr::CtLoad { key: NFT_CT_MARK, dreg } => (dreg, Register::Bits(self.packet.ct)),
            Expr::Immediate { dreg, data } => {
                (dreg, Register::Bits(parse::u32_ne(data).map_or(Bits::NONE, Bits::all)))
            }
            Expr::Bitwise { sreg, dreg, mask, xor } => {
                (dreg, Register::Bits(bits(sreg).masked(*mask, *xor)))
            }
            Expr::Cmp { op: op @ (NFT_CMP_EQ | NFT_CMP_NEQ), sreg, data } => {
                let is = match (registers.get(sreg), parse::u32_ne(data)) {
                    (Some(Register::Iif), _) => self.packet.iif.is(data),
                    (Some(Register::Oif), _) => self.packet.oif.is(data),
                    (Some(Register::Bits(bits)), Some(value)) => bits.is(value, u32::MAX),
                    _ => Truth::Maybe,
                };
                return is.is(*op == NFT_CMP_EQ);
            }
            Expr::MetaSet { key: NFT_META_MARK, sreg } | Expr::CtSet { key: NFT_CT_MARK, sreg } => {
                self.set(matches!(expr, Expr::CtSet { .. }), place, bits(sreg), matches);
                return Truth::Yes;
            }
            Expr::Counter => return Truth::Yes,
            _ => {
                registers.clear();
                return Truth::Maybe;
            }
        };
        registers.insert(*dreg, loaded);
        Truth::Yes
    }

    /// The same of one of xtables.
    fn xt(&mut self, place: &'a str, xt: &XtMark, matches: Truth) -> Truth {
        let of = |ct: bool| if ct { self.packet.ct } else { self.packet.mark };
        let (ct, new) = match xt {
            XtMark::Is { ct, value, mask, equal } => return of(*ct).is(*value, *mask).is(*equal),
            XtMark::Set { ct, value, mask } => (*ct, of(*ct).masked(!mask, *value)),
            XtMark::Copy { to_ct, ct, packet, shifted } => {
                let (own, bits) = if *to_ct { (ct, packet) } else { (packet, ct) };
                let from = if *shifted { Bits::NONE } else { of(!to_ct) };
                (*to_ct, of(*to_ct).masked(!own, 0).xor(from.masked(*bits, 0)))
            }
        };
        self.set(ct, place, new, matches);
        Truth::Yes
    }

    /// The mark of the packet, or of its flow, is set.
    fn set(&mut self, ct: bool, place: &'a str, new: Bits, matches: Truth) {
        let (packet, mask) = (&mut self.packet, self.ours.mask);
        // `remark` makes up for it
        let made_up = packet.breaks == Breaks::Routed
            && self.base.hook == NF_INET_PRE_ROUTING
            && self.base.priority < NF_IP_PRI_SECURITY
            && new.known & mask == mask
            && self.ours.marks.contains(&(new.value & mask));
        let concerns = (packet.breaks == Breaks::Next) == ct;
        let old = if ct { &mut packet.ct } else { &mut packet.mark };
        let same = new.is(old.value, mask) == Truth::Yes;
        if concerns && !same && (ct || !made_up) {
            self.found.insert(place);
        }
        if matches == Truth::Yes {
            *old = new;
        }
    }
}

/// A line for each chain that overwrites marks of ours, with the remedy.
pub fn hindrances(bases: &[ForeignBase], rules: &[ForeignRule], ours: &Ours) -> Vec<String> {
    let mut by_place: HashMap<&str, Vec<&ForeignRule>> = HashMap::new();
    for rule in rules {
        by_place.entry(&rule.place).or_default().push(rule);
    }
    let mut found = SmallMap::default();
    for base in bases.iter().filter(|base| is_set_behind(&base.place, &by_place)) {
        for packet in packets(base, ours) {
            let (seen, found_here) = (HashMap::new(), SmallSet::default());
            let mut walk = Walk { ours, base, rules: &by_place, packet, seen, found: found_here };
            walk.chain(&base.place);
            found.extend(walk.found.into_iter().map(|place| ((packet.breaks, place), base)));
        }
    }
    // once is enough, and one remedy helps both
    let packets = |place| found.contains_key(&(Breaks::Packet, place));
    let one_remedy = |breaks| matches!(breaks, Breaks::Routed | Breaks::Entered);
    let found_once = found.iter().filter(|((b, place), _)| !one_remedy(*b) || !packets(*place));
    found_once.map(|((breaks, place), base)| line(*breaks, place, base, ours.mask)).collect()
}

/// Whether any mark is set in that chain or in one that it leads to: mostly there is none.
fn is_set_behind(place: &str, rules: &HashMap<&str, Vec<&ForeignRule>>) -> bool {
    let (mut seen, mut todo) = (HashMap::from([(place, true)]), vec![place]);
    while let Some(place) = todo.pop() {
        let rules = rules.get(place).into_iter().flatten();
        for expr in rules.flat_map(|rule| &rule.exprs) {
            match expr {
                Nft(Expr::MetaSet { key: NFT_META_MARK, .. })
                | Nft(Expr::CtSet { key: NFT_CT_MARK, .. }) => return true,
                Xt(xt) if !matches!(xt, XtMark::Is { .. }) => return true,
                Nft(Expr::Verdict(Verdict::Jump(to) | Verdict::Goto(to)))
                    if seen.insert(to, true).is_none() =>
                {
                    todo.push(to)
                }
                _ => {}
            }
        }
    }
    false
}

fn line(breaks: Breaks, place: &str, base: &ForeignBase, mask: u32) -> String {
    let hook = match base.hook {
        NF_INET_PRE_ROUTING => "prerouting",
        NF_INET_LOCAL_IN => "input",
        NF_INET_LOCAL_OUT => "output",
        _ => "postrouting",
    };
    let priority = match (base.hook, base.priority) {
        (NF_INET_LOCAL_OUT, NF_IP_PRI_MANGLE) => {
            format!("{NF_IP_PRI_MANGLE} as ours, so that what is loaded last is first")
        }
        (_, priority) => priority.to_string(),
    };
    let (what, then, load) = match breaks {
        Breaks::Packet => (
            "packet",
            "what has a tproxy does not get to it, and may go to the true destination",
            "meta mark",
        ),
        Breaks::Entered => {
            ("packet", "what containers send goes as if no rule covered it", "meta mark")
        }
        Breaks::Routed => {
            ("packet", "what is routed to a tproxy, or its answers, do not get there", "ct mark")
        }
        Breaks::Next => (
            "ct",
            "what the kernel sends for closed sockets goes to the true destination, so does what an \
             application sends where conntrack had forgotten the flow and the proxy spoke first, and \
             hijacked DNS goes to the resolver that was asked",
            "ct mark",
        ),
    };
    // a chain that others jump to goes back there
    let verdict = if place == base.place { "accept" } else { "return" };
    format!(
        "chain {place} of another program (hook {hook}, priority {priority}) overwrites the {what} \
         mark without sparing the bits {mask:#x}, which are cgtproxy's: where it matches, {then}; \
         have it set its own bits alone, by a mask, or `nft insert rule {place} {load} & {mask:#x} \
         != 0 {verdict}`"
    )
}
