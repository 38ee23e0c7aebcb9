"""The image, built for real and without a Docker engine: Debian's buildah, on a base that debootstrap makes.

Debian's image `bookworm-slim` is what debootstrap installs, less its documentation, so the Dockerfile's every
step runs as it would elsewhere. What this machine's pip needs (its certificates, torch) is lent to the build.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
PACKAGES = ("buildah", "debootstrap")
BASE = "docker.io/library/debian:bookworm-slim"


def missing() -> list[str]:
    """The programs that are not installed, which only root can use."""
    return [name for name in PACKAGES if shutil.which(name) is None]


class Builder:
    """Images and containers in `folder`, which ends with the block; no daemon, no network of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def buildah(self, *arguments: str | Path) -> str:
        """What buildah printed; CalledProcessError when it fails, its output is shown."""
        places = ("--root", self.folder / "images", "--runroot", self.folder / "run")
        done = subprocess.run(
            ["buildah", *places, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout

    def __enter__(self) -> Builder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The storage mounts its folder onto itself.
        place = self.folder / "images" / "overlay"
        subprocess.run(["umount", "--recursive", place], capture_output=True, check=False)
        shutil.rmtree(self.folder)

    def make_base(self) -> None:
        """The base image, from Debian's packages."""
        system = self.folder / "system"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "bookworm", system], check=True, stdout=subprocess.DEVNULL
        )
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, system, "/")
        self.buildah("commit", "--quiet", "--rm", container, BASE)
        shutil.rmtree(system)

    def build(self, target: str) -> str:
        """The name of the image of a target of docker/Dockerfile."""
        name = f"cascade:{target}"
        settings = self.folder / "pip.conf"
        certificates = os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt")
        settings.write_text("[global]\ncert = /lent/certificates\n")
        lent = {
            certificates: "/lent/certificates",
            settings: "/etc/pip.conf",
            self.torch_index(): "/lent/torch",
        }
        self.buildah(
            *("build", "--format", "docker", "--isolation", "chroot", "--network", "host"),
            *("--pull-never", "--layers=false", "--file", "docker/Dockerfile"),
            *("--target", target, "--tag", name, "--build-arg", "TORCH_INDEX=file:///lent/torch"),
            *(f"--volume={here}:{there}:ro" for here, there in lent.items()),
            ".",
        )
        return name

    def torch_index(self) -> Path:
        """A package index with nothing but the torch that this machine's pip finds."""
        folder = self.folder / "index"
        pinned = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert pinned is not None
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", folder / "torch", pinned[0]], check=True)
        (wheel,) = (folder / "torch").glob("*.whl")
        link = f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>\n'
        (folder / "torch" / "index.html").write_text(link)
        return folder

    def run(self, image: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a new container of the image, as the image's user."""
        container = self.buildah("from", "--pull-never", image).strip()
        places = ("--root", self.folder / "images", "--runroot", self.folder / "run")
        try:
            return subprocess.run(
                ["buildah", *places, "run", "--isolation", "chroot", container, "--", *command],
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            self.buildah("rm", container)
