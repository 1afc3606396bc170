//! What goes into the core and what comes out of it.
//!
//! An [`Event`] never says what is there, only where to look: a name in IN_CREATE may be gone again or
//! stand for another cgroup by now. So lost, doubled and reordered events do no harm: what is [`Seen`]
//! decides.

use std::time::Duration;

use nix::errno::Errno;

use super::tree::Path;
use crate::config::Outcome;

/// What inotify tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A directory of this name was made or removed below a watched one.
    Changed { wd: i32, name: Box<[u8]> },
    /// The kernel ended a watch by itself.
    Unwatched { wd: i32 },
    /// Events were lost.
    Overflow,
}

impl Event {
    /// The watch that tells it; -1 where none does.
    pub fn wd(&self) -> i32 {
        match self {
            Event::Changed { wd, .. } | Event::Unwatched { wd } => *wd,
            Event::Overflow => -1,
        }
    }
}

/// A look at a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    Scan(Scan),
    /// Watch and list a cgroup that was found. Its element need not wait for that.
    Watch(Found),
}

/// What a look saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    Found(Found),
    Listed(Listed),
    /// There is nothing under that path.
    Gone {
        path: Path,
    },
    /// It could not be done.
    Failed {
        path: Path,
        errno: Errno,
    },
}

/// Something to do at once, of which nothing comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// End a watch.
    Unwatch(i32),
    /// Look again after that time at what could not be watched or scanned; `None` where nothing is
    /// left to look at.
    LookAgain(Option<Duration>),
    /// Worth a line.
    Tell(Note),
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

/// The look which cgroup there is under a path.
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

/// A cgroup that was found has been watched, or why not, and listed; without a list those of its
/// children that are known stay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub path: Path,
    pub id: u64,
    pub wd: Option<i32>,
    pub refused: Option<Errno>,
    pub list: Option<List>,
}

/// What listing a cgroup found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    pub owner: u32,
    /// It may have been in use for some time when it was found.
    pub late: bool,
    pub children: Vec<Box<[u8]>>,
}
