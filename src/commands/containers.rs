//! Containers as the commands find them: by one look, as the daemon does by following.

use crate::cgroup::follow::Cgroups;
use crate::cgroup::tree::{Node, Path};
use crate::config::Target;
use crate::containers::Containers;
use crate::kernel::Kernel;
use crate::policy;

/// A veth that leads to processes which a rule decides for.
pub struct Container {
    pub index: u32,
    pub veth: String,
    pub target: Target,
    pub cgroup: Path,
    /// What the veth is a port of.
    pub bridge: Option<String>,
}

impl Container {
    /// What its packets come in by, as the IP layer sees it.
    pub fn interfaces(self) -> impl Iterator<Item = String> {
        [self.veth].into_iter().chain(self.bridge)
    }
}

/// The containers that rules cover now.
pub fn find(kernel: &mut Kernel, cgroups: &Cgroups) -> Vec<Container> {
    let config = cgroups.core.config();
    match config.containers && !config.rules.is_empty() {
        true => find_of(kernel, cgroups, |node| cgroups.core.is_ruled(node)),
        false => Vec::new(),
    }
}

/// The same of all cgroups but the root, whatever decides for them: every process is looked at
/// where there is another namespace to be in.
pub fn find_all(kernel: &mut Kernel, cgroups: &Cgroups) -> Vec<Container> {
    let root = cgroups.core.tree().get(b"").map(|root| root.id);
    find_of(kernel, cgroups, |node| Some(node.id) != root)
}

fn find_of(
    kernel: &mut Kernel,
    cgroups: &Cgroups,
    wanted: impl Fn(&Node) -> bool,
) -> Vec<Container> {
    let core = &cgroups.core;
    let mut found = Containers::default();
    found.replace(kernel.interfaces().unwrap_or_default(), 0);
    let all = || core.tree().iter().filter(|(_, node)| wanted(node));
    for path in found.in_question(0, || all().map(|(path, _)| path)) {
        let id = core.tree().get(&path).map_or(0, |node| node.id);
        let (nets, _) = kernel.namespaces_of(&cgroups.watcher.processes(&path));
        found.seen(&path, id, &nets);
    }
    let decides = |path: &Path| {
        let node = core.tree().get(path).filter(|node| wanted(node))?;
        Some((node.rank, policy::outcome(core.config(), node.rank).target))
    };
    let entrances = found.entrances(decides, Some).clone();
    let veths = entrances.veths.into_iter().filter_map(|(index, (veth, target))| {
        let cgroup = found.first(index, decides)?;
        let bridge = found.bridge(index).map(str::to_string);
        Some(Container { index, veth, target, cgroup, bridge })
    });
    veths.collect()
}

/// What a container is called by whoever made it, as far as its cgroup tells.
pub fn name(path: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(path).into_owned();
    let parts = text.rsplit('/').find_map(|part| {
        let part = part.strip_suffix(".scope").or_else(|| part.strip_suffix(".service"));
        let part = part.unwrap_or_default();
        part.strip_prefix("machine-").or_else(|| part.strip_prefix("systemd-nspawn@"))
    });
    let lxc = || text.split('/').find_map(|part| part.strip_prefix("lxc.payload."));
    let long = || text.rsplit('/').find_map(of_engine);
    long().or_else(|| parts.or_else(lxc).map(str::to_string))
}

/// The beginning of the id that docker, podman and others give, by which they know it too.
fn of_engine(part: &str) -> Option<String> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let (engine, id) = part.rsplit_once('-').unwrap_or(("", part));
    let is_id = id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit());
    // `libpod-payload-ID` in a unit of its own (quadlet)
    let engine = if engine.starts_with("libpod") { "podman" } else { engine };
    is_id.then(|| format!("{engine} {}", &id[..12]).trim_start().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_containers() {
        let id = "0123456789ab".to_string() + &"c".repeat(52);
        let of = |path: &str| name(path.replace("ID", &id).as_bytes());
        let named = |text: &str| Some(text.to_string());
        assert_eq!(of("/system.slice/docker-ID.scope"), named("docker 0123456789ab"));
        assert_eq!(of("/machine.slice/libpod-ID.scope/container"), named("podman 0123456789ab"));
        let quadlet = "/app.slice/web.service/libpod-payload-ID";
        assert_eq!(of(quadlet), named("podman 0123456789ab"));
        assert_eq!(of("/docker/ID"), named("0123456789ab"));
        assert_eq!(of("/lxc.payload.web/init.scope"), named("web"));
        assert_eq!(of("/machine.slice/systemd-nspawn@web.service/payload"), named("web"));
        assert_eq!(of("/services/x"), None);
        assert_eq!(of("/docker/xID"), None);
    }
}
