"""Is this the torch that was meant, and is what it needs there?"""

from collections.abc import Iterator

from largebatch.launch.doctor.findings import Finding, error, warning
from largebatch.launch.doctor.host import MODULES, HostFacts

# A wheel of pytorch.org or PyPI says so after the plus; Aurora's says git449b176, an XPU one xpu.
_FOREIGN_TAGS = ("cpu", "cu", "rocm")


def check(facts: HostFacts) -> Iterator[Finding]:
    """What the packages of one process's environment tell."""
    yield from _torch(facts)
    for name in facts.missing_modules:
        if name != "torch":
            yield _missing(facts, name)
    for name in facts.dead_modules:
        yield warning(
            "module-dead",
            f"{name} is installed ({facts.versions.get('oneccl-bind-pt') or 'of unknown version'})",
            "it is no longer developed, and was built for one older torch; torch carries the xccl "
            "backend itself since 2.8",
            "leave it unimported; where it lies in an environment of yours (not in a module's, "
            "which is read-only), uninstall it there",
        )
    yield from _deepspeed(facts)
    for name, value in sorted(facts.environment.items()):
        if name.endswith("BACKEND") and value == "ccl":
            yield error(
                "backend-ccl",
                f"{name}=ccl",
                "the backend `ccl` belongs to oneccl_bindings_for_pytorch, which Aurora removed in "
                "September 2025: its import raises ModuleNotFoundError",
                f"set {name}=xccl (part of torch), or unset it",
            )
    yield from _hydra(facts)


def _torch(facts: HostFacts) -> Iterator[Finding]:
    version = facts.versions.get("torch")
    if version is None or "torch" in facts.missing_modules:
        yield error(
            "torch-missing",
            "there is no torch in this environment",
            "nothing trains",
            "load the site's module first (Aurora: module load frameworks), make the environment "
            "with python3 -m venv --system-site-packages, or pip install torch",
            facts.here,
        )
        return
    if not facts.expects_tiles:
        return
    if facts.torch.get("error"):
        yield error(
            "torch-broken",
            f"import torch fails: {facts.torch['error']}",
            "nothing trains",
            "load the module that this environment was made with; make the environment anew where "
            "the module has changed",
            facts.here,
        )
    elif not facts.torch.get("xpu"):
        yield _no_tiles(facts, version)


def _missing(facts: HostFacts, name: str) -> Finding:
    extra = "mpi" if name == "mpi4py" else "train"
    for_optimizers = name not in MODULES or facts.size > 1
    return Finding(
        "module-missing",
        "error" if for_optimizers else "warning",
        f"`import {name}` would fail here",
        "every command fails that needs it; train, sweep and plan need hydra and omegaconf",
        f"pip install 'largebatch[{extra}]' into this environment (on a site with a module for "
        "torch and mpi4py: one made with --system-site-packages)",
        facts.here,
    )


def _no_tiles(facts: HostFacts, version: str) -> Finding:
    tag = version.partition("+")[2]
    if not tag or tag.startswith(_FOREIGN_TAGS):
        return error(
            "torch-replaced",
            f"torch {version} cannot see XPU tiles, and its version is that of a wheel from a "
            "package index, not of the site",
            "pip or uv has put it over the site's torch (they do so in spite of pins); training "
            "would run on the CPU",
            "pip uninstall torch in this environment (made with --system-site-packages) until "
            "`python -c 'import torch; print(torch.__version__)'` shows the module's; install "
            "other packages with --no-deps or with a constraint on that version",
            facts.here,
        )
    in_job = facts.size > 1 or "PBS_JOBID" in facts.environment
    return Finding(
        "xpu-unavailable",
        "error" if in_job else "note",
        f"torch {version} is loaded and torch.xpu.is_available() is False",
        "training would run on the CPU"
        if in_job
        else "login nodes have no tiles: ask again in a job",
        "look at ONEAPI_DEVICE_SELECTOR (fall back to level_zero:gpu), ZE_AFFINITY_MASK and the "
        "module's version; leave the node out if others see their tiles",
        facts.here,
    )


def _deepspeed(facts: HostFacts) -> Iterator[Finding]:
    version = facts.versions.get("deepspeed")
    accelerator = facts.environment.get("DS_ACCELERATOR")
    if version is None or accelerator != "xpu" or _numbers(version) >= (0, 18, 7):
        return
    if facts.versions.get("intel-extension-for-pytorch") is None:
        yield error(
            "deepspeed-accelerator",
            f"DS_ACCELERATOR=xpu with deepspeed {version} and no intel_extension_for_pytorch",
            "before 0.18.7 that setting makes deepspeed import the extension, and fail",
            "unset DS_ACCELERATOR: deepspeed then finds torch.xpu by itself",
        )


def _hydra(facts: HostFacts) -> Iterator[Finding]:
    core, plugin = facts.versions.get("hydra-core"), facts.versions.get("hydra-joblib-launcher")
    if core and plugin and _numbers(core) >= (1, 4) > _numbers(plugin):
        yield error(
            "hydra-plugin-old",
            f"hydra-joblib-launcher {plugin} beside hydra-core {core}",
            "hydra-core 1.4 takes plugins from 1.4.0.dev1 on; every command that uses Hydra fails "
            "while it loads its plugins",
            "pip install 'hydra-core<1.4', or the plugin's 1.4",
        )


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")[:3]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)
