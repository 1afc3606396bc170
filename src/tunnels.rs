//! Whose program stands behind a tun or tap interface: a tunnel of user space must not send its own
//! packets by the route that leads into it. It reads /proc, and decides nothing about packets.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::cgroup::core::Core;
use crate::cgroup::mount;
use crate::config::{Config, Route, Target};
use crate::host;
use crate::log::Escaped;
use crate::netlink::link::Link;
use crate::policy;
use crate::small::SmallSet;

/// A line for each route whose tunnel's own packets come back to it: the program that holds the
/// interface, as far as can be seen. `spared` are the inodes of sockets whose mark has them left
/// alone.
pub fn of_programs(config: &Config, core: &Core, spared: &SmallSet<u32>) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, pid) in &holders() {
        let Some((index, route)) = by(config, name) else { continue };
        let Some(target) = target(config, core, *pid) else {
            continue;
        };
        if target.1 == Target::Route(index as u8) && !has_one_of(*pid, spared) {
            lines.push(line(
                route,
                &format!(
                    "pid {pid}, which holds it, is in cgroup {}; begin \
                [rules] with a direct rule for that, or name its user as bypass-user, or the mark \
                of its socket as bypass-mark",
                    target.0
                ),
            ));
        }
    }
    lines
}

/// The same of tunnels of the kernel. These send what they carry in the same sk_buff, socket and all
/// (since Linux 4.18), and have packets without one besides: WireGuard's handshakes.
pub fn of_the_kernel(config: &Config, links: &[Link]) -> Vec<String> {
    let mut lines = Vec::new();
    for link in links {
        let kernels = ["wireguard", "gre", "ipip", "sit", "vxlan", "l2tpeth", "amneziawg"];
        let Some((index, route)) =
            by(config, &link.name).filter(|_| kernels.contains(&&*link.kind))
        else {
            continue;
        };
        let exempt = !config.bypass_marks.is_empty()
            || [&config.bypass, &route.outlet.bypass].iter().any(|ranges| ranges.has_a_host());
        if config.decides(Target::Route(index as u8)) && !exempt {
            lines.push(line(
                route,
                "what it sends keeps the cgroup and the owner of what it carries; name \
                its FwMark as bypass-mark, or its peer's address as bypass",
            ));
        }
    }
    lines
}

/// The route by an interface.
fn by<'a>(config: &'a Config, interface: &str) -> Option<(usize, &'a Route)> {
    config.routes.iter().enumerate().find(|(_, route)| route.interface == interface)
}

fn line(route: &Route, why: &str) -> String {
    let (name, interface) = (&route.outlet.name, &route.interface);
    format!(
        "loop: what the tunnel {interface} of [route {name}] sends itself comes back to it: {why}"
    )
}

/// The interfaces of tun devices that processes hold; those of others are seen by root alone. In
/// another network namespace another interface may have the name.
fn holders() -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let mut home = None;
        for fd in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let is_tun = fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/net/tun"));
            let is_at_home = || host::shares_network(&format!("{pid}")) == Some(true);
            if !is_tun || !*home.get_or_insert_with(is_at_home) {
                continue;
            }
            let info = fs::read_to_string(process.path().join("fdinfo").join(fd.file_name()));
            let info = info.unwrap_or_default();
            let name = info.lines().find_map(|line| line.strip_prefix("iff:"));
            found.extend(name.map(|name| (name.trim().to_string(), pid)));
        }
    }
    found.dedup();
    found
}

/// Whether a process holds one of these sockets.
fn has_one_of(pid: u32, sockets: &SmallSet<u32>) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    !sockets.is_empty()
        && fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|to| {
            let text = to.to_string_lossy();
            let inode = text.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
            inode.and_then(|inode| inode.parse().ok()).is_some_and(|inode| sockets.contains(&inode))
        })
}

/// The cgroup of a process, fit to print, and the target of its sockets.
fn target(config: &Config, core: &Core, pid: u32) -> Option<(String, Target)> {
    let uid = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
    let own = mount::find_cgroup(&pid.to_string()).ok()??;
    let root = mount::find(config.cgroup_root.as_deref()).ok()?;
    let mounts = mount::mounts(&fs::read("/proc/self/mountinfo").ok()?);
    let known = mount::from_root(&own, &root, &mounts).and_then(|path| core.outcome(&path));
    let outcome = known.unwrap_or_else(|| config.default_outcome());
    Some((Escaped(&own).to_string(), policy::likely_target(config, outcome, uid)))
}
