//! cgtproxy as a child process of the test.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use nix::poll::{poll, PollFd, PollFlags};
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitid, Id, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

use crate::client::PATIENCE;
use crate::ground::{pipe, Ground};
use crate::kernel::residue;
use crate::wait_until;

/// How long it may take to start, reload or end. What ends waits for the kernel: for the inotify marks of
/// all processes that are being freed, and for RCU.
const READY: Duration = PATIENCE;

/// For [`Daemon::spawn`]: a debug build that does not own its table, as on kernels before 6.9.
pub const UNOWNED: (&str, &str) = ("CGTPROXY_UNOWNED", "1");

/// A cgroup for each target, and a proxy on this host.
pub const POLICY: &str = "
[tproxy mihomo]
port = 7893
[rules]
direct = /direct
drop   = /drop
mihomo = /proxied
";

/// The same with another default target.
pub fn by_default(target: &str) -> String {
    format!("[global]\ndefault = {target}\n{POLICY}")
}

/// The program under test: what CGTPROXY_BIN names; else the static binary of `make`, unless a source
/// is newer; else what cargo has built for this test, which is never old.
pub fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    let find = || {
        if let Some(path) = std::env::var_os("CGTPROXY_BIN").map(PathBuf::from) {
            assert!(path.exists(), "CGTPROXY_BIN is {path:?}, which is not there");
            return path;
        }
        let home = Path::new(env!("CARGO_MANIFEST_DIR"));
        let built = PathBuf::from(env!("CARGO_BIN_EXE_cgtproxy"));
        let target = built.ancestors().nth(2).expect("TARGET/PROFILE/cgtproxy");
        // of glibc where there is no musl target (see the Makefile)
        let of = |libc| format!("{}-unknown-linux-{libc}/release/cgtproxy", std::env::consts::ARCH);
        let [shipped, other] = ["musl", "gnu"].map(|libc| target.join(of(libc)));
        let shipped = if shipped.exists() { shipped } else { other };
        let sources = ["src", "Cargo.toml", "Cargo.lock"].map(|name| changed(&home.join(name)));
        match changed(&shipped) {
            Some(at) if sources.into_iter().max().flatten() < Some(at) => shipped,
            Some(_) => {
                println!("{shipped:?} is older than the sources: testing {built:?}");
                built
            }
            None => built,
        }
    };
    BINARY.get_or_init(find).clone()
}

/// When a file, or the latest file below a directory, was changed.
fn changed(path: &Path) -> Option<SystemTime> {
    if !path.is_dir() {
        return path.metadata().and_then(|meta| meta.modified()).ok();
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.filter_map(|entry| changed(&entry.path())).max()
}

/// What a run said, as text.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        Said {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// What it printed, where all went well.
    #[track_caller]
    pub fn fine(self) -> String {
        assert_eq!((self.code, &*self.err), (Some(0), ""), "{}", self.out);
        self.out
    }

    /// What it printed and what it complained of.
    pub fn all(&self) -> String {
        format!("{}{}", self.out, self.err)
    }
}

/// `cgtproxy ARGS` in this ground, to its end.
pub fn run(args: &[&str]) -> Said {
    let mut command = Command::new(binary());
    command.args(args).stdin(Stdio::null()).output().expect("start cgtproxy").into()
}

/// `cgtproxy -c FILE ARGS`, to its end.
pub fn run_at(file: &Path, args: &[&str]) -> Said {
    command(file, args).output().expect("start cgtproxy").into()
}

/// The same, with FILE holding `config`.
pub fn run_with(ground: &Ground, config: &str, args: &[&str]) -> Said {
    run_at(&config_file(ground, config), args)
}

fn command(file: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("-c").arg(file).args(args).stdin(Stdio::null());
    command
}

/// A fresh file with [`complete`] text.
fn config_file(ground: &Ground, text: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("cgtproxy-{}.conf", COUNT.fetch_add(1, Ordering::Relaxed));
    let path = ground.dir.join(name);
    write_private(&path, &complete(&ground.root, text));
    path
}

/// The configuration `text`, which may begin with a [global] section, with the ground's cgroup
/// root put in, unless it names one.
fn complete(root: &Path, text: &str) -> String {
    if text.contains("cgroup-root") {
        return text.to_owned();
    }
    let text = text.trim_start();
    let rest = text.strip_prefix("[global]").unwrap_or(text);
    format!("[global]\ncgroup-root = {}\n{}", root.display(), rest.trim_start())
}

/// Writes a file of mode 0600.
pub fn write_private(path: &Path, text: &str) {
    let mut options = File::options();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    let mut file = file.expect("open the configuration");
    std::io::Write::write_all(&mut file, text.as_bytes()).expect("write the configuration");
}

/// A running `cgtproxy run`. Killed on drop, if the test has not stopped it.
pub struct Daemon {
    child: Child,
    pub config: PathBuf,
    log: PathBuf,
    root: PathBuf,
    ready: Option<OwnedFd>,
}

impl Daemon {
    /// Starts the program and returns once it is ready. `config` need not name a cgroup root.
    pub fn start(ground: &Ground, config: &str, args: &[&str]) -> Daemon {
        Daemon::start_in(ground, config, args, &[])
    }

    /// The same, with `env` added to its environment.
    pub fn start_in(ground: &Ground, config: &str, args: &[&str], env: &[(&str, &str)]) -> Daemon {
        let mut daemon = Daemon::spawn(ground, config, args, env);
        assert!(daemon.ready(), "cgtproxy did not become ready:\n{}", daemon.logs());
        daemon
    }

    /// A command with this daemon's configuration.
    pub fn command(&self, args: &[&str]) -> Command {
        command(&self.config, args)
    }

    /// What that command says.
    pub fn ask(&self, args: &[&str]) -> Said {
        run_at(&self.config, args)
    }

    /// Starts the program, with `env` added to its environment, and waits for nothing.
    pub fn spawn(ground: &Ground, config: &str, args: &[&str], env: &[(&str, &str)]) -> Daemon {
        Daemon::spawn_by(ground, config, &[], args, env)
    }

    /// As [`Daemon::spawn`], by a command that execs the program: `strace -D …`, `setpriv …`.
    pub fn spawn_by(
        ground: &Ground,
        config: &str,
        by: &[&str],
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Daemon {
        let config = config_file(ground, config);
        let log = config.with_extension("log");
        let (ready, signal) = pipe();
        // release builds do not look at that variable
        let program = match env.contains(&UNOWNED) {
            true => PathBuf::from(env!("CARGO_BIN_EXE_cgtproxy")),
            false => binary(),
        };
        let mut words = by.iter().map(PathBuf::from).chain([program]);
        let mut command = Command::new(words.next().expect("the program itself"));
        command.args(words).arg("-c").arg(&config).args(["--ready-fd", "3"]).args(args).arg("run");
        command.envs(env.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(&log).expect("make the log file"));
        let fd = signal.as_raw_fd();
        let hook = move || {
            // SAFETY: system calls on integers. dup2 clears close-on-exec, unless the descriptor
            // has the right number already.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if fd == 3 {
                    libc::fcntl(3, libc::F_SETFD, 0);
                } else {
                    libc::dup2(fd, 3);
                }
            }
            Ok(())
        };
        // SAFETY: the hook is async-signal-safe.
        unsafe { command.pre_exec(hook) };
        let child = command.spawn().expect("start cgtproxy");
        Daemon { child, config, log, root: ground.root.clone(), ready: Some(ready) }
    }

    /// As [`Daemon::spawn`]; before each message that the program sends it waits, so that what is in force
    /// between two of them can be met.
    pub fn slow(ground: &Ground, config: &str, env: &[(&str, &str)]) -> Daemon {
        let delay = "-einject=sendto:delay_enter=10000";
        let by = ["strace", "-D", "-f", "-qq", "-o/dev/null", "-etrace=sendto", delay];
        Daemon::spawn_by(ground, config, &by, &["--no-seccomp"], env)
    }

    /// Waits until the program says that it is ready; false where it ends, or takes too long.
    pub fn ready(&mut self) -> bool {
        let ready = self.ready.take().expect("readiness is waited for once");
        let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
        let spoke = wait_until(READY, || poll(&mut fds, 20u8).expect("poll the ready fd") == 1);
        let mut said = [0; 1];
        spoke && File::from(ready).read(&mut said).is_ok_and(|n| n == 1) && said == *b"\n"
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("look at cgtproxy")
    }

    /// Whether it has ended; how is for [`Daemon::wait`] or [`Daemon::ended`] to tell.
    pub fn is_gone(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(self.pid()), flags).expect("look at cgtproxy") != WaitStatus::StillAlive
    }

    /// Its process, which is never another's while this lives.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("signal cgtproxy");
    }

    /// Runs `f` while the program stands still.
    pub fn while_stopped<T>(&self, f: impl FnOnce() -> T) -> T {
        self.signal(Signal::SIGSTOP);
        let result = f();
        self.signal(Signal::SIGCONT);
        result
    }

    /// What it has written to standard error.
    pub fn logs(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("read the log")).into_owned()
    }

    /// Waits until a line of the log holds `text`.
    pub fn wait_log(&self, text: &str, timeout: Duration) -> bool {
        wait_until(timeout, || self.logs().contains(text))
    }

    /// Replaces the configuration, as [`Daemon::start`] takes it, without telling the program.
    pub fn configure(&self, text: &str) {
        write_private(&self.config, &complete(&self.root, text));
    }

    /// SIGHUP; what the program logs up to the line that says whether the configuration was taken.
    pub fn hup(&self) -> Result<String, String> {
        let before = self.logs().len();
        self.signal(Signal::SIGHUP);
        // what a path may hold is no such line
        let said = |end: &str| self.logs()[before..].contains(end);
        let done = wait_until(READY, || said("reloaded ") || said("reload failed"));
        assert!(done, "no line about the reload:\n{}", self.logs());
        let log = self.logs()[before..].to_owned();
        if log.contains("reload failed") {
            Err(log)
        } else {
            Ok(log)
        }
    }

    /// A reload, by which the configuration is taken; what the program logs of it.
    #[track_caller]
    pub fn reload(&self) -> String {
        self.hup().unwrap_or_else(|log| panic!("the configuration was refused:\n{log}"))
    }

    /// The same with another configuration.
    #[track_caller]
    pub fn reconfigure(&self, text: &str) -> String {
        self.configure(text);
        self.reload()
    }

    /// A reload by which the old configuration stays, and why.
    #[track_caller]
    pub fn refuse(&self) -> String {
        self.hup().expect_err("the configuration was taken")
    }

    /// SIGTERM, after which nothing of it is in the kernel.
    #[track_caller]
    pub fn stop_clean(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{status}: {}", self.logs());
        assert_eq!(residue(), "");
    }

    /// SIGTERM, and how it exited.
    pub fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// SIGUSR2, which leaves everything in force.
    pub fn leave(mut self) {
        self.signal(Signal::SIGUSR2);
        assert_eq!(self.wait().code(), Some(0), "{}", self.logs());
    }

    /// Waits for its end; one that does not end is killed, which its status then tells.
    pub fn wait(&mut self) -> ExitStatus {
        wait_until(READY, || self.child.try_wait().is_ok_and(|status| status.is_some()));
        let _ = self.child.kill();
        self.child.wait().expect("wait for cgtproxy")
    }

    /// SIGKILL.
    pub fn kill9(mut self) {
        self.child.kill().expect("kill cgtproxy");
        let status = self.child.wait().expect("wait for cgtproxy");
        assert_eq!(status.signal(), Some(9), "it was dead before: {}", self.logs());
    }

    /// A line of /proc/PID/status.
    pub fn process(&self, key: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.expect("read the status");
        let mut lines = status.lines().filter_map(|line| line.split_once(':'));
        let found = lines.find(|line| line.0 == key);
        found.unwrap_or_else(|| panic!("no line of {key}")).1.trim().to_owned()
    }

    /// How many descriptors it has open, but for an inotify instance of cgroups without a process: it
    /// is there as long as there may be any.
    pub fn descriptors(&self) -> usize {
        self.open_files().len() - usize::from(self.inotifies() == 2)
    }

    /// How many inotify instances it has.
    pub fn inotifies(&self) -> usize {
        let is = |to: &&PathBuf| to.as_os_str() == "anon_inode:inotify";
        self.open_files().iter().filter(is).count()
    }

    fn open_files(&self) -> Vec<PathBuf> {
        let dir = fs::read_dir(format!("/proc/{}/fd", self.child.id()));
        let dir = dir.expect("list the descriptors").flatten();
        dir.map(|entry| fs::read_link(entry.path()).unwrap_or_default()).collect()
    }

    /// Whether it takes this signal when it comes to it, and not as a blow. For a moment of its start
    /// the C library blocks every signal, and lets them in again.
    pub fn blocks(&self, signal: Signal) -> bool {
        let set = u64::from_str_radix(&self.process("SigBlk"), 16).expect("a set of signals");
        let has = |signal: Signal| set & 1 << (signal as i32 - 1) != 0;
        has(signal) && !has(Signal::SIGCHLD)
    }

    /// Waits until nothing has woken it for that time.
    #[track_caller]
    pub fn await_rest(&self, time: Duration) {
        let wakes = || self.process("voluntary_ctxt_switches");
        let rests = wait_until(READY, || {
            let before = wakes();
            std::thread::sleep(time);
            wakes() == before
        });
        assert!(rests, "it does not come to rest:\n{}", self.logs());
    }

    /// Processor time that it has used.
    pub fn busy(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        let stat = stat.expect("read the times");
        // fields 14 and 15 of proc_pid_stat(5), in ticks of 10 ms; the name is in parentheses
        let after = stat.rsplit(')').next().expect("what follows the name");
        let ticks = after.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|n| n.parse::<u64>().expect("a number of ticks")).sum();
        Duration::from_millis(ticks * 10)
    }

    /// How many directories the program watches, and how many files (`cgroup.events` of cgroups
    /// without a process, by IN_MODIFY).
    pub fn watches(&self) -> (usize, usize) {
        let (mut directories, mut files) = (0, 0);
        let dir = format!("/proc/{}/fdinfo", self.child.id());
        for entry in fs::read_dir(dir).expect("list fdinfo").flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            for watch in text.lines().filter(|l| l.starts_with("inotify wd:")) {
                *if watch.contains(" mask:2 ") { &mut files } else { &mut directories } += 1;
            }
        }
        (directories, files)
    }

    /// (watched directories, resident KiB) of the program.
    pub fn footprint(&self) -> (usize, usize) {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let status = fs::read_to_string(proc.join("status")).expect("read the status");
        let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let rss = rss.and_then(|l| l.split_whitespace().next()?.parse().ok());
        (self.watches().0, rss.expect("VmRSS of a live process"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of cgtproxy\n{}---", self.logs());
        }
    }
}
