//! Containers of real engines: whatever is done to one, a rule for its cgroup covers what it sends, and
//! its services stay reachable.

use std::time::Duration;

use super::neighbour::{busybox, docker, own_etc, CONFIG, DOCKER, LIMITS};
use super::{await_success, needs, out, report, run, sh, try_all, Process, Verdict};
use crate::daemon::{run_with, Daemon};
use crate::gateway::bridge_netfilter;
use crate::ground::{ip_lines, sysctl, Ground};
use crate::kernel::table;
use crate::wait_until;
use crate::world::{Server, World, PROXY};

struct Engine {
    name: &'static str,
    needs: &'static [&'static str],
    cases: fn(&mut Yard) -> Verdict,
}

const ENGINES: [Engine; 7] = [
    Engine { name: "docker", needs: &["dockerd", "docker"], cases: with_docker },
    Engine { name: "podman", needs: &["podman"], cases: with_podman },
    Engine { name: "rootless", needs: &["setpriv", "newuidmap"], cases: with_rootless },
    Engine { name: "lxc", needs: &["lxc-start"], cases: with_lxc },
    Engine { name: "nspawn", needs: &["systemd-nspawn"], cases: with_nspawn },
    Engine { name: "nested", needs: &["dockerd", "docker"], cases: with_nested },
    Engine { name: "podman-in-lxc", needs: &["lxc-start", "podman"], cases: with_podman_in_lxc },
];

/// What a container asks the remote host.
const ASK: &str = "/bin/busybox timeout 5 /bin/busybox nc 203.0.113.7 80 </dev/null";
const ASK6: &str = "/bin/busybox timeout 5 /bin/busybox nc 2001:db8:2::7 80 </dev/null";

/// A command of a container that asks, and ends well whoever answers.
fn shell(ask: &str) -> String {
    format!("/bin/sh -c '{ask}; true'")
}

/// A web server in a container, see [`Yard::serves`].
const WEB: &str = "/bin/busybox httpd -f -p 80 -h /etc";
/// A command of that container: whether it listens yet.
const LISTENS: &str = "/bin/busybox wget -q -O /dev/null http://127.0.0.1/who";

struct Yard<'a> {
    ground: &'a Ground,
    world: World,
    daemon: Daemon,
    engine: &'static str,
    /// A root file system, with busybox.
    image: String,
    /// Paths from the real root: of the cgroups that rules name, and of one that none does.
    proxied: String,
    dropped: String,
    free: String,
    well: bool,
    _proxy: Server,
}

impl<'a> Yard<'a> {
    fn new(ground: &'a Ground, engine: &'static str) -> Result<Yard<'a>, String> {
        // as dockerd has it
        bridge_netfilter(true);
        let (world, proxy) = World::with_proxy(ground);
        // not empty without the container: podman removes the parents that it leaves empty
        ground.cgroups(["/proxied/other", "/drop/other"]);
        let below = |path: &str| {
            let dir = ground.at(path);
            let path = dir.strip_prefix("/sys/fs/cgroup").map_err(|_| NO_IMAGE)?;
            Ok::<_, &str>(path.display().to_string())
        };
        let image = image(ground).map_err(|_| NO_IMAGE)?;
        Ok(Yard {
            ground,
            world,
            daemon: Daemon::start(ground, CONFIG, &[]),
            engine,
            image,
            proxied: below("/proxied")?,
            dropped: below("/drop")?,
            free: below("/free")?,
            well: true,
            _proxy: proxy,
        })
    }

    /// Where a container is put, and who answers it there.
    fn decided(&self) -> [(String, &'static str); 2] {
        [(self.proxied.clone(), PROXY), (self.dropped.clone(), "nobody")]
    }

    fn decided_or_not(&self) -> [(String, &'static str); 3] {
        let [proxied, dropped] = self.decided();
        [proxied, dropped, (self.free.clone(), "remote")]
    }

    fn case(&mut self, what: &str, case: impl FnOnce(&mut Yard<'a>) -> Verdict) {
        let verdict = case(self);
        self.say(what, verdict);
    }

    fn say(&mut self, what: &str, verdict: Verdict) {
        let logged = verdict.map_err(|why| match why.starts_with("SKIP") {
            true => why,
            false => format!("{why}\n{}", self.daemon.logs()),
        });
        self.well &= report(self.engine, what, logged);
    }

    /// What a command says that asks the remote host from within, and that nothing else of it is seen
    /// outside than what went directly.
    fn asks(&mut self, line: &str, who: &str) -> Verdict {
        self.world.wire.packets();
        let said = out(line)?;
        let left = self.world.wire.to_remote();
        match (said.lines().last().unwrap_or_default(), &left[..]) {
            ("", []) if who == "nobody" => Ok(()),
            (last, _) if who == "remote" && last.starts_with("remote ") => Ok(()),
            (last, []) if last.starts_with(&format!("{who} ")) => Ok(()),
            (last, left) => Err(format!("answered by {last:?}, {} on the wire", left.len())),
        }
    }

    /// The same of two containers within one, of which a rule names the first: what they send comes in
    /// by the outer one's veth, so the outer one's rule decides.
    fn asks_within(&mut self, line: impl Fn(&str) -> String, who: &str) -> Verdict {
        ["inner", "other"].into_iter().try_for_each(|within| {
            self.asks(&line(within), who).map_err(|why| format!("{within}: {why}"))
        })
    }

    /// A rule for what is called so within a container.
    fn drop_inner(&self) {
        self.daemon.reconfigure(&CONFIG.replace("[rules]\n", "[rules]\ndrop = /.*/inner\n"));
    }

    /// Whether the container's web server can be asked from outside.
    fn serves(&self, url: &str) -> Verdict {
        let line = format!("busybox timeout 5 busybox wget -q -O - {url}");
        match self.ground.outside(|| out(&line))?.contains("of a container") {
            true => Ok(()),
            false => Err("another answers".into()),
        }
    }
    /// `explain --pid`, `status` and `apps` show the veth and whose it is.
    fn is_told(&self, engine: &str, name: &str) -> Verdict {
        let of = |what: &str| out(&format!("{engine} inspect -f '{{{{{what}}}}}' {name}"));
        let (pid, id) = (of(".State.Pid")?, of(".Id")?);
        let id = id.trim().get(..12).ok_or("no id")?;
        for (words, want) in [
            (&["explain", "--pid", pid.trim()][..], vec!["behind veth", id]),
            (&["status"], vec!["\nveth", id]),
            (&["status", "--json"], vec!["\"veth", id]),
            (&["apps"], vec!["behind veth", id]),
            (&["apps", "--json"], vec!["\"veth", id]),
        ] {
            let said = run_with(self.ground, CONFIG, words).out;
            if let Some(missing) = want.iter().find(|text| !said.contains(**text)) {
                return Err(format!("{words:?}: no {missing:?} in\n{said}"));
            }
        }
        Ok(())
    }

    /// One that asks from its first moment on, again and again: how many went before the rule was there.
    fn at_once(&mut self, start: &str) -> Verdict {
        let mut early = 0;
        for _ in 0..5 {
            let said =
                out(&format!("{start} /bin/sh -c 'for i in 0 1 2 3 4 5 6 7 8 9; do {ASK}; done'"))?;
            early += said.lines().filter(|line| line.starts_with("remote ")).count();
            if !said.lines().last().is_some_and(|line| line.starts_with(PROXY)) {
                return Err(said);
            }
        }
        println!("        {}: {early} of 50 before the rule", self.engine);
        Ok(())
    }

    fn nothing_left(&self) -> Verdict {
        let none = || !table().contains("veth_");
        match wait_until(Duration::from_secs(20), none) {
            true => Ok(()),
            false => Err(table()),
        }
    }

    /// A cgroup of the real root, made and entered by the shell line that follows.
    fn enter(&self, path: &str) -> String {
        format!("mkdir -p /sys/fs/cgroup/{path} && echo $$ >/sys/fs/cgroup/{path}/cgroup.procs && ")
    }

    /// A bridge with this host's address in a network of containers that need one.
    fn bridge(&self) {
        let lines = "link add br-box address 02:00:00:00:01:00 type bridge forward_delay 0\n\
                     addr add 198.51.100.1/24 dev br-box\nlink set br-box up\n";
        ip_lines(lines);
        sysctl("net/ipv4/ip_forward", "1");
        self.ground.outside(|| ip_lines("route add 198.51.100.0/24 via 192.0.2.1\n"));
    }
}

/// Why there is nothing to put into a container.
const NO_IMAGE: &str = "SKIP: no root file system";

/// A root file system with busybox, and what its web server shows.
fn image(ground: &Ground) -> Result<String, String> {
    let image = ground.dir.join("image");
    busybox(&image)?;
    sh(&format!("mkdir -p {}/usr", image.display()))?;
    std::fs::write(image.join("etc/who"), "the web server of a container\n")
        .map_err(|e| e.to_string())?;
    Ok(image.display().to_string())
}

/// docker, or podman, whose commands have the same names: all that they do to a container.
struct Commands<'a> {
    program: &'a str,
    /// Of `run`.
    flags: &'a str,
    image: &'a str,
}

impl Commands<'_> {
    fn try_all(&self, yard: &mut Yard) {
        self.start(yard);
        self.do_to_one(yard);
        self.use_networks(yard);
        let program = self.program;
        yard.case("asked at once", |y| y.at_once(&self.run("--rm", &y.proxied, "")));
        yard.case("all gone", |y| {
            sh(&format!("{program} rm -f two"))?;
            y.nothing_left()
        });
    }

    fn run(&self, more: &str, parent: &str, command: &str) -> String {
        let Commands { program, flags, image } = self;
        format!("{program} run {more} {flags} --cgroup-parent /{parent}/box {image} {command}")
    }

    /// What the container of that name asks.
    fn within(&self, name: &str) -> String {
        format!("{} exec {name} {}", self.program, shell(ASK))
    }

    /// Whether its web server can be asked by a port of this host, once it listens.
    fn serves(&self, y: &Yard, name: &str, port: u16) -> Verdict {
        await_success(&format!("{} exec {name} {LISTENS}", self.program))?;
        y.serves(&format!("http://192.0.2.1:{port}/who"))
    }

    /// Leaves one behind, `one`.
    fn start(&self, yard: &mut Yard) {
        let Commands { program, flags, image } = self;
        yard.case("without a rule", |y| {
            y.asks(&format!("{program} run --rm {flags} {image} {ask}", ask = shell(ASK)), "remote")
        });
        for ((parent, who), what) in
            yard.decided().into_iter().zip(["by --cgroup-parent", "dropped"])
        {
            yard.case(what, |y| y.asks(&self.run("--rm", &parent, &shell(ASK)), who));
        }
        yard.case("a published port", |y| {
            sh(&self.run("-d --name one -p 8080:80", &y.proxied, WEB))?;
            self.serves(y, "one", 8080)?;
            y.asks(&self.within("one"), PROXY)?;
            sh(&self.run("-d --name other -p 8081:80", &y.dropped, WEB))?;
            self.serves(y, "other", 8081)?;
            sh(&format!("{program} rm -f other"))
        });
    }

    /// Leaves it with another name, `two`.
    fn do_to_one(&self, yard: &mut Yard) {
        let program = self.program;
        yard.case("explain, status and apps", |y| y.is_told(program, "one"));
        yard.case("paused and unpaused", |y| {
            sh(&format!("{program} pause one && {program} unpause one"))?;
            y.asks(&self.within("one"), PROXY)
        });
        yard.case("renamed", |y| {
            sh(&format!("{program} rename one two"))?;
            y.asks(&self.within("two"), PROXY)
        });
        yard.case("started anew", |y| {
            sh(&format!("{program} restart -t 1 two"))?;
            y.asks(&self.within("two"), PROXY)?;
            self.serves(y, "two", 8080)
        });
    }

    fn use_networks(&self, yard: &mut Yard) {
        let program = self.program;
        yard.case("a second network, and that alone", |y| {
            sh(&format!(
                "{program} network create second && {program} network connect second two"
            ))?;
            y.asks(&self.within("two"), PROXY)?;
            let first = if program.contains("podman") { "podman" } else { "bridge" };
            sh(&format!("{program} network disconnect {first} two"))?;
            y.asks(&self.within("two"), PROXY)
        });
        yard.case("another container's network", |y| {
            // the first rule of both decides
            y.asks(&self.run("--rm --network container:two", &y.dropped, &shell(ASK)), PROXY)
        });
        yard.case("the host's network", |y| {
            y.asks(&self.run("--rm --network host", &y.proxied, &shell(ASK)), PROXY)
        });
    }
}

fn with_docker(yard: &mut Yard) -> Verdict {
    let processes = docker(yard.ground)?;
    Commands { program: DOCKER, flags: "", image: "box" }.try_all(yard);
    yard.case("compose", |y| {
        needs(&["docker-compose"])?;
        let file = y.ground.dir.join("compose.yml");
        let text = format!(
            "version: '2.4'\nservices:\n  web:\n    image: box\n    \
             command: {WEB}\n    cgroup_parent: /{}/box\n    \
             ports: ['8080:80']\n",
            y.proxied
        );
        std::fs::write(&file, text).map_err(|e| e.to_string())?;
        let line =
            format!("docker-compose -H unix:///run/docker.sock -p boxes -f {}", file.display());
        sh(&format!("{line} up -d"))?;
        await_success(&format!("{line} exec -T web {LISTENS}"))?;
        y.serves("http://192.0.2.1:8080/who")?;
        y.asks(&format!("{line} exec -T web {}", shell(ASK)), PROXY)?;
        sh(&format!("{line} down"))?;
        y.nothing_left()
    });
    processes.into_iter().for_each(Process::end);
    Ok(())
}

fn with_podman(yard: &mut Yard) -> Verdict {
    let dir = yard.ground.dir.display();
    let program = format!(
        "podman --runtime runc --root {dir}/podman --runroot /run/podman --network-config-dir {dir}/networks \
         --cgroup-manager cgroupfs"
    );
    let image = format!("--rootfs {}", yard.image);
    Commands { program: &program, flags: LIMITS, image: &image }.try_all(yard);
    Ok(())
}

/// Of a user who is not root: what its network helper sends is sent from its cgroup.
fn with_rootless(yard: &mut Yard) -> Verdict {
    own_etc(yard.ground)?;
    sh("for f in subuid subgid; do echo 4321:200000:65536 >>/etc/$f; done; \
        echo 'boxer:x:4321:4321::/tmp:/bin/sh' >>/etc/passwd; echo 'boxer:x:4321:' >>/etc/group")?;
    let home = yard.ground.dir.join("home");
    sh(&format!(
        "mkdir -p {0}/run {0}/.config && cp -a {1} {0}/image && chown -R 4321:4321 {0} && \
         chmod 711 {2} {0}",
        home.display(),
        yard.image,
        yard.ground.dir.display()
    ))?;
    for (cgroup, who) in yard.decided() {
        let home = home.display();
        let user = format!(
            "{}cd {home} && exec setpriv --reuid 4321 --regid 4321 --clear-groups env HOME={home} \
             XDG_RUNTIME_DIR={home}/run",
            yard.enter(&format!("{cgroup}/user"))
        );
        yard.case(&format!("slirp4netns, {who}"), |y| {
            needs(&["slirp4netns", "crun"])?;
            let line = format!(
                "{user} podman --root {home}/root --runroot {home}/run/root --cgroup-manager \
                 cgroupfs --runtime crun run --rm --cgroups disabled {LIMITS} --network slirp4netns \
                 --rootfs {home}/image {}",
                shell(ASK)
            );
            y.asks(&line, who)
        });
        yard.case(&format!("pasta, {who}"), |y| {
            needs(&["pasta"])?;
            // podman before 4.4 does not know it
            y.asks(&format!("{user} pasta -q --config-net -- {}", shell(ASK)), who)
        });
    }
    Ok(())
}

/// A container of LXC at 198.51.100.10, on the bridge of [`Yard::bridge`].
struct Lxc {
    dir: String,
    name: &'static str,
}

impl Lxc {
    /// Below the cgroup `parent`, with these further lines in its configuration.
    fn new(y: &Yard, name: &'static str, parent: &str, more: &str) -> Result<Lxc, String> {
        let dir = y.ground.dir.display().to_string();
        let conf = format!(
            "lxc.uts.name = {name}\nlxc.rootfs.path = dir:{}\nlxc.net.0.type = veth\n\
             lxc.net.0.link = br-box\nlxc.net.0.flags = up\nlxc.net.0.ipv4.address = \
             198.51.100.10/24\nlxc.net.0.ipv4.gateway = 198.51.100.1\nlxc.cgroup.dir = {parent}/lxc\n\
             lxc.pty.max = 0\nlxc.tty.max = 0\n{more}",
            y.image
        );
        std::fs::write(format!("{dir}/{name}.conf"), conf).map_err(|e| e.to_string())?;
        // it looks for bridges in /sys, which has those of another namespace here
        let sysfs =
            "mount -t sysfs none /sys && mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"\n";
        std::fs::write(format!("{dir}/sysfs.sh"), sysfs).map_err(|e| e.to_string())?;
        Ok(Lxc { dir, name })
    }

    /// A command of its, lxc-COMMAND.
    fn line(&self, command: &str, more: &str) -> String {
        let Lxc { dir, name } = self;
        format!("unshare -m sh {dir}/sysfs.sh lxc-{command} -P {dir} -n {name} {more}")
    }

    /// Does `work` while `program` runs in it.
    fn with(&self, program: &str, work: impl FnOnce() -> Verdict) -> Verdict {
        let more = format!("-F -f {}/{}.conf -- {program}", self.dir, self.name);
        let running = run(&self.line("start", &more))?;
        sh(&self.line("wait", "-s RUNNING -t 20"))?;
        let done = work();
        sh(&self.line("stop", "-k"))?;
        running.end();
        done
    }
}

fn with_lxc(yard: &mut Yard) -> Verdict {
    yard.bridge();
    for ((parent, who), name) in yard.decided().into_iter().zip(["web", "mute"]) {
        let lxc = Lxc::new(yard, name, &parent, "lxc.mount.auto = proc:mixed\n")?;
        yard.case(&format!("{who}, on a bridge"), |y| {
            lxc.with(WEB, || {
                let asked = y.asks(&lxc.line("attach", &format!("-- {}", shell(ASK))), who);
                asked.and(y.serves("http://198.51.100.10/who"))
            })?;
            y.nothing_left()
        });
    }
    Ok(())
}

fn with_nspawn(yard: &mut Yard) -> Verdict {
    yard.bridge();
    for (parent, who) in yard.decided() {
        let inside = format!(
            "/bin/busybox ip link set host0 up; /bin/busybox ip addr add 198.51.100.10/24 dev host0; \
             /bin/busybox ip route add default via 198.51.100.1; /bin/busybox sleep 1; {ASK}; true"
        );
        yard.case(&format!("{who}, --network-bridge"), |y| {
            let line = format!(
                "{}exec systemd-nspawn -q --register=no --keep-unit --console=pipe -D {} \
                 --network-bridge=br-box /bin/sh -c '{inside}'",
                y.enter(&format!("{parent}/nspawn")),
                y.image
            );
            y.asks(&line, who)?;
            y.nothing_left()
        });
    }
    Ok(())
}

/// docker in docker.
fn with_nested(yard: &mut Yard) -> Verdict {
    let processes = docker(yard.ground)?;
    yard.drop_inner();
    networks_of_ipv6(yard.ground)?;
    let inner = format!("{DOCKER} exec outer {DOCKER}");
    for (parent, who) in yard.decided_or_not() {
        let asks = |y: &mut Yard, flags: &str, ask: &str| {
            let run = |within: &str| {
                format!("{inner} run --rm {flags} --cgroup-parent /{within} box {}", shell(ask))
            };
            y.asks_within(run, who)
        };
        yard.case(&format!("docker in docker, {who}"), |y| {
            start_outer(y, &parent)?;
            await_success(&format!("{inner} info"))?;
            let import = format!("tar -C /image -c . | {DOCKER} import - box");
            sh(&format!("{DOCKER} exec outer sh -c '{import}'"))?;
            asks(y, "", ASK)
        });
        yard.case(&format!("docker in docker, {who}, IPv6"), |y| {
            sh(&format!("{inner} {}", network_of_ipv6("fd00:d")))?;
            sh("ip -6 route replace fd00:d::/64 via fd00:c::9")?;
            asks(y, "--network six", ASK6)
        });
        yard.case(&format!("docker in docker, {who}: explain"), |y| {
            sh(&format!("{inner} run -d --cgroup-parent /inner box /bin/busybox sleep 60"))?;
            let pid = out(&format!("cat /sys/fs/cgroup/{parent}/box/*/inner/*/cgroup.procs"))?;
            let said = run_with(y.ground, CONFIG, &["explain", "--pid", pid.trim()]).out;
            match said.contains("the rule of an outer container") {
                true => Ok(()),
                false => Err(said),
            }
        });
        yard.case(&format!("docker in docker, {who}: gone"), |y| {
            sh(&format!("{DOCKER} rm -f outer"))?;
            y.nothing_left()
        });
    }
    processes.into_iter().for_each(Process::end);
    Ok(())
}

/// What makes the network `six`, with that prefix.
fn network_of_ipv6(prefix: &str) -> String {
    format!("network create --ipv6 --subnet {prefix}::/64 six")
}

/// The outer container's, and the way back to it and to those within it.
fn networks_of_ipv6(ground: &Ground) -> Verdict {
    sh(&format!("{DOCKER} {}", network_of_ipv6("fd00:c")))?;
    sysctl("net/ipv6/conf/all/forwarding", "1");
    for prefix in ["fd00:c", "fd00:d"] {
        let line = format!("route add {prefix}::/64 via 2001:db8:1::1\n");
        ground.outside(|| ip_lines(&line));
    }
    Ok(())
}

/// A container below that cgroup, `outer`, with a dockerd in it that has this host's files.
fn start_outer(y: &Yard, parent: &str) -> Verdict {
    let start = y.ground.dir.join("start.sh");
    let text = "umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && mount -o remount,rw /proc/sys\n\
                mkdir /sys/fs/cgroup/init && echo 0 >/sys/fs/cgroup/init/cgroup.procs\n\
                exec dockerd --data-root /inner --exec-root /run/docker -p /run/docker.pid -s vfs \
                -H unix:///run/docker.sock\n";
    std::fs::write(&start, text).map_err(|e| e.to_string())?;
    let host =
        ["bin", "sbin", "lib", "lib64", "usr", "etc"].map(|dir| format!("-v /{dir}:/{dir}:ro"));
    let open =
        ["seccomp", "apparmor", "systempaths"].map(|of| format!("--security-opt {of}=unconfined"));
    sh(&format!(
        "{DOCKER} run -d --rm --name outer --network six --ip6 fd00:c::9 --cap-add NET_ADMIN --cap-add SYS_ADMIN {} {} -v {}:/image:ro \
         -v {}:/start.sh:ro --tmpfs /inner:exec --cgroup-parent /{parent}/box box /bin/sh /start.sh",
        open.join(" "),
        host.join(" "),
        y.image,
        start.display()
    ))
}

/// podman in LXC: as docker in docker.
fn with_podman_in_lxc(yard: &mut Yard) -> Verdict {
    yard.bridge();
    yard.drop_inner();
    let inner = yard.ground.dir.join("inner");
    image_for_podman(&yard.image, &inner)?;
    let host = ["usr", "etc"]
        .map(|at| format!("lxc.mount.entry = /{at} {at} none bind,ro,create=dir 0 0\n"));
    let own =
        ["var", "run"].map(|at| format!("lxc.mount.entry = none {at} tmpfs create=dir 0 0\n"));
    let more = format!(
        "lxc.mount.auto = proc:rw sys:rw\nlxc.cap.drop =\n\
         lxc.mount.entry = {} image none bind,create=dir 0 0\n{}{}",
        inner.display(),
        host.concat(),
        own.concat()
    );
    for ((parent, who), name) in yard.decided_or_not().into_iter().zip(["proxied", "mute", "free"])
    {
        let lxc = Lxc::new(yard, name, &parent, &more)?;
        let ask = |within: &str| {
            let inside = format!(
                "mount -t cgroup2 none /sys/fs/cgroup; mkdir -p /dev/shm; mount -t tmpfs none /dev/shm; \
                 podman --runtime runc --root /var/podman --runroot /run/podman \
                 --network-config-dir /var/networks --cgroup-manager cgroupfs run --rm {LIMITS} \
                 --cgroup-parent /{within} --rootfs /image /bin/sh -c \"{ASK}; true\""
            );
            let clean = "--clear-env -v PATH=/usr/sbin:/usr/bin";
            lxc.line("attach", &format!("{clean} -- /bin/sh -c '{inside}'"))
        };
        yard.case(&format!("podman in LXC, {who}"), |y| {
            lxc.with("/usr/bin/sleep 600", || y.asks_within(ask, who))?;
            y.nothing_left()
        });
    }
    Ok(())
}

/// Makes `image` a place for this host's programs, and leaves what it was in `inner`.
fn image_for_podman(image: &str, inner: &std::path::Path) -> Verdict {
    sh(&format!("cp -a {image} {}", inner.display()))?;
    sh(&format!(
        "cd {image} && rm -rf bin && for d in bin sbin lib lib64; do ln -s usr/$d $d; done; \
         mkdir -p image"
    ))
}

/// Whatever an engine does to its containers, their rules hold.
fn holds(engine: &'static Engine, ground: &Ground) -> Result<bool, String> {
    needs(engine.needs)?;
    needs(&["busybox"])?;
    let mut yard = Yard::new(ground, engine.name)?;

    let verdict = (engine.cases)(&mut yard);

    if verdict.is_err() {
        yard.say("containers", verdict);
    }
    Ok(yard.well)
}

#[test]
#[ignore = "make real-test runs it"]
fn containers() {
    try_all(&ENGINES, |engine| engine.name, holds);
}
