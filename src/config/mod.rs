//! The configuration: a TOML file, then environment variables, then rules that concern more than one key.
//!
//! One table (`keys.rs`) says which keys exist, how each is read, and what the manual says about it. Unknown keys,
//! variables `PGUSHER_<SECTION>_<KEY>`, the documented file `config/pgusher.toml` and its test all come from it.
//!
//! ```text
//! text ──file.rs──▶ entries ◀──env.rs── variables
//!                      │ keys.rs, kind.rs: one value each
//!                      ▼
//!                   Config ──rules.rs──▶ mistakes, all of them, each with its line
//! ```
//!
//! Relative paths in values are taken from the directory in which pgusher was started.
//! Certificates are not opened here beyond being readable: see [`crate::client::tls`] and [`crate::pool::tls`].

mod entries;
mod env;
mod file;
mod keys;
mod kind;
mod mistake;
mod reference;
mod rules;
mod sections;
mod warnings;

use std::ffi::OsString;
use std::path::Path;

pub use mistake::{ConfigErrors, Mistake, Place};
pub use reference::reference;
pub use sections::{
    Api, Audit, Auth, AuthType, Canary, Catalog, Guard, GuardMode, Identify, Log, LogFormat, Metrics, Pool, PoolMode,
    Provision, Proxy, ShardConfig, Source, SslMode, Tls, User,
};

/// Everything that can be configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// `[proxy]`
    pub proxy: Proxy,
    /// `[pool]`
    pub pool: Pool,
    /// `[tls]`
    pub tls: Tls,
    /// `[auth]`
    pub auth: Auth,
    /// `[identify]`
    pub identify: Identify,
    /// `[[users]]`: application users
    pub users: Vec<User>,
    /// `[catalog]`
    pub catalog: Catalog,
    /// `[[shards]]`: written into the catalog at start
    pub shards: Vec<ShardConfig>,
    /// `[provision]`
    pub provision: Provision,
    /// `[guard]`
    pub guard: Guard,
    /// `[audit]`
    pub audit: Audit,
    /// `[canary]`
    pub canary: Canary,
    /// `[api]`
    pub api: Api,
    /// `[metrics]`
    pub metrics: Metrics,
    /// `[log]`
    pub log: Log,
}

/// What a configuration is for: it decides which keys may be absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// `pgusher serve`: shards or a catalog, and a master secret, must be given.
    Serve,
    /// `pgusher dev`: it makes its own shards, catalog and master secret.
    Dev,
}

impl Config {
    /// Reads a file and the variables that override it (`std::env::vars_os()`).
    ///
    /// # Errors
    /// [`ConfigErrors`] holds every mistake found, not only the first.
    pub fn load<K, V>(
        path: &Path,
        variables: impl IntoIterator<Item = (K, V)>,
        purpose: Purpose,
    ) -> Result<Self, ConfigErrors>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&name, &text, variables, purpose),
            Err(error) => Err(ConfigErrors::new(name, vec![Mistake::of_file(format!("cannot be read: {error}"))])),
        }
    }

    /// Reads a configuration from a text; `name` stands in front of its mistakes. Files that it names are read too.
    ///
    /// # Errors
    /// [`ConfigErrors`] holds every mistake found, not only the first.
    pub fn parse<K, V>(
        name: &str,
        text: &str,
        variables: impl IntoIterator<Item = (K, V)>,
        purpose: Purpose,
    ) -> Result<Self, ConfigErrors>
    where
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let mut mistakes = Vec::new();
        let mut entries = file::read(text, &mut mistakes);
        let is_toml = mistakes.iter().all(|mistake| !mistake.is_syntax());
        let variables = variables.into_iter().map(|(name, value)| (name.into(), value.into()));
        env::overlay(&mut entries, variables, &mut mistakes);
        let config = entries.apply(&mut mistakes);
        // After a syntax error keys seem to be missing that are not; the rules would only confuse.
        if is_toml {
            rules::check(&config, &entries, purpose, &mut mistakes);
        }
        if mistakes.is_empty() { Ok(config) } else { Err(ConfigErrors::new(name.to_owned(), mistakes)) }
    }

    /// What is allowed and probably not meant, as lines for people.
    pub fn warnings(&self) -> Vec<String> {
        warnings::of(self)
    }
}

/// What `pgusher check` says about a file: its warnings.
///
/// # Errors
/// [`ConfigErrors`] holds every mistake found, not only the first.
pub fn check(path: &Path) -> Result<Vec<String>, ConfigErrors> {
    Config::load(path, std::env::vars_os(), Purpose::Serve).map(|config| config.warnings())
}

/// A text that must not be shown: `Debug` masks it and there is no `Display`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself; say why at the call.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests;
