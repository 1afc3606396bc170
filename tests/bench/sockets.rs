//! What it takes to tell who talks.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::resource::{getrusage, UsageWho};
use nix::sys::signal::{kill, Signal};
use nix::sys::time::TimeValLike;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::client::fork_into;
use crate::daemon::run_with;
use crate::ground::{addr, pipe, Ground, REMOTE4, REMOTE6};
use crate::report::{Report, Target};
use crate::world::{bind, raw_addr};
use crate::{go_on, sized, wait_until};

const CGROUPS: usize = 100;
/// Of each protocol and family, in each cgroup.
const EACH: usize = 25;
/// In all of them.
pub const ALL: usize = CGROUPS * EACH * 4;

/// A process of a cgroup that holds connected sockets.
pub struct Holder(Pid);

impl Holder {
    /// Returns when it has them.
    pub fn start(cgroup: &Path, kinds: [i32; 2]) -> Holder {
        let (read, write) = pipe();
        let tos = [addr(REMOTE4, 7000), addr(REMOTE6, 7000)];
        let raws = tos.map(raw_addr);
        let child = || {
            // SAFETY: system calls on integers and live memory.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                for _ in 0..EACH {
                    for (to, (raw, len)) in tos.iter().zip(&raws) {
                        let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
                        for kind in kinds {
                            let fd = libc::socket(family, kind, 0);
                            if libc::connect(
                                fd,
                                (raw as *const libc::sockaddr_storage).cast(),
                                *len,
                            ) != 0
                            {
                                return 1;
                            }
                        }
                    }
                }
                libc::write(write.as_raw_fd(), b"x".as_ptr().cast(), 1);
                libc::pause();
            }
            0
        };
        let dir = File::open(cgroup).expect("open the cgroup");
        // SAFETY: the child makes system calls only.
        let pid = unsafe { fork_into(&dir, child) }.expect("fork into the cgroup");
        drop(write);
        let mut byte = [0];
        std::io::Read::read_exact(&mut File::from(read), &mut byte).expect("it has its sockets");
        Holder(pid)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// A listener with room for all: nobody has to accept them.
fn listen(at: SocketAddr) -> OwnedFd {
    let listener = bind(at, libc::SOCK_STREAM);
    // SAFETY: an open socket.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 4096) }, 0);
    listener
}

/// Milliseconds on the clock, and of processor time, that a command takes.
fn time(run: impl FnOnce()) -> [f64; 2] {
    let spent = || {
        let used = getrusage(UsageWho::RUSAGE_CHILDREN).expect("the usage of children");
        let [user, system] = [used.user_time(), used.system_time()];
        (user.num_microseconds() + system.num_microseconds()) as f64 / 1e3
    };
    let (before, start) = (spent(), Instant::now());
    run();
    [start.elapsed().as_secs_f64() * 1e3, spent() - before]
}

/// Many of these kinds, in as many services.
pub fn hold(ground: &Ground, kinds: [i32; 2]) -> Vec<Holder> {
    let of = |i| ground.cgroup(&format!("/services/name{i}/instance1"));
    (0..CGROUPS).map(|i| Holder::start(&of(i), kinds)).collect()
}

pub fn apps(report: &mut Report) {
    let ground = Ground::new("apps").expect("root");
    let _listeners =
        ground.outside(|| ["0.0.0.0:7000", "[::]:7000"].map(|at| listen(at.parse().unwrap())));
    let holders = hold(&ground, [libc::SOCK_STREAM, libc::SOCK_DGRAM]);
    let config = "[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = /services/name.*0\n";
    let whole = || {
        let text = run_with(&ground, config, &["apps", "--json"]).out;
        text.matches(&format!("\"flows\":{}", EACH * 4)).count() == CGROUPS
    };
    assert!(wait_until(std::time::Duration::from_secs(10), whole), "not all sockets are told of");
    let mut took = [const { Vec::new() }; 4];
    for _ in 0..sized(7, 25) {
        go_on();
        let [clock, cpu] = time(|| drop(run_with(&ground, config, &["apps"]).fine()));
        let [clocks, cpus] = time(|| {
            let mut ss = Command::new("ss");
            assert!(ss.args(["-tuna", "--cgroup"]).stdout(Stdio::null()).status().is_ok());
        });
        took.iter_mut().zip([clock, cpu, clocks, cpus]).for_each(|(all, one)| all.push(one));
    }
    drop(holders);
    let [clock, cpu, clocks, cpus] = &took;
    let figure = format!("apps, {ALL} sockets of {CGROUPS} cgroups");
    let target = Target::RatioAtMost(1.0);
    report.beside(&figure, clock, "ms", ("ss -tuna --cgroup", clocks), target);
    report.beside(figure + ", CPU", cpu, "ms", ("ss -tuna --cgroup", cpus), target);
}
