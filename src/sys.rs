//! System calls that nix does not wrap or wraps too widely, and all `unsafe` of this program but the
//! allocator's. No policy here: each function is one call with its arguments checked, and returns the
//! errno untouched.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{open, AtFlags, OFlag};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::{fstatat, Mode};
use nix::NixPath;

use crate::bpf;

/// A handle on the directory `path` that serves as a base for look-ups and nothing else (O_PATH).
pub fn open_path(path: &CStr) -> Result<OwnedFd, Errno> {
    open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// The cgroup v2 id of the directory `path`, looked up from `base`: 64 bits, host order, as
/// `socket cgroupv2` compares it.
///
/// Not `st_ino`, which is only its low half on 32-bit kernels. kernfs hands the id out as a file
/// handle of type `FILEID_KERNFS` (0xfe) and 8 bytes (name_to_handle_at(2), fs/kernfs/mount.c).
///
/// Errors: ENOENT where the cgroup is gone; EOPNOTSUPP (also for a handle of another type) where
/// `path` is not on cgroup2.
pub fn cgroup_id(base: BorrowedFd, path: &[u8]) -> Result<u64, Errno> {
    cgroup_handle(base, path).map(|(id, _)| id)
}

/// The same, with the id of the mount that `path` is in, as mountinfo has it.
pub fn cgroup_handle(base: BorrowedFd, path: &[u8]) -> Result<(u64, i32), Errno> {
    const FILEID_KERNFS: libc::c_int = 0xfe;
    #[repr(C)]
    struct Handle {
        bytes: libc::c_uint,
        kind: libc::c_int,
        id: [u8; 8],
    }
    let mut handle = Handle { bytes: 8, kind: 0, id: [0; 8] };
    let mut mount: libc::c_int = 0;
    // SAFETY: path is NUL-terminated; handle is a struct file_handle with room for `bytes` bytes,
    // and the kernel writes no more than that.
    let rc = path.with_nix_path(|path| unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            base.as_raw_fd(),
            path.as_ptr(),
            &mut handle as *mut Handle,
            &mut mount as *mut libc::c_int,
            0,
        )
    })?;
    match Errno::result(rc) {
        Ok(_) if handle.kind == FILEID_KERNFS && handle.bytes == 8 => {
            Ok((u64::from_ne_bytes(handle.id), mount))
        }
        Ok(_) | Err(Errno::EOVERFLOW) => Err(Errno::EOPNOTSUPP),
        Err(errno) => Err(errno),
    }
}

/// What fstatat(2) says of a directory.
pub struct Directory {
    /// `st_ino`: on kernfs the lower 32 bits of the id, on 64-bit kernels all of it.
    pub inode: u64,
    /// `st_nlink`: on kernfs two, and one for each subdirectory.
    pub links: u64,
    /// `st_uid`
    pub owner: u32,
    /// `st_ctime`, since the epoch: on kernfs when it was first looked up, which whoever puts
    /// anything into it does, or when it was last given away.
    pub changed: Duration,
}

/// Looks at a directory from `base`, without following a symlink at its end (fstatat(2)).
pub fn directory(base: BorrowedFd, path: &[u8]) -> Result<Directory, Errno> {
    let st = fstatat(base, path, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    #[allow(clippy::unnecessary_cast)] // both types differ by architecture
    Ok(Directory {
        inode: st.st_ino as u64,
        links: st.st_nlink as u64,
        owner: st.st_uid,
        changed: Duration::new(st.st_ctime.max(0) as u64, st.st_ctime_nsec.max(0) as u32),
    })
}

/// Ends the watch of a number, of which nix makes no watch again (inotify_rm_watch(2)). Errors:
/// EINVAL where the kernel ended it already.
pub fn inotify_rm_watch(inotify: BorrowedFd, wd: i32) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    Errno::result(unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), wd) }).map(drop)
}

/// Sets an integer socket option that nix has no name for (setsockopt(2)).
pub fn set_option(fd: BorrowedFd, level: i32, name: i32, value: i32) -> Result<(), Errno> {
    set(fd, level, name, &value)
}

fn set<T>(fd: BorrowedFd, level: i32, name: i32, value: &T) -> Result<(), Errno> {
    let size = size_of::<T>() as libc::socklen_t;
    let value = std::ptr::from_ref(value).cast();
    // SAFETY: the kernel reads one value of that size; what a filter's points to outlives the call.
    Errno::result(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value, size) }).map(drop)
}

/// Attaches a classic BPF program that sees each packet before it is queued (SO_ATTACH_FILTER of
/// socket(7), include/uapi/linux/filter.h).
pub fn attach_filter(fd: BorrowedFd, program: &[libc::sock_filter]) -> Result<(), Errno> {
    set(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &fprog(program))
}

/// A program as the kernel takes it, which copies its instructions.
fn fprog(program: &[libc::sock_filter]) -> libc::sock_fprog {
    let len = program.len() as libc::c_ushort;
    libc::sock_fprog { len, filter: program.as_ptr().cast_mut() }
}

/// Receives one netlink datagram into `buf`: its whole length, more than `buf` has where it was cut,
/// and the sender's port, 0 for the kernel (recvfrom(2), netlink(7)).
pub fn receive_netlink(fd: BorrowedFd, buf: &mut [u8]) -> Result<(usize, u32), Errno> {
    // SAFETY: plain integers; all zeroes is a valid address.
    let mut sender: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    let mut size = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the kernel writes within `buf` and `sender`, whose sizes it is given.
    let length = unsafe {
        libc::recvfrom(
            fd.as_raw_fd(),
            buf.as_mut_ptr().cast(),
            buf.len(),
            libc::MSG_TRUNC,
            (&raw mut sender).cast(),
            &mut size,
        )
    };
    Ok((Errno::result(length)? as usize, sender.nl_pid))
}

/// Takes over a descriptor that the caller was given by number (`--ready-fd`).
///
/// Errors: EBADF where it is not open; EINVAL for standard input, output and error, which stay
/// in use.
pub fn adopt_fd(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd < 3 {
        return Err(Errno::EINVAL);
    }
    // SAFETY: fcntl with F_SETFD has no memory effects; it fails with EBADF for a closed fd.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: the descriptor is open (checked above) and was handed over on the command line before
    // this process opened any of its own, so nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

/// Of this process; `_LINUX_CAPABILITY_VERSION_3` of include/uapi/linux/capability.h: two words a set.
const CAP_HEADER: CapHeader = CapHeader { version: 0x2008_0522, pid: 0 };

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Capabilities of include/uapi/linux/capability.h, as bits of a set.
pub const CAP_DAC_READ_SEARCH: u64 = 1 << 2;
pub const CAP_NET_ADMIN: u64 = 1 << 12;

/// Bits of the effective capability set (capget(2)).
pub fn effective_capabilities() -> Result<u64, Errno> {
    let mut header = CAP_HEADER;
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 makes the kernel write exactly two elements of data.
    let rc = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    Errno::result(rc)?;
    Ok(u64::from(data[0].effective) | u64::from(data[1].effective) << 32)
}

/// Reduces the permitted and effective sets to `keep`, empties the others, and locks the
/// securebits so that no exec by root brings anything back (capabilities(7)).
///
/// The bounding set and the securebits need CAP_SETPCAP; without it there is nothing to regain.
pub fn limit_capabilities(keep: u64) -> Result<(), Errno> {
    const CAP_LAST: libc::c_ulong = 63;
    // noroot, no_setuid_fixup, keep_caps off, no_cap_ambient_raise, each with its lock
    const SECUREBITS: libc::c_ulong = 0b1110_1111;
    // SAFETY: prctl with these options takes integers only.
    unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0);
        for cap in 0..=CAP_LAST {
            libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0);
        }
    }
    let half = |shift: u32| {
        let bits = (keep >> shift) as u32;
        CapData { effective: bits, permitted: bits, inheritable: 0 }
    };
    let data = [half(0), half(32)];
    let mut header = CAP_HEADER;
    // SAFETY: version 3 makes the kernel read exactly two elements of data.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    Errno::result(rc).map(drop)
}

/// Lets a write beyond RLIMIT_FSIZE be refused (EFBIG) instead of ending the program by SIGXFSZ.
pub fn ignore_file_size_signal() {
    // SAFETY: no handler is installed, so nothing runs.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// From here on any system call that is not in `allowed`, or of another architecture's table than
/// `arch`, kills the process, and the kernel logs which it was (seccomp(2)).
///
/// Errors: EINVAL or ENOSYS where the kernel has no seccomp filters.
pub fn seccomp_allow(arch: u32, allowed: &[libc::c_long]) -> Result<(), Errno> {
    // offsets in struct seccomp_data of include/uapi/linux/seccomp.h
    const NR: u32 = 0;
    const ARCH: u32 = 4;
    let load = |at| bpf::load(libc::BPF_W, at);
    let kill = bpf::answer(libc::SECCOMP_RET_KILL_PROCESS);
    let mut program = vec![load(ARCH), bpf::equal(arch, 1, 0), kill, load(NR)];
    for number in allowed {
        program.push(bpf::equal(*number as u32, 0, 1));
        program.push(bpf::answer(libc::SECCOMP_RET_ALLOW));
    }
    program.push(kill);
    let fprog = fprog(&program);
    // SAFETY: the kernel copies `len` instructions and keeps no pointer.
    let rc = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const fprog)
    };
    Errno::result(rc).map(drop)
}

/// Whether SIGPIPE was ignored when the program began, as systemd has it: Rust's runtime ignores it
/// before main, whatever it was.
static PIPE_IGNORED: AtomicBool = AtomicBool::new(false);

#[used]
#[link_section = ".init_array"]
static BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn look() {
        // SAFETY: all zeros is a struct sigaction, and the call writes no more than one.
        let now = unsafe {
            let mut now: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGPIPE, std::ptr::null(), &mut now);
            now.sa_sigaction
        };
        PIPE_IGNORED.store(now == libc::SIG_IGN, Ordering::Relaxed);
    }
    look
};

/// Has a command begin with SIGPIPE as this program did.
pub fn pass_sigpipe_on(command: &mut Command) {
    if PIPE_IGNORED.load(Ordering::Relaxed) {
        let ignore = || {
            // SAFETY: no handler is installed, so nothing runs.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
            Ok(())
        };
        // SAFETY: the hook makes one system call.
        unsafe { command.pre_exec(ignore) };
    }
}

/// Whether CAP_NET_ADMIN is in effect; true too where that cannot be told.
pub fn has_net_admin() -> bool {
    effective_capabilities().map_or(true, |set| set & CAP_NET_ADMIN != 0)
}

/// How many lines and columns the terminal on `fd` shows (ioctl_tty(2)). Errors: ENOTTY.
pub fn terminal_size(fd: BorrowedFd) -> Result<(usize, usize), Errno> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one struct winsize.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) })?;
    Ok((size.ws_row.into(), size.ws_col.into()))
}

/// Now, as broken-down local time (localtime_r(3)); 1900 where there is no saying.
pub fn local_time() -> libc::tm {
    // SAFETY: all zeros is a struct tm; localtime_r writes no more than one, and keeps no pointer.
    unsafe {
        let now = libc::time(std::ptr::null_mut());
        let mut at = std::mem::zeroed();
        libc::localtime_r(&now, &mut at);
        at
    }
}

/// Whether a write of up to `PIPE_BUF` bytes to `fd` would not block now (poll(2), no waiting).
pub fn writable_now(fd: BorrowedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    let _ = poll(&mut fds, PollTimeout::ZERO);
    fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLOUT))
}
