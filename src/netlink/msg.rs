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
    /// By words, which all of netlink is aligned to: one is put in sooner than some bytes are.
    buf: Vec<Word>,
    seq: u32,
}

pub type Word = [u8; NLA_ALIGNTO];

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
    pub fn within(mut buf: Vec<Word>, seq0: u32) -> Batch {
        buf.clear();
        Batch { buf, seq: seq0 }
    }

    pub fn into_memory(self) -> Vec<Word> {
        self.buf
    }

    pub fn bytes(&self) -> &[u8] {
        self.buf.as_flattened()
    }

    /// The sequence number of the message begun last.
    pub fn last_seq(&self) -> u32 {
        self.seq
    }

    /// Begins a message of `kind` with `flags`; the header's port id is left 0 for the kernel.
    pub fn begin(&mut self, kind: u16, flags: u16) -> Open {
        let (at, head) = (self.buf.len(), self.head(kind, flags));
        self.buf.extend_from_slice(&head);
        Open(at)
    }

    fn head(&mut self, kind: u16, flags: u16) -> [Word; 4] {
        self.seq = self.seq.wrapping_add(1);
        [[0; 4], halves(kind, flags), self.seq.to_ne_bytes(), [0; 4]]
    }

    /// Begins a message to a subsystem of nfnetlink, with its `struct nfgenmsg`
    /// (include/uapi/linux/netfilter/nfnetlink.h); version and resource are 0.
    pub fn begin_nfnl(&mut self, subsystem: u16, kind: u16, flags: u16, family: u8) -> Open {
        self.begin_with(subsystem << 8 | kind, flags, [family, 0, 0, 0])
    }

    /// The same, with any such header.
    pub fn begin_with(&mut self, kind: u16, flags: u16, nfgenmsg: [u8; 4]) -> Open {
        let (at, [length, kind, seq, port]) = (self.buf.len(), self.head(kind, flags));
        self.buf.extend_from_slice(&[length, kind, seq, port, nfgenmsg]);
        Open(at)
    }

    pub fn end(&mut self, open: Open) {
        let len = self.len_since(&open) as u32;
        self.buf[open.0] = len.to_ne_bytes();
    }

    /// Bytes of the message that `open` began, header included.
    pub fn len_since(&self, open: &Open) -> usize {
        size_of_val(&self.buf[open.0..])
    }

    /// Raw bytes of a fixed header (`struct nfgenmsg`, `rtmsg`, `fib_rule_hdr`), padded to 4.
    pub fn header(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some((word, more)) = rest.split_first_chunk() {
            self.buf.push(*word);
            rest = more;
        }
        if !rest.is_empty() {
            let mut word = [0; 4];
            word.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
            self.buf.push(word);
        }
    }

    /// An attribute with the bytes as they are (register data, host-order cgroup ids).
    pub fn raw(&mut self, attr: u16, data: &[u8]) {
        self.attribute((NLA_HDRLEN + data.len()) as u16, attr);
        self.header(data);
    }

    /// A nest with one such attribute.
    pub fn raw_in(&mut self, nest: u16, attr: u16, data: &[u8]) {
        let length = NLA_HDRLEN + data.len();
        let whole = NLA_HDRLEN + length.next_multiple_of(NLA_ALIGNTO);
        self.attribute(whole as u16, nest | NLA_F_NESTED);
        self.raw(attr, data);
    }

    /// Attributes that are whole already.
    pub fn attributes(&mut self, words: &[Word]) {
        self.buf.extend_from_slice(words);
    }

    /// The head of one, of that length with it.
    fn attribute(&mut self, length: u16, attr: u16) {
        self.buf.push(halves(length, attr));
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
        let length = NLA_HDRLEN + value.len() + 1;
        debug_assert!(length <= u16::MAX as usize);
        self.attribute(length as u16, attr);
        self.header(value.as_bytes());
        if value.len() % NLA_ALIGNTO == 0 {
            self.buf.push([0; 4]);
        }
    }

    /// Begins a nested attribute (with `NLA_F_NESTED`, as libmnl writes it).
    pub fn nest(&mut self, attr: u16) -> Nest {
        let at = self.buf.len();
        self.attribute(0, attr | NLA_F_NESTED);
        Nest(at)
    }

    pub fn end_nest(&mut self, nest: Nest) {
        let len = size_of_val(&self.buf[nest.0..]);
        let len = u16::try_from(len).expect("lists are split before a nest outgrows 64 KiB");
        let [.., c, d] = self.buf[nest.0];
        self.buf[nest.0] = halves(len, u16::from_ne_bytes([c, d]));
    }

    /// Sets `NLM_F_ACK` on the message that begins at byte `at`.
    pub fn want_ack(&mut self, at: usize) {
        let [a, b, c, d] = self.buf[at / NLA_ALIGNTO + 1];
        let flags = u16::from_ne_bytes([c, d]) | NLM_F_ACK;
        self.buf[at / NLA_ALIGNTO + 1] = halves(u16::from_ne_bytes([a, b]), flags);
    }
}

fn halves(first: u16, second: u16) -> Word {
    let ([a, b], [c, d]) = (first.to_ne_bytes(), second.to_ne_bytes());
    [a, b, c, d]
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
