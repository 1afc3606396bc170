//! OpenWrt's /etc/config/cgtproxy as the file that cgtproxy reads: init/openwrt/uci, under the
//! shells that are here and a stand-in of uci, or the real one that CGTPROXY_UCI names.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use cgtproxy::commands::check::ABOUT;
use cgtproxy::config::keys::Kind;

const CONFIG: &str = "/etc/config/cgtproxy";

struct Router {
    dir: PathBuf,
    shell: &'static [&'static str],
}

impl Router {
    /// With a directory of its own, in which the script looks for everything.
    fn new(name: &str, shell: &'static [&'static str]) -> Router {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("uci-{name}-{}", shell[0]));
        let _ = fs::remove_dir_all(&dir);
        for part in ["bin", "config"] {
            fs::create_dir_all(dir.join(part)).unwrap();
        }
        let at = dir.display();
        let rpcd = "luci-app-cgtproxy/root/usr/libexec/rpcd/cgtproxy";
        for (name, script) in [("cgtproxy-uci", "uci"), ("rpcd", rpcd)] {
            let script = fs::read_to_string(here.join("init/openwrt").join(script)).unwrap();
            let script = script
                .replace("=/usr/sbin/cgtproxy", concat!("=", env!("CARGO_BIN_EXE_cgtproxy")))
                .replace("=/usr/libexec/", &format!("={at}/"))
                .replace("=/etc/config/", &format!("={at}/config/"))
                .replace("=/etc/cgtproxy/", &format!("={at}/admin/"))
                .replace("=/var/etc/", &format!("={at}/var/"))
                .replace("/var/run/", &format!("{at}/run/"));
            fs::write(dir.join(name), script).unwrap();
            fs::set_permissions(dir.join(name), Permissions::from_mode(0o755)).unwrap();
        }
        let uci = match std::env::var("CGTPROXY_UCI") {
            Ok(real) => real,
            Err(_) => format!("python3 {}", here.join("tests/init/uci.py").display()),
        };
        let program = |name: &str, text: String| {
            let path = dir.join("bin").join(name);
            fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        };
        program("uci", format!("exec {uci} -c {at}/config \"$@\""));
        // netifd knows one network
        program(
            "ubus",
            "[ \"$3\" = network.interface.up ] && echo '{\"l3_device\":\"wg-up\"}'".into(),
        );
        let procd = here.join("tests/init/procd.py");
        program("jsonfilter", format!("exec python3 {} jsonfilter \"$@\"", procd.display()));
        Router { dir, shell }
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn run(&self, what: &str) -> Output {
        let path = format!("{}:{}", self.dir.join("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(self.shell[0]);
        command.args(&self.shell[1..]).arg(self.dir.join("cgtproxy-uci")).arg(what);
        command.env("PATH", path).output().unwrap()
    }

    /// What the object of ubus answers. A JSON text, or this fails.
    fn call(&self, method: &str, input: &str) -> String {
        let path = format!("{}:{}", self.dir.join("bin").display(), std::env::var("PATH").unwrap());
        let ours = self.shell.join(" ");
        let line = format!("printf %s \"$2\" | {ours} \"$0\" call \"$1\" | python3 -m json.tool");
        let mut command = Command::new("sh");
        command.arg("-c").arg(line).arg(self.dir.join("rpcd")).args([method, input]);
        let output = command.env("PATH", path).output().unwrap();
        assert!(output.status.success(), "{method} {input}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it prints to both, with the places as they are on a router.
    fn say(&self, what: &str) -> (Option<i32>, String) {
        let output = self.run(what);
        let at = self.dir.display().to_string();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8(text).unwrap();
        let text = text.replace(&format!("{at}/config/"), "/etc/config/");
        let text = text.replace(&format!("{at}/admin/"), "/etc/cgtproxy/");
        (output.status.code(), text.replace(&format!("{at}/var/"), "/var/etc/"))
    }

    /// The entries of the file, without comments and blank lines.
    fn rendered(&self) -> String {
        let (status, text) = self.say("render");
        assert_eq!(status, Some(0), "{text}");
        let meant = |line: &&str| !line.is_empty() && !line.starts_with('#');
        text.lines().filter(meant).map(|line| line.to_string() + "\n").collect()
    }
}

/// busybox ash is what a router has.
fn router(name: &str) -> Router {
    let ash: &[&str] = &["busybox", "ash"];
    let here = Command::new(ash[0]).args(&ash[1..]).args(["-c", ":"]).output().is_ok();
    Router::new(name, if here { ash } else { &["sh"] })
}

const END: &str = "[global]\ninclude = /etc/cgtproxy/conf.d/*.conf\n";

/// Each section and option of UCI becomes what the file has for it, in order.
#[test]
fn what_uci_becomes() {
    let main = "config cgtproxy 'main'\n";
    for (uci, want) in [
        ("", ""),
        (main, "[global]\n"),
        (
            &format!("{main}\toption route_table '301'\n\tlist bypass_mark '0xff'\n\tlist bypass_mark '1/3'\n"),
            "[global]\nroute-table = 301\nbypass-mark = 0xff\nbypass-mark = 1/3\n",
        ),
        // its own, and no keys
        (&format!("{main}\toption enabled '1'\n\toption manual '0'\n\toption conffile '/x'\n"), "[global]\n"),
        (
            "config tproxy 'mihomo'\n\toption port '7893'\n\toption dns_hijack_tcp 'yes'\n\nconfig route\n\toption name 'vpn-1'\n\toption interface 'wg0'\n",
            "[tproxy mihomo]\nport = 7893\ndns-hijack-tcp = yes\n[route vpn-1]\ninterface = wg0\n",
        ),
        // rules keep their order, and what is disabled is not there
        (
            "config rule\n\toption target 'a'\n\tlist service 'x'\n\tlist service 'y z'\n\nconfig rule 'off'\n\toption enabled '0'\n\toption target 'b'\n\tlist user 'u'\n\n\
             config rule 'named'\n\toption name 'what for'\n\toption target 'c'\n\toption app 'org.x'\n\tlist match '/a\\.b'\n",
            "[rules]\na = service:x\na = service:y z\nc = app:org.x\nc = /a\\.b\n",
        ),
        // whatever a shell or the file would make of it
        (
            "config rule\n\toption target 'a'\n\tlist match '/x'\\''y'\n\tlist match '/$(id)`id`\\\\x2d*\"'\n\tlist match ' /blanks '\n\tlist match '# [x] = ; y'\n",
            "[rules]\na = /x'y\na = /$(id)`id`\\\\x2d*\"\na =  /blanks \na = # [x] = ; y\n",
        ),
        // what one says of itself is a value too
        (
            "config tproxy 'a'\n\toption port ' 1 '\n\toption mark '[rules]'\n",
            "[tproxy a]\nport = \" 1 \"\nmark = [rules]\n",
        ),
        (
            "config gateway 'lan'\n\toption target 'drop'\n\tlist network 'lan'\n\tlist network 'lan2'\n\tlist network 'up'\n\tlist network 'dsl'\n\tlist network 'wg'\n\
             config gateway\n\toption target 'direct'\n\tlist interface 'eth*'\n\tlist source_mac '02:00:00:00:00:01'\n",
            "[gateway lan]\ntarget = drop\ninterface = br-lan\ninterface = wg-up\ninterface = pppoe-dsl\ninterface = wg\n\
             [gateway gateway-1]\ntarget = direct\ninterface = eth*\nsource-mac = 02:00:00:00:00:01\n",
        ),
    ] {
        let router = router("becomes");
        router.write("config/network", "config interface 'lan'\n\toption proto 'static'\n\toption device 'br-lan'\n\nconfig interface 'lan2'\n\toption proto 'none'\n\toption device 'br-lan'\n\nconfig interface 'dsl'\n\toption proto 'pppoe'\n\toption device 'eth1'\n\nconfig interface 'wg'\n\toption proto 'wireguard'\n");
        router.write("config/cgtproxy", uci);
        assert_eq!(router.rendered(), want.to_string() + END, "{:?}\n{uci}", router.shell);
    }
}

/// A mistake is told by the section of UCI that it is in, and what was in force stays.
#[test]
fn what_is_wrong_is_said_in_terms_of_uci() {
    let tproxy = "config tproxy 'mihomo'\n\toption port '7893'\n\n";
    let cases: [(&str, &[&str]); 14] = [
        ("config tproxy 'mihomo'\n\toption prot '7893'\n", &[
            "cgtproxy.mihomo: unknown key \"prot\" in [tproxy], did you mean \"port\"?",
        ]),
        ("config tproxy 'mihomo'\n\tlist port '1'\n\tlist port '2'\n", &[
            "cgtproxy.mihomo: duplicate key \"port\", first set at /etc/config/cgtproxy: cgtproxy.mihomo\n",
        ]),
        ("config rule\n\toption target 'drop'\n\tlist service 'x'\n\nconfig rule\n\toption target 'mihmo'\n\tlist service 'y'\n\tlist match '/z'\n", &[
            "cgtproxy.@rule[1]: undefined target \"mihmo\", did you mean \"mihomo\"?",
        ]),
        ("config rule\n\tlist service 'x'\n", &["cgtproxy.@rule[0]: a rule needs a target"]),
        ("config rule 'r'\n\toption target 'drop'\n", &["cgtproxy.r: a rule needs a service, app, user, group or match"]),
        ("config rule\n\toption target '[global]'\n\tlist match '/x'\n", &[
            "cgtproxy.@rule[0].target: \"[global]\" is no name of a target",
        ]),
        ("config rule\n\toption enabled 'maybe'\n\toption target 'drop'\n\tlist match '/x'\n", &[
            "cgtproxy.@rule[0].enabled: \"maybe\" is neither 1 nor 0",
        ]),
        ("config rule\n\toption target 'drop'\n\tlist match '/x\ndrop = /y'\n", &[
            "cgtproxy.@rule[0].match: a value is one line",
        ]),
        ("config rule\n\toption target 'drop'\n\tlist match '/x'\\''\n\toption target '\\''direct'\n", &[
            "cgtproxy.@rule[0].match: a value is one line",
        ]),
        ("config tproxy\n\toption port '1'\n", &["cgtproxy.@tproxy[1]: it needs a name"]),
        ("config tproxy\n\toption name 'a]'\n\toption port '1'\n", &["cgtproxy.@tproxy[1].name: \"a]\" is not a name"]),
        ("config cgtproxy 'main'\n\nconfig cgtproxy 'other'\n", &["cgtproxy.other: there is one section of this type"]),
        ("config gateway 'g'\n\toption target 'drop'\n\tlist network '$(id)'\n", &[
            "cgtproxy.g.network: \"$(id)\" is no name of a network",
        ]),
        ("config rule 'a\n", &["Parse error (EOF with unterminated ') at line 4, byte 15"]),
    ];
    for (uci, want) in cases {
        let router = router("wrong");
        router.write("config/cgtproxy", &format!("{tproxy}{uci}"));
        router.write("var/cgtproxy/cgtproxy.conf", "# old\n");

        let (status, text) = router.say("take");

        assert_eq!(status, Some(2), "{text}");
        for line in want {
            let line = format!("error: {CONFIG}: {line}");
            let times = text.matches(&line).count();
            assert_eq!(times, 1, "{:?}: \"{line}\" in\n{text}", router.shell);
        }
        assert!(!text.contains("/var/etc"), "{text}");
        let old = router.dir.join("var/cgtproxy/cgtproxy.conf");
        assert_eq!(fs::read_to_string(&old).unwrap(), "# old\n", "the old file is in force");
        assert_eq!(old.parent().unwrap().read_dir().unwrap().count(), 1, "nothing is left");
    }
}

/// Each key has its option, or its list where it may be repeated.
#[test]
fn every_key_can_be_said() {
    let router = router("keys");
    let (mut uci, mut want) = (String::new(), String::new());
    for kind in Kind::ALL.into_iter().filter(|kind| kind.keys().next().is_some()) {
        let (section, header) = match kind {
            Kind::Global => ("cgtproxy 'main'".to_string(), "[global]\n".to_string()),
            _ => {
                let name = kind.name();
                (format!("{name} 'a_{name}'"), format!("[{name} a_{name}]\n"))
            }
        };
        uci += &format!("config {section}\n");
        want += &header;
        for key in kind.keys() {
            let option = key.name.replace('-', "_");
            let repeated = if key.repeatable { 2 } else { 1 };
            for n in 0..repeated {
                uci += match key.repeatable {
                    true => "\tlist ",
                    false => "\toption ",
                };
                uci += &format!("{option} 'v{n}'\n");
                want += &format!("{} = v{n}\n", key.name);
            }
        }
    }
    router.write("config/cgtproxy", &uci);
    assert_eq!(router.rendered(), want + END);
}

/// UCI is in force where it is there, an administrator's own file where he says so; back and forth.
#[test]
fn what_is_taken() {
    let router = router("taken");
    let file = router.dir.join("var/cgtproxy/cgtproxy.conf");
    let admin = router.dir.join("admin/cgtproxy.conf");
    // before there was UCI
    assert_eq!(router.say("file"), (Some(0), "/etc/cgtproxy/cgtproxy.conf\n".into()));

    router.write("config/cgtproxy", "config rule\n\toption target 'drop'\n\tlist service 'x'\n");
    let (_, text) = router.say("take");
    assert!(text.contains("cgtproxy.@rule[0]: drop = service:x: decides for"), "{text}");
    assert_eq!(router.say("file"), (Some(0), "/var/etc/cgtproxy/cgtproxy.conf\n".into()));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(file.parent().unwrap()), mode(&file)), (0o700, 0o600));
    assert_eq!(mode(file.parent().unwrap().parent().unwrap()), 0o755, "others' files are there");
    assert_eq!(fs::read_link(&admin).unwrap(), file, "where cgtproxy looks for it");

    // what UCI cannot say
    router.write("admin/conf.d/more.conf", "[rules]\nnone = /y\n");
    assert_eq!(router.say("take").0, Some(2));
    fs::remove_file(router.dir.join("admin/conf.d/more.conf")).unwrap();

    // to a file of the administrator's own, which begins with what was in force
    let last = fs::read_to_string(&file).unwrap();
    router
        .write("config/cgtproxy", "config cgtproxy 'main'\n\toption manual '1'\n\noption x y z\n");
    assert_eq!(router.say("take").0, Some(2), "not even then is a broken file taken");
    router.write("config/cgtproxy", "config cgtproxy 'main'\n\toption manual '1'\n");
    assert_ne!(router.say("take").0, Some(2));
    assert!(fs::symlink_metadata(&admin).unwrap().is_file());
    assert_eq!(fs::read_to_string(&admin).unwrap(), last);
    assert_eq!(router.say("file"), (Some(0), "/etc/cgtproxy/cgtproxy.conf\n".into()));

    // and back, beside that file
    router.write("config/cgtproxy", "config cgtproxy 'main'\n\toption enabled '0'\n");
    let (_, text) = router.say("take");
    assert!(text.contains("/etc/cgtproxy/cgtproxy.conf is not in force"), "{text}");
    assert_eq!(router.say("enabled").0, Some(1));
}

/// A router's /var is small: half a policy would pass the check.
#[test]
fn no_space_left() {
    let router = router("space");
    let rule = "config rule\n\toption target 'drop'\n\tlist service 'x'\n\n";
    router.write("config/cgtproxy", rule);
    assert_ne!(router.say("take").0, Some(2));
    let file = router.dir.join("var/cgtproxy/cgtproxy.conf");
    let old = fs::read_to_string(&file).unwrap();
    router.write("config/cgtproxy", &rule.repeat(200));
    let small = "trap '' XFSZ; ulimit -f 2; PATH=$1:$PATH; shift; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", small, "sh"]).arg(router.dir.join("bin")).args(router.shell);
    let output = command.arg(router.dir.join("cgtproxy-uci")).arg("take").output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("error: unable to write"), "{said}");
    assert_eq!(fs::read_to_string(&file).unwrap(), old);
}

/// A gateway of a network that is not there waits for it.
#[test]
fn networks_that_are_not_there() {
    let router = router("networks");
    router.write("config/cgtproxy", "config gateway 'a'\n\toption target 'drop'\n\tlist network 'none'\n\nconfig gateway 'b'\n\toption target 'drop'\n\tlist network 'none'\n\tlist interface 'eth0'\n\tlist network 'up'\n");
    let output = router.run("render");
    assert_eq!(output.status.code(), Some(0));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.matches("there is no network \"none\" now").count(), 2, "{said}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("[gateway a]") && text.contains("[gateway b]"), "{text}");
    assert_eq!(router.say("networks"), (Some(0), "none\nnone\nup\n".into()));
}

/// What the package brings is good as it stands, and does nothing to anybody.
#[test]
fn the_first_configuration() {
    let router = router("first");
    router.write("config/cgtproxy", include_str!("../init/openwrt/cgtproxy.config"));

    let (status, text) = router.say("check");

    assert_ne!(status, Some(2), "{text}");
    assert!(!text.contains("error: /etc/config"), "{text}");
    let rules = router.rendered();
    let rules: Vec<&str> = rules.lines().filter(|line| line.contains("= service:")).collect();
    assert!(rules.len() > 3 && rules.iter().all(|line| line.starts_with("direct ")), "{rules:?}");
}

/// The object cgtproxy of ubus, by what rpcd asks of a program.
#[test]
fn the_object_of_ubus() {
    let router = router("rpcd");
    router.write("config/cgtproxy", "config tproxy 'mihomo'\n\toption port '7893'\n\nconfig rule\n\toption target 'drop'\n\tlist match '/a\"b\\.c'\n");
    assert_ne!(router.say("take").0, Some(2));
    let has = |text: String, what: &str| assert!(text.contains(what), "no {what} in\n{text}");

    let found = router.call("check", "{}");
    has(found.clone(), r#"cgtproxy.@rule[0]: drop = /a\"b\\.c: decides for"#);
    has(found.clone(), "\"id\": \"rule\"");
    has(found, "\"uci\": []");

    // what a session has not applied yet
    let session = "0123456789abcdef0123456789abcdef";
    router.write(&format!("run/rpcd/uci-{session}/cgtproxy"), "cgtproxy.mihomo.port='99999'\n");
    let staged = format!("{{\"ubus_rpc_session\":\"{session}\"}}");
    let found = router.call("check", &staged);
    has(found.clone(), "\"exit\": 2");
    has(
        found.clone(),
        r#"cgtproxy.mihomo: \"port\" expects a number from 1 to 65535, not \"99999\""#,
    );
    has(found, "\"id\": \"config\"");

    // what is wrong in UCI itself, which check is not asked about
    router.write(&format!("run/rpcd/uci-{session}/cgtproxy"), "+cgtproxy.cfg99add0='rule'\n");
    let found = router.call("check", &staged);
    has(found.clone(), "cgtproxy.@rule[1]: a rule needs a target");
    has(found.clone(), "\"exit\": 2");
    has(found, "\"check\": null");
    for other in ["../../config", "0123", "{}"] {
        let text = router.call("check", &format!("{{\"ubus_rpc_session\":\"{other}\"}}"));
        assert!(text.contains("\"exit\": ") && !text.contains("\"exit\": 2"), "{text}");
    }

    has(router.call("explain", r#"{"path":"/a\"b.c/x"}"#), "target  drop");
    has(router.call("explain", "{\"pid\":1}"), "pid 1: /");
    for wrong in [r#"{"path":"a"}"#, "{}", r#"{"path":"; id"}"#, r#"{"pid":"-h"}"#] {
        has(router.call("explain", wrong), "\"error\"");
    }

    // an answer also without the right to look into the kernel
    has(router.call("apps", "{}"), "s\": ");
    router.write("run/cgtproxy.refused", "error: a\tb\u{1}\"\nerror: c\\\n");
    let status = router.call("status", "{}");
    has(status.clone(), r#""a\tb\u0001\"","#);
    has(status, "\"enabled\": true");
    has(router.call("nothing", "{}"), "no method");
}

const LUCI: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/init/openwrt/luci-app-cgtproxy");

/// A status with a target, a missing ip rule and a configuration that was refused; an application;
/// what check finds wrong; a host.
const REPLIES: &str = r#"{
    "status": {"status": {"in_force": true, "daemon": 1, "default": "direct", "targets": [
            {"name": "mihomo", "listens": {"tcp": true, "udp": false}, "bytes": 1, "cgroups": 1},
            {"name": "direct", "listens": null, "bytes": null}],
        "rules": [{"family": "ipv6", "text": "RULE", "present": false}], "routes": []},
        "refused": ["WHY"], "enabled": true},
    "apps": {"apps": {"apps": [{"cgroup": "/services/aria2/instance1", "user": "u", "uid": 5, "flows": 1,
        "protocols": ["tcp"], "remotes": ["203.0.113.7"], "target": "mihomo", "rule": {"match": "service:aria2"}},
        {"cgroup": "/user.slice/app-org.x.scope", "user": "root", "uid": 0, "line": "mihomo = app:org.x"}]}},
    "check": {"exit": 2, "uci": ["warning: UCI", "unable to"], "check": {"findings": [
        {"id": "rule", "severity": "ok", "text": "FINE"}, {"id": "new", "severity": "warning", "text": "WARN"},
        {"id": "config", "severity": "error", "text": "WRONG"}]}},
    "getHostHints": {"02:00:00:00:00:AA": {"name": "tv"}},
    "dump": {"interface": [{"interface": "lan"}]}
}"#;

/// What the pages of LuCI do with stand-ins of what LuCI has; nothing where there is no node.
fn pages() -> Option<BTreeSet<String>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new("node");
    command.arg(here.join("tests/init/views.mjs")).arg(LUCI);
    let Ok(mut node) = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
        println!("SKIP: the pages of LuCI: no node");
        return None;
    };
    node.stdin.take().unwrap().write_all(REPLIES.as_bytes()).unwrap();
    let output = node.wait_with_output().unwrap();
    assert!(output.status.success(), "a page fails, see above");
    Some(String::from_utf8(output.stdout).unwrap().lines().map(String::from).collect())
}

/// The pages have each key, and nothing that is none.
#[test]
fn pages_and_keys() {
    let Some(pages) = pages() else { return };
    let missing: Vec<_> = (Kind::ALL.into_iter())
        .flat_map(|kind| kind.keys().map(move |key| (kind, key)))
        .map(|(kind, key)| {
            let section = if kind == Kind::Global { "cgtproxy" } else { kind.name() };
            format!("option {section} {}", key.name.replace('-', "_"))
        })
        .filter(|option| !pages.contains(option))
        .collect();
    assert!(missing.is_empty(), "no page has {missing:?}");
    let known = |option: &str| {
        let (section, name) = option.split_once(' ').unwrap();
        let ours: &[&str] = match section {
            "cgtproxy" => &["enabled", "manual", "conffile"],
            "rule" => &[
                "enabled", "name", "_covers", "target", "service", "app", "user", "group", "match",
            ],
            "gateway" => &["enabled", "name", "network"],
            _ => &["enabled", "name"],
        };
        let mut kinds = Kind::ALL.into_iter().filter(|kind| match kind {
            Kind::Global => section == "cgtproxy",
            kind => section == kind.name(),
        });
        let is_key = |kind: Kind| kind.keys().any(|key| key.name.replace('-', "_") == name);
        ours.contains(&name) || kinds.any(is_key)
    };
    for option in pages.iter().filter_map(|line| line.strip_prefix("option ")) {
        assert!(known(option), "a page has {option}, which nothing knows");
    }
}

/// The pages may call what they call, and nothing else.
#[test]
fn pages_have_the_rights_that_they_need() {
    let Some(pages) = pages() else { return };
    let rights =
        fs::read_to_string(format!("{LUCI}/root/usr/share/rpcd/acl.d/luci-app-cgtproxy.json"));
    let rights: String = rights.unwrap().split_whitespace().collect();
    let calls = |object: &str| {
        let of =
            |line: &String| Some(format!("\"{}\"", line.strip_prefix(&format!("call {object} "))?));
        let mut calls: Vec<_> = pages.iter().filter_map(of).collect();
        calls.sort();
        calls
    };
    for object in ["cgtproxy", "luci-rpc", "network.interface"] {
        let (_, given) = rights.split_once(&format!("\"{object}\":[")).unwrap();
        let mut given: Vec<_> = given.split(']').next().unwrap().split(',').collect();
        given.sort();
        assert_eq!(given, calls(object), "{object}");
    }
    assert_eq!(rights.matches(r#"},"uci":["cgtproxy"]},"write":{"uci":["cgtproxy"]}}"#).count(), 1);
    assert_eq!(pages.iter().filter(|line| line.starts_with("call ")).count(), 5);
    let loaded: Vec<_> = pages.iter().filter(|line| line.starts_with("uci ")).collect();
    assert_eq!(loaded, ["uci cgtproxy"]);
}

/// What talks now stands in lists, as do networks and hosts.
#[test]
fn pages_offer_what_there_is() {
    let Some(pages) = pages() else { return };
    for offered in [
        "service aria2",
        "user u",
        "app org.x",
        "match /services/aria2/instance1",
        "match /user\\.slice/app-org\\.x\\.scope",
        "target mihomo",
        "target vpn-1",
        "default vpn-1",
        "network lan",
        "source_mac 02:00:00:00:00:aa",
    ] {
        assert!(pages.contains(&format!("offered {offered}")), "{offered}");
    }
    assert!(!pages.contains("offered user root"), "everything on a router is root's");
}

/// Pages come with the service where LuCI is, and go with it.
#[test]
fn pages_by_file() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("uci-install");
    let files = || {
        let mut find = Command::new("find");
        find.arg(&root).args(["-type", "f", "-printf", "%m %P\n"]);
        String::from_utf8(find.output().unwrap().stdout).unwrap()
    };
    let install = |what: &str| {
        let mut command = Command::new("sh");
        command.arg(here.join("init/install.sh")).arg(what).env("DESTDIR", &root);
        command.env("INIT", "openwrt").env("BIN", env!("CARGO_BIN_EXE_cgtproxy"));
        assert!(command.output().unwrap().status.success(), "{what}");
    };
    for luci in [false, true] {
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        if luci {
            fs::create_dir_all(root.join("www/luci-static/resources")).unwrap();
        }
        install("install");
        for file in [
            "644 www/luci-static/resources/view/cgtproxy/overview.js",
            "644 www/luci-static/resources/cgtproxy/tools.js",
            "755 usr/libexec/rpcd/cgtproxy",
            "644 usr/share/rpcd/acl.d/luci-app-cgtproxy.json",
            "644 usr/share/luci/menu.d/luci-app-cgtproxy.json",
        ] {
            assert_eq!(files().contains(&format!("{file}\n")), luci, "{file}");
        }
        install("purge");
        assert_eq!(files(), "");
    }
}

/// The pages tell what was refused, what check finds and what is missing.
#[test]
fn pages_say_what_is_wrong() {
    let Some(pages) = pages() else { return };
    for said in [
        "modal The last configuration was refused",
        "text WHY",
        "modal This configuration is refused",
        "text WRONG",
        "text WARN",
        "text new",
        "text UCI",
        "text Configuration",
        "text FINE",
        "text ip -6 rule add RULE",
        "text nothing listens",
    ] {
        assert_eq!(pages.contains(said), said != "text nothing listens", "{said}");
    }
    assert!(!pages.contains("applied"), "what check refuses is not applied");
}

/// Each word of the pages is in the template.
#[test]
fn pages_can_be_translated() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = here.join("tests/init/pot.py");
    let made = Command::new("python3").arg(script).arg(LUCI).output().unwrap();
    let made = String::from_utf8(made.stdout).unwrap();
    let template = fs::read_to_string(format!("{LUCI}/po/templates/cgtproxy.pot")).unwrap();
    assert_eq!(template, made, "the template is what tests/init/pot.py makes");
    // and what that does not find, because it is no plain string
    for string in pages().iter().flatten().filter_map(|line| line.strip_prefix("string ")) {
        let msgid = format!("\nmsgid \"{}\"\n", string.replace('"', "\\\""));
        assert!(template.contains(&msgid), "not in the template: {string}");
    }
}

/// Each kind of finding has its word in the overview.
#[test]
fn findings_have_words() {
    let page = fs::read_to_string(format!(
        "{LUCI}/htdocs/luci-static/resources/view/cgtproxy/overview.js"
    ));
    let page = page.unwrap();
    for id in ABOUT.iter().chain(&["uci"]) {
        assert!(page.contains(&format!("\n\t'{id}': _('")), "{id}");
    }
}
