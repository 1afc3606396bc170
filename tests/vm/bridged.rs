//! A container on a bridge, by a rule for its cgroup, and br_netfilter, which is loaded when the program
//! runs already: bridged packets then pass the IP hooks first, and lose the socket that TPROXY gives
//! them.
//!
//! ```text
//!   container  eth0  10.7.0.10  2001:db8:7::10 ==== box0 == br0  10.7.0.1  2001:db8:7::1  (inside)
//! ```

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::client::{Client, Proto};
use crate::ground::{address, load, within, Ground, MAC, REMOTE4, REMOTE6};
use crate::netlink::Link;
use crate::world::{interface_index, Server, World};
use crate::{at, configure, make, wait_until, Daemon, PATIENCE, PROXY, RULES};

const BRIDGE: [&str; 2] = ["10.7.0.1", "2001:db8:7::1"];
const CONTAINER: [&str; 2] = ["10.7.0.10", "2001:db8:7::10"];
const MODULE: &str = "/mods/br_netfilter.ko";

/// Returns whether the kernel can.
pub fn test(ground: &Ground) -> &'static str {
    if !Path::new(MODULE).exists() {
        return "no br_netfilter";
    }
    let container = ground.another();
    let mut link = Link::open();
    link.bridge("br0", [2, 0, 0, 0, 1, 0]);
    let br0 = interface_index("br0");
    link.up(br0);
    let mut world = World::new(ground);
    let _proxy = Server::start(PROXY, &[7893]);
    configure(RULES);
    let daemon = Daemon::start();
    make("/services/app/box");
    let _service = within(&container, || {
        let any = (std::net::Ipv6Addr::UNSPECIFIED, 7);
        Client::new(&at("/services/app/box"), Proto::Udp, any.into()).timeout(PATIENCE).serve()
    });
    link.veth("box0", MAC[0], "eth0", MAC[1], container.as_raw_fd());
    let box0 = interface_index("box0");
    link.master(box0, br0);
    link.up(box0);
    for i in 0..2 {
        link.address(br0, address(BRIDGE[i]), [24, 64][i]);
        link.neighbour(br0, address(CONTAINER[i]), MAC[1]);
    }
    within(&container, || {
        let mut link = Link::open();
        link.up(1);
        let eth0 = interface_index("eth0");
        link.up(eth0);
        for i in 0..2 {
            link.address(eth0, address(CONTAINER[i]), [24, 64][i]);
            link.neighbour(eth0, address(BRIDGE[i]), [2, 0, 0, 0, 1, 0]);
            link.default_route(eth0, address(BRIDGE[i]));
        }
    });
    // link state moves in a kernel worker, and the container has to be found
    let first = || ask(&container, Proto::Tcp, 0) == PROXY;
    assert!(wait_until(PATIENCE, first), "not proxied");
    expect(&mut world, &container, "without br_netfilter");
    load(MODULE);
    for knob in ["iptables", "ip6tables"] {
        let knob = format!("/proc/sys/net/bridge/bridge-nf-call-{knob}");
        assert_eq!(fs::read_to_string(&knob).expect("read a sysctl").trim(), "1");
    }
    // as whoever loads it makes an interface of its own
    link.bridge("br1", [2, 0, 0, 0, 1, 1]);
    let again = || ask(&container, Proto::Udp, 0) == PROXY;
    assert!(wait_until(PATIENCE, again), "not proxied behind br_netfilter");
    expect(&mut world, &container, "with br_netfilter");
    daemon.reload();
    expect(&mut world, &container, "after a reload");
    daemon.stop();
    "br_netfilter"
}

/// Who answers the container.
fn ask(container: &File, proto: Proto, remote: usize) -> String {
    let to = ([REMOTE4, REMOTE6][remote], 80).into();
    let who = within(container, || Client::new(&at("/"), proto, to).run()).who();
    who.strip_suffix(&format!(" {to}")).unwrap_or(&who).to_string()
}

#[track_caller]
fn expect(world: &mut World, container: &File, when: &str) {
    world.wire.packets();
    for (proto, remote) in [Proto::Tcp, Proto::Udp].into_iter().flat_map(|p| [(p, 0), (p, 1)]) {
        assert_eq!(ask(container, proto, remote), PROXY, "{proto:?} {remote} {when}");
    }
    assert_eq!(world.wire.to_remote(), [], "left {when}");
}
