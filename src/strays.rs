//! Services that run where no rule can find them. Some procd put a service into the root cgroup when
//! they start it again, instead of /services/NAME/INSTANCE; so does every procd on which cgroup2 was
//! not mounted by then. It reads /proc, and decides nothing about packets.

use std::fs;
use std::path::Path;

use crate::config::Config;
use crate::log::Escaped;
use crate::policy::{self, Decision};

/// A process, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    /// As the kernel has it, and as it was called.
    names: [Vec<u8>; 2],
}

/// A line that names each service of procd that is in the root cgroup; `None` where all is well,
/// or where procd is not the init system.
pub fn find(config: &Config) -> Option<String> {
    if fs::read("/proc/1/comm").ok()? != b"procd\n" {
        return None;
    }
    let pids = fs::read_dir("/proc").ok()?.flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let strays = pids.filter_map(|pid: u32| {
        let read = |file| fs::read(format!("/proc/{pid}/{file}")).ok();
        stray(pid, &read("stat")?, &read("cgroup")?, &read("cmdline")?)
    });
    let is_service = |name: &[u8]| {
        let name = String::from_utf8_lossy(name);
        decides(config, &name) || Path::new("/etc/init.d").join(&*name).is_file()
    };
    line(&strays.collect::<Vec<_>>(), is_service)
}

/// A child of procd in the root cgroup that is neither a kernel thread nor a service script.
fn stray(pid: u32, stat: &[u8], cgroup: &[u8], cmdline: &[u8]) -> Option<Process> {
    // the name is in parentheses, and may hold some
    let open = stat.iter().position(|b| *b == b'(')?;
    let close = stat.iter().rposition(|b| *b == b')')?;
    let mut fields = stat.get(close + 1..)?.split(|b| *b == b' ').skip(2);
    let child = fields.next()? == b"1";
    let in_root = cgroup.split(|b| *b == b'\n').any(|line| line == b"0::/");
    let mut words = cmdline.split(|b| *b == 0);
    let called = words.next().filter(|word| !word.is_empty())?;
    let script = words.any(|word| word == b"/etc/rc.common");
    let base = called.rsplit(|b| *b == b'/').next().unwrap_or(called);
    let names = [stat.get(open + 1..close)?.to_vec(), base.to_vec()];
    (child && in_root && !script).then_some(Process { pid, names })
}

/// Whether a rule is about a service of that name.
fn decides(config: &Config, name: &str) -> bool {
    let paths = [name, "instance1"].map(|instance| format!("/services/{name}/{instance}"));
    let ranks =
        |path: &String| policy::ranks(config, path.as_bytes(), false).last().map(|last| last.1);
    let mut decisions = paths.iter().filter_map(ranks).map(|rank| policy::decision(config, rank));
    !name.is_empty() && decisions.any(|decision| !matches!(decision, Decision::Default))
}

fn line(strays: &[Process], is_service: impl Fn(&[u8]) -> bool) -> Option<String> {
    let names = strays.iter().filter_map(|process| {
        let name = process.names.iter().find(|name| is_service(name))?;
        Some(format!("{} (pid {})", Escaped(name), process.pid))
    });
    let names = names.collect::<Vec<_>>().join(", ");
    let text = "in the root cgroup, where no rule finds it: procd started it there, as older ones \
                do with what they start again; reboot, and update procd";
    (!names.is_empty()).then(|| format!("{names}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn children_of_procd_in_the_root_cgroup() {
        let stat = b"812 (mi) ho (mo) S 1 812 812 0 -1 4194560";
        let is = |stat: &[u8], cgroup: &[u8], cmdline: &[u8]| stray(812, stat, cgroup, cmdline);
        let found = is(stat, b"0::/\n", b"/usr/bin/mihomo\0-d\0/etc\0").expect("a stray");
        assert_eq!(found.names, [b"mi) ho (mo".to_vec(), b"mihomo".to_vec()]);
        let v1 = b"4:memory:/a\n0::/services/mihomo/mihomo\n";
        assert_eq!(is(stat, v1, b"mihomo\0"), None, "where it belongs");
        assert_eq!(is(b"9 (kthreadd) S 1 0", b"0::/\n", b""), None, "a kernel thread");
        assert_eq!(is(b"9 (sh) S 7 0", b"0::/\n", b"sh\0"), None, "a child of another");
        let script = b"/bin/sh\0/etc/rc.common\0/etc/init.d/mihomo\0running\0";
        assert_eq!(is(b"9 (mihomo) S 1 0", b"0::/\n", script), None, "a service script");
        for odd in [&b""[..], b"(", b")(", b"9 (x", b"9 (x)", b"9 (x) S"] {
            assert_eq!(is(odd, b"0::/\n", b"x\0"), None, "{odd:?}");
        }
    }

    #[test]
    fn services_are_named() {
        let rules = "[rules]\ndrop = /services/telemetry\ndirect = /services/sing-box/sing-box\n";
        let config = testing::config(rules);
        let process = |pid, name: &str| Process { pid, names: ["", name].map(|n| n.into()) };
        let strays = [process(7, "telemetry"), process(8, "ash"), process(9, "sing-box")];
        let is_service = |name: &[u8]| decides(&config, &String::from_utf8_lossy(name));
        let line = line(&strays, is_service).expect("a line");
        assert!(line.starts_with("telemetry (pid 7), sing-box (pid 9): in the root"), "{line}");
    }
}
