"""RabbitMQ and Erlang from a Debian suite, in a cache folder: no root, no chroot, no dpkg, no container.

::

    python -m tests.support.provision 4.0 4.3      # prints the prefix of each
    python -m tests.support.provision              # all of them

Each version lives in a *prefix* below the cache folder and is made once. The chain of trust is the one of
apt: the signature of ``InRelease`` → the SHA-256 of ``Packages.xz`` → the SHA-256 of every package.
The packages are unpacked in Python, and each program of Erlang is wrapped in a script that runs it under
the suite's own ``ld.so`` and libraries, so that neither the host's glibc nor its OpenSSL matters.
Other processes may want the same prefix at the same time: a file lock lets one of them work and the others wait,
and a prefix appears under its name only when it is complete.

Environment:

``LEVERET_BROKER_CACHE``
    The cache folder; by default ``leveret`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
``DEBIAN_MIRROR``
    The mirror: an URL, the part before ``/dists``. By default the one that apt uses on this machine.
``LEVERET_NO_VERIFY``
    ``1`` skips the signature (the digests are still compared), for machines without gpgv or Debian's keyring.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSIONS = {"3.10": "bookworm", "4.0": "trixie", "4.3": "sid"}
"""The RabbitMQ versions that the tests run against, and the Debian suite that has each of them."""

LAYOUT = 1
"""Part of every prefix's name: raise it when what a prefix looks like changes."""

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_ERLANG = """
    asn1 base crypto eldap eunit inets mnesia os-mon parsetools public-key runtime-tools ssl syntax-tools tools xmerl
"""
_LIBRARIES = """
    libc6 libcap2 libgcc-s1 libsctp1 libssl3 libssl3t64 libstdc++6 libsystemd0 libtinfo6 libzstd1 zlib1g
"""
_ROOTS = ["rabbitmq-server", *(f"erlang-{part}" for part in _ERLANG.split()), *_LIBRARIES.split()]
_NOT_NEEDED = re.compile(r"usr/share/(doc|man|locale|lintian|bug)|etc/|usr/lib/(ocf|systemd)")
_TRIPLET = "x86_64-linux-gnu"
_LOADERS = (f"usr/lib/{_TRIPLET}/ld-linux-x86-64.so.2", "usr/lib64/ld-linux-x86-64.so.2")


class BrokerUnavailable(Exception):
    """This machine cannot have that RabbitMQ; the message says why, and what to do about it."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}\n"
            "What helps: AMQP_URL=amqp://… to test against a broker that already runs; "
            "DEBIAN_MIRROR=URL (the part before /dists) to download from another mirror; "
            f"--brokers=… to choose among {', '.join(VERSIONS)}."
        )


# ----------------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """Where prefixes are kept."""
    if folder := os.environ.get("LEVERET_BROKER_CACHE"):
        return Path(folder).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "leveret"


def prefix_of(version: str) -> Path:
    """The prefix of RabbitMQ *version*, whether it is there already or not."""
    if version not in VERSIONS:
        raise BrokerUnavailable(f"RabbitMQ {version} is not one of those that can be provisioned.")
    return cache_folder() / f"rabbitmq-{version}-{VERSIONS[version]}-{LAYOUT}"


def provision(version: str) -> Path:
    """Return the prefix of RabbitMQ *version*, making it first when it is not there.

    Raises:
        BrokerUnavailable: another platform, no mirror, or the mirror is away or has another version by now.
    """
    prefix = prefix_of(version)
    if prefix.exists():
        return prefix
    check_platform()
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with _locked(prefix.with_name(prefix.name + ".lock")):
        if not prefix.exists():  # else another process made it while we waited for the lock
            _build(version, prefix)
    return prefix


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------- the suite


def check_platform() -> None:
    """Raise `BrokerUnavailable` unless this is Linux on x86-64."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise BrokerUnavailable(
            f"RabbitMQ can be provisioned on Linux x86-64 only; this is {sys.platform} on {platform.machine()}."
        )


def mirror() -> str:
    """The Debian mirror: ``$DEBIAN_MIRROR``, else the one that this machine's apt uses."""
    if url := os.environ.get("DEBIAN_MIRROR"):
        return url.rstrip("/")
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listed = ""
    for url in listed.split():
        if url.rstrip("/").endswith("/debian"):
            return url.rstrip("/")
    raise BrokerUnavailable("No Debian mirror is known: DEBIAN_MIRROR is not set, and apt has none.")


def _download(url: str, attempts: int = 3) -> bytes:
    """The body of *url*, tried several times with growing pauses."""
    for attempt in range(1, attempts + 1):
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                body: bytes = response.read()
                return body
        except OSError as error:  # URLError, HTTPError, timeouts
            if attempt == attempts:
                raise BrokerUnavailable(f"The Debian mirror is away or lacks a file: {url}: {error}") from error
            time.sleep(attempt)
    raise AssertionError("unreachable")


def _verified_digest(what: str, data: bytes, wanted: str) -> bytes:
    if hashlib.sha256(data).hexdigest() != wanted:
        raise BrokerUnavailable(f"{what}: the SHA-256 is not the one that the Debian archive lists; try again later.")
    return data


def _verify_signature(release: bytes) -> None:
    if os.environ.get("LEVERET_NO_VERIFY") == "1":
        return
    gpgv = shutil.which("gpgv")
    if gpgv is None or not KEYRING.exists():
        raise BrokerUnavailable(
            "The signature of the Debian archive cannot be verified: install gpgv and debian-archive-keyring, "
            "or set LEVERET_NO_VERIFY=1 to do without."
        )
    with tempfile.NamedTemporaryFile() as file:
        file.write(release)
        file.flush()
        done = subprocess.run([gpgv, "-q", "--keyring", KEYRING, file.name], capture_output=True, text=True)
    if done.returncode:
        raise BrokerUnavailable(f"The signature of the Debian archive is not good: {done.stderr.strip()}")


def _read_index(url: str, suite: str) -> dict[str, dict[str, str]]:
    """The packages of *suite*: name → its fields (those of one line)."""
    release = _download(f"{url}/dists/{suite}/InRelease")
    _verify_signature(release)
    path = "main/binary-amd64/Packages.xz"
    listed = re.search(rf"^ ([0-9a-f]{{64}}) +\d+ {path}$", release.decode(), re.MULTILINE)
    if listed is None:
        raise BrokerUnavailable(f"The Debian suite {suite} lists no {path}.")
    packed = _verified_digest(path, _download(f"{url}/dists/{suite}/{path}"), listed[1])
    packages = {}
    for paragraph in lzma.decompress(packed).decode().split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", paragraph, re.MULTILINE))
        if fields:
            packages[fields["Package"]] = fields
    return packages


def _closure(packages: dict[str, dict[str, str]]) -> list[str]:
    """The names of all packages that are needed: Erlang's and RabbitMQ's parts, and the libraries below them."""
    wanted, seen = [name for name in _ROOTS if name in packages], set[str]()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        fields = packages[name]
        for dependency in f"{fields.get('Depends', '')},{fields.get('Pre-Depends', '')}".split(","):
            other = re.split(r"[ :|(]", dependency.strip())[0]
            useful = re.match(r"lib|zlib|erlang-|gcc-", other) and not re.match(r"lib(pam|c-bin|perl|python)", other)
            if useful and other in packages:
                wanted.append(other)
    return sorted(seen)


# ---------------------------------------------------------------------------------------------- the prefix


def _build(version: str, prefix: Path) -> None:
    """Download, unpack and relocate into a folder beside *prefix*, then rename that to *prefix*."""
    url, suite = mirror(), VERSIONS[version]
    packages = _read_index(url, suite)
    found = packages.get("rabbitmq-server", {}).get("Version", "none")
    if not found.startswith(f"{version}."):
        raise BrokerUnavailable(f"The Debian suite {suite} has RabbitMQ {found} now, and {version} was wanted.")

    def fetch(name: str) -> bytes:
        fields = packages[name]
        return _verified_digest(name, _download(f"{url}/{fields['Filename']}"), fields["SHA256"])

    names = _closure(packages)
    root = prefix.with_name(prefix.name + ".part")
    shutil.rmtree(root, ignore_errors=True)
    for link in ("lib", "lib64", "bin", "sbin"):
        (root / "usr" / link).mkdir(parents=True)
        (root / link).symlink_to(f"usr/{link}")
    with ThreadPoolExecutor(4) as pool:
        for package in pool.map(fetch, names):
            _unpack(package, root)
    _relocate(root, prefix)
    (root / "packages.txt").write_text("".join(f"{name} {packages[name]['Version']}\n" for name in names))
    root.rename(prefix)


def _unpack(package: bytes, root: Path) -> None:
    """Unpack the data of a Debian package (an ``ar`` archive of tar archives) into *root*."""
    offset = len(b"!<arch>\n")
    while offset < len(package):
        header = package[offset : offset + 60]
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(package[offset + 60 : offset + 60 + size])) as archive:
                members = [m for m in archive if not _NOT_NEEDED.match(m.name.removeprefix("./"))]
                for member in members:
                    member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
                archive.extractall(root, members, filter="tar")
            return
        offset += 60 + size + size % 2


def _relocate(root: Path, prefix: Path) -> None:
    """Make Erlang, unpacked in *root*, run from *prefix* with the libraries that came with it."""
    erlang = root / "usr/lib/erlang"
    runtime = next(erlang.glob("erts-*")) / "bin"
    loader = next(path for path in _LOADERS if (root / path).is_file())
    libraries = f"{prefix}/usr/lib/{_TRIPLET}:{prefix}/usr/lib"
    for program in [*runtime.iterdir(), *erlang.glob("lib/*/priv/bin/*"), *erlang.glob("lib/*/bin/*")]:
        if program.is_file() and not program.is_symlink() and program.read_bytes()[:4] == b"\x7fELF":
            real = program.rename(program.with_name(f".{program.name}"))
            target = prefix / real.relative_to(root)
            program.write_text(
                f'#!/bin/sh\nexec "{prefix / loader}" --library-path "{libraries}" --argv0 "$0" "{target}" "$@"\n'
            )
            program.chmod(0o755)
    for script in (erlang / "bin/erl", erlang / "bin/start", runtime / "erl", runtime / "start"):
        if script.is_file() and not script.is_symlink():
            text = re.sub(r"ROOTDIR=/usr/lib/erlang\b", f"ROOTDIR={prefix}/usr/lib/erlang", script.read_text())
            script.write_text(text)


# ---------------------------------------------------------------------------------------------- the command


def main() -> int:
    """The command line: provision the versions that are named, all by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.provision", description="Provision RabbitMQ.")
    parser.add_argument("version", nargs="*", help=f"among {', '.join(VERSIONS)}; all by default")
    for version in parser.parse_args().version or VERSIONS:
        begun = time.monotonic()
        try:
            prefix = provision(version)
        except BrokerUnavailable as error:
            print(error, file=sys.stderr)
            return 1
        print(f"RabbitMQ {version}: {prefix} ({time.monotonic() - begun:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
