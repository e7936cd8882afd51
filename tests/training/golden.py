"""Golden files: values that must not move, rewritten only under WRITE_FIXTURE=true and reviewed in the diff."""

import json
import os
from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"


def golden(name, got):
    """Return what is on file for `name`; with WRITE_FIXTURE=true put `got` there first."""
    path = FIXTURES / f"{name}.json"
    if os.environ.get("WRITE_FIXTURE") == "true":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(got, indent=1) + "\n")
    return json.loads(path.read_text())
