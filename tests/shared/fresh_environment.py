"""A virtual environment with a wheel and what it declares to need, as pip would make one.

Nothing is downloaded: each distribution is a link to this environment's. What is installed here and
not declared is not to be seen there, nor is the checkout.
"""

import subprocess
import sys
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def make(folder: Path, wheel: Path, extras: Iterable[str]) -> Path:
    """Make it; returns the folder of its programs."""
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    pip = ["pip", "--python", str(programs / "python"), "install", "--quiet", "--no-deps"]
    offline = ["--no-index", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([sys.executable, "-m", *pip, *offline, str(wheel)], check=True, timeout=600)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (own,) = packages.glob(f"{wheel.name.partition('-')[0]}-*.dist-info")
    for found in needed(Distribution.at(own), extras):
        for name in top_level(found):
            link = packages / name
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(name))))
    return programs


def needed(of: Distribution, extras: Iterable[str]) -> list[Distribution]:
    """What a distribution with extras declares to need, and all that these do; without what is not
    installed here.
    """
    found: dict[str, Distribution] = {}
    own = canonicalize_name(of.metadata["Name"])
    todo = [(own, extra) for extra in ("", *extras)]
    for name, extra in todo:  # which grows
        for line in (of if name == own else found[name]).requires or ():
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
                continue
            other = canonicalize_name(wanted.name)
            if other not in (own, *found):
                try:
                    found[other] = distribution(wanted.name)
                except PackageNotFoundError:
                    continue
            asked = [(other, more) for more in ("", *wanted.extras)]
            todo += [one for one in asked if one not in todo]
    return list(found.values())


def top_level(of: Distribution) -> set[str]:
    """The files and folders that a distribution has beside those of others."""
    lines = (of.read_text("RECORD") or "").splitlines()
    names = {line.partition(",")[0].partition("/")[0] for line in lines}
    return names - {"", "..", "__pycache__"}
