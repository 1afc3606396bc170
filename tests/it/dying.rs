//! Removed cgroups that live on in their sockets: what these send goes the cgroup's way as before.
//! And living ones that are matched in the same way, for nft cannot show their path.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::signal::Signal;

use crate::client::{again, connect, socket_in, udp_in, Proto, PATIENCE};
use crate::daemon::{run_with, Daemon};
use crate::flood::{Flood, Stall};
use crate::ground::{addr, Ground, REMOTE4, REMOTE6, REMOTES};
use crate::kernel::{cgroup_id, load, nft, output_if_any, set_ids, SETTLE};
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

/// The table's listing, without what says whose it is: another owner's would go with him. A
/// character a byte.
fn table() -> String {
    let listed = nft(&["list", "table", "inet", "cgtproxy"], "");
    assert!(listed.status.success(), "{listed:?}");
    let text: String = listed.stdout.into_iter().map(char::from).collect();
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
    let file = ground.dir.join("listing");
    fs::write(&file, text.chars().map(|c| c as u8).collect::<Vec<u8>>()).expect("write");
    ground.outside(|| {
        let out = nft(&["-f", file.to_str().expect("UTF-8")], "");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && said.is_empty(), "{said}\n{text}");
        assert_eq!(table(), text);
        assert!(nft(&["delete", "table", "inet", "cgtproxy"], "").status.success());
    });
}

/// Sockets of a cgroup that nobody sees before they are used: TCP and UDP, of both families.
type Sockets = [(OwnedFd, UdpSocket, IpAddr); 2];

fn sockets(cgroup: &Path) -> Sockets {
    REMOTES.map(|ip| {
        let tcp = socket_in(cgroup, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, ip);
        (tcp, udp_in(cgroup, ip), ip)
    })
}

/// Sends by each of the sockets; what answers the datagrams.
fn send(sockets: &Sockets) -> [String; 2] {
    sockets.each_ref().map(|(tcp, udp, ip)| {
        let _ = connect(tcp, addr(*ip, 80));
        who(udp, addr(*ip, 80))
    })
}

/// Who answers a datagram; `nobody` where it is denied.
fn who(socket: &UdpSocket, to: SocketAddr) -> String {
    let mut data = [0; 200];
    match socket.send_to(b"who?", to).and_then(|_| again(|| socket.recv(&mut data))) {
        Ok(n) => {
            let said = String::from_utf8_lossy(&data[..n]);
            said.split(" from").next().unwrap_or_default().to_owned()
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => "nobody".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn local_port(socket: &OwnedFd) -> Option<u16> {
    let socket = std::net::TcpStream::from(socket.try_clone().ok()?);
    socket.local_addr().ok().map(|local| local.port())
}

fn remove(cgroup: &Path) {
    let removed = wait_until(PATIENCE, || fs::remove_dir(cgroup).is_ok());
    assert!(removed, "{}", cgroup.display());
}

/// What a removed cgroup's sockets send goes its way: once it is removed, after a kill and a reload.
#[test]
fn sockets_outlive_their_cgroup() {
    let (ground, mut world) = scene!("dying");
    let _proxy = Server::start("proxy", &[7893]);
    let cgroups = ground.cgroups(["/drop", "/drop/free", "/drop/below", "/proxied"]);
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    assert!(!matches_dying());
    // for each of the looks
    let held = cgroups.each_ref().map(|cgroup| [0; 3].map(|_| sockets(cgroup)));

    // the innermost first
    [1, 2, 0, 3].into_iter().for_each(|at| remove(&cgroups[at]));

    let kept = || ["direct", "drop", "mihomo"].map(|t| table().contains(&format!("@dying_{t} ")));
    assert!(wait_until(PATIENCE, || kept() == [true; 3]), "{}", table());
    expect_loads(&ground);
    let by = |name: &str| REMOTES.map(|ip| format!("{name} {}", addr(ip, 80)));
    let mut seen = Vec::new();
    let mut check = |look: usize, when: &str| {
        let [dropped, free, below, proxied] = held.each_ref().map(|of| &of[look]);
        world.wire.packets();
        assert_eq!(send(dropped), ["nobody"; 2], "{when}: dropped");
        assert_eq!(send(below), ["nobody"; 2], "{when}: below a dropped one");
        assert_eq!(send(proxied), by("proxy"), "{when}: proxied");
        let mut left = world.wire.to_remote();
        // acknowledgements of the round before
        left.retain(|p| !seen.contains(&p.src.port()));
        assert_eq!(left, [], "{when}");
        assert_eq!(send(free), by("remote"), "{when}: free");
        seen.extend(free.iter().filter_map(|(tcp, ..)| local_port(tcp)));
    };
    check(0, "removed");
    daemon.kill9();
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    check(1, "after kill -9");
    daemon.reconfigure(&CONFIG.replace("port = 7893", "port = 7893\n[tproxy other]\nport = 7894"));
    check(2, "after a reload");

    drop(held);
    assert!(wait_until(PATIENCE, || !matches_dying()), "{}", table());
    expect_loads(&ground);
}

/// Of cgroups that come and go no more are kept than a set has room for, and none for long.
#[test]
fn removed_without_sockets() {
    let ground = ground!("dying-churn");
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
            let set = output_if_any("nft", &["list", "set", "inet", "cgtproxy", "dying_drop"]);
            most = most.max(set.matches(',').count());
        }
    }

    let busy = daemon.busy() - busy;
    assert!(wait_until(PATIENCE, || !matches_dying()), "{}", table());
    println!("{times} cgroups made and removed: at most {most} kept, {busy:?} of processor time");
    assert!(most <= 1024);
    expect_loads(&ground);
}

/// A cgroup may be removed while there is no daemon: nft shows its id as a number then, which it
/// does not take back. The next start puts that right, and what sockets send goes its way.
#[test]
fn removed_while_there_is_no_daemon() {
    let (ground, mut world) = scene!("dying-alone");
    let _proxy = Server::start("proxy", &[7893]);
    let mut daemon = Daemon::start(&ground, CONFIG, &[]);
    let proxied = REMOTES.map(|ip| format!("proxy {}", addr(ip, 80)));
    let leaves = [("kill -9", Daemon::kill9 as fn(Daemon)), ("left", Daemon::leave)];
    for (how, leave) in leaves {
        let cgroups = ground.cgroups(["/drop", "/proxied"]);
        let listed = |path: &str| table().contains(&format!("{path}\""));
        let known = || listed("/drop") && listed("/proxied");
        assert!(wait_until(PATIENCE, known), "{how}: {}", table());
        let held = cgroups.each_ref().map(|cgroup| [0; 2].map(|_| sockets(cgroup)));
        world.wire.packets();

        leave(daemon);
        cgroups.iter().for_each(|cgroup| remove(cgroup));

        assert_eq!(send(&held[0][0]), ["nobody"; 2], "{how}: dropped");
        assert_eq!(send(&held[1][0]), proxied, "{how}: proxied");
        let text = table();
        let loads = ground.outside(|| nft(&["-f", "-"], &text).status.success());
        assert!(!loads, "{how}: nft has learnt to show the removed: tell the manual\n{text}");

        daemon = Daemon::start(&ground, CONFIG, &[]);
        expect_loads(&ground);
        assert_eq!(send(&held[0][1]), ["nobody"; 2], "{how}: dropped, started again");
        assert_eq!(send(&held[1][1]), proxied, "{how}: proxied, started again");
        assert_eq!(world.wire.to_remote(), [], "{how}");

        drop(held);
        assert!(wait_until(PATIENCE, || !matches_dying()), "{how}: {}", table());
    }
}

const STRANGE: &str = "
[tproxy mihomo]
port = 7893
[rules]
direct = /outer/[^/]*
drop   = /outer
drop   = /dropped/[^/]*
mihomo = /proxied/[^/]*
";

/// Names that mkdir(2) takes, which is no newline in a cgroup: bytes that are no letters, what nft
/// has a meaning for, and long ones.
fn strange_names() -> Vec<Vec<u8>> {
    let bytes = (1..=255u8).filter(|byte| !byte.is_ascii_alphanumeric() && *byte <= 0x81);
    let bytes = bytes.chain([0xc3, 0xff]).filter(|byte| !b"/\n".contains(byte));
    let mut names: Vec<Vec<u8>> = bytes.map(|byte| vec![b'n', byte, b'm']).collect();
    let others = ["\"", "\\", "*", " ", "#", "$x", "@x", "a\\\"b", "\\x2d", "\u{e9}", "}", "x\"*"];
    names.extend(others.map(Vec::from));
    names.push(vec![b'x'; 255]);
    names.push(vec![b'"'; 255]);
    names
}

/// Each of these cgroups has an element of its own, which decides for what it sends.
fn decided(ground: &Ground, parent: &str, name: &[u8]) -> [String; 2] {
    let cgroup = ground.at(parent).join(OsStr::from_bytes(name));
    REMOTES.map(|ip| {
        let who = who(&udp_in(&cgroup, ip), addr(ip, 80));
        who.split(' ').next().unwrap_or_default().to_owned()
    })
}

#[track_caller]
fn expect_decided(ground: &Ground, names: &[Vec<u8>], parents: [(&str, &str); 3], when: &str) {
    for name in names {
        for (parent, who) in parents {
            let shown = String::from_utf8_lossy(name);
            assert_eq!(decided(ground, parent, name), [who; 2], "{when}: {parent}/{shown:?}");
        }
    }
}

/// What `show` prints loads elsewhere, with as many rules for names that nft cannot show as the table has.
#[track_caller]
fn expect_shown_loads(ground: &Ground, config: &str) {
    let shown = run_with(ground, config, &["show"]).fine();
    let hashes = || table().lines().filter(|l| l.contains("jhash")).count();
    let loaded = ground.outside(|| {
        load(&shown);
        let loaded = hashes();
        load("delete table inet cgtproxy");
        loaded
    });
    assert_eq!(loaded, hashes());
}

/// A cgroup goes its way whatever its name: made before and after the start, over a kill and a reload.
#[test]
fn strange_names_decide() {
    let (ground, _world) = scene!("strange");
    let _proxy = Server::start("proxy", &[7893]);
    let parents = [("/dropped", "nobody"), ("/proxied", "proxy"), ("/outer", "remote")];
    let names = strange_names();
    let make = |name: &Vec<u8>| {
        for (parent, _) in parents {
            let dir = ground.cgroup(parent).join(OsStr::from_bytes(name));
            fs::create_dir(&dir).unwrap_or_else(|e| panic!("unable to make {dir:?}: {e}"));
        }
    };
    let (before, later) = names.split_at(names.len() / 2);
    before.iter().for_each(make);
    let daemon = Daemon::start(&ground, STRANGE, &[]);
    later.iter().for_each(make);

    // in no order
    for name in later {
        for (parent, who) in parents {
            wait_until(PATIENCE, || decided(&ground, parent, name) == [who; 2]);
        }
    }
    expect_decided(&ground, &names, parents, "made");
    expect_loads(&ground);
    expect_shown_loads(&ground, STRANGE);

    // taken over, nothing has changed for anybody
    let kept = udp_in(&ground.at("/proxied/n\"m"), REMOTE4);
    kept.connect(addr(REMOTE4, 80)).expect("connect");
    daemon.kill9();
    let status = run_with(&ground, STRANGE, &["status"]).out;
    assert!(status.contains("does not know: 0"), "{status}");
    let daemon = Daemon::start(&ground, STRANGE, &[]);
    expect_decided(&ground, &names, parents, "after kill -9");
    expect_loads(&ground);
    kept.send(b"who?").expect("the socket was ended");
    assert!(!daemon.logs().contains("ended"), "{}", daemon.logs());

    let other = STRANGE.replace("/proxied", "/x").replace("/dropped", "/proxied");
    daemon.reconfigure(&other.replace("/x", "/dropped"));
    let swapped = [("/dropped", "proxy"), ("/proxied", "nobody"), ("/outer", "remote")];
    expect_decided(&ground, &names, swapped, "after a reload");
    expect_loads(&ground);

    drop(kept);
    for name in &names {
        parents.iter().for_each(|(at, _)| remove(&ground.at(at).join(OsStr::from_bytes(name))));
    }
    assert!(wait_until(PATIENCE, || !matches_dying()), "{}", table());
    expect_loads(&ground);
}

/// The first one of a target at its level that is removed comes with rules of its own: a packet that has
/// met those of before finds it where it was. Targets in vain make packets slow, so that many meet both.
#[test]
fn the_first_of_its_kind() {
    let (ground, mut world) = scene!("dying-first");
    let (mut config, mut rules) = (String::new(), String::new());
    for n in 0..25 {
        config += &format!("[tproxy t{n}]\nport = {}\n", 9000 + n);
        rules += &format!("t{n} = /.*/t{n}\n");
    }
    config += &format!("[rules]\n{rules}direct = user:12345\ndrop = /.*/drop\n");
    let levels = sized(8, 40);
    let mut above = String::new();
    let victims: Vec<_> = (0..levels)
        .map(|level| {
            above += "/x";
            (0..25).for_each(|n| drop(ground.cgroup(&format!("{above}/t{n}"))));
            let victim = ground.cgroup(&format!("{above}/drop"));
            let ip = if level % 2 == 0 { REMOTE4 } else { REMOTE6 };
            let (proto, kind) = match level / 2 % 2 {
                0 => (Proto::Udp, libc::SOCK_DGRAM),
                _ => (Proto::Tcp, libc::SOCK_STREAM | libc::SOCK_NONBLOCK),
            };
            (socket_in(&victim, kind, ip), victim, proto, addr(ip, 80))
        })
        .collect();
    let daemon = Daemon::start(&ground, &config, &[]);
    world.wire.packets();

    let mut leaked = Vec::new();
    for (socket, victim, proto, to) in &victims {
        let id = cgroup_id(victim).expect("a cgroup");
        let flood = Flood::start(&ground.root, *proto, Some(socket), *to);
        remove(victim);
        let gone = || set_ids("cg1_drop").is_some_and(|ids| !ids.contains(&id));
        assert!(wait_until(SETTLE, gone), "{}", daemon.logs());
        drop(flood);
        leaked.extend(world.wire.to_remote());
    }

    assert_eq!(leaked, [], "{} of {levels}", leaked.len());
    daemon.stop_clean();
}

/// The same for a packet that waits in a chain meanwhile: what it may still look up goes once it is
/// through.
#[test]
fn a_packet_that_waits_in_a_chain() {
    let (ground, mut world) = scene!("dying-waits");
    let (mut config, mut rules) = (String::new(), String::new());
    for n in 0..25 {
        config += &format!("[tproxy t{n}]\nport = {}\n", 9000 + n);
        rules += &format!("t{n} = /t{n}\n");
        ground.cgroup(&format!("/t{n}"));
    }
    config += &format!("[rules]\n{rules}direct = user:12345\ndrop = /drop[0-9]+\n");

    let removals = sized(12, 100);
    let mut leaked = Vec::new();
    for removal in 0..removals {
        let Some(mut stall) = Stall::new() else { return };
        let ip = if removal % 2 == 0 { REMOTE4 } else { REMOTE6 };
        let (proto, kind) = match removal / 2 % 2 {
            0 => (Proto::Udp, libc::SOCK_DGRAM),
            _ => (Proto::Tcp, libc::SOCK_STREAM | libc::SOCK_NONBLOCK),
        };
        let victim = ground.cgroup(&format!("/drop{removal}"));
        let (socket, id) = (socket_in(&victim, kind, ip), cgroup_id(&victim).expect("a cgroup"));
        let daemon = Daemon::start(&ground, &config, &[]);
        world.wire.packets();
        daemon.signal(Signal::SIGSTOP);
        let to = addr(ip, 80);
        let flood = Flood::start_with(Some(&mut stall), &ground.root, proto, Some(&socket), to);
        remove(&victim);
        let gone = || set_ids("cg1_drop").is_some_and(|ids| !ids.contains(&id));
        stall.meanwhile(&flood, &daemon, || assert!(wait_until(SETTLE, gone)));
        drop(flood);
        leaked.extend(world.wire.to_remote());
        // or its SYN goes again without a table
        drop(socket);
        daemon.stop_clean();
    }
    assert_eq!(leaked, [], "{} of {removals}", leaked.len());
}
