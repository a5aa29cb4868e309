"""Debian packages, unpacked into the cache beside the system.

Downloads go by a sources list and package lists of the lab's own, so that the machine's apt
configuration is neither needed to have backports nor changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vmferry.errors import FerryError

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_DEFAULT_MIRROR = "http://deb.debian.org/debian"
_UPDATE_LIMIT_S = 300
_INSTALL_LIMIT_S = 900


class Apt:
    """apt with lists of its own under `directory`. Errors are FerryErrors."""

    def __init__(self, directory: Path) -> None:
        self.codename = _codename()
        self._directory = directory
        self._updated = False
        sources = directory / "sources.list"
        self._options = [
            f"-oDir::Etc::sourcelist={sources}",
            "-oDir::Etc::sourceparts=-",
            f"-oDir::State::lists={directory / 'lists'}",
            f"-oDir::Cache={directory / 'cache'}",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Retries=3",
        ]

    def update(self) -> None:
        """Fetches the package lists, once an object."""
        if self._updated:
            return
        for part in ("lists/partial", "cache/archives/partial"):
            (self._directory / part).mkdir(parents=True, exist_ok=True)
        mirror = _mirror(self.codename)
        signed = f"[signed-by={_KEYRING}] " if Path(_KEYRING).exists() else ""
        releases = [self.codename, f"{self.codename}-updates", f"{self.codename}-backports"]
        lines = [f"deb {signed}{mirror} {release} main" for release in releases]
        lines.append(f"deb {signed}{_DEFAULT_MIRROR}-security {self.codename}-security main")
        (self._directory / "sources.list").write_text("\n".join(lines) + "\n")
        _run(["apt-get", *self._options, "-q", "update"], "Package lists could not be fetched")
        self._updated = True

    def dependencies(self, package: str) -> list[str]:
        """Names that a package depends on, in its newest version for this release."""
        self.update()
        out = _run(
            ["apt-cache", *self._options, "depends", "--important", package],
            f"Package {package} was not found",
        )
        lines = [line.strip() for line in out.splitlines()]
        return [line.split()[-1] for line in lines if line.startswith("Depends:")]

    def unpack(self, packages: Sequence[str], into: Path, release: str = "") -> None:
        """Downloads packages (of `release` if it has them) and unpacks them as `into`, which comes
        into being whole or not at all."""
        self.update()
        into.parent.mkdir(parents=True, exist_ok=True)
        wanted = [self._of_release(name, release) for name in packages] if release else packages
        with tempfile.TemporaryDirectory(dir=into.parent, prefix=".unpack-") as work:
            archives, tree = Path(work, "archives"), Path(work, "tree")
            archives.mkdir()
            tree.mkdir()
            names = ", ".join(packages)
            _run(
                ["apt-get", *self._options, "-q", "download", *wanted],
                f"Packages could not be downloaded ({names})",
                cwd=archives,
            )
            for archive in sorted(archives.glob("*.deb")):
                _run(["dpkg-deb", "-x", str(archive), str(tree)], f"{archive.name} is broken")
            shutil.rmtree(into, ignore_errors=True)
            tree.rename(into)

    def _of_release(self, package: str, release: str) -> str:
        """NAME/RELEASE, or NAME where the release has none: backports lack what needs no change.

        `-t RELEASE` would not do: it never goes below a version that is installed.
        """
        out = _run(
            ["apt-cache", *self._options, "madison", package], f"Package {package} was not found"
        )
        has = any(f" {release}/main " in line for line in out.splitlines())
        return f"{package}/{release}" if has else package

    def install(self, packages: Sequence[str]) -> None:
        """Installs packages on the system: from the release, and where what is installed already
        stands against that (a newer qemu-utils, say), from backports."""
        self.update()
        base = ["apt-get", *self._options, "-q", "-y", "--no-install-recommends", "install"]
        try:
            _run([*base, *packages], "")
        except FerryError:
            backports = [f"-t{self.codename}-backports", *packages]
            _run([*base, *backports], f"Packages could not be installed ({', '.join(packages)})")


def _codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip('"')
    raise FerryError("The lab knows Debian only: /etc/os-release has no VERSION_CODENAME.")


def _mirror(codename: str) -> str:
    """The mirror that this machine uses for its own release."""
    out = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for line in out.splitlines():
        release, _, rest = line.partition(" ")
        component, _, uri = rest.partition(" ")
        if release == codename and component == "main" and uri.startswith("http"):
            return uri.rstrip("/")
    return _DEFAULT_MIRROR


def _run(command: list[str], complaint: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=environment,
            timeout=_INSTALL_LIMIT_S if "install" in command else _UPDATE_LIMIT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FerryError(f"{complaint}: {error}.") from error
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("E:")] or said[-1:]
        raise FerryError(f"{complaint}: {' '.join(errors) or command[0]}.")
    return done.stdout
