//! The cgroup tree: where it is mounted ([`mount`]), the model of it ([`tree`]) and what follows from
//! that ([`core`]: [`event`]s in and actions out, a policy's [`ranking`], the [`dying`], the [`blind`],
//! which subtrees hold elements, [`gates`]),
//! watching it ([`watch`], [`vacant`]), and all of that going on by turns ([`follow`], [`backlog`]).

pub mod backlog;
pub mod blind;
pub mod core;
pub mod dying;
pub mod event;
pub mod follow;
pub mod gates;
pub mod holds;
pub mod mount;
pub mod ranking;
pub mod tally;
pub mod tree;
pub mod vacant;
pub mod watch;
