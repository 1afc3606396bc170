//! `apps`: who talks now, what decides about it, and a line for `[rules]` where nothing but the
//! default does. It asks the kernel for its sockets, which anybody may, and reads files.

use std::collections::HashMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::rc::Rc;
use std::slice::from_ref;

use nix::unistd::{geteuid, Uid, User};

use super::containers::{self, Container};
use super::table::{Column, Rows, Style, Value};
use crate::apps::{self, Holder, Scene, Talker};
use crate::cgroup::core::Core;
use crate::cgroup::follow::Cgroups;
use crate::cgroup::mount::{self, Root};
use crate::cgroup::tree::{Node, Path};
use crate::config::{propose, Config, OwnerRule, PatternRule, Place, Target};
use crate::error::Result;
use crate::host;
use crate::json::Json;
use crate::kernel::sockets::chosen_ports;
use crate::kernel::Kernel;
use crate::options::Options;
use crate::policy::{self, Decision};
use crate::small::SmallSet;
use crate::sys;

/// Of the shape that `--json` prints; documented in cgtproxy(8).
const JSON_VERSION: u64 = 1;
/// How many remote addresses are shown of each.
const REMOTES: usize = 3;
/// How many ports are shown of what listens.
const PORTS: usize = 6;

/// Of those that send to others, and of all in JSON.
const TALKING: [Column; 17] = [
    Column::left("CGROUP").member("cgroup"),
    Column::json("id"),
    Column::json("state"),
    Column::json("tunnel"),
    Column::left("USER").member("user"),
    Column::json("uid"),
    Column::right("FLOWS").member("flows"),
    Column::left("PROTOCOLS").member("protocols"),
    Column::json("listens"),
    Column::json("inbound"),
    Column::json("local"),
    Column::left("TARGET").member("target"),
    Column::json("decides"),
    Column::left("RULE").member("rule"),
    Column::left("REMOTES").member("remotes"),
    Column::json("veth"),
    Column::json("line"),
];
/// Of the others, in text alone.
const QUIET: [Column; 17] = {
    let mut columns = [const { Column::json("") }; 17];
    columns[0] = Column::left("LISTENS, IS ASKED OR IS LOCAL");
    columns[4] = Column::left("USER");
    columns[8] = Column::left("LISTENS");
    columns[9] = Column::right("INBOUND");
    columns[10] = Column::right("LOCAL");
    columns
};

pub fn text(options: &Options) -> Result<ExitCode> {
    print(options, |apps| apps.text(Style::of_stdout()))
}

pub fn json(options: &Options) -> Result<ExitCode> {
    print(options, |apps| format!("{}\n", apps.json()))
}

/// The lines for `[rules]` alone.
pub fn lines(options: &Options) -> Result<ExitCode> {
    print(options, |apps| apps.lines().map(|line| line + "\n").collect())
}

fn print(options: &Options, form: fn(&Apps) -> String) -> Result<ExitCode> {
    let config = Rc::new(options.load_or_default(false)?);
    // the sockets first: of a cgroup that goes meanwhile they would know better than the tree
    let sockets = host::sockets(apps::states)?;
    let scene = Scene {
        addresses: host::addresses().into_iter().collect(),
        chosen: chosen_ports(),
        tunnels: host::tunnels().into_iter().collect(),
    };
    let cgroups = Cgroups::look(config.clone())?;
    let containers = match config.containers {
        true => Kernel::open().map(|mut kernel| containers::find_all(&mut kernel, &cgroups)),
        false => Ok(Vec::new()),
    };
    let Cgroups { core, root, .. } = cgroups;
    let talkers = apps::talkers(&sockets, &scene);
    let apps = Apps::of(&config, &core, &root, talkers, containers.unwrap_or_default());
    super::print(&form(&apps))
}

/// Where the sockets of a holder are.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Whereabouts {
    /// In the cgroup of that path.
    Cgroup(Path),
    /// In one that has been removed.
    Removed,
    /// In one that is not below the cgroup root, or not to be seen.
    Elsewhere,
    Tunnel(String),
    Unknown,
}

/// One cgroup and user, or container.
struct App<'a> {
    home: Whereabouts,
    id: Option<u64>,
    /// Of its sockets; a container's are not known.
    owner: Option<(u32, String)>,
    /// What a container's packets come in by.
    veth: Option<String>,
    talker: Talker,
    /// The name of the target; `None` where that cannot be told.
    target: Option<String>,
    /// `None` of a removed cgroup: what did so before.
    decides: Option<Decision<'a>>,
    /// A line for `[rules]`.
    line: Option<String>,
}

struct Apps<'a> {
    config: &'a Config,
    /// The applications with most flows first.
    all: Vec<App<'a>>,
}

impl<'a> Apps<'a> {
    fn of(
        config: &'a Config,
        core: &Core,
        root: &Root,
        talkers: impl IntoIterator<Item = ((Holder, u32), Talker)>,
        containers: Vec<Container>,
    ) -> Apps<'a> {
        let nodes: HashMap<u64, (&Path, &Node)> =
            core.tree().iter().map(|(path, node)| (node.id, (path, node))).collect();
        // who sees all cgroups knows that what is not there is gone
        let is_whole = root.level == 0 && geteuid().is_root() && mount::find_first_namespace();
        let named = |target: Option<Target>| Some(config.target_name(target?).to_string());
        let default = Some(Decision::Default);
        let mut users = HashMap::new();
        let mut all = Vec::new();
        for ((holder, uid), talker) in talkers {
            let user = users.entry(uid).or_insert_with(|| name(uid)).clone();
            let (id, home, target, decides) = match holder {
                Holder::Cgroup(id) => match nodes.get(&id) {
                    Some((path, node)) => {
                        // the group of a socket is not told
                        let (target, by) = policy::decision_for(config, node.rank, uid, None);
                        (Some(id), Whereabouts::Cgroup(Path::clone(path)), target, Some(by))
                    }
                    None if is_whole && config.bypass_users.contains(&uid) => {
                        let (direct, by) = (Some(Target::Direct), Some(Decision::BypassUser));
                        (Some(id), Whereabouts::Removed, direct, by)
                    }
                    None if is_whole => (Some(id), Whereabouts::Removed, None, None),
                    None => (Some(id), Whereabouts::Elsewhere, None, default),
                },
                Holder::Tunnel(kind) => {
                    (None, Whereabouts::Tunnel(kind), Some(config.default), default)
                }
                Holder::Unknown => (None, Whereabouts::Unknown, None, default),
            };
            let (target, owner) = (named(target), Some((uid, user)));
            all.push(App { home, id, owner, veth: None, talker, target, decides, line: None });
        }
        all.sort_by(|a, b| {
            let key = |app: &App| std::cmp::Reverse(app.talker.flows);
            key(a).cmp(&key(b)).then_with(|| a.path().cmp(&b.path()))
        });
        all.extend(containers.into_iter().filter_map(|container| {
            let node = core.tree().get(&container.cgroup)?;
            Some(App {
                home: Whereabouts::Cgroup(container.cgroup),
                id: Some(node.id),
                owner: None,
                veth: Some(container.veth),
                talker: Talker::default(),
                target: named(Some(container.target)),
                decides: Some(policy::decision(config, node.rank)),
                line: None,
            })
        }));
        let mut apps = Apps { config, all };
        apps.ask_kernel();
        apps.propose(core);
        apps
    }

    /// What becomes of removed cgroups, the table alone knows. Without CAP_NET_ADMIN nobody does.
    fn ask_kernel(&mut self) {
        let unknown = |app: &&mut App| app.decides.is_none();
        let mut unknown = self.all.iter_mut().filter(unknown).peekable();
        if unknown.peek().is_none() || !sys::has_net_admin() {
            return;
        }
        let inventory = Kernel::open().and_then(|mut kernel| kernel.inventory());
        if let Ok(Some(inventory)) = inventory {
            let outcome = inventory.outcomes();
            let owners =
                |class| inventory.view.owners.iter().filter(move |step| step.class <= class);
            let default = (&*inventory.view.default, inventory.view.default_class);
            unknown.for_each(|app| {
                let uid = app.owner.as_ref().map(|(uid, _)| *uid);
                app.target = app.id.zip(uid).and_then(|(id, uid)| {
                    let (target, class) = outcome(id).unwrap_or(default);
                    // the group of a socket is not told
                    let steps = owners(class);
                    let step = policy::covering(steps, |s| from_ref(&s.owner), uid, None).ok()?;
                    Some(step.map_or(target, |step| &step.target).to_string())
                });
            });
        }
    }

    /// Finds lines for those that nothing but the default decides for.
    fn propose(&mut self, core: &Core) {
        let wanted: Vec<usize> = (0..self.all.len())
            .filter(|at| {
                let app = &self.all[*at];
                let decides = matches!(app.decides, Some(Decision::Default));
                decides && app.talks() && app.path().is_some()
            })
            .collect();
        let paths: Vec<&[u8]> =
            wanted.iter().filter_map(|at| self.all[*at].path().map(|path| &**path)).collect();
        let nodes = core.tree().iter().map(|(path, _)| &**path);
        for (at, value) in wanted.into_iter().zip(propose::propose(&paths, nodes)) {
            let target = self.config.target_name(self.other(&self.all[at].talker));
            self.all[at].line = value.map(|value| format!("{target} = {value}"));
        }
    }

    /// What a line sends elsewhere: the first tproxy, but what is one itself, or where everything
    /// goes to one already, directly.
    fn other(&self, talker: &Talker) -> Target {
        let is_proxy = (self.config.tproxies.iter())
            .any(|tproxy| talker.listens.iter().any(|(_, port)| *port == tproxy.port));
        let mut outlets = self.config.targets().filter(|t| self.config.outlet(*t).is_some());
        match self.config.default {
            Target::Direct if !is_proxy => outlets.next().unwrap_or(Target::Direct),
            _ => Target::Direct,
        }
    }

    /// The lines, each once.
    fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let mut told = SmallSet::default();
        let lines = self.all.iter().filter_map(|app| app.line.clone());
        lines.filter(move |line| told.insert(line.clone()))
    }

    /// A row for each application; for those alone that send to others, or that do not.
    fn table(&self, columns: &'static [Column; 17], talk: Option<bool>) -> Rows<17> {
        let is = |app: &&App| talk.is_none_or(|talk| talk == app.talks());
        Rows { columns, rows: self.all.iter().filter(is).map(App::row).collect() }
    }

    fn text(&self, style: Style) -> String {
        let mut out = String::new();
        match self.all.iter().any(App::talks) {
            true => self.table(&TALKING, Some(true)).print(&mut out, style),
            false => out += "nothing sends to others now\n",
        }
        if !self.all.iter().all(App::talks) {
            out.push('\n');
            self.table(&QUIET, Some(false)).print(&mut out, style);
        }
        let mut lines = self.lines().peekable();
        if lines.peek().is_some() {
            out += "\nfor [rules], where the default alone decides:\n\n";
            lines.for_each(|line| {
                let _ = writeln!(out, "    {line}");
            });
        }
        let is_root = |app: &App| app.path().is_some_and(|path| path.is_empty());
        if self.all.iter().any(|app| app.talks() && is_root(app)) {
            out +=
                "\nno rule decides for the root cgroup: start what runs there in one of its own\n";
        }
        out
    }

    fn json(&self) -> Json {
        Json::Object(vec![
            ("version", Json::Number(JSON_VERSION)),
            ("default", Json::text(self.config.target_name(self.config.default))),
            ("apps", self.table(&TALKING, None).json()),
            ("lines", Json::texts(self.lines())),
        ])
    }
}

impl App<'_> {
    /// The path of its cgroup, where that is there.
    fn path(&self) -> Option<&Path> {
        match &self.home {
            Whereabouts::Cgroup(path) => Some(path),
            _ => None,
        }
    }

    /// Whether it sends to others.
    fn talks(&self) -> bool {
        self.talker.flows > 0 || self.veth.is_some()
    }

    fn row(&self) -> [Value; 17] {
        let number = |n: usize| Value::number(Some(n as u64));
        let (state, tunnel) = match &self.home {
            Whereabouts::Cgroup(_) if self.veth.is_some() => ("container", None),
            Whereabouts::Cgroup(_) => ("present", None),
            Whereabouts::Removed => ("removed", None),
            Whereabouts::Elsewhere => ("elsewhere", None),
            Whereabouts::Tunnel(kind) => ("tunnel", Some(kind)),
            Whereabouts::Unknown => ("unknown", None),
        };
        let protocols = self.talker.protocols.iter().map(|l4| l4.nft().to_string());
        let remotes = self.talker.remotes(REMOTES).into_iter().map(|remote| remote.to_string());
        let (decides, rule) = self.decides();
        [
            self.cgroup(),
            Value::number(self.id),
            Value::text(state),
            Value::maybe(tunnel),
            Value::maybe(self.owner.as_ref().map(|(_, user)| user)),
            Value::number(self.owner.as_ref().map(|(uid, _)| *uid)),
            match self.owner {
                Some(_) => number(self.talker.flows),
                None => Value::none(),
            },
            texts(protocols),
            self.listens(),
            number(self.talker.inbound),
            number(self.talker.local),
            Value::maybe(self.target.as_ref()),
            Value::text(decides),
            rule,
            match &self.veth {
                Some(veth) => Value::new(format!("behind {veth}"), Json::List(Vec::new())),
                None => texts(remotes),
            },
            Value::maybe(self.veth.as_ref()),
            Value::maybe(self.line.as_ref()),
        ]
    }

    fn cgroup(&self) -> Value {
        let id = self.id.map_or(String::new(), |id| format!(" (id {id})"));
        let instead = |text: String| Value::new(text, Json::Null);
        match &self.home {
            Whereabouts::Cgroup(path) => Value::path(path),
            Whereabouts::Removed => instead(format!("removed cgroup{id}")),
            Whereabouts::Elsewhere => instead(format!("cgroup not below the root, or hidden{id}")),
            Whereabouts::Tunnel(kind) => instead(format!("{kind} of the kernel, no cgroup")),
            Whereabouts::Unknown => instead("cgroup that the kernel does not tell".into()),
        }
    }

    /// What decides, and by which rule.
    fn decides(&self) -> (&'static str, Value) {
        let (decides, text) = match self.decides {
            Some(
                Decision::Owner(OwnerRule { place: Place { file, line }, text, .. })
                | Decision::Pattern(PatternRule { place: Place { file, line }, text, .. }),
            ) => {
                let name = file.file_name().unwrap_or_default().to_string_lossy();
                let json = Json::Object(vec![
                    ("file", Json::text(file.to_string_lossy())),
                    ("line", Json::or_null(Some(*line))),
                    ("match", Json::text(&**text)),
                ]);
                return ("rule", Value::new(format!("{name}:{line}"), json));
            }
            Some(Decision::BuiltIn) => ("built-in", "built in"),
            Some(Decision::BypassUser) => ("bypass-user", "bypass-user"),
            Some(Decision::Default) => ("default", "default"),
            None => ("before", "as before"),
        };
        (decides, Value::new(text, Json::Null))
    }

    fn listens(&self) -> Value {
        let all = &self.talker.listens;
        let mut text: Vec<String> =
            all.iter().take(PORTS).map(|(l4, port)| format!("{}:{port}", l4.nft())).collect();
        text.extend((all.len() > PORTS).then(|| format!("+{}", all.len() - PORTS)));
        let json = all.iter().map(|(l4, port)| {
            let port = Json::or_null(Some(*port));
            Json::Object(vec![("protocol", Json::text(l4.nft())), ("port", port)])
        });
        Value::new(dashed(text), Json::List(json.collect()))
    }
}

/// One beside the other.
fn texts(all: impl Iterator<Item = String>) -> Value {
    let all: Vec<String> = all.collect();
    let json = Json::texts(&all);
    Value::new(dashed(all), json)
}

fn dashed(all: Vec<String>) -> String {
    match all.is_empty() {
        true => "-".into(),
        false => all.join(" "),
    }
}

/// The name of a user, or the number of one that has none.
fn name(uid: u32) -> String {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name.escape_debug().to_string(),
        _ => uid.to_string(),
    }
}
