//! What is on the LUN, what each host remembers, and what the observers know.

pub use super::super::state::{Held, MAX_HOSTS, Mode, Name, Record};

/// A set of changes, one bit each: what a covered block contains.
pub type Changes = u8;

/// A set of locks, one bit each. Each lock covers one block.
pub type Locks = u8;

pub const MAX_LOCKS: usize = 2;

pub fn locks_in(set: Locks) -> impl Iterator<Item = usize> {
    (0..MAX_LOCKS).filter(move |lock| set & 1 << lock != 0)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotState {
    Live,
    Withdrawn,
    Recovering,
    Recovered,
}

/// A heartbeat slot. Beats as such are not modelled: `beat` counts the swaps that say something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotRecord {
    pub incarnation: u8,
    pub state: SlotState,
    pub beat: u8,
    pub settled_up_to: u8,
    pub recoverer: Option<Name>,
}

impl SlotRecord {
    pub fn settled(&self, incarnation: u8) -> bool {
        incarnation <= self.settled_up_to
    }
}

/// A committed image of the block under a lock. Of the images made under one tenure the last counts, so that
/// a journal keeps no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Logged {
    pub lock: usize,
    pub tenure: u8,
    pub content: Changes,
}

/// The ring of a slot: the life that began it, and all that it committed. It is never trimmed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Journal {
    pub incarnation: u8,
    pub images: Vec<Logged>,
}

/// What a power loss can take back, each block for itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Media {
    pub locks: [Record; MAX_LOCKS],
    pub blocks: [Changes; MAX_LOCKS],
    pub slots: [SlotRecord; MAX_HOSTS],
    pub journals: [Journal; MAX_HOSTS],
}

impl Media {
    pub fn settled(&self, name: Name) -> bool {
        self.slots[name.slot as usize].settled(name.incarnation)
    }

    pub fn resident(&self, slot: u8) -> Name {
        Name { slot, incarnation: self.slots[slot as usize].incarnation }
    }
}

/// A command that changes something.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    SwapLock {
        lock: usize,
        base: Record,
        new: Record,
    },
    SwapSlot {
        slot: u8,
        base: SlotRecord,
        new: SlotRecord,
    },
    /// A transaction, whole.
    Append {
        slot: u8,
        incarnation: u8,
        images: Vec<Logged>,
    },
    /// The journal of a new life.
    BeginJournal {
        slot: u8,
        incarnation: u8,
    },
    WriteInPlace {
        lock: usize,
        content: Changes,
    },
}

impl Command {
    /// Nothing compares what it meets.
    pub fn is_plain(&self) -> bool {
        !matches!(self, Command::SwapLock { .. } | Command::SwapSlot { .. })
    }
}

/// A command on its way whose host does not wait for it any more.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Late {
    pub by: Name,
    pub command: Command,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lun {
    pub now: Media,
    /// What a power loss leaves; only while one can still come.
    pub durable: Option<Media>,
    pub late: Vec<Late>,
    /// Of each slot the incarnations whose key is shut out, one bit each.
    pub fenced: [u8; MAX_HOSTS],
}

impl Lun {
    pub fn is_fenced(&self, name: Name) -> bool {
        self.fenced[name.slot as usize] & 1 << name.incarnation != 0
    }
}

/// How a host ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum How {
    /// The process is gone and its machine knows it.
    Crash,
    /// It stands still for longer than its lease and wakes up some time.
    Freeze,
    /// A command of its failed for good: its lease ends, and it wants to say so in its slot.
    Withdraw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Life {
    /// Inside its lease.
    Running,
    Withdrawing,
    Frozen,
    Gone,
}

/// How far the content in memory got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    InPlace,
    Changed,
    /// In the journal, not flushed.
    Logged,
    /// Acknowledged as durable.
    Committed,
    /// Written in place, not flushed.
    Written,
}

/// What a host has of one lock and of the block that it covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Holding {
    pub held: Held,
    /// The highest own tenure that ended.
    pub ended: u8,
    pub cache: Option<Changes>,
    /// The change counter that belongs to `cache`.
    pub cache_counter: u8,
    pub way: Way,
    /// Granted for what is wanted now, and not used yet.
    pub unused: bool,
    /// Something changed in this tenure.
    pub dirtied: bool,
    /// An image that grants us the lock and is not flushed; whether the device was reset since.
    pub seen: Option<(Record, bool)>,
}

pub const NOTHING: Holding = Holding {
    held: Held::Nothing,
    ended: 0,
    cache: None,
    cache_counter: 0,
    way: Way::InPlace,
    unused: false,
    dirtied: false,
    seen: None,
};

/// Where a recoverer stands, in the order of `src/recovery.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    FlushMark,
    Fence,
    Scan,
    Pin,
    FlushPins,
    PutInPlace,
    FlushPlaced,
    Publish,
    FlushPublished,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replay {
    pub slot: u8,
    /// The slot as we left it: the mark, or the claim of our own next life.
    pub marked: SlotRecord,
    pub stage: Stage,
    /// Scanned, its lock not pinned yet.
    pub images: Vec<Logged>,
    /// To be put in place.
    pub valid: Vec<Logged>,
    /// The device was reset since the last flush.
    pub reset: bool,
}

/// The journal of a life: it can log once that is begun and flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Begun {
    No,
    Written,
    Yes,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub life: Life,
    pub me: Name,
    pub begun: Begun,
    pub wants_done: u8,
    pub locks: [Holding; MAX_LOCKS],
    pub replay: Option<Replay>,
}

/// For the observers: one change, by whom and under which locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Made {
    pub by: Name,
    pub locks: Locks,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct System {
    pub lun: Lun,
    pub hosts: [Host; MAX_HOSTS],
    /// The dead time of the life in this slot is over.
    pub silent: [bool; MAX_HOSTS],
    pub stops_left: u8,
    pub lives_left: u8,
    pub power_losses_left: u8,
    /// Observer: every change that was ever made.
    pub made: Vec<Made>,
    /// Observer: what was acknowledged as durable, by block.
    pub acknowledged: [Changes; MAX_LOCKS],
    /// Observer: up to which life of each slot somebody published that it is settled, whatever a power loss took
    /// back since.
    pub published: [u8; MAX_HOSTS],
    /// Observer: from whom a lock was taken that nobody acted on yet.
    pub taken_from: [Option<Name>; MAX_LOCKS],
    /// Observer: somebody acted on the lock of a life that was not settled.
    pub stepped_over: bool,
    /// Observer: a block lost a change that was in place.
    pub undone: bool,
}
