//! What this kernel lets this process do, found by asking it and never by its version.
//!
//! [`Capabilities::probe`] makes each call once on memory of its own. What is not available comes with the answer
//! the kernel gave and what would change it. A probed set can be [masked](Capabilities::without) to stand for an
//! older kernel, a container or an ordinary user; code that asks it can't tell the difference.

mod probe;
mod simulate;

use crate::raw::Errno;
use crate::uffd::{Access, Features, OpenError, Uffd};
use core::fmt;
use core::str::FromStr;
pub use simulate::Simulate;

macro_rules! capabilities {
    ($($name:ident = $key:literal, $doc:literal;)*) => {
        /// Something that a kernel may or may not offer.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum Capability {
            $(#[doc = $doc] $name,)*
        }

        impl Capability {
            /// Every capability, in the order of the probe.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The name that messages use and [`FromStr`] reads.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $key),* }
            }

            /// What it is, in one sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => $doc),* }
            }
        }
    };
}

capabilities! {
    Userfaultfd = "userfaultfd", "A userfaultfd of any kind.";
    UserfaultfdKernelFaults = "userfaultfd-kernel-faults", "A userfaultfd that also serves accesses made by system calls.";
    UserfaultfdSigbus = "userfaultfd-sigbus", "Faults raise SIGBUS in the faulting thread.";
    WriteProtect = "write-protect", "userfaultfd write-protect on anonymous memory.";
    WriteProtectShared = "write-protect-shared", "userfaultfd write-protect on memfd and hugetlbfs.";
    WriteProtectUnpopulated = "write-protect-unpopulated", "Write-protect of anonymous pages that are not there yet.";
    WriteProtectAsync = "write-protect-async", "Write-protect that the kernel lifts by itself, to be read by a scan.";
    MissingShared = "missing-shared", "userfaultfd faults on absent pages of a memfd.";
    MinorShared = "minor-shared", "userfaultfd faults on memfd pages absent from this page table, and UFFDIO_CONTINUE.";
    Move = "move", "UFFDIO_MOVE.";
    Poison = "poison", "UFFDIO_POISON.";
    ThreadId = "thread-id", "userfaultfd messages name the faulting thread.";
    PagemapScan = "pagemap-scan", "PAGEMAP_SCAN on /proc/self/pagemap.";
    Guard = "guard", "Guard markers on anonymous memory (MADV_GUARD_INSTALL).";
    GuardShared = "guard-shared", "Guard markers on memfd, which keep the contents.";
    Memfd = "memfd", "memfd_create.";
    Populate = "populate", "MADV_POPULATE_READ and MADV_POPULATE_WRITE.";
    Collapse = "collapse", "MADV_COLLAPSE: huge pages on request.";
    TransparentHuge = "transparent-huge", "Transparent huge pages on anonymous memory that asks for them.";
    TransparentHugeShared = "transparent-huge-shared", "Transparent huge pages on memfd that asks for them.";
    HugePool = "huge-pool", "A 2 MiB page in the hugetlb pool.";
    Swap = "swap", "Somewhere to swap to.";
    WipeOnFork = "wipe-on-fork", "MADV_WIPEONFORK.";
    FsGsBase = "fsgsbase", "The FS base may be moved by an instruction (x86-64).";
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no capability.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownCapability(pub String);

impl fmt::Display for UnknownCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no capability is called {:?}; there are:", self.0)?;
        Capability::ALL.iter().try_for_each(|c| write!(f, " {c}"))
    }
}

impl std::error::Error for UnknownCapability {}

impl FromStr for Capability {
    type Err = UnknownCapability;
    fn from_str(name: &str) -> Result<Self, UnknownCapability> {
        Self::ALL.iter().copied().find(|c| c.name() == name).ok_or_else(|| UnknownCapability(name.into()))
    }
}

/// Why a capability is not there.
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Lack {
    /// What is missing.
    pub capability: Capability,
    /// The kernel's answer, if it gave one.
    pub errno: Option<i32>,
    /// What was tried and what came of it.
    pub reason: String,
    /// What would change that.
    pub remedy: String,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is missing: {}; {}", self.capability, self.reason, self.remedy)
    }
}

impl std::error::Error for Lack {}

/// What is available, and why the rest is not.
///
/// ```
/// use peregrine_sys::capabilities::{Capabilities, Capability, Simulate};
/// let all = Capabilities::probe();
/// println!("{all}");
/// let old = all.simulate(Simulate::Linux5_15);
/// assert!(!old.has(Capability::PagemapScan));
/// let why = old.require(Capability::PagemapScan).unwrap_err();
/// assert!(why.to_string().contains("pagemap-scan"));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Capabilities {
    lacks: Vec<Lack>,
    max_map_count: usize,
}

impl Capabilities {
    /// Asks the kernel about every capability. It takes about a millisecond and leaves nothing behind.
    pub fn probe() -> Self {
        let mut found = Self {
            lacks: Vec::new(),
            max_map_count: probe::number("/proc/sys/vm/max_map_count").unwrap_or(65530),
        };
        found.probe_userfaultfd();
        found.probe_pagemap();
        found.probe_mappings();
        found.probe_huge_pages();
        found.probe_rest();
        found
    }

    /// Whether `capability` is available.
    pub fn has(&self, capability: Capability) -> bool {
        self.lack(capability).is_none()
    }

    /// Why `capability` is not available, or `None` if it is.
    pub fn lack(&self, capability: Capability) -> Option<&Lack> {
        self.lacks.iter().find(|l| l.capability == capability)
    }

    /// `Ok` if `capability` is available.
    ///
    /// # Errors
    /// The reason and the remedy if it is not.
    pub fn require(&self, capability: Capability) -> Result<(), Lack> {
        self.lack(capability).map_or(Ok(()), |l| Err(l.clone()))
    }

    /// Everything that is not available.
    pub fn lacks(&self) -> &[Lack] {
        &self.lacks
    }

    /// `vm.max_map_count`: how many mappings a process may have.
    pub const fn max_map_count(&self) -> usize {
        self.max_map_count
    }

    /// How a userfaultfd made under this set is had, or `None` if there is none.
    ///
    /// # Errors
    /// [`OpenError`] if the kernel refuses what the probe had found, or [`Lack`] as text if it is masked.
    pub fn open_userfaultfd(&self, features: Features) -> Result<Uffd, OpenError> {
        if !self.has(Capability::Userfaultfd) {
            let errno = self.lack(Capability::Userfaultfd).and_then(|l| l.errno).map_or(Errno::EPERM, Errno);
            return Err(OpenError {
                full: Some(errno),
                device: None,
                user_mode_only: Some(errno),
                handshake: None,
            });
        }
        if self.has(Capability::UserfaultfdKernelFaults) {
            Uffd::open(features)
        } else {
            Uffd::open_as(Access::UserModeOnly, features)
        }
    }

    fn miss(&mut self, capability: Capability, errno: Option<Errno>, reason: &str, remedy: &str) {
        if self.has(capability) {
            self.lacks.push(Lack {
                capability,
                errno: errno.map(|e| e.0),
                reason: reason.to_owned(),
                remedy: remedy.to_owned(),
            });
        }
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &capability in Capability::ALL {
            match self.lack(capability) {
                None => writeln!(f, "yes  {capability:<26} {}", capability.meaning())?,
                Some(lack) => writeln!(f, "NO   {capability:<26} {}; {}", lack.reason, lack.remedy)?,
            }
        }
        write!(f, "     vm.max_map_count           {}", self.max_map_count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lack_names_its_reason_and_its_remedy() {
        let found = Capabilities::probe();
        println!("{found}");
        for lack in found.lacks() {
            assert!(!lack.reason.is_empty() && !lack.remedy.is_empty(), "{lack:?}");
        }
    }

    #[test]
    fn a_mask_takes_away_what_depends_on_it_and_a_descriptor_with_it() {
        let masked = Capabilities::probe().simulate(Simulate::ContainerWithoutUserfaultfd);
        assert!(!masked.has(Capability::Userfaultfd) && !masked.has(Capability::WriteProtectAsync));
        assert!(masked.open_userfaultfd(Features::empty()).is_err());
    }

    #[test]
    fn an_ordinary_users_mask_gives_a_descriptor_that_serves_no_kernel_faults() {
        let masked = Capabilities::probe().simulate(Simulate::OrdinaryUser);
        if let Some(lack) = masked.lack(Capability::Userfaultfd) {
            println!("SKIPPED: {lack}");
            return;
        }
        let uffd = masked.open_userfaultfd(Features::empty()).unwrap();
        assert_eq!(uffd.access(), Access::UserModeOnly);
    }

    #[test]
    fn names_read_back() {
        for c in Capability::ALL {
            assert_eq!(c.name().parse::<Capability>().unwrap(), *c);
        }
        assert!("no-such".parse::<Capability>().is_err());
    }
}
