//! The pure core against a model of the cgroup file system, inotify and the kernel's sets: random
//! orders of everything that can happen, a million steps, with a seeded generator.
//!
//! The model's file system changes at any moment, also in the middle of a scan. Events are queued
//! as inotify queues them, merged, and lost by overflow. Whenever all is quiet, the sets must be
//! exactly what the manual's definition of a verdict says, the rules must send a socket of any owner
//! there, and every watch must be on a live
//! directory.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path as FilePath;
use std::rc::Rc;
use std::time::Duration;

use cgtproxy::cgroup::backlog::Backlog;
use cgtproxy::cgroup::core::{Core, Delta};
use cgtproxy::cgroup::dying;
use cgtproxy::cgroup::event::{Action, Event, Found, List, Listed, Look, Scan, Seen};
use cgtproxy::cgroup::gates::{self, Gate};
use cgtproxy::cgroup::holds::HoldElement;
use cgtproxy::cgroup::tally::Change;
use cgtproxy::cgroup::tree::{child, parent};
use cgtproxy::config::{self, Config, Outcome, RuleLine, Source, Target};
use cgtproxy::nft::expr::Verdict;
use cgtproxy::nft::stmt::{cgroup_hash, Stmt};
use cgtproxy::nft::table::{self, classifying, Pair, Shape, Table, DEPTHS, OUTPUT};
use cgtproxy::small::SmallSet;
use nix::errno::Errno;
use nix::time::{clock_gettime, ClockId};

/// Level of the cgroup root, and its id.
const BASE: usize = 2;
const ROOT: u64 = 0;
/// When anything is found: nothing depends on it but whether it may be late.
const NOW: Option<u64> = Some(0);
/// Where it is.
const DIR: &[u8] = b"/sys/fs/cgroup/x";

/// How many levels below the cgroup root a path is.
fn depth(path: &[u8]) -> usize {
    path.iter().filter(|b| **b == b'/').count()
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// The cgroup file system with inotify on it.
#[derive(Default)]
struct Host {
    /// Live directories: path to id.
    dirs: BTreeMap<Vec<u8>, u64>,
    next_id: u64,
    /// Watch descriptor to the id that it watches; stays after rmdir, as the kernel has it.
    watches: BTreeMap<i32, u64>,
    next_wd: i32,
    max_watches: usize,
    queue: VecDeque<Event>,
    /// Removed directories that something still holds: id to path.
    held: BTreeMap<u64, Vec<u8>>,
    /// The ancestors of all that there has been, itself included: by id, their ids from the
    /// outermost on.
    lineages: BTreeMap<u64, Vec<u64>>,
    /// The core wants to look again after some time.
    look_again: bool,
    /// Nothing changes by itself, and nothing fails.
    calm: bool,
}

const NAMES: [&[u8]; 5] = [b"a", b"b", b"a-b", b"ab", b"\""];
const MAX_DEPTH: usize = 5;
const MAX_QUEUE: usize = 24;
/// Small, so that the same names meet often.
const MAX_DIRS: usize = 40;

impl Host {
    fn new() -> Host {
        let mut host = Host { next_id: 1, next_wd: 1, max_watches: usize::MAX, ..Host::default() };
        host.dirs.insert(Vec::new(), ROOT);
        host
    }

    fn tell(&mut self, path: &[u8]) {
        let dir = parent(path).expect("the root is never made or removed");
        let name: Box<[u8]> = path[dir.len() + 1..].into();
        let id = self.dirs[dir];
        let wds: Vec<i32> = (self.watches.iter())
            .filter(|(_, watched)| **watched == id)
            .map(|(wd, _)| *wd)
            .collect();
        for wd in wds {
            let name = name.clone();
            self.queue(Event::Changed { wd, name });
        }
    }

    fn queue(&mut self, event: Event) {
        if self.queue.back() == Some(&event) {
            return;
        }
        if self.queue.len() >= MAX_QUEUE {
            if self.queue.back() != Some(&Event::Overflow) {
                self.queue.push_back(Event::Overflow);
            }
            return;
        }
        self.queue.push_back(event);
    }

    /// mkdir or rmdir of something at random.
    fn change(&mut self, random: &mut Random) {
        let at = random.below(self.dirs.len());
        let path = self.dirs.keys().nth(at).expect("in range").clone();
        let leaf = !path.is_empty() && !self.dirs.keys().any(|p| parent(p) == Some(&path));
        if leaf && random.one_in(2) {
            let id = self.dirs.remove(&path).expect("it was there");
            if random.one_in(2) {
                self.held.insert(id, path.clone());
            }
            self.tell(&path);
            if random.one_in(3) {
                // the same name again, back to back
                self.make(path);
            }
        } else if depth(&path) < MAX_DEPTH && self.dirs.len() < MAX_DIRS {
            let name = NAMES[random.below(NAMES.len())];
            self.make(child(&path, name).to_vec());
        }
    }

    fn make(&mut self, path: Vec<u8>) {
        if !self.dirs.contains_key(&path) {
            let above = parent(&path).map(|above| self.dirs[above]);
            let mut lineage = above.and_then(|id| self.lineages.get(&id)).cloned();
            lineage.get_or_insert_default().push(self.next_id);
            self.lineages.insert(self.next_id, lineage.unwrap_or_default());
            self.dirs.insert(path.clone(), self.next_id);
            self.next_id += 1;
            self.tell(&path);
        }
    }

    /// Something may happen between any two calls.
    fn race(&mut self, random: &mut Random) {
        if !self.calm && random.one_in(12) {
            self.change(random);
        }
    }

    /// The kernel ends a watch by itself.
    fn end_watch(&mut self) {
        if let Some(wd) = self.watches.keys().next().copied() {
            self.watches.remove(&wd);
            self.queue(Event::Unwatched { wd });
        }
    }

    /// Every live directory has one watch, and nothing else has any.
    fn check_watches(&self, when: &str) {
        let live: BTreeSet<u64> = self.dirs.values().copied().collect();
        let watched: BTreeSet<u64> = self.watches.values().copied().collect();
        assert_eq!(watched, live, "{when}: watches");
        assert_eq!(watched.len(), self.watches.len(), "{when}: doubled watches");
    }

    fn none_dying(&self, path: &[u8]) -> bool {
        let is_below =
            |held: &Vec<u8>| held.strip_prefix(path).is_some_and(|r| r.starts_with(b"/"));
        self.dirs.contains_key(path) && !self.held.values().any(is_below)
    }

    /// The gates that a cgroup with this id is, or was, at or below.
    fn gates(&self, id: u64) -> Vec<Gate> {
        let lineage = &self.lineages[&id];
        let at = |(stage, depth): (usize, &usize)| {
            let id = *lineage.get(depth - 1)?;
            let path = self.dirs.iter().find(|(_, living)| **living == id);
            let shown = path.is_some_and(|(path, _)| dying::is_listable(path));
            Some(Gate::new(stage, id, !shown))
        };
        DEPTHS.iter().enumerate().filter_map(at).collect()
    }

    fn look(&mut self, look: &Look, random: &mut Random) -> Seen {
        match look {
            Look::Scan(scan) => self.scan(scan, random),
            Look::Watch(found) => self.watch(found, random),
        }
    }

    /// What a scan finds.
    fn scan(&mut self, scan: &Scan, random: &mut Random) -> Seen {
        let path = scan.path.clone();
        self.race(random);
        let Some(&id) = self.dirs.get(&path[..]) else {
            return Seen::Gone { path };
        };
        if !self.calm && random.one_in(200) {
            return Seen::Failed { path, errno: Errno::ENOMEM };
        }
        Seen::Found(Found { path, id, deep: scan.deep, foreign: false, at: NOW })
    }

    /// What watching and listing finds, with changes in between.
    fn watch(&mut self, found: &Found, random: &mut Random) -> Seen {
        let Found { path, id, .. } = found.clone();
        self.race(random);
        let Some(&watched) = self.dirs.get(&path[..]) else {
            return Seen::Gone { path };
        };
        let known = self.watches.iter().find(|(_, w)| **w == watched);
        let (wd, refused) = match known {
            Some((wd, _)) => (Some(*wd), None),
            None if self.watches.len() >= self.max_watches => (None, Some(Errno::ENOSPC)),
            None => {
                let wd = self.next_wd;
                self.next_wd += 1;
                self.watches.insert(wd, watched);
                (Some(wd), None)
            }
        };
        self.race(random);
        let children = (self.dirs.keys())
            .filter(|p| parent(p) == Some(&path))
            .map(|p| p[path.len() + 1..].into())
            .collect();
        self.race(random);
        let now = self.dirs.get(&path[..]).copied();
        if now != Some(id) {
            // as the watcher does: nobody would ever name that watch again
            if let Some(wd) = wd {
                self.watches.remove(&wd);
            }
            return match now {
                Some(id) => Seen::Found(Found { path, id, deep: true, foreign: false, at: NOW }),
                None => Seen::Gone { path },
            };
        }
        self.race(random);
        let late = found.at.is_some() && random.one_in(4);
        let list = List { owner: 0, late, children };
        let (refused, list) = match !self.calm && random.one_in(200) {
            true => (refused.or(Some(Errno::EMFILE)), None),
            false => (refused, Some(list)),
        };
        Seen::Listed(Listed { path, id, wd, refused, list })
    }
}

struct Text(&'static str);

impl Source for Text {
    fn read(&self, _: &FilePath) -> Result<String, String> {
        Ok(self.0.into())
    }
}

fn policies() -> Vec<Rc<Config>> {
    [
        "[global]\nhold = /a/b\nhold = /(.*/)?ab\n[tproxy p]\nport=1\n[rules]\np = /a\ndrop = /(a/b|.*\")\n\
         direct = /.*/ab",
        "[tproxy p]\nport=1\n[tproxy q]\nport=2\n[rules]\ndrop = /a/b\nq = /.*/a-b\np = /a\ndirect = /b/.*/a",
        "[global]\nhold = /a.*\ndefault = p\n[tproxy p]\nport=1\n[rules]\ndirect = /(a|ab|b/.*\")\ndrop = /.*/b/a\np = /a/a",
        "[global]\nhold = /\ndefault = drop\n[rules]\ndirect = /a(/b)*\n",
        "",
        "[tproxy p]\nport=1\n[rules]\np = /a/b\ndrop = user:5\np = /a\ndirect = group:7\n\
         drop = user:6\ndirect = /b\np = /b/.*\ndrop = user:8\n",
    ]
    .into_iter()
    .map(|text| Rc::new(config::load(&Text(text), FilePath::new("c")).expect("a good policy")))
    .collect()
}

/// The manual's definition of a verdict, of a socket with no line for its owner.
fn verdict(config: &Config, path: &[u8]) -> Outcome {
    let text = std::str::from_utf8(path).expect("names are ASCII");
    let ends = text.match_indices('/').map(|(at, _)| at).skip(1);
    let prefixes: Vec<&str> = ends.chain([text.len()]).map(|end| &text[..end]).collect();
    let covers = |rule: &config::PatternRule| {
        !path.is_empty() && prefixes.iter().any(|prefix| rule.regex.is_match(prefix))
    };
    let mut class = 0;
    for line in config.rule_lines() {
        match line {
            RuleLine::Owners(rule) => class = rule.class,
            RuleLine::Patterns(rules) if rules.iter().any(covers) => {
                return Outcome { target: line.target(), class }
            }
            RuleLine::Patterns(_) => {}
        }
    }
    Outcome { target: config.default, class }
}

/// What the kernel's sets hold, by cgroup id, and the pairs that `output` has rules for.
#[derive(Default, Debug, PartialEq)]
struct Kernel {
    sets: BTreeMap<u64, Outcome>,
    dying: BTreeSet<(Outcome, u32)>,
    gates: BTreeSet<Gate>,
    held: BTreeSet<HoldElement>,
    shape: Shape,
    /// Removed cgroups whose elements were deleted.
    owed: BTreeSet<u64>,
}

/// A kernel refuses to delete what is not there, and to add what is.
fn change_set<K: Ord + Copy>(set: &mut BTreeSet<K>, change: &Change<K>) {
    for element in &change.delete {
        assert!(set.remove(element), "deletes what is not there");
    }
    for element in &change.add {
        assert!(set.insert(*element), "adds what is there");
    }
}

impl Kernel {
    /// One transaction; a kernel refuses to delete what is not there, and to add what is.
    fn commit(&mut self, core: &mut Core, host: &Host, fail: bool) {
        let delta = core.take_delta();
        let before = self.sets.clone();
        match fail {
            true => self.replace(core),
            false => self.change(&delta),
        }
        core.reuse(delta);
        // which takes longer than all else
        if host.next_id % 8 == 0 {
            self.check_unknown(core, host);
        }
        let gone = before.keys().filter(|id| !self.sets.contains_key(id));
        self.owed.extend(gone.filter(|id| host.held.contains_key(id)));
    }

    fn change(&mut self, delta: &Delta) {
        for &(target, id) in &delta.cgroups.delete {
            let held = self.sets.remove(&id);
            assert_eq!(held, Some(target), "deletes what is not there");
        }
        for &(target, id) in &delta.cgroups.add {
            assert_eq!(self.sets.insert(id, target), None, "adds what is there");
        }
        change_set(&mut self.dying, &delta.dying);
        change_set(&mut self.gates, &delta.gates);
        change_set(&mut self.held, &delta.held);
        if let Some(all) = &delta.all_held {
            self.held = all.iter().copied().collect();
        }
        if let Some([before, after]) = delta.shape.as_deref() {
            assert_eq!(&self.shape, before);
            self.shape = after.clone();
        }
    }

    fn replace(&mut self, core: &mut Core) {
        let snapshot = core.snapshot();
        self.sets.clear();
        for (target, ids) in snapshot.elements {
            self.sets.extend(ids.into_iter().map(|id| (id, target)));
        }
        self.dying.clear();
        for (target, hashes) in snapshot.dying {
            self.dying.extend(hashes.into_iter().map(|hash| (target, hash)));
        }
        self.gates = snapshot.gates.into_iter().collect();
        self.held = snapshot.held.into_iter().collect();
        self.shape = snapshot.shape;
    }

    /// Whatever is below a held cgroup and has not been looked at is held, at any moment; and what has
    /// been, is not.
    fn check_unknown(&self, core: &Core, host: &Host) {
        let chains = hold_chains(core.config(), &self.shape);
        let looked_at: BTreeSet<u64> = core.tree().iter().map(|(_, node)| node.id).collect();
        for (path, id) in &host.dirs {
            let ids = &host.lineages.get(id).cloned().unwrap_or_default();
            let above = ids.iter().rev().skip(1).chain((!path.is_empty()).then_some(&ROOT));
            let below = { above }.any(|id| self.held.contains(&HoldElement::Root(*id)));
            let shown = dying::is_listable(path);
            let want = below && !(looked_at.contains(id) && shown);
            assert_eq!(is_held(&chains, self, ids), want, "{:?}", path.escape_ascii());
        }
    }

    /// All that the manual's definition has held is so.
    fn check_held(&self, config: &Config, host: &Host) {
        let holds = |path: &[u8]| {
            let text = std::str::from_utf8(path).expect("names are ASCII");
            let text = if text.is_empty() { "/" } else { text };
            dying::is_listable(path) && config.holds.iter().any(|line| line.regex.is_match(text))
        };
        let chains = hold_chains(config, &self.shape);
        for (path, id) in &host.dirs {
            let ends = (0..=path.len()).filter(|at| path.get(*at).is_none_or(|b| *b == b'/'));
            let held = { ends }.any(|end| holds(&path[..end]));
            let lineage = host.lineages.get(id).cloned().unwrap_or_default();
            let child = [&lineage[..], &[u64::MAX]].concat();
            assert_eq!(is_held(&chains, self, &child), held, "below {:?}", path.escape_ascii());
        }
    }

    /// What must hold for the living: those that nft cannot show are among the dying.
    fn wanted(config: &Config, host: &Host, base: usize) -> Kernel {
        let mut wanted = Kernel::default();
        for (path, id) in &host.dirs {
            let Some(above) = parent(path) else { continue };
            let outcome = verdict(config, path);
            if outcome != verdict(config, above) {
                let hashed = !dying::is_listable(path);
                match hashed {
                    true => wanted.dying.extend([(outcome, cgroup_hash(*id))]),
                    false => wanted.sets.extend([(*id, outcome)]),
                }
                let level = (base + depth(path)) as u8;
                wanted.shape.pairs.insert(Pair { level, outcome, hashed, loose: false });
                wanted.gates.extend(host.gates(*id));
            }
        }
        wanted
    }

    /// What is not below a gate meets no rule that decides: every element must be below one of
    /// each stage up to its own, as long as it is there.
    fn check_gates(&self, core: &Core, host: &Host, wanted: &Kernel) {
        let mut gates = wanted.gates.clone();
        for dying in core.dying() {
            let of = |id: &&u64| cgroup_hash(**id) == dying.hash;
            let id = host.lineages.keys().find(of).expect("an id that was given");
            gates.extend(host.gates(*id));
        }
        assert_eq!(self.gates, gates);
        let hashed = gates.iter().filter(|gate| matches!(gate.by, gates::KnownBy::Hash(_)));
        assert_eq!(self.shape.hashed, hashed.map(|gate| gate.stage).collect());
    }

    /// What was removed and is held has the target of its path, and nothing that lives is among it
    /// but what has to be.
    fn check_dying(&self, core: &Core, host: &Host, wanted: &Kernel) {
        let config = core.config();
        let owed = self.owed.iter().filter_map(|id| Some((id, host.held.get(id)?)));
        for (id, path) in owed {
            let element = (verdict(config, path), cgroup_hash(*id));
            assert!(self.dying.contains(&element), "{id} is not kept");
        }
        let live: BTreeSet<u32> = host.dirs.values().map(|id| cgroup_hash(*id)).collect();
        assert!(core.dying().all(|dying| !live.contains(&dying.hash)));
        let mut listed: BTreeSet<_> = core.dying().map(|d| (d.outcome, d.hash)).collect();
        listed.extend(&wanted.dying);
        assert_eq!(self.dying, listed);
        let mut pairs: SmallSet<Pair> = core.dying().map(|d| d.pair()).collect();
        pairs.extend(wanted.shape.pairs.iter().copied());
        // and some that nothing needs any more; not those of removed ones
        let idle: Vec<_> = self.shape.pairs.difference(&pairs).collect();
        assert!(idle.iter().all(|pair| !pair.hashed && core.has_idle()), "{idle:?}");
        assert!(pairs.is_subset(&self.shape.pairs));
        self.check_gates(core, host, wanted);
    }
}

/// Which of the sets of the table hold a cgroup.
impl Kernel {
    fn holds(&self, config: &Config, set: &str, id: u64) -> bool {
        let own = |gate: &&Gate| gate.by == gates::KnownBy::Id(id);
        let mut gates = self.gates.iter().filter(own);
        self.sets.get(&id).is_some_and(|outcome| table::set_name(config, *outcome) == set)
            || gates.any(|gate| table::gate_names(gate.stage)[0] == set)
    }

    fn holds_hash(&self, config: &Config, set: &str, id: u64) -> bool {
        let mut own = self.dying.iter().filter(|(_, hash)| *hash == cgroup_hash(id));
        let gone = |gate: &&Gate| gate.by == gates::KnownBy::Hash(cgroup_hash(id));
        let mut gates = self.gates.iter().filter(gone);
        own.any(|(outcome, _)| table::dying_name(config, *outcome) == set)
            || gates.any(|gate| table::gate_names(gate.stage)[1] == set)
    }
}

/// Where a packet of a socket ends up: the rules of the table, run as the kernel does, of a cgroup
/// whose ancestors have these ids, outermost first.
fn target_of(
    config: &Config,
    table: &Table,
    kernel: &Kernel,
    ids: &[u64],
    (uid, gid): (u32, u32),
    marked: bool,
) -> Target {
    let id = |level: &u8| ids.get(usize::from(*level).checked_sub(BASE + 1)?).copied();
    let test = |stmt: &Stmt| match stmt {
        Stmt::Cgroup { level, set } => id(level).is_some_and(|id| kernel.holds(config, set, id)),
        Stmt::CgroupHash { level, set } => {
            id(level).is_some_and(|id| kernel.holds_hash(config, set, id))
        }
        Stmt::Owner(owner) => owner.has(uid, Some(gid)) == Some(true),
        Stmt::HasOwner => true,
        // by nothing that there is a target for
        Stmt::CtMarked(_) => marked,
        // on its way out, of a flow that is not known
        _ => false,
    };
    let own = classifying(config, &kernel.shape);
    let rules = |name: &str| match own.iter().find(|(own, _)| own == name) {
        Some((_, rules)) => rules.clone().into_iter(),
        None => {
            let chain = table.chains.iter().find(|chain| chain.name == name).expect("a chain");
            chain.rules.clone().into_iter()
        }
    };
    // what may begin a flow goes the same way, once it has not been held
    if let Some((_, hold)) = own.iter().find(|(name, _)| name == table::HOLD) {
        let asked = hold_chains(config, &kernel.shape)[table::HOLD].len();
        assert!(rules(OUTPUT).as_slice().ends_with(&hold[asked..]));
    }
    let mut stack = vec![rules(OUTPUT)];
    while let Some(rest) = stack.last_mut() {
        let Some(rule) = rest.next() else {
            stack.pop();
            continue;
        };
        let (Some(Stmt::Verdict(verdict)), tests) = (rule.last(), &rule[..rule.len() - 1]) else {
            continue;
        };
        let (Verdict::Jump(name) | Verdict::Goto(name)) = verdict else { continue };
        if !tests.iter().all(test) {
            continue;
        }
        if let Some(target) = name.strip_prefix("to_") {
            return config.named(target).expect("a target");
        }
        if matches!(verdict, Verdict::Goto(_)) {
            stack.pop();
        }
        stack.push(rules(name));
    }
    config.default
}

/// The chains that hold, by name.
type HoldChains = BTreeMap<String, Vec<Vec<Stmt>>>;

fn hold_chains(config: &Config, shape: &Shape) -> HoldChains {
    table::hold_rules(config, shape.holding.as_ref()).into_iter().collect()
}

/// Whether the first packet of a socket is dropped, whose cgroup's ancestors have these ids.
fn is_held(chains: &HoldChains, kernel: &Kernel, ids: &[u64]) -> bool {
    let id = |level: &u8| match usize::from(*level).checked_sub(BASE)? {
        0 => Some(ROOT),
        below => ids.get(below - 1).copied(),
    };
    let looked = Cell::new(0);
    let holds = |set: &str, id: u64| match set {
        table::HELD => kernel.held.contains(&HoldElement::Root(id)),
        table::KNOWN => {
            // at its own level alone, whether it is there and whether it is not
            looked.set(looked.get() + 1);
            assert!(looked.get() <= 2, "{ids:?}");
            kernel.held.contains(&HoldElement::Known(id))
        }
        other => panic!("{other}"),
    };
    let Some(mut rules) = chains.get(table::HOLD).map(|rules| rules.iter()) else {
        return false;
    };
    while let Some(rule) = rules.next() {
        let test = |stmt: &Stmt| match stmt {
            Stmt::Cgroup { level, set } => id(level).is_some_and(|id| holds(set, id)),
            Stmt::OtherCgroup { level, set } => id(level).is_some_and(|id| !holds(set, id)),
            _ => false,
        };
        let (last, tests) = rule.split_last().expect("no empty rules");
        match last {
            _ if !tests.iter().all(test) => {}
            Stmt::Verdict(Verdict::Goto(chain)) if chain == table::UNKNOWN => return true,
            // no cgroup is below two held ones
            Stmt::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) => {
                rules = chains[&chain[..]].iter()
            }
            Stmt::Verdict(Verdict::Return) => return false,
            other => panic!("{other}"),
        }
    }
    false
}

/// The manual's definition for a socket: the first line that covers it.
fn covered(config: &Config, path: &[u8], uid: u32, gid: u32) -> Target {
    let Outcome { target, class } = verdict(config, path);
    let before = config.owner_rules.iter().take_while(|rule| rule.class <= class);
    let mut covering = before
        .filter(|rule| rule.owners.iter().any(|owner| owner.has(uid, Some(gid)) == Some(true)));
    covering.next().map_or(target, |rule| rule.target)
}

/// Looks, and carries the actions out; every one of them is a step.
fn look(core: &mut Core, host: &mut Host, look: &Look, random: &mut Random) -> u64 {
    let seen = host.look(look, random);
    let mut actions = Vec::new();
    core.step(seen, &mut actions);
    let steps = actions.len() as u64 + 1;
    for action in actions {
        match action {
            Action::Unwatch(wd) => {
                host.watches.remove(&wd);
            }
            Action::LookAgain(pause) => host.look_again = pause.is_some(),
            Action::Tell(_) => {}
        }
    }
    steps
}

/// Takes an event; what is to be looked at next waits for the end, or for a commit, and what happens
/// meanwhile is in the queue.
fn take(core: &mut Core, host: &mut Host, event: Event, random: &mut Random) -> u64 {
    core.locate(event).map_or(0, |there| look(core, host, &there, random))
}

/// Looks at what is to be looked at, in some order.
fn work(core: &mut Core, host: &mut Host, random: &mut Random) -> u64 {
    let mut looks: Vec<Look> = std::iter::from_fn(|| core.take_look()).collect();
    let mut steps = 0;
    while !looks.is_empty() {
        let next = looks.swap_remove(random.below(looks.len()));
        steps += look(core, host, &next, random);
    }
    steps
}

/// One wake-up: some of what is queued, then one commit, and one after each look that is left.
fn wake_up(core: &mut Core, host: &mut Host, kernel: &mut Kernel, random: &mut Random) -> u64 {
    let mut steps = 0;
    let mut backlog = Backlog::default();
    for _ in 0..random.below(8) {
        for event in host.queue.drain(..) {
            let dir = event.wd();
            if event == Event::Overflow {
                backlog = Backlog::default();
            }
            backlog.push(dir as u32 % 3, dir, event);
        }
        let Some((account, event)) = backlog.pop() else {
            break;
        };
        steps += take(core, host, event, random);
        backlog.charge(account, random.below(1000) as u64);
    }
    while let Some((_, event)) = backlog.pop() {
        host.queue.push_front(event);
    }
    kernel.commit(core, host, random.one_in(20));
    while core.has_looks() {
        steps += work(core, host, random);
        kernel.commit(core, host, random.one_in(20));
    }
    steps
}

/// Each cgroup's sockets, of owners at random, go where the manual's definition sends them. How many of
/// them went another way than a socket with no line for its owner.
fn check_sockets(config: &Config, host: &Host, kernel: &Kernel, random: &mut Random) -> usize {
    let table = Table::new(config);
    let mut owned = 0;
    for path in host.dirs.keys() {
        let ends = (1..=path.len()).filter(|at| path.get(*at).is_none_or(|b| *b == b'/'));
        let ids = ends.filter_map(|end| host.dirs.get(&path[..end])).copied();
        let ids: Vec<u64> = ids.collect();
        let (uid, gid) = (random.below(10) as u32, random.below(10) as u32);
        let want = covered(config, path, uid, gid);
        for marked in [false, true] {
            let found = target_of(config, &table, kernel, &ids, (uid, gid), marked);
            assert_eq!(found, want, "uid {uid} gid {gid} in {:?}", path.escape_ascii());
        }
        owned += usize::from(want != verdict(config, path).target);
    }
    owned
}

/// A quiet moment, at which the kernel must hold exactly what it is to hold; see [`check_sockets`].
fn check_quiet(
    core: &mut Core,
    host: &mut Host,
    kernel: &mut Kernel,
    random: &mut Random,
    when: &str,
) -> usize {
    settle(core, host, kernel, random);
    let config = core.config().clone();
    for (id, was) in core.take_late() {
        let mut all = core.tree().iter();
        let (path, _) = all.find(|(_, node)| node.id == id).expect("late and there");
        assert_ne!(core.outcome(path), Some(was));
        assert_eq!(host.dirs.get(&path[..]), Some(&id));
    }
    let wanted = Kernel::wanted(&config, host, BASE);
    kernel.check_dying(core, host, &wanted);
    assert_eq!(kernel.sets, wanted.sets, "{when}");
    kernel.check_held(&config, host);
    let owned = check_sockets(&config, host, kernel, random);

    // some of what is held is let go
    let all = random.one_in(4);
    host.held.retain(|_, _| !all && random.one_in(2));
    for path in core.above_dying() {
        if host.none_dying(&path) {
            core.none_dying(&path);
        }
    }
    kernel.commit(core, host, random.one_in(20));
    kernel.check_dying(core, host, &wanted);
    assert!(!all || core.dying().next().is_none(), "{when}: kept for ever");
    owned
}

/// So many steps from a seed; how many they were, the moments at which all was exact, watches included,
/// and the sockets that a line for their owner sent their way.
fn run(seed: u64, steps: u64, policies: &[Rc<Config>]) -> (u64, usize, usize) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut host = Host::new();
    for _ in 0..random.below(20) {
        host.change(&mut random);
    }
    let mut core = Core::new(policies[random.below(policies.len())].clone(), DIR, BASE);
    let mut kernel = Kernel::default();
    core.keep_dying([]);
    while work(&mut core, &mut host, &mut random) > 0 {}
    kernel.replace(&mut core);
    let (mut done, mut quiet, mut owned) = (0, 0, 0);
    while done < steps {
        done += 1;
        follow(&mut core, &mut kernel, &mut random);
        match random.below(100) {
            0..50 => host.change(&mut random),
            50..85 => done += wake_up(&mut core, &mut host, &mut kernel, &mut random),
            85..88 => host.queue(Event::Overflow),
            88..90 => host.end_watch(),
            90..92 => {
                core.draft(policies[random.below(policies.len())].clone());
                // or by and by, or another one instead
                if random.one_in(3) {
                    core.adopt();
                    kernel.replace(&mut core);
                }
            }
            92..94 => {
                host.max_watches = if random.one_in(2) { random.below(12) } else { usize::MAX }
            }
            94..95 => core.tidy(),
            95..97 => {
                core.retry();
                while core.has_looks() {
                    done += work(&mut core, &mut host, &mut random);
                }
            }
            _ => {
                let when = format!("seed {seed} at {done}");
                owned += check_quiet(&mut core, &mut host, &mut kernel, &mut random, &when);
                if !host.look_again {
                    host.check_watches(&when);
                    quiet += 1;
                }
            }
        }
    }
    (done, quiet, owned)
}

/// Some of the work on a policy that is to follow; once it is whole it is in force, or refused.
fn follow(core: &mut Core, kernel: &mut Kernel, random: &mut Random) {
    let drafted = core.drafted().cloned();
    let more = (0..random.below(4)).all(|_| core.work_out());
    let Some(drafted) = drafted.filter(|_| !more) else {
        return;
    };
    let old = core.config().clone();
    let before = core.adopt().expect("it was drafted");
    assert!(Rc::ptr_eq(core.config(), &drafted));
    if random.one_in(4) {
        core.put_back(before);
        assert!(Rc::ptr_eq(core.config(), &old));
    }
    kernel.replace(core);
}

/// No more changes: takes everything that is queued, and looks again at what was blind.
fn settle(core: &mut Core, host: &mut Host, kernel: &mut Kernel, random: &mut Random) {
    host.calm = true;
    for _ in 0..64 {
        while let Some(event) = host.queue.pop_front() {
            take(core, host, event, random);
        }
        while work(core, host, random) > 0 {}
        kernel.commit(core, host, false);
        if host.look_again {
            core.retry();
            while work(core, host, random) > 0 {}
        }
        if host.queue.is_empty() && (!host.look_again || host.max_watches != usize::MAX) {
            break;
        }
    }
    kernel.commit(core, host, false);
    host.calm = false;
}

/// Whatever happens in whatever order, each quiet moment finds all as it is to be.
#[test]
fn a_million_steps() {
    let policies = policies();
    let (mut steps, mut quiet, mut owned, mut seed) = (0, 0, 0, 1);
    while steps < 1_000_000 {
        let (done, settled, by_owner) = run(seed, 10_000, &policies);
        steps += done;
        quiet += settled;
        owned += by_owner;
        seed += 1;
    }
    println!("{steps} steps, {} seeds, exact at {quiet} quiet moments", seed - 1);
    assert!(quiet > 1000 && owned > 500, "{quiet} {owned}");
}

/// Between the end of a service and its next start the rules stay: the first packet after that must
/// not wait for them to be made anew. Not for ever.
#[test]
fn rules_stay_for_a_service_that_starts_again() {
    let policies = policies();
    let mut core = Core::new(policies[0].clone(), b"", 0);
    core.keep_dying([]);
    let after = |core: &mut Core| (core.take_delta().shape, core.has_idle());
    let step = |core: &mut Core, seen| {
        core.step(seen, &mut Vec::new());
        after(core)
    };
    let found = |path: &[u8], id| {
        Seen::Found(Found { path: path.into(), id, deep: true, foreign: false, at: NOW })
    };
    let gone = |path: &[u8]| Seen::Gone { path: path.into() };
    let core = &mut core;
    step(core, found(b"", 1));
    let (first, idle) = step(core, found(b"/a", 2));
    assert!(first.is_some() && !idle);
    // what is removed is matched in another way
    let (dying, idle) = step(core, gone(b"/a"));
    assert!(dying.is_some_and(|shapes| shapes[1].pairs.len() == 2) && idle);
    for id in 3..5 {
        assert_eq!(step(core, found(b"/a", id)), (None, false));
        step(core, gone(b"/a"));
        core.none_dying(b"");
        assert!(after(core).0.is_some_and(|shapes| shapes[1].pairs.len() == 1));
        core.tidy();
        assert_eq!(after(core), (None, true));
    }
    core.tidy();
    let (last, idle) = after(core);
    assert!(last.is_some_and(|shapes| shapes[1].pairs.is_empty()) && !idle);
}

/// Whoever may make cgroups can have thousands, with as many sockets that it is asked about: the time
/// goes with their number, not with its square.
#[test]
fn thousands_of_sockets_have_their_homes() {
    let [few, many] = [2_000, 20_000].map(homes_of);
    assert!(many < 40 * few, "{few:?} for some, {many:?} for ten times as many");
}

/// The processor time in which so many sockets are told where they are.
fn homes_of(many: u64) -> Duration {
    let mut core = Core::new(policies()[0].clone(), b"", 0);
    for id in 1..=many {
        let path = if id == 1 { String::new() } else { format!("/c{id}") };
        let path = path.into_bytes().into();
        let found = Found { path, id, deep: true, foreign: false, at: NOW };
        core.step(Seen::Found(found), &mut Vec::new());
    }
    let used = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock of the thread");
    let before = used();
    let home = core.homes(1..=many);
    for id in 1..=many {
        let path = if id == 1 { "/".into() } else { format!("/c{id}") };
        assert_eq!(home(id, 0), Some((path, Target::Direct)));
    }
    assert_eq!(home(many + 1, 0), None);
    Duration::from(used() - before)
}

/// However deep something is nested below a held cgroup, and whatever was there before.
#[test]
fn whatever_is_deep_is_held() {
    let text = "[global]\nhold = /a\n";
    let config = config::load(&Text(text), FilePath::new("c")).expect("a good policy");
    let mut core = Core::new(Rc::new(config), DIR, BASE);
    let mut kernel = Kernel::default();
    kernel.replace(&mut core);
    let mut actions = Vec::new();
    let mut found = |core: &mut Core, path: &[u8], id| {
        let found = Found { path: path.into(), id, deep: true, foreign: false, at: NOW };
        core.step(Seen::Found(found), &mut actions);
    };
    found(&mut core, b"", 0);
    let (mut path, mut ids) = (Vec::new(), Vec::new());
    for id in 1..300 {
        path = child(&path, b"a").to_vec();
        ids.push(id);
        let level = BASE + ids.len();
        // what is too deep for rules goes its ancestors' way
        let held = id > 1 && level <= 255;
        let chains = hold_chains(core.config(), &kernel.shape);
        assert_eq!(is_held(&chains, &kernel, &ids), held, "{level} is new");
        let beyond = [&ids[..], &[u64::MAX, u64::MAX]].concat();
        found(&mut core, &path, id);
        kernel.change(&core.take_delta());
        let chains = hold_chains(core.config(), &kernel.shape);
        assert!(!is_held(&chains, &kernel, &ids), "{level} is known");
        assert_eq!(is_held(&chains, &kernel, &beyond), level < 255, "below {level}");
        for end in 1..ids.len() {
            assert!(!is_held(&chains, &kernel, &ids[..end]), "{end} above {level}");
            let beside = [&ids[..end], &[u64::MAX]].concat();
            assert!(is_held(&chains, &kernel, &beside) || end + BASE >= 255);
        }
    }
    let chains = hold_chains(core.config(), &kernel.shape);
    assert!(!is_held(&chains, &kernel, &[u64::MAX, 1]), "others are not concerned");
}
