//! Every structure of an image, decoded by the library and told in a line; and encoded again, to the same bytes.

use std::sync::Arc;

use lunfs::fs::dirtree::DirTree;
use lunfs::fs::extents::ExtentTree;
use lunfs::layout::cluster::{ClusterHeader, ClusterMap};
use lunfs::layout::demand::{DoorbellRecord, RequestBlock};
use lunfs::layout::fields::Field;
use lunfs::layout::inode::{Form, InodeDisk, Timestamp};
use lunfs::layout::journal::{Commit, Descriptor, JournalHeader};
use lunfs::layout::lock::LockRecord;
use lunfs::layout::slot::SlotRecord;
use lunfs::layout::superblock::Superblock;
use lunfs::layout::{Block, Magic, header_of, verify, zero_block};
use lunfs::tree::{NodeRead, TreeError, TreeVisitor};
use lunfs::types::{BLOCK_BYTES, BlockNo, InodeNo};

use super::listing::hash;

/// What a dump of the scene must have somewhere.
pub const EVERYTHING: &[&str] = &[
    "superblock Superblock",
    "kind=volume ",
    "kind=rename ",
    "kind=inode ",
    "kind=cluster ",
    "mode=exclusive ",
    "state=free ",
    "state=left ",
    "state=live ",
    "state=recovered ",
    "doorbell ringers=0,1 ",
    "want: Openers",
    "cluster header ",
    "map of blocks",
    "map of groups",
    "form Free ",
    "form Inline ",
    "form Tree ",
    "form Empty ",
    "node of level 0",
    "node of level 1",
    "directory of root level 0",
    "directory of root level 1",
    "directory of root level 2",
    "extents of root level 0",
    "extents of root level 1",
    "unwritten: true",
    "journal header ",
    "kind: Image",
    "kind: Revoke",
    "journal image ",
    "journal commit ",
];

struct Image<'a> {
    bytes: &'a [u8],
    superblock: Superblock,
}

impl Image<'_> {
    fn block(&self, at: BlockNo) -> Option<Box<Block>> {
        let start = usize::try_from(at.offset_bytes()).ok()?;
        let mut block = zero_block();
        block.copy_from_slice(self.bytes.get(start..start.checked_add(BLOCK_BYTES)?)?);
        Some(block)
    }
}

/// Nodes of a tree as they lie on the volume.
struct Nodes<'a>(&'a Image<'a>);

#[derive(Debug)]
struct Bad(String);

impl From<TreeError> for Bad {
    fn from(e: TreeError) -> Self {
        Bad(e.to_string())
    }
}

impl NodeRead for Nodes<'_> {
    type Error = Bad;
    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, Bad> {
        let block = self.0.block(at).ok_or_else(|| Bad(format!("{at} lies outside")))?;
        verify(&block[..], Magic::TreeNode, self.0.superblock.volume, at).map_err(|e| Bad(e.to_string()))?;
        Ok(Arc::from(block))
    }
}

/// Tells a tree: what can't be read before the journal is replayed is told as well.
struct Tell<'a> {
    text: String,
    entries: u64,
    of_entry: &'a dyn Fn(u64, &[u8]) -> String,
    told: String,
}

impl TreeVisitor<Bad> for Tell<'_> {
    fn node(&mut self, at: BlockNo, level: u8) {
        self.text += &format!("\n    node of level {level} at {at}");
    }
    fn entry(&mut self, key: u64, value: &[u8]) {
        let line = format!("\n    {key:#x}: {}", (self.of_entry)(key, value));
        if self.entries < 40 {
            self.text += &line;
        }
        self.told += &line;
        self.entries += 1;
    }
    fn damaged(&mut self, at: BlockNo, lo: u64, hi: u64, error: Bad) {
        self.text += &format!("\n    not yet in place at {at}, {lo:#x} to {hi:#x}: {}", error.0);
    }
}

fn words(fields: &[Field]) -> String {
    fields.iter().map(|(name, value)| format!("{name}={value} ")).collect()
}

/// Panics where a structure does not encode to the bytes that it was decoded from.
pub fn structures(bytes: &[u8]) -> String {
    let first = <&Block>::try_from(&bytes[..BLOCK_BYTES]).unwrap();
    let superblock = Superblock::decode(first, BlockNo(0), true).expect("the superblock");
    let image = Image { bytes, superblock };
    let mut text = String::new();
    for (number, block) in (0..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
        if block.starts_with(b"Ln") {
            let at = BlockNo(number);
            let block = <&Block>::try_from(block).unwrap();
            text += &format!("{at} {}\n", image.tell(at, block));
        }
    }
    text
}

impl Image<'_> {
    fn tell(&self, at: BlockNo, block: &Block) -> String {
        let (g, volume) = (self.superblock.geometry, self.superblock.volume);
        let header = header_of(block).expect("a header");
        let same = |len: usize, encode: &dyn Fn(&mut Block)| {
            let mut again = zero_block();
            encode(&mut again);
            assert!(
                again[..len] == block[..len],
                "{at} is encoded otherwise than it was; {}",
                super::WHAT_TO_DO
            );
        };
        // The copies of blocks that a journal holds.
        if header.address.get() != at.0 {
            let (magic, of) = (header.magic.get().to_le_bytes(), BlockNo(header.address.get()));
            return format!("journal image of {of}, {}, hash {:016x}", magic.escape_ascii(), hash(block));
        }
        match &block[..4] {
            b"LnSB" => {
                let sb = Superblock::decode(block, at, true).expect("a superblock");
                same(BLOCK_BYTES, &|again| sb.encode(at, again));
                format!("superblock {sb:?}")
            }
            b"LnLK" => {
                let lock = LockRecord::decode(block, volume, at).expect("a lock");
                same(512, &|again| lock.encode(volume, again));
                format!("lock {}", words(&lock.fields()))
            }
            b"LnHB" => {
                let slot = SlotRecord::decode(block, volume, at).expect("a slot");
                same(512, &|again| slot.encode(volume, again));
                format!("slot {}wall_ns={}", words(&slot.fields()), slot.wall_ns)
            }
            b"LnDB" => {
                let doorbell = DoorbellRecord::decode(block, volume, at).expect("a doorbell");
                same(512, &|again| doorbell.encode(volume, again));
                format!("doorbell {}", words(&doorbell.fields()))
            }
            b"LnRQ" => {
                let request = RequestBlock::decode(block, volume, at).expect("a request block");
                same(BLOCK_BYTES, &|again| request.encode(volume, again));
                format!("{request:?}")
            }
            b"LnCH" => self.tell_header(at, block),
            b"LnCM" => tell_map(ClusterMap::parse(block, volume, at).expect("a map")),
            b"LnIN" => self.tell_inode(InodeNo(at.0), block),
            b"LnTN" => {
                verify(block, Magic::TreeNode, volume, at).expect("a tree node");
                format!("tree node under lock {}, hash {:016x}", BlockNo(header.lock.get()), hash(block))
            }
            b"LnJH" => {
                let ring = g.journal_blocks - 1;
                let journal = JournalHeader::decode(block, volume, at, ring).expect("a journal's header");
                same(BLOCK_BYTES, &|again| journal.encode(volume, at, again));
                format!("journal header {journal:?}")
            }
            b"LnJD" => {
                let descriptor = Descriptor::decode(block, volume, at).expect("a descriptor");
                same(BLOCK_BYTES, &|again| descriptor.encode(volume, at, again));
                format!("journal {descriptor:?}")
            }
            b"LnJC" => {
                let commit = Commit::decode(block, volume, at).expect("a commit");
                same(BLOCK_BYTES, &|again| commit.encode(volume, at, again));
                format!("journal commit {commit:?}")
            }
            other => panic!("{at}: a structure '{}' that nobody told this test", other.escape_ascii()),
        }
    }

    fn tell_header(&self, at: BlockNo, block: &Block) -> String {
        let g = self.superblock.geometry;
        let cluster = g.cluster_of(at).expect("a cluster");
        let header = ClusterHeader::parse(block, &g, self.superblock.volume, cluster).expect("a header");
        let summaries = &header.summaries[..header.maps.get() as usize];
        let summaries: Vec<String> = summaries
            .iter()
            .map(|s| format!("{}/{}/{}", s.free_blocks.get(), s.free_inodes.get(), s.written))
            .collect();
        format!(
            "cluster header {} blocks {} maps {} free {} inodes {} groups {} summaries {}",
            header.index.get(),
            header.blocks.get(),
            header.maps.get(),
            header.free_blocks.get(),
            header.free_inodes.get(),
            header.groups.get(),
            summaries.join(" ")
        )
    }

    fn tell_inode(&self, ino: InodeNo, block: &Block) -> String {
        let volume = self.superblock.volume;
        let body = InodeDisk::parse(block, volume, ino).expect("an inode");
        let time = |t| {
            let t: Timestamp = t;
            format!("{}.{:09}", t.secs, t.nanos)
        };
        let mut text = format!(
            "inode form {:?} generation {} mode {:o} owner {}:{} nlink {} flags {:#x} size {} blocks {} rdev {:#x} \
             atime {} mtime {} ctime {} btime {} parent {:#x} key {:#x} entries {} xattr {} change {}",
            body.form(),
            body.generation.get(),
            body.mode.get(),
            body.uid.get(),
            body.gid.get(),
            body.nlink.get(),
            body.flags.get(),
            body.size.get(),
            body.blocks.get(),
            body.rdev.get(),
            time(body.atime.into()),
            time(body.mtime.into()),
            time(body.ctime.into()),
            time(body.btime.into()),
            body.parent.get(),
            body.parent_key.get(),
            body.entries.get(),
            body.xattr.get(),
            body.change.get()
        );
        if body.form() == Form::Inline {
            text += &format!(" content {:016x}", hash(&body.content[..body.size.get() as usize]));
        }
        if body.form() != Form::Tree {
            return text;
        }
        let directory = body.mode.get() & libc::S_IFMT == libc::S_IFDIR;
        let names = DirTree::new(volume, ino, self.superblock.hash_seed);
        let extents = ExtentTree::new(volume, ino, self.superblock.geometry.size_blocks);
        let of_entry = |key: u64, value: &[u8]| match directory {
            true => {
                let item = names.parse(key, value).expect("an entry");
                assert!(names.key_fits(&item), "the key of {}", item.name.escape_ascii());
                format!("{:?} {}", item.target, item.name.escape_ascii())
            }
            false => format!("{:?}", extents.parse(key, value).expect("an extent")),
        };
        let tree = if directory { names.tree() } else { extents.tree() };
        let mut tell = Tell { text: String::new(), entries: 0, of_entry: &of_entry, told: String::new() };
        let summary = tree.walk(&mut Nodes(self), &body.content, &mut tell);
        let what = if directory { "directory" } else { "extents" };
        let (level, entries, all) = (summary.level, summary.entries, hash(tell.told.as_bytes()));
        text + &format!(", {what} of root level {level}, {entries} entries, hash {all:016x}") + &tell.text
    }
}

fn tell_map(map: &ClusterMap) -> String {
    let (mut blocks, mut groups) = (String::new(), String::new());
    for (i, chunk) in map.chunks.iter().enumerate() {
        match (chunk.group, chunk.used.get()) {
            (1, _) => groups += &format!(" {i}:{:02x}", chunk.inodes),
            (_, 0) => {}
            (_, used) => blocks += &format!(" {i}:{used:04x}"),
        }
    }
    // What lies past the end of a cluster is all marked used.
    let blocks = if blocks.len() > 200 { format!("hash {:016x}", hash(blocks.as_bytes())) } else { blocks };
    format!("map of blocks {blocks}; map of groups{groups}")
}
