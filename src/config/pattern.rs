//! A rule's pattern: a regex that matches whole paths, behind a test that decides most of them.
//!
//! An attempt of a regex costs 0.2 µs and more, and a new cgroup meets every rule. Nearly every
//! pattern holds literal text that each match must hold too, and to look for that costs a tenth.
//! Many are no more than a path, or a path and `.*` or `.+`: they need no regex at all. Of the rest
//! nearly all become an [`Automaton`], which goes on below a path where it stood there.
//! Pure.

use regex_lite::{Regex, RegexBuilder};

use super::automaton::{Automaton, State};
use super::syntax::Syntax;

/// Bytes of one compiled regex, and of all together.
const MAX_REGEX: usize = 1 << 20;
pub(super) const MAX_COMPILED: usize = 16 << 20;

/// A compiled pattern.
#[derive(Debug, Clone)]
pub struct Pattern {
    literals: Literals,
    matcher: Matcher,
}

#[derive(Debug, Clone)]
enum Matcher {
    Automaton(Automaton),
    /// Anchored at both ends.
    Regex(Regex),
}

/// Where a pattern stands behind the beginning of a text.
#[derive(Debug, Clone, Copy)]
pub struct Standing(Option<State>);

impl Pattern {
    /// How many more characters a text that begins so has to have for the pattern to match it,
    /// whichever they are; `None` where that depends on them.
    pub(super) fn matches_behind(&self, start: &str) -> Option<usize> {
        let Literals { runs, tail: Some(Tail::Any(least)), .. } = &self.literals else {
            return None;
        };
        let rest = start.strip_prefix(runs.first().map_or("", String::as_str))?;
        Some(least.saturating_sub(rest.chars().count()))
    }

    /// Whether the pattern matches all of `text`.
    pub fn is_match(&self, text: &str) -> bool {
        if let Some(matches) = self.literals.decide(text) {
            return matches;
        }
        self.literals.allow(text)
            && match &self.matcher {
                Matcher::Automaton(automaton) => {
                    automaton.read(text).is_some_and(|state| automaton.accepts(state))
                }
                Matcher::Regex(regex) => regex.is_match(text),
            }
    }

    /// Where the pattern stands behind all of `text`.
    pub fn stand(&self, text: &str) -> Standing {
        Standing(match &self.matcher {
            Matcher::Automaton(automaton) => automaton.read(text),
            Matcher::Regex(_) => None,
        })
    }

    /// Where it stands behind all of `text`, given where it stood behind its first `at` bytes.
    pub fn go_on(&self, standing: Standing, text: &str, at: usize) -> Standing {
        match (&self.matcher, standing.0) {
            (Matcher::Automaton(automaton), Some(state)) => {
                Standing(Some(automaton.resume(state, &text[at..])))
            }
            _ => self.stand(text),
        }
    }

    /// Whether the pattern matches all of `text`, given where it stood behind its first `at` bytes.
    pub fn is_match_from(&self, standing: Standing, text: &str, at: usize) -> bool {
        match (&self.matcher, standing.0) {
            (Matcher::Automaton(automaton), Some(state)) => {
                automaton.accepts(automaton.resume(state, &text[at..]))
            }
            _ => self.is_match(text),
        }
    }
}

/// Compiles a rule's pattern, anchored at both ends of the path.
pub fn compile(pattern: &str) -> Result<Pattern, String> {
    compile_within(pattern, &mut { usize::MAX })
}

/// The same, where all patterns together may take so many more bytes: counted repeats take many, and
/// so do the patterns of many names.
pub(super) fn compile_within(pattern: &str, room: &mut usize) -> Result<Pattern, String> {
    // alone first: `a)|(b` must not become legal by the group around it
    if let Err(error) = parse_only(pattern) {
        let at = error_position(pattern, &error);
        return Err(format!("bad pattern at character {at}: {error}: \"{pattern}\""));
    }
    let syntax = Syntax::of(pattern);
    let literals = syntax.as_ref().map(Literals::of).unwrap_or_default();
    let matcher = match syntax.as_ref().and_then(Automaton::new) {
        Some(automaton) => {
            *room = room.saturating_sub(automaton.size());
            if *room == 0 {
                return Err(too_many(pattern));
            }
            Matcher::Automaton(automaton)
        }
        None => Matcher::Regex(regex_within(pattern, room)?),
    };
    Ok(Pattern { literals, matcher })
}

fn too_many(pattern: &str) -> String {
    let most = MAX_COMPILED >> 20;
    format!("the patterns up to here take more than {most} MiB: \"{pattern}\"")
}

/// regex-lite does not tell what it took: the smallest of some limits that is enough.
fn regex_within(pattern: &str, room: &mut usize) -> Result<Regex, String> {
    let mut limit = 16 * 1024;
    loop {
        if limit > *room {
            *room = 0;
            return Err(too_many(pattern));
        }
        match anchored(pattern, limit) {
            Ok(regex) => {
                *room -= limit;
                return Ok(regex);
            }
            Err(error) if limit >= MAX_REGEX => {
                return Err(format!("bad pattern: {error}: \"{pattern}\""))
            }
            Err(_) => limit *= 4,
        }
    }
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

/// Text that every match holds, in this order and without overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Literals {
    pub(super) runs: Vec<String>,
    /// A match begins with the first run.
    pub(super) at_start: bool,
    /// A match ends with the last run.
    pub(super) at_end: bool,
    /// What a match holds behind the one run or none, where that is all there is to the pattern.
    tail: Option<Tail>,
}

/// The end of a pattern that begins with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tail {
    Nothing,
    /// So many characters or more: `.*`, `.+`.
    Any(usize),
}

impl Literals {
    pub(super) fn of(pattern: &Syntax) -> Literals {
        let mut literals = Literals { at_start: true, ..Literals::default() };
        let mut run = String::new();
        for part in pattern.parts() {
            match part.single() {
                Some(c) => run.push(c),
                None => literals.end(&mut run),
            }
        }
        literals.at_end = !run.is_empty();
        literals.end(&mut run);
        literals.tail = match pattern.split().1 {
            [] => Some(Tail::Nothing),
            [last] => last.wildcard().map(Tail::Any),
            _ => None,
        };
        literals
    }

    /// The one text that matches, where the pattern is no more than that.
    pub(super) fn whole(&self) -> Option<&str> {
        let is_all = self.tail == Some(Tail::Nothing);
        self.runs.first().filter(|_| is_all).map(String::as_str)
    }

    /// Whether the pattern matches, where that can be said without the regex.
    fn decide(&self, text: &str) -> Option<bool> {
        let tail = self.tail?;
        let rest = text.strip_prefix(self.runs.first().map_or("", String::as_str));
        Some(rest.is_some_and(|rest| match tail {
            Tail::Nothing => rest.is_empty(),
            // a dot is anything but a line feed
            Tail::Any(least) => !rest.contains('\n') && rest.chars().take(least).count() == least,
        }))
    }

    /// Ends the current run, which something other than literal text follows.
    fn end(&mut self, run: &mut String) {
        match run.is_empty() {
            true => self.at_start &= !self.runs.is_empty(),
            false => self.runs.push(std::mem::take(run)),
        }
    }

    /// False where no match can be.
    fn allow(&self, text: &str) -> bool {
        let mut rest = text;
        let mut runs = &self.runs[..];
        if let ([first, others @ ..], true) = (runs, self.at_start) {
            match rest.strip_prefix(&**first) {
                None => return false,
                // the one run may be the end as well: `/services/name`
                Some(after) if others.is_empty() => return !self.at_end || after.is_empty(),
                Some(after) => (rest, runs) = (after, others),
            }
        }
        if let ([others @ .., last], true) = (runs, self.at_end) {
            match rest.strip_suffix(&**last) {
                None => return false,
                Some(before) => (rest, runs) = (before, others),
            }
        }
        runs.iter().all(|run| match rest.find(&**run) {
            None => false,
            Some(at) => {
                rest = &rest[at + run.len()..];
                true
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn literals(pattern: &str) -> Option<Literals> {
        Syntax::of(pattern).as_ref().map(Literals::of)
    }

    fn of(pattern: &str) -> Option<(Vec<String>, bool, bool)> {
        let held = literals(pattern).filter(|l| !l.runs.is_empty());
        held.map(|l| (l.runs, l.at_start, l.at_end))
    }

    #[test]
    fn literals_of_patterns() {
        for (pattern, runs, at_start, at_end) in [
            ("/services/mihomo", &["/services/mihomo"][..], true, true),
            ("/services/(a|b)", &["/services/"], true, false),
            (r"/a\.b/.*/c\.d.*", &["/a.b/", "/c.d"], true, false),
            (".*/x", &["/x"], false, true),
            ("/ab*c", &["/a", "c"], true, true),
            ("/ab+?c", &["/a", "c"], true, true),
            ("/ab{2,3}c", &["/a", "c"], true, true),
            ("a?/b", &["/b"], false, true),
            (r"/a[]x]b[^\]]c\d", &["/a", "b", "c"], true, false),
            ("/ü+ä", &["/", "ä"], true, true),
        ] {
            let runs = runs.iter().map(|r| r.to_string()).collect();
            assert_eq!(of(pattern), Some((runs, at_start, at_end)), "{pattern}");
        }
        for pattern in
            ["/a|/b", "(?i)/a", "/a(?x: b)", ".*", "", r"/\x41", r"/[[:alpha:]]", "(a)?", r"/a\b"]
        {
            assert_eq!(of(pattern), None, "{pattern}");
        }
    }

    #[test]
    fn plain_patterns_need_no_regex() {
        let tail = |pattern| literals(pattern).and_then(|l| l.tail);
        for pattern in ["/services/mihomo", r"/a\.b", "^/a$", ""] {
            assert_eq!(tail(pattern), Some(Tail::Nothing), "{pattern}");
        }
        assert_eq!(tail("/apps/.+"), Some(Tail::Any(1)));
        for pattern in ["/apps/ü.*", "/a.*?", ".*"] {
            assert_eq!(tail(pattern), Some(Tail::Any(0)), "{pattern}");
        }
        for pattern in ["/a.", "/a.*b", "/ab*", "a?/b", "/a(b)", "/a$b", "/a|/b"] {
            assert_eq!(tail(pattern), None, "{pattern}");
        }
    }

    /// With and without the test in front, random patterns say the same of random texts.
    #[test]
    fn what_is_ruled_out_does_not_match() {
        let atoms = [
            "/",
            "a",
            "b",
            "ab",
            r"\.",
            ".",
            "é",
            "*",
            "+",
            "?",
            "{0}",
            "{1,2}",
            "{2,}",
            "*?",
            "(",
            ")",
            "(?:",
            "(?i)",
            "(?x)",
            "|",
            "[ab]",
            "[^a]",
            "[-b]",
            "[a-b.]",
            r"[^\d/]",
            r"\W",
            r"\s",
            "[]a]",
            r"[\]a]",
            "^",
            "$",
            r"\d",
            r"\z",
            r"\b",
            r"\<",
            "[[:alpha:]]",
            r"\x61",
            " ",
            "#",
        ];
        let letters = ["/", "a", "b", ".", "é", "A", "1", "]", " ", "\n"];
        let mut random = Random::new(3);
        let (mut compiled, mut ruled_out, mut matched, mut decided) = (0, 0, 0, 0);
        let mut automata = 0;
        for _ in 0..60_000 {
            let pattern: String = (0..1 + random.below(6)).map(|_| *random.pick(&atoms)).collect();
            let Ok(with) = compile(&pattern) else {
                continue;
            };
            compiled += 1;
            let regex = anchored(&pattern, usize::MAX).unwrap();
            automata += usize::from(matches!(with.matcher, Matcher::Automaton(_)));
            for _ in 0..12 {
                let text: String = (0..random.below(6)).map(|_| *random.pick(&letters)).collect();
                let matches = regex.is_match(&text);
                assert_eq!(with.is_match(&text), matches, "{pattern:?} {text:?}");
                let ends = text.char_indices().map(|(at, _)| at);
                for at in ends {
                    let standing = with.stand(&text[..at]);
                    let from = with.is_match_from(standing, &text, at);
                    assert_eq!(from, matches, "{pattern:?} {text:?} from {at}");
                    let there = with.go_on(standing, &text, at);
                    assert_eq!(with.is_match_from(there, &text, text.len()), matches);
                }
                matched += usize::from(matches);
                ruled_out += usize::from(!with.literals.allow(&text));
                decided += usize::from(with.literals.decide(&text).is_some());
            }
        }
        let seen = (compiled, automata, matched, ruled_out, decided);
        assert!(automata > 10_000, "{seen:?}");
        assert!(
            compiled > 10_000 && matched > 10_000 && ruled_out > 50_000 && decided > 10_000,
            "{seen:?}"
        );
    }
}
