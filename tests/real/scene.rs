//! A server between applications and remote hosts, and all that is asked of it.
//!
//! A server hands what it gets to an exit that has another source address than this host, so that
//! the remote host sees who spoke to it, and any packet of an application that reaches the wire by
//! itself is a leak:
//!
//! ```text
//!   application -> cgtproxy -> server ==shadowsocks==> ss-server (outside) -> remote host
//!                                     \--from 192.0.2.9, 2001:db8:1::9 ------> remote host
//! ```

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::server::{Exit, Software, EXIT4, EXIT6, SERVERS};
use super::{
    application, needs, outside_peer, peer, report, sh, try_all, which, Process, Verdict, SOON,
};
use crate::client::{Client, Outcome, Proto};
use crate::daemon::Daemon;
use crate::gateway::Lan;
use crate::ground::{addr, ip_lines, sysctl, Ground, REMOTE4, REMOTE6, REMOTES};
use crate::kernel::{await_member, output_if_any};
use crate::wait_until;
use crate::world::{Packet, World};

const HTTP: u16 = 8080;
const ECHO: u16 = 7777;
const QUIC: u16 = 8443;

/// One server with everything around it.
struct Scene<'a> {
    ground: &'a Ground,
    world: World,
    lan: Lan<'a>,
    software: &'a Software,
    server: Option<Process>,
    proxied: PathBuf,
    daemon: Daemon,
    _peers: Vec<Process>,
}

/// [`EXIT4`] and [`EXIT6`] here, which the remote hosts answer.
fn own_addresses_for_exits(ground: &Ground) {
    ip_lines(
        "addr add 192.0.2.9/24 dev in0\naddr add 2001:db8:1::9/64 dev in0 nodad preferred_lft 0\n",
    );
    ground.outside(|| {
        let lines = "neigh add 192.0.2.9 lladdr 02:00:00:00:00:01 dev out0\n\
                     neigh add 2001:db8:1::9 lladdr 02:00:00:00:00:01 dev out0\n\
                     addr add 2001:db8:2::7/128 dev lo nodad\n";
        ip_lines(lines);
    });
}

/// The far end of the server's tunnel, if it has one, and web servers on the remote hosts.
fn outside(ground: &Ground, software: &Software) -> Result<Vec<Process>, String> {
    let mut peers = Vec::new();
    if software.exit == Exit::Shadowsocks {
        let mut command = Command::new(which("ss-server").ok_or("SKIP: no ss-server")?);
        command.args(["-s", "::", "-s", "0.0.0.0", "-p", "8388", "-k", "secret", "-u"]);
        command.args(["-m", "aes-128-gcm", "-t", "300"]);
        peers.push(ground.outside(|| Process::start(&mut command, None))?);
    }
    for ip in REMOTES {
        peers.push(outside_peer(ground, "http", addr(ip, HTTP), &[])?);
    }
    Ok(peers)
}

/// What is asked of a server: its own way out is direct, and so is whatever no rule names.
fn policy(software: &Software) -> String {
    let hijack = if software.dns { "dns-hijack = 127.0.0.1:1053\n" } else { "" };
    let tcp_only = if software.udp { "" } else { "udp = drop\n" };
    format!(
        "[tproxy p]\nport = 7893\n{hijack}{tcp_only}[rules]\ndirect = /server\np = /proxied\n\
         [gateway lan]\ninterface = br-lan\ntarget = p\n"
    )
}

impl<'a> Scene<'a> {
    fn set(ground: &'a Ground, software: &'a Software) -> Result<Scene<'a>, String> {
        needs(&[software.command])?;
        own_addresses_for_exits(ground);
        let (world, lan) = (World::new(ground), Lan::new(ground));
        // short, so that an idle flow is forgotten while its test waits
        sysctl("net/netfilter/nf_conntrack_udp_timeout", "1");
        sysctl("net/netfilter/nf_conntrack_udp_timeout_stream", "1");
        let peers = outside(ground, software)?;
        let proxied = ground.cgroup("/proxied");
        ground.cgroup("/server");
        let daemon = Daemon::start(ground, &policy(software), &[]);
        await_member(&proxied, "p");
        let mut scene =
            Scene { ground, world, lan, software, server: None, proxied, daemon, _peers: peers };
        scene.start_server()?;
        scene.leaks();
        Ok(scene)
    }

    fn start_server(&mut self) -> Verdict {
        let mut command = (self.software.launch)(
            &self.ground.dir,
            &which(self.software.command).expect("looked for"),
        );
        self.server = Some(Process::start(&mut command, Some(&self.ground.at("/server")))?);
        // nothing else announces it: it takes a while to listen
        let up = wait_until(Duration::from_secs(20), || {
            let client =
                Client::tcp(&self.proxied, addr(REMOTE4, 80)).timeout(Duration::from_secs(2));
            !matches!(client.run(), Outcome::Refused | Outcome::Failed(_))
        });
        match up {
            true => Ok(()),
            false => Err("the server does not take connections".into()),
        }
    }

    /// Packets of applications that reached the wire by themselves.
    fn leaks(&mut self) -> Vec<Packet> {
        let mut packets = self.world.wire.to_remote();
        packets.retain(|p| p.proto != Proto::Icmp && !self.is_exit(p.src.ip()));
        packets
    }

    fn is_exit(&self, source: IpAddr) -> bool {
        self.software.exit == Exit::Source && [EXIT4, EXIT6].contains(&source)
    }

    fn no_leak(&mut self) -> Verdict {
        let leaks = self.leaks();
        match leaks.is_empty() {
            true => Ok(()),
            false => Err(format!("{} packets on the wire: {:?}", leaks.len(), leaks.first())),
        }
    }

    /// The sources that the remote host is to see.
    fn proxied_source(&self, text: &str) -> bool {
        match self.software.exit {
            Exit::Source => text.contains("192.0.2.9") || text.contains("2001:db8:1::9"),
            // ss-server reaches the remote host over lo
            Exit::Shadowsocks => text.contains("203.0.113.7") || text.contains("2001:db8:2::7"),
        }
    }

    /// Whether `text` tells that the remote host was asked by the server.
    fn seen(&self, text: &str) -> Verdict {
        match self.proxied_source(text) {
            true => Ok(()),
            false => Err(format!("the remote host saw {text:?}")),
        }
    }

    fn ask(&mut self, proto: Proto, to: SocketAddr) -> Verdict {
        self.ask_in(&self.proxied, proto, to)
    }

    fn ask_in(&self, cgroup: &Path, proto: Proto, to: SocketAddr) -> Verdict {
        let mut last = Outcome::Timeout;
        // some servers lose the first datagrams while they set up a relay
        for _ in 0..3 {
            last = Client::new(cgroup, proto, to).timeout(Duration::from_secs(3)).run();
            if let Outcome::Answer(text) = &last {
                // nothing at all, where the server had no way out yet
                if let Some((_, source)) = text.split_once(" from ") {
                    return self.seen(source);
                }
            }
        }
        Err(format!("{last:?}"))
    }

    /// HTTP by curl: squid speaks nothing else.
    fn curl(&mut self, ip: IpAddr) -> Verdict {
        self.curl_in(&self.proxied, ip)
    }

    fn curl_in(&self, cgroup: &Path, ip: IpAddr) -> Verdict {
        let url = format!("http://{}/", addr(ip, HTTP));
        self.seen(&application(cgroup, &["curl", "-sS", "-m", "10", "-g", &url])?)
    }

    /// The remote host speaks after conntrack has forgotten the flow, and the application, here or
    /// at a LAN client, answers.
    fn idle(&mut self, ip: IpAddr, lan: Option<usize>) -> Verdict {
        let at = addr(ip, ECHO);
        let mut remote = outside_peer(self.ground, "echo", at, &[])?;
        let own = self.ground.cgroup(if lan.is_some() { "/lan" } else { "/proxied/app" });
        let start = || Process::start(&mut peer("app", at, &[]), Some(&own));
        let app = lan.map_or_else(start, |i| self.lan.client(i).run(start))?;
        self.seen(&remote.expect("hello", SOON)?)?;
        for round in 0..2 {
            await_forgotten(ECHO)?;

            remote.say("speak");
            app.expect("heard speak", SOON)?;

            for _ in 0..3 {
                let answer = remote.expect("answer", SOON);
                self.seen(&answer.map_err(|e| format!("round {round}: {e}"))?)?;
            }
        }
        Ok(())
    }

    /// The server is killed and comes back while applications talk.
    fn restart(&mut self) -> Verdict {
        let _flood = Client::udp(&self.proxied, addr(REMOTE4, 80)).flood().spawn();
        let ask = |ip| Client::tcp(&self.proxied, addr(ip, 80)).timeout(Duration::from_secs(1));
        let eight = || REMOTES.into_iter().cycle().take(8).map(|ip| ask(ip).spawn());
        let mut asking: Vec<_> = eight().collect();

        self.server = None;
        asking.extend(eight());

        let refused = Client::tcp(&self.proxied, addr(REMOTE4, 80)).run();
        if refused != Outcome::Refused {
            return Err(format!("without the server: {refused:?}"));
        }
        self.start_server()?;
        drop(asking);
        Ok(())
    }

    fn lan_curl(&mut self, ip: IpAddr) -> Verdict {
        self.lan.client(0).run(|| self.curl_in(&self.ground.root, ip))
    }

    fn lan_udp(&mut self, to: SocketAddr) -> Verdict {
        self.lan.client(0).run(|| self.ask_in(&self.ground.root, Proto::Udp, to))
    }

    /// dig gets a fake address from the server's own resolver, whatever resolver it asks.
    fn dns(&mut self) -> Verdict {
        let words = ["dig", "+short", "+tries=2", "+time=3", "example.org", "@203.0.113.7"];
        let said = application(&self.proxied, &words)?;
        if !said.starts_with("198.18.") {
            return Err(format!("dig says {said:?}"));
        }
        Ok(())
    }

    fn download(&mut self) -> Verdict {
        let url = format!("http://{}/big", addr(REMOTE4, HTTP));
        let dir = self.ground.dir.to_str().ok_or("a path that is not UTF-8")?;
        let words =
            format!("aria2c -q -x 4 -s 4 -k 1M -d {dir} -o big --allow-overwrite=true {url}");
        application(&self.proxied, &words.split(' ').collect::<Vec<_>>())?;
        let size = std::fs::metadata(self.ground.dir.join("big")).map_or(0, |m| m.len());
        if size != 4 << 20 {
            return Err(format!("{size} bytes came"));
        }
        Ok(())
    }

    fn git(&mut self) -> Verdict {
        let url = format!("http://{}/repository.git", addr(REMOTE4, HTTP));
        let said = application(&self.proxied, &["git", "ls-remote", &url])?;
        match said.contains("refs/heads/main") {
            true => Ok(()),
            false => Err(format!("git says {said:?}")),
        }
    }

    fn bulk(&mut self) -> Verdict {
        let remote = which("iperf3").ok_or("SKIP: no iperf3")?;
        let mut command = Command::new(remote);
        command.args(["-s", "-p", "5201", "--forceflush"]);
        let server = self.ground.outside(|| Process::start(&mut command, None))?;
        let ip = REMOTE4.to_string();
        let there = ["iperf3", "-c", &ip, "-p", "5201", "-n", "8M"];
        for way in [&[][..], &["-R"]] {
            // it says so again once it is done with the one before
            server.expect("listening", SOON)?;
            application(&self.proxied, &[&there, way].concat())?;
        }
        Ok(())
    }

    fn quic(&mut self, ip: IpAddr) -> Verdict {
        let [cert, key] = self.certificate()?;
        let at = addr(ip, QUIC);
        let _server = outside_peer(self.ground, "quic-server", at, &[&cert, &key])
            .map_err(|_| "SKIP: no aioquic")?;
        let own = self.ground.cgroup("/proxied/app");
        let client = Process::start(&mut peer("quic-client", at, &[]), Some(&own))?;
        client.expect("remote hello", Duration::from_secs(15))?;
        Ok(())
    }

    /// A certificate of a server's and its key, in files.
    fn certificate(&self) -> Result<[PathBuf; 2], String> {
        let [cert, key] = ["cert", "key"].map(|name| self.ground.dir.join(name));
        sh(&format!(
            "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=example.org -out {} -keyout {}",
            cert.display(),
            key.display()
        ))
        .map_err(|_| "SKIP: no openssl")?;
        Ok([cert, key])
    }
}

/// Waits until conntrack knows no UDP flow to that port.
fn await_forgotten(port: u16) -> Verdict {
    let conntrack = which("conntrack").ok_or("SKIP: no conntrack")?;
    let conntrack = conntrack.to_str().ok_or("a path that is not UTF-8")?;
    let port = format!("dport={port}");
    let knows =
        |family| output_if_any(conntrack, &["-L", "-p", "udp", "-f", family]).contains(&port);
    match wait_until(Duration::from_secs(20), || !knows("ipv4") && !knows("ipv6")) {
        true => Ok(()),
        false => Err("conntrack does not forget the flow".into()),
    }
}

type Case = (String, Box<dyn Fn(&mut Scene) -> Verdict>);

/// What a server with its abilities can be asked.
fn cases(software: &'static Software) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut add = |able: bool, what: &str, case: Box<dyn Fn(&mut Scene) -> Verdict>| {
        if able {
            cases.push((what.to_owned(), case));
        }
    };
    let &Software { udp, raw_tcp, dns, .. } = software;
    for (v, ip) in [("IPv4", REMOTE4), ("IPv6", REMOTE6)] {
        let web = addr(ip, 80);
        add(raw_tcp, &format!("TCP, {v}"), Box::new(move |s| s.ask(Proto::Tcp, web)));
        add(true, &format!("curl, {v}"), Box::new(move |s| s.curl(ip)));
        add(true, &format!("curl of a LAN client, {v}"), Box::new(move |s| s.lan_curl(ip)));
        add(udp, &format!("UDP, {v}"), Box::new(move |s| s.ask(Proto::Udp, web)));
        add(udp, &format!("UDP of a LAN client, {v}"), Box::new(move |s| s.lan_udp(web)));
        let resolver = addr(ip, 53);
        add(udp && !dns, &format!("DNS, {v}"), Box::new(move |s| s.ask(Proto::Udp, resolver)));
        add(udp, &format!("UDP that conntrack forgot, {v}"), Box::new(move |s| s.idle(ip, None)));
        let lan = Box::new(move |s: &mut Scene| s.idle(ip, Some(0)));
        add(udp, &format!("UDP of a LAN client that conntrack forgot, {v}"), lan);
        add(udp, &format!("QUIC, {v}"), Box::new(move |s| s.quic(ip)));
    }
    add(dns, "dig, hijacked to the server's resolver", Box::new(|s| s.dns()));
    add(true, "aria2, four connections", Box::new(|s| s.download()));
    add(true, "git ls-remote", Box::new(|s| s.git()));
    add(raw_tcp, "iperf3, both ways", Box::new(|s| s.bulk()));
    add(raw_tcp, "killed and started again under load", Box::new(|s| s.restart()));
    cases
}

fn serves(software: &'static Software, ground: &Ground) -> Result<bool, String> {
    let mut scene = Scene::set(ground, software)?;
    let mut well = true;
    for (what, case) in cases(software) {
        let verdict = case(&mut scene).and_then(|()| scene.no_leak());
        well &= report(software.name, &what, verdict);
        scene.leaks();
    }
    let logs = scene.daemon.logs();
    let quiet = !logs.lines().any(|line| line.starts_with("error"));
    let verdict = if quiet { Ok(()) } else { Err(logs) };
    Ok(well & report(software.name, "no error in cgtproxy's log", verdict))
}

#[test]
#[ignore = "make real-test runs it"]
fn servers() {
    try_all(&SERVERS, |software| software.name, serves);
}
