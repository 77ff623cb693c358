//! `pgusher dev` as its users see it: ready, used, killed, started again, stopped.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A running `pgusher dev`, stopped at the end of the test.
struct Dev {
    child: Child,
    ready: Value,
}

impl Dev {
    /// Starts it and waits for its line of JSON; `None` where there is no PostgreSQL.
    fn start(data: &Path, arguments: &[&str]) -> Option<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgusher"));
        command.args(["dev", "--json", "--port", "0", "--data"]).arg(data).args(arguments);
        let log = data.with_extension("log");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(std::fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            let _ = child.wait();
            let message = std::fs::read_to_string(&log).unwrap();
            assert!(message.contains("PostgreSQL's programs"), "it did not start: {message}");
            eprintln!("skipped: no PostgreSQL");
            return None;
        }
        Some(Self { child, ready: serde_json::from_str(&line).unwrap() })
    }

    fn text(&self, pointer: &str) -> String {
        self.ready.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("no {pointer}")).to_owned()
    }

    fn psql(&self, dsn: &str, sql: &str) -> Result<String, String> {
        let output = Command::new("psql").args(["-XAtqc", sql, dsn]).env("PGCONNECT_TIMEOUT", "10").output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Sends a signal and returns the exit code, if there is one.
    fn end(mut self, signal: &str) -> Option<i32> {
        assert!(Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // Its clusters stop when it does.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "still not: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn listens(port: &Value) -> bool {
    let port = u16::try_from(port.as_u64().unwrap()).unwrap();
    std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
}

#[test]
fn dev_serves_and_comes_back_with_its_data() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    let Some(dev) = Dev::start(&data, &["--shards", "2"]) else { return };

    for pointer in ["/host", "/metrics", "/api", "/shards/0/name", "/tenants/0/shard", "/app_user/name"] {
        dev.text(pointer);
    }
    assert!(listens(&dev.ready["port"]));
    assert_eq!(dev.ready["shards"].as_array().unwrap().len(), 2);
    assert!(dev.ready["shards"].as_array().unwrap().iter().all(|shard| listens(&shard["port"])));
    assert_eq!((dev.text("/tenants/0/id"), dev.text("/tenants/0/schema")), ("client_001".into(), "client_001".into()));

    let (one, two) = (dev.text("/tenants/0/dsn"), dev.text("/tenants/1/dsn"));
    dev.psql(&one, "INSERT INTO bookings (note) VALUES ('kept')").unwrap();
    assert_eq!(dev.psql(&two, "SELECT count(*) FROM bookings").unwrap(), "0");
    let app = dev.text("/app_user/name");
    let (host, port, password) = (dev.text("/host"), dev.ready["port"].clone(), dev.text("/app_user/password"));
    let new = format!("postgresql://{app}.client_077:{password}@{host}:{port}/client_077");
    assert_eq!(dev.psql(&new, "SELECT current_user, count(*) FROM bookings").unwrap(), "client_077|0");
    assert!(dev.psql(&one.replace("client_001:", "client_001:x"), "SELECT 1").unwrap_err().contains("client_001"));

    // Killed, it leaves nothing running; started again, it has everything.
    let shards = dev.ready["shards"].clone();
    assert_eq!(dev.end("-KILL"), None);
    wait_until("the clusters stop", || shards.as_array().unwrap().iter().all(|shard| !listens(&shard["port"])));
    let dev = Dev::start(&data, &["--shards", "2"]).unwrap();
    let ports = |shards: &Value| -> Vec<Value> {
        shards.as_array().unwrap().iter().map(|shard| shard["port"].clone()).collect()
    };
    assert_eq!(ports(&dev.ready["shards"]), ports(&shards));
    assert_eq!(dev.psql(&dev.text("/tenants/0/dsn"), "SELECT note FROM bookings").unwrap(), "kept");

    let elsewhere: Value = serde_json::from_slice(&std::fs::read(data.join("dev.json")).unwrap()).unwrap();
    assert_eq!(dev.end("-INT"), Some(0));
    assert!(shards.as_array().unwrap().iter().all(|shard| !listens(&shard["port"])));
    if let Some(clusters) = elsewhere["clusters"].as_str() {
        std::fs::remove_dir_all(clusters).unwrap();
    }
}

#[test]
fn two_devs_live_side_by_side_and_one_data_directory_has_one_owner() {
    let root = tempfile::tempdir().unwrap();
    let (a, b) = (root.path().join("a"), root.path().join("b"));
    let Some(first) = Dev::start(&a, &["--shards", "1", "--tenants", "acme"]) else { return };
    let second = Dev::start(&b, &["--shards", "1", "--tenants", "acme"]).unwrap();
    for field in ["port", "metrics", "api"] {
        assert_ne!(first.ready[field], second.ready[field], "{field}");
    }
    let mut third = Command::new(env!("CARGO_BIN_EXE_pgusher"));
    let third = third.args(["dev", "--port", "0", "--data"]).arg(&a).output().unwrap();
    let message = String::from_utf8_lossy(&third.stderr).into_owned();
    assert!(!third.status.success() && message.contains("in use") && message.contains("HINT"), "{message}");
    assert_eq!(second.end("-TERM"), Some(0));
    assert_eq!(first.end("-INT"), Some(0));
}
