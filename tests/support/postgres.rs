//! Throwaway PostgreSQL clusters: made by `initdb` in a temporary directory, gone on drop.
//!
//! PostgreSQL refuses to run as root, so when the tests do, its programs run as user `postgres`.

use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tokio_postgres::NoTls;

/// A running (or stopped) cluster. Superuser `postgres`, password [`PASSWORD`], SCRAM on TCP and socket.
pub struct Cluster {
    dir: tempfile::TempDir,
    bin: PathBuf,
    port: u16,
    settings: Vec<String>,
}

/// The superuser's password.
pub const PASSWORD: &str = "admin-secret";

/// Where the server's programs are: what `PGUSHER_PG_BIN` says, or the newest of Debian's directories.
pub fn bin_dir() -> Option<PathBuf> {
    match std::env::var_os("PGUSHER_PG_BIN") {
        Some(dir) => Some(dir.into()),
        None => packaged("initdb"),
    }
}

/// A client program (`psql`, `pgbench`, `pg_dump`): beside the server's, or else a packaged one of perhaps another
/// version.
pub fn client_program(name: &str) -> PathBuf {
    let beside = bin_dir().map(|dir| dir.join(name)).filter(|program| program.exists());
    beside.or_else(|| Some(packaged(name)?.join(name))).unwrap_or_else(|| name.into())
}

/// The newest of Debian's directories that has this program.
fn packaged(program: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let versions = entries.filter_map(|entry| {
        let version: u32 = entry.file_name().to_str()?.parse().ok()?;
        let bin = entry.path().join("bin");
        bin.join(program).exists().then_some((version, bin))
    });
    versions.max().map(|(_, bin)| bin)
}

/// A free port on loopback, as far as one can know.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Cluster {
    /// Makes and starts a cluster.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Makes and starts a cluster with more settings (`name=value`).
    pub fn start_with(settings: &[&str]) -> Self {
        let bin = bin_dir().expect("PostgreSQL's programs (initdb) are not installed");
        // The socket's path has at most 107 bytes: a short directory.
        let dir = tempfile::Builder::new().prefix("pgu").tempdir_in("/tmp").unwrap();
        if let Some((uid, gid)) = postgres_user() {
            std::os::unix::fs::chown(dir.path(), Some(uid), Some(gid)).unwrap();
        }
        let password_file = dir.path().join("pw");
        std::fs::write(&password_file, PASSWORD).unwrap();
        let mut cluster = Self { bin, port: 0, settings: settings.iter().map(|&s| s.to_owned()).collect(), dir };
        cluster.run("initdb", |c| {
            c.args(["-D", path(&cluster.data()), "-U", "postgres", "-A", "scram-sha-256", "-E", "UTF8"]).args([
                "--no-locale",
                "--no-sync",
                "--pwfile",
                path(&password_file),
            ])
        });
        // Between looking for a port and listening on it somebody else may have got it.
        for _ in 0..10 {
            cluster.port = free_port();
            match cluster.try_launch() {
                Ok(()) => return cluster,
                Err(said) => assert!(said.contains("Address already in use"), "{said}"),
            }
        }
        panic!("no port is free for long enough");
    }

    fn launch(&self) {
        self.try_launch().unwrap();
    }

    fn try_launch(&self) -> Result<(), String> {
        let mut options = format!(
            "-p {} -k {} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=120 -c autovacuum=off",
            self.port,
            path(self.dir.path())
        );
        for setting in &self.settings {
            options.push_str(&format!(" -c {setting}"));
        }
        let (data, log) = (self.data(), self.dir.path().join("log"));
        let start = ["-D", path(&data), "-l", path(&log), "-o", &options, "-w", "-t", "60", "start"];
        self.try_run("pg_ctl", |c| c.args(start))
    }

    /// Stops it at once, as a crash would; sessions are cut.
    pub fn stop(&self) {
        self.run("pg_ctl", |c| c.args(["-D", path(&self.data()), "-m", "immediate", "-w", "stop"]));
    }

    /// Starts it again on the same port and data.
    pub fn start_again(&self) {
        self.launch();
    }

    /// [`Cluster::stop`] and [`Cluster::start_again`].
    pub fn restart(&self) {
        self.stop();
        self.start_again();
    }

    /// TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Directory of its Unix socket.
    pub fn socket_dir(&self) -> &Path {
        self.dir.path()
    }

    /// The server's log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// A connection as superuser.
    pub async fn admin(&self, database: &str) -> tokio_postgres::Client {
        self.connect("postgres", PASSWORD, database).await.unwrap()
    }

    /// A direct connection, past every proxy.
    pub async fn connect(
        &self,
        user: &str,
        password: &str,
        database: &str,
    ) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::Config::new()
            .host("127.0.0.1")
            .port(self.port)
            .user(user)
            .password(password)
            .dbname(database)
            .connect(NoTls)
            .await?;
        tokio::spawn(connection);
        Ok(client)
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn run(&self, program: &str, arguments: impl FnOnce(&mut Command) -> &mut Command) {
        self.try_run(program, arguments).unwrap();
    }

    fn try_run(&self, program: &str, arguments: impl FnOnce(&mut Command) -> &mut Command) -> Result<(), String> {
        let mut command = Command::new(self.bin.join(program));
        arguments(&mut command);
        if let Some((uid, gid)) = postgres_user() {
            command.uid(uid).gid(gid);
        }
        // pg_ctl's child keeps what it inherits, so its output must not be a pipe that we wait on.
        let out = std::fs::File::create(self.dir.path().join(format!("{program}.out"))).unwrap();
        let status = command
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .status()
            .unwrap();
        let said = std::fs::read_to_string(self.dir.path().join(format!("{program}.out"))).unwrap_or_default();
        if status.success() { Ok(()) } else { Err(format!("{program} failed: {said}\n{}", self.log())) }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let mut command = Command::new(self.bin.join("pg_ctl"));
        command.args(["-D", path(&self.data()), "-m", "immediate", "stop"]);
        if let Some((uid, gid)) = postgres_user() {
            command.uid(uid).gid(gid);
        }
        let _ = command.current_dir("/tmp").stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// User and group that PostgreSQL's programs must run as: `postgres` if we are root.
fn postgres_user() -> Option<(u32, u32)> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let user = nix::unistd::User::from_name("postgres").unwrap().expect("no user postgres on this machine");
    Some((user.uid.as_raw(), user.gid.as_raw()))
}
