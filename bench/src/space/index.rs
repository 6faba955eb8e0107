//! The paper's application on Peregrine threads (item 5): a word-position index by MapReduce.
//!
//! ```text
//!   map      each thread indexes its words in units of its own heap, taken and given back each round
//!            ─▶ copies the index into its region, which the others open by name
//!   reduce   each thread counts the positions of its share of the words in the regions of all
//! ```
//!
//! The same index, on members of a space that unmap for all and on Linux threads that `munmap`, is in `micro`: there readers walk
//! the units in place. Threads of a World share nothing but regions, so here the index is copied once (0.05 ms a round), and a heap keeps
//! its memory: a unit that is taken again is zeroed whole, used or not, which for 8 MB is half of a round (1 ms).
//!
//! A World is started from a process of one thread, so a run is this program again with a hidden sub-command.

use crate::measure::{Options, Rng, Samples};
use crate::report::Report;
use peregrine_sys::process::pin_to_cpu;
use peregrine_world::region::{self, Cells};
use peregrine_world::{Builder, Config, yield_now};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

/// Words that each thread indexes in a round, and different ones: as in `micro`.
pub const WORDS: usize = 1 << 16;
pub const VOCABULARY: usize = 1 << 13;

/// The word at the next position: the smaller of two, so that some are much more frequent than others.
pub fn next_word(rng: &mut Rng) -> usize {
    let (a, b) = (rng.next_u64() as usize % VOCABULARY, rng.next_u64() as usize % VOCABULARY);
    a.min(b)
}

const SAMPLES: usize = 9;
const ROUNDS: usize = 10;

/// Bytes of an index: a head for each word, and a position and a link for each position.
const INDEX_BYTES: usize = 4 * (VOCABULARY + 2 * WORDS);

/// Rounds a second of each sample.
fn subject(unit_bytes: usize, threads: usize) -> Option<Samples> {
    let out = Command::new(std::env::current_exe().ok()?)
        .args(["space-case", "index", &unit_bytes.to_string(), &threads.to_string()])
        .stderr(Stdio::inherit())
        .output()
        .ok()?;
    let mut samples = Samples::default();
    String::from_utf8_lossy(&out.stdout).lines().filter_map(|l| l.parse().ok()).for_each(|v| samples.push(v));
    (out.status.success() && samples.len() == SAMPLES).then_some(samples)
}

/// Thousand rounds a second of Peregrine threads, for the table that `micro` prints.
pub fn run(report: &Report, options: &Options, size: &str, unit_bytes: usize, threads: usize) {
    let case = format!("index {size} x{threads} Peregrine threads");
    if !options.wants(&case) {
        return;
    }
    match subject(unit_bytes, threads) {
        Some(samples) => report.single(&case, "rate", "k/s", ROUNDS, &samples.scaled(1e-3)),
        None => report.note(&format!("    {case}: failed")),
    }
}

/// `space-case index UNIT_BYTES THREADS`: prints rounds a second.
pub fn run_case(arguments: &[String]) -> ExitCode {
    let number = |i: usize| arguments.get(i).and_then(|n: &String| n.parse::<usize>().ok());
    let (Some("index"), Some(_), Some(threads)) =
        (arguments.first().map(String::as_str), number(1), number(2))
    else {
        return ExitCode::from(2);
    };
    let config = Config { nodes: threads as u32, image_interval: None, ..Config::default() };
    let argument = format!("{} {threads}", arguments[1]);
    let ended = peregrine_world::run(config, main_thread, 0, argument.as_bytes()).expect("a World");
    if ended.code == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main_thread(_: usize, argument: Vec<u8>, _: Vec<u32>) -> Result<(Vec<u8>, Vec<u32>), String> {
    let text = String::from_utf8(argument).map_err(|e| e.to_string())?;
    let mut numbers = text.split(' ').filter_map(|n| n.parse::<usize>().ok());
    let (unit, threads) = (numbers.next().unwrap_or(4096), numbers.next().unwrap_or(1));
    // Cells: threads that arrived, barriers passed, and what each reducer counted.
    let board = region::create("board", 8 * (2 + threads)).map_err(|e| e.to_string())?;
    // Asked before the first worker pins its node: what can be had there is one processor from then on.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for sample in 0..=SAMPLES {
        let begun = Instant::now();
        let workers: Vec<_> = (0..threads)
            .map(|i| Builder::new().node(i as u32).spawn(worker, (i, threads, unit, i % cores)))
            .collect::<Result<_, _>>()
            .map_err(|e| e.to_string())?;
        for worker in workers {
            worker.join().map_err(|e| e.to_string())?;
        }
        // The first one does not count.
        if sample > 0 {
            println!("{}", ROUNDS as f64 / begun.elapsed().as_secs_f64());
        }
    }
    drop(board);
    Ok((vec![0], Vec::new()))
}

/// Units of a thread's own heap, addressed as one array of words.
struct Units {
    /// Words of a unit: a power of two, or finding a word's unit would be a division, and that dearer than the word.
    words_each: usize,
    units: Vec<Vec<u32>>,
    used: usize,
}

impl Units {
    fn new(unit_bytes: usize) -> Self {
        let words_each = unit_bytes / 4;
        assert!(words_each.is_power_of_two(), "units of {unit_bytes} bytes");
        Self { words_each, units: Vec::new(), used: 0 }
    }

    fn take(&mut self, words: usize) -> usize {
        while self.used + words > self.units.len() * self.words_each {
            self.units.push(vec![0; self.words_each]);
        }
        self.used += words;
        self.used - words
    }

    fn place(&self, at: usize) -> (usize, usize) {
        (at >> self.words_each.trailing_zeros(), at & (self.words_each - 1))
    }

    fn get(&self, at: usize) -> u32 {
        let (unit, word) = self.place(at);
        self.units[unit][word]
    }

    fn set(&mut self, at: usize, value: u32) {
        let (unit, word) = self.place(at);
        self.units[unit][word] = value;
    }

    fn copy_to(&self, cells: Cells<'_, u32>) {
        for (i, unit) in self.units.iter().enumerate() {
            let first = i * self.words_each;
            cells.write(first, &unit[..unit.len().min(self.used - first)]).expect("the index fits");
        }
    }
}

fn barrier(board: Cells<'_, u64>, threads: usize) {
    let round = board.get(1).expect("a cell");
    if board.add(0, 1).expect("a cell") + 1 == threads as u64 {
        board.set(0, 0).expect("a cell");
        board.set(1, round + 1).expect("a cell");
    }
    while board.get(1).expect("a cell") == round {
        yield_now();
    }
}

fn worker((index, threads, unit, cpu): (usize, usize, usize, usize)) {
    let _ = pin_to_cpu(cpu);
    let board = region::open("board").expect("made by the main thread");
    let board = board.cells::<u64>();
    let mut rng = Rng(index as u64);
    for _ in 0..ROUNDS {
        let shared = region::open_or_create(&format!("index {index}"), INDEX_BYTES).expect("a region");
        let mut mine = Units::new(unit);
        let heads = mine.take(VOCABULARY);
        for position in 1..=WORDS as u32 {
            let word = next_word(&mut rng);
            let node = mine.take(2);
            mine.set(node, position);
            mine.set(node + 1, mine.get(heads + word));
            mine.set(heads + word, node as u32);
        }
        mine.copy_to(shared.cells());
        // The units go back to the heap before the others' are read.
        drop(mine);
        barrier(board, threads);
        let mut counted = 0u64;
        for member in 0..threads {
            let theirs = region::open(&format!("index {member}")).expect("made before the barrier");
            let theirs = theirs.cells::<u32>();
            let at = |i: usize| theirs.get(i).expect("in the index") as usize;
            for word in (index..VOCABULARY).step_by(threads) {
                let mut node = at(word);
                while node != 0 {
                    counted += 1;
                    node = at(node + 1);
                }
            }
        }
        board.set(2 + index, counted).expect("a cell");
        barrier(board, threads);
        let all: u64 = (0..threads).map(|i| board.get(2 + i).expect("a cell")).sum();
        assert_eq!(all, (WORDS * threads) as u64, "the index lost positions");
    }
}
