//! Finding the cgroup v2 tree in /proc/self/mountinfo. Pure but for [`find`].
//! Source: proc_pid_mountinfo(5), cgroups(7).

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::error::{Error, Result};

/// A mount of the cgroup2 file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub point: PathBuf,
    /// Which cgroup is mounted there, from the root of our cgroup namespace: `/` for all of it.
    pub root: PathBuf,
}

/// The directory whose sub-tree is classified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    pub dir: PathBuf,
    /// The mount point that `dir` is in.
    pub mount: PathBuf,
    /// Level of `dir`'s own cgroup, as `socket cgroupv2 level` counts it.
    pub level: usize,
}

/// The preferred place, where there is more than one mount.
const USUAL: &str = "/sys/fs/cgroup";

/// The cgroup2 mounts of a mountinfo text, in its order.
pub fn mounts(mountinfo: &[u8]) -> Vec<Mount> {
    mountinfo.split(|b| *b == b'\n').filter_map(mount).collect()
}

/// Whether a cgroup v1 hierarchy is mounted.
pub fn has_v1(mountinfo: &[u8]) -> bool {
    let mut lines = mountinfo.split(|b| *b == b'\n');
    lines.any(|line| {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        kind(&fields) == Some(b"cgroup")
    })
}

/// The file system's type, which stands behind the optional fields and their end mark.
fn kind<'a>(fields: &[&'a [u8]]) -> Option<&'a [u8]> {
    let separator = 6 + fields.get(6..)?.iter().position(|f| *f == b"-")?;
    fields.get(separator + 1).copied()
}

/// `36 35 98:0 /root /point options… [optional fields] - type source options`
fn mount(line: &[u8]) -> Option<Mount> {
    let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    let is_cgroup2 = kind(&fields)? == b"cgroup2";
    let path = |field: &[u8]| PathBuf::from(OsString::from_vec(unescape(field)));
    is_cgroup2.then_some(Mount { point: path(fields.get(4)?), root: path(fields.get(3)?) })
}

/// Undoes the kernel's octal escapes (`\040` is a blank).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|d| *first == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        match octal {
            Some(d) => {
                out.push((d[0] - b'0').wrapping_mul(64) + (d[1] - b'0') * 8 + (d[2] - b'0'));
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// The root that `wanted` (or auto) means, given the mounts.
///
/// Errors: what to do about a host without cgroup v2, or a path outside of it.
pub fn choose(mounts: &[Mount], wanted: Option<&Path>) -> std::result::Result<Root, String> {
    let level = |path: &Path| {
        path.components().filter(|c| matches!(c, std::path::Component::Normal(_))).count()
    };
    let Some(wanted) = wanted else {
        let usual = mounts.iter().find(|m| m.point == Path::new(USUAL));
        let Some(mount) = usual.or(mounts.first()) else {
            return Err("no cgroup2 file system is mounted (mount -t cgroup2 none \
                        /sys/fs/cgroup, or boot with cgroup v2)"
                .into());
        };
        let (dir, root) = (mount.point.clone(), level(&mount.root));
        return Ok(Root { mount: dir.clone(), dir, level: root });
    };
    // the last of the deepest: a later mount hides an earlier one on the same point
    let inside = mounts.iter().filter(|m| wanted.starts_with(&m.point));
    let Some(mount) = inside.max_by_key(|m| m.point.as_os_str().as_bytes().len()) else {
        return Err(format!("{} is not on a cgroup2 file system", wanted.display()));
    };
    let below = wanted.strip_prefix(&mount.point).map_or(0, level);
    Ok(Root {
        dir: wanted.to_path_buf(),
        mount: mount.point.clone(),
        level: level(&mount.root) + below,
    })
}

/// Finds the root on this host.
pub fn find(wanted: Option<&Path>) -> Result<Root> {
    let unreadable = |e: std::io::Error| {
        let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        Error::system("unable to read /proc/self/mountinfo", errno)
    };
    let mountinfo = std::fs::read("/proc/self/mountinfo").map_err(unreadable)?;
    let wanted = match wanted {
        None => None,
        // so that a symlink or a trailing slash does not hide the mount point
        Some(path) => Some(path.canonicalize().map_err(|e| {
            let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
            Error::system(format!("unable to use cgroup-root {}", path.display()), errno)
        })?),
    };
    choose(&mounts(&mountinfo), wanted.as_deref()).map_err(Error::State)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &[u8] = b"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw
";

    #[test]
    fn hybrid_unified_and_odd_mounts() {
        let unified =
            b"25 20 0:22 / /sys/fs/cgroup rw,nosuid shared:9 master:1 - cgroup2 cgroup2 rw";
        let odd = b"1 1 0:1 /a/b /mnt/with\\040blank rw - cgroup2 none rw";
        let root = |text: &[u8], wanted: Option<&str>| choose(&mounts(text), wanted.map(Path::new));
        let dir = |root: Root| (root.dir.to_str().unwrap().to_string(), root.level);
        assert_eq!(root(HYBRID, None).map(dir), Ok(("/sys/fs/cgroup/unified".into(), 0)));
        assert!(has_v1(HYBRID) && !has_v1(unified));
        assert_eq!(root(unified, None).map(dir), Ok(("/sys/fs/cgroup".into(), 0)));
        assert_eq!(root(odd, None).map(dir), Ok(("/mnt/with blank".into(), 2)));
        let both = [odd.as_slice(), unified].join(&b'\n');
        assert_eq!(root(&both, None).map(dir), Ok(("/sys/fs/cgroup".into(), 0)));
        let sub = Some("/mnt/with blank/c");
        assert_eq!(root(&both, sub).map(dir), Ok(("/mnt/with blank/c".into(), 3)));
        assert!(root(&both, Some("/tmp")).is_err());
        assert!(root(b"", None).unwrap_err().contains("cgroup2"));
        assert!(mounts(b"\n - \n1 2 3 - cgroup2\n-\n").is_empty());
    }
}
