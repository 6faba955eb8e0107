//! Every kind of value that ordinary Rust holds, across moves between processes and across rollbacks.
//!
//! Each test is written as plain code with the oracle beside it; the settings of its World do the moving and the killing.

use peregrine::{Builder, channel, migrate_to, node_count, node_id, sleep, spawn, yield_now};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

/// To the next node; the one that it left.
fn hop() -> u32 {
    let from = node_id();
    migrate_to((from + 1) % node_count()).unwrap();
    from
}

fn hops(mut check: impl FnMut()) {
    for _ in 0..6 {
        check();
        hop();
        check();
        yield_now();
        check();
        sleep(Duration::from_millis(1));
    }
}

trait Shape {
    fn area(&self) -> f64;
}
struct Square(f64);
struct Circle {
    r: f64,
    name: String,
}
impl Shape for Square {
    fn area(&self) -> f64 {
        self.0 * self.0
    }
}
impl Shape for Circle {
    fn area(&self) -> f64 {
        self.r * self.r * 3.0 + self.name.len() as f64
    }
}

#[peregrine::test(nodes = 3, move_every_ms = 1, least_moves = 6)]
fn collections_trait_objects_and_reference_counts_move() {
    let numbers: Vec<u64> = (0..5000).collect();
    let map: HashMap<String, u32> = (0..1000).map(|i| (format!("key {i}"), i)).collect();
    let tree: BTreeMap<u32, Vec<u8>> = (0..300).map(|i| (i, vec![i as u8; i as usize])).collect();
    let shared = Rc::new(RefCell::new(vec![1u8]));
    let weak = Rc::downgrade(&shared);
    let shapes: Vec<Box<dyn Shape>> =
        vec![Box::new(Square(2.0)), Box::new(Circle { r: 1.0, name: "c".into() })];
    let mut count = 1;
    hops(|| {
        assert_eq!(numbers.iter().sum::<u64>(), 5000 * 4999 / 2);
        assert!((0..1000).all(|i| map[&format!("key {i}")] == i));
        assert!(tree.iter().all(|(k, v)| v.len() == *k as usize && v.iter().all(|b| *b == *k as u8)));
        shared.borrow_mut().push(7);
        count += 1;
        assert_eq!(weak.upgrade().unwrap().borrow().len(), count);
        assert_eq!(shapes.iter().map(|s| s.area()).sum::<f64>(), 8.0);
    });
    drop(shared);
    assert!(weak.upgrade().is_none());
}

static COUNTER: AtomicU64 = AtomicU64::new(5);
static TABLE: LazyLock<Mutex<Vec<String>>> = LazyLock::new(|| Mutex::new(vec!["first".into()]));
static ONCE: OnceLock<u32> = OnceLock::new();
static LARGE: RwLock<[u64; 4096]> = RwLock::new([3; 4096]);

fn owns_statics(seed: u64) -> u64 {
    assert_eq!(COUNTER.load(Ordering::SeqCst), 5, "a new thread starts from the program's first values");
    assert!(ONCE.get().is_none());
    ONCE.set(seed as u32).unwrap();
    for i in 0..20 {
        COUNTER.fetch_add(seed, Ordering::SeqCst);
        TABLE.lock().unwrap().push(format!("{seed} {i}"));
        LARGE.write().unwrap()[(seed as usize * 37 + i) % 4096] += seed;
        // Held across a move.
        let guard = TABLE.lock().unwrap();
        hop();
        assert_eq!(guard.len(), i + 2);
        drop(guard);
        yield_now();
        assert_eq!(COUNTER.load(Ordering::SeqCst), 5 + seed * (i as u64 + 1));
        assert_eq!(*ONCE.get().unwrap(), seed as u32);
    }
    LARGE.read().unwrap().iter().sum()
}

#[peregrine::test(nodes = 2, move_every_ms = 1, least_moves = 20)]
fn statics_are_each_threads_own_even_those_larger_than_a_page() {
    let all: Vec<_> = (1..9).map(|seed| spawn(owns_statics, seed)).collect();
    for (seed, handle) in (1..9).zip(all) {
        assert_eq!(handle.join().unwrap(), 3 * 4096 + 20 * seed);
    }
    assert_eq!(COUNTER.load(Ordering::SeqCst), 5);
}

struct Noisy(Rc<Cell<u32>>, String);
impl Drop for Noisy {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
        assert_eq!(self.1, "still whole");
        println!("destructor ran");
    }
}

#[repr(align(256))]
struct Aligned([u8; 256]);

thread_local! {
    static PLAIN: Cell<u64> = const { Cell::new(11) };
    static NOISY: RefCell<Option<Noisy>> = const { RefCell::new(None) };
    static ALIGNED: RefCell<Aligned> = const { RefCell::new(Aligned([9; 256])) };
    static TEXT: RefCell<String> = RefCell::new("lazily made".to_owned());
}

fn uses_thread_locals(n: u64) -> usize {
    PLAIN.with(|plain| {
        let address = plain as *const _ as usize;
        ALIGNED.with(|a| assert_eq!(a.as_ptr() as usize % 256, 0, "alignment is kept in a slot"));
        let ran = Rc::new(Cell::new(0));
        NOISY.set(Some(Noisy(ran.clone(), "still whole".into())));
        hops(|| {
            // Through the address kept across suspends, and anew.
            plain.set(plain.get() + n);
            assert_eq!(PLAIN.get(), plain.get());
            assert_eq!(PLAIN.with(|p| p as *const _ as usize), address);
            TEXT.with_borrow_mut(|t| t.push('x'));
            ALIGNED.with_borrow_mut(|a| a.0[7] = a.0[7].wrapping_add(1));
        });
        assert_eq!(PLAIN.get(), 11 + n * 18);
        assert_eq!(ran.get(), 0);
    });
    ALIGNED.with_borrow(|a| assert_eq!(a.0[7], 9 + 18));
    TEXT.with_borrow(String::len)
}

#[peregrine::test(program, nodes = 2, move_every_ms = 1, least_moves = 6)]
fn thread_locals() {
    for h in [spawn(uses_thread_locals, 1), spawn(uses_thread_locals, 1000)] {
        assert_eq!(h.join().unwrap(), 11 + 18);
    }
}

#[test]
fn thread_locals_move_keep_their_address_and_are_dropped_once() {
    let outcome = thread_locals().run();
    assert!(outcome.success(), "{outcome}");
    assert_eq!(outcome.stdout.matches("destructor ran").count(), 2, "{outcome}");
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn random_numbers_differ_between_threads_and_seeds_are_kept() {
    use rand::{Rng, SeedableRng};
    let mut seeded = rand::rngs::StdRng::seed_from_u64(9);
    let mut twin = rand::rngs::StdRng::seed_from_u64(9);
    for _ in 0..20 {
        let a: u64 = seeded.random();
        hop();
        assert_eq!(a, twin.random::<u64>());
    }
    let draw = |_: ()| -> Vec<u64> {
        let first: u64 = rand::rng().random();
        hop();
        vec![first, rand::rng().random()]
    };
    let mut all: Vec<u64> = (0..8).flat_map(|_| spawn(draw, ()).join().unwrap()).collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 16, "two threads drew the same random number");
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn hash_seeds_stay_with_their_maps() {
    let mut maps: Vec<HashMap<u64, u64>> = Vec::new();
    for i in 0..12 {
        let mut m = HashMap::new();
        m.extend((0..200).map(|k| (k * i, k)));
        maps.push(m);
        hop();
        for (i, m) in maps.iter().enumerate() {
            let last = |k: u64| if i == 0 { 199 } else { k };
            assert!((0..200).all(|k| m[&(k * i as u64)] == last(k)));
        }
    }
}

#[peregrine::test(nodes = 3, move_every_ms = 1, kill_every_ms = 40, least_kills = 2)]
fn the_monotonic_clock_never_goes_back() {
    let begun = Instant::now();
    let mut last = Instant::now();
    while begun.elapsed() < Duration::from_millis(700) {
        for _ in 0..1000 {
            let now = Instant::now();
            assert!(now >= last);
            last = now;
        }
        hop();
    }
}

unsafe extern "C" {
    fn fesetround(mode: i32) -> i32;
}

fn rounds(mode: i32) -> Vec<u64> {
    // SAFETY: sets this thread's rounding mode.
    assert_eq!(unsafe { fesetround(mode) }, 0);
    let mut bits = Vec::new();
    let begun = Instant::now();
    while bits.len() < 2000 || begun.elapsed() < Duration::from_millis(50) {
        let (one, three) = (std::hint::black_box(1.0f64), std::hint::black_box(3.0f64));
        let x = (one / three).to_bits();
        if bits.last() != Some(&x) {
            bits.push(x);
        }
        if bits.len() % 64 == 0 {
            yield_now();
        }
        if begun.elapsed() > Duration::from_millis(100) {
            break;
        }
    }
    bits
}

#[peregrine::test(nodes = 2, move_every_ms = 1, least_moves = 5)]
fn the_rounding_mode_belongs_to_its_thread() {
    // FE_TONEAREST, FE_DOWNWARD, FE_UPWARD on x86-64.
    let threads: Vec<_> = [0, 0x400, 0x800].map(|m| (m, spawn(rounds, m))).into();
    let third = 0x3fd5_5555_5555_5555u64;
    for (mode, handle) in threads {
        let expected = if mode == 0x800 { third + 1 } else { third };
        assert_eq!(handle.join().unwrap(), vec![expected], "rounding mode {mode:#x}");
    }
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn programs_are_started_and_waited_for_across_moves() {
    use std::process::{Command, Stdio};
    for i in 0..4 {
        let out = Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]).output().unwrap();
        assert_eq!(
            (out.status.code(), &out.stdout[..], &out.stderr[..]),
            (Some(3), &b"out\n"[..], &b"err\n"[..])
        );
        let mut child = Command::new("sleep").arg("0.03").spawn().unwrap();
        hop();
        assert!(child.wait().unwrap().success(), "round {i}");
        assert!(!Command::new("false").status().unwrap().success());
        let e = Command::new("/no/such/program").status().unwrap_err();
        assert_eq!(e.kind(), std::io::ErrorKind::NotFound);
        let out = Command::new("sh")
            .args(["-c", "pwd; echo $FRUIT"])
            .current_dir("/")
            .env("FRUIT", "pear")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&out.stdout), "/\npear\n");
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        hop();
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"through a pipe").unwrap();
        hop();
        drop(child.stdin.take());
        assert_eq!(child.wait_with_output().unwrap().stdout, b"through a pipe");
    }
}

fn starts_programs(rounds: u32) -> u32 {
    for _ in 0..rounds {
        // A failed start is told through memory that the new process shares with the thread's.
        let e = std::process::Command::new("/no/such/program").status().unwrap_err();
        assert_eq!(e.kind(), std::io::ErrorKind::NotFound);
        assert!(std::process::Command::new("true").status().unwrap().success());
    }
    rounds
}

#[peregrine::test(nodes = 2, move_every_ms = 1, slice_us = 100, least_moves = 10)]
fn a_program_is_started_whole_or_not_at_all() {
    let all: Vec<_> = (0..4).map(|_| spawn(starts_programs, 60)).collect();
    for h in all {
        assert_eq!(h.join().unwrap(), 60);
    }
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn files_stay_open_across_moves() {
    use std::io::{Read, Seek, SeekFrom, Write};
    let path = std::env::temp_dir().join(format!("peregrine-values-{}", std::process::id()));
    let mut file = std::fs::File::create(&path).unwrap();
    for i in 0..50 {
        writeln!(file, "line {i}").unwrap();
        hop();
    }
    drop(file);
    let mut file = std::fs::File::open(&path).unwrap();
    let mut text = String::new();
    file.seek(SeekFrom::Start(5)).unwrap();
    hop();
    file.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("0\nline 1\n") && text.ends_with("line 49\n"), "{text}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), text.len() as u64 + 5);
    let found =
        std::fs::read_dir(std::env::temp_dir()).unwrap().filter_map(Result::ok).any(|e| e.path() == path);
    assert!(found);
    std::fs::remove_file(&path).unwrap();
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn arguments_and_environment_are_there_and_each_thread_changes_its_own() {
    assert!(std::env::args().next().unwrap().contains("values"));
    assert!(std::env::vars().any(|(k, _)| k == "PEREGRINE_NODES"));
    // SAFETY: the thread's environment is its own, and it is the only one to look at it.
    unsafe { std::env::set_var("FRUIT", "apple") };
    hop();
    assert_eq!(std::env::var("FRUIT").unwrap(), "apple");
    let other = spawn(|_: ()| std::env::var("FRUIT").ok(), ()).join().unwrap();
    println!("a new thread sees {other:?}");
    let out = std::process::Command::new("sh").args(["-c", "echo $FRUIT"]).output().unwrap();
    assert_eq!(out.stdout, b"apple\n");
}

fn holds_and_waits(rx: peregrine::Receiver<u8>) -> u32 {
    let dropped = Rc::new(Cell::new(0));
    {
        let _held: Vec<_> = (0..10).map(|_| Noisy(dropped.clone(), "still whole".into())).collect();
        let _ = rx.recv();
        hop();
    }
    dropped.get()
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn what_a_suspended_thread_holds_is_dropped_when_its_channel_closes() {
    let (tx, rx) = channel::<u8>();
    let h = Builder::new().node(1).spawn(holds_and_waits, rx).unwrap();
    sleep(Duration::from_millis(20));
    drop(tx);
    assert_eq!(h.join().unwrap(), 10);
}
