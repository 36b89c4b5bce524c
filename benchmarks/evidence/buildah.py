"""Container images without a Docker engine: Debian's buildah, over bases that debootstrap makes.

Images, containers and what a build needs for a while lie in one directory: deleting it leaves nothing behind. `chroot` isolation
and the `vfs` driver ask no feature of the kernel, but root; vfs keeps every layer as a whole copy of the file system.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.emulated import Emulation
from targets.errors import DeviceError, TargetError

TOOLS = ("buildah", "debootstrap")
DEBIAN = "bookworm"
UNNEEDED = ("usr/share/man", "usr/share/info", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists")
LAST_LINES = 15
TIMEOUT_S = 3600.0

Volumes = Mapping[Path, str]  # what is here -> where a container sees it, never to be written


@dataclass(frozen=True)
class Ended:
    """A command inside a container."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def answer(self) -> Any:
        """The JSON document that is its whole stdout; None where it is none."""
        try:
            return json.loads(self.stdout)
        except ValueError:
            return None


@dataclass(frozen=True)
class Container:
    """A container to run commands in, as the user of its image; what one writes the next one reads."""

    name: str
    builder: Buildah
    config: Mapping[str, Any]  # of the image: User, Entrypoint, Labels

    def run(
        self, argv: Sequence[str], volumes: Volumes, *, user: str = "", emulation: Emulation | None = None
    ) -> Ended:
        """The command as it is, `buildah run` knows no entrypoint; `user` "": the image's."""
        options = [f"--volume={path.resolve()}:{place}:ro" for path, place in volumes.items()]
        options += [f"--env={name}={value}" for name, value in (emulation.environment if emulation else {}).items()]
        options += [f"--user={user}"] if user else []
        done = self.builder.call(["run", *options, self.name, "--", *argv], emulation.wrapper if emulation else ())
        return Ended(done.returncode, done.stdout, done.stderr)

    def size_bytes(self) -> int:
        """Of all plain files in it, a file with several names once."""
        sizes = {}
        root = self.builder.must(["mount", self.name]).strip()
        for folder, _, names in os.walk(root):
            for name in names:
                status = (Path(folder) / name).lstat()
                sizes[status.st_ino] = status.st_size
        self.builder.must(["umount", self.name])
        return sum(sizes.values())


@dataclass(frozen=True)
class Buildah:
    """buildah with a storage of its own under `directory`."""

    directory: Path

    def __post_init__(self) -> None:
        (self.directory / "tmp").mkdir(parents=True, exist_ok=True)

    def call(self, argv: Sequence[str], wrapper: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """`buildah ARGV` to its end, as the last words of the command `wrapper`."""
        command = [*wrapper, "buildah", "--storage-driver=vfs", f"--root={self.directory / 'storage'}"]
        command += [f"--runroot={self.directory / 'run'}", *argv]
        environment = os.environ | {"BUILDAH_ISOLATION": "chroot", "TMPDIR": str(self.directory / "tmp")}
        return _run(command, environment)

    def must(self, argv: Sequence[str]) -> str:
        """stdout of `buildah ARGV`; DeviceError with its last lines where it fails."""
        done = self.call(argv)
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:])
            raise DeviceError(f"buildah {argv[0]} ended with {done.returncode}:\n{said}")
        return done.stdout

    def has(self, image: str) -> bool:
        return self.call(["inspect", "--type=image", image]).returncode == 0

    def import_root(self, root: Path, image: str, arch: str) -> None:
        """The directory as an image of one layer."""
        with self._working(f"--arch={arch}", "scratch") as name:
            self.must(["add", "--quiet", name, str(root), "/"])
            self.must(["config", f"--arch={arch}", "--os=linux", "--env=PATH=/usr/local/bin:/usr/bin:/bin", name])
            self.must(["commit", "--quiet", name, image])

    def debian(self, image: str, packages: Sequence[str]) -> None:
        """A minimal Debian for this machine; packages in Debian's names."""
        root = self.directory / "root"
        shutil.rmtree(root, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", DEBIAN, str(root)]
        done = _run(command, os.environ)
        if done.returncode:
            raise DeviceError(f"debootstrap ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
        for folder in UNNEEDED:
            shutil.rmtree(root / folder, ignore_errors=True)
        self.import_root(root, image, native_arch())
        shutil.rmtree(root)

    def install(self, base: str, image: str, packages: Sequence[str]) -> None:
        """`base` with more of Debian's packages."""
        script = f"apt-get update -qq && apt-get install -y -qq --no-install-recommends {' '.join(packages)}"
        script += " && rm -rf /var/cache/apt/archives /var/lib/apt/lists"
        with self._working("--pull-never", base) as name:
            self.must(["run", "--env=DEBIAN_FRONTEND=noninteractive", name, "--", "sh", "-c", script])
            self.must(["commit", "--quiet", name, image])

    def build(
        self,
        dockerfile: Path,
        image: str,
        *,
        arch: str,
        arguments: Mapping[str, str],
        secrets: Mapping[str, Path],
    ) -> None:
        """`docker build` over local bases, the context being the repository's root.

        Without --platform, under which buildah 1.28 looks for every base, the first stage's too, in that architecture.
        """
        argv = ["build", "--pull-never", f"--build-arg=TARGETARCH={arch}", f"--file={dockerfile}", f"--tag={image}"]
        argv += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        argv += [f"--secret=id={name},src={path}" for name, path in secrets.items()]
        self.must([*argv, str(dockerfile.parents[1])])

    @contextmanager
    def container(self, image: str) -> Iterator[Container]:
        with self._working("--pull-never", image) as name:
            config = json.loads(self.must(["inspect", "--type=image", image]))["OCIv1"]["config"]
            yield Container(name, self, config)

    @contextmanager
    def _working(self, *source: str) -> Iterator[str]:
        name = self.must(["from", *source]).strip()
        try:
            yield name
        finally:
            self.call(["rm", name])

    def remove(self, image: str) -> None:
        """The image, if there is one, and what is left of those that were replaced."""
        self.call(["rmi", "--force", image])
        self.call(["rmi", "--prune"])


def require_tools() -> None:
    """Raises TargetError where this machine cannot build, with what it lacks."""
    lacking = [name for name in TOOLS if shutil.which(name) is None]
    lacking += [] if os.geteuid() == 0 else ["root's rights"]
    if lacking:
        raise TargetError(
            f"images cannot be built here without an engine: {' and '.join(lacking)} missing. "
            "On Debian: apt-get install buildah debootstrap, then the same command as root."
        )


def native_arch() -> str:
    """This machine's architecture as images name it."""
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def _run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{command[0]} did not end within {TIMEOUT_S:g} s. Is the network there?") from None
