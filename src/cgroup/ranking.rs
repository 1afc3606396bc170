//! What a policy makes of the cgroups, worked out piece by piece. Pure.

use std::collections::HashMap;
use std::rc::Rc;

use super::dying;
use super::holds;
use super::tree::{self, Hold, Index, Node, Path, Tree};
use crate::config::{Config, Outcome};
use crate::policy;

/// What a policy makes of a cgroup, by what it makes of its parent; only the cgroup root has none. For
/// `names_root` see [`holds::of`].
pub fn of(
    memo: &mut policy::Memo,
    config: &Config,
    above: Option<(policy::Rank, Hold)>,
    path: &[u8],
    foreign: bool,
    names_root: bool,
) -> (policy::Rank, Hold) {
    let (parent, held) = above.unzip();
    let rank = match parent {
        Some(parent) => memo.rank(config, parent, path, foreign),
        None => policy::root_rank(config),
    };
    (rank, holds::of(memo, config, held, path, names_root))
}

/// A policy, and what it makes of the cgroups: of one that is to follow, piece by piece, so that
/// new cgroups are classified meanwhile; of one that was in force, to be put back.
#[derive(Debug, Default)]
pub struct Ranking {
    pub config: Rc<Config>,
    pub memo: policy::Memo,
    /// By cgroup id; of every cgroup with an index below `next`, and of some others.
    pub ranks: HashMap<u64, (policy::Rank, Hold)>,
    /// See [`holds::of`].
    names_root: bool,
    next: Index,
    /// The targets of removed ones.
    pub removed: HashMap<Path, Outcome>,
    /// Removed ones whose turn comes once every other has had its own.
    left: Option<Vec<Path>>,
}

impl Ranking {
    pub fn new(config: Rc<Config>, names_root: bool) -> Ranking {
        Ranking { config, names_root, ..Ranking::default() }
    }

    /// Ranks a cgroup, after those above it.
    fn rank(&mut self, tree: &Tree, at: Index) -> Option<(policy::Rank, Hold)> {
        let (path, node) = (tree.path(at)?, tree.node(at)?);
        if let Some(known) = self.ranks.get(&node.id) {
            return Some(*known);
        }
        let above = tree.parent(at).and_then(|parent| self.rank(tree, parent));
        let names_root = self.names_root;
        let found = of(&mut self.memo, &self.config, above, path, node.foreign, names_root);
        self.ranks.insert(node.id, found);
        Some(found)
    }

    /// A cgroup has come, maybe with an index that has had its turn.
    pub fn came(&mut self, tree: &Tree, at: Index) {
        self.rank(tree, at);
    }

    /// A cgroup is gone.
    pub fn went(&mut self, path: &Path, node: &Node) {
        if let Some((rank, _)) = self.ranks.remove(&node.id).filter(|_| node.element.is_some()) {
            self.removed.insert(path.clone(), policy::outcome(&self.config, rank));
        }
    }

    /// Works out one piece; false where all is known.
    pub fn go_on(&mut self, tree: &Tree, dying: &Option<dying::Removed>) -> bool {
        if let Some(at) = tree.next(self.next) {
            self.rank(tree, at);
            self.next = at + 1;
            return true;
        }
        let left = self.left.get_or_insert_with(|| {
            let paths = dying.iter().flat_map(dying::Removed::iter).filter_map(|d| d.path.clone());
            paths.filter(|path| !self.removed.contains_key(path)).collect()
        });
        match left.pop() {
            Some(path) => {
                let rank = self.rank_removed(&path);
                self.removed.insert(path, policy::outcome(&self.config, rank));
                true
            }
            None => false,
        }
    }

    /// The rank of any path.
    fn rank_removed(&mut self, path: &[u8]) -> policy::Rank {
        match tree::parent(path) {
            None => policy::root_rank(&self.config),
            Some(parent) => {
                let parent = self.rank_removed(parent);
                self.memo.rank(&self.config, parent, path, false)
            }
        }
    }
}
