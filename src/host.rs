//! What this host is, as rtnetlink(7) and sock_diag(7) tell: interfaces, addresses, who listens, and
//! whose sockets are bound to an interface. It looks, and judges nothing.

use std::fs::Metadata;
use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;

use nix::sys::socket::SockProtocol;

use crate::error::{Error, Result};
use crate::listen::{self, Listener};
use crate::net::{self, L4};
use crate::netlink::diag;
use crate::netlink::msg::Batch;
use crate::netlink::parse::{self, Attrs, Message};
use crate::netlink::socket::Socket;
use crate::netlink::uapi::*;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub is_up: bool,
    pub is_bridge: bool,
}

/// One look at this host.
#[derive(Debug, Default)]
pub struct Host {
    pub listeners: Vec<Listener>,
    /// `None` where the kernel does not tell.
    pub interfaces: Option<Vec<Link>>,
    pub addresses: Vec<IpAddr>,
    /// Sockets that are bound to an interface.
    pub bound: Vec<diag::Socket>,
}

impl Host {
    pub fn look() -> Host {
        let mut route = Socket::open(SockProtocol::NetlinkRoute, &[]).ok();
        let mut diag = Socket::open(SockProtocol::NetlinkSockDiag, &[]).ok();
        let addresses = dump(route.as_mut(), RTM_GETADDR, IFADDRMSG, parse_address);
        let listeners = listen::listeners(diag.as_mut());
        let addresses = addresses.unwrap_or_default();
        Host { listeners, addresses, ..Host::glance(route.as_mut(), diag.as_mut()) }
    }

    /// The interfaces alone, and what is bound to them, by sockets that are open already.
    pub fn glance(route: Option<&mut Socket>, diag: Option<&mut Socket>) -> Host {
        let interfaces = dump(route, RTM_GETLINK, IFINFOMSG, parse_link);
        Host { interfaces, bound: bound(diag), ..Host::default() }
    }

    /// Whether an address is this host's own.
    pub fn has(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses.contains(&address)
    }

    /// Whether anything here could speak IPv6 to more than its own link.
    pub fn speaks_ipv6(&self) -> bool {
        let wide = |ip: &Ipv6Addr| !ip.is_loopback() && ip.segments()[0] & 0xffc0 != 0xfe80;
        self.addresses.iter().any(|address| matches!(address, IpAddr::V6(ip) if wide(ip)))
    }

    pub fn interface_name(&self, index: u32) -> Option<String> {
        let found = self.interfaces.iter().flatten().find(|interface| interface.index == index);
        found.map(|interface| interface.name.clone())
    }

    /// The interfaces that a section of the configuration means, as far as they are there.
    pub fn interfaces_of<'a>(
        &'a self,
        wanted: &'a net::Interface,
    ) -> impl Iterator<Item = &'a Link> {
        let is = move |found: &&Link| match wanted.prefix {
            true => found.name.starts_with(&wanted.name),
            false => found.name == wanted.name,
        };
        self.interfaces.iter().flatten().filter(is)
    }
}

/// The sockets that are bound to an interface: of TCP those that are connected, of UDP all but those
/// of DHCP clients, which are bound to what has no address yet.
fn bound(socket: Option<&mut Socket>) -> Vec<diag::Socket> {
    let Some(socket) = socket else {
        return Vec::new();
    };
    let mut all = Vec::new();
    for protocol in [IPPROTO_TCP, IPPROTO_UDP] {
        for family in [AF_INET, AF_INET6] {
            let request = |batch: &mut Batch| diag::get_bound(batch, family, protocol);
            let found = socket.dump(&request, |message| diag::parse(message, protocol));
            all.extend(found.into_iter().flatten().flatten());
        }
    }
    let dhcp = |socket: &diag::Socket| [68, 546].contains(&socket.local.port());
    all.retain(|socket| socket.device != 0 && !(socket.protocol == IPPROTO_UDP && dhcp(socket)));
    all
}

/// All sockets of TCP and UDP that are in one of `states`, of this network namespace. Needs no
/// capability.
///
/// Errors: the kernel cannot tell of IPv4's.
pub fn sockets(states: impl Fn(L4) -> u32) -> Result<Vec<diag::Socket>> {
    let mut socket = Socket::open(SockProtocol::NetlinkSockDiag, &[])?;
    let mut all = Vec::new();
    for l4 in [L4::Tcp, L4::Udp] {
        for family in [AF_INET, AF_INET6] {
            let protocol = l4.number();
            let ask = |batch: &mut Batch| diag::get_all(batch, family, protocol, states(l4));
            match socket.dump(&ask, |message| diag::parse(message, protocol))? {
                Ok(found) => all.extend(found),
                // a kernel without IPv6
                Err(_) if family == AF_INET6 => {}
                Err(errno) => {
                    let error = Error::system("unable to list sockets", errno);
                    return Err(error.hint(
                        "the kernel needs CONFIG_INET_DIAG and CONFIG_INET_UDP_DIAG (on OpenWrt: \
                         kmod-inet-diag)",
                    ));
                }
            }
        }
    }
    Ok(all)
}

/// This host's addresses; none where the kernel does not tell.
pub fn addresses() -> Vec<IpAddr> {
    let mut route = Socket::open(SockProtocol::NetlinkRoute, &[]).ok();
    dump(route.as_mut(), RTM_GETADDR, IFADDRMSG, parse_address).unwrap_or_default()
}

/// The UDP ports of the kernel's tunnels, each with the kind, as far as an interface tells of its port.
pub fn tunnels() -> Vec<(u16, String)> {
    let mut route = Socket::open(SockProtocol::NetlinkRoute, &[]).ok();
    dump(route.as_mut(), RTM_GETLINK, IFINFOMSG, parse_tunnel).unwrap_or_default()
}

/// Whether a process is known to be in this network namespace. Which one it is in, other users may not
/// read (/proc/PID/ns); what each namespace has of its own, everybody may.
pub fn is_at_home(pid: &str) -> bool {
    let of = |pid: &str| std::fs::metadata(format!("/proc/{pid}/net/dev")).ok();
    let same = |a: Metadata, b: Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    of(pid).zip(of("self")).is_some_and(|(its, ours)| same(its, ours))
}

/// Lengths of `struct ifinfomsg` and `struct ifaddrmsg`.
const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;

/// Everything that one request to rtnetlink is answered with; `header` is its length of zeros.
fn dump<T>(
    socket: Option<&mut Socket>,
    kind: u16,
    header: usize,
    each: fn(&Message) -> Option<T>,
) -> Option<Vec<T>> {
    let request = |batch: &mut Batch| {
        let open = batch.begin(kind, NLM_F_REQUEST | NLM_F_DUMP);
        batch.header(&vec![0; header]);
        batch.end(open);
    };
    socket?.dump(&request, each).ok()?.ok()
}

fn parse_link(message: &Message) -> Option<Link> {
    if message.kind != RTM_NEWLINK {
        return None;
    }
    let attrs = Attrs::after(message.body, IFINFOMSG);
    let kind = attrs.clone().get(IFLA_LINKINFO).and_then(|info| {
        Attrs::new(info).get(IFLA_INFO_KIND).map(|kind| parse::str_z(kind).into_owned())
    });
    Some(Link {
        index: parse::u32_ne(message.body.get(4..)?)?,
        name: parse::str_z(attrs.get(IFLA_IFNAME)?).into_owned(),
        // struct ifinfomsg: index at 4, flags at 8
        is_up: parse::u32_ne(message.body.get(8..)?)? & IFF_UP != 0,
        is_bridge: kind.as_deref() == Some("bridge"),
    })
}

fn parse_tunnel(message: &Message) -> Option<(u16, String)> {
    let info = Attrs::after(message.body, IFINFOMSG).get(IFLA_LINKINFO)?;
    let kind = Attrs::new(info).get(IFLA_INFO_KIND).map(parse::str_z)?;
    let attr = match &*kind {
        "vxlan" => IFLA_VXLAN_PORT,
        "geneve" => IFLA_GENEVE_PORT,
        "bareudp" => IFLA_BAREUDP_PORT,
        _ => return None,
    };
    let port = Attrs::new(Attrs::new(info).get(IFLA_INFO_DATA)?).get(attr)?.get(..2)?;
    Some((u16::from_be_bytes([port[0], port[1]]), kind.into_owned()))
}

fn parse_address(message: &Message) -> Option<IpAddr> {
    if message.kind != RTM_NEWADDR {
        return None;
    }
    let attrs = Attrs::after(message.body, IFADDRMSG);
    // of a point-to-point link, IFA_ADDRESS is the other end's
    let bytes = attrs.clone().get(IFA_LOCAL).or_else(|| attrs.clone().get(IFA_ADDRESS))?;
    match *message.body.first()? {
        AF_INET => Some(<[u8; 4]>::try_from(bytes.get(..4)?).ok()?.into()),
        AF_INET6 => Some(<[u8; 16]>::try_from(bytes.get(..16)?).ok()?.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    #[test]
    fn links_and_addresses() {
        let mut batch = Batch::new(0);
        let open = batch.begin(RTM_NEWLINK, 0);
        batch.header(&[[0, 0, 0, 0], [7, 0, 0, 0], [0; 4], [0; 4]].concat());
        batch.str_z(IFLA_IFNAME, "br-lan");
        let nest = batch.nest(IFLA_LINKINFO);
        batch.str_z(IFLA_INFO_KIND, "bridge");
        batch.end_nest(nest);
        batch.end(open);
        let open = batch.begin(RTM_NEWADDR, 0);
        batch.header(&[AF_INET, 24, 0, 0, 7, 0, 0, 0]);
        batch.raw(IFA_ADDRESS, &[192, 0, 2, 2]);
        batch.raw(IFA_LOCAL, &[192, 0, 2, 1]);
        batch.end(open);
        let open = batch.begin(RTM_NEWLINK, 0);
        batch.header(&[0; IFINFOMSG]);
        let nest = batch.nest(IFLA_LINKINFO);
        batch.str_z(IFLA_INFO_KIND, "vxlan");
        let data = batch.nest(IFLA_INFO_DATA);
        batch.raw(IFLA_VXLAN_PORT, &4789u16.to_be_bytes());
        batch.end_nest(data);
        batch.end_nest(nest);
        batch.end(open);
        let messages: Vec<Message> = Messages::new(batch.bytes()).collect();
        let tunnels = || messages.iter().map(parse_tunnel);
        assert_eq!(Vec::from_iter(tunnels()), [None, None, Some((4789, "vxlan".into()))]);
        let bridge = parse_link(&messages[0]).unwrap();
        assert_eq!((&*bridge.name, bridge.is_bridge), ("br-lan", true));
        assert_eq!(parse_link(&messages[1]), None);
        assert_eq!(parse_address(&messages[1]), "192.0.2.1".parse().ok());
        for message in messages {
            for cut in 0..message.body.len() {
                let cut = Message { body: &message.body[..cut], ..message };
                let _ = (parse_link(&cut), parse_address(&cut), parse_tunnel(&cut));
            }
        }
        let host = |addresses: &[&str]| Host {
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ..Host::default()
        };
        assert!(!host(&["192.0.2.1", "::1", "fe80::1"]).speaks_ipv6());
        assert!(host(&["fd00::1"]).speaks_ipv6());
        assert!(host(&[]).has("127.0.0.53".parse().unwrap()));
    }
}
