//! Which subtrees hold elements. At some depths a look-up of the packet's ancestor there tells
//! whether anything at or below it can decide: what no rule names pays for one look-up, however
//! many cgroups are classified and however deep a user nests his own. Pure.
//!
//! A gate that is removed, or that nft cannot show, is known by its hash; see [`super::dying`].

use super::tally::Tally;
use super::tree::{Index, Node};
use crate::nft::stmt::cgroup_hash;
use crate::nft::table::{Stage, DEPTHS};

/// A cgroup at the depth of a stage, with elements at or below it: what stands in the kernel's sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gate {
    pub stage: Stage,
    pub by: KnownBy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KnownBy {
    Id(u64),
    Hash(u32),
}

impl Gate {
    pub fn new(stage: Stage, id: u64, hashed: bool) -> Gate {
        let by = if hashed { KnownBy::Hash(cgroup_hash(id)) } else { KnownBy::Id(id) };
        Gate { stage, by }
    }
}

/// The gate of a stage that something removed was below: what stood for it, and its cgroup id,
/// whatever became of it.
pub type Above = (Stage, Index, u64);

/// All gates: how many elements each has stands in the tree, as long as it lives.
#[derive(Debug, Default)]
pub struct Gates {
    /// Those that are known by their hashes, counted, and what has come or gone of all.
    pub elements: Tally<Gate>,
    /// How many there are by their hashes, by stage.
    hashed: [usize; DEPTHS.len()],
}

impl Gates {
    /// One more element, or one less, is at or below a living cgroup at the depth of a stage.
    pub fn count(&mut self, stage: Stage, node: &mut Node, hashed: bool, up: bool) {
        let before = node.elements;
        node.elements = if up { before + 1 } else { before.saturating_sub(1) };
        if (before > 0) != (node.elements > 0) {
            self.turn(Gate::new(stage, node.id, hashed), up);
        }
    }

    /// One element less is below a gate that has been removed since it was counted.
    pub fn release(&mut self, stage: Stage, id: u64) {
        self.turn(Gate::new(stage, id, true), false);
    }

    /// A cgroup at the depth of a stage has been removed: what it is a gate for may live on.
    pub fn went(&mut self, stage: Stage, node: &Node, hashed: bool) {
        for _ in 0..node.elements {
            self.turn(Gate::new(stage, node.id, true), true);
        }
        if node.elements > 0 {
            self.turn(Gate::new(stage, node.id, hashed), false);
        }
    }

    fn turn(&mut self, gate: Gate, up: bool) {
        match gate.by {
            KnownBy::Id(_) => self.elements.changes.note(gate, up),
            KnownBy::Hash(_) if !self.elements.count(gate, up) => {}
            KnownBy::Hash(_) if up => self.hashed[gate.stage] += 1,
            KnownBy::Hash(_) => self.hashed[gate.stage] -= 1,
        }
    }

    /// The stages that have gates by their hashes.
    pub fn hashed(&self) -> impl Iterator<Item = Stage> + '_ {
        (0..DEPTHS.len()).filter(|stage| self.hashed[*stage] > 0)
    }
}

/// The stage whose gates lie at that depth.
pub fn stage_at(depth: u16) -> Option<Stage> {
    DEPTHS.iter().position(|at| *at == depth.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::taken;

    #[test]
    fn a_gate_that_is_removed() {
        let mut gates = Gates::default();
        let (known, gone) = (Gate::new(1, 7, false), Gate::new(1, 7, true));
        let mut node = Node { id: 7, ..Node::default() };
        gates.count(1, &mut node, false, true);
        gates.count(1, &mut node, false, true);
        assert_eq!(taken(&mut gates.elements.changes), (vec![], vec![known]));
        gates.went(1, &node, false);
        assert!(gates.hashed().eq([1]));
        assert_eq!(taken(&mut gates.elements.changes), (vec![known], vec![gone]));
        gates.release(1, 7);
        assert_eq!(taken(&mut gates.elements.changes), (vec![], vec![]));
        gates.release(1, 7);
        assert_eq!(taken(&mut gates.elements.changes), (vec![gone], vec![]));
        assert!(gates.hashed().eq([]));
    }
}
