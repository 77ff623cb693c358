# What is typed here, in short:
#   make demo         install what is missing, build, start clusters and proxy, print DSNs to paste
#   make demo-stop    stop it again (make demo-clean removes its data too)
#   make test         everything that CI runs
#   make test-clients tests with real drivers (downloads them)
#   make test-attacks attacks on the wall between tenants, all plans, modes and grades (CORPUS=dir runs others than ours)
#   make test-pgbench pgbench as two tenants at once (DURATION=30), make test-big 1 GB and 200 MB with little memory,
#   make test-api     the HTTP API by curl, and Prometheus
#   make test-full    integration tests at full size: 100,000 mutated streams, a gigabyte by COPY, pgbench for minutes
#   make test-matrix  the Rust tests on the oldest and the newest PostgreSQL (VERSIONS="15 16 17 18" for others)
#   make fuzz         every fuzz target for SECONDS=600 (nightly, cargo install cargo-fuzz)
#   make bench-guard  what the guard costs, with it on and off in one run (release build)
#   make bench-tracking  what classification and tracking cost, likewise
#   make bench        pgusher beside PgBouncer and HAProxy, as medians and ratios (BENCH="--quick simple copy" for less)
#   make simulate     500,000 tenants on 50 shards, simulated: tables, and the plot of docs/scale.md
#   make soak         an hour of everything at once (MINUTES=5 for less)
#   make test-model   random sessions direct and through auto, every answer compared (STATEMENTS=1000000 SEED=1 JOBS=2)
#   make test-suites  other projects' own tests, direct and through auto (SUITES=psycopg2,asyncpg; downloads them)
#   make test-webload a hundred clients that think, on a few server connections
#   make lint         formatting, clippy, documentation
#
# Variables: PROFILE=release builds with optimisations; PORT=7432 moves the demo; DEMO=dir keeps its data elsewhere;
# SKIP_DEPS=1 installs nothing.

CARGO   ?= cargo
PROFILE ?= dev
PORT    ?= 6432
DEMO    ?= .demo

TARGET_DIR := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)
PGUSHER    := $(TARGET_DIR)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/pgusher
DEPS       := $(if $(SKIP_DEPS),true,.ci/install-deps)

export PGUSHER DEMO PORT

.PHONY: all build demo demo-run demo-stop demo-clean test test-rust test-rules test-files test-clients test-pgbench test-big test-api test-full test-matrix test-attacks test-model test-suites test-webload fuzz bench bench-guard bench-tracking simulate soak lint clean

all: build

build:
	$(CARGO) build --locked --profile $(PROFILE)

demo:
	$(DEPS) build server
	$(CARGO) build --locked --profile $(PROFILE)
	.ci/demo start

# In the foreground, until Ctrl-C.
demo-run: build
	$(PGUSHER) dev --data $(DEMO) --port $(PORT)

demo-stop:
	.ci/demo stop

demo-clean:
	.ci/demo clean

# One after the other, whatever -j says: they share the processors and some of them measure time.
test:
	$(DEPS) build server promtool
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory test-rust
	$(MAKE) --no-print-directory test-rules
	$(MAKE) --no-print-directory test-files

# nextest runs each test in a process of its own, but not the examples in the documentation.
FILTER ?= all()

test-rust:
	$(CARGO) build --locked
	if $(CARGO) nextest --version >/dev/null 2>&1; then \
	  $(CARGO) nextest run --locked --no-fail-fast -E '$(FILTER)' && $(CARGO) test --locked --doc; \
	else \
	  $(CARGO) test --locked --no-fail-fast; \
	fi

test-rules:
	promtool check config config/prometheus/prometheus.yml
	promtool test rules config/prometheus/rules_test.yml

test-files:
	.ci/check-files

test-clients:
	$(DEPS) build server clients
	$(CARGO) build --locked --profile $(PROFILE)
	tests/clients/run

test-pgbench:
	$(DEPS) build server tools
	$(CARGO) build --locked --profile $(PROFILE)
	tests/clients/pgbench

# Downloads psycopg, which can send a value as a parameter.
test-big:
	$(DEPS) build server tools
	$(CARGO) build --locked --profile $(PROFILE)
	tests/clients/big

test-api:
	$(DEPS) build server tools promtool
	$(CARGO) build --locked --profile $(PROFILE)
	tests/clients/api

# With optimisations: the proxy under test is to be the bottleneck nowhere.
test-full:
	$(DEPS) build server
	$(CARGO) test --locked --release --lib --test integration -- --ignored --skip known_ --nocapture --test-threads 1

# 15 is Debian's package, the others are downloaded: see .ci/install-postgres. The model test is for 15: from 17 on, what
# pgusher puts into a pipeline can be seen in one case (docs/compatibility.md).
VERSIONS ?= 15 18

test-matrix:
	$(DEPS) build server
	set -e; for version in $(VERSIONS); do \
	  bin=$$(.ci/install-postgres $$version); echo "== PostgreSQL $$version ($$bin)"; \
	  PGUSHER_PG_BIN=$$bin $(MAKE) --no-print-directory test-rust FILTER='not binary(model)'; \
	done

# Some attacks leak by design; tests/isolation/unstoppable.txt has them, with reasons.
CORPUS ?= tests/isolation/corpus
PLANS  ?= schema rls database
GRADES ?= compat strict
MODES  ?= session transaction auto
GUARD  ?= enforce

test-attacks:
	$(CARGO) build --locked --bin pgusher --example attack
	failed=; for plan in $(PLANS); do for grade in $(GRADES); do for mode in $(MODES); do \
	  echo "== plan $$plan, hardening $$grade, pool_mode $$mode, guard $(GUARD)"; \
	  $(TARGET_DIR)/debug/examples/attack --corpus '$(CORPUS)' --plan $$plan --hardening $$grade --pool-mode $$mode \
	    --guard $(GUARD) || failed=yes; \
	done; done; done; [ -z "$$failed" ]

# The inputs are in fuzz/seeds, one per line; what a run finds worth keeping is put there by
# `cargo +nightly fuzz cmin TARGET` and `fuzz/corpora pack TARGET`.
SECONDS ?= 600
FUZZ    ?= startup framing scram_server scram_client guard

fuzz:
	fuzz/corpora unpack
	cd fuzz && set -e && for target in $(FUZZ); do \
	  $(CARGO) +nightly fuzz run --fuzz-dir . $$target -- -max_total_time=$(SECONDS) -timeout=10 -max_len=1500; \
	done

bench-guard:
	$(CARGO) build --locked --release
	benches/cost.py guard --pgusher $(TARGET_DIR)/release/pgusher

bench-tracking:
	$(CARGO) build --locked --release
	benches/cost.py tracking --pgusher $(TARGET_DIR)/release/pgusher

# What the README's numbers come from. On a machine that does nothing else.
BENCH ?=

bench:
	$(DEPS) build server tools
	$(CARGO) build --locked --release --bin pgusher
	benches/pgbench.py $(BENCH)

simulate:
	$(CARGO) bench --locked --bench simulate

MINUTES ?= 60

soak:
	$(DEPS) build server tools
	$(CARGO) build --locked --release --bin pgusher
	benches/soak.py --minutes $(MINUTES)

# Prints its seed, and a failing case with as few steps as show it; CASE=<seed of a case> runs that one alone.
STATEMENTS ?= 1000000
SEED       ?=
JOBS       ?= 2
CASE       ?=

test-model:
	$(DEPS) build server
	STATEMENTS=$(STATEMENTS) SEED=$(SEED) JOBS=$(JOBS) CASE=$(CASE) \
	  $(CARGO) test --locked --test model -- --ignored --nocapture many_

SUITES ?=
comma  := ,

test-suites:
	$(DEPS) build server tools
	$(CARGO) build --locked --profile $(PROFILE)
	tests/clients/suites/run $(subst $(comma), ,$(SUITES))

test-webload:
	$(DEPS) build server clients
	$(CARGO) build --locked --profile $(PROFILE)
	tests/clients/webload

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check; else echo "cargo deny is not installed: skipped"; fi

clean: demo-clean
	$(CARGO) clean
