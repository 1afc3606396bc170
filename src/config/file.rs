//! Reading configuration files from the real file system, with all that can be wrong with a file.
//! It parses nothing.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{geteuid, User};

use super::Source;
use crate::error::reason;

/// Largest configuration file, in bytes.
const MAX_SIZE: u64 = 1 << 20;

/// The file system. With `trusted_only`, a file that others than root and the running user control
/// is refused.
pub struct Files {
    pub trusted_only: bool,
}

impl Source for Files {
    fn read(&self, path: &Path) -> Result<String, String> {
        if self.trusted_only {
            if let Some(why) = untrusted(path).map_err(|e| io_reason(&e))? {
                return Err(why);
            }
        }
        // O_NONBLOCK: opening a FIFO must not wait for a writer
        let mut options = File::options();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = file.open(path).map_err(|e| io_reason(&e))?;
        let meta = file.metadata().map_err(|e| io_reason(&e))?;
        if meta.is_dir() {
            return Err("is a directory".into());
        }
        if !meta.is_file() {
            return Err("is not a regular file".into());
        }
        if meta.len() > MAX_SIZE {
            return Err("is over 1 MiB".into());
        }
        let mut bytes = Vec::with_capacity(meta.len() as usize);
        // the file may grow while it is read
        file.take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(|e| io_reason(&e))?;
        if bytes.len() as u64 > MAX_SIZE {
            return Err("is over 1 MiB".into());
        }
        String::from_utf8(bytes).map_err(|e| {
            let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()]
                .iter()
                .filter(|b| **b == b'\n')
                .count();
            format!("is not UTF-8 (line {line})")
        })
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
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io_reason(&e)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|e| io_reason(&e))?;
            let file = entry.file_name();
            let matches = file.to_str().is_some_and(|f| {
                // like the shell: hidden files only where the pattern names the dot
                (name.starts_with('.') || !f.starts_with('.')) && wildcard(name, f)
            });
            if matches {
                found.push(dir.join(file));
            }
        }
        found.sort();
        Ok(found)
    }

    fn uid(&self, name: &str) -> Option<u32> {
        User::from_name(name).ok().flatten().map(|user| user.uid.as_raw())
    }
}

/// Why others than root and the running user could change this file, if they could.
///
/// The file and its directory count, and where the path is a symlink, those behind it too.
pub fn untrusted(path: &Path) -> std::io::Result<Option<String>> {
    let me = geteuid().as_raw();
    let real = fs::canonicalize(path)?;
    let file = fs::metadata(&real)?;
    if file.uid() != 0 && file.uid() != me {
        return Ok(Some(format!("is owned by uid {}, not by root", file.uid())));
    }
    if file.mode() & 0o022 != 0 && file.is_file() {
        return Ok(Some(format!(
            "is writable by group or others (mode {:04o}; chmod go-w)",
            file.mode() & 0o7777
        )));
    }
    for place in [path, &real] {
        let dir = match place.parent() {
            Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
            Some(dir) => dir,
            None => continue,
        };
        let meta = fs::metadata(dir)?;
        let sticky = meta.mode() & 0o1000 != 0;
        let foreign = meta.uid() != 0 && meta.uid() != me;
        if foreign || (meta.mode() & 0o022 != 0 && !sticky) {
            return Ok(Some(format!(
                "is in a directory that others may write: {} (mode {:04o}, uid {})",
                dir.display(),
                meta.mode() & 0o7777,
                meta.uid()
            )));
        }
    }
    Ok(None)
}

fn io_reason(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => reason(Errno::from_raw(errno)),
        None => error.to_string(),
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
