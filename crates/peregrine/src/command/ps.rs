//! `peregrine ps`: Worlds, nodes, threads.

use super::ask::ask;
use super::{SYSTEM, fail, symbols};
use clap::Args;
use peregrine::{NodeStatus, Reply, Request, ThreadStatus, WorldStatus, connect_all};
use std::io::Write;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(super) struct PsOptions {
    /// Print one JSON object for each World, one a line
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &PsOptions) -> ExitCode {
    let worlds = match connect_all() {
        Ok(w) => w,
        Err(e) => return fail(SYSTEM, e),
    };
    if worlds.is_empty() && !options.json {
        eprintln!("no World of yours runs");
    }
    let mut code = ExitCode::SUCCESS;
    for (pid, stream) in worlds {
        match ask(stream, &Request::Status) {
            Ok(Reply::Status(world)) => {
                let mut out = std::io::stdout().lock();
                let written = if options.json {
                    serde_json::to_writer(&mut out, &world).map_err(Into::into).and_then(|()| writeln!(out))
                } else {
                    show(&mut out, &world)
                };
                if written.is_err() {
                    return ExitCode::FAILURE;
                }
            }
            Ok(_) => code = fail(1, format!("World {pid} answered something else than it was asked")),
            Err(why) => code = fail(1, format!("World {pid}: {why}")),
        }
    }
    code
}

fn show(out: &mut impl Write, w: &WorldStatus) -> std::io::Result<()> {
    writeln!(out, "World {}: {}", w.pid, w.program)?;
    writeln!(
        out,
        "  up {:.1} s, image {} taken {:.0} ms ago{}, {} rollbacks, {} of {} in use",
        w.seconds,
        w.image,
        w.image_age_ms,
        w.store.as_ref().map_or(String::new(), |d| format!(" (store {d})")),
        w.rollbacks,
        bytes(w.memory[0]),
        bytes(w.memory[1])
    )?;
    if w.images_given_up > 0 {
        writeln!(out, "  {} images were given up, because a node did not pause", w.images_given_up)?;
    }
    writeln!(out, "  NODE      PID  STATE     RUNS    QUEUED   SWITCHES")?;
    for (i, n) in w.nodes.iter().enumerate() {
        let runs = n.runs.as_deref().unwrap_or("-");
        let domain = n.domain.as_ref().map_or(String::new(), |name| format!("  domain {name}"));
        writeln!(
            out,
            "  {i:>4} {:>8}  {:<8}  {runs:<6} {:>7} {:>10}{domain}",
            n.pid, n.state, n.queued, n.switches
        )?;
    }
    writeln!(
        out,
        "  THREAD  STATE     NODE    STACK   MEMORY    MOVES  IMAGED       NAME, WHAT IT WAITS FOR"
    )?;
    for t in &w.threads {
        show_thread(out, t)?;
    }
    for (i, n) in w.nodes.iter().enumerate().filter(|(_, n)| n.state == "blocked") {
        show_blocked(out, i, n)?;
    }
    Ok(())
}

fn show_thread(out: &mut impl Write, t: &ThreadStatus) -> std::io::Result<()> {
    let stack = t.stack_bytes.map_or("-".to_owned(), bytes);
    let imaged = t.image_age_ms.map_or("not yet".to_owned(), |ms| format!("{ms:.0} ms ago"));
    let waits = t.waits_for.as_ref().map_or(String::new(), |w| format!(", waits for {w}"));
    writeln!(
        out,
        "  {:>6}  {:<8}  {:>4} {stack:>8} {:>8} {:>8}  {imaged:<11}  {}{waits}",
        t.id,
        t.state,
        t.node,
        bytes(t.memory_bytes),
        t.moves,
        if t.name.is_empty() { "(no name)" } else { &t.name }
    )
}

fn show_blocked(out: &mut impl Write, i: usize, n: &NodeStatus) -> std::io::Result<()> {
    let thread = n.runs.as_deref().unwrap_or("?");
    writeln!(out, "  node {i} is blocked: thread {thread} reaches no point where it can be suspended")?;
    if n.trace.is_empty() {
        return writeln!(
            out,
            "    it does not answer a signal either: it blocks signals, or waits in the kernel (see /proc/{}/wchan)",
            n.pid
        );
    }
    for line in symbols::describe(n.pid, &n.trace) {
        writeln!(out, "    {line}")?;
    }
    Ok(())
}

fn bytes(n: u64) -> String {
    match n {
        0..10_240 => format!("{n} B"),
        10_240..10_485_760 => format!("{} KiB", n >> 10),
        10_485_760..10_737_418_240 => format!("{} MiB", n >> 20),
        _ => format!("{} GiB", n >> 30),
    }
}
