//! Three threads that print and compute for a while: something to kill and resume. `steps [ROUNDS]`
mod program;

#[peregrine::main]
fn main() {
    program::run();
}
