//! What a failure looks like from outside: SQLSTATE, message, DETAIL, HINT.
//!
//! A [`PgError`] holds nothing but what its reader may see; causes stay in logs.

use std::borrow::Cow;
use std::fmt;

/// How serious an error is for the connection it is sent on
/// ([error fields](https://www.postgresql.org/docs/current/protocol-error-fields.html)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The statement failed; the connection goes on.
    Error,
    /// The connection is closed after this message.
    Fatal,
}

impl Severity {
    /// The word in the `S` and `V` fields.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
        }
    }
}

/// SQLSTATE codes that pgusher itself sends
/// ([appendix A](https://www.postgresql.org/docs/current/errcodes-appendix.html)).
pub mod sqlstate {
    /// `protocol_violation`
    pub const PROTOCOL_VIOLATION: &str = "08P01";
    /// `connection_failure`
    pub const CONNECTION_FAILURE: &str = "08006";
    /// `sqlclient_unable_to_establish_sqlconnection`
    pub const CANNOT_CONNECT: &str = "08001";
    /// `feature_not_supported`
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    /// `invalid_authorization_specification`
    pub const INVALID_AUTHORIZATION: &str = "28000";
    /// `invalid_password`
    pub const INVALID_PASSWORD: &str = "28P01";
    /// `syntax_error`
    pub const SYNTAX_ERROR: &str = "42601";
    /// `undefined_object`
    pub const UNDEFINED_OBJECT: &str = "42704";
    /// `invalid_catalog_name`
    pub const UNKNOWN_DATABASE: &str = "3D000";
    /// `insufficient_privilege`
    pub const INSUFFICIENT_PRIVILEGE: &str = "42501";
    /// `invalid_parameter_value`
    pub const INVALID_PARAMETER_VALUE: &str = "22023";
    /// `invalid_sql_statement_name`
    pub const UNKNOWN_STATEMENT: &str = "26000";
    /// `duplicate_prepared_statement`
    pub const DUPLICATE_STATEMENT: &str = "42P05";
    /// `too_many_connections`
    pub const TOO_MANY_CONNECTIONS: &str = "53300";
    /// `configuration_limit_exceeded`
    pub const LIMIT_EXCEEDED: &str = "53400";
    /// `program_limit_exceeded`
    pub const PROGRAM_LIMIT_EXCEEDED: &str = "54000";
    /// `object_not_in_prerequisite_state`
    pub const NOT_IN_PREREQUISITE_STATE: &str = "55000";
    /// `admin_shutdown`
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    /// `cannot_connect_now`
    pub const CANNOT_CONNECT_NOW: &str = "57P03";
    /// `idle_session_timeout`
    pub const IDLE_SESSION_TIMEOUT: &str = "57P05";
    /// `query_canceled`
    pub const QUERY_CANCELED: &str = "57014";
    /// A transaction that has failed takes nothing but its end.
    pub const IN_FAILED_TRANSACTION: &str = "25P02";
    /// `idle_in_transaction_session_timeout`
    pub const IDLE_IN_TRANSACTION_TIMEOUT: &str = "25P03";
    /// `internal_error`
    pub const INTERNAL: &str = "XX000";
}

/// An error as a PostgreSQL client reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PgError {
    /// Whether the connection survives.
    pub severity: Severity,
    /// Five characters of [`sqlstate`].
    pub code: Cow<'static, str>,
    /// What happened: lower case, no full stop.
    pub message: String,
    /// More about it, as sentences.
    pub detail: Option<String>,
    /// The way out, as sentences.
    pub hint: Option<String>,
    /// The function of PostgreSQL's that says this, where a driver looks for it.
    pub routine: Option<Routine>,
}

/// A function of PostgreSQL's that reports an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routine {
    /// Finds that a prepared statement would return other columns than before; PgJDBC prepares anew when it reads that.
    RevalidateCachedQuery,
}

impl Routine {
    /// The `R` field.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RevalidateCachedQuery => "RevalidateCachedQuery",
        }
    }
}

impl PgError {
    /// An error that leaves the connection open.
    pub fn error(code: &'static str, message: impl Into<String>) -> Self {
        let (code, message) = (Cow::Borrowed(code), message.into());
        Self { severity: Severity::Error, code, message, detail: None, hint: None, routine: None }
    }

    /// An error that ends the connection.
    pub fn fatal(code: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Fatal, ..Self::error(code, message) }
    }

    /// Adds the DETAIL line.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Names the function of PostgreSQL's that says this.
    #[must_use]
    pub fn routine(mut self, routine: Routine) -> Self {
        self.routine = Some(routine);
        self
    }

    /// Adds the HINT line.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for PgError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)?;
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        Ok(())
    }
}

impl std::error::Error for PgError {}
