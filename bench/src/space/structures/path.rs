//! Instructions per operation (item 6), one member, counted by callgrind: the difference of two runs of a program that does
//! nothing else.

use super::plain::counters::{Cached, Counter, Shared};
use super::plain::scene::{CYCLE, arena, open};
use super::plain::space::model::{Delivery, ModelMmu, Tables};
use crate::report::Report;
use peregrine_base::sync::AtomicI64;
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_space::process::{Config, Filling, Space};
use peregrine_sys::mem::{self, Advice};
use peregrine_vm::Mapping;
use std::collections::BTreeMap;
use std::process::{Command, ExitCode};
use std::sync::RwLock;

const PAGE: usize = 64 * 1000 + 5;

/// Each subject: what it does in a round.
const SUBJECTS: &[&str] = &[
    "map and unmap",
    "map, fault and unmap",
    "lookup",
    "Refcache",
    "shared atomic",
    "RwLock<BTreeMap>",
    "process",
    "bare",
    "process, 16 pages",
    "bare, 16 pages",
];

/// `space-path SUBJECT ROUNDS`.
pub fn run_one(arguments: &[String]) -> ExitCode {
    let rounds: usize = arguments.get(1).and_then(|n| n.parse().ok()).unwrap_or(10);
    let (arena, frames) = arena(1, 64);
    let mmu = ModelMmu::new(&frames, 1, Tables::Views, Delivery::Interrupt);
    let (space, mut members) = open(&arena, &mmu, &frames, 1);
    let m = &mut members[0];
    let cycle = |name: &str| CYCLE.iter().find(|(n, _)| *n == name).expect("an operation").1;
    let (map, fault, look, unmap) = (cycle("map"), cycle("fault"), cycle("lookup"), cycle("unmap"));
    match arguments.first().map(String::as_str) {
        Some("map and unmap") => (0..rounds).for_each(|_| {
            map(&space, m, PAGE);
            unmap(&space, m, PAGE);
        }),
        Some("map, fault and unmap") => (0..rounds).for_each(|round| {
            map(&space, m, PAGE);
            fault(&space, m, PAGE);
            unmap(&space, m, PAGE);
            // Frames come back two ticks later.
            if round % 16 == 15 {
                (0..4).for_each(|_| {
                    m.tick(&frames);
                });
            }
        }),
        Some("lookup") => {
            map(&space, m, PAGE);
            (0..rounds).for_each(|_| look(&space, m, PAGE));
        }
        Some("Refcache") => {
            let counter = Cached::new(1);
            (0..rounds).for_each(|_| counter.take_and_drop(0));
        }
        Some("shared atomic") => {
            let counter = Shared(AtomicI64::new(1));
            (0..rounds).for_each(|_| counter.take_and_drop(0));
        }
        Some("RwLock<BTreeMap>") => {
            let tree = RwLock::new((0..1000usize).map(|n| (n << 10, n)).collect::<BTreeMap<_, _>>());
            (0..rounds).for_each(|_| {
                tree.write().expect("nobody panics").insert(PAGE, 0);
                tree.write().expect("nobody panics").remove(&PAGE);
            });
        }
        // A member of a space over processes, and the calls that it makes (the kernel's part is not counted).
        Some("process") => in_a_process(rounds, 1),
        Some("bare") => bare_calls(rounds, 1),
        Some("process, 16 pages") => in_a_process(rounds, 16),
        Some("bare, 16 pages") => bare_calls(rounds, 16),
        _ => return ExitCode::from(2),
    }
    ExitCode::SUCCESS
}

const PROCESS_PAGES: PageCount = PageCount::new(2048);

/// Maps, touches and unmaps `pages` pages, as `local` does; nothing is enforced, for valgrind knows neither guards nor userfaultfd.
fn in_a_process(rounds: usize, pages: usize) {
    let config = Config { pages: PROCESS_PAGES, filling: Filling::KernelTrusting, at: None };
    let space = Space::create(config).expect("a space");
    let mut member = space.join().expect("a member");
    let start = VirtAddr::new(space.region().start().as_usize() + 64 * PAGE_SIZE);
    let range = PageRange::new(start, PageCount::new(pages));
    for _ in 0..rounds {
        member.map_at(range, Protection::ReadWrite).expect("map");
        for page in 0..pages {
            member.bytes(range).store_u64(page * PAGE_SIZE, 1).expect("in bounds");
        }
        member.unmap(range).expect("unmap");
        member.poll();
    }
}

/// The same by hand: the frames are zeroed, touched and dropped from the page table.
fn bare_calls(rounds: usize, pages: usize) {
    let memory = Mapping::memfd(PROCESS_PAGES).expect("memory");
    let alias = memory.alias(Protection::ReadWrite).expect("an alias");
    let part = |of: &Mapping| of.pages(64, pages).expect("pages");
    let (range, zeroed) = (part(&memory), part(&alias));
    let at = |range: PageRange, page: usize| VirtAddr::new(range.start().as_usize() + page * PAGE_SIZE);
    for _ in 0..rounds {
        // SAFETY: pages of mappings that nobody else refers to.
        unsafe {
            zeroed.start().as_ptr::<u8>().write_bytes(0, zeroed.len_bytes());
            (0..pages).for_each(|page| at(range, page).as_ptr::<u64>().write_volatile(1));
            mem::advise(range, Advice::DontNeed).expect("DONTNEED");
        }
    }
}

pub fn run(report: &mut Report) {
    report.section("Instructions per operation, one member (callgrind)");
    let Ok(me) = std::env::current_exe() else { return };
    let count = |subject: &str, rounds: usize| -> Option<f64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(&me)
            .args(["space-path", subject, &rounds.to_string()])
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        text.lines().find_map(|l| l.split_once("Collected :")?.1.trim().parse().ok())
    };
    let per_round = |subject: &str| Some((count(subject, 528)? - count(subject, 16)?) / 512.0);
    let mut found = BTreeMap::new();
    for subject in SUBJECTS {
        let Some(instructions) = per_round(subject) else {
            report.note("skipped: valgrind is not installed, or can't run this program");
            return;
        };
        found.insert(*subject, instructions);
    }
    let row = |case: &str, value: f64, baseline: Option<(&str, f64)>| {
        report.value(&format!("instructions: {case}"), "per round", "instr", value, baseline);
    };
    row(
        "map and unmap a page",
        found["map and unmap"],
        Some(("RwLock<BTreeMap> insert, remove", found["RwLock<BTreeMap>"])),
    );
    row("map, fault (model MMU and ticks included) and unmap", found["map, fault and unmap"], None);
    row(
        "map, touch and unmap a page in a process, zeroing included",
        found["process"],
        Some(("bare calls", found["bare"])),
    );
    row(
        "map, touch and unmap 16 pages in a process, zeroing included",
        found["process, 16 pages"],
        Some(("bare calls", found["bare, 16 pages"])),
    );
    row("lookup", found["lookup"], None);
    row("Refcache: take and drop", found["Refcache"], Some(("shared atomic", found["shared atomic"])));
}
