//! `status --watch`: what goes where a second, the busiest first. Counters are those of the table;
//! what comes back, conntrack tells where it counts.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::screen::Screen;
use super::status::{self, Status};
use super::table::{Column, Rows, Style, Value};
use crate::cgroup::follow::Cgroups;
use crate::config::Config;
use crate::error::Result;
use crate::kernel::sockets::conntrack_counts;
use crate::kernel::Kernel;
use crate::nft::view::Counter;
use crate::options::Options;
use crate::small::SmallMap;

/// How many cgroups are shown.
const TOP: usize = 20;
const EVERY: Duration = Duration::from_secs(1);

const TARGETS: [Column; 5] = [
    Column::left("TARGET"),
    Column::right("CGROUPS"),
    Column::right("PACKETS/S"),
    Column::right("BYTES/S"),
    Column::right("BACK/S"),
];
const GATEWAYS: [Column; 4] = [
    Column::left("GATEWAY"),
    Column::left("TARGET"),
    Column::right("PACKETS/S"),
    Column::right("BYTES/S"),
];
const CGROUPS: [Column; 4] = [
    Column::left("CGROUP"),
    Column::left("TARGET"),
    Column::right("PACKETS/S"),
    Column::right("BYTES/S"),
];

/// Prints again every second until the reader goes away or has seen enough.
pub fn watch(options: &Options) -> Result<ExitCode> {
    let (mut kernel, config) = status::open(options)?;
    let config = Rc::new(config);
    let style = Style::of_stdout();
    let mut screen = Screen::open(style)?;
    let mut paths = HashMap::new();
    let mut before: Option<(Instant, Totals)> = None;
    loop {
        let now = Instant::now();
        let status = Status::glance(&mut kernel)?;
        let totals = Totals::of(&status, &mut kernel);
        let rates = before.map(|(then, old)| totals.since(&old, now - then));
        if let Some(rates) = &rates {
            if rates.busiest().iter().any(|(id, ..)| !paths.contains_key(id)) {
                paths = cgroup_paths(&config);
            }
        }
        let mut text = String::new();
        frame(&mut text, &status, rates.as_ref(), &paths, style);
        let shown = screen.show(text)?;
        before = Some((now, totals));
        if !shown || !screen.wait(EVERY.saturating_sub(now.elapsed()))? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// What counts.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Counted {
    Target(String),
    /// By its place among those that are tried.
    Gateway(usize, String),
    /// By id; the target as well. None where the sets have no counters.
    Cgroup(u64, String),
}

/// The counters of one moment, or their growth a second.
#[derive(Default)]
struct Totals {
    counters: HashMap<Counted, Counter>,
    /// Bytes that came back, by flow and target.
    flows: HashMap<(u32, String), u64>,
    /// What came back a second.
    back: SmallMap<String, u64>,
}

impl Totals {
    fn of(status: &Status, kernel: &mut Kernel) -> Totals {
        let mut totals = Totals::default();
        let counts = conntrack_counts();
        for target in status.targets() {
            let name = || target.name.clone();
            let inventory = status.inventory.as_ref();
            let elements =
                inventory.into_iter().flat_map(|inventory| inventory.of_target(&target.name));
            let mut own = None;
            for element in elements {
                if let Some(counter) = element.counter {
                    own = Some(own.unwrap_or_default() + counter);
                    totals.counters.insert(Counted::Cgroup(element.id, name()), counter);
                }
            }
            // what goes direct passes no counter but those of its cgroups
            let counter = target.taken.or(own);
            totals.counters.extend(counter.map(|counter| (Counted::Target(name()), counter)));
            let flows = target.mark.filter(|_| counts).and_then(|mark| kernel.traffic(mark));
            totals.back.extend(flows.iter().map(|_| (name(), 0)));
            let flows = flows.into_iter().flatten();
            totals.flows.extend(flows.map(|flow| ((flow.id, name()), flow.bytes[1])));
        }
        let gateways = status.gateways().iter().enumerate();
        totals.counters.extend(gateways.map(|(at, gateway)| {
            (Counted::Gateway(at, gateway.name.clone()), gateway.taken.unwrap_or_default())
        }));
        totals
    }

    /// The growth a second. A counter that went back (the table was replaced) has grown from zero.
    fn since(&self, old: &Totals, time: Duration) -> Totals {
        let seconds = time.as_secs_f64().max(0.001);
        let a_second = |count: u64| (count as f64 / seconds).round() as u64;
        let rate = |(of, new): (&Counted, &Counter)| {
            let old = old.counters.get(of).copied();
            let old = old.filter(|old| old.packets <= new.packets && old.bytes <= new.bytes);
            let old = old.unwrap_or_default();
            let packets = a_second(new.packets - old.packets);
            (of.clone(), Counter { packets, bytes: a_second(new.bytes - old.bytes) })
        };
        let mut back = self.back.clone();
        for (flow, bytes) in &self.flows {
            let old = old.flows.get(flow).filter(|old| *old <= bytes);
            *back.or_default(flow.1.clone()) += bytes - old.unwrap_or(&0);
        }
        back.values_mut().for_each(|bytes| *bytes = a_second(*bytes));
        Totals { counters: self.counters.iter().map(rate).collect(), flows: HashMap::new(), back }
    }

    /// The cgroups with most bytes, without those that have no packets: id, target and counter.
    fn busiest(&self) -> Vec<(u64, &str, Counter)> {
        let mut all: Vec<_> = (self.counters.iter())
            .filter(|(_, counter)| counter.packets > 0)
            .filter_map(|(of, counter)| match of {
                Counted::Cgroup(id, target) => Some((*id, &**target, *counter)),
                _ => None,
            })
            .collect();
        all.sort_unstable_by_key(|(id, _, c)| (Reverse((c.bytes, c.packets)), *id));
        all.truncate(TOP);
        all
    }
}

/// One picture.
fn frame(
    out: &mut String,
    status: &Status,
    rates: Option<&Totals>,
    paths: &HashMap<u64, Vec<u8>>,
    style: Style,
) {
    let _ = writeln!(out, "{}", status.headline());
    if status.inventory.is_none() {
        return;
    }
    let packets = |rate: Option<Counter>| Value::number(rate.map(|rate| rate.packets));
    let bytes = |rate: Option<Counter>| Value::bytes(rate.map(|rate| rate.bytes));
    let rate = |of: Counted| rates.and_then(|rates| rates.counters.get(&of)).copied();
    // those with no rate keep their order
    let busy = |rate: Option<Counter>, back: u64| {
        Reverse(rate.map_or(0, |rate| rate.bytes.saturating_add(back)))
    };
    let targets = status.targets().iter().map(|target| {
        let rate = rate(Counted::Target(target.name.clone()));
        let back = rates.and_then(|rates| rates.back.get(&target.name)).copied();
        let row = [
            Value::text(&target.name),
            Value::number(Some(status.cgroups(&target.name))),
            packets(rate),
            bytes(rate),
            Value::bytes(back),
        ];
        (busy(rate, back.unwrap_or(0)), row)
    });
    out.push('\n');
    Rows { columns: &TARGETS, rows: busiest_first(targets) }.print(out, style);
    let gateways = status.gateways().iter().enumerate().map(|(at, gateway)| {
        let rate = rate(Counted::Gateway(at, gateway.name.clone()));
        let [name, target] = [&gateway.name, &gateway.target].map(|name| Value::text(name));
        (busy(rate, 0), [name, target, packets(rate), bytes(rate)])
    });
    Rows { columns: &GATEWAYS, rows: busiest_first(gateways) }.print_if_any(out, style);
    out.push('\n');
    let elements =
        status.inventory.iter().flat_map(|inventory| inventory.cgroups.values().flatten());
    let mut elements = elements.peekable();
    if elements.peek().is_some() && elements.all(|element| element.counter.is_none()) {
        let _ = writeln!(out, "for each cgroup: set counters = cgroup in [global]");
        return;
    }
    let busiest = rates.map(Totals::busiest).unwrap_or_default();
    let rows = busiest.into_iter().map(|(id, target, rate)| {
        let path = match paths.get(&id) {
            Some(path) => Value::path(path),
            None => Value::text(&format!("cgroup id {id}")),
        };
        [path, Value::text(target), packets(Some(rate)), bytes(Some(rate))]
    });
    Rows { columns: &CGROUPS, rows: rows.collect() }.print(out, style);
}

fn busiest_first<K: Ord, R>(rows: impl Iterator<Item = (K, R)>) -> Vec<R> {
    let mut rows: Vec<(K, R)> = rows.collect();
    rows.sort_by(|(a, _), (b, _)| a.cmp(b));
    rows.into_iter().map(|(_, row)| row).collect()
}

/// The path of each cgroup by its id; empty where they cannot be found.
fn cgroup_paths(config: &Rc<Config>) -> HashMap<u64, Vec<u8>> {
    let Ok(Cgroups { core, .. }) = Cgroups::look(config.clone()) else {
        return HashMap::new();
    };
    let all = core.tree().iter();
    all.map(|(path, node)| (node.id, path.to_vec())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_survive_a_replaced_table() {
        let counter = |packets, bytes| Counter { packets, bytes };
        let [target, gateway, cgroup] = [
            Counted::Target("a".into()),
            Counted::Gateway(0, "lan".into()),
            Counted::Cgroup(7, "a".into()),
        ];
        let all = [&target, &gateway, &cgroup];
        let totals = |packets, bytes| Totals {
            counters: all.map(|of| (of.clone(), counter(packets, bytes))).into(),
            flows: [((1, "a".to_string()), bytes), ((2, "a".to_string()), bytes)].into(),
            back: [("a".to_string(), 0)].into_iter().collect(),
        };
        let rates = totals(30, 3000).since(&totals(10, 1000), Duration::from_secs(2));
        for of in all {
            assert_eq!(rates.counters[of], counter(10, 1000));
        }
        assert_eq!(rates.busiest(), [(7, "a", counter(10, 1000))]);
        assert_eq!(*rates.back.get("a").unwrap(), 2000);
        let rates = totals(4, 400).since(&totals(10, 1000), Duration::from_secs(2));
        assert_eq!(rates.counters[&target], counter(2, 200));
        // flows that are new, or whose number is
        assert_eq!(*rates.back.get("a").unwrap(), 400);
        let rates = totals(4, 400).since(&Totals::default(), Duration::from_secs(1));
        assert_eq!(*rates.back.get("a").unwrap(), 800);
    }
}
