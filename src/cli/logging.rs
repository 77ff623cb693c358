//! Log lines: on standard error, as text or JSON, filtered by `[log] level`.

use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt, reload};

use crate::config::{Log, LogFormat};

/// The running log.
pub struct Logging {
    filter: reload::Handle<EnvFilter, Registry>,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The level is neither a word nor a filter.
    #[error("[log] level {level:?}: {source}")]
    Level {
        /// What the configuration says.
        level: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// Another log runs in this process.
    #[error("logging cannot be set up: {0}")]
    Taken(#[from] TryInitError),
}

impl Logging {
    /// Starts it for the whole process.
    ///
    /// # Errors
    /// [`LoggingError`]
    pub fn start(log: &Log) -> Result<Self, LoggingError> {
        let (filter, handle) = reload::Layer::new(filter(log)?);
        // A log that nobody reads any more (a closed pipe) must not end the process: no complaint about it, since that
        // would go to the same place and panic there.
        let layer = fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
        let layer = match log.format {
            LogFormat::Text => {
                use std::io::IsTerminal as _;
                layer.with_ansi(std::io::stderr().is_terminal()).boxed()
            }
            LogFormat::Json => layer.json().flatten_event(true).boxed(),
        };
        tracing_subscriber::registry().with(filter).with(layer).try_init()?;
        Ok(Self { filter: handle })
    }

    /// Applies a changed level. The format stays.
    pub fn change(&self, log: &Log) {
        match filter(log) {
            Ok(filter) => {
                if let Err(error) = self.filter.reload(filter) {
                    tracing::error!(%error, "the log level stays");
                }
            }
            Err(error) => tracing::error!(%error, "the log level stays"),
        }
    }
}

fn filter(log: &Log) -> Result<EnvFilter, LoggingError> {
    EnvFilter::try_new(&log.level).map_err(|source| LoggingError::Level { level: log.level.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_words_or_filters() {
        let of = |level: &str| filter(&Log { level: level.into(), ..Log::default() });
        assert!(of("info").is_ok());
        assert!(of("info,pgusher::pool=debug").is_ok());
        assert!(of("info,pgusher=loud").is_err());
    }
}
