//! Threads that start programs while they are preempted and moved. A test links it static, at a fixed address, where libc's data
//! are the thread's, and nothing is put off in the middle of libc.

use std::process::Command;

fn starts((n, times): (u32, u32)) -> u32 {
    for i in 0..times {
        let said = Command::new("echo").arg(format!("{n} {i}")).output().expect("echo is there");
        assert_eq!(String::from_utf8_lossy(&said.stdout), format!("{n} {i}\n"));
    }
    times
}

#[peregrine::main]
fn main() {
    let times = std::env::args().nth(1).map_or(150, |n| n.parse().expect("a number"));
    let all: Vec<_> = (0..4).map(|n| peregrine::spawn(starts, (n, times))).collect();
    let started: u32 = all.into_iter().map(|h| h.join().expect("every child said its line")).sum();
    println!("{started} children");
}
