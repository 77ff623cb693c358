//! `pgusher dev`: everything on one machine, for trying out and for tests.
//!
//! It finds PostgreSQL's programs, makes and starts the clusters, puts the catalog on the first one, provisions the
//! tenants, serves, and says how to connect. When it ends, all of it ends; started again on the same `--data`, all of it
//! comes back.

mod announce;
mod binaries;
mod cluster;
mod ports;
mod state;

use std::path::{Path, PathBuf};

use crate::cli::signals::{Event, Signals};
use crate::config::{Config, Secret, ShardConfig, User};
use crate::control::provision::Choice;
use crate::error::PgError;
use crate::server::{ServeError, Server};
use crate::tenant::{InvalidTenantId, TenantId};

use announce::Announcement;
use binaries::Binaries;
use cluster::{Cluster, OsUser, Setup};
use state::DataDir;

/// What `pgusher dev` was asked for.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Number of PostgreSQL clusters; with plan "cluster" there is one more than tenants at least
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=50))]
    pub shards: u16,
    /// Tenants to make, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "client_001,client_002", value_name = "IDS")]
    pub tenants: Vec<String>,
    /// Where data is kept; a temporary directory that is removed at the end if absent
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Port of the proxy; 0 takes a free one, for the HTTP addresses too
    #[arg(long, default_value_t = 6432)]
    pub port: u16,
    /// Print one line of JSON when everything is ready, instead of text
    #[arg(long)]
    pub json: bool,
}

/// Why `dev` cannot go on.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum DevError {
    #[error("PostgreSQL's programs (initdb, postgres, pg_ctl) were not found")]
    NoPostgres,
    #[error("{variable} is set to {path:?}, but initdb, postgres and pg_ctl of PostgreSQL 13 or newer are not there")]
    BadBinaries { variable: &'static str, path: PathBuf },
    #[error("PostgreSQL refuses to run as root, and there is no other user ({names}) to run it")]
    NoServerUser { names: String },
    #[error("initdb failed: {message}")]
    Initdb { message: String },
    #[error("{name} did not start; its log ends with:\n{log}")]
    Start { name: String, log: String },
    #[error("{dir:?} was made by PostgreSQL {made_by}; version {found} was found")]
    WrongVersion { dir: PathBuf, made_by: String, found: u32 },
    #[error("a server left behind on {dir:?} does not stop")]
    Leftover { dir: PathBuf },
    #[error("{dir:?} is in use by another pgusher dev")]
    InUse { dir: PathBuf },
    #[error("{path:?}: {message}")]
    BadState { path: PathBuf, message: String },
    #[error("{path:?}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("the configuration names [[shards]] or a [catalog] host, but dev makes its own")]
    OwnShards,
    #[error("--tenants {text:?}: {source}")]
    BadTenant { text: String, source: InvalidTenantId },
    #[error("{0}")]
    Serve(Box<ServeError>),
    #[error("making tenant {tenant} failed: {error}")]
    Provision { tenant: TenantId, error: Box<PgError> },
}

impl From<ServeError> for DevError {
    fn from(error: ServeError) -> Self {
        Self::Serve(Box::new(error))
    }
}

impl DevError {
    /// The way out, if there is one to tell.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoPostgres => Some(
                "Install the server (Debian, Ubuntu: apt-get install postgresql; Fedora: dnf install postgresql-server; \
                 macOS: brew install postgresql), or set PGUSHER_PG_BIN to the directory that holds initdb.",
            ),
            Self::BadBinaries { .. } => Some("Unset it to let pgusher look for itself."),
            Self::NoServerUser { .. } => Some("Name a user in PGUSHER_PG_USER, or start pgusher as an ordinary user."),
            Self::WrongVersion { .. } => Some("Install that version, or choose another --data directory."),
            Self::InUse { .. } => Some("Stop it, or choose another --data directory."),
            Self::BadState { .. } => Some("Choose another --data directory, or remove this one to start afresh."),
            Self::OwnShards => Some("Use `pgusher serve` for clusters that exist already."),
            _ => None,
        }
    }
}

/// The bundled template: what a new tenant's schema contains when the configuration names no other.
const TEMPLATE: &[(&str, &str)] = &[
    ("01_users.sql", include_str!("../../config/template/01_users.sql")),
    ("02_services.sql", include_str!("../../config/template/02_services.sql")),
    ("03_bookings.sql", include_str!("../../config/template/03_bookings.sql")),
];

/// Name of the application user that `dev` defines if the configuration has none.
const APP_USER: &str = "app";

/// Runs until a signal. `config` is what the configuration file says, without shards.
///
/// # Errors
/// [`DevError`]; whatever was started is stopped again.
pub async fn run(options: Options, config: Config, mut signals: Signals) -> Result<(), DevError> {
    if !config.shards.is_empty() || config.catalog.host.is_some() {
        return Err(DevError::OwnShards);
    }
    let tenants = parse_tenants(&options.tenants)?;
    // Each tenant has one to itself then, and the catalog the first one.
    let own = if config.provision.plan.wants_own_shard() { tenants.len() + 1 } else { 0 };
    let shards = options.shards.max(u16::try_from(own).unwrap_or(u16::MAX));
    let wanted = (options.data.clone(), shards);
    let (data, clusters) = blocking(move || start_clusters(wanted.0.as_deref(), wanted.1)).await?;
    let result = match overlay(config, &options, &tenants, &data, &clusters) {
        Ok(config) => serve(&options, config, &tenants, &data, &clusters, &mut signals).await,
        Err(error) => Err(error),
    };
    blocking(move || {
        stop_clusters(clusters);
        drop(data);
    })
    .await;
    result
}

/// Serves until a signal, then drains.
async fn serve(
    options: &Options,
    config: Config,
    tenants: &[TenantId],
    data: &DataDir,
    clusters: &[Cluster],
    signals: &mut Signals,
) -> Result<(), DevError> {
    let timeout = config.proxy.shutdown_timeout;
    let starting = async {
        let server = Server::start(config.clone()).await?;
        let seats = provision(&server, tenants).await?;
        Ok::<_, DevError>((server, seats))
    };
    let (server, seats) = tokio::select! {
        started = starting => started?,
        () = signals.stop() => return Ok(()),
    };
    Announcement::new(&config, &server.addresses(), &seats, data, clusters).print(options.json);
    loop {
        match signals.next().await {
            Event::Stop => break,
            Event::Reload => tracing::info!("dev does not reload its configuration; start it again"),
        }
    }
    tokio::select! {
        () = server.drain(timeout) => {}
        () = signals.stop() => tracing::warn!("second signal, not waiting for transactions"),
    }
    Ok(())
}

fn parse_tenants(texts: &[String]) -> Result<Vec<TenantId>, DevError> {
    let texts = texts.iter().map(|text| text.trim()).filter(|text| !text.is_empty());
    let parse =
        |text: &str| TenantId::parse(text).map_err(|source| DevError::BadTenant { text: text.to_owned(), source });
    texts.map(parse).collect()
}

/// Opens the data directory and starts every cluster that it holds, at least `wanted`, side by side.
fn start_clusters(data: Option<&Path>, wanted: u16) -> Result<(DataDir, Vec<Cluster>), DevError> {
    let env = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let binaries = Binaries::find(env)?;
    let user = OsUser::choose(env("PGUSHER_PG_USER"))?;
    let mut data = DataDir::open(data)?;
    let home = data.clusters(user.as_ref())?;
    data.save()?;
    let setup = Setup { binaries, user, home, password: data.state.postgres_password.clone(), durable: data.kept };
    let names = shard_names(wanted, data.state.ports.len());
    if names.len() > usize::from(wanted) {
        tracing::info!(shards = names.len(), "starting every shard that the data directory has");
    }
    let started: Vec<_> = std::thread::scope(|scope| {
        let start = |name: &String| {
            let (setup, name, port) = (&setup, name.clone(), data.state.ports.get(name).copied());
            scope.spawn(move || Cluster::start(setup, &name, port))
        };
        let threads: Vec<_> = names.iter().map(start).collect();
        // A panic in a thread would be a bug; it goes on in this one.
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let (mut clusters, mut failed) = (Vec::new(), None);
    for result in started {
        match result {
            Ok(cluster) => clusters.push(cluster),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if let Some(error) = failed {
        stop_clusters(clusters);
        return Err(error);
    }
    data.state.ports = clusters.iter().map(|cluster| (cluster.name.clone(), cluster.port)).collect();
    data.save()?;
    Ok((data, clusters))
}

/// `shard_1`, `shard_2`, …
fn shard_names(wanted: u16, existing: usize) -> Vec<String> {
    (1..=usize::from(wanted).max(existing)).map(|number| format!("shard_{number}")).collect()
}

fn stop_clusters(clusters: Vec<Cluster>) {
    std::thread::scope(|scope| {
        for cluster in clusters {
            scope.spawn(|| cluster.stop());
        }
    });
}

/// Puts what `dev` decides over what the configuration says.
fn overlay(
    mut config: Config,
    options: &Options,
    tenants: &[TenantId],
    data: &DataDir,
    clusters: &[Cluster],
) -> Result<Config, DevError> {
    let password = Secret::new(&data.state.postgres_password);
    // A number rather than 0: the API hands out DSNs with the port that the configuration names.
    config.proxy.listen_port = match options.port {
        0 => ports::pick().map_err(|source| DevError::Io { path: "127.0.0.1".into(), source })?,
        port => port,
    };
    let own = config.provision.plan.wants_own_shard();
    config.shards = clusters
        .iter()
        .enumerate()
        .map(|(at, cluster)| ShardConfig {
            name: cluster.name.clone(),
            port: cluster.port,
            admin_password: password.clone(),
            dedicated_to: at.checked_sub(1).and_then(|at| tenants.get(at)).filter(|_| own).map(TenantId::to_string),
            ..ShardConfig::default()
        })
        .collect();
    config.provision.admin_user = "postgres".to_owned();
    config.provision.admin_password = password;
    let or = |given: &mut Secret, ours: &str| {
        if given.expose().is_empty() {
            *given = Secret::new(ours);
        }
    };
    or(&mut config.provision.master_secret, &data.state.master_secret);
    or(&mut config.api.token, &data.state.api_token);
    if data.kept && config.catalog.snapshot_file.is_none() {
        config.catalog.snapshot_file = Some(data.path.join("catalog.snapshot"));
    }
    if config.provision.template_dir.is_none() {
        config.provision.template_dir = Some(write_template(&data.path)?);
    }
    if config.users.is_empty() {
        config.users.push(User {
            name: APP_USER.to_owned(),
            password: Secret::new(&data.state.app_password),
            tenants: vec!["*".to_owned()],
            auto_provision: true,
        });
    }
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    for listen in [&mut config.api.listen, &mut config.metrics.listen] {
        *listen = http_address(listen, options.port);
    }
    Ok(config)
}

/// Where HTTP is to listen: several `dev`s run side by side, so a taken port gives way.
fn http_address(configured: &str, proxy_port: u16) -> String {
    match configured.rsplit_once(':') {
        Some((host, _)) if proxy_port == 0 => format!("{host}:0"),
        _ => ports::preferred_or_any(configured),
    }
}

/// Writes the bundled template into the data directory, where it may be edited; an edited one is kept.
fn write_template(data: &Path) -> Result<PathBuf, DevError> {
    let dir = data.join("template");
    if !dir.exists() {
        let io = |source| DevError::Io { path: dir.clone(), source };
        std::fs::create_dir(&dir).map_err(io)?;
        for (name, text) in TEMPLATE {
            std::fs::write(dir.join(name), text).map_err(io)?;
        }
    }
    Ok(dir)
}

/// A tenant that is ready.
struct Seat {
    id: TenantId,
    shard: String,
    schema: String,
}

/// Makes the tenants that do not exist, one after the other.
async fn provision(server: &Server, tenants: &[TenantId]) -> Result<Vec<Seat>, DevError> {
    let control = server.control();
    let mut seats = Vec::with_capacity(tenants.len());
    for id in tenants {
        let record = control
            .create(id, "pgusher dev", Choice::default())
            .await
            .map_err(|error| DevError::Provision { tenant: id.clone(), error: Box::new(error) })?;
        seats.push(Seat { id: id.clone(), shard: record.shard, schema: record.schema });
    }
    Ok(seats)
}

/// Runs what waits for processes and files off the runtime's own threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests;
