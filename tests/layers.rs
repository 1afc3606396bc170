//! Holds the `use crate::` lines of src/ against the layers that the project's design gives: data
//! flows one way, pure modules do no I/O, `unsafe` is in sys alone, and in the allocator.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Layers from the bottom up: a module may use those of lower layers and of its own line only.
const LAYERS: &[&[&str]] = &[
    &["netlink::uapi", "bpf"],
    &["netlink::msg", "netlink::parse"],
    &["netlink::diag", "netlink::conntrack"],
    &["error", "sys", "memory", "json", "small"],
    &["log", "netlink::socket", "backoff"],
    &["net"],
    &["netlink::fib", "netlink::link"],
    &["netlink::netns"],
    &["config::ini", "config::syntax", "config::suggest"],
    &["config::automaton"],
    &["config::pattern"],
    &["config::model"],
    &["config::value"],
    &["config::matches"],
    &["config::keys"],
    &["config::reader", "config::resolve"],
    &["config", "config::lint", "config::propose", "config::file"],
    &["nft::expr"],
    &["nft::stmt", "cgroup::tally"],
    &[
        "policy",
        "loops",
        "nft::table",
        "nft::message",
        "nft::event",
        "nft::view",
        "nft::lock",
        "nft::others",
        "route",
    ],
    &["nft::marks"],
    &["cgroup::tree", "cgroup::backlog", "cgroup::mount"],
    &["cgroup::event", "cgroup::gates"],
    &["cgroup::dying", "cgroup::holds"],
    &["cgroup::watch", "cgroup::ranking", "cgroup::blind"],
    &["cgroup::core", "cgroup::vacant"],
    &["cgroup::follow", "plan", "containers", "apps"],
    &[
        "kernel", "notify", "pidfile", "confine", "listen", "host", "faults", "signals", "strays",
        "tunnels",
    ],
    // what is judged by what the kernel tells, which does not ask back
    &["stale"],
    &["instance"],
    &["options"],
    &["daemon"],
    &["commands"],
    &["cli"],
];

/// Modules of whatever layer that must not touch the system: no files, processes, sockets or clocks.
const PURE: &[&str] = &[
    "small",
    "net",
    "bpf",
    "json",
    "backoff",
    "commands::metrics",
    "netlink::fib",
    "netlink::link",
    "netlink::netns",
    "containers",
    "route",
    "netlink::uapi",
    "netlink::msg",
    "netlink::parse",
    "netlink::diag",
    "netlink::conntrack",
    "loops",
    "apps",
    "stale",
    "faults",
    "nft::expr",
    "nft::stmt",
    "nft::table",
    "nft::message",
    "nft::event",
    "nft::view",
    "nft::lock",
    "nft::marks",
    "nft::others",
    "config",
    "config::ini",
    "config::syntax",
    "config::automaton",
    "config::suggest",
    "config::pattern",
    "config::model",
    "config::value",
    "config::keys",
    "config::reader",
    "config::resolve",
    "config::lint",
    "config::propose",
    "config::matches",
    "policy",
    "cgroup::tree",
    "cgroup::backlog",
    "cgroup::dying",
    "cgroup::gates",
    "cgroup::holds",
    "cgroup::tally",
    "cgroup::event",
    "cgroup::blind",
    "cgroup::ranking",
    "cgroup::core",
    "plan",
];
const IMPURE: [&str; 12] = [
    "std::fs",
    "std::net::Tcp",
    "std::net::Udp",
    "Instant::now",
    "SystemTime",
    ".elapsed()",
    "std::process",
    "std::env",
    "std::os::fd",
    "nix::unistd",
    "nix::sys",
    "crate::sys",
];

/// Every source file but those of the test seam, as module path and text without its unit tests.
fn sources() -> BTreeMap<String, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = BTreeMap::new();
    let mut dirs = vec![root.clone()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let name = path.strip_prefix(&root).unwrap().with_extension("");
            let name = name.to_str().unwrap().replace('/', "::");
            let name = name.strip_suffix("::mod").unwrap_or(&name).to_string();
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("\n#[cfg(test)]\nmod tests").next().unwrap().to_string();
            found.insert(name, code);
        }
    }
    found
}

/// The module of [`LAYERS`] that it is, or is a room of.
fn named(module: &str) -> Option<&'static str> {
    let holds = |m: &&str| module == *m || module.starts_with(&format!("{m}::"));
    // the longest match, so that `config::file` is not taken for `config`
    LAYERS.concat().into_iter().filter(holds).max_by_key(|m| m.len())
}

fn layer(module: &str) -> Option<usize> {
    let name = named(module)?;
    LAYERS.iter().position(|l| l.contains(&name))
}

/// The crate's modules that a text names: `crate::a::b::…`, with `{…}` groups unfolded.
fn uses(module: &str, text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let code: Vec<&str> = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
    let code = code.join("\n").replace("$crate::", "");
    let parent = module.rsplit_once("::").map_or("", |(p, _)| p);
    let code = code.replace("super::", &format!("crate::{parent}::"));
    for piece in code.split("crate::").skip(1) {
        let end = piece.find([';', '(', ')', '<', '\n']).unwrap_or(piece.len());
        let path = &piece[..end];
        match path.split_once("::{") {
            Some((base, group)) => {
                for item in group.trim_end_matches('}').split(',') {
                    found.insert(format!("{base}::{}", item.trim()));
                }
            }
            None => {
                let end = path.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
                found.insert(path[..end.unwrap_or(path.len())].to_string());
            }
        }
    }
    found
}

#[test]
fn arrows_point_one_way() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (module, text) in sources() {
        let Some(own) = layer(&module) else {
            assert!(
                ["lib", "main", "testing", "netlink", "nft", "cgroup"].contains(&module.as_str()),
                "{module} is in no layer: add it to LAYERS"
            );
            continue;
        };
        for used in uses(&module, &text) {
            if let Some(other) = layer(&used) {
                seen += 1;
                if other > own {
                    wrong.push(format!("{module} uses {used}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "against the layers: {wrong:#?}");
    assert!(seen > 60, "only {seen} uses were found: does this test still read them?");
}

/// No room uses one that uses it, by whatever way, whether or not both stand in one layer. A folder's
/// head and its rooms have a house of their own.
#[test]
fn no_circles() {
    let sources = sources();
    let holds = |room: &str, path: &str| path == room || path.starts_with(&format!("{room}::"));
    let room = |path: &str| sources.keys().filter(|room| holds(room, path)).max_by_key(|r| r.len());
    let mut left: BTreeMap<&String, BTreeSet<&String>> = BTreeMap::new();
    for (own, text) in &sources {
        let used = uses(own, text);
        let rooms = used.iter().filter_map(|path| room(path));
        let others = rooms.filter(|other| !holds(own, other) && !holds(other, own));
        left.insert(own, others.collect());
    }
    let arrows: usize = left.values().map(BTreeSet::len).sum();
    assert!(arrows > 300, "only {arrows} arrows were found: does this test still read them?");
    // what uses nothing that is left, or is used by nothing, is in no circle
    loop {
        let rooms: BTreeSet<&String> = left.keys().copied().collect();
        let used: BTreeSet<&String> = left.values().flatten().copied().collect();
        left.retain(|room, uses| used.contains(room) && !uses.is_disjoint(&rooms));
        if left.len() == rooms.len() {
            break;
        }
    }
    let rooms: Vec<&&String> = left.keys().collect();
    assert!(rooms.is_empty(), "these use each other: {rooms:?}");
}

/// What sends to the kernel is told what to send, and does not ask the policy for it.
#[test]
fn the_kernel_knows_no_configuration() {
    let sources = sources();
    for module in ["kernel", "kernel::flows", "kernel::routing", "kernel::sockets", "route"] {
        for used in uses(module, &sources[module]) {
            let above = ["config", "policy", "plan", "cgroup::core", "stale"];
            assert!(!above.iter().any(|name| used.starts_with(name)), "{module} uses {used}");
        }
    }
}

#[test]
fn pure_modules_do_no_io() {
    let sources = sources();
    for module in PURE {
        assert!(sources.contains_key(*module), "there is no {module}");
    }
    for (module, text) in &sources {
        let pure = PURE.contains(&&**module) || named(module).is_some_and(|n| PURE.contains(&n));
        let head: Vec<_> = text.lines().take_while(|line| line.starts_with("//!")).collect();
        let head = head.join("\n");
        let says = head.contains("Pure") && !head.contains("Pure but for");
        assert!(pure || !says, "{module} says that it is pure: add it to PURE");
        if !pure {
            continue;
        }
        for impure in IMPURE {
            assert!(!text.contains(impure), "{module} names {impure}");
        }
    }
}

#[test]
fn unsafe_is_in_two_rooms() {
    for (module, text) in sources() {
        let blocks = ["unsafe {", "unsafe impl"].map(|kind| text.matches(kind).count());
        let blocks: usize = blocks.iter().sum();
        if ["sys", "memory"].contains(&&*module) {
            assert_eq!(blocks, text.matches("// SAFETY:").count(), "a SAFETY line for each block");
        } else {
            assert_eq!(blocks, 0, "{module} has unsafe blocks");
        }
    }
}
