"""The one line that every benchmark ends with.

{"bench": NAME, "figures": [{"name", "got", "wanted", "better": "higher" | "lower", "unit"} …], "detail": …}
"""

from typing import Literal

import msgspec
from msgspec import Struct


class Figure(Struct, frozen=True):
    """One measured number beside the one that is wanted; `better` says on which side of it to be."""

    name: str
    got: float
    wanted: float
    better: Literal["higher", "lower"]
    unit: str


def print_report(bench: str, figures: list[Figure], detail: object) -> None:
    """Print the object on one line."""
    print(msgspec.json.encode({"bench": bench, "figures": figures, "detail": detail}).decode(), flush=True)
