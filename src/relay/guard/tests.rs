//! What the guard refuses, and what it must not.

use super::super::scan;
use super::*;

fn is_tenant(name: &str) -> bool {
    matches!(name, "client_002" | "client_003" | "users" | "shop" | "new-york")
}

/// As the relay does it: look, and read only if the look says so.
fn guard(sql: &str, neighbours: Neighbours, lex: Lex) -> Option<Refusal> {
    let seat = Seat { role: "client_001", neighbours, is_tenant: &is_tenant };
    let seen = scan::look(sql.as_bytes(), lex, |name| is_tenant(&String::from_utf8_lossy(name)));
    let verdict = judge(sql.as_bytes(), lex, &seat);
    assert!(seen.suspicious || verdict.is_none(), "refused, but the scan would not have had it read: {sql}");
    verdict.filter(|_| seen.suspicious)
}

fn refused(sql: &str) -> bool {
    guard(sql, Neighbours::Schemas, Lex::default()).is_some()
}

/// Spellings of the attack corpus and their relatives.
const REFUSED: &[&str] = &[
    "SET search_path = client_002",
    "SET SESSION search_path = client_002, public",
    "SET LOCAL search_path TO client_001, 'client_002'",
    "BEGIN; SET LOCAL search_path = client_002; SELECT note FROM bookings; COMMIT",
    "SET LOCAL SCHEMA 'client_002'; SELECT note FROM bookings",
    "SET SCHEMA E'client\\x5f002'",
    "SET \"SEARCH_PATH\" = client_002",
    "SET U&\"!0073earch_path\" UESCAPE '!' = client_002",
    "set search_path to U&'client!005F002' uescape '!'",
    "SET/**/search_path/* a /* nested */ b */=--x\nclient_002",
    "SET/**/search_path = --x\rclient_002",
    "/* ' */ SELECT '/*' ; SET search_path = client_002; SELECT note FROM bookings -- */ '",
    "SET search_path = CLIENT_002",
    "SET search_path = \"new-york\"",
    "DECLARE c CURSOR FOR SELECT set_config('search_path','client_002',false)",
    "SELECT pg_catalog . set_config ( 'Search_Path' , '\"client_002\", public' , false )",
    "SELECT \"set_config\"('search_path','client_002',false)",
    "SELECT U&\"set\\005fconfig\"('search_path','client_002',false)",
    "COPY (SELECT set_config('search_path','client_002',false)) TO STDOUT",
    "CREATE TEMP TABLE t_sp AS SELECT set_config('search_path','client_002',false)",
    "CREATE DOMAIN d_sp AS int CHECK (set_config('search_path','client_002',false) IS NOT NULL); SELECT 1::d_sp",
    "CREATE RULE r AS ON INSERT TO t_rl DO INSTEAD SELECT set_config('search_path','client_002',false)",
    "SELECT 1 ORDER BY set_config('search_path','client_002',false)",
    "CREATE PROCEDURE pr() LANGUAGE plpgsql AS $$ BEGIN SET search_path = client_002; COMMIT; END $$; CALL pr()",
    "EXECUTE p('search_path','client_002')",
    "UPDATE pg_settings SET setting='client_002' WHERE name='search_path'",
    "UPDATE pg_catalog.pg_settings SET setting='client_002' WHERE name='role'",
    "SET ROLE client_002",
    "SET LOCAL ROLE client_002",
    "SET SESSION ROLE client_002",
    "SET \"role\" = client_002",
    "SET U&\"r\\006Fle\" TO 'client_002'",
    "SET ROLE app_tenants",
    "select 1;;  set role 'postgres'",
    "SELECT set_config('role','client_002',false)",
    "DO $$ BEGIN SET ROLE client_002; END $$",
    "DO $$ BEGIN EXECUTE 'SET ROLE client_002'; END $$",
    "DO LANGUAGE plpgsql $x$ BEGIN IF true THEN SET ROLE client_002; END IF; END $x$",
    "SET SESSION AUTHORIZATION client_002",
    "SET LOCAL SESSION AUTHORIZATION 'client_002'",
    "SET session_authorization = client_002",
    "PREPARE p AS SELECT set_config('role','client_002',false)",
    "CREATE FUNCTION pg_temp.fr() RETURNS text LANGUAGE sql SET role = 'client_002' AS $$ SELECT current_user::text $$",
    "CREATE OR REPLACE FUNCTION f() RETURNS text LANGUAGE sql SET search_path = client_002 AS 'SELECT 1'",
    "ALTER FUNCTION f() SET search_path TO client_001, client_002",
    "ALTER ROLE client_002 PASSWORD 'x'",
    "ALTER ROLE client_001 SET role = 'client_002'",
    "ALTER ROLE CURRENT_USER SET search_path = client_002",
    "ALTER ROLE ALL SET search_path = client_001",
    "CREATE ROLE me2 LOGIN",
    "CREATE USER x",
    "DROP ROLE IF EXISTS client_002",
    "REASSIGN OWNED BY client_002 TO client_001",
    "DROP OWNED BY client_002",
    "GRANT client_002 TO client_001",
    "GRANT pg_read_all_data TO client_001",
    "ALTER ROLE client_001 BYPASSRLS",
    "ALTER USER CURRENT_USER WITH SUPERUSER",
    "GRANT USAGE ON SCHEMA client_002 TO client_001",
    "GRANT SELECT ON ALL TABLES IN SCHEMA client_002 TO client_001",
    "ALTER TABLE t OWNER TO client_002",
    "ALTER TABLE zmove SET SCHEMA client_002",
    "DROP SCHEMA client_002 CASCADE",
    "DROP SCHEMA a, client_002",
    "CREATE SCHEMA IF NOT EXISTS client_002",
    "CREATE SCHEMA AUTHORIZATION client_002",
    "SELECT note FROM client_002.bookings",
    "SELECT note FROM \"client_002\".\"bookings\"",
    "SELECT note FROM U&\"client\\005F002\".U&\"b\\006Fokings\"",
    "TABLE client_002.bookings",
    "SELECT note FROM ONLY client_002 . /* x */ bookings",
    "SELECT note FROM client_002 -- x\n . bookings",
    "WITH x AS (SELECT note FROM client_002.users) SELECT * FROM x",
    "SELECT * FROM mine, client_002.bookings",
    "SELECT * FROM (client_002.bookings JOIN b USING (id))",
    "SELECT note AS client_002 FROM client_002.bookings",
    "SELECT client_002.bookings.note FROM bookings",
    "INSERT INTO client_002.bookings(note) VALUES('PWNED')",
    "UPDATE client_002.bookings SET note='PWNED'",
    "DELETE FROM client_002.bookings",
    "MERGE INTO client_002.bookings t USING (SELECT 1) s ON true WHEN MATCHED THEN UPDATE SET note='PWNED'",
    "CREATE VIEW vx AS SELECT * FROM client_002.bookings",
    "CREATE TABLE inh() INHERITS (client_002.bookings)",
    "CREATE TABLE lk (LIKE client_002.bookings INCLUDING ALL)",
    "CREATE TABLE fk(i bigint REFERENCES client_002.users(id))",
    "SELECT last_value FROM client_002.bookings_id_seq",
    "CREATE FUNCTION client_002.lower(text) RETURNS text LANGUAGE sql AS 'select $1'",
    "SELECT client_002.f()",
    "SELECT 'a'::client_002.mood",
    "SELECT 1 OPERATOR(client_002.+) 2",
    "VACUUM client_002.bookings",
    "REINDEX TABLE client_002.bookings",
    "REINDEX SCHEMA client_002",
    "LOCK TABLE client_002.bookings",
    "COPY client_002.bookings TO STDOUT",
    "CREATE PUBLICATION pp FOR TABLE client_002.bookings",
    "DO $$ DECLARE r record; BEGIN SELECT * INTO r FROM client_002.bookings; END $$",
    "SELECT note FROM CLIENT_002.bookings",
    "COPY t FROM PROGRAM 'id'",
    "copy (select 1) to program 'sh'",
    "LOAD 'auto_explain'",
    "ALTER SYSTEM SET work_mem = '1GB'",
    "alter/**/system reset all",
    "PREPARE TRANSACTION 'gid'",
    "IDENTIFY_SYSTEM",
    "START_REPLICATION SLOT x LOGICAL 0/0",
    "BASE_BACKUP",
    "SELECT 'a\\' ; SET ROLE client_002 --'",
];

/// What nobody sees in the text; the wall is there for it.
const THE_WALLS: &[&str] = &[
    "DO $$ BEGIN EXECUTE 'SET RO'||'LE client_002'; END $$",
    "SELECT set_config('ro'||'le', 'client_002', false)",
    "SELECT set_config($1, $2, false)",
    "SELECT nextval('client_002.bookings_id_seq')",
    "SELECT query_to_xml('select note from client_002.bookings',true,true,'')",
    "SELECT dyn('client_002.bookings')",
];

/// What applications, drivers and their pools send. Nothing of it may be refused.
const ORDINARY: &[&str] = &[
    "",
    ";",
    "SELECT abalance FROM pgbench_accounts WHERE aid = 123;",
    "UPDATE pgbench_tellers SET tbalance = tbalance + -5 WHERE tid = 3;",
    // Resets of pools: asyncpg, Npgsql, pgx, others.
    "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;",
    "DISCARD ALL",
    "DISCARD TEMP;DISCARD SEQUENCES",
    "SET SESSION AUTHORIZATION DEFAULT;RESET ALL;CLOSE ALL;UNLISTEN *;SELECT pg_advisory_unlock_all();DISCARD SEQUENCES;\
     DISCARD TEMP",
    "SET SESSION AUTHORIZATION DEFAULT",
    "SET LOCAL SESSION AUTHORIZATION DEFAULT",
    "RESET SESSION AUTHORIZATION",
    "RESET ROLE",
    "SET ROLE NONE",
    "SET ROLE 'none'",
    "SET LOCAL ROLE NONE",
    "SET ROLE client_001",
    "SET SESSION AUTHORIZATION \"client_001\"",
    "SELECT set_config('role','none',false)",
    "SELECT set_config('role', 'client_001', true)",
    // What libraries send when they connect.
    "SELECT pg_catalog.set_config('search_path', '', false);",
    "SET statement_timeout = 0",
    "SET client_encoding = 'UTF8'",
    "SET standard_conforming_strings = on",
    "SET client_min_messages = warning",
    "SET row_security = off",
    "SET default_tablespace = ''",
    "SET default_table_access_method = heap",
    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
    "SET TRANSACTION SNAPSHOT '00000003-0000001B-1'",
    "SET TIME ZONE 'UTC'",
    "SET SESSION TIME ZONE INTERVAL '+00:00' HOUR TO MINUTE",
    "SET extra_float_digits = 3",
    "SET application_name = 'PostgreSQL JDBC Driver'",
    "SET NAMES 'utf8'",
    "SET DateStyle=ISO; SET client_min_messages to notice",
    "SELECT set_config('TimeZone', 'UTC', false)",
    "SELECT set_config('jit', 'off', false)",
    "SELECT set_config('bytea_output','hex',false) FROM pg_show_all_settings() WHERE name = 'bytea_output'",
    "UPDATE pg_settings SET setting = 'hex' WHERE name = 'bytea_output'",
    "SELECT setting FROM pg_settings WHERE name = 'role'",
    "SHOW search_path",
    "SHOW TRANSACTION ISOLATION LEVEL",
    "SELECT current_setting('server_version_num')::int/100 as version",
    "select current_schema(), session_user",
    "SELECT TRUE AS \"is\" FROM pg_catalog.pg_user WHERE usename = current_user",
    // search_path to what is one's own or everybody's.
    "SET search_path = client_001",
    "SET search_path TO \"client_001\", public, pg_catalog, tenant_shim, \"$user\", pg_temp, extensions",
    "SET search_path = 'client_001','public'",
    "SET search_path TO DEFAULT",
    "SET search_path = ''",
    "SET SCHEMA 'client_001'",
    "RESET search_path",
    // A table, an alias, a column that is called as a tenant is.
    "SELECT \"users\".\"id\", \"users\".\"email\" FROM \"users\" WHERE \"users\".\"id\" = 1",
    "SELECT users.id FROM users JOIN orders ON orders.user_id = users.id",
    "SELECT users.id FROM public.users",
    "SELECT shop.name FROM shops shop",
    "SELECT shop.name FROM shops AS shop ORDER BY shop.name",
    "SELECT shop.n FROM (SELECT 1 AS n) shop",
    "SELECT * FROM a, users WHERE users.id = a.id",
    "UPDATE users SET name = 'x' WHERE users.id = 2",
    "UPDATE \"users\" SET role = 'admin', search_path = 'client_002'",
    "DELETE FROM users USING orders WHERE users.id = orders.user_id",
    "INSERT INTO users (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET name = excluded.name WHERE users.id > 0",
    "SELECT extract(year FROM users.created_at) FROM users",
    "SELECT 1 FROM users WHERE users.a IS DISTINCT FROM users.b",
    "SELECT substring(users.a FROM users.b) FROM users",
    "SELECT users.* FROM users FOR UPDATE OF users",
    "SELECT count(users.id) FROM users WHERE users.id IN (1)",
    "WITH users AS (SELECT 1 AS id) SELECT users.id FROM users",
    "ALTER TABLE users ALTER COLUMN a TYPE int USING users.a::int",
    "CREATE INDEX ON users (lower(email))",
    "CREATE TABLE users (id int PRIMARY KEY, role text, shop text)",
    "DROP TABLE IF EXISTS users",
    "GRANT SELECT ON users TO client_001",
    "GRANT SELECT (id), UPDATE (id) ON TABLE t TO PUBLIC",
    "REVOKE ALL ON ALL TABLES IN SCHEMA client_001 FROM PUBLIC",
    "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO client_001",
    "CREATE INDEX i ON users USING btree (role)",
    // Literals and comments are nobody's names.
    "SELECT 'client_002.bookings'",
    "INSERT INTO notes VALUES ('SET ROLE client_002; SELECT * FROM client_002.bookings')",
    "INSERT INTO notes VALUES ($$ it''s set_config('role','client_002',false) $$)",
    "SELECT 1 -- FROM client_002.bookings\n",
    "/* client_002.bookings */ SELECT 1",
    // Catalogs and what everybody shares.
    "SELECT n.nspname FROM pg_catalog.pg_namespace n WHERE n.nspname = 'client_002'",
    "SELECT * FROM information_schema.tables WHERE table_schema = 'client_001'",
    "SELECT extensions.uuid_generate_v4()",
    "SELECT * FROM client_001.bookings",
    "SELECT 1::pg_catalog.int4",
    "SELECT a OPERATOR(pg_catalog.~) 'x' FROM t",
    "SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relname OPERATOR(pg_catalog.~) '^(users)$' COLLATE pg_catalog.default",
    // Definitions.
    "CREATE EXTENSION IF NOT EXISTS \"uuid-ossp\"",
    "CREATE SCHEMA IF NOT EXISTS client_001",
    "CREATE USER MAPPING FOR CURRENT_USER SERVER s",
    "ALTER ROLE CURRENT_USER SET work_mem = '8MB'",
    "ALTER ROLE client_001 SET search_path = client_001",
    "ALTER USER client_001 WITH PASSWORD 'x'",
    "ALTER TABLE bookings OWNER TO postgres",
    "CREATE DATABASE test_app",
    "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql SET search_path = client_001, pg_temp AS $$ \
     BEGIN NEW.role := 'x'; UPDATE users SET role = 'y' WHERE users.id = NEW.id; RETURN NEW; END $$",
    "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_type WHERE typname = 'mood') THEN CREATE TYPE mood AS ENUM ('a'); END IF; \
     END $$",
    "CREATE TABLE t (program text); COPY t (program) FROM STDIN",
    "COPY program FROM STDIN WITH (FORMAT csv)",
    "PREPARE p AS SELECT 1",
    "EXECUTE p('role')",
    "EXPLAIN (ANALYZE) SELECT 1",
    "SELECT role FROM t",
    "LISTEN a",
    "VACUUM ANALYZE",
    "select t.users from t",
];

#[test]
fn what_reaches_for_others_is_refused() {
    let missed: Vec<_> = REFUSED.iter().filter(|sql| !refused(sql)).collect();
    assert!(missed.is_empty(), "let through: {missed:#?}");
}

#[test]
fn what_applications_send_is_not() {
    let wrong: Vec<_> = ORDINARY.iter().filter(|sql| refused(sql)).collect();
    assert!(wrong.is_empty(), "refused: {wrong:#?}");
}

#[test]
fn what_cannot_be_seen_passes() {
    for sql in THE_WALLS {
        assert!(!refused(sql), "{sql}");
    }
}

#[test]
fn a_literal_ends_where_the_session_says() {
    let sql = "SELECT 'a\\' ; SET ROLE client_002 --'";
    assert!(refused(sql), "with standard_conforming_strings the literal ends at the backslash");
    let off = Lex { backslashes: true, ..Lex::default() };
    assert_eq!(guard(sql, Neighbours::Schemas, off), None);
    let sql = "SELECT 'a\\' || '; SET ROLE client_002 --'";
    assert!(!refused(sql));
    assert!(guard(sql, Neighbours::Schemas, off).is_some());
}

#[test]
fn what_a_name_means_depends_on_the_plan() {
    let guard = |sql, neighbours| guard(sql, neighbours, Lex::default()).is_some();
    for (sql, schemas, databases, rows) in [
        ("SET ROLE client_002", true, true, true),
        ("SELECT * FROM client_002.bookings", true, false, false),
        ("SET search_path = client_002", true, false, false),
        ("SELECT * FROM client_002.public.bookings", true, true, false),
        ("ALTER DATABASE client_002 SET default_transaction_read_only = on", true, true, true),
        ("CREATE DATABASE stolen TEMPLATE client_002", true, true, true),
        ("DROP SCHEMA client_002", true, false, false),
    ] {
        assert_eq!(guard(sql, Neighbours::Schemas), schemas, "{sql}");
        assert_eq!(guard(sql, Neighbours::Databases), databases, "{sql}");
        assert_eq!(guard(sql, Neighbours::Rows), rows, "{sql}");
        assert!(!guard(sql, Neighbours::None), "{sql}");
    }
}

#[test]
fn a_refusal_says_what_why_and_the_way_out() {
    let refusal = guard("select * from Client_002.x", Neighbours::Schemas, Lex::default()).unwrap();
    let error = refusal.error();
    assert_eq!(error.code, "42501");
    assert_eq!(error.message, "permission denied: schema \"client_002\"");
    assert_eq!(error.detail.unwrap(), "It belongs to another tenant.");
    assert!(error.hint.is_some());
}

#[test]
fn a_fingerprint_keeps_nothing_of_what_was_written() {
    let print = |sql: &str| fingerprint(sql.as_bytes(), Lex::default());
    assert_eq!(print("SELECT 'secret', 1  -- a\nFROM T"), print("select $1,$$x$$ from t"));
    assert_ne!(print("select 1 from t"), print("select 1 from u"));
    assert_eq!(print("select 1").len(), 16);
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_it_panic(sql in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
        let seat = Seat { role: "client_001", neighbours: Neighbours::Schemas, is_tenant: &is_tenant };
        judge(&sql, Lex::default(), &seat);
        fingerprint(&sql, Lex::default());
    }

    #[test]
    fn no_statement_makes_it_panic(words in proptest::collection::vec(
        proptest::sample::select(vec!["set", "session", "role", "=", "to", "(", ")", ".", ",", ";", "client_002", "'x'",
            "alter", "create", "function", "schema", "user", "as", "$$ set role x $$", "do", "execute", "grant", "on",
            "from", "set_config", "'role'", "pg_settings", "update", "search_path", "drop", "owned", "copy", "prepare"]),
        0..14)) {
        let sql = words.join(" ");
        let seat = Seat { role: "client_001", neighbours: Neighbours::Schemas, is_tenant: &is_tenant };
        let verdict = judge(sql.as_bytes(), Lex::default(), &seat);
        if verdict.is_some() {
            let seen = scan::look(sql.as_bytes(), Lex::default(), |name| is_tenant(&String::from_utf8_lossy(name)));
            proptest::prop_assert!(seen.suspicious, "{}", sql);
        }
    }
}
