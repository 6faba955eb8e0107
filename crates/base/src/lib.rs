//! Units and ranges as types, and the one door to atomics.
//!
//! Every other Peregrine crate builds on these few types, so that an address is never mistaken for a
//! length and a count of pages never for a count of bytes:
//!
//! ```
//! use peregrine_base::{PageCount, PageRange, VirtAddr, PAGE_SIZE};
//! let range = PageRange::new(VirtAddr::new(0x10_0000), PageCount::new(4));
//! assert_eq!(range.len_bytes(), 4 * PAGE_SIZE);
//! assert!(range.contains(VirtAddr::new(0x10_3fff)));
//! assert!(!range.contains(VirtAddr::new(0x10_4000)));
//! ```
#![no_std]

#[cfg(test)]
extern crate std;

mod range;
pub mod sync;

pub use range::{PAGE_SHIFT, PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
