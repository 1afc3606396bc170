//! Containers of real engines: whatever is done to one, a rule for its cgroup covers what it sends, and
//! its services stay reachable.

use std::time::Duration;

use super::neighbour::{busybox, docker, own_etc, run, sh, wait_for, CONFIG, LIMITS};
use super::{report, which, Process, Verdict};
use crate::daemon::{run_with, Daemon};
use crate::ground::{ip_batch, sysctl, Ground};
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

struct Yard<'a> {
    ground: &'a Ground,
    world: World,
    daemon: Daemon,
    engine: &'static str,
    /// A root file system, with busybox.
    image: String,
    /// Paths of cgroups from the real root.
    proxied: String,
    dropped: String,
    well: bool,
}

impl Yard<'_> {
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

    /// Whether the container's web server can be asked from outside.
    fn serves(&self, url: &str) -> Verdict {
        let line = format!("busybox timeout 5 busybox wget -q -O - {url}");
        match self.ground.outside(|| out(&line))?.contains("of a container") {
            true => Ok(()),
            false => Err("another answers".into()),
        }
    }
}

/// What a shell command prints that has to succeed.
fn out(line: &str) -> Result<String, String> {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", line]).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let out = command.stdin(std::process::Stdio::null()).output();
    let out = out.map_err(|e| format!("unable to start sh: {e}"))?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    match out.status.success() {
        true => Ok(said),
        false => Err(format!("{line}: {said}{}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// All that docker's commands, and podman's of the same names, do to a container. `flags` are of `run`.
fn as_docker_does(yard: &mut Yard, engine: &str, flags: &str, image: &str) {
    let start = |more: &str, parent: &str, command: &str| {
        format!("{engine} run {more} {flags} --cgroup-parent /{parent}/box {image} {command}")
    };
    let (proxied, dropped) = (yard.proxied.clone(), yard.dropped.clone());
    let ask = format!("/bin/sh -c '{ASK}; true'");
    let once = |parent: &str| start("--rm", parent, &ask);
    let within = |name: &str| format!("{engine} exec {name} {ask}");
    yard.case("without a rule", |y| {
        y.asks(&format!("{engine} run --rm {flags} {image} {ask}"), "remote")
    });
    yard.case("by --cgroup-parent", |y| y.asks(&once(&proxied), PROXY));
    yard.case("dropped", |y| y.asks(&once(&dropped), "nobody"));
    yard.case("a published port", |y| {
        let web = "/bin/busybox httpd -f -p 80 -h /etc";
        sh(&start("-d --name one -p 8080:80", &proxied, web))?;
        y.serves("http://192.0.2.1:8080/who")?;
        y.asks(&within("one"), PROXY)?;
        sh(&start("-d --name other -p 8081:80", &dropped, web))?;
        y.serves("http://192.0.2.1:8081/who")?;
        sh(&format!("{engine} rm -f other"))
    });
    yard.case("explain, status and apps", |y| y.is_told(engine, "one"));
    yard.case("paused and unpaused", |y| {
        sh(&format!("{engine} pause one && {engine} unpause one"))?;
        y.asks(&within("one"), PROXY)
    });
    yard.case("renamed", |y| {
        sh(&format!("{engine} rename one two"))?;
        y.asks(&within("two"), PROXY)
    });
    yard.case("started anew", |y| {
        sh(&format!("{engine} restart -t 1 two"))?;
        y.asks(&within("two"), PROXY)?;
        y.serves("http://192.0.2.1:8080/who")
    });
    yard.case("a second network, and that alone", |y| {
        sh(&format!("{engine} network create second && {engine} network connect second two"))?;
        y.asks(&within("two"), PROXY)?;
        let first = if engine.contains("podman") { "podman" } else { "bridge" };
        sh(&format!("{engine} network disconnect {first} two"))?;
        y.asks(&within("two"), PROXY)
    });
    yard.case("another container's network", |y| {
        let line = start("--rm --network container:two", &dropped, &ask);
        // the first rule of both decides
        y.asks(&line, PROXY)
    });
    yard.case("the host's network", |y| {
        y.asks(&start("--rm --network host", &proxied, &ask), PROXY)
    });
    yard.case("asked at once", |y| y.at_once(&start("--rm", &proxied, "")));
    yard.case("all gone", |y| {
        sh(&format!("{engine} rm -f two"))?;
        y.nothing_left()
    });
}

impl<'a> Yard<'a> {
    fn case(&mut self, what: &str, case: impl FnOnce(&mut Yard<'a>) -> Verdict) {
        let verdict = case(self);
        self.say(what, verdict);
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
        let none = || !crate::kernel::table().contains("veth_");
        match wait_until(Duration::from_secs(20), none) {
            true => Ok(()),
            false => Err(crate::kernel::table()),
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
        ip_batch(&[], lines);
        sysctl("net/ipv4/ip_forward", "1");
        self.ground.outside(|| ip_batch(&[], "route add 198.51.100.0/24 via 192.0.2.1\n"));
    }
}

fn with_docker(yard: &mut Yard) -> Verdict {
    let processes = docker(yard.ground)?;
    let engine = "docker -H unix:///run/docker.sock";
    as_docker_does(yard, engine, "", "box");
    yard.case("compose", |y| {
        which("docker-compose").ok_or("SKIP: no docker-compose")?;
        let file = y.ground.dir.join("compose.yml");
        let text = format!(
            "version: '2.4'\nservices:\n  web:\n    image: box\n    \
             command: /bin/busybox httpd -f -p 80 -h /etc\n    cgroup_parent: /{}/box\n    \
             ports: ['8080:80']\n",
            y.proxied
        );
        std::fs::write(&file, text).map_err(|e| e.to_string())?;
        let line =
            format!("docker-compose -H unix:///run/docker.sock -p boxes -f {}", file.display());
        sh(&format!("{line} up -d"))?;
        y.serves("http://192.0.2.1:8080/who")?;
        y.asks(&format!("{line} exec -T web /bin/sh -c '{ASK}; true'"), PROXY)?;
        sh(&format!("{line} down"))?;
        y.nothing_left()
    });
    processes.into_iter().for_each(Process::end);
    Ok(())
}

fn with_podman(yard: &mut Yard) -> Verdict {
    let dir = yard.ground.dir.display();
    let engine = format!(
        "podman --runtime runc --root {dir}/podman --runroot /run/podman --network-config-dir {dir}/networks \
         --cgroup-manager cgroupfs"
    );
    let image = format!("--rootfs {}", yard.image);
    as_docker_does(yard, &engine, LIMITS, &image);
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
    for (cgroup, who) in [(yard.proxied.clone(), PROXY), (yard.dropped.clone(), "nobody")] {
        let home = home.display();
        let user = format!(
            "{}cd {home} && exec setpriv --reuid 4321 --regid 4321 --clear-groups env HOME={home} \
             XDG_RUNTIME_DIR={home}/run",
            yard.enter(&format!("{cgroup}/user"))
        );
        yard.case(&format!("slirp4netns, {who}"), |y| {
            for needed in ["slirp4netns", "crun"] {
                which(needed).ok_or(format!("SKIP: no {needed}"))?;
            }
            let line = format!(
                "{user} podman --root {home}/root --runroot {home}/run/root --cgroup-manager \
                 cgroupfs --runtime crun run --rm --cgroups disabled {LIMITS} --network slirp4netns \
                 --rootfs {home}/image /bin/sh -c '{ASK}; true'"
            );
            y.asks(&line, who)
        });
        yard.case(&format!("pasta, {who}"), |y| {
            which("pasta").ok_or("SKIP: no pasta")?;
            // podman before 4.4 does not know it
            let line = format!("{user} pasta -q --config-net -- /bin/sh -c '{ASK}; true'");
            y.asks(&line, who)
        });
    }
    Ok(())
}

fn with_lxc(yard: &mut Yard) -> Verdict {
    yard.bridge();
    let dir = yard.ground.dir.display().to_string();
    for (name, parent, who) in
        [("web", yard.proxied.clone(), PROXY), ("mute", yard.dropped.clone(), "nobody")]
    {
        let conf = format!("{dir}/{name}.conf");
        let text = format!(
            "lxc.uts.name = {name}\nlxc.rootfs.path = dir:{}\nlxc.net.0.type = veth\n\
             lxc.net.0.link = br-box\nlxc.net.0.flags = up\nlxc.net.0.ipv4.address = \
             198.51.100.10/24\nlxc.net.0.ipv4.gateway = 198.51.100.1\nlxc.cgroup.dir = {parent}/lxc\n\
             lxc.mount.auto = proc:mixed\nlxc.pty.max = 0\nlxc.tty.max = 0\n",
            yard.image
        );
        std::fs::write(&conf, text).map_err(|e| e.to_string())?;
        // it looks for bridges in /sys, which has those of another namespace here
        let script = format!("{dir}/sysfs.sh");
        let text =
            "mount -t sysfs none /sys && mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"\n";
        std::fs::write(&script, text).map_err(|e| e.to_string())?;
        let lxc =
            |command: &str| format!("unshare -m sh {script} lxc-{command} -P {dir} -n {name}");
        yard.case(&format!("{who}, on a bridge"), |y| {
            let start =
                format!("{} -F -f {conf} -- /bin/busybox httpd -f -p 80 -h /etc", lxc("start"));
            let running = run(&start)?;
            sh(&format!("{} -s RUNNING -t 20", lxc("wait")))?;
            let done = y.asks(&format!("{} -- /bin/sh -c '{ASK}; true'", lxc("attach")), who);
            let served = y.serves("http://198.51.100.10/who");
            sh(&format!("{} -k", lxc("stop")))?;
            running.end();
            done.and(served).and_then(|()| y.nothing_left())
        });
    }
    Ok(())
}

fn with_nspawn(yard: &mut Yard) -> Verdict {
    yard.bridge();
    for (parent, who) in [(yard.proxied.clone(), PROXY), (yard.dropped.clone(), "nobody")] {
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

/// docker in docker: what an inner container sends comes in by the outer one's veth, so the outer one's
/// rule decides, whatever names the inner one.
fn with_nested(yard: &mut Yard) -> Verdict {
    let processes = docker(yard.ground)?;
    yard.daemon.reconfigure(&CONFIG.replace("[rules]\n", "[rules]\ndrop = /.*/inner\n"));
    let start = yard.ground.dir.join("start.sh");
    let text = "umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && mount -o remount,rw /proc/sys\n\
                mkdir /sys/fs/cgroup/init && echo 0 >/sys/fs/cgroup/init/cgroup.procs\n\
                exec dockerd --data-root /inner --exec-root /run/docker -p /run/docker.pid -s vfs \
                -H unix:///run/docker.sock\n";
    std::fs::write(&start, text).map_err(|e| e.to_string())?;
    let outer = "docker -H unix:///run/docker.sock";
    let inner = format!("{outer} exec outer {outer}");
    let host =
        ["bin", "sbin", "lib", "lib64", "usr", "etc"].map(|dir| format!("-v /{dir}:/{dir}:ro"));
    let open =
        ["seccomp", "apparmor", "systempaths"].map(|of| format!("--security-opt {of}=unconfined"));
    let boot = |dir: &std::path::Path, image: &str, parent: &str| {
        sh(&format!(
            "{outer} run -d --rm --name outer --network six --ip6 fd00:c::9 --cap-add NET_ADMIN --cap-add SYS_ADMIN {} {} -v {image}:/image:ro \
             -v {}:/start.sh:ro --tmpfs /inner:exec --cgroup-parent /{parent}/box box /bin/sh /start.sh",
            open.join(" "),
            host.join(" "),
            dir.display()
        ))?;
        wait_for(&format!("{inner} info"))?;
        sh(&format!("{outer} exec outer sh -c 'tar -C /image -c . | {outer} import - box'"))
    };
    let free = yard.proxied.replace("/proxied", "/free");
    let six = |subnet: &str| format!("network create --ipv6 --subnet {subnet}::/64 six");
    sh(&format!("{outer} {}", six("fd00:c")))?;
    sysctl("net/ipv6/conf/all/forwarding", "1");
    for subnet in ["fd00:c", "fd00:d"] {
        let line = format!("route add {subnet}::/64 via 2001:db8:1::1\n");
        yard.ground.outside(|| ip_batch(&[], &line));
    }
    for (parent, who) in
        [(yard.proxied.clone(), PROXY), (yard.dropped.clone(), "nobody"), (free.clone(), "remote")]
    {
        yard.case(&format!("docker in docker, {who}"), |y| {
            boot(&start, &y.image, &parent)?;
            for within in ["inner", "other"] {
                let line = format!(
                    "{inner} run --rm --cgroup-parent /{within} box /bin/sh -c '{ASK}; true'"
                );
                y.asks(&line, who).map_err(|why| format!("{within}: {why}"))?;
            }
            Ok(())
        });
        yard.case(&format!("docker in docker, {who}, IPv6"), |y| {
            sh(&format!("{inner} {}", six("fd00:d")))?;
            sh("ip -6 route replace fd00:d::/64 via fd00:c::9")?;
            for within in ["inner", "other"] {
                let line = format!(
                    "{inner} run --rm --network six --cgroup-parent /{within} box /bin/sh -c '{ASK6}; true'"
                );
                y.asks(&line, who).map_err(|why| format!("{within}: {why}"))?;
            }
            Ok(())
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
            sh(&format!("{outer} rm -f outer"))?;
            y.nothing_left()
        });
    }
    processes.into_iter().for_each(Process::end);
    Ok(())
}

/// podman in LXC: as docker in docker.
fn with_podman_in_lxc(yard: &mut Yard) -> Verdict {
    yard.bridge();
    let dir = yard.ground.dir.display().to_string();
    yard.daemon.reconfigure(&CONFIG.replace("[rules]\n", "[rules]\ndrop = /.*/inner\n"));
    sh(&format!("cp -a {} {dir}/inner", yard.image))?;
    let free = yard.proxied.replace("/proxied", "/free");
    let host = ["usr", "etc"]
        .map(|at| format!("lxc.mount.entry = /{at} {at} none bind,ro,create=dir 0 0\n"));
    let own =
        ["var", "run"].map(|at| format!("lxc.mount.entry = none {at} tmpfs create=dir 0 0\n"));
    sh(&format!(
        "cd {0} && rm -rf bin && for d in bin sbin lib lib64; do ln -s usr/$d $d; done; \
         mkdir -p image",
        yard.image
    ))?;
    let sysfs = format!("{dir}/sysfs.sh");
    let text = "mount -t sysfs none /sys && mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"\n";
    std::fs::write(&sysfs, text).map_err(|e| e.to_string())?;
    for (name, parent, who) in [
        ("proxied", yard.proxied.clone(), PROXY),
        ("mute", yard.dropped.clone(), "nobody"),
        ("free", free, "remote"),
    ] {
        let conf = format!("{dir}/{name}.conf");
        let text = format!(
            "lxc.uts.name = {name}\nlxc.rootfs.path = dir:{}\nlxc.net.0.type = veth\n\
             lxc.net.0.link = br-box\nlxc.net.0.flags = up\nlxc.net.0.ipv4.address = \
             198.51.100.10/24\nlxc.net.0.ipv4.gateway = 198.51.100.1\nlxc.cgroup.dir = {parent}/lxc\n\
             lxc.mount.auto = proc:rw sys:rw\nlxc.pty.max = 0\nlxc.tty.max = 0\nlxc.cap.drop =\n\
             lxc.mount.entry = {dir}/inner image none bind,create=dir 0 0\n{}{}",
            yard.image,
            host.concat(),
            own.concat()
        );
        std::fs::write(&conf, text).map_err(|e| e.to_string())?;
        let lxc = |command: &str| format!("unshare -m sh {sysfs} lxc-{command} -P {dir} -n {name}");
        yard.case(&format!("podman in LXC, {who}"), |y| {
            let running = run(&format!("{} -F -f {conf} -- /usr/bin/sleep 600", lxc("start")))?;
            sh(&format!("{} -s RUNNING -t 20", lxc("wait")))?;
            let mut said = Ok(());
            for within in ["inner", "other"] {
                let inside = format!(
                    "mount -t cgroup2 none /sys/fs/cgroup; mkdir -p /dev/shm; mount -t tmpfs none /dev/shm; \
                     podman --runtime runc --root /var/podman --runroot /run/podman \
                     --network-config-dir /var/networks --cgroup-manager cgroupfs run --rm {LIMITS} \
                     --cgroup-parent /{within} --rootfs /image /bin/sh -c \"{ASK}; true\""
                );
                let line = format!("{} --clear-env -v PATH=/usr/sbin:/usr/bin -- /bin/sh -c '{inside}'", lxc("attach"));
                said = said.and_then(|()| y.asks(&line, who).map_err(|why| format!("{within}: {why}")));
            }
            sh(&format!("{} -k", lxc("stop")))?;
            running.end();
            said.and_then(|()| y.nothing_left())
        });
    }
    Ok(())
}

#[test]
#[ignore = "make real-test runs it"]
fn containers() {
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut failed = Vec::new();
    for engine in &ENGINES {
        let name = engine.name;
        if !only.is_empty() && !only.split(' ').any(|o| o == name) {
            continue;
        }
        let missing =
            engine.needs.iter().chain(&["busybox"]).find(|command| which(command).is_none());
        if let Some(missing) = missing {
            report(name, "containers", Err(format!("SKIP: no {missing}")));
            continue;
        }
        let ground = ground!("engines");
        // as dockerd has it
        crate::gateway::bridge_netfilter(true);
        let world = World::new(&ground);
        let _proxy = Server::start(PROXY, &[7893]);
        // not empty without the container: podman removes the parents that it leaves empty
        for path in ["/proxied/other", "/drop/other"] {
            ground.cgroup(path);
        }
        let image = ground.dir.join("image");
        let prepared = busybox(&image).and_then(|()| {
            let text = "the web server of a container\n";
            let file = image.join("etc/who");
            sh(&format!("mkdir -p {}/usr", image.display()))?;
            std::fs::write(file, text).map_err(|e| e.to_string())
        });
        let below = |path: &str| {
            let dir = ground.at(path);
            dir.strip_prefix("/sys/fs/cgroup").map(|dir| dir.display().to_string())
        };
        let (Ok(proxied), Ok(dropped), Ok(())) = (below("/proxied"), below("/drop"), prepared)
        else {
            report(name, "containers", Err("SKIP: no root file system".into()));
            continue;
        };
        let mut yard = Yard {
            ground: &ground,
            world,
            daemon: Daemon::start(&ground, CONFIG, &[]),
            engine: name,
            image: image.display().to_string(),
            proxied,
            dropped,
            well: true,
        };
        let verdict = (engine.cases)(&mut yard);
        if verdict.is_err() {
            yard.say("containers", verdict);
        }
        if !yard.well {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}
