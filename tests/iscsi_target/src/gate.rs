//! Freezing: of one initiator, or of the whole target. What is frozen is not read, not executed, not answered,
//! and goes on as if nothing had been when it is thawed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};

use crate::lock;

#[derive(Default)]
struct Frozen {
    all: bool,
    initiators: Vec<String>,
    open_for_good: bool,
}

#[derive(Default)]
pub struct Gate {
    /// Whether anything is frozen: the common case costs one load.
    any: AtomicBool,
    frozen: Mutex<Frozen>,
    thawed: Condvar,
}

impl Gate {
    /// `None`: everybody.
    pub fn freeze(&self, initiator: Option<&str>) {
        let mut frozen = lock(&self.frozen);
        match initiator {
            None => frozen.all = true,
            Some(name) => frozen.initiators.push(name.to_owned()),
        }
        self.any.store(true, Ordering::SeqCst);
    }

    pub fn thaw(&self, initiator: Option<&str>) {
        let mut frozen = lock(&self.frozen);
        match initiator {
            None => *frozen = Frozen { open_for_good: frozen.open_for_good, ..Frozen::default() },
            Some(name) => frozen.initiators.retain(|one| one != name),
        }
        self.any.store(frozen.all || !frozen.initiators.is_empty(), Ordering::SeqCst);
        self.thawed.notify_all();
    }

    /// The target ends: nobody may wait any more.
    pub fn open_for_good(&self) {
        lock(&self.frozen).open_for_good = true;
        self.thawed.notify_all();
    }

    /// `name`: of the initiator, or the nexus as text. Empty while it is not known yet.
    pub fn is_closed_to(&self, name: &str) -> bool {
        self.any.load(Ordering::SeqCst) && closed(&lock(&self.frozen), name)
    }

    pub fn wait(&self, name: &str) {
        if !self.any.load(Ordering::SeqCst) {
            return;
        }
        let mut frozen = lock(&self.frozen);
        while closed(&frozen, name) {
            frozen = self.thawed.wait(frozen).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

fn closed(frozen: &Frozen, name: &str) -> bool {
    !frozen.open_for_good
        && (frozen.all
            || (!name.is_empty() && frozen.initiators.iter().any(|part| name.contains(part.as_str()))))
}
