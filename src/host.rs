//! What this host is, as rtnetlink(7) and sock_diag(7) tell: interfaces, addresses, who listens, and
//! whose sockets are bound to an interface. It looks, and judges nothing.

use std::net::{IpAddr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::socket::SockProtocol;

use crate::error::{Error, Result};
use crate::listen;
use crate::net;
use crate::netlink::diag;
use crate::netlink::link::{self, Link};
use crate::netlink::msg::Batch;
use crate::netlink::parse::Message;
use crate::netlink::socket::Socket;
use crate::netlink::uapi::*;

/// One look at this host.
#[derive(Debug, Default)]
pub struct Host {
    pub listeners: Vec<diag::SeenSocket>,
    /// Connected UDP sockets at the ports of these.
    pub beside: Vec<diag::SeenSocket>,
    /// `None` where the kernel does not tell.
    pub interfaces: Option<Vec<Link>>,
    pub addresses: Vec<IpAddr>,
    /// Sockets that are bound to an interface.
    pub bound: Vec<diag::SeenSocket>,
    /// The first port that users may bind.
    pub users_from: u16,
    /// Whom the resolver library asks, by resolv.conf(5).
    pub nameservers: Vec<IpAddr>,
}

impl Host {
    pub fn look() -> Host {
        let mut route = Socket::open(SockProtocol::NetlinkRoute, &[]).ok();
        let mut diag = Socket::open(SockProtocol::NetlinkSockDiag, &[]).ok();
        let addresses = addresses_by(route.as_mut());
        let listeners = listen::listeners(diag.as_mut());
        let beside = listen::beside(diag.as_mut(), &listeners);
        let first = sysctl("net/ipv4/ip_unprivileged_port_start");
        let users_from = first.and_then(|port| port.try_into().ok()).unwrap_or(1024);
        let glance = Host::glance(route.as_mut(), diag.as_mut());
        let nameservers = nameservers();
        Host { listeners, beside, addresses, users_from, nameservers, ..glance }
    }

    /// The interfaces alone, and what is bound to them, by sockets that are open already.
    pub fn glance(route: Option<&mut Socket>, diag: Option<&mut Socket>) -> Host {
        let interfaces = dump(route, &link::get_all, link::parse);
        Host { interfaces, bound: bound(diag), ..Host::default() }
    }

    /// The sockets that have what arrives here at a port, of anybody or of one peer.
    pub fn sharing(&self) -> impl Iterator<Item = &diag::SeenSocket> {
        let own = |socket: &&diag::SeenSocket| self.has(socket.local.ip());
        self.listeners.iter().chain(self.beside.iter().filter(own))
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
        self.interfaces.iter().flatten().filter(|found| wanted.covers(&found.name))
    }
}

fn nameservers() -> Vec<IpAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.trim_start().strip_prefix("nameserver"));
    lines.filter_map(|rest| rest.split_ascii_whitespace().next()?.parse().ok()).collect()
}

/// Whether bridged packets pass the IP hooks here, or would by a sysctl (br_netfilter is loaded).
pub fn filters_bridges() -> bool {
    Path::new("/proc/sys/net/bridge").exists()
}

/// The sockets that are bound to an interface: of TCP those that are connected, of UDP all but those
/// of DHCP clients, which are bound to what has no address yet, and of what serves the link behind it
/// with names and addresses, as dnsmasq does: they answer.
fn bound(socket: Option<&mut Socket>) -> Vec<diag::SeenSocket> {
    let Some(socket) = socket else {
        return Vec::new();
    };
    let mut all = Vec::new();
    for (protocol, family) in diag::KINDS {
        let request = |batch: &mut Batch| diag::get_bound(batch, family, protocol);
        let found = socket.dump(&request, |message| diag::parse(message, protocol));
        all.extend(found.into_iter().flatten().flatten());
    }
    let link = |socket: &diag::SeenSocket| [53, 67, 68, 546, 547].contains(&socket.local.port());
    all.retain(|socket| socket.device != 0 && !(socket.protocol == IPPROTO_UDP && link(socket)));
    all
}

/// All sockets of TCP and UDP that are in one of `states`, of this network namespace. Needs no
/// capability.
///
/// Errors: the kernel cannot tell of IPv4's.
pub fn sockets(states: impl Fn(u8) -> u32) -> Result<Vec<diag::SeenSocket>> {
    let mut socket = Socket::open(SockProtocol::NetlinkSockDiag, &[])?;
    let mut all = Vec::new();
    for (protocol, family) in diag::KINDS {
        let ask = |batch: &mut Batch| diag::get_all(batch, family, protocol, states(protocol));
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
    Ok(all)
}

/// This host's addresses; none where the kernel does not tell.
pub fn addresses() -> Vec<IpAddr> {
    addresses_by(Socket::open(SockProtocol::NetlinkRoute, &[]).ok().as_mut())
}

fn addresses_by(route: Option<&mut Socket>) -> Vec<IpAddr> {
    let all = dump(route, &|batch| link::get_addresses(batch, 0), link::parse_address);
    all.into_iter().flatten().map(|address| address.ip).collect()
}

/// The UDP ports of the kernel's tunnels, each with the kind, as far as an interface tells of its port.
pub fn tunnels() -> Vec<(u16, String)> {
    let mut route = Socket::open(SockProtocol::NetlinkRoute, &[]).ok();
    dump(route.as_mut(), &link::get_all, link::parse_tunnel).unwrap_or_default()
}

/// Whether a process is in this network namespace, where that can be seen. Which one it is in, other
/// users may not read (/proc/PID/ns); what each namespace has of its own, everybody may.
pub fn shares_network(pid: &str) -> Option<bool> {
    let of = |pid: &str| std::fs::metadata(format!("/proc/{pid}/net/dev")).ok();
    let (its, ours) = (of(pid)?, of("self")?);
    Some((its.dev(), its.ino()) == (ours.dev(), ours.ino()))
}

/// A number of /proc/sys, by its path there; `None` where there is none.
pub fn sysctl(path: &str) -> Option<u64> {
    std::fs::read_to_string(format!("/proc/sys/{path}")).ok()?.trim().parse().ok()
}

/// Everything that one request to rtnetlink is answered with.
fn dump<T>(
    socket: Option<&mut Socket>,
    request: &dyn Fn(&mut Batch),
    each: fn(&Message) -> Option<T>,
) -> Option<Vec<T>> {
    socket?.dump(request, each).ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_speaks_ipv6() {
        let host = |addresses: &[&str]| Host {
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ..Host::default()
        };
        assert!(!host(&["192.0.2.1", "::1", "fe80::1"]).speaks_ipv6());
        assert!(host(&["fd00::1"]).speaks_ipv6());
        assert!(host(&[]).has("127.0.0.53".parse().unwrap()));
    }
}
