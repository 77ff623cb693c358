//! What the tenants own when an entry starts: `users`, `services` and `bookings` with three rows each, whose `note` is
//! `SECRET_OF_<tenant>`, and nothing else.
//!
//! It is put back before every entry, by a superuser who runs nothing that a tenant made. What the product decides
//! (roles, grants, owners, settings) is not made here but remembered at the start; if an entry changed it, it is put
//! back and reported: a tenant must not be able to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_postgres::{Client, NoTls};

use super::Error;
use super::target::{TABLES, TENANTS, Target};

/// The databases that the tenants live in, each with those that live there.
pub struct Fixture {
    plan: String,
    places: Vec<Place>,
}

struct Place {
    admin: Client,
    tenants: Vec<String>,
}

impl Fixture {
    /// Connects, and remembers what the product made.
    ///
    /// # Errors
    /// A server is not there, or not as expected.
    pub async fn prepare(plan: &str, target: &Target) -> Result<Self, Error> {
        let mut by_dsn: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for tenant in TENANTS {
            let dsn = target.admins.get(tenant).ok_or_else(|| format!("no superuser's DSN for {tenant}"))?;
            by_dsn.entry(dsn).or_default().push(tenant.to_owned());
        }
        let mut places = Vec::new();
        for (dsn, tenants) in by_dsn {
            let (admin, connection) = tokio_postgres::connect(dsn, NoTls).await?;
            tokio::spawn(connection);
            admin.batch_execute(REMEMBER).await?;
            places.push(Place { admin, tenants });
        }
        Ok(Self { plan: plan.to_owned(), places })
    }

    /// Puts everything back; says what should not have been possible to change, if anything was.
    ///
    /// # Errors
    /// It cannot be put back.
    pub async fn reset(&self) -> Result<Vec<String>, Error> {
        let mut changed = Vec::new();
        for place in &self.places {
            let contents: String = place.tenants.iter().map(|tenant| self.contents(tenant)).collect();
            let sql = match self.plan.as_str() {
                "rls" => format!("TRUNCATE bookings, services, users; {contents}"),
                _ => format!("{EMPTY} {contents}"),
            };
            let start = Instant::now();
            loop {
                match place.reset(&sql).await {
                    Ok(found) => break changed.extend(found),
                    // An attack filled the lock table, and is not over yet.
                    Err(error) if is_full(&error) && start.elapsed() < Duration::from_secs(20) => {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(changed)
    }

    /// Ends the tenant's idle server connections, and waits until they are gone.
    ///
    /// # Errors
    /// They do not go.
    pub async fn end_server_connections(&self, tenant: &str) -> Result<(), Error> {
        for place in &self.places {
            let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = $1";
            let deadline = Instant::now() + Duration::from_secs(5);
            while place.admin.query_one(sql, &[&tenant]).await?.get::<_, i64>(0) > 0 {
                if Instant::now() > deadline {
                    return Err("server connections do not end".into());
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(())
    }

    fn contents(&self, tenant: &str) -> String {
        let rows = |first: usize| {
            let mut sql = String::new();
            for (index, id) in (first..first + 3).enumerate() {
                let (n, mark) = (index + 1, format!("'SECRET_OF_{tenant}'"));
                let (columns, values) = match self.plan.as_str() {
                    "rls" => ("tenant_id, id, ", format!("'{tenant}', {id}, ")),
                    _ => ("", String::new()),
                };
                sql += &format!(
                    "INSERT INTO users({columns}email, note) VALUES ({values}'u{n}@{tenant}', {mark});
                     INSERT INTO services({columns}name, note) VALUES ({values}'s{n}@{tenant}', {mark});
                     INSERT INTO bookings({columns}user_id, service_id, note) VALUES ({values}{id}, {id}, {mark});"
                );
            }
            sql
        };
        match self.plan.as_str() {
            "rls" => rows(if tenant == TENANTS[0] { 1 } else { 4 }),
            plan => {
                // A tenant that has a database to itself has its objects in `public`.
                let schema = if plan == "schema" { tenant } else { "public" };
                format!(
                    "SET LOCAL search_path = {schema}; SET LOCAL ROLE {tenant};
                     {TABLES} {} RESET ROLE; RESET search_path;",
                    rows(1)
                )
            }
        }
    }
}

fn is_full(error: &tokio_postgres::Error) -> bool {
    error.code() == Some(&tokio_postgres::error::SqlState::OUT_OF_MEMORY)
}

impl Place {
    async fn reset(&self, contents: &str) -> Result<Vec<String>, tokio_postgres::Error> {
        self.quiet().await?;
        let prepared = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()";
        for row in self.admin.query(prepared, &[]).await? {
            let gid: String = row.get(0);
            self.admin.batch_execute(&format!("ROLLBACK PREPARED '{}'", gid.replace('\'', "''"))).await?;
        }
        let changed = self.admin.query(DRIFT, &[]).await?.iter().map(|row| row.get(0)).collect();
        self.admin.batch_execute(PUT_BACK).await?;
        // One message is one transaction.
        self.admin.batch_execute(contents).await?;
        Ok(changed)
    }

    /// Waits until no tenant is in the middle of something; who stays in it is thrown out.
    async fn quiet(&self) -> Result<(), tokio_postgres::Error> {
        let start = Instant::now();
        loop {
            let patient = start.elapsed() < Duration::from_secs(1);
            let count = if patient { "count(*)" } else { "count(pg_terminate_backend(pid))" };
            let busy = "FROM pg_stat_activity WHERE usename = ANY($1) AND state <> 'idle'";
            let row = self.admin.query_one(&format!("SELECT {count} {busy}"), &[&self.tenants]).await?;
            if row.get::<_, i64>(0) == 0 {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The tenants' roles, their settings, default privileges, schemas and memberships, as the product made them.
const REMEMBER: &str = "
    SET lock_timeout = '5s';
    SET client_min_messages = 'error';
    CREATE TEMP VIEW tenant_roles AS SELECT oid, rolname FROM pg_roles WHERE rolname IN ('client_001', 'client_002');
    CREATE TEMP VIEW made AS
      SELECT 'role ' || rolname || ': ' || concat_ws(' ', rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin,
             rolreplication, rolbypassrls, rolconnlimit) AS what, false AS own
        FROM pg_roles WHERE oid IN (SELECT oid FROM tenant_roles)
      UNION ALL SELECT 'password of ' || rolname || ': ' || md5(rolpassword), true
        FROM pg_authid WHERE oid IN (SELECT oid FROM tenant_roles)
      UNION ALL SELECT 'settings of ' || coalesce(setrole::regrole::text, '') || ' in ' || setdatabase || ': '
             || array_to_string(setconfig, '; '), setrole IN (SELECT oid FROM tenant_roles)
        FROM pg_db_role_setting
      UNION ALL SELECT 'default privileges of ' || defaclrole::regrole || ' on ' || defaclobjtype::text || ': ' || defaclacl::text, true
        FROM pg_default_acl
      UNION ALL SELECT 'schema ' || nspname || ' of ' || nspowner::regrole || ': ' || coalesce(nspacl::text, ''), false
        FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_'
      UNION ALL SELECT 'database ' || datname || ' of ' || datdba::regrole || ': ' || coalesce(datacl::text, ''), false
        FROM pg_database
      UNION ALL SELECT member::regrole || ' is in ' || roleid::regrole, false FROM pg_auth_members;
    CREATE TEMP TABLE made_first AS SELECT * FROM made;
    CREATE TEMP TABLE authid_first AS SELECT * FROM pg_authid WHERE oid IN (SELECT oid FROM tenant_roles);
    CREATE TEMP TABLE setting_first AS SELECT * FROM pg_db_role_setting;";

/// What is not as it was, and is not a tenant's own to change.
const DRIFT: &str = "SELECT what FROM (SELECT what FROM made WHERE NOT own EXCEPT SELECT what FROM made_first) x";

/// Puts the roles back. The catalogs are written directly: that restores a password of which only the verifier is
/// known, and settings whatever they are.
const PUT_BACK: &str = "
    DO $$
    DECLARE
      r record;
    BEGIN
      IF NOT EXISTS ((SELECT what FROM made EXCEPT SELECT what FROM made_first)
                     UNION ALL (SELECT what FROM made_first EXCEPT SELECT what FROM made)) THEN
        RETURN;
      END IF;
      UPDATE pg_authid a SET rolpassword = f.rolpassword, rolconnlimit = f.rolconnlimit, rolvaliduntil = f.rolvaliduntil
        FROM authid_first f WHERE a.oid = f.oid;
      DELETE FROM pg_db_role_setting;
      INSERT INTO pg_db_role_setting SELECT * FROM setting_first;
      FOR r IN SELECT rolname FROM tenant_roles LOOP
        EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %I REVOKE ALL ON TABLES FROM PUBLIC', r.rolname);
        EXECUTE format('ALTER DEFAULT PRIVILEGES FOR ROLE %I REVOKE ALL ON SEQUENCES FROM PUBLIC', r.rolname);
      END LOOP;
      FOR r IN (SELECT what FROM made EXCEPT SELECT what FROM made_first)
               UNION ALL (SELECT what FROM made_first EXCEPT SELECT what FROM made) LOOP
        RAISE 'cannot be put back: %', r.what;
      END LOOP;
    END $$;";

/// Drops what tenants own in this database: what is in their schemas, then large objects and publications.
const EMPTY: &str = "
    DO $$
    DECLARE
      found record;
      thing record;
    BEGIN
      FOR found IN
        SELECT d.classid, d.objid FROM pg_depend d
        JOIN pg_shdepend s ON s.classid = d.classid AND s.objid = d.objid AND s.deptype = 'o'
         AND s.dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
        WHERE d.refclassid = 'pg_namespace'::regclass AND d.deptype = 'n' AND s.refobjid IN (SELECT oid FROM tenant_roles)
          AND d.refobjid IN (SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_')
          -- What belongs to something else (a column's sequence) goes with it.
          AND NOT EXISTS (SELECT FROM pg_depend i WHERE i.classid = d.classid AND i.objid = d.objid AND i.deptype IN ('a', 'i'))
      LOOP
        SELECT * INTO thing FROM pg_identify_object(found.classid, found.objid, 0);
        CONTINUE WHEN thing.identity IS NULL;
        EXECUTE format('DROP %s IF EXISTS %s CASCADE', replace(thing.type, 'composite ', ''), thing.identity);
      END LOOP;
      PERFORM lo_unlink(oid) FROM pg_largeobject_metadata WHERE lomowner IN (SELECT oid FROM tenant_roles);
    END $$;";
