#!/usr/bin/env python3
"""What the guard, or classification and tracking, costs: `benches/cost.py [guard | tracking] --pgusher target/release/pgusher`.

pgbench's select-only script through two proxies, in turns: one as shipped and one without what is measured. Compared is the
processor time of the proxy's process per transaction (user and system, from /proc): absolute times depend on the machine,
the ratio of medians less so.

  guard     `guard.mode = "enforce"` beside `"off"`, in the simple protocol, in which every text is new
  tracking  `pool_mode = "auto"`, as shipped, beside `"transaction"` with the guard off and `max_prepared_statements = 0`,
            in the simple protocol; and with prepared statements, which such a mode does not have: beside `"transaction"` with
            the guard off that keeps them, and beside `"session"` without either, where the cost of lending the connection
            anew for every transaction is in the difference, too

With --callgrind it counts, instead, the proxy's instructions per transaction in user space, which depend on nothing else
that runs. That needs valgrind.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

TICK = os.sysconf("SC_CLK_TCK")
SHIPPED = {"guard": "enforce", "pool_mode": "auto", "prepared": 200}
WITHOUT = {**SHIPPED, "guard": "off", "pool_mode": "transaction", "prepared": 0}
# What is measured: its configurations, with it and without, and pgbench's protocols.
MEASURED = {
    "guard": [("simple", {**SHIPPED, "pool_mode": "transaction"}, {**SHIPPED, "pool_mode": "transaction", "guard": "off"})],
    "tracking": [
        ("simple", SHIPPED, WITHOUT),
        ("prepared", SHIPPED, {**WITHOUT, "prepared": SHIPPED["prepared"]}),
        ("prepared", SHIPPED, {**WITHOUT, "pool_mode": "session"}),
    ],
}


TENANTS = [f"client_{number:03}" for number in range(1, 9)]


class Proxy:
    """A `pgusher dev` with one cluster, and tenants that have a client each: so everybody has the same server connection again."""

    def __init__(self, binary, config, before=()):
        self.dir = tempfile.TemporaryDirectory(prefix="pgusher-cost-")
        path = pathlib.Path(self.dir.name)
        (path / "pgusher.toml").write_text(
            f'[guard]\nmode = "{config["guard"]}"\n[pool]\npool_mode = "{config["pool_mode"]}"\n'
            f'max_prepared_statements = {config["prepared"]}\n[log]\nlog_connections = false\n'
            "[proxy]\nworkers = 1\nclient_login_timeout = \"5min\"\n"
        )
        command = [*before, binary, "dev", "--port", "0", "--json", "--shards", "1", "--tenants", ",".join(TENANTS),
                   "--config", path / "pgusher.toml"]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=open(path / "log", "wb"),
                                        cwd=path)
        line = self.process.stdout.readline()
        if not line:
            sys.exit((path / "log").read_text())
        self.dsns = [tenant["dsn"] for tenant in json.loads(line)["tenants"]]

    def pgbench(self, *arguments):
        """Runs a pgbench for each tenant at once; the number of all transactions."""
        commands = [["pgbench", *map(str, arguments), "-d", dsn] for dsn in self.dsns]
        runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
        count = 0
        for run in runs:
            said, errors = run.communicate()
            if run.returncode != 0:
                sys.exit(f"{' '.join(run.args)}: {errors}")
            found = re.search(r"actually processed: (\d+)", said)
            count += int(found[1]) if found else 0
        return count

    def seconds(self):
        """Processor time so far."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def measure(self, protocol, seconds):
        before = self.seconds()
        count = self.pgbench("-n", "-S", "-M", protocol, "-c", 1, "-T", seconds)
        return (self.seconds() - before) / count * 1e6

    def instructions(self, protocol, count):
        """Instructions per transaction, under callgrind: the difference between two runs, so that logins do not count."""
        def run(count):
            done = subprocess.run(["callgrind_control", "--zero", str(self.process.pid)], capture_output=True, text=True,
                                  check=False)
            if done.returncode != 0:
                sys.exit(done.stderr or done.stdout)
            self.pgbench("-n", "-S", "-M", protocol, "-c", 1, "-t", count)
            before = set(pathlib.Path(self.dir.name).glob("callgrind.out.*"))
            subprocess.run(["callgrind_control", "--dump", str(self.process.pid)], capture_output=True, check=False)
            time.sleep(1)
            dumps = set(pathlib.Path(self.dir.name).glob("callgrind.out.*")) - before
            return sum(int(n) for dump in dumps for n in re.findall(r"^(?:summary|totals): (\d+)", dump.read_text(), re.M)[:1])

        run(200)
        return (run(200 + count) - run(200)) / count / len(self.dsns)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)
        self.dir.cleanup()


def called(options, protocol, without):
    return f"{options.what}, {protocol}, beside {without['pool_mode']}"


def told(what, unit, on, off):
    print(f"{what}: {unit} with it {on:.2f}, without {off:.2f}, ratio {on / off:.4f} ({(on / off - 1) * 100:+.1f}%)",
          flush=True)


def times(options, protocol, *configs):
    proxies = [Proxy(options.pgusher, config) for config in configs]
    taken = [[], []]
    try:
        for proxy in proxies:
            proxy.pgbench("-i", "-q", "-s", 1)
            proxy.measure(protocol, 1)
        for round_ in range(options.rounds):
            for which in (0, 1) if round_ % 2 == 0 else (1, 0):
                taken[which].append(proxies[which].measure(protocol, options.seconds))
            print(f"round {round_ + 1}: with it {taken[0][-1]:.2f} us, without {taken[1][-1]:.2f} us", flush=True)
    finally:
        for proxy in proxies:
            proxy.stop()
    told(called(options, protocol, configs[1]), f"processor time per transaction (us, medians of {options.rounds} rounds)",
         *map(statistics.median, taken))


def instructions(options, protocol, *configs):
    counted = []
    for config in configs:
        proxy = Proxy(options.pgusher, config, ("valgrind", "--tool=callgrind", "--callgrind-out-file=callgrind.out.%p", "-q"))
        try:
            proxy.pgbench("-i", "-q", "-s", 1)
            counted.append(proxy.instructions(protocol, options.transactions))
        finally:
            proxy.stop()
    told(called(options, protocol, configs[1]), "instructions per transaction in user space", *counted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=MEASURED, default="guard")
    parser.add_argument("--pgusher", type=pathlib.Path, default=pathlib.Path("target/release/pgusher"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--callgrind", action="store_true")
    parser.add_argument("--transactions", type=int, default=500)
    options = parser.parse_args()
    options.pgusher = options.pgusher.resolve()
    for measured in MEASURED[options.what]:
        (instructions if options.callgrind else times)(options, *measured)


main()
