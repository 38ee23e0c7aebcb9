"""Speed, memory and quality beside named peers, measured side by side in one run: `python -m tests.bench`."""
