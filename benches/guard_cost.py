#!/usr/bin/env python3
"""What the guard costs: `benches/guard_cost.py --pgusher target/release/pgusher`.

pgbench's select-only script in the simple protocol, in which every text is new, through two proxies, one with
`guard.mode = "enforce"` and one with `"off"`, in turns. Compared is the processor time of the proxy's process per
transaction (user and system, from /proc): absolute times depend on the machine, the ratio of medians less so.

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
MODES = ("enforce", "off")


class Proxy:
    """A `pgusher dev` with one cluster and one tenant."""

    def __init__(self, binary, mode, before=()):
        self.dir = tempfile.TemporaryDirectory(prefix="pgusher-guard-")
        path = pathlib.Path(self.dir.name)
        (path / "pgusher.toml").write_text(
            f'[guard]\nmode = "{mode}"\n[pool]\npool_mode = "transaction"\n[log]\nlog_connections = false\n'
            "[proxy]\nworkers = 1\nclient_login_timeout = \"5min\"\n"
        )
        command = [*before, binary, "dev", "--port", "0", "--json", "--shards", "1", "--tenants", "client_001",
                   "--config", path / "pgusher.toml"]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=open(path / "log", "wb"),
                                        cwd=path)
        line = self.process.stdout.readline()
        if not line:
            sys.exit((path / "log").read_text())
        self.dsn = json.loads(line)["tenants"][0]["dsn"]

    def pgbench(self, *arguments):
        """Runs pgbench; the number of transactions."""
        command = ["pgbench", *map(str, arguments), "-d", self.dsn]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            sys.exit(f"{' '.join(command)}: {run.stderr}")
        found = re.search(r"actually processed: (\d+)", run.stdout)
        return int(found[1]) if found else 0

    def seconds(self):
        """Processor time so far."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def measure(self, seconds, clients):
        before = self.seconds()
        count = self.pgbench("-n", "-S", "-M", "simple", "-c", clients, "-j", 1, "-T", seconds)
        return (self.seconds() - before) / count * 1e6

    def instructions(self, count):
        """Instructions per transaction, under callgrind."""
        def control(what):
            done = subprocess.run(["callgrind_control", what, str(self.process.pid)], capture_output=True, text=True,
                                  check=False)
            if done.returncode != 0:
                sys.exit(done.stderr or done.stdout)

        self.pgbench("-n", "-S", "-M", "simple", "-c", 1, "-t", 200)
        control("--zero")
        self.pgbench("-n", "-S", "-M", "simple", "-c", 1, "-t", count)
        control("--dump")
        time.sleep(1)
        dumps = sorted(pathlib.Path(self.dir.name).glob("callgrind.out.*.1*"))
        total = sum(int(n) for dump in dumps for n in re.findall(r"^(?:summary|totals): (\d+)", dump.read_text(), re.M)[:1])
        return total / count

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(120)
        self.dir.cleanup()


def times(options):
    proxies = {mode: Proxy(options.pgusher, mode) for mode in MODES}
    try:
        for proxy in proxies.values():
            proxy.pgbench("-i", "-q", "-s", 1)
            proxy.measure(1, options.clients)
        taken = {mode: [] for mode in MODES}
        for round_ in range(options.rounds):
            for mode in MODES if round_ % 2 == 0 else MODES[::-1]:
                taken[mode].append(proxies[mode].measure(options.seconds, options.clients))
            print(f"round {round_ + 1}: " + ", ".join(f"{m} {taken[m][-1]:.2f} us" for m in MODES), flush=True)
    finally:
        for proxy in proxies.values():
            proxy.stop()
    medians = {mode: statistics.median(values) for mode, values in taken.items()}
    ratio = medians["enforce"] / medians["off"]
    print(f"processor time per transaction, medians of {options.rounds}: guard on {medians['enforce']:.2f} us, "
          f"off {medians['off']:.2f} us, ratio {ratio:.4f} ({(ratio - 1) * 100:+.1f}%)", flush=True)


def instructions(options):
    counted = {}
    for mode in MODES:
        proxy = Proxy(options.pgusher, mode, ("valgrind", "--tool=callgrind", "--callgrind-out-file=callgrind.out.%p",
                                              "-q"))
        try:
            proxy.pgbench("-i", "-q", "-s", 1)
            counted[mode] = proxy.instructions(options.transactions)
        finally:
            proxy.stop()
    on, off = (counted[mode] for mode in MODES)
    print(f"instructions per transaction (user space): guard on {on:.0f}, off {off:.0f}, the guard {on - off:.0f} "
          f"({(on / off - 1) * 100:+.1f}%)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pgusher", type=pathlib.Path, default=pathlib.Path("target/release/pgusher"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--callgrind", action="store_true")
    parser.add_argument("--transactions", type=int, default=3000)
    options = parser.parse_args()
    options.pgusher = options.pgusher.resolve()
    if not options.callgrind:
        times(options)
    else:
        instructions(options)


main()
