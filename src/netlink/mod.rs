//! Netlink: bytes out ([`msg`]), bytes in ([`parse`]), sockets ([`socket`]), constants ([`uapi`]);
//! questions about other programs' sockets ([`diag`]) and flows ([`conntrack`]), rules and routes
//! ([`fib`]), interfaces ([`link`]), network namespaces ([`netns`]).

pub mod conntrack;
pub mod diag;
pub mod fib;
pub mod link;
pub mod msg;
pub mod netns;
pub mod parse;
pub mod socket;
pub mod uapi;
