//! `apps`: who talks, what decides about it, and lines for `[rules]`.

use std::ffi::OsStr;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use nix::unistd::{geteuid, Uid, User};

use crate::client::{connect, socket_in, udp_in, PATIENCE};
use crate::daemon::{binary, run_with, write_private, Daemon, Said};
use crate::ground::{addr, ip_batch, Ground, HOST4, REMOTE4, REMOTE6};
use crate::json::is_documented;
use crate::kernel::{await_member, cgroup_id};
use crate::tools::{as_nobody, columns, nobodys_binary, query};
use crate::wait_until;
use crate::world::{bind, raw_addr, Server, World};

const CONFIG: &str = "
[tproxy mihomo]
port = 7893
[rules]
direct = /services/mihomo
mihomo = service:aria2
";

/// A connected socket of a cgroup.
fn flow(cgroup: &Path, kind: i32, to: SocketAddr) -> OwnedFd {
    let socket = socket_in(cgroup, kind, to.ip());
    connect(&socket, to).unwrap_or_else(|e| panic!("connect to {to}: {e}"));
    socket
}

/// A socket of a cgroup that listens at every address.
fn listener(cgroup: &Path, port: u16) -> OwnedFd {
    let socket = socket_in(cgroup, libc::SOCK_STREAM, REMOTE4);
    let any = SocketAddr::from(([0, 0, 0, 0], port));
    let (raw, len) = raw_addr(any);
    // SAFETY: a sockaddr of the length that goes with it, and integers.
    let rc = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const raw).cast(), len)
            | libc::listen(socket.as_raw_fd(), 8)
    };
    assert_eq!(rc, 0, "listen at {any}: {}", std::io::Error::last_os_error());
    socket
}

fn apps(ground: &Ground, config: &str, form: &[&str]) -> Said {
    let said = run_with(ground, config, &[&["apps"], form].concat());
    assert_eq!((said.code, &*said.err), (Some(0), ""), "{}", said.out);
    said
}

/// What `--json` says of a cgroup: a Python expression of `a`.
#[track_caller]
fn of(json: &str, cgroup: &str, expression: &str) -> String {
    let find = format!("[({expression}) for a in d['apps'] if a['cgroup'] == {cgroup:?}]");
    query(json, &find)
}

fn me() -> String {
    User::from_uid(geteuid()).expect("users").expect("a user").name
}

/// A client of the proxy, one of nobody, a service and a proxy, each with its sockets; they talk as
/// long as these are kept.
fn talkers(ground: &Ground) -> (Server, Vec<OwnedFd>) {
    let local = Server::at("local", &[addr(HOST4, 8080)]);
    let [aria2, sync, web, proxy] = ["aria2", "sync", "web", "box"]
        .map(|name| ground.cgroup(&format!("/services/{name}/main")));
    let (tcp, udp) = (libc::SOCK_STREAM, libc::SOCK_DGRAM);
    let mut sockets = vec![
        flow(&aria2, tcp, addr(REMOTE4, 80)),
        flow(&aria2, tcp, addr(REMOTE6, 80)),
        flow(&aria2, udp, addr(REMOTE6, 80)),
        flow(&aria2, udp, addr(REMOTE6, 80)),
        flow(&sync, udp, addr(REMOTE4, 53)),
        flow(&sync, tcp, addr(HOST4, 8080)),
        // a proxy that listens, and dials
        listener(&proxy, 7893),
        flow(&proxy, tcp, addr(REMOTE4, 443)),
    ];
    // others ask for the service
    let service = TcpListener::from(listener(&web, 81));
    let asks = || TcpStream::connect(addr(HOST4, 81)).expect("connect from outside");
    sockets.push(ground.outside(asks).into());
    sockets.push(service.accept().expect("accept").0.into());
    sockets.push(service.into());
    (local, sockets)
}

/// Each cgroup that has sockets is told with its flows, what decides, and a line where only the default
/// does.
#[test]
fn who_talks_and_what_decides() {
    let (ground, _world) = scene!("apps");
    let _talkers = talkers(&ground);

    let json = apps(&ground, CONFIG, &["--json"]).out;

    is_documented("apps", &json);
    let row = "a['flows'], a['inbound'], a['local'], a['protocols'], a['target'], a['decides']";
    let me = format!("('{}', {})", me(), geteuid());
    for (name, expression, want) in [
        ("aria2", row, "(4, 0, 0, ['tcp', 'udp'], 'mihomo', 'rule')"),
        ("aria2", "a['remotes']", "['[2001:db8:2::7]:80', '203.0.113.7:80']"),
        ("aria2", "a['rule']['match']", "'service:aria2'"),
        ("aria2", "a['rule']['line']", "7"),
        ("aria2", "a['line']", "None"),
        ("sync", row, "(1, 0, 1, ['udp'], 'direct', 'default')"),
        ("sync", "a['line']", "'mihomo = service:sync'"),
        // a line must not send a proxy to itself
        ("box", "a['line']", "'direct = service:box'"),
        (
            "web",
            "a['flows'], a['listens'], a['line']",
            "(0, [{'protocol': 'tcp', 'port': 81}], None)",
        ),
        ("web", "a['user'], a['uid']", &me),
        // what is accepted is the listener's cgroup's, whoever accepts it
        ("web", "a['inbound']", "1"),
    ] {
        let said = of(&json, &format!("/services/{name}/main"), expression);
        assert_eq!(said, format!("[{want}]"), "{name}");
    }
}

/// The same for people: a row each, and then the lines, which `--suggest` gives alone.
#[test]
fn who_talks_in_a_table() {
    let (ground, _world) = scene!("apps-table");
    let _talkers = talkers(&ground);

    let text = apps(&ground, CONFIG, &[]).out;
    let suggested = apps(&ground, CONFIG, &["--suggest"]).out;

    let row = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        columns(line.unwrap_or_else(|| panic!("no {name} in\n{text}")))
    };
    assert_eq!(row("/services/aria2/")[2..5], ["4", "tcp udp", "mihomo"]);
    assert!(row("/services/aria2/")[5].ends_with(".conf:7"), "{text}");
    let default = ["1", "udp", "direct", "default", "203.0.113.7:53"];
    assert_eq!(row("/services/sync/")[2..], default);
    assert_eq!(row("/services/web/")[2..], ["tcp:81", "1", "0"]);
    assert!(text.contains("\n    mihomo = service:sync\n"), "{text}");
    assert_eq!(suggested.lines().count(), 2, "{suggested}");
    assert!(suggested.contains("direct = service:box\n"), "{suggested}");
}

/// Cgroups with the names that init systems, desktops and containers give, and some that nobody would.
/// `~` stands for the cgroup of a user's service manager.
const NAMES: [&[u8]; 28] = [
    b"/services/sync/instance1",
    b"/services/sing-box",
    b"/openrc.transmission-daemon",
    b"/transmission",
    b"/system.slice/nginx.service",
    br"/system.slice/system-wg\x2dquick.slice/wg-quick@wg0.service",
    b"/system.slice/_cpu.service",
    b"/system.slice/docker-0f3a9c.scope",
    b"/docker/0f3a9c",
    b"/machine.slice/libpod-0f3a9c.scope/container",
    b"/system.slice/snap.lxd.daemon.service",
    b"/lxc.payload.web",
    b"/user.slice/user-1000.slice/session-3.scope",
    b"~/app.slice/app-flatpak-org.mozilla.firefox-4711.scope",
    br"~/app.slice/app-gnome-jetbrains\x2dtoolbox-42.scope",
    b"~/app.slice/snap.firefox.firefox-3dcfaa86-bf58-4d3e.scope",
    b"~/app.slice/dbus-:1.2-org.gnome.Nautilus@0.service",
    b"~/session.slice/pipewire.service",
    b"/a b ",
    b"/ leading",
    b"/#;=\"'",
    b"/(a|b)*[c]{2}?+^$.\\",
    b"/\x1b[31m\t\r",
    "/gr\u{fc}n/\u{202e}x".as_bytes(),
    // the same names twice, so that none is the only one
    b"/services/twice",
    b"/system.slice/twice.service",
    b"/\xff\xfe",
    b"/x\xc3",
];

/// The target of a path under these lines of `[rules]`.
#[track_caller]
fn decided(ground: &Ground, lines: &str, path: &[u8]) -> String {
    let file = ground.dir.join("suggested.conf");
    write_private(&file, &format!("[tproxy mihomo]\nport = 7893\n[rules]\n{lines}\n"));
    let mut command = Command::new(binary());
    command.arg("-c").arg(&file).arg("explain").arg(OsStr::from_bytes(path));
    let out = Said::from(command.output().expect("start cgtproxy")).fine();
    let target = out.lines().find_map(|line| line.trim().strip_prefix("target"));
    target.expect("a target").trim().to_owned()
}

/// What is suggested for a cgroup decides for it, and for none beside it; and all lines together are a
/// file that is right.
#[test]
fn what_is_suggested_decides() {
    let ground = ground!("apps-suggest");
    let manager = b"/user.slice/user-1000.slice/user@1000.service";
    let names = NAMES.map(|name| match name.strip_prefix(b"~") {
        Some(rest) => [&manager[..], rest].concat(),
        None => name.to_vec(),
    });
    let flows = names.each_ref().map(|name| {
        let dir = ground.root.join(OsStr::from_bytes(&name[1..]));
        fs::create_dir_all(&dir).expect("make a cgroup");
        flow(&dir, libc::SOCK_DGRAM, addr(REMOTE4, 53))
    });

    let all = apps(&ground, CONFIG, &["--suggest"]).out;

    drop(flows);
    let lines: Vec<&str> = all.lines().collect();
    assert_eq!(lines.len(), names.len(), "{lines:#?}");
    for name in &names {
        let decides = |line: &&&str| decided(&ground, line, name) == "mihomo";
        let deciding: Vec<_> = lines.iter().filter(decides).collect();
        assert_eq!(deciding.len(), 1, "{}: {deciding:?}", name.escape_ascii());
        assert_eq!(decided(&ground, &all, name), "mihomo", "{}", name.escape_ascii());
    }
    for short in ["app:org.mozilla.firefox", "service:nginx", "/services/twice"] {
        assert!(lines.contains(&&*format!("mihomo = {short}")), "{lines:#?}");
    }
}

/// Sockets of a cgroup that is gone are told with what decides for them, and the kernel's own tunnels.
#[test]
fn removed_cgroups_and_tunnels() {
    let ground = ground!("apps-removed");
    let root = ground.root.file_name().expect("a name").to_string_lossy().into_owned();
    let telemetry = ground.cgroup("/telemetry");
    let config =
        format!("[global]\ncgroup-root = /sys/fs/cgroup\n[rules]\ndrop = /{root}/telemetry\n");
    let daemon = Daemon::start(&ground, &config, &[]);
    await_member(&telemetry, "drop");
    let _flow = flow(&telemetry, libc::SOCK_DGRAM, addr(REMOTE4, 53));
    let id = cgroup_id(&telemetry).expect("an id");
    fs::remove_dir(&telemetry).expect("remove the cgroup");
    ip_batch(&[], "link add vx0 type vxlan id 5 dstport 4790 dev in0\nlink set vx0 up\n");

    let json = || apps(&ground, &config, &["--json"]).out;
    let find = |json: &str| {
        let removed = "a['state'], a['cgroup'], a['target'], a['decides'], a['flows'], a['line']";
        query(json, &format!("[({removed}) for a in d['apps'] if a['id'] == {id}]"))
    };
    let want = "[('removed', None, 'drop', 'before', 1, None)]";
    let as_before = || find(&json()) == want;
    assert!(wait_until(PATIENCE, as_before), "{}", find(&json()));
    let tunnel =
        "[(a['tunnel'], a['target'], a['line']) for a in d['apps'] if a['state'] == 'tunnel']";
    assert_eq!(query(&json(), tunnel), "[('vxlan', 'direct', None)]");
    let text = apps(&ground, &config, &[]).out;
    assert!(text.contains(&format!("removed cgroup (id {id})  ")), "{text}");
    assert!(text.contains("vxlan of the kernel, no cgroup  "), "{text}");
    daemon.stop_clean();

    // below a root that is not all of the tree, nobody can know
    let json = apps(&ground, "", &["--json"]).out;
    let state = query(&json, &format!("[a['state'] for a in d['apps'] if a['id'] == {id}]"));
    assert_eq!(state, "['elsewhere']");
}

/// Anybody may ask, and sees everybody.
#[test]
fn without_root() {
    let ground = ground!("apps-nobody");
    let sync = ground.cgroup("/services/sync");
    let _flow = flow(&sync, libc::SOCK_DGRAM, addr(REMOTE4, 53));
    let file = nobodys_binary().parent().expect("a directory").join("apps.conf");
    fs::write(&file, format!("[global]\ncgroup-root = {}\n{CONFIG}", ground.root.display()))
        .expect("write");
    let file = file.to_str().expect("UTF-8");

    let said = as_nobody(&["-c", file, "apps", "--suggest"]);
    assert_eq!((said.code, &*said.out), (Some(0), "mihomo = service:sync\n"), "{}", said.err);

    // a directory that only its owner may read hides what is below
    let secret = ground.cgroup("/services/secret/instance1");
    let _other = flow(&secret, libc::SOCK_DGRAM, addr(REMOTE4, 53));
    crate::ground::chmod(secret.parent().expect("a parent"), 0o700);
    let said = as_nobody(&["-c", file, "apps", "--json"]);
    let hidden = query(&said.out, "[a['state'] for a in d['apps'] if a['cgroup'] is None]");
    assert_eq!(hidden, "['elsewhere']");
    assert_eq!(query(&said.out, "{a['user'] for a in d['apps']}"), format!("{{'{}'}}", me()));
}

/// One row for each user of a cgroup.
#[test]
fn users_of_a_cgroup() {
    let ground = ground!("apps-users");
    let sync = ground.cgroup("/services/sync");
    let _flow = flow(&sync, libc::SOCK_DGRAM, addr(REMOTE4, 53));
    let theirs = flow(&sync, libc::SOCK_DGRAM, addr(REMOTE4, 53));
    nix::unistd::fchown(&theirs, Some(Uid::from_raw(65533)), None).expect("fchown");
    let json = apps(&ground, CONFIG, &["--json"]).out;
    let users = of(&json, "/services/sync", "(a['user'], a['uid'], a['flows'])");
    assert_eq!(users, format!("[('{}', 0, 1), ('65533', 65533, 1)]", me()));
    assert_eq!(query(&json, "d['lines']"), "['mihomo = service:sync']");
}

/// Proxied connections are their clients' flows, and none of the proxy's.
#[test]
fn a_proxy_and_its_clients() {
    let (ground, _world) = scene!("apps-proxy");
    let aria2 = ground.cgroup("/services/aria2");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    await_member(&aria2, "mihomo");
    let listener =
        TcpListener::from(bind(addr(IpAddr::from([0, 0, 0, 0]), 7893), libc::SOCK_STREAM));
    // SAFETY: an open socket.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 8) }, 0);
    let _client = flow(&aria2, libc::SOCK_STREAM, addr(REMOTE4, 80));
    let (_taken, _) = listener.accept().expect("the proxy is handed the connection");
    let json = apps(&ground, CONFIG, &["--json"]).out;
    assert_eq!(of(&json, "/services/aria2", "a['flows'], a['local']"), "[(1, 0)]");
    let others =
        "[(a['flows'], a['local']) for a in d['apps'] if a['cgroup'] != '/services/aria2']";
    assert_eq!(query(&json, others), "[(0, 1)]");
    daemon.stop_clean();
}

/// A UDP socket that took the port it was given speaks first, wherever to.
#[test]
fn unconnected_datagram_sockets() {
    let (ground, _world) = scene!("apps-udp");
    let sync = ground.cgroup("/services/sync");
    let socket = udp_in(&sync, REMOTE4);
    socket.send_to(b"who?", addr(REMOTE4, 80)).expect("send");
    let json = apps(&ground, CONFIG, &["--json"]).out;
    let said = of(&json, "/services/sync", "a['flows'], a['remotes'], a['line']");
    assert_eq!(said, "[(1, [], 'mihomo = service:sync')]");
}
