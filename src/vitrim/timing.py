"""Latency on a runtime and a device: interleaved, warmed up, with its spread.

Operations are not time. `measure` times several models side by side on random images; `speedups` sets what was measured
beside the ideal (the ratio of MACs). All figures name runtime, device, threads, dtype and batch size. Nothing of the
caller's is changed: thread count, training mode, device and dtype of the models, random state.
"""

import contextlib
import copy
import logging
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import processes
from vitrim.errors import MeasureError, did_you_mean, fitting_in_memory
from vitrim.model import device_named
from vitrim.progress import Progress

RUNTIMES = ("eager", "compile")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEAST_SAMPLE_S = 0.004
"""A sample shorter than this repeats the call: the clock and the scheduler are too coarse for less."""

CROWDED = 0.5
"""Processes beyond the cores at which timings suffer; background work of a desktop stays below."""

Row = dict[str, Any]


def find_compiler() -> str | None:
    """The C++ compiler that torch.compile's default backend would call, or None."""
    names = (os.environ.get("CXX") or "", "clang++" if platform.system() == "Darwin" else "g++", "cl")
    return next((found for name in names if name and (found := shutil.which(name.split()[0]))), None)


def require_compiler() -> None:
    """Raises MeasureError where the runtime `compile` has no compiler."""
    if not find_compiler():
        raise MeasureError(
            "runtime 'compile' needs a C++ compiler and none was found. Install g++, or measure with runtime 'eager'."
        )


def device_name(device: str | torch.device) -> str:
    """A name for tables: the processor's or the accelerator's model. No host name."""
    where = torch.device(device)
    if where.type == "cuda":
        return str(torch.cuda.get_device_name(where))
    if where.type != "cpu":
        return where.type
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "CPU"


def measure(
    models: Mapping[str, nn.Module],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int | None = None,
    runs: int = 20,
    warmup: int = 3,
    runtime: str = "eager",
    device: str = "cpu",
    dtype: str = "float32",
    image_shape: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Times a forward pass of each model, in turns, so that a busy moment of the machine meets all of them.

    threads: of torch on the CPU; None: as they stand.  runs: samples of each model.  image_shape: C, h, w; None: each
    model's own, as its spec says, or the first one's.  dtype: parameters and images are cast to it in a copy.

    Gives a row for each batch size and model: "median_ms" of one call, quartiles "low_ms" and "high_ms", "cpu_ms"
    (median process CPU time over all threads; None off the CPU), "images_per_s", "samples_ms" in the order taken, "calls"
    per sample, and "model", "runtime", "batch", "image_px", "threads", "dtype", "device", "device_name", "runs", "cores", and "load" (mean number
    of running processes in the minute before) with "other_load", the part of it that was not this process; None if unknown.
    """
    where = _checked(models, batch_sizes, threads, runs, warmup, runtime, device, dtype)
    shapes = {name: image_shape or _shape_of(model, next(iter(models.values()))) for name, model in models.items()}
    total, done = len(batch_sizes) * len(models) * runs, 0
    rows: list[Row] = []
    room = fitting_in_memory(
        f"timing batches of {', '.join(map(str, batch_sizes))} on {where}",
        "Lower batch_sizes (--batch), or measure on another device (--device cpu).",
    )
    with room, _threads(threads), _quiet_torch(), contextlib.ExitStack() as stack, torch.inference_mode():
        ready = {name: stack.enter_context(_ready(model, where, DTYPES[dtype])) for name, model in models.items()}
        for batch in batch_sizes:
            load = load_here()
            if progress:
                progress("measure", done, total, batch=batch, runtime=runtime)  # compiling may take a minute
            images = {
                shape: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(where, DTYPES[dtype])
                for shape in shapes.values()
            }  # B C h w each
            calls = {name: _call(model, runtime) for name, model in ready.items()}
            repeats = {name: _warm(call, images[shapes[name]], where, warmup, name) for name, call in calls.items()}
            wall: dict[str, list[float]] = {name: [] for name in models}
            cpu: dict[str, list[float]] = {name: [] for name in models}
            order = list(models)
            for _ in range(runs):
                for name in order:
                    wall_s, cpu_s = _sample(calls[name], images[shapes[name]], where, repeats[name])
                    wall[name].append(1e3 * wall_s)
                    cpu[name].append(1e3 * cpu_s)
                    done += 1
                    if progress:
                        progress("measure", done, total, model=name, batch=batch, runtime=runtime)
                order = order[1:] + order[:1]  # so that no model always follows the same one
            for name in models:
                low, median, high = quartiles(wall[name])
                rows.append(
                    {
                        "model": name,
                        "runtime": runtime,
                        "batch": batch,
                        "image_px": list(shapes[name][1:]),
                        "median_ms": median,
                        "low_ms": low,
                        "high_ms": high,
                        "cpu_ms": statistics.median(cpu[name]) if where.type == "cpu" else None,
                        "images_per_s": 1e3 * batch / median,
                        "samples_ms": wall[name],
                        "calls": repeats[name],
                        "runs": runs,
                        "threads": torch.get_num_threads(),
                        "dtype": dtype,
                        "device": where.type,
                        "device_name": device_name(where),
                        **load,
                    }
                )
    return rows


def speedups(rows: Sequence[Row], reference: str, macs: Mapping[str, int]) -> list[Row]:
    """What each model gains over the reference, for each runtime, batch size and setting that both were timed in.

    macs: of each model, by the names in `rows`.  Gives "ideal" (ratio of MACs); "measured" with "low" and "high", the
    median and quartiles of the ratios of samples taken side by side (a slow minute of the machine cancels in them; so it
    can differ a little from the ratio of the medians); and "realised" = measured / ideal.
    """
    setting = ("runtime", "batch", "threads", "dtype", "device")
    dense = {tuple(row[key] for key in setting): row for row in rows if row["model"] == reference}
    if not dense:
        known = sorted({row["model"] for row in rows})
        raise MeasureError(f"no timing of {reference!r}; expected one of {known}{did_you_mean(reference, known)}.")
    gains = []
    for row in rows:
        base = dense.get(tuple(row[key] for key in setting))
        if row["model"] == reference or base is None:
            continue
        low, measured, high = quartiles([a / b for a, b in zip(base["samples_ms"], row["samples_ms"], strict=True)])
        ideal = macs[reference] / macs[row["model"]]
        gains.append(
            {"model": row["model"], "reference": reference, **{key: row[key] for key in setting}}
            | {"ideal": ideal, "measured": measured, "low": low, "high": high, "realised": measured / ideal}
        )
    return gains


def busy(rows: Sequence[Row]) -> str | None:
    """The sentence to read beside timings of a machine that had other work than fits beside them; None where it was quiet enough,
    or nobody can say.
    """
    crowded = [row for row in rows if (row.get("other_load") or 0) + row["threads"] > row.get("cores", 0) + CROWDED]
    if not crowded or crowded[0]["device"] != "cpu":
        return None
    row = max(crowded, key=lambda row: float(row["other_load"]))
    threads = f"{row['threads']} thread{'' if row['threads'] == 1 else 's'}"
    return (
        f"The machine was busy: other programs were a load of {row['other_load']:.1f} on {row['cores']} cores beside {threads} "
        "here. The times are longer than on a quiet machine and the speed-ups less sure; measure again when it is quiet."
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _checked(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int],
    threads: int | None,
    runs: int,
    warmup: int,
    runtime: str,
    device: str,
    dtype: str,
) -> torch.device:
    """Refuses what cannot be timed, before anything is moved."""
    if not isinstance(models, Mapping):
        raise MeasureError(
            f"measure: the models are a {type(models).__name__}; expected models by name, such as {{'dense': model}}."
        )
    if not models:
        raise MeasureError("no model to time; expected at least one.")
    if not batch_sizes or any(batch < 1 for batch in batch_sizes):
        raise MeasureError(f"batch sizes {list(batch_sizes)!r}; expected whole numbers of at least 1, such as 1,8.")
    if runs < 1 or warmup < 0:
        raise MeasureError(f"runs={runs!r}, warmup={warmup!r}; expected runs >= 1 and warmup >= 0.")
    if threads is not None and threads < 1:
        raise MeasureError(f"threads={threads!r}; expected at least 1, or None for as many as torch has now.")
    processes.refuse_threads(threads)
    if runtime not in RUNTIMES:
        raise MeasureError(f"unknown runtime {runtime!r}; expected one of {RUNTIMES}{did_you_mean(runtime, RUNTIMES)}.")
    if runtime == "compile":
        require_compiler()
    if dtype not in DTYPES:
        raise MeasureError(f"unknown dtype {dtype!r}; expected one of {tuple(DTYPES)}{did_you_mean(dtype, DTYPES)}.")
    return device_named(device)


def _shape_of(model: nn.Module, first: nn.Module) -> tuple[int, int, int]:
    spec = getattr(model, "spec", getattr(first, "spec", None))
    if spec is None:
        raise MeasureError("the model has no spec to say its image size; pass image_shape=(channels, height, width).")
    return spec.channels, *spec.image_px


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _ready(model: nn.Module, where: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The model in eval mode on the device; the caller's own where nothing has to be moved, else a copy."""
    fits = all(
        tensor.device == where and (tensor.dtype == dtype or not tensor.is_floating_point())
        for tensor in (*model.parameters(), *model.buffers())
    )
    if not fits:
        yield copy.deepcopy(model).to(where, dtype).eval()
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def _call(model: nn.Module, runtime: str) -> Callable[[Tensor], Any]:
    # A plain function around the model: compiling the module itself would leave a wrapper on the caller's object.
    def forward(images: Tensor) -> Any:
        return model(images)

    return torch.compile(forward, dynamic=False) if runtime == "compile" else forward


def _warm(call: Callable[[Tensor], Any], images: Tensor, where: torch.device, warmup: int, name: str) -> int:
    """Runs the call until it is warm; gives how many calls make one sample."""
    try:
        for _ in range(max(1, warmup)):
            _sample(call, images, where, 1)
        seconds = min(_sample(call, images, where, 1)[0] for _ in range(2))
    except RuntimeError as error:
        if "out of memory" in str(error).lower() or "can't allocate" in str(error).lower():
            raise MeasureError(
                f"{name}: batch {len(images)} does not fit into the memory of {where}. Measure a smaller batch."
            ) from error
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = str(error).strip().splitlines()[0]
            raise MeasureError(
                f"{name}: torch.compile failed on this machine ({reason}). Measure with runtime 'eager'."
            ) from error
        raise
    return max(1, min(200, round(LEAST_SAMPLE_S / max(seconds, 1e-6))))


def _sample(call: Callable[[Tensor], Any], images: Tensor, where: torch.device, calls: int) -> tuple[float, float]:
    """Wall and process CPU seconds of one call, the mean of `calls`."""
    _synchronise(where)
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call(images)
    _synchronise(where)
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _synchronise(where: torch.device) -> None:
    """Waits for an accelerator, which answers a call before it has done it."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    elif where.type == "mps":
        torch.mps.synchronize()


def load_here() -> Row:
    """The machine's load, what of it was not ours, and its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
        ours = min(load, time.process_time() / 60, torch.get_num_threads())  # of one minute, at most all of ours so far
        return {"load": round(load, 2), "other_load": round(load - ours, 2), "cores": cores}
    return {"load": None, "other_load": None, "cores": cores}


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without torch's warnings on the log, such as the compiler's that there is no CUDA: they are no part of a timing."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
