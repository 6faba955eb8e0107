//! A million parked threads on one host: what each takes, how fast they are made and woken; beside tokio's tasks and Go's
//! goroutines.
//!
//! Each thread, task and goroutine holds 200 bytes and waits for a message of its own. They are made in four parts, and after each the
//! memory in use is read: (`MemAvailable` before - after) / n, so page tables, shared memory and the allocator's slack are in it,
//! and, of the five readings, what one more takes; [`memory`] says what else is to be minded. *Counted* are the processes' private memory
//! and page tables, and the blocks of the World's files: where nothing else runs that is the same but for the kernel's own books.
//! Then each is woken once by a message and ends; the rate is that from the first message to the last result.

mod memory;

use crate::measure::Options;
use crate::report::Report;
use memory::Used;
use peregrine_world::{Builder, Config, JoinHandle, Receiver, Sender, StackKind, channel};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// What each holds.
const HELD: usize = 200;

/// They are made in so many parts.
const PARTS: u64 = 4;

/// Memory per flow, what one more takes, flows made and woken a second, and how many were packed.
const COLUMNS: [(&str, &str); 6] = [
    ("memory each", "bytes"),
    ("memory for one more", "bytes"),
    ("counted each", "bytes"),
    ("made", "a second"),
    ("woken", "a second"),
    ("packed", "of them"),
];

/// Readings of a case: how many there were, and what was in use.
#[derive(Default)]
struct Readings(Vec<(f64, Used)>);

impl Readings {
    fn push(&mut self, flows: u64, used: Used) {
        self.0.push((flows as f64, used));
    }

    /// The first three columns.
    fn columns(&self) -> [f64; 3] {
        let ((_, before), (flows, after)) = (self.0[0], self.0[self.0.len() - 1]);
        let machine: Vec<(f64, f64)> = self.0.iter().map(|(n, used)| (*n, used.machine)).collect();
        [
            (after.machine - before.machine) / flows,
            memory::slope(&machine),
            (after.counted - before.counted) / flows,
        ]
    }
}

/// The numbers of the flows of a part; all parts together are all of them.
fn part(part: u64, flows: u64) -> std::ops::Range<u64> {
    flows * part / PARTS..flows * (part + 1) / PARTS
}

pub fn run(report: &mut Report, options: &Options, threads: usize) {
    report.note(&format!("# peregrine bench million: {threads} parked threads, each holding {HELD} bytes"));
    report.section("Parked threads (baseline: tokio tasks, in the same run)");
    let tokio = subject(&format!("tokio {threads}"));
    for (case, arguments) in [
        ("copy threads", format!("world copy {threads} 0")),
        ("alias threads", format!("world alias {threads} 0")),
        ("copy threads, an image every second", format!("world copy {threads} 1000")),
        ("alias threads, an image every second", format!("world alias {threads} 1000")),
    ] {
        if !options.wants(case) {
            continue;
        }
        let Some(ours) = subject(&arguments) else {
            report.note(&format!("    {case}: failed"));
            continue;
        };
        for (i, (metric, unit)) in COLUMNS.into_iter().enumerate() {
            let baseline = tokio.as_ref().and_then(|t| t.get(i)).map(|v| ("tokio tasks", *v));
            report.value(case, metric, unit, ours.get(i).copied().unwrap_or(f64::NAN), baseline);
        }
    }
    match go(threads) {
        Ok(values) => {
            for ((metric, unit), value) in COLUMNS.into_iter().zip(values) {
                report.value("goroutines", metric, unit, value, None);
            }
        }
        Err(why) => report.note(&format!("    goroutines: {why}")),
    }
}

/// One subject, in this process; prints its columns, one a line.
pub fn run_case(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let values = match words[..] {
        ["tokio", n] => tokio_tasks(n.parse().unwrap_or(1)),
        ["world", kind, n, image_ms] => {
            let (Ok(kind), Ok(n), Ok(ms)) = (kind.parse::<StackKind>(), n.parse(), image_ms.parse::<u64>())
            else {
                return ExitCode::from(2);
            };
            world(kind, n, (ms != 0).then(|| Duration::from_millis(ms)))
        }
        _ => return ExitCode::from(2),
    };
    values.iter().for_each(|v| println!("{v}"));
    ExitCode::SUCCESS
}

fn subject(arguments: &str) -> Option<Vec<f64>> {
    let out = Command::new(std::env::current_exe().ok()?)
        .arg("million-case")
        .args(arguments.split_whitespace())
        .stderr(Stdio::inherit())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&out.stdout);
    out.status.success().then(|| text.lines().filter_map(|l| l.trim().parse().ok()).collect())
}

fn held(seed: u64) -> Vec<u8> {
    // Not the same in any two, and not all zeros.
    (0..HELD as u64)
        .map(|i| (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32) >> 7) as u8)
        .collect()
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(7, |h: u64, b| h.wrapping_mul(31).wrapping_add(u64::from(*b)))
}

fn world(kind: StackKind, threads: u64, image_interval: Option<Duration>) -> Vec<f64> {
    let config = Config {
        nodes: 1,
        image_interval,
        memory_bytes: 14 << 30,
        slots: 16,
        pack_after: Some(Duration::ZERO),
        ..Config::default()
    };
    let before = Used::at_rest(std::process::id(), || std::thread::sleep(memory::PAUSE));
    let interval_ms = image_interval.map_or(0, |i| i.as_millis() as u64);
    let told = (kind as u32, threads, (before.machine, before.counted), interval_ms);
    let ended = peregrine_world::run_with(config, main, &told).expect("a World");
    ended.value().unwrap_or_default()
}

fn waits((seed, woken): (u64, Receiver<u64>)) -> u64 {
    let held = held(seed);
    let n = woken.recv().expect("a message");
    checksum(&held).wrapping_add(n)
}

fn main((kind, threads, before, interval_ms): (u32, u64, (f64, f64), u64)) -> Vec<f64> {
    let kind = StackKind::ALL[kind as usize];
    let mut readings = Readings::default();
    readings.push(0, Used { machine: before.0, counted: before.1 });
    let mut all: Vec<(Sender<u64>, JoinHandle<u64>)> = Vec::with_capacity(threads as usize);
    let mut making = Duration::ZERO;
    for p in 0..PARTS {
        let begun = Instant::now();
        for seed in part(p, threads) {
            let (wake, woken) = channel::<u64>();
            let handle = Builder::new().kind(kind).spawn(waits, (seed, woken)).expect("a thread");
            all.push((wake, handle));
            if seed % 64 == 63 {
                // Lets them run to where they wait.
                peregrine_world::yield_now();
            }
        }
        peregrine_world::sleep(Duration::from_millis(1));
        making += begun.elapsed();
        until_packed();
        // Some images hold them as they are by then.
        let pause = memory::PAUSE.max(Duration::from_millis(interval_ms));
        let used = Used::at_rest(std::os::unix::process::parent_id(), || peregrine_world::sleep(pause));
        readings.push(all.len() as u64, used);
    }
    let packed = peregrine_world::packing().packed;
    let begun = Instant::now();
    for (wake, _) in &all {
        wake.send(&1).expect("it waits");
    }
    for (seed, (_, handle)) in all.into_iter().enumerate() {
        let expected = checksum(&held(seed as u64)).wrapping_add(1);
        assert_eq!(handle.join().expect("its answer"), expected);
    }
    let woken = threads as f64 / begun.elapsed().as_secs_f64();
    let [each, one_more, counted] = readings.columns();
    vec![each, one_more, counted, threads as f64 / making.as_secs_f64(), woken, packed as f64]
}

/// Until no more of them are packed.
fn until_packed() {
    let mut packed = 0;
    loop {
        peregrine_world::sleep(Duration::from_millis(500));
        match peregrine_world::packing().packed {
            now if now == packed => return,
            now => packed = now,
        }
    }
}

fn tokio_tasks(tasks: u64) -> Vec<f64> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let used = || Used::at_rest(std::process::id(), || std::thread::sleep(memory::PAUSE));
    let mut readings = Readings::default();
    readings.push(0, used());
    runtime.block_on(async {
        let mut all = Vec::with_capacity(tasks as usize);
        let mut making = Duration::ZERO;
        for p in 0..PARTS {
            let begun = Instant::now();
            for seed in part(p, tasks) {
                let (wake, woken) = tokio::sync::oneshot::channel::<u64>();
                let handle = tokio::spawn(async move {
                    let held = held(seed);
                    let n = woken.await.expect("a message");
                    checksum(&held).wrapping_add(n)
                });
                all.push((wake, handle));
                if seed % 64 == 63 {
                    tokio::task::yield_now().await;
                }
            }
            tokio::task::yield_now().await;
            making += begun.elapsed();
            readings.push(all.len() as u64, used());
        }
        let begun = Instant::now();
        let mut handles = Vec::with_capacity(all.len());
        for (wake, handle) in all {
            wake.send(1).expect("it waits");
            handles.push(handle);
        }
        for (seed, handle) in handles.into_iter().enumerate() {
            assert_eq!(handle.await.expect("its answer"), checksum(&held(seed as u64)).wrapping_add(1));
        }
        let woken = tasks as f64 / begun.elapsed().as_secs_f64();
        let [each, one_more, counted] = readings.columns();
        vec![each, one_more, counted, tasks as f64 / making.as_secs_f64(), woken]
    })
}

/// The same in Go, if there is a Go to be found.
const GO: &str = include_str!("goroutines.go");

fn go(tasks: usize) -> Result<Vec<f64>, String> {
    let dir = std::env::temp_dir().join(format!("peregrine-million-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
    let file = dir.join("main.go");
    std::fs::write(&file, GO).map_err(|e| e.to_string())?;
    let cache = dir.join("cache");
    let run = Command::new("go")
        .env("GOCACHE", &cache)
        .arg("run")
        .arg(&file)
        .arg(tasks.to_string())
        .env("GO111MODULE", "off")
        .output();
    let _ = std::fs::remove_dir_all(&dir);
    let out = run.map_err(|_| {
        "not measured, for there is no `go` here; at least 2 KiB each by Go's own account (runtime/stack.go, stackMin = 2048)"
            .to_owned()
    })?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&out.stdout).lines().filter_map(|l| l.trim().parse().ok()).collect())
}
