//! Ip rules and routes: puts there what is missing, takes away what is not wanted, and lists them.
//! Where ours belong among those of others is decided in [`crate::route`].

use std::net::IpAddr;

use nix::errno::Errno;

use super::Kernel;
use crate::error::{reason, Error, Result};
use crate::host::sysctl;
use crate::log;
use crate::net::Family;
use crate::netlink::fib::{self, SeenRoute, SeenRule, Verb};
use crate::netlink::link::{self, Link};
use crate::netlink::msg::Batch;
use crate::netlink::parse::Message;
use crate::nft::table::Devices;
use crate::nft::view;
use crate::route::{self, Entry, Needs, SeenRouting};
use crate::small::SmallSet;

/// What has become of ip rules and routes.
#[derive(Debug, Default)]
pub struct Routing {
    /// What should be there, and is unless something was refused.
    pub wanted: SmallSet<Entry>,
    /// What was missing of that and is there now.
    pub added: Vec<Entry>,
    /// A line for each family whose rules had to go before those of others, and for each thing of
    /// others that has the place of one of ours.
    pub notes: Vec<String>,
    /// A line for each thing of others that is in the way all the same.
    pub hindrances: Vec<String>,
    /// The interfaces that tables of others lead out by; `None` where the kernel did not tell.
    pub tables: Option<Devices>,
    /// Addresses of before, which no interface of a way out has any more.
    pub gone: SmallSet<IpAddr>,
}

impl Kernel {
    /// Adds what is wanted and missing of the ip rules and routes, and keeps the rest: make before
    /// break. Where rules of others may take what is marked, ours begin before them. That this host
    /// has no IPv6 is told once, and it is tried again each time. While lo is down, which is told once
    /// too, the routes have to wait: a notification tells when it is up, and until then the table's
    /// guard drops what cannot reach it.
    ///
    /// Errors: the first entry that could not be added; the other family was tried all the same.
    pub fn add_routing(&mut self, mut needs: Needs) -> (Routing, Result<()>) {
        self.watch(&needs);
        // asked for behind that, so that no change goes unseen
        needs.links = self.links_of(&needs);
        let before = std::mem::replace(&mut self.links, needs.links.clone());
        let has = |ip: &IpAddr| needs.links.iter().any(|link| link.addresses.contains(ip));
        let gone = before.into_iter().flat_map(|link| link.addresses).filter(|ip| !has(ip));
        let gone = gone.collect();
        let needs = &needs;
        let tables = self.devices_of(needs);
        let (mut result, mut lo_is_down) = (Ok(()), false);
        let mut routing = Routing { tables, gone, ..Routing::default() };
        for family in Family::BOTH {
            match self.add_family(needs, family, &mut routing) {
                Ok(down) => {
                    lo_is_down |= down;
                    if family == Family::V6 && !std::mem::replace(&mut self.ipv6, true) {
                        log!(Notice, "IPv6 is on now");
                    }
                }
                Err(error) if family == Family::V6 && is_absent(&error) => {
                    if std::mem::replace(&mut self.ipv6, false) {
                        let text = "IPv6 is off on this host, going on with IPv4 alone";
                        log!(Notice, "{text}: {error}");
                    }
                }
                Err(error) => result = result.and(Err(error)),
            }
        }
        if lo_is_down && !self.lo_is_down {
            let text = "lo is down: what goes to a tproxy is dropped until it is up";
            log!(Warning, "{text} (ip link set lo up)");
        }
        self.lo_is_down = lo_is_down;
        (routing, result)
    }

    /// Waits until whoever changes routes just now is done. The kernel tells of an IPv4 route that is
    /// deleted before it takes it away (`fib_table_delete`), and lists it meanwhile: since Linux 6.10
    /// without the lock that is held for both. What is asked here takes that lock; the answer does not
    /// matter.
    pub fn await_changes(&mut self) {
        let _ = self.rt.ask(&|batch| link::get(batch, "lo"), link::parse);
    }

    /// Whether some routes were not added because lo is down.
    fn add_family(&mut self, needs: &Needs, family: Family, routing: &mut Routing) -> Result<bool> {
        let seen = self.seen(family, &needs.tables());
        let place = seen.as_ref().map_or(needs.priority, |seen| seen.place(needs, family));
        // known whatever happens below: what is wanted is not to be deleted
        let wanted = needs.entries(family, place);
        routing.wanted.extend(wanted.iter().cloned());
        let mut seen = seen?;
        let mut lo_is_down = false;
        let ours = seen.ours();
        let way_out = |entry: &Entry| match entry {
            Entry::Route(route) if route.leads_out() => Some(route.table),
            _ => None,
        };
        let leads_out = |entry: &&Entry| way_out(entry).is_some();
        // The table that is in force may still send packets there: what leads out by another interface
        // meets its guard, while without any way out what is sent in a connection would be answered by
        // a reset. So those of before go with [`Kernel::trim_routing`].
        let leading: SmallSet<u32> = ours.iter().filter_map(way_out).collect();
        for entry in wanted.difference(&ours) {
            let verb = match way_out(entry) {
                Some(table) if leading.contains(&table) => Verb::Supersede,
                _ => Verb::Add,
            };
            match self.route_request(entry, verb) {
                Ok(()) => routing.added.push(entry.clone()),
                // the interface has gone or changed since it was looked at, which a notification
                // tells, or the next hop is none: refused by the route behind it
                Err(errno) if leads_out(&entry) => routing.notes.push(format!(
                    "unable to do `{}`: {}",
                    entry.command("add"),
                    reason(errno)
                )),
                Err(Errno::ENETDOWN) => lo_is_down = true,
                // of others, with the key of ours: a notification tells when it goes, and those
                // that do something else are told of below
                Err(Errno::EEXIST) => routing.notes.push(format!(
                    "unable to do `{}`: another program's has its place",
                    entry.command("add")
                )),
                Err(errno) => {
                    let what = format!("unable to do `{}`", entry.command("add"));
                    return Err(Error::system(what, errno));
                }
            }
        }
        if place != needs.priority {
            let evaded = seen.before(needs, family, needs.priority);
            let evaded: Vec<String> = evaded.iter().map(|other| other.to_string()).collect();
            let evaded = evaded.join(", ");
            routing.notes.push(format!(
                "ip rules of others would take {} ({evaded}): ours begin before them, at priority \
                 {place}",
                needs.marked()
            ));
        }
        if !routing.added.is_empty() {
            seen = self.seen(family, &needs.tables())?;
        }
        routing.hindrances.extend(seen.hindrances(needs, family, place));
        Ok(lo_is_down)
    }

    /// Deletes rules and routes of ours that are not wanted, and returns them.
    pub fn trim_routing(&mut self, wanted: &SmallSet<Entry>) -> Result<Vec<Entry>> {
        let mut deleted = Vec::new();
        for family in Family::BOTH {
            // rules before the routes that they lead to
            for entry in self.routing(family)?.iter().rev().filter(|e| !wanted.contains(e)) {
                if self.delete_routing(entry)? {
                    deleted.push(entry.clone());
                }
            }
        }
        Ok(deleted)
    }

    /// Deletes one rule or route; false where it is gone already.
    pub fn delete_routing(&mut self, entry: &Entry) -> Result<bool> {
        match self.route_request(entry, Verb::Delete) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT | Errno::ESRCH) => Ok(false),
            Err(errno) => {
                Err(Error::system(format!("unable to do `{}`", entry.command("del")), errno))
            }
        }
    }

    /// Makes the kernel look for the routes of all flows anew, which any change of the ip rules does.
    /// A flow that a flowtable forwards comes back to the table only by that. The priority is that
    /// of the rule which comes and goes.
    pub fn forget_routes(&mut self, priority: u32) {
        for family in Family::BOTH {
            let rule = route::passing(family, priority);
            let added = self.route_request(&rule, Verb::Add);
            // whatever became of the first, so that it never stays
            let deleted = self.route_request(&rule, Verb::Delete);
            if let Err(errno) = added.and(deleted) {
                log!(Debug, "unable to renew routes: {}", reason(errno));
            }
        }
    }

    /// The rules and routes of one family that carry our protocol number; none for a family that
    /// the kernel does not have.
    pub fn routing(&mut self, family: Family) -> Result<SmallSet<Entry>> {
        let rules = self.list(&|batch| fib::get_rules(batch, family), SeenRule::read)?;
        let routes = self.list(&|batch| fib::get_routes(batch, family), SeenRoute::read)?;
        let mut ours = SeenRouting { rules, routes }.ours();
        // a family that is not there answers for others
        ours.retain(|entry| entry.family() == family);
        Ok(ours)
    }

    /// All rules of one family, and all routes of these tables; none for a family that the kernel
    /// does not have.
    pub fn seen(&mut self, family: Family, tables: &[u32]) -> Result<SeenRouting> {
        let mut rules = self.list(&|batch| fib::get_rules(batch, family), SeenRule::read)?;
        rules.retain(|seen| seen.rule.family == family);
        let mut routes = Vec::new();
        for table in tables {
            let ask = |batch: &mut Batch| fib::get_table(batch, family, *table);
            let found = self.list(&ask, SeenRoute::read)?.into_iter();
            routes.extend(
                found.filter(|seen| (seen.route.family, seen.route.table) == (family, *table)),
            );
        }
        Ok(SeenRouting { rules, routes })
    }

    /// The interfaces that ways out lead to, as far as they are there.
    pub fn links_of(&mut self, needs: &Needs) -> Vec<Link> {
        let names: SmallSet<&str> = needs.ways.iter().filter_map(|way| way.interface()).collect();
        let mut links = Vec::new();
        for name in names {
            let asked = self.rt.ask(&|batch| link::get(batch, name), link::parse);
            let Ok(Ok(Some(mut found))) = asked else { continue };
            let index = found.index;
            let addresses =
                self.list(&|batch| link::get_addresses(batch, index), link::parse_address);
            let own = addresses.into_iter().flatten().filter(|a| a.index == index && a.wide);
            found.addresses.extend(own.map(|address| address.ip));
            links.push(found);
        }
        links
    }

    /// The interfaces that the tables of others lead out by which ways out lead to; `None` where the
    /// kernel does not tell.
    pub fn devices_of(&mut self, needs: &Needs) -> Option<Devices> {
        let tables = needs.tables_of_others();
        if tables.is_empty() {
            return Some(Devices::default());
        }
        let names = self.interface_names()?;
        let mut devices = Devices::default();
        for table in tables {
            let found: &mut SmallSet<String> = devices.or_default(table);
            for family in Family::BOTH {
                let ask = |batch: &mut Batch| fib::get_table(batch, family, table);
                let all = self.list(&ask, |message| Some(fib::devices(message, table)));
                let all = all.ok()?.into_iter().flatten();
                found.extend(all.filter_map(|index| names.get(&index).cloned()));
            }
        }
        Some(devices)
    }

    /// Takes the interfaces over that the table of a run before had opened to loopback addresses, and
    /// returns them. To be called before that table goes.
    pub fn recall_localnet(&mut self) -> Vec<String> {
        let open = view::open_to_loopback(&self.rules().unwrap_or_default());
        self.opened.extend(open.iter().map(|name| (name.clone(), true)));
        open
    }

    /// Lets local processes that ask from a loopback address be answered by these interfaces, or not:
    /// then those stay open that were so before.
    /// To be called while the table keeps others from loopback addresses.
    pub fn set_localnet<'a>(&mut self, names: impl Iterator<Item = &'a str>, on: bool) {
        for name in names {
            let by_us = match on {
                true => *self.opened.or_insert_with(name.into(), || !is_open(name)),
                false => self.opened.remove(name).unwrap_or(true),
            };
            if !by_us {
                continue;
            }
            match self.rt.tell(&|batch| link::set_localnet(batch, name, on)) {
                // one that is not there is told of when it comes
                Ok(()) | Err(Errno::ENODEV) => {}
                Err(errno) => log!(
                    Warning,
                    "unable to set route_localnet of {name}: {}: what local processes ask from \
                     127.0.0.1 does not reach the resolver behind it",
                    reason(errno)
                ),
            }
        }
    }

    /// The interfaces as they were looked at last.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    fn list<T>(
        &mut self,
        request: &dyn Fn(&mut Batch),
        read: impl Fn(&Message) -> Option<T>,
    ) -> Result<Vec<T>> {
        match self.rt.dump(request, read)? {
            Ok(found) => Ok(found),
            Err(Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::ENOENT) => Ok(Vec::new()),
            Err(errno) => Err(Error::system("unable to list ip rules or routes", errno)),
        }
    }

    fn route_request(&mut self, entry: &Entry, verb: Verb) -> nix::Result<()> {
        let told = self.rt.tell(&|batch| entry.encode(batch, verb));
        told.inspect_err(|errno| log!(Debug, "{}: {}", entry.command("…"), reason(*errno)))
    }
}

/// Whether a family's entry was refused because the host does not have that family.
fn is_absent(error: &Error) -> bool {
    let absent = [Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP, Errno::EACCES, Errno::ENODEV];
    error.errno().is_some_and(|errno| absent.contains(&errno))
}

/// Whether an interface takes packets with loopback addresses.
fn is_open(interface: &str) -> bool {
    sysctl(&format!("net/ipv4/conf/{interface}/route_localnet")) == Some(1)
}

/// Whether answers that come in by an interface are dropped, where other routes than the one by it
/// lead to who sends them: rp_filter asks for the way back, without the mark.
pub fn drops_answers(interface: &str) -> bool {
    let most = |name: &str| {
        let number = |of| sysctl(&format!("net/ipv4/conf/{of}/{name}")).unwrap_or(0);
        number("all").max(number(interface))
    };
    most("rp_filter") == 1 && most("src_valid_mark") == 0
}

/// Whether IPv6 can be routed over `lo` here: where it is off there, there is nothing to route.
pub fn ipv6_is_on() -> bool {
    sysctl("net/ipv6/conf/lo/disable_ipv6") == Some(0)
}
