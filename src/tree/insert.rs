//! Inserting and replacing: in place where the leaf has room, else by splitting upwards.
//!
//! The number of splits is known from the way down, so all blocks are allocated before the first
//! byte changes. A node that overflows at the end of the whole tree keeps all it has and the new
//! entry begins a node of its own: ascending keys fill nodes, where halving would leave them half empty.

use super::node::{
    BLOCK_CAPACITY, CHILD_BYTES, HEAD_BYTES, MAX_VALUE_BYTES, SLOT_BYTES, build, capacity, insert_at,
    set_key, set_value,
};
use super::read::{Path, Step};
use super::{MAX_LEVEL, NodeStore, Tree, TreeError, area_of_mut, root_address};
use crate::types::BlockNo;

impl Tree {
    /// Adds an entry; [`TreeError::Exists`] if the key is there. See [`super::Cost::inserts`].
    pub fn insert<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        key: u64,
        value: &[u8],
    ) -> Result<(), S::Error> {
        self.check_len(value)?;
        let path = self.descend(store, root, key)?;
        if path.steps.last().is_none_or(|leaf| leaf.found) {
            return Err(TreeError::Exists { owner: self.owner, key }.into());
        }
        self.place(store, root, path, key, value)
    }

    /// Gives a key another value; [`TreeError::Missing`] if it isn't there. A value that is not longer
    /// than the old one needs no allocation and touches one node.
    pub fn replace<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        key: u64,
        value: &[u8],
    ) -> Result<(), S::Error> {
        self.check_len(value)?;
        let path = self.descend(store, root, key)?;
        if path.steps.last().is_none_or(|leaf| !leaf.found) {
            return Err(TreeError::Missing { owner: self.owner, key }.into());
        }
        self.place(store, root, path, key, value)
    }

    /// Moves an entry to another key and gives it another value. In place when no other entry lies
    /// between and the new key is in the range of the same leaf; else as `remove` and `insert`.
    pub fn rekey<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        old: u64,
        new: u64,
        value: &[u8],
    ) -> Result<(), S::Error> {
        self.check_len(value)?;
        let path = self.descend(store, root, old)?;
        let leaf = self.node_of(&path, usize::from(path.level), root)?;
        let Some(step) = path.steps.last().filter(|leaf| leaf.found) else {
            return Err(TreeError::Missing { owner: self.owner, key: old }.into());
        };
        let index = step.index;
        let after_left = index.checked_sub(1).map_or(new >= step.lo, |i| leaf.key(i) < new);
        let before_right = if index + 1 < leaf.count() { new < leaf.key(index + 1) } else { new <= step.hi };
        if after_left && before_right && value.len() <= leaf.value(index).len() {
            let at = step.at;
            return self.modify(store, root, path, at, |area| {
                set_key(area, index, new) && set_value(area, index, value)
            });
        }
        drop(path);
        if new != old && self.get(store, root, new)?.is_some() {
            return Err(TreeError::Exists { owner: self.owner, key: new }.into());
        }
        self.remove(store, root, old)?;
        self.insert(store, root, new, value)
    }

    fn check_len(&self, value: &[u8]) -> Result<(), TreeError> {
        if value.len() > MAX_VALUE_BYTES {
            let value = value.len() as u64;
            return Err(TreeError::Range { owner: self.owner, what: "length of a value", value });
        }
        Ok(())
    }

    /// Changes one node in place. Takes the path, so that no `Arc` of the block is left.
    pub(super) fn modify<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        path: Path,
        at: BlockNo,
        change: impl FnMut(&mut [u8]) -> bool,
    ) -> Result<(), S::Error> {
        drop(path);
        self.modify_at(store, root, at, change)
    }

    pub(super) fn modify_at<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        at: BlockNo,
        mut change: impl FnMut(&mut [u8]) -> bool,
    ) -> Result<(), S::Error> {
        let mut fits = false;
        if at == root_address(self.owner) {
            fits = change(root);
        } else {
            store.modify(at, &mut |block| fits = change(area_of_mut(block)))?;
        }
        if fits { Ok(()) } else { Err(self.unstable(at).into()) }
    }

    /// Puts the entry where the path leads to.
    fn place<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        path: Path,
        key: u64,
        value: &[u8],
    ) -> Result<(), S::Error> {
        let room = |step: &Step| if step.block.is_none() { capacity(root) } else { BLOCK_CAPACITY };
        let leaf_depth = usize::from(path.level);
        let leaf = self.node_of(&path, leaf_depth, root)?;
        let Some(step) = path.steps.last() else {
            return Err(self.unstable(root_address(self.owner)).into());
        };
        let (at, index, found) = (step.at, step.index, step.found);
        let old = if found { SLOT_BYTES + leaf.value(index).len() } else { 0 };
        let mut need = SLOT_BYTES + value.len();
        if step.used - old + need <= room(step) {
            return self.modify(store, root, path, at, |area| match found {
                true => set_value(area, index, value),
                false => insert_at(area, index, key, value),
            });
        }
        // Which nodes split, from the leaf upwards, and how many blocks that takes.
        let mut fresh_count = 0;
        for (depth, step) in path.steps.iter().enumerate().rev() {
            let old = if depth == leaf_depth { old } else { 0 };
            let total = step.used - old + need;
            if total <= room(step) {
                break;
            }
            if depth == 0 && path.level >= MAX_LEVEL {
                return Err(TreeError::TooDeep { owner: self.owner }.into());
            }
            fresh_count += if depth == 0 && total > BLOCK_CAPACITY { 2 } else { 1 };
            need = SLOT_BYTES + CHILD_BYTES;
        }
        let mut fresh = Vec::with_capacity(fresh_count);
        for _ in 0..fresh_count {
            match store.allocate() {
                Ok(at) => fresh.push(at),
                Err(e) => {
                    // Nothing was changed; what was taken goes back.
                    fresh.into_iter().try_for_each(|at| store.free(at))?;
                    return Err(e);
                }
            }
        }
        self.split_upwards(store, root, &path, key, value, fresh)
    }

    fn split_upwards<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        path: &Path,
        key: u64,
        value: &[u8],
        mut fresh: Vec<BlockNo>,
    ) -> Result<(), S::Error> {
        let mut take = || fresh.pop().ok_or(self.unstable(root_address(self.owner)));
        let mut carry_key = key;
        let mut carry_value = value.to_vec();
        for (depth, step) in path.steps.iter().enumerate().rev() {
            let node = self.node_of(path, depth, root)?;
            let (level, leaf) = (node.level(), node.level() == 0);
            let index = if leaf { step.index } else { step.index + 1 };
            let replace = leaf && step.found;
            let mut entries: Vec<(u64, &[u8])> = node.entries().collect();
            // The right half of child 0 may begin below the first separator, which is only a bound.
            if let Some(first) = entries.first_mut().filter(|_| !leaf && index == 1) {
                first.0 = step.lo;
            }
            match entries.get_mut(index) {
                Some(entry) if replace => entry.1 = &carry_value,
                _ => entries.insert(index.min(entries.len()), (carry_key, &carry_value)),
            }
            let total = bytes_of(&entries);
            if depth > 0 && total <= BLOCK_CAPACITY {
                let (at, lo) = (step.at, step.lo);
                return self.modify_at(store, root, at, |area| {
                    (index != 1 || leaf || set_key(area, 0, lo))
                        && insert_at(area, index, carry_key, &carry_value)
                });
            }
            if depth > 0 {
                let append = !replace && index == node.count() && step.hi == u64::MAX;
                let (left, right) = entries.split_at(split_point(&entries, append));
                let at = take()?;
                let separator = right.first().map_or(0, |e| e.0);
                let (left, right) =
                    (self.new_block(step.at, level, left)?, self.new_block(at, level, right)?);
                store.put(step.at, left)?;
                store.put(at, right)?;
                carry_key = separator;
                carry_value = at.0.to_le_bytes().to_vec();
                continue;
            }
            if total <= capacity(root) {
                let lo = step.lo;
                return self.modify_at(store, root, root_address(self.owner), |area| {
                    (index != 1 || leaf || set_key(area, 0, lo))
                        && insert_at(area, index, carry_key, &carry_value)
                });
            }
            // The root moves down into one block, or two.
            let append = !replace && index == node.count();
            let cut = if total <= BLOCK_CAPACITY { entries.len() } else { split_point(&entries, append) };
            let (left, right) = entries.split_at(cut);
            let left_at = take()?;
            let mut children = vec![(0, left_at.0.to_le_bytes())];
            let left = self.new_block(left_at, level, left)?;
            store.put(left_at, left)?;
            if let Some((separator, _)) = right.first() {
                let right_at = take()?;
                let right_block = self.new_block(right_at, level, right)?;
                store.put(right_at, right_block)?;
                children.push((*separator, right_at.0.to_le_bytes()));
            }
            let children: Vec<(u64, &[u8])> = children.iter().map(|(k, at)| (*k, &at[..])).collect();
            if !build(root, self, level + 1, &children) {
                return Err(self.unstable(root_address(self.owner)).into());
            }
            return Ok(());
        }
        Ok(())
    }
}

/// Bytes that entries take in a node.
pub(super) fn bytes_of(entries: &[(u64, &[u8])]) -> usize {
    entries.iter().map(|(_, value)| SLOT_BYTES + value.len()).sum()
}

/// Where to cut entries of more than one node's worth so that both sides fit: in the middle by bytes,
/// or before the last one for appending.
pub(super) fn split_point(entries: &[(u64, &[u8])], append: bool) -> usize {
    if append {
        return entries.len().saturating_sub(1);
    }
    let half = bytes_of(entries) / 2;
    let mut bytes = 0;
    let cut = entries.iter().position(|(_, value)| {
        bytes += SLOT_BYTES + value.len();
        bytes > half
    });
    // The entry across the middle goes to the right unless it is the first: either side is at most half
    // and one of the longest entries.
    cut.unwrap_or(0).clamp(1, entries.len().saturating_sub(1).max(1))
}

// Both sides of any split fit a block.
const _: () = assert!(
    (BLOCK_CAPACITY + SLOT_BYTES + MAX_VALUE_BYTES) / 2 + SLOT_BYTES + MAX_VALUE_BYTES <= BLOCK_CAPACITY
);
const _: () = assert!(HEAD_BYTES + 12 * (SLOT_BYTES + MAX_VALUE_BYTES) <= super::BLOCK_AREA_BYTES);
