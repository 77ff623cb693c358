//! The admin HTTP API. Every handler reads its request, calls one method of [`Control`] and answers JSON.
//!
//! | call | does |
//! |---|---|
//! | `GET /tenant/{id}/database-url?plan=` | a DSN through the proxy; makes the tenant if need be, with this plan |
//! | `GET /tenant/{id}/health` | status, shard, reachability as the tenant, clients, storage |
//! | `GET /tenant/{id}` | the tenant's row in the catalog |
//! | `DELETE /tenant/{id}` | ends its sessions, drops its place, leaves a tombstone |
//! | `GET /tenants?after=&limit=&deleted=` | pages of tenants in the order of their ids |
//! | `GET /shards/status` | shards, their health and load |
//! | `POST /canary` | two throwaway tenants per shard and plan attack each other; what came of it |
//! | `GET /canary` | what came of the last run |
//!
//! With a token configured every call needs it. Without one the API answers on loopback only (the config sees to
//! that) and not to web pages: they can make a browser send requests, but not without a foreign `Host` or an `Origin`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};
use subtle::ConstantTimeEq as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::Control;
use crate::error::{PgError, sqlstate};
use crate::tenant::{Plan, TenantId};

/// Largest request body.
const MAX_BODY: usize = 64 << 10;
/// Longest time for one answer; deleting a large tenant takes its time (and goes on in any case).
const MAX_TIME: Duration = Duration::from_secs(300);
/// Tenants on a page.
const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;
/// Who did it, in the event log.
const WHO: &str = "api";

/// Serves the API until `shutdown`.
///
/// # Errors
/// The listener failed.
pub async fn serve(
    control: Arc<Control>,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), std::io::Error> {
    axum::serve(listener, router(control)).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

/// The routes.
pub fn router(control: Arc<Control>) -> Router {
    Router::new()
        .route("/tenants", get(list_tenants))
        .route("/tenant/{id}", get(show_tenant).delete(delete_tenant))
        .route("/tenant/{id}/database-url", get(database_url))
        .route("/tenant/{id}/health", get(tenant_health))
        .route("/shards/status", get(shards_status))
        .route("/canary", get(show_canary).post(run_canary))
        .fallback(|| async {
            Failure(StatusCode::NOT_FOUND, PgError::error(sqlstate::UNKNOWN_DATABASE, "no such call"))
        })
        .method_not_allowed_fallback(|| async {
            let error = PgError::error(sqlstate::FEATURE_NOT_SUPPORTED, "this call does not have this method");
            Failure(StatusCode::METHOD_NOT_ALLOWED, error)
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(limit_time))
        .layer(middleware::from_fn_with_state(control.clone(), authorize))
        .with_state(control)
}

type Answer<T> = Result<Json<T>, Failure>;

async fn database_url(
    State(control): State<Arc<Control>>,
    Path(id): Path<String>,
    wanted: Result<Query<PlanWanted>, axum::extract::rejection::QueryRejection>,
) -> Answer<super::tenants::DatabaseUrl> {
    let Query(wanted) = wanted.map_err(|rejection| bad_request(rejection.body_text()))?;
    let plan = match wanted.plan.as_deref() {
        Some(word) => Some(Plan::parse(word).ok_or_else(|| bad_request(format!("there is no plan {word:?}")))?),
        None => None,
    };
    Ok(Json(control.database_url(&tenant_id(&id)?, WHO, plan).await?))
}

async fn tenant_health(
    State(control): State<Arc<Control>>,
    Path(id): Path<String>,
) -> Answer<super::tenants::TenantHealth> {
    Ok(Json(control.tenant_health(&tenant_id(&id)?).await?))
}

async fn show_tenant(
    State(control): State<Arc<Control>>,
    Path(id): Path<String>,
) -> Answer<super::records::TenantRecord> {
    Ok(Json(control.show(&tenant_id(&id)?).await?))
}

async fn delete_tenant(
    State(control): State<Arc<Control>>,
    Path(id): Path<String>,
) -> Answer<super::records::TenantRecord> {
    Ok(Json(control.delete(&tenant_id(&id)?, WHO).await?))
}

#[derive(Deserialize)]
struct PlanWanted {
    plan: Option<String>,
}

#[derive(Deserialize)]
struct Page {
    after: Option<String>,
    limit: Option<u32>,
    #[serde(default)]
    deleted: bool,
}

async fn list_tenants(
    State(control): State<Arc<Control>>,
    page: Result<Query<Page>, axum::extract::rejection::QueryRejection>,
) -> Answer<Value> {
    let Query(page) = page.map_err(|rejection| bad_request(rejection.body_text()))?;
    let limit = page.limit.unwrap_or(DEFAULT_PAGE);
    if limit == 0 || limit > MAX_PAGE {
        return Err(bad_request(format!("limit must be between 1 and {MAX_PAGE}")));
    }
    let tenants = control.list(page.after.as_deref().unwrap_or_default(), limit, page.deleted).await?;
    // A full page may have a successor; whoever asks for it gets an empty one at worst.
    let full = u32::try_from(tenants.len()).is_ok_and(|n| n == limit);
    let next = tenants.last().filter(|_| full).map(|last| last.id.clone());
    Ok(Json(json!({ "tenants": tenants, "next": next })))
}

async fn shards_status(State(control): State<Arc<Control>>) -> Json<Value> {
    Json(json!({ "shards": control.shards_status(), "catalog_connected": control.catalog_connected() }))
}

async fn run_canary(State(control): State<Arc<Control>>) -> Answer<Value> {
    Ok(Json(json!({ "canary": control.run_canary(WHO).await? })))
}

async fn show_canary(State(control): State<Arc<Control>>) -> Json<Value> {
    Json(json!({ "canary": control.canary_outcomes() }))
}

fn tenant_id(text: &str) -> Result<TenantId, Failure> {
    TenantId::parse(text).map_err(|error| bad_request(error.to_string()))
}

fn bad_request(message: String) -> Failure {
    Failure(StatusCode::BAD_REQUEST, PgError::error(sqlstate::INVALID_PARAMETER_VALUE, message))
}

/// An error as the API tells it: `{"error":{"code","message","detail","hint"}}`.
struct Failure(StatusCode, PgError);

impl From<PgError> for Failure {
    fn from(error: PgError) -> Self {
        let status = match &*error.code {
            sqlstate::INVALID_PARAMETER_VALUE => StatusCode::BAD_REQUEST,
            sqlstate::UNKNOWN_DATABASE => StatusCode::NOT_FOUND,
            sqlstate::NOT_IN_PREREQUISITE_STATE => StatusCode::CONFLICT,
            code if code.starts_with("57P") || code.starts_with("08") || code.starts_with("53") => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(status, error) = self;
        let body = json!({ "error": {
            "code": error.code,
            "message": error.message,
            "detail": error.detail,
            "hint": error.hint,
        }});
        (status, Json(body)).into_response()
    }
}

async fn limit_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(MAX_TIME, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let error = PgError::error(sqlstate::QUERY_CANCELED, "the answer took too long");
            Failure(StatusCode::GATEWAY_TIMEOUT, error).into_response()
        }
    }
}

async fn authorize(State(control): State<Arc<Control>>, request: Request, next: Next) -> Response {
    let token = control.config.api.token.expose();
    let refusal = if token.is_empty() {
        came_from_a_web_page(request.headers()).then_some((StatusCode::FORBIDDEN, "web pages may not call this"))
    } else {
        (!has_token(request.headers(), token))
            .then_some((StatusCode::UNAUTHORIZED, "the bearer token is missing or wrong"))
    };
    let Some((status, message)) = refusal else { return next.run(request).await };
    let mut response = Failure(status, PgError::error(sqlstate::INVALID_AUTHORIZATION, message)).into_response();
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    }
    response
}

/// Compared in constant time, so that its answer times do not spell the token.
fn has_token(headers: &HeaderMap, token: &str) -> bool {
    let given = headers.get(header::AUTHORIZATION).map(|value| value.as_bytes()).unwrap_or_default();
    let Some((scheme, given)) = given.split_at_checked(7) else { return false };
    scheme.eq_ignore_ascii_case(b"bearer ") && bool::from(given.ct_eq(token.as_bytes()))
}

fn came_from_a_web_page(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
    let name = host.rsplit_once(':').filter(|(_, port)| !port.contains(']')).map_or(host, |(name, _)| name);
    let name = name.trim_start_matches('[').trim_end_matches(']');
    headers.contains_key(header::ORIGIN) || !(name == "localhost" || name.parse::<IpAddr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(header::HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect()
    }

    #[test]
    fn only_the_whole_token_opens() {
        for (given, expected) in [
            (Some("Bearer secret"), true),
            (Some("bearer secret"), true),
            (Some("Bearer secre"), false),
            (Some("Bearer secret "), false),
            (Some("Bearer "), false),
            (Some("Basic secret"), false),
            (Some("secret"), false),
            (None, false),
        ] {
            let headers = given.map_or_else(HeaderMap::new, |value| {
                let mut headers = HeaderMap::new();
                headers.insert(header::AUTHORIZATION, header::HeaderValue::from_bytes(value.as_bytes()).unwrap());
                headers
            });
            assert_eq!(has_token(&headers, "secret"), expected, "{given:?}");
        }
    }

    #[test]
    fn a_browser_on_the_same_machine_is_not_the_operator() {
        for (pairs, expected) in [
            (vec![(header::HOST, "127.0.0.1:6480")], false),
            (vec![(header::HOST, "localhost:6480")], false),
            (vec![(header::HOST, "[::1]:6480")], false),
            (vec![(header::HOST, "[::1]")], false),
            (vec![(header::HOST, "rebound.example:6480")], true),
            (vec![(header::HOST, "localhost:6480"), (header::ORIGIN, "https://evil.example")], true),
        ] {
            assert_eq!(came_from_a_web_page(&headers(&pairs)), expected, "{pairs:?}");
        }
    }
}
