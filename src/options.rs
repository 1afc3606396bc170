//! What every command may be asked for, and the configuration that this names.

use std::io::ErrorKind;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use crate::config::{self, file::Files, Config};
use crate::error::{Error, Result};
use crate::log;

pub const DEFAULT_CONFIG: &str = "/etc/cgtproxy/cgtproxy.conf";

/// The options that any command may get.
#[derive(Default)]
pub struct Options {
    /// As given; `None` for the default.
    pub config: Option<PathBuf>,
    pub pidfile: Option<PathBuf>,
    pub syslog: bool,
    pub verbose: usize,
    pub ready_fd: Option<RawFd>,
    pub no_seccomp: bool,
    pub wait: bool,
}

impl Options {
    pub fn config_file(&self) -> &Path {
        self.config.as_deref().unwrap_or(Path::new(DEFAULT_CONFIG))
    }

    /// Reads the configuration; `None` where that is the default file and absent.
    ///
    /// Errors: every problem of every file, each on its line.
    pub fn load(&self, trusted_only: bool) -> Result<Option<Config>> {
        let file = self.config_file();
        let absent =
            || matches!(file.symlink_metadata(), Err(e) if e.kind() == ErrorKind::NotFound);
        if self.config.is_none() && absent() {
            return Ok(None);
        }
        let files = Files::new(trusted_only);
        config::load(&files, file).map(Some).map_err(|problems| {
            let wrong = Error::Usage(problems.iter().map(|p| p.to_string()).collect());
            // what was not read is not known to be wrong
            if files.lacks() {
                Error::State(wrong.to_string())
            } else {
                wrong
            }
        })
    }

    /// The same. The built-in configuration, everything direct, stands in for the default file where
    /// that is absent, which is said.
    pub fn load_or_default(&self, trusted_only: bool) -> Result<Config> {
        Ok(self.load(trusted_only)?.unwrap_or_else(|| {
            log!(
                Notice,
                "{DEFAULT_CONFIG} is absent: using the built-in default, everything direct"
            );
            Config::default()
        }))
    }

    /// Makes file names whole, for a process that changes its working directory.
    pub fn absolute(&mut self) {
        for file in [&mut self.config, &mut self.pidfile].into_iter().flatten() {
            if let Ok(whole) = std::path::absolute(&*file) {
                *file = whole;
            }
        }
    }
}

/// An error of the command line, with the hint where to read on.
pub fn wrong(text: impl Into<String>) -> Error {
    Error::Usage(vec![format!("{} (try cgtproxy --help)", text.into())])
}
