//! Clients that write what no library would into their half of a line, case by case; and that write two things at once.
//!
//! `hostile_client.rs` tries what nobody thought of. Here is what somebody did: each wild word has its own refusal, and nothing is executed;
//! and words that change all the time are read once, for what is checked and what is used would else be two things.

use peregrine_base::sync::{AtomicBool, Ordering};
use peregrine_base::{PAGE_SIZE, PageCount};
use peregrine_call::{DomainBuilder, Invocation};
use peregrine_sys::process::{self, CpuSet};
use peregrine_sys::{futex, memfd};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

mod attack;
use attack::client::{careful, honest_calls, portals};
use attack::raw::{
    CALL, DESCRIPTORS, FromClient, FromDomain, MODE, Memory, PARKED, PAYLOAD, PAYLOAD_AT, PLACE, REPLY,
    STATUS, Socket, TARGET,
};
use attack::scene::serve;

const IN: u64 = 1;
const OUT: u64 = 2;
const INOUT: u64 = 3;
const LEND: u64 = 4;
const GIVE: u64 = 5;

const DONE: u32 = 1;
const PANICKED: u32 = 4;
const NO_PORTAL: u32 = 6;
const MALFORMED: u32 = 7;
const TOO_LARGE: u32 = 8;
const NO_BUFFER: u32 = 10;
const GIFT_IN_USE: u32 = 11;
const STALLED: u32 = 15;

/// Portal 1 is careful, portal 2 must not be reached.
fn guarded(d: DomainBuilder) -> DomainBuilder {
    portals(d).portal("never", 1, |_: &mut Invocation<'_>| process::exit_now(46))
}

/// One connection, and its only line.
struct Raw {
    socket: Socket,
    line: Memory,
    call: u32,
}

impl Raw {
    fn new(path: &std::path::Path) -> Self {
        let socket = Socket::greeted(path).unwrap();
        let (line, _) = socket.open_line().unwrap();
        Self { socket, line, call: 0 }
    }

    /// Registers a page of memory, as a gift or to be lent; its number, and its descriptor.
    fn register(&self, gift: bool) -> (u64, OwnedFd) {
        let memory = memfd::create(c"peregrine-brought", PageCount::new(1), memfd::Pages::Base).unwrap();
        memfd::seal_size(&memory).unwrap();
        let len_bytes = PAGE_SIZE as u64;
        let add = if gift {
            FromClient::AddGift { len_bytes }
        } else {
            FromClient::AddBuffer { len_bytes, results: false }
        };
        match self.socket.ask(&add, Some(memory.as_fd())) {
            Some((FromDomain::Buffer { id }, _)) => (u64::from(id), memory),
            other => panic!("{other:?}"),
        }
    }

    fn write(&self, portal: u64, count: u64, payload: u64, spill: u64, descriptors: &[[u64; 4]]) {
        self.line.set64(TARGET, portal | count << 32);
        self.line.set64(PLACE, 1);
        self.line.set64(PAYLOAD, payload | spill << 32);
        for (i, &[kind, id, len, bound]) in descriptors.iter().enumerate() {
            let at = DESCRIPTORS + 24 * i;
            for (at, word) in [(at, kind | id << 32), (at + 8, len), (at + 16, bound)] {
                self.line.set64(at, word);
            }
        }
    }

    /// Makes the call that is written there; its status.
    fn ring(&mut self) -> u32 {
        self.call += 1;
        self.line.set(CALL, self.call);
        let _ = futex::wake(self.line.word(CALL), 1);
        if self.line.get(MODE) != PARKED {
            self.socket.send(&FromClient::Ring { line: 0 }, None);
        }
        let begun = Instant::now();
        while self.line.get(REPLY) != self.call {
            assert!(begun.elapsed() < Duration::from_secs(20), "no reply");
            std::thread::yield_now();
        }
        self.line.get(STATUS)
    }
}

fn each_wild_word_is_refused_by_its_own_name_and_executes_nothing() -> testkit::Outcome {
    let served = serve(guarded);
    let mut raw = Raw::new(&served.path());
    let (lent, _lent) = raw.register(false);
    let (given, still_writable) = raw.register(true);
    let _mapped = Memory::map(&still_writable, PAGE_SIZE).unwrap();
    let line_bytes = (raw.line.0.len_bytes() - PAYLOAD_AT) as u64;
    let (page, far) = (PAGE_SIZE as u64, u64::MAX - 7);
    // Who is right is served.
    for d in
        [[IN, 0, 100, 0], [OUT, 0, 0, 200], [INOUT, 0, 100, 300], [LEND, 0, 100, 0], [LEND, lent, page, 0]]
    {
        raw.write(1, 1, 100, 0, &[d]);
        assert_eq!(raw.ring(), DONE, "{d:?}");
    }
    let never = |count, payload, spill, d: [u64; 4]| (2, count, payload, spill, d);
    let cases = [
        (NO_PORTAL, (3, 0, 0, 0, [0; 4])),
        (NO_PORTAL, (u64::from(u32::MAX), 0, 0, 0, [0; 4])),
        (MALFORMED, never(9, 0, 0, [OUT, 0, 0, 8])),
        (MALFORMED, never(255, 0, 0, [OUT, 0, 0, 8])),
        (MALFORMED, never(1, 0, 0, [0, 0, 0, 0])),
        (MALFORMED, never(1, 0, 0, [6, 0, 0, 0])),
        // Bytes beyond the payload, though they would lie in the line; beyond both; and so many that their end is before their beginning.
        (MALFORMED, never(1, 100, 0, [IN, 0, 101, 0])),
        (MALFORMED, never(1, 0, 0, [INOUT, 0, 8, 8])),
        (MALFORMED, never(1, 100, 0, [IN, 0, far, 0])),
        (MALFORMED, never(1, 100, 0, [INOUT, 0, u64::MAX, 8])),
        (MALFORMED, never(1, 100, 0, [LEND, 0, 101, 0])),
        (MALFORMED, never(1, 100, 0, [LEND, 0, far, 0])),
        // A payload that is longer than its memory.
        (MALFORMED, never(1, line_bytes + page, 0, [IN, 0, line_bytes + 1, 0])),
        (MALFORMED, never(1, line_bytes + page, 0, [LEND, 0, line_bytes + 1, 0])),
        (MALFORMED, never(1, 2 * page, lent, [LEND, 0, page + 1, 0])),
        (TOO_LARGE, never(1, u64::from(u32::MAX), 0, [IN, 0, 8, 0])),
        // Parts of a buffer that it does not have: a lent part begins where `bound` says.
        (MALFORMED, never(1, 0, 0, [LEND, lent, page + 1, 0])),
        (MALFORMED, never(1, 0, 0, [LEND, lent, 1, page])),
        (MALFORMED, never(1, 0, 0, [LEND, lent, far, 16])),
        (MALFORMED, never(1, 0, 0, [LEND, lent, 16, far])),
        // Buffers that there are not, and gifts as buffers.
        (NO_BUFFER, never(1, 0, 0, [LEND, 77, 8, 0])),
        (NO_BUFFER, never(1, 0, 0, [LEND, given, 8, 0])),
        (NO_BUFFER, never(1, 0, 0, [GIVE, lent, 8, 0])),
        (NO_BUFFER, never(1, 8, 77, [IN, 0, 8, 0])),
        // One that its giver can still write.
        (GIFT_IN_USE, never(1, 0, 0, [GIVE, given, page, 0])),
    ];
    for (status, (portal, count, payload, spill, descriptor)) in cases {
        // As many as there is room for, and one more.
        let several = if count > 1 { 9 } else { 1 };
        raw.write(portal, count, payload, spill, &[descriptor; 9][..several]);
        let case =
            format!("portal {portal}, {count} arguments, payload {payload} in {spill}: {descriptor:?}");
        assert_eq!(raw.ring(), status, "{case}");
        assert!(!served.has_ended(), "{case}");
    }
    // And whoever is right is served as before, on this line too.
    raw.write(1, 1, 100, 0, &[[IN, 0, 100, 0]]);
    assert_eq!(raw.ring(), DONE);
    honest_calls(&served.connect(), 20);
    testkit::Outcome::Passed
}

/// In `TARGET`: the arguments are written after the call; and where it is said how much of them is there.
const IN_PIECES: u64 = 1 << 43;
const WRITTEN: usize = 0x140;

/// Makes a call that says that its arguments will follow; `written` says of how many of them it pretends that they have.
fn promise(raw: &mut Raw, payload: u64, spill: u64, argument: [u64; 4], written: u64) {
    raw.write(1, 1, payload, spill, &[argument]);
    raw.line.set64(TARGET, 1 | 1 << 32 | 1 << 48 | IN_PIECES);
    raw.line.set64(WRITTEN, written);
    raw.call += 1;
    raw.line.set(CALL, raw.call);
    let _ = futex::wake(raw.line.word(CALL), 1);
    if raw.line.get(MODE) != PARKED {
        raw.socket.send(&FromClient::Ring { line: 0 }, None);
    }
}

/// How the last call ended; meanwhile `meanwhile`.
fn outcome(raw: &Raw, meanwhile: impl Fn()) -> u32 {
    let begun = Instant::now();
    while raw.line.get(REPLY) != raw.call {
        assert!(begun.elapsed() < Duration::from_secs(20), "the activation waits for ever");
        meanwhile();
        std::thread::yield_now();
    }
    raw.line.get(STATUS)
}

fn who_promises_arguments_that_never_come_is_refused_and_wears_nobody_out() -> testkit::Outcome {
    let served = serve(|d| guarded(d).activations(1));
    let mut all: Vec<Raw> = (0..4).map(|_| Raw::new(&served.path())).collect();
    for raw in &mut all {
        promise(raw, 100, 0, [IN, 0, 100, 0], 0);
    }
    // Each wants the activation that waits for another.
    std::thread::sleep(Duration::from_millis(200));
    let before = served.cpu_ns();
    std::thread::sleep(Duration::from_millis(400));
    let used = Duration::from_nanos(served.cpu_ns() - before);
    assert!(used < Duration::from_millis(60), "{used:?} of 400 ms for callers that do nothing");
    for raw in &all {
        assert_eq!(outcome(raw, || ()), STALLED);
    }
    honest_calls(&served.connect(), 20);
    testkit::Outcome::Passed
}

fn wild_words_about_what_has_arrived_are_believed_by_nobody() -> testkit::Outcome {
    let served = serve(|d| guarded(d).activations(1));
    let mut raw = Raw::new(&served.path());
    let (page, (lent, _lent)) = (PAGE_SIZE as u64, raw.register(false));
    // All is said to be there, and more than all: what was there before is taken, this client's own.
    for written in [100, 101, 1 << 40, u64::MAX] {
        promise(&mut raw, 100, 0, [IN, 0, 100, 0], written);
        assert_eq!(outcome(&raw, || ()), DONE, "{written:#x}");
        promise(&mut raw, page, lent, [IN, 0, page, 0], written.max(page));
        assert_eq!(outcome(&raw, || ()), DONE, "{written:#x}");
    }
    let line_bytes = (raw.line.0.len_bytes() - PAYLOAD_AT) as u64;
    let cases = [
        (MALFORMED, 100, 0, [IN, 0, 101, 0], u64::MAX),
        (MALFORMED, 100, 0, [IN, 0, u64::MAX - 7, 0], u64::MAX),
        (MALFORMED, line_bytes + page, 0, [IN, 0, line_bytes + 1, 0], u64::MAX),
        (MALFORMED, 2 * page, lent, [INOUT, 0, page + 1, 8], u64::MAX),
        (MALFORMED, 2 * page, lent, [LEND, 0, page + 1, 0], u64::MAX),
        (MALFORMED, 0, 0, [GIVE, 0, page, 0], u64::MAX),
        (TOO_LARGE, u64::from(u32::MAX), 0, [IN, 0, 8, 0], u64::MAX),
        (STALLED, 100, 0, [IN, 0, 100, 0], 99),
        (STALLED, page, lent, [IN, 0, page, 0], page - 1),
        (STALLED, page, lent, [LEND, 0, 8, 0], page - 1),
    ];
    for (status, payload, spill, argument, written) in cases {
        promise(&mut raw, payload, spill, argument, written);
        let case = format!("payload {payload} in {spill}: {argument:?}, {written:#x} written");
        assert_eq!(outcome(&raw, || ()), status, "{case}");
        assert!(!served.has_ended(), "{case}");
    }
    // Byte by byte, and back again, so that there is always something new.
    promise(&mut raw, 100, 0, [IN, 0, 100, 0], 0);
    let (word, turn) = (raw.line.word64(WRITTEN), std::cell::Cell::new(0u64));
    let creep = || {
        turn.set(turn.get() + 1);
        word.store(turn.get() % 100, Ordering::Relaxed);
    };
    assert_eq!(outcome(&raw, creep), STALLED);
    // And whoever is right is served as before, on this line too.
    raw.write(1, 1, 100, 0, &[[IN, 0, 100, 0]]);
    assert_eq!(raw.ring(), DONE);
    honest_calls(&served.connect(), 20);
    testkit::Outcome::Passed
}

/// The word at `at` is `right` and `wild` in turns, as fast as a core can, while calls are made; how they ended, by status.
fn while_a_word_changes(raw: &mut Raw, at: usize, right: u64, wild: u64, calls: u32) -> [u32; 16] {
    let is_over = AtomicBool::new(false);
    let mut ended = [0; 16];
    let word = raw.line.word64(at).as_ptr().expose_provenance();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: the line outlives this thread.
            let word = unsafe {
                peregrine_base::sync::AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(word))
            };
            while !is_over.load(Ordering::Relaxed) {
                for _ in 0..64 {
                    word.store(wild, Ordering::Relaxed);
                    word.store(right, Ordering::Relaxed);
                }
            }
        });
        for _ in 0..calls {
            ended[raw.ring() as usize % 16] += 1;
        }
        is_over.store(true, Ordering::Relaxed);
    });
    ended
}

fn words_that_change_all_the_time_are_read_once() -> testkit::Outcome {
    if CpuSet::current().unwrap().iter().count() < 2 {
        testkit::skip!("needs two processors");
    }
    let served = serve(guarded);
    let mut raw = Raw::new(&served.path());
    let (lent, _lent) = raw.register(false);
    let (length, bound) = (DESCRIPTORS + 8, DESCRIPTORS + 16);
    let far = 1 << 40;
    // For each: the call, and which of its words changes, from what to what.
    let page = PAGE_SIZE as u64;
    let cases = [
        ([IN, 0, 100, 0], length, 100, far),
        ([INOUT, 0, 100, 300], length, 100, far),
        ([LEND, 0, 100, 0], length, 100, far),
        ([LEND, lent, 100, 0], length, 100, far),
        ([LEND, lent, 100, 0], bound, 0, page - 50),
        ([LEND, lent, 100, 0], DESCRIPTORS, LEND | lent << 32, LEND),
        ([IN, 0, 100, 0], DESCRIPTORS, IN, LEND),
        ([LEND, 0, 100, 0], DESCRIPTORS, LEND, GIVE | 77 << 32),
        ([OUT, 0, 0, 200], DESCRIPTORS, OUT, INOUT),
        ([IN, 0, 100, 0], PAYLOAD, 100, u64::from(u32::MAX)),
        ([LEND, 0, 100, 0], PAYLOAD, 100, 90 | lent << 32),
        ([IN, 0, 100, 0], TARGET, 1 | 1 << 32, 1 | 200 << 32),
        ([IN, 0, 100, 0], TARGET, 1 | 1 << 32, 1 | 0xff01 << 32),
        ([IN, 0, 100, 0], TARGET, 1 | 1 << 32, 77 | 1 << 32),
    ];
    for (descriptor, at, right, wild) in cases {
        raw.write(1, 1, 100, 0, &[descriptor]);
        let case = format!("{descriptor:?}, word {at:#x}: {right:#x} or {wild:#x}");
        let ended = while_a_word_changes(&mut raw, at, right, wild, 1500);
        assert!(!served.has_ended(), "{case}");
        assert_eq!(ended[PANICKED as usize], 0, "a handler was given what was not checked: {case}");
        println!("{case}: {ended:?} by status");
    }
    honest_calls(&served.connect(), 20);
    testkit::Outcome::Passed
}

/// The bytes of arguments change all the time, and no handler sees that of those that are its own.
fn arguments_that_change_all_the_time_stand_still_for_their_handler() -> testkit::Outcome {
    if CpuSet::current().unwrap().iter().count() < 2 {
        testkit::skip!("needs two processors");
    }
    // `careful` looks twice.
    let served =
        serve(|d| d.portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())).portal("careful", 1, careful));
    let mut raw = Raw::new(&served.path());
    raw.write(1, 2, 2000, 0, &[[IN, 0, 1000, 0], [INOUT, 0, 900, 1000]]);
    for at in [PAYLOAD_AT, PAYLOAD_AT + 1008] {
        let ended = while_a_word_changes(&mut raw, at.next_multiple_of(8), 0, u64::MAX, 1500);
        assert!(!served.has_ended(), "a handler saw its arguments change");
        assert_eq!(ended[DONE as usize], 1500, "{ended:?}");
    }
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        each_wild_word_is_refused_by_its_own_name_and_executes_nothing,
        who_promises_arguments_that_never_come_is_refused_and_wears_nobody_out,
        wild_words_about_what_has_arrived_are_believed_by_nobody,
        words_that_change_all_the_time_are_read_once,
        arguments_that_change_all_the_time_stand_still_for_their_handler,
    ])
}
