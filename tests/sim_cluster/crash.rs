//! A host dies after every single one of its commands: what it did is wholly there or wholly absent, and there
//! if it was acknowledged as durable.

use lunfs::device::sim::SimLunOptions;
use lunfs::testing::cluster::Formatted;

/// Volumes of all kinds whose hosts are soon found dead, formatted once.
pub fn hasty() -> &'static [Formatted; 4] {
    static VOLUMES: std::sync::OnceLock<[Formatted; 4]> = std::sync::OnceLock::new();
    VOLUMES.get_or_init(|| {
        [(512, true), (4096, true), (512, false), (4096, false)].map(
            |(logical_block_bytes, volatile_cache)| {
                let lun = SimLunOptions { logical_block_bytes, volatile_cache, ..SimLunOptions::default() };
                Formatted::hasty_on(8, lun)
            },
        )
    })
}
