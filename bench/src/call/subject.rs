//! One way to call another process, and how it is timed.
//!
//! ```text
//!   bench call ──▶ bench call-case WAY BYTES one|two CALLS      client, on processor 1
//!       │              └─ fork ─▶ server                        on processor 1 (one core) or 0 (two)
//!       ◀── "min median p99" in ns of CALLS calls ──┘
//! ```
//!
//! **Same work for all.** The caller has an argument of so many bytes, in memory of its own or, where a way passes it in
//! place, where that way wants it. Before each call it changes the first word. The callee reads one word of each page
//! of it, so that the bytes must have come, and answers with their sum, which the caller checks: a way that passes stale
//! or no bytes fails instead of winning. With 0 bytes the callee is entered and answers 0.
//!
//! Each call is timed by itself, for the tail is asked for too; the clock's two readings (about 50 ns) are in all of them.

use peregrine_sys::process::{self, ForkFlags, Forked};
use std::time::Instant;

const PAGE: usize = 4096;

/// The client's side of one way.
pub trait Caller {
    /// Where the caller builds its argument.
    fn argument(&mut self) -> Bytes<'_>;
    /// One call with the argument as it is now; what the callee made of it.
    fn call(&mut self) -> u64;
}

/// An argument: in the caller's own memory, or where the other process sees it.
pub enum Bytes<'a> {
    /// Nobody else's.
    Own(&'a mut [u8]),
    /// Memory that another process maps: never behind a reference (S1).
    Shared(*mut u8, usize),
}

impl Bytes<'_> {
    /// Writes `value` as the first word, if there is room.
    fn set_first(&mut self, value: u64) {
        match self {
            Self::Own(b) => {
                if let Some(first) = b.first_chunk_mut() {
                    *first = value.to_ne_bytes();
                }
            }
            Self::Shared(at, len) => {
                if *len >= 8 {
                    // SAFETY: inside the mapping; the callee reads only during a call.
                    unsafe { at.cast::<u64>().write_volatile(value) }
                }
            }
        }
    }

    /// Fills it with a pattern; its length.
    fn fill(&mut self) -> usize {
        let pattern = |i: usize| (i * 31 % 251) as u8;
        match self {
            Self::Own(b) => {
                b.iter_mut().enumerate().for_each(|(i, b)| *b = pattern(i));
                b.len()
            }
            Self::Shared(at, len) => {
                for i in 0..*len {
                    // SAFETY: inside the mapping; no call is under way.
                    unsafe { at.add(i).write_volatile(pattern(i)) }
                }
                *len
            }
        }
    }

    fn digest(&self) -> u64 {
        match self {
            Self::Own(b) => digest(b),
            // SAFETY: inside the mapping.
            Self::Shared(at, len) => unsafe { digest_at(*at, *len) },
        }
    }
}

/// What the callee answers: the sum of the first words of the argument's pages.
pub fn digest(argument: &[u8]) -> u64 {
    argument
        .chunks(PAGE)
        .filter_map(|page| page.first_chunk())
        .fold(0u64, |sum, word| sum.wrapping_add(u64::from_ne_bytes(*word)))
}

/// [`digest`] of memory that another process may write (S1).
///
/// # Safety
/// Mapped readable for `len` bytes; `at` is aligned to 8.
pub unsafe fn digest_at(at: *const u8, len: usize) -> u64 {
    let mut sum = 0u64;
    let mut page = 0;
    while page + 8 <= len {
        // SAFETY: as promised.
        sum = sum.wrapping_add(unsafe { at.add(page).cast::<u64>().read_volatile() });
        page += PAGE;
    }
    sum
}

/// Times of some calls, in ns.
pub struct Timed {
    pub min: f64,
    pub median: f64,
    pub p99: f64,
}

/// Times `calls` calls after a warm-up.
///
/// # Panics
/// If the callee's answer is wrong.
pub fn time(caller: &mut dyn Caller, calls: usize) -> Timed {
    let len = caller.argument().fill();
    caller.argument().set_first(0);
    let base = caller.argument().digest();
    let mut number = 0u64;
    let mut one = |timed: bool| {
        number += 1;
        caller.argument().set_first(number);
        let begun = Instant::now();
        let answer = caller.call();
        let ns = begun.elapsed().as_nanos() as u32;
        let expected = if len >= 8 { base.wrapping_add(number) } else { 0 };
        assert_eq!(answer, expected, "the callee saw other bytes than the caller sent");
        timed.then_some(ns)
    };
    for _ in 0..(calls / 10).max(3) {
        one(false);
    }
    let mut all: Vec<u32> = (0..calls).filter_map(|_| one(true)).collect();
    all.sort_unstable();
    let at = |q: f64| f64::from(all[((all.len() - 1) as f64 * q).round() as usize]);
    Timed { min: at(0.0), median: at(0.5), p99: at(0.99) }
}

/// Forks a server that runs `serve` on processor `cpu` and dies with this process.
pub fn server(cpu: usize, serve: impl FnOnce()) -> Server {
    server_anywhere(|| {
        process::pin_to_cpu(cpu).expect("a processor for the server");
        serve();
    })
}

/// Forks a process that runs `serve` and dies with this one.
pub fn server_anywhere(serve: impl FnOnce()) -> Server {
    // SAFETY: a case's process has one thread when it forks its server; the child returns into nobody's frames.
    match unsafe { process::fork_with(ForkFlags::default()) }.expect("fork") {
        Forked::Child => {
            process::die_with_parent();
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(serve));
            process::exit_now(if done.is_ok() { 0 } else { 101 })
        }
        Forked::Parent(pid) => Server { pid },
    }
}

/// A server's process; dropped, it is waited for or killed.
pub struct Server {
    pid: i32,
}

impl Server {
    /// Its process id.
    pub const fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until it has ended by itself, which it does when its client is gone.
    pub fn wait(self) {
        let _ = process::wait_for(self.pid);
        core::mem::forget(self);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = peregrine_sys::signal::kill(self.pid, peregrine_sys::signal::number::KILL);
        let _ = process::wait_for(self.pid);
    }
}
