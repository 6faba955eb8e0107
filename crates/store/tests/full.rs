//! Disks that are full, too small, read-only or somebody else's, for real.
//!
//! `faults.rs` fails every step by decree; here the kernel says no. Each scene needs something that not every machine
//! grants (a mount namespace, another user), so each runs in a child that is this same test started again inside it; where
//! it can't be had the test prints what is missing and shows nothing.

mod scene;

use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_store::*;
use peregrine_sys::rustix::process::geteuid;
use scene::*;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::{env, fs};

const DIR: &str = "PEREGRINE_TEST_DIR";

/// In the child: the directory to play in.
fn child() -> Option<PathBuf> {
    env::var_os(DIR).map(PathBuf::from)
}

/// Runs this test again in `dir`, by way of `wrapper`, which gets the command as its arguments.
fn again(test: &str, dir: &Path, wrapper: &[&str]) -> Option<Output> {
    let me = env::current_exe().unwrap();
    let mut command = Command::new(wrapper.first().map_or(me.as_os_str(), |program| program.as_ref()));
    if !wrapper.is_empty() {
        command.args(&wrapper[1..]).arg(&me);
    }
    command.args(["--exact", test, "--nocapture"]).env(DIR, dir).stdin(Stdio::null()).output().ok()
}

fn expect_pass(output: &Output) {
    let text = [String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)].concat();
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    println!("{text}");
}

/// A commit of `pages` pages of one new thread.
fn commit_large(store: &mut Store, generation: Generation, pages: usize) -> Result<Committed> {
    let sequence = store.next_sequence()?;
    let mut commit = store.begin(generation, sequence)?;
    let thread = ThreadId::new(1000 + sequence.get());
    commit.thread(thread, None, (0..pages).map(|n| (VirtAddr::new(n * PAGE_SIZE), &[1; PAGE_SIZE])))?;
    commit.finish(Vec::new())
}

#[test]
fn a_file_beyond_the_size_limit_is_refused_and_nothing_is_lost() {
    if let Some(dir) = child() {
        let (mut store, generation, _) = go_on(&dir).unwrap();
        let before = files(&dir);
        let refused = commit_large(&mut store, generation, 300).unwrap_err().to_string();
        println!("{refused}");
        assert!(refused.contains("ulimit -f"), "{refused}");
        assert_eq!(files(&dir), before);
        commit_next(&mut store, generation).unwrap();
        drop(store);
        assert_eq!(check_store(&dir).unwrap(), 3);
        return;
    }
    let scratch = scratch();
    let dir = store_with(scratch.path(), 2);
    // The limit is 128 or 256 KiB, as the shell counts; its signal is ignored, so the write fails instead.
    let limit = ["sh", "-c", "trap '' XFSZ; ulimit -f 256; exec \"$@\"", "sh"];
    expect_pass(&again("a_file_beyond_the_size_limit_is_refused_and_nothing_is_lost", &dir, &limit).unwrap());
}

#[test]
fn a_full_disk_is_named_and_pruning_makes_room() {
    if let Some(dir) = child() {
        return on_a_small_disk(&dir.join("store"));
    }
    let scratch = scratch();
    let dir = scratch.path().to_str().unwrap();
    let unshare: &[&str] = if geteuid().is_root() { &["unshare", "-m"] } else { &["unshare", "-r", "-m"] };
    let script = format!("mount -t tmpfs -o size=512k none '{dir}' && exec \"$@\"");
    let probe = [unshare, &["sh", "-c", &script, "sh", "true"]].concat();
    if !Command::new(probe[0]).args(&probe[1..]).output().is_ok_and(|output| output.status.success()) {
        println!(
            "SKIPPED: needs a mount namespace (`{}`) to have a small disk; not shown here",
            unshare.join(" ")
        );
        return;
    }
    let wrapper = [unshare, &["sh", "-c", &script, "sh"]].concat();
    expect_pass(&again("a_full_disk_is_named_and_pruning_makes_room", scratch.path(), &wrapper).unwrap());
}

fn on_a_small_disk(dir: &Path) {
    let outside = scratch();
    let mut store = create(outside.path(), dir).unwrap();
    let generation = store.claim_generation(None).unwrap();
    store.set_max_deltas(0);
    let mut images = 0;
    let refused = loop {
        match commit_next(&mut store, generation) {
            Ok(committed) => images = committed.sequence.get(),
            Err(refused) => break refused,
        }
        store.mark_released(store.latest(build(&store)).unwrap().output_end()).unwrap();
    };
    println!("after {images} images: {refused}");
    assert!(
        refused.is_full()
            && matches!(&refused, StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull)
    );
    assert!(refused.to_string().contains("`prune`"), "{refused}");
    assert!(files(&dir.join("tmp")).is_empty());
    check(&store, &store.latest(build(&store)).unwrap()).unwrap();
    assert!(store.prune().unwrap().images > 0);
    assert_eq!(commit_next(&mut store, generation).unwrap().sequence, seq(images + 1));
    drop(store);
    assert_eq!(check_store(dir).unwrap(), images + 1);

    // Full to the last byte before the creation is done.
    let refused = create(outside.path(), &dir.with_file_name("other")).map(|_| ());
    fs::write(dir.with_file_name("filler"), vec![1; 512 << 10]).unwrap_err();
    let refused = refused.and(create(outside.path(), &dir.with_file_name("third")).map(|_| ())).unwrap_err();
    assert!(refused.to_string().contains("free some space"), "{refused}");

    let remount =
        Command::new("mount").args(["-o", "remount,ro"]).arg(dir.parent().unwrap()).output().unwrap();
    assert!(remount.status.success(), "{remount:?}");
    let refused = Store::open(dir).unwrap_err().to_string();
    println!("{refused}");
    assert!(refused.contains("the filesystem is read-only"), "{refused}");
    let store = Store::open_read_only(dir).unwrap();
    check(&store, &store.latest(build(&store)).unwrap()).unwrap();
}

#[test]
fn somebody_elses_store_is_refused_with_its_reason() {
    if let Some(dir) = child() {
        let refused = Store::open(&dir).unwrap_err().to_string();
        println!("{refused}");
        assert!(refused.contains("must belong to this user"), "{refused}");
        return;
    }
    let scratch = scratch();
    let dir = store_with(scratch.path(), 1);
    if !geteuid().is_root() {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o000)).unwrap();
        let refused = Store::open(&dir).unwrap_err().to_string();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        assert!(refused.contains("must belong to this user"), "{refused}");
        return;
    }
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let me = scratch.path().join("me");
    fs::copy(env::current_exe().unwrap(), &me).unwrap();
    fs::set_permissions(&me, fs::Permissions::from_mode(0o755)).unwrap();
    let nobody = 65534;
    let output = Command::new(&me)
        .args(["--exact", "somebody_elses_store_is_refused_with_its_reason", "--nocapture"])
        .env(DIR, &dir)
        .stdin(Stdio::null())
        .uid(nobody)
        .gid(nobody)
        .output();
    match output {
        Ok(output) => expect_pass(&output),
        Err(error) => {
            println!("SKIPPED: needs to run a copy of itself as user {nobody}: {error}; not shown here")
        }
    }
}
