//! Bounded readers of what the kernel sends: messages, attributes, errors with their ext-ack text.
//! Nothing here trusts a length; a malformed tail ends the iteration.
//! Source: netlink(7), include/uapi/linux/netlink.h.

use std::borrow::Cow;
use std::net::IpAddr;

use super::uapi::*;

/// One netlink message; `body` is what follows the 16-byte header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub seq: u32,
    pub pid: u32,
    pub body: &'a [u8],
}

/// Iterates the messages of one datagram.
#[derive(Debug, Clone)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    pub fn new(datagram: &'a [u8]) -> Messages<'a> {
        Messages { rest: datagram }
    }
}

impl Message<'_> {
    /// Whether it is one of that subsystem of nfnetlink.
    pub fn is_nfnl(&self, subsystem: u16, kind: u16) -> bool {
        self.kind == subsystem << 8 | kind
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Message<'a>;

    fn next(&mut self) -> Option<Message<'a>> {
        if self.rest.is_empty() {
            return None;
        }
        let len = u32_ne(self.rest).unwrap_or(0) as usize;
        if len < NLMSG_HDRLEN || len > self.rest.len() {
            self.rest = &[];
            return None;
        }
        let (head, body) = self.rest[..len].split_at(NLMSG_HDRLEN);
        self.rest = self.rest.get(align4(len)..).unwrap_or(&[]);
        Some(Message {
            kind: u16::from_ne_bytes([head[4], head[5]]),
            flags: u16::from_ne_bytes([head[6], head[7]]),
            seq: u32::from_ne_bytes([head[8], head[9], head[10], head[11]]),
            pid: u32::from_ne_bytes([head[12], head[13], head[14], head[15]]),
            body,
        })
    }
}

/// Iterates attributes as (type without flag bits, payload); ends at the first that does not fit.
#[derive(Debug, Clone)]
pub struct Attrs<'a>(&'a [u8]);

impl<'a> Attrs<'a> {
    pub fn new(bytes: &'a [u8]) -> Attrs<'a> {
        Attrs(bytes)
    }

    /// The attributes behind a fixed header of `header` bytes.
    pub fn after(body: &'a [u8], header: usize) -> Attrs<'a> {
        Attrs(body.get(align4(header)..).unwrap_or(&[]))
    }

    /// The payload of the first attribute of type `kind`.
    pub fn get(&self, kind: u16) -> Option<&'a [u8]> {
        self.clone().find(|(k, _)| *k == kind).map(|(_, data)| data)
    }

    /// The attributes in that one; none where it is not there.
    pub fn nest(&self, kind: u16) -> Attrs<'a> {
        Attrs(self.get(kind).unwrap_or(&[]))
    }

    pub fn text(&self, kind: u16) -> Option<Cow<'a, str>> {
        self.get(kind).map(str_z)
    }

    pub fn byte(&self, kind: u16) -> Option<u8> {
        self.get(kind)?.first().copied()
    }

    pub fn u32_ne(&self, kind: u16) -> Option<u32> {
        u32_ne(self.get(kind)?)
    }

    pub fn u32_be(&self, kind: u16) -> Option<u32> {
        u32_be(self.get(kind)?)
    }

    pub fn u64_be(&self, kind: u16) -> Option<u64> {
        u64_be(self.get(kind)?)
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<(u16, &'a [u8])> {
        let head = self.0.get(..NLA_HDRLEN)?;
        let len = u16::from_ne_bytes([head[0], head[1]]) as usize;
        let kind = u16::from_ne_bytes([head[2], head[3]]) & NLA_TYPE_MASK;
        let data = self.0.get(NLA_HDRLEN..len)?;
        self.0 = self.0.get(align4(len)..).unwrap_or(&[]);
        Some((kind, data))
    }
}

/// What an `NLMSG_ERROR` message says: errno (0 is an acknowledgement) and the ext-ack text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub seq: u32,
    pub errno: i32,
    pub text: Option<String>,
}

/// Reads an `NLMSG_ERROR` (`struct nlmsgerr`, then ext-ack attributes); `None` for other messages.
pub fn reply(message: &Message) -> Option<Reply> {
    if message.kind != NLMSG_ERROR {
        return None;
    }
    let errno = i32_ne(message.body)?.checked_neg()?;
    let mut text = None;
    if message.flags & NLM_F_ACK_TLVS != 0 {
        // struct nlmsgerr holds the request's header, and its payload too unless capped
        let request = message.body.get(4..)?;
        let echoed = match message.flags & NLM_F_CAPPED {
            0 => u32_ne(request)? as usize,
            _ => NLMSG_HDRLEN,
        };
        let attrs = Attrs::new(request.get(align4(echoed)..).unwrap_or(&[]));
        text = attrs.text(NLMSGERR_ATTR_MSG).map(Cow::into_owned);
    }
    Some(Reply { seq: message.seq, errno, text })
}

/// A NUL-terminated (or bare) string; invalid UTF-8 becomes U+FFFD.
pub fn str_z(bytes: &[u8]) -> Cow<'_, str> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end])
}

/// An address, by its length; no other bytes may follow.
pub fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

pub fn u32_ne(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

pub fn i32_ne(bytes: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

pub fn u32_be(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

pub fn u64_be(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?))
}

/// `len` rounded up to a multiple of 4 (`NLMSG_ALIGN`, `NLA_ALIGN`).
fn align4(len: usize) -> usize {
    len.saturating_add(3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::msg::Batch;

    fn sample() -> Batch {
        let mut b = Batch::new(0);
        for i in 0..3u8 {
            let m = b.begin(20 + i as u16, NLM_F_REQUEST);
            b.header(&[i; 4]);
            b.str_z(1, "name");
            b.u32_be(2, 7);
            b.end(m);
        }
        b
    }

    #[test]
    fn reads_back_what_the_writer_wrote() {
        let b = sample();
        let all: Vec<_> = Messages::new(b.bytes()).collect();
        assert_eq!(
            all.iter().map(|m| (m.kind, m.seq)).collect::<Vec<_>>(),
            [(20, 1), (21, 2), (22, 3)]
        );
        for m in &all {
            let attrs = Attrs::after(m.body, 4);
            assert_eq!((attrs.text(1).as_deref(), attrs.u32_be(2)), (Some("name"), Some(7)));
        }
    }

    #[test]
    fn any_cut_and_any_length_is_survived() {
        let b = sample();
        for cut in 0..b.bytes().len() {
            assert_eq!(Messages::new(&b.bytes()[..cut]).count(), cut / 40, "cut at {cut}");
        }
        for at in 0..b.bytes().len() {
            for v in [0, 1, 3, 15, 16, 17, 127, 255] {
                let mut bytes = b.bytes().to_vec();
                bytes[at] = v;
                for m in Messages::new(&bytes) {
                    let _ = reply(&m);
                    Attrs::after(m.body, 4).for_each(drop);
                }
            }
        }
    }

    #[test]
    fn error_with_ext_ack() {
        let mut b = Batch::new(41);
        let m = b.begin(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS);
        b.header(&(-2i32).to_ne_bytes());
        b.header(&[0; 16]);
        b.str_z(NLMSGERR_ATTR_MSG, "no such thing");
        b.end(m);
        let m = Messages::new(b.bytes()).next().unwrap();
        let want = Reply { seq: 42, errno: 2, text: Some("no such thing".into()) };
        assert_eq!(reply(&m), Some(want));
        // i32::MIN cannot be negated: not an answer, not a panic
        let mut bytes = b.bytes().to_vec();
        bytes[16..20].copy_from_slice(&i32::MIN.to_ne_bytes());
        assert_eq!(reply(&Messages::new(&bytes).next().unwrap()), None);
    }
}
