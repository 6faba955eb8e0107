//! Children of a dead node that live on in its memory.
//!
//! ```text
//!   node ── posix_spawn ──▶ clone(VM | VFORK) ──▶ child: files, signals … ──▶ execve
//!     × killed                                     │ runs in the node's memory, in a static executable on a stack in its thread's slot
//! ```
//!
//! Between its start and its program such a child is not the node's any more once that is killed, and it writes to World memory that
//! a rollback is about to restore, or, if it waits (it opens files that it was told to), long after. So nothing is restored before it
//! is gone: nobody knows of it, for the thread that started it is taken back.
//!
//! Whether there is one is told by the node's address space, which goes with the last process in it; processes are looked
//! through only then. When the supervisor is killed the zygote looks through them, for the kernel kills the nodes and not such a child (it
//! clears `PR_SET_PDEATHSIG` in a copy).

use super::NodeProcess;
use peregrine_sys::elsewhere;
use peregrine_sys::process;
use peregrine_sys::signal::{self, number};
use peregrine_sys::timer::monotonic_ns;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// How long a killed process may take to leave its memory.
const PATIENCE_NS: u64 = 1_000_000_000;

/// A process's address space, which may live on when the process is dead.
#[derive(Debug)]
pub(super) struct Space(File);

impl Space {
    /// That of process `pid`; `None` where the kernel does not show it.
    pub(super) fn of(pid: i32) -> Option<Self> {
        // An open file of this kind keeps the space's record, not what is mapped; and it is the space's, whatever becomes of the process
        // (`maps` is the process's: there is nothing to read when that is dead).
        File::open(format!("/proc/{pid}/pagemap")).ok().map(Self)
    }

    /// Whether any process is in it.
    fn is_used(&self) -> bool {
        // One entry.
        matches!(self.0.read_at(&mut [0; 8], 0), Ok(8))
    }
}

/// Device and number of the file that the slots of this World lie in, as lists of mappings have them.
fn slots_in(maps: &str) -> Option<(&str, &str)> {
    let line = maps.lines().find(|l| l.contains("/memfd:peregrine-slots"))?;
    let mut words = line.split_whitespace().skip(3);
    Some((words.next()?, words.next()?))
}

/// Number of the parent, from `/proc/PID/stat`.
fn parent_in(stat: &str) -> Option<i32> {
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Kills every process but this one that runs this program, has this World's memory, and for which `is_one` holds, told its number and its
/// parent's; how many they were. Those that close the descriptors of dead nodes are none of them.
fn kill_those(is_one: impl Fn(i32, i32) -> bool) -> usize {
    let own = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let Some(slots) = slots_in(&own) else { return 0 };
    let program = fs::read_link("/proc/self/exe").ok();
    let me = process::pid();
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok()).filter(|&pid| pid != me);
    let found = numbers.filter(|pid| {
        let read = |what: &str| fs::read_to_string(format!("/proc/{pid}/{what}")).unwrap_or_default();
        fs::read_link(format!("/proc/{pid}/exe")).ok() == program
            && parent_in(&read("stat")).is_some_and(|parent| is_one(*pid, parent))
            && read("comm").trim_end().as_bytes() != elsewhere::NAME.to_bytes()
            && slots_in(&read("maps")) == Some(slots)
    });
    let mut count = 0;
    for pid in found {
        let _ = signal::kill(pid, number::KILL);
        count += 1;
    }
    count
}

/// Kills who still is in the memory of `dead`, a node that has been reaped. `ours` are the other nodes and the zygote.
pub(super) fn end_those_of(dead: &NodeProcess, ours: &[i32]) {
    let Some(space) = &dead.space else { return };
    let until = monotonic_ns() + PATIENCE_NS;
    while space.is_used() && monotonic_ns() < until {
        // It is nobody's child any more that this World knows.
        kill_those(|pid, parent| !ours.contains(&pid) && !ours.contains(&parent));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// In the zygote, when the supervisor has ended: kills all others that have this World's memory, nodes too.
pub(crate) fn end_all() {
    let until = monotonic_ns() + PATIENCE_NS;
    // Who was started while processes were looked through may not have been among them; who could start more is dead the second time.
    let mut in_vain = 0;
    while in_vain < 2 && monotonic_ns() < until {
        in_vain = if kill_those(|_, _| true) == 0 { in_vain + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_shows_of_processes_is_understood() {
        let maps = "5000-6000 r--p 00000000 fe:00 77 /bin/x\n\
                    7000-8000 rw-s 00000000 00:01 1234                       /memfd:peregrine-slots (deleted)\n";
        assert_eq!(slots_in(maps), Some(("00:01", "1234")));
        assert_eq!(slots_in("5000-6000 r--p 00000000 fe:00 77 /bin/x\n"), None);
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        assert_eq!(parent_in(&stat), Some(peregrine_sys::process::parent_pid()));
        assert_eq!(parent_in("12 (a ) b) S 7 12 12"), Some(7));
    }

    #[test]
    fn a_space_is_used_until_its_last_process_has_gone() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let space = Space::of(child.id() as i32).unwrap();
        assert!(space.is_used());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!space.is_used());
    }
}
