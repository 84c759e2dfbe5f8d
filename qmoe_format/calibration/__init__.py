"""What the experts of a model see: text run through it block by block (needs torch, transformers).

``text`` reads the user's file, ``sequences`` makes the batches of tokens a model was trained on.
"""
