//! What `pgusher tenant …` and `pgusher shard …` do: one command on the catalog, without a running proxy.
//!
//! Each function returns the text to print, for people or (`json`) for scripts. Running proxies follow the catalog,
//! so a deletion closes sessions there too.

use std::fmt::Write as _;
use std::sync::Arc;

use serde::Serialize;

use super::adopt::Adoption;
use super::canary::Outcome;
use super::provision::Choice;
use super::records::{ShardRecord, TenantRecord};
use super::shared_tables::Conversion;
use super::{Control, ControlError};
use crate::config::Config;
use crate::error::{PgError, sqlstate};
use crate::tenant::TenantId;
use crate::tenant::adopt::Weight;

/// Who did it, in the event log.
const WHO: &str = "command line";

/// Makes a tenant, on this shard and with this plan, or where ring and configuration say.
///
/// # Errors
/// The id is not one, the catalog or the shard is away, the template fails.
pub async fn tenant_create(config: &Config, id: &str, choice: &Choice, json: bool) -> Result<String, ControlError> {
    let id = tenant_id(id)?;
    let control = Control::open(Arc::new(config.clone())).await?;
    let record = control.create(&id, WHO, choice.clone()).await?;
    Ok(if json { as_json(&record) } else { format!("tenant {id} is {} on shard {}\n", record.status, record.shard) })
}

/// Lists tenants in the order of their ids, all of them or `limit` from the first after `after` on.
///
/// # Errors
/// The catalog is away.
pub async fn tenant_list(
    config: &Config,
    after: Option<&str>,
    limit: Option<u32>,
    deleted: bool,
    json: bool,
) -> Result<String, ControlError> {
    const PAGE: u32 = 10_000;
    let control = Control::open(Arc::new(config.clone())).await?;
    let mut records: Vec<TenantRecord> = Vec::new();
    let mut left = limit.unwrap_or(u32::MAX);
    loop {
        let last = records.last().map(|record| record.id.clone());
        let from = last.as_deref().or(after).unwrap_or_default();
        let wanted = left.min(PAGE);
        let page = control.list(from, wanted, deleted).await?;
        let got = u32::try_from(page.len()).unwrap_or(u32::MAX);
        records.extend(page);
        left = left.saturating_sub(got);
        if got < wanted || left == 0 {
            break;
        }
    }
    Ok(if json { as_json(&records) } else { tenant_table(&records) })
}

/// Shows one tenant.
///
/// # Errors
/// There is none, or the catalog is away.
pub async fn tenant_show(config: &Config, id: &str, json: bool) -> Result<String, ControlError> {
    let id = tenant_id(id)?;
    let control = Control::open(Arc::new(config.clone())).await?;
    let record = control.show(&id).await?;
    if json {
        return Ok(as_json(&record));
    }
    let mut text = String::new();
    for (name, value) in [
        ("id", record.id.as_str()),
        ("status", &record.status),
        ("plan", &record.plan),
        ("shard", &record.shard),
        ("database", &record.database),
        ("schema", &record.schema),
        ("role", &record.role),
        ("epoch", &record.epoch.to_string()),
        ("created", &record.created_at),
        ("changed", &record.changed_at),
        ("deleted", record.deleted_at.as_deref().unwrap_or("-")),
    ] {
        let _ = writeln!(text, "{name:<9} {value}");
    }
    Ok(text)
}

/// Deletes a tenant: its data is gone when this returns.
///
/// # Errors
/// There is none, or the catalog or the shard is away.
pub async fn tenant_delete(config: &Config, id: &str, json: bool) -> Result<String, ControlError> {
    let id = tenant_id(id)?;
    let control = Control::open(Arc::new(config.clone())).await?;
    let record = control.delete(&id, WHO).await?;
    if json {
        return Ok(as_json(&record));
    }
    let kept = if record.managed { "" } else { "; its place was there before it and is still there" };
    Ok(format!("tenant {id} is {}{kept}\n", record.status))
}

/// Lists the shards of the catalog.
///
/// # Errors
/// The catalog is away.
pub async fn shard_list(config: &Config, json: bool) -> Result<String, ControlError> {
    let control = Control::open(Arc::new(config.clone())).await?;
    let shards = control.list_shards().await?;
    if json {
        return Ok(as_json(&shards));
    }
    let rows = shards.iter().map(|s| {
        let at = format!("{}:{}", s.host, s.port);
        vec![s.name.clone(), at, s.database.clone(), s.weight.to_string(), s.region.clone(), s.tenants.to_string()]
    });
    Ok(table(&["name", "address", "database", "weight", "region", "tenants"], rows.collect()))
}

/// Adds a shard, or changes one. Its administrator is `[provision] admin_user`, unless the config has the shard.
///
/// # Errors
/// The shard cannot be set up, or the catalog is away.
pub async fn shard_add(config: &Config, shard: &ShardRecord, json: bool) -> Result<String, ControlError> {
    let control = Control::open(Arc::new(config.clone())).await?;
    control.add_shard(shard, WHO).await?;
    Ok(if json { as_json(shard) } else { format!("shard {} is ready\n", shard.name) })
}

/// Makes the tables of a database into ones that tenants share, or says how.
///
/// # Errors
/// Every reason why it cannot be done safely.
pub async fn rls_convert(config: &Config, conversion: &Conversion, json: bool) -> Result<String, ControlError> {
    let control = Control::open(Arc::new(config.clone())).await?;
    let sql = control.convert_tables(conversion).await?;
    if json {
        return Ok(as_json(&serde_json::json!({ "applied": conversion.apply, "sql": sql })));
    }
    Ok(script(&sql, conversion.apply))
}

/// Takes in a schema or database that is there, or says what contradicts the plan.
///
/// # Errors
/// What the server or the catalog said.
pub async fn tenant_adopt(config: &Config, adoption: &Adoption, json: bool) -> Result<String, ControlError> {
    let control = Control::open(Arc::new(config.clone())).await?;
    let done = control.adopt(adoption, WHO).await?;
    if json {
        return Ok(as_json(&done));
    }
    let mut text = String::new();
    for finding in &done.findings {
        let weight = match finding.weight {
            Weight::Note => "note",
            Weight::Fix if done.adopted => "repaired",
            Weight::Fix => "wrong",
            Weight::Blocks => "in the way",
        };
        let _ = writeln!(text, "-- {weight}: {}", finding.what);
    }
    text += &script(&done.sql, done.adopted);
    let _ = match done.adopted {
        true => writeln!(text, "-- tenant {} is active", adoption.id),
        false if done.findings.iter().any(|finding| finding.weight == Weight::Blocks) => {
            writeln!(text, "-- what is in the way must be removed by hand")
        }
        false => writeln!(text, "-- with --fix this is run, and the tenant registered"),
    };
    Ok(text)
}

/// What the API says of the canary, for people or scripts, and whether nothing leaked and everything was tried.
///
/// # Errors
/// That is not what it says.
pub fn canary_report(answer: &str, json: bool) -> Result<(String, bool), serde_json::Error> {
    #[derive(serde::Deserialize)]
    struct Answer {
        canary: Vec<Outcome>,
    }
    let Answer { canary } = serde_json::from_str(answer)?;
    let safe = canary.iter().all(|outcome| outcome.leaks.is_empty() && outcome.errors.is_empty());
    if json {
        return Ok((as_json(&canary), safe));
    }
    let row = |o: &Outcome| {
        let [attacks, leaks, errors] = [o.attacks, o.leaks.len(), o.errors.len()].map(|n| n.to_string());
        vec![o.shard.clone(), o.plan.clone(), attacks, leaks, errors]
    };
    let mut text = table(&["shard", "plan", "attacks", "leaks", "errors"], canary.iter().map(row).collect());
    for outcome in &canary {
        for (what, list) in [("LEAK", &outcome.leaks), ("error", &outcome.errors)] {
            for line in list {
                let _ = writeln!(text, "{what}: shard {}, plan {}: {line}", outcome.shard, outcome.plan);
            }
        }
    }
    if canary.is_empty() {
        text += "there is no shard that tenants share\n";
    }
    Ok((text, safe))
}

/// Statements as a person reads them, and psql.
fn script(sql: &[String], applied: bool) -> String {
    let end = if applied { "-- done, in one transaction" } else { "-- nothing was changed" };
    if sql.is_empty() {
        return "-- nothing to be done\n".to_owned();
    }
    format!("BEGIN;\n{};\nCOMMIT;\n{end}\n", sql.join(";\n"))
}

fn tenant_id(text: &str) -> Result<TenantId, PgError> {
    TenantId::parse(text).map_err(|error| PgError::error(sqlstate::INVALID_PARAMETER_VALUE, error.to_string()))
}

fn as_json(value: &impl Serialize) -> String {
    // These records consist of texts and numbers, which always can be written.
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}

fn tenant_table(records: &[TenantRecord]) -> String {
    let row =
        |r: &TenantRecord| vec![r.id.clone(), r.status.clone(), r.plan.clone(), r.shard.clone(), r.created_at.clone()];
    table(&["id", "status", "plan", "shard", "created"], records.iter().map(row).collect())
}

fn table(heads: &[&str], rows: Vec<Vec<String>>) -> String {
    let width = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0).max(heads[at].len());
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &[&str]| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", padded.join("  ").trim_end());
    };
    line(heads);
    for row in &rows {
        line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["a".to_owned(), "long cell".to_owned()], vec!["bcd".to_owned(), "x".to_owned()]];
        assert_eq!(table(&["h", "k"], rows), "h    k\na    long cell\nbcd  x\n");
    }
}
