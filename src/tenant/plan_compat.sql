-- Hardening of a database that tenants' roles log in to, both grades, as superuser. May be run again at any time;
-- `plan_strict.sql` goes further, `plan_unstrict.sql` takes back what that one took.

REVOKE ALL ON SCHEMA public FROM PUBLIC;

-- Extensions that tenants may use are installed by the operator into a schema that nobody can write to.
CREATE SCHEMA IF NOT EXISTS extensions;
GRANT USAGE ON SCHEMA extensions TO PUBLIC;

-- Shared name spaces and windows onto other tenants, as far as they can be closed without breaking psql's \d,
-- information_schema, pg_dump of a schema, or the introspection of the usual frameworks. Functions that this version
-- of PostgreSQL does not have are not found, and so skipped.
-- Large-object functions stay: drivers use them, objects belong to the role that made them, and lo_import and
-- lo_export (files of the server) are for superusers anyway.
-- pg_get_ruledef stays: psql's \d+ of a view calls it, and pg_get_viewdef shows as much.
-- pg_shdescription stays: psql's \l+ and \du+ read it, and tenants cannot write comments on what is shared.
DO $$
DECLARE
  found record;
BEGIN
  FOR found IN
    SELECT p.oid::pg_catalog.regprocedure AS name FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND (
         p.proname ~ '^pg_(try_)?advisory_'
      OR p.proname ~ '^(query|cursor|table|schema|database)_to_xml'
      OR p.proname ~ '^pg_stat_get_'
      OR p.proname ~ 'replication_slot'
      OR p.proname IN (
           'pg_notification_queue_usage', 'pg_partition_tree', 'pg_lock_status', 'pg_prepared_xact',
           'pg_blocking_pids', 'pg_safe_snapshot_blocking_pids', 'pg_current_wal_lsn', 'pg_current_wal_insert_lsn',
           'pg_current_wal_flush_lsn', 'pg_last_committed_xact', 'pg_xact_commit_timestamp', 'pg_export_snapshot',
           'pg_get_multixact_members', 'currtid2', 'pg_sequence_last_value', 'ts_stat'))
  LOOP
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', found.name);
  END LOOP;
  FOR found IN
    SELECT c.oid::pg_catalog.regclass AS name FROM pg_catalog.pg_class c
    WHERE c.relnamespace = 'pg_catalog'::pg_catalog.regnamespace AND c.relkind = 'v'
      AND (c.relname ~ '^pg_stat' OR c.relname IN ('pg_locks', 'pg_prepared_xacts', 'pg_rules', 'pg_replication_slots'))
  LOOP
    EXECUTE format('REVOKE ALL ON %s FROM PUBLIC', found.name);
  END LOOP;
END $$;

REVOKE ALL ON pg_catalog.pg_db_role_setting, pg_catalog.pg_largeobject_metadata FROM PUBLIC;
-- Earlier versions revoked these. NOTIFY knows no privileges, so that a refusal of pg_notify stops applications and
-- nobody else; the proxy delivers to a tenant what the tenant has sent.
GRANT SELECT ON pg_catalog.pg_shdescription TO PUBLIC;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_notify(text, text) TO PUBLIC;
REVOKE UPDATE ON pg_catalog.pg_settings FROM PUBLIC;

-- A key space of advisory locks per tenant, so that migration tools of two tenants do not wait for each other. The
-- functions have the names of PostgreSQL's own, which were revoked above, and stand before them on a tenant's path.
-- They run with the administrator's rights. So pg_temp stands on their path, last: where it does not stand, it comes first,
-- and a tenant's temporary type `text` with a CHECK would run the tenant's code with those rights.
CREATE SCHEMA IF NOT EXISTS tenant_shim;
GRANT USAGE ON SCHEMA tenant_shim TO PUBLIC;

-- The lock table is the whole server's, and nobody can log in while it is full: a tenant may have a sixteenth of it.
-- Counting takes longer than locking, so it is done for one lock in 32, chosen by a generator that no setseed() guides;
-- a tenant gets that much past the limit. Tenants cannot count: the functions below run it with their own rights.
CREATE OR REPLACE FUNCTION tenant_shim.pgusher_bound_locks() RETURNS void LANGUAGE plpgsql VOLATILE
  SET search_path = pg_catalog, pg_temp AS $f$
DECLARE
  most bigint := greatest(64, current_setting('max_locks_per_transaction')::bigint
                              * current_setting('max_connections')::bigint / 16);
  held bigint;
BEGIN
  SELECT count(*) INTO held FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_get_activity(NULL) a ON a.pid = l.pid
  WHERE l.locktype = 'advisory' AND a.usesysid = (SELECT r.oid FROM pg_catalog.pg_roles r WHERE r.rolname = session_user);
  IF held >= most THEN
    RAISE EXCEPTION USING
      ERRCODE = 'configuration_limit_exceeded',
      MESSAGE = 'too many advisory locks',
      DETAIL = format('This tenant holds %s; a server that tenants share gives each of them at most %s.', held, most),
      HINT = 'Release some of them, or take one lock for many things.';
  END IF;
END $f$;
REVOKE EXECUTE ON FUNCTION tenant_shim.pgusher_bound_locks() FROM PUBLIC;

DO $$
DECLARE
  found record;
  key text;
  bound text;
BEGIN
  FOR found IN
    SELECT p.proname, p.pronargs, p.prorettype::pg_catalog.regtype AS returns,
           pg_catalog.pg_get_function_identity_arguments(p.oid) AS arguments
    FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND p.proname ~ '^pg_(try_)?advisory_'
  LOOP
    key := CASE found.pronargs
      WHEN 1 THEN 'pg_catalog.hashtextextended(session_user::pg_catalog.text, $1)'
      WHEN 2 THEN 'pg_catalog.hashtextextended(session_user::pg_catalog.text || $1::pg_catalog.text || '','' || $2::pg_catalog.text, 1)'
      ELSE '' END;
    bound := CASE WHEN found.proname ~ 'unlock' THEN '' ELSE
      'SELECT tenant_shim.pgusher_bound_locks() '
      'WHERE pg_catalog.get_byte(pg_catalog.uuid_send(pg_catalog.gen_random_uuid()), 0) < 8; ' END;
    EXECUTE format(
      'CREATE OR REPLACE FUNCTION tenant_shim.%I(%s) RETURNS %s LANGUAGE sql VOLATILE SECURITY DEFINER '
      'SET search_path = pg_catalog, pg_temp AS $f$ %sSELECT pg_catalog.%I(%s) $f$',
      found.proname, found.arguments, found.returns, bound, found.proname, key);
  END LOOP;
END $$;

-- How many session-level locks of its own a session holds, for the proxy, which asks as the tenant before it lends the
-- connection to another client of that tenant. Transaction-level locks are gone by then.
CREATE OR REPLACE FUNCTION tenant_shim.pgusher_held_locks() RETURNS bigint LANGUAGE sql VOLATILE SECURITY DEFINER
  SET search_path = pg_catalog, pg_temp AS $f$
  SELECT count(*) FROM pg_catalog.pg_locks WHERE locktype = 'advisory' AND pid = pg_catalog.pg_backend_pid() $f$;

-- Replication slots are the whole server's, and REPLICATION is a right to all of them. So the functions that take one by
-- its name, or make one, were revoked above; those below do the same for logical slots of this database, for roles with
-- REPLICATION. (The functions pg_logical_slot_* look at the slot's database themselves.)

CREATE OR REPLACE FUNCTION tenant_shim.pgusher_may_replicate(slot name) RETURNS void LANGUAGE plpgsql VOLATILE
  SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.rolname = session_user AND (r.rolreplication OR r.rolsuper)) THEN
    RAISE EXCEPTION USING
      ERRCODE = 'insufficient_privilege',
      MESSAGE = 'permission denied to use replication slots',
      DETAIL = 'Only roles with the REPLICATION attribute may use replication slots.';
  END IF;
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots s
                 WHERE s.slot_name = slot AND s.database = current_database()) AND slot IS NOT NULL THEN
    IF EXISTS (SELECT FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = slot) THEN
      RAISE EXCEPTION USING
        ERRCODE = 'insufficient_privilege',
        MESSAGE = format('permission denied for replication slot "%s"', slot),
        DETAIL = 'It is not one of this database.';
    END IF;
    RAISE EXCEPTION USING
      ERRCODE = 'undefined_object',
      MESSAGE = format('replication slot "%s" does not exist', slot);
  END IF;
END $f$;
REVOKE EXECUTE ON FUNCTION tenant_shim.pgusher_may_replicate(name) FROM PUBLIC;

-- PostgreSQL would load any library by its path.
CREATE OR REPLACE FUNCTION tenant_shim.pgusher_may_make_slot(plugin name, failover boolean) RETURNS void
  LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  PERFORM tenant_shim.pgusher_may_replicate(NULL);
  IF plugin NOT IN ('pgoutput', 'test_decoding', 'wal2json', 'decoderbufs') THEN
    RAISE EXCEPTION USING
      ERRCODE = 'insufficient_privilege',
      MESSAGE = 'permission denied for this output plugin',
      DETAIL = 'Tenants that share a server use pgoutput, test_decoding, wal2json or decoderbufs.';
  END IF;
  IF failover AND current_setting('server_version_num')::int < 170000 THEN
    RAISE EXCEPTION USING ERRCODE = 'feature_not_supported', MESSAGE = 'failover slots need PostgreSQL 17';
  END IF;
END $f$;
REVOKE EXECUTE ON FUNCTION tenant_shim.pgusher_may_make_slot(name, boolean) FROM PUBLIC;

-- The same arguments on every version, so that a server that is upgraded does not end up with two of them.
DO $$
BEGIN
  EXECUTE format(
    'CREATE OR REPLACE FUNCTION tenant_shim.pg_create_logical_replication_slot(slot_name name, plugin name, '
    'temporary boolean DEFAULT false, twophase boolean DEFAULT false, failover boolean DEFAULT false, '
    'OUT slot_name name, OUT lsn pg_lsn) LANGUAGE sql VOLATILE STRICT SECURITY DEFINER '
    'SET search_path = pg_catalog, pg_temp AS $f$ SELECT tenant_shim.pgusher_may_make_slot($2, $5); '
    'SELECT * FROM pg_catalog.pg_create_logical_replication_slot($1, $2, $3, $4%s) $f$',
    CASE WHEN current_setting('server_version_num')::int >= 170000 THEN ', $5' ELSE '' END);
END $$;

CREATE OR REPLACE FUNCTION tenant_shim.pg_drop_replication_slot(slot_name name) RETURNS void
  LANGUAGE sql VOLATILE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
  SELECT tenant_shim.pgusher_may_replicate($1); SELECT pg_catalog.pg_drop_replication_slot($1) $f$;

CREATE OR REPLACE FUNCTION tenant_shim.pg_replication_slot_advance(slot_name name, upto_lsn pg_lsn,
    OUT slot_name name, OUT end_lsn pg_lsn)
  LANGUAGE sql VOLATILE STRICT SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
  SELECT tenant_shim.pgusher_may_replicate($1); SELECT * FROM pg_catalog.pg_replication_slot_advance($1, $2) $f$;

-- What the proxy says in the place of a tenant's DROP_REPLICATION_SLOT. It never waits inside the server's own function,
-- which would drop whatever has the name when the wait is over.
CREATE OR REPLACE PROCEDURE tenant_shim.pgusher_drop_slot(slot name, wait boolean) LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, pg_temp AS $f$
BEGIN
  LOOP
    PERFORM tenant_shim.pgusher_may_replicate(slot);
    BEGIN
      PERFORM pg_catalog.pg_drop_replication_slot(slot);
      RETURN;
    EXCEPTION WHEN object_in_use THEN
      IF NOT wait THEN
        RAISE;
      END IF;
    END;
    PERFORM pg_catalog.pg_sleep(0.05);
  END LOOP;
END $f$;

-- Columns of PostgreSQL 15, so that it need never be made anew: that would wait for whoever reads it.
CREATE OR REPLACE FUNCTION tenant_shim.pgusher_slots() RETURNS TABLE (slot_name name, plugin name, slot_type text,
    datoid oid, database name, temporary boolean, active boolean, active_pid integer, xmin xid, catalog_xmin xid,
    restart_lsn pg_lsn, confirmed_flush_lsn pg_lsn, wal_status text, safe_wal_size bigint, two_phase boolean)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $f$
  SELECT s.slot_name, s.plugin, s.slot_type, s.datoid, s.database, s.temporary, s.active, s.active_pid, s.xmin,
         s.catalog_xmin, s.restart_lsn, s.confirmed_flush_lsn, s.wal_status, s.safe_wal_size, s.two_phase
  FROM pg_catalog.pg_replication_slots s WHERE s.database = current_database() $f$;
DO $$
BEGIN
  IF pg_catalog.to_regclass('tenant_shim.pg_replication_slots') IS NULL THEN
    CREATE VIEW tenant_shim.pg_replication_slots AS SELECT * FROM tenant_shim.pgusher_slots();
    GRANT SELECT ON tenant_shim.pg_replication_slots TO PUBLIC;
  END IF;
END $$;
