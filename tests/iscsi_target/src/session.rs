//! A connection in full-feature phase: sequence numbers, data in both directions, task management, text, pings.
//!
//! One connection per session, error recovery level 0: what goes wrong on the wire ends the session, and the
//! initiator logs in again. Command numbers must come one after the other; others are ignored, as the standard has it.
//!
//! Answers are written by whichever thread finished the command, under the session's lock for writing. A thread that
//! waits there for an initiator that doesn't read holds no other lock.

use std::collections::HashMap;
use std::io::{self, BufReader};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::attention;
use crate::lock;
use crate::login::{self, LoggedIn, Parameters};
use crate::nexus::Nexus;
use crate::pdu::{self, Header, NO_TAG, Pdu, initiator, target};
use crate::run::Task;
use crate::scsi::TRANSFER_BYTES_MAX;
use crate::scsi::cdb::Cdb;
use crate::sense::{Answer, GOOD};
use crate::target::{Lun, Shared};

/// Commands that an initiator may have outstanding.
pub const WINDOW: u32 = 128;

struct Out {
    stream: TcpStream,
    status_number: u32,
}

pub(crate) struct Session {
    shared: Arc<Shared>,
    /// `None`: a discovery session.
    nexus: Option<Nexus>,
    /// TSIH.
    pub handle: u16,
    pub parameters: Parameters,
    stream: TcpStream,
    out: Mutex<Out>,
    expected_command: AtomicU32,
    closed: AtomicBool,
    /// Commands that wait, by tag, for ABORT TASK.
    held: Mutex<HashMap<u32, Arc<Task>>>,
    pings: AtomicU32,
}

/// A write that waits for its data.
struct Gathering {
    header: Header,
    data: Vec<u8>,
    have: usize,
    expected: usize,
    /// The number the next Data-Out PDU of this burst must have.
    data_number: u32,
    /// The outstanding R2T: its tag and where its burst ends. `None` while unsolicited data comes.
    asked: Option<(u32, usize)>,
    requests: u32,
    /// Data came wrong: the command fails when all of it is there.
    broken: bool,
}

impl Session {
    pub fn new(shared: Arc<Shared>, stream: TcpStream, login: &LoggedIn, handle: u16) -> io::Result<Session> {
        let out = Out { stream: stream.try_clone()?, status_number: login.status_number };
        Ok(Session {
            shared,
            nexus: login.nexus.clone(),
            handle,
            parameters: login.parameters.clone(),
            stream,
            out: Mutex::new(out),
            expected_command: AtomicU32::new(login.command_number),
            closed: AtomicBool::new(false),
            held: Mutex::default(),
            pings: AtomicU32::new(0),
        })
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub fn nexus(&self) -> Option<&Nexus> {
        self.nexus.as_ref()
    }

    pub fn initiator(&self) -> &str {
        self.nexus.as_ref().map_or("", |nexus| &nexus.initiator)
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub fn mark_closed(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    pub fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    pub fn hold(&self, task: &Arc<Task>) {
        lock(&self.held).insert(task.tag, task.clone());
    }

    pub fn let_go(&self, task: &Arc<Task>) {
        let mut held = lock(&self.held);
        if held.get(&task.tag).is_some_and(|one| Arc::ptr_eq(one, task)) {
            held.remove(&task.tag);
        }
    }

    // --- answers ---------------------------------------------------------------------------------------

    /// With a status number of its own, if `numbered`. A broken connection shows where it is read.
    fn send(&self, header: Header, data: &[u8], numbered: bool) {
        let mut out = lock(&self.out);
        self.send_locked(&mut out, header, data, numbered);
    }

    fn send_locked(&self, out: &mut Out, header: Header, data: &[u8], numbered: bool) {
        let expected = self.expected_command.load(Ordering::SeqCst);
        let header = header
            .put_u32(24, out.status_number)
            .put_u32(28, expected)
            .put_u32(32, expected.wrapping_add(WINDOW - 1));
        if numbered {
            out.status_number = out.status_number.wrapping_add(1);
        }
        if pdu::write(&mut out.stream, header, &[], data).is_err() {
            self.hang_up();
        }
    }

    pub fn answer(&self, task: &Task, answer: &Answer, descriptor_sense: bool) {
        if self.is_closed() {
            return;
        }
        let good = answer.status == GOOD;
        let wanted = if good && task.reads { answer.data.len() } else { answer.takes };
        let mut flags = 0x80;
        let residual = if !good && task.reads {
            // Nothing is sent with a CHECK CONDITION.
            flags |= if task.expected > 0 { 0x02 } else { 0 };
            task.expected
        } else if wanted > task.expected {
            flags |= 0x04;
            wanted - task.expected
        } else if wanted < task.expected {
            flags |= 0x02;
            task.expected - wanted
        } else {
            0
        };
        let mut out = lock(&self.out);
        if good && task.reads && !answer.data.is_empty() && task.expected > 0 {
            let data = &answer.data[..answer.data.len().min(task.expected)];
            return self.send_data(&mut out, task, data, flags & 0x06, residual);
        }
        let mut sense = Vec::new();
        if let Some(found) = &answer.sense {
            let bytes = found.bytes(descriptor_sense);
            sense.extend_from_slice(&(bytes.len() as u16).to_be_bytes());
            sense.extend(bytes);
        }
        let header = Header::new(target::SCSI_RESPONSE, flags)
            .put(2, &[0, answer.status])
            .put_u32(16, task.tag)
            .put_u32(44, residual as u32);
        self.send_locked(&mut out, header, &sense, true);
    }

    /// Data-In PDUs; the last carries the status, as nothing but GOOD comes with data.
    fn send_data(&self, out: &mut Out, task: &Task, data: &[u8], residual_flags: u8, residual: usize) {
        let step = self.parameters.segment_bytes.max(512);
        let pieces = data.len().div_ceil(step);
        for (n, piece) in data.chunks(step).enumerate() {
            let last = n + 1 == pieces;
            let flags = if last { 0x81 | residual_flags } else { 0 };
            let mut header = Header::new(target::DATA_IN, flags)
                .put(8, &lun_bytes(task.lun))
                .put_u32(16, task.tag)
                .put_u32(20, NO_TAG)
                .put_u32(36, n as u32)
                .put_u32(40, (n * step) as u32);
            if last {
                header = header.put_u32(44, residual as u32);
            }
            self.send_locked(out, header, piece, last);
        }
    }

    fn reject(&self, pdu: &Pdu, reason: u8) {
        let header = Header::new(target::REJECT, 0x80).put(2, &[reason]).put_u32(16, NO_TAG);
        self.send(header, &pdu.header.0, true);
    }

    fn ping(&self) {
        let tag = self.pings.fetch_add(1, Ordering::SeqCst) & 0x7fff_ffff;
        let header = Header::new(target::NOP_IN, 0x80).put_u32(16, NO_TAG).put_u32(20, tag);
        self.send(header, &[], false);
    }
}

fn lun_bytes(lun: Option<u16>) -> [u8; 8] {
    let lun = lun.unwrap_or(0);
    let method = if lun < 256 { 0 } else { 0x4000 };
    let [high, low] = (lun | method).to_be_bytes();
    [high, low, 0, 0, 0, 0, 0, 0]
}

/// A connection from its first byte to its last.
pub(crate) fn serve(shared: &Arc<Shared>, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let Ok(clone) = stream.try_clone() else { return };
    let mut input = BufReader::with_capacity(64 << 10, clone);
    let Ok(Some(session)) = login::negotiate(shared, &stream, &mut input) else {
        let _ = stream.shutdown(Shutdown::Both);
        return;
    };
    if let Some(every_ms) = shared.ping_ms {
        let session = session.clone();
        let _ = std::thread::Builder::new().name("ping".into()).spawn(move || {
            while !session.is_closed() {
                std::thread::sleep(Duration::from_millis(every_ms));
                session.shared.gate.wait(session.initiator());
                session.ping();
            }
        });
    }
    let mut reader = Reader { session: session.clone(), gathering: HashMap::new(), next_tag: 1 };
    // Whatever ended it, an initiator only sees the end.
    let _ = reader.read_all(&mut input);
    session.mark_closed();
    session.hang_up();
    let mut sessions = lock(&shared.sessions);
    sessions.others.retain(|one| !Arc::ptr_eq(one, &session));
    if let Some(nexus) = session.nexus()
        && sessions.by_nexus.get(nexus).is_some_and(|one| Arc::ptr_eq(one, &session))
    {
        sessions.by_nexus.remove(nexus);
    }
}

struct Reader {
    session: Arc<Session>,
    gathering: HashMap<u32, Gathering>,
    next_tag: u32,
}

impl Reader {
    fn read_all(&mut self, input: &mut BufReader<TcpStream>) -> io::Result<()> {
        while let Some(pdu) = pdu::read(input)? {
            let session = self.session.clone();
            session.shared.gate.wait(session.initiator());
            if session.is_closed() || session.shared.stopping.load(Ordering::SeqCst) {
                return Ok(());
            }
            if !self.in_order(&pdu) {
                continue;
            }
            match pdu.header.opcode() {
                initiator::SCSI_COMMAND if session.nexus().is_some() => self.command(pdu),
                initiator::DATA_OUT => self.data_out(&pdu),
                initiator::TASK_MANAGEMENT => {
                    if self.manage(&pdu) {
                        return Ok(());
                    }
                }
                initiator::NOP_OUT => {
                    if pdu.header.tag() != NO_TAG {
                        let header = Header::new(target::NOP_IN, 0x80)
                            .put_u32(16, pdu.header.tag())
                            .put_u32(20, NO_TAG);
                        session.send(header, &pdu.data, true);
                    }
                }
                initiator::TEXT => self.text(&pdu),
                initiator::LOGOUT => {
                    let header = Header::new(target::LOGOUT, 0x80).put_u32(16, pdu.header.tag());
                    session.send(header, &[], true);
                    return Ok(());
                }
                // Command not supported.
                _ => session.reject(&pdu, 0x05),
            }
        }
        Ok(())
    }

    /// Whether it is the next command, or needs no number. Data-Out PDUs have none.
    fn in_order(&self, pdu: &Pdu) -> bool {
        if pdu.header.opcode() == initiator::DATA_OUT || pdu.header.immediate() {
            return true;
        }
        let expected = self.session.expected_command.load(Ordering::SeqCst);
        if pdu.header.command_number() != expected {
            return false;
        }
        self.session.expected_command.store(expected.wrapping_add(1), Ordering::SeqCst);
        true
    }

    fn command(&mut self, pdu: Pdu) {
        let header = pdu.header;
        let (reads, writes) = (header.flags() & 0x40 != 0, header.flags() & 0x20 != 0);
        let expected = header.u32_at(20) as usize;
        if !writes || expected == 0 || expected as u64 > TRANSFER_BYTES_MAX {
            return self.arrived(&header, pdu.data, reads);
        }
        let unsolicited = !header.is_final();
        let mut data = pdu.data;
        let have = data.len().min(expected);
        data.truncate(have);
        if have == expected {
            return self.arrived(&header, data, reads);
        }
        data.resize(expected, 0);
        let tag = header.tag();
        let mut gathering = Gathering {
            header,
            data,
            have,
            expected,
            data_number: 0,
            asked: None,
            requests: 0,
            broken: false,
        };
        if !unsolicited {
            self.ask(&mut gathering);
        }
        self.gathering.insert(tag, gathering);
    }

    /// R2T for the next burst.
    fn ask(&mut self, gathering: &mut Gathering) {
        let session = &self.session;
        let tag = self.next_tag;
        self.next_tag = (self.next_tag + 1) & 0x7fff_ffff;
        let bytes = (gathering.expected - gathering.have).min(session.parameters.burst_bytes);
        gathering.asked = Some((tag, gathering.have + bytes));
        gathering.data_number = 0;
        let header = Header::new(target::R2T, 0x80)
            .put(8, &gathering.header.0[8..16])
            .put_u32(16, gathering.header.tag())
            .put_u32(20, tag)
            .put_u32(36, gathering.requests)
            .put_u32(40, gathering.have as u32)
            .put_u32(44, bytes as u32);
        gathering.requests += 1;
        session.send(header, &[], false);
    }

    fn data_out(&mut self, pdu: &Pdu) {
        let (header, tag) = (&pdu.header, pdu.header.tag());
        let Some(mut gathering) = self.gathering.remove(&tag) else {
            // Of a command that was aborted, or never was: no harm.
            return;
        };
        let offset = header.u32_at(40) as usize;
        let expected_tag = gathering.asked.map_or(NO_TAG, |(tag, _)| tag);
        let fits = header.u32_at(20) == expected_tag
            && header.u32_at(36) == gathering.data_number
            && offset == gathering.have
            && offset + pdu.data.len() <= gathering.asked.map_or(gathering.expected, |(_, end)| end);
        if fits {
            gathering.data[offset..offset + pdu.data.len()].copy_from_slice(&pdu.data);
            gathering.have += pdu.data.len();
            gathering.data_number += 1;
        } else {
            // Lost or reordered data: the command ends with an error, as there is no recovery within it.
            gathering.broken = true;
        }
        let burst_over = header.is_final() || gathering.asked.is_some_and(|(_, end)| gathering.have >= end);
        if gathering.broken {
            let session = &self.session;
            session.reject(pdu, 0x04);
            let task = self.task(&gathering.header, Vec::new(), false);
            // Protocol service CRC error's neighbour: data-phase error.
            let sense = crate::sense::Sense::new(0x0b, 0x4b, 0x00);
            return session.answer(&task, &Answer::check(sense), false);
        }
        if gathering.have == gathering.expected {
            let data = std::mem::take(&mut gathering.data);
            return self.arrived(&gathering.header, data, false);
        }
        if burst_over {
            self.ask(&mut gathering);
        }
        self.gathering.insert(tag, gathering);
    }

    fn task(&self, header: &Header, data: Vec<u8>, reads: bool) -> Task {
        Task {
            arrival: self.session.shared.arrivals.fetch_add(1, Ordering::SeqCst) + 1,
            session: self.session.clone(),
            tag: header.tag(),
            lun: header.lun(),
            cdb: Cdb::new(header.cdb()),
            data,
            expected: header.u32_at(20) as usize,
            reads,
            aborted: AtomicBool::new(false),
        }
    }

    fn arrived(&mut self, header: &Header, data: Vec<u8>, reads: bool) {
        let task = self.task(header, data, reads);
        self.session.shared.arrived(task);
    }

    /// Task management; true if the session ends by it.
    fn manage(&mut self, pdu: &Pdu) -> bool {
        let session = self.session.clone();
        let shared = &session.shared;
        let header = &pdu.header;
        let respond = |code: u8| {
            let header = Header::new(target::TASK_MANAGEMENT, 0x80).put(2, &[code]).put_u32(16, header.tag());
            session.send(header, &[], true);
        };
        const COMPLETE: u8 = 0;
        const NO_SUCH_TASK: u8 = 1;
        const NO_SUCH_LUN: u8 = 2;
        const NOT_SUPPORTED: u8 = 5;
        let lun: Option<Arc<Lun>> = header.lun().and_then(|lun| shared.lun(lun));
        match header.flags() & 0x7f {
            // ABORT TASK
            1 => {
                let wanted = header.u32_at(20);
                let gathering = self.gathering.remove(&wanted).is_some();
                let held = lock(&session.held).remove(&wanted);
                if let Some(task) = &held {
                    task.aborted.store(true, Ordering::SeqCst);
                    shared.pass_through_all();
                }
                respond(if gathering || held.is_some() { COMPLETE } else { NO_SUCH_TASK });
            }
            // ABORT TASK SET, CLEAR TASK SET: of this nexus, of all
            function @ (2 | 4) => {
                let Some(lun) = lun else {
                    respond(NO_SUCH_LUN);
                    return false;
                };
                self.gathering.retain(|_, one| one.header.lun() != Some(lun.number));
                let mut guarded = lock(&lun.guarded);
                for task in lock(&session.held).values().filter(|task| task.lun == Some(lun.number)) {
                    task.aborted.store(true, Ordering::SeqCst);
                }
                if function == 4 {
                    shared.abort(&mut guarded, None);
                }
                drop(guarded);
                respond(COMPLETE);
            }
            // LUN RESET
            5 => match lun {
                None => respond(NO_SUCH_LUN),
                Some(lun) => {
                    self.gathering.retain(|_, one| one.header.lun() != Some(lun.number));
                    shared.reset_lun(&lun);
                    respond(COMPLETE);
                }
            },
            // TARGET WARM RESET
            6 => {
                self.gathering.clear();
                shared.all_luns().iter().for_each(|lun| shared.reset_lun(lun));
                respond(COMPLETE);
            }
            // TARGET COLD RESET: all sessions end; nothing is lost.
            7 => {
                let mut sessions = lock(&shared.sessions);
                shared.drop_sessions(&mut sessions, |_| true);
                for lun in shared.all_luns() {
                    let mut guarded = lock(&lun.guarded);
                    shared.abort(&mut guarded, None);
                    guarded.unit.attentions.raise_all(attention::POWER_ON, None);
                }
                return true;
            }
            _ => respond(NOT_SUPPORTED),
        }
        false
    }

    fn text(&self, pdu: &Pdu) {
        let session = &self.session;
        let mut out = Vec::new();
        for (key, value) in pdu::pairs(&pdu.data) {
            if key == "SendTargets" {
                if matches!(value.as_str(), "All" | "") || value == session.shared.name {
                    let portal = session.shared.portal;
                    out.push(("TargetName".to_owned(), session.shared.name.clone()));
                    out.push(("TargetAddress".to_owned(), format!("{portal},1")));
                }
            } else {
                out.push((key, "NotUnderstood".to_owned()));
            }
        }
        let header = Header::new(target::TEXT, 0x80).put_u32(16, pdu.header.tag()).put_u32(20, NO_TAG);
        session.send(header, &pdu::text(&out), true);
    }
}
