//! `run`: the only module that joins I/O to the core. It owns the descriptors, waits in one
//! poll(2), hands what happened to the core, does what the core asks, and commits one transaction a
//! wake-up, or one more for each level of nested cgroups that it discovers.

mod containers;
mod doubts;
mod redirect;
mod ways;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use crate::backoff::{Backoff, Looks, Reminder};
use crate::cgroup::core::Core;
use crate::cgroup::dying::Dying;
use crate::cgroup::follow::{Cgroups, Levels, TURN_TIME};
use crate::cgroup::mount;
use crate::config::{Config, OnExit, Place, Route, Target};
use crate::confine::confine;
use crate::error::{Error, Result};
use crate::faults;
use crate::host;
use crate::instance;
use crate::kernel::sockets::{self, Asker};
use crate::kernel::{Damage, Inventory, Kernel};
use crate::log;
use crate::log::Level;
use crate::loops;
use crate::memory;
use crate::net::Mark;
use crate::netlink::diag::SeenSocket;
use crate::netlink::uapi::{IPPROTO_TCP, IPPROTO_UDP};
use crate::nft::lock::Lock;
use crate::nft::marks::Ours;
use crate::nft::message::Transaction;
use crate::nft::stmt::cgroup_hash;
use crate::nft::table::{unjudged_chain, Deed, Deeds, Entrances};
use crate::nft::view;
use crate::notify::Notify;
use crate::options::Options;
use crate::pidfile::Pidfile;
use crate::plan;
use crate::signals::{End, Signals};
use crate::small::SmallSet;
use crate::stale::flows::Known;
use crate::stale::{self, Before, Judge, Suspects};
use crate::sys;
use crate::tunnels;

use containers::{used, Search};
use doubts::Doubts;
use redirect::Redirects;
use ways::Ways;

/// Events that a full inotify queue holds, and some that come meanwhile.
const FULL_QUEUE: usize = 20_000;

/// How long sockets are judged and ended before anything else has its turn.
const SLICE: Duration = Duration::from_millis(5);

/// The same before we are ready: what is not done by then is done soon after.
const FIRST_SLICE: Duration = Duration::from_millis(100);

/// How long what is found with others waits for these before its sockets are judged.
const LONGEST_BATCH: Duration = Duration::from_secs(1);

/// How often every descriptor is read where they cannot be polled.
const LOOK_BLINDLY: Duration = Duration::from_millis(50);

/// What the kernel tells of its levels, where that is not known beforehand.
///
/// Errors: nothing would match.
fn ask_levels(kernel: &mut Kernel) -> Result<Levels> {
    match levels(kernel)? {
        Ok(namespace) => Ok(Levels { namespace, deepest: None }),
        Err(why) => {
            log!(
                Warning,
                "{why}: levels of cgroups are taken to begin at the root of the namespace, as newer \
                 kernels have it"
            );
            Ok(Levels::default())
        }
    }
}

/// At which level the kernel sees the root of our cgroup namespace, or why that is not known.
///
/// Errors: nothing would match.
pub fn levels(kernel: &mut Kernel) -> Result<std::result::Result<usize, Error>> {
    if mount::find_first_namespace() {
        return Ok(Ok(0));
    }
    let unknown = || {
        let why = "unable to match cgroups from here: this process is outside of the part of the \
                   tree that its cgroup namespace shows, so that nothing tells how the kernel \
                   counts levels";
        Error::State(why.into())
    };
    let own = mount::find_own_level().ok_or_else(unknown)?;
    // some more for what is above the namespace, from where older kernels count
    let most = (own as u32 + 32).min(200);
    match kernel.own_level(most) {
        Err(why) => Ok(Err(why)),
        Ok(level) => match level.and_then(|level| (level as usize).checked_sub(own)) {
            None => Err(unknown()),
            Some(base) => Ok(Ok(base)),
        },
    }
}

struct Daemon<'a> {
    options: &'a Options,
    pidfile: Option<Pidfile>,
    signals: &'a mut Signals,
    levels: Levels,
    /// Tells of mounts.
    mounts: Option<File>,
    kernel: Kernel,
    cgroups: Cgroups,
    /// What has been done since there is a table of ours, by whichever daemon.
    deeds: Deeds,
    /// Replacing the table, where it is not what it should be.
    table: Backoff,
    ways: Ways,
    /// What has been told of the ways of others.
    told: SmallSet<String>,
    /// When to look for chains of others that break ours.
    look_at_others: Option<Instant>,
    /// When to look for loops, and which have been told.
    loops: Looks,
    notify: &'a mut Notify,
    /// Sockets that may have to be ended.
    doubts: Option<Doubts>,
    /// The table tells that not all sockets have been judged by what it has.
    unjudged: bool,
    /// Looking for those of cgroups that were found late.
    late: Backoff,
    /// The table was in others' hands: packets may have gone as if there was none.
    exposed: bool,
    redirects: Redirects,
    /// The cgroups that sockets hold, as far as those have been listed by now.
    kept: Option<SmallSet<u64>>,
    /// A policy was taken at that time of the processor's, and waits for its flows.
    taken: Option<Duration>,
    /// The table reckons with br_netfilter.
    again: bool,
    /// poll(2) was refused the last time.
    refused: bool,
    containers: Search,
}

/// What poll(2) found.
#[derive(Default)]
struct Ready {
    signals: bool,
    cgroups: bool,
    mounts: bool,
    /// A process has joined a cgroup that held none.
    vacant: bool,
    kernel: bool,
}

/// Runs until SIGTERM, SIGINT or SIGUSR2.
///
/// Errors: what made it impossible to start, unless it is to wait; what remained in the kernel at
/// the end. Later refusals of the kernel are logged and tried again.
pub fn run(mut options: Options, ready_fd: Option<OwnedFd>) -> Result<()> {
    // before anything is set up, so that none kills us half-way
    let mut signals = Signals::block()?;
    // the watcher changes the working directory
    options.absolute();
    sys::ignore_file_size_signal();
    let mut notify = Notify::new(ready_fd);
    let mut retry = Backoff::default();
    let mut reminder = Reminder::default();
    let begun = loop {
        let began = Instant::now();
        match begin(&options, &mut signals, &mut notify) {
            Ok(begun) => break begun,
            Err(error) if !options.wait => return Err(error),
            Err(error) => {
                let now = Instant::now();
                let pause = retry.failed(began, now);
                let text = error.to_string();
                if reminder.is_due(&text, now) {
                    text.lines().for_each(|line| log!(Error, "{line}"));
                    log!(Error, "unable to start yet, trying again at least once a minute");
                }
                if !wait_to_retry(&mut signals, now + pause)? {
                    log!(Notice, "stopped before it could start; what was in force stays so");
                    return Ok(());
                }
            }
        }
    };
    let Some(mut daemon) = begun else {
        log!(Notice, "stopped while it started");
        return Ok(());
    };
    // what cannot go on leaves its rules, and says so
    daemon.serve().inspect_err(|_| drop(daemon.leave()))
}

/// One try to start. What is in force from an earlier run stays so where it fails; `None` where the
/// end is wanted first.
fn begin<'a>(
    options: &'a Options,
    signals: &'a mut Signals,
    notify: &'a mut Notify,
) -> Result<Option<Daemon<'a>>> {
    let config = options.load_or_default(true)?;
    log::configure(config.log_level.louder(options.verbose), options.syslog);
    let pidfile = options.pidfile.clone().map(Pidfile::new).transpose()?;
    let mut kernel = Kernel::open_watching(&plan::needs(&config))?;
    let Some(old_lock) = instance::claim(&mut kernel, signals)? else {
        return Ok(None);
    };
    let on_exit = config.on_exit;
    let mounts = File::open("/proc/self/mountinfo").ok();
    let scanned = ask_levels(&mut kernel).and_then(|levels| {
        Ok(follow(Rc::new(config), &levels, signals)?.map(|cgroups| (levels, cgroups)))
    });
    let scanned = scanned.inspect_err(|_| instance::give_back(&mut kernel, old_lock))?;
    let Some((levels, cgroups)) = scanned else {
        // what another instance has left in force is ours to remove as well, or to leave
        match signals.end()? {
            Some(End::Stop) if on_exit == OnExit::Remove => remove(&mut kernel)?,
            _ => instance::give_back(&mut kernel, old_lock),
        }
        return Ok(None);
    };
    let mut daemon = Daemon {
        options,
        pidfile,
        signals,
        levels,
        mounts,
        kernel,
        cgroups,
        deeds: Deeds::default(),
        table: Backoff::default(),
        ways: Ways::default(),
        told: SmallSet::default(),
        look_at_others: None,
        loops: Looks::default(),
        notify,
        doubts: None,
        unjudged: false,
        late: Backoff::default(),
        exposed: false,
        redirects: Redirects::default(),
        kept: None,
        taken: None,
        again: false,
        refused: false,
        containers: Search::default(),
    };
    daemon.start(old_lock)?;
    Ok(Some(daemon))
}

/// Follows every cgroup that there is; `None` where the end is wanted first.
fn follow(config: Rc<Config>, levels: &Levels, signals: &mut Signals) -> Result<Option<Cgroups>> {
    let mut cgroups = Cgroups::follow(config, levels)?;
    while cgroups.work() > 0 {
        if signals.end()?.is_some() {
            return Ok(None);
        }
    }
    cgroups.begin()?;
    Ok(Some(cgroups))
}

/// Waits until `due`, or for SIGHUP; false where a signal ends the program before it has begun.
fn wait_to_retry(signals: &mut Signals, due: Instant) -> Result<bool> {
    loop {
        if signals.end()?.is_some() {
            return Ok(false);
        }
        // SIGUSR1 finds nothing to tell of
        let (now, _) = (Instant::now(), signals.status());
        if signals.reload() || now >= due {
            return Ok(true);
        }
        let left = (due - now).as_millis() as u32 + 1;
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(signals.fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::system("unable to wait for the next try", errno)),
        }
    }
}

impl Daemon<'_> {
    /// Programs the kernel and says that it is ready.
    ///
    /// Errors: why not. Nothing is left behind, but for what was in force before: where there was a
    /// table, one is in force still, and the lock says again what it said.
    fn start(&mut self, old_lock: Option<Lock>) -> Result<()> {
        let found = self.kernel.table_owner()?.is_some();
        let started = self.program();
        if started.is_err() {
            self.remove_pidfile();
            match found {
                true => instance::give_back(&mut self.kernel, old_lock),
                false => drop(remove(&mut self.kernel)),
            }
            return started;
        }
        self.notify.ready();
        self.warn();
        self.cgroups.proxied = false;
        log!(Notice, "started: {}", self.summary());
        if self.kernel.can_keep_dying() {
            self.cgroups.core.keep_dying([]);
            // some may be matched by their hashes from now on: nft cannot show their paths
            self.commit();
            if self.cgroups.passing.is_some() {
                self.let_packets_pass();
            }
        }
        Ok(())
    }

    /// Programs the kernel, takes in the cgroups that came meanwhile, and gives up what is not needed
    /// from here on.
    fn program(&mut self) -> Result<()> {
        let config = self.admit();
        if !self.cgroups.core.has_elements() {
            // nothing in the table would show it yet
            self.kernel.probe_cgroups()?;
        }
        let before = self.take_over();
        let (policy, config) = (config, self.cgroups.core.config().clone());
        if before.is_none() {
            let suspects = Suspects::find(&self.cgroups.core, None, |_| true);
            doubts::tell_inbound(&mut self.kernel, &suspects);
            self.tell_spoofed();
        }
        let mut open = match before.is_some() {
            true => self.kernel.recall_localnet(),
            false => Vec::new(),
        };
        // whoever left that table may have left the look for stale sockets open too
        let judged = !std::mem::replace(&mut self.unjudged, true);
        let routed = self.add_routing(&config);
        if let Err(error) = routed.and_then(|()| self.replace()) {
            self.undo_routing();
            return Err(error);
        }
        if self.kernel.watch_table()? {
            self.replace()?;
        }
        if before.is_none() || !judged {
            // and what they said until there was one
            self.tell_spoofed();
        }
        open.retain(|name| {
            let of = |route: &Route| route.interface == *name && route.sends_from_loopback();
            !config.routes.iter().any(of)
        });
        self.kernel.set_localnet(open.iter().map(String::as_str), false);
        self.begin_moving(policy);
        let removed = self.trim_routing();
        if removed > 0 {
            log!(Notice, "removed {removed} stale ip rules and routes");
        }
        self.forget_routes();
        // what came meanwhile; not for ever, where events come faster than they can be taken
        let mut taken = 0;
        while taken < FULL_QUEUE && self.signals.end()?.is_none() {
            match self.cgroups.drain()? + self.cgroups.work() {
                0 => break,
                some => taken += some,
            }
        }
        self.settle();
        // a table of before was in force all the time, so that nothing changed for the same target
        self.suspect_all(before.filter(|_| judged), FIRST_SLICE);
        // they were among these
        self.cgroups.core.take_late();
        self.await_flows();
        self.pidfile.as_ref().map_or(Ok(()), Pidfile::write)?;
        confine(!self.options.no_seccomp)?;
        memory::wait();
        Ok(())
    }

    /// Goes on with what a table of before has of removed cgroups, what it counts, and what it knows flows
    /// by. Returns what it does with each cgroup; `None` where there is no table.
    fn take_over(&mut self) -> Option<Before> {
        let inventory = match self.kernel.inventory() {
            Ok(inventory) => inventory?,
            Err(error) => {
                log!(Debug, "{error}");
                return None;
            }
        };
        if inventory.view.foreign {
            log!(Warning, "{}: it is replaced", view::FOREIGN);
            self.kernel.foreign = true;
            return None;
        }
        if !inventory.view.classifies {
            // a daemon was killed before it had put in any rule
            return None;
        }
        let kept = removed(&inventory, &self.cgroups.core);
        if !kept.is_empty() {
            self.cgroups.core.keep_dying(kept);
            self.cgroups.await_death();
        }
        self.deeds = inventory.deeds.unwrap_or_default();
        let view = &inventory.view;
        self.unjudged = view.unjudged;
        let default = (&*view.default, view.default_class);
        let owners = view.owners.iter().map(|o| (o.class, o.owner, &*o.target));
        let before = Before::of_table(&self.cgroups.core, default, owners, inventory.outcomes());
        let mask = self.cgroups.core.config().mask;
        let strange = view.taken_marks().into_iter().filter(|mark| mark.mask != mask);
        self.make_way(&Known::of_view(view, mask), strange.collect());
        Some(before)
    }

    /// What proxies have said while there was no table, to applications whose flows conntrack had
    /// forgotten with that, makes what these say no answers.
    fn tell_spoofed(&mut self) {
        let config = self.cgroups.core.config();
        self.kernel.tell_spoofed(Mark { value: config.spoofed_mark(), mask: config.mask });
    }

    /// Looks for stale sockets in all cgroups, whose targets take what they took before.
    fn suspect_all(&mut self, before: Option<Before>, slice: Duration) {
        let suspects = Suspects::find(&self.cgroups.core, before, |_| true);
        self.look_for_stale(suspects, slice);
    }

    /// Ends sockets of these cgroups that go another way than they should by now, so that their
    /// programs connect again at once; packets alone would have them wait until they give up.
    fn look_for_stale(&mut self, suspects: Suspects, slice: Duration) {
        let config = self.cgroups.core.config().clone();
        let moves = self.kernel.tells_flows();
        let judge = Judge::new(config, suspects, sockets::chosen_ports(), moves);
        self.doubts = Doubts::begin(&mut self.kernel, judge);
        self.end_stale(slice);
    }

    /// The same for cgroups that were found late: what they began meanwhile went their parents' way.
    /// Those of one batch at once, and no more often than a share of the time allows.
    fn look_at_late(&mut self) {
        let now = Instant::now();
        if !self.cgroups.core.has_late() {
            if self.late.due().is_some() {
                self.late.done(now, now);
            }
            return;
        }
        self.late.want(now);
        let rest = if self.cgroups.is_busy() { LONGEST_BATCH } else { Duration::ZERO };
        let due = self.late.due().is_some_and(|at| at + rest <= now);
        if due && self.doubts.is_none() && !self.table_is_out() {
            let ways = self.cgroups.core.take_late();
            self.redirects.want_late(&self.cgroups.core, &ways);
            self.look_for_stale(Suspects::late(&self.cgroups.core, &ways), SLICE);
            self.late.done(now, Instant::now());
        }
    }

    fn end_stale(&mut self, slice: Duration) {
        if let Some(doubts) = &mut self.doubts {
            if !doubts.go_on(&mut self.kernel, Instant::now() + slice) {
                return;
            }
            if doubts.ended > 0 {
                log!(Notice, "ended {} sockets whose way has changed", doubts.ended);
            }
            self.doubts = None;
        }
        if self.unjudged && !self.table_is_out() {
            self.unjudged = false;
            let judged = plan::judged(self.kernel.batch());
            self.commit_or_repair(judged);
        }
    }

    /// Asks some more sockets which cgroups they hold, where removed ones are in question: a datagram of
    /// the kernel at a time, as anybody may have 10,000s of them and there is no hurry.
    fn list_kept(&mut self) {
        let Some(kept) = &mut self.kept else {
            return;
        };
        let mut take = |socket: SeenSocket| {
            socket.cgroup.map(|id| kept.insert(id));
        };
        if self.kernel.more_sockets(Asker::Dying, &mut take) {
            return;
        }
        let kept = self.kept.take().filter(|_| self.kernel.told_all_sockets(Asker::Dying));
        if let Some(kept) = kept {
            self.cgroups.core.kept(kept);
        }
    }

    /// Says which chains of other programs break what goes to a tproxy, or what is new of that.
    fn warn_of_others(&mut self, all: bool) {
        self.look_at_others = None;
        let config = self.cgroups.core.config();
        if config.tproxies.is_empty() && !config.has_containers() {
            return;
        }
        let entered = &self.containers.entered;
        let veths = entered.veths.values().map(|(name, _)| name.clone());
        let ours = Ours::of(config).entered_by(veths.chain(entered.bridges.clone()));
        match self.kernel.others(&ours) {
            Ok(found) => found.into_iter().for_each(|line| {
                if self.told.insert(line.clone()) || all {
                    log!(limited::Warning, "{line}");
                }
            }),
            Err(error) => log!(Debug, "{error}"),
        }
    }

    /// Says what is in force but cannot work as things are on this host.
    fn warn(&mut self) {
        let config = self.cgroups.core.config().clone();
        self.warn_of_others(true);
        let found = self.find_loops();
        self.loops.asked(Instant::now());
        self.loops.news(found.clone());
        for line in found.into_iter().chain(faults::idle(&config)) {
            log!(Warning, "{line}");
        }
    }

    /// Loops, and sockets that go past where they are to go. Of tunnels, those of the kernel: who holds
    /// an interface is not for a daemon that has given up its rights to see.
    fn find_loops(&mut self) -> Vec<String> {
        let config = self.cgroups.core.config().clone();
        let ports = config.tproxies.iter().map(|tproxy| tproxy.port);
        let listeners: Vec<_> = ports.map(|port| self.kernel.listeners(port)).collect();
        let ids = listeners.iter().flatten().map(|listener| listener.cgroup);
        let mut lines = loops::find(&config, &listeners, self.cgroups.core.homes(ids));
        lines.extend(tunnels::of_the_kernel(&config, self.kernel.links()));
        if config.outlets().next().is_some() {
            lines.extend(faults::bound(&config, &self.kernel.glance(), &self.cgroups.core));
        }
        lines
    }

    /// Tells of loops that have begun, and the like, a little after a cgroup has come in which that may
    /// be: its processes listen later. No event tells of those that begin in one that was there: what
    /// else wakes us does.
    fn look_for_loops(&mut self, woken: bool) {
        let now = Instant::now();
        if std::mem::take(&mut self.cgroups.proxied) {
            self.loops.want(now);
        }
        if woken && self.cgroups.core.config().outlets().next().is_some() {
            self.loops.wake(now);
        }
        if self.loops.due().is_some_and(|at| at <= now) {
            self.loops.done(now);
            let found = self.find_loops();
            for line in self.loops.news(found) {
                log!(limited::Warning, "{line}");
            }
        }
    }

    fn serve(&mut self) -> Result<()> {
        loop {
            let ready = self.wait();
            if ready.signals || self.signals.pending() {
                match self.signals.end()? {
                    None => {}
                    Some(End::Stop) => return self.stop(),
                    Some(End::Leave) => return self.leave(),
                }
            }
            if memory::waited() {
                log!(Warning, "memory had run out; raise the limit (ulimit -v)");
            }
            if ready.cgroups || self.cgroups.has_events() {
                self.cgroups.drain()?;
            }
            if ready.mounts || std::mem::take(&mut self.cgroups.in_doubt) {
                self.look_at_root();
            }
            let now = Instant::now();
            self.look_again(now);
            self.repair(now, ready.kernel);
            self.settle();
            if self.ways.changed {
                self.begin_redirecting();
            }
            self.attend_to_containers(ready.kernel, ready.vacant);
            self.look_at_late();
            self.go_on_redirecting();
            self.end_stale(SLICE);
            if self.signals.status() {
                // somebody asks, so whatever the level is
                log::write(Level::Notice, format_args!("status: {}", self.summary()));
                self.warn();
                self.ways.routing.hindrances.iter().for_each(|line| log!(Warning, "{line}"));
            }
            match self.cgroups.core.drafted() {
                // one after the other, so that each is in force some time
                _ if self.taken.is_some() => self.end_reload(),
                Some(_) => self.go_on_reloading(),
                None if self.redirects.is_moving() && !self.table_is_out() => {}
                None if self.signals.reload() => self.reload(),
                None => {}
            }
            self.look_for_loops(ready.cgroups || ready.mounts || ready.kernel);
        }
    }

    /// Waits until something is ready, or due. Where the kernel refuses to poll (no memory, or more
    /// descriptors than may be open by now), everything is looked at after a short pause.
    fn wait(&mut self) -> Ready {
        let mut ready = Ready::default();
        let fd = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let cgroups = self.cgroups.watcher.fd();
        let mut fds = Vec::with_capacity(8);
        fds.push(fd(self.signals.fd()));
        fds.extend(cgroups.map(fd));
        let mounts = self.mounts.as_ref();
        fds.extend(mounts.map(|file| PollFd::new(file.as_fd(), PollFlags::POLLPRI)));
        let vacant = self.containers.vacant.fd();
        fds.extend(vacant.map(fd));
        fds.extend(self.kernel.event_fds().map(fd));
        match poll(&mut fds, self.timeout()) {
            Ok(_) => {
                let mut any = fds.iter().map(|fd| fd.any().unwrap_or(true));
                let mut next = |there: bool| there && any.next().unwrap_or(false);
                ready.signals = next(true);
                ready.cgroups = next(cgroups.is_some());
                ready.mounts = next(mounts.is_some());
                ready.vacant = next(vacant.is_some());
                ready.kernel = any.any(|ready| ready);
                self.refused = false;
            }
            Err(Errno::EINTR) => {}
            Err(errno) => {
                if !std::mem::replace(&mut self.refused, true) {
                    let (why, every) = (crate::error::reason(errno), LOOK_BLINDLY.as_millis());
                    log!(Warning, "unable to poll: {why}, looking every {every} ms");
                }
                let _ = poll(&mut [], LOOK_BLINDLY.as_millis() as u16);
                ready = Ready {
                    signals: true,
                    cgroups: true,
                    mounts: true,
                    vacant: true,
                    kernel: true,
                };
            }
        }
        ready
    }

    /// Until the next retry that is due; none at all where nothing is pending.
    fn timeout(&self) -> PollTimeout {
        let waiting = self.cgroups.is_busy();
        let drafted = self.cgroups.core.drafted().is_some();
        // which wait for the table
        let there = !self.table_is_out();
        // the shortest pause is a long one where the processor is another's
        let flows = there && self.redirects.is_busy();
        let lists = self.doubts.is_some() || self.kept.is_some() || flows;
        if waiting || drafted || lists || self.signals.pending() {
            return PollTimeout::ZERO;
        }
        let late = self.late.due().filter(|_| there);
        let redirects = self.redirects.due().filter(|_| there);
        let due = [
            self.cgroups.due(),
            self.containers.due(),
            self.look_at_others,
            self.table.due(),
            self.ways.repair.due(),
            self.loops.due(),
            redirects,
            late,
        ];
        match due.into_iter().flatten().min() {
            None => PollTimeout::NONE,
            Some(at) => {
                // rounded up, so that it is due when poll returns
                let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
                PollTimeout::try_from(left.min(60_000) as u32).unwrap_or(PollTimeout::MAX)
            }
        }
    }

    /// Takes the looks that are due: where watching was not possible, at the chains of others, at what
    /// removed cgroups have left.
    fn look_again(&mut self, now: Instant) {
        if self.cgroups.is_look_due(now) {
            match self.cgroups.lost {
                false => self.cgroups.core.retry(),
                true => self.look_at_root(),
            }
        }
        if self.look_at_others.is_some_and(|at| at <= now) {
            self.warn_of_others(false);
        }
        self.cgroups.tidy(now);
        if self.cgroups.passing.is_some_and(|at| at <= now) {
            self.let_packets_pass();
        }
        if self.cgroups.look_at_dying(now) {
            self.kept = Some(SmallSet::default());
            self.kernel.list_sockets(Asker::Dying, &[IPPROTO_TCP, IPPROTO_UDP], u32::MAX, &[]);
        }
        self.list_kept();
    }

    /// Takes in what the kernel has told of others, and repairs what they destroyed, as soon as it is due.
    fn repair(&mut self, now: Instant, notified: bool) {
        let damage = match notified {
            true => self.kernel.damage(&plan::needs(self.cgroups.core.config())),
            false => Damage::default(),
        };
        if let Some(culprit) = damage.table {
            if !self.table_is_out() {
                log!(limited::Notice, "the table was changed by {culprit}");
            }
            self.table.want(now);
            self.exposed = true;
        }
        if notified && (damage.bridge || !self.again) && host::filters_bridges() {
            self.precede();
        }
        if damage.routing || damage.revived {
            self.ways.repair.want(now);
        }
        if damage.revived {
            self.ways.repair.hasten(now);
        }
        if self.ways.repair.due().is_some_and(|at| at <= now) {
            self.repair_routing();
        }
        if self.table.due().is_some_and(|at| at <= now) {
            self.repair_table();
        }
    }

    /// Looks whether the cgroup root is what it was: it may have been removed and made again, or be
    /// another mount.
    fn look_at_root(&mut self) {
        let root = &self.cgroups.root;
        let same = mount::find_identity(&root.dir) == Ok(root.identity);
        if same && !self.cgroups.lost {
            return;
        }
        let config = self.cgroups.core.config().clone();
        match follow(config, &self.levels, self.signals) {
            Ok(Some(mut fresh)) => {
                fresh.adopt_dying(&self.cgroups);
                if let Some(next) = self.cgroups.core.drafted() {
                    fresh.core.draft(next.clone());
                }
                let dir = fresh.root.dir.display();
                log!(
                    Notice,
                    "cgroup root {dir} is there anew: cgroups: {}",
                    fresh.core.tree().len()
                );
                self.cgroups = fresh;
                self.unjudged = true;
                self.repair_table();
                // until now they went by the default
                let before = Before::of_default(self.cgroups.core.config());
                let before = Some(before).filter(|_| self.doubts.is_none());
                self.suspect_all(before, SLICE);
                self.begin_redirecting();
            }
            Ok(None) => {}
            Err(error) => {
                if self.cgroups.lose() {
                    log!(Error, "{error}; nothing is classified until it is there again");
                }
            }
        }
    }

    /// Commits what is known, then watches what is new, and so on where that finds children; not
    /// for ever, where a user makes them as fast as they are found.
    fn settle(&mut self) {
        self.commit();
        let start = Instant::now();
        while self.cgroups.work() > 0 {
            self.commit();
            if start.elapsed() >= TURN_TIME {
                return;
            }
        }
    }

    /// The table is not what it should be: its replacement is wanted, at a time of its own, and will
    /// have whatever changes until then.
    fn table_is_out(&self) -> bool {
        self.table.due().is_some()
    }

    /// Commits the net difference. Where the kernel refuses it, the table is not what we think it
    /// is: replace it.
    fn commit(&mut self) {
        if self.table_is_out() {
            return;
        }
        let delta = self.cgroups.take_delta();
        if !delta.is_empty() {
            let change = plan::change(self.cgroups.core.config(), &delta, self.kernel.batch());
            self.commit_or_repair(change);
        }
        self.cgroups.core.reuse(delta);
    }

    /// Deletes what was kept for packets that were on their way.
    fn let_packets_pass(&mut self) {
        self.cgroups.passing = None;
        self.kernel.await_packets();
        self.cgroups.core.packets_have_passed();
        self.commit();
    }

    /// For a table that is not known to be out, which is replaced at once where that proves wrong.
    /// False where it has been, or is to be, replaced.
    fn commit_or_repair(&mut self, transaction: Transaction) -> bool {
        let done = self.kernel.commit(transaction);
        if let Err(error) = &done {
            log!(Warning, "{error}; replacing the table");
            self.repair_table();
        }
        done.is_ok()
    }

    fn repair_table(&mut self) {
        let began = Instant::now();
        self.unjudged |= self.exposed;
        match self.replace_for(Deed::TableRepair) {
            Ok(()) => {
                self.forget_routes();
                self.table.done(began, Instant::now());
                self.loops.want(Instant::now());
                log!(limited::Notice, "the table is in force again");
                if std::mem::take(&mut self.exposed) {
                    self.tell_spoofed();
                    self.suspect_all(None, SLICE);
                    self.begin_redirecting();
                }
            }
            Err(error) => {
                let pause = self.table.failed(began, Instant::now()).as_secs();
                log!(Error, "{error}; trying again in {pause} s");
            }
        }
    }

    /// Counts a deed in the transaction that is it.
    fn replace_for(&mut self, deed: Deed) -> Result<()> {
        let counted = self.deeds;
        self.deeds[deed as usize] = counted[deed as usize].saturating_add(1);
        self.replace().inspect_err(|_| self.deeds = counted)
    }

    /// The same for one that needs no transaction.
    fn count(&mut self, deed: Deed) {
        let count = &mut self.deeds[deed as usize];
        *count = count.saturating_add(1);
        if self.table_is_out() {
            // the replacement will tell
            return;
        }
        let told = plan::count(&self.deeds, self.kernel.batch());
        self.commit_or_repair(told);
    }

    /// A bridge has come, or br_netfilter: what that hooks in is ahead of ours.
    fn precede(&mut self) {
        self.again = true;
        let again = plan::again(self.cgroups.core.config(), self.kernel.batch());
        if let Some(again) = again.filter(|_| !self.table_is_out()) {
            self.commit_or_repair(again);
        }
    }

    fn put(&mut self, entrances: &Entrances) -> Result<()> {
        let snapshot = self.cgroups.core.snapshot();
        let config = self.cgroups.core.config();
        self.again = host::filters_bridges();
        let (deeds, again) = (self.deeds, self.again);
        let mut contents =
            plan::contents(config, snapshot, entrances, &self.ways.devices, deeds, again);
        contents.table.chains.extend(self.unjudged.then(unjudged_chain));
        self.kernel.replace(&contents)
    }

    fn replace(&mut self) -> Result<()> {
        let mut entrances = self.entrances();
        let mut done = self.put(&entrances);
        if done.is_err() && !entrances.veths.is_empty() {
            // one of them may have gone just now
            entrances = self.list_entrances();
            done = self.put(&entrances);
        }
        if let Err(error) = done.as_ref().map_err(Error::clone) {
            if self.cgroups.core.config().has_containers() && !entrances.veths.is_empty() {
                // whatever it is, all else is in force without them
                entrances = Entrances::default();
                done = self.put(&entrances);
                if done.is_ok() {
                    self.give_up_containers(&error);
                }
            }
        }
        if done.is_err() && self.leave_out_levels() {
            done = self.put(&entrances);
        }
        if done.is_ok() {
            self.containers.entered = entrances;
            self.open_to_loopback();
        }
        done
    }

    /// Leaves out what lies deeper than the kernel can match: one such cgroup must not cost all
    /// others. False where nothing does.
    fn leave_out_levels(&mut self) -> bool {
        if self.levels.deepest.is_none() {
            self.levels.deepest = self.kernel.deepest_level().ok();
        }
        // a kernel that takes none lacks more than some levels
        let Some(level) = self.levels.deepest.filter(|level| *level > 0) else {
            return false;
        };
        if !self.cgroups.core.set_deepest(level) {
            return false;
        }
        let text = "the kernel matches no cgroup deeper than level";
        log!(limited::Warning, "{text} {level} here: those that are go their ancestors' way");
        true
    }

    /// Takes a new configuration, or keeps the old one whole. What it makes of each cgroup is worked
    /// out first, by and by: until it is taken as a whole, the old one is in force.
    fn reload(&mut self) {
        self.notify.reloading();
        self.look_at_root();
        match self.load() {
            Ok(new) if new.cgroup_root == self.cgroups.core.config().cgroup_root => {
                self.cgroups.core.draft(new);
                self.go_on_reloading();
            }
            loaded => {
                let done = loaded.and_then(|new| self.take(new));
                self.reloaded(done);
            }
        }
    }

    /// Works some more of the new configuration out, and takes it once it is whole.
    fn go_on_reloading(&mut self) {
        let until = Instant::now() + TURN_TIME;
        while self.cgroups.core.work_out() {
            if Instant::now() >= until {
                return;
            }
        }
        if let Some(new) = self.cgroups.core.drafted().cloned() {
            let done = self.take(new);
            self.reloaded(done);
        }
    }

    /// Says how a reload ended; one that is done, once its flows are where they should be.
    fn reloaded(&mut self, done: Result<()>) {
        match done {
            Ok(()) => self.end_reload(),
            Err(error) => {
                error.to_string().lines().for_each(|line| log!(Error, "{line}"));
                log!(Error, "reload failed, the old configuration stays in force");
                self.count(Deed::RefusedReload);
                self.notify.ready();
            }
        }
    }

    fn end_reload(&mut self) {
        if self.taken.is_some_and(|since| self.awaits_flows(since)) {
            return;
        }
        self.taken = None;
        self.warn();
        let file = self.options.config_file().display();
        log!(Notice, "reloaded {file}: {}", self.summary());
        self.notify.ready();
    }

    /// Reads the configuration that is to follow.
    fn load(&self) -> Result<Rc<Config>> {
        let new = Rc::new(self.options.load_or_default(true)?);
        let old = self.cgroups.core.config();
        if let Some(file) = emptied(old, &new, self.options.config_file()) {
            let file = file.display();
            return Err(Error::Usage(vec![format!(
                "{file}: is absent or has no section: it may be about to be written (write a new \
                 file and rename it into place; an empty [rules] sends everything direct)"
            )]));
        }
        Ok(new)
    }

    /// Takes a configuration: the one that has been worked out, or one of another cgroup root.
    fn take(&mut self, new: Rc<Config>) -> Result<()> {
        let old = self.cgroups.core.config().clone();
        // what has not been judged yet may be of the policy before
        let judged = self.doubts.is_none() && !self.cgroups.core.has_late();
        let was = judged.then(|| Before::of_policy(&self.cgroups.core, &new));
        let replaced = match new.cgroup_root == old.cgroup_root {
            true => None,
            false => {
                let fresh = follow(new.clone(), &self.levels, self.signals)?;
                let mut fresh =
                    fresh.ok_or_else(|| Error::State("the end is wanted first".into()))?;
                fresh.adopt_dying(&self.cgroups);
                Some(std::mem::replace(&mut self.cgroups, fresh))
            }
        };
        let ranking = self.cgroups.core.adopt();
        self.rename_entrances(&old);
        let new = self.admit();
        // without a mark that is known, what applications send by the flows that a proxy began would
        // be taken for answers, and what the kernel sends for proxied sockets that are gone would go
        // directly
        match new.mask == old.mask {
            true => self.make_way(&Known::of(&old), old.unclear.clone()),
            false => self.make_way(&[], old.taken_marks()),
        }
        let config = self.cgroups.core.config().clone();
        let same = |target| stale::takes_the_same(&old, &new, target);
        let was = was.filter(|_| !self.exposed);
        let suspects = Suspects::find(&self.cgroups.core, was, same);
        self.unjudged |= !suspects.is_empty();
        let put = self.add_routing(&config).and_then(|()| self.replace_for(Deed::Reload));
        if let Err(error) = put {
            match (replaced, ranking) {
                (Some(cgroups), _) => self.cgroups = cgroups,
                (None, Some(ranking)) => drop(self.cgroups.core.put_back(ranking)),
                (None, None) => {}
            }
            self.rename_entrances(&new);
            // nothing of the new table took effect; what is pending for the old one is refused or
            // doubled at worst, so put the old table in as a whole
            self.repair_table();
            self.repair_routing();
            return Err(error);
        }
        let now = Instant::now();
        self.table.done(now, now);
        // they are of the policy before
        self.doubts = None;
        self.begin_moving(new.clone());
        for gone in old.routes.iter().filter(|route| !new.routes.contains(route)) {
            let still =
                |route: &&Route| route.interface == gone.interface && route.sends_from_loopback();
            if gone.sends_from_loopback() && !new.routes.iter().any(|route| still(&route)) {
                self.kernel.set_localnet(std::iter::once(&*gone.interface), false);
            }
        }
        self.trim_routing();
        if !(old.gateways.is_empty() && new.gateways.is_empty()) {
            self.kernel.forget_routes(new.rule_priority);
        }
        if std::mem::take(&mut self.exposed) {
            self.tell_spoofed();
        }
        // ahead of the flows, of which there may be many: somebody waits for these
        self.look_for_stale(suspects, SLICE);
        self.taken = Some(used());
        self.begin_redirecting();
        log::configure(new.log_level.louder(self.options.verbose), self.options.syslog);
        if lost_all(&old, &new) {
            let default = new.target_name(new.default);
            log!(Warning, "no rule and no gateway is left: everything goes by default = {default}");
        }
        Ok(())
    }

    /// The end: nothing stays behind, unless on-exit = keep.
    fn stop(&mut self) -> Result<()> {
        if self.cgroups.core.config().on_exit == OnExit::Keep {
            return self.leave();
        }
        self.notify.stopping();
        // once more, since the reason may have been a lack of memory that is over
        let result = remove(&mut self.kernel).or_else(|_| remove(&mut self.kernel));
        // the next one may have another mask, and nothing tells it of ours
        let marks = self.cgroups.core.config().taken_marks();
        self.kernel.forget_flows(&marks);
        self.remove_pidfile();
        if result.is_ok() {
            log!(Notice, "stopped");
        }
        result
    }

    /// The end of a daemon that another one follows, as in a restart or an upgrade: table, rules
    /// and routes stay in force, and the next start takes them over.
    fn leave(&mut self) -> Result<()> {
        self.notify.stopping();
        self.remove_pidfile();
        instance::leave(&mut self.kernel);
        log!(Notice, "stopped; table, rules and routes are left in force for the next start");
        Ok(())
    }

    fn remove_pidfile(&self) {
        if let Some(file) = &self.pidfile {
            file.remove();
        }
    }

    fn summary(&self) -> String {
        let core = &self.cgroups.core;
        let config = core.config();
        let routes = match config.routes.len() {
            0 => String::new(),
            routes => format!(" routes: {routes},"),
        };
        format!(
            "rules: {}, tproxies: {},{routes} cgroups: {} under {}",
            config.rule_lines().count(),
            config.tproxies.len(),
            core.tree().len(),
            self.cgroups.root.dir.display()
        )
    }
}

/// A file that has nothing to say by now, where it said something of the policy in force: an editor that
/// writes in place makes it empty first.
fn emptied<'a>(old: &'a Config, new: &Config, main: &'a Path) -> Option<&'a Path> {
    let mut places = places(old);
    if new.hollow.len() == new.files.len() {
        return (old.default != Target::Direct || places.next().is_some()).then_some(main);
    }
    let hollow = places.find(|place| new.hollow.contains(&place.file));
    hollow.map(|place| place.file.as_path())
}

/// Whether a policy went, and nothing but a default came: which may be meant, or a file that was cut
/// behind a header.
fn lost_all(old: &Config, new: &Config) -> bool {
    let opened = old.default != Target::Direct && new.default == Target::Direct;
    places(new).next().is_none() && (opened || places(old).next().is_some())
}

/// Where rules and gateways stand.
fn places(config: &Config) -> impl Iterator<Item = &Place> {
    let gateways = config.gateways.iter().map(|gateway| &gateway.place);
    config.rule_lines().map(|line| line.place()).chain(gateways)
}

/// The table first: without it no packet is marked, so none misses the rules.
fn remove(kernel: &mut Kernel) -> Result<()> {
    kernel.remove_table()?;
    kernel.trim_routing(&SmallSet::default()).map(drop)
}

/// The cgroups that the sets of a table hold and that do not live, for a new table to keep. Those that
/// were removed while no daemon ran are known by their id, at every level that it is looked for at.
fn removed(inventory: &Inventory, core: &Core) -> Vec<Dying> {
    let living = core.tree().iter().map(|(_, node)| cgroup_hash(node.id));
    let living: SmallSet<u32> = living.collect();
    let config = core.config();
    let steps = inventory.view.steps.iter().flat_map(|step| {
        let hashes: Vec<u32> = match step.hashed {
            true => inventory.hashed.get(&step.key()).cloned().unwrap_or_default(),
            false => {
                let elements = inventory.cgroups.get(&step.key()).into_iter().flatten();
                elements.map(|element| cgroup_hash(element.id)).collect()
            }
        };
        let outcome = config.outcome_named(&step.target, step.class);
        let known = outcome.zip(u8::try_from(step.level).ok());
        let dead = hashes.into_iter().filter(|hash| !living.contains(hash));
        let dead: Vec<u32> = dead.collect();
        dead.into_iter().filter_map(move |hash| {
            known.map(|(outcome, level)| Dying::known_by(hash, level, outcome))
        })
    });
    steps.collect()
}
