//! A pattern as the positions of its characters (Glushkov's construction): which of them may have
//! been the last one read is one word of bits. A text costs some nanoseconds a character, whatever
//! the pattern, where regex-lite takes a hundred; and what was learnt of a path serves all below it.
//! Patterns that are no [`Syntax`], or have more than [`POSITIONS`] positions, are left to regex-lite.
//! Pure. Source: V. M. Glushkov, The abstract theory of automata (1961).

use super::syntax::{Letters, Syntax};

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
    /// `None` where regex-lite has to do it.
    pub fn new(pattern: &Syntax) -> Option<Automaton> {
        let (prefix, rest) = pattern.split();
        let mut positions = Positions { sets: vec![Letters::new()], follow: vec![0], steps: 0 };
        let whole = positions.sequence(rest)?;
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
            Syntax::All(parts) => self.sequence(parts),
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
            Syntax::Edge(_) => None,
        }
    }

    fn sequence(&mut self, parts: &[Syntax]) -> Option<Part> {
        parts.iter().try_fold(NOTHING, |before, part| {
            let part = self.build(part)?;
            Some(self.join(before, part))
        })
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
