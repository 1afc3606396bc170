//! How the program answers to mistakes: wrong words, no capability, an output that takes nothing.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};

use super::{as_nobody, CONFIG};
use crate::daemon::{binary, run, run_with, write_private, Daemon, Said};
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

    // wherever it stands before the words of CMD
    for args in [&["exec", "--help", "direct", "true"], &["exec", "direct", "--help", "true"]] {
        assert!(run(args).fine().starts_with("Usage: "), "{args:?}");
    }
    let help = run(&["status", "--help"]).fine();
    for name in ["run", "check", "explain", "show", "status", "apps", "flush", "exec"] {
        assert!(help.contains(&format!("\n    {name} ")), "{help}");
    }
}

/// What an error names stands in its one line, and no terminal acts on it.
#[test]
fn errors_are_lines_that_can_be_printed() {
    let ground = ground!("printable");
    let odd = "/a\x1b[2J\nb";
    for (args, code) in [
        (&[odd][..], 2),
        (&["run", odd], 2),
        (&["show", "--x\x1b[2J\nb"], 2),
        (&["--ready-fd", odd, "run"], 2),
        (&["-c", odd, "show"], 2),
        (&["exec", odd, "true"], 2),
        (&["exec", "-u", odd, "direct", "true"], 2),
        (&["exec", "direct", odd], 127),
        (&["-p", "/", "run"], 1),
    ] {
        let args: Vec<&str> = [args].concat();

        let said = run_with(&ground, "", &args);

        assert_eq!((said.code, said.err.lines().count()), (Some(code), 1), "{args:?} {said:?}");
        assert!(!said.err.trim_end().contains(char::is_control), "{:?}", said.err);
    }
    let file = ground.dir.join("odd\x1b[2J\n.conf");
    fs::write(&file, "x\n").expect("write a file");
    let said = run(&["-c", file.to_str().expect("UTF-8"), "check"]);
    assert_eq!(said.code, Some(2), "{said:?}");
    assert!(said.out.contains("odd\\u{1b}[2J\\n.conf:1: expected"), "{}", said.out);
}

/// Names of files and cgroups are bytes.
#[test]
fn names_that_are_not_utf8() {
    let ground = ground!("bytes");
    let file = ground.dir.join(OsStr::from_bytes(b"caf\xe9.conf"));
    write_private(&file, CONFIG);
    let told = |args: &[&[u8]]| {
        let mut command = Command::new(binary());
        let command = command.args(args.iter().map(|arg| OsStr::from_bytes(arg)));
        Said::from(command.stdin(Stdio::null()).output().expect("start cgtproxy")).fine()
    };
    let name = file.as_os_str().as_bytes();
    let path = b"/services/aria2/\xff\xc3\xa9";

    for args in [
        &[b"-c", name, b"explain", path][..],
        &[b"explain", path, &[b"--config=", name].concat()],
        &[&[b"-c", name].concat(), b"explain", b"--", path],
    ] {
        let said = told(args);
        let want = "/services/aria2/\\xff\\xc3\\xa9\n    target  mihomo\n";
        assert!(said.starts_with(want), "{said}");
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
