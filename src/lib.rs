//! cgtproxy: a per-application transparent proxy manager for Linux. The library exists so that
//! tests and fuzz targets can link the parts; the program is `main.rs`.
//!
//! Data flows one way: config -> policy -> cgroup tree -> plan -> messages -> kernel.

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
pub mod stale;
pub mod strays;
#[allow(unsafe_code)]
pub mod sys;
#[cfg(test)]
pub mod testing;
pub mod tunnels;
