//! Every file of a store is cut and flipped. The oracle: `verify` names that file, and a thaw gives the world as it was or
//! an error, never anything else.

mod scene;

use peregrine_store::*;
use scene::*;
use std::fs;
use std::path::Path;

/// Positions that are tried in a file of `len` bytes: all of a small file; of a large one (an image with its pages) all of
/// its first and last 160 bytes, where everything but pages lies, and some of each page.
fn positions(len: usize) -> impl Iterator<Item = usize> {
    (0..len).filter(move |at| *at < 160 || len - at <= 160 || at % 1021 == 0)
}

/// Thaws as a resume would.
fn thaw(dir: &Path) -> Result<()> {
    let mut store = Store::open(dir)?;
    let image = store.latest(build(&store))?;
    check(&store, &image)?;
    store.claim_generation(Some(&image))?;
    let claimed = files(&dir.join("generation")).pop().unwrap();
    fs::remove_file(claimed).unwrap();
    Ok(())
}

fn damage_every_file(damage: impl Fn(&[u8], usize) -> Vec<u8>) {
    let scratch = scratch();
    let dir = store_with(scratch.path(), 3);
    fs::remove_file(dir.join("generation/0000000000000001")).unwrap();
    thaw(&dir).unwrap();
    let mut tried = 0;
    for path in files(&dir) {
        if path.ends_with("lock") {
            continue;
        }
        let whole = fs::read(&path).unwrap();
        let kept = path.ends_with("released");
        for at in positions(whole.len()) {
            fs::write(&path, damage(&whole, at)).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            match Store::open_read_only(&dir).and_then(|store| store.verify()) {
                Ok(report) => {
                    let messages: Vec<_> = report.damage.iter().map(|damage| damage.to_string()).collect();
                    assert!(
                        messages.iter().any(|message| message.contains(name)),
                        "{path:?} at {at}: {messages:?}"
                    );
                }
                Err(error) => assert!(error.to_string().contains(name), "{path:?} at {at}: {error}"),
            }
            // Either refused, or the damage does not reach the image (`check` compares every byte).
            let thawed = thaw(&dir);
            let is_old = fs::read(&path).unwrap() == whole;
            assert!(!is_old || kept, "the damage stays until somebody mends it");
            drop(thawed);
            tried += 1;
        }
        fs::write(&path, &whole).unwrap();
    }
    println!("{tried} damages");
    thaw(&dir).unwrap();
}

#[test]
fn a_flip_in_any_file_is_found_and_never_thawed() {
    damage_every_file(|bytes, at| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1 << (at % 8);
        bytes
    });
}

#[test]
fn a_cut_of_any_file_is_found_and_never_thawed() {
    damage_every_file(|bytes, at| bytes[..at].to_vec());
}

#[test]
fn a_missing_file_is_found_and_never_thawed() {
    let scratch = scratch();
    let dir = store_with(scratch.path(), 3);
    for path in files(&dir) {
        if path.ends_with("lock") || path.starts_with(dir.join("generation")) {
            continue;
        }
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        match Store::open_read_only(&dir).and_then(|store| store.verify()) {
            // A manifest's absence is that of an image that never was.
            Ok(report) if path.starts_with(dir.join("world")) => assert!(report.damage.is_empty()),
            Ok(report) => {
                assert!(report.damage.iter().any(|d| d.to_string().contains(name)), "{path:?}: {report:?}")
            }
            Err(error) => assert!(matches!(error, StoreError::NotAStore { .. }), "{error}"),
        }
        let _ = thaw(&dir);
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn what_is_not_the_stores_own_is_listed_and_left_alone() {
    let scratch = scratch();
    let dir = store_with(scratch.path(), 3);
    let strange =
        ["note", "world/1", "threads/x", "threads/0000000000000000/core", "bin/other", "output/0.1.2"];
    for name in strange {
        fs::write(dir.join(name), "x").unwrap();
    }
    let mut store = Store::open(&dir).unwrap();
    store.prune().unwrap();
    let mut found = store.verify().unwrap();
    assert!(found.damage.is_empty(), "{found:?}");
    found.strange.sort();
    let mut expected = strange.map(|name| dir.join(name));
    expected.sort();
    assert_eq!(found.strange, expected);
}
