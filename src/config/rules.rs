//! Rules that one key alone cannot keep: what must be there, what fits together, which files must exist.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use super::entries::Entries;
use super::mistake::{Mistake, Place, nearest};
use super::{AuthType, Config, Purpose, Secret, Source, SslMode};
use crate::tenant::TenantId;
use crate::tenant::credential::Verifier;

/// Below this a master secret could be guessed.
const SHORTEST_MASTER_SECRET: usize = 32;

/// PostgreSQL's `NAMEDATALEN - 1`.
const LONGEST_NAME: usize = 63;

/// Adds a mistake for every rule that is broken.
pub(super) fn check(config: &Config, entries: &Entries, purpose: Purpose, mistakes: &mut Vec<Mistake>) {
    // A value that was refused has left its default behind: rules about that key would report nonsense.
    let refused = mistakes.iter().map(|mistake| mistake.key.clone()).collect();
    let mut report = Report { entries, mistakes, refused };
    listening(config, &mut report);
    tls(config, &mut report);
    identify(config, &mut report);
    users(config, &mut report);
    shards(config, &mut report);
    provision(config, &mut report);
    http(config, &mut report);
    log(config, &mut report);
    if purpose == Purpose::Serve {
        serve(config, &mut report);
    }
}

struct Report<'a> {
    entries: &'a Entries,
    mistakes: &'a mut Vec<Mistake>,
    refused: Vec<String>,
}

impl Report<'_> {
    fn at(&mut self, section: &'static str, index: usize, key: &'static str, problem: impl Into<String>) {
        self.nearest(section, index, key, problem, None);
    }

    fn nearest(
        &mut self,
        section: &'static str,
        index: usize,
        key: &'static str,
        problem: impl Into<String>,
        nearest: Option<String>,
    ) {
        let (name, place) = self.entries.describe(section, index, key);
        if !self.refused.contains(&name) {
            self.mistakes.push(Mistake { place, key: name, problem: problem.into(), nearest });
        }
    }

    fn one(&mut self, section: &'static str, key: &'static str, problem: impl Into<String>) {
        self.at(section, 0, key, problem);
    }
}

/// The host and port of `127.0.0.1:80`, `[::1]:80`, `localhost:80`, `*:80`.
pub(super) fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(host) => host.parse::<std::net::Ipv6Addr>().ok().map(|_| host)?,
        None if host.contains(':') => return None,
        None => host,
    };
    is_host(host).then_some(())?;
    Some((host, port.parse().ok().filter(|&port| port > 0)?))
}

/// Whether a text can be the name or address of a host, or `*`.
fn is_host(host: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.:%".contains(c);
    host == "*" || (!host.is_empty() && host.len() <= 253 && host.chars().all(allowed))
}

/// Whether only this machine can reach an address.
pub(super) fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The addresses of `listen_addr`.
pub(super) fn addresses(listen_addr: &str) -> impl Iterator<Item = &str> {
    listen_addr.split(',').map(str::trim).filter(|address| !address.is_empty())
}

fn listening(config: &Config, report: &mut Report<'_>) {
    let proxy = &config.proxy;
    for address in addresses(&proxy.listen_addr) {
        if !is_host(address) {
            report.one("proxy", "listen_addr", format!("{address:?} is not an address"));
        }
    }
    if addresses(&proxy.listen_addr).next().is_none() && proxy.unix_socket_dir.is_none() {
        report.one("proxy", "listen_addr", "is empty and there is no unix_socket_dir: clients could not connect");
    }
    if let Some(directory) = &proxy.unix_socket_dir {
        directory_exists(report, "proxy", "unix_socket_dir", directory);
    }
    if proxy.max_packet_size < proxy.pkt_buf {
        report.one("proxy", "max_packet_size", "must not be smaller than pkt_buf");
    }
}

fn directory_exists(report: &mut Report<'_>, section: &'static str, key: &'static str, path: &Path) {
    match std::fs::metadata(path) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => report.one(section, key, format!("{path:?} is not a directory")),
        Err(error) => report.one(section, key, format!("cannot use {path:?}: {error}")),
    }
}

fn tls(config: &Config, report: &mut Report<'_>) {
    let tls = &config.tls;
    let files = [
        ("client_tls_cert_file", &tls.client_tls_cert_file),
        ("client_tls_key_file", &tls.client_tls_key_file),
        ("client_tls_ca_file", &tls.client_tls_ca_file),
        ("server_tls_ca_file", &tls.server_tls_ca_file),
        ("server_tls_cert_file", &tls.server_tls_cert_file),
        ("server_tls_key_file", &tls.server_tls_key_file),
    ];
    for (key, path) in files.iter().filter_map(|(key, path)| Some((*key, path.as_ref()?))) {
        // Opened, not only looked at: a key that this user may not read is a mistake too.
        let opened = std::fs::File::open(path).and_then(|file| file.metadata());
        match opened {
            Ok(found) if !found.is_dir() => {}
            Ok(_) => report.one("tls", key, format!("{path:?} is a directory")),
            Err(error) => report.one("tls", key, format!("cannot read {path:?}: {error}")),
        }
    }
    let is_missing = |wanted: &str| files.iter().any(|(key, path)| *key == wanted && path.is_none());
    let client = tls.client_tls_sslmode;
    let server = tls.server_tls_sslmode;
    let verifies = |mode| matches!(mode, SslMode::VerifyCa | SslMode::VerifyFull);
    let needs = [
        (client != SslMode::Disable, "client_tls_sslmode", "client_tls_cert_file"),
        (client != SslMode::Disable, "client_tls_sslmode", "client_tls_key_file"),
        (verifies(client), "client_tls_sslmode", "client_tls_ca_file"),
        (verifies(server), "server_tls_sslmode", "server_tls_ca_file"),
        (tls.server_tls_cert_file.is_some(), "server_tls_cert_file", "server_tls_key_file"),
        (tls.server_tls_key_file.is_some(), "server_tls_key_file", "server_tls_cert_file"),
    ];
    for (key, file) in needs.into_iter().filter(|(on, ..)| *on).map(|(_, key, file)| (key, file)) {
        if is_missing(file) {
            report.one("tls", key, format!("needs {file}"));
        }
    }
}

fn identify(config: &Config, report: &mut Report<'_>) {
    let identify = &config.identify;
    if identify.order.is_empty() {
        report.one("identify", "order", "is empty: no client could name its tenant");
    }
    if (1..identify.order.len()).any(|i| identify.order[..i].contains(&identify.order[i])) {
        report.one("identify", "order", "names a place twice");
    }
    if let Some(pattern) = &identify.username_regex {
        match regex::Regex::new(pattern) {
            Err(error) => {
                // The last line says what is wrong, those before it repeat and underline the pattern.
                let reason = error.to_string();
                let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
                report.one("identify", "username_regex", format!("is not a regular expression: {reason}"));
            }
            Ok(regex) if !regex.capture_names().flatten().any(|name| name == "tenant") => {
                report.one("identify", "username_regex", "has no group named tenant: (?<tenant>…)");
            }
            Ok(_) => {}
        }
        if !identify.order.contains(&Source::Username) {
            report.one("identify", "username_regex", "has no effect: order does not have \"username\"");
        }
    }
    if let Some(suffix) = &identify.sni_suffix {
        let label = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
        };
        if !suffix.strip_prefix('.').unwrap_or(suffix).split('.').all(label) {
            report.one("identify", "sni_suffix", format!("{suffix:?} is not a domain name"));
        }
        if !identify.order.contains(&Source::Sni) {
            report.one("identify", "sni_suffix", "has no effect: order does not have \"sni\"");
        }
    }
}

/// Refuses a second element with the same name, and those without one.
fn names<'a>(section: &'static str, names: impl Iterator<Item = &'a str>, report: &mut Report<'_>) {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, name) in names.enumerate() {
        if name.is_empty() {
            report.at(section, index, "name", "is missing");
        } else if name.len() > LONGEST_NAME {
            report.at(section, index, "name", format!("is longer than {LONGEST_NAME} bytes"));
        } else if let Some(first) = seen.get(name) {
            let problem = match report.entries.place(section, *first, "name") {
                Place::Line(line) => format!("is the same as on line {line}"),
                _ => "is there twice".to_owned(),
            };
            report.at(section, index, "name", problem);
        } else {
            seen.insert(name, index);
        }
    }
}

fn users(config: &Config, report: &mut Report<'_>) {
    names("users", config.users.iter().map(|user| user.name.as_str()), report);
    for (index, user) in config.users.iter().enumerate() {
        if config.auth.auth_type != AuthType::Trust {
            password(index, &user.password, report);
        }
        if user.tenants.is_empty() {
            report.at("users", index, "tenants", "is missing: name tenants, or \"*\" for every tenant");
        }
        for pattern in &user.tenants {
            if let Err(problem) = tenant_pattern(pattern) {
                report.at("users", index, "tenants", problem);
            }
        }
    }
}

fn password(index: usize, password: &Secret, report: &mut Report<'_>) {
    // Read to be checked, never repeated.
    let text = password.expose();
    let is_md5 =
        text.len() == 35 && text.strip_prefix("md5").is_some_and(|hash| hash.chars().all(|c| c.is_ascii_hexdigit()));
    if text.is_empty() {
        report.at("users", index, "password", "is missing");
    } else if text.starts_with("SCRAM-SHA-256$") && Verifier::parse(text).is_err() {
        let problem = "is not a verifier: SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>";
        report.at("users", index, "password", problem);
    } else if is_md5 {
        report.at("users", index, "password", "is an MD5 hash, which SCRAM cannot use: give a SCRAM-SHA-256$ verifier");
    }
}

/// A pattern must be able to match a tenant.
fn tenant_pattern(pattern: &str) -> Result<(), String> {
    if !pattern.contains('*') {
        return TenantId::parse(pattern).map(|_| ()).map_err(|error| error.to_string());
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-*".contains(c);
    match pattern.chars().find(|&c| !allowed(c)) {
        None if pattern.starts_with('-') => Err(format!("{pattern:?} matches no tenant: none begins with '-'")),
        None => Ok(()),
        Some(c) => Err(format!("{pattern:?} matches no tenant: none contains {c:?}")),
    }
}

fn shards(config: &Config, report: &mut Report<'_>) {
    names("shards", config.shards.iter().map(|shard| shard.name.as_str()), report);
    let mut places: BTreeMap<(&str, u16, &str), &str> = BTreeMap::new();
    for (index, shard) in config.shards.iter().enumerate() {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        if let Some(c) = shard.name.chars().find(|&c| !allowed(c)) {
            report.at("shards", index, "name", format!("consists of letters, digits, '_', '-', '.', not of {c:?}"));
        }
        for (key, value) in [("host", &shard.host), ("database", &shard.database), ("admin_user", &shard.admin_user)] {
            if value.is_empty() {
                report.at("shards", index, key, "is empty");
            }
        }
        own_shard(config, index, report);
        let place = (shard.host.as_str(), shard.port, shard.database.as_str());
        if let Some(other) = places.insert(place, &shard.name) {
            report.at("shards", index, "database", format!("is the same database as that of shard {other:?}"));
        }
    }
    for (key, value) in [("database", &config.catalog.database), ("user", &config.catalog.user)] {
        if value.is_empty() {
            report.one("catalog", key, "is empty");
        }
    }
}

/// What a shard says about the one tenant that has it, and about databases.
fn own_shard(config: &Config, index: usize, report: &mut Report<'_>) {
    let shard = &config.shards[index];
    if shard.rls_database.is_empty() {
        report.at("shards", index, "rls_database", "is empty");
    } else if shard.rls_database == shard.database {
        report.at("shards", index, "rls_database", "is database, too: plans do not share one");
    }
    let Some(tenant) = &shard.dedicated_to else {
        if shard.tenant_role.is_some() {
            report.at("shards", index, "tenant_role", "has no effect without dedicated_to");
        }
        return;
    };
    if let Err(error) = TenantId::parse(tenant) {
        report.at("shards", index, "dedicated_to", error.to_string());
    }
    if config.shards[..index].iter().any(|other| other.dedicated_to.as_ref() == Some(tenant)) {
        report.at("shards", index, "dedicated_to", format!("{tenant:?} has another shard to itself"));
    }
    if index == 0 && config.catalog.host.is_none() {
        let problem = "the catalog is on the first shard, which a tenant cannot have to itself; give [catalog] host";
        report.at("shards", index, "dedicated_to", problem);
    }
    if shard.tenant_role.is_none() && !shard.tenant_password.expose().is_empty() {
        report.at("shards", index, "tenant_password", "needs tenant_role");
    }
}

fn provision(config: &Config, report: &mut Report<'_>) {
    let provision = &config.provision;
    if let Some(directory) = &provision.template_dir {
        directory_exists(report, "provision", "template_dir", directory);
    }
    if provision.role_connection_limit == 0 {
        report.one("provision", "role_connection_limit", "is 0: no tenant could connect; -1 is no limit");
    }
    if provision.admin_user.is_empty() {
        report.one("provision", "admin_user", "is empty");
    }
    let length = provision.master_secret.expose().len();
    if (1..SHORTEST_MASTER_SECRET).contains(&length) {
        let problem = format!("has {length} characters, at least {SHORTEST_MASTER_SECRET} are needed");
        report.one("provision", "master_secret", problem);
    }
}

fn http(config: &Config, report: &mut Report<'_>) {
    let listeners = [("api", &config.api.listen), ("metrics", &config.metrics.listen)];
    for (section, listen) in listeners.into_iter().filter(|(_, listen)| !listen.is_empty()) {
        match host_and_port(listen) {
            None => report.one(
                section,
                "listen",
                format!("expected address and port, such as \"127.0.0.1:6480\", found {listen:?}"),
            ),
            Some((host, _)) if section == "api" && !is_loopback(host) && config.api.token.expose().is_empty() => {
                report.one("api", "listen", format!("{listen:?} can be reached from other machines and needs a token"));
            }
            Some((host, port))
                if port == config.proxy.listen_port
                    && addresses(&config.proxy.listen_addr).any(|address| overlap(address, host)) =>
            {
                report.one(section, "listen", format!("port {port} is [proxy] listen_port"));
            }
            Some(_) => {}
        }
    }
    let (api, metrics) = (host_and_port(&config.api.listen), host_and_port(&config.metrics.listen));
    if let (Some(api), Some(metrics)) = (api, metrics)
        && api.1 == metrics.1
        && overlap(api.0, metrics.0)
    {
        report.one("metrics", "listen", format!("port {} is that of [api] listen", api.1));
    }
}

/// Whether two listeners on one port would be in each other's way.
fn overlap(one: &str, other: &str) -> bool {
    let is_every = |host: &str| ["*", "0.0.0.0", "::"].contains(&host);
    one == other || is_every(one) || is_every(other)
}

fn log(config: &Config, report: &mut Report<'_>) {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    for part in config.log.level.split(',').map(str::trim) {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        if !LEVELS.contains(&level.to_ascii_lowercase().as_str()) {
            report.nearest("log", 0, "level", format!("{level:?} is not a level"), nearest(level, LEVELS));
        }
    }
    if tracing_subscriber::EnvFilter::try_new(&config.log.level).is_err() {
        report.one("log", "level", format!("{:?} is not a filter", config.log.level));
    }
}

/// What `serve` needs and `dev` makes itself.
fn serve(config: &Config, report: &mut Report<'_>) {
    if config.shards.is_empty() && config.catalog.host.is_none() {
        report.one("catalog", "host", "is missing, and there is no [[shards]] either: give one of them");
    }
    if config.provision.master_secret.expose().is_empty() {
        report.one("provision", "master_secret", "is missing; `openssl rand -hex 32` makes one");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_an_address_and_a_port() {
        for (text, expected) in [
            ("127.0.0.1:6480", Some(("127.0.0.1", 6480))),
            ("[::1]:6480", Some(("::1", 6480))),
            ("*:1", Some(("*", 1))),
            ("localhost:65535", Some(("localhost", 65535))),
            ("::1:80", None),
            ("127.0.0.1", None),
            ("127.0.0.1:0", None),
            ("127.0.0.1:65536", None),
            (":80", None),
            ("a b:80", None),
            ("[host]:80", None),
        ] {
            assert_eq!(host_and_port(text), expected, "{text}");
        }
    }

    #[test]
    fn patterns_must_be_able_to_match() {
        for good in ["*", "client_*", "client_001", "*-eu", "a*b*c"] {
            assert_eq!(tenant_pattern(good), Ok(()), "{good}");
        }
        for bad in ["", "Client_*", "a.b", "client 1*", "-*", "public", "pg_x"] {
            assert!(tenant_pattern(bad).is_err(), "{bad}");
        }
    }
}
