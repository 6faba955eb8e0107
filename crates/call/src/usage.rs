//! Processor time, charged to the thread that called, per domain.
//!
//! Two accounts, both by the kernel's own per-thread clock. **The connection's**: an activation is bound to one client for a
//! while, so the difference of its clock between binding and leaving is that client's, with no clock read per call
//! ([`Client::usage`](crate::Client::usage)). **The thread's**: a call with [`Attributes::charge`](crate::Attributes) has the
//! clock read before and after its handler, and the reply lists what this call cost in each domain that it reached, so that
//! a thread learns what it spent three domains away ([`charges`]).

use crate::chain;
use crate::reply::MAX_CHARGES;
use std::cell::RefCell;

/// A domain, as rows of processor time name it: random, made when the domain starts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DomainId(pub(crate) u64);

impl DomainId {
    /// Stands for all domains of one call that did not fit its reply.
    pub const OTHERS: Self = Self(0);
}

/// What one client has used of one domain.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Processor time of activations while they were the client's, in nanoseconds.
    pub cpu_ns: u64,
    /// Calls executed.
    pub calls: u64,
}

thread_local! {
    static CHARGES: RefCell<Vec<(u64, u64)>> = const { RefCell::new(Vec::new()) };
}

/// What the calling thread's charged calls have cost so far: nanoseconds of processor time by domain.
///
/// In a handler: what its nested calls have cost.
pub fn charges() -> Vec<(DomainId, u64)> {
    CHARGES.with_borrow(|rows| rows.iter().map(|&(id, ns)| (DomainId(id), ns)).collect())
}

/// Adds to the calling thread's account what a runtime was told that a call of its cost: [`Pending::charges`](crate::Pending::charges).
pub fn settle(rows: &[(u64, u64)]) {
    rows.iter().for_each(|&(domain, ns)| add(domain, ns));
}

/// Adds a row to the running thread's account.
pub(crate) fn add(domain: u64, ns: u64) {
    CHARGES.with_borrow_mut(|rows| match rows.iter_mut().find(|row| row.0 == domain) {
        Some(row) => row.1 = row.1.saturating_add(ns),
        None => rows.push((domain, ns)),
    });
}

/// The account of one charged call on an activation: opened before its handler, closed after.
pub(crate) struct Account {
    begun_ns: u64,
    outer: Vec<(u64, u64)>,
    was_charging: bool,
}

impl Account {
    pub fn open() -> Self {
        Self {
            outer: CHARGES.take(),
            was_charging: chain::set_charged(true),
            begun_ns: peregrine_sys::timer::thread_cpu_ns(),
        }
    }

    /// The call's own time, and its nested calls' by domain: at most as many rows as a reply carries.
    pub fn close(mut self) -> (u64, Vec<(u64, u64)>) {
        let own = peregrine_sys::timer::thread_cpu_ns().saturating_sub(self.begun_ns);
        chain::set_charged(self.was_charging);
        let mut rows = CHARGES.replace(std::mem::take(&mut self.outer));
        if rows.len() > MAX_CHARGES {
            let rest = rows.drain(MAX_CHARGES - 1..).map(|row| row.1).fold(0, u64::saturating_add);
            rows.push((DomainId::OTHERS.0, rest));
        }
        (own, rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_one_domain_add_up_and_the_surplus_is_summed() {
        let account = Account::open();
        for domain in 1..=20 {
            add(domain, 10);
            add(domain, domain);
        }
        let (_, rows) = account.close();
        assert_eq!(rows.len(), MAX_CHARGES);
        assert_eq!(rows[0], (1, 11));
        assert_eq!(rows.iter().map(|r| r.1).sum::<u64>(), 20 * 10 + 210);
        assert_eq!(rows[MAX_CHARGES - 1].0, DomainId::OTHERS.0);
        assert!(charges().is_empty() && !chain::is_charged());
    }
}
