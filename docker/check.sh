#!/bin/sh
# What can be said of the container files without a container engine: the files that they name exist, every variable
# that compose.yml sets is one that docker/pgusher.toml can be overridden by, and Prometheus takes its configuration.
set -eu
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

fail() { echo "docker/check.sh: $*" >&2; exit 1; }

sed -n 's/^COPY \([^-].*\) [^ ]*$/\1/p' docker/Dockerfile | tr ' ' '\n' | while read -r path; do
  [ -e "$path" ] || fail "Dockerfile copies $path, which does not exist"
  grep -qx "!${path%%/template}" docker/Dockerfile.dockerignore || fail "Dockerfile copies $path, which .dockerignore leaves out"
done
sed -n 's/^ *- \(\.\.*\/[^:]*\):.*:ro$/\1/p' docker/compose.yml | while read -r path; do
  [ -e "docker/$path" ] || fail "compose.yml mounts $path, which does not exist"
done

docker/secrets.sh "$tmp/env" >/dev/null
# shellcheck disable=SC1091 # made by the line above
. "$tmp/env"
# The variables of compose.yml with the values of the .env file, as compose would set them.
sed -n 's/^ *\(PGUSHER_[A-Z0-9_]*\): \${\([A-Z_]*\).*$/\1 \2/p' docker/compose.yml >"$tmp/variables"
[ "$(wc -l <"$tmp/variables")" -ge 8 ] || fail "found fewer variables in compose.yml than expected"
set --
while read -r name source; do
  eval "value=\${$source:-}"
  [ -n "$value" ] || fail "secrets.sh makes no $source"
  set -- "$@" "$name=$value"
done <"$tmp/variables"
# The template is where the image puts it.
env "$@" PGUSHER_PROVISION_TEMPLATE_DIR=config/template "${CARGO_TARGET_DIR:-target}/debug/pgusher" check --config docker/pgusher.toml

if command -v promtool >/dev/null 2>&1; then
  cp docker/prometheus.yml config/prometheus/rules.yml "$tmp/"
  promtool check config "$tmp/prometheus.yml"
fi
if docker compose version >/dev/null 2>&1; then
  docker compose -f docker/compose.yml --env-file "$tmp/env" config --quiet
else
  echo "docker/check.sh: no docker compose: not rendered, not built"
fi
