//! The sets: their names, and the addresses that they hold.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::shape::{Stage, DEPTHS};
use super::{Content, Set};
use crate::config::{Config, Outcome, Outlet};
use crate::net::{Family, Range, Ranges, L4};

/// All sets of a configuration; those that are there ahead of the others come first.
pub(super) fn all_sets(config: &Config) -> Vec<Set> {
    let set = |name, content| Set { name, content };
    let counted = || Content::Cgroups { counters: config.counters_per_cgroup };
    let mut sets = Vec::new();
    if config.bypass.has(Family::V4) {
        sets.push(set("bypass4".into(), Content::V4(bypass4(config))));
    }
    if config.bypass.has(Family::V6) {
        sets.push(set("bypass6".into(), Content::V6(bypass6(config))));
    }
    sets.extend(config.gateways.iter().flat_map(|g| range_sets(SOURCE, &g.name, &g.sources)));
    sets.extend(config.outlets().flat_map(destination_sets));
    sets.extend(config.outcomes().map(|of| set(set_name(config, of), counted())));
    sets.extend(config.outcomes().map(|of| set(dying_name(config, of), Content::Hashes)));
    sets.extend((0..DEPTHS.len()).flat_map(|stage| {
        let [ids, hashes] = gate_names(stage);
        [plain_set(ids), set(hashes.into(), Content::Hashes)]
    }));
    sets.extend(hold_sets(config));
    sets
}

/// The name of the set that holds the cgroups of an outcome.
pub fn set_name(config: &Config, outcome: Outcome) -> String {
    named("cg", config, outcome)
}

/// The names of the sets that hold the gates of a stage, by their ids and by their hashes: of each of
/// [`DEPTHS`].
pub fn gate_names(stage: Stage) -> [&'static str; 2] {
    const NAMES: [[&str; 2]; DEPTHS.len()] = [
        ["gate_1", "gone_1"],
        ["gate_2", "gone_2"],
        ["gate_4", "gone_4"],
        ["gate_8", "gone_8"],
        ["gate_16", "gone_16"],
    ];
    NAMES[stage]
}

/// The set of the cgroups below which nothing leaves before it has been looked at.
pub const HELD: &str = "held";

/// The set of these and of those below them that have been looked at.
pub const KNOWN: &str = "known";

/// The name of the set that holds cgroups by their hashes: removed ones, and those whose path nft
/// cannot print.
pub fn dying_name(config: &Config, outcome: Outcome) -> String {
    named("dying", config, outcome)
}

pub(super) fn named(kind: &str, config: &Config, outcome: Outcome) -> String {
    class_name(kind, config.target_name(outcome.target), outcome.class)
}

/// `KIND_TARGET`, and `KIND1_TARGET` and so on behind lines for owners.
pub fn class_name(kind: &str, target: &str, class: u16) -> String {
    match class {
        0 => [kind, "_", target].concat(),
        class => format!("{kind}{class}_{target}"),
    }
}

/// The sets that the chains of `hold` look into; none where nothing is configured to be held.
pub fn hold_sets(config: &Config) -> Vec<Set> {
    let names = [HELD, KNOWN].iter().filter(|_| !config.holds.is_empty());
    names.map(|name| plain_set(name)).collect()
}

fn plain_set(name: &str) -> Set {
    Set { name: name.into(), content: Content::Cgroups { counters: false } }
}

/// The sets of some addresses, by family.
pub(super) fn range_sets(kind: &str, name: &str, ranges: &Ranges) -> Vec<Set> {
    let set = |family, content| Set { name: range_name(kind, family, name), content };
    let v4 = ranges.has(Family::V4).then(|| set(Family::V4, Content::V4(ranges.v4.clone())));
    let v6 = ranges.has(Family::V6).then(|| set(Family::V6, Content::V6(ranges.v6.clone())));
    v4.into_iter().chain(v6).collect()
}

/// `KIND4_NAME` and `KIND6_NAME`, of a target's or a gateway section's name.
pub(super) fn range_name(kind: &str, family: Family, name: &str) -> String {
    format!("{kind}{}_{name}", ["4", "6"][family as usize])
}

/// The sets of the destinations, and of the ports, that decide for a target.
pub(super) fn destination_sets(outlet: &Outlet) -> Vec<Set> {
    let only = outlet.only.iter().flat_map(|only| range_sets(ONLY, &outlet.name, only));
    let ports = [L4::Tcp, L4::Udp].map(|l4| (ports_name(l4, outlet), outlet.protocol(l4).1));
    let ports = ports.into_iter().filter(|(_, ports)| has_ranges(ports));
    let ports = ports.map(|(name, ports)| Set { name, content: Content::Ports(ports.to_vec()) });
    let bypass = range_sets(BYPASS, &outlet.name, &outlet.bypass);
    bypass.into_iter().chain(only).chain(ports).collect()
}

/// Whether one of them is more than a port.
pub(super) fn has_ranges(ports: &[Range<u16>]) -> bool {
    ports.iter().any(|range| range.first != range.last)
}

/// The name of the set of the ports that a target takes, where some are ranges.
pub(super) fn ports_name(l4: L4, outlet: &Outlet) -> String {
    format!("{}_{}", l4.nft(), outlet.name)
}

pub(super) const BYPASS: &str = "bypass";
pub(super) const ONLY: &str = "only";
/// What a gateway section takes by where it comes from.
pub(super) const SOURCE: &str = "gw";

/// Link-local and multicast. The broadcast address of all networks is known to the kernel as such.
pub(super) const ALWAYS4: [(Ipv4Addr, u32); 2] =
    [(Ipv4Addr::new(224, 0, 0, 0), 4), (Ipv4Addr::new(169, 254, 0, 0), 16)];
pub(super) const ALWAYS6: [(Ipv6Addr, u32); 2] = [
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
];

/// These, broadcast, and what the configuration adds; sorted and apart.
pub fn bypass4(config: &Config) -> Vec<Range<Ipv4Addr>> {
    let always = ALWAYS4.into_iter().chain([(Ipv4Addr::BROADCAST, 32)]);
    let always = always.map(|(ip, length)| Range::prefix(ip, length));
    Range::merge(always.chain(config.bypass.v4.iter().copied()).collect())
}

pub fn bypass6(config: &Config) -> Vec<Range<Ipv6Addr>> {
    let always = ALWAYS6.into_iter().map(|(ip, length)| Range::prefix(ip, length));
    Range::merge(always.chain(config.bypass.v6.iter().copied()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_named_by_their_depths() {
        for (stage, depth) in DEPTHS.iter().enumerate() {
            assert_eq!(gate_names(stage), [format!("gate_{depth}"), format!("gone_{depth}")]);
        }
    }
}
