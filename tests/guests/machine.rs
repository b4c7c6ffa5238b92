//! A guest: a QEMU process with a real kernel, and commands inside it.
//!
//! Its disks are LUNs of a target on loopback, reached by QEMU's own initiator and handed through (`scsi-block`), so each
//! SCSI command of the guest's kernel comes to the target as it is. Only machines that are to be a target, or to reach one by their
//! kernel's initiator, have a network, of which the other end is QEMU. SIGKILL of QEMU is the death of a host, SIGSTOP one that
//! stands still while its clock goes on, the monitor's `stop` one whose clock stands still as well.
//!
//! A guest doesn't outlive its test, however that ends: dropping it kills QEMU, and the kernel does where nothing is dropped.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::monitor;

/// How long a command may take on a slow machine, if nothing else is said. Where others have the processors, a guest that is
/// ready in 6 s on a quiet machine has taken three minutes.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A LUN that QEMU hands through.
#[derive(Clone)]
pub struct Lun {
    pub portal: SocketAddr,
    pub target: String,
}

/// The network that a guest has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Network {
    None,
    /// It reaches loopback of this machine, which is 10.0.2.2 there.
    Reaches,
    /// Its port 3260 is this port of loopback here, and it reaches nothing.
    IsReached(u16),
}

/// What a guest is made of.
#[derive(Clone)]
pub struct Machine {
    pub name: String,
    /// Kernel and initramfs.
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// /dev/sda and so on, each by an initiator of its own.
    pub disks: Vec<Lun>,
    pub network: Network,
    pub memory_mib: u32,
}

pub struct Guest {
    pub name: String,
    /// The name of the initiator of its first disk, by which the target knows it.
    pub initiator: String,
    process: Child,
    console: PathBuf,
    monitor: PathBuf,
    disks: usize,
    channel: Arc<Channel>,
}

/// The name of the initiator of one of a guest's disks.
pub fn initiator(guest: &str, disk: usize) -> String {
    match disk {
        0 => format!("iqn.2026-01.org.lunfs.test:{guest}"),
        _ => format!("iqn.2026-01.org.lunfs.test:{guest}-{disk}"),
    }
}

struct Channel {
    stream: Mutex<UnixStream>,
    next: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    commands: HashMap<u64, Done>,
    /// The guest's end is closed.
    gone: bool,
}

/// What a command said, and its exit status when it ended.
#[derive(Clone, Default, Debug)]
pub struct Done {
    pub what: String,
    pub out: Vec<String>,
    pub err: Vec<String>,
    pub status: Option<i32>,
}

impl Done {
    pub fn text(&self) -> String {
        self.out.join("\n")
    }
}

/// A command that may still run.
pub struct Running {
    guest: String,
    id: u64,
    channel: Arc<Channel>,
}

impl Guest {
    /// Starts a guest; it isn't ready yet.
    pub fn start(directory: &Path, machine: &Machine) -> Guest {
        let name = &machine.name;
        let socket = directory.join(format!("{name}.agent"));
        let monitor = directory.join(format!("{name}.monitor"));
        // An earlier life's.
        let _ = std::fs::remove_file(&socket);
        let console = directory.join(format!("{name}.console"));
        // Numbers of 32 digits that differ in their first: identities of machines.
        let identity =
            format!("{:02x}", name.bytes().fold(7u8, |sum, b| sum.wrapping_mul(31).wrapping_add(b)));
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .args(["-machine", "q35", "-m", &machine.memory_mib.to_string(), "-smp", "2"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())])
            .arg("-kernel")
            .arg(&machine.kernel)
            .arg("-initrd")
            .arg(&machine.initramfs)
            .arg("-append")
            // With its watchdog a kernel that was frozen finds its clock unsteady and patches itself, of which one died
            // (Linux 7.2.11 on emulated processors of QEMU 7.2).
            .arg(format!(
                "console=ttyS0 panic=-1 mitigations=off tsc=reliable quiet guest.name={name} guest.machine={}",
                identity.repeat(16)
            ))
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", &format!("socket,id=agent,server=on,wait=off,path={}", socket.display())])
            .args(["-device", "virtserialport,chardev=agent,name=org.lunfs.agent"])
            .args(["-device", "virtio-scsi-pci,id=scsi"]);
        for (n, Lun { portal, target }) in machine.disks.iter().enumerate() {
            let lun = format!(
                "driver=iscsi,node-name=lun{n},transport=tcp,portal={portal},target={target},lun=1,\
                 initiator-name={},timeout=5",
                initiator(name, n)
            );
            qemu.args(["-blockdev", &lun, "-device"]);
            qemu.arg(format!("scsi-block,drive=lun{n},bus=scsi.0,scsi-id={n},share-rw=on"));
        }
        let network = match machine.network {
            Network::None => None,
            Network::Reaches => Some("user,id=net".to_owned()),
            Network::IsReached(port) => {
                Some(format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:3260"))
            }
        };
        if let Some(network) = network {
            qemu.args(["-netdev", &network, "-device", "virtio-net-pci,netdev=net,romfile="]);
        }
        let process = qemu.stdin(Stdio::null()).spawn().expect("QEMU starts");
        let mut guest = Guest {
            name: name.clone(),
            initiator: initiator(name, 0),
            process,
            console,
            monitor,
            disks: machine.disks.len(),
            // Not connected to anybody yet.
            channel: Channel::over(UnixStream::pair().expect("a pair of sockets").0),
        };
        let stream = guest.connect(&socket);
        guest.channel = Channel::over(stream);
        guest
    }

    fn connect(&mut self, socket: &Path) -> UnixStream {
        let start = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(socket) {
                return stream;
            }
            let ended = self.process.try_wait().expect("a child");
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "{}: QEMU does not start: {ended:?}",
                self.name
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the kernel has its disks and the agent answers.
    pub fn wait_until_ready(&self) {
        for letter in ('a'..='z').take(self.disks) {
            self.run(&format!("until [ -b /dev/sd{letter} ]; do sleep 0.05; done"));
        }
        self.run("true");
    }

    /// Loads a set of modules (`prepare` names them).
    pub fn load(&self, set: &str) {
        self.run(&format!(
            "while read -r module; do grep -q \"^$(basename $module .ko | tr - _) \" /proc/modules || \
             insmod /modules/$module; done </modules/{set}"
        ));
    }

    /// Makes its network usable.
    pub fn connect_network(&self) {
        self.load("network");
        self.run(
            "ip link set lo up && until [ -e /sys/class/net/eth0 ]; do sleep 0.05; done && \
             ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up",
        );
    }

    /// Starts a shell script.
    pub fn start_command(&self, script: &str) -> Running {
        let id = self.channel.next.fetch_add(1, Ordering::Relaxed);
        let done = Done { what: script.to_owned(), ..Done::default() };
        self.channel.state().commands.insert(id, done);
        self.channel.say(&json!({"id": id, "run": ["/bin/sh", "-c", script]}));
        Running { guest: self.name.clone(), id, channel: self.channel.clone() }
    }

    /// Runs a script that must succeed; what it said.
    pub fn run(&self, script: &str) -> String {
        let done = self.try_run(script);
        assert_eq!(done.status, Some(0), "{}: {done:#?}", self.name);
        done.text()
    }

    /// Runs a script to its end, whatever that is.
    pub fn try_run(&self, script: &str) -> Done {
        self.start_command(script).end(PATIENCE)
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("QEMU lives");
    }

    /// The machine stands still; its clock goes on.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// The machine stands still, and so does its clock.
    pub fn pause(&self) {
        monitor::carry_out(&self.monitor, "stop");
    }

    pub fn unpause(&self) {
        monitor::carry_out(&self.monitor, "cont");
    }

    /// The machine is no more.
    pub fn kill(&mut self) {
        self.process.kill().expect("QEMU can be killed");
        self.process.wait().expect("a child");
    }

    /// What its kernel said.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.console).unwrap_or_default()).into_owned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            let console = self.console();
            let lines: Vec<&str> = console.lines().collect();
            eprintln!("--- console of {}, its end:", self.name);
            lines[lines.len().saturating_sub(40)..].iter().for_each(|line| eprintln!("{line}"));
            let state = self.channel.state();
            for daemon in state.commands.values().filter(|command| command.what.contains(" lunfs mount ")) {
                eprintln!("--- {}: {} ({:?}):", self.name, daemon.what, daemon.status);
                daemon.err.iter().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

impl Channel {
    fn over(stream: UnixStream) -> Arc<Channel> {
        let lines = BufReader::new(stream.try_clone().expect("a descriptor"));
        let channel = Arc::new(Channel {
            stream: Mutex::new(stream),
            next: AtomicU64::new(1),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let listener = channel.clone();
        std::thread::spawn(move || listener.listen(lines));
        channel
    }

    /// Also after a failed wait.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, message: &Value) {
        // A guest that is gone is noticed where its answer is missed.
        let _ = self.stream.lock().expect("no panic").write_all(format!("{message}\n").as_bytes());
    }

    fn listen(&self, lines: impl BufRead) {
        for line in lines.lines().map_while(Result::ok) {
            // A guest that is killed can leave half a line.
            let Ok(message) = serde_json::from_str::<Value>(&line) else { continue };
            let mut state = self.state();
            let Some(command) = message["id"].as_u64().and_then(|id| state.commands.get_mut(&id)) else {
                continue;
            };
            command.out.extend(message["out"].as_str().map(str::to_owned));
            command.err.extend(message["err"].as_str().map(str::to_owned));
            if let Some(status) = message["status"].as_i64() {
                command.status = i32::try_from(status).ok();
            }
            self.changed.notify_all();
        }
        self.state().gone = true;
        self.changed.notify_all();
    }
}

impl Running {
    /// What was said until now.
    pub fn so_far(&self) -> Done {
        self.channel.state().commands[&self.id].clone()
    }

    fn wait(&self, within: Duration, what: &str, met: impl Fn(&Done) -> bool) -> Done {
        let deadline = Instant::now() + within;
        let mut state = self.channel.state();
        loop {
            let done = &state.commands[&self.id];
            if met(done) {
                return done.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let guest = &self.guest;
            assert!(!state.gone, "{guest} is gone, no {what}: {done:#?}");
            assert!(!left.is_zero(), "{guest}: no {what} within {within:?}: {done:#?}");
            state = self.channel.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for a line on its standard output that begins so.
    pub fn wait_for(&self, start: &str, within: Duration) {
        self.wait(within, &format!("line {start:?}"), |done| {
            assert!(
                done.status.is_none() || done.out.iter().any(|line| line.starts_with(start)),
                "{done:#?}"
            );
            done.out.iter().any(|line| line.starts_with(start))
        });
    }

    /// Waits for its end.
    pub fn end(self, within: Duration) -> Done {
        self.wait(within, "end", |done| done.status.is_some())
    }

    /// Waits for a good end.
    pub fn succeed(self, within: Duration) -> String {
        let guest = self.guest.clone();
        let done = self.end(within);
        assert_eq!(done.status, Some(0), "{guest}: {done:#?}");
        done.text()
    }
}
