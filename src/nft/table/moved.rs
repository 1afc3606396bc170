//! What flows of before are known by from now on, as long as some have not moved to their new marks.

use super::words::*;
use super::Rule;
use crate::config::Config;
use crate::net::Mark;
use crate::nft::stmt::Stmt;
use crate::small::SmallSet;

/// What each hook begins with: a packet that the table of before has marked may meet a later chain of
/// this one. What has no way any more waits until conntrack is told, and what is unclear until conntrack
/// knows it by nothing: before all else, where another mask knew it by numbers that are a section's in
/// this one.
pub const MOVED: &str = "moved";

/// Empty where nothing moves.
pub(super) fn moved_rules(config: &Config) -> Vec<Rule> {
    let rules = |(was, now): &(u32, Option<u32>)| {
        let was = mark(config, *was);
        let [flow, packet] = match now.map(|now| mark(config, now)) {
            None => [Stmt::drop(), Stmt::drop()],
            Some(is) => [Stmt::SetCtMark(is), Stmt::SetPacketMark(is)],
        };
        [vec![Stmt::CtMark(was), flow], vec![Stmt::PacketMark(was), packet]]
    };
    let unclear =
        |was: &Mark| [Stmt::CtMark(*was), Stmt::PacketMark(*was)].map(|of| vec![of, Stmt::drop()]);
    // what a container sends that is to be dropped bears the whole of it
    let masks: SmallSet<u32> = config.unclear.iter().map(|was| was.mask).collect();
    let masks = masks.into_iter().filter(|mask| *mask != config.mask);
    let entered =
        masks.map(|mask| vec![Stmt::PacketMark(Mark { value: mask, mask }), Stmt::drop()]);
    let unclear = config.unclear.iter().flat_map(unclear).chain(entered);
    unclear.chain(config.moving.iter().flat_map(rules)).collect()
}

/// What `output` begins with.
pub(super) fn moving_first(config: &Config) -> Option<Rule> {
    let none = config.moving.is_empty() && config.unclear.is_empty();
    (!none).then(|| jump(MOVED))
}
