//! What the rules depend on beside the configuration: which cgroups are known, and at what depth;
//! where containers' packets come in; where others' route tables lead.

use crate::config::{Outcome, Target};
use crate::small::{SmallMap, SmallSet};

/// A cgroup's place in the kernel's sets: what it comes to, matched at which level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pair {
    pub level: u8,
    pub outcome: Outcome,
    /// Of cgroups that are matched by their hash; see [`crate::cgroup::dying`].
    pub hashed: bool,
    /// Of removed ones of which nothing tells what gates they were below.
    pub loose: bool,
}

/// The depths of gates below the cgroup root. Each leads to the pairs from there to the next one.
pub const DEPTHS: [usize; 5] = [1, 2, 4, 8, 16];

/// The place of a depth in [`DEPTHS`].
pub type Stage = usize;

/// The depths from a stage's gates to the next.
pub(super) fn depths(stage: Stage) -> std::ops::Range<usize> {
    DEPTHS[stage]..DEPTHS.get(stage + 1).copied().unwrap_or(usize::MAX)
}

/// What the rules that classify depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shape {
    /// Level of the cgroup root.
    pub base: usize,
    pub pairs: SmallSet<Pair>,
    /// The stages that have gates by their hashes.
    pub hashed: SmallSet<Stage>,
    /// What is held, where anything is.
    pub holding: Option<Holding>,
}

impl Shape {
    /// Whether there are pairs or gates that another one has no rules for.
    pub fn leads_further(&self, other: &Shape) -> bool {
        !self.pairs.is_subset(&other.pairs) || !self.hashed.is_subset(&other.hashed)
    }
}

/// The levels of held cgroups and of those that are known below them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// Every cgroup but the root of all is below a held one.
    pub all: bool,
    pub roots: SmallSet<u8>,
    /// The deepest one that is known.
    pub last: u8,
    /// The deepest one that the kernel takes.
    pub deepest: u8,
}

/// Where what containers send comes into this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entrances {
    /// The host's ends of their veths, by index: name, and the target of what comes in there.
    pub veths: SmallMap<u32, (String, Target)>,
    /// The bridges that these are ports of.
    pub bridges: SmallSet<String>,
}

/// The interfaces that route tables of others lead out by, by table.
pub type Devices = SmallMap<u32, SmallSet<String>>;
