#[peregrine_call::interface]
pub trait Counter {
    fn count(&mut self) -> u64;
}

fn main() {}
