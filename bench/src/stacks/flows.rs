//! How many flows of each kind this machine can make, up to a cap that leaves the machine usable.

use super::{numbers, subject};
use crate::measure::Options;
use crate::report::Report;
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::signal;
use peregrine_world::{Builder, Config, StackKind};

/// Where making more OS threads or processes is left off.
const CAP: usize = 20_000;
/// Where making event objects is left off: memory alone would end it.
const MOST_OBJECTS: usize = 100_000_000;
/// In a quick run: where processes are left off, and threads of ours and event objects.
const QUICK: (usize, usize) = (4_000, 200_000);

pub fn run(report: &mut Report, options: &Options) {
    report.section("How many flows can be made");
    let (processes, ours) = if options.quick { QUICK } else { (CAP, usize::MAX) };
    let objects = ours.min(MOST_OBJECTS);
    let limit = |name: &str| std::fs::read_to_string(name).unwrap_or_default().trim().to_owned();
    report.note(&format!(
        "    kernel: pid_max {}, threads-max {}, max_map_count {}; left off at {processes} OS threads or processes and {objects} event objects; ours have 12 GiB of World memory{}",
        limit("/proc/sys/kernel/pid_max"),
        limit("/proc/sys/kernel/threads-max"),
        limit("/proc/sys/vm/max_map_count"),
        if options.quick { format!(", {ours} of ours") } else { String::new() }
    ));
    for (name, arguments) in [
        ("processes", format!("most-processes {processes}")),
        ("OS threads", format!("most-os {processes}")),
        ("isomalloc threads", format!("most isomalloc {ours}")),
        ("alias threads", format!("most alias {ours}")),
        ("copy threads", format!("most copy {ours}")),
        ("event objects", format!("most-events {objects}")),
    ] {
        let case = format!("most {name}");
        if !options.wants(&case) {
            continue;
        }
        match subject(&arguments) {
            Some(s) => {
                report.single(&case, "alive at once", "", 1, &s);
                if [processes, ours, objects].contains(&(s.median() as usize)) {
                    report.note("    left off there, not refused");
                }
            }
            None => report.note(&format!("    {case}: failed")),
        }
    }
}

pub fn case(name: &str, words: &[&str]) -> bool {
    let [most] = numbers(words)[..] else { return false };
    match (name, words) {
        ("most-processes", _) => println!("{}", processes(most)),
        ("most-os", _) => println!("{}", os_threads(most)),
        ("most", [kind, _]) => {
            let Ok(kind) = kind.parse::<StackKind>() else { return false };
            let config = Config {
                nodes: 1,
                image_interval: None,
                memory_bytes: 12 << 30,
                pack_after: Some(std::time::Duration::ZERO),
                ..Config::default()
            };
            let ended =
                peregrine_world::run_with(config, world, &(kind as u32, most as u64)).expect("a World");
            println!("{}", ended.value::<u64>().expect("a count"));
        }
        _ => return false,
    }
    true
}

fn world((kind, most): (u32, u64)) -> u64 {
    let (kind, mut count) = (StackKind::ALL[kind as usize], 0u64);
    let (held, _rx) = peregrine_world::channel::<u64>();
    let asleep = |_: ()| peregrine_world::sleep(std::time::Duration::from_secs(1 << 20));
    while count < most {
        match Builder::new().kind(kind).stack_size(64 << 10).spawn(asleep, ()) {
            Ok(_) => count += 1,
            Err(e) => {
                eprintln!("    {kind}: {count} threads, then: {e}");
                break;
            }
        }
        // Lets them run to where they wait.
        if count.is_multiple_of(256) {
            peregrine_world::yield_now();
        }
    }
    drop(held);
    count
}

fn os_threads(most: usize) -> usize {
    let mut all = Vec::new();
    while all.len() < most {
        let made = std::thread::Builder::new().stack_size(64 << 10).spawn(std::thread::park);
        match made {
            Ok(t) => all.push(t),
            Err(e) => {
                eprintln!("    {} OS threads, then: {e}", all.len());
                break;
            }
        }
    }
    all.len()
}

fn processes(most: usize) -> usize {
    let mut all = Vec::new();
    while all.len() < most {
        // SAFETY: one thread; the child sleeps until it is killed.
        match unsafe { process::fork_with(ForkFlags::default()) } {
            Ok(Forked::Child) => {
                process::die_with_parent();
                loop {
                    let _ =
                        peregrine_sys::rustix::thread::nanosleep(&peregrine_sys::rustix::time::Timespec {
                            tv_sec: 1000,
                            tv_nsec: 0,
                        });
                }
            }
            Ok(Forked::Parent(pid)) => all.push(pid),
            Err(e) => {
                eprintln!("    {} processes, then: {e}", all.len());
                break;
            }
        }
    }
    let count = all.len();
    for pid in all {
        let _ = signal::kill(pid, signal::number::KILL);
        let _ = process::wait_for(pid);
    }
    count
}
