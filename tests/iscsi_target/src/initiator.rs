//! Just enough of an initiator to test targets with: one session, any command, any number outstanding.
//!
//! It knows no retries and no recovery: a test wants to see what came back, or that nothing did. The product's own
//! backend is another program on purpose, so that both ends don't share a misunderstanding.

use std::collections::HashMap;
use std::io::{self, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::login::{hex, response, unhex};
use crate::nexus::Nexus;
use crate::pdu::{self, Header, NO_TAG, Pdu, initiator, target};
use crate::scsi::cdb::op;
use crate::sense::{CHECK_CONDITION, GOOD, Sense};
use crate::target::{Chap, Target};

/// Who logs in where.
#[derive(Clone, Debug)]
pub struct Login {
    pub portal: SocketAddr,
    pub target: String,
    pub nexus: Nexus,
    pub lun: u16,
    pub chap: Option<Chap>,
    /// What is offered for both digests.
    pub digests: String,
    pub timeout: Duration,
}

impl Login {
    /// LUN 1 of a target in this process.
    pub fn to(target: &Target, name: &str) -> Self {
        Login::at(target.portal(), target.name(), name)
    }

    pub fn at(portal: SocketAddr, target: &str, name: &str) -> Self {
        let nexus = Nexus::new(&format!("iqn.2026-01.org.lunfs.test:{name}"), [0x40, 0, 0, 0, 0, 1]);
        Login {
            portal,
            target: target.to_owned(),
            nexus,
            lun: 1,
            chap: None,
            digests: "None".to_owned(),
            timeout: Duration::from_secs(10),
        }
    }

    pub fn lun(self, lun: u16) -> Self {
        Login { lun, ..self }
    }

    pub fn isid(mut self, last: u8) -> Self {
        self.nexus.isid[5] = last;
        self
    }

    pub fn timeout_ms(self, ms: u64) -> Self {
        Login { timeout: Duration::from_millis(ms), ..self }
    }

    pub fn connect(&self) -> io::Result<Initiator> {
        Initiator::connect(self)
    }

    /// Connected, with the attentions of a login taken.
    pub fn ready(&self) -> io::Result<Initiator> {
        let mut session = self.connect()?;
        for _ in 0..16 {
            if session.test_unit_ready()?.status == GOOD {
                return Ok(session);
            }
        }
        Err(io::Error::other("attention after attention"))
    }
}

/// The end of a command as the initiator sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    pub status: u8,
    pub sense: Option<Sense>,
    pub data: Vec<u8>,
    pub overflow: u32,
    pub underflow: u32,
}

impl Done {
    pub fn is_good(&self) -> bool {
        self.status == GOOD
    }

    /// Key, code and qualifier of a CHECK CONDITION.
    pub fn check(&self) -> Option<(u8, u8, u8)> {
        let sense = self.sense.filter(|_| self.status == CHECK_CONDITION)?;
        Some((sense.key, sense.asc, sense.ascq))
    }

    pub fn is_miscompare(&self) -> bool {
        self.check() == Some((0x0e, 0x1d, 0))
    }
}

struct Pending {
    out: Vec<u8>,
    data: Vec<u8>,
}

pub struct Initiator {
    stream: TcpStream,
    input: BufReader<TcpStream>,
    lun: u16,
    timeout: Duration,
    command_number: u32,
    /// The command that the target says it expects next.
    expected_by_target: u32,
    status_number: u32,
    next_tag: u32,
    pending: HashMap<u32, Pending>,
    ended: HashMap<u32, Done>,
    managed: HashMap<u32, u8>,
    /// What a login or a text request brought.
    pub answers: Vec<(String, String)>,
    pub pings: u32,
}

const SEGMENT_BYTES: usize = 256 << 10;

impl Initiator {
    fn connect(login: &Login) -> io::Result<Initiator> {
        let stream = TcpStream::connect(login.portal)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(login.timeout))?;
        let input = BufReader::with_capacity(64 << 10, stream.try_clone()?);
        let mut session = Initiator {
            stream,
            input,
            lun: login.lun,
            timeout: login.timeout,
            command_number: 1,
            expected_by_target: 1,
            status_number: 0,
            next_tag: 1,
            pending: HashMap::new(),
            ended: HashMap::new(),
            managed: HashMap::new(),
            answers: Vec::new(),
            pings: 0,
        };
        session.log_in(login)?;
        Ok(session)
    }

    /// Whether nothing comes from the target for so long.
    pub fn hears_nothing_for(&mut self, ms: u64) -> io::Result<bool> {
        self.stream.set_read_timeout(Some(Duration::from_millis(ms)))?;
        let heard = self.take_one();
        self.stream.set_read_timeout(Some(self.timeout))?;
        match heard {
            Ok(()) => Ok(false),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(true),
            Err(e) => Err(e),
        }
    }

    /// Whether the target has taken every command that was sent, by its own count.
    pub fn all_taken(&self) -> bool {
        self.expected_by_target == self.command_number
    }

    fn log_in(&mut self, login: &Login) -> io::Result<()> {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let discovery = login.target.is_empty();
        let mut names = vec![pair("InitiatorName", &login.nexus.initiator)];
        match discovery {
            true => names.push(pair("SessionType", "Discovery")),
            false => names.extend([pair("SessionType", "Normal"), pair("TargetName", &login.target)]),
        }
        names.push(pair("AuthMethod", if login.chap.is_some() { "CHAP,None" } else { "None" }));
        let mut answer = self.login_step(login, 0, &names)?;
        if let Some(chap) = &login.chap {
            self.login_step_stay(login, &[pair("CHAP_A", "5")])?;
            let value = |name: &str, all: &[(String, String)]| {
                all.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()).unwrap_or_default()
            };
            let id: u8 = value("CHAP_I", &self.answers).parse().unwrap_or(0);
            let challenge = unhex(&value("CHAP_C", &self.answers)).unwrap_or_default();
            let mine = hex(&response(id, &chap.secret, &challenge));
            let mut proof = vec![pair("CHAP_N", &chap.user), pair("CHAP_R", &mine)];
            if !chap.target_secret.is_empty() {
                proof.extend([pair("CHAP_I", "7"), pair("CHAP_C", "0x0102030405060708")]);
            }
            answer = self.login_step(login, 0, &proof)?;
            if !chap.target_secret.is_empty() {
                let right = response(7, &chap.target_secret, &[1, 2, 3, 4, 5, 6, 7, 8]);
                if unhex(&value("CHAP_R", &self.answers)) != Some(right) {
                    return Err(io::Error::other("the target did not prove itself"));
                }
            }
        }
        if answer.flags() & 0x80 == 0 {
            return Err(io::Error::other("the target does not leave the security stage"));
        }
        let operational = [
            pair("HeaderDigest", &login.digests),
            pair("DataDigest", &login.digests),
            pair("InitialR2T", "Yes"),
            pair("ImmediateData", "Yes"),
            pair("MaxRecvDataSegmentLength", &SEGMENT_BYTES.to_string()),
            pair("MaxBurstLength", "1048576"),
            pair("FirstBurstLength", "262144"),
            pair("MaxConnections", "1"),
            pair("ErrorRecoveryLevel", "0"),
        ];
        let answer = self.login_step(login, 1, &operational)?;
        if answer.flags() & 0x83 != 0x83 {
            return Err(io::Error::other("the target does not begin the session"));
        }
        Ok(())
    }

    fn login_step(&mut self, login: &Login, stage: u8, text: &[(String, String)]) -> io::Result<Header> {
        let next = if stage == 0 { 1 } else { 3 };
        self.login_pdu(login, 0x80 | stage << 2 | next, text)
    }

    fn login_step_stay(&mut self, login: &Login, text: &[(String, String)]) -> io::Result<Header> {
        self.login_pdu(login, 0, text)
    }

    fn login_pdu(&mut self, login: &Login, flags: u8, text: &[(String, String)]) -> io::Result<Header> {
        let header = Header::new(0x40 | initiator::LOGIN, flags)
            .put(8, &login.nexus.isid)
            .put_u32(16, 0)
            .put_u32(24, self.command_number)
            .put_u32(28, self.status_number);
        pdu::write(&mut self.stream, header, &[], &pdu::text(text))?;
        let answer = self.read_pdu()?;
        if answer.header.opcode() != target::LOGIN {
            return Err(io::Error::other("no login response"));
        }
        let (class, detail) = (answer.header.0[36], answer.header.0[37]);
        if class != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("login refused: {class:#04x}{detail:02x}"),
            ));
        }
        self.status_number = answer.header.u32_at(24).wrapping_add(1);
        self.answers = pdu::pairs(&answer.data);
        Ok(answer.header)
    }

    fn read_pdu(&mut self) -> io::Result<Pdu> {
        pdu::read(&mut self.input)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn tag(&mut self) -> u32 {
        self.next_tag += 1;
        self.next_tag
    }

    fn lun_bytes(&self) -> [u8; 8] {
        let [high, low] = self.lun.to_be_bytes();
        [high, low, 0, 0, 0, 0, 0, 0]
    }

    // --- commands --------------------------------------------------------------------------------------

    /// Sends a command and does not wait. `expected`: how many bytes are to come, or to go.
    pub fn send_expecting(&mut self, cdb: &[u8], out: &[u8], expected: usize) -> io::Result<u32> {
        let mut padded = [0u8; 16];
        padded[..cdb.len()].copy_from_slice(cdb);
        let tag = self.tag();
        let flags = match (out.is_empty(), expected) {
            (true, 0) => 0x80,
            (true, _) => 0xc0,
            (false, _) => 0xa0,
        };
        let header = Header::new(initiator::SCSI_COMMAND, flags | 0x01)
            .put(8, &self.lun_bytes())
            .put_u32(16, tag)
            .put_u32(20, expected as u32)
            .put_u32(24, self.command_number)
            .put_u32(28, self.status_number)
            .put(32, &padded);
        self.command_number = self.command_number.wrapping_add(1);
        let immediate = out.len().min(expected).min(64 << 10);
        self.pending.insert(tag, Pending { out: out.to_vec(), data: Vec::new() });
        pdu::write(&mut self.stream, header, &[], &out[..immediate])?;
        Ok(tag)
    }

    pub fn send(&mut self, cdb: &[u8], out: &[u8], read: usize) -> io::Result<u32> {
        self.send_expecting(cdb, out, if out.is_empty() { read } else { out.len() })
    }

    pub fn command(&mut self, cdb: &[u8], out: &[u8], read: usize) -> io::Result<Done> {
        let tag = self.send(cdb, out, read)?;
        self.wait_for(tag)
    }

    /// The end of this command; others that end meanwhile are kept. An error of kind `WouldBlock` or `TimedOut` says that
    /// nothing came in time.
    pub fn wait_for(&mut self, tag: u32) -> io::Result<Done> {
        loop {
            if let Some(done) = self.ended.remove(&tag) {
                return Ok(done);
            }
            self.take_one()?;
        }
    }

    fn take_one(&mut self) -> io::Result<()> {
        let pdu = self.read_pdu()?;
        self.expected_by_target = pdu.header.u32_at(28);
        let (header, tag) = (&pdu.header, pdu.header.tag());
        match header.opcode() {
            target::DATA_IN => {
                if let Some(pending) = self.pending.get_mut(&tag) {
                    let offset = header.u32_at(40) as usize;
                    pending.data.resize(pending.data.len().max(offset + pdu.data.len()), 0);
                    pending.data[offset..offset + pdu.data.len()].copy_from_slice(&pdu.data);
                }
                if header.flags() & 0x01 != 0 {
                    self.ends(header, &[]);
                }
            }
            target::SCSI_RESPONSE => self.ends(header, &pdu.data),
            target::R2T => self.give(header)?,
            target::TASK_MANAGEMENT => {
                self.counted(header);
                self.managed.insert(tag, header.0[2]);
            }
            target::NOP_IN if header.u32_at(20) != NO_TAG => {
                self.pings += 1;
                let answer = Header::new(0x40 | initiator::NOP_OUT, 0x80)
                    .put_u32(16, NO_TAG)
                    .put_u32(20, header.u32_at(20))
                    .put_u32(24, self.command_number)
                    .put_u32(28, self.status_number);
                pdu::write(&mut self.stream, answer, &[], &[])?;
            }
            target::NOP_IN | target::TEXT | target::LOGOUT => {
                self.counted(header);
                self.answers = pdu::pairs(&pdu.data);
                self.managed.insert(tag, 0);
            }
            target::REJECT => self.counted(header),
            other => return Err(io::Error::other(format!("an unexpected PDU {other:#x}"))),
        }
        Ok(())
    }

    fn counted(&mut self, header: &Header) {
        self.status_number = header.u32_at(24).wrapping_add(1);
    }

    fn ends(&mut self, header: &Header, sense: &[u8]) {
        self.counted(header);
        let Some(pending) = self.pending.remove(&header.tag()) else { return };
        let residual = header.u32_at(44);
        let done = Done {
            status: header.0[3],
            sense: sense.get(2..).and_then(decode),
            data: pending.data,
            overflow: if header.flags() & 0x04 != 0 { residual } else { 0 },
            underflow: if header.flags() & 0x02 != 0 { residual } else { 0 },
        };
        self.ended.insert(header.tag(), done);
    }

    fn give(&mut self, request: &Header) -> io::Result<()> {
        let Some(pending) = self.pending.get(&request.tag()) else { return Ok(()) };
        let (offset, bytes) = (request.u32_at(40) as usize, request.u32_at(44) as usize);
        let burst = pending.out.get(offset..offset + bytes);
        let burst = burst.ok_or_else(|| io::Error::other("R2T for more than there is"))?;
        let pieces = burst.len().div_ceil(SEGMENT_BYTES);
        for (n, piece) in burst.chunks(SEGMENT_BYTES).enumerate() {
            let header = Header::new(initiator::DATA_OUT, if n + 1 == pieces { 0x80 } else { 0 })
                .put(8, &request.0[8..16])
                .put_u32(16, request.tag())
                .put_u32(20, request.u32_at(20))
                .put_u32(28, self.status_number)
                .put_u32(36, n as u32)
                .put_u32(40, (offset + n * SEGMENT_BYTES) as u32);
            pdu::write(&mut self.stream, header, &[], piece)?;
        }
        Ok(())
    }

    // --- other requests --------------------------------------------------------------------------------

    /// Task management: the function, and the tag of the task if it is about one. The response code.
    pub fn manage(&mut self, function: u8, task: u32) -> io::Result<u8> {
        let tag = self.tag();
        let header = Header::new(0x40 | initiator::TASK_MANAGEMENT, 0x80 | function)
            .put(8, &self.lun_bytes())
            .put_u32(16, tag)
            .put_u32(20, task)
            .put_u32(24, self.command_number)
            .put_u32(28, self.status_number);
        pdu::write(&mut self.stream, header, &[], &[])?;
        self.response_to(tag)
    }

    fn response_to(&mut self, tag: u32) -> io::Result<u8> {
        loop {
            if let Some(code) = self.managed.remove(&tag) {
                return Ok(code);
            }
            self.take_one()?;
        }
    }

    fn request(&mut self, opcode: u8, data: &[u8]) -> io::Result<()> {
        let tag = self.tag();
        let header = Header::new(0x40 | opcode, 0x80)
            .put_u32(16, tag)
            .put_u32(20, NO_TAG)
            .put_u32(24, self.command_number)
            .put_u32(28, self.status_number);
        pdu::write(&mut self.stream, header, &[], data)?;
        self.response_to(tag).map(drop)
    }

    pub fn ping(&mut self) -> io::Result<()> {
        self.request(initiator::NOP_OUT, b"ping")
    }

    /// What SendTargets names: name and address by turns.
    pub fn send_targets(&mut self) -> io::Result<Vec<(String, String)>> {
        self.request(initiator::TEXT, b"SendTargets=All\0")?;
        Ok(std::mem::take(&mut self.answers))
    }

    pub fn log_out(mut self) -> io::Result<()> {
        self.request(initiator::LOGOUT, &[])
    }

    // --- particular commands ---------------------------------------------------------------------------

    pub fn test_unit_ready(&mut self) -> io::Result<Done> {
        self.command(&[0; 6], &[], 0)
    }

    pub fn read(&mut self, lba: u64, blocks: u32, block_bytes: usize) -> io::Result<Done> {
        self.command(&cdb_16(op::READ_16, 0, lba, blocks), &[], blocks as usize * block_bytes)
    }

    pub fn write(&mut self, lba: u64, data: &[u8], block_bytes: usize) -> io::Result<Done> {
        self.command(&cdb_16(op::WRITE_16, 0, lba, (data.len() / block_bytes) as u32), data, 0)
    }

    pub fn compare_and_write(&mut self, lba: u64, old: &[u8], new: &[u8]) -> io::Result<Done> {
        let tag = self.send_compare_and_write(lba, old, new)?;
        self.wait_for(tag)
    }

    pub fn send_compare_and_write(&mut self, lba: u64, old: &[u8], new: &[u8]) -> io::Result<u32> {
        self.send(&cdb_compare_and_write(lba), &[old, new].concat(), 0)
    }

    pub fn flush(&mut self) -> io::Result<Done> {
        self.command(&cdb_16(op::SYNC_CACHE_16, 0, 0, 0), &[], 0)
    }

    pub fn write_same(&mut self, lba: u64, blocks: u32, block: &[u8]) -> io::Result<Done> {
        self.command(&cdb_16(op::WRITE_SAME_16, 0, lba, blocks), block, 0)
    }

    pub fn unmap(&mut self, lba: u64, blocks: u32) -> io::Result<Done> {
        let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&blocks.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
        self.command(&[op::UNMAP, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list, 0)
    }

    /// The page, or the standard data with `None`.
    pub fn inquiry(&mut self, page: Option<u8>) -> io::Result<Done> {
        self.command(&[op::INQUIRY, u8::from(page.is_some()), page.unwrap_or(0), 0, 252, 0], &[], 252)
    }

    pub fn reserve_out(&mut self, action: u8, kind: u8, key: u64, action_key: u64) -> io::Result<Done> {
        self.reserve_out_with(action, kind, key, action_key, 0)
    }

    /// `flags`: the byte with APTPL (1).
    pub fn reserve_out_with(
        &mut self,
        action: u8,
        kind: u8,
        key: u64,
        action_key: u64,
        flags: u8,
    ) -> io::Result<Done> {
        let mut list = key.to_be_bytes().to_vec();
        list.extend_from_slice(&action_key.to_be_bytes());
        list.extend_from_slice(&[0, 0, 0, 0, flags, 0, 0, 0]);
        self.command(&[op::PR_OUT, action, kind, 0, 0, 0, 0, 0, 24, 0], &list, 0)
    }

    /// Generation and keys.
    pub fn keys(&mut self) -> io::Result<(u32, Vec<u64>)> {
        let done = self.command(&[op::PR_IN, 0, 0, 0, 0, 0, 0, 4, 0, 0], &[], 1024)?;
        let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        let keys = done.data.get(8..).unwrap_or_default().chunks_exact(8).map(number).collect();
        Ok((number(done.data.get(..4).unwrap_or_default()) as u32, keys))
    }
}

pub fn cdb_16(opcode: u8, flags: u8, lba: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0u8; 16];
    cdb[0] = opcode;
    cdb[1] = flags;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

pub fn cdb_compare_and_write(lba: u64) -> [u8; 16] {
    let mut cdb = cdb_16(op::COMPARE_AND_WRITE, 0, lba, 0);
    cdb[13] = 1;
    cdb
}

fn decode(bytes: &[u8]) -> Option<Sense> {
    let information = |range: std::ops::Range<usize>| {
        let bytes = bytes.get(range)?;
        Some(bytes.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte)) as u32)
    };
    match bytes.first()? & 0x7f {
        0x70 | 0x71 => Some(Sense {
            information: if bytes[0] & 0x80 != 0 { information(3..7) } else { None },
            ..Sense::new(bytes.get(2)? & 0x0f, *bytes.get(12)?, *bytes.get(13)?)
        }),
        0x72 | 0x73 => Some(Sense {
            information: if bytes.get(8) == Some(&0) { information(12..20) } else { None },
            ..Sense::new(bytes.get(1)? & 0x0f, *bytes.get(2)?, *bytes.get(3)?)
        }),
        _ => None,
    }
}
