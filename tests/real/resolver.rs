//! Resolvers as dns-hijack addresses: asked by applications and by LAN clients of two subnets, over
//! each protocol and family, listening on the wildcard addresses or on each of this host's.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{application, report, try_all, which, Process, Verdict};
use crate::daemon::Daemon;
use crate::gateway::{second_subnet, Lan, FURTHER4, FURTHER6, LAN4, LAN6};
use crate::ground::{ip, Ground, REMOTE4, REMOTE6};
use crate::kernel::await_member;
use crate::wait_until;
use crate::world::World;

struct Resolver {
    name: &'static str,
    /// Whether it listens on each address by itself.
    each: bool,
    /// The command, for a private directory and that.
    launch: fn(&Path, &Path, bool) -> Command,
}

const RESOLVERS: [Resolver; 4] = [
    Resolver { name: "dnsmasq", each: false, launch: dnsmasq },
    Resolver { name: "dnsmasq", each: true, launch: dnsmasq },
    Resolver { name: "unbound", each: false, launch: unbound },
    Resolver { name: "unbound", each: true, launch: unbound },
];

const CONFIG: &str = "
[tproxy mihomo]
port = 7893
dns-hijack = 127.0.0.1:1053
dns-hijack = [::1]:1053
dns-hijack-tcp = yes
dns-hijack-local = yes
[rules]
mihomo = /proxied
[gateway lan]
interface = br-lan
target = mihomo
";

const ANSWER: &str = "198.18.0.1";

fn dnsmasq(program: &Path, dir: &Path, each: bool) -> Command {
    let mut command = Command::new(program);
    command.args(["-k", "-C", "/dev/null", "-p", "1053", "--no-resolv", "--no-hosts"]);
    // a file of its own: dnsmasq unlinks whatever it is told to write its pid to
    command.arg("-x").arg(dir.join("dnsmasq.pid"));
    command.args(["-u", "root", &format!("--address=/example.org/{ANSWER}")]);
    command.args(each.then_some("--bind-interfaces"));
    command
}

fn unbound(program: &Path, dir: &Path, each: bool) -> Command {
    let addresses = match each {
        true => &["127.0.0.1", "::1", LAN4, LAN6, FURTHER4, FURTHER6][..],
        false => &["0.0.0.0", "::0"],
    };
    let interfaces: String =
        addresses.iter().map(|address| format!(" interface: {address}\n")).collect();
    let text = format!(
        "server:\n{interfaces} port: 1053\n do-daemonize: no\n chroot: \"\"\n username: \"\"\n \
         pidfile: \"\"\n use-syslog: no\n directory: \"{}\"\n module-config: \"iterator\"\n \
         access-control: 0.0.0.0/0 allow\n access-control: ::0/0 allow\n \
         local-zone: \"example.org.\" static\n local-data: \"example.org. A {ANSWER}\"\n\
         remote-control:\n control-enable: no\n",
        dir.display()
    );
    let file = dir.join("unbound.conf");
    std::fs::write(&file, text).expect("write a configuration");
    let mut command = Command::new(program);
    command.args(["-d", "-p", "-c"]).arg(file);
    command
}

fn dig(cgroup: &Path, port: u16, tcp: bool, resolver: IpAddr) -> Verdict {
    let (at, port) = (format!("@{resolver}"), port.to_string());
    let mut words = vec!["dig", "+short", "+tries=1", "+time=2", "-p", &port, "example.org", &at];
    words.extend(tcp.then_some("+tcp"));
    match application(cgroup, &words)?.trim() {
        ANSWER => Ok(()),
        other => Err(format!("dig says {other:?}")),
    }
}

/// The resolver at port 1053, once it answers.
fn serve(resolver: &Resolver, ground: &Ground) -> Result<Process, String> {
    let program = which(resolver.name).ok_or(format!("SKIP: no {}", resolver.name))?;
    let mut command = (resolver.launch)(&program, &ground.dir, resolver.each);
    let process = Process::start(&mut command, Some(&ground.cgroup("/server")))?;
    let mut up = Ok(());
    wait_until(Duration::from_secs(20), || {
        up = dig(&ground.root, 1053, false, ip("127.0.0.1"));
        up.is_ok()
    });
    up.map(|()| process)
}

/// What is asked, and by whom.
type Case<'a> = (&'a str, &'a dyn Fn() -> Verdict);

fn answers(resolver: &Resolver, ground: &Ground) -> Result<bool, String> {
    let mut world = World::new(ground);
    let lan = Lan::new(ground);
    second_subnet(&lan);
    let proxied = ground.cgroup("/proxied");
    let _process = serve(resolver, ground)?;
    let _daemon = Daemon::start(ground, CONFIG, &[]);
    await_member(&proxied, "mihomo");
    let how = if resolver.each { "on each address" } else { "on the wildcard addresses" };
    let mut well = true;
    let mut try_each = |cases: &[Case], over: &str| {
        for (what, case) in cases {
            world.wire.packets();
            let verdict = case().and_then(|()| match world.wire.to_remote()[..] {
                [] => Ok(()),
                ref left => Err(format!("{} packets on the wire", left.len())),
            });
            well &=
                report(&format!("{} {how}", resolver.name), &format!("{what}, {over}"), verdict);
        }
    };
    for (v, remote, loopback, near, far) in
        [("IPv4", REMOTE4, "127.0.0.53", LAN4, FURTHER4), ("IPv6", REMOTE6, "::1", LAN6, FURTHER6)]
    {
        let [loopback, near, far] = [loopback, near, far].map(ip);
        for (protocol, tcp) in [("UDP", false), ("TCP", true)] {
            let own = |to| dig(&proxied, 53, tcp, to);
            let client = |i: usize, to| lan.client(i).run(|| dig(&ground.root, 53, tcp, to));
            let cases: [Case; 8] = [
                ("an application", &|| own(remote)),
                ("an application asks loopback", &|| own(loopback)),
                ("an application asks the LAN address", &|| own(far)),
                ("a LAN client", &|| client(0, remote)),
                ("a LAN client asks this host", &|| client(0, near)),
                ("a LAN client of the second subnet", &|| client(1, remote)),
                ("a LAN client of the second subnet asks this host", &|| client(1, far)),
                ("a LAN client of the second subnet asks the first", &|| client(1, near)),
            ];
            try_each(&cases, &format!("{protocol}, {v}"));
        }
    }
    Ok(well)
}

#[test]
#[ignore = "make real-test runs it"]
fn resolvers() {
    try_all(&RESOLVERS, |resolver| resolver.name, answers);
}
