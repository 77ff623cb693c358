//! tokio-postgres, as `run` beside it starts it: `ok` and `FAIL` lines on standard output.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _, TryStreamExt as _};
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, PartialEq)]
enum Tls {
    Plain,
    VerifyFull,
}

impl Tls {
    const ALL: [Self; 2] = [Self::Plain, Self::VerifyFull];

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::VerifyFull => "verify-full",
        }
    }
}

struct Checks {
    failed: bool,
}

impl Checks {
    fn line(&mut self, name: &str, outcome: Outcome) {
        match outcome {
            Ok(()) => println!("ok\t{name}"),
            Err(error) => {
                self.failed = true;
                let mut text = error.to_string();
                if let Some(cause) = error.source() {
                    text = format!("{text}: {cause}");
                }
                println!("FAIL\t{name}\t{}", text.split_whitespace().collect::<Vec<_>>().join(" "));
            }
        }
    }
}

fn told(name: &str) -> Outcome<String> {
    std::env::var(format!("PGUSHER_TEST_{name}")).map_err(|error| format!("{name}: {error}").into())
}

fn equal<T: PartialEq + std::fmt::Debug>(found: &T, expected: &T) -> Outcome {
    if found == expected { Ok(()) } else { Err(format!("found {found:?}, expected {expected:?}").into()) }
}

fn config(user: &str, password: &str, database: &str) -> Outcome<Config> {
    let mut config = Config::new();
    config.host("localhost").hostaddr(told("HOST")?.parse()?).port(told("PORT")?.parse()?);
    config.user(user).password(password).dbname(database);
    Ok(config)
}

fn own() -> Outcome<Config> {
    let tenant = told("TENANT")?;
    config(&tenant, &told("TENANT_PASSWORD")?, &tenant)
}

fn logins() -> Outcome<BTreeMap<&'static str, Config>> {
    let (tenant, app, password) = (told("TENANT")?, told("APP_USER")?, told("APP_PASSWORD")?);
    let mut options = config(&app, &password, "postgres")?;
    options.options(format!("-c pgusher.tenant={tenant}"));
    let mut application_name = config(&app, &password, "postgres")?;
    application_name.application_name(format!("{tenant}/worker"));
    Ok(BTreeMap::from([
        ("own login", own()?),
        ("app.tenant", config(&format!("{app}.{tenant}"), &password, "postgres")?),
        ("app@tenant", config(&format!("{app}@{tenant}"), &password, "tenants")?),
        ("options", options),
        ("database", config(&app, &password, &tenant)?),
        ("application_name", application_name),
    ]))
}

fn connector() -> Outcome<MakeRustlsConnect> {
    use rustls::pki_types::pem::PemObject as _;
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls::pki_types::CertificateDer::from_pem_file(told("CA")?)?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(MakeRustlsConnect::new(config.with_root_certificates(roots).with_no_client_auth()))
}

async fn connect(config: &Config, tls: Tls) -> Outcome<Client> {
    let mut config = config.clone();
    // The connection's own error is what its client's requests fail with.
    Ok(match tls {
        Tls::Plain => {
            let (client, connection) = config.ssl_mode(SslMode::Disable).connect(NoTls).await?;
            tokio::spawn(connection);
            client
        }
        Tls::VerifyFull => {
            let (client, connection) = config.ssl_mode(SslMode::Require).connect(connector()?).await?;
            tokio::spawn(connection);
            client
        }
    })
}

async fn connecting(config: &Config, tls: Tls) -> Outcome {
    let client = connect(config, tls).await?;
    let row = client
        .query_one("SELECT session_user::text, current_schema()::text, count(*) FROM bookings WHERE false", &[])
        .await?;
    let tenant = told("TENANT")?;
    equal(&(row.get(0), row.get(1), row.get::<_, i64>(2)), &(tenant.clone(), tenant, 0))
}

async fn parameters(client: &Client) -> Outcome {
    let text = "quote ' and ü";
    let row = client.query_one("INSERT INTO t_tokio VALUES ($1, $2) RETURNING t", &[&1, &text]).await?;
    equal(&row.get::<_, &str>(0), &text)?;
    let row = client.query_one("SELECT $1::int[]", &[&vec![1, 2]]).await?;
    equal(&row.get::<_, Vec<i32>>(0), &vec![1, 2])
}

async fn copy(client: &Client) -> Outcome {
    let lines: String = (2000..22000).map(|number| format!("{number}\tline\n")).collect();
    let sink = client.copy_in("COPY t_tokio FROM STDIN").await?;
    let mut sink = std::pin::pin!(sink);
    for chunk in lines.as_bytes().chunks(10_000) {
        sink.send(bytes::Bytes::copy_from_slice(chunk)).await?;
    }
    equal(&sink.finish().await?, &20_000)?;
    let out = client.copy_out("COPY (SELECT * FROM t_tokio WHERE id >= 2000 ORDER BY id) TO STDOUT").await?;
    let chunks: Vec<_> = out.try_collect().await?;
    equal(&(chunks.concat() == lines.as_bytes()), &true)
}

async fn count(client: &Client) -> Outcome<i64> {
    Ok(client.query_one("SELECT count(*) FROM t_tokio", &[]).await?.get(0))
}

async fn rolls_back(client: &mut Client) -> Outcome {
    let mut transaction = client.transaction().await?;
    transaction.execute("DELETE FROM t_tokio", &[]).await?;
    let savepoint = transaction.transaction().await?;
    equal(&savepoint.simple_query("SELECT 1/0").await.is_err(), &true)?;
    savepoint.rollback().await?;
    equal(&transaction.query_one("SELECT count(*) FROM t_tokio", &[]).await?.get::<_, i64>(0), &0)?;
    transaction.rollback().await?;
    equal(&count(client).await?, &20_001)
}

async fn an_error(client: &Client) -> Outcome {
    let Err(error) = client.execute("INSERT INTO t_tokio VALUES ($1)", &[&1]).await else {
        return Err("the unique violation is missing".into());
    };
    equal(&error.code(), &Some(&SqlState::UNIQUE_VIOLATION))?;
    equal(&count(client).await?, &20_001)
}

async fn admin() -> Outcome<Client> {
    let mut config = Config::new();
    config.host("127.0.0.1").port(told("ADMIN_PORT")?.parse()?);
    config.user("postgres").password(told("ADMIN_PASSWORD")?).dbname(told("ADMIN_DATABASE")?);
    connect(&config, Tls::Plain).await
}

async fn cancel(client: &Client, tls: Tls) -> Outcome {
    let query = client.query("SELECT pg_sleep($1) /* cancel_tokio */", &[&60f64]);
    let cancelling = async {
        let admin = admin().await?;
        let running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() \
                       AND query LIKE '%cancel_tokio%'";
        for _ in 0..3000 {
            if admin.query_one(running, &[]).await?.get::<_, i64>(0) > 0 {
                let token = client.cancel_token();
                match tls {
                    Tls::Plain => token.cancel_query(NoTls).await?,
                    Tls::VerifyFull => token.cancel_query(connector()?).await?,
                }
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(Box::<dyn Error>::from("the query does not run"))
    };
    let (outcome, cancelled) = tokio::join!(query, cancelling);
    cancelled?;
    let Err(error) = outcome else { return Err("it slept to its end".into()) };
    equal(&error.code(), &Some(&SqlState::QUERY_CANCELED))?;
    for number in 0..50 {
        equal(&client.query_one("SELECT $1::int", &[&number]).await?.get(0), &number)?;
    }
    Ok(())
}

async fn prepared(client: &Client) -> Outcome {
    let statement = client.prepare("SELECT $1::int + 1").await?;
    for number in 0..300 {
        equal(&client.query_one(&statement, &[&number]).await?.get(0), &(number + 1))?;
    }
    let mut kept = Vec::new();
    for number in 0..250 {
        let statement = client.prepare(&format!("SELECT $1::int + {number}")).await?;
        equal(&client.query_one(&statement, &[&1]).await?.get(0), &(number + 1))?;
        kept.push(statement);
    }
    // All at once, and the first ones again.
    let queries = kept.iter().take(100).map(|statement| async move { client.query_one(statement, &[&1]).await });
    let rows = futures_util::future::try_join_all(queries).await?;
    equal(&rows.iter().map(|row| row.get(0)).collect::<Vec<i32>>(), &(1..101).collect())
}

async fn portal(client: &mut Client) -> Outcome {
    let transaction = client.transaction().await?;
    let portal = transaction.bind("SELECT generate_series(1, 5000)", &[]).await?;
    let mut sum = 0;
    loop {
        let rows = transaction.query_portal(&portal, 100).await?;
        if rows.is_empty() {
            break;
        }
        sum += rows.iter().map(|row| row.get::<_, i32>(0)).sum::<i32>();
    }
    transaction.commit().await?;
    equal(&sum, &12_502_500)
}

async fn rows_left_unread(client: &Client) -> Outcome {
    let rows = client.query_raw("SELECT generate_series(1, 100000)", Vec::<i32>::new()).await?;
    let mut rows = std::pin::pin!(rows);
    equal(&rows.next().await.is_some(), &true)?;
    Ok(())
}

async fn suite(checks: &mut Checks, tls: Tls) -> Outcome {
    let mut client = connect(&own()?, tls).await?;
    client.batch_execute("DROP TABLE IF EXISTS t_tokio; CREATE TABLE t_tokio (id int PRIMARY KEY, t text)").await?;
    let tls_name = tls.name();
    checks.line(&format!("{tls_name}: parameters"), parameters(&client).await);
    checks.line(&format!("{tls_name}: COPY in and out"), copy(&client).await);
    checks.line(&format!("{tls_name}: a transaction that rolls back"), rolls_back(&mut client).await);
    checks.line(&format!("{tls_name}: an error"), an_error(&client).await);
    checks.line(&format!("{tls_name}: cancel"), cancel(&client, tls).await);
    checks.line(&format!("{tls_name}: prepared statements used many times"), prepared(&client).await);
    checks.line(&format!("{tls_name}: portal"), portal(&mut client).await);
    checks.line(&format!("{tls_name}: rows left unread"), rows_left_unread(&client).await);
    checks.line(&format!("{tls_name}: still usable"), count(&client).await.and_then(|n| equal(&n, &20_001)));
    Ok(())
}

async fn wrong_password() -> Outcome {
    let Err(error) = own()?.password("wrong").ssl_mode(SslMode::Disable).connect(NoTls).await else {
        return Err("it was let in".into());
    };
    equal(&error.code(), &Some(&SqlState::INVALID_PASSWORD))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let mut checks = Checks { failed: false };
    for tls in Tls::ALL {
        for (name, config) in logins()? {
            checks.line(&format!("{}: connect: {name}", tls.name()), connecting(&config, tls).await);
        }
        suite(&mut checks, tls).await?;
    }
    checks.line("wrong password", wrong_password().await);
    std::process::exit(i32::from(checks.failed));
}
