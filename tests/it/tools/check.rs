//! `check`: what it says of the file and of the host.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use super::{as_nobody, check, query, CLEAN, CONFIG};
use crate::client::Client;
use crate::daemon::{binary, run_at, run_with, write_private, Daemon, Said};
use crate::ground::{addr, ip_batch, sysctl, Ground, REMOTE4};
use crate::kernel::residue;
use crate::world::Server;

#[test]
fn check_finds_nothing_wrong_where_nothing_is() {
    let ground = ground!("check-clean");
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let clean = check(&ground, CONFIG, CLEAN);
    for (kind, text) in [
        ("ok", "check.conf: tproxies: 1, rules: 3"),
        ("ok", "cgroup v2 alone"),
        ("ok", "1 cgroups, and fs.inotify.max_user_watches is "),
        ("ok", "CAP_NET_ADMIN is in effect"),
        ("ok", "the kernel has nft socket cgroupv2, type route, ct mark, fib, tproxy, reject"),
        ("ok", "[tproxy mihomo]: TCP port 7893 is listened on"),
        ("ok", "[tproxy mihomo]: UDP port 7893 is listened on"),
        (
            "ok",
            "no ip rule or route of others uses mark bits 0xff000000, table 300 or priority 100",
        ),
    ] {
        clean.finds(kind, text);
    }
    clean.lacks("warning: ");
    clean.lacks("error: ");
    assert_eq!(residue(), "", "a probe is still there");
}

/// In the journal, each line has its priority, and only what is wrong is told.
/// The same findings as in text, each with an id; the exit status is the same too.
#[test]
fn check_in_json() {
    let ground = ground!("check-json");
    for (config, want) in [(CONFIG, Some(0)), ("[rules]\nmihomo = /a\n", Some(2))] {
        let [text, json] =
            [&["check"][..], &["check", "--json"]].map(|args| run_with(&ground, config, args));
        assert_eq!((text.code, json.code), (want, want), "{}", text.out);
        crate::json::is_documented("check", &json.out);
        let lines = query(
            &json.out,
            "'\\n'.join(sorted(f['severity'] + ': ' + f['text'] for f in d['findings']))",
        );
        let mut shown: Vec<&str> = text.out.lines().collect();
        let counts = shown.pop().expect("a summary");
        shown.sort_unstable();
        // the files' names differ by a number
        let without = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
        assert_eq!(without(&lines), without(&shown.join("\n")));
        let errors = query(&json.out, "d['errors']");
        assert!(counts.starts_with(&format!("{errors} error")), "{counts}");
        let about = |id: &str| {
            query(
                &json.out,
                &format!("[f['severity'] for f in d['findings'] if f['id'] == '{id}']"),
            )
        };
        match want {
            Some(0) => assert_eq!(about("listener"), "['warning', 'warning']"),
            _ => assert_eq!(about("config"), "['error']"),
        }
        assert_eq!(about("cgroup-root"), "['ok']");
        assert_eq!(about("kernel-feature"), "['ok']");
    }
}

#[test]
fn check_tells_the_journal_what_is_wrong() {
    let ground = ground!("check-journal");
    let journal = "exec > told; JOURNAL_STREAM=$(stat -L -c %d:%i /proc/$$/fd/1); \
                   export JOURNAL_STREAM";
    let wrong = "[tproxy mihomo]\nport = 7893\nudp = no\n[rules]\nmihomo = /a\ndrp = /b\n";
    let said = check(&ground, wrong, &format!("{CLEAN}; {journal}"));
    assert_eq!((said.code, &*said.out, &*said.err), (Some(2), "", ""));
    let told = || fs::read_to_string(ground.dir.join("told")).expect("read");
    let text = told();
    let lines: Vec<&str> = text.lines().collect();
    let begins = |at: usize, text: &str| lines.get(at).is_some_and(|line| line.starts_with(text));
    assert!(begins(0, "<3>error: ") && begins(1, "1 error, 0 warnings, "), "{text}");
    let warns = "[tproxy mihomo]\nport = 7893\nudp = no\n[rules]\nmihomo = /a\n";
    check(&ground, warns, &format!("{CLEAN}; {journal}"));
    assert!(told().starts_with("<4>warning: [tproxy mihomo]: nothing listens"), "{}", told());
    assert!(!told().contains("ok: "), "{}", told());
    // something else is written to than the journal
    let other = check(&ground, warns, &format!("{CLEAN}; export JOURNAL_STREAM=1:1"));
    other.finds("warning", "[tproxy mihomo]: nothing listens");
}

#[test]
fn check_tells_what_each_rule_decides() {
    let ground = ground!("check-rules");
    for path in ["/services/mihomo/one", "/services/aria2", "/apps/a"] {
        ground.cgroup(path);
    }
    let config = "[tproxy mihomo]\nport = 7893\n[rules]\ndirect = /services/mihomo\n\
        mihomo = /services/.*\ndrop = /services/aria2\ndrop = /apps/none\ndrop = apps/a\n\
        drop = /apps/a/\ndrop = /sys/fs/cgroup/apps/a\ndrop = 0::/apps/a\n\
        drop = /apps/a\\x2db\ndrop = /apps/a # not now\n";
    let said = check(&ground, config, CLEAN);
    said.finds("ok", ":6: direct = /services/mihomo: decides for 2 cgroups");
    said.finds("ok", ":7: mihomo = /services/.*: decides for 1 cgroups");
    said.finds("ok", ":9: drop = /apps/none: decides for 0 cgroups");
    let nothing = "can match nothing: ";
    let covers = format!(":8: drop = /services/aria2: {nothing}");
    said.finds("warning", &covers);
    said.finds("warning", ":7 covers all of it before: mihomo = /services/.*");
    for (line, why) in [
        (10, "every path begins with \"/\""),
        (11, "no path ends with \"/\""),
        (12, "paths count from the cgroup root: leave out \"/sys/fs/cgroup\""),
        (13, "leave out the \"0::\" of /proc/PID/cgroup"),
        (14, "write \\\\x2d"),
        (15, "\"# not now\" is part of it: a comment needs a line of its own"),
    ] {
        let found =
            |l: &&str| l.starts_with("warning: ") && l.contains(&format!(":{line}: drop = "));
        let line = said.out.lines().find(found).unwrap_or_else(|| panic!("{line}: {}", said.out));
        assert!(line.contains(nothing) && line.contains(why), "{line}");
    }
}

/// Whoever brings the file of another program is told so once, not once a line.
#[test]
fn check_of_a_file_in_another_language() {
    let ground = ground!("check-yaml");
    let yaml = "version: 1\ncgroup-root: AUTO\ntproxies:\n  mihomo:\n    port: 7893\nrules:\n  \
                - match: \"/a=b\"\n    tproxy: mihomo\n";
    let json = "{\n  \"port\": 12345,\n  \"cgroup_proxy\": [\"/\"]\n}\n";
    for (text, want) in [(yaml, ":1: this is YAML, "), (json, ":1: this is JSON, ")] {
        let file = ground.dir.join("other.conf");
        write_private(&file, text);
        let said = run_at(&file, &["check"]);
        assert_eq!(said.code, Some(2), "{}", said.out);
        let errors: Vec<&str> = said.out.lines().filter(|l| l.starts_with("error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains(want), "{}", said.out);
        assert!(errors[0].contains("COMING FROM ELSEWHERE in cgtproxy-recipes(7)"), "{}", said.out);
    }
    let page = fs::read_to_string("conf/man/cgtproxy-recipes.7").expect("read the manual page");
    assert!(page.contains("\n.Sh COMING FROM ELSEWHERE\n"));
}

#[test]
fn check_of_a_wrong_configuration() {
    let ground = ground!("check-config");
    let wrong = check(&ground, "[rules]\ndrp = /a\n[nonsense]\n", CLEAN);
    assert_eq!(wrong.code, Some(2));
    assert_eq!(wrong.out.matches("error: ").count(), 2, "{}", wrong.out);
    let file = ground.dir.join("check.conf");
    assert!(
        wrong.out.contains(&format!("error: {}:4: undefined target \"drp\"", file.display())),
        "{}",
        wrong.out
    );
    // the host is looked at all the same
    assert!(wrong.out.contains("ok: the kernel has nft socket cgroupv2"), "{}", wrong.out);
    let open = check(&ground, CONFIG, &format!("{CLEAN}; chmod 666 check.conf"));
    assert_eq!(open.code, Some(2));
    assert!(
        open.out.contains("is writable by group or others (mode 0666; chmod go-w); run refuses it"),
        "{}",
        open.out
    );
}

#[test]
fn check_finds_the_cgroup_tree_or_says_what_to_do() {
    let ground = ground!("check-cgroups");
    let auto = format!("[global]\ncgroup-root = auto\n{CONFIG}");
    let none = "umount -l /sys/fs/cgroup";
    let v1 = "umount -l /sys/fs/cgroup; mount -t cgroup -o none,name=cgtp-test none /sys/fs/cgroup";
    let hybrid =
        "umount -l /sys/fs/cgroup; mount -t tmpfs none /sys/fs/cgroup; cd /sys/fs/cgroup; \
                  mkdir v1 unified; mount -t cgroup -o none,name=cgtp-test none v1; \
                  mount -t cgroup2 none unified; cd /";
    let in_v2 = |setup: &str| check(&ground, &auto, setup);
    in_v2(none).finds("error", "no cgroup2 file system is mounted (mount -t cgroup2 none");
    in_v2(v1)
        .finds("error", "only cgroup v1 is mounted; boot with cgroup v2 alone: systemd.unified");
    in_v2(hybrid)
        .finds("warning", "cgroup root /sys/fs/cgroup/unified, but cgroup v1 is mounted too");
    let elsewhere = "[global]\ncgroup-root = /tmp\n";
    check(&ground, elsewhere, "true").finds("error", "/tmp is not on a cgroup2 file system");
    let gone = "[global]\ncgroup-root = /sys/fs/cgroup/no/such\n";
    check(&ground, gone, "true").finds("error", "unable to use cgroup-root /sys/fs/cgroup/no/such");
}

#[test]
fn check_weighs_inotify_limits() {
    let ground = ground!("check-inotify");
    for i in 0..9 {
        ground.cgroup(&format!("/c{i}"));
    }
    let limit = |n: u32| {
        let over = "/proc/sys/fs/inotify/max_user_watches";
        check(&ground, CONFIG, &format!("{CLEAN}; echo {n} > limit; mount --bind limit {over}"))
    };
    limit(9).finds("warning", "10 cgroups, and fs.inotify.max_user_watches is 9: raise it");
    limit(19).finds("warning", "10 cgroups, and fs.inotify.max_user_watches is 19: raise it");
    limit(20).finds("ok", "10 cgroups, and fs.inotify.max_user_watches is 20");
    // a user namespace has limits of its own
    let script = format!(
        "echo 0 > /proc/sys/user/max_inotify_instances; exec {} -c {} check",
        binary().display(),
        ground.dir.join("check.conf").display()
    );
    let none = Command::new("unshare").args(["-Ur", "sh", "-ec", &script]).output();
    let none = Said::from(none.expect("start unshare"));
    none.finds(
        "error",
        "unable to make an inotify instance: too many open files; raise the sysctl",
    );
}

#[test]
fn check_knows_old_kernels_with_net_cls() {
    let ground = ground!("check-net-cls");
    let fake = |release: &str, hierarchy: u32| {
        let setup = format!(
            "{CLEAN}; echo {release} > release; mount --bind release /proc/sys/kernel/osrelease
             printf '#subsys_name\\thierarchy\\tnum_cgroups\\tenabled\\ncpu\\t0\\t9\\t1\\nnet_cls\\t{hierarchy}\\t1\\t1\\n' > v1
             mount --bind v1 /proc/cgroups"
        );
        check(&ground, CONFIG, &setup)
    };
    let why = "net_cls of cgroup v1 in use: before Linux 5.15 (this is 5.10) that ends cgroup v2";
    fake("5.10.0-8-amd64", 3).finds("error", why);
    fake("5.10.0-8-amd64", 0).lacks("error: ");
    fake("5.15.1", 3).lacks("error: ");
    fake("6.1.0", 3).lacks("error: ");
}

#[test]
fn check_asks_the_kernel_what_it_can_do() {
    let ground = ground!("check-features");
    use cgtproxy::nft::expr::Expr;
    use cgtproxy::nft::message::Probe;
    use cgtproxy::nft::table::Base;
    // what no kernel has: the answer is about that alone
    let chain = |kind| Probe::Chain(Base { kind, hook: 3, priority: 0 });
    let counter = || Probe::Rule(vec![Expr::Counter]);
    let mut kernel = cgtproxy::kernel::Kernel::open().expect("open netlink");
    let said = kernel.probe(&[counter(), chain("nonesuch"), counter(), chain("route")]);
    let missing = Some(nix::errno::Errno::ENOENT);
    assert_eq!(said, Ok(vec![None, missing, None, None]));
    assert_eq!(residue(), "");

    // a kernel without nf_tables, by a filter that refuses its socket
    check(&ground, CONFIG, "true");
    let mut command = Command::new(binary());
    command.arg("-c").arg(ground.dir.join("check.conf")).arg("check");
    // SAFETY: the hook makes system calls on memory that is its own.
    unsafe { command.pre_exec(refuse_netfilter_sockets) };
    let said = Said::from(command.output().expect("start cgtproxy"));
    said.finds("error", "unable to open a netlink socket: protocol not supported; the kernel needs nf_tables (on OpenWrt: kmod-nft-core)");
}

/// Makes socket(AF_NETLINK, _, NETLINK_NETFILTER) fail as on a kernel that does not have it.
fn refuse_netfilter_sockets() -> std::io::Result<()> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // offsets in struct seccomp_data: nr 0, args[0] 16, args[2] 32 (low halves, little-endian)
    let filter = [
        op(LOAD, 0, 0, 0),
        op(EQUAL, 0, 5, libc::SYS_socket as u32),
        op(LOAD, 0, 0, 16),
        op(EQUAL, 0, 3, libc::AF_NETLINK as u32),
        op(LOAD, 0, 0, 32),
        op(EQUAL, 0, 1, libc::NETLINK_NETFILTER as u32),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPROTONOSUPPORT as u32),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program and its length are valid for the call.
    let rc = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
    };
    match rc {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[test]
fn check_without_the_capability() {
    let ground = ground!("check-nobody");
    check(&ground, CONFIG, "true");
    let nobody = as_nobody(&["check"]);
    nobody.finds(
        "warning",
        "without CAP_NET_ADMIN, what nf_tables can do is not looked at: check as root",
    );
}

/// Nothing has to be done about the configuration as it is shipped.
#[test]
fn check_of_what_is_shipped_warns_of_nothing() {
    let ground = ground!("check-shipped");
    let shipped = fs::read_to_string("conf/cgtproxy.conf").expect("read");
    let shipped = shipped
        .replace("[global]\n", &format!("[global]\ncgroup-root = {}\n", ground.root.display()));
    for setup in [CLEAN, "mkdir -p empty; mount --bind empty /etc"] {
        let said = check(&ground, &shipped, setup);
        said.finds("ok", "[tproxy mihomo]: no rule and no gateway names it");
        said.lacks("warning: ");
        said.lacks("error: ");
    }
}

#[test]
fn check_finds_who_else_uses_our_numbers() {
    let ground = ground!("check-taken");
    for (family, add, del, want) in [
        ("-4", "rule add pref 100 from 198.51.100.1 lookup main", "rule del pref 100", "rule-priority 100 is used by others (ip rule pref 100 from 198.51.100.1/32 lookup 254): set another rule-priority"),
        ("-6", "rule add pref 9 fwmark 0x1000000/0x3000000 lookup main", "rule del pref 9", "bits of fwmark-mask 0xff000000 are used by others (ip -6 rule pref 9 fwmark 0x1000000/0x3000000 lookup 254): set another fwmark-mask"),
        ("-4", "rule add pref 9 from 198.51.100.1 lookup 300", "rule del pref 9", "route-table 300 is used by others (ip rule pref 9 from 198.51.100.1/32 lookup 300): set another route-table"),
        ("-6", "route add 2001:db8:9::/64 dev in0 table 300", "route flush table 300", "route-table 300 is used by others (ip -6 route of protocol 3 and prefix length 64): set another route-table"),
    ] {
        let clean = "no ip rule or route of others uses mark bits 0xff000000, table 300 or priority 100";
        check(&ground, CONFIG, CLEAN).finds("ok", clean);
        ip_batch(&[family], &format!("{add}\n"));
        check(&ground, CONFIG, CLEAN).finds("warning", want);
        ip_batch(&[family], &format!("{del}\n"));
    }
    // our own are no others
    let _daemon = Daemon::start(&ground, CONFIG, &[]);
    check(&ground, CONFIG, CLEAN).finds("ok", "no ip rule or route of others");
}

/// The priorities that are looked at are those that the configuration takes, and no others.
#[test]
fn check_finds_who_uses_the_priorities_behind_the_first() {
    let ground = ground!("check-behind");
    let gateway =
        |interface| format!("{CONFIG}[gateway lan]\ninterface = {interface}\ntarget = mihomo\n");
    let (named, prefix) = (gateway("br-lan"), gateway("br-*"));
    let clean = "table 300 or priority 100 to 102";
    check(&ground, &prefix, CLEAN).finds("ok", clean);
    for n in [1, 2] {
        for family in ["-4", "-6"] {
            let taken = format!("pref 10{n} from all lookup main\n");
            ip_batch(&[family], &format!("rule add {taken}"));
            let said = check(&ground, &prefix, CLEAN);
            said.finds("warning", "rule-priority 100 to 102 is used by others");
            let remedy = format!("rule pref 10{n} lookup 254): set another rule-priority");
            said.finds("warning", &remedy);
            for config in [CONFIG, &named] {
                check(&ground, config, CLEAN).finds("ok", "table 300 or priority 100");
                assert!(!check(&ground, config, CLEAN).out.contains("rule-priority"));
            }
            ip_batch(&[family], &format!("rule del {taken}"));
        }
    }
    // our own are no others
    let _daemon = Daemon::start(&ground, &prefix, &[]);
    check(&ground, &prefix, CLEAN).finds("ok", clean);
}

#[test]
fn check_finds_settings_that_break_tproxy() {
    let ground = ground!("check-sysctl");
    sysctl("net/ipv4/conf/in0/src_valid_mark", "1");
    check(&ground, CONFIG, "true").finds("ok", "net.ipv4.conf.in0.src_valid_mark is 1");
    // as it says, what this host sends itself is none the worse
    for interface in ["all", "lo", "in0"] {
        sysctl(&format!("net/ipv4/conf/{interface}/src_valid_mark"), "1");
        sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "1");
    }
    let cgroup = ground.cgroup("/services/aria2");
    let _daemon = Daemon::start(&ground, CONFIG, &[]);
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let to = addr(REMOTE4, 80);
    for client in [Client::tcp(&cgroup, to), Client::udp(&cgroup, to)] {
        assert_eq!(client.run().who(), format!("proxy mihomo {to}"));
    }
}

#[test]
fn check_finds_saved_rulesets_with_our_table() {
    let ground = ground!("check-saved");
    let saved = |file: &str, text: &str| {
        let setup = format!(
            "mkdir -p etc/{}; printf '%s' '{text}' > etc/{file}; mount --bind etc /etc",
            Path::new(file).parent().map_or(String::new(), |dir| dir.display().to_string())
        );
        let said = check(&ground, CONFIG, &setup);
        fs::remove_dir_all(ground.dir.join("etc")).expect("remove");
        said
    };
    let ours = "table inet filter {\n}\ntable inet cgtproxy {\n}\n";
    for file in
        ["nftables.conf", "nftables.nft", "nftables.d/10-all.nft", "sysconfig/nftables.conf"]
    {
        let want = format!("/etc/{file} holds table inet cgtproxy: it would not load at boot");
        saved(file, ours).finds("warning", &want);
        assert!(!saved(file, "table inet filter {\n}\n# table inet cgtproxy\n").out.contains(file));
    }
}
