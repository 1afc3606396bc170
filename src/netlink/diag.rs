//! Sockets as inet_diag tells of them, whoever's they are, and how to end one. Pure bytes.
//! Source: sock_diag(7), include/uapi/linux/inet_diag.h, net/ipv4/inet_diag.c.

use std::net::{IpAddr, SocketAddr};

use super::conntrack::Flow;
use super::msg::Batch;
use super::parse::{self, Attrs, Message};
use super::uapi::*;

/// A TCP or UDP socket of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenSocket {
    /// `AF_INET6` also where the addresses are IPv4 ones (a dual-stack socket's).
    pub family: u8,
    pub protocol: u8,
    /// `TCP_ESTABLISHED` … of UDP too: connected, or else `TCP_CLOSE`.
    pub state: u8,
    /// A timer runs, mostly until it sends again what has not been acknowledged.
    pub waits: bool,
    pub local: SocketAddr,
    /// Unspecified and port 0 where it is not connected.
    pub remote: SocketAddr,
    /// Index of the interface that it is bound to; 0 for none.
    pub device: u32,
    pub uid: u32,
    /// 0 where no process has it any more.
    pub inode: u32,
    /// Id of the cgroup that it was made in (or that its process has moved to since); `None` for
    /// what is left of a closed one, and from a kernel that does not tell (before 5.9).
    pub cgroup: Option<u64>,
    /// SO_MARK; 0 too where CAP_NET_ADMIN is missing.
    pub mark: u32,
    /// IP_TRANSPARENT; `None` from a kernel that does not tell (before 5.9).
    pub transparent: Option<bool>,
    pub v6only: bool,
    /// What its packets bear; where [`get`] has asked.
    pub dscp: u8,
    /// Its send buffer has no limit, which no program can ask for and WireGuard's sockets have
    /// (drivers/net/wireguard/socket.c); where [`get`] or [`get_all`] has asked.
    pub unlimited: bool,
    /// `struct inet_diag_sockid` as it came, cookie included.
    id: [u8; ID_LEN],
}

/// Protocol and family: what one dump of sockets is about.
pub const KINDS: [(u8, u8); 4] = [
    (IPPROTO_TCP, AF_INET),
    (IPPROTO_TCP, AF_INET6),
    (IPPROTO_UDP, AF_INET),
    (IPPROTO_UDP, AF_INET6),
];

/// A socket that takes what arrives at a port, of whatever address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortOwner {
    pub uid: u32,
    /// Id of the cgroup that it was made in (or that its process has moved to since).
    pub cgroup: u64,
}

/// What the kernel tells of a socket and its flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Witness {
    /// Its remote end is an address of this host, or a broadcast one.
    pub local: bool,
    /// The other end of its connection is a socket of this host: a proxy's.
    pub proxied: bool,
    /// `None` also where there is no ctnetlink (many routers): the other witnesses decide then.
    pub flow: Option<Flow>,
}

/// TCP states of connections that packets can still leave by; what is left of a closed one
/// (TIME_WAIT) has no cgroup.
pub const TCP_STATES: u32 = 1 << TCP_ESTABLISHED
    | 1 << TCP_SYN_SENT
    | 1 << TCP_FIN_WAIT1
    | 1 << TCP_FIN_WAIT2
    | 1 << TCP_CLOSE_WAIT
    | 1 << TCP_LAST_ACK
    | 1 << TCP_CLOSING;
/// The same of UDP.
pub const UDP_STATES: u32 = 1 << TCP_ESTABLISHED | 1 << TCP_CLOSE;

/// As many cgroups as the kernel is asked for the sockets of: beyond, it takes longer to compare than
/// we do to look.
pub const FEW_CGROUPS: usize = 200;

/// Length of `struct inet_diag_msg`, and where its `id`, its `idiag_uid` and its `idiag_inode` are.
const MSG_LEN: usize = 72;
const ID_AT: usize = 4;
const UID_AT: usize = 64;
const INODE_AT: usize = 68;

/// Where `SK_MEMINFO_SNDBUF` is (include/uapi/linux/sock_diag.h).
const SNDBUF_AT: usize = 12;

/// `struct inet_diag_sockid`: ports and addresses in network order, interface, cookie.
const ID_LEN: usize = 48;
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// Most cgroup ids that one request may ask for: the kernel's programs end at 64 KiB.
const MOST_IDS: usize = 4095;

/// Asks for the sockets of a family and protocol in any of `states` (a mask of `1 << TCP_…`); with
/// `ids`, of which there may be [`MOST_IDS`], for those of these cgroups alone.
pub fn get(batch: &mut Batch, family: u8, protocol: u8, states: u32, ids: &[u64]) {
    let mut request = request(family, protocol, states, &[0; ID_LEN]);
    // idiag_ext: a bit for each attribute, from the first on
    request[2] = 1 << (INET_DIAG_TOS - 1) | 1 << (INET_DIAG_TCLASS - 1) | memory(protocol);
    dump(batch, &request, &filter(ids));
}

/// Asks for all sockets of a family and protocol in any of `states`, of UDP with their memory.
pub fn get_all(batch: &mut Batch, family: u8, protocol: u8, states: u32) {
    let mut request = request(family, protocol, states, &[0; ID_LEN]);
    request[2] = memory(protocol);
    dump(batch, &request, &[]);
}

/// The bit of idiag_ext that asks for the memory of UDP sockets.
fn memory(protocol: u8) -> u8 {
    u8::from(protocol == IPPROTO_UDP) << (INET_DIAG_SKMEMINFO - 1)
}

/// Asks for the TCP listeners or the unconnected UDP sockets of a family on `port`.
pub fn get_listeners(batch: &mut Batch, family: u8, protocol: u8, port: u16) {
    let mut id = [0; ID_LEN];
    id[..2].copy_from_slice(&port.to_be_bytes());
    dump(batch, &request(family, protocol, 1 << TCP_LISTEN | 1 << TCP_CLOSE, &id), &[]);
}

/// Asks for the sockets of a family and protocol that are bound to an interface and do not listen.
pub fn get_bound(batch: &mut Batch, family: u8, protocol: u8) {
    let states = !(1 << TCP_LISTEN | 1 << TCP_TIME_WAIT);
    // interface 0: to the jump behind, which leaves with "rejected"; else to the end, "accepted"
    let mut program = vec![INET_DIAG_BC_DEV_COND, 8];
    program.extend(12u16.to_ne_bytes());
    program.extend(0u32.to_ne_bytes());
    program.extend([INET_DIAG_BC_JMP, 4]);
    program.extend(8u16.to_ne_bytes());
    dump(batch, &request(family, protocol, states, &[0; ID_LEN]), &program);
}

/// Asks for the socket of this host, if there is one, that is connected so. The answer may also be a
/// listener that would take such a connection.
pub fn get_connected(batch: &mut Batch, protocol: u8, local: SocketAddr, remote: SocketAddr) {
    // of the addresses' own family: the peer of a dual-stack socket is an IPv4 one
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut id = [0; ID_LEN];
    for (at, end) in [(0, local), (1, remote)] {
        id[2 * at..][..2].copy_from_slice(&end.port().to_be_bytes());
        match end.ip() {
            IpAddr::V4(ip) => id[4 + 16 * at..][..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => id[4 + 16 * at..][..16].copy_from_slice(&ip.octets()),
        }
    }
    id[40..].copy_from_slice(&NO_COOKIE);
    let request = request(family, protocol, u32::MAX, &id);
    ask(batch, SOCK_DIAG_BY_FAMILY, NLM_F_ACK, &request, &[]);
}

/// Ends a socket: its process gets ECONNABORTED, a TCP peer a reset. A port that the kernel chose
/// for a UDP socket is given up. By the cookie, so that it is that socket or none.
pub fn destroy(batch: &mut Batch, socket: &SeenSocket) {
    let request = request(socket.family, socket.protocol, 1 << socket.state, &socket.id);
    ask(batch, SOCK_DESTROY, NLM_F_ACK, &request, &[]);
}

/// Asks for all sockets that a program accepts; an empty one does all.
fn dump(batch: &mut Batch, request: &[u8], program: &[u8]) {
    ask(batch, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, request, program);
}

fn ask(batch: &mut Batch, kind: u16, flags: u16, request: &[u8], program: &[u8]) {
    let open = batch.begin(kind, NLM_F_REQUEST | flags);
    batch.header(request);
    if !program.is_empty() {
        batch.raw(INET_DIAG_REQ_BYTECODE, program);
    }
    batch.end(open);
}

/// `struct inet_diag_req_v2`; states are in host order.
fn request(family: u8, protocol: u8, states: u32, id: &[u8; ID_LEN]) -> Vec<u8> {
    let mut bytes = vec![family, protocol, 0, 0];
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// A program of `struct inet_diag_bc_op` that accepts the sockets of these cgroups; an empty one for
/// none. An operation's `yes` and `no` are how far to jump; behind the end of the program is "accepted",
/// 4 behind that "rejected".
fn filter(ids: &[u64]) -> Vec<u8> {
    const CONDITION: usize = 12;
    const STEP: usize = CONDITION + 4;
    let ids = &ids[..ids.len().min(MOST_IDS)];
    let len = (ids.len() * STEP).saturating_sub(4);
    let mut program = Vec::with_capacity(len);
    for (at, id) in ids.iter().enumerate() {
        program.extend([INET_DIAG_BC_CGROUP_COND, CONDITION as u8]);
        program.extend((STEP as u16).to_ne_bytes());
        program.extend(id.to_ne_bytes());
        // the last one's `yes` ends the program itself
        if at + 1 < ids.len() {
            program.extend([INET_DIAG_BC_JMP, 4]);
            program.extend(((len - program.len() + 2) as u16).to_ne_bytes());
        }
    }
    program
}

/// Reads one answer about `protocol`, which the kernel does not repeat; `None` where it is
/// something else.
pub fn parse(message: &Message, protocol: u8) -> Option<SeenSocket> {
    if message.kind != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    let body = message.body;
    let id: [u8; ID_LEN] = body.get(ID_AT..ID_AT + ID_LEN)?.try_into().ok()?;
    let family = *body.first()?;
    let length = match family {
        AF_INET => 4,
        AF_INET6 => 16,
        _ => return None,
    };
    let end = |address: usize, port: usize| {
        let port = u16::from_be_bytes([id[port], id[port + 1]]);
        Some(SocketAddr::new(parse::ip(&id[address..][..length])?.to_canonical(), port))
    };
    let remote = end(20, 2)?;
    let attrs = Attrs::after(body, MSG_LEN);
    let cgroup = attrs.get(INET_DIAG_CGROUP_ID).and_then(|id| id.get(..8)?.try_into().ok());
    // of a dual-stack socket's IPv4 packets too, the first counts
    let dscp = if remote.is_ipv4() { INET_DIAG_TOS } else { INET_DIAG_TCLASS };
    let limit = || parse::u32_ne(attrs.get(INET_DIAG_SKMEMINFO)?.get(SNDBUF_AT..)?);
    Some(SeenSocket {
        family,
        protocol,
        state: *body.get(1)?,
        waits: *body.get(2)? != 0,
        local: end(4, 0)?,
        remote,
        device: parse::u32_ne(&id[36..])?,
        uid: parse::u32_ne(body.get(UID_AT..)?)?,
        inode: parse::u32_ne(body.get(INODE_AT..)?)?,
        cgroup: cgroup.map(u64::from_ne_bytes),
        mark: attrs.u32_ne(INET_DIAG_MARK).unwrap_or(0),
        transparent: attrs.byte(INET_DIAG_SOCKOPT).map(|flags| flags & INET_DIAG_TRANSPARENT != 0),
        v6only: attrs.byte(INET_DIAG_SKV6ONLY) == Some(1),
        dscp: attrs.byte(dscp).map_or(0, |octet| octet >> 2),
        unlimited: limit() == Some(i32::MAX as u32),
        id,
    })
}

/// Reads one answer to [`get_listeners`]; `None` also from a kernel that does not tell of cgroups.
pub fn parse_listener(message: &Message) -> Option<PortOwner> {
    let socket = parse(message, 0)?;
    Some(PortOwner { uid: socket.uid, cgroup: socket.cgroup? })
}

impl SeenSocket {
    /// One that is not connected, of which nothing else is known.
    pub fn plain(
        (protocol, family): (u8, u8),
        state: u8,
        local: SocketAddr,
        uid: u32,
    ) -> SeenSocket {
        SeenSocket {
            family,
            protocol,
            state,
            waits: false,
            local,
            remote: SocketAddr::from(([0; 4], 0)),
            device: 0,
            uid,
            inode: 0,
            cgroup: None,
            mark: 0,
            transparent: None,
            v6only: false,
            dscp: 0,
            unlimited: false,
            id: [0; ID_LEN],
        }
    }

    /// Whether it has one remote end.
    pub fn is_connected(&self) -> bool {
        self.remote.port() != 0
    }

    /// Whether it may speak IPv4: of this family, or dual-stack and not bound to an IPv6 address.
    pub fn speaks_ipv4(&self) -> bool {
        let any = self.local.ip().is_unspecified();
        self.local.is_ipv4() || (!self.is_connected() && !self.v6only && any)
    }
}

/// A socket as [`parse`] would give it.
#[cfg(test)]
pub fn example(protocol: u8, state: u8, local: &str, remote: &str) -> SeenSocket {
    let any = SocketAddr::from(([0; 4], 0));
    let local: SocketAddr = local.parse().unwrap_or(any);
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    SeenSocket {
        remote: remote.parse().unwrap_or(any),
        inode: 1,
        cgroup: Some(1),
        transparent: Some(false),
        ..SeenSocket::plain((protocol, family), state, local, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    #[test]
    fn a_request_and_its_filter() {
        let mut batch = Batch::new(0);
        get(&mut batch, AF_INET, IPPROTO_TCP, 1 << TCP_LISTEN, &[7, 8, 9]);
        let message = Messages::new(batch.bytes()).next().unwrap();
        assert_eq!((message.kind, message.flags), (20, NLM_F_REQUEST | NLM_F_DUMP));
        assert_eq!(message.body[..8], [[2, 6, 1 << 4 | 1 << 5, 0], 1024u32.to_ne_bytes()].concat());
        let program = Attrs::after(message.body, 56).get(INET_DIAG_REQ_BYTECODE).unwrap();
        let condition =
            |id: u64| [&[13, 12][..], &16u16.to_ne_bytes(), &id.to_ne_bytes()[..]].concat();
        let jump = |to: u16| [&[1, 4][..], &to.to_ne_bytes()].concat();
        // 12 4 12 4 12: each jump goes to the end, and the last condition's `no` 4 behind it
        let want = [condition(7), jump(32), condition(8), jump(16), condition(9)].concat();
        assert_eq!(program, want);
        assert!(filter(&[1; 5000]).len() < 1 << 16);
    }

    fn answer(family: u8, attrs: &[(u16, &[u8])]) -> Batch {
        let mut batch = Batch::new(0);
        let open = batch.begin(SOCK_DIAG_BY_FAMILY, 0);
        let mut body = vec![0; MSG_LEN];
        (body[0], body[1]) = (family, 1);
        body[4..8].copy_from_slice(&[0x1e, 0xd5, 0, 80]);
        match family {
            AF_INET => {
                body[8..12].copy_from_slice(&[192, 0, 2, 1]);
                body[24..28].copy_from_slice(&[203, 0, 113, 7]);
            }
            _ => {
                body[18..24].copy_from_slice(&[0xff, 0xff, 192, 0, 2, 1]);
                body[34..40].copy_from_slice(&[0xff, 0xff, 203, 0, 113, 7]);
            }
        }
        body[40..44].copy_from_slice(&3u32.to_ne_bytes());
        body[44..52].copy_from_slice(&[9; 8]);
        body[UID_AT..UID_AT + 4].copy_from_slice(&1000u32.to_ne_bytes());
        body[INODE_AT..INODE_AT + 4].copy_from_slice(&1u32.to_ne_bytes());
        batch.header(&body);
        attrs.iter().for_each(|(kind, data)| batch.raw(*kind, data));
        batch.end(open);
        batch
    }

    #[test]
    fn a_send_buffer_without_limit() {
        for (limit, want) in [(i32::MAX as u32, true), (i32::MAX as u32 - 1, false), (0, false)] {
            let memory = [0, 212992, 0, limit, 0].map(u32::to_ne_bytes).concat();
            let batch = answer(AF_INET, &[(INET_DIAG_SKMEMINFO, &memory)]);
            let message = Messages::new(batch.bytes()).next().unwrap();
            assert_eq!(parse(&message, IPPROTO_UDP).unwrap().unlimited, want);
        }
        let extensions = |protocol| {
            let mut batch = Batch::new(0);
            get_all(&mut batch, AF_INET, protocol, u32::MAX);
            let message = Messages::new(batch.bytes()).next().unwrap();
            message.body[2]
        };
        // as ss -m asks for it
        assert_eq!([IPPROTO_UDP, IPPROTO_TCP].map(extensions), [0x40, 0]);
    }

    #[test]
    fn an_answer_and_what_ends_it() {
        for family in [AF_INET, AF_INET6] {
            let attrs: [(u16, &[u8]); 3] = [
                (INET_DIAG_CGROUP_ID, &77u64.to_ne_bytes()),
                (INET_DIAG_MARK, &5u32.to_ne_bytes()),
                (INET_DIAG_SOCKOPT, &[0x20, 0]),
            ];
            let batch = answer(family, &attrs);
            let socket = parse(&Messages::new(batch.bytes()).next().unwrap(), IPPROTO_TCP).unwrap();
            assert_eq!(socket.local, "192.0.2.1:7893".parse().unwrap());
            assert_eq!(socket.remote, "203.0.113.7:80".parse().unwrap());
            assert_eq!((socket.family, socket.state, socket.device), (family, 1, 3));
            assert_eq!((socket.uid, socket.cgroup, socket.mark), (1000, Some(77), 5));
            assert_eq!(socket.transparent, Some(true));
            let mut end = Batch::new(0);
            destroy(&mut end, &socket);
            let message = Messages::new(end.bytes()).next().unwrap();
            assert_eq!((message.kind, message.body[..2].to_vec()), (21, vec![family, 6]));
            assert_eq!(message.body[8..56], batch.bytes()[16 + ID_AT..][..ID_LEN]);
            let mut peer = Batch::new(0);
            get_connected(&mut peer, IPPROTO_TCP, socket.remote, socket.local);
            let message = Messages::new(peer.bytes()).next().unwrap();
            assert_eq!(message.body[0], AF_INET);
            assert_eq!(message.body[8..16], [0, 80, 0x1e, 0xd5, 203, 0, 113, 7]);
            assert_eq!(message.body[28..32], [192, 0, 2, 1]);
            assert_eq!(message.body[48..56], NO_COOKIE);
        }
        // without attributes, and cut anywhere
        let batch = answer(AF_INET, &[]);
        let message = Messages::new(batch.bytes()).next().unwrap();
        let socket = parse(&message, IPPROTO_UDP).unwrap();
        assert_eq!((socket.cgroup, socket.transparent), (None, None));
        for cut in 0..message.body.len() {
            assert_eq!(
                parse(&Message { body: &message.body[..cut], ..message }, 6).is_some(),
                cut >= 72
            );
        }
    }
}
