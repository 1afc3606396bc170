//! One daemon a network namespace. The lock is an nf_tables object (see `nft::lock`): it belongs to
//! the network namespace as the table does, needs no file, is gone with the process however it
//! ends, and without CAP_NET_ADMIN here nobody can take it, fake it, or keep anybody waiting.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags};
use nix::time::{clock_gettime, ClockId};

use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::log;
use crate::nft::lock::Lock;
use crate::nft::table::TABLE;
use crate::signals::Signals;

/// How long another instance is waited for, in case it is about to end as in a restart; how long
/// where it has been told to and did not get to it yet; and how often it is looked at.
const PATIENCE: Duration = Duration::from_secs(2);
const LONG_PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: u8 = 5; // milliseconds

/// Takes the lock for as long as `kernel` lives, and sees to it that nobody owns the table. Waits
/// shortly for another instance to end.
///
/// Returns what the lock said before; `None` where the end is wanted first. Errors: another instance
/// runs; its pid is said. Somebody else owns a table of our name.
pub fn claim(kernel: &mut Kernel, signals: &mut Signals) -> Result<Option<Option<Lock>>> {
    let start = Instant::now();
    let mut before = kernel.lock()?;
    while let Some(pid) = try_claim(kernel)? {
        let patience = if told_to_end(pid) { LONG_PATIENCE } else { PATIENCE };
        if start.elapsed() > patience {
            return Err(Error::State(format!("already running{}", with_pid(pid))));
        }
        if is_ended(signals)? {
            return Ok(None);
        }
        before = kernel.lock()?;
    }
    // the socket of the last one may be about to be closed
    while let Some(Some(owner)) = kernel.table_owner()? {
        if start.elapsed() > PATIENCE {
            give_back(kernel, before);
            let why =
                format!("table inet {TABLE} is owned by another process (netlink port {owner})");
            return Err(Error::State(why));
        }
        if is_ended(signals)? {
            give_back(kernel, before);
            return Ok(None);
        }
    }
    Ok(Some(before))
}

/// Waits for a moment, or until a signal comes; whether the end is wanted.
fn is_ended(signals: &mut Signals) -> Result<bool> {
    // refused or not, the end is looked at, and the patience of who asks ends
    let _ = poll(&mut [PollFd::new(signals.fd(), PollFlags::POLLIN)], PAUSE);
    Ok(signals.end()?.is_some())
}

/// Takes the lock, or says who has it.
pub fn try_claim(kernel: &mut Kernel) -> Result<Option<i32>> {
    if let Some(pid) = holder(kernel)? {
        return Ok(Some(pid));
    }
    match kernel.set_lock(Lock::Held(std::process::id() as i32)) {
        Ok(()) => Ok(None),
        // somebody was faster
        Err(error) if error.errno() == Some(Errno::EPERM) => Ok(holder(kernel)?.or(Some(0))),
        Err(error) => Err(error),
    }
}

/// Gives the lock back and notes when: what is in force stays so, but nobody keeps it in step. The
/// next one waits until the table has no owner, so this is to be the last but for the end.
pub fn leave(kernel: &mut Kernel) {
    give_back(kernel, Some(Lock::Left(since_boot())));
}

/// Lets the lock say again when the last one left, if it did. (Held ones go with `kernel`.)
pub fn give_back(kernel: &mut Kernel, before: Option<Lock>) {
    if let Some(lock @ Lock::Left(_)) = before {
        if let Err(error) = kernel.set_lock(lock) {
            log!(Debug, "{error}");
        }
    }
}

/// The pid of the process that holds the lock; 0 where it does not say.
pub fn holder(kernel: &mut Kernel) -> Result<Option<i32>> {
    Ok(match kernel.lock()? {
        Some(Lock::Held(pid)) => Some(pid),
        Some(Lock::Left(_)) | None => None,
    })
}

/// ` with pid N`, where it is known.
pub fn with_pid(pid: i32) -> String {
    match pid {
        0 => String::new(),
        pid => format!(" with pid {pid}"),
    }
}

/// Seconds since boot, which what the kernel holds does not outlive.
pub fn since_boot() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| time.tv_sec() as u64)
}

/// Whether a process has not taken yet one of the signals that end a daemon.
fn told_to_end(pid: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().filter_map(|line| {
        let set = line.strip_prefix("ShdPnd:").or(line.strip_prefix("SigPnd:"))?;
        u64::from_str_radix(set.trim(), 16).ok()
    });
    let ends = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR2].map(|signal| 1 << (signal - 1));
    pending.fold(0, |all, set| all | set) & ends.iter().sum::<u64>() != 0
}
