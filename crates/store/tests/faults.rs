//! Every step fails once, with each of the errors that disks give.
//!
//! Count, then fail at `n`: a dry run counts the steps of a commit, then for each step and each error a commit is made
//! to fail there. The oracle: the error says what, where and what to do; the image before is whole and latest; nothing
//! unfinished is visible; and the same commit, tried again, succeeds. Only a failure after the commit point may leave it
//! in doubt, and then the store takes no more commits until it is opened again.

mod scene;

use peregrine_store::*;
use peregrine_sys::rustix::io::Errno;
use scene::*;
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;

const IMAGES: u64 = 3;

#[derive(Clone, Debug)]
struct Failed {
    name: &'static str,
    path: PathBuf,
}

/// Runs one commit with step `fail_at` failing; returns its result, the steps that were reached, and the one that failed.
fn commit_with(
    store: &mut Store,
    generation: Generation,
    fail_at: u64,
    errno: Errno,
    and_all_after: bool,
) -> (Result<Committed>, u64, Option<Failed>) {
    let (reached, failed) = (Rc::new(Cell::new(0)), Rc::new(RefCell::new(None)));
    let (counted, noted) = (reached.clone(), failed.clone());
    let _watching = step::watch(move |step| {
        let n = counted.replace(counted.get() + 1);
        if n == fail_at || (and_all_after && n > fail_at) {
            noted.borrow_mut().get_or_insert(Failed { name: step.name, path: step.path.to_path_buf() });
            return Err(errno.into());
        }
        Ok(())
    });
    let result = commit_next(store, generation);
    let failed = failed.borrow().clone();
    (result, reached.get(), failed)
}

#[test]
fn a_commit_that_fails_at_any_step_leaves_the_image_before_and_can_be_tried_again() {
    let scratch = scratch();
    let start = store_with(scratch.path(), IMAGES);
    let dir = scratch.path().join("copy");
    let mut fail_at = 0;
    let mut in_doubt = 0;
    let errors = [
        (Errno::NOSPC, "free some space"),
        (Errno::IO, "the last commit is untouched"),
        (Errno::ROFS, "read-only"),
    ];
    loop {
        let (errno, remedy) = errors[fail_at as usize % errors.len()];
        let _ = std::fs::remove_dir_all(&dir);
        copy(&start, &dir);
        let (mut store, generation, _) = go_on(&dir).unwrap();
        let before = files(&dir);
        let (result, _, failed) = commit_with(&mut store, generation, fail_at, errno, false);
        let Some(failed) = failed else {
            result.unwrap();
            break;
        };
        let error = result.unwrap_err();
        let message = error.to_string();
        println!("{} {} fails: {message}", failed.name, failed.path.display());
        assert!(message.contains(dir.to_str().unwrap()) && message.contains(remedy), "{message}");
        if let StoreError::InDoubt { .. } = error {
            in_doubt += 1;
            assert!(matches!(commit_next(&mut store, generation), Err(StoreError::Stopped { .. })));
            drop(store);
            assert_eq!(check_store(&dir).unwrap(), IMAGES + 1);
        } else {
            assert_eq!(
                files(&dir).into_iter().filter(|path| !before.contains(path)).count(),
                0,
                "nothing is left"
            );
            let image = store.latest(build(&store)).unwrap();
            assert_eq!(image.sequence(), seq(IMAGES));
            check(&store, &image).unwrap();
            commit_next(&mut store, generation).unwrap();
            drop(store);
            assert_eq!(check_store(&dir).unwrap(), IMAGES + 1);
        }
        fail_at += 1;
    }
    assert_eq!(in_doubt, 1, "one step lies behind the commit point: making its name durable");
    assert!(fail_at > 15, "{fail_at} steps failed");
}

#[test]
fn a_disk_that_fails_for_good_leaves_the_image_before() {
    let scratch = scratch();
    let start = store_with(scratch.path(), IMAGES);
    let dir = scratch.path().join("copy");
    for fail_at in 0.. {
        let _ = std::fs::remove_dir_all(&dir);
        copy(&start, &dir);
        let (mut store, generation, _) = go_on(&dir).unwrap();
        let (result, _, failed) = commit_with(&mut store, generation, fail_at, Errno::IO, true);
        drop(store);
        let found = check_store(&dir).unwrap();
        match (result, failed) {
            (Ok(_), None) => break,
            (Err(StoreError::InDoubt { .. }), _) => assert_eq!(found, IMAGES + 1),
            (Err(_), _) => assert_eq!(found, IMAGES),
            (Ok(_), Some(failed)) => panic!("{failed:?} went unnoticed"),
        }
        let (mut store, generation, _) = go_on(&dir).unwrap();
        commit_next(&mut store, generation).unwrap();
    }
}

#[test]
fn a_failed_clean_up_of_a_name_stops_the_store() {
    let scratch = scratch();
    let dir = store_with(scratch.path(), IMAGES);
    let (mut store, generation, _) = go_on(&dir).unwrap();
    let watching = step::watch(|step| match step.name {
        "rename" if step.path.parent().is_some_and(|parent| parent.ends_with("world")) => {
            Err(Errno::NOSPC.into())
        }
        "unlink" => Err(Errno::IO.into()),
        _ => Ok(()),
    });
    let refused = commit_next(&mut store, generation).unwrap_err();
    assert!(refused.to_string().contains("free some space"), "{refused}");
    drop(watching);
    let refused = commit_next(&mut store, generation).unwrap_err();
    assert!(matches!(refused, StoreError::Stopped { .. }), "{refused}");
    assert!(refused.to_string().contains("open it again"), "{refused}");
    drop(store);
    let (mut store, generation, from) = go_on(&dir).unwrap();
    assert_eq!(from, IMAGES);
    commit_next(&mut store, generation).unwrap();
    commit_next(&mut store, generation).unwrap();
    store.prune().unwrap();
    let image = store.latest(build(&store)).unwrap();
    let named = image.manifest().chains.iter().map(|chain| chain.members.len()).sum::<usize>();
    assert!(files(&dir.join("threads")).len() <= named + 4, "what the stopped life left is pruned");
}
