//! Who talks now: the sockets of this network namespace by the cgroup and the user that they belong
//! to. Pure; [`crate::host`] has looked.
//!
//! What counts as a flow is what this host's output decides about: what a socket sends that somebody
//! here began. Connections that others made, what stays on this host, and what only listens stand
//! apart.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use crate::net::L4;
use crate::netlink::diag::{SeenSocket, TCP_STATES, UDP_STATES};
use crate::netlink::uapi::*;
use crate::small::SmallSet;

/// Whose the sockets are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Holder {
    Cgroup(u64),
    /// A tunnel of the kernel, by its kind: what it sends has no cgroup.
    Tunnel(String),
    /// The kernel does not tell.
    Unknown,
}

/// The sockets of one holder and user.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Talker {
    pub flows: usize,
    /// Connections that others made to this host.
    pub inbound: usize,
    /// Between addresses of this host.
    pub local: usize,
    /// What it waits at.
    pub listens: BTreeSet<(L4, u16)>,
    /// Of its flows.
    pub protocols: SmallSet<L4>,
    /// The remote ends of its flows, and how many go there.
    remotes: HashMap<SocketAddr, usize>,
}

impl Talker {
    /// The remote ends that most of its flows go to.
    pub fn remotes(&self, most: usize) -> Vec<SocketAddr> {
        let mut all: Vec<_> = self.remotes.iter().collect();
        all.sort_unstable_by_key(|(remote, flows)| (Reverse(**flows), **remote));
        all.into_iter().take(most).map(|(remote, _)| *remote).collect()
    }
}

/// The states of sockets to look at, by protocol: those that packets can still leave by, and
/// listeners.
pub fn states(protocol: u8) -> u32 {
    match protocol {
        IPPROTO_TCP => TCP_STATES | 1 << TCP_LISTEN,
        _ => UDP_STATES,
    }
}

/// What is known of this host besides.
#[derive(Debug)]
pub struct Scene {
    /// Its addresses, loopback ones apart.
    pub addresses: HashSet<IpAddr>,
    /// The ports that the kernel gives to sockets that ask for none.
    pub chosen: RangeInclusive<u16>,
    /// Tunnels of the kernel by their UDP port.
    pub tunnels: HashMap<u16, String>,
}

impl Scene {
    fn has(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses.contains(&address)
    }

    /// The tunnel that a socket is of.
    fn tunnel(&self, socket: &SeenSocket) -> Option<&str> {
        let free = socket.protocol == IPPROTO_UDP && !socket.is_connected();
        match free.then(|| self.tunnels.get(&socket.local.port())) {
            Some(Some(kind)) => Some(kind),
            Some(None) if socket.unlimited => Some("wireguard"),
            _ => None,
        }
    }
}

/// Everybody who has sockets, by holder and uid.
pub fn talkers(sockets: &[SeenSocket], scene: &Scene) -> Vec<((Holder, u32), Talker)> {
    let waits = |socket: &SeenSocket| match socket.protocol {
        IPPROTO_TCP => socket.state == TCP_LISTEN,
        _ => !socket.is_connected(),
    };
    let ports: HashSet<(u8, u16)> = sockets
        .iter()
        .filter(|socket| waits(socket))
        .map(|socket| (socket.protocol, socket.local.port()))
        .collect();
    let mut all: HashMap<(Holder, u32), Talker> = HashMap::new();
    for socket in sockets {
        let holder = match (scene.tunnel(socket), socket.cgroup) {
            (Some(kind), _) => Holder::Tunnel(kind.into()),
            (None, Some(id)) => Holder::Cgroup(id),
            // what is left of a closed one
            (None, None) if socket.state == TCP_FIN_WAIT2 => continue,
            (None, None) => Holder::Unknown,
        };
        let talker = all.entry((holder, socket.uid)).or_default();
        let l4 = if socket.protocol == IPPROTO_TCP { L4::Tcp } else { L4::Udp };
        let (local, remote) = (socket.local, socket.remote);
        if waits(socket) {
            // one that took the port it was given speaks first
            let casual = l4 == L4::Udp && scene.chosen.contains(&local.port());
            if casual && local.ip().is_loopback() {
                talker.local += 1;
            } else if casual {
                talker.flows += 1;
                talker.protocols.insert(l4);
            } else {
                talker.listens.insert((l4, local.port()));
            }
        } else if scene.has(remote.ip()) {
            talker.local += 1;
        } else if ports.contains(&(socket.protocol, local.port())) || !scene.has(local.ip()) {
            // a proxy's socket that it was handed has the address that its client dialled
            talker.inbound += 1;
        } else {
            talker.flows += 1;
            talker.protocols.insert(l4);
            *talker.remotes.entry(remote).or_default() += 1;
        }
    }
    let mut all: Vec<_> = all.into_iter().collect();
    all.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::diag::example;

    fn scene() -> Scene {
        Scene {
            addresses: ["192.0.2.1", "2001:db8::1"].map(|a| a.parse().unwrap()).into(),
            chosen: 32768..=60999,
            tunnels: [(4789, "vxlan".to_string())].into(),
        }
    }

    fn tcp(state: u8, local: &str, remote: &str) -> SeenSocket {
        example(IPPROTO_TCP, state, local, remote)
    }

    fn udp(local: &str, remote: &str) -> SeenSocket {
        let state = if remote.is_empty() { TCP_CLOSE } else { TCP_ESTABLISHED };
        example(IPPROTO_UDP, state, local, remote)
    }

    fn one(sockets: &[SeenSocket]) -> Talker {
        let found = talkers(sockets, &scene());
        assert_eq!(found.len(), 1);
        found.into_iter().next().unwrap().1
    }

    #[test]
    fn flows_and_what_stands_apart() {
        let counts = |sockets: &[SeenSocket]| {
            let found = one(sockets);
            (found.flows, found.inbound, found.local, found.listens.len())
        };
        let listener = || tcp(TCP_LISTEN, "0.0.0.0:80", "");
        for (sockets, want) in [
            (vec![tcp(TCP_ESTABLISHED, "192.0.2.1:40000", "203.0.113.7:80")], (1, 0, 0, 0)),
            (vec![tcp(TCP_SYN_SENT, "[2001:db8::1]:40000", "[2001:db8:2::7]:80")], (1, 0, 0, 0)),
            (vec![udp("192.0.2.1:40000", "203.0.113.7:53")], (1, 0, 0, 0)),
            (vec![listener()], (0, 0, 0, 1)),
            (vec![udp("0.0.0.0:53", "")], (0, 0, 0, 1)),
            (vec![udp("0.0.0.0:40000", "")], (1, 0, 0, 0)),
            (vec![udp("[::]:40000", "")], (1, 0, 0, 0)),
            (vec![udp("127.0.0.1:40000", "")], (0, 0, 1, 0)),
            (
                vec![listener(), tcp(TCP_ESTABLISHED, "192.0.2.1:80", "203.0.113.7:4000")],
                (0, 1, 0, 1),
            ),
            (vec![udp("0.0.0.0:53", ""), udp("192.0.2.1:53", "203.0.113.7:4000")], (0, 1, 0, 1)),
            // a listener of the other protocol does not count
            (
                vec![udp("0.0.0.0:80", ""), tcp(TCP_ESTABLISHED, "192.0.2.1:80", "203.0.113.7:1")],
                (1, 0, 0, 1),
            ),
            (vec![tcp(TCP_ESTABLISHED, "127.0.0.1:40000", "127.0.0.1:80")], (0, 0, 1, 0)),
            (vec![tcp(TCP_ESTABLISHED, "192.0.2.1:40000", "192.0.2.1:80")], (0, 0, 1, 0)),
            // handed to a proxy: by this host, and by a gateway's client
            (vec![tcp(TCP_ESTABLISHED, "203.0.113.7:80", "192.0.2.1:40000")], (0, 0, 1, 0)),
            (vec![tcp(TCP_ESTABLISHED, "203.0.113.7:80", "192.168.1.9:40000")], (0, 1, 0, 0)),
        ] {
            assert_eq!(counts(&sockets), want, "{sockets:#?}");
        }
    }

    #[test]
    fn the_remotes_with_most_flows() {
        let to = |remote| tcp(TCP_ESTABLISHED, "192.0.2.1:40000", remote);
        let all = ["203.0.113.9:80", "203.0.113.7:443", "203.0.113.8:1", "203.0.113.7:443"];
        let found = one(&[all.map(to).to_vec(), vec![udp("0.0.0.0:40000", "")]].concat());
        assert_eq!(found.flows, 5);
        let want = ["203.0.113.7:443", "203.0.113.8:1", "203.0.113.9:80"];
        assert_eq!(found.remotes(3), want.map(|r| r.parse().unwrap()));
        assert_eq!(found.remotes(1).len(), 1);
        assert_eq!(found.protocols, [L4::Tcp, L4::Udp].into());
    }

    #[test]
    fn owners() {
        let mut others = udp("192.0.2.1:40000", "203.0.113.7:53");
        (others.uid, others.cgroup) = (1000, Some(2));
        let mut wireguard = udp("0.0.0.0:51820", "");
        wireguard.unlimited = true;
        let mut closed = tcp(TCP_FIN_WAIT2, "192.0.2.1:40000", "203.0.113.7:80");
        closed.cgroup = None;
        let mut old = others.clone();
        old.cgroup = None;
        let all = [others, wireguard, closed, udp("0.0.0.0:4789", ""), old];
        let found = talkers(&all, &scene());
        let tunnel = |kind: &str| Holder::Tunnel(kind.into());
        let want = [
            (Holder::Cgroup(2), 1000),
            (tunnel("vxlan"), 0),
            (tunnel("wireguard"), 0),
            (Holder::Unknown, 1000),
        ];
        assert_eq!(found.into_iter().map(|(who, _)| who).collect::<Vec<_>>(), want);
    }
}
