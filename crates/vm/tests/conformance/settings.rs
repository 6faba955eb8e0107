//! Whose kernel this is, and what memory: what every check is run over.

use peregrine_vm::capabilities::Simulate;
use peregrine_vm::{Capabilities, Capability, Mapping, PageCount, PageKind, Protection};
use std::fmt::Display;
use std::sync::Arc;
use testkit::Outcome;

/// Whose kernel this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Setting {
    AsFound,
    Masked(Simulate),
    /// Not a mask: the process really becomes uid 65534.
    Nobody,
    /// The same, under a real seccomp filter that refuses `userfaultfd(2)`, as in a container.
    NobodyFiltered,
}

impl Setting {
    pub const ALL: [Self; 6] = [
        Self::AsFound,
        Self::Masked(Simulate::Linux5_15),
        Self::Masked(Simulate::ContainerWithoutUserfaultfd),
        Self::Masked(Simulate::OrdinaryUser),
        Self::Nobody,
        Self::NobodyFiltered,
    ];

    pub fn name(self) -> String {
        match self {
            Self::AsFound => "as found".into(),
            Self::Masked(s) => s.to_string(),
            Self::Nobody => "uid 65534".into(),
            Self::NobodyFiltered => "uid 65534 under seccomp".into(),
        }
    }

    pub fn enter(self) -> Result<Capabilities, String> {
        match self {
            Self::AsFound => Ok(Capabilities::probe()),
            Self::Masked(s) => Ok(Capabilities::probe().simulate(s)),
            Self::Nobody | Self::NobodyFiltered => {
                if !peregrine_sys::process::is_root() {
                    return Err("missing capability: root, to become uid 65534".into());
                }
                peregrine_sys::process::become_user(65534).expect("root may become anybody");
                if self == Self::NobodyFiltered {
                    peregrine_sys::process::forbid_call(peregrine_sys::process::CALL_USERFAULTFD)
                        .expect("a filter");
                    let caps = Capabilities::probe();
                    let why = caps.lack(Capability::Userfaultfd).expect("it is filtered").to_string();
                    assert!(why.contains("seccomp") && why.contains("/dev/userfaultfd"), "{why}");
                    return Ok(caps);
                }
                let caps = Capabilities::probe();
                // What this setting is for. Should the machine's sysctl allow more, it says so and tests that.
                if caps.has(Capability::UserfaultfdKernelFaults) {
                    println!(
                        "note: vm.unprivileged_userfaultfd=1, so uid 65534 has more than USER_MODE_ONLY"
                    );
                }
                Ok(caps)
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    Anonymous,
    Huge,
    Pool,
    PoolMemfd,
    Memfd,
    File,
}

impl Memory {
    pub const ALL: [Self; 6] =
        [Self::Anonymous, Self::Huge, Self::Pool, Self::PoolMemfd, Self::Memfd, Self::File];

    /// What the kernel must offer for it.
    pub const fn needs(self) -> Option<Capability> {
        match self {
            Self::Anonymous | Self::Memfd | Self::File => None,
            Self::Huge => Some(Capability::TransparentHuge),
            Self::Pool | Self::PoolMemfd => Some(Capability::HugePool),
        }
    }

    pub fn make(self, pages: PageCount) -> Arc<Mapping> {
        let made = match self {
            Self::Anonymous => Mapping::anonymous(pages),
            Self::Huge => {
                let size = PageCount::new(pages.get().next_multiple_of(512));
                let mapping = Mapping::anonymous_of(size, PageKind::TransparentHuge).expect("room");
                mapping.populate(mapping.range(), true).expect("populate");
                Ok(mapping)
            }
            Self::Pool => Mapping::anonymous_of(PageCount::new(512), PageKind::Huge2M),
            Self::PoolMemfd => Mapping::memfd_of(PageCount::new(512), PageKind::Huge2M),
            Self::Memfd => Mapping::memfd(pages),
            Self::File => {
                let file = tempfile::tempfile().expect("a file");
                file.set_len(pages.bytes() as u64).expect("room");
                Mapping::file(&file, PageCount::new(0), pages, Protection::ReadWrite)
            }
        };
        Arc::new(made.expect("memory"))
    }

    pub fn is_shared(self) -> bool {
        matches!(self, Self::Memfd | Self::PoolMemfd | Self::File)
    }

    pub fn is_pool(self) -> bool {
        matches!(self, Self::Pool | Self::PoolMemfd)
    }
}

pub const PAGES: PageCount = PageCount::new(32);

/// Every mechanism that was tried, with its reason.
pub fn skip_for<M: Display>(reasons: Vec<(M, String)>) -> Outcome {
    let why = reasons.into_iter().map(|(m, why)| format!("{m}: {why}")).collect::<Vec<_>>().join("; ");
    assert!(why.contains("is missing"), "a skip names the missing capability: {why}");
    Outcome::Skipped(why)
}

/// What a check is run over: a mechanism, forced, on a kind of memory, under a set of capabilities.
pub struct Case<M> {
    pub mechanism: M,
    pub kind: Memory,
    pub caps: Capabilities,
}

/// The value, or the skip.
#[macro_export]
macro_rules! or_skip {
    ($e:expr) => {
        match $e {
            Ok(x) => x,
            Err(outcome) => return outcome,
        }
    };
}
