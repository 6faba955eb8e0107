//! A member in a process of its own that does what it is told, one order at a time.

use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_base::{PageRange, Protection, VirtAddr};
use peregrine_space::process::{Ground, SIGNAL, Seat};
use peregrine_sys::process::{ForkFlags, Forked, exit_now, fork_with, wait_for};
use peregrine_sys::signal::{self, number};
use peregrine_sys::{io, other, timer};

/// What a puppet can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Order {
    /// Open a range for reading and writing: address, pages.
    Open = 1,
    /// Store a word: address, value.
    Store,
    /// Load a word: address.
    Load,
    /// Block the shootdown signal, against the rules.
    BlockSignal,
    /// Let it through again.
    UnblockSignal,
    /// Look at requests once.
    Poll,
    /// Look at requests until the next order comes.
    PollOn,
    /// Sleep in the kernel until a signal comes.
    Sleep,
    /// Note what was written: address, pages.
    NoteWritten,
}

/// Where orders and answers lie: in the ground's pool.
#[repr(C)]
pub struct Strings {
    order: AtomicU64,
    arguments: [AtomicU64; 2],
    asked: AtomicU64,
    answered: AtomicU64,
    answer: AtomicU64,
}

/// The far end.
pub struct Puppet {
    pub pid: i32,
    strings: *const Strings,
}

impl Puppet {
    /// Forks a member that sits at `index`.
    pub fn new(ground: &Ground, index: usize) -> Self {
        let strings: *const Strings = ground.pool().start().as_ptr();
        let strings = strings.wrapping_add(index);
        // SAFETY: zeroed shared memory of atomics.
        let s = unsafe { &*strings };
        // Whoever danced here before is gone.
        s.asked.store(0, Ordering::Relaxed);
        s.answered.store(0, Ordering::Relaxed);
        // SAFETY: the tests' processes have one thread.
        match unsafe { fork_with(ForkFlags::default()) }.expect("fork") {
            Forked::Child => {
                peregrine_sys::process::die_with_parent();
                // SAFETY: zeroed shared memory of atomics.
                dance(ground, index, unsafe { &*strings })
            }
            Forked::Parent(pid) => {
                let this = Self { pid, strings };
                this.wait();
                this
            }
        }
    }

    fn strings(&self) -> &Strings {
        // SAFETY: as in `new`.
        unsafe { &*self.strings }
    }

    /// Gives an order without waiting for the answer.
    pub fn tell(&self, order: Order, a: usize, b: u64) {
        let s = self.strings();
        s.order.store(order as u64, Ordering::Relaxed);
        s.arguments[0].store(a as u64, Ordering::Relaxed);
        s.arguments[1].store(b, Ordering::Relaxed);
        s.asked.fetch_add(1, Ordering::Release);
    }

    /// Waits for the answer to the last order.
    pub fn wait(&self) -> u64 {
        let s = self.strings();
        let wanted = s.asked.load(Ordering::Relaxed) + 1;
        let deadline = timer::monotonic_ns() + 20_000_000_000;
        while s.answered.load(Ordering::Acquire) != wanted {
            assert!(timer::monotonic_ns() < deadline, "the puppet does not answer");
            let dead = other::stat(self.pid as u32).is_none_or(|s| s.condition == other::Condition::Dead);
            if dead && s.answered.load(Ordering::Acquire) != wanted {
                panic!(
                    "the puppet died: {:?} order {:?} arg {:x?}",
                    wait_for(self.pid),
                    s.order,
                    s.arguments
                );
            }
            io::yield_now();
        }
        s.answer.load(Ordering::Relaxed)
    }

    /// An order and its answer.
    pub fn does(&self, order: Order, a: usize, b: u64) -> u64 {
        self.tell(order, a, b);
        self.wait()
    }

    /// Stops it and waits until it stands still.
    pub fn stop(&self) {
        signal::kill(self.pid, number::STOP).expect("alive");
        while other::stat(self.pid as u32).map(|s| s.condition) != Some(other::Condition::Stopped) {
            io::yield_now();
        }
    }

    /// Waits until it sleeps in the kernel.
    pub fn until_asleep(&self) {
        let deadline = timer::monotonic_ns() + 20_000_000_000;
        while other::stat(self.pid as u32).map(|s| s.condition) != Some(other::Condition::Sleeping) {
            assert!(timer::monotonic_ns() < deadline, "the puppet never sleeps");
            io::yield_now();
        }
    }

    pub fn go_on(&self) {
        signal::kill(self.pid, number::CONT).expect("alive");
    }

    /// Kills it, and leaves it as a zombie if `reap` is false.
    pub fn kill(&self, reap: bool) {
        let _ = signal::kill(self.pid, number::KILL);
        if reap {
            let _ = wait_for(self.pid);
        }
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        self.kill(true);
    }
}

fn dance(ground: &Ground, index: usize, s: &Strings) -> ! {
    let seat: Box<Seat> = ground.join(index).expect("a seat");
    loop {
        let done = s.answered.fetch_add(1, Ordering::Release);
        while s.asked.load(Ordering::Acquire) == done {
            io::yield_now();
        }
        let a = s.arguments[0].load(Ordering::Relaxed) as usize;
        let b = s.arguments[1].load(Ordering::Relaxed);
        let word = VirtAddr::new(a).as_ptr::<u64>();
        let pages = || PageRange::covering(VirtAddr::new(a), b as usize * peregrine_base::PAGE_SIZE);
        let answer = match s.order.load(Ordering::Relaxed) {
            o if o == Order::Open as u64 => u64::from(seat.open(pages(), Protection::ReadWrite).is_err()),
            o if o == Order::Store as u64 => {
                // SAFETY: mapped in this process, or it traps and the process dies, as the test wants (S1).
                unsafe { word.write_volatile(b) };
                0
            }
            // SAFETY: as above.
            o if o == Order::Load as u64 => unsafe { word.read_volatile() },
            o if o == Order::BlockSignal as u64 => signal::set_mask(signal::bit(SIGNAL)),
            o if o == Order::UnblockSignal as u64 => signal::set_mask(0),
            o if o == Order::Poll as u64 => {
                seat.poll();
                0
            }
            o if o == Order::PollOn as u64 => {
                while s.asked.load(Ordering::Acquire) == done + 1 {
                    seat.poll();
                }
                0
            }
            o if o == Order::Sleep as u64 => {
                std::thread::park_timeout(std::time::Duration::from_secs(30));
                0
            }
            o if o == Order::NoteWritten as u64 => u64::from(seat.note_written(pages()).is_err()),
            _ => exit_now(4),
        };
        s.answer.store(answer, Ordering::Relaxed);
    }
}
