//! Stub: replaced by the control plane.
#![allow(missing_docs, clippy::missing_errors_doc)]
use crate::config::{Config, ShardConfig};
use crate::error::PgError;
pub async fn tenant_create(_: &Config, _id: &str, _shard: Option<&str>) -> Result<(), PgError> {
    Ok(())
}
pub async fn tenant_list(_: &Config, _after: Option<&str>, _limit: u32, _json: bool) -> Result<(), PgError> {
    Ok(())
}
pub async fn tenant_show(_: &Config, _id: &str, _json: bool) -> Result<(), PgError> {
    Ok(())
}
pub async fn tenant_delete(_: &Config, _id: &str) -> Result<(), PgError> {
    Ok(())
}
pub async fn shard_list(_: &Config, _json: bool) -> Result<(), PgError> {
    Ok(())
}
pub async fn shard_add(_: &Config, _: &ShardConfig) -> Result<(), PgError> {
    Ok(())
}
