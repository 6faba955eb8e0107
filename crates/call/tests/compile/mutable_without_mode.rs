#[peregrine_call::interface]
pub trait Counter {
    fn count(&self, total: &mut u64);
}

fn main() {}
