//! What new cgroups send waits here (`hold`) until they have been looked at.

use super::sets::{HELD, KNOWN};
use super::shape::Holding;
use super::spared::{neighbour_discovery, EXEMPT};
use super::words::*;
use super::{Chain, Rule};
use crate::config::Config;
use crate::nft::stmt::Stmt;

/// The chain that asks whether a packet is of a cgroup below a held one, and that has the rest of
/// `output` once more for what is not held. The last one of [`hold_rules`].
pub const HOLD: &str = "hold";

/// Above this level each has a chain of its own that asks for deeper ones, so that a packet pays for
/// the levels of its own cgroup and not for those of others.
const SHALLOW: u8 = 8;

/// How many levels below the deepest one that is known are asked for beneath these. One would do,
/// but for a packet that meets the rules of before a transaction and the sets of after it.
const AHEAD: u8 = 2;

/// The chain that asks whether what is below that level has been looked at.
fn hold_name(level: u8) -> String {
    match level {
        0..SHALLOW => format!("{HOLD}_{level}"),
        _ => format!("{HOLD}_deep"),
    }
}

/// Rules of the chains that hold; none of them where nothing is configured to be held.
pub fn hold_rules(config: &Config, holding: Option<&Holding>) -> Vec<(String, Vec<Rule>)> {
    if config.holds.is_empty() {
        return Vec::new();
    }
    let known = |level| Stmt::Cgroup { level, set: KNOWN.into() };
    let unknown = |level| vec![Stmt::OtherCgroup { level, set: KNOWN.into() }, Stmt::goto(UNKNOWN)];
    let hold = |holding: &Holding| match holding.all {
        true => vec![vec![Stmt::jump(hold_name(0))]],
        false => {
            let held = |level| Stmt::Cgroup { level, set: HELD.into() };
            let levels = holding.roots.iter();
            levels.map(|level| vec![held(*level), Stmt::jump(hold_name(*level))]).collect()
        }
    };
    // Whether one has been looked at is said at its own level, which is the deepest one that it has
    // an ancestor at: below what is not known nothing is. That level is found without look-ups in what
    // is large, and most of all by one that the packet has no cgroup at, which costs half of one.
    let shallow = |level: u8, holding: &Holding| {
        // no held one is below another: this is whether there is any
        let deeper = Stmt::OtherCgroup { level: level + 2, set: HELD.into() };
        let deeper = vec![deeper, Stmt::goto(hold_name(level + 1))];
        let deeper = Some(deeper).filter(|_| level + 2 <= holding.deepest);
        let own = Some(unknown(level + 1)).filter(|_| level < holding.deepest);
        deeper.into_iter().chain(own).collect()
    };
    let deep = |holding: &Holding| {
        let last = holding.last.max(SHALLOW + 1);
        let levels = (SHALLOW + 1..=last.saturating_add(AHEAD).min(holding.deepest)).rev();
        let one = |level| {
            let known = (level <= last).then(|| vec![known(level), Stmt::back()]);
            known.into_iter().chain([unknown(level)])
        };
        levels.flat_map(one).collect()
    };
    let of = |rules: &dyn Fn(&Holding) -> Vec<Rule>| holding.map(rules).unwrap_or_default();
    let levels = (0..SHALLOW).rev();
    let levels = levels.map(|level| (hold_name(level), of(&|holding| shallow(level, holding))));
    let deepest = (hold_name(SHALLOW), of(&deep));
    [deepest].into_iter().chain(levels).chain([(HOLD.to_string(), of(&hold))]).collect()
}

/// The chain that drops what new cgroups send: TCP tries again by itself.
pub const UNKNOWN: &str = "unknown";

/// What is left alone whatever the target goes no wrong way.
pub(super) fn unknown_chain(config: &Config) -> Option<Chain> {
    let mut rules = match hijacks_local(config) {
        // a target may hijack DNS whatever its address
        true => vec![jump(EXEMPT), vec![Stmt::NotDport(53), Stmt::jump("bypass")]],
        false => vec![jump("bypass")],
    };
    // in a network namespace that such a cgroup has made
    rules.push(neighbour_discovery());
    rules.push(vec![Stmt::Counter, Stmt::drop()]);
    chain(UNKNOWN, rules).when(!config.holds.is_empty())
}
