//! Runs what the fuzzers run once over their seeds, so that neither can rot. The fuzzers themselves: `make fuzz`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on fails")]

#[path = "../fuzz/src/lib.rs"]
#[allow(unreachable_pub, missing_docs, reason = "it is a crate of its own for the fuzzers")]
mod targets;

use std::path::Path;

/// What a line of a seed file stands for: the reverse of `escape_ascii`.
fn unescape(line: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = line.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        let (value, length) = match (byte, behind.first()) {
            (b'\\', Some(b'x')) => (u8::from_str_radix(std::str::from_utf8(&rest[2..4]).unwrap(), 16).unwrap(), 4),
            (b'\\', Some(b't')) => (b'\t', 2),
            (b'\\', Some(b'n')) => (b'\n', 2),
            (b'\\', Some(b'r')) => (b'\r', 2),
            (b'\\', Some(&other)) => (other, 2),
            _ => (byte, 1),
        };
        bytes.push(value);
        rest = &rest[length..];
    }
    bytes
}

fn over_seeds(target: &str, run: fn(&[u8])) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/seeds/{target}.txt"));
    let text = std::fs::read_to_string(path).unwrap();
    let mut count = 0;
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with("# ")) {
        let data = unescape(line);
        assert_eq!(data.escape_ascii().to_string(), line, "not in the one spelling");
        if std::panic::catch_unwind(|| run(&data)).is_err() {
            panic!("{target}, seed: {line}");
        }
        // Cut off anywhere it is an input as well.
        for end in (0..data.len()).step_by(data.len() / 8 + 1) {
            run(&data[..end]);
        }
        count += 1;
    }
    assert!(count > 20, "hardly any seeds: {count}");
}

#[test]
fn startup() {
    over_seeds("startup", targets::startup::run);
}

#[test]
fn framing() {
    over_seeds("framing", targets::framing::run);
}

#[test]
fn scram_server() {
    over_seeds("scram_server", targets::scram_server::run);
}

#[test]
fn scram_client() {
    over_seeds("scram_client", targets::scram_client::run);
}

#[test]
fn guard() {
    over_seeds("guard", targets::guard::run);
}
