//! Processes of a cgroup that send, and whom they talk to; and how long it takes them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::sys::wait::waitpid;

use crate::client::fork_into;
use crate::ground::{addr, pipe, REMOTE4};
use crate::sized;
use crate::world::{bind, raw_addr};

/// Where the world serves streams.
pub const SOURCE_PORT: u16 = 9100;

/// Packets between two looks at the clock, and how often that is looked at: a chunk is much shorter
/// than a time slice, so few chunks have another process in them. Of all, that counts which a quarter
/// takes less than: who else is busy makes chunks longer, and none shorter.
const CHUNK: u64 = 64;
const CHUNKS: usize = 400;

/// Nanoseconds a datagram, sent without pause by a process of that cgroup.
pub fn flood(cgroup: &Path) -> f64 {
    let to = raw_addr(addr(REMOTE4, 9));
    // SAFETY: system calls on memory that is alive, and nothing else (see `fork_into`).
    let open = || unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        match libc::connect(fd, (&raw const to.0).cast(), to.1) {
            0 => fd,
            _ => -1,
        }
    };
    // what is dropped is refused, which is an answer as well
    // SAFETY: as above.
    let send = |fd| unsafe {
        libc::send(fd, b"payload".as_ptr().cast(), 7, 0);
        true
    };
    time(cgroup, CHUNK, sized(160, CHUNKS), open, send)
}

/// Nanoseconds to connect to an address and to close that again.
pub fn connects(cgroup: &Path, to: SocketAddr) -> f64 {
    let to = raw_addr(to);
    // SAFETY: as in `flood`.
    let connect = |_| unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        // at once and with a reset, so that no port stays in use
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let size = size_of::<libc::linger>() as libc::socklen_t;
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), size);
        let connected = libc::connect(fd, (&raw const to.0).cast(), to.1) == 0;
        libc::close(fd) == 0 && connected
    };
    time(cgroup, 8, sized(40, 100), || 0, connect)
}

/// Nanoseconds for one byte there and one back, on a connection that stays.
pub fn round_trips(cgroup: &Path, to: SocketAddr) -> f64 {
    let to = raw_addr(to);
    // SAFETY: as in `flood`.
    let open = || unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        let (on, size) = (1, size_of::<libc::c_int>() as libc::socklen_t);
        libc::setsockopt(fd, libc::SOL_TCP, libc::TCP_NODELAY, (&raw const on).cast(), size);
        match libc::connect(fd, (&raw const to.0).cast(), to.1) {
            0 => fd,
            _ => -1,
        }
    };
    // SAFETY: as in `flood`.
    let trip = |fd| unsafe {
        let mut byte = [0u8];
        libc::send(fd, byte.as_ptr().cast(), 1, libc::MSG_NOSIGNAL) == 1
            && libc::recv(fd, byte.as_mut_ptr().cast(), 1, 0) == 1
    };
    time(cgroup, 16, sized(60, 150), open, trip)
}

/// Nanoseconds that a process of a cgroup takes for something, done without pause on what it opens
/// first. Both must be async-signal-safe.
fn time(
    cgroup: &Path,
    chunk: u64,
    chunks: usize,
    open: impl FnOnce() -> i32,
    act: impl Fn(i32) -> bool,
) -> f64 {
    let (read, write) = pipe();
    let cgroup = File::open(cgroup).expect("open the cgroup");
    let child = || {
        let mut times = [0u64; CHUNKS];
        // SAFETY: no memory is passed.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        let fd = open();
        if fd < 0 {
            return 1;
        }
        let mut done = true;
        let mut some = || {
            let start = now();
            for _ in 0..chunk {
                done &= act(fd);
            }
            now() - start
        };
        for _ in 0..chunks / 16 {
            some();
        }
        times[..chunks].iter_mut().for_each(|time| *time = some());
        if !done {
            return 2;
        }
        times[..chunks].sort_unstable();
        let undisturbed = times[chunks / 4];
        // SAFETY: reads one live integer.
        unsafe { libc::write(write.as_raw_fd(), (&raw const undisturbed).cast(), 8) };
        0
    };
    // SAFETY: the child makes system calls only.
    let pid = unsafe { fork_into(&cgroup, child) }.expect("fork into the cgroup");
    drop(write);
    u64_from(read, pid) as f64 / chunk as f64
}

fn u64_from(read: OwnedFd, pid: nix::unistd::Pid) -> u64 {
    let mut bytes = [0; size_of::<u64>()];
    let got = File::from(read).read_exact(&mut bytes);
    let _ = waitpid(pid, None);
    got.expect("the child reports");
    u64::from_ne_bytes(bytes)
}

/// Nanoseconds on a monotonic clock; async-signal-safe.
fn now() -> u64 {
    // SAFETY: fills the timespec that it is given.
    unsafe {
        let mut t: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t);
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

/// Accepts connections and sends each byte of theirs back, until it is dropped: one thread, which
/// starts none for each.
pub struct Echo {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// At an address that a transparent socket is bound to.
    pub fn start(at: SocketAddr) -> Echo {
        let listener = bind(at, libc::SOCK_STREAM);
        // SAFETY: an open socket.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 4096) }, 0);
        let listener = TcpListener::from(listener);
        listener.set_nonblocking(true).expect("set a listener's mode");
        let (read, stop) = pipe();
        let thread = thread::spawn(move || Echo::serve(&listener, &read));
        Echo { stop, thread: Some(thread) }
    }

    fn serve(listener: &TcpListener, stop: &OwnedFd) {
        let mut clients: Vec<TcpStream> = Vec::new();
        loop {
            let all = [stop.as_raw_fd(), listener.as_raw_fd()];
            let all = all.into_iter().chain(clients.iter().map(AsRawFd::as_raw_fd));
            let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            let mut all: Vec<libc::pollfd> = all.map(poll).collect();
            // SAFETY: a live array of that length.
            unsafe { libc::poll(all.as_mut_ptr(), all.len() as libc::nfds_t, -1) };
            if all[0].revents != 0 {
                return;
            }
            let ready = |index: usize| all[index + 2].revents != 0;
            let mut index = 0..;
            clients.retain_mut(|client| {
                let mut byte = [0];
                let mut answer = |client: &mut TcpStream| {
                    client.read_exact(&mut byte)?;
                    client.write_all(&byte)
                };
                !ready(index.next().unwrap_or(0)) || answer(client).is_ok()
            });
            if all[1].revents != 0 {
                while let Ok((client, _)) = listener.accept() {
                    let _ = client.set_nonblocking(false);
                    let _ = client.set_nodelay(true);
                    clients.push(client);
                }
            }
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = nix::unistd::write(&self.stop, b"x");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Serves each connection in a thread of its own, until it is dropped.
pub struct Acceptor {
    listener: TcpListener,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    pub fn start(listener: TcpListener, serve: fn(TcpStream)) -> Acceptor {
        let stop = Arc::new(AtomicBool::new(false));
        let accepted = Arc::new(AtomicUsize::new(0));
        let copy = listener.try_clone().expect("dup");
        let (end, count) = (stop.clone(), Arc::clone(&accepted));
        let thread = thread::spawn(move || {
            while let Ok((conn, _)) = copy.accept() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                thread::spawn(move || serve(conn));
            }
        });
        Acceptor { listener, stop, accepted, thread: Some(thread) }
    }

    pub fn count(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // SAFETY: an open socket; accept(2) returns with an error.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Relays from where the client wanted to go to the client, without copying.
pub fn relay(client: TcpStream) {
    let Ok(dialled) = client.local_addr() else {
        return;
    };
    let server = TcpStream::connect(dialled).expect("connect to the source");
    let (out, into) = pipe();
    const ROOM: usize = 1 << 20;
    // SAFETY: integers only.
    unsafe { libc::fcntl(into.as_raw_fd(), libc::F_SETPIPE_SZ, ROOM) };
    let splice = |from: i32, to: i32, length: usize| -> io::Result<usize> {
        let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_MOVE);
        // SAFETY: descriptors only; no offsets are given.
        let n = unsafe { libc::splice(from, none, to, none, length, flags) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    };
    while let Ok(mut left @ 1..) = splice(server.as_raw_fd(), into.as_raw_fd(), ROOM) {
        while left > 0 {
            match splice(out.as_raw_fd(), client.as_raw_fd(), left) {
                Ok(n @ 1..) => left -= n,
                _ => return,
            }
        }
    }
}

/// Gbit/s that as many processes in the cgroup receive together, each in one stream.
pub fn download(cgroup: &Path, streams: usize) -> f64 {
    let (warm_up, time) = match crate::quick_run() {
        true => (100_000_000, 300_000_000),
        false => (150_000_000, 600_000_000),
    };
    let to = raw_addr(addr(REMOTE4, SOURCE_PORT));
    let dir = File::open(cgroup).expect("open the cgroup");
    let clients: Vec<_> = (0..streams)
        .map(|_| {
            let (read, write) = pipe();
            let child = || {
                // SAFETY: system calls on memory that is alive, and nothing else. With MSG_TRUNC,
                // tcp(7) drops the data and writes none of it.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                    if libc::connect(fd, (&raw const to.0).cast(), to.1) != 0 {
                        return 1;
                    }
                    let (mut bytes, start) = (0u64, now());
                    let mut counting = 0;
                    loop {
                        let none = std::ptr::null_mut();
                        let n = libc::recv(fd, none, 1 << 20, libc::MSG_TRUNC);
                        if n <= 0 {
                            return 2;
                        }
                        let at = now();
                        if counting == 0 && at - start > warm_up {
                            counting = at;
                        } else if counting != 0 {
                            bytes += n as u64;
                            if at - counting > time {
                                let rate = bytes * 1_000_000 / ((at - counting) / 1_000);
                                libc::write(write.as_raw_fd(), (&raw const rate).cast(), 8);
                                return 0;
                            }
                        }
                    }
                }
            };
            // SAFETY: the child makes system calls only.
            let pid = unsafe { fork_into(&dir, child) }.expect("fork into the cgroup");
            (read, pid)
        })
        .collect();
    let rates = clients.into_iter().map(|(read, pid)| u64_from(read, pid));
    rates.sum::<u64>() as f64 * 8.0 / 1e9
}
