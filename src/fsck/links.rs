//! The last pass: has everything as many names as it says, can it be reached, and do the sums agree?

use super::finding::{Finding, Kind, Place};
use super::{Checker, FsckError};

impl Checker<'_, '_, '_> {
    pub(super) fn links(&mut self) -> Result<(), FsckError> {
        let of = self.inodes.groups() as u64 * 8;
        for (done, index) in (0..).zip(self.inodes.all()) {
            if done % 65_536 == 0 {
                self.progress("links", done, of)?;
            }
            let known = self.inodes.get(index);
            let ino = self.inodes.number(index);
            if !known.in_use() || !known.readable || self.geometry.is_system_inode(ino) {
                continue;
            }
            let place = Place::of_inode(ino);
            let names_known = !self.names_unknown;
            match (known.names, known.nlink) {
                (0, 0) if known.orphan => {}
                (0, 0) if names_known => {
                    self.find(Kind::OrphanUnlisted, place, "has no links and is in no list of orphans");
                }
                (0, links) if names_known => {
                    let text = format!("has link count {links} and no name");
                    self.find(Kind::Nameless, place, text);
                }
                // A directory's count was judged by its subdirectories; but one that was removed has a name.
                (names, 0) if names > 0 && known.is_directory() => {
                    self.found(Finding::new(Kind::Links, place, "has a name and link count 0").should_be(2));
                }
                (names, links)
                    if !known.is_directory() && names != links && (names_known || names > links) =>
                {
                    let text = format!("has {names} names and link count {links}");
                    self.found(Finding::new(Kind::Links, place, text).should_be(names.into()));
                }
                _ => {}
            }
        }
        for number in self.inodes.loops() {
            let Some(directory) = self.inodes.directory(number) else { continue };
            let Some((parent, key)) = directory.found else { continue };
            let (ino, parent) = (self.inodes.number(directory.index), self.inodes.number(parent));
            let place = Place::Entry { directory: parent.0, key, inode: ino.0 };
            self.find(Kind::DirectoryLoop, place, format!("directory {ino} lies in itself"));
        }
        Ok(())
    }

    /// What the slots say was allocated since mkfs is what is allocated.
    pub(super) fn sums(&mut self) {
        if self.slots.iter().any(Option::is_none) || self.owners_unknown || self.marks_wrong {
            return;
        }
        let (mut blocks, mut inodes) = (0i64, 0i64);
        for (slot, net) in self.slots.iter().flatten().zip(&self.net) {
            let (of_blocks, of_inodes) = net.unwrap_or((slot.net_blocks, slot.net_inodes));
            blocks = blocks.wrapping_add(of_blocks);
            inodes = inodes.wrapping_add(of_inodes);
        }
        let (used_blocks, used_inodes) = (self.report.used_blocks as i64, self.report.used_inodes as i64);
        if (blocks, inodes) != (used_blocks, used_inodes) {
            let text = format!(
                "the slots count {blocks} blocks and {inodes} inodes, the maps {used_blocks} and {used_inodes}"
            );
            self.find(Kind::NetAllocation, Place::Volume, text);
        }
    }
}
