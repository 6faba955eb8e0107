//! `peregrine migrate` and `checkpoint`: one request to one World, and its answer.

use super::{SYSTEM, fail};
use clap::Args;
use peregrine::{Reply, Request, connect_all};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

/// Which World is meant.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// Process id of the World; needed when several run
    #[arg(long, value_name = "PID")]
    world: Option<u32>,
}

#[derive(Debug, Args)]
pub(super) struct MigrateOptions {
    /// Number or name of the thread, as `peregrine ps` shows it
    thread: String,
    /// Number of the node
    node: u32,
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, Args)]
pub(super) struct CheckpointOptions {
    #[command(flatten)]
    which: Which,
}

/// Asks one World.
pub(super) fn ask(stream: UnixStream, request: &Request) -> Result<Reply, String> {
    let gone = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::WouldBlock => {
            "the World does not answer: is its supervisor stopped (SIGSTOP, a debugger)?".to_owned()
        }
        _ => format!("the World ended before it answered ({e})"),
    };
    let mut line = serde_json::to_vec(request).map_err(|e| e.to_string())?;
    line.push(b'\n');
    (&stream).write_all(&line).map_err(gone)?;
    let mut answer = String::new();
    if BufReader::new(stream).read_line(&mut answer).map_err(gone)? == 0 {
        return Err("the World ended before it answered".to_owned());
    }
    serde_json::from_str(&answer).map_err(|e| {
        format!("the answer can't be read ({e}): the World was built with another version of peregrine")
    })
}

/// The World that is meant.
fn find(which: &Which) -> Result<UnixStream, String> {
    let mut worlds = connect_all().map_err(|e| e.to_string())?;
    let pids = worlds.iter().map(|(pid, _)| pid.to_string()).collect::<Vec<_>>().join(", ");
    if let Some(pid) = which.world {
        let at = worlds.iter().position(|(p, _)| *p == pid);
        return match at {
            Some(i) => Ok(worlds.swap_remove(i).1),
            None if worlds.is_empty() => Err(format!("no World runs, {pid} neither")),
            None => Err(format!("process {pid} is no World of yours; these are: {pids}")),
        };
    }
    match worlds.len() {
        0 => Err("no World of yours runs; start a program first, for example `peregrine run cg`".to_owned()),
        1 => Ok(worlds.remove(0).1),
        _ => Err(format!("several Worlds run; say which with --world PID: {pids}")),
    }
}

pub(super) fn migrate(options: &MigrateOptions) -> ExitCode {
    let request = Request::Migrate { thread: options.thread.clone(), node: options.node };
    tell(find(&options.which).and_then(|s| ask(s, &request)))
}

pub(super) fn checkpoint(options: &CheckpointOptions) -> ExitCode {
    tell(find(&options.which).and_then(|s| ask(s, &Request::Checkpoint)))
}

fn tell(answer: Result<Reply, String>) -> ExitCode {
    match answer {
        Ok(Reply::Moved { thread, from, to }) if from == to => {
            println!("thread {thread} is on node {to} already")
        }
        Ok(Reply::Moved { thread, from, to }) => {
            println!("thread {thread} moved from node {from} to node {to}")
        }
        Ok(Reply::Image { sequence, durable, milliseconds }) => {
            let place = if durable { "on disk" } else { "in memory: it survives nodes, not the World" };
            println!("image {sequence} is complete after {milliseconds:.1} ms, {place}");
        }
        Ok(Reply::Refused { why }) => return fail(1, why),
        Ok(Reply::Status(_)) => return fail(SYSTEM, "the World answered something else than it was asked"),
        Err(why) => return fail(1, why),
    }
    ExitCode::SUCCESS
}
