//! What unit tests share: a configuration from a text, and a seeded generator, so that a failure can
//! be run again.

use std::path::Path;

use crate::cgroup::tally::{Change, Changes};
use crate::config::{load, Config, Source};

/// The one file that there is.
struct Text(&'static str);

impl Source for Text {
    fn read(&self, _: &Path) -> Result<String, String> {
        Ok(self.0.into())
    }
}

/// A configuration that has nothing wrong.
pub fn config(text: &'static str) -> Config {
    load(&Text(text), Path::new("c")).expect("a good configuration")
}

/// What is to go of some changes, and to come.
pub fn taken<K: Ord + Copy>(changes: &mut Changes<K>) -> (Vec<K>, Vec<K>) {
    let mut change = Change::default();
    changes.take(&mut change);
    (change.delete, change.add)
}

/// xorshift64*, good enough to pick test inputs.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.draw() >> 33) as usize % n
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}
