//! Clients: processes that are in a cgroup from birth, talk to the world and report.
//!
//! A client is a fork of the test process (`clone3(2)` with CLONE_INTO_CGROUP), so no packet of it
//! can come from another cgroup. The parent has threads, hence the child calls the kernel and
//! nothing else: no allocation, no locks, no panics.

use std::fs::File;
use std::io::{self, Read};
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use libc::{c_int, c_void};
use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::ground::{pipe, REMOTE4, REMOTE6};
use crate::wait_until;
use crate::world::raw_addr;

/// What a client speaks; ICMP is a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    Tcp,
    Udp,
    Icmp,
}

/// How a client fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Who answered, as the server puts it (see `world`); `echo ADDRESS` for a ping.
    Answer(String),
    Refused,
    /// No answer in time.
    Timeout,
    /// Any other error: EPERM where the output hook dropped a datagram, ECONNRESET …
    Failed(Errno),
}

impl Outcome {
    /// Who answered, without the client's own address; `nobody` where the request was dropped,
    /// which a sender may be told at once (EPERM) or not at all.
    pub fn who(&self) -> String {
        match self {
            Outcome::Answer(text) => text.split(" from ").next().unwrap_or_default().to_owned(),
            Outcome::Timeout | Outcome::Failed(Errno::EPERM) => "nobody".to_owned(),
            Outcome::Refused => "refused".to_owned(),
            other => format!("{other:?}"),
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Act {
    /// One request and its answer.
    Ask,
    /// TCP: read all that the server streams until it ends; the answer is its first line.
    Follow,
    /// TCP, so many times: connect, wait for data, close while more of it is on its way.
    CloseEarly(u32),
    /// A hundred times: one datagram, and the socket is closed before an answer can come.
    SendAndClose,
    /// Datagrams, or new connections, without pause until killed, errors notwithstanding.
    Flood,
    /// Datagrams without pause until one is denied: by the output hook (EPERM), or by what has ended the
    /// socket of a cgroup that was found late (ECONNABORTED once, or nowhere to send to from then on).
    UntilDenied,
    /// Be a server at the address until killed: answer every request with `service`.
    Serve,
    /// TCP: be a proxy that listens at the address until killed: dial whatever the client dialled
    /// and pass the answer on. The user and the mark are for what it dials.
    Relay,
}

/// What a client is to do. `Client::tcp(&cgroup, to).uid(65534).run()`
#[derive(Debug, Clone)]
pub struct Client {
    cgroup: PathBuf,
    proto: Proto,
    to: SocketAddr,
    act: Act,
    uid: u32,
    mark: u32,
    cgroup_namespace: bool,
    timeout: Duration,
}

impl Client {
    /// One request of root to `to`, which waits for its answer.
    pub fn new(cgroup: &Path, proto: Proto, to: SocketAddr) -> Client {
        Client {
            cgroup: cgroup.to_owned(),
            proto,
            to,
            act: Act::Ask,
            uid: 0,
            mark: 0,
            cgroup_namespace: false,
            timeout: PATIENCE,
        }
    }

    pub fn tcp(cgroup: &Path, to: SocketAddr) -> Client {
        Client::new(cgroup, Proto::Tcp, to)
    }

    pub fn udp(cgroup: &Path, to: SocketAddr) -> Client {
        Client::new(cgroup, Proto::Udp, to)
    }

    pub fn ping(cgroup: &Path, to: IpAddr) -> Client {
        Client::new(cgroup, Proto::Icmp, SocketAddr::new(to, 0))
    }

    /// As that user, without any of root's capabilities.
    pub fn uid(self, uid: u32) -> Client {
        Client { uid, ..self }
    }

    /// SO_MARK of the client's socket.
    pub fn mark(self, mark: u32) -> Client {
        Client { mark, ..self }
    }

    /// In a cgroup namespace of its own, as container engines give it.
    pub fn in_cgroup_namespace(self) -> Client {
        Client { cgroup_namespace: true, ..self }
    }

    /// How long it waits for what is to come.
    pub fn timeout(self, timeout: Duration) -> Client {
        Client { timeout, ..self }
    }

    /// See [`Act::Follow`].
    pub fn follow(self) -> Client {
        Client { act: Act::Follow, ..self }
    }

    /// See [`Act::CloseEarly`].
    pub fn close_early(self, times: u32) -> Client {
        Client { act: Act::CloseEarly(times), ..self }
    }

    /// See [`Act::Flood`].
    pub fn flood(self) -> Client {
        Client { act: Act::Flood, ..self }
    }

    /// See [`Act::SendAndClose`].
    pub fn send_and_close(self) -> Client {
        Client { act: Act::SendAndClose, ..self }
    }

    /// See [`Act::UntilDenied`].
    pub fn until_denied(self) -> Client {
        Client { act: Act::UntilDenied, ..self }
    }

    /// A server of one protocol at the client's address, listening already.
    #[track_caller]
    pub fn serve(self) -> Running {
        Client { act: Act::Serve, ..self }.listening()
    }

    /// A TPROXY server at the client's address, listening already.
    #[track_caller]
    pub fn relay(self) -> Running {
        Client { act: Act::Relay, ..self }.listening()
    }

    #[track_caller]
    fn listening(self) -> Running {
        let mut running = self.spawn();
        let report = running.report();
        assert_eq!(report.errno, 0, "unable to listen at {}", running.to);
        running
    }

    /// How it fares, to its end.
    pub fn run(&self) -> Outcome {
        self.spawn().wait().0
    }

    /// Starts the client in its cgroup. It dies with the test's thread at the latest.
    pub fn spawn(&self) -> Running {
        let (read, write) = pipe();
        let job = Job {
            proto: self.proto,
            act: self.act,
            to: raw_addr(self.to),
            uid: self.uid,
            mark: self.mark,
            cgroup_namespace: self.cgroup_namespace,
            timeout: self.timeout,
            report: write.as_raw_fd(),
        };
        let cgroup = File::open(&self.cgroup).expect("open the client's cgroup");
        // SAFETY: `Job::run` makes system calls only.
        let pid = unsafe { fork_into(&cgroup, || job.run()) }.expect("fork into the cgroup");
        Running { pid, pipe: read.into(), to: self.to }
    }
}

/// Of linux/sched.h. (libc 0.2 declares it as a c_int, which truncates it to 0.)
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks; the child is born in `cgroup` and calls `child`.
///
/// # Safety
/// `child` must be async-signal-safe: other threads of this process may hold any lock.
pub unsafe fn fork_into(cgroup: &File, child: impl FnOnce() -> i32) -> io::Result<Pid> {
    // struct clone_args of linux/sched.h, which libc has for some architectures only
    let mut args = [0u64; 11];
    args[0] = CLONE_INTO_CGROUP; // flags
    args[4] = libc::SIGCHLD as u64; // exit_signal
    args[10] = cgroup.as_raw_fd() as u64; // cgroup
                                          // SAFETY: without CLONE_VM the child has a copy of this stack, as after fork(2).
    match unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: always allowed.
        0 => unsafe { libc::_exit(child()) },
        pid => Ok(Pid::from_raw(pid as i32)),
    }
}

/// A socket that a process of `cgroup` has made, of the family of `ip`: to the kernel it is that
/// cgroup's, though the test holds it.
pub fn socket_in(cgroup: &Path, kind: c_int, ip: IpAddr) -> OwnedFd {
    socket_for(cgroup, family_of(ip), kind, 0)
}

/// Connects a socket. A process that another test has forked may hold a copy of one that was closed here,
/// between the same two ends, for an instant.
pub fn connect(fd: &impl AsRawFd, to: SocketAddr) -> std::io::Result<()> {
    let (raw, len) = raw_addr(to);
    let mut done = Ok(());
    wait_until(PATIENCE, || {
        // SAFETY: a sockaddr of the length that goes with it.
        let rc = unsafe { libc::connect(fd.as_raw_fd(), (&raw const raw).cast(), len) };
        done = Errno::result(rc).map(drop);
        done != Err(Errno::EADDRNOTAVAIL)
    });
    Ok(done?)
}

/// Ends a connection with a reset, at once: closing it does not while a process that another test has
/// just forked has a copy.
pub fn disconnect(fd: &impl AsRawFd) {
    // SAFETY: all of it may be zero; AF_UNSPEC takes the connection back.
    let rc = unsafe {
        let none: libc::sockaddr_storage = std::mem::zeroed();
        libc::connect(fd.as_raw_fd(), (&raw const none).cast(), 16)
    };
    assert_eq!(rc, 0, "disconnect: {}", io::Error::last_os_error());
}

/// A TCP connection of a cgroup.
pub fn tcp_in(cgroup: &Path, to: SocketAddr) -> TcpStream {
    let fd = socket_in(cgroup, libc::SOCK_STREAM, to.ip());
    connect(&fd, to).unwrap_or_else(|e| panic!("connect to {to}: {e}"));
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    stream
}

/// A datagram socket of a cgroup.
pub fn udp_in(cgroup: &Path, ip: IpAddr) -> UdpSocket {
    let socket = UdpSocket::from(socket_in(cgroup, libc::SOCK_DGRAM, ip));
    socket.set_read_timeout(Some(PATIENCE)).expect("set a timeout");
    socket
}

/// AF_INET or AF_INET6.
pub fn family_of(ip: IpAddr) -> c_int {
    match ip {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    }
}

/// The same of a family, and of a protocol that is not the usual one.
pub fn socket_for(cgroup: &Path, family: c_int, kind: c_int, protocol: c_int) -> OwnedFd {
    socket_of(0, cgroup, family, kind, protocol)
}

/// The same of a user, whose group has his number.
pub fn socket_of(uid: u32, cgroup: &Path, family: c_int, kind: c_int, protocol: c_int) -> OwnedFd {
    let (read, write) = pipe();
    let cgroup = File::open(cgroup).expect("open the cgroup");
    let child = || {
        // SAFETY: system calls on integers, and a live c_int is read.
        unsafe {
            libc::syscall(libc::SYS_setresgid, uid, uid, uid);
            libc::syscall(libc::SYS_setresuid, uid, uid, uid);
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol);
            libc::write(write.as_raw_fd(), (&raw const fd).cast(), size_of::<c_int>());
            // until the test has it
            libc::pause();
        }
        0
    };
    // SAFETY: the child makes system calls only.
    let pid = unsafe { fork_into(&cgroup, child) }.expect("fork into the cgroup");
    drop(write);
    let mut bytes = [0; size_of::<c_int>()];
    File::from(read).read_exact(&mut bytes).expect("the child reports");
    let socket = descriptor_of(pid, c_int::from_ne_bytes(bytes));
    let _ = kill(pid, Signal::SIGKILL);
    let _ = waitpid(pid, None);
    socket
}

/// A copy of a descriptor of another process.
#[track_caller]
pub fn descriptor_of(pid: Pid, theirs: c_int) -> OwnedFd {
    // SAFETY: integers only; the new descriptors are ours.
    unsafe {
        let process = libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) as c_int;
        assert!(process >= 0, "pidfd_open: {}", io::Error::last_os_error());
        let process = OwnedFd::from_raw_fd(process);
        let ours = libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), theirs, 0) as c_int;
        assert!(ours >= 0, "pidfd_getfd: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(ours)
    }
}

/// A client at work. Killed and reaped on drop.
pub struct Running {
    pid: Pid,
    pipe: File,
    to: SocketAddr,
}

impl Running {
    /// Its process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// How it went, and how long the client took for it.
    pub fn wait(mut self) -> (Outcome, Duration) {
        let report = self.report();
        let outcome = match report.errno {
            0 if report.echo != 0 => Outcome::Answer(format!("echo {}", self.to.ip())),
            0 => {
                let text = &report.text[..(report.len as usize).min(TEXT)];
                Outcome::Answer(String::from_utf8_lossy(text).trim_end().to_owned())
            }
            libc::ETIMEDOUT => Outcome::Timeout,
            libc::ECONNREFUSED => Outcome::Refused,
            errno => Outcome::Failed(Errno::from_raw(errno)),
        };
        (outcome, Duration::from_nanos(report.nanos))
    }

    fn report(&mut self) -> Report {
        let mut bytes = [0; size_of::<Report>()];
        let read = self.pipe.read_exact(&mut bytes);
        read.expect("the client died without a report");
        // SAFETY: the child wrote a whole Report, and any bytes are a valid one.
        unsafe { std::mem::transmute(bytes) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

const TEXT: usize = 240;

/// How long anything waits for what has to come: a test fails by it only where nothing does, however
/// slow the machine is, and whoever else keeps it busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long a request waits that nobody is expected to answer. (Whoever does, does so sooner; and
/// what left the host is on the wire whether it was waited for or not.)
pub const SILENCE: Duration = Duration::from_millis(250);

/// How long it takes at least where a first SYN was lost, which goes again after a second: who is told
/// at once is told before that.
pub const AT_ONCE: Duration = Duration::from_secs(1);

/// Repeats a call that a signal has interrupted: with a timeout of its own the kernel does not.
pub fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Who answers each of the [`CASES`].
pub type Answers = [String; 6];

/// Requests to port 80 of the remote hosts.
pub const CASES: [(Proto, IpAddr); 6] = [
    (Proto::Tcp, REMOTE4),
    (Proto::Tcp, REMOTE6),
    (Proto::Udp, REMOTE4),
    (Proto::Udp, REMOTE6),
    (Proto::Icmp, REMOTE4),
    (Proto::Icmp, REMOTE6),
];

/// Those of TCP and UDP.
pub const FLOWS: [(Proto, SocketAddr); 4] = [
    (Proto::Tcp, SocketAddr::new(REMOTE4, 80)),
    (Proto::Tcp, SocketAddr::new(REMOTE6, 80)),
    (Proto::Udp, SocketAddr::new(REMOTE4, 80)),
    (Proto::Udp, SocketAddr::new(REMOTE6, 80)),
];

/// Processes of a cgroup that send the [`FLOWS`] without pause.
pub fn floods(cgroup: &Path) -> [Running; 4] {
    FLOWS.map(|(proto, to)| Client::new(cgroup, proto, to).flood().spawn())
}

/// Asserts that nobody answers the [`FLOWS`] of a cgroup.
#[track_caller]
pub fn unanswered(cgroup: &Path) {
    for (proto, to) in FLOWS {
        let who = Client::new(cgroup, proto, to).timeout(SILENCE).run().who();
        assert_eq!(who, "nobody", "{proto:?} {to}");
    }
}

/// Asserts who answers new processes of a cgroup, for each cgroup that is given.
#[track_caller]
pub fn expect(cgroups: &[(&Path, Answers)]) {
    expect_as(|client| client, cgroups);
}

/// As [`expect`], with the clients changed by `change`.
#[track_caller]
pub fn expect_as(change: impl Fn(Client) -> Client, cgroups: &[(&Path, Answers)]) {
    let mut asked = Vec::new();
    for (cgroup, want) in cgroups {
        for (want, (proto, ip)) in want.iter().zip(CASES) {
            let patience = if want == "nobody" { SILENCE } else { PATIENCE };
            let client = Client::new(cgroup, proto, SocketAddr::new(ip, 80)).timeout(patience);
            let running = change(client).spawn();
            asked.push((cgroup, want, proto, ip, running));
        }
    }
    let mut wrong = Vec::new();
    for (cgroup, want, proto, ip, running) in asked {
        let who = running.wait().0.who();
        // nobody has answered one either whose socket is ended while it waits, by a daemon that looks
        // at what began before
        let is_ended = want == "nobody" && who == "Failed(ECONNABORTED)";
        if who != *want && !is_ended {
            wrong.push(format!("{proto:?} to {ip} in {}: {who}, not {want}", cgroup.display()));
        }
    }
    assert!(wrong.is_empty(), "answered by\n{}", wrong.join("\n"));
}

/// The answers where TCP, UDP and ping, each over IPv4 and IPv6, end up as `who` says: `remote`,
/// `nobody`, `refused`, or the name of a proxy.
pub fn answers(who: [&str; 6]) -> Answers {
    std::array::from_fn(|i| match (who[i], CASES[i]) {
        ("nobody" | "refused", _) => who[i].to_owned(),
        ("remote", (Proto::Icmp, ip)) => format!("echo {ip}"),
        (name, (_, ip)) => format!("{name} {}", SocketAddr::new(ip, 80)),
    })
}

/// The answers under a target as a whole: `direct`, `drop`, or the name of a proxy.
pub fn under(target: &str) -> Answers {
    match target {
        "direct" => answers(["remote"; 6]),
        "drop" => answers(["nobody"; 6]),
        proxy => answers([proxy, proxy, proxy, proxy, "remote", "remote"]),
    }
}

/// What the child writes to the pipe.
#[repr(C)]
struct Report {
    nanos: u64,
    errno: i32,
    echo: u32,
    len: u64,
    text: [u8; TEXT],
}

/// All that the child needs, without pointers.
struct Job {
    proto: Proto,
    act: Act,
    to: (libc::sockaddr_storage, libc::socklen_t),
    uid: u32,
    mark: u32,
    cgroup_namespace: bool,
    timeout: Duration,
    report: RawFd,
}

impl Job {
    /// The child's life.
    fn run(&self) -> i32 {
        // SAFETY: plain system calls on integers.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // Descriptors of other tests (listeners!) must not live on in this process.
            libc::dup2(self.report, 0);
            libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0);
        }
        if self.cgroup_namespace {
            // SAFETY: an integer only.
            if unsafe { libc::unshare(libc::CLONE_NEWCGROUP) } != 0 {
                self.tell(now(), Err(Errno::last_raw()), [0; TEXT]);
                return 0;
            }
        }
        if !matches!(self.act, Act::Relay) {
            self.become_user();
        }
        let start = now();
        let mut text = [0; TEXT];
        let result = match self.act {
            Act::Ask => self.ask(&mut text),
            Act::Follow => self.follow(&mut text),
            Act::CloseEarly(times) => self.close_early(times),
            Act::SendAndClose => self.send_and_close(),
            Act::Flood => self.flood(),
            Act::UntilDenied => self.until_denied(start),
            Act::Serve => self.serve(start),
            Act::Relay => self.relay(start),
        };
        self.tell(start, result, text);
        0
    }

    fn become_user(&self) {
        if self.uid != 0 {
            // SAFETY: plain system calls on integers.
            unsafe {
                libc::syscall(libc::SYS_setgroups, 0, 0);
                libc::syscall(libc::SYS_setresgid, self.uid, self.uid, self.uid);
                libc::syscall(libc::SYS_setresuid, self.uid, self.uid, self.uid);
            }
        }
    }

    /// Writes the report: how it went, or that many bytes of `text`.
    fn tell(&self, start: u64, result: Result<usize, c_int>, text: [u8; TEXT]) {
        let report = Report {
            nanos: now() - start,
            errno: result.err().unwrap_or(0),
            echo: (self.proto == Proto::Icmp) as u32,
            len: result.unwrap_or(0) as u64,
            text,
        };
        // SAFETY: reads a live value; smaller than PIPE_BUF, hence written whole.
        unsafe { libc::write(0, (&raw const report).cast(), size_of::<Report>()) };
    }

    fn socket(&self) -> Result<c_int, c_int> {
        let v6 = c_int::from(self.to.0.ss_family) == libc::AF_INET6;
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        let (kind, protocol) = match self.proto {
            Proto::Tcp => (libc::SOCK_STREAM, 0),
            Proto::Udp => (libc::SOCK_DGRAM, 0),
            Proto::Icmp if v6 => (libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6),
            Proto::Icmp => (libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
        };
        // SAFETY: integers only.
        let fd = check(unsafe { libc::socket(family, kind | libc::SOCK_NONBLOCK, protocol) })?;
        set(fd, libc::SO_BROADCAST, 1)?;
        set(fd, libc::SO_REUSEADDR, 1)?;
        if self.mark != 0 {
            set(fd, libc::SO_MARK, self.mark)?;
        }
        Ok(fd)
    }

    /// A connected socket; for TCP, once the peer has accepted.
    fn connect(&self) -> Result<c_int, c_int> {
        let fd = self.socket()?;
        // SAFETY: a sockaddr of the length that goes with it.
        let rc = unsafe { libc::connect(fd, (&raw const self.to.0).cast(), self.to.1) };
        if let Err(errno) = check(rc) {
            if errno != libc::EINPROGRESS {
                return Err(errno);
            }
            self.poll(fd, libc::POLLOUT)?;
            self.pending_error(fd)?;
        }
        Ok(fd)
    }

    fn ask(&self, text: &mut [u8; TEXT]) -> Result<usize, c_int> {
        let fd = self.connect()?;
        if self.proto != Proto::Tcp {
            self.send(fd)?;
            self.poll(fd, libc::POLLIN)?;
            return recv(fd, text);
        }
        let mut len = 0;
        loop {
            self.poll(fd, libc::POLLIN)?;
            let n = recv(fd, &mut text[len..])?;
            len += n;
            if n == 0 || len == TEXT || text[..len].ends_with(b"\n") {
                return Ok(len);
            }
        }
    }

    fn follow(&self, text: &mut [u8; TEXT]) -> Result<usize, c_int> {
        let fd = self.connect()?;
        let mut chunk = [0; 4096];
        let (mut total, mut line) = (0, 0);
        loop {
            self.poll(fd, libc::POLLIN)?;
            let n = recv(fd, &mut chunk)?;
            if n == 0 {
                break;
            }
            if total == 0 {
                line = chunk[..n].iter().position(|b| *b == b'\n').unwrap_or(0).min(TEXT);
                text[..line].copy_from_slice(&chunk[..line]);
            }
            total += n;
        }
        if total > line {
            Ok(line)
        } else {
            Err(libc::ENODATA)
        }
    }

    fn close_early(&self, times: u32) -> Result<usize, c_int> {
        for i in 0..times {
            let fd = self.connect()?;
            self.poll(fd, libc::POLLIN)?;
            // By turns: unread data is left (the socket itself resets), or none (it says FIN, and
            // the kernel resets without a socket when more arrives).
            let mut chunk = [0; 4096];
            if i % 2 == 0 {
                recv(fd, &mut chunk[..16])?;
            } else {
                while recv(fd, &mut chunk).is_ok_and(|n| n > 0) {}
            }
            // SAFETY: `fd` is ours.
            unsafe { libc::close(fd) };
        }
        Ok(0)
    }

    fn send_and_close(&self) -> Result<usize, c_int> {
        for _ in 0..100 {
            let fd = self.connect()?;
            self.send(fd)?;
            // SAFETY: `fd` is ours.
            unsafe { libc::close(fd) };
        }
        Ok(0)
    }

    fn flood(&self) -> ! {
        loop {
            if self.proto == Proto::Tcp {
                if let Ok(fd) = self.socket() {
                    // SAFETY: a sockaddr of the length that goes with it; `fd` is ours.
                    unsafe {
                        libc::connect(fd, (&raw const self.to.0).cast(), self.to.1);
                        pause(Duration::from_millis(1));
                        libc::close(fd);
                    }
                }
            } else if let Ok(fd) = self.connect() {
                for _ in 0..100 {
                    let _ = self.send(fd);
                    pause(Duration::from_micros(500));
                }
                // SAFETY: `fd` is ours.
                unsafe { libc::close(fd) };
            }
        }
    }

    fn until_denied(&self, start: u64) -> Result<usize, c_int> {
        let fd = self.connect()?;
        while now() - start < self.timeout.as_nanos() as u64 {
            match self.send(fd) {
                Err(libc::EPERM | libc::ECONNABORTED | libc::EDESTADDRREQ) => return Ok(0),
                _ => pause(Duration::from_micros(10)),
            }
        }
        Err(libc::ETIMEDOUT)
    }

    /// Reports once it listens, and then never comes back but for an error.
    fn serve(&self, start: u64) -> Result<usize, c_int> {
        const ANSWER: &[u8] = b"service\n";
        let fd = self.socket()?;
        // SAFETY: a sockaddr of the length that goes with it.
        check(unsafe { libc::bind(fd, (&raw const self.to.0).cast(), self.to.1) })?;
        if self.proto == Proto::Tcp {
            // SAFETY: integers only.
            check(unsafe { libc::listen(fd, 16) })?;
        }
        self.tell(start, Ok(0), [0; TEXT]);
        loop {
            self.poll(fd, libc::POLLIN)?;
            // SAFETY: writes within buffers that are alive, reads ANSWER, and closes a descriptor
            // that is ours.
            unsafe {
                let mut from: libc::sockaddr_storage = zeroed();
                let mut size = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
                let (at, answer) = ((&raw mut from).cast(), ANSWER.as_ptr().cast());
                if self.proto == Proto::Tcp {
                    let conn = libc::accept(fd, at, &mut size);
                    libc::send(conn, answer, ANSWER.len(), 0);
                    libc::close(conn);
                } else {
                    let mut data = [0u8; 64];
                    let room = data.as_mut_ptr().cast();
                    libc::recvfrom(fd, room, data.len(), 0, at, &mut size);
                    libc::sendto(fd, answer, ANSWER.len(), 0, at, size);
                }
            }
        }
    }

    fn relay(&self, start: u64) -> Result<usize, c_int> {
        let v6 = c_int::from(self.to.0.ss_family) == libc::AF_INET6;
        let unmarked = Job { mark: 0, ..*self };
        let listener = unmarked.socket()?;
        // A proxy may get its listener as root (or from its supervisor), and become a user then.
        let (one, size) = (1u32, size_of::<u32>() as libc::socklen_t);
        let (level, option) = match v6 {
            true => (libc::SOL_IPV6, libc::IPV6_TRANSPARENT),
            false => (libc::SOL_IP, libc::IP_TRANSPARENT),
        };
        // SAFETY: reads one live u32, then a sockaddr of the length that goes with it.
        unsafe {
            let value = (&raw const one).cast();
            check(libc::setsockopt(listener, level, option, value, size))?;
            check(libc::bind(listener, (&raw const self.to.0).cast(), self.to.1))?;
            check(libc::listen(listener, 64))?;
        }
        self.become_user();
        // As root the mark can be set; a proxy of another user would need the capability.
        self.tell(start, Ok(0), [0; TEXT]);
        loop {
            self.poll(listener, libc::POLLIN)?;
            // SAFETY: the kernel writes within the sockaddr that is alive; descriptors are ours.
            unsafe {
                let conn = libc::accept(listener, std::ptr::null_mut(), std::ptr::null_mut());
                let mut dialled: libc::sockaddr_storage = zeroed();
                let mut size = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
                libc::getsockname(conn, (&raw mut dialled).cast(), &mut size);
                let on = Job { to: (dialled, size), timeout: Duration::from_millis(200), ..*self };
                let mut text = [0; TEXT];
                if let Ok(n) = on.ask(&mut text) {
                    libc::send(conn, text.as_ptr().cast(), n, libc::MSG_NOSIGNAL);
                }
                libc::close(conn);
            }
        }
    }

    /// One datagram; for ICMP, an echo request whose id and checksum the kernel fills in.
    fn send(&self, fd: c_int) -> Result<(), c_int> {
        let v6 = c_int::from(self.to.0.ss_family) == libc::AF_INET6;
        let data: &[u8] = match self.proto {
            Proto::Icmp if v6 => &[128, 0, 0, 0, 0, 0, 0, 1],
            Proto::Icmp => &[8, 0, 0, 0, 0, 0, 0, 1],
            _ => b"who?\n",
        };
        // SAFETY: reads `data` only.
        check(unsafe { libc::send(fd, data.as_ptr().cast(), data.len(), 0) as c_int }).map(|_| ())
    }

    /// Waits for `events` until there was silence for the timeout. It is counted in short moments that
    /// this process has lived through: one in which the whole machine stands still, or in which others
    /// keep it from its processors, is a moment like any other, since nobody could have answered in it.
    fn poll(&self, fd: c_int, events: i16) -> Result<(), c_int> {
        const MOMENT: u128 = 10;
        let mut left = self.timeout.as_millis();
        loop {
            let moment = left.min(MOMENT);
            let mut poll = libc::pollfd { fd, events, revents: 0 };
            // SAFETY: one live pollfd.
            if check(unsafe { libc::poll(&mut poll, 1, moment as c_int) })? > 0 {
                return Ok(());
            }
            left -= moment;
            if left == 0 {
                return Err(libc::ETIMEDOUT);
            }
        }
    }

    fn pending_error(&self, fd: c_int) -> Result<(), c_int> {
        let (mut errno, mut size) = (0, size_of::<c_int>() as libc::socklen_t);
        // SAFETY: writes one c_int, and its size.
        let rc = unsafe {
            let out: *mut c_void = (&raw mut errno).cast();
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, out, &mut size)
        };
        check(rc)?;
        if errno == 0 {
            Ok(())
        } else {
            Err(errno)
        }
    }
}

/// An option of SOL_SOCKET.
fn set(fd: c_int, option: c_int, value: u32) -> Result<c_int, c_int> {
    let (at, size) = ((&raw const value).cast(), size_of::<u32>() as libc::socklen_t);
    // SAFETY: reads one live u32.
    check(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, at, size) })
}

fn recv(fd: c_int, buffer: &mut [u8]) -> Result<usize, c_int> {
    // SAFETY: writes within `buffer`.
    let n = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    check(n as c_int).map(|n| n as usize)
}

/// The errno of a failed call. (`Errno::last` is a thread-local read, hence signal-safe.)
fn check(rc: c_int) -> Result<c_int, c_int> {
    if rc < 0 {
        Err(Errno::last_raw())
    } else {
        Ok(rc)
    }
}

/// Nanoseconds on a monotonic clock.
fn now() -> u64 {
    // SAFETY: fills the timespec that it is given.
    unsafe {
        let mut t: libc::timespec = zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

fn pause(time: Duration) {
    let t = libc::timespec { tv_sec: 0, tv_nsec: time.subsec_nanos() as libc::c_long };
    // SAFETY: reads one live timespec.
    unsafe { libc::nanosleep(&t, std::ptr::null_mut()) };
}
