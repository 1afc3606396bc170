//! What conntrack knows of one flow, by ctnetlink. Pure bytes.
//! Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c.

use std::net::{IpAddr, SocketAddr};

use super::msg::{Batch, Open};
use super::parse::{self, Attrs, Message};
use super::uapi::*;

/// A flow between a local socket and a remote one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Its first packet was the local socket's, as far as conntrack saw.
    pub outbound: bool,
    /// TCP: conntrack did not see it begin, so that who spoke first says nothing.
    pub midstream: bool,
    /// 0 too where the kernel does not tell of it.
    pub mark: u32,
}

/// Asks for the flow of a connected socket.
pub fn get(batch: &mut Batch, protocol: u8, local: SocketAddr, remote: SocketAddr) {
    let open = begin(batch, IPCTNL_MSG_CT_GET, NLM_F_ACK, family(local));
    tuple(batch, CTA_TUPLE_ORIG, protocol, local, remote);
    batch.end(open);
}

fn begin(batch: &mut Batch, kind: u16, flags: u16, family: u8) -> Open {
    batch.begin_nfnl(NFNL_SUBSYS_CTNETLINK, kind, NLM_F_REQUEST | flags, family)
}

fn family(end: SocketAddr) -> u8 {
    match end.is_ipv4() {
        true => NFPROTO_IPV4,
        false => NFPROTO_IPV6,
    }
}

fn tuple(batch: &mut Batch, which: u16, protocol: u8, from: SocketAddr, to: SocketAddr) {
    let tuple = batch.nest(which);
    let nest = batch.nest(CTA_TUPLE_IP);
    batch.ip(if from.is_ipv4() { CTA_IP_V4_SRC } else { CTA_IP_V6_SRC }, from.ip());
    batch.ip(if to.is_ipv4() { CTA_IP_V4_DST } else { CTA_IP_V6_DST }, to.ip());
    batch.end_nest(nest);
    let nest = batch.nest(CTA_TUPLE_PROTO);
    batch.u8(CTA_PROTO_NUM, protocol);
    batch.raw(CTA_PROTO_SRC_PORT, &from.port().to_be_bytes());
    batch.raw(CTA_PROTO_DST_PORT, &to.port().to_be_bytes());
    batch.end_nest(nest);
    batch.end_nest(tuple);
}

/// Tells of a TCP connection that `remote` made, before conntrack sees a packet of it: whoever speaks
/// next would be who made it.
pub fn inbound(batch: &mut Batch, local: SocketAddr, remote: SocketAddr) {
    const FOR_SECONDS: u32 = 432_000; // as the kernel has it for what is established
    let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK;
    let open = begin(batch, IPCTNL_MSG_CT_NEW, flags, family(local));
    tuple(batch, CTA_TUPLE_ORIG, IPPROTO_TCP, remote, local);
    tuple(batch, CTA_TUPLE_REPLY, IPPROTO_TCP, local, remote);
    batch.u32_be(CTA_STATUS, IPS_CONFIRMED | IPS_SEEN_REPLY | IPS_ASSURED);
    batch.u32_be(CTA_TIMEOUT, FOR_SECONDS);
    let info = batch.nest(CTA_PROTOINFO);
    let tcp = batch.nest(CTA_PROTOINFO_TCP);
    batch.u8(CTA_PROTOINFO_TCP_STATE, TCP_CONNTRACK_ESTABLISHED);
    // its windows are not known
    for flags in [CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY] {
        batch.raw(flags, &[IP_CT_TCP_FLAG_BE_LIBERAL; 2]);
    }
    batch.end_nest(tcp);
    batch.end_nest(info);
    batch.end(open);
}

/// Has all flows forgotten whose mark is `value` in the bits of `mask`.
pub fn forget(batch: &mut Batch, value: u32, mask: u32) {
    of_marked(batch, IPCTNL_MSG_CT_DELETE, NLM_F_ACK, value, mask);
}

fn of_marked(batch: &mut Batch, kind: u16, flags: u16, value: u32, mask: u32) {
    let open = begin(batch, kind, flags, NFPROTO_UNSPEC);
    batch.u32_be(CTA_MARK, value);
    batch.u32_be(CTA_MARK_MASK, mask);
    batch.end(open);
}

/// A flow as it was dumped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracked {
    pub protocol: u8,
    /// Who spoke first, and to whom; ports are 0 where there are none, as with a ping.
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Whom answers come from, and where they go to.
    pub answers: (SocketAddr, SocketAddr),
    pub mark: u32,
    /// Seconds until it is forgotten.
    pub timeout: u32,
    /// Of others, where they have put it in one.
    pub zone: Option<u16>,
    /// Both as the kernel has them, by which it is found again.
    original: Vec<u8>,
}

impl Tracked {
    /// Whether it may be for a resolver, which it can be translated to when it begins alone.
    pub fn is_query(&self) -> bool {
        self.to.port() == 53
    }

    /// Whether it goes to somebody else than it was sent to.
    pub fn is_redirected(&self) -> bool {
        self.answers.0 != self.to
    }

    /// Whether an address or a port of it is translated.
    pub fn is_translated(&self) -> bool {
        self.answers != (self.to, self.from)
    }
}

/// Asks for all flows of either family: of one, the kernel would pass over all that are the other's
/// before it answers.
pub fn get_all(batch: &mut Batch) {
    let open = begin(batch, IPCTNL_MSG_CT_GET, NLM_F_DUMP, NFPROTO_UNSPEC);
    batch.end(open);
}

/// Reads an answer to [`get_all`] or [`get_marked`].
pub fn parse_entry(message: &Message) -> Option<Tracked> {
    let attrs = told(message)?;
    let original = attrs.get(CTA_TUPLE_ORIG)?;
    let (protocol, from, to) = ends(original)?;
    let (_, answer_from, answer_to) = ends(attrs.get(CTA_TUPLE_REPLY)?)?;
    let zone = attrs.get(CTA_ZONE).and_then(|zone| zone.try_into().ok());
    Some(Tracked {
        protocol,
        from,
        to,
        answers: (answer_from, answer_to),
        mark: attrs.u32_be(CTA_MARK).unwrap_or(0),
        timeout: attrs.u32_be(CTA_TIMEOUT).unwrap_or(0),
        zone: zone.map(u16::from_be_bytes),
        original: original.to_vec(),
    })
}

/// The protocol and the two ends of a tuple; ports are 0 where it has none.
fn ends(tuple: &[u8]) -> Option<(u8, SocketAddr, SocketAddr)> {
    let addresses = Attrs::new(tuple).nest(CTA_TUPLE_IP);
    let ports = Attrs::new(tuple).nest(CTA_TUPLE_PROTO);
    let address = |v4, v6| addresses.get(v4).or_else(|| addresses.get(v6)).and_then(parse::ip);
    let port = |which| {
        let port = ports.get(which).and_then(|port| port.try_into().ok());
        port.map_or(0, u16::from_be_bytes)
    };
    let protocol = ports.byte(CTA_PROTO_NUM)?;
    let from = SocketAddr::new(address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?, port(CTA_PROTO_SRC_PORT));
    let to = SocketAddr::new(address(CTA_IP_V4_DST, CTA_IP_V6_DST)?, port(CTA_PROTO_DST_PORT));
    Some((protocol, from, to))
}

/// Has one flow forgotten.
pub fn delete(batch: &mut Batch, entry: &Tracked) {
    let open = begin(batch, IPCTNL_MSG_CT_DELETE, NLM_F_ACK, family(entry.from));
    put_original(batch, entry);
    batch.end(open);
}

fn put_original(batch: &mut Batch, entry: &Tracked) {
    batch.raw(CTA_TUPLE_ORIG | NLA_F_NESTED, &entry.original);
    if let Some(zone) = entry.zone {
        batch.raw(CTA_ZONE, &zone.to_be_bytes());
    }
}

/// Has one flow known with other bits of its mark.
pub fn mark(batch: &mut Batch, entry: &Tracked, value: u32, mask: u32) {
    let open = begin(batch, IPCTNL_MSG_CT_NEW, NLM_F_ACK, family(entry.from));
    put_original(batch, entry);
    put_mark(batch, value, mask);
    batch.end(open);
}

fn put_mark(batch: &mut Batch, value: u32, mask: u32) {
    batch.u32_be(CTA_MARK, value);
    batch.u32_be(CTA_MARK_MASK, mask);
}

/// Has a UDP flow known as one with another mark that leaves with that address, and stays known as long as
/// the one of before. With another than its own, the kernel finds a port for it.
pub fn create(batch: &mut Batch, entry: &Tracked, mark: u32, source: IpAddr) {
    const LEAST_SECONDS: u32 = 30; // as the kernel has it for what is not answered yet
    let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK;
    let open = begin(batch, IPCTNL_MSG_CT_NEW, flags, family(entry.from));
    tuple(batch, CTA_TUPLE_ORIG, entry.protocol, entry.from, entry.to);
    tuple(batch, CTA_TUPLE_REPLY, entry.protocol, entry.to, entry.from);
    // its own stays as it is: the kernel would look for another port where it is taken
    if source != entry.from.ip() {
        let nat = batch.nest(CTA_NAT_SRC);
        let (first, last) = match source {
            IpAddr::V4(_) => (CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP),
            IpAddr::V6(_) => (CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP),
        };
        batch.ip(first, source);
        batch.ip(last, source);
        batch.end_nest(nat);
    }
    batch.u32_be(CTA_TIMEOUT, entry.timeout.max(LEAST_SECONDS));
    batch.u32_be(CTA_MARK, mark);
    batch.end(open);
}

/// What one flow has carried, where conntrack counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traffic {
    /// The kernel's number of the flow.
    pub id: u32,
    /// Bytes of the original direction, and of the other.
    pub bytes: [u64; 2],
}

/// Asks for all flows whose mark is `value` in the bits of `mask`.
pub fn get_marked(batch: &mut Batch, value: u32, mask: u32) {
    of_marked(batch, IPCTNL_MSG_CT_GET, NLM_F_DUMP, value, mask);
}

/// Reads an answer to [`get_marked`]; `None` where it has no counters.
pub fn parse_traffic(message: &Message) -> Option<Traffic> {
    let attrs = told(message)?;
    let bytes = |which| attrs.nest(which).u64_be(CTA_COUNTERS_BYTES);
    Some(Traffic {
        id: attrs.u32_be(CTA_ID)?,
        bytes: [bytes(CTA_COUNTERS_ORIG)?, bytes(CTA_COUNTERS_REPLY)?],
    })
}

/// The attributes of a flow that is told of.
fn told<'a>(message: &Message<'a>) -> Option<Attrs<'a>> {
    let told = message.is_nfnl(NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW);
    told.then(|| Attrs::after(message.body, 4))
}

/// Reads the answer for a socket at `local`.
pub fn parse(message: &Message, local: SocketAddr) -> Option<Flow> {
    let attrs = told(message)?;
    let (_, from, _) = ends(attrs.get(CTA_TUPLE_ORIG)?)?;
    // of a flow that conntrack takes up on its way it checks no window
    let tcp = attrs.nest(CTA_PROTOINFO).nest(CTA_PROTOINFO_TCP);
    let flags = tcp.byte(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL).unwrap_or(0);
    Some(Flow {
        outbound: from == local,
        midstream: flags & IP_CT_TCP_FLAG_BE_LIBERAL != 0,
        mark: attrs.u32_be(CTA_MARK).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    #[test]
    fn what_a_flow_has_carried() {
        let mut batch = Batch::new(0);
        let open = begin(&mut batch, IPCTNL_MSG_CT_NEW, 0, NFPROTO_IPV4);
        for (which, bytes) in [(CTA_COUNTERS_ORIG, 7u64), (CTA_COUNTERS_REPLY, 1 << 40)] {
            let nest = batch.nest(which);
            batch.raw(CTA_COUNTERS_BYTES, &bytes.to_be_bytes());
            batch.end_nest(nest);
        }
        batch.u32_be(CTA_ID, 9);
        batch.end(open);
        let message = Messages::new(batch.bytes()).next().unwrap();
        let want = Traffic { id: 9, bytes: [7, 1 << 40] };
        assert_eq!(parse_traffic(&message), Some(want));
        for cut in 0..message.body.len() {
            assert_eq!(parse_traffic(&Message { body: &message.body[..cut], ..message }), None);
        }
        get_marked(&mut batch, 1, 2);
        assert_eq!(parse_traffic(&Messages::new(batch.bytes()).last().unwrap()), None);
    }

    #[test]
    fn an_entry_is_found_again_by_its_tuple() {
        let v4 = ("192.0.2.1:4242", "203.0.113.7:80", "10.8.0.1");
        let v6 = ("[2001:db8::1]:4242", "[2001:db8::2]:80", "fd00:8::1");
        for (from, to, source) in [v4, v6] {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let entry = Tracked {
                protocol: IPPROTO_UDP,
                from,
                to,
                answers: (to, from),
                mark: 7,
                timeout: 100,
                zone: None,
                original: Vec::new(),
            };
            let mut batch = Batch::new(0);
            create(&mut batch, &entry, 7, source.parse().unwrap());
            let message = Messages::new(batch.bytes()).next().unwrap();
            let read = parse_entry(&message).unwrap();
            assert_eq!(Tracked { original: Vec::new(), ..read.clone() }, entry);
            assert!(!read.is_translated());
            assert!(Tracked { answers: (to, to), ..entry.clone() }.is_translated());
            let mut batch = Batch::new(0);
            delete(&mut batch, &read);
            let deleted = Messages::new(batch.bytes()).next().unwrap();
            let original = Attrs::after(deleted.body, 4).get(CTA_TUPLE_ORIG).unwrap();
            assert_eq!(original, read.original);
            for cut in 0..message.body.len() {
                let _ = parse_entry(&Message { body: &message.body[..cut], ..message });
            }
        }
    }

    #[test]
    fn an_answer_names_who_spoke_first() {
        for (local, remote) in
            [("192.0.2.1:4242", "203.0.113.7:80"), ("[2001:db8::1]:4242", "[2001:db8::2]:80")]
        {
            let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
            // a request holds the same tuple as its answer
            let mut batch = Batch::new(0);
            get(&mut batch, IPPROTO_TCP, local, remote);
            let mut message = Messages::new(batch.bytes()).next().unwrap();
            assert_eq!(parse(&message, local), None);
            message.kind = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW;
            let flow = Flow { outbound: true, midstream: false, mark: 0 };
            assert_eq!(parse(&message, local), Some(flow));
            assert_eq!(parse(&message, remote), Some(Flow { outbound: false, ..flow }));
            for cut in 0..message.body.len() {
                let body = &message.body[..cut];
                assert_ne!(parse(&Message { body, ..message }, local), Some(flow), "cut at {cut}");
            }
        }
    }
}
