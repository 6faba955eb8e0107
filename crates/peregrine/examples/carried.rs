//! A thread whose closures run in another process, on the thread's own stack and heap. `carried [ROUNDS]`
use peregrine::TrustedDomain;
use std::time::Duration;

/// What the domain's process has of its own: a place without files.
fn away_from_the_files() {
    std::env::set_current_dir("/proc/self/fdinfo").expect("a directory");
}

fn elsewhere() -> bool {
    std::env::current_dir().is_ok_and(|d| d.starts_with("/proc"))
}

#[peregrine::main]
fn main() {
    let rounds = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(10);
    let domain = TrustedDomain::open("calculator", away_from_the_files).expect("a domain");
    let mut words = vec![String::from("zero")];
    for round in 1..=rounds {
        let letters = domain
            .run(|| {
                // `words` is the caller's own vector; this is another process.
                words.push(format!("round {round}"));
                peregrine::sleep(Duration::from_millis(2));
                assert!(elsewhere());
                words.iter().map(String::len).sum::<usize>()
            })
            .expect("the domain");
        assert!(!elsewhere());
        println!("{} words, {letters} letters", words.len());
    }
}
