//! Directories that cannot be watched or scanned: no event tells of what happens below them, so
//! they are looked at again and again. Pure: it says how soon, the clock is the follower's.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::time::Duration;

use nix::errno::Errno;

use super::event::{Action, Note};
use super::tree::Path;

/// How many are looked at again at a time: one user's must not keep us from others'.
const AT_ONCE: usize = 500;

/// How soon they are looked at again, and how soon where the last look helped and others remain.
pub const USUAL: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(50);

#[derive(Debug, Default)]
pub struct Blind {
    paths: BTreeSet<Path>,
    /// The last of them that was looked at again.
    retried: Option<Path>,
    /// One of them is watched now.
    helped: bool,
    /// That there are some has been told.
    told: bool,
    /// A look has been asked for.
    awaited: bool,
}

impl Blind {
    pub fn contains(&self, path: &Path) -> bool {
        self.paths.contains(path)
    }

    pub fn insert(&mut self, path: Path) {
        self.paths.insert(path);
    }

    /// The same, with the reason. Told of the first only: whatever the reason, it tends to befall many.
    pub fn refused(&mut self, path: &Path, errno: Errno, actions: &mut Vec<Action>) {
        if self.paths.insert(path.clone()) && !std::mem::replace(&mut self.told, true) {
            actions.push(Action::Tell(Note::Blind { path: path.clone(), errno }));
        }
    }

    /// It is gone.
    pub fn remove(&mut self, path: &Path) {
        self.paths.remove(path);
    }

    /// It is watched.
    pub fn sighted(&mut self, path: &Path) {
        self.helped |= self.paths.remove(path);
    }

    /// The cgroups whose turn it is.
    pub fn turn(&mut self) -> Vec<Path> {
        let after = self.retried.take();
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let turn = self.paths.range((from, Bound::Unbounded));
        let turn: Vec<Path> = turn.take(AT_ONCE).cloned().collect();
        // the end of them: the next time, from the first on
        self.retried = turn.last().filter(|_| turn.len() == AT_ONCE).cloned();
        turn
    }

    /// After any step: asks for a look where one is needed, soon where the last one helps, and for
    /// none any more where not.
    pub fn mind(&mut self, actions: &mut Vec<Action>) {
        let needed = !self.paths.is_empty();
        let helped = std::mem::take(&mut self.helped);
        if std::mem::replace(&mut self.awaited, needed) != needed {
            actions.push(Action::LookAgain(needed.then_some(USUAL)));
        } else if helped {
            actions.push(Action::LookAgain(Some(SHORT)));
        }
        if !needed && std::mem::take(&mut self.told) {
            actions.push(Action::Tell(Note::Sighted));
        }
    }
}
