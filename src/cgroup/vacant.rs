//! Cgroups that hold no process: some of them are watched, so that a process that joins one long after
//! it was found is heard of. It decides nothing. An instance of its own, apart from that of the tree:
//! what is watched here is a file, and losing an event does no more than to have it looked at.
//! Source: cgroup-v2.rst (`cgroup.events`, which tells of changes by IN_MODIFY), inotify(7).

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::inotify::{AddWatchFlags, Inotify, WatchDescriptor};

use super::tree::Path;
use super::watch::{self, Watcher};
use crate::small::{SmallMap, SmallSet};

/// A cgroup by path and id: another one may have the path by now.
pub type Cgroup = (Path, u64);

#[derive(Default)]
pub struct Vacant {
    inotify: Option<Inotify>,
    watched: SmallMap<Cgroup, WatchDescriptor>,
}

impl Vacant {
    /// The descriptor to poll.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.inotify.as_ref().map(|inotify| inotify.as_fd())
    }

    /// Watches these and no others, as far as the kernel lets us. Returns those of which nothing is
    /// told that has happened until now.
    pub fn watch(&mut self, wanted: SmallSet<Cgroup>, watcher: &Watcher) -> Vec<Cgroup> {
        if wanted.is_empty() {
            *self = Vacant::default();
        } else if self.inotify.is_none() {
            self.inotify = watch::inotify().ok();
        }
        let Some(inotify) = &self.inotify else {
            return Vec::new();
        };
        self.watched.retain(|cgroup, wd| {
            let stays = wanted.contains(cgroup);
            if !stays {
                // the kernel ends it by itself where the file is gone
                let _ = inotify.rm_watch(*wd);
            }
            stays
        });
        let mut new = Vec::new();
        for cgroup in wanted {
            if self.watched.contains_key(&cgroup) {
                continue;
            }
            let Some(file) = watcher.file(&cgroup.0, b"/cgroup.events") else {
                continue;
            };
            if let Ok(wd) = inotify.add_watch(&*file, AddWatchFlags::IN_MODIFY) {
                self.watched.insert(cgroup.clone(), wd);
                new.push(cgroup);
            }
        }
        new
    }

    /// Those that processes have joined or left since the last call, all where that is not known.
    pub fn changed(&mut self) -> Vec<Cgroup> {
        let mut told = Vec::new();
        let events = self.inotify.iter().flat_map(|inotify| inotify.read_events());
        told.extend(events.flatten());
        let lost = told.iter().any(|event| event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW));
        let is_told = |wd: &WatchDescriptor| lost || told.iter().any(|event| event.wd == *wd);
        let changed = self.watched.iter().filter(|(_, wd)| is_told(wd));
        changed.map(|(cgroup, _)| cgroup.clone()).collect()
    }
}
