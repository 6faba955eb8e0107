//! TRAP, Appel1, Appel2, PROTN and UNPROT, by their method: 100 units, touched in random order, really writable first;
//! Appel1's handler protects the unit touched before and opens this one, Appel2 protects all in one call.

use super::raw::{self, Bare};
use super::{Goals, Kind, LAYER, Second, UNITS, Way, write_units};
use crate::measure::{Options, Rng, time_ns, versus_within};
use crate::report::Report;
use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_vm::{
    Capabilities, Decision, Inline, Mapping, Mechanism, PAGE_SIZE, PageCount, PageRange, Protection, Region,
    Trap, VirtAddr,
};
use std::sync::Arc;

const COUNT: usize = 100;

/// Our side: a region whose handler does what the bare handler does.
pub struct Ours {
    pub memory: Arc<Mapping>,
    pub region: Region,
    closed: Protection,
    state: Arc<State>,
    unit: PageCount,
}

struct State {
    idle: AtomicUsize,
    reprotect: AtomicUsize,
    last: AtomicUsize,
}

impl Ours {
    pub fn new(way: Way, kind: Kind, units: usize, unit: PageCount, caps: &Capabilities) -> Self {
        let memory = Arc::new(kind.make(PageCount::new(units * unit.get())));
        let mechanism = match way {
            Way::MprotectRead | Way::MprotectNone => Mechanism::Mprotect,
            Way::WriteProtect => Mechanism::Sigbus,
            Way::Pager => Mechanism::Pager,
            Way::Guard => Mechanism::Guard,
        };
        let none = matches!(way, Way::MprotectNone | Way::Guard);
        let closed = if none { Protection::None } else { Protection::Read };
        let state = Arc::new(State {
            idle: AtomicUsize::new(0),
            reprotect: AtomicUsize::new(0),
            last: AtomicUsize::new(0),
        });
        let builder = Region::builder(memory.clone()).force(mechanism).traps_reads(none).traps_writes(!none);
        let builder = match mechanism.is_inline() {
            // SAFETY: atomics and the trap's operations.
            true => builder.inline(unsafe { Inline::new(handler::<true>(state.clone(), unit, closed)) }),
            false => builder.pager(handler::<false>(state.clone(), unit, closed)),
        };
        let region = builder.build(caps).expect("region");
        Self { memory, region, closed, state, unit }
    }
}

/// What each trap does. Of a type of its own for each use, as a program's handler is, and so compiled into its caller: a return
/// after a system call costs half a microsecond.
fn handler<const INLINE: bool>(
    seen: Arc<State>,
    unit: PageCount,
    closed: Protection,
) -> impl Fn(&Trap<'_>) -> Decision {
    move |trap| {
        let idle = seen.idle.load(Ordering::Relaxed);
        if idle > 0 {
            seen.idle.store(idle - 1, Ordering::Relaxed);
            return Decision::Retry;
        }
        let block = trap.block(unit);
        if seen.reprotect.load(Ordering::Relaxed) != 0 {
            let last = seen.last.swap(block.start().as_usize(), Ordering::Relaxed);
            if last != 0 {
                let other = PageRange::new(VirtAddr::new(last), unit);
                let _ = trap.region().protect(&[other], closed);
            }
        }
        trap.decide(trap.region().protect(&[block], Protection::ReadWrite))
    }
}

/// Every page present, writable and dirty.
fn make_writable(memory: &Mapping) {
    let start = memory.range().start().as_ptr::<u8>();
    for page in 0..memory.range().pages().get() {
        // SAFETY: in the mapping, which is behind no reference.
        unsafe { start.add(page * PAGE_SIZE).write_volatile(1) };
    }
}

/// What one sample measures, per unit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Row {
    Trap,
    Appel1,
    Appel2,
    ProtN,
    Unprot,
}

impl Row {
    const ALL: [Self; 5] = [Self::Trap, Self::Appel1, Self::Appel2, Self::ProtN, Self::Unprot];
    const fn name(self) -> &'static str {
        match self {
            Self::Trap => "TRAP",
            Self::Appel1 => "Appel1",
            Self::Appel2 => "Appel2",
            Self::ProtN => "PROTN",
            Self::Unprot => "UNPROT",
        }
    }
}

/// One sample, the same for both sides: what they differ in is passed in.
struct Side<'a> {
    memory: &'a Mapping,
    unit: PageCount,
    close: &'a dyn Fn(PageRange),
    open: &'a dyn Fn(PageRange),
    idle: &'a AtomicUsize,
    reprotect: &'a AtomicUsize,
    last: &'a AtomicUsize,
}

impl Side<'_> {
    fn sample(&self, row: Row, order: &[usize]) -> f64 {
        let all = self.memory.range();
        let unit_at = |i: usize| {
            PageRange::new(VirtAddr::new(all.start().as_usize() + i * self.unit.bytes()), self.unit)
        };
        self.reprotect.store(0, Ordering::Relaxed);
        (self.open)(all);
        make_writable(self.memory);
        let ns = match row {
            Row::Trap => {
                (self.close)(all);
                self.idle.store(COUNT, Ordering::Relaxed);
                // The last trap opens the page; it is one of COUNT + 1.
                let ns = time_ns(|| write_units(self.memory, self.unit, &order[..1], 1));
                ns * COUNT as f64 / (COUNT + 1) as f64
            }
            Row::Appel1 => {
                (self.close)(all);
                self.last.store(0, Ordering::Relaxed);
                self.reprotect.store(1, Ordering::Relaxed);
                // The first round makes every unit pass once through the handler.
                write_units(self.memory, self.unit, order, 1);
                time_ns(|| write_units(self.memory, self.unit, order, 1))
            }
            Row::Appel2 => time_ns(|| {
                (self.close)(all);
                write_units(self.memory, self.unit, order, 1);
            }),
            Row::ProtN => time_ns(|| (self.close)(all)),
            Row::Unprot => {
                (self.close)(all);
                time_ns(|| order.iter().for_each(|&i| (self.open)(unit_at(i))))
            }
        };
        self.reprotect.store(0, Ordering::Relaxed);
        ns / COUNT as f64
    }
}

pub fn run(report: &mut Report, options: &Options, caps: &Capabilities) -> Goals {
    let mut goals = Goals::default();
    let ways = [
        (Way::MprotectRead, Kind::Anonymous),
        (Way::MprotectRead, Kind::Memfd),
        (Way::MprotectNone, Kind::Anonymous),
        (Way::MprotectNone, Kind::Memfd),
        (Way::WriteProtect, Kind::Anonymous),
        (Way::WriteProtect, Kind::Memfd),
        (Way::Guard, Kind::Memfd),
        (Way::Pager, Kind::Memfd),
    ];
    for (unit_name, unit) in UNITS {
        for threads in [1, 2] {
            report.section(&format!("{COUNT} units of {unit_name}, {threads} thread(s) running: ns a unit; baseline: bare system calls"));
            let second = (threads == 2).then(Second::start);
            for (way, kind) in ways {
                let cases = Row::ALL.map(|row| {
                    (row, format!("{} {} {} {unit_name} {threads}", row.name(), way.name(), kind.name()))
                });
                if !cases.iter().any(|(_, case)| options.wants(case)) {
                    continue;
                }
                let ours = Ours::new(way, kind, COUNT, unit, caps);
                let bare = match way {
                    Way::Pager => Bare::behind(way, &ours.memory, unit),
                    _ => Bare::beside(way, ours.region.userfaultfd(), &ours.memory, unit),
                };
                let order = Rng(0xa11).permutation(COUNT);
                let ours_side = Side {
                    memory: &ours.memory,
                    unit: ours.unit,
                    close: &|r| ours.region.protect(&[r], ours.closed).expect("protect"),
                    open: &|r| ours.region.protect(&[r], Protection::ReadWrite).expect("protect"),
                    idle: &ours.state.idle,
                    reprotect: &ours.state.reprotect,
                    last: &ours.state.last,
                };
                let bare_side = Side {
                    memory: &bare.memory,
                    unit,
                    close: &|r| bare.close(r),
                    open: &|r| bare.open(r),
                    idle: &raw::IDLE,
                    reprotect: &raw::REPROTECT,
                    last: &raw::LAST,
                };
                for (row, case) in cases {
                    if !options.wants(&case) {
                        continue;
                    }
                    let rounds = options.rounds(match unit.get() {
                        1 => 200,
                        16 => 60,
                        _ => 15,
                    });
                    let pair = versus_within(
                        LAYER,
                        rounds,
                        || Second::beside(second.as_ref(), || ours_side.sample(row, &order)),
                        || {
                            bare.aim();
                            Second::beside(second.as_ref(), || {
                                raw::with_handler(|| bare_side.sample(row, &order))
                            })
                        },
                    );
                    report.pair(&case, "per unit", "ns", "bare system calls", COUNT, &pair);
                    goals.layer(&case, &pair);
                    if unit.get() == 1 {
                        let name = format!("{} {} {} {threads}", row.name(), way.name(), kind.name());
                        goals.number(&name, pair.ours.median());
                        goals.number(&format!("floor {name}"), pair.baseline.median());
                    }
                }
            }
        }
    }
    goals
}
