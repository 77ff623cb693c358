//! Stub: replaced by the data plane.
#![allow(missing_docs, clippy::missing_errors_doc, clippy::unused_async)]
use crate::config::Config;
use crate::directory::{Shard, Tenant};
use crate::error::PgError;
use crate::tenant::{Plan, Status, TenantId};
use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ServeError(String);
pub struct Server {
    config: Config,
    listeners: Vec<std::net::TcpListener>,
}
#[derive(Debug, Clone)]
pub struct Addresses {
    pub proxy: Vec<SocketAddr>,
    pub unix: Option<PathBuf>,
    pub api: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
}
pub struct Control {
    config: Config,
}
impl Server {
    pub async fn start(config: Config) -> Result<Self, ServeError> {
        let bind =
            |address: String| std::net::TcpListener::bind(&address).map_err(|e| ServeError(format!("{address}: {e}")));
        let proxy = format!("127.0.0.1:{}", config.proxy.listen_port);
        let listeners = vec![bind(proxy)?, bind(config.api.listen.clone())?, bind(config.metrics.listen.clone())?];
        Ok(Self { config, listeners })
    }
    pub fn addresses(&self) -> Addresses {
        Addresses {
            proxy: self.listeners[0].local_addr().into_iter().collect(),
            unix: None,
            api: self.listeners[1].local_addr().ok(),
            metrics: self.listeners[2].local_addr().ok(),
        }
    }
    pub fn control(&self) -> Arc<Control> {
        Arc::new(Control { config: self.config.clone() })
    }
    pub async fn reload(&self, _: Config) -> Result<(), ServeError> {
        Ok(())
    }
    pub async fn drain(&self, _: Duration) {}
}
impl Control {
    pub async fn ensure(&self, id: &TenantId, _by: &str) -> Result<Arc<Tenant>, PgError> {
        let s = &self.config.shards[0];
        Ok(Arc::new(Tenant {
            id: id.clone(),
            plan: Plan::Schema,
            status: Status::Active,
            epoch: 1,
            verifier: None,
            shard: Arc::new(Shard {
                name: s.name.clone(),
                host: s.host.clone(),
                port: s.port,
                database: s.database.clone(),
                weight: 1,
                region: String::new(),
                max_db_connections: 1,
            }),
        }))
    }
}
