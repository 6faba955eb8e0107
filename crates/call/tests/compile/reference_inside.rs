#[derive(serde::Serialize, serde::Deserialize)]
pub struct Name<'a> {
    pub text: &'a str,
}

#[peregrine_call::interface]
pub trait Names {
    fn greet(&self, name: Name<'static>) -> u32;
    fn maybe(&self, name: Option<&str>) -> u32;
}

fn main() {}
