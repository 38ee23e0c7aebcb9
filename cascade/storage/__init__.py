"""Where everything the pipeline makes is kept: locations (a folder or `s3://bucket/prefix`), manifests
that make an artifact explain itself, artifacts that are published once and verified on use, and the
training checkpoints that let an interrupted distillation go on."""
