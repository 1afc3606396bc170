//! Matches that are not a regex: services and applications by their names, and the owners of sockets.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::sys::wait::waitpid;

use crate::client::{
    expect, expect_as, fork_into, under, Client, Outcome, Running, PATIENCE, SILENCE,
};
use crate::daemon::{run_with, Daemon, UNOWNED};
use crate::ground::{addr, pipe, Ground, REMOTE4, REMOTE6};
use crate::kernel::{forget_flows, load, SETTLE};
use crate::tools::query;
use crate::wait_until;
use crate::world::{bind, raw_addr, set, Server, World, PROXY, STREAM_PORT};

const USER: &str = "/user.slice/user-1000.slice/user@1000.service/app.slice";

const NAMED: &str = "[tproxy mihomo]\nport = 7893\n[rules]\n\
                     direct = /services/aria2/free\n\
                     mihomo = service:aria2, wg-quick@wg0\n\
                     drop = app:com.a-b.C,firefox\n\
                     mihomo = /user\\.slice/.*/app-firefox-2\\.scope\n";

/// Cgroups as init systems and desktops name them, `~` being the slice of a user's applications, and
/// their targets under [`NAMED`].
fn named() -> [(String, &'static str); 16] {
    [
        ("/services/aria2/instance1", "mihomo"),
        ("/services/aria2/free", "direct"),
        ("/openrc.aria2", "mihomo"),
        ("/aria2", "mihomo"),
        ("/system.slice/aria2.service/below", "mihomo"),
        ("/system.slice/system-aria2.slice/aria2@x.service", "mihomo"),
        ("/system.slice/a.slice/wg-quick@wg0.service", "mihomo"),
        ("/system.slice/wg-quick@wg1.service", "direct"),
        ("/system.slice/aria2-helper.service", "direct"),
        ("/x/services/aria2", "direct"),
        ("~/app-gnome-firefox-1.scope", "drop"),
        ("~/app-firefox-2.scope", "drop"),
        ("~/snap.firefox.firefox-1.scope", "drop"),
        (r"~/app-flatpak-com.a\x2db.C-4711.scope", "drop"),
        ("~/app-firefox2-1.scope", "direct"),
        ("/system.slice/app-firefox-1.scope", "direct"),
    ]
    .map(|(path, target)| (path.replace('~', USER), target))
}

/// Services and applications go the way of their names, in order with regexes, whether they were there
/// before the daemon or came later; and `explain` says so.
#[test]
fn services_and_applications_by_name() {
    let (ground, _world, _proxy) = scene!("byname", proxy);
    let named = named();
    let (before, after) = named.split_at(named.len() / 2);
    let make = |part: &[(String, &str)]| part.iter().for_each(|at| drop(ground.cgroup(&at.0)));
    make(before);
    let daemon = Daemon::start(&ground, NAMED, &[]);
    make(after);

    for (path, target) in &named {
        let said = daemon.ask(&["explain", path]).fine();
        assert!(said.contains(&format!("    target  {target}\n")), "{path}: {said}");
    }

    let wants = named.map(|(path, target)| {
        (ground.at(&path), under(if target == "mihomo" { PROXY } else { target }))
    });
    expect(&wants.each_ref().map(|(at, answers)| (&**at, answers.clone())));
    daemon.stop_clean();
}

/// `explain` tells what a name became, `check` how many cgroups it covers.
#[test]
fn what_a_name_became_is_told() {
    let ground = ground!("bynamesaid");
    named().iter().for_each(|(path, _)| drop(ground.cgroup(path)));

    let explain = run_with(&ground, NAMED, &["explain", "/openrc.aria2"]).fine();
    let check = run_with(&ground, NAMED, &["check"]).out;

    for line in [
        ": mihomo = service:aria2, wg-quick@wg0\n",
        "    means   /(?:services/|openrc\\.)?aria2\n",
        "    means   /system\\.slice/(?:[^/]+/)*wg-quick@wg0\\.service\n",
        "    matches /openrc.aria2\n",
    ] {
        assert!(explain.contains(line), "no {line:?} in\n{explain}");
    }
    for line in
        [": mihomo = service:aria2, wg-quick@wg0: decides for 8 cgroups", "tproxies: 1, rules: 4"]
    {
        assert!(check.contains(line), "no {line:?} in\n{check}");
    }
}

/// Lines for users and groups in front of, between and behind those for cgroups.
const OWNERS: &str = "
[tproxy mihomo]
port = 7893
[rules]
direct = /services/first
drop   = user:2001
mihomo = user:2002-2003
direct = group:2004
mihomo = /services/app
drop   = user:2005,3000-3999
direct = /services/last
mihomo = group:2006,0
";

/// The same the other way round.
const OTHERS: &str = "
[global]
default = mihomo
[tproxy mihomo]
port = 7893
[rules]
drop   = /services/first
direct = user:2001
drop   = group:2002-2004
direct = /services/app
mihomo = /services/last
direct = user:2005,0
";

const USERS: [u32; 9] = [0, 2000, 2001, 2002, 2003, 2004, 2005, 2006, 3500];

/// What the manual says of a socket, line by line.
fn covered(config: &str, cgroup: &str, uid: u32) -> String {
    let lines = config.lines().skip_while(|line| *line != "[rules]").skip(1);
    let covers = |what: &str| {
        let Some((_, ids)) = what.split_once(':') else {
            return cgroup == what;
        };
        ids.split(',').any(|ids| {
            let (first, last) = ids.split_once('-').unwrap_or((ids, ids));
            (first.parse().expect("a number")..=last.parse().expect("a number")).contains(&uid)
        })
    };
    let mut lines =
        lines.filter_map(|line| line.split_once('=').map(|(t, w)| (t.trim(), w.trim())));
    let default = if config.contains("default = mihomo") { "mihomo" } else { "direct" };
    lines.find(|(_, what)| covers(what)).map_or(default, |(target, _)| target).to_string()
}

/// TCP, UDP and ping over both families, of each user in each cgroup.
fn each_goes_its_way(ground: &Ground, config: &str, when: &str) {
    println!("{when}");
    for uid in USERS {
        let wants = ["/services/first", "/services/app", "/services/last", "/other"].map(|path| {
            let target = covered(config, path, uid);
            (ground.at(path), under(if target == "mihomo" { PROXY } else { &target }))
        });
        let wants: Vec<_> = wants.iter().map(|(at, answers)| (&**at, answers.clone())).collect();
        println!("uid {uid}");
        // a user's group has his number
        expect_as(|client| client.uid(uid), &wants);
    }
}

/// Whatever became of the daemon, each user in each cgroup goes the way of the first line that covers
/// him.
#[test]
fn the_first_line_that_covers_a_socket_decides() {
    let (ground, _world, _proxy) = scene!("owners", proxy);
    for path in ["/services/first", "/services/last/below", "/other"] {
        ground.cgroup(path);
    }
    let each = |config, when| each_goes_its_way(&ground, config, when);
    let daemon = Daemon::start(&ground, OWNERS, &[]);
    ground.cgroup("/services/app");
    daemon.reload();
    each(OWNERS, "started");
    daemon.reconfigure(OTHERS);
    each(OTHERS, "reloaded");
    daemon.kill9();
    each(OTHERS, "killed");
    let daemon = Daemon::start(&ground, OWNERS, &[]);
    each(OWNERS, "started again");
    daemon.leave();
    each(OWNERS, "left");
    let daemon = Daemon::start_in(&ground, OWNERS, &[], &[UNOWNED]);
    load("delete table inet cgtproxy\n");
    assert!(daemon.wait_log("in force again", SETTLE), "{}", daemon.logs());
    each(OWNERS, "healed");
    assert!(daemon.stop().success());
}

/// Where [`older_flows_of_an_owner`] begin.
const BEFORE: &str =
    "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = user:1\nmihomo = /elsewhere\n";

/// A stream from a remote host to a user of a cgroup.
fn follow(cgroup: &Path, ip: IpAddr, uid: u32) -> Running {
    Client::tcp(cgroup, addr(ip, STREAM_PORT)).uid(uid).follow().spawn()
}

/// Waits until so many streams have been acknowledged from now on.
#[track_caller]
fn streams_go_on(world: &mut World, number: usize) {
    world.wire.packets();
    let mut seen = BTreeSet::new();
    let go_on = || {
        let packets = world.wire.packets().into_iter();
        seen.extend(
            packets.filter(|p| p.dst.port() == STREAM_PORT && p.flags == 0x10).map(|p| p.src),
        );
        seen.len() >= number
    };
    assert!(wait_until(SETTLE, go_on));
}

/// A flow that is older than the line for its owner is ended at once; that of another owner in the
/// same cgroup goes on.
#[test]
fn older_flows_of_an_owner() {
    let (ground, mut world) = scene!("ownerstale");
    let _proxy = Server::start(PROXY, &[7893]);
    let app = ground.cgroup("/app");
    let rules = "[tproxy mihomo]\nport = 7893\n[rules]\n";
    for after in [
        format!("{rules}drop = user:2001\n"),
        format!("{rules}mihomo = user:2000-2001\n"),
        format!("{rules}direct = user:2002\ndrop = /app\n"),
        format!("[global]\ndefault = drop\n{rules}direct = user:2002,0\n"),
    ] {
        println!("{after}");
        let daemon = Daemon::start(&ground, BEFORE, &[]);
        let stale = [REMOTE4, REMOTE6].map(|ip| follow(&app, ip, 2001));
        let fine = [REMOTE4, REMOTE6].map(|ip| follow(&app, ip, 2002));
        streams_go_on(&mut world, 4);

        daemon.reconfigure(&after);

        for running in stale {
            // by us, or by the reset that its next packet met
            let ended = [Errno::ECONNABORTED, Errno::ECONNRESET].map(Outcome::Failed);
            let outcome = running.wait().0;
            assert!(ended.contains(&outcome), "{outcome:?}");
        }
        streams_go_on(&mut world, 2);
        drop(fine);
        assert!(daemon.stop().success());
    }
}

/// Nobody tells the group of a socket, so what a group's line cuts falls silent.
#[test]
fn older_flows_of_a_group() {
    let (ground, mut world) = scene!("groupstale");
    let app = ground.cgroup("/app");
    let daemon = Daemon::start(&ground, BEFORE, &[]);
    let _silent = follow(&app, REMOTE4, 2001);
    streams_go_on(&mut world, 1);

    daemon.reconfigure("[tproxy mihomo]\nport = 7893\n[rules]\ndrop = group:2001\n");
    world.wire.packets();
    expect_as(|client| client.uid(2001), &[(&app, under("drop"))]);

    // the reset that ends it may come after the word of the reload
    let mut left = world.wire.packets();
    left.retain(|p| p.dst.port() == STREAM_PORT && p.flags & 4 == 0);
    assert_eq!(left, []);
}

/// Takes one connection and reads nothing of it until it is told to; then gives the number of bytes
/// until its end, or the error.
struct Sink {
    thread: JoinHandle<std::io::Result<usize>>,
    read: mpsc::Sender<()>,
}

impl Sink {
    /// At a port of this network namespace, for whatever address.
    fn start(at: SocketAddr) -> Sink {
        let fd = bind(at, libc::SOCK_STREAM);
        // little is on its way, so that much is still to be sent when the sender closes
        set(&fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 4096);
        // SAFETY: an open socket.
        assert_eq!(unsafe { libc::listen(fd.as_raw_fd(), 8) }, 0);
        let (read, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let (mut stream, _) = TcpListener::from(fd).accept()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let _ = told.recv();
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            Ok(all.len())
        });
        Sink { thread, read }
    }

    fn end(self) -> std::io::Result<usize> {
        self.read.send(()).expect("it waits");
        self.thread.join().expect("it does not panic")
    }
}

/// A process of a user that fills its connection's buffer, closes it and ends. Gives how much that was.
fn fill_and_close(cgroup: &Path, uid: u32, to: SocketAddr) -> usize {
    let (read, write) = pipe();
    let cgroup = File::open(cgroup).expect("open the cgroup");
    let (raw, len) = raw_addr(to);
    let child = || {
        // SAFETY: system calls on integers and on live values.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::syscall(libc::SYS_setresgid, uid, uid, uid);
            libc::syscall(libc::SYS_setresuid, uid, uid, uid);
            let family = i32::from(raw.ss_family);
            let fd = libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            let mut sent = -1i64;
            if libc::connect(fd, (&raw const raw).cast(), len) == 0 {
                sent = 0;
                loop {
                    let some =
                        libc::send(fd, [7u8; 4096].as_ptr().cast(), 4096, libc::MSG_DONTWAIT);
                    if some < 0 {
                        break;
                    }
                    sent += some as i64;
                }
            }
            libc::close(fd);
            libc::write(write.as_raw_fd(), (&raw const sent).cast(), 8);
        }
        0
    };
    // SAFETY: the child makes system calls only.
    let pid = unsafe { fork_into(&cgroup, child) }.expect("fork into the cgroup");
    waitpid(pid, None).expect("reap the child");
    drop(write);
    let mut bytes = [0; 8];
    File::from(read).read_exact(&mut bytes).expect("the child reports");
    usize::try_from(i64::from_ne_bytes(bytes)).expect("connected")
}

/// What the kernel still sends once a process has closed its socket has no owner: it goes where the
/// flow went, though others' sockets of the cgroup go elsewhere.
#[test]
fn what_is_left_of_a_closed_socket_goes_its_way() {
    let (ground, mut world) = scene!("ownerclose");
    let rules = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = user:2001\nmihomo = user:2002\n\
                 drop = /drop\nmihomo = /proxied\ndirect = /direct\n";
    let daemon = Daemon::start(&ground, rules, &[]);
    for default in ["direct", "drop", "mihomo"] {
        daemon.reconfigure(&format!("[global]\ndefault = {default}\n{rules}"));
        for (path, ip) in ["/drop", "/proxied", "/direct", "/other"]
            .into_iter()
            .flat_map(|path| [REMOTE4, REMOTE6].map(|ip| (path, ip)))
        {
            println!("default {default}, {path}, {ip}");
            let cgroup = ground.cgroup(path);
            let direct = ground.outside(|| Sink::start(any(ip, 7000)));
            let sent = fill_and_close(&cgroup, 2001, addr(ip, 7000));
            assert_eq!(direct.end().expect("to its end"), sent);
            let proxied = Sink::start(any(ip, 7893));
            let sent = fill_and_close(&cgroup, 2002, addr(ip, 7001));
            assert!(sent > 50_000, "{sent}");
            assert_eq!(proxied.end().expect("to its end"), sent);
            // nor does it leave once conntrack has forgotten it: the kernel asks for room in some
            // 0.2 s, and goes on when the proxy has spoken
            let forgotten = Sink::start(any(ip, 7893));
            let sent = fill_and_close(&cgroup, 2002, addr(ip, 7001));
            forget_flows();
            thread::sleep(2 * SILENCE);
            assert_eq!(forgotten.end().expect("to its end"), sent);
            // the other flow may still say goodbye
            let mut left = world.wire.to_remote();
            left.retain(|p| p.dst.port() == 7001);
            assert_eq!(left, []);
        }
    }
    assert!(daemon.stop().success());
}

/// The same where all that comes behind lines for owners goes directly, so that what goes directly is
/// not known by that.
#[test]
fn what_is_left_of_a_closed_socket_among_direct_ones() {
    let (ground, mut world) = scene!("ownerleft");
    let rules = "[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = user:2002\n\
                 direct = /direct\ndrop = user:2003\n";
    let daemon = Daemon::start(&ground, rules, &[]);
    for (path, ip) in
        ["/direct", "/other"].into_iter().flat_map(|path| [REMOTE4, REMOTE6].map(|ip| (path, ip)))
    {
        println!("{path}, {ip}");
        let cgroup = ground.cgroup(path);
        let forgotten = Sink::start(any(ip, 7893));
        let sent = fill_and_close(&cgroup, 2002, addr(ip, 7001));
        forget_flows();
        thread::sleep(2 * SILENCE);
        assert_eq!(forgotten.end().expect("to its end"), sent);
        // the direct flow before may still say goodbye
        let mut left = world.wire.to_remote();
        left.retain(|p| p.dst.port() == 7001);
        assert_eq!(left, []);
        let direct = ground.outside(|| Sink::start(any(ip, 7000)));
        let sent = fill_and_close(&cgroup, 2001, addr(ip, 7000));
        assert_eq!(direct.end().expect("to its end"), sent);
    }
    assert!(daemon.stop().success());
}

/// Any address of the family of `ip`.
fn any(ip: IpAddr, port: u16) -> SocketAddr {
    match ip.is_ipv4() {
        true => SocketAddr::from(([0; 4], port)),
        false => SocketAddr::from(([0u16; 8], port)),
    }
}

/// `explain` of a path names the lines for owners that would come first; of a process it decides with
/// the process's own.
#[test]
fn explain_and_check_name_owners() {
    let ground = ground!("ownersaid");
    let said = |args: &[&str]| run_with(&ground, OWNERS, args).out;
    let app = said(&["explain", "/services/app/x", "/services/first", "/cgtproxy/drop"]);
    let lines: Vec<&str> =
        app.lines().map(|line| line.rsplit(".conf:").next().unwrap_or(line)).collect();
    let want = [
        "/services/app/x",
        "    target  mihomo",
        "10: mihomo = /services/app",
        "7: drop = user:2001",
        "8: mihomo = user:2002-2003",
        "9: direct = group:2004",
        "    matches /services/app, an ancestor",
        "/services/first",
        "    target  direct",
        "6: direct = /services/first",
        "    matches /services/first",
        "/cgtproxy/drop",
        "    target  drop",
        "    rule    built in: drop = /cgtproxy/drop",
        "    matches /cgtproxy/drop",
    ];
    assert_eq!(lines, want);
    assert_eq!(app.matches("    unless  /").count(), 3, "{app}");

    for (uid, path, target, line, by_owner) in [
        (2001, "/services/app", "drop", "drop = user:2001", true),
        (2001, "/services/first", "direct", "direct = /services/first", false),
        (2004, "/services/last", "direct", "direct = group:2004", true),
        (2006, "/services/last", "direct", "direct = /services/last", false),
        (2006, "/other", "mihomo", "mihomo = group:2006,0", true),
        (2000, "/other", "direct", "no rule matches", false),
    ] {
        let cgroup = ground.cgroup(path);
        let port = SocketAddr::from(([127, 0, 0, 1], 7100));
        let process = Client::udp(&cgroup, port).uid(uid).serve();
        let said = said(&["explain", "--pid", &process.pid().to_string()]);
        assert!(said.contains(&format!("    target  {target}\n")), "{uid} {path}: {said}");
        assert!(said.contains(line) && !said.contains("unless"), "{uid} {path}: {said}");
        let owner = format!("    owner   uid {uid}, gid {uid}\n");
        assert_eq!(said.contains(&owner), by_owner, "{uid} {path}: {said}");
    }
}

/// `check` names the owners that a line decides for, and one who does not exist.
#[test]
fn check_names_owners() {
    let ground = ground!("ownerscheck");

    let check = run_with(&ground, OWNERS, &["check"]).out;

    for line in [
        ": drop   = user:2001: decides for sockets of uid 2001\n",
        ": direct = group:2004: decides for sockets of gid 2004\n",
        ": drop   = user:2005,3000-3999: decides for sockets of uid 2005, uids 3000-3999\n",
        "tproxies: 1, rules: 8\n",
    ] {
        let line = line.replace("drop   =", "drop =");
        assert!(check.contains(&line), "no {line:?} in\n{check}");
    }

    let unknown = "[rules]\ndrop = user:nobody-of-that-name\n";
    let said = run_with(&ground, unknown, &["check"]);
    let why = "no such user: \"nobody-of-that-name\"";
    assert!(said.code == Some(2) && said.out.contains(why), "{said:?}");
}

/// What a bypass-user sends is left alone whatever the target: who is asked says so, and `exec` does
/// not promise another way.
#[test]
fn a_bypass_user_has_no_target() {
    let (ground, _world, _proxy) = scene!("bypassuser", proxy);
    let config = "[global]\nbypass-user = 2001\ndefault = mihomo\n[tproxy mihomo]\nport = 7893\n\
                  [rules]\nmihomo = user:2001\nmihomo = /app\n";
    let daemon = Daemon::start(&ground, config, &[]);
    let said = |args: &[&str]| {
        let said = run_with(&ground, config, args);
        (said.code, said.all())
    };
    let cgroups = ["/app", "/other"].map(|path| ground.cgroup(path));
    for cgroup in &cgroups {
        expect_as(|client| client.uid(2001), &[(cgroup, under("direct"))]);
        expect_as(|client| client.uid(2002), &[(cgroup, under(PROXY))]);
        let port = SocketAddr::from(([127, 0, 0, 1], 7100));
        let process = Client::udp(cgroup, port).uid(2001).serve();
        let (_, explained) = said(&["explain", "--pid", &process.pid().to_string()]);
        assert!(explained.contains("    target  direct\n    rule    bypass-user"), "{explained}");
        let (_, apps) = said(&["apps", "--json"]);
        let of = "[(a['target'], a['decides'], a['line']) for a in d['apps'] if a['uid'] == 2001]";
        assert_eq!(query(&apps, of), "[('direct', 'bypass-user', None)]", "{apps}");
    }
    for (user, target, status) in
        [("2001", "mihomo", 1), ("2001", "drop", 1), ("2001", "direct", 0), ("2002", "mihomo", 0)]
    {
        let (code, text) = said(&["exec", "-u", user, target, "--", "true"]);
        assert_eq!(code, Some(status), "{user} {target}: {text}");
        assert_eq!(text.contains("bypass-user"), status == 1, "{text}");
    }
    assert!(daemon.stop().success());
}

/// `exec` comes before all lines.
#[test]
fn exec_comes_before_owners() {
    let (ground, _world, _proxy) = scene!("ownerexec", proxy);
    let rules = "[tproxy mihomo]\nport = 7893\n[rules]\ndrop = user:0-4000\ndirect = /x\n";
    let daemon = Daemon::start(&ground, rules, &[]);
    ground.cgroup("/cgtproxy/mihomo");
    daemon.reload();
    expect(&[
        (&ground.at("/cgtproxy/mihomo"), under(PROXY)),
        (&ground.cgroup("/x"), under("drop")),
    ]);
    let said = run_with(&ground, rules, &["exec", "-u", "nobody", "direct", "--", "true"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert!(daemon.stop().success());
}
