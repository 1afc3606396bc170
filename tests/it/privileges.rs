//! What the daemon gives up, seen from outside, and that it works with what it keeps.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::client::{expect, under};
use crate::daemon::Daemon;
use crate::ground::{chmod, Ground};
use crate::kernel::{await_member, cgroup_id, set_ids, SETTLE};
use crate::wait_until;
use crate::world::{World, PROXY};

const CONFIG: &str = "
[tproxy mihomo]
port = 7893
[rules]
drop   = /drop
mihomo = /proxied
mihomo = /private/.*
drop   = /private
";

const NET_ADMIN: &str = "0000000000001000";
const NOTHING: &str = "0000000000000000";

/// The parts of /proc/PID/status that tell what a process may do.
fn assert_confined(daemon: &Daemon, capabilities: &str, seccomp: &str) {
    for (key, want) in [
        ("CapPrm", capabilities),
        ("CapEff", capabilities),
        ("CapBnd", NOTHING),
        ("CapAmb", NOTHING),
        ("CapInh", NOTHING),
        ("NoNewPrivs", "1"),
        ("Seccomp", seccomp),
        ("Umask", "0077"),
    ] {
        assert_eq!(daemon.process(key), want, "{key}");
    }
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.pid()));
    let limits = limits.expect("read the limits");
    let core = limits.lines().find(|l| l.starts_with("Max core file size"));
    let core = core.expect("a limit of core files").split_whitespace();
    assert_eq!(core.skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
}

/// Of all that root may do, it keeps what it needs, and works with that, with and without the filter.
#[test]
fn root_keeps_net_admin_alone() {
    let ground = ground!("root");
    for (args, seccomp) in [(&[][..], "2"), (&["--no-seccomp"][..], "0")] {
        let daemon = Daemon::start(&ground, CONFIG, args);
        assert_confined(&daemon, NET_ADMIN, seccomp);
        await_member(&ground.cgroup(&format!("/private/{seccomp}")), "mihomo");
        daemon.reload();
        daemon.stop_clean();
    }
}

/// No file of /proc tells the securebits, so the call is looked at.
#[test]
fn securebits_are_locked() {
    let ground = ground!("securebits");
    let trace = ground.dir.join("trace");
    let by = ["strace", "-D", "-qq", "-e", "trace=prctl", "-o"];
    let by = [&by[..], &[trace.to_str().expect("UTF-8")]].concat();
    let mut daemon = Daemon::spawn_by(&ground, CONFIG, &by, &[], &[]);
    assert!(daemon.ready(), "{}", daemon.logs());
    assert!(daemon.stop().success());
    let read = || std::fs::read_to_string(&trace).unwrap_or_default();
    let traced = || read().contains("PR_SET_SECUREBITS");
    assert!(wait_until(SETTLE, traced), "{}", read());
    let trace = read();
    let call = trace.lines().find(|l| l.contains("PR_SET_SECUREBITS"));
    let call = call.expect("the call");
    let bits = ["NOROOT", "NO_SETUID_FIXUP", "NO_CAP_AMBIENT_RAISE"];
    for bit in bits.map(|b| format!("SECBIT_{b}|SECBIT_{b}_LOCKED")) {
        assert!(call.contains(&bit), "{bit}: {call}");
    }
    assert!(call.contains("SECBIT_KEEP_CAPS_LOCKED"), "{call}");
    assert!(!call.contains("SECBIT_KEEP_CAPS|"), "{call}");
    assert!(call.ends_with("= 0"), "{call}");
}

/// Runs the program as user nobody with these ambient capabilities alone.
fn as_nobody(ground: &Ground, capabilities: &str) -> Daemon {
    chmod(&ground.dir, 0o755);
    let inherited = format!("--inh-caps=-all,{capabilities}");
    let ambient = format!("--ambient-caps=-all,{capabilities}");
    // everybody may read this copy of the configuration: PROGRAM -c FILE …
    let script = format!(
        "program=$1; file=$3.nobody; install -m 644 \"$3\" \"$file\"; shift 3; \
         exec setpriv --reuid=65534 --regid=65534 --clear-groups {inherited} {ambient} \
         \"$program\" -c \"$file\" \"$@\""
    );
    Daemon::spawn_by(ground, CONFIG, &["sh", "-c", &script, "sh"], &[], &[])
}

/// CAP_NET_ADMIN alone will do for any user; without it nothing does, and with one more all cgroups are
/// seen.
#[test]
fn another_user_with_net_admin() {
    let (ground, _world, _proxy) = scene!("nobody", proxy);
    let (dropped, proxied) = (ground.cgroup("/drop"), ground.cgroup("/proxied"));
    // as procd makes them
    let inside = ground.cgroup("/private/inside");
    chmod(&ground.at("/private"), 0o700);
    let id = cgroup_id(&inside).expect("an id");
    let is_member = || set_ids("cg_mihomo").is_some_and(|ids| ids.contains(&id));

    let mut daemon = as_nobody(&ground, "+net_admin");
    assert!(daemon.ready(), "{}", daemon.logs());
    assert!(daemon.process("Uid").starts_with("65534\t65534"));
    let status = ["CapPrm", "CapEff", "CapAmb", "CapInh"].map(|key| daemon.process(key));
    assert_eq!(status, [NET_ADMIN, NET_ADMIN, NOTHING, NOTHING]);
    assert_eq!(daemon.process("NoNewPrivs"), "1");
    assert_eq!(daemon.process("Seccomp"), "2");
    expect(&[(&dropped, under("drop")), (&proxied, under(PROXY))]);
    let log = daemon.logs();
    assert!(log.contains("grant CAP_DAC_READ_SEARCH"), "{log}");
    assert!(!is_member());
    // what can be seen from above is classified all the same
    await_member(&ground.at("/private"), "drop");
    daemon.stop_clean();

    let mut daemon = as_nobody(&ground, "+net_admin,+dac_read_search");
    assert!(daemon.ready(), "{}", daemon.logs());
    assert_eq!(daemon.process("CapEff"), "0000000000001004");
    assert!(is_member(), "{}", daemon.logs());
    daemon.stop_clean();

    let mut daemon = as_nobody(&ground, "+dac_read_search");
    assert!(!daemon.ready());
    assert_eq!(daemon.wait().code(), Some(1));
    let log = daemon.logs();
    assert!(log.contains("without CAP_NET_ADMIN"), "{log}");
}

/// The filter holds: execve(2), which no daemon of ours needs, kills.
#[test]
fn a_forbidden_system_call_kills() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: a_forbidden_system_call_kills: needs root to give privileges up");
        return;
    }
    for (filter, signal) in [(true, Some(Signal::SIGSYS as i32)), (false, None)] {
        let mut command = Command::new("true");
        let hook = move || {
            cgtproxy::confine::confine(filter).map_err(|_| std::io::Error::from_raw_os_error(1))
        };
        // SAFETY: between fork and exec the hook makes system calls, and allocates next to nothing.
        unsafe { command.pre_exec(hook) };
        let status = command.status().expect("start a program");
        assert_eq!(status.signal(), signal, "{status}");
    }
}
