//! Programs that change the same kernel: each is started, started again and stopped beside the
//! daemon, and beside a daemon that starts after it, and what is proxied or dropped stays so.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{report, which, Process, Verdict};
use crate::client::{Client, Proto, SILENCE};
use crate::daemon::Daemon;
use crate::gateway::Lan;
use crate::ground::{addr, Ground, REMOTE4, REMOTE6};
use crate::kernel::await_member;
use crate::wait_until;
use crate::world::{Server, World, PROXY};

pub struct Neighbour {
    name: &'static str,
    needs: &'static [&'static str],
    /// Starts it, and returns once its work in the kernel is done. Its processes end with the list.
    start: fn(&Ground) -> Result<Vec<Process>, String>,
    /// What it does beside ending its processes.
    stop: fn(&Ground) -> Verdict,
}

pub const NEIGHBOURS: [Neighbour; 7] = [
    Neighbour { name: "wg-quick", needs: &["wg-quick", "wireguard-go"], start: wg, stop: wg_down },
    Neighbour { name: "ufw", needs: &["ufw"], start: ufw, stop: |_| sh("ufw --force disable") },
    Neighbour {
        name: "firewalld",
        needs: &["firewalld", "dbus-daemon"],
        start: firewalld,
        stop: |_| Ok(()),
    },
    Neighbour {
        name: "NetworkManager",
        needs: &["NetworkManager", "dbus-daemon"],
        start: network_manager,
        stop: |_| Ok(()),
    },
    Neighbour { name: "keepalived", needs: &["keepalived"], start: keepalived, stop: |_| Ok(()) },
    Neighbour { name: "docker", needs: &["dockerd", "busybox"], start: docker, stop: |_| Ok(()) },
    Neighbour { name: "podman", needs: &["podman", "busybox"], start: podman, stop: |_| Ok(()) },
];

pub const CONFIG: &str = "
[tproxy mihomo]
port = 7893
[rules]
mihomo = /proxied
drop = /drop
[gateway lan]
interface = br-lan
target = mihomo
";

/// A shell command that has to succeed.
pub fn sh(line: &str) -> Verdict {
    let mut command = Command::new("sh");
    command.args(["-c", line]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
    let out = command.output().map_err(|e| format!("unable to start sh: {e}"))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(format!("{line}: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// A command that runs until the test ends it.
pub fn run(line: &str) -> Result<Process, String> {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {line} 2>&1")]);
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    Process::start(&mut command, None)
}

pub fn wait_for(line: &str) -> Verdict {
    let mut last = Ok(());
    wait_until(Duration::from_secs(30), || {
        last = sh(line);
        last.is_ok()
    });
    last
}

/// A /etc that this test may write to.
pub fn own_etc(ground: &Ground) -> Verdict {
    let dir = ground.dir.display();
    sh(&format!(
        "mkdir -p {dir}/up {dir}/work && mountpoint -q /etc || \
         mount -t overlay -o lowerdir=/etc,upperdir={dir}/up,workdir={dir}/work none /etc"
    ))
}

fn dbus(ground: &Ground) -> Result<Process, String> {
    own_etc(ground)?;
    sh("mkdir -p /run/dbus && rm -f /run/dbus/system_bus_socket")?;
    let bus = run("dbus-daemon --system --nofork --nopidfile --nosyslog")?;
    wait_for("test -S /run/dbus/system_bus_socket")?;
    Ok(bus)
}

/// A tunnel that takes all of this host's traffic, to a peer outside. Its chains drop what a tproxy
/// answers to its address, but for the lines that `check` names.
fn wg(ground: &Ground) -> Result<Vec<Process>, String> {
    let conf = ground.dir.join("wg0.conf");
    let key = "YAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";
    let peer = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
    let text = format!(
        "[Interface]\nPrivateKey = {key}\nAddress = 10.9.0.2/24, fd00:9::2/64\n\
         PostUp = nft insert rule ip wg-quick-%i preraw iif lo accept\n\
         PostUp = nft insert rule ip6 wg-quick-%i preraw iif lo accept\n[Peer]\n\
         PublicKey = {peer}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = 192.0.2.2:51820\n"
    );
    std::fs::write(&conf, text).map_err(|e| e.to_string())?;
    sh(&format!("chmod 600 {0}; wg-quick up {0}", conf.display()))?;
    Ok(Vec::new())
}

fn wg_down(ground: &Ground) -> Verdict {
    sh(&format!("wg-quick down {}", ground.dir.join("wg0.conf").display()))
}

/// Over IPv4 ufw drops what is not addressed to this host before it looks at a user's rules, so
/// what a LAN client sends to a TPROXY server needs a line in before.rules (cgtproxy(8)).
fn ufw(ground: &Ground) -> Result<Vec<Process>, String> {
    own_etc(ground)?;
    sh(
        "grep -q 0xfe000000 /etc/ufw/before.rules || sed -i '/-A ufw-before-input -i lo/a \\
        -A ufw-before-input -m mark --mark 0xfe000000/0xff000000 -j ACCEPT' /etc/ufw/before.rules",
    )?;
    sh("ufw --force enable && ufw allow in on br-lan")?;
    Ok(Vec::new())
}

fn firewalld(ground: &Ground) -> Result<Vec<Process>, String> {
    let bus = dbus(ground)?;
    sh("firewall-offline-cmd --zone=trusted --add-interface=br-lan || true")?;
    let firewall = run("firewalld --nofork --nopid")?;
    wait_for("firewall-cmd --state")?;
    Ok(vec![firewall, bus])
}

fn network_manager(ground: &Ground) -> Result<Vec<Process>, String> {
    let bus = dbus(ground)?;
    let manager = run("NetworkManager -n")?;
    wait_for("nm-online -s -q -t 1 || nmcli -t general status")?;
    Ok(vec![manager, bus])
}

fn keepalived(ground: &Ground) -> Result<Vec<Process>, String> {
    let conf = ground.dir.join("keepalived.conf");
    let text = "vrrp_instance one {\n interface in0\n virtual_router_id 7\n priority 100\n \
                advert_int 1\n virtual_ipaddress {\n 192.0.2.77/24\n }\n}\n";
    std::fs::write(&conf, text).map_err(|e| e.to_string())?;
    sh(&format!("chmod 600 {}", conf.display()))?;
    let daemon =
        run(&format!("keepalived -n -l -f {} -p /run/k.pid -r /run/v.pid", conf.display()))?;
    wait_for("ip -4 addr show dev in0 | grep -q 192.0.2.77")?;
    Ok(vec![daemon])
}

/// A root file system with busybox alone.
pub fn busybox(dir: &Path) -> Verdict {
    let program = which("busybox").ok_or("SKIP: no busybox")?;
    let dir = dir.display();
    sh(&format!(
        "mkdir -p {dir}/bin {dir}/etc {dir}/proc {dir}/sys {dir}/dev {dir}/tmp && \
                 cp {} {dir}/bin/busybox && ln -sf busybox {dir}/bin/sh",
        program.display()
    ))
}

pub fn docker(ground: &Ground) -> Result<Vec<Process>, String> {
    let (root, image) = (ground.dir.join("docker"), ground.dir.join("image"));
    let daemon = run(&format!(
        "dockerd --data-root {} --exec-root /run/docker -p /run/docker.pid -s vfs \
         -H unix:///run/docker.sock",
        root.display()
    ))?;
    wait_for("docker -H unix:///run/docker.sock info")?;
    busybox(&image)?;
    sh(&format!(
        "tar -C {} -c . | docker -H unix:///run/docker.sock import - box",
        image.display()
    ))?;
    // one container on its bridge
    sh("docker -H unix:///run/docker.sock run --rm box /bin/busybox true")?;
    Ok(vec![daemon])
}

/// Not every host lets a container have what podman gives it by default.
pub const LIMITS: &str = "--pids-limit -1 --ulimit nofile=1024:1024 --ulimit nproc=1024:1024";

/// A container in the host's network, by its cgroup.
fn podman(ground: &Ground) -> Result<Vec<Process>, String> {
    let image = ground.dir.join("image");
    busybox(&image)?;
    // not empty without the container: podman removes the parents that it leaves empty
    ground.cgroup("/proxied/other");
    let parent = ground.at("/proxied");
    let parent = parent.strip_prefix("/sys/fs/cgroup").map_err(|e| e.to_string())?;
    let line = format!(
        "podman --runtime runc --root {0}/podman --runroot /run/podman --cgroup-manager cgroupfs run --rm \
         --network host {LIMITS} --cgroup-parent /{1}/box --rootfs {2} \
         /bin/busybox nc 203.0.113.7 80 < /dev/null | grep -q '^{PROXY} '",
        ground.dir.display(),
        parent.display(),
        image.display()
    );
    let ran = sh(&line);
    // a cgroup that hands controllers down holds no process: our clients are to be there again
    for dir in ["/proxied/box", "/proxied", "/"].map(|path| ground.at(path)) {
        let file = dir.join("cgroup.subtree_control");
        for controller in std::fs::read_to_string(&file).unwrap_or_default().split_whitespace() {
            let _ = std::fs::write(&file, format!("-{controller}"));
        }
    }
    ran.map(|()| Vec::new())
}

struct Place<'a> {
    ground: &'a Ground,
    world: World,
    lan: Lan<'a>,
}

impl Place<'_> {
    /// What is proxied or dropped is, here and for the LAN, and nothing of it is on the wire.
    fn all_well(&mut self) -> Verdict {
        let (proxied, dropped) = (self.ground.at("/proxied"), self.ground.at("/drop"));
        let mut wrong = Vec::new();
        self.world.wire.packets();
        for ip in [REMOTE4, REMOTE6] {
            for proto in [Proto::Tcp, Proto::Udp] {
                let to = addr(ip, 80);
                let want = format!("{PROXY} {to}");
                let patience = Duration::from_secs(3);
                let who = Client::new(&proxied, proto, to).timeout(patience).run().who();
                let nobody = Client::new(&dropped, proto, to).timeout(SILENCE).run().who();
                let routed = self.lan.ask(0, proto, to);
                for (what, said, want) in
                    [("here", who, &*want), ("dropped", nobody, "nobody"), ("LAN", routed, &want)]
                {
                    if said != want {
                        wrong.push(format!("{proto:?} {ip} {what}: {said}"));
                    }
                }
            }
        }
        let left = self.world.wire.to_remote();
        if !left.is_empty() {
            wrong.push(format!("{} packets on the wire: {:?}", left.len(), left[0]));
        }
        match wrong.is_empty() {
            true => Ok(()),
            false => Err(wrong.join("; ")),
        }
    }

    fn with(&mut self, neighbour: &Neighbour) -> bool {
        let who = neighbour.name;
        let mut well = true;
        let mut say = |what: &str, verdict: Verdict| well &= report(who, what, verdict);
        let daemon = Daemon::start(self.ground, CONFIG, &[]);
        await_member(&self.ground.at("/proxied"), "mihomo");
        await_member(&self.ground.at("/drop"), "drop");
        say("without it", self.all_well());
        let mut started = match (neighbour.start)(self.ground) {
            Ok(processes) => processes,
            Err(why) => return report(who, "start", Err(why)),
        };
        say("started after us", self.all_well());
        say("and a reload", daemon.hup().and_then(|_| self.all_well()));
        say("stopped", {
            started.drain(..).for_each(Process::end);
            (neighbour.stop)(self.ground).and_then(|()| self.all_well())
        });
        say(
            "started once more",
            match (neighbour.start)(self.ground) {
                Ok(processes) => {
                    started = processes;
                    self.all_well()
                }
                Err(why) => Err(why),
            },
        );
        let status = daemon.stop();
        let daemon = Daemon::start(self.ground, CONFIG, &[]);
        await_member(&self.ground.at("/proxied"), "mihomo");
        await_member(&self.ground.at("/drop"), "drop");
        say(
            "there before us",
            match status.success() {
                true => self.all_well(),
                false => Err("our daemon did not stop well".into()),
            },
        );
        started.drain(..).for_each(Process::end);
        let _ = (neighbour.stop)(self.ground);
        drop(daemon);
        well
    }
}

#[test]
#[ignore = "make real-test runs it"]
fn neighbours() {
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut failed = Vec::new();
    for neighbour in &NEIGHBOURS {
        let name = neighbour.name;
        if !only.is_empty() && !only.split(' ').any(|o| o == name) {
            continue;
        }
        if let Some(missing) = neighbour.needs.iter().find(|command| which(command).is_none()) {
            report(name, "start", Err(format!("SKIP: no {missing}")));
            continue;
        }
        let (ground, world) = scene!("neighbour");
        let lan = Lan::new(&ground);
        let _proxy = Server::start(PROXY, &[7893]);
        ground.cgroup("/proxied");
        ground.cgroup("/drop");
        if !(Place { ground: &ground, world, lan }).with(neighbour) {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "failed beside {failed:?}");
}
