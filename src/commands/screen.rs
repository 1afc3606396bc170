//! A terminal that shows one picture after the other: its size, the keys that are typed there, and
//! the signals that come in between. It is left as it was found. Where standard output is none, the
//! pictures follow one another.
//! Source: termios(3), ioctl_tty(2), signalfd(2).

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{raise, SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::termios::{tcgetattr, tcsetattr, LocalFlags, SetArg, Termios};
use nix::unistd::{getpgrp, tcgetpgrp};

use super::table::Style;
use crate::error::{Error, Result};
use crate::signals;
use crate::sys;

pub struct Screen {
    terminal: Option<Terminal>,
    /// The picture that is shown.
    shown: String,
}

/// What wants to be undone at the end.
struct Terminal {
    signals: SignalFd,
    set: SigSet,
    /// How it was before keys came one by one; `None` where they do not.
    before: Option<Termios>,
    /// Standard input has no more of them.
    closed: bool,
}

impl Screen {
    pub fn open(style: Style) -> Result<Screen> {
        let terminal = match style.terminal {
            true => Some(Terminal::open()?),
            false => None,
        };
        Ok(Screen { terminal, shown: String::new() })
    }

    /// Shows a picture in the place of the one before, as far as it fits; false where the reader has
    /// gone.
    pub fn show(&mut self, picture: String) -> Result<bool> {
        self.shown = picture;
        match self.terminal {
            None => super::write(&format!("{}\n", self.shown)),
            Some(_) => {
                // a terminal that does not know its size has 0 lines
                let size = sys::terminal_size(std::io::stdout().as_fd()).unwrap_or((0, 0));
                // home, then clear what is below: the scroll-back stays
                super::write(&format!("\x1b[H\x1b[J{}", fit(&self.shown, size)))
            }
        }
    }

    /// Waits for so long, showing the picture anew where the terminal has another size; false where
    /// somebody has seen enough.
    pub fn wait(&mut self, time: Duration) -> Result<bool> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Some(terminal) = &mut self.terminal else {
                std::thread::sleep(left);
                return Ok(true);
            };
            match terminal.wait(left)? {
                None => return Ok(true),
                Some(Wish::Quit) => return Ok(false),
                Some(Wish::Redraw) => {
                    let picture = std::mem::take(&mut self.shown);
                    if !self.show(picture)? {
                        return Ok(false);
                    }
                }
                Some(Wish::None) => {}
            }
        }
    }
}

enum Wish {
    None,
    Redraw,
    Quit,
}

impl Terminal {
    fn open() -> Result<Terminal> {
        let (signals, set) = signals::receive(&[
            Signal::SIGWINCH,
            Signal::SIGCONT,
            Signal::SIGINT,
            Signal::SIGTERM,
            Signal::SIGHUP,
            Signal::SIGQUIT,
        ])?;
        let mut terminal = Terminal { signals, set, before: None, closed: false };
        terminal.take_keys();
        Ok(terminal)
    }

    /// Has keys come one by one, unseen. Not in the background, where that would stop us.
    fn take_keys(&mut self) {
        let input = std::io::stdin();
        let ours = tcgetpgrp(&input).is_ok_and(|group| group == getpgrp());
        let Some(now) = ours.then(|| tcgetattr(&input).ok()).flatten() else {
            return;
        };
        let mut wanted = now.clone();
        wanted.local_flags.remove(LocalFlags::ICANON | LocalFlags::ECHO);
        if tcsetattr(&input, SetArg::TCSANOW, &wanted).is_ok() {
            self.before = Some(self.before.take().unwrap_or(now));
        }
    }

    fn give_back(&mut self) {
        if let Some(before) = self.before.take() {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &before);
        }
    }

    /// What somebody wants, until `left` is over.
    fn wait(&mut self, left: Duration) -> Result<Option<Wish>> {
        let input = std::io::stdin();
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if self.before.is_some() && !self.closed {
            fds.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        // not before it is due
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1));
        match poll(&mut fds, timeout.unwrap_or(PollTimeout::ZERO)) {
            Ok(0) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::system("unable to wait", errno)),
        }
        let typed = fds.get(1).and_then(PollFd::revents).is_some_and(|events| !events.is_empty());
        if typed {
            let mut keys = [0; 64];
            match nix::unistd::read(input.as_fd(), &mut keys) {
                Ok(0) => self.closed = true,
                Ok(n) if keys[..n].iter().any(|key| b"qQ\x04".contains(key)) => {
                    return Ok(Some(Wish::Quit))
                }
                Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
                // the terminal is gone
                Err(_) => return Ok(Some(Wish::Quit)),
            }
        }
        match self.signals.read_signal() {
            Ok(Some(info)) => match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGWINCH) => Ok(Some(Wish::Redraw)),
                Ok(Signal::SIGCONT) => {
                    // the shell has taken it meanwhile
                    self.take_keys();
                    Ok(Some(Wish::Redraw))
                }
                Ok(signal) => {
                    self.end_by(signal);
                    Ok(Some(Wish::Quit))
                }
                Err(_) => Ok(Some(Wish::None)),
            },
            Ok(None) | Err(Errno::EINTR) => Ok(Some(Wish::None)),
            Err(errno) => Err(Error::system("unable to read signals", errno)),
        }
    }

    /// Ends as the signal would have ended us, so that a shell sees that.
    fn end_by(&mut self, signal: Signal) {
        self.give_back();
        let _ = self.set.thread_unblock();
        let _ = raise(signal);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// What of a picture fits on so many lines and columns, of which 0 means any number.
fn fit(picture: &str, (lines, columns): (usize, usize)) -> String {
    let lines = if lines > 1 { lines - 1 } else { usize::MAX };
    let columns = if columns > 0 { columns } else { usize::MAX };
    let mut out = String::new();
    for line in picture.lines().take(lines) {
        out += &cut(line, columns);
        out.push('\n');
    }
    out
}

/// A line's first characters; colours take no room, and what was cut behind is not coloured.
fn cut(line: &str, columns: usize) -> String {
    let (mut out, mut room, mut escape) = (String::new(), columns, false);
    for c in line.chars() {
        match c {
            '\x1b' => escape = true,
            _ if escape => escape = c != 'm',
            _ if room == 0 => continue,
            _ => room -= 1,
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_fits() {
        let picture = "one line\ntwo\nthree\n";
        assert_eq!(fit(picture, (0, 0)), picture);
        assert_eq!(fit(picture, (24, 80)), picture);
        assert_eq!(fit(picture, (3, 4)), "one \ntwo\n");
        assert_eq!(fit("é mihomo\n", (9, 3)), "é m\n");
        assert_eq!(fit("\x1b[1mTARGET\x1b[0m  x\n", (9, 3)), "\x1b[1mTAR\x1b[0m\n");
        assert_eq!(fit("\x1b[1mTARGET\x1b[0m  x\n", (9, 7)), "\x1b[1mTARGET\x1b[0m \n");
        assert_eq!(fit("10m 10m\n", (9, 3)), "10m\n");
    }
}
