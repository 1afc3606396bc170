//! Datagrams of flows that began otherwise are sent by the routes that are theirs, and those of a
//! route no more by one that is not. Which flows these are is decided in [`crate::stale::flows`].

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::error::reason;
use crate::kernel::Kernel;
use crate::log;
use crate::net::Mark;
use crate::netlink::conntrack::Tracked;
use crate::netlink::diag::UDP_STATES;
use crate::netlink::fib::Course;
use crate::netlink::uapi::*;
use crate::stale::flows::{Cure, Flows, Owners};

/// Has conntrack know flows as they should be known by now. Of pings nobody tells whose they are: all
/// begin anew, which they do not notice. Returns how many others there were. Once the table and the
/// ways out are in force.
pub fn redirect(kernel: &mut Kernel, flows: &Flows) -> usize {
    let owners = Owners::new(kernel.sockets(IPPROTO_UDP, UDP_STATES, &[], Some));
    let concerns = |entry: &Tracked| {
        flows.forwards() || entry.protocol != IPPROTO_UDP || owners.has(entry.from.port())
    };
    let entries = match kernel.entries(concerns) {
        Ok(entries) => entries,
        Err(error) => {
            log!(
                Notice,
                "{error}: what a UDP socket of a chosen port sends is dropped after its cgroup got \
                 a route, until it pauses"
            );
            return 0;
        }
    };
    let (mut ways, mut names) = (BTreeMap::new(), None);
    let mut moved = 0;
    for entry in entries {
        if entry.protocol != IPPROTO_UDP {
            let _ = kernel.forget_entry(&entry);
            continue;
        }
        let from = entry.from.ip();
        let way: Course = *ways.entry(from).or_insert_with(|| kernel.way(from, 0));
        let cure = match way.here {
            true => owners.of(entry.from, entry.to).and_then(|socket| flows.own(&entry, socket)),
            false => {
                let names =
                    names.get_or_insert_with(|| kernel.interface_names().unwrap_or_default());
                names.get(&way.device).and_then(|name| flows.routed(&entry, name))
            }
        };
        let done = match cure {
            None => continue,
            Some(Cure::Forget) => kernel.forget_entry(&entry),
            Some(Cure::Move { mark, route }) => relocate(kernel, &entry, mark, flows.way(route)),
        };
        match done {
            Ok(()) => moved += 1,
            // it has ended by itself
            Err(Errno::ENOENT) => {}
            Err(errno) => {
                let (from, to) = (entry.from, entry.to);
                log!(Debug, "unable to move the flow from {from} to {to}: {}", reason(errno));
            }
        }
    }
    moved
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
