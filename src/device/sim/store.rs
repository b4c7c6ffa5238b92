//! Sparse bytes: what lies on the simulated medium.
//!
//! Invariants: memory grows with what was written, not with the size of the device; copies share
//! their blocks until one of them changes, so snapshots cost little.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Unit of storage; unrelated to the device's logical block.
const CHUNK: u64 = 4096;
/// What discarded space reads as: neither zeros nor the old bytes, so that nobody relies on either.
pub const DISCARDED: u8 = 0xaf;

/// Bytes by offset; everything else reads as zeros or, where it was discarded, as [`DISCARDED`].
#[derive(Clone, Default)]
pub struct Store {
    chunks: BTreeMap<u64, Arc<[u8; CHUNK as usize]>>,
    /// Discarded runs of chunks, first to end; a chunk in `chunks` comes before them.
    discarded: BTreeMap<u64, u64>,
}

impl Store {
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        let mut done = 0;
        while done < buf.len() {
            let (chunk, within, len) = piece(offset + done as u64, buf.len() - done);
            let target = &mut buf[done..done + len];
            match self.chunks.get(&chunk) {
                Some(bytes) => target.copy_from_slice(&bytes[within..within + len]),
                None => target.fill(self.blank(chunk)),
            }
            done += len;
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let (chunk, within, len) = piece(offset + done as u64, data.len() - done);
            let blank = self.blank(chunk);
            let bytes = self.chunks.entry(chunk).or_insert_with(|| Arc::new([blank; CHUNK as usize]));
            Arc::make_mut(bytes)[within..within + len].copy_from_slice(&data[done..done + len]);
            done += len;
        }
    }

    /// Fills a range with zeros or the discard pattern, at no cost for its inner part.
    pub fn fill(&mut self, offset: u64, len: u64, discard: bool) {
        let byte = if discard { DISCARDED } else { 0 };
        let end = offset + len;
        let (first, last) = (offset.div_ceil(CHUNK), end / CHUNK);
        if first >= last {
            self.write(offset, &vec![byte; len as usize]);
            return;
        }
        self.write(offset, &vec![byte; (first * CHUNK - offset) as usize]);
        self.write(last * CHUNK, &vec![byte; (end - last * CHUNK) as usize]);
        let mut tail = self.chunks.split_off(&first);
        self.chunks.append(&mut tail.split_off(&last));
        self.forget_discarded(first, last);
        if discard {
            self.discarded.insert(first, last);
        }
    }

    fn blank(&self, chunk: u64) -> u8 {
        match self.discarded.range(..=chunk).next_back() {
            Some((_, end)) if *end > chunk => DISCARDED,
            _ => 0,
        }
    }

    fn forget_discarded(&mut self, first: u64, last: u64) {
        let touched: Vec<(u64, u64)> = self
            .discarded
            .range(..last)
            .rev()
            .take_while(|(_, end)| **end > first)
            .map(|(start, end)| (*start, *end))
            .collect();
        for (start, end) in touched {
            self.discarded.remove(&start);
            if start < first {
                self.discarded.insert(start, first);
            }
            if end > last {
                self.discarded.insert(last, end);
            }
        }
    }
}

/// The part of a range that lies in its first chunk: chunk, offset within, length.
fn piece(offset: u64, left: usize) -> (u64, usize, usize) {
    let within = (offset % CHUNK) as usize;
    (offset / CHUNK, within, left.min(CHUNK as usize - within))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rt::sim::SimRng;

    fn bytes(store: &Store, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![1; len];
        store.read(offset, &mut buf);
        buf
    }

    #[test]
    fn agrees_with_plain_memory() {
        const SIZE: u64 = 64 * 1024;
        let mut rng = SimRng::new(11, 0);
        let mut store = Store::default();
        let mut model = vec![0u8; SIZE as usize];
        for _ in 0..3000 {
            let offset = rng.below(SIZE / 512) * 512;
            let len = (rng.between(1, 40) * 512).min(SIZE - offset);
            let range = offset as usize..(offset + len) as usize;
            match rng.below(3) {
                0 => {
                    let data = vec![rng.below(256) as u8; len as usize];
                    store.write(offset, &data);
                    model[range].copy_from_slice(&data);
                }
                choice => {
                    store.fill(offset, len, choice == 1);
                    model[range].fill(if choice == 1 { DISCARDED } else { 0 });
                }
            }
        }
        assert_eq!(bytes(&store, 0, SIZE as usize), model);
    }

    #[test]
    fn huge_ranges_cost_nothing() {
        let mut store = Store::default();
        store.fill(512, 64 << 40, true);
        assert_eq!(bytes(&store, 0, 1024)[511..514], [0, DISCARDED, DISCARDED]);
        let copy = store.clone();
        store.fill(0, 64 << 40, false);
        assert_eq!(bytes(&store, 1 << 40, 2), [0, 0]);
        assert_eq!(bytes(&copy, 1 << 40, 2), [DISCARDED, DISCARDED]);
        assert!(store.chunks.len() < 4);
    }
}
