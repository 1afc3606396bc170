//! One daemon a network namespace. The lock is an abstract unix socket: it belongs to the network
//! namespace as the table does, needs no file, and is gone with the process, however it ends.

use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use crate::error::{Error, Result};
use crate::log;

const NAME: &[u8] = b"cgtproxy";

/// How long one that is about to end is waited for, as in a restart, and how often it is looked at.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

/// The lock.
pub struct Instance {
    /// `None` where it could not be had but must not keep us from running.
    listener: Option<UnixListener>,
    /// Accepting failed (no descriptors): a connection stays queued, and must not wake us again
    /// and again.
    deaf: Cell<bool>,
}

impl Instance {
    /// Waits shortly for another instance to end.
    ///
    /// Errors: another instance runs; its pid is said.
    pub fn claim() -> Result<Instance> {
        let start = Instant::now();
        loop {
            match Instance::try_claim() {
                Err(_) if start.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
                other => return other,
            }
        }
    }

    fn try_claim() -> Result<Instance> {
        let with = |listener| Instance { listener, deaf: Cell::new(false) };
        let refused = |e: std::io::Error| Error::State(format!("unable to lock the instance: {e}"));
        let name = SocketAddr::from_abstract_name(NAME).map_err(refused)?;
        match UnixListener::bind_addr(&name) {
            Ok(listener) => {
                listener.set_nonblocking(true).map_err(refused)?;
                Ok(with(Some(listener)))
            }
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => match holder() {
                // any user may bind an abstract name: that must not keep root's daemon down
                Some((pid, uid)) if uid != 0 && uid != geteuid().as_raw() => {
                    log!(Warning, "pid {pid} of uid {uid} holds our lock, going on without");
                    Ok(with(None))
                }
                Some((pid, _)) => Err(Error::State(format!("already running with pid {pid}"))),
                None => Err(Error::State("already running".into())),
            },
            Err(e) => Err(refused(e)),
        }
    }

    /// The descriptor to poll; none for one round after accepting has failed.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        let listener = self.listener.as_ref();
        listener.filter(|_| !self.deaf.take()).map(AsFd::as_fd)
    }

    /// Hangs up on whoever connected: to have connected is all they need (see `holder`).
    pub fn dismiss(&self) {
        if let Some(listener) = &self.listener {
            let accepted = listener.accept();
            let none = |e: &std::io::Error| e.kind() == std::io::ErrorKind::WouldBlock;
            self.deaf.set(accepted.is_err_and(|e| !none(&e)));
        }
    }
}

/// Pid and uid of the process that holds the lock.
pub fn holder() -> Option<(i32, u32)> {
    let name = SocketAddr::from_abstract_name(NAME).ok()?;
    let stream = UnixStream::connect_addr(&name).ok()?;
    let peer = getsockopt(&stream, PeerCredentials).ok()?;
    Some((peer.pid(), peer.uid()))
}
