//! Everything that the kernel should hold, from a configuration and the cgroups there are. Pure.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::ffi::OsStrExt;

use crate::cgroup::core::{Core, Delta, Snapshot};
use crate::cgroup::gates::{Gate, KnownBy};
use crate::cgroup::holds::HoldElement;
use crate::cgroup::mount::Root;
use crate::cgroup::tree::Hold;
use crate::config::{Config, Outcome, Route};
use crate::net::{Address, Family, Mark, Range};
use crate::netlink::link::Link;
use crate::netlink::msg::Batch;
use crate::nft::expr::Verdict;
use crate::nft::message::{Contents, Transaction, Veth};
use crate::nft::stmt::Stmt;
use crate::nft::table::{
    again_chain, by_entrances, classifying, dying_name, gate_names, hold_rules, hold_sets,
    set_name, veth_rule, ways, Content, Deeds, Devices, Entrances, Rule, Shape, Table, DEEDS,
    DEPTHS, HELD, HOLD, KNOWN, TABLE, UNJUDGED,
};
use crate::route::{Entry, Forwarded, Leads, Needs, WayOut};
use crate::small::SmallSet;

/// What the ip rules and routes have to bring about.
pub fn needs(config: &Config) -> Needs<'_> {
    let mark = |value| Mark { value, mask: config.mask };
    Needs {
        priority: config.rule_priority,
        table: config.route_table,
        marks: config.tproxies.iter().map(|t| mark(t.outlet.mark)).collect(),
        ways: config
            .routes
            .iter()
            .enumerate()
            .map(|(index, route)| way(config, index, route))
            .collect(),
        links: Vec::new(),
        forwarded: Forwarded {
            mark: mark(config.gateway_mark()),
            interfaces: config.gateway_interfaces(),
        },
    }
}

fn way<'a>(config: &Config, index: usize, route: &'a Route) -> WayOut<'a> {
    let mark = |value| Mark { value, mask: config.mask };
    WayOut {
        name: &route.outlet.name,
        mark: mark(route.outlet.mark),
        forwarded: config.forwards().then(|| mark(route.forward_mark)),
        table: config.table_of(index),
        leads: match route.table {
            0 => Leads::Interface {
                name: &route.interface,
                gateways: route.gateways,
                masqueraded: route.masquerades(),
            },
            table => Leads::Table(table),
        },
    }
}

/// The ip rules and routes, where no rule of others stands before ours and every interface is there.
pub fn routing(config: &Config) -> SmallSet<Entry> {
    let mut needs = needs(config);
    let link = |(index, way): (usize, &WayOut)| {
        let (index, name) = (index as u32 + 2, way.interface()?.to_string());
        let addresses = vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        Some(Link { index, name, running: true, addresses, ..Link::default() })
    };
    needs.links = needs.ways.iter().enumerate().filter_map(link).collect();
    let of = |family| needs.entries(family, needs.priority);
    Family::BOTH.into_iter().flat_map(of).collect()
}

/// The table and all that its sets hold, and the chains of veths. `again`: whether bridged packets pass
/// the IP hooks too.
pub fn contents(
    config: &Config,
    snapshot: Snapshot,
    entrances: &Entrances,
    devices: &Devices,
    deeds: Deeds,
    again: bool,
) -> Contents {
    let Snapshot { elements, dying, gates, held, shape } = snapshot;
    let cgroups = elements.into_iter().map(|(outcome, ids)| (set_name(config, outcome), ids));
    let dying = dying.into_iter().map(|(outcome, hashes)| (dying_name(config, outcome), hashes));
    let gates = || gate_sets(&gates);
    let by_id = gates().map(|([set, _], all)| (set.to_string(), gate_ids(all).collect()));
    let by_hash = gates().map(|([_, set], all)| (set.to_string(), gate_hashes(all).collect()));
    let held = [HELD, KNOWN].map(|set| (set.to_string(), held_ids(&held, set).collect()));
    Contents {
        table: table(config, &shape, again),
        cgroups: cgroups.chain(by_id).chain(held).collect(),
        dying: dying.chain(by_hash).collect(),
        veths: entrances.veths.keys().filter_map(|index| veth(config, entrances, *index)).collect(),
        chains: [by_entrances(config, entrances), ways(config, devices)].concat(),
        deeds,
    }
}

/// One transaction that has the table tell how often the daemon has done what.
pub fn count(deeds: &Deeds, batch: Batch) -> Transaction {
    let mut transaction = Transaction::new(batch);
    // all of them, so that a listing has them in the order of before
    DEEDS.iter().zip(deeds).for_each(|(name, count)| transaction.replace_counter(name, *count));
    transaction
}

/// One transaction that has the table tell that all sockets have been judged by it.
pub fn judged(batch: Batch) -> Transaction {
    let mut transaction = Transaction::new(batch);
    transaction.delete_chain(UNJUDGED);
    transaction
}

/// The chain of a veth; `None` where it has none.
fn veth(config: &Config, entrances: &Entrances, index: u32) -> Option<Veth> {
    let (name, target) = entrances.veths.get(&index)?;
    Some(Veth { index, name: name.clone(), rule: veth_rule(config, *target)? })
}

/// One transaction that makes of one state of the veths' chains another.
pub fn enter(config: &Config, before: &Entrances, after: &Entrances, batch: Batch) -> Transaction {
    let mut transaction = Transaction::new(batch);
    let all: SmallSet<u32> = before.veths.keys().chain(after.veths.keys()).copied().collect();
    for index in all {
        let (old, new) = (veth(config, before, index), veth(config, after, index));
        if old == new {
            continue;
        }
        if old.is_some() {
            transaction.delete_veth(index);
        }
        new.iter().for_each(|veth| transaction.add_veth(veth));
    }
    let [old, new] = [before, after].map(|entrances| by_entrances(config, entrances));
    let changed = new.iter().zip(&old).filter(|(new, old)| new != old);
    changed.for_each(|((name, rules), _)| transaction.replace_rules(name, rules));
    transaction
}

/// One transaction that gives what has passed a bridge its socket again, ahead of what would take it
/// out; `None` where none needs one.
pub fn again(config: &Config, batch: Batch) -> Option<Transaction> {
    let mut transaction = Transaction::new(batch);
    again_chain(config).map(|chain| {
        transaction.hook_anew(&chain);
        transaction
    })
}

/// One transaction that has routes leave by the interfaces that tables of others lead to by now;
/// `None` where nothing has changed.
pub fn follow(
    config: &Config,
    before: &Devices,
    after: &Devices,
    batch: Batch,
) -> Option<Transaction> {
    let (old, new) = (ways(config, before), ways(config, after));
    let changed: Vec<_> = new.iter().zip(&old).filter(|(new, old)| new != old).collect();
    let mut transaction = Transaction::new(batch);
    for ((chain, rules), _) in &changed {
        transaction.replace_rules(chain, rules);
    }
    (!changed.is_empty()).then_some(transaction)
}

/// Gates by stage, each with the names of its sets.
fn gate_sets(gates: &[Gate]) -> impl Iterator<Item = ([&'static str; 2], &[Gate])> {
    gates.chunk_by(|a, b| a.stage == b.stage).map(|same| (gate_names(same[0].stage), same))
}

/// What one of these sets is to hold.
fn gate_ids(gates: &[Gate]) -> impl Iterator<Item = u64> + '_ {
    gates.iter().filter_map(|gate| match gate.by {
        KnownBy::Id(id) => Some(id),
        KnownBy::Hash(_) => None,
    })
}

/// And the other one.
fn gate_hashes(gates: &[Gate]) -> impl Iterator<Item = u32> + '_ {
    gates.iter().filter_map(|gate| match gate.by {
        KnownBy::Id(_) => None,
        KnownBy::Hash(hash) => Some(hash),
    })
}

/// What the set of what is held, or that of what is known, is to hold.
fn held_ids<'a>(held: &'a [HoldElement], set: &'a str) -> impl Iterator<Item = u64> + 'a {
    held.iter().filter_map(move |element| match *element {
        HoldElement::Root(id) => (set == HELD).then_some(id),
        HoldElement::Known(id) => (set == KNOWN).then_some(id),
    })
}

/// One transaction that holds a difference.
pub fn change(config: &Config, delta: &Delta, batch: Batch) -> Transaction {
    let mut transaction = Transaction::new(batch);
    for same in delta.cgroups.delete.chunk_by(|a, b| a.0 == b.0) {
        transaction.delete_cgroups(&set_name(config, same[0].0), same.iter().map(|(_, id)| *id));
    }
    for same in delta.cgroups.add.chunk_by(|a, b| a.0 == b.0) {
        transaction.add_cgroups(&set_name(config, same[0].0), same.iter().map(|(_, id)| *id));
    }
    for same in delta.dying.delete.chunk_by(|a, b| a.0 == b.0) {
        let hashes = same.iter().map(|(_, hash)| *hash);
        transaction.delete_hashes(&dying_name(config, same[0].0), hashes);
    }
    for same in delta.dying.add.chunk_by(|a, b| a.0 == b.0) {
        transaction.add_hashes(&dying_name(config, same[0].0), same.iter().map(|(_, hash)| *hash));
    }
    for ([ids, hashes], same) in gate_sets(&delta.gates.delete) {
        transaction.delete_cgroups(ids, gate_ids(same));
        transaction.delete_hashes(hashes, gate_hashes(same));
    }
    for ([ids, hashes], same) in gate_sets(&delta.gates.add) {
        transaction.add_cgroups(ids, gate_ids(same));
        transaction.add_hashes(hashes, gate_hashes(same));
    }
    for set in [HELD, KNOWN].iter().filter(|_| !delta.held.delete.is_empty()) {
        transaction.delete_cgroups(set, held_ids(&delta.held.delete, set));
    }
    // A packet takes the rules of the chain that it is in as they are when it comes, and looks into sets
    // as they are by then. It must not find a cgroup that has been looked at in those of before, which
    // may not know where that is to go: so they have sets of their own, which stay what they were. So
    // has the packet chains: in one that stays it meets, as soon as there has been another transaction
    // (of anybody's), rules that are younger than those that led it there (seen on Linux 6.18.44).
    let mut old = match &delta.shape {
        Some(shapes) => classifying(config, &shapes[0]),
        None => Vec::new(),
    };
    if delta.all_held.is_some() {
        let chains = Vec::from_iter(hold_rules(config, None).into_iter().map(|(chain, _)| chain));
        old.retain(|(name, _)| !chains.contains(name));
        // those that go to others first
        for chain in chains.iter().rev() {
            match chain == HOLD {
                true => transaction.replace_rules(chain, &[]),
                false => transaction.delete_chain(chain),
            }
        }
        chains.iter().filter(|chain| *chain != HOLD).for_each(|own| transaction.plain_chain(own));
        for set in hold_sets(config) {
            transaction.delete_set(&set.name);
            transaction.set(&set);
        }
    }
    let held = delta.all_held.as_ref().unwrap_or(&delta.held.add);
    for set in [HELD, KNOWN].iter().filter(|_| !held.is_empty()) {
        transaction.add_cgroups(set, held_ids(held, set));
    }
    if let Some(shapes) = &delta.shape {
        for (chain, rules) in classifying(config, &shapes[1]) {
            match old.iter().find(|(name, _)| *name == chain) {
                Some((_, same)) if *same == rules => {}
                Some((_, old)) => match ahead(old, &rules) {
                    Some(more) => more.for_each(|rule| transaction.rule_ahead(&chain, rule)),
                    None => transaction.replace_rules(&chain, &rules),
                },
                None => rules.iter().for_each(|rule| transaction.rule(&chain, rule)),
            }
        }
    }
    transaction
}

/// The rules that make of one state of a chain another when they are put before those that it has, one
/// after the other; `None` where that is not the way. The first cgroup of a pair waits for each rule that
/// is made. In which order those of a level stand decides nothing.
pub fn ahead<'a>(old: &'a [Rule], new: &'a [Rule]) -> Option<impl Iterator<Item = &'a Rule>> {
    // what comes back, from what is held and from gates, has its place
    let level = |rule: &Rule| match &rule[..] {
        [Stmt::Cgroup { level, .. } | Stmt::CgroupHash { level, .. }, Stmt::Verdict(Verdict::Goto(_))] => {
            Some(*level)
        }
        _ => None,
    };
    let is_new = |rule: &&Rule| !old.contains(rule);
    let last = new.iter().rposition(|rule| is_new(&rule))?;
    let count = new.iter().filter(is_new).count();
    let deepest = level(&new[0]);
    let of_level = new[..=last].iter().all(|rule| level(rule) == deepest);
    let fits = deepest.is_some() && of_level && old.len() + count == new.len();
    fits.then(|| new.iter().rev().filter(move |rule| !old.contains(rule)))
}

fn table(config: &Config, shape: &Shape, again: bool) -> Table {
    let mut table = Table::new(config);
    table.chains.extend(again_chain(config).filter(|_| again));
    for (name, rules) in classifying(config, shape) {
        if let Some(chain) = table.chains.iter_mut().find(|chain| chain.name == name) {
            chain.rules = rules;
        }
    }
    table
}

/// The whole plan as a script for `nft -f`, with the routing as comments.
pub fn script(core: &mut Core, root: &Root, devices: &Devices, again: bool) -> String {
    let config = core.config().clone();
    // as `run` does
    core.keep_dying([]);
    let snapshot = core.snapshot();
    let mut table = table(&config, &snapshot.shape, again);
    let mut learned = ways(&config, devices);
    for chain in &mut table.chains {
        if let Some((_, rules)) = learned.iter_mut().find(|(name, _)| *name == chain.name) {
            chain.rules = std::mem::take(rules);
        }
    }
    // nft finds a cgroup by its path from /sys/fs/cgroup
    let mount = root.dir.strip_prefix(&root.mount).unwrap_or(std::path::Path::new(""));
    let mut out = String::new();
    let text = &mut out;
    let result = (|| {
        writeln!(text, "#!/usr/sbin/nft -f")?;
        writeln!(text, "# cgroup root {} at level {}", root.dir.display(), root.level)?;
        for entry in routing(&config) {
            writeln!(text, "# {}", entry.command("add"))?;
        }
        writeln!(text, "table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{")?;
        for name in DEEDS {
            writeln!(text, "  counter {name} {{\n  }}")?;
        }
        for set in &table.sets {
            writeln!(text, "  set {} {{", set.name)?;
            let (kind, elements) = match &set.content {
                Content::V4(ranges) => intervals("ipv4_addr", ranges),
                Content::V6(ranges) => intervals("ipv6_addr", ranges),
                Content::Ports(ranges) => intervals("inet_service", ranges),
                Content::Hashes => {
                    let of = |outcome: &Outcome| dying_name(&config, *outcome) == set.name;
                    let found = snapshot.dying.iter().filter(|(outcome, _)| of(outcome));
                    let hashes = found.flat_map(|(_, hashes)| hashes);
                    let gates =
                        gate_sets(&snapshot.gates).filter(|([_, gone], _)| *gone == set.name);
                    let gone = gates.flat_map(|(_, gates)| gate_hashes(gates));
                    let hashes = hashes.copied().chain(gone).map(|hash| hash.to_string());
                    ("typeof numgen inc mod 2".into(), hashes.collect())
                }
                Content::Cgroups { counters } => {
                    let counter = if *counters { "\n    counter" } else { "" };
                    let elements = cgroups(core, &config, &set.name, mount, text)?;
                    (format!("type cgroupsv2{counter}"), elements)
                }
            };
            writeln!(text, "    {kind}")?;
            if !elements.is_empty() {
                writeln!(text, "    elements = {{\n      {}\n    }}", elements.join(",\n      "))?;
            }
            writeln!(text, "  }}")?;
        }
        for chain in &table.chains {
            write!(text, "{chain}")?;
        }
        writeln!(text, "}}")
    })();
    result.map(|()| out).unwrap_or_default()
}

/// What nft says of a set of ranges, and its elements.
fn intervals<A: Address>(of: &str, ranges: &[Range<A>]) -> (String, Vec<String>) {
    (format!("type {of}\n    flags interval"), ranges.iter().map(Range::to_string).collect())
}

/// The elements of one cgroup set as nft writes them. A name that is not fit to print (not UTF-8, or
/// with control characters) becomes a comment.
fn cgroups(
    core: &Core,
    config: &Config,
    set: &str,
    mount: &std::path::Path,
    text: &mut String,
) -> Result<Vec<String>, std::fmt::Error> {
    let mut elements = Vec::new();
    let own = core.elements().filter(|(_, outcome, _)| set_name(config, *outcome) == set);
    let own = own.map(|(path, ..)| &path[..]);
    let stage = (0..DEPTHS.len()).find(|stage| gate_names(*stage)[0] == set);
    let gates = stage.into_iter().flat_map(|stage| core.gates(stage));
    let held = core.held().filter(|(_, hold)| match *hold {
        Hold::Root => set == HELD || set == KNOWN,
        _ => set == KNOWN,
    });
    for path in own.chain(gates).chain(held.map(|(path, _)| &path[..])) {
        let full = [mount.as_os_str().as_bytes(), path].concat();
        let full = full.strip_prefix(b"/").unwrap_or(&full);
        match std::str::from_utf8(full) {
            Ok(name) if !name.contains(char::is_control) => elements.push(format!("\"{name}\"")),
            _ => writeln!(text, "    # not fit to print: {}", full.escape_ascii())?,
        }
    }
    elements.sort_unstable();
    Ok(elements)
}
