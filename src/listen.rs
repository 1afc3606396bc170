//! Who listens: sockets of this network namespace that take what arrives at a port, from
//! /proc/net/tcp and its like (proc_net(5), net/ipv4/tcp_ipv4.c). The parser is pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::nft::expr::L4;

/// A socket that waits for connections, or for datagrams from anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listener {
    pub l4: L4,
    pub address: IpAddr,
    pub port: u16,
}

/// All listeners that there are now. A file that cannot be read (a kernel without IPv6) holds none.
pub fn listeners() -> Vec<Listener> {
    let mut all = Vec::new();
    for (file, l4) in [
        ("/proc/net/tcp", L4::Tcp),
        ("/proc/net/tcp6", L4::Tcp),
        ("/proc/net/udp", L4::Udp),
        ("/proc/net/udp6", L4::Udp),
    ] {
        all.extend(parse(&std::fs::read_to_string(file).unwrap_or_default(), l4));
    }
    all
}

/// Whether some listener of `l4` takes what TPROXY hands to `port`: one at the wildcard address or
/// at one of `addresses`; without `addresses`, TPROXY looks for one at the address of `lo`.
pub fn takes(listeners: &[Listener], l4: L4, port: u16, addresses: &[IpAddr]) -> bool {
    let fits = |address: &IpAddr| {
        let lo = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
        let wanted = if addresses.is_empty() { &lo } else { addresses };
        address.is_unspecified() || wanted.contains(address)
    };
    (listeners.iter()).any(|l| l.l4 == l4 && l.port == port && fits(&l.address))
}

/// `TCP_LISTEN` and, for unconnected UDP sockets, `TCP_CLOSE` of include/net/tcp_states.h.
const TCP_LISTEN: &str = "0A";
const TCP_CLOSE: &str = "07";

/// Lines `sl: LOCAL:PORT REMOTE:PORT STATE …`; words of addresses are in host order.
fn parse(text: &str, l4: L4) -> Vec<Listener> {
    let state = match l4 {
        L4::Tcp => TCP_LISTEN,
        L4::Udp => TCP_CLOSE,
    };
    let line = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, _remote, found) = (fields.next()?, fields.next()?, fields.next()?);
        let (address, port) = local.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        let address = address_of(address)?;
        (found == state).then_some(Listener { l4, address, port })
    };
    text.lines().skip(1).filter_map(line).collect()
}

fn address_of(hex: &str) -> Option<IpAddr> {
    let mut bytes = Vec::new();
    for at in (0..hex.len()).step_by(8) {
        let word = u32::from_str_radix(hex.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when
   0: 0100007F:1ED5 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0100007F:1ED6 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 2
   2: cut
";
    const UDP6: &str = "  sl  local_address remote_address st
   5: 00000000000000000000000000000000:1ED5 00000000000000000000000000000000:0000 07 0 0
   6: B80D0120000000000000000007000000:0035 00000000000000000000000000000000:0000 07 0 0
";

    #[test]
    #[cfg(target_endian = "little")]
    fn lines_of_proc_net() {
        let tcp = parse(TCP, L4::Tcp);
        assert_eq!(tcp.len(), 1);
        let udp = parse(UDP6, L4::Udp);
        assert_eq!(udp[1].address, "2001:db8::7".parse::<IpAddr>().unwrap());
        let all = [tcp, udp].concat();
        assert!(takes(&all, L4::Tcp, 7893, &[]));
        assert!(takes(&all, L4::Udp, 7893, &[]));
        assert!(!takes(&all, L4::Tcp, 7893, &["192.0.2.1".parse().unwrap()]));
        assert!(!takes(&all, L4::Tcp, 7894, &[]), "connected, not listening");
        assert!(!takes(&all, L4::Udp, 53, &[]), "at another address");
        assert!(takes(&all, L4::Udp, 53, &["2001:db8::7".parse().unwrap()]));
    }
}
