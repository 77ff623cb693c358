//! Stub: replaced by the data plane. It has the real control plane, and nothing behind the ports.
#![allow(missing_docs, clippy::missing_errors_doc, clippy::unused_async)]
use crate::config::Config;
use crate::control::{Control, ControlError, NoTraffic};
use crate::directory::Directory;
use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ServeError(String);
impl From<ControlError> for ServeError {
    fn from(e: ControlError) -> Self {
        Self(e.to_string())
    }
}
pub struct Server {
    listeners: Vec<std::net::TcpListener>,
    control: Arc<Control>,
    shutdown: CancellationToken,
}
#[derive(Debug, Clone)]
pub struct Addresses {
    pub proxy: Vec<SocketAddr>,
    pub unix: Option<PathBuf>,
    pub api: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
}
impl Server {
    pub async fn start(config: Config) -> Result<Self, ServeError> {
        let bind =
            |address: String| std::net::TcpListener::bind(&address).map_err(|e| ServeError(format!("{address}: {e}")));
        let proxy = format!("127.0.0.1:{}", config.proxy.listen_port);
        let listeners = vec![bind(proxy)?, bind(config.api.listen.clone())?, bind(config.metrics.listen.clone())?];
        let (tx, rx) = tokio::sync::mpsc::channel(100);
        let shutdown = CancellationToken::new();
        let directory = Arc::new(Directory::new(tx));
        let control = Control::start(Arc::new(config), directory, rx, Arc::new(NoTraffic), shutdown.clone()).await?;
        Ok(Self { listeners, control, shutdown })
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
        self.control.clone()
    }
    pub async fn reload(&self, _: Config) -> Result<(), ServeError> {
        Ok(())
    }
    pub async fn drain(&self, _: Duration) {
        self.shutdown.cancel();
        self.control.finish().await;
    }
}
