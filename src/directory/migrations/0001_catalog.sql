-- The catalog, first version. Run by pgusher inside one transaction, under its lock.

-- Tenants' roles may live in the same cluster; they have no business here.
DO $$
BEGIN
  EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
  EXECUTE 'REVOKE ALL ON SCHEMA public FROM PUBLIC';
END $$;

-- Every followed row carries the transaction that changed it last (changed_in). A proxy remembers a snapshot and asks
-- for the rows whose transaction that snapshot does not see. Unlike numbers from a sequence, which are drawn before
-- commit and so can appear out of order, that misses nothing, whatever order transactions commit in.

CREATE TABLE pgusher.shards (
  name                text PRIMARY KEY CHECK (name <> ''),
  host                text NOT NULL CHECK (host <> ''),
  port                integer NOT NULL CHECK (port BETWEEN 1 AND 65535),
  database            text NOT NULL CHECK (database <> ''),
  weight              integer NOT NULL DEFAULT 100 CHECK (weight >= 0),
  region              text NOT NULL DEFAULT '',
  max_db_connections  integer CHECK (max_db_connections > 0),
  created_at          timestamptz NOT NULL DEFAULT now(),
  changed_at          timestamptz NOT NULL DEFAULT now(),
  changed_in          xid8 NOT NULL DEFAULT pg_current_xact_id()
);

-- Where a tenant is, every part of its home written down: what a config or a ring says later moves nobody.
CREATE TABLE pgusher.tenants (
  id          text PRIMARY KEY,
  plan        text NOT NULL,
  shard       text NOT NULL REFERENCES pgusher.shards (name),
  database    text NOT NULL,
  schema      text NOT NULL,
  role        text NOT NULL,
  status      text NOT NULL CHECK (status IN ('creating', 'active', 'suspended', 'deleting', 'deleted')),
  epoch       bigint NOT NULL DEFAULT 1,
  -- Which attempt is making it (a number drawn by that attempt): only that one may take the row back.
  attempt     bigint,
  created_at  timestamptz NOT NULL DEFAULT now(),
  changed_at  timestamptz NOT NULL DEFAULT now(),
  deleted_at  timestamptz,
  changed_in  xid8 NOT NULL DEFAULT pg_current_xact_id()
);

CREATE TABLE pgusher.credentials (
  name            text PRIMARY KEY,
  kind            text NOT NULL CHECK (kind IN ('tenant', 'user')),
  tenant          text REFERENCES pgusher.tenants (id) ON DELETE CASCADE,
  verifier        text,
  tenants         text[] NOT NULL DEFAULT '{}',
  auto_provision  boolean NOT NULL DEFAULT false,
  created_at      timestamptz NOT NULL DEFAULT now(),
  changed_at      timestamptz NOT NULL DEFAULT now(),
  changed_in      xid8 NOT NULL DEFAULT pg_current_xact_id(),
  CHECK ((kind = 'tenant') = (tenant IS NOT NULL))
);

CREATE TABLE pgusher.events (
  id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at      timestamptz NOT NULL DEFAULT now(),
  who     text NOT NULL,
  what    text NOT NULL,
  tenant  text,
  detail  jsonb NOT NULL DEFAULT '{}'
);

-- Rows that were removed, for those who follow.
CREATE TABLE pgusher.removals (
  kind        text NOT NULL,
  key         text NOT NULL,
  changed_at  timestamptz NOT NULL DEFAULT now(),
  changed_in  xid8 NOT NULL DEFAULT pg_current_xact_id()
);

CREATE INDEX ON pgusher.shards (changed_in);
CREATE INDEX ON pgusher.tenants (changed_in);
CREATE INDEX ON pgusher.credentials (changed_in);
CREATE UNIQUE INDEX ON pgusher.credentials (tenant);
CREATE INDEX ON pgusher.removals (changed_in);
CREATE INDEX ON pgusher.tenants (shard);
CREATE INDEX ON pgusher.tenants (changed_at) WHERE status IN ('creating', 'deleting');
CREATE INDEX ON pgusher.events (tenant, id);

CREATE FUNCTION pgusher.touch() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  NEW.changed_in := pg_current_xact_id();
  NEW.changed_at := now();
  RETURN NEW;
END $$;

-- The payload is for people and other tools; pgusher reads the tables.
CREATE FUNCTION pgusher.announce() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
DECLARE
  changed record := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
  key text := to_jsonb(changed) ->> TG_ARGV[0];
BEGIN
  IF TG_OP = 'DELETE' THEN
    INSERT INTO pgusher.removals (kind, key) VALUES (TG_TABLE_NAME, key);
  END IF;
  IF TG_TABLE_NAME = 'credentials' AND to_jsonb(changed) ->> 'tenant' IS NOT NULL THEN
    UPDATE pgusher.tenants SET changed_at = now() WHERE id = to_jsonb(changed) ->> 'tenant';
  END IF;
  PERFORM pg_notify('pgusher_changes',
                    json_build_object('table', TG_TABLE_NAME, 'key', key, 'seq', pg_current_xact_id()::text)::text);
  RETURN NULL;
END $$;

CREATE FUNCTION pgusher.refuse() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
  RAISE EXCEPTION 'pgusher.events is append-only';
END $$;

CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON pgusher.shards FOR EACH ROW EXECUTE FUNCTION pgusher.touch();
CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON pgusher.tenants FOR EACH ROW EXECUTE FUNCTION pgusher.touch();
CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON pgusher.credentials FOR EACH ROW EXECUTE FUNCTION pgusher.touch();
CREATE TRIGGER announce AFTER INSERT OR UPDATE OR DELETE ON pgusher.shards
  FOR EACH ROW EXECUTE FUNCTION pgusher.announce('name');
CREATE TRIGGER announce AFTER INSERT OR UPDATE OR DELETE ON pgusher.tenants
  FOR EACH ROW EXECUTE FUNCTION pgusher.announce('id');
CREATE TRIGGER announce AFTER INSERT OR UPDATE OR DELETE ON pgusher.credentials
  FOR EACH ROW EXECUTE FUNCTION pgusher.announce('name');
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON pgusher.events
  FOR EACH ROW EXECUTE FUNCTION pgusher.refuse();
