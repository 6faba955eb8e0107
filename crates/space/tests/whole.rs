//! A region of processes that is full.

use peregrine_space::process::{Config, Filling, Space};
use peregrine_space::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};

#[test]
fn a_region_can_be_mapped_page_by_page_to_its_end_and_unmapped() {
    const PAGES: usize = 65_536;
    let pages = PageCount::new(PAGES);
    let space = Space::create(Config { pages, filling: Filling::Kernel, at: None }).unwrap();
    let mut member = space.join().unwrap();
    let whole = member.map_anywhere(pages, Protection::ReadWrite).unwrap();
    member.unmap(whole).unwrap();
    let page =
        |i: usize| PageRange::new(VirtAddr::new(whole.start().as_usize() + i * PAGE_SIZE), PageCount::new(1));
    for round in 0..2 {
        for i in 0..PAGES {
            let mapped = member.map_at(page(i), Protection::ReadWrite);
            assert!(mapped.is_ok(), "page {i} in round {round}: {:?}", mapped.err());
        }
        assert_eq!(member.bytes(page(PAGES - 1)).load_u64(0), Ok(0), "a frame of another's");
        member.bytes(page(PAGES - 1)).store_u64(0, 7).unwrap();
        member.unmap(whole).unwrap();
    }
}
