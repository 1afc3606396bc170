//! The configuration as its users meet it: bad files and the exact lines that they get, good files
//! and what they mean, and what can be wrong with a file on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{chown, symlink, PermissionsExt};
use std::path::{Path, PathBuf};

use cgtproxy::config::file::Files;
use cgtproxy::config::{load, Config, OnExit, Problem, Source, Take, Target};
use cgtproxy::log::Level;
use cgtproxy::nft::expr::{Mark, Range};

/// Files by name. In an include, `*` stands for any end of a name; the only user is xray.
struct Memory(BTreeMap<PathBuf, String>);

impl Source for Memory {
    fn read(&self, path: &Path) -> Result<String, String> {
        let text = self.0.get(path).cloned();
        text.ok_or("no such file or directory".into())
    }

    fn glob(&self, pattern: &Path) -> Result<Vec<PathBuf>, String> {
        let text = pattern.to_str().unwrap();
        let Some(start) = text.strip_suffix('*') else {
            return Ok(vec![pattern.into()]);
        };
        let names = self.0.keys();
        let names = names.filter(|name| name.to_str().unwrap().starts_with(start));
        Ok(names.cloned().collect())
    }

    fn uid(&self, name: &str) -> Option<u32> {
        (name == "xray").then_some(1000)
    }
}

/// Loads the first of `files`, each a name and its text.
fn read(files: &[(&str, &str)]) -> Result<Config, Vec<Problem>> {
    let all = files
        .iter()
        .map(|(name, text)| (name.into(), text.to_string()));
    load(&Memory(all.collect()), Path::new(files[0].0))
}

fn good(text: &str) -> Config {
    read(&[("c", text)]).unwrap_or_else(|problems| panic!("{text}: {problems:?}"))
}

fn lines(result: Result<Config, Vec<Problem>>) -> Vec<String> {
    let problems = result.err().unwrap_or_default();
    problems.iter().map(Problem::to_string).collect()
}

#[track_caller]
fn bad(files: &[(&str, &str)], want: &[&str]) {
    assert_eq!(lines(read(files)), want, "for {files:?}");
}

/// Bad lines, each with the message that it gets below it, under a head that is good.
const BAD_LINES: [(&str, &str); 4] = [
    (
        "[global]\n",
        r#"
nonsense = 1
    unknown key "nonsense" in [global]
route_table = 300
    unknown key "route_table" in [global], did you mean "route-table"?
defualt = drop
    unknown key "defualt" in [global], did you mean "default"?
bypas = private
    unknown key "bypas" in [global], did you mean "bypass"?
by-pass-user = 1
    unknown key "by-pass-user" in [global], did you mean "bypass-user"?
default
    expected KEY = VALUE, not "default"
default: drop
    expected KEY = VALUE, not "default: drop"
= drop
    no key before "=": "= drop"
default =
    no value for "default"
default = ""
    no value for "default"
default = "direct
    missing closing quote: "direct
default = Drop
    undefined target "Drop", did you mean "drop"?
default = proxy
    undefined target "proxy"
cgroup-root = sys/fs
    "cgroup-root" expects auto or an absolute path, not "sys/fs"
cgroup-root = Auto
    "cgroup-root" expects auto or an absolute path, not "Auto"
route-table = 0
    "route-table" expects a number from 1 to 0xffffffff, not "0"
route-table = main
    "route-table" expects a number from 1 to 0xffffffff, not "main"
route-table = 0xfe
    "route-table" cannot be 254: it is the default, main or local one
rule-priority = 0
    "rule-priority" expects a number from 1 to 32765, not "0"
rule-priority = 32766
    "rule-priority" expects a number from 1 to 32765, not "32766"
rule-priority = +1
    "rule-priority" expects a number from 1 to 32765, not "+1"
rule-priority = -1
    "rule-priority" expects a number from 1 to 32765, not "-1"
rule-priority = 0x
    "rule-priority" expects a number from 1 to 32765, not "0x"
rule-priority = 1 0
    "rule-priority" expects a number from 1 to 32765, not "1 0"
rule-priority = 99999999999999999999
    "rule-priority" expects a number from 1 to 32765, not "99999999999999999999"
fwmark-mask = 0
    "fwmark-mask" expects a number from 1 to 0xffffffff, not "0"
fwmark-mask = 0x100000000
    "fwmark-mask" expects a number from 1 to 0xffffffff, not "0x100000000"
bypass = example.org
    "bypass" expects an address, a CIDR or "private", not "example.org"
bypass = 10.0.0
    "bypass" expects an address, a CIDR or "private", not "10.0.0"
bypass = 10.0.0.0/8, 10.1.0.0/16
    "bypass" expects an address, a CIDR or "private", not "10.0.0.0/8, 10.1.0.0/16"
bypass = 10.0.0.0/255.0.0.0
    "bypass" expects an address, a CIDR or "private", not "10.0.0.0/255.0.0.0"
bypass = 10.0.0.0/33
    "bypass": prefix length 33 is not from 0 to 32: "10.0.0.0/33"
bypass = fc00::/129
    "bypass": prefix length 129 is not from 0 to 128: "fc00::/129"
bypass-mark = x
    "bypass-mark" expects VALUE or VALUE/MASK, 32 bits each, not "x"
bypass-mark = 1/2/3
    "bypass-mark" expects VALUE or VALUE/MASK, 32 bits each, not "1/2/3"
bypass-mark = 0x100000000
    "bypass-mark" expects VALUE or VALUE/MASK, 32 bits each, not "0x100000000"
bypass-mark = 1/0
    "bypass-mark" with mask 0 would match every packet
bypass-mark = 0x100/0xff
    "bypass-mark" 0x100 has bits outside its mask 0xff
bypass-user = nobody-here
    no such user: "nobody-here"
on-exit = delete
    "on-exit" expects remove or keep, not "delete"
log-level = warn
    "log-level" expects error, warning, notice, info or debug, not "warn"
counters = yes
    "counters" expects target or cgroup, not "yes"
"#,
    ),
    (
        "[tproxy a]\nport = 1\n",
        r#"
nonsense = 1
    unknown key "nonsense" in [tproxy]
adress = ::1
    unknown key "adress" in [tproxy], did you mean "address"?
dns-hijak = ::1
    unknown key "dns-hijak" in [tproxy], did you mean "dns-hijack"?
ipv5 = no
    unknown key "ipv5" in [tproxy], did you mean "ipv4"?
port = 2
    duplicate key "port", first set at c:2
address = localhost
    "address" expects an IPv4 or IPv6 address, not "localhost"
address = ::1/128
    "address" expects an IPv4 or IPv6 address, not "::1/128"
mark = 0
    "mark" expects a number from 1 to 0xffffffff, not "0"
mark = 0x8000001
    mark 0x8000001 is not within fwmark-mask 0xff000000
tcp = maybe
    "tcp" expects yes, no or drop, not "maybe"
udp = direct
    "udp" expects yes, no or drop, not "direct"
ipv4 = Yes
    "ipv4" expects yes, no or drop, not "Yes"
ipv6 = 2
    "ipv6" expects yes, no or drop, not "2"
dns-hijack = 1053
    "dns-hijack" expects ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, not "1053"
dns-hijack = [127.0.0.1]:53
    "dns-hijack" expects ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, not "[127.0.0.1]:53"
dns-hijack-tcp = drop
    "dns-hijack-tcp" expects yes or no, not "drop"
dns-hijack-tcp = yes
    "dns-hijack-tcp" needs "dns-hijack"
"#,
    ),
    (
        "[rules]\n",
        r#"
dirct = /a
    undefined target "dirct", did you mean "direct"?
mihomo = /a
    undefined target "mihomo"
direct drop = /a
    undefined target "direct drop"
/services/x = direct
    undefined target "/services/x"
direct /a
    expected KEY = VALUE, not "direct /a"
direct =
    no value for "direct"
drop = /a(
    bad pattern at character 3: found open group without closing ')': "/a("
drop = (a)(b(c)d
    bad pattern at character 4: found open group without closing ')': "(a)(b(c)d"
drop = /a)
    bad pattern at character 3: found closing ')' without matching '(': "/a)"
drop = /a)|(/b
    bad pattern at character 3: found closing ')' without matching '(': "/a)|(/b"
drop = /[
    bad pattern at character 2: found unclosed character class: "/["
drop = /[z-a]/y
    bad pattern at character 5: invalid range in character class: "/[z-a]/y"
drop = /\q/y
    bad pattern at character 3: unrecognized escape sequence: "/\q/y"
drop = /(?=a)
    bad pattern at character 4: look-around is not supported: "/(?=a)"
drop = /(a)\1
    bad pattern at character 6: backreferences are not supported: "/(a)\1"
drop = /日本\p{L}
    bad pattern at character 5: Unicode character classes are not supported: "/日本\p{L}"
drop = *
    bad pattern at character 1: uncounted repetition operator must be applied to a sub-expression: "*"
drop = /a{2,1}/b
    bad pattern at character 7: found counted repetition with a min bigger than its max: "/a{2,1}/b"
"#,
    ),
    (
        "",
        r#"
default = drop
    "default" stands before any section header
[global
    section header without "]": "[global"
[global] # all
    text behind the section header: "# all"
[ ]
    empty section header
[server]
    unknown section [server]
[Global]
    unknown section [Global], did you mean [global]?
[rule]
    unknown section [rule], did you mean [rules]?
[tpoxy a]
    unknown section [tpoxy], did you mean [tproxy]?
[[global]]
    unknown section [[global]], did you mean [global]?
[global main]
    section [global] takes no name: "main"
[rules x]
    section [rules] takes no name: "x"
[tproxy]
    section [tproxy] needs a name: [tproxy NAME]
[tproxy drop]
    a tproxy cannot be named "drop"
[tproxy direct]
    a tproxy cannot be named "direct"
[tproxy a b]
    bad tproxy name "a b": a letter, then up to 14 letters, digits, "_" or "-"
[tproxy 1a]
    bad tproxy name "1a": a letter, then up to 14 letters, digits, "_" or "-"
[tproxy é]
    bad tproxy name "é": a letter, then up to 14 letters, digits, "_" or "-"
[tproxy abcdefghijklmnop]
    bad tproxy name "abcdefghijklmnop": a letter, then up to 14 letters, digits, "_" or "-"
[tproxy a]
    [tproxy a] needs a port
"#,
    ),
];

#[test]
fn bad_lines() {
    let mut count = 0;
    for (head, table) in BAD_LINES {
        let number = head.lines().count() + 1;
        let rows: Vec<&str> = table.trim().lines().collect();
        for row in rows.chunks(2) {
            let text = format!("{head}{}\n", row[0]);
            bad(
                &[("c", &text)],
                &[&format!("c:{number}: {}", row[1].trim())],
            );
            count += 1;
        }
    }
    assert!(count >= 80, "{count} rows");
}

#[test]
fn bad_combinations() {
    for (text, want) in [
        ("[rules]\ndrop = /a\0b\n", &["c:2: a NUL byte in the line"][..]),
        (
            "[global]\ndefault = direct\n[rules]\n[global]\ndefault = direct\n",
            &["c:5: duplicate key \"default\", first set at c:2"],
        ),
        (
            "[tproxy a]\nport = 1\n[tproxy a]\nport = 2\nnonsense = 3\n",
            &["c:3: duplicate section [tproxy a], first at c:1"],
        ),
        (
            "[tproxy a]\nport = 1\nmark = 0x1000000\n[tproxy b]\nport = 2\nmark = 0x01000000\n",
            &["c:6: mark 0x1000000 is that of [tproxy a] already"],
        ),
        (
            "[global]\nfwmark-mask = 1\n[tproxy a]\nport = 1\n[tproxy b]\nport = 2\n",
            &["c:5: no mark left in fwmark-mask 0x1 for [tproxy b]"],
        ),
        (
            "[global]\ndefault = drop\nfwmark-mask = 3\n[tproxy a]\nport = 1\nmark = 3\n",
            &["c:6: mark 0x3 is the whole fwmark-mask, which stands for direct flows where the default is not direct"],
        ),
        // a bad port is not told again as a missing one
        (
            "[tproxy a]\nport = http\n",
            &["c:2: \"port\" expects a number from 1 to 65535, not \"http\""],
        ),
        // two errors of one line
        (
            "[rules]\nmihomo = (\n",
            &[
                "c:2: undefined target \"mihomo\"",
                "c:2: bad pattern at character 1: found open group without closing ')': \"(\"",
            ],
        ),
        // by line, whatever was found when; the keys of an unknown section are not judged
        (
            "oops\n[rules]\nmihmo = /a\n[tproxy mihomo]\nprot = 1\n[tpoxy x]\nnonsense = 1\n[global]\n\
             default = derict\nlog-level = loud\n",
            &[
                "c:1: expected KEY = VALUE, not \"oops\"",
                "c:3: undefined target \"mihmo\", did you mean \"mihomo\"?",
                "c:4: [tproxy mihomo] needs a port",
                "c:5: unknown key \"prot\" in [tproxy], did you mean \"port\"?",
                "c:6: unknown section [tpoxy], did you mean [tproxy]?",
                "c:9: undefined target \"derict\", did you mean \"direct\"?",
                "c:10: \"log-level\" expects error, warning, notice, info or debug, not \"loud\"",
            ],
        ),
        // CRLF and a byte order mark do not shift the lines, nor do comments and blank lines
        (
            "\u{feff}# one\r\n\r\n[global]\r\n; four\r\nx = 1\r\n",
            &["c:5: unknown key \"x\" in [global]"],
        ),
    ] {
        bad(&[("c", text)], want);
    }
}

#[test]
fn bad_includes() {
    for (files, want) in [
        // the errors of all files; keys, targets and sections are one space
        (
            &[
                ("c", "[global]\ndefault = a\ninclude = d/*\ninclude = e\nx = 1\n"),
                ("d/1", "[tproxy a]\nport = 0\n[global]\ndefault = drop\n"),
                ("d/2", "x\n\n[rules]\nb = /\n[tproxy a]\nport = 2\n"),
                ("e", "default = direct\n"),
            ][..],
            &[
                "c:5: unknown key \"x\" in [global]",
                "d/1:2: \"port\" expects a number from 1 to 65535, not \"0\"",
                "d/1:4: duplicate key \"default\", first set at c:2",
                "d/2:1: expected KEY = VALUE, not \"x\"",
                "d/2:4: undefined target \"b\"",
                "d/2:5: duplicate section [tproxy a], first at d/1:1",
                "e:1: \"default\" stands before any section header",
            ][..],
        ),
        (
            &[("c", "[global]\ninclude = c\n")],
            &["c:2: c includes itself"],
        ),
        (
            &[("c", "[global]\ninclude = d\n"), ("d", "[global]\n\ninclude = c\n")],
            &["d:3: c includes itself"],
        ),
    ] {
        bad(files, want);
    }
    let chain = |n: usize| -> Vec<(String, String)> {
        let link = |i| (format!("{i}"), format!("[global]\ninclude = {}\n", i + 1));
        (1..n).map(link).chain([(n.to_string(), String::new())]).collect()
    };
    let load = |n| {
        let files = chain(n);
        let files: Vec<_> = files.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        lines(read(&files))
    };
    assert_eq!(load(8), [""; 0]);
    assert_eq!(load(9), ["8:2: includes are nested over 8 deep"]);
}
