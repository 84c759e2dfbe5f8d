"""What the experts of a model see: text run through it block by block (needs torch, transformers).

``text`` reads the user's file, ``sequences`` makes batches of tokens like those that the model was
trained on, ``walk`` runs the model.
"""
