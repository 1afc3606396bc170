//! The configuration: sections and keys to a validated [`Config`], with every error at once.
//! Pure: files, directories and user names come from a [`Source`].

mod automaton;
pub mod file;
pub mod ini;
pub mod lint;
mod model;
pub mod pattern;
mod reader;
mod resolve;
mod suggest;
mod value;

pub use model::*;
pub use pattern::compile;
pub use reader::{load, GATEWAY_KEYS, GLOBAL_KEYS, TPROXY_KEYS};
