//! What of a target's traffic it takes: ports, QUIC, what is rejected, and destinations. Packets
//! decide, of this host's processes and of a router's clients.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::client::{Client, Outcome, Proto};
use crate::daemon::Daemon;
use crate::gateway::Lan;
use crate::ground::{addr, Ground, REMOTE4, REMOTE6};
use crate::world::{World, PROXY};

use Proto::{Tcp, Udp};

/// Long enough for an answer that does not come.
const SILENCE: Duration = Duration::from_millis(400);
/// For one that does.
const PATIENCE: Duration = Duration::from_secs(5);

/// Who is asked of a client, and what is said of it: the answer without what it dialled, `nobody`,
/// or `refused`, which a datagram's sender learns by an error that is not silence.
type Case<'a> = (Proto, SocketAddr, &'a str);

fn who(outcome: Outcome, took: Duration, to: SocketAddr) -> String {
    match outcome {
        Outcome::Answer(text) => {
            let name = text.split(" from ").next().unwrap_or_default().to_owned();
            let dialled = format!(" {to}");
            name.strip_suffix(&dialled).map_or(name.clone(), str::to_owned)
        }
        Outcome::Timeout => "nobody".to_owned(),
        // the output hook's own word for what it drops, whatever else is said
        Outcome::Failed(nix::errno::Errno::EPERM) => "denied".to_owned(),
        Outcome::Refused if took < SILENCE => "refused".to_owned(),
        other => format!("{other:?} after {took:?}"),
    }
}

/// Asserts what becomes of each case, asked by `run`.
#[track_caller]
fn expect(what: &str, cases: &[Case], run: impl Fn(Client) -> (Outcome, Duration), from: &Path) {
    let mut wrong = Vec::new();
    for (proto, to, want) in cases {
        let patience = if ["nobody", "denied"].contains(want) { SILENCE } else { PATIENCE };
        let (outcome, took) = run(Client::new(from, *proto, *to).timeout(patience));
        let got = who(outcome, took, *to);
        if got != *want {
            wrong.push(format!("{proto:?} to {to}: {got}, not {want}"));
        }
    }
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
}

/// Of a process in a cgroup, which is there from before the daemon on.
#[track_caller]
fn here(cgroup: &Path, cases: &[Case]) {
    expect("here", cases, |client| client.spawn().wait(), cgroup);
}

/// Of a client of the router.
#[track_caller]
fn behind(ground: &Ground, lan: &Lan, cases: &[Case]) {
    let run = |client: Client| lan.client(0).run(|| client.spawn().wait());
    expect("a client", cases, run, &ground.root);
}

/// The cases for both families.
fn both(cases: &[(Proto, u16, &'static str)]) -> Vec<Case<'static>> {
    let all = cases.iter().flat_map(|(proto, port, want)| {
        [REMOTE4, REMOTE6].map(|ip| (*proto, addr(ip, *port), *want))
    });
    all.collect()
}

const GATEWAY: &str = "[gateway lan]\ninterface = br-lan\ntarget = mihomo\n";

/// A policy for `/app` and for the router's clients.
fn policy(global: &str, lines: &str) -> String {
    format!(
        "[global]\n{global}[tproxy mihomo]\nport = 7893\n{lines}[rules]\nmihomo = /app\n{GATEWAY}"
    )
}

/// Ports that a target takes, and none of the others.
#[test]
fn ports() {
    let ground = ground!("dest-ports");
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let (_world, _proxy) = World::with_proxy(&ground);
    let lines = "tcp-ports = 443 8000-8999\ntcp-ports = 1-79\nudp-ports = 80\n";
    let daemon = Daemon::start(&ground, &policy("", lines), &[]);
    let cases = both(&[
        (Tcp, 53, PROXY),
        (Tcp, 80, "remote"),
        (Tcp, 443, PROXY),
        (Udp, 53, "remote"),
        (Udp, 80, PROXY),
        (Udp, 443, "remote"),
    ]);
    here(&app, &cases);
    behind(&ground, &lan, &cases);
    // where the default is not direct, the kernel's packets for what is left alone go direct too
    daemon.reconfigure(&policy("default = drop\n", lines));
    here(&app, &cases);
    behind(&ground, &lan, &cases);
    daemon.stop_clean();
}

/// HTTP/3 by its ports; other UDP is not concerned.
#[test]
fn quic() {
    let ground = ground!("dest-quic");
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let (_world, _proxy) = World::with_proxy(&ground);
    let daemon = Daemon::start(&ground, &policy("", "quic = no\n"), &[]);
    let all =
        |quic| both(&[(Tcp, 443, PROXY), (Udp, 53, PROXY), (Udp, 80, quic), (Udp, 443, quic)]);
    here(&app, &all("remote"));
    behind(&ground, &lan, &all("remote"));
    daemon.reconfigure(&policy("", "quic = drop\n"));
    here(&app, &all("denied"));
    behind(&ground, &lan, &all("nobody"));
    daemon.reconfigure(&policy("", "quic = reject\n"));
    here(&app, &all("denied"));
    behind(&ground, &lan, &all("refused"));
    daemon.reconfigure(&policy("", "quic = yes\nudp = no\n"));
    let direct = both(&[(Tcp, 443, PROXY), (Udp, 53, "remote"), (Udp, 443, "remote")]);
    here(&app, &direct);
    behind(&ground, &lan, &direct);
    daemon.stop_clean();
}

/// What is rejected fails at once, for this host's processes and for a router's clients; what is
/// dropped only shows to those who send datagrams here.
#[test]
fn rejected_at_once() {
    let ground = ground!("dest-reject");
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let (mut world, _proxy) = World::with_proxy(&ground);
    let daemon = Daemon::start(&ground, &policy("", "tcp = drop\nudp = drop\n"), &[]);
    here(&app, &both(&[(Tcp, 80, "nobody"), (Udp, 53, "denied")]));
    behind(&ground, &lan, &both(&[(Tcp, 80, "nobody"), (Udp, 53, "nobody")]));
    for lines in ["tcp = reject\nudp = reject\n", "ipv4 = reject\nipv6 = reject\n"] {
        daemon.reconfigure(&policy("", lines));
        here(&app, &both(&[(Tcp, 80, "refused"), (Udp, 53, "denied")]));
        behind(&ground, &lan, &both(&[(Tcp, 80, "refused"), (Udp, 53, "refused")]));
    }
    // one family alone; and drop comes first
    daemon.reconfigure(&policy("", "ipv6 = reject\nudp = drop\n"));
    let cases = [
        (Tcp, addr(REMOTE4, 80), PROXY),
        (Tcp, addr(REMOTE6, 80), "refused"),
        (Udp, addr(REMOTE6, 53), "nobody"),
    ];
    behind(&ground, &lan, &cases);
    assert_eq!(world.wire.to_remote(), [], "what is refused or proxied stays here");
    daemon.stop_clean();
}

/// How long each waits: printed for the manual, and held far below the kernel's own patience.
#[test]
fn how_long_a_refusal_takes() {
    let ground = ground!("dest-time");
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let (_world, _proxy) = World::with_proxy(&ground);
    let daemon = Daemon::start(&ground, &policy("", "tcp = reject\nudp = reject\n"), &[]);
    for (proto, name) in [(Tcp, "TCP"), (Udp, "UDP")] {
        for ip in [REMOTE4, REMOTE6] {
            let ask = |from: &Path| Client::new(from, proto, addr(ip, 443)).timeout(PATIENCE);
            let (own, took) = ask(&app).spawn().wait();
            let (its, waited) = lan.client(0).run(|| ask(&ground.root).spawn().wait());
            println!("{name} to {ip}: here {own:?} in {took:?}, a client {its:?} in {waited:?}");
            assert!(took.max(waited) < Duration::from_millis(200), "{took:?} {waited:?}");
        }
    }
    daemon.stop_clean();
}

/// TCP that began proxied stays with its proxy, whatever the target leaves alone by now.
#[test]
fn proxied_tcp_stays_over_a_reload() {
    let ground = ground!("dest-stay");
    let (lan, app) = (Lan::new(&ground), ground.cgroup("/app"));
    let mut world = World::new(&ground);
    let proxy = crate::world::Server::stream(PROXY, &[7893]);
    let daemon = Daemon::start(&ground, &policy("", ""), &[]);
    let follow = |from: &Path, ip| Client::tcp(from, addr(ip, 80)).follow().spawn();
    let mut flows = Vec::new();
    for ip in [REMOTE4, REMOTE6] {
        flows.push(follow(&app, ip));
        flows.push(lan.client(0).run(|| follow(&ground.root, ip)));
    }
    let begun = Instant::now();
    world.wire.packets();
    for lines in RELOADS {
        daemon.reconfigure(&policy("", lines));
        let cases = both(&[(Tcp, 80, "remote")]);
        here(&app, &cases);
        behind(&ground, &lan, &cases);
    }
    // new ones and their ends alone were seen outside
    assert!(begun.elapsed() > Duration::from_millis(1), "the streams went on meanwhile");
    drop(proxy);
    for flow in flows {
        let outcome = flow.wait().0;
        assert!(
            matches!(&outcome, Outcome::Answer(text) if text.starts_with(PROXY)),
            "{outcome:?}"
        );
    }
    daemon.stop_clean();
}

const RELOADS: &[&str] = &["tcp-ports = 443\n", "tcp = no\n"];
