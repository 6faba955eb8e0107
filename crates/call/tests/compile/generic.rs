#[peregrine_call::interface]
pub trait Any {
    fn any<T>(&self, value: T) -> u32;
}

fn main() {}
