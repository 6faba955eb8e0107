#[peregrine_call::interface]
pub trait Run {
    fn run(&self, f: fn(u32) -> u32) -> u32;
    fn any(&self, f: Box<dyn Fn()>) -> u32;
}

fn main() {}
