//! Flows that conntrack has: lists them, has it forget them, and moves them to another source address.
//! Which of them cannot go the way that is theirs by now is decided in [`crate::stale::flows`].

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use nix::errno::Errno;

use super::Kernel;
use crate::error::{Error, Result};
use crate::net::{is_private, Mark};
use crate::netlink::conntrack::{self, Tracked};
use crate::netlink::fib::{self, Course};
use crate::netlink::link;
use crate::netlink::msg::Batch;
use crate::netlink::parse::Message;
use crate::netlink::uapi::IPPROTO_UDP;

/// How often a flow is moved that its remote host begins again at the same moment.
const TRIES: usize = 8;

const REFUSED: &str = "unable to list conntrack's flows";

impl Kernel {
    /// Whether conntrack tells of its flows.
    pub fn tells_flows(&mut self) -> bool {
        let Kernel { nft, tells_flows, .. } = self;
        *tells_flows.get_or_insert_with(|| {
            let nobody = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
            let request = |batch: &mut Batch| conntrack::get(batch, IPPROTO_UDP, nobody, nobody);
            let answer = nft.ask(&request, |_| Some(()));
            matches!(answer, Ok(Ok(_) | Err(Errno::ENOENT)))
        })
    }

    /// Has [`Kernel::more_entries`] list them from the beginning.
    pub fn list_entries(&mut self) {
        if let Some(flows) = &mut self.flows {
            flows.begin(vec![()]);
        }
    }

    /// Some more of the flows, as far as `keep` keeps them: as many as the kernel tells of at once, some
    /// hundred. `None` where there are no more.
    pub fn more_entries(
        &mut self,
        keep: impl Fn(&Tracked) -> bool,
    ) -> Result<Option<Vec<Tracked>>> {
        let Some(flows) = &mut self.flows else {
            return Ok(None);
        };
        let mut found = Vec::new();
        let mut take = |_: &(), message: &Message| {
            found.extend(conntrack::parse_entry(message).filter(|entry| keep(entry)));
        };
        let more = flows.read(|batch, ()| conntrack::get_all(batch), &mut take);
        if let Ok(Err(_)) = more {
            self.tells_flows = Some(false);
        }
        let more = more?.map_err(|errno| Error::system(REFUSED, errno))?;
        Ok(more.then_some(found))
    }

    /// Errors: ENOENT where it has ended by itself.
    pub fn forget_entry(&mut self, entry: &Tracked) -> nix::Result<()> {
        self.nft.tell(&|batch| conntrack::delete(batch, entry))
    }

    /// Has a translated flow go on with its own port and address, and a mark of ours: whatever its remote
    /// host has begun meanwhile of the same addresses goes. Where others may have to translate it, for who
    /// cannot be spoken to, a query, and what is not UDP, begins anew if it can. Errors: as of
    /// [`Kernel::forget_entry`].
    pub fn release_entry(&mut self, entry: &Tracked, own: Mark) -> nix::Result<()> {
        let from = entry.from.ip();
        if entry.protocol != IPPROTO_UDP || entry.zone.is_some() {
            return self.forget_entry(entry);
        }
        let others = is_private(from) && !self.way(from, 0).here;
        match (others || entry.is_query() || entry.is_redirected()) && self.twin(entry).is_none() {
            true => self.forget_entry(entry),
            false => self.move_entry(entry, own, from),
        }
    }

    /// What the remote host of a flow has begun between the same addresses and ports.
    fn twin(&mut self, entry: &Tracked) -> Option<Tracked> {
        let (from, to) = (entry.from, entry.to);
        let request = |batch: &mut Batch| conntrack::get(batch, entry.protocol, to, from);
        let other = self.nft.ask(&request, conntrack::parse_entry).ok()?.ok()??;
        Some(other).filter(|other| (other.from, other.to) == (to, from))
    }

    /// Has a flow known with a mark of ours. Errors: as of [`Kernel::forget_entry`].
    pub fn mark_entry(&mut self, entry: &Tracked, own: Mark) -> nix::Result<()> {
        self.nft.tell(&|batch| conntrack::mark(batch, entry, own.value, own.mask))
    }

    /// Has a flow go on with a mark of ours and another source address.
    pub fn move_entry(&mut self, entry: &Tracked, own: Mark, source: IpAddr) -> nix::Result<()> {
        let mark = entry.mark & !own.mask | own.value;
        let both = |batch: &mut Batch| {
            conntrack::delete(batch, entry);
            conntrack::create(batch, entry, mark, source);
        };
        let mut done = Err(Errno::EEXIST);
        for _ in 0..TRIES {
            done = self.nft.tell(&both);
            match done {
                // the remote host was faster; the first refusal alone is told of, which is that the one of
                // before has gone with the last try
                Err(Errno::EEXIST | Errno::ENOENT) => {
                    if let Some(other) = self.twin(entry) {
                        let _ = self.forget_entry(&other);
                    }
                }
                _ => break,
            }
        }
        done
    }

    /// Which way packets to an address go that bear a mark.
    pub fn way(&mut self, to: IpAddr, mark: u32) -> Course {
        let request = |batch: &mut Batch| fib::get_way(batch, to, mark);
        let answer = self.rt.ask(&request, fib::parse_way);
        answer.ok().and_then(|found| found.ok().flatten()).unwrap_or_default()
    }

    /// By which port of a bridge an address is reached.
    pub fn port(&mut self, bridge: u32, to: IpAddr) -> Option<u32> {
        let mut ask = |request: &dyn Fn(&mut Batch)| {
            self.rt.ask(request, link::parse_neighbour).ok()?.ok()?
        };
        let (_, mac) = ask(&|batch| link::get_neighbour(batch, bridge, to))?;
        ask(&|batch| link::get_port(batch, bridge, &mac)).map(|(port, _)| port)
    }

    /// The names of all interfaces, by index; `None` where the kernel does not tell.
    pub fn interface_names(&mut self) -> Option<HashMap<u32, String>> {
        Some(self.interfaces()?.into_iter().map(|link| (link.index, link.name)).collect())
    }
}
