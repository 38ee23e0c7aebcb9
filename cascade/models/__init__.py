"""The parent: found, checked, loaded, and its decoder's parts named.

`sources` resolves what the user wrote to bytes with an identity, `folders` reads and writes plain
Hugging Face folders, `anatomy` finds out what every dimension of a class's parameters stands for, and
`decoder` applies that to one model.
"""
