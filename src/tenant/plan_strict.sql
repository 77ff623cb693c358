-- Hardening `strict`, after `plan_compat.sql`, as superuser. May be run again at any time.
-- Breaks psql's \d, \l, \du, pg_dump as the tenant, the introspection of most frameworks, and large objects.

DO $$
DECLARE
  found record;
BEGIN
  FOR found IN
    SELECT p.oid::pg_catalog.regprocedure AS name FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND (
         p.proname ~ '^(lo_|loread|lowrite)'
      OR p.proname IN (
           'pg_get_viewdef', 'pg_get_ruledef', 'pg_get_functiondef', 'pg_get_function_sqlbody',
           'pg_partition_ancestors', 'pg_partition_root',
           'pg_relation_size', 'pg_table_size', 'pg_indexes_size', 'pg_total_relation_size', 'pg_database_size',
           'pg_tablespace_size', 'pg_relation_filenode', 'pg_relation_filepath',
           'pg_describe_object', 'pg_identify_object', 'pg_identify_object_as_address',
           'pg_get_wal_resource_managers', 'pg_timezone_names'))
  LOOP
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', found.name);
  END LOOP;
END $$;

REVOKE ALL ON pg_catalog.pg_roles, pg_catalog.pg_user, pg_catalog.pg_group, pg_catalog.pg_sequences,
  pg_catalog.pg_views, pg_catalog.pg_auth_members, pg_catalog.pg_shdepend, pg_catalog.pg_description,
  pg_catalog.pg_database, pg_catalog.pg_tablespace FROM PUBLIC;

-- Of these a tenant sees all columns but the ones that hold source text, defaults and row counts of others.
DO $$
DECLARE
  found record;
  columns text;
BEGIN
  FOR found IN
    SELECT * FROM (VALUES
      ('pg_proc', ARRAY['prosrc', 'prosqlbody', 'proargdefaults', 'proconfig']),
      ('pg_class', ARRAY['reltuples', 'relpages', 'relallvisible', 'relfrozenxid', 'relminmxid']),
      ('pg_rewrite', ARRAY['ev_qual', 'ev_action']),
      ('pg_policy', ARRAY['polqual', 'polwithcheck']),
      ('pg_trigger', ARRAY['tgargs', 'tgqual']),
      ('pg_foreign_server', ARRAY['srvoptions']),
      ('pg_foreign_table', ARRAY['ftoptions'])) AS hidden (name, columns)
  LOOP
    SELECT pg_catalog.string_agg(pg_catalog.quote_ident(a.attname), ', ') INTO columns FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = ('pg_catalog.' || found.name)::pg_catalog.regclass AND a.attnum > 0 AND NOT a.attisdropped
      AND a.attname <> ALL (found.columns);
    EXECUTE format('REVOKE ALL ON pg_catalog.%I FROM PUBLIC', found.name);
    EXECUTE format('GRANT SELECT (%s) ON pg_catalog.%I TO PUBLIC', columns, found.name);
  END LOOP;
END $$;
