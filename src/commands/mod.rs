//! One command a file.

pub mod check;
pub mod flush;
pub mod run;
pub mod show;

use std::io::Write;
use std::process::ExitCode;

use nix::errno::Errno;

use crate::error::{Error, Result};

/// Prints to standard output. A reader that has gone (`cgtproxy show | head`) is no error.
pub fn print(text: &str) -> Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(e) => {
            let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
            Err(Error::system("unable to write to standard output", errno))
        }
    }
}
