"""Writes the pages of docs/reference that are drawn from the code: `make docs`, or `python -m scripts.reference`.

    Config structs, configs/*.toml ─▶ configuration.md        command lines' --help ─▶ commands.md
    hypha.protocol.messages ───────▶ protocol.md              transition tables ────▶ states.md
    hypha.protocol.bridge ─────────▶ bridge.md

`tests/test_docs.py` fails where a page and the code differ.
"""

from pathlib import Path

from scripts.reference_commands import commands_page
from scripts.reference_config import configuration_page
from scripts.reference_messages import bridge_page, protocol_page
from scripts.reference_states import states_page

DIRECTORY = Path(__file__).parent.parent / "docs" / "reference"


def pages() -> dict[str, str]:
    """Return the text of every generated page by its file name."""
    return {
        "configuration.md": configuration_page(),
        "commands.md": commands_page(),
        "protocol.md": protocol_page(),
        "bridge.md": bridge_page(),
        "states.md": states_page(),
    }


def main() -> None:
    """Write the pages."""
    for name, text in pages().items():
        (DIRECTORY / name).write_text(text)


if __name__ == "__main__":
    main()
