//! A router that offloads what it forwards, as fw4 does with `flow_offloading`: packets of an
//! offloaded flow pass no chain any more. This machine's kernel has no flowtables, Debian's has.
//!
//! ```text
//!   client  eth0  198.51.100.10  2001:db8:3::10 ==== lan0  198.51.100.1  2001:db8:3::1  (inside)
//! ```

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use crate::client::{again, SILENCE};
use crate::ground::{address, within, Ground, HOST, MAC, REMOTE4, REMOTE6};
use crate::netlink::{flowtable, Link};
use crate::world::{interface_index, Server, World};
use crate::{configure, wait_until, Daemon, PATIENCE, PROXY, RULES};

const LAN: [&str; 2] = ["198.51.100.1", "2001:db8:3::1"];
const CLIENT: [&str; 2] = ["198.51.100.10", "2001:db8:3::10"];
const CONNTRACK: &str = "/proc/net/nf_conntrack";

/// Direct flows of a client are offloaded, those of a tproxy are proxied and are not; a
/// reload reaches those that are. Returns whether the kernel can.
pub fn test(ground: &Ground) -> &'static str {
    if !Path::new("/sys/module/nft_flow_offload").exists() || !Path::new(CONNTRACK).exists() {
        return "no flowtables";
    }
    let lan = ground.another();
    let mut link = Link::open();
    link.veth("lan0", MAC[0], "eth0", MAC[1], lan.as_raw_fd());
    let lan0 = interface_index("lan0");
    link.up(lan0);
    for i in 0..2 {
        link.address(lan0, address(LAN[i]), [24, 64][i]);
        link.neighbour(lan0, address(CLIENT[i]), MAC[1]);
    }
    for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        fs::write(format!("/proc/sys/net/{knob}"), "1").expect("forward");
    }
    within(&lan, || {
        let mut link = Link::open();
        link.up(1);
        let eth0 = interface_index("eth0");
        link.up(eth0);
        for i in 0..2 {
            link.address(eth0, address(CLIENT[i]), [24, 64][i]);
            link.neighbour(eth0, address(LAN[i]), MAC[0]);
            link.default_route(eth0, address(LAN[i]));
        }
    });
    ground.outside(|| {
        let out0 = interface_index("out0");
        for host in HOST {
            Link::open().default_route(out0, address(host));
        }
    });
    flowtable(&["in0", "lan0"]);
    // link state moves in a kernel worker
    let reaches = |ip| wait_until(PATIENCE, || Flow::new(&lan, ip).ask(SILENCE).is_some());
    let _world = World::new(ground);
    let _proxy = Server::start(PROXY, &[7893]);
    assert!(reaches(REMOTE4) && reaches(REMOTE6), "no way for the client");

    let gateway = |target: &str| {
        let section = format!("[gateway lan]\ninterface = lan0\ntarget = {target}\n");
        configure(&format!("{RULES}\n{section}"));
    };
    gateway("direct");
    let daemon = Daemon::start();
    let old = [REMOTE4, REMOTE6].map(|ip| Flow::new(&lan, ip));
    for flow in &old {
        flow.expect("remote");
        assert!(wait_until(PATIENCE, || flow.offloaded()), "{}", flow.entry());
        flow.expect("remote");
    }
    gateway("drop");
    daemon.reload();
    for flow in &old {
        assert_eq!(flow.ask(4 * SILENCE), None, "{}", flow.entry());
    }
    gateway("mihomo");
    daemon.reload();
    for flow in [REMOTE4, REMOTE6].map(|ip| Flow::new(&lan, ip)) {
        flow.expect(PROXY);
        assert!(!flow.offloaded(), "{}", flow.entry());
        flow.expect(PROXY);
    }
    daemon.stop();
    "flowtables"
}

/// A UDP flow of the client to the remote host.
struct Flow {
    socket: UdpSocket,
}

impl Flow {
    fn new(lan: &fs::File, to: IpAddr) -> Flow {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = within(lan, || UdpSocket::bind(any).expect("bind"));
        socket.connect(SocketAddr::new(to, 80)).expect("connect");
        Flow { socket }
    }

    /// Who answers the next packet.
    fn ask(&self, patience: Duration) -> Option<String> {
        let mut text = [0; 256];
        self.socket.set_read_timeout(Some(patience)).expect("set a timeout");
        self.socket.send(b"who").ok()?;
        let length = again(|| self.socket.recv(&mut text)).ok()?;
        Some(String::from_utf8_lossy(&text[..length]).into_owned())
    }

    #[track_caller]
    fn expect(&self, who: &str) {
        // a flow is offloaded once it has seen packets both ways
        for _ in 0..5 {
            let got = self.ask(PATIENCE).unwrap_or("nobody".into());
            assert!(got.starts_with(who), "{got}, not {who}");
        }
    }

    /// What conntrack knows of it.
    fn entry(&self) -> String {
        let port = self.socket.local_addr().expect("an address").port();
        let key = format!("sport={port} ");
        let table = fs::read_to_string(CONNTRACK).expect("read the conntrack table");
        let line = table.lines().find(|l| l.contains(&key));
        line.unwrap_or_default().to_owned()
    }

    fn offloaded(&self) -> bool {
        self.entry().contains("[OFFLOAD]")
    }
}
