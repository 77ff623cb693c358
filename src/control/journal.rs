//! Writes down what happened: violations into the catalog's event log and the audit log, changes into the audit log.
//! (Into the event log changes are written where they are made, in the same transaction.)

use std::sync::Arc;

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::admin::failed;
use super::{Control, records};
use crate::audit::{Audit, Entry, Key};
use crate::config::Config;
use crate::error::PgError;
use crate::metrics::Metrics;
use crate::tenant::TenantId;
use crate::violation::{Lost, Violation};

/// Most records written at a time.
const BATCH: usize = 256;

/// The audit log of the configuration.
pub(super) fn audit_of(config: &Config) -> Option<Arc<Audit>> {
    let key = Key::derive(config.provision.master_secret.expose());
    config.audit.file.clone().map(|file| Arc::new(Audit::new(file, key)))
}

impl Control {
    /// Starts to write down what is reported to `metrics`, until shutdown; what was reported before that is written.
    pub fn keep_journal(self: &Arc<Self>, metrics: Arc<Metrics>) {
        let (control, shutdown) = (self.clone(), self.shutdown.clone());
        self.tasks.spawn(async move { control.journal(&metrics, &shutdown).await });
    }

    async fn journal(&self, metrics: &Metrics, shutdown: &CancellationToken) {
        let Some(mut records) = metrics.desk.open() else { return };
        let mut told = 0;
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            if shutdown.run_until_cancelled(records.recv_many(&mut batch, BATCH)).await.is_none() {
                while let Ok(record) = records.try_recv() {
                    batch.push(record);
                }
            }
            let lost = metrics.desk.lost(Lost::Queue);
            let mut entries: Vec<Entry> = batch.iter().map(Entry::from).collect();
            if lost > told {
                entries.push(Entry::control("pgusher", "records lost", "", format!("{} violations", lost - told)));
                told = lost;
            }
            if !self.audit(entries).await {
                metrics.desk.lose(Lost::Audit, batch.len());
            }
            if let Err(error) = self.write_events(&batch).await {
                metrics.desk.lose(Lost::Catalog, batch.len());
                tracing::warn!(%error, count = batch.len(), "violations are not in the event log");
            }
            batch.clear();
            if shutdown.is_cancelled() {
                return;
            }
        }
    }

    async fn write_events(&self, violations: &[Violation]) -> Result<(), PgError> {
        if violations.is_empty() {
            return Ok(());
        }
        let mut catalog = self.catalog().await?;
        let doing = failed("write to the event log");
        let transaction = catalog.transaction().await.map_err(&doing)?;
        for violation in violations {
            let detail = json!({
                "kind": violation.kind.as_str(),
                "action": violation.action.as_str(),
                "from": violation.from,
                "what": violation.what,
                "statement": violation.statement,
                "at": humantime::format_rfc3339_millis(violation.at).to_string(),
            });
            let tenant = TenantId::parse(&violation.tenant).ok();
            records::event(&transaction, &violation.who, "violation", tenant.as_ref(), &detail).await?;
        }
        transaction.commit().await.map_err(&doing)?;
        catalog.give_back().await;
        Ok(())
    }

    /// Writes a change into the audit log, if there is one.
    pub(super) async fn audit_change(&self, who: &str, what: &str, tenant: Option<&TenantId>, detail: &Value) {
        let detail =
            if detail.as_object().is_some_and(|fields| fields.is_empty()) { String::new() } else { detail.to_string() };
        self.audit(vec![Entry::control(who, what, tenant.map_or("", TenantId::as_str), detail)]).await;
    }

    /// Whether the entries are in the audit log, or there is none.
    async fn audit(&self, entries: Vec<Entry>) -> bool {
        let Some(audit) = self.audit.clone().filter(|_| !entries.is_empty()) else { return true };
        match tokio::task::spawn_blocking(move || audit.append(&entries)).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::error!(%error, "cannot write to the audit log");
                false
            }
            Err(_) => false,
        }
    }
}
