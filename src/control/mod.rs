//! Stub: replaced by the control plane.
pub mod cli;
