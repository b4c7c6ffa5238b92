//! A kernel for the tests of this folder: sysfs is a directory, disks are paths to one LUN in memory (`lun`), and each
//! path fails as it is told.

mod lun;

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::stat::{major, makedev, minor};

pub use self::lun::BLOCKS;
use self::lun::{Lun, Nexus, check, with};
use super::door::{Kernel, Node, SgAnswer, SgCommand};
use crate::rt::{Mutex, sleep};

/// What becomes of one command.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Not sent.
    Errno(i32),
    /// Given up by the kernel; `executed` or not.
    Host {
        byte: u16,
        executed: bool,
    },
    Status(u8),
    /// CHECK CONDITION in fixed format: key, code, qualifier.
    Check(u8, u8, u8),
    /// The same in descriptor format.
    Descriptor(u8, u8, u8),
    /// Executed at once, answered after this long.
    Slow(Duration),
    /// Given up by the kernel after this long, and not executed.
    Fails {
        byte: u16,
        after: Duration,
    },
    /// From now on nothing answers but ENODEV, until the path is back.
    Dies,
}

#[derive(Default)]
struct PathWorld {
    number: u64,
    faults: VecDeque<(u8, Fault)>,
    /// How often it was opened since it came, or came back; nodes of before are dead.
    life: u64,
    dead: bool,
}

#[derive(Default)]
struct World {
    lun: Lun,
    paths: HashMap<String, PathWorld>,
    nodes: HashMap<PathBuf, u64>,
    log: Vec<(String, u8)>,
    locks: Vec<String>,
    claimed: bool,
}

/// See the module's header.
pub struct Fake {
    root: tempfile::TempDir,
    sysfs: PathBuf,
    world: Arc<Mutex<World>>,
}

fn put(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("{text}\n")).unwrap();
}

impl Fake {
    pub fn new() -> Fake {
        let root = tempfile::tempdir().unwrap();
        let sysfs = root.path().canonicalize().unwrap().join("sys");
        Fake { root, sysfs, world: Arc::default() }
    }

    /// The directory of a device below `devices`, with its link by number.
    pub fn block(&self, at: &str, number: u64) -> PathBuf {
        let dir = self.sysfs.join("devices").join(at);
        put(&dir.join("dev"), &format!("{}:{}", major(number), minor(number)));
        put(&dir.join("size"), &BLOCKS.to_string());
        put(&dir.join("ro"), "0");
        let links = self.sysfs.join("dev/block");
        fs::create_dir_all(&links).unwrap();
        symlink(&dir, links.join(format!("{}:{}", major(number), minor(number)))).unwrap();
        fs::create_dir_all(dir.join("holders")).unwrap();
        dir
    }

    /// A SCSI disk, `place` like "platform/host3/session1/target3:0:0/3:0:0:1"; its number is 8:16 * `n`.
    pub fn disk(&self, name: &str, n: u64, place: &str) -> PathBuf {
        let number = makedev(8, 16 * n);
        let dir = self.block(&format!("{place}/block/{name}"), number);
        let device = self.sysfs.join("devices").join(place);
        put(&device.join("state"), "running");
        put(&device.join("timeout"), "30");
        put(&device.join("eh_timeout"), "10");
        put(&device.join("queue_depth"), "32");
        put(&dir.join("queue/max_segments"), "128");
        let driver = self.sysfs.join("bus/scsi/drivers/sd");
        fs::create_dir_all(&driver).unwrap();
        symlink(&driver, device.join("driver")).unwrap();
        symlink(&device, dir.join("device")).unwrap();
        let mut world = self.world.lock();
        world.lun.nexuses.insert(name.into(), Nexus::default());
        world.paths.insert(name.into(), PathWorld { number, ..PathWorld::default() });
        world.nodes.insert(format!("/dev/{name}").into(), number);
        dir
    }

    /// A plain disk `sda` on an adapter of its own.
    pub fn plain() -> Arc<Fake> {
        let fake = Fake::new();
        fake.disk("sda", 0, "pci0/host0/target0:0:0/0:0:0:0");
        fake.adapter("pci0/host0", "mpt3sas", "5");
        Arc::new(fake)
    }

    /// A multipath device over `sda` and `sdb`.
    pub fn multipath() -> Arc<Fake> {
        let fake = Fake::new();
        let a = fake.disk("sda", 0, "pci0/host0/target0:0:0/0:0:0:0");
        let b = fake.disk("sdb", 1, "pci0/host1/target1:0:0/1:0:0:0");
        fake.adapter("pci0/host0", "mpt3sas", "5");
        fake.adapter("pci0/host1", "mpt3sas", "5");
        let dm = fake.mapping("dm-0", 0, "mpath-3600", "mpatha");
        fake.slave(&dm, &a);
        fake.slave(&dm, &b);
        Arc::new(fake)
    }

    pub fn adapter(&self, host: &str, driver: &str, eh_deadline: &str) {
        let at = self.sysfs.join("devices").join(host);
        let at = at.join("scsi_host").join(at.file_name().unwrap());
        put(&at.join("proc_name"), driver);
        put(&at.join("eh_deadline"), eh_deadline);
    }

    pub fn mapping(&self, name: &str, n: u64, uuid: &str, of: &str) -> PathBuf {
        let dir = self.block(&format!("virtual/block/{name}"), makedev(254, n));
        put(&dir.join("dm/uuid"), uuid);
        put(&dir.join("dm/name"), of);
        fs::create_dir_all(dir.join("slaves")).unwrap();
        let mut world = self.world.lock();
        world.nodes.insert(format!("/dev/mapper/{of}").into(), makedev(254, n));
        world.paths.insert(name.into(), PathWorld { number: makedev(254, n), ..PathWorld::default() });
        dir
    }

    pub fn slave(&self, mapping: &Path, disk: &Path) {
        symlink(disk, mapping.join("slaves").join(disk.file_name().unwrap())).unwrap();
        symlink(mapping, disk.join("holders").join(mapping.file_name().unwrap())).unwrap();
    }

    pub fn node(&self, path: &str, number: u64) {
        self.world.lock().nodes.insert(path.into(), number);
    }

    pub fn attribute(&self, path: &Path, text: &str) {
        put(path, text);
    }

    pub fn devices(&self) -> PathBuf {
        self.sysfs.join("devices")
    }

    /// The next command with this opcode on this path ends so.
    pub fn fault(&self, path: &str, opcode: u8, fault: Fault) {
        self.world.lock().paths.get_mut(path).unwrap().faults.push_back((opcode, fault));
    }

    pub fn attention(&self, path: &str, asc: u8, ascq: u8) {
        self.world.lock().lun.nexus(path).attentions.push_back((asc, ascq));
    }

    /// A path that died comes back, as a new nexus without a registration, unless `kept`.
    pub fn come_back(&self, path: &str, kept: bool) {
        let mut world = self.world.lock();
        let back = world.paths.get_mut(path).unwrap();
        back.dead = false;
        back.life += 1;
        if !kept {
            world.lun.nexus(path).key = None;
        }
    }

    pub fn change_serial(&self) {
        self.world.lock().lun.serial = b"S2".to_vec();
    }

    /// Another host preempts this key.
    pub fn preempt(&self, key: u64) {
        for nexus in self.world.lock().lun.nexuses.values_mut() {
            if nexus.key == Some(key) {
                nexus.key = None;
                nexus.attentions.push_back((0x2A, 0x05));
            }
        }
    }

    pub fn keys(&self) -> Vec<(String, u64)> {
        let world = self.world.lock();
        let nexuses = world.lun.nexuses.iter();
        let mut keys: Vec<_> = nexuses.filter_map(|(name, nexus)| Some((name.clone(), nexus.key?))).collect();
        keys.sort();
        keys
    }

    pub fn bytes(&self, at: u64) -> Vec<u8> {
        let at = at as usize;
        self.world.lock().lun.bytes[at..at + 512].to_vec()
    }

    /// Opcodes that were sent, and over which path, since this was asked before.
    pub fn take_log(&self) -> Vec<(String, u8)> {
        std::mem::take(&mut self.world.lock().log)
    }
}

impl Kernel for Fake {
    fn sysfs(&self) -> &Path {
        assert!(self.root.path().exists());
        &self.sysfs
    }

    fn block_device(&self, path: &Path) -> io::Result<Option<u64>> {
        Ok(self.world.lock().nodes.get(path).copied())
    }

    fn open(&self, name: &str, number: u64) -> io::Result<Arc<dyn Node>> {
        let world = self.world.lock();
        let path = world.paths.get(name).filter(|path| !path.dead && path.number == number);
        let life = path.ok_or_else(|| io::Error::from_raw_os_error(libc::ENXIO))?.life;
        Ok(Arc::new(FakeNode { world: self.world.clone(), name: name.into(), life }))
    }

    fn claim(&self, _: &Path) -> io::Result<Box<dyn Any + Send + Sync>> {
        match std::mem::replace(&mut self.world.lock().claimed, true) {
            true => Err(io::Error::from_raw_os_error(libc::EBUSY)),
            false => Ok(Box::new(())),
        }
    }
}

struct FakeNode {
    world: Arc<Mutex<World>>,
    name: String,
    life: u64,
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        let id = format!("{} {:p}", self.name, self);
        self.world.lock().locks.retain(|held| *held != id);
    }
}

impl Node for FakeNode {
    fn sg_io(&self, command: &mut SgCommand<'_>) -> io::Result<SgAnswer> {
        let opcode = command.cdb[0];
        let mut world = self.world.lock();
        world.log.push((self.name.clone(), opcode));
        let path = world.paths.get_mut(&self.name).unwrap();
        if path.dead || path.life != self.life {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let fault = match path.faults.front() {
            Some((of, _)) if *of == opcode => path.faults.pop_front().map(|(_, fault)| fault),
            _ => None,
        };
        match fault {
            None => {}
            Some(Fault::Errno(errno)) => return Err(io::Error::from_raw_os_error(errno)),
            Some(Fault::Status(status)) => return Ok(with(status)),
            Some(Fault::Check(key, asc, ascq)) => return Ok(check(key, asc, ascq)),
            Some(Fault::Descriptor(key, asc, ascq)) => {
                let sense = vec![0x72, key, asc, ascq, 0, 0, 0, 0];
                return Ok(SgAnswer { sense, ..check(key, asc, ascq) });
            }
            Some(Fault::Host { byte, executed }) => {
                if executed {
                    world.lun.execute(&self.name, command);
                }
                return Ok(SgAnswer { host_status: byte, ..SgAnswer::default() });
            }
            Some(Fault::Slow(span)) => {
                let answer = world.lun.execute(&self.name, command);
                drop(world);
                sleep(span);
                return Ok(answer);
            }
            Some(Fault::Fails { byte, after }) => {
                drop(world);
                sleep(after);
                return Ok(SgAnswer { host_status: byte, ..SgAnswer::default() });
            }
            Some(Fault::Dies) => {
                path.dead = true;
                return Err(io::Error::from_raw_os_error(libc::ENODEV));
            }
        }
        Ok(world.lun.execute(&self.name, command))
    }

    fn drop_page_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        let id = format!("{} {:p}", self.name, self);
        let mut world = self.world.lock();
        let mine = format!("{} ", self.name);
        if world.locks.iter().any(|held| held.starts_with(&mine) && *held != id) {
            return Ok(false);
        }
        world.locks.push(id);
        Ok(true)
    }
}
