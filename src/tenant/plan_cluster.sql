-- Once per cluster, as superuser, in database postgres. May be run again at any time.

REVOKE ALL ON DATABASE postgres FROM PUBLIC;
REVOKE ALL ON DATABASE template1 FROM PUBLIC;

DO $$
BEGIN
  -- Owns what tenants must not own: their schemas. Nobody logs in as it.
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'provisioner') THEN
    CREATE ROLE provisioner NOLOGIN;
  END IF;
  -- Carries CONNECT and TEMP for all tenants: a grant per tenant would make the database's ACL, and with it each
  -- further grant, grow with the number of tenants.
  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'app_tenants') THEN
    CREATE ROLE app_tenants NOLOGIN;
  END IF;
END $$;
