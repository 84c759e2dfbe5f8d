"""A Hugging Face checkpoint to a ``.qmoe`` file, in bounded memory.

Without calibration text each expert is rounded by itself (``data_free``). With text the model is
run block by block, and each expert is quantised for what it is given (``calibrated``).
"""

from __future__ import annotations

import glob
from pathlib import Path

from qmoe_format.codec import PROFILES
from qmoe_format.container.writer import Writer, file_stem
from qmoe_format.conversion.options import Calibration, Target
from qmoe_format.conversion.report import report_path
from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.machine import cores, require
from qmoe_format.progress import Counter, Progress
from qmoe_format.quantize import Recipe

__all__ = ["Calibration", "Progress", "check_destination", "convert"]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: str | None = None,
    profile: str = "fast",
    shard_bytes: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    calibration: Calibration | str | Path | None = None,
    bits_per_weight: float | None = None,
    rate_lambda: float | None = None,
    resume: bool = False,
) -> Path:
    """Convert a checkpoint directory. The same input and settings give the same bytes.

    Experts of layers for multi-token prediction are converted, too, but no text reaches them: they
    are rounded by their own weights alone.

    Without calibration memory stays below 1 GiB plus twice the largest tensor; with it, one block
    without its experts, and a few GiB for experts and their Hessians, are in memory. Nothing
    appears at ``destination`` before it is whole, and what was there stays until then.

    A calibrated conversion works in a folder beside ``destination``, ``.NAME.work``, where every
    finished block is kept if it is stopped. It also writes ``STEM.quality.json`` beside the file:
    what each expert has lost. The same is in the file, as an attachment.

    Args:
        source: a folder with ``config.json``, weights, and tokenizer files.
        destination: the file to write.
        recipe: the quantizer's name, see ``qmoe_format.quantize.RECIPES``; by default ``rd`` with
            calibration text and ``rtn`` without.
        profile: ``fast`` (decoding speed) or ``size``.
        shard_bytes: begin another file after so many bytes; by default there is one.
        threads: how many to use; by default one a core. Without calibration the bytes do not
            depend on it; with it torch's rounding may.
        overwrite: replace what is at ``destination``, and drop the work of a conversion that was
            stopped unless ``resume`` is given; otherwise these are errors.
        progress: called with the weights done and to do.
        calibration: text, or a ``Calibration`` that says how to use it.
        bits_per_weight: how large the experts are to be, scales and dictionaries included; to
            within 2 %. For recipes that weigh error against bits.
        rate_lambda: that weight itself, instead.
        resume: go on with a calibrated conversion that was stopped. The bytes are those of one
            that was not. Until the first block is quantised another ``bits_per_weight`` may be
            asked for.

    Returns:
        ``destination``: the file to open. With ``shard_bytes`` it may be the small file that names
        the shards, which lie beside it.

    Raises:
        QMoEError: ``dependency``, ``argument``, ``not-found``, ``checkpoint``, ``value`` (weights
            that are NaN or infinite, or a number of bits that was missed), or ``io``, for example
            because the disk is full; with ``resume`` those of reading, if the work is damaged.
    """
    require("torch", "safetensors", *(["transformers"] if calibration is not None else []))
    from qmoe_format.checkpoints import open_checkpoint
    from qmoe_format.quantize import recipe as find_recipe

    destination = Path(destination)
    chosen = find_recipe(recipe or ("rtn" if calibration is None else "rd"))
    target = Target(bits_per_weight, rate_lambda)
    _check_settings(chosen, calibration is not None, target, resume)
    if profile not in PROFILES:
        raise QMoEError("argument", f"profile {profile!r} is not one of {', '.join(PROFILES)}")
    threads = threads or cores()
    check_destination(
        destination,
        overwrite,
        # Those that are there on resuming are this conversion's own.
        sharded=shard_bytes is not None and not resume,
        reported=calibration is not None and not resume,
    )
    with os_errors(f"cannot read {source}"), open_checkpoint(source) as checkpoint:
        if calibration is None:
            from qmoe_format.conversion.uncalibrated import convert_data_free

            total = sum(info.elements for info in checkpoint.tensors.values())
            with Writer(destination, shard_bytes=shard_bytes) as writer:
                convert_data_free(
                    checkpoint,
                    writer,
                    chosen,
                    PROFILES[profile],
                    threads,
                    Counter(progress, total),
                )
            return destination
        from qmoe_format.conversion.calibrated import CalibratedConversion

        if not isinstance(calibration, Calibration):
            calibration = Calibration(calibration)
        CalibratedConversion(
            checkpoint,
            destination,
            chosen,
            profile,
            calibration,
            target,
            shard_bytes=shard_bytes,
            threads=threads,
            progress=progress,
        ).run(resume=resume, overwrite=overwrite)
    return destination


def _check_settings(recipe: Recipe, calibrated: bool, target: Target, resume: bool) -> None:
    """Refuse what makes no sense together."""
    if recipe.calibrated and not calibrated:
        raise QMoEError(
            "argument", f"recipe {recipe.name!r} needs calibration text; give some, or take 'rtn'"
        )
    if calibrated and not recipe.calibrated:
        raise QMoEError(
            "argument",
            f"recipe {recipe.name!r} does not use calibration text; leave one of them out",
        )
    if target != Target() and not recipe.rated:
        raise QMoEError(
            "argument",
            f"recipe {recipe.name!r} has one size only; bits per weight or a lambda need "
            "calibration text and the recipe 'rd'",
        )
    if resume and not calibrated:
        raise QMoEError(
            "argument", "only a conversion with calibration text can be resumed; leave out resume"
        )


def check_destination(path: Path, overwrite: bool, *, sharded: bool, reported: bool) -> None:
    """Refuse a destination that cannot be written, or that is there already: the file, a shard or
    the report beside it."""
    if path.is_dir():
        raise QMoEError("argument", f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise QMoEError("not-found", f"{path.parent}: no such folder; make it first")
    there = [each for each in (path, *([report_path(path)] if reported else [])) if each.exists()]
    if sharded:
        there += sorted(path.parent.glob(f"{glob.escape(file_stem(path))}-?????-of-?????.qmoe"))
    if there and not overwrite:
        raise QMoEError("argument", f"{there[0]}: is there already; remove it, or use --force")
