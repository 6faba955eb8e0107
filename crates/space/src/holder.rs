//! Who holds a lock: what a member that waits no longer tells its user.

use crate::intent::{Doing, Read};
use crate::member::MemberId;
use crate::record::Value;
use core::fmt;
use peregrine_base::PageRange;

/// A kind of operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OperationKind {
    /// [`map`](crate::AddressSpace::map)
    Map,
    /// [`unmap`](crate::AddressSpace::unmap)
    Unmap,
    /// [`protect`](crate::AddressSpace::protect)
    Protect,
    /// [`fault`](crate::AddressSpace::fault) or [`admit`](crate::AddressSpace::admit), or a [`map`](crate::AddressSpace::map) of an object that has
    /// not found a description for it yet
    Fill,
    /// [`fork`](crate::AddressSpace::fork)
    Fork,
}

/// A member that holds locks which another one waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Holder {
    /// Which member.
    pub member: MemberId,
    /// Its process, if [members are processes](crate::Mmu::process_of).
    pub process: Option<u32>,
    /// What it is doing and where; `None` if it went on to something else just now.
    pub doing: Option<(OperationKind, PageRange)>,
}

impl Holder {
    pub(crate) fn new(member: MemberId, process: Option<u32>, intent: Option<Read>) -> Self {
        let kind = |doing| match doing {
            Doing::Set(Value::UNMAPPED) => OperationKind::Unmap,
            Doing::Set(_) => OperationKind::Map,
            Doing::Rights(_) => OperationKind::Protect,
            Doing::Fault => OperationKind::Fill,
            Doing::Fork(_) => OperationKind::Fork,
        };
        let doing = intent.map(|read| (kind(read.doing), crate::space::range_of(&read.pages)));
        Self { member, process, doing }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "member {}", self.member)?;
        if let Some(process) = self.process {
            write!(f, " (process {process})")?;
        }
        match self.doing {
            Some((kind, range)) => write!(f, " is in the middle of {kind:?} at {range:?}"),
            None => write!(f, " holds a lock here"),
        }
    }
}
