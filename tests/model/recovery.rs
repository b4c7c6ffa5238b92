//! Death and recovery as a bounded model.

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
