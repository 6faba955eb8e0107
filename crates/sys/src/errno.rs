//! Names and texts for the kernel's error numbers, without `strerror` (which locks and allocates).

use crate::raw::Errno;
use core::fmt;
use linux_raw_sys::errno as e;

macro_rules! errnos {
    ($($name:ident = $text:literal),* $(,)?) => {
        impl Errno {
            $(#[doc = concat!("`", stringify!($name), "`: ", $text, ".")]
              pub const $name: Self = Self(e::$name as i32);)*

            /// The symbolic name, as in `errno(3)`; `None` for a number that this file does not list.
            pub const fn name(self) -> Option<&'static str> {
                $(if self.0 == e::$name as i32 { return Some(stringify!($name)); })*
                None
            }

            /// One line of text, or an empty one for a number that this file does not list.
            pub const fn text(self) -> &'static str {
                $(if self.0 == e::$name as i32 { return $text; })*
                ""
            }
        }
    };
}

errnos! {
    EPERM = "operation not permitted", ENOENT = "no such file or directory", ESRCH = "no such process",
    EINTR = "interrupted", EIO = "input/output error", EBADF = "bad file descriptor",
    ECHILD = "no child processes", EAGAIN = "try again", ENOMEM = "out of memory, or too many mappings", EACCES = "permission denied",
    EFAULT = "bad address", EBUSY = "busy", EEXIST = "already exists", ENODEV = "no such device",
    EINVAL = "invalid argument", ENFILE = "too many open files in the system",
    EMFILE = "too many open files in the process", ENOTTY = "the descriptor does not know this ioctl",
    EFBIG = "file too large", ENOSPC = "no space left", EROFS = "read-only file system",
    EPIPE = "broken pipe", ENOSYS = "the kernel or a seccomp filter does not offer this call",
    EOPNOTSUPP = "operation not supported", ETIMEDOUT = "timed out", EHWPOISON = "page has a hardware error",
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({}): {}", self.0, self.text()),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl core::error::Error for Errno {}

impl From<Errno> for std::io::Error {
    fn from(e: Errno) -> Self {
        Self::from_raw_os_error(e.0)
    }
}
