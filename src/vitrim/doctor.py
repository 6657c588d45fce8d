"""What this machine and environment offer: versions, processor features, a compiler, extras. Changes nothing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torchvision", "timm", "click", "pydantic", "rich", "accelerate", "safetensors", "huggingface_hub", "pyarrow",
)  # fmt: skip
"""The distributions that vitrim depends on."""

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "data": (("datasets",), "data sets by hf: name"),
    "track": (("tensorboard",), "training curves in TensorBoard"),
    "dev": (("pytest", "hypothesis", "ruff", "mypy"), "the tests and the linters"),
}
"""Each extra's modules, and what it is for."""

FEATURES = (
    "sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve",
)  # fmt: skip
"""Processor flags that change how fast a network runs."""


def examine() -> dict[str, Any]:
    """Everything that `vitrim doctor` prints, as plain values; nothing in it names the user, the host or a folder."""
    return {
        "vitrim": version_of("vitrim"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version_of(name) for name in PACKAGES},
        "processor": processor(),
        "accelerators": accelerators(),
        "processes": two_processes(),
        "compiler": compiler(),
        "extras": {
            name: {"found": not missing(modules), "missing": missing(modules), "for": purpose}
            for name, (modules, purpose) in EXTRAS.items()
        },
        "advice": advice(),
    }


def version_of(distribution: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def missing(modules: tuple[str, ...]) -> list[str]:
    """Those of the modules that cannot be found."""
    return [name for name in modules if find_spec(name) is None]


def processor() -> dict[str, Any]:
    """Model name, cores that this process may use, memory, and the features that matter for speed."""
    facts = cpu_facts()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_mb": memory_mb(),
        "features": [name for name in FEATURES if name in flags],
    }


def cpu_facts() -> dict[str, str]:
    """The first processor of /proc/cpuinfo as key and value; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def usable_cores() -> int:
    """Cores that the scheduler grants to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_mb() -> int | None:
    """Physical memory in megabytes; None where the system does not tell."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20


def accelerators() -> list[str]:
    """Names of the devices that torch can use beside the processor."""
    if find_spec("torch") is None:
        return []
    import torch

    found = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def two_processes() -> str:
    """What `torchrun --nproc-per-node 2 -m vitrim train` would do here."""
    if find_spec("torch") is None:
        return "none: torch is missing"
    import torch

    gpus = torch.cuda.device_count()
    start = "torchrun --standalone --nproc-per-node 2 -m vitrim train (or recover)"
    if gpus == 1:
        return f"{start} is refused, since there is one GPU; with --device cpu both share each batch, by gloo"
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return f"{start} cannot run: this torch has no gloo"
    where = f"on one GPU each, of {gpus}, by nccl" if gpus else "on the CPU, by gloo"
    return f"{start} trains one model: both share each batch, {where}; the first writes"


def compiler() -> str | None:
    """The C++ compiler that torch.compile's default backend would use; None if there is none."""
    if find_spec("torch") is None:
        return None
    from vitrim.timing import find_compiler

    found = find_compiler()
    return Path(found).name if found else None


def advice() -> list[str]:
    """What is missing, and what it would bring; empty if nothing is."""
    notes = [
        f"package {name!r} is missing; install it with `pip install {name}`."
        for name in PACKAGES
        if version_of(name) is None
    ]
    if compiler() is None:
        notes.append("no C++ compiler was found, so compiled models are not measured; everything else works.")
    for name, (modules, purpose) in EXTRAS.items():
        if missing(modules) and name != "dev":
            notes.append(f"extra {name!r} is not installed ({purpose}); add it with `pip install 'vitrim[{name}]'`.")
    return notes
