//! What a client asks for in its startup packet besides user and database: which settings go on to the server, which
//! are ours, which are refused. No I/O.
//!
//! A client's settings travel in the startup packet of its server connections, so that `RESET` means what the client
//! expects; names are made lower-case and sorted, so that clients that ask for the same share a pool.
//!
//! Nearly every setting is let through: the server logs in as the tenant's role and refuses what that role may not set.
//! Refused here is what PostgreSQL would allow a client *in its own startup packet*, and a tenant must not:
//!
//! - to be somebody else: `role`, `session_authorization`, `replication`, and names that would turn into one of the
//!   protocol's own (`user`, `database`, `options`, `replication`, `_pq_.…`) once they are made lower-case;
//! - to load code into the server: `*_preload_libraries`;
//! - to hold up a login (`post_auth_delay`) or make every catalog lookup a scan of all tenants' entries
//!   (`ignore_system_indexes`), which no `SET` can do later;
//! - a `search_path` that leads elsewhere.
//!
//! Encodings in which a character's second byte may look like a backslash or a quote (SJIS, BIG5, GBK, UHC, JOHAB,
//! GB18030) are let through: reading a tenant's text wrongly could mislead the guard, never the wall, and no SQL of
//! ours is made of client text. What a tenant hides in it, it hides from itself.

use std::collections::BTreeMap;

use crate::error::{PgError, sqlstate};
use crate::tenant::plan::Replication;
use crate::wire::startup::{StartupMessage, excerpt, parse_options};

/// Longest name of a setting, and longest value. Names of built-in ones have up to 63.
const MAX_NAME: usize = 128;
const MAX_VALUE: usize = 1_024;
/// Most bytes of all settings: they share a startup packet of 10,000 bytes with what pgusher puts there.
const MAX_SETTINGS: usize = 8_192;

/// A startup packet's parameters, sorted out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientParameters {
    /// `application_name`, cleaned as PostgreSQL does it; not part of the settings.
    pub application_name: Option<String>,
    /// `pgusher.tenant`
    pub tenant: Option<String>,
    /// Settings for the server connection: lower-case names in order, each once; `search_path` not yet checked.
    settings: Vec<(String, String)>,
    /// A replication connection is asked for.
    replication: Option<&'static str>,
    /// The first thing that is refused.
    refusal: Option<Refusal>,
}

/// Why a client may not have what it asks for. It says nothing about anybody else, but is best told after
/// authentication, like everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What to tell the client.
    pub error: PgError,
    /// Whether it is an attempt to reach beyond the tenant's own seat.
    pub violation: bool,
}

impl ClientParameters {
    /// Sorts out a startup packet. Settings in `options` come first and settings of their own win over them, as in
    /// PostgreSQL.
    pub fn read(startup: &StartupMessage) -> Self {
        let mut sorter = Sorter::default();
        let refusal = sorter.packet(startup).err();
        Self {
            application_name: sorter.application_name,
            tenant: sorter.tenant,
            settings: sorter.settings.into_iter().collect(),
            replication: sorter.replication,
            refusal,
        }
    }

    /// The settings to put behind the plan's own in the server connection's startup packet, for the tenant that lives
    /// in `schema`; `None` is one that has its server to itself, and any `search_path`. `replication` is what it may have of
    /// that.
    ///
    /// A `search_path` that names the tenant's schema, under its name or as `"$user"`, is what the plan sends anyway
    /// and is left out. The empty one is kept: it is a tool's way to have every name qualified.
    ///
    /// # Errors
    /// The first thing that the client may not have.
    pub fn settings_for<'a>(
        &self,
        schema: impl Into<Option<&'a str>>,
        replication: Replication,
    ) -> Result<Vec<(String, String)>, Refusal> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.clone());
        }
        let mut settings = self.settings.clone();
        let schema = schema.into();
        if let Some(value) = self.replication {
            match replication {
                Replication::Everything => {}
                Replication::OwnDatabase if value == LOGICAL => {}
                Replication::OwnDatabase => return Err(refused(no_physical_replication())),
                Replication::Nothing => return Err(refused(no_replication())),
            }
            let at = settings.partition_point(|(name, _)| name.as_str() < REPLICATION);
            settings.insert(at, (REPLICATION.to_owned(), value.to_owned()));
        }
        if let Some(schema) = schema
            && let Some(at) = settings.iter().position(|(name, _)| name == "search_path")
            && !check_search_path(&settings[at].1, schema)?.is_empty()
        {
            settings.remove(at);
        }
        Ok(settings)
    }
}

#[derive(Default)]
struct Sorter {
    application_name: Option<String>,
    tenant: Option<String>,
    settings: BTreeMap<String, String>,
    replication: Option<&'static str>,
}

impl Sorter {
    fn packet(&mut self, startup: &StartupMessage) -> Result<(), Refusal> {
        // Ours are read to the end even if something is refused: they are needed to tell who is refused.
        let mut first = Ok(());
        let options = startup.get("options").map_or(Ok(Vec::new()), parse_options).unwrap_or_else(|error| {
            first = Err(refused(error));
            Vec::new()
        });
        for (name, value) in &options {
            let result = self.setting(name, value);
            first = first.and(result);
        }
        for (name, value) in &startup.parameters {
            let result = match name.as_str() {
                "user" | "database" | "options" => Ok(()),
                "replication" => check_replication(value).map(|wanted| self.replication = wanted),
                name => self.setting(name, value),
            };
            first = first.and(result);
        }
        let size: usize = self.settings.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        if size > MAX_SETTINGS {
            first = first.and(Err(refused(
                PgError::fatal(sqlstate::PROGRAM_LIMIT_EXCEEDED, "too many startup parameters")
                    .detail(format!("They have {size} bytes, at most {MAX_SETTINGS} are possible.")),
            )));
        }
        first
    }

    fn setting(&mut self, name: &str, value: &str) -> Result<(), Refusal> {
        check_name(name)?;
        let name = name.to_ascii_lowercase();
        if value.len() > MAX_VALUE {
            return Err(refused(
                PgError::fatal(sqlstate::PROGRAM_LIMIT_EXCEEDED, format!("value of parameter \"{name}\" is too long"))
                    .detail(format!("It has {} bytes, at most {MAX_VALUE} are possible.", value.len())),
            ));
        }
        match name.as_str() {
            "application_name" => self.application_name = Some(clean_label(value)),
            "pgusher.tenant" => return self.name_tenant(value),
            "client_encoding" => {
                self.settings.insert(name, canonical_encoding(value));
            }
            "role" | "session_authorization" => {
                return Err(Refusal {
                    error: forbidden(&name, "A connection belongs to one tenant."),
                    violation: true,
                });
            }
            "is_superuser" => return Err(refused(forbidden(&name, "It cannot be changed."))),
            "local_preload_libraries" | "session_preload_libraries" | "shared_preload_libraries" => {
                return Err(refused(forbidden(&name, "Tenants share the server and load no code into it.")));
            }
            "post_auth_delay" | "ignore_system_indexes" => {
                return Err(refused(forbidden(&name, "It is for a server's developers.")));
            }
            // In lower case they would be the protocol's own, and say who logs in and where.
            "user" | "database" | "options" | "replication" => return Err(refused(unknown(&name))),
            other if other.starts_with("pgusher.") || other.starts_with("_pq_.") => {
                return Err(refused(unknown(other)));
            }
            _ => {
                self.settings.insert(name, value.to_owned());
            }
        }
        Ok(())
    }

    /// Named twice is fine, two names are not: which one would be meant?
    fn name_tenant(&mut self, value: &str) -> Result<(), Refusal> {
        match &self.tenant {
            Some(before) if before != value => Err(Refusal {
                error: PgError::fatal(sqlstate::INVALID_AUTHORIZATION, "connection names two tenants")
                    .detail("Parameter \"pgusher.tenant\" is given twice, with different values."),
                violation: false,
            }),
            _ => {
                self.tenant = Some(value.to_owned());
                Ok(())
            }
        }
    }
}

fn check_name(name: &str) -> Result<(), Refusal> {
    let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let goes_on = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'$'));
    if begins && goes_on && name.len() <= MAX_NAME { Ok(()) } else { Err(refused(unknown(name))) }
}

/// The name of the startup parameter, which the server connection of such a client has, too.
/// <https://www.postgresql.org/docs/current/protocol-replication.html>
pub const REPLICATION: &str = "replication";

/// Its value for logical replication, of one database.
const LOGICAL: &str = "database";

/// What kind of replication connection is asked for; `replication=false` asks for none.
fn check_replication(value: &str) -> Result<Option<&'static str>, Refusal> {
    let is = |words: &[&str]| words.contains(&value.to_ascii_lowercase().as_str());
    if is(&["false", "f", "off", "no", "n", "0"]) {
        Ok(None)
    } else if is(&["true", "t", "on", "yes", "y", "1"]) {
        Ok(Some("true"))
    } else if is(&[LOGICAL]) {
        Ok(Some(LOGICAL))
    } else {
        Err(refused(
            PgError::fatal(
                sqlstate::INVALID_PARAMETER_VALUE,
                format!("invalid value for parameter \"replication\": \"{}\"", excerpt(value)),
            )
            .hint("Valid values are: \"false\", 0, \"true\", 1, \"database\"."),
        ))
    }
}

fn no_replication() -> PgError {
    PgError::fatal(sqlstate::FEATURE_NOT_SUPPORTED, "replication connections are not supported for this tenant")
        .detail("A replication stream carries the changes of every tenant of a server, and REPLICATION is a privilege on all of it.")
        .hint("Tenants of the plans \"database\" and \"cluster\" may replicate, if whoever runs this service lets them.")
}

fn no_physical_replication() -> PgError {
    PgError::fatal(sqlstate::FEATURE_NOT_SUPPORTED, "physical replication connections are not supported for this tenant")
        .detail("A physical stream carries the changes of every tenant of a server.")
        .hint("Connect with replication=database, which is for the tenant's own database. Tenants of the plan \"cluster\", who have a server of their own, may replicate all of it.")
}

/// PostgreSQL keeps printable ASCII and 63 bytes.
fn clean_label(value: &str) -> String {
    value.bytes().take(63).map(|b| if matches!(b, 0x20..=0x7e) { b as char } else { '?' }).collect()
}

/// PostgreSQL looks at letters and digits only, so `'utf-8'`, quotes included, is an encoding (asyncpg sends that).
fn canonical_encoding(value: &str) -> String {
    let name: String = value.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_uppercase()).collect();
    match name.as_str() {
        "UTF8" | "UNICODE" => "UTF8".to_owned(),
        // Left as it was, for the server to say that there is no such encoding.
        "" => value.to_owned(),
        _ => name,
    }
}

/// Schemas that may stand beside the tenant's own: they are on the path anyway, hold nothing of anybody, or, like
/// `public`, are closed.
const COMMON_SCHEMAS: [&str; 6] =
    ["pg_catalog", "pg_temp", "public", "information_schema", "extensions", "tenant_shim"];

/// The schemas of a path that is fit for the tenant in `schema`.
fn check_search_path(path: &str, schema: &str) -> Result<Vec<String>, Refusal> {
    let Some(names) = split_identifiers(path) else {
        return Err(refused(PgError::fatal(
            sqlstate::INVALID_PARAMETER_VALUE,
            format!("invalid value for parameter \"search_path\": \"{}\"", excerpt(path)),
        )));
    };
    let own = |name: &String| name == schema || name == "$user";
    let foreign = names.iter().find(|name| !own(name) && !COMMON_SCHEMAS.contains(&name.as_str()));
    if foreign.is_none() && (names.is_empty() || names.iter().any(own)) {
        return Ok(names);
    }
    let error = forbidden("search_path", "It does not name the tenant's own schema, or others besides.").hint(format!(
        "Leave it out: a connection finds the objects of its tenant without. \"{schema}\" is accepted, too."
    ));
    Err(Refusal { error, violation: foreign.is_some() })
}

/// PostgreSQL's `SplitIdentifierString`: names separated by commas, in quotes or made lower-case. `None` if it is not
/// such a list.
fn split_identifiers(text: &str) -> Option<Vec<String>> {
    let space = |c: char| c.is_ascii_whitespace() || c == '\x0b';
    let mut rest = text.trim_matches(space);
    let mut names = Vec::new();
    if rest.is_empty() {
        return Some(names);
    }
    loop {
        let (name, behind) = match rest.strip_prefix('"') {
            Some(quoted) => take_quoted(quoted)?,
            None => {
                let end = rest.find(|c| c == ',' || space(c)).unwrap_or(rest.len());
                (rest[..end].to_ascii_lowercase(), &rest[end..])
            }
        };
        if name.is_empty() {
            return None;
        }
        names.push(name);
        match behind.trim_start_matches(space) {
            "" => return Some(names),
            more => rest = more.strip_prefix(',')?.trim_start_matches(space),
        }
    }
}

/// What stands before the closing quote, and what behind it; a quote inside is doubled.
fn take_quoted(text: &str) -> Option<(String, &str)> {
    let mut name = String::new();
    let mut rest = text;
    loop {
        let (part, behind) = rest.split_once('"')?;
        name += part;
        match behind.strip_prefix('"') {
            Some(more) => {
                name.push('"');
                rest = more;
            }
            None => return Some((name, behind)),
        }
    }
}

fn refused(error: PgError) -> Refusal {
    Refusal { error, violation: false }
}

fn forbidden(name: &str, why: &str) -> PgError {
    PgError::fatal(sqlstate::INSUFFICIENT_PRIVILEGE, format!("permission denied to set parameter \"{name}\""))
        .detail(why)
}

fn unknown(name: &str) -> PgError {
    PgError::fatal(sqlstate::UNDEFINED_OBJECT, format!("unrecognized configuration parameter \"{}\"", excerpt(name)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Version;
    use proptest::prelude::*;

    fn read(parameters: &[(&str, &str)]) -> ClientParameters {
        let own = |&(n, v): &(&str, &str)| (n.to_owned(), v.to_owned());
        let parameters = [("user", "app"), ("database", "d")].iter().chain(parameters).map(own).collect();
        ClientParameters::read(&StartupMessage { requested: Version::V3_0, parameters, protocol_options: vec![] })
    }

    /// `name=value …`, or the SQLSTATE, with `!!` for a violation.
    fn told(parameters: &[(&str, &str)]) -> String {
        told_with(parameters, Replication::Nothing)
    }

    fn told_with(parameters: &[(&str, &str)], replication: Replication) -> String {
        match read(parameters).settings_for("client_001", replication) {
            Ok(settings) => settings.iter().map(|(n, v)| format!("{n}={v} ")).collect::<String>().trim_end().to_owned(),
            Err(refusal) => format!("{}{}", if refusal.violation { "!!" } else { "" }, refusal.error.code),
        }
    }

    #[test]
    fn what_real_clients_send_goes_through() {
        for (parameters, expected) in [
            (&[][..], ""),
            (&[("client_encoding", "'utf-8'")], "client_encoding=UTF8"),
            (&[("client_encoding", "UTF8")], "client_encoding=UTF8"),
            (&[("client_encoding", "sql_ascii")], "client_encoding=SQLASCII"),
            (&[("client_encoding", "sjis")], "client_encoding=SJIS"),
            (
                &[("DateStyle", "ISO"), ("TimeZone", "Europe/Berlin"), ("extra_float_digits", "2")],
                "datestyle=ISO extra_float_digits=2 timezone=Europe/Berlin",
            ),
            (&[("datestyle", "ISO, MDY")], "datestyle=ISO, MDY"),
            (&[("statement_timeout", "5000"), ("lock_timeout", "1s")], "lock_timeout=1s statement_timeout=5000"),
            (&[("some.var", "x"), ("replication", "false")], "some.var=x"),
            (&[("options", "-c jit=off --work-mem=8MB"), ("JIT", "on")], "jit=on work_mem=8MB"),
            (&[("options", "-c DateStyle=ISO,\\ MDY")], "datestyle=ISO, MDY"),
            (&[("search_path", "client_001")], ""),
            (&[("search_path", "")], "search_path="),
            (&[("application_name", "psql")], ""),
        ] {
            assert_eq!(told(parameters), expected, "{parameters:?}");
        }
    }

    #[test]
    fn ours_are_taken_out() {
        let read_name = |name| read(&[("application_name", name)]).application_name.unwrap();
        assert_eq!(read_name("caf\u{e9}\n"), "caf???");
        assert_eq!(read_name(&"a".repeat(99)), "a".repeat(63));
        for parameters in [
            &[("options", "-c pgusher.tenant=t")][..],
            &[("options", "--PGUSHER.Tenant=t")],
            &[("pgusher.tenant", "t"), ("options", "-c pgusher.tenant=t")],
        ] {
            let read = read(parameters);
            assert_eq!((read.tenant.as_deref(), read.settings_for("t", Replication::Nothing)), (Some("t"), Ok(vec![])));
        }
        // Even beside something refused: it says who is refused.
        assert_eq!(read(&[("role", "x"), ("pgusher.tenant", "t")]).tenant.as_deref(), Some("t"));
    }

    #[test]
    fn what_a_tenant_must_not_ask_for_is_refused() {
        let long = "x".repeat(1_025);
        let many = "y".repeat(1_000);
        let names = ["a.a", "a.b", "a.c", "a.d", "a.e", "a.f", "a.g", "a.h", "a.i"];
        let too_many: Vec<(&str, &str)> = names.iter().map(|name| (*name, many.as_str())).collect();
        for (parameters, expected) in [
            (&[("role", "client_002")][..], "!!42501"),
            (&[("ROLE", "client_002")], "!!42501"),
            (&[("options", "-c role=client_002")], "!!42501"),
            (&[("options", "-c Session-Authorization=x")], "!!42501"),
            (&[("session_authorization", "x")], "!!42501"),
            (&[("is_superuser", "on")], "42501"),
            (&[("local_preload_libraries", "x")], "42501"),
            (&[("Session_Preload_Libraries", "x")], "42501"),
            (&[("post_auth_delay", "2147")], "42501"),
            (&[("options", "--ignore-system-indexes=on")], "42501"),
            (&[("replication", "true")], "0A000"),
            (&[("replication", "database")], "0A000"),
            (&[("replication", "maybe")], "22023"),
            (&[("USER", "postgres")], "42704"),
            (&[("Database", "postgres")], "42704"),
            (&[("Options", "-c role=x")], "42704"),
            (&[("REPLICATION", "true")], "42704"),
            (&[("options", "-c replication=true")], "42704"),
            (&[("options", "-c user=postgres")], "42704"),
            (&[("_PQ_.x", "1")], "42704"),
            (&[("pgusher.other", "1")], "42704"),
            (&[("a b", "1")], "42704"),
            (&[("1a", "1")], "42704"),
            (&[("ä", "1")], "42704"),
            (&[("a\"", "1")], "42704"),
            (&[("work_mem", &long)], "54000"),
            (&[(&long, "1")], "42704"),
            (&too_many, "54000"),
            (&[("options", "-d 5")], "42601"),
            (&[("options", "-c pgusher.tenant=a -c pgusher.tenant=b")], "28000"),
        ] {
            assert_eq!(told(parameters), expected, "{parameters:?}");
        }
    }

    #[test]
    fn who_shares_a_server_replicates_its_own_database_at_most() {
        use Replication::{Everything, Nothing, OwnDatabase};
        for (value, replication, expected) in [
            ("database", Nothing, "0A000"),
            ("true", Nothing, "0A000"),
            ("off", Nothing, ""),
            ("database", OwnDatabase, "replication=database"),
            ("DataBase", OwnDatabase, "replication=database"),
            ("true", OwnDatabase, "0A000"),
            ("1", OwnDatabase, "0A000"),
            ("no", OwnDatabase, ""),
            ("database", Everything, "replication=database"),
            ("yes", Everything, "replication=true"),
        ] {
            assert_eq!(told_with(&[("replication", value)], replication), expected, "{value} {replication:?}");
        }
    }

    #[test]
    fn a_search_path_stays_at_home() {
        for (path, expected) in [
            ("client_001", ""),
            ("CLIENT_001", ""),
            ("\"client_001\"", ""),
            (" client_001 , pg_catalog ", ""),
            ("\"$user\", public", ""),
            ("$user,public", ""),
            ("client_001,tenant_shim,pg_catalog", ""),
            (" ", "search_path= "),
            ("public", "42501"),
            ("pg_catalog", "42501"),
            ("client_002", "!!42501"),
            ("client_001,client_002", "!!42501"),
            ("\"CLIENT_001\"", "!!42501"),
            ("client_001, \"client\"\"002\"", "!!42501"),
            ("client_001,", "22023"),
            (",client_001", "22023"),
            ("client_001 client_002", "22023"),
            ("\"client_001", "22023"),
            ("\"\"", "22023"),
            ("\"client_001\"x", "22023"),
        ] {
            let expected = expected.trim_end();
            assert_eq!(told(&[("search_path", path)]), expected, "{path:?}");
            let escaped = path.replace(' ', "\\ ");
            assert_eq!(told(&[("options", &format!("-c search_path={escaped}"))]), expected, "{path:?}");
        }
    }

    proptest! {
        #[test]
        fn settings_never_carry_the_protocols_own_names(
            name in "([uU]ser|DATABASE|options|_?pq_.x|replication|role|[a-z.]{0,6}|.{0,5})", value in ".{0,20}",
            inside in any::<bool>(),
        ) {
            let option = format!("-c {}={}", name.replace(' ', ""), value.replace([' ', '\\'], ""));
            let parameters = if inside { [("options", option.as_str())] } else { [(name.as_str(), value.as_str())] };
            if let Ok(settings) = read(&parameters).settings_for("client_001", Replication::Nothing) {
                for (name, _) in settings {
                    prop_assert!(!["user", "database", "options", "replication", "role"].contains(&name.as_str()));
                    prop_assert!(!name.starts_with("_pq_.") && name == name.to_ascii_lowercase());
                }
            }
        }

        #[test]
        fn quoted_identifiers_are_read_back(names in prop::collection::vec("[^\0]{1,8}", 1..4)) {
            let quoted: Vec<String> = names.iter().map(|n| crate::tenant::sql::Ident(n).to_string()).collect();
            prop_assert_eq!(split_identifiers(&quoted.join(" , ")), Some(names));
        }

        #[test]
        fn no_path_panics(path in ".{0,30}") {
            let _ = split_identifiers(&path);
        }
    }
}
