"""node-postgres' own tests: pg (unit and integration), pg-pool, pg-cursor and pg-query-stream, from Debian's source package."""

import json
import os
import re
import shutil
import subprocess

import debian
from harness import CACHE, clean_environment, run

PACKAGES = ("pg", "pg-pool", "pg-cursor", "pg-query-stream")
# Of the development dependencies: these are for another platform.
UNUSED = re.compile(r"cloudflare|wrangler|vitest|eslint")
FILE_LIMIT = 120


def sources():
    """The unpacked packages beside node_modules with what they ask for."""
    home = CACHE / "suites" / "node-postgres"
    if not (home / "done").exists():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        archive = debian.archive("sid", "node-postgres", "node-postgres_*.orig.tar.gz")
        shutil.unpack_archive(archive, home / "source")
        shutil.move(next((home / "source").glob("*/packages")), home / "packages")
        wanted, own = {}, {}
        for package in PACKAGES:
            about = json.loads((home / "packages" / package / "package.json").read_text())
            wanted |= about.get("dependencies", {}) | about.get("devDependencies", {})
            own[package] = about["version"]
        # Of their own packages those of the same release: later ones warn of what the tests do.
        wanted |= own
        wanted = {name: version for name, version in wanted.items() if not UNUSED.search(name)}
        (home / "package.json").write_text(json.dumps({"private": True, "dependencies": wanted}))
        run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock", "--legacy-peer-deps"], cwd=home,
            timeout=1200)
        (home / "done").touch()
    return home


def node_postgres(world, kind, env, out):
    """Runs the packages in `world.parts`, or all of them."""
    home, results, said = sources(), {}, []

    def script(command, cwd):
        try:
            done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean_environment() | env, text=True,
                                  errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=FILE_LIMIT)
        except subprocess.TimeoutExpired as late:
            return 1, (late.stdout or b"").decode(errors="replace")
        return done.returncode, done.stdout

    for package in world.parts or PACKAGES:
        place = home / "packages" / package
        if package == "pg":
            said.append(script(["node", "script/create-test-tables.js"], place)[1])
            for test in sorted((place / "test").glob("unit/**/*-tests.js")) + sorted((place / "test").glob("integration/**/*-tests.js")):
                status, text = script(["node", test], place)
                said.append(text)
                name = f"pg::{test.relative_to(place / 'test')}"
                results[name] = "failure" if status else "passed"
                for line in re.findall(r"^  (\S.*) (✔|FAILED!|\? - SKIPPED)$", text, re.M):
                    outcome = {"✔": "passed", "FAILED!": "failure"}.get(line[1], "skipped")
                    results[f"{name}::{line[0]}"] = outcome
        else:
            said.append(mocha(home, package, place, script, results))
    out.write_text("\n".join(said))
    return results


def mocha(home, package, place, script, results):
    kind = "ts" if package == "pg-query-stream" else "js"
    report = home / f"{package}.json"
    report.unlink(missing_ok=True)
    options = ["-r", "ts-node/register/transpile-only"] if kind == "ts" else []
    status, text = script([home / "node_modules/.bin/mocha", "--exit", *options, "--reporter", "json", "--reporter-option",
                           f"output={report}", f"test/**/*.{kind}"], place)
    if not report.exists():
        results[package] = "error"
        return text
    found = json.loads(report.read_text())
    for kind, outcome in (("passes", "passed"), ("failures", "failure"), ("pending", "skipped")):
        for test in found[kind]:
            file = os.path.basename(test.get("file") or "")
            results[f"{package}::{file}::{test['fullTitle']}"] = outcome
    failed = [f"{test['fullTitle']}: {test['err'].get('stack')}" for test in found["failures"]]
    return "\n".join([text, *failed])
