//! Datagrams of flows that began otherwise are sent by the routes that are theirs, and those of a
//! route no more by one that is not. Which flows these are is decided in [`crate::stale::flows`].
//!
//! Anybody may have 100,000s of flows, so they are listed and held against the policy by and by;
//! until its turn, what a flow sends is dropped by the table where it would leave the wrong way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::containers::used;
use super::Daemon;
use crate::cgroup::core::Core;
use crate::config::{spoofed_mark, Config, Outcome};
use crate::error::reason;
use crate::kernel::sockets::Asker;
use crate::kernel::Kernel;
use crate::log;
use crate::net::Mark;
use crate::netlink::conntrack::Tracked;
use crate::netlink::diag::{SeenSocket, FEW_CGROUPS, UDP_STATES};
use crate::netlink::fib::Course;
use crate::netlink::uapi::*;
use crate::nft::table::Entrances;
use crate::small::SmallSet;
use crate::stale::flows::{late, renumbered, Cure, Flows, Known, Owners};

/// How long flows are held against the policy before cgroups that come have their turn.
const SLICE: Duration = Duration::from_millis(1);

/// A start or a reload is done once that is for all flows, or has cost so much of the processor: many
/// others may want that too, and what is not done yet is dropped.
const LONGEST: Duration = Duration::from_secs(1);

/// Before a pass for cgroups that were found late, this many times what the last pass has cost of the
/// processor.
const REST: u32 = 8;

#[derive(Default)]
pub struct Redirects {
    /// The policy with the marks that it says, while flows move to these: before all others.
    policy: Option<Rc<Config>>,
    /// A pass for all flows is to follow.
    all: bool,
    /// The pass that goes on.
    pass: Option<Pass>,
    /// Cgroups that were found late, and what they come to.
    late: HashMap<u64, Outcome>,
    /// Their pass does not begin before that.
    rest: Option<Instant>,
    /// Addresses of before, which no interface of a way out has any more.
    pub(super) gone: SmallSet<IpAddr>,
}

impl Redirects {
    /// What these cgroups began went other ways until now.
    pub fn want_late(&mut self, core: &Core, ways: &HashMap<u64, Outcome>) {
        self.late.extend(late(core, ways));
    }

    pub fn is_busy(&self) -> bool {
        self.pass.is_some() || self.all || self.is_moving()
    }

    pub fn is_moving(&self) -> bool {
        self.policy.is_some()
    }

    pub fn due(&self) -> Option<Instant> {
        match self.is_busy() {
            true => Some(Instant::now()),
            false => (!self.late.is_empty()).then(|| self.rest.unwrap_or_else(Instant::now)),
        }
    }
}

/// Has one known by the mark that its way has now, or by none where that is no more: so did what goes
/// directly begin. TCP cannot go on by another, and its sockets here are ended.
fn move_known(kernel: &mut Kernel, flow: &Tracked, now: Option<u32>, mask: u32) {
    let is_tcp = flow.protocol == IPPROTO_TCP;
    let own = Mark { value: now.unwrap_or(0), mask };
    let done = match now.is_none() && !is_tcp && flow.is_translated() {
        true => kernel.release_entry(flow, own),
        false => kernel.mark_entry(flow, own),
    };
    if now.is_none() && is_tcp {
        kernel.end_connection(flow.from, flow.to);
    }
    if let Err(errno) = done {
        log!(Debug, "unable to mark the flow to {}: {}", flow.to, reason(errno));
    }
}

/// Has one known by no mark, as what goes directly begins, or as one that a proxy began: its remote host
/// may speak next, and has not begun it. What cannot go on so begins anew: what the remote host has begun,
/// and where others may translate what goes by a route.
fn lose_known(kernel: &mut Kernel, flow: &Tracked, was: Mark, config: &Config) {
    let spoofed = was.value == spoofed_mark(was.mask);
    let others = config.routes.iter().any(|route| !route.masquerades());
    let goes_on = flow.protocol == IPPROTO_UDP
        && !flow.is_query()
        && !(flow.is_translated() && others)
        && (spoofed || !kernel.way(flow.to.ip(), 0).here);
    match goes_on {
        true => {
            let now = spoofed.then(|| config.spoofed_mark());
            move_known(kernel, flow, now, was.mask | config.mask);
        }
        // it may have ended by itself
        false => drop(kernel.forget_entry(flow)),
    }
}

impl Daemon<'_> {
    /// Has the policy that comes leave the marks alone that flows are known by from before; those of
    /// another mask are `strange`.
    pub(super) fn make_way(&mut self, was: &[Known], strange: Vec<Mark>) {
        let policy = self.cgroups.core.config();
        let mut config = renumbered(was, policy);
        // what went directly was known by the whole of its mask, which may be a section's number by now
        let masks: SmallSet<u32> = strange.iter().map(|own| own.mask).collect();
        let taken = [policy.taken_marks(), config.taken_marks()].concat();
        let means = |mask: &u32| taken.iter().any(|own| mask & own.mask == own.value);
        let others = masks.into_iter().filter(|mask| *mask != config.mask && means(mask));
        config.unclear.extend(others.map(|mask| Mark { value: mask, mask }));
        config.unclear.extend(strange);
        self.cgroups.core.revise(Rc::new(config));
    }

    /// Flows begin to move, once the table is in force: to the marks that it has by now, and then to those
    /// that the policy says. What is unclear is nobody's from then on.
    pub(super) fn begin_moving(&mut self, policy: Rc<Config>) {
        let config = self.cgroups.core.config().clone();
        let moves = !(config.moving.is_empty() && config.unclear.is_empty());
        self.redirects.policy = Some(policy).filter(|_| moves);
        self.redirects.pass = None;
        self.kernel.list_entries();
    }

    fn replace_or_repair(&mut self) -> bool {
        let config = self.cgroups.core.config().clone();
        let done = self.add_routing(&config).and_then(|()| self.replace());
        if let Err(error) = &done {
            log!(Warning, "{error}; replacing the table");
            let now = Instant::now();
            self.table.want(now);
            self.ways.repair.want(now);
        }
        done.is_ok()
    }

    /// Moves some more flows, until `until`; true when that is done.
    fn go_on_moving(&mut self, until: Instant) -> bool {
        while let Some(policy) = self.redirects.policy.clone() {
            if self.table_is_out() || Instant::now() >= until {
                return false;
            }
            let config = self.cgroups.core.config().clone();
            // a connection that is forgotten while its socket is there may be one that the remote host begins
            if self.doubts.is_some() && !config.unclear.is_empty() {
                self.end_stale(SLICE);
                return false;
            }
            let concerns = |mark| config.unclear_as(mark).is_some() || config.moves(mark).is_some();
            match self.kernel.more_entries(|entry| concerns(entry.mark)) {
                Ok(Some(entries)) => {
                    entries.iter().for_each(|entry| match config.unclear_as(entry.mark) {
                        Some(was) => lose_known(&mut self.kernel, entry, was, &config),
                        None => {
                            let now = config.moves(entry.mark).flatten();
                            move_known(&mut self.kernel, entry, now, config.mask);
                        }
                    })
                }
                Err(error) if !config.unclear.is_empty() => {
                    log!(Debug, "{error}: flows begin anew");
                    let moving = config.moving.iter();
                    let moving = moving.map(|(value, _)| Mark { value: *value, mask: config.mask });
                    let all: Vec<Mark> = config.unclear.iter().copied().chain(moving).collect();
                    self.kernel.forget_flows(&all);
                    self.take_marks(policy);
                }
                // the table moves what it sees, for as long as it takes
                Err(error) => {
                    log!(Notice, "{error}: marks of sections stay other ones than they are to be");
                    self.redirects.policy = None;
                }
                // by their marks of now
                Ok(None) if self.doubts.is_some() => {
                    self.end_stale(SLICE);
                    return false;
                }
                Ok(None) => self.take_marks(policy),
            }
        }
        true
    }

    /// All flows have moved to the marks that there are: takes those that the policy says.
    fn take_marks(&mut self, policy: Rc<Config>) {
        let now = self.cgroups.core.config().clone();
        // a container may have come meanwhile
        let opened = now.has_containers() && !policy.has_containers();
        let policy = policy.with_containers().filter(|_| opened).map_or(policy, Rc::new);
        self.cgroups.core.revise(policy.clone());
        self.make_way(&Known::settled(&now), Vec::new());
        if self.replace_or_repair() {
            self.trim_routing();
        }
        self.begin_moving(policy);
    }

    /// Begins to have flows that began otherwise go by the routes that are theirs, and those of a route no
    /// more by one that is not. Once the table and the ways out are in force.
    pub(super) fn begin_redirecting(&mut self) {
        self.ways.changed = false;
        self.redirects.all = true;
        self.redirects.pass = None;
        self.hold_flows();
    }

    /// Whether that is to be waited for, or the look for stale sockets of which the table tells, which began
    /// at that time of the processor's; what takes longer is done later.
    pub(super) fn awaits_flows(&self, since: Duration) -> bool {
        let spent = used().saturating_sub(since);
        let flows = self.redirects.is_busy() && spent < LONGEST;
        (flows || self.unjudged && spent < super::FIRST_SLICE) && !self.table_is_out()
    }

    /// Waits for it before we are ready. Cgroups that come meanwhile are taken in.
    pub(super) fn await_flows(&mut self) {
        let since = used();
        self.begin_redirecting();
        while self.awaits_flows(since) {
            if !matches!(self.signals.end(), Ok(None)) || self.cgroups.drain().is_err() {
                return;
            }
            self.settle();
            self.hold_flows();
            self.end_stale(super::SLICE);
        }
    }

    fn begin_pass(&mut self) {
        self.redirects.all = false;
        let flows = Flows::of(&self.cgroups.core, &self.redirects.gone)
            .filter(|_| self.kernel.tells_flows());
        // those of late cgroups are among them
        self.redirects.late.clear();
        if flows.is_none() {
            self.redirects.gone.clear();
        }
        let entrances = &self.containers.entered;
        self.redirects.pass =
            flows.map(|flows| Pass::begin(&mut self.kernel, flows, entrances.clone()));
    }

    /// The same for cgroups that were found late, and what is left to do.
    pub(super) fn go_on_redirecting(&mut self) {
        let due = self.redirects.due();
        let now = Instant::now();
        if self.table_is_out() || due.is_none_or(|at| at > now) {
            return;
        }
        if !self.redirects.is_busy() {
            let outcomes = std::mem::take(&mut self.redirects.late);
            if !self.kernel.tells_flows() {
                return;
            }
            let flows = Flows::of_some(&self.cgroups.core, outcomes);
            let entrances = self.containers.entered.clone();
            self.redirects.pass = Some(Pass::begin(&mut self.kernel, flows, entrances));
        }
        self.hold_flows();
    }

    fn hold_flows(&mut self) {
        let until = Instant::now() + SLICE;
        if !self.go_on_moving(until) {
            return;
        }
        if self.redirects.all {
            self.begin_pass();
        }
        let redirects = &mut self.redirects;
        let Some(pass) = redirects.pass.as_mut() else {
            return;
        };
        if pass.go_on(&mut self.kernel, until) {
            if pass.moved > 0 {
                let moved = pass.moved;
                log!(Notice, "{moved} UDP flows that began another way go as they should");
            }
            redirects.gone.clear();
            redirects.rest = Some(Instant::now() + pass.spent * REST);
            redirects.pass = None;
        }
    }
}

/// What is listed: first whose the flows may be, as anybody may have 10,000s of sockets too.
enum Phase {
    /// The ports of the sockets of the cgroups in question.
    Ports(BTreeSet<u16>),
    /// Who has these ports; or all sockets.
    Owners(Option<BTreeSet<u16>>, Vec<SeenSocket>),
    Flows,
}

/// Conntrack's flows, on their way past the policy.
struct Pass {
    flows: Flows,
    phase: Phase,
    owners: Owners,
    /// The flows that were told of and have not had their turn.
    entries: Vec<Tracked>,
    /// Where packets to each source would go.
    ways: BTreeMap<IpAddr, Course>,
    /// By which port of a bridge.
    ports: BTreeMap<IpAddr, Option<u32>>,
    names: Option<HashMap<u32, String>>,
    entrances: Entrances,
    /// How many UDP flows were not known as they should be.
    moved: usize,
    spent: Duration,
}

impl Pass {
    fn begin(kernel: &mut Kernel, flows: Flows, entrances: Entrances) -> Pass {
        // where those of some cgroups are in question, that is all who share a port with these
        let cgroups = flows.cgroups();
        let few = cgroups.as_ref().filter(|cgroups| cgroups.len() <= FEW_CGROUPS);
        let ids = few.map_or(&[][..], |cgroups| cgroups);
        let phase = match cgroups {
            _ if !flows.ask_for_owners() => Phase::Flows,
            None => Phase::Owners(None, Vec::new()),
            Some(_) => Phase::Ports(BTreeSet::new()),
        };
        match phase {
            Phase::Flows => kernel.list_entries(),
            _ => kernel.list_sockets(Asker::Flows, &[IPPROTO_UDP], UDP_STATES, ids),
        }
        Pass {
            flows,
            phase,
            owners: Owners::default(),
            entries: Vec::new(),
            ways: BTreeMap::new(),
            ports: BTreeMap::new(),
            names: None,
            entrances,
            moved: 0,
            spent: Duration::ZERO,
        }
    }

    /// Has conntrack know flows as they should be known by now, until `until`; true when that is done.
    fn go_on(&mut self, kernel: &mut Kernel, until: Instant) -> bool {
        let before = used();
        let mut more = true;
        while more {
            match self.entries.pop() {
                Some(entry) => self.hold(kernel, &entry),
                None => more = self.list(kernel),
            }
            if Instant::now() >= until {
                break;
            }
        }
        self.spent += used().saturating_sub(before);
        !more
    }

    /// Lists some more; false where there are no more.
    fn list(&mut self, kernel: &mut Kernel) -> bool {
        let flows = &self.flows;
        let more = match &mut self.phase {
            Phase::Ports(ports) => kernel.more_sockets(Asker::Flows, &mut |socket| {
                if socket.cgroup.is_some_and(|cgroup| flows.asks_of(cgroup)) {
                    ports.insert(socket.local.port());
                }
            }),
            Phase::Owners(ports, sockets) => kernel.more_sockets(Asker::Flows, &mut |socket| {
                if ports.as_ref().is_none_or(|ports| ports.contains(&socket.local.port())) {
                    sockets.push(socket);
                }
            }),
            Phase::Flows => return self.list_flows(kernel),
        };
        if !more {
            self.phase = match std::mem::replace(&mut self.phase, Phase::Flows) {
                Phase::Ports(ports) if !ports.is_empty() => {
                    kernel.list_sockets(Asker::Flows, &[IPPROTO_UDP], UDP_STATES, &[]);
                    Phase::Owners(Some(ports), Vec::new())
                }
                last => {
                    if let Phase::Owners(_, sockets) = last {
                        self.owners = Owners::new(sockets);
                    }
                    kernel.list_entries();
                    Phase::Flows
                }
            };
        }
        true
    }

    fn list_flows(&mut self, kernel: &mut Kernel) -> bool {
        let (flows, owners) = (&self.flows, &self.owners);
        let concerns = |entry: &Tracked| {
            let datagrams = [IPPROTO_UDP, IPPROTO_ICMP, IPPROTO_ICMPV6];
            if !datagrams.contains(&entry.protocol) || entry.zone.is_some() {
                return false;
            }
            let owned = entry.protocol != IPPROTO_UDP || owners.has(entry.from.port());
            let known = flows.forwards() || flows.ask_for_owners() && owned;
            known || flows.is_lost(entry) || flows.released(entry).is_some()
        };
        match kernel.more_entries(concerns) {
            Ok(Some(entries)) => {
                self.entries = entries;
                true
            }
            Ok(None) => false,
            Err(error) => {
                let so = match flows.ask_for_owners() {
                    true => {
                        "what a UDP socket of a chosen port sends is dropped after its cgroup got \
                         a route"
                    }
                    false => "a UDP flow whose port is listed no more stays proxied",
                };
                log!(Notice, "{error}: {so}, until it pauses");
                false
            }
        }
    }

    /// Of pings nobody tells whose they are: all begin anew, which they do not notice.
    fn hold(&mut self, kernel: &mut Kernel, entry: &Tracked) {
        if entry.protocol != IPPROTO_UDP || self.flows.is_lost(entry) {
            let _ = kernel.forget_entry(entry);
            return;
        }
        let Pass { flows, owners, ways, ports, names, entrances, .. } = self;
        let from = entry.from.ip();
        let way = *ways.entry(from).or_insert_with(|| kernel.way(from, 0));
        let cure = match way.here {
            true => {
                let owner = owners.of(entry.from, entry.to);
                let cure = owner.and_then(|socket| flows.own(entry, socket));
                cure.or_else(|| flows.released(entry))
            }
            false if flows.forwards() => {
                let names =
                    names.get_or_insert_with(|| kernel.interface_names().unwrap_or_default());
                names.get(&way.device).and_then(|name| {
                    let port = match entrances.bridges.contains(name) {
                        // nobody tells any more whose it was, or it stays on the bridge
                        true if kernel.way(entry.to.ip(), 0).device == way.device => None,
                        true => *ports.entry(from).or_insert_with(|| kernel.port(way.device, from)),
                        false => Some(way.device),
                    };
                    let container = entrances.veths.get(&port?).map(|(_, target)| *target);
                    flows.routed(entry, name, container)
                })
            }
            false => None,
        };
        let done = match cure {
            None => return,
            Some(Cure::Forget) => kernel.forget_entry(entry),
            Some(Cure::Release(mark)) => kernel.release_entry(entry, mark),
            Some(Cure::Mark(mark)) => kernel.mark_entry(entry, mark),
            Some(Cure::Move { mark, route }) => relocate(kernel, entry, mark, flows.way(route)),
        };
        match done {
            Ok(()) => self.moved += 1,
            // it has ended by itself
            Err(Errno::ENOENT) => {}
            Err(errno) => {
                let (from, to) = (entry.from, entry.to);
                log!(Debug, "unable to move the flow from {from} to {to}: {}", reason(errno));
            }
        }
    }
}

/// `own` is the mark that the flow is to have; the route is known by the mark of what this host sends
/// by it, and by its interface. While there is no way, the flow stays what it is, and the table drops
/// what it sends.
fn relocate(
    kernel: &mut Kernel,
    entry: &Tracked,
    own: Mark,
    (sent, interface): (u32, &str),
) -> Result<(), Errno> {
    let way = kernel.way(entry.to.ip(), sent);
    let is_it = || kernel.links().iter().any(|l| l.name == interface && l.index == way.device);
    match way.source.filter(|_| !way.here && (interface.is_empty() || is_it())) {
        Some(source) => kernel.move_entry(entry, own, source),
        None => Err(Errno::ENOENT),
    }
}
