//! Finds PostgreSQL's programs on this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::DevError;

/// A directory that holds `initdb`, `postgres` and `pg_ctl`, and the version that `postgres` reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binaries {
    dir: PathBuf,
    major: u32,
}

/// The oldest major version that `dev` starts: it needs SCRAM verifiers and `ready` in `postmaster.pid`.
const OLDEST: u32 = 13;

impl Binaries {
    /// Looks where the operator says (`PGUSHER_PG_BIN`, then `PG_CONFIG`), then at `pg_config`, in `PATH`, and in the
    /// places where packages put versions side by side, the newest first.
    ///
    /// # Errors
    /// [`DevError::NoPostgres`] with the places looked at; [`DevError::BadBinaries`] if the operator named a place that
    /// holds no server.
    pub(super) fn find(env: impl Fn(&str) -> Option<String>) -> Result<Self, DevError> {
        if let Some(dir) = env("PGUSHER_PG_BIN") {
            return Self::at(Path::new(&dir))
                .ok_or_else(|| DevError::BadBinaries { variable: "PGUSHER_PG_BIN", path: dir.into() });
        }
        if let Some(program) = env("PG_CONFIG") {
            return bindir(&program)
                .and_then(|dir| Self::at(&dir))
                .ok_or_else(|| DevError::BadBinaries { variable: "PG_CONFIG", path: program.into() });
        }
        let on_path = env("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
        let packaged = PACKAGED.iter().flat_map(|pattern| newest_first(pattern));
        let places: Vec<PathBuf> = bindir("pg_config").into_iter().chain(on_path).chain(packaged).collect();
        places.iter().find_map(|dir| Self::at(dir)).ok_or(DevError::NoPostgres)
    }

    /// The installation in `dir`, if it is complete and not too old.
    fn at(dir: &Path) -> Option<Self> {
        let complete = ["initdb", "postgres", "pg_ctl"].iter().all(|name| dir.join(name).is_file());
        let output = complete.then(|| Command::new(dir.join("postgres")).arg("--version").output().ok())??;
        let major = major_version(&String::from_utf8_lossy(&output.stdout))?;
        (major >= OLDEST).then(|| Self { dir: dir.to_owned(), major })
    }

    /// The same vendor's installation of another major version, for a data directory made by it.
    pub(super) fn for_major(&self, major: u32) -> Option<Self> {
        if self.major == major {
            return Some(self.clone());
        }
        let places = PACKAGED.iter().flat_map(|pattern| newest_first(pattern));
        places.filter_map(|dir| Self::at(&dir)).find(|found| found.major == major)
    }

    /// The path of one program.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The major version.
    pub(super) fn major(&self) -> u32 {
        self.major
    }
}

/// Directories in which packages keep versions side by side; `*` is the version.
const PACKAGED: &[&str] = &[
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
];

/// What stands in for `*` in a directory name that exists, the highest number first.
fn newest_first(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else { return Vec::new() };
    let (parent, prefix) = before.rsplit_once('/').unwrap_or(("", before));
    let Ok(entries) = std::fs::read_dir(parent) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut versions: Vec<u32> = names.filter_map(|name| name.strip_prefix(prefix)?.parse().ok()).collect();
    versions.sort_unstable_by(|a, b| b.cmp(a));
    versions.into_iter().map(|version| PathBuf::from(format!("{before}{version}{after}"))).collect()
}

/// What `pg_config --bindir` answers.
fn bindir(program: &str) -> Option<PathBuf> {
    let output = Command::new(program).arg("--bindir").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !text.trim().is_empty()).then(|| PathBuf::from(text.trim()))
}

/// Reads `postgres (PostgreSQL) 15.14 (Debian …)`; also `18beta1` and `18devel`.
fn major_version(text: &str) -> Option<u32> {
    let version = text.split_once("(PostgreSQL) ")?.1;
    let digits = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version[..digits].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_every_spelling() {
        for (text, expected) in [
            ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n", Some(15)),
            ("postgres (PostgreSQL) 18beta1\n", Some(18)),
            ("postgres (PostgreSQL) 9.6.24\n", Some(9)),
            ("postgres (PostgreSQL) 17\n", Some(17)),
            ("postgres (EnterpriseDB) 15", None),
            ("", None),
        ] {
            assert_eq!(major_version(text), expected, "{text}");
        }
    }

    #[test]
    fn a_place_named_by_the_operator_is_not_silently_replaced() {
        let empty = tempfile::tempdir().unwrap();
        for variable in ["PGUSHER_PG_BIN", "PG_CONFIG"] {
            let named = empty.path().to_str().unwrap().to_owned();
            let error = Binaries::find(|name| (name == variable).then(|| named.clone())).unwrap_err();
            assert!(error.to_string().contains(variable), "{error}");
        }
    }

    #[test]
    fn versions_side_by_side_are_tried_newest_first() {
        let root = tempfile::tempdir().unwrap();
        for version in ["9", "15", "18", "common"] {
            std::fs::create_dir(root.path().join(version)).unwrap();
        }
        let base = root.path().display().to_string();
        let found = newest_first(&format!("{base}/*/bin"));
        assert_eq!(found, ["18", "15", "9"].map(|v| PathBuf::from(format!("{base}/{v}/bin"))));
    }
}
