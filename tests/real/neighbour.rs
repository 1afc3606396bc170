//! Programs that change the same kernel: each is started, started again and stopped beside the
//! daemon, and beside a daemon that starts after it, and what is proxied or dropped stays so.

use std::path::Path;
use std::time::Duration;

use super::{needs, report, run, sh, try_all, which, Process, Verdict};
use crate::client::{Client, Proto, SILENCE};
use crate::daemon::Daemon;
use crate::gateway::Lan;
use crate::ground::{addr, Ground, REMOTES};
use crate::kernel::await_member;
use crate::world::{Server, World, PROXY};

struct Neighbour {
    name: &'static str,
    needs: &'static [&'static str],
    /// Starts it, and returns once its work in the kernel is done. Its processes end with the list.
    start: fn(&Ground) -> Result<Vec<Process>, String>,
    /// What it does beside ending its processes.
    stop: fn(&Ground) -> Verdict,
}

const NEIGHBOURS: [Neighbour; 7] = [
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
    run("dbus-daemon --system --nofork --nopidfile --nosyslog")?
        .up_by("test -S /run/dbus/system_bus_socket")
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
    let firewall = run("firewalld --nofork --nopid")?.up_by("firewall-cmd --state")?;
    Ok(vec![firewall, bus])
}

fn network_manager(ground: &Ground) -> Result<Vec<Process>, String> {
    let bus = dbus(ground)?;
    let online = "nm-online -s -q -t 1 || nmcli -t general status";
    let manager = run("NetworkManager -n")?.up_by(online)?;
    Ok(vec![manager, bus])
}

fn keepalived(ground: &Ground) -> Result<Vec<Process>, String> {
    let conf = ground.dir.join("keepalived.conf");
    let text = "vrrp_instance one {\n interface in0\n virtual_router_id 7\n priority 100\n \
                advert_int 1\n virtual_ipaddress {\n 192.0.2.77/24\n }\n}\n";
    std::fs::write(&conf, text).map_err(|e| e.to_string())?;
    sh(&format!("chmod 600 {}", conf.display()))?;
    let line = format!("keepalived -n -l -f {} -p /run/k.pid -r /run/v.pid", conf.display());
    Ok(vec![run(&line)?.up_by("ip -4 addr show dev in0 | grep -q 192.0.2.77")?])
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

/// Commands to the daemon that [`docker`] starts.
pub const DOCKER: &str = "docker -H unix:///run/docker.sock";

/// Its daemon, with the image `box`.
pub fn docker(ground: &Ground) -> Result<Vec<Process>, String> {
    let (root, image) = (ground.dir.join("docker"), ground.dir.join("image"));
    let daemon = run(&format!(
        "dockerd --data-root {} --exec-root /run/docker -p /run/docker.pid -s vfs \
         -H unix:///run/docker.sock",
        root.display()
    ))?;
    let daemon = daemon.up_by(&format!("{DOCKER} info"))?;
    busybox(&image)?;
    sh(&format!("tar -C {} -c . | {DOCKER} import - box", image.display()))?;
    // one container on its bridge
    sh(&format!("{DOCKER} run --rm box /bin/busybox true"))?;
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

/// What the neighbour must not disturb: a proxied and a dropped cgroup of this host, and a LAN behind it.
struct Place<'a> {
    ground: &'a Ground,
    world: World,
    lan: Lan<'a>,
    _proxy: Server,
}

impl<'a> Place<'a> {
    fn new(ground: &'a Ground) -> Place<'a> {
        let (world, proxy) = World::with_proxy(ground);
        ground.cgroups(["/proxied", "/drop"]);
        Place { ground, world, lan: Lan::new(ground), _proxy: proxy }
    }

    fn daemon(&self) -> Daemon {
        let daemon = Daemon::start(self.ground, CONFIG, &[]);
        await_member(&self.ground.at("/proxied"), "mihomo");
        await_member(&self.ground.at("/drop"), "drop");
        daemon
    }

    /// What is proxied or dropped is, here and for the LAN, and nothing of it is on the wire.
    fn all_well(&mut self) -> Verdict {
        let (proxied, dropped) = (self.ground.at("/proxied"), self.ground.at("/drop"));
        let mut wrong = Vec::new();
        self.world.wire.packets();
        for (ip, proto) in REMOTES.into_iter().flat_map(|ip| [(ip, Proto::Tcp), (ip, Proto::Udp)]) {
            let to = addr(ip, 80);
            let want = format!("{PROXY} {to}");
            let ask = |cgroup, patience| Client::new(cgroup, proto, to).timeout(patience).run();
            for (what, said, want) in [
                ("here", ask(&proxied, Duration::from_secs(3)).who(), &*want),
                ("dropped", ask(&dropped, SILENCE).who(), "nobody"),
                ("LAN", self.lan.ask(0, proto, to), &want),
            ] {
                if said != want {
                    wrong.push(format!("{proto:?} {ip} {what}: {said}"));
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
}

/// Whether all is well whenever the neighbour starts, stops and starts again, and when the daemon does.
fn beside(neighbour: &'static Neighbour, ground: &Ground) -> Result<bool, String> {
    needs(neighbour.needs)?;
    let Neighbour { name, start, stop, .. } = neighbour;
    let mut place = Place::new(ground);
    let mut well = true;
    let mut say = |what: &str, verdict: Verdict| well &= report(name, what, verdict);
    let daemon = place.daemon();

    say("without it", place.all_well());
    let started = start(ground)?;
    say("started after us", place.all_well());
    say("and a reload", daemon.hup().and_then(|_| place.all_well()));
    started.into_iter().for_each(Process::end);
    say("stopped", stop(ground).and_then(|()| place.all_well()));
    let (again, verdict) = match start(ground) {
        Ok(processes) => (processes, place.all_well()),
        Err(why) => (Vec::new(), Err(why)),
    };
    say("started once more", verdict);

    let stopped = daemon.stop().success();
    let _daemon = place.daemon();
    say(
        "there before us",
        match stopped {
            true => place.all_well(),
            false => Err("our daemon did not stop well".into()),
        },
    );
    again.into_iter().for_each(Process::end);
    let _ = stop(ground);
    Ok(well)
}

#[test]
#[ignore = "make real-test runs it"]
fn neighbours() {
    try_all(&NEIGHBOURS, |neighbour| neighbour.name, beside);
}
