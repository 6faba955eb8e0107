//! What a World is made of, seen from outside: processes of one thread, and files that only their user can open.

use peregrine::{Builder, node_count, spawn};
use peregrine_sys::process::CpuSet;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// Process ids of the children of `pid`.
fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|p| p.parse().unwrap()).collect()
}

/// Descriptors of `pid` that are a World's memory, by name, with the rights that their file gives.
fn memory(pid: u32) -> Vec<(String, u32)> {
    let all = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    all.filter_map(|e| {
        let path = e.unwrap().path();
        let name = std::fs::read_link(&path).ok()?.display().to_string();
        name.starts_with("/memfd:peregrine")
            .then(|| (name, std::fs::metadata(&path).unwrap().mode() & 0o7777))
    })
    .collect()
}

#[peregrine::test(nodes = 3)]
fn nodes_have_one_thread_and_the_worlds_memory_is_its_users_alone() {
    let supervisor = std::os::unix::process::parent_id();
    let nodes: Vec<u32> = (0..node_count())
        .map(|n| Builder::new().node(n).spawn(|_: ()| std::process::id(), ()).unwrap().join().unwrap())
        .collect();
    let all = children(supervisor);
    assert_eq!(all.len(), 4, "a zygote and three nodes");
    for pid in &all {
        assert_eq!(std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(), 1, "process {pid}");
    }
    assert!(nodes.iter().all(|pid| all.contains(pid)), "{nodes:?} of {all:?}");
    for pid in [vec![supervisor], all].concat() {
        let files = memory(pid);
        assert!(files.iter().any(|(name, _)| name.contains("slots")), "{pid}: {files:?}");
        assert!(files.iter().all(|(_, mode)| *mode == 0o600), "{pid}: {files:?}");
    }
}

/// A thread that goes on from disk has the numbers of files that it had open in another life, and closes them in this one.
#[peregrine::test(nodes = 4)]
fn what_the_runtime_has_open_is_out_of_the_way_of_programs() {
    let mut of_nodes = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = entry.unwrap().path();
        let number: u32 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let Ok(what) = std::fs::read_link(&path) else { continue };
        let what = what.display().to_string();
        let is_a_nodes = what.contains("userfaultfd") || what.ends_with("/pagemap");
        assert!(number >= 500 || !(is_a_nodes || what.contains("peregrine")), "{number} is {what}");
        of_nodes += u32::from(is_a_nodes);
    }
    // None where the kernel tracks no writes: then all memory is compared.
    assert!(of_nodes == 0 || of_nodes >= node_count(), "{of_nodes}");
}

/// Who leaves nothing to do behind takes its processor along to a node that sleeps, by binding it there while it wakes.
#[peregrine::test(nodes = 2)]
fn a_node_may_run_wherever_it_might_before_it_was_moved_to() {
    let all = CpuSet::current().unwrap();
    for k in 0..200 {
        // Longer than a node looks around before it sleeps.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_micros(300) {}
        peregrine::migrate_to(k % 2).unwrap();
        assert_eq!(CpuSet::current().unwrap(), all, "move {k}");
    }
    // Nor is one that was bound by its thread, to whatever it may be, ever bound to anything else.
    peregrine::migrate_to(1).unwrap();
    let last = CpuSet::one(all.iter().last().unwrap()).unwrap();
    last.bind().unwrap();
    for _ in 0..20 {
        peregrine::migrate_to(0).unwrap();
        assert_eq!(CpuSet::current().unwrap(), all);
        peregrine::sleep(Duration::from_millis(1));
        peregrine::migrate_to(1).unwrap();
        assert_eq!(CpuSet::current().unwrap(), last);
    }
}

#[peregrine::test(nodes = 2)]
fn nodes_share_one_table_of_descriptors() {
    let file = std::fs::File::open("/proc/self/maps").unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    let seen = |fd: i32| std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok();
    let there: Vec<bool> =
        (0..2).map(|n| Builder::new().node(n).spawn(seen, fd).unwrap().join().unwrap()).collect();
    assert_eq!(there, [true, true]);
    drop(file);
    assert!(!spawn(seen, fd).join().unwrap());
}

#[test]
fn the_runtime_is_out_of_the_way_also_where_few_files_may_be_open() {
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "ulimit -Sn 256 && ulimit -Hn 4096 && exec \"$0\" \"$@\""]);
    shell.arg(std::env::current_exe().unwrap());
    let o =
        shell.args(["--exact", "what_the_runtime_has_open_is_out_of_the_way_of_programs"]).output().unwrap();
    assert!(o.status.success(), "{o:?}");
    assert!(String::from_utf8_lossy(&o.stdout).contains("1 passed"), "{o:?}");
}
