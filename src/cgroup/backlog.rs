//! Events that wait, taken by turns from the watched directories: who makes thousands of cgroups in
//! his own must not keep us from others'. An event only says where to look, so their order does not
//! matter. Pure.

use std::collections::{HashMap, VecDeque};
use std::mem::take;

use crate::core::Event;

/// Events by watch descriptor, and whose turn it is.
#[derive(Debug, Default)]
pub struct Backlog {
    /// Never an empty queue.
    queues: HashMap<i32, VecDeque<Event>>,
    turns: VecDeque<i32>,
    len: usize,
    /// A small empty queue, for the one event that there mostly is.
    spare: VecDeque<Event>,
}

impl Backlog {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn push(&mut self, event: Event) {
        let wd = match event {
            Event::Changed { wd, .. } | Event::Unwatched { wd } => wd,
            // everything will be looked at, and what waits with it
            Event::Overflow => {
                *self = Backlog::default();
                -1
            }
            _ => -1,
        };
        let spare = &mut self.spare;
        let queue = self.queues.entry(wd).or_insert_with(|| take(spare));
        if queue.is_empty() {
            self.turns.push_back(wd);
        }
        queue.push_back(event);
        self.len += 1;
    }

    /// The next event of the directory whose turn it is.
    pub fn pop(&mut self) -> Option<Event> {
        let wd = self.turns.pop_front()?;
        let queue = self.queues.get_mut(&wd)?;
        let event = queue.pop_front()?;
        if !queue.is_empty() {
            self.turns.push_back(wd);
        } else if let Some(empty) = self.queues.remove(&wd).filter(|q| q.capacity() <= 8) {
            self.spare = empty;
        }
        self.len -= 1;
        Some(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(wd: i32, name: &str) -> Event {
        let name = name.as_bytes().into();
        Event::Changed { wd, name }
    }

    #[test]
    fn every_directory_has_its_turn() {
        let mut backlog = Backlog::default();
        let flood = (0..1000).map(|i| changed(1, &i.to_string()));
        flood.for_each(|event| backlog.push(event));
        backlog.push(changed(2, "a"));
        backlog.push(Event::Unwatched { wd: 2 });
        assert_eq!(backlog.pop(), Some(changed(1, "0")));
        assert_eq!(backlog.pop(), Some(changed(2, "a")));
        assert_eq!(backlog.pop(), Some(changed(1, "1")));
        assert_eq!(backlog.pop(), Some(Event::Unwatched { wd: 2 }));
        for i in 2..1000 {
            assert_eq!(backlog.pop(), Some(changed(1, &i.to_string())));
        }
        assert_eq!((backlog.pop(), backlog.len()), (None, 0));
        assert!(backlog.queues.is_empty() && backlog.turns.is_empty());
    }

    #[test]
    fn after_an_overflow_nothing_else_matters() {
        let mut backlog = Backlog::default();
        backlog.push(changed(1, "a"));
        backlog.push(Event::Overflow);
        backlog.push(changed(1, "b"));
        assert_eq!(backlog.pop(), Some(Event::Overflow));
        assert_eq!(backlog.pop(), Some(changed(1, "b")));
        assert!(backlog.pop().is_none() && backlog.is_empty());
    }
}
