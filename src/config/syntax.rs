//! A pattern as a tree: what of regex-lite's syntax means the same in every mode, of a pattern that is
//! held against a whole text. Pure. Source: regex-lite's syntax.

/// Ranges of characters, both ends included.
pub(super) type Letters = Vec<(char, char)>;

/// A part of a pattern.
pub(super) enum Syntax {
    One(Letters),
    All(Vec<Syntax>),
    Any(Vec<Syntax>),
    Repeat(Box<Syntax>, usize, Option<usize>),
    /// `^` or `$` where a whole text need not begin or end.
    Edge(char),
}

/// Larger numbers in a repeat come to the same: no automaton has so many positions.
const MOST: usize = 1000;

impl Syntax {
    /// Of a pattern that is known to compile. `None` for one with flags or other assertions than `^`
    /// and `$`, and for what is rare.
    pub fn of(pattern: &str) -> Option<Syntax> {
        let mut parser = Parser { chars: pattern.chars().peekable(), depth: 0 };
        let tree = parser.alternatives()?;
        parser.chars.next().is_none().then_some(tree)
    }

    /// The alternatives, outside of groups.
    pub fn branches(&self) -> &[Syntax] {
        match self {
            Syntax::Any(branches) => branches,
            one => std::slice::from_ref(one),
        }
    }

    /// What follows one another.
    pub fn parts(&self) -> &[Syntax] {
        match self {
            Syntax::All(parts) => parts,
            one => std::slice::from_ref(one),
        }
    }

    /// The single characters that it begins with, and the rest.
    pub fn split(&self) -> (String, &[Syntax]) {
        let parts = self.parts();
        let prefix: String = parts.iter().map_while(Syntax::single).collect();
        let rest = &parts[prefix.chars().count()..];
        (prefix, rest)
    }

    /// The one character that it matches.
    pub fn single(&self) -> Option<char> {
        match self {
            Syntax::One(set) => match set[..] {
                [(first, last)] if first == last => Some(first),
                _ => None,
            },
            _ => None,
        }
    }

    /// A `^` behind a character, or a `$` before one: no text has that.
    pub fn misplaced_edge(&self) -> Option<char> {
        let parts = self.parts();
        parts.iter().enumerate().find_map(|(at, part)| {
            let (edge, beyond) = match part {
                Syntax::Edge('^') => ('^', &parts[..at]),
                Syntax::Edge(edge) => (*edge, &parts[at..]),
                _ => return None,
            };
            beyond.iter().any(|part| part.single().is_some()).then_some(edge)
        })
    }

    /// Of `.*` and the like, how many characters it matches at least.
    pub fn wildcard(&self) -> Option<usize> {
        match self {
            Syntax::Repeat(what, least, None) => match &**what {
                Syntax::One(set) if *set == dot() => Some(*least),
                _ => None,
            },
            _ => None,
        }
    }
}

struct Parser<'a> {
    chars: std::iter::Peekable<std::str::Chars<'a>>,
    depth: usize,
}

impl Parser<'_> {
    fn alternatives(&mut self) -> Option<Syntax> {
        let mut all = vec![self.sequence()?];
        while self.chars.next_if_eq(&'|').is_some() {
            all.push(self.sequence()?);
        }
        match all.len() {
            1 => all.pop(),
            _ => Some(Syntax::Any(all)),
        }
    }

    fn sequence(&mut self) -> Option<Syntax> {
        let mut parts = Vec::new();
        while let Some(c) = self.chars.next_if(|c| !matches!(c, '|' | ')')) {
            let part = match c {
                '(' => self.group()?,
                '[' => Syntax::One(self.class()?),
                '.' => Syntax::One(dot()),
                '\\' => Syntax::One(self.escape()?),
                // a whole text begins and ends there anyway
                '^' if self.depth == 0 && parts.is_empty() => continue,
                '$' if self.depth == 0 && matches!(self.chars.peek(), None | Some('|')) => continue,
                '^' | '$' => Syntax::Edge(c),
                '*' => repeat(parts.pop()?, 0, None),
                '+' => repeat(parts.pop()?, 1, None),
                '?' => repeat(parts.pop()?, 0, Some(1)),
                '{' => {
                    let (least, most) = self.counts()?;
                    repeat(parts.pop()?, least, most)
                }
                c => Syntax::One(vec![(c, c)]),
            };
            parts.push(part);
            if matches!(c, '*' | '+' | '?' | '{') {
                // how much is taken first makes no difference for a whole text
                self.chars.next_if_eq(&'?');
            }
        }
        Some(Syntax::All(parts))
    }

    fn group(&mut self) -> Option<Syntax> {
        self.depth += 1;
        // so deep a nesting is refused anyway
        if self.depth > 100 {
            return None;
        }
        if self.chars.next_if_eq(&'?').is_some() {
            match self.chars.next()? {
                ':' => {}
                'P' | '<' => drop(self.chars.by_ref().find(|c| *c == '>')?),
                _ => return None,
            }
        }
        let inner = self.alternatives()?;
        self.depth -= 1;
        self.chars.next_if_eq(&')').map(|_| inner)
    }

    /// What stands between braces.
    fn counts(&mut self) -> Option<(usize, Option<usize>)> {
        let least = self.number()?;
        let most = match self.chars.next()? {
            '}' => return Some((least, Some(least))),
            ',' if self.chars.next_if_eq(&'}').is_some() => return Some((least, None)),
            ',' => self.number()?,
            _ => return None,
        };
        self.chars.next_if_eq(&'}').map(|_| (least, Some(most)))
    }

    fn number(&mut self) -> Option<usize> {
        let mut number = None;
        while let Some(digit) = self.chars.peek().and_then(|c| c.to_digit(10)) {
            self.chars.next();
            number = Some((number.unwrap_or(0) * 10 + digit as usize).min(MOST));
        }
        number
    }

    /// What a backslash makes of the next character.
    fn escape(&mut self) -> Option<Letters> {
        match self.chars.next()? {
            '<' | '>' => None,
            c if c.is_ascii_punctuation() => Some(vec![(c, c)]),
            'd' => Some(digits()),
            'D' => Some(negated(digits())),
            's' => Some(blanks()),
            'S' => Some(negated(blanks())),
            'w' => Some(word()),
            'W' => Some(negated(word())),
            _ => None,
        }
    }

    /// A class whose bracket has been taken.
    fn class(&mut self) -> Option<Letters> {
        let inverted = self.chars.next_if_eq(&'^').is_some();
        let mut set = Letters::new();
        while self.chars.next_if_eq(&'-').is_some() {
            set.push(('-', '-'));
        }
        if set.is_empty() && self.chars.next_if_eq(&']').is_some() {
            set.push((']', ']'));
        }
        loop {
            let items = match self.chars.next()? {
                '[' => return None,
                ']' if inverted => return Some(negated(set)),
                ']' => return Some(set),
                '\\' => self.escape()?,
                c => vec![(c, c)],
            };
            let mut ahead = self.chars.clone();
            let is_range = ahead.next() == Some('-') && !matches!(ahead.next(), Some(']' | '-'));
            match (is_range, &items[..]) {
                (false, _) => set.extend(items),
                (true, [(first, only)]) if first == only => {
                    self.chars.next();
                    let last = match self.chars.next()? {
                        '\\' => match self.escape()?[..] {
                            [(a, b)] if a == b => a,
                            _ => return None,
                        },
                        c => c,
                    };
                    set.push((*first, last));
                }
                (true, _) => return None,
            }
        }
    }
}

fn repeat(part: Syntax, least: usize, most: Option<usize>) -> Syntax {
    Syntax::Repeat(Box::new(part), least, most)
}

/// Anything but a line feed.
fn dot() -> Letters {
    negated(vec![('\n', '\n')])
}

fn digits() -> Letters {
    vec![('0', '9')]
}

fn blanks() -> Letters {
    vec![('\t', '\r'), (' ', ' ')]
}

fn word() -> Letters {
    vec![('0', '9'), ('A', 'Z'), ('_', '_'), ('a', 'z')]
}

fn negated(mut set: Letters) -> Letters {
    set.sort_unstable();
    let mut left = Letters::new();
    let mut from = 0;
    for (first, last) in set.iter().map(|(a, b)| (*a as u32, *b as u32)) {
        if first > from {
            left.extend(between(from, first - 1));
        }
        from = from.max(last + 1);
    }
    left.extend(between(from, char::MAX as u32));
    left
}

/// From one code point to another; the surrogates among them are no characters.
fn between(first: u32, last: u32) -> Option<(char, char)> {
    let first = (first..=last).find_map(char::from_u32)?;
    let last = (first as u32..=last).rev().find_map(char::from_u32)?;
    Some((first, last))
}
