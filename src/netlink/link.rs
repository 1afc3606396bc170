//! Interfaces as a way out of this host: whether one is there, running, and has addresses. Pure bytes.
//! Source: rtnetlink(7), include/uapi/linux/if_link.h, include/uapi/linux/if_addr.h.

use super::msg::Batch;
use super::parse::{self, Attrs, Message};
use super::uapi::*;
use crate::net::Family;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// It is up, and what is behind it is there: a cable, a program.
    pub running: bool,
    /// Whether it has an address of IPv4 and of IPv6 to speak to the world by.
    pub addressed: [bool; 2],
    /// Of a virtual one: `wireguard`, `tun`, `veth` …
    pub kind: String,
}

impl Link {
    pub fn has_address(&self, family: Family) -> bool {
        self.addressed[family as usize]
    }
}

/// Lengths of `struct ifinfomsg` and `struct ifaddrmsg`.
const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;

/// Asks for one interface.
pub fn get(batch: &mut Batch, name: &str) {
    let open = batch.begin(RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK);
    batch.header(&[0; IFINFOMSG]);
    batch.str_z(IFLA_IFNAME, name);
    batch.end(open);
}

/// Reads one interface that was asked for or notified of, one that goes too; its addresses are not
/// in it.
pub fn parse(message: &Message) -> Option<Link> {
    if ![RTM_NEWLINK, RTM_DELLINK].contains(&message.kind) {
        return None;
    }
    // struct ifinfomsg: index at 4, flags at 8
    let word = |at: usize| message.body.get(at..).and_then(parse::u32_ne);
    let attrs = Attrs::after(message.body, IFINFOMSG);
    let info = Attrs::new(attrs.clone().get(IFLA_LINKINFO).unwrap_or(&[]));
    let up = IFF_UP | IFF_RUNNING;
    Some(Link {
        index: word(4)?,
        name: parse::str_z(attrs.get(IFLA_IFNAME)?).into_owned(),
        running: message.kind == RTM_NEWLINK && word(8)? & up == up,
        addressed: [false; 2],
        kind: info.get(IFLA_INFO_KIND).map(parse::str_z).unwrap_or_default().into_owned(),
    })
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

/// Asks for the addresses of an interface. Kernels before 4.20 send those of all.
pub fn get_addresses(batch: &mut Batch, index: u32) {
    let open = batch.begin(RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP);
    let mut header = [0; IFADDRMSG];
    header[4..].copy_from_slice(&index.to_ne_bytes());
    batch.header(&header);
    batch.end(open);
}

/// Reads an address: its interface, and its family where one may speak to the world by it: neither
/// link-local nor still being looked for by others (`IFA_F_TENTATIVE`).
pub fn parse_address(message: &Message) -> Option<(u32, Option<Family>)> {
    if ![RTM_NEWADDR, RTM_DELADDR].contains(&message.kind) {
        return None;
    }
    // struct ifaddrmsg: family, prefix length, flags, scope, index
    let [family, _, flags, scope, ..] = *message.body else {
        return None;
    };
    let index = message.body.get(4..).and_then(parse::u32_ne)?;
    let attrs = Attrs::after(message.body, IFADDRMSG);
    let flags = attrs.get(IFA_FLAGS).and_then(parse::u32_ne).unwrap_or(flags.into());
    let tentative =
        flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) != 0 && flags & IFA_F_OPTIMISTIC == 0;
    let family = match family {
        AF_INET if scope < RT_SCOPE_LINK => Some(Family::V4),
        AF_INET6 if scope < RT_SCOPE_LINK && !tentative => Some(Family::V6),
        _ => None,
    };
    Some((index, family))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    #[test]
    fn links_and_addresses() {
        let mut batch = Batch::new(0);
        for (kind, flags) in [(RTM_NEWLINK, 0x41), (RTM_NEWLINK, 0x01), (RTM_DELLINK, 0x41)] {
            let open = batch.begin(kind, 0);
            batch.header(&[[0; 4], [7, 0, 0, 0], u32::to_ne_bytes(flags), [0; 4]].concat());
            batch.str_z(IFLA_IFNAME, "wg0");
            let nest = batch.nest(IFLA_LINKINFO);
            batch.str_z(IFLA_INFO_KIND, "wireguard");
            batch.end_nest(nest);
            batch.end(open);
        }
        for (family, flags, scope) in
            [(AF_INET, 0x80, 0), (AF_INET6, 0x80, 0), (AF_INET6, 0xc0, 0), (AF_INET6, 0x80, 253)]
        {
            let open = batch.begin(RTM_NEWADDR, 0);
            batch.header(&[[family, 24, flags, scope], u32::to_ne_bytes(7)].concat());
            batch.end(open);
        }
        let messages: Vec<Message> = Messages::new(batch.bytes()).collect();
        let links: Vec<Link> = messages.iter().filter_map(parse).collect();
        assert_eq!(links.iter().map(|l| l.running).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!((&*links[0].name, &*links[0].kind), ("wg0", "wireguard"));
        let found: Vec<_> = messages.iter().filter_map(parse_address).collect();
        let families = [Some(Family::V4), Some(Family::V6), None, None];
        assert_eq!(found.iter().map(|(_, family)| *family).collect::<Vec<_>>(), families);
        for message in messages {
            for cut in 0..message.body.len() {
                let cut = Message { body: &message.body[..cut], ..message };
                let _ = (parse(&cut), parse_address(&cut));
            }
        }
    }
}
