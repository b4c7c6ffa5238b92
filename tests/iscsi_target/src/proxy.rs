//! A proxy between any initiator and any target that does mischief to chosen commands.
//!
//! TCP neither loses nor doubles a PDU, so the proxy keeps sequence numbers of its own towards both ends: a command that
//! it drops, delays or doubles leaves no gap that would stop the session, and neither does an answer. What it does looks
//! to both ends like a fault inside the other. Digests must be off, which every initiator here agrees to.
//!
//! Not done: doubling a write whose data doesn't come with the command, and several connections per session.

use std::collections::HashMap;
use std::io::{self, BufReader};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::faults::{Arrival, Rule, Rules, Standing, Which};
use crate::gate::Gate;
use crate::lock;
use crate::nexus::Nexus;
use crate::pdu::{self, Header, NO_TAG, Pdu, initiator, target};
use crate::scsi::cdb::Cdb;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Mischief {
    /// The command doesn't reach the target; both connections end.
    CutBefore,
    /// The command reaches the target; when its answer comes, both connections end without it.
    CutAfter,
    /// The command never reaches the target; the session goes on.
    Drop,
    /// The answer never reaches the initiator; the session goes on.
    LoseAnswer,
    /// The command reaches the target so much later; others overtake it.
    Delay { ms: u64 },
    /// The answer reaches the initiator so much later; others overtake it.
    AnswerLate { ms: u64 },
    /// The command reaches the target a second time, so much after the first; one of the answers goes back.
    Double {
        #[serde(default)]
        gap_ms: u64,
        #[serde(default)]
        answer: Which,
    },
}

struct Shared {
    to: SocketAddr,
    rules: Mutex<Rules<Mischief>>,
    gate: Gate,
    stopping: AtomicBool,
    connections: Mutex<Vec<Arc<Connection>>>,
}

/// A running proxy; dropping it ends it and all connections.
pub struct Proxy {
    portal: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    pub fn start(listen: SocketAddr, to: SocketAddr) -> io::Result<Proxy> {
        let listener = TcpListener::bind(listen)?;
        let portal = listener.local_addr()?;
        let shared = Arc::new(Shared {
            to,
            rules: Mutex::default(),
            gate: Gate::default(),
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
        });
        let accepting = shared.clone();
        let acceptor = std::thread::Builder::new().name("proxy".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if accepting.stopping.load(Ordering::SeqCst) {
                    return;
                }
                // A target that can't be reached looks like one: the connection ends.
                let _ = begin(&accepting, stream);
            }
        })?;
        Ok(Proxy { portal, shared, acceptor: Some(acceptor) })
    }

    pub fn portal(&self) -> SocketAddr {
        self.portal
    }

    pub fn add_rule(&self, rule: Rule<Mischief>) -> String {
        lock(&self.shared.rules).add(rule)
    }

    pub fn clear_rules(&self) {
        lock(&self.shared.rules).clear();
    }

    pub fn remove_rule(&self, id: &str) -> bool {
        lock(&self.shared.rules).remove(id)
    }

    pub fn rules(&self) -> Vec<Standing<Mischief>> {
        lock(&self.shared.rules).standing()
    }

    /// Nothing passes in either direction, for one initiator (part of its name) or for all, until `heal`.
    pub fn partition(&self, initiator: Option<&str>) {
        self.shared.gate.freeze(initiator);
    }

    pub fn heal(&self, initiator: Option<&str>) {
        self.shared.gate.thaw(initiator);
    }

    /// Ends all connections; how many there were.
    pub fn cut(&self) -> usize {
        let ended: Vec<Arc<Connection>> = std::mem::take(&mut *lock(&self.shared.connections));
        ended.iter().for_each(|one| one.cut());
        ended.len()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.gate.open_for_good();
        let _ = TcpStream::connect(self.portal);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.cut();
    }
}

/// What is to happen to the answer of a command.
#[derive(Clone, Copy)]
enum Fate {
    Cut,
    Swallow,
    Late(Duration),
    /// Goes back under this tag, and so does no other.
    Under(u32),
}

struct Numbers {
    /// The next number that the initiator will give a command, and that the target expects.
    initiator_command: u32,
    target_command: u32,
    /// The next status number that the initiator expects, and that the target will give.
    initiator_status: u32,
    target_status: u32,
    fates: HashMap<u32, Fate>,
    /// Answers that are to come late, until they are whole.
    gathered: HashMap<u32, Vec<Pdu>>,
    next_double: u32,
    full_feature: bool,
}

struct Connection {
    initiator: TcpStream,
    target: TcpStream,
    nexus: Mutex<Nexus>,
    /// Held over a write to either end, so that numbers go out in their order.
    numbers: Mutex<Numbers>,
}

fn begin(shared: &Arc<Shared>, initiator: TcpStream) -> io::Result<()> {
    let target = TcpStream::connect(shared.to)?;
    initiator.set_nodelay(true)?;
    target.set_nodelay(true)?;
    let numbers = Numbers {
        initiator_command: 0,
        target_command: 0,
        initiator_status: 0,
        target_status: 0,
        fates: HashMap::new(),
        gathered: HashMap::new(),
        next_double: 0,
        full_feature: false,
    };
    let connection = Arc::new(Connection {
        initiator,
        target,
        nexus: Mutex::new(Nexus::new("", [0; 6])),
        numbers: Mutex::new(numbers),
    });
    lock(&shared.connections).push(connection.clone());
    for up in [true, false] {
        let (shared, connection) = (shared.clone(), connection.clone());
        std::thread::Builder::new().name("proxy".into()).spawn(move || {
            let from = if up { &connection.initiator } else { &connection.target };
            if let Ok(from) = from.try_clone() {
                let _ = pump(&shared, &connection, &mut BufReader::new(from), up);
            }
            connection.cut();
            lock(&shared.connections).retain(|one| !Arc::ptr_eq(one, &connection));
        })?;
    }
    Ok(())
}

fn pump(
    shared: &Arc<Shared>,
    connection: &Arc<Connection>,
    from: &mut BufReader<TcpStream>,
    up: bool,
) -> io::Result<()> {
    while let Some(pdu) = pdu::read(from)? {
        let name = lock(&connection.nexus).to_string();
        shared.gate.wait(&name);
        match up {
            true => connection.towards_target(shared, pdu)?,
            false => connection.towards_initiator(pdu)?,
        }
    }
    Ok(())
}

impl Connection {
    fn cut(&self) {
        let _ = self.initiator.shutdown(Shutdown::Both);
        let _ = self.target.shutdown(Shutdown::Both);
    }

    fn towards_target(self: &Arc<Self>, shared: &Shared, pdu: Pdu) -> io::Result<()> {
        let header = &pdu.header;
        match header.opcode() {
            initiator::LOGIN => {
                let mut isid = [0; 6];
                isid.copy_from_slice(&header.0[8..14]);
                for (_, name) in pdu::pairs(&pdu.data).iter().filter(|(key, _)| key == "InitiatorName") {
                    *lock(&self.nexus) = Nexus::new(name, isid);
                }
                let mut numbers = lock(&self.numbers);
                numbers.initiator_command = header.command_number();
                numbers.target_command = header.command_number();
                return pdu::write(&mut &self.target, header.clone(), &pdu.extra, &pdu.data);
            }
            initiator::DATA_OUT => {
                let numbers = lock(&self.numbers);
                let header = header.clone().put_u32(28, numbers.target_status);
                return pdu::write(&mut &self.target, header, &pdu.extra, &pdu.data);
            }
            _ => {}
        }
        if !header.immediate() {
            let mut numbers = lock(&self.numbers);
            numbers.initiator_command = header.command_number().wrapping_add(1);
        }
        if header.opcode() != initiator::SCSI_COMMAND {
            return self.give(pdu);
        }
        let cdb = Cdb::new(header.cdb());
        let nexus = lock(&self.nexus).clone();
        let arrival =
            Arrival { nexus: &nexus, lun: header.lun().unwrap_or(u16::MAX), cdb: &cdb, blocks: cdb.blocks() };
        let taken = lock(&shared.rules).take(&arrival);
        let tag = header.tag();
        match taken.map(|(_, mischief)| mischief) {
            None => self.give(pdu),
            Some(Mischief::CutBefore) => Err(io::ErrorKind::ConnectionAborted.into()),
            Some(Mischief::CutAfter) => self.give_with(pdu, Fate::Cut),
            Some(Mischief::Drop) => Ok(()),
            Some(Mischief::LoseAnswer) => self.give_with(pdu, Fate::Swallow),
            Some(Mischief::AnswerLate { ms }) => self.give_with(pdu, Fate::Late(Duration::from_millis(ms))),
            Some(Mischief::Delay { ms }) => self.later(ms, move |connection| drop(connection.give(pdu))),
            Some(Mischief::Double { gap_ms, answer }) => {
                let whole = header.flags() & 0x20 == 0 || header.u32_at(20) as usize == pdu.data.len();
                if !whole {
                    // It would need an R2T of its own.
                    return self.give(pdu);
                }
                let mut numbers = lock(&self.numbers);
                numbers.next_double = (numbers.next_double + 1) & 0x0fff_ffff;
                let twin = 0xd000_0000 | numbers.next_double;
                let (first, second) = match answer {
                    Which::First => (Fate::Under(tag), Fate::Swallow),
                    Which::Second => (Fate::Swallow, Fate::Under(tag)),
                };
                numbers.fates.insert(tag, first);
                numbers.fates.insert(twin, second);
                drop(numbers);
                let copy = Pdu {
                    header: header.clone().put_u32(16, twin),
                    extra: pdu.extra.clone(),
                    data: pdu.data.clone(),
                };
                self.give(pdu)?;
                match gap_ms {
                    0 => self.give(copy),
                    _ => self.later(gap_ms, move |connection| drop(connection.give(copy))),
                }
            }
        }
    }

    fn later(self: &Arc<Self>, ms: u64, what: impl FnOnce(&Connection) + Send + 'static) -> io::Result<()> {
        let connection = self.clone();
        std::thread::Builder::new().name("later".into()).spawn(move || {
            std::thread::sleep(Duration::from_millis(ms));
            what(&connection);
        })?;
        Ok(())
    }

    fn give_with(&self, pdu: Pdu, fate: Fate) -> io::Result<()> {
        lock(&self.numbers).fates.insert(pdu.header.tag(), fate);
        self.give(pdu)
    }

    /// To the target, under the next number.
    fn give(&self, pdu: Pdu) -> io::Result<()> {
        let mut numbers = lock(&self.numbers);
        let header = pdu.header.put_u32(24, numbers.target_command).put_u32(28, numbers.target_status);
        if !header.immediate() {
            numbers.target_command = numbers.target_command.wrapping_add(1);
        }
        pdu::write(&mut &self.target, header, &pdu.extra, &pdu.data)
    }

    fn towards_initiator(self: &Arc<Self>, pdu: Pdu) -> io::Result<()> {
        let (opcode, tag) = (pdu.header.opcode(), pdu.header.tag());
        let mut numbers = lock(&self.numbers);
        if !numbers.full_feature {
            let status = pdu.header.u32_at(24).wrapping_add(1);
            (numbers.initiator_status, numbers.target_status) = (status, status);
            // T bit, next stage 3, no error.
            numbers.full_feature =
                opcode == target::LOGIN && pdu.header.flags() & 0x83 == 0x83 && pdu.header.0[36] == 0;
            return pdu::write(&mut &self.initiator, pdu.header, &pdu.extra, &pdu.data);
        }
        if is_numbered(&pdu.header) {
            numbers.target_status = pdu.header.u32_at(24).wrapping_add(1);
        }
        let of_command = matches!(opcode, target::SCSI_RESPONSE | target::DATA_IN);
        let last =
            opcode == target::SCSI_RESPONSE || (opcode == target::DATA_IN && pdu.header.flags() & 1 != 0);
        let fate = if of_command { numbers.fates.get(&tag).copied() } else { None };
        if last {
            numbers.fates.remove(&tag);
        }
        match fate {
            None => self.tell(&mut numbers, pdu),
            Some(Fate::Cut) => Err(io::ErrorKind::ConnectionAborted.into()),
            Some(Fate::Swallow) => Ok(()),
            Some(Fate::Under(tag)) => {
                let header = pdu.header.put_u32(16, tag);
                self.tell(&mut numbers, Pdu { header, ..pdu })
            }
            Some(Fate::Late(delay)) => {
                numbers.gathered.entry(tag).or_default().push(pdu);
                if !last {
                    return Ok(());
                }
                let whole = numbers.gathered.remove(&tag).unwrap_or_default();
                drop(numbers);
                self.later(delay.as_millis() as u64, move |connection| {
                    let mut numbers = lock(&connection.numbers);
                    for pdu in whole {
                        if connection.tell(&mut numbers, pdu).is_err() {
                            connection.cut();
                        }
                    }
                })
            }
        }
    }

    /// To the initiator, under the next number if it has one.
    fn tell(&self, numbers: &mut Numbers, pdu: Pdu) -> io::Result<()> {
        let numbered = is_numbered(&pdu.header);
        let ahead = numbers.initiator_command.wrapping_sub(numbers.target_command);
        let (expected, most) = (pdu.header.u32_at(28), pdu.header.u32_at(32));
        let mut header =
            pdu.header.put_u32(28, expected.wrapping_add(ahead)).put_u32(32, most.wrapping_add(ahead));
        // Data-In without status carries no number.
        if numbered || header.opcode() != target::DATA_IN {
            header = header.put_u32(24, numbers.initiator_status);
        }
        if numbered {
            numbers.initiator_status = numbers.initiator_status.wrapping_add(1);
        }
        pdu::write(&mut &self.initiator, header, &pdu.extra, &pdu.data)
    }
}

fn is_numbered(header: &Header) -> bool {
    match header.opcode() {
        target::DATA_IN => header.flags() & 0x01 != 0,
        target::NOP_IN => header.tag() != NO_TAG,
        target::R2T => false,
        _ => true,
    }
}

// --- the control socket ----------------------------------------------------------------------------------

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    Rule { rule: Rule<Mischief> },
    RemoveRule { id: String },
    ClearRules,
    Rules,
    Partition { initiator: Option<String> },
    Heal { initiator: Option<String> },
    Cut,
}

/// Serves a proxy until a `stop`.
pub fn serve(proxy: Proxy, path: &std::path::Path) -> io::Result<()> {
    crate::control::serve_lines(path, move |line| {
        use serde_json::json;
        Ok(match serde_json::from_str(line)? {
            Request::Rule { rule } => json!(proxy.add_rule(rule)),
            Request::RemoveRule { id } => json!(proxy.remove_rule(&id)),
            Request::ClearRules => json!(proxy.clear_rules()),
            Request::Rules => json!(proxy.rules()),
            Request::Partition { initiator } => json!(proxy.partition(initiator.as_deref())),
            Request::Heal { initiator } => json!(proxy.heal(initiator.as_deref())),
            Request::Cut => json!(proxy.cut()),
        })
    })
}
