//! Opening a disk: what is refused, what is looked at once, and what one command may carry.
//!
//! Nothing is sent before the kernel's own tables say that this is a whole disk, or a multipath device over whole
//! disks; nothing is changed there but a registration, where reservations are asked for. A refusal says why, in words
//! for who mounts.

use std::sync::Arc;
use std::time::Duration;

use super::KernelDevice;
use crate::device::kernel::classify::classify;
use crate::device::kernel::door::Kernel;
use crate::device::kernel::fencing::KernelFencing;
use crate::device::kernel::hold;
use crate::device::kernel::path::Path;
use crate::device::kernel::paths::Paths;
use crate::device::scsi::inquiry::Description;
use crate::device::scsi::unit::Unit;
use crate::device::{DeviceGeometry, OpenError};

/// Bytes of one command at most; larger transfers gain nothing and keep others waiting.
const TRANSFER_BYTES: u64 = 1 << 20;

/// How to open a disk.
#[derive(Clone, Debug, Default)]
pub struct KernelOptions {
    pub read_only: bool,
    /// The logical block the caller insists on.
    pub logical_block_bytes: Option<u32>,
    /// For a mount: others will wait for the hold time, so it must make sense.
    pub mount: bool,
    /// Refuse if it is mounted or mapped, and keep others from that.
    pub exclusive: bool,
    /// Offer reservations, where the target has them.
    pub reservations: bool,
    /// What the administrator knows of the hold time.
    pub hold_time: Option<Duration>,
}

impl KernelDevice {
    /// Opens the node `spec`, which is a block device.
    pub fn open(
        kernel: Arc<dyn Kernel>,
        spec: &str,
        options: &KernelOptions,
    ) -> Result<KernelDevice, OpenError> {
        let node = std::path::Path::new(spec);
        let refuse = |why: String| OpenError::Kernel { spec: spec.into(), why };
        let io = |what| move |source| OpenError::Io { spec: spec.into(), what, source };
        let number = kernel
            .block_device(node)
            .map_err(io("stat"))?
            .ok_or(OpenError::WrongKind { spec: spec.into() })?;
        let found = classify(&*kernel, number).map_err(refuse)?;
        if found.top.number_of("ro") == Some(1) && !options.read_only {
            return Err(OpenError::ReadOnly { spec: spec.into() });
        }
        let claim = match options.exclusive {
            true => Some(kernel.claim(node).map_err(|e| match e.raw_os_error() {
                Some(libc::EBUSY) => OpenError::InUse { spec: spec.into() },
                _ => io("open for itself")(e),
            })?),
            false => None,
        };
        let named = kernel.open(&found.top.name(), number).map_err(io("open"))?;
        let unit = Arc::new(Unit::default());
        let (paths, description) =
            Paths::open(kernel.clone(), node, found.clone(), unit.clone()).map_err(refuse)?;
        let paths = Arc::new(paths);
        let unit_bytes = description.capacity.block_bytes;
        if unit_bytes != 512 && unit_bytes != 4096 {
            return Err(refuse(format!(
                "its logical block is {unit_bytes} bytes; 512 and 4096 are possible"
            )));
        }
        if let Some(asked) = options.logical_block_bytes.filter(|asked| *asked != unit_bytes) {
            return Err(OpenError::LogicalBlockUnmet { spec: spec.into(), asked, needed: unit_bytes });
        }
        if description.write_protected && !options.read_only {
            return Err(OpenError::ReadOnly { spec: spec.into() });
        }
        let holds: Vec<_> =
            paths.all().iter().map(|path| (path.disk().name.clone(), path.hold.clone())).collect();
        let published = hold::publish(&holds, options.hold_time);
        if options.mount && !options.read_only {
            if let Some(why) = &published.refusal {
                return Err(refuse(why.clone()));
            }
            for warning in &published.warnings {
                log::warn!("{spec}: {warning}");
            }
        }
        for node in std::iter::once(&named).chain(paths.all().iter().map(|path| path.node())) {
            if let Err(e) = node.drop_page_cache() {
                log::debug!("{spec}: dropping what the kernel has cached of it: {e}");
            }
        }
        let fencing = match options.reservations && !options.read_only {
            true => KernelFencing::probe(unit.clone(), paths.clone(), named).map_err(refuse)?,
            false => None,
        };
        // The kernel's view may be older than the target's, where a LUN has grown.
        let in_kernel = found.top.number_of("size").unwrap_or(0).saturating_mul(512);
        let size_bytes = description.capacity.size_bytes();
        if in_kernel != size_bytes {
            log::warn!(
                "{spec}: the kernel believes in {in_kernel} bytes, the target has {size_bytes}; rescan it"
            );
        }
        let standard = &description.standard;
        log::info!(
            "{spec}: {} {} {}, {}, {size_bytes} bytes in blocks of {unit_bytes}, write cache {}, {} path(s), hold time \
             {} s",
            standard.vendor,
            standard.product,
            standard.revision,
            description.name(),
            if description.write_cache { "on" } else { "off" },
            holds.len(),
            published.time.as_secs(),
        );
        Ok(KernelDevice {
            geometry: DeviceGeometry {
                logical_block_bytes: unit_bytes,
                size_bytes,
                volatile_cache: description.write_cache,
                hold_time: published.time,
            },
            transfer_bytes: transfer_bytes(&description, &paths.all()),
            resets_at_open: unit.resets(),
            read_only: options.read_only,
            multipath: found.multipath,
            kernel,
            unit,
            paths,
            description,
            published,
            fencing,
            _claim: claim,
        })
    }
}

/// What one command may carry on any of the paths.
fn transfer_bytes(description: &Description, paths: &[Arc<Path>]) -> u64 {
    let unit = u64::from(description.capacity.block_bytes);
    let said = description.limits.transfer_blocks.map_or(TRANSFER_BYTES, |blocks| u64::from(blocks) * unit);
    let of_kernel = paths.iter().map(|path| {
        let of = |attribute| path.disk().dir.number_of(attribute).filter(|n| *n > 0);
        let adapter = of("queue/max_hw_sectors_kb").map_or(TRANSFER_BYTES, |kib| kib.saturating_mul(1024));
        // Memory may lie in single pages, and begin within one.
        let pages =
            of("queue/max_segments").map_or(TRANSFER_BYTES, |n| n.saturating_sub(1).saturating_mul(4096));
        adapter.min(pages)
    });
    let most = of_kernel.min().unwrap_or(TRANSFER_BYTES).min(said).min(TRANSFER_BYTES);
    (most - most % 4096).max(4096)
}
