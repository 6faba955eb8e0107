#[peregrine_call::interface]
pub trait Memory {
    fn look(&self, at: *const u8) -> u8;
}

fn main() {}
