//! What a life can and can't do with a store.

mod scene;

use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_store::*;
use scene::*;
use std::fs;

/// On the disk where temporary files go, not in memory as in the other tests.
fn disk() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn every_image_of_a_long_life_is_what_the_world_was() {
    let scratch = disk();
    let dir = scratch.path().join("store");
    let mut store = create(scratch.path(), &dir).unwrap();
    store.set_max_deltas(3);
    let generation = store.claim_generation(None).unwrap();
    for n in 1..=30 {
        assert_eq!(commit_next(&mut store, generation).unwrap().sequence, seq(n));
        let image = store.latest(build(&store)).unwrap();
        check(&store, &image).unwrap();
        assert!(image.manifest().chains.iter().all(|chain| chain.members.len() <= 4), "chains stay short");
        if n % 7 == 0 {
            store.mark_released(image.output_end() - 3).unwrap();
            store.prune().unwrap();
        }
    }
    drop(store);
    assert_eq!(check_store(&dir).unwrap(), 30);
}

#[test]
fn an_image_is_thawed_any_number_of_times_and_each_life_has_a_higher_generation() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 3);
    for life in 2..22 {
        let (store, generation, from) = go_on(&dir).unwrap();
        assert_eq!((generation, from), (Generation::new(life), 3));
        check(&store, &store.latest(build(&store)).unwrap()).unwrap();
    }
    let (mut store, generation, _) = go_on(&dir).unwrap();
    assert_eq!(commit_next(&mut store, generation).unwrap().sequence, seq(4));
    drop(store);
    assert_eq!(check_store(&dir).unwrap(), 4);
}

#[test]
fn a_store_is_not_opened_while_a_life_runs_but_can_be_looked_at() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 2);
    let (_life, ..) = go_on(&dir).unwrap();
    let refused = Store::open(&dir).unwrap_err();
    assert!(
        matches!(refused, StoreError::InUse { pid: Some(pid), .. } if pid == std::process::id()),
        "{refused}"
    );
    assert!(refused.to_string().contains("stop that life"), "{refused}");
    let mut looking = Store::open_read_only(&dir).unwrap();
    check(&looking, &looking.latest(build(&looking)).unwrap()).unwrap();
    assert!(matches!(looking.claim_generation(None), Err(StoreError::Misuse(_))));
    assert!(matches!(looking.prune(), Err(StoreError::Misuse(Misuse::ReadOnly))));
}

#[test]
fn an_image_with_a_successor_is_refused() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 3);
    let mut store = Store::open(&dir).unwrap();
    let build = build(&store);
    let old = store.latest(build).unwrap();
    for refused in [store.load_sequence(seq(2), build), store.go_back_to(seq(1), build)] {
        let refused = refused.unwrap_err();
        assert!(
            matches!(refused, StoreError::HasSuccessor { successor, .. } if successor == seq(3)),
            "{refused}"
        );
    }
    assert!(matches!(store.load_sequence(seq(9), build), Err(StoreError::NoSuchImage { .. })));
    assert_eq!(store.load_sequence(seq(3), build).unwrap().sequence(), seq(3));
    let generation = store.claim_generation(Some(&old)).unwrap();
    commit_next(&mut store, generation).unwrap();
    drop(store);
    let mut store = Store::open(&dir).unwrap();
    let refused = store.claim_generation(Some(&old)).unwrap_err();
    assert!(matches!(refused, StoreError::HasSuccessor { .. }), "{refused}");
}

#[test]
fn another_build_is_refused_and_told_what_to_run() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 1);
    let store = Store::open(&dir).unwrap();
    let other = BuildId::from_bytes([1; 32]);
    let refused = store.latest(other).unwrap_err();
    let message = refused.to_string();
    let executable = store.executable().path;
    for part in [&other.to_string(), &build(&store).to_string(), executable.to_str().unwrap()] {
        assert!(message.contains(part), "{message} lacks {part}");
    }
    assert_eq!(fs::read(executable).unwrap(), fs::read(scratch.path().join("program")).unwrap());
}

#[test]
fn another_worlds_image_is_refused() {
    let (mine, other) = (disk(), disk());
    let dir = store_with(mine.path(), 1);
    let other_dir = other.path().join("store");
    let (program, build) = program(other.path());
    let mut store = Store::create(&other_dir, WorldId::from_bytes([1; 16]), &program, build).unwrap();
    let generation = store.claim_generation(None).unwrap();
    commit_next(&mut store, generation).unwrap();
    drop(store);
    for file in
        ["world/0000000000000001", "threads/0000000000000001/0000000000000001.0000000000000001", "released"]
    {
        let copied = disk();
        copy(&dir, copied.path());
        fs::copy(other_dir.join(file), copied.path().join(file)).unwrap();
        let refused = check_store_quietly(copied.path()).unwrap_err();
        assert!(matches!(refused, StoreError::ForeignWorld { .. }), "{file}: {refused}");
    }
}

fn check_store_quietly(dir: &std::path::Path) -> Result<()> {
    let store = Store::open(dir)?;
    check(&store, &store.latest(build(&store))?)
}

#[test]
fn an_intact_image_under_anothers_name_is_refused() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 3);
    let thread = dir.join("threads/0000000000000000");
    let images = files(&thread);
    fs::copy(&images[0], &images[1]).unwrap();
    let refused = check_store_quietly(&dir).unwrap_err();
    assert!(matches!(refused, StoreError::Replaced { field: "sequence", .. }), "{refused}");
}

/// Its world, build, thread, sequence and base are right: only the life is another.
#[test]
fn an_intact_image_of_another_life_is_refused() {
    let (one, two) = (disk(), disk());
    let dir = store_with(one.path(), 3);
    let other_dir = two.path().join("store");
    copy(&dir, &other_dir);
    let (mut store, generation, _) = go_on(&dir).unwrap();
    commit_next(&mut store, generation).unwrap();
    drop(store);
    // A life that came to nothing, and one that made the same image.
    drop(go_on(&other_dir).unwrap());
    let (mut store, other, _) = go_on(&other_dir).unwrap();
    assert_ne!(other, generation);
    commit_next(&mut store, other).unwrap();
    drop(store);
    let last = |dir: &std::path::Path| files(&dir.join("threads/0000000000000000")).pop().unwrap();
    fs::copy(last(&other_dir), last(&dir)).unwrap();
    let refused = check_store_quietly(&dir).unwrap_err();
    assert!(matches!(refused, StoreError::Replaced { field: "generation", .. }), "{refused}");
}

#[test]
fn of_two_lives_that_race_one_goes_on_and_the_other_is_told_to_stop() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 2);
    // What a filesystem without working locks would allow: both open.
    let open = || {
        let store = Store::open(&dir).unwrap();
        fs::remove_file(dir.join("lock")).unwrap();
        store
    };
    let (mut first, mut second) = (open(), open());
    let image = first.latest(build(&first)).unwrap();
    let generation = first.claim_generation(Some(&image)).unwrap();
    let refused = second.claim_generation(Some(&image)).unwrap_err();
    assert!(matches!(refused, StoreError::GenerationTaken { .. }), "{refused}");

    let mut third = open();
    let later = third.claim_generation(Some(&image)).unwrap();
    let refused = commit_next(&mut first, generation).unwrap_err();
    assert!(matches!(refused, StoreError::Superseded { by, .. } if by == later), "{refused}");
    commit_next(&mut third, later).unwrap();

    // The early word does not come (its file was pruned, say): the name of the image decides all the same.
    fs::remove_file(dir.join("generation/0000000000000003")).unwrap();
    let refused = commit_next(&mut first, generation).unwrap_err();
    assert!(matches!(refused, StoreError::Lost { .. }), "{refused}");
    drop((first, second, third));
    assert_eq!(check_store(&dir).unwrap(), 3);
}

#[test]
fn a_damaged_latest_image_is_gone_back_from_only_when_asked_and_nothing_is_lost() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 3);
    let latest = dir.join("world/0000000000000003");
    let whole = fs::read(&latest).unwrap();
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    fs::write(&latest, &damaged).unwrap();

    let mut store = Store::open(&dir).unwrap();
    let build = build(&store);
    let refused = store.latest(build).unwrap_err();
    assert!(
        matches!(refused, StoreError::LatestDamaged { go_back: Some(n), .. } if n == seq(2)),
        "{refused}"
    );
    assert!(refused.to_string().contains("--image 2"), "{refused}");
    let image = store.go_back_to(seq(2), build).unwrap();
    check(&store, &image).unwrap();
    let generation = store.claim_generation(Some(&image)).unwrap();
    assert_eq!(store.next_sequence().unwrap(), seq(4));
    commit_from(&mut store, generation, 2).unwrap();
    let image = store.latest(build).unwrap();
    assert_eq!(image.manifest().previous, Some(seq(2)));
    assert_eq!(read(&store, &image).unwrap().control, b"control 4");
    store.prune().unwrap();
    assert_eq!(fs::read(&latest).unwrap(), damaged, "what is damaged stays, for somebody may repair it");
    fs::write(&latest, &whole).unwrap();
    let report = store.verify().unwrap();
    assert!(report.damage.is_empty(), "all that the repaired image names is still there: {report:?}");
}

#[test]
fn a_damaged_page_of_the_latest_image_allows_going_back_too() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 3);
    let image = files(&dir.join("threads"))
        .into_iter()
        .rfind(|path| path.to_str().unwrap().ends_with(".0000000000000003"));
    let path = image.unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[500] ^= 1;
    fs::write(&path, bytes).unwrap();
    let store = Store::open(&dir).unwrap();
    let image = store.latest(build(&store)).unwrap();
    let refused = read(&store, &image).unwrap_err();
    let message = refused.to_string();
    assert!(message.contains(path.to_str().unwrap()) && message.contains("page at 0x"), "{message}");
    assert_eq!(store.check_world(seq(3)).len(), 1);
    let image = store.go_back_to(seq(2), build(&store)).unwrap();
    check(&store, &image).unwrap();
}

#[test]
fn a_commit_that_is_dropped_never_was() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 1);
    let before = files(&dir);
    let (mut store, generation, _) = go_on(&dir).unwrap();
    let next = store.next_sequence().unwrap();
    let mut commit = store.begin(generation, next).unwrap();
    let mut image = commit.thread_image(ThreadId::new(0), Some(seq(1))).unwrap();
    image.page(VirtAddr::new(0x1000), &[1; PAGE_SIZE]).unwrap();
    image.finish().unwrap();
    let mut image = commit.thread_image(ThreadId::new(1), None).unwrap();
    image.page(VirtAddr::new(0x1000), &[1; PAGE_SIZE]).unwrap();
    drop(image);
    drop(commit);
    let after: Vec<_> =
        files(&dir).into_iter().filter(|path| !path.ends_with("generation/0000000000000002")).collect();
    assert_eq!(after, before);
    commit_next(&mut store, generation).unwrap();
}

#[test]
fn calls_that_do_not_fit_are_refused_with_their_numbers() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 2);
    let mut store = Store::open(&dir).unwrap();
    assert!(matches!(store.next_sequence(), Err(StoreError::Misuse(Misuse::NoGeneration))));
    let refused = store.claim_generation(None).unwrap_err();
    assert!(matches!(refused, StoreError::Misuse(Misuse::HasImages { .. })), "{refused}");
    let image = store.latest(build(&store)).unwrap();
    let generation = store.claim_generation(Some(&image)).unwrap();
    let wrong = [(generation, seq(4)), (generation, seq(2)), (Generation::new(1), seq(3))];
    for (generation, sequence) in wrong {
        assert!(matches!(store.begin(generation, sequence), Err(StoreError::Misuse(_))));
    }
    assert!(matches!(
        store.mark_released(15),
        Err(StoreError::Misuse(Misuse::ReleasedBeyondCommit { committed: 14, .. }))
    ));
    let thread = ThreadId::new(0);
    let mut commit = store.begin(generation, seq(3)).unwrap();
    let refused = commit.thread(thread, Some(seq(1)), []).unwrap_err();
    assert!(matches!(refused, StoreError::Misuse(Misuse::WrongBase { .. })), "{refused}");
    commit.thread(thread, None, []).unwrap();
    assert!(matches!(commit.thread(thread, None, []), Err(StoreError::Misuse(Misuse::ThreadTwice { .. }))));
    assert!(matches!(commit.forget(thread), Err(StoreError::Misuse(Misuse::ThreadTwice { .. }))));
    let unordered = [(VirtAddr::new(0x2000), &[0; PAGE_SIZE]), (VirtAddr::new(0x1000), &[0; PAGE_SIZE])];
    assert!(matches!(commit.thread(ThreadId::new(1), None, unordered), Err(StoreError::Page { .. })));
}

#[test]
fn output_leaves_after_its_commit_and_at_most_its_last_part_leaves_twice() {
    let scratch = disk();
    let dir = scratch.path().join("store");
    let mut store = create(scratch.path(), &dir).unwrap();
    let generation = store.claim_generation(None).unwrap();
    commit_next(&mut store, generation).unwrap();
    assert!(store.mark_released(8).is_err(), "nobody sees what is not committed");
    store.mark_released(7).unwrap();
    commit_next(&mut store, generation).unwrap();
    store.mark_released(10).unwrap();
    let refused = store.mark_released(9).unwrap_err().to_string();
    assert!(refused.contains("can't come back"), "{refused}");
    commit_next(&mut store, generation).unwrap();
    drop(store);
    let (mut store, generation, _) = go_on(&dir).unwrap();
    let image = store.latest(build(&store)).unwrap();
    let left = store.unreleased(&image).unwrap();
    assert_eq!((left.offset, left.bytes), (10, b"e 2\nline 3\n".to_vec()));
    store.mark_released(image.output_end()).unwrap();
    assert!(store.unreleased(&image).unwrap().bytes.is_empty());
    for _ in 0..2 {
        commit_next(&mut store, generation).unwrap();
        store.mark_released(store.latest(build(&store)).unwrap().output_end()).unwrap();
    }
    commit_next(&mut store, generation).unwrap();
    store.prune().unwrap();
    assert_eq!(
        files(&dir.join("output")).len(),
        2,
        "chunks that left are pruned with the images that named them"
    );
    drop(store);
    assert_eq!(check_store(&dir).unwrap(), 6);
}

#[test]
fn going_back_sets_the_mark_back_to_the_end_of_that_image() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 2);
    let (mut store, generation, _) = go_on(&dir).unwrap();
    commit_next(&mut store, generation).unwrap();
    store.mark_released(21).unwrap();
    drop(store);
    fs::write(dir.join("world/0000000000000003"), "").unwrap();
    let mut store = Store::open(&dir).unwrap();
    assert_eq!(store.released().unwrap(), 21);
    let image = store.go_back_to(seq(2), build(&store)).unwrap();
    assert!(store.unreleased(&image).unwrap().bytes.is_empty());
    store.claim_generation(Some(&image)).unwrap();
    assert_eq!(store.released().unwrap(), 14);
}

#[test]
fn a_mark_that_is_older_than_its_image_is_not_believed() {
    let scratch = disk();
    let dir = scratch.path().join("store");
    let mut store = create(scratch.path(), &dir).unwrap();
    let generation = store.claim_generation(None).unwrap();
    commit_next(&mut store, generation).unwrap();
    let old_mark = fs::read(dir.join("released")).unwrap();
    store.mark_released(7).unwrap();
    commit_next(&mut store, generation).unwrap();
    drop(store);
    fs::write(dir.join("released"), old_mark).unwrap(); // as a power cut leaves it
    let (mut store, generation, _) = go_on(&dir).unwrap();
    assert_eq!(store.unreleased(&store.latest(build(&store)).unwrap()).unwrap().offset, 7);
    commit_next(&mut store, generation).unwrap();
    drop(store);
    assert_eq!(check_store(&dir).unwrap(), 3);
}

#[test]
fn pruning_keeps_the_last_two_images_whole_and_little_else() {
    let scratch = disk();
    let dir = store_with(scratch.path(), 12);
    let (mut store, generation, _) = go_on(&dir).unwrap();
    store.set_max_deltas(1);
    for _ in 0..6 {
        commit_next(&mut store, generation).unwrap();
    }
    store.mark_released(store.latest(build(&store)).unwrap().output_end()).unwrap();
    commit_next(&mut store, generation).unwrap();
    let before = files(&dir).len();
    let pruned = store.prune().unwrap();
    assert_eq!(store.sequences().unwrap(), [seq(18), seq(19)]);
    assert_eq!(files(&dir).len(), before - pruned.images - pruned.files - 1, "one generation went too");
    assert!(files(&dir.join("threads")).len() <= 12, "{:?}", files(&dir));
    for n in [18, 19] {
        assert!(store.check_world(seq(n)).is_empty());
    }
    assert_eq!(store.prune().unwrap(), Pruned::default());
    drop(store);
    assert_eq!(check_store(&dir).unwrap(), 19);
}

#[test]
fn all_pages_are_asked_for_when_the_deltas_are_many_or_large() {
    let scratch = disk();
    let dir = scratch.path().join("store");
    let mut store = create(scratch.path(), &dir).unwrap();
    let generation = store.claim_generation(None).unwrap();
    let (small, large) = (ThreadId::new(1), ThreadId::new(2));
    let mut asked = Vec::new();
    for n in 1..=40 {
        let mut commit = store.begin(generation, seq(n)).unwrap();
        for (thread, changed) in [(small, 1), (large, 60)] {
            let is_full = commit.wants_full(thread);
            if is_full {
                asked.push((thread.get(), n));
            }
            let base = if is_full { None } else { commit.base_of(thread) };
            let pages = (0..if is_full { 100 } else { changed }).map(|page| VirtAddr::new(page * PAGE_SIZE));
            commit.thread(thread, base, pages.map(|address| (address, &[1; PAGE_SIZE]))).unwrap();
        }
        commit.finish(Vec::new()).unwrap();
    }
    asked.sort();
    // 16 deltas; 7 deltas of 60 pages are more than 400 pages.
    assert_eq!(asked, [(1, 1), (1, 18), (1, 35), (2, 1), (2, 9), (2, 17), (2, 25), (2, 33)]);
}

#[test]
fn ten_thousand_threads_are_one_commit() {
    let scratch = disk();
    let dir = scratch.path().join("store");
    let mut store = create(scratch.path(), &dir).unwrap();
    let generation = store.claim_generation(None).unwrap();
    let mut commit = store.begin(generation, seq(1)).unwrap();
    for n in 0..10_000u64 {
        let page = [n as u8; PAGE_SIZE];
        commit.thread(ThreadId::new(n), None, [(VirtAddr::new(n as usize * 0x10_0000), &page)]).unwrap();
    }
    assert_eq!(commit.finish(Vec::new()).unwrap().files, 10_001);
    drop(store);
    let store = Store::open(&dir).unwrap();
    let image = store.latest(build(&store)).unwrap();
    for n in 0..10_000u64 {
        let mut pages = store.pages(&image, ThreadId::new(n)).unwrap();
        assert_eq!(pages.page_count(), usize::from(n as u8 != 0));
        if let Some((address, page)) = pages.next().unwrap() {
            assert_eq!((address.as_usize(), page), (n as usize * 0x10_0000, &[n as u8; PAGE_SIZE]));
        }
    }
}
