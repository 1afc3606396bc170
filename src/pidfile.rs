//! The pidfile: there while everything is in force, whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::error::{errno, reason, Error, Result};
use crate::log;

pub struct Pidfile(PathBuf);

impl Pidfile {
    /// Nothing is written yet. Errors: what is there is no regular file.
    pub fn new(path: PathBuf) -> Result<Pidfile> {
        match fs::symlink_metadata(&path) {
            Ok(meta) if !meta.is_file() => {
                let path = path.display();
                Err(Error::State(format!("unable to write pidfile {path}: not a regular file")))
            }
            // that it cannot be written is found out by writing it
            _ => Ok(Pidfile(path)),
        }
    }

    /// Errors: why it is not there as a whole; what was written of it is removed.
    pub fn write(&self) -> Result<()> {
        let what = || format!("unable to write pidfile {}", self.0.display());
        self.try_write().map_err(|error| Error::system(what(), errno(&error)))
    }

    fn try_write(&self) -> io::Result<()> {
        let mut options = File::options();
        // a symlink planted in a writable directory must not be followed, a FIFO not waited for
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let mut file =
            options.write(true).create(true).mode(0o644).custom_flags(flags).open(&self.0)?;
        if !file.metadata()?.is_file() {
            return Err(Errno::EINVAL.into());
        }
        let text = format!("{}\n", std::process::id());
        let written = file.set_len(0).and_then(|()| file.write_all(text.as_bytes()));
        written.inspect_err(|_| drop(fs::remove_file(&self.0)))
    }

    /// Where that fails, it is said: whoever reads the file would take us for running.
    pub fn remove(&self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let (file, why) = (self.0.display(), reason(errno(&error)));
                log!(Warning, "unable to remove pidfile {file}: {why}");
            }
            _ => {}
        }
    }
}
