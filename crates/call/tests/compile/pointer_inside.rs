pub struct Node {
    pub next: *mut Node,
}

#[peregrine_call::interface]
pub trait Graph {
    fn walk(&self, from: Node) -> u32;
}

fn main() {}
