//! Telling a supervisor how far we are: sd_notify(3) by hand, and the newline on `--ready-fd`.
//! A failure is told once, and then not ours to care about: the supervisor will notice.

use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::errno::Errno;
use nix::time::{clock_gettime, ClockId};

use crate::error::{errno, reason};
use crate::log;
use crate::log::Escaped;
use crate::sys;

pub struct Notify {
    socket: Option<UnixDatagram>,
    ready_fd: Option<OwnedFd>,
}

impl Notify {
    /// Takes `NOTIFY_SOCKET` (a path, or an abstract name behind `@`) from the environment.
    pub fn new(ready_fd: Option<OwnedFd>) -> Notify {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let socket = name.and_then(|name| {
            let told = connect(&name).inspect_err(|e| {
                let name = Escaped(name.as_bytes());
                log!(Warning, "unable to tell NOTIFY_SOCKET {name} of anything: {e}")
            });
            told.ok()
        });
        Notify { socket, ready_fd }
    }

    /// In force: said once on the ready descriptor, which is closed, and each time to the socket.
    pub fn ready(&mut self) {
        self.send("READY=1");
        if let Some(fd) = self.ready_fd.take() {
            let written = match sys::writable_now(fd.as_fd()) {
                true => std::fs::File::from(fd).write_all(b"\n"),
                // a pipe that is full would have us wait
                false => Err(Errno::EAGAIN.into()),
            };
            if let Err(error) = written {
                log!(Warning, "unable to write to --ready-fd: {}", reason(errno(&error)));
            }
        }
    }

    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
            .map_or(0, |t| t.tv_sec() as u64 * 1_000_000 + t.tv_nsec() as u64 / 1000);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={now}"));
    }

    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, state: &str) {
        if let Some(socket) = &self.socket {
            let _ = socket.send(state.as_bytes());
        }
    }
}

fn connect(name: &OsStr) -> std::io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        path if path.starts_with(b"/") => SocketAddr::from_pathname(name),
        _ => Err(std::io::Error::other("neither a path nor an abstract name")),
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address?)?;
    Ok(socket)
}
