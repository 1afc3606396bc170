//! `explain`: which rule decides, and for whom.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{as_nobody, nobodys_binary, CONFIG};
use crate::client::Client;
use crate::daemon::{run_with, Daemon, Said};
use crate::ground::{addr, Ground, CGROUPS};
use crate::kernel::{cgroup_id, residue, set_ids, SETTLE};
use crate::wait_until;
use crate::world::World;

#[test]
fn explain_names_the_rule_and_the_ancestor() {
    let ground = ground!("explain");
    let inside = ground.cgroup("/services/aria2/a/b");
    let whole = inside.to_str().expect("a UTF-8 path");
    let paths = ["/services/mihomo/x", "/services/x", whole, "/cgtproxy/drop/1", "/"];
    let Said { code, out, err } = run_with(&ground, CONFIG, &[&["explain"], &paths[..]].concat());
    assert_eq!((code, &*err), (Some(0), ""));
    let blocks: Vec<&str> = out.split_inclusive('\n').collect();
    let text = blocks.concat();
    let wants = [
        "/services/mihomo/x\n    target  direct\n",
        ":6: direct = /services/mihomo\n    matches /services/mihomo, an ancestor\n",
        "/services/x\n    target  direct\n    rule    no rule matches, so the default decides\n",
        "/services/aria2/a/b\n    target  mihomo\n",
        ":8: mihomo = /services/(transmission|aria2)\n    matches /services/aria2, an ancestor\n",
        "    target  drop\n    rule    built in: drop = /cgtproxy/drop\n",
    ];
    for want in wants {
        assert!(text.contains(want), "no {want:?} in\n{text}");
    }
    assert_eq!(residue(), "", "explain touches nothing");
}

/// Each argument gets its answer, or an error line of its own that says what is wrong with it.
#[test]
fn explain_answers_each_argument() {
    let ground = ground!("explain-each");
    let explain = |args: &[&str]| run_with(&ground, CONFIG, &[&["explain"], args].concat());
    let whole = ground.at("/./services//aria2/.");
    let whole = format!("/{}", whole.to_str().expect("a UTF-8 path"));
    let same = explain(&["//services/./aria2/", &whole]);
    assert_eq!((same.code, &*same.err), (Some(0), ""));
    let block = "/services/aria2\n    target  mihomo\n";
    assert_eq!(same.out.matches(block).count(), 2, "{}", same.out);

    let said = explain(&["/a/../b", "/services/telemetry", "services/\x1b[0m", "/x"]);
    assert_eq!(said.code, Some(2));
    let heads: Vec<&str> = said.out.lines().filter(|l| l.starts_with('/')).collect();
    assert_eq!(heads, ["/services/telemetry", "/x"]);
    let wants = [
        "error: not the path of a cgroup: \"/a/../b\" (\"..\" is not followed) (try cgtproxy --help)",
        "error: not the path of a cgroup: \"services/\\x1b[0m\" (they begin with \"/\") (try cgtproxy --help)",
    ];
    assert_eq!(said.err.lines().collect::<Vec<_>>(), wants);

    // processes that are gone are no wrong usage, one that is none is
    let pids = explain(&["--pid", "4194304", "1", "4194305"]);
    assert_eq!(pids.code, Some(1));
    assert!(pids.out.starts_with("pid 1: "), "{}", pids.out);
    assert_eq!(pids.err.matches("no such process\n").count(), 2);
    let pids = explain(&["--pid", "4194304", "1", "one"]);
    assert_eq!(pids.code, Some(2));
    assert!(pids.out.starts_with("pid 1: "), "{}", pids.out);
    assert_eq!(pids.err.lines().count(), 2, "{}", pids.err);
}

#[test]
fn explain_finds_processes() {
    let (ground, world) = scene!("explain-pid");
    let inside = ground.cgroup("/services/telemetry/x");
    let outside = Path::new(CGROUPS).to_owned();
    // a process that lives until it is killed
    let serve = |cgroup: &Path, port| Client::tcp(cgroup, addr(crate::ground::HOST4, port)).serve();
    let (_in, _out) = (serve(&inside, 7001), serve(&outside, 7002));
    let pid_in = |cgroup: &Path| {
        let text = fs::read_to_string(cgroup.join("cgroup.procs")).expect("list processes");
        text.lines().next().expect("a process").to_owned()
    };
    let Said { code, out, .. } = run_with(&ground, CONFIG, &["explain", "--pid", &pid_in(&inside)]);
    assert_eq!(code, Some(0));
    assert!(out.contains(": /services/telemetry/x\n    target  drop\n"), "{out}");
    let init = run_with(&ground, CONFIG, &["explain", "--pid", "1"]);
    assert!(
        init.out.contains("pid 1: outside the cgroup root\n    target  direct"),
        "{}",
        init.out
    );
    let gone = run_with(&ground, CONFIG, &["explain", "--pid", "4194304"]);
    assert_eq!(gone.code, Some(1));
    assert!(
        gone.err.contains("unable to find the cgroup of pid 4194304: no such process"),
        "{}",
        gone.err
    );
    drop(world);
}

/// A rule reaches a process in another network namespace by the veth that leads there.
#[test]
fn explain_tells_of_another_network_namespace() {
    let ground = ground!("explain-netns");
    let cgroup = ground.cgroup("/services/telemetry");
    let said = "network another namespace, behind in0: the rule covers what comes in there";
    for (outside, want) in [(false, false), (true, true)] {
        let run = || {
            let script = format!("echo $$ > {}/cgroup.procs; exec cat", cgroup.display());
            let mut command = Command::new("sh");
            command.args(["-c", &script]).stdin(Stdio::piped()).spawn().expect("start sh")
        };
        let mut child = if outside { ground.outside(run) } else { run() };
        let pid = child.id().to_string();
        let there =
            || fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|t| t.contains(&pid));
        assert!(wait_until(SETTLE, there));
        let told = said_of(&ground, &pid);
        assert!(told.contains("    target  drop\n"), "{told}");
        assert_eq!(told.contains(said), want, "{told}");
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn said_of(ground: &Ground, pid: &str) -> String {
    let Said { code, out, err } = run_with(ground, CONFIG, &["explain", "--pid", pid]);
    assert_eq!((code, &*err), (Some(0), ""));
    out
}

/// What explain says of a tree is what the kernel holds of it.
#[test]
fn explain_agrees_with_the_daemon() {
    let ground = ground!("explain-agrees");
    let rules =
        "[tproxy mihomo]\nport = 7893\n[rules]\ndrop = /a/b\nmihomo = /a\ndirect = .*/free\n\
                 mihomo = /cgtproxy\n";
    let paths = ["/a", "/a/b", "/a/b/free", "/c/free", "/c", "/cgtproxy", "/cgtproxy/direct"];
    for path in paths {
        ground.cgroup(path);
    }
    let daemon = Daemon::start(&ground, rules, &[]);
    for path in paths {
        let out = daemon.ask(&["explain", path]).out;
        let target = out.lines().find_map(|l| l.trim().strip_prefix("target  "));
        // the nearest ancestor with an element decides
        let mut at = ground.at(path);
        let found = loop {
            let id = cgroup_id(&at).expect("an id");
            let holds =
                |set: &&&str| set_ids(&format!("cg_{set}")).is_some_and(|s| s.contains(&id));
            if let Some(set) = ["direct", "drop", "mihomo"].iter().find(holds) {
                break *set;
            }
            if at == ground.root {
                break "direct";
            }
            at.pop();
        };
        assert_eq!(target, Some(found), "{path}");
    }
}

/// Who made a cgroup of `exec` himself is told what the daemon thinks of it.
#[test]
fn explain_to_the_owner_of_a_cgroup_of_exec() {
    let ground = ground!("own-exec");
    std::os::unix::fs::chown(ground.cgroup("/cgtproxy/direct"), Some(65534), None).expect("chown");
    let dir = nobodys_binary().parent().expect("a directory").to_path_buf();
    let file = dir.join("own-exec.conf");
    let root = ground.root.display();
    fs::write(&file, format!("[global]\ncgroup-root = {root}\n[rules]\ndrop = /.*\n"))
        .expect("write");
    let said = as_nobody(&["-c", file.to_str().expect("UTF-8"), "explain", "/cgtproxy/direct"]);
    assert!(said.out.contains("    target  drop\n"), "{} {}", said.out, said.err);
}
