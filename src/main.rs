//! The `pgusher` command.

fn main() {}
