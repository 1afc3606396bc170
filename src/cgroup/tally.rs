//! Keys that are counted, and what of them the kernel has to be told: it has one element for each,
//! however often it is counted. Pure.

use std::collections::BTreeMap;

#[derive(Debug, Clone)]
pub struct Tally<K> {
    counts: BTreeMap<K, usize>,
    /// Keys that have come or gone: whether the kernel has them, and is to have them.
    changed: BTreeMap<K, (bool, bool)>,
}

impl<K> Default for Tally<K> {
    fn default() -> Tally<K> {
        Tally { counts: BTreeMap::new(), changed: BTreeMap::new() }
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
            self.changed.entry(key).or_insert((was, is)).1 = is;
        }
        was != is
    }

    /// Counts nothing any more.
    pub fn clear(&mut self) {
        for key in std::mem::take(&mut self.counts).into_keys() {
            self.changed.entry(key).or_insert((true, false)).1 = false;
        }
    }

    pub fn contains(&self, key: &K) -> bool {
        self.counts.contains_key(key)
    }

    /// How often a key is counted.
    pub fn of(&self, key: &K) -> usize {
        self.counts.get(key).copied().unwrap_or(0)
    }

    /// The keys that are to go from the kernel, and to come; it has them from now on.
    pub fn take_changes(&mut self) -> (Vec<K>, Vec<K>) {
        let (mut delete, mut add) = (Vec::new(), Vec::new());
        for (key, turn) in std::mem::take(&mut self.changed) {
            match turn {
                (true, false) => delete.push(key),
                (false, true) => add.push(key),
                _ => {}
            }
        }
        (delete, add)
    }

    /// All keys; the kernel has them from now on.
    pub fn snapshot(&mut self) -> impl Iterator<Item = &K> {
        self.changed.clear();
        self.counts.keys()
    }
}
