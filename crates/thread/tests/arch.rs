//! The same promise for every processor: a context switched away from comes back with all it had, and so does one that a signal
//! interrupted at any instruction and whose frame lies on its own stack.
//!
//! ```text
//!   the test ──▶ context 1 ⇄ context 2      each computes; a timer's handler switches to the other in its middle,
//!                                           and returns (`sigreturn`) when somebody comes back
//! ```
//!
//! A program of its own, without the test harness: the timer's signal must find the one thread that there is.

use peregrine_base::sync::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use peregrine_sys::cpu;
use peregrine_sys::signal::{self, HandlerFlags, SigInfo, Signo, UContext};
use peregrine_sys::timer::Timer;
use peregrine_thread::arch::{first_frame, jump_to, switch};
use std::hint::black_box;

const SIGNO: Signo = signal::number::RT_BASE + 7;
const ROUNDS: u64 = 4_000_000;
/// Rounds of the check that the thread pointer is a context's own: bytes of a stand-in control block.
const BLOCK: usize = 16 << 10;

/// Saved stack pointers: 0 is the test's own context.
static SAVED: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];
static CURRENT: AtomicUsize = AtomicUsize::new(0);
/// While one context is left and the other not yet entered: a signal that comes then switches nothing.
static BETWEEN: AtomicBool = AtomicBool::new(false);
static SWITCHES: AtomicU64 = AtomicU64::new(0);
static RIGHT: AtomicUsize = AtomicUsize::new(0);
static FINISHED: AtomicUsize = AtomicUsize::new(0);

/// Goes on in context `to`.
#[inline(never)]
unsafe fn go(to: usize) {
    BETWEEN.store(true, Ordering::SeqCst);
    let from = CURRENT.swap(to, Ordering::Relaxed);
    SWITCHES.fetch_add(1, Ordering::Relaxed);
    // SAFETY: one OS thread; `to` was saved or made, and does not run.
    unsafe { switch(SAVED[from].as_ptr(), SAVED[to].load(Ordering::Relaxed)) };
    BETWEEN.store(false, Ordering::SeqCst);
}

/// Integer and floating-point work in which every register matters.
#[inline(never)]
fn work(seed: u64) -> (u64, u64) {
    let (mut a, mut b, mut c) = (seed, seed ^ 0xabcd, seed.rotate_left(17));
    let (mut x, mut y) = (seed as f64, 0.5f64);
    for i in 0..ROUNDS {
        a = a.wrapping_mul(6364136223846793005).wrapping_add(b ^ i);
        b = b.rotate_left((a & 31) as u32) ^ c;
        c = c.wrapping_add(a >> 7);
        x = x * 1.000_000_1 + y;
        y = (y + x).sqrt();
    }
    (a ^ b ^ c, x.to_bits() ^ y.to_bits())
}

extern "C" fn computes() -> ! {
    BETWEEN.store(false, Ordering::SeqCst);
    let me = CURRENT.load(Ordering::Relaxed);
    let found = work(black_box(me as u64));
    signal::set_mask(signal::bit(SIGNO));
    let right = found == work(black_box(me as u64));
    RIGHT.fetch_add(usize::from(right), Ordering::Relaxed);
    FINISHED.store(FINISHED.load(Ordering::Relaxed) | me, Ordering::Relaxed);
    signal::set_mask(0);
    loop {
        // SAFETY: the test's context waits in `go`.
        unsafe { go(0) };
    }
}

extern "C" fn on_tick(_: Signo, _: *mut SigInfo, context: *mut UContext) {
    // SAFETY: the kernel's context.
    let (sp, ip) = unsafe { ((*context).sp(), (*context).ip()) };
    let me = CURRENT.load(Ordering::Relaxed);
    if BETWEEN.load(Ordering::SeqCst) || me == 0 || FINISHED.load(Ordering::Relaxed) != 0 {
        return;
    }
    // The frame is the interrupted context's: its stack pointer lies just above this handler's own frame.
    let here = &raw const sp as usize;
    assert!(
        (here..here + (64 << 10)).contains(&sp) && ip != 0,
        "sp {sp:#x}, handler at {here:#x}, ip {ip:#x}"
    );
    // SAFETY: the other context is suspended, or was just made.
    unsafe { go(3 - me) };
}

fn contexts_interrupted_at_any_instruction_go_on_with_every_register() {
    let mut stacks = [vec![0u128; 16 << 10], vec![0u128; 16 << 10]];
    for (i, stack) in stacks.iter_mut().enumerate() {
        // SAFETY: a fresh, aligned stack that outlives its context.
        let sp = unsafe { first_frame(stack.as_mut_ptr_range().end as usize, computes) };
        SAVED[i + 1].store(sp, Ordering::Relaxed);
    }
    // SAFETY: the handler acts only while one of the two contexts runs, on that context's own stack.
    unsafe { signal::install(SIGNO, on_tick, HandlerFlags::RESTART_NODEFER) }.expect("a handler");
    let timer = Timer::new(SIGNO).expect("a timer");
    // Long beside a handler, even on an emulated processor: a signal may come in a handler, but not always.
    timer.arm(1_000_000, 1_000_000);
    // SAFETY: context 1 was made and not entered yet.
    unsafe { go(1) };
    let first = FINISHED.load(Ordering::Relaxed);
    // SAFETY: the other one is suspended in its handler.
    unsafe { go(3 - first) };
    timer.arm(0, 0);
    let switches = SWITCHES.load(Ordering::Relaxed);
    println!("{switches} switches");
    assert_eq!((RIGHT.load(Ordering::Relaxed), FINISHED.load(Ordering::Relaxed)), (2, 3));
    assert!(switches > 10, "the contexts were hardly ever interrupted");
}

extern "C" fn lands() -> ! {
    let local = 5u64;
    assert!((&raw const local as usize).is_multiple_of(8));
    println!("landed on another stack");
    // SAFETY: goes back to the test's context, which waits in `go`.
    unsafe { go(0) };
    unreachable!("not resumed")
}

extern "C" fn jumps() -> ! {
    let stack = Vec::leak(vec![0u128; 16 << 10]);
    // SAFETY: a fresh stack; what is on the present one is not used again.
    unsafe { jump_to(stack.as_mut_ptr_range().end as usize, lands) }
}

fn a_jump_leaves_the_stack_for_good() {
    let mut stack = vec![0u128; 16 << 10];
    // SAFETY: as above.
    unsafe {
        SAVED[1].store(first_frame(stack.as_mut_ptr_range().end as usize, jumps), Ordering::Relaxed);
        go(1);
    }
}

/// Other thread-locals for a moment: a copy of the control block that libc made, elsewhere.
fn the_thread_pointer_is_what_was_written_last() {
    let tp = cpu::thread_pointer();
    let mut block = vec![0u128; BLOCK / 16];
    // SAFETY: on either side of the pointer lies this thread's own block; so much of it is mapped, as it is larger than a page.
    unsafe {
        let copy = block.as_mut_ptr() as usize + BLOCK / 2;
        core::ptr::copy_nonoverlapping((tp - 64) as *const u8, (copy - 64) as *mut u8, 64 + 512);
        if cfg!(target_arch = "x86_64") {
            // Its first word is its own address.
            (copy as *mut usize).write(copy);
        }
        let fast = cpu::has_fsgsbase();
        cpu::set_fs_base(copy, fast);
        let seen = cpu::thread_pointer();
        cpu::set_fs_base(tp, fast);
        assert_eq!(seen, copy);
    }
    assert_eq!(cpu::thread_pointer(), tp);
}

fn main() {
    the_thread_pointer_is_what_was_written_last();
    a_jump_leaves_the_stack_for_good();
    contexts_interrupted_at_any_instruction_go_on_with_every_register();
    println!("3 passed, 0 failed");
}
