"""Teacher signals: what the teacher says about the corpus, computed once for the whole family.

teachers: the one question, whoever answers it. codecs and entries: what is stored of a distribution, in how
many bytes. writing: shard by shard, and on from the last one. reading: shards brought before they are asked
for.
"""

from cascade.distillation.signals.codecs import Codec, make_codec
from cascade.distillation.signals.reading import Folder, ReadAhead, Shards
from cascade.distillation.signals.teachers import (
    LiveTeacher,
    OnlineTeacher,
    Part,
    StoredTeacher,
    Teacher,
    batch_ids,
)
from cascade.distillation.signals.writing import FinishedShards, write_signals

__all__ = [
    "Codec",
    "FinishedShards",
    "Folder",
    "LiveTeacher",
    "OnlineTeacher",
    "Part",
    "ReadAhead",
    "Shards",
    "StoredTeacher",
    "Teacher",
    "batch_ids",
    "make_codec",
    "write_signals",
]
