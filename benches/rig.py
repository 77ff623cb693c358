"""What the measurements here share: servers of our own, a client that is no driver, and /proc.

Everything runs on loopback, on free ports, in a temporary directory, and is stopped at the end. Nothing but Python's
standard library is needed.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import pwd
import re
import resource
import secrets
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target").resolve()
TICK = os.sysconf("SC_CLK_TCK")
# So that what was started is stopped then as well.
signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))

# Logs in with a verifier of one iteration, so that the client's share of a login is next to nothing.
USER = "bench"
# Logs in with one of 4,096, as everybody does.
SCRAM_USER = "scram"
PASSWORD = "bench"
ADMIN_PASSWORD = "postgres"


def install():
    """Debian's packages of the peers, those that are missing."""
    missing = [name for name in ("pgbouncer", "haproxy") if not find(name)]
    if not find("pgbench"):
        missing.append("postgresql")
    if not missing:
        return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        sys.exit(f"please install: {' '.join(missing)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    subprocess.run(["apt-get", "update", "-q"], check=True, stdout=sys.stderr, env=env)
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
    subprocess.run(command, check=True, stdout=sys.stderr, env=env)


def find(program):
    """A program's path, in the places where Debian puts servers too."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def pg_bin():
    """Where initdb and postgres are."""
    if given := os.environ.get("PGUSHER_PG_BIN"):
        return pathlib.Path(given)
    found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    path = str(found[-1]) if found else shutil.which("initdb")
    return pathlib.Path(path).parent if path else sys.exit("PostgreSQL's initdb was not found")


def raise_limits():
    """As many descriptors as we may have: tens of thousands of clients are on their way."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (65536, hard):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
            break
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_port(port, process, log, timeout=60):
    """Until somebody listens there."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    sys.exit(f"{log.stem} did not start:\n{log.read_text(errors='replace')[-3000:]}")


def verifier(password, iterations=4096):
    """What PostgreSQL keeps of a password. One iteration makes the client's part of a login all but free."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    b64 = [base64.b64encode(part).decode() for part in (salt, stored, server)]
    return f"SCRAM-SHA-256${iterations}:{b64[0]}${b64[1]}:{b64[2]}"


class Proc:
    """A process under measurement."""

    def __init__(self, pid):
        self.pid = pid

    def cpu(self):
        """Seconds of processor time of all its threads: user, system."""
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) / TICK, int(fields[12]) / TICK

    def seconds(self):
        """The same in one number, and finer than ticks where the kernel counts so."""
        try:
            tasks = pathlib.Path(f"/proc/{self.pid}/task").glob("*/schedstat")
            return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
        except (OSError, IndexError, ValueError):
            return sum(self.cpu())

    def switches(self):
        """Times that a thread has gone to sleep, which is a call that found nothing."""
        total = 0
        for status in pathlib.Path(f"/proc/{self.pid}/task").glob("*/status"):
            with contextlib.suppress(OSError):
                total += int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status.read_text(), re.M)[1])
        return total

    def pss(self):
        """Proportional share of memory in bytes, page tables and what the kernel holds for sockets not included."""
        text = pathlib.Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return int(re.search(r"^Pss:\s*(\d+)", text, re.M)[1]) * 1024

    def rss(self):
        text = pathlib.Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"^VmRSS:\s*(\d+)", text, re.M)[1]) * 1024

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Rig:
    """A PostgreSQL with a role `bench`, and whatever is put in front of it. Use it in a `with`."""

    def __init__(self, shared_buffers="512MB", max_connections=700, verbose=False):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="pgusher-bench-"))
        self.dir.chmod(0o755)
        self.user = self.choose_user()
        self.running = []
        self.verbose = verbose
        self.port = free_port()
        # The keys that PgBouncer learns from a client's proof open the server only if both have the same verifier.
        self.verifiers = {USER: verifier(PASSWORD, 1), SCRAM_USER: verifier(PASSWORD)}
        try:
            self.start_postgres(shared_buffers, max_connections)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.running):
            stop(process)
        shutil.rmtree(self.dir, ignore_errors=True)

    @staticmethod
    def choose_user():
        """PostgreSQL and PgBouncer refuse to run as root."""
        if os.geteuid() != 0:
            return None
        names = [os.environ.get("PGUSHER_PG_USER"), "postgres", "nobody"]
        known = {entry.pw_name for entry in pwd.getpwall()}
        return next((name for name in names if name in known), None)

    def start(self, name, command, root=False, **options):
        """Starts a server that writes into a log of its own."""
        log = self.dir / f"{name}.log"
        user = None if root else self.user
        with open(log, "wb") as out:
            process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=out,
                                       stdin=subprocess.DEVNULL, user=user, cwd=self.dir, **options)
        self.running.append(process)
        return process, log

    def start_postgres(self, shared_buffers, max_connections):
        data, password = self.dir / "data", self.dir / "password"
        password.write_text(ADMIN_PASSWORD)
        data.mkdir()
        if self.user:
            shutil.chown(data, self.user)
        initdb = [pg_bin() / "initdb", "-D", data, "-U", "postgres", "--pwfile", password, "-A", "scram-sha-256",
                  "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        done = subprocess.run([str(part) for part in initdb], user=self.user, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"initdb failed: {done.stderr}")
        settings = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "",
                    "shared_buffers": shared_buffers, "max_connections": max_connections, "fsync": "off",
                    "synchronous_commit": "off", "full_page_writes": "off", "max_wal_size": "4GB",
                    "autovacuum": "off", "jit": "off", "max_locks_per_transaction": 1024}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self.postgres_command = [pg_bin() / "postgres", "-D", data, *arguments]
        self.await_postgres()
        roles = [f"CREATE ROLE {name} LOGIN PASSWORD '{secret}'" for name, secret in self.verifiers.items()]
        self.sql(*roles, f"GRANT {USER} TO {SCRAM_USER}", f"CREATE DATABASE {USER} OWNER {USER}")

    def restart_postgres(self):
        """Ends every session, as `pg_ctl restart -m fast` does."""
        stop(self.postgres, 60)
        self.running.remove(self.postgres)
        self.await_postgres()

    def await_postgres(self):
        """Starts it and waits until it takes statements."""
        self.postgres, log = self.start("postgres", self.postgres_command)
        wait_for_port(self.port, self.postgres, log)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.sql("SELECT 1")
                return
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def sql(self, *statements, database="postgres"):
        """Runs statements as superuser, past every proxy; what they print."""
        env = {**os.environ, "PGPASSWORD": ADMIN_PASSWORD}
        command = ["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(self.port),
                   "-U", "postgres", "-d", database]
        for statement in statements:
            command += ["-c", statement]
        return subprocess.run(command, env=env, check=True, text=True, capture_output=True).stdout.strip()

    def pgbouncer(self, program=None, pool_size=20, users=None, pool_mode="transaction", max_db_connections=0,
                  database=USER, prepared=0, tls=None):
        """PgBouncer, one process; `users` are names and verifiers."""
        port, home = free_port(), pathlib.Path(tempfile.mkdtemp(prefix="pgbouncer-", dir=self.dir))
        home.chmod(0o755)
        lines = [f'"{name}" "{secret}"' for name, secret in (users or self.verifiers).items()]
        (home / "users.txt").write_text("\n".join(lines) + "\n")
        extra = [f"max_prepared_statements = {prepared}"] if prepared else []
        if tls:
            extra += ["client_tls_sslmode = allow", f"client_tls_cert_file = {tls[0]}", f"client_tls_key_file = {tls[1]}"]
        (home / "pgbouncer.ini").write_text("\n".join([
            "[databases]", f"{database} = host=127.0.0.1 port={self.port}", "[pgbouncer]", "listen_addr = 127.0.0.1",
            f"listen_port = {port}", "unix_socket_dir =", "auth_type = scram-sha-256", f"auth_file = {home}/users.txt",
            f"pool_mode = {pool_mode}", f"default_pool_size = {pool_size}", "max_client_conn = 16000",
            f"max_db_connections = {max_db_connections}", "ignore_startup_parameters = extra_float_digits",
            "server_tls_sslmode = disable", "log_connections = 0", "log_disconnections = 0", *extra, ""]))
        process, log = self.start(home.name, [program or find("pgbouncer"), home / "pgbouncer.ini"])
        wait_for_port(port, process, log)
        return Endpoint("pgbouncer", port, process, database=database)

    def haproxy(self):
        """HAProxy in TCP mode, with its own default of a thread per core."""
        port, config = free_port(), self.dir / "haproxy.cfg"
        config.write_text(f"""
global
  maxconn 4000
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
listen postgres
  bind 127.0.0.1:{port}
  server one 127.0.0.1:{self.port}
""")
        process, log = self.start("haproxy", [find("haproxy"), "-f", config, "-db"])
        wait_for_port(port, process, log)
        return Endpoint("haproxy", port, process)

    def pgusher(self, name="pgusher", binary=None, config="", pool="", proxy="", tls=None, env=None):
        """pgusher as shipped, but for what is given; both users may be every tenant."""
        port, api, metrics = free_port(), free_port(), free_port()
        tls = f'client_tls_sslmode = "allow"\nclient_tls_cert_file = "{tls[0]}"\nclient_tls_key_file = "{tls[1]}"' if tls else ""
        users = "\n".join(f'[[users]]\nname = "{name}"\npassword = "{secret}"\ntenants = ["*"]\nauto_provision = true'
                          for name, secret in self.verifiers.items())
        template = self.dir / "template"
        template.mkdir(exist_ok=True)
        (template / "01.sql").write_text(
            "CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int, filler char(84));\n"
            "INSERT INTO pgbench_accounts SELECT n, 1, 0, '' FROM generate_series(1, 1000) n;\n")
        file = self.dir / f"{name}.toml"
        file.write_text(f"""
[proxy]
listen_port = {port}
max_client_conn = 20000
{proxy}
[pool]
{pool}
[tls]
server_tls_sslmode = "disable"
{tls}
{users}
[[shards]]
name = "shard_1"
port = {self.port}
admin_password = "{ADMIN_PASSWORD}"
[provision]
master_secret = "{'0123456789abcdef' * 2}"
admin_password = "{ADMIN_PASSWORD}"
template_dir = "{template}"
[api]
listen = "127.0.0.1:{api}"
[metrics]
listen = "127.0.0.1:{metrics}"
storage_interval = 0
[log]
log_connections = false
{config}
""")
        command = [binary or pgusher_binary(), "serve", "--config", file]
        # As whoever runs this: the binary may lie where others cannot read.
        process, log = self.start(name, command, root=True, env={**os.environ, **(env or {})})
        wait_for_port(port, process, log)
        endpoint = Endpoint("pgusher", port, process, tenant=True)
        endpoint.metrics, endpoint.api, endpoint.config, endpoint.log = metrics, api, file, log
        return endpoint

    def certificate(self):
        """A certificate of our own, and its key."""
        cert, key = self.dir / "server.crt", self.dir / "server.key"
        if not cert.exists():
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                            "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "30", "-subj", "/CN=localhost"],
                           check=True, capture_output=True)
            key.chmod(0o600)
            if self.user:
                shutil.chown(key, self.user)
        return cert, key


def pgusher_binary():
    """$PGUSHER, or what `cargo build --release` made."""
    path = pathlib.Path(os.environ.get("PGUSHER") or TARGET / "release" / "pgusher").resolve()
    return path if path.exists() else sys.exit(f"{path} is not there: cargo build --release, or set PGUSHER")


def stop(process, timeout=10):
    """Ends a process that we have started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


class Endpoint:
    """Where clients connect, and the process that they find there."""

    def __init__(self, name, port, process=None, database=USER, tenant=False):
        self.name, self.port, self.process, self.database, self.tenant = name, port, process, database, tenant
        self.proc = Proc(process.pid) if process else None

    def login(self, user=USER, tenant="one"):
        """The name to log in with; through pgusher it says which tenant is meant."""
        return f"{user}.{tenant}" if self.tenant else user

    def dsn(self, user=USER, tenant="one"):
        database, user = "postgres" if self.tenant else self.database, self.login(user, tenant)
        return f"host=127.0.0.1 port={self.port} user={user} password={PASSWORD} dbname={database} sslmode=disable"

    def connect(self, tenant="one", user=USER, tls=None):
        """A client of our own."""
        return Client(self.port, self.login(user, tenant), PASSWORD, "postgres" if self.tenant else self.database, tls)

    def metric(self, name):
        """The sum of a metric's values, over all its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        lines = re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.M)
        return sum(float(value) for value in lines)


class Client:
    """Speaks as much of the protocol as it takes to log in and to ask; far cheaper than a driver."""

    def __init__(self, port, user, password, database, tls=None, timeout=30):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        if tls:
            self.socket.sendall(struct.pack("!ii", 8, 80877103))
            if self.socket.recv(1) != b"S":
                raise ConnectionError("no TLS")
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        parameters = b"".join(f"{k}\0{v}\0".encode() for k, v in (("user", user), ("database", database))) + b"\0"
        self.socket.sendall(struct.pack("!ii", len(parameters) + 8, 196608) + parameters)
        self.log_in(password)

    def message(self):
        """The next message: tag and body."""
        while len(self.buffer) < 5 or len(self.buffer) < 1 + struct.unpack_from("!i", self.buffer, 1)[0]:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("closed")
            self.buffer += data
        end = 1 + struct.unpack_from("!i", self.buffer, 1)[0]
        tag, body, self.buffer = self.buffer[:1], self.buffer[5:end], self.buffer[end:]
        if tag == b"E":
            fields = dict((part[:1], part[1:].decode()) for part in body.split(b"\0") if part)
            raise ServerError(fields.get(b"C"), fields.get(b"M"))
        return tag, body

    def log_in(self, password):
        nonce = base64.b64encode(secrets.token_bytes(18)).decode()
        bare = f"n=,r={nonce}"
        while True:
            tag, body = self.message()
            if tag == b"Z":
                return
            if tag != b"R":
                continue
            kind = struct.unpack_from("!i", body)[0]
            if kind == 10:
                first = f"n,,{bare}".encode()
                answer = b"SCRAM-SHA-256\0" + struct.pack("!i", len(first)) + first
            elif kind == 11:
                challenge = body[4:].decode()
                answer = self.prove(password, bare, challenge)
            else:
                continue
            self.socket.sendall(b"p" + struct.pack("!i", len(answer) + 4) + answer)

    @staticmethod
    def prove(password, bare, challenge):
        parts = dict(part.split("=", 1) for part in challenge.split(","))
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), base64.b64decode(parts["s"]), int(parts["i"]))
        key = hmac.digest(salted, b"Client Key", "sha256")
        final = f"c=biws,r={parts['r']}"
        signature = hmac.digest(hashlib.sha256(key).digest(), f"{bare},{challenge},{final}".encode(), "sha256")
        proof = base64.b64encode(bytes(a ^ b for a, b in zip(key, signature))).decode()
        return f"{final},p={proof}".encode()

    def query(self, text):
        """Runs a statement by the simple protocol; rows of text."""
        body = text.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!i", len(body) + 4) + body)
        rows, failure = [], None
        while True:
            try:
                tag, body = self.message()
            except ServerError as error:
                failure = error
                continue
            if tag == b"D":
                rows.append(self.row(body))
            elif tag == b"Z":
                if failure:
                    raise failure
                return rows

    @staticmethod
    def row(body):
        at, values = 2, []
        for _ in range(struct.unpack_from("!h", body)[0]):
            size = struct.unpack_from("!i", body, at)[0]
            at += 4
            values.append(None if size < 0 else body[at:at + size].decode())
            at += max(size, 0)
        return values

    def close(self, politely=True):
        with contextlib.suppress(OSError):
            if politely:
                self.socket.sendall(b"X\0\0\0\4")
            self.socket.close()


class ServerError(Exception):
    """An ErrorResponse."""

    def __init__(self, code, message):
        super().__init__(f"{code}: {message}")
        self.code = code


def tls_context():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def median(values):
    values = sorted(value for value in values if value is not None)
    if not values:
        return None
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def write_json(path, value):
    pathlib.Path(path).write_text(json.dumps(value, indent=1) + "\n")
