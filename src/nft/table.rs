//! The table `inet cgtproxy` as data: its sets, chains and rules for a configuration. Pure. Which
//! chains there are, and in what order, says [`Table::new`], but for what only some hosts need, which is
//! added to it: [`again_chain`], and a chain for each veth ([`veth_rule`]). When a chain is there, and why
//! its rules stand in their order, is told where it is built. The shape was verified with traffic (tests/it/reference.rs).
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

use crate::config::Config;
use crate::net::Range;
use crate::netlink::uapi::*;
use crate::nft::stmt::Stmt;
use words::*;

pub use gateway::{again_chain, by_entrances, priority_of_gateways, veth_name, veth_rule};
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

/// A chain that no packet comes to, there from the moment when sockets may be stale by what the table has
/// until all are judged: a daemon may end before, and the next one finds nothing else that tells.
pub const UNJUDGED: &str = "unjudged";

pub fn unjudged_chain() -> Chain {
    chain(UNJUDGED, vec![vec![Stmt::accept()]])
}

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
        let mut chains = Vec::from_iter(output::lo_chain(config));
        chains.extend(spared::chains(config));
        chains.extend(target::chains(config));
        chains.extend(output::flow_chains(config));
        chains.push(target::direct_chain(config));
        chains.extend(output::owner_chains(config));
        chains.extend(hold::unknown_chain(config));
        chains.extend(output::classifying_chains(config));
        chains.extend(nat::chains(config));
        chains.extend(postrouting::chains(config));
        chains.extend(prerouting::target_chains(config));
        chains.extend(output::unmark_chain(config));
        chains.extend(gateway::chains(config));
        chains.extend(prerouting::chains(config));
        if let Some(first) = moved::moving_first(config) {
            // `output` begins so whenever its rules are made
            let own = |chain: &&mut Chain| chain.name != OUTPUT;
            let base = chains.iter_mut().filter(own).filter(|chain| chain.base.is_some());
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
