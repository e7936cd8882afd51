"""Shared fixtures: one tiny private network's certificates, made once per session.

pki.root ──▶ pki.org ──▶ pki.node("worker-1", ["worker"]) ─▶ directory of PEM files, keys as in a configuration
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from msgspec import Struct
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from hypha.pki import Identity, Issued, issue_crl, issue_node, issue_org, issue_root, load_identity, save
from hypha.telemetry import tracing


class NodeFiles(Struct, frozen=True):
    """Where one node's PEM files lie; the attributes are named like the configuration keys."""

    directory: Path
    cert_pem: Path
    key_pem: Path
    trust_pem: Path
    crls_pem: tuple[Path, ...] = ()

    def toml(self) -> str:
        """Return the lines of a configuration file that name these files."""
        crls = ", ".join(f'"{path}"' for path in self.crls_pem)
        names = ("cert_pem", "key_pem", "trust_pem")
        return "".join(f'{name} = "{getattr(self, name)}"\n' for name in names) + f"crls_pem = [{crls}]\n"

    def identity(self) -> Identity:
        """Load and verify them."""
        return load_identity(self)


class Pki:
    """A root and one organisation; `other` is the same again, made by strangers."""

    def __init__(self, directory: Path, name: str = "Test", *, start: datetime | None = None) -> None:
        self._directory = directory
        self._nodes = 0
        self._start = start
        self.name = name
        self.root = issue_root(f"{name} root", start=start)
        self.org = issue_org(self.root, f"{name} org", start=start)

    def node(self, name: str, roles: Iterable[str], **options: object) -> NodeFiles:
        """Issue a node without revocation lists; options go to `issue_node` (days, start)."""
        return self.write(name, issue_node(self.org, name, roles, **({"start": self._start} | options)))

    def write(self, name: str, issued: Issued) -> NodeFiles:
        """Write a node's files into a directory of its own."""
        self._nodes += 1
        directory = self._directory / f"{self._nodes}-{name}"
        files = NodeFiles(directory, directory / "node.pem", directory / "node-key.pem", directory / "trust.pem")
        save(files.cert_pem, issued.certificate_pem() + self.org.certificate_pem())
        save(files.key_pem, issued.key_pem(), private=True)
        save(files.trust_pem, self.root.certificate_pem())
        return files

    def crls(self, path: Path, revoked: dict[int, datetime], *, number: int = 1, **options: object) -> None:
        """Write both authorities' lists, each naming the revoked serials."""
        lists = issue_crl(self.root, revoked, number=number, **options)
        save(path, lists + issue_crl(self.org, revoked, number=number, **options), force=True)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Return the session's private network."""
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def foreign_pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """Return another network, whose authorities bear the same names but other keys."""
    return Pki(tmp_path_factory.mktemp("foreign-pki"))


@pytest.fixture
def exported() -> Iterator[Callable[[], tuple[ReadableSpan, ...]]]:
    """Record spans, and return what has ended so far when called."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.activate(provider.get_tracer("test"))
    yield exporter.get_finished_spans
    tracing.deactivate()
