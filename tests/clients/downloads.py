"""The drivers: downloaded into target/clients, once."""

import os
import pathlib
import venv

from harness import CACHE, HERE, ROOT, TARGET, run

CHECKS = HERE / "checks"


def changed(name, *files):
    """Whether the files that say what to download differ from those of the last download; call the result to note it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    stamp, text = CACHE / f"{name}.stamp", "".join(file.read_text() for file in files)
    if stamp.exists() and stamp.read_text() == text:
        return None
    return lambda: stamp.write_text(text)


def python():
    home = CACHE / "venv"
    if done := changed("python", HERE / "requirements.txt"):
        venv.create(home, with_pip=True, clear=True)
        run([home / "bin" / "pip", "install", "--quiet", "-r", HERE / "requirements.txt"], timeout=1200)
        done()
    return home / "bin" / "python"


def node():
    home = CACHE / "node"
    home.mkdir(parents=True, exist_ok=True)
    # Packages are found from where the script is, so the scripts go to the packages.
    for script in CHECKS.glob("*.mjs"):
        (home / script.name).write_text(script.read_text())
    if done := changed("node", HERE / "package.json"):
        (home / "package.json").write_text((HERE / "package.json").read_text())
        run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"], cwd=home, timeout=1200)
        done()
    return home


def jdbc():
    jar = pathlib.Path(os.environ.get("PGUSHER_TEST_JDBC", "/usr/share/java/postgresql.jar"))
    if not jar.exists():
        raise FileNotFoundError(f"{jar}: install libpostgresql-jdbc-java, or name PgJDBC's jar in PGUSHER_TEST_JDBC")
    return jar


def rust():
    run(["cargo", "build", "--locked", "--quiet", "--example", "client_tokio_postgres"], cwd=ROOT, timeout=3600)
    return TARGET / "debug" / "examples" / "client_tokio_postgres"
