//! Services that run where no rule can find them. Some procd put a service into the root cgroup when
//! they start it again, instead of /services/NAME/INSTANCE; so does every procd on which cgroup2 was
//! not mounted by then. It asks procd what runs, and /proc where; it decides nothing about packets.

use std::fs;
use std::process::{Command, Stdio};

use crate::cgroup::mount;
use crate::log::Escaped;

/// A line that names each service of procd that is in the root cgroup; `None` where all is well,
/// or where procd is not the init system.
pub fn find() -> Option<String> {
    if fs::read("/proc/1/comm").ok()? != b"procd\n" {
        return None;
    }
    let mut ubus = Command::new("ubus");
    ubus.args(["-t", "5", "call", "service", "list"]).stdin(Stdio::null()).stderr(Stdio::null());
    let services = running(&ubus.output().ok()?.stdout);
    // the service script lets our own show whether procd does so, and no rule is to find that
    let others = services.iter().filter(|(name, _)| name != b"cgtproxy");
    line(others.filter(|(_, pid)| in_root(*pid)))
}

/// Services and the pids of their instances, by what ubus prints: an object of services, each with
/// an object `instances`, of objects with a `pid`.
fn running(json: &[u8]) -> Vec<(Vec<u8>, u32)> {
    let mut found = Vec::new();
    // the names on the way to here, and the last string or number
    let mut path: Vec<Vec<u8>> = Vec::new();
    let mut word = Vec::new();
    let mut bytes = json.iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'"' => {
                word.clear();
                while let Some(&byte) = bytes.next().filter(|byte| **byte != b'"') {
                    word.push(byte);
                    if byte == b'\\' {
                        word.extend(bytes.next());
                    }
                }
            }
            b'0'..=b'9' => word.push(byte),
            b':' => {
                if let Some(name) = path.last_mut() {
                    *name = std::mem::take(&mut word);
                }
            }
            b'{' | b'[' => path.push(Vec::new()),
            b',' | b'}' | b']' => {
                let value = std::mem::take(&mut word);
                if let [service, instances, _, name] = &path[..] {
                    let pid = std::str::from_utf8(&value).ok().and_then(|text| text.parse().ok());
                    if let (b"instances", b"pid", Some(pid)) = (&instances[..], &name[..], pid) {
                        found.push((service.clone(), pid));
                    }
                }
                if byte != b',' {
                    path.pop();
                }
            }
            _ => {}
        }
    }
    found
}

fn in_root(pid: u32) -> bool {
    matches!(mount::find_cgroup(&pid.to_string()), Ok(Some(path)) if path == b"/")
}

fn line<'a>(strays: impl Iterator<Item = &'a (Vec<u8>, u32)>) -> Option<String> {
    let names = strays.map(|(name, pid)| format!("{} (pid {pid})", Escaped(name)));
    let names = names.collect::<Vec<_>>().join(", ");
    let text = "in the root cgroup, where no rule finds it: procd started it there, as older ones \
                do with what they start again, and all before cgroup2 is mounted; reboot, and \
                update procd";
    (!names.is_empty()).then(|| format!("{names}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &[u8] = br#"{
        "mihomo": { "instances": {
            "mihomo": { "running": true, "pid": 812, "command": [ "/usr/bin/mihomo", "-d", "\"}{" ],
                "respawn": { "threshold": 3600, "pid": 4 }, "exit_code": -1 },
            "second": { "running": true, "pid": 813 } } },
        "sing-box": { "instances": { "instance1": { "running": false, "command": [ "x" ] } } },
        "odd": { "data": { "instances": { "pid": 5 } }, "pid": 6 },
        "cron": { "instances": { "instance1": { "pid": 900 } }, "triggers": [ { "pid": 7 } ] } }"#;

    #[test]
    fn pids_of_instances_alone() {
        let found = running(LIST);
        let found: Vec<_> =
            found.iter().map(|(name, pid)| (std::str::from_utf8(name).unwrap(), *pid)).collect();
        assert_eq!(found, [("mihomo", 812), ("mihomo", 813), ("cron", 900)]);
    }

    #[test]
    fn whatever_is_said_instead() {
        for end in 0..LIST.len() {
            assert!(running(&LIST[..end]).len() <= 3);
            assert!(running(&LIST[end..]).len() <= 3);
        }
        for odd in [&b""[..], b"}", b"]:,", b"{\"", b"{\"a\\", b"Command failed: x"] {
            assert_eq!(running(odd), []);
        }
    }

    #[test]
    fn services_are_named() {
        let strays = [(b"telemetry".to_vec(), 7), (b"sing-\x1bbox".to_vec(), 9)];
        let line = line(strays.iter()).expect("a line");
        assert!(
            line.starts_with("telemetry (pid 7), sing-\\x1bbox (pid 9): in the root"),
            "{line}"
        );
        assert_eq!(super::line([].iter()), None);
    }
}
