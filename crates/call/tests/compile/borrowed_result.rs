#[peregrine_call::interface]
pub trait Names {
    fn name(&self) -> &str;
}

fn main() {}
