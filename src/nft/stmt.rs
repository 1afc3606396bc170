//! What rules are made of. A rule is a list of [`Stmt`]; what nft calls a statement (for `show`) and
//! the register machine's instructions for it (for the kernel) stand in one line of `Stmt::put`,
//! so the two cannot drift apart. Pure data.
//! Source: include/uapi/linux/netfilter/nf_tables.h, nft(8); bytecode as `nft --debug=netlink`
//! shows it for the same text.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::expr::{Anonymous, Expr, SetRef, Verdict};
use crate::net::{Family, Interface, Mac, Mark, Owner, Range, L4};
use crate::netlink::uapi::*;

/// One statement of a rule, in the order in which nft writes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stmt {
    /// `iif "lo"`, `oif "lo"`: by index, which is 1 in every network namespace.
    IifLo,
    OifLo,
    /// `iifname NAME`, by name, so that the interface need not be there
    Iifname(Interface),
    /// `oifname NAME`
    Oifname(String),
    /// `socket cgroupv2 level L @SET`; a packet without a socket does not match.
    Cgroup {
        level: u8,
        set: String,
    },
    /// `socket cgroupv2 level L != @SET`: one that has an ancestor at that level, which is another
    OtherCgroup {
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
    /// `meta skuid UID`, `meta skgid GID`, or from one to another: who opened the socket. What the
    /// kernel sends for one that no process has any more does not match.
    Owner(Owner),
    /// `meta skuid != UID`; a packet that no process sends does not match.
    NotUid(u32),
    /// `meta mark and MASK == VALUE`
    PacketMark(Mark),
    /// `meta mark and MASK != VALUE`
    NotPacketMark(Mark),
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
    /// `ct state invalid,new,untracked`: nothing says that it goes on with a flow
    Fresh,
    /// `ct status and confirmed == 0`: of a flow that this very packet begins
    Unconfirmed,
    /// `ct status confirmed`: of a flow that has begun before
    Confirmed,
    /// `ct status dnat`
    Dnatted,
    /// `ct status and dnat == 0`
    NotDnatted,
    /// `ip daddr @SET` or `ip6 daddr @SET`
    Destination {
        family: Family,
        set: String,
    },
    /// `ip daddr != @SET`: of that family, the other destinations
    OtherDestination {
        family: Family,
        set: String,
    },
    /// `ip dscp N` or `ip6 dscp N`
    Dscp(Family, u8),
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
    /// `meta l4proto != tcp` or udp
    NotL4proto(L4),
    /// `meta l4proto { tcp, udp }`
    TcpOrUdp,
    /// `meta l4proto != tcp meta l4proto != udp`: two comparisons cost a quarter of a set
    NotTcpOrUdp,
    /// `tcp dport N` or `udp dport N`
    Dport(L4, u16),
    /// `udp dport != { N, N-M, … }`: of that protocol, the other ports. Sorted and apart.
    OtherDports(L4, Vec<Range<u16>>),
    /// `th dport != N`: whatever the protocol; what has no ports has other things there
    NotDport(u16),
    /// `fib daddr type local`: this host's own addresses
    Local,
    /// `fib saddr type != local`: sent from an address that is not this host's
    ForeignSource,
    /// `fib daddr oifname NAME`: the way to the destination is by that interface.
    LeadsTo(String),
    /// `fib saddr . oif type != local`: from an address that the interface does not have
    SourceOfOther,
    /// `fib saddr oifname != NAME`: the way to where it comes from is not by that interface
    ComesFromElsewhere(String),
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
    /// `ip daddr 127.0.0.0/8`
    ToLoopback,
    /// `ip6 saddr != fe80::/16`
    NotLinkLocal,
    /// `snat ip to ip daddr`: as if the packet came from where it goes to
    SnatToDestination(Family),
    /// `masquerade`: as if the packet came from the interface that it leaves by
    Masquerade,
    /// `redirect to :PORT`: to this host's address on the interface that the packet came in by
    Redirect(u16),
    /// `reject with tcp reset`
    Reset,
    /// `reject with icmpx port-unreachable`
    Unreachable,
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
        // what is pushed cannot fail
        let _ = self.put(Out::Exprs(out));
    }

    /// Each statement as nft writes it, with its instructions.
    fn put(&self, out: Out) -> fmt::Result {
        use format_args as text;
        match self {
            Stmt::IifLo => out.put(text!("iif \"lo\""), [meta(NFT_META_IIF), is(1)]),
            Stmt::OifLo => out.put(text!("oif \"lo\""), [meta(NFT_META_OIF), is(1)]),
            Stmt::Iifname(interface) => {
                let name = match interface.prefix {
                    // compared without its end
                    true => interface.name.as_bytes().to_vec(),
                    false => padded(&interface.name),
                };
                out.put(text!("iifname \"{interface}\""), [meta(NFT_META_IIFNAME), eq(&name)])
            }
            Stmt::Oifname(name) => {
                out.put(text!("oifname \"{name}\""), [meta(NFT_META_OIFNAME), eq(&padded(name))])
            }
            Stmt::Cgroup { level, set } => out.put(
                text!("socket cgroupv2 level {level} @{set}"),
                [cgroup(*level, NFT_REG_1), lookup(named(set))],
            ),
            Stmt::OtherCgroup { level, set } => out.put(
                text!("socket cgroupv2 level {level} != @{set}"),
                [cgroup(*level, NFT_REG_1), lookup_not(named(set))],
            ),
            Stmt::CgroupHash { level, set } => out.put(
                text!("jhash socket cgroupv2 level {level} mod {} seed 0x1 @{set}", u32::MAX),
                [cgroup(*level, NFT_REG_2), hash(), lookup(named(set))],
            ),
            Stmt::Transparent => out.put(
                text!("socket transparent 1"),
                [Expr::SocketTransparent { dreg: NFT_REG_1 }, eq(&[1])],
            ),
            Stmt::HasOwner => {
                out.put(text!("meta skuid != {NO_UID}"), [meta(NFT_META_SKUID), is_not(NO_UID)])
            }
            Stmt::Owner(owner) => {
                let (name, key, first, last) = match owner {
                    Owner::Users(first, last) => ("skuid", NFT_META_SKUID, first, last),
                    Owner::Groups(first, last) => ("skgid", NFT_META_SKGID, first, last),
                };
                match first == last {
                    true => out.put(text!("meta {name} {first}"), [meta(key), is(*first)]),
                    false => out.put(
                        text!("meta {name} {first}-{last}"),
                        [
                            meta(key),
                            Expr::Byteorder { sreg: NFT_REG_1, dreg: NFT_REG_1 },
                            cmp(NFT_CMP_GTE, &first.to_be_bytes()),
                            cmp(NFT_CMP_LTE, &last.to_be_bytes()),
                        ],
                    ),
                }
            }
            Stmt::NotUid(uid) => {
                out.put(text!("meta skuid != {uid}"), [meta(NFT_META_SKUID), is_not(*uid)])
            }
            Stmt::NotPacketMark(Mark { value, mask }) => out.put(
                text!("meta mark and {mask:#010x} != {value:#010x}"),
                [meta(NFT_META_MARK), and(*mask), is_not(*value)],
            ),
            Stmt::PacketMark(Mark { value, mask }) => out.put(
                text!("meta mark and {mask:#010x} == {value:#010x}"),
                [meta(NFT_META_MARK), and(*mask), is(*value)],
            ),
            Stmt::CtMark(Mark { value, mask }) => out.put(
                text!("ct mark and {mask:#010x} == {value:#010x}"),
                [ct(NFT_CT_MARK), and(*mask), is(*value)],
            ),
            Stmt::NotCtMark(Mark { value, mask }) => out.put(
                text!("ct mark and {mask:#010x} != {value:#010x}"),
                [ct(NFT_CT_MARK), and(*mask), is_not(*value)],
            ),
            Stmt::CtMarked(mask) => {
                out.put(text!("ct mark and {mask:#010x} != 0"), has(NFT_CT_MARK, *mask))
            }
            Stmt::Original => out.put(
                text!("ct direction original"),
                [ct(NFT_CT_DIRECTION), eq(&[IP_CT_DIR_ORIGINAL])],
            ),
            Stmt::Reply => {
                out.put(text!("ct direction reply"), [ct(NFT_CT_DIRECTION), eq(&[IP_CT_DIR_REPLY])])
            }
            Stmt::New => out.put(text!("ct state new"), has(NFT_CT_STATE, NF_CT_STATE_NEW_BIT)),
            Stmt::Invalid => {
                out.put(text!("ct state invalid"), has(NFT_CT_STATE, NF_CT_STATE_INVALID_BIT))
            }
            Stmt::Fresh => {
                let new = NF_CT_STATE_INVALID_BIT | NF_CT_STATE_NEW_BIT | NF_CT_STATE_UNTRACKED_BIT;
                out.put(text!("ct state invalid,new,untracked"), has(NFT_CT_STATE, new))
            }
            Stmt::Unconfirmed => out
                .put(text!("ct status and confirmed == 0"), has_none(NFT_CT_STATUS, IPS_CONFIRMED)),
            Stmt::Confirmed => {
                out.put(text!("ct status confirmed"), has(NFT_CT_STATUS, IPS_CONFIRMED))
            }
            Stmt::Dnatted => out.put(text!("ct status dnat"), has(NFT_CT_STATUS, IPS_DST_NAT)),
            Stmt::NotDnatted => {
                out.put(text!("ct status and dnat == 0"), has_none(NFT_CT_STATUS, IPS_DST_NAT))
            }
            Stmt::Destination { family, set } => out.put(
                text!("{} daddr @{set}", family.nft()),
                address_then(*family, DADDR, lookup(named(set))),
            ),
            Stmt::OtherDestination { family, set } => out.put(
                text!("{} daddr != @{set}", family.nft()),
                address_then(*family, DADDR, lookup_not(named(set))),
            ),
            Stmt::Dscp(family, dscp) => {
                // the upper six bits of the second byte; in IPv6, of the second to fourth half byte
                let (offset, mask, value) = match family {
                    Family::V4 => (1, vec![0xfc], vec![dscp << 2]),
                    Family::V6 => {
                        let bits = u16::from(*dscp) << 6;
                        (0, vec![0x0f, 0xc0], bits.to_be_bytes().to_vec())
                    }
                };
                let (len, xor) = (mask.len() as u32, vec![0; mask.len()]);
                let (sreg, dreg) = (NFT_REG_1, NFT_REG_1);
                out.put(
                    text!("{} dscp {dscp}", family.nft()),
                    [
                        meta(NFT_META_NFPROTO),
                        eq(&[family.number()]),
                        payload(NFT_PAYLOAD_NETWORK_HEADER, offset, len),
                        Expr::BitwiseField { sreg, dreg, len, mask, xor },
                        eq(&value),
                    ],
                )
            }
            Stmt::Source { family, set } => out.put(
                text!("{} saddr @{set}", family.nft()),
                address_then(*family, SADDR, lookup(named(set))),
            ),
            Stmt::EtherSource(macs) => {
                let of_ether = eq(&ARPHRD_ETHER.to_ne_bytes());
                let saddr = payload(NFT_PAYLOAD_LL_HEADER, 6, 6);
                let with = |last| [meta(NFT_META_IIFTYPE), of_ether, saddr, last];
                match &macs[..] {
                    // nft makes no set for one element
                    [mac] => out.put(text!("ether saddr {mac}"), with(eq(&mac.0))),
                    macs => {
                        let all: Vec<_> = macs.iter().map(|mac| mac.0).collect();
                        let all = lookup(any_of(TYPE_ETHERADDR, &all));
                        let text = Braces(macs, fmt::Display::fmt);
                        out.put(text!("ether saddr {text}"), with(all))
                    }
                }
            }
            Stmt::Nfproto(family) => {
                let name = ["ipv4", "ipv6"][*family as usize];
                out.put(
                    text!("meta nfproto {name}"),
                    [meta(NFT_META_NFPROTO), eq(&[family.number()])],
                )
            }
            Stmt::L4proto(l4) => out.put(
                text!("meta l4proto {}", l4.nft()),
                [meta(NFT_META_L4PROTO), eq(&[l4.number()])],
            ),
            Stmt::NotL4proto(l4) => out.put(
                text!("meta l4proto != {}", l4.nft()),
                [meta(NFT_META_L4PROTO), neq(&[l4.number()])],
            ),
            Stmt::TcpOrUdp => out.put(
                text!("meta l4proto {{ tcp, udp }}"),
                [meta(NFT_META_L4PROTO), lookup(tcp_or_udp())],
            ),
            Stmt::NotTcpOrUdp => out.put(
                text!("meta l4proto != tcp meta l4proto != udp"),
                [
                    meta(NFT_META_L4PROTO),
                    neq(&[IPPROTO_TCP]),
                    meta(NFT_META_L4PROTO),
                    neq(&[IPPROTO_UDP]),
                ],
            ),
            Stmt::Dport(l4, port) => {
                out.put(text!("{} dport {port}", l4.nft()), port_is(*l4, eq(&port.to_be_bytes())))
            }
            Stmt::OtherDports(l4, ports) => {
                let is = lookup_not(any_port(ports));
                out.put(
                    text!("{} dport != {}", l4.nft(), Braces(ports, fmt::Display::fmt)),
                    port_is(*l4, is),
                )
            }
            Stmt::NotDport(port) => out.put(
                text!("th dport != {port}"),
                [payload(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2), neq(&port.to_be_bytes())],
            ),
            Stmt::Local => out
                .put(text!("fib daddr type local"), [fib(NFTA_FIB_F_DADDR), is(RTN_LOCAL.into())]),
            Stmt::ForeignSource => out.put(
                text!("fib saddr type != local"),
                [fib(NFTA_FIB_F_SADDR), is_not(RTN_LOCAL.into())],
            ),
            Stmt::LeadsTo(name) => {
                let way = Expr::FibOifname { of: NFTA_FIB_F_DADDR, dreg: NFT_REG_1 };
                out.put(text!("fib daddr oifname \"{name}\""), [way, eq(&padded(name))])
            }
            Stmt::SourceOfOther => out.put(
                text!("fib saddr . oif type != local"),
                [fib(NFTA_FIB_F_SADDR | NFTA_FIB_F_OIF), is_not(RTN_LOCAL.into())],
            ),
            Stmt::ComesFromElsewhere(name) => {
                let way = Expr::FibOifname { of: NFTA_FIB_F_SADDR, dreg: NFT_REG_1 };
                out.put(text!("fib saddr oifname != \"{name}\""), [way, neq(&padded(name))])
            }
            Stmt::Broadcast => out
                .put(text!("fib daddr type broadcast"), [fib(NFTA_FIB_F_DADDR), is(RTN_BROADCAST)]),
            Stmt::NeighbourDiscovery => {
                let types = [[NDISC_NEIGHBOUR_SOLICITATION], [NDISC_NEIGHBOUR_ADVERTISEMENT]];
                out.put(
                    text!("icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }}"),
                    [
                        meta(NFT_META_NFPROTO),
                        eq(&[NFPROTO_IPV6]),
                        meta(NFT_META_L4PROTO),
                        eq(&[IPPROTO_ICMPV6]),
                        payload(NFT_PAYLOAD_TRANSPORT_HEADER, 0, 1),
                        lookup(any_of(TYPE_ICMP6_TYPE, &types)),
                    ],
                )
            }
            Stmt::Counter => out.put(text!("counter"), [Expr::Counter]),
            Stmt::SetCtMark(Mark { value, mask }) => out.put(
                text!("ct mark set ct mark and {:#010x} or {value:#010x}", !mask),
                [
                    ct(NFT_CT_MARK),
                    and_xor(!mask, *value),
                    Expr::CtSet { key: NFT_CT_MARK, sreg: NFT_REG_1 },
                ],
            ),
            Stmt::SetPacketMark(Mark { value, mask }) => out.put(
                text!("meta mark set meta mark and {:#010x} or {value:#010x}", !mask),
                [
                    meta(NFT_META_MARK),
                    and_xor(!mask, *value),
                    Expr::MetaSet { key: NFT_META_MARK, sreg: NFT_REG_1 },
                ],
            ),
            Stmt::Tproxy { family, address, port } => {
                let (ip, number) = match family {
                    None => ("", NFPROTO_UNSPEC),
                    Some(Family::V4) => ("ip ", NFPROTO_IPV4),
                    Some(Family::V6) => ("ip6 ", NFPROTO_IPV6),
                };
                let tproxy = |address, port| Expr::Tproxy { family: number, address, port };
                let port_in = |dreg| immediate(dreg, &port.to_be_bytes());
                match address.map(|ip| SocketAddr::new(ip, *port)) {
                    None => out.put(
                        text!("tproxy {ip}to :{port}"),
                        [port_in(NFT_REG_1), tproxy(None, NFT_REG_1)],
                    ),
                    Some(to) => out.put(
                        text!("tproxy {ip}to {to}"),
                        [
                            address_to(&to.ip()),
                            port_in(NFT_REG_2),
                            tproxy(Some(NFT_REG_1), NFT_REG_2),
                        ],
                    ),
                }
            }
            Stmt::Dnat(to) => {
                let family = Family::of(&to.ip());
                out.put(
                    text!("dnat {} to {to}", family.nft()),
                    [
                        address_to(&to.ip()),
                        immediate(NFT_REG_2, &to.port().to_be_bytes()),
                        Expr::Dnat { family: family.number(), address: NFT_REG_1, port: NFT_REG_2 },
                    ],
                )
            }
            Stmt::Snat(to) => {
                let family = Family::of(to);
                out.put(
                    text!("snat {} to {to}", family.nft()),
                    [address_to(to), Expr::Snat { family: family.number(), address: NFT_REG_1 }],
                )
            }
            Stmt::ToLoopback => out.put(
                text!("ip daddr 127.0.0.0/8"),
                [
                    meta(NFT_META_NFPROTO),
                    eq(&[NFPROTO_IPV4]),
                    payload(NFT_PAYLOAD_NETWORK_HEADER, 16, 1),
                    eq(&[127]),
                ],
            ),
            Stmt::NotLinkLocal => out.put(
                text!("ip6 saddr != fe80::/16"),
                [
                    meta(NFT_META_NFPROTO),
                    eq(&[NFPROTO_IPV6]),
                    payload(NFT_PAYLOAD_NETWORK_HEADER, 8, 2),
                    neq(&[0xfe, 0x80]),
                ],
            ),
            Stmt::SnatToDestination(family) => {
                let snat = Expr::Snat { family: family.number(), address: NFT_REG_1 };
                out.put(
                    text!("snat {0} to {0} daddr", family.nft()),
                    address_then(*family, DADDR, snat),
                )
            }
            Stmt::Masquerade => out.put(text!("masquerade"), [Expr::Masquerade]),
            Stmt::Redirect(port) => out.put(
                text!("redirect to :{port}"),
                [immediate(NFT_REG_1, &port.to_be_bytes()), Expr::Redirect { port: NFT_REG_1 }],
            ),
            Stmt::Reset => out.put(text!("reject with tcp reset"), [Expr::RejectTcpReset]),
            Stmt::Unreachable => out.put(
                text!("reject with icmpx port-unreachable"),
                [Expr::RejectIcmpx { code: NFT_REJECT_ICMPX_PORT_UNREACH }],
            ),
            Stmt::PacketMarkMap { mask, map } => out.put(
                text!("meta mark and {mask:#010x} vmap {}", Braces(map, entry)),
                [meta(NFT_META_MARK), and(*mask), verdict_by_mark(map)],
            ),
            Stmt::CtMarkMap { mask, map } => out.put(
                text!("ct mark and {mask:#010x} vmap {}", Braces(map, entry)),
                [ct(NFT_CT_MARK), and(*mask), verdict_by_mark(map)],
            ),
            Stmt::Verdict(verdict) => out.put(text!("{verdict}"), [Expr::Verdict(verdict.clone())]),
        }
    }
}

/// What of a statement is wanted.
enum Out<'a, 'b> {
    Text(&'a mut fmt::Formatter<'b>),
    Exprs(&'a mut Vec<Expr>),
}

impl Out<'_, '_> {
    fn put<const N: usize>(self, text: fmt::Arguments, exprs: [Expr; N]) -> fmt::Result {
        match self {
            Out::Text(f) => f.write_fmt(text),
            Out::Exprs(out) => {
                out.extend(exprs);
                Ok(())
            }
        }
    }
}

impl fmt::Display for Stmt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.put(Out::Text(f))
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

fn immediate(dreg: u32, data: &[u8]) -> Expr {
    Expr::Immediate { dreg, data: data.to_vec() }
}

fn address_to(address: &IpAddr) -> Expr {
    match address {
        IpAddr::V4(a) => immediate(NFT_REG_1, &a.octets()),
        IpAddr::V6(a) => immediate(NFT_REG_1, &a.octets()),
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
    SetRef::Anonymous(Anonymous {
        key_type,
        key_len: N as u32,
        elements,
        intervals: false,
        id: None,
    })
}

/// A set of intervals where one of them is more than a port.
fn any_port(ports: &[Range<u16>]) -> SetRef {
    let intervals = ports.iter().any(|range| range.first != range.last);
    let keys = ports.iter().flat_map(|range| {
        let end = range.end().filter(|_| intervals);
        [Some(range.first), end].into_iter().flatten()
    });
    let elements = keys.map(|port| (port.to_be_bytes().to_vec(), None)).collect();
    let (key_type, key_len) = (TYPE_INET_SERVICE, 2);
    SetRef::Anonymous(Anonymous { key_type, key_len, elements, intervals, id: None })
}

/// Loads the destination port of a packet of this protocol and judges it.
fn port_is(l4: L4, test: Expr) -> [Expr; 4] {
    [meta(NFT_META_L4PROTO), eq(&[l4.number()]), payload(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2), test]
}

fn tcp_or_udp() -> SetRef {
    any_of(TYPE_INET_PROTOCOL, &[[IPPROTO_TCP], [IPPROTO_UDP]])
}

fn verdict_by_mark(map: &[(u32, Verdict)]) -> Expr {
    let element =
        |(value, verdict): &(u32, Verdict)| (value.to_ne_bytes().to_vec(), Some(verdict.clone()));
    let elements = map.iter().map(element).collect();
    let set = Anonymous { key_type: TYPE_MARK, key_len: 4, elements, intervals: false, id: None };
    Expr::LookupVerdict { set: SetRef::Anonymous(set), sreg: NFT_REG_1 }
}

/// Where the network header has its addresses: offset and length, by family.
const SADDR: [(u32, u32); 2] = [(12, 4), (8, 16)];
const DADDR: [(u32, u32); 2] = [(16, 4), (24, 16)];

/// Loads an address of a packet of this family for what is to be done with it.
fn address_then(family: Family, [v4, v6]: [(u32, u32); 2], then: Expr) -> [Expr; 4] {
    let (offset, len) = match family {
        Family::V4 => v4,
        Family::V6 => v6,
    };
    [
        meta(NFT_META_NFPROTO),
        eq(&[family.number()]),
        payload(NFT_PAYLOAD_NETWORK_HEADER, offset, len),
        then,
    ]
}
