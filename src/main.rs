//! The `pgusher` command.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    pgusher::cli::run(pgusher::cli::Cli::parse())
}
