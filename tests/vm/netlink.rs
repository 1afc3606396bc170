//! What `ip` and `nft` would do in a guest that has neither: set up links, and list what is left.
//! Source: rtnetlink(7), include/uapi/linux/{if_link,veth,neighbour,fib_rules}.h.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::RawFd;

use cgtproxy::netlink::msg::Batch;
use cgtproxy::netlink::parse::{str_z, Attrs, Message};
use cgtproxy::netlink::socket::Socket;
use nix::sys::socket::SockProtocol;

/// NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
const NEW: u16 = 0x605;
const NLM_F_EXCL: u16 = 0x200;
/// NLM_F_REQUEST | NLM_F_DUMP
const DUMP: u16 = 0x301;

/// Changes links, addresses and routes of the network namespace that it was opened in.
pub struct Link(Socket);

impl Link {
    pub fn open() -> Link {
        Link(Socket::open(SockProtocol::NetlinkRoute, &[]).expect("open rtnetlink"))
    }

    #[track_caller]
    fn request(
        &mut self,
        kind: u16,
        flags: u16,
        header: &[u8],
        attributes: impl FnOnce(&mut Batch),
    ) {
        let mut batch = self.0.batch();
        let open = batch.begin(kind, flags);
        batch.header(header);
        attributes(&mut batch);
        batch.end(open);
        let last = batch.last_seq();
        let answer = self.0.transact(&batch, last).expect("send to rtnetlink");
        assert_eq!(answer, Ok(()), "request {kind}");
    }

    /// `ip link add IN type veth peer name OUT netns NETNS`
    pub fn veth(&mut self, name: &str, mac: [u8; 6], peer: &str, peer_mac: [u8; 6], netns: RawFd) {
        const RTM_NEWLINK: u16 = 16;
        self.request(RTM_NEWLINK, NEW, &ifinfomsg(0, 0), |b| {
            b.raw(1, &mac); // IFLA_ADDRESS
            b.str_z(3, name); // IFLA_IFNAME
            let info = b.nest(18); // IFLA_LINKINFO
            b.str_z(1, "veth"); // IFLA_INFO_KIND
            let data = b.nest(2); // IFLA_INFO_DATA
            let other = b.nest(1); // VETH_INFO_PEER
            b.header(&ifinfomsg(0, 0));
            b.raw(1, &peer_mac);
            b.str_z(3, peer);
            b.u32_ne(28, netns as u32); // IFLA_NET_NS_FD
            b.end_nest(other);
            b.end_nest(data);
            b.end_nest(info);
        });
    }

    pub fn bridge(&mut self, name: &str, mac: [u8; 6]) {
        const RTM_NEWLINK: u16 = 16;
        self.request(RTM_NEWLINK, NEW, &ifinfomsg(0, 0), |b| {
            b.raw(1, &mac); // IFLA_ADDRESS
            b.str_z(3, name); // IFLA_IFNAME
            let info = b.nest(18); // IFLA_LINKINFO
            b.str_z(1, "bridge"); // IFLA_INFO_KIND
            b.end_nest(info);
        });
    }

    /// Makes an interface a port of a bridge.
    pub fn master(&mut self, index: u32, bridge: u32) {
        const RTM_NEWLINK: u16 = 16;
        // IFLA_MASTER
        self.request(RTM_NEWLINK, 0x5, &ifinfomsg(index, 0), |b| b.u32_ne(10, bridge));
    }

    pub fn up(&mut self, index: u32) {
        const RTM_NEWLINK: u16 = 16;
        const IFF_UP: u32 = 1;
        self.request(RTM_NEWLINK, 0x5, &ifinfomsg(index, IFF_UP), |_| {});
    }

    pub fn address(&mut self, index: u32, ip: IpAddr, prefix: u8) {
        const RTM_NEWADDR: u16 = 20;
        const IFA_F_NODAD: u8 = 2;
        let mut header = vec![family(ip), prefix, if ip.is_ipv6() { IFA_F_NODAD } else { 0 }, 0];
        header.extend(index.to_ne_bytes());
        self.request(RTM_NEWADDR, NEW, &header, |b| {
            b.raw(2, &octets(ip)); // IFA_LOCAL
            b.raw(1, &octets(ip)); // IFA_ADDRESS
        });
    }

    pub fn neighbour(&mut self, index: u32, ip: IpAddr, mac: [u8; 6]) {
        const RTM_NEWNEIGH: u16 = 28;
        const NUD_PERMANENT: u16 = 0x80;
        let mut header = vec![family(ip), 0, 0, 0];
        header.extend(index.to_ne_bytes());
        header.extend(NUD_PERMANENT.to_ne_bytes());
        header.extend([0, 0]);
        self.request(RTM_NEWNEIGH, NEW, &header, |b| {
            b.raw(1, &octets(ip)); // NDA_DST
            b.raw(2, &mac); // NDA_LLADDR
        });
    }

    pub fn default_route(&mut self, index: u32, gateway: IpAddr) {
        const MAIN_BOOT_UNIVERSE_UNICAST: [u8; 4] = [254, 3, 0, 1];
        self.route(gateway, 0, MAIN_BOOT_UNIVERSE_UNICAST, |b| {
            b.raw(5, &octets(gateway)); // RTA_GATEWAY
            b.u32_ne(4, index); // RTA_OIF
        });
    }

    /// `ip route add local NET/PREFIX dev lo`
    pub fn local_route(&mut self, net: IpAddr, prefix: u8) {
        let scope = if net.is_ipv4() { 254 } else { 0 };
        self.route(net, prefix, [255, 3, scope, 2], |b| {
            b.raw(1, &octets(net)); // RTA_DST
            b.u32_ne(4, 1); // RTA_OIF: lo
        });
    }

    fn route(
        &mut self,
        ip: IpAddr,
        prefix: u8,
        what: [u8; 4],
        attributes: impl FnOnce(&mut Batch),
    ) {
        const RTM_NEWROUTE: u16 = 24;
        let mut header = vec![family(ip), prefix, 0, 0];
        header.extend(what);
        header.extend([0; 4]);
        self.request(RTM_NEWROUTE, NEW, &header, attributes);
    }
}

/// A table as fw4's, which offloads whatever TCP and UDP is forwarded between these interfaces:
///
/// ```text
/// table inet fw4 {
///     flowtable ft { hook ingress priority 0; devices = { ... }; }
///     chain forward { type filter hook forward priority 0; policy accept; flow add @ft; }
/// }
/// ```
/// Source: include/uapi/linux/netfilter/nf_tables.h.
pub fn flowtable(interfaces: &[&str]) {
    const TABLE: u16 = 0;
    const CHAIN: u16 = 3;
    const RULE: u16 = 6;
    const FLOWTABLE: u16 = 22;
    const INET: [u8; 4] = [1, 0, 0, 0];
    // NFNL_SUBSYS_NFTABLES
    const BOUND: [u8; 4] = [0, 0, 0, 10];
    let mut nft = Socket::open(SockProtocol::NetlinkNetFilter, &[]).expect("open nfnetlink");
    let mut batch = nft.batch();
    let mut add = |kind: u16, header: [u8; 4], attributes: &dyn Fn(&mut Batch)| {
        let open = batch.begin(kind, NEW & !NLM_F_EXCL);
        batch.header(&header);
        attributes(&mut batch);
        batch.end(open);
    };
    // NFNL_MSG_BATCH_BEGIN
    add(16, BOUND, &|_| {});
    add(10 << 8 | TABLE, INET, &|b| b.str_z(1, "fw4"));
    add(10 << 8 | FLOWTABLE, INET, &|b| {
        b.str_z(1, "fw4"); // NFTA_FLOWTABLE_TABLE
        b.str_z(2, "ft"); // NFTA_FLOWTABLE_NAME
        let hook = b.nest(3); // NFTA_FLOWTABLE_HOOK
        b.u32_be(1, 0); // NFTA_FLOWTABLE_HOOK_NUM: ingress
        b.u32_be(2, 0); // NFTA_FLOWTABLE_HOOK_PRIORITY
        let devices = b.nest(3); // NFTA_FLOWTABLE_HOOK_DEVS
        interfaces.iter().for_each(|name| b.str_z(1, name)); // NFTA_DEVICE_NAME
        b.end_nest(devices);
        b.end_nest(hook);
    });
    add(10 << 8 | CHAIN, INET, &|b| {
        b.str_z(1, "fw4"); // NFTA_CHAIN_TABLE
        b.str_z(3, "forward"); // NFTA_CHAIN_NAME
        let hook = b.nest(4); // NFTA_CHAIN_HOOK
        b.u32_be(1, 2); // NFTA_HOOK_HOOKNUM: NF_INET_FORWARD
        b.u32_be(2, 0); // NFTA_HOOK_PRIORITY
        b.end_nest(hook);
        b.str_z(7, "filter"); // NFTA_CHAIN_TYPE
    });
    add(10 << 8 | RULE, INET, &|b| {
        b.str_z(1, "fw4"); // NFTA_RULE_TABLE
        b.str_z(2, "forward"); // NFTA_RULE_CHAIN
        let expressions = b.nest(4); // NFTA_RULE_EXPRESSIONS
        let element = b.nest(1); // NFTA_LIST_ELEM
        b.str_z(1, "flow_offload"); // NFTA_EXPR_NAME
        let data = b.nest(2); // NFTA_EXPR_DATA
        b.str_z(1, "ft"); // NFTA_FLOW_TABLE_NAME
        b.end_nest(data);
        b.end_nest(element);
        b.end_nest(expressions);
    });
    // NFNL_MSG_BATCH_END
    add(17, BOUND, &|_| {});
    let last = batch.last_seq() - 1;
    let answer = nft.transact(&batch, last).expect("send to nfnetlink");
    assert_eq!(answer, Ok(()), "the flowtable");
}

/// Deletes the program's table, as `nft delete table inet cgtproxy` does; false where the kernel does
/// not let anybody but its owner.
pub fn delete_table() -> bool {
    const DELTABLE: u16 = 10 << 8 | 2;
    const BOUND: [u8; 4] = [0, 0, 0, 10];
    let mut nft = Socket::open(SockProtocol::NetlinkNetFilter, &[]).expect("open nfnetlink");
    let mut batch = nft.batch();
    // NFNL_MSG_BATCH_BEGIN and _END around it
    for (kind, header) in [(16, BOUND), (DELTABLE, [1, 0, 0, 0]), (17, BOUND)] {
        // NLM_F_REQUEST, and NLM_F_ACK
        let open = batch.begin(kind, if kind == DELTABLE { 5 } else { 1 });
        batch.header(&header);
        if kind == DELTABLE {
            batch.str_z(1, "cgtproxy"); // NFTA_TABLE_NAME
        }
        batch.end(open);
    }
    let last = batch.last_seq() - 1;
    nft.transact(&batch, last).expect("send to nfnetlink").is_ok()
}

/// Everything in the kernel that carries our names or numbers: `table NAME`, `rule …`, `route …`.
pub fn residue() -> BTreeSet<String> {
    const OURS: u8 = 99;
    let mut found = BTreeSet::new();
    let mut nft = Socket::open(SockProtocol::NetlinkNetFilter, &[]).expect("open nfnetlink");
    // NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE
    found.extend(dump(&mut nft, 10 << 8 | 1, &[0; 4], |m| {
        let name = str_z(Attrs::after(m.body, 4).get(1)?).into_owned(); // NFTA_TABLE_NAME
        Some(format!("table {name}"))
    }));
    let mut rt = Socket::open(SockProtocol::NetlinkRoute, &[]).expect("open rtnetlink");
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let mut header = [0; 12];
        header[0] = family;
        // RTM_GETRULE; FRA_PROTOCOL
        found.extend(dump(&mut rt, 34, &header, |m| {
            let protocol = Attrs::after(m.body, 12).get(21)?;
            (protocol == [OURS]).then(|| format!("rule of family {family}"))
        }));
        // RTM_GETROUTE; rtm_protocol
        found.extend(dump(&mut rt, 26, &header, |m| {
            (m.body.get(5) == Some(&OURS)).then(|| format!("route of family {family}"))
        }));
    }
    found
}

fn dump(
    socket: &mut Socket,
    kind: u16,
    header: &[u8],
    each: impl Fn(&Message) -> Option<String>,
) -> Vec<String> {
    let request = |batch: &mut Batch| {
        let open = batch.begin(kind, DUMP);
        batch.header(header);
        batch.end(open);
    };
    socket.dump(&request, each).expect("read from netlink").expect("a dump")
}

fn ifinfomsg(index: u32, up: u32) -> Vec<u8> {
    [0, index, up, up].iter().flat_map(|n: &u32| n.to_ne_bytes()).collect()
}

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() {
        libc::AF_INET as u8
    } else {
        libc::AF_INET6 as u8
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
