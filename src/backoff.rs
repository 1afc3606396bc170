//! When to repair: at once as a rule, and no more often than a share of the time allows where
//! somebody keeps destroying; so however long that goes on, what it destroyed last is soon back.
//! And when to say what goes on. Pure: the time is an argument.

use std::time::{Duration, Instant};

/// Work that may be done at once, and the part of the time that it grows by again.
const CREDIT: Duration = Duration::from_secs(1);
const SHARE: u32 = 20;
/// What is wanted waits no longer than this for its turn.
const LONGEST_TURN: Duration = Duration::from_millis(500);
/// First and longest pause after one that was refused.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// Decides when each repair of one thing is due.
#[derive(Debug)]
pub struct Backoff {
    /// Work that may be done, and work that was done in advance.
    credit: Duration,
    debt: Duration,
    /// When the last repair was done, or refused.
    last: Option<Instant>,
    /// The next one after a refusal.
    pause: Duration,
    due: Option<Instant>,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { credit: CREDIT, debt: Duration::ZERO, last: None, pause: FIRST, due: None }
    }
}

impl Backoff {
    /// A repair, or a look whether one is needed, is wanted.
    pub fn want(&mut self, now: Instant) {
        if self.due.is_some() {
            return;
        }
        let idle = self.last.map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        let grown = idle / SHARE;
        self.credit = (self.credit + grown.saturating_sub(self.debt)).min(CREDIT);
        self.debt = self.debt.saturating_sub(grown);
        self.last = self.last.map(|_| now);
        self.due = Some(now + (self.debt * SHARE).min(LONGEST_TURN));
    }

    /// What stood in the way may be gone: a repair that is wanted is due now.
    pub fn hasten(&mut self, now: Instant) {
        if self.due.is_some() {
            self.due = Some(now);
        }
    }

    /// A repair that was begun then was tried and refused: the next try is due after a pause, which
    /// is returned.
    pub fn failed(&mut self, began: Instant, now: Instant) -> Duration {
        let pause = self.pause;
        self.spend(began, now);
        self.pause = (pause * 2).min(LONGEST);
        self.due = Some(now + pause);
        pause
    }

    /// A repair that was begun then is done, or was not needed.
    pub fn done(&mut self, began: Instant, now: Instant) {
        self.spend(began, now);
        self.pause = FIRST;
        self.due = None;
    }

    /// When the repair that is wanted is due.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    fn spend(&mut self, began: Instant, now: Instant) {
        let spent = now.saturating_duration_since(began);
        self.debt += spent.saturating_sub(self.credit);
        self.credit = self.credit.saturating_sub(spent);
        self.last = Some(now);
    }
}

/// How often a failure that goes on is told: logs of routers are small.
const REMIND: Duration = Duration::from_secs(3600);

/// Decides whether a failure of one thing is worth a line.
#[derive(Debug, Default)]
pub struct Reminder(Option<(String, Instant)>);

impl Reminder {
    /// At the first time, when it is another failure, and again after an hour.
    pub fn is_due(&mut self, text: &str, now: Instant) -> bool {
        let told = |(last, at): &(String, Instant)| {
            last == text && now.saturating_duration_since(*at) < REMIND
        };
        if self.0.as_ref().is_some_and(told) {
            return false;
        }
        self.0 = Some((text.to_owned(), now));
        true
    }
}

/// How long after a cgroup has come its processes are taken to listen.
const LISTENING: Duration = Duration::from_secs(5);

/// Between two looks, at the least.
const RARE: Duration = Duration::from_secs(60);

/// When to look for loops, and what has been told of them.
#[derive(Debug, Default)]
pub struct Looks {
    due: Option<Instant>,
    last: Option<Instant>,
    /// The last look, whatever it was for.
    any: Option<Instant>,
    told: Vec<String>,
}

impl Looks {
    /// Something has come that may begin to loop. More of that does not put the look off.
    pub fn want(&mut self, now: Instant) {
        let rested = self.last.map_or(now, |last| last + RARE);
        let wanted = rested.max(now + LISTENING);
        self.due = Some(self.due.map_or(wanted, |due| due.min(wanted)));
    }

    /// Something has woken us: a proxy may have begun to listen in a cgroup that was there, of which
    /// nothing tells.
    pub fn wake(&mut self, now: Instant) {
        self.due.get_or_insert(self.any.map_or(now, |any| any + RARE).max(now));
    }

    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The look that is due begins.
    pub fn done(&mut self, now: Instant) {
        self.due = None;
        self.last = Some(now);
        self.any = Some(now);
    }

    /// A look that was asked for; one that is due remains so.
    pub fn asked(&mut self, now: Instant) {
        self.any = Some(now);
    }

    /// What of all that was found has not been told since it last began.
    pub fn news(&mut self, found: Vec<String>) -> Vec<String> {
        let news = found.iter().filter(|line| !self.told.contains(line)).cloned().collect();
        self.told = found;
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Somebody destroys every millisecond for a while, and a repair takes that long. Returns when
    /// each was begun, and when the last harm was repaired.
    fn attack(time: Duration, cost: Duration) -> (Vec<Duration>, Duration) {
        let start = Instant::now();
        let mut now = start;
        let mut backoff = Backoff::default();
        let mut begun = Vec::new();
        loop {
            if now < start + time {
                backoff.want(now);
            }
            match backoff.due() {
                Some(at) if at <= now => {
                    begun.push(now - start);
                    now += cost;
                    backoff.done(now - cost, now);
                }
                None if now >= start + time => return (begun, now - start),
                _ => now += Duration::from_millis(1),
            }
        }
    }

    #[test]
    fn whatever_wakes_us_leads_to_a_look_a_minute_at_most() {
        let mut looks = Looks::default();
        let mut now = Instant::now();
        looks.asked(now);
        assert_eq!(looks.due(), None);
        let first = now + RARE;
        let mut done = 0;
        for _ in 0..6_000 {
            looks.wake(now);
            if looks.due().is_some_and(|at| at <= now) {
                assert!(done > 0 || now == first);
                looks.done(now);
                done += 1;
            }
            now += Duration::from_millis(100);
        }
        assert_eq!(done, 9);
        // a cgroup that has come is looked at sooner, and after a long rest a wake-up leads to a look
        let mut looks = Looks::default();
        looks.asked(now);
        looks.wake(now);
        looks.want(now);
        assert_eq!(looks.due(), Some(now + LISTENING));
        looks.done(now);
        now += 2 * RARE;
        looks.wake(now);
        assert_eq!(looks.due(), Some(now));
    }

    #[test]
    fn looks_are_rare_and_tell_each_loop_once() {
        let mut looks = Looks::default();
        let start = Instant::now();
        assert_eq!(looks.due(), None);
        looks.want(start);
        looks.want(start + LISTENING / 2);
        assert_eq!(looks.due(), Some(start + LISTENING));
        looks.done(start + LISTENING);
        assert_eq!(looks.due(), None);
        looks.want(start + LISTENING);
        assert_eq!(looks.due(), Some(start + LISTENING + RARE));
        looks.done(start + LISTENING + RARE);
        looks.want(start + 3 * RARE);
        assert_eq!(looks.due(), Some(start + 3 * RARE + LISTENING));
        let found = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert_eq!(looks.news(found(&["a"])), ["a"]);
        assert_eq!(looks.news(found(&["a", "b"])), ["b"]);
        assert_eq!(looks.news(found(&["b"])), [""; 0]);
        assert_eq!(looks.news(found(&["a", "b"])), ["a"]);
    }

    #[test]
    fn however_long_it_goes_on_the_last_is_soon_repaired() {
        for seconds in [1, 10, 600] {
            for micros in [100, 500, 5_000, 200_000] {
                let (time, cost) = (Duration::from_secs(seconds), Duration::from_micros(micros));
                let (begun, end) = attack(time, cost);
                let text = format!("{} repairs of {cost:?} in {time:?}", begun.len());
                assert!(end <= time + LONGEST_TURN + cost, "{text}, the last after {end:?}");
                let share = (cost * begun.len() as u32).saturating_sub(CREDIT + cost);
                // dear ones would wait longer, and may not
                let part = if cost * SHARE > LONGEST_TURN { 3 } else { SHARE };
                assert!(share <= time / part, "{text}: {share:?} of work");
            }
        }
    }

    #[test]
    fn at_once_after_a_quiet_time() {
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        for _ in 0..1000 {
            backoff.want(now);
            assert_eq!(backoff.due(), Some(now));
            backoff.done(now, now + Duration::from_millis(1));
            now += Duration::from_millis(30);
        }
        backoff.want(now);
        backoff.done(now, now + Duration::from_secs(3));
        now += Duration::from_secs(3);
        backoff.want(now);
        assert_eq!(backoff.due(), Some(now + LONGEST_TURN));
        backoff.hasten(now);
        assert_eq!(backoff.due(), Some(now));
        backoff.done(now, now);
        now += Duration::from_secs(100);
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
            pauses.push(backoff.failed(now, now).as_secs());
            now = backoff.due().unwrap();
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        backoff.done(now, now);
        assert_eq!(backoff.due(), None);
    }

    #[test]
    fn what_goes_on_is_told_once_an_hour() {
        let start = Instant::now();
        let mut reminder = Reminder::default();
        let mut told = 0;
        for minute in 0..180 {
            let now = start + Duration::from_secs(60 * minute);
            told += usize::from(reminder.is_due("no cgroup2", now));
        }
        assert_eq!(told, 3);
        let now = start + Duration::from_secs(60 * 180);
        assert!(reminder.is_due("no nf_tables", now));
        assert!(!reminder.is_due("no nf_tables", now));
        assert!(reminder.is_due("no cgroup2", now));
    }
}
