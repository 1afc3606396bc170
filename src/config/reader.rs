//! Files to sections and entries, and entries to what they set, with every error at once. Pure: its
//! [`Source`] does the reading.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::ini::{self, Line};
use super::model::{
    printable, Config, Gateway, OnExit, Place, Problem, Source, Take, Target, Tproxy,
};
use super::suggest::did_you_mean;
use super::value::*;
use crate::log::Level;
use crate::net::Mark;

/// Includes may nest this deep.
const MAX_DEPTH: usize = 8;
/// Most files in all, so that files that include each other many times over come to an end.
const MAX_FILES: usize = 1000;
/// Most tproxies: each is two chains, a set and two ip rules that packets pass.
const MAX_TPROXIES: usize = 1000;

/// Reads `path` and what it includes.
///
/// Errors: every problem of every file, in the order of the files and lines.
pub fn load(source: &dyn Source, path: &Path) -> Result<Config, Vec<Problem>> {
    let mut reader = Reader {
        source,
        config: Config::default(),
        problems: Vec::new(),
        stack: Vec::new(),
        seen: BTreeMap::new(),
        mask_is_bad: false,
        bypass_marks: Vec::new(),
        default: None,
        rules: Vec::new(),
        tproxies: Vec::new(),
        gateways: Vec::new(),
    };
    reader.file(path, None);
    reader.finish()
}

/// The section that entries are being read into.
#[derive(Clone, Copy)]
enum Section {
    /// Before the first header.
    None,
    /// After a header that is wrong: its entries are not judged.
    Unknown,
    Global,
    Rules,
    Tproxy(usize),
    Gateway(usize),
}

/// A tproxy section as far as it has been read.
pub(super) struct Draft {
    pub(super) place: Place,
    pub(super) tproxy: Tproxy,
    pub(super) has_port: bool,
    pub(super) has_dns: bool,
    pub(super) mark: Option<(u32, Place)>,
    pub(super) keys: BTreeMap<String, Place>,
}

/// A gateway section as far as it has been read.
pub(super) struct GatewayDraft {
    pub(super) gateway: Gateway,
    pub(super) target: Option<(String, Place)>,
    pub(super) has_interface: bool,
    pub(super) keys: BTreeMap<String, Place>,
}

pub(super) struct Reader<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) config: Config,
    pub(super) problems: Vec<Problem>,
    /// Files being read, outermost first.
    pub(super) stack: Vec<PathBuf>,
    /// Single-valued keys of [global] that have been set.
    pub(super) seen: BTreeMap<String, Place>,
    /// Marks are not judged by a mask that could not be read.
    pub(super) mask_is_bad: bool,
    pub(super) bypass_marks: Vec<(Mark, Place)>,
    pub(super) default: Option<(String, Place)>,
    pub(super) rules: Vec<(String, String, Place)>,
    pub(super) tproxies: Vec<Draft>,
    pub(super) gateways: Vec<GatewayDraft>,
}

const SECTIONS: [&str; 4] = ["global", "tproxy", "rules", "gateway"];
/// The keys of each section. One that has no effect fails `every_key_has_an_effect` (tests/config.rs).
pub const GLOBAL_KEYS: [&str; 12] = [
    "cgroup-root",
    "default",
    "route-table",
    "rule-priority",
    "fwmark-mask",
    "bypass",
    "bypass-mark",
    "bypass-user",
    "on-exit",
    "include",
    "log-level",
    "counters",
];
const REPEATABLE: [&str; 9] = [
    "bypass",
    "bypass-mark",
    "bypass-user",
    "include",
    "address",
    "dns-hijack",
    "interface",
    "source",
    "source-mac",
];
pub const GATEWAY_KEYS: [&str; 4] = ["interface", "source", "source-mac", "target"];
pub const TPROXY_KEYS: [&str; 10] = [
    "port",
    "address",
    "mark",
    "tcp",
    "udp",
    "ipv4",
    "ipv6",
    "dns-hijack",
    "dns-hijack-tcp",
    "dns-hijack-local",
];

impl Reader<'_> {
    pub(super) fn problem(&mut self, place: &Place, message: impl Into<String>) {
        let file = place.file.to_path_buf();
        self.problems.push(Problem { file, line: place.line, message: printable(&message.into()) });
    }

    /// Reads a file; `from` is the line that includes it.
    fn file(&mut self, path: &Path, from: Option<&Place>) {
        let text = match self.may_include(path).and_then(|()| self.source.read(path)) {
            Ok(text) => text,
            Err(why) => {
                return match from {
                    Some(place) => {
                        let message = format!("unable to include {}: {why}", path.display());
                        self.problem(place, message)
                    }
                    None => self.problem(&Place { file: Rc::new(path.into()), line: 0 }, why),
                }
            }
        };
        self.config.files.push(path.to_path_buf());
        let file = Rc::new(path.to_path_buf());
        if let Some((line, language)) = ini::foreign(&text) {
            let place = Place { file, line };
            return self.problem(
                &place,
                format!(
                    "this is {language}, not KEY = VALUE: \"Coming from elsewhere\" in README.md has \
                     each key's place here"
                ),
            );
        }
        self.stack.push(path.to_path_buf());
        let mut section = Section::None;
        for (line, item) in ini::lines(&text) {
            let place = Place { file: file.clone(), line };
            match item {
                Err(why) => self.problem(&place, why),
                Ok(Line::Header { kind, name }) => section = self.header(&place, kind, name),
                Ok(Line::Entry { key, value }) => self.entry(&place, section, key, value),
            }
        }
        self.stack.pop();
    }

    fn may_include(&self, path: &Path) -> Result<(), String> {
        if self.stack.iter().any(|p| p == path) {
            Err("it includes itself".into())
        } else if self.config.files.iter().any(|p| p == path) {
            Err("it was included before".into())
        } else if self.stack.len() >= MAX_DEPTH {
            Err(format!("nested over {MAX_DEPTH} deep"))
        } else if self.config.files.len() >= MAX_FILES {
            Err(format!("more than {MAX_FILES} files"))
        } else {
            Ok(())
        }
    }

    fn header(&mut self, place: &Place, kind: &str, name: Option<&str>) -> Section {
        self.config.has_sections = true;
        match (kind, name) {
            ("global", None) => Section::Global,
            ("rules", None) => Section::Rules,
            ("global" | "rules", Some(name)) => {
                self.problem(place, format!("section [{kind}] takes no name: \"{name}\""));
                Section::Unknown
            }
            ("tproxy", Some(name)) => self.tproxy_header(place, name),
            ("gateway", Some(name)) => self.gateway_header(place, name),
            ("tproxy" | "gateway", None) => {
                let message = format!("section [{kind}] needs a name: [{kind} NAME]");
                self.problem(place, message);
                Section::Unknown
            }
            _ => {
                let hint = did_you_mean(kind, SECTIONS, |s| format!("[{s}]"));
                self.problem(place, format!("unknown section [{kind}]{hint}"));
                Section::Unknown
            }
        }
    }

    fn tproxy_header(&mut self, place: &Place, name: &str) -> Section {
        let reserved = matches!(name, "direct" | "drop");
        let name_problem = match reserved {
            true => Err(format!("a tproxy cannot be named \"{name}\"")),
            false => check_name("tproxy", name),
        };
        if let Err(why) = name_problem {
            self.problem(place, why);
            return Section::Unknown;
        }
        if let Some(first) = self.tproxies.iter().find(|d| d.tproxy.name == name) {
            let message = format!("duplicate section [tproxy {name}], first at {}", first.place);
            self.problem(place, message);
            return Section::Unknown;
        }
        if self.tproxies.len() == MAX_TPROXIES {
            self.problem(place, format!("more than {MAX_TPROXIES} tproxies: \"{name}\""));
            return Section::Unknown;
        }
        self.tproxies.push(Draft {
            place: place.clone(),
            tproxy: Tproxy {
                name: name.to_string(),
                port: 0,
                address4: None,
                address6: None,
                mark: 0,
                tcp: Take::Yes,
                udp: Take::Yes,
                ipv4: Take::Yes,
                ipv6: Take::Yes,
                dns4: None,
                dns6: None,
                dns_tcp: false,
                dns_local: false,
            },
            has_port: false,
            has_dns: false,
            mark: None,
            keys: BTreeMap::new(),
        });
        Section::Tproxy(self.tproxies.len() - 1)
    }

    fn gateway_header(&mut self, place: &Place, name: &str) -> Section {
        if let Err(why) = check_name("gateway", name) {
            self.problem(place, why);
            return Section::Unknown;
        }
        if let Some(first) = self.gateways.iter().find(|d| d.gateway.name == name) {
            let first = &first.gateway.place;
            let message = format!("duplicate section [gateway {name}], first at {first}");
            self.problem(place, message);
            return Section::Unknown;
        }
        self.gateways.push(GatewayDraft {
            gateway: Gateway {
                name: name.to_string(),
                interfaces: Vec::new(),
                sources4: Vec::new(),
                sources6: Vec::new(),
                macs: Vec::new(),
                target: Target::Direct,
                place: place.clone(),
            },
            target: None,
            has_interface: false,
            keys: BTreeMap::new(),
        });
        Section::Gateway(self.gateways.len() - 1)
    }

    fn entry(&mut self, place: &Place, section: Section, key: &str, value: &str) {
        let result = match section {
            Section::Unknown => Ok(()),
            Section::None => Err(format!("\"{key}\" stands before any section header")),
            Section::Rules => {
                self.rules.push((key.to_string(), value.to_string(), place.clone()));
                Ok(())
            }
            Section::Global => {
                self.once(place, section, key, "[global]", &GLOBAL_KEYS).and_then(|()| match key {
                    "include" => {
                        self.include(place, value);
                        Ok(())
                    }
                    _ => self.global(place, key, value),
                })
            }
            Section::Tproxy(index) => self
                .once(place, section, key, "[tproxy]", &TPROXY_KEYS)
                .and_then(|()| tproxy_key(&mut self.tproxies[index], place, key, value)),
            Section::Gateway(index) => self
                .once(place, section, key, "[gateway]", &GATEWAY_KEYS)
                .and_then(|()| gateway_key(&mut self.gateways[index], place, key, value)),
        };
        if let Err(mut why) = result {
            // the likeliest reason for a bad value that holds one
            if [" #", " ;"].iter().any(|c| value.contains(c)) {
                why.push_str("; a comment needs a line of its own");
            }
            self.problem(place, why);
        }
    }

    /// Checks that a key is known, and that it is not set a second time unless it is repeatable.
    fn once(
        &mut self,
        place: &Place,
        section: Section,
        key: &str,
        section_name: &str,
        known: &[&'static str],
    ) -> Result<(), String> {
        if !known.contains(&key) {
            let hint = did_you_mean(key, known.iter().copied(), |k| format!("\"{k}\""));
            return Err(format!("unknown key \"{key}\" in {section_name}{hint}"));
        }
        if REPEATABLE.contains(&key) {
            return Ok(());
        }
        let seen = match section {
            Section::Tproxy(index) => &mut self.tproxies[index].keys,
            Section::Gateway(index) => &mut self.gateways[index].keys,
            _ => &mut self.seen,
        };
        match seen.get(key) {
            Some(first) => Err(format!("duplicate key \"{key}\", first set at {first}")),
            None => {
                seen.insert(key.to_string(), place.clone());
                Ok(())
            }
        }
    }

    fn include(&mut self, place: &Place, value: &str) {
        let base = place.file.parent().unwrap_or(Path::new("."));
        match self.source.glob(&base.join(value)) {
            Err(why) => self.problem(place, format!("unable to include \"{value}\": {why}")),
            Ok(files) => files.iter().for_each(|file| self.file(file, Some(place))),
        }
    }

    fn global(&mut self, place: &Place, key: &str, value: &str) -> Result<(), String> {
        let config = &mut self.config;
        match key {
            "cgroup-root" => {
                config.cgroup_root = match value {
                    "auto" => None,
                    path if path.starts_with('/') => Some(PathBuf::from(path)),
                    _ => return Err(expects(key, "auto or an absolute path", value)),
                }
            }
            "default" => self.default = Some((value.to_string(), place.clone())),
            "route-table" => config.route_table = route_table(value)?,
            "rule-priority" => config.rule_priority = number(key, value, 1, 32765)?,
            "fwmark-mask" => {
                let mask = number(key, value, 1, u32::MAX);
                self.mask_is_bad = mask.is_err();
                config.mask = mask?;
            }
            "bypass" => bypass(config, value)?,
            "bypass-mark" => {
                let mark = bypass_mark(value)?;
                self.bypass_marks.push((mark, place.clone()));
                config.bypass_marks.push(mark);
            }
            "bypass-user" => {
                let uid = match parse_number(value) {
                    Some(_) => number(key, value, 0, u32::MAX - 1)?,
                    None => match self.source.uid(value) {
                        Some(uid) => uid,
                        None => return Err(format!("no such user: \"{value}\"")),
                    },
                };
                config.bypass_users.push(uid);
            }
            "on-exit" => {
                config.on_exit = match value {
                    "remove" => OnExit::Remove,
                    "keep" => OnExit::Keep,
                    _ => return Err(expects(key, "remove or keep", value)),
                }
            }
            "log-level" => {
                config.log_level = Level::parse(value)
                    .ok_or_else(|| expects(key, "error, warning, notice, info or debug", value))?
            }
            "counters" => {
                config.counters_per_cgroup = match value {
                    "target" => false,
                    "cgroup" => true,
                    _ => return Err(expects(key, "target or cgroup", value)),
                }
            }
            _ => unreachable!("{key} is in GLOBAL_KEYS"),
        }
        Ok(())
    }
}

fn tproxy_key(draft: &mut Draft, place: &Place, key: &str, value: &str) -> Result<(), String> {
    let tproxy = &mut draft.tproxy;
    match key {
        "port" => {
            // a bad port is told once, not again as a missing one
            draft.has_port = true;
            tproxy.port = number(key, value, 1, 65535)? as u16;
        }
        "address" => match value.parse() {
            Ok(IpAddr::V4(a)) => set_once(&mut tproxy.address4, a, key, "IPv4")?,
            Ok(IpAddr::V6(a)) => set_once(&mut tproxy.address6, a, key, "IPv6")?,
            Err(_) => return Err(expects(key, "an IPv4 or IPv6 address", value)),
        },
        "mark" => draft.mark = Some((number(key, value, 1, u32::MAX)?, place.clone())),
        "tcp" => tproxy.tcp = take(key, value)?,
        "udp" => tproxy.udp = take(key, value)?,
        "ipv4" => tproxy.ipv4 = take(key, value)?,
        "ipv6" => tproxy.ipv6 = take(key, value)?,
        "dns-hijack" => {
            draft.has_dns = true;
            match endpoint(value) {
                Some(SocketAddr::V4(a)) => set_once(&mut tproxy.dns4, a, key, "IPv4")?,
                Some(SocketAddr::V6(a)) => set_once(&mut tproxy.dns6, a, key, "IPv6")?,
                None => return Err(expects(key, "ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT", value)),
            }
        }
        "dns-hijack-tcp" => tproxy.dns_tcp = boolean(key, value)?,
        "dns-hijack-local" => tproxy.dns_local = boolean(key, value)?,
        _ => unreachable!("{key} is in TPROXY_KEYS"),
    }
    Ok(())
}

fn gateway_key(
    draft: &mut GatewayDraft,
    place: &Place,
    key: &str,
    value: &str,
) -> Result<(), String> {
    let gateway = &mut draft.gateway;
    match key {
        "interface" => {
            draft.has_interface = true;
            let interface = interface(value)?;
            if gateway.interfaces.contains(&interface) {
                return Err(format!("\"{key}\" names \"{value}\" twice"));
            }
            gateway.interfaces.push(interface);
        }
        "source" => match cidr(key, "an address or a CIDR", value)? {
            Cidr::V4(range) => gateway.sources4.push(range),
            Cidr::V6(range) => gateway.sources6.push(range),
        },
        "source-mac" => {
            let mac = value
                .parse()
                .map_err(|()| expects(key, "six pairs of hexadecimal digits with colons", value))?;
            gateway.macs.push(mac);
        }
        "target" => draft.target = Some((value.to_string(), place.clone())),
        _ => unreachable!("{key} is in GATEWAY_KEYS"),
    }
    Ok(())
}
