//! Removed cgroups whose sockets may live on: rmdir(2) asks for no process, but a socket keeps its
//! cgroup, whoever has it by now (a process that was moved, or only the kernel, which sends what was
//! left). The kernel calls such cgroups dying. Pure: what is known of them is told.
//!
//! A set of cgroup ids would not do for them: nft shows an id without a path as a number that it
//! does not take back. What it shows and takes back is a hash of the id, as the kernel's nft_hash
//! makes it. Living cgroups are matched that way too where nft cannot show their path: it puts it
//! into double quotes as it is.

use std::collections::VecDeque;

use super::gates::Above;
use super::tally::Tally;
use super::tree::{self, Path, Tree};
use crate::config::Outcome;
use crate::nft::stmt::cgroup_hash;
use crate::nft::table::Pair;
use crate::small::{SmallMap, SmallSet};

/// A removed cgroup that had an element of its own. Those below without one go with it, for a
/// packet is matched by every ancestor of its cgroup, dead or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dying {
    /// [`cgroup_hash`] of its id.
    pub hash: u32,
    pub level: u8,
    pub outcome: Outcome,
    /// Where it was; `None` for one that is known from a table alone.
    pub path: Option<Path>,
    /// The gates that it was at or below.
    pub gates: Vec<Above>,
    /// How many looks in a row have found no socket of it.
    quiet: u8,
}

impl Dying {
    pub fn new(id: u64, level: u8, outcome: Outcome, path: Path, gates: Vec<Above>) -> Dying {
        Dying { hash: cgroup_hash(id), level, outcome, path: Some(path), gates, quiet: 0 }
    }

    /// One that the sets of a table hold.
    pub fn known_by(hash: u32, level: u8, outcome: Outcome) -> Dying {
        Dying { hash, level, outcome, path: None, gates: Vec::new(), quiet: 0 }
    }

    /// Its element.
    fn key(&self) -> Hashed {
        (self.outcome, self.hash)
    }

    /// The element that matches it.
    pub fn pair(&self) -> Pair {
        let loose = self.path.is_none();
        Pair { level: self.level, outcome: self.outcome, hashed: true, loose }
    }
}

/// What an element of the kernel's sets says: whose set it is in, and the hash of the path.
pub type Hashed = (Outcome, u32);

/// All of them, the oldest first.
#[derive(Debug, Default)]
pub struct Removed {
    all: VecDeque<Dying>,
    /// How many cgroups make one element of a set: these, and living ones.
    pub elements: Tally<Hashed>,
}

/// Most that are kept: nobody can make the kernel's sets grow without end.
const MOST: usize = 1024;

/// How many memory is kept for at rest.
const USUAL: usize = 256;

/// After how many looks without a socket one is let go where the kernel says that it lives on, for
/// memory may hold a cgroup for days. What such a look does not see: TCP sockets that were never
/// connected, UDP sockets that were never bound, and raw ones.
const QUIET: u8 = 2;

impl Removed {
    /// Whether the oldest goes with the next one that comes.
    pub fn is_full(&self) -> bool {
        self.all.len() >= MOST
    }

    pub fn iter(&self) -> impl Iterator<Item = &Dying> {
        self.all.iter()
    }

    /// Takes one in. The oldest goes where there are too many: it is returned.
    pub fn push(&mut self, dying: Dying) -> Option<Dying> {
        self.elements.count(dying.key(), true);
        self.all.push_back(dying);
        let oldest = if self.all.len() > MOST { self.all.pop_front() } else { None };
        oldest.inspect(|oldest| self.forget(oldest))
    }

    /// A living cgroup is matched by its hash from now on, or no more.
    pub fn match_living(&mut self, id: u64, outcome: Outcome, so: bool) {
        self.elements.count((outcome, cgroup_hash(id)), so);
    }

    /// Lets those go that do not match, and gives them.
    pub fn retain(&mut self, keep: impl Fn(&Dying) -> bool) -> Vec<Dying> {
        let gone: Vec<Dying> = self.all.iter().filter(|dying| !keep(dying)).cloned().collect();
        self.all.retain(keep);
        self.all.shrink_to(USUAL);
        gone.iter().for_each(|dying| self.forget(dying));
        gone
    }

    /// Takes all out, to be put back with other targets.
    pub fn take(&mut self) -> Vec<Dying> {
        let all: Vec<Dying> = self.all.drain(..).collect();
        all.iter().for_each(|dying| self.forget(dying));
        all
    }

    /// A look at the sockets: `kept` are the cgroups that they hold, but for those that live.
    /// Removed cgroups that no socket has kept for some looks go. Where a socket keeps one that is
    /// not known at all, which may be below any of these, they stay.
    pub fn seen(&mut self, kept: &SmallSet<u64>) -> Vec<Dying> {
        let kept: SmallSet<u32> = kept.iter().map(|id| cgroup_hash(*id)).collect();
        let own: SmallSet<u32> = self.all.iter().map(|dying| dying.hash).collect();
        let all_known = kept.is_subset(&own);
        for dying in &mut self.all {
            dying.quiet = match all_known && !kept.contains(&dying.hash) {
                true => dying.quiet + 1,
                false => 0,
            };
        }
        self.retain(|dying| dying.quiet < QUIET)
    }

    /// The living cgroups that are next above them: the kernel knows of each how many below it die.
    pub fn above(&self, living: &Tree) -> SmallSet<Path> {
        let root = living.path(tree::ROOT);
        let next = |dying: &Dying| match &dying.path {
            Some(path) => living.path(living.nearest(path)?),
            None => root,
        };
        self.all.iter().filter_map(next).cloned().collect()
    }

    /// Nothing below that living cgroup is dying any more.
    pub fn released(&mut self, above: &[u8]) -> Vec<Dying> {
        self.retain(|dying| match &dying.path {
            Some(path) => !path.strip_prefix(above).is_some_and(|rest| rest.starts_with(b"/")),
            None => !above.is_empty(),
        })
    }

    /// All elements; the kernel has them from now on.
    pub fn snapshot(&mut self) -> SmallMap<Outcome, Vec<u32>> {
        let mut elements: SmallMap<Outcome, Vec<u32>> = SmallMap::default();
        for (outcome, hash) in self.elements.snapshot() {
            elements.or_default(outcome).push(hash);
        }
        elements
    }

    fn forget(&mut self, dying: &Dying) {
        self.elements.count(dying.key(), false);
    }
}

/// Whether nft can show a path and take it back.
pub fn is_listable(path: &[u8]) -> bool {
    !path.contains(&b'"')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::tree::Node;
    use crate::config::Target;
    use crate::nft::stmt::cgroup_hash as hash;
    use crate::testing::taken;

    const DROP: Outcome = Outcome { target: Target::Drop, class: 0 };

    fn dying(id: u64, path: &str) -> Dying {
        Dying::new(id, 3, DROP, path.as_bytes().into(), Vec::new())
    }

    fn hashes(list: &Removed) -> Vec<u32> {
        list.iter().map(|dying| dying.hash).collect()
    }

    #[test]
    fn what_the_kernel_must_hold() {
        let mut list = Removed::default();
        list.push(dying(1, "/a"));
        list.push(Dying::known_by(hash(1), 4, DROP));
        assert_eq!(taken(&mut list.elements.changes), (vec![], vec![(DROP, hash(1))]));
        // the other one needs it still
        assert_eq!(list.retain(|d| d.path.is_none()).len(), 1);
        assert_eq!(taken(&mut list.elements.changes), (vec![], vec![]));
        list.retain(|_| false);
        list.push(dying(1, "/a"));
        assert_eq!(taken(&mut list.elements.changes), (vec![], vec![]));
        list.retain(|_| false);
        assert_eq!(taken(&mut list.elements.changes), (vec![(DROP, hash(1))], vec![]));
        for id in 0..=MOST as u64 {
            assert_eq!(list.push(dying(id, "/a")).is_some(), id == MOST as u64);
        }
        assert_eq!((list.all.len(), list.iter().next().map(|d| d.hash)), (MOST, Some(hash(1))));
    }

    #[test]
    fn when_they_are_let_go() {
        let mut tree = Tree::default();
        for path in ["", "/a"] {
            let path: Path = path.as_bytes().into();
            tree.insert(path.clone(), tree.key(&path), Node::default());
        }
        let mut list = Removed::default();
        list.push(dying(1, "/a/b"));
        list.push(dying(2, "/a/b/c"));
        list.push(dying(3, "/a-b"));
        list.push(Dying::known_by(4, 1, DROP));
        let above: Vec<Path> = list.above(&tree).into_iter().collect();
        assert_eq!(above, ["".as_bytes().into(), "/a".as_bytes().into()]);
        list.released(b"/a");
        assert_eq!(hashes(&list), [hash(3), 4]);
        list.released(b"");
        assert!(list.all.is_empty());
        // by sockets
        list.push(dying(1, "/a/b"));
        list.push(dying(2, "/a/b/c"));
        let kept = |ids: &[u64]| ids.iter().copied().collect();
        list.seen(&kept(&[1]));
        assert_eq!(list.seen(&kept(&[1])).len(), 1);
        assert_eq!(hashes(&list), [hash(1)]);
        list.seen(&kept(&[]));
        list.seen(&kept(&[9]));
        list.seen(&kept(&[]));
        assert_eq!(list.all.len(), 1);
        list.seen(&kept(&[]));
        assert!(list.all.is_empty());
    }
}
