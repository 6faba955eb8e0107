//! A generational collector's remembered set (Appel and Li's fourth application), kept in two ways: by page protection (the
//! first store to a page of the old generation traps) and by DIRTY (the collector asks which pages were written). Both
//! must find every old object that points to a young one; the costs are printed side by side.

use peregrine_vm::{Capabilities, DirtyMechanism, PAGE_SIZE, PageCount, PrivateMemory, Tracker};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// The old generation: words that hold 0 or the number of a young object, plus one.
const OLD: PageCount = PageCount::new(4096);
const WORDS_A_PAGE: usize = PAGE_SIZE / 8;
const COLLECTIONS: usize = 20;
/// Stores into old objects between two collections.
const STORES: usize = 2000;

/// The young objects that each collection found old objects to point to.
type Roots = Vec<BTreeSet<usize>>;

struct Costs {
    mutator: Duration,
    collector: Duration,
    pages: usize,
}

fn random(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize
}

/// Runs the same mutator with one way of remembering; returns the roots that each collection found, and the costs.
fn run(mechanism: DirtyMechanism, caps: &Capabilities) -> Result<(Roots, Costs), Box<dyn std::error::Error>> {
    let mut old = PrivateMemory::new(OLD)?;
    old.fill(0);
    let mut remembered = Tracker::of_private(&old).force(mechanism).start(caps)?;
    let mut costs = Costs { mutator: Duration::ZERO, collector: Duration::ZERO, pages: 0 };
    let mut found = Vec::new();
    let mut seed = 42;
    for _ in 0..COLLECTIONS {
        let begun = Instant::now();
        for _ in 0..STORES {
            // Most stores go to few pages, as they do in programs.
            let page = if random(&mut seed).is_multiple_of(4) {
                random(&mut seed) % OLD.get()
            } else {
                random(&mut seed) % 64
            };
            let word = page * WORDS_A_PAGE + random(&mut seed) % WORDS_A_PAGE;
            let young = random(&mut seed) as u64 % 1000 + 1;
            old[word * 8..word * 8 + 8].copy_from_slice(&young.to_le_bytes());
        }
        costs.mutator += begun.elapsed();

        // A minor collection: only the pages that were written are scanned for pointers to young objects, which are promoted:
        // the words are cleared. The collector's own stores are remembered too, and cost it a second look next time.
        let begun = Instant::now();
        let mut roots = BTreeSet::new();
        let dirty = remembered.take_dirty()?;
        costs.pages += dirty.page_count().get();
        let start = old.range().start().as_usize();
        for page in dirty.pages() {
            let offset = page.as_usize() - start;
            for word in old[offset..offset + PAGE_SIZE].chunks_exact_mut(8) {
                if word.iter().any(|b| *b != 0) {
                    roots.insert(u64::from_le_bytes(word.try_into()?) as usize);
                    word.fill(0);
                }
            }
        }
        // What the collector wrote holds no young pointer: it need not be remembered.
        remembered.take_dirty()?;
        costs.collector += begun.elapsed();
        found.push(roots);
    }
    // Nothing was forgotten: no word of the old generation still points to a young object.
    assert!(old.iter().all(|b| *b == 0), "{mechanism} forgot a store");
    Ok((found, costs))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let caps = Capabilities::probe();
    let mut results = Vec::new();
    for mechanism in
        [DirtyMechanism::Mprotect, DirtyMechanism::SyncWriteProtect, DirtyMechanism::AsyncWriteProtect]
    {
        match run(mechanism, &caps) {
            Ok((found, costs)) => {
                let kind = match mechanism {
                    DirtyMechanism::AsyncWriteProtect => "DIRTY",
                    _ => "protection",
                };
                println!(
                    "{kind:>10} by {mechanism}: {:.0} ns a store, {:.1} µs a collection, {} pages a collection",
                    costs.mutator.as_nanos() as f64 / (COLLECTIONS * STORES) as f64,
                    costs.collector.as_nanos() as f64 / COLLECTIONS as f64 / 1000.0,
                    costs.pages / COLLECTIONS,
                );
                results.push(found);
            }
            Err(why) => println!("skipped {mechanism}: {why}"),
        }
    }
    assert!(
        !results.is_empty() && results.windows(2).all(|w| w[0] == w[1]),
        "every way finds the same roots"
    );
    Ok(())
}
