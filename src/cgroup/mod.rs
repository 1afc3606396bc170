//! The cgroup tree: where it is mounted ([`mount`]), the model ([`tree`]), watching it ([`watch`]).

pub mod mount;
pub mod tree;
pub mod watch;
