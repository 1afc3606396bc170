//! The configuration as its users meet it: bad files and the exact lines that they get, good files
//! and what they mean, and what can be wrong with a file on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Permissions};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{chown, lchown, symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cgtproxy::cgroup::core::Core;
use cgtproxy::config::file::Files;
use cgtproxy::config::keys::{Key, Kind, Takes, Unset};
use cgtproxy::config::{
    lint, load, Config, OnExit, PatternRule, Problem, RuleLine, Source, Take, Target,
};
use cgtproxy::error::reason;
use cgtproxy::log::Level;
use cgtproxy::net::{Address, Family, Mark, Owner, Range, Ranges, L4};
use cgtproxy::netlink::msg::Batch;
use cgtproxy::nft::table;
use cgtproxy::plan;
use cgtproxy::policy;
use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::unistd::{geteuid, mkfifo, setfsuid, Uid};

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

    fn gid(&self, name: &str) -> Option<u32> {
        (name == "www-data").then_some(33)
    }
}

/// Loads the first of `files`, each a name and its text.
fn read(files: &[(&str, &str)]) -> Result<Config, Vec<Problem>> {
    let all = files.iter().map(|(name, text)| (name.into(), text.to_string()));
    load(&Memory(all.collect()), Path::new(files[0].0))
}

fn good(text: &str) -> Config {
    good_files(&[("c", text)])
}

fn good_files(files: &[(&str, &str)]) -> Config {
    read(files).unwrap_or_else(|problems| panic!("{files:?}: {problems:?}"))
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
const BAD_LINES: [(&str, &str); 7] = [
    (
        "[global]\n",
        r##"
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
default = drop # all
    undefined target "drop # all"; a comment needs a line of its own
include = conf.d/*   # and that of *
    unable to include "conf.d/*   # and that of *": no such file; a comment needs a line of its own
include = none ; yet
    unable to include none ; yet: no such file or directory; a comment needs a line of its own
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
bypass = ::ffff:192.0.2.1
    "bypass" expects an address, a CIDR or "private", not "::ffff:192.0.2.1", did you mean "192.0.2.1"?
bypass = ::ffff:192.0.2.1/120
    "bypass" expects an address, a CIDR or "private", not "::ffff:192.0.2.1/120", did you mean "192.0.2.0/24"?
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
DEFAULT = drop
    unknown key "DEFAULT" in [global], did you mean "default"?
default = "direct" # all
    text behind the closing quote: "# all"
default = "direct"x"
    text behind the closing quote: "x""
route-table = 300 # ours
    "route-table" expects a number from 1 to 0xffffffff, not "300 # ours"; a comment needs a line of its own
bypass = 10.0.0.0/
    "bypass" expects an address, a CIDR or "private", not "10.0.0.0/"
bypass-mark = 0
    "bypass-mark" 0 would match every packet without a mark
bypass-user = 0xffffffff
    "bypass-user" expects a number from 0 to 0xfffffffe, not "0xffffffff"
include = none
    unable to include none: no such file or directory
counters = yes
    "counters" expects target or cgroup, not "yes"
"##,
    ),
    (
        "[tproxy a]\nport = 1\n",
        r##"
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
address = ::ffff:127.0.0.1
    "address" expects an IPv4 or IPv6 address, not "::ffff:127.0.0.1", did you mean "127.0.0.1"?
address = 224.0.0.1
    "address" expects an IPv4 or IPv6 address, not "224.0.0.1"
address = 255.255.255.255
    "address" expects an IPv4 or IPv6 address, not "255.255.255.255"
address = ff02::1
    "address" expects an IPv4 or IPv6 address, not "ff02::1"
mark = 0
    "mark" expects a number from 1 to 0xffffffff, not "0"
mark = 0x8000001
    mark 0x8000001 is not within fwmark-mask 0xff000000
tcp = maybe
    "tcp" expects yes, no, drop or reject, not "maybe"
udp = direct
    "udp" expects yes, no, drop or reject, not "direct"
ipv4 = Yes
    "ipv4" expects yes, no, drop or reject, not "Yes"
ipv6 = 2
    "ipv6" expects yes, no, drop or reject, not "2"
quic = none
    "quic" expects yes, no, drop or reject, not "none"
tcp-ports = http
    "tcp-ports" expects ports and ranges of them, like 80 443 8000-8999, not "http"
udp-ports = 443 65536
    "udp-ports" expects ports and ranges of them, like 80 443 8000-8999, not "443 65536"
tcp-ports = 0-1
    "tcp-ports" expects ports and ranges of them, like 80 443 8000-8999, not "0-1"
tcp-ports = 8999-8000
    "tcp-ports": 8999-8000 ends before it begins
dns-hijack = 1053
    "dns-hijack" expects ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, not "1053"
dns-hijack = 224.0.0.1
    "dns-hijack" expects ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, not "224.0.0.1"
dns-hijack = 255.255.255.255:53
    "dns-hijack" expects ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, not "255.255.255.255:53"
dns-hijack = [127.0.0.1]:53
    "dns-hijack" expects ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, not "[127.0.0.1]:53"
dns-hijack = ::1:53
    "dns-hijack" expects ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, not "::1:53"
dns-hijack-tcp = drop
    "dns-hijack-tcp" expects yes or no, not "drop"
dns-hijack-tcp = yes
    "dns-hijack-tcp" needs "dns-hijack"
mark = 0xfe000000
    mark 0xfe000000 is fwmark-mask without its lowest bit, which stands for flows that a proxy begins
tcp-ports = ,
    "tcp-ports" expects ports and ranges of them, like 80 443 8000-8999, not ","
dns-hijack-local = yes
    "dns-hijack-local" needs "dns-hijack"
"##,
    ),
    (
        "[rules]\n",
        r##"
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
drop = user:nobody-here
    no such user: "nobody-here"
drop = group:www-data,xray
    no such group: "xray"
drop = user:9-7
    "user:" expects numbers up to 4294967294, the smaller first: "9-7"
drop = users:5
    unknown match "users:", did you mean "user:"?
drop = servce:sshd
    unknown match "servce:", did you mean "service:"?
drop = application:firefox
    unknown match "application:"
drop = service:
    "service:" needs a name: "service:"
drop = app:firefox,,zoom
    "app:" needs a name: "app:firefox,,zoom"
drop = app:a/b
    a name has no "/": "a/b"
drop = service:sshd.service
    a service's name has no ".service": "sshd.service", write sshd
"##,
    ),
    (
        "[gateway a]\ninterface = eth0\ntarget = direct\n",
        r##"
interfce = a
    unknown key "interfce" in [gateway], did you mean "interface"?
interface = lo
    "interface" expects an interface that others are behind, not "lo"
interface = *
    "interface" expects a name, or the beginning of one before the *, not "*"
interface = a*b
    "interface" expects the name of an interface, up to 15 characters, not "a*b"
interface = a b
    "interface" expects the name of an interface, up to 15 characters, not "a b"
interface = a/b
    "interface" expects the name of an interface, up to 15 characters, not "a/b"
interface = xxxxxxxxxxxxxxxx
    "interface" expects the name of an interface, up to 15 characters, not "xxxxxxxxxxxxxxxx"
interface = aaaaaaaaaaaaaaa*
    "interface" expects up to 14 characters before the *, not "aaaaaaaaaaaaaaa*"
interface = eth0
    "interface" names "eth0" twice
source = private
    "source" expects an address or a CIDR, not "private"
source = ::ffff:192.0.2.1
    "source" expects an address or a CIDR, not "::ffff:192.0.2.1", did you mean "192.0.2.1"?
source = 10.0.0.0/33
    "source": prefix length 33 is not from 0 to 32: "10.0.0.0/33"
source-mac = 02:00:00:00:00
    "source-mac" expects six pairs of hexadecimal digits with colons, not "02:00:00:00:00"
source-mac = 02:00:00:00:00:+1
    "source-mac" expects six pairs of hexadecimal digits with colons, not "02:00:00:00:00:+1"
source-mac = 02:00:00:00:00:01:02
    "source-mac" expects six pairs of hexadecimal digits with colons, not "02:00:00:00:00:01:02"
target = drop
    duplicate key "target", first set at c:3
"##,
    ),
    (
        "[route a]\n",
        r##"
interface = wg*
    "interface" expects the name of one interface, not "wg*"
interface = lo
    "interface" expects an interface that leads out of this host, not "lo"
table = 255
    "table" cannot be 255: it is the local one
table = 301
    "table" 301: cgtproxy keeps tables 300 to 301 itself; name another, or set another route-table
"##,
    ),
    (
        "[route a]\ninterface = w\n",
        r##"
table = 9
    [route a] has an interface: "table" stands instead
gateway = 127.0.0.1
    "gateway" expects the IPv4 or IPv6 address of another host, not "127.0.0.1"
gateway = 0.0.0.0
    "gateway" expects the IPv4 or IPv6 address of another host, not "0.0.0.0"
gateway = 255.255.255.255
    "gateway" expects the IPv4 or IPv6 address of another host, not "255.255.255.255"
gateway = ff02::1
    "gateway" expects the IPv4 or IPv6 address of another host, not "ff02::1"
gateway = ::1
    "gateway" expects the IPv4 or IPv6 address of another host, not "::1"
gateway = ::ffff:10.0.0.1
    "gateway" expects the IPv4 or IPv6 address of another host, not "::ffff:10.0.0.1"
port = 1
    unknown key "port" in [route]
"##,
    ),
    (
        "",
        r##"
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
[route a]
    [route a] needs an interface, or a table that somebody else keeps
[gateway]
    section [gateway] needs a name: [gateway NAME]
[gatway a]
    unknown section [gatway], did you mean [gateway]?
[gateway 1]
    bad gateway name "1": a letter, then up to 14 letters, digits, "_" or "-"
"##,
    ),
];

/// A bad line gets its message, with its number and the offending text.
#[test]
fn bad_lines() {
    let mut count = 0;
    for (head, table) in BAD_LINES {
        let number = head.lines().count() + 1;
        let rows: Vec<&str> = table.trim().lines().collect();
        for row in rows.chunks(2) {
            let text = format!("{head}{}\n", row[0]);
            bad(&[("c", &text)], &[&format!("c:{number}: {}", row[1].trim())]);
            count += 1;
        }
    }
    assert!(count >= 114, "{count} rows");
}

/// Bad files, each with the lines that it gets.
const BAD_FILES: [(&str, &[&str]); 15] = [
    ("[rules]\ndrop = /a\0b\n", &["c:2: a NUL byte in the line: \"drop = /a\\u{0}b\""]),
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
            &["c:3: a tproxy needs a fwmark-mask of two bits or more, not 0x1"],
        ),
    (
            "[global]\nfwmark-mask = 3\n[tproxy a]\nport = 1\n[tproxy b]\nport = 2\n[tproxy c]\nport = 3\n",
            &["c:7: no mark left in fwmark-mask 0x3 for [tproxy c]"],
        ),
    (
            "[global]\ndefault = drop\nfwmark-mask = 3\n[tproxy a]\nport = 1\nmark = 3\n",
            &["c:6: mark 0x3 is the whole fwmark-mask, which stands for direct flows where the default is not direct, or lines for users or groups come first"],
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
    (
            "[tproxy a]\nport = 1\naddress = ::1\naddress = ::2\n[rules]\nb = /b\n",
            &[
                "c:4: second IPv6 \"address\": \"::2\" beside \"::1\"",
                "c:6: undefined target \"b\"",
            ],
        ),
    // one mistake, one message
    (
            "[global]\nfwmark-mask = 0xfg\n[tproxy a]\nport = 1\nmark = 1\n",
            &["c:2: \"fwmark-mask\" expects a number from 1 to 0xffffffff, not \"0xfg\""],
        ),
    (
            "[tproxy a]\nport = 1\ndns-hijack = no\ndns-hijack-tcp = yes\n",
            &["c:3: \"dns-hijack\" expects ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT, not \"no\""],
        ),
    (
            "[global]\nbypass-mark = 0x1000000\nbypass-mark = 0x2000001\nbypass-mark = 0x1000000/0x1000000\n[tproxy a]\nport = 1\n",
            &["c:2: \"bypass-mark\" 0x1000000 is the mark of [tproxy a]"],
        ),
];

/// What is wrong with several lines together gets its messages, by line, whatever was found when.
#[test]
fn bad_combinations() {
    for (text, want) in BAD_FILES {
        bad(&[("c", text)], want);
    }
}

/// The errors of all files are told together, and files that include one another.
#[test]
fn bad_includes() {
    for (files, want) in [
        // the errors of all files; keys, targets and sections are one space
        (
            &[
                ("c", "[global]\ndefault = a\ninclude = d/*\ninclude = e\nx = 1\n"),
                ("d/1", "[tproxy a]\nport = 0\n[global]\ndefault = drop\n"),
                ("d/2", "x\n\n[rules]\nother = /\n[tproxy a]\nport = 2\n"),
                ("e", "default = direct\n"),
            ][..],
            &[
                "c:5: unknown key \"x\" in [global]",
                "d/1:2: \"port\" expects a number from 1 to 65535, not \"0\"",
                "d/1:4: duplicate key \"default\", first set at c:2",
                "d/2:1: expected KEY = VALUE, not \"x\"",
                "d/2:4: undefined target \"other\"",
                "d/2:5: duplicate section [tproxy a], first at d/1:1",
                "e:1: \"default\" stands before any section header",
            ][..],
        ),
        (&[("c", "[global]\ninclude = c\n")], &["c:2: unable to include c: it includes itself"]),
        (
            &[("c", "[global]\ninclude = d\n"), ("d", "[global]\n\ninclude = c\n")],
            &["d:3: unable to include c: it includes itself"],
        ),
        (
            &[("c", "[global]\ninclude = d\ninclude = d*\nx\n"), ("d", "[rules]\n(\n")],
            &[
                "c:3: unable to include d: it was included before",
                "c:4: expected KEY = VALUE, not \"x\"",
                "d:2: expected KEY = VALUE, not \"(\"",
            ],
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
    assert_eq!(load(9), ["8:2: unable to include 9: nested over 8 deep"]);
}

/// For random masks, tproxies and explicit marks: each tproxy has a mark of its own, not zero,
/// within the mask and none that flows bear otherwise, or there is an error and a reason for it.
#[test]
fn marks() {
    let mut seed = 1u32;
    let mut random = |n: usize| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as usize % n
    };
    let (mut fine, mut refused) = (0, 0);
    for _ in 0..3000 {
        let bits: BTreeSet<usize> = (0..1 + random(3)).map(|_| random(32)).collect();
        let mask: u32 = bits.iter().map(|bit| 1 << bit).sum();
        let count = random(9);
        let default = ["direct", "drop"][random(2)];
        let mut text = format!("[global]\nfwmark-mask = {mask:#x}\ndefault = {default}\n");
        let mut explicit = Vec::new();
        for i in 0..count {
            text.push_str(&format!("[tproxy t{i}]\nport = 1\n"));
            if random(4) == 0 {
                let subset = bits.iter().filter(|_| random(2) == 0).map(|bit| 1 << bit);
                let mark: u32 = (subset.sum::<u32>() | u32::from(random(8) == 0)).max(1);
                text.push_str(&format!("mark = {mark}\n"));
                explicit.push(mark);
            }
        }
        let reserved =
            BTreeSet::from([mask & (mask - 1), if default == "drop" { mask } else { 0 }]);
        let legal = |mark: &u32| mark & !mask == 0 && !reserved.contains(mark);
        let distinct: BTreeSet<_> = explicit.iter().collect();
        let values = 1 << bits.len();
        let room =
            if values == 2 { 0 } else { values - 1 - reserved.iter().filter(|m| **m != 0).count() };
        let possible =
            explicit.iter().all(legal) && distinct.len() == explicit.len() && count <= room;
        match read(&[("c", &text)]) {
            Ok(config) => {
                assert!(possible, "{text}");
                let marks: BTreeSet<u32> = config.tproxies.iter().map(|t| t.outlet.mark).collect();
                assert!(marks.len() == count && !marks.contains(&0), "{text}{marks:?}");
                assert!(marks.iter().all(legal), "{text}{marks:?}");
                assert!(explicit.iter().all(|mark| marks.contains(mark)), "{text}{marks:?}");
                fine += 1;
            }
            Err(problems) => {
                assert!(!possible, "{text}{problems:?}");
                refused += 1;
            }
        }
    }
    assert!(fine > 500 && refused > 500, "{fine} {refused}");
}

/// 1, 2, 3… in file order, shifted into the mask; a mark that is given stands.
#[test]
fn default_marks() {
    for (mask, given, want) in [
        (0xff00_0000_u32, [None; 3], [0x0100_0000, 0x0200_0000, 0x0300_0000]),
        (0x0000_ff00, [None; 3], [0x100, 0x200, 0x300]),
        (0xffff_ffff, [None; 3], [1, 2, 3]),
        (0x7000_0000, [None; 3], [0x1000_0000, 0x2000_0000, 0x3000_0000]),
        (0x0001_0101, [None; 3], [0x001, 0x100, 0x101]),
        (0xff00_0000, [None, Some(0x0300_0000), None], [0x0100_0000, 0x0300_0000, 0x0400_0000]),
        (0x0000_0007, [None, Some(1), Some(5)], [2, 1, 5]),
    ] {
        let mut text = format!("[global]\nfwmark-mask = {mask}\n");
        for (i, mark) in given.iter().enumerate() {
            text.push_str(&format!("[tproxy t{i}]\nport = 1\n"));
            text.extend(mark.map(|mark| format!("mark = {mark:#x}\n")));
        }
        let marks: Vec<u32> = good(&text).tproxies.iter().map(|t| t.outlet.mark).collect();
        assert_eq!(marks, want, "{text}");
    }
}

/// A file that says nothing is the built-in default.
#[test]
fn an_empty_file_is_the_default() {
    for text in ["", "\n\n", "# only this\n", "\u{feff}", "[global]\n[rules]\n[global]\n"] {
        let config = good(text);
        let files = vec!["c".into()];
        let hollow = if text.contains('[') { Vec::new() } else { files.clone() };
        let built_in = Config { files, hollow, ..Config::default() };
        assert_eq!(format!("{config:?}"), format!("{built_in:?}"), "{text:?}");
    }
}

/// Each key of [global] is taken as it is written.
#[test]
fn every_key_of_global() {
    let v4 = |a: [u8; 4], n| Range::prefix(Ipv4Addr::from(a), n);
    let v6 = |a: &str, n| Range::prefix(a.parse::<Ipv6Addr>().unwrap(), n);
    let config = good(
        "[global]\ncgroup-root = /sys/fs/cgroup/unified\ndefault = drop\nroute-table = 0x100\n\
         rule-priority = 99\nfwmark-mask = 0xF0\nbypass = 192.0.2.1\nbypass = 198.51.100.0/24\n\
         bypass = 2001:db8::/32\nbypass = ::1\nbypass = private\nbypass-mark = 0xff00\n\
         bypass-mark = 0x1/0x3\nbypass-user = xray\nbypass-user = 0\non-exit = keep\n\
         log-level = debug\ncounters = cgroup\ncontainers = no\nhold = /a\nhold = /\n",
    );
    assert_eq!(config.cgroup_root.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
    assert_eq!(config.default, Target::Drop);
    assert_eq!((config.route_table, config.rule_priority, config.mask), (256, 99, 0xf0));
    assert_eq!(
        config.bypass.v4,
        [
            v4([10, 0, 0, 0], 8),
            v4([100, 64, 0, 0], 10),
            v4([172, 16, 0, 0], 12),
            v4([192, 0, 2, 1], 32),
            v4([192, 168, 0, 0], 16),
            v4([198, 51, 100, 0], 24),
        ]
    );
    assert_eq!(config.bypass.v6, [v6("::1", 128), v6("2001:db8::", 32), v6("fc00::", 7)]);
    let mark = |value, mask| Mark { value, mask };
    assert_eq!(config.bypass_marks, [mark(0xff00, u32::MAX), mark(1, 3)]);
    assert_eq!(config.bypass_users, [1000, 0]);
    assert_eq!(config.on_exit, OnExit::Keep);
    assert_eq!(config.log_level, Level::Debug);
    assert!(config.counters_per_cgroup);
    assert!(!config.containers);
    let holds: Vec<_> = config.holds.iter().map(|line| &*line.pattern).collect();
    assert_eq!(holds, ["/a", "/"]);

    for (word, level) in
        [("error", Level::Error), ("warning", Level::Warning), ("info", Level::Info)]
    {
        assert_eq!(good(&format!("[global]\nlog-level = {word}\n")).log_level, level);
    }
}

/// Each key of [tproxy] is taken as it is written, and has its default.
#[test]
fn every_key_of_tproxy() {
    let config = good(
        "[tproxy a]\nport = 0x1ed5\naddress = 127.0.0.1\naddress = ::1\nmark = 0x05000000\n\
         tcp = no\nudp = drop\nipv4 = off\nipv6 = 0\ndns-hijack = 127.0.0.1:1053\n\
         dns-hijack = [::1]:1054\ndns-hijack-tcp = true\n[tproxy B-_234567890123]\nport = 65535\n",
    );
    let [a, b] = &config.tproxies[..] else { panic!("{:?}", config.tproxies) };
    assert_eq!((a.outlet.name.as_str(), a.port, a.outlet.mark), ("a", 7893, 0x0500_0000));
    assert_eq!(a.addresses, [Some(Ipv4Addr::LOCALHOST.into()), Some(Ipv6Addr::LOCALHOST.into())]);
    let (x, y) = (&a.outlet, &b.outlet);
    assert_eq!((x.tcp, x.udp, x.ipv4, x.ipv6), (Take::No, Take::Drop, Take::No, Take::No));
    let resolvers: Vec<String> = x.dns().map(|to| to.to_string()).collect();
    assert_eq!(resolvers, ["127.0.0.1:1053", "[::1]:1054"]);
    assert!(x.dns_tcp);

    assert_eq!((b.outlet.name.as_str(), b.port), ("B-_234567890123", 65535));
    assert_eq!((b.addresses, y.resolvers), ([None; 2], [None; 2]));
    assert_eq!((y.tcp, y.udp, y.ipv4, y.ipv6), (Take::Yes, Take::Yes, Take::Yes, Take::Yes));
    assert!(!y.dns_tcp);
}

/// Each key of [route] is taken as it is written; marks and tables follow the order in the file.
#[test]
fn every_key_of_route() {
    let config = good(
        "[route vpn]\ninterface = wg0\ngateway = 10.8.0.1\ngateway = fd00::1\nudp = drop\n\
         dns-hijack = 10.8.0.1\ndns-hijack-local = yes\n[tproxy p]\nport = 1\n\
         [route other]\ntable = 1000\nmark = 0x07000000\n[route third]\ninterface = tun0\n\
         masquerade = no\n[gateway lan]\ninterface = e*\ntarget = other\n",
    );
    let [vpn, other, third] = &config.routes[..] else { panic!("{:?}", config.routes) };
    assert_eq!((&*vpn.interface, vpn.table, vpn.masquerades()), ("wg0", 0, true));
    assert_eq!(vpn.gateways, ["10.8.0.1", "fd00::1"].map(|hop| hop.parse().ok()));
    assert_eq!((vpn.outlet.udp, vpn.outlet.dns_local), (Take::Drop, true));
    assert_eq!((&*other.interface, other.table, other.masquerades()), ("", 1000, false));
    assert_eq!((third.masquerades(), third.gateways), (false, [None; 2]));
    // numbered in file order, whatever the kind; behind them those of what is routed for others
    let marks = [&vpn.outlet, &config.tproxies[0].outlet, &other.outlet, &third.outlet];
    assert_eq!(marks.map(|outlet| outlet.mark >> 24), [1, 2, 7, 4]);
    assert_eq!([vpn, other, third].map(|route| route.forward_mark >> 24), [5, 6, 8]);
    assert_eq!(config.gateways[0].target, Target::Route(1));
    assert_eq!([0, 1, 2].map(|index| config.table_of(index)), [301, 302, 303]);
    let names: Vec<&str> = config.targets().map(|target| config.target_name(target)).collect();
    assert_eq!(names, ["direct", "drop", "p", "vpn", "other", "third"]);
}

/// Files with bad routes, each with the line that it gets.
const BAD_ROUTES: [(&str, &str); 9] = [
    (
        "[route a]\ntable = 9\ngateway = fd00::1\n",
        "c:3: [route a]: \"gateway\" needs \"interface\"",
    ),
    (
        "[route a]\ninterface = w\ngateway = 10.0.0.1\ngateway = 10.0.0.2\n",
        "c:4: second IPv4 \"gateway\": \"10.0.0.2\" beside \"10.0.0.1\"",
    ),
    (
        "[global]\nroute-table = 252\n[route a]\ninterface = w\n",
        "c:3: [route a] would have table 253 for its own (the routes have those behind \
             route-table 252): set another route-table",
    ),
    (
        "[global]\nroute-table = 0xffffffff\n[route a]\ninterface = w\n",
        "c:3: [route a] would have table 4294967296 for its own (the routes have those behind \
             route-table 4294967295): set another route-table",
    ),
    (
        "[global]\nrule-priority = 32765\n[route a]\ntable = 9\n",
        "c:3: a route with a table needs a rule-priority up to 32764",
    ),
    (
        "[tproxy a]\nport = 1\n[route a]\ninterface = w\n",
        "c:3: [route a] has the name of [tproxy a] at c:1",
    ),
    (
        "[route a]\ninterface = w\n[route a]\ninterface = w\n",
        "c:3: duplicate section [route a], first at c:1",
    ),
    ("[route drop]\ninterface = w\n", "c:1: a route cannot be named \"drop\""),
    (
        "[global]\nfwmark-mask = 1\n[route a]\ninterface = w\n",
        "c:3: a route needs a fwmark-mask of two bits or more, not 0x1",
    ),
];

/// A route without a way, with two, or with one that cannot be, is told; see [`BAD_LINES`] for its lines.
#[test]
fn bad_routes() {
    for (text, want) in BAD_ROUTES {
        bad(&[("c", text)], &[want]);
    }
    let many: String = (0..201).map(|i| format!("[route r{i}]\ninterface = w\n")).collect();
    let many = format!("[global]\nfwmark-mask = 0xffff0000\n{many}");
    bad(&[("c", &many)], &["c:403: more than 200 routes: \"r200\""]);
}

/// Each key of [gateway] is taken as it is written.
#[test]
fn every_key_of_gateway() {
    let config = good(
        "[gateway lan]\ninterface = br-lan\ninterface = wg*\nsource = 192.0.2.77/24\n\
         source = 2001:db8::1\nsource-mac = 02:00:00:00:00:aB\ntarget = late\n\
         [gateway drop]\ninterface = eth1.2@x\ntarget = drop\n[gateway rest]\n\
         interface = e*\ntarget = direct\n[tproxy late]\nport = 1\ndns-hijack = ::1\n\
         dns-hijack-local = yes\n",
    );
    let [lan, drop, rest] = &config.gateways[..] else { panic!("{:?}", config.gateways) };
    let names: Vec<String> = lan.interfaces.iter().map(|i| i.to_string()).collect();
    assert_eq!((lan.name.as_str(), names), ("lan", vec!["br-lan".into(), "wg*".into()]));
    assert_eq!(lan.sources.v4[0].to_string(), "192.0.2.0/24");
    assert_eq!(lan.sources.v6[0].to_string(), "2001:db8::1");
    assert_eq!(lan.macs[0].to_string(), "02:00:00:00:00:ab");
    assert_eq!(lan.target, Target::Tproxy(0));
    assert_eq!((drop.target, rest.target), (Target::Drop, Target::Direct));
    assert_eq!(drop.interfaces[0].to_string(), "eth1.2@x");
    assert!(drop.sources.is_empty() && drop.macs.is_empty());
    assert!(config.tproxies[0].outlet.dns_local);
    assert!(config.routes_to_tproxy());
}

/// Files with bad gateway sections, each with the lines that it gets.
const BAD_GATEWAYS: [(&str, &[&str]); 4] = [
    (
            "[gateway a]\n[gateway a]\n",
            &[
                "c:1: [gateway a] needs an interface",
                "c:1: [gateway a] needs a target",
                "c:2: duplicate section [gateway a], first at c:1",
            ],
        ),
    (
            "[gateway a]\ninterface = lo\ntarget = mihmo\n[tproxy mihomo]\nport = 1\n",
            &[
                "c:2: \"interface\" expects an interface that others are behind, not \"lo\"",
                "c:3: undefined target \"mihmo\", did you mean \"mihomo\"?",
            ],
        ),
    (
            "[global]\nfwmark-mask = 3\n[tproxy a]\nport = 1\nmark = 2\n[gateway a]\ninterface = e\ntarget = a\n",
            &["c:5: mark 0x2 is fwmark-mask without its lowest bit, which stands for flows that a proxy begins"],
        ),
    (
            "[global]\nrule-priority = 32764\n[gateway a]\ninterface = e*\ntarget = drop\n",
            &["c:3: an interface with \"*\" needs a rule-priority up to 32763"],
        ),
];

/// A gateway section that cannot be is told; see [`BAD_LINES`] for its lines.
#[test]
fn bad_gateways() {
    for (text, want) in BAD_GATEWAYS {
        bad(&[("c", text)], want);
    }
}

/// Values may be written in several ways.
#[test]
fn values_that_are_fine() {
    for (value, port) in [
        ("127.0.0.1", "127.0.0.1:53"),
        ("127.0.0.1:1053", "127.0.0.1:1053"),
        ("::1", "[::1]:53"),
        ("[::1]", "[::1]:53"),
        ("[2001:db8::1]:5353", "[2001:db8::1]:5353"),
    ] {
        let config = good(&format!("[tproxy a]\nport = 1\ndns-hijack = {value}\n"));
        let a = &config.tproxies[0].outlet;
        let got: Vec<String> = a.dns().map(|to| to.to_string()).collect();
        assert_eq!(got, [port]);
    }
    for (word, take) in [
        ("yes true on 1", Take::Yes),
        ("no false off 0", Take::No),
        ("drop", Take::Drop),
        ("reject", Take::Reject),
    ] {
        for word in word.split(' ') {
            let config = good(&format!("[tproxy a]\nport = 1\nudp = {word}\n"));
            assert_eq!(config.tproxies[0].outlet.udp, take, "{word}");
        }
    }
    let ports = "tcp-ports = 8000-8999 443,80\ntcp-ports = 8999-9001 81\n";
    let config = good(&format!("[tproxy a]\nport = 1\n{ports}"));
    let ports = &config.tproxies[0].outlet.tcp_ports;
    let ports: Vec<_> = ports.iter().map(|range| range.to_string()).collect();
    assert_eq!(ports, ["80-81", "443", "8000-9001"]);
}

/// A pattern matches a whole path, however it is written, and nothing else.
#[test]
fn rules_and_what_they_match() {
    for (value, matches, does_not) in [
        ("/a", "/a", "/a/b"),
        ("/a|/b", "/b", "/x/b"),
        ("^/a$", "/a", "/a/"),
        ("\" /a \"", " /a ", "/a"),
        ("/a # b = \"c\" ; d", "/a # b = \"c\" ; d", "/a"),
        ("\"/a=[x]\"", "/a=x", "/a"),
        ("/(transmission|aria2)", "/aria2", "/aria2c"),
        (
            r"/user\.slice/.*/app-org\.mozilla\.firefox.*",
            "/user.slice/u/app-org.mozilla.firefox-1.scope",
            "/user.slice",
        ),
        ("(?i)/a", "/A", "/B"),
        ("(?x)/a b # c", "/ab", "/a b"),
        ("(?x)/a|/b # c)|(.*", "/b", "/c"),
        ("/日本", "/日本", "/日"),
        ("/a\u{fffd}", "/a\u{fffd}", "/a"),
    ] {
        let config = good(&format!("[rules]\r\n  drop\t=  {value}  \r\n"));
        let [rule] = &config.rules[..] else { panic!("{value}: {:?}", config.rules) };
        assert_eq!((rule.target, rule.place.to_string().as_str()), (Target::Drop, "c:2"));
        assert!(rule.regex.is_match(matches), "{value} on {matches}");
        assert!(!rule.regex.is_match(does_not), "{value} on {does_not}");
    }
}

/// A line with several patterns is one line; the first that matches decides across kinds.
#[test]
fn matches_that_are_no_regex() {
    let config = good(
        "[rules]\ndrop = /openrc\\.b\ndirect = service:a, b\ndrop = app:b\n\
         drop = /services/b/c\ndirect = service:a\n",
    );
    let lines = config.rule_lines().map(|line| match line {
        RuleLine::Patterns(rules) => (line.text(), rules.len()),
        RuleLine::Owners(rule) => (line.text(), rule.owners.len()),
    });
    let texts: Vec<_> = lines.collect();
    let want = [
        (r"/openrc\.b", 1),
        ("service:a, b", 4),
        ("app:b", 4),
        ("/services/b/c", 1),
        ("service:a", 2),
    ];
    assert_eq!(texts, want);
    let decides = |path: &str| {
        let last = policy::ranks(&config, path.as_bytes(), false).last();
        last.map(|(_, rank)| policy::target(&config, rank)).unwrap_or_default()
    };
    assert_eq!(decides("/openrc.b/x"), Target::Drop);
    assert_eq!(decides("/services/b/c"), Target::Direct);
    assert_eq!(decides("/user.slice/user-7.slice/app-b-1.scope"), Target::Drop);
    let idle = lint::idle_rules(&config);
    let said: Vec<bool> = idle.iter().map(Option::is_some).collect();
    let mut want = vec![false; config.rules.len()];
    want[9..].fill(true);
    assert_eq!(said, want, "{idle:?}");
    assert!(idle
        .iter()
        .flatten()
        .all(|why| why.contains("covers all of it before: direct = service:a, b")));
}

/// Lines for owners stand where they were written, and know what comes behind them.
#[test]
fn users_and_groups_in_order() {
    let text =
        "[rules]\ndrop = user:xray,5\ndirect = group:www-data\ndrop = /a\ndirect = service:b\n\
                drop = user:7-9\ndirect = /c\n";
    let config = good(text);
    let lines: Vec<_> = config.rule_lines().map(|line| line.place().line).collect();
    assert_eq!(lines, [2, 3, 4, 5, 6, 7]);
    let owners: Vec<_> =
        config.owner_rules.iter().map(|r| (r.after, r.class, &r.owners[..])).collect();
    let first = [Owner::Users(1000, 1000), Owner::Users(5, 5)];
    let want =
        [(0, 1, &first[..]), (0, 1, &[Owner::Groups(33, 33)]), (3, 2, &[Owner::Users(7, 9)])];
    assert_eq!(owners, want);
    let classes: Vec<_> = (0..=4).map(|at| config.outcome(at).class).collect();
    assert_eq!(classes, [1, 1, 1, 2, 2]);
    let named = |config: &Config| -> Vec<String> {
        config.outcomes().map(|o| table::set_name(config, o)).collect()
    };
    assert_eq!(named(&config), ["cg_direct", "cg_drop", "cg1_direct", "cg2_direct", "cg1_drop"]);
    let plain = good("[rules]\ndrop = /a\ndirect = service:b\ndrop = user:7\n");
    assert_eq!(named(&plain), ["cg_direct", "cg_drop"]);
    assert_eq!((plain.default_outcome().class, plain.owner_rules_before(0).len()), (1, 0));
    let hidden =
        good("[rules]\ndrop = user:5-9\ndirect = user:7\ndirect = group:7\ndirect = user:9-10\n");
    let idle: Vec<_> = hidden.owner_rules.iter().map(|r| lint::idle_owners(&hidden, r)).collect();
    let why = "c:2 covers all of it before: drop = user:5-9".to_string();
    assert_eq!(idle, [None, Some(why), None, None]);
    let many: String = (0..70).map(|n| format!("drop = user:{n}\ndrop = /{n}\n")).collect();
    bad(
        &[("c", &format!("[rules]\n{many}"))],
        &["c:130: users and groups between other rules in more than 64 places: \"user:64\""],
    );
}

/// Whether a line covers a socket, of which these are the path and its ancestors.
fn covers(line: &RuleLine, paths: &[&str], uid: u32, gid: u32) -> bool {
    match line {
        RuleLine::Patterns(rules) => {
            let hits = |rule: &PatternRule| paths.iter().any(|path| rule.regex.is_match(path));
            rules.iter().any(hits)
        }
        RuleLine::Owners(rule) => {
            rule.owners.iter().any(|owner| owner.has(uid, Some(gid)) == Some(true))
        }
    }
}

/// Random rules of all kinds, users, groups and paths, against the definition: the first line that
/// covers a socket decides.
#[test]
fn the_first_line_that_covers_decides() {
    // xorshift64*
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut draw = move |n: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    };
    let patterns = ["/a", "/b", "/a/.*", ".*/b", "/services/x", "service:x,a", "app:x", "/.*/x"];
    let owners = ["user:1", "user:2-4", "group:1", "group:3,5-6", "user:0,5", "group:2-4"];
    let targets = ["direct", "drop", "p", "q"];
    let names =
        ["a", "b", "x", "services", "openrc.x", "user.slice", "user-1.slice", "app-x-1.scope"];
    let mut decided = BTreeMap::new();
    for _ in 0..1500 {
        let rules: String = (0..draw(9))
            .map(|_| {
                let matches = if draw(2) == 0 { owners[draw(6)] } else { patterns[draw(8)] };
                format!("{} = {matches}\n", targets[draw(4)])
            })
            .collect();
        let config = good(&format!(
            "[global]\ndefault = {}\n[tproxy p]\nport = 1\n[tproxy q]\nport = 2\n[rules]\n{rules}",
            targets[draw(4)]
        ));
        for _ in 0..30 {
            let path: String = (0..draw(5)).map(|_| format!("/{}", names[draw(8)])).collect();
            let (uid, gid) = (draw(7) as u32, draw(7) as u32);
            let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
            let prefixes: Vec<&str> =
                ends.map(|end| &path[..end]).filter(|p| !p.is_empty()).collect();
            let mut lines = config.rule_lines();
            let want = lines.find(|line| covers(line, &prefixes, uid, gid));
            let want = want.map_or(config.default, |line| line.target());
            let last = policy::ranks(&config, path.as_bytes(), false).last();
            let rank = last.map_or(policy::root_rank(&config), |(_, rank)| rank);
            let outcome = policy::outcome(&config, rank);
            let found = policy::target_of(&config, outcome, uid, Some(gid));
            assert_eq!(found, Some(want), "{path:?} uid {uid} gid {gid} under\n{rules}");
            // without the group, nothing wrong is said
            let guess = policy::target_of(&config, outcome, uid, None);
            assert!(guess.is_none() || guess == Some(want));
            *decided.entry((want, outcome.class.min(2))).or_insert(0) += 1;
        }
    }
    assert!(decided.len() == 12 && decided.values().all(|n| *n > 500), "{decided:?}");
}

/// Targets may be defined below their use; included files stand where the include does.
#[test]
fn includes_and_order() {
    let config = read(&[
        (
            "etc/c",
            "[rules]\nb = /1\n[global]\ninclude = d/*\ndefault = b\n[rules]\na = /4\n[tproxy a]\nport = 1\n",
        ),
        ("etc/d/10", "[rules]\ndrop = /2\n[global]\ninclude = ../none*\n"),
        ("etc/d/20", "[rules]\ndirect = /3\n[tproxy b]\nport = 2\n"),
    ])
    .unwrap();
    let rules: Vec<_> = config.rules.iter().map(|r| (r.target, r.pattern.as_str())).collect();
    let (b, a) = (Target::Tproxy(0), Target::Tproxy(1));
    let want = [(b, "/1"), (Target::Drop, "/2"), (Target::Direct, "/3"), (a, "/4")];
    assert_eq!(rules, want);
    assert_eq!(config.default, b);
    assert_eq!(config.tproxies[0].outlet.mark, 0x0100_0000);
    let files = ["etc/c", "etc/d/10", "etc/d/20"].map(PathBuf::from);
    assert_eq!(config.files, files);
    assert_eq!(config.rules[2].place.to_string(), "etc/d/20:2");
}

/// A directory below /tmp that is gone at the end; nobody but root may write it.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Dir {
        let dir = format!("cgtproxy-config-{}-{name}", std::process::id());
        let dir = Dir(std::env::temp_dir().join(dir));
        fs::create_dir(&dir.0).unwrap();
        dir.mode("", 0o755);
        dir
    }

    fn path(&self, name: &str) -> PathBuf {
        match name {
            "" => self.0.clone(),
            _ => self.0.join(name),
        }
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).unwrap();
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>, mode: u32) {
        fs::write(self.path(name), bytes).unwrap();
        self.mode(name, mode);
    }

    fn dir(&self, name: &str, mode: u32) {
        fs::create_dir(self.path(name)).unwrap();
        self.mode(name, mode);
    }

    fn load(&self, name: &str, trusted_only: bool) -> Vec<String> {
        lines(load(&Files::new(trusted_only), &self.path(name)))
    }

    /// Loads `name`; in `want`, `DIR` stands for this directory.
    #[track_caller]
    fn expect(&self, name: &str, trusted_only: bool, want: &[&str]) {
        let dir = self.0.to_str().unwrap();
        let want: Vec<_> = want.iter().map(|line| line.replace("DIR", dir)).collect();
        assert_eq!(self.load(name, trusted_only), want, "{name}");
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What is no file of text, or too long, is refused with the reason.
#[test]
fn what_is_no_configuration_file() {
    let dir = Dir::new("kinds");
    dir.dir("directory", 0o755);
    mkfifo(&dir.path("fifo"), Mode::from_bits_truncate(0o600)).unwrap();
    dir.file("full", "#".repeat(1 << 20), 0o600);
    dir.file("over", "#".repeat((1 << 20) + 1), 0o600);
    File::create(dir.path("sparse")).unwrap().set_len(1 << 30).unwrap();
    dir.file("latin1", b"[global]\n# caf\xe9\n", 0o600);
    dir.file("utf16", b"\xff\xfe[\0g\0", 0o600);
    dir.file("zeros", b"[global]\n\0\0\n", 0o600);
    symlink("loop", dir.path("loop")).unwrap();
    for trusted_only in [false, true] {
        for (name, want) in [
            ("absent", "DIR/absent: no such file or directory"),
            ("full/x", "DIR/full/x: not a directory"),
            ("directory", "DIR/directory: is a directory"),
            ("fifo", "DIR/fifo: is not a regular file"),
            ("over", "DIR/over: is over 1 MiB"),
            ("sparse", "DIR/sparse: is over 1 MiB"),
            ("latin1", "DIR/latin1: is not UTF-8 (line 2)"),
            ("utf16", "DIR/utf16: is not UTF-8 (line 1)"),
            ("zeros", "DIR/zeros:2: a NUL byte in the line: \"\\u{0}\\u{0}\""),
            ("loop", &format!("DIR/loop: {}", reason(Errno::ELOOP))),
        ] {
            dir.expect(name, trusted_only, &[want]);
        }
        dir.expect("full", trusted_only, &[]);
    }
    let device = load(&Files::new(false), Path::new("/dev/zero"));
    assert_eq!(lines(device), ["/dev/zero: is not a regular file"]);
}

/// An include takes the files that a shell would, in that order.
#[test]
fn includes_on_disk() {
    let dir = Dir::new("includes");
    dir.dir("d", 0o755);
    dir.file("d/10.conf", "one", 0o600);
    dir.file("d/9.conf", "two", 0o600);
    dir.file("d/.hidden.conf", "three", 0o600);
    dir.file("d/9.conf~", "four", 0o600);
    dir.file(
        "c",
        "[global]\ninclude = d/*.conf\ninclude = none/*.conf\ninclude = d/*.cfg\n",
        0o600,
    );
    // sorted as the shell sorts, by bytes
    let want = [
        "DIR/d/10.conf:1: expected KEY = VALUE, not \"one\"",
        "DIR/d/9.conf:1: expected KEY = VALUE, not \"two\"",
    ];
    dir.expect("c", true, &want);
    for (value, why) in [
        ("*/x.conf", "only the last part may have \"*\" or \"?\""),
        ("c/*.conf", "not a directory"),
        ("..", "no file name"),
        ("d/*.conf # all", "no such file; a comment needs a line of its own"),
    ] {
        dir.file("bad", format!("[global]\ninclude = {value}\n"), 0o600);
        let want = format!("DIR/bad:2: unable to include \"{value}\": {why}");
        dir.expect("bad", true, &[&want]);
    }
}

/// Files and directories of all who may change them.
fn of_all_hands() -> Dir {
    let dir = Dir::new("trust");
    let foreign = |name: &str| chown(dir.path(name), Some(65534), None).unwrap();
    let foreign_group = |name: &str| chown(dir.path(name), None, Some(65534)).unwrap();
    let text = "[global]\n";
    dir.file("group", text, 0o664);
    dir.file("others", text, 0o602);
    dir.file("foreign", text, 0o644);
    foreign("foreign");
    dir.file("readable", text, 0o644);
    foreign_group("readable");
    dir.file("hard", "[global]\ninclude = group\ninclude = others\n", 0o400);
    for (name, mode) in
        [("open", 0o777), ("group-open", 0o775), ("sticky", 0o1777), ("owned", 0o755)]
    {
        dir.dir(name, mode);
        dir.file(&format!("{name}/c"), text, 0o600);
    }
    foreign("owned");
    symlink("open/c", dir.path("to-open")).unwrap();
    symlink("foreign", dir.path("to-foreign")).unwrap();
    symlink("readable", dir.path("to-good")).unwrap();
    symlink(dir.path("readable"), dir.path("open/link")).unwrap();
    for name in ["open/deep", "owned/a", "owned/a/b", "sticky/theirs"] {
        dir.dir(name, 0o755);
        dir.file(&format!("{name}/c"), text, 0o600);
    }
    foreign("sticky/theirs");
    symlink("owned/a/b", dir.path("to-deep")).unwrap();
    symlink("../readable", dir.path("sticky/link")).unwrap();
    lchown(dir.path("sticky/link"), Some(65534), None).unwrap();
    symlink("../sticky/../readable", dir.path("sticky/good")).unwrap();
    dir
}

/// What `run` refuses; `check` and `show` read it all the same. Needs root for foreign owners.
#[test]
fn who_may_change_a_file() {
    if !geteuid().is_root() {
        return eprintln!("skipped: needs root");
    }
    let dir = of_all_hands();
    let open = "is in a directory that others may write: DIR";
    for (name, want) in [
        ("group", "DIR/group: is writable by group or others (mode 0664; chmod go-w)".into()),
        ("others", "DIR/others: is writable by group or others (mode 0602; chmod go-w)".into()),
        ("foreign", "DIR/foreign: is owned by uid 65534, not by root".into()),
        ("to-foreign", "DIR/to-foreign: is owned by uid 65534, not by root".into()),
        ("open/c", format!("DIR/open/c: {open}/open (mode 0777, uid 0)")),
        ("group-open/c", format!("DIR/group-open/c: {open}/group-open (mode 0775, uid 0)")),
        ("owned/c", format!("DIR/owned/c: {open}/owned (mode 0755, uid 65534)")),
        ("to-open", format!("DIR/to-open: {open}/open (mode 0777, uid 0)")),
        ("open/link", format!("DIR/open/link: {open}/open (mode 0777, uid 0)")),
        // every directory above counts
        ("open/deep/c", format!("DIR/open/deep/c: {open}/open (mode 0777, uid 0)")),
        ("owned/a/b/c", format!("DIR/owned/a/b/c: {open}/owned (mode 0755, uid 65534)")),
        (
            "sticky/theirs/c",
            format!("DIR/sticky/theirs/c: {open}/sticky/theirs (mode 0755, uid 65534)"),
        ),
        ("to-deep/c", format!("DIR/to-deep/c: {open}/owned (mode 0755, uid 65534)")),
        (
            "owned/../readable",
            format!("DIR/owned/../readable: {open}/owned (mode 0755, uid 65534)"),
        ),
        // a symlink in a sticky directory is its owner's
        ("sticky/link", "DIR/sticky/link: is owned by uid 65534, not by root".into()),
    ] {
        dir.expect(name, true, &[&want]);
        dir.expect(name, false, &[]);
    }
    for name in ["readable", "sticky/c", "to-good", "sticky/good", "./sticky/../readable"] {
        dir.expect(name, true, &[]);
    }
}

/// An included file is held to the same; and whoever may write a directory could hide a file of it.
#[test]
fn who_may_change_an_included_file() {
    if !geteuid().is_root() {
        return eprintln!("skipped: needs root");
    }
    let dir = of_all_hands();
    let want = [
        "DIR/hard:2: unable to include DIR/group: is writable by group or others (mode 0664; chmod go-w)",
        "DIR/hard:3: unable to include DIR/others: is writable by group or others (mode 0602; chmod go-w)",
    ];
    dir.expect("hard", true, &want);
    dir.file("globs", "[global]\ninclude = open/deep/*.conf\n", 0o400);
    let want = "DIR/globs:2: unable to include \"open/deep/*.conf\": is in a directory that others may write: DIR/open (mode 0777, uid 0)";
    dir.expect("globs", true, &[want]);
}

/// As an unprivileged user, for this thread alone.
#[test]
fn what_may_not_be_read() {
    if !geteuid().is_root() {
        return eprintln!("skipped: needs root");
    }
    let dir = Dir::new("unreadable");
    dir.file("c", "[global]\n", 0o600);
    dir.dir("closed", 0o700);
    dir.file("closed/c", "[global]\n", 0o644);
    dir.file("glob", "[global]\ninclude = closed/*.conf\n", 0o644);
    setfsuid(Uid::from_raw(65534));
    for trusted_only in [false, true] {
        dir.expect("c", trusted_only, &["DIR/c: permission denied"]);
        dir.expect("closed/c", trusted_only, &["DIR/closed/c: permission denied"]);
        let want = "DIR/glob:2: unable to include \"closed/*.conf\": permission denied";
        dir.expect("glob", trusted_only, &[want]);
    }
    setfsuid(Uid::from_raw(0));
}

/// All that is wrong with a rule.
#[test]
fn a_rule_of_several_errors() {
    let rules = "[rules]\nnobody = user:no-a,no-b\nno = /a(\n";
    let mut found = lines(read(&[("c", rules)]));
    found.sort();
    let want = [
        "c:2: no such user: \"no-a\"; no such user: \"no-b\"",
        "c:2: undefined target \"nobody\"",
        "c:3: bad pattern at character 3: found open group without closing ')': \"/a(\"",
        "c:3: undefined target \"no\"",
    ];
    assert_eq!(found, want);
}

/// Where a pattern is wrong, also in a long one.
#[test]
fn error_positions() {
    let (a, deep) = ("a".repeat(5000), "(".repeat(50));
    for (pattern, at) in [
        (format!("/{a}("), 5002),
        (format!("/(x){a}(b"), 5005),
        (format!("/\\q{a}"), 3),
        (format!("/{a}\\q{a}"), 5003),
        (format!("{deep}(a"), 51),
    ] {
        let lines = lines(read(&[("c", &format!("[rules]\ndrop = {pattern}\n"))]));
        let want = format!("c:2: bad pattern at character {at}: ");
        assert!(lines.len() == 1 && lines[0].starts_with(&want), "{want}{lines:?}");
    }
    good(&format!("[rules]\ndrop = {deep}a{}\n", ")".repeat(50)));
    bad(
        &[("c", "[rules]\ndrop = a{999}{9999}\n")],
        &["c:2: bad pattern: compiled regex exceeded size limit: \"a{999}{9999}\""],
    );
}

/// One pattern takes a megabyte at most, and all of them sixteen: said once, and at once.
#[test]
fn patterns_that_take_too_much_memory() {
    let start = std::time::Instant::now();
    let rules = "drop = /a(b{50}){50}\n".repeat(1000);
    let lines = lines(read(&[("c", &format!("[rules]\n{rules}"))]));
    assert!(lines.len() == 1 && lines[0].contains("more than 16 MiB"), "{lines:?}");
    // (in a debug build)
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    good(&format!("[rules]\n{}", "drop = /a(b{50}){50}\n".repeat(10)));
    // those of many names too
    let names: Vec<String> = (0..4000).map(|n| format!("a{n}")).collect();
    let text = format!("[rules]\ndrop = app:{}\n", names.join(","));
    let problems = read(&[("c", &text)]).err().unwrap_or_default();
    let said = problems.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert!(said.len() == 1 && said[0].contains("more than 16 MiB"), "{said:?}");
    // thousands of ordinary ones are no matter
    good(&format!("[rules]\n{}", "drop = (?i)/user\\.slice/.*/app-[a-z]+\\.scope\n".repeat(500)));
}

/// Messages are single lines that no terminal takes for commands, and not endless.
#[test]
fn messages_are_printable() {
    bad(
        &[("c", "a\x1b[2Jb\n\u{85}x\ry\n")],
        &[
            "c:1: expected KEY = VALUE, not \"a\\u{1b}[2Jb\"",
            "c:2: expected KEY = VALUE, not \"x\\ry\"",
        ],
    );
    let lines = lines(read(&[("c", &"é".repeat(1 << 19))]));
    assert!(lines.len() == 1 && lines[0].chars().count() < 1100 && lines[0].ends_with("..."));
}

/// Where a key has its effect.
enum Effect {
    /// The table, the ip rules or the routes.
    Kernel,
    /// What the program does besides: by a field of [`Config`], which code outside src/config reads.
    Program(&'static str, fn(&Config) -> String),
}

/// For each key of a section, two lines that differ in it alone; `-` is no line.
const EFFECTS: [(&str, &str, &str, &str, Effect); 41] = [
    (
        "global",
        "cgroup-root",
        "auto",
        "/sys/fs/cgroup/a",
        Effect::Program("cgroup_root", |c| format!("{:?}", c.cgroup_root)),
    ),
    ("global", "default", "direct", "drop", Effect::Kernel),
    ("global", "route-table", "300", "301", Effect::Kernel),
    ("global", "rule-priority", "100", "101", Effect::Kernel),
    ("global", "fwmark-mask", "0xff000000", "0xfff00000", Effect::Kernel),
    ("global", "bypass", "-", "203.0.113.0/24", Effect::Kernel),
    ("global", "bypass-file", "-", "list", Effect::Kernel),
    ("global", "bypass-dscp", "4", "63", Effect::Kernel),
    ("global", "bypass-mark", "-", "0xff", Effect::Kernel),
    ("global", "bypass-user", "-", "xray", Effect::Kernel),
    (
        "global",
        "on-exit",
        "remove",
        "keep",
        Effect::Program("on_exit", |c| format!("{:?}", c.on_exit)),
    ),
    ("global", "include", "-", "more", Effect::Kernel),
    (
        "global",
        "log-level",
        "notice",
        "debug",
        Effect::Program("log_level", |c| format!("{:?}", c.log_level)),
    ),
    ("global", "counters", "target", "cgroup", Effect::Kernel),
    (
        "global",
        "containers",
        "yes",
        "no",
        Effect::Program("containers", |c| format!("{:?}", c.containers)),
    ),
    ("global", "hold", "-", "/a", Effect::Kernel),
    ("tproxy", "port", "7893", "7894", Effect::Kernel),
    ("tproxy", "address", "-", "127.0.0.1", Effect::Kernel),
    ("tproxy", "mark", "0x01000000", "0x02000000", Effect::Kernel),
    ("tproxy", "tcp", "yes", "no", Effect::Kernel),
    ("tproxy", "udp", "yes", "drop", Effect::Kernel),
    ("tproxy", "ipv4", "yes", "no", Effect::Kernel),
    ("tproxy", "ipv6", "yes", "drop", Effect::Kernel),
    ("tproxy", "quic", "yes", "reject", Effect::Kernel),
    ("tproxy", "tcp-ports", "-", "80 443", Effect::Kernel),
    ("tproxy", "udp-ports", "443", "400-500", Effect::Kernel),
    ("tproxy", "bypass", "-", "203.0.113.0/24", Effect::Kernel),
    ("tproxy", "bypass-file", "-", "list", Effect::Kernel),
    ("tproxy", "only", "203.0.113.0/24", "private", Effect::Kernel),
    ("tproxy", "only-file", "-", "list", Effect::Kernel),
    ("tproxy", "dns-hijack", "127.0.0.1:1053", "127.0.0.1:1054", Effect::Kernel),
    ("tproxy", "dns-hijack-tcp", "no", "yes", Effect::Kernel),
    ("tproxy", "dns-hijack-local", "no", "yes", Effect::Kernel),
    ("route", "interface", "wg0", "wg1", Effect::Kernel),
    ("route", "gateway", "-", "10.8.0.1", Effect::Kernel),
    ("route", "table", "1000", "1001", Effect::Kernel),
    ("route", "masquerade", "yes", "no", Effect::Kernel),
    ("gateway", "interface", "br-lan", "br-guest", Effect::Kernel),
    ("gateway", "source", "-", "192.0.2.0/24", Effect::Kernel),
    ("gateway", "source-mac", "-", "02:00:00:00:00:01", Effect::Kernel),
    ("gateway", "target", "proxy", "drop", Effect::Kernel),
];

/// A configuration in which every key may matter, with one line changed.
fn with_line(section: &str, key: &str, value: &str) -> Config {
    let needed = [
        ("tproxy", "port", "7893"),
        ("tproxy", "dns-hijack", "127.0.0.1:1053"),
        ("route", "interface", "wg0"),
        ("route", "dns-hijack", "10.8.0.1"),
        ("gateway", "interface", "br-lan"),
        ("gateway", "target", "proxy"),
    ];
    let instead = |of: &str| (section, key, of) == ("route", "table", "interface");
    let mut text = String::new();
    for (head, name) in [
        ("global", "[global]"),
        ("tproxy", "[tproxy proxy]"),
        ("route", "[route way]"),
        ("gateway", "[gateway lan]"),
    ] {
        text += &format!("{name}\n");
        let others = |n: &&(&str, &str, &str)| {
            n.0 == head && (section, key) != (n.0, n.1) && !(n.0 == section && instead(n.1))
        };
        for (_, needs, value) in needed.iter().filter(others) {
            text += &format!("{needs} = {value}\n");
        }
        match value {
            _ if head != section => {}
            // lines keep their numbers
            "-" => text += "#\n",
            _ => text += &format!("{key} = {value}\n"),
        }
    }
    let files = [("c", &*text), ("more", "[tproxy other]\nport = 9\n"), ("list", "192.0.2.1\n")];
    read(&files).unwrap_or_else(|problems| panic!("{key} = {value}: {problems:?}"))
}

/// What the kernel is told under a configuration.
fn told(config: Config) -> (Vec<u8>, String) {
    let mut core = Core::new(Rc::new(config), b"", 0);
    let (snapshot, config) = (core.snapshot(), core.config().clone());
    let contents =
        plan::contents(&config, snapshot, &Default::default(), &Default::default(), [0; 4], true);
    let (batch, _) = contents.replacement(None, Batch::new(1)).finish();
    (batch.bytes().to_vec(), format!("{:?}", plan::routing(&config)))
}

fn sources(dir: &Path, text: &mut String) {
    for entry in fs::read_dir(dir).expect("list src") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true if path.ends_with("src/config") => {}
            true => sources(&path, text),
            false => *text += &fs::read_to_string(&path).expect("read a source"),
        }
    }
}

/// No key is read for nothing: two values of it differ in the kernel or in what the program does.
#[test]
fn every_key_has_an_effect() {
    let mut code = String::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut code);
    let on = |kind: Kind| kind.keys().map(move |key| (kind.name(), key.name));
    let idle: Vec<_> = Kind::ALL
        .into_iter()
        .flat_map(on)
        .filter(|key| {
            // what a route shares with a tproxy is said there
            let is = |effect: &&(&str, &str, &str, &str, Effect)| {
                effect.1 == key.1 && (effect.0 == key.0 || (effect.0, key.0) == ("tproxy", "route"))
            };
            let Some((_, _, one, other, effect)) = EFFECTS.iter().rfind(is) else {
                return true; // not said above what it does
            };
            let (section, key) = *key;
            let [one, other] = [one, other].map(|value| with_line(section, key, value));
            match effect {
                Effect::Kernel => told(one) == told(other),
                Effect::Program(field, value) => {
                    value(&one) == value(&other) || !code.contains(&format!("config.{field}"))
                }
            }
        })
        .collect();
    assert!(idle.is_empty(), "keys without an effect that EFFECTS names: {idle:?}");
}

/// What fuzzing begins with has every key in every section that may have it, and is good.
#[test]
fn the_seed_has_every_key() {
    let text = include_str!("fuzz/seeds/config/every-key.conf");
    let mut parts = text.split("==> ");
    let main = parts.next().unwrap();
    let named = parts.map(|part| part.split_once('\n').unwrap());
    good_files(&[("c", main)].into_iter().chain(named).collect::<Vec<_>>());
    let sections = main.split("\n[").skip(1).map(|section| section.split_once(']').unwrap());
    let said = sections.flat_map(|(head, lines)| {
        let kind = head.split(' ').next().unwrap();
        lines.lines().filter_map(move |line| Some((kind, line.split_once(" = ")?.0)))
    });
    let said: BTreeSet<_> = said.filter(|(kind, _)| *kind != "rules").collect();
    let on = |kind: Kind| kind.keys().map(move |key| (kind.name(), key.name));
    assert_eq!(said, Kind::ALL.into_iter().flat_map(on).collect());
}

/// A default that is written changes nothing, whatever the key.
#[test]
fn every_default_is_the_models() {
    for kind in Kind::ALL {
        for key in kind.keys() {
            let Unset::Is(default) = key.unset else { continue };
            let [unset, set] = ["-", default].map(|value| with_line(kind.name(), key.name, value));
            assert_eq!(format!("{unset:?}"), format!("{set:?}"), "{}", key.name);
        }
    }
}

/// The text of a file that comes with the program, and its path.
fn shipped(name: &str) -> (PathBuf, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let text = fs::read_to_string(&path).expect("a file of the project");
    (path, text)
}

/// Asserts that an item of the manual tells of a key what its row has.
fn check_item(key: &Key, head: &str, text: &str) {
    let name = key.name;
    if let Takes::Words(words) = key.takes {
        assert_eq!(head, format!("{name} = {}", words.join(" | ")));
    }
    let lower = text.to_lowercase();
    let repeatable = lower.contains("repeatable") || lower.contains("once for each family");
    assert_eq!(repeatable, key.repeatable, "whether {name} is repeatable: {text}");
    let required = matches!(key.unset, Unset::Needs(_));
    assert_eq!(lower.contains("required"), required, "whether {name} is required: {text}");
    if let Unset::Is(default) = key.unset {
        let words = text.split(|c: char| !(c.is_alphanumeric() || c == '-'));
        let words: Vec<&str> = words.collect();
        assert!(
            words.contains(&"default") && words.contains(&default),
            "the default of {name} is {default}: {text}"
        );
    }
}

/// cgtproxy.conf.5 has each key in the order of the table, and of each what its row says.
#[test]
fn the_manual_has_every_key() {
    let (_, page) = shipped("conf/man/cgtproxy.conf.5");
    for (kind, heading) in [
        (Kind::Global, "GLOBAL"),
        (Kind::Tproxy, "TPROXY"),
        (Kind::Route, "ROUTES"),
        (Kind::Gateway, "GATEWAYS"),
    ] {
        // what a route shares with a tproxy stands there
        let told = |key: &&'static Key| kind == Kind::Tproxy || !key.on.contains(&Kind::Tproxy);
        let mut sections = page.split("\n.Sh ");
        let section = sections.find(|text| text.starts_with(&format!("{heading}\n")));
        let items = section.expect(heading).split("\n.It Ic ").skip(1);
        let items: Vec<_> = items.map(|item| item.split_once('\n').unwrap_or((item, ""))).collect();
        let names: Vec<_> = items.iter().map(|(head, _)| head.split(' ').next().unwrap()).collect();
        let keys: Vec<_> = kind.keys().filter(told).map(|key| key.name).collect();
        assert_eq!(names, keys, "the keys of [{}]", kind.name());
        let mut before = "";
        for (at, key) in kind.keys().filter(told).enumerate() {
            // items with one text stand together before it
            let text = items[at..].iter().map(|item| item.1).find(|text| !text.is_empty());
            let text = text.expect("the last item has a text");
            before = if text.starts_with("The same") { before } else { text };
            check_item(key, items[at].0, before);
        }
    }
}

/// What the completion for bash knows of commands and sections is the program's own: with
/// CGTPROXY_WRITE=1 this test writes it.
#[test]
fn completion_follows_from_the_tables() {
    let (path, file) = shipped("conf/completion/cgtproxy.bash");
    let (begin, end) = ("\t# from the program's tables: tests/config.rs writes it\n", "\t# end\n");
    let (head, rest) = file.split_once(begin).expect("the begin of what is written");
    let (_, tail) = rest.split_once(end).expect("its end");
    let commands: Vec<&str> = cgtproxy::cli::COMMANDS.iter().map(|command| command.0).collect();
    let targets = Kind::ALL.into_iter().filter(|kind| kind.is_target()).map(Kind::name);
    let targets: Vec<&str> = targets.collect();
    let (commands, targets) = (commands.join(" "), targets.join("|"));
    let tables = format!("\tlocal commands=\"{commands}\" targets=\"{targets}\"\n");
    let want = format!("{head}{begin}{tables}{end}{tail}");
    if std::env::var_os("CGTPROXY_WRITE").is_some() {
        fs::write(&path, &want).expect("write the completion");
    }
    assert_eq!(file, want, "CGTPROXY_WRITE=1 writes it anew");
}

/// Lists of addresses: beside the file that names them, of both families, merged.
#[test]
fn lists_of_addresses() {
    let head = "[tproxy a]\nport = 1\nbypass = 192.0.2.9\nbypass-file = ../cn.txt\n";
    let text =
        "\u{feff}# all\r\n192.0.2.0/25\r\n 192.0.2.128/25 # half\r\n\r\n;\n2001:db8::1/32;x\n";
    let all = |list: &str| {
        let more = "[global]\ninclude = d/b.conf\n[tproxy b]\nport = 2\nonly-file = d/cn.txt\n";
        read(&[("c", more), ("d/b.conf", head), ("d/../cn.txt", list), ("d/cn.txt", "::/0\n")])
    };
    let config = all(text).unwrap_or_else(|problems| panic!("{problems:?}"));
    let shown = |ranges: &Ranges| format!("{} {}", Joined(&ranges.v4), Joined(&ranges.v6));
    let of = |name: &str| config.outlets().find(|outlet| outlet.name == name).unwrap();
    assert_eq!(shown(&of("a").bypass), "192.0.2.0/24 2001:db8::/32");
    assert_eq!((&of("a").only, shown(of("b").only.as_ref().unwrap())), (&None, " ::/0".into()));
    for (line, hint) in [
        ("10.0.0/8", "10.0.0.0/8"),
        ("10/8", "10.0.0.0/8"),
        ("192.168.0.0/255.255.0.0", "192.168.0.0/16"),
        ("- 10.0.0.0/8", "10.0.0.0/8"),
        ("'10.0.0.0/8',", "10.0.0.0/8"),
        ("10.0.0.0-10.0.0.255", "10.0.0.0/24"),
        ("10.0.0.0-10.0.1.255 ", "10.0.0.0/23"),
        ("10.0.0.1-10.0.0.4", ""),
        ("example.org", ""),
        ("private", ""),
        ("10.0.0.0/33", ""),
        ("2001:db8::/129", ""),
        ("10.0.0.0/+8", ""),
        ("10.0.0.0/", "10.0.0.0"),
        ("10", ""),
        ("192.168.0.0/255.0.255.0", ""),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:c000:201/128", "192.0.2.1"),
        ("::ffff:192.0.2.1/120", "192.0.2.0/24"),
        ("'::ffff:192.0.2.1/97'", "128.0.0.0/1"),
        ("::ffff:192.0.2.1/129", ""),
    ] {
        let problems = lines(all(&format!("# one\n{line}\n")));
        let hint = match hint {
            "" => String::new(),
            hint => format!(", did you mean \"{hint}\"?"),
        };
        let line = line.trim();
        let want = format!("d/../cn.txt:2: expected an address or a CIDR, not \"{line}\"{hint}");
        assert_eq!(problems, [want]);
    }
    // all of them, as lists of reserved addresses have them
    assert!(all("::ffff:0:0/96\n::/8\n").is_ok());
    let want = "c:3: unable to read none: no such file or directory";
    bad(&[("c", "[tproxy a]\nport = 1\nonly-file = none\n")], &[want]);
}

/// Ranges with commas between.
struct Joined<'a, A: Address>(&'a [Range<A>]);

impl<A: Address> std::fmt::Display for Joined<'_, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text: Vec<String> = self.0.iter().map(Range::to_string).collect();
        f.write_str(&text.join(","))
    }
}

/// What an outlet does with a flow, by the order in which its keys decide.
#[test]
fn what_is_taken() {
    let config = good(
        "[tproxy a]\nport = 1\nipv6 = drop\nquic = reject\ntcp-ports = 80\nbypass = 10.0.0.0/8\n\
         only = 0.0.0.0/1\n[tproxy b]\nport = 2\nudp = no\nquic = drop\nudp-ports = 53\n",
    );
    let take = |index: usize, l4, to: &str| {
        let to: SocketAddr = to.parse().unwrap();
        config.tproxies[index].outlet.take(l4, Family::of(&to.ip()), Some(to))
    };
    for (index, l4, to, want) in [
        (0, L4::Tcp, "1.1.1.1:80", Take::Yes),
        (0, L4::Tcp, "1.1.1.1:81", Take::No),
        (0, L4::Udp, "1.1.1.1:81", Take::Yes),
        (0, L4::Udp, "1.1.1.1:443", Take::Reject),
        (0, L4::Udp, "10.1.1.1:443", Take::No),
        (0, L4::Udp, "200.1.1.1:443", Take::No),
        (0, L4::Tcp, "[2001:db8::1]:80", Take::Drop),
        (1, L4::Udp, "1.1.1.1:443", Take::Drop),
        (1, L4::Udp, "1.1.1.1:53", Take::No),
        (1, L4::Tcp, "[2001:db8::1]:443", Take::Yes),
    ] {
        assert_eq!(take(index, l4, to), want, "{index} {to}");
    }
}

/// The literal blocks of a manual page, as they are shown.
fn blocks(page: &str) -> Vec<String> {
    let blocks = page.split("\n.Bd -literal").skip(1);
    let blocks = blocks.map(|block| block.split_once('\n').expect("a block").1);
    let text = blocks.map(|block| block.split_once("\n.Ed\n").expect("its end").0);
    text.map(|text| text.replace("\\e", "\\") + "\n").collect()
}

/// What of a text is a configuration: a block that begins with a section or a comment before it.
fn is_configuration(block: &str) -> bool {
    let mut lines = block.lines().filter(|line| !line.starts_with('#'));
    let header = lines.next().and_then(|line| line.strip_prefix('['));
    let kind = header.and_then(|header| header.split([' ', ']']).next());
    kind.is_some_and(|kind| Kind::ALL.iter().any(|k| k.name() == kind))
}

/// Every configuration of the manual and the README is one, with rules that can match something.
#[test]
fn configurations_of_the_manual() {
    let pages = ["conf/man/cgtproxy-recipes.7", "conf/man/cgtproxy.conf.5"].map(|p| shipped(p).1);
    let readme = shipped("README.md").1;
    let mut all: Vec<String> = pages.iter().flat_map(|page| blocks(page)).collect();
    // what is indented in README, with the blank lines between
    let mut block = String::new();
    for line in readme.lines().chain(["."]) {
        match line.strip_prefix("    ") {
            Some(text) => block += &format!("{text}\n"),
            None if line.is_empty() => block.push('\n'),
            None => all.extend(Some(std::mem::take(&mut block)).filter(|b| b.contains("\n["))),
        }
    }
    let all = all.into_iter().map(|block| block.trim_start_matches('\n').to_string());
    let (configurations, others): (Vec<String>, Vec<String>) =
        all.partition(|block| is_configuration(block));
    for text in &configurations {
        let config = good(text);
        assert_eq!(lint::idle_rules(&config).into_iter().flatten().next(), None, "{text}");
    }
    assert!(configurations.len() >= 9, "{}", configurations.len());
    let known =
        ["# ", "services:", "[Container]", "[Service]", "config rule", "drop   = user:guest"];
    let unknown = others.iter().find(|block| !known.iter().any(|known| block.starts_with(known)));
    assert_eq!(unknown, None, "is that a configuration?");
}

/// The recipes name every example, and none that is not there.
#[test]
fn recipes_name_the_examples() {
    let (_, page) = shipped("conf/man/cgtproxy-recipes.7");
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/examples");
    let files = fs::read_dir(dir).expect("the examples");
    let files = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let named = page.split("Pa ").skip(1).filter_map(|rest| rest.split([' ', '\n']).next());
    let named = named.filter(|name| name.ends_with(".conf") && !name.contains('/'));
    let named = named.filter(|name| *name != "cgtproxy.conf");
    let named: BTreeSet<String> = named.map(str::to_string).collect();
    assert_eq!(named, files.collect::<BTreeSet<String>>());
}

/// What findings of `check` are about has its place in cgtproxy(8), and in the code.
#[test]
fn findings_are_documented() {
    use cgtproxy::commands::check::ABOUT;
    let (_, page) = shipped("conf/man/cgtproxy.8");
    let part = page.split(".Ss check --json\n").nth(1).expect("a part on it");
    let part = part.split("\n.It Cm severity").next().expect("its end");
    let named = part.lines().filter_map(|line| line.strip_prefix(".Ql "));
    let named: Vec<&str> = named.map(|name| name.trim_end_matches(" ,")).collect();
    assert_eq!(named, ABOUT);
    let code = ["src/commands/check.rs", "src/faults.rs"].map(|path| shipped(path).1).concat();
    for about in ABOUT {
        assert!(code.matches(&format!("\"{about}\"")).count() >= 2, "nothing is about {about}");
    }
}
