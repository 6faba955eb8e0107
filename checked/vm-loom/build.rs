//! For constants that shrink.

fn main() {
    println!("cargo::rustc-cfg=peregrine_loom");
}
