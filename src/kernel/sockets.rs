//! Other programs' sockets: lists them, tells what is known of their flows, and ends them. Which of
//! them are stale is decided in [`crate::stale`].

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use nix::errno::Errno;

use super::Kernel;
use crate::error::{reason, Result};
use crate::host::sysctl;
use crate::log;
use crate::net::Mark;
use crate::netlink::conntrack::{self, Flow, Tracked};
use crate::netlink::diag::{self, PortOwner, SeenSocket, Witness};
use crate::netlink::msg::Batch;
use crate::netlink::parse::Message;
use crate::netlink::uapi::*;
use crate::small::SmallSet;

/// Who has sockets listed by and by: each has a list of his own.
#[derive(Debug, Clone, Copy)]
pub enum Asker {
    Flows,
    Doubts,
    Dying,
}

/// Which sockets to list: of a family and a protocol in these states; of these cgroups, if of any.
#[derive(Debug, Clone)]
pub struct Ask {
    family: u8,
    protocol: u8,
    states: u32,
    ids: Vec<u64>,
}

impl Kernel {
    /// False once the kernel has refused to end a socket.
    pub fn ends_sockets(&self) -> bool {
        self.ends_sockets
    }

    /// Ends a socket. Errors: ENOENT where it has ended by itself; else the kernel cannot.
    pub fn end_socket(&mut self, socket: &SeenSocket) -> nix::Result<()> {
        let ended = self.destroy(socket);
        self.ends_sockets &= matches!(ended, Ok(()) | Err(Errno::ENOENT));
        ended
    }

    /// Tells conntrack of a connection that `remote` made; false where it takes no such word.
    pub fn tell_inbound(&mut self, local: SocketAddr, remote: SocketAddr) -> bool {
        match self.nft.tell(&|batch| conntrack::inbound(batch, local, remote)) {
            Ok(()) | Err(Errno::EEXIST) => true,
            // no ctnetlink, as on many routers
            Err(errno) => {
                log!(Debug, "unable to tell conntrack of {remote}: {}", reason(errno));
                false
            }
        }
    }

    /// Has the flows known by this mark that proxies here began as somebody else, whom they have a socket
    /// for, and that are not known by any.
    pub fn tell_spoofed(&mut self, own: Mark) {
        let speaks = |socket: SeenSocket| {
            let is = socket.transparent != Some(false) && !socket.local.ip().is_unspecified();
            is.then_some((socket.protocol, socket.local))
        };
        let mut speakers = SmallSet::default();
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            speakers.extend(self.sockets(protocol, u32::MAX, &[], speaks));
        }
        // of what is left of a closed one nobody tells whether it was transparent
        let of: SmallSet<IpAddr> = speakers.iter().map(|(_, local)| local.ip()).collect();
        let others: SmallSet<IpAddr> =
            of.into_iter().filter(|address| !self.way(*address, 0).here).collect();
        if others.is_empty() {
            return;
        }
        let unmarked = |batch: &mut Batch| conntrack::get_marked(batch, 0, own.mask);
        let spoken = |entry: &Tracked| {
            let from = (entry.protocol, entry.from);
            let known = entry.mark & own.mask != 0 || entry.zone.is_some();
            !known && others.contains(&from.1.ip()) && speakers.contains(&from)
        };
        let all =
            self.nft.dump(&unmarked, |message| conntrack::parse_entry(message).filter(spoken));
        for entry in all.ok().and_then(nix::Result::ok).unwrap_or_default() {
            // it may have ended by itself
            let _ = self.mark_entry(&entry, own);
        }
    }

    /// The inodes of the sockets that send with one of these marks.
    pub fn marked_sockets(&mut self, marks: &[Mark]) -> SmallSet<u32> {
        let own = |socket: SeenSocket| {
            let bears = marks.iter().any(|own| socket.mark & own.mask == own.value);
            bears.then_some(socket.inode)
        };
        let mut all = SmallSet::default();
        if !marks.is_empty() {
            for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
                all.extend(self.sockets(protocol, u32::MAX, &[], own));
            }
        }
        all
    }

    /// The sockets of a protocol in these states, of both families, as far as `keep` keeps them;
    /// none where the kernel does not tell of them.
    pub fn sockets<T>(
        &mut self,
        protocol: u8,
        states: u32,
        ids: &[u64],
        keep: impl Fn(SeenSocket) -> Option<T>,
    ) -> Vec<T> {
        let mut all = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let request = |batch: &mut Batch| diag::get(batch, family, protocol, states, ids);
            let read = |message: &Message| keep(diag::parse(message, protocol)?);
            all.extend(self.dump_sockets(&request, read));
        }
        all
    }

    /// Has [`Kernel::more_sockets`] list those of these protocols in these states, of both families.
    pub fn list_sockets(&mut self, asker: Asker, protocols: &[u8], states: u32, ids: &[u64]) {
        if let Some(listing) = &mut self.sockets[asker as usize] {
            let kinds = protocols.iter().flat_map(|of| [(*of, AF_INET6), (*of, AF_INET)]);
            let ask = |(protocol, family)| Ask { family, protocol, states, ids: ids.to_vec() };
            listing.begin(kinds.map(ask).collect());
        }
    }

    /// Whether all was told of that was asked for last.
    pub fn told_all_sockets(&self, asker: Asker) -> bool {
        self.sockets[asker as usize].as_ref().is_some_and(|listing| listing.whole)
    }

    /// Some more of them, as many as the kernel tells of at once, some hundred; false where there are
    /// no more, or the kernel does not tell.
    pub fn more_sockets(&mut self, asker: Asker, each: &mut dyn FnMut(SeenSocket)) -> bool {
        let Some(listing) = &mut self.sockets[asker as usize] else {
            return false;
        };
        let request = |batch: &mut Batch, ask: &Ask| {
            diag::get(batch, ask.family, ask.protocol, ask.states, &ask.ids);
        };
        let mut take = |ask: &Ask, message: &Message| {
            diag::parse(message, ask.protocol).into_iter().for_each(&mut *each);
        };
        match listing.read(request, &mut take) {
            Ok(Ok(more)) => return more,
            // perhaps of the next family
            Ok(Err(errno)) => {
                log!(Debug, "no inet_diag: {}", reason(errno));
                return true;
            }
            Err(error) => log!(Debug, "no inet_diag: {error}"),
        }
        false
    }

    /// The sockets that listen on a port; none where the kernel does not tell of them and of their
    /// cgroups.
    pub fn listeners(&mut self, port: u16) -> Vec<PortOwner> {
        let mut found = SmallSet::default();
        for (protocol, family) in diag::KINDS {
            let request = |batch: &mut Batch| diag::get_listeners(batch, family, protocol, port);
            found.extend(self.dump_sockets(&request, diag::parse_listener));
        }
        found.into_iter().collect()
    }

    /// What `read` makes of the answer of inet_diag; nothing where there is none.
    fn dump_sockets<T>(
        &mut self,
        request: &dyn Fn(&mut Batch),
        read: impl Fn(&Message) -> Option<T>,
    ) -> Vec<T> {
        match self.diag.as_mut().map(|diag| diag.dump(request, read)) {
            Some(Ok(Ok(found))) => return found,
            Some(Ok(Err(errno))) => log!(Debug, "no inet_diag: {}", reason(errno)),
            Some(Err(error)) => log!(Debug, "no inet_diag: {error}"),
            None => {}
        }
        Vec::new()
    }

    /// What it takes to judge a socket.
    pub fn witness(&mut self, socket: &SeenSocket) -> Witness {
        match socket.is_connected() {
            false => Witness::default(),
            true => Witness {
                local: self.way(socket.remote.ip(), 0).here,
                proxied: socket.protocol == IPPROTO_TCP && self.has_peer(socket),
                flow: self.flow(socket),
            },
        }
    }

    /// Whether the other end of the connection is a socket of this host, though its address need not
    /// be: that of a TPROXY server. Anybody may have one there that is not transparent (IP_FREEBIND), and
    /// another's connection is not to end by it; older kernels do not tell.
    fn has_peer(&mut self, socket: &SeenSocket) -> bool {
        let peer = self.connected(socket.remote, socket.local);
        peer.is_some_and(|peer| peer.transparent != Some(false))
    }

    /// The TCP socket of this host that is connected so.
    fn connected(&mut self, local: SocketAddr, remote: SocketAddr) -> Option<SeenSocket> {
        let request = |batch: &mut Batch| diag::get_connected(batch, IPPROTO_TCP, local, remote);
        let read = |message: &Message| diag::parse(message, IPPROTO_TCP);
        let found = answer(self.diag.as_mut()?.ask(&request, read));
        found.filter(|socket| socket.state != TCP_LISTEN)
    }

    /// Ends the sockets of this host that a TCP connection has which `from` has made: who has made it,
    /// and a proxy's that speaks for `to`. A service's own is never ended.
    pub fn end_connection(&mut self, from: SocketAddr, to: SocketAddr) {
        let proxys = self.connected(to, from).filter(|socket| socket.transparent == Some(true));
        for socket in proxys.into_iter().chain(self.connected(from, to)) {
            let _ = self.end_socket(&socket);
        }
    }

    fn flow(&mut self, socket: &SeenSocket) -> Option<Flow> {
        let (local, remote) = (socket.local, socket.remote);
        let request = |batch: &mut Batch| conntrack::get(batch, socket.protocol, local, remote);
        answer(self.nft.ask(&request, |message| conntrack::parse(message, local)))
    }

    /// Has conntrack forget the flows with these marks.
    pub fn forget_flows(&mut self, marks: &[Mark]) {
        for Mark { value, mask } in marks.iter().copied() {
            if let Err(errno) = self.nft.tell(&|batch| conntrack::forget(batch, value, mask)) {
                log!(Debug, "unable to forget flows: {}", reason(errno));
            }
        }
    }

    /// What the flows with this mark have carried; `None` where conntrack does not tell.
    pub fn traffic(&mut self, mark: Mark) -> Option<Vec<conntrack::Traffic>> {
        let request = |batch: &mut Batch| conntrack::get_marked(batch, mark.value, mark.mask);
        self.nft.dump(&request, conntrack::parse_traffic).ok()?.ok()
    }

    fn destroy(&mut self, socket: &SeenSocket) -> nix::Result<()> {
        match self.diag.as_mut().filter(|_| can_destroy()) {
            Some(asked) => asked.tell(&|batch| diag::destroy(batch, socket)),
            None => Err(Errno::EOPNOTSUPP),
        }
    }
}

fn answer<T>(asked: Result<nix::Result<Option<T>>>) -> Option<T> {
    asked.ok()?.ok()?
}

/// Whether conntrack counts what flows carry (nf_conntrack_acct of
/// Documentation/networking/nf_conntrack-sysctl.rst).
pub fn conntrack_counts() -> bool {
    sysctl("net/netfilter/nf_conntrack_acct") == Some(1)
}

/// The ports that the kernel gives to sockets that ask for none.
pub fn chosen_ports() -> RangeInclusive<u16> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let text = text.unwrap_or_default();
    let mut ends = text.split_ascii_whitespace().map(|port| port.parse().ok());
    match (ends.next().flatten(), ends.next().flatten()) {
        (Some(first), Some(last)) => first..=last,
        _ => 32768..=60999,
    }
}

/// Debug builds can be told to do without, as a kernel without CONFIG_INET_DIAG_DESTROY does.
fn can_destroy() -> bool {
    !(cfg!(debug_assertions) && std::env::var_os("CGTPROXY_NO_DESTROY").is_some())
}
