//! How a tenant is separated from the others: the one place where plans differ.
//!
//! Every method returns a value; somebody else runs it. Nothing outside this file asks which plan it is.
//!
//! | plan | a tenant is | template | deleting it |
//! |---|---|---|---|
//! | `rls` | a role; its rows in tables that all share carry the role's name | once per database, as the tables' owner | its rows, its role |
//! | `schema` | a role and a schema | for each tenant, as the tenant | objects, schema, role |
//! | `database` | a role and a database | for each tenant, as the tenant | database, role |
//! | `cluster` | a role and all databases of a server | for each tenant, as the tenant | the role's databases, the role |

use super::TenantId;
use super::sql::{Ident, Literal};

/// A tenant's plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Plan {
    /// Rows of shared tables, told apart by the login role.
    Rls,
    /// A schema of a shared database, a login role of its own.
    Schema,
    /// A database of its own on a shared server.
    Database,
    /// A server of its own.
    Cluster,
}

/// How much of PostgreSQL's own catalogs and functions tenants may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hardening {
    /// psql, introspection and `pg_dump` keep working.
    Compat,
    /// Whatever grants can close is closed.
    Strict,
}

impl Hardening {
    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compat => "compat",
            Self::Strict => "strict",
        }
    }

    /// What brings a database to this grade, from the other one too.
    fn sql(self) -> [&'static str; 2] {
        match self {
            Self::Compat => [include_str!("plan_unstrict.sql"), include_str!("plan_compat.sql")],
            Self::Strict => [include_str!("plan_compat.sql"), include_str!("plan_strict.sql")],
        }
    }
}

/// The names of a tenant's place, as the catalog records them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// The tenant.
    pub id: TenantId,
    /// Database.
    pub database: String,
    /// Schema that its tables are in.
    pub schema: String,
    /// Role of its server connections.
    pub role: String,
}

/// The databases of a shard that tenants share.
#[derive(Debug, Clone, Copy)]
pub struct Databases<'a> {
    /// Of plan `schema`; the first one of a tenant that has the shard to itself.
    pub schemas: &'a str,
    /// Of plan `rls`.
    pub rows: &'a str,
}

/// Something to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A statement.
    Run(String),
    /// A query whose rows are statements, to be run one by one.
    Each(String),
}

/// How a place is made. All of it can be run again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Provision {
    /// In database `postgres`, one by one, outside a transaction.
    pub before: Vec<Step>,
    /// In the tenant's database, in the transaction that the template is run in.
    pub inside: Vec<String>,
    /// The same, after the template: says that the place is whole.
    pub seal: Vec<String>,
}

/// How a place is removed, after its sessions have ended. All of it can be run again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Deprovision {
    /// In the tenant's database, in one transaction.
    pub inside: Vec<String>,
    /// In database `postgres`, one by one, outside a transaction.
    pub after: Vec<Step>,
}

/// What a shard needs before the first tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setup {
    /// In database `postgres`.
    pub cluster: String,
    /// The database that is prepared; made if it is missing.
    pub database: String,
    /// In that database.
    pub sql: String,
    /// A query in `postgres` for the tenants' databases that were prepared otherwise than `$1` says.
    pub outdated: Option<&'static str>,
}

/// How often the template is run, and as whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateUse {
    /// For each tenant, as the tenant.
    EachTenant,
    /// Once for the database, as [`OWNER`]; its tables are then made into shared ones.
    Once,
}

/// What a tenant's role may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `CONNECTION LIMIT`; -1 for none.
    pub connections: i32,
}

/// Which replication connections a tenant may have, if its role has `REPLICATION`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replication {
    /// None: its database is others', too.
    Nothing,
    /// Logical ones, and on them what concerns its own database alone: the server is others', too.
    OwnDatabase,
    /// All of them: there is nobody else.
    Everything,
}

/// Output plugins that a tenant may name where it shares the server: PostgreSQL would load any library by its path, and
/// what a library does when it is loaded is no tenant's to choose. `plan_compat.sql` has the same list.
pub const OUTPUT_PLUGINS: [&str; 4] = ["pgoutput", "test_decoding", "wal2json", "decoderbufs"];

/// The group that carries what all tenants of shared databases may do.
pub const GROUP: &str = "app_tenants";
/// The role that owns tenants' schemas and databases, and shared tables.
pub const OWNER: &str = "provisioner";
/// The database that tenants' own databases are copied from.
pub const TEMPLATE_DATABASE: &str = "pgusher_template";
/// The column that tells tenants' rows apart, and the policy that looks at it.
pub const TENANT_COLUMN: &str = "tenant_id";
/// Name of the policies.
pub const POLICY: &str = "tenant_isolation";
/// Raised when [`Plan::setup`] changes, so that shards that have an older one are set up again.
pub const SETUP_VERSION: u32 = 6;
/// What the comment on a role, schema or database of a tenant begins with; the id follows.
pub const MARK: &str = "pgusher tenant";

impl Plan {
    /// All plans.
    pub const ALL: [Self; 4] = [Self::Rls, Self::Schema, Self::Database, Self::Cluster];

    /// The word in config, catalog and API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rls => "rls",
            Self::Schema => "schema",
            Self::Database => "database",
            Self::Cluster => "cluster",
        }
    }

    /// Reads the word in config, catalog and API.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|p| p.as_str() == text)
    }

    /// Where a new tenant goes on its shard.
    pub fn home(self, id: &TenantId, shard: Databases<'_>) -> Home {
        let (database, schema) = match self {
            Self::Rls => (shard.rows, "public"),
            Self::Schema => (shard.schemas, id.as_str()),
            Self::Database => (id.as_str(), "public"),
            Self::Cluster => (shard.schemas, "public"),
        };
        let (database, schema) = (database.to_owned(), schema.to_owned());
        Home { id: id.clone(), database, schema, role: id.to_string() }
    }

    /// The name of the schema, as long as nothing else is recorded.
    pub fn default_schema(self, id: &TenantId) -> &str {
        match self {
            Self::Schema => id.as_str(),
            Self::Rls | Self::Database | Self::Cluster => "public",
        }
    }

    /// Whether its tenants live alone on their shard.
    pub fn wants_own_shard(self) -> bool {
        self == Self::Cluster
    }

    /// Whether clients may name a database, and whatever `search_path` they like: only where there is nobody else.
    pub fn clients_choose_place(self) -> bool {
        self == Self::Cluster
    }

    /// Whether other tenants notify and listen in the same database.
    pub fn shares_channels(self) -> bool {
        matches!(self, Self::Rls | Self::Schema)
    }

    /// Whether the tenant's role may be a superuser: only where there is nobody else.
    pub fn may_be_superuser(self) -> bool {
        self == Self::Cluster
    }

    /// Which replication connections its tenants may have.
    pub fn replication(self) -> Replication {
        match self {
            Self::Rls | Self::Schema => Replication::Nothing,
            Self::Database => Replication::OwnDatabase,
            Self::Cluster => Replication::Everything,
        }
    }

    /// Settings of the server connection's startup packet, with which an unchanged client finds its tables.
    pub fn startup_settings(self, schema: &str) -> Vec<(String, String)> {
        match self {
            Self::Rls | Self::Schema | Self::Database => vec![
                ("search_path".to_owned(), Self::search_path(schema)),
                // A tenant may poison its own role with ALTER ROLE … SET local_preload_libraries; this wins over it.
                ("local_preload_libraries".to_owned(), String::new()),
            ],
            Self::Cluster => Vec::new(),
        }
    }

    /// Settings that a client may choose for itself, but not have from its role: a tenant may poison its own role with
    /// `ALTER ROLE … SET`, and what stands in the startup packet wins over it. They come before the client's.
    pub fn startup_defaults(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Rls | Self::Schema | Self::Database => {
                &[("statement_timeout", "0"), ("lock_timeout", "0"), ("idle_in_transaction_session_timeout", "0")]
            }
            Self::Cluster => &[],
        }
    }

    /// The tenant's `search_path`: its schema, then the functions that stand in for PostgreSQL's (see
    /// `plan_compat.sql`), which must come before `pg_catalog`.
    pub fn search_path(schema: &str) -> String {
        format!("{}, tenant_shim, pg_catalog", Ident(schema))
    }

    /// How often the template is run.
    pub fn template(self) -> TemplateUse {
        match self {
            Self::Rls => TemplateUse::Once,
            Self::Schema | Self::Database | Self::Cluster => TemplateUse::EachTenant,
        }
    }

    /// The `search_path` under which the template runs.
    pub fn template_path(self, schema: &str) -> String {
        match self {
            Self::Rls | Self::Schema | Self::Database => Self::search_path(schema),
            Self::Cluster => Ident(schema).to_string(),
        }
    }

    /// What a shard needs before the first tenant of this plan; `None` if nothing.
    pub fn setup(self, shard: Databases<'_>, hardening: Hardening) -> Option<Setup> {
        let database = match self {
            Self::Rls => shard.rows,
            Self::Schema => shard.schemas,
            Self::Database => TEMPLATE_DATABASE,
            Self::Cluster => return None,
        };
        let name = Ident(database);
        let mut sql = format!("REVOKE ALL ON DATABASE {name} FROM PUBLIC;\n");
        if self != Self::Database {
            sql += &format!("GRANT CONNECT, TEMP ON DATABASE {name} TO {GROUP};\n");
        }
        sql += &hardening.sql().join("\n");
        if self == Self::Rls {
            sql += include_str!("plan_rls.sql");
            sql += &shared_deletes(hardening);
        }
        Some(Setup {
            cluster: include_str!("plan_cluster.sql").to_owned(),
            database: database.to_owned(),
            sql,
            outdated: (self == Self::Database).then_some(
                "SELECT d.datname::text, pg_catalog.shobj_description(d.oid, 'pg_database') FROM pg_database d \
                 WHERE pg_catalog.shobj_description(d.oid, 'pg_database') LIKE 'pgusher tenant %' \
                 AND pg_catalog.shobj_description(d.oid, 'pg_database') NOT LIKE '% ' || $1 \
                 AND pg_catalog.pg_get_userbyid(d.datdba) = 'provisioner'",
            ),
        })
    }

    /// What brings a database that was made for one tenant to a grade, and the comment that says so.
    pub fn harden(database: &str, id: &str, hardening: Hardening, mark: &str) -> String {
        format!(
            "{}\nCOMMENT ON DATABASE {} IS {};",
            hardening.sql().join("\n"),
            Ident(database),
            Literal(&format!("{MARK} {id} {mark}"))
        )
    }

    /// The database in which attempts on one place meet: where its lock is, and where it is looked at.
    pub fn meeting(self, home: &Home) -> &str {
        match self {
            Self::Rls | Self::Schema => &home.database,
            Self::Database | Self::Cluster => "postgres",
        }
    }

    /// A query in the meeting database for one row: whether the role is ours (null: there is none), whether the rest
    /// of the place is ours (the same), and whether it is whole.
    pub fn look(self, home: &Home) -> String {
        let Home { id, database, schema, role } = home;
        let mark = format!("{MARK} {id}");
        // What a tenant can never have is a sign that the role is somebody else's. REPLICATION the operator may have given
        // to one of ours.
        // Without a comment it is not ours either: null would say that there is no such role, and it would be taken.
        let ours = format!("(pg_catalog.shobj_description(r.oid, 'pg_authid') = {}) IS TRUE", Literal(&mark));
        let given = match self.replication() {
            Replication::Nothing => "true".to_owned(),
            Replication::OwnDatabase | Replication::Everything => format!("NOT ({ours})"),
        };
        let never = format!("r.rolsuper OR r.rolcreaterole OR r.rolbypassrls OR r.rolreplication AND {given}");
        let role = format!(
            "(SELECT NOT ({never}) AND ({ours} OR EXISTS (SELECT FROM pg_auth_members m \
               JOIN pg_roles g ON g.oid = m.roleid WHERE m.member = r.oid AND g.rolname = '{GROUP}')) \
             FROM pg_roles r WHERE r.rolname = {role})",
            role = Literal(role)
        );
        let database = Literal(database);
        let comment = "pg_catalog.shobj_description(d.oid, 'pg_database') || ' '";
        let whole = format!("{comment} LIKE {}", Literal(&format!("{} %", mark.replace('_', "\\_"))));
        match self {
            Self::Rls => format!("SELECT {role}, {role}, true"),
            Self::Schema => format!(
                "SELECT {role}, (SELECT pg_get_userbyid(n.nspowner) = '{OWNER}' FROM pg_namespace n \
                 WHERE n.nspname = {}), true",
                Literal(schema)
            ),
            Self::Database => format!(
                "SELECT {role}, (SELECT pg_get_userbyid(d.datdba) = '{OWNER}' AND \
                 coalesce({whole}, {comment} IS NULL) FROM pg_database d WHERE d.datname = {database}), \
                 coalesce((SELECT {whole} FROM pg_database d WHERE d.datname = {database}), false)"
            ),
            Self::Cluster => format!(
                "SELECT {role}, (SELECT pg_get_userbyid(d.datdba) = {owner} FROM pg_database d \
                 WHERE d.datname = {database}), \
                 coalesce((SELECT {whole} FROM pg_database d WHERE d.datname = {database}), false)",
                owner = Literal(&home.role)
            ),
        }
    }

    /// Makes the place of a tenant, as superuser. `verifier` is a `SCRAM-SHA-256$…` text, so that no password reaches a
    /// log of the server; `mark` is what [`Plan::setup`]'s databases are marked with.
    pub fn provision(self, home: &Home, verifier: &str, limits: Limits, mark: &str) -> Provision {
        let (role, database) = (Ident(&home.role), Ident(&home.database));
        let mut make_role = vec![create_role_if_missing(&home.role)];
        let attributes = if self == Self::Cluster { "CREATEDB" } else { "NOCREATEDB" };
        make_role.push(format!(
            "ALTER ROLE {role} LOGIN INHERIT NOSUPERUSER {attributes} NOCREATEROLE NOREPLICATION NOBYPASSRLS \
             CONNECTION LIMIT {} PASSWORD {}",
            limits.connections,
            Literal(verifier)
        ));
        make_role.push(format!("COMMENT ON ROLE {role} IS {}", Literal(&format!("{MARK} {}", home.id))));
        // The startup packet says the same and wins; this is for logins that do not come through pgusher.
        let path =
            format!("ALTER ROLE {role} IN DATABASE {database} SET search_path = {}", Self::search_path(&home.schema));
        let whole = Literal(&format!("{MARK} {} {mark}", home.id)).to_string();
        match self {
            Self::Rls => {
                let inside = [make_role, vec![join_group(&home.role), path]].concat();
                Provision { inside, ..Provision::default() }
            }
            Self::Schema => {
                let schema = Ident(&home.schema);
                let rest = vec![
                    join_group(&home.role),
                    // The tenant does not own its schema: it must not be able to let others in.
                    format!("CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {OWNER}"),
                    format!("COMMENT ON SCHEMA {schema} IS {}", Literal(&format!("{MARK} {}", home.id))),
                    format!("GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}"),
                    path,
                    // Keeps a tenant's routines out of information_schema.routines of others.
                    format!("ALTER DEFAULT PRIVILEGES FOR ROLE {role} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"),
                ];
                Provision { inside: [make_role, rest].concat(), ..Provision::default() }
            }
            Self::Database => {
                let mut before: Vec<Step> = make_role.into_iter().map(Step::Run).collect();
                // Nobody but superusers gets in before the grants are right, and the template is through.
                before.push(Step::Each(unless_database(
                    &home.database,
                    &format!(
                        "CREATE DATABASE {database} OWNER {OWNER} TEMPLATE {TEMPLATE_DATABASE} CONNECTION LIMIT 0"
                    ),
                )));
                let inside = vec![
                    format!("REVOKE ALL ON DATABASE {database} FROM PUBLIC"),
                    // No CREATE: that is schemas, extensions and publications.
                    format!("GRANT CONNECT, TEMP ON DATABASE {database} TO {role}"),
                    format!("REVOKE ALL ON SCHEMA {} FROM PUBLIC", Ident(&home.schema)),
                    format!("GRANT USAGE, CREATE ON SCHEMA {} TO {role}", Ident(&home.schema)),
                    path,
                ];
                let seal = vec![
                    format!("COMMENT ON DATABASE {database} IS {whole}"),
                    format!("ALTER DATABASE {database} CONNECTION LIMIT -1"),
                ];
                Provision { before, inside, seal }
            }
            Self::Cluster => {
                let mut before: Vec<Step> = make_role.into_iter().map(Step::Run).collect();
                before.push(Step::Each(unless_database(
                    &home.database,
                    &format!("CREATE DATABASE {database} OWNER {role}"),
                )));
                Provision {
                    before,
                    inside: Vec::new(),
                    seal: vec![format!("COMMENT ON DATABASE {database} IS {whole}")],
                }
            }
        }
    }

    /// The schema whose objects are dropped in batches before the rest goes.
    pub fn private_schema(self, home: &Home) -> Option<&str> {
        match self {
            Self::Schema => Some(&home.schema),
            Self::Rls | Self::Database | Self::Cluster => None,
        }
    }

    /// Removes what is left of a tenant, as superuser.
    pub fn deprovision(self, home: &Home) -> Deprovision {
        let role = Ident(&home.role);
        let drop_owned = if_role(&home.role, &format!("DROP OWNED BY {role} CASCADE"));
        let drop_role = format!("DROP ROLE IF EXISTS {role}");
        match self {
            Self::Rls => {
                // Foreign keys lead from the tenant's rows to the tenant's rows, so all of them go without a check, and
                // no trigger runs.
                let rows = format!(
                    "DECLARE found record; BEGIN SET LOCAL session_replication_role = replica; \
                     FOR found IN {SHARED_TABLES} LOOP EXECUTE pg_catalog.format('DELETE FROM %s WHERE {TENANT_COLUMN} = %L', found.name, {}); \
                     END LOOP; SET LOCAL session_replication_role = origin; END",
                    Literal(&home.role)
                );
                Deprovision { inside: vec![format!("DO {}", Literal(&rows)), drop_owned, drop_role], after: Vec::new() }
            }
            Self::Schema => Deprovision {
                inside: vec![drop_owned, format!("DROP SCHEMA IF EXISTS {} CASCADE", Ident(&home.schema)), drop_role],
                after: Vec::new(),
            },
            Self::Database => Deprovision {
                inside: Vec::new(),
                after: vec![
                    Step::Run(format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", Ident(&home.database))),
                    Step::Run(drop_owned),
                    Step::Run(drop_role),
                ],
            },
            Self::Cluster => Deprovision {
                inside: Vec::new(),
                after: vec![
                    Step::Each(format!(
                        "SELECT pg_catalog.format('DROP DATABASE IF EXISTS %I WITH (FORCE)', d.datname) \
                         FROM pg_database d WHERE pg_catalog.pg_get_userbyid(d.datdba) = {}",
                        Literal(&home.role)
                    )),
                    Step::Run(drop_owned),
                    Step::Run(drop_role),
                ],
            },
        }
    }

    /// Queries for tenants' ids and bytes, from catalogs alone; the first in the database of plan `schema`, the second
    /// in database `postgres`. Rows of shared tables are not told apart.
    pub const STORAGE: [&str; 2] = [
        "SELECT coalesce(pg_catalog.substring(pg_catalog.obj_description(n.oid, 'pg_namespace'), \
                         '^pgusher tenant ([^ ]+)'), n.nspname::text), sum(pg_total_relation_size(c.oid))::bigint \
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.relkind IN ('r', 'm') AND pg_get_userbyid(n.nspowner) = 'provisioner' AND n.oid NOT IN \
           (SELECT b.relnamespace FROM pg_locks l JOIN pg_class b ON b.oid = l.relation \
            WHERE l.mode = 'AccessExclusiveLock' AND l.locktype = 'relation' AND l.database = \
              (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())) GROUP BY 1",
        "SELECT pg_catalog.substring(pg_catalog.shobj_description(d.oid, 'pg_database'), '^pgusher tenant ([^ ]+)'), \
           pg_database_size(d.oid) FROM pg_database d \
         WHERE pg_catalog.shobj_description(d.oid, 'pg_database') LIKE 'pgusher tenant %'",
    ];
}

/// The tables that tenants of plan `rls` share: those that belong to their owner. A tenant can give its own temporary
/// table a policy of the same name, and a trigger that runs as whoever deletes from it.
const SHARED_TABLES: &str = "SELECT c.oid::pg_catalog.regclass AS name FROM pg_catalog.pg_policy p \
    JOIN pg_catalog.pg_class c ON c.oid = p.polrelid JOIN pg_catalog.pg_roles o ON o.oid = c.relowner \
    WHERE p.polname = 'tenant_isolation' AND o.rolname = 'provisioner' AND c.relpersistence <> 't'";

/// The right to delete rows is one to lock the whole table against everybody, so that `strict` does not give it.
fn shared_deletes(hardening: Hardening) -> String {
    let change = match hardening {
        Hardening::Compat => "GRANT DELETE ON %s TO app_tenants",
        Hardening::Strict => "REVOKE DELETE ON %s FROM app_tenants",
    };
    let body = format!(
        "DECLARE found record; BEGIN FOR found IN {SHARED_TABLES} LOOP EXECUTE pg_catalog.format('{change}', found.name); END LOOP; END"
    );
    format!("DO {};\n", Literal(&body))
}

fn unless_database(name: &str, sql: &str) -> String {
    format!(
        "SELECT {} WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_database WHERE datname = {})",
        Literal(sql),
        Literal(name)
    )
}

fn if_role(role: &str, sql: &str) -> String {
    let body = format!(
        "BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {}) THEN {sql}; END IF; END",
        Literal(role)
    );
    format!("DO {}", Literal(&body))
}

/// Makes the role a member of [`GROUP`].
pub fn join_group(role: &str) -> String {
    // From 16 on a member need not be able to become the group; nothing may be owned by all tenants.
    let grant = format!("GRANT {GROUP} TO {}", Ident(role));
    // Dynamic, because 15 does not even parse the newer form.
    let member = format!(
        "BEGIN IF current_setting('server_version_num')::int >= 160000 THEN EXECUTE {}; ELSE EXECUTE {}; END IF; END",
        Literal(&format!("{grant} WITH INHERIT TRUE, SET FALSE")),
        Literal(&grant)
    );
    format!("DO {}", Literal(&member))
}

fn create_role_if_missing(role: &str) -> String {
    let body = format!(
        "BEGIN IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {}) THEN CREATE ROLE {}; END IF; END",
        Literal(role),
        Ident(role)
    );
    format!("DO {}", Literal(&body))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARD: Databases<'static> = Databases { schemas: "tenants", rows: "shared" };

    fn home(plan: Plan) -> Home {
        plan.home(&TenantId::parse("client-1").unwrap(), SHARD)
    }

    fn provisioned(plan: Plan) -> String {
        let made = plan.provision(&home(plan), "SCRAM-SHA-256$x", Limits { connections: 7 }, "m");
        let before = made.before.iter().map(|step| match step {
            Step::Run(sql) | Step::Each(sql) => sql.clone(),
        });
        before.chain(made.inside.clone()).chain(made.seal.clone()).collect::<Vec<_>>().join(";\n")
    }

    #[test]
    fn every_plan_has_a_word_that_is_read_back() {
        for plan in Plan::ALL {
            assert_eq!(Plan::parse(plan.as_str()), Some(plan));
        }
        assert_eq!(Plan::parse("none"), None);
    }

    #[test]
    fn every_plan_makes_a_login_role_without_powers() {
        for plan in Plan::ALL {
            let sql = provisioned(plan);
            for part in ["ALTER ROLE \"client-1\" LOGIN INHERIT NOSUPERUSER", "PASSWORD 'SCRAM-SHA-256$x'", "LIMIT 7"] {
                assert!(sql.contains(part), "{plan:?} {part}\n{sql}");
            }
            assert!(!sql.contains("GRANT ALL"), "{plan:?}");
            assert_eq!(plan.may_be_superuser(), plan == Plan::Cluster);
        }
    }

    #[test]
    fn the_output_plugins_are_those_of_the_functions() {
        let listed = OUTPUT_PLUGINS.map(|plugin| format!("'{plugin}'")).join(", ");
        assert!(include_str!("plan_compat.sql").contains(&format!("plugin NOT IN ({listed})")), "{listed}");
    }

    #[test]
    fn a_schema_belongs_to_somebody_else() {
        let sql = provisioned(Plan::Schema);
        assert!(sql.contains("CREATE SCHEMA IF NOT EXISTS \"client-1\" AUTHORIZATION provisioner"), "{sql}");
        assert!(sql.contains("SET search_path = \"client-1\", tenant_shim, pg_catalog"), "{sql}");
    }

    #[test]
    fn only_shared_databases_let_the_group_in() {
        for (plan, expected) in [
            (Plan::Rls, Some("ON DATABASE \"shared\" TO app_tenants")),
            (Plan::Schema, Some("ON DATABASE \"tenants\" TO app_tenants")),
            (Plan::Database, None),
        ] {
            let setup = plan.setup(SHARD, Hardening::Compat).unwrap();
            match expected {
                Some(part) => assert!(setup.sql.contains(part), "{plan:?}"),
                None => assert!(!setup.sql.contains("TO app_tenants"), "{plan:?}"),
            }
        }
        assert_eq!(Plan::Cluster.setup(SHARD, Hardening::Strict), None);
    }

    #[test]
    fn a_database_name_cannot_leave_its_quotes() {
        let shard = Databases { schemas: "a\"; DROP DATABASE x; --", rows: "b" };
        let setup = Plan::Schema.setup(shard, Hardening::Compat).unwrap();
        assert!(setup.sql.contains("DATABASE \"a\"\"; DROP DATABASE x; --\" FROM PUBLIC"));
    }
}
