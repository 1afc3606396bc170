//! The table `inet cgtproxy` as data: its sets, chains and rules for a configuration. Pure. Which
//! chains there are, and in what order, says [`Table::new`], but for what only some hosts need, which is
//! added to it: [`again_chain`], and a chain for each veth ([`veth_rule`]). Why the rules of each stand in
//! their order is told where it is built. The shape was verified with traffic (tests/it/reference.rs).
//!
//! Its rooms, in a packet's order: `gateway` has what is routed for others, `output` what this host's
//! processes send (the order of the rules that classify), with `hold` and `spared` for what is cut and
//! left alone ahead of a target; `target` what a target then does (`to_NAME`), `dns` its hijacking;
//! `postrouting` the last look at what leaves, `prerouting` what comes back in by lo, `nat` all that is
//! translated; `moved` what flows of before are known by. Below them: `sets` (names and addresses),
//! `shape` (what the rules depend on beside the configuration), and `words`, which all others say.

mod dns;
mod gateway;
mod hold;
mod moved;
mod nat;
mod output;
mod postrouting;
mod prerouting;
mod sets;
mod shape;
mod spared;
mod target;
mod words;

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::config::{Config, Outlet};
use crate::net::Range;
use crate::netlink::uapi::*;
use crate::nft::stmt::Stmt;
use crate::small::SmallSet;
use words::*;

pub use gateway::{
    again_chain, bridged_rules, priority_of_gateways, veth_name, veth_rule, BRIDGED,
};
pub use hold::{hold_rules, HOLD, UNKNOWN};
pub use moved::MOVED;
pub use output::{classifying, OUTPUT};
pub use postrouting::ways;
pub use prerouting::MARTIANS;
pub use sets::{
    bypass4, bypass6, class_name, dying_name, gate_names, hold_sets, set_name, HELD, KNOWN,
};
pub use shape::{Devices, Entrances, Holding, Pair, Shape, Stage, DEPTHS};

/// Name of our one table, in family inet.
pub const TABLE: &str = "cgtproxy";

/// What the daemon has done since the table is there: a counter of the table for each, which no
/// packet meets, so that the kernel holds that too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    TableRepair,
    RoutingRepair,
    Reload,
    RefusedReload,
}

/// How often, in the order of [`Deed`].
pub type Deeds = [u64; 4];

/// The names of their counters.
pub const DEEDS: [&str; 4] = ["table_repairs", "routing_repairs", "reloads", "refused_reloads"];

/// Sets, chains and static rules; everything but the elements of the cgroup sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub sets: Vec<Set>,
    pub chains: Vec<Chain>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Set {
    pub name: String,
    pub content: Content,
}

/// What a set holds. Elements of `Cgroups` are the core's business and kept elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Content {
    V4(Vec<Range<Ipv4Addr>>),
    V6(Vec<Range<Ipv6Addr>>),
    Ports(Vec<Range<u16>>),
    Cgroups {
        counters: bool,
    },
    /// Cgroup ids as [`Stmt::CgroupHash`] makes them; the core's business too.
    Hashes,
}

impl Content {
    /// Whether the kernel keeps it as intervals.
    pub fn is_ranges(&self) -> bool {
        matches!(self, Content::V4(_) | Content::V6(_) | Content::Ports(_))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    pub name: String,
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}

pub type Rule = Vec<Stmt>;

/// What makes a chain a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Base {
    pub kind: &'static str,
    pub hook: u32,
    pub priority: i32,
}

impl Table {
    /// The table for a configuration: `output` as it is without cgroups, and the other chains whose rules
    /// depend on what there is, on cgroups ([`classifying`]), bridges or tables of others, empty.
    pub fn new(config: &Config) -> Table {
        let sets = sets::all_sets(config);
        // chains stand before those that go to them, which `nft -f` does not ask for but readers do
        let mut chains = Vec::new();
        let (proxies, takes) = (!config.tproxies.is_empty(), has_outlets(config));
        chains.extend(knows_spoofed(config).then(|| output::lo_chain(config)));
        chains.extend(leaves_marks(config).then(|| spared::leave_chain(config)));
        chains.extend(
            hijacks_local(config).then(|| chain(spared::EXEMPT, spared::exempt_rules(config))),
        );
        chains.extend([
            chain("bypass", spared::spared_rules(config)),
            spared::neighbours_chain(),
            target::drop_chain(config),
        ]);
        chains.extend(config.outlets().any(Outlet::rejects).then(target::refuse_chain));
        for outlet in config.outlets() {
            chains.extend(target::cut_chain(outlet));
            chains.extend(outlet.hijacks_dns().then(|| dns::dns_chain(config, outlet)));
            match route_of(config, outlet) {
                None => chains.extend(target::to_chains(config, outlet)),
                Some(route) => chains.extend(target::way_chains(config, route)),
            }
        }
        chains.extend(proxies.then(|| output::spoofed_chain(config)));
        chains.extend(drops_ownerless(config).then(output::ownerless_chain));
        chains.extend(config.marks_flows().then(|| output::sticky_chain(config)));
        chains.push(target::direct_chain(config));
        let behind = || config.outcomes().filter(|outcome| outcome.class > 0);
        let many = |class: &u16| output::owner_rules(config, *class).len() > output::FEW;
        let classes = behind().map(|outcome| outcome.class).filter(many);
        let default = Some(config.default_outcome().class).filter(|class| *class > 0);
        let classes: SmallSet<u16> = classes.chain(default).collect();
        let owners = |class| chain(output::owners_name(class), output::owner_rules(config, class));
        chains.extend(classes.into_iter().map(owners));
        chains.extend(behind().map(|outcome| output::behind_owners_chain(config, outcome)));
        chains.extend((!config.holds.is_empty()).then(|| hold::unknown_chain(config)));
        let hold = hold_rules(config, None).into_iter().map(|(name, _)| name);
        let deepest_first = (0..DEPTHS.len()).rev().map(output::below_name);
        let marked = config.marks_flows().then(|| output::MARKED.to_string());
        let empty = deepest_first.chain(marked).chain(hold);
        chains.extend(empty.map(|name| chain(name, Vec::new())));
        // the type that routes again when a chain changes the mark
        let output = chain(OUTPUT, output::output_rules(config, &Shape::default()));
        chains.push(output.hooked("route", NF_INET_LOCAL_OUT, NF_IP_PRI_MANGLE));
        if config.outlets().any(Outlet::hijacks_dns) {
            chains.push(nat::nat_chain(config, "nat_output", NF_INET_LOCAL_OUT));
            let routed = || nat::nat_chain(config, "nat_prerouting", NF_INET_PRE_ROUTING);
            chains.extend(hands_over(config).then(routed));
            chains.extend(nat::routed_answer_chain(config));
        }
        chains.extend(nat::source_chain(config));
        chains.extend(postrouting::sourceless_chain(config));
        chains.extend(proxies.then(|| postrouting::strayed_chain(config)));
        chains.extend(config.tproxies.iter().map(|t| postrouting::astray_chain(&t.outlet)));
        chains.extend(config.routes.iter().flat_map(postrouting::off_course_chains));
        chains.extend(config.routes.iter().map(|route| postrouting::here_chain(&route.outlet)));
        chains.extend((!config.routes.is_empty()).then(|| postrouting::home_chain(config)));
        chains.extend(takes.then(|| postrouting::guard_chain(config)));
        chains.extend(config.tproxies.iter().map(|t| prerouting::receive_chain(config, t)));
        chains.extend(config.routes.iter().map(|route| prerouting::closed_chain(&route.outlet)));
        if config.routes_to_tproxy() {
            chains.push(output::unmark_chain(config));
            let tproxies = config.tproxies.iter();
            chains.extend(tproxies.flat_map(|t| gateway::forward_chains(config, &t.outlet)));
        }
        if config.forwards() {
            let dns = config.routes.iter().filter(|route| route.outlet.hijacks_dns());
            chains.extend(dns.map(|route| dns::forwarded_dns_chain(config, route)));
            chains.extend(
                config.routes.iter().map(|route| gateway::forward_way_chain(config, route)),
            );
        }
        if hands_over(config) {
            chains.extend([gateway::routed_chain(config), gateway::input_chain(config)]);
        }
        chains.extend(config.has_containers().then(|| chain(BRIDGED, Vec::new())));
        chains.extend(config.gateways.iter().map(|g| gateway::gateway_chain(config, g)));
        if !config.gateways.is_empty() {
            chains.extend([gateway::astray_clients_chain(config), gateway::older_chain(config)]);
            chains.push(gateway::gateways_chain(config));
        }
        chains.extend(proxies.then(|| prerouting::regain_chain(config)));
        chains.extend(config.routes_to_tproxy().then(|| prerouting::remark_chain(config)));
        chains.extend(takes.then(|| prerouting::prerouting_chain(config)));
        chains.extend(prerouting::martians_chain(config));
        if let Some(first) = moved::moving_first(config) {
            // `output` begins so whenever its rules are made
            let own = |chain: &&mut Chain| chain.name != OUTPUT;
            let begins = |base: Base| base.kind != "nat";
            let base = chains.iter_mut().filter(own).filter(|c| c.base.is_some_and(begins));
            base.for_each(|chain| chain.rules.insert(0, first.clone()));
            chains.insert(0, chain(MOVED, moved::moved_rules(config)));
        }
        Table { sets, chains }
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hook = match self.hook {
            NF_INET_LOCAL_OUT => "output",
            NF_INET_POST_ROUTING => "postrouting",
            NF_INET_LOCAL_IN => "input",
            NF_INET_INGRESS => "ingress",
            _ => "prerouting",
        };
        // nft has no name for mangle in a nat chain's neighbourhood; numbers are always right
        write!(f, "type {} hook {hook} priority {}; policy accept;", self.kind, self.priority)
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  chain {} {{", self.name)?;
        if let Some(base) = &self.base {
            writeln!(f, "    {base}")?;
        }
        for rule in &self.rules {
            let text: Vec<String> = rule.iter().map(Stmt::to_string).collect();
            writeln!(f, "    {}", text.join(" "))?;
        }
        writeln!(f, "  }}")
    }
}
