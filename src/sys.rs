//! System calls that nix does not wrap, and all `unsafe` of this program. No policy here: each
//! function is one call with its arguments checked, and returns the errno untouched.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// The cgroup v2 id of the directory `path`: 64 bits, host order, as `socket cgroupv2` compares it.
///
/// Not `st_ino`, which is only its low half on 32-bit kernels. kernfs hands the id out as a file
/// handle of type `FILEID_KERNFS` (0xfe) and 8 bytes (name_to_handle_at(2), fs/kernfs/mount.c).
///
/// Errors: ENOENT where the cgroup is gone; EOPNOTSUPP (also for a handle of another type) where
/// `path` is not on cgroup2.
pub fn cgroup_id(path: &CStr) -> Result<u64, Errno> {
    const FILEID_KERNFS: libc::c_int = 0xfe;
    #[repr(C)]
    struct Handle {
        bytes: libc::c_uint,
        kind: libc::c_int,
        id: [u8; 8],
    }
    let mut handle = Handle {
        bytes: 8,
        kind: 0,
        id: [0; 8],
    };
    let mut mount: libc::c_int = 0;
    // SAFETY: path is NUL-terminated; handle is a struct file_handle with room for `bytes` bytes,
    // and the kernel writes no more than that.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            libc::AT_FDCWD,
            path.as_ptr(),
            &mut handle as *mut Handle,
            &mut mount as *mut libc::c_int,
            0,
        )
    };
    match Errno::result(rc) {
        Ok(_) if handle.kind == FILEID_KERNFS && handle.bytes == 8 => {
            Ok(u64::from_ne_bytes(handle.id))
        }
        Ok(_) | Err(Errno::EOVERFLOW) => Err(Errno::EOPNOTSUPP),
        Err(errno) => Err(errno),
    }
}

/// `st_nlink` of a directory, without following a symlink at its end (lstat(2)). On kernfs: two,
/// and one for each subdirectory.
pub fn nlink(path: &CStr) -> Result<u64, Errno> {
    let mut st = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: path is NUL-terminated; st has the size and alignment that lstat writes.
    Errno::result(unsafe { libc::lstat(path.as_ptr(), st.as_mut_ptr()) })?;
    // SAFETY: lstat succeeded, so st is initialised.
    #[allow(clippy::unnecessary_cast)] // nlink_t differs by architecture
    Ok(unsafe { st.assume_init() }.st_nlink as u64)
}

/// A new inotify instance, close-on-exec and non-blocking (inotify_init1(2)).
///
/// Errors: EMFILE at the limit of instances (`fs.inotify.max_user_instances`) or descriptors.
pub fn inotify_init() -> Result<OwnedFd, Errno> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
    // SAFETY: a descriptor that the kernel just returned belongs to nobody else.
    Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Watches `path`; returns the watch descriptor, which is the old one where the same inode is
/// watched already (inotify_add_watch(2)).
///
/// Errors: ENOSPC at the limit of watches (`fs.inotify.max_user_watches`); ENOENT; ENOTDIR.
pub fn inotify_add_watch(inotify: BorrowedFd, path: &CStr, mask: u32) -> Result<i32, Errno> {
    // SAFETY: path is NUL-terminated.
    let wd = unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) };
    Errno::result(wd)
}

/// Ends a watch (inotify_rm_watch(2)). Errors: EINVAL where the kernel ended it already.
pub fn inotify_rm_watch(inotify: BorrowedFd, wd: i32) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    Errno::result(unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), wd) }).map(drop)
}

/// Sets an integer socket option that nix has no name for (setsockopt(2)).
pub fn set_option(fd: BorrowedFd, level: i32, name: i32, value: i32) -> Result<(), Errno> {
    // SAFETY: the option value is a valid c_int and its size is given.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&value as *const i32).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    Errno::result(rc).map(drop)
}

/// Attaches a classic BPF program that sees each packet before it is queued (SO_ATTACH_FILTER of
/// socket(7), include/uapi/linux/filter.h).
pub fn attach_filter(fd: BorrowedFd, program: &[libc::sock_filter]) -> Result<(), Errno> {
    let fprog = libc::sock_fprog {
        len: program.len() as libc::c_ushort,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions and keeps no pointer.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const fprog).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(rc).map(drop)
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

/// Bits of the effective capability set (capget(2), `_LINUX_CAPABILITY_VERSION_3`).
pub fn effective_capabilities() -> Result<u64, Errno> {
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 makes the kernel write exactly two Data elements.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_capget,
            &mut header as *mut Header,
            data.as_mut_ptr(),
        )
    };
    Errno::result(rc)?;
    Ok(u64::from(data[0].effective) | u64::from(data[1].effective) << 32)
}

/// `CAP_NET_ADMIN` of include/uapi/linux/capability.h, as a bit of a capability set.
pub const CAP_NET_ADMIN: u64 = 1 << 12;

/// Whether a write of up to `PIPE_BUF` bytes to `fd` would not block now (poll(2), no waiting).
pub fn writable_now(fd: BorrowedFd) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid pollfd is passed, with its count.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready == 1 && poll.revents & libc::POLLOUT != 0
}
