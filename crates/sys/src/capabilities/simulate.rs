//! Masks: a set that was found stands for that of an older kernel, a container or an ordinary user.

use super::{Capabilities, Capability};
use core::fmt;

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

impl Capabilities {
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

    pub(super) fn mask(&mut self, capability: Capability, reason: &str) {
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
}
