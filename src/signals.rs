//! Signals as wishes: however many came, each is looked at once, and the end comes first.
//! Source: signalfd(2).

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::error::{Error, Result};

/// What ends the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// SIGTERM and SIGINT: what is in force goes.
    Stop,
    /// SIGUSR2: it stays.
    Leave,
}

/// The signals that the daemon takes, and those that have not been answered yet.
pub struct Signals {
    fd: SignalFd,
    end: Option<End>,
    reload: bool,
    status: bool,
}

impl Signals {
    /// Blocks them, so that from here on none is lost or kills.
    pub fn block() -> Result<Signals> {
        let signals =
            [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2];
        let (fd, _) = receive(&signals)?;
        Ok(Signals { fd, end: None, reload: false, status: false })
    }

    /// The descriptor to poll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether it is to end, as of now. Who wants things left in force has another instance about to
    /// take them over, whatever else is wanted.
    pub fn end(&mut self) -> Result<Option<End>> {
        loop {
            let signal = match self.fd.read_signal() {
                Ok(None) => return Ok(self.end),
                Ok(Some(info)) => Signal::try_from(info.ssi_signo as i32),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(Error::system("unable to read signals", errno)),
            };
            match signal {
                Ok(Signal::SIGHUP) => self.reload = true,
                Ok(Signal::SIGUSR1) => self.status = true,
                Ok(Signal::SIGUSR2) => self.end = Some(End::Leave),
                // an unknown number is taken for SIGTERM, which cannot happen
                _ => self.end = self.end.or(Some(End::Stop)),
            }
        }
    }

    /// Whether some have been taken and not been answered: the descriptor does not tell of them again.
    pub fn pending(&self) -> bool {
        self.end.is_some() || self.reload || self.status
    }

    /// Whether a reload is wanted, once.
    pub fn reload(&mut self) -> bool {
        std::mem::take(&mut self.reload)
    }

    /// Whether a line about the status is wanted, once.
    pub fn status(&mut self) -> bool {
        std::mem::take(&mut self.status)
    }
}

/// Has these signals told of by a descriptor instead of being delivered.
pub fn receive(signals: &[Signal]) -> Result<(SignalFd, SigSet)> {
    let refused = |errno| Error::system("unable to receive signals", errno);
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block().map_err(refused)?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok((SignalFd::with_flags(&set, flags).map_err(refused)?, set))
}
