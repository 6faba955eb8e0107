//! C's functions and the kernel's objects in a thread: memory, sockets, and what is refused.

use peregrine::{migrate_to, node_count, node_id, sleep, spawn};
use std::time::Duration;

unsafe extern "C" {
    fn fork() -> i32;
    fn vfork() -> i32;
    fn mmap(addr: *mut u8, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
    fn munmap(addr: *mut u8, len: usize) -> i32;
    fn mremap(addr: *mut u8, old: usize, new: usize, flags: i32, ...) -> *mut u8;
    fn realloc(p: *mut u8, len: usize) -> *mut u8;
    fn calloc(n: usize, each: usize) -> *mut u8;
    fn free(p: *mut u8);
    fn dl_iterate_phdr(f: extern "C" fn(*mut u8, usize, *mut u64) -> i32, data: *mut u64) -> i32;
    fn sched_getcpu() -> i32;
    fn syscall(number: i64, ...) -> i64;
    fn posix_memalign(out: *mut *mut u8, align: usize, len: usize) -> i32;
}

#[cfg(target_arch = "x86_64")]
const SYS_GETCPU: i64 = 309;
#[cfg(not(target_arch = "x86_64"))]
const SYS_GETCPU: i64 = 168;

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

#[peregrine::test(nodes = 2, move_every_ms = 1, slice_us = 100, least_moves = 20, timeout_s = 300)]
fn children_are_started_while_threads_are_preempted_and_moved() {
    let starts = |n: u32| {
        for i in 0..15 {
            let said = std::process::Command::new("echo").arg(format!("{n} {i}")).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&said.stdout), format!("{n} {i}\n"));
        }
    };
    let all: Vec<_> = (0..4).map(|n| spawn(starts, n)).collect();
    all.into_iter().for_each(|h| h.join().unwrap());
}

/// Counts the objects of the process, and takes its time: the loader's lock is held meanwhile.
extern "C" fn counts_slowly(_: *mut u8, _: usize, count: *mut u64) -> i32 {
    let mut x = 1u64;
    for i in 0..20_000u64 {
        x = std::hint::black_box(x.wrapping_mul(i | 1));
    }
    // SAFETY: what `walks_the_loader` passed.
    unsafe { *count += 1 };
    0
}

fn walks_the_loader(rounds: u32) -> u64 {
    let objects = || {
        let mut count = 0;
        // SAFETY: libc's function; the callback has its type.
        unsafe { dl_iterate_phdr(counts_slowly, &mut count) };
        count
    };
    let first = objects();
    for _ in 0..rounds {
        assert_eq!(objects(), first);
    }
    first
}

#[peregrine::test(nodes = 2, move_every_ms = 1, slice_us = 100, least_moves = 20)]
fn the_loaders_lock_is_not_carried_to_another_node() {
    let all: Vec<_> = (0..4).map(|_| spawn(walks_the_loader, 150)).collect();
    for h in all {
        assert!(h.join().unwrap() > 0);
    }
}

#[peregrine::test(nodes = 2, kill_every_ms = 15, image_interval_ms = 5, slice_us = 100, least_kills = 10)]
fn the_loaders_lock_is_not_left_behind_by_a_rollback() {
    // Nodes are killed and survivors reset in the middle of it: for a time, as there is no end to how slow a machine is.
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_millis(700) {
        let all: Vec<_> = (0..4).map(|_| spawn(walks_the_loader, 20)).collect();
        for h in all {
            assert!(h.join().unwrap() > 0);
        }
    }
}

#[peregrine::test(nodes = 2, least_moves = 20)]
fn a_thread_is_told_the_processor_that_it_runs_on() {
    // libc would read it from the restartable sequence of its thread: a copy of it is told nothing by the kernel.
    let (mut right, mut wrong) = (0, 0);
    for round in 0..2000 {
        if round % 40 == 0 {
            migrate_to((node_id() + 1) % node_count()).unwrap();
        }
        // SAFETY: numbers are returned, or written to a variable of this frame.
        let [before, told, after] = unsafe {
            let kernel = || {
                let mut cpu = u32::MAX;
                syscall(SYS_GETCPU, &raw mut cpu, 0usize, 0usize);
                i64::from(cpu)
            };
            [kernel(), i64::from(sched_getcpu()), kernel()]
        };
        if before == after {
            right += u32::from(told == before);
            wrong += u32::from(told != before);
        }
    }
    // It may be moved in between, and back; a word that nobody writes is wrong as often as right.
    assert!(wrong * 10 <= right, "{wrong} times wrong, {right} times right");
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
