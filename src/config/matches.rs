//! Matches that are not a regex: `service:NAME` and `app:ID` to the patterns of the paths that init
//! systems and desktops give these, `user:NAME` and `group:NAME` to numbers. Pure.
//! Sources: procd's and OpenRC's cgroups, systemd.unit(5), systemd's cg_escape(),
//! systemd.io/DESKTOP_ENVIRONMENTS, flatpak's and snapd's transient scopes; the tests have the names
//! that they make.

use std::path::Path;

use super::model::Source;
use super::suggest::did_you_mean;
use super::value::Result;
use crate::net::Owner;

/// What a rule's value stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Match {
    Patterns(Vec<String>),
    Owners(Vec<Owner>),
}

/// What a name becomes.
type Of = fn(&str, &dyn Source) -> Result<Match>;

/// The words that may stand before the colon.
const WORDS: [(&str, Of); 4] =
    [("service", service), ("app", app), ("user", user), ("group", group)];

/// What a rule's value stands for: itself, where it is a regex.
///
/// Errors: what is wrong with a word or a name.
pub(super) fn read(value: &str, source: &dyn Source) -> Result<Match> {
    // no path begins so, hence no regex that matches one
    let Some((word, names)) = value.split_once(':').filter(|(word, _)| is_word(word)) else {
        return Ok(Match::Patterns(vec![value.to_string()]));
    };
    let Some((_, of)) = WORDS.iter().find(|(known, _)| *known == word) else {
        let hint = did_you_mean(word, WORDS.map(|(word, _)| word), |word| format!("\"{word}:\""));
        return Err(format!("unknown match \"{word}:\"{hint}"));
    };
    let names = names.split(',').map(|name| match name.trim() {
        "" => Err(format!("\"{word}:\" needs a name: \"{value}\"")),
        name if name.contains('/') => Err(format!("a name has no \"/\": \"{name}\"")),
        name => of(name, source),
    });
    let (mut patterns, mut owners, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
    for found in names {
        match found {
            Ok(Match::Patterns(more)) => patterns.extend(more),
            Ok(Match::Owners(more)) => owners.extend(more),
            Err(why) => wrong.push(why),
        }
    }
    match (wrong.is_empty(), owners.is_empty()) {
        (false, _) => Err(wrong.join("; ")),
        (true, false) => Ok(Match::Owners(owners)),
        (true, true) => Ok(Match::Patterns(patterns)),
    }
}

/// The patterns of a value that names no users.
///
/// Errors: as of [`read`].
pub(super) fn patterns(value: &str) -> Result<Vec<String>> {
    match read(value, &Nobody)? {
        Match::Patterns(patterns) => Ok(patterns),
        Match::Owners(_) => Ok(Vec::new()),
    }
}

/// Where there are no users, nor anything else.
struct Nobody;

impl Source for Nobody {
    fn read(&self, _: &Path) -> Result<String> {
        Ok(String::new())
    }
}

fn is_word(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
}

/// Two patterns, so that each begins with as much literal text as there is.
fn service(name: &str, _: &dyn Source) -> Result<Match> {
    for suffix in [".service", ".slice", ".scope", ".socket"] {
        if let Some(short) = name.strip_suffix(suffix) {
            return Err(format!("a service's name has no \"{suffix}\": \"{name}\", write {short}"));
        }
    }
    // `/NAME` is OpenRC's before 0.53; procd has all of its services in /services
    let mark = if name == "services" { "" } else { "?" };
    let unit = unit(name);
    let instances = if name.contains('@') { "" } else { "(?:@[^/]*)?" };
    let prefix = cgroup_prefix(&unit);
    let unit = quote(&unit);
    Ok(Match::Patterns(vec![
        format!(r"/(?:services/|openrc\.){mark}{}", quote(name)),
        format!(r"/system\.slice/(?:[^/]+/)*{prefix}{unit}{instances}\.service"),
    ]))
}

/// The name of a service's unit, without what tells its type: it may hold a few characters more than
/// systemd-escape(1) leaves alone.
pub(super) fn unit(name: &str) -> String {
    escape(name, |at, c| c.is_ascii_alphanumeric() || ":_@\\-".contains(c) || c == '.' && at > 0)
}

/// One pattern for each way to make the name. In a unit's name a dash parts launcher, ID and random
/// part, since those within them are escaped.
fn app(id: &str, _: &dyn Source) -> Result<Match> {
    let escaped = quote(&escape(id, |at, c| {
        c.is_ascii_alphanumeric() || ":_".contains(c) || c == '.' && at > 0
    }));
    // flatpak's old form and snapd's newer one do not escape a dash
    let either = match quote(id) {
        plain if plain == escaped => plain,
        plain => format!("(?:{plain}|{escaped})"),
    };
    let units = [
        format!(r"apps?-(?:[^/-]+-)?{escaped}(?:-[^/-]+|@[^/]*)?\.(?:scope|service|slice)"),
        // activated by dbus-broker
        format!(r"dbus-[^/-]+-{escaped}@[^/]*\.service"),
        format!(r"flatpak-{either}-[0-9]+\.scope"),
        format!(r"snap\.{either}\.[^/]+\.scope"),
    ];
    let below = |unit| format!(r"/user\.slice/user-[0-9]+\.slice/(?:[^/]+/)*{unit}");
    Ok(Match::Patterns(units.map(below).to_vec()))
}

fn user(name: &str, source: &dyn Source) -> Result<Match> {
    let (first, last) = ids(name, "user", |name| source.uid(name))?;
    Ok(Match::Owners(vec![Owner::Users(first, last)]))
}

fn group(name: &str, source: &dyn Source) -> Result<Match> {
    let (first, last) = ids(name, "group", |name| source.gid(name))?;
    Ok(Match::Owners(vec![Owner::Groups(first, last)]))
}

/// A number, numbers from one to another, or the number of a name.
fn ids(name: &str, kind: &str, find: impl Fn(&str) -> Option<u32>) -> Result<(u32, u32)> {
    // the last one is nobody's
    const MOST: u32 = u32::MAX - 1;
    let (first, last) = name.split_once('-').unwrap_or((name, name));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    // a name may have a dash
    if !(digits(first) && digits(last)) {
        let id = find(name).ok_or_else(|| format!("no such {kind}: \"{name}\""))?;
        return Ok((id, id));
    }
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last && last <= MOST => Ok((first, last)),
        _ => {
            Err(format!("\"{kind}:\" expects numbers up to {MOST}, the smaller first: \"{name}\""))
        }
    }
}

/// The text with `\xHH` for each byte that is not to stay, as systemd writes it.
fn escape(text: &str, stays: impl Fn(usize, char) -> bool) -> String {
    let mut escaped = String::new();
    for (at, c) in text.char_indices() {
        match stays(at, c) {
            true => escaped.push(c),
            false => {
                let mut bytes = [0; 4];
                let bytes = c.encode_utf8(&mut bytes).bytes();
                escaped.extend(bytes.map(|byte| format!("\\x{byte:02x}")));
            }
        }
    }
    escaped
}

/// What systemd puts before a unit's name that could be the kernel's: one that begins with a dot, an
/// underscore, or the name of a controller and a dot. Which ones there are depends on the kernel.
fn cgroup_prefix(unit: &str) -> &'static str {
    const CONTROLLERS: [&str; 9] =
        ["cgroup", "cpu", "cpuacct", "cpuset", "io", "blkio", "memory", "devices", "pids"];
    // `cpu.service` is one
    let word = unit.split('.').next().unwrap_or_default();
    match unit.starts_with(['.', '_']) || CONTROLLERS.contains(&word) {
        true => "_?",
        false => "",
    }
}

/// The regex that matches a text and nothing else.
pub(super) fn quote(text: &str) -> String {
    let mut quoted = String::new();
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::pattern::compile;

    /// Whether a path or an ancestor of it matches.
    fn covers(value: &str, path: &str) -> bool {
        let patterns = patterns(value).expect(value);
        let patterns: Vec<_> = patterns.iter().map(|p| compile(p).expect(p)).collect();
        let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
        ends.into_iter().any(|end| patterns.iter().any(|p| p.is_match(&path[..end])))
    }

    const USER: &str = "/user.slice/user-1000.slice/user@1000.service";

    #[test]
    fn services_of_each_init_system() {
        for (value, paths) in [
            // procd's instance.c: /services/NAME/INSTANCE
            ("service:aria2", &["/services/aria2", "/services/aria2/instance1"][..]),
            ("service:sing-box", &["/services/sing-box/sing-box.main"]),
            // rc-cgroup.sh of OpenRC: /openrc.NAME since 0.53, /NAME before
            (
                "service:transmission-daemon",
                &["/openrc.transmission-daemon", "/transmission-daemon"],
            ),
            ("service:wg.x", &["/openrc.wg.x"]),
            // systemd.unit(5)
            ("service:nginx", &["/system.slice/nginx.service", "/system.slice/nginx.service/x"]),
            ("service:systemd-timesyncd", &["/system.slice/systemd-timesyncd.service"]),
            (
                "service:getty",
                &[
                    "/system.slice/system-getty.slice/getty@tty1.service",
                    "/system.slice/getty.service",
                ],
            ),
            (
                "service:wg-quick@wg0",
                &[r"/system.slice/system-wg\x2dquick.slice/wg-quick@wg0.service"],
            ),
            // podman's quadlets, and whatever has a slice of its own below system.slice
            ("service:web", &["/system.slice/system-pods.slice/web.service/libpod-payload-1"]),
            // systemd-escape(1) of /dev/disk/a-b
            (
                r"service:fsck@dev-disk-a\x2db",
                &[r"/system.slice/x.slice/fsck@dev-disk-a\x2db.service"],
            ),
            ("service:a b", &[r"/system.slice/a\x20b.service", "/services/a b"]),
            // cg_escape() of systemd: names that could be the kernel's
            ("service:cpu", &["/system.slice/_cpu.service", "/services/cpu"]),
            ("service:memory.x", &["/system.slice/_memory.x.service"]),
            ("service:_x", &["/system.slice/__x.service"]),
            ("service:nikki, mihomo,xray", &["/services/nikki/nikki", "/openrc.xray", "/mihomo"]),
            ("service:services", &["/services/services", "/openrc.services"]),
        ] {
            for path in paths {
                assert!(covers(value, path), "{value} {path}");
            }
        }
        for (value, paths) in [
            (
                "service:nginx",
                &[
                    "/system.slice/nginx-helper.service",
                    "/system.slice/my-nginx.service",
                    "/system.slice/nginx.slice",
                    "/system.slice/nginx.service.d",
                    "/system.slice/_nginx.service",
                    "/services/nginx2",
                    "/services/x/nginx",
                    "/x/nginx",
                    "/openrc.nginx.x",
                    "/openrcxnginx",
                    "/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service",
                    "/x/system.slice/nginx.service",
                    "/machine.slice/a/system.slice/nginx.service",
                ][..],
            ),
            (
                "service:wg-quick@wg0",
                &["/system.slice/wg-quick@wg01.service", "/system.slice/wg-quick@.service"],
            ),
            ("service:a.b", &["/system.slice/axb.service", "/services/axb"]),
            ("service:services", &["/services", "/services/aria2"]),
        ] {
            for path in paths {
                assert!(!covers(value, path), "{value} {path}");
            }
        }
    }

    #[test]
    fn applications_of_each_desktop() {
        for (id, unit) in [
            // systemd.io/DESKTOP_ENVIRONMENTS, "XDG standardization for applications"
            ("org.gnome.Evince", "app-gnome-org.gnome.Evince@12345.service"),
            ("org.telegram.desktop", "app-flatpak-org.telegram.desktop@12345.service"),
            ("org.kde.okular", "app-KDE-org.kde.okular@12345.service"),
            ("org.kde.amarok", "app-org.kde.amarok.service"),
            ("org.gnome.Evince", "app-org.gnome.Evince-12345.scope"),
            ("org.gnome.Evince", "app-gnome-org.gnome.Evince-12345.slice"),
            // the same page before
            ("org.gnome.Evince", "app-gnome-org.gnome.Evince-12345.service"),
            // gnome-shell and gnome-session, by gnome_start_systemd_scope() of gnome-desktop
            ("org.mozilla.firefox", "app-gnome-org.mozilla.firefox-4711.scope"),
            ("firefox", "app-gnome-firefox-123.scope"),
            ("jetbrains-toolbox", r"app-gnome-jetbrains\x2dtoolbox-42.scope"),
            // GNOME applications that dbus-broker starts (its launcher's service.c)
            ("org.gnome.Nautilus", "dbus-:1.2-org.gnome.Nautilus@0.service"),
            // KIO: ScopedProcessRunner and SystemdProcessRunner of kprocessrunner.cpp and systemd/
            ("org.kde.kate", "app-org.kde.kate-c16f78223b3c4371a764a76609ae9ef0.scope"),
            ("org.kde.dolphin", "app-org.kde.dolphin@c16f78223b3c4371a764a76609ae9ef0.service"),
            (
                "libreoffice-calc",
                r"app-libreoffice\x2dcalc@c16f78223b3c4371a764a76609ae9ef0.service",
            ),
            // before the page's name changed, as libksysguard's cgroup.cpp knows it
            ("org.kde.kate", "apps-org.kde.kate-1.scope"),
            // Konsole, for itself
            ("org.kde.konsole", "app-org.kde.konsole-2315830.scope"),
            // systemd-xdg-autostart-generator, since 248 and before
            ("org.kde.discover.notifier", "app-org.kde.discover.notifier@autostart.service"),
            ("org.kde.discover.notifier", "app-org.kde.discover.notifier-autostart.service"),
            ("tracker-miner", r"app-tracker\x2dminer@autostart.service"),
            // the default slice of such instances, systemd.slice(5)
            ("org.kde.kate", r"app-org.kde.kate.slice/x@1.service"),
            // flatpak_run_in_transient_unit() of flatpak, older and newer
            ("org.mozilla.firefox", "flatpak-org.mozilla.firefox-4711.scope"),
            ("com.a-b.C", "flatpak-com.a-b.C-4711.scope"),
            ("org.mozilla.firefox", "app-flatpak-org.mozilla.firefox-4711.scope"),
            ("com.a-b.C", r"app-flatpak-com.a\x2db.C-4711.scope"),
            // snapd's cgroup/tracking.go, older and newer
            ("firefox", "snap.firefox.firefox.0f4e1d2c-1111-2222-3333-444455556666.scope"),
            ("firefox", "snap.firefox.firefox-3dcfaa86-bf58-4d3e-a7c6-4e34dfdb050f.scope"),
            (
                "telegram-desktop",
                "snap.telegram-desktop.telegram-desktop-e44637ac-ec33-42ac-b09e-2fe496512c47.scope",
            ),
            (
                "telegram-desktop",
                r"snap.telegram\x2ddesktop.telegram\x2ddesktop-e44637ac-ec33-42ac-b09e-2fe496512c47.scope",
            ),
            ("firefox", "snap.firefox.hook.configure.0f4e1d2c-1111-2222-3333-444455556666.scope"),
            ("firefox", "snap.firefox.hook.configure-0f4e1d2c-1111-2222-3333-444455556666.scope"),
        ] {
            let value = format!("app:{id}");
            assert!(covers(&value, &format!("{USER}/app.slice/{unit}")), "{id} {unit}");
            assert!(covers(&value, &format!("{USER}/{unit}/below")), "{id} {unit}");
            assert!(
                covers(&format!("app:x,{id}"), &format!("{USER}/x.slice/{unit}")),
                "{id} {unit}"
            );
            // somebody else's tree, or a container's
            for above in [
                "/x",
                "/system.slice",
                "/user.slice",
                "/user.slice/user-x.slice",
                "/x/user.slice/user-1.slice",
            ] {
                assert!(!covers(&value, &format!("{above}/{unit}")), "{above} {id} {unit}");
            }
        }
    }

    #[test]
    fn what_merely_contains_the_id() {
        for (id, unit) in [
            ("firefox", "app-gnome-firefox2-1.scope"),
            ("firefox", "app-gnome-org.mozilla.firefox-1.scope"),
            ("firefox", r"app-gnome-firefox\x2desr-1.scope"),
            ("firefox", "app-firefox.x-1.scope"),
            ("org.mozilla.firefox", "app-org_mozilla_firefox-1.scope"),
            ("gnome", "app-gnome-firefox-1.scope"),
            ("firefox", "app-a-b-firefox-1.scope"),
            ("firefox", "app-gnome-x-firefox.scope"),
            ("firefox", "flatpak-org.mozilla.firefox-1.scope"),
            ("firefox", "flatpak-firefox-x-1.scope"),
            ("firefox", "snap.firefox_2.firefox-1.scope"),
            ("firefox", "snap.x.firefox-1.scope"),
            ("firefox", "dbus-:1.2-org.mozilla.firefox@0.service"),
            ("firefox", "firefox.service"),
            ("firefox", "session-1.scope"),
            ("firefox", "app-firefox-1.scope.d"),
        ] {
            let path = format!("{USER}/app.slice/{unit}");
            assert!(!covers(&format!("app:{id}"), &path), "{id} {unit}");
        }
    }

    #[test]
    fn users_and_groups() {
        let owners = |value| match read(value, &Nobody) {
            Ok(Match::Owners(owners)) => owners,
            other => panic!("{value}: {other:?}"),
        };
        assert_eq!(owners("user:0"), [Owner::Users(0, 0)]);
        assert_eq!(
            owners("group: 5, 7-9 ,4294967294"),
            [Owner::Groups(5, 5), Owner::Groups(7, 9), Owner::Groups(4_294_967_294, 4_294_967_294)]
        );
        for (value, why) in [
            ("user:nobody-1", "no such user: \"nobody-1\""),
            ("group:1-", "no such group: \"1-\""),
            ("group:0x10", "no such group: \"0x10\""),
            // each of several
            ("user:x, 7,y", "no such user: \"x\"; no such user: \"y\""),
        ] {
            assert_eq!(read(value, &Nobody), Err(why.into()));
        }
        for value in ["user:9-7", "user:4294967295", "user:1-99999999999"] {
            assert!(read(value, &Nobody).unwrap_err().contains("the smaller first"), "{value}");
        }
    }

    #[test]
    fn what_is_a_regex_stays_one() {
        for value in
            ["/a:b", "0::/services/x", "(?:a|b):c", ".*:x", "a|/b:c", "a b:c", "x?/:", ":x"]
        {
            assert_eq!(patterns(value).as_deref(), Ok(&[value.to_string()][..]));
        }
    }

    /// Nearly every name comes to an automaton, which is what makes many rules cheap.
    #[test]
    fn long_names_need_no_regex() {
        for value in [
            "app:com.visualstudio.code-oss.and.some.more",
            "service:a-rather-long-name.of-a-service",
        ] {
            for pattern in patterns(value).expect(value) {
                let syntax = super::super::syntax::Syntax::of(&pattern).expect(&pattern);
                assert!(super::super::automaton::Automaton::new(&syntax).is_some(), "{pattern}");
            }
        }
    }
}
