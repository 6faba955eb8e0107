//! What of the machine's memory is in use: by what the machine has left, and by what the processes are said to have.
//!
//! ```text
//!   MemAvailable    free pages, and what could be freed at once (caches)
//!   + pagesets      free pages that each processor keeps at hand: up to an eighth of the memory, and in no line of /proc/meminfo
//!   ─────────────
//!   what is left    read until it stands still, for the kernel frees some of it later than it is told to
//! ```
//!
//! Without the second line memory that was freed an instant ago (by the subject before, say) and is used again is seen to go neither
//! way: a million threads were seen to take 37 bytes each. A processor's lists grow to gigabytes (`high_max` in `/proc/zoneinfo`; since
//! Linux 6.7) and shrink when they like to.
//!
//! What else runs on the machine is in it too. So beside it stands what is *counted*: the processes' private memory and page tables,
//! and the blocks of the files in memory. The kernel's own books of files and processes are in the first alone.

use crate::measure::Samples;
use peregrine_base::PAGE_SIZE;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// What is used at one time, in bytes from any zero: only differences are of use.
#[derive(Clone, Copy, Default)]
pub struct Used {
    /// What the machine has less of.
    pub machine: f64,
    /// What is counted.
    pub counted: f64,
}

impl Used {
    /// What is used by process `of`, its children and the files in memory that it holds, when the machine has come to rest; `pause`
    /// is how the caller waits between two looks.
    pub fn at_rest(of: u32, pause: impl Fn()) -> Self {
        /// Looks that are the same but for so many bytes.
        const ALIKE: f64 = 512.0 * 1024.0;
        const IN_A_ROW: usize = 5;
        /// After so many looks the machine is as it is.
        const MOST: usize = 100;
        let mut looks: Vec<f64> = Vec::new();
        for _ in 0..MOST {
            looks.push(left());
            let last = &looks[looks.len().saturating_sub(IN_A_ROW)..];
            let (low, high) = last.iter().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
            if last.len() == IN_A_ROW && high - low <= ALIKE {
                break;
            }
            pause();
        }
        let mut last = Samples::default();
        looks.iter().rev().take(IN_A_ROW).for_each(|v| last.push(*v));
        Self { machine: -last.median(), counted: counted(of) }
    }
}

/// How much more is used for one more, by least squares through `(how many, bytes)`: what was there before the first, and what changes on
/// the machine once, is not in it.
pub fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (x, y) = points.iter().fold((0.0, 0.0), |(x, y), p| (x + p.0 / n, y + p.1 / n));
    let (above, below) = points.iter().fold((0.0, 0.0), |(a, b), p| {
        let dx = p.0 - x;
        (a + dx * (p.1 - y), b + dx * dx)
    });
    above / below
}

/// `MemAvailable` and what the processors keep at hand, in bytes.
fn left() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("meminfo");
    let available = text.lines().find_map(|l| l.strip_prefix("MemAvailable:")).and_then(first_number);
    // Kernels of long ago have no such file, and keep little at hand.
    let zones = std::fs::read_to_string("/proc/zoneinfo").unwrap_or_default();
    available.expect("MemAvailable") * 1024.0 + pages_at_hand(&zones) * PAGE_SIZE as f64
}

/// Pages in the lists of all processors, of all zones, by the text of `/proc/zoneinfo`.
fn pages_at_hand(zones: &str) -> f64 {
    zones.lines().filter_map(|l| l.trim_start().strip_prefix("count:")).filter_map(first_number).sum()
}

/// What process `of` and its children have for themselves, page tables included, and what the memory files have that `of` holds,
/// in bytes.
fn counted(of: u32) -> f64 {
    let mut files: Vec<(u64, u64)> = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{of}/fd")).expect("descriptors").flatten() {
        let is_memory =
            std::fs::read_link(entry.path()).is_ok_and(|l| l.to_string_lossy().starts_with("/memfd:"));
        if is_memory && let Ok(file) = std::fs::metadata(entry.path()) {
            files.push((file.ino(), file.blocks() * 512));
        }
    }
    files.sort_unstable();
    files.dedup();
    let children = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    let processes = children.split_whitespace().filter_map(|p| p.parse().ok()).chain([of]);
    let private = processes.map(|pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let of = |name: &str| {
            status.lines().find_map(|l| l.strip_prefix(name)).and_then(first_number).unwrap_or(0.0)
        };
        (of("RssAnon:") + of("VmPTE:")) * 1024.0
    });
    files.iter().map(|f| f.1 as f64).sum::<f64>() + private.sum::<f64>()
}

fn first_number(text: &str) -> Option<f64> {
    text.split_whitespace().next()?.parse().ok()
}

/// How long the machine is given between two looks where nothing else is asked for.
pub const PAUSE: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;
    use peregrine_base::PageCount;
    use peregrine_sys::memfd::{self, Pages};
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_slope_leaves_out_what_was_there_before() {
        let points = [(0.0, 5000.0), (10.0, 5320.0), (20.0, 5640.0), (40.0, 6280.0)];
        assert!((slope(&points) - 32.0).abs() < 1e-9);
        // One step that has nothing to do with them is spread, not taken for theirs whole.
        let stepped = [(0.0, 0.0), (1.0, 110.0), (2.0, 120.0), (3.0, 130.0)];
        assert!(slope(&stepped) < 43.4);
    }

    #[test]
    fn pages_at_hand_are_those_of_all_zones_and_processors() {
        let zones = "Node 0, zone    DMA32\n  pages free     707164\n      nr_free_pages 707164\n  pagesets\n    cpu: 0\n\
                     \x20             count:    100\n              high:     1444\n    cpu: 1\n              count:    42\n\
                     Node 0, zone   Normal\n    cpu: 0\n              count:    8601\n              high_max: 337141\n";
        assert_eq!(pages_at_hand(zones), 8743.0);
    }

    #[test]
    fn what_a_process_has_and_what_its_files_have_is_counted() {
        const BYTES: usize = 64 << 20;
        let here = || counted(std::process::id());
        let near = |seen: f64, bytes: usize| (seen - bytes as f64).abs() < (BYTES / 4) as f64;
        let before = here();
        let bytes = vec![1u8; BYTES];
        let written = here();
        assert!(near(written - before, BYTES), "{before} {written}");
        let file = memfd::create(c"counted", PageCount::for_bytes(BYTES), Pages::Base).expect("a file");
        let whole = File::from(file);
        whole.write_all_at(&bytes, 0).expect("room");
        let again = whole.try_clone().expect("a descriptor");
        let filed = here();
        assert!(near(filed - written, BYTES), "{written} {filed}");
        drop((whole, again));
        let after = here();
        assert!(near(after - written, 0), "{written} {after}");
    }
}
