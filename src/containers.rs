//! Which veth leads to which cgroup's network namespace: what is known of interfaces, of the namespaces
//! at their other ends, and of the cgroups whose processes live there. Pure: what it does not know it
//! asks for, by the cgroups to be looked at, and time is a number of milliseconds.
//!
//! Nothing tells when a process enters a namespace. So a new cgroup, and a namespace that nobody is
//! known to live in, are looked at again until [`PATIENCE`] is over, more and more seldom; a new cgroup
//! also where it was found, since what starts a container within a container begins in the outer one's
//! namespace. Afterwards a cgroup that held no
//! process can still be heard of, when one joins it: some of these are kept in mind, the ones nearest
//! to the root, where users who may make cgroups of their own have none.

use std::collections::BTreeMap;

use crate::cgroup::tree::{Node, Path};
use crate::config::Target;
use crate::netlink::link::Link;
use crate::netlink::netns::PeerChange;
use crate::nft::table::Entrances;
use crate::small::{SmallMap, SmallSet};

/// Where there are any and rules cannot have them ([`crate::config::Config::with_containers`]).
pub const UNCOVERED: &str = "rules do not cover containers: set a smaller rule-priority, or a \
                             fwmark-mask of more bits";

/// How many cgroups without a process are kept in mind.
const MOST_VACANT: usize = 256;

/// How long is looked for what is not known.
pub const PATIENCE: u64 = 5000;

/// The pause after the first look, and at most. Each is four times the one before.
const PAUSE: (u64, u64) = (1, 1000);

/// Since when something is looked for in vain.
#[derive(Debug)]
struct Vain {
    until: u64,
    next: u64,
    pause: u64,
}

impl Vain {
    fn from(now: u64) -> Vain {
        Vain { until: now + PATIENCE, next: now, pause: PAUSE.0 }
    }

    fn put_off(&mut self, now: u64) {
        self.next = now + self.pause;
        self.pause = (self.pause * 4).min(PAUSE.1);
    }
}

/// A cgroup that a rule decides for: the rank of that, and the target.
pub type Ruled = (u32, Target);

#[derive(Debug, Default)]
pub struct Containers {
    links: SmallMap<u32, Link>,
    /// By id of a namespace: the cgroups with processes there, by path and id. To find any of these
    /// takes far longer than to put it in.
    owners: SmallMap<u32, SmallMap<Path, u64>>,
    /// Cgroups that have come, and namespaces that nobody is known to live in.
    fresh: BTreeMap<Path, Vain>,
    strange: SmallMap<u32, Vain>,
    /// Cgroups that have come and were found, which may move on yet.
    young: BTreeMap<Path, Vain>,
    /// Cgroups that held no process when they were looked at, by depth, path and id.
    vacant: SmallSet<(u16, Path, u64)>,
    /// What comes in by a veth, as of last time.
    entrances: Entrances,
    /// Some interface is not known: a bridge that a veth is on, or whatever there is.
    incomplete: bool,
}

impl Containers {
    /// Takes all interfaces that there are, and that all else may have changed.
    pub fn replace(&mut self, links: Vec<Link>, now: u64) {
        self.owners.clear();
        self.strange.clear();
        self.vacant.clear();
        self.links.clear();
        self.complete(links, now);
    }

    /// Takes all interfaces that there are, those that are known too.
    pub fn complete(&mut self, links: Vec<Link>, now: u64) {
        links.into_iter().for_each(|link| self.change(PeerChange::Is(link), now));
        // a bridge may stand behind its ports
        self.incomplete = false;
    }

    /// There may be others than those that are known.
    pub fn doubt(&mut self) {
        self.incomplete = true;
    }

    pub fn change(&mut self, change: PeerChange, now: u64) {
        match change {
            PeerChange::Is(link) => {
                self.incomplete |= link.peer.is_some()
                    && link.master != 0
                    && !self.links.contains_key(&link.master);
                let peer = link.peer.filter(|_| link.is_pair);
                self.links.insert(link.index, link);
                peer.into_iter().for_each(|peer| self.meet(peer, now));
            }
            PeerChange::Gone(index) => {
                let peer = self.links.remove(&index).and_then(|link| link.peer);
                let is_left = |peer: &u32| self.links.values().all(|l| l.peer != Some(*peer));
                if let Some(peer) = peer.filter(is_left) {
                    self.owners.remove(&peer);
                    self.strange.remove(&peer);
                }
            }
            PeerChange::Moved { link, to } => {
                let known = self.links.get_mut(&link);
                // one without another namespace has not been told of
                self.incomplete |= known.is_none();
                if let Some(link) = known.filter(|link| link.is_pair) {
                    link.peer = Some(to);
                    self.meet(to, now);
                }
            }
            PeerChange::Ended(id) => {
                // what still comes from there keeps its way until the veth is gone
                self.owners.remove(&id);
                self.strange.remove(&id);
                let ended = self.links.values_mut().filter(|link| link.peer == Some(id));
                ended.for_each(|link| link.peer = None);
            }
        }
    }

    fn meet(&mut self, id: u32, now: u64) {
        if !self.owners.contains_key(&id) {
            self.strange.insert(id, Vain::from(now));
        }
    }

    /// Whether there is any other namespace to live in.
    fn leads_anywhere(&self) -> bool {
        self.links.values().any(|link| link.is_pair && link.peer.is_some())
    }

    /// Whether the interfaces have to be asked for anew.
    pub fn is_incomplete(&self) -> bool {
        self.incomplete
    }

    /// A cgroup has come that a rule decides for. False where that is no news: a veth that comes
    /// later has them all looked at.
    pub fn appeared(&mut self, path: Path, now: u64) -> bool {
        if !self.leads_anywhere() {
            return false;
        }
        self.fresh.insert(path, Vain::from(now));
        true
    }

    /// Cgroups may be gone, or be others now; `id` tells which one a path stands for. Whether any
    /// was that matters.
    pub fn check(&mut self, id: impl Fn(&Path) -> Option<u64>, now: u64) -> bool {
        self.fresh.retain(|path, _| id(path).is_some());
        self.young.retain(|path, _| id(path).is_some());
        self.vacant.retain(|(_, path, known)| id(path) == Some(*known));
        let (mut left, mut changed) = (Vec::new(), false);
        self.owners.retain(|net, owners| {
            let before = owners.len();
            owners.retain(|path, known| id(path) == Some(*known));
            changed |= owners.len() < before;
            left.extend(owners.is_empty().then_some(*net));
            !owners.is_empty()
        });
        left.iter().for_each(|net| self.meet(*net, now));
        changed
    }

    /// Another policy: others may own what nobody did.
    pub fn look_again(&mut self, now: u64) {
        self.vacant.clear();
        let pairs = self.links.values().filter(|link| link.is_pair);
        let all: SmallSet<u32> = pairs.filter_map(|link| link.peer).collect();
        all.into_iter().for_each(|net| self.meet(net, now));
    }

    /// The cgroups to look at now: of those that have come, or all of those that a rule decides for
    /// where it is to be found out who lives in a namespace.
    pub fn in_question<'a, I>(&'a self, now: u64, all: impl FnOnce() -> I) -> Vec<Path>
    where
        I: Iterator<Item = &'a Path>,
    {
        if !self.leads_anywhere() {
            return Vec::new();
        }
        let due = |(path, vain): (&Path, &Vain)| (vain.next <= now).then(|| path.clone());
        let young = self.young.iter().filter_map(due);
        if self.strange.values().all(|vain| vain.next > now) {
            return self.fresh.iter().filter_map(due).chain(young).collect();
        }
        let known: SmallSet<&Path> = self.owners.values().flat_map(SmallMap::keys).collect();
        let (fresh, others): (Vec<_>, Vec<_>) = (all().filter(|path| !known.contains(path)))
            .partition(|path| self.fresh.contains_key(*path));
        fresh.into_iter().chain(others).cloned().chain(young).collect()
    }

    /// Whether a cgroup that was found is looked at again.
    pub fn is_young(&self, path: &Path) -> bool {
        self.young.contains_key(path)
    }

    /// Whether a look that showed `nets` contradicts an earlier one.
    pub fn has_moved(&self, path: &Path, nets: &SmallSet<u32>) -> bool {
        let mut others = self.owners.iter().filter(|(net, _)| !nets.contains(net));
        self.is_young(path) && others.any(|(_, owners)| owners.contains_key(path))
    }

    /// All the processes of a cgroup live in `nets` now.
    pub fn moved(&mut self, path: &Path, nets: &SmallSet<u32>, now: u64) {
        let mut left = Vec::new();
        self.owners.retain(|net, owners| {
            let alone = !nets.contains(net) && owners.remove(path).is_some() && owners.is_empty();
            left.extend(alone.then_some(*net));
            !alone
        });
        for net in left {
            // never the way of who does live there
            let links = &self.links;
            self.entrances
                .veths
                .retain(|index, _| links.get(index).and_then(|l| l.peer) != Some(net));
            self.meet(net, now);
        }
    }

    /// What a look at a cgroup has shown: the namespaces of its processes, none of which is this one.
    /// False where nothing is in question any more.
    pub fn seen(&mut self, path: &Path, id: u64, nets: &SmallSet<u32>) -> bool {
        for net in nets {
            if self.links.values().any(|link| link.is_pair && link.peer == Some(*net)) {
                self.owners.or_default(*net).insert(path.clone(), id);
                self.strange.remove(net);
                self.young.extend(self.fresh.remove_entry(path));
            }
        }
        self.is_asking()
    }

    /// The same look has shown whether any process is there.
    pub fn lived_in(&mut self, path: &Path, node: &Node, is: bool) {
        let cgroup = (node.depth, path.clone(), node.id);
        match is {
            true => drop(self.vacant.remove(&cgroup)),
            false => drop(self.vacant.insert(cgroup)),
        }
        self.vacant.truncate(MOST_VACANT);
    }

    /// The cgroups of which it matters if a process joins them.
    pub fn vacant(&self) -> SmallSet<(Path, u64)> {
        let all = self.vacant.iter().filter(|_| self.leads_anywhere());
        all.map(|(_, path, id)| (path.clone(), *id)).collect()
    }

    fn is_asking(&self) -> bool {
        !self.fresh.is_empty() || !self.strange.is_empty()
    }

    /// What was in question at `began` has been looked at: gives up what had been looked for for long
    /// enough then, and puts off the rest. (A look may take long, and what moves on amid it has been
    /// looked at before.)
    pub fn looked(&mut self, began: u64, now: u64) {
        self.fresh.retain(|_, vain| vain.until > began);
        self.strange.retain(|_, vain| vain.until > began);
        self.young.retain(|_, vain| vain.until > began);
        let all =
            self.fresh.values_mut().chain(self.strange.values_mut()).chain(self.young.values_mut());
        all.filter(|vain| vain.next <= began).for_each(|vain| vain.put_off(now));
    }

    /// When to look again, if anything is in question.
    pub fn next_look(&self) -> Option<u64> {
        let all = self.fresh.values().chain(self.strange.values()).chain(self.young.values());
        let all = all.map(|vain| vain.next);
        all.min().filter(|_| self.leads_anywhere())
    }

    /// Where containers' packets come in: `ruled` tells of the cgroups that a rule decides for, and
    /// `same` what a target has become by another policy. Of several in one namespace, the first
    /// rule decides.
    pub fn entrances(
        &mut self,
        ruled: impl Fn(&Path) -> Option<Ruled>,
        same: impl Fn(Target) -> Option<Target>,
    ) -> &Entrances {
        let mut now = Entrances::default();
        for (index, link) in self.links.iter().filter(|(_, link)| link.is_pair) {
            let owners = link.peer.and_then(|net| self.owners.get(&net));
            let first = owners.into_iter().flat_map(SmallMap::keys).filter_map(&ruled).min();
            // nobody lives there as far as is known, or any more
            let leaving = link.peer.is_none_or(|net| self.strange.contains_key(&net));
            let before = self.entrances.veths.get(index).filter(|_| leaving);
            let before = before.filter(|(name, _)| *name == link.name);
            let before = before.and_then(|(_, target)| same(*target));
            let Some(target) = first.map(|(_, target)| target).or(before) else {
                continue;
            };
            now.veths.insert(*index, (link.name.clone(), target));
            now.bridges.extend(self.links.get(&link.master).map(|bridge| bridge.name.clone()));
        }
        self.entrances = now;
        &self.entrances
    }

    /// The bridge that a veth is a port of.
    pub fn bridge(&self, veth: u32) -> Option<&str> {
        let master = self.links.get(&veth)?.master;
        self.links.get(&master).map(|bridge| &*bridge.name)
    }

    /// The cgroup that decides for what comes in by a veth.
    pub fn first(&self, veth: u32, ruled: impl Fn(&Path) -> Option<Ruled>) -> Option<Path> {
        let owners = self.owners.get(&self.links.get(&veth)?.peer?)?;
        let all = owners.keys().filter_map(|path| Some((ruled(path)?, path)));
        all.min().map(|(_, path)| path.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Path {
        text.as_bytes().into()
    }

    fn veth(index: u32, name: &str, master: u32, peer: Option<u32>) -> Link {
        Link { index, name: name.into(), is_pair: true, master, peer, ..Link::default() }
    }

    fn link(index: u32, name: &str, master: u32, peer: Option<u32>) -> PeerChange {
        PeerChange::Is(veth(index, name, master, peer))
    }

    fn nets(all: &[u32]) -> SmallSet<u32> {
        all.iter().copied().collect()
    }

    /// `/NUMBER/…` is decided by the rule of that number, which is of that tproxy.
    fn ruled(path: &Path) -> Option<Ruled> {
        let rank = path.get(1)?.checked_sub(b'0').filter(|n| *n < 10)?;
        Some((rank.into(), Target::Tproxy(rank.into())))
    }

    fn veths(containers: &mut Containers) -> Vec<(u32, u16)> {
        let entrances = containers.entrances(ruled, Some);
        let number = |target| match target {
            Target::Tproxy(number) => number,
            _ => u16::MAX,
        };
        entrances.veths.iter().map(|(i, (_, target))| (*i, number(*target))).collect()
    }

    fn asked(containers: &Containers, now: u64, all: &[Path]) -> Vec<Path> {
        containers.in_question(now, || all.iter())
    }

    #[test]
    fn what_is_not_known_is_asked_for_and_given_up() {
        let mut c = Containers::default();
        let all = [path("/1/a"), path("/2/b")];
        // no namespace, no question
        assert!(!c.appeared(all[0].clone(), 0));
        assert_eq!(asked(&c, 0, &all), []);
        c.change(link(7, "v7", 0, Some(5)), 0);
        assert_eq!(asked(&c, 0, &all), all);
        assert!(c.seen(&all[0], 10, &nets(&[])));
        assert!(!c.seen(&all[1], 11, &nets(&[5, 6])));
        assert_eq!(c.next_look(), None);
        assert_eq!(veths(&mut c), [(7, 2)]);
        // a new one is asked alone; it lives there too, by an earlier rule
        assert!(c.appeared(all[0].clone(), 1));
        assert_eq!(asked(&c, 1, &all), all[..1]);
        assert!(!c.seen(&all[0], 10, &nets(&[5])));
        assert_eq!(veths(&mut c), [(7, 1)]);
        // a second veth of the same is known at once
        c.change(link(8, "v8", 0, Some(5)), 2);
        assert_eq!(veths(&mut c), [(7, 1), (8, 1)]);
        // of two that live there the first one goes
        assert!(c.check(|path| all[1..].contains(path).then_some(11), 2));
        assert_eq!(veths(&mut c), [(7, 2), (8, 2)]);
        // another one: nobody's, and given up
        c.change(link(9, "v9", 0, Some(6)), 2);
        for began in [2, 2 + PATIENCE - 1] {
            c.looked(began, 2 + PATIENCE);
            assert!(c.next_look().is_some());
        }
        c.looked(2 + PATIENCE, 2 + PATIENCE);
        assert_eq!(c.next_look(), None);
        assert_eq!(asked(&c, 2 + PATIENCE, &all), []);
    }

    #[test]
    fn a_container_within_a_container_begins_in_the_outer_one() {
        let mut c = Containers::default();
        let (inner, outer) = (path("/1/inner"), path("/2/outer"));
        let stays = nets(&[5]);
        for ruled in [true, false] {
            c = Containers::default();
            c.change(link(7, "v7", 0, Some(5)), 0);
            if ruled {
                c.seen(&outer, 10, &stays);
            }
            assert!(c.appeared(inner.clone(), 0));
            c.seen(&inner, 11, &stays);
            c.looked(0, 0);
            assert_eq!(veths(&mut c), [(7, 1)]);
            // where it stays, it is asked for a while
            assert_eq!(asked(&c, 1, &[]), std::slice::from_ref(&inner));
            assert!(!c.has_moved(&inner, &stays));
            // where nobody knows, it is not here any more
            assert!(c.has_moved(&inner, &nets(&[])));
            c.moved(&inner, &nets(&[]), 1);
            let left: &[(u32, u16)] = if ruled { &[(7, 2)] } else { &[] };
            assert_eq!(veths(&mut c), left);
        }
        // who else does may have been passed over
        assert_eq!(asked(&c, 1, &[outer.clone(), inner.clone()]), [outer, inner.clone(), inner]);
        c.looked(1 + PATIENCE, 1 + PATIENCE);
        assert_eq!(c.next_look(), None);
    }

    #[test]
    fn a_cgroup_is_looked_at_more_and_more_seldom() {
        let mut c = Containers::default();
        c.change(link(7, "v7", 0, Some(5)), 0);
        c.seen(&path("/1/a"), 10, &nets(&[5]));
        let (one, two) = (path("/2/b"), path("/2/c"));
        assert!(c.appeared(one.clone(), 0));
        for next in [1, 5, 21, 85, 341, 1341] {
            let now = c.next_look().unwrap();
            assert_eq!(asked(&c, now, &[]), std::slice::from_ref(&one));
            c.looked(now, now);
            assert_eq!(c.next_look(), Some(next));
        }
        // another one does not have it looked at more often
        assert!(c.appeared(two.clone(), 400));
        assert_eq!(asked(&c, 400, &[]), [two]);
        // and nobody looks at what is gone
        c.check(|path| Some(10).filter(|_| *path != one), 401);
        assert!(!asked(&c, PATIENCE, &[]).contains(&one));
    }

    #[test]
    fn who_goes_leaves_the_way_for_a_while() {
        let mut c = Containers::default();
        let one = path("/1/a");
        c.change(link(7, "v7", 0, Some(5)), 0);
        c.seen(&one, 10, &nets(&[5]));
        assert_eq!(veths(&mut c), [(7, 1)]);
        assert!(!c.check(|_| Some(10), 1));
        // another cgroup of the same name
        assert!(c.check(|_| Some(11), 1));
        assert_eq!(veths(&mut c), [(7, 1)]);
        c.looked(1 + PATIENCE, 1 + PATIENCE);
        assert_eq!(veths(&mut c), []);
        // a namespace that ends keeps its way until the veth goes; its id may be another one's
        c.look_again(2);
        c.seen(&one, 11, &nets(&[5]));
        assert_eq!(veths(&mut c), [(7, 1)]);
        c.change(PeerChange::Ended(5), 3);
        c.change(link(8, "v8", 0, Some(5)), 3);
        assert_eq!(veths(&mut c), [(7, 1)]);
        c.change(PeerChange::Gone(7), 4);
        assert_eq!(veths(&mut c), []);
    }

    #[test]
    fn those_without_a_process_are_kept_in_mind() {
        let mut c = Containers::default();
        let deep = |i: usize| path(&format!("/1/a/{i}"));
        let node = |id, depth| Node { id, depth, ..Node::default() };
        (0..MOST_VACANT).for_each(|i| c.lived_in(&deep(i), &node(7, 3), false));
        let first = path("/2");
        c.lived_in(&first, &node(8, 1), false);
        // nobody could be anywhere
        assert_eq!(c.vacant(), SmallSet::default());
        c.change(link(7, "v7", 0, Some(5)), 0);
        let vacant = c.vacant();
        assert_eq!(vacant.len(), MOST_VACANT);
        assert!(vacant.contains(&(first.clone(), 8)));
        c.lived_in(&first, &node(8, 1), true);
        // another one by now
        c.check(|path| Some(if *path == deep(1) { 9 } else { 7 }), 0);
        assert!(!c.vacant().contains(&(deep(1), 7)) && !c.vacant().contains(&(first, 8)));
        assert_eq!(c.vacant().len(), MOST_VACANT - 2);
    }

    #[test]
    fn bridges_and_moves() {
        let mut c = Containers::default();
        let one = path("/1/a");
        c.change(link(7, "v7", 3, Some(5)), 0);
        assert!(c.is_incomplete());
        let bridge = Link { index: 3, name: "br".into(), ..Link::default() };
        c.complete(vec![bridge], 0);
        assert!(!c.is_incomplete());
        c.seen(&one, 10, &nets(&[5]));
        let bridges = c.entrances(ruled, Some).bridges.clone();
        assert_eq!(bridges, ["br".to_string()].into());
        // the other end of one that nothing was told of
        c.change(PeerChange::Moved { link: 9, to: 5 }, 0);
        assert!(c.is_incomplete());
        c.complete(vec![veth(9, "v9", 0, Some(5))], 0);
        assert_eq!(veths(&mut c), [(7, 1), (9, 1)]);
        // what leads elsewhere and is no pair
        let other = Link { index: 6, name: "vlan".into(), peer: Some(5), ..Link::default() };
        c.change(PeerChange::Is(other), 0);
        assert_eq!(veths(&mut c), [(7, 1), (9, 1)]);
        // lost notifications: known ways stay until it is known again who lives there
        c.replace(vec![veth(7, "v7", 3, Some(4))], 9);
        assert_eq!(veths(&mut c), [(7, 1)]);
        assert_eq!(c.next_look(), Some(9));
    }
}
