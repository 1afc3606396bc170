//! WireGuard (the kernel's, and wireguard-go) and OpenVPN, both ends, as the interface of a [route]:
//! what its applications send goes by it and by nothing else, and its own packets do not come back
//! to it, be they known by its program's cgroup or by its mark.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{needs, report, sh, try_all, Process, Verdict};
use crate::daemon::{run_with, Daemon};
use crate::ground::{ip_lines, Ground, REMOTE4, REMOTES};
use crate::kernel::{await_member, forget_flows};
use crate::routes::{passes, refused, until_closed, until_open, until_passes};
use crate::tunnels::{
    bulk, by_cgroup, only_its_own, resolves, resolves_nothing, up, ALL, DNS, PORT,
};
use crate::wait_until;
use crate::world::World;

/// The mark of its socket, as wg-quick sets it. OpenVPN reads `0x` as 0.
const MARK: u32 = 51820;

/// What makes a tunnel of two ends, `vpn0` here and `vout0` outside.
struct Program {
    name: &'static str,
    needs: &'static [&'static str],
    /// A line that makes the keys of both ends in the directory that it runs in.
    keys: &'static str,
    end: fn(dir: &str, cgroup: &Path, name: &str) -> Result<End, String>,
    /// Whether what it sends belongs to its own cgroup; the kernel's has that of what it carries.
    has_cgroup: bool,
}

/// What an end lives by; it ends when this is dropped.
type End = Box<dyn Any>;

const PROGRAMS: [Program; 3] = [
    Program {
        name: "wireguard",
        needs: &["wg"],
        keys: WG_KEYS,
        end: kernel_wireguard,
        has_cgroup: false,
    },
    Program {
        name: "wireguard-go",
        needs: &["wireguard-go", "wg"],
        keys: WG_KEYS,
        end: wireguard,
        has_cgroup: true,
    },
    Program {
        name: "openvpn",
        needs: &["openvpn"],
        keys: "openvpn --genkey secret secret",
        end: openvpn,
        has_cgroup: true,
    },
];

const WG_KEYS: &str = "wg genkey > vpn0; wg genkey > vout0";

fn with_interface(process: Process, name: &str) -> Result<Process, String> {
    match wait_until(Duration::from_secs(10), || sh(&format!("ip link show {name}")).is_ok()) {
        true => Ok(process),
        false => Err(format!("{name} does not come")),
    }
}

fn wireguard(dir: &str, cgroup: &Path, name: &str) -> Result<End, String> {
    let mut command = Command::new("wireguard-go");
    command.args(["-f", name]).env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1");
    let process = with_interface(Process::start(&mut command, Some(cgroup))?, name)?;
    wire(dir, name)?;
    Ok(Box::new(process))
}

/// An interface of the kernel's WireGuard, deleted on drop.
struct Interface(String);

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = sh(&format!("ip link del {}", self.0));
    }
}

fn kernel_wireguard(dir: &str, _: &Path, name: &str) -> Result<End, String> {
    sh(&format!("ip link add {name} type wireguard")).map_err(|why| format!("SKIP: {why}"))?;
    let interface = Interface(name.into());
    wire(dir, name)?;
    Ok(Box::new(interface))
}

/// Tells an end of WireGuard its key and who is at the other one.
fn wire(dir: &str, name: &str) -> Result<(), String> {
    let (peer, mark, endpoint) = match name {
        "vpn0" => ("vout0", format!("fwmark {MARK}"), format!("endpoint 192.0.2.2:{PORT}")),
        _ => ("vpn0", String::new(), String::new()),
    };
    let set = format!(
        "wg set {name} private-key {dir}/{name} listen-port {PORT} {mark} \
         peer $(wg pubkey < {dir}/{peer}) allowed-ips 0.0.0.0/0,::/0 {endpoint}"
    );
    // the program listens to it a moment after its interface has come
    match wait_until(Duration::from_secs(10), || sh(&set).is_ok()) {
        true => Ok(()),
        false => Err(format!("{name} takes no keys")),
    }
}

/// With one key for both ends: a tunnel that shakes no hands.
fn openvpn(dir: &str, cgroup: &Path, name: &str) -> Result<End, String> {
    let mut command = Command::new("openvpn");
    command.args(["--dev", name, "--dev-type", "tun", "--tun-mtu", "1280", "--proto", "udp4"]);
    command.args(["--secret", &format!("{dir}/secret"), "--cipher", "AES-256-CBC"]);
    // an option that 2.6 does not know and 2.7 asks for
    command.args(["--setenv", "opt", "allow-deprecated-insecure-static-crypto"]);
    command.args(["--lport", &PORT.to_string()]);
    if name == "vpn0" {
        command.args(["--remote", "192.0.2.2", &PORT.to_string(), "--mark", &MARK.to_string()]);
    }
    Ok(Box::new(with_interface(Process::start(&mut command, Some(cgroup))?, name)?))
}

fn here(ground: &Ground, program: &Program) -> Result<End, String> {
    (program.end)(&ground.dir.display().to_string(), &ground.cgroup("/tunnel"), "vpn0")
}

/// The end outside.
fn there(ground: &Ground, program: &Program) -> Result<End, String> {
    ground.outside(|| {
        let dir = ground.dir.display().to_string();
        let end = (program.end)(&dir, &ground.cgroup("/peer"), "vout0")?;
        ip_lines(
            "link set vout0 mtu 1280 up\naddr add 10.8.0.2/24 dev vout0\n\
             addr add fd00:8::2/64 dev vout0 nodad\n",
        );
        Ok(end)
    })
}

/// A tunnel in use, by a cgroup whose way it is.
struct Tunnel<'a> {
    ground: &'a Ground,
    program: &'static Program,
    world: World,
    cgroup: PathBuf,
    /// This host's end, but for when it is away.
    own: Option<End>,
    daemon: Daemon,
    _peer: End,
}

/// What is tried, and how.
type Case = (&'static str, fn(&mut Tunnel));

/// What it has to do, whatever the program, one after the other.
const CASES: [Case; 6] = [
    ("TCP, UDP and ping, both families, by it alone", |t| t.carries()),
    ("DNS goes into it, 127.0.0.53 too", |t| resolves(&mut t.world, &t.cgroup)),
    ("10 MiB each way at MTU 1280", |t| t.carries_much()),
    ("down and up", |t| t.cannot_be_used(|| ip_lines("link set vpn0 down\n"))),
    ("without an address", |t| t.cannot_be_used(|| ip_lines("addr flush dev vpn0\n"))),
    ("the program ends and comes back", |t| t.ends_and_comes_back()),
];

impl<'a> Tunnel<'a> {
    fn new(ground: &'a Ground, program: &'static Program) -> Result<Tunnel<'a>, String> {
        let (world, cgroup) = (World::new(ground), ground.cgroup("/vpn"));
        sh(&format!("umask 77; cd {}; {}", ground.dir.display(), program.keys))?;
        let peer = there(ground, program)?;
        let own = here(ground, program)?;
        up(1280);
        let daemon = Daemon::start(ground, &policy(program), &[]);
        await_member(&cgroup, "vpn");
        Ok(Tunnel { ground, program, world, cgroup, own: Some(own), daemon, _peer: peer })
    }

    /// What a case that panics says stands above its line.
    fn case(&mut self, what: &str, work: fn(&mut Tunnel<'a>)) -> bool {
        let done: Verdict =
            catch_unwind(AssertUnwindSafe(|| work(self))).map_err(|_| "see the panic above".into());
        report(self.program.name, what, done)
    }

    fn carries(&mut self) {
        until_open(&self.cgroup);
        passes(&mut self.world, &self.cgroup);
        self.world.wire.packets();

        until_passes(&self.cgroup, REMOTE4);

        only_its_own(&mut self.world);
    }

    fn carries_much(&mut self) {
        for remote in REMOTES {
            println!("    {remote}: {:?}", bulk(self.ground, &self.cgroup, remote));
        }
    }

    /// Nothing passes while it cannot be used, and all does afterwards.
    fn cannot_be_used(&mut self, end: fn()) {
        end();
        until_closed(&self.cgroup);
        refused(&mut self.world, &self.cgroup);

        up(1280);
        for to in REMOTES {
            println!("    {to}: back after {:?}", until_passes(&self.cgroup, to));
        }
        passes(&mut self.world, &self.cgroup);
    }

    fn ends_and_comes_back(&mut self) {
        self.own = None;
        until_closed(&self.cgroup);
        refused(&mut self.world, &self.cgroup);
        resolves_nothing(&mut self.world, &self.cgroup);

        self.own = Some(here(self.ground, self.program).expect("the program"));
        let start = Instant::now();
        up(1280);
        until_open(&self.cgroup);
        println!("    back after {:?}, handshake included", start.elapsed());
        passes(&mut self.world, &self.cgroup);
    }

    /// All goes by it but its own packets: its own flow was begun from here, when the policy comes and
    /// when the next daemon does.
    fn carries_all(&mut self, config: &str) {
        let any = self.ground.cgroup("/any");
        let said = run_with(self.ground, config, &["check"]).out;
        assert!(!said.contains("loop: "), "{said}");
        self.daemon.reconfigure(&policy(self.program));
        forget_flows();
        until_open(&self.cgroup);

        self.daemon.reconfigure(config);

        for _ in 0..2 {
            until_open(&any);
            self.world.wire.packets();
            passes(&mut self.world, &any);
            self.daemon.signal(Signal::SIGKILL);
            self.daemon = Daemon::start(self.ground, config, &[]);
        }
    }
}

/// One cgroup goes by the tunnel.
fn policy(program: &Program) -> String {
    // what the kernel's own sends has the cgroup of what it carries
    let spared = if program.has_cgroup { String::new() } else { format!("bypass-mark = {MARK}\n") };
    format!("[global]\n{spared}{}", by_cgroup(DNS))
}

/// All goes by the tunnel but what bears its mark.
fn all_but_its_mark() -> String {
    ALL.replace("[global]\n", &format!("[global]\nbypass-mark = {MARK}\n"))
        .replace("direct = /tunnel", "direct = /other")
}

fn is_a_way_out(program: &'static Program, ground: &Ground) -> Result<bool, String> {
    needs(program.needs)?;
    let mut tunnel = Tunnel::new(ground, program)?;
    let mut well = true;
    for (what, work) in CASES {
        well &= tunnel.case(what, work);
    }
    if program.has_cgroup {
        well &= tunnel.case("all but its program's cgroup", |t| t.carries_all(ALL));
    }
    well &= tunnel.case("all but what bears its mark", |t| t.carries_all(&all_but_its_mark()));
    Ok(well)
}

#[test]
#[ignore = "make real-test runs it"]
fn tunnels() {
    try_all(&PROGRAMS, |program| program.name, is_a_way_out);
}
