"""The errors a caller can mend, and the hint for a name that is nearly right. Standard library only."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class VitrimError(ValueError):
    """A caller's mistake or a file's fault. The message says what is wrong, what was expected and how to mend it."""


class SpecError(VitrimError):
    """A spec that describes no network, or a field it does not know."""


class BudgetError(VitrimError):
    """A budget out of range, contradictory, or out of reach for the model and the method."""


class SourceError(VitrimError):
    """A model that cannot be found, read, or said as a spec."""


class ArtifactError(VitrimError):
    """A folder that is no artifact, a damaged or foreign one, or a place that cannot be written."""


class DataError(VitrimError):
    """Images or labels that are missing, broken, or do not fit the model."""


class TrainingError(VitrimError):
    """A training that cannot start, go on, or be resumed."""


class ConfigError(VitrimError):
    """An option or a config key that is unknown, contradictory or out of range."""


class MeasureError(VitrimError):
    """A timing that cannot be taken here, or a device that is not there."""


class CapacityError(VitrimError):
    """Work that does not fit the memory that is there."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch found no memory, on whatever device. Imports no torch to tell."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


@contextmanager
def fitting_in_memory(work: str, mend: str) -> Iterator[None]:
    """Tells in one sentence, as CapacityError, that the work did not fit the memory, and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CapacityError(f"out of memory while {work}; expected it to fit. {mend}") from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Ends a message: "; did you mean 'qk_dim'?" for the nearest known name, "" where none is near."""
    names = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), list(names), n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
