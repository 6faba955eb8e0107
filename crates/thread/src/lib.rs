//! Threads that own everything they write.
//!
//! A thread of this crate keeps its stack, heap, thread-locals and its copy of the program's statics in one *slot*, an
//! address range that means the same in every process of a World. So it can be suspended at any instruction outside the
//! runtime, go on in another process, or be written to disk, and no crate it uses needs to know.
//!
//! This crate is the mechanism inside one process: where things lie ([`layout`]), what a new thread starts from
//! ([`template`]), the slot ([`slot`]), thread-locals ([`tls`]), statics ([`statics`], [`seal`]), heaps ([`heap`]), the signals it
//! blocks ([`mask`]), the switch ([`arch`]), preemption ([`preempt`]) and the functions of libc that must know of threads ([`interpose`]). Who runs when,
//! and in which process, is decided by `peregrine-world`.

pub mod arch;
pub mod carrier;
pub mod costs {
    #![doc = include_str!("../docs/costs.md")]
}
pub mod heap;
pub mod interpose;
pub mod layout;
pub mod mask;
pub mod preempt;
pub mod seal;
pub mod slot;
pub mod stack_kind;
pub mod statics;
pub mod template;
pub mod tls;
pub mod window;
pub mod window_image;
