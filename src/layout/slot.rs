//! The heartbeat slot: a host's sign of life, its terms, and what became of it.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Header, LayoutError, Magic, Nonce, RECORD_BYTES, seal, verify};
use crate::types::{BlockNo, Incarnation, MAX_SLOTS, Owner, Slot, VolumeId};

/// What a slot says about its host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotState {
    /// Never claimed since mkfs.
    Free,
    /// Claimed; alive as long as the beat moves.
    Live,
    /// The incarnation left cleanly: nothing of it is outstanding, its locks are free.
    Left,
    /// The host gave up by itself and may be recovered at once.
    Withdrawn,
    /// Declared dead; `recoverer` replays its journal.
    Recovering,
    /// Everything the incarnation owed is in place; its locks are free.
    Recovered,
    /// Its journal can't be replayed: what it held gives EIO until fsck repaired it.
    Unrecoverable,
}

/// All durations that others must know to judge this host, in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Durations {
    /// Between two beats.
    pub beat_ms: u32,
    /// The owner stops this long after the issue of its last beat that landed.
    pub lease_ms: u32,
    /// Others call it dead after this long without a change, plus `hold_ms`.
    pub dead_ms: u32,
    /// The longest time anything below the owner can hold a write.
    pub hold_ms: u32,
}

/// A slot record as hosts reason about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotRecord {
    pub address: BlockNo,
    pub state: SlotState,
    /// The life that holds or last held the slot; 0 before the first claim.
    pub incarnation: Incarnation,
    /// Raised by each beat.
    pub beat: u64,
    pub host_uuid: [u8; 16],
    pub host_name: String,
    pub boot_id: [u8; 16],
    pub pid: u32,
    /// Inode number of the process id namespace of the daemon.
    pub pid_namespace: u64,
    pub durations: Durations,
    pub logical_block_bytes: u32,
    pub protocol: u32,
    /// Feature bits this program knows: compat, ro-compat, incompat.
    pub features: [u64; 3],
    pub fencing_key: u64,
    /// Who recovers or recovered this slot.
    pub recoverer: Option<Owner>,
    /// Everything of this and earlier incarnations is recovered or left cleanly.
    pub settled_up_to: Incarnation,
    /// One of the earlier incarnations that are not settled yet had no fencing key: no fence proves it silent.
    pub keyless: bool,
    /// The device refuses whatever may still come of this and earlier incarnations.
    pub fenced_up_to: Incarnation,
    /// Blocks allocated minus blocks freed by all lives of this slot since mkfs.
    pub net_blocks: i64,
    /// Inodes allocated minus inodes freed, likewise.
    pub net_inodes: i64,
    /// The host's wall clock at the beat, in nanoseconds since 1970: shows skew, decides nothing.
    pub wall_ns: i64,
    pub nonce: Nonce,
}

/// Lives of one slot that are looked after at once when none of them was settled.
const MOST_UNSETTLED: u64 = 64;

/// Longest host name kept, in bytes.
pub const HOST_NAME_BYTES: usize = 64;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SlotDisk {
    /*000*/ header: Header,
    /*040*/ state: u8,
    /*041*/ flags: u8,
    /*042*/ recoverer_slot: U16,
    /*044*/ logical_block_bytes: U32,
    /*048*/ incarnation: U64,
    /*050*/ beat: U64,
    /*058*/ host_uuid: [u8; 16],
    /*068*/ boot_id: [u8; 16],
    /*078*/ host_name: [u8; HOST_NAME_BYTES],
    /*0b8*/ pid: U32,
    /*0bc*/ protocol: U32,
    /*0c0*/ pid_namespace: U64,
    /*0c8*/ beat_ms: U32,
    /*0cc*/ lease_ms: U32,
    /*0d0*/ dead_ms: U32,
    /*0d4*/ hold_ms: U32,
    /*0d8*/ features: [U64; 3],
    /*0f0*/ fencing_key: U64,
    /*0f8*/ recoverer_incarnation: U64,
    /*100*/ settled_up_to: U64,
    /*108*/ net_blocks: I64,
    /*110*/ net_inodes: I64,
    /*118*/ wall_ns: I64,
    /*120*/ fenced_up_to: U64,
    /*128*/ reserved: [u8; 216],
}
const _: () = assert!(size_of::<SlotDisk>() == RECORD_BYTES);

const FLAG_RECOVERER: u8 = 1;
const FLAG_KEYLESS: u8 = 2;

impl SlotState {
    const ALL: [SlotState; 7] = [
        SlotState::Free,
        SlotState::Live,
        SlotState::Left,
        SlotState::Withdrawn,
        SlotState::Recovering,
        SlotState::Recovered,
        SlotState::Unrecoverable,
    ];
    fn code(self) -> u8 {
        match self {
            SlotState::Free => 1,
            SlotState::Live => 2,
            SlotState::Left => 3,
            SlotState::Withdrawn => 4,
            SlotState::Recovering => 5,
            SlotState::Recovered => 6,
            SlotState::Unrecoverable => 7,
        }
    }
}

impl SlotRecord {
    /// A slot that nobody ever claimed, as mkfs writes it.
    pub fn new_free(address: BlockNo) -> Self {
        SlotRecord {
            address,
            state: SlotState::Free,
            incarnation: Incarnation(0),
            beat: 0,
            host_uuid: [0; 16],
            host_name: String::new(),
            boot_id: [0; 16],
            pid: 0,
            pid_namespace: 0,
            durations: Durations { beat_ms: 0, lease_ms: 0, dead_ms: 0, hold_ms: 0 },
            logical_block_bytes: 0,
            protocol: 0,
            features: [0; 3],
            fencing_key: 0,
            recoverer: None,
            settled_up_to: Incarnation(0),
            keyless: false,
            fenced_up_to: Incarnation(0),
            net_blocks: 0,
            net_inodes: 0,
            wall_ns: 0,
            nonce: Nonce::default(),
        }
    }

    /// Writes the record into the first [`RECORD_BYTES`] of `block`, sealed; the rest is kept.
    pub fn encode(&self, volume: VolumeId, block: &mut [u8]) {
        let mut header = Header::new(Magic::Slot, volume, self.address, BlockNo(0));
        header.nonce = self.nonce.0;
        let mut host_name = [0; HOST_NAME_BYTES];
        let mut name_len = self.host_name.len().min(HOST_NAME_BYTES);
        while !self.host_name.is_char_boundary(name_len) {
            name_len -= 1;
        }
        host_name[..name_len].copy_from_slice(&self.host_name.as_bytes()[..name_len]);
        let disk = SlotDisk {
            header,
            state: self.state.code(),
            flags: if self.recoverer.is_some() { FLAG_RECOVERER } else { 0 }
                | if self.keyless { FLAG_KEYLESS } else { 0 },
            recoverer_slot: U16::new(self.recoverer.map_or(0, |o| o.slot.0)),
            logical_block_bytes: U32::new(self.logical_block_bytes),
            incarnation: U64::new(self.incarnation.0),
            beat: U64::new(self.beat),
            host_uuid: self.host_uuid,
            boot_id: self.boot_id,
            host_name,
            pid: U32::new(self.pid),
            protocol: U32::new(self.protocol),
            pid_namespace: U64::new(self.pid_namespace),
            beat_ms: U32::new(self.durations.beat_ms),
            lease_ms: U32::new(self.durations.lease_ms),
            dead_ms: U32::new(self.durations.dead_ms),
            hold_ms: U32::new(self.durations.hold_ms),
            features: self.features.map(U64::new),
            fencing_key: U64::new(self.fencing_key),
            recoverer_incarnation: U64::new(self.recoverer.map_or(0, |o| o.incarnation.0)),
            settled_up_to: U64::new(self.settled_up_to.0),
            net_blocks: I64::new(self.net_blocks),
            net_inodes: I64::new(self.net_inodes),
            wall_ns: I64::new(self.wall_ns),
            fenced_up_to: U64::new(self.fenced_up_to.0),
            reserved: [0; 216],
        };
        block[..RECORD_BYTES].copy_from_slice(disk.as_bytes());
        seal(&mut block[..RECORD_BYTES]);
    }

    /// Reads and checks the record at the start of `block`.
    pub fn decode(block: &[u8], volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError> {
        let what = Magic::Slot.name();
        let bytes = block.get(..RECORD_BYTES).ok_or(LayoutError::Short { what, at })?;
        verify(bytes, Magic::Slot, volume, at)?;
        let disk = SlotDisk::read_from_bytes(bytes).map_err(|_| LayoutError::Short { what, at })?;
        let bad = |field, value| LayoutError::Field { what, at, field, value };
        let state = SlotState::ALL
            .into_iter()
            .find(|s| s.code() == disk.state)
            .ok_or_else(|| bad("state", disk.state.into()))?;
        let claimed = state != SlotState::Free;
        if claimed && disk.incarnation.get() == 0 {
            return Err(bad("incarnation", 0));
        }
        if claimed && !matches!(disk.logical_block_bytes.get(), 512 | 4096) {
            return Err(bad("logical_block_bytes", disk.logical_block_bytes.get().into()));
        }
        if claimed && (disk.dead_ms.get() == 0 || disk.lease_ms.get() >= disk.dead_ms.get()) {
            return Err(bad("dead_ms", disk.dead_ms.get().into()));
        }
        let recoverer = match disk.flags & FLAG_RECOVERER {
            0 => None,
            _ if disk.recoverer_slot.get() >= MAX_SLOTS => {
                return Err(bad("recoverer_slot", disk.recoverer_slot.get().into()));
            }
            _ => Some(Owner {
                slot: Slot(disk.recoverer_slot.get()),
                incarnation: Incarnation(disk.recoverer_incarnation.get()),
            }),
        };
        let name_len = disk.host_name.iter().position(|b| *b == 0).unwrap_or(HOST_NAME_BYTES);
        Ok(SlotRecord {
            address: at,
            state,
            incarnation: Incarnation(disk.incarnation.get()),
            beat: disk.beat.get(),
            host_uuid: disk.host_uuid,
            host_name: String::from_utf8_lossy(&disk.host_name[..name_len]).into_owned(),
            boot_id: disk.boot_id,
            pid: disk.pid.get(),
            pid_namespace: disk.pid_namespace.get(),
            durations: Durations {
                beat_ms: disk.beat_ms.get(),
                lease_ms: disk.lease_ms.get(),
                dead_ms: disk.dead_ms.get(),
                hold_ms: disk.hold_ms.get(),
            },
            logical_block_bytes: disk.logical_block_bytes.get(),
            protocol: disk.protocol.get(),
            features: disk.features.map(|f| f.get()),
            fencing_key: disk.fencing_key.get(),
            recoverer,
            settled_up_to: Incarnation(disk.settled_up_to.get()),
            keyless: disk.flags & FLAG_KEYLESS != 0,
            fenced_up_to: Incarnation(disk.fenced_up_to.get()),
            net_blocks: disk.net_blocks.get(),
            net_inodes: disk.net_inodes.get(),
            wall_ns: disk.wall_ns.get(),
            nonce: Nonce(disk.header.nonce),
        })
    }

    /// Has this incarnation been settled: left cleanly, or recovered? Its locks are then free.
    pub fn settled(&self, incarnation: Incarnation) -> bool {
        incarnation <= self.settled_up_to
    }

    /// The incarnations of which something may still be outstanding, the newest last.
    pub fn unsettled(&self) -> impl DoubleEndedIterator<Item = Incarnation> {
        // A volume on which so many begin and never end has other troubles; the oldest go first.
        let newest = self.incarnation.0;
        let first = self.settled_up_to.0.saturating_add(1).max(newest.saturating_sub(MOST_UNSETTLED));
        (first..=newest).map(Incarnation)
    }

    /// Does the device refuse what may come of any life the slot had? Then nothing late can reach its journal.
    pub fn is_fenced(&self) -> bool {
        self.fenced_up_to >= self.incarnation
    }

    /// Who lives here, if the slot is claimed by a host that has not ended its life itself.
    pub fn living(&self, slot: Slot) -> Option<Owner> {
        (self.state == SlotState::Live).then_some(Owner { slot, incarnation: self.incarnation })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BLOCK_BYTES;

    #[test]
    fn round_trip_and_bad_fields() {
        let volume = VolumeId([3; 16]);
        let mut record = SlotRecord::new_free(BlockNo(20));
        let mut block = [0u8; BLOCK_BYTES];
        record.encode(volume, &mut block);
        assert_eq!(SlotRecord::decode(&block, volume, BlockNo(20)), Ok(record.clone()));
        record.state = SlotState::Live;
        record.incarnation = Incarnation(4);
        record.host_name = "hypervisor-ä".repeat(8);
        record.logical_block_bytes = 512;
        record.durations = Durations { beat_ms: 1000, lease_ms: 8000, dead_ms: 16000, hold_ms: 0 };
        record.recoverer = Some(Owner { slot: Slot(3), incarnation: Incarnation(5) });
        record.net_blocks = -4;
        record.keyless = true;
        record.fenced_up_to = Incarnation(3);
        record.encode(volume, &mut block);
        let back = SlotRecord::decode(&block, volume, BlockNo(20)).unwrap();
        assert!(record.host_name.starts_with(&back.host_name) && back.host_name.len() > 50);
        record.host_name = back.host_name.clone();
        assert_eq!(back, record);
        record.durations.lease_ms = 16000;
        record.encode(volume, &mut block);
        assert!(matches!(
            SlotRecord::decode(&block, volume, BlockNo(20)),
            Err(LayoutError::Field { field: "dead_ms", .. })
        ));
    }
}
