//! For constants that shrink, and arrays that are made in place.

fn main() {
    println!("cargo::rustc-cfg=peregrine_loom");
    // The part over processes is not compiled here: a model checker sees nothing of the kernel.
    println!("cargo::rustc-check-cfg=cfg(feature, values(\"process\"))");
}
