//! Each check, made to fail: what a checker never found it may not be able to find.

use std::time::Duration;

use lunfs::ats::{Ats, Swapped};
use lunfs::device::BlockDevice;
use lunfs::layout::demand::DoorbellRecord;
use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::inode::InodeDisk;
use lunfs::layout::lock::{LockMode, LockRecord};
use lunfs::layout::slot::SlotRecord;
use lunfs::layout::{RECORD_BYTES, seal};
use lunfs::lease::IoClass;
use lunfs::rt;
use lunfs::rt::sim::Simulation;
use lunfs::testing::cluster::{Cluster, Formatted, cx};
use lunfs::types::{BlockNo, InodeNo, Owner, Slot, SlotSet, Tenure};

/// Runs two hosts, lets `crime` happen, and returns what the judge said.
fn caught(crime: impl FnOnce(&Cluster) + Send + 'static) -> String {
    let formatted = Formatted::tiny(4);
    let result = Simulation::new(3).try_run(move || {
        let cluster = Cluster::start(&formatted, 2);
        let root = cluster.root();
        cluster.on(0, |fs| fs.mkdir(&cx(), root, b"d", 0o755).map(drop)).unwrap();
        cluster.on(0, |fs| fs.sync(&cx())).unwrap();
        crime(&cluster);
        cluster.finish();
    });
    match result {
        Err(failure) => failure.message,
        Ok(_) => panic!("nobody noticed"),
    }
}

#[track_caller]
fn assert_says(said: &str, check: &str, what: &str) {
    assert!(said.contains(check) && said.contains(what), "expected \"{check} … {what}\", got: {said}");
}

fn owner(cluster: &Cluster, host: usize) -> Owner {
    cluster.hosts[host].volume.heartbeat().me()
}

fn root_lock(cluster: &Cluster) -> BlockNo {
    lock_of_inode(cluster.root())
}

fn raw(cluster: &Cluster, host: usize) -> std::sync::Arc<dyn BlockDevice> {
    cluster.lun.attach(cluster.hosts[host].tag)
}

/// Swaps a lock as `host`, whatever it may.
pub fn swap_lock(cluster: &Cluster, host: usize, at: BlockNo, change: impl FnOnce(&mut LockRecord)) {
    cluster.on(host, |_| {
        let door = cluster.hosts[host].volume.door().clone();
        let ats = Ats::new(door, cluster.superblock.volume);
        let image = ats.read::<LockRecord>(IoClass::Lock, at).unwrap();
        let mut to = image.record.clone();
        to.swap_counter += 1;
        change(&mut to);
        assert!(matches!(ats.swap(IoClass::Lock, &image, &to).unwrap(), Swapped::Done(_)));
    });
}

#[test]
fn a_lock_written_plainly() {
    let said = caught(|cluster| {
        let at = root_lock(cluster);
        let bytes = cluster.lun.contents(at.offset_bytes(), 4096);
        raw(cluster, 1).write(at.offset_bytes(), &bytes).unwrap();
    });
    assert_says(&said, "check 1", "by a plain write; it is Lock");
}

#[test]
fn a_doorbell_discarded() {
    let said = caught(|cluster| {
        let at = cluster.superblock.geometry.doorbell(Slot(1));
        raw(cluster, 1).discard(at.offset_bytes(), 4096).unwrap();
    });
    assert_says(&said, "check 1", "plain discard; it is Doorbell");
}

#[test]
fn a_compare_and_write_of_something_else() {
    let said = caught(|cluster| {
        let at = cluster.root().body();
        let bytes = cluster.lun.contents(at.offset_bytes(), 512);
        let _ = raw(cluster, 1).compare_and_write(at.offset_bytes(), &bytes, &bytes);
    });
    assert_says(&said, "check 1", "which is no lock, slot or doorbell");
}

#[test]
fn another_hosts_request_block_and_journal() {
    for journal in [false, true] {
        let said = caught(move |cluster| {
            let g = cluster.superblock.geometry;
            let slot = owner(cluster, 0).slot;
            let at = if journal { g.journal(slot).plus(3) } else { g.request(slot) };
            raw(cluster, 1).write(at.offset_bytes(), &[0; 4096]).unwrap();
        });
        assert_says(&said, "check 1", if journal { "Journal" } else { "Request" });
    }
}

#[test]
fn metadata_written_without_its_lock() {
    let said = caught(|cluster| {
        // Host 0 holds the root's lock.
        let ino = cluster.root();
        let mut block = cluster.block(ino.body());
        InodeDisk::of_mut(&mut block).uid = 7.into();
        seal(&mut block[..]);
        raw(cluster, 1).write(ino.body().offset_bytes(), &block[..]).unwrap();
    });
    assert_says(&said, "check 2", "covered by lock");
}

#[test]
fn data_written_over_an_inode() {
    let said = caught(|cluster| {
        let d = cluster.on(0, |fs| fs.lookup(&cx(), cluster.root(), b"d").unwrap().value.ino);
        let InodeNo(at) = d;
        raw(cluster, 1).write(at * 4096, &[9; 4096]).unwrap();
    });
    assert_says(&said, "check 2", "the place of an inode body");
}

#[test]
fn a_birth_outside_of_ones_cluster() {
    let said = caught(|cluster| {
        let g = cluster.superblock.geometry;
        let at = g.cluster(g.clusters() - 1).plus(64);
        let me = owner(cluster, 1);
        let mut bytes = vec![0; 4096];
        let nonce = lunfs::layout::Nonce([3; 16]);
        LockRecord::new_born(at, me, nonce).encode(cluster.superblock.volume, &mut bytes);
        raw(cluster, 1).write(at.offset_bytes(), &bytes).unwrap();
    });
    assert_says(&said, "check 1", "gives birth");
}

#[test]
fn locks_swapped_by_those_who_may_not() {
    let stolen = caught(|cluster| {
        let me = owner(cluster, 1);
        swap_lock(cluster, 1, root_lock(cluster), |r| {
            r.mode = LockMode::Exclusive { owner: me, tenure: Tenure(r.swap_counter) };
            r.change_counter += 1;
        });
    });
    assert_says(&stolen, "check 2", "its owner is not settled");
    let fallen = caught(|cluster| {
        swap_lock(cluster, 0, root_lock(cluster), |r| {
            r.change_counter = 0;
            r.swap_counter += 1;
        });
    });
    assert_says(&fallen, "check 2", "does not rise by one");
    let tenure = caught(|cluster| {
        let me = owner(cluster, 0);
        swap_lock(cluster, 0, root_lock(cluster), |r| {
            r.mode = LockMode::Exclusive { owner: me, tenure: Tenure(r.swap_counter + 5) };
        });
    });
    assert_says(&tenure, "check 2", "the tenure is not");
    let openers = caught(|cluster| {
        let other = owner(cluster, 1).slot;
        swap_lock(cluster, 0, root_lock(cluster), |r| r.openers = SlotSet::of(other));
    });
    assert_says(&openers, "check 2", "opener bit");
}

#[test]
fn a_share_taken_away() {
    let said = caught(|cluster| {
        let root = cluster.root();
        cluster.on(1, |fs| fs.getattr(&cx(), root).map(drop)).unwrap();
        cluster.on(0, |fs| fs.getattr(&cx(), root).map(drop)).unwrap();
        let me = owner(cluster, 1);
        swap_lock(cluster, 1, root_lock(cluster), |r| {
            assert_eq!(r.mode, LockMode::Shared, "two readers share");
            r.mode = LockMode::Exclusive { owner: me, tenure: Tenure(r.swap_counter) };
            r.sharers = SlotSet::EMPTY;
        });
    });
    assert_says(&said, "check 2", "taken exclusively while others share it");
}

#[test]
fn a_foreign_slot_and_a_bell_rung_for_others() {
    let said = caught(|cluster| {
        let at = cluster.superblock.geometry.slot(owner(cluster, 0).slot);
        let old = cluster.lun.contents(at.offset_bytes(), RECORD_BYTES);
        let mut record = SlotRecord::decode(&old, cluster.superblock.volume, at).unwrap();
        record.beat += 1;
        record.nonce = lunfs::layout::Nonce([8; 16]);
        let mut new = old.clone();
        record.encode(cluster.superblock.volume, &mut new);
        let _ = raw(cluster, 1).compare_and_write(at.offset_bytes(), &old, &new);
    });
    assert_says(&said, "check 2", "changes slot");
    let said = caught(|cluster| {
        let at = cluster.superblock.geometry.doorbell(Slot(3));
        let old = cluster.lun.contents(at.offset_bytes(), RECORD_BYTES);
        let mut record = DoorbellRecord::decode(&old, cluster.superblock.volume, at).unwrap();
        record.swap_counter += 1;
        record.ringers = SlotSet::of(owner(cluster, 0).slot);
        record.nonce = lunfs::layout::Nonce([9; 16]);
        let mut new = old.clone();
        record.encode(cluster.superblock.volume, &mut new);
        let _ = raw(cluster, 1).compare_and_write(at.offset_bytes(), &old, &new);
    });
    assert_says(&said, "check 2", "turns the ringers");
}

#[test]
fn a_nonce_used_twice() {
    let said = caught(|cluster| {
        let at = root_lock(cluster);
        let old = cluster.lun.contents(at.offset_bytes(), RECORD_BYTES);
        let mut record = LockRecord::decode(&old, cluster.superblock.volume, at).unwrap();
        record.swap_counter += 1;
        let mut new = old.clone();
        record.encode(cluster.superblock.volume, &mut new);
        raw(cluster, 0).compare_and_write(at.offset_bytes(), &old, &new).unwrap();
    });
    assert_says(&said, "check 2", "was used before");
}

#[test]
fn a_write_past_the_lease() {
    let said = caught(|cluster| {
        cluster.may_end(0);
        // Beats execute no more; a lease later the host still writes, past its door.
        cluster.lun.partition(cluster.hosts[0].tag, lunfs::device::sim::Partition::Fail);
        rt::sleep(Duration::from_secs(9));
        cluster.lun.heal(cluster.hosts[0].tag);
        let at = cluster.superblock.geometry.journal(owner(cluster, 0).slot).plus(2);
        raw(cluster, 0).write(at.offset_bytes(), &[0; 4096]).unwrap();
    });
    assert_says(&said, "check 3", "past its lease");
}

#[test]
fn a_stale_block_served_from_the_cache() {
    let said = caught(|cluster| {
        let root = cluster.root();
        cluster.on(0, |fs| fs.getattr(&cx(), root).map(drop)).unwrap();
        cluster.hosts[0].volume.store().drain().unwrap();
        let mut block = cluster.block(root.body());
        InodeDisk::of_mut(&mut block).gid = 7.into();
        seal(&mut block[..]);
        cluster.lun.overwrite(root.body().offset_bytes(), &block[..]);
        cluster.on(0, |fs| fs.getattr(&cx(), root).map(drop)).unwrap();
    });
    assert_says(&said, "check 4", "differs on the LUN");
}

#[test]
fn a_lost_block_and_a_wrong_count() {
    use lunfs::layout::cluster::ClusterHeader;
    let said = caught(|cluster| {
        let g = cluster.superblock.geometry;
        for host in &cluster.hosts {
            host.volume.store().drain().unwrap();
        }
        let at = g.cluster_header(g.clusters() - 1);
        let mut block = cluster.block(at);
        let header: &mut ClusterHeader = zerocopy::FromBytes::mut_from_bytes(&mut block[..]).unwrap();
        header.free_blocks -= 1;
        seal(&mut block[..]);
        cluster.lun.overwrite(at.offset_bytes(), &block[..]);
    });
    assert_says(&said, "fsck found", "its header counts");
}
