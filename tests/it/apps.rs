//! `apps`: who talks, what decides about it, and lines for `[rules]`.

use std::ffi::OsStr;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::unistd::{geteuid, Uid, User};

use crate::client::{connect, socket_in, udp_in, PATIENCE};
use crate::daemon::{run_with, write_private, Daemon, Said};
use crate::ground::{addr, ip_batch, Ground, HOST4, REMOTE4, REMOTE6};
use crate::json::is_documented;
use crate::kernel::{await_member, cgroup_id};
use crate::tools::{as_nobody, nobodys_binary, query};
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

#[test]
fn who_talks_and_what_decides() {
    let (ground, _world) = scene!("apps");
    let _local = Server::at("local", &[addr(HOST4, 8080)]);
    let aria2 = ground.cgroup("/services/aria2/instance1");
    let sync = ground.cgroup("/services/sync/instance1");
    let web = ground.cgroup("/services/web/instance1");
    let proxy = ground.cgroup("/services/box/instance1");
    let (tcp, udp) = (libc::SOCK_STREAM, libc::SOCK_DGRAM);
    let _flows = [
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
    let _listener = listener(&web, 81);
    let asks = || std::net::TcpStream::connect(addr(HOST4, 81)).expect("connect from outside");
    let _asks = ground.outside(asks);
    let accepted = TcpListener::from(_listener.try_clone().expect("clone"));
    let _accepted = accepted.accept().expect("accept");

    let json = apps(&ground, CONFIG, &["--json"]).out;
    is_documented("apps", &json);
    let row = "a['flows'], a['inbound'], a['local'], a['protocols'], a['target'], a['decides']";
    let said = of(&json, "/services/aria2/instance1", row);
    assert_eq!(said, "[(4, 0, 0, ['tcp', 'udp'], 'mihomo', 'rule')]");
    let remotes = of(&json, "/services/aria2/instance1", "a['remotes']");
    assert_eq!(remotes, "[['[2001:db8:2::7]:80', '203.0.113.7:80']]");
    let rule = of(&json, "/services/aria2/instance1", "(a['rule']['line'], a['rule']['match'])");
    assert!(rule.ends_with(", 'service:aria2')]"), "{rule}");
    let said = of(&json, "/services/sync/instance1", row);
    assert_eq!(said, "[(1, 0, 1, ['udp'], 'direct', 'default')]");
    let line = |path| of(&json, path, "a['line']");
    assert_eq!(line("/services/sync/instance1"), "['mihomo = service:sync']");
    assert_eq!(line("/services/aria2/instance1"), "[None]");
    // a line must not send a proxy to itself
    assert_eq!(line("/services/box/instance1"), "['direct = service:box']");
    let said = of(&json, "/services/web/instance1", "a['flows'], a['listens'], a['line']");
    assert_eq!(said, "[(0, [{'protocol': 'tcp', 'port': 81}], None)]");
    let user = of(&json, "/services/web/instance1", "(a['user'], a['uid'])");
    assert_eq!(user, format!("[('{}', {})]", me(), geteuid()));
    // what is accepted is the listener's cgroup's, whoever accepts it
    assert_eq!(of(&json, "/services/web/instance1", "a['inbound']"), "[1]");

    let text = apps(&ground, CONFIG, &[]).out;
    let columns = |name: &str| -> Vec<String> {
        let line = text.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
        let columns = line.split("  ").map(str::trim).filter(|column| !column.is_empty());
        columns.map(String::from).collect()
    };
    assert_eq!(columns("/services/aria2/")[2..5], ["4", "tcp udp", "mihomo"]);
    assert!(columns("/services/aria2/")[5].ends_with(".conf:7"), "{text}");
    assert_eq!(
        columns("/services/sync/")[2..],
        ["1", "udp", "direct", "default", "203.0.113.7:53"]
    );
    assert_eq!(columns("/services/web/")[2..], ["tcp:81", "1", "0"]);
    let lines = "\n    mihomo = service:sync\n";
    assert!(text.contains(lines), "{text}");
    let suggested = apps(&ground, CONFIG, &["--suggest"]).out;
    assert_eq!(suggested.lines().count(), 2, "{suggested}");
    assert!(suggested.contains("direct = service:box\n"), "{suggested}");
}

/// Cgroups with the names that init systems, desktops and containers give, and some that nobody
/// would: what is suggested for each decides for it, and for nothing beside it.
#[test]
fn what_is_suggested_decides() {
    let ground = ground!("apps-suggest");
    let user = "/user.slice/user-1000.slice/user@1000.service";
    let names: Vec<Vec<u8>> = [
        "/services/sync/instance1",
        "/services/sing-box",
        "/openrc.transmission-daemon",
        "/transmission",
        "/system.slice/nginx.service",
        r"/system.slice/system-wg\x2dquick.slice/wg-quick@wg0.service",
        "/system.slice/_cpu.service",
        "/system.slice/docker-0f3a9c.scope",
        "/docker/0f3a9c",
        "/machine.slice/libpod-0f3a9c.scope/container",
        "/system.slice/snap.lxd.daemon.service",
        "/lxc.payload.web",
        "/user.slice/user-1000.slice/session-3.scope",
        &format!("{user}/app.slice/app-flatpak-org.mozilla.firefox-4711.scope"),
        &format!(r"{user}/app.slice/app-gnome-jetbrains\x2dtoolbox-42.scope"),
        &format!("{user}/app.slice/snap.firefox.firefox-3dcfaa86-bf58-4d3e.scope"),
        &format!("{user}/app.slice/dbus-:1.2-org.gnome.Nautilus@0.service"),
        &format!("{user}/session.slice/pipewire.service"),
        "/a b ",
        "/ leading",
        "/#;=\"'",
        "/(a|b)*[c]{2}?+^$.\\",
        "/\u{1b}[31m\t\r",
        "/grün/\u{202e}x",
        // the same names twice, so that none is the only one
        "/services/twice",
        "/system.slice/twice.service",
    ]
    .iter()
    .map(|name| name.as_bytes().to_vec())
    .chain([b"/\xff\xfe".to_vec(), b"/x\xc3".to_vec()])
    .collect();
    let flows: Vec<_> = names
        .iter()
        .map(|name| {
            let dir = ground.root.join(OsStr::from_bytes(&name[1..]));
            fs::create_dir_all(&dir).expect("make a cgroup");
            flow(&dir, libc::SOCK_DGRAM, addr(REMOTE4, 53))
        })
        .collect();
    let lines = apps(&ground, CONFIG, &["--suggest"]).out;
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), names.len(), "{lines:#?}");
    drop(flows);
    // behind the lines that are there, as they would be pasted
    let explained = |line: &str, path: &[u8]| -> String {
        let file = ground.dir.join("suggested.conf");
        write_private(&file, &format!("[tproxy mihomo]\nport = 7893\n[rules]\n{line}\n"));
        let mut command = std::process::Command::new(crate::daemon::binary());
        command.arg("-c").arg(&file).arg("explain").arg(OsStr::from_bytes(path));
        let said: Said = command.output().expect("start cgtproxy").into();
        assert_eq!((said.code, &*said.err), (Some(0), ""), "{line}");
        let target = said.out.lines().find_map(|line| line.trim().strip_prefix("target"));
        target.unwrap_or_default().trim().to_owned()
    };
    for name in &names {
        let deciding =
            lines.iter().filter(|line| explained(line, name) == "mihomo").collect::<Vec<_>>();
        assert_eq!(deciding.len(), 1, "{}: {deciding:?}", name.escape_ascii());
    }
    // and all of them together, in a file that is right
    let all = lines.join("\n");
    for name in &names {
        assert_eq!(explained(&all, name), "mihomo", "{}", name.escape_ascii());
    }
    assert!(lines.contains(&"mihomo = app:org.mozilla.firefox"), "{lines:#?}");
    assert!(lines.contains(&"mihomo = service:nginx"), "{lines:#?}");
    assert!(lines.contains(&"mihomo = /services/twice"), "{lines:#?}");
}

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
