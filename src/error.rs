//! The one error type of everything that talks to the system, and the exit status it maps to.

use std::{fmt, io};

use nix::errno::Errno;

/// Why a command ended early. `Display` is what the user reads: lower case, no full stop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The system refused: `what` is "unable to VERB OBJECT"; exit status 1.
    System { what: String, errno: Errno, hint: Option<String> },
    /// The system is not as it must be, without an errno; exit status 1.
    State(String),
    /// Command line or configuration; one message a line; exit status 2.
    Usage(Vec<String>),
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn system(what: impl Into<String>, errno: Errno) -> Error {
        Error::System { what: what.into(), errno, hint: None }
    }

    /// The same error with a remedy behind it.
    pub fn hint(self, remedy: impl Into<String>) -> Error {
        match self {
            Error::System { what, errno, .. } => {
                Error::System { what, errno, hint: Some(remedy.into()) }
            }
            other => other,
        }
    }

    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::System { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    pub fn exit_status(&self) -> u8 {
        match self {
            Error::System { .. } | Error::State(_) => 1,
            Error::Usage(_) => 2,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::System { what, errno, hint } => {
                write!(f, "{what}: {}", reason(*errno))?;
                match hint {
                    Some(hint) => write!(f, " ({hint})"),
                    None if *errno == Errno::EMFILE => f.write_str(" (raise the limit: ulimit -n)"),
                    None => Ok(()),
                }
            }
            Error::State(text) => f.write_str(text),
            Error::Usage(lines) => {
                // each is one line, whatever was named
                f.write_str(
                    &lines.iter().map(|line| printable(line)).collect::<Vec<_>>().join("\n"),
                )
            }
        }
    }
}

impl std::error::Error for Error {}

/// The errno of an error of the standard library; EIO where it has none.
pub fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Why an error of the standard library came about.
pub fn io_reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => reason(Errno::from_raw(errno)),
        None => error.to_string(),
    }
}

/// The errno's text, as strerror(3) has it but lower case, so that it can stand after a colon.
pub fn reason(errno: Errno) -> String {
    let text = errno.desc();
    let mut chars = text.chars();
    match chars.next() {
        // keep acronyms such as "RFS specific error" and "I/O error" as they are
        Some(first) if chars.clone().next().is_some_and(|c| c.is_lowercase()) => {
            first.to_lowercase().chain(chars).collect()
        }
        _ => text.to_string(),
    }
}

/// A text as it may stand in a line: what a terminal would act on is escaped.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}
