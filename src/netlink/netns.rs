//! Interfaces and the network namespaces at their other ends, as rtnetlink has them: requests, and the
//! one reader of answers and notifications. Pure.
//! Source: rtnetlink(7), include/uapi/linux/if_link.h, net_namespace.h; the order of notifications was
//! measured.

use super::msg::Batch;
use super::parse::{self, Attrs, Message};
use super::uapi::*;

/// Length of `struct ifinfomsg`, and of `struct rtgenmsg` with its padding.
const IFINFOMSG: usize = 16;
const RTGENMSG: usize = 4;

/// An interface of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// A pair, whose other end is another interface.
    pub is_pair: bool,
    /// The bridge that it is a port of, by index; 0 for none.
    pub master: u32,
    /// This namespace's id of the one that the other end is in, if that is another one.
    pub peer: Option<u32>,
}

/// What a notification tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
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

/// Asks for all interfaces.
pub fn get_links(batch: &mut Batch) {
    let open = batch.begin(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP);
    batch.header(&[0; IFINFOMSG]);
    batch.u32_ne(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
    batch.end(open);
}

/// Reads an answer to [`get_links`].
pub fn parse_link(message: &Message) -> Option<Link> {
    match read(message).next()? {
        Change::Is(link) => Some(link),
        _ => None,
    }
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
    let attrs = Attrs::after(message.body, RTGENMSG);
    (message.kind == RTM_NEWNSID).then(|| attrs.get(NETNSA_NSID).and_then(id))?
}

/// -1 stands for none.
fn id(bytes: &[u8]) -> Option<u32> {
    parse::i32_ne(bytes).and_then(|id| u32::try_from(id).ok())
}

/// Reads a notification.
pub fn read(message: &Message) -> impl Iterator<Item = Change> {
    let (first, second) = match message.kind {
        RTM_NEWLINK | RTM_DELLINK => link(message).unwrap_or_default(),
        RTM_DELNSID => {
            let attrs = Attrs::after(message.body, RTGENMSG);
            (attrs.get(NETNSA_NSID).and_then(id).map(Change::Ended), None)
        }
        _ => (None, None),
    };
    first.into_iter().chain(second)
}

fn link(message: &Message) -> Option<(Option<Change>, Option<Change>)> {
    // a bridge tells of its ports by such messages too, as of its own family
    if *message.body.first()? != AF_UNSPEC {
        return None;
    }
    // struct ifinfomsg: index at 4
    let index = parse::u32_ne(message.body.get(4..)?)?;
    let attrs = Attrs::after(message.body, IFINFOMSG);
    let number = |attr| attrs.clone().get(attr).and_then(parse::u32_ne);
    if message.kind == RTM_DELLINK {
        let to = attrs.clone().get(IFLA_NEW_NETNSID).and_then(id);
        let moved = number(IFLA_LINK).zip(to).map(|(link, to)| Change::Moved { link, to });
        return Some((Some(Change::Gone(index)), moved));
    }
    let info = Attrs::new(attrs.clone().get(IFLA_LINKINFO).unwrap_or(&[]));
    let kind = info.get(IFLA_INFO_KIND).map(parse::str_z).unwrap_or_default();
    let link = Link {
        index,
        name: parse::str_z(attrs.clone().get(IFLA_IFNAME)?).into_owned(),
        is_pair: ["veth", "netkit"].contains(&&*kind),
        master: number(IFLA_MASTER).unwrap_or(0),
        peer: attrs.clone().get(IFLA_LINK_NETNSID).and_then(id),
    };
    Some((Some(Change::Is(link)), None))
}

/// A socket filter that passes what tells of other namespaces, and of interfaces that go: what
/// becomes of all others need not wake us.
pub fn event_filter() -> [libc::sock_filter; 10] {
    // BPF loads big-endian; the header is in host order
    let kind = |kind: u16| u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
    let op = |code: u32, k: u32, jt: u8, jf: u8| {
        let code = code as u16;
        libc::sock_filter { code, jt, jf, k }
    };
    let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let load = |size: u32, at: u32| op(libc::BPF_LD | libc::BPF_ABS | size, at, 0, 0);
    let set = |register: u32, k: u32| op(register | libc::BPF_IMM, k, 0, 0);
    let answer = |k: u32| op(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    [
        load(libc::BPF_H, 4), // 0: nlmsg_type
        op(jump, kind(RTM_DELLINK), 7, 0),
        op(jump, kind(RTM_DELNSID), 6, 0),
        op(jump, kind(RTM_NEWLINK), 0, 4),
        set(libc::BPF_LD, (NLMSG_HDRLEN + IFINFOMSG) as u32), // 4: where IFLA_LINK_NETNSID is
        set(libc::BPF_LDX, u32::from(IFLA_LINK_NETNSID)),
        load(libc::BPF_W, SKF_AD_OFF + SKF_AD_NLATTR),
        op(jump, 0, 0, 1),
        answer(0),        // 8
        answer(u32::MAX), // 9
    ]
}

/// One that passes nothing.
pub fn no_event() -> [libc::sock_filter; 1] {
    [libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::parse::Messages;

    fn told(kind: u16, index: u32, attrs: &[(u16, u32)]) -> Vec<Change> {
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
            read(&Message { body: &message.body[..cut], ..message }).for_each(drop);
        }
        read(&message).collect()
    }

    #[test]
    fn what_is_told_of_other_namespaces() {
        let link = |master, peer| {
            let name = "veth0".into();
            Change::Is(Link { index: 7, name, is_pair: true, master, peer })
        };
        let none = u32::MAX;
        assert_eq!(told(RTM_NEWLINK, 7, &[]), [link(0, None)]);
        let all = [(IFLA_MASTER, 3), (IFLA_LINK_NETNSID, 0)];
        assert_eq!(told(RTM_NEWLINK, 7, &all), [link(3, Some(0))]);
        assert_eq!(told(RTM_NEWLINK, 7, &[(IFLA_LINK_NETNSID, none)]), [link(0, None)]);
        assert_eq!(told(RTM_DELLINK, 7, &[]), [Change::Gone(7)]);
        let moved = [(IFLA_LINK, 6), (IFLA_NEW_NETNSID, 2)];
        let both = [Change::Gone(7), Change::Moved { link: 6, to: 2 }];
        assert_eq!(told(RTM_DELLINK, 7, &moved), both);
        assert_eq!(told(RTM_NEWADDR, 7, &[]), []);
    }
}
