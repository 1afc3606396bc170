//! The configuration: sections and keys to a validated [`Config`], with every error at once.
//! Pure: files, directories and user names come from a [`Source`].

mod automaton;
pub mod file;
pub mod ini;
pub mod lint;
pub mod pattern;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use regex_lite::{Regex, RegexBuilder};

use crate::log::Level;
use crate::net::{Family, Interface, Mac, Mark, Range};
use ini::Line;
use pattern::Pattern;

/// Where text comes from; the real one is [`file::Files`].
pub trait Source {
    /// The text of a file. Errors: why it cannot be used, without its name.
    fn read(&self, path: &Path) -> Result<String, String>;
    /// The files that an include pattern matches, sorted. Errors: why it cannot be used.
    fn glob(&self, pattern: &Path) -> Result<Vec<PathBuf>, String>;
    /// The uid of a user name.
    fn uid(&self, name: &str) -> Option<u32>;
}

/// Where a packet of a cgroup goes. Tproxies are numbered in file order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    Direct,
    Drop,
    Tproxy(u16),
}

/// What a tproxy does with a protocol or a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    Yes,
    No,
    Drop,
}

/// A `[tproxy NAME]` section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tproxy {
    pub name: String,
    pub port: u16,
    pub address4: Option<Ipv4Addr>,
    pub address6: Option<Ipv6Addr>,
    /// Within the mask, not zero, not any other's.
    pub mark: u32,
    pub tcp: Take,
    pub udp: Take,
    pub ipv4: Take,
    pub ipv6: Take,
    pub dns4: Option<SocketAddrV4>,
    pub dns6: Option<SocketAddrV6>,
    pub dns_tcp: bool,
    /// Hijack DNS that is addressed to this host or to a bypassed address as well.
    pub dns_local: bool,
}

impl Tproxy {
    pub fn hijacks_dns(&self) -> bool {
        self.dns4.is_some() || self.dns6.is_some()
    }

    /// The protocols whose port 53 is hijacked.
    pub fn dns_protocols(&self) -> impl Iterator<Item = crate::net::L4> {
        use crate::net::L4;
        let tcp = self.dns_tcp.then_some(L4::Tcp);
        let udp = self.hijacks_dns().then_some(L4::Udp);
        udp.into_iter().chain(tcp.filter(|_| self.hijacks_dns()))
    }
}

/// One line of `[rules]`.
#[derive(Debug, Clone)]
pub struct Rule {
    pub target: Target,
    pub pattern: String,
    /// Anchored at both ends.
    pub regex: Pattern,
    pub place: Place,
}

/// A `[gateway NAME]` section: traffic that this host routes for others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    pub name: String,
    /// One at least.
    pub interfaces: Vec<Interface>,
    /// Where both families are empty, every source; else those of one that is empty are left out.
    pub sources4: Vec<Range<Ipv4Addr>>,
    pub sources6: Vec<Range<Ipv6Addr>>,
    /// Empty: every one.
    pub macs: Vec<Mac>,
    pub target: Target,
    pub place: Place,
}

/// File and line of a setting.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub file: Rc<PathBuf>,
    pub line: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExit {
    Remove,
    Keep,
}

/// A validated configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// `None`: auto.
    pub cgroup_root: Option<PathBuf>,
    pub default: Target,
    pub route_table: u32,
    pub rule_priority: u32,
    pub mask: u32,
    pub bypass4: Vec<Range<Ipv4Addr>>,
    pub bypass6: Vec<Range<Ipv6Addr>>,
    pub bypass_marks: Vec<Mark>,
    pub bypass_users: Vec<u32>,
    pub on_exit: OnExit,
    pub log_level: Level,
    pub counters_per_cgroup: bool,
    pub tproxies: Vec<Tproxy>,
    pub rules: Vec<Rule>,
    pub gateways: Vec<Gateway>,
    /// Every file that was read, the first one first.
    pub files: Vec<PathBuf>,
    /// Some file has a section. One that is empty may be about to be written.
    pub has_sections: bool,
}

impl Default for Config {
    /// Everything direct.
    fn default() -> Config {
        Config {
            cgroup_root: None,
            default: Target::Direct,
            route_table: 300,
            rule_priority: 100,
            mask: 0xff00_0000,
            bypass4: Vec::new(),
            bypass6: Vec::new(),
            bypass_marks: Vec::new(),
            bypass_users: Vec::new(),
            on_exit: OnExit::Remove,
            log_level: Level::Notice,
            counters_per_cgroup: false,
            tproxies: Vec::new(),
            rules: Vec::new(),
            gateways: Vec::new(),
            files: Vec::new(),
            has_sections: false,
        }
    }
}

impl Config {
    /// All targets, in the order of their sets: direct, drop, tproxies in file order.
    pub fn targets(&self) -> impl Iterator<Item = Target> {
        let tproxies = (0..self.tproxies.len() as u16).map(Target::Tproxy);
        [Target::Direct, Target::Drop].into_iter().chain(tproxies)
    }

    /// The target of that name.
    pub fn named(&self, name: &str) -> Option<Target> {
        self.targets().find(|target| self.target_name(*target) == name)
    }

    pub fn target_name(&self, target: Target) -> &str {
        match target {
            Target::Direct => "direct",
            Target::Drop => "drop",
            Target::Tproxy(index) => &self.tproxies[usize::from(index)].name,
        }
    }

    /// The ct mark of a flow that is known to go direct, where the default is not direct.
    pub fn direct_mark(&self) -> u32 {
        self.mask
    }

    /// The ct mark of a flow that began with a packet that this host sent from a foreign address:
    /// a proxy speaks for a remote host, and conntrack has forgotten, or never known, who spoke
    /// first. The mask without its lowest bit, whatever else the configuration says: a reload must
    /// not change what the marks of flows mean.
    pub fn spoofed_mark(&self) -> u32 {
        self.mask & (self.mask - 1)
    }

    /// The mark of routed packets that go to a tproxy. Not the tproxy's own: with src_valid_mark=1
    /// the kernel looks up the way back with `iif lo` and the packet's mark, would meet the rule
    /// for local traffic, and take the packet for a martian. The same number as a spoofed flow's:
    /// where another program restores that into a client's packet, nothing is lost.
    pub fn gateway_mark(&self) -> u32 {
        self.spoofed_mark()
    }

    /// Whether routed traffic may belong to a tproxy: a flow stays with it when a reload has given
    /// its gateway another target.
    pub fn routes_to_tproxy(&self) -> bool {
        !self.gateways.is_empty() && !self.tproxies.is_empty()
    }

    /// The interfaces of all gateway sections, in file order.
    pub fn gateway_interfaces(&self) -> Vec<&Interface> {
        let all = self.gateways.iter().flat_map(|gateway| &gateway.interfaces);
        all.collect()
    }

    /// Whether any flow gets a ct mark.
    pub fn marks_flows(&self) -> bool {
        !self.tproxies.is_empty() || self.default != Target::Direct
    }
}

/// One thing that is wrong with a configuration; prints as `FILE:LINE: message`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub file: PathBuf,
    /// 0 where the file as a whole is meant.
    pub line: u32,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.message),
            line => write!(f, "{}:{line}: {}", self.file.display(), self.message),
        }
    }
}

/// Includes may nest this deep.
const MAX_DEPTH: usize = 8;
/// Most files in all, so that files that include each other many times over come to an end.
const MAX_FILES: usize = 1000;
/// Most tproxies: each is two chains, a set and two ip rules that packets pass.
const MAX_TPROXIES: usize = 1000;
/// Longest tproxy or gateway name.
const MAX_NAME: usize = 15;
/// Longest interface name (`IFNAMSIZ` - 1).
const MAX_INTERFACE: usize = 15;
/// Longest message, in characters.
const MAX_MESSAGE: usize = 1000;
/// Bytes of one compiled pattern, and of all together.
const MAX_PATTERN: usize = 1 << 20;
const MAX_COMPILED: usize = 16 << 20;

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
struct Draft {
    place: Place,
    tproxy: Tproxy,
    has_port: bool,
    has_dns: bool,
    mark: Option<(u32, Place)>,
    keys: BTreeMap<String, Place>,
}

/// A gateway section as far as it has been read.
struct GatewayDraft {
    gateway: Gateway,
    target: Option<(String, Place)>,
    has_interface: bool,
    keys: BTreeMap<String, Place>,
}

struct Reader<'a> {
    source: &'a dyn Source,
    config: Config,
    problems: Vec<Problem>,
    /// Files being read, outermost first.
    stack: Vec<PathBuf>,
    /// Single-valued keys of [global] that have been set.
    seen: BTreeMap<String, Place>,
    /// Marks are not judged by a mask that could not be read.
    mask_is_bad: bool,
    bypass_marks: Vec<(Mark, Place)>,
    default: Option<(String, Place)>,
    rules: Vec<(String, String, Place)>,
    tproxies: Vec<Draft>,
    gateways: Vec<GatewayDraft>,
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
    fn problem(&mut self, place: &Place, message: impl Into<String>) {
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

    /// Resolves what could refer to a later line: targets and marks.
    fn finish(mut self) -> Result<Config, Vec<Problem>> {
        for draft in std::mem::take(&mut self.tproxies) {
            if !draft.has_port {
                let name = &draft.tproxy.name;
                self.problem(&draft.place, format!("[tproxy {name}] needs a port"));
            }
            let dns = [
                ("dns-hijack-tcp", draft.tproxy.dns_tcp),
                ("dns-hijack-local", draft.tproxy.dns_local),
            ];
            for (key, on) in dns {
                if on && !draft.has_dns {
                    let place = draft.keys.get(key).unwrap_or(&draft.place).clone();
                    self.problem(&place, format!("\"{key}\" needs \"dns-hijack\""));
                }
            }
            self.config.tproxies.push(draft.tproxy.clone());
            self.tproxies.push(draft);
        }
        if let Some((name, place)) = self.default.take() {
            match self.target(&name) {
                Ok(target) => self.config.default = target,
                Err(why) => self.problem(&place, why),
            }
        }
        self.finish_gateways();
        if !self.mask_is_bad {
            self.assign_marks();
            self.check_bypass_marks();
        }
        let mut room = MAX_COMPILED;
        for (target, pattern, place) in std::mem::take(&mut self.rules) {
            let target = self.target(&target).map_err(|why| self.problem(&place, why));
            let regex = compile_within(&pattern, &mut room);
            let regex = regex.map_err(|why| self.problem(&place, why));
            let full = regex.is_err() && room == 0;
            if let (Ok(target), Ok(regex)) = (target, regex) {
                self.config.rules.push(Rule { target, pattern, regex, place });
            }
            if full {
                // said once is enough
                break;
            }
        }
        if self.problems.is_empty() {
            return Ok(self.config);
        }
        // what the end of the files showed belongs to its line all the same
        let files: BTreeMap<_, _> = self.config.files.iter().zip(0..).collect();
        self.problems.sort_by_key(|p| (files.get(&p.file).copied(), p.line));
        Err(self.problems)
    }

    fn finish_gateways(&mut self) {
        let mut wildcard = None;
        for draft in std::mem::take(&mut self.gateways) {
            let mut gateway = draft.gateway;
            let name = &gateway.name;
            if !draft.has_interface {
                let message = format!("[gateway {name}] needs an interface");
                self.problem(&gateway.place, message);
            }
            match &draft.target {
                Some((target, place)) => match self.target(target) {
                    Ok(target) => gateway.target = target,
                    Err(why) => self.problem(place, why),
                },
                None if !draft.keys.contains_key("target") => {
                    let message = format!("[gateway {name}] needs a target");
                    self.problem(&gateway.place, message);
                }
                None => {}
            }
            if gateway.interfaces.iter().any(|i| i.prefix) {
                wildcard = wildcard.or(Some(gateway.place.clone()));
            }
            self.config.gateways.push(gateway);
        }
        // such interfaces are told by three ip rules in a row (route.rs)
        let most = 32765 - 2;
        if let (Some(place), true) = (wildcard, self.config.rule_priority > most) {
            let message = format!("an interface with \"*\" needs a rule-priority up to {most}");
            self.problem(&place, message);
        }
    }

    fn target(&self, name: &str) -> Result<Target, String> {
        match name {
            "direct" => Ok(Target::Direct),
            "drop" => Ok(Target::Drop),
            _ => match self.config.tproxies.iter().position(|t| t.name == name) {
                Some(index) => Ok(Target::Tproxy(index as u16)),
                None => {
                    let names = self.config.tproxies.iter().map(|t| t.name.as_str());
                    let names = names.chain(["direct", "drop"]);
                    let hint = did_you_mean(name, names, |n| format!("\"{n}\""));
                    Err(format!("undefined target \"{name}\"{hint}"))
                }
            },
        }
    }

    /// The tproxy at position i gets mark i, shifted into the mask, or the next one that is free.
    fn assign_marks(&mut self) {
        let mask = self.config.mask;
        let spoofed = self.config.spoofed_mark();
        let direct = self.config.default != Target::Direct;
        let reserved = |mark: u32| mark == spoofed || direct && mark == mask;
        let mut taken: BTreeMap<u32, String> = BTreeMap::new();
        let drafts = std::mem::take(&mut self.tproxies);
        if let (0, Some(first)) = (spoofed, drafts.first()) {
            let message =
                format!("a tproxy needs a fwmark-mask of two bits or more, not {mask:#x}");
            self.problem(&first.place, message);
            return;
        }
        for draft in &drafts {
            let Some((mark, place)) = &draft.mark else {
                continue;
            };
            let (mark, name) = (*mark, &draft.tproxy.name);
            if mark & !mask != 0 {
                self.problem(place, format!("mark {mark:#x} is not within fwmark-mask {mask:#x}"));
            } else if mark == spoofed {
                let message = format!(
                    "mark {mark:#x} is fwmark-mask without its lowest bit, which stands for flows \
                     that a proxy begins"
                );
                self.problem(place, message);
            } else if reserved(mark) {
                let message = format!(
                    "mark {mark:#x} is the whole fwmark-mask, which stands for direct flows where \
                     the default is not direct"
                );
                self.problem(place, message);
            } else if let Some(other) = taken.get(&mark) {
                self.problem(place, format!("mark {mark:#x} is that of [tproxy {other}] already"));
            } else {
                taken.insert(mark, name.clone());
            }
        }
        for (index, draft) in drafts.iter().enumerate() {
            let free = || {
                let (first, most) = (1 + index as u32, u32::MAX >> mask.count_zeros());
                (first..=most)
                    .chain(1..=most.min(index as u32))
                    .map(|n| spread(n, mask))
                    .find(|m| !taken.contains_key(m) && !reserved(*m))
            };
            let name = &draft.tproxy.name;
            let mark = match &draft.mark {
                Some((mark, _)) => *mark,
                None => match free() {
                    Some(mark) => mark,
                    None => {
                        let message =
                            format!("no mark left in fwmark-mask {mask:#x} for [tproxy {name}]");
                        self.problem(&draft.place, message);
                        continue;
                    }
                },
            };
            taken.entry(mark).or_insert_with(|| name.clone());
            self.config.tproxies[index].mark = mark;
        }
    }

    /// Our ip rules would send a packet with such a mark to the proxy all the same.
    fn check_bypass_marks(&mut self) {
        let mask = self.config.mask;
        for (bypass, place) in std::mem::take(&mut self.bypass_marks) {
            let is = |t: &&Tproxy| bypass.mask & mask == mask && bypass.value & mask == t.mark;
            if let Some(tproxy) = self.config.tproxies.iter().find(is) {
                let (value, name) = (bypass.value, &tproxy.name);
                let message = format!("\"bypass-mark\" {value:#x} is the mark of [tproxy {name}]");
                self.problem(&place, message);
            }
        }
    }
}

/// The bits of `n` put one by one into the bits of `mask`, lowest first. For a mask without holes,
/// `n` shifted into it.
fn spread(n: u32, mask: u32) -> u32 {
    let bits = (0..32).filter(|bit| mask >> bit & 1 == 1);
    (bits.enumerate()).fold(0, |mark, (i, bit)| mark | (n >> i & 1) << bit)
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

/// The name of an interface that packets may come in by, or the beginning of such names.
fn interface(value: &str) -> Result<Interface, String> {
    let wrong = |what: &str| Err(expects("interface", what, value));
    let (name, prefix) = match value.strip_suffix('*') {
        Some(name) => (name, true),
        None => (value, false),
    };
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | '"' | '\\' | '*');
    if value == "lo" {
        wrong("an interface that others are behind")
    } else if value == "*" {
        wrong("a name, or the beginning of one before the *")
    } else if prefix && name.len() == MAX_INTERFACE {
        // nft takes that for the name itself, and lists what does not load
        wrong("up to 14 characters before the *")
    } else if name.is_empty() || name.len() > MAX_INTERFACE || !name.chars().all(legal) {
        wrong("the name of an interface, up to 15 characters")
    } else {
        Ok(Interface { name: name.to_string(), prefix })
    }
}

fn set_once<T: fmt::Display>(
    slot: &mut Option<T>,
    value: T,
    key: &str,
    family: &str,
) -> Result<(), String> {
    if let Some(first) = slot {
        return Err(format!("second {family} \"{key}\": \"{value}\" beside \"{first}\""));
    }
    *slot = Some(value);
    Ok(())
}

/// A message as it may stand in a log or a terminal: no control characters, not endless.
fn printable(message: &str) -> String {
    let mut text = String::new();
    for c in message.chars().take(MAX_MESSAGE) {
        match c.is_control() {
            true => text.extend(c.escape_default()),
            false => text.push(c),
        }
    }
    if message.chars().nth(MAX_MESSAGE).is_some() {
        text.push_str("...");
    }
    text
}

fn expects(key: &str, what: &str, value: &str) -> String {
    format!("\"{key}\" expects {what}, not \"{value}\"")
}

fn check_name(kind: &str, name: &str) -> Result<(), String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let first = name.starts_with(|c: char| c.is_ascii_alphabetic());
    match name.len() <= MAX_NAME && first && name.chars().all(legal) {
        true => Ok(()),
        false => Err(format!(
            "bad {kind} name \"{name}\": a letter, then up to 14 letters, digits, \"_\" or \"-\""
        )),
    }
}

/// A decimal number, or a hexadecimal one behind `0x`.
fn parse_number(value: &str) -> Option<u64> {
    let (digits, radix) = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (value, 10),
    };
    // from_str_radix would take a sign
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

fn number(key: &str, value: &str, least: u32, most: u32) -> Result<u32, String> {
    match parse_number(value) {
        Some(n) if (u64::from(least)..=u64::from(most)).contains(&n) => Ok(n as u32),
        _ => {
            let range = match most {
                0xffff_fffe.. => format!("a number from {least} to {most:#x}"),
                _ => format!("a number from {least} to {most}"),
            };
            Err(expects(key, &range, value))
        }
    }
}

fn boolean(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "yes" | "true" | "on" | "1" => Ok(true),
        "no" | "false" | "off" | "0" => Ok(false),
        _ => Err(expects(key, "yes or no", value)),
    }
}

fn take(key: &str, value: &str) -> Result<Take, String> {
    match value {
        "drop" => Ok(Take::Drop),
        _ => match boolean(key, value) {
            Ok(true) => Ok(Take::Yes),
            Ok(false) => Ok(Take::No),
            Err(_) => Err(expects(key, "yes, no or drop", value)),
        },
    }
}

fn route_table(value: &str) -> Result<u32, String> {
    match number("route-table", value, 1, u32::MAX)? {
        table @ 253..=255 => {
            Err(format!("\"route-table\" cannot be {table}: it is the default, main or local one"))
        }
        table => Ok(table),
    }
}

fn bypass(config: &mut Config, value: &str) -> Result<(), String> {
    if value == "private" {
        for (a, n) in [([10, 0, 0, 0], 8), ([172, 16, 0, 0], 12), ([192, 168, 0, 0], 16)] {
            config.bypass4.push(Range::prefix(Ipv4Addr::from(a), n));
        }
        config.bypass4.push(Range::prefix(Ipv4Addr::new(100, 64, 0, 0), 10));
        config.bypass6.push(Range::prefix(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7));
        return Ok(());
    }
    match cidr("bypass", "an address, a CIDR or \"private\"", value)? {
        Cidr::V4(range) => config.bypass4.push(range),
        Cidr::V6(range) => config.bypass6.push(range),
    }
    Ok(())
}

enum Cidr {
    V4(Range<Ipv4Addr>),
    V6(Range<Ipv6Addr>),
}

/// `ADDRESS` or `ADDRESS/LENGTH`; `what` says so to users.
fn cidr(key: &str, what: &str, value: &str) -> Result<Cidr, String> {
    let wrong = || expects(key, what, value);
    let (address, length) = match value.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (value, None),
    };
    let address: IpAddr = address.trim().parse().map_err(|_| wrong())?;
    let bits = match Family::of(&address) {
        Family::V4 => 32,
        Family::V6 => 128,
    };
    let length = match length.map(str::trim) {
        None => bits,
        Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
            text.parse().ok().filter(|n| *n <= bits).ok_or_else(|| {
                format!("\"{key}\": prefix length {text} is not from 0 to {bits}: \"{value}\"")
            })?
        }
        Some(_) => return Err(wrong()),
    };
    Ok(match address {
        IpAddr::V4(a) => Cidr::V4(Range::prefix(a, length)),
        IpAddr::V6(a) => Cidr::V6(Range::prefix(a, length)),
    })
}

fn bypass_mark(value: &str) -> Result<Mark, String> {
    let wrong = || expects("bypass-mark", "VALUE or VALUE/MASK, 32 bits each", value);
    let bits = |text: &str| {
        parse_number(text.trim()).and_then(|n| u32::try_from(n).ok()).ok_or_else(wrong)
    };
    let mark = match value.split_once('/') {
        Some((value, mask)) => Mark { value: bits(value)?, mask: bits(mask)? },
        None => Mark { value: bits(value)?, mask: u32::MAX },
    };
    match mark {
        Mark { value: 0, .. } => {
            Err("\"bypass-mark\" 0 would match every packet without a mark".into())
        }
        Mark { mask: 0, .. } => Err("\"bypass-mark\" with mask 0 would match every packet".into()),
        mark if mark.value & !mark.mask != 0 => Err(format!(
            "\"bypass-mark\" {:#x} has bits outside its mask {:#x}",
            mark.value, mark.mask
        )),
        mark => Ok(mark),
    }
}

/// `ADDRESS`, `ADDRESS:PORT`, `[ADDRESS]:PORT`; port 53 if left out.
fn endpoint(value: &str) -> Option<SocketAddr> {
    let bare = value.strip_prefix('[').and_then(|v| v.strip_suffix(']')).unwrap_or(value);
    let address = match bare.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, 53),
        Err(_) => value.parse::<SocketAddr>().ok()?,
    };
    let plain = !matches!(address, SocketAddr::V6(a) if a.scope_id() != 0);
    (address.port() != 0 && !address.ip().is_unspecified() && plain).then_some(address)
}

/// Compiles a rule's pattern, anchored at both ends of the path.
pub fn compile(pattern: &str) -> Result<Pattern, String> {
    compile_within(pattern, &mut { usize::MAX })
}

/// The same, where all patterns together may take so many more bytes. What an automaton takes is
/// bounded by the length of the file; a regex of counted repeats is not.
fn compile_within(pattern: &str, room: &mut usize) -> Result<Pattern, String> {
    // alone first: `a)|(b` must not become legal by the group around it
    if let Err(error) = parse_only(pattern) {
        let at = error_position(pattern, &error);
        return Err(format!("bad pattern at character {at}: {error}: \"{pattern}\""));
    }
    Pattern::new(pattern, || {
        // regex-lite does not tell what it took: the smallest of some limits that is enough
        let mut limit = 16 * 1024;
        loop {
            if limit > *room {
                *room = 0;
                return Err(format!(
                    "the patterns up to here take more than {} MiB, most of it by counted repeats: \
                     \"{pattern}\"",
                    MAX_COMPILED >> 20
                ));
            }
            match anchored(pattern, limit) {
                Ok(regex) => {
                    *room -= limit;
                    return Ok(regex);
                }
                Err(error) if limit >= MAX_PATTERN => {
                    return Err(format!("bad pattern: {error}: \"{pattern}\""))
                }
                Err(_) => limit *= 4,
            }
        }
    })
}

/// The regex that matches a pattern against a whole text, if that takes no more than so many bytes.
fn anchored(pattern: &str, limit: usize) -> Result<Regex, regex_lite::Error> {
    // room for the group around it
    let build = |text: &str| RegexBuilder::new(text).nest_limit(100).size_limit(limit).build();
    // in (?x) mode the first group's end could stand in a comment, which a newline ends
    build(&format!(r"\A(?:{pattern})\z")).or_else(|_| build(&format!("\\A(?:{pattern}\n)\\z")))
}

/// Whether a pattern is well-formed, at the cost of its length: nothing is built.
fn parse_only(pattern: &str) -> Result<(), String> {
    let error = |pattern| RegexBuilder::new(pattern).size_limit(0).build().err();
    // a pattern that is well-formed stops at the limit, as the empty one does
    match (error(pattern), error("")) {
        (Some(error), Some(limit)) if error != limit => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// Where a pattern goes wrong, counted in characters from 1: regex-lite does not say, so this is
/// the end of the shortest beginning from which on every beginning has that error.
fn error_position(pattern: &str, error: &str) -> usize {
    let ends = pattern.char_indices().map(|(at, c)| at + c.len_utf8());
    let ends: Vec<usize> = ends.collect();
    let fails = |end: &usize| parse_only(&pattern[..*end]).is_err_and(|e| e == error);
    // what is open at the end may have been open and closed before, so the end is walked; what
    // stands far before it stopped the parser there and then, so halving finds it
    let near = ends.len().saturating_sub(256);
    match ends[near..].iter().rposition(|end| !fails(end)) {
        Some(at) => near + at + 2,
        None => 1 + ends[..near].partition_point(|end| !fails(end)),
    }
}

/// `, did you mean …?` where a known word is close to what was written.
fn did_you_mean<'a>(
    written: &str,
    known: impl IntoIterator<Item = &'a str>,
    show: impl Fn(&str) -> String,
) -> String {
    let lower = str::to_ascii_lowercase;
    let close = (written.chars().count() / 3).clamp(1, 3);
    (known.into_iter())
        .map(|word| (distance(&lower(written), &lower(word)), word))
        // two short words that share no letter are not alike
        .filter(|(d, word)| *d <= close && *d < written.len().min(word.len()))
        .min()
        .map_or(String::new(), |(_, word)| format!(", did you mean {}?", show(word)))
}

/// Optimal string alignment distance: insertions, deletions, substitutions, swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let same = usize::from(a[i - 1] != b[j - 1]);
                let mut best =
                    (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + same);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}
