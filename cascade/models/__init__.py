"""The parent: found, checked, loaded, and its decoder's parts named.

`sources` resolves what the user wrote to bytes with an identity, `folders` reads and writes plain
Hugging Face folders, `decoder` names a model's parts and its shape, `formula` proves that the model
computes what pruning assumes.
"""
