//! What it takes to tell who talks.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::client::fork_into;
use crate::daemon::run_with;
use crate::ground::{addr, pipe, Ground, REMOTE4, REMOTE6};
use crate::report::{median, Report, Target};
use crate::world::{bind, raw_addr};
use crate::{go_on, sized, wait_until};

const CGROUPS: usize = 100;
/// Of each protocol and family, in each cgroup.
const EACH: usize = 25;

/// A process of a cgroup that holds connected sockets.
struct Holder(Pid);

impl Holder {
    /// Returns when it has them.
    fn start(cgroup: &Path) -> Holder {
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
                        for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
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

/// Accepts for ever, in the namespace of the thread that starts it.
fn accept_all(at: SocketAddr) {
    let listener: OwnedFd = bind(at, libc::SOCK_STREAM);
    // SAFETY: an open socket.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 4096) }, 0);
    let listener = TcpListener::from(listener);
    std::thread::spawn(move || {
        let held: Vec<_> = listener.incoming().take(CGROUPS * EACH).collect();
        std::thread::park();
        drop(held);
    });
}

pub fn apps(report: &mut Report) {
    let ground = Ground::new("apps").expect("root");
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 20_000, 20_000)
        .expect("raise the limit of descriptors");
    ground.outside(|| ["0.0.0.0:7000", "[::]:7000"].map(|at| accept_all(at.parse().unwrap())));
    let holders: Vec<Holder> = (0..CGROUPS)
        .map(|i| Holder::start(&ground.cgroup(&format!("/services/name{i}/instance1"))))
        .collect();
    let config = "[tproxy mihomo]\nport = 7893\n[rules]\nmihomo = /services/name.*0\n";
    let all = CGROUPS * EACH * 4;
    let whole = || {
        let said = run_with(&ground, config, &["apps", "--json"]);
        let text = String::from_utf8(said.stdout).expect("UTF-8");
        text.matches(&format!("\"flows\":{}", EACH * 4)).count() == CGROUPS
    };
    assert!(wait_until(std::time::Duration::from_secs(10), whole), "not all sockets are told of");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..sized(7, 25) {
        go_on();
        let start = Instant::now();
        assert!(run_with(&ground, config, &["apps"]).status.success());
        ours.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        let mut ss = Command::new("ss");
        assert!(ss.args(["-tuna", "--cgroup"]).stdout(Stdio::null()).status().is_ok());
        theirs.push(start.elapsed().as_secs_f64() * 1e3);
    }
    drop(holders);
    let reference = ("ss -tuna --cgroup", median(&theirs));
    let figure = format!("apps, {all} sockets of {CGROUPS} cgroups");
    report.beside(figure, median(&ours), "ms", reference, Target::AtMost(50.0));
}
