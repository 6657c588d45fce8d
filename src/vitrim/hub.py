"""Artifacts to and from the Hugging Face Hub. `huggingface_hub` is imported when a call needs it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import artifact
from .errors import ArtifactError

if TYPE_CHECKING:
    from .model import Vit

REPORT = "report.html"


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    include_report: bool = False,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Upload an artifact as a model repository USER/NAME, made if it is not there. Returns its address.

    The artifact's own files go, and report.html if asked for; nothing else that lies in the folder.
    private: None leaves the choice to the account's setting.  token: None takes the one of `hf auth login`.
    Raises ArtifactError, before anything is sent where the folder is at fault.
    """
    _check_name(repo_id)
    root = Path(folder)
    artifact.inspect(root)
    names = [name for name in artifact.FILES if (root / name).is_file()]
    if include_report:
        if not (root / REPORT).is_file():
            raise ArtifactError(f"{root / REPORT}: is missing; make it by `vitrim report`, or push without the report.")
        names.append(REPORT)
    mend = "Check the name, `hf auth login` and the network; what was sent before stands as it was."
    with _asking(f"{repo_id}: could not be pushed", mend) as hub:
        api = hub.HfApi(token=token)
        made = api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            repo_type="model",
            folder_path=str(root.resolve()),
            allow_patterns=names,
            commit_message="Upload a model of vitrim",
        )
    return str(made)


def load_hub(repo_id: str, revision: str | None = None, *, token: str | None = None) -> Vit:
    """Read an artifact from the Hub: USER/NAME, or hub:USER/NAME, at a branch, tag or commit.

    The small files come first, so that a foreign repository is refused before its weights are fetched. Files stay in
    the Hub's own cache; the call works offline once they are there. Raises ArtifactError.
    """
    repo_id = repo_id.removeprefix("hub:")
    _check_name(repo_id)
    small = tuple(name for name in artifact.NEEDED if name != artifact.WEIGHTS)
    first = _fetch(repo_id, small, revision=revision, token=token)
    artifact.inspect(first, weights=False)
    commit = first.name if re.fullmatch(r"[0-9a-f]{40}", first.name) else revision  # one commit for all files
    return artifact.load(_fetch(repo_id, artifact.FILES, revision=commit, token=token))


def _fetch(repo_id: str, names: tuple[str, ...], *, revision: str | None, token: str | None) -> Path:
    what = f"{repo_id} at {revision or 'its newest'}: could not be fetched from the Hub"
    with _asking(what, "Check the name and the network and load again; a download goes on where it stopped.") as hub:
        folder = hub.snapshot_download(
            repo_id, repo_type="model", revision=revision, token=token, allow_patterns=list(names)
        )
    root = Path(folder)
    lacking = [name for name in names if name in artifact.NEEDED and not (root / name).exists()]
    if lacking:
        raise ArtifactError(
            f"{repo_id}: {', '.join(lacking)} did not come; the repository holds no model of vitrim, or its download "
            "was interrupted. Check the name, go online and load again."
        )
    return root


def _check_name(repo_id: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id, re.ASCII):
        raise ArtifactError(f"{repo_id!r}: is no name of a repository; expected USER/NAME, such as 'ada/small-deit'.")


@contextmanager
def _asking(what: str, mend: str) -> Iterator[Any]:
    """The library. What goes wrong is one sentence, with the first line of its message: what failed, why, how to mend it."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ArtifactError("the Hub needs huggingface_hub: `pip install huggingface_hub`.") from error
    try:
        yield huggingface_hub
    except Exception as error:  # the transport's errors share no base class across versions of the library
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtifactError(f"{what} ({lines[0].strip().rstrip('.')}). {mend}") from error
