//! The directory in a file, so that a proxy can start while the catalog is away.
//!
//! Layout: [`MAGIC`], [`FORMAT`] as four bytes (little endian), a [`Head`] and the tenants, each as postcard encodes it,
//! and an HMAC-SHA-256 of all that, keyed by the master secret: a file that was damaged, cut short, changed by hand or
//! made by another installation is told by it. The file holds verifiers and is readable by its owner only.
//!
//! Invariant: the directory in the file is at least as new as the position in the catalog's changes that stands beside
//! it. Reading the changes since that position again does no harm; missing one would.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::catalog::Seen;
use super::connector::Endpoint;
use super::{AppUser, Directory, Names, Shard, Tenant};
use crate::config::Secret;
use crate::tenant::credential::{self, Verifier};
use crate::tenant::{Plan, Status, TenantId};

const MAGIC: &[u8] = b"pgusher snapshot\n";
/// Raised with every change of what is written; a file of another format is not read.
const FORMAT: u32 = 2;
const MAC: usize = 32;

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("it is not a snapshot of pgusher's")]
    Alien,
    /// Written by another version.
    #[error("it has format {0}, this pgusher reads format {FORMAT}")]
    Format(u32),
    /// The sum does not match.
    #[error("it is damaged, or was made with another master_secret")]
    Damaged,
    /// Of another catalog.
    #[error("it is of the catalog at {0}")]
    Foreign(String),
    /// The sum is right and the content is not: a mistake of whoever wrote it.
    #[error("its content makes no sense: {0}")]
    Senseless(String),
}

/// What a file said.
pub struct Contents {
    /// Up to where the catalog had been read.
    pub(super) seen: Seen,
    /// How long ago it was written; `None` if that lies in the future.
    pub age: Option<Duration>,
    pub(super) shards: Vec<Shard>,
    pub(super) users: Vec<AppUser>,
    pub(super) tenants: Vec<Arc<Tenant>>,
}

/// The file.
#[derive(Clone)]
pub struct SnapshotFile {
    path: PathBuf,
    /// As long as SHA-256's block, which HMAC takes as it is.
    key: [u8; 64],
    /// Where the catalog is, as it is configured.
    catalog: String,
}

#[derive(Serialize, Deserialize)]
struct Head {
    catalog: String,
    system: String,
    snapshot: String,
    /// Seconds since 1970.
    written: u64,
    shards: Vec<SavedShard>,
    /// Shards as tenants have them, each with a database that tenants live in.
    homes: Vec<SavedShard>,
    users: Vec<SavedUser>,
    tenants: u64,
}

#[derive(Serialize, Deserialize)]
struct SavedShard {
    name: String,
    host: String,
    port: u16,
    database: String,
    rls_database: String,
    dedicated_to: Option<String>,
    weight: u32,
    region: String,
    max_db_connections: u64,
}

#[derive(Serialize, Deserialize)]
struct SavedUser {
    name: String,
    verifier: Option<String>,
    tenants: Vec<String>,
    auto_provision: bool,
}

#[derive(Serialize, Deserialize)]
struct SavedTenant<'a> {
    id: &'a str,
    plan: &'a str,
    /// Which of the homes.
    home: u32,
    suspended: bool,
    epoch: u64,
    #[serde(borrow)]
    verifier: Option<SavedVerifier<'a>>,
    /// Schema and role, where they are not what the plan says.
    names: Option<(&'a str, &'a str)>,
    managed: bool,
}

/// Bytes rather than the text that the catalog has: half the size, and nothing to decode.
#[derive(Serialize, Deserialize)]
struct SavedVerifier<'a> {
    iterations: u32,
    salt: &'a [u8],
    stored_key: &'a [u8],
    server_key: &'a [u8],
}

impl SnapshotFile {
    /// The snapshot of the catalog at `at`, in that file.
    pub fn new(path: &Path, master_secret: &Secret, at: &Endpoint) -> Self {
        let mut key = [0; 64];
        key[..32].copy_from_slice(&credential::hmac(master_secret.expose().as_bytes(), &[b"pgusher snapshot v1"]));
        Self { path: path.to_owned(), key, catalog: format!("{}:{}/{}", at.host, at.port, at.database) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it; `None` if there is none.
    ///
    /// # Errors
    /// [`Unusable`]
    pub fn read(&self) -> Result<Option<Contents>, Unusable> {
        let file = match std::fs::read(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let (format, _) = file
            .strip_prefix(MAGIC)
            .and_then(<[u8]>::split_first_chunk)
            .ok_or(Unusable::Alien)
            .map(|(format, rest)| (u32::from_le_bytes(*format), rest))?;
        if format != FORMAT {
            return Err(Unusable::Format(format));
        }
        let (signed, sum) = file.split_last_chunk::<MAC>().ok_or(Unusable::Damaged)?;
        let mut mac = self.mac();
        mac.update(signed);
        mac.verify_slice(sum).map_err(|_| Unusable::Damaged)?;
        self.decode(signed.get(MAGIC.len() + 4..).ok_or(Unusable::Damaged)?).map(Some)
    }

    fn decode(&self, body: &[u8]) -> Result<Contents, Unusable> {
        let (head, mut rest): (Head, _) = take(body)?;
        if head.catalog != self.catalog {
            return Err(Unusable::Foreign(head.catalog));
        }
        let homes: Vec<Arc<Shard>> = head.homes.into_iter().map(|home| Arc::new(home.restore())).collect();
        // The sum was right, so the number is what was written; still it does not decide alone how much is reserved.
        let mut tenants = Vec::with_capacity(usize::try_from(head.tenants).unwrap_or(0).min(rest.len()));
        for _ in 0..head.tenants {
            let (saved, after) = postcard::take_from_bytes::<SavedTenant<'_>>(rest).map_err(senseless)?;
            rest = after;
            tenants.push(Arc::new(saved.restore(&homes)?));
        }
        let age = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(head.written)).ok();
        Ok(Contents {
            seen: Seen { system: head.system, snapshot: head.snapshot },
            age,
            shards: head.shards.into_iter().map(SavedShard::restore).collect(),
            users: head.users.into_iter().map(SavedUser::restore).collect(),
            tenants,
        })
    }

    /// Writes what the directory knows, which must be at least as new as `seen`, in place of the file at once. How
    /// many bytes it has.
    ///
    /// # Errors
    /// What the system says; the old file is then still there.
    pub fn write(&self, directory: &Directory, seen: &Seen) -> io::Result<u64> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // In the same directory, so that it can be renamed; with mode 0600.
        let mut file = tempfile::Builder::new().prefix(".pgusher-snapshot-").tempfile_in(folder)?;
        let signed = Signed { file: file.as_file_mut(), mac: self.mac() };
        let mut out = BufWriter::with_capacity(1 << 20, signed);
        self.encode(&mut out, directory, seen)?;
        let Signed { file: written, mac } = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        written.write_all(&mac.finalize().into_bytes())?;
        written.sync_all()?;
        let size = written.metadata()?.len();
        file.persist(&self.path).map_err(|error| error.error)?;
        File::open(folder)?.sync_all()?;
        Ok(size)
    }

    fn encode(&self, out: &mut impl Write, directory: &Directory, seen: &Seen) -> io::Result<()> {
        out.write_all(MAGIC)?;
        out.write_all(&FORMAT.to_le_bytes())?;
        let tenants: Vec<Arc<Tenant>> = directory.tenants().collect();
        let mut homes: Vec<&Shard> = Vec::new();
        let mut known: HashMap<*const Shard, u32> = HashMap::new();
        let mut home_of = Vec::with_capacity(tenants.len());
        for tenant in &tenants {
            home_of.push(*known.entry(Arc::as_ptr(&tenant.shard)).or_insert_with(|| {
                homes.push(&tenant.shard);
                homes.len() as u32 - 1
            }));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let head = Head {
            catalog: self.catalog.clone(),
            system: seen.system.clone(),
            snapshot: seen.snapshot.clone(),
            written: now.as_secs(),
            shards: directory.shards().iter().map(|shard| SavedShard::save(shard)).collect(),
            homes: homes.into_iter().map(SavedShard::save).collect(),
            users: directory.catalog_users().iter().map(|user| SavedUser::save(user)).collect(),
            tenants: tenants.len() as u64,
        };
        postcard::to_io(&head, &mut *out).map_err(io::Error::other)?;
        for (tenant, home) in tenants.iter().zip(home_of) {
            postcard::to_io(&SavedTenant::save(tenant, home), &mut *out).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn mac(&self) -> Hmac<Sha256> {
        Hmac::new(&self.key.into())
    }
}

/// A file, and the sum of what has been written to it.
struct Signed<'a> {
    file: &'a mut File,
    mac: Hmac<Sha256>,
}

impl Write for Signed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.mac.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn senseless(error: impl ToString) -> Unusable {
    Unusable::Senseless(error.to_string())
}

fn take<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, &[u8]), Unusable> {
    postcard::take_from_bytes(bytes).map_err(senseless)
}

impl SavedShard {
    fn save(shard: &Shard) -> Self {
        Self {
            name: shard.name.clone(),
            host: shard.host.clone(),
            port: shard.port,
            database: shard.database.clone(),
            rls_database: shard.rls_database.clone(),
            dedicated_to: shard.dedicated_to.as_ref().map(ToString::to_string),
            weight: shard.weight,
            region: shard.region.clone(),
            max_db_connections: shard.max_db_connections as u64,
        }
    }

    fn restore(self) -> Shard {
        Shard {
            name: self.name,
            host: self.host,
            port: self.port,
            database: self.database,
            rls_database: self.rls_database,
            dedicated_to: self.dedicated_to.and_then(|id| TenantId::parse(&id).ok()),
            weight: self.weight,
            region: self.region,
            max_db_connections: usize::try_from(self.max_db_connections).unwrap_or(usize::MAX),
        }
    }
}

impl SavedUser {
    fn save(user: &AppUser) -> Self {
        Self {
            name: user.name.clone(),
            verifier: user.verifier.as_ref().map(Verifier::to_text),
            tenants: user.tenants.clone(),
            auto_provision: user.auto_provision,
        }
    }

    fn restore(self) -> AppUser {
        AppUser {
            verifier: self.verifier.and_then(|text| Verifier::parse(&text).ok()),
            name: self.name,
            tenants: self.tenants,
            auto_provision: self.auto_provision,
        }
    }
}

impl<'a> SavedTenant<'a> {
    fn save(tenant: &'a Tenant, home: u32) -> Self {
        let save = |verifier: &'a Verifier| SavedVerifier {
            iterations: verifier.iterations,
            salt: &verifier.salt,
            stored_key: &verifier.stored_key,
            server_key: &verifier.server_key,
        };
        Self {
            id: tenant.id.as_str(),
            plan: tenant.plan.as_str(),
            home,
            suspended: tenant.status == Status::Suspended,
            epoch: tenant.epoch,
            verifier: tenant.verifier.as_ref().map(save),
            names: tenant.names.as_ref().map(|names| (names.schema.as_str(), names.role.as_str())),
            managed: tenant.managed,
        }
    }

    fn restore(self, homes: &[Arc<Shard>]) -> Result<Tenant, Unusable> {
        let home = usize::try_from(self.home).ok().and_then(|home| homes.get(home));
        Ok(Tenant {
            id: TenantId::parse(self.id).map_err(senseless)?,
            plan: Plan::parse(self.plan).ok_or_else(|| senseless(format!("plan {:?}", self.plan)))?,
            shard: home.ok_or_else(|| senseless("a tenant without a home"))?.clone(),
            status: if self.suspended { Status::Suspended } else { Status::Active },
            epoch: self.epoch,
            verifier: self.verifier.map(SavedVerifier::restore).transpose()?,
            names: self
                .names
                .map(|(schema, role)| Box::new(Names { schema: schema.to_owned(), role: role.to_owned() })),
            managed: self.managed,
        })
    }
}

impl SavedVerifier<'_> {
    fn restore(self) -> Result<Verifier, Unusable> {
        let key = |bytes: &[u8]| bytes.try_into().map_err(senseless);
        Ok(Verifier {
            iterations: self.iterations,
            salt: self.salt.into(),
            stored_key: key(self.stored_key)?,
            server_key: key(self.server_key)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Case {
        dir: tempfile::TempDir,
        directory: Directory,
    }

    fn seen() -> Seen {
        Seen { system: "42".into(), snapshot: "100:110:100,105".into() }
    }

    fn at(port: u16) -> Endpoint {
        let (host, database, user) = ("127.0.0.1".into(), "pgusher".into(), "postgres".into());
        Endpoint { host, port, database, user, password: Secret::default() }
    }

    impl Case {
        fn new() -> Self {
            let (provision, _) = tokio::sync::mpsc::channel(1);
            let directory = Directory::new(provision);
            let user = |name: &str| AppUser {
                name: name.into(),
                verifier: Some(Verifier::make("pw", b"salt of no usual length", 1)),
                tenants: vec!["client_*".into()],
                auto_provision: true,
            };
            directory.set_config_users(vec![user("of the config")]);
            directory.put_user(user("of the catalog"));
            let shards: Vec<_> = ["a", "b"].map(Shard::for_tests).into_iter().map(Arc::new).collect();
            shards.iter().for_each(|shard| directory.put_shard((**shard).clone()));
            for n in 0..1000 {
                directory.put(Tenant {
                    id: TenantId::parse(&format!("client_{n}")).unwrap(),
                    plan: Plan::Schema,
                    shard: shards[n % 2].clone(),
                    status: if n % 10 == 0 { Status::Suspended } else { Status::Active },
                    epoch: n as u64,
                    verifier: (n % 3 > 0).then(|| Verifier::make("pw", &[n as u8; 16], 1)),
                    names: (n % 7 == 0).then(|| Box::new(Names { schema: "s".into(), role: format!("r{n}") })),
                    managed: n % 5 > 0,
                });
            }
            Self { dir: tempfile::tempdir().unwrap(), directory }
        }

        fn file(&self, secret: &str, port: u16) -> SnapshotFile {
            SnapshotFile::new(&self.dir.path().join("snapshot"), &Secret::new(secret), &at(port))
        }

        fn written(&self) -> SnapshotFile {
            let file = self.file("secret", 5432);
            file.write(&self.directory, &seen()).unwrap();
            file
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let case = Case::new();
        assert!(case.file("secret", 5432).read().unwrap().is_none(), "no file, no complaint");
        let file = case.written();
        case.written();
        assert_eq!(std::fs::metadata(file.path()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(case.dir.path()).unwrap().count(), 1, "nothing is left over");
        let read = file.read().unwrap().unwrap();
        assert!(read.seen == seen() && read.age.is_some_and(|age| age < Duration::from_secs(60)));
        assert_eq!(read.tenants.len(), 1000);
        for tenant in &read.tenants {
            assert!(case.directory.find(tenant.id.as_str()).unwrap() == *tenant);
        }
        assert_eq!(read.shards, case.directory.shards().iter().map(|shard| (**shard).clone()).collect::<Vec<_>>());
        let [user] = &read.users[..] else { panic!("only the catalog's users are kept") };
        assert!(*user == *case.directory.user("of the catalog").unwrap());
    }

    #[test]
    fn a_file_with_any_byte_changed_is_refused() {
        let case = Case::new();
        let file = case.written();
        let good = std::fs::read(file.path()).unwrap();
        for at in (0..good.len()).step_by(97).chain(good.len() - 40..good.len()) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            std::fs::write(file.path(), &bad).unwrap();
            let expected = match at {
                0..17 => matches!(file.read(), Err(Unusable::Alien)),
                17..21 => matches!(file.read(), Err(Unusable::Format(_))),
                _ => matches!(file.read(), Err(Unusable::Damaged)),
            };
            assert!(expected, "byte {at}");
        }
        for length in [0, 5, 17, 20, 21, 30, 53, good.len() / 2, good.len() - 1] {
            std::fs::write(file.path(), &good[..length]).unwrap();
            assert!(file.read().is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_file_of_another_installation_or_catalog_is_refused() {
        let case = Case::new();
        case.written();
        assert!(matches!(case.file("other", 5432).read(), Err(Unusable::Damaged)));
        let Err(Unusable::Foreign(catalog)) = case.file("secret", 5433).read() else { panic!("not refused") };
        assert_eq!(catalog, "127.0.0.1:5432/pgusher");
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_file() {
        let case = Case::new();
        let file = case.written();
        let gone = SnapshotFile { path: case.dir.path().join("missing/snapshot"), ..file.clone() };
        assert!(gone.write(&case.directory, &seen()).is_err());
        assert!(file.read().unwrap().is_some());
    }
}
