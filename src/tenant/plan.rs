//! How a tenant is separated from the others: the one place where plans differ.
//!
//! Every method returns a value; somebody else runs it.

use super::TenantId;
use super::sql::{Ident, Literal};

/// A tenant's plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// A schema of a shared database, a login role of its own.
    Schema,
}

impl Plan {
    /// The word in config, catalog and API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Schema => "schema",
        }
    }

    /// Reads the word in config, catalog and API.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Schema].into_iter().find(|p| p.as_str() == text)
    }

    /// The role that the tenant's server connections log in as.
    pub fn role(self, id: &TenantId) -> String {
        match self {
            Self::Schema => id.to_string(),
        }
    }

    /// The schema that holds the tenant's objects.
    pub fn schema(self, id: &TenantId) -> String {
        match self {
            Self::Schema => id.to_string(),
        }
    }

    /// Settings of the server connection's startup packet, with which an unchanged client finds its tables.
    pub fn startup_settings(self, id: &TenantId) -> Vec<(String, String)> {
        match self {
            Self::Schema => vec![
                ("search_path".to_owned(), self.search_path(id)),
                // A tenant may poison its own role with ALTER ROLE … SET local_preload_libraries; this wins over it.
                ("local_preload_libraries".to_owned(), String::new()),
            ],
        }
    }

    /// The tenant's `search_path`: its schema, then the functions that stand in for PostgreSQL's (see
    /// `plan_schema_shard.sql`), which must come before `pg_catalog`.
    pub fn search_path(self, id: &TenantId) -> String {
        match self {
            Self::Schema => format!("{}, tenant_shim, pg_catalog", Ident(id.as_str())),
        }
    }

    /// What a shard needs before the first tenant.
    pub fn shard_setup(self, database: &str) -> ShardSetup {
        match self {
            Self::Schema => ShardSetup {
                cluster: include_str!("plan_cluster.sql").to_owned(),
                database: format!(
                    "REVOKE ALL ON DATABASE {database} FROM PUBLIC;\n\
                     GRANT CONNECT, TEMP ON DATABASE {database} TO {GROUP};\n{}",
                    include_str!("plan_schema_shard.sql"),
                    database = Ident(database),
                ),
            },
        }
    }

    /// Makes the place of a tenant, in one transaction, as superuser. May be run again: it then sets the password and
    /// the limits anew. `verifier` is a `SCRAM-SHA-256$…` text, so that no password reaches a log of the server.
    pub fn provision(self, id: &TenantId, verifier: &str, limits: Limits) -> Vec<String> {
        match self {
            Self::Schema => {
                let (role, schema) = (self.role(id), self.schema(id));
                let (role, schema) = (Ident(&role), Ident(&schema));
                // From 16 on a member need not be able to become the group; nothing may be owned by all tenants.
                let grant = format!("GRANT {GROUP} TO {role}");
                // Dynamic, because 15 does not even parse the newer form.
                let member = format!(
                    "BEGIN IF current_setting('server_version_num')::int >= 160000 \
                     THEN EXECUTE {}; ELSE EXECUTE {}; END IF; END",
                    Literal(&format!("{grant} WITH INHERIT TRUE, SET FALSE")),
                    Literal(&grant)
                );
                vec![
                    create_role_if_missing(id, self),
                    format!(
                        "ALTER ROLE {role} LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS \
                         CONNECTION LIMIT {} PASSWORD {}",
                        limits.connections,
                        Literal(verifier)
                    ),
                    format!("DO {}", Literal(&member)),
                    // The tenant does not own its schema: it must not be able to let others in.
                    format!("CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {OWNER}"),
                    format!("GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}"),
                    // The startup packet says the same and wins; this is for logins that do not come through pgusher.
                    format!("ALTER ROLE {role} SET search_path = {}", self.search_path(id)),
                    // Keeps a tenant's routines out of information_schema.routines of others.
                    format!("ALTER DEFAULT PRIVILEGES FOR ROLE {role} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"),
                ]
            }
        }
    }

    /// Removes what is left of a tenant when its objects have been dropped, in one transaction, as superuser. May be
    /// run again.
    pub fn deprovision(self, id: &TenantId) -> Vec<String> {
        match self {
            Self::Schema => {
                let (role, schema) = (self.role(id), self.schema(id));
                let drop_owned = format!(
                    "BEGIN IF EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {}) \
                     THEN DROP OWNED BY {} CASCADE; END IF; END",
                    Literal(&role),
                    Ident(&role)
                );
                vec![
                    format!("DO {}", Literal(&drop_owned)),
                    format!("DROP SCHEMA IF EXISTS {} CASCADE", Ident(&schema)),
                    format!("DROP ROLE IF EXISTS {}", Ident(&role)),
                ]
            }
        }
    }
}

/// The group that carries what all tenants may do.
pub const GROUP: &str = "app_tenants";
/// The role that owns tenants' schemas.
pub const OWNER: &str = "provisioner";
/// Raised when [`Plan::shard_setup`] changes, so that shards that have an older one are set up again.
pub const SETUP_VERSION: u32 = 2;

/// What a shard needs before the first tenant. Each part is run as one message, as superuser.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSetup {
    /// In database `postgres`.
    pub cluster: String,
    /// In the tenants' database.
    pub database: String,
}

/// What a tenant's role may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `CONNECTION LIMIT`; -1 for none.
    pub connections: i32,
}

fn create_role_if_missing(id: &TenantId, plan: Plan) -> String {
    let role = plan.role(id);
    let body = format!(
        "BEGIN IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = {}) THEN CREATE ROLE {}; END IF; END",
        Literal(&role),
        Ident(&role)
    );
    format!("DO {}", Literal(&body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn provisioning_gives_a_login_role_that_owns_nothing_and_may_use_one_schema() {
        let id = TenantId::parse("client-1").unwrap();
        let sql = Plan::Schema.provision(&id, "SCRAM-SHA-256$x", Limits { connections: 7 }).join(";\n");
        for part in [
            "ALTER ROLE \"client-1\" LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS \
             CONNECTION LIMIT 7 PASSWORD 'SCRAM-SHA-256$x'",
            "CREATE SCHEMA IF NOT EXISTS \"client-1\" AUTHORIZATION provisioner",
            "SET search_path = \"client-1\", tenant_shim, pg_catalog",
        ] {
            assert!(sql.contains(part), "{part}\n{sql}");
        }
        assert!(!sql.contains("GRANT ALL"));
    }

    #[test]
    fn a_database_name_cannot_leave_its_quotes() {
        let setup = Plan::Schema.shard_setup("a\"; DROP DATABASE x; --");
        assert!(setup.database.contains("DATABASE \"a\"\"; DROP DATABASE x; --\" FROM PUBLIC"));
    }
}
