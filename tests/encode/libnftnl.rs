//! The nf_tables messages of our objects, as libnftnl writes them: an encoder that shares nothing
//! with `nft::message` but the data types that go in. Numbers that our types do not carry come from
//! libc and from nft's headers, not from our `uapi`.
//!
//! Objects are not freed: they are few and the test is short.

use std::ffi::{c_char, c_int, CStr, CString};

use cgtproxy::net::{Address, Range};
use cgtproxy::nft::expr::{Anonymous, Expr, SetRef, Verdict};
use cgtproxy::nft::stmt::Stmt;
use cgtproxy::nft::table::{Chain, Content, Rule, Set, Table};
use mnl::mnl_sys::mnl_attr_put_u32;
use nftnl::nftnl_sys::*;

type Header = *mut libc::nlmsghdr;

/// Room for any message: its longest nest has 64 KiB.
const ROOM: usize = 128 * 1024;
/// An element list is not continued past this many bytes of its message (ours to choose).
const SPLIT: usize = 32 * 1024;

/// Key types and byte orders of nftables' include/datatype.h.
const IPADDR: u32 = 7;
const IP6ADDR: u32 = 8;
const INET_PROTOCOL: u32 = 12;
const INET_SERVICE: u32 = 13;
const MARK: u32 = 19;
const ICMP6_TYPE: u32 = 29;
const ETHERADDR: u32 = 9;
const CGROUPV2: u32 = 46;
const INTEGER: u32 = 4;
const HOST_ENDIAN: u32 = 1;
const BIG_ENDIAN: u32 = 2;
/// `NFT_DATA_VERDICT` of include/uapi/linux/netfilter/nf_tables.h
const DATA_VERDICT: u32 = 0xffff_ff00;

/// A builder for one kind of object. Every pointer in it comes from that kind's alloc function and
/// stays valid; libnftnl copies what is set.
macro_rules! object {
    ($name:ident($raw:ty): $alloc:ident($($arg:ident: $type:ty)?), $u32:ident, $str:ident) => {
        struct $name(*mut $raw);

        // not every kind has numbers
        #[allow(dead_code)]
        impl $name {
            fn new($($arg: $type)?) -> $name {
                // SAFETY: an argument, if any, is a string with its NUL
                let object = unsafe { $alloc($($arg.as_ptr())?) };
                assert!(!object.is_null());
                $name(object)
            }

            fn u32(self, attr: u32, value: u32) -> $name {
                // SAFETY: see the macro
                unsafe { $u32(self.0, attr as u16, value) };
                self
            }

            fn str(self, attr: u32, value: &str) -> $name {
                let value = CString::new(value).unwrap();
                // SAFETY: see the macro
                unsafe { $str(self.0, attr as u16, value.as_ptr()) };
                self
            }
        }
    };
}

object!(NTable(nftnl_table): nftnl_table_alloc(), nftnl_table_set_u32, nftnl_table_set_str);
object!(NChain(nftnl_chain): nftnl_chain_alloc(), nftnl_chain_set_u32, nftnl_chain_set_str);
object!(NRule(nftnl_rule): nftnl_rule_alloc(), nftnl_rule_set_u32, nftnl_rule_set_str);
object!(NSet(nftnl_set): nftnl_set_alloc(), nftnl_set_set_u32, nftnl_set_set_str);
object!(NElem(nftnl_set_elem): nftnl_set_elem_alloc(), nftnl_set_elem_set_u32, nftnl_set_elem_set_str);
object!(NObj(nftnl_obj): nftnl_obj_alloc(), nftnl_obj_set_u32, nftnl_obj_set_str);
object!(NExpr(nftnl_expr): nftnl_expr_alloc(name: &CStr), nftnl_expr_set_u32, nftnl_expr_set_str);

impl NExpr {
    fn data(self, attr: u32, data: &[u8]) -> NExpr {
        // SAFETY: `data` is as long as it says; see the macro
        unsafe { nftnl_expr_set(self.0, attr as u16, data.as_ptr().cast(), data.len() as u32) };
        self
    }

    fn u8(self, attr: u32, value: u8) -> NExpr {
        self.data(attr, &[value])
    }

    fn u64(self, attr: u32, value: u64) -> NExpr {
        self.data(attr, &value.to_ne_bytes())
    }
}

impl NElem {
    fn key(key: &[u8]) -> NElem {
        let elem = NElem::new();
        let attr = NFTNL_SET_ELEM_KEY as u16;
        // SAFETY: `key` is as long as it says; see the macro
        unsafe { nftnl_set_elem_set(elem.0, attr, key.as_ptr().cast(), key.len() as u32) };
        elem
    }
}

/// A transaction by libnftnl, to be held against one of ours.
pub struct Reference {
    messages: Vec<Vec<u8>>,
    seq: u32,
    set_id: u32,
}

impl Reference {
    /// Begins a batch whose first message has the sequence number `seq0 + 1`.
    pub fn new(seq0: u32) -> Reference {
        let mut reference = Reference { messages: Vec::new(), seq: seq0, set_id: 0 };
        // SAFETY: the buffer has room for a header
        reference.push(|buf, seq| unsafe { nftnl_batch_begin(buf, seq) });
        reference
    }

    /// The messages; the last one before the end mark asks for an acknowledgement.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        let last = self.messages.last_mut().unwrap();
        let flags = u16::from_ne_bytes([last[6], last[7]]) | libc::NLM_F_ACK as u16;
        last[6..8].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: the buffer has room for a header
        self.push(|buf, seq| unsafe { nftnl_batch_end(buf, seq) });
        self.messages
    }

    pub fn replace(&mut self, table: &Table, flags: Option<u32>) {
        self.remove_table();
        self.table(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE, flags);
        self.put(table);
    }

    pub fn put(&mut self, table: &Table) {
        for chain in &table.chains {
            self.chain(chain);
        }
        for set in &table.sets {
            self.set(set);
        }
        for chain in &table.chains {
            for rule in &chain.rules {
                self.rule(&chain.name, rule);
            }
        }
    }

    pub fn remove_table(&mut self) {
        self.table(libc::NFT_MSG_NEWTABLE, libc::NLM_F_CREATE, None);
        self.table(libc::NFT_MSG_DELTABLE, 0, None);
    }

    pub fn table(&mut self, kind: c_int, flags: c_int, table_flags: Option<u32>) {
        let mut table = NTable::new().str(NFTNL_TABLE_NAME, "cgtproxy");
        if let Some(flags) = table_flags {
            table = table.u32(NFTNL_TABLE_FLAGS, flags);
        }
        // SAFETY: both pointers are valid
        self.message(kind, flags, |nlh| unsafe { nftnl_table_nlmsg_build_payload(nlh, table.0) });
    }

    pub fn chain(&mut self, chain: &Chain) {
        let mut object =
            NChain::new().str(NFTNL_CHAIN_TABLE, "cgtproxy").str(NFTNL_CHAIN_NAME, &chain.name);
        if let Some(base) = &chain.base {
            object = object
                .str(NFTNL_CHAIN_TYPE, base.kind)
                .u32(NFTNL_CHAIN_HOOKNUM, base.hook)
                .u32(NFTNL_CHAIN_PRIO, base.priority as u32)
                .u32(NFTNL_CHAIN_POLICY, libc::NF_ACCEPT as u32);
        }
        self.message(libc::NFT_MSG_NEWCHAIN, libc::NLM_F_CREATE, |nlh| {
            // SAFETY: both pointers are valid
            unsafe { nftnl_chain_nlmsg_build_payload(nlh, object.0) }
        });
    }

    pub fn delete_chain(&mut self, name: &str) {
        let object = NChain::new().str(NFTNL_CHAIN_TABLE, "cgtproxy").str(NFTNL_CHAIN_NAME, name);
        self.message(libc::NFT_MSG_DELCHAIN, 0, |nlh| {
            // SAFETY: both pointers are valid
            unsafe { nftnl_chain_nlmsg_build_payload(nlh, object.0) }
        });
    }

    pub fn set(&mut self, set: &Set) {
        let (kind, length, flags) = match set.content {
            Content::V4(_) => (IPADDR, 4, libc::NFT_SET_INTERVAL),
            Content::V6(_) => (IP6ADDR, 16, libc::NFT_SET_INTERVAL),
            Content::Ports(_) => (INET_SERVICE, 2, libc::NFT_SET_INTERVAL),
            Content::Cgroups { .. } => (CGROUPV2, 8, 0),
            Content::Hashes => (INTEGER, 4, 0),
        };
        let object = self.new_set(&set.name, flags, kind, length);
        if let Content::Cgroups { counters: true } = set.content {
            // SAFETY: both pointers are valid; the set owns the expression from now on
            unsafe { nftnl_set_add_expr(object.0, counter().0) };
        }
        self.send_set(&object);
        match &set.content {
            Content::V4(ranges) => self.intervals(&set.name, ranges),
            Content::V6(ranges) => self.intervals(&set.name, ranges),
            Content::Ports(ranges) => self.intervals(&set.name, ranges),
            Content::Cgroups { .. } | Content::Hashes => {}
        }
    }

    pub fn delete_set(&mut self, name: &str) {
        let set = NSet::new().str(NFTNL_SET_TABLE, "cgtproxy").str(NFTNL_SET_NAME, name);
        // SAFETY: both pointers are valid
        self.message(libc::NFT_MSG_DELSET, 0, |nlh| unsafe {
            nftnl_set_nlmsg_build_payload(nlh, set.0)
        });
    }

    pub fn add_cgroups(&mut self, set: &str, ids: &[u64]) {
        let elements = ids.iter().map(|id| NElem::key(&id.to_ne_bytes()));
        self.elements(libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE, set, None, elements);
    }

    pub fn add_hashes(&mut self, set: &str, hashes: &[u32]) {
        let elements = hashes.iter().map(|hash| NElem::key(&hash.to_ne_bytes()));
        self.elements(libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE, set, None, elements);
    }

    pub fn delete_hashes(&mut self, set: &str, hashes: &[u32]) {
        let elements = hashes.iter().map(|hash| NElem::key(&hash.to_ne_bytes()));
        self.elements(libc::NFT_MSG_DELSETELEM, 0, set, None, elements);
    }

    pub fn delete_cgroups(&mut self, set: &str, ids: &[u64]) {
        let elements = ids.iter().map(|id| NElem::key(&id.to_ne_bytes()));
        self.elements(libc::NFT_MSG_DELSETELEM, 0, set, None, elements);
    }

    /// Deletes all rules of a chain.
    pub fn add_counter(&mut self, name: &str, packets: u64) {
        let object = NObj::new().str(NFTNL_OBJ_TABLE, "cgtproxy").str(NFTNL_OBJ_NAME, name);
        let object = object.u32(NFTNL_OBJ_TYPE, OBJECT_COUNTER);
        // SAFETY: see the macro
        unsafe {
            nftnl_obj_set_u64(object.0, NFTNL_OBJ_CTR_PKTS as u16, packets);
            nftnl_obj_set_u64(object.0, NFTNL_OBJ_CTR_BYTES as u16, 0);
        }
        self.message(libc::NFT_MSG_NEWOBJ, libc::NLM_F_CREATE, |nlh| {
            // SAFETY: both pointers are valid
            unsafe { nftnl_obj_nlmsg_build_payload(nlh, object.0) }
        });
    }

    pub fn delete_counter(&mut self, name: &str) {
        let object = NObj::new().str(NFTNL_OBJ_TABLE, "cgtproxy").str(NFTNL_OBJ_NAME, name);
        self.message(libc::NFT_MSG_DELOBJ, 0, |nlh| {
            // SAFETY: both pointers are valid, and the buffer has room. nft writes the type by itself
            // too: libnftnl would add what the object has counted.
            unsafe {
                nftnl_obj_nlmsg_build_payload(nlh, object.0);
                mnl_attr_put_u32(nlh, OBJ_TYPE, OBJECT_COUNTER.to_be());
            }
        });
    }

    /// Of one chain, or of all.
    pub fn flush(&mut self, chain: Option<&str>) {
        let mut rule = NRule::new().str(NFTNL_RULE_TABLE, "cgtproxy");
        if let Some(chain) = chain {
            rule = rule.str(NFTNL_RULE_CHAIN, chain);
        }
        // SAFETY: both pointers are valid
        self.message(libc::NFT_MSG_DELRULE, 0, |nlh| unsafe {
            nftnl_rule_nlmsg_build_payload(nlh, rule.0)
        });
    }

    pub fn rule(&mut self, chain: &str, rule: &Rule) {
        self.rule_at(libc::NLM_F_APPEND, chain, rule);
    }

    pub fn rule_ahead(&mut self, chain: &str, rule: &Rule) {
        self.rule_at(0, chain, rule);
    }

    fn rule_at(&mut self, place: i32, chain: &str, rule: &Rule) {
        let mut exprs = Vec::new();
        rule.iter().for_each(|stmt: &Stmt| stmt.lower(&mut exprs));
        let object = NRule::new().str(NFTNL_RULE_TABLE, "cgtproxy").str(NFTNL_RULE_CHAIN, chain);
        for expr in &exprs {
            let expr = self.expr(expr);
            // SAFETY: both pointers are valid; the rule owns the expression from now on
            unsafe { nftnl_rule_add_expr(object.0, expr.0) };
        }
        self.message(libc::NFT_MSG_NEWRULE, libc::NLM_F_CREATE | place, |nlh| {
            // SAFETY: both pointers are valid
            unsafe { nftnl_rule_nlmsg_build_payload(nlh, object.0) }
        });
    }

    fn expr(&mut self, expr: &Expr) -> NExpr {
        match expr {
            Expr::MetaLoad { key, dreg } => {
                NExpr::new(c"meta").u32(NFTNL_EXPR_META_KEY, *key).u32(NFTNL_EXPR_META_DREG, *dreg)
            }
            Expr::MetaSet { key, sreg } => {
                NExpr::new(c"meta").u32(NFTNL_EXPR_META_KEY, *key).u32(NFTNL_EXPR_META_SREG, *sreg)
            }
            Expr::CtLoad { key, dreg } => {
                NExpr::new(c"ct").u32(NFTNL_EXPR_CT_KEY, *key).u32(NFTNL_EXPR_CT_DREG, *dreg)
            }
            Expr::CtSet { key, sreg } => {
                NExpr::new(c"ct").u32(NFTNL_EXPR_CT_KEY, *key).u32(NFTNL_EXPR_CT_SREG, *sreg)
            }
            Expr::Cmp { op, sreg, data } => NExpr::new(c"cmp")
                .u32(NFTNL_EXPR_CMP_OP, *op)
                .u32(NFTNL_EXPR_CMP_SREG, *sreg)
                .data(NFTNL_EXPR_CMP_DATA, data),
            Expr::Byteorder { sreg, dreg } => NExpr::new(c"byteorder")
                .u32(NFTNL_EXPR_BYTEORDER_SREG, *sreg)
                .u32(NFTNL_EXPR_BYTEORDER_DREG, *dreg)
                .u32(NFTNL_EXPR_BYTEORDER_OP, BYTEORDER_HTON)
                .u32(NFTNL_EXPR_BYTEORDER_LEN, 4)
                .u32(NFTNL_EXPR_BYTEORDER_SIZE, 4),
            Expr::Bitwise { sreg, dreg, mask, xor } => {
                bitwise(*sreg, *dreg, 4, &mask.to_ne_bytes(), &xor.to_ne_bytes())
            }
            Expr::BitwiseField { sreg, dreg, len, mask, xor } => {
                bitwise(*sreg, *dreg, *len, mask, xor)
            }
            Expr::Payload { dreg, base, offset, len } => NExpr::new(c"payload")
                .u32(NFTNL_EXPR_PAYLOAD_DREG, *dreg)
                .u32(NFTNL_EXPR_PAYLOAD_BASE, *base)
                .u32(NFTNL_EXPR_PAYLOAD_OFFSET, *offset)
                .u32(NFTNL_EXPR_PAYLOAD_LEN, *len),
            Expr::Lookup { set, sreg, invert } => {
                let lookup = self.lookup(set, *sreg);
                match invert {
                    true => lookup.u32(NFTNL_EXPR_LOOKUP_FLAGS, libc::NFT_LOOKUP_F_INV as u32),
                    false => lookup,
                }
            }
            Expr::LookupVerdict { set, sreg } => {
                self.lookup(set, *sreg).u32(NFTNL_EXPR_LOOKUP_DREG, libc::NFT_REG_VERDICT as u32)
            }
            Expr::Immediate { dreg, data } => NExpr::new(c"immediate")
                .u32(NFTNL_EXPR_IMM_DREG, *dreg)
                .data(NFTNL_EXPR_IMM_DATA, data),
            Expr::Verdict(verdict) => {
                let (code, chain) = code(verdict);
                let expr = NExpr::new(c"immediate")
                    .u32(NFTNL_EXPR_IMM_DREG, libc::NFT_REG_VERDICT as u32)
                    .u32(NFTNL_EXPR_IMM_VERDICT, code);
                match chain {
                    Some(chain) => expr.str(NFTNL_EXPR_IMM_CHAIN, chain),
                    None => expr,
                }
            }
            Expr::Counter => counter(),
            Expr::SocketCgroup { level, dreg } => {
                socket(SOCKET_CGROUPV2, *dreg).u32(NFTNL_EXPR_SOCKET_LEVEL, *level)
            }
            Expr::SocketTransparent { dreg } => socket(SOCKET_TRANSPARENT, *dreg),
            Expr::SocketWildcard { dreg } => socket(SOCKET_WILDCARD, *dreg),
            Expr::Jhash { sreg, dreg, len, modulus, seed } => NExpr::new(c"hash")
                .u32(NFTNL_EXPR_HASH_SREG, *sreg)
                .u32(NFTNL_EXPR_HASH_DREG, *dreg)
                .u32(NFTNL_EXPR_HASH_LEN, *len)
                .u32(NFTNL_EXPR_HASH_MODULUS, *modulus)
                .u32(NFTNL_EXPR_HASH_SEED, *seed)
                .u32(NFTNL_EXPR_HASH_TYPE, HASH_JENKINS),
            Expr::Redirect { port } => NExpr::new(c"redir")
                .u32(NFTNL_EXPR_REDIR_REG_PROTO_MIN, *port)
                .u32(NFTNL_EXPR_REDIR_FLAGS, NAT_PROTO_SPECIFIED),
            Expr::Tproxy { family, address, port } => {
                let expr = NExpr::new(c"tproxy")
                    .u32(NFTNL_EXPR_TPROXY_FAMILY, u32::from(*family))
                    .u32(NFTNL_EXPR_TPROXY_REG_PORT, *port);
                match address {
                    Some(address) => expr.u32(NFTNL_EXPR_TPROXY_REG_ADDR, *address),
                    None => expr,
                }
            }
            Expr::Dnat { family, address, port } => nat(libc::NFT_NAT_DNAT, *family, *address)
                .u32(NFTNL_EXPR_NAT_REG_PROTO_MIN, *port)
                .u32(NFTNL_EXPR_NAT_REG_PROTO_MAX, *port)
                .u32(NFTNL_EXPR_NAT_FLAGS, NAT_MAP_IPS | NAT_PROTO_SPECIFIED),
            Expr::Snat { family, address } => {
                nat(libc::NFT_NAT_SNAT, *family, *address).u32(NFTNL_EXPR_NAT_FLAGS, NAT_MAP_IPS)
            }
            Expr::Masquerade => NExpr::new(c"masq"),
            Expr::RejectTcpReset => reject(libc::NFT_REJECT_TCP_RST, 0),
            Expr::RejectIcmpx { code } => reject(libc::NFT_REJECT_ICMPX_UNREACH, *code),
            Expr::FibOifname { of, dreg } => fib(*of, FIB_RESULT_OIFNAME, *dreg),
            Expr::FibOif { of, dreg } => fib(*of, FIB_RESULT_OIF, *dreg),
            Expr::FibAddrtype { of, dreg } => fib(*of, FIB_RESULT_ADDRTYPE, *dreg),
        }
    }

    /// A look-up; an anonymous set goes ahead of the rule in messages of its own.
    fn lookup(&mut self, set: &SetRef, sreg: u32) -> NExpr {
        let lookup = NExpr::new(c"lookup").u32(NFTNL_EXPR_LOOKUP_SREG, sreg);
        match set {
            SetRef::Named(name) => lookup.str(NFTNL_EXPR_LOOKUP_SET, name),
            SetRef::Anonymous(set) => {
                let name = self.anonymous(set);
                lookup.str(NFTNL_EXPR_LOOKUP_SET, name).u32(NFTNL_EXPR_LOOKUP_SET_ID, self.set_id)
            }
        }
    }

    fn anonymous(&mut self, set: &Anonymous) -> &'static str {
        let flags = libc::NFT_SET_ANONYMOUS | libc::NFT_SET_CONSTANT;
        let is_map = set.elements[0].1.is_some();
        let name = if is_map { "__map%d" } else { "__set%d" };
        let object = match is_map {
            false => self.new_set(name, flags, set.key_type, set.key_len),
            true => self
                .new_set(name, flags | libc::NFT_SET_MAP, set.key_type, set.key_len)
                .u32(NFTNL_SET_DATA_TYPE, DATA_VERDICT)
                .u32(NFTNL_SET_DATA_LEN, 0),
        };
        self.send_set(&object);
        let elements = set.elements.iter().map(|(key, verdict)| {
            let elem = NElem::key(key);
            match verdict.as_ref().map(code) {
                None => elem,
                Some((code, None)) => elem.u32(NFTNL_SET_ELEM_VERDICT, code),
                Some((code, Some(chain))) => {
                    elem.u32(NFTNL_SET_ELEM_VERDICT, code).str(NFTNL_SET_ELEM_CHAIN, chain)
                }
            }
        });
        let (kind, flags) = (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE);
        self.elements(kind, flags, name, Some(self.set_id), elements);
        name
    }

    fn intervals<A: Address>(&mut self, set: &str, ranges: &[Range<A>]) {
        let ends = ranges.iter().flat_map(|range| {
            let end = range.end().map(|end| {
                let flags = libc::NFT_SET_ELEM_INTERVAL_END as u32;
                NElem::key(&octets(end)).u32(NFTNL_SET_ELEM_FLAGS, flags)
            });
            [Some(NElem::key(&octets(range.first))), end]
        });
        let (kind, flags) = (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE);
        self.elements(kind, flags, set, Some(self.set_id), ends.flatten());
    }

    /// A set with the next id of the transaction.
    fn new_set(&mut self, name: &str, flags: c_int, key_type: u32, key_len: u32) -> NSet {
        self.set_id += 1;
        let set = NSet::new()
            .str(NFTNL_SET_TABLE, "cgtproxy")
            .str(NFTNL_SET_NAME, name)
            .u32(NFTNL_SET_ID, self.set_id)
            .u32(NFTNL_SET_FLAGS, flags as u32)
            .u32(NFTNL_SET_KEY_TYPE, key_type)
            .u32(NFTNL_SET_KEY_LEN, key_len);
        let order = match key_type {
            MARK | CGROUPV2 | INTEGER => HOST_ENDIAN,
            IPADDR | IP6ADDR | ETHERADDR | INET_PROTOCOL | INET_SERVICE | ICMP6_TYPE => BIG_ENDIAN,
            other => panic!("what byte order has nft's data type {other}?"),
        };
        // SAFETY: the buffer has room for one attribute, and libnftnl copies it into the set
        unsafe {
            let udata = nftnl_udata_buf_alloc(64);
            assert!(nftnl_udata_put_u32(udata, NFTNL_UDATA_SET_KEYBYTEORDER as u8, order));
            if key_type == INTEGER {
                // `typeof numgen inc mod 2`, as nft writes it: what is nested is a buffer too
                let put = |into, kind: u32, nest| {
                    let (data, length) = (nftnl_udata_buf_data(nest), nftnl_udata_buf_len(nest));
                    assert!(nftnl_udata_put(into, kind as u8, length, data));
                };
                let numgen = nftnl_udata_buf_alloc(64);
                for (kind, value) in [(0, 0), (1, 2), (2, 0)] {
                    assert!(nftnl_udata_put_u32(numgen, kind, value));
                }
                let of = nftnl_udata_buf_alloc(64);
                assert!(nftnl_udata_put_u32(of, 0, NUMGEN));
                put(of, 1, numgen);
                put(udata, NFTNL_UDATA_SET_KEY_TYPEOF, of);
            }
            let (data, length) = (nftnl_udata_buf_data(udata), nftnl_udata_buf_len(udata));
            nftnl_set_set_data(set.0, NFTNL_SET_USERDATA as u16, data, length);
        }
        set
    }

    fn send_set(&mut self, set: &NSet) {
        self.message(libc::NFT_MSG_NEWSET, libc::NLM_F_CREATE, |nlh| {
            // SAFETY: both pointers are valid
            unsafe { nftnl_set_nlmsg_build_payload(nlh, set.0) }
        });
    }

    fn elements(
        &mut self,
        kind: c_int,
        flags: c_int,
        set: &str,
        id: Option<u32>,
        elements: impl Iterator<Item = NElem>,
    ) {
        let mut elements = elements.peekable();
        while elements.peek().is_some() {
            let mut list = NSet::new().str(NFTNL_SET_TABLE, "cgtproxy").str(NFTNL_SET_NAME, set);
            if let Some(id) = id {
                list = list.u32(NFTNL_SET_ID, id);
            }
            self.message(kind, flags, |nlh| {
                // SAFETY: all pointers are valid, the list owns what it is given, and each try
                // writes the payload anew behind the headers of nlmsghdr and nfgenmsg
                unsafe {
                    while (*nlh).nlmsg_len < SPLIT as u32 {
                        let Some(element) = elements.next() else {
                            break;
                        };
                        nftnl_set_elem_add(list.0, element.0);
                        (*nlh).nlmsg_len = 20;
                        nftnl_set_elems_nlmsg_build_payload(nlh, list.0);
                    }
                }
            });
        }
    }

    fn message(&mut self, kind: c_int, flags: c_int, payload: impl FnOnce(Header)) {
        self.push(|buf, seq| {
            let (kind, family) = (kind as u16, libc::NFPROTO_INET as u16);
            // SAFETY: the buffer has room for a header
            let nlh = unsafe { nftnl_nlmsg_build_hdr(buf, kind, family, flags as u16, seq) };
            payload(nlh);
            nlh
        });
    }

    fn push(&mut self, write: impl FnOnce(*mut c_char, u32) -> Header) {
        self.seq += 1;
        self.messages.push(message(self.seq, write));
    }
}

/// One message that `write` puts into a buffer of `ROOM` bytes.
pub fn message(seq: u32, write: impl FnOnce(*mut c_char, u32) -> Header) -> Vec<u8> {
    // of u64 for the alignment of the header
    let mut buf = vec![0u64; ROOM / 8];
    let nlh = write(buf.as_mut_ptr().cast(), seq);
    // SAFETY: the message stands at the beginning of the buffer and is within it
    unsafe { std::slice::from_raw_parts(nlh.cast(), (*nlh).nlmsg_len as usize) }.to_vec()
}

/// A request for all tables of family inet.
pub fn get_table(seq: u32) -> Vec<u8> {
    let (kind, family) = (libc::NFT_MSG_GETTABLE as u16, libc::NFPROTO_INET as u16);
    message(seq, |buf, seq| {
        // SAFETY: the buffer has room for a header
        unsafe { nftnl_nlmsg_build_hdr(buf, kind, family, libc::NLM_F_DUMP as u16, seq) }
    })
}

// include/uapi/linux/netfilter/nf_tables.h and nf_nat.h, where libc does not have them
const BYTEORDER_HTON: u32 = 1;
const OBJ_TYPE: u16 = 3;
const OBJECT_COUNTER: u32 = 1;
const BITWISE_BOOL: u32 = 0;
const SOCKET_CGROUPV2: u32 = 3;
const SOCKET_TRANSPARENT: u32 = 0;
const SOCKET_WILDCARD: u32 = 2;
const HASH_JENKINS: u32 = 0;
/// `expr_types` of nft's include/expression.h
const NUMGEN: u32 = 23;
const FIB_RESULT_OIF: u32 = 1;
const FIB_RESULT_OIFNAME: u32 = 2;
const FIB_RESULT_ADDRTYPE: u32 = 3;
const NAT_MAP_IPS: u32 = 1 << 0;
const NAT_PROTO_SPECIFIED: u32 = 1 << 1;

fn bitwise(sreg: u32, dreg: u32, len: u32, mask: &[u8], xor: &[u8]) -> NExpr {
    NExpr::new(c"bitwise")
        .u32(NFTNL_EXPR_BITWISE_SREG, sreg)
        .u32(NFTNL_EXPR_BITWISE_DREG, dreg)
        .u32(NFTNL_EXPR_BITWISE_OP, BITWISE_BOOL)
        .u32(NFTNL_EXPR_BITWISE_LEN, len)
        .data(NFTNL_EXPR_BITWISE_MASK, mask)
        .data(NFTNL_EXPR_BITWISE_XOR, xor)
}

fn socket(key: u32, dreg: u32) -> NExpr {
    NExpr::new(c"socket").u32(NFTNL_EXPR_SOCKET_KEY, key).u32(NFTNL_EXPR_SOCKET_DREG, dreg)
}

fn nat(kind: c_int, family: u8, address: u32) -> NExpr {
    NExpr::new(c"nat")
        .u32(NFTNL_EXPR_NAT_TYPE, kind as u32)
        .u32(NFTNL_EXPR_NAT_FAMILY, u32::from(family))
        .u32(NFTNL_EXPR_NAT_REG_ADDR_MIN, address)
        .u32(NFTNL_EXPR_NAT_REG_ADDR_MAX, address)
}

fn reject(kind: c_int, code: u8) -> NExpr {
    NExpr::new(c"reject").u32(NFTNL_EXPR_REJECT_TYPE, kind as u32).u8(NFTNL_EXPR_REJECT_CODE, code)
}

fn fib(of: u32, result: u32, dreg: u32) -> NExpr {
    NExpr::new(c"fib")
        .u32(NFTNL_EXPR_FIB_FLAGS, of)
        .u32(NFTNL_EXPR_FIB_RESULT, result)
        .u32(NFTNL_EXPR_FIB_DREG, dreg)
}

fn counter() -> NExpr {
    NExpr::new(c"counter").u64(NFTNL_EXPR_CTR_BYTES, 0).u64(NFTNL_EXPR_CTR_PACKETS, 0)
}

fn code(verdict: &Verdict) -> (u32, Option<&str>) {
    match verdict {
        Verdict::Accept => (libc::NF_ACCEPT as u32, None),
        Verdict::Drop => (libc::NF_DROP as u32, None),
        Verdict::Return => (libc::NFT_RETURN as u32, None),
        Verdict::Jump(chain) => (libc::NFT_JUMP as u32, Some(chain)),
        Verdict::Goto(chain) => (libc::NFT_GOTO as u32, Some(chain)),
    }
}

/// An address in network order.
fn octets<A: Address>(address: A) -> Vec<u8> {
    address.to_bits().to_be_bytes()[16 - A::BYTES..].to_vec()
}
