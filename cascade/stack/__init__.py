"""The local stack: an S3-compatible store, a Prefect server and a worker as processes of this machine."""
