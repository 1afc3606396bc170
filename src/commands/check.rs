//! `check`: findings about the configuration and then about this host, one a line, with the remedy.
//! It changes nothing. What it asks of nf_tables is a transaction that is made to fail.

use std::collections::HashSet;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use nix::errno::Errno;

use super::containers::{self, Container};
use crate::cgroup::core::Core;
use crate::cgroup::follow::Cgroups;
use crate::cgroup::tree::{self, Index};
use crate::cgroup::{mount, watch};
use crate::config::{lint, Config, Outlet, Route, RuleLine};
use crate::confine;
use crate::daemon;
use crate::error::{printable, reason, Error, Result};
use crate::faults;
use crate::host::{sysctl, Host};
use crate::instance;
use crate::json::Json;
use crate::kernel::{self, Kernel};
use crate::log;
use crate::log::Level;
use crate::net::{Family, Owner};
use crate::netlink::fib::FibAction;
use crate::netlink::link::Link;
use crate::netlink::uapi::*;
use crate::nft::marks::Ours;
use crate::nft::message::Probe;
use crate::nft::stmt::Stmt;
use crate::nft::table::{Base, TABLE};
use crate::nft::view;
use crate::options::{Options, DEFAULT_CONFIG};
use crate::plan;
use crate::policy;
use crate::route::{Needs, SeenRouting, WayOut};
use crate::small::SmallSet;
use crate::strays;
use crate::sys;

/// What findings may be about: told in JSON, where programs know a finding by it whatever its words.
/// cgtproxy(8) has all of them.
pub const ABOUT: [&str; 29] = [
    "config",
    "config-owner",
    "cgroup-root",
    "cgroup-level",
    "rule",
    "hold",
    "inotify",
    "stray-service",
    "cgroup-v1-controller",
    "capability",
    "kernel-feature",
    "tproxy-unused",
    "limits",
    "listener",
    "shared-port",
    "resolver",
    "nsswitch",
    "gateway-interface",
    "containers",
    "lo",
    "loop",
    "bound-socket",
    "route",
    "routing",
    "foreign-table",
    "foreign-chain",
    "sysctl",
    "saved-ruleset",
    "conntrack-accounting",
];

/// Of the shape that `--json` prints; documented in cgtproxy(8).
const JSON_VERSION: u64 = 1;

struct Finding {
    /// Error where `run` fails, or the policy is void; warning for what is degraded, or a risk; and
    /// info for what is as it should be.
    level: Level,
    /// One of [`ABOUT`].
    about: &'static str,
    text: String,
}

impl Finding {
    fn is_wrong(&self) -> bool {
        self.level <= Level::Warning
    }

    fn severity(&self) -> &'static str {
        if self.is_wrong() {
            self.level.name()
        } else {
            "ok"
        }
    }
}

/// What was found, in the order in which it was looked for.
#[derive(Default)]
struct Findings {
    all: Vec<Finding>,
    about: &'static str,
}

impl Findings {
    /// What the findings from here on are about.
    fn about(&mut self, about: &'static str) -> &mut Findings {
        debug_assert!(ABOUT.contains(&about), "{about}");
        self.about = about;
        self
    }

    fn ok(&mut self, text: impl AsRef<str>) {
        self.add(Level::Info, text.as_ref());
    }

    fn warning(&mut self, text: impl AsRef<str>) {
        self.add(Level::Warning, text.as_ref());
    }

    fn warnings(&mut self, texts: impl IntoIterator<Item = impl AsRef<str>>) {
        texts.into_iter().for_each(|text| self.warning(text));
    }

    fn error(&mut self, text: impl AsRef<str>) {
        self.add(Level::Error, text.as_ref());
    }

    fn add(&mut self, level: Level, text: &str) {
        // a file name may hold a newline: one finding is one line
        let text = printable(text);
        self.all.push(Finding { level, about: self.about, text });
    }

    fn count(&self, level: Level) -> usize {
        self.all.iter().filter(|found| found.level == level).count()
    }

    fn summary(&self) -> String {
        let many = |n, what| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let [errors, warnings, ok] =
            [Level::Error, Level::Warning, Level::Info].map(|level| self.count(level));
        format!("{}, {}, {ok} ok", many(errors, "error"), many(warnings, "warning"))
    }

    /// The worst last, where a terminal shows it, and then how many.
    fn text(&self, reader: Audience) -> String {
        let of = |level| self.all.iter().filter(move |found| found.level == level);
        let found = Level::ALL.into_iter().rev().flat_map(of);
        let mut text = String::new();
        for found in found.filter(|found| reader == Audience::Person || found.is_wrong()) {
            text += &match reader {
                Audience::Journal => log::line(true, found.level, &found.text),
                Audience::Person | Audience::Log => {
                    format!("{}: {}\n", found.severity(), found.text)
                }
            };
        }
        text + &self.summary() + "\n"
    }

    fn json(&self) -> Json {
        let finding = |found: &Finding| {
            Json::Object(vec![
                ("id", Json::text(found.about)),
                ("severity", Json::text(found.severity())),
                ("text", Json::text(&found.text)),
            ])
        };
        let count = |level| Json::Number(self.count(level) as u64);
        Json::Object(vec![
            ("version", Json::Number(JSON_VERSION)),
            ("errors", count(Level::Error)),
            ("warnings", count(Level::Warning)),
            ("ok", count(Level::Info)),
            ("findings", Json::List(self.all.iter().map(finding).collect())),
        ])
    }

    /// Sends what is wrong to syslog, where it is asked for.
    fn log(&self) {
        let wrong = || self.all.iter().filter(|found| found.is_wrong());
        wrong().for_each(|found| log::write(found.level, format_args!("{}", found.text)));
        if wrong().next().is_some() {
            log!(Notice, "check: {}", self.summary());
        }
    }
}

/// Who reads what is found. A log gets what is wrong alone.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Audience {
    Person,
    /// The terminal of whoever starts the service; the log has its lines already (`-s`).
    Log,
    /// By its own kind of priorities.
    Journal,
}

pub fn check(options: &Options, json: bool) -> Result<ExitCode> {
    let mut findings = Findings::default();
    let (config, wrong) = configuration(options, &mut findings)?;
    look_at_host(&Rc::new(config), &mut findings)?;
    let reader = match (options.syslog, log::read_by_journal(std::io::stdout().as_fd())) {
        (true, _) => Audience::Log,
        (false, true) => Audience::Journal,
        (false, false) => Audience::Person,
    };
    if options.syslog {
        log::configure(Level::Notice.louder(options.verbose), true);
        findings.log();
        log::configure(Level::Notice.louder(options.verbose), false);
    }
    super::print(&match json {
        true => format!("{}\n", findings.json()),
        false => findings.text(reader),
    })?;
    Ok(ExitCode::from(match (wrong, findings.count(Level::Error)) {
        (true, _) => 2,
        (false, 0) => 0,
        (false, _) => 1,
    }))
}

/// The kernel, opened once for all that is asked of it; or why it cannot be.
struct Asked(Result<Kernel>);

impl Asked {
    fn kernel(&mut self) -> Result<&mut Kernel> {
        self.0.as_mut().map_err(|error| error.clone())
    }
}

fn look_at_host(config: &Rc<Config>, findings: &mut Findings) -> Result<()> {
    let asked = &mut Asked(Kernel::open());
    let cgroups = cgroups(config, findings.about("cgroup-root"));
    let core = cgroups.as_ref().map(|cgroups| &cgroups.core);
    rules(config, core, findings.about("rule"));
    holds(config, core, findings.about("hold"));
    // without cgroups all are there, which is said
    findings.about("stray-service").warnings(core.and_then(|_| strays::find()));
    old_controllers(findings.about("cgroup-v1-controller"));
    findings.about("capability");
    match sys::has_net_admin() {
        false => findings.warning(
            "without CAP_NET_ADMIN, what nf_tables can do is not looked at: check as root",
        ),
        true => {
            findings.ok(match confine::kept_capabilities()? & sys::CAP_DAC_READ_SEARCH {
                0 => "CAP_NET_ADMIN is in effect, and the one capability that run keeps",
                _ => "CAP_NET_ADMIN is in effect; run keeps that and CAP_DAC_READ_SEARCH",
            });
            features(config, asked, findings.about("kernel-feature"));
            levels(asked, findings.about("cgroup-level"));
        }
    }
    let boxes = boxes(cgroups.as_ref(), asked, findings.about("containers"));
    host(config, core, asked, findings);
    routing(config, asked, findings);
    // with the first container the policy has sections for them
    let with_boxes = config.with_containers().filter(|_| !boxes.is_empty());
    others(with_boxes.as_ref().unwrap_or(config), boxes, asked, findings);
    sysctls(findings.about("sysctl"));
    accounting(config, findings.about("conntrack-accounting"));
    saved_rulesets(findings.about("saved-ruleset"));
    Ok(())
}

/// The configuration to look at the host with, and whether it is wrong; then the default stands in.
fn configuration(options: &Options, findings: &mut Findings) -> Result<(Config, bool)> {
    findings.about("config");
    match options.load(false) {
        Ok(None) => {
            let what = "is absent: the built-in default is used, everything direct";
            findings.ok(format!("{DEFAULT_CONFIG} {what}"));
            Ok((Config::default(), false))
        }
        Ok(Some(config)) => {
            let wrong = refused(options, &[], findings.about("config-owner"));
            findings.about("config");
            let (tproxies, rules) = (config.tproxies.len(), config.rule_lines().count());
            if !wrong {
                let name = options.config_file().display();
                let routes = match config.routes.len() {
                    0 => String::new(),
                    routes => format!(", routes: {routes}"),
                };
                findings.ok(format!("{name}: tproxies: {tproxies}{routes}, rules: {rules}"));
            }
            Ok((config, wrong))
        }
        Err(Error::Usage(problems)) => {
            problems.iter().for_each(|problem| findings.error(problem));
            refused(options, &problems, findings.about("config-owner"));
            Ok((Config::default(), true))
        }
        Err(error) => Err(error),
    }
}

/// Names what `run` would refuse because others could change it, beside what was told already.
fn refused(options: &Options, told: &[String], findings: &mut Findings) -> bool {
    let Err(Error::Usage(problems)) = options.load(true) else {
        return false;
    };
    // a list of addresses that was taken for a configuration has very many
    let told: HashSet<&String> = told.iter().collect();
    let new = problems.iter().filter(|problem| !told.contains(problem));
    new.map(|problem| findings.error(format!("{problem}; run refuses it"))).count() > 0
}

/// Whether the kernel counts levels as `run` does, where that has to be asked for.
fn levels(asked: &mut Asked, findings: &mut Findings) {
    if mount::find_first_namespace() {
        return;
    }
    match asked.kernel().and_then(daemon::levels) {
        Ok(Ok(base)) => {
            findings.ok(format!("the root of our cgroup namespace is level {base} to the kernel"))
        }
        Ok(Err(why)) => findings.warning(format!(
            "{why}: whether rules match in this cgroup namespace depends on the kernel"
        )),
        Err(error) => findings.error(error.to_string()),
    }
}

/// Where cgroup v2 is, and whether all of it can be watched. What is there now is returned.
fn cgroups(config: &Rc<Config>, findings: &mut Findings) -> Option<Cgroups> {
    let mountinfo = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let has_v1 = mount::has_v1(&mountinfo);
    const UNIFIED: &str = "boot with cgroup v2 alone: systemd.unified_cgroup_hierarchy=1 on the \
                           kernel command line (systemd), rc_cgroup_mode=\"unified\" in \
                           /etc/rc.conf (OpenRC), without the package cgroupfs-mount (OpenWrt)";
    let root = match mount::find(config.cgroup_root.as_deref()) {
        Ok(root) => root,
        Err(_) if mount::mounts(&mountinfo).is_empty() && has_v1 => {
            findings.error(format!("only cgroup v1 is mounted; {UNIFIED}"));
            return None;
        }
        Err(_) if !kernel_has_cgroup2() => {
            findings.error(
                "the kernel has no cgroup v2: it needs CONFIG_CGROUPS (on OpenWrt an image built \
                 with KERNEL_CGROUPS, which those for small flash are not)",
            );
            return None;
        }
        Err(error) => {
            findings.error(error.to_string());
            return None;
        }
    };
    let dir = root.dir.display();
    match has_v1 {
        false => findings.ok(format!("cgroup root {dir}, cgroup v2 alone")),
        true => findings.warning(format!(
            "cgroup root {dir}, but cgroup v1 is mounted too: a service is classified only if it \
             has a cgroup of its own in v2; {UNIFIED}"
        )),
    }
    match Cgroups::look(config.clone()) {
        Ok(cgroups) if !cgroups.core.tree().is_empty() => {
            watches(cgroups.core.tree().len(), findings.about("inotify"));
            return Some(cgroups);
        }
        Ok(_) => findings.error(watch::unreadable(&root.dir).to_string()),
        Err(error) => findings.error(error.to_string()),
    }
    None
}

/// What each rule decides now, and what can never decide anything.
fn rules(config: &Config, core: Option<&Core>, findings: &mut Findings) {
    let mut decided = vec![0; config.rules.len()];
    let nodes = core.into_iter().flat_map(|core| core.tree().iter());
    for (_, node) in nodes {
        if let Some(count) = policy::number(config, node.rank).and_then(|n| decided.get_mut(n)) {
            *count += 1;
        }
    }
    let (mut idle, mut decided) = (lint::idle_rules(config).into_iter(), decided.into_iter());
    for line in config.rule_lines() {
        let (place, target) = (line.place(), config.target_name(line.target()));
        let text = format!("{place}: {target} = {}", line.text());
        let (idle, decides) = match line {
            RuleLine::Patterns(rules) => {
                let count: usize = decided.by_ref().take(rules.len()).sum();
                // where all of its patterns are idle, the first reason
                let reasons: Option<Vec<_>> = idle.by_ref().take(rules.len()).collect();
                let why = reasons.and_then(|all| all.into_iter().next());
                (why, format!("decides for {count} cgroups"))
            }
            RuleLine::Owners(rule) => {
                let owners: Vec<String> = rule.owners.iter().map(Owner::to_string).collect();
                let decides = format!("decides for sockets of {}", owners.join(", "));
                (lint::idle_owners(config, rule), decides)
            }
        };
        match idle {
            Some(why) => findings.warning(format!("{text}: can match nothing: {why}")),
            None if core.is_some() => findings.ok(format!("{text}: {decides}")),
            None => {}
        }
    }
}

/// Below which cgroups each `hold` line holds, and what holds nothing.
fn holds(config: &Config, core: Option<&Core>, findings: &mut Findings) {
    for line in &config.holds {
        let text = format!("{}: hold = {}", line.place, line.pattern);
        if let Some(why) = lint::idle_hold(config, line) {
            findings.warning(format!("{text}: can match nothing: {why}"));
            continue;
        }
        let Some(core) = core else { continue };
        let is = |path: &[u8]| {
            let path = if path.is_empty() { &b"/"[..] } else { path };
            line.regex.is_match(&String::from_utf8_lossy(path))
        };
        let all = core.tree();
        let held = |at: &Index| all.path(*at).is_some_and(|path| is(path));
        let held: Vec<Index> = all.indices().filter(held).collect();
        let below = held.iter().filter(|at| all.children(**at).next().is_some());
        match (held.len(), below.count()) {
            (0, _) => findings.warning(format!(
                "{text}: no such cgroup is there: what is born in one before cgtproxy has seen it \
                 is not held, so hold one above it that is always there"
            )),
            (_, 0) => findings.warning(format!(
                "{text}: nothing is below what it matches: it holds what is born there later, not \
                 the cgroup itself, for which one above it is to be held"
            )),
            (all, _) if held[0] == tree::ROOT && !core.names_root() => findings.warning(format!(
                "{text}: the root of a cgroup namespace cannot be held, so what is born right below \
                 it is not; {} others are", all - 1
            )),
            (all, _) => findings.ok(format!("{text}: holds what is born below {all} cgroups")),
        }
    }
}

/// By proc_filesystems(5); taken for granted where that cannot be read.
fn kernel_has_cgroup2() -> bool {
    fs::read_to_string("/proc/filesystems").map_or(true, |text| text.contains("\tcgroup2\n"))
}

/// The limits of inotify against the number of cgroups, of which each takes a watch.
fn watches(cgroups: usize, findings: &mut Findings) {
    if let Err(errno) = watch::inotify() {
        let why = reason(errno);
        findings.error(format!(
            "unable to make an inotify instance: {why}; raise the sysctl \
             fs.inotify.max_user_instances"
        ));
    }
    let Some(limit) = sysctl("fs/inotify/max_user_watches") else {
        return findings.error("inotify is not there: the kernel needs CONFIG_INOTIFY_USER");
    };
    let name = "fs.inotify.max_user_watches";
    let found = format!("{cgroups} cgroups, and {name} is {limit}");
    match cgroups as u64 {
        // run looks at the rest every few seconds
        n if n > limit => findings.warning(format!("{found}: raise it")),
        n if n > limit / 2 => {
            findings.warning(format!("{found}: raise it, others need watches too"))
        }
        _ => findings.ok(found),
    }
}

/// Before Linux 5.15, a socket could either tell its net_cls class and net_prio priority, or its
/// cgroup v2: the first use of those controllers ended classification for good.
fn old_controllers(findings: &mut Findings) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let version = (numbers.next(), numbers.next());
    let (Some(Ok(major)), Some(Ok(minor))) = version else {
        return;
    };
    let controllers = fs::read_to_string("/proc/cgroups").unwrap_or_default();
    let in_use = controllers.lines().filter_map(|line| {
        let (name, rest) = line.split_once('\t')?;
        let hierarchy = rest.split('\t').next()?;
        (["net_cls", "net_prio"].contains(&name) && hierarchy != "0").then_some(name)
    });
    let in_use: Vec<&str> = in_use.collect();
    if (major, minor) < (5, 15) && !in_use.is_empty() {
        findings.error(format!(
            "{} of cgroup v1 in use: before Linux 5.15 (this is {major}.{minor}) that ends cgroup \
             v2 matching; boot with cgroup_no_v1=net_cls,net_prio",
            in_use.join(" and ")
        ));
    }
}

/// Something that nf_tables must be able to do.
struct Feature {
    name: &'static str,
    probe: Probe,
    /// Whether this configuration needs it.
    needed: bool,
    /// What to have in the kernel, and the package of OpenWrt that has it.
    module: &'static str,
    package: &'static str,
}

fn wanted_features(config: &Config) -> Vec<Feature> {
    let feature =
        |name, probe, needed, module, package| Feature { name, probe, needed, module, package };
    let base = |kind, hook, priority| Probe::Chain(Base { kind, hook, priority });
    let route = base("route", NF_INET_LOCAL_OUT, NF_IP_PRI_MANGLE);
    let nat = base("nat", NF_INET_LOCAL_OUT, NF_IP_PRI_NAT_DST);
    let tproxy = Stmt::Tproxy { family: None, address: None, port: 1 };
    let dnat = Stmt::Dnat(SocketAddr::from(([127, 0, 0, 1], 1)));
    let proxies = !config.tproxies.is_empty();
    let refuses = config.outlets().next().is_some();
    let masquerades = config.routes.iter().any(Route::masquerades);
    let hijacks = config.outlets().any(Outlet::hijacks_dns);
    vec![
        feature(
            "socket cgroupv2",
            Probe::cgroup(1),
            true,
            "nft_socket of Linux 5.13 or later, with CONFIG_SOCK_CGROUP_DATA",
            "kmod-nft-socket",
        ),
        feature("type route", route, true, "nf_tables for inet", "kmod-nft-core"),
        feature("ct mark", Probe::of(&Stmt::CtMarked(1)), true, "nft_ct", "kmod-nft-core"),
        feature("fib", Probe::of(&Stmt::ForeignSource), true, "nft_fib_inet", "kmod-nft-fib"),
        feature("tproxy", Probe::of(&tproxy), proxies, "nft_tproxy", "kmod-nft-tproxy"),
        feature(
            "reject with tcp reset",
            Probe::of(&Stmt::Reset),
            refuses,
            "nft_reject_inet",
            "kmod-nft-core",
        ),
        feature("dnat", Probe::of(&dnat), hijacks, "nft_nat", "kmod-nft-nat"),
        feature("type nat", nat, hijacks || masquerades, "nft_chain_nat", "kmod-nft-nat"),
    ]
}

/// What this kernel's nf_tables can do of what we need.
fn features(config: &Config, asked: &mut Asked, findings: &mut Findings) {
    let features = wanted_features(config);
    let probes: Vec<Probe> = features.iter().map(|f| f.probe.clone()).collect();
    match asked.kernel().and_then(|kernel| kernel.probe(&probes)) {
        Err(error) => findings
            .error(format!("{error}; the kernel needs nf_tables (on OpenWrt: kmod-nft-core)")),
        Ok(said) => judge_features(&features, &said, findings),
    }
}

fn judge_features(features: &[Feature], said: &[Option<Errno>], findings: &mut Findings) {
    let mut there = Vec::new();
    for (feature, said) in features.iter().zip(said) {
        let Some(errno) = said else {
            there.push(feature.name);
            continue;
        };
        let (name, module, package) = (feature.name, feature.module, feature.package);
        let why = reason(*errno);
        let text = format!(
            "the kernel has no nft \"{name}\" ({why}): it needs {module} (on OpenWrt: {package})"
        );
        match feature.needed {
            true => findings.error(text),
            false => findings.warning(format!("{text}; this configuration does without")),
        }
    }
    if !there.is_empty() {
        findings.ok(format!("the kernel has nft {}", there.join(", ")));
    }
}

/// What the configuration needs of this host: listeners, resolvers, interfaces.
fn host(config: &Config, core: Option<&Core>, asked: &mut Asked, findings: &mut Findings) {
    let host = Host::look();
    for (about, finding) in faults::of_host(config, &host) {
        findings.about(about);
        match finding {
            Ok(text) => findings.ok(text),
            Err(text) => findings.warning(text),
        }
    }
    if let Some(core) = core {
        let loops = super::loops(config, &host, core, asked.kernel().ok());
        findings.about("loop").warnings(loops);
        findings.about("bound-socket").warnings(faults::bound(config, &host, core));
    }
    let hijacks = config.outlets().any(Outlet::hijacks_dns);
    let names = fs::read_to_string("/etc/nsswitch.conf").unwrap_or_default();
    if hijacks && asks_resolved(&names) {
        findings.about("nsswitch").warning(
            "/etc/nsswitch.conf has \"resolve\" in hosts: applications then ask systemd-resolved \
             by a socket of its own, not by port 53, and dns-hijack does not see it: remove that \
             word, and \"dns\" asks by port 53",
        );
    }
}

/// Containers that rules cover.
fn boxes(cgroups: Option<&Cgroups>, asked: &mut Asked, findings: &mut Findings) -> Vec<Container> {
    let (Some(cgroups), Ok(kernel)) = (cgroups, asked.kernel()) else {
        return Vec::new();
    };
    let all = containers::find(kernel, cgroups);
    if !all.is_empty() {
        if cgroups.core.config().with_containers().is_none() {
            findings.warning(crate::containers::UNCOVERED);
        }
        findings.ok(format!("veths of containers that rules cover: {}", all.len()));
    }
    all
}

/// Whether names are resolved by nss-resolve(8).
fn asks_resolved(nsswitch: &str) -> bool {
    let lines = nsswitch.lines().map(|line| line.split('#').next().unwrap_or(line).trim());
    let mut hosts = lines.filter_map(|line| line.strip_prefix("hosts:"));
    hosts.any(|line| line.split_ascii_whitespace().any(|word| word == "resolve"))
}

/// Ip rules and routes of others that are in the way of ours.
fn routing(config: &Config, asked: &mut Asked, findings: &mut Findings) {
    let mut needs = plan::needs(config);
    if needs.is_empty() {
        return;
    }
    let (mut hindrances, mut evaded) = (SmallSet::default(), SmallSet::default());
    let mut conflicting = SmallSet::default();
    let found = asked.kernel().and_then(|kernel| {
        needs.links = kernel.links_of(&needs);
        findings.about("route");
        needs.ways.iter().for_each(|way| way_out(way, &needs.links, findings));
        for family in Family::BOTH {
            let seen = kernel.seen(family, &needs.tables())?;
            let place = seen.place(&needs, family);
            let before = seen.before(&needs, family, needs.priority);
            evaded.extend(before.iter().map(|other| {
                let marked = needs.marked();
                format!("{other} would take {marked}: run has its own rules before it")
            }));
            hindrances.extend(seen.hindrances(&needs, family, place));
            conflicting.extend(conflicts(config, &needs, &seen));
        }
        Ok(())
    });
    findings.about("routing");
    if let Err(error) = found {
        return findings.error(error.to_string());
    }
    let (mask, table) = (config.mask, config.route_table);
    hindrances.iter().for_each(|text| findings.error(text));
    findings.warnings(&conflicting);
    if hindrances.is_empty() {
        evaded.iter().for_each(|text| findings.ok(text));
    }
    if conflicting.is_empty() && hindrances.is_empty() {
        let priorities = list(needs.priorities());
        findings.ok(format!(
            "no ip rule or route of others uses mark bits {mask:#x}, table {table} or priority \
             {priorities}"
        ));
    }
}

/// Whether a route leads anywhere now, and answers come back by it.
fn way_out(way: &WayOut, links: &[Link], findings: &mut Findings) {
    let name = way.name;
    let Some(interface) = way.interface() else {
        return;
    };
    for (family, word) in Family::BOTH.map(|family| (family, family.name())) {
        match way.closed(family, links) {
            None => findings.ok(format!("[route {name}]: {interface} takes {word}")),
            Some("no address") => findings.warning(format!(
                "[route {name}]: {interface} has no address of {word}, so {word} is refused: give \
                 it one, or set masquerade = no if others know the way back"
            )),
            Some(why) if family == Family::V4 => findings.warning(format!(
                "[route {name}]: {interface} is {why} now: what would leave by it is refused until \
                 it is up"
            )),
            Some(_) => {}
        }
    }
    if links.iter().any(|l| l.name == interface) && kernel::routing::drops_answers(interface) {
        findings.warning(format!(
            "[route {name}]: rp_filter of {interface} is 1, so the kernel drops answers that come \
             in by it: set net.ipv4.conf.{interface}.src_valid_mark = 1, or \
             net.ipv4.conf.{interface}.rp_filter = 2"
        ));
    }
}

/// The priorities of our rules, which stand one behind the other.
fn list(priorities: std::ops::Range<u32>) -> String {
    match priorities.len() {
        0 | 1 => priorities.start.to_string(),
        _ => format!("{} to {}", priorities.start, priorities.end - 1),
    }
}

/// What others use of the numbers that the configuration names.
fn conflicts(config: &Config, needs: &Needs, seen: &SeenRouting) -> Vec<String> {
    let mut found = Vec::new();
    let (mask, table) = (config.mask, config.route_table);
    let uses_table = |other: &dyn std::fmt::Display| {
        format!("route-table {table} is used by others ({other}): set another route-table")
    };
    let routes = seen.routes.iter().filter(|other| !other.is_ours());
    found.extend(routes.map(|other| uses_table(other)));
    for other in seen.rules.iter().filter(|other| !other.is_ours()) {
        let rule = &other.rule;
        if other.asks_for_bits(mask) {
            found.push(format!(
                "bits of fwmark-mask {mask:#x} are used by others ({other}): set another \
                 fwmark-mask"
            ));
        }
        let priorities = needs.priorities();
        if priorities.contains(&rule.priority) {
            found.push(format!(
                "rule-priority {} is used by others ({other}): set another rule-priority",
                list(priorities)
            ));
        }
        if rule.action == FibAction::Lookup(table) {
            found.push(uses_table(other));
        }
    }
    found
}

/// A table of others with the name of ours, and chains that break what goes to a tproxy.
fn others(config: &Config, boxes: Vec<Container>, asked: &mut Asked, findings: &mut Findings) {
    if !sys::has_net_admin() {
        return;
    }
    findings.about("foreign-table");
    let owner = asked.kernel().and_then(|kernel| match instance::holder(kernel)? {
        None => Ok(kernel.table_owner()?.flatten()),
        Some(_) => Ok(None),
    });
    let rules = asked.kernel().and_then(Kernel::rules);
    if let Ok(Some(owner)) = owner {
        findings.error(format!(
            "table inet {TABLE} is owned by another process (netlink port {owner}), so run does \
             not start: end that process"
        ));
    } else if rules.is_ok_and(|rules| view::View::of(&rules).foreign) {
        findings.warning(format!("{}: run replaces it", view::FOREIGN));
    }
    if config.tproxies.is_empty() && !config.has_containers() {
        return;
    }
    findings.about("foreign-chain");
    let ours = Ours::of(config).entered_by(boxes.into_iter().flat_map(Container::interfaces));
    match asked.kernel().and_then(|kernel| kernel.others(&ours)) {
        Ok(found) => findings.warnings(found),
        Err(error) => findings.warning(error.to_string()),
    }
}

/// Settings of the network stack that break TPROXY.
fn sysctls(findings: &mut Findings) {
    let mut marked = Vec::new();
    for entry in fs::read_dir("/proc/sys/net/ipv4/conf").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let on = sysctl(&format!("net/ipv4/conf/{name}/src_valid_mark")) == Some(1);
        marked.extend(on.then_some(name));
    }
    marked.sort_unstable();
    if !marked.is_empty() {
        findings.ok(format!(
            "net.ipv4.conf.{}.src_valid_mark is 1 (Tailscale and wg-quick set it): cgtproxy's ip \
             rules allow for that; other ip rules that look for a TPROXY mark, without iif, would \
             make routed packets martians",
            marked.join(", ")
        ));
    }
    if !kernel::routing::ipv6_is_on() {
        findings.ok("IPv6 is off on lo: IPv4 alone is routed to the proxies");
    }
}

/// Whether `status --watch` can tell what comes back.
fn accounting(config: &Config, findings: &mut Findings) {
    let known = Path::new("/proc/sys/net/netfilter/nf_conntrack_acct").exists();
    if known && !config.tproxies.is_empty() && !kernel::sockets::conntrack_counts() {
        findings.ok(
            "net.netfilter.nf_conntrack_acct is 0: status --watch shows what is sent; with 1 it \
             shows what comes back as well",
        );
    }
}

/// Where distributions save and load rulesets: Debian and Arch, Alpine, Fedora, OpenRC.
const SAVED: [&str; 5] = [
    "/etc/nftables.conf",
    "/etc/nftables.nft",
    "/etc/sysconfig/nftables.conf",
    "/var/lib/nftables/rules-save",
    "/var/lib/nftables/nftables.conf",
];
/// Directories of such files: Alpine and OpenWrt, Fedora.
const SAVED_DIRS: [&str; 2] = ["/etc/nftables.d", "/etc/nftables"];

/// A saved cgroup element does not load when its cgroup is not there, and then nothing does.
fn saved_rulesets(findings: &mut Findings) {
    let mut files: Vec<PathBuf> = SAVED.iter().map(PathBuf::from).collect();
    for dir in SAVED_DIRS {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()));
    }
    files.sort_unstable();
    for file in files {
        let is_file = fs::metadata(&file).is_ok_and(|meta| meta.is_file());
        let text = is_file.then(|| fs::read(&file).unwrap_or_default());
        if text.is_some_and(|text| holds_table(&String::from_utf8_lossy(&text))) {
            findings.warning(format!(
                "{} holds table inet {TABLE}: it would not load at boot, when its cgroups are not \
                 there; remove that table from the file, and stop cgtproxy before saving rules",
                file.display()
            ));
        }
    }
}

/// `table inet cgtproxy` outside of comments, however it is spaced.
fn holds_table(script: &str) -> bool {
    let lines = script.lines().map(|line| line.split('#').next().unwrap_or(line));
    let words: Vec<&str> = lines.flat_map(str::split_ascii_whitespace).collect();
    let name = |word: &str| word.trim_end_matches(['{', ';']) == TABLE;
    (words.windows(3)).any(|w| w[0] == "table" && w[1] == "inet" && name(w[2]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{Interface, Mark};
    use crate::netlink::fib::{IpRule, SeenRule, Verb};
    use crate::netlink::msg::Batch;
    use crate::netlink::parse::Messages;
    use crate::route::Entry;

    #[test]
    fn who_resolves_names() {
        for (text, want) in [
            ("passwd: files\nhosts: files resolve [!UNAVAIL=return] dns\n", true),
            ("  hosts:\tfiles dns # resolve\n", false),
            ("networks: resolve\n#hosts: resolve\nhosts: files myhostname dns", false),
            ("", false),
        ] {
            assert_eq!(asks_resolved(text), want, "{text}");
        }
    }

    #[test]
    fn tables_in_scripts() {
        for (script, want) in [
            ("table inet cgtproxy {\n}", true),
            ("table  inet\tcgtproxy{ }", true),
            ("flush ruleset; \ntable inet\n cgtproxy { set a {", true),
            ("# table inet cgtproxy {", false),
            ("table inet cgtproxy2 {", false),
            ("table ip cgtproxy {", false),
        ] {
            assert_eq!(holds_table(script), want, "{script}");
        }
    }

    #[test]
    fn conflicts_are_of_bits_priority_and_table() {
        let interface = Interface { name: "br-".into(), prefix: true };
        let config = Config::default();
        let mut needs = plan::needs(&config);
        needs.forwarded.interfaces = vec![&interface];
        let count = |priority, value, mask, table| {
            let mut batch = Batch::new(0);
            let mark = Mark { value, mask };
            let (family, iif) = (Family::V4, String::new());
            let rule = IpRule { family, priority, iif, mark, action: FibAction::Lookup(table) };
            Entry::Rule(rule).encode(&mut batch, Verb::Add);
            // of another protocol
            let mut bytes = batch.bytes().to_vec();
            let at = bytes.len() - 4;
            bytes[at] = 3;
            let rules = Messages::new(&bytes).filter_map(|m| SeenRule::read(&m)).collect();
            conflicts(&config, &needs, &SeenRouting { rules, routes: Vec::new() }).len()
        };
        assert_eq!(count(32766, 0, 0, 254), 0);
        assert_eq!(count(5210, 0x8_0000, 0xff_0000, 52), 0);
        assert_eq!(count(5210, 0x1, u32::MAX, 52), 0, "needs our bits zero");
        assert_eq!(count(5210, 0x0100_0001, u32::MAX, 52), 1);
        assert_eq!(count(5210, 0, 0x0100_0000, 52), 1);
        assert_eq!(count(100, 0, 0, 254), 1);
        assert_eq!(count(102, 0, 0, 254), 1);
        assert_eq!(count(103, 0, 0, 254), 0);
        assert_eq!(count(100, 0x0100_0000, 0xff00_0000, 300), 3);
    }

    #[test]
    fn a_missing_feature_counts_as_the_configuration_needs_it() {
        let config = Config::default();
        let features = wanted_features(&config);
        let judge = |missing: &str| {
            let said = features.iter().map(|f| (f.name == missing).then_some(Errno::ENOENT));
            let mut findings = Findings::default();
            judge_features(&features, &said.collect::<Vec<_>>(), &mut findings);
            findings.text(Audience::Person)
        };
        let text = judge("socket cgroupv2");
        assert!(text.contains("error: the kernel has no nft \"socket cgroupv2\""), "{text}");
        assert!(text.contains("kmod-nft-socket"), "{text}");
        let text = judge("tproxy");
        assert!(text.contains("\nwarning: "), "{text}");
        assert!(text.contains("kmod-nft-tproxy"), "{text}");
        assert!(judge("nothing").starts_with("ok: the kernel has nft socket cgroupv2, type route"));
    }
}
