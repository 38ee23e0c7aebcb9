"""The Prefect side: tasks, retries, logs and artifacts around the graph; no algorithm lives here."""

import os

from cascade.collector import collect_seldom

# The embedded server migrates its database at its first start: 17 to 26 s on 2 cores, more under load.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# A flow's process loads torch to plan, and computes nothing with it.
collect_seldom()
