//! Answers the data plane's question whose process has sent a notification: one of another proxy, or of nobody's.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_postgres::types::Type;

use super::Control;
use super::admin::failed;
use crate::error::PgError;
use crate::pool::faces::{Question, Stranger};

/// Questions answered at a time.
const BATCH: usize = 64;

/// Age by the server's own clock. Without a role it is one of the server's helpers, or has not logged in.
const WHO: &str = "SELECT pid, usename::text, extract(epoch FROM clock_timestamp() - backend_start)::float8 \
     FROM pg_catalog.pg_stat_activity WHERE pid OPERATOR(pg_catalog.=) ANY ($1) AND usename IS NOT NULL";

impl Control {
    /// Answers questions about server processes until the shutdown.
    pub fn tell_senders(self: &Arc<Self>, mut questions: mpsc::Receiver<Question>) {
        let control = self.clone();
        self.spawn(async move {
            let mut batch = Vec::with_capacity(BATCH);
            while questions.recv_many(&mut batch, BATCH).await > 0 {
                let mut shards: HashMap<String, Vec<Question>> = HashMap::new();
                for question in batch.drain(..) {
                    shards.entry(question.shard.clone()).or_default().push(question);
                }
                for (shard, questions) in shards {
                    let control = control.clone();
                    // Side by side: a shard that does not answer keeps nobody waiting on the others.
                    tokio::spawn(async move {
                        if let Err(error) = control.tell(&shard, questions).await {
                            tracing::warn!(shard, %error, "cannot find out who sends notifications: they are dropped");
                        }
                    });
                }
            }
        });
    }

    /// Who does not get an answer drops the notification.
    async fn tell(&self, shard: &str, questions: Vec<Question>) -> Result<(), PgError> {
        let admin = self.shard_pool(shard, "postgres")?.checkout().await?;
        let pids: Vec<i32> = questions.iter().map(|question| question.pid.cast_signed()).collect();
        let who = admin.query_typed(WHO, &[(&pids, Type::INT4_ARRAY)]).await.map_err(failed("ask for processes"))?;
        let mut found: HashMap<u32, Stranger> = HashMap::new();
        for row in who {
            let age = Duration::try_from_secs_f64(row.get(2)).unwrap_or_default();
            found.insert(row.get::<_, i32>(0).cast_unsigned(), Stranger { role: row.get(1), age });
        }
        for question in questions {
            let _ = question.reply.send(found.get(&question.pid).cloned());
        }
        admin.give_back().await;
        Ok(())
    }
}
