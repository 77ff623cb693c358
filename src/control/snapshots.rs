//! The snapshot's life: read at the start, written when something has changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::known_shard;
use super::shards::config_shard;
use crate::config::Config;
use crate::directory::Directory;
use crate::directory::catalog::{Position, Reader};
use crate::directory::connector::Endpoint;
use crate::directory::snapshot::SnapshotFile;

/// How often it is written at most, while changes keep coming. What a crash can cost is this much of them, and only if
/// the catalog is away as well.
const INTERVAL: Duration = Duration::from_secs(30);
/// How often it is written at least: an old position in the catalog's changes is worth less and less.
const REFRESH: Duration = Duration::from_secs(3600);

/// The file, if the configuration names one.
pub(super) fn file(config: &Config, at: &Endpoint) -> Option<Arc<SnapshotFile>> {
    let path = config.catalog.snapshot_file.as_ref()?;
    Some(Arc::new(SnapshotFile::new(path, &config.provision.master_secret, at)))
}

/// Takes over what the file says, and what the config says of shards. Whether there was anything.
pub(super) async fn restore(file: Option<&Arc<SnapshotFile>>, reader: &mut Reader, config: &Config) -> bool {
    let Some(file) = file.cloned() else { return false };
    let path = file.path().to_owned();
    let contents = match tokio::task::spawn_blocking(move || file.read()).await {
        Ok(Ok(Some(contents))) => contents,
        Ok(Ok(None)) => return false,
        Ok(Err(error)) => {
            tracing::warn!(file = %path.display(), %error, "the snapshot is not used");
            return false;
        }
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    };
    tracing::info!(file = %path.display(), age = ?contents.age, "read the snapshot");
    reader.restore(contents);
    let shards = config.shards.iter().map(|shard| known_shard(&config_shard(shard), config.pool.max_db_connections));
    shards.for_each(|shard| reader.put_shard(shard));
    true
}

/// Keeps the file up to date until `shutdown`, and then once more.
pub(super) async fn keep(
    file: Arc<SnapshotFile>,
    directory: Arc<Directory>,
    position: Position,
    shutdown: CancellationToken,
) {
    // The version that is in the file, and since when.
    let mut written: Option<(u64, Instant)> = None;
    loop {
        let last = shutdown.is_cancelled();
        let version = directory.version();
        if written.is_none_or(|(known, at)| known != version || at.elapsed() > REFRESH) {
            // Taken before the directory is looked at, which can only become newer.
            let seen = position.lock().clone();
            let (file, directory) = (file.clone(), directory.clone());
            let began = Instant::now();
            let path = file.path().to_owned();
            let writing = tokio::task::spawn_blocking(move || seen.map(|seen| file.write(&directory, &seen)));
            match writing.await {
                Ok(Some(Ok(bytes))) => {
                    written = Some((version, began));
                    tracing::debug!(file = %path.display(), bytes, took = ?began.elapsed(), "wrote the snapshot");
                }
                Ok(Some(Err(error))) => {
                    tracing::warn!(file = %path.display(), %error, "cannot write the snapshot");
                }
                // Nothing has been read of the catalog yet.
                Ok(None) => {}
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            }
        }
        if last {
            return;
        }
        shutdown.run_until_cancelled(tokio::time::sleep(INTERVAL)).await;
    }
}
