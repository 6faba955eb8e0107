//! Nodes that are killed while their threads call.

use crate::domain::{WHERE, holds, holds_and_leaves_no_client, kills_node_1, kitchen, portal};
use peregrine::{FreshCallError, Loan, sleep, spawn, tally};
use peregrine_call::interface::Error;
use std::time::Duration;

#[peregrine::test(program, nodes = 2, image_interval_ms = 20)]
fn rolled_back() {
    let slow = portal("slow");
    slow.call(&[0], 8).unwrap();
    let helper = kills_node_1();
    let first = slow.call(&[250], 8);
    assert_eq!(first, Err(FreshCallError::RolledBack), "what became of it nobody here can know");
    assert_eq!(slow.call(&[1], 8).map(|b| b.len()), Ok(4), "the next call is as good as any");
    helper.join().unwrap();
    assert_eq!(tally().rollbacks, 1);
}

#[test]
fn a_caller_that_goes_back_into_a_call_is_told_so() {
    holds(rolled_back());
}

#[peregrine::test(program, nodes = 2, kill_every_ms = 60, least_kills = 5, timeout_s = 60)]
fn under_fire() {
    let callers: Vec<_> = (0..6u8)
        .map(|i| {
            spawn(
                |i: u8| {
                    let add = portal("add");
                    let mut rolled_back = 0;
                    for n in 0..400u32 {
                        let bytes = [i, n as u8, (n >> 8) as u8];
                        match add.call(&bytes, 8) {
                            Ok(back) => assert_eq!(back, bytes.map(|b| b.wrapping_add(1))),
                            Err(FreshCallError::RolledBack) => rolled_back += 1,
                            Err(e) => panic!("{e}"),
                        }
                        if n % 20 == 0 {
                            sleep(Duration::from_millis(1));
                        }
                    }
                    rolled_back
                },
                i,
            )
        })
        .collect();
    let rolled_back: u32 = callers.into_iter().map(|c| c.join().unwrap()).sum();
    while tally().kills < 5 {
        sleep(Duration::from_millis(20));
    }
    println!("{rolled_back} calls of other lives");
}

#[test]
fn calls_go_on_though_nodes_are_killed_and_the_domain_is_left_with_no_dead_client() {
    holds_and_leaves_no_client(under_fire());
}

#[peregrine::test(
    program,
    nodes = 2,
    kill_every_ms = 60,
    least_kills = 5,
    timeout_s = 100,
    move_every_ms = 5
)]
fn lends_under_fire() {
    let lenders: Vec<_> = (0..4u32)
        .map(|i| {
            let lend = |i: u32| {
                let path = std::env::var(WHERE).unwrap();
                let gone =
                    |e: &FreshCallError| matches!(e, FreshCallError::LoanLost | FreshCallError::RolledBack);
                let mut lent: Option<Loan> = None;
                let (mut right, mut lost) = (0, 0u32);
                while right < 150 {
                    let mut once = || {
                        let loan = match lent.take() {
                            Some(loan) => loan,
                            None => Loan::new(&path, 4000)?,
                        };
                        loan.write(0, &(i * 1000 + right).to_ne_bytes())?;
                        let sum = match kitchen().weigh(&loan, &mut 0) {
                            Err(Error::Call(e)) => return Err(e),
                            sum => sum.unwrap(),
                        };
                        assert_eq!(sum, i * 1000 + right, "never another's, and never of another life");
                        Ok(loan)
                    };
                    match once() {
                        Ok(loan) => (lent, right) = (Some(loan), right + 1),
                        Err(e) if gone(&e) => lost += 1,
                        Err(e) => panic!("{e}"),
                    }
                    if right % 10 == 0 {
                        sleep(Duration::from_millis(1));
                    }
                }
                lost
            };
            spawn(lend, i)
        })
        .collect();
    let lost: u32 = lenders.into_iter().map(|lender| lender.join().unwrap()).sum();
    while tally().kills < 5 {
        sleep(Duration::from_millis(20));
    }
    println!("{lost} loans of other lives");
}

#[test]
fn loans_come_and_go_with_the_life_that_they_were_made_in_though_nodes_are_killed() {
    holds_and_leaves_no_client(lends_under_fire());
}
