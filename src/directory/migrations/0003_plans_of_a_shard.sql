-- Whether a shard has tenants of a plan, without looking at all of its tenants.
CREATE INDEX ON pgusher.tenants (shard, plan, id) WHERE status <> 'deleted';
