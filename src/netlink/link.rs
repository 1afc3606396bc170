//! Interfaces and their addresses as rtnetlink has them: requests, and the one reader of each. Pure
//! bytes.
//! Source: rtnetlink(7), include/uapi/linux/if_link.h, include/uapi/linux/if_addr.h.

use std::net::IpAddr;

use super::msg::{Batch, Open};
use super::parse::{self, Attrs, Message};
use super::uapi::*;
use crate::net::Family;

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    /// It is up, and what is behind it is there: a cable, a program.
    pub running: bool,
    /// Those of its addresses that it may speak to the world by.
    pub addresses: Vec<IpAddr>,
    /// Of a virtual one: `wireguard`, `tun`, `veth` …
    pub kind: String,
    /// A pair, whose other end is another interface.
    pub is_pair: bool,
    /// The bridge that it is a port of, by index; 0 for none.
    pub master: u32,
    /// This namespace's id of the one that the other end is in, if that is another one.
    pub peer: Option<u32>,
}

impl Link {
    pub fn has_address(&self, family: Family) -> bool {
        self.addresses.iter().any(|ip| Family::of(ip) == family)
    }

    fn is_bridge(&self) -> bool {
        self.kind == "bridge"
    }
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkAddress {
    /// Of the interface.
    pub index: u32,
    pub ip: IpAddr,
    /// One may speak to the world by it: it is neither link-local nor still being looked for by
    /// others (`IFA_F_TENTATIVE`).
    pub wide: bool,
}

/// Lengths of `struct ifinfomsg` and `struct ifaddrmsg`.
pub(super) const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;
/// struct ndmsg: family at 0, interface index at 4.
const NDMSG: usize = 12;

/// Asks for one interface.
pub fn get(batch: &mut Batch, name: &str) {
    let open = batch.begin(RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK);
    batch.header(&[0; IFINFOMSG]);
    batch.str_z(IFLA_IFNAME, name);
    batch.end(open);
}

/// Asks for all interfaces.
pub fn get_all(batch: &mut Batch) {
    let open = batch.begin(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP);
    batch.header(&[0; IFINFOMSG]);
    batch.u32_ne(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    batch.end(open);
}

/// The index of the interface that a message is about, and its attributes. A bridge tells of its
/// ports by such messages too, as of its own family.
pub(super) fn told<'a>(message: &Message<'a>) -> Option<(u32, Attrs<'a>)> {
    let about = [RTM_NEWLINK, RTM_DELLINK].contains(&message.kind);
    if !about || *message.body.first()? != AF_UNSPEC {
        return None;
    }
    // struct ifinfomsg: index at 4
    let index = parse::u32_ne(message.body.get(4..)?)?;
    Some((index, Attrs::after(message.body, IFINFOMSG)))
}

/// Whether it tells of a bridge that was not here before.
pub fn is_new_bridge(message: &Message) -> bool {
    // struct ifinfomsg: what has changed at 12; all has where it is new
    let new = message.body.get(12..).and_then(parse::u32_ne) == Some(u32::MAX);
    new && message.kind == RTM_NEWLINK && parse(message).is_some_and(|link| link.is_bridge())
}

/// Kind, and what else a virtual interface tells of itself.
fn info<'a>(attrs: &Attrs<'a>) -> (String, Attrs<'a>) {
    let info = attrs.nest(IFLA_LINKINFO);
    let kind = info.text(IFLA_INFO_KIND).unwrap_or_default();
    (kind.into_owned(), info.nest(IFLA_INFO_DATA))
}

/// Reads one interface that was asked for or notified of, one that goes too; its addresses are not
/// in it.
pub fn parse(message: &Message) -> Option<Link> {
    let (index, attrs) = told(message)?;
    // struct ifinfomsg: flags at 8
    let flags = parse::u32_ne(message.body.get(8..)?)?;
    let has = |wanted| message.kind == RTM_NEWLINK && flags & wanted == wanted;
    // 802.1X, say
    let waits = matches!(attrs.byte(IFLA_OPERSTATE), Some(IF_OPER_TESTING | IF_OPER_DORMANT));
    let (kind, _) = info(&attrs);
    Some(Link {
        index,
        name: attrs.text(IFLA_IFNAME)?.into_owned(),
        up: has(IFF_UP),
        // of IFF_RUNNING, and of the other states, the kernel tells up to a second later (linkwatch)
        running: has(IFF_UP | IFF_LOWER_UP) && !waits,
        addresses: Vec::new(),
        is_pair: ["veth", "netkit"].contains(&&*kind),
        kind,
        master: attrs.u32_ne(IFLA_MASTER).unwrap_or(0),
        peer: namespace_id(&attrs, IFLA_LINK_NETNSID),
    })
}

/// The id of a network namespace; -1 stands for none.
pub(super) fn namespace_id(attrs: &Attrs, kind: u16) -> Option<u32> {
    attrs.u32_ne(kind).filter(|id| *id <= i32::MAX as u32)
}

/// Reads the UDP port of a tunnel of the kernel, and the kind, where an interface is one that tells of
/// its port.
pub fn parse_tunnel(message: &Message) -> Option<(u16, String)> {
    let (kind, data) = info(&told(message)?.1);
    let attr = match &*kind {
        "vxlan" => IFLA_VXLAN_PORT,
        "geneve" => IFLA_GENEVE_PORT,
        "bareudp" => IFLA_BAREUDP_PORT,
        _ => return None,
    };
    let port = data.get(attr)?.get(..2)?;
    Some((u16::from_be_bytes([port[0], port[1]]), kind))
}

/// Has an interface take and send packets with loopback addresses (route_localnet), or not.
pub fn set_localnet(batch: &mut Batch, name: &str, on: bool) {
    let open = batch.begin(RTM_SETLINK, NLM_F_REQUEST | NLM_F_ACK);
    batch.header(&[0; IFINFOMSG]);
    batch.str_z(IFLA_IFNAME, name);
    let families = batch.nest(IFLA_AF_SPEC);
    let inet = batch.nest(AF_INET.into());
    let conf = batch.nest(IFLA_INET_CONF);
    batch.u32_ne(IPV4_DEVCONF_ROUTE_LOCALNET, on.into());
    batch.end_nest(conf);
    batch.end_nest(inet);
    batch.end_nest(families);
    batch.end(open);
}

/// Asks for the Ethernet address of a neighbour at an interface.
pub fn get_neighbour(batch: &mut Batch, device: u32, address: IpAddr) {
    let open = begin_neighbour(batch, Family::of(&address).number(), device);
    batch.ip(NDA_DST, address);
    batch.end(open);
}

/// Asks by which port a bridge reaches an Ethernet address.
pub fn get_port(batch: &mut Batch, bridge: u32, mac: &[u8]) {
    let open = begin_neighbour(batch, AF_BRIDGE, 0);
    batch.raw(NDA_LLADDR, mac);
    batch.u32_ne(NDA_MASTER, bridge);
    batch.end(open);
}

fn begin_neighbour(batch: &mut Batch, family: u8, device: u32) -> Open {
    let open = batch.begin(RTM_GETNEIGH, NLM_F_REQUEST | NLM_F_ACK);
    let mut header = [0; NDMSG];
    header[0] = family;
    header[4..8].copy_from_slice(&device.to_ne_bytes());
    batch.header(&header);
    open
}

/// Reads an answer to one of these: the interface, and the Ethernet address.
pub fn parse_neighbour(message: &Message) -> Option<(u32, Vec<u8>)> {
    let index = parse::u32_ne(message.body.get(4..)?)?;
    let mac = Attrs::after(message.body, NDMSG).get(NDA_LLADDR)?;
    (message.kind == RTM_NEWNEIGH).then(|| (index, mac.to_vec()))
}

/// Asks for the addresses of an interface, or of all by the index 0. Kernels before 4.20 send those of
/// all.
pub fn get_addresses(batch: &mut Batch, index: u32) {
    let open = batch.begin(RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP);
    let mut header = [0; IFADDRMSG];
    header[4..].copy_from_slice(&index.to_ne_bytes());
    batch.header(&header);
    batch.end(open);
}

/// Reads an address that was asked for or notified of, one that goes too.
pub fn parse_address(message: &Message) -> Option<LinkAddress> {
    if ![RTM_NEWADDR, RTM_DELADDR].contains(&message.kind) {
        return None;
    }
    // struct ifaddrmsg: family, prefix length, flags, scope, index
    let [_, _, flags, scope, ..] = *message.body else {
        return None;
    };
    let index = message.body.get(4..).and_then(parse::u32_ne)?;
    let attrs = Attrs::after(message.body, IFADDRMSG);
    let flags = attrs.u32_ne(IFA_FLAGS).unwrap_or(flags.into());
    // of a point-to-point link, IFA_ADDRESS is the other end's
    let ip = attrs.get(IFA_LOCAL).or_else(|| attrs.get(IFA_ADDRESS)).and_then(parse::ip)?;
    let tentative =
        flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) != 0 && flags & IFA_F_OPTIMISTIC == 0;
    Some(LinkAddress { index, ip, wide: scope < RT_SCOPE_LINK && !tentative })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    /// A link of that kind, and what its kind tells of it.
    fn link(batch: &mut Batch, message: u16, flags: u32, kind: &str, port: Option<u16>) {
        let open = batch.begin(message, 0);
        batch.header(&[[0; 4], [7, 0, 0, 0], u32::to_ne_bytes(flags), [0; 4]].concat());
        batch.str_z(IFLA_IFNAME, "wg0");
        let nest = batch.nest(IFLA_LINKINFO);
        batch.str_z(IFLA_INFO_KIND, kind);
        if let Some(port) = port {
            let data = batch.nest(IFLA_INFO_DATA);
            batch.raw(IFLA_VXLAN_PORT, &port.to_be_bytes());
            batch.end_nest(data);
        }
        batch.end_nest(nest);
        batch.end(open);
    }

    #[test]
    fn links_and_addresses() {
        let mut batch = Batch::new(0);
        let running = IFF_UP | IFF_LOWER_UP;
        for (kind, flags) in [(RTM_NEWLINK, running), (RTM_NEWLINK, IFF_UP), (RTM_DELLINK, running)]
        {
            link(&mut batch, kind, flags, "wireguard", None);
        }
        link(&mut batch, RTM_NEWLINK, 0, "bridge", None);
        link(&mut batch, RTM_NEWLINK, 0, "vxlan", Some(4789));
        for (family, flags, scope) in
            [(AF_INET, 0x80, 0), (AF_INET6, 0x80, 0), (AF_INET6, 0xc0, 0), (AF_INET6, 0x80, 253)]
        {
            let open = batch.begin(RTM_NEWADDR, 0);
            batch.header(&[[family, 24, flags, scope], u32::to_ne_bytes(7)].concat());
            match family {
                AF_INET => {
                    batch.raw(IFA_ADDRESS, &[192, 0, 2, 2]);
                    batch.raw(IFA_LOCAL, &[192, 0, 2, 1]);
                }
                _ => batch.raw(IFA_ADDRESS, &[0xfd; 16]),
            }
            batch.end(open);
        }
        let messages: Vec<Message> = Messages::new(batch.bytes()).collect();
        let links: Vec<Link> = messages.iter().filter_map(parse).collect();
        let states: Vec<_> = links.iter().map(|link| (link.up, link.running)).collect();
        let no = (false, false);
        assert_eq!(states, [(true, true), (true, false), no, no, no]);
        assert_eq!((&*links[0].name, &*links[0].kind), ("wg0", "wireguard"));
        assert_eq!(links.iter().position(Link::is_bridge), Some(3));
        let tunnels: Vec<_> = messages.iter().filter_map(parse_tunnel).collect();
        assert_eq!(tunnels, [(4789, "vxlan".to_string())]);
        let found: Vec<_> = messages.iter().filter_map(parse_address).collect();
        assert_eq!(found[0].ip, "192.0.2.1".parse::<IpAddr>().unwrap());
        let wide: Vec<bool> = found.iter().map(|address| address.wide).collect();
        assert_eq!(wide, [true, true, false, false]);
        for message in messages {
            for cut in 0..message.body.len() {
                let cut = Message { body: &message.body[..cut], ..message };
                let _ = (parse(&cut), parse_address(&cut), parse_tunnel(&cut));
            }
        }
    }
}
