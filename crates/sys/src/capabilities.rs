//! What this kernel lets this process do, found by asking it and never by its version.
//!
//! [`Capabilities::probe`] makes each call once on memory of its own. What is not available comes with the answer
//! the kernel gave and what would change it. A probed set can be [masked](Capabilities::without) to stand for an
//! older kernel, a container or an ordinary user; code that asks it can't tell the difference.

use crate::mem::{self, Advice, MapOptions, Placement, Source};
use crate::pagemap::{Pagemap, ScanArgs};
use crate::raw::Errno;
use crate::uffd::{Access, Features, OpenError, Uffd};
use core::fmt;
use core::str::FromStr;
use peregrine_base::{PageCount, PageRange, Protection};

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

/// Kinds of kernel and user that a full set can be masked down to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Simulate {
    /// Linux 5.15: anonymous write-protect and shmem minor faults, but no asynchronous or shmem write-protect, no
    /// `PAGEMAP_SCAN`, `MOVE`, `POISON`, guards or collapse.
    Linux5_15,
    /// A container whose seccomp filter refuses `userfaultfd(2)`, and which has no `/dev/userfaultfd`.
    ContainerWithoutUserfaultfd,
    /// An ordinary user under `vm.unprivileged_userfaultfd=0`: `UFFD_USER_MODE_ONLY` and nothing else.
    OrdinaryUser,
}

impl Simulate {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Linux5_15, Self::ContainerWithoutUserfaultfd, Self::OrdinaryUser];

    /// What it takes away.
    pub const fn masks(self) -> &'static [Capability] {
        use Capability as C;
        match self {
            Self::Linux5_15 => &[
                C::WriteProtectShared,
                C::WriteProtectUnpopulated,
                C::WriteProtectAsync,
                C::Move,
                C::Poison,
                C::PagemapScan,
                C::Guard,
                C::GuardShared,
                C::Collapse,
            ],
            Self::ContainerWithoutUserfaultfd => &[C::Userfaultfd],
            Self::OrdinaryUser => &[C::UserfaultfdKernelFaults],
        }
    }
}

impl fmt::Display for Simulate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linux5_15 => "Linux 5.15",
            Self::ContainerWithoutUserfaultfd => "container without userfaultfd",
            Self::OrdinaryUser => "ordinary user",
        })
    }
}

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
        let mut found =
            Self { lacks: Vec::new(), max_map_count: number("/proc/sys/vm/max_map_count").unwrap_or(65530) };
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

    /// The same without `capability` and what depends on it.
    #[must_use]
    pub fn without(mut self, capability: Capability) -> Self {
        self.mask(capability, &format!("masked to simulate a system without {capability}"));
        self
    }

    /// The same with what `simulate` takes away masked.
    #[must_use]
    pub fn simulate(&self, simulate: Simulate) -> Self {
        let mut out = self.clone();
        for capability in simulate.masks() {
            out.mask(*capability, &format!("masked to simulate: {simulate}"));
        }
        out
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

    fn mask(&mut self, capability: Capability, reason: &str) {
        use Capability as C;
        const DEPEND_ON_USERFAULTFD: &[Capability] = &[
            C::UserfaultfdKernelFaults,
            C::UserfaultfdSigbus,
            C::WriteProtect,
            C::WriteProtectShared,
            C::WriteProtectUnpopulated,
            C::WriteProtectAsync,
            C::MissingShared,
            C::MinorShared,
            C::Move,
            C::Poison,
            C::ThreadId,
        ];
        self.miss(capability, None, reason, "take the mask away");
        if capability == C::Userfaultfd {
            for c in DEPEND_ON_USERFAULTFD {
                self.miss(*c, None, reason, "take the mask away");
            }
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

    fn probe_userfaultfd(&mut self) {
        use Capability as C;
        let newer = "a newer kernel offers it";
        let uffd = match Uffd::open(Features::empty()) {
            Ok(uffd) => uffd,
            Err(why) => {
                let errno = why.user_mode_only.or(why.full);
                let remedy = match errno {
                    Some(Errno::ENOSYS) => {
                        "the kernel was built without CONFIG_USERFAULTFD, or a seccomp filter answers ENOSYS"
                    }
                    _ => {
                        "a seccomp filter refuses the call: allow userfaultfd in the container's profile, or pass /dev/userfaultfd in"
                    }
                };
                self.mask(C::Userfaultfd, &why.to_string());
                for lack in &mut self.lacks {
                    lack.errno = errno.map(|e| e.0);
                    lack.remedy = remedy.to_owned();
                }
                return;
            }
        };
        if !uffd.access().serves_kernel_faults() {
            let errno = Uffd::open_as(Access::Full, Features::empty()).err().and_then(|e| e.full);
            self.miss(
                C::UserfaultfdKernelFaults,
                errno,
                &format!(
                    "only UFFD_USER_MODE_ONLY is allowed ({}): a system call that touches a trapping page fails with EFAULT",
                    errno.unwrap_or(Errno::EPERM)
                ),
                "set sysctl vm.unprivileged_userfaultfd=1, give CAP_SYS_PTRACE, or give read access to /dev/userfaultfd",
            );
        }
        let supported = uffd.supported();
        for (capability, feature) in [
            (C::UserfaultfdSigbus, Features::SIGBUS),
            (C::WriteProtect, Features::PAGEFAULT_FLAG_WP),
            (C::WriteProtectShared, Features::WP_HUGETLBFS_SHMEM),
            (C::WriteProtectUnpopulated, Features::WP_UNPOPULATED),
            (C::WriteProtectAsync, Features::WP_ASYNC),
            (C::MissingShared, Features::MISSING_SHMEM),
            (C::MinorShared, Features::MINOR_SHMEM),
            (C::Move, Features::MOVE),
            (C::Poison, Features::POISON),
            (C::ThreadId, Features::THREAD_ID),
        ] {
            if !supported.contains(feature) {
                self.miss(capability, None, &format!("the handshake does not list {feature:?}"), newer);
            }
        }
    }

    fn probe_pagemap(&mut self) {
        let pagemap = match Pagemap::open() {
            Ok(p) => p,
            Err(e) => {
                let remedy = match e {
                    Errno::EACCES => {
                        "the process changed its user without exec: prctl(PR_SET_DUMPABLE, 1) makes /proc/self its own again"
                    }
                    _ => "mount /proc",
                };
                self.miss(Capability::PagemapScan, Some(e), &format!("/proc/self/pagemap: {e}"), remedy);
                return;
            }
        };
        let result = with_page(Source::Anonymous, |page| {
            let mut args = ScanArgs::take_written(page);
            (args.write_protect, args.check_wp_async) = (false, false);
            pagemap.by_ref().scan(args, &mut []).map(|_| ())
        });
        if let Err(e) = result {
            self.miss(Capability::PagemapScan, Some(e), &format!("the ioctl: {e}"), "Linux 6.7 has it");
        }
    }

    fn probe_mappings(&mut self) {
        use Capability as C;
        let advise = |advice: Advice| {
            // SAFETY: `with_page` made the page for this closure alone.
            with_page(Source::Anonymous, |page| unsafe { mem::advise(page, advice) })
        };
        for (capability, advice, remedy) in [
            (C::Guard, Advice::GuardInstall, "Linux 6.13 has it"),
            (C::Populate, Advice::PopulateWrite, "Linux 5.14 has it"),
            (C::WipeOnFork, Advice::WipeOnFork, "Linux 4.14 has it"),
        ] {
            if let Err(e) = advise(advice) {
                self.miss(capability, Some(e), &format!("madvise({advice:?}): {e}"), remedy);
            }
        }
        let fd = match crate::memfd::create(c"probe", PageCount::new(1), crate::memfd::Pages::Base) {
            Ok(fd) => fd,
            Err(e) => {
                let remedy = "a seccomp filter refuses it, or the process has no descriptor left";
                for c in [C::Memfd, C::WriteProtectShared, C::MissingShared, C::MinorShared, C::GuardShared] {
                    self.miss(c, Some(e), &format!("memfd_create: {e}"), remedy);
                }
                return;
            }
        };
        use std::os::fd::AsFd;
        let result = with_page(Source::Shared(fd.as_fd(), PageCount::new(0)), |page| {
            // SAFETY: `with_page` made the page for this closure alone.
            unsafe { mem::advise(page, Advice::GuardInstall) }
        });
        if let Err(e) = result {
            self.miss(
                C::GuardShared,
                Some(e),
                &format!("madvise(GuardInstall) on a memfd: {e}"),
                "Linux 6.15 has it",
            );
        }
    }

    fn probe_huge_pages(&mut self) {
        use Capability as C;
        const PAGES_2M: PageCount = PageCount::new(512);
        for (capability, path) in [
            (C::TransparentHuge, "/sys/kernel/mm/transparent_hugepage/enabled"),
            (C::TransparentHugeShared, "/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        ] {
            let setting = std::fs::read_to_string(path).unwrap_or_default();
            let on = ["[always]", "[madvise]", "[advise]", "[within_size]", "[force]"];
            if !on.iter().any(|s| setting.contains(s)) {
                let setting = setting.trim();
                self.miss(
                    capability,
                    None,
                    &format!("{path} says {setting:?}"),
                    &format!("write madvise (advise) to {path}"),
                );
            }
        }
        // A collapse of an untouched page answers EINVAL too, so the probe touches it: EAGAIN, ENOMEM and EBUSY mean that
        // the call is known and there is merely no huge page to be had just now.
        let collapse = with_page(Source::Anonymous, |page| {
            // SAFETY: `with_page` made the page for this closure alone, readable and writable.
            unsafe {
                page.start().as_ptr::<u8>().write_volatile(1);
                mem::advise(page, Advice::Collapse)
            }
        });
        if let Err(e @ (Errno::ENOSYS | Errno::EPERM)) = collapse {
            self.miss(
                C::Collapse,
                Some(e),
                &format!("madvise(Collapse): {e}"),
                "a seccomp filter refuses it",
            );
        } else if !kernel_knows_collapse() {
            self.miss(C::Collapse, None, "madvise(Collapse) is not known", "Linux 6.1 has it");
        }
        let options = MapOptions { huge_2m: true, ..MapOptions::default() };
        // SAFETY: a new mapping at a place of the kernel's choice.
        match unsafe {
            mem::map(PAGES_2M, Protection::ReadWrite, Source::Anonymous, Placement::Anywhere, options)
        } {
            // SAFETY: the mapping was made just now and nobody refers to it.
            Ok(range) => drop(unsafe { mem::unmap(range) }),
            Err(e) => self.miss(
                C::HugePool,
                Some(e),
                &format!("mmap(MAP_HUGETLB): {e}"),
                "set sysctl vm.nr_hugepages (512 pages of 4 KiB each)",
            ),
        }
    }

    fn probe_rest(&mut self) {
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        if swaps.lines().count() < 2 {
            self.miss(Capability::Swap, None, "/proc/swaps lists none", "swapon a file or zram");
        }
        if !crate::cpu::has_fsgsbase() {
            self.miss(
                Capability::FsGsBase,
                None,
                "the auxiliary vector does not say so",
                "Linux 5.9 on an x86-64 with FSGSBASE",
            );
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

/// `MADV_COLLAPSE` on an empty range: known advice answers `Ok`, unknown EINVAL.
fn kernel_knows_collapse() -> bool {
    with_page(Source::Anonymous, |page| {
        let none = PageRange::new(page.start(), PageCount::new(0));
        // SAFETY: an empty range.
        unsafe { mem::advise(none, Advice::Collapse) }
    })
    .is_ok()
}

fn with_page<T>(source: Source<'_>, f: impl FnOnce(PageRange) -> Result<T, Errno>) -> Result<T, Errno> {
    let options = MapOptions::default();
    // SAFETY: a new mapping at a place of the kernel's choice.
    let page =
        unsafe { mem::map(PageCount::new(1), Protection::ReadWrite, source, Placement::Anywhere, options)? };
    let result = f(page);
    // SAFETY: mapped above, and `f` keeps nothing of it.
    let _ = unsafe { mem::unmap(page) };
    result
}

fn number(path: &str) -> Option<usize> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
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
