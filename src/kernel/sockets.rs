//! Other programs' sockets: finding those that are stale, and ending them. What is stale is decided
//! in [`crate::stale`].

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Instant;

use nix::errno::Errno;

use super::Kernel;
use crate::error::{reason, Result};
use crate::log;
use crate::net::Mark;
use crate::netlink::conntrack::{self, Flow};
use crate::netlink::diag::{self, PortOwner, Socket};
use crate::netlink::fib;
use crate::netlink::msg::Batch;
use crate::netlink::parse::Message;
use crate::netlink::uapi::*;
use crate::stale::{Judge, Ports, Suspects, Witness, TCP_STATES, UDP_STATES};

/// Sockets that may be stale, and what it takes to judge them.
pub struct Doubts {
    judge: Judge,
    sockets: Vec<Socket>,
    /// What listens.
    tcp: Ports,
    /// What is not connected.
    udp: Ports,
    pub ended: usize,
}

impl Kernel {
    /// Looks for sockets that may be stale; `None` where there are none, or none can be ended.
    pub fn doubts(&mut self, judge: Judge) -> Option<Doubts> {
        if !self.ends_sockets || judge.suspects().is_empty() {
            return None;
        }
        let mut doubts =
            Doubts { judge, sockets: Vec::new(), tcp: Ports::new(), udp: Ports::new(), ended: 0 };
        let ids = doubts.judge.suspects().ids().unwrap_or_default();
        for (protocol, states) in [(IPPROTO_TCP, TCP_STATES), (IPPROTO_UDP, UDP_STATES)] {
            let is_tcp = protocol == IPPROTO_TCP;
            let judge = &doubts.judge;
            let found = self
                .sockets(protocol, states, &ids, |socket| judge.doubts(&socket).then_some(socket));
            if found.is_empty() {
                continue;
            }
            doubts.sockets.extend(found);
            let (ports, state) = match is_tcp {
                true => (&mut doubts.tcp, TCP_LISTEN),
                false => (&mut doubts.udp, TCP_CLOSE),
            };
            for port in self.sockets(protocol, 1 << state, &[], |socket| Some(socket.local.port()))
            {
                *ports.entry(port).or_default() += 1;
            }
        }
        (!doubts.sockets.is_empty()).then_some(doubts)
    }

    /// Tells conntrack, which may begin with our table, of the connections that others made to
    /// services of these cgroups: where the service speaks next, it would seem to have begun them.
    pub fn tell_inbound(&mut self, suspects: &Suspects) {
        if suspects.is_empty() {
            return;
        }
        let listening = |socket: Socket| Some(socket.local.port());
        let ports: HashSet<u16> =
            self.sockets(IPPROTO_TCP, 1 << TCP_LISTEN, &[], listening).into_iter().collect();
        let inbound = |socket: Socket| {
            let ours = socket.cgroup.is_some_and(|cgroup| suspects.of(cgroup).is_some());
            let ours = ours && !socket.remote.ip().is_loopback();
            (ours && ports.contains(&socket.local.port())).then_some((socket.local, socket.remote))
        };
        let ids = suspects.ids().unwrap_or_default();
        for (local, remote) in self.sockets(IPPROTO_TCP, 1 << TCP_ESTABLISHED, &ids, inbound) {
            let request = |batch: &mut Batch| conntrack::inbound(batch, local, remote);
            match self.nft.ask(&request, |_| None::<()>) {
                Ok(Ok(_) | Err(Errno::EEXIST)) => {}
                Ok(Err(errno)) => {
                    // no ctnetlink, as on many routers
                    log!(Debug, "unable to tell conntrack of {remote}: {}", reason(errno));
                    return;
                }
                Err(error) => return log!(Debug, "unable to tell conntrack of {remote}: {error}"),
            }
        }
    }

    /// Judges sockets and ends the stale ones until `until`; true when that is done.
    pub fn end_stale(&mut self, doubts: &mut Doubts, until: Instant) -> bool {
        while let Some(socket) = doubts.sockets.pop() {
            let ports = match socket.protocol {
                IPPROTO_TCP => &doubts.tcp,
                _ => &doubts.udp,
            };
            let witness = self.witness(&socket);
            if doubts.judge.ends(&socket, ports, witness) {
                match self.destroy(&socket) {
                    Ok(()) => doubts.ended += 1,
                    // it has ended by itself
                    Err(Errno::ENOENT) => {}
                    Err(errno) => {
                        // not of this protocol, or none at all
                        self.ends_sockets = false;
                        log!(
                            Notice,
                            "unable to end sockets that went another way ({}): what they send is \
                             dropped, so their programs wait until they give up",
                            reason(errno)
                        );
                        return true;
                    }
                }
            }
            if Instant::now() >= until {
                break;
            }
        }
        doubts.sockets.is_empty()
    }

    /// The cgroups of all TCP and UDP sockets; `None` where the kernel does not tell of all.
    pub fn held_cgroups(&mut self) -> Option<HashSet<u64>> {
        let mut all = HashSet::new();
        for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
            for family in [AF_INET, AF_INET6] {
                let request = |batch: &mut Batch| diag::get(batch, family, protocol, u32::MAX, &[]);
                let read = |message: &Message| diag::parse(message, protocol)?.cgroup;
                let found = self.diag.as_mut()?.dump(&request, read).ok()?;
                all.extend(found.ok()?);
            }
        }
        Some(all)
    }

    /// The sockets of a protocol in these states, of both families, as far as `keep` keeps them;
    /// none where the kernel does not tell of them.
    fn sockets<T>(
        &mut self,
        protocol: u8,
        states: u32,
        ids: &[u64],
        keep: impl Fn(Socket) -> Option<T>,
    ) -> Vec<T> {
        let mut all = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let request = |batch: &mut Batch| diag::get(batch, family, protocol, states, ids);
            let read = |message: &Message| keep(diag::parse(message, protocol)?);
            all.extend(self.dump_sockets(&request, read));
        }
        all
    }

    /// The sockets that listen on a port; none where the kernel does not tell of them and of their
    /// cgroups.
    pub fn listeners(&mut self, port: u16) -> Vec<PortOwner> {
        let mut found = BTreeSet::new();
        for family in [AF_INET, AF_INET6] {
            for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
                let request =
                    |batch: &mut Batch| diag::get_listeners(batch, family, protocol, port);
                found.extend(self.dump_sockets(&request, diag::parse_listener));
            }
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

    fn witness(&mut self, socket: &Socket) -> Witness {
        match socket.is_connected() {
            false => Witness::default(),
            true => Witness {
                local: self.stays_here(socket.remote.ip()),
                proxied: socket.protocol == IPPROTO_TCP && self.has_peer(socket),
                flow: self.flow(socket),
            },
        }
    }

    fn stays_here(&mut self, remote: IpAddr) -> bool {
        let request = |batch: &mut Batch| fib::get_way(batch, remote);
        answer(self.rt.ask(&request, fib::parse_way)).unwrap_or(false)
    }

    /// Whether the other end of the connection is a socket of this host, though its address need not
    /// be: that of a TPROXY server.
    fn has_peer(&mut self, socket: &Socket) -> bool {
        let Some(diag) = &mut self.diag else {
            return false;
        };
        let request = |batch: &mut Batch| diag::get_peer(batch, socket);
        let peer = answer(diag.ask(&request, |message| diag::parse(message, socket.protocol)));
        peer.is_some_and(|peer| peer.state != TCP_LISTEN)
    }

    fn flow(&mut self, socket: &Socket) -> Option<Flow> {
        let (local, remote) = (socket.local, socket.remote);
        let request = |batch: &mut Batch| conntrack::get(batch, socket.protocol, local, remote);
        answer(self.nft.ask(&request, |message| conntrack::parse(message, local)))
    }

    /// Has conntrack forget the flows with these marks.
    pub fn forget_flows(&mut self, marks: &[Mark]) {
        for Mark { value, mask } in marks.iter().copied() {
            let request = |batch: &mut Batch| conntrack::forget(batch, value, mask);
            match self.nft.ask(&request, |_| None::<()>) {
                Ok(Ok(_)) => {}
                Ok(Err(errno)) => log!(Debug, "unable to forget flows: {}", reason(errno)),
                Err(error) => log!(Debug, "unable to forget flows: {error}"),
            }
        }
    }

    /// What the flows with this mark have carried; `None` where conntrack does not tell.
    pub fn traffic(&mut self, mark: Mark) -> Option<Vec<conntrack::Traffic>> {
        let request = |batch: &mut Batch| conntrack::get_marked(batch, mark.value, mark.mask);
        self.nft.dump(&request, conntrack::parse_traffic).ok()?.ok()
    }

    fn destroy(&mut self, socket: &Socket) -> std::result::Result<(), Errno> {
        let Some(diag) = self.diag.as_mut().filter(|_| can_destroy()) else {
            return Err(Errno::EOPNOTSUPP);
        };
        let request = |batch: &mut Batch| diag::destroy(batch, socket);
        match diag.ask(&request, |_| None::<()>) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(errno)) => Err(errno),
            Err(error) => Err(error.errno().unwrap_or(Errno::EIO)),
        }
    }
}

fn answer<T>(asked: Result<std::result::Result<Option<T>, Errno>>) -> Option<T> {
    asked.ok()?.ok()?
}

/// Whether conntrack counts what flows carry (nf_conntrack_acct of
/// Documentation/networking/nf_conntrack-sysctl.rst).
pub fn conntrack_counts() -> bool {
    let sysctl = std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_acct");
    sysctl.is_ok_and(|text| text.trim() == "1")
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
