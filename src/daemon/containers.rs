//! The search for containers: hands what the kernel tells of interfaces and of processes to
//! [`Containers`], and what follows from that to the kernel.

use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::time::ClockId;

use super::Daemon;
use crate::cgroup::tree::Path;
use crate::cgroup::vacant::Vacant;
use crate::config::{Config, Target};
use crate::containers::{Containers, UNCOVERED};
use crate::error::Error;
use crate::log;
use crate::nft::table::Entrances;
use crate::plan;

/// How long is looked before anything else has its turn, and before we are ready.
const SLICE: Duration = Duration::from_millis(1);
const FIRST_SLICE: Duration = Duration::from_millis(200);

/// How many cgroups that come are looked at within a look that goes on.
const MOST_ADDED: usize = 64;

/// Between two looks, this many times what the first has cost of the processor.
const REST: u32 = 8;

/// Processor time that this thread has used. To wait for it costs nobody else, and must not keep
/// a container, or a flow, waiting where the processor is wanted by many.
pub(super) fn used() -> Duration {
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().map_or(Duration::ZERO, Duration::from)
}

pub struct Search {
    pub containers: Containers,
    /// What the kernel has.
    pub entered: Entrances,
    /// Tells of processes that join cgroups which held none.
    pub vacant: Vacant,
    began: Instant,
    /// Cgroups of the look that goes on, the next one last, since when, and what it has cost.
    asked: Vec<Path>,
    since: u64,
    /// How many of them came since it began.
    added: usize,
    spent: Duration,
    due: Option<Instant>,
    /// Not before then.
    rest: Instant,
    /// What stands in the way has been told.
    told: bool,
    /// The kernel cannot know them by where they come in.
    impossible: bool,
}

impl Default for Search {
    fn default() -> Search {
        let now = Instant::now();
        Search {
            containers: Containers::default(),
            entered: Entrances::default(),
            vacant: Vacant::default(),
            began: now,
            asked: Vec::new(),
            since: 0,
            added: 0,
            spent: Duration::ZERO,
            due: None,
            rest: now,
            told: false,
            impossible: false,
        }
    }
}

impl Search {
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    fn clock(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// There may be something to find: begins to look, whether it was looking or not.
    fn want(&mut self) {
        self.asked.clear();
        let next = self.containers.next_look().map(Duration::from_millis);
        self.due = next.map(|next| self.rest.max(self.began + next));
    }

    /// The end of a look.
    fn done(&mut self) {
        self.rest = Instant::now() + std::mem::take(&mut self.spent) * REST;
        self.containers.looked(self.since, self.clock());
        self.want();
    }
}

impl Daemon<'_> {
    /// Looks for containers before the table is replaced, and gives the policy sections for them
    /// where there are any. Returns the policy.
    pub(super) fn admit(&mut self) -> Rc<Config> {
        let config = self.cgroups.core.config().clone();
        let wanted = config.containers && !config.rules.is_empty();
        // all that there are will be looked at
        self.cgroups.ruled.clear();
        if self.kernel.follow_peers(wanted) {
            self.list_entrances();
        }
        if !wanted {
            self.containers.containers = Containers::default();
            self.containers.vacant = Vacant::default();
        }
        let clock = self.containers.clock();
        self.containers.containers.look_again(clock);
        self.containers.want();
        self.look_for_containers(FIRST_SLICE);
        self.open_sections();
        self.cgroups.core.config().clone()
    }

    /// Gives the policy sections for containers, where there are any and it has none. The table has
    /// to be replaced where that returns true.
    fn open_sections(&mut self) -> bool {
        let config = self.cgroups.core.config().clone();
        if config.has_containers() || self.entrances().veths.is_empty() {
            return false;
        }
        match config.with_containers() {
            Some(config) => {
                self.cgroups.core.revise(Rc::new(config));
                true
            }
            None => {
                if !std::mem::replace(&mut self.containers.told, true) {
                    log!(Warning, "{UNCOVERED}");
                }
                false
            }
        }
    }

    /// What there is to hear, to look at and to do about containers.
    pub(super) fn attend_to_containers(&mut self, notified: bool, joined: bool) {
        let incomplete = self.containers.containers.is_incomplete();
        let mut news = (notified || incomplete) && self.hear_of_links();
        let clock = self.containers.clock();
        news |= self.miss_removed();
        let removed = std::mem::take(&mut self.cgroups.removed);
        if joined {
            let changed = self.containers.vacant.changed();
            self.cgroups.ruled.extend(changed.into_iter().map(|(path, _)| path));
        }
        let begins_anew = news || self.containers.asked.is_empty();
        for path in self.cgroups.ruled.drain(..) {
            if self.containers.containers.appeared(path.clone(), clock) {
                news = true;
                // next, where a look goes on; which has to come to an end, however many come
                if self.containers.added < MOST_ADDED {
                    self.containers.added += 1;
                    self.containers.asked.push(path);
                }
            }
        }
        if news && begins_anew {
            self.containers.want();
        }
        if self.containers.due.is_some_and(|at| at <= Instant::now()) {
            self.look_for_containers(SLICE);
            news = true;
        }
        if news {
            self.enter();
        }
        if (news || removed) && self.containers.due.is_none() {
            self.watch_vacant();
        }
    }

    /// Whoever has lost his cgroup is looked for, and keeps his way meanwhile. To be known before that way
    /// is asked for. Whether there is anybody.
    fn miss_removed(&mut self) -> bool {
        let tree = self.cgroups.core.tree();
        let id = |path: &Path| tree.get(path).map(|node| node.id);
        let search = &mut self.containers;
        let missed = self.cgroups.removed && search.containers.check(id, search.clock());
        if missed {
            search.want();
        }
        missed
    }

    /// Nothing is looked for any more: has the kernel tell if a process joins a cgroup that holds none.
    fn watch_vacant(&mut self) {
        let Daemon { cgroups, containers: search, .. } = self;
        let wanted = search.containers.vacant();
        let clock = search.clock();
        let mut joined = false;
        for (path, _) in search.vacant.watch(wanted, &cgroups.watcher) {
            // before it was watched
            if !cgroups.watcher.processes(&path).is_empty() {
                joined |= search.containers.appeared(path, clock);
            }
        }
        if joined {
            search.want();
        }
    }

    /// Takes what has become of interfaces; false where nothing has.
    fn hear_of_links(&mut self) -> bool {
        let clock = self.containers.clock();
        let Some(changes) = self.kernel.peer_changes() else {
            self.list_entrances();
            return true;
        };
        let mut news = !changes.is_empty();
        for change in changes {
            self.containers.containers.change(change, clock);
        }
        if self.containers.containers.is_incomplete() {
            if let Some(links) = self.kernel.interfaces() {
                self.containers.containers.complete(links, clock);
                news = true;
            }
        }
        news
    }

    /// Looks at some of the cgroups that are in question.
    fn look_for_containers(&mut self, slice: Duration) {
        if self.containers.due.is_none() {
            return;
        }
        let (began, before) = (Instant::now(), used());
        let core = &self.cgroups.core;
        let search = &mut self.containers;
        if search.asked.is_empty() {
            let ruled = || core.tree().iter().filter(|(_, node)| core.is_ruled(node));
            search.since = search.clock();
            let ruled = || ruled().map(|(path, _)| path);
            search.asked = search.containers.in_question(search.since, ruled);
            search.asked.reverse();
            search.added = 0;
        }
        while let Some(path) = search.asked.pop() {
            // gone, or of another policy by now
            let Some(node) = core.tree().get(&path).filter(|node| core.is_ruled(node)) else {
                continue;
            };
            let processes = self.cgroups.watcher.processes(&path);
            search.containers.lived_in(&path, node, !processes.is_empty());
            let (nets, all) = self.kernel.namespaces_of(&processes);
            // who has ended has not moved on
            if all && !processes.is_empty() && search.containers.has_moved(&path, &nets) {
                search.containers.moved(&path, &nets, search.clock());
            }
            if !search.containers.seen(&path, node.id, &nets) {
                search.asked.retain(|path| search.containers.is_young(path));
            }
            if began.elapsed() >= slice {
                break;
            }
        }
        search.spent += used().saturating_sub(before);
        match search.asked.is_empty() {
            false => search.due = Some(Instant::now()),
            true => search.done(),
        }
    }

    /// Where containers come in, as far as is known.
    pub(super) fn entrances(&mut self) -> Entrances {
        if self.containers.impossible {
            return Entrances::default();
        }
        self.miss_removed();
        let core = &self.cgroups.core;
        self.containers.containers.entrances(|path| core.ruled(path), Some).clone()
    }

    /// The same, of all interfaces that there are now. What is known stays so where the kernel does
    /// not tell, and it is asked again.
    pub(super) fn list_entrances(&mut self) -> Entrances {
        let clock = self.containers.clock();
        match self.kernel.interfaces() {
            Some(links) => self.containers.containers.replace(links, clock),
            None => self.containers.containers.doubt(),
        }
        self.containers.want();
        self.entrances()
    }

    /// The kernel refused what it knows them by. Where that is a veth that has gone meanwhile, it is
    /// tried again.
    pub(super) fn give_up_containers(&mut self, error: &Error) {
        if error.errno() != Some(Errno::EOPNOTSUPP) {
            log!(limited::Notice, "{error}; trying again");
            return self.table.want(Instant::now());
        }
        self.containers.impossible = true;
        let needs = "that needs an ingress hook (Linux 5.10, CONFIG_NETFILTER_INGRESS)";
        log!(Warning, "{error}; rules do not cover containers: {needs}");
    }

    /// Targets have other numbers now.
    pub(super) fn rename_entrances(&mut self, old: &Config) {
        self.miss_removed();
        let core = &self.cgroups.core;
        let same = |target| core.config().named(old.target_name(target));
        self.containers.containers.entrances(|path| core.ruled(path), same);
    }

    /// Has the kernel know containers by where they come in.
    fn enter(&mut self) {
        // what is pending will be in the replacement
        if self.table_is_out() {
            return;
        }
        let wanted = self.entrances();
        if wanted == self.containers.entered {
            return;
        }
        let opened = self.open_sections();
        let config = self.cgroups.core.config().clone();
        if opened {
            match self.add_routing(&config).and_then(|()| self.replace()) {
                Ok(()) => {
                    self.forget_routes();
                    self.begin_redirecting();
                    log!(Notice, "there are containers that rules cover");
                }
                Err(error) => {
                    log!(Warning, "{error}; replacing the table");
                    self.ways.repair.want(Instant::now());
                    self.repair_table();
                }
            }
            return;
        }
        if !config.has_containers() {
            return;
        }
        let entered = &self.containers.entered;
        for (index, (name, target)) in &wanted.veths {
            if entered.veths.get(index).map(|(_, target)| target) != Some(target) {
                let target = config.target_name(*target);
                log!(limited::Info, "container behind {name}: {target}");
            }
        }
        let change = plan::enter(&config, entered, &wanted, self.kernel.batch());
        let done = match change.is_empty() {
            true => Ok(()),
            false => self.kernel.commit(change),
        };
        match done {
            Ok(()) => {
                // what they sent until now went another way
                let by_route = wanted.veths.iter().any(|(index, veth)| {
                    let ways = [Some(veth), entered.veths.get(index)].into_iter().flatten();
                    let mut routes = ways.filter(|(_, to)| matches!(to, Target::Route(_)));
                    entered.veths.get(index) != Some(veth) && routes.next().is_some()
                });
                self.containers.entered = wanted;
                if by_route {
                    self.begin_redirecting();
                }
            }
            Err(error) => {
                log!(Debug, "{error}; replacing the table");
                self.list_entrances();
                self.repair_table();
            }
        }
    }
}
