//! For constants that shrink, and arrays that are made in place.

fn main() {
    println!("cargo::rustc-cfg=peregrine_record");
}
