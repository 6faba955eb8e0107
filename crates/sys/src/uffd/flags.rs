//! Sets of kernel flags that print by name, and userfaultfd's.

use core::fmt;
use core::ops::{BitOr, BitOrAssign, Sub};
use linux_raw_sys::general as g;

macro_rules! flag_set {
    ($(#[$meta:meta])* $name:ident: $(($flag:ident, $value:expr, $doc:literal)),* $(,)?) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            $(#[doc = $doc] pub const $flag: Self = Self($value as u64);)*
            const NAMES: &'static [(&'static str, u64)] = &[$((stringify!($flag), $value as u64)),*];

            /// No flag.
            pub const fn empty() -> Self {
                Self(0)
            }

            /// The flags as the kernel writes them; unknown ones are kept.
            pub const fn from_bits(bits: u64) -> Self {
                Self(bits)
            }

            /// The flags as the kernel reads them.
            pub const fn bits(self) -> u64 {
                self.0
            }

            /// Whether every flag of `other` is set here.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The flags in both.
            pub const fn intersection(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }

            /// Whether no flag is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// The flags of either; for constants, where `|` is not available.
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl BitOrAssign for $name {
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut rest = self.0;
                let mut first = true;
                for (name, bit) in Self::NAMES {
                    if *bit != 0 && rest & bit == *bit {
                        write!(f, "{}{name}", if first { "" } else { " | " })?;
                        first = false;
                        rest &= !bit;
                    }
                }
                match (first, rest) {
                    (true, 0) => f.write_str("(none)"),
                    (_, 0) => Ok(()),
                    _ => write!(f, "{}{rest:#x}", if first { "" } else { " | " }),
                }
            }
        }
    };
}
pub(crate) use flag_set;

flag_set! {
    /// What a descriptor can do (`UFFD_FEATURE_*`), agreed with the kernel when it is made.
    Features:
    (PAGEFAULT_FLAG_WP, g::UFFD_FEATURE_PAGEFAULT_FLAG_WP, "Write-protect faults are reported (anonymous memory)."),
    (EVENT_FORK, g::UFFD_FEATURE_EVENT_FORK, "A fork is reported, with a descriptor for the child. Needs `CAP_SYS_PTRACE`."),
    (EVENT_REMAP, g::UFFD_FEATURE_EVENT_REMAP, "An `mremap` is reported."),
    (EVENT_REMOVE, g::UFFD_FEATURE_EVENT_REMOVE, "A `MADV_DONTNEED` or `MADV_REMOVE` is reported."),
    (EVENT_UNMAP, g::UFFD_FEATURE_EVENT_UNMAP, "An `munmap` is reported."),
    (MISSING_HUGETLBFS, g::UFFD_FEATURE_MISSING_HUGETLBFS, "MISSING works on hugetlbfs."),
    (MISSING_SHMEM, g::UFFD_FEATURE_MISSING_SHMEM, "MISSING works on shared memory."),
    (SIGBUS, g::UFFD_FEATURE_SIGBUS, "Faults raise SIGBUS in the faulting thread; there are no messages."),
    (THREAD_ID, g::UFFD_FEATURE_THREAD_ID, "Messages carry the faulting thread's id."),
    (MINOR_HUGETLBFS, g::UFFD_FEATURE_MINOR_HUGETLBFS, "MINOR works on hugetlbfs."),
    (MINOR_SHMEM, g::UFFD_FEATURE_MINOR_SHMEM, "MINOR works on shared memory."),
    (EXACT_ADDRESS, g::UFFD_FEATURE_EXACT_ADDRESS, "Messages carry the address, not only the page."),
    (WP_HUGETLBFS_SHMEM, g::UFFD_FEATURE_WP_HUGETLBFS_SHMEM, "Write-protect works on shared memory and hugetlbfs."),
    (WP_UNPOPULATED, g::UFFD_FEATURE_WP_UNPOPULATED, "Write-protect also covers anonymous pages that are not there yet."),
    (POISON, g::UFFD_FEATURE_POISON, "`UFFDIO_POISON`."),
    (WP_ASYNC, g::UFFD_FEATURE_WP_ASYNC, "Write faults are resolved by the kernel and only remembered."),
    (MOVE, g::UFFD_FEATURE_MOVE, "`UFFDIO_MOVE`."),
}

flag_set! {
    /// Which faults a registered range reports (`UFFDIO_REGISTER_MODE_*`).
    RegisterMode:
    (MISSING, g::UFFDIO_REGISTER_MODE_MISSING, "Touches of pages that are nowhere."),
    (WP, g::UFFDIO_REGISTER_MODE_WP, "Writes to protected pages."),
    (MINOR, g::UFFDIO_REGISTER_MODE_MINOR, "Touches of pages that the backing file has but this page table has not."),
}

flag_set! {
    /// Which operations a registered range allows, as bits numbered by the ioctl.
    RangeIoctls:
    (WAKE, 1u64 << g::_UFFDIO_WAKE, "`UFFDIO_WAKE`."),
    (COPY, 1u64 << g::_UFFDIO_COPY, "`UFFDIO_COPY`."),
    (ZEROPAGE, 1u64 << g::_UFFDIO_ZEROPAGE, "`UFFDIO_ZEROPAGE`."),
    (MOVE, 1u64 << g::_UFFDIO_MOVE, "`UFFDIO_MOVE`."),
    (WRITEPROTECT, 1u64 << g::_UFFDIO_WRITEPROTECT, "`UFFDIO_WRITEPROTECT`."),
    (CONTINUE, 1u64 << g::_UFFDIO_CONTINUE, "`UFFDIO_CONTINUE`."),
    (POISON, 1u64 << g::_UFFDIO_POISON, "`UFFDIO_POISON`."),
}
