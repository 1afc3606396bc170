//! `status` on a terminal, and again and again.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Terminal, CONFIG};
use crate::client::{Client, PATIENCE};
use crate::daemon::{binary, Daemon};
use crate::ground::{addr, Ground, REMOTE4};
use crate::wait_until;
use crate::world::World;

/// Runs a shell command on a terminal and gives what it shows there.
fn on_terminal(command: &str, env: &[(&str, &str)]) -> String {
    let out = Command::new("script")
        .args(["-qec", command, "/dev/null"])
        .env_remove("NO_COLOR")
        .env("TERM", "xterm")
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("start script");
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// `status --watch` into a pipe, and the lines that come out of it.
fn watch(daemon: &Daemon) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut command = daemon.command(&["status", "--watch"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("start cgtproxy");
    let out = child.stdout.take().expect("stdout is piped");
    (child, BufReader::new(out).lines())
}

/// Colours are for a terminal that has them and a user who wants them; columns are the same without.
#[test]
fn colours_on_a_terminal_only() {
    let ground = ground!("colours");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let command = format!("{} -c {} status", binary().display(), daemon.config.display());

    let coloured = on_terminal(&command, &[]);
    let unwanted = on_terminal(&command, &[("NO_COLOR", "1")]);
    let dumb = on_terminal(&command, &[("TERM", "dumb")]);

    assert!(coloured.contains("\x1b[31mno\x1b[0m"), "{coloured:?}");
    for plain in [&unwanted, &dumb, &daemon.shown()] {
        assert!(plain.contains("mihomo") && !plain.contains('\x1b'), "{plain:?}");
    }
    let strip = |text: &str, code: &str| text.replace(code, "");
    let stripped = ["\x1b[1m", "\x1b[31m", "\x1b[0m"].iter().fold(coloured, |t, c| strip(&t, c));
    assert_eq!(stripped, unwanted);
}

/// The n-th column of the line that begins with this name.
#[track_caller]
fn column<'a>(frame: &'a [String], name: &str, nth: usize) -> &'a str {
    let line = frame.iter().find(|l| l.split_whitespace().next() == Some(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in {frame:#?}"));
    line.split_whitespace().nth(nth).expect("a column")
}

/// Each second a frame with the rates since the last one, of targets and of cgroups that are not idle;
/// where the reader goes away, it ends.
#[test]
fn watch_shows_rates_of_targets_and_cgroups() {
    let (ground, _world, _proxy) = scene!("watch", proxy);
    let busy = ground.cgroup("/services/aria2/busy");
    ground.cgroup("/services/transmission");
    let daemon = Daemon::start(&ground, &format!("[global]\ncounters = cgroup\n{CONFIG}"), &[]);
    let _flood = Client::udp(&busy, addr(REMOTE4, 80)).flood().spawn();

    let (mut child, mut lines) = watch(&daemon);
    let mut frames = Vec::new();
    let mut frame: Vec<String> = Vec::new();
    let start = Instant::now();
    while frames.len() < 3 {
        let line = lines.next().expect("a line").expect("UTF-8");
        if line.starts_with("table inet") && !frame.is_empty() {
            frames.push(std::mem::take(&mut frame));
        }
        frame.push(line);
    }

    assert!(start.elapsed() > Duration::from_secs(2), "a frame a second");
    assert_eq!(column(&frames[0], "mihomo", 2), "-", "no rates yet");
    for frame in &frames[1..] {
        // the flood is some 2,000 datagrams a second; 5 bytes each, and 28 of headers
        let packets: u64 = column(frame, "mihomo", 2).parse().expect("a number");
        assert!((10..20_000).contains(&packets), "{frame:#?}");
        assert_eq!(column(frame, "/services/aria2", 1), "mihomo");
        let own: u64 = column(frame, "/services/aria2", 2).parse().expect("a number");
        assert!(own.abs_diff(packets) < packets / 2, "{frame:#?}");
        assert!(!frame.iter().any(|l| l.starts_with("/services/transmission")), "idle: {frame:#?}");
    }
    drop(lines);
    let ended = wait_until(PATIENCE, || child.try_wait().is_ok_and(|s| s.is_some()));
    let _ = child.kill();
    assert!(ended, "status --watch outlives its reader");
    assert_eq!(child.wait().expect("wait").code(), Some(0));
}

/// A frame is drawn over the last one, and has no more lines than the screen.
#[test]
fn watch_redraws_within_the_screen() {
    let ground = ground!("watch-screen");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let (bin, file) = (binary(), daemon.config.display().to_string());
    let command = format!("stty rows 5; exec {} -c {file} status --watch", bin.display());

    let mut terminal = Terminal::open(&["sh", "-c", &command]);

    terminal.expect("\x1b[H\x1b[J");
    for _ in 0..2 {
        let frame = terminal.expect("\x1b[H\x1b[J");
        assert_eq!(frame.matches('\n').count(), 4, "{frame:?}");
        assert!(frame.contains("TARGET"), "{frame:?}");
    }
}

/// Where cgroups are not counted, the way to have that stands in their place.
#[test]
fn watch_without_counters_says_how_to_have_them() {
    let ground = ground!("watch-none");
    ground.cgroup("/services/aria2");
    let daemon = Daemon::start(&ground, CONFIG, &[]);

    let (mut child, lines) = watch(&daemon);
    let first: Vec<String> = lines.map_while(Result::ok).take(8).collect();

    let how = "for each cgroup: set counters = cgroup in [global]";
    assert!(first.iter().any(|line| line == how), "{first:#?}");
    let _ = child.kill();
    let _ = child.wait();
}
