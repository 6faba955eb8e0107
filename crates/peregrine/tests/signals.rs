//! What a thread blocks is its own: others on its node do not, and it goes where the thread goes.

use peregrine::{Builder, checkpoint, migrate_to, node_id, sleep, spawn, tally, yield_now};
use peregrine_sys::signal::{self, bit, number};
use std::time::{Duration, Instant};

const USR1: u64 = bit(10);
const USR2: u64 = bit(12);
const BLOCK: i32 = 0;
const UNBLOCK: i32 = 1;
const SETMASK: i32 = 2;

/// C's `sigset_t`.
type Set = [u64; 16];

unsafe extern "C" {
    fn pthread_sigmask(how: i32, new: *const Set, old: *mut Set) -> i32;
    fn sigprocmask(how: i32, new: *const Set, old: *mut Set) -> i32;
    fn sigsuspend(set: *const Set) -> i32;
}

fn set(word: u64) -> Set {
    let mut set = [0; 16];
    set[0] = word;
    set
}

/// Changes the mask, and tells the old one.
fn change(how: i32, word: u64) -> u64 {
    let (new, mut old) = (set(word), set(0));
    // SAFETY: C's function on sets of this frame.
    assert_eq!(unsafe { pthread_sigmask(how, &new, &mut old) }, 0);
    old[0]
}

/// What the kernel says that this process blocks.
fn in_force() -> u64 {
    signal::block(0)
}

fn keeps_its_own(own: u64) {
    assert_eq!(change(BLOCK, own), 0, "a thread begins with everything open");
    for i in 0..200 {
        assert_eq!(in_force(), own);
        match i % 4 {
            0 => yield_now(),
            1 => sleep(Duration::from_micros(50)),
            2 => migrate_to((node_id() + 1) % 2).unwrap(),
            _ => {
                let begun = Instant::now();
                while begun.elapsed() < Duration::from_micros(300) {
                    std::hint::spin_loop();
                }
            }
        }
        assert_eq!(in_force(), own, "after {i}");
    }
    assert_eq!(change(UNBLOCK, own), own);
    yield_now();
    assert_eq!(in_force(), 0);
}

fn checks(kind: &str) {
    let of_kind = || Builder::new().kind(kind.parse().unwrap());
    let all: Vec<_> = [USR1, 0, USR2, USR1 | USR2, 0]
        .into_iter()
        .map(|own| of_kind().spawn(keeps_its_own, own).unwrap())
        .collect();
    all.into_iter().for_each(|h| h.join().unwrap());
    assert_eq!(in_force(), 0);
}

#[peregrine::test(nodes = 2, slice_us = 100, move_every_ms = 3)]
fn a_thread_blocks_what_it_asked_for_wherever_it_is_and_nobody_elses_does() {
    checks("isomalloc");
    checks("alias");
    checks("copy");
}

#[peregrine::test(nodes = 2, image_interval_ms = 5)]
fn an_image_holds_what_a_thread_blocks() {
    let h = spawn(
        |_: ()| {
            change(BLOCK, USR2);
            checkpoint();
            if tally().rollbacks == 0 {
                signal::kill(std::process::id() as i32, number::KILL).unwrap();
                sleep(Duration::from_secs(60));
            }
            (in_force(), change(SETMASK, 0))
        },
        (),
    );
    assert_eq!(h.join().unwrap(), (USR2, USR2));
    assert!(tally().rollbacks > 0);
}

#[peregrine::test(nodes = 1, image_interval_ms = 5, timeout_s = 60)]
fn a_thread_that_blocks_everything_is_preempted_and_imaged_all_the_same() {
    let done = std::env::temp_dir().join(format!("peregrine-blocks-{}", std::process::id()));
    let hog = spawn(
        |done: std::path::PathBuf| {
            change(SETMASK, !0);
            // Libc keeps two for itself, and the kernel lets nobody block two.
            let all = !(3 << 31 | bit(number::KILL) | bit(number::STOP));
            assert_eq!(change(BLOCK, 0), all, "it is told what it asked for");
            // Nothing in here asks the runtime.
            while !done.exists() {
                std::hint::spin_loop();
            }
        },
        done.clone(),
    );
    // On the only node: it runs if the hog is preempted, and goes on if an image is taken.
    for _ in 0..3 {
        sleep(Duration::from_millis(1));
        checkpoint();
    }
    std::fs::write(&done, b"").unwrap();
    hog.join().unwrap();
    std::fs::remove_file(&done).unwrap();
    assert_eq!(in_force(), 0, "what an ended thread blocked is not left behind");
}

#[peregrine::test(nodes = 1, image_interval_ms = 5, timeout_s = 60)]
fn a_thread_that_waits_for_one_signal_does_not_hold_off_the_others() {
    let waiter = spawn(
        |_: ()| {
            change(BLOCK, USR1);
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(100) {
                // Everything but one, as programs do. It comes back for whatever has a handler, the tick among them.
                // SAFETY: C's function on a set of this frame.
                assert_eq!(unsafe { sigsuspend(&set(!USR1)) }, -1);
            }
            assert_eq!(in_force(), USR1);
        },
        (),
    );
    for _ in 0..3 {
        sleep(Duration::from_millis(1));
        checkpoint();
    }
    waiter.join().unwrap();
}

#[peregrine::test(nodes = 1)]
fn nonsense_is_refused_as_libc_refuses_it() {
    let none = set(0);
    // SAFETY: C's functions on sets of this frame.
    unsafe {
        assert_eq!(pthread_sigmask(7, &none, std::ptr::null_mut()), 22);
        assert_eq!(sigprocmask(7, &none, std::ptr::null_mut()), -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(22));
        assert_eq!(sigprocmask(7, std::ptr::null(), std::ptr::null_mut()), 0, "nothing is asked for");
    }
}
