//! Keys that are counted, and what of them the kernel has to be told: it has one element for each,
//! however often it is counted. Pure.

use std::collections::BTreeMap;

/// How many changes memory is kept for, and how many that the kernel is told at a time.
const USUAL: usize = 256;
const AT_A_TIME: usize = 64;

/// What is to go from one of the kernel's sets, or some, and to come.
#[derive(Debug, PartialEq, Eq)]
pub struct Change<K> {
    pub delete: Vec<K>,
    pub add: Vec<K>,
}

impl<K> Default for Change<K> {
    fn default() -> Change<K> {
        Change { delete: Vec::new(), add: Vec::new() }
    }
}

impl<K> Change<K> {
    pub fn is_empty(&self) -> bool {
        self.delete.is_empty() && self.add.is_empty()
    }

    /// Empties it, and keeps the memory, unless that was much.
    pub fn clear(&mut self) {
        for list in [&mut self.delete, &mut self.add] {
            list.clear();
            list.shrink_to(AT_A_TIME);
        }
    }
}

/// Keys that have come or gone since the kernel was told.
#[derive(Debug, Clone)]
pub struct Changes<K>(Vec<(K, bool)>);

impl<K> Default for Changes<K> {
    fn default() -> Changes<K> {
        Changes(Vec::new())
    }
}

impl<K: Ord + Copy> Changes<K> {
    /// A key has come, or is gone: each does so by turns.
    pub fn note(&mut self, key: K, come: bool) {
        if self.0.len() == self.0.capacity() {
            // where the kernel cannot be told, much comes and goes again
            self.0 = self.net().collect();
            self.0.reserve(self.0.len().max(8));
        }
        self.0.push((key, come));
    }

    /// What does not cancel out, in the order of the keys.
    fn net(&mut self) -> impl Iterator<Item = (K, bool)> + '_ {
        self.0.sort_unstable();
        self.0.chunk_by(|a, b| a.0 == b.0).filter_map(|same| {
            let came = same.iter().filter(|(_, come)| *come).count();
            (2 * came != same.len()).then_some((same[0].0, 2 * came > same.len()))
        })
    }

    /// Puts the keys that are to go from the kernel, and to come, into that; it has been told from now
    /// on.
    pub fn take(&mut self, change: &mut Change<K>) {
        if self.0.is_empty() {
            return;
        }
        for (key, come) in self.net() {
            if come { &mut change.add } else { &mut change.delete }.push(key);
        }
        self.clear();
    }

    /// The kernel knows.
    pub fn clear(&mut self) {
        self.0.clear();
        self.0.shrink_to(USUAL);
    }
}

#[derive(Debug, Clone)]
pub struct Tally<K> {
    counts: BTreeMap<K, usize>,
    pub changes: Changes<K>,
}

impl<K> Default for Tally<K> {
    fn default() -> Tally<K> {
        Tally { counts: BTreeMap::new(), changes: Changes::default() }
    }
}

impl<K: Ord + Copy> Tally<K> {
    /// Counts a key once more, or once less. True where it has come or gone by that.
    pub fn count(&mut self, key: K, up: bool) -> bool {
        let count = self.counts.entry(key).or_default();
        let was = *count > 0;
        *count = if up { *count + 1 } else { count.saturating_sub(1) };
        let is = *count > 0;
        if !is {
            self.counts.remove(&key);
        }
        if was != is {
            self.changes.note(key, is);
        }
        was != is
    }

    /// Counts nothing any more.
    pub fn clear(&mut self) {
        for key in std::mem::take(&mut self.counts).into_keys() {
            self.changes.note(key, false);
        }
    }

    /// All keys; the kernel has them from now on.
    pub fn snapshot(&mut self) -> Vec<K> {
        self.changes.clear();
        self.counts.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::taken;

    #[test]
    fn what_comes_and_goes_is_not_told() {
        let mut changes = Changes::default();
        changes.note(3, false);
        changes.note(1, true);
        changes.note(2, true);
        changes.note(2, false);
        changes.note(3, true);
        changes.note(3, false);
        assert_eq!(taken(&mut changes), (vec![3], vec![1]));
        // nor does it fill the memory
        for key in 0..10_000 {
            changes.note(key, true);
            changes.note(key, false);
        }
        assert!(changes.0.capacity() < 100);
        assert_eq!(taken(&mut changes), (vec![], vec![]));
    }
}
