//! What the blocks of a filled cluster hold, made up from where they are: every cluster is filled after one `Shape`, and
//! says in each block whose it is.

use lunfs::layout::geometry::{GROUP_BLOCKS, GROUP_INODES};
use lunfs::layout::inode::{CONTENT_BYTES, Form, InodeDisk};
use lunfs::layout::lock::{LockKind, LockMode, LockRecord};
use lunfs::layout::{Block, Header, Magic, RECORD_BYTES, seal};
use lunfs::types::{BLOCK_BYTES_U64, BlockNo, Incarnation, InodeNo, Owner, Slot, Tenure};
use zerocopy::IntoBytes;

use super::device::{BIG, Generated, cluster_name};
use super::nodes::{Kind, Shelves, Tree, node_block};
use super::shape::{AGAIN, Content, ENTRY_BYTES, Names, Role, file_name, key_of, sub_name};

impl Generated {
    /// A block of a filled cluster, by its place in it.
    pub fn made_up(&self, cluster: u64, offset: u64, into: &mut Block) {
        let g = self.g();
        let (shape, volume) = (&self.shape, self.superblock.volume);
        let (lock, overhead) = (g.cluster(cluster), g.cluster_overhead(cluster));
        let groups = shape.first_chunk * GROUP_BLOCKS..(shape.first_chunk + shape.groups) * GROUP_BLOCKS;
        match offset {
            0 => LockRecord::new_free(LockKind::Cluster, lock).encode(volume, &mut into[..RECORD_BYTES]),
            1 => {
                into.copy_from_slice(shape.header.as_bytes());
                let header = Header::new(Magic::ClusterHeader, volume, g.cluster_header(cluster), lock);
                into[..0x40].copy_from_slice(header.as_bytes());
                into[0x40..0x48].copy_from_slice(&cluster.to_le_bytes());
                seal(&mut into[..]);
            }
            2 => {}
            _ if offset < overhead => {
                let Some(map) = &shape.maps[offset as usize - 3] else { return };
                into.copy_from_slice(map.as_bytes());
                let header = Header::new(Magic::ClusterMap, volume, lock.plus(offset), lock);
                into[..0x40].copy_from_slice(header.as_bytes());
                seal(&mut into[..]);
            }
            _ if groups.contains(&offset) && offset % GROUP_BLOCKS < GROUP_INODES => {
                self.lock(lock.plus(offset), into);
            }
            _ if groups.contains(&offset) => {
                let group = (offset - groups.start) / GROUP_BLOCKS;
                let i = group * GROUP_INODES + offset % GROUP_BLOCKS - GROUP_INODES;
                self.body(cluster, i as u32, into);
            }
            _ => {
                if let Some((i, node)) = shape.nodes.get(&offset) {
                    let inode = &shape.inodes[*i as usize];
                    self.with_tree(cluster, *i, &mut |tree| {
                        node_block(into, volume, &inode.nodes, tree, *node as usize);
                    });
                }
            }
        }
    }

    /// Locks as hosts leave them: most free, some still held by a life that left, some shared.
    pub fn lock(&self, at: BlockNo, into: &mut Block) {
        let mut lock = LockRecord::new_free(LockKind::Inode, at);
        if at.0 % 7 == 3 {
            let owner = Owner { slot: Slot(0), incarnation: Incarnation(1) };
            lock.mode = LockMode::Exclusive { owner, tenure: Tenure(3) };
            (lock.swap_counter, lock.change_counter) = (3, 2);
        }
        lock.encode(self.superblock.volume, &mut into[..RECORD_BYTES]);
    }

    /// File type as entries have it.
    pub fn kind(&self, i: u32) -> u8 {
        (self.mode(i) >> 12) as u8
    }

    pub fn mode(&self, i: u32) -> u32 {
        let inode = &self.shape.inodes[i as usize];
        match (inode.role, &inode.content) {
            (Role::Free, _) => 0,
            (Role::Top | Role::Sub(_), _) => libc::S_IFDIR | 0o755,
            (_, Content::Symlink) => libc::S_IFLNK | 0o777,
            (_, Content::Pipe) => libc::S_IFIFO | 0o644,
            _ => libc::S_IFREG | 0o644,
        }
    }

    fn generation(&self, i: u32) -> u32 {
        1 + i % 3 * u32::from(self.shape.inodes[i as usize].role != Role::Orphan)
    }

    fn entry(&self, cluster: u64, i: u32, name: &str) -> Vec<u8> {
        value(self.ino(cluster, i), self.generation(i), self.kind(i), name)
    }

    fn root_entry(&self, i: usize) -> Vec<u8> {
        let number = u64::from(self.root[i].1);
        match number == self.filled() {
            true => value(self.big_ino, 1, (libc::S_IFDIR >> 12) as u8, BIG),
            false => self.entry(number + 1, 0, &cluster_name(number + 1)),
        }
    }

    /// The two trees of the first cluster.
    pub fn big_tree<T>(&self, then: impl FnOnce(&Tree<'_>) -> T) -> T {
        let per_cluster = self.shape.big.len() as u32;
        let value = |i: usize| {
            let number = self.big[i].1;
            let inode = self.shape.big[(number % per_cluster) as usize];
            self.entry(u64::from(1 + number / per_cluster), inode, &file_name(number.into()))
        };
        let (at, key) = (self.big_nodes.0, &|i: usize| self.big[i].0);
        then(&Tree { kind: Kind::Directory, owner: self.big_ino, at, key, value: &value })
    }

    pub fn root_tree<T>(&self, then: impl FnOnce(&Tree<'_>) -> T) -> T {
        let (at, key) = (self.root_nodes.0, &|i: usize| self.root[i].0);
        let value = |i| self.root_entry(i);
        then(&Tree { kind: Kind::Directory, owner: self.g().root(), at, key, value: &value })
    }

    pub fn directory(
        &self,
        block: &mut Block,
        ino: InodeNo,
        parent: (InodeNo, u64),
        entries: usize,
        nodes: &(BlockNo, Shelves),
        nlink: u32,
    ) {
        block.copy_from_slice(InodeDisk::new_free(self.superblock.volume, ino).as_bytes());
        let body = InodeDisk::of_mut(block);
        body.mode = (libc::S_IFDIR | 0o755).into();
        body.form = Form::Tree.code();
        body.generation = 1.into();
        body.nlink = nlink.into();
        body.entries = (entries as u64).into();
        body.blocks = nodes.1.nodes().into();
        (body.parent, body.parent_key) = (parent.0.0.into(), parent.1.into());
    }

    fn body(&self, cluster: u64, i: u32, into: &mut Block) {
        let (g, inode) = (self.g(), &self.shape.inodes[i as usize]);
        let ino = self.ino(cluster, i);
        let nodes = (g.cluster(cluster).plus(inode.nodes_at), inode.nodes);
        let names = |names: &Names| names.sorted.len();
        match inode.role {
            Role::Top => {
                let parent = (g.root(), self.root_keys[cluster as usize - 1]);
                let nlink = 2 + self.shape.subs.len() as u32;
                self.directory(into, ino, parent, names(&self.shape.top), &nodes, nlink);
            }
            Role::Sub(sub) => {
                let key = key_of(&self.superblock.hash_seed, &sub_name(sub));
                let parent = (self.ino(cluster, 0), key);
                self.directory(into, ino, parent, names(&self.shape.subs[sub]), &nodes, 2);
            }
            _ => into.copy_from_slice(InodeDisk::new_free(self.superblock.volume, ino).as_bytes()),
        }
        let body = InodeDisk::of_mut(into);
        body.generation = self.generation(i).into();
        body.mode = self.mode(i).into();
        match (inode.role, &inode.content) {
            (Role::Free, _) => {}
            (Role::Top | Role::Sub(_), _) => {}
            (_, content) => {
                body.nlink = inode.nlink.into();
                let (form, size, blocks) = match content {
                    Content::Inline(size) => (Form::Inline, *size, 0),
                    Content::Symlink => (Form::Inline, 11, 0),
                    Content::Pipe => (Form::Empty, 0, 0),
                    Content::Pieces(pieces) => {
                        let end = pieces.last().map_or(0, |p| p.logical + p.blocks);
                        let data: u64 = pieces.iter().map(|p| p.blocks).sum();
                        (Form::Tree, end * BLOCK_BYTES_U64 - 7, data + inode.nodes.nodes())
                    }
                };
                body.form = form.code();
                (body.size, body.blocks) = (size.into(), blocks.into());
                if let Content::Symlink = content {
                    body.content[..11].copy_from_slice(b"the/target/");
                }
            }
        }
        if body.form == Form::Tree.code() {
            self.with_tree(cluster, i, &mut |tree| {
                let content: &mut [u8; CONTENT_BYTES] = &mut InodeDisk::of_mut(into).content;
                inode.nodes.write(content, tree, None);
            });
        }
        seal(&mut into[..]);
    }

    /// The tree of a file or directory of a filled cluster.
    fn with_tree(&self, cluster: u64, i: u32, then: &mut dyn FnMut(&Tree<'_>)) {
        let inode = &self.shape.inodes[i as usize];
        let start = self.g().cluster(cluster);
        let (owner, at) = (self.ino(cluster, i), start.plus(inode.nodes_at));
        let of_names = |names: &Names, name: &dyn Fn(usize) -> String, then: &mut dyn FnMut(&Tree<'_>)| {
            let value = |n: usize| {
                let number = names.sorted[n].1 as usize;
                let name = match number + 1 == names.inodes.len() {
                    true => AGAIN.to_owned(),
                    false => name(number),
                };
                self.entry(cluster, names.inodes[number], &name)
            };
            then(&Tree { kind: Kind::Directory, owner, at, key: &|n| names.sorted[n].0, value: &value });
        };
        match (inode.role, &inode.content) {
            (Role::Top, _) => of_names(&self.shape.top, &sub_name, then),
            (Role::Sub(sub), _) => of_names(&self.shape.subs[sub], &|n| file_name(n as u64), then),
            (_, Content::Pieces(pieces)) => {
                let value = |n: usize| {
                    let piece = &pieces[n];
                    let mut value = start.plus(piece.at).0.to_le_bytes().to_vec();
                    value.extend((piece.blocks as u32).to_le_bytes());
                    value.extend(u32::from(piece.unwritten).to_le_bytes());
                    value
                };
                then(&Tree { kind: Kind::Extents, owner, at, key: &|n| pieces[n].logical, value: &value });
            }
            other => panic!("no tree: {other:?}"),
        }
    }
}

fn value(ino: InodeNo, generation: u32, kind: u8, name: &str) -> Vec<u8> {
    let mut value = ino.0.to_le_bytes().to_vec();
    value.extend(generation.to_le_bytes());
    value.push(kind);
    value.extend(name.as_bytes());
    assert_eq!(value.len(), ENTRY_BYTES);
    value
}
