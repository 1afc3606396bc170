//! The reader of inotify(7) events on any bytes: it never panics, and every name that it hands on
//! stands for one entry of a directory.

#![no_main]

use cgtproxy::cgroup::event::Event;
use cgtproxy::cgroup::watch::{self, RawEvents};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|buffer: &[u8]| {
    assert!(RawEvents::new(buffer).count() <= buffer.len() / 16);
    for raw in RawEvents::new(buffer) {
        assert!(!raw.name.contains(&0));
        if let Some(Event::Changed { name, .. }) = watch::event(raw) {
            assert!(!name.is_empty() && !name.contains(&b'/'));
        }
    }
});
