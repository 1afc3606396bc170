//! Which target a cgroup has: ranks of paths, targets of ranks. Pure.
//!
//! Rules are numbered: the built-in ones of `exec` first (`/cgtproxy/TARGET` goes to TARGET, unless
//! a user has made that cgroup to choose his own way), then
//! the configured ones in file order; `default` has the number behind the last. A path's rank is the
//! number of the first rule that matches that path as a whole or a prefix of it that ends at a
//! component boundary. By induction: rank(root) = default's; rank(child) is the smallest i below
//! rank(parent) whose rule matches the child's path, else rank(parent). So a rule is tried only
//! where it could win.

use std::collections::HashMap;

use crate::config::pattern::{Pattern, Standing};
use crate::config::{Config, HoldLine, Outcome, OwnerRule, PatternRule, Target};
use crate::net::Owner;

/// Number of the deciding rule.
pub type Rank = u32;

/// The cgroup, from the cgroup root, below which `exec` makes its own: `/cgtproxy/TARGET/PID`.
pub const EXEC: &str = "/cgtproxy";

/// What decides where sockets' flows go.
#[derive(Debug, Clone, Copy)]
pub enum Decision<'a> {
    /// What such a user sends is left alone.
    BypassUser,
    Owner(&'a OwnerRule),
    /// `/cgtproxy/TARGET` goes to TARGET.
    BuiltIn,
    Pattern(&'a PatternRule),
    Default,
}

/// Whether a path is one that has a target by its name.
pub fn is_of_exec(path: &[u8]) -> bool {
    of_exec(path) == Some(path)
}

/// What of a path has a target by its name.
pub fn of_exec(path: &[u8]) -> Option<&[u8]> {
    let name = path.strip_prefix(EXEC.as_bytes())?.strip_prefix(b"/")?;
    let end = name.iter().position(|b| *b == b'/').unwrap_or(name.len());
    Some(&path[..path.len() - name.len() + end])
}

/// The rank of the root cgroup.
pub fn root_rank(config: &Config) -> Rank {
    first_configured(config) + config.rules.len() as Rank
}

/// The configured rules that could still win under a parent of that rank.
fn before(config: &Config, parent: Rank) -> &[PatternRule] {
    let configured = parent.saturating_sub(first_configured(config)) as usize;
    &config.rules[..configured.min(config.rules.len())]
}

/// A parent's path from here on is remembered: to read it anew for each child costs more.
const LONG: usize = 200;

/// How much is remembered: some 400 KiB.
const MOST: usize = 16 * 1024;

/// What has been found out about paths of one configuration.
#[derive(Debug, Default)]
pub struct Memo {
    rules: Standings,
    holds: Standings,
}

impl Memo {
    /// The rank of `path` (bytes from the cgroup root, with a leading slash) under a parent of rank
    /// `parent`. Invalid UTF-8 matches as U+FFFD. The configuration has to be the same each time. A
    /// `foreign` cgroup has been made by somebody who may not choose a target.
    pub fn rank(&mut self, config: &Config, parent: Rank, path: &[u8], foreign: bool) -> Rank {
        if let Some(rank) = built_in(config, path).filter(|_| !foreign) {
            return rank;
        }
        let won = self.rules.first(before(config, parent), path);
        won.map_or(parent, |i| first_configured(config) + i as Rank)
    }

    /// The `hold` line that matches a path, by its place among all. The cgroup root's is `/` here.
    pub fn hold(&mut self, config: &Config, path: &[u8]) -> Option<usize> {
        self.holds.first(&config.holds, if path.is_empty() { b"/" } else { path })
    }
}

/// Where patterns stand behind long paths: whoever nests cgroups with long names pays for each
/// name once, not for the whole path with each cgroup. Of one list of patterns.
#[derive(Debug, Default)]
struct Standings {
    /// By path: where each pattern stands that could win below.
    by_path: HashMap<Box<[u8]>, Box<[Standing]>>,
    /// Of all of them.
    len: usize,
}

impl Standings {
    /// The place of the first of these patterns that matches a path: of all, or of the first ones.
    fn first(&mut self, patterns: &[impl AsRef<Pattern>], path: &[u8]) -> Option<usize> {
        if patterns.is_empty() {
            return None;
        }
        let text = String::from_utf8_lossy(path);
        let end = path.iter().rposition(|b| *b == b'/').unwrap_or(0);
        match end < LONG {
            true => patterns.iter().position(|pattern| pattern.as_ref().is_match(&text)),
            false => self.first_by_parent(patterns, path, end, &text),
        }
    }

    /// The same, by where they stand behind the parent's path.
    fn first_by_parent(
        &mut self,
        patterns: &[impl AsRef<Pattern>],
        path: &[u8],
        end: usize,
        text: &str,
    ) -> Option<usize> {
        // the slash is no part of a longer character: what is read of a path does not depend on
        // what follows it
        let at = String::from_utf8_lossy(&path[..end]).len();
        let known = self.by_path.get(&path[..end]);
        if known.is_none_or(|known| known.len() < patterns.len()) {
            let above = patterns.iter().map(|p| p.as_ref().stand(&text[..at])).collect();
            self.remember(&path[..end], above);
        }
        let above = self.by_path.get(&path[..end])?;
        let mut here = Vec::with_capacity(patterns.len());
        let mut won = None;
        for (i, (pattern, above)) in patterns.iter().zip(above).enumerate() {
            let pattern = pattern.as_ref();
            let standing = pattern.go_on(*above, text, at);
            if pattern.is_match_from(standing, text, text.len()) {
                won = Some(i);
                break;
            }
            here.push(standing);
        }
        self.remember(path, here);
        won
    }

    /// Below that path these patterns can win, and stand there.
    fn remember(&mut self, path: &[u8], standings: Vec<Standing>) {
        if self.len + standings.len() > MOST {
            *self = Standings::default();
        }
        self.len += standings.len();
        if let Some(old) = self.by_path.insert(path.into(), standings.into()) {
            self.len -= old.len();
        }
    }
}

/// What a rank comes to.
pub fn outcome(config: &Config, rank: Rank) -> Outcome {
    match rank.checked_sub(first_configured(config)) {
        None => config.targets().nth(rank as usize).unwrap_or(config.default).into(),
        Some(i) => config.outcome(i as usize),
    }
}

/// The target that a rank stands for, of sockets that no line for owners covers.
pub fn target(config: &Config, rank: Rank) -> Target {
    outcome(config, rank).target
}

/// Which line decides depends on the owner's group, which is not known.
#[derive(Debug)]
pub struct GroupUnknown;

/// The first of these lines that covers sockets of that owner, as far as is known of him.
pub fn covering<'a, L>(
    lines: impl IntoIterator<Item = &'a L>,
    owners: impl Fn(&'a L) -> &'a [Owner],
    uid: u32,
    gid: Option<u32>,
) -> Result<Option<&'a L>, GroupUnknown> {
    for line in lines {
        let said: Vec<Option<bool>> =
            owners(line).iter().map(|owner| owner.has(uid, gid)).collect();
        if said.contains(&Some(true)) {
            return Ok(Some(line));
        }
        if said.contains(&None) {
            return Err(GroupUnknown);
        }
    }
    Ok(None)
}

/// The same of the lines that come before what is of that class.
fn owner_rule(
    config: &Config,
    class: u16,
    uid: u32,
    gid: Option<u32>,
) -> Result<Option<&OwnerRule>, GroupUnknown> {
    covering(config.owner_rules_before(class), |rule| &rule.owners, uid, gid)
}

/// The target of a socket of that owner in a cgroup of that outcome; `None` where it depends on his
/// group, which is not known.
pub fn target_of(config: &Config, outcome: Outcome, uid: u32, gid: Option<u32>) -> Option<Target> {
    let rule = owner_rule(config, outcome.class, uid, gid).ok()?;
    Some(rule.map_or(outcome.target, |rule| rule.target))
}

/// Where it goes, as if he was in no group that decides: what a bypass-user sends, directly.
pub fn likely_target(config: &Config, outcome: Outcome, uid: u32) -> Target {
    match config.bypass_users.contains(&uid) {
        true => Target::Direct,
        false => target_of(config, outcome, uid, None).unwrap_or(outcome.target),
    }
}

/// What decides for sockets of that owner in a cgroup of that rank, and their target: `None` where that
/// depends on his group, which is not known.
pub fn decision_for(
    config: &Config,
    rank: Rank,
    uid: u32,
    gid: Option<u32>,
) -> (Option<Target>, Decision<'_>) {
    if config.bypass_users.contains(&uid) {
        return (Some(Target::Direct), Decision::BypassUser);
    }
    let outcome = outcome(config, rank);
    match owner_rule(config, outcome.class, uid, gid) {
        Ok(Some(rule)) => (Some(rule.target), Decision::Owner(rule)),
        Ok(None) => (Some(outcome.target), decision(config, rank)),
        Err(GroupUnknown) => (None, decision(config, rank)),
    }
}

/// The rule that a rank stands for, whoever the owner is.
pub fn decision(config: &Config, rank: Rank) -> Decision<'_> {
    match rank.checked_sub(first_configured(config)) {
        None => Decision::BuiltIn,
        Some(i) => (config.rules.get(i as usize)).map_or(Decision::Default, Decision::Pattern),
    }
}

/// The place of that rule among the configured ones.
pub fn number(config: &Config, rank: Rank) -> Option<usize> {
    let index = rank.checked_sub(first_configured(config))? as usize;
    (index < config.rules.len()).then_some(index)
}

/// The ranks of a path and its ancestors, outermost first and without the root, each with the
/// length of its prefix. `foreign` is what [`Memo::rank`] has by that name, of the one that could
/// be a cgroup of `exec`.
pub fn ranks<'a>(
    config: &'a Config,
    path: &'a [u8],
    foreign: bool,
) -> impl Iterator<Item = (usize, Rank)> + 'a {
    let slashes = (1..path.len()).filter(|at| path[*at] == b'/');
    let ends = slashes.chain((!path.is_empty()).then_some(path.len()));
    ends.scan(root_rank(config), move |parent, end| {
        *parent = Memo::default().rank(config, *parent, &path[..end], foreign);
        Some((end, *parent))
    })
}

/// The outermost cgroup above a path that a `hold` line matches, as a path, and that line.
pub fn held_by<'a, 'b>(config: &'a Config, path: &'b [u8]) -> Option<(&'b [u8], &'a HoldLine)> {
    let slashes = (0..path.len()).filter(|at| path[*at] == b'/');
    let mut above = slashes.map(|end| &path[..end]);
    above.find_map(|above| Some((above, &config.holds[Memo::default().hold(config, above)?])))
}

/// The rank of the first configured rule: there is a built-in one for each target.
fn first_configured(config: &Config) -> Rank {
    config.targets().count() as Rank
}

fn built_in(config: &Config, path: &[u8]) -> Option<Rank> {
    let name = path.strip_prefix(EXEC.as_bytes())?.strip_prefix(b"/")?;
    let mut targets = config.targets();
    let index = targets.position(|target| config.target_name(target).as_bytes() == name)?;
    Some(index as Rank)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::pattern::compile;
    use crate::config::{PatternRule, Place};
    use crate::testing::Random;
    use std::rc::Rc;

    fn rank(config: &Config, parent: Rank, path: &[u8]) -> Rank {
        Memo::default().rank(config, parent, path, false)
    }

    fn config(rules: &[(Target, String)], default: Target) -> Config {
        let place = Place { file: Rc::new("test".into()), line: 1 };
        let rules = (rules.iter())
            .map(|(target, pattern)| PatternRule {
                target: *target,
                text: pattern.as_str().into(),
                pattern: pattern.clone(),
                regex: compile(pattern).unwrap(),
                place: place.clone(),
            })
            .collect();
        Config { rules, default, ..Config::default() }
    }

    /// The manual's definition, word for word.
    fn naive(config: &Config, path: &str) -> Target {
        let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
        let prefixes: Vec<&str> = ends.map(|end| &path[..end]).collect();
        (config.rules.iter())
            .find(|rule| prefixes.iter().any(|prefix| rule.regex.is_match(prefix)))
            .map_or(config.default, |rule| rule.target)
    }

    fn by_rank(config: &Config, path: &str) -> Target {
        let last = ranks(config, path.as_bytes(), false).last();
        target(config, last.map_or(root_rank(config), |(_, rank)| rank))
    }

    #[test]
    fn ranks_are_the_naive_definition() {
        let mut random = Random::new(1);
        let names = ["a", "b", "ab", "a.b", "a-b", "services", "x"];
        let atoms =
            ["/a", "/b", "/ab", "/[ab]", "/a.b", "/.*", "(/a|/b)*", "/x?", "/services", "b"];
        let targets = [Target::Direct, Target::Drop, Target::Tproxy(0), Target::Tproxy(1)];
        let mut verdicts = std::collections::BTreeMap::new();
        for _ in 0..3000 {
            let rules: Vec<_> = (0..random.below(6))
                .map(|_| {
                    let atoms = (0..1 + random.below(4)).map(|_| *random.pick(&atoms));
                    (Target::Direct, atoms.collect::<String>())
                })
                .collect();
            let rules: Vec<_> =
                rules.into_iter().map(|(_, p)| (*random.pick(&targets), p)).collect();
            let config = config(&rules, *random.pick(&targets));
            for _ in 0..20 {
                let path: String =
                    (0..1 + random.below(5)).map(|_| format!("/{}", random.pick(&names))).collect();
                let want = naive(&config, &path);
                assert_eq!(by_rank(&config, &path), want, "{path} under {rules:?}");
                *verdicts.entry(want).or_insert(0) += 1;
            }
        }
        assert!(verdicts.len() == 4 && verdicts.values().all(|n| *n > 2000), "{verdicts:?}");
    }

    /// What is remembered of long paths changes no verdict, in whatever order they come.
    #[test]
    fn long_paths_have_the_same_rank() {
        let mut random = Random::new(5);
        let long = ["é".repeat(100), "b".repeat(201), format!("{}\u{fffd}", "c".repeat(90))];
        let names: Vec<&str> = long.iter().map(|s| &s[..]).chain(["d", "e.f"]).collect();
        let atoms = ["/é+", "/b*", "/.*", "/[bc]+", "/d", "c", "(?i)/D", r"/e\.f", "(/.+)?"];
        let mut ranks = std::collections::BTreeMap::new();
        for _ in 0..200 {
            let rules = (0..1 + random.below(6)).map(|_| {
                let atoms = (0..1 + random.below(5)).map(|_| *random.pick(&atoms));
                (Target::Drop, atoms.collect())
            });
            let config = config(&rules.collect::<Vec<_>>(), Target::Direct);
            let mut memo = Memo::default();
            for _ in 0..100 {
                let depth = 1 + random.below(8);
                let path: String =
                    (0..depth).map(|_| format!("/{}", random.pick(&names))).collect();
                // the last character is not UTF-8 but for the model
                let bytes = path.replace('\u{fffd}', "?").into_bytes();
                let bytes: Vec<u8> =
                    bytes.iter().map(|b| if *b == b'?' { 0xc3 } else { *b }).collect();
                let parent = random.below(config.rules.len() + 1) as Rank;
                let parent = root_rank(&config) - parent;
                let text = String::from_utf8_lossy(&bytes);
                let first = before(&config, parent).iter().position(|r| r.regex.is_match(&text));
                let want = first.map_or(parent, |i| first_configured(&config) + i as Rank);
                assert_eq!(memo.rank(&config, parent, &bytes, false), want);
                *ranks.entry(want != parent).or_insert(0) += 1;
            }
        }
        assert!(ranks.values().all(|n| *n > 1000), "{ranks:?}");
    }

    #[test]
    fn what_a_bypass_user_sends_goes_directly() {
        let mut config = config(&[], Target::Drop);
        config.bypass_users.push(7);
        let target = |uid| likely_target(&config, config.default_outcome(), uid);
        assert_eq!([target(6), target(7)], [Target::Drop, Target::Direct]);
    }

    #[test]
    fn a_line_that_covers_a_user_does_so_whatever_his_group() {
        let lines = [[Owner::Groups(8, 8), Owner::Users(7, 7)]];
        let found =
            |uid, gid| covering(&lines, |owners| owners, uid, gid).map(|l| l.is_some()).ok();
        assert_eq!([found(7, None), found(6, None)], [Some(true), None]);
        assert_eq!([found(6, Some(8)), found(6, Some(9))], [Some(true), Some(false)]);
    }

    #[test]
    fn a_rule_covers_its_subtree_and_nothing_beside_it() {
        let config = config(&[(Target::Drop, "/services/mihomo".into())], Target::Direct);
        for (path, want) in [
            ("/services/mihomo", Target::Drop),
            ("/services/mihomo/instance1", Target::Drop),
            ("/services/mihomo/a/b", Target::Drop),
            ("/services/mihomo-helper", Target::Direct),
            ("/x/services/mihomo", Target::Direct),
            ("/services", Target::Direct),
        ] {
            assert_eq!(by_rank(&config, path), want, "{path}");
        }
    }

    #[test]
    fn invalid_utf8_matches_as_the_replacement_character() {
        let config = config(&[(Target::Drop, "/a\u{fffd}b".into())], Target::Direct);
        let root = root_rank(&config);
        assert_eq!(rank(&config, root, b"/a\xffb"), root - 1);
        assert_eq!(rank(&config, root, b"/a\xff\xffb"), root);
    }

    #[test]
    fn no_regex_runs_under_rank_zero() {
        let config =
            config(&[(Target::Drop, "/a".into()), (Target::Direct, "/a/b".into())], Target::Direct);
        let first = rank(&config, root_rank(&config), b"/a");
        assert_eq!(rank(&config, first, b"/a/b"), first);
    }

    #[test]
    fn the_rules_of_exec_are_not_for_others() {
        let config = config(&[(Target::Drop, "/.*".into())], Target::Direct);
        let rank = |foreign| {
            Memo::default().rank(&config, root_rank(&config), b"/cgtproxy/direct", foreign)
        };
        assert_eq!(target(&config, rank(false)), Target::Direct);
        assert_eq!(target(&config, rank(true)), Target::Drop);
        assert!(is_of_exec(b"/cgtproxy/direct") && !is_of_exec(b"/cgtproxy/direct/1"));
        assert!(!is_of_exec(b"/cgtproxy") && !is_of_exec(b"/x/cgtproxy/direct"));
        assert_eq!(of_exec(b"/cgtproxy/direct/1/2"), Some(&b"/cgtproxy/direct"[..]));
    }

    #[test]
    fn the_rules_of_exec_come_first() {
        let config = config(&[(Target::Drop, "/.*".into())], Target::Direct);
        for (path, want) in [
            ("/cgtproxy", Target::Drop),
            ("/cgtproxy/direct", Target::Direct),
            ("/cgtproxy/direct/7/below", Target::Direct),
            ("/cgtproxy/drop/7", Target::Drop),
            ("/cgtproxy/direct-not", Target::Drop),
            ("/cgtproxy/unknown/direct", Target::Drop),
            ("/x/cgtproxy/direct", Target::Drop),
        ] {
            assert_eq!(by_rank(&config, path), want, "{path}");
        }
        let of = |foreign| ranks(&config, b"/cgtproxy/direct/7", foreign).collect::<Vec<_>>();
        assert_eq!(of(false), [(9, 2), (16, 0), (18, 0)]);
        assert_eq!(of(true), [(9, 2), (16, 2), (18, 2)]);
    }
}
