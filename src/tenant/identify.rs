//! Who a client is and which tenant it means, from what it said before authentication. No I/O.
//!
//! Nothing found here may show before authentication: [`identify`] therefore always answers *whose proof to ask for*
//! ([`Identity::login`]; a name that cannot exist included), and keeps *what is wrong* ([`Identity::tenant`]) for
//! after it. There is no default tenant.
//!
//! # What names a tenant
//!
//! | source | names a tenant | how firmly |
//! |---|---|---|
//! | user name | `client_001`, `app.client_001`, `app@client_001`, or the regular expression's group `tenant` | firm |
//! | options | `-c pgusher.tenant=client_001` | firm |
//! | SNI | `client_001.<suffix>`, one label | firm |
//! | `application_name` | `tenant=client_001` | firm |
//! | database | a name that is a tenant's, and not what a client sends unasked | loose |
//! | `application_name` | `client_001/worker` | loose |
//!
//! Firm names must agree. A loose one is text that may mean something else: an unchanged app's database is called
//! `bookings`, Ruby's driver calls itself `bin/rails`. So it counts only for a tenant that the login is entitled to,
//! and one that does not exist yet only when nothing else names a tenant. Two names of existing tenants that differ
//! are an error, loose or firm.
//!
//! # Which database names are good
//!
//! A client whose tenant is known may call its database by the tenant's id, by its own user name (libpq's default),
//! or by one of [`Rules::databases`]; everything else does not exist (3D000), as on a server. `postgres` is for
//! application users, who have it in DSNs that were there before: a tenant's own login has no business there.

use regex::Regex;

use super::{InvalidTenantId, TenantId};
use crate::error::{PgError, sqlstate};

/// A place where a client may name its tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The user name: `client_001`, `app.client_001`, `app@client_001`, or `username_regex`.
    Username,
    /// `-c pgusher.tenant=client_001` in `options`.
    Options,
    /// The TLS server name.
    Sni,
    /// The database name.
    Database,
    /// `application_name`: `tenant=client_001` or `client_001/worker`.
    ApplicationName,
}

impl Source {
    /// What errors call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Username => "user name",
            Self::Options => "pgusher.tenant",
            Self::Sni => "TLS server name",
            Self::Database => "database name",
            Self::ApplicationName => "application_name",
        }
    }
}

/// What a client said about itself before authentication.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hello<'a> {
    /// `user`
    pub user: &'a str,
    /// `database`, if it was given.
    pub database: Option<&'a str>,
    /// `application_name`
    pub application_name: Option<&'a str>,
    /// `pgusher.tenant`, from `options` or as a parameter of its own.
    pub tenant_option: Option<&'a str>,
    /// The TLS server name.
    pub sni: Option<&'a str>,
}

/// How tenants are named, from `[identify]`.
#[derive(Debug, Clone)]
pub struct Rules {
    order: Vec<Source>,
    username_regex: Option<Regex>,
    sni_suffix: Option<String>,
    databases: Vec<String>,
}

/// A `username_regex` that cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum InvalidRegex {
    /// It is no regular expression.
    #[error("{0}")]
    Syntax(String),
    /// It says nothing about the tenant.
    #[error("it has no group called \"tenant\": write (?<tenant>…)")]
    NoTenantGroup,
}

impl Rules {
    /// Rules from configuration. `username_regex` has to match the whole user name; it has a group `tenant` and may
    /// have a group `user`. User names that it does not match are read in the usual forms.
    ///
    /// # Errors
    /// [`InvalidRegex`]
    pub fn new(
        order: Vec<Source>,
        username_regex: Option<&str>,
        sni_suffix: Option<&str>,
    ) -> Result<Self, InvalidRegex> {
        let compile = |text: &str| -> Result<Regex, InvalidRegex> {
            // First as it stands, so that an error points into the operator's text and not into ours.
            Regex::new(text).map_err(|e| InvalidRegex::Syntax(e.to_string()))?;
            let regex = Regex::new(&format!("^(?:{text})$")).map_err(|e| InvalidRegex::Syntax(e.to_string()))?;
            let named = regex.capture_names().flatten().any(|name| name == "tenant");
            if named { Ok(regex) } else { Err(InvalidRegex::NoTenantGroup) }
        };
        let suffix = |text: &str| format!(".{}", text.trim_matches('.').to_ascii_lowercase());
        Ok(Self {
            order,
            username_regex: username_regex.map(compile).transpose()?,
            sni_suffix: sni_suffix.map(suffix).filter(|suffix| suffix.len() > 1),
            databases: vec![MAINTENANCE.to_owned()],
        })
    }

    /// Database names besides its own that every client may give and that name no tenant: the shards' databases, say,
    /// since that is what `current_database()` answers. `postgres`, where tools go unasked, is always one, except for
    /// tenants' own logins.
    #[must_use]
    pub fn databases(mut self, names: impl IntoIterator<Item = String>) -> Self {
        self.databases.extend(names);
        self
    }
}

/// What identification has to know about the world; the directory knows it.
pub trait Known {
    /// Whether there is an application user of this name.
    fn is_app_user(&self, name: &str) -> bool;
    /// Whether this application user may use this tenant, existing or not.
    fn may_use(&self, app_user: &str, tenant: &TenantId) -> bool;
    /// Whether there is such a tenant.
    fn exists(&self, tenant: &TenantId) -> bool;
    /// Whether this tenant's clients may name any database, since nobody else's are where it is.
    fn chooses_database(&self, _tenant: &TenantId) -> bool {
        false
    }
}

/// The database that every server has, and that holds no tenant.
const MAINTENANCE: &str = "postgres";

/// Whose proof to ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Login {
    /// The tenant's own credential. The tenant need not exist.
    Tenant(TenantId),
    /// An application user's. The user need not exist.
    AppUser(String),
    /// A name that no login can have.
    Nobody,
}

/// Who a client is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Whose proof to ask for.
    pub login: Login,
    /// The tenant it means, or what to tell the client *after* authentication. It need not exist yet.
    pub tenant: Result<TenantId, Unidentified>,
}

/// Why a client has no tenant. To be told to authenticated clients only.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unidentified {
    /// Nothing named one.
    #[error("no tenant is named")]
    Unnamed,
    /// Two sources name different ones.
    #[error("{} names tenant \"{}\", {} names tenant \"{}\"", first.0.as_str(), first.1, other.0.as_str(), other.1)]
    Conflict {
        /// The one that comes first in the configured order.
        first: (Source, TenantId),
        /// The one that disagrees.
        other: (Source, TenantId),
        /// Whether the login has no right to one of them.
        foreign: bool,
    },
    /// A source that can only mean a tenant does not hold an id.
    #[error("{} does not name a tenant: {why}", source_name.as_str())]
    Invalid {
        /// The source.
        source_name: Source,
        /// What is wrong with it.
        why: InvalidTenantId,
    },
    /// The login is not entitled to the tenant that it names.
    #[error("permission denied for tenant \"{0}\"")]
    NotEntitled(TenantId),
    /// The database name is neither the tenant's nor one that everybody may use.
    #[error("database \"{name}\" does not exist")]
    UnknownDatabase {
        /// The name, cut if it is very long.
        name: String,
        /// Whether it is the name of another tenant.
        foreign: bool,
    },
}

impl Unidentified {
    /// Whether this is an attempt to reach a tenant that the login has no right to.
    pub fn is_violation(&self) -> bool {
        match self {
            Self::NotEntitled(_) => true,
            Self::UnknownDatabase { foreign, .. } | Self::Conflict { foreign, .. } => *foreign,
            Self::Unnamed | Self::Invalid { .. } => false,
        }
    }
}

impl From<&Unidentified> for PgError {
    fn from(error: &Unidentified) -> Self {
        let message = error.to_string();
        match error {
            Unidentified::Unnamed => Self::fatal(sqlstate::INVALID_AUTHORIZATION, message).hint(
                "Name the tenant in the user name (app.client_001), the database name, application_name \
                 (tenant=client_001) or options (-c pgusher.tenant=client_001).",
            ),
            Unidentified::Conflict { first, other, .. } => {
                Self::fatal(sqlstate::INVALID_AUTHORIZATION, "connection names two tenants")
                    .detail(format!("{}.", capitalised(&message)))
                    .hint(format!(
                        "Let {} and {} name the same tenant, or one of them none.",
                        first.0.as_str(),
                        other.0.as_str()
                    ))
            }
            Unidentified::Invalid { .. } => Self::fatal(sqlstate::INVALID_PARAMETER_VALUE, message),
            Unidentified::NotEntitled(_) => {
                Self::fatal(sqlstate::INSUFFICIENT_PRIVILEGE, message).detail("User is not entitled to this tenant.")
            }
            Unidentified::UnknownDatabase { .. } => Self::fatal(sqlstate::UNKNOWN_DATABASE, message)
                .hint("Use the tenant's name as database name, or leave it out."),
        }
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|c| c.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// Decides who a client is and which tenant it means.
pub fn identify(rules: &Rules, hello: &Hello<'_>, known: &impl Known) -> Identity {
    let (login, from_user) = read_username(rules, hello.user, known);
    let tenant = find_tenant(rules, hello, known, &login, from_user);
    Identity { login, tenant }
}

/// A user name's two meanings: who logs in, and the tenant it names. Without `username` among the sources it has only
/// the first, and tenants have no logins of their own.
fn read_username(rules: &Rules, user: &str, known: &impl Known) -> (Login, Option<TenantId>) {
    let counts = rules.order.contains(&Source::Username);
    // An application user's exact name is never anything else, or an unlucky one could not log in.
    if !counts || known.is_app_user(user) {
        return (Login::AppUser(user.to_owned()), None);
    }
    let captured = rules.username_regex.as_ref().and_then(|regex| regex.captures(user));
    let (app_user, tenant) = if let Some(groups) = &captured {
        (groups.name("user").map(|m| m.as_str()), groups.name("tenant").map_or("", |m| m.as_str()))
    } else {
        // Ids contain neither separator, so the last one it is.
        match user.rsplit_once(['.', '@']) {
            Some((app_user, tenant)) => (Some(app_user), tenant),
            None => (None, user),
        }
    };
    match (app_user, TenantId::parse(tenant)) {
        (None, Ok(tenant)) => (Login::Tenant(tenant.clone()), Some(tenant)),
        (Some(app_user), Ok(tenant)) if !app_user.is_empty() => (Login::AppUser(app_user.to_owned()), Some(tenant)),
        _ => (Login::Nobody, None),
    }
}

/// A tenant named by one source.
struct Named {
    source: Source,
    tenant: TenantId,
    firm: bool,
}

fn find_tenant(
    rules: &Rules,
    hello: &Hello<'_>,
    known: &impl Known,
    login: &Login,
    from_user: Option<TenantId>,
) -> Result<TenantId, Unidentified> {
    let entitled = |tenant: &TenantId| match login {
        Login::Tenant(own) => own == tenant,
        Login::AppUser(name) => known.may_use(name, tenant),
        Login::Nobody => false,
    };
    let mut named = Vec::new();
    for &source in &rules.order {
        let found = match source {
            Source::Username => from_user.clone().map(|tenant| (tenant, true)),
            Source::Options => hello.tenant_option.map(|text| firm(source, text)).transpose()?,
            Source::Sni => from_sni(rules, hello.sni).map(|tenant| (tenant, true)),
            Source::Database => from_database(rules, hello).map(|tenant| (tenant, false)),
            Source::ApplicationName => hello.application_name.map_or(Ok(None), |name| from_label(name, known))?,
        };
        named.extend(found.map(|(tenant, firm)| Named { source, tenant, firm }));
    }
    named.retain(|n| n.firm || entitled(&n.tenant));
    // A loose name of nothing that exists is a name only if there is no other.
    let existing = named.iter().any(|n| n.firm || known.exists(&n.tenant));
    named.retain(|n| n.firm || !existing || known.exists(&n.tenant));
    let Some(first) = named.first() else { return Err(nothing_named(rules, hello, known)) };
    if let Some(other) = named.iter().find(|n| n.tenant != first.tenant && (n.firm || existing)) {
        return Err(Unidentified::Conflict {
            first: (first.source, first.tenant.clone()),
            other: (other.source, other.tenant.clone()),
            foreign: !entitled(&first.tenant) || !entitled(&other.tenant),
        });
    }
    let tenant = first.tenant.clone();
    if !entitled(&tenant) {
        return Err(Unidentified::NotEntitled(tenant));
    }
    check_database(rules, hello, known, login, &tenant)?;
    Ok(tenant)
}

fn firm(source: Source, text: &str) -> Result<(TenantId, bool), Unidentified> {
    TenantId::parse(text).map(|tenant| (tenant, true)).map_err(|why| Unidentified::Invalid { source_name: source, why })
}

/// DNS ignores case and so do we; deeper names and the suffix itself name nobody.
fn from_sni(rules: &Rules, sni: Option<&str>) -> Option<TenantId> {
    let name = sni?.trim_end_matches('.').to_ascii_lowercase();
    TenantId::parse(name.strip_suffix(rules.sni_suffix.as_deref()?)?).ok()
}

/// libpq sends the user name when it is given no database; that is no choice of a tenant.
fn from_database(rules: &Rules, hello: &Hello<'_>) -> Option<TenantId> {
    let name = hello.database.filter(|&name| !is_unasked(rules, hello, name))?;
    TenantId::parse(name).ok()
}

/// Whether clients send this database name without having chosen it.
fn is_unasked(rules: &Rules, hello: &Hello<'_>, name: &str) -> bool {
    name == hello.user || rules.databases.iter().any(|d| d == name)
}

/// `tenant=client_001` is meant for us, whatever stands behind it; `client_001/worker` may be.
fn from_label(label: &str, known: &impl Known) -> Result<Option<(TenantId, bool)>, Unidentified> {
    if let Some(text) = label.strip_prefix("tenant=") {
        let end = text.find([' ', ',', ';', '/']).unwrap_or(text.len());
        return firm(Source::ApplicationName, &text[..end]).map(Some);
    }
    let Some((head, _)) = label.split_once('/') else { return Ok(None) };
    let tenant = TenantId::parse(head).ok();
    Ok(tenant.filter(|t| !PROGRAM_PATHS.contains(&head) || known.exists(t)).map(|t| (t, false)))
}

/// Ruby's driver calls itself by the path its program was started with: `bin/rails`.
const PROGRAM_PATHS: [&str; 4] = ["bin", "exe", "sbin", "script"];

/// A database name is often the only thing a client chose, so the answer is about it.
fn nothing_named(rules: &Rules, hello: &Hello<'_>, known: &impl Known) -> Unidentified {
    match hello.database {
        Some(name) if rules.order.contains(&Source::Database) && !is_unasked(rules, hello, name) => {
            unknown_database(name, known)
        }
        _ => Unidentified::Unnamed,
    }
}

fn check_database(
    rules: &Rules,
    hello: &Hello<'_>,
    known: &impl Known,
    login: &Login,
    tenant: &TenantId,
) -> Result<(), Unidentified> {
    let Some(name) = hello.database else { return Ok(()) };
    if known.chooses_database(tenant) {
        return Ok(());
    }
    // A tenant that logs in as itself and asks for the server's own database has left its seat.
    let own_login = matches!(login, Login::Tenant(_));
    let good = name == tenant.as_str() || (is_unasked(rules, hello, name) && !(own_login && name == MAINTENANCE));
    // An application user's own name: a DSN made by inserting the tenant into the user name of one without.
    let inserted = hello.user.strip_prefix(name).is_some_and(|rest| rest.starts_with(['.', '@']));
    if good || inserted { Ok(()) } else { Err(unknown_database(name, known)) }
}

fn unknown_database(name: &str, known: &impl Known) -> Unidentified {
    let foreign = TenantId::parse(name).is_ok_and(|tenant| known.exists(&tenant));
    Unidentified::UnknownDatabase { name: crate::wire::startup::excerpt(name), foreign }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Source::{ApplicationName, Database, Options, Sni, Username};
    use proptest::prelude::*;

    /// Application users `app` (entitled to `client_*`), `all` (to everything) and `we.ird`; tenants `client_001`,
    /// `client_002`, `other`, `bin_`.
    struct World;

    impl Known for World {
        fn is_app_user(&self, name: &str) -> bool {
            ["app", "all", "we.ird"].contains(&name)
        }
        fn may_use(&self, app_user: &str, tenant: &TenantId) -> bool {
            app_user == "all" || (["app", "we.ird"].contains(&app_user) && tenant.as_str().starts_with("client_"))
        }
        fn exists(&self, tenant: &TenantId) -> bool {
            ["client_001", "client_002", "other", "bin_"].contains(&tenant.as_str())
        }
    }

    fn rules() -> Rules {
        Rules::new(vec![Username, Options, Sni, Database, ApplicationName], None, Some("db.example.com"))
            .unwrap()
            .databases(["tenants".to_owned()])
    }

    fn hello<'a>(user: &'a str, more: &[(Source, &'a str)]) -> Hello<'a> {
        let mut hello = Hello { user, ..Hello::default() };
        for &(source, text) in more {
            match source {
                Username => hello.user = text,
                Options => hello.tenant_option = Some(text),
                Sni => hello.sni = Some(text),
                Database => hello.database = Some(text),
                ApplicationName => hello.application_name = Some(text),
            }
        }
        hello
    }

    /// `login → tenant`, or `login ! SQLSTATE`, with `!!` for a violation.
    fn told(rules: &Rules, hello: &Hello<'_>) -> String {
        let identity = identify(rules, hello, &World);
        let login = match identity.login {
            Login::Tenant(id) => format!("tenant {id}"),
            Login::AppUser(name) => format!("user {name}"),
            Login::Nobody => "nobody".to_owned(),
        };
        match identity.tenant {
            Ok(tenant) => format!("{login} → {tenant}"),
            Err(e) => format!("{login} {} {}", if e.is_violation() { "!!" } else { "!" }, PgError::from(&e).code),
        }
    }

    #[test]
    fn every_form_names_its_tenant() {
        for (user, more, expected) in [
            ("client_001", &[][..], "tenant client_001 → client_001"),
            ("client_999", &[], "tenant client_999 → client_999"),
            ("app.client_001", &[], "user app → client_001"),
            ("app@client_001", &[], "user app → client_001"),
            ("we.ird@client_001", &[], "user we.ird → client_001"),
            ("stranger.client_001", &[], "user stranger !! 42501"),
            ("app", &[(Options, "client_001")], "user app → client_001"),
            ("app", &[(Sni, "client_001.db.example.com")], "user app → client_001"),
            ("app", &[(Sni, "Client_001.DB.example.com.")], "user app → client_001"),
            ("app", &[(Database, "client_001")], "user app → client_001"),
            ("app", &[(Database, "client_new")], "user app → client_new"),
            ("app", &[(ApplicationName, "tenant=client_001")], "user app → client_001"),
            ("app", &[(ApplicationName, "tenant=client_001 worker 3")], "user app → client_001"),
            ("app", &[(ApplicationName, "client_001/worker")], "user app → client_001"),
            ("app", &[(ApplicationName, "client_new/worker")], "user app → client_new"),
            ("all", &[(ApplicationName, "bin/rails"), (Database, "client_new")], "user all → client_new"),
            ("app", &[(Options, "client_001"), (Database, "client_001")], "user app → client_001"),
        ] {
            assert_eq!(told(&rules(), &hello(user, more)), expected, "{user} {more:?}");
        }
    }

    #[test]
    fn what_clients_send_unasked_names_nobody() {
        for (user, more, expected) in [
            ("app", &[][..], "user app ! 28000"),
            ("all", &[(Database, "all")], "user all ! 28000"),
            ("all", &[(Database, "postgres")], "user all ! 28000"),
            ("all", &[(Database, "tenants")], "user all ! 28000"),
            ("all", &[(ApplicationName, "psql")], "user all ! 28000"),
            ("all", &[(ApplicationName, "pgbench")], "user all ! 28000"),
            ("all", &[(ApplicationName, "PostgreSQL JDBC Driver")], "user all ! 28000"),
            ("all", &[(ApplicationName, "pgAdmin 4 - DB:client_001")], "user all ! 28000"),
            ("all", &[(ApplicationName, "/usr/bin/puma")], "user all ! 28000"),
            ("all", &[(ApplicationName, "bin/rails")], "user all ! 28000"),
            ("all", &[(Sni, "db.example.com")], "user all ! 28000"),
            ("all", &[(Sni, "a.client_001.db.example.com")], "user all ! 28000"),
            ("all", &[(Sni, "client_001.evil.com")], "user all ! 28000"),
            ("all", &[(Sni, "client_001db.example.com")], "user all ! 28000"),
            ("client_001", &[(ApplicationName, "client_002/worker")], "tenant client_001 → client_001"),
            ("app.client_001", &[(ApplicationName, "other/worker")], "user app → client_001"),
            ("app.client_001", &[(ApplicationName, "web/worker")], "user app → client_001"),
            ("all.client_001", &[(ApplicationName, "web/worker")], "user all → client_001"),
        ] {
            assert_eq!(told(&rules(), &hello(user, more)), expected, "{user} {more:?}");
        }
    }

    #[test]
    fn conflicts_and_foreign_tenants_are_errors() {
        for (user, more, expected) in [
            ("client_001", &[(Options, "client_002")][..], "tenant client_001 !! 28000"),
            ("client_001", &[(Options, "client_999")], "tenant client_001 !! 28000"),
            ("client_001", &[(Sni, "client_002.db.example.com")], "tenant client_001 !! 28000"),
            ("client_001", &[(ApplicationName, "tenant=client_002")], "tenant client_001 !! 28000"),
            ("app.client_001", &[(Options, "client_002")], "user app ! 28000"),
            ("app.client_001", &[(Database, "client_002")], "user app ! 28000"),
            ("app.client_001", &[(ApplicationName, "client_002/w")], "user app ! 28000"),
            ("app", &[(Database, "client_001"), (ApplicationName, "client_002/w")], "user app ! 28000"),
            ("app", &[(Options, "other")], "user app !! 42501"),
            ("app.other", &[], "user app !! 42501"),
            ("app", &[(Options, "")], "user app ! 22023"),
            ("app", &[(Options, "Client_001")], "user app ! 22023"),
            ("app", &[(Options, "pg_catalog")], "user app ! 22023"),
            ("app", &[(ApplicationName, "tenant=")], "user app ! 22023"),
        ] {
            assert_eq!(told(&rules(), &hello(user, more)), expected, "{user} {more:?}");
        }
    }

    #[test]
    fn database_names_are_checked() {
        for (user, database, expected) in [
            ("client_001", "client_001", "tenant client_001 → client_001"),
            ("client_001", "postgres", "tenant client_001 ! 3D000"),
            ("app.client_001", "postgres", "user app → client_001"),
            ("client_001", "tenants", "tenant client_001 → client_001"),
            ("client_001", "nope", "tenant client_001 ! 3D000"),
            ("client_001", "No Such DB", "tenant client_001 ! 3D000"),
            ("client_001", "client_002", "tenant client_001 !! 3D000"),
            ("app.client_001", "client_001", "user app → client_001"),
            ("app.client_001", "app.client_001", "user app → client_001"),
            ("app@client_001", "app", "user app → client_001"),
            ("app.client_001", "ap", "user app ! 3D000"),
            ("app.client_001", "nope", "user app ! 3D000"),
            ("app", "nope", "user app ! 3D000"),
            ("app", "other", "user app !! 3D000"),
            ("all.client_001", "bookings", "user all ! 3D000"),
        ] {
            assert_eq!(told(&rules(), &hello(user, &[(Database, database)])), expected, "{user} {database}");
        }
        // What exists and what does not are told in the same words.
        let text = |database| {
            let error = identify(&rules(), &hello("client_001", &[(Database, database)]), &World).tenant.unwrap_err();
            PgError::from(&error).to_string().replace(database, "X")
        };
        assert_eq!(text("client_002"), text("client_999"));
    }

    #[test]
    fn hostile_user_names_are_nobody() {
        let long = "a".repeat(9_000);
        let dotted = format!("app.{long}");
        for user in [
            "",
            ".",
            "@",
            "app.",
            ".client_001",
            "app@",
            "app..client",
            "Client_001",
            "client 001",
            "public",
            "postgres",
            "pg_signal_backend",
            "client_001\"",
            "client_001;",
            "..//",
            "ä",
            "app.public",
            "app.client_001@",
            &long,
            &dotted,
        ] {
            let told = told(&rules(), &hello(user, &[]));
            // "app..client": the user "app." exists no more than the others.
            assert!(told.starts_with("nobody ! ") || told == "user app. !! 42501", "{user}: {told}");
        }
    }

    #[test]
    fn a_regular_expression_reads_user_names_first() {
        let rules = |regex| Rules::new(vec![Username], Some(regex), None);
        let both = rules("(?<user>[a-z]+)-of-(?<tenant>.+)").unwrap();
        let tenant_only = rules("t:(?<tenant>[a-z0-9_]+)").unwrap();
        for (rules, user, expected) in [
            (&both, "app-of-client_001", "user app → client_001"),
            (&both, "app.client_001", "user app → client_001"),
            (&both, "app", "user app ! 28000"),
            (&both, "App-of-", "nobody ! 28000"),
            (&both, "xx app-of-client_001", "nobody ! 28000"),
            (&tenant_only, "t:client_001", "tenant client_001 → client_001"),
            (&tenant_only, "tt:client_001", "nobody ! 28000"),
        ] {
            assert_eq!(told(rules, &hello(user, &[])), expected, "{user}");
        }
        assert!(matches!(rules("("), Err(InvalidRegex::Syntax(_))));
        assert!(matches!(rules("(?<user>.*)"), Err(InvalidRegex::NoTenantGroup)));
    }

    #[test]
    fn a_source_that_is_not_configured_says_nothing() {
        let rules = Rules::new(vec![Options], None, Some("db.example.com")).unwrap();
        for (user, more, expected) in [
            ("client_001", &[][..], "user client_001 ! 28000"),
            ("app.client_001", &[], "user app.client_001 ! 28000"),
            ("app", &[(Sni, "client_001.db.example.com")], "user app ! 28000"),
            ("app", &[(ApplicationName, "tenant=client_001")], "user app ! 28000"),
            ("app", &[(Options, "client_001"), (ApplicationName, "tenant=client_002")], "user app → client_001"),
        ] {
            assert_eq!(told(&rules, &hello(user, more)), expected, "{user} {more:?}");
        }
    }

    proptest! {
        #[test]
        fn nobody_gets_a_tenant_that_it_is_not_entitled_to(
            user in "(app|all|client_00[12]|x)?[.@]?(client_00[12]|other|[a-z]{0,3})?",
            database in prop::option::of("client_00[12]|other|postgres|.{0,6}"),
            label in prop::option::of("(tenant=)?(client_00[12]|other|bin)?/?.{0,4}"),
            option in prop::option::of("client_00[12]|other|.{0,4}"),
            sni in prop::option::of("(client_00[12]|other)?\\.?db\\.example\\.com"),
        ) {
            let hello = Hello {
                user: &user,
                database: database.as_deref(),
                application_name: label.as_deref(),
                tenant_option: option.as_deref(),
                sni: sni.as_deref(),
            };
            let identity = identify(&rules(), &hello, &World);
            if let Ok(tenant) = identity.tenant {
                match identity.login {
                    Login::Tenant(own) => prop_assert_eq!(own, tenant),
                    Login::AppUser(name) => prop_assert!(World.may_use(&name, &tenant)),
                    Login::Nobody => prop_assert!(false),
                }
            }
        }
    }
}
