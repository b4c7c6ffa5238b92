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
    Status(lunfs::cli::status::Args),
    Locks(lunfs::cli::locks::Args),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Status(args) => lunfs::cli::status::run(args),
        Command::Locks(args) => lunfs::cli::locks::run(args),
    }
}
