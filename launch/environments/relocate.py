"""What of a virtual environment names the place where it was made, and how that is taken out.

Scripts find the Python beside them; `activate` finds itself; links inside stay inside. What cannot
be moved (an editable install, a path file that points elsewhere) is refused with its name.
"""

import json
import os
import re
from pathlib import Path
from typing import Final

from largebatch.launch.environments.archive import EnvError

# Read by sh, which starts the python beside the script; to Python the first line is a string.
SHEBANG: Final = b"""#!/bin/sh
'''exec' "$(dirname -- "$(realpath -- "$0")")"/'%b' "$0" "$@"
' '''
"""
_ACTIVATE: Final = 'VIRTUAL_ENV="$(cd "$(dirname -- "${BASH_SOURCE[0]:-$0}")/.." && pwd)"'
# Other shells' scripts name the old place in ways of their own.
LEFT_OUT: Final = ("activate.csh", "activate.fish", "Activate.ps1", "activate.nu", "activate.bat")


def settings(prefix: Path) -> dict[str, str]:
    """The lines of pyvenv.cfg; EnvError where there is none."""
    path = prefix / "pyvenv.cfg"
    if not path.is_file():
        raise EnvError(
            f"{prefix} is no virtual environment (it has no pyvenv.cfg): make one with python3 -m "
            "venv --system-site-packages DIR after loading the module, and pack that; conda's "
            "own are for conda-pack"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines]
    return {name.strip().lower(): value.strip() for name, equals, value in pairs if equals}


def moved(path: Path, prefix: Path, with_site: bool = False) -> bytes | None:
    """The contents of a file that has to change to be movable; None where it stays as it is."""
    if path.parent.name == "bin" and path.parent.parent == prefix:
        return _script(path, prefix)
    if path.suffix == ".pth":
        return _path_file(path, prefix)
    if with_site and path == prefix / "pyvenv.cfg":
        text = path.read_text(encoding="utf-8")
        return re.sub(r"(?m)^(include-system-site-packages\s*=).*$", r"\1 false", text).encode()
    return None


def _script(path: Path, prefix: Path) -> bytes | None:
    if path.name == "activate":
        text = path.read_text(encoding="utf-8")
        # The first sets it; what follows, in deactivate's part, only unsets.
        changed, times = re.subn(r"(?m)^(\s*)VIRTUAL_ENV=.*$", rf"\1{_ACTIVATE}", text, count=1)
        if not times:
            raise EnvError(f"{path} sets no VIRTUAL_ENV: it is not a script of python3 -m venv")
        return changed.encode()
    with path.open("rb") as file:
        if file.read(2) != b"#!":
            return None  # a program
    text_bytes = path.read_bytes()
    first, _, rest = text_bytes.partition(b"\n")
    interpreter = first[2:].strip().split()[0].decode(errors="replace") if first[2:].strip() else ""
    # pip writes a path that is too long for the kernel as a shell line of its own.
    if interpreter == "/bin/sh" and rest.startswith(b"'''exec'"):
        line, _, rest = rest.partition(b"\n")
        interpreter = line.split()[1].decode(errors="replace").strip('"')
        rest = rest.partition(b"\n")[2]
    elif not is_inside(Path(interpreter), prefix):
        return None
    return SHEBANG % Path(interpreter).name.encode() + rest


def _path_file(path: Path, prefix: Path) -> bytes | None:
    """A .pth file with its paths relative: Python takes them as below the folder it is in. EnvError
    for a path outside of the environment.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    changed = []
    for line in lines:
        named = Path(line.strip())
        if line.startswith(("#", "import ", "import\t")) or not named.is_absolute():
            changed.append(line)
        elif is_inside(named, prefix):
            changed.append(os.path.relpath(named.resolve(), path.parent.resolve()))
        else:
            raise EnvError(
                f"{path.name} points to {named}, outside of the environment: an archive without it "
                "would not import, and one with it would read from there on every node; install "
                f"that project into the environment (pip install {named}, without -e)"
            )
    return None if changed == lines else ("\n".join(changed) + "\n").encode()


def refuse_editable(site: Path) -> None:
    """Refuse an environment with editable installs, with the command that installs them whole."""
    found = {}  # the project's address by the distribution's name
    for record in sorted(site.glob("*.dist-info/direct_url.json")):
        origin = json.loads(record.read_text(encoding="utf-8"))
        if origin.get("dir_info", {}).get("editable"):
            address = str(origin.get("url", "")).removeprefix("file://")
            found[record.parent.name.split("-")[0]] = address
    if found:
        names, projects = ", ".join(found), " ".join(found.values())
        raise EnvError(
            f"{names} {'is' if len(found) == 1 else 'are'} installed as editable, so that the code "
            f"is outside of the environment: pip install --no-deps --force-reinstall {projects}, "
            "then pack"
        )


def is_inside(path: Path, prefix: Path) -> bool:
    """By name, or with links in the folders above followed; a link's own target does not count."""
    if path.is_relative_to(prefix):
        return True
    return (path.parent.resolve() / path.name).is_relative_to(prefix.resolve())


def link_target(path: Path, prefix: Path) -> str | None:
    """Where a link in the archive is to point; None where its contents go in instead.

    The base Python's executable stays a link to where it is; nothing else outside does.
    """
    whole = Path(os.path.normpath(path.parent / path.readlink()))
    if is_inside(whole, prefix):
        return os.path.relpath(whole, path.parent)
    if path.parent == prefix / "bin" and path.name.startswith("python"):
        return str(whole)
    return None
