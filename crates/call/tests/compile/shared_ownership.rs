#[peregrine_call::interface]
pub trait Shared {
    fn count(&self, shared: std::rc::Rc<String>) -> u32;
    fn open(&self, file: std::fs::File) -> u32;
}

fn main() {}
