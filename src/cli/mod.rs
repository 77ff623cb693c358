//! The command line: what each subcommand does, from its arguments to its exit code.
//!
//! Exit codes: 0 done, 1 failed (the reason is on standard error), 2 wrong usage.

pub mod health;
pub mod logging;
pub mod signals;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::audit::Key;
use crate::config::{Config, Purpose};
use crate::control::adopt::Adoption;
use crate::control::provision::Choice;
use crate::control::records::ShardRecord;
use crate::control::shared_tables::Conversion;
use crate::control::{ControlError, cli as control};
use crate::dev;
use crate::server::Server;
use crate::tenant::{Plan, TenantId};
use logging::Logging;
use signals::{Event, Signals};

/// A PostgreSQL proxy that shows every tenant to its own seat
#[derive(Debug, Parser)]
#[command(name = "pgusher", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The configuration file of a command that needs one.
#[derive(Debug, Clone, clap::Args)]
struct ConfigFile {
    /// Configuration file (TOML)
    #[arg(long = "config", env = "PGUSHER_CONFIG", value_name = "FILE")]
    path: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the proxy
    Serve {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Say every mistake in a configuration file
    Check {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Run the proxy with PostgreSQL clusters of its own, to try it out
    Dev {
        #[command(flatten)]
        options: dev::Options,
        /// Configuration file for everything else
        #[arg(long, env = "PGUSHER_CONFIG", value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Create, list, show and delete tenants
    Tenant {
        #[command(subcommand)]
        command: TenantCommand,
    },
    /// List and add shards
    Shard {
        #[command(subcommand)]
        command: ShardCommand,
    },
    /// Check the audit log
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
    /// Make an application's tables into ones that tenants share (plan rls)
    Rls {
        #[command(subcommand)]
        command: RlsCommand,
    },
    /// Have a running pgusher attack itself, with two throwaway tenants per shard; exits with 1 if anything leaked
    Canary {
        #[command(flatten)]
        config: ConfigFile,
        /// The admin API, if not the one of the configuration
        #[arg(long, value_name = "URL")]
        url: Option<String>,
        /// How long to wait for the end
        #[arg(long, default_value = "5m", value_parser = humantime::parse_duration)]
        timeout: std::time::Duration,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask a running pgusher whether it is ready; exits with 1 if not
    Health {
        /// What to ask
        #[arg(long, default_value = "http://127.0.0.1:6490/readyz")]
        url: String,
        /// How long to wait for an answer
        #[arg(long, default_value = "3s", value_parser = humantime::parse_duration)]
        timeout: std::time::Duration,
    },
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Find every line that was changed, removed, put in or moved; exits with 1 if there is one
    Verify {
        #[command(flatten)]
        config: ConfigFile,
        /// Logs in the order in which they were written, if not the one of the configuration
        #[arg(value_name = "LOG")]
        files: Vec<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
enum TenantCommand {
    /// Make a tenant
    Create {
        #[command(flatten)]
        config: ConfigFile,
        /// The tenant's name
        id: String,
        /// The shard it is to live on; the ring decides if absent
        #[arg(long)]
        shard: Option<String>,
        /// Its plan: rls, schema, database, cluster; the configuration decides if absent
        #[arg(long, value_parser = plan)]
        plan: Option<Plan>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a tenant of a schema or database that is there; says what contradicts the plan, and repairs it if told to
    Adopt {
        #[command(flatten)]
        config: ConfigFile,
        /// The tenant's name
        id: String,
        /// schema or database
        #[arg(long, value_parser = plan)]
        plan: Plan,
        /// The shard that it is on
        #[arg(long)]
        shard: String,
        /// The schema; the tenant's name, or public in a database, if absent
        #[arg(long)]
        schema: Option<String>,
        /// The database; the shard's, or the tenant's name for plan database, if absent
        #[arg(long)]
        database: Option<String>,
        /// The role; the tenant's name if absent. Its password is changed
        #[arg(long)]
        role: Option<String>,
        /// Repair what is found, in one transaction
        #[arg(long)]
        fix: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List tenants
    List {
        #[command(flatten)]
        config: ConfigFile,
        /// Start behind this one
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        /// Print at most so many
        #[arg(long)]
        limit: Option<u32>,
        /// Deleted ones too
        #[arg(long)]
        deleted: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one tenant
    Show {
        #[command(flatten)]
        config: ConfigFile,
        /// The tenant's name
        id: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete a tenant and its data
    Delete {
        #[command(flatten)]
        config: ConfigFile,
        /// The tenant's name
        id: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum ShardCommand {
    /// List shards
    List {
        #[command(flatten)]
        config: ConfigFile,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Add a shard, or change one; existing tenants stay where they are
    Add(#[command(flatten)] ShardAdd),
}

#[derive(Debug, Subcommand)]
enum RlsCommand {
    /// Print the SQL that gives the tables of schema public a tenant column, composite keys, policies and grants
    Convert {
        #[command(flatten)]
        config: ConfigFile,
        /// The shard
        #[arg(long)]
        shard: String,
        /// The database; the shard's rls_database if absent
        #[arg(long)]
        database: Option<String>,
        /// Tables, separated by commas; all of them if absent
        #[arg(long, value_delimiter = ',')]
        tables: Vec<String>,
        /// The tenant that gets the rows that are there
        #[arg(long, value_name = "TENANT")]
        default_tenant: Option<String>,
        /// Do it, in one transaction
        #[arg(long)]
        apply: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// `pgusher shard add`
#[derive(Debug, clap::Args)]
struct ShardAdd {
    #[command(flatten)]
    config: ConfigFile,
    /// The shard's name
    name: String,
    /// Host name, address or socket directory
    #[arg(long)]
    host: String,
    /// Port
    #[arg(long, default_value_t = 5432)]
    port: u16,
    /// Database that holds the tenants; created if missing
    #[arg(long, default_value = "tenants")]
    database: String,
    /// Database that tenants of plan rls share; created if missing
    #[arg(long, default_value = "shared")]
    rls_database: String,
    /// The one tenant that has the shard to itself (plan cluster); it takes no other
    #[arg(long, value_name = "TENANT")]
    dedicated: Option<String>,
    /// Weight on the ring
    #[arg(long, default_value_t = 100)]
    weight: u32,
    /// Where it stands
    #[arg(long, default_value = "")]
    region: String,
    /// Most server connections of a proxy to it; the proxy's default if absent
    #[arg(long)]
    max_db_connections: Option<usize>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn plan(text: &str) -> Result<Plan, String> {
    let words = Plan::ALL.map(Plan::as_str);
    Plan::parse(text).ok_or_else(|| format!("there are the plans {}", words.join(", ")))
}

/// What a person reads when a command fails.
struct Failure {
    message: String,
    hint: Option<String>,
}

impl<E: std::error::Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let hint = match (&error as &dyn std::error::Error).downcast_ref::<ControlError>() {
            Some(ControlError::Failed(error)) => error.hint.clone(),
            _ => None,
        };
        Self { message: error.to_string(), hint }
    }
}

/// Runs a command to its end.
pub fn run(cli: Cli) -> ExitCode {
    // The proxy's threads are the server's own affair; this one waits for signals and runs the control commands.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    match runtime.block_on(dispatch(cli.command)) {
        Ok(code) => code,
        Err(failure) => fail(&failure),
    }
}

fn fail(failure: &Failure) -> ExitCode {
    eprintln!("pgusher: {}", failure.message);
    if let Some(hint) = &failure.hint {
        eprintln!("HINT: {hint}");
    }
    ExitCode::FAILURE
}

async fn dispatch(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Serve { config } => serve(&config.path).await,
        Command::Check { config } => Ok(check(&config.path)),
        Command::Dev { options, config } => {
            let config = load(config.as_deref(), Purpose::Dev)?;
            let _logging = Logging::start(&config.log)?;
            let result = dev::run(options, config, Signals::listen()?).await;
            result.map_err(|error| Failure { message: error.to_string(), hint: error.hint().map(str::to_owned) })?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Tenant { command } => tenant(command).await,
        Command::Shard { command } => shard(command).await,
        Command::Audit { command } => audit(command),
        Command::Rls { command } => rls(command).await,
        Command::Canary { config, url, timeout, json } => canary(&config, url, timeout, json),
        Command::Health { url, timeout } => {
            println!("{}", health::probe(&url, timeout)?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Serves until SIGTERM or SIGINT, then drains; a second one ends it at once. SIGHUP reads the file again.
async fn serve(path: &Path) -> Result<ExitCode, Failure> {
    let mut config = load(Some(path), Purpose::Serve)?;
    let logging = Logging::start(&config.log)?;
    warn(&config);
    let mut signals = Signals::listen()?;
    let server = tokio::select! {
        started = Server::start(config.clone()) => started?,
        () = signals.stop() => return Ok(ExitCode::SUCCESS),
    };
    while signals.next().await == Event::Reload {
        match load(Some(path), Purpose::Serve) {
            Ok(new) => {
                logging.change(&new.log);
                warn(&new);
                match server.reload(new.clone()).await {
                    Ok(()) => {
                        config = new;
                        tracing::info!("configuration reloaded");
                    }
                    Err(error) => tracing::error!(%error, "reload failed, the old configuration stays"),
                }
            }
            Err(failure) => tracing::error!(error = failure.message, "reload failed, the old configuration stays"),
        }
    }
    tokio::select! {
        () = server.drain(config.proxy.shutdown_timeout) => Ok(ExitCode::SUCCESS),
        () = signals.stop() => {
            tracing::warn!("second signal, not waiting for transactions");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn check(path: &Path) -> ExitCode {
    match crate::config::check(path) {
        Ok(warnings) => {
            for warning in warnings {
                println!("{}: warning: {warning}", path.display());
            }
            println!("{}: no mistakes", path.display());
            ExitCode::SUCCESS
        }
        Err(mistakes) => {
            println!("{mistakes}");
            ExitCode::FAILURE
        }
    }
}

/// Reads the file, if there is one, and the environment.
fn load(path: Option<&Path>, purpose: Purpose) -> Result<Config, Failure> {
    let config = match path {
        Some(path) => Config::load(path, std::env::vars_os(), purpose),
        None => Config::parse("environment", "", std::env::vars_os(), purpose),
    };
    config.map_err(|mistakes| Failure { message: mistakes.to_string(), hint: None })
}

/// Says what is allowed and probably not meant, once the log runs.
fn warn(config: &Config) {
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
}

/// Reads the configuration for a command that answers and ends; its log is for warnings only.
fn control_config(file: &ConfigFile) -> Result<Config, Failure> {
    let mut config = load(Some(&file.path), Purpose::Serve)?;
    config.log.level = "warn".to_owned();
    Logging::start(&config.log)?;
    Ok(config)
}

async fn tenant(command: TenantCommand) -> Result<ExitCode, Failure> {
    let text = match command {
        TenantCommand::Create { config, id, shard, plan, json } => {
            control::tenant_create(&control_config(&config)?, &id, &Choice { shard, plan }, json).await?
        }
        TenantCommand::Adopt { config, id, plan, shard, schema, database, role, fix, json } => {
            let adoption = Adoption { id: TenantId::parse(&id)?, plan, shard, schema, database, role, fix };
            control::tenant_adopt(&control_config(&config)?, &adoption, json).await?
        }
        TenantCommand::List { config, after, limit, deleted, json } => {
            control::tenant_list(&control_config(&config)?, after.as_deref(), limit, deleted, json).await?
        }
        TenantCommand::Show { config, id, json } => control::tenant_show(&control_config(&config)?, &id, json).await?,
        TenantCommand::Delete { config, id, yes, json } => {
            if !yes && !confirmed(&id)? {
                return Err(Failure { message: "nothing was deleted".into(), hint: None });
            }
            control::tenant_delete(&control_config(&config)?, &id, json).await?
        }
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

/// The canary lives in the proxy: it is asked to run it.
fn canary(
    file: &ConfigFile,
    url: Option<String>,
    timeout: std::time::Duration,
    json: bool,
) -> Result<ExitCode, Failure> {
    let api = control_config(file)?.api;
    if url.is_none() && api.listen.is_empty() {
        let hint = "Set [api] listen, or name the API by --url.".to_owned();
        return Err(Failure { message: "the admin API is off".into(), hint: Some(hint) });
    }
    let base = url.unwrap_or_else(|| format!("http://{}", api.listen));
    let answer = health::ask("POST", &format!("{}/canary", base.trim_end_matches('/')), api.token.expose(), timeout)?;
    let (text, safe) = control::canary_report(&answer, json)?;
    print!("{text}");
    Ok(if safe { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn audit(command: AuditCommand) -> Result<ExitCode, Failure> {
    let AuditCommand::Verify { config, files } = command;
    let config = control_config(&config)?;
    let files = if files.is_empty() { config.audit.file.into_iter().collect() } else { files };
    if files.is_empty() {
        let hint = "Set [audit] file, or name the log.".to_owned();
        return Err(Failure { message: "there is no audit log".into(), hint: Some(hint) });
    }
    let sound = crate::audit::verify(&files, &Key::derive(config.provision.master_secret.expose()))?;
    let numbers = sound.numbers.map_or(String::new(), |(first, last)| format!(", numbers {first} to {last}"));
    println!("{} lines{numbers}: as they were written", sound.lines);
    if !sound.head {
        println!("No head beside the last log: whether lines are missing at its end cannot be told.");
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks for the tenant's name, so that a slip of the finger deletes nothing.
fn confirmed(id: &str) -> Result<bool, Failure> {
    eprint!("This deletes tenant {id} and all of its data. Type its name to go on: ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim() == id)
}

async fn rls(command: RlsCommand) -> Result<ExitCode, Failure> {
    let RlsCommand::Convert { config, shard, database, tables, default_tenant, apply, json } = command;
    let default_tenant = default_tenant.map(|id| TenantId::parse(&id)).transpose()?;
    let conversion = Conversion { shard, database, tables, default_tenant, apply };
    print!("{}", control::rls_convert(&control_config(&config)?, &conversion, json).await?);
    Ok(ExitCode::SUCCESS)
}

async fn shard(command: ShardCommand) -> Result<ExitCode, Failure> {
    let text = match command {
        ShardCommand::List { config, json } => control::shard_list(&control_config(&config)?, json).await?,
        ShardCommand::Add(add) => {
            let config = control_config(&add.config)?;
            let shard = ShardRecord {
                name: add.name,
                host: add.host,
                port: add.port,
                database: add.database,
                weight: add.weight,
                region: add.region,
                max_db_connections: add.max_db_connections,
                rls_database: add.rls_database,
                dedicated_to: add.dedicated,
                tenants: 0,
            };
            control::shard_add(&config, &shard, add.json).await?
        }
    };
    print!("{text}");
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn dev_has_defaults_for_everything() {
        let cli = Cli::parse_from(["pgusher", "dev"]);
        let Command::Dev { options, .. } = cli.command else { panic!("not dev") };
        assert_eq!((options.shards, options.port, options.json), (3, 6432, false));
        assert_eq!(options.tenants, ["client_001", "client_002"]);
    }
}
