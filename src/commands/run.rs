//! `run`: hands the options to the daemon.

use std::process::ExitCode;

use crate::cli::{self, Options};
use crate::daemon;
use crate::error::{Error, Result};
use crate::{log, sys};

pub fn run(options: Options) -> Result<ExitCode> {
    // first of all: who lacks it may be unable to read the configuration too
    super::require_net_admin("run")?;
    let ready_fd = match options.ready_fd {
        None => None,
        Some(fd) => Some(sys::adopt_fd(fd).map_err(|errno| {
            let why = crate::error::reason(errno);
            Error::Usage(vec![format!("unable to use --ready-fd {fd}: {why}")])
        })?),
    };
    log::configure(log::Level::Notice.louder(options.verbose), options.syslog);
    let is_default = options.config.is_none();
    daemon::run(daemon::Options {
        config_file: options.config_file().to_path_buf(),
        load: Box::new(move |file| {
            Ok(cli::load_config(file, is_default, true)?.unwrap_or_else(|| {
                cli::tell_default();
                Default::default()
            }))
        }),
        pidfile: options.pidfile,
        ready_fd,
        verbose: options.verbose,
        syslog: options.syslog,
        seccomp: !options.no_seccomp,
        wait: options.wait,
    })?;
    Ok(ExitCode::SUCCESS)
}
