//! `pool_mode = "auto"`: what becomes of the session state that a transaction has left on its server connection.
//!
//! The server is asked, after the client has its answer: the values of settings that may have changed, and where the
//! texts do not tell, whether the session holds anything that cannot be carried. Settings are written down and follow
//! the client; for the rest it keeps the connection until the server says that nothing is left.
//!
//! Asking, and not modelling, makes rollbacks, savepoints, failed statements and functions come out right by
//! themselves. No client text is ever run again: values come from the server and go back as literals.
//!
//! All of this is said in the session of a client, and so in its encoding, or in that of the one before. What is asked is
//! therefore ASCII, and so is what is answered: texts come as the hexadecimal digits of their UTF-8, and go back so.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use crate::error::Severity;
use crate::metrics::PIN_REASONS;
use crate::pool::connect::{ServerConnection, ServerError};
use crate::pool::listener::Channels;
use crate::pool::params::Params;
use crate::pool::residue::{Carried, Residue};
use crate::tenant::sql::{Name, Value};

/// An index into [`PIN_REASONS`].
pub type Reason = usize;

/// The one for temporary objects.
const TEMP: Reason = 0;
/// The one for statements that SQL has prepared.
const PREPARED: Reason = 2;
/// The one for `LISTEN`.
pub const LISTEN: Reason = 3;

/// The one for `SET ROLE` and `SET SESSION AUTHORIZATION`.
const ROLE: Reason = 5;
/// Reasons that the server is asked about: the first ones.
const ASKED: usize = 6;
/// The client asks for the state of sequences.
pub const SEQUENCE: Reason = ASKED;
/// The client has seeded `random()`.
pub const SEED: Reason = ASKED + 1;
/// The client has written down the process id of the session.
pub const PROCESS: Reason = ASKED + 2;
/// The one for what nobody knows.
pub const UNKNOWN: Reason = PIN_REASONS.len() - 1;

/// What was found out about a server connection.
pub struct Settled {
    /// The client's settings from now on; they are applied on the connection.
    pub carried: Arc<Carried>,
    /// Why the client has to keep the connection, if it has to; what it listens to aside.
    pub pinned: Option<Reason>,
    /// What it listens to, if that was asked.
    pub listens: Option<Channels>,
}

/// Asks the server what `residue` has come to, for a client that was `pinned`, or `listening` without that,
/// before.
///
/// # Errors
/// The connection must be closed.
pub async fn settle(
    conn: &mut ServerConnection,
    residue: &Residue,
    carried: &Arc<Carried>,
    pinned: Option<Reason>,
    listening: bool,
) -> Result<Settled, ServerError> {
    // What takes away is of interest only where there is something.
    let freed = residue.frees && (listening || pinned.is_some_and(|reason| reason < ASKED || reason == UNKNOWN));
    // What cannot be carried is not taken away either: the client that has set it keeps it.
    let pinned = if conn.params.can_be_carried() { pinned } else { Some(UNKNOWN) };
    let identity = residue.settings.iter().any(|name| matches!(&**name, "role" | "session_authorization"));
    if !residue.unknown && !identity && !freed && (!residue.resets || carried.is_empty()) {
        let lasts = |name: &&str| !conn.params.has(name) && !OF_TRANSACTIONS.contains(name);
        let names: Vec<&str> = residue.settings.iter().map(|n| &**n).filter(lasts).collect();
        if names.is_empty() {
            return Ok(Settled { carried: carried.clone(), pinned, listens: None });
        }
        if let Some(carried) = ask(conn, &names, (**carried).clone()).await? {
            return Ok(Settled { carried, pinned, listens: None });
        }
    }
    let mut rows = conn.rows(&[&PROBE.replace(HELD_LOCKS, HELD_LOCKS_SHIM)]).await;
    if matches!(rows, Err(ServerError::Server(_))) {
        // A place of its own has no functions in the place of PostgreSQL's.
        rows = conn.rows(&[PROBE]).await;
    }
    let rows = match rows {
        Ok(rows) => rows,
        // A place without the functions that the question needs.
        Err(ServerError::Server(_)) => {
            return Ok(Settled { carried: carried.clone(), pinned: Some(UNKNOWN), listens: None });
        }
        Err(error) => return Err(error),
    };
    let row = rows.into_iter().next().unwrap_or_default();
    let holds = |at: usize| row.get(at).and_then(Option::as_deref) != Some("f");
    let count = row.get(ASKED + 1).and_then(Option::as_deref).and_then(|count| count.parse().ok());
    if count != Some(conn.prepared.count()) && !holds(PREPARED) {
        // A function has taken statements of ours away.
        conn.simple_queries(&["DEALLOCATE ALL"]).await?;
        conn.prepared.clear();
    }
    let has_temporary = holds(TEMP) && has_temporary(conn).await?;
    let holds = |at: usize| if at == TEMP { has_temporary } else { holds(at) };
    let mut pinned = (0..ROLE).find(|at| *at != LISTEN && holds(*at));
    if pinned.is_none() && is_somebody_else(conn, row.get(ROLE).and_then(Option::as_deref)).await? {
        pinned = Some(ROLE);
    }
    pinned = pinned.or((!conn.params.can_be_carried()).then_some(UNKNOWN));
    let listens: Channels = listed(&row, LISTEN)?;
    let settings: Settings = listed(&row, ASKED)?;
    // Settings with a prefix of the application's own are in no list: they are asked for by name.
    let own = |name: &&str| name.contains('.');
    let names: Vec<&str> = carried.keys().chain(&residue.settings).map(|name| &**name).filter(own).collect();
    let known = settings.into_iter().filter(|(name, _)| !conn.params.has(name));
    let known: Carried = known.map(|(name, value)| (name.into(), value.into())).collect();
    if names.is_empty() {
        return Ok(Settled { carried: Arc::new(known), pinned, listens: Some(listens) });
    }
    Ok(match ask(conn, &names, known).await? {
        Some(carried) => Settled { carried, pinned, listens: Some(listens) },
        None => Settled { carried: carried.clone(), pinned: Some(UNKNOWN), listens: Some(listens) },
    })
}

/// Whether settings are among it whose names may be others than those that were read: in another encoding than UTF-8 or in
/// an unknown one.
pub fn has_doubtful_names(residue: &Residue, params: &Params) -> bool {
    let certain = params.get("client_encoding") == Some("UTF8")
        && !residue.unknown
        && !residue.settings.iter().any(|name| &**name == "client_encoding");
    residue.settings.iter().any(|name| !name.is_ascii() && (!certain || name.contains(char::REPLACEMENT_CHARACTER)))
}

/// What was asked for as the hexadecimal digits of its UTF-8.
fn decoded(digits: &str) -> Result<String, ServerError> {
    let bytes = digits.as_bytes().chunks(2).map(|two| {
        let two = std::str::from_utf8(two).ok()?;
        u8::from_str_radix(two, 16).ok()
    });
    let text = bytes.collect::<Option<Vec<u8>>>().and_then(|bytes| String::from_utf8(bytes).ok());
    text.ok_or(ServerError::Protocol("malformed answer"))
}

/// What a column of [`PROBE`] lists.
fn listed<T: serde::de::DeserializeOwned + Default>(row: &[Option<String>], at: usize) -> Result<T, ServerError> {
    let Some(digits) = row.get(at).and_then(Option::as_deref) else { return Ok(T::default()) };
    serde_json::from_str(&decoded(digits)?).map_err(|_| ServerError::Protocol("malformed answer"))
}

const HELD_LOCKS: &str = "EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory' \
      AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid())";
const HELD_LOCKS_SHIM: &str = "tenant_shim.pgusher_held_locks() OPERATOR(pg_catalog.>) 0";

/// Whether there is anything in the session's `pg_temp`, which once made stays. What is in a schema depends on it (2615 is
/// `pg_namespace`), whatever it is.
async fn has_temporary(conn: &mut ServerConnection) -> Result<bool, ServerError> {
    match conn.rows(&[TEMPORARY]).await {
        Ok(rows) => Ok(rows.first().and_then(|row| row.first()?.as_deref()) != Some("f")),
        Err(ServerError::Server(_)) => Ok(true),
        Err(error) => Err(error),
    }
}

/// A client that turns off all ways to read a table makes that so dear in the planner's eyes that it would be compiled, for a
/// second or more.
const TEMPORARY: &str = "SET LOCAL jit = off; \
    SELECT EXISTS (SELECT FROM pg_catalog.pg_depend WHERE refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema() \
      AND refclassid OPERATOR(pg_catalog.=) 2615::pg_catalog.oid)";

/// Whether the session runs as another role than the one that it logged in with.
async fn is_somebody_else(conn: &mut ServerConnection, role: Option<&str>) -> Result<bool, ServerError> {
    if !conn.is_itself() {
        return Ok(true);
    }
    // "none"
    if role == Some("6e6f6e65") {
        return Ok(false);
    }
    // `ALTER ROLE … SET role` gives the login another one to begin with.
    match conn.rows(&[DEFAULT_ROLE]).await {
        Ok(rows) => {
            let row = rows.into_iter().next().unwrap_or_default();
            Ok(row.first().and_then(Option::as_deref) != role)
        }
        Err(ServerError::Server(_)) => Ok(true),
        Err(error) => Err(error),
    }
}

/// What logins began with that are as old as this one: the server's settings that clients can make, but those that it reports.
/// `None`: it does not say.
///
/// # Errors
/// The connection must be closed.
pub async fn begun_with(conn: &mut ServerConnection) -> Result<Option<Carried>, ServerError> {
    let rows = match conn.rows(&[BEGUN_WITH]).await {
        Ok(rows) => rows,
        Err(ServerError::Server(error)) if error.severity == Severity::Error => return Ok(None),
        Err(error) => return Err(error),
    };
    let all: Settings = listed(&rows.into_iter().next().unwrap_or_default(), 0)?;
    let values = all.into_iter().filter(|(name, _)| !conn.params.has(name));
    Ok(Some(values.map(|(name, value)| (name.into(), value.into())).collect()))
}

/// Makes what a client began with its own settings, where this connection began with something else; returns those.
///
/// # Errors
/// The connection must be closed.
pub async fn keep(conn: &mut ServerConnection, before: &Carried) -> Result<Carried, ServerError> {
    let before = serde_json::to_string(before).map_err(|_| ServerError::Protocol("malformed settings"))?;
    let sql = format!(
        "SET LOCAL jit = off; SELECT pg_catalog.encode(pg_catalog.convert_to(pg_catalog.json_object_agg(key, \
             pg_catalog.set_config(key, value, false))::pg_catalog.text, 'UTF8'), 'hex') \
           FROM pg_catalog.json_each_text({}::pg_catalog.json) AS kept \
             JOIN pg_catalog.pg_settings ON pg_catalog.lower(name) OPERATOR(pg_catalog.=) key \
           WHERE reset_val OPERATOR(pg_catalog.<>) value",
        Value(&before)
    );
    let rows = match conn.rows(&[&sql]).await {
        Ok(rows) => rows,
        // One that cannot be made any more: the client has what everybody has now.
        Err(ServerError::Server(error)) if error.severity == Severity::Error => return Ok(Carried::new()),
        Err(error) => return Err(error),
    };
    let kept: Settings = listed(&rows.into_iter().next().unwrap_or_default(), 0)?;
    Ok(kept.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
}

/// Settings as a server lists them.
type Settings = BTreeMap<String, String>;

/// See [`begun_with`]. What is longer is not remembered: a tenant could fill the proxy's memory with it.
const BEGUN_WITH: &str = "SET LOCAL jit = off; SELECT \
    pg_catalog.encode(pg_catalog.convert_to(pg_catalog.json_object_agg(pg_catalog.lower(name), \
        reset_val)::pg_catalog.text, 'UTF8'), 'hex') FROM pg_catalog.pg_settings \
      WHERE context OPERATOR(pg_catalog.=) 'user' AND pg_catalog.octet_length(reset_val) OPERATOR(pg_catalog.<) 4096 \
        AND name OPERATOR(pg_catalog.<>) ALL (ARRAY['role', 'session_authorization', 'seed', 'transaction_isolation', \
          'transaction_read_only', 'transaction_deferrable'])";

/// The role that a login is given by the catalog; the most special entry counts.
const DEFAULT_ROLE: &str = "SET LOCAL jit = off; SELECT \
    pg_catalog.encode(pg_catalog.convert_to(pg_catalog.substr(entry, 6), 'UTF8'), 'hex') FROM pg_catalog.pg_db_role_setting, \
    pg_catalog.unnest(setconfig) AS entry WHERE pg_catalog.starts_with(entry, 'role=') \
      AND setrole OPERATOR(pg_catalog.=) ANY (ARRAY[0::pg_catalog.oid, \
        (SELECT oid FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) SESSION_USER)]) \
      AND setdatabase OPERATOR(pg_catalog.=) ANY (ARRAY[0::pg_catalog.oid, \
        (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())]) \
    ORDER BY setrole OPERATOR(pg_catalog.<>) 0::pg_catalog.oid DESC, \
      setdatabase OPERATOR(pg_catalog.<>) 0::pg_catalog.oid DESC LIMIT 1";

/// Whether the session holds something of the first kinds of [`PIN_REASONS`], in that order (the channels as a list, the
/// role by name), the settings made in it, and how many statements of ours it has.
/// Every name is qualified and every operator too: the tenant's own could stand before PostgreSQL's on its path. Nothing
/// here reads a table: see [`TEMPORARY`].
const PROBE: &str = "SELECT \
    pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid, \
    EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable), \
    EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql), \
    (SELECT pg_catalog.encode(pg_catalog.convert_to(pg_catalog.json_agg(channel)::pg_catalog.text, 'UTF8'), 'hex') \
       FROM pg_catalog.pg_listening_channels() AS channel), \
    EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory' \
      AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()), \
    pg_catalog.encode(pg_catalog.convert_to(pg_catalog.current_setting('role'), 'UTF8'), 'hex'), \
    (SELECT pg_catalog.encode(pg_catalog.convert_to(pg_catalog.json_object_agg(pg_catalog.lower(name), \
         pg_catalog.current_setting(name))::pg_catalog.text, 'UTF8'), 'hex') FROM pg_catalog.pg_settings \
       WHERE source OPERATOR(pg_catalog.=) 'session' AND context OPERATOR(pg_catalog.=) ANY (ARRAY['user', 'superuser']) \
         AND name OPERATOR(pg_catalog.<>) ALL (ARRAY['role', 'session_authorization', 'seed', 'transaction_isolation', \
           'transaction_read_only', 'transaction_deferrable'])), \
    (SELECT pg_catalog.count(*) FROM pg_catalog.pg_prepared_statements WHERE NOT from_sql \
       AND pg_catalog.starts_with(name, 'pgusher_') AND name OPERATOR(pg_catalog.<>) ALL (ARRAY['pgusher_check', 'pgusher_step']))";

/// These mean nothing to the next transaction.
const OF_TRANSACTIONS: [&str; 4] = ["seed", "transaction_isolation", "transaction_read_only", "transaction_deferrable"];

/// Asks for the values of settings and adds them to `known`; one that does not exist is left out. Each is set to what it
/// is: what cannot be set here cannot be set on the connection that the client gets next, and a text that names it need
/// not have been run at all. `None`: the server does not say (a `statement_timeout` of the client's, for one), or one of
/// them cannot be set.
async fn ask(
    conn: &mut ServerConnection,
    names: &[&str],
    mut known: Carried,
) -> Result<Option<Arc<Carried>>, ServerError> {
    let mut sql = String::from("SELECT ");
    for (at, name) in names.iter().enumerate() {
        let comma = if at > 0 { ", " } else { "" };
        let name = Value(name);
        let value = format!("pg_catalog.current_setting({name}, true)");
        // Writing to a String cannot fail.
        let _ = write!(
            sql,
            "{comma}pg_catalog.encode(pg_catalog.convert_to(CASE WHEN {value} IS NULL THEN NULL \
               ELSE pg_catalog.set_config({name}, {value}, false) END, 'UTF8'), 'hex')"
        );
    }
    let values = match conn.rows(&[&sql]).await {
        Ok(rows) => rows.into_iter().next().unwrap_or_default(),
        Err(ServerError::Server(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    for (name, value) in names.iter().zip(values) {
        match value {
            Some(value) => drop(known.insert((*name).into(), decoded(&value)?.into())),
            None => drop(known.remove(*name)),
        }
    }
    Ok(Some(Arc::new(known)))
}

/// A text that makes the server's settings the client's; `None` if they are.
pub fn script(conn: &ServerConnection, params: &Params, carried: &Carried) -> Option<String> {
    let mut text = String::new();
    for name in conn.applied.keys().filter(|name| !carried.contains_key(*name)) {
        let parts: Vec<String> = name.split('.').map(|part| Name(part).to_string()).collect();
        let _ = write!(text, "RESET {}; ", parts.join("."));
    }
    let mut changes = conn.params.changes_to(params);
    for (name, value) in carried.iter().filter(|(name, value)| conn.applied.get(*name) != Some(*value)) {
        changes.push(format!("pg_catalog.set_config({}, {}, false)", Value(name), Value(value)));
    }
    if !changes.is_empty() {
        // Not the values themselves: the client's encoding need not have their characters.
        let _ = write!(text, "SELECT {} IS NULL", changes.join(" IS NULL, "));
    }
    (!text.is_empty()).then_some(text)
}
