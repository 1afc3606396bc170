//! What rules are made of. A rule is a list of [`Stmt`]; a statement prints itself in nft syntax
//! (`Display`, for `show`) and lowers to the register machine's [`Expr`] (for the kernel), so the
//! two cannot drift apart. Pure data.
//! Source: include/uapi/linux/netfilter/nf_tables.h, nft(8); bytecode as `nft --debug=netlink`
//! shows it for the same text.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::net::{Family, Interface, Mac, Mark, L4};
use crate::netlink::uapi::*;

/// One statement of a rule, in the order in which nft writes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stmt {
    /// `iif "lo"`, `oif "lo"`: by index, which is 1 in every network namespace.
    IifLo,
    OifLo,
    /// `iifname NAME`, by name, so that the interface need not be there
    Iifname(Interface),
    /// `socket cgroupv2 level L @SET`; a packet without a socket does not match.
    Cgroup {
        level: u8,
        set: String,
    },
    /// `jhash socket cgroupv2 level L mod 4294967295 seed 0x1 @SET`: the same for cgroups that are
    /// removed. `nft` cannot name those, so their ids are kept as numbers of another kind.
    CgroupHash {
        level: u8,
        set: String,
    },
    /// `socket transparent 1`: of a socket that takes packets for foreign addresses
    Transparent,
    /// A packet that a process sends (any uid), not the kernel for a socket that is gone.
    HasOwner,
    /// `meta skuid UID`
    Uid(u32),
    /// `meta mark and MASK == VALUE`
    PacketMark(Mark),
    /// `ct mark and MASK == VALUE`
    CtMark(Mark),
    /// `ct mark and MASK != VALUE`; a packet that conntrack does not know does not match.
    NotCtMark(Mark),
    /// `ct mark and MASK != 0`
    CtMarked(u32),
    /// `ct direction original`
    Original,
    /// `ct direction reply`
    Reply,
    /// `ct state new`: until an answer has been seen
    New,
    /// `ct state invalid`: conntrack can make nothing of it
    Invalid,
    /// `ct status and confirmed == 0`: of a flow that this very packet begins
    Unconfirmed,
    /// `ct status dnat`
    Dnatted,
    /// `ip daddr @SET` or `ip6 daddr @SET`
    Destination {
        family: Family,
        set: &'static str,
    },
    /// `ip saddr @SET` or `ip6 saddr @SET`
    Source {
        family: Family,
        set: String,
    },
    /// `ether saddr { MAC, … }`; a packet of an interface without such addresses does not match.
    EtherSource(Vec<Mac>),
    /// `meta nfproto`
    Nfproto(Family),
    /// `meta l4proto tcp` or udp
    L4proto(L4),
    /// `meta l4proto { tcp, udp }`
    TcpOrUdp,
    /// `meta l4proto != { tcp, udp }`
    NotTcpOrUdp,
    /// `tcp dport N` or `udp dport N`
    Dport(L4, u16),
    /// `th dport != N`: whatever the protocol; what has no ports has other things there
    NotDport(u16),
    /// `fib daddr type local`: this host's own addresses
    Local,
    /// `fib saddr type != local`: sent from an address that is not this host's
    ForeignSource,
    /// `fib daddr type broadcast`: the broadcast addresses of this host's networks too
    Broadcast,
    /// Neighbour discovery to a unicast address, which is link-scope traffic whatever the address.
    NeighbourDiscovery,
    Counter,
    SetCtMark(Mark),
    SetPacketMark(Mark),
    /// `tproxy to ADDRESS:PORT`; no family takes both, no address any.
    Tproxy {
        family: Option<Family>,
        address: Option<IpAddr>,
        port: u16,
    },
    /// `dnat ip to ADDRESS:PORT`
    Dnat(SocketAddr),
    /// `snat ip to ADDRESS`
    Snat(IpAddr),
    /// `ip6 saddr != fe80::/16`
    NotLinkLocal,
    /// `snat ip to ip daddr`: as if the packet came from where it goes to
    SnatToDestination(Family),
    /// `redirect to :PORT`: to this host's address on the interface that the packet came in by
    Redirect(u16),
    /// `reject with tcp reset`
    Reset,
    /// `meta mark and MASK vmap { VALUE : goto CHAIN, … }`
    PacketMarkMap {
        mask: u32,
        map: Vec<(u32, Verdict)>,
    },
    /// The same for the ct mark.
    CtMarkMap {
        mask: u32,
        map: Vec<(u32, Verdict)>,
    },
    Verdict(Verdict),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    /// Back to behind the last jump, or, without one, the base chain's policy.
    Return,
    Jump(String),
    Goto(String),
}

/// One instruction of the kernel's register machine. Register data is raw: host order for what the
/// kernel keeps in host order (marks, ids, indexes), network order for packet fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    MetaLoad {
        key: u32,
        dreg: u32,
    },
    MetaSet {
        key: u32,
        sreg: u32,
    },
    CtLoad {
        key: u32,
        dreg: u32,
    },
    CtSet {
        key: u32,
        sreg: u32,
    },
    Cmp {
        op: u32,
        sreg: u32,
        data: Vec<u8>,
    },
    Bitwise {
        sreg: u32,
        dreg: u32,
        mask: u32,
        xor: u32,
    },
    Payload {
        dreg: u32,
        base: u32,
        offset: u32,
        len: u32,
    },
    Lookup {
        set: SetRef,
        sreg: u32,
        invert: bool,
    },
    /// A map look-up whose result is the verdict.
    LookupVerdict {
        set: SetRef,
        sreg: u32,
    },
    Immediate {
        dreg: u32,
        data: Vec<u8>,
    },
    Verdict(Verdict),
    Counter,
    SocketCgroup {
        level: u32,
        dreg: u32,
    },
    SocketTransparent {
        dreg: u32,
    },
    /// Jenkins' hash of a register, scaled to `0..modulus`.
    Jhash {
        sreg: u32,
        dreg: u32,
        len: u32,
        modulus: u32,
        seed: u32,
    },
    Tproxy {
        family: u8,
        address: Option<u32>,
        port: u32,
    },
    Dnat {
        family: u8,
        address: u32,
        port: u32,
    },
    Snat {
        family: u8,
        address: u32,
    },
    Redirect {
        port: u32,
    },
    RejectTcpReset,
    /// The type of the source or the destination address, by `NFTA_FIB_F_*`.
    FibAddrtype {
        of: u32,
        dreg: u32,
    },
}

/// The set that a look-up reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetRef {
    Named(String),
    /// An anonymous set or map that lives and dies with its rule.
    Anonymous(Anonymous),
}

/// Content of an anonymous set: keys, or keys with verdicts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anonymous {
    pub key_type: u32,
    pub key_len: u32,
    pub elements: Vec<(Vec<u8>, Option<Verdict>)>,
}

/// `(uid_t)-1`, which is no user's.
const NO_UID: u32 = u32::MAX;

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

    /// Appends the instructions of this statement.
    pub fn lower(&self, out: &mut Vec<Expr>) {
        use Expr::*;
        let dreg = NFT_REG_1;
        let sreg = NFT_REG_1;
        let eq = |data: &[u8]| Cmp { op: NFT_CMP_EQ, sreg: NFT_REG_1, data: data.to_vec() };
        let neq = |data: &[u8]| Cmp { op: NFT_CMP_NEQ, sreg: NFT_REG_1, data: data.to_vec() };
        let masked = |mask| Bitwise { sreg: NFT_REG_1, dreg: NFT_REG_1, mask, xor: 0 };
        let meta = |key| MetaLoad { key, dreg: NFT_REG_1 };
        let ct = |key| CtLoad { key, dreg: NFT_REG_1 };
        match self {
            Stmt::IifLo => out.extend([meta(NFT_META_IIF), eq(&1u32.to_ne_bytes())]),
            Stmt::OifLo => out.extend([meta(NFT_META_OIF), eq(&1u32.to_ne_bytes())]),
            Stmt::Iifname(Interface { name, prefix }) => {
                let mut data = name.as_bytes().to_vec();
                if !prefix {
                    data.resize(IFNAMSIZ, 0);
                }
                out.extend([meta(NFT_META_IIFNAME), eq(&data)]);
            }
            Stmt::Cgroup { level, set } => out.extend([
                SocketCgroup { level: u32::from(*level), dreg },
                Lookup { set: SetRef::Named(set.clone()), sreg, invert: false },
            ]),
            Stmt::CgroupHash { level, set } => out.extend([
                SocketCgroup { level: u32::from(*level), dreg: NFT_REG_2 },
                Jhash { sreg: NFT_REG_2, dreg, len: 8, modulus: u32::MAX, seed: 1 },
                Lookup { set: SetRef::Named(set.clone()), sreg, invert: false },
            ]),
            Stmt::Transparent => out.extend([SocketTransparent { dreg }, eq(&[1])]),
            Stmt::HasOwner => out.extend([meta(NFT_META_SKUID), neq(&NO_UID.to_ne_bytes())]),
            Stmt::Uid(uid) => out.extend([meta(NFT_META_SKUID), eq(&uid.to_ne_bytes())]),
            Stmt::PacketMark(m) => {
                out.extend([meta(NFT_META_MARK), masked(m.mask), eq(&m.value.to_ne_bytes())])
            }
            Stmt::CtMark(m) => {
                out.extend([ct(NFT_CT_MARK), masked(m.mask), eq(&m.value.to_ne_bytes())])
            }
            Stmt::NotCtMark(m) => {
                out.extend([ct(NFT_CT_MARK), masked(m.mask), neq(&m.value.to_ne_bytes())])
            }
            Stmt::CtMarked(mask) => {
                out.extend([ct(NFT_CT_MARK), masked(*mask), neq(&0u32.to_ne_bytes())])
            }
            Stmt::Original => out.extend([ct(NFT_CT_DIRECTION), eq(&[IP_CT_DIR_ORIGINAL])]),
            Stmt::Reply => out.extend([ct(NFT_CT_DIRECTION), eq(&[IP_CT_DIR_REPLY])]),
            Stmt::New => out.extend([
                ct(NFT_CT_STATE),
                masked(NF_CT_STATE_NEW_BIT),
                neq(&0u32.to_ne_bytes()),
            ]),
            Stmt::Invalid => out.extend([
                ct(NFT_CT_STATE),
                masked(NF_CT_STATE_INVALID_BIT),
                neq(&0u32.to_ne_bytes()),
            ]),
            Stmt::Unconfirmed => {
                out.extend([ct(NFT_CT_STATUS), masked(IPS_CONFIRMED), eq(&0u32.to_ne_bytes())])
            }
            Stmt::Dnatted => {
                out.extend([ct(NFT_CT_STATUS), masked(IPS_DST_NAT), neq(&0u32.to_ne_bytes())])
            }
            Stmt::Destination { family, set } => {
                let (offset, len) = destination(*family);
                address(*family, offset, len, set, out);
            }
            Stmt::Source { family, set } => {
                let (offset, len) = match family {
                    Family::V4 => (12, 4),
                    Family::V6 => (8, 16),
                };
                address(*family, offset, len, set, out);
            }
            Stmt::EtherSource(macs) => {
                out.extend([
                    meta(NFT_META_IIFTYPE),
                    eq(&ARPHRD_ETHER.to_ne_bytes()),
                    Payload { dreg, base: NFT_PAYLOAD_LL_HEADER, offset: 6, len: 6 },
                ]);
                out.push(match macs.as_slice() {
                    // nft makes no set for one element
                    [mac] => eq(&mac.0),
                    macs => Lookup {
                        set: SetRef::Anonymous(Anonymous {
                            key_type: TYPE_ETHERADDR,
                            key_len: 6,
                            elements: macs.iter().map(|mac| (mac.0.to_vec(), None)).collect(),
                        }),
                        sreg,
                        invert: false,
                    },
                });
            }
            Stmt::Nfproto(family) => out.extend([meta(NFT_META_NFPROTO), eq(&[family.number()])]),
            Stmt::L4proto(l4) => out.extend([meta(NFT_META_L4PROTO), eq(&[l4.number()])]),
            Stmt::TcpOrUdp | Stmt::NotTcpOrUdp => out.extend([
                meta(NFT_META_L4PROTO),
                Lookup {
                    set: SetRef::Anonymous(Anonymous {
                        key_type: TYPE_INET_PROTOCOL,
                        key_len: 1,
                        elements: vec![(vec![IPPROTO_TCP], None), (vec![IPPROTO_UDP], None)],
                    }),
                    sreg,
                    invert: *self == Stmt::NotTcpOrUdp,
                },
            ]),
            Stmt::Dport(l4, port) => out.extend([
                meta(NFT_META_L4PROTO),
                eq(&[l4.number()]),
                Payload { dreg, base: NFT_PAYLOAD_TRANSPORT_HEADER, offset: 2, len: 2 },
                eq(&port.to_be_bytes()),
            ]),
            Stmt::NotDport(port) => out.extend([
                Payload { dreg, base: NFT_PAYLOAD_TRANSPORT_HEADER, offset: 2, len: 2 },
                neq(&port.to_be_bytes()),
            ]),
            Stmt::Local => out.extend([
                FibAddrtype { of: NFTA_FIB_F_DADDR, dreg },
                eq(&u32::from(RTN_LOCAL).to_ne_bytes()),
            ]),
            Stmt::ForeignSource => out.extend([
                FibAddrtype { of: NFTA_FIB_F_SADDR, dreg },
                neq(&u32::from(RTN_LOCAL).to_ne_bytes()),
            ]),
            Stmt::Broadcast => out.extend([
                FibAddrtype { of: NFTA_FIB_F_DADDR, dreg },
                eq(&RTN_BROADCAST.to_ne_bytes()),
            ]),
            Stmt::NeighbourDiscovery => out.extend([
                meta(NFT_META_NFPROTO),
                eq(&[NFPROTO_IPV6]),
                meta(NFT_META_L4PROTO),
                eq(&[IPPROTO_ICMPV6]),
                Payload { dreg, base: NFT_PAYLOAD_TRANSPORT_HEADER, offset: 0, len: 1 },
                Lookup {
                    set: SetRef::Anonymous(Anonymous {
                        key_type: TYPE_ICMP6_TYPE,
                        key_len: 1,
                        elements: vec![
                            (vec![NDISC_NEIGHBOUR_SOLICITATION], None),
                            (vec![NDISC_NEIGHBOUR_ADVERTISEMENT], None),
                        ],
                    }),
                    sreg,
                    invert: false,
                },
            ]),
            Stmt::Counter => out.push(Counter),
            Stmt::SetCtMark(m) => out.extend([
                ct(NFT_CT_MARK),
                Bitwise { sreg, dreg, mask: !m.mask, xor: m.value },
                CtSet { key: NFT_CT_MARK, sreg },
            ]),
            Stmt::SetPacketMark(m) => out.extend([
                meta(NFT_META_MARK),
                Bitwise { sreg, dreg, mask: !m.mask, xor: m.value },
                MetaSet { key: NFT_META_MARK, sreg },
            ]),
            Stmt::Tproxy { family, address, port } => {
                let family = family.map_or(NFPROTO_UNSPEC, Family::number);
                let mut port_reg = NFT_REG_1;
                if let Some(address) = address {
                    out.push(Immediate { dreg, data: octets(address) });
                    port_reg = NFT_REG_2;
                }
                out.push(Immediate { dreg: port_reg, data: port.to_be_bytes().to_vec() });
                let address = address.map(|_| NFT_REG_1);
                out.push(Tproxy { family, address, port: port_reg });
            }
            Stmt::Dnat(to) => out.extend([
                Immediate { dreg, data: octets(&to.ip()) },
                Immediate { dreg: NFT_REG_2, data: to.port().to_be_bytes().to_vec() },
                Dnat { family: Family::of(&to.ip()).number(), address: NFT_REG_1, port: NFT_REG_2 },
            ]),
            Stmt::Snat(to) => out.extend([
                Immediate { dreg, data: octets(to) },
                Snat { family: Family::of(to).number(), address: NFT_REG_1 },
            ]),
            Stmt::NotLinkLocal => out.extend([
                meta(NFT_META_NFPROTO),
                eq(&[NFPROTO_IPV6]),
                Payload { dreg, base: NFT_PAYLOAD_NETWORK_HEADER, offset: 8, len: 2 },
                neq(&[0xfe, 0x80]),
            ]),
            Stmt::SnatToDestination(family) => {
                let (offset, len) = destination(*family);
                out.extend([
                    meta(NFT_META_NFPROTO),
                    eq(&[family.number()]),
                    Payload { dreg, base: NFT_PAYLOAD_NETWORK_HEADER, offset, len },
                    Snat { family: family.number(), address: NFT_REG_1 },
                ]);
            }
            Stmt::Redirect(port) => out.extend([
                Immediate { dreg, data: port.to_be_bytes().to_vec() },
                Redirect { port: NFT_REG_1 },
            ]),
            Stmt::Reset => out.push(RejectTcpReset),
            Stmt::PacketMarkMap { mask, map } => out.extend([
                meta(NFT_META_MARK),
                masked(*mask),
                LookupVerdict { set: mark_map(map), sreg },
            ]),
            Stmt::CtMarkMap { mask, map } => out.extend([
                ct(NFT_CT_MARK),
                masked(*mask),
                LookupVerdict { set: mark_map(map), sreg },
            ]),
            Stmt::Verdict(verdict) => out.push(Verdict(verdict.clone())),
        }
    }
}

/// Where the network header has the destination: offset, length.
fn destination(family: Family) -> (u32, u32) {
    match family {
        Family::V4 => (16, 4),
        Family::V6 => (24, 16),
    }
}

/// A look-up of an address of the packet's network header in a named set.
fn address(family: Family, offset: u32, len: u32, set: &str, out: &mut Vec<Expr>) {
    out.extend([
        Expr::MetaLoad { key: NFT_META_NFPROTO, dreg: NFT_REG_1 },
        Expr::Cmp { op: NFT_CMP_EQ, sreg: NFT_REG_1, data: vec![family.number()] },
        Expr::Payload { dreg: NFT_REG_1, base: NFT_PAYLOAD_NETWORK_HEADER, offset, len },
        Expr::Lookup { set: SetRef::Named(set.to_string()), sreg: NFT_REG_1, invert: false },
    ]);
}

fn octets(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn mark_map(map: &[(u32, Verdict)]) -> SetRef {
    SetRef::Anonymous(Anonymous {
        key_type: TYPE_MARK,
        key_len: 4,
        elements: map
            .iter()
            .map(|(value, verdict)| (value.to_ne_bytes().to_vec(), Some(verdict.clone())))
            .collect(),
    })
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Return => f.write_str("return"),
            Verdict::Jump(chain) => write!(f, "jump {chain}"),
            Verdict::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

struct MapText<'a>(&'a [(u32, Verdict)]);

impl fmt::Display for MapText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{ ")?;
        for (i, (value, verdict)) in self.0.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{value:#010x} : {verdict}")?;
        }
        f.write_str(" }")
    }
}

impl fmt::Display for Stmt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stmt::IifLo => f.write_str("iif \"lo\""),
            Stmt::OifLo => f.write_str("oif \"lo\""),
            Stmt::Iifname(interface) => write!(f, "iifname \"{interface}\""),
            Stmt::Cgroup { level, set } => write!(f, "socket cgroupv2 level {level} @{set}"),
            Stmt::CgroupHash { level, set } => {
                let modulus = u32::MAX;
                write!(f, "jhash socket cgroupv2 level {level} mod {modulus} seed 0x1 @{set}")
            }
            Stmt::Transparent => f.write_str("socket transparent 1"),
            Stmt::HasOwner => write!(f, "meta skuid != {NO_UID}"),
            Stmt::Uid(uid) => write!(f, "meta skuid {uid}"),
            Stmt::PacketMark(Mark { value, mask }) => {
                write!(f, "meta mark and {mask:#010x} == {value:#010x}")
            }
            Stmt::CtMark(Mark { value, mask }) => {
                write!(f, "ct mark and {mask:#010x} == {value:#010x}")
            }
            Stmt::NotCtMark(Mark { value, mask }) => {
                write!(f, "ct mark and {mask:#010x} != {value:#010x}")
            }
            Stmt::CtMarked(mask) => write!(f, "ct mark and {mask:#010x} != 0"),
            Stmt::Original => f.write_str("ct direction original"),
            Stmt::Reply => f.write_str("ct direction reply"),
            Stmt::New => f.write_str("ct state new"),
            Stmt::Invalid => f.write_str("ct state invalid"),
            Stmt::Unconfirmed => f.write_str("ct status and confirmed == 0"),
            Stmt::Dnatted => f.write_str("ct status dnat"),
            Stmt::Destination { family, set } => write!(f, "{} daddr @{set}", family.nft()),
            Stmt::Source { family, set } => write!(f, "{} saddr @{set}", family.nft()),
            Stmt::EtherSource(macs) => match macs.as_slice() {
                [mac] => write!(f, "ether saddr {mac}"),
                macs => {
                    let macs: Vec<String> = macs.iter().map(Mac::to_string).collect();
                    write!(f, "ether saddr {{ {} }}", macs.join(", "))
                }
            },
            Stmt::Nfproto(Family::V4) => f.write_str("meta nfproto ipv4"),
            Stmt::Nfproto(Family::V6) => f.write_str("meta nfproto ipv6"),
            Stmt::L4proto(l4) => write!(f, "meta l4proto {}", l4.nft()),
            Stmt::TcpOrUdp => f.write_str("meta l4proto { tcp, udp }"),
            Stmt::NotTcpOrUdp => f.write_str("meta l4proto != { tcp, udp }"),
            Stmt::Dport(l4, port) => write!(f, "{} dport {port}", l4.nft()),
            Stmt::NotDport(port) => write!(f, "th dport != {port}"),
            Stmt::Local => f.write_str("fib daddr type local"),
            Stmt::ForeignSource => f.write_str("fib saddr type != local"),
            Stmt::Broadcast => f.write_str("fib daddr type broadcast"),
            Stmt::NeighbourDiscovery => {
                f.write_str("icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert }")
            }
            Stmt::Counter => f.write_str("counter"),
            Stmt::SetCtMark(Mark { value, mask }) => {
                write!(f, "ct mark set ct mark and {:#010x} or {value:#010x}", !mask)
            }
            Stmt::SetPacketMark(Mark { value, mask }) => {
                write!(f, "meta mark set meta mark and {:#010x} or {value:#010x}", !mask)
            }
            Stmt::Tproxy { family, address, port } => {
                f.write_str("tproxy ")?;
                if let Some(family) = family {
                    write!(f, "{} ", family.nft())?;
                }
                match address {
                    None => write!(f, "to :{port}"),
                    Some(IpAddr::V4(a)) => write!(f, "to {a}:{port}"),
                    Some(IpAddr::V6(a)) => write!(f, "to [{a}]:{port}"),
                }
            }
            Stmt::Dnat(to) => write!(f, "dnat {} to {to}", Family::of(&to.ip()).nft()),
            Stmt::Snat(to) => write!(f, "snat {} to {to}", Family::of(to).nft()),
            Stmt::NotLinkLocal => f.write_str("ip6 saddr != fe80::/16"),
            Stmt::SnatToDestination(family) => write!(f, "snat {0} to {0} daddr", family.nft()),
            Stmt::Redirect(port) => write!(f, "redirect to :{port}"),
            Stmt::Reset => f.write_str("reject with tcp reset"),
            Stmt::PacketMarkMap { mask, map } => {
                write!(f, "meta mark and {mask:#010x} vmap {}", MapText(map))
            }
            Stmt::CtMarkMap { mask, map } => {
                write!(f, "ct mark and {mask:#010x} vmap {}", MapText(map))
            }
            Stmt::Verdict(verdict) => verdict.fmt(f),
        }
    }
}
