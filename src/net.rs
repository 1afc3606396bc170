//! Addresses, marks and interfaces: what the configuration and the rules both speak of. Pure data.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::netlink::uapi::{IPPROTO_TCP, IPPROTO_UDP, NFPROTO_IPV4, NFPROTO_IPV6};

/// The two layer 3 families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    pub fn of(address: &IpAddr) -> Family {
        match address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// `NFPROTO_*` and `AF_*`, which are the same number for both.
    pub fn number(self) -> u8 {
        [NFPROTO_IPV4, NFPROTO_IPV6][self as usize]
    }

    /// `ip` or `ip6`, as nft says it.
    pub fn nft(self) -> &'static str {
        ["ip", "ip6"][self as usize]
    }

    /// As people write it.
    pub fn name(self) -> &'static str {
        ["IPv4", "IPv6"][self as usize]
    }

    /// The same as a word of the configuration, of nft and of programs.
    pub fn word(self) -> &'static str {
        ["ipv4", "ipv6"][self as usize]
    }
}

/// The layer 4 protocols that a tproxy takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum L4 {
    Tcp,
    Udp,
}

impl L4 {
    pub fn number(self) -> u8 {
        [IPPROTO_TCP, IPPROTO_UDP][self as usize]
    }

    /// `tcp` or `udp`, as nft says it.
    pub fn nft(self) -> &'static str {
        ["tcp", "udp"][self as usize]
    }

    /// As people write it.
    pub fn name(self) -> &'static str {
        ["TCP", "UDP"][self as usize]
    }
}

/// The kernel's own route tables: default, main and local.
pub const KERNEL_TABLES: RangeInclusive<u32> = 253..=255;

/// The last priority that an ip rule may have to stand before that for the main table.
pub const LAST_PRIORITY: u32 = 32765;

/// How many priorities in a row our ip rules take (route.rs): a mark may lead to a table of others and
/// then to ours, and where it asks for all interfaces of a prefix there is one to go over, and one to
/// go on at.
pub const fn priorities(has_tables: bool, has_prefixes: bool) -> u32 {
    1 + has_tables as u32 + 2 * has_prefixes as u32
}

/// The same at most.
pub const MOST_PRIORITIES: u32 = priorities(true, true);

/// Whose sockets: users or groups, from one number to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    Users(u32, u32),
    Groups(u32, u32),
}

impl Owner {
    /// Whether a socket is one of these; `None` where that depends on a group that is not known.
    pub fn has(self, uid: u32, gid: Option<u32>) -> Option<bool> {
        match self {
            Owner::Users(first, last) => Some((first..=last).contains(&uid)),
            Owner::Groups(first, last) => gid.map(|gid| (first..=last).contains(&gid)),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, first, last) = match self {
            Owner::Users(first, last) => ("uid", first, last),
            Owner::Groups(first, last) => ("gid", first, last),
        };
        match first == last {
            true => write!(f, "{kind} {first}"),
            false => write!(f, "{kind}s {first}-{last}"),
        }
    }
}

/// A value under a mask: the bits of `mask` are compared or written, all others left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    pub value: u32,
    pub mask: u32,
}

/// An interface by its name, or all whose names begin so.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    /// 1 to 15 bytes; without the `*` of a prefix.
    pub name: String,
    pub prefix: bool,
}

impl Interface {
    /// Whether the interface of that name is meant.
    pub fn covers(&self, name: &str) -> bool {
        match self.prefix {
            true => name.starts_with(&self.name),
            false => name == self.name,
        }
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let star = if self.prefix { "*" } else { "" };
        write!(f, "{}{star}", self.name)
    }
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = ();

    /// `02:00:00:00:00:01`
    fn from_str(text: &str) -> Result<Mac, ()> {
        let mut mac = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut mac {
            let pair = pairs.next().filter(|pair| pair.len() == 2).ok_or(())?;
            // from_str_radix would take a sign
            if !pair.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| ())?;
        }
        pairs.next().map_or(Ok(Mac(mac)), |_| Err(()))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An inclusive range of addresses of one family, or of ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Range<A> {
    pub first: A,
    pub last: A,
}

/// An address, or a port, that intervals are made of.
pub trait Address: Copy + Ord + fmt::Display {
    const BITS: u32;
    const BYTES: usize = Self::BITS as usize / 8;
    fn to_bits(self) -> u128;
    fn from_bits(bits: u128) -> Self;
}

impl Address for Ipv4Addr {
    const BITS: u32 = 32;
    fn to_bits(self) -> u128 {
        u128::from(u32::from(self))
    }
    fn from_bits(bits: u128) -> Self {
        Ipv4Addr::from(bits as u32)
    }
}

impl Address for Ipv6Addr {
    const BITS: u32 = 128;
    fn to_bits(self) -> u128 {
        u128::from(self)
    }
    fn from_bits(bits: u128) -> Self {
        Ipv6Addr::from(bits)
    }
}

/// A port of TCP or UDP: no prefixes are made of those.
impl Address for u16 {
    const BITS: u32 = 16;
    fn to_bits(self) -> u128 {
        u128::from(self)
    }
    fn from_bits(bits: u128) -> Self {
        bits as u16
    }
}

impl<A: Address> Range<A> {
    /// The range of a prefix; host bits of `address` are ignored.
    pub fn prefix(address: A, length: u32) -> Range<A> {
        let host = match A::BITS - length {
            0 => 0,
            128 => u128::MAX,
            n => (1u128 << n) - 1,
        };
        let first = address.to_bits() & !host;
        Range { first: A::from_bits(first), last: A::from_bits(first | host) }
    }

    /// Sorts, and joins what overlaps or touches: interval sets refuse overlapping elements.
    pub fn merge(mut ranges: Vec<Range<A>>) -> Vec<Range<A>> {
        ranges.sort_unstable();
        let mut merged: Vec<Range<A>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(last) if range.first.to_bits() <= last.last.to_bits().saturating_add(1) => {
                    last.last = last.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        merged
    }

    /// The address after the last, or `None` where the range ends with the address space.
    pub fn end(&self) -> Option<A> {
        let all = u128::MAX >> (128 - A::BITS);
        (self.last.to_bits() < all).then(|| A::from_bits(self.last.to_bits() + 1))
    }
}

/// Whether one of the ranges, which are sorted and apart, has the address.
pub fn holds<A: Address>(ranges: &[Range<A>], address: A) -> bool {
    let after = ranges.partition_point(|range| range.first <= address);
    after.checked_sub(1).is_some_and(|at| address <= ranges[at].last)
}

/// Addresses of both families.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges {
    pub v4: Vec<Range<Ipv4Addr>>,
    pub v6: Vec<Range<Ipv6Addr>>,
}

impl Ranges {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there are any of this family.
    pub fn has(&self, family: Family) -> bool {
        match family {
            Family::V4 => !self.v4.is_empty(),
            Family::V6 => !self.v6.is_empty(),
        }
    }

    /// Of merged ones, whether each address of this family is among them.
    pub fn has_all(&self, family: Family) -> bool {
        fn is_all<A: Address>(ranges: &[Range<A>]) -> bool {
            ranges.first().is_some_and(|range| range.first.to_bits() == 0 && range.end().is_none())
        }
        match family {
            Family::V4 => is_all(&self.v4),
            Family::V6 => is_all(&self.v6),
        }
    }

    pub fn extend(&mut self, more: Ranges) {
        self.v4.extend(more.v4);
        self.v6.extend(more.v6);
    }

    /// See [`Range::merge`].
    pub fn merge(&mut self) {
        self.v4 = Range::merge(std::mem::take(&mut self.v4));
        self.v6 = Range::merge(std::mem::take(&mut self.v6));
    }

    /// Whether a single address is among them.
    pub fn has_a_host(&self) -> bool {
        self.v4.iter().any(|range| range.first == range.last)
            || self.v6.iter().any(|range| range.first == range.last)
    }

    /// Of merged ones, whether they have the address.
    pub fn holds(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => holds(&self.v4, a),
            IpAddr::V6(a) => holds(&self.v6, a),
        }
    }
}

impl<A: Address> fmt::Display for Range<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let span = self.last.to_bits() ^ self.first.to_bits();
        let aligned = span & span.wrapping_add(1) == 0 && self.first.to_bits() & span == 0;
        match (span, aligned) {
            (0, _) => write!(f, "{}", self.first),
            (_, true) if A::BITS > 16 => {
                write!(f, "{}/{}", self.first, A::BITS - span.count_ones())
            }
            _ => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

/// Whether nobody on the internet can speak to that address but by another one.
pub fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => {
            let shared = ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64; // RFC 6598
            ip.is_private() || ip.is_link_local() || shared
        }
        IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn r(first: [u8; 4], last: [u8; 4]) -> Range<Ipv4Addr> {
        Range { first: first.into(), last: last.into() }
    }

    #[test]
    fn ranges_merge_and_print_as_prefixes() {
        let p = |a: [u8; 4], n| Range::prefix(Ipv4Addr::from(a), n);
        assert_eq!(p([10, 1, 2, 3], 8), r([10, 0, 0, 0], [10, 255, 255, 255]));
        assert_eq!(p([1, 2, 3, 4], 0).to_string(), "0.0.0.0/0");
        assert_eq!(p([1, 2, 3, 4], 32).to_string(), "1.2.3.4");
        assert_eq!(r([10, 0, 0, 1], [10, 0, 0, 2]).to_string(), "10.0.0.1-10.0.0.2");
        let merged = Range::merge(vec![
            p([10, 0, 0, 0], 9),
            p([255, 255, 255, 255], 32),
            p([10, 128, 0, 0], 9),
            p([10, 1, 0, 0], 16),
            p([12, 0, 0, 0], 8),
        ]);
        let text: Vec<_> = merged.iter().map(Range::to_string).collect();
        assert_eq!(text, ["10.0.0.0/8", "12.0.0.0/8", "255.255.255.255"]);
        assert_eq!(merged[0].end(), Some(Ipv4Addr::new(11, 0, 0, 0)));
        assert_eq!(merged[2].end(), None);
        assert_eq!(Range::prefix(Ipv6Addr::UNSPECIFIED, 0).end(), None);
        assert_eq!(Range::prefix(Ipv6Addr::LOCALHOST, 0).to_string(), "::/0");
    }

    #[test]
    fn private_addresses() {
        let is = |text: &str| is_private(text.parse().unwrap());
        assert!(
            ["10.1.2.3", "100.127.0.1", "169.254.1.1", "fd00::1", "fe80::1"].map(is) == [true; 5]
        );
        assert!(["100.128.0.1", "100.63.0.1", "198.51.100.1", "2001:db8::1"].map(is) == [false; 4]);
    }
}
