//! The entries of a directory, on a [`Tree`] in its inode body.
//!
//! An entry's key is its cookie: 47 bits of the name's hash, then a 16-bit index among names with the
//! same hash. It never changes while the entry exists, so a readdir goes on at the right place
//! whatever others insert and delete. Cookies are above 2 (0 is the start, 1 and 2 are "." and "..") and
//! below 2^63 (off_t is signed).
//!
//! The hash is SipHash-2-4 under the volume's own seed: without a secret, anyone who may create files
//! could choose names that collide and make every lookup walk them.
//!
//! Not for: "." and "..", link counts, times, permission: `fs` does that around one call here.

use std::ops::ControlFlow;

use siphasher::sip::SipHasher24;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::tree::{Cost, MAX_VALUE_BYTES, NodeRead, NodeStore, Tree, TreeError, TreeKind};
use crate::types::{InodeNo, VolumeId};

/// The longest name.
pub const MAX_NAME_BYTES: usize = 255;
/// Bits of a key below the hash.
const INDEX_BITS: u32 = 16;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const HASH_MASK: u64 = (1 << 47) - 1;

/// An entry's value; the name follows.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct EntryDisk {
    /*00*/ ino: U64,
    /*08*/ generation: U32,
    /// d_type of readdir(3).
    /*0c*/
    kind: u8,
}
const ENTRY_BYTES: usize = 13;
const _: () = assert!(size_of::<EntryDisk>() == ENTRY_BYTES);
const _: () = assert!(ENTRY_BYTES + MAX_NAME_BYTES <= MAX_VALUE_BYTES);

/// What an entry points at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirTarget {
    pub ino: InodeNo,
    pub generation: u32,
    /// d_type of readdir(3): the file type bits of `mode` shifted right by 12.
    pub kind: u8,
}

/// A found entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirEntryRef {
    /// Key and cookie.
    pub key: u64,
    pub target: DirTarget,
}

/// An entry in a listing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirItem<'a> {
    pub key: u64,
    pub target: DirTarget,
    pub name: &'a [u8],
}

/// What became of an insert.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Inserted {
    /// The new entry's key.
    Done(u64),
    /// The name is there; nothing changed.
    Exists(DirEntryRef),
    /// 65536 names share this hash; nothing changed. To the user: no space.
    Full,
}

/// A name's hash; tests put a worse one in its place.
pub type NameHash = fn(seed: &[u8; 16], name: &[u8]) -> u64;

/// A directory's entries. The root's bytes are passed to each call, as to a [`Tree`].
#[derive(Clone, Copy, Debug)]
pub struct DirTree {
    tree: Tree,
    seed: [u8; 16],
    hash: NameHash,
}

/// SipHash-2-4 under the volume's seed.
pub fn name_hash(seed: &[u8; 16], name: &[u8]) -> u64 {
    SipHasher24::new_with_key(seed).hash(name)
}

impl DirTree {
    pub fn new(volume: VolumeId, owner: InodeNo, seed: [u8; 16]) -> Self {
        Self::with_hash(volume, owner, seed, name_hash)
    }

    #[doc(hidden)]
    pub fn with_hash(volume: VolumeId, owner: InodeNo, seed: [u8; 16], hash: NameHash) -> Self {
        DirTree { tree: Tree { volume, owner, kind: TreeKind::Directory }, seed, hash }
    }

    /// The tree below, for fsck and for freeing a directory.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What to reserve for one [`DirTree::insert`]; the level is [`Tree::root_level`].
    pub const fn insert_cost(level: u8) -> Cost {
        Cost::inserts(level, 1)
    }

    /// What to reserve for one [`DirTree::remove`]: no allocation.
    pub const fn remove_cost(level: u8) -> Cost {
        Cost::removes(level, 1)
    }

    /// What to reserve for one [`DirTree::set_target`]: no allocation, at most one block besides the body.
    pub const fn set_target_cost(level: u8) -> Cost {
        Cost { allocations: 0, touched: if level > 0 { 1 } else { 0 } }
    }

    /// An empty directory, whatever was in `root`.
    pub fn init(&self, root: &mut [u8]) -> Result<(), TreeError> {
        self.tree.init_root(root)
    }

    /// The first key that a name can have.
    pub fn first_key(&self, name: &[u8]) -> u64 {
        // Hash 0 would give the cookies that are taken.
        ((self.hash)(&self.seed, name) & HASH_MASK).max(1) << INDEX_BITS
    }

    pub fn lookup<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        name: &[u8],
    ) -> Result<Option<DirEntryRef>, S::Error> {
        Ok(self.find(store, root, name)?.0)
    }

    pub fn insert<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        name: &[u8],
        target: DirTarget,
    ) -> Result<Inserted, S::Error> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            let value = name.len() as u64;
            return Err(TreeError::Range { owner: self.tree.owner, what: "length of a name", value }.into());
        }
        let key = match self.find(store, root, name)? {
            (Some(entry), _) => return Ok(Inserted::Exists(entry)),
            (None, None) => return Ok(Inserted::Full),
            (None, Some(key)) => key,
        };
        let mut value = encode(target).as_bytes().to_vec();
        value.extend_from_slice(name);
        self.tree.insert(store, root, key, &value)?;
        Ok(Inserted::Done(key))
    }

    /// Takes a name out and says what it pointed at.
    pub fn remove<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        name: &[u8],
    ) -> Result<Option<DirEntryRef>, S::Error> {
        let Some(entry) = self.find(store, root, name)?.0 else { return Ok(None) };
        self.tree.remove(store, root, entry.key)?;
        Ok(Some(entry))
    }

    /// Makes an existing name point elsewhere, for a rename over it, and says what it pointed at.
    /// `None`: no such name, nothing changed.
    pub fn set_target<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        name: &[u8],
        target: DirTarget,
    ) -> Result<Option<DirEntryRef>, S::Error> {
        let Some(entry) = self.find(store, root, name)?.0 else { return Ok(None) };
        let mut value = encode(target).as_bytes().to_vec();
        value.extend_from_slice(name);
        self.tree.replace(store, root, entry.key, &value)?;
        Ok(Some(entry))
    }

    /// Shows the entries after a cookie (0: all) until `show` breaks off.
    pub fn list<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        after: u64,
        mut show: impl FnMut(DirItem<'_>) -> ControlFlow<()>,
    ) -> Result<(), S::Error> {
        let Some(from) = after.checked_add(1) else { return Ok(()) };
        let mut bad = None;
        self.tree.scan(store, root, from, |key, value| match self.parse(key, value) {
            Ok(item) => show(item),
            Err(e) => {
                bad = Some(e);
                ControlFlow::Break(())
            }
        })?;
        bad.map_or(Ok(()), |e| Err(e.into()))
    }

    /// The entry with this key and its name: for paths in tools.
    pub fn by_key<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
    ) -> Result<Option<(DirTarget, Vec<u8>)>, S::Error> {
        let Some(value) = self.tree.get(store, root, key)? else { return Ok(None) };
        let item = self.parse(key, &value)?;
        Ok(Some((item.target, item.name.to_vec())))
    }

    pub fn is_empty<S: NodeRead + ?Sized>(&self, store: &mut S, root: &[u8]) -> Result<bool, S::Error> {
        self.tree.is_empty(store, root)
    }

    /// An entry's value, checked. Fsck uses it on what [`Tree::walk`] shows.
    pub fn parse<'a>(&self, key: u64, value: &'a [u8]) -> Result<DirItem<'a>, TreeError> {
        let bad = |what| TreeError::Value { owner: self.tree.owner, key, what };
        let (disk, name) = EntryDisk::ref_from_prefix(value).map_err(|_| bad("shorter than an entry"))?;
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(bad("impossible length of a name"));
        }
        if name.contains(&b'/') || name.contains(&0) || name == b"." || name == b".." {
            return Err(bad("impossible name"));
        }
        if disk.ino.get() == 0 {
            return Err(bad("points at inode 0"));
        }
        let target =
            DirTarget { ino: InodeNo(disk.ino.get()), generation: disk.generation.get(), kind: disk.kind };
        Ok(DirItem { key, target, name })
    }

    /// Is this the key that the name can have? For fsck; lookups of other entries would fail silently.
    pub fn key_fits(&self, item: &DirItem<'_>) -> bool {
        item.key & !INDEX_MASK == self.first_key(item.name)
    }

    /// The entry with this name, and the lowest free key for it. Walks the run of equal hashes.
    fn find<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        name: &[u8],
    ) -> Result<(Option<DirEntryRef>, Option<u64>), S::Error> {
        let first = self.first_key(name);
        let mut free = Some(first);
        let mut result = Ok(None);
        self.tree.scan(store, root, first, |key, value| {
            if key & !INDEX_MASK != first {
                return ControlFlow::Break(());
            }
            if free == Some(key) {
                free = (key & INDEX_MASK != INDEX_MASK).then(|| key + 1);
            }
            match self.parse(key, value) {
                Ok(item) if item.name == name => {
                    result = Ok(Some(DirEntryRef { key, target: item.target }));
                    ControlFlow::Break(())
                }
                Ok(_) => ControlFlow::Continue(()),
                Err(e) => {
                    result = Err(e);
                    ControlFlow::Break(())
                }
            }
        })?;
        Ok((result?, free))
    }
}

fn encode(target: DirTarget) -> EntryDisk {
    EntryDisk { ino: U64::new(target.ino.0), generation: U32::new(target.generation), kind: target.kind }
}
