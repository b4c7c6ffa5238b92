//! `mkfs.lunfs`: the same as `lunfs mkfs`, under the name that mkfs(8) looks for.

use std::process::ExitCode;

use clap::Parser;

/// Make a LunFS volume on a shared LUN or in a file.
#[derive(Parser)]
#[command(name = "mkfs.lunfs", version, after_help = lunfs::cli::mkfs::EXIT_STATUS)]
struct Cli {
    #[command(flatten)]
    args: lunfs::cli::mkfs::Args,
}

fn main() -> ExitCode {
    lunfs::cli::mkfs::run(Cli::parse().args)
}
