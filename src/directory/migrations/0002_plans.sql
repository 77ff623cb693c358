-- Plans besides `schema`.

-- Where the rows of tenants of plan `rls` are, and the one tenant that has the shard to itself.
ALTER TABLE pgusher.shards
  ADD COLUMN rls_database text NOT NULL DEFAULT 'shared' CHECK (rls_database <> ''),
  ADD COLUMN dedicated_to text CHECK (dedicated_to <> '');

CREATE UNIQUE INDEX ON pgusher.shards (dedicated_to);

-- False where role and place were there before and are not pgusher's to change or to drop.
ALTER TABLE pgusher.tenants
  ADD COLUMN managed boolean NOT NULL DEFAULT true;
