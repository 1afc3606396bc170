//! `run`: hands the options to the daemon.

use std::process::ExitCode;

use crate::confine;
use crate::daemon;
use crate::error::{Error, Result};
use crate::options::Options;
use crate::{log, sys};

pub fn run(options: Options) -> Result<ExitCode> {
    // first of all: who lacks it may be unable to read the configuration too
    confine::require_net_admin("run")?;
    let ready_fd = match options.ready_fd {
        None => None,
        Some(fd) => Some(sys::adopt_fd(fd).map_err(|errno| {
            let why = crate::error::reason(errno);
            Error::Usage(vec![format!("unable to use --ready-fd {fd}: {why}")])
        })?),
    };
    log::configure(log::Level::Notice.louder(options.verbose), options.syslog);
    daemon::run(options, ready_fd)?;
    Ok(ExitCode::SUCCESS)
}
