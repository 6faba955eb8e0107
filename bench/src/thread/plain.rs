//! Baselines without a World: operating-system threads that wake each other, and this crate's switch alone.

use super::CPU;
use super::switch::rounds_of;
use peregrine_base::sync::{AtomicU32, Ordering};
use peregrine_sys::timer::process_cpu_ns;
use peregrine_sys::{cpu, futex};
use peregrine_thread::arch;
use std::sync::Arc;

/// Two threads on one processor that wake each other by futex.
pub fn os_futex(samples: usize) {
    let _ = peregrine_sys::process::pin_to_cpu(CPU);
    const TURNS: u32 = 5000;
    let word = Arc::new(AtomicU32::new(0));
    let run = |word: Arc<AtomicU32>, parity: u32, samples: usize| {
        let mut out = Vec::new();
        for _ in 0..samples {
            let begun = process_cpu_ns();
            for _ in 0..TURNS {
                while word.load(Ordering::Acquire) & 1 != parity {
                    futex::wait(&word, parity ^ 1 | word.load(Ordering::Acquire) & !1, None);
                }
                word.fetch_add(1, Ordering::Release);
                let _ = futex::wake(&word, 1);
            }
            out.push((process_cpu_ns() - begun) as f64 / f64::from(2 * TURNS));
        }
        out
    };
    let theirs = word.clone();
    let other = std::thread::spawn(move || run(theirs, 1, samples));
    for sample in run(word, 0, samples) {
        println!("{sample}");
    }
    let _ = other.join();
}

/// The contexts of the bare round: index 0 is the caller's own.
static mut SAVED: Vec<usize> = Vec::new();
static mut AT: usize = 0;
static mut FS: bool = false;

/// With more contexts than this, what the switch after the next will read is fetched ahead, as the scheduler does it: nothing of
/// theirs is in the first cache, and a write of the FS base lets no later read begin.
const FEW: usize = 64;

/// Goes on in the next context of the round. Inlined: contexts that call it from two places would return to where the
/// processor does not expect them.
#[inline(always)]
unsafe fn next() {
    // SAFETY: one OS thread; every context but the running one was saved or made.
    unsafe {
        let saved = (&raw mut SAVED).as_mut().expect("an address");
        let from = AT;
        let to = if from + 1 == saved.len() { 0 } else { from + 1 };
        AT = to;
        let at = saved.as_mut_ptr();
        if saved.len() > FEW {
            let later = if to + 1 == saved.len() { 0 } else { to + 1 };
            arch::prefetch(*at.add(later));
        }
        if FS {
            cpu::set_fs_base(cpu::thread_pointer(), true);
        }
        arch::switch(at.add(from), *at.add(to));
    }
}

extern "C" fn turn_for_ever() -> ! {
    loop {
        // SAFETY: as `next`.
        unsafe { next() };
    }
}

/// The switch alone, and with a write of the FS base: two columns.
/// Stacks begin `apart` bytes from one another, two pages or more.
pub fn raw_switch(threads: usize, apart: usize, samples: usize) {
    let _ = peregrine_sys::process::pin_to_cpu(CPU);
    const PAGE: usize = 4096;
    let mut stacks = vec![0u8; threads * apart];
    let base = (stacks.as_mut_ptr() as usize).next_multiple_of(PAGE);
    // SAFETY: of fresh memory that is kept until the round is over, `apart` bytes each but for less than two pages; 64 bytes at least.
    unsafe {
        let saved = (&raw mut SAVED).as_mut().expect("an address");
        saved.push(0);
        for i in 1..threads {
            // In one region, and a line of the page for each in turn, as threads' stacks have it (`layout::header_offset`).
            let top = base + i * apart - i * 64 % PAGE;
            saved.push(arch::first_frame(top, turn_for_ever));
        }
    }
    let rounds = rounds_of(threads);
    let fast = cpu::has_fsgsbase();
    let round = |with_fs: bool| {
        // SAFETY: read and written by this OS thread only.
        unsafe { FS = with_fs && fast };
        let begun = process_cpu_ns();
        for _ in 0..rounds {
            // SAFETY: this is context 0, whose turn it is.
            unsafe { next() };
        }
        (process_cpu_ns() - begun) as f64 / (rounds * threads) as f64
    };
    round(true);
    for _ in 0..samples {
        println!("{} {}", round(false), round(true));
    }
}
