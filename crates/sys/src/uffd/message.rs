//! What a userfaultfd without [`Features::SIGBUS`](super::Features::SIGBUS) tells its reader.

use core::fmt;
use linux_raw_sys::general as g;
use peregrine_base::VirtAddr;

/// A message as the kernel writes it; [`Message::event`] reads it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Message(g::uffd_msg);

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A thread touched a page and sleeps.
    PageFault {
        /// The address, or its page without [`EXACT_ADDRESS`](super::Features::EXACT_ADDRESS).
        address: VirtAddr,
        /// The access was a write.
        write: bool,
        /// The page was there but write-protected.
        write_protected: bool,
        /// The backing file had the page.
        minor: bool,
        /// The thread, with [`THREAD_ID`](super::Features::THREAD_ID); otherwise 0.
        thread_id: u32,
    },
    /// The process forked; the child's userfaultfd is this (owned) descriptor.
    Fork {
        /// The descriptor's number.
        fd: i32,
    },
    /// A range moved.
    Remap {
        /// Where it was.
        from: VirtAddr,
        /// Where it is.
        to: VirtAddr,
        /// How long it is.
        len_bytes: usize,
    },
    /// A range's contents were discarded.
    Remove {
        /// First address.
        start: VirtAddr,
        /// First address beyond.
        end: VirtAddr,
    },
    /// A range was unmapped.
    Unmap {
        /// First address.
        start: VirtAddr,
        /// First address beyond.
        end: VirtAddr,
    },
    /// An event that this crate does not know.
    Unknown(u8),
}

impl Message {
    /// What the message says.
    #[inline]
    pub fn event(&self) -> Event {
        let at = |a: u64| VirtAddr::new(a as usize);
        // SAFETY: each arm reads the member of the union that the kernel fills for that event; all are plain integers.
        unsafe {
            match self.0.event as u32 {
                g::UFFD_EVENT_PAGEFAULT => {
                    let p = self.0.arg.pagefault;
                    let has = |flag: u32| p.flags & flag as u64 != 0;
                    Event::PageFault {
                        address: at(p.address),
                        write: has(g::UFFD_PAGEFAULT_FLAG_WRITE) || has(g::UFFD_PAGEFAULT_FLAG_WP),
                        write_protected: has(g::UFFD_PAGEFAULT_FLAG_WP),
                        minor: has(g::UFFD_PAGEFAULT_FLAG_MINOR),
                        thread_id: p.feat.ptid,
                    }
                }
                g::UFFD_EVENT_FORK => Event::Fork { fd: self.0.arg.fork.ufd as i32 },
                g::UFFD_EVENT_REMAP => {
                    let r = self.0.arg.remap;
                    Event::Remap { from: at(r.from), to: at(r.to), len_bytes: r.len as usize }
                }
                g::UFFD_EVENT_REMOVE => {
                    Event::Remove { start: at(self.0.arg.remove.start), end: at(self.0.arg.remove.end) }
                }
                g::UFFD_EVENT_UNMAP => {
                    Event::Unmap { start: at(self.0.arg.remove.start), end: at(self.0.arg.remove.end) }
                }
                other => Event::Unknown(other as u8),
            }
        }
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.event().fmt(f)
    }
}
