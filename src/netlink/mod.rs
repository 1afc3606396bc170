//! Netlink: bytes out ([`msg`]), bytes in ([`parse`]), sockets ([`socket`]), constants ([`uapi`]);
//! questions about other sockets ([`diag`]).

pub mod diag;
pub mod msg;
pub mod parse;
pub mod socket;
pub mod uapi;
