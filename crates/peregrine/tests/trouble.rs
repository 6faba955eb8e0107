//! What goes wrong, goes wrong as promised: it is named, it stays where it is, and the others go on.

use peregrine::{
    Builder, JoinError, Receiver, RecvError, SendError, Sender, StackKind, channel, node_count, sleep, spawn,
};
use std::io::Write;
use std::time::{Duration, Instant};

#[inline(never)]
fn dives(n: u64) -> u64 {
    let block = std::hint::black_box([n; 64]);
    if n == u64::MAX { 0 } else { dives(n + 1).wrapping_add(block[n as usize % 64]) }
}

#[peregrine::test(program, nodes = 2)]
fn overflows() {
    let (tx, rx) = channel::<u32>();
    let h = Builder::new()
        .name("diver")
        .spawn(
            |_held: Sender<u32>| {
                sleep(Duration::from_millis(30));
                dives(0)
            },
            tx,
        )
        .unwrap();
    let (to, from) = channel::<u32>();
    let neighbour = spawn(|from: Receiver<u32>| from.iter().sum::<u32>(), from);
    assert_eq!(rx.recv(), Err(RecvError::Closed), "its peer learns that nothing will come");
    let e = h.join().unwrap_err();
    assert!(matches!(&e, JoinError::Quarantined { name, .. } if name == "diver"), "{e}");
    to.send(&5).unwrap();
    drop(to);
    assert_eq!(neighbour.join().unwrap(), 5);
    println!("went on");
}

#[test]
fn an_overflow_names_the_thread_which_is_quarantined_while_its_peers_go_on() {
    let outcome = overflows().run();
    assert!(outcome.success(), "{outcome}");
    assert!(outcome.stderr.contains("'diver' has overflowed its stack of 1048576 bytes"), "{outcome}");
    assert!(outcome.stderr.contains("'diver' is quarantined"), "{outcome}");
    assert_eq!(outcome.stdout, "went on\n");
}

#[peregrine::test(program, nodes = 2, slice_us = 200)]
fn overflows_while_preempted() {
    // A stack that is almost used up, again and again interrupted: the signal's frame may be what does not fit.
    #[inline(never)]
    fn fills(left: usize) -> u64 {
        let pad = std::hint::black_box([1u8; 256]);
        if left > 600 {
            return fills(left - 300) + pad[3] as u64;
        }
        let begun = Instant::now();
        let mut n = 0u64;
        while begun.elapsed() < Duration::from_millis(100) {
            n = std::hint::black_box(n + 1);
        }
        n
    }
    let busy = spawn(
        |_: ()| {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(600) {
                std::hint::black_box(begun);
            }
        },
        (),
    );
    let mut named = 0;
    for spare in [1500, 2500, 4000, 8000] {
        let h = Builder::new()
            .name("brimful")
            .stack_size(64 << 10)
            .spawn(
                |spare: usize| {
                    let here = &spare as *const usize as usize;
                    let low = here & !0xffff;
                    let _ = low;
                    fills((64 << 10) - 1500 - spare)
                },
                spare,
            )
            .unwrap();
        named += h.join().is_err() as u32;
    }
    busy.join().unwrap();
    println!("{named} overflowed");
}

#[test]
fn a_stack_without_room_for_the_preempting_signal_is_reported_as_an_overflow() {
    let outcome = overflows_while_preempted().run();
    assert!(outcome.success(), "{outcome}");
    let crashes = outcome.stderr.matches("'brimful' crashed with SIG").count();
    assert_eq!(crashes, 0, "an overflow must be called one\n{outcome}");
}

/// Threads of which each is interrupted where fewer bytes of its stack are left than the kernel's frame for a signal takes.
#[peregrine::test(program, nodes = 2, slice_us = 200, window_stack_kib = 64)]
fn leaves_no_room_for_a_signals_frame() {
    #[inline(never)]
    fn deeper(low: usize) -> u64 {
        let here = 0u64;
        if std::hint::black_box(&raw const here) as usize > low + 800 {
            return deeper(low) + std::hint::black_box(here);
        }
        let mut n = 0u64;
        while n < 1 << 40 {
            n = std::hint::black_box(n + 1);
        }
        n
    }
    for kind in [StackKind::Isomalloc, StackKind::Alias, StackKind::Copy] {
        let start = Builder::new().kind(kind).name("brimful").stack_size(64 << 10);
        let h = start.spawn(
            |windowed: bool| {
                let byte = 0u8;
                let here = &raw const byte as usize;
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                let (low, _) = maps
                    .lines()
                    .filter_map(|line| line.split(' ').next()?.split_once('-'))
                    .map(|(low, high)| [low, high].map(|hex| usize::from_str_radix(hex, 16).unwrap()))
                    .find_map(|[low, high]| (low..high).contains(&here).then_some((low, high)))
                    .unwrap();
                // A window's mapping begins with the stack. In a slot there is more below, but this is one of the stack's first pages.
                deeper(if windowed { low } else { (here | 4095) + 1 - (64 << 10) })
            },
            kind != StackKind::Isomalloc,
        );
        println!("{}", h.unwrap().join().is_err());
    }
}

#[test]
fn a_stack_without_room_for_a_signals_frame_is_reported_as_an_overflow() {
    let outcome = leaves_no_room_for_a_signals_frame().run();
    assert!(outcome.success(), "{outcome}");
    assert_eq!(outcome.stdout, "true\n".repeat(3), "{outcome}");
    let named = outcome.stderr.matches("'brimful' has overflowed its stack").count();
    let crashes = outcome.stderr.matches("'brimful' crashed with SIG").count();
    // Three threads, three times each, and again if a rollback goes back to before one was taken away.
    assert!(named >= 9 && crashes == 0, "{outcome}");
}

#[peregrine::test(program, nodes = 2)]
fn panics_while_unwinding() {
    struct Worse;
    impl Drop for Worse {
        fn drop(&mut self) {
            panic!("second");
        }
    }
    let h = Builder::new()
        .name("worse")
        .spawn(
            |_: ()| {
                let _worse = Worse;
                panic!("first");
            },
            (),
        )
        .unwrap();
    let e: JoinError = Result::<(), _>::unwrap_err(h.join());
    assert!(matches!(&e, JoinError::Quarantined { .. }), "{e}");
}

#[test]
fn a_panic_while_unwinding_aborts_its_thread_only() {
    let outcome = panics_while_unwinding().run();
    assert!(outcome.success(), "{outcome}");
    assert!(
        outcome.stderr.contains("'worse' is quarantined: it crashed 3 nodes, the last with SIGABRT"),
        "{outcome}"
    );
}

#[peregrine::test(nodes = 2)]
fn a_thread_that_brings_down_its_node_before_an_image_holds_it_is_quarantined_too() {
    let h = Builder::new().name("at once").spawn(|_: ()| -> u32 { std::process::abort() }, ()).unwrap();
    let e = h.join().unwrap_err();
    assert!(matches!(e, JoinError::Quarantined { .. }), "{e}");
    assert_eq!(spawn(|n: u32| n, 3).join().unwrap(), 3);
}

#[peregrine::test(nodes = 2)]
fn who_sends_to_a_quarantined_thread_is_told() {
    for is_in_an_image in [false, true] {
        let (to, from) = channel::<u32>();
        let crashes = |(is_in_an_image, _from): (bool, Receiver<u32>)| -> u32 {
            if is_in_an_image {
                peregrine::checkpoint();
            }
            std::process::abort()
        };
        let h = Builder::new().name("crasher").spawn(crashes, (is_in_an_image, from)).unwrap();
        let e = h.join().unwrap_err();
        assert!(matches!(&e, JoinError::Quarantined { name, .. } if name == "crasher"), "{e}");
        assert!(matches!(to.send(&1), Err(SendError::Closed)), "nobody will hear it: {is_in_an_image}");
    }
}

#[peregrine::test(nodes = 2, image_interval_ms = 0)]
fn without_further_images_a_crashing_thread_is_quarantined_all_the_same() {
    let h = Builder::new().name("at once").spawn(|_: ()| -> u32 { std::process::abort() }, ()).unwrap();
    assert!(matches!(h.join(), Err(JoinError::Quarantined { .. })));
}

/// A line more in a file outside of the World, which no rollback takes back; how many there are then.
fn noted(path: &str) -> usize {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    file.unwrap().write_all(b"once\n").unwrap();
    std::fs::read_to_string(path).unwrap().lines().count()
}

#[peregrine::test(nodes = 2, image_interval_ms = 0)]
fn a_thread_that_must_not_run_does_not_run_though_an_image_is_taken_before_it_is_made_again() {
    let path = |what: &str| {
        let name = format!("peregrine-{what}-{}", std::os::unix::process::parent_id());
        std::env::temp_dir().join(name).to_str().unwrap().to_owned()
    };
    let (starts, crashes) = (path("starts"), path("crashes"));
    let start = noted(&starts);
    if start > 3 {
        // It was quarantined in the life before, and this image holds nothing of it.
        peregrine::checkpoint();
    }
    let entry = |path: String| -> u32 {
        noted(&path);
        std::process::abort()
    };
    let h = Builder::new().name("at once").spawn(entry, crashes.clone()).unwrap();
    let e = h.join().unwrap_err();
    assert!(matches!(&e, JoinError::Quarantined { why, .. } if why.contains("it crashed 3 nodes")), "{e}");
    assert_eq!((start, std::fs::read_to_string(&crashes).unwrap().lines().count()), (4, 3));
    [starts, crashes].iter().for_each(|path| std::fs::remove_file(path).unwrap());
}

/// Threads that crash at once, one after the other.
fn many_crash(count: u32) {
    for i in 0..count {
        let crashes = |_: ()| -> u32 { std::process::abort() };
        let h = Builder::new().name(format!("crasher {i}")).spawn(crashes, ()).unwrap();
        let e = h.join().unwrap_err();
        assert!(matches!(&e, JoinError::Quarantined { name, .. } if *name == format!("crasher {i}")), "{e}");
    }
}

// All of them are made again after each rollback: none may be forgotten.
#[peregrine::test(nodes = 2, image_interval_ms = 0, timeout_s = 300)]
fn any_number_of_threads_is_quarantined_before_an_image_holds_them() {
    many_crash(24);
    assert_eq!(spawn(|n: u32| n, 3).join().unwrap(), 3);
}

#[peregrine::test(nodes = 2, image_interval_ms = 0, timeout_s = 300)]
fn an_image_makes_room_for_more_quarantined_threads() {
    for _ in 0..3 {
        many_crash(30);
        peregrine::checkpoint();
    }
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 0, timeout_s = 300)]
fn crashes_without_end() {
    many_crash(1000);
}

#[test]
fn a_program_whose_threads_all_crash_ends_with_an_error_that_says_what_to_do() {
    let outcome = crashes_without_end().run();
    assert_eq!(outcome.code, Some(70), "{outcome}");
    assert!(outcome.stderr.contains("more than 80 threads brought down every node"), "{outcome}");
    assert!(outcome.stderr.contains("take images more often"), "{outcome}");
}

unsafe extern "C" {
    fn kill(pid: i32, signo: i32) -> i32;
    fn getpid() -> i32;
}

#[peregrine::test(nodes = 2)]
fn a_thread_whose_node_is_killed_each_time_before_an_image_can_be_taken_is_quarantined() {
    let own = |_: ()| -> u32 {
        // Again and again: an image may have been taken between the two calls, and what it holds is the number of a process that is gone.
        loop {
            // SAFETY: only numbers are passed.
            unsafe { kill(getpid(), 9) };
        }
    };
    let h = Builder::new().name("suicidal").spawn(own, ()).unwrap();
    let e = h.join().unwrap_err();
    assert!(matches!(&e, JoinError::Quarantined { name, .. } if name == "suicidal"), "{e}");
    assert_eq!(spawn(|n: u32| n, 3).join().unwrap(), 3);
}

#[peregrine::test(nodes = 2, kill_every_ms = 12, image_interval_ms = 30, least_kills = 10, timeout_s = 300)]
fn what_was_first_used_after_the_image_is_free_again_after_a_rollback() {
    // New channels, ends and threads all the time: a node is killed while it holds locks of entries that no image knows.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        let ends: Vec<_> = (0..40).map(|_| channel::<u32>()).collect();
        let threads: Vec<_> = ends
            .iter()
            .enumerate()
            .map(|(i, (tx, _))| {
                let node = i as u32 % node_count();
                Builder::new()
                    .node(node)
                    .spawn(|(tx, i): (Sender<u32>, u32)| tx.send(&i).unwrap(), (tx.clone(), i as u32))
                    .unwrap()
            })
            .collect();
        for (i, (_, rx)) in ends.iter().enumerate() {
            assert_eq!(rx.recv(), Ok(i as u32));
        }
        threads.into_iter().for_each(|h| h.join().unwrap());
    }
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 1000)]
fn says_why_and_dies() {
    let h = Builder::new()
        .name("talker")
        .spawn(
            |_: ()| {
                eprintln!("the reason is {}", 6 * 7);
                std::process::abort();
            },
            (),
        )
        .unwrap();
    let _: Result<(), _> = h.join();
}

#[test]
fn what_a_thread_wrote_before_it_crashed_its_node_is_shown_though_it_is_rolled_back() {
    let outcome = says_why_and_dies().run();
    assert!(outcome.stderr.contains("'talker' wrote before it crashed:\nthe reason is 42\n"), "{outcome}");
}

#[peregrine::test(nodes = 2, memory_mib = 24)]
fn world_memory_that_is_used_up_gives_clear_errors() {
    let (tx, rx) = channel::<Vec<u8>>();
    let mut sent = 0;
    let e = loop {
        match tx.send(&vec![7u8; 1 << 20]) {
            Ok(()) => sent += 1,
            Err(e) => break e.to_string(),
        }
    };
    assert!(e.contains("World memory is used up") && e.contains("PEREGRINE_MEMORY"), "{e}");
    assert!(sent >= 4, "{sent}");
    let mut spawned = Vec::new();
    let full = std::env::temp_dir().join(format!("peregrine-full-{}", std::os::unix::process::parent_id()));
    std::fs::write(&full, b"").unwrap();
    let until_it_is_full = |full: std::path::PathBuf| {
        while full.exists() {
            sleep(Duration::from_millis(5));
        }
    };
    let e = loop {
        match Builder::new().stack_size(8 << 20).spawn(until_it_is_full, full.clone()) {
            Ok(h) => spawned.push(h),
            Err(e) => break e.to_string(),
        }
        assert!(spawned.len() < 1000, "memory must run out");
    };
    assert!(e.contains("World memory is used up"), "{e}");
    let mut v: Vec<u8> = Vec::new();
    assert!(v.try_reserve(1 << 30).is_err());
    std::fs::remove_file(&full).unwrap();
    for h in spawned {
        h.join().unwrap();
    }
    // What was freed can be used again.
    for _ in 0..sent {
        assert_eq!(rx.recv().unwrap(), vec![7u8; 1 << 20]);
    }
    for _ in 0..50 {
        tx.send(&vec![8u8; 1 << 20]).unwrap();
        assert_eq!(rx.recv().unwrap()[5], 8);
        spawn(|_: ()| vec![1u8; 100_000].len(), ()).join().unwrap();
    }
}

#[peregrine::test(program)]
fn does_nothing() {}

#[test]
fn a_limit_on_addresses_gets_a_line_that_says_what_to_do() {
    let exe = std::env::current_exe().unwrap();
    let outcome = std::process::Command::new("sh")
        .args(["-c", "ulimit -v 1000000; exec \"$0\""])
        .arg(exe)
        .env("PEREGRINE_TEST_CHILD", "trouble::does_nothing")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&outcome.stderr);
    assert_eq!(outcome.status.code(), Some(70), "{err}");
    assert!(err.contains("ulimit -v unlimited"), "{err}");
    assert!(does_nothing().run().success());
}

unsafe extern "C" {
    fn prlimit(pid: i32, resource: i32, new: *const [u64; 2], old: *mut [u64; 2]) -> i32;
}

/// Bytes of addresses that a process has mapped.
fn mapped(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    text.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 4096
}

#[peregrine::test(program, nodes = 2, window_kib = 2048)]
fn has_no_addresses_for_windows() {
    const RLIMIT_AS: i32 = 9;
    let supervisor = std::os::unix::process::parent_id();
    let children = std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).unwrap();
    // Once: what comes back to here after a rollback has windows mapped already, and one of the children may be gone by now.
    let first = peregrine::tally().rollbacks == 0;
    let children = children.split_whitespace().map(|p| p.parse().unwrap()).filter(|_| first);
    let children: Vec<u32> = children.collect();
    // Room for a few windows of 2 MiB, in the nodes that there are and in those that replace them: the zygote is among these.
    let limit = children.iter().map(|pid| mapped(*pid)).max().unwrap_or(0) + (9 << 20);
    for pid in children {
        // SAFETY: the kernel reads two words.
        assert_eq!(unsafe { prlimit(pid as i32, RLIMIT_AS, &[limit, u64::MAX], std::ptr::null_mut()) }, 0);
    }
    // All at a time, so that each has a window of its own.
    let (all, go): (Vec<_>, Vec<_>) = (0..12)
        .map(|i| {
            let b = Builder::new().kind(peregrine::StackKind::Alias).name(format!("windowed {i}")).node(1);
            let (tx, rx) = channel::<u32>();
            (b.spawn(|rx: Receiver<u32>| rx.recv().unwrap() * 2, rx).unwrap(), tx)
        })
        .unzip();
    for (i, tx) in (0..12).zip(go) {
        // Nobody hears it where a node could not map the window.
        let _ = tx.send(&i);
    }
    let (mut done, mut refused) = (0, 0);
    for (i, h) in all.into_iter().enumerate() {
        match h.join() {
            Ok(n) => done += u32::from(n == 2 * i as u32),
            Err(JoinError::Quarantined { why, .. }) => {
                assert!(why.contains("cannot map its window") && why.contains("ulimit -v"), "{why}");
                refused += 1;
            }
            Err(e) => panic!("{e}"),
        }
    }
    println!("{} of 12, the program went on", done + refused);
    assert!(done > 0 && refused > 0, "{done} done, {refused} refused");
}

#[test]
fn threads_that_no_node_can_map_are_tried_some_times_then_quarantined_and_the_reason_is_told() {
    let outcome = has_no_addresses_for_windows().run();
    assert!(outcome.success(), "{outcome}");
    assert_eq!(outcome.stdout, "12 of 12, the program went on\n");
    assert!(outcome.stderr.contains("going back to the last image (1 of 5)"), "{outcome}");
    // Each that is taken away stays so until the next image, whether the one before has it or not.
    let refused = outcome.stderr.lines().filter(|line| line.contains("is quarantined: node "));
    let (all, each) = refused.fold((0, std::collections::HashSet::new()), |(n, mut each), line| {
        each.insert(line);
        (n + 1, each)
    });
    let images = outcome.stderr.split(" images").next().and_then(|s| s.rsplit(' ').next()).unwrap();
    let images: usize = images.parse().unwrap();
    assert!(all > 0 && all <= each.len() * (images + 1), "{all} times, {images} images\n{outcome}");
}
