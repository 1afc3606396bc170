//! Netlink sockets: sending one batch, reading its answers, dumps. It never decides what an error
//! means to the program. Source: netlink(7), net/netfilter/nfnetlink.c.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    bind, getsockname, sendto, setsockopt, socket, sockopt, AddressFamily, MsgFlags, NetlinkAddr,
    SockFlag, SockProtocol, SockType,
};

use super::msg::{Batch, Word};
use super::parse::{self, Messages, Reply};
use super::uapi::*;
use crate::error::{Error, Result};
use crate::log;
use crate::sys;

/// Room for the largest datagram that the kernel builds for a dump (`NLMSG_GOODSIZE`, 32 KiB), and
/// for acknowledgements that echo a request.
const RECEIVE: usize = 32 * 1024;
/// No datagram is larger than a socket's receive buffer that the kernel lets grow.
const LARGEST: usize = 16 << 20;
/// A send buffer that holds all but the largest of batches; larger ones raise it (see `reserve`).
const SEND_BUFFER: usize = 256 * 1024;

/// Words that memory is kept for until the next batch: a transaction of some elements fits.
const USUAL: usize = 2048 / NLA_ALIGNTO;

/// A netlink socket with its receive buffer and its running sequence number.
pub struct Socket {
    fd: OwnedFd,
    port: u32,
    seq: u32,
    send_buffer: usize,
    /// Answers that nobody waited for may still be queued.
    stale: bool,
    /// Something changed during the dump, so that its answer may not be a whole one.
    interrupted: bool,
    buf: Vec<u8>,
    /// Memory for the next batch: to map and unmap it costs more than to fill it.
    spare: Vec<Word>,
}

/// Why a batch is not in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The kernel refused message `seq` (nothing of the batch took effect).
    Refused { seq: u32, errno: Errno, text: Option<String> },
    /// Answers were lost (ENOBUFS): the batch may or may not be in force.
    Unknown,
}

impl Socket {
    /// Opens a socket for `protocol`, subscribed to the multicast `groups` (numbers, not a mask).
    pub fn open(protocol: SockProtocol, groups: &[u32]) -> Result<Socket> {
        let fail = |errno| Error::system("unable to open a netlink socket", errno);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol).map_err(fail)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(fail)?;
        let port = getsockname::<NetlinkAddr>(fd.as_raw_fd()).map_err(fail)?.pid();
        // Both only make errors clearer; kernels before 4.12 do without.
        let _ = sys::set_option(fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1);
        let _ = sys::set_option(fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1);
        for group in groups {
            let group = *group as i32;
            sys::set_option(fd.as_fd(), libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)
                .map_err(fail)?;
        }
        let mut socket = Socket {
            fd,
            port,
            seq: 0,
            send_buffer: 0,
            stale: false,
            interrupted: false,
            buf: vec![0; RECEIVE],
            spare: Vec::with_capacity(USUAL),
        };
        socket.reserve(SEND_BUFFER);
        Ok(socket)
    }

    /// The kernel's port id of this socket: what NEWGEN and a table's owner attribute name.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// An empty batch whose sequence numbers continue this socket's.
    pub fn batch(&mut self) -> Batch {
        Batch::within(std::mem::take(&mut self.spare), self.seq)
    }

    /// Takes back the memory of a batch that is done with, unless it was a large one.
    pub fn reuse(&mut self, batch: Batch) {
        let memory = batch.into_memory();
        if memory.capacity() <= 2 * USUAL {
            self.spare = memory;
        }
    }

    /// Sends a batch and reads its answers up to that of message `last`, which must carry
    /// `NLM_F_ACK`. The kernel has done the work when sendto(2) returns, so nothing is waited for.
    ///
    /// Errors: the outer one is the socket's, the inner one the kernel's answer.
    pub fn transact(
        &mut self,
        batch: &Batch,
        last: u32,
    ) -> Result<std::result::Result<(), Failure>> {
        self.send(batch)?;
        let mut refused = None;
        let answered = self.answers(last, &mut |Reply { seq, errno, text }| {
            let errno = Errno::from_raw(errno);
            refused.get_or_insert(Failure::Refused { seq, errno, text });
        });
        match answered {
            Ok(true) => Ok(refused.map_or(Ok(()), Err)),
            // every answer there will be is in the queue already: a missing one was lost
            Ok(false) => Ok(Err(refused.unwrap_or(Failure::Unknown))),
            Err(errno) => Err(unreadable(errno)),
        }
    }

    /// Sends a batch that fails at message `last` at the latest, and returns every refusal of it:
    /// sequence number and errno.
    pub fn refusals(&mut self, batch: &Batch, last: u32) -> Result<Vec<(u32, Errno)>> {
        self.send(batch)?;
        let mut refused = Vec::new();
        let mut take = |reply: Reply| refused.push((reply.seq, Errno::from_raw(reply.errno)));
        match self.answers(last, &mut take).map_err(unreadable)? {
            true => Ok(refused),
            false => Err(unreadable(Errno::ENOBUFS)),
        }
    }

    /// Hands the refusals among the answers that are there to `refused`, up to the answer of message
    /// `last`; whether that is there, and none was lost. Of a batch without its beginning the kernel
    /// refuses each of thousands of messages, for which there may be no room.
    fn answers(&mut self, last: u32, refused: &mut dyn FnMut(Reply)) -> nix::Result<bool> {
        let mut lost = false;
        loop {
            let length = match self.receive() {
                Ok(length) => length,
                Err(Errno::EAGAIN) => return Ok(false),
                // the kernel tells of that before it gives what is in the queue
                Err(Errno::ENOBUFS) => {
                    lost = true;
                    continue;
                }
                Err(errno) => return Err(errno),
            };
            for reply in Messages::new(&self.buf[..length]).filter_map(|m| parse::reply(&m)) {
                let done = reply.seq == last;
                if reply.errno != 0 {
                    refused(reply);
                }
                if done {
                    self.stale = false;
                    return Ok(!lost);
                }
            }
        }
    }

    /// Sends one request, which must carry `NLM_F_ACK`, and gives what `read` makes of its answer;
    /// `None` where the kernel only acknowledges it.
    pub fn ask<T>(
        &mut self,
        request: &dyn Fn(&mut Batch),
        read: impl Fn(&parse::Message) -> Option<T>,
    ) -> Result<nix::Result<Option<T>>> {
        let mut batch = self.batch();
        request(&mut batch);
        self.send(&batch)?;
        let mut found = None;
        loop {
            let length = self.receive().map_err(unreadable)?;
            let own = |message: &parse::Message| message.seq == batch.last_seq();
            for message in Messages::new(&self.buf[..length]).filter(own) {
                match parse::reply(&message) {
                    None => found = found.or_else(|| read(&message)),
                    Some(Reply { errno, .. }) => {
                        self.stale = false;
                        return Ok(match errno {
                            0 => Ok(found),
                            errno => Err(Errno::from_raw(errno)),
                        });
                    }
                }
            }
        }
    }

    /// Has the kernel do what these requests say, of which the last must carry `NLM_F_ACK`.
    ///
    /// Errors: its refusal, or the socket's; ENOBUFS where the answer was lost.
    pub fn tell(&mut self, requests: &dyn Fn(&mut Batch)) -> nix::Result<()> {
        let mut batch = self.batch();
        requests(&mut batch);
        let last = batch.last_seq();
        match self.transact(&batch, last) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Failure::Refused { errno, text, .. })) => {
                text.iter().for_each(|text| log!(Debug, "the kernel says: {text}"));
                Err(errno)
            }
            Ok(Err(Failure::Unknown)) => Err(Errno::ENOBUFS),
            Err(error) => Err(error.errno().unwrap_or(Errno::EIO)),
        }
    }

    /// Sends one dump request and gives what `each` makes of the messages of the answer.
    ///
    /// A dump that the kernel marks as interrupted (something changed meanwhile) is asked for
    /// again; after some tries the last answer stands, so a busy table cannot hold us up.
    pub fn dump<T>(
        &mut self,
        request: &dyn Fn(&mut Batch),
        each: impl Fn(&parse::Message) -> Option<T>,
    ) -> Result<nix::Result<Vec<T>>> {
        let mut tries = 8;
        loop {
            tries -= 1;
            let mut found = Vec::new();
            let mut take = |message: &parse::Message| found.extend(each(message));
            if let Some(end) = self.try_dump(request, &mut take, tries == 0)? {
                return Ok(end.map(|()| found));
            }
        }
    }

    /// The same, once; `None` where the answer is not a whole one and this is not the `last` try.
    /// Compiled once for all that is dumped.
    fn try_dump(
        &mut self,
        request: &dyn Fn(&mut Batch),
        each: &mut dyn FnMut(&parse::Message),
        last: bool,
    ) -> Result<Option<nix::Result<()>>> {
        self.begin_dump(request)?;
        loop {
            match self.part(each) {
                Ok(None) => {}
                Ok(Some(_)) if self.interrupted && !last => return Ok(None),
                Ok(end) => return Ok(end),
                Err(Errno::ENOBUFS) if !last => return Ok(None),
                Err(errno) => return Err(unreadable(errno)),
            }
        }
    }

    /// Sends a dump request whose answer is read by [`Socket::part`], before anything else is sent.
    pub fn begin_dump(&mut self, request: &dyn Fn(&mut Batch)) -> Result<()> {
        let mut batch = self.batch();
        request(&mut batch);
        self.interrupted = false;
        self.send(&batch)
    }

    /// Reads one datagram of a dump, which the kernel makes just then; how the dump has ended where
    /// that was the last.
    pub fn part(
        &mut self,
        each: &mut dyn FnMut(&parse::Message),
    ) -> nix::Result<Option<nix::Result<()>>> {
        let length = self.receive()?;
        for message in Messages::new(&self.buf[..length]) {
            if message.seq != self.seq {
                continue;
            }
            self.interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
            match message.kind {
                NLMSG_DONE => {
                    self.stale = false;
                    return Ok(Some(match parse::i32_ne(message.body) {
                        Some(code) if code < 0 => Err(Errno::from_raw(-code)),
                        _ => Ok(()),
                    }));
                }
                NLMSG_ERROR => {
                    let errno = parse::reply(&message).map_or(libc::EPROTO, |r| r.errno);
                    return Ok(Some(Err(Errno::from_raw(errno))));
                }
                _ => each(&message),
            }
        }
        Ok(None)
    }

    /// Reads one datagram of notifications; `Ok(None)` when there is none.
    ///
    /// Errors: ENOBUFS where notifications were lost.
    pub fn notification(&mut self) -> nix::Result<Option<&[u8]>> {
        match self.receive() {
            Ok(length) => Ok(Some(&self.buf[..length])),
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    fn send(&mut self, batch: &Batch) -> Result<()> {
        if std::mem::replace(&mut self.stale, true) {
            self.drain();
        }
        self.seq = batch.last_seq();
        self.reserve(batch.bytes().len());
        let kernel = NetlinkAddr::new(0, 0);
        loop {
            match sendto(self.fd.as_raw_fd(), batch.bytes(), &kernel, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(Error::system("unable to send to netlink", errno)),
            }
        }
    }

    /// Receives one datagram from the kernel into `buf`; datagrams of other senders are dropped.
    ///
    /// Errors: ENOBUFS where datagrams were lost, which one is that has no room in `buf`: the next
    /// of its size will have.
    fn receive(&mut self) -> nix::Result<usize> {
        loop {
            match sys::receive_netlink(self.fd.as_fd(), &mut self.buf) {
                Ok((_, sender)) if sender != 0 => continue,
                Ok((length, _)) if length <= self.buf.len() => return Ok(length),
                Ok((length, _)) => {
                    self.buf.resize(length.min(LARGEST), 0);
                    return Err(Errno::ENOBUFS);
                }
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Forgets answers that nobody read, so that they cannot be taken for answers to what comes.
    fn drain(&mut self) {
        loop {
            match self.receive() {
                Ok(_) | Err(Errno::ENOBUFS) => continue,
                Err(_) => return,
            }
        }
    }

    /// Makes room for a batch of `length` bytes: sendto(2) refuses with EMSGSIZE what does not
    /// fit the send buffer as a whole. Raising it above the sysctl's limit needs CAP_NET_ADMIN.
    fn reserve(&mut self, length: usize) {
        // the kernel counts its own overhead too, and each failing message may answer at length
        let want = (length + 64 * 1024).max(SEND_BUFFER);
        if want <= self.send_buffer {
            return;
        }
        self.send_buffer = want;
        if setsockopt(&self.fd, sockopt::SndBufForce, &want).is_err() {
            let _ = setsockopt(&self.fd, sockopt::SndBuf, &want);
        }
        if setsockopt(&self.fd, sockopt::RcvBufForce, &want).is_err() {
            let _ = setsockopt(&self.fd, sockopt::RcvBuf, &want);
        }
    }
}

fn unreadable(errno: Errno) -> Error {
    Error::system("unable to read from netlink", errno)
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many ip rules a dump tells of.
    fn rules(socket: &mut Socket) -> usize {
        let request = |batch: &mut Batch| {
            let open = batch.begin(RTM_GETRULE, NLM_F_REQUEST | NLM_F_DUMP);
            batch.header(&[AF_INET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            batch.end(open);
        };
        let found = socket.dump(&request, |message| (message.kind == RTM_NEWRULE).then_some(()));
        found.expect("a socket that works").expect("an answer").len()
    }

    #[test]
    fn a_datagram_without_room_is_one_that_was_lost() {
        let mut socket = Socket::open(SockProtocol::NetlinkRoute, &[]).expect("open a socket");
        let all = rules(&mut socket);
        assert!(all > 0);
        for room in [1, 16, 64, 100] {
            socket.buf = vec![0; room];
            assert_eq!(rules(&mut socket), all, "{room} bytes");
            assert!(socket.buf.len() > room);
        }
        // an answer, and a notification
        socket.buf = vec![0; 20];
        let mut batch = socket.batch();
        let open = batch.begin(RTM_GETRULE, NLM_F_REQUEST | NLM_F_ACK);
        batch.end(open);
        let last = batch.last_seq();
        assert_eq!(socket.transact(&batch, last).expect("a socket"), Err(Failure::Unknown));
        socket.send(&batch).expect("send");
        socket.buf = vec![0; 20];
        assert_eq!(socket.notification(), Err(Errno::ENOBUFS));
        assert_eq!(socket.notification(), Ok(None));
    }

    #[test]
    fn the_first_of_more_refusals_than_there_is_room_for() {
        const NOTHING: u16 = 2000; // beyond RTM_MAX of linux/rtnetlink.h
        let mut socket = Socket::open(SockProtocol::NetlinkRoute, &[]).expect("open a socket");
        setsockopt(&socket.fd, sockopt::RcvBuf, &0).expect("set SO_RCVBUF");
        let mut batch = socket.batch();
        for _ in 0..200 {
            let open = batch.begin(NOTHING, NLM_F_REQUEST | NLM_F_ACK);
            batch.end(open);
        }
        let last = batch.last_seq();
        let refused = socket.transact(&batch, last).expect("a socket");
        assert!(
            matches!(refused, Err(Failure::Refused { seq, .. }) if seq == last - 199),
            "{refused:?}, of {last}"
        );
    }
}
