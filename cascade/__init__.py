"""cascade: a family of smaller language models from one parent.

A recipe goes in, a family of smaller models comes out of object storage, and everything in between
is a graph of immutable, content-addressed artifacts. Importing this package never imports Prefect.
"""

__version__ = "0.1.0"
