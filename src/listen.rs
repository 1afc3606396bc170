//! Who listens: sockets of this network namespace that take what arrives at a port, as sock_diag(7)
//! tells of them, or else /proc/net/tcp and its like (proc_net(5)), which know less. What TPROXY
//! makes of them is that of net/netfilter/nft_tproxy.c and nf_tproxy_ipv4.c.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::net::{Family, L4};
use crate::netlink::diag;
use crate::netlink::msg::Batch;
use crate::netlink::parse::ip;
use crate::netlink::socket::Socket;
use crate::netlink::uapi::*;

/// A socket that waits for connections, or for datagrams from anybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    pub l4: L4,
    /// That of the socket; one of IPv6 at the wildcard address may take IPv4 as well.
    pub family: Family,
    pub address: IpAddr,
    pub port: u16,
    pub v6only: bool,
    /// Index of the interface that it is bound to; 0 for none.
    pub device: u32,
    pub uid: u32,
    /// `None` where the kernel does not tell.
    pub cgroup: Option<u64>,
    /// IP_TRANSPARENT; `None` where the kernel does not tell.
    pub transparent: Option<bool>,
}

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

impl Listener {
    /// Whether it takes what is addressed to its port in that family, at any address of its own.
    fn speaks(&self, family: Family) -> bool {
        let dual = self.address.is_unspecified() && !self.v6only && self.family == Family::V6;
        let own = Family::of(&self.address);
        // the IPv6 wildcard is canonical as that; an IPv4 address of a dual-stack socket is IPv4
        family == own || (family == Family::V4 && dual)
    }

    /// Whether what arrives at an address of this host is its.
    pub fn is_at(&self, l4: L4, address: IpAddr, port: u16) -> bool {
        let family = Family::of(&address);
        let here = self.address.is_unspecified() || self.address == address;
        self.l4 == l4 && self.port == port && here && self.speaks(family)
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
        let here = match (address, from) {
            _ if self.address.is_unspecified() => true,
            (Some(address), _) => self.address == address,
            (None, Origin::Host) => [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]
                .contains(&self.address),
            // which interface's it is would be for the moment only
            (None, Origin::Gateway) => !self.address.is_loopback(),
        };
        let device = match from {
            Origin::Host => [0, LO].contains(&self.device),
            Origin::Gateway => self.device != LO,
        };
        self.l4 == l4 && self.port == port && self.speaks(family) && here && device
    }
}

/// What TPROXY finds for packets of a family that are handed to `port`, at `address` or none.
pub fn finds(
    listeners: &[Listener],
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

/// All listeners that there are now, by a socket of sock_diag(7). What cannot be asked (a kernel without IPv6, or without
/// CONFIG_INET_DIAG and /proc) holds none.
pub fn listeners(mut socket: Option<&mut Socket>) -> Vec<Listener> {
    let mut all = Vec::new();
    for (l4, protocol, state) in
        [(L4::Tcp, IPPROTO_TCP, TCP_LISTEN), (L4::Udp, IPPROTO_UDP, TCP_CLOSE)]
    {
        for (family, number) in [(Family::V4, AF_INET), (Family::V6, AF_INET6)] {
            let request = |batch: &mut Batch| diag::get(batch, number, protocol, 1 << state, &[]);
            let answer = socket
                .as_mut()
                .and_then(|socket| socket.dump(&request, |m| diag::parse(m, protocol)).ok()?.ok());
            match answer {
                Some(sockets) => all.extend(sockets.iter().map(|socket| of(socket, l4, family))),
                None => all.extend(from_proc(l4, family)),
            }
        }
    }
    all
}

fn of(socket: &diag::SeenSocket, l4: L4, family: Family) -> Listener {
    Listener {
        l4,
        family,
        address: socket.local.ip(),
        port: socket.local.port(),
        v6only: socket.v6only,
        device: socket.device,
        uid: socket.uid,
        cgroup: socket.cgroup,
        transparent: socket.transparent,
    }
}

fn from_proc(l4: L4, family: Family) -> Vec<Listener> {
    let name = match (l4, family) {
        (L4::Tcp, Family::V4) => "tcp",
        (L4::Tcp, Family::V6) => "tcp6",
        (L4::Udp, Family::V4) => "udp",
        (L4::Udp, Family::V6) => "udp6",
    };
    let text = std::fs::read_to_string(format!("/proc/net/{name}"));
    parse(&text.unwrap_or_default(), l4, family)
}

/// Lines `sl: LOCAL:PORT REMOTE:PORT STATE … UID`; words of addresses are in host order.
fn parse(text: &str, l4: L4, family: Family) -> Vec<Listener> {
    let state = match l4 {
        L4::Tcp => TCP_LISTEN,
        L4::Udp => TCP_CLOSE,
    };
    let line = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (address, port) = fields.get(1)?.split_once(':')?;
        let found = u8::from_str_radix(fields.get(3)?, 16).ok()?;
        (found == state).then_some(Listener {
            l4,
            family,
            address: address_of(address)?,
            port: u16::from_str_radix(port, 16).ok()?,
            v6only: false,
            device: 0,
            uid: fields.get(7)?.parse().ok()?,
            cgroup: None,
            transparent: None,
        })
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
        let tcp = parse(TCP, L4::Tcp, Family::V4);
        assert_eq!((tcp.len(), tcp[0].uid, tcp[0].port), (1, 7, 7893));
        let udp = parse(UDP6, L4::Udp, Family::V6);
        assert_eq!(udp[1].address, "2001:db8::7".parse::<IpAddr>().unwrap());
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
            let address: IpAddr = address.parse().unwrap();
            let family = Family::of(&address);
            let (l4, port, uid) = (L4::Tcp, 1, 0);
            Listener {
                l4,
                family,
                address,
                port,
                v6only,
                device,
                uid,
                cgroup: None,
                transparent: Some(transparent),
            }
        };
        let look = |listener: &Listener, family, from| {
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
