//! What takes long to list is listed by and by: the kernel makes each datagram of a dump when it is
//! read. Over a socket of its own, since a dump that goes on takes part in whatever else is read there.

use nix::sys::socket::SockProtocol;

use crate::error::{Error, Result};
use crate::netlink::msg::Batch;
use crate::netlink::parse::Message;
use crate::netlink::socket::Socket;

/// Several dumps, one after the other; `A` is what is asked for by each.
pub struct Listing<A> {
    socket: Socket,
    /// The next one last.
    asks: Vec<A>,
    /// The answer to this is being read.
    reads: Option<A>,
    /// Nobody wants it any more; the kernel begins no other before its end.
    outdated: bool,
    /// Nothing was refused of what was asked for last.
    pub whole: bool,
}

impl<A> Listing<A> {
    pub fn open(protocol: SockProtocol) -> Result<Listing<A>> {
        let socket = Socket::open(protocol, &[])?;
        Ok(Listing { socket, asks: Vec::new(), reads: None, outdated: false, whole: true })
    }

    /// Has [`Listing::read`] begin with these, the last one first, whatever it was about to read.
    pub fn begin(&mut self, asks: Vec<A>) {
        self.outdated = self.reads.is_some();
        self.whole = true;
        self.asks = asks;
    }

    /// Reads some more, as much as the kernel tells of at once; false where there is no more.
    pub fn read(
        &mut self,
        request: fn(&mut Batch, &A),
        each: &mut dyn FnMut(&A, &Message),
    ) -> Result<nix::Result<bool>> {
        let more = self.read_on(request, each);
        self.whole &= matches!(more, Ok(Ok(_)));
        more
    }

    fn read_on(
        &mut self,
        request: fn(&mut Batch, &A),
        each: &mut dyn FnMut(&A, &Message),
    ) -> Result<nix::Result<bool>> {
        if self.reads.is_none() {
            let Some(ask) = self.asks.pop() else {
                return Ok(Ok(false));
            };
            self.socket.begin_dump(&|batch| request(batch, &ask))?;
            self.reads = Some(ask);
        }
        let (ask, outdated) = (self.reads.as_ref(), self.outdated);
        let end = self.socket.part(&mut |message| {
            if let Some(ask) = ask.filter(|_| !outdated) {
                each(ask, message);
            }
        });
        if end != Ok(None) {
            self.reads = None;
            self.outdated = false;
        }
        let end = end.map_err(|errno| Error::system("unable to read from netlink", errno))?;
        Ok(end.filter(|_| !outdated).unwrap_or(Ok(())).map(|()| true))
    }
}
