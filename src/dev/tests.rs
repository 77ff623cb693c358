use super::*;

#[test]
fn no_shard_with_data_is_left_out() {
    assert_eq!(shard_names(2, 0), ["shard_1", "shard_2"]);
    assert_eq!(shard_names(1, 2), ["shard_1", "shard_2"]);
}

#[test]
fn tenants_are_checked_before_anything_starts() {
    let parse = |text: &str| parse_tenants(&text.split(',').map(str::to_owned).collect::<Vec<_>>());
    assert_eq!(parse("client_001, client_002,").unwrap().len(), 2);
    assert!(parse("").unwrap().is_empty());
    let error = parse("ok,NotOk").unwrap_err().to_string();
    assert!(error.contains("NotOk"), "{error}");
}

#[test]
fn port_zero_frees_the_http_ports_too() {
    assert_eq!(http_address("127.0.0.1:6480", 0), "127.0.0.1:0");
    assert_eq!(http_address("", 0), "");
}

#[test]
fn an_edited_template_is_kept() {
    let root = tempfile::tempdir().unwrap();
    let dir = write_template(root.path()).unwrap();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), TEMPLATE.len());
    std::fs::write(dir.join("01_users.sql"), "SELECT 1").unwrap();
    write_template(root.path()).unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("01_users.sql")).unwrap(), "SELECT 1");
}

/// Starts real clusters where PostgreSQL is installed.
#[test]
fn clusters_come_back_with_their_ports_and_data() {
    if matches!(Binaries::find(|name| std::env::var(name).ok()), Err(DevError::NoPostgres)) {
        eprintln!("skipped: no PostgreSQL");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("data");
    let (data, clusters) = start_clusters(Some(&path), 2).unwrap();
    let ports: Vec<u16> = clusters.iter().map(|cluster| cluster.port).collect();
    psql(&data, ports[0], "CREATE TABLE t AS SELECT 42 AS answer");
    let dir = clusters[0].dir().to_owned();
    stop_clusters(clusters);
    assert!(!dir.join("postmaster.pid").exists());
    drop(data);

    // One shard asked for, but two have data.
    let (data, clusters) = start_clusters(Some(&path), 1).unwrap();
    assert_eq!(clusters.iter().map(|cluster| cluster.port).collect::<Vec<_>>(), ports);
    assert_eq!(psql(&data, ports[0], "TABLE t"), "42");

    // A pgusher that is killed closes the pipes without waiting; so does a drop.
    drop(clusters);
    drop(data);
    let (data, clusters) = start_clusters(Some(&path), 2).unwrap();
    assert_eq!(psql(&data, clusters[0].port, "TABLE t"), "42");
    stop_clusters(clusters);
    if let Some(elsewhere) = &data.state.clusters {
        std::fs::remove_dir_all(elsewhere).unwrap();
    }
}

fn psql(data: &DataDir, port: u16, sql: &str) -> String {
    let password = &data.state.postgres_password;
    let dsn = format!("postgresql://postgres:{password}@127.0.0.1:{port}/postgres");
    let output = std::process::Command::new("psql").args(["-XAtqc", sql, &dsn]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
