//! Logging to standard error or syslog. It never blocks: a line that would have to wait is lost and
//! counted, and the count is told as soon as a line gets through again. It never decides what is
//! worth a line.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use nix::sys::socket::{send, MsgFlags};
use nix::sys::stat::fstat;
use syslog::{Facility, Severity};

use crate::error::printable;
use crate::sys;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Error,
    Warning,
    Notice,
    Info,
    Debug,
}

impl Level {
    pub const ALL: [Level; 5] =
        [Level::Error, Level::Warning, Level::Notice, Level::Info, Level::Debug];

    pub fn name(self) -> &'static str {
        ["error", "warning", "notice", "info", "debug"][self as usize]
    }

    /// This level, `steps` more talkative.
    pub fn louder(self, steps: usize) -> Level {
        Level::ALL[(self as usize).saturating_add(steps).min(Level::ALL.len() - 1)]
    }

    fn severity(self) -> Severity {
        match self {
            Level::Error => Severity::LOG_ERR,
            Level::Warning => Severity::LOG_WARNING,
            Level::Notice => Severity::LOG_NOTICE,
            Level::Info => Severity::LOG_INFO,
            Level::Debug => Severity::LOG_DEBUG,
        }
    }
}

/// Longest line, newline included: a pipe takes up to PIPE_BUF (4,096) bytes at once or not at all.
const MAX_LINE: usize = 4096;
/// Lines a second that may be written on behalf of an unprivileged user's doing, and the burst.
const RATE: u32 = 20;
const BURST: u32 = 200;

struct Log {
    level: Level,
    syslog: bool,
    /// systemd's journal reads standard error.
    journal: bool,
    socket: Option<UnixDatagram>,
    /// Lines that could not be written, not yet told.
    lost: u64,
    /// Lines held back by the rate limit, not yet told.
    held_back: u64,
    tokens: u32,
    refilled: Option<Instant>,
}

thread_local! {
    /// One thread, so one log.
    static LOG: RefCell<Log> = const {
        RefCell::new(Log {
            level: Level::Notice,
            syslog: false,
            journal: false,
            socket: None,
            lost: 0,
            held_back: 0,
            tokens: BURST,
            refilled: None,
        })
    };
}

/// Sets the least level that is written, and where to.
pub fn configure(level: Level, syslog: bool) {
    LOG.with_borrow_mut(|log| {
        log.level = level;
        log.syslog = syslog;
        log.journal = read_by_journal(io::stderr().as_fd());
        if syslog {
            // the C library reads the time zone now, not once /etc/localtime is out of reach
            let _ = sys::local_time();
        }
    });
}

/// Whether systemd's journal reads what is written to `fd`: systemd.exec(5), JOURNAL_STREAM.
pub fn read_by_journal(fd: BorrowedFd) -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let is = |stat: nix::sys::stat::FileStat| named == format!("{}:{}", stat.st_dev, stat.st_ino);
    !named.is_empty() && fstat(fd).is_ok_and(is)
}

/// A line as it is written: with its level for people and, for the journal, for its PRIORITY field
/// (sd-daemon(3)).
pub fn line(journal: bool, level: Level, text: &str) -> String {
    match journal {
        true => format!("<{}>{}: {text}\n", level.severity() as u8, level.name()),
        false => format!("{}: {text}\n", level.name()),
    }
}

/// Tells what ends a command: on standard error, unless `-s` has it in syslog and nobody sits at a
/// terminal. So a supervisor that logs standard error does not log it twice.
pub fn last_words(text: &str) {
    LOG.with_borrow_mut(|log| {
        let text = printable(text);
        let told = log.syslog && log.emit(Level::Error, &text);
        let stderr = io::stderr();
        if !told || stderr.is_terminal() {
            let _ = stderr.lock().write_all(line(log.journal, Level::Error, &text).as_bytes());
        }
    });
}

/// Whether a line of this level would be written.
pub fn enabled(level: Level) -> bool {
    LOG.with_borrow(|log| level <= log.level)
}

/// Writes a line whatever the level that is set.
pub fn write(level: Level, text: fmt::Arguments) {
    LOG.with_borrow_mut(|log| log.write(level, text));
}

/// Writes a line that an unprivileged user can bring about at will, within the rate limit.
pub fn write_limited(level: Level, text: fmt::Arguments) {
    LOG.with_borrow_mut(|log| {
        if level <= log.level && log.take_token() {
            log.write(level, text);
        }
    });
}

/// `log!(Notice, "…", …)`: formats only where the level is written at all. `log!(limited::Notice, …)`:
/// see [`write_limited`].
#[macro_export]
macro_rules! log {
    (limited::$level:ident, $($arg:tt)*) => {
        $crate::log::write_limited($crate::log::Level::$level, format_args!($($arg)*))
    };
    ($level:ident, $($arg:tt)*) => {
        if $crate::log::enabled($crate::log::Level::$level) {
            $crate::log::write($crate::log::Level::$level, format_args!($($arg)*))
        }
    };
}

impl Log {
    fn write(&mut self, level: Level, text: fmt::Arguments) {
        if self.lost > 0 {
            let lost = self.lost;
            let text = format!("{lost} log lines lost: the reader did not keep up");
            if self.emit(Level::Warning, &text) {
                self.lost = 0;
            }
        }
        let mut text = printable(&text.to_string());
        truncate(&mut text, MAX_LINE - 64);
        if !self.emit(level, &text) {
            self.lost += 1;
        }
    }

    /// True where the line is out.
    fn emit(&mut self, level: Level, text: &str) -> bool {
        if self.syslog {
            return self.send_to_syslog(level, text);
        }
        let stderr = io::stderr();
        sys::writable_now(stderr.as_fd()) && {
            let line = line(self.journal, level, text);
            stderr.lock().write_all(line.as_bytes()).is_ok()
        }
    }

    /// A socket whose reader has gone (syslogd was restarted) is opened anew, once a line.
    fn send_to_syslog(&mut self, level: Level, text: &str) -> bool {
        let datagram = datagram(level, text);
        for _ in 0..2 {
            if self.socket.is_none() {
                self.socket = UnixDatagram::unbound()
                    .and_then(|socket| socket.connect("/dev/log").map(|()| socket))
                    .ok();
            }
            let Some(socket) = &self.socket else {
                return false;
            };
            use std::os::fd::AsRawFd;
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(socket.as_raw_fd(), datagram.as_bytes(), flags) {
                Ok(_) => return true,
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::ENOBUFS) => return false,
                Err(_) => self.socket = None,
            }
        }
        false
    }

    fn take_token(&mut self) -> bool {
        let now = Instant::now();
        let since = self.refilled.map_or(Duration::MAX, |at| now.saturating_duration_since(at));
        let earned = since.as_millis().saturating_mul(RATE.into()) / 1000;
        if earned > 0 {
            self.tokens = BURST.min(self.tokens.saturating_add(earned.min(BURST.into()) as u32));
            self.refilled = Some(now);
        }
        // the line about those held back counts too
        let cost = 1 + u32::from(self.held_back > 0);
        if self.tokens < cost {
            self.held_back += 1;
            return false;
        }
        self.tokens -= cost;
        if self.held_back > 0 {
            let held = std::mem::take(&mut self.held_back);
            self.write(Level::Info, format_args!("{held} lines held back by the rate limit"));
        }
        true
    }
}

/// `<PRI>Mmm dd hh:mm:ss cgtproxy[PID]: text`, as libc's syslog(3) writes it (RFC 3164). OpenWrt's
/// logd takes a text whose 16th character is a blank for one with a timestamp, and cuts that: without
/// one it cuts the tag of every process with a pid of four digits. The syslog crate's own formatter
/// reads /proc for each line, and panics where it cannot.
fn datagram(level: Level, text: &str) -> String {
    let priority = Facility::LOG_DAEMON as u8 | level.severity() as u8;
    let (stamp, pid) = (timestamp(&sys::local_time()), std::process::id());
    format!("<{priority}>{stamp} cgtproxy[{pid}]: {text}")
}

/// 15 characters: the day is padded with a blank.
fn timestamp(at: &libc::tm) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let month = usize::try_from(at.tm_mon).ok().and_then(|n| MONTHS.get(n)).unwrap_or(&MONTHS[0]);
    let (day, hour, minute, second) = (at.tm_mday, at.tm_hour, at.tm_min, at.tm_sec);
    format!("{month} {day:2} {hour:02}:{minute:02}:{second:02}")
}

fn truncate(text: &mut String, most: usize) {
    if text.len() > most {
        let end = (0..=most).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push_str("...");
    }
}

/// Bytes from outside (a cgroup name) as they may stand in a line: printable ASCII, the rest
/// escaped.
pub struct Escaped<'a>(pub &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.escape_ascii().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_has_15_characters() {
        let mut at = sys::local_time();
        (at.tm_mon, at.tm_mday, at.tm_hour, at.tm_min, at.tm_sec) = (10, 5, 7, 8, 9);
        assert_eq!(timestamp(&at), "Nov  5 07:08:09");
        (at.tm_mon, at.tm_mday) = (0, 31);
        assert_eq!(timestamp(&at), "Jan 31 07:08:09");
    }
}
