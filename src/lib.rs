//! pgusher: a PostgreSQL proxy that shows every tenant to its own seat.
//!
//! # The path of a connection
//!
//! ```text
//! accept → TLS? → startup packet → identify tenant → authenticate → greet → [ relay ] → close
//! relay:  first frame of a transaction → route (directory, read again each time) → checkout
//!         → frames both ways → ReadyForQuery('I'), nothing outstanding → check-in
//! ```
//!
//! # Layers, low to high
//!
//! A module uses only what stands before it in this list; [`accept`] (whose turn it is: [`steer`]), [`connection`] and
//! [`server`] tie the knots, [`error`], [`metrics`], [`violation`], [`audit`] and [`tls`] are leaves that anyone may use.
//!
//! | layer | question it answers |
//! |---|---|
//! | [`wire`] | what do the bytes say? |
//! | [`tenant`] | who is it, and what does its plan mean? |
//! | [`config`] | what did the operator ask for? |
//! | [`stream`] | a socket, plain or TLS |
//! | [`client`] | from accept to an authenticated client |
//! | [`directory`] | where does a tenant live? |
//! | [`pool`] | server connections |
//! | [`relay`] | the hot path between the two |
//! | [`control`] | changes to the world: catalog, provisioning, HTTP |
//!
//! [`cli`] turns arguments and signals into calls of the server, [`dev`] adds clusters of its own.
//!
//! There is no global state: one [`server::Shared`] is built in `server.rs` and passed down.

pub mod accept;
pub mod audit;
pub mod cli;
pub mod client;
pub mod config;
pub mod connection;
pub mod control;
pub mod dev;
pub mod directory;
pub mod error;
pub mod exporter;
pub mod metrics;
pub mod pool;
pub mod relay;
pub mod server;
pub mod steer;
pub mod stream;
pub mod tenant;
pub mod tls;
pub mod violation;
pub mod wire;
