//! Netlink: bytes out ([`msg`]), bytes in ([`parse`]), sockets ([`socket`]), constants ([`uapi`]).

pub mod msg;
pub mod parse;
pub mod socket;
pub mod uapi;
