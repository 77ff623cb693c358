"""PostgreSQL's own suites: `pg_regress` and the isolation tests, of the source package that the server was built from."""

import os
import re
import shutil
import subprocess

import debian
from harness import clean_environment, run

# Binaries and sources have to be of one version: what a server prints changes in minor releases too.
LIBRARIES = ("src/test/regress/regress.c", "contrib/spi/refint.c", "contrib/spi/autoinc.c")
LONGEST = 3000


def sources(world):
    """The tests, for the server of this world."""
    version = debian.installed(f"postgresql-{major(world)}")
    return debian.source(release(), f"postgresql-{major(world)}", version)


def major(world):
    return world.own.sql("SHOW server_version_num")[:-4]


def release():
    """What this machine's Debian is called."""
    text = open("/etc/os-release").read()
    return re.search(r"^VERSION_CODENAME=(\w+)", text, re.M).group(1)


def library(world):
    """The directory with the functions in C that some tests load, compiled."""
    source = sources(world)
    home = debian.HOME / f"{source.name}-libraries"
    if not home.exists():
        number = major(world)
        package = f"postgresql-server-dev-{number}"
        headers = debian.packages(release(), package, f"{package}={debian.installed(f'postgresql-{number}')}")
        partial = home.with_suffix(".part")
        partial.mkdir(exist_ok=True)
        for file in LIBRARIES:
            out = partial / (file.rsplit("/", 1)[1].removesuffix(".c") + ".so")
            run(["cc", "-O1", "-fPIC", "-shared", "-DREFINT_VERBOSE", f"-I{headers}/usr/include/postgresql/{number}/server",
                 f"-I{headers}/usr/include/postgresql", "-o", out, source / file])
        partial.rename(home)
    return home


def program(world, name):
    path = world.own.bin.parent / "lib" / "pgxs" / "src" / "test" / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: this PostgreSQL comes without its tests' programs")
    return path


def tidy(world):
    """Takes away what a run has left outside its database."""
    for name in world.own.sql("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()").split():
        world.own.sql(f"ROLLBACK PREPARED '{name}'")
    for name in world.own.sql("SELECT slot_name FROM pg_replication_slots").split():
        world.own.sql(f"SELECT pg_drop_replication_slot('{name}')")
    for name in world.own.sql("SELECT spcname FROM pg_tablespace WHERE spcname ~ '^regress'").split():
        world.own.sql(f'DROP TABLESPACE "{name}"')
    for name in world.own.sql("SELECT rolname FROM pg_roles WHERE rolname ~ '^regress'").split():
        world.own.sql(f'DROP OWNED BY "{name}"')
        world.own.sql(f'DROP ROLE "{name}"')


def outcomes(text):
    """Test by test, as versions up to 15 print it, and as TAP."""
    results = {}
    for line in text.splitlines():
        if found := re.match(r"(?:test|  *)\s*(\S+)\s+\.\.\. (ok|FAILED|failed)", line):
            results[found[1]] = "passed" if found[2] == "ok" else "failure"
        elif found := re.match(r"(ok|not ok) \d+\s+[-+] (\S+)", line):
            results[found[2]] = "passed" if found[1] == "ok" else "failure"
    return results


def suite(world, kind, env, out, binary, tests, words):
    """Runs one of them; what fails direct too must print the same."""
    tidy(world)
    home = out.with_suffix("")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    # The server writes there as well (COPY TO), as another user.
    home.chmod(0o777)
    old = os.umask(0)
    try:
        (home / "results").mkdir()
    finally:
        os.umask(old)
    command = [binary, f"--bindir={world.own.bin}", f"--inputdir={tests}", f"--outputdir={home}", f"--host={env['PGHOST']}",
               f"--port={env['PGPORT']}", f"--user={env['PGUSER']}", "--max-concurrent-tests=20", *words]
    if kind == "ordinary":
        command += ["--use-existing", f"--dbname={env['PGDATABASE']}"]
    if world.parts:
        command = [*(word for word in command if not str(word).startswith("--schedule")), *world.parts]
    with open(home / "printed", "w") as printed:
        subprocess.run([str(word) for word in command], cwd=home, env=clean_environment() | env, stdin=subprocess.DEVNULL,
                       stdout=printed, stderr=printed, timeout=LONGEST)
    printed = (home / "printed").read_text()
    results = outcomes(printed)
    if not results:
        raise AssertionError(f"{binary.name}: {printed[-3000:]}")
    direct = home.parent / home.name.replace(kind, "direct")
    for test, outcome in results.items():
        ours, theirs = (place / "results" / f"{test}.out" for place in (home, direct))
        if outcome == "failure" and kind != "direct" and theirs.exists() and ours.read_bytes() != theirs.read_bytes():
            results[test] = "failure with other output"
    return results


def pg_regress(world, kind, env, out):
    tests = sources(world) / "src" / "test" / "regress"
    words = [f"--dlpath={library(world)}", f"--schedule={tests}/parallel_schedule"]
    return suite(world, kind, env, out, program(world, "regress/pg_regress"), tests, words)


def isolation(world, kind, env, out):
    tests = sources(world) / "src" / "test" / "isolation"
    words = [f"--schedule={tests}/isolation_schedule"]
    return suite(world, kind, env, out, program(world, "isolation/pg_isolation_regress"), tests, words)
