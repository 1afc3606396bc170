//! Resolvers as dns-hijack addresses: asked by applications and by LAN clients of two subnets, over
//! each protocol and family, listening on the wildcard addresses or on each of this host's.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{application, report, which, Process, Verdict};
use crate::daemon::Daemon;
use crate::gateway::{Lan, LAN4, LAN6};
use crate::ground::{ip, ip_batch, Ground, REMOTE4, REMOTE6};
use crate::kernel::await_member;
use crate::wait_until;
use crate::world::World;

struct Resolver {
    name: &'static str,
    /// The command, for a private directory and whether it listens on each address by itself.
    launch: fn(&Path, &Path, bool) -> Command,
}

const RESOLVERS: [Resolver; 2] =
    [Resolver { name: "dnsmasq", launch: dnsmasq }, Resolver { name: "unbound", launch: unbound }];

/// This host's addresses in the second subnet of the LAN.
const FURTHER4: &str = "198.51.101.1";
const FURTHER6: &str = "2001:db8:5::1";

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

fn try_resolver(resolver: &Resolver, each: bool) -> bool {
    let Some(ground) = Ground::new("resolver") else {
        return true;
    };
    let how = if each { "on each address" } else { "on the wildcard addresses" };
    let who = format!("{} {how}", resolver.name);
    let Some(program) = which(resolver.name) else {
        return report(&who, "start", Err(format!("SKIP: no {}", resolver.name)));
    };
    let mut world = World::new(&ground);
    let lan = Lan::new(&ground);
    let lines =
        format!("addr add {FURTHER4}/24 dev br-lan\naddr add {FURTHER6}/64 dev br-lan nodad\n");
    ip_batch(&[], &lines);
    lan.client(1).run(|| {
        let lines = format!(
            "addr flush dev eth0 scope global\n\
             addr add 198.51.101.11/24 dev eth0\n\
             addr add 2001:db8:5::11/64 dev eth0 nodad\n\
             route add default via {FURTHER4}\n\
             route replace default via {FURTHER6} dev eth0\n"
        );
        ip_batch(&[], &lines);
    });
    let proxied = ground.cgroup("/proxied");
    let server = ground.cgroup("/server");
    let mut command = (resolver.launch)(&program, &ground.dir, each);
    let _process = match Process::start(&mut command, Some(&server)) {
        Ok(process) => process,
        Err(why) => return report(&who, "start", Err(why)),
    };
    let mut up = Ok(());
    wait_until(Duration::from_secs(20), || {
        up = dig(&ground.root, 1053, false, ip("127.0.0.1"));
        up.is_ok()
    });
    if up.is_err() {
        return report(&who, "start", up);
    }
    let _daemon = Daemon::start(&ground, CONFIG, &[]);
    await_member(&proxied, "mihomo");
    let mut well = true;
    for (v, remote, near, far) in
        [("IPv4", REMOTE4, LAN4, FURTHER4), ("IPv6", REMOTE6, LAN6, FURTHER6)]
    {
        for (protocol, tcp) in [("UDP", false), ("TCP", true)] {
            let loopback = ip(if v == "IPv4" { "127.0.0.53" } else { "::1" });
            let client = |i: usize, to| lan.client(i).run(|| dig(&ground.root, 53, tcp, to));
            let cases: [(&str, &dyn Fn() -> Verdict); 8] = [
                ("an application", &|| dig(&proxied, 53, tcp, remote)),
                ("an application asks loopback", &|| dig(&proxied, 53, tcp, loopback)),
                ("an application asks the LAN address", &|| dig(&proxied, 53, tcp, ip(far))),
                ("a LAN client", &|| client(0, remote)),
                ("a LAN client asks this host", &|| client(0, ip(near))),
                ("a LAN client of the second subnet", &|| client(1, remote)),
                ("a LAN client of the second subnet asks this host", &|| client(1, ip(far))),
                ("a LAN client of the second subnet asks the first", &|| client(1, ip(near))),
            ];
            for (what, case) in cases {
                world.wire.packets();
                let verdict = case().and_then(|()| match world.wire.to_remote()[..] {
                    [] => Ok(()),
                    ref left => Err(format!("{} packets on the wire", left.len())),
                });
                well &= report(&who, &format!("{what}, {protocol}, {v}"), verdict);
            }
        }
    }
    well
}

#[test]
#[ignore = "make real-test runs it"]
fn resolvers() {
    let only = std::env::var("ONLY").unwrap_or_default();
    let wanted =
        RESOLVERS.iter().filter(|r| only.is_empty() || only.split(' ').any(|o| o == r.name));
    let tried = wanted.flat_map(|r| [(r, false), (r, true)]);
    let failed: Vec<_> =
        tried.filter(|(r, each)| !try_resolver(r, *each)).map(|(r, _)| r.name).collect();
    assert!(failed.is_empty(), "failed with {failed:?}");
}
