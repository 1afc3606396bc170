//! The least that any classifier must do: read one inotify event, ask for the id of the new cgroup,
//! send one transaction of one element with it. Its messages are built by hand and share no code with the program. And the listener
//! that sees the effect, of the program and of the floor alike.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::{fork, ForkResult, Pid};

use crate::ground::Ground;
use crate::kernel::{elements, load, netlink};

// linux/netfilter/nfnetlink.h and nf_tables.h.
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFPROTO_INET: u8 = 1;
pub const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_DELTABLE: u16 = 2;
pub const NFT_MSG_NEWSETELEM: u16 = 12;
pub const NFT_MSG_DELSETELEM: u16 = 14;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NFT_GOTO: i32 = -4;
const NLA_F_NESTED: u16 = 0x8000;

/// A multicast listener on the ruleset of the thread's network namespace.
pub struct Listener {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Listener {
    pub fn new() -> Listener {
        let socket = netlink();
        set(&socket, libc::SO_RCVBUFFORCE, 256 << 20);
        let mut address = address();
        address.nl_groups = 1 << (NFNLGRP_NFTABLES - 1);
        let size = size_of_val(&address) as libc::socklen_t;
        // SAFETY: reads one live sockaddr of that size.
        let rc = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
        assert_eq!(rc, 0, "bind: {}", io::Error::last_os_error());
        let mut listener = Listener { socket, buffer: vec![0; 1 << 16] };
        listener.timeout(Duration::from_secs(10));
        listener
    }

    pub fn timeout(&mut self, timeout: Duration) {
        let t =
            libc::timeval { tv_sec: timeout.as_secs() as _, tv_usec: timeout.subsec_micros() as _ };
        let (at, size) = ((&raw const t).cast(), size_of_val(&t) as libc::socklen_t);
        let fd = self.socket.as_raw_fd();
        // SAFETY: reads one live timeval.
        unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, at, size) };
    }

    /// (NFT_MSG_ type, body) of each message of the next datagram; none in time: `None`.
    pub fn next(&mut self) -> Option<impl Iterator<Item = (u16, &[u8])>> {
        let (at, room) = (self.buffer.as_mut_ptr().cast(), self.buffer.len());
        // SAFETY: writes within the buffer.
        let n = unsafe { libc::recv(self.socket.as_raw_fd(), at, room, 0) };
        if n < 0 {
            let error = io::Error::last_os_error();
            crate::go_on();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "recv: {error}");
            return None;
        }
        let mut rest = &self.buffer[..n as usize];
        Some(std::iter::from_fn(move || {
            let len = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            let body = &rest[20..len];
            rest = &rest[len.next_multiple_of(4).min(rest.len())..];
            Some((kind & 0xff, body))
        }))
    }

    /// Waits for a message of that type.
    pub fn await_kind(&mut self, kind: u16) {
        while !self.next().expect("a change of the ruleset").any(|m| m.0 == kind) {}
    }

    /// Takes elements that are added until `count` have been seen or none comes in time.
    pub fn count_new(&mut self, count: usize) -> usize {
        let mut seen = 0;
        while seen < count {
            let Some(messages) = self.next() else { break };
            let new = messages.filter(|m| m.0 == NFT_MSG_NEWSETELEM);
            seen += new.map(|m| elements(m.1).len()).sum::<usize>();
        }
        seen
    }
}

/// What the floor puts its elements into.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Set,
    /// As other programs have it, which look up what to do with a cgroup.
    VerdictMap,
}

impl Kind {
    /// The name of the table, and of the directory.
    fn name(self) -> &'static str {
        match self {
            Kind::Set => "floor",
            Kind::VerdictMap => "verdicts",
        }
    }
}

/// The floor at work: a process of its own, as any classifier is, in the outside network namespace,
/// so that neither its transactions nor ours wake the other.
pub struct Floor {
    pub dir: PathBuf,
    /// In memory that is shared with the process.
    transact: &'static AtomicBool,
    pub pid: Pid,
    /// Keys of elements that are only there to make the set large.
    filler: u64,
    fill: Socket,
}

impl Floor {
    /// Watches a cgroup of the ground.
    pub fn start(ground: &Ground, kind: Kind) -> Floor {
        let dir = ground.cgroup(kind.name());
        let transact = shared();
        transact.store(true, Ordering::Relaxed);
        let (mut socket, fill) = ground.outside(|| {
            let content = match kind {
                Kind::Set => "set seen { type cgroupsv2; }",
                // the kernel looks at all of it again where a chain uses it
                Kind::VerdictMap => {
                    "map seen { type cgroupsv2 : verdict; }
                    chain taken { accept; }
                    chain output {
                        type filter hook output priority 0; policy accept;
                        socket cgroupv2 level 1 vmap @seen
                    }"
                }
            };
            load(&format!("table inet {} {{\n {content}\n}}", kind.name()));
            (Socket::new(kind), Socket::new(kind))
        });
        let opened = OwnedFd::from(fs::File::open(&dir).expect("a directory"));
        let inotify = inotify(&dir);
        // SAFETY: what the child runs until it is killed neither allocates nor takes a lock.
        let pid = match unsafe { fork() }.expect("fork") {
            ForkResult::Child => {
                // SAFETY: no memory is passed.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                // a panic must not unwind into what cleans up the parent's ground
                let _abort = Abort;
                floor(&opened, &inotify, &mut socket, transact)
            }
            ForkResult::Parent { child } => child,
        };
        Floor { dir, transact, pid, filler: 1 << 40, fill }
    }

    /// Adds elements until the set holds `count`.
    pub fn fill(&mut self, count: u64) {
        let all: Vec<u64> = (self.filler..(1 << 40) + count).collect();
        all.chunks(500).for_each(|some| self.fill.add(some));
        self.filler = (1 << 40) + count;
    }

    /// Whether an event leads to a transaction.
    pub fn transact(&self, on: bool) {
        self.transact.store(on, Ordering::Relaxed);
    }

    /// Nanoseconds of CPU so far.
    pub fn cpu(&self) -> u64 {
        schedstat(&format!("/proc/{}/schedstat", self.pid))
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

struct Abort;

impl Drop for Abort {
    fn drop(&mut self) {
        std::process::abort();
    }
}

/// One that a child sees too; it is never given back.
fn shared() -> &'static AtomicBool {
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping of zeroes, large enough and aligned for what is made of it.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0);
        assert_ne!(at, libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        &*at.cast()
    }
}

/// Each cgroup is removed before the next one is made, so only the last one's id is kept.
fn floor(dir: &OwnedFd, inotify: &OwnedFd, socket: &mut Socket, on: &AtomicBool) -> ! {
    let mut key = 0;
    let mut buffer = [0u8; 4096];
    loop {
        let (at, room) = (buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: writes within the buffer.
        let n = unsafe { libc::read(inotify.as_raw_fd(), at, room) };
        let mut rest = &buffer[..n.max(0) as usize];
        while rest.len() >= 16 {
            let word = |at: usize| {
                u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]])
            };
            let (mask, length) = (word(4), word(12) as usize);
            let name = rest[16..].as_ptr();
            rest = &rest[16 + length..];
            if !on.load(Ordering::Relaxed) {
                continue;
            }
            if mask & libc::IN_CREATE != 0 {
                key = id_of(dir, name);
                socket.change(NFT_MSG_NEWSETELEM, key);
            } else {
                socket.change(NFT_MSG_DELSETELEM, key);
            }
        }
    }
}

/// The id of a cgroup, by its name as inotify gives it, with its end.
fn id_of(dir: &OwnedFd, name: *const u8) -> u64 {
    /// struct file_handle of linux/fs.h.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        id: u64,
    }
    let (mut handle, mut mount) = (Handle { bytes: 8, kind: 0, id: 0 }, 0i32);
    let (handle_at, mount_at) = (&raw mut handle, &raw mut mount);
    let (nr, dir) = (libc::SYS_name_to_handle_at, dir.as_raw_fd());
    // SAFETY: a NUL-terminated name, and a handle with room for the 8 bytes that it announces.
    let rc = unsafe { libc::syscall(nr, dir, name, handle_at, mount_at, 0) };
    assert_eq!(rc, 0, "name_to_handle_at: {}", io::Error::last_os_error());
    handle.id
}

fn inotify(dir: &Path) -> OwnedFd {
    let path = CString::new(dir.as_os_str().as_bytes()).expect("no NUL");
    let mask = libc::IN_CREATE | libc::IN_DELETE | libc::IN_ONLYDIR;
    // SAFETY: a NUL-terminated path; the descriptor is new, hence ours.
    unsafe {
        let fd = libc::inotify_init1(libc::IN_CLOEXEC);
        assert!(fd >= 0, "inotify: {}", io::Error::last_os_error());
        let wd = libc::inotify_add_watch(fd, path.as_ptr(), mask);
        assert!(wd >= 0, "inotify watch: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

/// A netlink socket and the one batch that it sends, of which only type and key change.
struct Socket {
    fd: OwnedFd,
    kind: Kind,
    batch: Vec<u8>,
    kind_at: usize,
    key_at: usize,
}

impl Socket {
    fn new(kind: Kind) -> Socket {
        let batch = batch(kind, &[0]);
        // the first message is the beginning, and behind the key stands the end
        Socket { fd: netlink(), kind, kind_at: 20 + 4, key_at: batch.len() - 20 - 8, batch }
    }

    /// Adds or deletes one element; panics where the kernel refuses.
    fn change(&mut self, kind: u16, key: u64) {
        let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
        self.batch[self.kind_at..self.kind_at + 2].copy_from_slice(&kind.to_ne_bytes());
        self.batch[self.key_at..self.key_at + 8].copy_from_slice(&key.to_ne_bytes());
        transact(&self.fd, &self.batch);
    }

    fn add(&mut self, keys: &[u64]) {
        transact(&self.fd, &batch(self.kind, keys));
    }
}

/// A transaction that adds elements. The key stands last in each.
fn batch(kind: Kind, keys: &[u64]) -> Vec<u8> {
    let mut batch = Vec::new();
    message(&mut batch, NFNL_MSG_BATCH_BEGIN, 0, [0, 0, 0, NFNL_SUBSYS_NFTABLES as u8], &[]);
    let element = |key: &u64| {
        let value = attribute(NFTA_DATA_VALUE, &key.to_ne_bytes());
        let key = attribute(NFTA_SET_ELEM_KEY | NLA_F_NESTED, &value);
        let code = attribute(NFTA_VERDICT_CODE, &NFT_GOTO.to_be_bytes());
        let chain = attribute(NFTA_VERDICT_CHAIN, b"taken\0");
        let verdict = attribute(NFTA_DATA_VERDICT | NLA_F_NESTED, &[code, chain].concat());
        let data = attribute(NFTA_SET_ELEM_DATA | NLA_F_NESTED, &verdict);
        let data = if kind == Kind::VerdictMap { data } else { Vec::new() };
        attribute(NFTA_LIST_ELEM | NLA_F_NESTED, &[data, key].concat())
    };
    let elements: Vec<u8> = keys.iter().flat_map(element).collect();
    let table = [kind.name().as_bytes(), &[0]].concat();
    let body = [
        attribute(NFTA_SET_ELEM_LIST_TABLE, &table),
        attribute(NFTA_SET_ELEM_LIST_SET, b"seen\0"),
        attribute(NFTA_SET_ELEM_LIST_ELEMENTS | NLA_F_NESTED, &elements),
    ];
    let flags = (libc::NLM_F_ACK | libc::NLM_F_CREATE) as u16;
    let new = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWSETELEM;
    message(&mut batch, new, flags, [NFPROTO_INET, 0, 0, 0], &body.concat());
    message(&mut batch, NFNL_MSG_BATCH_END, 0, [0, 0, 0, NFNL_SUBSYS_NFTABLES as u8], &[]);
    batch
}

/// Deletes a table, as `nft delete table inet NAME` does; panics where the kernel refuses.
pub fn delete_table(name: &str) {
    let mut batch = Vec::new();
    let bound = [0, 0, 0, NFNL_SUBSYS_NFTABLES as u8];
    message(&mut batch, NFNL_MSG_BATCH_BEGIN, 0, bound, &[]);
    let body = attribute(NFTA_TABLE_NAME, &[name.as_bytes(), &[0]].concat());
    let delete = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELTABLE;
    message(&mut batch, delete, libc::NLM_F_ACK as u16, [NFPROTO_INET, 0, 0, 0], &body);
    message(&mut batch, NFNL_MSG_BATCH_END, 0, bound, &[]);
    transact(&netlink(), &batch);
}

/// Sends a batch; panics where the kernel refuses.
fn transact(socket: &OwnedFd, batch: &[u8]) {
    let fd = socket.as_raw_fd();
    let mut answer = [0u8; 512];
    // SAFETY: reads the batch, writes within the answer.
    unsafe {
        let n = libc::send(fd, batch.as_ptr().cast(), batch.len(), 0);
        assert_eq!(n, batch.len() as isize, "send: {}", io::Error::last_os_error());
        let n = libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0);
        assert!(n >= 20, "recv: {}", io::Error::last_os_error());
    }
    let errno = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    assert_eq!(errno, 0, "a transaction was refused");
}

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + payload.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn message(batch: &mut Vec<u8>, kind: u16, flags: u16, nfgenmsg: [u8; 4], body: &[u8]) {
    batch.extend((20 + body.len() as u32).to_ne_bytes());
    batch.extend(kind.to_ne_bytes());
    batch.extend((libc::NLM_F_REQUEST as u16 | flags).to_ne_bytes());
    batch.extend([0; 8]);
    batch.extend(nfgenmsg);
    batch.extend(body);
}

fn address() -> libc::sockaddr_nl {
    // SAFETY: plain integers, for which zero is valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK as _;
    address
}

fn set(socket: &OwnedFd, option: i32, value: i32) {
    let (at, size) = ((&raw const value).cast(), size_of::<i32>() as libc::socklen_t);
    // SAFETY: reads one live integer.
    let rc = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, at, size) };
    assert_eq!(rc, 0, "setsockopt: {}", io::Error::last_os_error());
}

/// Nanoseconds on a CPU, of a process.
pub fn schedstat(path: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("unable to read {path}: {e}"));
    let first = text.split(' ').next().and_then(|n| n.parse().ok());
    first.expect("a number of nanoseconds")
}
