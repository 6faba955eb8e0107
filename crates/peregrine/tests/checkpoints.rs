//! Images that threads ask for.

use peregrine::{checkpoint, migrate_to, node_id, sleep, tally};
use peregrine_sys::signal::{self, number};
use std::time::Duration;

/// A second one, of whatever the thread does by then, would be an image that nobody asked for.
#[peregrine::test(nodes = 2, image_interval_ms = 3_600_000)]
fn who_asks_for_an_image_gets_one() {
    for round in 0..10 {
        let before = checkpoint();
        if tally().rollbacks == round {
            signal::kill(std::process::id() as i32, number::KILL).unwrap();
            sleep(Duration::from_secs(60));
        }
        assert_eq!(tally().rollbacks, round + 1);
        // At once: what it was woken with at the rollback, it has still to find out.
        for n in 1..4 {
            assert_eq!(checkpoint(), before + n, "in round {round}");
            migrate_to((node_id() + 1) % 2).unwrap();
            sleep(Duration::from_millis(5));
        }
    }
}
