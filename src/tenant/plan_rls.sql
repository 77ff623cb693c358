-- The database that tenants of plan `rls` share, as superuser, after hardening. May be run again at any time.

-- The owner makes the tables; it also needs the schema because checks of foreign keys run as the tables' owner.
GRANT USAGE, CREATE ON SCHEMA public TO provisioner;
GRANT USAGE ON SCHEMA public TO app_tenants;
