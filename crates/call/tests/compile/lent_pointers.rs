#[peregrine_call::interface]
pub trait Lists {
    fn sum(&self, #[lend] list: peregrine_call::LentSlice<'_, String>) -> u32;
}

fn main() {}
