//! cgtproxy: a per-application transparent proxy manager for Linux. The library exists so that
//! tests and fuzz targets can link the parts; the program is `main.rs`.
//!
//! Data flows one way, from the file to the kernel, and no part uses one behind it
//! (tests/layers.rs):
//!
//! 1. [`config`] makes a [`config::Config`] of the file (a key is a row of `config/keys.rs`), and
//!    [`policy`] says which of its rules decides for a cgroup.
//! 2. [`cgroup`] follows the tree: [`cgroup::watch`] looks, [`cgroup::core`] knows by that what the
//!    kernel's sets should hold, and gives the difference to what they held before.
//! 3. [`plan`] makes a transaction of that. Which chains and rules there are, and their order, is in
//!    [`nft::table`]; what a rule says, as text and as bytes, in [`nft::stmt`] and [`nft::expr`].
//!    What has to be routed for it is in [`route`].
//! 4. [`kernel`] sends it, by [`netlink`], and looks at what is there: [`nft::view`] reads it.
//!
//! [`daemon`] is `run`: it joins these in one loop, repairs what others destroy (as often as
//! [`backoff`] has it), ends sockets that are [`stale`], and looks for [`containers`]. The other
//! [`commands`] stand beside it, one a file; [`cli`] leads to them. What can be wrong with a host,
//! `check`, `status` and the log say in the same words: [`faults`], [`loops`], [`nft::others`].

#![deny(unsafe_code)]

pub mod apps;
pub mod backoff;
pub mod bpf;
pub mod cgroup;
pub mod cli;
pub mod commands;
pub mod config;
pub mod confine;
pub mod containers;
pub mod daemon;
pub mod error;
pub mod faults;
pub mod host;
pub mod instance;
pub mod json;
pub mod kernel;
pub mod listen;
pub mod log;
pub mod loops;
#[allow(unsafe_code)]
pub mod memory;
pub mod net;
pub mod netlink;
pub mod nft;
pub mod notify;
pub mod options;
pub mod pidfile;
pub mod plan;
pub mod policy;
pub mod route;
pub mod signals;
pub mod small;
pub mod stale;
pub mod strays;
#[allow(unsafe_code)]
pub mod sys;
#[cfg(test)]
pub mod testing;
pub mod tunnels;
