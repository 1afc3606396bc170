//! Who listens: sockets of this network namespace that take what arrives at a port, as sock_diag(7)
//! tells of them, or else /proc/net/tcp and its like (proc_net(5)), which know less. What TPROXY
//! makes of them is that of net/netfilter/nft_tproxy.c and nf_tproxy_ipv4.c.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::net::{Family, L4};
use crate::netlink::diag::{self, SeenSocket};
use crate::netlink::msg::Batch;
use crate::netlink::parse::ip;
use crate::netlink::socket::Socket;
use crate::netlink::uapi::*;
use crate::small::SmallSet;

/// Where packets come from that TPROXY looks for a socket for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// By `lo`, from this host.
    Host,
    /// By an interface of a gateway section.
    Gateway,
}

/// What TPROXY finds; the best of several sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finds {
    Nothing,
    /// A socket without IP_TRANSPARENT, which it does not take.
    Opaque,
    One,
}

/// The index of `lo` in every network namespace.
const LO: u32 = 1;

impl SeenSocket {
    /// Whether it takes what is addressed to its port in that family, at any address of its own.
    fn speaks(&self, family: Family) -> bool {
        match family {
            Family::V4 => self.speaks_ipv4(),
            Family::V6 => self.local.is_ipv6(),
        }
    }

    /// Whether it listens at a port, to some address of that family.
    fn listens(&self, l4: L4, family: Family, port: u16) -> bool {
        self.protocol == l4.number() && self.local.port() == port && self.speaks(family)
    }

    /// Whether what arrives at an address of this host is its.
    pub fn is_at(&self, l4: L4, address: IpAddr, port: u16) -> bool {
        let here = self.local.ip().is_unspecified() || self.local.ip() == address;
        here && self.listens(l4, Family::of(&address), port)
    }

    /// Whether TPROXY would look at it. Without an `address`, it looks at the incoming interface's
    /// own one and at the wildcards.
    fn meets(
        &self,
        l4: L4,
        family: Family,
        port: u16,
        address: Option<IpAddr>,
        from: Origin,
    ) -> bool {
        let own = self.local.ip();
        let here = match (address, from) {
            _ if own.is_unspecified() => true,
            (Some(address), _) => own == address,
            (None, Origin::Host) => {
                [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()].contains(&own)
            }
            // which interface's it is would be for the moment only
            (None, Origin::Gateway) => !own.is_loopback(),
        };
        let device = match from {
            Origin::Host => [0, LO].contains(&self.device),
            Origin::Gateway => self.device != LO,
        };
        here && device && self.listens(l4, family, port)
    }
}

/// What TPROXY finds for packets of a family that are handed to `port`, at `address` or none.
pub fn finds(
    listeners: &[SeenSocket],
    (l4, family): (L4, Family),
    port: u16,
    address: Option<IpAddr>,
    from: Origin,
) -> Finds {
    let met = listeners.iter().filter(|l| l.meets(l4, family, port, address, from));
    let found = met.map(|listener| match listener.transparent {
        Some(false) => Finds::Opaque,
        Some(true) | None => Finds::One,
    });
    found.max().unwrap_or(Finds::Nothing)
}

/// All listeners that there are now, by a socket of sock_diag(7). What cannot be asked (a kernel
/// without IPv6, or without CONFIG_INET_DIAG and /proc) holds none.
pub fn listeners(mut socket: Option<&mut Socket>) -> Vec<SeenSocket> {
    let mut all = Vec::new();
    for kind @ (protocol, family) in diag::KINDS {
        let states = 1 << waiting(protocol);
        let request = |batch: &mut Batch| diag::get(batch, family, protocol, states, &[]);
        let answer = socket
            .as_mut()
            .and_then(|socket| socket.dump(&request, |m| diag::parse(m, protocol)).ok()?.ok());
        all.extend(answer.unwrap_or_else(|| from_proc(kind)));
    }
    all
}

/// UDP sockets that are connected, at the ports of these: each has what its peer sends there.
pub fn beside(mut socket: Option<&mut Socket>, listeners: &[SeenSocket]) -> Vec<SeenSocket> {
    let udp = listeners.iter().filter(|own| own.protocol == IPPROTO_UDP);
    let ports: SmallSet<u16> = udp.map(|own| own.local.port()).collect();
    let mut all = Vec::new();
    for (protocol, family) in diag::KINDS.into_iter().filter(|kind| kind.0 == IPPROTO_UDP) {
        let states = 1 << TCP_ESTABLISHED;
        let request = |batch: &mut Batch| diag::get(batch, family, protocol, states, &[]);
        let answer = socket
            .as_mut()
            .and_then(|socket| socket.dump(&request, |m| diag::parse(m, protocol)).ok()?.ok());
        let found = answer.into_iter().flatten();
        all.extend(found.filter(|socket| ports.contains(&socket.local.port())));
    }
    all
}

/// The state of a socket that waits for connections, or for datagrams from anybody.
fn waiting(protocol: u8) -> u8 {
    match protocol {
        IPPROTO_TCP => TCP_LISTEN,
        _ => TCP_CLOSE,
    }
}

fn from_proc(kind: (u8, u8)) -> Vec<SeenSocket> {
    let name = match kind {
        (IPPROTO_TCP, AF_INET) => "tcp",
        (IPPROTO_TCP, _) => "tcp6",
        (_, AF_INET) => "udp",
        _ => "udp6",
    };
    let text = std::fs::read_to_string(format!("/proc/net/{name}"));
    parse(&text.unwrap_or_default(), kind)
}

/// Lines `sl: LOCAL:PORT REMOTE:PORT STATE … UID`; words of addresses are in host order.
fn parse(text: &str, kind: (u8, u8)) -> Vec<SeenSocket> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (address, port) = fields.get(1)?.split_once(':')?;
        let state = u8::from_str_radix(fields.get(3)?, 16).ok()?;
        let local = SocketAddr::new(address_of(address)?, u16::from_str_radix(port, 16).ok()?);
        let uid = fields.get(7)?.parse().ok()?;
        (state == waiting(kind.0)).then(|| SeenSocket::plain(kind, state, local, uid))
    };
    text.lines().skip(1).filter_map(line).collect()
}

fn address_of(hex: &str) -> Option<IpAddr> {
    let mut bytes = Vec::new();
    for at in (0..hex.len()).step_by(8) {
        let word = u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    ip(&bytes).map(|ip| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when
   0: 0100007F:1ED5 00000000:0000 0A 00000000:00000000 00:00000000 00000000    7        0 1
   1: 0100007F:1ED6 0100007F:0050 01 00000000:00000000 00:00000000 00000000    0        0 2
   2: cut
";
    const UDP6: &str = "  sl  local_address remote_address st
   5: 00000000000000000000000000000000:1ED5 00000000000000000000000000000000:0000 07 0 0 0 0
   6: B80D0120000000000000000007000000:0035 00000000000000000000000000000000:0000 07 0 0 0 0
";

    #[test]
    #[cfg(target_endian = "little")]
    fn lines_of_proc_net() {
        let tcp = parse(TCP, (IPPROTO_TCP, AF_INET));
        assert_eq!((tcp.len(), tcp[0].uid, tcp[0].local.port()), (1, 7, 7893));
        let udp = parse(UDP6, (IPPROTO_UDP, AF_INET6));
        assert_eq!(udp[1].local.ip(), "2001:db8::7".parse::<IpAddr>().unwrap());
        let all = [tcp, udp].concat();
        let finds = |l4, family, port, address: Option<&str>| {
            let address = address.map(|a| a.parse().unwrap());
            finds(&all, (l4, family), port, address, Origin::Host) == Finds::One
        };
        assert!(finds(L4::Tcp, Family::V4, 7893, None));
        assert!(!finds(L4::Tcp, Family::V6, 7893, None));
        assert!(finds(L4::Udp, Family::V4, 7893, None), "dual-stack");
        assert!(finds(L4::Udp, Family::V6, 7893, None));
        assert!(!finds(L4::Tcp, Family::V4, 7893, Some("192.0.2.1")));
        assert!(!finds(L4::Tcp, Family::V4, 7894, None), "connected, not listening");
        assert!(!finds(L4::Udp, Family::V6, 53, None), "at another address");
        assert!(finds(L4::Udp, Family::V6, 53, Some("2001:db8::7")));
    }

    #[test]
    fn what_tproxy_looks_at() {
        let at = |address: &str, v6only, device, transparent| {
            let local = SocketAddr::new(address.parse().unwrap(), 1);
            let kind = (IPPROTO_TCP, if local.is_ipv4() { AF_INET } else { AF_INET6 });
            let mut socket = SeenSocket::plain(kind, TCP_LISTEN, local, 0);
            (socket.v6only, socket.device, socket.transparent) =
                (v6only, device, Some(transparent));
            socket
        };
        let look = |listener: &SeenSocket, family, from| {
            finds(std::slice::from_ref(listener), (L4::Tcp, family), 1, None, from)
        };
        use {Family::*, Finds::*, Origin::*};
        for (listener, family, host, gateway) in [
            (at("0.0.0.0", false, 0, true), V4, One, One),
            (at("0.0.0.0", false, 0, true), V6, Nothing, Nothing),
            (at("::", false, 0, true), V4, One, One),
            (at("::", true, 0, true), V4, Nothing, Nothing),
            (at("::", true, 0, true), V6, One, One),
            (at("127.0.0.1", false, 0, true), V4, One, Nothing),
            (at("127.0.0.2", false, 0, true), V4, Nothing, Nothing),
            (at("::1", false, 0, true), V6, One, Nothing),
            (at("192.0.2.1", false, 0, true), V4, Nothing, One),
            (at("0.0.0.0", false, 0, false), V4, Opaque, Opaque),
            (at("0.0.0.0", false, 7, true), V4, Nothing, One),
            (at("0.0.0.0", false, 1, true), V4, One, Nothing),
        ] {
            let found = [Host, Gateway].map(|from| look(&listener, family, from));
            assert_eq!(found, [host, gateway], "{listener:?} {family:?}");
        }
        let both = [at("0.0.0.0", false, 0, false), at("127.0.0.1", false, 0, true)];
        assert_eq!(finds(&both, (L4::Tcp, V4), 1, None, Host), One);
        assert!(both[0].is_at(L4::Tcp, "192.0.2.7".parse().unwrap(), 1));
        assert!(!both[1].is_at(L4::Tcp, "192.0.2.7".parse().unwrap(), 1));
    }
}
