//! A wrapper that counts commands by kind, so that tests can say how many swaps, writes and flushes
//! something costs. Changes nothing that passes through it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry, Fencing};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        #[derive(Default)]
        struct Counters { $($name: AtomicU64),+ }

        /// Counts since the wrapper was made, or between two snapshots. Commands are counted when
        /// they end; bytes are those of commands that succeeded.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct CommandCounts { $($(#[$doc])* pub $name: u64),+ }

        impl Counters {
            fn snapshot(&self) -> CommandCounts {
                CommandCounts { $($name: self.$name.load(Ordering::Relaxed)),+ }
            }
        }

        impl CommandCounts {
            /// What was added since `earlier`.
            pub fn since(&self, earlier: &CommandCounts) -> CommandCounts {
                CommandCounts { $($name: self.$name.saturating_sub(earlier.$name)),+ }
            }
        }
    };
}

counters! {
    reads,
    read_bytes,
    writes,
    write_bytes,
    /// Compare-and-writes that wrote.
    swapped,
    /// Compare-and-writes that found another image.
    miscompared,
    /// Compare-and-writes without an answer.
    swap_errors,
    flushes,
    discards,
    discard_bytes,
    zeroes,
    zero_bytes,
    /// Failed commands of all kinds, swaps included.
    errors,
}

impl CommandCounts {
    /// Compare-and-writes, whatever became of them.
    pub fn swaps(&self) -> u64 {
        self.swapped + self.miscompared + self.swap_errors
    }
}

/// Counts what passes through to the device inside.
pub struct Counting<D: BlockDevice + ?Sized> {
    inner: Arc<D>,
    counters: Counters,
}

impl<D: BlockDevice + ?Sized> Counting<D> {
    pub fn new(inner: Arc<D>) -> Self {
        Counting { inner, counters: Counters::default() }
    }

    /// The device inside.
    pub fn inner(&self) -> &Arc<D> {
        &self.inner
    }

    /// The counts at this moment; not one atomic picture while commands are running.
    pub fn counts(&self) -> CommandCounts {
        self.counters.snapshot()
    }

    fn note<T>(
        &self,
        result: Result<T, DeviceError>,
        commands: &AtomicU64,
        bytes: Option<(&AtomicU64, u64)>,
    ) -> Result<T, DeviceError> {
        commands.fetch_add(1, Ordering::Relaxed);
        match (&result, bytes) {
            (Err(_), _) => drop(self.counters.errors.fetch_add(1, Ordering::Relaxed)),
            (Ok(_), Some((counter, count))) => drop(counter.fetch_add(count, Ordering::Relaxed)),
            (Ok(_), None) => {}
        }
        result
    }
}

impl<D: BlockDevice + ?Sized> BlockDevice for Counting<D> {
    fn geometry(&self) -> DeviceGeometry {
        self.inner.geometry()
    }

    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let len_bytes = buf.len() as u64;
        let result = self.inner.read(offset_bytes, buf);
        self.note(result, &self.counters.reads, Some((&self.counters.read_bytes, len_bytes)))
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        let result = self.inner.write(offset_bytes, data);
        self.note(result, &self.counters.writes, Some((&self.counters.write_bytes, data.len() as u64)))
    }

    fn compare_and_write(
        &self,
        offset_bytes: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<CompareOutcome, DeviceError> {
        let result = self.inner.compare_and_write(offset_bytes, expected, new);
        let counter = match &result {
            Ok(CompareOutcome::Swapped) => &self.counters.swapped,
            Ok(CompareOutcome::Miscompare) => &self.counters.miscompared,
            Err(_) => &self.counters.swap_errors,
        };
        self.note(result, counter, None)
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let result = self.inner.flush();
        self.note(result, &self.counters.flushes, None)
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        let result = self.inner.discard(offset_bytes, len_bytes);
        self.note(result, &self.counters.discards, Some((&self.counters.discard_bytes, len_bytes)))
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        let result = self.inner.write_zeroes(offset_bytes, len_bytes);
        self.note(result, &self.counters.zeroes, Some((&self.counters.zero_bytes, len_bytes)))
    }

    fn resets(&self) -> u64 {
        self.inner.resets()
    }

    fn about(&self) -> Vec<(&'static str, String)> {
        self.inner.about()
    }

    fn own_nexus(&self) -> bool {
        self.inner.own_nexus()
    }

    fn unit_name(&self) -> Option<String> {
        self.inner.unit_name()
    }

    fn fencing(&self) -> Option<&dyn Fencing> {
        self.inner.fencing()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::open::{OpenOptions, open_device};

    #[test]
    fn every_kind_is_counted_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let options = OpenOptions {
            create_size: Some(1 << 20),
            logical_block_bytes: Some(512),
            ..OpenOptions::default()
        };
        let device = Counting::new(open_device(file.path().to_str().unwrap(), options).unwrap());
        device.write(0, &[1; 1024]).unwrap();
        let before = device.counts();
        assert_eq!((before.writes, before.write_bytes), (1, 1024));
        device.read(0, &mut [0; 512]).unwrap();
        assert_eq!(device.compare_and_write(0, &[1; 512], &[2; 512]).unwrap(), CompareOutcome::Swapped);
        assert_eq!(device.compare_and_write(0, &[1; 512], &[3; 512]).unwrap(), CompareOutcome::Miscompare);
        device.compare_and_write(7, &[1; 512], &[3; 512]).unwrap_err();
        device.flush().unwrap();
        device.write_zeroes(0, 4096).unwrap();
        let expected = CommandCounts {
            reads: 1,
            read_bytes: 512,
            swapped: 1,
            miscompared: 1,
            swap_errors: 1,
            flushes: 1,
            zeroes: 1,
            zero_bytes: 4096,
            errors: 1,
            ..CommandCounts::default()
        };
        assert_eq!(device.counts().since(&before), expected);
        assert_eq!(expected.swaps(), 3);
    }
}
