"""The place of the CUDA kernels, which are not written yet.

Nothing here runs on a GPU so far: reading, decoding and multiplying happen on the CPU, in
`qmoe_format.codec`.
"""
