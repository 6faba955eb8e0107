//! A pause: what a node does at a safe point that the supervisor asked for.

use crate::control::{PauseKind, World, node, record, state, wait};
use crate::killpoint::{Point, at};
use crate::local::Local;
use crate::windows;
use peregrine_base::sync::Ordering;
use peregrine_sys::futex;
use peregrine_thread::carrier::Carrier;
use peregrine_thread::stack_kind::is_windowed;
use peregrine_thread::statics;
use peregrine_thread::template::template;

/// Obeys a pause: saves the window, reports what was written, and waits.
///
/// # Safety
/// No thread runs on this node.
pub(super) unsafe fn pause(c: &mut Carrier, l: &mut Local, w: &World, word: u32) {
    let me = node(c.node);
    at(Point::PauseSeen);
    let rolling_back = w.pause_kind.load(Ordering::Acquire) == PauseKind::Rollback as u32;
    // SAFETY: as promised.
    unsafe {
        statics::save(c, template());
        if !rolling_back {
            windows::store_all(c, l);
        }
    }
    at(Point::PauseSaved);
    let life = w.life.load(Ordering::Acquire);
    if l.life != life && !rolling_back {
        statics::forget(c);
        rebuild(c, l);
        at(Point::RebuildDone);
        crate::dispositions::look_again(l);
        l.life = life;
    }
    // Whoever holds anything of the life that ends waits for its reset (which empties `life`) before it answers.
    let answer = !rolling_back || l.life == 0;
    if answer && me.paused.load(Ordering::Relaxed) != word {
        crate::fresh::tell_all(l, c.node);
        crate::dirty::report(c.node, &mut l.scanned);
        at(Point::PauseReported);
        // Release: the supervisor, which acquires, sees statics and the report.
        me.paused.store(word, Ordering::Release);
        at(Point::PauseAnswered);
        w.acks.fetch_add(1, Ordering::Release);
        let _ = futex::wake(&w.acks, 1);
        at(Point::PauseAcked);
    }
    while w.pause.load(Ordering::Acquire) == word {
        futex::wait(&w.pause, word, None);
    }
    at(Point::PauseOver);
    super::lend::take_back_after_pause(c.node, l, rolling_back);
}

/// Fills queue and timers from the records. Only in a pause: a thread that another node already runs could arrive here
/// meanwhile and be queued twice.
fn rebuild(c: &mut Carrier, l: &mut Local) {
    l.clear();
    at(Point::RebuildBegins);
    for (i, slot) in crate::control::numbers().enumerate() {
        let r = record(slot);
        if i == 3 {
            at(Point::RebuildHalf);
        }
        if r.node.load(Ordering::Relaxed) != c.node {
            continue;
        }
        match r.state.load(Ordering::Relaxed) {
            state::RUNNABLE => l.push(slot),
            state::SLEEPING => {
                l.add_timer(r.wake_at.load(Ordering::Relaxed), slot, r.waits.load(Ordering::Relaxed));
            }
            state::PARKED if r.waiting.load(Ordering::Relaxed) == wait::CALL => {
                // Its call was another life's: it is to see that.
                r.state.store(state::RUNNABLE, Ordering::Relaxed);
                l.push(slot);
            }
            _ => {}
        }
        if is_windowed(slot) {
            l.windows.note_idle(slot);
        }
    }
}
