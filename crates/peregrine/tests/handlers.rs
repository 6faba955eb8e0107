//! A signal handler is the program's: it is there on every node, after a move, a rollback and a resume.

use peregrine::{Builder, checkpoint, migrate_to, node_count, node_id, sleep, tally};
use peregrine_sys::signal::{self, bit, number};
use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const SIGUSR1: i32 = 10;
const SIGUSR2: i32 = 12;

unsafe extern "C" {
    fn signal(signo: i32, handler: usize) -> usize;
    fn sigaction(signo: i32, new: *const Action, old: *mut Action) -> i32;
    fn raise(signo: i32) -> i32;
}

#[repr(C)]
struct Action {
    handler: usize,
    mask: [u64; 16],
    flags: i32,
    restorer: *const c_void,
}

static HEARD: AtomicU32 = AtomicU32::new(0);

extern "C" fn hears(_: i32) {
    HEARD.fetch_add(1, Ordering::Relaxed);
}

fn action(handler: usize, blocked: u64) -> Action {
    let mut mask = [0; 16];
    mask[0] = blocked;
    Action { handler, mask, flags: 0, restorer: std::ptr::null() }
}

fn install(signo: i32) {
    // SAFETY: the handler adds to a static.
    assert_eq!(unsafe { sigaction(signo, &action(hears as *const () as usize, 0), std::ptr::null_mut()) }, 0);
}

/// What the program is told that it does about a signal.
fn asked(signo: i32) -> Action {
    let mut now = action(7, 0);
    // SAFETY: only asks.
    assert_eq!(unsafe { sigaction(signo, std::ptr::null(), &mut now) }, 0);
    now
}

/// The signal, to the process that the caller runs in; how often this thread has heard one.
fn heard(signo: i32) -> u32 {
    // SAFETY: whatever is installed may run here.
    assert_eq!(unsafe { raise(signo) }, 0);
    HEARD.load(Ordering::Relaxed)
}

#[peregrine::test(nodes = 3)]
fn a_handler_goes_with_the_thread_that_installed_it() {
    install(SIGUSR1);
    for n in 1..=9 {
        assert_eq!(heard(SIGUSR1), n);
        migrate_to((node_id() + 1) % node_count()).unwrap();
    }
    // And it is there for threads that begin elsewhere, with statics of their own.
    for node in 0..3 {
        let there = Builder::new().node(node).spawn(|_: ()| heard(SIGUSR1), ()).unwrap();
        assert_eq!(there.join().unwrap(), 1);
    }
    assert_eq!(tally().rollbacks, 0, "no node died of it");
}

#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn a_rollback_brings_back_the_handler_of_the_image_and_takes_back_a_later_one() {
    install(SIGUSR1);
    checkpoint();
    if tally().rollbacks == 0 {
        install(SIGUSR2);
        assert_eq!(heard(SIGUSR2), 1);
        // The other node follows.
        migrate_to((node_id() + 1) % 2).unwrap();
        assert_eq!(heard(SIGUSR2), 2);
        signal::kill(std::process::id() as i32, number::KILL).unwrap();
        sleep(Duration::from_secs(60));
    }
    for _ in 0..4 {
        // SAFETY: nothing is changed.
        let here = |signo| unsafe { signal::change(signo, None) }.unwrap().handler;
        assert_ne!(here(SIGUSR1), 0, "its handler is in force");
        assert_eq!(here(SIGUSR2), 0, "nobody has installed it yet");
        assert_eq!(asked(SIGUSR2).handler, 0);
        let before = HEARD.load(Ordering::Relaxed);
        assert_eq!(heard(SIGUSR1), before + 1);
        migrate_to((node_id() + 1) % 2).unwrap();
    }
    assert_eq!(tally().rollbacks, 1);
}

extern "C" fn hears_after(_: i32) {
    HEARD.fetch_add(1, Ordering::Relaxed);
}

/// The first change after a rollback has the number of the one that was lost, and nodes that followed that one must not take it for
/// the same, whichever comes first there: the change, or a look at the table. So this is tried a few times.
#[peregrine::test(nodes = 4, image_interval_ms = 3_600_000)]
fn a_handler_that_is_installed_right_after_a_rollback_is_not_taken_for_the_lost_one() {
    for round in 0..8 {
        migrate_to(0).unwrap();
        checkpoint();
        if tally().rollbacks == round {
            install(SIGUSR2);
            for node in [2, 3, 1] {
                migrate_to(node).unwrap();
            }
            signal::kill(std::process::id() as i32, number::KILL).unwrap();
            sleep(Duration::from_secs(60));
        }
        let late = action(hears_after as *const () as usize, 0);
        // SAFETY: the handler adds to a static.
        assert_eq!(unsafe { sigaction(SIGUSR2, &late, std::ptr::null_mut()) }, 0);
        for node in [0, 2, 3, 1] {
            migrate_to(node).unwrap();
            // SAFETY: nothing is changed.
            let here = unsafe { signal::change(SIGUSR2, None) }.unwrap().handler;
            assert_eq!(here, hears_after as *const () as usize, "round {round}, node {node}");
        }
        assert_eq!(tally().rollbacks, round + 1);
        // SAFETY: the default.
        assert_eq!(unsafe { signal(SIGUSR2, 0) }, hears_after as *const () as usize);
    }
}

/// Until this node does something about SIGUSR2; nothing of the runtime's is called.
fn computes(started: peregrine::Sender<(u32, u32)>) {
    started.send(&(node_id(), std::process::id())).unwrap();
    // SAFETY: nothing is changed.
    while unsafe { signal::change(SIGUSR2, None) }.unwrap().handler == 0 {}
}

/// Whether the process has a handler for the signal.
fn has_handler(pid: u32, signo: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let caught = status.lines().find_map(|l| l.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(caught.trim(), 16).unwrap() & bit(signo) != 0
}

/// A thread that has its node for itself is interrupted every eight seconds here: twenty changes that it saw no sooner would take longer than
/// the test may.
#[peregrine::test(nodes = 2, slice_us = 1_000_000, image_interval_ms = 3_600_000, timeout_s = 60)]
fn a_node_that_is_seldom_interrupted_has_a_handler_when_another_one_installs_it() {
    let (to, started) = peregrine::channel();
    let lone = Builder::new().node(1).spawn(computes, to).unwrap();
    let (number, its_node) = started.recv().unwrap();
    migrate_to(1 - number).unwrap();
    for _ in 0..20 {
        // As when a slice ends: it finds the thread alone.
        signal::kill(its_node as i32, peregrine_thread::preempt::SIG_TICK).unwrap();
        sleep(Duration::from_millis(5));
    }
    for round in 0..20 {
        let wanted = round % 2 == 0;
        let handler = if wanted { hears as *const () as usize } else { 0 };
        // SAFETY: the handler adds to a static.
        unsafe { signal(SIGUSR1, handler) };
        while has_handler(its_node, SIGUSR1) != wanted {
            sleep(Duration::from_millis(1));
        }
    }
    assert!(!lone.is_finished());
    install(SIGUSR2);
    lone.join().unwrap();
}

#[peregrine::test(nodes = 2)]
fn what_was_asked_for_is_told_as_it_was_asked_for() {
    let all = !0u64 >> 2 & !(3 << 31);
    // SAFETY: the handler adds to a static.
    unsafe {
        assert_eq!(sigaction(SIGUSR1, &action(hears as *const () as usize, all), std::ptr::null_mut()), 0);
        migrate_to((node_id() + 1) % 2).unwrap();
        let now = asked(SIGUSR1);
        assert_eq!((now.handler, now.mask[0]), (hears as *const () as usize, all));
        // A handler that blocks everything is left by the runtime's signals all the same.
        assert_eq!(signal::change(SIGUSR1, None).unwrap().mask & bit(number::RT_BASE), 0);
        assert_eq!(signal(SIGUSR1, 1), hears as *const () as usize);
        assert_eq!(raise(SIGUSR1), 0);
        assert_eq!(signal(SIGUSR1, 0), 1);
        assert_eq!(HEARD.load(Ordering::Relaxed), 0);
    }
}

#[peregrine::test(nodes = 1)]
fn signals_of_libc_and_of_the_runtime_are_refused() {
    let new = action(hears as *const () as usize, 0);
    for signo in [0, -1, 65, 32, 33, number::KILL, number::STOP, number::RT_BASE, number::RT_BASE + 3] {
        // SAFETY: the handler adds to a static.
        assert_eq!(unsafe { sigaction(signo, &new, std::ptr::null_mut()) }, -1, "{signo}");
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(22), "{signo}");
    }
}
