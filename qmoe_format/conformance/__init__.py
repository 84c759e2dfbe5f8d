"""The conformance suite of the file format.

- ``vectors/`` and ``manifest.json``: small files, valid and invalid, and what a reader must answer.
- ``second_reader.py``: a reader in plain Python, written from SPEC.md alone.
- ``runner.py``: ``python -m qmoe_format.conformance [--reader CMD ...]`` runs a reader on them.

``tools/conformance_vectors`` in the repository generates vectors and manifest.
"""
