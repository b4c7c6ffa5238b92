//! Login: negotiation of parameters, CHAP, discovery, and the reinstatement of a session.
//!
//! Digests are refused: None is chosen where it is offered, and nothing else can be had. One connection per session,
//! error recovery level 0. Whoever logs in with the name and ISID of a living session takes its place.

use std::collections::HashMap;
use std::io::{self, BufReader};
use std::net::TcpStream;
use std::sync::Arc;

use md5::{Digest, Md5};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::lock;
use crate::nexus::Nexus;
use crate::pdu::{self, Header, SEGMENT_BYTES_MAX, initiator, target};
use crate::session::{Session, WINDOW};
use crate::target::{Chap, Shared};

#[derive(Clone, Debug)]
pub struct Parameters {
    /// Longest data segment that the initiator takes.
    pub segment_bytes: usize,
    pub burst_bytes: usize,
}

pub(crate) struct LoggedIn {
    pub nexus: Option<Nexus>,
    pub parameters: Parameters,
    pub status_number: u32,
    pub command_number: u32,
}

const OUR_BURST_BYTES: u32 = 1 << 20;
const OUR_FIRST_BURST_BYTES: u32 = 256 << 10;

/// Class and detail of a refusal.
type Refused = (u8, u8);
const AUTHENTICATION_FAILED: Refused = (2, 1);
const NOT_FOUND: Refused = (2, 3);
const TOO_MANY_CONNECTIONS: Refused = (2, 6);
const MISSING_PARAMETER: Refused = (2, 7);
const INITIATOR_ERROR: Refused = (2, 0);

#[derive(PartialEq, Eq)]
enum Proof {
    NotNeeded,
    /// CHAP was chosen, the challenge not yet given.
    Chosen,
    Challenged,
    Given,
    Missing,
}

struct Login<'a> {
    shared: &'a Arc<Shared>,
    initiator: Option<String>,
    target: Option<String>,
    discovery: bool,
    isid: [u8; 6],
    proof: Proof,
    challenge: (u8, Vec<u8>),
    parameters: Parameters,
    declared: bool,
}

pub(crate) fn negotiate(
    shared: &Arc<Shared>,
    stream: &TcpStream,
    input: &mut BufReader<TcpStream>,
) -> io::Result<Option<Arc<Session>>> {
    let mut login = Login {
        shared,
        initiator: None,
        target: None,
        discovery: false,
        isid: [0; 6],
        proof: if shared.chap.is_some() { Proof::Missing } else { Proof::NotNeeded },
        challenge: (0, Vec::new()),
        parameters: Parameters { segment_bytes: 8192, burst_bytes: 256 << 10 },
        declared: false,
    };
    let mut to = stream;
    let mut status_number = 0u32;
    let mut text = Vec::new();
    while let Some(pdu) = pdu::read(input)? {
        shared.gate.wait("");
        let header = &pdu.header;
        if header.opcode() != initiator::LOGIN {
            return Ok(None);
        }
        text.extend_from_slice(&pdu.data);
        let (flags, command_number) = (header.flags(), header.command_number());
        let (stage, mut next) = ((flags >> 2) & 3, flags & 3);
        let mut leaves = flags & 0x80 != 0;
        let mut answers = Vec::new();
        let mut refused = None;
        login.isid.copy_from_slice(&header.0[8..14]);
        if header.u16_at(14) != 0 {
            refused = Some(TOO_MANY_CONNECTIONS);
        } else if flags & 0x40 != 0 {
            // The text goes on in the next PDU.
            leaves = false;
        } else {
            match login.step(stage, &pdu::pairs(&std::mem::take(&mut text))) {
                Ok(found) => answers = found,
                Err(why) => refused = Some(why),
            }
        }
        if let Some(name) = &login.initiator {
            shared.gate.wait(name);
        }
        // A stage is left only when authentication is over.
        if leaves && stage == 0 && !matches!(login.proof, Proof::NotNeeded | Proof::Given) {
            leaves = false;
        }
        if !leaves {
            next = 0;
        }
        let mut session = None;
        if leaves && next == 3 && refused.is_none() {
            if !login.declared {
                login.declare(&mut answers);
            }
            session = Some(login.enter(stream, status_number.wrapping_add(1), command_number)?);
        }
        let flags = u8::from(leaves) << 7 | stage << 2 | next;
        let (class, detail) = refused.unwrap_or((0, 0));
        let handle = session.as_ref().map_or(0, |session| session.handle);
        let response = Header::new(target::LOGIN, flags)
            .put(8, &login.isid)
            .put(14, &handle.to_be_bytes())
            .put_u32(16, header.tag())
            .put_u32(24, status_number)
            .put_u32(28, command_number)
            .put_u32(32, command_number.wrapping_add(WINDOW - 1))
            .put(36, &[class, detail]);
        pdu::write(&mut to, response, &[], &pdu::text(&answers))?;
        status_number = status_number.wrapping_add(1);
        if refused.is_some() {
            return Ok(None);
        }
        if session.is_some() {
            return Ok(session);
        }
    }
    Ok(None)
}

impl Login<'_> {
    fn step(&mut self, stage: u8, given: &[(String, String)]) -> Result<Vec<(String, String)>, Refused> {
        let mut answers: Vec<(String, String)> = Vec::new();
        let asked: HashMap<&str, &str> =
            given.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        if let Some(name) = asked.get("InitiatorName") {
            self.initiator = Some((*name).to_owned());
        }
        if let Some(name) = asked.get("TargetName") {
            self.target = Some((*name).to_owned());
        }
        self.discovery |= asked.get("SessionType") == Some(&"Discovery");
        if self.initiator.is_none() || (!self.discovery && self.target.is_none()) {
            return Err(MISSING_PARAMETER);
        }
        if !self.discovery && self.target.as_deref() != Some(self.shared.name.as_str()) {
            return Err(NOT_FOUND);
        }
        match stage {
            0 => self.security(&asked, &mut answers)?,
            1 if matches!(self.proof, Proof::NotNeeded | Proof::Given) => {}
            1 => return Err(AUTHENTICATION_FAILED),
            _ => return Err(INITIATOR_ERROR),
        }
        for (key, value) in given {
            self.operational(key, value, &mut answers);
        }
        if stage == 1 && !self.declared {
            self.declare(&mut answers);
        }
        Ok(answers)
    }

    fn declare(&mut self, answers: &mut Vec<(String, String)>) {
        self.declared = true;
        answers.push(("MaxRecvDataSegmentLength".to_owned(), SEGMENT_BYTES_MAX.to_string()));
        if !self.discovery && !answers.iter().any(|(key, _)| key == "TargetPortalGroupTag") {
            answers.push(("TargetPortalGroupTag".to_owned(), "1".to_owned()));
        }
    }

    fn security(
        &mut self,
        asked: &HashMap<&str, &str>,
        answers: &mut Vec<(String, String)>,
    ) -> Result<(), Refused> {
        let mut say = |key: &str, value: String| answers.push((key.to_owned(), value));
        let offered = asked.get("AuthMethod");
        let Some(chap) = &self.shared.chap else {
            if let Some(offered) = offered {
                if !offered.split(',').any(|one| one == "None") {
                    return Err(AUTHENTICATION_FAILED);
                }
                say("AuthMethod", "None".to_owned());
            }
            return Ok(());
        };
        match self.proof {
            Proof::Missing => {
                if !offered.is_some_and(|offered| offered.split(',').any(|one| one == "CHAP")) {
                    return Err(AUTHENTICATION_FAILED);
                }
                say("AuthMethod", "CHAP".to_owned());
                self.proof = Proof::Chosen;
            }
            Proof::Chosen => {
                if !asked.get("CHAP_A").is_some_and(|offered| offered.split(',').any(|one| one == "5")) {
                    return Err(AUTHENTICATION_FAILED);
                }
                let mut rng = SmallRng::from_os_rng();
                self.challenge = (rng.random(), (0..16).map(|_| rng.random()).collect());
                say("CHAP_A", "5".to_owned());
                say("CHAP_I", self.challenge.0.to_string());
                say("CHAP_C", hex(&self.challenge.1));
                self.proof = Proof::Challenged;
            }
            Proof::Challenged => {
                let right = response(self.challenge.0, &chap.secret, &self.challenge.1);
                let name = asked.get("CHAP_N").copied();
                let given = asked.get("CHAP_R").and_then(|text| unhex(text));
                if name != Some(chap.user.as_str()) || given.as_deref() != Some(right.as_slice()) {
                    return Err(AUTHENTICATION_FAILED);
                }
                if let Some((id, challenge)) = asked_back(asked, chap)? {
                    say("CHAP_N", chap.target_user.clone());
                    say("CHAP_R", hex(&response(id, &chap.target_secret, &challenge)));
                }
                self.proof = Proof::Given;
            }
            Proof::NotNeeded | Proof::Given => {}
        }
        Ok(())
    }

    fn operational(&mut self, key: &str, value: &str, answers: &mut Vec<(String, String)>) {
        let number = || value.parse::<u32>().unwrap_or(0);
        let smaller = |ours: u32| number().min(ours).to_string();
        let answer = match key {
            "InitiatorName" | "InitiatorAlias" | "TargetName" | "SessionType" | "AuthMethod" => return,
            _ if key.starts_with("CHAP_") => return,
            "MaxRecvDataSegmentLength" => {
                self.parameters.segment_bytes = (number() as usize).clamp(512, 4 << 20);
                return;
            }
            "HeaderDigest" | "DataDigest" => {
                let none = value.split(',').any(|one| one == "None");
                if none { "None".to_owned() } else { "Reject".to_owned() }
            }
            "MaxBurstLength" => {
                let agreed = smaller(OUR_BURST_BYTES);
                self.parameters.burst_bytes = agreed.parse::<usize>().unwrap_or(0).max(512);
                agreed
            }
            "FirstBurstLength" => smaller(OUR_FIRST_BURST_BYTES),
            "MaxConnections" | "MaxOutstandingR2T" => "1".to_owned(),
            "ErrorRecoveryLevel" => "0".to_owned(),
            "InitialR2T" | "ImmediateData" => value.to_owned(),
            "DataPDUInOrder" | "DataSequenceInOrder" => "Yes".to_owned(),
            "DefaultTime2Wait" => number().max(2).to_string(),
            "DefaultTime2Retain" => "0".to_owned(),
            "IFMarker" | "OFMarker" => "No".to_owned(),
            _ => "NotUnderstood".to_owned(),
        };
        answers.push((key.to_owned(), answer));
    }

    /// The session begins; one of the same nexus ends.
    fn enter(&self, stream: &TcpStream, status_number: u32, command_number: u32) -> io::Result<Arc<Session>> {
        let shared = self.shared;
        let initiator = self.initiator.as_deref().unwrap_or_default();
        let nexus = (!self.discovery).then(|| Nexus::new(initiator, self.isid));
        let login = LoggedIn {
            nexus: nexus.clone(),
            parameters: self.parameters.clone(),
            status_number,
            command_number,
        };
        let mut sessions = lock(&shared.sessions);
        sessions.next_handle = sessions.next_handle % 0xfffe + 1;
        let session =
            Arc::new(Session::new(shared.clone(), stream.try_clone()?, &login, sessions.next_handle)?);
        let Some(nexus) = nexus else {
            sessions.others.push(session.clone());
            return Ok(session);
        };
        if let Some(before) = sessions.by_nexus.remove(&nexus) {
            shared.close(&before);
        }
        for lun in shared.all_luns() {
            lock(&lun.guarded).unit.nexus_logged_in(&nexus);
        }
        sessions.by_nexus.insert(nexus, session.clone());
        Ok(session)
    }
}

/// The initiator's own challenge, if it has one.
fn asked_back(asked: &HashMap<&str, &str>, chap: &Chap) -> Result<Option<(u8, Vec<u8>)>, Refused> {
    let (Some(id), Some(challenge)) = (asked.get("CHAP_I"), asked.get("CHAP_C")) else {
        return Ok(None);
    };
    let id = id.parse::<u8>().map_err(|_| AUTHENTICATION_FAILED)?;
    let challenge = unhex(challenge).ok_or(AUTHENTICATION_FAILED)?;
    if chap.target_secret.is_empty() {
        return Err(AUTHENTICATION_FAILED);
    }
    Ok(Some((id, challenge)))
}

pub(crate) fn response(id: u8, secret: &str, challenge: &[u8]) -> Vec<u8> {
    Md5::new().chain_update([id]).chain_update(secret).chain_update(challenge).finalize().to_vec()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"))?;
    if digits.len() % 2 != 0 || !digits.is_ascii() {
        return None;
    }
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok()).collect()
}
