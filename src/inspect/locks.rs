//! Who waits for which lock, and who holds it.
//!
//! The waits are what living hosts wrote into their request blocks; holders come from the lock records.
//! Both are read without a lock and one after the other, so a wait that has just ended may still be shown.

use std::collections::BTreeMap;

use serde::Serialize;

use super::InspectError;
use super::Volume;
use super::names::{Host, Hosts};
use super::path::{Paths, possible_inode_lock};
use crate::layout::demand::{Request, Want};
use crate::layout::geometry::inode_of_lock;
use crate::layout::lock::{LockKind, LockMode, LockRecord};
use crate::layout::slot::SlotState;
use crate::types::{BlockNo, InodeNo, Slot};

/// A lock as tools show it. The field names are part of the tools' JSON output.
#[derive(Clone, Debug, Serialize)]
pub struct LockView {
    /// Block address of the lock.
    pub lock: u64,
    pub kind: LockKind,
    /// "free", "shared" or "exclusive".
    pub mode: &'static str,
    /// The owner, or the sharers whose slot is claimed.
    pub holders: Vec<Host>,
    /// Null unless exclusive.
    pub tenure: Option<u64>,
    /// Hosts that may have the inode open without holding the lock.
    pub openers: Vec<Host>,
    /// Who waits, as the last hand-over knew.
    pub waiters: Vec<Host>,
    pub next: Option<Host>,
    pub swap_counter: u64,
    pub change_counter: u64,
    /// Number of the inode, for an inode lock.
    pub inode: Option<u64>,
    /// Index of the cluster, for a cluster lock.
    pub cluster: Option<u64>,
    /// Path of the inode as far as it can be read.
    pub path: Option<String>,
}

/// One wait of one host.
#[derive(Clone, Debug, Serialize)]
pub struct Wait {
    pub waiter: Host,
    pub lock: u64,
    pub want: Want,
    /// Swaps of the lock since the wait began: its age without a clock.
    pub swaps_since_begin: Option<u64>,
    /// We saw the same wait this long ago already; 0: it is new, or we did not look twice.
    pub seen_for_ms: u64,
    /// The lock as it stands; null if it can't be read (then `problem` says why).
    pub record: Option<LockView>,
    pub problem: Option<String>,
}

/// A request with who made it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    pub slot: Slot,
    pub incarnation: u64,
    pub request: Request,
}

/// All valid requests of slots that are claimed as live, and which request blocks or doorbells, of any slot,
/// can't be read.
pub fn requests(volume: &Volume<'_>, hosts: &Hosts<'_>) -> (Vec<Asked>, Vec<String>) {
    let (mut asked, mut problems) = (Vec::new(), Vec::new());
    for watched in hosts.0 {
        if let Err(error) = volume.doorbell(watched.slot) {
            problems.push(error.to_string());
        }
        let block = match volume.requests(watched.slot) {
            Ok(block) => block,
            Err(error) => {
                problems.push(error.to_string());
                continue;
            }
        };
        let Ok(record) = &watched.record else { continue };
        // Requests of an earlier life are void.
        if record.state == SlotState::Live && block.incarnation == record.incarnation {
            let of = |request| Asked { slot: watched.slot, incarnation: block.incarnation.0, request };
            asked.extend(block.requests.iter().copied().map(of));
        }
    }
    (asked, problems)
}

/// The waits behind `asked`; `earlier` is what was asked `seen_for_ms` ago.
pub fn waits(
    volume: &Volume<'_>,
    hosts: &Hosts<'_>,
    paths: &mut Paths<'_, '_>,
    asked: &[Asked],
    earlier: &[Asked],
    seen_for_ms: u64,
) -> Vec<Wait> {
    let mut records: BTreeMap<BlockNo, Result<LockRecord, String>> = BTreeMap::new();
    let mut out = Vec::new();
    for one in asked {
        let at = one.request.lock;
        let record = records.entry(at).or_insert_with(|| read_lock(volume, at));
        let swaps = record.as_ref().ok().and_then(|r| r.swap_counter.checked_sub(one.request.since));
        out.push(Wait {
            waiter: hosts.slot(one.slot),
            lock: at.0,
            want: one.request.want,
            swaps_since_begin: swaps,
            seen_for_ms: if earlier.contains(one) { seen_for_ms } else { 0 },
            record: record.as_ref().ok().map(|r| view(volume, hosts, Some(paths), r)),
            problem: record.as_ref().err().cloned(),
        });
    }
    out
}

/// Reads the lock that a request names, if a lock can stand there: the address comes from another host.
fn read_lock(volume: &Volume<'_>, at: BlockNo) -> Result<LockRecord, String> {
    if kind_by_place(volume, at).is_none() {
        return Err(format!("block {at} is not the place of a lock"));
    }
    volume.lock(at).map_err(|error: InspectError| error.to_string())
}

/// Which kind of lock can stand at an address. Arithmetic only.
pub fn kind_by_place(volume: &Volume<'_>, at: BlockNo) -> Option<LockKind> {
    let geometry = volume.geometry();
    if at == geometry.volume_lock() {
        return Some(LockKind::Volume);
    }
    if at == geometry.rename_lock() {
        return Some(LockKind::Rename);
    }
    if geometry.cluster_of(at).is_some_and(|index| geometry.cluster(index) == at) {
        return Some(LockKind::Cluster);
    }
    possible_inode_lock(volume, at).then_some(LockKind::Inode)
}

/// A lock record as tools show it.
pub fn view(
    volume: &Volume<'_>,
    hosts: &Hosts<'_>,
    paths: Option<&mut Paths<'_, '_>>,
    record: &LockRecord,
) -> LockView {
    let (mode, tenure) = match record.mode {
        LockMode::Free => ("free", None),
        LockMode::Shared => ("shared", None),
        LockMode::Exclusive { tenure, .. } => ("exclusive", Some(tenure.0)),
    };
    let inode = (record.kind == LockKind::Inode
        && kind_by_place(volume, record.address) == Some(LockKind::Inode))
    .then(|| inode_of_lock(record.address).0);
    let cluster = match record.kind {
        LockKind::Cluster => volume.geometry().cluster_of(record.address),
        _ => None,
    };
    LockView {
        lock: record.address.0,
        kind: record.kind,
        mode,
        holders: hosts.holders(record),
        tenure,
        openers: hosts.set(record.openers),
        waiters: hosts.set(record.waiters),
        next: record.next.map(|owner| hosts.owner(owner)),
        swap_counter: record.swap_counter,
        change_counter: record.change_counter,
        inode,
        cluster,
        path: inode.and_then(|ino| paths.and_then(|p| p.of(InodeNo(ino)))),
    }
}

impl LockView {
    /// What the lock covers, in a few words.
    pub fn subject(&self) -> String {
        match (self.inode, self.cluster, &self.path) {
            (Some(ino), _, Some(path)) => format!("inode {ino:#x} {path}"),
            (Some(ino), _, None) => format!("inode {ino:#x}"),
            (_, Some(index), _) => format!("cluster {index}"),
            _ => format!("{} lock", self.kind.name()),
        }
    }

    /// The holders in a few words.
    pub fn held_by(&self) -> String {
        hosts_text(&self.holders)
    }
}

/// A list of hosts for a table cell.
pub fn hosts_text(hosts: &[Host]) -> String {
    if hosts.is_empty() {
        return "-".into();
    }
    hosts.iter().map(Host::to_string).collect::<Vec<_>>().join(", ")
}
