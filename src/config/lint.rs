//! Rules that are well-formed and decide for no cgroup: patterns that match no path, and rules that
//! others before them hide. Only what is sure is told. Pure.

use std::collections::HashMap;
use std::path::Path;

use super::pattern::Literals;
use super::syntax::Syntax;
use super::{Config, HoldLine, OwnerRule, PatternRule};
use crate::net::Owner;

/// Most times that a rule is held against an earlier one: their number goes with the square.
const MAX_TRIES: usize = 1_000_000;

/// For each rule, why it decides for no cgroup that there could be; `None` where it may.
pub fn idle_rules(config: &Config) -> Vec<Option<String>> {
    let mut tries = MAX_TRIES;
    let mut first = HashMap::new();
    let reasons = config.rules.iter().enumerate().map(|(index, rule)| {
        let same = *first.entry(&*rule.pattern).or_insert(index);
        let root = config.cgroup_root.as_deref();
        matches_nothing(&rule.pattern, root).or_else(|| {
            let by = match same < index {
                true => config.rules.get(same),
                false => hidden_by(rule, &config.rules[..index], &mut tries),
            };
            by.map(|by| {
                let (place, target) = (&by.place, config.target_name(by.target));
                format!("{place} covers all of it before: {target} = {}", by.text)
            })
        })
    });
    reasons.collect()
}

/// Why a `hold` line matches no cgroup that there could be.
pub fn idle_hold(config: &Config, line: &HoldLine) -> Option<String> {
    // the cgroup root, which no rule covers
    match line.regex.is_match("/") {
        true => None,
        false => matches_nothing(&line.pattern, config.cgroup_root.as_deref()),
    }
}

/// Why a line for owners decides for no socket, where an earlier one covers all of its owners.
pub fn idle_owners(config: &Config, rule: &OwnerRule) -> Option<String> {
    let earlier = config.owner_rules.iter().take_while(|earlier| earlier.place != rule.place);
    let earlier: Vec<&OwnerRule> = earlier.collect();
    let covers = |a: Owner, b: Owner| match (a, b) {
        (Owner::Users(a, z), Owner::Users(first, last))
        | (Owner::Groups(a, z), Owner::Groups(first, last)) => a <= first && last <= z,
        _ => false,
    };
    let covering = rule.owners.iter().map(|owner| {
        earlier.iter().find(|earlier| earlier.owners.iter().any(|other| covers(*other, *owner)))
    });
    let by = covering.collect::<Option<Vec<_>>>()?.into_iter().next()?;
    let target = config.target_name(by.target);
    Some(format!("{} covers all of it before: {target} = {}", by.place, by.text))
}

/// Why no path can match, for what people paste and mistype.
fn matches_nothing(pattern: &str, root: Option<&Path>) -> Option<String> {
    if has_flags(pattern) {
        return None;
    }
    if let Some(at) = [" #", " ;"].iter().find_map(|mark| pattern.find(mark)) {
        let remark = pattern[at..].trim();
        return Some(format!("\"{remark}\" is part of it: a comment needs a line of its own"));
    }
    if let Some(escape) = hex_escape(pattern) {
        return Some(format!(
            "{escape} stands for one character, where a name that systemd has escaped holds these \
             four: write \\{escape}"
        ));
    }
    let plain = pattern.strip_prefix('^').unwrap_or(pattern);
    if plain.starts_with("0::") {
        return Some("leave out the \"0::\" of /proc/PID/cgroup".into());
    }
    let mounts = root.and_then(Path::to_str).into_iter().chain(["/sys/fs/cgroup"]);
    for mount in mounts.filter(|mount| *mount != "/") {
        if plain.strip_prefix(mount).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
            return Some(format!("paths count from the cgroup root: leave out \"{mount}\""));
        }
    }
    // one that may match is enough
    let syntax = Syntax::of(pattern)?;
    let mut reasons = syntax.branches().iter().map(misfit);
    let first = reasons.next()?;
    reasons.all(|reason| reason.is_some()).then_some(first)?
}

/// Why one alternative of a pattern matches no path.
fn misfit(branch: &Syntax) -> Option<String> {
    let literals = Literals::of(branch);
    let (first, last) = (literals.runs.first()?, literals.runs.last()?);
    if literals.whole() == Some("/") {
        Some("no rule covers the root cgroup: what is in it goes to the default".into())
    } else if literals.at_start && !first.starts_with('/') {
        Some("every path begins with \"/\"".into())
    } else if literals.at_end && last.ends_with('/') {
        Some("no path ends with \"/\": leave it out, what is below is covered".into())
    } else if literals.runs.iter().any(|run| run.contains("//")) {
        Some("no path has \"//\" in it".into())
    } else {
        let edge = branch.misplaced_edge()?;
        Some(format!("no path has \"{edge}\" within: the character itself is \\{edge}"))
    }
}

/// The earlier rule that covers whatever this one matches, if there is one for each alternative.
fn hidden_by<'a>(
    rule: &PatternRule,
    earlier: &'a [PatternRule],
    tries: &mut usize,
) -> Option<&'a PatternRule> {
    if has_flags(&rule.pattern) {
        return None;
    }
    let syntax = Syntax::of(&rule.pattern);
    let branches = match &syntax {
        Some(syntax) => syntax.branches().iter().map(Literals::of).collect(),
        None => vec![Literals::default()],
    };
    let mut by = None;
    for literals in branches {
        let covering = earlier.iter().find(|earlier| {
            *tries = tries.saturating_sub(1);
            *tries > 0 && covers(earlier, &literals)
        })?;
        by = by.or(Some(covering));
    }
    by
}

/// Whether a rule covers every path that holds these literals.
fn covers(rule: &PatternRule, literals: &Literals) -> bool {
    // as every path does
    let start = literals.runs.first().filter(|run| literals.at_start && run.starts_with('/'));
    let start = start.map_or("/", String::as_str);
    // and goes on
    let behind = usize::from(start == "/");
    if rule.regex.matches_behind(start).is_some_and(|least| least <= behind) {
        return true;
    }
    let whole = literals.whole().map(|_| start.len());
    let ends = start.match_indices('/').map(|(at, _)| at).chain(whole);
    // an ancestor of all of them
    let mut ancestors = ends.filter(|end| *end > 0).map(|end| &start[..end]);
    ancestors.any(|path| rule.regex.is_match(path))
}

/// Whether flags such as `(?i)` or `(?x)` may change what characters mean.
fn has_flags(pattern: &str) -> bool {
    let groups = pattern.match_indices("(?").map(|(at, open)| &pattern[at + open.len()..]);
    groups.filter(|rest| !rest.starts_with([':', 'P', '<'])).count() > 0
}

/// The first `\xHH` outside of a class, as it is written.
fn hex_escape(pattern: &str) -> Option<&str> {
    let mut escaped = false;
    for (at, c) in pattern.char_indices() {
        match c {
            '[' if !escaped => return None,
            'x' if escaped => {
                let digits = pattern.get(at + 1..at + 3)?;
                let hex = digits.bytes().all(|b| b.is_ascii_hexdigit());
                return hex.then(|| &pattern[at - 1..at + 3]);
            }
            _ => escaped = c == '\\' && !escaped,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::pattern::compile;
    use crate::config::{Place, Target};
    use crate::testing::Random;
    use std::rc::Rc;

    fn config(patterns: &[&str]) -> Config {
        let place = Place { file: Rc::new("c".into()), line: 1 };
        let rule = |pattern: &&str| PatternRule {
            target: Target::Drop,
            text: pattern.to_string().into(),
            pattern: pattern.to_string(),
            regex: compile(pattern).expect("a good pattern"),
            place: place.clone(),
        };
        Config { rules: patterns.iter().map(rule).collect(), ..Config::default() }
    }

    fn why(patterns: &[&str]) -> String {
        idle_rules(&config(patterns)).pop().flatten().unwrap_or_default()
    }

    #[test]
    fn what_matches_no_path() {
        for (pattern, want) in [
            ("services/x", "every path begins with \"/\""),
            ("^user\\.slice/.*", "every path begins with \"/\""),
            ("a|b(c|/d)", "every path begins with \"/\""),
            ("/services/", "no path ends with \"/\""),
            ("/services/(a|b)/$", "no path ends with \"/\""),
            ("/services//x.*", "no path has \"//\""),
            ("foo$bar", "every path begins with \"/\""),
            ("a^|b$c/d", "every path begins with \"/\""),
            ("/a(b|$)c/", "no path ends with \"/\""),
            ("/a$//b", "no path has \"//\""),
            ("/a/session$1", "no path has \"$\" within: the character itself is \\$"),
            ("/a.*^b?", "no path has \"^\" within"),
            ("/", "no rule covers the root cgroup"),
            ("/sys/fs/cgroup/services/x", "leave out \"/sys/fs/cgroup\""),
            ("0::/services/x", "leave out the \"0::\""),
            (r"/a/app-org\x2dx.*", r"write \\x2d"),
            (r"/a\\\x2d", r"write \\x2d"),
            ("/services/x # the first", "\"# the first\" is part of it: a comment needs a line"),
        ] {
            assert!(why(&[pattern]).contains(want), "{pattern}: {}", why(&[pattern]));
        }
        for pattern in [
            "/services/x",
            "services|/x",
            "(services|/x)",
            ".*/x",
            "x?/a",
            "/services/?",
            "/sys/fs/cgroups",
            r"/a\\x2db",
            r"/[\x2d]",
            "(?x)/a # a remark",
            "(?i)/a/",
            "^/a$",
            r"/a\$",
            "/a($)b?",
            "/a$b?",
            "b?^/a",
            "/a(b|$)(c|)",
            "(^|/x)/a",
            "/a$|/b",
            "(?m)/a$b",
            "[]|]",
            "[^]|a/]x",
        ] {
            assert_eq!(why(&[pattern]), "", "{pattern}");
        }
    }

    #[test]
    fn what_others_hide() {
        for patterns in [
            &["/a", "/a"][..],
            &["/a", "/a/b"],
            &["/a", "/a/.*"],
            &["/a", "/a/b|/a/c"],
            &["/a/b", "/a/c", "/a/(x)?b|/a/c", "/a/b/x|/a/c/.*"],
            &["/a.*", "/ab.c"],
            &["/a/.+", "/a/b.*"],
            &["/.*", ".*x"],
            &[r"/s\.slice/.*", r"/s\.slice/x\.service"],
            &["/services/(x|y)", "/services/x/one"],
        ] {
            let hidden = why(patterns);
            assert!(hidden.starts_with("c:1 covers all of it before: drop = /"), "{patterns:?}");
        }
        for patterns in [
            &["/a", "/ab"][..],
            &["/a/b", "/a"],
            &["/a", "/a.*"],
            &["/a", "/a/b|/c"],
            &["/a/.+", "/a/"],
            &["/a/.+", "/a"],
            &["/a.+", "/a.*"],
            &["/a", ".*"],
            &[r"/a\.*", "/a.b"],
        ] {
            assert!(!why(patterns).contains("covers"), "{patterns:?}: {}", why(patterns));
        }
    }

    /// Whatever is said of random rules, no random path proves it wrong.
    #[test]
    fn what_is_said_is_true() {
        let atoms = [
            "/", "/a", "/b", "a", ".", ".*", ".+", "(a|/b)", "(", ")", "|", "?", "*", "[/a]",
            "[]|a]", r"\.", r"\x61", "^", "$", "$", "(?i)", "b", "b?", "//",
        ];
        let names = ["a", "b", "ab", "a.b", "ba", "x"];
        let mut random = Random::new(5);
        let (mut idle, mut used) = (0, 0);
        for _ in 0..20_000 {
            let patterns: Vec<String> = (0..2 + random.below(2))
                .map(|_| (0..1 + random.below(4)).map(|_| *random.pick(&atoms)).collect())
                .filter(|pattern: &String| compile(pattern).is_ok())
                .collect();
            let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
            let config = config(&patterns);
            let said = idle_rules(&config);
            idle += said.iter().flatten().count();
            for _ in 0..10 {
                let path: String =
                    (0..1 + random.below(4)).map(|_| format!("/{}", random.pick(&names))).collect();
                for (_, rank) in crate::policy::ranks(&config, path.as_bytes(), false) {
                    if let crate::policy::Decision::Pattern(rule) =
                        crate::policy::decision(&config, rank)
                    {
                        let at = config.rules.iter().position(|r| std::ptr::eq(r, rule));
                        let at = at.expect("one of them");
                        used += 1;
                        let hex = rule.pattern.contains(r"\x");
                        assert!(said[at].is_none() || hex, "{patterns:?} {at} {path} {said:?}");
                    }
                }
            }
        }
        assert!(idle > 3000 && used > 30_000, "{idle} {used}");
    }
}
