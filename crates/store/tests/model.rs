//! Random histories against a naive model: a map from image to world.
//!
//! The store sees commits, lost commits, deaths, prunes and marks in any order; the model is [`scene::World`].

mod scene;

use peregrine_store::*;
use proptest::prelude::*;
use scene::*;

#[derive(Clone, Copy, Debug)]
enum Event {
    Commit,
    LoseCommit,
    Die,
    Prune,
    Release(u8),
    MaxDeltas(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => Just(Event::Commit),
        1 => Just(Event::LoseCommit),
        2 => Just(Event::Die),
        1 => Just(Event::Prune),
        2 => any::<u8>().prop_map(Event::Release),
        1 => (0usize..4).prop_map(Event::MaxDeltas),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_store_gives_back_the_world_of_its_last_commit(events in prop::collection::vec(event(), 1..25)) {
        let scratch = scratch();
        let dir = store_with(scratch.path(), 0);
        let (mut store, mut generation, _) = go_on(&dir).unwrap();
        let (mut images, mut released) = (0, 0);
        for event in events {
            match event {
                Event::Commit => {
                    images += 1;
                    prop_assert_eq!(commit_next(&mut store, generation).unwrap().sequence, seq(images));
                }
                Event::LoseCommit => {
                    let next = store.next_sequence().unwrap();
                    let mut commit = store.begin(generation, next).unwrap();
                    commit.thread(ThreadId::new(0), None, []).unwrap();
                    commit.output(b"never seen");
                }
                Event::Die => {
                    drop(store);
                    let (next, its_generation, from) = go_on(&dir).unwrap();
                    prop_assert!(its_generation > generation);
                    prop_assert_eq!(from, images);
                    (store, generation) = (next, its_generation);
                }
                Event::Prune => drop(store.prune().unwrap()),
                Event::Release(part) => {
                    let committed = World::at(images).output.len() as u64;
                    let given = committed * u64::from(part) / 255;
                    prop_assert_eq!(store.mark_released(given).is_ok(), given >= released);
                    released = released.max(given);
                }
                Event::MaxDeltas(deltas) => store.set_max_deltas(deltas),
            }
            prop_assert_eq!(store.released().unwrap(), released);
            if images > 0 {
                let image = store.latest(build(&store)).unwrap();
                prop_assert_eq!(image.sequence(), seq(images));
                check(&store, &image).unwrap();
            }
        }
        drop(store);
        prop_assert_eq!(check_store(&dir).unwrap(), images);
    }
}
