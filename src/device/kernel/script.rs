//! A kernel and a LUN for the tests of this folder: sysfs is a directory, disks are paths to one LUN in memory, and
//! each path fails as it is told.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::stat::{major, makedev, minor};

use super::door::{Kernel, Node, SgAnswer, SgCommand, SgData};
use crate::device::scsi::transport::status;
use crate::rt::{Mutex, sleep};

pub const BLOCKS: u64 = 2048;

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
    /// From now on nothing answers but ENODEV, until the path is back.
    Dies,
}

#[derive(Default)]
struct PathWorld {
    number: u64,
    faults: VecDeque<(u8, Fault)>,
    attentions: VecDeque<(u8, u8)>,
    key: Option<u64>,
    /// How often it was opened since it came, or came back; nodes of before are dead.
    life: u64,
    dead: bool,
}

#[derive(Default)]
struct World {
    bytes: Vec<u8>,
    serial: Vec<u8>,
    paths: HashMap<String, PathWorld>,
    nodes: HashMap<PathBuf, u64>,
    reserved: bool,
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
        let world =
            World { bytes: vec![0; BLOCKS as usize * 512], serial: b"S1".to_vec(), ..World::default() };
        Fake { root, sysfs, world: Arc::new(Mutex::new(world)) }
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
        self.world.lock().paths.get_mut(path).unwrap().attentions.push_back((asc, ascq));
    }

    /// A path that died comes back, as a new nexus without a registration, unless `kept`.
    pub fn come_back(&self, path: &str, kept: bool) {
        let mut world = self.world.lock();
        let path = world.paths.get_mut(path).unwrap();
        path.dead = false;
        path.life += 1;
        if !kept {
            path.key = None;
        }
    }

    pub fn change_serial(&self) {
        self.world.lock().serial = b"S2".to_vec();
    }

    /// Another host preempts this key.
    pub fn preempt(&self, key: u64) {
        for path in self.world.lock().paths.values_mut() {
            if path.key == Some(key) {
                path.key = None;
                path.attentions.push_back((0x2A, 0x05));
            }
        }
    }

    pub fn keys(&self) -> Vec<(String, u64)> {
        let world = self.world.lock();
        let mut keys: Vec<_> =
            world.paths.iter().filter_map(|(name, path)| Some((name.clone(), path.key?))).collect();
        keys.sort();
        keys
    }

    pub fn bytes(&self, at: u64) -> Vec<u8> {
        let at = at as usize;
        self.world.lock().bytes[at..at + 512].to_vec()
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

fn check(key: u8, asc: u8, ascq: u8) -> SgAnswer {
    let mut sense = vec![0; 18];
    (sense[0], sense[2], sense[7], sense[12], sense[13]) = (0x70, key, 10, asc, ascq);
    SgAnswer { status: status::CHECK_CONDITION, driver_status: 8, sense, ..SgAnswer::default() }
}

fn with(status: u8) -> SgAnswer {
    SgAnswer { status, ..SgAnswer::default() }
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
                    world.execute(&self.name, command);
                }
                return Ok(SgAnswer { host_status: byte, ..SgAnswer::default() });
            }
            Some(Fault::Slow(span)) => {
                let answer = world.execute(&self.name, command);
                drop(world);
                sleep(span);
                return Ok(answer);
            }
            Some(Fault::Dies) => {
                path.dead = true;
                return Err(io::Error::from_raw_os_error(libc::ENODEV));
            }
        }
        Ok(world.execute(&self.name, command))
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

impl World {
    fn execute(&mut self, nexus: &str, command: &mut SgCommand<'_>) -> SgAnswer {
        let cdb = command.cdb;
        let opcode = cdb[0];
        let path = self.paths.get_mut(nexus).unwrap();
        if opcode != 0x12
            && let Some((asc, ascq)) = path.attentions.pop_front()
        {
            return check(6, asc, ascq);
        }
        let mine = path.key;
        if self.reserved && mine.is_none() && matches!(opcode, 0x42 | 0x89 | 0x8A | 0x91 | 0x93) {
            // As newer kernels say it, and older ones: with their comment.
            let host_status = if nexus == "sda" { 0x11 } else { 0 };
            return SgAnswer { host_status, ..with(status::RESERVATION_CONFLICT) };
        }
        let lba = cdb.get(2..10).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()));
        let from = (lba as usize).saturating_mul(512);
        match (opcode, &mut command.data) {
            (0x00, _) => with(status::GOOD),
            (0x91, _) => with(status::GOOD),
            (0x88, SgData::In(buf)) => {
                buf.copy_from_slice(&self.bytes[from..from + buf.len()]);
                with(status::GOOD)
            }
            (0x8A, SgData::Out(data)) => {
                self.bytes[from..from + data.len()].copy_from_slice(data);
                with(status::GOOD)
            }
            (0x89, SgData::Out(data)) => {
                assert_eq!((data.len(), cdb[13]), (1024, 1));
                if self.bytes[from..from + 512] != data[..512] {
                    return check(0xE, 0x1D, 0);
                }
                self.bytes[from..from + 512].copy_from_slice(&data[512..]);
                with(status::GOOD)
            }
            (0x93, SgData::Out(data)) => {
                let blocks = u32::from_be_bytes(cdb[10..14].try_into().unwrap()) as usize;
                for block in self.bytes[from..from + blocks * 512].chunks_mut(512) {
                    block.copy_from_slice(data);
                }
                with(status::GOOD)
            }
            (0x42, SgData::Out(list)) => {
                let at = u64::from_be_bytes(list[8..16].try_into().unwrap()) as usize * 512;
                let blocks = u32::from_be_bytes(list[16..20].try_into().unwrap()) as usize;
                self.bytes[at..at + blocks * 512].fill(0);
                with(status::GOOD)
            }
            (0x5F, SgData::Out(list)) => self.reserve_out(nexus, cdb[1], list),
            (_, SgData::In(buf)) => match self.describe(cdb) {
                Some(bytes) => {
                    let len = bytes.len().min(buf.len());
                    buf[..len].copy_from_slice(&bytes[..len]);
                    SgAnswer { residual: (buf.len() - len) as i32, ..SgAnswer::default() }
                }
                None => check(5, 0x24, 0),
            },
            _ => check(5, 0x20, 0),
        }
    }

    fn describe(&self, cdb: &[u8]) -> Option<Vec<u8>> {
        let page = |code: u8, body: &[u8]| {
            let mut bytes = vec![0, code, 0, body.len() as u8];
            bytes.extend(body);
            Some(bytes)
        };
        match (cdb[0], cdb[1], cdb[2]) {
            (0x12, 0, _) => {
                let mut bytes = vec![0; 8];
                bytes.extend(b"ACME    LUN of tests    0007");
                Some(bytes)
            }
            (0x12, 1, 0x80) => page(0x80, &self.serial),
            (0x12, 1, 0x83) => page(0x83, &[1, 3, 0, 4, 0x60, 1, 2, 3]),
            (0x9E, ..) => {
                let mut bytes = vec![0; 32];
                bytes[..8].copy_from_slice(&(BLOCKS - 1).to_be_bytes());
                bytes[8..12].copy_from_slice(&512u32.to_be_bytes());
                bytes[14] = 0x80;
                Some(bytes)
            }
            (0x1A, ..) => Some(vec![15, 0, 0, 0, 8, 10, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (0x5E, 0, _) => {
                let keys: Vec<u64> = self.paths.values().filter_map(|path| path.key).collect();
                let mut bytes = vec![0, 0, 0, 1, 0, 0, 0, keys.len() as u8 * 8];
                bytes.extend(keys.iter().flat_map(|key| key.to_be_bytes()));
                Some(bytes)
            }
            _ => None,
        }
    }

    fn reserve_out(&mut self, nexus: &str, action: u8, list: &[u8]) -> SgAnswer {
        let key = u64::from_be_bytes(list[..8].try_into().unwrap());
        let service = u64::from_be_bytes(list[8..16].try_into().unwrap());
        let path = self.paths.get_mut(nexus).unwrap();
        let registered = path.key;
        match action & 0x1F {
            0 if registered.unwrap_or(0) != key => return with(status::RESERVATION_CONFLICT),
            0 | 6 => path.key = Some(service).filter(|key| *key != 0),
            _ if registered != Some(key) => return with(status::RESERVATION_CONFLICT),
            1 => self.reserved = true,
            4 | 5 => {
                for path in self.paths.values_mut() {
                    if path.key == Some(service) {
                        path.key = None;
                    }
                }
            }
            _ => return check(5, 0x24, 0),
        }
        if self.paths.values().all(|path| path.key.is_none()) {
            self.reserved = false;
        }
        with(status::GOOD)
    }
}
