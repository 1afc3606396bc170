//! Which cgroups `hold` covers, and what the kernel has to know of them: below a held cgroup, new
//! flows of those that it does not know are dropped until they have been looked at. Pure.
//!
//! All of this fails closed: a cgroup that is removed is known no more, and one whose path nft
//! cannot show never is.

use super::dying;
use super::tally::Tally;
use super::tree::Hold;
use crate::config::Config;
use crate::nft::table::Holding;
use crate::policy::Memo;
use crate::small::SmallMap;

/// What `hold` is to a cgroup, by what it is to its parent; only the cgroup root has none.
/// `names_root`: whether rules can match that.
pub fn of(
    memo: &mut Memo,
    config: &Config,
    parent: Option<Hold>,
    path: &[u8],
    names_root: bool,
) -> Hold {
    match parent {
        Some(Hold::Root | Hold::Below) => Hold::Below,
        None if !names_root => Hold::None,
        _ if memo.hold(config, path).is_some() && dying::is_listable(path) => Hold::Root,
        _ => Hold::None,
    }
}

/// An element of the kernel's sets, by its cgroup id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HoldElement {
    /// What is below it is held.
    Root(u64),
    /// It has been looked at. Roots are among these.
    Known(u64),
}

/// All of them, and the levels that they are at.
#[derive(Debug, Default)]
pub struct Holds {
    pub elements: Tally<HoldElement>,
    /// The cgroup root is held, and the root of all.
    all: bool,
    roots: SmallMap<u8, usize>,
    known: SmallMap<u8, usize>,
}

impl Holds {
    /// The root of all is held: no element says so.
    pub fn hold_all(&mut self) {
        self.all = true;
    }

    /// A cgroup has come, or is gone.
    pub fn count(&mut self, id: u64, level: u8, hold: Hold, up: bool) {
        let mut count = |levels: &mut SmallMap<u8, usize>, element| {
            self.elements.count(element, up);
            let count = levels.or_default(level);
            *count = if up { *count + 1 } else { count.saturating_sub(1) };
        };
        if hold == Hold::Root {
            count(&mut self.roots, HoldElement::Root(id));
        }
        if hold != Hold::None {
            count(&mut self.known, HoldElement::Known(id));
        }
    }

    /// Lets go of all.
    pub fn clear(&mut self) {
        self.all = false;
        self.elements.clear();
        for count in self.roots.values_mut().chain(self.known.values_mut()) {
            *count = 0;
        }
    }

    /// Whether there are rules for levels that nothing is at. They stay for a while: most often
    /// something comes again.
    pub fn has_idle(&self) -> bool {
        self.roots.values().chain(self.known.values()).any(|count| *count == 0)
    }

    /// Lets go of those.
    pub fn tidy(&mut self) {
        self.roots.retain(|_, count| *count > 0);
        self.known.retain(|_, count| *count > 0);
    }

    /// What rules are needed for; `deepest`: that of the deepest level that the kernel takes.
    pub fn shape(&self, deepest: usize) -> Option<Holding> {
        if !self.all && self.roots.is_empty() {
            return None;
        }
        let roots = self.roots.keys().copied().collect();
        let last = self.known.keys().next_back().copied().unwrap_or(0);
        Some(Holding { all: self.all, roots, last, deepest: deepest as u8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::taken;

    #[test]
    fn what_the_rules_are_for() {
        let mut holds = Holds::default();
        assert_eq!(holds.shape(255), None);
        holds.count(7, 3, Hold::Root, true);
        holds.count(8, 4, Hold::Below, true);
        holds.count(9, 2, Hold::None, true);
        let held = |last| Some(Holding { all: false, roots: [3].into(), last, deepest: 255 });
        assert_eq!(holds.shape(255), held(4));
        let (root, known) = (HoldElement::Root(7), [HoldElement::Known(7), HoldElement::Known(8)]);
        assert_eq!(taken(&mut holds.elements.changes), (vec![], vec![root, known[0], known[1]]));
        // its level's rules stay for a while
        holds.count(8, 4, Hold::Below, false);
        assert_eq!(taken(&mut holds.elements.changes), (vec![known[1]], vec![]));
        assert_eq!((holds.shape(255), holds.has_idle()), (held(4), true));
        holds.tidy();
        assert_eq!((holds.shape(255), holds.has_idle()), (held(3), false));
        // what comes again at once is not told
        holds.clear();
        holds.count(7, 3, Hold::Root, true);
        assert_eq!(taken(&mut holds.elements.changes), (vec![], vec![]));
        holds.clear();
        holds.tidy();
        assert_eq!((holds.shape(255), holds.elements.snapshot()), (None, vec![]));
        // the root of all has no element
        holds.hold_all();
        let all = Holding { all: true, roots: [].into(), last: 0, deepest: 255 };
        assert_eq!(holds.shape(255), Some(all));
    }
}
