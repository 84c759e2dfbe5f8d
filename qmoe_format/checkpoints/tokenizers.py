"""A checkpoint's tokenizer, as transformers loads it.

Code that comes with a checkpoint is never run unasked, and nobody is asked on a terminal.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmoe_format.checkpoints.attachments import tokenizer_code
from qmoe_format.container.attachment_files import is_vocabulary
from qmoe_format.errors import QMoEError, QMoEWarning
from qmoe_format.hub import check_not_pointer
from qmoe_format.machine import out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRUST = "read it and, if you trust it, use --trust-remote-code (in Python trust_remote_code=True)"
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


def load_tokenizer(
    folder: Path, *, where: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint's folder.

    Args:
        folder: with its files and ``config.json``.
        where: what to call the folder in an error.
        trust_remote_code: whether to run code of the folder, if the tokenizer's class is there.

    Raises:
        QMoEError: ``not-found`` if there is none; ``checkpoint`` if it has no vocabulary, is code
            that is not trusted, or cannot be loaded; ``dependency`` if it needs a package.
    """
    from transformers import AutoTokenizer

    from qmoe_format.checkpoints.model import load_config

    where = where or str(folder)
    options: dict[str, Any] = {}
    try:
        if trust_remote_code:  # or a class of the folder would be used for the configuration, too
            raw = json.loads((folder / "config.json").read_bytes())
            options["config"] = load_config(folder, raw)
        with _no_tiktoken_cache():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code, **options
            )
        if not _has_vocabulary(tokenizer):
            expected = " or ".join(sorted(tokenizer.vocab_files_names.values()))
            raise ValueError(f"{type(tokenizer).__name__} found no {expected or 'vocabulary'}")
    except BaseException as error:  # every class of tokenizers has its own
        if not _of_a_library(error):
            raise
        code, problem, advice = _reason(error, folder, trust_remote_code)
        raise QMoEError(code, f"{where}: {problem}", advice) from error
    return tokenizer


@contextmanager
def reading_text() -> Iterator[None]:
    """Say so if a tokenizer that could be loaded cannot read a text.

    Raises:
        QMoEError: ``checkpoint``.
    """
    try:
        yield
    except BaseException as error:
        if not _of_a_library(error) or out_of_memory(error):
            raise
        raise QMoEError(
            "checkpoint",
            f"the tokenizer cannot read the text ({error})",
            "fetch the tokenizer's files again",
        ) from error


def _of_a_library(error: BaseException) -> bool:
    """Whether it is no interruption; what code in Rust panics with is no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def warn_without_tokenizer(
    folder: Path, *, where: str | None = None, trust_remote_code: bool = False
) -> None:
    """Warn if a file made of the checkpoint has no tokenizer that can be loaded."""
    try:
        load_tokenizer(folder, where=where, trust_remote_code=trust_remote_code)
    except QMoEError as error:
        warnings.warn(f"the file cannot generate text: {error}", QMoEWarning, stacklevel=2)


def _reason(error: BaseException, folder: Path, trusted: bool) -> tuple[str, str, str]:
    """Code, problem and advice for what transformers raised."""
    code = tokenizer_code(folder)
    if code and "--" not in code and not (folder / code).is_file():
        advice = "put it beside the checkpoint's config.json, and convert with --trust-remote-code"
        return "checkpoint", f"its tokenizer is code, {code}, which is not there", advice
    if code and not trusted:
        return "checkpoint", f"its tokenizer is code, {code}, which is not run unasked", _TRUST
    vocabularies = _vocabularies(folder)
    if not vocabularies and not code:
        advice = "put its files beside the checkpoint's config.json, and convert again"
        return "not-found", "there is no tokenizer", advice
    for path in vocabularies:
        try:
            check_not_pointer(path)
        except QMoEError:
            advice = "run `git lfs pull` where the checkpoint is, and convert again"
            return "checkpoint", f"{path.name} is a pointer of Git LFS, not the file itself", advice
    if not (folder / "tokenizer.json").is_file():
        for path in vocabularies:
            if packages := _packages(path):
                problem = f"{path.name} needs the package {packages[0]}, which is not installed"
                return "dependency", problem, f"run: pip install {' '.join(packages)}"
    if isinstance(error, ImportError):
        return "dependency", f"its tokenizer needs a package ({error})", "install that package"
    problem = f"transformers cannot load its tokenizer ({error})"
    return "checkpoint", problem, "fetch the tokenizer's files again"


def _vocabularies(folder: Path) -> list[Path]:
    """The files with a vocabulary; an empty one, from a failed download, has none."""
    paths = [path for path in sorted(folder.iterdir()) if is_vocabulary(path.name)]
    return [path for path in paths if path.is_file() and path.stat().st_size]


def _packages(vocabulary: Path) -> list[str]:
    """The packages that are not installed and without which transformers cannot read a file."""
    if vocabulary.suffix not in (".model", ".tiktoken"):
        return []
    with vocabulary.open("rb") as file:
        tiktoken = _TIKTOKEN_LINE.fullmatch(file.readline(1000))
    needed = {"tiktoken": "tiktoken"} if tiktoken else _SENTENCEPIECE
    return [package for package, module in needed.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # of the package that it is in
        return False


def _has_vocabulary(tokenizer: Any) -> bool:
    """Whether there is more than special tokens: some classes make do without their files."""
    try:
        tokens = set(tokenizer.get_vocab())
    except NotImplementedError:
        return True
    tokens -= {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return len(tokens.difference(tokenizer.all_special_tokens)) > 1  # T5's has a space then


@contextmanager
def _no_tiktoken_cache() -> Iterator[None]:
    """Keep tiktoken from remembering files by their paths: others may be there by then."""
    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
