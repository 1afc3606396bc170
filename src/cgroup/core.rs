//! The state machine: what was [`Seen`] goes in, what is to be done comes out as [`Action`]s, what is
//! to be looked at next as [`Look`]s, and what the kernel's sets should then hold as a [`Delta`]. Pure:
//! no I/O, no clock.

use std::collections::HashMap;
use std::rc::Rc;

use nix::errno::Errno;

use super::blind::Blind;
use super::dying::{self, Dying};
use super::event::{Action, Event, Found, List, Listed, Look, Note, Scan, Seen};
use super::gates::{self, Above, Gate, Gates};
use super::holds::{HoldElement, Holds};
use super::ranking::{self, Ranking};
use super::tally::{Change, Changes};
use super::tree::{self, Hold, Index, Node, Path, Tree};
use crate::config::{Config, Outcome, Target};
use crate::nft::table::{Pair, Shape, Stage};
use crate::policy::{self, Decision};
use crate::small::{SmallMap, SmallSet};

/// The difference between what the kernel's sets hold and what they should hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Cgroup ids in the sets of targets, in the order of these.
    pub cgroups: Change<(Outcome, u64)>,
    /// The same for cgroups that are matched by their hashes.
    pub dying: Change<dying::Hashed>,
    pub gates: Change<Gate>,
    pub held: Change<HoldElement>,
    /// In the place of that: all there are, for sets of their own.
    pub all_held: Option<Vec<HoldElement>>,
    /// What the rules were made for, and what they are needed for now, where that is not the same.
    pub shape: Option<Box<[Shape; 2]>>,
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        let no_cgroups = self.cgroups.is_empty() && self.dying.is_empty();
        no_cgroups && self.gates.is_empty() && self.held.is_empty() && self.shape.is_none()
    }

    /// Empties it, and keeps the memory of what most of them have.
    fn clear(&mut self) {
        self.cgroups.clear();
        self.gates.clear();
        (self.dying, self.held, self.all_held, self.shape) = Default::default();
    }
}

/// How many looks memory is kept for.
const USUAL: usize = 64;

/// Everything that the kernel's sets should hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub elements: SmallMap<Outcome, Vec<u64>>,
    pub dying: SmallMap<Outcome, Vec<u32>>,
    pub gates: Vec<Gate>,
    pub held: Vec<HoldElement>,
    pub shape: Shape,
}

/// The tree and what follows from it.
#[derive(Default)]
pub struct Core {
    config: Rc<Config>,
    /// Level of the cgroup root itself.
    base_level: usize,
    /// Whether nft can show the path of the cgroup root.
    listable: bool,
    tree: Tree,
    /// Elements in use, counted by pair.
    pairs: SmallMap<Pair, usize>,
    /// Pairs whose last element is gone, and whether that was so at the last [`Core::tidy`]. Their
    /// rules stay for a while: most often a service starts again.
    idle: SmallMap<Pair, bool>,
    /// What elements are below.
    gates: Gates,
    holds: Holds,
    /// Whether the cgroup root can be held: it is the root of all, or nft can name it.
    names_root: bool,
    /// What the kernel has rules for.
    committed: Shape,
    /// Whether rules have come since the sets of what is held were made, and since packets that were
    /// on their way were last waited for.
    rules_since_held: bool,
    rules_since_wait: bool,
    /// The pairs may be others.
    pairs_changed: bool,
    /// Elements of the sets of targets.
    pending: Changes<(Outcome, u64)>,
    /// Memory for the next difference.
    spare: Option<Box<Delta>>,
    /// Removed cgroups that sockets may hold, and what is matched as they are; `None` where the
    /// kernel cannot match them.
    dying: Option<dying::Removed>,
    /// What is to be looked at, in any order, once what follows from the last looks is in force.
    looks: Vec<Look>,
    /// Directories without a watch, or that could not be scanned.
    blind: Blind,
    memo: policy::Memo,
    /// The policy that is to follow, as far as it has been worked out.
    draft: Option<Ranking>,
    /// By cgroup id: those that were found late and went another way until then, and which.
    late: HashMap<u64, Outcome>,
    /// The deepest level that the kernel takes.
    deepest: usize,
}

/// Deepest level that `socket cgroupv2` can name; what lies deeper inherits.
const MAX_LEVEL: usize = 255;

impl Core {
    /// An empty tree, of a cgroup root with that directory and level, which is to be looked at.
    pub fn new(config: Rc<Config>, root: &[u8], base_level: usize) -> Core {
        Core {
            config,
            base_level,
            listable: dying::is_listable(root),
            names_root: base_level == 0 || root.starts_with(b"/sys/fs/cgroup/"),
            looks: vec![scan(Path::default(), true)],
            deepest: MAX_LEVEL,
            ..Core::default()
        }
    }

    pub fn config(&self) -> &Rc<Config> {
        &self.config
    }

    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Tells of each of these cgroups, by its id, the path, fit to print, and the target of a user's
    /// sockets there. One look at the tree serves all: users can have thousands of each.
    pub fn homes(
        &self,
        ids: impl IntoIterator<Item = u64>,
    ) -> impl Fn(u64, u32) -> Option<(String, Target)> + '_ {
        let wanted: SmallSet<u64> = ids.into_iter().collect();
        let nodes = self.tree.iter().filter(|(_, node)| wanted.contains(&node.id));
        let nodes: HashMap<u64, (&Path, &Node)> =
            nodes.map(|(path, node)| (node.id, (path, node))).collect();
        move |id, uid| {
            let (path, node) = nodes.get(&id)?;
            let outcome = policy::outcome(&self.config, node.rank);
            Some((tree::display(path), policy::likely_target(&self.config, outcome, uid)))
        }
    }

    /// The target of the cgroup with this path.
    pub fn outcome(&self, path: &[u8]) -> Option<Outcome> {
        let node = self.tree.get(path)?;
        Some(policy::outcome(&self.config, node.rank))
    }

    /// The rank and the target of the cgroup with this path, where a rule decides for it.
    pub fn ruled(&self, path: &[u8]) -> Option<(policy::Rank, Target)> {
        let node = self.tree.get(path).filter(|node| self.is_ruled(node))?;
        Some((node.rank, policy::target(&self.config, node.rank)))
    }

    /// Whether a rule decides for a cgroup.
    pub fn is_ruled(&self, node: &Node) -> bool {
        !matches!(policy::decision(&self.config, node.rank), Decision::Default)
    }

    /// Whose work it is what happens in the directory of a watch; see [`Node::account`].
    pub fn account(&self, wd: i32) -> u32 {
        let node = self.tree.watched(wd).and_then(|at| self.tree.node(at));
        node.map_or(0, |node| node.account)
    }

    /// Whether any cgroup has an element of its own.
    pub fn has_elements(&self) -> bool {
        !self.pairs.is_empty()
    }

    /// Whether flows of some cgroups may have begun by another way than theirs.
    pub fn has_late(&self) -> bool {
        !self.late.is_empty()
    }

    /// Those cgroups by their ids, and the targets by which they went; once.
    pub fn take_late(&mut self) -> HashMap<u64, Outcome> {
        std::mem::take(&mut self.late)
    }

    /// Whether there are rules that nothing needs now.
    pub fn has_idle(&self) -> bool {
        !self.idle.is_empty() || self.holds.has_idle()
    }

    /// Keeps those that are removed from now on in the kernel for as long as sockets may hold them,
    /// and these, which another table has kept. From now on those whose path nft cannot show are
    /// matched by their hash, too.
    pub fn keep_dying(&mut self, kept: impl IntoIterator<Item = Dying>) {
        if self.dying.is_none() {
            let all = self.tree.indices();
            let elements = all.filter_map(|at| {
                let node = self.tree.node(at).filter(|node| !(self.listable && node.listable))?;
                Some((at, node.element))
            });
            let elements: Vec<(Index, Option<Outcome>)> = elements.collect();
            elements.iter().for_each(|(at, element)| self.place(*at, *element, None));
            self.dying = Some(dying::Removed::default());
            elements.iter().for_each(|(at, element)| self.place(*at, None, *element));
        }
        kept.into_iter().for_each(|dying| self.put(dying));
    }

    /// Whether those that are removed are kept.
    pub fn keeps_dying(&self) -> bool {
        self.dying.is_some()
    }

    /// What is removed and may be held.
    pub fn dying(&self) -> impl Iterator<Item = &Dying> {
        self.dying.iter().flat_map(dying::Removed::iter)
    }

    /// Whether the cgroup root can be held.
    pub fn names_root(&self) -> bool {
        self.names_root
    }

    /// Where an event tells to look; `None` where that is below a directory that is gone: its
    /// parent's event has been, or will be, seen.
    pub fn locate(&mut self, event: Event) -> Option<Look> {
        match event {
            Event::Changed { wd, name } => {
                let parent = self.tree.path(self.tree.watched(wd)?)?;
                Some(scan(tree::child(parent, &name), false))
            }
            Event::Unwatched { wd } => {
                let at = self.tree.unwatch(wd)?;
                Some(scan(self.tree.path(at)?.clone(), true))
            }
            Event::Overflow => Some(scan(Path::default(), true)),
        }
    }

    /// Takes what a look saw; what is to be done is pushed onto `actions`.
    pub fn step(&mut self, seen: Seen, actions: &mut Vec<Action>) {
        match seen {
            Seen::Found(found) => self.found(found, actions),
            Seen::Listed(listed) => self.listed(listed, actions),
            Seen::Gone { path } => self.gone(&path, actions),
            Seen::Failed { path, errno } => self.failed(path, errno, actions),
        }
        self.blind.mind(actions);
    }

    /// Whether something is to be looked at.
    pub fn has_looks(&self) -> bool {
        !self.looks.is_empty()
    }

    /// One thing that is to be looked at; once.
    pub fn take_look(&mut self) -> Option<Look> {
        let look = self.looks.pop();
        if look.is_none() {
            self.looks.shrink_to(USUAL);
        }
        look
    }

    /// What could not be watched or scanned, or some of it, is to be looked at again.
    pub fn retry(&mut self) {
        self.looks.extend(self.blind.turn().into_iter().map(|path| scan(path, true)));
    }

    /// Lets go of rules that nothing has needed since the last call.
    pub fn tidy(&mut self) {
        self.idle.retain(|_, before| !std::mem::replace(before, true));
        self.pairs_changed = true;
        self.holds.tidy();
    }

    /// The living cgroups that are next above removed ones.
    pub fn above_dying(&self) -> SmallSet<Path> {
        self.dying.as_ref().map(|list| list.above(&self.tree)).unwrap_or_default()
    }

    /// Nothing below that one is dying any more.
    pub fn none_dying(&mut self, above: &[u8]) {
        self.let_go(|list| list.released(above));
    }

    /// A look at all sockets: these cgroups are held by some.
    pub fn kept(&mut self, mut ids: SmallSet<u64>) {
        let living: SmallSet<u64> = self.tree.iter().map(|(_, node)| node.id).collect();
        ids.retain(|id| !living.contains(id));
        self.let_go(|list| list.seen(&ids));
    }

    /// Takes it that the kernel matches no level deeper than that: what lies there inherits. As
    /// after a new policy, the table has to be replaced. False where nothing lies there.
    pub fn set_deepest(&mut self, level: usize) -> bool {
        let deeper = self.pairs.keys().any(|pair| usize::from(pair.level) > level);
        // the rules that hold are made for so many levels
        let deeper = deeper || self.holds.shape(self.deepest).is_some() && level < self.deepest;
        self.deepest = level;
        if deeper {
            self.set_elements();
        }
        deeper
    }

    /// Begins to work out the policy that is to follow; another one that was begun is forgotten.
    pub fn draft(&mut self, config: Rc<Config>) {
        self.draft = Some(Ranking::new(config, self.names_root));
    }

    /// The policy that is to follow.
    pub fn drafted(&self) -> Option<&Rc<Config>> {
        self.draft.as_ref().map(|draft| &draft.config)
    }

    /// Works out one piece of it, a cgroup's; false where nothing is left, until cgroups come.
    pub fn work_out(&mut self) -> bool {
        let Core { draft, tree, dying, .. } = self;
        draft.as_mut().is_some_and(|draft| draft.go_on(tree, dying))
    }

    /// Takes the policy that is to follow, with what is left to work out of it. The table has to be
    /// replaced afterwards, with [`Core::snapshot`]. Gives what was in force.
    pub fn adopt(&mut self) -> Option<Ranking> {
        while self.work_out() {}
        let draft = self.draft.take()?;
        Some(self.put_back(draft))
    }

    /// The same with one that [`Core::adopt`] gave, as long as nothing has happened since.
    pub fn put_back(&mut self, new: Ranking) -> Ranking {
        let Ranking { config, memo, mut ranks, removed, .. } = new;
        let config = std::mem::replace(&mut self.config, config);
        let mut old = Ranking::new(config, self.names_root);
        old.memo = std::mem::replace(&mut self.memo, memo);
        for node in self.tree.nodes_mut() {
            if let Some((rank, hold)) = ranks.get_mut(&node.id) {
                std::mem::swap(rank, &mut node.rank);
                std::mem::swap(hold, &mut node.hold);
            }
        }
        old.ranks = ranks;
        // of what a target was in the policy before
        self.late = HashMap::new();
        self.set_elements();
        // removed ones have the target of their path too
        let dying = self.dying.as_mut().map(dying::Removed::take).unwrap_or_default();
        for mut dying in dying {
            let outcome = match &dying.path {
                Some(path) => {
                    old.removed.insert(path.clone(), dying.outcome);
                    removed.get(path).copied()
                }
                None => {
                    let Outcome { target, class } = dying.outcome;
                    self.config.outcome_named(old.config.target_name(target), class)
                }
            };
            self.count_pair(dying.pair(), false);
            match outcome {
                Some(outcome) => {
                    dying.outcome = outcome;
                    self.put(dying);
                }
                None => self.release_gates(&dying.gates),
            }
        }
        old
    }

    /// Takes other sections or marks of the same policy: cgroups go the same ways.
    pub fn revise(&mut self, config: Rc<Config>) {
        self.config = config;
    }

    /// Every living cgroup's element anew, by the ranks and what the kernel takes.
    fn set_elements(&mut self) {
        let all: Vec<Index> = self.tree.indices().collect();
        for at in &all {
            let Some(node) = self.tree.node(*at).copied() else {
                continue;
            };
            let parent = self.tree.parent(*at).and_then(|parent| self.tree.node(parent));
            let element = parent.and_then(|parent| self.element(parent.rank, &node));
            if let Some(known) = self.tree.node_mut(*at).filter(|_| element != node.element) {
                known.element = element;
                self.place(*at, node.element, element);
            }
        }
        self.idle.clear();
        self.pairs_changed = true;
        self.holds = Holds::default();
        all.iter().for_each(|at| self.count_held(*at, true));
    }

    /// The net difference since the last commit. The caller commits it, or replaces the table.
    pub fn take_delta(&mut self) -> Box<Delta> {
        let mut delta = self.spare.take().unwrap_or_default();
        self.pending.take(&mut delta.cgroups);
        if let Some(dying) = &mut self.dying {
            dying.elements.changes.take(&mut delta.dying);
        }
        self.gates.elements.changes.take(&mut delta.gates);
        self.holds.elements.changes.take(&mut delta.held);
        let holds = !delta.held.add.is_empty();
        if !self.is_in_shape() || self.rules_since_held && holds {
            let shape = self.shape();
            let before = std::mem::replace(&mut self.committed, shape.clone());
            // a packet that has met the rules of before knows nothing of these
            let further = shape.leads_further(&before);
            self.rules_since_held |= further;
            self.rules_since_wait |= further;
            if self.rules_since_held && holds {
                self.rules_since_held = false;
                delta.held = Change::default();
                delta.all_held = Some(self.holds.elements.snapshot());
            }
            delta.shape = Some(Box::new([before, shape]));
        }
        delta
    }

    /// Takes what is to go out of a difference where packets may be on their way that have met rules of
    /// before: those that have come meanwhile are not such a packet's, so that it is to find everything
    /// where it was. True where something is kept until [`Core::packets_have_passed`].
    pub fn keep_deletions(&mut self, delta: &mut Delta) -> bool {
        if !self.rules_since_wait {
            return false;
        }
        let (cgroups, gates) = (&mut delta.cgroups.delete, &mut delta.gates.delete);
        let keeps = !cgroups.is_empty() || !gates.is_empty();
        cgroups.drain(..).for_each(|own| self.pending.note(own, false));
        gates.drain(..).for_each(|own| self.gates.elements.changes.note(own, false));
        keeps
    }

    /// No packet is on its way any more that has met other rules than those of now.
    pub fn packets_have_passed(&mut self) {
        self.rules_since_wait = false;
    }

    /// Takes back the memory of a difference that is done with.
    pub fn reuse(&mut self, mut delta: Box<Delta>) {
        delta.clear();
        self.spare = Some(delta);
    }

    /// The living cgroups that are matched by their ids: path, target, id.
    pub fn elements(&self) -> impl Iterator<Item = (&Path, Outcome, u64)> {
        let own = self.tree.iter().filter(|(_, node)| !self.is_hashed(node));
        own.filter_map(|(path, node)| Some((path, node.element?, node.id)))
    }

    /// Everything, for a replacement of the table; what was pending is in it.
    pub fn snapshot(&mut self) -> Snapshot {
        self.pending.clear();
        self.committed = self.shape();
        (self.rules_since_held, self.rules_since_wait) = (false, false);
        self.pairs_changed = false;
        let mut elements: SmallMap<Outcome, Vec<u64>> = SmallMap::default();
        for (_, outcome, id) in self.elements() {
            elements.or_default(outcome).push(id);
        }
        let dying = self.dying.as_mut().map(dying::Removed::snapshot).unwrap_or_default();
        let (mut gates, held) = (self.gates.elements.snapshot(), self.holds.elements.snapshot());
        gates.extend(self.gate_nodes().map(|(stage, _, node)| Gate::new(stage, node.id, false)));
        gates.sort_unstable();
        Snapshot { elements, dying, gates, held, shape: self.committed.clone() }
    }

    /// What rules are needed for.
    fn shape(&self) -> Shape {
        Shape {
            base: self.base_level,
            pairs: self.all_pairs().copied().collect(),
            hashed: self.gates.hashed().collect(),
            holding: self.holds.shape(self.deepest),
        }
    }

    /// Whether that is what there are rules for: asked at each commit, and mostly so.
    fn is_in_shape(&mut self) -> bool {
        let Shape { base, pairs, hashed, holding } = &self.committed;
        let same = || {
            self.all_pairs().count() == pairs.len()
                && self.all_pairs().all(|pair| pairs.contains(pair))
        };
        let same = !self.pairs_changed || same();
        self.pairs_changed = false;
        same && *base == self.base_level
            && self.gates.hashed().eq(hashed.iter().copied())
            && *holding == self.holds.shape(self.deepest)
    }

    /// The pairs that rules are needed for, or may soon be.
    fn all_pairs(&self) -> impl Iterator<Item = &Pair> {
        self.pairs.keys().chain(self.idle.keys())
    }

    /// The living cgroups that are gates of a stage, by their paths.
    pub fn gates(&self, stage: Stage) -> SmallSet<&[u8]> {
        self.gate_nodes().filter(|(at, ..)| *at == stage).map(|(_, path, _)| &**path).collect()
    }

    /// The living cgroups that are gates by their ids.
    fn gate_nodes(&self) -> impl Iterator<Item = (Stage, &Path, &Node)> {
        let all = self.tree.iter().filter(|(_, node)| node.elements > 0 && !self.is_hashed(node));
        all.filter_map(|(path, node)| Some((gates::stage_at(node.depth)?, path, node)))
    }

    /// The living cgroups that the kernel has to know of, since they are held or below one.
    pub fn held(&self) -> impl Iterator<Item = (&Path, Hold)> {
        let known = self.tree.iter().filter(|(_, node)| self.held_level(node).is_some());
        known.map(|(path, node)| (path, node.hold))
    }

    fn found(&mut self, mut found: Found, actions: &mut Vec<Action>) {
        let Found { path, id, deep, foreign, .. } = found.clone();
        let key = self.tree.key(&path);
        let parent = key.and_then(|(above, _)| self.tree.node(above)).copied();
        if parent.is_none() && !path.is_empty() {
            // the parent went while its child was being looked at
            return;
        }
        let known = match key {
            Some(key) => self.tree.named(key, &path),
            None => self.tree.find(&path),
        };
        match known.and_then(|at| self.tree.node(at)) {
            Some(node) if node.id == id => {
                // without a watch, or where listing failed, nothing else will tell of its children
                if deep || node.wd.is_none() || self.blind.contains(&path) {
                    found.at = None;
                    self.looks.push(Look::Watch(found));
                }
                return;
            }
            // another cgroup of the same name
            Some(_) => self.gone(&path, actions),
            None => {}
        }
        let mut node = Node { id, foreign, listable: dying::is_listable(&path), ..Node::default() };
        let above = parent.map(|parent| (parent.rank, parent.hold));
        (node.rank, node.hold) =
            ranking::of(&mut self.memo, &self.config, above, &path, foreign, self.names_root);
        match parent {
            // of a root that was there before
            None => self.holds.clear(),
            Some(parent) => {
                node.depth = parent.depth.saturating_add(1);
                node.element = self.element(parent.rank, &node);
            }
        }
        let at = self.tree.insert(path.clone(), key, node);
        self.count_held(at, true);
        if let Some(draft) = &mut self.draft {
            draft.came(&self.tree, at);
        }
        self.place(at, None, node.element);
        if node.element.is_some() {
            actions.push(Action::Tell(Note::Classified { path, outcome: node.element }));
        }
        self.looks.push(Look::Watch(found));
    }

    fn listed(&mut self, listed: Listed, actions: &mut Vec<Action>) {
        let Listed { path, id, wd, refused, list } = listed;
        let same = |at: &Index| self.tree.node(*at).is_some_and(|node| node.id == id);
        let Some(at) = self.tree.find(&path).filter(same) else {
            // it went while it was being listed
            actions.extend(wd.map(Action::Unwatch));
            return;
        };
        let before = self.tree.watch(at, wd);
        match refused {
            None => self.blind.sighted(&path),
            Some(errno) => self.blind.refused(&path, errno, actions),
        }
        if before != wd {
            actions.extend(before.map(Action::Unwatch));
        }
        let known = self.tree.children(at).filter_map(|child| self.tree.path(child)).cloned();
        let mut children: Vec<Path> = known.collect();
        if let Some(List { owner, late, children: names }) = list {
            self.charge_to(at, owner);
            if late {
                self.came_late(at);
            }
            let there: SmallSet<&[u8]> = names.iter().map(|name| &**name).collect();
            children.retain(|child| !there.contains(&child[path.len() + 1..]));
            children.iter().for_each(|child| self.gone(child, actions));
            children = names.iter().map(|name| tree::child(&path, name)).collect();
        }
        // what lies below a known one is in doubt too: so was this one
        self.looks.extend(children.into_iter().map(|child| scan(child, true)));
    }

    /// Whose work it is what happens in a directory with this owner.
    fn charge_to(&mut self, at: Index, owner: u32) {
        let parent = self.tree.parent(at).and_then(|parent| self.tree.node(parent));
        // whoever got a subtree can give parts of it to users of a namespace of his
        let account = match parent.map(|parent| parent.account) {
            None => 0,
            Some(0) => owner,
            Some(account) => account,
        };
        if let Some(node) = self.tree.node_mut(at) {
            node.account = account;
        }
    }

    /// Forgets a cgroup and all below it.
    fn gone(&mut self, path: &Path, actions: &mut Vec<Action>) {
        self.blind.remove(path);
        let at = self.tree.find(path);
        let all = at.map(|at| self.tree.subtree(at)).unwrap_or_default();
        // of a root that is out of sight, what is held stays so
        let lost = path.is_empty();
        // children before their parents, which they are counted below
        for at in all.into_iter().rev() {
            let (Some(path), Some(node)) = (self.tree.path(at), self.tree.node(at)) else {
                continue;
            };
            let (path, node) = (path.clone(), *node);
            self.blind.remove(&path);
            actions.extend(node.wd.map(Action::Unwatch));
            self.late.remove(&node.id);
            self.place(at, node.element, None);
            if !lost {
                self.count_held(at, false);
            }
            if let Some(outcome) = node.element {
                if self.dying.as_ref().is_some_and(dying::Removed::is_full) {
                    actions.push(Action::Tell(Note::Crowded));
                }
                self.keep(at, &path, &node, outcome);
                actions.push(Action::Tell(Note::Classified { path: path.clone(), outcome: None }));
            }
            let hashed = self.is_hashed(&node);
            if let Some((stage, node)) = gates::stage_at(node.depth).zip(self.tree.node(at)) {
                self.gates.went(stage, node, hashed);
            }
            self.tree.remove(at);
            if let Some(draft) = &mut self.draft {
                draft.went(&path, &node);
            }
        }
        if lost {
            // the root itself: it may come back
            self.blind.insert(path.clone());
        }
    }

    fn failed(&mut self, path: Path, errno: Errno, actions: &mut Vec<Action>) {
        if path.is_empty() || self.tree.above(&path).is_some() {
            self.blind.refused(&path, errno, actions);
        }
    }

    /// Notes by which way a new cgroup went until now, where that is not its own: its parent's, or
    /// that one's before.
    fn came_late(&mut self, at: Index) {
        let Some(node) = self.tree.node_mut(at) else { return };
        node.late_root |= node.hold == Hold::Root;
        let node = *node;
        let Some((_, parent)) = self.tree.up(at).nth(1) else { return };
        // what is below a held one has sent nothing until now: its connections need not be ended,
        // they go on by themselves
        let root = self.tree.up(at).skip(1).find(|(_, node)| node.hold == Hold::Root);
        let was_held = root.is_some_and(|(_, root)| !root.late_root);
        let way = || policy::outcome(&self.config, parent.rank);
        let was = self.late.get(&parent.id).copied().unwrap_or_else(way);
        let is_held = node.hold == Hold::Below && was_held;
        if !is_held && was != policy::outcome(&self.config, node.rank) {
            self.late.insert(node.id, was);
        }
    }

    /// The element of a cgroup below a parent of that rank.
    fn element(&self, parent: policy::Rank, node: &Node) -> Option<Outcome> {
        let outcome = policy::outcome(&self.config, node.rank);
        let differs = outcome != policy::outcome(&self.config, parent);
        let reachable = self.base_level + usize::from(node.depth) <= self.deepest;
        (differs && reachable).then_some(outcome)
    }

    /// The level of a cgroup that is held or below one, where the kernel has to know of it. The root
    /// of all needs no element; what is too deep goes its ancestors' way, known or not; and what nft
    /// cannot show stays unknown.
    fn held_level(&self, node: &Node) -> Option<u8> {
        let level = self.base_level + usize::from(node.depth);
        let shown = (1..=self.deepest).contains(&level) && node.listable;
        (node.hold != Hold::None && shown).then_some(level as u8)
    }

    fn count_held(&mut self, at: Index, up: bool) {
        let Some(node) = self.tree.node(at) else { return };
        match self.held_level(node) {
            Some(level) => self.holds.count(node.id, level, node.hold, up),
            None if node.depth == 0 && node.hold == Hold::Root => self.holds.hold_all(),
            None => {}
        }
    }

    /// One more element, or one less, is at or below the gates that a cgroup is at or below.
    fn count_gates(&mut self, at: Index, up: bool) {
        let mut next = Some(at);
        while let Some(at) = next {
            self.count_gate(at, up);
            next = self.tree.parent(at);
        }
    }

    fn count_gate(&mut self, at: Index, up: bool) {
        let hashed = self.tree.node(at).is_some_and(|node| self.is_hashed(node));
        let Some(node) = self.tree.node_mut(at) else { return };
        if let Some(stage) = gates::stage_at(node.depth) {
            self.gates.count(stage, node, hashed, up);
        }
    }

    /// One element less is below these, of which some may have been removed since it was counted.
    fn release_gates(&mut self, gates: &[Above]) {
        for (stage, at, id) in gates {
            match self.tree.node(*at).is_some_and(|node| node.id == *id) {
                true => self.count_gate(*at, false),
                false => self.gates.release(*stage, *id),
            }
        }
    }

    /// The level of a cgroup that is not too deep.
    fn level(&self, node: &Node) -> u8 {
        (self.base_level + usize::from(node.depth)) as u8
    }

    fn count_pair(&mut self, pair: Pair, up: bool) {
        let count = self.pairs.or_default(pair);
        self.pairs_changed |= *count == 0;
        match up {
            true => *count += 1,
            false => *count -= 1,
        }
        if *count == 0 {
            self.pairs_changed = true;
            self.pairs.remove(&pair);
            // what is removed does not come again
            if !pair.hashed {
                self.idle.insert(pair, false);
            }
        } else if up {
            self.idle.remove(&pair);
        }
    }

    /// Keeps a cgroup that is being removed, where the kernel can match it.
    fn keep(&mut self, at: Index, path: &Path, node: &Node, outcome: Outcome) {
        if self.dying.is_none() {
            return;
        }
        self.count_gates(at, true);
        let gate = |at| {
            let node = self.tree.node(at)?;
            Some((gates::stage_at(node.depth)?, at, node.id))
        };
        let gates: Vec<Above> = self.tree.lineage(at).filter_map(gate).collect();
        self.put(Dying::new(node.id, self.level(node), outcome, path.clone(), gates));
    }

    /// Keeps a removed cgroup whose gates are counted.
    fn put(&mut self, dying: Dying) {
        let Some(list) = &mut self.dying else { return };
        let pair = dying.pair();
        let oldest = list.push(dying);
        self.count_pair(pair, true);
        oldest.into_iter().for_each(|oldest| self.forget(&oldest));
    }

    fn let_go(&mut self, release: impl FnOnce(&mut dying::Removed) -> Vec<Dying>) {
        let released = self.dying.as_mut().map(release).unwrap_or_default();
        released.iter().for_each(|dying| self.forget(dying));
    }

    fn forget(&mut self, dying: &Dying) {
        self.count_pair(dying.pair(), false);
        self.release_gates(&dying.gates);
    }

    /// Whether a living cgroup is matched by its hash.
    fn is_hashed(&self, node: &Node) -> bool {
        self.dying.is_some() && !(self.listable && node.listable)
    }

    /// Notes which element a living cgroup should have, in place of the one it has now.
    fn place(&mut self, at: Index, now: Option<Outcome>, wanted: Option<Outcome>) {
        now.into_iter().for_each(|outcome| self.place_one(at, outcome, false));
        wanted.into_iter().for_each(|outcome| self.place_one(at, outcome, true));
    }

    /// Its element comes, or goes.
    fn place_one(&mut self, at: Index, outcome: Outcome, come: bool) {
        let Some(node) = self.tree.node(at) else { return };
        let (id, level, hashed) = (node.id, self.level(node), self.is_hashed(node));
        self.count_pair(Pair { level, outcome, hashed, loose: false }, come);
        self.count_gates(at, come);
        match &mut self.dying {
            Some(list) if hashed => list.match_living(id, outcome, come),
            _ => self.pending.note((outcome, id), come),
        }
    }
}

fn scan(path: Path, deep: bool) -> Look {
    Look::Scan(Scan { path, deep })
}
