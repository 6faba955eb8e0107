//! Appel and Li's table on today's Linux, each row beside its floor of bare system calls.

mod dirty;
mod fill;
mod floor;
mod leave;
mod parts;
pub mod path;
mod raw;
mod table;
mod yardsticks;

use crate::measure::{Options, Pair};
use crate::report::Report;
use peregrine_base::sync::{AtomicBool, AtomicU64, Ordering};
use peregrine_vm::capabilities::{Capabilities, Capability};
use peregrine_vm::{Mapping, PageCount};
use std::sync::Arc;

/// How pages are protected and traps raised.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    MprotectRead,
    MprotectNone,
    WriteProtect,
    Pager,
    Guard,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::MprotectRead => "mprotect READ",
            Self::MprotectNone => "mprotect NONE",
            Self::WriteProtect => "WP+SIGBUS",
            Self::Pager => "WP+pager",
            Self::Guard => "guard",
        }
    }
}

/// What the pages are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Anonymous,
    Memfd,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::Memfd => "memfd",
        }
    }

    fn make(self, pages: PageCount) -> Mapping {
        match self {
            Self::Anonymous => Mapping::anonymous(pages),
            Self::Memfd => Mapping::memfd(pages),
        }
        .expect("memory")
    }
}

/// What a row may cost over bare system calls.
const LAYER: f64 = 1.05;

/// Sizes of the unit of protection, in pages.
const UNITS: [(&str, PageCount); 3] =
    [("4 KiB", PageCount::new(1)), ("64 KiB", PageCount::new(16)), ("2 MiB", PageCount::new(512))];

const ONE: PageCount = PageCount::new(1);

/// Writes to the first byte of each of these units, in this order.
///
/// One compiled copy for both sides: where a compiler puts this loop makes a quarter of a microsecond a fault here (`costs` of
/// peregrine-vm), more than the layers that are compared.
#[inline(never)]
fn write_units(memory: &Mapping, unit: PageCount, order: &[usize], value: u8) {
    let (start, stride) = (memory.range().start().as_ptr::<u8>(), unit.bytes());
    for &i in order {
        // SAFETY: in the mapping, which is behind no reference; what it traps is what is measured.
        unsafe { start.add(i * stride).write_volatile(value) };
    }
}

/// A thread that runs on the other processor, so that this process's protections must interrupt it.
struct Second {
    stop: Arc<AtomicBool>,
    /// The longest that it stood still since this was last cleared, in ticks of the time stamp counter.
    longest_pause: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Second {
    /// Longer than any interrupt (10-60 µs here): it was not running, so nobody interrupted it.
    const PAUSE_TICKS: u64 = 500_000;

    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let longest_pause = Arc::new(AtomicU64::new(0));
        let (seen, longest) = (stop.clone(), longest_pause.clone());
        let thread = std::thread::spawn(move || {
            let _ = peregrine_sys::process::pin_to_cpu(1);
            let mut last = ticks();
            while !seen.load(Ordering::Relaxed) {
                let now = ticks();
                if now - last > longest.load(Ordering::Relaxed) {
                    longest.store(now - last, Ordering::Relaxed);
                }
                last = now;
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(5));
        Self { stop, longest_pause, thread: Some(thread) }
    }

    /// Takes a sample during which the second thread, if there is one, was running all the time: on a machine with other
    /// work it often is not, and what is measured then is the case of one thread.
    fn beside(second: Option<&Self>, mut sample: impl FnMut() -> f64) -> f64 {
        let Some(second) = second else { return sample() };
        let mut value = 0.0;
        for _ in 0..20 {
            // It must be running when the sample begins, too: wait until it writes.
            second.longest_pause.store(0, Ordering::Relaxed);
            while second.longest_pause.load(Ordering::Relaxed) == 0 {
                std::hint::spin_loop();
            }
            second.longest_pause.store(0, Ordering::Relaxed);
            value = sample();
            if second.longest_pause.load(Ordering::Relaxed) < Self::PAUSE_TICKS {
                break;
            }
        }
        value
    }
}

/// The time stamp counter.
fn ticks() -> u64 {
    // SAFETY: reads a register.
    unsafe { core::arch::x86_64::_rdtsc() }
}

impl Drop for Second {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The whole suite.
pub fn run(report: &mut Report, options: &Options) {
    let caps = Capabilities::probe();
    report.note(&format!("# peregrine bench vm\n{caps}\n{}", machine()));
    let missing: Vec<String> = [
        Capability::WriteProtectAsync,
        Capability::PagemapScan,
        Capability::WriteProtectShared,
        Capability::MinorShared,
        Capability::Move,
        Capability::GuardShared,
    ]
    .iter()
    .filter_map(|c| caps.lack(*c).map(|l| l.to_string()))
    .collect();
    if !missing.is_empty() {
        report.note(&format!("This suite measures every mechanism; here it can't: {}", missing.join("; ")));
        return;
    }
    if peregrine_sys::process::pin_to_cpu(0).is_err() {
        report.note("not pinned to a processor: expect a wider spread");
    }
    let _stack = peregrine_vm::AltStack::install(256 << 10).expect("alternate stack");
    let mut goals = table::run(report, options, &caps);
    parts::run(report, options, &mut goals);
    dirty::run(report, options, &caps, &mut goals);
    fill::run(report, options, &caps, &mut goals);
    yardsticks::run(report, options, &caps, &mut goals);
    path::run(report, options);
    goals.print(report);
}

/// The processor, and what the kernel does against its leaks: each makes its calls, returns and traps dearer.
fn machine() -> String {
    let line = |path: &str, key: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().find(|l| l.starts_with(key)).map(str::to_owned).unwrap_or_default()
    };
    let mut out = line("/proc/cpuinfo", "model name").replace('\t', "");
    if line("/proc/cpuinfo", "flags").contains(" hypervisor") {
        out.push_str(", virtual");
    }
    for what in ["spectre_v2", "spec_rstack_overflow", "retbleed", "meltdown"] {
        let path = format!("/sys/devices/system/cpu/vulnerabilities/{what}");
        out.push_str(&format!("\n{what}: {}", line(&path, "")));
    }
    out
}

/// What the goals are judged by.
#[derive(Default)]
pub struct Goals {
    /// Every row that has a floor: name, ratio, and where that surely lies.
    layers: Vec<(String, f64, (f64, f64))>,
    /// Named numbers.
    numbers: Vec<(String, f64)>,
}

impl Goals {
    fn layer(&mut self, case: &str, pair: &Pair) {
        self.layers.push((case.to_owned(), pair.ratio(), pair.ratio_bounds()));
    }

    fn number(&mut self, name: &str, value: f64) {
        self.numbers.retain(|(n, _)| n != name);
        self.numbers.push((name.to_owned(), value));
    }

    /// The largest of what was measured under this name.
    fn worst(&mut self, name: &str, value: f64) {
        self.number(name, self.get(name).unwrap_or(0.0).max(value));
    }

    fn get(&self, name: &str) -> Option<f64> {
        self.numbers.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// Why the Appel2 ratio is what it is: a trap costs both sides the same, and drowns what they differ in.
    fn explain(&self, report: &Report) {
        let get = |name: &str| self.get(&format!("floor {name}"));
        let own = |way: &str| Some(get(&format!("Appel2 {way} 1"))? - get(&format!("TRAP {way} 1"))?);
        let (Some(mprotect), Some(protect)) = (own("mprotect READ anonymous"), own("WP+SIGBUS memfd")) else {
            return;
        };
        let trap = get("TRAP WP+SIGBUS memfd 1").unwrap_or(f64::NAN);
        report.note(&format!(
            "    without the trap itself: mprotect {mprotect:.0} ns, write-protect {protect:.0} ns, ratio {:.2}. 1.7 with the trap would need a \
             trap of at most {:.0} ns; a bare one takes {trap:.0} here",
            mprotect / protect,
            ((mprotect - 1.7 * protect) / 0.7).max(0.0),
        ));
        let part = |name: &str| self.get(&format!("part of: {name}"));
        if let (Some(call), Some(signal), Some(second), Some(populate)) = (
            part("a system call that does nothing"),
            part("a trap that concerns no memory (int3), handled"),
            part("the write after it (a second, silent fault)"),
            part("instead of that fault: MADV_POPULATE_WRITE"),
        ) {
            report.note(&format!(
                "    of a trap, {signal:.0} ns are any exception's signal, delivery and return, as int3 shows, which concerns no memory (a system call that does nothing: {call:.0}). Linux 6.18 leaves a \
                 memfd page read-only when write-protect is lifted, so the write faults once more: {second:.0} ns; populating it in the \
                 handler takes {populate:.0}. (That same omission is why it needs no interrupt with a second thread.)"
            ));
        }
        let usual = get("Appel2 mprotect READ anonymous 1").unwrap_or(f64::NAN);
        for name in parts::OTHER_WAYS {
            let ratio = usual / part(name).unwrap_or(f64::NAN);
            report.note(&format!("    {name}: ratio {ratio:.2}"));
        }
    }

    fn print(&self, report: &Report) {
        report.note("\n## Goals");
        let over: Vec<_> = self.layers.iter().filter(|(_, ratio, _)| *ratio > LAYER).collect();
        report.note(&format!(
            "layer within 5 % of the bare calls: {} of {} rows{}",
            self.layers.len() - over.len(),
            self.layers.len(),
            if over.is_empty() { ": met" } else { "; missed by:" }
        ));
        for (case, ratio, (low, high)) in over {
            let noise = if *low <= LAYER { ": this run's noise does not tell" } else { "" };
            report.note(&format!("    {case}: {ratio:.3} ({low:.3}..{high:.3} with 95 % confidence{noise})"));
        }
        let judge = |what: &str, value: Option<f64>, floor: Option<f64>, goal: f64, at_least: bool| {
            let (Some(v), Some(floor)) = (value, floor) else {
                return report.note(&format!("{what}: not measured in this run"));
            };
            let met = |v: f64| if at_least { v >= goal } else { v <= goal };
            let verdict = match (met(v), met(floor)) {
                (true, _) => "met",
                (false, false) => "MISSED, and so do bare system calls in this run",
                (false, true) => "MISSED",
            };
            let sign = if at_least { "at least" } else { "at most" };
            report.note(&format!("{what}: {v:.2}, bare system calls {floor:.2} ({sign} {goal}): {verdict}"));
        };
        let appel2 = |prefix: &str, threads: usize| {
            let way = |way: &str| self.get(&format!("{prefix}Appel2 {way} {threads}"));
            Some(way("mprotect READ anonymous")? / way("WP+SIGBUS memfd")?)
        };
        let what = "Appel2, mprotect READ on anonymous memory over write-protect on memfd";
        judge(what, appel2("", 1), appel2("floor ", 1), 1.7, true);
        judge(
            &format!("{what}, with a second thread running"),
            appel2("", 2),
            appel2("floor ", 2),
            7.0,
            true,
        );
        self.explain(report);
        let both = |name: &str| (self.get(name), self.get(&format!("floor {name}")));
        let (ours, floor) = both("first write");
        judge("DIRTY, ns a first write (the worst of 1 to 100 % dirty)", ours, floor, 1000.0, false);
        let (ours, floor) = both("clean page");
        judge("DIRTY, ns a clean page", ours, floor, 1.0, false);
    }
}
