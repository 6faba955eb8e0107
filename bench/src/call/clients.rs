//! Throughput: so many clients, each a process, call one domain all the time.
//!
//! The baseline is a server with a thread for each client's Unix stream, which is what a program without a framework does. Nobody is
//! pinned: the machine's processors are shared by all.

use super::again;
use super::subject::{Server, server_anywhere};
use crate::measure::{Options, Pair, Samples};
use crate::report::Report;
use peregrine_base::sync::{AtomicBool, AtomicU64, Ordering};
use peregrine_call::{Affinity, Call, Client, Domain, Invocation};
use peregrine_sys::rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const CLIENTS: [usize; 3] = [1, 8, 64];

pub fn run(report: &mut Report, options: &Options) {
    report.section("Null calls of all clients together, thousand a second");
    for clients in CLIENTS {
        let n = clients.to_string();
        let (mut ours, mut together, mut theirs) =
            (Samples::default(), Samples::default(), Samples::default());
        for _ in 0..options.rounds(5) {
            let run = |what: &str| again(&["call-case", "clients", what, &n])[0];
            ours.push(run("anywhere"));
            together.push(run("together"));
            theirs.push(run("unix"));
        }
        let title = |form: &str| format!("{clients} client{}, {form}", if clients == 1 { "" } else { "s" });
        let base = "Unix stream, thread a client";
        report.pair(
            &title("default attributes"),
            "throughput",
            "k/s",
            base,
            1,
            &Pair::of(&together, &theirs),
        );
        report.pair(&title("activation anywhere"), "throughput", "k/s", base, 1, &Pair::of(&ours, &theirs));
    }
}

/// What the clients share with who counts.
#[repr(C)]
struct Board {
    ready: AtomicU64,
    go: AtomicBool,
    stop: AtomicBool,
    calls: AtomicU64,
}

fn board() -> &'static Board {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a new mapping, zeroed, kept for the life of the process; all fields are atomics (S1).
    unsafe { &*mmap_anonymous(core::ptr::null_mut(), 4096, prot, flags).expect("shared memory").cast() }
}

/// `anywhere|together|unix CLIENTS`.
pub fn case(words: &[&str]) -> ExitCode {
    let [what, clients] = words[..] else { return ExitCode::from(2) };
    let Ok(clients) = clients.parse::<usize>() else { return ExitCode::from(2) };
    let board = board();
    let path = std::env::temp_dir().join(format!("peregrine-clients-{}", std::process::id()));
    let what = what.to_owned();
    let served = path.clone();
    let form = what.clone();
    let domain =
        server_anywhere(
            move || if form == "unix" { serve_streams(&served) } else { serve_calls(&served, clients) },
        );
    while std::os::unix::net::UnixStream::connect(&path).is_err() && !path.exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let all: Vec<Server> = (0..clients)
        .map(|_| {
            let (path, what) = (path.clone(), what.clone());
            server_anywhere(move || client(&path, &what, board))
        })
        .collect();
    while board.ready.load(Ordering::Acquire) < clients as u64 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let begun = Instant::now();
    board.go.store(true, Ordering::Release);
    std::thread::sleep(Duration::from_millis(400));
    board.stop.store(true, Ordering::Release);
    let seconds = begun.elapsed().as_secs_f64();
    for one in all {
        one.wait();
    }
    drop(domain);
    let _ = std::fs::remove_file(&path);
    println!("{}", board.calls.load(Ordering::Acquire) as f64 / seconds / 1e3);
    ExitCode::SUCCESS
}

fn client(path: &PathBuf, what: &str, board: &Board) {
    let mut call: Box<dyn FnMut()> = if what == "unix" {
        let mut stream = UnixStream::connect(path).expect("connected");
        Box::new(move || {
            stream.write_all(&[0; 8]).expect("sent");
            stream.read_exact(&mut [0; 8]).expect("an answer");
        })
    } else {
        let client = loop {
            match Client::connect(path) {
                Ok(client) => break client,
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let portal = client.portal("null", 1).expect("the portal");
        let affinity = if what == "together" { Affinity::Together } else { Affinity::Anywhere };
        Box::new(move || client.call(portal, Call::new().affinity(affinity)).expect("a call"))
    };
    call();
    board.ready.fetch_add(1, Ordering::AcqRel);
    while !board.go.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut calls = 0;
    while !board.stop.load(Ordering::Acquire) {
        call();
        calls += 1;
    }
    board.calls.fetch_add(calls, Ordering::AcqRel);
}

fn serve_calls(path: &Path, clients: usize) {
    let _domain = Domain::builder()
        .activations(clients + 1)
        .portal("null", 1, |_: &mut Invocation<'_>| Ok(()))
        .serve(path)
        .expect("a domain");
    loop {
        std::thread::park();
    }
}

fn serve_streams(path: &Path) {
    let listener = UnixListener::bind(path).expect("a socket");
    for stream in listener.incoming() {
        let mut stream = stream.expect("a client");
        std::thread::spawn(move || {
            let mut word = [0; 8];
            while stream.read_exact(&mut word).is_ok() && stream.write_all(&word).is_ok() {}
        });
    }
}
