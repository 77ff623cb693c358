//! All outcomes: a line each, or JSON, and a summary.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::json;

use super::corpus::Unstoppable;
use super::run::Outcome;

/// What a run amounts to.
#[derive(Debug, Default)]
pub struct Summary {
    pub tried: usize,
    /// Leaked, and in the list of what the plan cannot stop.
    pub expected: Vec<String>,
    /// Leaked.
    pub leaked: Vec<String>,
    /// Rows of the other tenant were read or written.
    pub rows_crossed: Vec<String>,
    /// Could not be tried.
    pub broken: Vec<String>,
    /// In the list, and did not leak.
    pub better: Vec<String>,
    /// Refused for want of a right while reaching for the other tenant, and not counted.
    pub unseen: Vec<String>,
    /// Who stopped what.
    pub stopped: BTreeMap<String, usize>,
    pub counted: usize,
}

impl Summary {
    /// Looks at what came of a run. `counts` says whether metrics were read.
    pub fn of(outcomes: &[Outcome], unstoppable: &Unstoppable, plan: &str, grade: &str, counts: bool) -> Self {
        let mut summary = Self::default();
        for outcome in outcomes {
            summary.tried += 1;
            let id = outcome.id.clone();
            let known = unstoppable.reason(&id, plan, grade).is_some();
            if outcome.rows_crossed {
                summary.rows_crossed.push(id.clone());
            }
            if counts && outcome.violations.is_empty() && outcome.refused_crossing {
                summary.unseen.push(id.clone());
            }
            summary.counted += usize::from(!outcome.violations.is_empty());
            match (&outcome.broken, outcome.leaked) {
                (Some(_), _) => summary.broken.push(id),
                // What may leak is never rows.
                (None, true) if known && !outcome.rows_crossed => summary.expected.push(id),
                (None, true) => summary.leaked.push(id),
                (None, false) => {
                    if known {
                        summary.better.push(id);
                    }
                    let who = match &outcome.stopped_by {
                        Some(stop) => format!("{} {}", stop.by, stop.sqlstate),
                        None => "nothing to refuse".to_owned(),
                    };
                    *summary.stopped.entry(who).or_default() += 1;
                }
            }
        }
        summary
    }

    /// Nothing leaked that may not, everything was tried, and what was refused was counted.
    pub fn is_good(&self) -> bool {
        self.leaked.is_empty() && self.rows_crossed.is_empty() && self.broken.is_empty() && self.unseen.is_empty()
    }

    pub fn json(&self) -> serde_json::Value {
        json!({
            "summary": true, "tried": self.tried, "leaked": self.leaked, "expected": self.expected,
            "rows_crossed": self.rows_crossed, "broken": self.broken, "listed_but_stopped": self.better,
            "unseen": self.unseen, "counted": self.counted, "stopped": self.stopped,
        })
    }

    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let mut list = |what: &str, ids: &[String]| {
            let _ = writeln!(text, "{what:<44} {:>4}  {}", ids.len(), ids.join(" "));
        };
        list("leaked", &self.leaked);
        list("leaked, as the plan cannot stop them", &self.expected);
        list("rows of another tenant read or written", &self.rows_crossed);
        list("could not be tried", &self.broken);
        list("listed as unstoppable, did not leak", &self.better);
        list("refused reaching for another, not counted", &self.unseen);
        let _ = writeln!(text, "{:<44} {:>4}", "moved cross_tenant_isolation_violations", self.counted);
        for (who, n) in &self.stopped {
            let _ = writeln!(text, "{:<44} {n:>4}", format!("stopped: {who}"));
        }
        let _ = writeln!(text, "{:<44} {:>4}", "tried", self.tried);
        text
    }
}

/// One line about one entry.
pub fn line(outcome: &Outcome) -> String {
    let verdict = match (&outcome.broken, outcome.leaked) {
        (Some(_), _) => "BROKEN",
        (None, true) => "LEAKED",
        (None, false) => "stopped",
    };
    let mut line = format!("{:<8} {:<7} {:<12}", outcome.id, verdict, outcome.mode);
    if let Some(why) = &outcome.broken {
        let _ = write!(line, " {why}");
    }
    if !outcome.why.is_empty() {
        let _ = write!(line, " [{}]", outcome.why.join(", "));
    }
    if outcome.rows_crossed {
        line += " ROWS";
    }
    if outcome.stuck {
        line += " (no answer in time)";
    }
    if let Some(stop) = &outcome.stopped_by {
        let _ = write!(line, " {} {} {}", stop.by, stop.sqlstate, stop.message);
    }
    for (kind, moved) in &outcome.violations {
        let _ = write!(line, " +{moved} {kind}");
    }
    line
}
