"""For the Python scripts: where to connect, and `ok`, `FAIL` lines that ../run reads."""

import contextlib
import os
import sys
import time
import traceback


def told(name):
    return os.environ[f"PGUSHER_TEST_{name}"]


HOST, PORT, CA, TENANT = told("HOST"), int(told("PORT")), told("CA"), told("TENANT")
# LISTEN is refused in transaction mode.
LISTENS = told("POOL_MODE") != "transaction"
OWN = {"user": TENANT, "password": told("TENANT_PASSWORD"), "database": TENANT}
APP, APP_PASSWORD = told("APP_USER"), told("APP_PASSWORD")
ADMIN = {
    "host": "127.0.0.1", "port": int(told("ADMIN_PORT")), "user": "postgres", "password": told("ADMIN_PASSWORD"),
    "database": told("ADMIN_DATABASE"),
}

# Every way to say who the tenant is.
LOGINS = {
    "own login": OWN,
    "app.tenant": {"user": f"{APP}.{TENANT}", "password": APP_PASSWORD, "database": "postgres"},
    "app@tenant": {"user": f"{APP}@{TENANT}", "password": APP_PASSWORD, "database": "tenants"},
    "options": {"user": APP, "password": APP_PASSWORD, "database": "postgres",
                "options": f"-c pgusher.tenant={TENANT}"},
    "database": {"user": APP, "password": APP_PASSWORD, "database": TENANT},
    "application_name": {"user": APP, "password": APP_PASSWORD, "database": "postgres",
                         "application_name": f"{TENANT}/worker"},
}

_failed = False


@contextlib.contextmanager
def check(name):
    """One line: `ok` unless the block raises."""
    global _failed
    try:
        yield
    except Exception as error:
        _failed = True
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"FAIL\t{name}\t{text} ({os.path.basename(frame.filename)}:{frame.lineno})", flush=True)
    else:
        print(f"ok\t{name}", flush=True)


def equal(found, expected):
    if found != expected:
        raise AssertionError(f"found {found!r}, expected {expected!r}")


def wait_until(what, condition, timeout=30):
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout} s in vain: {what}")
        time.sleep(0.01)


def running(mark):
    """Asks the shard itself, not the proxy: is a statement with this mark being executed?"""
    return (
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() "
        f"AND query LIKE '%{mark}%'"
    )


def finish():
    sys.exit(1 if _failed else 0)
