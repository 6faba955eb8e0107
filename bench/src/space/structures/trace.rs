//! The recorder checked against the processor: a memory trace of the real code (`valgrind --tool=lackey --trace-mem=yes`).
//!
//! The same scene runs as a program of its own under valgrind, over plain atomics. A store to a marked byte tells which core's turn it
//! is. From the trace, the lines of the arena that each core read and wrote are compared with the recording: a plain store to
//! shared memory, which no recorder behind `sync` can see, would be in one and not in the other. `--plant` makes one.
//!
//! The trace sees any code, so structures whose sources we don't have are counted by it too: all memory but the stack.

use super::plain::scene as plain;
use super::recorded::base::sync::record::{Access, as_core, shared_lines, take};
use super::recorded::scene as recorded;
use crate::report::Report;
use peregrine_base::sync::{AtomicU8, Ordering};
use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::process::{Command, ExitCode, Stdio};
use std::sync::RwLock;

const CORES: usize = 4;
const ROUNDS: usize = 2;
/// A store to byte `n` is the beginning of core `n`'s turn; to the last one, the end.
static MARK: [AtomicU8; 256] = [const { AtomicU8::new(0) }; 256];
const END: usize = 255;

fn mark<R>(core: usize, f: impl FnOnce() -> R) -> R {
    MARK[core].store(1, Ordering::Relaxed);
    let result = f();
    MARK[END].store(1, Ordering::Relaxed);
    result
}

const fn page_of(core: usize) -> usize {
    64 * 1000 + core
}

/// `space-scene WHAT [--plant]`: the program that is traced. Says first where things lie. `space-scene check` compares, for tests.
pub fn run_scene(arguments: &[String]) -> ExitCode {
    let stack = 0u8;
    let place = &raw const stack as usize;
    let marks = MARK.as_ptr() as usize;
    match arguments.first().map(String::as_str) {
        Some("check") => return check(),
        Some("ours") => ours(marks, place, arguments.iter().any(|a| a == "--plant")),
        Some("btree") => {
            let tree = RwLock::new((0..1000usize).map(|n| (n << 20, n)).collect::<BTreeMap<_, _>>());
            println!("{marks} 0 0 {place}");
            for core in 0..CORES {
                mark(core, || {
                    tree.write().expect("nobody panics").insert((core * 250) << 20 | 1, core);
                    std::hint::black_box(tree.read().expect("nobody panics").get(&((core * 250) << 20)));
                });
            }
        }
        Some("skiplist") => {
            let list = crossbeam_skiplist::SkipMap::new();
            (0..1000usize).for_each(|n| drop(list.insert(n << 20, n)));
            println!("{marks} 0 0 {place}");
            for core in 0..CORES {
                mark(core, || {
                    list.insert((core * 250) << 20 | 1, core);
                    std::hint::black_box(list.get(&((core * 250) << 20)).map(|e| *e.value()));
                });
            }
        }
        _ => return ExitCode::from(2),
    }
    ExitCode::SUCCESS
}

fn ours(marks: usize, stack: usize, plant: bool) {
    use super::plain::space::model::{Delivery, ModelMmu, Tables};
    let (arena, frames) = plain::arena(CORES, CORES * 8);
    let mmu = ModelMmu::new(&frames, CORES, Tables::Views, Delivery::Interrupt);
    let (space, mut members) = plain::open(&arena, &mmu, &frames, CORES);
    let bytes = plain::sizes(CORES, CORES * 8).bytes();
    // The last line of the arena is padding behind the last frame's descriptor: nobody's.
    let spare = (arena.addr() + bytes - 8) as *mut u64;
    println!("{marks} {} {bytes} {stack}", arena.addr());
    for round in 0..=ROUNDS {
        for (_, step) in plain::CYCLE {
            for (core, m) in members.iter_mut().enumerate() {
                if round == 0 {
                    step(&space, m, page_of(core));
                    continue;
                }
                mark(core, || {
                    step(&space, m, page_of(core));
                    if plant {
                        // SAFETY: inside the arena's memory, aligned, in padding that holds nothing.
                        unsafe { spare.write_volatile(core as u64) };
                    }
                });
            }
        }
    }
}

/// The same scene, recorded; addresses count from the arena's start.
fn recording() -> Vec<Access> {
    use super::recorded::space::model::{Delivery, ModelMmu, Tables};
    let (arena, frames) = recorded::arena(CORES, CORES * 8);
    let mmu = ModelMmu::new(&frames, CORES, Tables::Views, Delivery::Interrupt);
    let (space, mut members) = recorded::open(&arena, &mmu, &frames, CORES);
    let (base, bytes) = (arena.addr(), recorded::sizes(CORES, CORES * 8).bytes());
    take();
    for round in 0..=ROUNDS {
        for (_, step) in recorded::CYCLE {
            for (core, m) in members.iter_mut().enumerate() {
                as_core(core as u32, || step(&space, m, page_of(core)));
            }
        }
        if round == 0 {
            take();
        }
    }
    let inside = take().into_iter().filter(|a| (base..base + bytes).contains(&a.addr));
    inside.map(|a| Access { addr: a.addr - base, ..a }).collect()
}

/// What a traced program touched in the cores' turns; addresses in the arena count from its start. `None` without valgrind.
fn trace(arguments: &[&str]) -> Option<Vec<Access>> {
    let me = std::env::current_exe().ok()?;
    let log = tempfile::NamedTempFile::new().ok()?;
    let output = Command::new("valgrind")
        .args(["--tool=lackey", "--trace-mem=yes"])
        .arg(format!("--log-file={}", log.path().display()))
        .arg(me)
        .arg("space-scene")
        .args(arguments)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = said.split_whitespace().filter_map(|n| n.parse::<usize>().ok());
    let (marks, arena, bytes, stack) = (numbers.next()?, numbers.next()?, numbers.next()?, numbers.next()?);
    let mut core = None;
    let mut found = Vec::new();
    for line in std::io::BufReader::new(std::fs::File::open(log.path()).ok()?).lines() {
        let line = line.ok()?;
        let (kind, rest) = (line.get(..3)?, line.get(3..)?);
        let write = match kind {
            " S " | " M " => true,
            " L " => false,
            _ => continue,
        };
        let Some((addr, _)) = rest.split_once(',') else { continue };
        let Ok(addr) = usize::from_str_radix(addr, 16) else { continue };
        if write && (marks..marks + MARK.len()).contains(&addr) {
            core = Some(addr - marks).filter(|c| *c != END);
            continue;
        }
        let Some(core) = core else { continue };
        let in_arena = (arena..arena + bytes).contains(&addr);
        let on_stack = (stack.saturating_sub(1 << 20)..stack + (1 << 20)).contains(&addr);
        if (bytes == 0 && !on_stack) || in_arena {
            found.push(Access { core: core as u32, addr: addr - arena, write });
        }
    }
    Some(found)
}

fn lines(log: &[Access], write: bool) -> BTreeSet<(u32, usize)> {
    log.iter().filter(|a| !write || a.write).map(|a| (a.core, a.line())).collect()
}

/// How trace and recording differ, in lines that a core touched.
#[derive(Debug)]
struct Agreement {
    /// Written by the real code in the arena.
    written: usize,
    written_not_recorded: usize,
    touched_not_recorded: usize,
    recorded_not_written: usize,
    /// Lines that one core wrote and another touched.
    shared: usize,
}

impl Agreement {
    fn of(real: &[Access], said: &[Access]) -> Self {
        let differ = |a, b, write| lines(a, write).difference(&lines(b, write)).count();
        Self {
            written: lines(real, true).len(),
            written_not_recorded: differ(real, said, true),
            touched_not_recorded: differ(real, said, false),
            recorded_not_written: differ(said, real, true),
            shared: shared_lines(real).len(),
        }
    }
}

/// No valgrind here: see [`check`].
pub const NO_VALGRIND: u8 = 77;

/// Whether trace and recording agree, and differ with the planted store; [`NO_VALGRIND`] if there is none to trace with.
fn check() -> ExitCode {
    if Command::new("valgrind").arg("--version").output().is_err() {
        return ExitCode::from(NO_VALGRIND);
    }
    let (Some(sound), Some(planted)) = (trace(&["ours"]), trace(&["ours", "--plant"])) else {
        println!("the traced program did not say where things lie, or left no trace");
        return ExitCode::FAILURE;
    };
    let said = recording();
    let (sound, planted) = (Agreement::of(&sound, &said), Agreement::of(&planted, &said));
    println!("{sound:?}\nplanted: {planted:?}");
    // Each core writes some lines, the trace shows no line more than the recording nor less, and no two cores meet in one.
    let agrees = sound.written >= CORES
        && (sound.written_not_recorded, sound.recorded_not_written, sound.shared) == (0, 0, 0);
    // One line, which all cores write.
    let caught = planted.written_not_recorded == CORES && planted.shared == 1;
    ExitCode::from(u8::from(!(agrees && caught)))
}

pub fn run(report: &mut Report) {
    report.section("The recorder against a memory trace of the real code (valgrind lackey)");
    let Some(real) = trace(&["ours"]).filter(|t| !t.is_empty()) else {
        report.note("skipped: no trace (valgrind is not installed, or can't run this program)");
        return;
    };
    let said = recording();
    let found = Agreement::of(&real, &said);
    let value = |what: &str, unit, n: usize| {
        report.value(&format!("counted, trace: {what}"), unit, "", n as f64, None);
    };
    value("lines written in the arena", "core-lines", found.written);
    value("written and not recorded", "core-lines", found.written_not_recorded);
    value("touched and not recorded", "core-lines", found.touched_not_recorded);
    value("recorded and not written", "core-lines", found.recorded_not_written);
    value("shared lines in the arena", "lines", found.shared);
    if let Some(planted) = trace(&["ours", "--plant"]) {
        let planted = Agreement::of(&planted, &said);
        value("a planted plain store, not recorded", "core-lines", planted.written_not_recorded);
        value("shared lines with the planted store", "lines", planted.shared);
    }
    for (what, name) in [("btree", "RwLock<BTreeMap>"), ("skiplist", "crossbeam skip list")] {
        if let Some(log) = trace(&[what]) {
            let shared = shared_lines(&log).len() as f64 / CORES as f64;
            report.value(
                &format!("counted, trace: {name}, insert and look up, {CORES} cores, allocator included"),
                "shared lines",
                "/op",
                shared,
                None,
            );
        }
    }
}
