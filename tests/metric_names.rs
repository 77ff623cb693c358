//! Dashboard, alert rules and documentation name only metrics that exist, and the documentation names all of them.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use regex::Regex;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Names in the first column of the tables of docs/metrics.md: (ours, those of others). Histograms with their series.
fn documented() -> (BTreeSet<String>, BTreeSet<String>) {
    let text = read("docs/metrics.md");
    let row = Regex::new(r"(?m)^\| `(\w+)` \| (\w+)").unwrap();
    let (ours, rest) = text.split_once("## From others").unwrap();
    let (others, _) = rest.split_once("## Alerts").unwrap();
    let names = |text: &str| {
        let mut names = BTreeSet::new();
        for found in row.captures_iter(text) {
            if &found[2] == "histogram" {
                names.extend(["_bucket", "_sum", "_count"].map(|series| format!("{}{series}", &found[1])));
            } else {
                names.insert(found[1].to_owned());
            }
        }
        names
    };
    (names(ours), names(others))
}

/// The metrics that a PromQL expression reads.
fn metrics_in(expr: &str) -> BTreeSet<String> {
    let noise = [
        r#""[^"]*""#,                                                              // strings
        r"\{[^}]*\}",                                                              // label matchers
        r"\[[^\]]*\]",                                                             // ranges
        r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",          // label lists
        r"\boffset\s+\w+",                                                         // durations
        r"\b(and|or|unless|bool|by|without|on|ignoring|group_left|group_right)\b", // words
        r"\b\w+\s*\(",                                                             // functions
        r"\b[0-9][0-9.eE]*\b",                                                     // numbers
    ];
    let bare = noise
        .iter()
        .fold(expr.to_owned(), |text, pattern| Regex::new(pattern).unwrap().replace_all(&text, " ").into_owned());
    Regex::new(r"[a-zA-Z_:][a-zA-Z0-9_:]*").unwrap().find_iter(&bare).map(|name| name.as_str().to_owned()).collect()
}

fn dashboard_expressions() -> Vec<String> {
    fn collect(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(map) => {
                found.extend(map.get("expr").and_then(|expr| expr.as_str()).map(str::to_owned));
                map.values().for_each(|value| collect(value, found));
            }
            serde_json::Value::Array(list) => list.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    collect(&serde_json::from_str(&read("config/grafana/dashboards/pgusher.json")).unwrap(), &mut found);
    found
}

/// `expr: …` on one line, or `expr: |` with deeper lines below.
fn rule_expressions() -> Vec<String> {
    let text = read("config/prometheus/rules.yml");
    let lines: Vec<&str> = text.lines().collect();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let expressions = lines.iter().enumerate().filter_map(|(at, line)| {
        let expr = line.trim_start().strip_prefix("expr: ")?;
        if expr != "|" {
            return Some(expr.to_owned());
        }
        let below = lines[at + 1..].iter().take_while(|next| indent(next) > indent(line));
        Some(below.copied().collect::<Vec<_>>().join("\n"))
    });
    expressions.collect()
}

#[test]
fn metrics_are_found_in_expressions() {
    for (expr, expected) in [
        ("max by (shard) (a_b) > 1000", vec!["a_b"]),
        (r#"rate(a{x="c"}[5m]) / on (y) group_left (z) b unless c offset 5m"#, vec!["a", "b", "c"]),
        ("histogram_quantile(0.95, sum by (le) (rate(h_bucket[5m])))", vec!["h_bucket"]),
        ("time() - 1e3 * up", vec!["up"]),
    ] {
        assert_eq!(metrics_in(expr), expected.into_iter().map(str::to_owned).collect(), "{expr}");
    }
}

#[test]
fn dashboard_and_rules_name_documented_metrics() {
    let (ours, others) = documented();
    let (dashboard, rules) = (dashboard_expressions(), rule_expressions());
    assert!(dashboard.len() > 20 && rules.len() >= 4, "{} and {} expressions", dashboard.len(), rules.len());
    for expr in dashboard.iter().chain(&rules) {
        let metrics = metrics_in(expr);
        assert!(!metrics.is_empty(), "no metric in {expr}");
        for metric in metrics {
            assert!(ours.contains(&metric) || others.contains(&metric), "{metric} in {expr} is not in docs/metrics.md");
        }
    }
}

#[test]
fn documentation_and_source_name_the_same_metrics() {
    let text = read("docs/metrics.md");
    let (ours, _) = text.split_once("## From others").unwrap();
    let documented: BTreeSet<String> =
        Regex::new(r"(?m)^\| `(\w+)` ").unwrap().captures_iter(ours).map(|found| found[1].to_owned()).collect();
    let name = Regex::new(r"\b(?:pgusher|tenant|shard|cross_tenant)_[a-z_]+\b").unwrap();
    let (mut words, mut exported) = (BTreeSet::new(), BTreeSet::new());
    for path in rust_files(&root().join("src")) {
        let source = std::fs::read_to_string(&path).unwrap();
        let found: Vec<String> = name.find_iter(&source).map(|word| word.as_str().to_owned()).collect();
        if path.to_string_lossy().contains("export") {
            exported.extend(found.iter().filter(|word| word.starts_with("pgusher_")).cloned());
        }
        words.extend(found);
    }
    // process_* come from the library's collector; a running proxy shows whether they are there.
    let missing: Vec<_> =
        documented.iter().filter(|name| !name.starts_with("process_") && !words.contains(*name)).collect();
    assert!(missing.is_empty(), "documented, but in no source file: {missing:?}");
    let unknown: Vec<_> = exported.difference(&documented).collect();
    assert!(unknown.is_empty(), "exported, but not documented: {unknown:?}");
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => files.extend(rust_files(&path)),
            path if path.extension().is_some_and(|extension| extension == "rs") => files.push(path),
            _ => {}
        }
    }
    files
}
