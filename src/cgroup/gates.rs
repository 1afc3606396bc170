//! Which subtrees hold elements. At some depths a look-up of the packet's ancestor there tells
//! whether anything at or below it can decide: what no rule names pays for one look-up, however
//! many cgroups are classified and however deep a user nests his own. Pure.
//!
//! A gate that is removed, or that nft cannot show, is known by its hash; see [`super::dying`].

use super::tally::Tally;
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

/// The gate of a stage that something removed was below: its cgroup id, whatever became of it.
pub type Above = (Stage, u64);

/// All gates, counted by elements.
#[derive(Debug, Default)]
pub struct Gates {
    tally: Tally<Gate>,
    /// How many there are by their hashes, by stage.
    hashed: [usize; DEPTHS.len()],
}

impl Gates {
    /// One more element, or one less, is at or below a gate.
    pub fn count(&mut self, gate: Gate, up: bool) {
        if self.tally.count(gate, up) && matches!(gate.by, KnownBy::Hash(_)) {
            match up {
                true => self.hashed[gate.stage] += 1,
                false => self.hashed[gate.stage] -= 1,
            }
        }
    }

    /// One element less is below these, of which some may have been removed since it was counted.
    pub fn release(&mut self, above: &[Above]) {
        for (stage, id) in above {
            let known = Gate::new(*stage, *id, false);
            let gone = Gate::new(*stage, *id, true);
            let gate = if self.tally.contains(&known) { known } else { gone };
            self.count(gate, false);
        }
    }

    /// A cgroup at the depth of a stage has been removed: what it is a gate for may live on.
    pub fn went(&mut self, stage: Stage, id: u64) {
        let (known, gone) = (Gate::new(stage, id, false), Gate::new(stage, id, true));
        for _ in 0..self.tally.of(&known) {
            self.count(known, false);
            self.count(gone, true);
        }
    }

    /// Whether there are gates of a stage by their hashes.
    pub fn has_hashed(&self, stage: Stage) -> bool {
        self.hashed[stage] > 0
    }

    /// See [`Tally::take_changes`].
    pub fn take_changes(&mut self) -> (Vec<Gate>, Vec<Gate>) {
        self.tally.take_changes()
    }

    /// All of them; the kernel has them from now on.
    pub fn snapshot(&mut self) -> Vec<Gate> {
        self.tally.snapshot().copied().collect()
    }
}

/// The stage whose gates lie at that depth.
pub fn stage_at(depth: u16) -> Option<Stage> {
    DEPTHS.iter().position(|at| *at == depth.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_that_is_removed() {
        let mut gates = Gates::default();
        let (known, gone) = (Gate::new(1, 7, false), Gate::new(1, 7, true));
        gates.count(known, true);
        gates.count(known, true);
        assert_eq!(gates.take_changes(), (vec![], vec![known]));
        gates.went(1, 7);
        assert!(gates.has_hashed(1));
        assert_eq!(gates.take_changes(), (vec![known], vec![gone]));
        gates.release(&[(1, 7)]);
        assert_eq!(gates.take_changes(), (vec![], vec![]));
        gates.release(&[(1, 7)]);
        assert_eq!(gates.take_changes(), (vec![gone], vec![]));
        assert!(!gates.has_hashed(1));
    }
}
