//! What the generated volume consists of: one cluster's worth of inodes, files, directories and maps, which is the
//! same in every cluster but for addresses.

use std::collections::HashMap;

use lunfs::fs::dirtree::name_hash;
use lunfs::layout::cluster::{Chunk, ClusterHeader, ClusterMap};
use lunfs::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES, Geometry};
use lunfs::types::VolumeId;

use super::nodes::{EXTENT_BYTES, Shelves};

/// Names of one directory all have this length.
pub const NAME_BYTES: usize = 14;
pub const ENTRY_BYTES: usize = 13 + NAME_BYTES;

pub fn sub_name(number: usize) -> String {
    format!("directory-{number:04}")
}

pub fn file_name(number: u64) -> String {
    format!("f{number:013}")
}

/// A directory's second name of its first file.
pub const AGAIN: &str = "the-first-file";

/// Keys as the format has them: 47 bits of the hash and an index among equal ones.
pub fn key_of(seed: &[u8; 16], name: &str) -> u64 {
    (name_hash(seed, name.as_bytes()) & ((1 << 47) - 1)).max(1) << 16
}

/// What is named, by number, in the order of keys.
pub fn sorted(seed: &[u8; 16], names: impl Iterator<Item = String>) -> Vec<(u64, u32)> {
    let mut keys: Vec<(u64, u32)> = names.zip(0..).map(|(name, i)| (key_of(seed, &name), i)).collect();
    keys.sort_unstable();
    for i in 1..keys.len() {
        if keys[i].0 <= keys[i - 1].0 {
            keys[i].0 = keys[i - 1].0 + 1;
        }
    }
    keys
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    pub logical: u64,
    /// From the start of the cluster.
    pub at: u64,
    pub blocks: u64,
    pub unwritten: bool,
}

#[derive(Clone, Debug)]
pub enum Content {
    Inline(u64),
    Symlink,
    Pipe,
    Pieces(Vec<Piece>),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Free,
    /// The directory of the cluster, in the root.
    Top,
    /// A directory in it.
    Sub(usize),
    /// A file in such a directory.
    File(usize),
    /// A file in the one big directory.
    Big,
    Orphan,
}

pub struct Inode {
    pub role: Role,
    pub content: Content,
    pub nlink: u32,
    /// Nodes of its tree, side by side from here.
    pub nodes_at: u64,
    pub nodes: Shelves,
}

/// A directory of a cluster: keys, and which inode of the cluster each names.
pub struct Names {
    pub sorted: Vec<(u64, u32)>,
    pub inodes: Vec<u32>,
}

pub struct Shape {
    /// First chunk of the inode groups, and their number.
    pub first_chunk: u64,
    pub groups: u64,
    pub inodes: Vec<Inode>,
    pub top: Names,
    pub subs: Vec<Names>,
    /// Files of this cluster in the big directory.
    pub big: Vec<u32>,
    /// Tree nodes by place: whose, and which.
    pub nodes: HashMap<u64, (u32, u64)>,
    pub header: Box<ClusterHeader>,
    /// None: never written.
    pub maps: Vec<Option<Box<ClusterMap>>>,
    pub used_blocks: u64,
    pub used_inodes: u64,
    pub files: u64,
}

impl Shape {
    /// `files`: of one cluster; `full`: how much of it is used, in per cent.
    pub fn new(g: &Geometry, volume: VolumeId, seed: &[u8; 16], files: u64, full: u64) -> Self {
        let per_sub = (files / 8).clamp(4, 64) as usize;
        let big = (files / 10).max(1) as usize;
        let wide = 4 * per_sub;
        let subs = 1 + (files as usize).saturating_sub(big + wide + 1).div_ceil(per_sub).max(1);
        let mut roles = vec![Role::Top];
        roles.extend((0..subs).map(Role::Sub));
        let mut files = 0;
        for sub in 0..subs {
            for i in 0..if sub == 0 { wide } else { per_sub } {
                roles.push(Role::File(sub));
                files += 1;
                // Inodes that were in use once.
                if i % 50 == 20 {
                    roles.push(Role::Free);
                }
            }
        }
        roles.extend((0..big).map(|_| Role::Big));
        roles.push(Role::Orphan);
        files += big as u64 + 1;
        roles.resize(roles.len().next_multiple_of(GROUP_INODES as usize), Role::Free);
        let groups = roles.len() as u64 / GROUP_INODES;
        let first_chunk = g.cluster_overhead(1).div_ceil(GROUP_BLOCKS);

        let mut next = (first_chunk + groups) * GROUP_BLOCKS;
        let mut nodes = HashMap::new();
        let mut inodes: Vec<Inode> = Vec::new();
        let mut long = Vec::new();
        let mut number = 0;
        for (i, role) in (0u32..).zip(&roles) {
            let mut content = Content::Inline(0);
            let mut shelves = Shelves::new(0, ENTRY_BYTES);
            match role {
                Role::Sub(0) => shelves = Shelves::new(wide + 1, ENTRY_BYTES),
                Role::Sub(_) => shelves = Shelves::new(per_sub + 1, ENTRY_BYTES),
                Role::Top => shelves = Shelves::new(subs + 1, ENTRY_BYTES),
                Role::File(_) | Role::Big | Role::Orphan => {
                    number += 1;
                    content = content_of(number, &mut next);
                    match &content {
                        Content::Pieces(pieces) if pieces.is_empty() => long.push(i),
                        Content::Pieces(pieces) => shelves = Shelves::new(pieces.len(), EXTENT_BYTES),
                        _ => {}
                    }
                }
                Role::Free => {}
            }
            let nodes_at = next;
            for node in 0..shelves.nodes() {
                nodes.insert(next, (i, node));
                next += 1;
            }
            inodes.push(Inode { role: *role, content, nlink: 1, nodes_at, nodes: shelves });
        }
        // The long ones share what is to be used.
        let room = (g.cluster_len(1) * full / 100).saturating_sub(next) / (long.len() as u64).max(1);
        for i in &long {
            let first = Piece { logical: 0, at: next, blocks: (room / 2).max(1), unwritten: false };
            let at = next + first.blocks + 1;
            let second = Piece { logical: first.blocks + 5, at, blocks: (room / 2).max(2) - 1, ..first };
            next = second.at + second.blocks;
            let inode = &mut inodes[*i as usize];
            inode.content = Content::Pieces(vec![first, second]);
            inode.nodes = Shelves::new(2, EXTENT_BYTES);
        }
        assert!(next <= g.cluster_len(1), "{next} blocks");

        let of = |wanted: Role| -> Vec<u32> {
            (0..).zip(&roles).filter(|(_, role)| **role == wanted).map(|(i, _)| i).collect()
        };
        let subs: Vec<Names> = (0..subs)
            .map(|sub| {
                let mut members = of(Role::File(sub));
                let names = (0..members.len() as u64).map(file_name).chain([AGAIN.into()]);
                let sorted = sorted(seed, names);
                members.push(members[0]);
                inodes[members[0] as usize].nlink += 1;
                Names { sorted, inodes: members }
            })
            .collect();
        let mut members: Vec<u32> = (0..subs.len() as u32).map(|sub| 1 + sub).collect();
        let names = (0..members.len()).map(sub_name).chain([AGAIN.into()]);
        let top = Names { sorted: sorted(seed, names), inodes: Vec::new() };
        members.push(subs[0].inodes[0]);
        inodes[subs[0].inodes[0] as usize].nlink += 1;
        let top = Names { inodes: members, ..top };
        inodes[of(Role::Orphan)[0] as usize].nlink = 0;

        let mut shape = Shape {
            first_chunk,
            groups,
            top,
            subs,
            big: of(Role::Big),
            nodes,
            header: Box::new(ClusterHeader::new_empty(g, volume, 1)),
            maps: Vec::new(),
            used_blocks: 0,
            used_inodes: roles.iter().filter(|role| **role != Role::Free).count() as u64,
            files,
            inodes,
        };
        shape.mark(g, volume);
        shape
    }

    /// Maps and header.
    fn mark(&mut self, g: &Geometry, volume: VolumeId) {
        let mut maps: Vec<ClusterMap> =
            (0..g.cluster_maps(1)).map(|map| ClusterMap::new_empty(g, volume, 1, map)).collect();
        let mut written = vec![false; maps.len()];
        let mut chunk = |chunk: u64, change: &mut dyn FnMut(&mut Chunk)| {
            let map = (chunk / CHUNKS_PER_MAP) as usize;
            written[map] = true;
            change(&mut maps[map].chunks[(chunk % CHUNKS_PER_MAP) as usize]);
        };
        for group in 0..self.groups {
            let here = &self.inodes[(group * GROUP_INODES) as usize..][..GROUP_INODES as usize];
            let bits = (0..).zip(here).filter(|(_, inode)| inode.role != Role::Free);
            let inodes = bits.fold(0, |bits, (i, _)| bits | 1u8 << i);
            chunk(self.first_chunk + group, &mut |c| {
                *c = Chunk { used: u16::MAX.into(), inodes, group: 1 };
            });
            self.used_blocks += GROUP_BLOCKS;
        }
        for inode in &self.inodes {
            let mut runs = vec![(inode.nodes_at, inode.nodes.nodes())];
            if let Content::Pieces(pieces) = &inode.content {
                runs.extend(pieces.iter().map(|p| (p.at, p.blocks)));
            }
            for (at, blocks) in runs {
                self.used_blocks += blocks;
                for block in at..at + blocks {
                    chunk(block / GROUP_BLOCKS, &mut |c| {
                        c.used = (c.used.get() | 1 << (block % GROUP_BLOCKS)).into();
                    });
                }
            }
        }
        let (mut free_blocks, mut free_inodes) = (0, 0);
        for ((map, written), summary) in maps.iter().zip(&written).zip(&mut self.header.summaries) {
            summary.free_blocks = (map.free_blocks() as u16).into();
            summary.free_inodes = (map.free_inodes() as u16).into();
            summary.written = u8::from(*written);
            free_blocks += map.free_blocks();
            free_inodes += map.free_inodes();
        }
        self.header.free_blocks = free_blocks.into();
        self.header.free_inodes = free_inodes.into();
        self.header.groups = (self.groups as u32).into();
        self.maps =
            maps.into_iter().zip(written).map(|(map, written)| written.then(|| Box::new(map))).collect();
    }
}

/// Something of every kind; no pieces: one of the long ones.
fn content_of(number: u64, next: &mut u64) -> Content {
    let mut pieces = Vec::new();
    let mut piece = |logical, blocks, unwritten| {
        pieces.push(Piece { logical, at: *next, blocks, unwritten });
        *next += blocks + 1;
    };
    match number % 16 {
        // So many that they need a tree of three leaves.
        _ if number % 97 == 50 => (0..300).for_each(|i| piece(i * 3, 1 + i % 2, false)),
        0..=4 => return Content::Inline(number % 3000),
        5 => return Content::Symlink,
        6 => return Content::Pipe,
        7 | 8 => (0..5).for_each(|i| piece(i * 4, 1 + (number + i) % 3, false)),
        9 => (0..4).for_each(|i| piece(i * 10, 10, i % 2 == 1)),
        _ => {}
    }
    Content::Pieces(pieces)
}
