//! A private istgt (Debian package istgt), with one disk as LUN 0: the array that does things otherwise.
//!
//! It says offset 0 for every miscompare, takes a compare-and-write that lacks half of its data, never answers one of
//! no blocks, ignores FUA, and knows neither UNMAP nor APTPL. A login takes about a second.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use tempfile::TempDir;

use super::{Supervised, Unavailable, free_port, require, wait_for_port};

pub struct Istgt {
    port: u16,
    _process: Supervised,
    /// Removed after the process.
    directory: TempDir,
}

const BASE: &str = "iqn.2026-01.org.lunfs.test";

impl Istgt {
    pub fn start(bytes: u64) -> Result<Istgt, Unavailable> {
        let program = require("istgt", "istgt")?;
        if !nix::unistd::geteuid().is_root() {
            return Err(Unavailable::NotRoot("istgt"));
        }
        let directory = super::directory("lunfs-istgt.")?;
        let path = directory.path();
        fs::File::create(path.join("lun"))?.set_len(bytes)?;
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path.join("auth"))?;
        let (port, control) = (free_port()?, free_port()?);
        let configuration = format!(
            r#"[Global]
  NodeBase "{BASE}"
  PidFile {dir}/pid
  AuthFile {dir}/auth
  MediaDirectory {dir}
  Timeout 30
  NopInInterval 20
  DiscoveryAuthMethod None
  MaxSessions 32
  MaxConnections 8
  FirstBurstLength 262144
  MaxBurstLength 1048576
  MaxRecvDataSegmentLength 262144
[UnitControl]
  AuthMethod None
  Portal UC1 127.0.0.1:{control}
  Netmask 127.0.0.1
[PortalGroup1]
  Portal DA1 127.0.0.1:{port}
[InitiatorGroup1]
  InitiatorName "ALL"
  Netmask 127.0.0.1
[LogicalUnit1]
  TargetName vol
  Mapping PortalGroup1 InitiatorGroup1
  AuthMethod None
  UseDigest Auto
  UnitType Disk
  QueueDepth 32
  LUN0 Storage {dir}/lun Auto
"#,
            dir = path.display()
        );
        let mut file = fs::File::create(path.join("conf"))?;
        file.write_all(configuration.as_bytes())?;
        let (conf, pid, log) = (path.join("conf"), path.join("pid"), path.join("log"));
        let arguments = ["-D", "-c", &conf.to_string_lossy(), "-p", &pid.to_string_lossy()];
        let process = Supervised::start(&program, &arguments, &[], &log)?;
        let istgt = Istgt { port, _process: process, directory };
        wait_for_port(istgt.portal(), &log)?;
        Ok(istgt)
    }

    pub fn portal(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub fn name(&self) -> String {
        format!("{BASE}:vol")
    }

    pub fn image(&self) -> PathBuf {
        self.directory.path().join("lun")
    }

    /// The disk is LUN 0.
    pub fn url(&self) -> String {
        format!("iscsi://{}/{}/0", self.portal(), self.name())
    }
}
