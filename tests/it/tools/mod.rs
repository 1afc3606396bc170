//! What people type, a room a command: what is common to them.
//!
//! | module | holds |
//! |---|---|
//! | `explain` | which rule decides, and for whom |
//! | `status` | what the kernel holds, as text and as JSON |
//! | `screen` | `status` on a terminal, and again and again |
//! | `exec` | what runs under a target, and where it must not |
//! | `check` | what it says of the file and of the host |
//! | `proxies` | what `check`, `status` and the log say of proxies: who listens, loops, sockets past them |
//! | `mistakes` | wrong words, no capability, an output that takes nothing |
//! | `shipped` | the manual page and the completion |

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::poll::{poll, PollFd, PollFlags};

use crate::client::PATIENCE;
use crate::daemon::{binary, write_private, Daemon, Said};
use crate::ground::Ground;

mod check;
mod exec;
mod explain;
mod mistakes;
mod proxies;
mod screen;
mod shipped;
mod status;

const CONFIG: &str = "
[tproxy mihomo]
port = 7893
[rules]
direct = /services/mihomo
drop   = /services/telemetry
mihomo = /services/(transmission|aria2)
";

impl Daemon {
    pub fn shown(&self) -> String {
        self.ask(&["status"]).fine()
    }

    /// A Python expression over what `status --json` prints, `d`.
    #[track_caller]
    pub fn json(&self, expression: &str) -> String {
        query(&self.ask(&["status", "--json"]).out, expression)
    }

    /// The columns of one target's line.
    fn target(&self, name: &str) -> Vec<String> {
        let status = self.shown();
        let line = status.lines().find(|l| l.split_whitespace().next() == Some(name));
        let line = line.unwrap_or_else(|| panic!("no {name} in\n{status}"));
        columns(line).into_iter().map(str::to_owned).collect()
    }
}

/// The columns of a line: two blanks or more stand between them, "tcp udp" and "1.0 KiB" have one inside.
pub fn columns(line: &str) -> Vec<&str> {
    line.split("  ").map(str::trim).filter(|column| !column.is_empty()).collect()
}

/// Evaluates a Python expression over the JSON text `d`: a parser that is none of ours.
#[track_caller]
pub fn query(json: &str, expression: &str) -> String {
    let program = format!("import json, sys\nd = json.load(sys.stdin)\nprint(({expression}))");
    let mut python = Command::new("python3");
    python.args(["-c", &program]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = python.spawn().expect("start python3");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(json.as_bytes()).expect("feed python3");
    drop(stdin);
    let out = child.wait_with_output().expect("wait for python3");
    assert!(out.status.success(), "not JSON: {json}");
    String::from_utf8_lossy(&out.stdout).trim_end().to_owned()
}

/// A program on a pseudo-terminal of its own.
pub struct Terminal {
    pub child: Child,
    pub master: OwnedFd,
    seen: String,
}

impl Terminal {
    pub fn open(command: &[&str]) -> Terminal {
        // SAFETY: integers and NUL-terminated strings; the descriptor is new, hence ours.
        let (master, name) = unsafe {
            let fd = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
            assert!(fd >= 0 && libc::grantpt(fd) == 0 && libc::unlockpt(fd) == 0);
            let mut name = [0; 64];
            assert_eq!(libc::ptsname_r(fd, name.as_mut_ptr(), name.len()), 0);
            let name = std::ffi::CStr::from_ptr(name.as_ptr()).to_owned();
            (<OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd), name)
        };
        let name: CString = name;
        let mut spawn = Command::new(command[0]);
        spawn.args(&command[1..]).env("TERM", "dumb");
        let hook = move || {
            // SAFETY: async-signal-safe calls on integers and a NUL-terminated path.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // a job in the background of a script ignores them, and so would all it starts
                for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGTSTP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                libc::setsid();
                let fd = libc::open(name.as_ptr(), libc::O_RDWR);
                (0..3).for_each(|to| {
                    libc::dup2(fd, to);
                });
                libc::ioctl(0, libc::TIOCSCTTY, 0);
            }
            Ok(())
        };
        // SAFETY: see the hook.
        unsafe { spawn.pre_exec(hook) };
        let child = spawn.spawn().expect("start a shell");
        let seen = String::new();
        Terminal { child, master, seen }
    }

    pub fn say(&mut self, text: &str) {
        nix::unistd::write(&self.master, text.as_bytes()).expect("type");
    }

    /// Waits until the screen has shown `text`; gives, and forgets, what was before it.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> String {
        let mut seen = std::mem::take(&mut self.seen);
        loop {
            if let Some(at) = seen.find(text) {
                self.seen = seen.split_off(at).split_off(text.len());
                return seen;
            }
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, PATIENCE.as_millis() as u16).expect("poll the terminal");
            assert_eq!(ready, 1, "no {text:?} in {seen:?}");
            let mut buffer = [0; 4096];
            let n = nix::unistd::read(&self.master, &mut buffer).expect("read the terminal");
            seen += &String::from_utf8_lossy(&buffer[..n]);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `check` in a mount namespace that the shell commands `setup` have changed.
fn check(ground: &Ground, config: &str, setup: &str) -> Said {
    let file = ground.dir.join("check.conf");
    let root = match config.contains("cgroup-root") {
        true => String::new(),
        false => format!("[global]\ncgroup-root = {}\n", ground.root.display()),
    };
    write_private(&file, &format!("{root}{config}"));
    let script = format!("{setup}\nexec {} -c {} check", binary().display(), file.display());
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-ec", &script]).current_dir(&ground.dir);
    command.output().expect("start unshare").into()
}

impl Said {
    /// What `check` has found: a line each, the worst last, with a count behind them, and the exit status
    /// of a configuration that is fine.
    #[track_caller]
    fn findings(&self) -> Vec<&str> {
        let kinds = ["ok: ", "warning: ", "error: "];
        let mut lines: Vec<&str> = self.out.lines().collect();
        let closing = lines.pop().unwrap_or_else(|| panic!("nothing is said: {self:?}"));
        let kind = |line: &&str| kinds.iter().position(|kind| line.starts_with(kind));
        let found: Vec<Option<usize>> = lines.iter().map(kind).collect();
        assert!(!found.contains(&None) && found.is_sorted(), "{}", self.all());
        let [ok, warnings, errors] =
            [0, 1, 2].map(|kind| found.iter().filter(|found| **found == Some(kind)).count());
        let s = |n| if n == 1 { "" } else { "s" };
        let want =
            format!("{errors} error{}, {warnings} warning{}, {ok} ok", s(errors), s(warnings));
        assert_eq!(closing, want, "{}", self.out);
        let code = i32::from(errors > 0);
        assert_eq!((self.code, &*self.err), (Some(code), ""), "{}", self.out);
        lines
    }

    /// Asserts that something of this kind is found, with that in its text.
    #[track_caller]
    fn finds(&self, kind: &str, text: &str) {
        let found = |line: &&str| line.starts_with(&format!("{kind}: ")) && line.contains(text);
        let any = self.findings().iter().any(found);
        assert!(any, "no {kind} with {text:?} in\n{}", self.out);
    }

    /// Asserts that `check` has looked, and has found nothing with that in its line (`warning: `).
    #[track_caller]
    fn lacks(&self, text: &str) {
        let found = self.findings().into_iter().find(|line| line.contains(text));
        assert_eq!(found, None, "{}", self.out);
    }
}

/// Settings of the machine that the tests run on, out of the way.
const CLEAN: &str = "mount -t tmpfs none /proc/sys/net; mkdir -p empty; mount --bind empty /etc";

/// The program as a user without any capability.
pub fn as_nobody(args: &[&str]) -> Said {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(nobodys_binary());
    command.args(args).stdin(Stdio::null());
    command.output().expect("start setpriv").into()
}

/// The program where anybody may run it.
pub fn nobodys_binary() -> PathBuf {
    static ONCE: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let copy = ONCE.get_or_init(|| {
        let copy = std::env::temp_dir().join(format!("cgtp-{}-binary", std::process::id()));
        fs::create_dir_all(&copy).expect("make a directory");
        let file = copy.join("cgtproxy");
        fs::copy(binary(), &file).expect("copy the program");
        file
    });
    copy.clone()
}
