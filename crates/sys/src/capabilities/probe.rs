//! The questions: each call is made once, on memory of its own, and what is refused is noted with the answer and the remedy.

use super::{Capabilities, Capability};
use crate::mem::{self, Advice, MapOptions, Placement, Source};
use crate::pagemap::{Pagemap, ScanArgs};
use crate::raw::Errno;
use crate::uffd::{Access, Features, Uffd};
use peregrine_base::{PageCount, PageRange, Protection};

/// What helps against an advice that is refused: a kernel that does not know it says EINVAL.
fn allowed_or(refused: Errno, newer: &str) -> &str {
    match refused {
        Errno::EPERM | Errno::ENOSYS => {
            "a seccomp filter refuses the call: allow madvise in the container's profile"
        }
        _ => newer,
    }
}

impl Capabilities {
    pub(super) fn probe_userfaultfd(&mut self) {
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

    pub(super) fn probe_pagemap(&mut self) {
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

    pub(super) fn probe_mappings(&mut self) {
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
                let remedy = allowed_or(e, remedy);
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
                allowed_or(e, "Linux 6.15 has it"),
            );
        }
    }

    pub(super) fn probe_huge_pages(&mut self) {
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

    pub(super) fn probe_rest(&mut self) {
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

pub(super) fn number(path: &str) -> Option<usize> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
