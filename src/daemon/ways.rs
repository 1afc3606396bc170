//! The ways of what is marked: keeps ip rules and routes as they should be, and tells what others have
//! to do with that and how it stands with each way out. What is wanted is decided in [`crate::route`].

use std::time::{Duration, Instant};

use super::Daemon;
use crate::backoff::Backoff;
use crate::config::Config;
use crate::error::Result;
use crate::kernel::routing::Routing;
use crate::log;
use crate::log::Level;
use crate::nft::table::{Deed, Devices};
use crate::plan;
use crate::route::Entry;
use crate::small::SmallMap;

/// When another program that has begun to change the ways of packets has ended that.
const SETTLED: Duration = Duration::from_secs(1);

/// Different things about the ways of others that are told.
const MOST_TOLD: usize = 64;

#[derive(Default)]
pub struct Ways {
    /// Adding what is missing of the ip rules and routes.
    pub repair: Backoff,
    /// What should be there of ip rules and routes, and what others have put in their way.
    pub routing: Routing,
    /// The interfaces that tables of others lead out by.
    pub devices: Devices,
    /// How it stands with each route that has an interface.
    states: SmallMap<String, &'static str>,
    /// A way out has opened or closed: flows may have to be sent another way.
    pub changed: bool,
}

impl Daemon<'_> {
    /// Adds what is missing of the ip rules and routes, and tells what others have to do with it.
    pub(super) fn add_routing(&mut self, config: &Config) -> Result<()> {
        let (routing, result) = self.kernel.add_routing(plan::needs(config));
        let before = std::mem::replace(&mut self.ways.routing, routing);
        if let Some(devices) = self.ways.routing.tables.take() {
            self.ways.devices = devices;
        }
        self.ways.changed |= !self.ways.routing.gone.is_empty();
        self.redirects.gone.extend(std::mem::take(&mut self.ways.routing.gone));
        let after = &self.ways.routing;
        let mut ways = SmallMap::default();
        for way in plan::needs(config).ways {
            let (name, state) = (way.name, way.state(self.kernel.links()));
            let Some(interface) = way.interface() else { continue };
            if self.ways.states.get(name) != Some(&state) {
                let text = match state {
                    "open" => format!("[route {name}]: {interface} is there, packets pass"),
                    "IPv4 only" | "IPv6 only" => {
                        format!("[route {name}]: {interface} is there, {state}: it has no other address")
                    }
                    why => format!("[route {name}]: {interface} is {why}: its traffic is refused"),
                };
                log!(limited::Notice, "{text}");
                // what began meanwhile may have had no way
                self.ways.changed = true;
            }
            ways.insert(name.to_string(), state);
        }
        self.ways.states = ways;
        for line in after.hindrances.iter().filter(|line| !before.hindrances.contains(line)) {
            log!(limited::Warning, "{line}");
        }
        let mut notes = after.notes.clone();
        if result.is_ok() && notes.is_empty() && !before.notes.is_empty() {
            notes.push("nothing of others is in the way of ip rules and routes any more".into());
        }
        if self.ways.routing.notes != before.notes {
            // what brings rules brings chains, a little later
            self.look_at_others = Some(Instant::now() + SETTLED);
        }
        // once: it comes and goes with a tunnel
        for line in notes {
            let first = self.told.len() < MOST_TOLD && self.told.insert(line.clone());
            let level = if first { Level::Notice } else { Level::Debug };
            log::write_limited(level, format_args!("{line}"));
        }
        result
    }

    /// Takes back what was added for a table that was refused, where another is there.
    pub(super) fn undo_routing(&mut self) {
        // rules before the routes that they lead to
        for entry in self.ways.routing.added.iter().rev() {
            let _ = self.kernel.delete_routing(entry);
        }
    }

    /// What was forwarded without the table may be in a flowtable by now.
    pub(super) fn forget_routes(&mut self) {
        let config = self.cgroups.core.config().clone();
        if !config.gateways.is_empty() {
            self.kernel.forget_routes(config.rule_priority);
        }
    }

    pub(super) fn repair_routing(&mut self) {
        let began = Instant::now();
        let config = self.cgroups.core.config().clone();
        let before = self.ways.devices.clone();
        self.kernel.await_changes();
        let added = self.add_routing(&config);
        if self.ways.changed {
            self.loops.want(began);
        }
        let follow = plan::follow(&config, &before, &self.ways.devices, self.kernel.batch());
        if let Some(follow) = follow.filter(|_| !self.table_is_out()) {
            self.commit_or_repair(follow);
        }
        // stale entries too: of another place, or which a start or a reload was not able to delete
        match added.and_then(|()| self.kernel.trim_routing(&self.ways.routing.wanted)) {
            Ok(stale) => {
                self.ways.repair.done(began, Instant::now());
                self.open_to_loopback();
                // those that come and go with an interface are told of by that
                let leads_out = |e: &&Entry| matches!(e, Entry::Route(r) if r.leads_out());
                let added = self.ways.routing.added.iter().filter(|e| !leads_out(e)).count();
                if added > 0 && stale.is_empty() {
                    let text = "ip rules and routes are in force again";
                    log!(limited::Notice, "{text}, {added} were missing");
                    self.count(Deed::RoutingRepair);
                }
            }
            Err(error) => {
                let pause = self.ways.repair.failed(began, Instant::now()).as_secs();
                log!(Error, "{error}; trying again in {pause} s");
            }
        }
    }

    /// Deletes what is left over of another policy: it does no harm, so where that fails, the next
    /// repair does it. Returns how many entries are gone.
    pub(super) fn trim_routing(&mut self) -> usize {
        match self.kernel.trim_routing(&self.ways.routing.wanted) {
            Ok(removed) => removed.len(),
            Err(error) => {
                let now = Instant::now();
                self.ways.repair.want(now);
                let pause = self.ways.repair.failed(now, now).as_secs();
                log!(Warning, "{error}; trying again in {pause} s");
                0
            }
        }
    }

    /// Has the interfaces of routes whose DNS may come from a loopback address take the answers.
    pub(super) fn open_to_loopback(&mut self) {
        let config = self.cgroups.core.config().clone();
        let open = config.routes.iter().filter(|route| route.sends_from_loopback());
        self.kernel.set_localnet(open.map(|route| &*route.interface), true);
    }
}
