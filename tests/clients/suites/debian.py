"""Source packages of Debian: other projects' tests that no language's own registry has."""

import os
import pathlib
import shutil
import subprocess

from harness import CACHE, clean_environment, run

HOME = CACHE / "debian"
MIRROR = "http://deb.debian.org/debian"
KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"


def apt(suite, *words, cwd=None):
    """apt with lists of its own, so that neither root nor the system's list of sources is needed."""
    home = HOME / suite
    if not (home / "lists").exists():
        for directory in ("lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
            (home / directory).mkdir(parents=True, exist_ok=True)
        (home / "status").touch()
        line = f"[signed-by={KEYS}] {MIRROR} {suite} main\n"
        (home / "etc" / "sources.list").write_text(f"deb {line}deb-src {line}")
        (home / "apt.conf").write_text(
            f'Dir::State "{home}";\nDir::State::lists "{home}/lists";\nDir::State::status "{home}/status";\n'
            f'Dir::Cache "{home}/cache";\nDir::Etc "{home}/etc";\nDir::Etc::sourcelist "{home}/etc/sources.list";\n'
            'Dir::Etc::sourceparts "-";\nAPT::Sandbox::User "root";\nAcquire::Check-Valid-Until "no";\n')
        try:
            apt(suite, "update")
        except BaseException:
            shutil.rmtree(home)
            raise
    return run(["apt-get", "-q", *words], cwd=cwd, timeout=1200, env={"APT_CONFIG": str(home / "apt.conf")})


def source(suite, package, version=None):
    """The directory of an unpacked source package."""
    home = HOME / "source" / f"{package}-{version or suite}"
    if not home.exists():
        partial = home.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # The archive's own signature is checked; the packages' would need the keys of all developers.
        apt(suite, "source", f"{package}={version}" if version else package, cwd=partial)
        partial.rename(home)
    return next(path for path in home.iterdir() if path.is_dir())


def archive(suite, package, pattern):
    """One file of a source package, as it was downloaded. Others may be missing from a mirror."""
    home = HOME / "archives" / f"{package}-{suite}"
    home.mkdir(parents=True, exist_ok=True)
    if not any(home.glob(pattern)):
        try:
            apt(suite, "source", "--download-only", "--only-source", f"{package}/{suite}", cwd=home)
        except AssertionError:
            # apt checks each file before it gives it its name.
            if not any(home.glob(pattern)):
                raise
    return next(home.glob(pattern))


def packages(suite, name, *wanted):
    """Binary packages unpacked into one directory, installed nowhere."""
    home = HOME / name
    if not home.exists():
        partial = home.with_suffix(".part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        apt(suite, "download", *wanted, cwd=partial)
        for package in partial.glob("*.deb"):
            run(["dpkg", "-x", package, partial / "root"])
        partial.rename(home)
    return home / "root"


def installed(package):
    """The installed version of a package."""
    return run(["dpkg-query", "-W", "-f", "${Version}", package], env=clean_environment()).strip()
