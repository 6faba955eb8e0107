//! The address space over processes.

use super::bare::Way;
use super::stage::{PAGES, Worker};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_space::process::{Config, Filling, Member, Space};

/// Makes the space whose members the processes will be.
pub fn space(way: Way) -> Space {
    let filling = match way {
        Way::Guard => Filling::Kernel,
        Way::Continue => Filling::Trap,
        Way::DontNeed => Filling::KernelTrusting,
    };
    Space::create(Config { pages: PageCount::new(PAGES), filling, at: None }).expect("a space")
}

/// One member.
pub struct Ours {
    member: Member<'static>,
    region: PageRange,
    since_tick: u32,
}

impl Ours {
    pub fn new(space: &'static Space) -> Self {
        let member = space.join().expect("a member");
        Self { member, region: space.region(), since_tick: 0 }
    }

    fn part(&self, first: usize, pages: usize) -> PageRange {
        let start = self.region.start().as_usize() + first * PAGE_SIZE;
        PageRange::new(VirtAddr::new(start), PageCount::new(pages))
    }
}

impl Worker for Ours {
    fn map(&mut self, first: usize, pages: usize) {
        self.member.map_at(self.part(first, pages), Protection::ReadWrite).expect("map");
    }
    fn unmap(&mut self, first: usize, pages: usize) {
        self.member.unmap(self.part(first, pages)).expect("unmap");
        // Upkeep of Refcache, about every 10 ms.
        self.since_tick += 1;
        if self.since_tick == 2000 {
            self.since_tick = 0;
            self.member.tick();
        }
    }
    fn poll(&self) {
        self.member.poll();
    }
    fn at(&self, page: usize) -> *mut u64 {
        self.part(page, 1).start().as_ptr()
    }
    fn shootdowns(&self) -> u64 {
        self.member.tally().asked
    }
}
