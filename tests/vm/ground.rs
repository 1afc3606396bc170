//! The guest as a host: file systems, modules, and the network that the integration tests have.
//!
//! ```text
//!   inside (the host under test)              outside (the rest of the internet)
//!   in0  192.0.2.1/24  2001:db8:1::1/64 ====  out0  192.0.2.2/24  2001:db8:1::2/64
//!   default routes via out0                   lo answers for 203.0.113.0/24, 2001:db8:2::/64
//! ```

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Error;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sched::{setns, unshare, CloneFlags};

use crate::client::Client;
use crate::netlink::Link;
use crate::world::interface_index;
use crate::{at, wait_until, PATIENCE};

pub const HOST: [&str; 2] = ["192.0.2.1", "2001:db8:1::1"];
const GATE: [&str; 2] = ["192.0.2.2", "2001:db8:1::2"];
const WORLD: [(&str, u8); 2] = [("203.0.113.0", 24), ("2001:db8:2::", 64)];
pub const MAC: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];

/// A remote host of each family.
pub const REMOTE4: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7));
pub const REMOTE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 7));

/// Mounts what every host has, and loads the modules that the driver chose, in its order.
pub fn boot() {
    for (kind, point) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run"), ("cgroup2", "/sys/fs/cgroup")]
    {
        let [kind, at] = [kind, point].map(|text| CString::new(text).expect("no NUL"));
        let none = std::ptr::null();
        // SAFETY: two NUL-terminated strings; a source and data that the kernel need not read.
        let rc = unsafe { libc::mount(c"none".as_ptr(), at.as_ptr(), kind.as_ptr(), 0, none) };
        assert_eq!(rc, 0, "unable to mount {point}: {}", Error::last_os_error());
    }
    let order = fs::read_to_string("/mods/order").expect("read the module list");
    order.lines().for_each(|module| load(&format!("/mods/{module}")));
}

/// Loads a module.
pub fn load(module: &str) {
    let file = File::open(module).expect("open a module");
    // SAFETY: a descriptor that is open, and an empty string.
    let rc = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if rc != 0 {
        println!("unable to load {module}: {}", Error::last_os_error());
    }
}

/// Both network namespaces, joined by a veth pair. This process is inside.
pub struct Ground {
    inside: File,
    outside: File,
}

impl Ground {
    pub fn new() -> Ground {
        let inside = namespace();
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare the outside network");
        let ground = Ground { inside, outside: namespace() };
        setns(&ground.inside, CloneFlags::CLONE_NEWNET).expect("return from the outside");
        ping_for_all();
        let mut link = Link::open();
        link.veth("in0", MAC[0], "out0", MAC[1], ground.outside.as_raw_fd());
        link.up(1);
        let in0 = interface_index("in0");
        link.up(in0);
        for i in 0..2 {
            link.address(in0, address(HOST[i]), [24, 64][i]);
            link.neighbour(in0, address(GATE[i]), MAC[1]);
        }
        ground.outside(|| {
            ping_for_all();
            let mut link = Link::open();
            link.up(1);
            let out0 = interface_index("out0");
            link.up(out0);
            for i in 0..2 {
                link.address(out0, address(GATE[i]), [24, 64][i]);
                link.neighbour(out0, address(HOST[i]), MAC[0]);
                link.local_route(address(WORLD[i].0), WORLD[i].1);
            }
        });
        for gate in GATE {
            link.default_route(in0, address(gate));
        }
        // link state moves in a kernel worker
        for remote in [REMOTE4, REMOTE6] {
            let echo = format!("echo {remote}");
            let ping = || Client::ping(&at("/"), remote).run().who();
            assert!(wait_until(PATIENCE, || ping() == echo), "no way to {remote}: {}", ping());
        }
        ground
    }

    /// Runs `f` in the outside network namespace. Threads and sockets that it makes stay there.
    pub fn outside<T>(&self, f: impl FnOnce() -> T) -> T {
        within(&self.outside, f)
    }

    /// One more network namespace, empty.
    pub fn another(&self) -> File {
        let new = within(&self.inside, || {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network");
            namespace()
        });
        setns(&self.inside, CloneFlags::CLONE_NEWNET).expect("return");
        new
    }
}

/// Runs `f` in a network namespace. Threads and sockets that it makes stay there.
pub fn within<T>(net: &File, f: impl FnOnce() -> T) -> T {
    let home = namespace();
    setns(net, CloneFlags::CLONE_NEWNET).expect("enter a namespace");
    let result = f();
    setns(&home, CloneFlags::CLONE_NEWNET).expect("return from a namespace");
    result
}

fn namespace() -> File {
    File::open("/proc/thread-self/ns/net").expect("open the network namespace")
}

pub fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

pub fn addr(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// Ping without CAP_NET_RAW.
fn ping_for_all() {
    let range = "/proc/sys/net/ipv4/ping_group_range";
    fs::write(range, "0 2147483647").expect("allow pings");
}

/// A pipe (read end, write end), both closed on exec.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("make a pipe")
}
