//! Hostile clients, briefly. `soak call` attacks for as long as one likes.

use peregrine_base::PageCount;
use peregrine_call::{Call, CallError};
use peregrine_sys::{memfd, rustix};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

mod attack;
use attack::client::{back_to, fuzz, honest_calls, portals};
use attack::raw::{
    CALL, DEADLINE, DESCRIPTORS, FromClient, FromDomain, MODE, Memory, PARKED, PAYLOAD, PLACE, REPLY, SHORT,
    SHORT_PAYLOAD_AT, STATUS, Socket, TARGET,
};
use attack::scene::serve;

fn a_hostile_client_hurts_only_itself() -> testkit::Outcome {
    let seed = seed();
    println!("seed {seed:#x}");
    fuzz(seed, 6, 3000);
    testkit::Outcome::Passed
}

/// `PEREGRINE_SEED` repeats a run.
fn seed() -> u64 {
    let given = std::env::var("PEREGRINE_SEED").ok();
    given.and_then(|s| s.parse().ok()).unwrap_or_else(|| u64::from(std::process::id()) * 0x9e37)
}

fn a_client_that_never_reads_is_dropped_and_others_are_served() -> testkit::Outcome {
    let served = serve(portals);
    let honest = served.connect();
    honest_calls(&honest, 10);
    let before = served.holdings();
    let socket = Socket::greeted(&served.path()).unwrap();
    let begun = Instant::now();
    // Its answers fill the buffer; then it is dismissed, which its sends notice.
    let mut sent = 0u32;
    while begun.elapsed() < Duration::from_secs(30) {
        if socket.send(&FromClient::Usage, None) {
            sent += 1;
        } else if rustix::net::send(
            &socket.0,
            b"x",
            rustix::net::SendFlags::NOSIGNAL | rustix::net::SendFlags::DONTWAIT,
        )
        .is_err_and(|e| e == rustix::io::Errno::PIPE)
        {
            break;
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "it was never dropped; {sent} sent");
    honest_calls(&honest, 100);
    drop(socket);
    back_to(&served, before);
    testkit::Outcome::Passed
}

fn a_client_that_only_rings_is_dropped() -> testkit::Outcome {
    let served = serve(portals);
    let socket = Socket::greeted(&served.path()).unwrap();
    socket.open_line().unwrap();
    let begun = Instant::now();
    loop {
        let ring = postcard::to_stdvec(&FromClient::Ring { line: 0 }).unwrap();
        let flags = rustix::net::SendFlags::NOSIGNAL;
        if rustix::net::send(&socket.0, &ring, flags).is_err() {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "rings in vain are not counted");
    }
    honest_calls(&served.connect(), 100);
    testkit::Outcome::Passed
}

fn one_clients_memory_is_not_anothers() -> testkit::Outcome {
    let served = serve(portals);
    let (one, other) = (served.connect(), served.connect());
    let echo = one.portal("echo", 1).unwrap();
    let secret = [0xA5u8; 3000];
    let mut out = Vec::new();
    for _ in 0..10 {
        one.call(echo, Call::new().input(&secret).output(&mut out, 4096)).unwrap();
    }
    drop(one);
    // A stranger's line, and results that a handler leaves short, hold nothing of it.
    let socket = Socket::greeted(&served.path()).unwrap();
    let (memory, fd) = socket.open_line().unwrap();
    assert!((0..memory.0.len_bytes() / 4).all(|i| memory.get(4 * i) == 0), "a new line is zeros");
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_mode & 0o777, 0o600);
    honest_calls(&other, 20);
    let careful = other.portal("careful", 1).unwrap();
    other.call(careful, Call::new().output(&mut out, 4096)).unwrap();
    assert!(out.iter().all(|&b| b == 1));
    let refused = other.call(careful, Call::new().output(&mut out, 10));
    assert!(matches!(refused, Err(CallError::TooLarge { .. })));
    testkit::Outcome::Passed
}

fn a_call_refused_at_a_later_argument_leaves_nothing_of_the_earlier_ones() -> testkit::Outcome {
    const LEND: u64 = 4;
    const GIVE: u64 = 5;
    const MALFORMED: u32 = 7;
    let served = serve(portals);
    let honest = served.connect();
    honest_calls(&honest, 10);
    let before = served.holdings();
    for (kind, register) in [
        (LEND, FromClient::AddBuffer { len_bytes: 4096, results: false }),
        (GIVE, FromClient::AddGift { len_bytes: 4096 }),
    ] {
        let socket = Socket::greeted(&served.path()).unwrap();
        let (line, _) = socket.open_line().unwrap();
        let brought = memfd::create(c"peregrine-brought", PageCount::new(1), memfd::Pages::Base).unwrap();
        memfd::seal_size(&brought).unwrap();
        let (FromDomain::Buffer { id }, _) = socket.ask(&register, Some(brought.as_fd())).unwrap() else {
            panic!("a buffer")
        };
        // Two arguments for portal 1: the memory, open by the time that the second is seen to be of no kind.
        line.set64(TARGET, 1 | 2 << 32);
        line.set64(PLACE, 1);
        for (at, word) in [(0, kind | u64::from(id) << 32), (8, 4096), (16, 0), (24, 77)] {
            line.set64(DESCRIPTORS + at, word);
        }
        line.set(CALL, 1);
        socket.send(&FromClient::Ring { line: 0 }, None);
        let begun = Instant::now();
        while line.get(REPLY) != 1 {
            assert!(begun.elapsed() < Duration::from_secs(10), "no reply");
            std::thread::yield_now();
        }
        assert_eq!(line.get(STATUS), MALFORMED);
        drop((socket, line));
        back_to(&served, before);
    }
    testkit::Outcome::Passed
}

fn memory_that_its_giver_keeps_is_not_taken_for_a_gift() -> testkit::Outcome {
    const GIVE: u64 = 5;
    const GIFT_IN_USE: u32 = 11;
    const DONE: [u32; 2] = [1, 14];
    const LEN: u64 = 4096;
    let served = serve(|d| {
        portals(d).portal("keep", 1, |call: &mut peregrine_call::Invocation<'_>| {
            let given = call.take_given(0)?;
            assert_eq!(given.len() as u64, LEN);
            Ok(())
        })
    });
    let honest = served.connect();
    honest_calls(&honest, 10);
    let before = served.holdings();
    let socket = Socket::greeted(&served.path()).unwrap();
    let (line, _) = socket.open_line().unwrap();
    let mut call = 0;
    let mut gives = |fd: &std::os::fd::OwnedFd| {
        let add = FromClient::AddGift { len_bytes: LEN };
        let (FromDomain::Buffer { id }, _) = socket.ask(&add, Some(fd.as_fd())).unwrap() else {
            panic!("a gift")
        };
        // One argument for portal 2.
        line.set64(TARGET, 2 | 1 << 32);
        line.set64(PLACE, 1);
        for (at, word) in [(0, GIVE | u64::from(id) << 32), (8, LEN), (16, 0)] {
            line.set64(DESCRIPTORS + at, word);
        }
        call += 1;
        socket.call(&line, call, std::thread::yield_now)
    };
    let memory = || {
        let fd = memfd::create(c"peregrine-brought", PageCount::new(1), memfd::Pages::Base).unwrap();
        memfd::seal_size(&fd).unwrap();
        fd
    };
    let kept = memory();
    let mapped = Memory::map(&kept, LEN as usize).unwrap();
    assert_eq!(gives(&kept), GIFT_IN_USE, "mapped, to be rewritten under its owner");
    drop(mapped);
    // The descriptor alone is of no use: from here on nobody writes.
    let held = memory();
    rustix::io::pwrite(&held, &[7], 0).unwrap();
    assert!(DONE.contains(&gives(&held)));
    assert!(rustix::io::pwrite(&held, &[8], 0).is_err() && Memory::map(&held, LEN as usize).is_none());
    assert!(rustix::fs::ftruncate(&held, 0).is_err());
    drop((socket, line));
    back_to(&served, before);
    testkit::Outcome::Passed
}

fn the_limits_hold_whatever_a_client_thinks_of_them() -> testkit::Outcome {
    const TOO_LARGE: u32 = 8;
    const TOO_DEEP: u32 = 9;
    const ACCESS: u32 = 5;
    let served = serve(|d| {
        portals(d).portal_for(
            "secret",
            1,
            peregrine_call::Access::Users(vec![12_345]),
            |_: &mut peregrine_call::Invocation<'_>| peregrine_sys::process::exit_now(44),
        )
    });
    let socket = Socket::greeted(&served.path()).unwrap();
    let (line, _) = socket.open_line().unwrap();
    let mut call = 0;
    let mut status = |target: u64, depth: u64, payload: u64| {
        call += 1;
        line.set64(TARGET, target);
        line.set64(PLACE, depth);
        line.set64(PAYLOAD, payload);
        socket.call(&line, call, std::thread::yield_now)
    };
    // More bytes than it takes, a deeper chain, and a portal that is not for us, asked for by its number.
    assert_eq!(status(1, 1, (1 << 20) + 1), TOO_LARGE);
    assert_eq!(status(1, 65, 0), TOO_DEEP);
    assert_eq!(status(2, 1, 0), ACCESS);
    // As many lines, and as much memory, as it allows.
    for _ in 1..4 {
        socket.open_line().expect("up to four");
    }
    assert!(socket.open_line().is_none(), "a fifth line");
    let mut held = Vec::new();
    // Four MiB in all, whatever it is for; a refused one takes nothing.
    let pages = |n| {
        let memory = memfd::create(c"peregrine-brought", PageCount::new(n), memfd::Pages::Base).unwrap();
        memfd::seal_size(&memory).unwrap();
        memory
    };
    let (three, two, one) = (pages(768), pages(512), pages(256));
    for (gift, memory, mib, fits) in [
        (false, &three, 3, true),
        (false, &two, 2, false),
        (true, &two, 2, false),
        (true, &one, 1, true),
        (false, &one, 1, false),
    ] {
        let len_bytes = mib << 20;
        let add = if gift {
            FromClient::AddGift { len_bytes }
        } else {
            FromClient::AddBuffer { len_bytes, results: false }
        };
        let (answer, _) = socket.ask(&add, Some(memory.as_fd())).unwrap();
        assert_eq!(matches!(answer, FromDomain::Buffer { .. }), fits, "{mib} MiB, gift {gift}: {answer:?}");
        if let FromDomain::Buffer { id } = answer {
            held.push(id);
        }
    }
    for buffer in held.drain(..) {
        socket.send(&FromClient::Forget { buffer }, None);
    }
    let mut held = Vec::new();
    for n in 0..9 {
        let memory = memfd::create(c"peregrine-brought", PageCount::new(1), memfd::Pages::Base).unwrap();
        memfd::seal_size(&memory).unwrap();
        let add = FromClient::AddBuffer { len_bytes: 4096, results: false };
        let (answer, _) = socket.ask(&add, Some(memory.as_fd())).unwrap();
        assert_eq!(matches!(answer, FromDomain::Buffer { .. }), n < 8, "buffer {n}: {answer:?}");
        held.push(memory);
    }
    testkit::Outcome::Passed
}

/// Makes call number `call` of the short form, and waits for its status; `meanwhile` is done as long as there is none.
fn short_call(
    socket: &Socket,
    line: &Memory,
    (call, portal, count): (u32, u64, u64),
    words: [u32; 4],
    meanwhile: impl FnMut(),
) -> u32 {
    let [a, b, c, d] = words.map(u64::from);
    line.set64(TARGET, portal | count << 32 | SHORT);
    line.set64(DEADLINE, a | b << 32);
    line.set64(PAYLOAD, c | d << 32);
    socket.call(line, call, meanwhile)
}

fn the_short_form_of_a_call_is_checked_each_time_its_header_changes() -> testkit::Outcome {
    const DONE: [u32; 2] = [1, 14];
    const ACCESS: u32 = 5;
    const MALFORMED: u32 = 7;
    const TOO_LARGE: u32 = 8;
    const TOO_DEEP: u32 = 9;
    const NO_BUFFER: u32 = 10;
    const IN: u32 = 1;
    const OUT: u32 = 2;
    const LEND: u32 = 4;
    let served = serve(|d| {
        portals(d).portal_for(
            "secret",
            1,
            peregrine_call::Access::Users(vec![12_345]),
            |_: &mut peregrine_call::Invocation<'_>| peregrine_sys::process::exit_now(44),
        )
    });
    let socket = Socket::greeted(&served.path()).unwrap();
    let (line, _) = socket.open_line().unwrap();
    let memory = memfd::create(c"peregrine-brought", PageCount::new(1), memfd::Pages::Base).unwrap();
    memfd::seal_size(&memory).unwrap();
    let add = FromClient::AddBuffer { len_bytes: 4096, results: false };
    let (FromDomain::Buffer { id }, _) = socket.ask(&add, Some(memory.as_fd())).unwrap() else {
        panic!("a buffer")
    };
    let mut number = 0;
    let mut call = |portal, count, words: [u32; 4]| {
        number += 1;
        short_call(&socket, &line, (number, portal, count), words, std::thread::yield_now)
    };
    line.set64(PLACE, 1);
    let (eight, result) = (IN | 8 << 3, OUT | 100 << 3);
    let lend = |id: u32, from: u32, len: u32| [LEND | id << 3, from, len, OUT | 100 << 3];
    for _ in 0..20 {
        // Right ones twice, so that the second is known; and what differs from it in one word.
        for _ in 0..2 {
            assert!(DONE.contains(&call(0, 2, [eight, result, 0, 0])));
        }
        assert_eq!(call(2, 2, [eight, result, 0, 0]), ACCESS);
        assert_eq!(call(1, 2, [eight, 0, 0, 0]), MALFORMED, "an argument of no kind");
        assert_eq!(call(1, 5, [eight; 4]), MALFORMED, "more arguments than words");
        assert_eq!(call(1, 2, [eight, IN | 40_000 << 3, 0, 0]), MALFORMED, "beyond the line");
        assert_eq!(call(1, 2, [eight, IN | u32::MAX << 3, 0, 0]), TOO_LARGE);
        assert_eq!(call(1, 1, lend(id + 1, 0, 10)), NO_BUFFER);
        assert_eq!(call(1, 2, lend(id, 4000, 97)), MALFORMED, "beyond the buffer");
        assert_eq!(call(1, 2, lend(id, u32::MAX, u32::MAX)), MALFORMED);
        for _ in 0..2 {
            assert!(DONE.contains(&call(1, 1, lend(id, 4000, 96))));
        }
        line.set64(PLACE, 65);
        assert_eq!(call(0, 2, [eight, result, 0, 0]), TOO_DEEP);
        line.set64(PLACE, 1);
    }
    // Taken back, it is lent no more, though the header is the one that was known.
    assert!(DONE.contains(&call(1, 1, lend(id, 0, 96))));
    socket.send(&FromClient::Forget { buffer: id }, None);
    socket.ask(&FromClient::Usage, None).unwrap();
    assert_eq!(call(1, 1, lend(id, 0, 96)), NO_BUFFER);
    testkit::Outcome::Passed
}

fn what_was_taken_back_is_lent_no_more_though_its_activation_never_slept() -> testkit::Outcome {
    const NO_BUFFER: u32 = 10;
    /// In the high half of `TARGET`: the caller is on another core, on purpose.
    const APART: u64 = 1 << 16;
    let spin = Duration::from_secs(60);
    let limits = peregrine_call::Limits { spin, ..peregrine_call::Limits::default() };
    let served = serve(|d| {
        d.activations(1)
            .limits(limits)
            .portal("lent", 1, |call: &mut peregrine_call::Invocation<'_>| call.lent(0).map(drop))
    });
    if peregrine_sys::process::CpuSet::current().unwrap().iter().count() < 2 {
        return testkit::Outcome::Skipped("one core".into());
    }
    let socket = Socket::greeted(&served.path()).unwrap();
    let (line, _) = socket.open_line().unwrap();
    let memory = memfd::create(c"peregrine-brought", PageCount::new(1), memfd::Pages::Base).unwrap();
    memfd::seal_size(&memory).unwrap();
    let add = FromClient::AddBuffer { len_bytes: 4096, results: false };
    let (FromDomain::Buffer { id }, _) = socket.ask(&add, Some(memory.as_fd())).unwrap() else {
        panic!("a buffer")
    };
    // On core 0, by its word; the activation goes to another.
    line.set64(PLACE, 1);
    let lend = [4 | id << 3, 0, 96, 0];
    let call = |number| short_call(&socket, &line, (number, 0, 1 | APART), lend, std::thread::yield_now);
    for number in 1..=20 {
        assert!([1, 14].contains(&call(number)));
    }
    assert_ne!(line.get(MODE), PARKED, "it looks for the next call");
    socket.send(&FromClient::Forget { buffer: id }, None);
    socket.ask(&FromClient::Usage, None).unwrap();
    assert_ne!(line.get(MODE), PARKED, "and did so all the time");
    assert_eq!(call(21), NO_BUFFER);
    testkit::Outcome::Passed
}

fn the_arguments_of_a_short_call_stand_still_for_their_handler() -> testkit::Outcome {
    const IN: u32 = 1;
    const PANICKED: u32 = 4;
    let served = serve(|d| {
        d.activations(2).portal("still", 1, |call: &mut peregrine_call::Invocation<'_>| {
            let first = call.input(0)?.to_vec();
            for _ in 0..200 {
                assert!(call.input(0)? == first, "it changed under its handler");
                std::thread::yield_now();
            }
            Ok(())
        })
    });
    let socket = Socket::greeted(&served.path()).unwrap();
    let (line, _) = socket.open_line().unwrap();
    line.set64(PLACE, 1);
    let mut scribble = 0;
    for call in 1..=200 {
        let status = short_call(&socket, &line, (call, 0, 1), [IN | 64 << 3, 0, 0, 0], || {
            scribble += 1;
            for at in (SHORT_PAYLOAD_AT..SHORT_PAYLOAD_AT + 64).step_by(8) {
                line.set64(at, scribble);
            }
            line.set64(DEADLINE, scribble);
        });
        assert_ne!(status, PANICKED, "call {call}");
    }
    testkit::Outcome::Passed
}

/// What a client sends must not make the keeper wait when it is closed: here sockets that linger for a minute.
fn descriptors_that_are_slow_to_close_delay_nobody_else() -> testkit::Outcome {
    let served = serve(portals);
    let honest = served.connect();
    honest_calls(&honest, 10);
    let before = served.holdings();
    let begun = Instant::now();
    let mut readers = Vec::new();
    for way in 0..6 {
        let (slow, reader) = testkit::lingering();
        readers.push(reader);
        let connect = if way < 2 { Socket::greeted } else { Socket::connect };
        let socket = connect(&served.path()).unwrap();
        // Stopped until we have let go of it: the last to close it is who waits.
        served.stop();
        let gift = FromClient::AddGift { len_bytes: 4096 };
        assert!(match way {
            // In place of memory; where none is expected; as the first thing said, with nonsense, and with nothing.
            0 | 2 => socket.send(&gift, Some(slow.as_fd())),
            1 => socket.send(&FromClient::Usage, Some(slow.as_fd())),
            3 => socket.send_bytes(&[77; 30], Some(slow.as_fd())),
            4 => socket.send_bytes(&[], Some(slow.as_fd())),
            // Never read: behind what has the client dismissed.
            _ =>
                socket.send_bytes(&[77; 30], None)
                    && socket.send_bytes(&[], None)
                    && socket.send_bytes(&[], Some(slow.as_fd())),
        });
        drop(slow);
        served.go_on();
        // Dismissed: its end is told, though what it sent is not closed yet.
        while rustix::net::send(&socket.0, b"x", rustix::net::SendFlags::NOSIGNAL).is_ok() {
            assert!(begun.elapsed() < Duration::from_secs(40), "way {way}: it was never dismissed");
            std::thread::sleep(Duration::from_millis(1));
        }
        // Questions that only the keeper answers.
        served.connect().usage().unwrap();
    }
    honest_calls(&honest, 100);
    assert!(begun.elapsed() < Duration::from_secs(40), "somebody waited: {:?}", begun.elapsed());
    drop(readers);
    back_to(&served, before);
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_hostile_client_hurts_only_itself,
        a_client_that_never_reads_is_dropped_and_others_are_served,
        a_client_that_only_rings_is_dropped,
        a_call_refused_at_a_later_argument_leaves_nothing_of_the_earlier_ones,
        memory_that_its_giver_keeps_is_not_taken_for_a_gift,
        the_limits_hold_whatever_a_client_thinks_of_them,
        the_short_form_of_a_call_is_checked_each_time_its_header_changes,
        what_was_taken_back_is_lent_no_more_though_its_activation_never_slept,
        the_arguments_of_a_short_call_stand_still_for_their_handler,
        one_clients_memory_is_not_anothers,
        descriptors_that_are_slow_to_close_delay_nobody_else,
    ])
}
