//! A pattern as the positions of its characters (Glushkov's construction): which of them may have
//! been the last one read is one word of bits. A text costs some nanoseconds a character, whatever
//! the pattern, where regex-lite takes a hundred; and what was learnt of a path serves all below it.
//! Patterns with flags, assertions or more than [`POSITIONS`] positions are left to regex-lite.
//! Pure. Source: V. M. Glushkov, The abstract theory of automata (1961); regex-lite's syntax.

/// Positions in use after some text; the first bit stands for the beginning.
pub type State = u128;

/// So many characters may a pattern have behind the literal text that it begins with.
const POSITIONS: usize = State::BITS as usize - 1;

/// Steps of the construction: nested repeats of nothing take no position.
const STEPS: usize = 4096;

/// The state at the beginning, behind the literal text.
const BEGIN: State = 1;

/// What matches a whole text, and nothing else of it.
#[derive(Debug, Clone)]
pub struct Automaton {
    /// Literal text that every match begins with.
    prefix: Box<str>,
    /// Class of each ASCII character, and where those of the others begin, in ascending order.
    ascii: Box<[u8; 128]>,
    bounds: Box<[u32]>,
    /// By class: the positions that take such a character.
    masks: Box<[State]>,
    /// By position: those that may come next.
    follow: Box<[State]>,
    accepting: State,
}

impl Automaton {
    /// For a pattern that is known to compile; `None` where regex-lite has to do it.
    pub fn new(pattern: &str) -> Option<Automaton> {
        let mut parser = Parser { chars: pattern.chars().peekable(), depth: 0 };
        let tree = parser.alternatives()?;
        if parser.chars.next().is_some() {
            return None;
        }
        let (prefix, tree) = split(tree);
        let mut positions = Positions { sets: vec![Letters::new()], follow: vec![0], steps: 0 };
        let whole = positions.build(&tree)?;
        positions.follow[0] = whole.first;
        let accepting = whole.last | if whole.nullable { BEGIN } else { 0 };
        let (bounds, masks) = classes(&positions.sets);
        let class = |c: u32| bounds.partition_point(|first| *first <= c) - 1;
        let mut ascii = Box::new([0; 128]);
        for (c, place) in ascii.iter_mut().enumerate() {
            *place = u8::try_from(class(c as u32)).ok()?;
        }
        Some(Automaton {
            prefix: prefix.into(),
            ascii,
            bounds: bounds.into(),
            masks: masks.into(),
            follow: positions.follow.into(),
            accepting,
        })
    }

    /// How many bytes it takes, about.
    pub fn size(&self) -> usize {
        let states = self.masks.len() + self.follow.len();
        size_of::<Automaton>() + 128 + 4 * self.bounds.len() + size_of::<State>() * states
    }

    /// The state after a text; 0 where no longer one matches. `None` where the text ends within the
    /// pattern's literal beginning.
    pub fn read(&self, text: &str) -> Option<State> {
        match text.strip_prefix(&*self.prefix) {
            Some(rest) => Some(self.resume(BEGIN, rest)),
            None if self.prefix.starts_with(text) => None,
            None => Some(0),
        }
    }

    /// The state after more text.
    pub fn resume(&self, mut state: State, text: &str) -> State {
        for c in text.chars() {
            if state == 0 {
                break;
            }
            let mut next = 0;
            while state != 0 {
                next |= self.follow[state.trailing_zeros() as usize];
                state &= state - 1;
            }
            state = next & self.masks[self.class(c)];
        }
        state
    }

    /// Whether the text that led to this state matches.
    pub fn accepts(&self, state: State) -> bool {
        state & self.accepting != 0
    }

    fn class(&self, c: char) -> usize {
        match self.ascii.get(c as usize) {
            Some(class) => usize::from(*class),
            None => self.bounds.partition_point(|first| *first <= c as u32) - 1,
        }
    }
}

/// Ranges of characters, both ends included.
type Letters = Vec<(char, char)>;

enum Syntax {
    One(Letters),
    All(Vec<Syntax>),
    Any(Vec<Syntax>),
    Repeat(Box<Syntax>, usize, Option<usize>),
}

/// The single characters that a pattern begins with, and the rest.
fn split(tree: Syntax) -> (String, Syntax) {
    let Syntax::All(mut parts) = tree else {
        return (String::new(), tree);
    };
    let single = |part: &Syntax| match part {
        Syntax::One(set) => match set[..] {
            [(first, last)] if first == last => Some(first),
            _ => None,
        },
        _ => None,
    };
    let prefix: String = parts.iter().map_while(single).collect();
    parts.drain(..prefix.chars().count());
    (prefix, Syntax::All(parts))
}

/// The classes that the sets tell apart: where each begins, and the positions that take it.
fn classes(sets: &[Letters]) -> (Vec<u32>, Vec<State>) {
    let ranges = || sets.iter().flatten().map(|(first, last)| (*first as u32, *last as u32));
    let mut bounds: Vec<u32> = ranges().flat_map(|(first, last)| [first, last + 1]).collect();
    bounds.push(0);
    bounds.sort_unstable();
    bounds.dedup();
    let holds =
        |set: &Letters, c: u32| set.iter().any(|(a, b)| (*a as u32..=*b as u32).contains(&c));
    let mask = |c: &u32| {
        let bits = sets.iter().enumerate().filter(|(_, set)| holds(set, *c));
        bits.fold(0, |mask, (position, _)| mask | 1 << position)
    };
    let masks = bounds.iter().map(mask).collect();
    (bounds, masks)
}

/// A part of the pattern: whether it matches nothing at all, the positions that it may begin with
/// and those that it may end with.
#[derive(Clone, Copy)]
struct Part {
    nullable: bool,
    first: State,
    last: State,
}

const NOTHING: Part = Part { nullable: true, first: 0, last: 0 };

struct Positions {
    sets: Vec<Letters>,
    follow: Vec<State>,
    steps: usize,
}

impl Positions {
    fn build(&mut self, tree: &Syntax) -> Option<Part> {
        self.steps += 1;
        if self.steps > STEPS {
            return None;
        }
        match tree {
            Syntax::One(set) => {
                let position = self.sets.len();
                if position > POSITIONS {
                    return None;
                }
                self.sets.push(set.clone());
                self.follow.push(0);
                let bit = 1 << position;
                Some(Part { nullable: false, first: bit, last: bit })
            }
            Syntax::All(parts) => parts.iter().try_fold(NOTHING, |before, part| {
                let part = self.build(part)?;
                Some(self.join(before, part))
            }),
            Syntax::Any(parts) => {
                let mut whole = Part { nullable: false, ..NOTHING };
                for part in parts {
                    let part = self.build(part)?;
                    whole.nullable |= part.nullable;
                    whole.first |= part.first;
                    whole.last |= part.last;
                }
                Some(whole)
            }
            Syntax::Repeat(part, least, most) => {
                let mut whole = NOTHING;
                for number in 1..=most.unwrap_or((*least).max(1)) {
                    let mut copy = self.build(part)?;
                    if most.is_none() && number >= *least {
                        self.lead(copy.last, copy.first);
                    }
                    copy.nullable |= number > *least;
                    whole = self.join(whole, copy);
                }
                Some(whole)
            }
        }
    }

    fn join(&mut self, a: Part, b: Part) -> Part {
        self.lead(a.last, b.first);
        Part {
            nullable: a.nullable && b.nullable,
            first: a.first | if a.nullable { b.first } else { 0 },
            last: b.last | if b.nullable { a.last } else { 0 },
        }
    }

    /// Lets every position of `from` be followed by those of `to`.
    fn lead(&mut self, mut from: State, to: State) {
        while from != 0 {
            self.follow[from.trailing_zeros() as usize] |= to;
            from &= from - 1;
        }
    }
}

/// Reads what of regex-lite's syntax is the same in every mode.
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
                '.' => Syntax::One(negated(vec![('\n', '\n')])),
                '\\' => Syntax::One(self.escape()?),
                '^' | '$' => return None,
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
        // named ones and flags are rare; so deep a nesting is refused anyway
        if self.depth > 100 || self.chars.next_if_eq(&'?').is_some() && self.chars.next()? != ':' {
            return None;
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

    /// A repeat of more than there may be positions is not for us.
    fn number(&mut self) -> Option<usize> {
        let mut number = None;
        while let Some(digit) = self.chars.peek().and_then(|c| c.to_digit(10)) {
            self.chars.next();
            let so_far = number.unwrap_or(0) * 10 + digit as usize;
            number = Some(so_far).filter(|n| *n <= POSITIONS);
            number?;
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
