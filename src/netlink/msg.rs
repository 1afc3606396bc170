//! The netlink writer: messages, attributes and nests appended to one buffer. It owns no socket
//! and knows no protocol; byte order is in each method's name.
//! Source: netlink(7), include/uapi/linux/netlink.h; lengths as libmnl writes them.

use std::net::IpAddr;

use super::uapi::*;

/// A run of netlink messages, ready for one sendto(2).
///
/// Messages are numbered from `seq0 + 1` in the order they are begun, so an error that the kernel
/// reports for a sequence number names one message.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    buf: Vec<u8>,
    seq: u32,
}

/// A message that has been begun; give it back to [`Batch::end`].
#[must_use]
pub struct Open(usize);

/// A nest that has been begun; give it back to [`Batch::end_nest`].
#[must_use]
pub struct Nest(usize);

impl Batch {
    /// An empty run whose first message gets the sequence number `seq0 + 1`.
    pub fn new(seq0: u32) -> Batch {
        Batch::within(Vec::new(), seq0)
    }

    /// The same, in memory that is there already.
    pub fn within(mut buf: Vec<u8>, seq0: u32) -> Batch {
        buf.clear();
        Batch { buf, seq: seq0 }
    }

    pub fn into_memory(self) -> Vec<u8> {
        self.buf
    }

    pub fn bytes(&self) -> &[u8] {
        &self.buf
    }

    /// The sequence number of the message begun last.
    pub fn last_seq(&self) -> u32 {
        self.seq
    }

    /// Begins a message of `kind` with `flags`; the header's port id is left 0 for the kernel.
    pub fn begin(&mut self, kind: u16, flags: u16) -> Open {
        let at = self.buf.len();
        let head = self.head(kind, flags);
        self.buf.extend_from_slice(&head);
        Open(at)
    }

    /// Begins a message to a subsystem of nfnetlink, with its `struct nfgenmsg`
    /// (include/uapi/linux/netfilter/nfnetlink.h); version and resource are 0.
    pub fn begin_nfnl(&mut self, subsystem: u16, kind: u16, flags: u16, family: u8) -> Open {
        self.begin_with(subsystem << 8 | kind, flags, [family, 0, 0, 0])
    }

    /// The same, with any such header.
    pub fn begin_with(&mut self, kind: u16, flags: u16, nfgenmsg: [u8; 4]) -> Open {
        let at = self.buf.len();
        let mut head = [0; 20];
        head[..16].copy_from_slice(&self.head(kind, flags));
        head[16..].copy_from_slice(&nfgenmsg);
        self.buf.extend_from_slice(&head);
        Open(at)
    }

    fn head(&mut self, kind: u16, flags: u16) -> [u8; 16] {
        self.seq = self.seq.wrapping_add(1);
        let ([a, b], [c, d]) = (kind.to_ne_bytes(), flags.to_ne_bytes());
        let [e, f, g, h] = self.seq.to_ne_bytes();
        [0, 0, 0, 0, a, b, c, d, e, f, g, h, 0, 0, 0, 0]
    }

    pub fn end(&mut self, open: Open) {
        let len = (self.buf.len() - open.0) as u32;
        self.buf[open.0..open.0 + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Bytes of the message that `open` began, header included.
    pub fn len_since(&self, open: &Open) -> usize {
        self.buf.len() - open.0
    }

    /// Raw bytes of a fixed header (`struct nfgenmsg`, `rtmsg`, `fib_rule_hdr`), padded to 4.
    pub fn header(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
        self.pad();
    }

    /// An attribute with the bytes as they are (register data, host-order cgroup ids).
    pub fn raw(&mut self, attr: u16, data: &[u8]) {
        self.attribute((NLA_HDRLEN + data.len()) as u16, attr);
        self.buf.extend_from_slice(data);
        self.pad();
    }

    /// A nest with one such attribute.
    pub fn raw_in(&mut self, nest: u16, attr: u16, data: &[u8]) {
        let length = NLA_HDRLEN + data.len();
        let ([a, b], [c, d]) = (
            ((NLA_HDRLEN + length.next_multiple_of(4)) as u16).to_ne_bytes(),
            (nest | NLA_F_NESTED).to_ne_bytes(),
        );
        let ([e, f], [g, h]) = ((length as u16).to_ne_bytes(), attr.to_ne_bytes());
        self.buf.extend_from_slice(&[a, b, c, d, e, f, g, h]);
        self.buf.extend_from_slice(data);
        self.pad();
    }

    /// Attributes that are whole already.
    pub fn attributes(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// The head of one, of that length with it.
    fn attribute(&mut self, length: u16, attr: u16) {
        let ([a, b], [c, d]) = (length.to_ne_bytes(), attr.to_ne_bytes());
        self.buf.extend_from_slice(&[a, b, c, d]);
    }

    pub fn u8(&mut self, attr: u16, value: u8) {
        self.raw(attr, &[value]);
    }

    pub fn u32_be(&mut self, attr: u16, value: u32) {
        self.raw(attr, &value.to_be_bytes());
    }

    pub fn u64_be(&mut self, attr: u16, value: u64) {
        self.raw(attr, &value.to_be_bytes());
    }

    pub fn u32_ne(&mut self, attr: u16, value: u32) {
        self.raw(attr, &value.to_ne_bytes());
    }

    /// An address, in network order.
    pub fn ip(&mut self, attr: u16, address: IpAddr) {
        match address {
            IpAddr::V4(ip) => self.raw(attr, &ip.octets()),
            IpAddr::V6(ip) => self.raw(attr, &ip.octets()),
        }
    }

    /// A string with its terminating NUL.
    pub fn str_z(&mut self, attr: u16, value: &str) {
        let at = self.buf.len();
        self.attribute((NLA_HDRLEN + value.len() + 1) as u16, attr);
        self.buf.extend_from_slice(value.as_bytes());
        self.buf.resize((self.buf.len() + 1).next_multiple_of(4), 0);
        debug_assert!(self.buf.len() - at <= u16::MAX as usize);
    }

    /// Begins a nested attribute (with `NLA_F_NESTED`, as libmnl writes it).
    pub fn nest(&mut self, attr: u16) -> Nest {
        let at = self.buf.len();
        self.attribute(0, attr | NLA_F_NESTED);
        Nest(at)
    }

    pub fn end_nest(&mut self, nest: Nest) {
        let len = self.buf.len() - nest.0;
        let len = u16::try_from(len).expect("lists are split before a nest outgrows 64 KiB");
        self.buf[nest.0..nest.0 + 2].copy_from_slice(&len.to_ne_bytes());
    }

    /// Sets `NLM_F_ACK` on the message that begins at byte `at`.
    pub fn want_ack(&mut self, at: usize) {
        let flags = u16::from_ne_bytes([self.buf[at + 6], self.buf[at + 7]]) | NLM_F_ACK;
        self.buf[at + 6..at + 8].copy_from_slice(&flags.to_ne_bytes());
    }

    fn pad(&mut self) {
        while self.buf.len() % 4 != 0 {
            self.buf.push(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_and_padding_are_those_of_netlink() {
        let mut b = Batch::new(6);
        let m = b.begin(0x0a00, NLM_F_REQUEST);
        b.header(&[1, 0, 0, 0]);
        b.str_z(1, "abcd");
        let n = b.nest(2);
        b.u8(1, 7);
        b.end_nest(n);
        b.end(m);
        let want: Vec<u8> = [
            &44u32.to_ne_bytes()[..],
            &0x0a00u16.to_ne_bytes(),
            &1u16.to_ne_bytes(),
            &7u32.to_ne_bytes(),
            &0u32.to_ne_bytes(),
            &[1, 0, 0, 0],
            &9u16.to_ne_bytes(),
            &1u16.to_ne_bytes(),
            b"abcd\0\0\0\0",
            &12u16.to_ne_bytes(),
            &0x8002u16.to_ne_bytes(),
            &5u16.to_ne_bytes(),
            &1u16.to_ne_bytes(),
            &[7, 0, 0, 0],
        ]
        .concat();
        assert_eq!(b.bytes(), want);
        assert_eq!(b.last_seq(), 7);
    }
}
