//! What goes wrong, goes wrong as promised: it is named, it stays where it is, and the others go on.

use peregrine::{
    Builder, JoinError, Receiver, RecvError, Sender, channel, checkpoint, migrate_to, node_count, node_id,
    sleep, spawn,
};
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

#[peregrine::test(nodes = 2, image_interval_ms = 0)]
fn without_further_images_a_crashing_thread_is_quarantined_all_the_same() {
    let h = Builder::new().name("at once").spawn(|_: ()| -> u32 { std::process::abort() }, ()).unwrap();
    assert!(matches!(h.join(), Err(JoinError::Quarantined { .. })));
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

fn spins(ms: u64) -> u32 {
    let begun = Instant::now();
    let first = node_id();
    let mut changes = 0;
    let mut last = first;
    while begun.elapsed() < Duration::from_millis(ms) {
        let mut x = 1u64;
        for i in 0..20_000u64 {
            x = std::hint::black_box(x.wrapping_mul(i | 1));
        }
        if node_id() != last {
            changes += 1;
            last = node_id();
        }
    }
    changes
}

#[peregrine::test(nodes = 1, least_preemptions = 10)]
fn neighbours_of_threads_that_never_yield_run() {
    let hogs: Vec<_> = (0..3).map(|_| spawn(spins, 400)).collect();
    let (tx, rx) = channel::<u32>();
    let talks = spawn(
        |tx: Sender<u32>| {
            for i in 0..5 {
                tx.send(&i).unwrap();
                sleep(Duration::from_millis(5));
            }
        },
        tx,
    );
    assert_eq!(rx.iter().count(), 5);
    assert!(hogs.iter().any(|h| !h.is_finished()), "the messages came while the others were computing");
    talks.join().unwrap();
    for h in hogs {
        h.join().unwrap();
    }
}

#[peregrine::test(nodes = 3, move_every_ms = 3, least_moves = 10)]
fn a_thread_that_never_yields_is_moved() {
    let hogs: Vec<_> = (0..2).map(|_| spawn(spins, 300)).collect();
    let changes: u32 = hogs.into_iter().map(|h| h.join().unwrap()).sum();
    assert!(changes > 0);
}

unsafe extern "C" {
    fn fork() -> i32;
    fn vfork() -> i32;
    fn kill(pid: i32, signo: i32) -> i32;
    fn getpid() -> i32;
    fn mmap(addr: *mut u8, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
    fn munmap(addr: *mut u8, len: usize) -> i32;
    fn mremap(addr: *mut u8, old: usize, new: usize, flags: i32, ...) -> *mut u8;
    fn realloc(p: *mut u8, len: usize) -> *mut u8;
    fn calloc(n: usize, each: usize) -> *mut u8;
    fn free(p: *mut u8);
    fn posix_memalign(out: *mut *mut u8, align: usize, len: usize) -> i32;
}

#[peregrine::test(program)]
fn forks() {
    // SAFETY: refused, as this program is to show.
    for f in [fork, vfork] {
        // SAFETY: libc's function of that type.
        let r = unsafe { f() };
        let errno = std::io::Error::last_os_error().raw_os_error();
        assert_eq!((r, errno), (-1, Some(95)), "EOPNOTSUPP");
    }
    let e = std::thread::Builder::new().spawn(|| ()).unwrap_err();
    assert_eq!(e.raw_os_error(), Some(95));
}

#[test]
fn fork_and_os_threads_are_refused_with_an_error_and_a_remedy() {
    let outcome = forks().run();
    assert!(outcome.success(), "{outcome}");
    assert!(
        outcome
            .stderr
            .contains("fork was called in a Peregrine thread and refused: use std::process::Command"),
        "{outcome}"
    );
    assert!(outcome.stderr.contains("use peregrine::spawn"), "{outcome}");
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
    let e = loop {
        match Builder::new().stack_size(8 << 20).spawn(|_: ()| sleep(Duration::from_millis(50)), ()) {
            Ok(h) => spawned.push(h),
            Err(e) => break e.to_string(),
        }
        assert!(spawned.len() < 1000, "memory must run out");
    };
    assert!(e.contains("World memory is used up"), "{e}");
    let mut v: Vec<u8> = Vec::new();
    assert!(v.try_reserve(1 << 30).is_err());
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

#[peregrine::test(nodes = 1)]
fn a_thread_blocked_in_a_system_call_lets_its_neighbours_run() {
    use std::io::{Read, Write};
    let (mut reads, mut writes) = std::io::pipe().unwrap();
    // Threads share descriptors, not memory: hand over the number.
    let fd = std::os::fd::AsRawFd::as_raw_fd(&reads);
    let h = spawn(
        |fd: i32| {
            // SAFETY: the opener keeps it open until this thread is joined.
            let mut reads = std::mem::ManuallyDrop::new(unsafe {
                <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(fd)
            });
            let mut b = [0u8; 5];
            reads.read_exact(&mut b).unwrap();
            String::from_utf8_lossy(&b).into_owned()
        },
        fd,
    );
    let neighbour = spawn(spins, 100);
    sleep(Duration::from_millis(50));
    neighbour.join().unwrap();
    writes.write_all(b"hello").unwrap();
    assert_eq!(h.join().unwrap(), "hello");
    let _ = reads.read(&mut []);
}

#[peregrine::test(nodes = 2, move_every_ms = 1, least_moves = 5)]
fn sockets_and_pipes_work_across_moves() {
    use std::io::{BufRead, BufReader, Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let h = spawn(
        |addr: std::net::SocketAddr| {
            let mut s = std::net::TcpStream::connect(addr).unwrap();
            let mut lines = BufReader::new(s.try_clone().unwrap());
            let mut line = String::new();
            for i in 0..20 {
                writeln!(s, "line {i}").unwrap();
                migrate_to((node_id() + 1) % node_count()).unwrap();
                line.clear();
                lines.read_line(&mut line).unwrap();
                assert_eq!(line, format!("echo line {i}\n"));
            }
        },
        addr,
    );
    let (mut s, _) = listener.accept().unwrap();
    let mut lines = BufReader::new(s.try_clone().unwrap());
    let mut line = String::new();
    while lines.read_line(&mut line).unwrap() > 0 {
        write!(s, "echo {line}").unwrap();
        line.clear();
        sleep(Duration::from_micros(500));
    }
    h.join().unwrap();
    let mut rest = Vec::new();
    assert_eq!(lines.read_to_end(&mut rest).unwrap(), 0);
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn mappings_and_c_blocks_survive_partial_unmapping_and_resizing() {
    const PAGE: usize = 4096;
    // SAFETY: ordinary use of C's functions on blocks of this thread's own.
    unsafe {
        let map = |pages: usize| mmap(std::ptr::null_mut(), pages * PAGE, 3, 0x22, -1, 0);
        let mut kept = Vec::new();
        for round in 0..30usize {
            let p = map(16);
            assert_ne!(p as isize, -1);
            assert!((0..16 * PAGE).all(|i| *p.add(i) == 0), "fresh pages are zero");
            p.write_bytes(round as u8, 16 * PAGE);
            // Middle, front, then the rest in two calls that overlap what is gone.
            assert_eq!(munmap(p.add(4 * PAGE), 4 * PAGE), 0);
            assert_eq!(munmap(p, PAGE), 0);
            assert_eq!(*p.add(3 * PAGE), round as u8);
            assert_eq!(*p.add(15 * PAGE), round as u8);
            migrate_to(round as u32 % 2).unwrap();
            if round % 3 == 0 {
                kept.push((p, round as u8));
            } else {
                assert_eq!(munmap(p, 8 * PAGE), 0);
                assert_eq!(munmap(p.add(6 * PAGE), 10 * PAGE), 0);
            }
            let v: Vec<Vec<u8>> = (0..50).map(|i| vec![i as u8; i * 97]).collect();
            let q = map(3);
            q.add(5000).write(77);
            let q = mremap(q, 3 * PAGE, 9 * PAGE, 1);
            assert_eq!((*q.add(5000), *q.add(8 * PAGE)), (77, 0));
            assert_eq!(mremap(q, 9 * PAGE, PAGE, 1), q);
            assert_eq!(munmap(q, PAGE), 0);
            assert!(v.iter().enumerate().all(|(i, v)| v.iter().all(|b| *b == i as u8)));
        }
        for (p, round) in kept {
            assert!((8 * PAGE..16 * PAGE).all(|i| *p.add(i) == round));
            assert_eq!(munmap(p, 16 * PAGE), 0);
        }
        let mut p = realloc(std::ptr::null_mut(), 10);
        for i in 0..200usize {
            p = realloc(p, 10 + i * 100);
            p.add(9 + i * 100).write(i as u8);
            assert_eq!(p as usize % 16, 0);
        }
        assert!((0..200).all(|i| *p.add(9 + i * 100) == i as u8));
        free(realloc(p, 1));
        for shift in 4..16 {
            let mut q = std::ptr::null_mut();
            assert_eq!(posix_memalign(&mut q, 1 << shift, 100), 0);
            assert_eq!(q as usize % (1 << shift), 0);
            q.write_bytes(1, 100);
            free(q);
        }
        let z = calloc(100, 40);
        assert!((0..4000).all(|i| *z.add(i) == 0));
        free(z);
    }
}

fn vector_sum(seed: f64) -> f64 {
    // Wide registers are live across the whole loop, which preemption interrupts anywhere.
    let mut lanes = [seed; 16];
    let begun = Instant::now();
    let mut rounds = 0u32;
    while rounds < 40_000 || (begun.elapsed() < Duration::from_millis(150) && !rounds.is_multiple_of(40_000))
    {
        for (k, lane) in lanes.iter_mut().enumerate() {
            *lane = (*lane * 1.000_000_1 + k as f64) % 1000.0;
        }
        rounds += 1;
    }
    lanes.iter().sum::<f64>() + rounds as f64
}

#[peregrine::test(nodes = 2, move_every_ms = 1, slice_us = 200, least_moves = 5)]
fn vector_registers_belong_to_their_thread() {
    let expected: Vec<f64> = (0..6).map(|s| vector_sum(s as f64)).collect();
    for _ in 0..5 {
        let all: Vec<_> = (0..6).map(|s| spawn(vector_sum, s as f64)).collect();
        for (h, e) in all.into_iter().zip(&expected) {
            assert_eq!(h.join().unwrap().to_bits(), e.to_bits());
        }
    }
}

#[peregrine::test(nodes = 2, timeout_s = 60)]
fn a_stopped_node_goes_on_when_it_is_continued() {
    let h = Builder::new()
        .node(1)
        .spawn(
            |_: ()| {
                // SAFETY: only numbers are passed.
                let me = unsafe { getpid() };
                let me_text = me.to_string();
                let mut helper = std::process::Command::new("sh")
                    .args([
                        "-c",
                        &format!("sleep 0.05; kill -STOP {me_text}; sleep 0.3; kill -CONT {me_text}"),
                    ])
                    .spawn()
                    .unwrap();
                let n = spins(600);
                helper.wait().unwrap();
                n
            },
            (),
        )
        .unwrap();
    h.join().unwrap();
    assert!(checkpoint() > 0);
}

/// Kills its own node at a chosen point, once: a file tells the second life.
fn dies_once(mark: String) -> u32 {
    let path = std::path::Path::new(&mark);
    if !path.exists() {
        std::fs::write(path, b"").unwrap();
        // SAFETY: the node dies here.
        unsafe { kill(getpid(), 9) };
    }
    1
}

#[peregrine::test(nodes = 2, timeout_s = 300)]
fn thirty_deaths_leak_no_process_and_no_descriptor() {
    let supervisor = std::os::unix::process::parent_id();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let held = || std::fs::read_dir(format!("/proc/{supervisor}/fd")).unwrap().count();
    let children = || {
        std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"))
            .unwrap()
            .split_whitespace()
            .count()
    };
    let marks = std::env::temp_dir().join(format!("peregrine-dies-{supervisor}"));
    std::fs::create_dir_all(&marks).unwrap();
    let mark = |i: u32| marks.join(i.to_string()).display().to_string();
    spawn(dies_once, mark(1000)).join().unwrap();
    let before = (descriptors(), held(), children());
    for i in 0..30 {
        spawn(dies_once, mark(i)).join().unwrap();
    }
    checkpoint();
    let _ = std::fs::remove_dir_all(&marks);
    // Nodes may be being replaced at this very moment.
    sleep(Duration::from_millis(100));
    let after = (descriptors(), held(), children());
    // One or two either way are what the supervisor has open for a moment; thirty deaths would show.
    let few = |a: usize, b: usize| a <= b + 2;
    assert!(
        few(after.0, before.0) && few(after.1, before.1) && after.2 == before.2,
        "descriptors of the nodes, of the supervisor, and its children: {after:?} after {before:?}"
    );
}

#[peregrine::test(program, nodes = 3)]
fn runs_for_a_minute() {
    let hogs: Vec<_> = (0..3).map(|i| Builder::new().node(i).spawn(spins, 60_000).unwrap()).collect();
    for h in hogs {
        h.join().unwrap();
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
    assert!(
        outcome.stderr.contains("thread 1 'talker' wrote before it crashed:\nthe reason is 42\n"),
        "{outcome}"
    );
}

#[peregrine::test(program, nodes = 2, kill_every_ms = 50, image_interval_ms = 0)]
fn is_killed_once_without_images() {
    let mark =
        std::env::temp_dir().join(format!("peregrine-announced-{}", std::os::unix::process::parent_id()));
    if !mark.exists() {
        std::fs::write(&mark, b"").unwrap();
        spins(10_000);
    }
    let _ = std::fs::remove_file(&mark);
}

#[test]
fn without_images_a_death_is_announced_as_a_way_back_to_the_start() {
    let outcome = is_killed_once_without_images().run();
    assert!(outcome.success(), "{outcome}");
    assert!(outcome.stderr.contains("the program goes back to its start"), "{outcome}");
}

fn processes_of_group(group: i32) -> Vec<String> {
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|e| std::fs::read_to_string(e.ok()?.path().join("stat")).ok())
        .filter(|stat| {
            let after = stat.rsplit(')').next().unwrap_or("");
            let mut fields = after.split_whitespace();
            let state = fields.next().unwrap_or("");
            fields.nth(1).and_then(|g| g.parse().ok()) == Some(group) && state != "Z"
        })
        .collect()
}

#[test]
fn nothing_is_left_a_second_after_the_supervisor_is_killed() {
    let running = runs_for_a_minute().start(&[]);
    let pid = running.pid();
    let begun = Instant::now();
    while processes_of_group(pid).len() < 5 && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(processes_of_group(pid).len(), 5, "supervisor, zygote, three nodes");
    std::thread::sleep(Duration::from_millis(200));
    // SAFETY: only numbers are passed.
    unsafe { kill(pid, 9) };
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(processes_of_group(pid), Vec::<String>::new());
    assert_eq!(running.wait().signal, Some(9));
}

#[peregrine::test(program, nodes = 2, image_interval_ms = 100)]
fn holds_memory_for_a_minute() {
    let held = vec![7u8; 400 << 20];
    checkpoint();
    println!("held");
    sleep(Duration::from_secs(60));
    assert_eq!(held[12345], 7);
}

/// Shared memory in use on this machine, in MiB.
fn shared_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|l| l.starts_with("Shmem:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
fn no_memory_is_left_a_second_after_the_supervisor_is_killed() {
    // Other tests use some meanwhile; this World has 800 MiB, its image in memory included.
    let before = shared_memory();
    let running = holds_memory_for_a_minute().start(&[]);
    let begun = Instant::now();
    while shared_memory() < before + 700 && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let during = shared_memory();
    // SAFETY: only numbers are passed.
    unsafe { kill(running.pid(), 9) };
    std::thread::sleep(Duration::from_secs(1));
    let after = shared_memory();
    println!("{before} MiB before, {during} MiB during, {after} MiB a second after");
    assert!(during >= before + 700 && after + 400 < during, "{before}, {during}, {after} MiB");
    running.wait();
}

#[test]
fn a_request_to_terminate_stops_everything() {
    let running = runs_for_a_minute().start(&[]);
    let pid = running.pid();
    std::thread::sleep(Duration::from_millis(300));
    // SAFETY: only numbers are passed.
    unsafe { kill(pid, 15) };
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(128 + 15), "{outcome}");
    assert_eq!(processes_of_group(pid), Vec::<String>::new());
}
