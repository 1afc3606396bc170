//! Reading configuration files from the real file system, with all that can be wrong with a file.
//! It parses nothing.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{self, OFlag};
use nix::sys::stat::Mode;
use nix::unistd::{geteuid, Group, User};

use super::Source;
use crate::error::{errno, io_reason};

/// Largest configuration file, and largest list of addresses, in MiB.
const MAX_SIZE: u64 = 1;
const MAX_LIST: u64 = 8;

/// The file system. With `trusted_only`, a file that others than root and the running user control
/// is refused.
pub struct Files {
    trusted_only: bool,
    lacks: Cell<bool>,
}

impl Files {
    pub fn new(trusted_only: bool) -> Files {
        Files { trusted_only, lacks: Cell::new(false) }
    }

    /// Whether some file was not read for want of descriptors or memory, whatever it says.
    pub fn lacks(&self) -> bool {
        self.lacks.get()
    }

    /// Why a file is not read.
    fn why(&self, error: &io::Error) -> String {
        if [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM].contains(&errno(error)) {
            self.lacks.set(true);
        }
        io_reason(error)
    }

    /// The text of a file of up to `most` MiB.
    fn text(&self, path: &Path, most: u64) -> Result<String, String> {
        let (file, why) = open(path).map_err(|e| self.why(&e))?;
        if let (true, Some(why)) = (self.trusted_only, why) {
            return Err(why);
        }
        let meta = file.metadata().map_err(|e| self.why(&e))?;
        if meta.is_dir() {
            return Err("is a directory".into());
        }
        if !meta.is_file() {
            return Err("is not a regular file".into());
        }
        let bound = most << 20;
        let fits = |size: u64| match size > bound {
            true => Err(format!("is over {most} MiB")),
            false => Ok(()),
        };
        fits(meta.len())?;
        let mut bytes = Vec::with_capacity(meta.len() as usize);
        // the file may grow while it is read
        file.take(bound + 1).read_to_end(&mut bytes).map_err(|e| self.why(&e))?;
        fits(bytes.len() as u64)?;
        String::from_utf8(bytes).map_err(|e| {
            let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()]
                .iter()
                .filter(|b| **b == b'\n')
                .count();
            format!("is not UTF-8 (line {line})")
        })
    }
}

impl Source for Files {
    fn read(&self, path: &Path) -> Result<String, String> {
        self.text(path, MAX_SIZE)
    }

    fn list(&self, path: &Path) -> Result<String, String> {
        self.text(path, MAX_LIST)
    }

    fn glob(&self, pattern: &Path) -> Result<Vec<PathBuf>, String> {
        let name = pattern.file_name().and_then(|n| n.to_str()).ok_or("no file name")?;
        let dir = pattern.parent().unwrap_or(Path::new("/"));
        if dir.to_string_lossy().contains(['*', '?']) {
            return Err("only the last part may have \"*\" or \"?\"".into());
        }
        if !name.contains(['*', '?']) {
            // a file that is named must be there: its rules would be missing in silence
            return Ok(vec![pattern.to_path_buf()]);
        }
        // whoever controls the directory could hide files from us
        if let (true, Ok((_, Some(why)))) = (self.trusted_only, open(dir)) {
            return Err(why);
        }
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(self.why(&e)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| self.why(&e))?;
            let file = entry.file_name();
            let matches = file.to_str().is_some_and(|f| {
                // like the shell: hidden files only where the pattern names the dot
                (name.starts_with('.') || !f.starts_with('.')) && wildcard(name, f)
            });
            if matches {
                found.push(dir.join(file));
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn uid(&self, name: &str) -> Option<u32> {
        User::from_name(name).ok().flatten().map(|user| user.uid.as_raw())
    }

    fn gid(&self, name: &str) -> Option<u32> {
        Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
    }
}

/// Opens a file, and says why it cannot be trusted if it cannot.
///
/// Each directory from the root on, each symlink and the file itself is opened in turn, and what is
/// open is judged: between a look at a path and its use, whoever owns a part of it could change what
/// it leads to. What is no regular file is opened as a mere handle, so that nothing can happen.
fn open(path: &Path) -> io::Result<(File, Option<String>)> {
    /// As many as the kernel follows.
    const MOST_LINKS: usize = 40;
    let handle = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let root = || fcntl::open("/", handle, Mode::empty()).map(File::from);
    let mut judge = Trust { me: geteuid().as_raw(), why: None };
    let mut above = vec![root()?];
    judge.directory(&above[0].metadata()?, Path::new("/"));
    // what is ahead of us, the next part last
    let parts = |path: &Path| path.iter().rev().map(OsString::from).collect::<Vec<_>>();
    let mut ahead = parts(&std::path::absolute(path)?);
    let mut place = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = ahead.pop() {
        match part.as_bytes() {
            b"/" => {
                above.truncate(1);
                place = PathBuf::from("/");
                continue;
            }
            b"." => continue,
            b".." => {
                above.truncate(1.max(above.len() - 1));
                place.pop();
                continue;
            }
            _ => {}
        }
        let dir = &above[above.len() - 1];
        let found = File::from(fcntl::openat(dir, &*part, handle, Mode::empty())?);
        let meta = found.metadata()?;
        if meta.is_symlink() {
            links += 1;
            if links > MOST_LINKS {
                return Err(Errno::ELOOP.into());
            }
            judge.owner(&meta);
            ahead.extend(parts(Path::new(&fcntl::readlinkat(&found, "")?)));
            continue;
        }
        place.push(&part);
        if meta.is_dir() {
            judge.directory(&meta, &place);
            above.push(found);
            continue;
        }
        if !ahead.is_empty() {
            return Err(Errno::ENOTDIR.into());
        }
        if !meta.is_file() {
            return Ok((found, judge.why));
        }
        // O_NONBLOCK: should it be a FIFO by now, there is no waiting for a writer
        let read = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = File::from(fcntl::openat(dir, &*part, read, Mode::empty())?);
        judge.file(&file.metadata()?);
        return Ok((file, judge.why));
    }
    let last = above.pop().map_or_else(root, Ok)?;
    Ok((last, judge.why))
}

/// The first reason not to trust.
struct Trust {
    me: u32,
    why: Option<String>,
}

impl Trust {
    fn foreign(&self, meta: &Metadata) -> bool {
        meta.uid() != 0 && meta.uid() != self.me
    }

    fn owner(&mut self, meta: &Metadata) {
        if self.why.is_none() && self.foreign(meta) {
            self.why = Some(format!("is owned by uid {}, not by root", meta.uid()));
        }
    }

    fn file(&mut self, meta: &Metadata) {
        self.owner(meta);
        if self.why.is_none() && meta.mode() & 0o022 != 0 {
            let mode = meta.mode() & 0o7777;
            self.why =
                Some(format!("is writable by group or others (mode {mode:04o}; chmod go-w)"));
        }
    }

    /// In a sticky one others may add names, but only the owner of a name can change it.
    fn directory(&mut self, meta: &Metadata, place: &Path) {
        let open = meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0;
        if self.why.is_none() && (open || self.foreign(meta)) {
            self.why = Some(format!(
                "is in a directory that others may write: {} (mode {:04o}, uid {})",
                place.display(),
                meta.mode() & 0o7777,
                meta.uid()
            ));
        }
    }
}

/// Matches `*` (any run of characters) and `?` (one), without backtracking beyond the last `*`.
fn wildcard(pattern: &str, name: &str) -> bool {
    let (p, n): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut i, mut j, mut star) = (0, 0, None);
    while j < n.len() {
        match p.get(i) {
            Some('*') => {
                star = Some((i, j));
                i += 1;
            }
            Some(c) if *c == '?' || *c == n[j] => {
                i += 1;
                j += 1;
            }
            _ => match star {
                Some((si, sj)) => {
                    star = Some((si, sj + 1));
                    i = si + 1;
                    j = sj + 1;
                }
                None => return false,
            },
        }
    }
    p[i..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards() {
        for (pattern, name, want) in [
            ("*.conf", "a.conf", true),
            ("*.conf", ".conf", true),
            ("*.conf", "a.conf~", false),
            ("a*b*c", "axxbyybzc", true),
            ("a*b*c", "axxbyybz", false),
            ("??", "ab", true),
            ("??", "abc", false),
            ("*", "", true),
        ] {
            assert_eq!(wildcard(pattern, name), want, "{pattern} {name}");
        }
    }
}
