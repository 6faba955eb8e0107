//! The other flows of control: OS threads, processes, event-driven objects; and the floors of ours: memcpy for stack copying,
//! a bare remap and its faults for memory aliasing.

use peregrine_base::sync::{AtomicBool, AtomicU64, Ordering};
use peregrine_base::{PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::memfd::{self, Pages};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::signal;
use peregrine_sys::timer::{monotonic_ns, process_cpu_ns};
use std::hint::black_box;
use std::os::fd::AsFd;
use std::sync::Arc;

/// The processor that all subjects run on.
pub const CPU: usize = 1;
/// Samples of a process.
const SAMPLES: usize = 11;

/// One of them, in this process; prints its samples.
pub fn case(name: &str, words: &[&str]) -> bool {
    let n: Vec<usize> = words.iter().filter_map(|w| w.parse().ok()).collect();
    let _ = process::pin_to_cpu(CPU);
    match (name, &n[..]) {
        ("os", [threads]) => os_threads(*threads, SAMPLES),
        ("processes", [count]) => processes(*count),
        ("events", [count]) => events(*count),
        ("most-events", [most]) => println!("{}", most_events(*most)),
        ("memcpy", [buffers, len]) => memcpy(*buffers, *len),
        ("remap", [live, window, stack, touched, gap]) => remap(*live, *window, *stack, *touched, *gap),
        ("parked", [live, window, stack]) => parked(*live, *window, *stack),
        ("header-copied", [live, window, stack]) => header_copied(*live, *window, *stack),
        ("null-call", []) => null_call(),
        ("fs-base", []) => fs_base(),
        _ => return false,
    }
    true
}

/// OS threads on one processor that yield: processor time over yields.
pub fn os_threads(threads: usize, samples: usize) {
    let _ = process::pin_to_cpu(CPU);
    let stop = Arc::new(AtomicBool::new(false));
    let turns: Arc<Vec<AtomicU64>> = Arc::new((0..threads).map(|_| AtomicU64::new(0)).collect());
    let all: Vec<_> = (0..threads)
        .map(|i| {
            let (stop, turns) = (stop.clone(), turns.clone());
            std::thread::Builder::new()
                .stack_size(64 << 10)
                .spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        turns[i].store(turns[i].load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        std::thread::yield_now();
                    }
                })
                .expect("an OS thread")
        })
        .collect();
    let total = || turns.iter().map(|t| t.load(Ordering::Relaxed)).sum::<u64>();
    for _ in 0..samples {
        let (begun, before) = (process_cpu_ns(), total());
        std::thread::sleep(std::time::Duration::from_millis(20));
        println!("{}", (process_cpu_ns() - begun) as f64 / (total() - before).max(1) as f64);
    }
    stop.store(true, Ordering::Relaxed);
    all.into_iter().for_each(|t| drop(t.join()));
}

/// Processes on one processor that yield; they count in shared memory. Wall time over yields: nobody else is on the processor.
fn processes(count: usize) {
    let pages = PageCount::for_bytes((count + 1) * 64);
    // SAFETY: a new mapping, shared with the children.
    let shared = unsafe {
        mem::map(
            pages,
            Protection::ReadWrite,
            Source::SharedAnonymous,
            Placement::Anywhere,
            MapOptions::default(),
        )
    }
    .expect("shared memory");
    let base = shared.start().as_usize();
    // SAFETY: inside the mapping, a line for each; atomics only (S1).
    let turns = |i: usize| unsafe { &*((base + i * 64) as *const AtomicU64) };
    let mut children = Vec::new();
    for i in 0..count {
        // SAFETY: one thread; the child makes system calls only and never returns.
        match unsafe { process::fork_with(ForkFlags::default()) } {
            Ok(Forked::Child) => {
                process::die_with_parent();
                loop {
                    turns(i).store(turns(i).load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                    peregrine_sys::io::yield_now();
                }
            }
            Ok(Forked::Parent(pid)) => children.push(pid),
            Err(e) => {
                eprintln!("only {i} processes: {e}");
                break;
            }
        }
    }
    let total = || (0..children.len()).map(|i| turns(i).load(Ordering::Relaxed)).sum::<u64>();
    std::thread::sleep(std::time::Duration::from_millis(50));
    for _ in 0..SAMPLES {
        let (begun, before) = (monotonic_ns(), total());
        std::thread::sleep(std::time::Duration::from_millis(20));
        println!("{}", (monotonic_ns() - begun) as f64 / (total() - before).max(1) as f64);
    }
    for pid in children {
        let _ = signal::kill(pid, signal::number::KILL);
        let _ = process::wait_for(pid);
    }
}

/// What a thread's loop becomes when somebody cuts it by hand: a state and a function that goes on from it.
enum State {
    Begin,
    Middle { sum: u64 },
    End { sum: u64 },
}

struct Object {
    state: State,
    input: u64,
}

impl Object {
    #[inline(never)]
    fn on_event(&mut self) {
        self.state = match self.state {
            State::Begin => State::Middle { sum: self.input },
            State::Middle { sum } if sum & 0xff == 0xff => State::End { sum },
            State::Middle { sum } => State::Middle { sum: sum.wrapping_add(self.input | 1) },
            State::End { sum } => {
                self.input = sum;
                State::Begin
            }
        };
    }
}

/// Objects that get an event each in turn, from one loop.
fn events(count: usize) {
    let mut all: Vec<Box<Object>> =
        (0..count).map(|i| Box::new(Object { state: State::Begin, input: i as u64 })).collect();
    let rounds = (200_000 / count).max(10);
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        for _ in 0..rounds {
            all.iter_mut().for_each(|o| o.on_event());
        }
        println!("{}", (process_cpu_ns() - begun) as f64 / (rounds * count) as f64);
    }
    black_box(&all);
}

/// Objects that are there at once, each of which has had an event: memory is their only limit, and `most`.
fn most_events(most: usize) -> usize {
    let mut all = Vec::new();
    while all.len() < most && all.try_reserve(1).is_ok() {
        let mut object = Box::new(Object { state: State::Begin, input: all.len() as u64 });
        object.on_event();
        all.push(object);
    }
    black_box(&all).len()
}

/// Copies one buffer out of a window and the next in: the least that a conflict of stack copying can take. All of them begin at a line, as
/// ours do: where two lie differently in theirs, copying takes up to half as long again.
fn memcpy(buffers: usize, len: usize) {
    const LINE: usize = 64;
    let mut memory = vec![1u8; (buffers + 1) * len.next_multiple_of(LINE) + LINE];
    let begin = memory.as_ptr().align_offset(LINE);
    let mut pieces =
        memory[begin..].chunks_exact_mut(len.next_multiple_of(LINE)).map(|piece| &mut piece[..len]);
    let window = pieces.next().expect("the first");
    let mut all: Vec<&mut [u8]> = pieces.take(buffers).collect();
    let rounds = (100_000_000 / (len * buffers * 2)).clamp(2, 20_000);
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        for _ in 0..rounds {
            for i in 0..buffers {
                all[i].copy_from_slice(black_box(&*window));
                window.copy_from_slice(black_box(&*all[(i + 1) % buffers]));
            }
        }
        println!("{}", (process_cpu_ns() - begun) as f64 / (rounds * buffers) as f64);
    }
    black_box((&window, &all));
}

/// Maps two parts of a file in turn over the same addresses and writes up to two pages of it: where header and
/// thread-locals would be, and the stack pointer, a gap of so many pages and `live` bytes below. The same calls as a conflict of memory aliasing makes, and
/// nothing else: mappings before the window and, if it is a large one, behind it keep its first and last page table here too.
fn remap(live: usize, window_bytes: usize, stack_bytes: usize, touched: usize, gap: usize) {
    const GUARD: usize = 64 << 10;
    const THREADS: usize = 2;
    let gap = gap * 4096;
    let tail = if window_bytes > peregrine_thread::window::PAGE_TABLE_BYTES { 4096 } else { 0 };
    let file = memfd::create(c"bench-remap", PageCount::for_bytes(window_bytes * THREADS), Pages::Base);
    let file = file.expect("a file");
    let options = MapOptions { no_reserve: true, ..MapOptions::default() };
    // SAFETY: new mappings, at an address that nobody uses; then in place of this function's own.
    let map = |at: usize, bytes: usize, access, source, new: bool| unsafe {
        let at = VirtAddr::new(at);
        let place = if new { Placement::At(at) } else { Placement::Replace(at) };
        mem::map(PageCount::for_bytes(bytes), access, source, place, options).expect("a mapping");
    };
    let guard = 0x0c00_0000_0000;
    let window = guard + GUARD;
    map(guard, GUARD, Protection::None, Source::Anonymous, true);
    if tail != 0 {
        map(guard + window_bytes - tail, tail, Protection::None, Source::Anonymous, true);
    }
    let header = window + stack_bytes + gap;
    let turn = |new: bool| {
        for i in 0..THREADS {
            let part = Source::Shared(file.as_fd(), PageCount::for_bytes(i * window_bytes + GUARD));
            map(window, window_bytes - GUARD - tail, Protection::ReadWrite, part, new && i == 0);
            for page in [header, header - gap - live].into_iter().take(touched) {
                // SAFETY: inside the window.
                unsafe { (page as *mut u64).write_volatile(1) };
            }
        }
    };
    turn(true);
    const ROUNDS: usize = 1_000;
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        for _ in 0..ROUNDS {
            turn(false);
        }
        println!("{}", (process_cpu_ns() - begun) as f64 / (ROUNDS * THREADS) as f64);
    }
}

const REMAP_WINDOW: usize = 0x0c00_0000_0000;

/// A new mapping of this process's own.
fn map_at(at: usize, bytes: usize, access: Protection, source: Source<'_>) {
    let (at, options) = (VirtAddr::new(at), MapOptions { no_reserve: true, ..MapOptions::default() });
    // SAFETY: at an address that nobody uses.
    unsafe { mem::map(PageCount::for_bytes(bytes), access, source, Placement::At(at), options) }
        .expect("a mapping");
}

fn write_to(page: usize) {
    // SAFETY: a page of a mapping of this process's own.
    unsafe { (page as *mut u64).write_volatile(1) };
}

/// The other way to remap: two owners' mappings are kept, whole and with their page tables, and change places by two `mremap`, so
/// that the two pages written after it do not fault. Windows are whole page tables, which the kernel then moves as such.
fn parked(live: usize, window_bytes: usize, stack_bytes: usize) {
    let window_bytes = window_bytes.next_multiple_of(peregrine_thread::window::PAGE_TABLE_BYTES);
    let file = memfd::create(c"bench-parked", PageCount::for_bytes(window_bytes * 2), Pages::Base);
    let file = file.expect("a file");
    let park = [REMAP_WINDOW + (1 << 32), REMAP_WINDOW + (2 << 32)];
    let part = |i: usize| Source::Shared(file.as_fd(), PageCount::for_bytes(i * window_bytes));
    map_at(REMAP_WINDOW, window_bytes, Protection::ReadWrite, part(1));
    map_at(park[0], window_bytes, Protection::ReadWrite, part(0));
    let header = REMAP_WINDOW + (64 << 10) + stack_bytes;
    let to = |from: usize, to: usize| {
        let from = PageRange::covering(VirtAddr::new(from), window_bytes);
        // SAFETY: this function's own mapping, to a place where nothing is.
        unsafe { mem::remap(from, PageCount::for_bytes(window_bytes), Some(VirtAddr::new(to))) }
            .expect("it moves");
    };
    samples_of(1_000, || {
        for i in 0..2 {
            to(REMAP_WINDOW, park[1 - i]);
            to(park[i], REMAP_WINDOW);
            write_to(header & !4095);
            write_to((header - live) & !4095);
        }
    });
}

/// And what a remap would take if header and thread-locals lay in memory that stays, and were copied: one fault less.
fn header_copied(live: usize, window_bytes: usize, stack_bytes: usize) {
    const GUARD: usize = 64 << 10;
    let tail = 4096;
    let file = memfd::create(c"bench-header", PageCount::for_bytes(window_bytes * 2), Pages::Base);
    let file = file.expect("a file");
    map_at(REMAP_WINDOW, GUARD, Protection::None, Source::Anonymous);
    map_at(REMAP_WINDOW + window_bytes - tail, tail, Protection::None, Source::Anonymous);
    let (window, bytes) = (REMAP_WINDOW + GUARD, window_bytes - GUARD - tail);
    map_at(window, bytes, Protection::ReadWrite, Source::Shared(file.as_fd(), PageCount::for_bytes(GUARD)));
    let (mut header, mut kept) = (vec![1u8; 4096], [vec![1u8; 4096], vec![2u8; 4096]]);
    samples_of(1_000, || {
        for i in 0..2 {
            kept[1 - i].copy_from_slice(black_box(&header));
            let part = Source::Shared(file.as_fd(), PageCount::for_bytes(i * window_bytes + GUARD));
            let at = Placement::Replace(VirtAddr::new(window));
            let options = MapOptions { no_reserve: true, ..MapOptions::default() };
            // SAFETY: in place of this function's own mapping.
            unsafe { mem::map(PageCount::for_bytes(bytes), Protection::ReadWrite, part, at, options) }
                .expect("a mapping");
            header.copy_from_slice(black_box(&kept[i]));
            write_to((window + stack_bytes - live) & !4095);
        }
    });
    black_box(&header);
}

/// Prints samples of `turns` times two switches.
fn samples_of(turns: usize, mut two: impl FnMut()) {
    two();
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        (0..turns).for_each(|_| two());
        println!("{}", (process_cpu_ns() - begun) as f64 / (2 * turns) as f64);
    }
}

/// A write of the FS base, and nothing else.
fn fs_base() {
    use peregrine_sys::cpu;
    const WRITES: usize = 100_000;
    if !cpu::has_fsgsbase() {
        return;
    }
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        for _ in 0..WRITES {
            // SAFETY: what it is already.
            unsafe { cpu::set_fs_base(cpu::thread_pointer(), true) };
        }
        println!("{}", (process_cpu_ns() - begun) as f64 / WRITES as f64);
    }
}

/// A system call that does nothing: the measure of this machine's kernel.
fn null_call() {
    const CALLS: u32 = 20_000;
    for _ in 0..SAMPLES {
        let begun = process_cpu_ns();
        for _ in 0..CALLS {
            black_box(std::os::unix::process::parent_id());
        }
        println!("{}", (process_cpu_ns() - begun) as f64 / f64::from(CALLS));
    }
}
