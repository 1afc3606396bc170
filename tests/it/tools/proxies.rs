//! What `check`, `status` and the log say of proxies: who listens, loops, and sockets past them.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;

use super::{check, CLEAN, CONFIG};
use crate::client::{Client, Proto, PATIENCE, SILENCE};
use crate::daemon::Daemon;
use crate::gateway::Lan;
use crate::ground::{addr, ip, ip_batch, Ground, HOST4, REMOTE4, REMOTE6};
use crate::kernel::SETTLE;
use crate::world::{Server, World, PROXY};

const LOOPBACK: [&str; 2] = ["127.0.0.1", "::1"];

const GATEWAY: &str = "[tproxy mihomo]\nport = 7893\n\
                       [gateway lan]\ninterface = br-lan\ntarget = mihomo\n";

/// What `check` warns of is in `status` too, as text and as JSON.
#[track_caller]
fn both_find(ground: &Ground, config: &str, text: &str) {
    check(ground, config, CLEAN).finds("warning", text);
    let daemon = Daemon::start(ground, config, &[]);
    let status = daemon.shown();
    assert!(status.lines().any(|line| line.contains(text)), "no {text:?} in {status}");
    let found = daemon.json("d['loops'] + d['warnings']");
    assert!(found.contains(text), "no {text:?} in {found}");
}

/// [`CONFIG`] with more lines for its tproxy.
fn with(lines: &str) -> String {
    CONFIG.replace("port = 7893", &format!("port = 7893\n{lines}"))
}

/// Who answers a cgroup that is to go to the proxy.
fn answered(ground: &Ground, proto: Proto, ip: IpAddr) -> String {
    let cgroup = ground.cgroup("/services/aria2");
    let _daemon = Daemon::start(ground, CONFIG, &[]);
    let patience = if proto == Proto::Udp { SILENCE } else { PATIENCE };
    Client::new(&cgroup, proto, addr(ip, 80)).timeout(patience).run().who()
}

/// What `status` says of the proxy's listeners: the cell, and a digit for each in JSON.
fn listens(ground: &Ground) -> (String, String) {
    let daemon = Daemon::start(ground, CONFIG, &[]);
    let each = "''.join(str(int(v)) for v in d['targets'][2]['listens'].values())";
    (daemon.target("mihomo")[3].clone(), daemon.json(each))
}

/// A port at which nobody listens is told, and one at which somebody does whom TPROXY will not find:
/// without IP_TRANSPARENT.
#[test]
fn check_tells_who_listens() {
    let (ground, _world) = scene!("check-listen");
    for protocol in ["TCP", "UDP"] {
        let text = format!("[tproxy mihomo]: nothing listens on {protocol} port 7893");
        both_find(&ground, CONFIG, &text);
    }
    assert_eq!(listens(&ground), ("no".into(), "000000".into()));

    let _tcp = TcpListener::bind("0.0.0.0:7893").expect("listen");
    let _udp = UdpSocket::bind("0.0.0.0:7893").expect("bind");

    for protocol in ["TCP", "UDP"] {
        let opaque = format!(
            "[tproxy mihomo]: {protocol} port 7893: what listens there for IPv4 has not set \
             IP_TRANSPARENT"
        );
        both_find(&ground, CONFIG, &opaque);
    }
    assert_eq!(listens(&ground), ("no".into(), "000000".into()));
    assert_eq!(answered(&ground, Proto::Tcp, REMOTE4), "refused");
    assert_eq!(answered(&ground, Proto::Udp, REMOTE4), "nobody");
}

/// A proxy of one family alone is told, unless nothing of the other can come to it.
#[test]
fn check_tells_who_listens_for_one_family() {
    let (ground, _world) = scene!("check-family");
    for (at, other, key, only, cell, each, [v4, v6]) in [
        (
            "0.0.0.0:7893",
            "IPv6",
            "ipv6",
            "198.18.0.0/15",
            "tcp4 udp4",
            "111010",
            ["proxy", "refused"],
        ),
        ("[::]:7893", "IPv4", "ipv4", "2001:db8::/32", "tcp6 udp6", "110101", ["refused", "proxy"]),
    ] {
        let _half = Server::at("proxy", &[at.parse().expect("an address")]);

        for protocol in ["TCP", "UDP"] {
            let text = format!("{protocol} port 7893 is not listened on for {other}");
            both_find(&ground, CONFIG, &text);
        }
        let all = if other == "IPv6" { "::/1\nbypass = 8000::/1" } else { "0.0.0.0/0" };
        let bypass = format!("bypass = {all}\n");
        for lines in [format!("{key} = no"), format!("only = {only}"), bypass.clone()] {
            check(&ground, &with(&lines), CLEAN).lacks("warning: ");
        }
        check(&ground, &format!("[global]\n{bypass}{CONFIG}"), CLEAN).lacks("warning: ");
        assert_eq!(listens(&ground), (cell.into(), each.into()));
        assert!(answered(&ground, Proto::Tcp, REMOTE4).starts_with(v4), "{at}");
        assert!(answered(&ground, Proto::Tcp, REMOTE6).starts_with(v6), "{at}");
    }
}

/// A proxy at an address where TPROXY does not look is told, unless `address` names that one.
#[test]
fn check_tells_who_listens_elsewhere() {
    let (ground, _world) = scene!("check-elsewhere");
    let named = with("ipv6 = no\naddress = 192.0.2.1");
    {
        let _lo = Server::at("proxy", &LOOPBACK.map(|at| addr(ip(at), 7893)));
        check(&ground, CONFIG, CLEAN).lacks("warning: ");
        both_find(&ground, &named, "nothing listens on TCP port 7893");
    }
    let _in0 = Server::at("proxy", &[addr(HOST4, 7893)]);
    let text = "but not where TPROXY looks for what this host sends";
    both_find(&ground, &with("ipv6 = no"), text);
    assert_eq!(answered(&ground, Proto::Tcp, REMOTE4), "refused");
    check(&ground, &named, CLEAN).lacks("warning: ");
}

/// Gateways' clients do not come to a proxy that listens on loopback, unless `address` says so.
#[test]
fn check_tells_who_listens_for_gateways() {
    let (ground, _world) = scene!("check-gateway");
    let lan = Lan::new(&ground);
    let _lo = Server::at(PROXY, &LOOPBACK.map(|at| addr(ip(at), 7893)));
    let ask = |config: &str| {
        let _daemon = Daemon::start(&ground, config, &[]);
        lan.ask(0, Proto::Tcp, addr(REMOTE4, 80))
    };

    for (protocol, family) in [("TCP", "IPv4"), ("UDP", "IPv6")] {
        let text = format!(
            "{protocol} port 7893 is listened on for {family}, but not where TPROXY looks for what \
             gateways hand to it"
        );
        both_find(&ground, GATEWAY, &text);
    }
    assert_eq!(ask(GATEWAY), "refused");

    let named = GATEWAY.replace("= 7893\n", "= 7893\naddress = 127.0.0.1\naddress = ::1\n");
    check(&ground, &named, CLEAN).lacks("warning: ");
    assert!(ask(&named).starts_with(PROXY));
}

/// An interface that is not there is named, but no prefix of names.
#[test]
fn check_tells_of_interfaces_that_are_not_there() {
    let (ground, _world, _proxy) = scene!("check-iface", proxy);
    let gone = GATEWAY.replace("br-lan", "br-gone");
    both_find(&ground, &gone, "[gateway lan]: there is no interface br-gone now");
    check(&ground, &GATEWAY.replace("br-lan", "br-none*"), CLEAN).lacks("warning: ");
}

/// An address of this host at which nobody takes hijacked DNS is told; who answers on another host is
/// not known.
#[test]
fn check_tells_whether_dns_is_answered() {
    let (ground, _world, _proxy) = scene!("check-dns", proxy);
    let both = with("dns-hijack = 127.0.0.1:1053\ndns-hijack = [::1]:1053");
    let tcp_too = with("dns-hijack = 192.0.2.1:1053\ndns-hijack-tcp = yes");
    for at in ["127.0.0.1:1053", "[::1]:1053"] {
        let text = format!("[tproxy mihomo]: nothing listens at {at} (UDP), where its DNS goes");
        both_find(&ground, &both, &text);
    }
    both_find(&ground, &tcp_too, "nothing listens at 192.0.2.1:1053 (UDP and TCP)");
    check(&ground, &with("dns-hijack = 203.0.113.7"), CLEAN).lacks("warning: ");

    let _udp = UdpSocket::bind("[::]:1053").expect("bind");

    let said = check(&ground, &both, CLEAN);
    said.finds("ok", "127.0.0.1:1053 is listened on, for its DNS");
    said.lacks("warning: ");
    both_find(&ground, &tcp_too, "nothing listens at 192.0.2.1:1053 (TCP)");
}

/// Gateways' clients ask this host's address on their interface: a resolver on loopback is not there.
#[test]
fn check_tells_whether_dns_of_gateways_is_answered() {
    let (ground, _world, _proxy) = scene!("check-gwdns", proxy);
    let lan = Lan::new(&ground);
    let config = GATEWAY.replace("= 7893\n", "= 7893\ndns-hijack = 127.0.0.1:1053\n");
    let ask = || {
        let _daemon = Daemon::start(&ground, &config, &[]);
        lan.ask(0, Proto::Udp, addr(REMOTE4, 53))
    };

    let lo = Server::at("resolver", &[addr(ip("127.0.0.1"), 1053)]);
    both_find(&ground, &config, "what listens at 127.0.0.1:1053 (UDP) is not there for gateways");
    assert_eq!(ask(), "refused");
    drop(lo);

    let _any = Server::start("resolver", &[1053]);
    check(&ground, &config, CLEAN).lacks("warning: ");
    let who = ask();
    assert!(who.starts_with("resolver"), "{who}");
}

/// Where names are not asked for by port 53, hijacking it does not do.
#[test]
fn check_tells_of_names_that_do_not_go_by_port_53() {
    let (ground, _world, _proxy) = scene!("check-names", proxy);
    let names = |text: &str| {
        let setup = format!(
            "mount -t tmpfs none /proc/sys/net; mkdir -p etc; \
             printf '%s' '{text}' > etc/nsswitch.conf; mount --bind etc /etc"
        );
        check(&ground, &with("dns-hijack = 203.0.113.7"), &setup)
    };
    let text = "/etc/nsswitch.conf has \"resolve\" in hosts";
    names("hosts: files resolve dns").finds("warning", text);
    names("hosts: files dns").lacks("warning: ");
}

/// Nothing gets to a tproxy while lo is down, whoever listens.
#[test]
fn check_tells_that_lo_is_down() {
    let (ground, _world, _proxy) = scene!("check-lo", proxy);
    ip_batch(&[], "link set lo down\n");
    both_find(&ground, CONFIG, "lo is down: what goes to a tproxy is dropped until it is up");
}

/// A proxy whose own traffic would come back to it is told, with the rule that ends that.
#[test]
fn check_tells_of_loops() {
    let ground = ground!("check-loop");
    let config = "[global]\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n";
    let root = format!("[global]\ncgroup-root = {}\n", ground.root.display());
    let config = config.replace("[global]\n", &root);
    let any = addr(ip("::"), 7893);
    for (cgroup, remedy) in [
        ("/proxy", "is in cgroup /proxy; begin [rules] with a direct rule for that"),
        ("/", "is in cgroup /, which no rule covers: give it a cgroup of its own"),
    ] {
        let _proxy = Client::tcp(&ground.cgroup(cgroup), any).relay();
        both_find(&ground, &config, remedy);
    }

    let by_user = config.replace("default", "bypass-user = 0\ndefault");
    let _proxy = Client::tcp(&ground.root, any).relay();
    check(&ground, &by_user, CLEAN).lacks("loop:");
}

/// A process of a cgroup that sends the remote host a datagram by a socket that is bound to in0, and
/// keeps that.
fn bound_socket(cgroup: &Path) -> Child {
    let program = "import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 25, b'in0')
try: s.sendto(b'who', ('203.0.113.7', 80))
except OSError: pass
print('sent', flush=True)
sys.stdin.read()";
    let script = format!("echo $$ > {}/cgroup.procs; exec python3 -c \"$0\"", cgroup.display());
    let mut command = Command::new("sh");
    command.args(["-c", &script, program]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("start sh");
    let mut line = String::new();
    let out = child.stdout.take().expect("stdout is piped");
    BufReader::new(out).read_line(&mut line).expect("a line");
    assert_eq!(line, "sent\n");
    child
}

/// A socket that is bound to an interface never comes to the proxy: it is dropped, and named.
#[test]
fn check_tells_of_sockets_bound_to_an_interface() {
    let (ground, mut world, _proxy) = scene!("check-bound", proxy);
    let text = "sockets of cgroup /services/aria2 are bound to in0, past [tproxy mihomo]: what \
                they send is dropped";
    let cgroup = ground.cgroup("/services/aria2");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    world.wire.packets();

    let mut child = bound_socket(&cgroup);

    assert_eq!(world.wire.to_remote(), [], "it is true");
    assert!(!daemon.logs().contains(text), "{}", daemon.logs());
    daemon.signal(Signal::SIGUSR1);
    assert!(daemon.wait_log(text, SETTLE), "{}", daemon.logs());
    let log = daemon.reload();
    assert_eq!(log.matches("are bound to").count(), 1, "{log}");
    check(&ground, CONFIG, CLEAN).finds("warning", text);
    assert!(daemon.shown().contains(text), "{}", daemon.shown());
    assert!(daemon.json("d['warnings']").contains(text));
    child.kill().and_then(|()| child.wait()).expect("end it");

    // elsewhere it may be what it likes
    let mut child = bound_socket(&ground.cgroup("/services/mihomo"));
    assert_eq!(world.wire.to_remote().len(), 1);
    check(&ground, CONFIG, CLEAN).lacks("are bound to");
    child.kill().and_then(|()| child.wait()).expect("end it");
}
