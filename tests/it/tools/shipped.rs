//! What is shipped beside the program: the manual page and the completion.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::CONFIG;
use crate::daemon::{run, write_private, Said};
use crate::ground::Ground;

/// Every option that the program knows has its place in the manual page.
#[test]
fn the_manual_page_names_every_option() {
    let main = fs::read_to_string("conf/man/cgtproxy.8").expect("read");
    let help = run(&["--help"]).out;
    let words = help.split_whitespace();
    let options: Vec<&str> = words.filter_map(|w| w.strip_prefix("--")).collect();
    assert!(options.len() >= 8);
    for option in options.iter().map(|o| o.trim_end_matches([',', ']'])) {
        assert!(main.contains(&format!("Fl -{option}")), "--{option} is not documented");
    }
}

/// What bash would offer behind `words`, of which the last is being typed.
fn complete(ground: &Ground, words: &[&str]) -> Vec<String> {
    let script = r#"
        . "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        complete -p cgtproxy > /dev/null || exit 1
        _cgtproxy
        printf '%s\n' "${COMPREPLY[@]}"
    "#;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf/completion/cgtproxy.bash");
    let mut command = Command::new("bash");
    command.args(["--norc", "-c", script, "bash"]).arg(file).args(words);
    let said = Said::from(command.current_dir(&ground.dir).output().expect("start bash"));
    assert_eq!((said.code, &*said.err), (Some(0), ""), "{words:?}");
    let mut offers: Vec<String> =
        said.out.lines().filter(|l| !l.is_empty()).map(str::to_owned).collect();
    offers.sort();
    // as bash does
    offers.dedup();
    offers
}

/// Completion offers commands, each one's options, files, targets of the configuration, users,
/// processes, and behind exec what the command itself would be offered.
#[test]
fn completion_for_bash() {
    let ground = ground!("completion");
    write_private(&ground.dir.join("a.conf"), CONFIG);
    for (words, want) in [
        (&["cgtproxy", "e"][..], &["exec", "explain"][..]),
        (
            &["cgtproxy", ""],
            &["apps", "check", "exec", "explain", "flush", "run", "show", "status"],
        ),
        (&["cgtproxy", "-v", "st"], &["status"]),
        (
            &["cgtproxy", "status", "--"],
            &["--config", "--help", "--json", "--prometheus", "--verbose", "--version", "--watch"],
        ),
        (
            &["cgtproxy", "apps", "--"],
            &["--config", "--help", "--json", "--suggest", "--verbose", "--version"],
        ),
        (&["cgtproxy", "-c", "a."], &["a.conf"]),
        (&["cgtproxy", "-c", "a.conf", "exec", ""], &["direct", "drop", "mihomo"]),
        (&["cgtproxy", "-c", "a.conf", "exec", "m"], &["mihomo"]),
        (&["cgtproxy", "exec", "-u", "nobo"], &["nobody"]),
        (&["cgtproxy", "-c", "a.conf", "exec", "drop", "--", "base3"], &["base32"]),
        (&["cgtproxy", "flush", ""], &[]),
    ] {
        assert_eq!(complete(&ground, words), want, "{words:?}");
    }

    let pids = complete(&ground, &["cgtproxy", "explain", "--pid", "1"]);
    assert!(pids.contains(&"1".to_owned()), "{pids:?}");
}
