//! WireGuard of user space (wireguard-go, both ends) as the interface of a [route]: what its
//! applications send goes by it and by nothing else, and its own packets do not come back to it,
//! be they known by its program's cgroup or by its mark.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::{report, which, Process, Verdict};
use crate::daemon::Daemon;
use crate::ground::{ip_batch, Ground, REMOTE4, REMOTE6};
use crate::kernel::await_member;
use crate::routes::{passes, refused, until_passes, until_refused};
use crate::tunnels::{
    bulk, by_cgroup, only_its_own, resolves, resolves_nothing, up, ALL, DNS, PORT,
};
use crate::wait_until;
use crate::world::World;

/// `FwMark` of its socket, as wg-quick sets it.
const MARK: &str = "0xca6c";

fn sh(line: &str) -> Result<String, String> {
    let out = Command::new("sh").args(["-c", line]).output().map_err(|e| e.to_string())?;
    match out.status.success() {
        true => Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned()),
        false => Err(format!("{line}: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// One end, with its keys in files: `wireguard-go NAME` in a cgroup.
fn end(cgroup: &Path, name: &str) -> Result<Process, String> {
    let mut command = Command::new(which("wireguard-go").ok_or("SKIP: no wireguard-go")?);
    command.args(["-f", name]).env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1");
    let process = Process::start(&mut command, Some(cgroup))?;
    let there = || sh(&format!("wg show {name}")).is_ok();
    match wait_until(Duration::from_secs(10), there) {
        true => Ok(process),
        false => Err(format!("{name} does not come")),
    }
}

/// Tells an end its key and who is at the other one.
fn wire(dir: &str, name: &str, peer: &str, more: &str) -> Result<(), String> {
    sh(&format!(
        "wg set {name} private-key {dir}/{name} listen-port {PORT} {more} \
         peer $(wg pubkey < {dir}/{peer}) allowed-ips 0.0.0.0/0,::/0"
    ))
    .map(drop)
}

fn here(ground: &Ground) -> Result<Process, String> {
    let process = end(&ground.cgroup("/tunnel"), "vpn0")?;
    let dir = ground.dir.display().to_string();
    wire(&dir, "vpn0", "vout0", &format!("fwmark {MARK}"))?;
    sh(&format!("wg set vpn0 peer $(wg pubkey < {dir}/vout0) endpoint 192.0.2.2:{PORT}"))?;
    Ok(process)
}

fn scene(ground: &Ground) -> Result<(Process, Process), String> {
    let dir = ground.dir.display().to_string();
    sh(&format!("umask 77; wg genkey > {dir}/vpn0; wg genkey > {dir}/vout0"))?;
    let peer = ground.outside(|| {
        let peer = end(&ground.cgroup("/peer"), "vout0")?;
        wire(&dir, "vout0", "vpn0", "")?;
        ip_batch(
            &[],
            "link set vout0 mtu 1280 up\naddr add 10.8.0.2/24 dev vout0\n\
             addr add fd00:8::2/64 dev vout0 nodad\n",
        );
        Ok::<_, String>(peer)
    })?;
    let own = here(ground)?;
    up(1280);
    Ok((peer, own))
}

/// What a case that panics says stands above its line.
fn case(what: &str, work: impl FnOnce()) -> bool {
    let done: Verdict =
        catch_unwind(AssertUnwindSafe(work)).map_err(|_| "see the panic above".into());
    report("wireguard-go", what, done)
}

fn both(cgroup: &Path, until: impl Fn(&Path, std::net::IpAddr)) {
    [REMOTE4, REMOTE6].into_iter().for_each(|remote| until(cgroup, remote));
}

#[test]
#[ignore = "make real-test runs it"]
fn tunnels() {
    let only = std::env::var("ONLY").unwrap_or_default();
    if !only.is_empty() && !only.split(' ').any(|o| o == "wireguard-go") {
        return;
    }
    if let Some(missing) = ["wireguard-go", "wg"].iter().find(|name| which(name).is_none()) {
        report("wireguard-go", "start", Err(format!("SKIP: no {missing}")));
        return;
    }
    let ground = ground!("wireguard");
    let mut world = World::new(&ground);
    let cgroup = ground.cgroup("/vpn");
    let (_peer, own) = match scene(&ground) {
        Ok(ends) => ends,
        Err(why) => {
            assert!(report("wireguard-go", "start", Err(why)));
            return;
        }
    };
    let daemon = Daemon::start(&ground, &by_cgroup(DNS), &[]);
    await_member(&cgroup, "vpn");
    let mut well = true;
    well &= case("TCP, UDP and ping, both families, by it alone", || {
        both(&cgroup, |cgroup, to| {
            until_passes(cgroup, to);
        });
        passes(&mut world, &cgroup);
        world.wire.packets();
        until_passes(&cgroup, REMOTE4);
        only_its_own(&mut world);
    });
    well &= case("DNS goes into it, 127.0.0.53 too", || resolves(&mut world, &cgroup));
    well &= case("10 MiB each way at MTU 1280", || {
        for remote in [REMOTE4, REMOTE6] {
            println!("    {remote}: {:?}", bulk(&ground, &cgroup, remote));
        }
    });
    well &= case("down and up", || {
        ip_batch(&[], "link set vpn0 down\n");
        both(&cgroup, until_refused);
        refused(&mut world, &cgroup);
        up(1280);
        both(&cgroup, |cgroup, to| println!("    {to}: back after {:?}", until_passes(cgroup, to)));
        passes(&mut world, &cgroup);
    });
    well &= case("without an address", || {
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
    well &= case("the program ends and comes back", || {
        own.take();
        both(&cgroup, until_refused);
        refused(&mut world, &cgroup);
        resolves_nothing(&mut world, &cgroup);
        own = Some(here(&ground).expect("the program"));
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
    for (what, config) in
        [("all but its program's cgroup", ALL), ("all but what bears its mark", &*by_mark)]
    {
        well &= case(what, || {
            let said = crate::daemon::run_with(&ground, config, &["check"]).stdout;
            let said = String::from_utf8_lossy(&said);
            assert!(!said.contains("loop: "), "{said}");
            daemon.reconfigure(config);
            both(&any, |cgroup, to| {
                until_passes(cgroup, to);
            });
            world.wire.packets();
            passes(&mut world, &any);
        });
    }
    drop(own);
    assert!(well);
}
