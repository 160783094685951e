"""What `largebatch submit` writes, and what it refuses before anything is written.

The scripts are held against those in snapshots/; after a change that is meant, look at
`git diff` of:  RENEW_SNAPSHOTS=1 python -m pytest tests/launch/test_submit.py
"""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.common.errors import ConfigError
from largebatch.conf.cluster_config import ClusterConfig, SettingsConfig, SubmitConfig
from largebatch.launch.jobs.cluster import check_queue, doubts
from largebatch.launch.jobs.job import Job, quoted
from largebatch.launch.jobs.script import script
from largebatch.launch.jobs.submit import completed, composed, main
from largebatch.launch.sweeps.checks import checked, cluster_of
from largebatch.launch.sweeps.slices import start_script

SNAPSHOTS = Path(__file__).parent / "snapshots"
BIN = Path(sys.executable).parent
AURORA = ["cluster=aurora", "cluster.account=project", "cluster.walltime=00:30:00"]
POLARIS = ["cluster=polaris", "cluster.account=project", "cluster.walltime=01:00:00"]
TRAIN = ["train", "optim=lamb", "batch.size=24576"]

JOBS = {
    "aurora-1": ([*AURORA, "cluster.queue=debug"], TRAIN),
    "aurora-8": ([*AURORA, "cluster.queue=debug-scaling", "cluster.nodes=8"], TRAIN),
    "aurora-256": ([*AURORA, "cluster.queue=debug-scaling", "cluster.nodes=256"], TRAIN),
    "aurora-2048": ([*AURORA, "cluster.queue=prod", "cluster.nodes=2048"], TRAIN),
    "aurora-10624": (
        [*AURORA, "cluster.queue=prod", "cluster.nodes=10624", "cluster.preflight=fast"],
        ["train", "optim=lamb", "batch.size=127488"],
    ),
    "aurora-all-options": (
        [
            *AURORA, "cluster.queue=prod", "cluster.nodes=300", "cluster.spares=4", "name=all",
            "cluster.chain=3", "cluster.watch_timeout=900", "cluster.restarts=5",
            "cluster.preflight=full",
            "cluster.environment=copper", "cluster.daos=pool:box", "cluster.node.ranks=6",
            "cluster.daos_intercept=true", "cluster.place=scatter:group=tier0",
            "cluster.allreduce=direct:0-1048576;rabenseifner:1048577-max",
            "cluster.launcher_options=[--rlimit,NOFILE]",
            "cluster.settings.scale.export.PALS_PING_PERIOD=null",
            "+cluster.settings.mine={export:{MY_PATH:'$HOME/it is \"mine\"'},source:me}",
        ],
        [*TRAIN, "checkpoint.every_samples=1e6", "hydra.run.dir=runs/mine", "optim.lr='0.02'"],
    ),
    "aurora-spread": (
        [*AURORA, "cluster.queue=prod", "cluster.nodes=1024", "cluster.environment=spread",
         "cluster.archive=env.tar.gz"],
        TRAIN,
    ),
    "aurora-sweep": (
        [*AURORA, "cluster.queue=debug-scaling", "cluster.nodes=8",
         "cluster.launcher_options=[--no-vni]", "cluster.settings.oneccl.export.CCL_OP_SYNC=0"],
        ["sweep", "optim=lamb,lars", "batch.size=256,512", "hydra/launcher=parsl"],
    ),
    "sunspot-2": (
        ["cluster=sunspot", "cluster.account=p", "cluster.walltime=3600", "cluster.queue=workq",
         "cluster.nodes=2"],
        TRAIN,
    ),
    "polaris-10": ([*POLARIS, "cluster.queue=prod", "cluster.nodes=10"], TRAIN),
    "slurm-4": (
        ["cluster=slurm", "cluster.walltime=12:00:00", "cluster.nodes=4", "cluster.node.ranks=4",
         "cluster.directives=['--gpus-per-node=4']", "cluster.spares=1",
         "cluster.node.domains=[{cores:0-31},{cores:32-63}]"],
        TRAIN,
    ),
    "local-mpich": (["cluster=local"], TRAIN),
    "local-torchrun": (["cluster=local", "cluster.launcher=torchrun"], TRAIN),
}  # fmt: skip


def written(asked: list[str], words: list[str]) -> str:
    told = [*asked, "folder=jobs/snapshot", "--", *words]
    config = composed(told[: told.index("--")])
    check_queue(config.cluster)
    ran, record = completed(config, words, told[: told.index("--")])
    return plain(script(Job(config, ran, record, told)))


def plain(text: str) -> str:
    """Of a script: this environment's programs by their names."""
    return text.replace(f"{Path(sys.executable).parent}/", "")


@pytest.mark.parametrize("name", JOBS)
def test_a_script_is_bash_and_the_one_that_was_looked_at(name: str, tmp_path: Path) -> None:
    text = written(*JOBS[name])
    path = tmp_path / "job.sh"
    path.write_text(text)
    for check in (["bash", "-n"], [str(BIN / "shellcheck"), "--shell=bash"]):
        done = subprocess.run([*check, str(path)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    snapshot = SNAPSHOTS / f"{name}.sh"
    if os.environ.get("RENEW_SNAPSHOTS"):
        snapshot.write_text(text)
    assert text == snapshot.read_text()


def test_every_snapshot_is_one_of_these() -> None:
    assert {path.stem for path in SNAPSHOTS.iterdir()} == set(JOBS)


def test_words_reach_the_command_as_they_were_given(tmp_path: Path) -> None:
    strange = ["a b", "it's", '"x"', "$HOME", "`id`", "back\\slash", "*", "two\nlines", "-"]
    text = written(["cluster=local"], ["train", *strange])
    command = text[text.index("command=(") : text.index(")\n", text.index("command=(")) + 2]
    (tmp_path / "look.sh").write_text(command + "printf '%s\\0' \"${command[@]}\"")
    done = subprocess.run(["bash", str(tmp_path / "look.sh")], capture_output=True, text=True)
    assert done.stdout.split("\0")[:-2] == ["python", "-m", "largebatch", "train", *strange]
    # A line's end would end the comment, and the rest would run.
    assert not [line for line in text.splitlines() if line.startswith("lines")][1:]


STRANGE = [
    "plain", "with 'one' and \"two\"", "a`b`", "back\\slash", "", "$(echo ran)", "$((1+1))",
    "$[1+1]", "${X:-$(echo ran)}", "${!X}", "${#X}", "$$", "$1", "$@", "$?", "$",
    "\\$(echo ran)", "\\\\$(echo ran)", '"; echo ran; "', "two\nlines", "a\n$(echo ran)\n", "!!",
    "données $(echo ran)", "$é",
]  # fmt: skip


@pytest.mark.parametrize("value", STRANGE)
def test_a_value_is_one_word_of_the_shell(value: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"printf '%s|' {quoted(value)}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{value}|"


def test_plain_variables_are_expanded_in_a_value_and_nothing_in_them() -> None:
    text = f"printf '%s|' {quoted('$X/${X}y$(echo ran)')}"
    done = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=True,
        env=os.environ | {"X": "$(echo ran) `id`"},
    )  # fmt: skip
    assert done.stdout == "$(echo ran) `id`/$(echo ran) `id`y$(echo ran)|"


@cache
def local_job() -> SubmitConfig:
    return composed(["cluster=local", "folder=jobs/own"])


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=6)
)
def test_any_words_reach_the_command_as_they_were_given(words: list[str]) -> None:
    config = local_job()
    text = script(Job(config, *completed(config, ["train", *words]), words))
    begin = text.index("\ncommand=(") + 1
    command = text[begin : text.index("\n)\n", begin) + 3]
    done = subprocess.run(
        ["bash"], input=f"{command}printf '%s\\0' \"${{command[@]}}\"".encode(),
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.decode().split("\0")[4 : 4 + len(words)] == words


NOT_PLAIN = ["a\nrm -rf x", "a;b", "a b", "$(id)", "`id`", "a'b", "-o", "", "a|b", "a>b", "a\r"]
PLAIN = (
    "queue", "account", "place", "daos_filesystem", "hsn_suffix", "filesystems", "modules",
)  # fmt: skip


@pytest.mark.parametrize("key", PLAIN)
def test_a_plain_name_is_refused_where_it_is_none(key: str) -> None:
    for value in NOT_PLAIN:
        told: Any = {"filesystems": [value], "modules": [f"{value}/ 1"]}.get(key, value)
        with pytest.raises(ConfigError, match=f"cluster.{key} must be a plain name"):
            ClusterConfig(name="x", **{key: told})


def test_names_of_a_cluster_and_of_its_settings_stay_in_their_comments() -> None:
    config = composed(["cluster=local", "folder=jobs/own"])
    text = script(Job(config, *completed(config, TRAIN), TRAIN))
    config.cluster.name = "local\necho ran"
    config.cluster.settings = {"a\necho ran": SettingsConfig(source="b\necho ran")}
    strange = script(Job(config, *completed(config, TRAIN), TRAIN))
    assert strange.count("\n") == text.count("\n") + 2  # an empty line and a comment
    assert [line for line in strange.splitlines() if line.startswith("echo ran")] == []


@pytest.mark.parametrize("key", ["directives", "setup", "shell_options"])
def test_a_line_of_the_script_is_one_line(key: str) -> None:
    value: Any = "-l\necho ran"
    with pytest.raises(ConfigError, match=f"cluster.{key} must be lines of text"):
        ClusterConfig(name="x", **{key: value if key == "shell_options" else [value]})


@pytest.mark.parametrize("folder", ["a$(id)", "a`id`", "a;b", "a\nb", "-p", "a'b", 'a"b', "a|b"])
def test_a_jobs_folder_is_a_plain_path(folder: str) -> None:
    with pytest.raises(ConfigError, match="folder must have no spaces and no signs of the shell"):
        SubmitConfig(folder=folder)
    assert SubmitConfig(folder="jobs/données=1").folder == "jobs/données=1"


def test_without_an_environment_of_its_own_a_job_has_that_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(*asked: str) -> list[str]:
        config = composed([*asked, "folder=jobs/own"])
        text = script(Job(config, *completed(config, TRAIN), asked))
        return re.findall(r"^ *(\S*(?:python\S*|mpiexec)) ", text, re.MULTILINE)

    own = Path(sys.executable)
    (tmp_path / "mpiexec").write_text("#!/bin/sh\n")
    (tmp_path / "mpiexec").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(commands("cluster=local")) == {str(own), "mpiexec"}
    assert set(commands("cluster=local", "cluster.launcher=torchrun")) == {str(own)}
    assert set(commands("cluster=local", "cluster.venv=theirs")) == {"python", "mpiexec"}
    monkeypatch.setenv("PATH", "/nowhere")
    assert set(commands("cluster=local")) == {str(own), str(own.with_name("mpiexec"))}


REFUSED = [
    # Limits as ALCF's page on running jobs has them.
    ("debug cluster.nodes=3", "takes 1 to 2 nodes, got 3; debug-scaling, capacity would take"),
    ("debug cluster.nodes=2 cluster.spares=1", "takes 1 to 2 nodes, got 3 with the spares"),
    ("capacity cluster.nodes=17", "takes 1 to 16 nodes, got 17; debug-scaling would take them"),
    ("prod cluster.nodes=255", "prod takes 256 to 10624 nodes, got 255; debug-scaling would"),
    ("prod cluster.nodes=10625", "got 10625; no queue here takes them"),
    ("prod cluster.nodes=1024 cluster.walltime=12:00:01", "1024 nodes 00:05:00 to 12:00:00, got"),
    ("prod cluster.nodes=1025 cluster.walltime=18:00:01", "1025 nodes 00:05:00 to 18:00:00, got"),
    ("debug cluster.walltime=00:04:59", "00:05:00 to 01:00:00, got cluster.walltime=00:04:59"),
    ("debug cluster.walltime=30min", "walltime must be HH:MM:SS, such as 00:30:00, got '30min'"),
    ("debug cluster.chain=2", "queue debug holds 1 of your jobs, and cluster.chain=2 would put 2"),
    ("debug cluster.nodes=0", "cluster.nodes must be a whole number of at least 1"),
    ("debug cluster.allreduce=2d", "cluster.allreduce must be default, one of direct, "),
    (
        "debug cluster.allreduce=direct cluster.settings.oneccl.export.CCL_ATL_TRANSPORT=ofi",
        "needs CCL_ATL_TRANSPORT=mpi, got 'ofi'",
    ),
    ("debug cluster.environment=conda", "must be one of venv, spread, copper, got 'conda'"),
    ("debug cluster.environment=spread", "name it with cluster.archive="),
    ("debug cluster.daos=pool", "cluster.daos must be POOL:CONTAINER, got 'pool'"),
    ("debug cluster.daos_intercept=true", "is of a DAOS container under PALS: name it with"),
    (
        "debug cluster.filesystems=home;flare",
        "cluster.filesystems must be a list, such as cluster.filesystems=[home,flare], got 'home",
    ),
    ("debug cluster.settings=none", "cluster.settings holds keys of its own, cluster.settings.NAM"),
    ("debug cluster.account=[a]", "cluster.account must be one value, got the list ['a']"),
    ("debug cluster.preflight=quick", "must be one of null, fast, full, got 'quick'"),
    ("debug cluster.node.bind='0-3:4-7' cluster.node.ranks=2", "rank 0 and the operating system"),
    ("debug cluster.node.rank=2", "cluster.node.rank"),
    ("debug +cluster.settings.mine={export:{A-B:1},source:me}", "variables by name, got 'A-B'"),
    ("debug name=two.words.too.long", "name must be a letter and up to 14 letters"),
    ("debug folder=' two words'", "folder must have no spaces"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "sentence"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_run_is_refused_in_a_sentence(
    asked: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    queue, *words = asked.split(" ", 1)
    words = re.split(r" (?=cluster|name|folder)", words[0]) if words else []
    told = [*AURORA, f"cluster.queue={queue}", *words, "--dry-run", "--", *TRAIN]
    assert main(told) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.startswith("largebatch: ")
    assert printed.err.count("\n") == 1


def test_a_queue_or_module_that_the_table_lacks_is_doubted_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubted(*asked: str) -> list[str]:
        cluster = composed([*AURORA, "folder=x", *asked]).cluster
        check_queue(cluster)
        return [*doubts(cluster)]

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    nowhere = doubted("cluster.queue=next-eval", "cluster.modules=[frameworks/2027.0]")
    assert [doubt.partition(" (known")[0] for doubt in nowhere] == [
        "cluster.queue=next-eval is none of debug, debug-scaling, capacity, prod (ALCF's user "
        "guide of 2026-08-19), so its limits are not checked; `qstat -Q` shows which there are on "
        "a login node",
        "cluster.modules names frameworks/2027.0: `module avail frameworks` shows which there are "
        "on a login node",
    ]
    assert doubted("cluster.queue=debug") == []
    for name, says in {
        "qstat": "Queue    Max   Tot Ena Str\n-------- ----- --- --- ---\nnext-eval  0  7 yes",
        "module": "/opt/modulefiles:\nframeworks/2026.1.0(default)\n",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}' >&{1 + (name == 'module')}\n")
        (tmp_path / name).chmod(0o755)
    queue, module = doubted("cluster.queue=next-eval")
    assert "`qstat -Q` shows next-eval" in queue
    assert (
        "names frameworks/2025.3.1: `module avail frameworks` shows frameworks/2026.1.0" in module
    )
    assert doubted("cluster.queue=debug", "cluster.modules=[frameworks/2026.1.0]") == []
    (bare,) = doubted("cluster.queue=debug", "cluster.modules=[frameworks]")
    assert "names frameworks, which may load nothing, or another version later" in bare


def test_an_environment_that_thousands_of_ranks_would_share_is_doubted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(*asked: str) -> str:
        ends = ["cluster.queue=debug-scaling", *asked, "--dry-run", "--", "sweep"]
        assert main([*AURORA, *ends, "hydra/launcher=parsl"]) == 0
        return capsys.readouterr().err

    assert told("cluster.nodes=255") == ""
    assert told("cluster.nodes=256") == (
        "largebatch: warning: 3,072 ranks read the environment's files from one file system "
        "($HOME/largebatch-env), which may not bear it: give each node its own (largebatch env "
        "pack env.tar.gz, then cluster.environment=spread cluster.archive=env.tar.gz, or "
        "cluster.environment=copper)\n"
    )
    assert told("cluster.nodes=256", "cluster.environment=copper") == ""
    assert told("cluster.nodes=256", "cluster.venv=/tmp/env") == ""


def test_trials_of_a_job_have_the_cluster_that_the_job_was_given(tmp_path: Path) -> None:
    asked = [
        *AURORA, "cluster.queue=capacity", "cluster.nodes=4", "cluster.spares=1", "folder=x",
        "cluster.launcher_options=[--no-vni]", "cluster.settings.oneccl.export.CCL_OP_SYNC=0",
        "cluster.allreduce=direct:0-1024;ring:1025-max",
        "+cluster.settings.it={export:{IT:\"a b\"}}",
    ]  # fmt: skip
    sweep = ["sweep", "hydra/launcher=parsl", "hydra.launcher.overrides=['cluster.node.ranks=6']"]
    words, _ = completed(composed(asked), sweep, asked)
    (handed,) = [word for word in words if word.startswith("hydra.launcher.overrides=")]
    overrides = OverridesParser.create().parse_override(handed).value()
    settings = checked({"cluster": "aurora", "overrides": [*map(str, overrides)]})
    cluster = cluster_of(settings)
    assert cluster is not None
    (tmp_path / "nodes").write_text("x1\n")
    text = start_script(cluster, tmp_path / "nodes", "true")
    assert "mpiexec --envall -n 6 --ppn 6" in text
    for line in (
        "  --no-vni\n", 'export CCL_OP_SYNC="0"', 'SCALEOUT="direct:0-1024;ring:1025-max"',
        'export IT="a b"\n',
    ):  # fmt: skip
        assert line in text


DEBUG = [*AURORA, "cluster.queue=debug"]
CHAIN = [*AURORA, "cluster.queue=capacity", "cluster.chain=2"]
COMMANDS = [
    (["cluster=local"], [], "what the job is to run, train or sweep and its words, got nothing"),
    (["cluster=local"], ["report", "x"], "train or sweep and its words, got report x"),
    (["cluster=local"], ["train", "engine.nproc=2"], "the job's launcher starts 2: leave it out"),
    (["cluster=local"], ["train", "-m", "optim.lr=1,2"], "are for one: use -- sweep …"),
    (["cluster=local"], ["train", "optim.lr=1,2", "--multi"], "are for one: use -- sweep …"),
    (["cluster=local"], ["train", "hydra.mode=MULTIRUN"], "are for one: use -- sweep …"),
    (DEBUG, ["train", "batch.size=100"], "100 is not divisible by 12"),  # ranks
    (DEBUG, ["train", "batch.size=1200", "optim.lrr=1"], "optim.lrr"),
    (DEBUG, ["train", "batch.size=1200", "lr.warmup_samples=1e9", "lr=cosine"], "warmup"),
    (DEBUG, ["train", "hydra.run.dir=runs/${now:%Y}"], "hydra.run.dir must be a plain path"),
    (CHAIN, ["train", "batch.size=1200"], "there are none: give checkpoint.every_samples"),
    (CHAIN, ["sweep", "batch.size=12,24"], "there are none: give checkpoint.every_samples"),
    ([*DEBUG, "cluster.restarts=1"], ["train"], "cluster.restarts=1 resumes from checkpoints"),
    ([*DEBUG, "cluster.restarts=1"], ["sweep"], "is for a run; a sweep starts its trials again"),
    (["cluster=slurm", "cluster.walltime=60", "cluster.nodes=2"], ["sweep"], "launcher=parsl"),
    (["cluster=local", "cluster.chain=2"], ["train"], "need a scheduler, which local has not"),
    (["cluster=local", "cluster.nodes=2", "cluster.launcher=torchrun"], ["train"], "on one node"),
    ([*POLARIS, "cluster.queue=debug", "cluster.allreduce=ring"], ["train"], "collectives=nccl"),
    (["cluster=aurora"], ["train"], "queue and cluster.account and cluster.walltime must be given"),
    (["cluster=slurm"], ["train"], "cluster.walltime must be given"),
    (["cluster=auroara"], ["train"], "cluster must be one of aurora, local, polaris, slurm"),
    ([], ["train"], "You must specify 'cluster'"),
    (["cluster=local", "train"], [], "'train' is no KEY=VALUE; what the job is to run"),
    (["cluster=local", "--config-dir", "nowhere"], ["train"], "must be a folder, got 'nowhere'"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "words", "sentence"), COMMANDS)
def test_a_command_that_a_job_cannot_run_is_refused_in_a_sentence(
    asked: list[str], words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*asked, "--dry-run", "--", *words]) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err
    assert printed.err.count("\n") == 1


def test_a_dry_run_prints_the_script_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["cluster=local", "folder=jobs/dry", "--", "train", "batch.size=256"]
    assert main(["--dry-run", *asked]) == 0
    assert plain(capsys.readouterr().out) == written(["cluster=local"], asked[3:]).replace(
        "jobs/snapshot", "jobs/dry"
    )
    assert list(tmp_path.iterdir()) == []


def test_without_pbs_a_job_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*DEBUG, "--", "train", "batch.size=1200"]) == 2
    assert "qsub is not here: submit from a login node of aurora" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_the_user_has_given_is_not_given_again() -> None:
    config = composed(CHAIN)
    words = ["train", "hydra.run.dir=mine", "checkpoint.every_samples=1e3", "resume=auto"]
    assert completed(config, words) == (words, "mine")
    study = ["sweep", "study=digits"]
    assert completed(config, study) == (
        [*study, f"hydra.sweep.dir={config.folder}/sweep"],
        f"{config.folder}/sweep",
    )


def test_every_job_of_the_docs_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "aurora.md").read_text(encoding="utf-8")
    lines = text.replace("\\\n", " ").splitlines()
    jobs = [line.split()[2:] for line in lines if line.startswith("largebatch submit cluster=")]
    assert len(jobs) == 3
    for told in jobs:
        assert main(["--dry-run", *told]) == 0, capsys.readouterr().err
