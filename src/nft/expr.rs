//! The instructions of the kernel's register machine that rules lower to: one row each, from which
//! the type, the writer and the reader come. Pure; attributes stand in the order of libnftnl.
//! Source: include/uapi/linux/netfilter/nf_tables.h.

use std::borrow::Cow;
use std::fmt;

use crate::netlink::msg::Batch;
use crate::netlink::parse::Attrs;
use crate::netlink::uapi::*;

/// What is done with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Accept,
    Drop,
    /// Back to behind the last jump, or, without one, the base chain's policy.
    Return,
    Jump(String),
    Goto(String),
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
    /// Its id within the transaction, once it has been sent ahead of its rule.
    pub id: Option<u32>,
}

/// A row is a variant, the kernel's name for it, and its attributes: number, [`Encoding`], and the field
/// that stands there or the constant that must. What the kernel calls by one name can be several
/// rows: the reader takes the first whose constants and fields are all there.
macro_rules! expressions {
    ($(
        $(#[$doc:meta])*
        $variant:ident $({ $($field:ident: $type:ty),* })? $(($inner:ident: $only:ty))? = $name:literal {
            $($attr:ident: $kind:ident = $value:tt),*
        }
    )*) => {
        /// One instruction. Register data is raw: host order for what the kernel keeps in host order
        /// (marks, ids, indexes), network order for packet fields.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Expr {
            $($(#[$doc])* $variant $({ $($field: $type),* })? $(($only))?,)*
        }

        impl Expr {
            /// Appends name and data, within the nest that the caller has opened.
            pub fn write(&self, batch: &mut Batch) {
                match self {
                    $(Expr::$variant $({ $($field),* })? $(($inner))? => {
                        batch.str_z(NFTA_EXPR_NAME, $name);
                        let data = batch.nest(NFTA_EXPR_DATA);
                        $(($kind.write)(batch, $attr, &$value);)*
                        batch.end_nest(data);
                    })*
                }
            }

            /// Reads what stands in such a nest; `None` for what no row describes.
            // a field that stands in two attributes is bound twice, and a constant may not match
            #[allow(unused_variables, clippy::question_mark)]
            pub fn read(bytes: &[u8]) -> Option<Expr> {
                let (name, data) = parts(bytes);
                $(if name == $name {
                    let row = || {
                        $(let Some($value) = ($kind.read)(&data, $attr) else { return None };)*
                        Some(Expr::$variant $({ $($field),* })? $(($inner))?)
                    };
                    if let Some(expr) = row() {
                        return Some(expr);
                    }
                })*
                None
            }
        }
    };
}

expressions! {
    MetaLoad { key: u32, dreg: u32 } = "meta" {
        NFTA_META_KEY: U32 = key, NFTA_META_DREG: U32 = dreg
    }
    MetaSet { key: u32, sreg: u32 } = "meta" {
        NFTA_META_KEY: U32 = key, NFTA_META_SREG: U32 = sreg
    }
    CtLoad { key: u32, dreg: u32 } = "ct" {
        NFTA_CT_KEY: U32 = key, NFTA_CT_DREG: U32 = dreg
    }
    CtSet { key: u32, sreg: u32 } = "ct" {
        NFTA_CT_KEY: U32 = key, NFTA_CT_SREG: U32 = sreg
    }
    Cmp { op: u32, sreg: u32, data: Vec<u8> } = "cmp" {
        NFTA_CMP_SREG: U32 = sreg, NFTA_CMP_OP: U32 = op, NFTA_CMP_DATA: DATA = data
    }
    /// Swaps the bytes of a number to the order in which it can be compared as more or less.
    Byteorder { sreg: u32, dreg: u32 } = "byteorder" {
        NFTA_BYTEORDER_SREG: U32 = sreg, NFTA_BYTEORDER_DREG: U32 = dreg,
        NFTA_BYTEORDER_OP: U32 = NFT_BYTEORDER_HTON, NFTA_BYTEORDER_LEN: U32 = 4,
        NFTA_BYTEORDER_SIZE: U32 = 4
    }
    Bitwise { sreg: u32, dreg: u32, mask: u32, xor: u32 } = "bitwise" {
        NFTA_BITWISE_SREG: U32 = sreg, NFTA_BITWISE_DREG: U32 = dreg,
        NFTA_BITWISE_OP: U32 = NFT_BITWISE_BOOL, NFTA_BITWISE_LEN: U32 = 4,
        NFTA_BITWISE_MASK: WORD = mask, NFTA_BITWISE_XOR: WORD = xor
    }
    /// Of a field of a packet, which may have another length.
    BitwiseField { sreg: u32, dreg: u32, len: u32, mask: Vec<u8>, xor: Vec<u8> } = "bitwise" {
        NFTA_BITWISE_SREG: U32 = sreg, NFTA_BITWISE_DREG: U32 = dreg,
        NFTA_BITWISE_OP: U32 = NFT_BITWISE_BOOL, NFTA_BITWISE_LEN: U32 = len,
        NFTA_BITWISE_MASK: DATA = mask, NFTA_BITWISE_XOR: DATA = xor
    }
    Payload { dreg: u32, base: u32, offset: u32, len: u32 } = "payload" {
        NFTA_PAYLOAD_DREG: U32 = dreg, NFTA_PAYLOAD_BASE: U32 = base,
        NFTA_PAYLOAD_OFFSET: U32 = offset, NFTA_PAYLOAD_LEN: U32 = len
    }
    /// A map look-up whose result is the verdict.
    LookupVerdict { set: SetRef, sreg: u32 } = "lookup" {
        NFTA_LOOKUP_SREG: U32 = sreg, NFTA_LOOKUP_DREG: U32 = NFT_REG_VERDICT,
        NFTA_LOOKUP_SET: SET = set
    }
    Lookup { set: SetRef, sreg: u32, invert: bool } = "lookup" {
        NFTA_LOOKUP_SREG: U32 = sreg, NFTA_LOOKUP_SET: SET = set,
        NFTA_LOOKUP_FLAGS: INVERT = invert
    }
    Verdict(verdict: Verdict) = "immediate" {
        NFTA_IMMEDIATE_DREG: U32 = NFT_REG_VERDICT, NFTA_IMMEDIATE_DATA: VERDICT = verdict
    }
    Immediate { dreg: u32, data: Vec<u8> } = "immediate" {
        NFTA_IMMEDIATE_DREG: U32 = dreg, NFTA_IMMEDIATE_DATA: DATA = data
    }
    /// What it has counted is not ours to write; [`counted`] reads it.
    Counter = "counter" {
        NFTA_COUNTER_BYTES: ZERO_U64 = (), NFTA_COUNTER_PACKETS: ZERO_U64 = ()
    }
    SocketCgroup { level: u32, dreg: u32 } = "socket" {
        NFTA_SOCKET_KEY: U32 = NFT_SOCKET_CGROUPV2, NFTA_SOCKET_DREG: U32 = dreg,
        NFTA_SOCKET_LEVEL: U32 = level
    }
    SocketTransparent { dreg: u32 } = "socket" {
        NFTA_SOCKET_KEY: U32 = NFT_SOCKET_TRANSPARENT, NFTA_SOCKET_DREG: U32 = dreg
    }
    SocketWildcard { dreg: u32 } = "socket" {
        NFTA_SOCKET_KEY: U32 = NFT_SOCKET_WILDCARD, NFTA_SOCKET_DREG: U32 = dreg
    }
    /// Jenkins' hash of a register, scaled to `0..modulus`.
    Jhash { sreg: u32, dreg: u32, len: u32, modulus: u32, seed: u32 } = "hash" {
        NFTA_HASH_SREG: U32 = sreg, NFTA_HASH_DREG: U32 = dreg, NFTA_HASH_LEN: U32 = len,
        NFTA_HASH_MODULUS: U32 = modulus, NFTA_HASH_SEED: U32 = seed,
        NFTA_HASH_TYPE: U32 = NFT_HASH_JENKINS
    }
    Tproxy { family: u8, address: Option<u32>, port: u32 } = "tproxy" {
        NFTA_TPROXY_FAMILY: FAMILY = family, NFTA_TPROXY_REG_ADDR: MAYBE = address,
        NFTA_TPROXY_REG_PORT: U32 = port
    }
    Dnat { family: u8, address: u32, port: u32 } = "nat" {
        NFTA_NAT_TYPE: U32 = NFT_NAT_DNAT, NFTA_NAT_FAMILY: FAMILY = family,
        NFTA_NAT_REG_ADDR_MIN: U32 = address, NFTA_NAT_REG_ADDR_MAX: U32 = address,
        NFTA_NAT_REG_PROTO_MIN: U32 = port, NFTA_NAT_REG_PROTO_MAX: U32 = port,
        NFTA_NAT_FLAGS: U32 = ADDRESS_AND_PORT
    }
    Snat { family: u8, address: u32 } = "nat" {
        NFTA_NAT_TYPE: U32 = NFT_NAT_SNAT, NFTA_NAT_FAMILY: FAMILY = family,
        NFTA_NAT_REG_ADDR_MIN: U32 = address, NFTA_NAT_REG_ADDR_MAX: U32 = address,
        NFTA_NAT_FLAGS: U32 = NF_NAT_RANGE_MAP_IPS
    }
    Redirect { port: u32 } = "redir" {
        NFTA_REDIR_REG_PROTO_MIN: U32 = port, NFTA_REDIR_FLAGS: U32 = NF_NAT_RANGE_PROTO_SPECIFIED
    }
    /// The source address of the interface that a packet leaves by.
    Masquerade = "masq" {}
    RejectTcpReset = "reject" {
        NFTA_REJECT_TYPE: U32 = NFT_REJECT_TCP_RST, NFTA_REJECT_ICMP_CODE: ZERO_U8 = ()
    }
    /// An ICMP or an ICMPv6 error, by the packet's family.
    RejectIcmpx { code: u8 } = "reject" {
        NFTA_REJECT_TYPE: U32 = NFT_REJECT_ICMPX_UNREACH, NFTA_REJECT_ICMP_CODE: U8 = code
    }
    /// The name of the interface that leads to the source or the destination, by `NFTA_FIB_F_*`.
    FibOifname { of: u32, dreg: u32 } = "fib" {
        NFTA_FIB_FLAGS: U32 = of, NFTA_FIB_RESULT: U32 = NFT_FIB_RESULT_OIFNAME,
        NFTA_FIB_DREG: U32 = dreg
    }
    /// The number of that interface; 0 where there is none.
    FibOif { of: u32, dreg: u32 } = "fib" {
        NFTA_FIB_FLAGS: U32 = of, NFTA_FIB_RESULT: U32 = NFT_FIB_RESULT_OIF,
        NFTA_FIB_DREG: U32 = dreg
    }
    /// The type of the source or the destination address, by `NFTA_FIB_F_*`.
    FibAddrtype { of: u32, dreg: u32 } = "fib" {
        NFTA_FIB_FLAGS: U32 = of, NFTA_FIB_RESULT: U32 = NFT_FIB_RESULT_ADDRTYPE,
        NFTA_FIB_DREG: U32 = dreg
    }
}

const ADDRESS_AND_PORT: u32 = NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED;

/// The kernel's name of an expression, and its attributes.
pub(super) fn parts(bytes: &[u8]) -> (Cow<'_, str>, Attrs<'_>) {
    let attrs = Attrs::new(bytes);
    (attrs.text(NFTA_EXPR_NAME).unwrap_or_default(), attrs.nest(NFTA_EXPR_DATA))
}

/// The elements of a list, of expressions say.
pub(super) fn listed<'a>(list: &Attrs<'a>) -> impl Iterator<Item = &'a [u8]> {
    list.clone().filter(|(kind, _)| *kind == NFTA_LIST_ELEM).map(|(_, bytes)| bytes)
}

/// Packets and bytes of an expression that is a counter.
pub fn counted(bytes: &[u8]) -> Option<(u64, u64)> {
    let (name, data) = parts(bytes);
    let counted = || data.u64_be(NFTA_COUNTER_PACKETS).zip(data.u64_be(NFTA_COUNTER_BYTES));
    (name == "counter").then(counted)?
}

/// How a value stands in an attribute, and is read from there; `None` where it is not.
struct Encoding<T> {
    write: fn(&mut Batch, u16, &T),
    read: fn(&Attrs, u16) -> Option<T>,
}

const U32: Encoding<u32> = Encoding {
    write: |batch, attr, number| batch.u32_be(attr, *number),
    read: |data, attr| data.u32_be(attr),
};

const U8: Encoding<u8> = Encoding {
    write: |batch, attr, number| batch.u8(attr, *number),
    read: |data, attr| data.byte(attr),
};

/// A number that may be left out.
const MAYBE: Encoding<Option<u32>> = Encoding {
    write: |batch, attr, value| {
        if let Some(number) = value {
            batch.u32_be(attr, *number);
        }
    },
    read: |data, attr| Some(data.u32_be(attr)),
};

/// A family, in 32 bits.
const FAMILY: Encoding<u8> = Encoding {
    write: |batch, attr, family| batch.u32_be(attr, u32::from(*family)),
    read: |data, attr| u8::try_from(data.u32_be(attr)?).ok(),
};

/// The flag of a look-up that matches what is not in the set.
const INVERT: Encoding<bool> = Encoding {
    write: |batch, attr, invert| {
        if *invert {
            batch.u32_be(attr, NFT_LOOKUP_F_INV);
        }
    },
    read: |data, attr| Some(data.u32_be(attr).unwrap_or(0) & NFT_LOOKUP_F_INV != 0),
};

/// Register data.
const DATA: Encoding<Vec<u8>> = Encoding {
    write: |batch, attr, data| value(batch, attr, data),
    read: |data, attr| Some(data.nest(attr).get(NFTA_DATA_VALUE)?.to_vec()),
};

/// Register data that is a number in host order.
const WORD: Encoding<u32> = Encoding {
    write: |batch, attr, number| value(batch, attr, &number.to_ne_bytes()),
    read: |data, attr| data.nest(attr).u32_ne(NFTA_DATA_VALUE),
};

const VERDICT: Encoding<Verdict> = Encoding {
    write: |batch, attr, verdict| verdict.write(batch, attr),
    read: |data, attr| Verdict::read(&data.nest(attr).nest(NFTA_DATA_VERDICT)),
};

/// The name of a set; with its id where the kernel has yet to complete the name.
const SET: Encoding<SetRef> = Encoding {
    write: |batch, attr, set| match set {
        SetRef::Named(name) => batch.str_z(attr, name),
        SetRef::Anonymous(set) => {
            batch.str_z(attr, set.name());
            (MAYBE.write)(batch, NFTA_LOOKUP_SET_ID, &set.id);
        }
    },
    read: |data, attr| Some(SetRef::Named(data.text(attr)?.into_owned())),
};

/// Numbers that the kernel changes or leaves out: not looked at.
const ZERO_U8: Encoding<()> =
    Encoding { write: |batch, attr, ()| batch.u8(attr, 0), read: |_, _| Some(()) };
const ZERO_U64: Encoding<()> =
    Encoding { write: |batch, attr, ()| batch.u64_be(attr, 0), read: |_, _| Some(()) };

/// Register data, or the key of an element.
pub fn value(batch: &mut Batch, attr: u16, data: &[u8]) {
    batch.raw_in(attr, NFTA_DATA_VALUE, data);
}

impl Anonymous {
    pub fn is_map(&self) -> bool {
        self.elements.iter().any(|(_, verdict)| verdict.is_some())
    }

    /// The kernel completes it with a number.
    pub fn name(&self) -> &'static str {
        if self.is_map() {
            "__map%d"
        } else {
            "__set%d"
        }
    }
}

impl Verdict {
    pub fn write(&self, batch: &mut Batch, attr: u16) {
        let (code, chain) = match self {
            Verdict::Accept => (NF_ACCEPT, None),
            Verdict::Drop => (NF_DROP, None),
            Verdict::Return => (NFT_RETURN, None),
            Verdict::Jump(chain) => (NFT_JUMP, Some(chain)),
            Verdict::Goto(chain) => (NFT_GOTO, Some(chain)),
        };
        let data = batch.nest(attr);
        let nest = batch.nest(NFTA_DATA_VERDICT);
        batch.u32_be(NFTA_VERDICT_CODE, code as u32);
        if let Some(chain) = chain {
            batch.str_z(NFTA_VERDICT_CHAIN, chain);
        }
        batch.end_nest(nest);
        batch.end_nest(data);
    }

    fn read(attrs: &Attrs) -> Option<Verdict> {
        let chain = || Some(attrs.text(NFTA_VERDICT_CHAIN)?.into_owned());
        Some(match attrs.u32_be(NFTA_VERDICT_CODE)? as i32 {
            NF_ACCEPT => Verdict::Accept,
            NF_DROP => Verdict::Drop,
            NFT_RETURN => Verdict::Return,
            NFT_JUMP => Verdict::Jump(chain()?),
            NFT_GOTO => Verdict::Goto(chain()?),
            _ => return None,
        })
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read of an expression with these attributes.
    fn read(name: &str, attrs: &[(u16, u32)]) -> Option<Expr> {
        let mut batch = Batch::new(0);
        batch.str_z(NFTA_EXPR_NAME, name);
        let data = batch.nest(NFTA_EXPR_DATA);
        attrs.iter().for_each(|(attr, number)| batch.u32_be(*attr, *number));
        batch.end_nest(data);
        Expr::read(batch.bytes())
    }

    #[test]
    fn what_no_row_describes_is_skipped() {
        let (key, dreg, level) = (NFTA_SOCKET_KEY, NFTA_SOCKET_DREG, NFTA_SOCKET_LEVEL);
        let cgroup = [(key, NFT_SOCKET_CGROUPV2), (dreg, 1), (level, 2)];
        let known = Some(Expr::SocketCgroup { level: 2, dreg: 1 });
        assert_eq!(read("socket", &cgroup), known);
        // in another order, with what a later kernel may add
        assert_eq!(read("socket", &[(99, 7), cgroup[2], cgroup[1], cgroup[0]]), known);
        assert_eq!(read("socket", &cgroup[..2]), None);
        assert_eq!(read("socket", &[(key, 1), (dreg, 1), (level, 2)]), None);
        assert_eq!(read("sockets", &cgroup), None);
        assert_eq!(Expr::read(&[]), None);
        // attributes that the kernel may leave out
        let (family, port) = ((NFTA_TPROXY_FAMILY, 2), (NFTA_TPROXY_REG_PORT, 1));
        let tproxy = Expr::Tproxy { family: 2, address: None, port: 1 };
        assert_eq!(read("tproxy", &[family, port]), Some(tproxy));
        let reset = [(NFTA_REJECT_TYPE, NFT_REJECT_TCP_RST)];
        assert_eq!(read("reject", &reset), Some(Expr::RejectTcpReset));
    }
}
