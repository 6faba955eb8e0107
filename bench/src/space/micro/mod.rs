//! RadixVM's `local`, `pipeline` and `global` (item 1), and the word-position index of its MapReduce (item 5; on Peregrine
//! threads: `index`): ours over each mechanism beside the bare calls of the same mechanism in as many
//! processes (`bare`; where one unmaps what another has in view, beside bare calls that see to it as well: `told`), and beside Linux threads. Zeroing is part of every operation: by the kernel for threads, through the alias for
//! processes; what of it is zeroing is shown at `local`, and zeroing by itself in `zeroing`.

mod bare;
mod ours;
mod stage;
mod told;

use crate::measure::{Options, Pair, alone, versus, versus_within};
use crate::report::Report;
use bare::{Bare, Thread, Way};
use peregrine_vm::capabilities::{Capabilities, Capability};
use stage::{Kind, Play, Program, Ran, Worker, play};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;
use told::{Mail, Told};

/// At least so much of the floor's rate.
const OF_THE_FLOOR: f64 = 0.9;

/// What the goals are judged by: medians by name.
type Medians = BTreeMap<String, f64>;

pub fn run(report: &mut Report, options: &Options) {
    let caps = Capabilities::probe();
    if let Some(lack) = [Capability::GuardShared, Capability::MinorShared].iter().find_map(|c| caps.lack(*c))
    {
        return report.note(&format!("skipped: every mechanism is measured, and here one can't be: {lack}"));
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(stage::MEMBERS);
    let mut medians = Medians::new();
    let mut counts: Vec<usize> = vec![1];
    let mut n = 2;
    while n <= cores {
        counts.push(n);
        n *= 2;
    }
    for program in Program::ALL {
        report.section(&format!("{}: thousand {} a second", program.name(), unit_of(program)));
        let sizes = match program {
            Program::Index => [("8 MB", 2048), ("64 KB", 16)],
            _ => [("4 KiB", 1), ("64 KiB", 16)],
        };
        for (size, unit) in sizes {
            for &members in &counts {
                let name = format!("{} {size} x{members}", program.name());
                if !options.wants(&name) {
                    continue;
                }
                let time = Duration::from_millis(if options.quick { 40 } else { 120 });
                let rounds = options.rounds(9);
                let plan = |kind| Play { kind, program, members, unit, time };
                for way in Way::ALL {
                    measure(report, &mut medians, &name, way, plan(Kind::Processes), rounds);
                }
                if program == Program::Local {
                    for way in Way::ALL {
                        zeroing(report, &medians, &name, way, plan(Kind::Processes), rounds);
                    }
                }
                threads(report, &mut medians, &name, plan(Kind::Threads), rounds);
                if program == Program::Index {
                    crate::space::index::run(report, options, size, unit * 4096, members);
                }
            }
        }
    }
    goals(report, &medians, cores);
}

const fn unit_of(program: Program) -> &'static str {
    match program {
        Program::Global => "rounds over 4 MiB",
        Program::Index => "rounds of 65,536 words a member",
        _ => "maps, touches and unmaps",
    }
}

/// One run of ours.
fn ours(way: Way, plan: Play) -> Ran {
    let space = Box::leak(Box::new(ours::space(way)));
    let place: *mut _ = space;
    let make = |_: usize| -> Box<dyn Worker> { Box::new(ours::Ours::new(space)) };
    let ran = play(plan, &make);
    // SAFETY: leaked above; the members were other processes, which have ended.
    drop(unsafe { Box::from_raw(place) });
    ran
}

/// Ours and the bare calls, turn and turn about.
fn measure(report: &Report, medians: &mut Medians, name: &str, way: Way, plan: Play, rounds: usize) {
    let shootdowns = Cell::new(0.0f64);
    let ours = || {
        let ran = ours(way, plan);
        shootdowns.set(ran.shootdowns);
        ran.per_second / 1e3
    };
    let bare = || {
        let frames = bare::frames();
        let make = |_: usize| -> Box<dyn Worker> { Box::new(Bare::new(&frames, way, plan.unit)) };
        play(plan, &make).per_second / 1e3
    };
    // A miss or a hit by less than what two runs differ by says nothing: as often as it takes to tell.
    let pair: Pair = versus_within(OF_THE_FLOOR, rounds, &ours, bare);
    let case = format!("{name} {}", way.name());
    report.pair(&case, "rate", "k/s", "bare calls in processes", 1, &pair);
    report.value(&case, "members asked an operation", "", shootdowns.get(), None);
    medians.insert(case.clone(), pair.ours.median());
    medians.insert(format!("{case} ratio"), pair.ratio());
    medians.insert(format!("{case} bare"), pair.baseline.median());
    medians.insert(format!("{case} shootdowns"), shootdowns.get());
    // Where pages that one unmaps are in another one's view, the bare calls promise nothing. What it costs to promise it:
    let shares = matches!(plan.program, Program::Pipeline | Program::Global) && plan.members > 1;
    if shares && way != Way::DontNeed {
        let told = || {
            let (frames, mail) = (bare::frames(), Mail::new());
            let make = |i: usize| -> Box<dyn Worker> {
                Box::new(Told::new(&frames, way, plan.unit, mail, (plan.program, plan.members, i)))
            };
            let ran = play(plan, &make);
            // SAFETY: the members were other processes, which have ended.
            unsafe { mail.free() };
            ran.per_second / 1e3
        };
        let pair: Pair = versus_within(OF_THE_FLOOR, rounds, &ours, told);
        let case = format!("{case}, enforced");
        report.pair(&case, "rate", "k/s", "bare calls in processes that tell each other", 1, &pair);
        medians.insert(format!("{case} ratio"), pair.ratio());
        medians.insert(format!("{case} bare"), pair.baseline.median());
    }
}

/// What of an operation is zeroing: the bare calls with it and without, turn and turn about.
fn zeroing(report: &Report, medians: &Medians, name: &str, way: Way, plan: Play, rounds: usize) {
    let run = |zeroes: bool| {
        let frames = bare::frames();
        let make = |_: usize| -> Box<dyn Worker> {
            let bare = Bare::new(&frames, way, plan.unit);
            Box::new(if zeroes { bare } else { bare.without_zeroing() })
        };
        // Microseconds of each member for an operation.
        plan.members as f64 * 1e6 / play(plan, &make).per_second
    };
    let pair = versus(rounds, || run(true), || run(false));
    let case = format!("{name} {}", way.name());
    report.pair(&format!("{case}, bare calls"), "time", "us", "bare calls that zero nothing", 1, &pair);
    let (with, without) = (pair.baseline.median() * pair.ratio(), pair.baseline.median());
    let bare = 1.0 - without / with;
    // Ours zeroes the same pages the same way.
    let operation = plan.members as f64 * 1e3 / medians[&case];
    let whole = (with - without) / operation;
    report.value(
        &format!("{case}, zeroing"),
        "share",
        "",
        whole,
        Some(("its share of the bare calls", bare)),
    );
}

fn threads(report: &Report, medians: &mut Medians, name: &str, plan: Play, rounds: usize) {
    for (what, mapped) in [("threads mmap/munmap", true), ("threads DONTNEED", false)] {
        let range = Thread::reservation();
        let make = move |_: usize| -> Box<dyn Worker> {
            Box::new(if mapped { Thread::Map(range) } else { Thread::DontNeed(range) })
        };
        let run = || play(plan, &make).per_second / 1e3;
        let case = format!("{name} {what}");
        let samples = match judged_way(plan.program).filter(|_| mapped) {
            // Turn and turn about: threads have two speeds here, 25 % apart, for seconds at a time.
            Some(way) => {
                let processes = Play { kind: Kind::Processes, ..plan };
                let pair = versus(rounds, || ours(way, processes).per_second / 1e3, run);
                let case = format!("{name} {} beside threads", way.name());
                report.pair(&case, "rate", "k/s", "mmap/munmap by threads", 1, &pair);
                medians.insert(case, pair.ratio());
                pair.baseline
            }
            None => alone(rounds, run),
        };
        report.single(&case, "rate", "k/s", 1, &samples);
        // SAFETY: the reservation is this function's, and all threads have ended.
        let _ = unsafe { peregrine_sys::mem::unmap(range) };
    }
}

/// The mechanism that the goals set beside threads.
const fn judged_way(program: Program) -> Option<Way> {
    match program {
        Program::Local | Program::Pipeline => Some(Way::Guard),
        Program::Global => Some(Way::Continue),
        Program::Index => None,
    }
}

fn goals(report: &Report, medians: &Medians, cores: usize) {
    report.note("\n## Goals");
    let get = |name: &str| medians.get(name).copied();
    let most = if cores >= 2 { 2 } else { 1 };
    let judge = |what: String, value: Option<f64>, goal: f64| match value {
        // Left out of this run.
        None => {}
        Some(v) => {
            let verdict = if v >= goal { "met" } else { "MISSED" };
            report.note(&format!("{what}: {v:.2} (at least {goal}): {verdict}"));
        }
    };
    for program in [Program::Local, Program::Pipeline, Program::Global] {
        for size in ["4 KiB", "64 KiB"] {
            for way in Way::ALL {
                let case = |n: usize| format!("{} {size} x{n} {}", program.name(), way.name());
                for n in [1, most] {
                    judge(
                        format!("{}: of the bare calls", case(n)),
                        get(&format!("{} ratio", case(n))),
                        OF_THE_FLOOR,
                    );
                }
                let told = format!("{}, enforced", case(most));
                judge(
                    format!("{told}: of bare calls that enforce it, too"),
                    get(&format!("{told} ratio")),
                    OF_THE_FLOOR,
                );
                let scaling = |suffix: &str| {
                    Some(get(&format!("{}{suffix}", case(most)))? / get(&format!("{}{suffix}", case(1)))?)
                };
                let ours = scaling("").zip(scaling(" bare")).map(|(a, b)| a / b);
                judge(format!("{}: scaling, of the bare calls'", case(most)), ours, 0.95);
                // One bare process need tell nobody, so the floor of one is the same.
                let floor =
                    get(&format!("{told} bare")).zip(get(&format!("{} bare", case(1)))).map(|(a, b)| a / b);
                let ours = scaling("").zip(floor).map(|(a, b)| a / b);
                judge(format!("{told}: scaling, of the bare calls' that enforce it, too"), ours, 0.95);
            }
        }
    }
    for (program, size, goal) in [
        (Program::Local, "4 KiB", 5.0),
        (Program::Pipeline, "4 KiB", 3.0),
        (Program::Global, "4 KiB", 1.0),
        (Program::Global, "64 KiB", 1.0),
    ] {
        let Some(way) = judged_way(program) else { continue };
        let case = format!("{} {size} x{most} {} beside threads", program.name(), way.name());
        judge(format!("{case}' mmap/munmap"), get(&case), goal);
    }
    for (case, asked) in medians.iter().filter(|(c, _)| c.starts_with("local") && c.ends_with("shootdowns")) {
        let verdict = if *asked == 0.0 { "met" } else { "MISSED" };
        report.note(&format!("{case} an operation: {asked} (0): {verdict}"));
    }
}
