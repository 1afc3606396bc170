//! What the kernel holds, read without any code of the program: set elements straight from
//! nf_tables, the rest from nft and iproute2.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::client::PATIENCE;
use crate::wait_until;

/// How long a cgroup may take to be classified before a test gives up.
pub const SETTLE: Duration = PATIENCE;

/// What a command printed on standard output, where it has succeeded.
fn ask(command: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(command).args(args).stderr(Stdio::null()).output();
    let out = out.unwrap_or_else(|e| panic!("unable to start {command}: {e}"));
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

/// What a command printed on standard output; panics where it fails.
#[track_caller]
pub fn output(command: &str, args: &[&str]) -> String {
    ask(command, args).unwrap_or_else(|| panic!("{command} {args:?} has failed"))
}

/// The same; empty where it fails, as `nft list` and `ip route list` do where there is no such table.
pub fn output_if_any(command: &str, args: &[&str]) -> String {
    ask(command, args).unwrap_or_default()
}

/// `nft ARGS`, with `script` on standard input.
pub fn nft(args: &[&str], script: &str) -> Output {
    let mut command = Command::new("nft");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("start nft");
    child.stdin.take().expect("stdin is piped").write_all(script.as_bytes()).expect("feed nft");
    child.wait_with_output().expect("wait for nft")
}

/// Loads an nft script; panics where nft has anything to say about it.
#[track_caller]
pub fn load(script: &str) {
    let out = nft(&["-f", "-"], script);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && said.is_empty(), "{said}in\n{script}");
}

/// Another process, which owns a table of our name for as long as this lives.
pub struct Owner(Child);

impl Owner {
    /// Takes the table, in place of ours where that is there.
    pub fn take() -> Owner {
        let mut command = Command::new("nft");
        command.arg("-i").stdin(Stdio::piped()).stdout(Stdio::null());
        let mut owner = Owner(command.spawn().expect("start nft"));
        let ours = if table().is_empty() { "" } else { "delete table inet cgtproxy; " };
        let words = format!("{ours}add table inet cgtproxy {{ flags owner; }}\n");
        let nft = owner.0.stdin.as_mut().expect("stdin is piped");
        nft.write_all(words.as_bytes()).expect("feed nft");
        assert!(wait_until(SETTLE, || table().contains("flags owner")), "{}", table());
        owner
    }
}

impl Drop for Owner {
    /// Its table goes with it.
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The table as nft lists it; empty where there is none.
pub fn table() -> String {
    output_if_any("nft", &["list", "table", "inet", "cgtproxy"])
}

/// (packets, bytes) of each counter in a chain of the table.
pub fn counters(chain: &str) -> Vec<(u64, u64)> {
    let text = output("nft", &["list", "chain", "inet", "cgtproxy", chain]);
    let numbers = |rest: &str| {
        let mut words = rest.split_whitespace();
        let mut number = |nth| words.nth(nth).and_then(|w| w.parse().ok()).expect("a number");
        (number(0), number(1))
    };
    text.split("counter packets ").skip(1).map(numbers).collect()
}

/// The table without counter values, and without its flags: nft cannot set them all, and the
/// owner's goes with the owner. `args` are further options of nft.
pub fn table_plain(args: &[&str]) -> String {
    let text = output_if_any("nft", &[args, &["-s", "list", "table", "inet", "cgtproxy"]].concat());
    let flags = |line: &str| line.starts_with("\tflags");
    let lines = text.lines().filter(|line| !flags(line) && !line.is_empty());
    let lines = lines.map(|line| line.split(" # progname").next().unwrap_or(line).trim_end());
    lines.map(|line| format!("{line}\n")).collect()
}

/// Lines of `ip rule` for one family, with numbers for names.
pub fn ip_rules(family: &str) -> String {
    output("ip", &["-N", family, "rule", "list"])
}

/// Lines of a route table for one family.
pub fn ip_routes(family: &str, table: &str) -> String {
    output_if_any("ip", &["-N", family, "route", "list", "table", table])
}

/// Everything that carries our name or number: the table, ip rules and routes of protocol 99, and
/// whatever is in route table 300. Empty where cgtproxy has left nothing behind.
pub fn residue() -> String {
    let ours = |text: String| {
        let lines = text.lines().filter(|l| l.split("proto ").any(|part| part.starts_with("99")));
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };
    let mut left = output("nft", &["list", "tables"]);
    for family in ["-4", "-6"] {
        left += &ours(ip_rules(family));
        left += &ours(ip_routes(family, "all"));
        left += &ip_routes(family, "300");
    }
    left
}

/// As [`state`] gives it.
pub type State = (String, BTreeMap<String, BTreeSet<u64>>);

/// All that `run` programs, in a form that two runs over the same cgroups have in common: the
/// table, rules and routes as text, and the cgroup sets as ids. Without the rules for cgroups that
/// are removed: they stay for as long as the kernel is not done with those.
pub fn state() -> State {
    // Terse: for each element of a cgroup set, nft walks the whole cgroup tree to find its path.
    let mut text = table_plain(&["-t"]);
    let mut lines: Vec<&str> = text.lines().filter(|l| !l.contains("jhash")).collect();
    // in which order a cgroup's level is asked for its targets is the order in which these came up
    let level = |line: &str| Some(line.split_once(" @cg_")?.0.to_owned());
    let same_level = |a: &&str, b: &&str| level(a).is_some_and(|a| Some(a) == level(b));
    lines.chunk_by_mut(same_level).for_each(<[_]>::sort);
    text = lines.into_iter().map(|l| format!("{l}\n")).collect();
    let names = text.lines().filter_map(|l| l.trim().strip_prefix("set ")?.strip_suffix(" {"));
    let names = names.filter(|name| name.starts_with("cg_"));
    let sets = names.map(|name| (name.to_owned(), set_ids(name).expect("a set that is listed")));
    let sets = sets.collect();
    for family in ["-4", "-6"] {
        text += &ip_rules(family);
        text += &ip_routes(family, "300");
    }
    (text, sets)
}

/// The id by which nf_tables knows a cgroup: the file handle of its directory.
pub fn cgroup_id(path: &Path) -> io::Result<u64> {
    /// struct file_handle of linux/fs.h.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        id: u64,
    }
    let name = CString::new(path.as_os_str().as_bytes()).expect("no NUL");
    let mut handle = Handle { bytes: 8, kind: 0, id: 0 };
    let mut mount = 0i32;
    let (handle_at, mount_at) = (&raw mut handle, &raw mut mount);
    let nr = libc::SYS_name_to_handle_at;
    // SAFETY: a NUL-terminated path, and a handle with room for the 8 bytes that it announces.
    let rc = unsafe { libc::syscall(nr, libc::AT_FDCWD, name.as_ptr(), handle_at, mount_at, 0) };
    if rc == 0 {
        Ok(handle.id)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Waits until a TCP connection to or from `end` is established in the calling thread's network namespace.
#[track_caller]
pub fn await_connection(end: SocketAddr) {
    let list = || output("ss", &["-Htn", "state", "established"]);
    let there = wait_until(SETTLE, || list().contains(&end.to_string()));
    assert!(there, "no connection with {end}");
}

/// Waits until the cgroup `path` is in the set of `target`.
pub fn await_member(path: &Path, target: &str) {
    let id = cgroup_id(path).expect("the id of a cgroup");
    let set = format!("cg_{target}");
    let there = wait_until(SETTLE, || set_ids(&set).is_some_and(|ids| ids.contains(&id)));
    assert!(there, "{path:?} (id {id}) does not get into {set}:\n{}", table());
}

/// Waits until `set` holds exactly `want`.
pub fn await_exactly(set: &str, want: &BTreeSet<u64>, timeout: Duration) {
    let mut last = None;
    let same = wait_until(timeout, || {
        last = set_ids(set);
        last.as_ref() == Some(want)
    });
    if !same {
        let have = last.unwrap_or_default();
        let count = |a: &BTreeSet<u64>, b: &BTreeSet<u64>| a.difference(b).count();
        panic!(
            "{set} holds {} of {} elements, {} missing, {} stale",
            have.len(),
            want.len(),
            count(want, &have),
            count(&have, want)
        );
    }
}

// linux/netfilter/nfnetlink.h and nf_tables.h.
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETSETELEM: u16 = 13;
const NFPROTO_INET: u8 = 1;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_DATA_VALUE: u16 = 1;
const NLM_F_DUMP_INTR: u16 = 0x10;

/// The cgroup ids in a set of `table inet cgtproxy`; None where the set does not exist.
pub fn set_ids(set: &str) -> Option<BTreeSet<u64>> {
    // A dump that a transaction has interrupted may miss elements, so it starts over. Under
    // endless churn some dump is whole soon enough.
    (0..1000).find_map(|_| match dump(set) {
        Ok(ids) => Some(Some(ids)),
        Err(libc::ENOENT) => Some(None),
        Err(libc::EINTR) => None,
        Err(errno) => panic!("unable to list {set}: {}", io::Error::from_raw_os_error(errno)),
    })?
}

fn dump(set: &str) -> Result<BTreeSet<u64>, i32> {
    let socket = netlink();
    let mut request = vec![0; 16];
    request.extend([NFPROTO_INET, 0, 0, 0]);
    let attributes = [(NFTA_SET_ELEM_LIST_TABLE, "cgtproxy"), (NFTA_SET_ELEM_LIST_SET, set)];
    for (kind, text) in attributes {
        request.extend((4 + text.len() as u16 + 1).to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(text.as_bytes());
        request.push(0);
        request.resize(request.len().next_multiple_of(4), 0);
    }
    let len = request.len() as u32;
    request[0..4].copy_from_slice(&len.to_ne_bytes());
    let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETSETELEM;
    request[4..6].copy_from_slice(&kind.to_ne_bytes());
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16;
    request[6..8].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: reads `request` only.
    let n = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    assert_eq!(n, request.len() as isize, "send: {}", io::Error::last_os_error());

    let mut ids = BTreeSet::new();
    let mut whole = true;
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        let room = buffer.len();
        // SAFETY: writes within `buffer`.
        let n = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), room, 0) };
        assert!(n > 0, "recv: {}", io::Error::last_os_error());
        let mut rest = &buffer[..n as usize];
        while rest.len() >= 16 {
            let (len, kind, flags) = (u32_at(rest, 0) as usize, u16_at(rest, 4), u16_at(rest, 6));
            let message = &rest[16..len];
            rest = &rest[len.next_multiple_of(4).min(rest.len())..];
            whole &= flags & NLM_F_DUMP_INTR == 0;
            match i32::from(kind) {
                libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                    return match u32_at(message, 0) as i32 {
                        0 if whole => Ok(ids),
                        0 => Err(libc::EINTR),
                        errno => Err(-errno),
                    };
                }
                _ => ids.extend(elements(&message[4..])),
            }
        }
    }
}

/// Whether our table has a chain of that name, asked without another process.
pub fn has_chain(name: &str) -> bool {
    // linux/netfilter/nf_tables.h: NFT_MSG_GETCHAIN, NFTA_CHAIN_TABLE and NFTA_CHAIN_NAME
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_GETCHAIN: u16 = 4;
    const NFPROTO_INET: u8 = 1;
    let socket = netlink();
    let mut request = vec![0; 4];
    request.extend((NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN).to_ne_bytes());
    request.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request.resize(20, 0);
    request[16] = NFPROTO_INET;
    for (kind, text) in [(1u16, "cgtproxy"), (3, name)] {
        request.extend((5 + text.len() as u16).to_ne_bytes());
        request.extend(kind.to_ne_bytes());
        request.extend(text.bytes());
        request.resize((request.len() + 1).next_multiple_of(4), 0);
    }
    let length = request.len() as u32;
    request[..4].copy_from_slice(&length.to_ne_bytes());
    let mut answer = [0u8; 1024];
    // SAFETY: reads `request`, writes within `answer`.
    let n = unsafe {
        libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0);
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    assert!(n >= 20, "recv: {}", io::Error::last_os_error());
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    i32::from(kind) != libc::NLMSG_ERROR
}

/// Makes conntrack forget every flow of the calling thread's network namespace.
pub fn forget_flows() {
    // linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h
    const NFNL_SUBSYS_CTNETLINK: u16 = 1;
    const IPCTNL_MSG_CT_DELETE: u16 = 2;
    let socket = netlink();
    let mut request = 20u32.to_ne_bytes().to_vec();
    request.extend((NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE).to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    request.resize(20, 0);
    let mut answer = [0u8; 256];
    // SAFETY: reads `request`, writes within `answer`.
    let n = unsafe {
        libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0);
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    assert!(n >= 20, "recv: {}", io::Error::last_os_error());
    let errno = -(u32_at(&answer, 16) as i32);
    assert_eq!(errno, 0, "forget flows: {}", io::Error::from_raw_os_error(errno));
}

/// Fills the table of conntrack, as far as a network namespace may, with flows of nobody: such as stay
/// until all are forgotten or, where they are `fleeting`, such as make room for others. False, with the
/// reason printed, where that would take too much of the kernel's memory, 0.3 KiB for each.
#[must_use]
pub fn fill_flows(fleeting: bool) -> bool {
    let most = conntrack_number("max");
    if most > 1 << 20 {
        println!("SKIP: nf_conntrack_max is {most}");
        return false;
    }
    add_flows(fleeting, 0, most);
    true
}

pub fn conntrack_number(name: &str) -> usize {
    let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    text.trim().parse().expect("a number")
}

/// Adds such flows, known by a mark, until there are `most`, or no more fit.
pub fn add_flows(fleeting: bool, mark: u32, most: usize) {
    let socket = netlink();
    let one = flow_of_nobody(fleeting, mark);
    let mut flows = one.repeat(400);
    // another one each time
    static LAST: AtomicU32 = AtomicU32::new(10 << 24);
    while conntrack_number("count") < most {
        for flow in flows.chunks_mut(one.len()) {
            let from = LAST.fetch_add(1, Ordering::Relaxed);
            for at in OF_NOBODY {
                flow[at..at + 4].copy_from_slice(&from.to_be_bytes());
            }
        }
        let mut answer = [0u8; 256];
        // SAFETY: reads `flows`, writes within `answer`.
        let n = unsafe {
            let fd = socket.as_raw_fd();
            let sent = libc::send(fd, flows.as_ptr().cast(), flows.len(), 0);
            assert_eq!(sent, flows.len() as isize, "send: {}", io::Error::last_os_error());
            libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), libc::MSG_DONTWAIT)
        };
        // only what is refused is answered
        if n >= 20 {
            let errno = -(u32_at(&answer, 16) as i32);
            assert_eq!(errno, libc::ENOMEM, "{}", io::Error::from_raw_os_error(errno));
            break;
        }
    }
}

/// Where a flow of nobody says who began it.
const OF_NOBODY: [usize; 2] = [32, 92];

/// A message that adds one, of UDP.
fn flow_of_nobody(fleeting: bool, mark: u32) -> Vec<u8> {
    // linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_common.h
    const NFNL_SUBSYS_CTNETLINK: u16 = 1;
    const IPCTNL_MSG_CT_NEW: u16 = 0;
    const CTA_TUPLE_ORIG: u16 = 1;
    const CTA_TUPLE_REPLY: u16 = 2;
    const CTA_STATUS: u16 = 3;
    const CTA_TIMEOUT: u16 = 7;
    const CTA_MARK: u16 = 8;
    const IPS_SEEN_REPLY: u32 = 1 << 1;
    const IPS_ASSURED: u32 = 1 << 2;
    const IPS_CONFIRMED: u32 = 1 << 3;
    const NESTED: u16 = 1 << 15;
    let attribute = |kind: u16, payload: &[u8]| {
        let mut bytes = (4 + payload.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let tuple = |kind: u16, from: [u8; 4], to: [u8; 4]| {
        // CTA_TUPLE_IP: CTA_IP_V4_SRC and _DST; CTA_TUPLE_PROTO: CTA_PROTO_NUM and the ports
        let ip = [attribute(1, &from), attribute(2, &to)].concat();
        let udp = [attribute(1, &[17]), attribute(2, &[0, 9]), attribute(3, &[0, 9])].concat();
        let both = [attribute(NESTED | 1, &ip), attribute(NESTED | 2, &udp)].concat();
        attribute(NESTED | kind, &both)
    };
    let (from, to) = ([0; 4], [198, 18, 0, 1]);
    let status = IPS_CONFIRMED | if fleeting { 0 } else { IPS_SEEN_REPLY | IPS_ASSURED };
    let body = [
        tuple(CTA_TUPLE_ORIG, from, to),
        tuple(CTA_TUPLE_REPLY, to, from),
        attribute(CTA_STATUS, &status.to_be_bytes()),
        attribute(CTA_TIMEOUT, &3600u32.to_be_bytes()),
        attribute(CTA_MARK, &mark.to_be_bytes()),
    ]
    .concat();
    let mut message = (20 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend((NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW).to_ne_bytes());
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    message.extend((flags as u16).to_ne_bytes());
    message.resize(16, 0);
    message.extend([libc::AF_INET as u8, 0, 0, 0]);
    message.extend(body);
    message
}

/// The keys in the attributes of a NFT_MSG_NEWSETELEM message.
pub fn elements(message: &[u8]) -> Vec<u64> {
    let lists = attributes(message).filter(|a| a.0 == NFTA_SET_ELEM_LIST_ELEMENTS);
    lists
        .flat_map(|list| attributes(list.1))
        .flat_map(|element| attributes(element.1).filter(|a| a.0 == NFTA_SET_ELEM_KEY))
        .flat_map(|key| attributes(key.1).filter(|a| a.0 == NFTA_DATA_VALUE))
        .map(|value| u64::from_ne_bytes(value.1.try_into().expect("an 8 byte key")))
        .collect()
}

/// (type, payload) of each netlink attribute.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        if bytes.len() < 4 {
            return None;
        }
        let (len, kind) = (usize::from(u16_at(bytes, 0)), u16_at(bytes, 2) & 0x3fff);
        let payload = &bytes[4..len];
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
        Some((kind, payload))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A socket to nf_tables and conntrack.
pub fn netlink() -> OwnedFd {
    // SAFETY: integers only; the descriptor is new, hence ours.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_NETFILTER);
        assert!(fd >= 0, "netlink socket: {}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}
