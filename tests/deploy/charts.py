"""Our values for Prefect's Helm charts, held against the charts: python -m tests.deploy.charts FOLDER

FOLDER: a checkout of github.com/PrefectHQ/prefect-helm. A script, as no package carries the charts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

VALUES = Path(__file__).parents[2] / "deploy" / "kubernetes"
CHARTS = {
    "server-values.yaml": "prefect-server",
    "worker-cpu-values.yaml": "prefect-worker",
    "worker-gpu-values.yaml": "prefect-worker",
}
# What a chart passes on to Kubernetes as it is.
PASSED_ON = ("capabilities", "requests", "limits", "env")


def wrong(values: dict[str, Any], chart: Path) -> Iterator[str]:
    """What the chart's schema refuses, and values that no template of the chart would read."""
    schema = json.loads((chart / "values.schema.json").read_text())
    defaults = yaml.safe_load((chart / "values.yaml").read_text())
    for error in Draft7Validator(schema).iter_errors(merged(defaults, values)):
        yield f"{error.json_path}: {error.message}"
    yield from unknown(values, defaults, "$")


def merged(defaults: Any, values: Any) -> Any:
    """The values over the chart's defaults, as Helm reads them."""
    if not isinstance(defaults, dict) or not isinstance(values, dict):
        return values
    both = {key: merged(defaults[key], values[key]) for key in defaults.keys() & values.keys()}
    return {**defaults, **values, **both}


def unknown(values: Any, defaults: Any, where: str) -> Iterator[str]:
    """Paths of values for which the chart has no default, and so no use."""
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if not isinstance(defaults, dict) or key not in defaults:
            # `name` of a job template is the one value that the chart keeps out of its defaults.
            if (where, key) != ("$.worker.config.baseJobTemplate", "name"):
                yield f"{where}.{key}: the chart has no such value"
        elif key not in PASSED_ON:
            yield from unknown(value, defaults[key], f"{where}.{key}")


def main(folder: str) -> int:
    """Print what is wrong; 1 if anything is."""
    found = [
        f"{name}: {line}"
        for name, chart in CHARTS.items()
        for line in wrong(yaml.safe_load((VALUES / name).read_text()), Path(folder) / "charts" / chart)
    ]
    print(*found or [f"{', '.join(CHARTS)} fit the charts"], sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
