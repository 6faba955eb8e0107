//! The example `steps` under another name: a test links it static, at a fixed address.
#[path = "steps/program.rs"]
mod program;

#[peregrine::main]
fn main() {
    program::run();
}
