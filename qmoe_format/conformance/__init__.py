"""What another implementation of the format is held against.

- ``vectors/`` and ``manifest.json``: small files, good and bad, and what a reader has to say.
- ``second_reader.py``: a reader in plain Python, written from SPEC.md alone.
- ``tools/conformance_vectors`` in the repository writes vectors and manifest.
- ``runner.py``: ``python -m qmoe_format.conformance [--reader CMD ...]`` tries a reader on them.
"""
