//! One embedded PostgreSQL cluster: made, started, stopped.
//!
//! PostgreSQL refuses to run as root, so a root `dev` runs it as another user ([`OsUser`]).
//!
//! A cluster never outlives pgusher: its postmaster is the child of a small shell that holds the reading end of a pipe.
//! When the writing end goes away, because we drop it or because we were killed, the shell asks for a fast shutdown.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use super::DevError;
use super::binaries::Binaries;
use super::ports;

/// How long a postmaster may take to come up (crash recovery included) or to go down.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often we look whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Starts that failed for a reason that passes: a port taken in between, a killed server's last processes.
const ATTEMPTS: usize = 5;

/// Runs its arguments; asks them for a fast shutdown (SIGINT) when its standard input ends, again and again since a
/// server that is just starting does not hear it.
const WATCHDOG: &str = r#"
trap '' INT HUP TERM
exec 3<&0
"$@" 3<&- </dev/null & server=$!
{ read -r _ <&3; while kill -INT "$server"; do sleep 0.2; done; } 2>/dev/null & watcher=$!
exec 3<&-
wait "$server"; code=$?
kill -KILL "$watcher" 2>/dev/null
exit "$code"
"#;

/// The operating system user that runs the servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OsUser {
    /// Its name, for messages.
    pub name: String,
    uid: u32,
    gid: u32,
}

impl OsUser {
    /// Nobody else when we are not root; else the user that `wanted` names, or `postgres`, or `nobody`.
    ///
    /// # Errors
    /// [`DevError::NoServerUser`] if there is none, or if it is root again.
    pub(super) fn choose(wanted: Option<String>) -> Result<Option<Self>, DevError> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(None);
        }
        let candidates = match wanted {
            Some(name) => vec![name],
            None => vec!["postgres".to_owned(), "nobody".to_owned()],
        };
        let found = candidates.iter().find_map(|name| nix::unistd::User::from_name(name).ok().flatten());
        match found.filter(|user| !user.uid.is_root()) {
            Some(user) => Ok(Some(Self { name: user.name, uid: user.uid.as_raw(), gid: user.gid.as_raw() })),
            None => Err(DevError::NoServerUser { names: candidates.join(", ") }),
        }
    }

    /// Whether this user can get to `path`: every directory above it must let it through.
    pub(super) fn can_reach(&self, path: &Path) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        path.ancestors().all(|dir| {
            fs::metadata(dir).is_ok_and(|meta| {
                let bit = match () {
                    () if meta.uid() == self.uid => 0o100,
                    () if meta.gid() == self.gid => 0o010,
                    () => 0o001,
                };
                meta.mode() & bit != 0
            })
        })
    }
}

/// What all clusters of one `dev` have in common.
#[derive(Debug, Clone)]
pub(super) struct Setup {
    /// PostgreSQL's programs.
    pub binaries: Binaries,
    /// Who runs them; ourselves if absent.
    pub user: Option<OsUser>,
    /// Directory that holds the clusters' directories and logs.
    pub home: PathBuf,
    /// The superuser's password.
    pub password: String,
    /// Whether the data must survive a power cut.
    pub durable: bool,
}

impl Setup {
    /// A command that runs as the server user, in a directory that this user may enter.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.home).stdin(Stdio::null());
        // Messages are read by us and by tests; a time zone or service file of the caller has no business here.
        command.env("LC_ALL", "C").env_remove("PGDATA").env_remove("PGPORT").env_remove("TZ");
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    fn give_away(&self, path: &Path) -> std::io::Result<()> {
        match &self.user {
            Some(user) => chown(path, Some(user.uid), Some(user.gid)),
            None => Ok(()),
        }
    }
}

/// A running cluster. Dropping it asks the server to stop; [`Cluster::stop`] also waits.
#[derive(Debug)]
pub(super) struct Cluster {
    /// The shard's name, and that of its directory.
    pub name: String,
    /// Port on loopback.
    pub port: u16,
    dir: PathBuf,
    setup: Setup,
    watchdog: Child,
    lifeline: Option<ChildStdin>,
}

impl Cluster {
    /// Makes the cluster if it does not exist, takes it over from a pgusher that died, and starts it. `port` is where it
    /// was last; if somebody else is there now, it gets another one.
    ///
    /// # Errors
    /// What `initdb` or the server's log said.
    pub(super) fn start(setup: &Setup, name: &str, port: Option<u16>) -> Result<Self, DevError> {
        let dir = setup.home.join(name);
        let io = |source| DevError::Io { path: dir.clone(), source };
        if dir.join("PG_VERSION").exists() {
            stop_leftover(setup, &dir)?;
        } else {
            initdb(setup, &dir)?;
        }
        let setup = Setup { binaries: matching_binaries(setup, &dir)?, ..setup.clone() };
        let mut port = port.filter(|&port| ports::is_free(port));
        for _ in 0..ATTEMPTS {
            let attempt = match port {
                Some(port) => port,
                None => ports::pick().map_err(io)?,
            };
            write_settings(&setup, &dir, name, attempt).map_err(io)?;
            match launch(&setup, name, &dir, attempt)? {
                Launch::Up(cluster) => return Ok(*cluster),
                Launch::PortTaken => port = None,
                Launch::StillBusy => {
                    port = Some(attempt);
                    std::thread::sleep(Duration::from_millis(500));
                }
            }
        }
        Err(DevError::Start { name: name.to_owned(), log: last_lines(&log_path(&setup, name)) })
    }

    /// Stops the server fast (transactions are aborted, data is written) and waits; after [`PATIENCE`] it is stopped
    /// immediately.
    pub(super) fn stop(mut self) {
        self.lifeline = None;
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.watchdog.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                pg_ctl_stop(&self.setup, &self.dir, "immediate");
                let _ = self.watchdog.wait();
                return;
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// The server's own log.
    pub(super) fn log(&self) -> PathBuf {
        log_path(&self.setup, &self.name)
    }

    /// The directory of its data.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }
}

/// How a start went.
enum Launch {
    Up(Box<Cluster>),
    /// Somebody else listens on the port.
    PortTaken,
    /// Processes of a killed server have not noticed yet.
    StillBusy,
}

/// Starts the postmaster and waits until it takes connections.
fn launch(setup: &Setup, name: &str, dir: &Path, port: u16) -> Result<Launch, DevError> {
    let log = log_path(setup, name);
    let io = |source| DevError::Io { path: log.clone(), source };
    let file = fs::OpenOptions::new().create(true).append(true).mode(0o600).open(&log).map_err(io)?;
    let before = file.metadata().map_err(io)?.len() as usize;
    let stale = pid_file(dir);
    let mut command = setup.command("/bin/sh");
    command.args(["-c", WATCHDOG, "pgusher-watchdog"]).arg(setup.binaries.program("postgres")).arg("-D").arg(dir);
    command.stdin(Stdio::piped()).stdout(file.try_clone().map_err(io)?).stderr(file);
    // Out of the terminal's foreground group: Ctrl-C must reach the servers after the proxy has drained.
    command.process_group(0);
    let mut watchdog = command.spawn().map_err(|source| DevError::Io { path: "/bin/sh".into(), source })?;
    let lifeline = watchdog.stdin.take();
    let mut cluster =
        Cluster { name: name.to_owned(), port, dir: dir.to_owned(), setup: setup.clone(), watchdog, lifeline };
    let deadline = Instant::now() + PATIENCE;
    while !is_ready(&pid_file(dir), &stale) {
        if !matches!(cluster.watchdog.try_wait(), Ok(None)) || Instant::now() > deadline {
            let text = fs::read(&log).unwrap_or_default();
            let new = String::from_utf8_lossy(text.get(before..).unwrap_or_default()).into_owned();
            cluster.stop();
            return match new {
                new if new.contains("Address already in use") => Ok(Launch::PortTaken),
                new if new.contains("pre-existing shared memory block") => Ok(Launch::StillBusy),
                _ => Err(DevError::Start { name: name.to_owned(), log: last_lines(&log) }),
            };
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(Launch::Up(Box::new(cluster)))
}

/// Makes the data directory under another name and moves it into place, so that a half-made one is never started.
fn initdb(setup: &Setup, dir: &Path) -> Result<(), DevError> {
    let io = |source| DevError::Io { path: dir.to_owned(), source };
    let (making, pwfile) = (dir.with_extension("new"), dir.with_extension("pw"));
    for leftover in [&making, dir] {
        match fs::remove_dir_all(leftover) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
    }
    fs::create_dir(&making).map_err(io)?;
    fs::set_permissions(&making, fs::Permissions::from_mode(0o700)).map_err(io)?;
    setup.give_away(&making).map_err(io)?;
    let _ = fs::remove_file(&pwfile);
    let mut file = fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&pwfile).map_err(io)?;
    file.write_all(setup.password.as_bytes()).map_err(io)?;
    setup.give_away(&pwfile).map_err(io)?;
    let mut command = setup.command(setup.binaries.program("initdb"));
    command.args(["--auth=scram-sha-256", "--username=postgres", "--encoding=UTF8", "--locale=C"]);
    command.arg("--pwfile").arg(&pwfile).arg("-D").arg(&making);
    if !setup.durable {
        command.arg("--no-sync");
    }
    let output = command.output().map_err(|source| DevError::Io { path: setup.binaries.program("initdb"), source });
    let _ = fs::remove_file(&pwfile);
    let output = output?;
    if !output.status.success() {
        let _ = fs::remove_dir_all(&making);
        return Err(DevError::Initdb { message: String::from_utf8_lossy(&output.stderr).trim().to_owned() });
    }
    fs::rename(&making, dir).map_err(io)
}

/// Programs of the version that made `dir`.
fn matching_binaries(setup: &Setup, dir: &Path) -> Result<Binaries, DevError> {
    let text = fs::read_to_string(dir.join("PG_VERSION")).unwrap_or_default();
    let made_by = text.trim().parse().unwrap_or_default();
    setup.binaries.for_major(made_by).ok_or_else(|| DevError::WrongVersion {
        dir: dir.to_owned(),
        made_by: text.trim().to_owned(),
        found: setup.binaries.major(),
    })
}

/// Writes our settings beside `postgresql.conf`, which includes them: whoever starts this cluster by hand with `pg_ctl`
/// gets the same server.
fn write_settings(setup: &Setup, dir: &Path, name: &str, port: u16) -> std::io::Result<()> {
    let path = dir.join("pgusher.conf");
    fs::write(&path, settings(name, port, setup.durable))?;
    setup.give_away(&path)?;
    let main = dir.join("postgresql.conf");
    let text = fs::read_to_string(&main)?;
    let line = "include 'pgusher.conf'";
    if !text.lines().any(|l| l == line) {
        // Appending keeps the file's owner.
        fs::OpenOptions::new().append(true).open(&main)?.write_all(format!("\n{line}\n").as_bytes())?;
    }
    Ok(())
}

/// `name` consists of letters, digits and `_` (see `shard_name`), so it needs no quoting.
fn settings(name: &str, port: u16, durable: bool) -> String {
    let careless = if durable { "" } else { "fsync = off\nfull_page_writes = off\n" };
    format!(
        "# Written by `pgusher dev` at every start.\n\
         cluster_name = '{name}'\n\
         listen_addresses = '127.0.0.1'\n\
         port = {port}\n\
         unix_socket_directories = ''\n\
         password_encryption = 'scram-sha-256'\n\
         max_connections = 300\n\
         # Dropping a tenant with thousands of tables takes a lock for each.\n\
         max_locks_per_transaction = 256\n\
         max_prepared_transactions = 0\n\
         shared_buffers = 64MB\n\
         max_wal_size = 512MB\n\
         logging_collector = off\n\
         log_destination = 'stderr'\n\
         log_line_prefix = '%m [%p] %q%u@%d '\n\
         {careless}"
    )
}

fn pid_file(dir: &Path) -> String {
    fs::read_to_string(dir.join("postmaster.pid")).unwrap_or_default()
}

/// Whether the postmaster says so in the eighth line of its pid file, which must not be the one that a killed postmaster
/// left.
fn is_ready(pid_file: &str, stale: &str) -> bool {
    pid_file != stale && pid_file.lines().nth(7).is_some_and(|line| line.trim() == "ready")
}

/// Stops a postmaster that a killed pgusher left behind, so that this one starts it as its own child.
fn stop_leftover(setup: &Setup, dir: &Path) -> Result<(), DevError> {
    if leftover_pid(dir).is_none() {
        return Ok(());
    }
    for mode in ["fast", "immediate"] {
        pg_ctl_stop(setup, dir, mode);
        let deadline = Instant::now() + Duration::from_secs(2);
        while leftover_pid(dir).is_some() && Instant::now() < deadline {
            std::thread::sleep(LOOK_EVERY);
        }
        if leftover_pid(dir).is_none() {
            return Ok(());
        }
    }
    Err(DevError::Leftover { dir: dir.to_owned() })
}

/// The postmaster that runs on `dir`, if one does. Its pid file may be stale and the number now another process's, which
/// must not be signalled: a postmaster's working directory is its data directory.
fn leftover_pid(dir: &Path) -> Option<i32> {
    let pid: i32 = pid_file(dir).lines().next()?.trim().parse().ok()?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None).ok()?;
    match fs::read_link(format!("/proc/{pid}/cwd")) {
        Ok(cwd) => (fs::canonicalize(dir).is_ok_and(|dir| dir == cwd)).then_some(pid),
        // Another user's process, or a system without /proc: pg_ctl decides.
        Err(_) => (!Path::new("/proc/self").exists()).then_some(pid),
    }
}

fn pg_ctl_stop(setup: &Setup, dir: &Path, mode: &str) {
    let mut command = setup.command(setup.binaries.program("pg_ctl"));
    command.args(["stop", "-s", "-w", "-t", "30", "-m", mode, "-D"]).arg(dir);
    let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
}

fn log_path(setup: &Setup, name: &str) -> PathBuf {
    setup.home.join(format!("{name}.log"))
}

fn last_lines(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_pid_file_is_not_ready() {
        let ready = "77\n/d\n1\n5432\n\n127.0.0.1\n 1 2\nready   \n";
        for (now, stale, expected) in [
            (ready, "", true),
            (ready, ready, false),
            (&ready.replace("ready   ", "starting"), "", false),
            ("77\n/d\n", "", false),
            ("", "", false),
        ] {
            assert_eq!(is_ready(now, stale), expected, "{now:?}");
        }
    }

    #[test]
    fn only_throwaway_data_goes_without_fsync() {
        assert!(settings("s", 1, false).contains("fsync = off"));
        assert!(!settings("s", 1, true).contains("fsync"));
    }

    #[test]
    fn a_private_directory_above_is_found_out() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        let stranger = OsUser { name: "x".into(), uid: 4_000_000_000, gid: 4_000_000_000 };
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!stranger.can_reach(&inner));
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o711)).unwrap();
        // The system's temporary directory itself may be private.
        assert_eq!(stranger.can_reach(&inner), stranger.can_reach(root.path().parent().unwrap()));
    }
}
