//! The model of the cgroup tree: every directory that is known, by path and by watch descriptor.
//! Pure; it is told what there is and never looks.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Has a name that gives it a target, and was made by somebody who may not choose one.
    pub foreign: bool,
    pub hold: Hold,
}

/// All cgroups that are known. A node's parent is known too.
#[derive(Debug, Default)]
pub struct Tree {
    /// In this order a parent stands before its children.
    nodes: BTreeMap<Path, Node>,
    watches: HashMap<i32, Path>,
}

impl Tree {
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub fn get(&self, path: &[u8]) -> Option<&Node> {
        self.nodes.get(path)
    }

    pub fn get_mut(&mut self, path: &[u8]) -> Option<&mut Node> {
        self.nodes.get_mut(path)
    }

    /// The path that a watch descriptor stands for.
    pub fn watched(&self, wd: i32) -> Option<&Path> {
        self.watches.get(&wd)
    }

    pub fn insert(&mut self, path: Path, node: Node) {
        if let Some(wd) = node.wd {
            self.watches.insert(wd, path.clone());
        }
        self.nodes.insert(path, node);
    }

    /// Notes the watch of a node, or that there is none, and returns the one it had. `None` where
    /// the path is not known, or stands for a cgroup of another id.
    pub fn watch(&mut self, path: &Path, id: u64, wd: Option<i32>) -> Option<Option<i32>> {
        let node = self.nodes.get_mut(path).filter(|node| node.id == id)?;
        let before = std::mem::replace(&mut node.wd, wd);
        if before != wd {
            before.into_iter().for_each(|wd| self.forget(path, wd));
            self.watches.extend(wd.map(|wd| (wd, path.clone())));
        }
        Some(before)
    }

    /// Forgets a watch that is gone; its node stays.
    pub fn unwatch(&mut self, wd: i32) -> Option<Path> {
        let path = self.watches.remove(&wd)?;
        if let Some(node) = self.nodes.get_mut(&path) {
            node.wd = None;
        }
        Some(path)
    }

    /// Removes one node and its watch.
    pub fn remove(&mut self, path: &[u8]) -> Option<Node> {
        let node = self.nodes.remove(path)?;
        if let Some(wd) = node.wd {
            self.forget(path, wd);
        }
        Some(node)
    }

    /// The descriptor may stand for another directory by now.
    fn forget(&mut self, path: &[u8], wd: i32) {
        if self.watches.get(&wd).is_some_and(|p| **p == *path) {
            self.watches.remove(&wd);
        }
    }

    /// Every node, parents before their children.
    pub fn iter(&self) -> impl Iterator<Item = (&Path, &Node)> {
        self.nodes.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&Path, &mut Node)> {
        self.nodes.iter_mut()
    }

    /// The node that follows a path, which need not be known.
    pub fn after(&self, path: &[u8]) -> Option<(&Path, &Node)> {
        let from = (Bound::Excluded(path), Bound::Unbounded);
        self.nodes.range::<[u8], _>(from).next()
    }

    /// The nodes below `path`, without itself.
    pub fn below<'a>(&'a self, path: &[u8]) -> impl Iterator<Item = (&'a Path, &'a Node)> {
        // they stand together, but not next to `path`: '-' comes before '/'
        let first = [path, b"/"].concat();
        let from = (Bound::Included(&first[..]), Bound::Unbounded);
        let from = self.nodes.range::<[u8], _>(from);
        from.take_while(move |(below, _)| below.starts_with(&first))
    }
}

/// The parent of a path; `None` for the root.
pub fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|b| *b == b'/').map(|at| &path[..at])
}

/// The path of a child.
pub fn child(path: &[u8], name: &[u8]) -> Path {
    [path, b"/", name].concat().into()
}

/// How many levels below the cgroup root a path is.
pub fn depth(path: &[u8]) -> usize {
    path.iter().filter(|b| **b == b'/').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_is_the_subtree() {
        let mut tree = Tree::default();
        let paths = ["", "/a", "/a-b", "/a-b/c", "/a/b", "/a/b/c", "/a0", "/b"];
        for (i, path) in paths.iter().enumerate() {
            let node = Node {
                id: i as u64,
                wd: Some(i as i32),
                rank: 0,
                element: None,
                account: 0,
                foreign: false,
                hold: Hold::None,
            };
            tree.insert(path.as_bytes().into(), node);
        }
        let below = |p: &str| -> Vec<String> {
            let found = tree.below(p.as_bytes());
            found.map(|(p, _)| String::from_utf8_lossy(p).into_owned()).collect()
        };
        assert_eq!(below("/a"), ["/a/b", "/a/b/c"]);
        assert_eq!(below("/a-b"), ["/a-b/c"]);
        assert_eq!(below("/b"), [""; 0]);
        assert_eq!(below("").len(), paths.len() - 1);
        assert_eq!(parent(b"/a/b"), Some(&b"/a"[..]));
        assert_eq!(parent(b"/a"), Some(&b""[..]));
        assert_eq!(parent(b""), None);
        assert_eq!(depth(b"/a/b"), 2);
        assert_eq!(tree.watched(4).map(|p| &p[..]), Some(&b"/a/b"[..]));
        assert_eq!(tree.remove(b"/a/b").unwrap().id, 4);
        assert_eq!(tree.watched(4), None);
    }
}
