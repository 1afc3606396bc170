//! `status`: what the kernel holds now, asked of the kernel alone. The configuration only helps to
//! say what a missing ip rule would look like.

use std::fmt::{self, Write};
use std::process::ExitCode;
use std::rc::Rc;

use super::containers::{self, Container};
use crate::cgroup::follow::Cgroups;
use crate::cgroup::mount;
use crate::cgroup::tree;
use crate::config::{Config, Route};
use crate::confine;
use crate::error::Result;
use crate::faults;
use crate::host::Host;
use crate::instance;
use crate::json::Json;
use crate::kernel::{self, Inventory, Kernel};
use crate::listen::{finds, Finds, Origin};
use crate::net::{Family, Mark, L4};
use crate::netlink::fib::{FibAction, IpRule};
use crate::netlink::link::Link;
use crate::netlink::uapi::NFT_TABLE_F_DORMANT;
use crate::nft::lock::Lock;
use crate::nft::marks::Ours;
use crate::nft::table::TABLE;
use crate::nft::view::{Counter, GatewayView, TargetView, View};
use crate::options::Options;
use crate::route::{Entry, Forwarded, Leads, Needs, WayOut};
use crate::small::{SmallMap, SmallSet};

use super::metrics::{Metrics, Sample};
use super::table::{Column, Rows, Style, Value};

/// Of the shape that `--json` prints; documented in cgtproxy(8).
const JSON_VERSION: u64 = 1;

const TARGETS: [Column; 10] = [
    Column::left("TARGET").member("name"),
    Column::json("kind"),
    Column::left("MARK").member("mark"),
    Column::json("mask"),
    Column::left("PORT").member("port"),
    Column::left("LISTENS").member("listens"),
    Column::right("CGROUPS").member("cgroups"),
    Column::right("PACKETS").member("packets"),
    Column::right("BYTES").member("bytes"),
    Column::right("REFUSED").member("refused"),
];
const GATEWAYS: [Column; 4] = [
    Column::left("GATEWAY").member("name"),
    Column::left("TARGET").member("target"),
    Column::right("PACKETS").member("packets"),
    Column::right("BYTES").member("bytes"),
];
const CONTAINERS: [Column; 5] = [
    Column::left("VETH").member("veth"),
    Column::left("TARGET").member("target"),
    Column::json("in_force"),
    Column::left("CONTAINER").member("container"),
    Column::left("CGROUP").member("cgroup"),
];
/// Whether it is there, and the command that makes it.
const ROUTING: [Column; 2] = [Column::left(""), Column::left("")];

pub fn text(options: &Options) -> Result<ExitCode> {
    print(options, |status| status.text(Style::of_stdout()))
}

pub fn json(options: &Options) -> Result<ExitCode> {
    print(options, |status| format!("{}\n", status.json()))
}

/// For Prometheus.
pub fn metrics(options: &Options) -> Result<ExitCode> {
    print(options, Status::metrics)
}

fn print(options: &Options, form: fn(&Status) -> String) -> Result<ExitCode> {
    let (mut kernel, config) = open(options)?;
    let status = Status::take(&mut kernel, &config)?;
    super::print(&form(&status))
}

/// What is needed to look.
pub(super) fn open(options: &Options) -> Result<(Kernel, Config)> {
    confine::require_net_admin("look into the kernel")?;
    // a wrong file is no reason not to look, unless it was named
    let config = match options.load(false) {
        Err(error) if options.config.is_some() => return Err(error),
        loaded => loaded.ok().flatten().unwrap_or_default(),
    };
    Ok((Kernel::open()?, config))
}

/// Everything that is shown.
#[derive(Default)]
pub(super) struct Status {
    /// The pid of a running daemon.
    daemon: Option<i32>,
    /// What has become of a table that no daemon keeps in step.
    unattended: Option<Unattended>,
    /// Why there is nothing to classify.
    rootless: Option<String>,
    pub(super) inventory: Option<Inventory>,
    /// What containers send, by where it comes in.
    containers: Vec<Entrance>,
    /// By name of the tproxy.
    listens: SmallMap<String, Listens>,
    /// By name of the route.
    ways: SmallMap<String, WayState>,
    /// Rules and routes that are there or should be, and whether they are.
    routing: Vec<(Entry, bool)>,
    /// A line for each thing of others that takes what the rules and routes should.
    hindrances: Vec<String>,
    /// A line for each proxy whose own traffic comes back to it.
    loops: Vec<String>,
    /// What else is in force and cannot work, as `check` says it.
    warnings: Vec<String>,
}

/// A way out.
struct WayState {
    /// Of either kind there is one.
    interface: Option<String>,
    table: Option<u32>,
    /// Why IPv4 and IPv6 have no way.
    closed: [Option<&'static str>; 2],
    state: &'static str,
}

impl WayState {
    fn of(way: &WayOut, links: &[Link]) -> WayState {
        let table = match way.leads {
            Leads::Table(table) => Some(table),
            Leads::Interface { .. } => None,
        };
        let closed = Family::BOTH.map(|family| way.closed(family, links));
        let interface = way.interface().map(str::to_string);
        WayState { interface, table, closed, state: way.state(links) }
    }
}

/// A veth that containers' packets come in by.
struct Entrance {
    veth: String,
    /// As the table has it, or should.
    target: String,
    in_force: bool,
    cgroup: Option<tree::Path>,
    bridge: Option<String>,
}

/// What the table has, and what a look finds beside that.
fn entrances(
    config: &Config,
    host: &Host,
    view: &View,
    found: impl IntoIterator<Item = Container>,
) -> Vec<Entrance> {
    let found = found.into_iter().map(|container| (container.index, container));
    let mut found: SmallMap<u32, Container> = found.collect();
    let mut all: Vec<Entrance> = (view.veths.iter())
        .map(|(index, target)| {
            let found = found.remove(index).map(|found| (found.cgroup, found.bridge));
            let (cgroup, bridge) = found.unzip();
            Entrance {
                veth: host.interface_name(*index).unwrap_or_else(|| index.to_string()),
                target: target.clone(),
                in_force: true,
                cgroup,
                bridge: bridge.flatten(),
            }
        })
        .collect();
    all.extend(found.into_values().map(|container| Entrance {
        target: config.target_name(container.target).into(),
        veth: container.veth,
        in_force: false,
        cgroup: Some(container.cgroup),
        bridge: container.bridge,
    }));
    all
}

struct Unattended {
    /// Seconds since the last daemon left; `None` where it was killed.
    left: Option<u64>,
    /// Cgroups that exist now, that the configuration gives a target and the table does not.
    unknown: Option<usize>,
    /// What is new below held ones is dropped.
    holds: bool,
}

impl Unattended {
    fn take(
        kernel: &mut Kernel,
        cgroups: Option<&mut Cgroups>,
        inventory: &Inventory,
    ) -> Result<Unattended> {
        let left = match kernel.lock()? {
            Some(Lock::Left(at)) => Some(instance::since_boot().saturating_sub(at)),
            _ => None,
        };
        let unknown = cgroups.map(|Cgroups { core, .. }| {
            let (config, known) = (core.config().clone(), inventory.outcomes());
            let wanted = core.snapshot().elements.into_iter();
            let wanted = wanted.flat_map(|(outcome, ids)| {
                let of = (config.target_name(outcome.target), outcome.class);
                ids.into_iter().map(move |id| (of, id))
            });
            wanted.filter(|(of, id)| known(*id) != Some(*of)).count()
        });
        Ok(Unattended { left, unknown, holds: inventory.view.unknown.is_some() })
    }
}

impl fmt::Display for Unattended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing new is classified")?;
        if let Some(left) = self.left {
            write!(f, " since the last one left {} ago", span(left))?;
        }
        if let Some(unknown) = self.unknown {
            write!(f, "; cgroups that the table does not know: {unknown}")?;
        }
        match self.holds {
            true => f.write_str("; what is new below held ones has no way out until one runs"),
            false => Ok(()),
        }
    }
}

/// Seconds in the two largest units that count.
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86400, seconds / 3600 % 24),
    }
}

/// What of a tproxy's port is listened on: by protocol, TCP and UDP, and family.
#[derive(Clone, Copy)]
struct Listens([[bool; 2]; 2]);

impl Listens {
    fn of(target: &TargetView, host: &Host) -> Option<Listens> {
        let port = target.port?;
        let takes = |l4| {
            Family::BOTH.map(|family| {
                let address = target.addresses.iter().find(|ip| Family::of(ip) == family).copied();
                let finds = |from| finds(&host.listeners, (l4, family), port, address, from);
                [Origin::Host, Origin::Gateway].map(finds).contains(&Finds::One)
            })
        };
        Some(Listens([L4::Tcp, L4::Udp].map(takes)))
    }

    /// Protocol and family of each, and whether it is there.
    fn each(self) -> impl Iterator<Item = (L4, Family, bool)> {
        let of = |(l4, is): (L4, [bool; 2])| {
            Family::BOTH.into_iter().zip(is).map(move |(family, is)| (l4, family, is))
        };
        [L4::Tcp, L4::Udp].into_iter().zip(self.0).flat_map(of)
    }

    /// `tcp udp`; with the number of a family that is the only one.
    fn value(self) -> Value {
        let word = |name: &str, is: [bool; 2]| match is {
            [true, true] => Some(name.to_string()),
            [true, false] => Some(format!("{name}4")),
            [false, true] => Some(format!("{name}6")),
            [false, false] => None,
        };
        let [tcp, udp] = self.0;
        let members = [
            ("tcp", tcp.contains(&true)),
            ("udp", udp.contains(&true)),
            ("tcp4", tcp[0]),
            ("tcp6", tcp[1]),
            ("udp4", udp[0]),
            ("udp6", udp[1]),
        ];
        let json = Json::Object(members.map(|(name, is)| (name, Json::Bool(is))).into());
        match [word("tcp", tcp), word("udp", udp)] {
            [Some(tcp), Some(udp)] => Value::new(format!("{tcp} {udp}"), json),
            [Some(one), None] | [None, Some(one)] => Value::new(format!("{one} only"), json),
            [None, None] => Value::new("no", json).red(),
        }
    }
}

/// Why a table that is there does nothing: others may flush it, or have one of our name.
fn idle(inventory: &Inventory) -> Option<&'static str> {
    match inventory.flags & NFT_TABLE_F_DORMANT {
        _ if inventory.view.foreign => Some("not of cgtproxy's making"),
        0 if inventory.view.classifies => None,
        0 => Some("without rules"),
        _ => Some("dormant"),
    }
}

impl Status {
    fn take(kernel: &mut Kernel, config: &Config) -> Result<Status> {
        let inventory = kernel.inventory()?;
        let view = inventory.as_ref().map(|inventory| &inventory.view);
        let host = Host::look();
        let targets = view.map_or(&[][..], |view| &view.targets).iter();
        let listens = targets.filter_map(|t| Some((t.name.clone(), Listens::of(t, &host)?)));
        let listens = listens.collect();
        // of a table that is there, or nothing is in vain
        let (mut warnings, mut loops) = (Vec::new(), Vec::new());
        let mut containers = Vec::new();
        let mut cgroups = None;
        if let Some(view) = view {
            let found = faults::of_host(config, &host).into_iter();
            warnings.extend(found.filter_map(|(_, finding)| finding.err()));
            cgroups = Cgroups::look(Rc::new(config.clone())).ok();
            if let Some(Cgroups { core, .. }) = &cgroups {
                warnings.extend(faults::bound(config, &host, core));
                loops = super::loops(config, &host, core, Some(kernel));
            }
            let found = cgroups.iter().flat_map(|cgroups| containers::find(kernel, cgroups));
            containers = entrances(config, &host, view, found);
        }
        let daemon = instance::holder(kernel)?;
        let unattended = match &inventory {
            Some(inventory) if daemon.is_none() => {
                Some(Unattended::take(kernel, cgroups.as_mut(), inventory)?)
            }
            _ => None,
        };
        let (mut routing, mut hindrances) = (Vec::new(), Vec::new());
        let mut ways = SmallMap::default();
        for family in Family::BOTH {
            let have = kernel.routing(family)?;
            let on = family == Family::V4 || kernel::routing::ipv6_is_on();
            let view = view.filter(|_| on);
            let needs = view.map(|view| {
                let mut needs = needs_in_force(config, view, &have);
                needs.links = kernel.links_of(&needs);
                needs
            });
            if let Some(needs) = &needs {
                let seen = kernel.seen(family, &needs.tables())?;
                hindrances.extend(seen.hindrances(needs, family, needs.priority));
                let all = needs.ways.iter();
                ways.extend(all.map(|w| (w.name.to_string(), WayState::of(w, &needs.links))));
            }
            routing.extend(compare(family, needs.as_ref(), have));
        }
        let takes = |view: &View| view.targets.iter().any(|target| target.mark.is_some());
        if let Some(view) = view.filter(|view| !view.entered.is_empty() || takes(view)) {
            let enter = containers.iter().flat_map(|e| [Some(&e.veth), e.bridge.as_ref()]);
            let ours = Ours::of_view(view).entered_by(enter.flatten().cloned());
            hindrances.extend(kernel.others(&ours)?);
        }
        Ok(Status {
            daemon,
            unattended,
            rootless: mount::find(config.cgroup_root.as_deref()).err().map(|e| e.to_string()),
            containers,
            inventory,
            listens,
            ways,
            routing,
            hindrances,
            loops,
            warnings,
        })
    }

    /// What changes from one moment to the next.
    pub(super) fn glance(kernel: &mut Kernel) -> Result<Status> {
        let (daemon, inventory) = (instance::holder(kernel)?, kernel.inventory()?);
        Ok(Status { daemon, inventory, ..Status::default() })
    }

    fn in_force(&self) -> bool {
        self.inventory.as_ref().is_some_and(|inventory| idle(inventory).is_none())
    }

    fn view(&self) -> Option<&View> {
        self.inventory.as_ref().map(|inventory| &inventory.view)
    }

    pub(super) fn targets(&self) -> &[TargetView] {
        self.view().map_or(&[], |view| &view.targets)
    }

    pub(super) fn gateways(&self) -> &[GatewayView] {
        self.view().map_or(&[], |view| &view.gateways)
    }

    /// What `hold` has dropped.
    fn unknown(&self) -> Option<Counter> {
        self.view().and_then(|view| view.unknown)
    }

    /// Repairs of the table and of the routing, then reloads that were taken and refused.
    fn deeds(&self) -> [Option<u64>; 4] {
        let deeds = self.inventory.as_ref().and_then(|inventory| inventory.deeds);
        deeds.map_or([None; 4], |deeds| deeds.map(Some))
    }

    /// Where a target's packets go.
    fn place(&self, target: &TargetView) -> Value {
        let way = self.ways.get(&target.name);
        let table = || way?.table.map(|table| format!("table {table}"));
        match target.interface.clone().or_else(table) {
            Some(text) => Value::new(text, Json::Null),
            None => Value::number(target.port),
        }
    }

    /// Whether anybody takes them there.
    fn state(&self, target: &TargetView) -> Value {
        let way = self.ways.get(&target.name).map(|way| (way, Value::new(way.state, Json::Null)));
        match (self.listens.get(&target.name), way) {
            (Some(listens), _) => listens.value(),
            (None, Some((way, value))) if way.closed.contains(&None) => value,
            (None, Some((_, value))) => value.red(),
            (None, None) => Value::none(),
        }
    }

    pub(super) fn cgroups(&self, target: &str) -> u64 {
        self.inventory.as_ref().map_or(0, |inventory| inventory.of_target(target).count() as u64)
    }

    /// One line on the whole.
    pub(super) fn headline(&self) -> String {
        let table = match self.inventory.as_ref().map(|inventory| (inventory, idle(inventory))) {
            None => format!("table inet {TABLE}: not there, nothing is classified"),
            Some((_, Some(why))) => format!("table inet {TABLE}: {why}, not in force"),
            Some((inventory, None)) => {
                format!("table inet {TABLE}: in force, default {}", inventory.view.default)
            }
        };
        match self.daemon {
            Some(pid) => format!("{table}; cgtproxy runs{}", instance::with_pid(pid)),
            None => format!("{table}; no cgtproxy is running"),
        }
    }

    fn target_table(&self) -> Rows<10> {
        let row = |target: &TargetView| {
            let kind = match &*target.name {
                name @ ("direct" | "drop") => name,
                _ if target.is_route => "route",
                _ => "tproxy",
            };
            [
                Value::text(&target.name),
                Value::text(kind),
                Value::hex(target.mark.map(|mark| mark.value)),
                Value::hex(target.mark.map(|mark| mark.mask)),
                self.place(target),
                self.state(target),
                Value::number(Some(self.cgroups(&target.name))),
                Value::number(target.taken.map(|c| c.packets)),
                Value::bytes(target.taken.map(|c| c.bytes)),
                Value::number(target.refused.map(|c| c.packets)),
            ]
        };
        Rows { columns: &TARGETS, rows: self.targets().iter().map(row).collect() }
    }

    fn gateway_table(&self) -> Rows<4> {
        let row = |gateway: &GatewayView| {
            [
                Value::text(&gateway.name),
                Value::text(&gateway.target),
                Value::number(gateway.taken.map(|c| c.packets)),
                Value::bytes(gateway.taken.map(|c| c.bytes)),
            ]
        };
        Rows { columns: &GATEWAYS, rows: self.gateways().iter().map(row).collect() }
    }

    fn container_table(&self) -> Rows<5> {
        let row = |entrance: &Entrance| {
            let target = Value::text(&entrance.target);
            let path = entrance.cgroup.as_deref();
            let name = path.and_then(containers::name);
            [
                Value::text(&entrance.veth),
                if entrance.in_force { target } else { target.red() },
                Value::new("", Json::Bool(entrance.in_force)),
                Value::maybe(name),
                path.map_or(Value::none(), Value::path),
            ]
        };
        Rows { columns: &CONTAINERS, rows: self.containers.iter().map(row).collect() }
    }

    fn text(&self, style: Style) -> String {
        let mut out = self.headline() + "\n";
        if let Some(unattended) = &self.unattended {
            let _ = writeln!(out, "{unattended}");
        }
        if let Some(why) = &self.rootless {
            let _ = writeln!(out, "nothing is classified: {why}");
        }
        let [table, routing, taken, refused] = self.deeds().map(Option::unwrap_or_default);
        // nothing to look at while all goes well
        if [table, routing, refused] != [0; 3] {
            let repairs = format!("{table} of the table, {routing} of ip rules and routes");
            let _ = writeln!(out, "repairs: {repairs}; reloads: {taken}, refused: {refused}");
        }
        if self.inventory.is_some() {
            out.push('\n');
            self.target_table().print(&mut out, style);
        }
        if let Some(Counter { packets, .. }) = self.unknown() {
            let text = "packets of cgroups that had not been looked at";
            let _ = writeln!(out, "\nheld: {packets} {text}");
        }
        self.gateway_table().print_if_any(&mut out, style);
        self.container_table().print_if_any(&mut out, style);
        let rows = self.routing.iter().map(|(entry, present)| {
            let state = match present {
                true => Value::text("present"),
                false => Value::text("missing").red(),
            };
            [state, Value::text(&entry.command("add"))]
        });
        Rows { columns: &ROUTING, rows: rows.collect() }.print_if_any(&mut out, style);
        let warnings = || self.hindrances.iter().chain(&self.loops).chain(&self.warnings);
        if warnings().next().is_some() {
            out.push('\n');
            warnings().for_each(|line| {
                let _ = writeln!(out, "{line}");
            });
        }
        out
    }

    fn metrics(&self) -> String {
        let mut metrics = Metrics::default();
        let mut one =
            |name: &str, help: &str, is: u64| metrics.family(name, help, [(Vec::new(), is)]);
        let number = |n: usize| n as u64;
        one("cgtproxy_in_force", "Whether the table is in force.", self.in_force().into());
        one("cgtproxy_daemon_up", "Whether a daemon runs.", self.daemon.is_some().into());
        let missing = self.routing.iter().filter(|(_, present)| !present).count();
        one("cgtproxy_routing_missing", "Ip rules and routes that are missing.", number(missing));
        let help = "Rules, routes and chains of others that are in the way.";
        one("cgtproxy_hindrances", help, number(self.hindrances.len()));
        let help = "Proxies whose traffic comes back to them.";
        one("cgtproxy_loops", help, number(self.loops.len()));
        let help = "What else is in force and cannot work.";
        one("cgtproxy_warnings", help, number(self.warnings.len()));
        let [table, routing, taken, refused] = self.deeds();
        let mut deeds = |name: &str, help: &str, label, values: [(&'static str, _); 2]| {
            let sample = |(is, value): (_, Option<u64>)| Some((vec![(label, is)], value?));
            metrics.family(name, help, values.into_iter().filter_map(sample));
        };
        let help = "Repairs of what others destroyed.";
        deeds("cgtproxy_repairs_total", help, "of", [("table", table), ("routing", routing)]);
        let results = [("taken", taken), ("refused", refused)];
        deeds("cgtproxy_reloads_total", "Reloads.", "result", results);
        let mut targets = |name: &str, help: &str, value: &dyn Fn(&TargetView) -> Option<u64>| {
            let sample = |target| -> Option<Sample> {
                let target: &TargetView = target;
                Some((vec![("target", &target.name)], value(target)?))
            };
            metrics.family(name, help, self.targets().iter().filter_map(sample));
        };
        let name = "cgtproxy_target_cgroups";
        let help = "Cgroups that have this target while their parent does not.";
        targets(name, help, &|target| Some(self.cgroups(&target.name)));
        let name = "cgtproxy_target_packets_total";
        let help = "Packets that came to this target and were not left alone.";
        targets(name, help, &|target| target.taken.map(|taken| taken.packets));
        let name = "cgtproxy_target_bytes_total";
        targets(name, "Bytes of these.", &|target| target.taken.map(|taken| taken.bytes));
        let name = "cgtproxy_target_refused_packets_total";
        let help = "Packets that no listener took, or that were about to leave another way.";
        targets(name, help, &|target| target.refused.map(|refused| refused.packets));
        let listens = self.listens.iter().flat_map(|(name, listens)| {
            listens.each().map(|(l4, family, is)| -> Sample {
                let (protocol, family) = (l4.nft(), family.word());
                (vec![("target", name), ("protocol", protocol), ("family", family)], is.into())
            })
        });
        metrics.family("cgtproxy_target_listener_up", "Whether TPROXY finds a listener.", listens);
        let ways = self.ways.iter().flat_map(|(name, way)| {
            Family::BOTH.into_iter().zip(way.closed).map(|(family, closed)| -> Sample {
                (vec![("target", name), ("family", family.word())], closed.is_none().into())
            })
        });
        metrics.family("cgtproxy_target_route_up", "Whether a route leads out.", ways);
        let held = self.unknown().map(|Counter { packets, .. }| (Vec::new(), packets));
        let help = "Packets of cgroups that had not been looked at.";
        metrics.family("cgtproxy_held_packets_total", help, held);
        let mut gateways = |name: &str, help: &str, value: fn(Counter) -> u64| {
            let sample = |gateway| -> Option<Sample> {
                let gateway: &GatewayView = gateway;
                let labels = vec![("gateway", &*gateway.name), ("target", &*gateway.target)];
                Some((labels, value(gateway.taken?)))
            };
            metrics.family(name, help, self.gateways().iter().filter_map(sample));
        };
        let help = "Packets that a gateway section took.";
        gateways("cgtproxy_gateway_packets_total", help, |taken| taken.packets);
        gateways("cgtproxy_gateway_bytes_total", "Bytes of these.", |taken| taken.bytes);
        metrics.into_text()
    }

    fn json(&self) -> Json {
        let ways = self.ways.iter().map(|(name, way)| {
            let [v4, v6] = way.closed.map(|why| Json::text(why.unwrap_or("open")));
            Json::Object(vec![
                ("name", Json::text(name)),
                ("interface", Json::text_or_null(way.interface.as_ref())),
                ("table", Json::or_null(way.table)),
                ("ipv4", v4),
                ("ipv6", v6),
            ])
        });
        let routing = |rules: bool| {
            let wanted = move |entry: &Entry| matches!(entry, Entry::Rule(_)) == rules;
            let entries = self.routing.iter().filter(move |(entry, _)| wanted(entry));
            let json = entries.map(|(entry, present)| {
                Json::Object(vec![
                    ("family", Json::text(entry.family().word())),
                    ("text", Json::text(entry.to_string())),
                    ("present", Json::Bool(*present)),
                ])
            });
            Json::List(json.collect())
        };
        let default = self.view().map(|view| &view.default);
        let unattended = self.unattended.as_ref();
        let [table, routed, taken, refused] = self.deeds().map(Json::or_null);
        Json::Object(vec![
            ("version", Json::Number(JSON_VERSION)),
            ("in_force", Json::Bool(self.in_force())),
            ("daemon", Json::or_null(self.daemon.filter(|pid| *pid != 0).map(|pid| pid as u32))),
            ("left", Json::or_null(unattended.and_then(|u| u.left))),
            ("unknown", Json::or_null(unattended.and_then(|u| u.unknown).map(|n| n as u64))),
            ("rootless", Json::text_or_null(self.rootless.as_ref())),
            ("default", Json::text_or_null(default)),
            ("targets", self.target_table().json()),
            ("ways", Json::List(ways.collect())),
            ("gateways", self.gateway_table().json()),
            ("containers", self.container_table().json()),
            ("repairs", Json::Object(vec![("table", table), ("routing", routed)])),
            ("reloads", Json::Object(vec![("taken", taken), ("refused", refused)])),
            ("held", Json::or_null(self.unknown().map(|unknown| unknown.packets))),
            ("rules", routing(true)),
            ("routes", routing(false)),
            ("hindrances", Json::texts(&self.hindrances)),
            ("loops", Json::texts(&self.loops)),
            ("warnings", Json::texts(&self.warnings)),
        ])
    }
}

fn rules(entries: &SmallSet<Entry>) -> impl Iterator<Item = &IpRule> + Clone {
    entries.iter().filter_map(|entry| match entry {
        Entry::Rule(rule) => Some(rule),
        Entry::Route(_) => None,
    })
}

/// The rules' first priority, by the rules that are there.
fn first_priority(needs: &Needs, have: &SmallSet<Entry>) -> Option<u32> {
    let first = rules(have).min_by_key(|rule| rule.priority)?;
    // where one place has all of them, it is that
    let fits = |first: &u32| {
        let wanted = needs.entries(Family::V4, *first);
        let is =
            |rule: &IpRule| rules(&wanted).any(|w| w.is_like(rule) && w.priority == rule.priority);
        rules(have).all(is)
    };
    Some(first.first_priorities().find(fits).unwrap_or(first.priority))
}

/// The rules and routes of one family: those that are there, and those that the table needs and
/// that are not.
fn compare(family: Family, needs: Option<&Needs>, have: SmallSet<Entry>) -> Vec<(Entry, bool)> {
    let wanted = needs.map_or(SmallSet::default(), |needs| needs.entries(family, needs.priority));
    let there = |entry: &Entry| match entry {
        Entry::Rule(wanted) => rules(&have).any(|rule| {
            // of two with one mark, the table tells which it is
            let same =
                rule.action == wanted.action || rules(&have).all(|r| r.action != wanted.action);
            rule.is_like(wanted) && same
        }),
        Entry::Route(_) => entry.is_among(&have),
    };
    let missing: Vec<Entry> = wanted.into_iter().filter(|entry| !there(entry)).collect();
    let all = have.into_iter().map(|entry| (entry, true));
    let all = all.chain(missing.into_iter().map(|entry| (entry, false)));
    // rules before the routes that they lead to
    let (routes, mut all): (Vec<_>, Vec<_>) =
        all.partition(|(entry, _)| matches!(entry, Entry::Route(_)));
    all.extend(routes);
    all
}

/// What the table in force needs of rules and routes, whatever the configuration says by now (that is
/// `plan::needs`), with the numbers that those have which are there, or else the configuration.
fn needs_in_force<'a>(config: &Config, view: &'a View, have: &SmallSet<Entry>) -> Needs<'a> {
    let tables = |mark: Mark| {
        let mut found: Vec<(u32, u32)> = rules(have)
            .filter(|rule| rule.mark == mark && rule.iif == "lo")
            .filter_map(|rule| match rule.action {
                FibAction::Lookup(table) => Some((rule.priority, table)),
                _ => None,
            })
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, table)| table).collect::<Vec<_>>()
    };
    let (routes, tproxies): (Vec<&TargetView>, Vec<&TargetView>) =
        view.targets.iter().filter(|target| target.mark.is_some()).partition(|t| t.is_route);
    let marks: Vec<Mark> = tproxies.iter().filter_map(|target| target.mark).collect();
    let table = marks.iter().flat_map(|mark| tables(*mark)).min();
    let way = |(index, target): (usize, &&'a TargetView)| {
        let mark = target.mark?;
        let found = tables(mark);
        // those of before are there for a moment, too, while others take their place
        let place = config.routes.iter().position(|route| route.outlet.name == target.name);
        let own = config.table_of(place.unwrap_or(index));
        let own = found.last().copied().filter(|_| !found.contains(&own)).unwrap_or(own);
        let leads = match &target.interface {
            Some(name) => {
                let known = place.map(|place| &config.routes[place]);
                Leads::Interface {
                    name,
                    gateways: known.map_or([None; 2], |route| route.gateways),
                    masqueraded: known.is_none_or(Route::masquerades),
                }
            }
            None => Leads::Table(found.first().copied().unwrap_or(0)),
        };
        Some(WayOut { name: &target.name, mark, forwarded: target.forwarded, table: own, leads })
    };
    let mut needs = Needs {
        priority: config.rule_priority,
        table: table.unwrap_or(config.route_table),
        marks,
        forwarded: Forwarded {
            mark: view.routed.unwrap_or(Mark { value: 0, mask: 0 }),
            // without a mark for it, nothing that is routed goes to a target
            interfaces: (view
                .routed
                .iter()
                .chain(routes.iter().filter_map(|t| t.forwarded.as_ref())))
            .take(1)
            .flat_map(|_| &view.interfaces)
            .collect(),
        },
        ways: routes.iter().enumerate().filter_map(way).collect(),
        links: Vec::new(),
    };
    needs.priority = first_priority(&needs, have).unwrap_or(needs.priority);
    needs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Interface;

    #[test]
    fn a_missing_rule_is_shown_with_the_numbers_of_its_neighbours() {
        let mark = |n: u32| Mark { value: n << 24, mask: 0xff00_0000 };
        let rule = |n, table| {
            Entry::Rule(IpRule {
                family: Family::V4,
                priority: 77,
                iif: "lo".into(),
                mark: mark(n),
                action: FibAction::Lookup(table),
            })
        };
        let target = |n: u32| TargetView {
            name: format!("t{n}"),
            mark: Some(mark(n)),
            forwarded: None,
            is_route: false,
            interface: None,
            port: None,
            addresses: Vec::new(),
            taken: None,
            refused: None,
        };
        let interface = |name: &str, prefix| Interface { name: name.into(), prefix };
        let view = |interfaces: Vec<Interface>| View {
            owners: Vec::new(),
            default_class: 0,
            moving: Vec::new(),
            unjudged: false,
            unknown: None,
            classifies: true,
            foreign: false,
            targets: vec![target(1), target(2)],
            steps: Vec::new(),
            default: "direct".into(),
            gateways: Vec::new(),
            interfaces,
            veths: SmallMap::default(),
            entered: Vec::new(),
            routed: Some(mark(0xff)),
        };
        let config = Config::default();
        let find = |view: &View, have: &[Entry]| {
            let have: SmallSet<Entry> = have.iter().cloned().collect();
            let needs = needs_in_force(&config, view, &have);
            compare(Family::V4, Some(&needs), have)
        };
        let route = Entry::Route(crate::netlink::fib::IpRoute::new(Family::V4, 500));
        let found = find(&view(Vec::new()), &[rule(1, 500)]);
        let both = [(rule(1, 500), true), (rule(2, 500), false)];
        assert_eq!(found[..2], both);
        assert_eq!(found[2..], [(route.clone(), false)]);
        let none = compare(Family::V4, None, SmallSet::default());
        assert_eq!(none, []);
        // those of a gateway, and with the number that the first would have
        let text = |found: Vec<(Entry, bool)>| -> Vec<String> {
            let missing = found.iter().filter(|(_, present)| !present);
            missing.map(|(entry, _)| entry.to_string()).collect()
        };
        let have = [rule(1, 500), rule(2, 500), route];
        let named = find(&view(vec![interface("br-lan", false)]), &have);
        let want = "pref 77 iif br-lan fwmark 0xff000000/0xff000000 lookup 500 protocol 99";
        assert_eq!(text(named), [want]);
        let prefix = view(vec![interface("br-", true)]);
        let wants = [
            "pref 77 iif lo fwmark 0xff000000/0xff000000 goto 79 protocol 99",
            "pref 78 fwmark 0xff000000/0xff000000 lookup 500 protocol 99",
            "pref 79 nop protocol 99",
        ];
        assert_eq!(text(find(&prefix, &have)), wants);
        // one that another has followed, which is to go next
        let way = TargetView { is_route: true, interface: Some("wg0".into()), ..target(1) };
        let (own, former) = (config.table_of(0), config.table_of(1));
        let have = SmallSet::from_iter([rule(1, own), rule(1, former)]);
        let view = View { targets: vec![way], ..view(Vec::new()) };
        assert_eq!(needs_in_force(&config, &view, &have).ways[0].table, own);
        let nop = Entry::Rule(IpRule {
            family: Family::V4,
            priority: 79,
            iif: String::new(),
            mark: Mark { value: 0, mask: 0 },
            action: FibAction::Nop,
        });
        let missing = text(find(&prefix, &[nop]));
        assert_eq!(missing[2..4], [wants[0].replace("500", "300"), wants[1].replace("500", "300")]);
    }
}
