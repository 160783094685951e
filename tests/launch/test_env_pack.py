"""A packed environment runs from wherever it is unpacked, and says what it holds."""

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import env_small
import pytest

from largebatch.launch.environments.archive import NAME, EnvError, Manifest, ManifestEntry
from largebatch.launch.environments.command import main
from largebatch.launch.environments.pack import pack, site_packages
from largebatch.launch.environments.unpack import Damaged, check_ours, is_there, manifest_of, unpack

SUFFIXES = [".tar.gz", *([".tar.zst"] if shutil.which("zstd") else [])]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    env_small.make(tmp_path / "made")
    return tmp_path / "made"


def packed(prefix: Path, suffix: str = ".tar.gz") -> Path:
    archive = prefix.parent / f"small{suffix}"
    pack(prefix, archive)
    return archive


def unpacked(archive: Path, target: Path) -> Path:
    with archive.open("rb") as source:
        unpack(source, archive.name.endswith(".zst"), target)
    return target


def say(*command: str | Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_packed_runs_from_another_place_after_the_first_is_gone(
    suffix: str, prefix: Path, tmp_path: Path
) -> None:
    archive = packed(prefix, suffix)
    before = (prefix / "lib").resolve()
    shutil.rmtree(prefix)
    there = unpacked(archive, tmp_path / "moved here" / "env")
    inside = there / before.relative_to(prefix.resolve()) / site_packages(there).parent.name
    expected = f"{inside}/site-packages/pebble/__init__.py {there}"
    assert say(there / "bin" / "pebble") == expected
    assert say(there / "bin" / "python", "-c", "import pebble; pebble.main()") == expected
    code = "import gravel; print(gravel.__file__)"
    assert say(there / "bin" / "python", "-c", code) == f"{inside}/site-packages/more/gravel.py"
    activated = f". '{there}/bin/activate'; echo $VIRTUAL_ENV; pebble"
    assert say("bash", "-c", activated).splitlines() == [str(there), expected]
    weights = inside / "site-packages" / "pebble" / "same.bin"
    assert weights.read_bytes() == env_small.noise(env_small.LARGE)


def test_nothing_of_the_first_place_is_named_in_what_runs(prefix: Path, tmp_path: Path) -> None:
    there = unpacked(packed(prefix), tmp_path / "there")
    named = [
        path.name
        for path in there.rglob("*")
        if path.is_file()
        and path.name not in (NAME, "pyvenv.cfg")
        and str(prefix).encode() in path.read_bytes()
    ]
    assert named == []


def test_the_manifest_has_every_file_with_its_size_and_hash(prefix: Path, tmp_path: Path) -> None:
    archive = packed(prefix)
    there = unpacked(archive, tmp_path / "there")
    found = env_small.listing(there)
    del found[NAME]
    manifest = manifest_of(archive, False)
    assert {
        e.path: (e.kind, e.mode if e.kind == "file" else 0, e.sha256 or e.target)
        for e in manifest.entries
    } == found
    assert manifest.versions == {"pebble": "1.5"}
    files = [there / name for name, (kind, _, _) in found.items() if kind == "file"]
    assert manifest.num_bytes == sum(path.stat().st_size for path in files)
    assert Manifest.from_bytes((there / NAME).read_bytes(), "").total == manifest.total


def test_the_hash_is_of_the_contents_not_of_the_time_of_packing(prefix: Path) -> None:
    first = manifest_of(packed(prefix), False).total
    assert manifest_of(packed(prefix), False).total == first
    weights = site_packages(prefix) / "pebble" / "weights.bin"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    assert manifest_of(packed(prefix), False).total != first


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_that_is_cut_off_or_changed_leaves_nothing_behind(
    suffix: str, prefix: Path, tmp_path: Path
) -> None:
    archive = packed(prefix, suffix)
    whole = archive.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    for damaged in (bytes(flipped), whole[: len(whole) * 2 // 3], whole[:-9]):
        archive.write_bytes(damaged)
        with pytest.raises((Damaged, OSError)):
            unpacked(archive, tmp_path / "there" / "env")
        assert list((tmp_path / "there").iterdir()) == []


def test_a_file_that_is_not_the_manifests_is_named(prefix: Path, tmp_path: Path) -> None:
    archive = packed(prefix)
    plain = tmp_path / "plain.tar"
    with tarfile.open(archive) as packed_tar, tarfile.open(plain, "w") as tar:
        for member in packed_tar.getmembers():
            contents = packed_tar.extractfile(member) if member.isfile() else None
            if member.name.endswith("gravel.py"):
                # One letter, and the checksums of tar and gzip are right again.
                (tmp_path / "gravel").write_text("NAME = 'gravil'\n", encoding="utf-8")
                tar.add(tmp_path / "gravel", member.name)
            else:
                tar.addfile(member, contents)
    subprocess.run(["gzip", "-f", str(plain)], check=True)
    with pytest.raises(Damaged, match=r"more/gravel\.py has arrived with another hash"):
        unpacked(tmp_path / "plain.tar.gz", tmp_path / "there" / "env")


def test_the_same_environment_is_known_again_and_another_is_not_overwritten(
    prefix: Path, tmp_path: Path
) -> None:
    archive = packed(prefix)
    there = unpacked(archive, tmp_path / "there")
    total = manifest_of(archive, False).total
    assert is_there(there, total)
    assert not is_there(tmp_path / "elsewhere", total)
    with pytest.raises(FileExistsError, match="is not this environment"):
        is_there(there, "0" * 64)
    (site_packages(there) / "pebble" / "weights.bin").unlink()
    with pytest.raises(FileExistsError, match="is not this environment"):
        is_there(there, total)


def crafted(archive: Path, rows: Sequence[Any], name: str) -> Path:
    """An archive whose manifest and hashes are right, whatever it holds."""
    manifest = Manifest(name, "3.11", "/usr/bin", {}, [entry for entry, _, _ in rows])
    with tarfile.open(archive, "w:gz") as tar:
        first = tarfile.TarInfo(NAME)
        first.size = len(manifest.to_bytes())
        tar.addfile(first, io.BytesIO(manifest.to_bytes()))
        for _, info, data in rows:
            tar.addfile(info, io.BytesIO(data))
    return archive


def a_file(path: str, mode: int = 0o644) -> Any:
    data, info = b"evil", tarfile.TarInfo(path)
    info.size, info.mode = len(data), mode
    return (
        ManifestEntry(path, "file", mode, len(data), hashlib.sha256(data).hexdigest()),
        info,
        data,
    )


def a_link(path: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Any:
    info = tarfile.TarInfo(path)
    info.type, info.linkname = kind, target
    return ManifestEntry(path, "link", target=target), info, b""


def a_folder(path: str) -> Any:
    info = tarfile.TarInfo(path)
    info.type = tarfile.DIRTYPE
    return ManifestEntry(path, "folder"), info, b""


X = "../elsewhere/x"
HOSTILE = {
    "below a link": [a_link("lib", "../elsewhere"), a_file("lib/x")],
    "far below a link": [a_link("lib", "../elsewhere"), a_file("lib/a/b/x")],
    "a folder below a link": [a_link("lib", "../elsewhere"), a_folder("lib/x")],
    "a link below a link": [a_link("lib", "../elsewhere"), a_link("lib/x", "y")],
    "a folder over a link": [a_link("lib", "../elsewhere"), a_folder("lib"), a_file("lib/x")],
    "the same name": [a_link("f", X), a_file("./f")],
    "an unlike name": [a_link("f", X), a_file("a/../f")],
    "an empty part": [a_link("f", X), a_file("a//f")],
    "above": [a_file("../elsewhere/x")],
    "absolute": [a_file("/tmp/x")],
    "the manifest itself": [a_link(NAME, X)],
    "a hard link": [a_link("f", X, tarfile.LNKTYPE)],
    "a pipe": [(a_file("f")[0], a_link("f", "", tarfile.FIFOTYPE)[1], b"")],
    "another kind": [(a_file("f")[0], a_link("f", X)[1], b"")],
    "a control sequence": [a_file("\x1b[2Jf")],
}


@pytest.mark.parametrize("rows", HOSTILE.values(), ids=[*HOSTILE])
def test_nothing_is_written_outside_or_through_a_link(rows: Any, tmp_path: Path) -> None:
    elsewhere = tmp_path / "there" / "elsewhere"
    elsewhere.mkdir(parents=True)
    (elsewhere / "x").write_text("mine")
    archive = crafted(tmp_path / "small.tar.gz", rows, "env")
    with pytest.raises((Damaged, OSError)) as refusal:
        unpacked(archive, tmp_path / "there" / "env")
    assert str(refusal.value).isprintable()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["elsewhere"]
    assert [path.name for path in elsewhere.iterdir()] == ["x"]
    assert (elsewhere / "x").read_text() == "mine"


def test_modes_are_those_of_reading_writing_and_running_alone(tmp_path: Path) -> None:
    archive = crafted(tmp_path / "small.tar.gz", [a_file("bin/x", 0o6755)], "env")
    there = unpacked(archive, tmp_path / "env")
    assert stat.S_IMODE((there / "bin" / "x").stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "", "a\nb"])
def test_an_archives_name_leads_to_no_other_folder(name: str, tmp_path: Path) -> None:
    archive = crafted(tmp_path / "small.tar.gz", [a_file("f")], name)
    with pytest.raises(EnvError, match="is no name of"):
        manifest_of(archive, False)


def test_a_folder_that_another_user_could_change_is_not_taken(tmp_path: Path) -> None:
    archive = crafted(tmp_path / "small.tar.gz", [a_file("f")], "env")
    total = manifest_of(archive, False).total
    there = unpacked(archive, tmp_path / "user" / "there")
    assert is_there(there, total)
    with pytest.raises(PermissionError, match="there belongs to another user"):
        check_ours(there, os.getuid() + 1)
    for path, mode in ((there, 0o777), (there, 0o775), (there.parent, 0o777)):
        path.chmod(mode)
        with pytest.raises(PermissionError, match=rf"{path} may be written to by others"):
            is_there(there, total)
        path.chmod(0o755)
    there.parent.chmod(0o1777)  # as /tmp is
    assert is_there(there, total)
    (tmp_path / "link").symlink_to(there)
    with pytest.raises(PermissionError, match="link is no folder"):
        is_there(tmp_path / "link", total)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="open may be written to by others"):
        unpacked(archive, tmp_path / "open" / "env")
    assert list((tmp_path / "open").iterdir()) == []


def refused(prefix: Path, output: Path) -> str:
    with pytest.raises(EnvError) as refusal:
        pack(prefix, output)
    assert not output.exists()
    return str(refusal.value)


def test_what_cannot_be_moved_is_refused_by_its_name(prefix: Path, tmp_path: Path) -> None:
    site, output = site_packages(prefix), tmp_path / "out.tar.gz"
    (site / "outside.pth").write_text(f"{tmp_path}/project/src\n", encoding="utf-8")
    assert f"outside.pth points to {tmp_path}/project/src" in refused(prefix, output)
    (site / "outside.pth").unlink()

    url = {"url": f"file://{tmp_path}/project", "dir_info": {"editable": True}}
    record = site / "pebble-1.5.dist-info" / "direct_url.json"
    record.write_text(json.dumps(url), encoding="utf-8")
    said = refused(prefix, output)
    assert "pebble is installed as editable" in said
    assert f"pip install --no-deps --force-reinstall {tmp_path}/project" in said
    record.unlink()

    (site / "elsewhere").symlink_to(tmp_path)
    assert "link to a folder outside" in refused(prefix, output)
    (site / "elsewhere").unlink()
    (site / "nowhere").symlink_to(tmp_path / "none")
    assert "nowhere is no file" in refused(prefix, output)
    (site / "nowhere").unlink()

    assert "is no virtual environment" in refused(tmp_path, output)
    assert "must end in .tar.gz" in refused(prefix, tmp_path / "out.zip")
    assert "inside of the environment" in refused(prefix, prefix / "out.tar.gz")
    assert "is no folder" in refused(prefix, tmp_path / "none" / "out.tar.gz")
    pack(prefix, output)


def test_a_failed_pack_leaves_the_last_archive_as_it_was(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = packed(prefix)
    before = archive.read_bytes()

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="No space left"):
        pack(prefix, archive)
    assert archive.read_bytes() == before
    assert sorted(path.name for path in archive.parent.iterdir()) == ["made", archive.name]


def test_a_links_contents_go_in_where_it_leads_out(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "shared.txt").write_text("shared", encoding="utf-8")
    (site_packages(prefix) / "note.txt").symlink_to(tmp_path / "shared.txt")
    there = unpacked(packed(prefix), tmp_path / "there")
    copy = site_packages(there) / "note.txt"
    assert not copy.is_symlink()
    assert copy.read_text(encoding="utf-8") == "shared"


def test_the_bases_packages_go_in_where_asked_and_own_ones_win(tmp_path: Path) -> None:
    base = tmp_path / "base"
    env_small.make(base)
    for name in ("pebble", "boulder"):
        record = site_packages(base) / f"{name}-0.9.dist-info"
        record.mkdir()
        (site_packages(base) / f"{name}_old.py").write_text("AGE = 'old'\n", encoding="utf-8")
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9\n",
                                         encoding="utf-8")  # fmt: skip
        (record / "RECORD").write_text(
            f"{name}_old.py,,\n{name}-0.9.dist-info/METADATA,,\n", encoding="utf-8"
        )
    upper = tmp_path / "upper"
    site = env_small.make(upper)
    # What --system-site-packages does where the base has packages of its own.
    both = [str(site), str(site_packages(base))]
    (site / "base.pth").write_text(
        f"import site; site.getsitepackages = lambda *prefixes: {both}\n", encoding="utf-8"
    )
    code = "import site, sys; print(*site.getsitepackages(), sep=chr(10))"
    assert str(site_packages(base)) in say(upper / "bin" / "python", "-I", "-c", code)
    pack(upper, tmp_path / "out.tar.gz", with_site=True)
    there = site_packages(unpacked(tmp_path / "out.tar.gz", tmp_path / "there"))
    assert (there / "boulder_old.py").is_file()
    assert not (there / "pebble_old.py").exists()


def test_the_command_refuses_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", "--python", str(tmp_path), str(tmp_path / "a.tar.gz")]) == 2
    assert "no virtual environment" in capsys.readouterr().err
    assert main(["spread"]) == 2
    assert main(["spread", str(tmp_path / "none.tar.gz"), "--timeout", "0"]) == 2
    assert main(["spread", "--copper"]) == 0
    told = capsys.readouterr()
    assert "launch_copper.sh" in told.out
    assert "#" not in told.out  # for an interactive zsh a word like any other
    assert "Copper caches reads" in told.err
