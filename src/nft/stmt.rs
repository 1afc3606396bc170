//! What rules are made of. A rule is a list of [`Stmt`]; what nft calls a statement (for `show`) and
//! the register machine's instructions for it (for the kernel) stand in one row, so the two cannot
//! drift apart. Pure data.
//! Source: include/uapi/linux/netfilter/nf_tables.h, nft(8); bytecode as `nft --debug=netlink`
//! shows it for the same text.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::expr::{Anonymous, Expr, SetRef, Verdict};
use crate::net::{Family, Interface, Mac, Mark, Owner, L4};
use crate::netlink::uapi::*;

/// A row is a statement: its variant, how nft writes it, and its instructions. What is said above a
/// row is what nft's words do not say.
macro_rules! statements {
    ($(
        $(#[$doc:meta])*
        $variant:ident $(($($part:ident: $part_type:ty),*))? $({ $($field:ident: $type:ty),* })?
            = $text:literal $(, $arg:expr)* => $exprs:expr;
    )*) => {
        /// One statement of a rule, in the order in which nft writes them.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Stmt {
            $($(#[$doc])* $variant $(($($part_type),*))? $({ $($field: $type),* })?,)*
        }

        impl fmt::Display for Stmt {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Stmt::$variant $(($($part),*))? $({ $($field),* })? => {
                        write!(f, $text $(, $arg)*)
                    })*
                }
            }
        }

        impl Stmt {
            /// Appends the instructions of this statement.
            pub fn lower(&self, out: &mut Vec<Expr>) {
                match self {
                    $(Stmt::$variant $(($($part),*))? $({ $($field),* })? => out.extend($exprs),)*
                }
            }
        }
    };
}

statements! {
    /// By index, which is 1 in every network namespace.
    IifLo = "iif \"lo\"" => [meta(NFT_META_IIF), is(1)];
    NotIifLo = "iif != \"lo\"" => [meta(NFT_META_IIF), is_not(1)];
    OifLo = "oif \"lo\"" => [meta(NFT_META_OIF), is(1)];
    /// By name, so that the interface need not be there.
    Iifname(interface: Interface) = "iifname \"{interface}\""
        => [meta(NFT_META_IIFNAME), eq(&compared(interface))];
    Oifname(interface: Interface) = "oifname \"{interface}\""
        => [meta(NFT_META_OIFNAME), eq(&compared(interface))];
    /// A packet without a socket does not match.
    Cgroup { level: u8, set: String } = "socket cgroupv2 level {level} @{set}"
        => [cgroup(*level, NFT_REG_1), lookup(named(set))];
    /// One that has an ancestor at that level, which is another.
    OtherCgroup { level: u8, set: String } = "socket cgroupv2 level {level} != @{set}"
        => [cgroup(*level, NFT_REG_1), lookup_not(named(set))];
    /// The same for cgroups that are removed. `nft` cannot name those, so their ids are kept as
    /// numbers of another kind.
    CgroupHash { level: u8, set: String }
        = "jhash socket cgroupv2 level {level} mod {} seed 0x1 @{set}", u32::MAX
        => [cgroup(*level, NFT_REG_2), hash(), lookup(named(set))];
    /// Of a socket that takes packets for foreign addresses.
    Transparent = "socket transparent 1"
        => [Expr::SocketTransparent { dreg: NFT_REG_1 }, eq(&[1])];
    NotTransparent = "socket transparent 0"
        => [Expr::SocketTransparent { dreg: NFT_REG_1 }, eq(&[0])];
    /// Of a socket that has an address, and is more than what is left of one (TIME_WAIT).
    Bound = "socket wildcard 0" => [Expr::SocketWildcard { dreg: NFT_REG_1 }, eq(&[0])];
    /// A packet that a process sends, not the kernel for a socket that is gone.
    HasOwner = "meta skuid != {NO_UID}" => [meta(NFT_META_SKUID), is_not(NO_UID)];
    /// Who opened the socket. What the kernel sends for one that no process has any more does not
    /// match.
    Owner(owner: Owner) = "meta {}", owner_text(*owner) => owned_by(*owner);
    /// A packet that no process sends does not match.
    NotUid(uid: u32) = "meta skuid != {uid}" => [meta(NFT_META_SKUID), is_not(*uid)];
    PacketMark(mark: Mark) = "meta mark and {:#010x} == {:#010x}", mark.mask, mark.value
        => [meta(NFT_META_MARK), and(mark.mask), is(mark.value)];
    NotPacketMark(mark: Mark) = "meta mark and {:#010x} != {:#010x}", mark.mask, mark.value
        => [meta(NFT_META_MARK), and(mark.mask), is_not(mark.value)];
    CtMark(mark: Mark) = "ct mark and {:#010x} == {:#010x}", mark.mask, mark.value
        => [ct(NFT_CT_MARK), and(mark.mask), is(mark.value)];
    /// A packet that conntrack does not know does not match.
    NotCtMark(mark: Mark) = "ct mark and {:#010x} != {:#010x}", mark.mask, mark.value
        => [ct(NFT_CT_MARK), and(mark.mask), is_not(mark.value)];
    CtMarked(mask: u32) = "ct mark and {mask:#010x} != 0" => has(NFT_CT_MARK, *mask);
    Original = "ct direction original" => [ct(NFT_CT_DIRECTION), eq(&[IP_CT_DIR_ORIGINAL])];
    Reply = "ct direction reply" => [ct(NFT_CT_DIRECTION), eq(&[IP_CT_DIR_REPLY])];
    /// Until an answer has been seen.
    New = "ct state new" => has(NFT_CT_STATE, NF_CT_STATE_NEW_BIT);
    /// Conntrack can make nothing of it.
    Invalid = "ct state invalid" => has(NFT_CT_STATE, NF_CT_STATE_INVALID_BIT);
    /// It knows of no flow that this goes on with.
    Unheard = "ct state invalid,new"
        => has(NFT_CT_STATE, NF_CT_STATE_INVALID_BIT | NF_CT_STATE_NEW_BIT);
    Heard = "ct state and (invalid | new) == 0"
        => has_none(NFT_CT_STATE, NF_CT_STATE_INVALID_BIT | NF_CT_STATE_NEW_BIT);
    /// Nothing says that it goes on with a flow.
    Fresh = "ct state invalid,new,untracked" => has(
        NFT_CT_STATE,
        NF_CT_STATE_INVALID_BIT | NF_CT_STATE_NEW_BIT | NF_CT_STATE_UNTRACKED_BIT,
    );
    /// Of a flow that this very packet begins.
    Unconfirmed = "ct status and confirmed == 0" => has_none(NFT_CT_STATUS, IPS_CONFIRMED);
    /// Of a flow that has begun before.
    Confirmed = "ct status confirmed" => has(NFT_CT_STATUS, IPS_CONFIRMED);
    Dnatted = "ct status dnat" => has(NFT_CT_STATUS, IPS_DST_NAT);
    NotDnatted = "ct status and dnat == 0" => has_none(NFT_CT_STATUS, IPS_DST_NAT);
    Destination { family: Family, set: String } = "{} daddr @{set}", family.nft()
        => address_then(*family, DADDR, lookup(named(set)));
    /// Of that family, the other destinations.
    OtherDestination { family: Family, set: String } = "{} daddr != @{set}", family.nft()
        => address_then(*family, DADDR, lookup_not(named(set)));
    Dscp(family: Family, dscp: u8) = "{} dscp {dscp}", family.nft() => dscp_is(*family, *dscp);
    Source { family: Family, set: String } = "{} saddr @{set}", family.nft()
        => address_then(*family, SADDR, lookup(named(set)));
    /// A packet of an interface without such addresses does not match.
    EtherSource(macs: Vec<Mac>) = "ether saddr {}", macs_text(macs) => [
        meta(NFT_META_IIFTYPE),
        eq(&ARPHRD_ETHER.to_ne_bytes()),
        payload(NFT_PAYLOAD_LL_HEADER, 6, 6),
        any_mac(macs),
    ];
    Nfproto(family: Family) = "meta nfproto {}", family.word()
        => [meta(NFT_META_NFPROTO), eq(&[family.number()])];
    L4proto(l4: L4) = "meta l4proto {}", l4.nft() => [meta(NFT_META_L4PROTO), eq(&[l4.number()])];
    NotL4proto(l4: L4) = "meta l4proto != {}", l4.nft()
        => [meta(NFT_META_L4PROTO), neq(&[l4.number()])];
    TcpOrUdp = "meta l4proto {{ tcp, udp }}" => [
        meta(NFT_META_L4PROTO),
        lookup(any_of(TYPE_INET_PROTOCOL, &[[IPPROTO_TCP], [IPPROTO_UDP]])),
    ];
    /// TCP, but what begins a connection.
    GoesOn = "tcp flags and syn == 0" => [
        meta(NFT_META_L4PROTO),
        eq(&[IPPROTO_TCP]),
        payload(NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1),
        and_field(vec![TCPHDR_SYN]),
        eq(&[0]),
    ];
    /// TCP that does.
    Begins = "tcp flags syn" => [
        meta(NFT_META_L4PROTO),
        eq(&[IPPROTO_TCP]),
        payload(NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1),
        and_field(vec![TCPHDR_SYN]),
        neq(&[0]),
    ];
    /// TCP that asks for a connection and does not agree to one.
    Asks = "tcp flags and (syn | ack) == syn" => [
        meta(NFT_META_L4PROTO),
        eq(&[IPPROTO_TCP]),
        payload(NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1),
        and_field(vec![TCPHDR_SYN | TCPHDR_ACK]),
        eq(&[TCPHDR_SYN]),
    ];
    /// A reset of TCP.
    IsReset = "tcp flags rst" => [
        meta(NFT_META_L4PROTO),
        eq(&[IPPROTO_TCP]),
        payload(NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1),
        and_field(vec![TCPHDR_RST]),
        neq(&[0]),
    ];
    /// Two comparisons cost a quarter of a set.
    NotTcpOrUdp = "meta l4proto != tcp meta l4proto != udp" => [
        meta(NFT_META_L4PROTO),
        neq(&[IPPROTO_TCP]),
        meta(NFT_META_L4PROTO),
        neq(&[IPPROTO_UDP]),
    ];
    Dport(l4: L4, port: u16) = "{} dport {port}", l4.nft()
        => port_is(*l4, eq(&port.to_be_bytes()));
    /// Of that protocol, the other ports. Sorted and apart.
    OtherDports(l4: L4, ports: Vec<u16>)
        = "{} dport != {}", l4.nft(), Braces(ports, fmt::Display::fmt)
        => port_is(*l4, lookup_not(any_port(ports)));
    /// The same, by ranges.
    OutOfPorts { l4: L4, set: String } = "{} dport != @{set}", l4.nft()
        => port_is(*l4, lookup_not(named(set)));
    /// Whatever the protocol; what has no ports has other things there.
    NotDport(port: u16) = "th dport != {port}"
        => [payload(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2), neq(&port.to_be_bytes())];
    /// This host's own addresses.
    Local = "fib daddr type local" => [fib(NFTA_FIB_F_DADDR), is(RTN_LOCAL.into())];
    /// Sent from an address that is not this host's. What it shares with others (anycast) is its own.
    ForeignSource = "fib saddr type != local fib saddr type != anycast" => [
        fib(NFTA_FIB_F_SADDR),
        is_not(RTN_LOCAL.into()),
        fib(NFTA_FIB_F_SADDR),
        is_not(RTN_ANYCAST),
    ];
    /// The way to the destination is by that interface.
    LeadsTo(interface: Interface) = "fib daddr oifname \"{interface}\""
        => [Expr::FibOifname { of: NFTA_FIB_F_DADDR, dreg: NFT_REG_1 }, eq(&compared(interface))];
    /// From an address that the interface does not have.
    SourceOfOther = "fib saddr . oif type != local"
        => [fib(NFTA_FIB_F_SADDR | NFTA_FIB_F_OIF), is_not(RTN_LOCAL.into())];
    /// The way to where it comes from is not by that interface.
    ComesFromElsewhere(name: String) = "fib saddr oifname != \"{name}\""
        => [Expr::FibOifname { of: NFTA_FIB_F_SADDR, dreg: NFT_REG_1 }, neq(&padded(name))];
    /// The way to the destination is by the interface that it came in by.
    LeadsBack = "fib daddr . iif oif != 0"
        => [Expr::FibOif { of: NFTA_FIB_F_DADDR | NFTA_FIB_F_IIF, dreg: NFT_REG_1 }, is_not(0)];
    /// No way to where it comes from is by the interface that it came in by.
    ComesAstray = "fib saddr . iif oif 0"
        => [Expr::FibOif { of: NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF, dreg: NFT_REG_1 }, is(0)];
    /// The broadcast addresses of this host's networks too.
    Broadcast = "fib daddr type broadcast" => [fib(NFTA_FIB_F_DADDR), is(RTN_BROADCAST)];
    /// To a unicast address, too: link-scope traffic whatever the address.
    NeighbourDiscovery = "icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }}" => [
        meta(NFT_META_NFPROTO),
        eq(&[NFPROTO_IPV6]),
        meta(NFT_META_L4PROTO),
        eq(&[IPPROTO_ICMPV6]),
        payload(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 1),
        lookup(any_of(
            TYPE_ICMP6_TYPE,
            &[[NDISC_NEIGHBOUR_SOLICITATION], [NDISC_NEIGHBOUR_ADVERTISEMENT]],
        )),
    ];
    Counter = "counter" => [Expr::Counter];
    SetCtMark(mark: Mark) = "ct mark set ct mark and {:#010x} or {:#010x}", !mark.mask, mark.value
        => [
            ct(NFT_CT_MARK),
            and_xor(!mark.mask, mark.value),
            Expr::CtSet { key: NFT_CT_MARK, sreg: NFT_REG_1 },
        ];
    SetPacketMark(mark: Mark)
        = "meta mark set meta mark and {:#010x} or {:#010x}", !mark.mask, mark.value
        => [
            meta(NFT_META_MARK),
            and_xor(!mark.mask, mark.value),
            Expr::MetaSet { key: NFT_META_MARK, sreg: NFT_REG_1 },
        ];
    /// No family takes both, no address any.
    Tproxy { family: Option<Family>, address: Option<IpAddr>, port: u16 }
        = "tproxy {}to {}", tproxy_family(*family).0, end_text(*address, *port)
        => tproxy(*family, *address, *port);
    Dnat(to: SocketAddr) = "dnat {} to {to}", Family::of(&to.ip()).nft() => [
        address_to(&to.ip()),
        immediate(NFT_REG_2, &to.port().to_be_bytes()),
        Expr::Dnat { family: Family::of(&to.ip()).number(), address: NFT_REG_1, port: NFT_REG_2 },
    ];
    Snat(to: IpAddr) = "snat {} to {to}", Family::of(to).nft()
        => [address_to(to), Expr::Snat { family: Family::of(to).number(), address: NFT_REG_1 }];
    /// Of a network.
    ToNet(network: IpAddr, length: u32) = "{} daddr {network}/{length}", Family::of(network).nft()
        => in_network(network, *length);
    NotLinkLocal = "ip6 saddr != fe80::/16" => [
        meta(NFT_META_NFPROTO),
        eq(&[NFPROTO_IPV6]),
        payload(NFT_PAYLOAD_NETWORK_HEADER, 8, 2),
        neq(&[0xfe, 0x80]),
    ];
    /// As if the packet came from where it goes to.
    SnatToDestination(family: Family) = "snat {0} to {0} daddr", family.nft() => {
        let snat = Expr::Snat { family: family.number(), address: NFT_REG_1 };
        address_then(*family, DADDR, snat)
    };
    /// As if the packet came from the interface that it leaves by.
    Masquerade = "masquerade" => [Expr::Masquerade];
    /// To this host's address on the interface that the packet came in by.
    Redirect(port: u16) = "redirect to :{port}"
        => [immediate(NFT_REG_1, &port.to_be_bytes()), Expr::Redirect { port: NFT_REG_1 }];
    Reset = "reject with tcp reset" => [Expr::RejectTcpReset];
    Unreachable = "reject with icmpx port-unreachable"
        => [Expr::RejectIcmpx { code: NFT_REJECT_ICMPX_PORT_UNREACH }];
    PacketMarkMap { mask: u32, map: Vec<(u32, Verdict)> }
        = "meta mark and {mask:#010x} vmap {}", Braces(map, entry)
        => [meta(NFT_META_MARK), and(*mask), verdict_by_mark(map)];
    CtMarkMap { mask: u32, map: Vec<(u32, Verdict)> }
        = "ct mark and {mask:#010x} vmap {}", Braces(map, entry)
        => [ct(NFT_CT_MARK), and(*mask), verdict_by_mark(map)];
    Verdict(verdict: Verdict) = "{verdict}" => [Expr::Verdict(verdict.clone())];
}

/// `(uid_t)-1`, which is no user's.
const NO_UID: u32 = u32::MAX;

/// Of include/net/tcp.h.
const TCPHDR_SYN: u8 = 0x02;
const TCPHDR_RST: u8 = 0x04;
const TCPHDR_ACK: u8 = 0x10;

impl Stmt {
    pub fn accept() -> Stmt {
        Stmt::Verdict(Verdict::Accept)
    }

    pub fn drop() -> Stmt {
        Stmt::Verdict(Verdict::Drop)
    }

    pub fn back() -> Stmt {
        Stmt::Verdict(Verdict::Return)
    }

    pub fn jump(chain: impl Into<String>) -> Stmt {
        Stmt::Verdict(Verdict::Jump(chain.into()))
    }

    pub fn goto(chain: impl Into<String>) -> Stmt {
        Stmt::Verdict(Verdict::Goto(chain.into()))
    }
}

/// `{ A, B }`
struct Braces<'a, T>(&'a [T], fn(&T, &mut fmt::Formatter) -> fmt::Result);

impl<T> fmt::Display for Braces<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Braces(elements, one) = self;
        f.write_str("{ ")?;
        for (i, element) in elements.iter().enumerate() {
            f.write_str(if i == 0 { "" } else { ", " })?;
            one(element, f)?;
        }
        f.write_str(" }")
    }
}

fn entry((value, verdict): &(u32, Verdict), f: &mut fmt::Formatter) -> fmt::Result {
    write!(f, "{value:#010x} : {verdict}")
}

fn owner_text(owner: Owner) -> String {
    let (name, first, last) = match owner {
        Owner::Users(first, last) => ("skuid", first, last),
        Owner::Groups(first, last) => ("skgid", first, last),
    };
    match first == last {
        true => format!("{name} {first}"),
        false => format!("{name} {first}-{last}"),
    }
}

/// nft makes no set for one element.
fn macs_text(macs: &[Mac]) -> String {
    match macs {
        [mac] => mac.to_string(),
        macs => Braces(macs, fmt::Display::fmt).to_string(),
    }
}

fn end_text(address: Option<IpAddr>, port: u16) -> String {
    match address {
        None => format!(":{port}"),
        Some(ip) => SocketAddr::new(ip, port).to_string(),
    }
}

// Instructions. All but the second operand of a few go by way of register 1.

pub(super) fn meta(key: u32) -> Expr {
    Expr::MetaLoad { key, dreg: NFT_REG_1 }
}

fn ct(key: u32) -> Expr {
    Expr::CtLoad { key, dreg: NFT_REG_1 }
}

fn cmp(op: u32, data: &[u8]) -> Expr {
    Expr::Cmp { op, sreg: NFT_REG_1, data: data.to_vec() }
}

pub(super) fn eq(data: &[u8]) -> Expr {
    cmp(NFT_CMP_EQ, data)
}

pub(super) fn neq(data: &[u8]) -> Expr {
    cmp(NFT_CMP_NEQ, data)
}

fn is(number: u32) -> Expr {
    eq(&number.to_ne_bytes())
}

fn is_not(number: u32) -> Expr {
    neq(&number.to_ne_bytes())
}

/// Whether what conntrack has under a key has any of the bits.
fn has(key: u32, bits: u32) -> [Expr; 3] {
    [ct(key), and(bits), is_not(0)]
}

fn has_none(key: u32, bits: u32) -> [Expr; 3] {
    [ct(key), and(bits), is(0)]
}

/// Who opened the socket is one of these.
fn owned_by(owner: Owner) -> Vec<Expr> {
    let (key, first, last) = match owner {
        Owner::Users(first, last) => (NFT_META_SKUID, first, last),
        Owner::Groups(first, last) => (NFT_META_SKGID, first, last),
    };
    match first == last {
        true => vec![meta(key), is(first)],
        false => vec![
            meta(key),
            Expr::Byteorder { sreg: NFT_REG_1, dreg: NFT_REG_1 },
            cmp(NFT_CMP_GTE, &first.to_be_bytes()),
            cmp(NFT_CMP_LTE, &last.to_be_bytes()),
        ],
    }
}

/// What names are compared with; the beginning of names without an end.
fn compared(interface: &Interface) -> Vec<u8> {
    match interface.prefix {
        true => interface.name.as_bytes().to_vec(),
        false => padded(&interface.name),
    }
}

/// An interface's name, as the kernel compares it.
fn padded(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(IFNAMSIZ, 0);
    bytes
}

fn and(mask: u32) -> Expr {
    and_xor(mask, 0)
}

fn and_xor(mask: u32, xor: u32) -> Expr {
    Expr::Bitwise { sreg: NFT_REG_1, dreg: NFT_REG_1, mask, xor }
}

/// The same for a field of a packet, in network order.
fn and_field(mask: Vec<u8>) -> Expr {
    match <[u8; 4]>::try_from(&mask[..]) {
        Ok(word) => and(u32::from_ne_bytes(word)),
        Err(_) => {
            let (len, xor) = (mask.len() as u32, vec![0; mask.len()]);
            Expr::BitwiseField { sreg: NFT_REG_1, dreg: NFT_REG_1, len, mask, xor }
        }
    }
}

pub(super) fn payload(base: u32, offset: u32, len: u32) -> Expr {
    Expr::Payload { dreg: NFT_REG_1, base, offset, len }
}

fn fib(of: u32) -> Expr {
    Expr::FibAddrtype { of, dreg: NFT_REG_1 }
}

fn cgroup(level: u8, dreg: u32) -> Expr {
    Expr::SocketCgroup { level: level.into(), dreg }
}

/// The hash of the cgroup id in register 2.
fn hash() -> Expr {
    Expr::Jhash { sreg: NFT_REG_2, dreg: NFT_REG_1, len: 8, modulus: u32::MAX, seed: 1 }
}

/// What the kernel makes of a cgroup id by that. Source: include/linux/jhash.h,
/// net/netfilter/nft_hash.c, `reciprocal_scale()`.
pub fn cgroup_hash(id: u64) -> u32 {
    const SEED: u32 = 1;
    const JHASH_INITVAL: u32 = 0xdead_beef;
    let bytes = id.to_ne_bytes();
    // the end of the input is read byte by byte, lowest first, whatever the processor
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
    let start = JHASH_INITVAL.wrapping_add(bytes.len() as u32).wrapping_add(SEED);
    let (mut a, mut b, mut c) = (start.wrapping_add(word(0)), start.wrapping_add(word(4)), start);
    let mix = |x: &mut u32, y: u32, by: u32| *x = (*x ^ y).wrapping_sub(y.rotate_left(by));
    // __jhash_final
    mix(&mut c, b, 14);
    mix(&mut a, c, 11);
    mix(&mut b, a, 25);
    mix(&mut c, b, 16);
    mix(&mut a, c, 4);
    mix(&mut b, a, 14);
    mix(&mut c, b, 24);
    ((u64::from(c) * u64::from(u32::MAX)) >> 32) as u32
}

fn immediate(dreg: u32, data: &[u8]) -> Expr {
    Expr::Immediate { dreg, data: data.to_vec() }
}

fn address_to(address: &IpAddr) -> Expr {
    immediate(NFT_REG_1, &octets(address))
}

fn octets(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn lookup(set: SetRef) -> Expr {
    Expr::Lookup { set, sreg: NFT_REG_1, invert: false }
}

fn lookup_not(set: SetRef) -> Expr {
    Expr::Lookup { set, sreg: NFT_REG_1, invert: true }
}

fn named(set: &str) -> SetRef {
    SetRef::Named(set.into())
}

fn any_of<const N: usize>(key_type: u32, keys: &[[u8; N]]) -> SetRef {
    let elements = keys.iter().map(|key| (key.to_vec(), None)).collect();
    SetRef::Anonymous(Anonymous { key_type, key_len: N as u32, elements, id: None })
}

fn any_port(ports: &[u16]) -> SetRef {
    let all: Vec<_> = ports.iter().map(|port| port.to_be_bytes()).collect();
    any_of(TYPE_INET_SERVICE, &all)
}

/// Loads the destination port of a packet of this protocol and judges it.
fn port_is(l4: L4, test: Expr) -> [Expr; 4] {
    [meta(NFT_META_L4PROTO), eq(&[l4.number()]), payload(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2), test]
}

/// nft makes no set for one element.
fn any_mac(macs: &[Mac]) -> Expr {
    match macs {
        [mac] => eq(&mac.0),
        macs => {
            let all: Vec<_> = macs.iter().map(|mac| mac.0).collect();
            lookup(any_of(TYPE_ETHERADDR, &all))
        }
    }
}

/// The upper six bits of the second byte; in IPv6, of the second to fourth half byte.
fn dscp_is(family: Family, dscp: u8) -> [Expr; 5] {
    let (offset, mask, value) = match family {
        Family::V4 => (1, vec![0xfc], vec![dscp << 2]),
        Family::V6 => (0, vec![0x0f, 0xc0], (u16::from(dscp) << 6).to_be_bytes().to_vec()),
    };
    let len = mask.len() as u32;
    let field = payload(NFT_PAYLOAD_NETWORK_HEADER, offset, len);
    [meta(NFT_META_NFPROTO), eq(&[family.number()]), field, and_field(mask), eq(&value)]
}

/// Whether the destination is in a network. Of whole bytes, nft loads these alone.
fn in_network(network: &IpAddr, length: u32) -> Vec<Expr> {
    let (family, mut octets) = (Family::of(network), octets(network));
    let (offset, _) = DADDR[family as usize];
    let (whole, bits) = (length as usize / 8, length % 8);
    let mask = (bits != 0).then(|| {
        let mut mask = vec![0xff; whole];
        mask.push(!(0xff >> bits));
        mask.resize(octets.len(), 0);
        and_field(mask)
    });
    if mask.is_none() {
        octets.truncate(whole);
    }
    let daddr = payload(NFT_PAYLOAD_NETWORK_HEADER, offset, octets.len() as u32);
    let load = [meta(NFT_META_NFPROTO), eq(&[family.number()]), daddr];
    load.into_iter().chain(mask).chain([eq(&octets)]).collect()
}

/// As nft writes it, and the kernel's number.
fn tproxy_family(family: Option<Family>) -> (&'static str, u8) {
    match family {
        None => ("", NFPROTO_UNSPEC),
        Some(Family::V4) => ("ip ", NFPROTO_IPV4),
        Some(Family::V6) => ("ip6 ", NFPROTO_IPV6),
    }
}

fn tproxy(family: Option<Family>, address: Option<IpAddr>, port: u16) -> Vec<Expr> {
    let (_, family) = tproxy_family(family);
    let port = port.to_be_bytes();
    match address {
        None => vec![
            immediate(NFT_REG_1, &port),
            Expr::Tproxy { family, address: None, port: NFT_REG_1 },
        ],
        Some(ip) => vec![
            address_to(&ip),
            immediate(NFT_REG_2, &port),
            Expr::Tproxy { family, address: Some(NFT_REG_1), port: NFT_REG_2 },
        ],
    }
}

fn verdict_by_mark(map: &[(u32, Verdict)]) -> Expr {
    let element =
        |(value, verdict): &(u32, Verdict)| (value.to_ne_bytes().to_vec(), Some(verdict.clone()));
    let elements = map.iter().map(element).collect();
    let set = Anonymous { key_type: TYPE_MARK, key_len: 4, elements, id: None };
    Expr::LookupVerdict { set: SetRef::Anonymous(set), sreg: NFT_REG_1 }
}

/// Where the network header has its addresses: offset and length, by family.
const SADDR: [(u32, u32); 2] = [(12, 4), (8, 16)];
const DADDR: [(u32, u32); 2] = [(16, 4), (24, 16)];

/// Loads an address of a packet of this family for what is to be done with it.
fn address_then(family: Family, addresses: [(u32, u32); 2], then: Expr) -> [Expr; 4] {
    let (offset, len) = addresses[family as usize];
    [
        meta(NFT_META_NFPROTO),
        eq(&[family.number()]),
        payload(NFT_PAYLOAD_NETWORK_HEADER, offset, len),
        then,
    ]
}
