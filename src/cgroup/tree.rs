//! The model of the cgroup tree: every directory that is known, by path and by watch descriptor.
//! Pure; it is told what there is and never looks.
//!
//! A path is looked up once, name by name, for the index of its cgroup; all else goes by that.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;

use crate::config::Outcome;
use crate::policy::Rank;

/// A cgroup's path from the cgroup root: empty for the root itself, else with a leading slash.
pub type Path = Rc<[u8]>;

/// A path as it may stand in a log line or an error.
pub fn display(path: &Path) -> String {
    match path.is_empty() {
        true => "/".into(),
        false => path.escape_ascii().to_string(),
    }
}

/// What `hold` is to a cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Hold {
    #[default]
    None,
    /// What is below it is held, and nothing above it is.
    Root,
    Below,
}

/// What is known of one cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Node {
    /// The kernel's cgroup id.
    pub id: u64,
    /// The watch on the directory; `None` where the limit of watches was reached.
    pub wd: Option<i32>,
    pub rank: Rank,
    /// The target of its set element; `None` where it inherits its parent's.
    pub element: Option<Outcome>,
    /// Who answers for what happens in it: the owner of the outermost directory on the way there
    /// that is not root's. 0 for root's, and until it has been listed.
    pub account: u32,
    /// How many elements are at or below it, of living and removed ones, where it may be a gate.
    pub elements: u32,
    /// How many levels below the cgroup root it is.
    pub depth: u16,
    /// Has a name that gives it a target, and was made by somebody who may not choose one.
    pub foreign: bool,
    /// Nft can show the path from the cgroup root.
    pub listable: bool,
    pub hold: Hold,
    /// It was held when it was found late: what was below it by then may have gone its parent's way.
    pub late_root: bool,
}

/// What stands for a cgroup that is known, for as long as it is: for another one afterwards.
pub type Index = u32;

/// The index of the root.
pub const ROOT: Index = 0;

/// Where a cgroup stands that is known or may be: its parent, and the hash of its name.
pub type NameKey = (Index, u32);

/// How many memory is kept for.
const USUAL: usize = 256;

/// All cgroups that are known. A node's parent is known too.
#[derive(Debug, Default)]
pub struct Tree {
    /// By index.
    slots: Vec<Option<Slot>>,
    free: BTreeSet<Index>,
    /// By parent and hash of the name: one of those, which leads to the others.
    names: BTreeMap<NameKey, Index>,
    /// Hashes differ from run to run, so that nobody can choose names that have the same one.
    keys: RandomState,
    watches: BTreeMap<i32, Index>,
    /// The parent that was asked for last: most often the next one has the same.
    last_parent: Cell<Index>,
}

#[derive(Debug)]
struct Slot {
    path: Path,
    /// The root's is its own.
    parent: Index,
    /// The next one with that parent and hash, or the root where there is none.
    same: Index,
    node: Node,
}

impl Tree {
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    pub fn get(&self, path: &[u8]) -> Option<&Node> {
        self.find(path).and_then(|at| self.node(at))
    }

    pub fn node(&self, at: Index) -> Option<&Node> {
        self.slot(at).map(|slot| &slot.node)
    }

    pub fn node_mut(&mut self, at: Index) -> Option<&mut Node> {
        self.slot_mut(at).map(|slot| &mut slot.node)
    }

    pub fn path(&self, at: Index) -> Option<&Path> {
        self.slot(at).map(|slot| &slot.path)
    }

    fn slot(&self, at: Index) -> Option<&Slot> {
        self.slots.get(at as usize)?.as_ref()
    }

    fn slot_mut(&mut self, at: Index) -> Option<&mut Slot> {
        self.slots.get_mut(at as usize)?.as_mut()
    }

    /// The index of the cgroup with this path.
    pub fn find(&self, path: &[u8]) -> Option<Index> {
        match path.is_empty() {
            true => self.slot(ROOT).map(|_| ROOT),
            false => self.named(self.key(path)?, path),
        }
    }

    /// Where the cgroup with this path stands; `None` for the root, and where its parent is not known.
    pub fn key(&self, path: &[u8]) -> Option<NameKey> {
        Some(self.hashed(self.above(path)?, name(path)?))
    }

    /// That of its parent; the root has none.
    pub fn above(&self, path: &[u8]) -> Option<Index> {
        let parent = parent(path)?;
        if self.path(self.last_parent.get()).is_some_and(|last| **last == *parent) {
            return Some(self.last_parent.get());
        }
        let at = self.nearest(path)?;
        self.last_parent.set(at);
        (parent.len() == self.path(at)?.len()).then_some(at)
    }

    /// That of the nearest one above it that is known; the root has none.
    pub fn nearest(&self, path: &[u8]) -> Option<Index> {
        let names = parent(path)?.split(|b| *b == b'/').skip(1);
        let mut at = self.slot(ROOT).map(|_| ROOT)?;
        for name in names {
            match self.child(at, name) {
                Some(child) => at = child,
                None => break,
            }
        }
        Some(at)
    }

    /// That of a child.
    fn child(&self, parent: Index, name: &[u8]) -> Option<Index> {
        self.named(self.hashed(parent, name), name)
    }

    /// The index of the one with that name, or path, among those that stand there.
    pub fn named(&self, key: NameKey, path: &[u8]) -> Option<Index> {
        let (first, name) = (self.names.get(&key)?, name(path)?);
        self.alike(*first).find(|at| self.path(*at).is_some_and(|path| is_named(path, name)))
    }

    /// Those with the same parent and hash, from that one on.
    fn alike(&self, first: Index) -> impl Iterator<Item = Index> + '_ {
        let next = |at: &Index| self.slot(*at).map(|slot| slot.same).filter(|at| *at != ROOT);
        std::iter::successors(Some(first), next)
    }

    fn hashed(&self, parent: Index, name: &[u8]) -> NameKey {
        (parent, self.keys.hash_one(name) as u32)
    }

    /// The index that a watch descriptor stands for.
    pub fn watched(&self, wd: i32) -> Option<Index> {
        self.watches.get(&wd).copied()
    }

    /// Takes in what is neither known nor watched, with its key; only the root has none.
    pub fn insert(&mut self, path: Path, key: Option<NameKey>, node: Node) -> Index {
        let (mut at, mut parent, mut same) = (ROOT, ROOT, ROOT);
        if let Some(key) = key {
            at = self.free.pop_first().unwrap_or(self.slots.len() as Index);
            parent = key.0;
            same = self.names.insert(key, at).unwrap_or(ROOT);
        }
        if at as usize >= self.slots.len() {
            self.slots.resize_with(at as usize + 1, || None);
        }
        self.slots[at as usize] = Some(Slot { path, parent, same, node });
        at
    }

    /// Notes the watch of a node, or that there is none, and returns the one it had.
    pub fn watch(&mut self, at: Index, wd: Option<i32>) -> Option<i32> {
        let before = std::mem::replace(&mut self.node_mut(at)?.wd, wd);
        if before != wd {
            before.into_iter().for_each(|wd| self.forget(at, wd));
            self.watches.extend(wd.map(|wd| (wd, at)));
        }
        before
    }

    /// Forgets a watch that is gone; its node stays.
    pub fn unwatch(&mut self, wd: i32) -> Option<Index> {
        let at = self.watches.remove(&wd)?;
        if let Some(node) = self.node_mut(at) {
            node.wd = None;
        }
        Some(at)
    }

    /// Removes one node without children, and its watch.
    pub fn remove(&mut self, at: Index) {
        let Some(slot) = self.slots.get_mut(at as usize).and_then(Option::take) else {
            return;
        };
        if let Some(name) = name(&slot.path) {
            let key = self.hashed(slot.parent, name);
            match self.names.get(&key) {
                Some(first) if *first == at && slot.same == ROOT => drop(self.names.remove(&key)),
                Some(first) if *first == at => drop(self.names.insert(key, slot.same)),
                first => {
                    let leads = |one: &Index| self.slot(*one).is_some_and(|slot| slot.same == at);
                    let before = first.and_then(|first| self.alike(*first).find(leads));
                    if let Some(before) = before.and_then(|before| self.slot_mut(before)) {
                        before.same = slot.same;
                    }
                }
            }
        }
        if let Some(wd) = slot.node.wd {
            self.forget(at, wd);
        }
        self.free.insert(at);
        while let Some(None) = self.slots.last() {
            self.slots.pop();
            self.free.remove(&(self.slots.len() as Index));
        }
        if self.slots.len() < self.slots.capacity() / 4 {
            self.slots.shrink_to(USUAL.max(2 * self.slots.len()));
        }
    }

    /// The descriptor may stand for another directory by now.
    fn forget(&mut self, at: Index, wd: i32) {
        if self.watches.get(&wd) == Some(&at) {
            self.watches.remove(&wd);
        }
    }

    /// The first index from that one on that stands for something.
    pub fn next(&self, from: Index) -> Option<Index> {
        (from..self.slots.len() as Index).find(|at| self.slot(*at).is_some())
    }

    /// The indices of all, in no order.
    pub fn indices(&self) -> impl Iterator<Item = Index> + '_ {
        std::iter::successors(self.next(ROOT), |at| self.next(*at + 1))
    }

    /// Every node, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&Path, &Node)> {
        self.slots.iter().flatten().map(|slot| (&slot.path, &slot.node))
    }

    pub fn nodes_mut(&mut self) -> impl Iterator<Item = &mut Node> {
        self.slots.iter_mut().flatten().map(|slot| &mut slot.node)
    }

    /// A node, its parent and so on, up to the root.
    pub fn up(&self, at: Index) -> impl Iterator<Item = (&Path, &Node)> {
        let slots = self.lineage(at).filter_map(|at| self.slot(at));
        slots.map(|slot| (&slot.path, &slot.node))
    }

    /// The indices of these.
    pub fn lineage(&self, at: Index) -> impl Iterator<Item = Index> + '_ {
        std::iter::successors(Some(at), |at| self.parent(*at))
    }

    /// The index of a node's parent; the root has none.
    pub fn parent(&self, at: Index) -> Option<Index> {
        self.slot(at).filter(|_| at != ROOT).map(|slot| slot.parent)
    }

    /// The children of a node.
    pub fn children(&self, at: Index) -> impl Iterator<Item = Index> + '_ {
        let first = self.names.range((at, 0)..=(at, u32::MAX));
        first.flat_map(|(_, first)| self.alike(*first))
    }

    /// A node and all that are below it, parents before their children.
    pub fn subtree(&self, at: Index) -> Vec<Index> {
        let mut all = vec![at];
        let mut next = 0;
        while let Some(at) = all.get(next).copied() {
            all.extend(self.children(at));
            next += 1;
        }
        all
    }
}

/// The name of the cgroup with this path; the root has none.
fn name(path: &[u8]) -> Option<&[u8]> {
    path.rsplit(|b| *b == b'/').next().filter(|_| !path.is_empty())
}

/// The same, compared.
fn is_named(path: &[u8], name: &[u8]) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.ends_with(b"/"))
}

/// The parent of a path; `None` for the root.
pub fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|b| *b == b'/').map(|at| &path[..at])
}

/// The path of a child.
pub fn child(path: &[u8], name: &[u8]) -> Path {
    let mut child: Path = std::iter::repeat_n(b'/', path.len() + 1 + name.len()).collect();
    if let Some(bytes) = Rc::get_mut(&mut child) {
        bytes[..path.len()].copy_from_slice(path);
        bytes[path.len() + 1..].copy_from_slice(name);
    }
    child
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn what_is_found_by_path() {
        let mut tree = Tree::default();
        let paths = ["", "/b", "/a", "/a-b", "/a-b/c", "/a/b", "/a/b/c", "/a0"];
        for (i, path) in paths.iter().enumerate() {
            let path: Path = path.as_bytes().into();
            let node = Node { id: i as u64, ..Node::default() };
            let at = tree.insert(path.clone(), tree.key(&path), node);
            tree.watch(at, Some(i as i32));
        }
        let text = |at| String::from_utf8_lossy(tree.path(at).expect("there")).into_owned();
        let find = |path: &str| tree.find(path.as_bytes());
        let below = |path: &str| -> Vec<String> {
            let all = tree.subtree(find(path).expect("known"));
            let mut below: Vec<String> = all.into_iter().skip(1).map(text).collect();
            below.sort();
            below
        };
        assert_eq!(below("/a"), ["/a/b", "/a/b/c"]);
        assert_eq!(below("/a-b"), ["/a-b/c"]);
        assert_eq!(below("/b"), [""; 0]);
        assert_eq!(below("").len(), paths.len() - 1);
        assert_eq!(parent(b"/a/b"), Some(&b"/a"[..]));
        assert_eq!(parent(b"/a"), Some(&b""[..]));
        assert_eq!(parent(b""), None);
        let unknown = ["/", "/c", "/a/", "/c/b", "//a", "a"];
        assert_eq!(unknown.map(find), [None; 6]);
        let nearest = |path: &str| tree.nearest(path.as_bytes()).map(text).unwrap_or("-".into());
        let known = ["", "/c", "/a/b/d/e", "/a/b/c"].map(nearest);
        assert_eq!(known, ["-", "", "/a/b", "/a/b"]);
        let deep = find("/a/b/c").expect("known");
        let up: Vec<u64> = tree.up(deep).map(|(_, node)| node.id).collect();
        assert_eq!(up, [6, 5, 2, 0]);
        assert_eq!((tree.watched(6), tree.len()), (Some(deep), 8));
        tree.remove(deep);
        assert_eq!((tree.watched(6), tree.find(b"/a/b/c"), tree.len()), (None, None, 7));
        // the index is another's now
        let path: Path = (*b"/b/x").into();
        let at = tree.insert(path.clone(), tree.key(&path), Node::default());
        assert_eq!((at, tree.find(&path), tree.len()), (deep, Some(deep), 8));
        for at in tree.subtree(ROOT).into_iter().rev() {
            tree.remove(at);
        }
        assert!(tree.is_empty() && tree.names.is_empty());
    }

    /// FNV-1a has the same hash of these for every 256th beginning, however secret that is: what names
    /// differ in does not depend on its upper bits.
    #[test]
    fn nobody_knows_which_names_are_hashed_alike() {
        let alike = || {
            let mut tree = Tree::default();
            tree.insert((*b"").into(), None, Node::default());
            for path in [b"/BBoA3", b"/uq4u6"] {
                tree.insert((*path).into(), tree.key(path), Node::default());
            }
            tree.names.len() == 1
        };
        assert!((0..4096).filter(|_| alike()).count() < 2);
    }

    /// Names with the same hash are told apart, and go in any order.
    #[test]
    fn names_that_are_hashed_alike() {
        let mut random = Random::new(7);
        let mut tree = Tree::default();
        tree.insert((*b"").into(), None, Node::default());
        let names: Vec<Path> = (0..40).map(|i| format!("/{i}").into_bytes().into()).collect();
        let all: Vec<Index> = names
            .iter()
            .map(|path| tree.insert(path.clone(), tree.key(path), Node::default()))
            .collect();
        // all of them behind one
        tree.names = [((ROOT, 0), all[39])].into();
        for pair in all.windows(2) {
            tree.slot_mut(pair[1]).expect("known").same = pair[0];
        }
        let mut left: Vec<usize> = (0..40).collect();
        while !left.is_empty() {
            let gone = left.swap_remove(random.below(left.len()));
            let key = tree.key(&names[gone]).expect("its parent is known");
            let first = tree.names.remove(&(ROOT, 0)).expect("some are left");
            tree.names.insert(key, first);
            assert_eq!(tree.find(&names[gone]), Some(all[gone]));
            tree.remove(all[gone]);
            assert_eq!(tree.find(&names[gone]), None);
            let first = tree.names.remove(&key);
            tree.names.extend(first.map(|first| ((ROOT, 0), first)));
            assert_eq!(tree.children(ROOT).count(), left.len());
        }
        assert!(tree.names.is_empty());
    }
}
