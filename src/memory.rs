//! Memory: what happens where there is none. Rust would abort; a daemon in whose place nobody decides
//! rather waits.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::poll::poll;

use crate::sys;

/// The allocator of the C library, behind what to do where it has no memory.
struct Patient;

#[global_allocator]
static ALLOCATOR: Patient = Patient;

/// How often to try again before giving up, each time after [`PAUSE`], in milliseconds.
static TRIES: AtomicU32 = AtomicU32::new(0);
const PAUSE: u8 = 100;
static WAITED: AtomicBool = AtomicBool::new(false);

/// Lets every allocation from now on wait for memory, for up to a minute, instead of ending the
/// program: the limit may be raised, or others may give memory back. Nothing else is done meanwhile.
pub fn wait() {
    TRIES.store(600, Ordering::Relaxed);
}

/// Whether memory had to be waited for since the last call.
pub fn waited() -> bool {
    WAITED.swap(false, Ordering::Relaxed)
}

impl Patient {
    /// Gets memory, or ends the program with status 1.
    fn get(&self, allocate: impl Fn() -> *mut u8) -> *mut u8 {
        let mut tries = TRIES.load(Ordering::Relaxed);
        loop {
            let got = allocate();
            if !got.is_null() {
                return got;
            }
            if tries == 0 {
                tell("error: out of memory\n");
                // SAFETY: no memory is passed; the kernel ends everything.
                unsafe { libc::_exit(1) };
            }
            if !WAITED.swap(true, Ordering::Relaxed) {
                tell("warning: out of memory, waiting; raise the limit (ulimit -v)\n");
            }
            tries -= 1;
            let _ = poll(&mut [], PAUSE);
        }
    }
}

/// Writes to standard error without allocating. What is not written is lost.
fn tell(line: &str) {
    let stderr = io::stderr();
    if sys::writable_now(stderr.as_fd()) {
        let _ = nix::unistd::write(&stderr, line.as_bytes());
    }
}

// SAFETY: every call goes to System with its arguments, some more than once after it has failed.
unsafe impl GlobalAlloc for Patient {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        self.get(|| unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        self.get(|| unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise; what failed has left the block as it was.
        self.get(|| unsafe { System.realloc(at, layout, size) })
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}
