//! Server connections.

pub mod scram;
