//! The keys of a configuration, a row a key: the sections that have it, its name, what it takes,
//! what holds without it, and what it sets. The parser, its messages and its spelling help follow
//! from the rows, and tests/config.rs holds cgtproxy.conf.5, the defaults of the model and the
//! effect of each key against them. A new key is a row, its field in the model and its meaning.
//! Pure.

use std::fmt;

use super::matches::Match;
use super::model::{Config, Gateway, OnExit, Outlet, Place, Problem, Route, Target, Tproxy};
pub use super::value::Takes;
use super::value::*;
use crate::log::Level;
use crate::net::{Family, Mark, Ranges, KERNEL_TABLES, LAST_PRIORITY};
use crate::small::SmallMap;
use Takes::{Number, Text, Words};
use Unset::{Is, Needs, Nothing};

/// A kind of section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Global,
    Tproxy,
    Route,
    Rules,
    Gateway,
}

impl Kind {
    pub const ALL: [Kind; 5] =
        [Kind::Global, Kind::Tproxy, Kind::Route, Kind::Rules, Kind::Gateway];

    pub fn name(self) -> &'static str {
        ["global", "tproxy", "route", "rules", "gateway"][self as usize]
    }

    /// Whether each section has a name, and its own values.
    pub fn has_names(self) -> bool {
        self.is_target() || self == Kind::Gateway
    }

    /// Whether a section's name is one of a target.
    pub fn is_target(self) -> bool {
        matches!(self, Kind::Tproxy | Kind::Route)
    }

    pub fn keys(self) -> impl Iterator<Item = &'static Key> {
        KEYS.iter().filter(move |key| key.on.contains(&self))
    }
}

/// A row of [`KEYS`].
pub struct Key {
    pub on: Kinds,
    pub name: Str,
    pub repeatable: bool,
    pub takes: Takes,
    pub unset: Unset,
    pub(super) set: Setter,
}

/// What holds where a key is not set.
#[derive(Debug, Clone, Copy)]
pub enum Unset {
    /// As if this had been written.
    Is(&'static str),
    /// Nothing: each section needs it. In the words of a message.
    Needs(&'static str),
    Nothing,
}

/// Writes a value into the section of that kind that was opened last.
type Setter = fn(&mut Draft, &Setting) -> Result<()>;

type Kinds = &'static [Kind];
type Str = &'static str;

const fn one(on: Kinds, name: Str, takes: Takes, unset: Unset, set: Setter) -> Key {
    Key { on, name, repeatable: false, takes, unset, set }
}

/// A key that may be repeated.
const fn any(on: Kinds, name: Str, takes: Takes, unset: Unset, set: Setter) -> Key {
    Key { on, name, repeatable: true, takes, unset, set }
}

const GLOBAL: Kinds = &[Kind::Global];
const TPROXY: Kinds = &[Kind::Tproxy];
/// The sections that are targets.
const OUTLET: Kinds = &[Kind::Tproxy, Kind::Route];
const ROUTE: Kinds = &[Kind::Route];
const GATEWAY: Kinds = &[Kind::Gateway];

const MOST: u32 = u32::MAX;
const BOOLEAN: Takes = Words(&["yes", "no"]);
const TAKE: Takes = Words(&["yes", "no", "drop", "reject"]);
const LEVELS: Takes = Words(&["error", "warning", "notice", "info", "debug"]);
const RANGE: Takes = Text("an address or a CIDR");
const RANGE_OR_PRIVATE: Takes = Text("an address, a CIDR or \"private\"");
const ENDPOINT: Takes = Text("ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT");
const LIST: Takes = Text("a file of addresses and CIDRs");
const PORTS: Takes = Text("ports and ranges of them, like 80 443 8000-8999");
const MARK: Takes = Text("VALUE or VALUE/MASK, 32 bits each");
const INTERFACE: Takes = Text("the name of an interface, up to 15 characters");
const HOP: Takes = Text("the IPv4 or IPv6 address of another host");
const MAC: Takes = Text("six pairs of hexadecimal digits with colons");

/// In the order of the manual.
static KEYS: &[Key] = &[
    one(GLOBAL, "cgroup-root", Text("auto or an absolute path"), Is("auto"), |d, e| {
        put(&mut d.config.cgroup_root, cgroup_root(e))
    }),
    one(GLOBAL, "default", Text("a target"), Is("direct"), later),
    one(GLOBAL, "route-table", Number(1, MOST), Is("300"), |d, e| {
        put(&mut d.config.route_table, table(e, KERNEL_TABLES, "default, main or local"))
    }),
    one(GLOBAL, "rule-priority", Number(1, LAST_PRIORITY), Is("100"), |d, e| {
        put(&mut d.config.rule_priority, number(e))
    }),
    one(GLOBAL, "fwmark-mask", Number(1, MOST), Is("0xff000000"), |d, e| {
        // by one that could not be read no mark is judged
        d.config.mask = 0;
        put(&mut d.config.mask, number(e))
    }),
    any(GLOBAL, "bypass", RANGE_OR_PRIVATE, Nothing, |d, e| {
        add(&mut d.config.bypass, range_or_private(e))
    }),
    any(GLOBAL, "bypass-file", LIST, Nothing, |d, e| {
        add(&mut d.config.bypass, list(e, &mut d.problems))
    }),
    any(GLOBAL, "bypass-mark", MARK, Nothing, |d, e| {
        push(&mut d.bypass_marks, bypass_mark(e).map(|mark| (mark, e.place.clone())))
    }),
    any(GLOBAL, "bypass-dscp", Number(1, 63), Nothing, |d, e| {
        push(&mut d.config.bypass_dscps, number(e).map(|dscp| dscp as u8))
    }),
    any(GLOBAL, "bypass-user", Number(0, MOST - 1), Nothing, |d, e| {
        push(&mut d.config.bypass_users, user(e))
    }),
    one(GLOBAL, "on-exit", Words(&["remove", "keep"]), Is("remove"), |d, e| {
        put(&mut d.config.on_exit, word(e, &[OnExit::Remove, OnExit::Keep]))
    }),
    any(GLOBAL, "include", Text("a file"), Nothing, later),
    one(GLOBAL, "log-level", LEVELS, Is("notice"), |d, e| {
        put(&mut d.config.log_level, word(e, &Level::ALL))
    }),
    one(GLOBAL, "counters", Words(&["target", "cgroup"]), Is("target"), |d, e| {
        put(&mut d.config.counters_per_cgroup, word(e, &[false, true]))
    }),
    any(GLOBAL, "hold", Text("a regex for paths of cgroups"), Nothing, |d, e| {
        d.holds.push((e.value.to_string(), e.place.clone()));
        Ok(())
    }),
    one(GLOBAL, "containers", BOOLEAN, Is("yes"), |d, e| put(&mut d.config.containers, boolean(e))),
    one(TPROXY, "port", Number(1, 65535), Needs("a port"), |d, e| {
        put(&mut d.tproxy().port, number(e).map(|port| port as u16))
    }),
    any(TPROXY, "address", Text("an IPv4 or IPv6 address"), Nothing, |d, e| {
        let address = own_address(e)?;
        once(e, &mut d.tproxy().addresses, Family::of(&address), address)
    }),
    one(ROUTE, "interface", INTERFACE, Nothing, |d, e| put(&mut d.route().interface, way_out(e))),
    any(ROUTE, "gateway", HOP, Nothing, |d, e| {
        let hop = next_hop(e)?;
        once(e, &mut d.route().gateways, Family::of(&hop), hop)
    }),
    one(ROUTE, "table", Number(1, MOST), Nothing, |d, e| {
        put(&mut d.route().table, table(e, 255..=255, "local"))
    }),
    one(ROUTE, "masquerade", BOOLEAN, Nothing, |d, e| {
        put(&mut d.route().masquerade, boolean(e).map(Some))
    }),
    one(OUTLET, "mark", Number(1, MOST), Nothing, |d, e| put(&mut d.outlet().mark, number(e))),
    one(OUTLET, "tcp", TAKE, Is("yes"), |d, e| put(&mut d.outlet().tcp, take(e))),
    one(OUTLET, "udp", TAKE, Is("yes"), |d, e| put(&mut d.outlet().udp, take(e))),
    one(OUTLET, "ipv4", TAKE, Is("yes"), |d, e| put(&mut d.outlet().ipv4, take(e))),
    one(OUTLET, "ipv6", TAKE, Is("yes"), |d, e| put(&mut d.outlet().ipv6, take(e))),
    one(OUTLET, "quic", TAKE, Is("yes"), |d, e| put(&mut d.outlet().quic, take(e))),
    any(OUTLET, "tcp-ports", PORTS, Nothing, |d, e| ports(e, &mut d.outlet().tcp_ports)),
    any(OUTLET, "udp-ports", PORTS, Nothing, |d, e| ports(e, &mut d.outlet().udp_ports)),
    any(OUTLET, "bypass", RANGE_OR_PRIVATE, Nothing, |d, e| {
        add(&mut d.outlet().bypass, range_or_private(e))
    }),
    any(OUTLET, "bypass-file", LIST, Nothing, |d, e| {
        let listed = list(e, &mut d.problems);
        add(&mut d.outlet().bypass, listed)
    }),
    any(OUTLET, "only", RANGE_OR_PRIVATE, Nothing, |d, e| {
        add(d.outlet().only.get_or_insert_default(), range_or_private(e))
    }),
    any(OUTLET, "only-file", LIST, Nothing, |d, e| {
        let listed = list(e, &mut d.problems);
        add(d.outlet().only.get_or_insert_default(), listed)
    }),
    any(OUTLET, "dns-hijack", ENDPOINT, Nothing, |d, e| {
        let to = endpoint(e)?;
        once(e, &mut d.outlet().resolvers, Family::of(&to.ip()), to)
    }),
    one(OUTLET, "dns-hijack-tcp", BOOLEAN, Is("no"), |d, e| {
        put(&mut d.outlet().dns_tcp, boolean(e))
    }),
    one(OUTLET, "dns-hijack-local", BOOLEAN, Is("no"), |d, e| {
        put(&mut d.outlet().dns_local, boolean(e))
    }),
    any(GATEWAY, "interface", INTERFACE, Needs("an interface"), |d, e| {
        let (interface, gateway) = (interface(e)?, d.gateway());
        if gateway.interfaces.contains(&interface) {
            return Err(format!("\"{}\" names \"{}\" twice", e.key, e.value));
        }
        gateway.interfaces.push(interface);
        Ok(())
    }),
    any(GATEWAY, "source", RANGE, Nothing, |d, e| add(&mut d.gateway().sources, range(e, e.value))),
    any(GATEWAY, "source-mac", MAC, Nothing, |d, e| push(&mut d.gateway().macs, parsed(e))),
    one(GATEWAY, "target", Text("a target"), Needs("a target"), later),
];

fn put<T>(slot: &mut T, value: Result<T>) -> Result<()> {
    *slot = value?;
    Ok(())
}

fn add(ranges: &mut Ranges, more: Result<Ranges>) -> Result<()> {
    ranges.extend(more?);
    Ok(())
}

fn push<T>(list: &mut Vec<T>, value: Result<T>) -> Result<()> {
    list.push(value?);
    Ok(())
}

/// What may refer to a later line is resolved at the end, and included files are the reader's.
fn later(_: &mut Draft, _: &Setting) -> Result<()> {
    Ok(())
}

/// A configuration as far as it has been read.
#[derive(Default)]
pub(super) struct Draft {
    pub config: Config,
    /// In file order, behind those that have no names.
    pub sections: Vec<Section>,
    pub bypass_marks: Vec<(Mark, Place)>,
    pub holds: Vec<(String, Place)>,
    /// What is wrong, so far.
    pub problems: Vec<Problem>,
    /// Target, text, meaning and place of each line.
    pub rules: Vec<(String, String, Match, Place)>,
}

/// A section, or all sections of a kind without names.
pub(super) struct Section {
    pub kind: Kind,
    /// Its place among those of its kind.
    pub at: usize,
    pub name: String,
    pub place: Place,
    /// The first value of each key, good or bad, and where it stands.
    pub said: SmallMap<&'static str, (String, Place)>,
}

impl Section {
    /// The target that it is.
    pub fn target(&self) -> Option<Target> {
        match self.kind {
            Kind::Tproxy => Some(Target::Tproxy(self.at as u16)),
            Kind::Route => Some(Target::Route(self.at as u8)),
            Kind::Global | Kind::Rules | Kind::Gateway => None,
        }
    }
}

/// Its header.
impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} {}]", self.kind.name(), self.name)
    }
}

impl Draft {
    pub fn new() -> Draft {
        let mut draft = Draft::default();
        for kind in Kind::ALL.into_iter().filter(|kind| !kind.has_names()) {
            draft.open(kind, "", &Place::default());
        }
        draft
    }

    /// Begins a section. Its values go where the setters of its kind look for them.
    pub fn open(&mut self, kind: Kind, name: &str, place: &Place) {
        let (name, place, config) = (name.to_string(), place.clone(), &mut self.config);
        let outlet = || Outlet { name: name.clone(), ..Outlet::default() };
        let at = match kind {
            Kind::Global | Kind::Rules => 0,
            Kind::Tproxy => {
                config.tproxies.push(Tproxy { outlet: outlet(), ..Tproxy::default() });
                config.tproxies.len() - 1
            }
            Kind::Route => {
                config.routes.push(Route { outlet: outlet(), ..Route::default() });
                config.routes.len() - 1
            }
            Kind::Gateway => {
                let (name, place) = (name.clone(), place.clone());
                config.gateways.push(Gateway { name, place, ..Gateway::default() });
                config.gateways.len() - 1
            }
        };
        self.sections.push(Section { kind, at, name, place, said: SmallMap::default() });
    }

    /// Of the target that was opened last.
    fn outlet(&mut self) -> &mut Outlet {
        match self.sections.last() {
            Some(Section { kind: Kind::Route, .. }) => &mut self.route().outlet,
            _ => &mut self.tproxy().outlet,
        }
    }

    fn route(&mut self) -> &mut Route {
        self.config.routes.last_mut().expect("its keys stand below its header")
    }

    fn tproxy(&mut self) -> &mut Tproxy {
        self.config.tproxies.last_mut().expect("its keys stand below its header")
    }

    fn gateway(&mut self) -> &mut Gateway {
        self.config.gateways.last_mut().expect("its keys stand below its header")
    }
}
