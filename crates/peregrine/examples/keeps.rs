//! Holds one of each kind of value that ordinary Rust has, while it computes and prints. A test kills everything again and again,
//! resumes, and compares what was printed with an undisturbed run.

use peregrine::{Receiver, channel, spawn};
use peregrine_sys::signal::{self, bit};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

static COUNTER: AtomicU64 = AtomicU64::new(5);
static TABLE: LazyLock<Mutex<Vec<String>>> = LazyLock::new(|| Mutex::new(vec!["first".to_owned()]));

const USR1: i32 = 10;
const USR2: i32 = 12;

static HEARD: AtomicU64 = AtomicU64::new(0);

extern "C" fn hears(_: i32) {
    HEARD.fetch_add(1, Ordering::Relaxed);
}

unsafe extern "C" {
    fn signal(signo: i32, handler: extern "C" fn(i32)) -> usize;
    fn raise(signo: i32) -> i32;
    fn sigprocmask(how: i32, new: *const [u64; 16], old: *mut [u64; 16]) -> i32;
}

/// Blocks the signals in `mask`.
fn block(mask: u64) {
    let mut set = [0; 16];
    set[0] = mask;
    // SAFETY: libc's function; SIG_BLOCK is 0.
    assert_eq!(unsafe { sigprocmask(0, &set, std::ptr::null_mut()) }, 0);
}

thread_local! {
    static TURNS: Cell<u64> = const { Cell::new(0) };
    static LAST: RefCell<Option<Loud>> = const { RefCell::new(None) };
}

/// Says when it is dropped.
struct Loud(String);

impl Drop for Loud {
    fn drop(&mut self) {
        println!("{} is dropped", self.0);
    }
}

/// Waits with what it holds until its channel closes.
fn waits(from: Receiver<u8>) -> u64 {
    let held: Vec<Rc<Loud>> = (0..3).map(|i| Rc::new(Loud(format!("what waits ({i})")))).collect();
    let closed = from.recv().is_err();
    u64::from(closed) + held.len() as u64
}

#[inline(never)]
fn captures_where_it_is() -> Backtrace {
    std::hint::black_box(Backtrace::force_capture())
}

/// Whether one of them does. Names are read from the executable when a backtrace is first shown: where everything is killed then,
/// its descriptor is gone after the resume, and that backtrace stays without names.
fn name_their_frames(mut traces: impl Iterator<Item = Backtrace>) -> bool {
    traces.any(|trace| {
        let text = trace.to_string();
        text.contains("captures_where_it_is") && text.contains("keeps.rs")
    })
}

fn main_work(rounds: u64) -> u64 {
    let map: HashMap<String, Rc<Vec<u64>>> =
        (0..200).map(|i| (format!("key {i}"), Rc::new((0..i).collect()))).collect();
    let weak = Rc::downgrade(&map["key 7"]);
    let steps: [Box<dyn Fn(u64) -> u64>; 2] =
        [Box::new(move |x| x.rotate_left(9)), Box::new(|x| x.wrapping_mul(31))];
    let (mut seeded, mut twin) = (StdRng::seed_from_u64(9), StdRng::seed_from_u64(9));
    let before: u64 = rand::rng().random();
    let begun = Instant::now();
    let mut latest = begun;
    let traces: [Backtrace; 5] = std::array::from_fn(|_| captures_where_it_is());
    // By libc's function: it goes along, unlike what a bare system call changes.
    block(bit(USR1));
    // SAFETY: libc's function; the handler adds to a static.
    assert_eq!(unsafe { signal(USR2, hears) }, 0);
    LAST.set(Some(Loud("a thread-local".to_owned())));
    // Panics with a number are part of the game.
    std::panic::set_hook(Box::new(|info| {
        if info.payload().downcast_ref::<u64>().is_none() {
            eprintln!("{info}");
        }
    }));
    let mut sum = 1u64;
    for round in 0..rounds {
        for i in 0..200u64 {
            sum = steps.iter().fold(sum ^ map[&format!("key {i}")].iter().sum::<u64>(), |x, f| f(x));
        }
        assert_eq!(seeded.random::<u64>(), twin.random::<u64>());
        assert_ne!(rand::rng().random::<u64>(), before);
        assert_eq!(COUNTER.fetch_add(2, Ordering::SeqCst), 5 + 2 * round);
        TABLE.lock().unwrap().push(format!("{round}"));
        TURNS.set(TURNS.get() + 1);
        assert_eq!(signal::block(0), bit(USR1), "what the kernel says that this process blocks");
        // SAFETY: libc's function, and the handler above.
        assert_eq!((unsafe { raise(USR2) }, HEARD.load(Ordering::Relaxed)), (0, round + 1));
        assert!(Instant::now() >= latest);
        latest = Instant::now();
        let caught = std::panic::catch_unwind(|| {
            let _loud = Loud(format!("what round {round} held"));
            std::panic::panic_any(round);
        });
        assert_eq!(caught.unwrap_err().downcast_ref::<u64>(), Some(&round));
        if round % 10 == 5 {
            // One that was under way when everything was killed is lost, with its pipes, which std does not expect of them: it panics.
            // It is started again.
            let child = || Command::new("echo").arg(round.to_string()).output();
            let said = loop {
                if let Ok(Ok(said)) = std::panic::catch_unwind(child) {
                    break said;
                }
            };
            println!("a child said {}", String::from_utf8_lossy(&said.stdout).trim());
        }
        if round % 40 == 20 {
            let again = std::iter::repeat_with(captures_where_it_is).take(5);
            assert!(name_their_frames(again), "a new backtrace");
        }
        println!("round {round}: {sum:x}");
    }
    assert!(name_their_frames(traces.into_iter()), "the backtrace from the start");
    assert!(latest >= begun && weak.upgrade().is_some_and(|v| v.len() == 7));
    drop(map);
    assert!(weak.upgrade().is_none());
    sum ^ TURNS.get() ^ TABLE.lock().unwrap().len() as u64
}

#[peregrine::main]
fn main() {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(100);
    let (to, from) = channel::<u8>();
    let waiting = spawn(waits, from);
    let result = spawn(main_work, rounds).join().unwrap();
    drop(to);
    println!("{result:x}, {} of 4", waiting.join().unwrap());
}
