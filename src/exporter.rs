//! `/metrics`, `/metrics/tenant/{id}`, `/healthz`, `/readyz`.
//!
//! The hot path counts into [`crate::metrics`]; here it is added up, at scrape time. The cost of a scrape grows with
//! workers, shards and tenants that have clients or connections now, never with the number of tenants.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::core::Collector as _;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder as _, TextEncoder};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::control::Control;
use crate::metrics::{PIN_REASONS, TIME_BUCKETS, TenantStats, Times};
use crate::server::Shared;
use crate::violation::Lost;

/// What the exporter reads.
pub struct Exporter {
    /// The data plane.
    pub shared: Arc<Shared>,
    /// The control plane.
    pub control: Arc<Control>,
    /// Tenants with a label of their own.
    pub top_tenants: usize,
}

const GB: f64 = 1e9;

/// Serves until `shutdown`.
///
/// # Errors
/// The listener failed.
pub async fn serve(exporter: Exporter, listener: TcpListener, shutdown: CancellationToken) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/metrics/tenant/{id}", get(tenant_metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(Arc::new(exporter));
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

async fn metrics(State(exporter): State<Arc<Exporter>>) -> Response {
    encode(&exporter.families())
}

async fn tenant_metrics(State(exporter): State<Arc<Exporter>>, Path(id): Path<String>) -> Response {
    match exporter.tenant_families(&id) {
        Some(families) => encode(&families),
        None => (StatusCode::NOT_FOUND, "no such tenant\n").into_response(),
    }
}

async fn ready(State(exporter): State<Arc<Exporter>>) -> Response {
    if exporter.shared.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n").into_response();
    }
    // With the catalog away known tenants are served: that is ready, and worth saying.
    if exporter.control.catalog_connected() { "ready\n" } else { "ready, but the catalog is away\n" }.into_response()
}

fn encode(families: &[MetricFamily]) -> Response {
    let families: Vec<_> = families.iter().filter(|family| !family.get_metric().is_empty()).cloned().collect();
    let mut text = Vec::new();
    match TextEncoder::new().encode(&families, &mut text) {
        Ok(()) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// A metric family under construction.
struct Family(MetricFamily);

impl Family {
    fn new(name: &str, help: &str, kind: MetricType) -> Self {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        Self(family)
    }

    fn gauge(name: &str, help: &str) -> Self {
        Self::new(name, help, MetricType::GAUGE)
    }

    fn counter(name: &str, help: &str) -> Self {
        Self::new(name, help, MetricType::COUNTER)
    }

    fn add(&mut self, labels: &[(&str, &str)], value: f64) {
        let mut metric = labelled(labels);
        if self.0.get_field_type() == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        self.0.mut_metric().push(metric);
    }

    fn one(mut self, value: f64) -> MetricFamily {
        self.add(&[], value);
        self.0
    }
}

fn labelled(labels: &[(&str, &str)]) -> Metric {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    let mut metric = Metric::default();
    metric.set_label(labels.iter().map(pair).collect());
    metric
}

fn histogram(name: &str, help: &str, times: impl Iterator<Item = Reading>) -> MetricFamily {
    let (mut counts, mut sum) = ([0; TIME_BUCKETS.len() + 1], 0);
    for (c, s) in times {
        counts.iter_mut().zip(c).for_each(|(total, n)| *total += n);
        sum += s;
    }
    let mut seen = 0;
    let mut buckets = Vec::with_capacity(TIME_BUCKETS.len());
    for (bound, count) in TIME_BUCKETS.iter().zip(counts) {
        seen += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound as f64 / 1e6);
        bucket.set_cumulative_count(seen);
        buckets.push(bucket);
    }
    let mut data = Histogram::default();
    data.set_bucket(buckets);
    data.set_sample_count(counts.iter().sum());
    data.set_sample_sum(sum as f64 / 1e6);
    let mut metric = Metric::default();
    metric.set_histogram(data);
    let mut family = Family::new(name, help, MetricType::HISTOGRAM);
    family.0.mut_metric().push(metric);
    family.0
}

type Reading = ([u64; TIME_BUCKETS.len() + 1], u64);

/// What is known of one tenant at the moment of a scrape.
struct TenantLine {
    id: String,
    shard: String,
    connections: usize,
    rate: f64,
    storage: Option<u64>,
}

impl Exporter {
    fn families(&self) -> Vec<MetricFamily> {
        let mut families = self.required();
        families.extend(self.clients());
        families.extend(self.servers());
        families.extend(self.work());
        families.extend(ProcessCollector::for_self().collect());
        families
    }

    /// The tenants that get a label: those with the most statements, then connections, then storage. The rest is
    /// summed up as `other`.
    fn tenant_lines(&self) -> Vec<TenantLine> {
        let second = self.shared.metrics.second(std::time::Instant::now());
        let mut lines: HashMap<String, TenantLine> = HashMap::new();
        let line = |id: &str| TenantLine {
            id: id.to_owned(),
            shard: self.shared.directory.find(id).map(|t| t.shard.name.clone()).unwrap_or_default(),
            connections: 0,
            rate: 0.0,
            storage: None,
        };
        for (id, stats) in self.shared.metrics.tenants() {
            lines.entry(id.clone()).or_insert_with(|| line(&id)).rate = stats.rate(second);
        }
        for pool in self.shared.pools.live() {
            let id = pool.tenant().id.as_str();
            lines.entry(id.to_owned()).or_insert_with(|| line(id)).connections = pool.connections().0;
        }
        for (id, bytes) in self.control.largest_tenants().iter() {
            lines.entry(id.to_string()).or_insert_with(|| line(id.as_str())).storage = Some(*bytes);
        }
        let mut lines: Vec<_> = lines.into_values().filter(|line| !line.shard.is_empty()).collect();
        for line in &mut lines {
            line.storage = line.storage.or_else(|| self.control.storage_of(&line.id));
        }
        let weight = |line: &TenantLine| (line.rate, line.connections, line.storage.unwrap_or_default());
        lines.sort_by(|a, b| weight(b).partial_cmp(&weight(a)).unwrap_or(std::cmp::Ordering::Equal));
        lines
    }

    /// The metrics whose names are given from outside.
    fn required(&self) -> Vec<MetricFamily> {
        let mut connections =
            Family::gauge("tenant_db_connections_active", "Server connections that are open for the tenant.");
        let mut storage = Family::gauge(
            "tenant_storage_usage_gb",
            "Size of the tenant's tables, indexes and TOAST in GB (10^9 bytes).",
        );
        let mut rate =
            Family::gauge("tenant_api_requests_per_second", "Client statements per second, averaged over 10 s.");
        let lines = self.tenant_lines();
        let (top, rest) = lines.split_at(lines.len().min(self.top_tenants));
        for line in top {
            let labels = [("shard", line.shard.as_str()), ("tenant", line.id.as_str())];
            connections.add(&labels, line.connections as f64);
            if let Some(bytes) = line.storage {
                storage.add(&labels, bytes as f64 / GB);
            }
            rate.add(&labels[1..], line.rate);
        }
        if !rest.is_empty() {
            let labels = [("shard", ""), ("tenant", "other")];
            connections.add(&labels, rest.iter().map(|line| line.connections).sum::<usize>() as f64);
            storage.add(&labels, rest.iter().filter_map(|line| line.storage).sum::<u64>() as f64 / GB);
            rate.add(&labels[1..], rest.iter().map(|line| line.rate).sum());
        }
        let mut tenants = Family::gauge("shard_tenant_count", "Tenants that live on the shard.");
        for shard in self.shared.directory.shards() {
            tenants.add(&[("shard", &shard.name)], self.shared.directory.tenants_on(&shard.name) as f64);
        }
        vec![connections.0, storage.0, rate.0, tenants.0, self.violations(), self.lost_records()]
    }

    fn violations(&self) -> MetricFamily {
        let mut family = Family::counter(
            "cross_tenant_isolation_violations",
            "Attempts to reach outside the tenant's own seat, stopped and counted.",
        );
        let violations = self.shared.metrics.violations();
        if violations.is_empty() {
            // Visible as 0 from the start, so that the first one is an increase.
            family.add(&[("action", "blocked"), ("kind", "permission_denied"), ("tenant", "")], 0.0);
        }
        for ((kind, action, tenant), n) in violations {
            family.add(&[("action", action), ("kind", kind), ("tenant", &tenant)], n as f64);
        }
        family.0
    }

    fn lost_records(&self) -> MetricFamily {
        let help = "Violations that were counted but not written down, by where the record was lost.";
        let mut family = Family::counter("pgusher_violation_records_lost_total", help);
        for (at, label) in Lost::ALL {
            family.add(&[("at", label)], self.shared.metrics.desk.lost(at) as f64);
        }
        family.0
    }

    fn clients(&self) -> Vec<MetricFamily> {
        let metrics = &self.shared.metrics;
        let sum =
            |of: fn(&crate::metrics::WorkerStats) -> usize| metrics.workers().iter().map(|w| of(w)).sum::<usize>();
        let active = sum(|w| w.clients_active.load(Ordering::Relaxed));
        let waiting = sum(|w| w.clients_waiting.load(Ordering::Relaxed));
        let all = metrics.clients.load(Ordering::Relaxed);
        let mut clients =
            Family::gauge("pgusher_clients", "Clients: active (with a server connection), idle, waiting.");
        clients.add(&[("state", "active")], active as f64);
        clients.add(&[("state", "idle")], all.saturating_sub(active + waiting) as f64);
        clients.add(&[("state", "waiting")], waiting as f64);
        let mut pinned = Family::gauge("pgusher_pinned_clients", "Clients that keep a server connection, by reason.");
        for (at, reason) in PIN_REASONS.iter().enumerate() {
            let clients = metrics.workers().iter().map(|w| w.clients_pinned[at].load(Ordering::Relaxed)).sum::<usize>();
            pinned.add(&[("reason", reason)], clients as f64);
        }
        let notified = &metrics.notified;
        let mut notifications =
            Family::counter("pgusher_notifications_total", "Notifications, by what became of them.");
        let counts =
            [("delivered", &notified.delivered), ("foreign", &notified.foreign), ("unknown", &notified.unknown)];
        for (result, count) in counts {
            notifications.add(&[("result", result)], count.load(Ordering::Relaxed) as f64);
        }
        let listeners = Family::gauge("pgusher_listeners", "Server connections that listen for a tenant's clients.");
        let listeners = listeners.one(notified.listeners.load(Ordering::Relaxed) as f64);
        let total = Family::counter("pgusher_clients_total", "Clients accepted.");
        let mut logins = Family::counter("pgusher_client_logins_total", "Ends of client logins.");
        logins.add(&[("result", "failed")], metrics.client_logins_failed.load(Ordering::Relaxed) as f64);
        logins.add(&[("result", "ok")], metrics.client_logins_ok.load(Ordering::Relaxed) as f64);
        vec![
            clients.0,
            pinned.0,
            notifications.0,
            listeners,
            total.one(metrics.clients_total.load(Ordering::Relaxed) as f64),
            logins.0,
        ]
    }

    fn servers(&self) -> Vec<MetricFamily> {
        let mut connections = Family::gauge("pgusher_server_connections", "Server connections by shard and state.");
        let mut logins = Family::counter("pgusher_server_logins_total", "Logins to servers.");
        let mut evictions = Family::counter(
            "pgusher_evictions_total",
            "Idle server connections closed to make room for another tenant.",
        );
        let mut up = Family::gauge("pgusher_shard_up", "1 while the shard can be reached.");
        for shard in self.shared.directory.shards() {
            let name = ("shard", shard.name.as_str());
            let use_ = self.shared.pools.shard_use(&shard.name);
            let active = use_.open.saturating_sub(use_.idle + use_.connecting);
            connections.add(&[name, ("state", "active")], active as f64);
            connections.add(&[name, ("state", "connecting")], use_.connecting as f64);
            connections.add(&[name, ("state", "idle")], use_.idle as f64);
            let stats = self.shared.metrics.shard(&shard.name);
            logins.add(&[("result", "failed"), name], stats.logins_failed.load(Ordering::Relaxed) as f64);
            logins.add(&[("result", "ok"), name], stats.logins_ok.load(Ordering::Relaxed) as f64);
            evictions.add(&[name], stats.evictions.load(Ordering::Relaxed) as f64);
            up.add(&[name], f64::from(u8::from(self.control.shard_health(&shard.name).healthy)));
        }
        let pools = Family::gauge("pgusher_pools", "Tenants with a pool.").one(self.shared.pools.live().len() as f64);
        let catalog = Family::gauge("pgusher_catalog_up", "1 while the catalog is followed.");
        let tenants = Family::gauge("pgusher_tenants", "Tenants known.").one(self.shared.directory.len() as f64);
        let mut build = Family::gauge("pgusher_build_info", "Always 1.");
        build.add(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
        let catalog = catalog.one(f64::from(u8::from(self.control.catalog_connected())));
        vec![connections.0, logins.0, evictions.0, up.0, pools, catalog, tenants, build.0]
    }

    fn work(&self) -> Vec<MetricFamily> {
        let metrics = &self.shared.metrics;
        let workers = metrics.workers();
        let times = |name, help, of: fn(&crate::metrics::WorkerStats) -> &Times| {
            histogram(name, help, workers.iter().map(|w| of(w).read()))
        };
        let sum = |of: fn(&crate::metrics::WorkerStats) -> u64| workers.iter().map(|w| of(w)).sum::<u64>() as f64;
        let mut bytes = Family::counter("pgusher_bytes_total", "Bytes by direction.");
        bytes.add(&[("direction", "client_in")], sum(|w| w.client_in.load(Ordering::Relaxed)));
        bytes.add(&[("direction", "client_out")], sum(|w| w.client_out.load(Ordering::Relaxed)));
        bytes.add(&[("direction", "server_in")], sum(|w| w.server_in.load(Ordering::Relaxed)));
        bytes.add(&[("direction", "server_out")], sum(|w| w.server_out.load(Ordering::Relaxed)));
        let mut errors = Family::counter("pgusher_errors_total", "Errors sent to clients, by SQLSTATE and origin.");
        for ((code, origin), n) in metrics.errors() {
            errors.add(&[("origin", origin), ("sqlstate", &code)], n as f64);
        }
        let queries = Family::counter("pgusher_queries_total", "Queries answered.");
        let transactions = Family::counter("pgusher_transactions_total", "Transactions ended.");
        vec![
            times("pgusher_query_seconds", "From a query's first byte sent to its answer's end.", |w| &w.query_time),
            times("pgusher_transaction_seconds", "From a transaction's first message to its end.", |w| {
                &w.transaction_time
            }),
            times("pgusher_wait_seconds", "Waiting for a server connection.", |w| &w.wait_time),
            queries.one(sum(|w| w.queries.load(Ordering::Relaxed))),
            transactions.one(sum(|w| w.transactions.load(Ordering::Relaxed))),
            bytes.0,
            errors.0,
        ]
    }

    /// Everything about one tenant, whether or not it has a label in `/metrics`.
    fn tenant_families(&self, id: &str) -> Option<Vec<MetricFamily>> {
        let tenant = self.shared.directory.find(id)?;
        let stats = self.shared.metrics.find_tenant(id).unwrap_or_default();
        let second = self.shared.metrics.second(std::time::Instant::now());
        let (open, idle) = self.shared.pools.tenant_connections(id);
        let label = ("tenant", id);
        let gauge = |name: &str, help: &str, value: f64| {
            let mut family = Family::gauge(name, help);
            family.add(&[label], value);
            family.0
        };
        let placed = |name: &str, help: &str, value: f64| {
            let mut family = Family::gauge(name, help);
            family.add(&[("shard", &tenant.shard.name), label], value);
            family.0
        };
        let counter = |name: &str, help: &str, of: fn(&TenantStats) -> u64| {
            let mut family = Family::counter(name, help);
            family.add(&[label], of(&stats) as f64);
            family.0
        };
        let mut families = vec![
            placed("tenant_db_connections_active", "Server connections that are open for the tenant.", open as f64),
            gauge(
                "tenant_api_requests_per_second",
                "Client statements per second, averaged over 10 s.",
                stats.rate(second),
            ),
            gauge("pgusher_tenant_clients", "Clients connected.", stats.clients.load(Ordering::Relaxed) as f64),
            gauge("pgusher_tenant_server_connections_idle", "Server connections that wait for work.", idle as f64),
            counter("pgusher_tenant_queries_total", "Queries answered.", |s| s.queries.load(Ordering::Relaxed)),
            counter("pgusher_tenant_transactions_total", "Transactions ended.", |s| {
                s.transactions.load(Ordering::Relaxed)
            }),
            counter("pgusher_tenant_errors_total", "Errors that servers sent.", |s| s.errors.load(Ordering::Relaxed)),
            counter("pgusher_tenant_client_in_bytes_total", "Bytes from clients.", |s| {
                s.client_in.load(Ordering::Relaxed)
            }),
            counter("pgusher_tenant_client_out_bytes_total", "Bytes to clients.", |s| {
                s.client_out.load(Ordering::Relaxed)
            }),
        ];
        if let Some(bytes) = self.control.storage_of(id) {
            families.push(placed("tenant_storage_usage_gb", "Size in GB (10^9 bytes).", bytes as f64 / GB));
        }
        let mut violations = Family::counter("cross_tenant_isolation_violations", "Attempts stopped and counted.");
        for ((kind, action, tenant), n) in self.shared.metrics.violations() {
            if tenant == id {
                violations.add(&[("action", action), ("kind", kind), label], n as f64);
            }
        }
        families.push(violations.0);
        Some(families)
    }
}
