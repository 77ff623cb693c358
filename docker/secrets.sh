#!/bin/sh
# Makes docker/.env with random secrets for compose.yml; keeps one that exists.
set -eu
file=${1:-$(dirname "$0")/.env}
if [ -e "$file" ]; then
  echo "$file exists and is kept"
  exit 0
fi
secret() { od -An -N 24 -t x1 /dev/urandom | tr -d ' \n'; }
umask 077
{
  for name in POSTGRES_PASSWORD PGUSHER_PROVISION_MASTER_SECRET PGUSHER_API_TOKEN PGUSHER_USERS_APP_PASSWORD GRAFANA_PASSWORD; do
    echo "$name=$(secret)"
  done
} >"$file"
echo "$file made; keep it: tenants' passwords are derived from it"
