//! One daemon a network namespace. The lock is an abstract unix socket: it belongs to the network
//! namespace as the table does, needs no file, and is gone with the process, however it ends.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use crate::error::{Error, Result};
use crate::log;

const NAME: &[u8] = b"cgtproxy";

/// The lock; `None` inside where it could not be had but must not keep us from running.
pub struct Instance(Option<UnixListener>);

impl Instance {
    /// Errors: another instance runs; its pid is said.
    pub fn claim() -> Result<Instance> {
        let refused = |e: std::io::Error| Error::State(format!("unable to lock the instance: {e}"));
        let name = SocketAddr::from_abstract_name(NAME).map_err(refused)?;
        match UnixListener::bind_addr(&name) {
            Ok(listener) => {
                listener.set_nonblocking(true).map_err(refused)?;
                Ok(Instance(Some(listener)))
            }
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => match holder() {
                // any user may bind an abstract name: that must not keep root's daemon down
                Some((pid, uid)) if uid != 0 && uid != geteuid().as_raw() => {
                    log!(
                        Warning,
                        "pid {pid} of uid {uid} holds our lock, going on without"
                    );
                    Ok(Instance(None))
                }
                Some((pid, _)) => Err(Error::State(format!("already running with pid {pid}"))),
                None => Err(Error::State("already running".into())),
            },
            Err(e) => Err(refused(e)),
        }
    }

    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|listener| listener.as_fd())
    }

    /// Hangs up on whoever connected: to have connected is all they need (see `holder`).
    pub fn dismiss(&self) {
        if let Some(listener) = &self.0 {
            let _ = listener.accept();
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
