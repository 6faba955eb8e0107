//! What mappings are made of.

/// What is behind a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Backing {
    /// Private zero pages.
    Anonymous,
    /// A memfd, shared.
    Memfd,
    /// A file, shared: writes reach it.
    File,
    /// A file, private: writes stay in this process.
    PrivateFile,
}

impl Backing {
    /// Whether others may see and make changes: through an alias, another process or the file.
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Memfd | Self::File)
    }
}

/// The size of the pages a mapping is to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum PageKind {
    /// 4 KiB.
    #[default]
    Base,
    /// Huge where the kernel finds one (`MADV_HUGEPAGE`, aligned to 2 MiB); otherwise 4 KiB.
    TransparentHuge,
    /// 2 MiB from the pool (`MAP_HUGETLB`), or an error.
    Huge2M,
}
