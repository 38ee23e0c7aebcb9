"""A real S3 server for tests: SeaweedFS in one process, on loopback ports nobody else uses."""

from __future__ import annotations

from pathlib import Path

from cascade.stack.seaweed import Identity, Seaweed

BUCKET = "cascade-tests"
WRITER = Identity("writer", "writer-key", "writer-secret")
READER = Identity("reader", "reader-key", "reader-secret", ("Read", "List"))


class S3Server(Seaweed):
    """A store in `folder` with one empty bucket.

    Nothing global is touched: a test that wants the server puts `environment` into its own environment.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, BUCKET, (WRITER, READER), usual_ports=False)

    @property
    def environment(self) -> dict[str, str]:
        """The AWS_* variables of a client that may do everything."""
        return self.variables(WRITER)

    @property
    def reader_environment(self) -> dict[str, str]:
        """The AWS_* variables of a client that may list and read, and nothing else."""
        return self.variables(READER)
