"""What the tests of the command share: running it here, and in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from vitrim.cli import main

DEIT_S = "timm:deit_small_patch16_224"


def run(*words: str | Path, env: dict[str, str] | None = None) -> Result:
    """One command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], env=env)


def spent_by_children() -> float:
    """Processor seconds, which another program on the machine does not lengthen as it does the clock's."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fresh(code: str) -> tuple[str, float]:
    """Output of a fresh process, and the processor seconds it took (the better of two: the first may fill caches)."""
    seconds = []
    for _ in range(2):
        start = spent_by_children()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(spent_by_children() - start)
    return done.stdout, min(seconds)


RUN_AND_TELL = """
import sys
from vitrim.cli import main
try:
    main({words!r})
except SystemExit as done:
    assert not done.code, done.code
print("heavy:", sorted({{"torch", "timm", "numpy", "torchvision", "pydantic"}} & set(sys.modules)))
"""
