//! Death and recovery as a bounded model, beside that of the locks.
//!
//! # What is modelled
//!
//! - One or two locks with a block each; two or three hosts, each in its slot. Tenures and change counters.
//! - Journals: a host logs images under its tenures, whole transactions over one or both blocks, commits, puts in
//!   place. The ring is never trimmed, so that recovery meets more old images than it ever would.
//! - The end of a host before, at or after any of its commands: a crash, standing still for longer than the lease (and
//!   waking up), a withdrawal. The command on its way executes later, or never. Recoverers end likewise, and are
//!   recovered by others.
//! - Time in the abstract. A host that ended is past its lease; `DeadTimePasses` is the others' verdict, and what it
//!   sent has landed by then or never will. On a device that *lies* nothing of that is so, and only a fence helps.
//! - Recovery in the order of `src/recovery.rs`, one command a step; a host's own next life, which recovers the last.
//! - A volatile cache: each block is destaged for itself, a power loss takes back the rest.
//!
//! What a block contains is the set of changes made to it, so that a lost, an undone and a torn change all show.
//! The properties are in `recovery/check.rs`. Progress is `PROGRESS` in each state, and no cycle among the states.
//!
//! # What the lock model has proved, and why it may be left out here
//!
//! - Requests, doorbells, queues: here a holder knows who waits. All that they decide is *when* which waiter gets the
//!   lock, and every holder's choice is explored.
//! - Unknown outcomes of hosts that live: there, such a host goes on only after another swap from the same image, so it
//!   stands where a host stands whose answer came. The late swaps of those that ended are here.
//! - Shares: nothing is logged under one, so nothing of a dead sharer is replayed. That nobody takes its bit for free
//!   before its lease has ended follows from the same verdict.
//! - Reading a lock and its owner's slot is one step: the image is read first, and a swap proves it.
//! - Nonces: who wrote an image, and its counters, stand for one. They repeat only if the same life swaps the same
//!   image again after a power loss, and lives with a late swap swap nothing more.
//!
//! # What is not modelled
//!
//! Leaving cleanly (the lock model), file data, revokes, torn or damaged journals, verdicts that are unrecoverable,
//! fences that fail, a late command whose host goes on inside its lease (it waits, `Door::until_known`), several late
//! commands of one host.

pub mod check;

mod apply;
mod possible;
mod replay;
mod rules;
mod state;
mod tests;

use rules::Rule;
use state::*;

/// What a thread of a host wants to do, under all these locks at once.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    pub locks: Locks,
    pub changes: bool,
}

/// One bounded system.
#[derive(Clone, Debug)]
pub struct Recovery {
    pub name: &'static str,
    /// The rules that are taken out.
    pub without: Vec<Rule>,
    /// What each host wants, one after the other; host `h` lives in slot `h`.
    pub wants: Vec<Vec<Want>>,
    /// How hosts end.
    pub fails: Vec<How>,
    pub stops: u8,
    /// Hosts that come back.
    pub lives: u8,
    pub power_losses: u8,
    /// The device can shut a host out.
    pub fences: bool,
    /// A command can come after the hold time that the device publishes.
    pub lies: bool,
    /// More swaps of one block than any run within these bounds needs.
    pub most_swaps: u8,
}

/// What a host does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    /// Swap a lock that is free, or whose owner is settled.
    Take(usize),
    /// Find that the lock names us.
    FindGrant(usize),
    HandOver(usize, usize),
    /// Do what is wanted, in memory.
    Use,
    /// Append what changed to the journal.
    Commit,
    /// Write in place what is committed.
    Checkpoint(usize),
    Flush,
    /// A gone host's next life.
    Claim,
    BeginJournal,
    /// Swap our own slot to withdrawn.
    Farewell,
    /// Swap a dead one's slot to recovering.
    Mark(u8),
    Fence,
    /// Read the journal.
    Scan,
    /// Read one lock and, if it still is the dead one's, swap it once.
    Pin,
    PutInPlace,
    /// Swap the slot to recovered; for our own next life: settle the last one.
    Publish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    Answered,
    /// The host ends with the command on its way.
    Late(How),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Do(usize, Deed, End),
    /// The host ends between two commands.
    Stop(usize, How),
    /// A host that stood still for longer than its lease goes on.
    Wake(usize),
    /// A slot was seen unchanged for its dead time and its hold time.
    DeadTimePasses(u8),
    /// A late command executes.
    Execute(usize),
    /// A late command never executes.
    Vanish(usize),
    PowerLoss,
    /// The device empties its cache by itself.
    DestageLock(usize),
    DestageBlock(usize),
    DestageSlot(usize),
    DestageJournal(usize),
}

impl Recovery {
    pub fn has(&self, rule: Rule) -> bool {
        !self.without.contains(&rule)
    }

    pub fn initial(&self) -> System {
        let hosts = std::array::from_fn(|h| Host {
            life: if h < self.wants.len() { Life::Running } else { Life::Gone },
            me: Name { slot: h as u8, incarnation: 1 },
            begun: if h < self.wants.len() { Begun::Yes } else { Begun::No },
            wants_done: 0,
            locks: [NOTHING; MAX_LOCKS],
            replay: None,
        });
        let slot =
            SlotRecord { incarnation: 1, state: SlotState::Live, beat: 1, settled_up_to: 0, recoverer: None };
        let now = Media {
            locks: [Record::FREE; MAX_LOCKS],
            blocks: [0; MAX_LOCKS],
            slots: [slot; MAX_HOSTS],
            journals: std::array::from_fn(|_| Journal { incarnation: 1, images: Vec::new() }),
        };
        let durable = (self.power_losses > 0).then(|| now.clone());
        System {
            lun: Lun { now, durable, late: Vec::new(), fenced: [0; MAX_HOSTS] },
            hosts,
            silent: [false; MAX_HOSTS],
            stops_left: self.stops,
            lives_left: self.lives,
            power_losses_left: self.power_losses,
            made: Vec::new(),
            acknowledged: [0; MAX_LOCKS],
            published: [0; MAX_HOSTS],
            taken_from: [None; MAX_LOCKS],
            stepped_over: false,
            undone: false,
        }
    }
}
