//! Nobody reads the log: classification does not wait for it, and what is lost is counted.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::daemon::{binary, run_with, write_private, Daemon, Said};
use crate::ground::{moment, sh, Ground};
use crate::kernel::{await_member, residue, SETTLE};
use crate::wait_until;

const CONFIG: &str = "[rules]\ndrop = /.*\n";
const COUNT: usize = 60;

/// Makes cgroups one by one, with something after each; the median time from mkdir to the set.
fn latency(ground: &Ground, name: &str, between: impl Fn()) -> Duration {
    let mut took: Vec<Duration> = (0..COUNT)
        .map(|i| {
            let start = Instant::now();
            await_member(&ground.cgroup(&format!("/{name}{i}")), "drop");
            let took = start.elapsed();
            between();
            took
        })
        .collect();
    took.sort();
    took[COUNT / 2]
}

/// Asserts that `slow` is no more than twice `fast`, and what the noise of this moment makes: who waits
/// for a reader waits for ever, or for a timer.
fn compare(fast: Duration, slow: Duration) {
    let noise = 20 * moment();
    println!("median latency {fast:?} with a reader, {slow:?} without, noise {noise:?}");
    assert!(slow < fast * 2 + noise, "{fast:?} with a reader, {slow:?} without");
}

/// A reader that sleeps keeps nothing waiting; what he has missed is counted, and once he reads he has
/// the rest.
#[test]
fn a_pipe_that_nobody_reads() {
    let ground = ground!("pipe");
    let daemon = Daemon::start(&ground, CONFIG, &["-v"]);
    let fast = latency(&ground, "fast", || ());
    assert!(daemon.logs().contains("fast0: drop"));
    assert!(daemon.stop().success());

    let fifo = ground.dir.join("fifo");
    let path = fifo.to_str().expect("UTF-8");
    sh(&format!("mkfifo {path}"));
    let mut options = File::options();
    let options = options.read(true).write(true);
    let mut pipe = options.custom_flags(libc::O_NONBLOCK).open(&fifo).expect("open the pipe");
    while pipe.write(&[b'\n'; 512]).is_ok() {}
    let script = format!("exec \"$0\" \"$@\" 2> {path}");
    let by = ["sh", "-c", &script];
    let mut daemon = Daemon::spawn_by(&ground, CONFIG, &by, &["-v"], &[]);
    assert!(daemon.ready());
    compare(fast, latency(&ground, "slow", || ()));

    // now somebody reads
    let mut drain = || {
        let mut text = Vec::new();
        let error = pipe.read_to_end(&mut text).expect_err("it stays open");
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
        let text = String::from_utf8(text).expect("an escaped log");
        text.trim_start_matches('\n').to_owned()
    };
    assert_eq!(drain(), "");
    let mut said = String::new();
    for name in ["first", "second"] {
        await_member(&ground.cgroup(&format!("/{name}")), "drop");
        let line = format!("{name}: drop\n");
        let told = wait_until(SETTLE, || {
            said += &drain();
            said.contains(&line)
        });
        assert!(told, "{said}");
    }
    // the line that says it has started, one for each cgroup that it found and that it was given
    let lost = 1 + 2 * COUNT;
    assert_eq!(
        said,
        format!(
            "warning: {lost} log lines lost: the reader did not keep up\n\
             info: /first: drop\ninfo: /second: drop\n"
        )
    );
    assert!(daemon.stop().success());
}

/// A /dev of the calling thread's own, with all that a program needs, so that there can be a
/// /dev/log.
fn own_dev(ground: &Ground) {
    let dev = ground.dir.join("dev");
    let dev = dev.to_str().expect("UTF-8");
    sh(&format!(
        "mkdir {dev} && mount -t tmpfs none {dev} && \
         for f in null zero full random urandom tty; do \
           touch {dev}/$f && mount --bind /dev/$f {dev}/$f; done && \
         ln -s /proc/self/fd {dev}/fd && mount --move {dev} /dev"
    ));
}

/// All datagrams that are queued.
fn received(socket: &UnixDatagram) -> Vec<String> {
    let mut all = Vec::new();
    let mut bytes = [0; 8192];
    while let Ok(n) = socket.recv(&mut bytes) {
        let text = String::from_utf8_lossy(&bytes[..n]).into_owned();
        all.push(text.split_once("]: ").map_or(text.clone(), |x| x.1.into()));
    }
    all
}

fn syslogd() -> UnixDatagram {
    let _ = fs::remove_file("/dev/log");
    let socket = UnixDatagram::bind("/dev/log").expect("bind /dev/log");
    socket.set_nonblocking(true).expect("set O_NONBLOCK");
    socket
}

/// A syslogd that sleeps loses lines and a count tells how many; one that is restarted is found again.
#[test]
fn a_syslogd_that_sleeps_and_goes_and_comes() {
    let ground = ground!("syslog");
    own_dev(&ground);
    let socket = syslogd();
    let daemon = Daemon::start(&ground, CONFIG, &["-v", "-s"]);

    // a reader that keeps up, in between, and one that sleeps
    let fast = latency(&ground, "fast", || drop(received(&socket)));
    compare(fast, latency(&ground, "slow", || ()));
    let queued = received(&socket);
    println!("{} lines were queued", queued.len());
    assert!(queued.len() < COUNT);
    let tell = |name: &str, socket: &UnixDatagram| {
        await_member(&ground.cgroup(&format!("/{name}")), "drop");
        let mut said = Vec::new();
        let line = format!("/{name}: drop");
        let told = wait_until(SETTLE, || {
            said.extend(received(socket));
            said.contains(&line)
        });
        assert!(told, "{said:?}");
        said
    };
    let lost = |n: usize| format!("{n} log lines lost: the reader did not keep up");
    let first = tell("first", &socket);
    assert_eq!(first, [lost(COUNT - queued.len()), "/first: drop".into()]);
    assert_eq!(tell("second", &socket), ["/second: drop"]);

    // restarted between two lines: nothing is lost
    drop(socket);
    let socket = syslogd();
    assert_eq!(tell("third", &socket), ["/third: drop"]);
    // gone for a while
    drop(socket);
    for remove in [false, true] {
        if remove {
            fs::remove_file(Path::new("/dev/log")).expect("remove /dev/log");
        }
        await_member(&ground.cgroup(&format!("/gone-{remove}")), "drop");
    }
    let socket = syslogd();
    assert_eq!(tell("back", &socket), [lost(2), "/back: drop".into()]);
    assert!(daemon.stop().success());
    sh("umount -l /dev");
}

/// `journalctl -p warning` finds ours by the number in front.
#[test]
fn the_journal_gets_priorities() {
    let ground = ground!("journal");
    let script = "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec \"$0\" \"$@\"";
    let start = |script: &str, config: &str| {
        let by = ["sh", "-c", script];
        Daemon::spawn_by(&ground, config, &by, &["-v"], &[])
    };
    let mut daemon = start(script, CONFIG);
    assert!(daemon.ready());
    await_member(&ground.cgroup("/one"), "drop");
    assert!(daemon.wait_log("<6>info: /one: drop\n", SETTLE), "{}", daemon.logs());
    assert!(daemon.logs().contains("<5>notice: started: "), "{}", daemon.logs());

    // a command's last words, too
    let mut refused = start(script, "[rules]\ndrp = /a\n");
    assert_eq!(refused.wait().code(), Some(2));
    assert!(refused.logs().starts_with("<3>error: "), "{}", refused.logs());
    assert!(daemon.stop().success());

    // not where somebody else reads standard error
    let mut daemon = start("JOURNAL_STREAM=1:1 exec \"$0\" \"$@\"", CONFIG);
    assert!(daemon.ready());
    assert!(daemon.wait_log("\nnotice: started: ", SETTLE), "{}", daemon.logs());
    assert!(daemon.stop().success());
}

/// What a supervisor would log from standard error is in syslog alone.
#[test]
fn nothing_is_told_twice() {
    let ground = ground!("twice");
    own_dev(&ground);
    let socket = syslogd();
    let wrong = "[rules]\ndrp = /a\n";
    let mut daemon = Daemon::spawn(&ground, wrong, &["-s"], &[]);
    assert_eq!(daemon.wait().code(), Some(2));
    let said = received(&socket);
    assert!(said.len() == 1 && said[0].contains("undefined target \"drp\""), "{said:?}");
    assert_eq!(daemon.logs(), "");

    // check prints what is wrong for whoever starts the service, and has it logged
    let text = run_with(&ground, wrong, &["-s", "check"]).out;
    assert!(text.contains("error: ") && !text.contains("ok: "), "{text}");
    let said = received(&socket);
    assert!(said[0].contains("undefined target \"drp\""), "{said:?}");
    assert!(said.last().is_some_and(|line| line.starts_with("check: 1 error")), "{said:?}");

    // without a syslogd, nothing is lost
    drop(socket);
    let mut daemon = Daemon::spawn(&ground, wrong, &["-s"], &[]);
    assert_eq!(daemon.wait().code(), Some(2));
    assert!(daemon.logs().contains("undefined target \"drp\""), "{}", daemon.logs());
    sh("umount -l /dev");
}

/// A limit on the size of files costs lines, not the daemon.
#[test]
fn a_log_that_may_not_grow() {
    let ground = ground!("fsize");
    let by = ["prlimit", "--fsize=2000:unlimited"];
    let mut daemon = Daemon::spawn_by(&ground, CONFIG, &by, &["-v"], &[]);
    assert!(daemon.ready(), "{}", daemon.logs());
    for i in 0..100 {
        ground.cgroup(&format!("/cgroup-with-a-name-{i}"));
    }
    let last = ground.cgroup("/last");
    await_member(&last, "drop");
    assert!(daemon.ended().is_none());
    assert!(daemon.logs().len() <= 2000 && !daemon.logs().contains("/last"));
    sh(&format!("prlimit --pid {} --fsize=unlimited", daemon.pid()));
    ground.cgroup("/more");
    assert!(daemon.wait_log(" log lines lost", SETTLE), "{}", daemon.logs());
    assert!(daemon.wait_log("/more: drop", SETTLE), "{}", daemon.logs());
    assert!(daemon.stop().success());
}

/// Nor does it cost half of a pidfile: the start fails, and leaves nothing.
#[test]
fn a_pidfile_that_may_not_grow() {
    let ground = ground!("fsize-pid");
    let pidfile = ground.dir.join("pid");
    let config = ground.dir.join("conf");
    write_private(&config, &format!("[global]\ncgroup-root = {}\n{CONFIG}", ground.root.display()));
    let [program, pid, conf] =
        [&binary(), &pidfile, &config].map(|path| path.display().to_string());
    let script = format!("ulimit -f 0; exec {program} -s -p {pid} -c {conf} run");

    let said = Said::from(Command::new("sh").args(["-c", &script]).output().expect("start sh"));

    let why = ["unable to write pidfile", "file too large"];
    assert!(said.code == Some(1) && why.iter().all(|why| said.err.contains(why)), "{said:?}");
    assert!(!pidfile.exists());
    assert_eq!(residue(), "");
}

/// OpenWrt's logd takes what follows the priority for a timestamp where its 16th character is a
/// blank, and cuts that; the tag has to be behind it, whatever the length of the pid.
#[test]
fn logd_leaves_the_tag() {
    let ground = ground!("logd");
    own_dev(&ground);
    let socket = syslogd();
    socket.set_nonblocking(false).expect("clear O_NONBLOCK");
    let daemon = Daemon::start(&ground, CONFIG, &["-s"]);
    let mut bytes = [0; 8192];
    let n = socket.recv(&mut bytes).expect("the line that says it has started");
    let text = String::from_utf8_lossy(&bytes[..n]).into_owned();
    let (priority, text) = text.split_once('>').expect("a priority in front");
    assert_eq!(priority, "<29", "daemon.notice");
    assert_eq!(text.as_bytes()[15], b' ', "{text}");
    let tag = format!("cgtproxy[{}]: started: ", daemon.pid());
    assert!(text[16..].starts_with(&tag), "{text}");
    assert!(text[..15].split([' ', ':']).filter(|part| !part.is_empty()).count() == 5, "{text}");
    assert!(daemon.stop().success());
    sh("umount -l /dev");
}
