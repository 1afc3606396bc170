//! WireGuard (the kernel's, and wireguard-go) and OpenVPN, both ends, as the interface of a [route]:
//! what its applications send goes by it and by nothing else, and its own packets do not come back
//! to it, be they known by its program's cgroup or by its mark.

use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{report, which, Process, Verdict};
use crate::daemon::Daemon;
use crate::ground::{ip_batch, Ground, REMOTE4, REMOTE6};
use crate::kernel::{await_member, forget_flows};
use crate::routes::{passes, refused, until_passes, until_refused};
use crate::tunnels::{
    bulk, by_cgroup, only_its_own, resolves, resolves_nothing, up, ALL, DNS, PORT,
};
use crate::wait_until;
use crate::world::World;

/// The mark of its socket, as wg-quick sets it. OpenVPN reads `0x` as 0.
const MARK: u32 = 51820;

fn sh(line: &str) -> Result<String, String> {
    let out = Command::new("sh").args(["-c", line]).output().map_err(|e| e.to_string())?;
    match out.status.success() {
        true => Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned()),
        false => Err(format!("{line}: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

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

fn there(process: Process, name: &str) -> Result<Process, String> {
    match wait_until(Duration::from_secs(10), || sh(&format!("ip link show {name}")).is_ok()) {
        true => Ok(process),
        false => Err(format!("{name} does not come")),
    }
}

fn wireguard(dir: &str, cgroup: &Path, name: &str) -> Result<End, String> {
    let mut command = Command::new("wireguard-go");
    command.args(["-f", name]).env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1");
    let process = there(Process::start(&mut command, Some(cgroup))?, name)?;
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
    Ok(Box::new(there(Process::start(&mut command, Some(cgroup))?, name)?))
}

fn here(ground: &Ground, program: &Program) -> Result<End, String> {
    (program.end)(&ground.dir.display().to_string(), &ground.cgroup("/tunnel"), "vpn0")
}

fn scene(ground: &Ground, program: &Program) -> Result<(End, End), String> {
    let dir = ground.dir.display().to_string();
    sh(&format!("umask 77; cd {dir}; {}", program.keys))?;
    let peer = ground.outside(|| {
        let peer = (program.end)(&dir, &ground.cgroup("/peer"), "vout0")?;
        ip_batch(
            &[],
            "link set vout0 mtu 1280 up\naddr add 10.8.0.2/24 dev vout0\n\
             addr add fd00:8::2/64 dev vout0 nodad\n",
        );
        Ok::<_, String>(peer)
    })?;
    let own = here(ground, program)?;
    up(1280);
    Ok((peer, own))
}

/// What a case that panics says stands above its line.
fn case(program: &Program, what: &str, work: impl FnOnce()) -> bool {
    let done: Verdict =
        catch_unwind(AssertUnwindSafe(work)).map_err(|_| "see the panic above".into());
    report(program.name, what, done)
}

fn both(cgroup: &Path, until: impl Fn(&Path, std::net::IpAddr)) {
    [REMOTE4, REMOTE6].into_iter().for_each(|remote| until(cgroup, remote));
}

#[test]
#[ignore = "make real-test runs it"]
fn tunnels() {
    let only = std::env::var("ONLY").unwrap_or_default();
    let wanted =
        |program: &&Program| only.is_empty() || only.split(' ').any(|name| name == program.name);
    let well: Vec<bool> = PROGRAMS.iter().filter(wanted).map(tunnel).collect();
    assert!(!well.contains(&false));
}

fn tunnel(program: &Program) -> bool {
    if let Some(missing) = program.needs.iter().find(|name| which(name).is_none()) {
        return report(program.name, "start", Err(format!("SKIP: no {missing}")));
    }
    let Some(ground) = Ground::new(program.name) else {
        return false;
    };
    let mut world = World::new(&ground);
    let cgroup = ground.cgroup("/vpn");
    let (_peer, own) = match scene(&ground, program) {
        Ok(ends) => ends,
        Err(why) => return report(program.name, "start", Err(why)),
    };
    // what the kernel's own sends has the cgroup of what it carries
    let spared = if program.has_cgroup { String::new() } else { format!("bypass-mark = {MARK}\n") };
    let before = format!("[global]\n{spared}{}", by_cgroup(DNS));
    let mut daemon = Daemon::start(&ground, &before, &[]);
    await_member(&cgroup, "vpn");
    let mut well = true;
    well &= case(program, "TCP, UDP and ping, both families, by it alone", || {
        both(&cgroup, |cgroup, to| {
            until_passes(cgroup, to);
        });
        passes(&mut world, &cgroup);
        world.wire.packets();
        until_passes(&cgroup, REMOTE4);
        only_its_own(&mut world);
    });
    well &= case(program, "DNS goes into it, 127.0.0.53 too", || resolves(&mut world, &cgroup));
    well &= case(program, "10 MiB each way at MTU 1280", || {
        for remote in [REMOTE4, REMOTE6] {
            println!("    {remote}: {:?}", bulk(&ground, &cgroup, remote));
        }
    });
    well &= case(program, "down and up", || {
        ip_batch(&[], "link set vpn0 down\n");
        both(&cgroup, until_refused);
        refused(&mut world, &cgroup);
        up(1280);
        both(&cgroup, |cgroup, to| println!("    {to}: back after {:?}", until_passes(cgroup, to)));
        passes(&mut world, &cgroup);
    });
    well &= case(program, "without an address", || {
        ip_batch(&[], "addr flush dev vpn0\n");
        both(&cgroup, until_refused);
        refused(&mut world, &cgroup);
        up(1280);
        both(&cgroup, |cgroup, to| {
            until_passes(cgroup, to);
        });
        passes(&mut world, &cgroup);
    });
    let mut own = Some(own);
    well &= case(program, "the program ends and comes back", || {
        own.take();
        both(&cgroup, until_refused);
        refused(&mut world, &cgroup);
        resolves_nothing(&mut world, &cgroup);
        own = Some(here(&ground, program).expect("the program"));
        let start = Instant::now();
        up(1280);
        both(&cgroup, |cgroup, to| {
            until_passes(cgroup, to);
        });
        println!("    back after {:?}, handshake included", start.elapsed());
        passes(&mut world, &cgroup);
    });
    let any = ground.cgroup("/any");
    let by_mark = ALL.replace("[global]\n", &format!("[global]\nbypass-mark = {MARK}\n"));
    let by_mark = by_mark.replace("direct = /tunnel", "direct = /other");
    let own_cgroup = ("all but its program's cgroup", ALL);
    let own_mark = ("all but what bears its mark", &*by_mark);
    let ways = [own_cgroup, own_mark].into_iter().skip(usize::from(!program.has_cgroup));
    for (what, config) in ways {
        well &= case(program, what, || {
            let said = crate::daemon::run_with(&ground, config, &["check"]).out;
            assert!(!said.contains("loop: "), "{said}");
            // its own flow was begun from here, when the policy comes and when the next daemon does
            daemon.reconfigure(&before);
            forget_flows();
            both(&cgroup, |cgroup, to| {
                until_passes(cgroup, to);
            });
            daemon.reconfigure(config);
            for _ in 0..2 {
                both(&any, |cgroup, to| {
                    until_passes(cgroup, to);
                });
                world.wire.packets();
                passes(&mut world, &any);
                daemon.signal(Signal::SIGKILL);
                daemon = Daemon::start(&ground, config, &[]);
            }
        });
    }
    drop(own);
    well
}
