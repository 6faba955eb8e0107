//! `peregrine doctor`: what this machine allows, what is used instead, and what to change.

use clap::Args;
use peregrine_sys::capabilities::{Capabilities, Capability};
use peregrine_sys::descriptors::{self, LEAST_LIMIT, USUAL_LIMIT};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(super) struct DoctorOptions {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    /// As it should be.
    Good,
    /// It works, in another way.
    Instead,
    /// No World can run.
    Fatal,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: String,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What is used instead, and what would change it.
    advice: String,
}

/// What a World does without a capability; those not listed here are of no use to it yet.
const USES: &[(Capability, Verdict, &str)] = &[
    (Capability::Memfd, Verdict::Fatal, "World memory is a memfd: nothing runs without"),
    (
        Capability::WriteProtectAsync,
        Verdict::Instead,
        "images compare every page of the threads that ran, which takes longer the more memory they have",
    ),
    (Capability::PagemapScan, Verdict::Instead, "as without write-protect-async: pages are compared"),
    (
        Capability::GuardShared,
        Verdict::Instead,
        "stack guards are made by page protection, which costs two mappings a thread (see vm.max_map_count)",
    ),
    (
        Capability::UserfaultfdKernelFaults,
        Verdict::Instead,
        "a switch between threads compares all of the program's statics, some 5 ns for each KiB",
    ),
    (Capability::FsGsBase, Verdict::Instead, "each switch between threads makes a system call, about 100 ns"),
];

pub(super) fn run(options: &DoctorOptions) -> ExitCode {
    let capabilities = Capabilities::probe();
    let mut findings: Vec<Finding> = USES
        .iter()
        .map(|(c, without, instead)| of_capability(&capabilities, *c, *without, instead))
        .collect();
    findings.push(of_libc());
    findings.push(of_personality());
    findings.push(of_mappings(capabilities.max_map_count()));
    findings.push(of_descriptors());
    findings.push(of_runtime_directory());
    let fatal = findings.iter().any(|f| f.verdict == Verdict::Fatal);
    if options.json {
        match serde_json::to_string(&findings) {
            Ok(text) => println!("{text}"),
            Err(e) => return super::fail(super::SYSTEM, e),
        }
    } else {
        for f in &findings {
            let mark = match f.verdict {
                Verdict::Good => "good   ",
                Verdict::Instead => "instead",
                Verdict::Fatal => "FATAL  ",
            };
            println!("{mark}  {:<22} {}", f.what, f.found);
            if !f.advice.is_empty() {
                println!("{:33}{}", "", f.advice);
            }
        }
        println!("{}", if fatal { "No World can run here." } else { "Worlds can run here." });
    }
    if fatal { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn of_capability(all: &Capabilities, c: Capability, without: Verdict, instead: &str) -> Finding {
    match all.lack(c) {
        None => finding(c.name(), Verdict::Good, c.meaning(), String::new()),
        Some(lack) => {
            finding(c.name(), without, &lack.reason, format!("{instead}; to change it: {}", lack.remedy))
        }
    }
}

fn finding(what: &str, verdict: Verdict, found: &str, advice: String) -> Finding {
    Finding { what: what.to_owned(), verdict, found: found.to_owned(), advice }
}

fn of_libc() -> Finding {
    match peregrine_thread::template::taken() {
        Ok(t) => {
            let found = format!(
                "glibc, {} bytes a thread control block; {} bytes of statics and {} of thread-locals a thread",
                t.pthread_len, t.statics_len, t.tls_len
            );
            finding("libc", Verdict::Good, &found, String::new())
        }
        Err(e) => finding(
            "libc",
            Verdict::Fatal,
            &e.to_string(),
            "use a glibc target, such as x86_64-unknown-linux-gnu".into(),
        ),
    }
}

/// A World with a store needs the same addresses when it is resumed.
fn of_personality() -> Finding {
    use peregrine_sys::process::{ADDR_NO_RANDOMIZE, personality, set_personality};
    let allowed = personality().and_then(|p| {
        set_personality(p | ADDR_NO_RANDOMIZE)?;
        set_personality(p)
    });
    match allowed {
        Ok(()) => finding("personality", Verdict::Good, "address randomisation can be turned off for a World with a store", String::new()),
        Err(e) => finding(
            "personality",
            Verdict::Instead,
            &format!("personality(2) is refused: {e}"),
            "programs run, but can't be stored and resumed; allow personality in the container's seccomp profile, or link \
             the program statically at a fixed address (-C target-feature=+crt-static -C relocation-model=static)"
                .into(),
        ),
    }
}

fn of_mappings(most: usize) -> Finding {
    let found = format!("{most} mappings a process (vm.max_map_count)");
    if most >= 65_530 {
        finding("mappings", Verdict::Good, &found, String::new())
    } else {
        finding(
            "mappings",
            Verdict::Instead,
            &found,
            "few threads fit; raise sysctl vm.max_map_count to 65530".into(),
        )
    }
}

fn of_descriptors() -> Finding {
    let [soft, hard] = descriptors::limits();
    let found = format!("{soft} a process, and no more than {hard} (ulimit -Sn, -Hn)");
    let (verdict, advice) = if soft >= LEAST_LIMIT {
        (Verdict::Good, String::new())
    } else if hard >= LEAST_LIMIT {
        let raised = USUAL_LIMIT.min(hard);
        (Verdict::Instead, format!("a World raises its own to {raised}; to change it: ulimit -Sn {raised}"))
    } else {
        let advice = format!(
            "a World needs {LEAST_LIMIT}; raise the hard limit (ulimit -Hn {USUAL_LIMIT}; of a service LimitNOFILE, of a container --ulimit nofile)"
        );
        (Verdict::Fatal, advice)
    };
    finding("open files", verdict, &found, advice)
}

fn of_runtime_directory() -> Finding {
    match peregrine::connect_all() {
        Ok(worlds) => finding(
            "control sockets",
            Verdict::Good,
            &format!("{} Worlds of yours run", worlds.len()),
            String::new(),
        ),
        Err(e) => finding(
            "control sockets",
            Verdict::Instead,
            &e.to_string(),
            "Worlds run, but `peregrine ps` does not see them".into(),
        ),
    }
}
