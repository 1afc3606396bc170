//! What to write into `[rules]` for a cgroup that is there: the other way round than
//! [`super::matches`]. Pure.

use std::collections::HashMap;

use super::matches;
use super::pattern::{compile, Pattern};

/// For each of these cgroups a value that decides for it where no line before does: by the name of
/// the service or application where that is all that it covers now, else its path; `None` for the
/// root, which no rule decides for. `all` are the paths of all cgroups that there are.
pub fn propose<'a>(paths: &[&[u8]], all: impl Iterator<Item = &'a [u8]>) -> Vec<Option<String>> {
    let mut named: Vec<Option<Named>> = paths.iter().map(|path| Named::of(path)).collect();
    let mut others: HashMap<String, Vec<usize>> = HashMap::new();
    for (at, service) in named.iter().enumerate() {
        let service = service.as_ref().filter(|named| named.word == "service");
        let keys = service.map(|named| [named.name.clone(), matches::unit(&named.name)]);
        for key in keys.into_iter().flatten() {
            others.entry(key).or_default().push(at);
        }
    }
    let mut wide = Vec::new();
    for path in all.filter(|_| !others.is_empty()) {
        let Ok(path) = std::str::from_utf8(path) else {
            continue;
        };
        let here = keys(path).into_iter().filter_map(|key| others.get(key)).flatten();
        wide.extend(here.copied().filter(|at| {
            named[*at].as_ref().is_some_and(|named| !named.holds(path) && named.matches(path))
        }));
    }
    wide.into_iter().for_each(|at| named[at] = None);
    let value = |(path, named): (&&[u8], Option<Named>)| match (path.is_empty(), named) {
        (true, _) => None,
        (false, Some(named)) => Some(named.value()),
        (false, None) => Some(literal(path)),
    };
    paths.iter().zip(named).map(value).collect()
}

/// A service or application, as the path of a cgroup tells it.
struct Named {
    /// What stands before the colon.
    word: &'static str,
    name: String,
    /// The path of the outermost cgroup that is all its own.
    unit: String,
    patterns: Vec<Pattern>,
}

impl Named {
    fn of(path: &[u8]) -> Option<Named> {
        let path = std::str::from_utf8(path).ok()?;
        let services = service(path).into_iter().flat_map(|(name, end)| {
            // systemd puts an underscore before names that could be the kernel's
            let plain = name.strip_prefix('_').map(String::from);
            plain.into_iter().chain([name]).map(move |name| ("service", name, end))
        });
        let apps = apps(path).map(|(name, end)| ("app", name, end));
        services.chain(apps).find_map(|(word, name, end)| {
            let mut named = Named { word, name, unit: path[..end].into(), patterns: Vec::new() };
            let patterns = matches::patterns(&named.value()).ok()?;
            named.patterns = patterns.iter().filter_map(|p| compile(p).ok()).collect();
            named.matches(&named.unit).then_some(named)
        })
    }

    fn value(&self) -> String {
        format!("{}:{}", self.word, self.name)
    }

    fn matches(&self, path: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern.is_match(path))
    }

    /// Whether a cgroup is the unit or below it.
    fn holds(&self, path: &str) -> bool {
        let below = path.strip_prefix(&*self.unit);
        below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// Every name by which `service:` could match a path, the path itself and not an ancestor.
fn keys(path: &str) -> [&str; 5] {
    let last = path.rsplit('/').next().unwrap_or_default();
    let unit = last.strip_suffix(".service").unwrap_or(last);
    let plain = unit.strip_prefix('_').unwrap_or(unit);
    let template = |unit: &'_ str| unit.find('@').unwrap_or(unit.len());
    let openrc = last.strip_prefix("openrc.").unwrap_or(last);
    [openrc, unit, plain, &unit[..template(unit)], &plain[..template(plain)]]
}

/// The service that a cgroup belongs to, and where the path of its own cgroup ends.
fn service(path: &str) -> Option<(String, usize)> {
    let first = |rest: &str| rest.find('/').unwrap_or(rest.len());
    for above in ["/services/", "/openrc."] {
        if let Some(rest) = path.strip_prefix(above) {
            let end = first(rest);
            return Some((rest[..end].into(), above.len() + end));
        }
    }
    let above = "/system.slice/";
    let mut at = above.len();
    for unit in path.strip_prefix(above)?.split('/') {
        if let Some(name) = unit.strip_suffix(".service") {
            return Some((name.into(), at + unit.len()));
        }
        at += unit.len() + 1;
    }
    None
}

/// The applications that a cgroup may belong to, the innermost first, and where the paths of their
/// own cgroups end.
fn apps(path: &str) -> impl Iterator<Item = (String, usize)> + '_ {
    let is_users = path.starts_with("/user.slice/user-");
    let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
    let ends: Vec<usize> = ends.filter(|_| is_users).collect();
    ends.into_iter().rev().filter_map(|end| {
        let unit = path[..end].rsplit('/').next()?;
        Some((unescape(app(unit)?), end))
    })
}

/// The ID in the name of an application's unit.
fn app(unit: &str) -> Option<&str> {
    let (stem, kind) = unit.rsplit_once('.')?;
    if let Some(rest) = stem.strip_prefix("flatpak-") {
        return rest.rsplit_once('-').map(|(id, _)| id);
    }
    if let Some(rest) = stem.strip_prefix("snap.") {
        return rest.split('.').next();
    }
    let (stem, instance) = match stem.split_once('@') {
        Some((stem, _)) => (stem, true),
        None => (stem, false),
    };
    let parts: Vec<&str> = stem.split('-').collect();
    let is_random = |part: &str| part == "autostart" || part.bytes().all(|b| b.is_ascii_hexdigit());
    match (&parts[..], kind) {
        (["app" | "apps", id], _) => Some(id),
        (["app" | "apps", _, id], _) if instance => Some(id),
        (["app" | "apps", id, _], "scope") => Some(id),
        (["app" | "apps", id, random], _) if is_random(random) => Some(id),
        (["app" | "apps", _, id], _) => Some(id),
        (["app" | "apps", _, id, _], _) => Some(id),
        (["dbus", _, id], _) if instance => Some(id),
        _ => None,
    }
}

/// A text without systemd's `\xHH`; as it is where that would be no UTF-8.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.strip_prefix(b"x").and_then(|hex| std::str::from_utf8(hex.get(..2)?).ok());
        match hex.filter(|_| *first == b'\\').and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.into())
}

/// The regex that matches that path and, but for bytes that are no UTF-8, no other: those match as
/// U+FFFD, whichever they are. It holds nothing that a line of the configuration could not, or that
/// a terminal would act on.
fn literal(path: &[u8]) -> String {
    let mut pattern = String::with_capacity(path.len() + 8);
    for c in String::from_utf8_lossy(path).chars() {
        match c {
            c if c.is_alphanumeric() || c.is_ascii_punctuation() && !"#;&`".contains(c) => {
                pattern += &matches::quote(c.encode_utf8(&mut [0; 4]))
            }
            c => pattern += &format!("\\x{{{:x}}}", u32::from(c)),
        }
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::pattern::compile;
    use crate::testing::Random;

    /// Whether a pattern matches a path, as a rule would.
    fn matches(pattern: &str, path: &[u8]) -> bool {
        let compiled = compile(pattern).unwrap_or_else(|why| panic!("{pattern}: {why}"));
        compiled.is_match(&String::from_utf8_lossy(path))
    }

    fn proposed(path: &str, all: &[&str]) -> String {
        let all = all.iter().chain([&path]).map(|path| path.as_bytes());
        let value = propose(&[path.as_bytes()], all).remove(0);
        value.expect("a value")
    }

    /// Whether a value decides for a path: it matches that or an ancestor.
    fn decides(value: &str, path: &[u8]) -> bool {
        let ends = (1..=path.len()).filter(|end| path.get(*end).is_none_or(|b| *b == b'/'));
        let patterns = matches::patterns(value).expect(value);
        ends.into_iter().any(|end| patterns.iter().any(|p| matches(p, &path[..end])))
    }

    const USER: &str = "/user.slice/user-1000.slice/user@1000.service/app.slice";

    #[test]
    fn names_of_services_and_applications() {
        for (path, want) in [
            ("/services/aria2/instance1", "service:aria2"),
            ("/services/sing-box", "service:sing-box"),
            ("/openrc.transmission-daemon", "service:transmission-daemon"),
            ("/openrc.wg.x/below", "service:wg.x"),
            ("/system.slice/nginx.service", "service:nginx"),
            ("/system.slice/nginx.service/worker", "service:nginx"),
            ("/system.slice/_cpu.service", "service:cpu"),
            ("/system.slice/__x.service", "service:_x"),
            (
                r"/system.slice/system-wg\x2dquick.slice/wg-quick@wg0.service",
                "service:wg-quick@wg0",
            ),
            ("/system.slice/system-getty.slice/getty@tty1.service", "service:getty@tty1"),
            (r"/system.slice/a\x20b.service", r"service:a\x20b"),
            // nothing that a service or an application is
            ("/system.slice/docker-0f3a.scope", r"/system\.slice/docker-0f3a\.scope"),
            ("/docker/0f3a", "/docker/0f3a"),
            ("/system.slice", r"/system\.slice"),
            ("/transmission", "/transmission"),
            ("/services", "/services"),
            (
                "/user.slice/user-0.slice/session-3.scope",
                r"/user\.slice/user-0\.slice/session-3\.scope",
            ),
            ("/x/services/aria2", "/x/services/aria2"),
            ("/machine.slice/libpod-0f.scope", r"/machine\.slice/libpod-0f\.scope"),
            // a comma parts names
            ("/services/a,b", "/services/a,b"),
            ("/system.slice/a.service.service", r"/system\.slice/a\.service\.service"),
        ] {
            assert_eq!(proposed(path, &[]), want, "{path}");
            assert!(decides(want, path.as_bytes()), "{path}");
        }
        for (unit, id) in [
            ("app-gnome-org.gnome.Evince@12345.service", "org.gnome.Evince"),
            ("app-flatpak-org.telegram.desktop@12345.service", "org.telegram.desktop"),
            ("app-org.kde.amarok.service", "org.kde.amarok"),
            ("app-org.gnome.Evince-12345.scope", "org.gnome.Evince"),
            ("app-gnome-org.gnome.Evince-12345.slice", "org.gnome.Evince"),
            ("app-gnome-org.gnome.Evince-12345.service", "org.gnome.Evince"),
            ("app-gnome-firefox-123.scope", "firefox"),
            (r"app-gnome-jetbrains\x2dtoolbox-42.scope", "jetbrains-toolbox"),
            ("dbus-:1.2-org.gnome.Nautilus@0.service", "org.gnome.Nautilus"),
            ("app-org.kde.kate-c16f78223b3c4371a764a76609ae9ef0.scope", "org.kde.kate"),
            (
                r"app-libreoffice\x2dcalc@c16f78223b3c4371a764a76609ae9ef0.service",
                "libreoffice-calc",
            ),
            ("apps-org.kde.kate-1.scope", "org.kde.kate"),
            ("app-org.kde.discover.notifier@autostart.service", "org.kde.discover.notifier"),
            ("app-org.kde.discover.notifier-autostart.service", "org.kde.discover.notifier"),
            (r"app-app\x2dorg.kde.okular.slice/app-org.kde.okular@1.service", "org.kde.okular"),
            ("app-org.gnome.Terminal.slice/vte-spawn-1.scope", "org.gnome.Terminal"),
            ("flatpak-org.mozilla.firefox-4711.scope", "org.mozilla.firefox"),
            ("flatpak-com.a-b.C-4711.scope", "com.a-b.C"),
            (r"app-flatpak-com.a\x2db.C-4711.scope", "com.a-b.C"),
            ("snap.firefox.firefox-3dcfaa86-bf58-4d3e-a7c6-4e34dfdb050f.scope", "firefox"),
            (
                "snap.telegram-desktop.telegram-desktop-e44637ac-ec33-42ac-b09e.scope",
                "telegram-desktop",
            ),
            ("snap.firefox.hook.configure.0f4e1d2c-1111-2222-3333-444455556666.scope", "firefox"),
        ] {
            let path = format!("{USER}/{unit}");
            let want = format!("app:{id}");
            assert_eq!(proposed(&path, &[]), want, "{path}");
            let below = format!("{path}/below");
            assert_eq!(proposed(&below, &[]), want, "{below}");
            assert!(decides(&want, below.as_bytes()), "{below}");
            // in nobody else's tree
            let elsewhere = format!("/x/{unit}");
            assert_eq!(proposed(&elsewhere, &[]), literal(elsewhere.as_bytes()));
        }
    }

    #[test]
    fn a_name_that_covers_more_is_not_proposed() {
        let nginx = "/system.slice/nginx.service";
        let path = r"/system\.slice/nginx\.service";
        for (other, want) in [
            ("/services/nginx", path),
            ("/openrc.nginx", path),
            ("/nginx", path),
            ("/system.slice/x.slice/nginx@a.service", path),
            ("/system.slice/nginx2.service", "service:nginx"),
            ("/system.slice/nginx.service/worker", "service:nginx"),
            ("/x/nginx", "service:nginx"),
            ("/system.slice/nginx.slice", "service:nginx"),
        ] {
            assert_eq!(proposed(nginx, &[other]), want, "{other}");
        }
        let cpu = ["/services/cpu", "/system.slice/_cpu.service"];
        assert_eq!(proposed(cpu[0], &cpu), cpu[0]);
        let blank = ["/services/a b", r"/system.slice/a\x20b.service"];
        assert_eq!(proposed(blank[0], &blank), r"/services/a\x{20}b");
        assert_eq!(propose(&[b""], [].into_iter()), [None]);
    }

    /// Whatever a cgroup is called: what is proposed decides for it.
    #[test]
    fn what_is_proposed_decides() {
        let mut random = Random::new(18);
        let pieces = [
            "/",
            "/",
            "/",
            "services",
            "/services/",
            "/openrc.",
            "/system.slice/",
            "nginx",
            ".service",
            ".slice",
            ".scope",
            "@",
            "@a",
            "-",
            r"\x2d",
            r"\x",
            "app-",
            "apps-",
            "flatpak-",
            "snap.",
            "gnome-",
            "dbus-:1.2-",
            "org.mozilla.firefox",
            "-1",
            "_",
            ",",
            " ",
            "user@1000.service",
            "é",
            "?",
            "\n",
            "[",
            "}",
            ":",
            "/user.slice/user-1000.slice/",
            "autostart",
            "cgtproxy",
            "docker-",
            "0f3a",
        ];
        let mut named = 0;
        for _ in 0..5000 {
            let tail: String = (0..1 + random.below(7)).map(|_| *random.pick(&pieces)).collect();
            let names: Vec<&str> = tail.split('/').filter(|name| !name.is_empty()).collect();
            let above = *random.pick(&["", "", "/system.slice", "/services", USER]);
            let path = format!("{above}/{}", names.join("/"));
            // bytes that are no UTF-8, as a name may hold
            let path: Vec<u8> = path.bytes().map(|b| if b == b'?' { 0xff } else { b }).collect();
            if names.is_empty() {
                continue;
            }
            let all: Vec<&[u8]> = vec![b"/services/nginx", &path];
            let value = propose(&[&path], all.into_iter()).remove(0).expect("a value");
            assert!(decides(&value, &path), "{value} {}", path.escape_ascii());
            named += usize::from(value.contains(':') && !value.starts_with('/'));
        }
        assert!((500..4500).contains(&named), "{named}");
    }

    #[test]
    fn a_literal_matches_its_path_alone() {
        for (path, want) in [
            (&b"/services/aria2/instance1"[..], r"/services/aria2/instance1"),
            (br"/user.slice/app-x\x2dy.scope", r"/user\.slice/app-x\\x2dy\.scope"),
            (b"/a b", r"/a\x{20}b"),
            (b"/a ", r"/a\x{20}"),
            (b"/a\n\x1b[0m", r"/a\x{a}\x{1b}\[0m"),
            (b"/a#;&=\"", "/a\\x{23}\\x{3b}\\x{26}=\""),
            (b"/\xff\xfe", r"/\x{fffd}\x{fffd}"),
            ("/grün\u{202e}x".as_bytes(), "/grün\\x{202e}x"),
        ] {
            assert_eq!(literal(path), want);
            assert!(matches(want, path), "{want}");
        }
        let mut random = Random::new(18);
        let bytes: Vec<u8> = (1..=255).collect();
        for _ in 0..3000 {
            let mut name =
                || (0..1 + random.below(12)).map(|_| *random.pick(&bytes)).collect::<Vec<u8>>();
            let (path, other) = ([b"/", &name()[..]].concat(), [b"/", &name()[..]].concat());
            let pattern = literal(&path);
            assert!(matches(&pattern, &path), "{pattern}");
            assert!(!pattern.contains(|c: char| c.is_control() || c.is_whitespace()), "{pattern}");
            let same = String::from_utf8_lossy(&path) == String::from_utf8_lossy(&other);
            assert_eq!(matches(&pattern, &other), same, "{pattern}");
        }
    }
}
