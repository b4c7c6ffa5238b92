//! The bytes of a logical unit: sparse, in memory or in a file, with a volatile cache if wanted.
//!
//! What is read is always what was written last. With a volatile cache the store keeps, for each logical block
//! written since it was last durable, the images before; losing power puts each such block back to its durable
//! image or to any later one, each block for itself, by seed. A block is never torn.
//!
//! Callers check ranges; here they are assumed.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const CHUNK_BYTES: usize = 64 << 10;
/// Images kept per block: the durable one and the newest of those after it.
const IMAGES_MAX: usize = 5;

enum Backing {
    Memory(HashMap<u64, Box<[u8]>>),
    File(File),
}

pub struct Store {
    backing: Backing,
    block_bytes: usize,
    blocks: u64,
    /// Older images of each block that is not durable, the durable one first. `None` without a volatile cache.
    undo: Option<HashMap<u64, Vec<Box<[u8]>>>>,
}

/// What a loss of power did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Blocks that were not durable.
    pub at_risk: usize,
    /// Of these, the ones that went back to an older image.
    pub went_back: usize,
}

impl Store {
    pub fn memory(block_bytes: u32, blocks: u64) -> Self {
        Store {
            backing: Backing::Memory(HashMap::new()),
            block_bytes: block_bytes as usize,
            blocks,
            undo: None,
        }
    }

    /// A file, made if it is not there and never made shorter.
    pub fn file(path: &Path, block_bytes: u32, blocks: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let bytes = blocks * u64::from(block_bytes);
        if file.metadata()?.len() < bytes {
            file.set_len(bytes)?;
        }
        Ok(Store { backing: Backing::File(file), block_bytes: block_bytes as usize, blocks, undo: None })
    }

    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    pub fn set_volatile(&mut self, volatile: bool) {
        match (volatile, self.undo.is_some()) {
            (true, false) => self.undo = Some(HashMap::new()),
            (false, true) => self.undo = None,
            _ => {}
        }
    }

    /// What is cut off is gone, as on an array.
    pub fn resize(&mut self, blocks: u64) -> io::Result<()> {
        match &mut self.backing {
            Backing::Memory(chunks) => {
                let bytes = blocks as usize * self.block_bytes;
                let last = bytes.div_ceil(CHUNK_BYTES) as u64;
                chunks.retain(|chunk, _| *chunk < last);
                if let Some(chunk) = chunks.get_mut(&((bytes / CHUNK_BYTES) as u64)) {
                    chunk[bytes % CHUNK_BYTES..].fill(0);
                }
            }
            Backing::File(file) => file.set_len(blocks * self.block_bytes as u64)?,
        }
        if let Some(undo) = &mut self.undo {
            undo.retain(|lba, _| *lba < blocks);
        }
        self.blocks = blocks;
        Ok(())
    }

    pub fn read(&self, lba: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut at = lba * self.block_bytes as u64;
        match &self.backing {
            Backing::File(file) => file.read_exact_at(buf, at),
            Backing::Memory(chunks) => {
                let mut rest = buf;
                while !rest.is_empty() {
                    let within = (at % CHUNK_BYTES as u64) as usize;
                    let n = rest.len().min(CHUNK_BYTES - within);
                    let (now, later) = rest.split_at_mut(n);
                    match chunks.get(&(at / CHUNK_BYTES as u64)) {
                        Some(chunk) => now.copy_from_slice(&chunk[within..within + n]),
                        None => now.fill(0),
                    }
                    at += n as u64;
                    rest = later;
                }
                Ok(())
            }
        }
    }

    pub fn read_blocks(&self, lba: u64, blocks: u64) -> io::Result<Vec<u8>> {
        let mut out = vec![0u8; blocks as usize * self.block_bytes];
        self.read(lba, &mut out)?;
        Ok(out)
    }

    /// `through`: durable at once (FUA).
    pub fn write(&mut self, lba: u64, data: &[u8], through: bool) -> io::Result<()> {
        self.remember(lba, (data.len() / self.block_bytes) as u64, through)?;
        let mut at = lba * self.block_bytes as u64;
        match &mut self.backing {
            Backing::File(file) => file.write_all_at(data, at),
            Backing::Memory(chunks) => {
                let mut rest = data;
                while !rest.is_empty() {
                    let within = (at % CHUNK_BYTES as u64) as usize;
                    let (now, later) = rest.split_at(rest.len().min(CHUNK_BYTES - within));
                    let chunk = chunks
                        .entry(at / CHUNK_BYTES as u64)
                        .or_insert_with(|| vec![0u8; CHUNK_BYTES].into_boxed_slice());
                    chunk[within..within + now.len()].copy_from_slice(now);
                    at += now.len() as u64;
                    rest = later;
                }
                Ok(())
            }
        }
    }

    /// The same block again and again.
    pub fn fill(&mut self, lba: u64, blocks: u64, block: &[u8]) -> io::Result<()> {
        if block.iter().all(|byte| *byte == 0) {
            return self.zero(lba, blocks);
        }
        let step = (1 << 20) / self.block_bytes as u64;
        let pattern = block.repeat(step.min(blocks) as usize);
        let mut done = 0;
        while done < blocks {
            let n = step.min(blocks - done);
            self.write(lba + done, &pattern[..n as usize * self.block_bytes], false)?;
            done += n;
        }
        Ok(())
    }

    /// Zeroes, giving back what can be given back.
    pub fn zero(&mut self, lba: u64, blocks: u64) -> io::Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        self.remember(lba, blocks, false)?;
        let (from, bytes) = (lba * self.block_bytes as u64, blocks * self.block_bytes as u64);
        match &mut self.backing {
            Backing::File(file) => {
                let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let file: &File = file;
                if fallocate(file, mode, from as i64, bytes as i64).is_err() {
                    let zeroes = vec![0u8; (1 << 20).min(bytes as usize)];
                    let mut done = 0;
                    while done < bytes {
                        let n = (bytes - done).min(zeroes.len() as u64);
                        file.write_all_at(&zeroes[..n as usize], from + done)?;
                        done += n;
                    }
                }
            }
            Backing::Memory(chunks) => {
                let end = from + bytes;
                let chunk_bytes = CHUNK_BYTES as u64;
                let (first, last) = (from / chunk_bytes, (end - 1) / chunk_bytes);
                let touched: Vec<u64> = if last - first > chunks.len() as u64 {
                    chunks.keys().copied().filter(|chunk| (first..=last).contains(chunk)).collect()
                } else {
                    (first..=last).filter(|chunk| chunks.contains_key(chunk)).collect()
                };
                for number in touched {
                    let start = number * chunk_bytes;
                    let (a, b) = (from.max(start) - start, end.min(start + chunk_bytes) - start);
                    if b - a == chunk_bytes {
                        chunks.remove(&number);
                    } else if let Some(chunk) = chunks.get_mut(&number) {
                        chunk[a as usize..b as usize].fill(0);
                    }
                }
            }
        }
        Ok(())
    }

    /// Everything written until now survives a loss of power.
    pub fn flush(&mut self) -> io::Result<()> {
        if let Some(undo) = &mut self.undo {
            undo.clear();
        }
        // No fsync of a backing file: the page cache outlives this process, and no test asks for more.
        Ok(())
    }

    pub fn flush_blocks(&mut self, lba: u64, blocks: u64) -> io::Result<()> {
        if let Some(undo) = &mut self.undo {
            undo.retain(|at, _| !(lba..lba.saturating_add(blocks)).contains(at));
        }
        Ok(())
    }

    /// Blocks that a loss of power could take back.
    pub fn not_durable(&self) -> usize {
        self.undo.as_ref().map_or(0, HashMap::len)
    }

    /// Each block that is not durable keeps its newest image or goes back to an older one.
    pub fn lose_power(&mut self, seed: u64) -> io::Result<Loss> {
        let Some(undo) = &mut self.undo else {
            return Ok(Loss::default());
        };
        let mut at_risk: Vec<(u64, Vec<Box<[u8]>>)> = undo.drain().collect();
        at_risk.sort_by_key(|(lba, _)| *lba);
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut loss = Loss { at_risk: at_risk.len(), went_back: 0 };
        for (lba, images) in at_risk {
            let pick = rng.random_range(0..=images.len());
            if let Some(image) = images.get(pick) {
                self.write(lba, image, false)?;
                loss.went_back += 1;
            }
        }
        if let Some(undo) = &mut self.undo {
            undo.clear();
        }
        Ok(loss)
    }

    fn remember(&mut self, lba: u64, blocks: u64, through: bool) -> io::Result<()> {
        let Some(mut undo) = self.undo.take() else {
            return Ok(());
        };
        let mut image = vec![0u8; self.block_bytes];
        for at in lba..lba + blocks {
            if through {
                undo.remove(&at);
                continue;
            }
            self.read(at, &mut image)?;
            let images = undo.entry(at).or_default();
            if images.len() == IMAGES_MAX {
                images.remove(1);
            }
            images.push(image.clone().into_boxed_slice());
        }
        self.undo = Some(undo);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> Vec<(Store, Option<tempfile::TempDir>)> {
        let dir = tempfile::tempdir().unwrap();
        let file = Store::file(&dir.path().join("lun"), 512, 1 << 12).unwrap();
        vec![(Store::memory(512, 1 << 12), None), (file, Some(dir))]
    }

    #[test]
    fn holds_what_was_written_across_chunks() {
        for (mut store, _dir) in both() {
            let data: Vec<u8> = (0..200 * 512).map(|n| (n % 251) as u8).collect();
            store.write(100, &data, false).unwrap();
            assert_eq!(store.read_blocks(100, 200).unwrap(), data);
            assert!(store.read_blocks(0, 100).unwrap().iter().all(|byte| *byte == 0));
            store.zero(101, 198).unwrap();
            assert_eq!(store.read_blocks(100, 1).unwrap(), data[..512]);
            assert_eq!(store.read_blocks(299, 1).unwrap(), data[199 * 512..]);
            assert!(store.read_blocks(101, 198).unwrap().iter().all(|byte| *byte == 0));
            store.fill(7, 3000, &[9; 512]).unwrap();
            assert!(store.read_blocks(7, 3000).unwrap().iter().all(|byte| *byte == 9));
            assert_eq!(store.read_blocks(3007, 1).unwrap(), [0; 512]);
        }
    }

    #[test]
    fn power_takes_only_what_was_not_durable() {
        for (mut store, _dir) in both() {
            store.set_volatile(true);
            store.write(0, &[1; 64 * 512], false).unwrap();
            store.flush().unwrap();
            store.write(0, &[2; 64 * 512], false).unwrap();
            store.write(0, &[3; 64 * 512], false).unwrap();
            store.write(5, &[4; 512], true).unwrap();
            let loss = store.lose_power(1).unwrap();
            assert_eq!(loss.at_risk, 63);
            let mut seen = [0; 5];
            for lba in 0..64 {
                let block = store.read_blocks(lba, 1).unwrap();
                assert!(block.iter().all(|byte| *byte == block[0]), "a torn block");
                seen[usize::from(block[0])] += 1;
            }
            assert_eq!(store.read_blocks(5, 1).unwrap(), [4; 512]);
            assert!(seen[1] > 0 && seen[2] > 0 && seen[3] > 0, "all images are possible: {seen:?}");
            assert_eq!(store.lose_power(1).unwrap(), Loss::default(), "after power came back all is durable");
        }
    }

    #[test]
    fn growing_shows_zeroes() {
        for (mut store, _dir) in both() {
            store.write(10, &[1; 10 * 512], false).unwrap();
            store.resize(12).unwrap();
            store.resize(100).unwrap();
            assert_eq!(store.read_blocks(11, 1).unwrap(), [1; 512]);
            assert_eq!(store.read_blocks(12, 8).unwrap(), vec![0; 8 * 512]);
        }
    }
}
