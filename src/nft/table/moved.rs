//! What flows of before are known by from now on, as long as some have not moved to their new marks.

use super::words::*;
use super::Rule;
use crate::config::Config;
use crate::nft::stmt::Stmt;

/// What each hook begins with: a packet that the table of before has marked may meet a later chain of
/// this one. What has no way any more waits until conntrack is told.
pub const MOVED: &str = "moved";

/// Empty where nothing moves.
pub(super) fn moved_rules(config: &Config) -> Vec<Rule> {
    let rules = |(was, now): &(u32, u32)| {
        let (was, is) = (mark(config, *was), mark(config, *now));
        match now {
            0 => vec![vec![Stmt::CtMark(was), Stmt::drop()]],
            _ => vec![
                vec![Stmt::CtMark(was), Stmt::SetCtMark(is)],
                vec![Stmt::PacketMark(was), Stmt::SetPacketMark(is)],
            ],
        }
    };
    config.moving.iter().flat_map(rules).collect()
}

/// What `output` begins with.
pub(super) fn moving_first(config: &Config) -> Option<Rule> {
    (!config.moving.is_empty()).then(|| jump(MOVED))
}
