//! Mappings: holding one is having the memory.
//!
//! ```text
//!                 ┌──────────── object (memfd or file) ────────────┐
//!                 └──▲──────────────────────────▲──────────────────┘
//!   Mapping ─────────┘   Mapping.alias(Read) ───┘      MAP2: the same frames at a second address
//! ```

mod discards;
mod error;
mod kind;
mod private;

use crate::volatile::Volatile;
use discards::Discards;
pub use error::MapError;
pub(crate) use error::remedy_for;
use kind::HUGE_PAGES;
pub use kind::{Backing, PageKind};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_sys::mem::{self, Advice, MapOptions, Placement, Source};
use peregrine_sys::memfd;
use peregrine_sys::raw::Errno;
pub use private::PrivateMemory;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// The file behind shared mappings.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) fd: OwnedFd,
    kind: ObjectKind,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ObjectKind {
    Memfd,
    File,
}

/// An owned range of this process's address space; dropping it unmaps it.
///
/// Others may change the memory (a pager, an alias, another process, the trap handler of a [`Region`](crate::Region)), so it
/// is reached through [`Mapping::bytes`] only. For memory that is provably nobody else's, see [`PrivateMemory`].
///
/// ```
/// use peregrine_vm::{Mapping, PageCount};
///
/// let memory = Mapping::memfd(PageCount::new(16))?;
/// memory.populate(memory.pages(0, 4)?, true)?; // four pages faulted in with one call
/// memory.bytes().write(4090, b"across two pages")?;
/// memory.evict(memory.range())?; // out of this page table; the memfd keeps them
/// let mut back = [0; 16];
/// memory.bytes().read(4090, &mut back)?;
/// assert_eq!(&back, b"across two pages");
/// memory.discard(memory.pages(1, 1)?)?; // and this one is given back for good
/// assert_eq!(memory.bytes().load_u8(4096)?, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Mapping {
    range: PageRange,
    /// What was mapped, when alignment made that more than `range`.
    whole: PageRange,
    backing: Backing,
    page_kind: PageKind,
    access: Protection,
    object: Option<Arc<Object>>,
    /// Where in the object the mapping begins.
    object_offset: PageCount,
    discards: Discards,
}

fn map_error(call: &'static str, pages: PageCount) -> impl FnOnce(Errno) -> MapError {
    move |errno| MapError::Kernel { call, pages, errno, remedy: remedy_for(errno) }
}

impl Mapping {
    /// Private zero pages, readable and writable.
    ///
    /// # Errors
    /// [`MapError::Kernel`]: no room, or `vm.max_map_count` mappings already.
    pub fn anonymous(pages: PageCount) -> Result<Self, MapError> {
        Self::anonymous_of(pages, PageKind::Base)
    }

    /// Private zero pages of a given kind.
    ///
    /// # Errors
    /// [`MapError::Kernel`]; for [`PageKind::Huge2M`] also an empty pool (sysctl `vm.nr_hugepages`). [`MapError::Pool`].
    pub fn anonymous_of(pages: PageCount, kind: PageKind) -> Result<Self, MapError> {
        Self::make(pages, kind, Backing::Anonymous, None, PageCount::new(0), Protection::ReadWrite)
    }

    /// Address space without access or memory: `PROT_NONE`, nothing reserved. A [`Region`](crate::Region) over it opens
    /// parts of it by `protect`.
    ///
    /// # Errors
    /// [`MapError::Kernel`].
    pub fn reserve(pages: PageCount) -> Result<Self, MapError> {
        Self::make(pages, PageKind::Base, Backing::Anonymous, None, PageCount::new(0), Protection::None)
    }

    /// Zero pages with a name, so that they can be mapped again ([`Mapping::alias`]) and by other processes. Nobody can cut the
    /// memfd short under its mappings (`F_SEAL_SHRINK`).
    ///
    /// # Errors
    /// [`MapError::Kernel`].
    pub fn memfd(pages: PageCount) -> Result<Self, MapError> {
        Self::memfd_of(pages, PageKind::Base)
    }

    /// As [`Mapping::memfd`], with pages of a given kind.
    ///
    /// # Errors
    /// [`MapError::Kernel`], [`MapError::Pool`].
    pub fn memfd_of(pages: PageCount, kind: PageKind) -> Result<Self, MapError> {
        kind.check_size(pages, PageCount::new(0))?;
        let file_pages = if kind == PageKind::Huge2M { memfd::Pages::Huge2M } else { memfd::Pages::Base };
        let fd =
            memfd::create(c"peregrine-vm", pages, file_pages).map_err(map_error("memfd_create", pages))?;
        memfd::seal_shrink(&fd).map_err(map_error("fcntl(F_ADD_SEALS)", pages))?;
        let object = Arc::new(Object { fd, kind: ObjectKind::Memfd });
        Self::make(pages, kind, Backing::Memfd, Some(object), PageCount::new(0), Protection::ReadWrite)
    }

    /// A memfd that came from elsewhere (another process, a descriptor passed over a socket), `pages` pages from `offset`.
    ///
    /// # Errors
    /// [`MapError::Kernel`].
    pub fn from_memfd(fd: OwnedFd, offset: PageCount, pages: PageCount) -> Result<Self, MapError> {
        let object = Arc::new(Object { fd, kind: ObjectKind::Memfd });
        Self::make(pages, PageKind::Base, Backing::Memfd, Some(object), offset, Protection::ReadWrite)
    }

    /// Part of a file, shared: writes reach the file. Beyond its end, a touch raises SIGBUS.
    ///
    /// # Errors
    /// [`MapError::Kernel`]; EACCES: the file is not open for `access`.
    pub fn file(
        file: &File,
        offset: PageCount,
        pages: PageCount,
        access: Protection,
    ) -> Result<Self, MapError> {
        let object = Self::object_of(file, pages)?;
        Self::make(pages, PageKind::Base, Backing::File, Some(object), offset, access)
    }

    /// Part of a file, private: writes stay in this process.
    ///
    /// # Errors
    /// [`MapError::Kernel`].
    pub fn private_file(file: &File, offset: PageCount, pages: PageCount) -> Result<Self, MapError> {
        let object = Self::object_of(file, pages)?;
        Self::make(pages, PageKind::Base, Backing::PrivateFile, Some(object), offset, Protection::ReadWrite)
    }

    fn object_of(file: &File, pages: PageCount) -> Result<Arc<Object>, MapError> {
        let fd = file.as_fd().try_clone_to_owned().map_err(|e| MapError::Kernel {
            call: "dup",
            pages,
            errno: Errno(e.raw_os_error().unwrap_or(0)),
            remedy: "raise the limit of open files (ulimit -n)",
        })?;
        Ok(Arc::new(Object { fd, kind: ObjectKind::File }))
    }

    fn make(
        pages: PageCount,
        kind: PageKind,
        backing: Backing,
        object: Option<Arc<Object>>,
        object_offset: PageCount,
        access: Protection,
    ) -> Result<Self, MapError> {
        kind.check_size(pages, object_offset)?;
        let source = match (&object, backing) {
            (Some(o), Backing::PrivateFile) => Source::Private(o.fd.as_fd(), object_offset),
            (Some(o), _) => Source::Shared(o.fd.as_fd(), object_offset),
            (None, _) => Source::Anonymous,
        };
        let options = MapOptions {
            no_reserve: access == Protection::None,
            huge_2m: kind == PageKind::Huge2M && object.is_none(),
            ..MapOptions::default()
        };
        let fail = map_error("mmap", pages);
        let (range, whole) = if kind == PageKind::TransparentHuge {
            // Room for a start on a 2 MiB boundary, in which the mapping then takes its place.
            let room = PageCount::new(pages.get() + HUGE_PAGES);
            let reserve = MapOptions { no_reserve: true, ..MapOptions::default() };
            // SAFETY: a new mapping at a place of the kernel's choice.
            let whole = unsafe {
                mem::map(room, Protection::None, Source::Anonymous, Placement::Anywhere, reserve)
                    .map_err(map_error("mmap", room))?
            };
            let start = VirtAddr::new(whole.start().as_usize().next_multiple_of(HUGE_PAGES * PAGE_SIZE));
            // SAFETY: `start` and `pages` beyond it lie in `whole`, which was made just now and nobody has seen.
            match unsafe { mem::map(pages, access, source, Placement::Replace(start), options) } {
                Ok(range) => (range, whole),
                Err(e) => {
                    // SAFETY: made just now, and nobody has seen it.
                    let _ = unsafe { mem::unmap(whole) };
                    return Err(fail(e));
                }
            }
        } else {
            // SAFETY: a new mapping at a place of the kernel's choice.
            let range =
                unsafe { mem::map(pages, access, source, Placement::Anywhere, options).map_err(fail)? };
            (range, range)
        };
        let discards = Discards::none();
        let this = Self { range, whole, backing, page_kind: kind, access, object, object_offset, discards };
        if kind == PageKind::TransparentHuge {
            this.advise(range, Advice::HugePage)?;
        }
        Ok(this)
    }

    /// Where it is.
    pub const fn range(&self) -> PageRange {
        self.range
    }

    /// What is behind it.
    pub const fn backing(&self) -> Backing {
        self.backing
    }

    /// What pages it was asked to have.
    pub const fn page_kind(&self) -> PageKind {
        self.page_kind
    }

    /// The access it was mapped with; a region may have changed parts of it since.
    pub const fn access(&self) -> Protection {
        self.access
    }

    /// Where in its object (memfd or file) it begins.
    pub const fn object_offset(&self) -> PageCount {
        self.object_offset
    }

    /// The memfd or file behind it.
    pub fn object_fd(&self) -> Option<BorrowedFd<'_>> {
        self.object.as_ref().map(|o| o.fd.as_fd())
    }

    pub(crate) const fn discards(&self) -> &Discards {
        &self.discards
    }

    pub(crate) fn object(&self) -> Option<&Arc<Object>> {
        self.object.as_ref()
    }

    /// The bytes, copied in and out.
    pub const fn bytes(&self) -> Volatile<'_> {
        // SAFETY: the range is mapped until `self` is dropped, and this type never makes a reference to its bytes (S1).
        unsafe { Volatile::new(self.range) }
    }

    /// `count` pages from page `first` of this mapping on.
    ///
    /// # Errors
    /// [`MapError::Outside`].
    pub fn pages(&self, first: usize, count: usize) -> Result<PageRange, MapError> {
        let total = self.range.pages().get();
        if first <= total && count <= total - first {
            Ok(PageRange::new(
                VirtAddr::new(self.range.start().as_usize() + first * PAGE_SIZE),
                PageCount::new(count),
            ))
        } else {
            // What can be said of it: as far as there are addresses.
            let most = (usize::MAX - self.range.start().as_usize()) / PAGE_SIZE;
            Err(MapError::Outside {
                asked: PageRange::new(
                    self.range.start(),
                    PageCount::new(first.saturating_add(count).min(most)),
                ),
                range: self.range,
            })
        }
    }

    pub(crate) fn check_inside(&self, asked: PageRange) -> Result<(), MapError> {
        let inside = asked.start() >= self.range.start() && asked.end() <= self.range.end();
        if inside { Ok(()) } else { Err(MapError::Outside { asked, range: self.range }) }
    }

    /// MAP2: the same frames at a second address, with other rights.
    ///
    /// A protection on one does not hold on the other, and DIRTY on one does not see writes through the other.
    ///
    /// ```
    /// use peregrine_vm::{Mapping, PageCount, Protection};
    ///
    /// let memory = Mapping::memfd(PageCount::new(2))?;
    /// let readers = memory.alias(Protection::Read)?;
    /// memory.bytes().store_u64(4096, 7)?;
    /// assert_eq!(readers.bytes().load_u64(4096)?, 7);
    /// assert!(readers.shares_object_with(&memory));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`MapError::Private`]: anonymous memory. [`MapError::Kernel`].
    pub fn alias(&self, access: Protection) -> Result<Self, MapError> {
        self.alias_part(self.range, access)
    }

    /// As [`Mapping::alias`], for part of it.
    ///
    /// # Errors
    /// As [`Mapping::alias`]; [`MapError::Outside`], [`MapError::Pool`].
    pub fn alias_part(&self, part: PageRange, access: Protection) -> Result<Self, MapError> {
        self.check_inside(part)?;
        let object = match &self.object {
            Some(object) if self.backing.is_shared() => object.clone(),
            _ => return Err(MapError::Private { range: part }),
        };
        let first = (part.start().as_usize() - self.range.start().as_usize()) / PAGE_SIZE;
        let offset = PageCount::new(self.object_offset.get() + first);
        Self::make(part.pages(), self.page_kind, self.backing, Some(object), offset, access)
    }

    /// Whether two mappings show the same object.
    pub fn shares_object_with(&self, other: &Self) -> bool {
        match (&self.object, &other.object) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    fn advise(&self, part: PageRange, advice: Advice) -> Result<(), MapError> {
        self.check_inside(part)?;
        // SAFETY: the part lies in the range that `self` owns; callers below say what the advice does to contents.
        unsafe { mem::advise(part, advice) }.map_err(map_error("madvise", part.pages()))
    }

    /// Of an empty range, known advice answers `Ok`, unknown EINVAL.
    fn kernel_knows(&self, advice: Advice) -> bool {
        let none = PageRange::new(self.range.start(), PageCount::new(0));
        // SAFETY: an empty range.
        unsafe { mem::advise(none, advice) }.is_ok()
    }

    /// Faults `part` in now: for writing if `for_writing` (the pages are private, allocated and dirty), else for reading.
    ///
    /// # Errors
    /// [`MapError::Outside`]. [`MapError::Kernel`]; EFAULT: the part is protected or its pages trap; EINVAL: the mapping may not
    /// be written.
    // Into its caller: the first return after a system call costs a sixth of the smallest populate.
    #[inline(always)]
    pub fn populate(&self, part: PageRange, for_writing: bool) -> Result<(), MapError> {
        let advice = if for_writing { Advice::PopulateWrite } else { Advice::PopulateRead };
        if part.start() >= self.range.start() && part.end() <= self.range.end() {
            // SAFETY: the part lies in the range that `self` owns; populating changes no contents.
            match unsafe { mem::advise(part, advice) } {
                Ok(()) => Ok(()),
                Err(errno) => self.not_populated(part, for_writing, errno),
            }
        } else {
            self.check_inside(part)
        }
    }

    #[cold]
    fn not_populated(&self, part: PageRange, for_writing: bool, errno: Errno) -> Result<(), MapError> {
        let advice = if for_writing { Advice::PopulateWrite } else { Advice::PopulateRead };
        match errno == Errno::EINVAL && !self.kernel_knows(advice) {
            true => self.touch(part, for_writing),
            false => Err(map_error("madvise", part.pages())(errno)),
        }
    }

    /// What [`populate`](Self::populate) is on a kernel before 5.14: touches each page; a write adds zero in one step, so nobody's
    /// write is undone.
    fn touch(&self, part: PageRange, for_writing: bool) -> Result<(), MapError> {
        let needed = if for_writing { Protection::ReadWrite } else { Protection::Read };
        if self.access < needed {
            return Err(map_error("madvise", part.pages())(Errno::EINVAL));
        }
        let first = part.start().as_usize() - self.range.start().as_usize();
        for page in 0..part.pages().get() {
            let at = first + page * PAGE_SIZE;
            let touched = match for_writing {
                true => self.bytes().fetch_add_u64(at, 0),
                false => self.bytes().load_u64(at),
            };
            debug_assert!(touched.is_ok(), "checked above");
        }
        Ok(())
    }

    /// Drops `part` from this page table; the frames stay in the object and come back on the next touch.
    ///
    /// # Errors
    /// [`MapError::WouldLose`]: private memory. [`MapError::Kernel`]; EINVAL: part of a page of the pool ([`Mapping::grain`]).
    pub fn evict(&self, part: PageRange) -> Result<(), MapError> {
        if !self.backing.is_shared() {
            return Err(MapError::WouldLose { range: part });
        }
        self.advise(part, Advice::DontNeed)
    }

    /// Gives the frames of `part` back; what is read next is zeros (a memfd or anonymous memory) or the file's contents
    /// (a private file mapping). On a shared object the hole is seen through every alias.
    ///
    /// A tracker of this mapping reports all of its pages with its next take.
    ///
    /// # Errors
    /// [`MapError::Kernel`]; EOPNOTSUPP: the file system punches no holes.
    pub fn discard(&self, part: PageRange) -> Result<(), MapError> {
        self.check_inside(part)?;
        if !self.backing.is_shared() {
            return self.discards.during(|| self.advise(part, Advice::DontNeed));
        }
        let object = self.object.as_ref().ok_or(MapError::Private { range: part })?;
        let first = (part.start().as_usize() - self.range.start().as_usize()) / PAGE_SIZE;
        let at = PageCount::new(self.object_offset.get() + first);
        self.discards
            .during(|| memfd::punch(&object.fd, at, part.pages()))
            .map_err(map_error("fallocate(PUNCH_HOLE)", part.pages()))
    }

    /// Asks for huge pages in `part` now (`MADV_COLLAPSE`).
    ///
    /// # Errors
    /// [`MapError::Kernel`]: no huge page to be had, or the part is tracked (the kernel keeps small pages then).
    pub fn collapse(&self, part: PageRange) -> Result<(), MapError> {
        self.advise(part, Advice::Collapse)
    }

    /// Asks the kernel to write `part` to swap or file now (`MADV_PAGEOUT`).
    ///
    /// # Errors
    /// [`MapError::Kernel`].
    pub fn page_out(&self, part: PageRange) -> Result<(), MapError> {
        self.advise(part, Advice::PageOut)
    }

    /// Pages that the kernel protects and fills as one: 512 in the pool, else 1.
    #[inline]
    pub const fn grain(&self) -> PageCount {
        match self.page_kind {
            PageKind::Huge2M => PageCount::new(HUGE_PAGES),
            PageKind::Base | PageKind::TransparentHuge => PageCount::new(1),
        }
    }

    /// The grain that holds `addr`: its page, or its page of the pool.
    #[inline]
    pub(crate) const fn grain_of(&self, addr: VirtAddr) -> PageRange {
        // A power of two; a division would cost a trap more than all the rest of this.
        let bytes = self.grain().bytes();
        PageRange::new(VirtAddr::new(addr.as_usize() & !(bytes - 1)), self.grain())
    }

    /// Whether the mapping is of an ordinary file (which userfaultfd does not serve).
    pub(crate) fn is_plain_file(&self) -> bool {
        self.object.as_ref().is_some_and(|o| o.kind == ObjectKind::File)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped in `make` and is owned by `self`; borrows of its bytes end before `self`, and regions
        // and trackers keep it alive through an `Arc`.
        let _ = unsafe { mem::unmap(self.whole) };
    }
}
