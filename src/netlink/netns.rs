//! Network namespaces at the other ends of interfaces, as rtnetlink has them: requests, and the one
//! reader of answers and notifications. Pure.
//! Source: rtnetlink(7), include/uapi/linux/if_link.h, net_namespace.h; the order of notifications was
//! measured.

use super::link::{self, namespace_id, Link, IFINFOMSG};
use super::msg::Batch;
use super::parse::{Attrs, Message};
use super::uapi::*;
use crate::bpf;

/// Length of `struct rtgenmsg` with its padding.
const RTGENMSG: usize = 4;

/// What a notification tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerChange {
    Is(Link),
    Gone(u32),
    /// The other end of `link` went into that namespace. Of `link` itself that is told later.
    Moved {
        link: u32,
        to: u32,
    },
    /// That namespace ends, and its id may become another one's.
    Ended(u32),
}

/// Asks for the id of the namespace that a process is in.
pub fn get_namespace(batch: &mut Batch, pid: u32) {
    let open = batch.begin(RTM_GETNSID, NLM_F_REQUEST | NLM_F_ACK);
    batch.header(&[0; RTGENMSG]);
    batch.u32_ne(NETNSA_PID, pid);
    batch.end(open);
}

/// Reads an answer to [`get_namespace`]; `None` for one without an id.
pub fn parse_namespace(message: &Message) -> Option<u32> {
    (message.kind == RTM_NEWNSID).then(|| namespace_told(message))?
}

fn namespace_told(message: &Message) -> Option<u32> {
    namespace_id(&Attrs::after(message.body, RTGENMSG), NETNSA_NSID)
}

/// Reads a notification.
pub fn read(message: &Message) -> Vec<PeerChange> {
    let mut changes = Vec::new();
    match message.kind {
        RTM_NEWLINK => changes.extend(link::parse(message).map(PeerChange::Is)),
        RTM_DELLINK => {
            if let Some((index, attrs)) = link::told(message) {
                let ends = attrs.u32_ne(IFLA_LINK).zip(namespace_id(&attrs, IFLA_NEW_NETNSID));
                changes.push(PeerChange::Gone(index));
                changes.extend(ends.map(|(link, to)| PeerChange::Moved { link, to }));
            }
        }
        RTM_DELNSID => changes.extend(namespace_told(message).map(PeerChange::Ended)),
        _ => {}
    }
    changes
}

/// A socket filter that passes what tells of other namespaces, and of interfaces that go: what
/// becomes of all others need not wake us.
pub fn event_filter() -> [libc::sock_filter; 10] {
    let equal = |kind, yes, no| bpf::equal(bpf::half(kind), yes, no);
    [
        bpf::load(libc::BPF_H, 4), // 0: nlmsg_type
        equal(RTM_DELLINK, 7, 0),
        equal(RTM_DELNSID, 6, 0),
        equal(RTM_NEWLINK, 0, 4),
        // 4: where IFLA_LINK_NETNSID is
        bpf::set(libc::BPF_LD, (NLMSG_HDRLEN + IFINFOMSG) as u32),
        bpf::set(libc::BPF_LDX, u32::from(IFLA_LINK_NETNSID)),
        bpf::load(libc::BPF_W, SKF_AD_OFF + SKF_AD_NLATTR),
        bpf::equal(0, 0, 1),
        bpf::answer(0),        // 8
        bpf::answer(u32::MAX), // 9
    ]
}

/// One that passes nothing.
pub fn no_event() -> [libc::sock_filter; 1] {
    [bpf::answer(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    fn told(kind: u16, index: u32, attrs: &[(u16, u32)]) -> Vec<PeerChange> {
        let mut batch = Batch::new(0);
        let open = batch.begin(kind, 0);
        match kind {
            RTM_DELNSID => batch.header(&[0; RTGENMSG]),
            _ => batch.header(&[&[0; 4][..], &index.to_ne_bytes(), &[0; 8]].concat()),
        }
        batch.str_z(IFLA_IFNAME, "veth0");
        let nest = batch.nest(IFLA_LINKINFO);
        batch.str_z(IFLA_INFO_KIND, "veth");
        batch.end_nest(nest);
        attrs.iter().for_each(|(attr, value)| batch.u32_ne(*attr, *value));
        batch.end(open);
        let message = Messages::new(batch.bytes()).next().unwrap();
        for cut in 0..message.body.len() {
            read(&Message { body: &message.body[..cut], ..message });
        }
        read(&message)
    }

    #[test]
    fn what_is_told_of_other_namespaces() {
        let link = |master, peer| {
            let name = "veth0".into();
            let kind = "veth".into();
            PeerChange::Is(Link {
                index: 7,
                name,
                kind,
                is_pair: true,
                master,
                peer,
                ..Link::default()
            })
        };
        let none = u32::MAX;
        assert_eq!(told(RTM_NEWLINK, 7, &[]), [link(0, None)]);
        let all = [(IFLA_MASTER, 3), (IFLA_LINK_NETNSID, 0)];
        assert_eq!(told(RTM_NEWLINK, 7, &all), [link(3, Some(0))]);
        assert_eq!(told(RTM_NEWLINK, 7, &[(IFLA_LINK_NETNSID, none)]), [link(0, None)]);
        assert_eq!(told(RTM_DELLINK, 7, &[]), [PeerChange::Gone(7)]);
        let moved = [(IFLA_LINK, 6), (IFLA_NEW_NETNSID, 2)];
        let both = [PeerChange::Gone(7), PeerChange::Moved { link: 6, to: 2 }];
        assert_eq!(told(RTM_DELLINK, 7, &moved), both);
        assert_eq!(told(RTM_NEWADDR, 7, &[]), []);
    }
}
