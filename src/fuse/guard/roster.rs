//! The daemon's pen for the table of nodes in the [`GuardMemory`]: which word is whose, and which are free.
//!
//! A word is taken from the free ones, else from the end, so that the table is as long as the most nodes that the
//! kernel ever knew at once, and a change is one store.

use std::sync::{Arc, Mutex, PoisonError};

use super::memory::{GuardMemory, MOST_NODES};
use crate::fuse::request::NodeId;

/// Where a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line(u32);

/// Lists nodes for the guard; the default one for nobody.
#[derive(Default)]
pub struct Roster {
    memory: Option<Arc<GuardMemory>>,
    lines: Mutex<Lines>,
}

#[derive(Default)]
struct Lines {
    free: Vec<Line>,
    used: u32,
}

impl Roster {
    pub(crate) fn new(memory: Arc<GuardMemory>) -> Roster {
        Roster { memory: Some(memory), lines: Mutex::default() }
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists the node; from now on the guard knows it. `None`: there is no room for so many.
    pub(crate) fn enter(&self, node: NodeId) -> Option<Line> {
        let mut lines = self.lines();
        let line = match lines.free.pop() {
            Some(line) => line,
            None if (lines.used as usize) < MOST_NODES => {
                lines.used += 1;
                Line(lines.used - 1)
            }
            None => {
                log::error!("the kernel refers to {MOST_NODES} inodes; no more can be looked up");
                return None;
            }
        };
        if let Some(memory) = &self.memory {
            memory.use_up_to(lines.used as usize);
            memory.set_node(line.0 as usize, Some(node));
        }
        Some(line)
    }

    /// The kernel does not know the node any more.
    pub(crate) fn strike(&self, line: Line) {
        let mut lines = self.lines();
        if let Some(memory) = &self.memory {
            memory.set_node(line.0 as usize, None);
        }
        lines.free.push(line);
    }
}
