use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "lunfs", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Mkfs(lunfs::cli::mkfs::Args),
    Status(lunfs::cli::status::Args),
    Locks(lunfs::cli::locks::Args),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Mkfs(args) => lunfs::cli::mkfs::run(args),
        Command::Status(args) => lunfs::cli::status::run(args),
        Command::Locks(args) => lunfs::cli::locks::run(args),
    }
}
