"""A repository on the Hub, or what the cache has of it.

``huggingface_hub`` does the work, and obeys ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and
``HF_ENDPOINT``. Files come one after the other, in the calling thread: so Ctrl-C ends a download at
once, and only the file that was on its way has to start again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.hub.names import HubName
from qmoe_format.machine import require
from qmoe_format.progress import Counter, Progress

_LOG_IN = "run `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit.

    Attributes:
        name: what was asked for.
        commit: the commit's hash.
        sizes: bytes by path in the repository; without the Hub, 0 for each file in the cache.
        refused: why it is without the Hub, unless it is not.
    """

    name: HubName
    commit: str
    sizes: Mapping[str, int]
    refused: QMoEError | None

    def lacks(self, wanted: str, code: str, advice: str) -> QMoEError:
        """An error: ``wanted`` is not in the repository or, without the Hub, not in the cache."""
        if self.refused is None:
            return QMoEError(code, f"{self.name}: the repository has no {wanted}", advice)
        problem = f"{self.refused.problem}; the cache has no {wanted}"
        return QMoEError(self.refused.code, problem, self.refused.advice)

    def fetch(self, files: Sequence[str], progress: Progress | None = None) -> list[Path]:
        """Download those of ``files`` that are not in the cache.

        Returns:
            The paths of all.

        Raises:
            QMoEError: ``checkpoint`` if the repository lacks one; ``not-found``, ``io``.
        """
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

        repo = self.name.repo
        for file in files:
            if file not in self.sizes:
                raise self.lacks(file, "checkpoint", "name another revision, or tell its owner")
        missing = [
            file
            for file in files
            if not isinstance(try_to_load_from_cache(repo, file, revision=self.commit), str)
        ]
        counter = Counter(progress, sum(self.sizes[file] for file in missing))
        bars = _silent_bars(counter)
        # One by the revision's name: from that the cache learns which commit it is.
        revision = self.name.revision
        try:
            for file in missing:
                counter.enter(file)
                before = counter.done
                hf_hub_download(repo, file, revision=revision, tqdm_class=bars)
                counter.back_to(before)
                counter.add(self.sizes[file])
                revision = self.commit
            return [Path(hf_hub_download(repo, file, revision=self.commit)) for file in files]
        except Exception as error:  # httpx's, too, or of what else huggingface_hub may call
            with os_errors(f"{self.name}: cannot write to {constants.HF_HUB_CACHE}"):
                if isinstance(error, OSError) and error.errno:
                    raise
            raise _explained(self.name, error) from error


def find_repository(name: HubName) -> Repository:
    """Ask the Hub or, if it does not tell, look into the cache.

    Raises:
        QMoEError: ``not-found``, ``io``, ``dependency``.
    """
    try:
        require("huggingface_hub")
    except QMoEError as error:
        raise error.at(f"{name}: no such file or folder; to ask the Hub") from error
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        info = HfApi().model_info(
            name.repo,
            revision=name.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except Exception as error:  # as above
        refused = _explained(name, error)
    else:
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        return Repository(name, str(info.sha), sizes, None)
    try:
        snapshot = snapshot_download(
            name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]
        )
    except (OSError, ValueError):
        raise refused from None
    folder = Path(snapshot)
    cached = [path for path in folder.rglob("*") if not path.is_dir()]  # also links to nothing
    sizes = {path.relative_to(folder).as_posix(): 0 for path in cached}
    return Repository(name, folder.name, sizes, refused)


def _silent_bars(counter: Counter) -> type[Any]:
    """A class of progress bars that do not show, but count the bytes of one file.

    A file has one or two bars, by the version of ``huggingface_hub`` and the way that it comes: of
    the bytes that have arrived, and of those that are written.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **(settings | {"disable": True}))  # type: ignore[no-untyped-call]
            self._before = counter.done

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            counter.add(max(0, self._before + int(self.n) - counter.done))

    return Bar


def _explained(name: HubName, error: Exception) -> QMoEError:
    """What an error of ``huggingface_hub`` means, and what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    nothing = f"{name}: no such file or folder"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _explained(name, error.__cause__)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return QMoEError(
            "io",
            f"{nothing}, it is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE to download it",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return QMoEError(
            "not-found",
            f"{name}: there is no revision {name.revision!r}",
            f"choose one of {hub}/{name.repo}/tree/main",
        )
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return QMoEError(
            "io",
            f"{name}: access is restricted",
            f"ask for it at {hub}/{name.repo}, and {_LOG_IN}",
        )
    if status == 404 or isinstance(
        error, errors.RepositoryNotFoundError | errors.HFValidationError
    ):
        return QMoEError(
            "not-found",
            f"{nothing}, and no such model at {hub}",
            f"check the name; for a private model {_LOG_IN}",
        )
    if status == 401:
        return QMoEError("io", f"{name}: {hub} does not accept the access token", _LOG_IN)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return QMoEError(
        "io",
        f"{nothing}, and the download from {hub} failed ({reason})",
        "check the network and try again; finished files are kept",
    )
