//! Which kernel mechanism carries a region, and why not a better one.

use crate::mapping::{Backing, Mapping};
use crate::trap::Cause;
use peregrine_sys::capabilities::{Capabilities, Capability};
use std::fmt;

/// How a [`Region`](super::Region) traps and protects.
///
/// | | traps in | `protect` to `Read` | to `None` | absent pages trap | system calls on a trapping page |
/// |---|---|---|---|---|---|
/// | `Sigbus` | the toucher (SIGBUS) | yes | no | yes | EFAULT |
/// | `Pager` | a thread | yes | no | yes | served; EFAULT under `USER_MODE_ONLY` |
/// | `Mprotect` | the toucher (SIGSEGV) | yes | yes | of a memfd only | EFAULT |
/// | `Guard` | the toucher (SIGSEGV) | no | yes | no | EFAULT |
///
/// `Mprotect` splits the mapping at every change of access (`vm.max_map_count`); the others never do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mechanism {
    /// userfaultfd with `UFFD_FEATURE_SIGBUS`: inline.
    Sigbus,
    /// userfaultfd messages on a thread.
    Pager,
    /// `mprotect` and SIGSEGV: inline.
    Mprotect,
    /// Guard markers and SIGSEGV: inline.
    Guard,
}

impl Mechanism {
    /// Every mechanism, best first.
    pub const ALL: [Self; 4] = [Self::Sigbus, Self::Pager, Self::Guard, Self::Mprotect];

    /// Whether the handler runs on the faulting thread.
    pub const fn is_inline(self) -> bool {
        !matches!(self, Self::Pager)
    }

    /// What a fault that it raised looks like to a signal handler.
    #[inline]
    pub(super) fn raises(self) -> Cause {
        if self == Self::Sigbus { Cause::Bus } else { Cause::Segv }
    }

    pub(crate) const fn uses_userfaultfd(self) -> bool {
        matches!(self, Self::Sigbus | Self::Pager)
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sigbus => "userfaultfd+SIGBUS",
            Self::Pager => "userfaultfd+pager",
            Self::Mprotect => "mprotect+SIGSEGV",
            Self::Guard => "guard+SIGSEGV",
        })
    }
}

/// What was chosen, and what was passed over and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice<M> {
    /// In use.
    pub chosen: M,
    /// Better ones, with the reason each is not in use; empty if the best was chosen or one was forced.
    pub passed_over: Vec<(M, String)>,
}

impl<M: fmt::Display> fmt::Display for Choice<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.chosen)?;
        for (m, why) in &self.passed_over {
            write!(f, " (not {m}: {why})")?;
        }
        Ok(())
    }
}

/// What a region is to do; decides which mechanisms will do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Wishes {
    /// `Some(true)`: an inline handler, `Some(false)`: a pager, `None`: no handler.
    pub(crate) inline: Option<bool>,
    pub(crate) write_traps: bool,
    pub(crate) read_traps: bool,
    pub(crate) absent_traps: bool,
    pub(crate) may_lose: bool,
}

/// Why `mechanism` can't do it, or `None` if it can.
pub(crate) fn objection(
    mechanism: Mechanism,
    wishes: Wishes,
    mapping: &Mapping,
    caps: &Capabilities,
) -> Option<String> {
    let lack = |c: Capability| caps.lack(c).map(|l| l.to_string());
    let shared = mapping.backing().is_shared();
    if wishes.inline.is_some_and(|inline| inline != mechanism.is_inline()) {
        return Some(match mechanism.is_inline() {
            true => "it runs inline, and the handler given is a pager's".into(),
            false => "it needs a pager handler, and the one given is inline".into(),
        });
    }
    if wishes.inline.is_none() && mechanism == Mechanism::Pager {
        return Some("it needs a pager handler".into());
    }
    match mechanism {
        Mechanism::Sigbus | Mechanism::Pager => {
            if mapping.is_plain_file() || mapping.backing() == Backing::PrivateFile {
                return Some("userfaultfd does not serve ordinary files: use Mechanism::Mprotect".into());
            }
            if wishes.read_traps {
                return Some("userfaultfd stops writes only; reads need Mechanism::Mprotect or Guard".into());
            }
            lack(Capability::Userfaultfd)
                .or_else(|| (mechanism == Mechanism::Sigbus).then(|| lack(Capability::UserfaultfdSigbus))?)
                .or_else(|| {
                    let write_protect =
                        if shared { Capability::WriteProtectShared } else { Capability::WriteProtect };
                    wishes.write_traps.then(|| lack(write_protect))?
                })
                .or_else(|| (wishes.absent_traps && shared).then(|| lack(Capability::MissingShared))?)
        }
        Mechanism::Mprotect => (wishes.absent_traps && mapping.backing() != Backing::Memfd).then(|| {
            "without a userfaultfd only pages of a memfd can be absent: use a memfd, or allow userfaultfd"
                .into()
        }),
        Mechanism::Guard => {
            if wishes.write_traps {
                return Some(
                    "a guard stops reads too: for write traps use Mechanism::Sigbus or Mprotect".into(),
                );
            }
            if wishes.absent_traps {
                return Some("guards don't tell absent pages from others: use Mechanism::Mprotect".into());
            }
            if !shared && !wishes.may_lose {
                return Some("a guard destroys the contents of private memory: use Mechanism::Mprotect, or say `may_lose_contents`".into());
            }
            lack(if shared { Capability::GuardShared } else { Capability::Guard })
        }
    }
}
