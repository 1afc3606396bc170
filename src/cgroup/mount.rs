//! Finding the cgroup v2 tree in /proc/self/mountinfo, and its place in the kernel's. Pure but for
//! the functions that begin with [`find`].
//! Source: proc_pid_mountinfo(5), cgroups(7), cgroup_namespaces(7).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;

use crate::error::{errno, reason, Error, Result};
use crate::sys;

/// A mount of the cgroup2 file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub id: i32,
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
    /// Level of `dir`'s own cgroup from the root of our cgroup namespace, from where most kernels
    /// count `socket cgroupv2 level`.
    pub level: usize,
    /// The cgroup's id, and that of the mount.
    pub identity: (u64, i32),
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
    let id = std::str::from_utf8(fields.first()?).ok()?.parse().ok()?;
    is_cgroup2.then_some(Mount { id, point: path(fields.get(4)?), root: path(fields.get(3)?) })
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

/// How many levels below the root of our cgroup namespace a path is; less than none above it.
fn level(path: &Path) -> isize {
    path.components().fold(0, |level, component| match component {
        Component::Normal(_) => level + 1,
        Component::ParentDir => level - 1,
        _ => level,
    })
}

/// What a look at a directory tells: its cgroup's id and that of the mount that it is in.
type Identify<'a> = &'a dyn Fn(&Path) -> nix::Result<(u64, i32)>;

/// The root that `wanted` (or auto) means, given the mounts. Which of them a directory is in, it
/// says itself: one may hide another.
///
/// Errors: what to do about a host without cgroup v2, or a path outside of it.
fn choose(
    mounts: &[Mount],
    wanted: Option<&Path>,
    look: Identify,
) -> std::result::Result<Root, String> {
    let outside = |dir: &Path| format!("{} is not on a cgroup2 file system", dir.display());
    let root = |dir: &Path| -> std::result::Result<(isize, Root), String> {
        let identity = look(dir).map_err(|errno| match errno {
            Errno::EOPNOTSUPP => outside(dir),
            errno => format!("unable to use cgroup root {}: {}", dir.display(), reason(errno)),
        })?;
        let mount = mounts.iter().find(|mount| mount.id == identity.1);
        let mount = mount.ok_or_else(|| outside(dir))?;
        let below = dir.strip_prefix(&mount.point).map_err(|_| outside(dir))?;
        let level = level(&mount.root) + level(below);
        Ok((level, Root { dir: dir.into(), mount: mount.point.clone(), level: 0, identity }))
    };
    let found = match wanted {
        Some(wanted) => root(wanted)?,
        None => {
            let points = mounts.iter().map(|mount| &*mount.point);
            let usual = points.clone().filter(|point| *point == Path::new(USUAL));
            let mut refused = None;
            let mut roots = usual.chain(points).filter_map(|point| match root(point) {
                Ok(root) => Some(root),
                Err(why) => {
                    refused.get_or_insert(why);
                    None
                }
            });
            let first = roots.next();
            let nothing = "no cgroup2 file system is mounted (mount -t cgroup2 none \
                           /sys/fs/cgroup, or boot with cgroup v2; with OpenRC, rc-update add \
                           cgroups sysinit, and reboot)";
            first.ok_or_else(|| refused.unwrap_or_else(|| nothing.into()))?
        }
    };
    let (level, root) = found;
    let above = |_| {
        let dir = root.dir.display();
        format!(
            "{dir} is above the root of our cgroup namespace, where the kernel matches nothing: \
             mount cgroup2 anew in the namespace, or run outside of it"
        )
    };
    Ok(Root { level: level.try_into().map_err(above)?, ..root })
}

/// Finds the root on this host.
pub fn find(wanted: Option<&Path>) -> Result<Root> {
    let unreadable =
        |e: std::io::Error| Error::system("unable to read /proc/self/mountinfo", errno(&e));
    let mountinfo = std::fs::read("/proc/self/mountinfo").map_err(unreadable)?;
    let wanted = match wanted {
        None => None,
        // so that a symlink or a trailing slash does not hide the mount point
        Some(path) => Some(path.canonicalize().map_err(|e| {
            Error::system(format!("unable to use cgroup-root {}", path.display()), errno(&e))
        })?),
    };
    choose(&mounts(&mountinfo), wanted.as_deref(), &find_identity).map_err(Error::State)
}

/// The ids of a directory's cgroup and of the mount that it is in.
pub fn find_identity(dir: &Path) -> nix::Result<(u64, i32)> {
    sys::cgroup_handle(AT_FDCWD, dir.as_os_str().as_bytes())
}

/// Whether we are in the first cgroup namespace, from whose root every kernel counts levels.
pub fn find_first_namespace() -> bool {
    // PROC_CGROUP_INIT_INO of include/linux/proc_ns.h
    let link = std::fs::read_link("/proc/self/ns/cgroup");
    // a kernel without cgroup namespaces has but one
    link.map_or(true, |link| link == Path::new("cgroup:[4026531835]"))
}

/// The cgroup of a process, `self` for our own, as a path from the root of our cgroup namespace;
/// `None` where it is in none of cgroup v2.
pub fn find_cgroup(pid: &str) -> std::io::Result<Option<Vec<u8>>> {
    let text = std::fs::read(format!("/proc/{pid}/cgroup"))?;
    let line = text.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(b"0::"));
    Ok(line.map(<[u8]>::to_vec))
}

/// The same path as one from a cgroup root, `None` outside of it: the roots of mounts count from the
/// root of our cgroup namespace as well.
pub fn from_root(path: &[u8], root: &Root, mounts: &[Mount]) -> Option<Vec<u8>> {
    let mount = mounts.iter().rev().find(|mount| mount.point == root.mount)?;
    let below = root.dir.strip_prefix(&root.mount).ok()?;
    let rest = Path::new(OsStr::from_bytes(path)).strip_prefix(mount.root.join(below)).ok()?;
    let rest = rest.as_os_str().as_bytes();
    Some(if rest.is_empty() { Vec::new() } else { [b"/", rest].concat() })
}

/// How many levels below the root of our cgroup namespace we are ourselves.
pub fn find_own_level() -> Option<usize> {
    let own = find_cgroup("self").ok()??;
    level(Path::new(OsStr::from_bytes(&own))).try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &[u8] = b"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:4 - cgroup2 cgroup2 rw
";

    #[test]
    fn paths_of_processes_from_the_root() {
        let mounts = [Mount { id: 1, point: "/sys/fs/cgroup".into(), root: "/box".into() }];
        let root = Root {
            dir: "/sys/fs/cgroup/sub".into(),
            mount: "/sys/fs/cgroup".into(),
            level: 2,
            identity: (1, 1),
        };
        let from = |path: &str| from_root(path.as_bytes(), &root, &mounts);
        assert_eq!(from("/box/sub/a/b").as_deref(), Some(&b"/a/b"[..]));
        assert_eq!(from("/box/sub").as_deref(), Some(&b""[..]));
        assert_eq!(from("/box/subway/a"), None);
        assert_eq!(from("/"), None);
    }

    #[test]
    fn hybrid_unified_and_odd_mounts() {
        let unified =
            b"25 20 0:22 / /sys/fs/cgroup rw,nosuid shared:9 master:1 - cgroup2 cgroup2 rw";
        let odd = b"1 1 0:1 /a/b /mnt/with\\040blank rw - cgroup2 none rw";
        // the last and deepest one that a path is in, as the kernel would say without bind mounts
        let root = |text: &[u8], wanted: Option<&str>| {
            let mounts = mounts(text);
            let look = |dir: &Path| {
                let inside = mounts.iter().filter(|mount| dir.starts_with(&mount.point));
                let deepest = inside.max_by_key(|mount| mount.point.as_os_str().len());
                deepest.map(|mount| (7, mount.id)).ok_or(Errno::EOPNOTSUPP)
            };
            choose(&mounts, wanted.map(Path::new), &look)
        };
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
        // hidden by a bind mount of a part, and in a namespace that kept the mount of the host
        let bound = b"40 25 0:22 /a/b /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        let hidden = [unified.as_slice(), bound].join(&b'\n');
        assert_eq!(root(&hidden, None).map(dir), Ok(("/sys/fs/cgroup".into(), 2)));
        let kept = b"25 20 0:22 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        assert!(root(kept, None).unwrap_err().contains("above the root"));
        let own = Some("/sys/fs/cgroup/a/b/c");
        assert_eq!(root(kept, own).map(dir), Ok(("/sys/fs/cgroup/a/b/c".into(), 1)));
        assert!(mounts(b"\n - \n1 2 3 - cgroup2\n-\n").is_empty());
    }
}
