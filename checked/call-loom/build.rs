//! Puts another back end behind `sync`.

fn main() {
    println!("cargo::rustc-cfg=peregrine_loom");
}
