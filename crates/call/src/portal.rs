//! Portals: the doors of a domain, by name and version; and who may pass.

use crate::credentials::Credentials;
use crate::domain::Invocation;
use crate::error::Failure;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// A portal of the domain that one client is connected to, as [`Client::portal`](crate::Client::portal) found it.
///
/// It is of that domain, and of this life of it: a call into another, or into its successor at the same path, is refused
/// ([`Refusal::OtherDomain`](crate::Refusal::OtherDomain)), where it would reach whatever portal has that number there, in whatever version. Another
/// client of the same domain can use it, and gets nothing that asking by name would not: access is checked at each call.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PortalId(
    /// Its place in the domain's table.
    pub(crate) u32,
    /// Half of the domain's random identity.
    pub(crate) u32,
);

impl PortalId {
    pub(crate) const fn new(index: u32, domain: u64) -> Self {
        Self(index, domain as u32)
    }

    /// Whether it was found in this domain.
    #[inline]
    pub(crate) const fn is_of(self, domain: u64) -> bool {
        self.1 == domain as u32
    }
}

/// What runs behind a portal, on an activation's stack.
///
/// Implemented by every `Fn(&mut Invocation) -> Result<(), Failure>`. Many activations may run it at once. A panic is
/// caught and becomes [`CallError::Panicked`](crate::CallError::Panicked); the activation serves on.
pub trait Handler: Send + Sync + 'static {
    /// Serves one call.
    ///
    /// # Errors
    /// The callee's own; the caller gets it as [`CallError::Callee`](crate::CallError::Callee), and none of its `inout`
    /// arguments and outputs change.
    fn serve(&self, call: &mut Invocation<'_>) -> Result<(), Failure>;
}

impl<F: Fn(&mut Invocation<'_>) -> Result<(), Failure> + Send + Sync + 'static> Handler for F {
    fn serve(&self, call: &mut Invocation<'_>) -> Result<(), Failure> {
        self(call)
    }
}

/// Who may connect, or call a portal. Judged by the credentials that the kernel reports (`SO_PEERCRED`), never by what
/// the client says.
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum Access {
    /// Everybody who can reach the socket.
    Everyone,
    /// The user that the domain runs as, and root.
    #[default]
    SameUser,
    /// These users.
    Users(Vec<u32>),
    /// Clients whose effective group is one of these.
    Groups(Vec<u32>),
    /// Whatever the function says. One that panics admits nobody.
    Rule(Arc<dyn Fn(&Credentials) -> bool + Send + Sync>),
}

impl Access {
    /// Whether a client with these credentials passes; `own_uid` is the domain's user.
    pub fn admits(&self, client: &Credentials, own_uid: u32) -> bool {
        match self {
            Self::Everyone => true,
            Self::SameUser => client.uid == own_uid || client.uid == 0,
            Self::Users(uids) => uids.contains(&client.uid),
            Self::Groups(gids) => gids.contains(&client.gid),
            // On the domain's one thread for everything that is not a call: it must go on.
            Self::Rule(rule) => catch_unwind(AssertUnwindSafe(|| rule(client))).unwrap_or(false),
        }
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Everyone => f.write_str("Everyone"),
            Self::SameUser => f.write_str("SameUser"),
            Self::Users(uids) => f.debug_tuple("Users").field(uids).finish(),
            Self::Groups(gids) => f.debug_tuple("Groups").field(gids).finish(),
            Self::Rule(_) => f.write_str("Rule(..)"),
        }
    }
}

/// One entry of a domain's portal table.
pub(crate) struct Portal {
    pub name: String,
    pub version: u64,
    pub access: Access,
    pub handler: Box<dyn Handler>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_look_at_what_the_kernel_said() {
        let client = Credentials { pid: 7, uid: 1000, gid: 100 };
        assert!(Access::Everyone.admits(&client, 0));
        assert!(Access::SameUser.admits(&client, 1000));
        assert!(!Access::SameUser.admits(&client, 1001));
        assert!(Access::SameUser.admits(&Credentials { pid: 7, uid: 0, gid: 0 }, 1001));
        assert!(!Access::Users(vec![1, 2]).admits(&client, 1000));
        assert!(Access::Groups(vec![100]).admits(&client, 0));
        assert!(!Access::Rule(Arc::new(|c| c.pid == 8)).admits(&client, 0));
        assert!(Access::Rule(Arc::new(|c| c.pid == 7)).admits(&client, 0));
        assert!(!Access::Rule(Arc::new(|_| panic!("a rule"))).admits(&client, 0), "and the domain lives");
    }
}
