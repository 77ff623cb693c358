//! The canary's attacks: data, and when one counts as a leak. No I/O.

use serde::Deserialize;

use crate::tenant::Plan;

/// The table that victim and attacker have, and the statements that make it, in plans where a tenant makes its own.
pub(super) const TABLE: &str = "pgusher_canary";
/// In which the victim's row is; the attacker's note says whose it is.
pub(super) const MAKE: &str = "\
    CREATE TABLE pgusher_canary (id int PRIMARY KEY, note text); \
    CREATE SEQUENCE pgusher_canary_seq; \
    CREATE FUNCTION pgusher_canary_note() RETURNS text LANGUAGE sql AS 'SELECT note FROM pgusher_canary'";
/// What attacks leave behind, so that the next one does not fail because of it.
pub(super) const TIDY: &[&str] = &[
    "DROP FUNCTION IF EXISTS pgusher_peek()",
    "DROP VIEW IF EXISTS pgusher_peek",
    "DROP TABLE IF EXISTS pgusher_loot",
    "DROP FUNCTION IF EXISTS pgusher_become()",
    "DROP FUNCTION IF EXISTS pgusher_spy() CASCADE",
];
/// The advisory lock that `lock-advisory` takes.
pub(super) const ADVISORY_KEY: i64 = 4711;

/// One attack. It leaks if the victim's secret is in what it hears, if the victim's rows, session or locks are not as
/// they were, and if one of its own conditions holds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Attack {
    pub(super) id: String,
    plans: Vec<String>,
    /// Messages, one after the other, whatever the answers are.
    sql: Vec<String>,
    /// The value of `$1`, bound as a parameter.
    value: Option<String>,
    /// It leaks if nothing fails.
    #[serde(default)]
    must_fail: bool,
    /// It leaks if a value that it gets is the victim's role, or the administrator's.
    #[serde(default)]
    becomes: bool,
    /// The victim then sends a notification with its secret.
    #[serde(default)]
    pub(super) listens: bool,
}

/// The victim, as far as the attacker knows it.
#[derive(Debug, Clone)]
pub(super) struct Names {
    pub(super) attacker: String,
    pub(super) victim: String,
    pub(super) victim_database: String,
    pub(super) victim_schema: String,
    pub(super) victim_pid: i32,
}

/// What the attacker heard.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Values of rows, lines of COPY, notices, notifications, errors with all their fields.
    pub(super) all: Vec<String>,
    /// Values of rows.
    pub(super) values: Vec<String>,
    /// Statements that failed.
    pub(super) failed: usize,
}

/// The attacks that are part of this program.
///
/// # Errors
/// A line is not one: a test finds that.
pub(super) fn all() -> Result<Vec<Attack>, serde_json::Error> {
    include_str!("attacks.jsonl").lines().map(serde_json::from_str).collect()
}

impl Attack {
    pub(super) fn is_for(&self, plan: Plan) -> bool {
        self.plans.iter().any(|name| name == plan.as_str())
    }

    /// Its messages, each with the value to bind.
    pub(super) fn messages(&self, names: &Names) -> Vec<(String, Option<String>)> {
        let value = self.value.as_deref().map(|value| names.fill(value));
        self.sql.iter().map(|sql| (names.fill(sql), value.clone().filter(|_| sql.contains("$1")))).collect()
    }

    /// What it has reached by what it heard, if anything.
    pub(super) fn reached(&self, heard: &Heard, secret: &str, names: &Names, admin: &str) -> Option<&'static str> {
        if heard.all.iter().any(|text| text.contains(secret)) {
            return Some("it read the victim's secret");
        }
        if self.becomes && heard.values.iter().any(|value| *value == names.victim || value == admin) {
            return Some("it became somebody else");
        }
        (self.must_fail && heard.failed == 0).then_some("nobody refused it")
    }
}

impl Names {
    fn fill(&self, text: &str) -> String {
        text.replace("{attacker}", &self.attacker)
            .replace("{victim}", &self.victim)
            .replace("{victim_database}", &self.victim_database)
            .replace("{victim_schema}", &self.victim_schema)
            .replace("{victim_pid}", &self.victim_pid.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names {
            attacker: "a".into(),
            victim: "b".into(),
            victim_database: "d".into(),
            victim_schema: "s".into(),
            victim_pid: 7,
        }
    }

    #[test]
    fn every_line_is_an_attack_and_has_a_name_of_its_own() {
        let attacks = all().unwrap();
        let ids: std::collections::BTreeSet<_> = attacks.iter().map(|attack| attack.id.as_str()).collect();
        assert_eq!(ids.len(), attacks.len());
        for plan in [Plan::Rls, Plan::Schema, Plan::Database] {
            assert!(attacks.iter().filter(|attack| attack.is_for(plan)).count() >= 25, "{plan:?}");
        }
        for attack in &attacks {
            assert!(attack.plans.iter().all(|plan| Plan::parse(plan).is_some()), "{}", attack.id);
            for (sql, _) in attack.messages(&names()) {
                assert!(!sql.contains('{'), "{}: {sql}", attack.id);
            }
        }
    }

    #[test]
    fn what_counts_as_a_leak() {
        let attack = |more: &str| -> Attack {
            serde_json::from_str(&format!(r#"{{"id": "x", "plans": [], "sql": []{more}}}"#)).unwrap()
        };
        let heard = |values: &[&str], failed| {
            let values: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
            Heard { all: values.clone(), values, failed }
        };
        let reached = |attack: &Attack, heard: &Heard| attack.reached(heard, "SECRET", &names(), "postgres").is_some();
        assert!(reached(&attack(""), &heard(&["xSECRETx"], 1)));
        assert!(!reached(&attack(""), &heard(&["b"], 0)));
        let becomes = attack(r#", "becomes": true"#);
        assert!(reached(&becomes, &heard(&["b"], 1)) && reached(&becomes, &heard(&["postgres"], 1)));
        assert!(!reached(&becomes, &heard(&["a"], 0)));
        let must_fail = attack(r#", "must_fail": true"#);
        assert!(reached(&must_fail, &heard(&[], 0)) && !reached(&must_fail, &heard(&[], 1)));
    }
}
