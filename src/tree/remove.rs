//! Removing: in place where the node stays filled, else by freeing, merging or evening out.
//!
//! All nodes that take part are read and checked, and the changes listed, before the first of them is made.
//! A root with one child that fits takes its content back, so a directory that was emptied is inline again.

use super::insert::{bytes_of, split_point};
use super::node::{
    BLOCK_CAPACITY, CHILD_BYTES, SLOT_BYTES, build, capacity, check_block, check_root, remove_at, root_head,
    set_key,
};
use super::{NodeStore, Tree, root_address};
use crate::layout::Block;
use crate::types::BlockNo;

/// A node below this looks for a neighbour.
const LOW_BYTES: usize = BLOCK_CAPACITY / 4;
/// Two nodes that fit into this become one. Less than a whole node: the next insert should not split it.
const MERGE_BYTES: usize = BLOCK_CAPACITY / 8 * 7;

/// One change of the list.
enum Change {
    RemoveAt {
        at: BlockNo,
        index: usize,
    },
    /// The separator before the child `index` moves; `lo` is where the node's range begins.
    SetKey {
        at: BlockNo,
        index: usize,
        key: u64,
        lo: u64,
    },
    Put {
        at: BlockNo,
        block: Box<Block>,
    },
    Free {
        at: BlockNo,
    },
}

impl Tree {
    /// Takes an entry out and returns its value; `None` if it wasn't there. See [`super::Cost::removes`].
    pub fn remove<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        key: u64,
    ) -> Result<Option<Vec<u8>>, S::Error> {
        let Some((value, changes)) = self.plan_removal(store, root, key)? else { return Ok(None) };
        for change in changes {
            match change {
                Change::RemoveAt { at, index } => {
                    self.modify_at(store, root, at, |area| remove_at(area, index))?;
                }
                Change::SetKey { at, index, key, lo } => {
                    // Separator 0 is only a bound, and may be above the new separator 1.
                    self.modify_at(store, root, at, |area| {
                        (index != 1 || set_key(area, 0, lo)) && set_key(area, index, key)
                    })?;
                }
                Change::Put { at, block } => store.put(at, block)?,
                Change::Free { at } => store.free(at)?,
            }
        }
        self.collapse(store, root)?;
        Ok(Some(value))
    }

    fn plan_removal<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
    ) -> Result<Option<(Vec<u8>, Vec<Change>)>, S::Error> {
        let path = self.descend(store, root, key)?;
        let mut changes = Vec::new();
        let Some(leaf) = path.steps.last().filter(|leaf| leaf.found) else { return Ok(None) };
        let mut index = leaf.index;
        let value = self.node_of(&path, usize::from(path.level), root)?.value(index).to_vec();
        let mut entry_bytes = SLOT_BYTES + value.len();
        let mut depth = path.steps.len() - 1;
        loop {
            let step = &path.steps[depth];
            let parent = depth.checked_sub(1).map(|d| &path.steps[d]);
            let Some(parent) = parent.filter(|_| step.count > 0) else {
                changes.push(Change::RemoveAt { at: step.at, index });
                break;
            };
            let left_bytes = step.used.saturating_sub(entry_bytes);
            entry_bytes = SLOT_BYTES + CHILD_BYTES;
            if step.count == 1 {
                changes.push(Change::Free { at: step.at });
                (index, depth) = (parent.index, depth - 1);
                continue;
            }
            if left_bytes >= LOW_BYTES || parent.count == 1 {
                changes.push(Change::RemoveAt { at: step.at, index });
                break;
            }
            // Join or even out with a neighbour under the same parent: the next one, if there is one.
            let own = self.node_of(&path, depth, root)?;
            let parent_node = self.node_of(&path, depth - 1, root)?;
            let own_is_left = parent.index + 1 < parent.count;
            let right_index = if own_is_left { parent.index + 1 } else { parent.index };
            let other = if own_is_left { right_index } else { right_index - 1 };
            let expect = parent_node.expect_child(other, parent.lo, parent.hi);
            let neighbour = store.load(expect.at)?;
            let other_node = check_block(&neighbour, self, expect)?;
            let mut own_entries: Vec<_> = own.entries().collect();
            own_entries.remove(index);
            let other_entries: Vec<_> = other_node.entries().collect();
            let (left_at, mut entries, right_at, mut right) = match own_is_left {
                true => (step.at, own_entries, expect.at, other_entries),
                false => (expect.at, other_entries, step.at, own_entries),
            };
            // What was a bound becomes a separator among others: it must say where the range begins.
            if let Some(first) = right.first_mut().filter(|_| own.level() > 0) {
                first.0 = parent_node.key(right_index);
            }
            entries.append(&mut right);
            if bytes_of(&entries) <= MERGE_BYTES {
                let block = self.new_block(left_at, own.level(), &entries)?;
                changes.push(Change::Put { at: left_at, block });
                changes.push(Change::Free { at: right_at });
                (index, depth) = (right_index, depth - 1);
                continue;
            }
            let (left, right) = entries.split_at(split_point(&entries, false));
            let key = right.first().map_or(0, |e| e.0);
            changes.push(Change::Put { at: left_at, block: self.new_block(left_at, own.level(), left)? });
            changes.push(Change::Put { at: right_at, block: self.new_block(right_at, own.level(), right)? });
            changes.push(Change::SetKey { at: parent.at, index: right_index, key, lo: parent.lo });
            break;
        }
        Ok(Some((value, changes)))
    }

    /// While the root has one child that leaves room in it, the child's content becomes the root's.
    fn collapse<S: NodeStore + ?Sized>(&self, store: &mut S, root: &mut [u8]) -> Result<(), S::Error> {
        loop {
            let (level, expect) = match root_head(root) {
                Some((0, _)) => return Ok(()),
                // Its last child has left: `check_root` would refuse a root like that.
                Some((_, 0)) => return Ok(self.init_root(root)?),
                Some((level, 1)) => (level, check_root(root, self)?.expect_child(0, 0, u64::MAX)),
                _ => return Ok(()),
            };
            let block = store.load(expect.at)?;
            let child = check_block(&block, self, expect)?;
            // Not to the brim: the next insert would make the block anew.
            if child.used > capacity(root) / 4 * 3 {
                return Ok(());
            }
            let entries: Vec<_> = child.entries().collect();
            if !build(root, self, level - 1, &entries) {
                return Err(self.unstable(root_address(self.owner)).into());
            }
            drop(block);
            store.free(expect.at)?;
        }
    }
}
