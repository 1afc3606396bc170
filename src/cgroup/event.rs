//! What goes into the core and what comes out of it.
//!
//! An event never says what is there, only where to look: a name in IN_CREATE may be gone again or
//! stand for another cgroup by now. So lost, doubled and reordered events do no harm; the look
//! ([`Scan`]) decides.

use std::collections::BTreeSet;

use nix::errno::Errno;

use super::tree::Path;
use crate::config::Outcome;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A directory of this name was made or removed below a watched one.
    Changed { wd: i32, name: Box<[u8]> },
    /// The kernel ended a watch by itself.
    Unwatched { wd: i32 },
    /// Events were lost.
    Overflow,
    /// A scan found a cgroup.
    Found(Found),
    /// A cgroup that was found has been watched, or why not, and listed; without a list those of its
    /// children that are known stay.
    Listed { path: Path, id: u64, wd: Option<i32>, refused: Option<Errno>, list: Option<List> },
    /// A scan found nothing under that path.
    Gone { path: Path },
    /// A scan could not be done.
    Failed { path: Path, errno: Errno },
    /// Time to look again at what could not be watched or scanned, or at some of it.
    Retry,
    /// That has been done.
    Retried,
    /// Time to look whether what is dying is dead.
    LookAtDying,
    /// How many cgroups are dying below a living one; `None` where the kernel does not tell.
    Dying { path: Path, count: Option<u64> },
    /// All cgroups that sockets hold.
    Kept { ids: BTreeSet<u64> },
    /// Time to let go of rules that nothing has needed for a while.
    Tidy,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Scan(Scan),
    /// Watch and list a cgroup that was found. Its element need not wait for that.
    Watch(Found),
    /// End a watch.
    Unwatch(i32),
    /// Count what is dying below a cgroup.
    CountDying(Path),
    /// Look again after that time at what could not be watched or scanned, with [`Event::Retry`];
    /// `None` where nothing is left to look at.
    LookAgain(Option<Pause>),
    /// Worth a line.
    Tell(Note),
}

/// How soon to look again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// Every few seconds.
    Usual,
    /// The last look helped, and others remain.
    Short,
}

/// What an administrator may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// There are too many removed cgroups that sockets may hold, so the oldest is let go.
    Crowded,
    /// The cgroup got its own element, or lost it.
    Classified { path: Path, outcome: Option<Outcome> },
    /// The cgroup, the first of maybe more, cannot be watched or scanned.
    Blind { path: Path, errno: Errno },
    /// There are no such cgroups any more.
    Sighted,
}

/// A directory to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    pub path: Path,
    /// Look at its children even where it is known: events about them may have been lost.
    pub deep: bool,
}

/// A cgroup that a scan found under a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub path: Path,
    pub id: u64,
    /// See [`Scan`].
    pub deep: bool,
    /// See [`super::tree::Node::foreign`].
    pub foreign: bool,
    /// When that was, in nanoseconds since the epoch, where its list is to tell whether it was late.
    pub at: Option<u64>,
}

/// What listing a cgroup found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    pub owner: u32,
    /// It may have been in use for some time when it was found.
    pub late: bool,
    pub children: Vec<Box<[u8]>>,
}
