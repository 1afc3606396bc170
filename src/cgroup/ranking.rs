//! What a policy makes of the cgroups, worked out piece by piece. Pure.

use std::collections::HashMap;
use std::rc::Rc;

use super::dying;
use super::holds;
use super::tree::{self, Hold, Node, Path, Tree};
use crate::config::{Config, Outcome};
use crate::policy;

/// A policy, and what it makes of the cgroups: of one that is to follow, piece by piece, so that
/// new cgroups are classified meanwhile; of one that was in force, to be put back.
#[derive(Debug)]
pub struct Ranking {
    pub config: Rc<Config>,
    pub memo: policy::Memo,
    /// By cgroup id; of every cgroup up to `reached`, in the order of the tree.
    pub ranks: HashMap<u64, (policy::Rank, Hold)>,
    /// See [`holds::of`].
    names_root: bool,
    reached: Option<Path>,
    /// The targets of removed ones.
    pub removed: HashMap<Path, Outcome>,
    /// Removed ones whose turn comes once every other has had its own.
    left: Option<Vec<Path>>,
}

impl Ranking {
    pub fn new(config: Rc<Config>, names_root: bool) -> Ranking {
        Ranking {
            config,
            names_root,
            memo: policy::Memo::default(),
            ranks: HashMap::new(),
            reached: None,
            removed: HashMap::new(),
            left: None,
        }
    }

    /// Ranks one cgroup of a tree that has its parent, which has been ranked.
    fn rank(&mut self, tree: &Tree, path: &[u8], node: &Node) {
        let parent = tree::parent(path).and_then(|parent| tree.get(parent));
        let (parent, held) = parent.and_then(|parent| self.ranks.get(&parent.id)).copied().unzip();
        let rank = match parent {
            Some(parent) => self.memo.rank(&self.config, parent, path, node.foreign),
            None => policy::root_rank(&self.config),
        };
        let hold = holds::of(&mut self.memo, &self.config, held, path, self.names_root);
        self.ranks.insert(node.id, (rank, hold));
    }

    /// A cgroup has come. Before its parent has had its turn, it waits for its own.
    pub fn came(&mut self, tree: &Tree, path: &[u8], node: &Node) {
        let parent = tree::parent(path).map(|parent| tree.get(parent));
        let known = |parent: Option<&Node>| parent.is_some_and(|p| self.ranks.contains_key(&p.id));
        if parent.is_none_or(known) {
            self.rank(tree, path, node);
        }
    }

    /// A cgroup is gone.
    pub fn went(&mut self, path: &Path, node: &Node) {
        if let Some((rank, _)) = self.ranks.remove(&node.id).filter(|_| node.element.is_some()) {
            self.removed.insert(path.clone(), policy::outcome(&self.config, rank));
        }
    }

    /// Works out one piece; false where all is known.
    pub fn go_on(&mut self, tree: &Tree, dying: &Option<dying::List>) -> bool {
        let next = match &self.reached {
            None => tree.iter().next(),
            Some(path) => tree.after(path),
        };
        if let Some((path, node)) = next {
            if !self.ranks.contains_key(&node.id) {
                self.rank(tree, path, node);
            }
            self.reached = Some(path.clone());
            return true;
        }
        let left = self.left.get_or_insert_with(|| {
            let paths = dying.iter().flat_map(dying::List::iter).filter_map(|d| d.path.clone());
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
