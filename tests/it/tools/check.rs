//! `check`: what it says of the file and of the host.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use cgtproxy::kernel::Kernel;
use cgtproxy::nft::expr::Expr;
use cgtproxy::nft::message::Probe;
use cgtproxy::nft::table::Base;
use nix::errno::Errno;

use super::{as_nobody, check, query, CLEAN, CONFIG};
use crate::client::Client;
use crate::daemon::{binary, run_at, run_with, write_private, Daemon, Said};
use crate::ground::{addr, ip_batch, sysctl, Ground, REMOTE4};
use crate::json::is_documented;
use crate::kernel::residue;
use crate::world::{Server, PROXY};

/// Where all is well, each thing that was looked at is told as such, and no probe stays in the kernel.
#[test]
fn check_finds_nothing_wrong_where_nothing_is() {
    let ground = ground!("check-clean");
    let _proxy = Server::start(PROXY, &[7893]);

    let clean = check(&ground, CONFIG, CLEAN);

    for text in [
        "check.conf: tproxies: 1, rules: 3",
        "cgroup v2 alone",
        "1 cgroups, and fs.inotify.max_user_watches is ",
        "CAP_NET_ADMIN is in effect",
        "the kernel has nft socket cgroupv2, type route, ct mark, fib, tproxy, reject",
        "[tproxy mihomo]: TCP port 7893 is listened on",
        "[tproxy mihomo]: UDP port 7893 is listened on",
        "no ip rule or route of others uses mark bits 0xff000000, table 300 or priority 100",
    ] {
        clean.finds("ok", text);
    }
    clean.lacks("warning: ");
    clean.lacks("error: ");
    assert_eq!(residue(), "", "a probe is still there");
}

/// The same findings as in text, each with an id; the exit status is the same too.
#[test]
fn check_in_json() {
    let ground = ground!("check-json");
    let (right, wrong) = (CONFIG, "[rules]\nmihomo = /a\n");
    for (config, code, id, severities) in
        [(right, 0, "listener", "['warning', 'warning']"), (wrong, 2, "config", "['error']")]
    {
        let [text, json] =
            [&["check"][..], &["check", "--json"]].map(|args| run_with(&ground, config, args));

        assert_eq!((text.code, json.code), (Some(code), Some(code)), "{}", text.out);
        is_documented("check", &json.out);
        let mut shown: Vec<&str> = text.out.lines().collect();
        let counts = shown.pop().expect("a summary");
        shown.sort_unstable();
        // the files' names differ by a number
        let without = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
        let lines = "'\\n'.join(sorted(f['severity'] + ': ' + f['text'] for f in d['findings']))";
        assert_eq!(without(&query(&json.out, lines)), without(&shown.join("\n")));
        let errors = query(&json.out, "d['errors']");
        assert!(counts.starts_with(&format!("{errors} error")), "{counts}");
        for (id, want) in
            [(id, severities), ("cgroup-root", "['ok']"), ("kernel-feature", "['ok']")]
        {
            let found = format!("[f['severity'] for f in d['findings'] if f['id'] == '{id}']");
            assert_eq!(query(&json.out, &found), want, "{id}");
        }
    }
}

/// In the journal, each line has its priority, and only what is wrong is told.
#[test]
fn check_tells_the_journal_what_is_wrong() {
    let ground = ground!("check-journal");
    let warns = "[tproxy mihomo]\nport = 7893\nudp = no\n[rules]\nmihomo = /a\n";
    let wrong = format!("{warns}drp = /b\n");
    let journal = "exec > told; JOURNAL_STREAM=$(stat -L -c %d:%i /proc/$$/fd/1); \
                   export JOURNAL_STREAM";
    let told = |config: &str, code: i32| {
        let said = check(&ground, config, &format!("{CLEAN}; {journal}"));
        assert_eq!((said.code, &*said.out, &*said.err), (Some(code), "", ""));
        fs::read_to_string(ground.dir.join("told")).expect("read")
    };

    let errors = told(&wrong, 2);
    let warnings = told(warns, 0);
    let elsewhere = check(&ground, warns, &format!("{CLEAN}; export JOURNAL_STREAM=1:1"));

    let lines: Vec<&str> = errors.lines().collect();
    let begins = |at: usize, text: &str| lines.get(at).is_some_and(|line| line.starts_with(text));
    assert!(begins(0, "<3>error: ") && begins(1, "1 error, 0 warnings, "), "{errors}");
    let warning = "[tproxy mihomo]: nothing listens";
    assert!(warnings.starts_with(&format!("<4>warning: {warning}")), "{warnings}");
    assert!(!warnings.contains("ok: "), "{warnings}");
    elsewhere.finds("warning", warning);
}

/// Each rule is told with how many cgroups it decides for; one that can match nothing, with the reason.
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

/// Every mistake in the file is told with its line, and the host is looked at all the same.
#[test]
fn check_of_a_wrong_configuration() {
    let ground = ground!("check-config");
    let file = ground.dir.join("check.conf");

    let wrong = check(&ground, "[rules]\ndrp = /a\n[nonsense]\n", CLEAN);

    assert_eq!(wrong.code, Some(2));
    assert_eq!(wrong.out.matches("error: ").count(), 2, "{}", wrong.out);
    let undefined = format!("error: {}:4: undefined target \"drp\"", file.display());
    assert!(wrong.out.contains(&undefined), "{}", wrong.out);
    assert!(wrong.out.contains("ok: the kernel has nft socket cgroupv2"), "{}", wrong.out);
}

/// Very many mistakes are told as well, each once: a list of addresses that was taken for a configuration.
#[test]
fn check_of_very_many_mistakes() {
    let ground = ground!("check-many");

    // to hold each against all others would take minutes
    let said = check(&ground, &"10.0.0.1\n".repeat(100_000), &format!("{CLEAN}; ulimit -t 30"));

    assert_eq!(said.code, Some(2), "{}", said.err);
    assert_eq!(said.out.matches("error: ").count(), 100_000);
}

/// A file that others may write is as wrong as one with a mistake in it.
#[test]
fn check_of_a_configuration_that_others_may_write() {
    let ground = ground!("check-open");

    let open = check(&ground, CONFIG, &format!("{CLEAN}; chmod 666 check.conf"));

    assert_eq!(open.code, Some(2));
    let why = "is writable by group or others (mode 0666; chmod go-w); run refuses it";
    assert!(open.out.contains(why), "{}", open.out);
}

/// Wherever cgroup2 is mounted or not, and whatever is named as its root, there is a remedy.
#[test]
fn check_finds_the_cgroup_tree_or_says_what_to_do() {
    let ground = ground!("check-cgroups");
    let none = "umount -l /sys/fs/cgroup";
    let v1 = "umount -l /sys/fs/cgroup; mount -t cgroup -o none,name=cgtp-test none /sys/fs/cgroup";
    let hybrid =
        "umount -l /sys/fs/cgroup; mount -t tmpfs none /sys/fs/cgroup; cd /sys/fs/cgroup; \
                  mkdir v1 unified; mount -t cgroup -o none,name=cgtp-test none v1; \
                  mount -t cgroup2 none unified; cd /";
    let at = |root: &str, setup: &str| {
        check(&ground, &format!("[global]\ncgroup-root = {root}\n{CONFIG}"), setup)
    };
    at("auto", none).finds("error", "no cgroup2 file system is mounted (mount -t cgroup2 none");
    let alone = "only cgroup v1 is mounted; boot with cgroup v2 alone: systemd.unified";
    at("auto", v1).finds("error", alone);
    let both = "cgroup root /sys/fs/cgroup/unified, but cgroup v1 is mounted too";
    at("auto", hybrid).finds("warning", both);
    at("/tmp", "true").finds("error", "/tmp is not on a cgroup2 file system");
    let gone = "/sys/fs/cgroup/no/such";
    at(gone, "true").finds("error", &format!("unable to use cgroup-root {gone}"));
}

/// Watches must do for twice the cgroups that there are, and an inotify instance must be left.
#[test]
fn check_weighs_inotify_limits() {
    let ground = ground!("check-inotify");
    for i in 0..9 {
        ground.cgroup(&format!("/c{i}"));
    }
    for (limit, kind, more) in
        [(9, "warning", ": raise it"), (19, "warning", ": raise it"), (20, "ok", "")]
    {
        let over = "/proc/sys/fs/inotify/max_user_watches";
        let setup = format!("{CLEAN}; echo {limit} > limit; mount --bind limit {over}");
        let want = format!("10 cgroups, and fs.inotify.max_user_watches is {limit}{more}");
        check(&ground, CONFIG, &setup).finds(kind, &want);
    }
    // a user namespace has limits of its own
    let script = format!(
        "echo 0 > /proc/sys/user/max_inotify_instances; exec {} -c {} check",
        binary().display(),
        ground.dir.join("check.conf").display()
    );
    let none = Command::new("unshare").args(["-Ur", "sh", "-ec", &script]).output();
    let why = "unable to make an inotify instance: too many open files; raise the sysctl";
    Said::from(none.expect("start unshare")).finds("error", why);
}

/// net_cls of cgroup v1 is told where it ends cgroup v2: before Linux 5.15, and if it is in use.
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
    for (release, hierarchy) in [("5.10.0-8-amd64", 0), ("5.15.1", 3), ("6.1.0", 3)] {
        fake(release, hierarchy).lacks("error: ");
    }
}

/// What a kernel cannot do is told of that alone, and no probe stays.
#[test]
fn check_asks_the_kernel_what_it_can_do() {
    let _ground = ground!("check-features");
    let chain = |kind| Probe::Chain(Base { kind, hook: 3, priority: 0 });
    let counter = || Probe::Rule(vec![Expr::Counter]);
    let mut kernel = Kernel::open().expect("open netlink");

    // no kernel has the second
    let said = kernel.probe(&[counter(), chain("nonesuch"), counter(), chain("route")]);

    assert_eq!(said, Ok(vec![None, Some(Errno::ENOENT), None, None]));
    assert_eq!(residue(), "");
}

/// A kernel without nf_tables is told as such, with the package that has it.
#[test]
fn check_of_a_kernel_without_nf_tables() {
    let ground = ground!("check-no-nft");
    let file = ground.dir.join("check.conf");
    write_private(&file, &format!("[global]\ncgroup-root = {}\n{CONFIG}", ground.root.display()));
    let mut command = Command::new(binary());
    command.arg("-c").arg(&file).arg("check");
    // SAFETY: the hook makes system calls on memory that is its own.
    unsafe { command.pre_exec(refuse_netfilter_sockets) };

    let said = Said::from(command.output().expect("start cgtproxy"));

    let why =
        "unable to open a netlink socket: protocol not supported; the kernel needs nf_tables \
               (on OpenWrt: kmod-nft-core)";
    said.finds("error", why);
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

/// Without the capability, what cannot be looked at is named, and the rest is looked at.
#[test]
fn check_without_the_capability() {
    let _ground = ground!("check-nobody");

    let nobody = as_nobody(&["check"]);

    let why = "without CAP_NET_ADMIN, what nf_tables can do is not looked at: check as root";
    nobody.finds("warning", why);
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

/// A priority, mark bits or a table that others use already are named, with who does and what to set.
#[test]
fn check_finds_who_else_uses_our_numbers() {
    let ground = ground!("check-taken");
    let clean =
        "no ip rule or route of others uses mark bits 0xff000000, table 300 or priority 100";
    let (priority, bits) = ("rule-priority 100 is", "bits of fwmark-mask 0xff000000 are");
    let table = "route-table 300 is";
    for (ip, entry, what, who) in [
        ("-4 rule", "pref 100 from 198.51.100.1/32 lookup 254", priority, ""),
        ("-6 rule", "pref 9 fwmark 0x1000000/0x3000000 lookup 254", bits, ""),
        ("-4 rule", "pref 9 from 198.51.100.1/32 lookup 300", table, ""),
        (
            "-6 route",
            "2001:db8:9::/64 dev in0 table 300",
            table,
            "of protocol 3 and prefix length 64",
        ),
    ] {
        let (family, thing) = ip.split_once(' ').expect("two words");
        let command = if family == "-4" { "ip" } else { "ip -6" };
        let who = if who.is_empty() { entry } else { who };
        let key = what.split(' ').find(|word| word.contains('-')).expect("a key");
        check(&ground, CONFIG, CLEAN).finds("ok", clean);
        ip_batch(&[family], &format!("{thing} add {entry}\n"));
        let want = format!("{what} used by others ({command} {thing} {who}): set another {key}");
        check(&ground, CONFIG, CLEAN).finds("warning", &want);
        ip_batch(&[family], &format!("{thing} del {entry}\n"));
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
                let said = check(&ground, config, CLEAN);
                said.finds("ok", "table 300 or priority 100");
                said.lacks("rule-priority");
            }
            ip_batch(&[family], &format!("rule del {taken}"));
        }
    }
    // our own are no others
    let _daemon = Daemon::start(&ground, &prefix, &[]);
    check(&ground, &prefix, CLEAN).finds("ok", clean);
}

/// src_valid_mark is told as what it is: what this host sends itself comes to the proxy all the same.
#[test]
fn check_finds_settings_that_break_tproxy() {
    let ground = ground!("check-sysctl");
    sysctl("net/ipv4/conf/in0/src_valid_mark", "1");
    check(&ground, CONFIG, "true").finds("ok", "net.ipv4.conf.in0.src_valid_mark is 1");

    for interface in ["all", "lo", "in0"] {
        sysctl(&format!("net/ipv4/conf/{interface}/src_valid_mark"), "1");
        sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "1");
    }
    let cgroup = ground.cgroup("/services/aria2");
    let _daemon = Daemon::start(&ground, CONFIG, &[]);
    let _proxy = Server::start(PROXY, &[7893]);
    let to = addr(REMOTE4, 80);
    for client in [Client::tcp(&cgroup, to), Client::udp(&cgroup, to)] {
        assert_eq!(client.run().who(), format!("{PROXY} {to}"));
    }
}

/// A ruleset that is loaded at boot, and has our table in it, is named.
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
        saved(file, "table inet filter {\n}\n# table inet cgtproxy\n").lacks(file);
    }
}
