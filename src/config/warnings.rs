//! What a configuration may say and probably does not mean.

use super::rules::{addresses, host_and_port, is_loopback};
use super::{AuthType, Catalog, Config, Secret, SslMode};

/// A token shorter than this can be guessed by trying.
const SHORT_TOKEN: usize = 16;

/// One line each.
pub(super) fn of(config: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    let mut warn = |is: bool, line: String| {
        if is {
            lines.push(line);
        }
    };
    let proxy = &config.proxy;
    let open: Vec<_> = addresses(&proxy.listen_addr).filter(|address| !is_loopback(address)).collect();
    let is_open = !open.is_empty();
    let open = open.join(", ");
    let trust = config.auth.auth_type == AuthType::Trust;
    warn(
        trust && is_open,
        format!(
            "auth.auth_type: \"trust\" with proxy.listen_addr {open:?}: whoever reaches it is any tenant they name"
        ),
    );
    warn(
        !trust && is_open && config.tls.client_tls_sslmode == SslMode::Disable,
        format!(
            "tls.client_tls_sslmode: \"disable\" with proxy.listen_addr {open:?}: data crosses the network in the clear"
        ),
    );
    let pool = &config.pool;
    warn(
        pool.default_pool_size > pool.max_db_connections,
        format!(
            "pool.default_pool_size: {} is never reached, pool.max_db_connections is {}",
            pool.default_pool_size, pool.max_db_connections
        ),
    );
    let limit = config.provision.role_connection_limit;
    warn(
        usize::try_from(limit).is_ok_and(|limit| limit < pool.default_pool_size),
        format!(
            "provision.role_connection_limit: {limit} is less than pool.default_pool_size, servers will refuse connections"
        ),
    );
    let catalog = &config.catalog;
    let without_login = Catalog {
        database: catalog.database.clone(),
        snapshot_file: catalog.snapshot_file.clone(),
        ..Catalog::default()
    };
    warn(
        catalog.host.is_none() && *catalog != without_login,
        "catalog: only database and snapshot_file have an effect without host, the first shard's login is used"
            .to_owned(),
    );
    let token = config.api.token.expose().len();
    warn((1..SHORT_TOKEN).contains(&token), format!("api.token: {token} characters can be guessed"));
    warn(
        config.api.token == Secret::default() && !config.api.listen.is_empty(),
        "api.token: is missing, calls that change something will be refused".to_owned(),
    );
    let metrics = host_and_port(&config.metrics.listen).filter(|(host, _)| !is_loopback(host));
    warn(
        metrics.is_some(),
        format!("metrics.listen: {:?} shows tenants' names to whoever reaches it", config.metrics.listen),
    );
    warn(
        config.identify.username_regex.as_ref().is_some_and(|regex| !(regex.starts_with('^') && regex.ends_with('$'))),
        "identify.username_regex: is not anchored with ^ and $, it may match a part of a user name".to_owned(),
    );
    let none_takes_tenants = config.catalog.host.is_none() && config.shards.iter().all(|shard| shard.weight == 0);
    warn(
        !config.shards.is_empty() && none_takes_tenants,
        "shards: every weight is 0, there is no place for a new tenant".to_owned(),
    );
    lines
}
