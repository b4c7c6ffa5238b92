//! Reading ahead: while a check looks at some blocks, threads read those that it will ask for next. One command at a
//! time leaves a LUN idle most of the time, and a large volume has hundreds of thousands.
//!
//! * What was read and not yet taken is bounded by [`MOST_BLOCKS`]; who wants more is told no, and reads it later itself.
//! * A read that fails here is forgotten: whoever asks for the blocks reads them again and gets the error.
//! * Buffers are allocated by who wants, never by the threads, and large ones are used again: an allocator with a heap for each
//!   thread keeps what was freed in each, and took 400 MiB for these 32.
//! * Findings don't depend on it: blocks are taken in the order in which they would be read.
//!
//! Not for: small volumes (a simulation would only have more threads to switch between), anything that is written.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::device::{AlignedBuf, BlockDevice};
use crate::rt::{self, Condvar, JoinHandle, Mutex};
use crate::types::{BLOCK_BYTES, BlockNo};

/// 32 MiB.
const MOST_BLOCKS: u64 = 8192;
const THREADS: usize = 8;
/// What is worth keeping: a whole run of inode groups.
const LARGE_BYTES: usize = 256 * BLOCK_BYTES;
const MOST_SPARE: usize = 16;

/// First block and how many.
type Run = (BlockNo, u64);

enum Got {
    Waiting(AlignedBuf),
    Reading,
    /// None: it failed.
    Done(Option<AlignedBuf>),
}

#[derive(Default)]
struct State {
    queue: VecDeque<Run>,
    runs: BTreeMap<Run, Got>,
    /// Of all runs.
    blocks: u64,
    /// Buffers of [`LARGE_BYTES`] that were given back.
    spare: Vec<AlignedBuf>,
    ended: bool,
}

struct Shared {
    device: Arc<dyn BlockDevice>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The threads; they end with it.
pub struct Ahead {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Ahead {
    pub fn start(device: Arc<dyn BlockDevice>) -> Self {
        let shared = Arc::new(Shared { device, state: Mutex::default(), changed: Condvar::default() });
        let start = |_| {
            let shared = shared.clone();
            // Without threads everything is read when it is asked for.
            rt::try_spawn("fsck-ahead", move || shared.read_on()).ok()
        };
        let threads = (0..THREADS).filter_map(start).collect();
        Ahead { shared, threads }
    }

    /// These will be asked for. False: enough is on its way.
    pub fn want(&self, first: BlockNo, blocks: u64) -> bool {
        let mut state = self.shared.state.lock();
        if self.threads.is_empty() || state.blocks + blocks > MOST_BLOCKS {
            return false;
        }
        if !state.runs.contains_key(&(first, blocks)) {
            let bytes = blocks as usize * BLOCK_BYTES;
            let spare = if bytes == LARGE_BYTES { state.spare.pop() } else { None };
            let buf = spare.unwrap_or_else(|| AlignedBuf::zeroed(bytes));
            state.runs.insert((first, blocks), Got::Waiting(buf));
            state.queue.push_back((first, blocks));
            state.blocks += blocks;
            self.shared.changed.notify_all();
        }
        true
    }

    /// The bytes, if they were wanted and came; waits for those that are being read.
    pub fn take(&self, first: BlockNo, blocks: u64) -> Option<AlignedBuf> {
        let run = (first, blocks);
        let mut state = self.shared.state.lock();
        while matches!(state.runs.get(&run), Some(Got::Reading)) {
            state = self.shared.changed.wait(state);
        }
        // What nobody began to read is read by who asks, sooner.
        match state.remove(run)? {
            Got::Done(bytes) => bytes,
            Got::Waiting(buf) => {
                state.keep(buf);
                None
            }
            Got::Reading => None,
        }
    }

    /// What was taken is not needed any more.
    pub fn give_back(&self, buf: AlignedBuf) {
        self.shared.state.lock().keep(buf);
    }

    /// What was wanted and not asked for is not asked for any more.
    pub fn forget(&self) {
        let mut state = self.shared.state.lock();
        state.queue.clear();
        let runs: Vec<Run> = state.runs.keys().copied().collect();
        for run in runs {
            state.remove(run);
        }
    }
}

impl State {
    fn remove(&mut self, run: Run) -> Option<Got> {
        let got = self.runs.remove(&run)?;
        self.blocks -= run.1;
        Some(got)
    }

    fn keep(&mut self, buf: AlignedBuf) {
        if buf.len() == LARGE_BYTES && self.spare.len() < MOST_SPARE {
            self.spare.push(buf);
        }
    }
}

impl Shared {
    fn read_on(&self) {
        let mut state = self.state.lock();
        while !state.ended {
            let Some(run) = state.queue.pop_front() else {
                state = self.changed.wait(state);
                continue;
            };
            // Else it was asked for before its turn came.
            let Some(got @ Got::Waiting(_)) = state.runs.get_mut(&run) else { continue };
            let Got::Waiting(mut buf) = std::mem::replace(got, Got::Reading) else { continue };
            drop(state);
            let read = self.device.read(run.0.offset_bytes(), &mut buf);
            state = self.state.lock();
            if let Some(got @ Got::Reading) = state.runs.get_mut(&run) {
                *got = Got::Done(read.ok().map(|()| buf));
            }
            self.changed.notify_all();
        }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.shared.state.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // It panicked; what it should have read was read by others.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::{SimLun, SimLunOptions};
    use crate::rt::HostTag;

    #[test]
    fn what_is_wanted_comes_and_no_more_than_there_is_room_for() {
        let lun = SimLun::new(SimLunOptions { size_bytes: 1 << 30, ..SimLunOptions::default() });
        for block in 0..100u64 {
            lun.overwrite(block * 4096, &[block as u8; 4096]);
        }
        let ahead = Ahead::start(lun.attach(HostTag(0)));
        assert!(ahead.take(BlockNo(3), 1).is_none());
        (0..100).for_each(|block| assert!(ahead.want(BlockNo(block), 1)));
        for block in 0..100u64 {
            if let Some(bytes) = ahead.take(BlockNo(block), 1) {
                assert_eq!(bytes[..], [block as u8; 4096]);
            }
            assert!(ahead.take(BlockNo(block), 1).is_none(), "taken twice");
        }
        let most = MOST_BLOCKS / 256;
        (0..most).for_each(|i| assert!(ahead.want(BlockNo(i * 256), 256)));
        assert!(!ahead.want(BlockNo(most * 256), 256));
        // Past the end of the device.
        ahead.forget();
        assert!(ahead.want(BlockNo(1 << 40), 1));
        assert!(ahead.take(BlockNo(1 << 40), 1).is_none());
        assert!((0..most).all(|i| ahead.want(BlockNo(i * 256), 256)), "room is given back");
    }
}
