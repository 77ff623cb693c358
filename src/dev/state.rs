//! What `dev` remembers between two starts on the same `--data`: ports, secrets, where the clusters are.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::DevError;
use super::cluster::OsUser;

/// Clusters go here when the server user cannot reach `--data` (for instance below `/root`).
const ELSEWHERE: &str = "/var/lib/pgusher";

/// The file `dev.json`, readable by its owner only.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// Where the clusters are, if not in the data directory itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clusters: Option<PathBuf>,
    /// Shard name → port.
    pub ports: BTreeMap<String, u16>,
    /// Password of the clusters' superuser.
    pub postgres_password: String,
    /// Server passwords are derived from it.
    pub master_secret: String,
    /// Bearer token of the HTTP API.
    pub api_token: String,
    /// Password of the application user that `dev` defines.
    pub app_password: String,
}

impl State {
    fn new() -> Self {
        let secret = || URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>());
        Self {
            clusters: None,
            ports: BTreeMap::new(),
            postgres_password: secret(),
            master_secret: secret(),
            api_token: secret(),
            app_password: secret(),
        }
    }
}

/// The data directory, held exclusively while `dev` runs.
pub(super) struct DataDir {
    /// Its path, absolute.
    pub path: PathBuf,
    /// What it remembers.
    pub state: State,
    /// Whether it survives us.
    pub kept: bool,
    // Held for what their `Drop` does: the lock ends, the temporary directories go.
    _lock: File,
    _temporary: Vec<TempDir>,
}

impl DataDir {
    /// Opens `wanted`, or a temporary directory that is removed at the end.
    ///
    /// # Errors
    /// [`DevError::InUse`] if another `dev` has it, [`DevError::BadState`] if `dev.json` is not ours.
    pub(super) fn open(wanted: Option<&Path>) -> Result<Self, DevError> {
        let mut temporary = Vec::new();
        let path = match wanted {
            Some(path) => path.to_owned(),
            None => {
                let dir = tempfile::Builder::new().prefix("pgusher-dev-").tempdir();
                let dir = dir.map_err(|source| DevError::Io { path: std::env::temp_dir(), source })?;
                let path = dir.path().to_owned();
                temporary.push(dir);
                path
            }
        };
        let io = |source| DevError::Io { path: path.clone(), source };
        if wanted.is_none() || !path.exists() {
            fs::create_dir_all(&path).map_err(io)?;
            // Others may pass through (the server user has to), but not look around.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).map_err(io)?;
        }
        let path = fs::canonicalize(&path).map_err(io)?;
        let lock = lock(&path)?;
        let state = load(&path)?;
        Ok(Self { path, state, kept: wanted.is_some(), _lock: lock, _temporary: temporary })
    }

    /// The directory of the clusters: this one, or another if the server user cannot get here.
    ///
    /// # Errors
    /// The other place cannot be made.
    pub(super) fn clusters(&mut self, user: Option<&OsUser>) -> Result<PathBuf, DevError> {
        if let Some(elsewhere) = self.state.clusters.as_ref().filter(|dir| dir.is_dir()) {
            return Ok(elsewhere.clone());
        }
        if user.is_none_or(|user| user.can_reach(&self.path)) {
            return Ok(self.path.clone());
        }
        let parent = if self.kept { PathBuf::from(ELSEWHERE) } else { PathBuf::from("/tmp") };
        let io = |source| DevError::Io { path: parent.clone(), source };
        fs::create_dir_all(&parent).map_err(io)?;
        let dir = tempfile::Builder::new().prefix("dev-").tempdir_in(&parent).map_err(io)?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).map_err(io)?;
        let path = dir.path().to_owned();
        if self.kept {
            self.state.clusters = Some(dir.keep());
            self.save()?;
        } else {
            self._temporary.push(dir);
        }
        Ok(path)
    }

    /// Writes what it remembers, whole or not at all.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub(super) fn save(&self) -> Result<(), DevError> {
        let path = self.path.join("dev.json");
        let io = |source| DevError::Io { path: path.clone(), source };
        let text = serde_json::to_vec_pretty(&self.state).map_err(|error| io(error.into()))?;
        // A temporary file is made with mode 0600 and keeps it.
        let mut file = tempfile::NamedTempFile::new_in(&self.path).map_err(io)?;
        file.write_all(&text).map_err(io)?;
        file.persist(&path).map_err(|error| io(error.error))?;
        Ok(())
    }
}

fn lock(dir: &Path) -> Result<File, DevError> {
    let path = dir.join("dev.lock");
    let io = |source| DevError::Io { path: path.clone(), source };
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(DevError::InUse { dir: dir.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(io(source)),
    }
}

fn load(dir: &Path) -> Result<State, DevError> {
    let path = dir.join("dev.json");
    match fs::read(&path) {
        Ok(text) => {
            serde_json::from_slice(&text).map_err(|error| DevError::BadState { path, message: error.to_string() })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => match dir.join("shard_1").exists() {
            true => {
                Err(DevError::BadState { path, message: "it is missing, and the clusters beside it need it".into() })
            }
            false => Ok(State::new()),
        },
        Err(source) => Err(DevError::Io { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_and_ports_come_back_and_are_private() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("data");
        let mut first = DataDir::open(Some(&path)).unwrap();
        first.state.ports.insert("shard_1".into(), 15_001);
        first.save().unwrap();
        let secret = first.state.master_secret.clone();
        assert!(matches!(DataDir::open(Some(&path)), Err(DevError::InUse { .. })));
        drop(first);
        let again = DataDir::open(Some(&path)).unwrap();
        assert_eq!(again.state.ports["shard_1"], 15_001);
        assert_eq!(again.state.master_secret, secret);
        assert_eq!(fs::metadata(path.join("dev.json")).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_temporary_directory_goes_away() {
        let dir = DataDir::open(None).unwrap();
        let path = dir.path.clone();
        assert!(path.is_dir() && !dir.kept);
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn a_foreign_state_file_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("dev.json"), "{\"name\": \"something else\"}").unwrap();
        assert!(matches!(DataDir::open(Some(root.path())), Err(DevError::BadState { .. })));
    }
}
