"""Checkpoints that QMoE's authors publish (arXiv 2310.16795, section 4): Switch Transformers with
ternary experts under one dictionary that is implied.

    config.json  transformers' configuration
    noexp.pt     every tensor that is not an expert's, under transformers' names
    expNN.pt     the experts of one sparse layer, encoder first
    sizes.pt     how many codewords each matrix has

Of each matrix [rows, columns], PREFIX.experts.expert_E.wi or .wo, a file ``expNN.pt`` has

    w_comp      int16 [n], unsigned: codewords of all rows
    row_off     int32 [rows + 1]: where those of each row begin
    ter_minmax  bfloat16 [2 * rows]: the two values of each row besides 0
    weight      nothing: transformers asked for it

``open_published`` opens a folder as a ``Checkpoint`` that also gives the ternary matrices.
"""

from qmoe_format.checkpoints.published_qmoe.checkpoint import PublishedCheckpoint, open_published

__all__ = ["PublishedCheckpoint", "open_published"]
