"""Convert a Hugging Face checkpoint to a ``.qmoe`` file, in bounded memory.

Without calibration text each expert is rounded on its own (``uncalibrated``). With text the model
runs block by block, and each expert is quantized for the inputs it receives (``calibrated``).
"""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from qmoe_format.atomic_file import partial_file
from qmoe_format.calibration.ranks import Ranks, joined_ranks
from qmoe_format.container.shard_list import file_stem
from qmoe_format.conversion.options import Calibration, ConvertOptions
from qmoe_format.conversion.parallel import Resources
from qmoe_format.conversion.report import report_path
from qmoe_format.conversion.work import work_folder
from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.hub import find_checkpoint
from qmoe_format.hub.checkpoints import is_published_qmoe
from qmoe_format.machine import require
from qmoe_format.progress import Progress
from qmoe_format.remote import Location, RemotePath, location

__all__ = ["Calibration", "ConvertOptions", "convert"]


@overload
def convert(
    source: str | Path | RemotePath,
    destination: Path,
    *,
    calibration: Calibration | str | Path | None = None,
    progress: Progress | None = None,
    download_progress: Progress | None = None,
    **options: Any,
) -> Path: ...


@overload
def convert(
    source: str | Path | RemotePath,
    destination: str | RemotePath,
    *,
    calibration: Calibration | str | Path | None = None,
    progress: Progress | None = None,
    download_progress: Progress | None = None,
    **options: Any,
) -> Location: ...


def convert(
    source: str | Path | RemotePath,
    destination: str | Path | RemotePath,
    *,
    calibration: Calibration | str | Path | None = None,
    progress: Progress | None = None,
    download_progress: Progress | None = None,
    **options: Any,
) -> Location:
    """Convert a checkpoint. The same input and options give the same bytes.

    Without calibration, memory stays below 1 GiB plus twice the largest tensor. With it, one block
    without its experts is in memory, plus a few GiB of experts and their Hessians. Nothing appears
    at ``destination`` before it is complete, and what was there stays until then.

    A calibrated conversion keeps every finished block in a folder beside ``destination``,
    ``.NAME.work``, until it is done; if that has a URL, the folder is in the current one. It also
    writes ``STEM.quality.json`` beside the file: the loss of each expert. The file contains the
    same report as an attachment.

    A checkpoint that QMoE's authors publish (a folder with ``noexp.pt``) has its levels and scales
    already: the file has the same ones, and a choice of how to quantize is an error.

    Processes that ``torchrun`` or Slurm has started share a calibrated conversion: each calls this
    with the same arguments, sees the same folders, and returns when the file is there. They
    continue what was interrupted, even without ``resume``.

    Experts of layers for multi-token prediction are converted too, but the model does not run them:
    they are rounded by their weights alone.

    Example::

        convert("switch-base-8", "switch.qmoe", calibration="text.jsonl", bits_per_weight=0.8)

    Args:
        source: a folder with ``config.json``, weights, and tokenizer files, or the name of a model
            on the Hugging Face Hub: ``ORG/MODEL`` or ``ORG/MODEL@REVISION``. A folder may have a
            URL, such as ``s3://bucket/folder``: its weights, as safetensors, are read from there a
            tensor or an expert at a time, and not copied (see ``qmoe_format.remote``).
        destination: the file to write, or its URL. To S3 it goes while it is written; for other
            file systems, it or a shard lies in a temporary file first.
        calibration: text, or a ``Calibration`` that says how to use it.
        progress: called with the weights done and to do.
        download_progress: called with the bytes downloaded and to download.
        options: the other fields of ``ConvertOptions``.

    Returns:
        ``destination``, the file to open; with ``shard_bytes`` it may only list the other files.

    Raises:
        QMoEError: ``dependency``, ``argument``, ``not-found``, ``checkpoint``, ``value`` (NaN or
            infinite weights, or a missed number of bits), ``io``, ``peer`` (another process has
            ended); with ``resume`` a format code if the work folder is damaged.
    """
    if isinstance(calibration, str | Path):
        calibration = Calibration(calibration)
    chosen = ConvertOptions(calibration=calibration, **options)
    require("torch", "safetensors", "transformers")
    target = location(destination)
    with joined_ranks() as ranks:
        _convert(source, target, chosen, ranks, progress, download_progress)
    return target


def _convert(
    source: str | Path | RemotePath,
    destination: Location,
    chosen: ConvertOptions,
    ranks: Ranks,
    progress: Progress | None,
    download_progress: Progress | None,
) -> None:
    from qmoe_format.checkpoints import open_checkpoint
    from qmoe_format.checkpoints.tokenizers import warn_without_tokenizer

    calibration = chosen.calibration
    if calibration is None and ranks.count > 1:
        raise QMoEError(
            "argument",
            "only conversions with calibration text are shared by several processes",
            "run this one without torchrun or srun",
        )
    ranks = replace(ranks, restarted=any(ranks.gather(ranks.restarted)))  # on any machine
    resume = ranks.share(lambda: _check_beginning(destination, chosen, ranks))
    chosen = replace(chosen, resume=resume)
    trusted = chosen.trust_remote_code

    def local() -> Location:
        shown = download_progress if ranks.leads else None
        return find_checkpoint(source, shown, code=trusted)

    # The first process of a machine downloads; the others find the files.
    found: list[Location] = []
    ranks.settle(lambda: None if ranks.local else found.append(local()))
    folder = found[0] if found else local()
    cores = ranks.cores()  # which all ranks find out together
    threads = chosen.threads or cores
    if is_published_qmoe(folder):
        if isinstance(folder, RemotePath):
            raise QMoEError(
                "checkpoint",
                f"{folder}: what QMoE's authors publish cannot be read from there",
                "copy the folder to this machine",
            )
        from qmoe_format.conversion.published_qmoe import convert_published

        convert_published(folder, destination, chosen, Resources(threads), progress)
        warn_without_tokenizer(folder, trust_remote_code=trusted)
        return
    with (
        os_errors(f"cannot read {folder}"),
        open_checkpoint(folder, trust_remote_code=trusted) as checkpoint,
    ):
        checkpoint.check_complete()
        chosen.methods.check(stack.name for stack in checkpoint.stacks)
        if calibration is None:
            from qmoe_format.conversion.uncalibrated import convert_uncalibrated

            convert_uncalibrated(checkpoint, destination, chosen, Resources(threads), progress)
            warn_without_tokenizer(
                checkpoint.folder, where=checkpoint.where, trust_remote_code=trusted
            )
        else:
            from qmoe_format.conversion.calibrated import convert_calibrated

            resources = Resources(threads, ranks.device(calibration.device))
            convert_calibrated(checkpoint, destination, chosen, resources, progress, ranks)


def _check_beginning(destination: Location, options: ConvertOptions, ranks: Ranks) -> bool:
    """Check the destination; whether work on it is to be resumed: processes of a launcher resume
    what is there, unless ``overwrite`` is set and this is their first start."""
    resume = options.resume
    if ranks.launched and options.calibration and work_folder(destination).is_dir():
        resume = resume or not options.overwrite or ranks.restarted
    _check_destination(destination, replace(options, resume=resume))
    return resume


def _check_destination(path: Location, options: ConvertOptions) -> None:
    """Refuse a destination that cannot be written or, unless it may be overwritten, exists."""
    if path.is_dir():
        raise QMoEError("argument", f"{path}: is a folder", "give the path of a file")
    if isinstance(path, RemotePath):
        partial_file(path).discard()  # refused now rather than after hours
    elif not path.parent.is_dir():
        raise QMoEError("not-found", f"{path.parent}: no such folder", "create it first")
    results: list[Location] = [path]
    if not options.resume:  # then shards and report may be this conversion's own
        if options.calibration:
            results.append(report_path(path))
        if options.shard_bytes is not None:
            stem = glob.escape(file_stem(path))
            results += sorted(path.parent.glob(f"{stem}-?????-of-?????.qmoe"))
    existing = [result for result in results if result.exists()]
    if existing and not options.overwrite:
        raise QMoEError("argument", f"{existing[0]}: already exists", "remove it, or use --force")
