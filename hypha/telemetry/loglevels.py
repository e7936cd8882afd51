"""Which log lines are wanted: the grammar of `HYPHA_LOG`.

    HYPHA_LOG = directive ("," directive)*
    directive = LEVEL | MODULE "=" LEVEL          info,network=debug,libp2p=error
    LEVEL     = error | warn | info | debug | trace

A bare level is for all of Hypha. MODULE is a prefix of a logger's name: `network` and `hypha.network` (also written
`hypha_network`) are the same; any other name that is not a module of Hypha, `libp2p` say, is a library's logger.
The longest matching prefix wins. Libraries that nobody names are heard from `warn` upwards.
"""

import logging
from dataclasses import dataclass, field

from hypha.errors import ConfigError

TRACE = 5
LEVELS = {
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}
ROOT = "hypha"
VARIABLE = "HYPHA_LOG"

# Third-party packages that log under their own name; every other word is taken for a module of Hypha.
LIBRARIES = frozenset(
    {"accelerate", "aioquic", "asyncio", "filelock", "fsspec", "grpc", "h2", "httpcore", "httpx", "huggingface_hub"}
    | {"hypercorn", "libp2p", "multiaddr", "opentelemetry", "py", "requests", "torch", "transformers", "trio"}
    | {"urllib3", "zeroconf"}
)


@dataclass(frozen=True)
class LogFilter:
    """Levels by full logger name; `default` is for Hypha's loggers that no name matches."""

    default: int = logging.INFO
    levels: dict[str, int] = field(default_factory=dict)

    def names(self, library: str) -> bool:
        """Whether some directive is about this library or a part of it."""
        return any(name == library or name.startswith(library + ".") for name in self.levels)


def level_name(levelno: int) -> str:
    """Name of the most severe of our levels that is not above `levelno`."""
    for name, level in LEVELS.items():
        if levelno >= level:
            return name
    return "trace"


def parse_filter(text: str) -> LogFilter:
    """Parse `HYPHA_LOG`; empty text is `info`. Raises ConfigError naming the directive that is wrong."""
    default = logging.INFO
    levels: dict[str, int] = {}
    for directive in filter(None, (part.strip() for part in text.split(","))):
        module, equals, level = directive.rpartition("=")
        if level.strip().lower() not in LEVELS:
            raise ConfigError(f"{VARIABLE}: {directive!r} does not end in a level; levels are {', '.join(LEVELS)}")
        levelno = LEVELS[level.strip().lower()]
        if not equals:
            default = levelno
        else:
            levels[_logger_name(module.strip(), directive)] = levelno
    return LogFilter(default=levels.pop(ROOT, default), levels=levels)


def _logger_name(module: str, directive: str) -> str:
    name = module.replace("::", ".").replace("hypha_", "hypha.", 1)
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"{VARIABLE}: {directive!r} names no module")
    head = name.partition(".")[0]
    return name if head == ROOT or head in LIBRARIES else f"{ROOT}.{name}"
