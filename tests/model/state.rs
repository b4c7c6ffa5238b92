//! What is on the LUN and what each host remembers.

/// A set of slots, one bit each.
pub type Slots = u8;

pub const MAX_HOSTS: usize = 3;

pub fn bit(slot: u8) -> Slots {
    1 << slot
}

/// The slots of a set, lowest first.
pub fn slots_in(set: Slots) -> impl Iterator<Item = u8> {
    (0..MAX_HOSTS as u8).filter(move |slot| set & bit(*slot) != 0)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    Free,
    Shared,
    Exclusive,
}

/// A host's name on disk: the slot it lives in and its incarnation there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Name {
    pub slot: u8,
    pub incarnation: u8,
}

/// The lock block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    pub mode: Mode,
    pub owner: Option<Name>,
    /// The swap counter at the granting swap while the mode is exclusive, else 0.
    pub tenure: u8,
    pub sharers: Slots,
    pub waiters: Slots,
    /// Exclusive: who comes next. Shared: who waits for exclusive, or whom this share was granted to.
    pub next: Option<Name>,
    pub swap_counter: u8,
    pub change_counter: u8,
    pub nonce: u8,
}

impl Record {
    pub const FREE: Record = Record {
        mode: Mode::Free,
        owner: None,
        tenure: 0,
        sharers: 0,
        waiters: 0,
        next: None,
        swap_counter: 1,
        change_counter: 1,
        nonce: 0,
    };

    /// What this image says that `me` holds.
    pub fn names(&self, me: Name) -> Held {
        match self.mode {
            Mode::Exclusive if self.owner == Some(me) => Held::Exclusive(self.tenure),
            Mode::Shared if self.sharers & bit(me.slot) != 0 => Held::Shared,
            _ => Held::Nothing,
        }
    }
}

/// What a host believes to hold; for exclusive, in which tenure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Held {
    Nothing,
    Shared,
    Exclusive(u8),
}

impl Held {
    pub fn suffices_for(self, mode: Mode) -> bool {
        match self {
            Held::Nothing => false,
            Held::Shared => mode == Mode::Shared,
            Held::Exclusive(_) => true,
        }
    }
}

/// The request block of a slot: what its host waits for. `age` is the swap counter seen when the wait began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    pub incarnation: u8,
    pub mode: Mode,
    pub age: u8,
}

/// The doorbell block of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bell {
    pub bits: Slots,
    pub nonce: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    pub incarnation: u8,
    pub living: bool,
}

/// A swap whose answer was lost and that may still execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Late {
    Lock { base: Record, new: Record, noted: Slots },
    Bell { slot: u8, base: Bell, new: Bell },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lun {
    pub lock: Record,
    /// What a power loss leaves of the lock block.
    pub durable: Record,
    /// The version of the covered block in place.
    pub block: u8,
    pub requests: [Option<Request>; MAX_HOSTS],
    pub bells: [Bell; MAX_HOSTS],
    pub slots: [Slot; MAX_HOSTS],
    pub late: Vec<Late>,
}

impl Lun {
    /// The request of whoever lives in the slot.
    pub fn asks(&self, slot: u8) -> Option<Request> {
        let Slot { incarnation, living } = self.slots[slot as usize];
        self.requests[slot as usize].filter(|request| living && request.incarnation == incarnation)
    }

    pub fn lives(&self, name: Name) -> bool {
        self.slots[name.slot as usize] == Slot { incarnation: name.incarnation, living: true }
    }

    pub fn resident(&self, slot: u8) -> Name {
        Name { slot, incarnation: self.slots[slot as usize].incarnation }
    }
}

/// What a swap in flight was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    Acquire,
    /// `was`: what we held when we issued it. `keep`: the new image leaves us a share.
    Release {
        was: Held,
        keep: bool,
    },
}

/// What a host that was asked has read: the lock, then the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Demands {
    pub base: Record,
    pub requests: [Option<Request>; MAX_HOSTS],
}

/// Where a host's lock machine stands between two commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Idle,
    /// Saw an image that grants it the lock; must flush before it acts. `reset`: the device lost power since.
    Flush {
        image: Record,
        reset: bool,
    },
    /// Does not know what became of its swap.
    Resolve {
        base: Record,
        new: Record,
        purpose: Purpose,
    },
    /// Has read the lock and then found these slots empty. (Without the rule: only the slots.)
    TakeOver {
        base: Option<Record>,
        gone: Slots,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    /// The slot it lives in, if it is mounted.
    pub name: Option<Name>,
    pub left: bool,
    /// How many wants of its script are over.
    pub wants_done: u8,
    /// A thread waits for the next want of the script.
    pub waiting: bool,
    /// The swap counter of the first image read after the request was written.
    pub since: Option<u8>,
    /// For which swap counter this wait rang whom.
    pub rang: Option<(u8, Slots)>,
    pub held: Held,
    /// The highest own tenure that ended.
    pub ended: u8,
    pub cache: Option<u8>,
    /// The change counter that belongs to `cache`.
    pub cache_counter: u8,
    /// The cached version is newer than the block in place.
    pub changed: bool,
    pub step: Step,
    /// Slots whose requests must be read: their bits were in our doorbell, or the granting image carried them.
    pub to_read: Slots,
    /// Only if reads are apart: what it read and has not answered yet.
    pub demands: Option<Demands>,
    /// The swap that cleared our doorbell has an unknown outcome.
    pub bell_unsure: bool,
    /// Only without a rule: doorbells that we remember as rung; requests read before the doorbell was cleared.
    pub remembered_bells: Slots,
    pub peeked: bool,
    /// Observer: a lock image was written by someone who knew of this wait; hosts whose wait began later.
    pub queued: bool,
    pub behind: Slots,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct System {
    pub lun: Lun,
    pub hosts: [Host; MAX_HOSTS],
    /// Observer: the newest version of the covered block that any host ever made.
    pub newest: u8,
    /// Observer: a wait was passed by one that began after it was queued.
    pub overtaken: bool,
    pub lost_answers_left: u8,
    pub lost_bell_answers_left: u8,
    pub power_losses_left: u8,
    pub give_ups_left: u8,
}

impl System {
    /// Renames nonces in order of appearance: only their equality counts.
    pub fn normalize(&mut self) {
        let mut seen = Vec::with_capacity(8);
        let mut rename = |record: &mut Record| {
            let at = seen.iter().position(|nonce| *nonce == record.nonce);
            record.nonce = at.unwrap_or_else(|| {
                seen.push(record.nonce);
                seen.len() - 1
            }) as u8;
        };
        self.for_each_record(&mut rename);
        for slot in 0..MAX_HOSTS {
            let in_flight = self
                .lun
                .late
                .iter()
                .any(|late| matches!(late, Late::Bell { slot: s, .. } if *s as usize == slot));
            if !in_flight {
                self.lun.bells[slot].nonce = 0;
            }
        }
    }

    pub fn fresh_nonce(&mut self) -> u8 {
        let mut highest = 0;
        self.for_each_record(&mut |record| highest = highest.max(record.nonce));
        highest + 1
    }

    pub fn fresh_bell_nonce(&self, slot: u8) -> u8 {
        let in_flight = self.lun.late.iter().map(|late| match late {
            Late::Bell { slot: s, base, new, .. } if *s == slot => base.nonce.max(new.nonce),
            _ => 0,
        });
        in_flight.max().unwrap_or(0).max(self.lun.bells[slot as usize].nonce) + 1
    }

    fn for_each_record(&mut self, visit: &mut impl FnMut(&mut Record)) {
        visit(&mut self.lun.lock);
        visit(&mut self.lun.durable);
        for host in &mut self.hosts {
            if let Some(demands) = &mut host.demands {
                visit(&mut demands.base);
            }
            match &mut host.step {
                Step::Idle | Step::TakeOver { base: None, .. } => {}
                Step::Flush { image, .. } => visit(image),
                Step::Resolve { base, new, .. } => {
                    visit(base);
                    visit(new);
                }
                Step::TakeOver { base: Some(base), .. } => visit(base),
            }
        }
        for late in &mut self.lun.late {
            if let Late::Lock { base, new, .. } = late {
                visit(base);
                visit(new);
            }
        }
    }
}
