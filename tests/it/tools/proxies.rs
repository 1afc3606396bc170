//! What `check`, `status` and the log say of proxies: who listens, loops, and sockets past them.

use std::io::{BufRead, BufReader};
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

#[test]
fn check_tells_who_listens() {
    let (ground, _world) = scene!("check-listen");
    let cgroup = ground.cgroup("/services/aria2");
    let ask = |proto, ip| {
        let _daemon = Daemon::start(&ground, CONFIG, &[]);
        let patience = if proto == Proto::Udp { SILENCE } else { PATIENCE };
        Client::new(&cgroup, proto, addr(ip, 80)).timeout(patience).run().who()
    };
    let listens = || {
        let daemon = Daemon::start(&ground, CONFIG, &[]);
        let each = "''.join(str(int(v)) for v in d['targets'][2]['listens'].values())";
        (daemon.target("mihomo")[3].clone(), daemon.json(each))
    };
    for protocol in ["TCP", "UDP"] {
        let text = format!("[tproxy mihomo]: nothing listens on {protocol} port 7893");
        both_find(&ground, CONFIG, &text);
    }
    assert_eq!(listens(), ("no".into(), "000000".into()));
    // who is there without IP_TRANSPARENT is not found by TPROXY
    {
        let port = addr(ip("0.0.0.0"), 7893);
        let _tcp = std::net::TcpListener::bind(port).expect("listen");
        let _udp = std::net::UdpSocket::bind(port).expect("bind");
        for protocol in ["TCP", "UDP"] {
            let opaque = format!(
                "[tproxy mihomo]: {protocol} port 7893: what listens there for IPv4 has not set \
                 IP_TRANSPARENT"
            );
            both_find(&ground, CONFIG, &opaque);
        }
        assert_eq!(listens(), ("no".into(), "000000".into()));
        assert_eq!(ask(Proto::Tcp, REMOTE4), "refused");
        assert_eq!(ask(Proto::Udp, REMOTE4), "nobody");
    }
    // of one family
    for (at, other, key, [v4, v6]) in [
        ("0.0.0.0:7893", "IPv6", "ipv6", ["proxy", "refused"]),
        ("[::]:7893", "IPv4", "ipv4", ["refused", "proxy"]),
    ] {
        let _half = Server::at("proxy", &[at.parse().expect("an address")]);
        for protocol in ["TCP", "UDP"] {
            let text = format!("{protocol} port 7893 is not listened on for {other}");
            both_find(&ground, CONFIG, &text);
        }
        let without = CONFIG.replace("port = 7893", &format!("port = 7893\n{key} = no"));
        check(&ground, &without, CLEAN).lacks("warning: ");
        // a family of which no destination is named is left alone
        let only = if key == "ipv6" { "198.18.0.0/15" } else { "2001:db8::/32" };
        let only = CONFIG.replace("port = 7893", &format!("port = 7893\nonly = {only}"));
        check(&ground, &only, CLEAN).lacks("warning: ");
        let (cell, each) = listens();
        let want = if v4 == "proxy" { ("tcp4 udp4", "111010") } else { ("tcp6 udp6", "110101") };
        assert_eq!((&*cell, &*each), want);
        assert!(ask(Proto::Tcp, REMOTE4).starts_with(v4), "{at}");
        assert!(ask(Proto::Tcp, REMOTE6).starts_with(v6), "{at}");
    }
    // elsewhere is not where TPROXY looks
    let lo = ["127.0.0.1", "::1"].map(|at| addr(ip(at), 7893));
    {
        let _lo = Server::at("proxy", &lo);
        check(&ground, CONFIG, CLEAN).lacks("warning: ");
        let apart = CONFIG.replace("port = 7893", "port = 7893\nipv6 = no\naddress = 192.0.2.1");
        both_find(&ground, &apart, "nothing listens on TCP port 7893");
    }
    let _in0 = Server::at("proxy", &[addr(HOST4, 7893)]);
    let only4 = CONFIG.replace("port = 7893", "port = 7893\nipv6 = no");
    both_find(&ground, &only4, "but not where TPROXY looks for what this host sends");
    assert_eq!(ask(Proto::Tcp, REMOTE4), "refused");
    check(&ground, &only4.replace("ipv6 = no", "ipv6 = no\naddress = 192.0.2.1"), CLEAN)
        .lacks("warning: ");
}

#[test]
fn check_tells_who_listens_for_gateways() {
    let (ground, _world) = scene!("check-gateway");
    let lan = Lan::new(&ground);
    let lo = ["127.0.0.1", "::1"].map(|at| addr(ip(at), 7893));
    let _lo = Server::at(PROXY, &lo);
    let config = "[tproxy mihomo]\nport = 7893\n[gateway lan]\ninterface = br-lan\n\
                  target = mihomo\n";
    for (protocol, family) in [("TCP", "IPv4"), ("UDP", "IPv6")] {
        let text = format!(
            "{protocol} port 7893 is listened on for {family}, but not where TPROXY looks for what \
             gateways hand to it"
        );
        both_find(&ground, config, &text);
    }
    let ask = |config: &str| {
        let _daemon = Daemon::start(&ground, config, &[]);
        lan.ask(0, Proto::Tcp, addr(REMOTE4, 80))
    };
    assert_eq!(ask(config), "refused");
    // as it says
    let named = config.replace("= 7893\n", "= 7893\naddress = 127.0.0.1\naddress = ::1\n");
    check(&ground, &named, CLEAN).lacks("warning: ");
    assert!(ask(&named).starts_with(PROXY));
    // an interface that is not there, unless it is a prefix
    let gone = config.replace("br-lan", "br-gone");
    both_find(&ground, &gone, "[gateway lan]: there is no interface br-gone now");
    let prefix = named.replace("br-lan", "br-none*");
    check(&ground, &prefix, CLEAN).lacks("warning: ");
}

#[test]
fn check_tells_whether_dns_is_answered() {
    let (ground, _world, _proxy) = scene!("check-dns", proxy);
    let with = |lines: &str| CONFIG.replace("port = 7893", &format!("port = 7893\n{lines}"));
    let both = "dns-hijack = 127.0.0.1:1053\ndns-hijack = [::1]:1053";
    for at in ["127.0.0.1:1053", "[::1]:1053"] {
        let text = format!("[tproxy mihomo]: nothing listens at {at} (UDP), where its DNS goes");
        both_find(&ground, &with(both), &text);
    }
    let local = with("dns-hijack = 192.0.2.1:1053\ndns-hijack-tcp = yes");
    both_find(&ground, &local, "nothing listens at 192.0.2.1:1053 (UDP and TCP)");
    // nothing gets to a tproxy then, whoever listens
    ip_batch(&[], "link set lo down\n");
    both_find(&ground, CONFIG, "lo is down: what goes to a tproxy is dropped until it is up");
    ip_batch(&[], "link set lo up\n");
    // who answers on another host is not known
    check(&ground, &with("dns-hijack = 203.0.113.7"), CLEAN).lacks("warning: ");
    let udp = std::net::UdpSocket::bind("[::]:1053").expect("bind");
    check(&ground, &with(both), CLEAN).finds("ok", "127.0.0.1:1053 is listened on, for its DNS");
    check(&ground, &with(both), CLEAN).lacks("warning: ");
    both_find(&ground, &local, "nothing listens at 192.0.2.1:1053 (TCP)");
    drop(udp);
    // gateways' clients ask this host's address on their interface
    let lan = Lan::new(&ground);
    let config = "[tproxy mihomo]\nport = 7893\ndns-hijack = 127.0.0.1:1053\n\
                  [gateway lan]\ninterface = br-lan\ntarget = mihomo\n";
    let lo = Server::at("resolver", &[addr(ip("127.0.0.1"), 1053)]);
    both_find(&ground, config, "what listens at 127.0.0.1:1053 (UDP) is not there for gateways");
    let ask = || {
        let _daemon = Daemon::start(&ground, config, &[]);
        lan.ask(0, Proto::Udp, addr(REMOTE4, 53))
    };
    assert!(!ask().starts_with("resolver"));
    drop(lo);
    let _any = Server::start("resolver", &[1053]);
    check(&ground, config, CLEAN).lacks("warning: ");
    assert!(ask().starts_with("resolver"), "{}", ask());
    // what does not ask by port 53
    let names = |text: &str| {
        let setup = format!(
            "mount -t tmpfs none /proc/sys/net; mkdir -p etc; \
             printf '%s' '{text}' > etc/nsswitch.conf; mount --bind etc /etc"
        );
        check(&ground, config, &setup)
    };
    names("hosts: files resolve dns")
        .finds("warning", "/etc/nsswitch.conf has \"resolve\" in hosts");
    names("hosts: files dns").lacks("warning: ");
}

#[test]
fn check_tells_of_loops() {
    let ground = ground!("check-loop");
    let config = "[global]\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n";
    let any = addr(ip("::"), 7893);
    let global = format!("cgroup-root = {}\n", ground.root.display());
    let config = config.replace("[global]\n", &format!("[global]\n{global}"));
    for (cgroup, remedy) in [
        ("/proxy", "is in cgroup /proxy; begin [rules] with a direct rule for that"),
        ("/", "is in cgroup /, which no rule covers: give it a cgroup of its own"),
    ] {
        let _proxy = Client::tcp(&ground.cgroup(cgroup), any).relay();
        both_find(&ground, &config, remedy);
    }
    let by_user = config.replace("default", "bypass-user = 0\ndefault");
    let _proxy = Client::tcp(&ground.root, any).relay();
    assert!(!check(&ground, &by_user, CLEAN).out.contains("loop:"));
}

/// A socket that is bound to an interface never comes to the proxy: it is dropped, and named.
#[test]
fn check_tells_of_sockets_bound_to_an_interface() {
    let (ground, mut world, _proxy) = scene!("check-bound", proxy);
    let cgroup = ground.cgroup("/services/aria2");
    let program = "import socket, sys\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                   s.setsockopt(socket.SOL_SOCKET, 25, b'in0')\n\
                   \
try: s.sendto(b'who', ('203.0.113.7', 80))\nexcept OSError: pass\n\
                   print(flush=True)\nsys.stdin.read()";
    let start = |cgroup: &Path| {
        let script = format!("echo $$ > {}/cgroup.procs; exec python3 -c \"$0\"", cgroup.display());
        let mut command = Command::new("sh");
        command.args(["-c", &script, program]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("start sh");
        let mut line = String::new();
        let out = child.stdout.take().expect("stdout is piped");
        BufReader::new(out).read_line(&mut line).expect("a line");
        child
    };
    let text = "sockets of cgroup /services/aria2 are bound to in0, past [tproxy mihomo]: what \
                they send is dropped";
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    world.wire.packets();
    let mut child = start(&cgroup);
    assert_eq!(world.wire.to_remote(), [], "it is true");
    assert!(!daemon.logs().contains(text), "{}", daemon.logs());
    daemon.signal(Signal::SIGUSR1);
    assert!(daemon.wait_log(text, SETTLE), "{}", daemon.logs());
    let log = daemon.reload();
    assert_eq!(log.matches("are bound to").count(), 1, "{log}");
    check(&ground, CONFIG, CLEAN).finds("warning", text);
    assert!(daemon.shown().contains(text), "{}", daemon.shown());
    assert!(daemon.json("d['warnings']").contains(text));
    let end = |child: &mut Child| {
        let _ = child.kill();
        let _ = child.wait();
    };
    end(&mut child);
    // elsewhere it may be what it likes
    let mut child = start(&ground.cgroup("/services/mihomo"));
    assert!(!check(&ground, CONFIG, CLEAN).out.contains("are bound to"));
    end(&mut child);
}
