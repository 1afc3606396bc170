//! Least privilege for `run`: what the daemon gives up once the kernel is programmed. A root daemon
//! is left with CAP_NET_ADMIN and some seventy system calls.
//! Source: capabilities(7), prctl(2), seccomp(2).

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::stat::{umask, Mode};
use nix::unistd::geteuid;

use crate::error::{Error, Result};
use crate::log;
use crate::sys;

/// Errors: one line that says which capability is missing, where it is.
pub fn require_net_admin(command: &str) -> Result<()> {
    match sys::has_net_admin() {
        true => Ok(()),
        false => Err(Error::State(format!(
            "unable to {command} without CAP_NET_ADMIN: run as root or grant that capability"
        ))),
    }
}

/// The capabilities that the daemon keeps out of those that it has: CAP_NET_ADMIN, and for another
/// user than root CAP_DAC_READ_SEARCH, to which cgroup directories of mode 0700 are closed
/// otherwise (root owns those of procd).
pub fn kept_capabilities() -> Result<u64> {
    let refused = |errno| Error::system("unable to read capabilities", errno);
    let has = sys::effective_capabilities().map_err(refused)?;
    let wanted = match geteuid().is_root() {
        true => sys::CAP_NET_ADMIN,
        false => sys::CAP_NET_ADMIN | sys::CAP_DAC_READ_SEARCH,
    };
    Ok(has & wanted)
}

/// Gives up everything else. With `filter`, system calls too.
///
/// Errors: what could not be given up, so that nobody believes it was.
pub fn confine(filter: bool) -> Result<()> {
    umask(Mode::from_bits_truncate(0o077));
    // a core dump would hold addresses and names
    let refused = |what: &'static str| move |errno| Error::system(what, errno);
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused("unable to rule out core dumps"))?;
    prctl::set_dumpable(false).map_err(refused("unable to rule out core dumps"))?;
    sys::limit_capabilities(kept_capabilities()?)
        .map_err(refused("unable to give up capabilities"))?;
    prctl::set_no_new_privs().map_err(refused("unable to set no_new_privs"))?;
    if !filter {
        return Ok(());
    }
    let Some(arch) = AUDIT_ARCH else {
        log!(Notice, "no system call filter for this architecture");
        return Ok(());
    };
    match sys::seccomp_allow(arch, &ALLOWED.concat()) {
        // a kernel without seccomp filters
        Err(errno @ (Errno::EINVAL | Errno::ENOSYS)) => {
            let why = crate::error::reason(errno);
            log!(Notice, "no system call filter on this kernel: {why}");
            Ok(())
        }
        other => other.map_err(refused("unable to install the system call filter")),
    }
}

/// `AUDIT_ARCH_*` of include/uapi/linux/audit.h for this build.
const AUDIT_ARCH: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(0xc000_003e)
} else if cfg!(target_arch = "x86") {
    Some(0x4000_0003)
} else if cfg!(target_arch = "aarch64") {
    Some(0xc000_00b7)
} else if cfg!(all(target_arch = "arm", target_endian = "little")) {
    Some(0x4000_0028)
} else if cfg!(target_arch = "riscv64") {
    Some(0xc000_00f3)
} else if cfg!(all(target_arch = "mips", target_endian = "little")) {
    Some(0x4000_0008)
} else if cfg!(all(target_arch = "mips", target_endian = "big")) {
    Some(0x0000_0008)
} else {
    None
};

/// What the daemon calls from here on, and what the C library may call for it. Everything is here
/// that a reload, a repair, a log line to a restarted syslogd, a panic and the exit need.
const ALLOWED: &[&[libc::c_long]] = &[
    &[
        // the loop: waiting, signals, inotify, netlink
        libc::SYS_ppoll,
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_inotify_init1,
        libc::SYS_inotify_add_watch,
        libc::SYS_inotify_rm_watch,
        libc::SYS_name_to_handle_at,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_setsockopt,
        libc::SYS_getsockopt,
        libc::SYS_restart_syscall,
        // syslog, name services
        libc::SYS_socket,
        libc::SYS_connect,
        // files: configuration, cgroup directories, mountinfo, pidfile
        libc::SYS_openat,
        libc::SYS_fchdir,
        libc::SYS_close,
        libc::SYS_statx,
        libc::SYS_getdents64,
        libc::SYS_lseek,
        libc::SYS_fcntl,
        libc::SYS_readlinkat,
        libc::SYS_getcwd,
        libc::SYS_faccessat,
        libc::SYS_unlinkat,
        // memory, time, identity, the end
        libc::SYS_brk,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_mprotect,
        libc::SYS_madvise,
        libc::SYS_futex,
        libc::SYS_clock_gettime,
        libc::SYS_getrandom,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_getuid,
        libc::SYS_geteuid,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_tkill,
        libc::SYS_tgkill,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ],
    // 64-bit architectures
    #[cfg(target_pointer_width = "64")]
    &[libc::SYS_mmap, libc::SYS_fstat, libc::SYS_newfstatat],
    // 32-bit ones, with and without 64-bit time
    #[cfg(target_pointer_width = "32")]
    &[
        libc::SYS_mmap2,
        libc::SYS_fstat64,
        libc::SYS_lstat64,
        libc::SYS_stat64,
        FSTATAT64,
        libc::SYS__llseek,
        libc::SYS_fcntl64,
        CLOCK_GETTIME64,
        PPOLL_TIME64,
        FUTEX_TIME64,
    ],
    // architectures that have the older calls too
    #[cfg(not(any(target_arch = "aarch64", target_arch = "riscv64")))]
    &[libc::SYS_open, libc::SYS_poll, libc::SYS_readlink, libc::SYS_access, libc::SYS_unlink],
    #[cfg(target_arch = "x86_64")]
    &[libc::SYS_stat, libc::SYS_lstat],
    #[cfg(any(target_arch = "x86", target_arch = "mips"))]
    &[libc::SYS_socketcall],
    #[cfg(target_arch = "arm")]
    &[libc::SYS_geteuid32, libc::SYS_getuid32],
    #[cfg(target_arch = "x86")]
    &[libc::SYS_geteuid32, libc::SYS_getuid32],
];

// Not in every libc crate's list; the same offset on all 32-bit architectures but for MIPS's base.
#[cfg(all(target_pointer_width = "32", target_arch = "mips"))]
const BASE: libc::c_long = 4000;
#[cfg(all(target_pointer_width = "32", not(target_arch = "mips")))]
const BASE: libc::c_long = 0;
#[cfg(all(target_pointer_width = "32", target_arch = "mips"))]
const FSTATAT64: libc::c_long = BASE + 293;
#[cfg(all(target_pointer_width = "32", not(target_arch = "mips")))]
const FSTATAT64: libc::c_long = libc::SYS_fstatat64;
#[cfg(target_pointer_width = "32")]
const CLOCK_GETTIME64: libc::c_long = BASE + 403;
#[cfg(target_pointer_width = "32")]
const PPOLL_TIME64: libc::c_long = BASE + 414;
#[cfg(target_pointer_width = "32")]
const FUTEX_TIME64: libc::c_long = BASE + 422;
