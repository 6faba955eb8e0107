//! Memory: of clients that are connected and idle, and of stacks.
//!
//! **Idle clients.** Ten thousand clients of one domain: connections, each with its own socket, credentials, limits and line, of four
//! processes, for ten thousand processes would measure processes; each has called once. What the domain's process and the
//! clients' hold more than before is read from `smaps_rollup` (proportional, so that a shared page counts once).
//!
//! **Stacks.** A fresh stack is of the domain's size, and the caller's own stays where it is. The other answer, mapping the whole of
//! each caller's stack, needs as much address space in the domain as the callers have: measured with stacks of that size.

use super::again;
use super::subject::server_anywhere;
use crate::measure::Options;
use crate::report::Report;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_call::{Call, Client, Domain, Invocation, Limits};
use peregrine_sys::process::raise_descriptor_limit;
use peregrine_sys::rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::process::ExitCode;
use std::time::Duration;

const PROCESSES: usize = 4;
/// Threads of a server, and the sizes of their stacks.
const STACKS: usize = 64;
const FRESH_KIB: usize = 64;
const WHOLE_KIB: usize = 8192;

pub fn run(report: &mut Report, options: &Options) {
    report.section("Memory");
    let clients = if options.quick { 1000 } else { 10_000 };
    match again(&["call-case", "memory", "idle", &clients.to_string()])[..] {
        [domain, client, descriptors] => {
            let case = format!("{clients} idle clients of one domain");
            report.value(&case, "domain's memory a client", "KiB", domain, None);
            report.value(&case, "client's memory", "KiB", client, None);
            report.value(&case, "domain's descriptors a client", "", descriptors, None);
        }
        _ => report.note("skipped: idle clients: this many descriptors are not allowed (ulimit -n)"),
    }
    let stacks = |kib: usize| again(&["call-case", "memory", "stacks", &kib.to_string()]);
    let (fresh, whole) = (stacks(FRESH_KIB), stacks(WHOLE_KIB));
    let case = format!("{STACKS} activations with fresh stacks of {FRESH_KIB} KiB");
    let base = "stacks of 8 MiB, as the callers have";
    report.value(&case, "address space", "MiB", fresh[0] / 1024.0, Some((base, whole[0] / 1024.0)));
    report.value(&case, "memory", "KiB", fresh[1], Some((base, whole[1])));
    report.value(&case, "page tables", "KiB", fresh[2], Some((base, whole[2])));
}

/// `idle CLIENTS` or `stacks KIB`.
pub fn case(words: &[&str]) -> ExitCode {
    match words[..] {
        ["idle", n] => idle(n.parse().unwrap_or(1000)),
        ["stacks", kib] => stacks(kib.parse().unwrap_or(FRESH_KIB)),
        _ => return ExitCode::from(2),
    }
    ExitCode::SUCCESS
}

/// A number of a line like `Pss:   123 kB`, or of `/proc/PID/status`.
fn field(pid: i32, file: &str, name: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(f64::NAN)
}

fn pss(pid: i32) -> f64 {
    field(pid, "smaps_rollup", "Pss:")
}

fn descriptors(pid: i32) -> f64 {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(f64::NAN, |d| d.count() as f64)
}

/// Three atomics that all processes of the case share: steps done.
fn steps() -> &'static [AtomicU64; 3] {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a new mapping, zeroed, kept for the life of the process (S1: atomics).
    unsafe { &*mmap_anonymous(core::ptr::null_mut(), 4096, prot, flags).expect("shared memory").cast() }
}

fn wait_for(step: &AtomicU64, value: u64) {
    while step.load(Ordering::Acquire) < value {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn idle(clients: usize) {
    // In the domain's process a socket for each; in a client's, a socket and a descriptor of the domain's process for its share.
    if raise_descriptor_limit((clients + 200) as u64).is_err() {
        return;
    }
    let path = std::env::temp_dir().join(format!("peregrine-idle-{}", std::process::id()));
    let steps = steps();
    let served = path.clone();
    let domain = server_anywhere(move || {
        let _domain = Domain::builder()
            .activations(4)
            .limits(Limits { clients: clients + 10, ..Limits::default() })
            .portal("null", 1, |_: &mut Invocation<'_>| Ok(()))
            .serve(&served)
            .expect("a domain");
        steps[0].store(1, Ordering::Release);
        loop {
            std::thread::park();
        }
    });
    wait_for(&steps[0], 1);
    let each = clients / PROCESSES;
    let all: Vec<_> = (0..PROCESSES)
        .map(|_| {
            let path = path.clone();
            server_anywhere(move || {
                let once = || {
                    let client = Client::connect(&path).expect("a connection");
                    let portal = client.portal("null", 1).expect("the portal");
                    client.call(portal, Call::new()).expect("a call");
                    client
                };
                let _first = once();
                steps[1].fetch_add(1, Ordering::AcqRel);
                wait_for(&steps[2], 1);
                let _rest: Vec<Client> = (1..each).map(|_| once()).collect();
                steps[1].fetch_add(1, Ordering::AcqRel);
                loop {
                    std::thread::park();
                }
            })
        })
        .collect();
    let total = |what: &dyn Fn(i32) -> f64| all.iter().map(|s| what(s.pid())).sum::<f64>();
    wait_for(&steps[1], PROCESSES as u64);
    let before = (pss(domain.pid()), total(&pss), descriptors(domain.pid()));
    steps[2].store(1, Ordering::Release);
    wait_for(&steps[1], 2 * PROCESSES as u64);
    let after = (pss(domain.pid()), total(&pss), descriptors(domain.pid()));
    let n = (PROCESSES * (each - 1)) as f64;
    println!("{} {} {}", (after.0 - before.0) / n, (after.1 - before.1) / n, (after.2 - before.2) / n);
    drop(all);
    drop(domain);
    let _ = std::fs::remove_file(&path);
}

fn stacks(kib: usize) {
    let path = std::env::temp_dir().join(format!("peregrine-stacks-{}", std::process::id()));
    let steps = steps();
    let start = |count: usize| {
        let served = path.clone();
        let step = &steps[usize::from(count > 1)];
        let server = server_anywhere(move || {
            let _domain = Domain::builder()
                .activations(count)
                .stack_bytes(kib << 10)
                .portal("null", 1, |_: &mut Invocation<'_>| Ok(()))
                .serve(&served)
                .expect("a domain");
            std::thread::sleep(Duration::from_millis(50));
            step.store(1, Ordering::Release);
            loop {
                std::thread::park();
            }
        });
        wait_for(step, 1);
        let pid = server.pid();
        let read = ["VmSize:", "VmRSS:", "VmPTE:"].map(|name| field(pid, "status", name));
        drop(server);
        let _ = std::fs::remove_file(&path);
        read
    };
    let (one, all) = (start(1), start(STACKS + 1));
    println!("{} {} {}", all[0] - one[0], all[1] - one[1], all[2] - one[2]);
}
