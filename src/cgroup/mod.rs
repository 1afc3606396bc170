//! The cgroup tree: where it is mounted ([`mount`]), the model ([`tree`]), watching it ([`watch`]),
//! and what waits to be looked at ([`backlog`]).

pub mod backlog;
pub mod dying;
pub mod mount;
pub mod tree;
pub mod watch;
