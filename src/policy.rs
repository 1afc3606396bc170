//! Which target a cgroup has: ranks of paths, targets of ranks. Pure.
//!
//! Rules are numbered in file order, and `default` is number n. A path's rank is the number of the
//! first rule whose regex full-matches that path or a prefix of it that ends at a component
//! boundary. By induction: rank(root) = n; rank(child) is the smallest i below rank(parent) whose
//! regex matches the child's path, else rank(parent). So a rule is tried only where it could win.

use crate::config::{Config, Target};

/// Number of the deciding rule; the number of rules stands for `default`.
pub type Rank = u32;

/// The rank of the root cgroup.
pub fn root_rank(config: &Config) -> Rank {
    config.rules.len() as Rank
}

/// The rank of `path` (bytes from the cgroup root, with a leading slash) under a parent of rank
/// `parent`. Invalid UTF-8 matches as U+FFFD.
pub fn rank(config: &Config, parent: Rank, path: &[u8]) -> Rank {
    let text = String::from_utf8_lossy(path);
    let before = &config.rules[..(parent as usize).min(config.rules.len())];
    before
        .iter()
        .position(|rule| rule.regex.is_match(&text))
        .map_or(parent, |i| i as Rank)
}

/// The target that a rank stands for.
pub fn target(config: &Config, rank: Rank) -> Target {
    config
        .rules
        .get(rank as usize)
        .map_or(config.default, |rule| rule.target)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{compile, Place, Rule};
    use crate::testing::Random;
    use std::rc::Rc;

    fn config(rules: &[(Target, String)], default: Target) -> Config {
        let place = Place {
            file: Rc::new("test".into()),
            line: 1,
        };
        let rules = (rules.iter())
            .map(|(target, pattern)| Rule {
                target: *target,
                pattern: pattern.clone(),
                regex: compile(pattern).unwrap(),
                place: place.clone(),
            })
            .collect();
        Config {
            rules,
            default,
            ..Config::default()
        }
    }

    /// The manual's definition, word for word.
    fn naive(config: &Config, path: &str) -> Target {
        let ends = path
            .match_indices('/')
            .map(|(at, _)| at)
            .skip(1)
            .chain([path.len()]);
        let prefixes: Vec<&str> = ends.map(|end| &path[..end]).collect();
        (config.rules.iter())
            .find(|rule| prefixes.iter().any(|prefix| rule.regex.is_match(prefix)))
            .map_or(config.default, |rule| rule.target)
    }

    fn by_rank(config: &Config, path: &str) -> Target {
        let ends = path
            .match_indices('/')
            .map(|(at, _)| at)
            .skip(1)
            .chain([path.len()]);
        let rank = ends.fold(root_rank(config), |parent, end| {
            super::rank(config, parent, path[..end].as_bytes())
        });
        target(config, rank)
    }

    #[test]
    fn ranks_are_the_naive_definition() {
        let mut random = Random::new(1);
        let names = ["a", "b", "ab", "a.b", "a-b", "services", "x"];
        let atoms = [
            "/a",
            "/b",
            "/ab",
            "/[ab]",
            "/a.b",
            "/.*",
            "(/a|/b)*",
            "/x?",
            "/services",
            "b",
        ];
        let targets = [
            Target::Direct,
            Target::Drop,
            Target::Tproxy(0),
            Target::Tproxy(1),
        ];
        let mut verdicts = std::collections::BTreeMap::new();
        for _ in 0..3000 {
            let rules: Vec<_> = (0..random.below(6))
                .map(|_| {
                    let atoms = (0..1 + random.below(4)).map(|_| *random.pick(&atoms));
                    (Target::Direct, atoms.collect::<String>())
                })
                .collect();
            let rules: Vec<_> = rules
                .into_iter()
                .map(|(_, p)| (*random.pick(&targets), p))
                .collect();
            let config = config(&rules, *random.pick(&targets));
            for _ in 0..20 {
                let path: String = (0..1 + random.below(5))
                    .map(|_| format!("/{}", random.pick(&names)))
                    .collect();
                let want = naive(&config, &path);
                assert_eq!(by_rank(&config, &path), want, "{path} under {rules:?}");
                *verdicts.entry(want).or_insert(0) += 1;
            }
        }
        assert!(
            verdicts.len() == 4 && verdicts.values().all(|n| *n > 2000),
            "{verdicts:?}"
        );
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
        assert_eq!(rank(&config, 1, b"/a\xffb"), 0);
        assert_eq!(rank(&config, 1, b"/a\xff\xffb"), 1);
    }

    #[test]
    fn no_regex_runs_under_rank_zero() {
        let config = config(
            &[(Target::Drop, "/a".into()), (Target::Direct, "/a/b".into())],
            Target::Direct,
        );
        assert_eq!(rank(&config, 0, b"/a/b"), 0);
    }
}
