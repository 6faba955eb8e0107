//! Runs one class on the main thread: `cargo run --release -p cg --example cg -- A`.

use std::process::ExitCode;

fn main() -> ExitCode {
    let class = std::env::args().nth(1).unwrap_or("S".to_owned());
    let class = match class.parse() {
        Ok(class) => class,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    println!("    iteration              ||r||                 zeta");
    let outcome = cg::solve_serial(class, &mut |iteration| println!("{iteration}"));
    println!("\n{outcome}");
    if outcome.verified { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
