//! Sockets as inet_diag tells of them: who listens on a port. Pure bytes.
//! Source: sock_diag(7), include/uapi/linux/inet_diag.h.

use super::msg::Batch;
use super::parse::{self, Attrs, Message};
use super::uapi::*;

/// A socket that takes what arrives at a port, of whatever address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listener {
    pub uid: u32,
    /// Id of the cgroup that it was made in (or that its process has moved to since).
    pub cgroup: u64,
}

/// Length of `struct inet_diag_msg`, and where its `idiag_uid` is.
const MSG_LEN: usize = 72;
const UID_AT: usize = 64;

/// Asks for the TCP listeners or the unconnected UDP sockets of a family on `port`.
pub fn get_listeners(batch: &mut Batch, family: u8, protocol: u8, port: u16) {
    let open = batch.begin(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP);
    // struct inet_diag_req_v2: states in host order, then struct inet_diag_sockid in network order
    let mut request = vec![family, protocol, 0, 0];
    request.extend((1u32 << TCP_LISTEN | 1 << TCP_CLOSE).to_ne_bytes());
    request.extend(port.to_be_bytes());
    request.resize(56, 0);
    batch.header(&request);
    batch.end(open);
}

/// Reads one answer; `None` where it is something else, or from a kernel that does not tell of
/// cgroups (before 5.9).
pub fn parse(message: &Message) -> Option<Listener> {
    if message.kind != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    let uid = parse::u32_ne(message.body.get(UID_AT..)?)?;
    let cgroup = Attrs::after(message.body, MSG_LEN).get(INET_DIAG_CGROUP_ID)?;
    let cgroup = u64::from_ne_bytes(cgroup.get(..8)?.try_into().ok()?);
    Some(Listener { uid, cgroup })
}
