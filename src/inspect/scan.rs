//! Every lock of a volume: what `lunfs locks --scan` shows.
//!
//! Order: volume, rename, system inodes; then cluster by cluster its own lock and the locks of its inode
//! groups, as its maps name them. A group that was born but whose map is not yet in place is missed: the
//! map lies in its host's journal until then.

use super::{InspectError, Volume};
use crate::device::AlignedBuf;
use crate::layout::RECORD_BYTES;
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES};
use crate::layout::lock::LockRecord;
use crate::types::{BLOCK_BYTES, BlockNo};

/// What a scan hands out.
pub enum Scanned {
    Lock(LockRecord),
    /// Something that could not be read; the scan goes on.
    Problem(InspectError),
}

/// Hands every lock to `each`, free ones included; stops early when `each` says false.
pub fn all_locks(volume: &Volume<'_>, each: &mut dyn FnMut(Scanned) -> bool) {
    let geometry = *volume.geometry();
    for at in [geometry.volume_lock(), geometry.rename_lock()] {
        if !one(volume, at, each) {
            return;
        }
    }
    for index in 0..geometry.system_groups() {
        if !group(volume, geometry.system_group(index), each) {
            return;
        }
    }
    for index in 0..geometry.clusters() {
        if !one(volume, geometry.cluster(index), each) || !cluster(volume, index, each) {
            return;
        }
    }
}

fn cluster(volume: &Volume<'_>, index: u64, each: &mut dyn FnMut(Scanned) -> bool) -> bool {
    let geometry = *volume.geometry();
    let header = match volume.cluster_header(index) {
        Ok(header) => header,
        Err(error) => return each(Scanned::Problem(error)),
    };
    for (map, summary) in (0..geometry.cluster_maps(index)).zip(&header.summaries) {
        if summary.written != 1 {
            continue;
        }
        let chunks = match volume.cluster_map(index, map) {
            Ok(map) => map.chunks,
            Err(error) => {
                if !each(Scanned::Problem(error)) {
                    return false;
                }
                continue;
            }
        };
        for (chunk, state) in (0..CHUNKS_PER_MAP).zip(&chunks) {
            let offset = (map * CHUNKS_PER_MAP + chunk) * GROUP_BLOCKS;
            let inside = offset >= geometry.cluster_overhead(index)
                && offset + GROUP_BLOCKS <= geometry.cluster_len(index);
            if state.group == 1 && inside && !group(volume, geometry.cluster(index).plus(offset), each) {
                return false;
            }
        }
    }
    true
}

/// The locks of the group at `first`, in one read.
fn group(volume: &Volume<'_>, first: BlockNo, each: &mut dyn FnMut(Scanned) -> bool) -> bool {
    let bytes: AlignedBuf = match volume.read_run(first, GROUP_INODES) {
        Ok(bytes) => bytes,
        Err(error) => return each(Scanned::Problem(error)),
    };
    for (i, block) in (0..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
        let at = first.plus(i);
        let go_on = match LockRecord::decode(&block[..RECORD_BYTES], volume.id(), at) {
            Ok(record) => each(Scanned::Lock(record)),
            // Perhaps under a write just now.
            Err(_) => one(volume, at, each),
        };
        if !go_on {
            return false;
        }
    }
    true
}

fn one(volume: &Volume<'_>, at: BlockNo, each: &mut dyn FnMut(Scanned) -> bool) -> bool {
    match volume.lock(at) {
        Ok(record) => each(Scanned::Lock(record)),
        Err(error) => each(Scanned::Problem(error)),
    }
}
