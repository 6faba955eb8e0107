//! How a descriptor is had, and what each way answered if none is.

use super::{Features, UffdRef};
use crate::raw::{self, Errno};
use core::fmt;
use linux_raw_sys::general as g;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// How a descriptor was had, which decides whether kernel accesses are served.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// `userfaultfd(2)` without restriction.
    Full,
    /// `/dev/userfaultfd`, without restriction.
    Device,
    /// `UFFD_USER_MODE_ONLY`: a system call that touches an absent or protected page fails with EFAULT.
    UserModeOnly,
}

impl Access {
    /// Whether a handler thread serves faults that the kernel takes on behalf of a system call.
    pub const fn serves_kernel_faults(self) -> bool {
        !matches!(self, Self::UserModeOnly)
    }
}

/// No descriptor could be made; what each way answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenError {
    /// `userfaultfd(2)` without `UFFD_USER_MODE_ONLY`, if it was tried.
    pub full: Option<Errno>,
    /// `/dev/userfaultfd`, if it was tried.
    pub device: Option<Errno>,
    /// `userfaultfd(2)` with `UFFD_USER_MODE_ONLY`, if it was tried.
    pub user_mode_only: Option<Errno>,
    /// The handshake (`UFFDIO_API`), if a descriptor was had but refused these features.
    pub handshake: Option<(Features, Errno)>,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((features, errno)) = self.handshake {
            return write!(f, "userfaultfd refuses the features {features:?}: {errno}");
        }
        f.write_str("no userfaultfd:")?;
        for (what, errno) in [
            ("the plain call (sysctl vm.unprivileged_userfaultfd=1 or CAP_SYS_PTRACE allows it)", self.full),
            ("/dev/userfaultfd (read access to the device allows it)", self.device),
            (
                "the call with UFFD_USER_MODE_ONLY (only a seccomp filter or an old kernel refuses it)",
                self.user_mode_only,
            ),
        ] {
            if let Some(errno) = errno {
                write!(f, " {what}: {errno};")?;
            }
        }
        Ok(())
    }
}

impl core::error::Error for OpenError {}

/// `USERFAULTFD_IOC_NEW`: `_IO(0xAA, 0)` on `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: u32 = 0xAA00;

/// A userfaultfd that this value owns; closing it drops every registration made through it.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    access: Access,
    features: Features,
}

impl Uffd {
    /// Makes a descriptor with at least `features`: the plain call first, then `/dev/userfaultfd`, then
    /// `UFFD_USER_MODE_ONLY`. It is close-on-exec and non-blocking.
    ///
    /// # Errors
    /// [`OpenError`], with what each way answered and what would allow it.
    pub fn open(features: Features) -> Result<Self, OpenError> {
        let mut why = OpenError { full: None, device: None, user_mode_only: None, handshake: None };
        let attempt = match Self::create(0) {
            Ok(fd) => Some((fd, Access::Full)),
            Err(errno) => {
                why.full = Some(errno);
                match Self::create_from_device() {
                    Ok(fd) => Some((fd, Access::Device)),
                    Err(errno) => {
                        why.device = Some(errno);
                        match Self::create(g::UFFD_USER_MODE_ONLY) {
                            Ok(fd) => Some((fd, Access::UserModeOnly)),
                            Err(errno) => {
                                why.user_mode_only = Some(errno);
                                None
                            }
                        }
                    }
                }
            }
        };
        let (fd, access) = attempt.ok_or(why)?;
        Self::handshake(fd, access, features)
    }

    /// Makes a descriptor in one given way only; for tests and for code that must know which it has.
    ///
    /// # Errors
    /// As [`Uffd::open`], for that way.
    pub fn open_as(access: Access, features: Features) -> Result<Self, OpenError> {
        let mut why = OpenError { full: None, device: None, user_mode_only: None, handshake: None };
        let fd = match access {
            Access::Full => Self::create(0).map_err(|e| why.full = Some(e)),
            Access::Device => Self::create_from_device().map_err(|e| why.device = Some(e)),
            Access::UserModeOnly => {
                Self::create(g::UFFD_USER_MODE_ONLY).map_err(|e| why.user_mode_only = Some(e))
            }
        };
        Self::handshake(fd.map_err(|()| why)?, access, features)
    }

    fn create(flags: u32) -> Result<OwnedFd, Errno> {
        let flags = flags | g::O_CLOEXEC | g::O_NONBLOCK;
        // SAFETY: the call reads no memory; a non-negative result is a descriptor that nobody else owns.
        unsafe {
            let fd = raw::check(raw::syscall6(g::__NR_userfaultfd, flags as usize, 0, 0, 0, 0, 0))?;
            Ok(OwnedFd::from_raw_fd(fd as i32))
        }
    }

    fn create_from_device() -> Result<OwnedFd, Errno> {
        let device = crate::rustix::fs::open(
            c"/dev/userfaultfd",
            crate::rustix::fs::OFlags::RDWR | crate::rustix::fs::OFlags::CLOEXEC,
            crate::rustix::fs::Mode::empty(),
        )
        .map_err(|e| Errno(e.raw_os_error()))?;
        // SAFETY: the ioctl takes its flags by value; a non-negative result is a descriptor that nobody owns.
        unsafe {
            let flags = (g::O_CLOEXEC | g::O_NONBLOCK) as usize;
            let fd = raw::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags)?;
            Ok(OwnedFd::from_raw_fd(fd as i32))
        }
    }

    fn handshake(fd: OwnedFd, access: Access, features: Features) -> Result<Self, OpenError> {
        let mut api = g::uffdio_api { api: g::UFFD_API as u64, features: features.bits(), ioctls: 0 };
        // SAFETY: the kernel reads and writes the one struct that is passed.
        let ret = unsafe { raw::ioctl(fd.as_raw_fd(), raw::UFFDIO_API, (&raw mut api) as usize) };
        match ret {
            Ok(_) => Ok(Self { fd, access, features: Features::from_bits(api.features) }),
            Err(errno) => Err(OpenError {
                full: None,
                device: None,
                user_mode_only: None,
                handshake: Some((features, errno)),
            }),
        }
    }

    /// How the descriptor was had.
    pub const fn access(&self) -> Access {
        self.access
    }

    /// Every feature that this kernel supports, as the handshake answered (not only those asked for).
    pub const fn supported(&self) -> Features {
        self.features
    }

    /// A copyable view whose calls may be made in a signal handler.
    pub fn by_ref(&self) -> UffdRef<'_> {
        UffdRef::new(self.fd.as_fd())
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.fd
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
