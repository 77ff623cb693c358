"""What the scripts here share: a `pgusher dev` of their own, certificates, and lines that say what was checked."""

import json
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()
CACHE = TARGET / "clients"
MODES = ["session", "transaction", "auto"]
START_TIMEOUT = 180
# So that what was started is stopped then as well.
signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
STOP_TIMEOUT = 120


def binary():
    """The program under test: $PGUSHER, or what cargo builds."""
    given = os.environ.get("PGUSHER")
    path = pathlib.Path(given).resolve() if given else TARGET / "debug" / "pgusher"
    if not given:
        subprocess.run(["cargo", "build", "--locked", "--quiet"], cwd=ROOT, check=True)
    if not path.exists():
        sys.exit(f"{path} is not there; PGUSHER names the binary, without it cargo builds one")
    return path


class Report:
    """One line per check; `failed` counts what the exit status depends on."""

    def __init__(self):
        self.failed = 0
        self.passed = 0

    def line(self, ok, name, message=""):
        if ok:
            self.passed += 1
        else:
            self.failed += 1
        print(f"{'ok  ' if ok else 'FAIL'} {name}{': ' + message if message else ''}", flush=True)

    def check(self, name, work, *args):
        """Runs `work`; an exception is the failure's message, a result is shown."""
        try:
            result = work(*args)
        except Exception as error:  # whatever went wrong is what the line says
            self.line(False, name, f"{type(error).__name__}: {str(error).strip()}")
            return None
        self.line(True, name, result if isinstance(result, str) else "")
        return result

    def exit(self):
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(1 if self.failed or not self.passed else 0)


def equal(found, expected, what="value"):
    if found != expected:
        raise AssertionError(f"{what}: found {found!r}, expected {expected!r}")


def wait_until(what, condition, timeout=60):
    """Polls until the condition holds; what it returned is returned."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {timeout} s in vain: {what}")


def certificates(directory):
    """A CA of our own and a certificate for 127.0.0.1, localhost and *.db.example.com, made once."""
    ca, cert, key = directory / "ca.crt", directory / "server.crt", directory / "server.key"
    if all(path.exists() for path in (ca, cert, key)):
        return ca, cert, key
    directory.mkdir(parents=True, exist_ok=True)
    ca_key, request, extensions = directory / "ca.key", directory / "server.csr", directory / "server.ext"
    extensions.write_text(
        "subjectAltName=DNS:localhost,DNS:*.db.example.com,IP:127.0.0.1\n"
        "basicConstraints=critical,CA:FALSE\nextendedKeyUsage=serverAuth\n"
    )

    def openssl(*args):
        subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", ca, "-days", 3650, "-subj", "/CN=pgusher test CA",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl("req", *new_key, "-keyout", key, "-out", request, "-subj", "/CN=localhost")
    openssl("x509", "-req", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", 3650,
            "-extfile", extensions, "-out", cert)
    return ca, cert, key


class Dev:
    """A running `pgusher dev`: use it in a `with`."""

    def __init__(self, pool_mode="session", options=(), config=""):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="pgusher-clients-"))
        self.ca, cert, key = certificates(CACHE / "tls")
        file = self.dir / "pgusher.toml"
        file.write_text(
            f'[pool]\npool_mode = "{pool_mode}"\n'
            f'[tls]\nclient_tls_sslmode = "prefer"\nclient_tls_cert_file = "{cert}"\nclient_tls_key_file = "{key}"\n'
            f'[identify]\nsni_suffix = "db.example.com"\n[log]\nlog_connections = false\n{config}'
        )
        self.log_path = self.dir / "log"
        self.log = open(self.log_path, "wb")
        command = [str(binary()), "dev", "--port", "0", "--json", "--config", str(file), *options]
        # Variables of the tests are none of the proxy's.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PGUSHER_TEST_")}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, env=env)
        lines = queue.Queue()
        threading.Thread(target=lambda: lines.put(self.process.stdout.readline()), daemon=True).start()
        try:
            self.ready = json.loads(lines.get(timeout=START_TIMEOUT))
        except (queue.Empty, ValueError):
            log = self.log_path.read_text()
            self.stop()
            sys.exit(f"pgusher dev did not start:\n{log}")
        self.tenants = {tenant["id"]: tenant for tenant in self.ready["tenants"]}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    def shard(self, tenant):
        name = self.tenants[tenant]["shard"]
        return next(shard for shard in self.ready["shards"] if shard["name"] == name)

    def password(self, tenant):
        return urllib.parse.unquote(urllib.parse.urlsplit(self.tenants[tenant]["dsn"]).password)

    def admin(self, shard, sql):
        """Rows of a query as superuser, past the proxy."""
        return psql(shard["admin_dsn"], sql)

    def violations(self):
        """What cross_tenant_isolation_violations counts, as /metrics has it."""
        with urllib.request.urlopen(self.ready["metrics"], timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        assert any(line.startswith("# TYPE cross_tenant_isolation_violations") for line in lines)
        counts = [line for line in lines if line.startswith("cross_tenant_isolation_violations")]
        return [line for line in counts if float(line.rsplit(" ", 1)[1]) > 0]

    def memory(self):
        """Resident now and at most so far, in kB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return tuple(int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))

    def client_environment(self, tenant):
        """What the scripts under checks/ are told."""
        admin = urllib.parse.urlsplit(self.shard(tenant)["admin_dsn"])
        app = self.ready["app_user"]
        told = {
            "HOST": self.ready["host"], "PORT": self.ready["port"], "CA": self.ca, "TENANT": tenant,
            "TENANT_PASSWORD": self.password(tenant), "APP_USER": app["name"], "APP_PASSWORD": app["password"],
            "ADMIN_PORT": admin.port, "ADMIN_PASSWORD": admin.password, "ADMIN_DATABASE": admin.path[1:],
        }
        return {f"PGUSHER_TEST_{name}": str(value) for name, value in told.items()}


def clean_environment():
    """The caller's environment without what would change a client's defaults."""
    return {name: value for name, value in os.environ.items() if not (name.startswith("PG") and name != "PGUSHER")}


def run(command, timeout=300, **options):
    """Runs to the end; what it wrote is returned, and is the message if it fails."""
    env = clean_environment() | options.pop("env", {})
    done = subprocess.run(
        [str(word) for word in command], env=env, timeout=timeout, text=True, stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )
    if done.returncode:
        raise AssertionError(f"{command[0]} ended with {done.returncode}: {done.stdout.strip()[-2000:]}")
    return done.stdout


def psql(dsn, sql, *options, **more):
    """What psql prints for some SQL, unaligned, without headings."""
    return run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *options, "-d", dsn, "-c", sql], **more).strip()
