//! The ground of one test: its own namespaces, a world outside, and a cgroup sub-tree.
//!
//! `unshare(2)` works per thread, and a test is a thread, so everything that the thread starts
//! (processes, threads, sockets) belongs to the ground, and the other tests do not see it.
//!
//! ```text
//!   inside (the host under test)              outside (the rest of the internet)
//!   in0  192.0.2.1/24  2001:db8:1::1/64 ====  out0  192.0.2.2/24  2001:db8:1::2/64
//!   default routes via out0                   lo answers for 203.0.113.0/24, 2001:db8:2::/64
//! ```

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Once;
use std::time::{Duration, Instant};

use nix::sched::{setns, unshare, CloneFlags};
use nix::time::{clock_gettime, ClockId};

use crate::client::PATIENCE;
use crate::wait_until;

/// Where cgroup2 is mounted in every ground, as on a host without the v1 tree.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// This host, and the gateway that leads to the world.
pub const HOST4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
pub const HOST6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1));
pub const GATE4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
pub const GATE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2));

/// A remote host of each family; the world answers for every neighbour of theirs too.
pub const REMOTE4: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7));
pub const REMOTE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 7));

/// One of each family.
pub const HOSTS: [IpAddr; 2] = [HOST4, HOST6];
pub const REMOTES: [IpAddr; 2] = [REMOTE4, REMOTE6];

/// Neighbours are fixed: a first solicitation sent too early is repeated after a whole second.
const INSIDE: &str = "\
link set lo up
link add in0 type veth peer name out0 netns OUTSIDE
link set in0 address 02:00:00:00:00:01
addr add 192.0.2.1/24 dev in0
addr add 2001:db8:1::1/64 dev in0 nodad
neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev in0
neigh add 2001:db8:1::2 lladdr 02:00:00:00:00:02 dev in0
link set in0 up
route add default via 192.0.2.2
route add default via 2001:db8:1::2 dev in0
";

const OUTSIDE: &str = "\
link set lo up
link set out0 address 02:00:00:00:00:02
addr add 192.0.2.2/24 dev out0
addr add 2001:db8:1::2/64 dev out0 nodad
neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 dev out0
neigh add 2001:db8:1::1 lladdr 02:00:00:00:00:01 dev out0
link set out0 up
route add local 203.0.113.0/24 dev lo
route add local 2001:db8:2::/64 dev lo
";

/// Namespaces, a world outside and a cgroup sub-tree; all end with it.
pub struct Ground {
    /// The cgroup sub-tree of this test; what a configuration names as `cgroup-root`.
    pub root: PathBuf,
    /// A private directory (mode 0700) for files of this test.
    pub dir: PathBuf,
    outside: File,
    /// Namespaces that the thread came from: libtest may run several tests on one thread.
    home: [File; 2],
    /// The namespaces belong to the thread, so the ground must not leave it.
    _thread: PhantomData<*const ()>,
}

impl Ground {
    /// None, with the reason printed, where this user cannot make one.
    pub fn new(name: &str) -> Option<Ground> {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: {name}: needs root for namespaces and cgroups");
            let ci = std::env::var("CI").is_ok_and(|v| v == "true");
            assert!(!ci, "{name} was skipped in CI: needs root");
            return None;
        }
        static SWEEP: Once = Once::new();
        static COUNT: AtomicU32 = AtomicU32::new(0);

        let home = [namespace("net"), namespace("mnt")];
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare the outside network");
        let outside = namespace("net");
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("unshare");
        mount_all();
        SWEEP.call_once(sweep);

        let pid = std::process::id();
        let unique = format!("cgtp-{pid}-{name}-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let root = Path::new(CGROUPS).join(&unique);
        fs::create_dir(&root).expect("make the cgroup sub-tree");
        let dir = std::env::temp_dir().join(&unique);
        fs::DirBuilder::new().mode(0o700).create(&dir).expect("make the private directory");
        // From here on Drop cleans up, whatever fails below.
        let ground = Ground { root, dir, outside, home, _thread: PhantomData };

        // Ping without CAP_NET_RAW, for clients of any user.
        sysctl("net/ipv4/ping_group_range", "0 2147483647");
        ip_lines(&INSIDE.replace("OUTSIDE", &ground.outside_path()));
        ground.outside(|| {
            sysctl("net/ipv4/ping_group_range", "0 2147483647");
            ip_lines(OUTSIDE);
        });
        await_link(&[("192.0.2.1", "192.0.2.2"), ("2001:db8:1::1", "2001:db8:1::2")]);
        Some(ground)
    }

    /// Runs `f` in the outside network namespace. Threads and sockets that it makes stay there.
    pub fn outside<T>(&self, f: impl FnOnce() -> T) -> T {
        self.within(&self.outside, f)
    }

    /// How iproute2 names the outside network namespace.
    pub fn outside_path(&self) -> String {
        net_path(&self.outside)
    }

    /// Runs `f` in any network namespace.
    pub fn within<T>(&self, net: &File, f: impl FnOnce() -> T) -> T {
        within(net, f)
    }

    /// Makes the cgroup `path` (`/a/b`, from the sub-tree) and its parents.
    pub fn cgroup(&self, path: &str) -> PathBuf {
        let dir = self.at(path);
        fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("unable to make {dir:?}: {e}"));
        dir
    }

    /// The same for several.
    pub fn cgroups<const N: usize>(&self, paths: [&str; N]) -> [PathBuf; N] {
        paths.map(|path| self.cgroup(path))
    }

    /// Where the cgroup `path` is, whether it exists or not.
    pub fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        remove_tree(&self.root);
        let _ = fs::remove_dir_all(&self.dir);
        for (file, kind) in
            self.home.iter().zip([CloneFlags::CLONE_NEWNET, CloneFlags::CLONE_NEWNS])
        {
            if let Err(e) = setns(file, kind) {
                eprintln!("unable to return to the namespaces of before: {e}");
            }
        }
    }
}

/// Returns once packets pass by a link, from each of these addresses to its neighbour: link state moves
/// in a kernel worker, and what is sent before that is lost.
pub fn await_link(ends: &[(&str, &str)]) {
    for (host, gate) in ends.iter().map(|(host, gate)| (ip(host), ip(gate))) {
        let passed = wait_until(PATIENCE, || {
            let Ok(probe) = UdpSocket::bind((host, 0)) else {
                return false;
            };
            probe.set_read_timeout(Some(Duration::from_millis(10))).expect("set a timeout");
            // Nobody listens on the discard port: the answer is an ICMP error.
            let sent = probe.connect((gate, 9)).and_then(|()| probe.send(b"?"));
            sent.is_ok()
                && probe.recv(&mut [0]).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
        });
        assert!(passed, "the veth pair does not pass {host}");
    }
}

/// Runs `f` in that network namespace, and comes back even when `f` panics.
fn within<T>(net: &File, f: impl FnOnce() -> T) -> T {
    struct Back(File);
    impl Drop for Back {
        fn drop(&mut self) {
            setns(&self.0, CloneFlags::CLONE_NEWNET).expect("return from a namespace");
        }
    }
    let _back = Back(namespace("net"));
    setns(net, CloneFlags::CLONE_NEWNET).expect("enter a namespace");
    f()
}

/// How iproute2 names that network namespace.
fn net_path(net: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), net.as_raw_fd())
}

/// One more network namespace, of a client or a container.
pub struct Netns(File);

impl Netns {
    /// An empty one.
    pub fn new() -> Netns {
        let home = namespace("net");
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare the network");
        let new = namespace("net");
        setns(&home, CloneFlags::CLONE_NEWNET).expect("return from a namespace");
        Netns(new)
    }

    /// How iproute2 names it.
    pub fn path(&self) -> String {
        net_path(&self.0)
    }

    /// Runs `f` there. Threads and sockets that it makes stay there.
    pub fn run<T>(&self, f: impl FnOnce() -> T) -> T {
        within(&self.0, f)
    }
}

/// An IPv4 or IPv6 literal.
pub fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// An address with a port.
pub fn addr(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// Every address of this host, of the family of `ip`.
pub fn any_of(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Sets a sysctl of the calling thread's network namespace (`net/…`).
pub fn sysctl(name: &str, value: &str) {
    let path = format!("/proc/sys/{name}");
    fs::write(&path, value).unwrap_or_else(|e| panic!("unable to set {path}: {e}"));
}

/// Runs lines of iproute2 commands in the calling thread's network namespace; panics on failure.
/// Commands without an address need their family in `flags` (`-4`, `-6`).
#[track_caller]
pub fn ip_batch(flags: &[&str], lines: &str) {
    let mut child = Command::new("ip")
        .args(flags)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start ip");
    child.stdin.take().expect("stdin is piped").write_all(lines.as_bytes()).expect("feed ip");
    let out = child.wait_with_output().expect("wait for ip");
    assert!(out.status.success(), "ip -batch: {}", String::from_utf8_lossy(&out.stderr));
}

/// The same for commands that name their family by an address, or have none.
#[track_caller]
pub fn ip_lines(lines: &str) {
    ip_batch(&[], lines);
}

/// The same for IPv4 and then for IPv6: GATE is the gateway of the family, NET the prefix of the LAN
/// (see `gateway`).
pub fn ip_both(lines: &str) {
    for (family, gate, net) in
        [("-4", "192.0.2.2", "198.51.100.0/24"), ("-6", "2001:db8:1::2", "2001:db8:3::/64")]
    {
        ip_batch(&[family], &lines.replace("GATE", gate).replace("NET", net));
    }
}

/// Runs a line of shell in the calling thread's namespaces; panics where it fails.
#[track_caller]
pub fn sh(line: &str) {
    let out = Command::new("sh").args(["-c", line]).output().expect("start sh");
    assert!(out.status.success(), "{line}: {out:?}");
}

/// Kills whatever lives in the cgroup sub-tree, then removes it, deepest first.
pub fn remove_tree(root: &Path) {
    let _ = fs::write(root.join("cgroup.kill"), "1");
    wait_until(PATIENCE, || {
        fs::read_to_string(root.join("cgroup.events")).map_or(true, |s| s.contains("populated 0"))
    });
    rmdir_all(root);
}

fn rmdir_all(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            rmdir_all(&entry.path());
        }
    }
    // EBUSY lasts until the last task has left its exit path.
    let gone = wait_until(PATIENCE, || {
        fs::remove_dir(dir).map_or_else(|e| e.kind() == ErrorKind::NotFound, |()| true)
    });
    if !gone {
        eprintln!("unable to remove {}", dir.display());
    }
}

/// Removes what test processes that were killed have left.
fn sweep() {
    for base in [PathBuf::from(CGROUPS), std::env::temp_dir()] {
        for entry in fs::read_dir(base).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let mut parts = name.as_bytes().splitn(3, |b| *b == b'-');
            let (Some(b"cgtp"), Some(pid)) = (parts.next(), parts.next()) else {
                continue;
            };
            let pid = String::from_utf8_lossy(pid);
            let alive = pid.parse::<u32>().is_err() || Path::new("/proc").join(&*pid).exists();
            if alive {
                continue;
            }
            if entry.path().starts_with(CGROUPS) {
                remove_tree(&entry.path());
            } else {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// A handle on a namespace of the calling thread.
fn namespace(kind: &str) -> File {
    File::open(format!("/proc/thread-self/ns/{kind}")).expect("open a namespace")
}

/// cgroup2 alone, at /sys/fs/cgroup, and a private /run.
fn mount_all() {
    mount("none", "/", "", libc::MS_REC | libc::MS_PRIVATE, "");
    // whatever this host has mounted of either version, and wherever, is not to be seen
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("list the mounts");
    let point = |line: &str| {
        let (place, kind) = line.split_once(" - ")?;
        let kind = kind.split(' ').next()?.starts_with("cgroup");
        let point = place.split(' ').nth(4)?;
        (kind || point == CGROUPS).then(|| point.replace("\\040", " "))
    };
    for point in mounts.lines().rev().filter_map(point) {
        let point = CString::new(point).expect("no NUL");
        // gone with another one at worst
        // SAFETY: a NUL-terminated path.
        unsafe { libc::umount2(point.as_ptr(), libc::MNT_DETACH) };
    }
    mount("cgroup2", CGROUPS, "cgroup2", 0, "");
    mount("tmpfs", "/run", "tmpfs", 0, "mode=755");
}

fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong, data: &str) {
    let [s, t, k, d] = [source, target, kind, data].map(|x| CString::new(x).expect("no NUL"));
    // SAFETY: four NUL-terminated strings, which mount(2) only reads.
    let rc = unsafe { libc::mount(s.as_ptr(), t.as_ptr(), k.as_ptr(), flags, d.as_ptr().cast()) };
    let error = std::io::Error::last_os_error();
    assert_eq!(rc, 0, "unable to mount {target}: {error}");
}

/// What takes so much processor time where the bounds of these tests were taken takes this much here and
/// now: a machine may be slower, and is while others use its caches and the other half of its cores.
pub fn here(there: Duration) -> Duration {
    /// Of the work below, there and at rest.
    const WORK: Duration = Duration::from_millis(10);
    let used = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock of the thread");
    let work = || {
        let before = used();
        for _ in 0..300 {
            // system calls, allocations and arithmetic, as the program has them
            let text = fs::read("/proc/self/status").expect("read the status");
            std::hint::black_box(
                text.iter().fold(0u32, |sum, b| sum.rotate_left(5) ^ u32::from(*b)),
            );
        }
        Duration::from(used() - before)
    };
    // not the first one, which finds everything cold
    let now = (0..4).map(|_| work()).min().unwrap_or(WORK);
    there.mul_f64((now.as_secs_f64() / WORK.as_secs_f64()).max(1.0))
}

/// What a moment is here and now: a program is started and its end is seen, by the clock, in the median
/// of some tries. What happens "at once" takes some of these, whatever keeps the machine.
pub fn moment() -> Duration {
    let mut tries: Vec<Duration> = (0..9)
        .map(|_| {
            let start = Instant::now();
            assert!(Command::new("true").status().expect("start true").success());
            start.elapsed()
        })
        .collect();
    tries.sort();
    tries[tries.len() / 2]
}

/// Gives `path` the permission bits `mode`.
pub fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

/// A pipe (read end, write end), both closed on exec.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("make a pipe")
}
