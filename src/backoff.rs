//! When to repair: at once as a rule, with growing pauses where somebody keeps destroying. Pure:
//! the time is an argument.

use std::time::{Duration, Instant};

/// Repairs that may be done at once before the pauses begin, and how fast that allowance returns.
const ALLOWANCE: u32 = 150;
const REGAIN: Duration = Duration::from_millis(500);
/// First and longest pause. After this long without a repair, all is forgotten.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// Decides when each repair of one thing is due.
#[derive(Debug)]
pub struct Backoff {
    allowance: u32,
    pause: Duration,
    /// When the last repair was done.
    last: Option<Instant>,
    due: Option<Instant>,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { allowance: ALLOWANCE, pause: FIRST, last: None, due: None }
    }
}

impl Backoff {
    /// A repair is needed.
    pub fn want(&mut self, now: Instant) {
        if self.due.is_some() {
            return;
        }
        let idle = self.last.map_or(LONGEST, |last| now.saturating_duration_since(last));
        if idle >= LONGEST {
            *self = Backoff { last: self.last, ..Backoff::default() };
        }
        let regained = (idle.as_millis() / REGAIN.as_millis()) as u32;
        self.allowance = (self.allowance + regained.min(ALLOWANCE)).min(ALLOWANCE);
        if self.allowance > 0 {
            self.allowance -= 1;
            self.due = Some(now);
        } else {
            self.delay(now);
        }
    }

    /// What stood in the way may be gone: a repair that is wanted is due now.
    pub fn hasten(&mut self, now: Instant) {
        if self.due.is_some() {
            self.due = Some(now);
        }
    }

    /// A repair was tried and refused: the next try is due after a pause, which is returned.
    pub fn failed(&mut self, now: Instant) -> Duration {
        self.last = Some(now);
        self.delay(now)
    }

    /// A repair was done.
    pub fn done(&mut self, now: Instant) {
        self.last = Some(now);
        self.due = None;
    }

    /// When the repair that is wanted is due.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    fn delay(&mut self, now: Instant) -> Duration {
        let pause = self.pause;
        self.due = Some(now + pause);
        self.pause = (pause * 2).min(LONGEST);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_once_then_pauses_then_forgotten() {
        let start = Instant::now();
        let mut now = start;
        let mut backoff = Backoff::default();
        let mut repairs = Vec::new();
        // somebody destroys every millisecond, for ten minutes
        while now < start + Duration::from_secs(600) {
            backoff.want(now);
            if backoff.due().is_some_and(|at| at <= now) {
                repairs.push(now);
                backoff.done(now);
            }
            now += Duration::from_millis(1);
        }
        let first_second = repairs.iter().filter(|at| **at < start + FIRST).count();
        assert!((ALLOWANCE as usize..ALLOWANCE as usize + 3).contains(&first_second));
        assert!(repairs.len() < 170, "{}", repairs.len());
        // quiet for a minute after the repair that is pending
        now = backoff.due().unwrap_or(now);
        backoff.done(now);
        now += LONGEST;
        backoff.want(now);
        assert_eq!(backoff.due(), Some(now));
    }

    #[test]
    fn a_refused_repair_is_tried_again_with_doubling_pauses() {
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        backoff.want(now);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pauses.push(backoff.failed(now).as_secs());
            now = backoff.due().unwrap();
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        backoff.done(now);
        assert_eq!(backoff.due(), None);
    }
}
