//! `explain`: which rule decides, and for whom.

use std::fs;
use std::os::unix::fs::{chown, symlink};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::{as_nobody, nobodys_binary, CONFIG};
use crate::client::{Client, Running, PATIENCE};
use crate::daemon::{run_with, Daemon, Said};
use crate::ground::{addr, ip, Ground};
use crate::kernel::{cgroup_id, residue, set_ids};
use crate::wait_until;

fn explain(ground: &Ground, args: &[&str]) -> Said {
    run_with(ground, CONFIG, &[&["explain"], args].concat())
}

/// A process of a cgroup that lives as long as this does.
fn process(ground: &Ground, cgroup: &str) -> Running {
    Client::udp(&ground.cgroup(cgroup), addr(ip("127.0.0.1"), 7)).serve()
}

/// What is said of a process.
#[track_caller]
fn explained(ground: &Ground, pid: Pid) -> String {
    explain(ground, &["--pid", &pid.to_string()]).fine()
}

/// Each path gets its target, the rule that decides and the ancestor by which it does; the kernel is
/// left alone.
#[test]
fn explain_names_the_rule_and_the_ancestor() {
    let ground = ground!("explain");
    let inside = ground.cgroup("/services/aria2/a/b");
    let whole = inside.to_str().expect("a UTF-8 path");

    let paths = ["/services/mihomo/x", "/services/x", whole, "/cgtproxy/drop/1", "/"];
    let out = explain(&ground, &paths).fine();

    let nameless = out.lines().map(|line| match line.split_once(".conf:") {
        Some((_, rest)) => format!("    rule    {rest}\n"),
        None => format!("{line}\n"),
    });
    let want = "\
/services/mihomo/x
    target  direct
    rule    6: direct = /services/mihomo
    matches /services/mihomo, an ancestor
/services/x
    target  direct
    rule    no rule matches, so the default decides
/services/aria2/a/b
    target  mihomo
    rule    8: mihomo = /services/(transmission|aria2)
    matches /services/aria2, an ancestor
/cgtproxy/drop/1
    target  drop
    rule    built in: drop = /cgtproxy/drop
    matches /cgtproxy/drop, an ancestor
/
    target  direct
    rule    no rule matches, so the default decides
";
    assert_eq!(nameless.collect::<String>(), want);
    assert_eq!(residue(), "", "explain touches nothing");
}

/// A path may be written with what means nothing in a path, and from `/` of the file system.
#[test]
fn explain_takes_a_path_as_it_is_written() {
    let ground = ground!("explain-written");
    let whole = ground.at("/./services//aria2/.");
    let whole = format!("/{}", whole.to_str().expect("a UTF-8 path"));

    let out = explain(&ground, &["//services/./aria2/", &whole]).fine();

    let block = "/services/aria2\n    target  mihomo\n";
    assert_eq!(out.matches(block).count(), 2, "{out}");
}

/// The cgroup root may be called by a symlink, and a path below it too.
#[test]
fn explain_takes_the_root_by_its_name() {
    let ground = ground!("explain-root");
    let link = ground.dir.join("link");
    symlink(&ground.root, &link).expect("make a symlink");
    let link = link.to_str().expect("UTF-8");
    let config = format!("[global]\ncgroup-root = {link}\n{CONFIG}");

    let paths =
        [&format!("{link}/services/aria2"), &format!("{}/services/aria2", ground.root.display())];
    let out = run_with(&ground, &config, &["explain", paths[0], paths[1]]).fine();

    let block = "/services/aria2\n    target  mihomo\n";
    assert_eq!(out.split_inclusive("matches /services/aria2\n").count(), 2, "{out}");
    assert_eq!(out.matches(block).count(), 2, "{out}");
}

/// Each argument gets its answer, or an error line of its own that says what is wrong with it.
#[test]
fn explain_answers_each_argument() {
    let ground = ground!("explain-each");

    let paths = ["/a/../b", "/services/telemetry", "services/\x1b[0m", "/x"];
    let said = explain(&ground, &paths);

    assert_eq!(said.code, Some(2));
    let heads: Vec<&str> = said.out.lines().filter(|l| l.starts_with('/')).collect();
    assert_eq!(heads, ["/services/telemetry", "/x"]);
    let wants = [
        "error: not the path of a cgroup: \"/a/../b\" (\"..\" is not followed) (try cgtproxy --help)",
        "error: not the path of a cgroup: \"services/\\x1b[0m\" (they begin with \"/\") (try cgtproxy --help)",
    ];
    assert_eq!(said.err.lines().collect::<Vec<_>>(), wants);
}

/// Processes that are gone are no wrong usage, what is no number is; the others are answered.
#[test]
fn explain_answers_for_each_process() {
    let ground = ground!("explain-pids");
    for (last, code, gone) in [("4194305", 1, 2), ("one", 2, 1)] {
        let said = explain(&ground, &["--pid", "4194304", "1", last]);

        assert_eq!(said.code, Some(code), "{last}");
        assert!(said.out.starts_with("pid 1: "), "{}", said.out);
        assert_eq!(said.err.lines().count(), 2, "{}", said.err);
        assert_eq!(said.err.matches("no such process\n").count(), gone, "{}", said.err);
        let of = "unable to find the cgroup of pid 4194304: no such process\n";
        assert!(said.err.contains(of), "{}", said.err);
    }
}

/// A process is answered for by its cgroup, one outside the cgroup root by the default.
#[test]
fn explain_finds_processes() {
    let ground = ground!("explain-pid");
    let inside = process(&ground, "/services/telemetry/x");
    for (pid, want) in [
        (inside.pid(), ": /services/telemetry/x\n    target  drop\n"),
        (Pid::from_raw(1), "pid 1: outside the cgroup root\n    target  direct"),
    ] {
        let out = explained(&ground, pid);
        assert!(out.contains(want), "{out}");
    }
}

/// A rule reaches a process in another network namespace by the veth that leads there.
#[test]
fn explain_tells_of_another_network_namespace() {
    let ground = ground!("explain-netns");
    let cgroup = "/services/telemetry";
    let here = process(&ground, cgroup);
    let there = ground.outside(|| process(&ground, cgroup));
    let behind = "network another namespace, behind in0: the rule covers what comes in there";
    for (process, elsewhere) in [(here, false), (there, true)] {
        let out = explained(&ground, process.pid());
        assert!(out.contains("    target  drop\n"), "{out}");
        assert_eq!(out.contains(behind), elsewhere, "{out}");
    }
}

/// What explain says of a tree is what the kernel holds of it.
#[test]
fn explain_agrees_with_the_daemon() {
    let ground = ground!("explain-agrees");
    let rules = "[tproxy mihomo]\nport = 7893\n\
        [rules]\ndrop = /a/b\nmihomo = /a\ndirect = .*/free\nmihomo = /cgtproxy\n";
    let paths = ["/a", "/a/b", "/a/b/free", "/c/free", "/c", "/cgtproxy", "/cgtproxy/direct"];
    for path in paths {
        ground.cgroup(path);
    }
    let daemon = Daemon::start(&ground, rules, &[]);
    let held = ["direct", "drop", "mihomo"].map(|set| (set, set_ids(&format!("cg_{set}"))));
    for path in paths {
        let out = daemon.ask(&["explain", path]).fine();

        let target = out.lines().find_map(|l| l.trim().strip_prefix("target  "));
        // the nearest ancestor with an element decides
        let path = ground.at(path);
        let lineage = path.ancestors().take_while(|at| at.starts_with(&ground.root));
        let element = |at| {
            let id = cgroup_id(at).expect("an id");
            held.iter().find(|set| set.1.as_ref().is_some_and(|ids| ids.contains(&id)))
        };
        let found = lineage.filter_map(element).next().map_or("direct", |set| set.0);
        assert_eq!(target, Some(found), "{path:?}");
    }
}

/// Who made a cgroup of `exec` himself is told what the daemon thinks of it.
#[test]
fn explain_to_the_owner_of_a_cgroup_of_exec() {
    let ground = ground!("own-exec");
    chown(ground.cgroup("/cgtproxy/direct"), Some(65534), None).expect("chown");
    let dir = nobodys_binary().parent().expect("a directory").to_path_buf();
    let file = dir.join("own-exec.conf");
    let root = ground.root.display();
    fs::write(&file, format!("[global]\ncgroup-root = {root}\n[rules]\ndrop = /.*\n"))
        .expect("write");

    let said = as_nobody(&["-c", file.to_str().expect("UTF-8"), "explain", "/cgtproxy/direct"]);

    assert!(said.out.contains("    target  drop\n"), "{} {}", said.out, said.err);
}

/// Behind the name of a cgroup that is removed the kernel says " (deleted)", and one may be named so.
#[test]
fn explain_tells_names_from_what_is_removed() {
    let ground = ground!("explain-removed");
    for (path, target) in [
        ("/services/telemetry", "drop"),
        ("/services/telemetry (deleted)", "direct"),
        ("/services/telemetry (deleted) (deleted)", "direct"),
    ] {
        let inside = process(&ground, path);
        let said = || explained(&ground, inside.pid());
        let want = format!(": {path}\n    target  {target}\n");
        assert!(said().contains(&want), "{}", said());

        // nobody waits for it yet
        kill(inside.pid(), Signal::SIGKILL).expect("kill");
        assert!(wait_until(PATIENCE, || fs::remove_dir(ground.at(path)).is_ok()), "{path}");

        assert!(said().contains(&want), "removed: {}", said());
    }
}
