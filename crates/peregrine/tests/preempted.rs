//! The timer takes the node from threads that never give it away; whoever is interrupted, blocked or stopped goes on as it was.

use peregrine::region;
use peregrine::{Builder, Sender, channel, checkpoint, node_id, sleep, spawn};
use peregrine_sys::timer::process_cpu_ns;
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn getpid() -> i32;
    fn strlen(s: *const u8) -> usize;
}

fn computes() {
    let mut x = 1u64;
    for i in 0..20_000u64 {
        x = std::hint::black_box(x.wrapping_mul(i | 1));
    }
}

fn computes_for(ms: u64) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(ms) {
        computes();
    }
}

/// Until somebody says so in shared memory, however slow the machine is.
fn computes_until_told(_: ()) {
    let told = region::open("told").unwrap();
    while told.cells::<u64>().get(0) == Ok(0) {
        computes();
    }
}

#[peregrine::test(nodes = 1, least_preemptions = 10)]
fn neighbours_of_threads_that_never_yield_run() {
    let told = region::create("told", 8).unwrap();
    let hogs: Vec<_> = (0..3).map(|_| spawn(computes_until_told, ())).collect();
    let (tx, rx) = channel::<u32>();
    let talks = spawn(
        |tx: Sender<u32>| {
            for i in 0..12 {
                tx.send(&i).unwrap();
                sleep(Duration::from_millis(5));
            }
        },
        tx,
    );
    assert_eq!(rx.iter().count(), 12);
    assert!(hogs.iter().all(|h| !h.is_finished()), "the messages came while the others were computing");
    told.cells::<u64>().set(0, 1).unwrap();
    talks.join().unwrap();
    for h in hogs {
        h.join().unwrap();
    }
    drop(told);
    region::remove("told").unwrap();
}

/// A thread that has had its node for itself for a while is interrupted each 8 s here, for slices are of a second, and by nothing else.
#[peregrine::test(nodes = 2, slice_us = 1_000_000, image_interval_ms = 0)]
fn who_comes_to_a_node_that_a_thread_had_for_itself_need_not_wait_for_it() {
    let told = region::create("told", 8).unwrap();
    let hog = Builder::new().node(1).spawn(computes_until_told, ()).unwrap();
    // Twice a slice is the first.
    sleep(Duration::from_secs(3));
    let begun = Instant::now();
    // It may be given to a node that has nothing to do then: that is for the node with the hog to see.
    Builder::new().node(1).spawn(|_: ()| (), ()).unwrap().join().unwrap();
    let waited = begun.elapsed();
    assert!(!hog.is_finished() && waited < Duration::from_secs(4), "it had to wait for {waited:?}");
    told.cells::<u64>().set(0, 1).unwrap();
    hog.join().unwrap();
    drop(told);
    region::remove("told").unwrap();
}

/// In a shared library for nearly all of two seconds of the processor's time, after its node has found it alone.
fn stays_in_a_library(_: ()) {
    computes_for(100);
    let mut text = vec![1u8; 32 << 20];
    *text.last_mut().unwrap() = 0;
    let until = process_cpu_ns() + 2_000_000_000;
    while process_cpu_ns() < until {
        // SAFETY: it ends with a zero.
        assert_eq!(unsafe { strlen(std::hint::black_box(text.as_ptr())) }, text.len() - 1);
    }
    region::open("over").unwrap().cells::<u64>().set(0, 1).unwrap();
}

// Where a library's data are the process's, who is inside is left there for forty ticks: 800 ms, if they are not the seldom ones.
#[peregrine::test(nodes = 2, slice_us = 20_000, image_interval_ms = 0)]
fn who_comes_to_a_node_that_a_thread_had_for_itself_need_not_wait_for_the_end_of_a_library() {
    let over = region::create("over", 8).unwrap();
    let stays = Builder::new().node(1).spawn(stays_in_a_library, ()).unwrap();
    sleep(Duration::from_millis(300));
    let comes = |_: ()| region::open("over").unwrap().cells::<u64>().get(0).unwrap();
    let seen = Builder::new().node(1).spawn(comes, ()).unwrap().join().unwrap();
    assert_eq!(seen, 0, "it came when the other had ended");
    stays.join().unwrap();
    assert_eq!(over.cells::<u64>().get(0), Ok(1));
}

fn computes_until_moved(times: u32) {
    let mut last = node_id();
    let mut changes = 0;
    while changes < times {
        computes();
        if node_id() != last {
            changes += 1;
            last = node_id();
        }
    }
}

#[peregrine::test(nodes = 3, move_every_ms = 3, least_moves = 10)]
fn a_thread_that_never_yields_is_moved() {
    let hogs: Vec<_> = (0..2).map(|_| spawn(computes_until_moved, 5)).collect();
    hogs.into_iter().for_each(|h| h.join().unwrap());
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
    let neighbour = spawn(computes_for, 100);
    sleep(Duration::from_millis(50));
    neighbour.join().unwrap();
    writes.write_all(b"hello").unwrap();
    assert_eq!(h.join().unwrap(), "hello");
    let _ = reads.read(&mut []);
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
                computes_for(600);
                helper.wait().unwrap();
            },
            (),
        )
        .unwrap();
    h.join().unwrap();
    assert!(checkpoint() > 0);
}
