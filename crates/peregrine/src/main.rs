//! The command `peregrine`: runs programs in a World, and looks after Worlds that run.

mod command;

fn main() -> std::process::ExitCode {
    command::main()
}
