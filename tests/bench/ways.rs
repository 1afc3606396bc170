//! Ways to handle packets, this program's and others', each in force until it is dropped.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use crate::daemon::Daemon;
use crate::ground::{ip_batch, Ground};
use crate::kernel::load;
use crate::reference;

pub const PROXY_PORT: u16 = 7893;

/// Targets two levels below the cgroup2 root, as services are, and one deeper, as on desktops: three
/// pairs of a level and a target.
pub const CONFIG: &str = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /direct\n\
    mihomo = /proxied\nmihomo = /desktop/b/c/d\ndrop = /drop\n";

/// The cgroups that [`CONFIG`] has elements for.
pub const DECIDED: [&str; 3] = ["/proxied", "/desktop/b/c/d", "/drop"];

/// Six levels of five targets each, in trees of their own: thirty pairs, and what [`CONFIG`] decides
/// is decided by some of them. With the cgroups that it takes.
pub fn thirty_pairs() -> (String, Vec<String>) {
    let mut config = String::from("[tproxy mihomo]\nport = 7893\n");
    let names = ["second", "third", "fourth"];
    for (port, name) in (7894..).zip(names) {
        config += &format!("[tproxy {name}]\nport = {port}\n");
    }
    config += "[rules]\ndirect = /direct\nmihomo = /proxied\ndrop = /drop\n";
    let mut paths = vec!["/proxied".to_string(), "/drop".to_string()];
    for target in ["mihomo", "drop"].into_iter().chain(names) {
        for level in 1..=6 {
            if level > 1 || names.contains(&target) {
                let path = format!("/tree{level}{target}{}", "/x".repeat(level - 1));
                config += &format!("{target} = {path}\n");
                paths.push(path);
            }
        }
    }
    (config, paths)
}

/// (b): conntrack and nothing else.
pub const CONNTRACK: &str = "table inet bench { chain output {
    type filter hook output priority mangle; policy accept;
    ct state invalid accept
}
}";

/// (d): every packet goes to the proxy and none is classified. Less than that no program can do for
/// a proxied one.
pub const BARE: &str = "table inet bench {
    chain output {
        type route hook output priority mangle; policy accept;
        oif lo accept
        ct mark set 0x01000000 meta mark set 0x01000000
    }
    chain prerouting {
        type filter hook prerouting priority mangle; policy accept;
        iif lo meta mark 0x01000000 meta l4proto { tcp, udp } tproxy to :7893 accept
    }
}";

/// The same for what is routed for others.
pub const FORWARD_BARE: &str = "table inet bench {
    chain prerouting {
        type filter hook prerouting priority mangle; policy accept;
        iifname lan0 meta l4proto { tcp, udp } ct mark set 0x01000000 meta mark set 0x01000000 \
            tproxy to :7893 accept
    }
}";

/// One rule that decides nothing for who is measured, and conntrack.
fn one_rule(rule: &str, set: &str) -> String {
    format!(
        "table inet bench {{
            {set}
            chain known {{
                type filter hook input priority mangle; policy accept;
                ct state invalid accept
            }}
            chain output {{
                type filter hook output priority mangle; policy accept;
                {rule}
            }}
        }}"
    )
}

/// The name of the ground's sub-tree, which is at level 1.
fn sub_tree(ground: &Ground) -> &str {
    ground.root.file_name().and_then(|name| name.to_str()).expect("a name")
}

/// With `/drop` in it.
fn set_of_one(ground: &Ground) -> String {
    format!("set one {{ type cgroupsv2; elements = {{ \"{}/drop\" }}; }}", sub_tree(ground))
}

/// What a cgroup costs that is dropped by hand.
pub fn one_set(ground: &Ground) -> String {
    one_rule("socket cgroupv2 level 2 @one drop", &set_of_one(ground))
}

/// And a user.
pub fn one_user() -> String {
    one_rule("meta skuid 65533 drop", "")
}

/// (b) with one rule more, which looks the cgroup up.
pub fn look_up(ground: &Ground) -> String {
    let rule = "ct state invalid accept\nsocket cgroupv2 level 2 @one drop\n";
    let set = format!("table inet bench {{ {}\n", set_of_one(ground));
    CONNTRACK.replace("ct state invalid accept", rule).replace("table inet bench {", &set)
}

/// What leaves by an interface, by rules that a person would write for that alone: with a mark, for
/// which an ip rule leads to that route table, and the source address that goes with the interface.
/// The cgroup is `/vpn`.
pub fn by_a_route_of_hand(ground: &Ground, interface: &str) -> String {
    format!(
        "table inet bench {{
            set vpn {{ type cgroupsv2; elements = {{ \"{}/vpn\" }}; }}
            chain output {{
                type route hook output priority mangle; policy accept;
                oif lo accept
                socket cgroupv2 level 2 @vpn ct direction original ct mark set 0x01000000 meta mark set 0x01000000
            }}
            chain nat {{
                type nat hook postrouting priority 99; policy accept;
                ct mark 0x01000000 oifname {interface} masquerade
            }}
        }}",
        sub_tree(ground)
    )
}

pub const TABLE_BY_HAND: u32 = 77;

/// (c): reply and bypass tests in front, then a verdict map for each level, deepest first.
pub fn six_levels(ground: &Ground) -> String {
    let sub_tree = sub_tree(ground);
    let mut text = String::from(
        "table inet bench {
        set bypass4 { type ipv4_addr; flags interval; elements = { 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255 }; }
        set bypass6 { type ipv6_addr; flags interval; elements = { fe80::/10, ff00::/8 }; }
        chain to_mihomo {
            meta l4proto { tcp, udp } ct mark set 0x01000000 meta mark set 0x01000000 accept
        }
        chain to_drop { drop; }
        ",
    );
    let elements = |of: &[(&str, &str)]| {
        let each = of.iter().map(|(path, verdict)| format!("\"{sub_tree}/{path}\" : {verdict}"));
        format!("elements = {{ {} }};", each.collect::<Vec<_>>().join(", "))
    };
    for level in 1..=6 {
        let elements = match level {
            2 => elements(&[
                ("proxied", "goto to_mihomo"),
                ("direct", "accept"),
                ("drop", "goto to_drop"),
            ]),
            5 => elements(&[("desktop/b/c/d", "goto to_mihomo")]),
            _ => String::new(),
        };
        text += &format!("map level{level} {{ type cgroupsv2 : verdict; {elements} }}\n");
    }
    text += "chain output {
        type route hook output priority mangle; policy accept;
        oif lo accept
        ct direction reply accept
        ip daddr @bypass4 accept
        ip6 daddr @bypass6 accept
        ";
    for level in (1..=6).rev() {
        text += &format!("socket cgroupv2 level {level} vmap @level{level}\n");
    }
    text += "}
        chain prerouting {
            type filter hook prerouting priority mangle; policy accept;
            iif lo meta mark 0x01000000 meta l4proto { tcp, udp } tproxy to :7893 accept
        }
    }";
    text
}

/// What cgproxy asks of iptables for one cgroup that is proxied and one that is not.
fn like_cgproxy(ground: &Ground) -> String {
    let sub_tree = sub_tree(ground);
    let mark = "--set-mark 0x01000000";
    let tproxy = "TPROXY --on-ip 127.0.0.1 --on-port 7893 --tproxy-mark 0x01000000";
    format!(
        "*mangle
:ENTER - [0:0]
:PRE - [0:0]
:MARKED - [0:0]
:OUT - [0:0]
-A ENTER -p tcp -m socket -j MARK {mark}
-A ENTER -p tcp -m socket -j ACCEPT
-A ENTER -p tcp -j {tproxy}
-A ENTER -p udp -j {tproxy}
-A PRE -m addrtype --dst-type LOCAL -j RETURN
-A PRE -m addrtype ! --dst-type UNICAST -j RETURN
-A PRE -m addrtype ! --src-type LOCAL -j RETURN
-A PRE -p udp -j ENTER
-A PRE -p tcp -j ENTER
-A PREROUTING -j PRE
-A MARKED -m addrtype ! --dst-type UNICAST -j RETURN
-A MARKED -p udp -j MARK {mark}
-A MARKED -p tcp -j MARK {mark}
-A OUT -p tcp -m conntrack --ctdir REPLY -j RETURN
-A OUT -p udp -m conntrack --ctdir REPLY -j RETURN
-A OUT -m cgroup --path /{sub_tree}/direct -j RETURN
-A OUT -m cgroup --path /{sub_tree}/proxied -j MARKED
-A OUTPUT -j OUT
COMMIT
"
    )
}

/// Which iptables; by the name of its command.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Xtables {
    Legacy,
    Nft,
}

impl Xtables {
    /// Loads rules; why not, where this host cannot.
    fn restore(self, rules: &str) -> Result<(), String> {
        let command = match self {
            Xtables::Legacy => "iptables-legacy-restore",
            Xtables::Nft => "iptables-nft-restore",
        };
        let mut child = Command::new(command)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("{command}: {e}"))?;
        // where it does not read them, its status tells
        let _ = child.stdin.take().expect("stdin is piped").write_all(rules.as_bytes());
        let out = child.wait_with_output().map_err(|e| format!("{command}: {e}"))?;
        match out.status.success() {
            true => Ok(()),
            false => Err(format!("{command}: {}", String::from_utf8_lossy(&out.stderr))),
        }
    }
}

/// Another build of this program to measure by turns, where BESIDE names one.
pub fn other_build() -> Option<String> {
    std::env::var("BESIDE").ok().filter(|path| !path.is_empty())
}

pub enum Table {
    Script,
    Xtables(Xtables),
    Ours(Option<Daemon>),
}

impl Table {
    pub fn script(text: &str) -> Table {
        load(text);
        route();
        Table::Script
    }

    pub fn like_cgproxy(which: Xtables, ground: &Ground) -> Result<Table, String> {
        which.restore(&like_cgproxy(ground))?;
        route();
        Ok(Table::Xtables(which))
    }

    pub fn ours(ground: &Ground, config: &str) -> Table {
        Table::Ours(Some(Daemon::start(ground, config, &[])))
    }

    /// The other build.
    pub fn of_build(path: &str, ground: &Ground, config: &str) -> Table {
        assert!(Path::new(path).exists(), "BESIDE is {path:?}, which is not there");
        // the program under test is the next argument
        let other = ["sh", "-c", "path=$1; shift 2; exec \"$path\" \"$@\"", "sh", path];
        let mut daemon = Daemon::spawn_by(ground, config, &other, &[], &[]);
        assert!(daemon.ready(), "{path} did not become ready:\n{}", daemon.logs());
        Table::Ours(Some(daemon))
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let done = match self {
            Table::Ours(daemon) => daemon.take().is_some_and(|daemon| daemon.stop().success()),
            Table::Script => unload(),
            // what legacy has registered stays registered
            Table::Xtables(which) => which.restore("*mangle\nCOMMIT\n").is_ok() && unload(),
        };
        assert!(thread::panicking() || done);
    }
}

/// The routing of the reference tables.
fn route() {
    for family in ["-4", "-6"] {
        ip_batch(&[family], reference::ROUTING);
    }
}

/// Removes the reference tables and their routing.
pub fn unload() -> bool {
    let flushed = crate::kernel::nft(&["flush", "ruleset"], "").status.success();
    for family in ["-4", "-6"] {
        ip_batch(&[family], &reference::ROUTING.replace(" add ", " del "));
    }
    flushed
}
