"""The doctor on recorded situations: each is named by its codes, and by no other."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import doctor_situations as situations
import pytest

from largebatch.common.errors import ConfigError
from largebatch.distributed.addresses import listen
from largebatch.distributed.ranks import Ranks
from largebatch.launch.doctor import checks
from largebatch.launch.doctor.findings import Finding, as_json, as_text, exit_code, merged
from largebatch.launch.doctor.host import Host, collect, collect_master, expects_tiles

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", situations.names())
def test_a_situation_is_named_by_its_codes_and_by_no_other(name: str, tmp_path: Path) -> None:
    told = situations.read(name)
    found = checks.of_all(situations.facts_of(name, tmp_path))
    assert sorted({finding.code for finding in found}) == sorted(told["expect"]), as_text(found)
    if "nodes_named" in told:
        assert [list(finding.nodes) for finding in found] == [told["nodes_named"]]
    if "severity" in told:
        assert [finding.severity for finding in found] == [told["severity"]]


def test_every_finding_says_what_it_means_and_what_to_do(tmp_path: Path) -> None:
    for name in situations.names():
        for finding in checks.of_all(situations.facts_of(name, tmp_path)):
            assert len(finding.found) > 15
            assert len(finding.means) > 10
            assert len(finding.do) > 10


def test_there_are_more_than_twenty_bad_situations() -> None:
    assert len(situations.names()) > 20


def codes_in_source() -> set[str]:
    """The first argument of whatever makes a finding."""
    found: set[str] = set()
    doctor = ROOT / "launch" / "doctor"
    for path in [*doctor.glob("checks*.py"), *(doctor / "preflight").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r'\b(?:Finding|error|warning|_full)\(\s*"([a-z0-9-]+)"', text))
    return found


def test_the_documentation_has_every_code_and_no_other() -> None:
    text = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z0-9-]+)`", text, re.MULTILINE)) == codes_in_source() | {
        "master-unreachable",
        "too-few-nodes",
    }


def test_ranks_that_see_the_same_are_one_finding_with_all_nodes(tmp_path: Path) -> None:
    found = checks.of_all(situations.facts_of("nofile_low", tmp_path))
    assert [finding.nodes for finding in found] == [("x4519c2s3b0n0", "x4519c2s4b0n0")]


def test_errors_come_first_and_make_the_exit_code() -> None:
    warning = Finding("a", "warning", "found", "means", "do")
    error = replace(warning, code="b", severity="error")
    assert [finding.code for finding in merged([warning, error, warning])] == ["b", "a"]
    assert (exit_code([warning]), exit_code([warning, error]), exit_code([])) == (0, 1, 0)
    assert json.loads(as_json([error], {"ranks": 3}))["findings"][0]["code"] == "b"


@pytest.mark.parametrize(
    ("environment", "node", "expected"),
    [
        ({}, "laptop", False),
        ({"PBS_JOBID": "1"}, "x3006c0s13b1n0", False),  # Polaris
        ({"PBS_JOBID": "1"}, "x1921c2s3b0n0", True),  # Sunspot
        ({"PBS_JOBID": "1"}, "x4519c2s3b0n0", True),
        ({"ZE_FLAT_DEVICE_HIERARCHY": "FLAT"}, "laptop", True),
    ],
)
def test_tiles_are_expected_where_something_says_so(
    environment: dict[str, str], node: str, expected: bool
) -> None:
    assert expects_tiles(environment, node) is expected


def test_a_launcher_that_contradicts_itself_is_a_finding_in_its_own_words(tmp_path: Path) -> None:
    def refuse() -> Ranks:
        raise ConfigError("the launcher started 24 ranks, but mpi4py sees 1")

    facts = collect(Host(environment={"PALS_RANKID": "3"}, ranks=refuse), tmp_path)
    found = checks.of_one(facts)
    assert [finding.code for finding in found] == ["ranks-refused"]
    assert "started 24 ranks" in found[0].found


WITHOUT_TORCH = """
import sys
from largebatch.cli import main
assert main(["doctor", *sys.argv[1:]]) == 0
print("torch" in sys.modules, "omegaconf" in sys.modules)
"""


def test_on_a_laptop_there_is_a_short_page_without_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("False"), "torch was imported"
    assert len(done.stdout.splitlines()) < 12


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nodes", "2"], "--hostfile-out"),
        (["--nodes", "2", "--hostfile-out", "out", "--hostfile", "none"], "none"),
        (["--nodes", "3", "--hostfile-out", "out", "--hostfile", "two"], "names 2 nodes"),
        (["--nodes", "0", "--hostfile-out", "out", "--hostfile", "two"], "at least 1"),
        (["--probe"], "--nodes N"),
        (["--timeout", "0"], "> 0"),
    ],
)
def test_a_command_that_cannot_be_done_is_refused_in_a_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from largebatch.launch.doctor.command import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PBS_NODEFILE", raising=False)
    Path("two").write_text("n0\nn1\n", encoding="utf-8")
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_port_that_rank_0_has_taken_for_its_ranks_is_not_anothers() -> None:
    with listen("127.0.0.1", 0, one_node=True) as listener:
        ranks = Ranks("mpi", 0, 2, 0, 2, "127.0.0.1", listener.getsockname()[1], listener)
        assert collect_master(ranks, Host())["master_port_free"]
        assert not collect_master(replace(ranks, listener=None), Host())["master_port_free"]
