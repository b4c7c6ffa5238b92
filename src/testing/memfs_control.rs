//! A Unix socket through which a test in another process pulls the in-memory filesystem's strings.
//!
//! A test can't live in the daemon's process: it would wait for itself. One command a line, one line back,
//! "ok ..." or "error ...":
//!
//! `block PATH`, `unblock PATH`, `waits`, `held`, `calls NAME`, `cacheable on|off`, `write PATH TEXT`,
//! `create PATH`, `remove PATH`, `forget-inode PATH`, `forget-names PATH`, `silence`, `end REASON`,
//! `lease MILLISECONDS`: as if a beat issued now had landed,
//! `grow PATH BYTES FILE`: makes the file a byte longer so many times, mostly at a quick pace, has the kernel forget it
//! each time, and at once says so in FILE: eight bytes, little-endian, the size that must be seen from now on.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::memfs::MemFs;
use crate::fs::api::{FsError, KernelCaches, OpContext, Operations};

/// Long enough for lookers to ask again.
const GROW_PAUSE: Duration = Duration::from_micros(250);
/// Long enough for what they are told to be kept.
const GROW_REST: Duration = Duration::from_millis(60);

type OnEnd = Box<dyn FnOnce(String) + Send>;

/// The in-memory filesystem as a volume that can be mounted.
pub struct MemVolume {
    pub fs: Arc<MemFs>,
    kernel: OnceLock<Arc<dyn KernelCaches>>,
    on_end: Mutex<Option<OnEnd>>,
}

impl MemVolume {
    pub fn new() -> Arc<MemVolume> {
        Arc::new(MemVolume { fs: Arc::new(MemFs::new()), kernel: OnceLock::new(), on_end: Mutex::new(None) })
    }

    pub fn attach_kernel(&self, caches: Arc<dyn KernelCaches>) {
        let _ = self.kernel.set(caches);
    }

    pub fn on_end(&self, end: OnEnd) {
        *self.on_end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
    }

    /// Listens for commands until the process ends.
    pub fn listen(self: &Arc<Self>, socket: &Path) -> std::io::Result<()> {
        let listener = UnixListener::bind(socket)?;
        let me = self.clone();
        crate::rt::try_spawn("memfs-control", move || {
            for stream in listener.incoming().flatten() {
                let me = me.clone();
                let _ = crate::rt::try_spawn("memfs-control", move || me.converse(stream));
            }
        })?;
        Ok(())
    }

    fn converse(&self, stream: UnixStream) {
        let Ok(mut out) = stream.try_clone() else { return };
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { return };
            let answer = match self.obey(&line) {
                Ok(text) => format!("ok {text}\n"),
                Err(error) => format!("error {error}\n"),
            };
            if out.write_all(answer.as_bytes()).is_err() {
                return;
            }
        }
    }

    fn obey(&self, line: &str) -> Result<String, FsError> {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (path, text) = rest.split_once(' ').unwrap_or((rest, ""));
        let kernel = || self.kernel.get().ok_or_else(|| FsError::Io("no kernel attached".into()));
        match command {
            "block" => self.fs.set_blocked(self.fs.find(path)?, true),
            "unblock" => self.fs.set_blocked(self.fs.find(path)?, false),
            "waits" => {
                let (waiting, refusals) = self.fs.waits();
                return Ok(format!("{waiting} {refusals}"));
            }
            "held" => return Ok(self.fs.held().to_string()),
            "calls" => return Ok(self.fs.calls().get(path).copied().unwrap_or(0).to_string()),
            "cacheable" => self.fs.set_cacheable(path == "on"),
            "write" => self.fs.write_behind(self.fs.find(path)?, text.as_bytes())?,
            "create" => {
                let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
                let parent = self.fs.find(directory)?;
                self.fs.mknod(&behind(), parent, name.as_bytes(), libc::S_IFREG | 0o644, 0)?;
            }
            "remove" => {
                let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
                self.fs.unlink(&behind(), self.fs.find(directory)?, name.as_bytes())?;
            }
            "forget-inode" => kernel()?.forget_inode(self.fs.find(path)?),
            "forget-names" => kernel()?.forget_names(self.fs.find(path)?),
            "grow" => {
                let (bytes, file) = text.split_once(' ').ok_or(FsError::Invalid)?;
                let (ino, bytes) = (self.fs.find(path)?, bytes.parse().map_err(|_| FsError::Invalid)?);
                let seen = std::fs::OpenOptions::new().write(true).open(file).map_err(failed)?;
                for size in 1..=bytes {
                    // As when a lock leaves: nothing new is answered before the kernel was made to forget.
                    self.fs.set_blocked(ino, true);
                    self.fs.write_behind(ino, &vec![b'x'; size])?;
                    kernel()?.forget_inode(ino);
                    seen.write_all_at(&(size as u64).to_le_bytes(), 0).map_err(failed)?;
                    self.fs.set_blocked(ino, false);
                    crate::rt::sleep(if size % 64 == 0 { GROW_REST } else { GROW_PAUSE });
                }
            }
            "silence" => kernel()?.silence(),
            "lease" => {
                let span = Duration::from_millis(path.parse().map_err(|_| FsError::Invalid)?);
                kernel()?.lease_until(crate::rt::Instant::now() + span);
            }
            "end" => {
                let end = self.on_end.lock().unwrap_or_else(PoisonError::into_inner).take();
                end.ok_or(FsError::Invalid)?(rest.to_owned());
            }
            _ => return Err(FsError::Invalid),
        }
        Ok(String::new())
    }
}

fn failed(error: std::io::Error) -> FsError {
    FsError::Io(error.to_string())
}

/// Who changes things behind the kernel's back.
fn behind() -> OpContext {
    OpContext { uid: 0, gid: 0, pid: 0, may_wait: true, interrupt: None, meant: Default::default() }
}
