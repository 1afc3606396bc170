//! `explain`: which rule decides for a cgroup, and through which ancestor. The table is not looked at, so
//! it tells of the configuration, whether or not that is in force.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::process::ExitCode;

use nix::errno::Errno;

use super::containers;
use crate::cgroup::dying;
use crate::cgroup::mount::{self, Root};
use crate::cgroup::watch;
use crate::config::{Config, Outlet, PatternRule, Place, Target};
use crate::error::{errno, printable, Error, Result};
use crate::host;
use crate::kernel::Kernel;
use crate::log::Escaped;
use crate::options::{wrong, Options};
use crate::policy::{self, Decision};

/// `args` are paths of cgroups, or pids. What is wrong with one keeps no other from its answer.
pub fn explain(options: &Options, by_pid: bool, args: &[OsString]) -> Result<ExitCode> {
    let mut args = args.to_vec();
    let mut failed = Vec::new();
    let all = args.len();
    args.retain(|arg| {
        let checked = match by_pid {
            true => check_pid(arg),
            false => of_path(arg, &[]).map(drop),
        };
        checked.map_err(|error| failed.push(error)).is_ok()
    });
    if failed.len() == all {
        return Err(as_one(&failed));
    }
    let config = options.load_or_default(false)?;
    let root = mount::find(config.cgroup_root.as_deref());
    // as it is called, and as it is
    let roots = [config.cgroup_root.as_deref(), root.as_ref().ok().map(|root| &*root.dir)];
    let roots: Vec<&Path> = roots.into_iter().flatten().collect();
    let mut text = String::new();
    for arg in &args {
        let found = match by_pid {
            true => of_process(arg, &root),
            false => of_path(arg, &roots).map(Some),
        };
        match found {
            Ok(path) => {
                let pid = by_pid.then(|| arg.to_string_lossy());
                let is_away = |pid: &&str| host::shares_network(pid) == Some(false);
                let away = pid.as_deref().filter(is_away);
                // a veth does not tell whose a packet is
                let owner = pid.as_deref().filter(|_| away.is_none()).and_then(owner);
                let (path, root) = (path.as_deref(), root.as_ref().ok());
                let ruled = describe(&config, pid.as_deref(), owner, path, root, &mut text);
                if let Some(pid) = away {
                    let covers = ruled && config.containers;
                    text.push_str(&network(pid, covers));
                    if let Some(name) = containers::name(path.unwrap_or_default()) {
                        text.push_str(&format!("    container {}\n", printable(&name)));
                    }
                }
            }
            Err(error) => failed.push(error),
        }
    }
    let done = super::print(&text)?;
    match failed.is_empty() {
        true => Ok(done),
        false => Err(as_one(&failed)),
    }
}

/// What that rule is worth to a process in a network namespace of its own.
const ELSEWHERE: &str = "    network another namespace: its traffic does not meet this host's output, \
     so this rule does not decide for it; what this host forwards for it, the rule of an outer container \
     or a [gateway] section may\n";

/// Where a process of another network namespace comes in, and what its rule is worth there.
fn network(pid: &str, covers: bool) -> String {
    let veths = match (Kernel::open(), pid.parse()) {
        (Ok(mut kernel), Ok(pid)) => kernel.veths_of(pid),
        _ => Vec::new(),
    };
    if veths.is_empty() {
        return ELSEWHERE.into();
    }
    let names: Vec<&str> = veths.iter().map(|link| &*link.name).collect();
    let what = match covers {
        true => "the rule covers what comes in there",
        false => "no rule covers what comes in there, a [gateway] section may",
    };
    format!("    network another namespace, behind {}: {what}\n", names.join(" and "))
}

/// Who owns the sockets that a process makes: uid and gid by proc_pid_status(5), those for files.
fn owner(pid: &str) -> Option<(u32, u32)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let id = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_ascii_whitespace().nth(3)?.parse().ok()
    };
    Some((id("Uid:")?, id("Gid:")?))
}

/// One error with the lines of all; that of wrong usage where any is.
fn as_one(all: &[Error]) -> Error {
    let lines = all.iter().map(Error::to_string).collect::<Vec<_>>();
    match all.iter().any(|error| matches!(error, Error::Usage(_))) {
        true => Error::Usage(lines),
        false => Error::State(lines.join("\n")),
    }
}

fn check_pid(pid: &OsString) -> Result<()> {
    let bytes = pid.as_bytes();
    match !bytes.is_empty() && bytes.iter().all(u8::is_ascii_digit) {
        true => Ok(()),
        false => Err(wrong(format!("not a pid: \"{}\"", Escaped(bytes)))),
    }
}

/// The path from the cgroup root, as given or as the directory of the cgroup. Repeated slashes and
/// `.` do not count; what `..` is meant to leave, the cgroup root or the mount, cannot be told.
fn of_path(arg: &OsString, roots: &[&Path]) -> Result<Vec<u8>> {
    let given = Path::new(arg);
    let wrong = |why| {
        let arg = Escaped(arg.as_bytes());
        Err(wrong(format!("not the path of a cgroup: \"{arg}\" ({why})")))
    };
    if !given.is_absolute() {
        return wrong("they begin with \"/\"");
    }
    let below = roots.iter().find_map(|root| given.strip_prefix(root).ok());
    let mut path = Vec::new();
    for part in below.unwrap_or(given).components() {
        match part {
            Component::Normal(name) => path.extend([b"/", name.as_bytes()].concat()),
            Component::ParentDir => return wrong("\"..\" is not followed"),
            _ => {}
        }
    }
    Ok(path)
}

/// The path of a process's cgroup from the cgroup root; `None` where it is outside of that.
fn of_process(arg: &OsString, root: &Result<Root>) -> Result<Option<Vec<u8>>> {
    let pid = arg.to_string_lossy();
    let root = root.as_ref().map_err(Error::clone)?;
    let refused = |e: std::io::Error| {
        let errno = match e.kind() {
            std::io::ErrorKind::NotFound => Errno::ESRCH,
            _ => errno(&e),
        };
        Error::system(format!("unable to find the cgroup of pid {pid}"), errno)
    };
    let line = mount::find_cgroup(&pid).map_err(refused)?.ok_or_else(|| {
        Error::State(format!("unable to find the cgroup of pid {pid}: not in cgroup v2"))
    })?;
    let line = &line[..];
    let mounts = mount::mounts(&std::fs::read("/proc/self/mountinfo").map_err(refused)?);
    let found = |line: &[u8]| mount::from_root(line, root, &mounts);
    let is_there = |path: &Vec<u8>| {
        let below = OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path));
        root.dir.join(below).is_dir()
    };
    // rmdir while a process is still in it: the kernel says so behind the name, which may end so itself
    let removed =
        line.strip_suffix(b" (deleted)").filter(|_| !found(line).is_some_and(|p| is_there(&p)));
    Ok(found(removed.unwrap_or(line)))
}

/// A few lines about one cgroup; `path` is `None` outside of the cgroup root. `owner` is that of a
/// process's sockets, uid and gid. Whether a rule decides for the cgroup.
fn describe(
    config: &Config,
    pid: Option<&str>,
    owner: Option<(u32, u32)>,
    path: Option<&[u8]>,
    root: Option<&Root>,
    text: &mut String,
) -> bool {
    let name = match path {
        None => "outside the cgroup root".to_string(),
        Some(b"") => "/".to_string(),
        Some(path) => Escaped(path).to_string(),
    };
    let pid = pid.map_or(String::new(), |pid| format!("pid {pid}: "));
    let path = path.unwrap_or_default();
    let (mut rank, mut through) = (policy::root_rank(config), 0);
    let foreign = root.and_then(|root| watch::foreign_exec(&root.dir, path));
    for (end, next) in policy::ranks(config, path, foreign.is_some()) {
        if next != rank {
            (rank, through) = (next, end);
        }
    }
    let outcome = policy::outcome(config, rank);
    let (target, decision) = match owner {
        Some((uid, gid)) => policy::decision_for(config, rank, uid, Some(gid)),
        None => (None, policy::decision(config, rank)),
    };
    let target = target.unwrap_or(outcome.target);
    let line = |place: &Place, target: Target, text: &str| {
        format!("{place}: {} = {text}", config.target_name(target))
    };
    let to = config.target_name(target);
    let rule = match decision {
        Decision::BypassUser => "bypass-user, whatever the target".to_string(),
        Decision::Owner(rule) => line(&rule.place, rule.target, &rule.text),
        Decision::BuiltIn => format!("built in: {to} = {}/{to}", policy::EXEC),
        Decision::Pattern(rule) => line(&rule.place, rule.target, &rule.text),
        Decision::Default => "no rule matches, so the default decides".to_string(),
    };
    let _ = writeln!(text, "{pid}{name}\n    target  {to}");
    let limits = config.outlet(target).map(Outlet::limits).unwrap_or_default();
    if !limits.is_empty() {
        let _ = writeln!(text, "    limits  {}", limits.join(", "));
    }
    let _ = writeln!(text, "    rule    {rule}");
    if let (Some((uid, gid)), Decision::BypassUser | Decision::Owner(_)) = (owner, decision) {
        let _ = writeln!(text, "    owner   uid {uid}, gid {gid}");
        return false;
    }
    if let Decision::Pattern(rule) = decision {
        // what its line became, where that is not a regex itself
        let same = |other: &&PatternRule| *rule.text != *rule.pattern && other.place == rule.place;
        for PatternRule { pattern, .. } in config.rules.iter().filter(same) {
            let _ = writeln!(text, "    means   {pattern}");
        }
    }
    // a process's own ids are known
    for rule in config.owner_rules_before(outcome.class).iter().filter(|_| owner.is_none()) {
        let _ = writeln!(text, "    unless  {}", line(&rule.place, rule.target, &rule.text));
    }
    if through > 0 {
        let ancestor = if through == path.len() { "" } else { ", an ancestor" };
        let matched = Escaped(&path[..through]);
        let _ = writeln!(text, "    matches {matched}{ancestor}");
    }
    if let Some((above, line)) = policy::held_by(config, path) {
        let above = if above.is_empty() { "/".into() } else { Escaped(above).to_string() };
        let why = match dying::is_listable(path) {
            true => "new flows leave once cgtproxy has looked at the cgroup",
            false => "for the quote in the path no new flow ever leaves",
        };
        let _ = writeln!(text, "    hold    {}: hold = {}", line.place, line.pattern);
        let _ = writeln!(text, "    below   {above}: {why}");
    }
    if let Some(dir) = foreign {
        let dir = Escaped(dir);
        let _ = writeln!(
            text,
            "    owner   {dir} was made by another user than root, and has no target by its name"
        );
    }
    !matches!(decision, Decision::Default)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_as_they_are_given() {
        let root = Root {
            dir: "/sys/fs/cgroup/sub".into(),
            mount: "/sys/fs/cgroup".into(),
            level: 2,
            identity: (1, 1),
        };
        let given = |arg: &str| of_path(&arg.into(), &[&root.dir]).ok();
        assert_eq!(given("/sys/fs/cgroup/sub/a"), Some(b"/a".to_vec()));
        assert_eq!(given("/sys/fs/cgroup/subway"), Some(b"/sys/fs/cgroup/subway".to_vec()));
        assert_eq!(given("//a/b/"), Some(b"/a/b".to_vec()));
        assert_eq!(given("/a/./b/."), Some(b"/a/b".to_vec()));
        assert_eq!(given("/sys//fs/./cgroup/sub/a"), Some(b"/a".to_vec()));
        assert_eq!(given("/"), Some(Vec::new()));
        assert_eq!(given("a/b"), None);
        assert_eq!(given("/a/../b"), None);
    }
}
