//! The search for stale sockets: those that may be stale are asked of the kernel, judged by what it
//! tells of them, and ended, by and by. What is stale is decided in [`crate::stale`].

use std::time::Instant;

use nix::errno::Errno;

use crate::error::reason;
use crate::kernel::sockets::Asker;
use crate::kernel::Kernel;
use crate::log;
use crate::netlink::diag::{SeenSocket, TCP_STATES, UDP_STATES};
use crate::netlink::uapi::*;
use crate::small::SmallSet;
use crate::stale::{Judge, Ports, Suspects};

/// What is listed: of each protocol the sockets that may be stale, and then, where there are any, the
/// ports of those in a state that is a witness. By and by: anybody may have 10,000s of them.
#[derive(Clone, Copy)]
enum Phase {
    Sockets(u8),
    Ports(u8),
    Done,
}

/// Sockets that may be stale, and what it takes to judge them.
pub struct Doubts {
    judge: Judge,
    phase: Phase,
    sockets: Vec<SeenSocket>,
    /// What listens.
    tcp: Ports,
    /// What is not connected.
    udp: Ports,
    pub ended: usize,
}

impl Doubts {
    /// Begins to look for sockets that may be stale; `None` where there are none, or none can be ended.
    pub fn begin(kernel: &mut Kernel, judge: Judge) -> Option<Doubts> {
        if !kernel.ends_sockets() || judge.suspects().is_empty() {
            return None;
        }
        let (tcp, udp) = (Ports::new(), Ports::new());
        let phase = Phase::Sockets(IPPROTO_TCP);
        let doubts = Doubts { judge, phase, sockets: Vec::new(), tcp, udp, ended: 0 };
        doubts.list(kernel);
        Some(doubts)
    }

    /// Begins what is to be listed by now.
    fn list(&self, kernel: &mut Kernel) {
        let ids = || self.judge.suspects().ids().unwrap_or_default();
        let (protocol, states, ids) = match self.phase {
            Phase::Sockets(IPPROTO_TCP) => (IPPROTO_TCP, TCP_STATES, ids()),
            Phase::Sockets(protocol) => (protocol, UDP_STATES, ids()),
            Phase::Ports(IPPROTO_TCP) => (IPPROTO_TCP, 1 << TCP_LISTEN, Vec::new()),
            Phase::Ports(protocol) => (protocol, 1 << TCP_CLOSE, Vec::new()),
            Phase::Done => return,
        };
        kernel.list_sockets(Asker::Doubts, &[protocol], states, &ids);
    }

    /// Takes some more of what is listed.
    fn take(&mut self, kernel: &mut Kernel) {
        let Doubts { judge, sockets, tcp, udp, .. } = self;
        let more = match self.phase {
            Phase::Sockets(_) => kernel.more_sockets(Asker::Doubts, &mut |socket| {
                sockets.extend(judge.doubts(&socket).then_some(socket));
            }),
            Phase::Ports(protocol) => {
                let ports = if protocol == IPPROTO_TCP { tcp } else { udp };
                kernel.more_sockets(Asker::Doubts, &mut |socket| {
                    *ports.entry(socket.local.port()).or_default() += 1;
                })
            }
            Phase::Done => return,
        };
        if more {
            return;
        }
        let any = |protocol| self.sockets.iter().any(|socket| socket.protocol == protocol);
        self.phase = match self.phase {
            Phase::Sockets(protocol) if any(protocol) => Phase::Ports(protocol),
            Phase::Sockets(IPPROTO_TCP) | Phase::Ports(IPPROTO_TCP) => Phase::Sockets(IPPROTO_UDP),
            _ => Phase::Done,
        };
        self.list(kernel);
    }

    /// Lists sockets, judges them and ends the stale ones until `until`; true when that is done.
    pub fn go_on(&mut self, kernel: &mut Kernel, until: Instant) -> bool {
        while !matches!(self.phase, Phase::Done) {
            self.take(kernel);
            if Instant::now() >= until {
                return false;
            }
        }
        while let Some(socket) = self.sockets.pop() {
            let ports = match socket.protocol {
                IPPROTO_TCP => &self.tcp,
                _ => &self.udp,
            };
            let witness = kernel.witness(&socket);
            if self.judge.ends(&socket, ports, witness) {
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
    let ports: SmallSet<u16> =
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
