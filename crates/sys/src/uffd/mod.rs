//! `userfaultfd(2)`, typed.
//!
//! A descriptor owns ranges of this process's address space and decides what happens when they are touched:
//!
//! ```text
//!  register(range, MISSING | MINOR | WP)
//!        │
//!   touch of an absent page ──▶ MISSING fault ─┐           ┌─ Features::SIGBUS: SIGBUS in the toucher
//!   touch of a page in the file only ▶ MINOR ──┼─▶ reported ┼─ else: a message, the toucher sleeps
//!   write to a protected page ──▶ WP fault ────┘           └─ Features::WP_ASYNC (WP only): the kernel
//!                                                             lifts the protection itself and remembers
//!  answered by: copy, zeropage, continue_, move_ (fill)   write_protect (lift)   poison (SIGBUS for ever)
//! ```
//!
//! [`Uffd`] owns the descriptor; [`UffdRef`] is a copyable view of it whose calls touch no allocator, no
//! thread-local and no static, so that a signal handler can make them.

mod calls;
mod flags;
mod message;
mod open;

pub use calls::{FillMode, Partial, UffdRef};
pub(crate) use flags::flag_set;
pub use flags::{Features, RangeIoctls, RegisterMode};
pub use message::{Event, Message};
pub use open::{Access, OpenError, Uffd};
