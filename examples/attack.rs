//! Runs a corpus of attacks through a proxy, and says what leaked.
//!
//! ```text
//! cargo run --example attack -- --corpus DIR --dev target/debug/pgusher --plan schema --pool-mode transaction
//! cargo run --example attack -- --corpus DIR --dsn-template 'postgresql://{tenant}:{password}@host:6432/{tenant}' \
//!     --password client_001=… --password client_002=… --admin-dsn postgresql://postgres:…@shard:5432/tenants \
//!     --metrics http://host:6490/metrics
//! ```
//!
//! A corpus is a folder with `attacks.jsonl`, `attacks_wire.jsonl` or both; `tests/support/attack/corpus.rs` has the
//! format. Tenants `client_001` and `client_002` must exist and stand on one server (unless the plan is `cluster`);
//! **everything they have is dropped** and made anew before each entry.
//!
//! The exit code is 1 if something leaked that the list of what a plan cannot stop does not have, or could not be tried.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is a program for people")]

#[path = "../tests/support/attack/mod.rs"]
mod attack;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use attack::corpus::{self, Unstoppable};
use attack::fixture::Fixture;
use attack::report::{self, Summary};
use attack::run::Runner;
use attack::target::{self, Dev, Rules, TENANTS, Target};
use clap::Parser;

#[derive(Parser)]
struct Arguments {
    /// Folder with attacks.jsonl, attacks_wire.jsonl or both
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/isolation/corpus"))]
    corpus: PathBuf,
    /// Start `pgusher dev` of this program, with one shard (default: the pgusher beside this program)
    #[arg(long, value_name = "PROGRAM", conflicts_with = "dsn_template")]
    dev: Option<PathBuf>,
    /// A proxy that runs already: DSN with {tenant} and {password}
    #[arg(long, value_name = "DSN", requires = "admin_dsn")]
    dsn_template: Option<String>,
    /// Password of a tenant, for --dsn-template
    #[arg(long, value_name = "TENANT=PASSWORD")]
    password: Vec<String>,
    /// Superuser on the tenants' server, for --dsn-template; given twice, for client_001 and client_002
    #[arg(long, value_name = "DSN")]
    admin_dsn: Vec<String>,
    /// URL of the proxy's /metrics, for --dsn-template
    #[arg(long, value_name = "URL")]
    metrics: Option<String>,
    /// Plan of the tenants: schema, rls, database, cluster
    #[arg(long, default_value = "schema")]
    plan: String,
    /// Pool mode: session, transaction, auto
    #[arg(long, default_value = "session")]
    pool_mode: String,
    /// Grade of the grants: compat, strict
    #[arg(long)]
    hardening: Option<String>,
    /// The guard's mode: enforce, observe, off
    #[arg(long)]
    guard: Option<String>,
    /// Configuration of --dev, as its variables: PGUSHER_POOL_MAX_DB_CONNECTIONS=1
    #[arg(long, value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Only these entries
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    only: Vec<String>,
    /// Leaks that plans cannot stop
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/isolation/unstoppable.txt"))]
    allow: PathBuf,
    /// How long an answer may take, in seconds
    #[arg(long, default_value_t = 5.0)]
    patience: f64,
    /// One line of JSON for each entry, and one for the summary
    #[arg(long)]
    json: bool,
    /// What was heard, too
    #[arg(long)]
    verbose: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            eprintln!("attack: {error}{source}");
            ExitCode::from(2)
        }
    }
}

/// Whether nothing leaked.
async fn run(arguments: Arguments) -> Result<bool, attack::Error> {
    let entries = corpus::load(&arguments.corpus)?;
    let unstoppable = Unstoppable::load(&arguments.allow)?;
    let (dev, target) = reach(&arguments).await?;
    let counts = target.metrics.is_some();
    let runner = Runner {
        fixture: Fixture::prepare(&arguments.plan, &target).await?,
        target,
        plan: arguments.plan.clone(),
        mode: arguments.pool_mode.clone(),
        patience: Duration::from_secs_f64(arguments.patience),
    };
    let mut outcomes = Vec::new();
    for entry in entries.iter().filter(|entry| runner.applies(entry)) {
        if !arguments.only.is_empty() && !arguments.only.contains(&entry.id) {
            continue;
        }
        let outcome = runner.run(entry).await;
        if arguments.json {
            println!("{}", serde_json::to_string(&outcome)?);
        } else {
            println!("{}", report::line(&outcome));
            if arguments.verbose {
                for (name, heard) in &outcome.heard {
                    heard.lines().filter(|line| !line.is_empty()).for_each(|line| println!("    {name}: {line}"));
                }
            }
        }
        outcomes.push(outcome);
    }
    let grade = arguments.hardening.as_deref().unwrap_or("compat");
    let summary = Summary::of(&outcomes, &unstoppable, &arguments.plan, grade, counts);
    if arguments.json {
        println!("{}", summary.json());
    } else {
        println!("\n{}", summary.text());
    }
    drop(dev);
    Ok(summary.is_good())
}

async fn reach(arguments: &Arguments) -> Result<(Option<Dev>, Target), attack::Error> {
    let pair = |text: &String| {
        let (name, value) = text.split_once('=').ok_or_else(|| format!("not NAME=VALUE: {text}"))?;
        Ok::<_, attack::Error>((name.to_owned(), value.to_owned()))
    };
    let Some(template) = &arguments.dsn_template else {
        let program =
            arguments.dev.clone().or_else(target::beside).ok_or("which program? Use --dev or --dsn-template")?;
        let rules = Rules {
            plan: arguments.plan.clone(),
            pool_mode: arguments.pool_mode.clone(),
            hardening: arguments.hardening.clone(),
            guard: arguments.guard.clone(),
            variables: arguments.set.iter().map(pair).collect::<Result<_, _>>()?,
        };
        let dev = Dev::start(&program, &rules).await?.ok_or("PostgreSQL's programs are not installed")?;
        let target = dev.target(&arguments.plan)?;
        return Ok((Some(dev), target));
    };
    let passwords: BTreeMap<String, String> = arguments.password.iter().map(pair).collect::<Result<_, _>>()?;
    let (mut logins, mut admins) = (BTreeMap::new(), BTreeMap::new());
    for (index, tenant) in TENANTS.iter().enumerate() {
        let password = passwords.get(*tenant).map_or("", String::as_str);
        logins.insert((*tenant).to_owned(), target::from_template(template, tenant, password)?);
        let dsn = arguments.admin_dsn.get(index).or(arguments.admin_dsn.first()).ok_or("no --admin-dsn")?;
        admins.insert((*tenant).to_owned(), target::admin_of(&arguments.plan, dsn, tenant)?);
    }
    let metrics = arguments.metrics.as_deref().map(target::metrics_address);
    Ok((None, Target { logins, admins, metrics }))
}
