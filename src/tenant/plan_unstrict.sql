-- Takes back `plan_strict.sql`, so that a database that was `strict` is `compat` again. Run by superuser, before
-- `plan_compat.sql`. What it grants is what a fresh PostgreSQL grants.

DO $$
DECLARE
  found record;
BEGIN
  FOR found IN
    SELECT p.oid::pg_catalog.regprocedure AS name FROM pg_catalog.pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace AND (
         (p.proname ~ '^(lo_|loread|lowrite)' AND p.proname NOT IN ('lo_import', 'lo_export'))
      OR p.proname IN (
           'pg_get_viewdef', 'pg_get_ruledef', 'pg_get_functiondef', 'pg_get_function_sqlbody',
           'pg_partition_ancestors', 'pg_partition_root',
           'pg_relation_size', 'pg_table_size', 'pg_indexes_size', 'pg_total_relation_size', 'pg_database_size',
           'pg_tablespace_size', 'pg_relation_filenode', 'pg_relation_filepath',
           'pg_describe_object', 'pg_identify_object', 'pg_identify_object_as_address',
           'pg_get_wal_resource_managers', 'pg_timezone_names'))
  LOOP
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', found.name);
  END LOOP;
END $$;

GRANT SELECT ON pg_catalog.pg_roles, pg_catalog.pg_user, pg_catalog.pg_group, pg_catalog.pg_sequences,
  pg_catalog.pg_views, pg_catalog.pg_auth_members, pg_catalog.pg_shdepend, pg_catalog.pg_description,
  pg_catalog.pg_database, pg_catalog.pg_tablespace TO PUBLIC;

DO $$
DECLARE
  name text;
BEGIN
  FOREACH name IN ARRAY ARRAY['pg_proc', 'pg_class', 'pg_rewrite', 'pg_policy', 'pg_trigger', 'pg_foreign_server',
                              'pg_foreign_table']
  LOOP
    -- Takes the grants on single columns with it.
    EXECUTE format('REVOKE ALL ON pg_catalog.%I FROM PUBLIC', name);
    EXECUTE format('GRANT SELECT ON pg_catalog.%I TO PUBLIC', name);
  END LOOP;
END $$;
