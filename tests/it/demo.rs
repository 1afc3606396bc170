//! `make demo`: the main job, for real, in namespaces that are gone afterwards; prints where each
//! application's traffic went. A test like the others, so that it cannot rot.

use std::path::Path;

use crate::client::{Client, Outcome, Proto};
use crate::daemon::Daemon;
use crate::ground::{addr, ip, Ground, REMOTE4, REMOTE6};
use crate::kernel::{await_member, table};
use crate::world::{Server, World};

const CONFIG: &str = "
[global]
default = direct

[tproxy mihomo]
port = 7893
dns-hijack = 127.0.0.1:1053

[rules]
direct = /services/mihomo
drop   = /services/telemetry
mihomo = /services/(transmission|aria2)
mihomo = /user\\.slice/.*/app-org\\.mozilla\\.firefox.*
";

/// Applications, and whether their cgroup is there before the daemon.
const APPLICATIONS: [(&str, bool); 6] = [
    ("/services/dnsmasq/instance1", true),
    ("/services/telemetry/instance1", true),
    ("/services/transmission/instance1", true),
    ("/services/aria2/instance1", false),
    ("/user.slice/user-1000.slice/app-org.mozilla.firefox-1", false),
    ("/user.slice/user-1000.slice/app-org.gnome.Terminal", false),
];

fn tell(proto: Proto, what: &str, cgroup: &Path, to: std::net::SocketAddr) -> String {
    let timeout = std::time::Duration::from_millis(600);
    let outcome = Client::new(cgroup, proto, to).timeout(timeout).run();
    let fate = match outcome {
        Outcome::Answer(_) => {
            let who = outcome.who();
            match who.split_once(' ') {
                Some(("remote", _)) | Some(("echo", _)) => {
                    "direct: the remote host answered".into()
                }
                Some(("dns", _)) => "hijacked: the local DNS server answered".into(),
                _ => match who.strip_prefix("proxy mihomo ") {
                    Some(to) => format!("PROXIED: mihomo answered, asked for {to}"),
                    None => who,
                },
            }
        }
        Outcome::Refused => "REFUSED at once (reset)".into(),
        Outcome::Timeout | Outcome::Failed(nix::errno::Errno::EPERM) => {
            "DROPPED: nobody answered".into()
        }
        other => format!("{other:?}"),
    };
    println!("    {what:<28} {fate}");
    fate
}

#[test]
#[ignore = "make demo runs it"]
fn demo() {
    let (ground, mut world, proxy) = scene!("demo", proxy);
    let _dns = Server::at("dns", &[addr(ip("127.0.0.1"), 1053)]);
    for (path, _) in APPLICATIONS.iter().filter(|a| a.1) {
        ground.cgroup(path);
    }
    println!(
        "A throw-away network namespace, a TPROXY server on port 7893, a remote host behind a"
    );
    println!("veth pair, and this configuration:\n{}", CONFIG.replace('\n', "\n    "));
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    print!("cgtproxy says: {}", daemon.logs());
    for (path, there) in APPLICATIONS {
        let cgroup = ground.cgroup(path);
        match there {
            true => println!("\n{path}"),
            false => println!("\n{path} (made while the daemon runs)"),
        }
        let target = match path.split('/').nth(2).unwrap_or_default() {
            "telemetry" => "drop",
            "transmission" | "aria2" => "mihomo",
            _ if path.contains("firefox") => "mihomo",
            _ => "direct",
        };
        if target != "direct" {
            // the nearest ancestor with a rule has the set's element
            let owner = match path.strip_suffix("/instance1") {
                Some(service) => ground.at(service),
                None => cgroup.clone(),
            };
            await_member(&owner, target);
        }
        let web = [REMOTE4, REMOTE6]
            .map(|ip| tell(Proto::Tcp, &format!("TCP {ip}:443"), &cgroup, addr(ip, 443)));
        let udp = tell(Proto::Udp, &format!("UDP {REMOTE4}:443"), &cgroup, addr(REMOTE4, 443));
        let dns = tell(Proto::Udp, &format!("DNS {REMOTE4}:53"), &cgroup, addr(REMOTE4, 53));
        let left = world.wire.to_remote().len();
        println!("    {left} packets to the remote host on the wire");
        let want = match target {
            "direct" => ["direct", "direct"],
            "drop" => ["DROPPED", "DROPPED"],
            _ => ["PROXIED", "hijacked"],
        };
        assert!(
            web.iter().chain([&udp]).all(|fate| fate.starts_with(want[0]))
                && dns.starts_with(want[1])
        );
        assert_eq!(left == 0, target != "direct", "packets on the wire");
    }
    println!("\nThe proxy stops listening; /services/transmission asks again");
    drop(proxy);
    let cgroup = ground.at(APPLICATIONS[2].0);
    let fate = tell(Proto::Tcp, &format!("TCP {REMOTE4}:443"), &cgroup, addr(REMOTE4, 443));
    assert!(fate.starts_with("REFUSED"));
    assert_eq!(world.wire.to_remote(), []);
    println!(
        "\nIn the kernel meanwhile: {} lines of nftables, ip rules, a route. SIGTERM:",
        table().lines().count()
    );
    daemon.stop_clean();
    println!("    nothing of cgtproxy is left in the kernel");
}
