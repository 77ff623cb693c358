#!/usr/bin/env python3
"""pgusher beside PgBouncer, HAProxy and no proxy at all, measured in one run.

Starts a PostgreSQL, Debian's PgBouncer and HAProxy (TCP mode) and pgusher as shipped, and runs every workload on each of
them in turn, round by round, so that whatever the machine does meanwhile meets them all alike. Prints one table of
medians and ratios (each a median of the rounds' own ratios) and writes everything into a JSON file.

What counts is processor time per transaction, user and system, of all threads of the proxy: it says how many clients a
core serves. Transactions and latencies are read from `pgbench --log`, between two moments of a run at which all clients
are connected. PgBouncer 1.18 cannot prepare statements in transaction mode: name a newer one by --pgbouncer.

  benches/pgbench.py                      all of it, some 12 minutes
  benches/pgbench.py --quick              rough, 3 minutes
  benches/pgbench.py simple extended      these workloads
"""

import argparse
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
import rig  # noqa: E402
from rig import SCRAM_USER, USER, Endpoint, Rig, median

# Name: what pgbench is told; who takes part; who logs in.
WORKLOADS = {
    "simple": ("-S -M simple -c 32 -j 2", "pgusher pgbouncer haproxy", USER),
    "extended": ("-S -M extended -c 32 -j 2", "pgusher pgbouncer haproxy", USER),
    "prepared": ("-S -M prepared -c 32 -j 2", "pgusher pgbouncer haproxy", USER),
    "tpcb": ("-b tpcb-like -M simple -c 32 -j 2", "pgusher pgbouncer haproxy", USER),
    "one client": ("-S -M extended -c 1", "pgusher pgbouncer haproxy direct", USER),
    "400 prepared": ("-S -M prepared -c 400 -j 2", "pgusher pgbouncer", USER),
    "500 clients": ("-S -M extended -c 500 -j 2", "pgusher pgbouncer", USER),
    "login": ("-S -C -M simple -c 8 -j 2", "pgusher pgbouncer direct", SCRAM_USER),
    "login, cheap proof": ("-S -C -M simple -c 8 -j 2", "pgusher pgbouncer direct", USER),
}
SPECIAL = ["tenants", "cold", "copy", "idle", "crowd"]
SCALE = 5
TENANTS = 200
ACCOUNTS = "\\set aid random(1, 1000)\nSELECT abalance FROM pgbench_accounts WHERE aid = :aid;\n"


def reading(proc):
    """What the endpoint's process has used: all of its time, that in user mode, how often it went to sleep."""
    return proc and (proc.seconds(), proc.cpu()[0], proc.switches())


def sockets(pid):
    """Connections that a process has."""
    try:
        return sum(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:") for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


class Bench:
    """pgbench against endpoints; the part of each run in which all clients are connected is what counts."""

    def __init__(self, seconds):
        self.seconds = seconds

    def command(self, endpoint, args, seconds, logs, tenant="one", user=USER):
        return ["pgbench", "-n", "-T", str(seconds), "--log", "--log-prefix", f"{logs}/{tenant}", *args.split(),
                endpoint.dsn(user, tenant)]

    def one(self, endpoint, args, user=USER, tenant="one"):
        """One pgbench."""
        with tempfile.TemporaryDirectory() as logs:
            command = self.command(endpoint, args, self.seconds, logs, tenant, user)
            process = self.spawn(command)
            clients = int(re.search(r"-c (\d+)", args)[1])
            while "-C" not in args.split() and sockets(process.pid) < clients and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.15)
            return self.window(endpoint, [process], logs, self.seconds - 0.3)

    def many(self, endpoint, tenants, args):
        """A pgbench for each tenant, all at once."""
        with tempfile.TemporaryDirectory() as logs:
            processes = [self.spawn(self.command(endpoint, args, self.seconds + 3, logs, t)) for t in tenants]
            time.sleep(1.5)
            return self.window(endpoint, processes, logs, self.seconds)

    @staticmethod
    def spawn(command):
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @staticmethod
    def window(endpoint, processes, logs, seconds):
        began, before = time.time(), reading(endpoint.proc)
        time.sleep(seconds)
        ended, after = time.time(), reading(endpoint.proc)
        client = 0.0
        for process in processes:
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            client += usage.ru_utime + usage.ru_stime
            if process.returncode or re.search(r"error|fatal|aborted", output, re.I):
                raise RuntimeError(f"pgbench through {endpoint.name}: {output[-800:]}")
        latencies, total = [], 0
        for log in pathlib.Path(logs).iterdir():
            for line in log.read_text().splitlines():
                _, _, took, _, second, micro = line.split()[:6]
                total += 1
                if began <= int(second) + int(micro) / 1e6 < ended:
                    latencies.append(int(took))
        if not latencies:
            raise RuntimeError(f"pgbench through {endpoint.name}: not one transaction")
        latencies.sort()
        count = len(latencies)
        result = {"tps": count / (ended - began), "p50_ms": latencies[count // 2] / 1e3,
                  "p99_ms": latencies[min(count - 1, math.ceil(count * 0.99))] / 1e3, "client_us": client / total * 1e6}
        if before:
            cpu, user, switches = ((now - then) / count for now, then in zip(after, before))
            result |= {"cpu_us": cpu * 1e6, "user_us": user * 1e6, "switches": switches}
        return result


class Run:
    """All that is measured, by workload and endpoint: a list of rounds each."""

    def __init__(self, options):
        self.options = options
        self.results = {}
        self.facts = {}
        self.bench = Bench(options.seconds)

    def note(self, workload, name, result):
        self.results.setdefault(workload, {}).setdefault(name, []).append(result)
        shown = " ".join(f"{key} {value:.4g}" for key, value in result.items())
        print(f"  {workload}, {name}: {shown}", file=sys.stderr, flush=True)

    def median(self, workload, name, key):
        rounds = self.results.get(workload, {}).get(name, [])
        return median(one.get(key) for one in rounds)

    def ratio(self, workload, name, other, key):
        """The median of the rounds' ratios."""
        mine, theirs = (self.results.get(workload, {}).get(n, []) for n in (name, other))
        pairs = [(m.get(key), t.get(key)) for m, t in zip(mine, theirs)]
        return median(m / t for m, t in pairs if m is not None and t)

    def wants(self, name):
        return not self.options.workloads or name in self.options.workloads

    def all(self):
        options = self.options
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            self.pgbench_round(number)
            for name in ("tenants", "copy"):
                if self.wants(name):
                    getattr(self, name)()
        for name in ("cold", "idle", "crowd"):
            if self.wants(name):
                print(name, file=sys.stderr, flush=True)
                getattr(self, name)()

    def pgbench_round(self, number):
        for workload, (args, names, user) in WORKLOADS.items():
            if not self.wants(workload):
                continue
            names = [name for name in names.split() if name in self.endpoints]
            if "prepared" in workload and not self.can_prepare:
                names = [name for name in names if name != "pgbouncer"]
            # Nobody is always the first.
            names = names[number % len(names):] + names[:number % len(names)]
            for name in names:
                self.note(workload, name, self.bench.one(self.endpoints[name], args, user))

    def prepare(self, it):
        """Starts everybody, and makes the tables: of the tenant `one`, and of `bench` for those without tenants."""
        options, self.rig = self.options, it
        version = subprocess.run([options.pgbouncer or rig.find("pgbouncer"), "--version"], capture_output=True, text=True)
        self.facts["pgbouncer"] = version.stdout.split("\n")[0]
        numbers = tuple(int(n) for n in re.findall(r"\d+", version.stdout)[:2])
        self.can_prepare = numbers >= (1, 21)
        self.facts["haproxy"] = subprocess.run([rig.find("haproxy"), "-v"], capture_output=True, text=True).stdout.split(" - ")[0]
        self.facts["postgres"] = it.sql("SHOW server_version")
        self.facts["cpus"], self.facts["kernel"] = os.cpu_count(), os.uname().release
        prepared = 200 if self.can_prepare else 0
        self.endpoints = {
            "direct": Endpoint("direct", it.port),
            "pgbouncer": it.pgbouncer(options.pgbouncer, prepared=prepared),
            "haproxy": it.haproxy(),
            "pgusher": it.pgusher(pool="default_pool_size = 20"),
        }
        for name in ("direct", "pgusher"):
            subprocess.run(["pgbench", "-i", "-q", "-s", str(SCALE), self.endpoints[name].dsn()], check=True,
                           capture_output=True)
        it.sql("CHECKPOINT")
        if any(self.wants(name) for name in ("tenants", "cold")):
            self.make_tenants()

    def make_tenants(self):
        """As many tenants, and for PgBouncer as many roles with a schema of their own in a database `many`."""
        print(f"making {TENANTS} tenants", file=sys.stderr, flush=True)
        self.names = [f"t{number:03}" for number in range(TENANTS)]
        for name in self.names:
            self.endpoints["pgusher"].connect(name).close()
        secret = self.rig.verifiers[USER]
        self.rig.sql("CREATE DATABASE many")
        self.rig.sql(*(f"CREATE ROLE {name}_ LOGIN PASSWORD '{secret}'; CREATE SCHEMA {name}_ AUTHORIZATION {name}_;"
                       f"CREATE TABLE {name}_.pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int, filler char(84));"
                       f"INSERT INTO {name}_.pgbench_accounts SELECT n, 1, 0, '' FROM generate_series(1, 1000) n;"
                       f"ALTER TABLE {name}_.pgbench_accounts OWNER TO {name}_" for name in self.names), database="many")
        self.script = self.rig.dir / "accounts.sql"
        self.script.write_text(ACCOUNTS)
        limit = "max_db_connections = 100\ndefault_pool_size = 100"
        self.budget = self.rig.pgusher("budget", pool=limit)
        users = {f"{name}_": secret for name in self.names}
        self.many_bouncer = self.rig.pgbouncer(self.options.pgbouncer, pool_size=100, users=users, max_db_connections=100,
                                               database="many")

    def tenants(self):
        """200 tenants with 2 clients each, on a shard that takes 100 connections; and one tenant with all 400, which are as many
        processes: pgbench's own cost is in both."""
        for name, tenants in (("pgusher, 200 tenants", self.names), ("pgusher, 1 tenant", ["t000"] * TENANTS)):
            counters = ("pgusher_evictions_total", "pgusher_server_logins_total")
            before = [self.budget.metric(counter) for counter in counters]
            args = f"-f {self.script} -M simple -c 2"
            result = self.bench.many(self.budget, tenants, args)
            after = [self.budget.metric(counter) for counter in counters]
            result["evictions"], result["logins"] = (now - then for now, then in zip(after, before))
            self.note("tenants", name, result)
        bouncer = self.many_bouncer
        as_role = Endpoint(bouncer.name, bouncer.port, bouncer.process, bouncer.database)
        as_role.login = lambda user, tenant: f"{tenant}_"
        self.note("tenants", "pgbouncer, 200 users", self.bench.many(as_role, self.names, f"-f {self.script} -M simple -c 2"))

    def cold(self):
        """Login and first query of a tenant that has no server connection, against those past the proxy."""
        names = self.names[:60] if self.options.quick else self.names
        fresh = self.rig.pgusher("cold")
        direct = Endpoint("direct", self.rig.port, database="many")
        direct.login = lambda user, tenant: f"{tenant}_"
        query = "SELECT abalance FROM pgbench_accounts WHERE aid = 7"
        for name in names:
            for endpoint in (fresh, direct):
                began = time.perf_counter()
                client = endpoint.connect(name)
                client.query(query)
                self.results.setdefault("cold", {}).setdefault(endpoint.name, []).append(
                    {"ms": (time.perf_counter() - began) * 1e3})
                client.close()
        for endpoint in ("pgusher", "direct"):
            print(f"  cold, {endpoint}: {self.median('cold', endpoint, 'ms'):.3f} ms", file=sys.stderr)
        rig.stop(fresh.process)

    def copy(self):
        """Many rows, large rows and COPY in both directions: bytes per second of the proxy's processor."""
        rows, size = (20_000, 1000) if self.options.quick else (100_000, 1000)
        work = {"rows": f"SELECT repeat('x', {size}) FROM generate_series(1, {rows})",
                "large rows": f"SELECT repeat('x', {size * 1000}) FROM generate_series(1, {rows // 1000})",
                "COPY out": f"COPY (SELECT repeat('x', {size}) FROM generate_series(1, {rows})) TO STDOUT"}
        data = self.rig.dir / "rows.txt"
        if not data.exists():
            data.write_text(("x" * size + "\n") * rows)
        work["COPY in"] = f"\\copy sink from '{data}'"
        for what, command in work.items():
            for name in ("pgusher", "pgbouncer", "haproxy"):
                endpoint = self.endpoints[name]
                if what == "COPY in":
                    self.psql(endpoint, "DROP TABLE IF EXISTS sink", "CREATE UNLOGGED TABLE sink (x text)")
                before, began = endpoint.proc.seconds(), time.perf_counter()
                self.psql(endpoint, command)
                took, cpu = time.perf_counter() - began, endpoint.proc.seconds() - before
                self.note(what, name, {"mb_per_cpu_s": rows * size / cpu / 1e6, "mb_per_s": rows * size / took / 1e6})

    @staticmethod
    def psql(endpoint, *commands):
        command = ["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", endpoint.dsn()]
        for one in commands:
            command += ["-c", one]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def idle(self):
        """Memory of an idle client that has logged in and asked once, plain and over TLS."""
        count = self.options.idle
        for kind, tls in (("plain", None), ("TLS", self.rig.certificate())):
            context = rig.tls_context() if tls else None
            for make in (lambda: self.rig.pgusher(f"idle-{kind}", tls=tls),
                         lambda: self.rig.pgbouncer(self.options.pgbouncer, tls=tls)):
                endpoint = make()
                warm = [endpoint.connect(tls=context) for _ in range(10)]
                for client in warm:
                    client.query("SELECT 1")
                before = endpoint.proc.pss()
                clients = [endpoint.connect(tls=context) for _ in range(count)]
                time.sleep(0.5)
                greeted = (endpoint.proc.pss() - before) / count / 1024
                for client in clients:
                    client.query("SELECT 1")
                time.sleep(0.5)
                asked = (endpoint.proc.pss() - before) / count / 1024
                self.note(f"idle {kind}", endpoint.name, {"kib_logged_in": greeted, "kib": asked})
                for client in clients + warm:
                    client.close(politely=False)
                rig.stop(endpoint.process)

    def crowd(self):
        """A hundred busy clients on a process with a crowd of idle ones, and on one without."""
        count = self.options.crowd
        alone, crowded = (self.rig.pgusher(name, pool="default_pool_size = 20") for name in ("alone", "crowded"))
        clients = [crowded.connect() for _ in range(count)]
        for client in clients:
            client.query("SELECT 1")
        try:
            for _ in range(self.options.rounds):
                for name, endpoint in (("alone", alone), ("crowded", crowded)):
                    self.note("crowd", name, self.bench.one(endpoint, "-S -M extended -c 100 -j 2"))
            for client in clients[::100]:
                client.query("SELECT 1")
        finally:
            for client in clients:
                client.close(politely=False)
            rig.stop(alone.process)
            rig.stop(crowded.process)

    def table(self):
        """One table: what each costs, and pgusher's ratios."""
        head = ["workload", "pgusher µs (user)", "PgBouncer", "HAProxy", "/PgBouncer", "/HAProxy", "tx/s", "tx/s ratio",
                "p99 ms", "PgBouncer's", "HAProxy's", "sleeps/tx"]
        rows = []
        for workload in WORKLOADS:
            if workload not in self.results:
                continue
            rows.append([workload, *(self.cost(workload, n) for n in ("pgusher", "pgbouncer", "haproxy")),
                         *(shown(self.ratio(workload, "pgusher", n, "cpu_us"), 2) for n in ("pgbouncer", "haproxy")),
                         shown(self.median(workload, "pgusher", "tps"), 0),
                         shown(self.ratio(workload, "pgusher", "pgbouncer", "tps")
                               or self.ratio(workload, "pgusher", "haproxy", "tps"), 2),
                         *(shown(self.median(workload, n, "p99_ms"), 2) for n in ("pgusher", "pgbouncer", "haproxy")),
                         shown(self.median(workload, "pgusher", "switches"), 2)])
        lines = [*table([head, *rows]), *self.more()] if rows else self.more()
        return "\n".join(lines)

    def cost(self, workload, name):
        total, user = (self.median(workload, name, key) for key in ("cpu_us", "user_us"))
        return "" if total is None else f"{total:.1f} ({user:.1f})"

    def more(self):
        """A line for each of the others."""
        lines, m, r = [], self.median, self.ratio
        for workload in ("login", "login, cheap proof"):
            if workload in self.results:
                clients = ", ".join(f"{m(workload, n, 'client_us'):.0f} {n}" for n in self.results[workload])
                lines.append(f"{workload}: the client's own µs per login: {clients}")
        if "tenants" in self.results:
            many, one, bouncer = "pgusher, 200 tenants", "pgusher, 1 tenant", "pgbouncer, 200 users"
            tps = {n: m("tenants", n, "tps") for n in (many, one, bouncer)}
            lines.append(f"100 connections: 200 tenants x 2 clients {tps[many]:.0f} tx/s, 1 tenant x 400 {tps[one]:.0f} "
                         f"(ratio {r('tenants', many, one, 'tps'):.2f}), PgBouncer 200 users x 2 {tps[bouncer]:.0f}; "
                         f"evictions {m('tenants', many, 'evictions'):.0f}, logins {m('tenants', many, 'logins'):.0f}")
        if "cold" in self.results:
            lines.append(f"cold tenant, login and query: {m('cold', 'pgusher', 'ms'):.2f} ms, direct "
                         f"{m('cold', 'direct', 'ms'):.2f} ms, ratio {r('cold', 'pgusher', 'direct', 'ms'):.2f}")
        for kind in ("plain", "TLS"):
            if f"idle {kind}" in self.results:
                values = "; ".join(f"{n} {m(f'idle {kind}', n, 'kib'):.2f} (before its first query "
                                   f"{m(f'idle {kind}', n, 'kib_logged_in'):.2f})" for n in ("pgusher", "pgbouncer"))
                lines.append(f"KiB PSS per idle client, {kind}, {self.options.idle} clients: {values}")
        if "crowd" in self.results:
            lines.append(f"100 busy clients beside {self.options.crowd} idle ones: tx/s "
                         f"{r('crowd', 'crowded', 'alone', 'tps'):.3f} of alone, processor "
                         f"{r('crowd', 'crowded', 'alone', 'cpu_us'):.3f}, p99 {r('crowd', 'crowded', 'alone', 'p99_ms'):.3f}")
        for what in ("rows", "large rows", "COPY out", "COPY in"):
            if what in self.results:
                values = ", ".join(f"{n} {m(what, n, 'mb_per_cpu_s'):.0f}" for n in self.results[what])
                lines.append(f"{what}, MB per processor second: {values}; "
                             f"/HAProxy {r(what, 'pgusher', 'haproxy', 'mb_per_cpu_s'):.2f}")
        return lines


def shown(value, digits):
    return "" if value is None else f"{value:.{digits}f}"


def table(rows):
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", help=f"of: {', '.join([*WORKLOADS, *SPECIAL])}; all of them if none")
    parser.add_argument("--rounds", type=int, help="medians of so many rounds (5; 3 if --quick)")
    parser.add_argument("--seconds", type=int, help="of one pgbench (3; 1 if --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds and fewer idle clients")
    parser.add_argument("--idle", type=int, help="idle clients whose memory is measured (8000)")
    parser.add_argument("--crowd", type=int, help="idle clients beside busy ones (15000)")
    parser.add_argument("--pgbouncer", metavar="PATH", help="another PgBouncer than Debian's")
    parser.add_argument("--json", metavar="FILE", default=str(rig.TARGET / "bench.json"), help="everything that was measured")
    options = parser.parse_args()
    for name in options.workloads:
        if name not in WORKLOADS and name not in SPECIAL:
            parser.error(f"there is no workload {name!r}")
    for name, full, quick in (("rounds", 5, 3), ("seconds", 3, 1), ("idle", 8000, 2000), ("crowd", 15000, 4000)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def main():
    options = arguments()
    rig.install()
    rig.raise_limits()
    run = Run(options)
    began = time.monotonic()
    with Rig() as it:
        run.prepare(it)
        run.all()
    run.facts |= {"minutes": (time.monotonic() - began) / 60, "rounds": options.rounds, "seconds": options.seconds}
    rig.write_json(options.json, {"facts": run.facts, "results": run.results})
    print("\n".join(f"{name}: {value}" for name, value in run.facts.items()), "\n", sep="")
    print(run.table())
    print(f"\nEverything: {options.json}")


if __name__ == "__main__":
    main()
