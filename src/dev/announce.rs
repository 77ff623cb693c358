//! What `dev` prints when everything is ready.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};

use serde_json::json;

use super::cluster::Cluster;
use super::state::DataDir;
use super::{APP_USER, Seat};
use crate::config::Config;
use crate::server::Addresses;
use crate::tenant::credential::client_password;

/// Everything that a person or a script needs to connect.
pub(super) struct Announcement<'a> {
    config: &'a Config,
    data: &'a DataDir,
    clusters: &'a [Cluster],
    seats: &'a [Seat],
    host: String,
    port: u16,
    api: Option<SocketAddr>,
    metrics: Option<SocketAddr>,
}

impl<'a> Announcement<'a> {
    pub(super) fn new(
        config: &'a Config,
        addresses: &Addresses,
        seats: &'a [Seat],
        data: &'a DataDir,
        clusters: &'a [Cluster],
    ) -> Self {
        let proxy =
            addresses.proxy.first().copied().unwrap_or_else(|| ([127, 0, 0, 1], config.proxy.listen_port).into());
        let (api, metrics) = (addresses.api, addresses.metrics);
        Self { config, data, clusters, seats, host: reachable(proxy.ip()), port: proxy.port(), api, metrics }
    }

    /// Prints it on standard output, in one piece. Nobody listening is no reason to stop.
    pub(super) fn print(&self, as_json: bool) {
        let text = if as_json { format!("{}\n", self.json()) } else { self.text() };
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    fn json(&self) -> serde_json::Value {
        let shards = self.clusters.iter().zip(&self.config.shards).map(|(cluster, shard)| {
            json!({
                "name": cluster.name,
                "host": shard.host,
                "port": cluster.port,
                "database": shard.database,
                "admin_dsn": self.admin_dsn(cluster.port, &shard.database),
                "data": cluster.dir(),
                "log": cluster.log(),
            })
        });
        let tenants = self.seats.iter().map(|seat| {
            json!({ "id": seat.id.as_str(), "dsn": self.tenant_dsn(seat), "shard": seat.shard, "schema": seat.schema })
        });
        let user = self.config.users.first();
        json!({
            "host": self.host,
            "port": self.port,
            "metrics": self.metrics.map(|address| format!("http://{}/metrics", http(address))),
            "api": self.api.map(|address| format!("http://{}", http(address))),
            "api_token": self.config.api.token.expose(),
            "shards": shards.collect::<Vec<_>>(),
            "catalog": { "dsn": self.clusters.first().map(|c| self.admin_dsn(c.port, &self.config.catalog.database)) },
            "tenants": tenants.collect::<Vec<_>>(),
            "app_user": user.map(|user| json!({ "name": user.name, "password": user.password.expose() })),
            "data": self.data.path,
            "pid": std::process::id(),
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = self.write_text(&mut text);
        text
    }

    fn write_text(&self, out: &mut String) -> std::fmt::Result {
        let kept = if self.data.kept { "kept" } else { "removed at the end" };
        let (shards, data) = (self.clusters.len(), self.data.path.display());
        writeln!(
            out,
            "pgusher {} on port {}, {shards} shards, data in {data} ({kept})",
            env!("CARGO_PKG_VERSION"),
            self.port
        )?;
        for seat in self.seats {
            let dsn = self.tenant_dsn(seat);
            writeln!(out, "\n{} (schema {} on {})", seat.id, seat.schema, seat.shard)?;
            writeln!(out, "  DSN   {dsn}\n  try   psql '{dsn}'")?;
        }
        if let Some(user) = self.config.users.iter().find(|user| user.name == APP_USER) {
            let dsn = self.dsn(&format!("{}.client_003", user.name), user.password.expose(), "client_003");
            writeln!(
                out,
                "\nAny other tenant: user {} with the tenant's name, made when it first connects",
                user.name
            )?;
            writeln!(out, "  DSN   {dsn}\n  try   psql '{dsn}'")?;
        }
        writeln!(out)?;
        for cluster in self.clusters {
            writeln!(out, "{}   127.0.0.1:{}, log {}", cluster.name, cluster.port, cluster.log().display())?;
        }
        if let Some(address) = self.metrics {
            writeln!(out, "metrics   http://{}/metrics", http(address))?;
        }
        if let Some(address) = self.api {
            let token = self.config.api.token.expose();
            writeln!(out, "API       curl -H 'Authorization: Bearer {token}' http://{}/shards/status", http(address))?;
        }
        writeln!(out, "\nCtrl-C stops all of it.")
    }

    fn tenant_dsn(&self, seat: &Seat) -> String {
        let password = client_password(self.config.provision.master_secret.expose(), seat.id.as_str());
        self.dsn(seat.id.as_str(), &password, seat.id.as_str())
    }

    /// Users and passwords consist of characters that need no escaping in a URL, but for those of a configuration file.
    fn dsn(&self, user: &str, password: &str, database: &str) -> String {
        format!("postgresql://{}:{}@{}:{}/{database}", escape(user), escape(password), self.host, self.port)
    }

    fn admin_dsn(&self, port: u16, database: &str) -> String {
        format!("postgresql://postgres:{}@127.0.0.1:{port}/{database}", self.data.state.postgres_password)
    }
}

/// Percent-encodes what may not stand in the user part of a URL.
fn escape(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// The address under which a listener on `ip` is reached from here.
fn reachable(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
        IpAddr::V6(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

fn http(address: SocketAddr) -> String {
    format!("{}:{}", reachable(address.ip()), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_survive_every_password() {
        assert_eq!(escape("aZ09-_.~"), "aZ09-_.~");
        assert_eq!(escape("p@ss/wörd%"), "p%40ss%2Fw%C3%B6rd%25");
    }

    #[test]
    fn an_unspecified_address_is_reached_on_loopback() {
        for (ip, expected) in
            [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "[::1]"), ("10.0.0.7", "10.0.0.7")]
        {
            assert_eq!(reachable(ip.parse().unwrap()), expected);
        }
    }
}
