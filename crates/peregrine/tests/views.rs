//! Who has a slot in view: the nodes that made or ran its thread, and no others; and what becomes of that when it ends.

use peregrine::{
    Builder, ThreadId, channel, checkpoint, current, in_view_of, migrate_to, node_count, node_id, sleep,
    spawn, unmapped_from,
};
use peregrine_sys::signal;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The processes of this World's nodes: children of the supervisor that are not its zygote.
fn processes() -> Vec<u32> {
    let supervisor = std::os::unix::process::parent_id();
    let children = format!("/proc/{supervisor}/task/{supervisor}/children");
    let text = std::fs::read_to_string(children).unwrap();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// How many pages of `[start, end)` are in the page table of process `pid`.
fn present(pid: u32, (start, end): (usize, usize)) -> usize {
    let table = std::fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let mut entries = vec![0u8; (end - start) / 4096 * 8];
    table.read_exact_at(&mut entries, (start / 4096 * 8) as u64).unwrap();
    entries.chunks_exact(8).filter(|e| e[7] & 0x80 != 0).count()
}

/// A range that holds the stack and the heap of the running thread: what lies within 2 MiB of its stack.
fn around_me() -> (usize, usize) {
    let here = 0u8;
    let at = black_box(&raw const here) as usize & !0x1f_ffff;
    (at - 0x20_0000, at + 0x40_0000)
}

/// Writes to stack and heap.
fn touch() -> u64 {
    let stack = black_box([7u8; 50_000]);
    let heap = black_box(vec![3u8; 200_000]);
    stack.iter().chain(&heap).map(|b| u64::from(*b)).sum()
}

type Told = (ThreadId, (usize, usize), Vec<u32>);

/// Runs on each of these nodes in turn, and tells who it is and who has it in view.
fn wanders(nodes: Vec<u32>) -> Told {
    for node in nodes {
        migrate_to(node).unwrap();
        black_box(touch());
    }
    let me = current().unwrap();
    (me, around_me(), in_view_of(me))
}

fn counts() -> Vec<u64> {
    (0..node_count()).map(unmapped_from).collect()
}

/// What the counts grew by while `f` ran.
fn grown<R>(f: impl FnOnce() -> R) -> (R, Vec<u64>) {
    let before = counts();
    let r = f();
    (r, counts().iter().zip(before).map(|(a, b)| a - b).collect())
}

/// Has node 0 make a thread that starts on `start` and goes to `nodes`. Whoever has it in view at its end is who loses it; and
/// that is `expected`, unless a node out of work took the thread in between, which happens now and then.
fn is_unmapped_on(expected: &[u32], start: u32, nodes: &[u32]) -> bool {
    migrate_to(0).unwrap();
    let thread = || Builder::new().node(start).spawn(wanders, nodes.to_vec()).unwrap();
    let ((_, _, seen), lost) = grown(|| thread().join().unwrap());
    let losers: Vec<u32> = (0..node_count()).filter(|n| lost[*n as usize] != 0).collect();
    assert!(seen == losers && lost.iter().all(|n| *n <= 1), "{seen:?} had it in view, {lost:?} lost it");
    seen == expected
}

#[peregrine::test(nodes = 3)]
fn a_slot_is_unmapped_on_the_nodes_that_ran_its_thread_and_on_no_other() {
    let cases: [(&[u32], u32, &[u32]); 4] =
        [(&[0], 0, &[0]), (&[0, 2], 0, &[0, 2]), (&[0, 1], 1, &[1]), (&[0, 1, 2], 1, &[2, 0])];
    // The same slot again and again: what an earlier thread left in a view does not count for the next.
    let mut right = [0; 4];
    for round in 0..200 {
        let (expected, start, nodes) = cases[round % 4];
        right[round % 4] += u32::from(is_unmapped_on(expected, start, nodes));
    }
    assert!(right.iter().all(|n| *n >= 40), "{right:?} of 50 each");
}

#[peregrine::test(nodes = 3)]
fn after_a_thread_s_end_no_node_maps_its_pages() {
    for round in 0..20u32 {
        let (tell, told) = channel::<Told>();
        let (go, gone) = channel::<()>();
        let thread = spawn(
            |(tell, gone): (peregrine::Sender<Told>, peregrine::Receiver<()>)| {
                let told = wanders(vec![0, 1, 0]);
                tell.send(&told).unwrap();
                gone.recv().unwrap();
            },
            (tell, gone),
        );
        let (id, range, seen) = told.recv().unwrap();
        assert!(seen.starts_with(&[0, 1]), "{seen:?}");
        let nodes = processes();
        assert!(nodes.len() >= 3, "{nodes:?}");
        let mapped: Vec<usize> = nodes.iter().map(|pid| present(*pid, range)).collect();
        let many = mapped.iter().filter(|n| **n > 40).count();
        // The zygote and nodes that never ran it have none of it.
        assert!(many >= 2 && mapped.contains(&0), "round {round}: {mapped:?}");
        go.send(&()).unwrap();
        thread.join().unwrap();
        assert_eq!(in_view_of(id), Vec::<u32>::new());
        let mapped: Vec<usize> = nodes.iter().map(|pid| present(*pid, range)).collect();
        assert!(mapped.iter().all(|n| *n == 0), "round {round}: {mapped:?}");
    }
}

#[peregrine::test(nodes = 3, kill_every_ms = 20, least_kills = 5, timeout_s = 300)]
fn sets_stay_right_while_nodes_are_killed() {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        let threads: Vec<_> =
            (0..6u32).map(|i| spawn(|i: u32| wanders(vec![i % 3, (i + 1) % 3]), i)).collect();
        for thread in threads {
            let (_, _, seen) = thread.join().unwrap();
            assert!(!seen.is_empty() && seen.iter().all(|n| *n < 3), "{seen:?}");
        }
        let me = current().unwrap();
        assert!(in_view_of(me).contains(&node_id()), "who runs it has it in view");
    }
}

/// The process of a node.
fn process_of(node: u32) -> u32 {
    let asks = |node: u32| {
        migrate_to(node).unwrap();
        std::process::id()
    };
    Builder::new().node(node).spawn(asks, node).unwrap().join().unwrap()
}

/// Kills a node that had a thread in view, and tells who has it in view when the node is another process.
fn in_view_after_the_death_of(killed: u32) -> Vec<u32> {
    let (tell, told) = channel::<Told>();
    let (go, gone) = channel::<()>();
    let thread = spawn(
        |(tell, gone): (peregrine::Sender<Told>, peregrine::Receiver<()>)| {
            let told = wanders(vec![0, 1, 2, 0]);
            tell.send(&told).unwrap();
            gone.recv().unwrap();
        },
        (tell, gone),
    );
    let (id, _, seen) = told.recv().unwrap();
    assert_eq!(seen, [0, 1, 2]);
    let process = process_of(killed);
    checkpoint();
    // From here on in each life.
    while process_of(killed) == process {
        signal::kill(process as i32, signal::number::KILL).unwrap();
        sleep(Duration::from_millis(5));
    }
    let seen = in_view_of(id);
    go.send(&()).unwrap();
    thread.join().unwrap();
    seen
}

/// What a killed process had in view went with it; what the others have, they keep, though they dropped what they did. (Now and then a
/// node out of work took the thread before it waited.)
#[peregrine::test(nodes = 3)]
fn after_a_death_the_killed_node_is_in_no_set_and_the_others_are_in_theirs() {
    for killed in [1, 2] {
        let others: Vec<u32> = (0..3).filter(|n| *n != killed).collect();
        let seen: Vec<_> = (0..4).map(|_| in_view_after_the_death_of(killed)).collect();
        assert!(seen.iter().all(|s| others.iter().all(|n| s.contains(n))), "{killed} was killed: {seen:?}");
        assert!(seen.contains(&others), "{killed} was killed: {seen:?}");
    }
}
