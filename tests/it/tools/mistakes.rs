//! How the program answers to mistakes: wrong words, no capability, an output that takes nothing.

use std::fs::File;
use std::process::Stdio;

use super::{as_nobody, CONFIG};
use crate::daemon::{run, Daemon, Said};
use crate::ground::Ground;

/// Wrong words get one line on standard error, with a hint where to look, and status 2.
#[test]
fn wrong_arguments_get_one_line_and_a_hint() {
    let _ground = ground!("usage");
    for args in [
        "--bad",
        "-X",
        "-c",
        "--ready-fd x run",
        "frobnicate",
        "run x",
        "check x",
        "show x",
        "flush x",
        "status x",
        "status --json --watch",
        "status --prometheus --json",
        "status --yaml",
        "apps x",
        "apps --json --suggest",
        "explain",
        "explain --pid",
        "explain x",
        "explain --pid x",
        "explain /a/../b",
        "exec",
        "exec drop",
        "exec drop --",
        "exec -u",
        "exec --frob drop true",
        "run --json",
        "exec --json drop true",
    ] {
        let args: Vec<&str> = args.split(' ').collect();

        let said = run(&args);

        assert_eq!((said.code, &*said.out), (Some(2), ""), "{args:?}");
        assert_eq!(said.err.lines().count(), 1, "{args:?}: {}", said.err);
        let hint =
            said.err.starts_with("error: ") && said.err.ends_with(" (try cgtproxy --help)\n");
        assert!(hint, "{args:?}: {}", said.err);
    }
}

/// A command that is nearly one of ours is guessed, and the help names them all.
#[test]
fn a_misspelt_command_is_guessed() {
    let _ground = ground!("misspelt");
    for (word, meant) in
        [("staus", "status"), ("aps", "apps"), ("Check", "check"), ("exce", "exec")]
    {
        let want = format!(
            "error: unknown command \"{word}\", did you mean \"{meant}\"? (try cgtproxy --help)\n"
        );
        assert_eq!(run(&[word]).err, want);
    }

    let help = run(&["status", "--help"]).fine();
    for name in ["run", "check", "explain", "show", "status", "apps", "flush", "exec"] {
        assert!(help.contains(&format!("\n    {name} ")), "{help}");
    }
}

/// Who lacks the capability is told which, by what needs it; what needs none works.
#[test]
fn without_root_the_missing_capability_is_named() {
    let _ground = ground!("not-root");
    for (args, what) in [
        (&["run"][..], "run"),
        (&["flush"], "flush"),
        (&["status"], "look into the kernel"),
        (&["status", "--watch"], "look into the kernel"),
        (&["exec", "direct", "true"], "exec"),
    ] {
        let said = as_nobody(args);

        let want = format!(
            "error: unable to {what} without CAP_NET_ADMIN: run as root or grant that capability\n"
        );
        assert_eq!((said.code, said.out, said.err), (Some(1), String::new(), want), "{args:?}");
    }
    for args in [&["show"][..], &["explain", "/a"], &["check"]] {
        assert_eq!(as_nobody(args).code, Some(0), "{args:?}");
    }
}

/// A reader that has gone is no error, a full disk is.
#[test]
fn a_closed_or_full_output() {
    let ground = ground!("output");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    for args in [
        &["show"][..],
        &["status"],
        &["status", "--json"],
        &["status", "--watch"],
        &["apps"],
        &["check"],
        &["check", "--json"],
        &["explain", "/a"],
        &["--help"],
        &["--version"],
    ] {
        let (read, write) = crate::ground::pipe();
        drop(read);
        let mut command = daemon.command(args);
        let closed = command.stdout(write).stderr(Stdio::piped()).output();
        let closed = Said::from(closed.expect("start cgtproxy"));
        assert_eq!((closed.code, &*closed.err), (Some(0), ""), "{args:?}");

        let full = File::options().write(true).open("/dev/full").expect("open /dev/full");
        let full = Said::from(daemon.command(args).stdout(full).output().expect("start cgtproxy"));
        let want = "error: unable to write to standard output: no space left on device\n";
        assert_eq!((full.code, &*full.err), (Some(1), want), "{args:?}");
    }
}
