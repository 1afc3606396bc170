//! `status` on a terminal, and again and again.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Terminal, CONFIG};
use crate::client::{Client, PATIENCE};
use crate::daemon::{binary, Daemon};
use crate::ground::{addr, Ground, REMOTE4};
use crate::wait_until;
use crate::world::{Server, World};

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

#[test]
fn colours_on_a_terminal_only() {
    let ground = ground!("colours");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let command = format!("{} -c {} status", binary().display(), daemon.config.display());
    let coloured = on_terminal(&command, &[]);
    assert!(coloured.contains("\x1b[31mno\x1b[0m"), "{coloured:?}");
    let plain = on_terminal(&command, &[("NO_COLOR", "1")]);
    assert!(plain.contains("mihomo") && !plain.contains('\x1b'), "{plain:?}");
    assert!(!on_terminal(&command, &[("TERM", "dumb")]).contains('\x1b'));
    assert!(!daemon.shown().contains('\x1b'));
    // columns are where they are without colour
    let strip =
        |text: &str| text.replace("\x1b[1m", "").replace("\x1b[31m", "").replace("\x1b[0m", "");
    assert_eq!(strip(&coloured), plain);
}

#[test]
fn watch_shows_rates_of_targets_and_cgroups() {
    let (ground, world) = scene!("watch");
    let busy = ground.cgroup("/services/aria2/busy");
    ground.cgroup("/services/transmission");
    let config =
        format!("[global]\ncounters = cgroup\ncgroup-root = {}\n{CONFIG}", ground.root.display());
    let daemon = Daemon::start(&ground, &config, &[]);
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let _flood = Client::udp(&busy, addr(REMOTE4, 80)).flood().spawn();
    let mut child = daemon
        .command(&["status", "--watch"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start cgtproxy");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    // the first frame has no rates yet, the second and third have
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
    let column = |frame: &[String], name: &str, nth: usize| {
        let line = frame.iter().find(|l| l.split_whitespace().next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in {frame:#?}"));
        line.split_whitespace().nth(nth).expect("a column").to_owned()
    };
    assert_eq!(column(&frames[0], "mihomo", 2), "-");
    for frame in &frames[1..] {
        // the flood is some 2,000 datagrams a second; 5 bytes each, and 28 of headers
        let packets: u64 = column(frame, "mihomo", 2).parse().expect("a number");
        assert!((10..20_000).contains(&packets), "{frame:#?}");
        assert_eq!(column(frame, "/services/aria2", 1), "mihomo");
        let own: u64 = column(frame, "/services/aria2", 2).parse().expect("a number");
        assert!(own.abs_diff(packets) < packets / 2, "{frame:#?}");
        assert!(!frame.iter().any(|l| l.starts_with("/services/transmission")), "idle: {frame:#?}");
    }
    // the reader goes away: it ends, and says nothing
    drop(lines);
    let ended = wait_until(PATIENCE, || child.try_wait().is_ok_and(|s| s.is_some()));
    let _ = child.kill();
    assert!(ended, "status --watch outlives its reader");
    assert_eq!(child.wait().expect("wait").code(), Some(0));
    drop(world);
}

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

#[test]
fn watch_without_counters_says_how_to_have_them() {
    let ground = ground!("watch-none");
    ground.cgroup("/services/aria2");
    let daemon = Daemon::start(&ground, CONFIG, &[]);
    let mut child = daemon
        .command(&["status", "--watch"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("start cgtproxy");
    let lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    let first: Vec<String> = lines.map_while(Result::ok).take(8).collect();
    assert!(
        first.contains(&"for each cgroup: set counters = cgroup in [global]".into()),
        "{first:#?}"
    );
    let _ = child.kill();
    let _ = child.wait();
}
