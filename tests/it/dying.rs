//! Removed cgroups that live on in their sockets: what these send goes the cgroup's way as before.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::ground::{addr, Ground, REMOTE4, REMOTE6};
use crate::kernel::nft;
use crate::stale::{connect, socket_in};
use crate::world::{Server, World};
use crate::{sized, wait_until};

const CONFIG: &str = "
[tproxy mihomo]
port = 7893
[rules]
direct = /drop/free
drop   = /drop
mihomo = /proxied
drop   = /churn/.*
";

const PATIENCE: Duration = Duration::from_secs(5);

/// The table's listing, without what says whose it is: another owner's would go with him.
fn table() -> String {
    let listed = nft(&["list", "table", "inet", "cgtproxy"], "").stdout;
    let text = String::from_utf8(listed).expect("UTF-8");
    text.replace(" # progname cgtproxy", "").replace("\tflags owner\n\n", "")
}

/// Whether packets are matched by their removed cgroups.
fn matches_dying() -> bool {
    table().contains("jhash")
}

/// The listing loads again elsewhere.
#[track_caller]
fn expect_loads(ground: &Ground) {
    let text = table();
    ground.outside(|| {
        let out = nft(&["-f", "-"], &text);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.is_empty(), "{said}\n{text}");
        assert_eq!(table(), text);
        assert!(nft(&["delete", "table", "inet", "cgtproxy"], "").status.success());
    });
}

/// Sockets that nobody sees before they are used: TCP and UDP, of both families.
fn sockets(cgroup: &Path) -> Vec<(OwnedFd, OwnedFd, IpAddr)> {
    let of = |ip| {
        let tcp = socket_in(cgroup, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, ip);
        (tcp, socket_in(cgroup, libc::SOCK_DGRAM, ip), ip)
    };
    [REMOTE4, REMOTE6].map(of).into()
}

/// Sends by each of the sockets; what answers the datagrams.
fn send(sockets: &[(OwnedFd, OwnedFd, IpAddr)]) -> Vec<String> {
    let mut answers = Vec::new();
    for (tcp, udp, ip) in sockets {
        let _ = connect(tcp, addr(*ip, 80));
        let udp = UdpSocket::from(udp.try_clone().expect("clone"));
        let mut data = [0; 200];
        let sent = udp.send_to(b"who?", addr(*ip, 80));
        udp.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
        answers.push(match sent.and_then(|_| udp.recv(&mut data)) {
            Ok(n) => String::from_utf8_lossy(&data[..n]).split(" from").next().unwrap().to_owned(),
            Err(_) => "nobody".to_owned(),
        });
    }
    answers
}

fn local_port(socket: &OwnedFd) -> Option<u16> {
    let socket = std::net::TcpStream::from(socket.try_clone().ok()?);
    socket.local_addr().ok().map(|local| local.port())
}

fn remove(cgroup: &Path) {
    let removed = wait_until(PATIENCE, || fs::remove_dir(cgroup).is_ok());
    assert!(removed, "{}", cgroup.display());
}

#[test]
fn sockets_outlive_their_cgroup() {
    let Some(ground) = Ground::new("dying") else {
        return;
    };
    let mut world = World::new(&ground);
    let _proxy = Server::start("proxy", &[7893]);
    let paths = ["/drop", "/drop/free", "/drop/below", "/proxied"];
    let cgroups = paths.map(|path| ground.cgroup(path));
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    assert!(!matches_dying());
    let held = cgroups.each_ref().map(|cgroup| (sockets(cgroup), sockets(cgroup), sockets(cgroup)));
    // the innermost first
    [1, 2, 0, 3].into_iter().for_each(|at| remove(&cgroups[at]));
    let kept = || ["direct", "drop", "mihomo"].map(|t| table().contains(&format!("@dying_{t} ")));
    assert!(wait_until(PATIENCE, || kept() == [true; 3]), "{}", table());
    expect_loads(&ground);
    let proxied = [REMOTE4, REMOTE6].map(|ip| format!("proxy {}", addr(ip, 80)));
    let remote = [REMOTE4, REMOTE6].map(|ip| format!("remote {}", addr(ip, 80)));
    let mut free = Vec::new();
    let mut check = |which: usize, when: &str| {
        let of = |at: usize| match which {
            0 => &held[at].0,
            1 => &held[at].1,
            _ => &held[at].2,
        };
        world.wire.packets();
        assert_eq!(send(of(0)), ["nobody"; 2], "{when}: dropped");
        assert_eq!(send(of(2)), ["nobody"; 2], "{when}: below a dropped one");
        assert_eq!(send(of(3)), proxied, "{when}: proxied");
        let mut left = world.wire.to_remote();
        // acknowledgements of the round before
        left.retain(|p| !free.contains(&p.src.port()));
        assert_eq!(left, [], "{when}");
        assert_eq!(send(of(1)), remote, "{when}: free");
        free.extend(of(1).iter().filter_map(|(tcp, ..)| local_port(tcp)));
    };
    check(0, "removed");
    daemon.kill9();
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    check(1, "after kill -9");
    daemon.configure(&CONFIG.replace("port = 7893", "port = 7893\n[tproxy other]\nport = 7894"));
    daemon.reload();
    check(2, "after a reload");
    drop(held);
    assert!(wait_until(PATIENCE, || !matches_dying()), "{}", table());
    expect_loads(&ground);
    drop(daemon);
}

#[test]
fn removed_without_sockets() {
    let Some(ground) = Ground::new("dying-churn") else {
        return;
    };
    let churn = ground.cgroup("/churn");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let times = sized(2000, 10_000);
    let busy = daemon.busy();
    let mut most = 0;
    for i in 0..times {
        let dir = churn.join(format!("c{i}"));
        fs::create_dir(&dir).expect("mkdir");
        fs::remove_dir(&dir).expect("rmdir");
        if i % 500 == 499 {
            let set = nft(&["list", "set", "inet", "cgtproxy", "dying_drop"], "");
            let set = String::from_utf8(set.stdout).expect("UTF-8");
            most = most.max(set.matches(',').count());
        }
    }
    let busy = daemon.busy() - busy;
    assert!(wait_until(PATIENCE, || !matches_dying()), "{}", table());
    println!("{times} cgroups made and removed: at most {most} kept, {busy:?} of processor time");
    assert!(most <= 1024);
    expect_loads(&ground);
}
