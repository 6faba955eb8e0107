//! Descriptors after a rollback.
//!
//! Files are the kernel's: no image holds them, and a rollback takes threads back to a time when the numbers that they know stood for other
//! files. So with each image it is noted what the shared table has, and a rollback sets right what has changed since:
//!
//! ```text
//!   number       in the image    now        after the rollback
//!   since opened     –           a file     closed: nobody knows of it any more
//!   since closed     a file      –          held: whoever uses it is told EBADF, and it is given to nobody else
//!   another's        a file      another    held; the other file is closed
//! ```
//!
//! Numbers alone are imaged (`open_numbers`): a resume holds them all.
//!
//! A thread that goes on reading or writing gets an error then, never another's file, and no pipe is kept open by an end that nobody has.
//! What was read or written since is not taken back. Numbers from [`PROGRAMS_BELOW`] on are the runtime's, and left alone, as are the connections of nodes to domains.
//!
use super::Supervisor;
use crate::control::{NodeShared, imaged, node};
use crate::zygote::ZygoteError;
use peregrine_base::sync::{AtomicU32, Ordering};
use peregrine_sys::descriptors::{OpenFile, PROGRAMS_BELOW, open_files};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, RawFd};

/// Words of the table of numbers in an image.
const NUMBER_WORDS: usize = PROGRAMS_BELOW as usize / 64 + 1;

/// What numbers stand for.
pub(super) type Files = BTreeMap<RawFd, OpenFile>;

/// The shared table, and what the last image knows of it.
#[derive(Debug)]
pub(super) struct Descriptors {
    /// `/proc/PID/fd` of the zygote; none where there is no `/proc` to read. Then nothing is set right.
    table: Option<File>,
    imaged: Files,
    /// What was open before the program began.
    inherited: Files,
    /// Handed over to be closed; some may be slow.
    closing: Files,
}

impl Descriptors {
    /// The table of process `zygote`.
    pub fn of(zygote: i32) -> Self {
        let table = File::open(format!("/proc/{zygote}/fd")).ok();
        let mut me = Self { table, imaged: Files::new(), inherited: Files::new(), closing: Files::new() };
        me.inherited = me.all().unwrap_or_default();
        me
    }

    /// What is open in the table.
    fn all(&mut self) -> Option<Files> {
        let open: Files = open_files(self.table.as_ref()?.as_fd()).ok()?.into_iter().collect();
        self.closing.retain(|number, file| open.get(number) == Some(file));
        Some(open)
    }

    /// What is open for programs, while all of the first `nodes` nodes are paused or dead.
    fn programs(&mut self, nodes: usize) -> Option<Files> {
        let mut open = self.all()?;
        open.retain(|number, _| !self.closing.contains_key(number));
        for i in 0..nodes as u32 {
            let n = node(i);
            for number in listed(n) {
                open.remove(&number);
            }
        }
        Some(open)
    }

    /// Notes that `numbers` are being closed.
    fn note_closing(&mut self, numbers: impl Iterator<Item = RawFd>) {
        let Some(open) = self.all() else { return };
        self.closing.extend(numbers.filter_map(|number| Some((number, *open.get(&number)?))));
    }
}

/// What a node says that it has open.
fn listed(n: &'static NodeShared) -> impl Iterator<Item = RawFd> {
    let numbers = |words: &'static [AtomicU32]| words.iter().map(|word| word.load(Ordering::Relaxed));
    // Connections are listed without gaps.
    let all = numbers(&n.fds).chain(numbers(&n.call_fds).take_while(|word| *word != 0));
    all.filter_map(|word| Some(word.checked_sub(1)? as RawFd))
}

impl Supervisor {
    /// What is open for programs. While all nodes are paused.
    pub(super) fn open_files(&mut self) -> Files {
        self.descriptors.programs(self.nodes.len()).unwrap_or_default()
    }

    /// Notes what the image's threads have open. While all nodes are paused.
    pub(super) fn note_files(&mut self) {
        let open = self.open_files();
        let mut words = [0u64; NUMBER_WORDS];
        for (&number, file) in &open {
            if self.descriptors.inherited.get(&number) != Some(file) {
                words[number as usize / 64] |= 1 << (number % 64);
            }
        }
        for (word, now) in imaged().open_numbers.iter().zip(words) {
            word.store(now, Ordering::Relaxed);
        }
        self.descriptors.imaged = open;
    }

    /// Holds the numbers that the threads of an image from disk had open: their files were another machine's, or another time's.
    pub(super) fn hold_numbers(&self) -> Result<(), ZygoteError> {
        let bits = |word: u64| (0..64).filter(move |bit| word >> bit & 1 != 0);
        let words = imaged().open_numbers.iter().map(|word| word.load(Ordering::Relaxed));
        let numbers: Vec<RawFd> = words
            .enumerate()
            .flat_map(|(i, word)| bits(word).map(move |bit| i as RawFd * 64 + bit))
            .collect();
        self.zygote.hold(&numbers)
    }

    /// Notes what has been opened since `before`, while no thread ran: it belongs to a domain's set-up, which no rollback takes back.
    pub(super) fn keep_files_opened_since(&mut self, before: &Files) {
        let now = self.open_files();
        let new = now.into_iter().filter(|(number, file)| before.get(number) != Some(file));
        self.descriptors.imaged.extend(new);
    }

    /// Has what dead node `i` had open closed.
    pub(super) fn close_those_of(&mut self, i: usize) -> Result<(), ZygoteError> {
        let n = node(i as u32);
        self.descriptors.note_closing(listed(n));
        self.zygote.close_those_of(i as u32)
    }

    /// Sets the table right, as far as that can be done, for threads that have gone back to the image. While all nodes are paused or dead.
    pub(super) fn set_files_right(&mut self) -> Result<(), ZygoteError> {
        let Some(now) = self.descriptors.programs(self.nodes.len()) else { return Ok(()) };
        let imaged = &self.descriptors.imaged;
        let new: Vec<RawFd> = now.keys().filter(|number| !imaged.contains_key(number)).copied().collect();
        let lost: Vec<RawFd> =
            imaged.iter().filter(|(number, file)| now.get(number) != Some(file)).map(|(n, _)| *n).collect();
        if !new.is_empty() {
            self.descriptors.note_closing(new.iter().copied());
            self.zygote.close_these(&new)?;
        }
        if !lost.is_empty() {
            self.zygote.hold(&lost)?;
            // The next rollback to this image finds them as they are.
            let held = self.open_files();
            self.descriptors.imaged.extend(lost.iter().filter_map(|n| Some((*n, *held.get(n)?))));
        }
        Ok(())
    }
}
