//! Rename: with and without replacement, exchange, and moves of directories.
//!
//! A directory that moves to another parent could become its own ancestor if two hosts moved two
//! directories into each other at once. So such a move first takes the volume's rename lock exclusively and
//! looks at the ancestors under it: while it is held no directory changes its parent.

use std::sync::Arc;

use zerocopy::little_endian::{U32, U64};

use super::Fs;
use super::api::{Answer, FsError, FsResult, OpContext};
use super::attr::{is_directory, touch};
use super::dirtree::{DirEntryRef, DirTree};
use super::namespace::{check_name, target_of};
use super::op::{Needs, Op, OpResult};
use crate::alloc::Need;
use crate::layout::inode::InodeDisk;
use crate::lock::Guard;
use crate::rt::planted::{Bug, is_planted};
use crate::types::InodeNo;

/// Deeper than any path can be: a walk that is longer goes round in a circle.
const MAX_DEPTH: usize = 4096;

/// The two places of a rename.
#[derive(Clone, Copy)]
struct Places<'a> {
    from: InodeNo,
    name: &'a [u8],
    to: InodeNo,
    new_name: &'a [u8],
}

impl Fs {
    pub(super) fn do_rename(
        &self,
        cx: &OpContext,
        from: InodeNo,
        name: &[u8],
        to: InodeNo,
        new_name: &[u8],
        flags: u32,
    ) -> FsResult<Answer<()>> {
        self.may_change()?;
        check_name(name)?;
        check_name(new_name)?;
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let keep = flags & libc::RENAME_NOREPLACE != 0;
        if flags & !(libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE) != 0 || (exchange && keep) {
            return Err(FsError::Invalid);
        }
        let places = Places { from, name, to, new_name };
        let (mut orphan, mut checked) = (None, false);
        let answer = self.run(cx, Needs::write(&[from, to]), |op| {
            orphan = self.rename_once(op, places, (exchange, keep), &mut checked)?;
            Ok(())
        })?;
        Ok(self.without_orphan(cx, answer, orphan))
    }

    fn rename_once(
        &self,
        op: &mut Op<'_>,
        places: Places<'_>,
        (exchange, keep): (bool, bool),
        checked: &mut bool,
    ) -> OpResult<Option<super::orphans::Unnamed>> {
        let Places { from, name, to, new_name } = places;
        let (src, dst) = (op.write_inode(from)?, op.write_inode(to)?);
        op.living_directory(&src, from)?;
        op.living_directory(&dst, to)?;
        let moved = op.find(&src, from, name)?.ok_or(FsError::NotFound)?;
        let over = op.find(&dst, to, new_name)?;
        match over {
            Some(_) if keep => return Err(FsError::Exists.into()),
            None if exchange => return Err(FsError::NotFound.into()),
            Some(over) if over.target.ino == moved.target.ino => return Ok(None),
            _ => {}
        }
        let is_dir = |entry: &DirEntryRef| entry.target.kind == (libc::S_IFDIR >> 12) as u8;
        let changes_parent = from != to && (is_dir(&moved) || (exchange && over.is_some_and(|o| is_dir(&o))));
        if changes_parent {
            if !is_planted(Bug::MovesNotRevalidated) && !is_planted(Bug::RenameLockNotTaken) {
                op.take_rename_lock()?;
            }
            if !*checked && !is_planted(Bug::AncestorsUnchecked) {
                self.check_ancestors(op, moved.target.ino, to)?;
            }
            if exchange && let Some(over) = over {
                self.check_ancestors(op, over.target.ino, from)?;
            }
            *checked = is_planted(Bug::MovesNotRevalidated);
        }
        let child = op.write_inode(moved.target.ino)?;
        let old = match over {
            Some(over) => Some((over, op.write_inode(over.target.ino)?)),
            None => None,
        };
        match (exchange, old) {
            (true, Some((over, other))) => self.exchange(op, places, (moved, &child), (over, &other))?,
            (_, old) => return self.move_over(op, places, (moved, &child), old),
        }
        Ok(None)
    }

    /// Is `moved` an ancestor of `below`? Then it can't move there. Called under the rename lock.
    fn check_ancestors(&self, op: &mut Op<'_>, moved: InodeNo, below: InodeNo) -> OpResult<()> {
        let mut at = below;
        for _ in 0..MAX_DEPTH {
            if at == moved {
                return Err(FsError::Invalid.into());
            }
            if at == self.geometry.root() {
                return Ok(());
            }
            at = op.parent_of(at)?;
        }
        Err(FsError::Io(format!("the directories above inode {below} form a circle")).into())
    }

    fn move_over(
        &self,
        op: &mut Op<'_>,
        places: Places<'_>,
        (moved, child): (DirEntryRef, &Arc<Guard>),
        old: Option<(DirEntryRef, Arc<Guard>)>,
    ) -> OpResult<Option<super::orphans::Unnamed>> {
        let Places { from, name, to, new_name } = places;
        let (src, dst) = (op.write_inode(from)?, op.write_inode(to)?);
        let ino = moved.target.ino;
        let block = op.body(child, ino)?;
        let moves_dir = is_directory(InodeDisk::of(&block));
        let target = target_of(ino, InodeDisk::of(&block));
        let mut orphan = None;
        let key = match &old {
            Some((over, guard)) => {
                let over_ino = over.target.ino;
                let over_block = op.body(guard, over_ino)?;
                let over_dir = is_directory(InodeDisk::of(&over_block));
                match (moves_dir, over_dir) {
                    (true, false) => return Err(FsError::NotDirectory.into()),
                    (false, true) => return Err(FsError::IsDirectory.into()),
                    (true, true) => op.check_empty(guard, over_ino)?,
                    (false, false) => {}
                }
                let tree = self.dir_tree(to);
                let set =
                    op.edit(&dst, to, None, |nodes, root| tree.set_target(nodes, root, new_name, target))?;
                let key = set.ok_or(FsError::NotFound)?.key;
                super::attr::touch_contents(op.change(&dst, to)?);
                orphan = if over_dir {
                    let orphan = self.drop_directory(op, guard, over_ino)?;
                    let body = op.change(&dst, to)?;
                    body.nlink = U32::new(body.nlink.get().saturating_sub(1));
                    orphan
                } else {
                    self.drop_link(op, guard, over_ino)?
                };
                key
            }
            None => {
                let level = op.dir_level(&dst, to)?;
                let need = Need { blocks: DirTree::insert_cost(level).allocations, inode: false };
                let space = op.space(self.geometry.cluster_of(to.body()), need)?;
                op.enter(&dst, to, new_name, target, &space)?
            }
        };
        op.leave(&src, from, name)?;
        let body = op.change(child, ino)?;
        touch(body);
        body.parent = U64::new(to.0);
        body.parent_key = U64::new(key);
        if moves_dir && from != to {
            let body = op.change(&src, from)?;
            body.nlink = U32::new(body.nlink.get().saturating_sub(1));
            let body = op.change(&dst, to)?;
            body.nlink = U32::new(body.nlink.get() + 1);
        }
        Ok(orphan)
    }

    fn exchange(
        &self,
        op: &mut Op<'_>,
        places: Places<'_>,
        (moved, child): (DirEntryRef, &Arc<Guard>),
        (over, other): (DirEntryRef, &Arc<Guard>),
    ) -> OpResult<()> {
        let Places { from, name, to, new_name } = places;
        let (src, dst) = (op.write_inode(from)?, op.write_inode(to)?);
        let (a, b) = (moved.target, over.target);
        for (dir, guard, name, target) in [(from, &src, name, b), (to, &dst, new_name, a)] {
            let tree = self.dir_tree(dir);
            op.edit(guard, dir, None, |nodes, root| tree.set_target(nodes, root, name, target))?;
            super::attr::touch_contents(op.change(guard, dir)?);
        }
        let directory = (libc::S_IFDIR >> 12) as u8;
        for (ino, guard, kind, parent, key, left) in [
            (a.ino, child, a.kind, (to, &dst), over.key, (from, &src)),
            (b.ino, other, b.kind, (from, &src), moved.key, (to, &dst)),
        ] {
            let body = op.change(guard, ino)?;
            touch(body);
            body.parent = U64::new(parent.0.0);
            body.parent_key = U64::new(key);
            if kind == directory && from != to {
                let body = op.change(left.1, left.0)?;
                body.nlink = U32::new(body.nlink.get().saturating_sub(1));
                let body = op.change(parent.1, parent.0)?;
                body.nlink = U32::new(body.nlink.get() + 1);
            }
        }
        Ok(())
    }
}
