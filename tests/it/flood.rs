//! Packets without pause, for moments that few packets meet.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::client::{fork_into, Proto};
use crate::daemon::Daemon;
use crate::ground::pipe;
use crate::world::raw_addr;

/// A process of that cgroup that sends datagrams, or SYNs, without pause, by that socket or one of its
/// own. It has begun.
pub struct Flood {
    pid: Pid,
    /// In nanoseconds of CLOCK_MONOTONIC.
    stalls_at: u64,
}

impl Flood {
    pub fn start(cgroup: &Path, proto: Proto, socket: Option<&OwnedFd>, to: SocketAddr) -> Flood {
        Flood::start_with(None, cgroup, proto, socket, to)
    }

    pub fn start_with(
        stall: Option<&mut Stall>,
        cgroup: &Path,
        proto: Proto,
        socket: Option<&OwnedFd>,
        to: SocketAddr,
    ) -> Flood {
        let (read, write) = pipe();
        let pid = flood(stall, cgroup, proto, socket.map(AsRawFd::as_raw_fd), to, &write);
        drop(write);
        let mut at = [0; 8];
        File::from(read).read_exact(&mut at).expect("it has begun");
        Flood { pid, stalls_at: u64::from_ne_bytes(at) }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// A packet that waits where it is, in the middle of a chain, while others go on: its processor is
/// interrupted by thousands of timers that end at once.
pub struct Stall {
    processor: CpuSet,
    others: CpuSet,
    timers: Vec<libc::timer_t>,
}

impl Stall {
    /// How many. Each takes a third of a microsecond.
    const TIMERS: usize = 40_000;
    /// Time to start them all.
    const AHEAD: Duration = Duration::from_millis(80);

    /// `None` where there is one processor alone, which is said.
    pub fn new() -> Option<Stall> {
        let mut others = sched_getaffinity(Pid::from_raw(0)).expect("read the affinity");
        let all =
            Vec::from_iter((0..CpuSet::count()).filter(|cpu| others.is_set(*cpu) == Ok(true)));
        let mut processor = CpuSet::new();
        processor.set(all[0]).expect("a processor that exists");
        others.unset(all[0]).expect("a processor that exists");
        let timers = vec![std::ptr::null_mut(); Stall::TIMERS];
        if all.len() == 1 {
            println!("SKIP: there is one processor, and what waits would keep the others waiting");
            return None;
        }
        Some(Stall { processor, others, timers })
    }

    /// Has the daemon, which has been stopped, go on as soon as the packets of `flood` wait, and this
    /// thread do something.
    pub fn meanwhile(&self, flood: &Flood, daemon: &Daemon, f: impl FnOnce()) {
        let home = sched_getaffinity(daemon.pid()).expect("read the affinity");
        let both = |set: &CpuSet| {
            for pid in [Pid::from_raw(0), daemon.pid()] {
                sched_setaffinity(pid, set).expect("set the affinity");
            }
        };
        both(&self.others);
        set_scheduler(daemon.pid(), libc::SCHED_FIFO);
        thread::sleep(Duration::from_nanos(flood.stalls_at.saturating_sub(monotonic())));
        daemon.signal(Signal::SIGCONT);
        f();
        set_scheduler(daemon.pid(), libc::SCHED_OTHER);
        both(&home);
    }

    /// Makes system calls only. Returns when they end.
    fn arm(&mut self) -> u64 {
        let _ = sched_setaffinity(Pid::from_raw(0), &self.processor);
        let none = libc::RLIM_INFINITY;
        // SAFETY: system calls on live buffers only.
        unsafe {
            // the signal of each waits
            libc::setrlimit(
                libc::RLIMIT_SIGPENDING,
                &libc::rlimit { rlim_cur: none, rlim_max: none },
            );
            let mut signals: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut signals, libc::SIGUSR1);
            libc::sigprocmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
            let mut event: libc::sigevent = std::mem::zeroed();
            (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, libc::SIGUSR1);
            for timer in &mut self.timers {
                libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, timer);
            }
            let at = monotonic() + Stall::AHEAD.as_nanos() as u64;
            let mut end: libc::itimerspec = std::mem::zeroed();
            end.it_value.tv_sec = (at / 1_000_000_000) as _;
            end.it_value.tv_nsec = (at % 1_000_000_000) as _;
            for timer in &self.timers {
                libc::timer_settime(*timer, libc::TIMER_ABSTIME, &end, std::ptr::null_mut());
            }
            at
        }
    }
}

/// Nanoseconds of CLOCK_MONOTONIC.
fn monotonic() -> u64 {
    // SAFETY: a live buffer.
    let now = unsafe {
        let mut now: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now);
        now
    };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn set_scheduler(pid: Pid, policy: i32) {
    // SAFETY: a live buffer.
    unsafe {
        let mut param: libc::sched_param = std::mem::zeroed();
        param.sched_priority = i32::from(policy == libc::SCHED_FIFO);
        libc::sched_setscheduler(pid.as_raw(), policy, &param);
    }
}

fn flood(
    stall: Option<&mut Stall>,
    cgroup: &Path,
    proto: Proto,
    socket: Option<RawFd>,
    to: SocketAddr,
    begun: &OwnedFd,
) -> Pid {
    let cgroup = File::open(cgroup).expect("open the cgroup");
    let (raw, len) = raw_addr(to);
    // SAFETY: system calls on integers and live buffers only.
    let child = || unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let kind = match proto {
            Proto::Tcp => libc::SOCK_STREAM | libc::SOCK_NONBLOCK,
            _ => libc::SOCK_DGRAM,
        };
        let fd = socket.unwrap_or_else(|| libc::socket(i32::from(raw.ss_family), kind, 0));
        libc::connect(fd, (&raw const raw).cast(), len);
        // it has a processor of its own while the daemon is at work, and not for ever where there is
        // one alone
        libc::alarm(5);
        set_scheduler(Pid::from_raw(0), libc::SCHED_FIFO);
        let stalls_at = stall.map_or(0, Stall::arm);
        libc::write(begun.as_raw_fd(), (&raw const stalls_at).cast(), 8);
        let none: libc::sockaddr_storage = std::mem::zeroed();
        loop {
            if proto == Proto::Tcp {
                // AF_UNSPEC takes the connection back
                libc::connect(fd, (&raw const none).cast(), len);
                libc::connect(fd, (&raw const raw).cast(), len);
            } else {
                libc::send(fd, b"?".as_ptr().cast(), 1, 0);
            }
        }
    };
    // SAFETY: the child makes system calls only.
    unsafe { fork_into(&cgroup, child) }.expect("fork into the cgroup")
}
