#!/usr/bin/env python3
"""An hour of everything at once: memory must stay flat, and nobody may get an error that he did not cause.

Clients of several tenants query, run transactions, set things, make temporary tables, prepare, COPY and listen; some go
away in the middle. Meanwhile PostgreSQL is restarted (errors of those seconds are counted apart), the configuration is
reloaded and pgbench comes and goes. Memory, descriptors and server connections are sampled; at the end all clients leave,
and what is left is compared with the beginning.

  benches/soak.py --minutes 60            exit status 1 if anything was wrong
"""

import argparse
import random
import signal
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True
import rig  # noqa: E402
from rig import Rig, ServerError  # noqa: E402

TENANTS = 12
IDLE_TIMEOUT = 5


class State:
    """What the threads share."""

    def __init__(self, seed):
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.counts = {}
        self.errors = []
        # From the beginning of a restart until a while after its end.
        self.restarting = threading.Event()
        self.restarts_ended = 0.0
        self.random = random.Random(seed)

    def count(self, what, n=1):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + n

    def excused(self, began):
        """Whether the server was away at some time since then."""
        return self.restarting.is_set() or began < self.restarts_ended

    def failed(self, what, began, error):
        if self.stop.is_set():
            return
        if self.excused(began):
            self.count("errors while the server was away")
        else:
            with self.lock:
                self.errors.append(f"{what}: {type(error).__name__}: {error}")


def queries(client, dice):
    for _ in range(dice.randrange(1, 30)):
        got = client.query(f"SELECT abalance FROM pgbench_accounts WHERE aid = {dice.randrange(1, 1000)}")
        assert len(got) == 1, got


def transaction(client, dice):
    client.query("BEGIN")
    client.query(f"UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = {dice.randrange(1, 1000)}")
    client.query(dice.choice(["COMMIT", "ROLLBACK"]))


def settings(client, dice):
    name = f"v{dice.randrange(1000)}"
    client.query(f"SET application_name = '{name}'")
    client.query(f"SET app.soak = '{name}'")
    for _ in range(3):
        found = client.query("SELECT current_setting('application_name'), current_setting('app.soak')")
        assert found == [[name, name]], found


def temporary(client, dice):
    client.query("CREATE TEMP TABLE scratch AS SELECT generate_series(1, 100) n")
    for _ in range(dice.randrange(5)):
        assert client.query("SELECT count(*) FROM scratch") == [["100"]]
    client.query("DROP TABLE scratch")


def prepare(client, dice):
    name = f"p{dice.randrange(5)}"
    client.query(f"PREPARE {name} AS SELECT $1::int + 1")
    assert client.query(f"EXECUTE {name}(41)") == [["42"]]
    client.query(f"DEALLOCATE {name}")


def mistakes(client, dice):
    for text, code in (("SELECT 1/0", "22012"), ("SELECT nothing", "42703"), ("SET ROLE postgres", "42501")):
        try:
            client.query(text)
        except ServerError as error:
            assert error.code == code, error
        else:
            raise AssertionError(f"{text} worked")


def large(client, dice):
    size = dice.randrange(1, 2_000_000)
    assert len(client.query(f"SELECT repeat('x', {size})")[0][0]) == size


WORK = [queries, queries, queries, transaction, transaction, settings, temporary, prepare, mistakes, large]


def client_thread(state, endpoint, number):
    """One client after the other; about one in four goes without a word, perhaps in the middle of a statement."""
    dice = random.Random(number)
    while not state.stop.is_set():
        began, client, what = time.monotonic(), None, "connect"
        try:
            client = endpoint.connect(f"t{dice.randrange(TENANTS):02}")
            state.count("clients")
            for _ in range(dice.randrange(1, 40)):
                work = dice.choice(WORK)
                what = work.__name__
                began = time.monotonic()
                work(client, dice)
                state.count("pieces of work")
                if state.stop.is_set():
                    break
            rude = dice.random() < 0.25
            if rude:
                state.count("clients killed")
                leave_rudely(client, dice)
            client.close(politely=not rude)
        except (OSError, ServerError, AssertionError) as error:
            state.failed(what, began, error)
            if client:
                client.close(politely=False)
            time.sleep(0.1)


def leave_rudely(client, dice):
    """Says something, and does not wait for the answer."""
    text = dice.choice([b"SELECT pg_sleep(0.2)", b"BEGIN", b"SELECT generate_series(1, 100000)", b"CREATE TEMP TABLE x ()"])
    client.socket.sendall(b"Q" + (len(text) + 5).to_bytes(4, "big") + text + b"\0")
    if dice.random() < 0.3:
        client.socket.sendall(b"Q\0\0\1\0SELECT half a mess")


def pgbench_thread(state, endpoint):
    """pgbench with prepared statements, over and over."""
    while not state.stop.is_set():
        began = time.monotonic()
        script = ["pgbench", "-n", "-S", "-M", "prepared", "-c", "8", "-T", "5", endpoint.dsn(tenant="pgbench")]
        done = subprocess.run(script, capture_output=True, text=True)
        if done.returncode:
            state.failed("pgbench", began, RuntimeError(done.stderr[-300:]))
        else:
            state.count("pgbench runs")


def restart_thread(state, it, every):
    while not state.stop.wait(every):
        state.restarting.set()
        try:
            it.restart_postgres()
        except (subprocess.SubprocessError, OSError) as error:
            state.failed("restart", float("inf"), error)
        # Connections that broke are noticed by their clients' next statement.
        time.sleep(1)
        state.restarts_ended = time.monotonic()
        state.restarting.clear()
        state.count("server restarts")


def reload_thread(state, endpoint, every):
    while not state.stop.wait(every):
        endpoint.process.send_signal(signal.SIGHUP)
        state.count("reloads")


def sample(endpoint, began):
    proc = endpoint.proc
    return {"seconds": time.monotonic() - began, "rss": proc.rss(), "pss": proc.pss(), "descriptors": proc.descriptors(),
            "servers": endpoint.metric("pgusher_server_connections"), "clients": endpoint.metric("pgusher_clients")}


def slope(samples, key):
    """Growth per hour by least squares, over the last two thirds: the first third is warming up."""
    points = [(one["seconds"], one[key]) for one in samples[len(samples) // 3:]]
    n = len(points)
    mean_x, mean_y = (sum(values) / n for values in zip(*points))
    spread = sum((x - mean_x) ** 2 for x, _ in points) or 1
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread * 3600


def shown(one):
    return (f"{one['seconds']:6.0f} s: RSS {one['rss'] / 1e6:.1f} MB, PSS {one['pss'] / 1e6:.1f} MB, "
            f"{one['descriptors']} descriptors, {one['servers']:.0f} server connections, {one['clients']:.0f} clients")


def soak(options, it, endpoint, state):
    """Runs until the time is up; the samples."""
    threads = [threading.Thread(target=client_thread, args=(state, endpoint, n)) for n in range(options.clients)]
    threads += [threading.Thread(target=pgbench_thread, args=(state, endpoint)),
                threading.Thread(target=restart_thread, args=(state, it, options.restart_every)),
                threading.Thread(target=reload_thread, args=(state, endpoint, options.reload_every))]
    for thread in threads:
        thread.start()
    began, samples = time.monotonic(), []
    every = max(1, options.minutes * 60 / 300)
    try:
        while time.monotonic() - began < options.minutes * 60 and endpoint.process.poll() is None:
            time.sleep(every)
            if not state.restarting.is_set():
                samples.append(sample(endpoint, began))
            if samples and len(samples) % 20 == 1:
                print(shown(samples[-1]), file=sys.stderr, flush=True)
    finally:
        state.stop.set()
        for thread in threads:
            thread.join()
    return samples


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--restart-every", type=float, default=45, metavar="SECONDS")
    parser.add_argument("--reload-every", type=float, default=7, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", default=str(rig.TARGET / "soak.json"))
    options = parser.parse_args()
    rig.raise_limits()
    state = State(options.seed)
    with Rig(shared_buffers="128MB", max_connections=200) as it:
        endpoint = it.pgusher(pool=f'server_idle_timeout = "{IDLE_TIMEOUT}s"')
        for name in [f"t{n:02}" for n in range(TENANTS)] + ["pgbench"]:
            endpoint.connect(name).close()
        subprocess.run(["pgbench", "-i", "-q", "-s", "1", endpoint.dsn(tenant="pgbench")], check=True, capture_output=True)
        time.sleep(IDLE_TIMEOUT + 3)
        first = sample(endpoint, time.monotonic())
        samples = soak(options, it, endpoint, state)
        time.sleep(IDLE_TIMEOUT + 5)
        last = sample(endpoint, time.monotonic() - options.minutes * 60) if endpoint.process.poll() is None else None
        log = endpoint.log.read_text(errors="replace")
    rig.write_json(options.json, {"counts": state.counts, "errors": state.errors, "first": first, "samples": samples,
                                  "last": last})
    report(state, first, samples, last, log)


def report(state, first, samples, last, log):
    """Says how it went, and exits accordingly."""
    wrong = []
    for what, count in sorted(state.counts.items()):
        print(f"{what}: {count}")
    print(f"at first {shown(first)}")
    if last is None:
        wrong.append("the proxy is gone")
    else:
        print(f"at last  {shown(last)}")
        # The catalog's connections may have been opened anew by now, one more or less.
        if last["descriptors"] > first["descriptors"] + 2 or last["servers"] > first["servers"] or last["clients"]:
            wrong.append("descriptors, server connections or clients are left over")
    if len(samples) > 10:
        print(f"slope: RSS {slope(samples, 'rss') / 1e6:+.2f} MB per hour, PSS {slope(samples, 'pss') / 1e6:+.2f} MB per hour, "
              f"descriptors {slope(samples, 'descriptors'):+.1f} per hour")
    if "panicked" in log:
        wrong.append("something panicked")
    print(f"errors that the clients did not cause: {len(state.errors)}")
    for error in state.errors[:20]:
        print(f"  {error}")
    if state.errors or wrong:
        sys.exit("; ".join(wrong) or "there were errors")


if __name__ == "__main__":
    main()
