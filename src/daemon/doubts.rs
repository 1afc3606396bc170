//! The search for stale sockets: those that may be stale are asked of the kernel, judged by what it
//! tells of them, and ended, by and by. What is stale is decided in [`crate::stale`].

use std::collections::HashSet;
use std::time::Instant;

use nix::errno::Errno;

use crate::error::reason;
use crate::kernel::Kernel;
use crate::log;
use crate::netlink::diag::{SeenSocket, TCP_STATES, UDP_STATES};
use crate::netlink::uapi::*;
use crate::stale::{Judge, Ports, Suspects};

/// Sockets that may be stale, and what it takes to judge them.
pub struct Doubts {
    judge: Judge,
    sockets: Vec<SeenSocket>,
    /// What listens.
    tcp: Ports,
    /// What is not connected.
    udp: Ports,
    pub ended: usize,
}

impl Doubts {
    /// Looks for sockets that may be stale; `None` where there are none, or none can be ended.
    pub fn find(kernel: &mut Kernel, judge: Judge) -> Option<Doubts> {
        if !kernel.ends_sockets() || judge.suspects().is_empty() {
            return None;
        }
        let (mut sockets, mut tcp, mut udp) = (Vec::new(), Ports::new(), Ports::new());
        let ids = judge.suspects().ids().unwrap_or_default();
        for (protocol, states, ports, state) in [
            (IPPROTO_TCP, TCP_STATES, &mut tcp, TCP_LISTEN),
            (IPPROTO_UDP, UDP_STATES, &mut udp, TCP_CLOSE),
        ] {
            let doubtful = |socket| judge.doubts(&socket).then_some(socket);
            let found = kernel.sockets(protocol, states, &ids, doubtful);
            if found.is_empty() {
                continue;
            }
            sockets.extend(found);
            for port in kernel.sockets(protocol, 1 << state, &[], |s| Some(s.local.port())) {
                *ports.entry(port).or_default() += 1;
            }
        }
        (!sockets.is_empty()).then_some(Doubts { judge, sockets, tcp, udp, ended: 0 })
    }

    /// Judges sockets and ends the stale ones until `until`; true when that is done.
    pub fn settle(&mut self, kernel: &mut Kernel, until: Instant) -> bool {
        while let Some(socket) = self.sockets.pop() {
            let ports = match socket.protocol {
                IPPROTO_TCP => &self.tcp,
                _ => &self.udp,
            };
            if self.judge.ends(&socket, ports, kernel.witness(&socket)) {
                match kernel.end_socket(&socket) {
                    Ok(()) => self.ended += 1,
                    // it has ended by itself
                    Err(Errno::ENOENT) => {}
                    Err(errno) => {
                        // not of this protocol, or none at all
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
        self.sockets.is_empty()
    }
}

/// Tells conntrack, which may begin with our table, of the connections that others made to services
/// of these cgroups: where the service speaks next, it would seem to have begun them.
pub fn tell_inbound(kernel: &mut Kernel, suspects: &Suspects) {
    if suspects.is_empty() {
        return;
    }
    let listening = |socket: SeenSocket| Some(socket.local.port());
    let ports: HashSet<u16> =
        kernel.sockets(IPPROTO_TCP, 1 << TCP_LISTEN, &[], listening).into_iter().collect();
    let inbound = |socket: SeenSocket| {
        let ours = socket.cgroup.is_some_and(|cgroup| suspects.of(cgroup).is_some());
        let ours = ours && !socket.remote.ip().is_loopback();
        (ours && ports.contains(&socket.local.port())).then_some((socket.local, socket.remote))
    };
    let ids = suspects.ids().unwrap_or_default();
    for (local, remote) in kernel.sockets(IPPROTO_TCP, 1 << TCP_ESTABLISHED, &ids, inbound) {
        if !kernel.tell_inbound(local, remote) {
            return;
        }
    }
}
