"""The suites of Go's drivers: pgx and lib/pq, of Debian's source packages, which are the projects' releases.

Nothing comes from Go's own module proxy: compiler and dependencies are packages too, unpacked and not installed.
"""

import json
import shutil
import subprocess

import debian
from harness import clean_environment

SUITE = "sid"
GO = "golang-1.26-go", "golang-1.26-src"
DEPENDENCIES = [f"golang-{name}-dev" for name in (
    "github-jackc-pgpassfile", "github-jackc-pgservicefile", "github-jackc-puddle-v2", "github-stretchr-testify",
    "github-davecgh-go-spew", "github-pmezard-go-difflib", "github-stretchr-objx", "golang-x-sync", "golang-x-text",
    "gopkg-yaml.v3")]
LONGEST = 3000


def tree(package, path):
    """A directory in a GOPATH that holds the source under its import path; the version in it stands behind the path."""
    home = debian.HOME / "gopath"
    place = home / "src" / path
    if not place.exists():
        root = debian.packages(SUITE, "go", *GO, *DEPENDENCIES)
        if not home.exists():
            shutil.copytree(root / "usr" / "share" / "gocode", home, symlinks=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(debian.source(SUITE, package), place)
    return place


def go(cwd, env, out, words):
    """Test by test, of all packages below `cwd`."""
    root = debian.packages(SUITE, "go", *GO, *DEPENDENCIES)
    binary = next(root.glob("usr/lib/go-*/bin/go"))
    more = {"GOPATH": str(debian.HOME / "gopath"), "GO111MODULE": "off", "GOTOOLCHAIN": "local", "GOFLAGS": "",
            "GOCACHE": str(debian.HOME / "gocache"), "GOROOT": str(binary.parent.parent), "HOME": str(debian.HOME)}
    done = subprocess.run([str(binary), "test", "-json", "-count=1", "-p=1", "-vet=off", *words], cwd=cwd, text=True,
                          env=clean_environment() | more | env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=LONGEST)
    out.write_text(done.stdout)
    results, words = {}, {"pass": "passed", "fail": "failure", "skip": "skipped"}
    for line in done.stdout.splitlines():
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("Action") in words and "Test" in event:
            results[f"{event['Package'].rsplit('/', 1)[1]}::{event['Test']}"] = words[event["Action"]]
    if not results:
        raise AssertionError(f"go test: {done.stdout[-3000:]}")
    return results


def libpq(world, kind, env, out):
    cwd = tree("golang-github-lib-pq", "github.com/lib/pq")
    words = ["-timeout=20m", *(["-run", "|".join(world.parts)] if world.parts else []), "."]
    return go(cwd, env | {"PGSSLMODE": "disable"}, out, words)


def pgx(world, kind, env, out):
    cwd = tree("golang-github-jackc-pgx-v5", "github.com/jackc/pgx/v5")
    # What its instructions say to set up: postgresql_setup.sql, without the roles for other ways to log in.
    if kind != "ordinary":
        world.own.sql("CREATE EXTENSION hstore; CREATE EXTENSION ltree; CREATE DOMAIN uint64 AS numeric(20,0)", env["PGDATABASE"])
    place = " ".join(f"{name}={env[f'PG{variable}']}" for name, variable in (
        ("host", "HOST"), ("port", "PORT"), ("user", "USER"), ("password", "PASSWORD"), ("dbname", "DATABASE")))
    # Its parts are packages, as in `pgx:./pgconn,./stdlib`; `.` is the first one.
    words = ["-timeout=20m", *(world.parts or ["./..."])]
    return go(cwd, {"PGX_TEST_DATABASE": place, "PGX_TEST_TCP_CONN_STRING": place}, out, words)
