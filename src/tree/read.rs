//! Lookups and ordered scans, and the way from the root to a leaf that changes begin with.
//!
//! Scans hold no position between leaves but a key: after each leaf they go down again to the first
//! key after its range. So a scan sees a tree that changed meanwhile as it is now, and a readdir
//! that was interrupted goes on from its cookie.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::node::{Expect, Node, check_block, check_root};
use super::{Entry, NodeRead, Tree, TreeError, root_address};
use crate::layout::Block;
use crate::types::BlockNo;

/// One node on the way from the root to a leaf.
pub(super) struct Step {
    pub at: BlockNo,
    /// `None` for the root, whose bytes the caller has.
    pub block: Option<Arc<Block>>,
    pub lo: u64,
    pub hi: u64,
    pub count: usize,
    pub used: usize,
    /// Which child was taken; in a leaf, where the key is or would be.
    pub index: usize,
    /// In a leaf: is the key there?
    pub found: bool,
}

impl Step {
    fn new(expect: Expect, block: Option<Arc<Block>>, node: &Node, index: usize, found: bool) -> Self {
        let (at, lo, hi, count, used) = (expect.at, expect.lo, expect.hi, node.count(), node.used);
        Step { at, block, lo, hi, count, used, index, found }
    }
}

/// The way from the root to a leaf; never empty, the leaf is last.
pub(super) struct Path {
    pub steps: Vec<Step>,
    pub level: u8,
}

impl Tree {
    /// The bytes of a step, checked again when it was read: cheap where only a split or a merge needs them.
    pub(super) fn node_of<'a>(
        &self,
        path: &'a Path,
        depth: usize,
        root: &'a [u8],
    ) -> Result<Node<'a>, TreeError> {
        let unstable = self.unstable(root_address(self.owner));
        let step = path.steps.get(depth).ok_or(unstable)?;
        match &step.block {
            None => check_root(root, self),
            Some(block) => {
                let level = path.level.saturating_sub(depth as u8);
                check_block(block, self, Expect { at: step.at, level, lo: step.lo, hi: step.hi })
            }
        }
    }

    /// Goes down to the leaf whose range has `key`, checking each node.
    pub(super) fn descend<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
    ) -> Result<Path, S::Error> {
        let node = check_root(root, self)?;
        let level = node.level();
        let mut steps = Vec::with_capacity(usize::from(level) + 1);
        let mut expect = Expect { at: root_address(self.owner), level, lo: 0, hi: u64::MAX };
        let mut next = descend_one(&node, key, expect, None, &mut steps);
        while let Some(child) = next {
            let block = store.load(child.at)?;
            let node = check_block(&block, self, child)?;
            expect = child;
            next = descend_one(&node, key, expect, Some(Arc::clone(&block)), &mut steps);
        }
        Ok(Path { steps, level })
    }

    /// Runs `look` on the leaf whose range has `key`; also gives the range.
    fn with_leaf<S: NodeRead + ?Sized, T>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
        look: impl FnOnce(&Node) -> T,
    ) -> Result<(T, u64, u64), S::Error> {
        let mut expect = Expect { at: root_address(self.owner), level: 0, lo: 0, hi: u64::MAX };
        let mut held: Option<Arc<Block>> = None;
        loop {
            let node = match &held {
                None => check_root(root, self)?,
                Some(block) => check_block(block, self, expect)?,
            };
            if node.level() == 0 {
                return Ok((look(&node), expect.lo, expect.hi));
            }
            expect = node.expect_child(node.child_index(key), expect.lo, expect.hi);
            held = Some(store.load(expect.at)?);
        }
    }

    /// The value of a key.
    pub fn get<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
    ) -> Result<Option<Vec<u8>>, S::Error> {
        let look = |leaf: &Node| leaf.search(key).ok().map(|i| leaf.value(i).to_vec());
        Ok(self.with_leaf(store, root, key, look)?.0)
    }

    /// The entry with the greatest key that is not above `key`.
    pub fn get_le<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
    ) -> Result<Option<Entry>, S::Error> {
        let mut key = key;
        loop {
            let look = |leaf: &Node| {
                let below = match leaf.search(key) {
                    Ok(index) => Some(index),
                    Err(index) => index.checked_sub(1),
                };
                below.map(|i| Entry { key: leaf.key(i), value: leaf.value(i).to_vec() })
            };
            let (entry, lo, _) = self.with_leaf(store, root, key, look)?;
            match (entry, lo.checked_sub(1)) {
                (Some(entry), _) => return Ok(Some(entry)),
                (None, None) => return Ok(None),
                // The leaf's range begins below the key, its entries above; the one before has it.
                (None, Some(before)) => key = before,
            }
        }
    }

    /// The entry with the least key that is not below `key`.
    pub fn get_ge<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
    ) -> Result<Option<Entry>, S::Error> {
        let mut first = None;
        self.scan(store, root, key, |key, value| {
            first = Some(Entry { key, value: value.to_vec() });
            ControlFlow::Break(())
        })?;
        Ok(first)
    }

    /// The entry with the greatest key.
    pub fn last<S: NodeRead + ?Sized>(&self, store: &mut S, root: &[u8]) -> Result<Option<Entry>, S::Error> {
        self.get_le(store, root, u64::MAX)
    }

    /// Has it no entry?
    pub fn is_empty<S: NodeRead + ?Sized>(&self, store: &mut S, root: &[u8]) -> Result<bool, S::Error> {
        let mut empty = true;
        self.scan(store, root, 0, |_, _| {
            empty = false;
            ControlFlow::Break(())
        })?;
        Ok(empty)
    }

    /// Shows the entries from `from` on, by ascending key, until `show` breaks off.
    pub fn scan<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        from: u64,
        mut show: impl FnMut(u64, &[u8]) -> ControlFlow<()>,
    ) -> Result<(), S::Error> {
        let mut from = from;
        loop {
            let look = |leaf: &Node| {
                let start = leaf.search(from).unwrap_or_else(|i| i);
                (start..leaf.count()).try_for_each(|i| show(leaf.key(i), leaf.value(i)))
            };
            let (flow, _, hi) = self.with_leaf(store, root, from, look)?;
            match hi.checked_add(1) {
                Some(next) if flow.is_continue() => from = next,
                _ => return Ok(()),
            }
        }
    }
}

/// Notes the step through `node` and says which child comes next; `None` in a leaf.
fn descend_one(
    node: &Node,
    key: u64,
    expect: Expect,
    block: Option<Arc<Block>>,
    steps: &mut Vec<Step>,
) -> Option<Expect> {
    if node.level() == 0 {
        let place = node.search(key);
        let index = place.unwrap_or_else(|i| i);
        steps.push(Step::new(expect, block, node, index, place.is_ok()));
        return None;
    }
    let index = node.child_index(key);
    steps.push(Step::new(expect, block, node, index, false));
    Some(node.expect_child(index, expect.lo, expect.hi))
}
