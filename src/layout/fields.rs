//! Records as lists of named values, for people: log lines and tools that show two images side by side.
//!
//! Names are those of `docs/format.md`. Not for decisions: those are made on the records.

use super::Nonce;
use super::demand::DoorbellRecord;
use super::lock::{LockMode, LockRecord};
use super::slot::SlotRecord;
use crate::types::{Owner, SlotSet};

/// A field's name and its value.
pub type Field = (&'static str, String);

impl LockRecord {
    pub fn fields(&self) -> Vec<Field> {
        let (mode, owner, tenure) = match self.mode {
            LockMode::Free => ("free", None, 0),
            LockMode::Shared => ("shared", None, 0),
            LockMode::Exclusive { owner, tenure } => ("exclusive", Some(owner), tenure.0),
        };
        vec![
            ("kind", self.kind.name().into()),
            ("mode", mode.into()),
            ("owner", owner_text(owner)),
            ("tenure", tenure.to_string()),
            ("sharers", set_text(self.sharers)),
            ("openers", set_text(self.openers)),
            ("waiters", set_text(self.waiters)),
            ("next", owner_text(self.next)),
            ("swap_counter", self.swap_counter.to_string()),
            ("change_counter", self.change_counter.to_string()),
            ("nonce", nonce_text(self.nonce)),
        ]
    }
}

impl SlotRecord {
    pub fn fields(&self) -> Vec<Field> {
        let d = self.durations;
        vec![
            ("state", format!("{:?}", self.state).to_lowercase()),
            ("host", printable(&self.host_name)),
            ("host_uuid", uuid::Uuid::from_bytes(self.host_uuid).to_string()),
            ("incarnation", self.incarnation.0.to_string()),
            ("beat", self.beat.to_string()),
            ("boot_id", uuid::Uuid::from_bytes(self.boot_id).to_string()),
            ("pid", self.pid.to_string()),
            ("pid_namespace", self.pid_namespace.to_string()),
            ("beat_ms", d.beat_ms.to_string()),
            ("lease_ms", d.lease_ms.to_string()),
            ("dead_ms", d.dead_ms.to_string()),
            ("hold_ms", d.hold_ms.to_string()),
            ("logical_block_bytes", self.logical_block_bytes.to_string()),
            ("protocol", self.protocol.to_string()),
            ("features", format!("{:x}/{:x}/{:x}", self.features[0], self.features[1], self.features[2])),
            ("fencing_key", format!("{:#x}", self.fencing_key)),
            ("recoverer", owner_text(self.recoverer)),
            ("settled_up_to", self.settled_up_to.0.to_string()),
            ("keyless", self.keyless.to_string()),
            ("fenced_up_to", self.fenced_up_to.0.to_string()),
            ("net_blocks", self.net_blocks.to_string()),
            ("net_inodes", self.net_inodes.to_string()),
            ("wall_ns", self.wall_ns.to_string()),
            ("nonce", nonce_text(self.nonce)),
        ]
    }
}

impl DoorbellRecord {
    pub fn fields(&self) -> Vec<Field> {
        vec![
            ("ringers", set_text(self.ringers)),
            ("swap_counter", self.swap_counter.to_string()),
            ("nonce", nonce_text(self.nonce)),
        ]
    }
}

/// One image: `name=value`, where it differs from the other image `*name=value`.
pub fn marked(fields: &[Field], other: &[Field]) -> String {
    let words = fields.iter().map(|field| {
        let mark = if other.contains(field) { "" } else { "*" };
        format!("{mark}{}={}", field.0, field.1)
    });
    words.collect::<Vec<_>>().join(" ")
}

fn owner_text(owner: Option<Owner>) -> String {
    owner.map_or("none".into(), |o| format!("slot:{}/life:{}", o.slot.0, o.incarnation.0))
}

fn set_text(set: SlotSet) -> String {
    if set.is_empty() {
        return "none".into();
    }
    set.iter().map(|slot| slot.to_string()).collect::<Vec<_>>().join(",")
}

fn nonce_text(nonce: Nonce) -> String {
    nonce.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A name from the disk in one word that can't steer a terminal or begin a new line.
fn printable(name: &str) -> String {
    let safe: String =
        name.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    format!("\"{safe}\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::lock::LockKind;
    use crate::types::{BlockNo, Incarnation, Slot, Tenure};

    #[test]
    fn only_what_differs_is_marked() {
        let free = LockRecord::new_free(LockKind::Inode, BlockNo(7));
        let owner = Owner { slot: Slot(2), incarnation: Incarnation(9) };
        let mode = LockMode::Exclusive { owner, tenure: Tenure(4) };
        let taken = LockRecord { mode, swap_counter: 4, waiters: SlotSet::of(Slot(1)), ..free.clone() };
        let text = marked(&taken.fields(), &free.fields());
        assert_eq!(
            text,
            "kind=inode *mode=exclusive *owner=slot:2/life:9 *tenure=4 sharers=none openers=none *waiters=1 \
             next=none *swap_counter=4 change_counter=0 nonce=00000000000000000000000000000000"
        );
        assert!(!marked(&taken.fields(), &taken.fields()).contains('*'));
        let slot = SlotRecord { host_name: "a\nb".into(), ..SlotRecord::new_free(BlockNo(3)) };
        assert!(marked(&slot.fields(), &[]).contains("*host=\"a\u{fffd}b\" "));
    }
}
