//! Following the cgroup tree, by turns and piece by piece. For the daemon, which goes on with it, and
//! for commands, which look once. A new cgroup goes one way:
//!
//! 1. [`Cgroups::drain`] reads an event. It waits for its turn, which its owner pays for.
//! 2. The core says where that is, and the watcher looks there.
//! 3. The core takes what was seen, and decides: an element changes, and more is to be looked at.
//! 4. The daemon commits what has changed: down to the kernel.
//! 5. [`Cgroups::work`] looks at the rest, with turns of its own, from 2 on: it watches what was found,
//!    so that its children are known, and so on.
//!
//! It sends nothing to the kernel: what the sets should hold is the core's to say.

use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::backlog::Backlog;
use super::blind;
use super::core::{Core, Delta};
use super::dying::Dying;
use super::event::{Action, Event, Look, Note, Seen};
use super::mount::{self, Root};
use super::tree::{self, Path};
use super::watch::{self, Watcher};
use crate::config::{Config, Outcome, Target};
use crate::error::{reason, Result};
use crate::log;
use crate::log::Escaped;

/// Events that are handled before what they mean is committed, and cgroups that are watched and
/// listed before that.
const TURN: usize = 32;
const AT_ONCE: usize = 256;

/// How long either is done before anything else has its turn: another user's new cgroup waits for
/// some of these at most.
pub const TURN_TIME: Duration = Duration::from_millis(1);

/// Buffers of events that are read at a time, so that nobody's events wait unread behind another's.
const BUFFERS: usize = 16;

/// Events that may wait; the kernel keeps as many more.
const MOST: usize = 16_384;

/// How soon after a cgroup was removed the first look whether it is dead, and at the longest how long
/// between two; mostly the kernel is done with it within some 20 ms.
const DYING: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(150));

/// How long what is to go waits for more: the loop stands still for some 10 ms then, while packets
/// pass, so that nobody may have that done again and again.
const PASSING: Duration = Duration::from_millis(50);

/// How often rules are let go that nothing needed all that time.
const TIDY: Duration = Duration::from_secs(60);

/// A directory tree under watch, and what is known of it.
pub struct Cgroups {
    pub root: Root,
    pub watcher: Watcher,
    /// Read, and not handled yet.
    events: Backlog<Event>,
    pub core: Core,
    /// What the core wants to have looked at.
    looks: Backlog<Look>,
    /// When to look at what cannot be watched.
    look_again: Option<Instant>,
    /// The root may be gone, or another one.
    pub in_doubt: bool,
    /// The root is gone, and that has been told.
    pub lost: bool,
    /// When to look at removed cgroups that sockets may hold.
    dying: Option<Instant>,
    /// How long after that to look again.
    dying_pause: Duration,
    /// The last look at all sockets for that, or when there was nothing to look for.
    sockets_seen: Instant,
    /// That there are too many of them has been told.
    crowded: bool,
    /// When to let go of rules that nothing needs any more.
    tidy: Option<Instant>,
    /// When to wait for packets that are on their way, and to delete what they were to find till then.
    pub passing: Option<Instant>,
    /// Memory for what the core asks.
    actions: Vec<Action>,
    /// A cgroup has come that a tproxy or a route has.
    pub proxied: bool,
    /// Cgroups that have come and that a rule decides for, and whether some are gone: for whoever
    /// looks for containers.
    pub ruled: Vec<Path>,
    pub removed: bool,
}

/// What the kernel has told of its levels.
#[derive(Default)]
pub struct Levels {
    /// Level of the root of our cgroup namespace.
    pub namespace: usize,
    /// The deepest one that it takes, where some were refused.
    pub deepest: Option<usize>,
}

impl Cgroups {
    /// Looks at everything and follows it from then on, work by work: [`Cgroups::begin`] is due once none
    /// is left.
    ///
    /// Errors: there is no such cgroup root, or no inotify.
    pub fn follow(config: Rc<Config>, levels: &Levels) -> Result<Cgroups> {
        let root = mount::find(config.cgroup_root.as_deref())?;
        let mut watcher = Watcher::new(&root.dir)?;
        watcher.guard(&root.mount, false);
        Ok(Cgroups::new(config, root, watcher, levels))
    }

    /// Every cgroup there is now; none is watched, and nothing is told of them.
    pub fn look(config: Rc<Config>) -> Result<Cgroups> {
        let root = mount::find(config.cgroup_root.as_deref())?;
        let watcher = Watcher::look_only(&root.dir);
        let mut cgroups = Cgroups::new(config, root, watcher, &Levels::default());
        while cgroups.work() > 0 {}
        Ok(cgroups)
    }

    fn new(config: Rc<Config>, root: Root, watcher: Watcher, levels: &Levels) -> Cgroups {
        let level = root.level + levels.namespace;
        let mut core = Core::new(config, root.dir.as_os_str().as_bytes(), level);
        if let Some(level) = levels.deepest {
            core.set_deepest(level);
        }
        Cgroups {
            root,
            watcher,
            events: Backlog::default(),
            core,
            looks: Backlog::default(),
            look_again: None,
            in_doubt: false,
            lost: false,
            dying: None,
            dying_pause: DYING.0,
            sockets_seen: Instant::now(),
            crowded: false,
            tidy: None,
            passing: None,
            actions: Vec::new(),
            proxied: false,
            ruled: Vec::new(),
            removed: false,
        }
    }

    /// Everything has been looked at. Errors: there was nothing.
    pub fn begin(&mut self) -> Result<()> {
        self.watcher.tell_late();
        match self.core.tree().is_empty() {
            false => Ok(()),
            true => Err(watch::unreadable(&self.root.dir)),
        }
    }

    /// When something is to be done without an event.
    pub fn due(&self) -> Option<Instant> {
        [self.look_again, self.dying, self.tidy, self.passing].into_iter().flatten().min()
    }

    /// Whether events wait that have been read.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Whether any work waits.
    pub fn is_busy(&self) -> bool {
        !self.events.is_empty() || self.core.has_looks() || !self.looks.is_empty()
    }

    /// Does some of the work that waits, which may make more of it; returns how much.
    pub fn work(&mut self) -> usize {
        self.queue_looks();
        self.take_turns(AT_ONCE, |cgroups| &mut cgroups.looks, |_, look| Some(look))
    }

    /// Takes so much of a backlog at the most, for as long as a turn lasts; returns how much.
    fn take_turns<T>(
        &mut self,
        most: usize,
        backlog: fn(&mut Cgroups) -> &mut Backlog<T>,
        locate: fn(&mut Core, T) -> Option<Look>,
    ) -> usize {
        let mut start = Instant::now();
        let until = start + TURN_TIME;
        for done in 0..most {
            if start >= until {
                return done;
            }
            let Some((account, work)) = backlog(self).pop() else {
                return done;
            };
            if let Some(look) = locate(&mut self.core, work) {
                let seen = self.watcher.look(&look);
                self.step(seen);
            }
            if backlog(self).is_empty() {
                // nobody has anything to pay for
                return done + 1;
            }
            let end = Instant::now();
            backlog(self).charge(account, (end - start).as_nanos() as u64);
            start = end;
        }
        most
    }

    /// Gives what the core wants to have looked at its place among the turns.
    fn queue_looks(&mut self) {
        while let Some(look) = self.core.take_look() {
            let path = match &look {
                Look::Scan(scan) => &scan.path,
                Look::Watch(found) => {
                    self.note(&found.path);
                    &found.path
                }
            };
            let tree = self.core.tree();
            let dir = tree.above(path).and_then(|at| tree.node(at));
            let (account, wd) = dir.map_or((0, None), |dir| (dir.account, dir.wd));
            self.looks.push(account, wd.unwrap_or(-1), look);
        }
    }

    /// Notes what has come there, for whoever looks for that.
    fn note(&mut self, path: &Path) {
        if self.core.config().containers && self.core.ruled(path).is_some() {
            self.ruled.push(path.clone());
        }
        let target = self.core.outcome(path).map(|outcome| outcome.target);
        self.proxied |= matches!(target, Some(Target::Tproxy(_) | Target::Route(_)));
    }

    /// Hands what was seen to the core, and does what follows from it at once.
    fn step(&mut self, seen: Seen) {
        // mapped and unmapped each time otherwise
        let mut actions = std::mem::take(&mut self.actions);
        self.core.step(seen, &mut actions);
        for action in actions.drain(..) {
            match action {
                Action::Unwatch(wd) => {
                    self.removed = true;
                    self.watcher.unwatch(wd)
                }
                Action::LookAgain(pause) => {
                    self.look_again = pause.map(|pause| Instant::now() + pause)
                }
                // who only looks has another question
                Action::Tell(note) if self.watcher.is_following() => self.tell(note),
                Action::Tell(_) => {}
            }
        }
        if actions.capacity() <= AT_ONCE {
            self.actions = actions;
        }
        if self.tidy.is_none() && self.core.has_idle() {
            self.tidy = Some(Instant::now() + TIDY);
        }
    }

    fn tell(&mut self, note: Note) {
        match note {
            Note::Crowded if std::mem::replace(&mut self.crowded, true) => {}
            Note::Crowded => log!(
                limited::Notice,
                "too many removed cgroups are held, maybe by sockets: what the oldest of these \
                 send goes the way of the cgroup above them"
            ),
            Note::Classified { path, outcome } => {
                if outcome.is_none() {
                    self.await_death();
                }
                let config = self.core.config();
                let name = outcome.map_or("gone", |outcome| config.target_name(outcome.target));
                log!(limited::Info, "{}: {name}", Escaped(&path));
            }
            Note::Blind { path, errno } => {
                let remedy = match errno {
                    Errno::ENOSPC => "; raise the sysctl fs.inotify.max_user_watches",
                    Errno::EACCES => "; grant CAP_DAC_READ_SEARCH",
                    Errno::EMFILE => "; raise the limit of open files (ulimit -n)",
                    _ => "",
                };
                let (path, why) = (tree::display(&path), reason(errno));
                let every = blind::USUAL.as_secs();
                log!(
                    limited::Warning,
                    "unable to watch cgroup {path} (there may be more): {why}, looking every \
                     {every} s{remedy}"
                );
            }
            Note::Sighted => log!(limited::Notice, "every cgroup is watched again"),
        }
    }

    /// Whether to look again at what could not be watched is due; the next time is set.
    pub fn is_look_due(&mut self, now: Instant) -> bool {
        let due = self.look_again.is_some_and(|at| at <= now);
        if due {
            self.look_again = Some(now + blind::USUAL);
        }
        due
    }

    /// The root is gone, and all below it. False where that was known.
    pub fn lose(&mut self) -> bool {
        self.watcher.guard(&self.root.mount, true);
        let news = !std::mem::replace(&mut self.lost, true);
        if news {
            self.step(Seen::Gone { path: Path::default() });
        }
        news
    }

    /// The net difference since the last commit, but for what is to go later.
    pub fn take_delta(&mut self) -> Box<Delta> {
        let mut delta = self.core.take_delta();
        if self.core.keep_deletions(&mut delta) {
            self.passing.get_or_insert_with(|| Instant::now() + PASSING);
        }
        delta
    }

    /// Lets go of rules that nothing needs any more, where that is due.
    pub fn tidy(&mut self, now: Instant) {
        if self.tidy.take_if(|at| *at <= now).is_some() {
            self.core.tidy();
            self.tidy = self.core.has_idle().then(|| now + TIDY);
        }
    }

    /// Looks which of the removed cgroups are dead, where that is due; true where [`Core::kept`] wants to
    /// know of all cgroups that sockets hold.
    pub fn look_at_dying(&mut self, now: Instant) -> bool {
        if self.dying.is_none_or(|at| at > now) {
            return false;
        }
        for path in self.core.above_dying() {
            if self.watcher.count_dying(&path) == Some(0) {
                self.core.none_dying(&path);
            }
        }
        let some = self.core.dying().next().is_some();
        let asks = some && now.saturating_duration_since(self.sockets_seen) >= DYING.1;
        if asks {
            self.sockets_seen = now;
        }
        let pause = self.dying_pause;
        self.dying_pause = (pause * 2).min(DYING.1);
        self.dying = some.then(|| now + pause);
        asks
    }

    /// Keeps what another root's cgroups have left: removed ones are known by their level, whatever
    /// the root is.
    pub fn adopt_dying(&mut self, other: &Cgroups) {
        if !other.core.keeps_dying() {
            return;
        }
        let (old, new) = (other.core.config(), self.core.config().clone());
        let known = |dying: &Dying| {
            let Outcome { target, class } = dying.outcome;
            let outcome = new.outcome_named(old.target_name(target), class)?;
            Some(Dying::known_by(dying.hash, dying.level, outcome))
        };
        self.core.keep_dying(other.core.dying().filter_map(known));
        self.await_death();
    }

    /// A cgroup has been removed, and may be held.
    pub fn await_death(&mut self) {
        let Some(dying) = self.core.dying().next().map(|_| self.dying) else {
            return;
        };
        let now = Instant::now();
        let soon = now + DYING.0;
        if dying.is_none() {
            self.sockets_seen = now;
        }
        self.dying = Some(dying.map_or(soon, |at| at.min(soon)));
        self.dying_pause = DYING.0;
    }

    /// Takes what inotify has, and handles some of what waits; returns how much.
    pub fn drain(&mut self) -> Result<usize> {
        for _ in 0..BUFFERS {
            if self.events.len() >= MOST {
                break;
            }
            let more = self.watcher.read()?;
            for event in self.watcher.events().filter_map(watch::event) {
                let dir = event.wd();
                if event == Event::Overflow {
                    log!(Notice, "cgroup events were lost, looking at everything");
                    // and with it at what waits
                    self.events = Backlog::default();
                }
                if self.watcher.above().contains(&dir) || event == Event::Overflow {
                    self.in_doubt = true;
                }
                self.events.push(self.core.account(dir), dir, event);
            }
            if !more {
                break;
            }
        }
        Ok(self.take_turns(TURN, |cgroups| &mut cgroups.events, Core::locate))
    }
}
