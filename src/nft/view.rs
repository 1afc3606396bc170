//! What the kernel says that our table holds: requests for dumps, bounded readers of the answers,
//! and what the rules amount to. Pure. It reads the shape that [`super::table`] writes; what it
//! does not know it skips, so that a table of another version can still be looked at.
//! Source: include/uapi/linux/netfilter/nf_tables.h.

use std::net::IpAddr;

use super::expr::{counted, listed, Expr, SetRef::Named, Verdict};
use super::message::{dump, hook, of_table, Hook};
use super::table::{MARTIANS, MOVED, OUTPUT, TABLE, UNJUDGED, UNKNOWN};
use crate::config::{spoofed_flows, CONTAINERS};
use crate::net::{Interface, Mark, Owner};
use crate::netlink::msg::Batch;
use crate::netlink::parse::{self, Attrs, Message};
use crate::netlink::uapi::*;
use crate::small::{SmallMap, SmallSet};

/// Packets and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counter {
    pub packets: u64,
    pub bytes: u64,
}

impl std::ops::Add for Counter {
    type Output = Counter;

    fn add(self, other: Counter) -> Counter {
        Counter {
            packets: self.packets.saturating_add(other.packets),
            bytes: self.bytes.saturating_add(other.bytes),
        }
    }
}

/// One rule: its chain, what of its expressions is understood, and what they have counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleView {
    pub chain: String,
    pub exprs: Vec<Expr>,
    pub counter: Option<Counter>,
}

/// One element of a cgroup set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElementView {
    /// The cgroup id.
    pub id: u64,
    /// Where the set was made with counters.
    pub counter: Option<Counter>,
}

/// Reads an answer to [`super::message::get_table`]: the flags of our table, `None` for others.
pub fn parse_table_flags(message: &Message) -> Option<u32> {
    let attrs = of_table(TABLE, message)?;
    Some(attrs.u32_be(NFTA_TABLE_FLAGS).unwrap_or(0))
}

/// Asks for all that our table has of a kind: `NFT_MSG_GETCHAIN` and its like.
pub fn get_all(batch: &mut Batch, kind: u16) {
    let open = dump(batch, kind, NFPROTO_INET);
    batch.str_z(NFTA_ANY_TABLE, TABLE);
    batch.end(open);
}

/// Reads a chain: the name, and where a base chain stands. Older kernels tell of all tables.
pub fn parse_chain(message: &Message) -> Option<(String, Option<Hook>)> {
    let attrs = of_table(TABLE, message)?;
    Some((attrs.text(NFTA_CHAIN_NAME)?.into_owned(), hook(&attrs)))
}

/// Reads a set: the name, but for those that live and die with a rule.
pub fn parse_set(message: &Message) -> Option<String> {
    let attrs = of_table(TABLE, message)?;
    let flags = attrs.u32_be(NFTA_SET_FLAGS).unwrap_or(0);
    let name = attrs.text(NFTA_SET_NAME)?.into_owned();
    (flags & NFT_SET_ANONYMOUS == 0).then_some(name)
}

/// Reads a rule.
pub fn parse_rule(message: &Message) -> Option<RuleView> {
    if !message.is_nfnl(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWRULE) {
        return None;
    }
    let attrs = of_table(TABLE, message)?;
    let list = attrs.nest(NFTA_RULE_EXPRESSIONS);
    Some(RuleView {
        chain: attrs.text(NFTA_RULE_CHAIN)?.into_owned(),
        exprs: listed(&list).filter_map(Expr::read).collect(),
        counter: listed(&list).filter_map(counter).reduce(|a, b| a + b),
    })
}

/// Reads a named counter: the name, and the packets.
pub fn parse_counter(message: &Message) -> Option<(String, u64)> {
    let attrs = of_table(TABLE, message)?;
    let name = attrs.text(NFTA_OBJ_NAME)?.into_owned();
    let packets = attrs.nest(NFTA_OBJ_DATA).u64_be(NFTA_COUNTER_PACKETS)?;
    (attrs.u32_be(NFTA_OBJ_TYPE)? == NFT_OBJECT_COUNTER).then_some((name, packets))
}

fn counter(expr: &[u8]) -> Option<Counter> {
    counted(expr).map(|(packets, bytes)| Counter { packets, bytes })
}

/// Asks for all elements of one of our sets.
pub fn get_elements(batch: &mut Batch, set: &str) {
    let open = dump(batch, NFT_MSG_GETSETELEM, NFPROTO_INET);
    batch.str_z(NFTA_SET_ELEM_LIST_TABLE, TABLE);
    batch.str_z(NFTA_SET_ELEM_LIST_SET, set);
    batch.end(open);
}

/// Reads an answer to [`get_elements`] for a cgroup set. One message holds many elements.
pub fn parse_elements(message: &Message) -> Option<Vec<ElementView>> {
    let list = Attrs::after(message.body, 4).nest(NFTA_SET_ELEM_LIST_ELEMENTS);
    Some(listed(&list).filter_map(element).collect())
}

/// The same for a set of hashes.
pub fn parse_hashes(message: &Message) -> Option<Vec<u32>> {
    let list = Attrs::after(message.body, 4).nest(NFTA_SET_ELEM_LIST_ELEMENTS);
    let hash = |bytes| Attrs::new(bytes).nest(NFTA_SET_ELEM_KEY).u32_ne(NFTA_DATA_VALUE);
    Some(listed(&list).filter_map(hash).collect())
}

fn element(bytes: &[u8]) -> Option<ElementView> {
    let attrs = Attrs::new(bytes);
    let id = attrs.nest(NFTA_SET_ELEM_KEY).get(NFTA_DATA_VALUE)?;
    // one expression stands alone, and since Linux 5.13 several stand in a list
    let list = attrs.nest(NFTA_SET_ELEM_EXPRESSIONS);
    let mut exprs = list.map(|(_, bytes)| bytes).chain(attrs.get(NFTA_SET_ELEM_EXPR));
    Some(ElementView {
        id: u64::from_ne_bytes(id.try_into().ok()?),
        counter: exprs.find_map(counter),
    })
}

/// A target as the table has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetView {
    pub name: String,
    /// What a tproxy's or a route's packets are marked with.
    pub mark: Option<Mark>,
    /// What routed packets are marked with, for a route.
    pub forwarded: Option<Mark>,
    pub is_route: bool,
    /// That a route leads to, where it names one.
    pub interface: Option<String>,
    pub port: Option<u16>,
    /// Where TPROXY looks for a listener, if not everywhere.
    pub addresses: Vec<IpAddr>,
    /// Packets that came to this target and were not left alone; `None` for direct.
    pub taken: Option<Counter>,
    /// Packets of those that no listener took, or that were about to leave by another interface.
    pub refused: Option<Counter>,
}

impl TargetView {
    /// By the rules of its chains.
    fn of(rules: &[RuleView], name: &str) -> TargetView {
        let [to, forward, receive, closed, here, astray] =
            ["to_", "forward_", "tproxy_", "closed_", "here_", "astray_"]
                .map(|kind| of(rules, kind, name));
        let is_route = !closed.is_empty();
        TargetView {
            name: name.to_string(),
            mark: to.iter().find_map(|rule| mark(rule)),
            forwarded: forward.iter().find_map(|rule| mark(rule)).filter(|_| is_route),
            is_route,
            interface: astray.iter().find_map(|rule| way_out(rule)),
            port: receive.iter().find_map(|rule| port(rule)),
            addresses: receive.iter().filter_map(|rule| address(rule)).collect(),
            taken: total(&to),
            refused: total(&[receive, closed, here, astray].concat()),
        }
    }
}

/// The rules of one chain.
fn of<'a>(rules: &'a [RuleView], kind: &str, name: &str) -> Vec<&'a RuleView> {
    rules.iter().filter(|rule| rule.chain.strip_prefix(kind) == Some(name)).collect()
}

/// A rule of `output`: a packet of a cgroup whose ancestor at `level` is in the set of target `set`
/// goes to `target`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub level: u32,
    /// The name of the target whose set it is.
    pub set: String,
    pub target: String,
    /// Lines for owners up to this class come before.
    pub class: u16,
    /// Whether the set holds hashes.
    pub hashed: bool,
}

/// A set's target and class.
pub type SetKey = (String, u16);

impl Step {
    /// Which set it looks into.
    pub fn key(&self) -> SetKey {
        (self.set.clone(), self.class)
    }
}

/// A line for owners: the first that covers a socket decides, of those up to a step's class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnerStep {
    pub class: u16,
    pub owner: Owner,
    pub target: String,
}

/// A gateway section as the table has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayView {
    pub name: String,
    pub target: String,
    /// Packets that came to this section and were not left alone.
    pub taken: Option<Counter>,
}

/// What is said of a table that has our name alone.
pub const FOREIGN: &str =
    "table inet cgtproxy is there, and not of cgtproxy's making (if it is needed, give it another \
     name)";

/// What the rules of our table amount to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// direct, drop, then the tproxies and the routes, each in file order.
    pub targets: Vec<TargetView>,
    /// In the order in which they are tried.
    pub steps: Vec<Step>,
    /// In the order in which they are tried.
    pub owners: Vec<OwnerStep>,
    /// The target of what no step takes.
    pub default: String,
    /// Lines for owners up to this class come before that.
    pub default_class: u16,
    /// In the order in which they are tried.
    pub gateways: Vec<GatewayView>,
    /// Those of all gateways.
    pub interfaces: Vec<Interface>,
    /// What routed packets are marked with for a tproxy.
    pub routed: Option<Mark>,
    /// Where what containers send comes in, by index of the veth: the name of the target.
    pub veths: SmallMap<u32, String>,
    /// What it is marked with from there on.
    pub entered: Vec<Mark>,
    /// By which mark flows of another are to be known from now on; `None` where they have no way any more.
    pub moving: Vec<(Mark, Option<u32>)>,
    /// Packets of cgroups that had not been looked at; `None` where nothing is held.
    pub unknown: Option<Counter>,
    /// Sockets may go otherwise than it says: whose look for these it is has not told that it is over.
    pub unjudged: bool,
    /// Whether there is any rule that meets this host's packets: ours has one whatever the policy.
    pub classifies: bool,
    /// There are rules, and not the chains that ours have whatever the policy.
    pub foreign: bool,
}

impl View {
    /// Reads the rules of the table, in the order of the dump.
    pub fn of(rules: &[RuleView]) -> View {
        let mut names: Vec<&str> = Vec::new();
        for rule in rules {
            let name = rule.chain.strip_prefix("to_");
            names.extend(name.filter(|name| !names.contains(name)));
        }
        // stable: the tproxies stay in file order, in which their chains were made
        names.sort_by_key(|name| match *name {
            "direct" => 0,
            "drop" => 1,
            _ => 2,
        });
        let is_routed = |rule: &&RuleView| {
            let target = rule.chain.strip_prefix("forward_");
            target.is_some_and(|name| !of(rules, "tproxy_", name).is_empty())
        };
        let output = of(rules, OUTPUT, "");
        let mut view = View {
            targets: names.iter().map(|name| TargetView::of(rules, name)).collect(),
            owners: owners(rules),
            default: "direct".into(),
            routed: rules.iter().filter(is_routed).find_map(mark),
            moving: of(rules, MOVED, "").into_iter().filter_map(moving).collect(),
            unknown: total(&of(rules, UNKNOWN, "")),
            unjudged: !of(rules, UNJUDGED, "").is_empty(),
            classifies: !output.is_empty(),
            foreign: !rules.is_empty() && !names.contains(&"drop"),
            ..View::default()
        };
        view.take_gateways(rules);
        view.take_steps(output, rules, &mut Vec::new());
        view
    }

    /// Takes the gateway sections, those for containers with the veths that lead to them.
    fn take_gateways(&mut self, rules: &[RuleView]) {
        let mut containers = SmallMap::default();
        for rule in of(rules, "gateways", "") {
            let Some(name) = goes_to(rule, "gw_") else {
                continue;
            };
            self.interfaces.extend(interface(rule));
            if let Some(target) = name.strip_prefix(CONTAINERS) {
                // wherever they come in
                self.interfaces.push(Interface { name: String::new(), prefix: true });
                self.entered.extend(compared(rule));
                containers.extend(compared(rule).map(|mark| (mark.value, target.to_string())));
            }
            // a section has a rule for each interface and family
            if self.gateways.iter().all(|gateway| gateway.name != name) {
                let own = of(rules, "gw_", name);
                self.gateways.push(GatewayView {
                    name: name.into(),
                    target: gateway_target(&own).into(),
                    taken: total(&own),
                });
            }
        }
        for rule in rules {
            let index = rule.chain.strip_prefix("veth_").and_then(|index| index.parse().ok());
            let drops = rule.exprs.contains(&Expr::Verdict(Verdict::Drop));
            let target = match mark(rule) {
                Some(mark) => containers.get(&mark.value).cloned(),
                None => drops.then(|| "drop".into()),
            };
            self.veths.extend(index.zip(target));
        }
    }

    /// Takes the steps of a chain, those of the chains that gates lead to in their places.
    fn take_steps<'a>(
        &mut self,
        chain: Vec<&'a RuleView>,
        rules: &'a [RuleView],
        seen: &mut Vec<&'a str>,
    ) {
        for rule in chain {
            let Some(chain) = leads_to(rule) else {
                continue;
            };
            if chain.starts_with("below_") {
                // by its id and by its hash a gate leads to the same chain
                if !seen.contains(&chain) && seen.len() < MOST_NESTED {
                    seen.push(chain);
                    self.take_steps(of(rules, chain, ""), rules, seen);
                }
                continue;
            }
            if let Some(class) = chain.strip_prefix("user").and_then(|class| class.parse().ok()) {
                self.default_class = class;
            }
            let behind = || classed(chain, "in").map(|(class, target)| (class, target.to_string()));
            let plain = || chain.strip_prefix("to_").map(|target| (0, target.to_string()));
            let Some((class, target)) = plain().or_else(behind) else {
                continue;
            };
            let hashed = rule.exprs.iter().any(|expr| matches!(expr, Expr::Jhash { .. }));
            let set = rule.exprs.iter().find_map(|expr| match expr {
                Expr::Lookup { set: Named(set), .. } => Some(set),
                _ => None,
            });
            match (rule.exprs.first(), set) {
                (Some(Expr::SocketCgroup { level, .. }), Some(set)) => {
                    let named = classed(set, if hashed { "dying" } else { "cg" });
                    let set = named.map_or(&**set, |(_, set)| set).to_string();
                    self.steps.push(Step { level: *level, set, target, class, hashed })
                }
                _ => self.default = target,
            }
        }
    }

    /// The marks of flows that are a proxy's or a route's, or were.
    pub fn taken_marks(&self) -> Vec<Mark> {
        let own = self.targets.iter().flat_map(|target| [target.mark, target.forwarded]).flatten();
        let mut marks: Vec<Mark> = own.chain(self.moving.iter().map(|(was, _)| *was)).collect();
        let masks = marks.iter().chain(&self.entered).map(|mark| mark.mask);
        let masks = SmallSet::from_iter(masks).into_iter();
        marks.extend(masks.filter_map(spoofed_flows));
        marks
    }

    pub fn target(&self, name: &str) -> Option<&TargetView> {
        self.targets.iter().find(|target| target.name == name)
    }

    /// The target and the class of a socket whose cgroup has this id at each level: what `output`
    /// does with its packets. `holds` tells whether the set that a step looks into holds an id.
    pub fn verdict(
        &self,
        ids: &SmallMap<u32, u64>,
        holds: impl Fn(&Step, u64) -> bool,
    ) -> (&str, u16) {
        let taken = |step: &&Step| ids.get(&step.level).is_some_and(|id| holds(step, *id));
        let default = (&*self.default, self.default_class);
        self.steps.iter().find(taken).map_or(default, |step| (&step.target, step.class))
    }
}

/// The chain that a rule leads to.
fn leads_to(rule: &RuleView) -> Option<&str> {
    rule.exprs.iter().find_map(|expr| match expr {
        Expr::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) => Some(&**chain),
        _ => None,
    })
}

/// What stands behind `prefix` in the name of the chain that a rule leads to.
fn goes_to<'a>(rule: &'a RuleView, prefix: &str) -> Option<&'a str> {
    leads_to(rule)?.strip_prefix(prefix)
}

/// Class and target in the name of a set or a chain: `KIND_TARGET`, `KIND1_TARGET` and so on.
fn classed<'a>(name: &'a str, kind: &str) -> Option<(u16, &'a str)> {
    let (class, target) = name.strip_prefix(kind)?.split_once('_')?;
    Some((if class.is_empty() { 0 } else { class.parse().ok()? }, target))
}

/// The lines for owners. The chain of each class has those of the ones before it too.
fn owners(rules: &[RuleView]) -> Vec<OwnerStep> {
    let mut chains: SmallMap<u16, (&str, Vec<OwnerStep>)> = SmallMap::default();
    for rule in rules {
        let class = rule.chain.strip_prefix("user").and_then(|class| class.parse().ok());
        // where they are few, in the chains that begin with them
        let class = class.or_else(|| classed(&rule.chain, "in").map(|(class, _)| class));
        let (Some(class), Some(owner)) = (class, owner(&rule.exprs)) else {
            continue;
        };
        let (chain, steps) = chains.or_insert_with(class, || (&rule.chain, Vec::new()));
        if let Some(target) = goes_to(rule, "to_").filter(|_| *chain == rule.chain) {
            steps.push(OwnerStep { class, owner, target: target.to_string() });
        }
    }
    let mut all: Vec<OwnerStep> = Vec::new();
    for (_, steps) in chains.into_values() {
        let known = all.len();
        all.extend(steps.into_iter().skip(known));
    }
    all
}

/// The owners that a rule is for.
fn owner(exprs: &[Expr]) -> Option<Owner> {
    let [Expr::MetaLoad { key, .. }, rest @ ..] = exprs else {
        return None;
    };
    let (first, last) = match rest {
        [Expr::Cmp { op: NFT_CMP_EQ, data, .. }, ..] => {
            let id = parse::u32_ne(data)?;
            (id, id)
        }
        [Expr::Byteorder { .. }, Expr::Cmp { data: first, .. }, Expr::Cmp { data: last, .. }, ..] => {
            (parse::u32_be(first)?, parse::u32_be(last)?)
        }
        _ => return None,
    };
    match *key {
        NFT_META_SKUID => Some(Owner::Users(first, last)),
        NFT_META_SKGID => Some(Owner::Groups(first, last)),
        _ => None,
    }
}

/// More chains than gates lead to.
const MOST_NESTED: usize = 32;

/// What a rule compares with the name of an interface.
fn compared_name(rule: &RuleView, which: u32) -> Option<&[u8]> {
    match rule.exprs.get(..2)? {
        [Expr::MetaLoad { key, .. }, Expr::Cmp { data, .. }] if *key == which => Some(data),
        _ => None,
    }
}

/// The interface that a rule looks for. A name that is compared without its end is a prefix.
fn interface(rule: &RuleView) -> Option<Interface> {
    let data = compared_name(rule, NFT_META_IIFNAME)?;
    Some(Interface { name: parse::str_z(data).into_owned(), prefix: !data.contains(&0) })
}

/// The interfaces by which answers to loopback addresses may come in.
pub fn open_to_loopback(rules: &[RuleView]) -> Vec<String> {
    let those = rules.iter().filter(|rule| rule.chain == MARTIANS);
    those.filter_map(interface).map(|interface| interface.name).collect()
}

/// The interface that a rule lets packets leave by.
fn way_out(rule: &RuleView) -> Option<String> {
    Some(parse::str_z(compared_name(rule, NFT_META_OIFNAME)?).into_owned())
}

/// The mark that a rule asks the packet for.
fn compared(rule: &RuleView) -> Option<Mark> {
    use Expr::{Bitwise, Cmp, MetaLoad};
    match rule.exprs.get(..3)? {
        [MetaLoad { key: NFT_META_MARK, .. }, Bitwise { mask, .. }, Cmp { data, .. }] => {
            Some(Mark { value: parse::u32_ne(data)?, mask: *mask })
        }
        _ => None,
    }
}

/// The mark that a rule moves flows of, and what to.
fn moving(rule: &RuleView) -> Option<(Mark, Option<u32>)> {
    use Expr::{Bitwise, Cmp, CtLoad};
    let (mask, data) = match rule.exprs.get(..3)? {
        [CtLoad { .. }, Bitwise { mask, .. }, Cmp { data, .. }] => (*mask, data),
        _ => return None,
    };
    let now = rule.exprs.windows(2).find_map(|pair| match pair {
        [Bitwise { xor, .. }, Expr::CtSet { .. }] => Some(*xor),
        _ => None,
    });
    Some((Mark { value: parse::u32_ne(data)?, mask }, now))
}

/// The target of a gateway section, by the rules of its chain.
fn gateway_target<'a>(rules: &[&'a RuleView]) -> &'a str {
    let drops = |rule: &&RuleView| rule.exprs.contains(&Expr::Verdict(Verdict::Drop));
    match rules.iter().find_map(|rule| goes_to(rule, "forward_")) {
        Some(target) => target,
        None if rules.iter().any(drops) => "drop",
        None => "direct",
    }
}

/// The mark that a rule gives the packet.
fn mark(rule: &RuleView) -> Option<Mark> {
    rule.exprs.windows(2).find_map(|pair| match pair {
        [Expr::Bitwise { mask, xor, .. }, Expr::MetaSet { key: NFT_META_MARK, .. }] => {
            Some(Mark { value: *xor, mask: !mask })
        }
        _ => None,
    })
}

/// The port of a rule's tproxy expression, from the register that it names.
fn port(rule: &RuleView) -> Option<u16> {
    let wanted = rule.exprs.iter().find_map(|expr| match expr {
        Expr::Tproxy { port, .. } => Some(*port),
        _ => None,
    })?;
    rule.exprs.iter().find_map(|expr| match expr {
        Expr::Immediate { dreg, data } if *dreg == wanted => {
            Some(u16::from_be_bytes([*data.first()?, *data.get(1)?]))
        }
        _ => None,
    })
}

/// The address of a rule's tproxy expression: the immediate of an address's length.
fn address(rule: &RuleView) -> Option<IpAddr> {
    let is_tproxy = |expr: &Expr| matches!(expr, Expr::Tproxy { .. });
    let octets = |expr: &Expr| match expr {
        Expr::Immediate { data, .. } => parse::ip(data),
        _ => None,
    };
    rule.exprs.iter().any(is_tproxy).then(|| rule.exprs.iter().find_map(octets))?
}

/// The sum of all counters of some rules; `None` where there are none.
fn total(rules: &[&RuleView]) -> Option<Counter> {
    rules.iter().filter_map(|rule| rule.counter).reduce(|a, b| a + b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Outlet, Target, Tproxy};
    use crate::net::{Range, Ranges};
    use crate::netlink::parse::Messages;
    use crate::nft::message::Transaction;
    use crate::nft::table::{classifying, Pair, Shape, Table};

    fn config(default: Target) -> Config {
        let tproxy = |name: &str, mark, port, address: Option<&str>| Tproxy {
            outlet: Outlet { name: name.into(), mark, ..Outlet::default() },
            port,
            addresses: [address.map(|a| a.parse().unwrap()), None],
        };
        Config {
            default,
            tproxies: vec![
                tproxy("zeta", 0x0100_0000, 7893, None),
                tproxy("alpha", 0x0200_0000, 7894, Some("127.0.0.1")),
            ],
            ..Config::default()
        }
    }

    /// Three sections, one of which has a rule for each family.
    fn with_gateways() -> Config {
        let mut config = config(Target::Drop);
        let gateway = |name: &str, interfaces: &[(&str, bool)], target| crate::config::Gateway {
            name: name.into(),
            interfaces: (interfaces.iter())
                .map(|(name, prefix)| Interface { name: name.to_string(), prefix: *prefix })
                .collect(),
            sources: Ranges {
                v4: vec![Range::prefix([192, 0, 2, 0].into(), 24)],
                v6: vec![Range::prefix([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0].into(), 32)],
            },
            target,
            ..Default::default()
        };
        let (lan, any) = (("br-lan", false), ("wlan", true));
        config.gateways = vec![
            gateway("one", &[lan], Target::Direct),
            gateway("two", &[lan, any], Target::Tproxy(1)),
            gateway("three", &[("fifteen-letters", false), any], Target::Drop),
        ];
        config
    }

    /// The rules as the kernel would hand them back: as they were sent.
    fn rules(config: &Config, pairs: &[Pair]) -> Vec<RuleView> {
        let mut transaction = Transaction::new(Batch::new(0));
        let mut table = Table::new(config);
        let pairs = pairs.iter().copied().collect();
        let shape = Shape { base: 1, pairs, hashed: [1].into(), holding: None };
        for (name, rules) in classifying(config, &shape) {
            let mut chains = table.chains.iter_mut();
            chains.find(|chain| chain.name == name).expect("a chain").rules = rules;
        }
        transaction.replace(&table, None);
        let (batch, _) = transaction.finish();
        Messages::new(batch.bytes()).filter_map(|m| parse_rule(&m)).collect()
    }

    /// Few lines for owners stand in the chains that begin with them, many in one of their own.
    #[test]
    fn the_view_of_lines_for_owners() {
        for many in ["", "direct = user:20,30,40,50\n"] {
            let text = format!(
                "[tproxy p]\nport = 1\n[rules]\ndrop = user:5-9\np = /a\n{many}direct = group:7\n\
                 drop = /a\ndrop = /b\n"
            );
            let config = crate::testing::config(text.leak());
            let owners = config.owner_rules.iter().flat_map(|rule| {
                let target = config.target_name(rule.target).to_string();
                let class = rule.class;
                rule.owners.iter().map(move |owner| (class, *owner, target.clone()))
            });
            let pairs = config.outcomes().map(|outcome| Pair {
                level: 2,
                outcome,
                hashed: false,
                loose: false,
            });
            let view = View::of(&rules(&config, &pairs.collect::<Vec<_>>()));
            let seen = view.owners.iter().map(|step| (step.class, step.owner, step.target.clone()));
            assert_eq!(seen.collect::<Vec<_>>(), owners.collect::<Vec<_>>());
            assert_eq!((&*view.default, view.default_class), ("direct", 2));
            let steps = view.steps.iter().map(|step| (&*step.set, step.class, &*step.target));
            let steps: Vec<_> = steps.filter(|(_, class, _)| *class > 0).collect();
            assert_eq!(steps, [("p", 1, "p"), ("drop", 2, "drop")]);
        }
    }

    #[test]
    fn the_view_of_our_own_table() {
        let pair = |level, target: Target, hashed| Pair {
            level,
            outcome: target.into(),
            hashed,
            loose: false,
        };
        let pairs = [
            pair(2, Target::Tproxy(1), false),
            pair(3, Target::Drop, false),
            pair(4, Target::Drop, true),
        ];
        for (default, name) in
            [(Target::Direct, "direct"), (Target::Drop, "drop"), (Target::Tproxy(0), "zeta")]
        {
            let config = config(default);
            let all = rules(&config, &pairs);
            let view = View::of(&all);
            let names: Vec<_> = view.targets.iter().map(|t| t.name.as_str()).collect();
            assert_eq!(names, ["direct", "drop", "zeta", "alpha"]);
            assert_eq!(view.default, name);
            let drop = |level, hashed| {
                let (set, target) = ("drop".into(), "drop".into());
                Step { level, set, target, class: 0, hashed }
            };
            assert_eq!(view.steps[..2], [drop(4, true), drop(3, false)]);
            let alpha = view.target("alpha").unwrap();
            let mark = Mark { value: 0x0200_0000, mask: 0xff00_0000 };
            assert_eq!((alpha.mark, alpha.port), (Some(mark), Some(7894)));
            let listen: IpAddr = "127.0.0.1".parse().unwrap();
            assert_eq!(alpha.addresses, [listen]);
            assert_eq!(alpha.taken, Some(Counter::default()));
            assert_eq!(view.target("zeta").unwrap().port, Some(7893));
            assert_eq!(view.target("zeta").unwrap().addresses, [listen; 0]);
            assert_eq!(view.target("direct").unwrap().taken, None);
            assert_eq!(view.target("drop").unwrap().mark, None);

            let holds = |step: &Step, id| [("alpha", 20), ("drop", 30)].contains(&(&step.set, id));
            let verdict = |ids: &[(u32, u64)]| {
                let ids = ids.iter().copied().collect();
                view.verdict(&ids, holds).0.to_string()
            };
            assert_eq!(verdict(&[(1, 10), (2, 20)]), "alpha");
            assert_eq!(verdict(&[(1, 10), (2, 20), (3, 30)]), "drop");
            assert_eq!(verdict(&[(1, 10), (2, 21), (3, 20)]), name);
        }
    }

    #[test]
    fn the_gateways_of_our_own_table() {
        let config = with_gateways();
        let view = View::of(&rules(&config, &[]));
        let routed = Mark { value: 0xfe00_0000, mask: 0xff00_0000 };
        assert_eq!(view.routed, Some(routed));
        let section = |name: &str, target: &str| GatewayView {
            name: name.into(),
            target: target.into(),
            taken: Some(Counter::default()),
        };
        let sections = [("one", "direct"), ("two", "alpha"), ("three", "drop")];
        let sections = sections.map(|(name, target)| section(name, target));
        assert_eq!(view.gateways, sections);
        let interfaces: SmallSet<_> = view.interfaces.iter().collect();
        let wants: SmallSet<_> = config.gateway_interfaces().into_iter().collect();
        assert_eq!((interfaces.len(), interfaces), (3, wants));
    }

    #[test]
    fn flows_that_move_change_nothing_else() {
        let mut config = with_gateways();
        let plain = View::of(&rules(&config, &[]));
        config.moving = vec![(0x0500_0000, Some(0x0100_0000)), (0x0600_0000, None)];
        let moving =
            config.moving.iter().map(|(was, now)| (Mark { value: *was, mask: config.mask }, *now));
        let moving = moving.collect();
        assert_eq!(View::of(&rules(&config, &[])), View { moving, ..plain });
    }

    #[test]
    fn hostile_bytes_are_survived() {
        let config = with_gateways();
        let mut transaction = Transaction::new(Batch::new(0));
        transaction.replace(&Table::new(&config), None);
        transaction.add_cgroups("cg_drop", [1, 2].into_iter());
        let (batch, _) = transaction.finish();
        let whole: Vec<RuleView> =
            (Messages::new(batch.bytes())).filter_map(|m| parse_rule(&m)).collect();
        assert!(whole.len() > 20);
        let mut random = crate::testing::Random::new(5);
        for _ in 0..3000 {
            let mut bytes = batch.bytes().to_vec();
            for _ in 0..1 + random.below(8) {
                let at = random.below(bytes.len());
                bytes[at] = random.draw() as u8;
            }
            let messages = || Messages::new(&bytes);
            let rules: Vec<RuleView> = messages().filter_map(|m| parse_rule(&m)).collect();
            View::of(&rules);
            messages().filter_map(|m| parse_elements(&m)).for_each(drop);
        }
    }
}
