"""hypha doctor: can this machine run a node, and would this configuration's node be let in?

    python  libp2p  training  files  cpu  memory  clock          always
    configuration  certificates                                  with -c FILE
    gateway …                                                    with --dial
Each finding is ok, warn (works, but read it) or fail.
"""

import importlib.metadata
import importlib.util
import os
import resource
import sys
import time
from pathlib import Path
from typing import Literal

import psutil
from msgspec import Struct

from hypha.config import NodeConfig, load_config
from hypha.errors import ConfigError, HyphaError
from hypha.pki import Identity, load_identity

# py-libp2p is patched at start-up; the patches are tested against exactly this version.
LIBP2P_VERSION = "0.8.1"
PYTHON_MIN = (3, 11)
# A gateway holds a few hundred connections beside its listeners, logs and exporters.
OPEN_FILES_MIN = 1024
# A node at rest needs 150 MB; a training worker wants room for a model.
MEMORY_BYTES_MIN = 10**9
PROBE_TIMEOUT_S = 10.0


class Finding(Struct, frozen=True):
    """One thing looked at."""

    subject: str
    verdict: Literal["ok", "warn", "fail"]
    detail: str


class AnyNode(NodeConfig, frozen=True, forbid_unknown_fields=False, kw_only=True):
    """The keys that every role has; a role's own are left to its `--validate`."""


def run(config: Path | None = None, *, dial: bool = False) -> list[Finding]:
    """Look at everything; nothing is changed. Dialling takes up to PROBE_TIMEOUT_S per gateway."""
    findings = [_python(), _libp2p(), _training(), _open_files(), _cpu(), _memory(), _clock()]
    if config is None:
        return findings
    try:
        node = load_config(AnyNode, config, {})
    except ConfigError as error:
        return [*findings, Finding("configuration", "fail", str(error))]
    findings.append(Finding("configuration", "ok", str(config)))
    try:
        identity = load_identity(node)
    except ConfigError as error:
        return [*findings, Finding("certificates", "fail", str(error))]
    findings += _certificates(identity)
    return [*findings, *_gateways(identity, node)] if dial else findings


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", "ok" if sys.version_info >= PYTHON_MIN else "fail", version)


def _libp2p() -> Finding:
    try:
        version = importlib.metadata.version("libp2p")
    except importlib.metadata.PackageNotFoundError:
        return Finding("libp2p", "fail", f"not installed; {LIBP2P_VERSION} is needed")
    if version != LIBP2P_VERSION:
        return Finding("libp2p", "fail", f"{version}; {LIBP2P_VERSION} is needed")
    return Finding("libp2p", "ok", version)


def _training() -> Finding:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        return Finding("training", "warn", f"{names} not installed: no training here (pip install 'hypha-p2p[train]')")
    return Finding("training", "ok", f"torch {importlib.metadata.version('torch')}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdict: Literal["ok", "warn"] = "ok" if soft >= OPEN_FILES_MIN else "warn"
    return Finding("files", verdict, f"{soft} open files allowed (hard limit {hard}, {OPEN_FILES_MIN} wanted)")


def _cpu() -> Finding:
    return Finding("cpu", "ok", f"{psutil.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    verdict: Literal["ok", "warn"] = "ok" if memory.available >= MEMORY_BYTES_MIN else "warn"
    return Finding("memory", verdict, f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available")


def _clock() -> Finding:
    if hasattr(time, "CLOCK_BOOTTIME"):
        return Finding("clock", "ok", "CLOCK_BOOTTIME: leases notice a suspended machine")
    return Finding("clock", "warn", "no CLOCK_BOOTTIME: do not suspend this machine while it holds leases")


def _certificates(identity: Identity) -> list[Finding]:
    if identity.warnings:
        return [Finding("certificates", "warn", warning) for warning in identity.warnings]
    roles = "+".join(sorted(identity.roles)) or "no role"
    detail = f"{identity.subject}, {roles}, {identity.peer_id}, until {identity.not_after:%Y-%m-%d}"
    return [Finding("certificates", "ok", detail)]


def _gateways(identity: Identity, node: NodeConfig) -> list[Finding]:
    if not node.gateway_addresses:
        return [Finding("gateway", "warn", "the configuration names none")]
    return [_gateway(identity, address) for address in node.gateway_addresses]


def _gateway(identity: Identity, address: str) -> Finding:
    import trio

    from hypha.network.probe import probe

    async def ask() -> str:
        report = await probe(identity, address, timeout_s=PROBE_TIMEOUT_S)
        return f"{address}: {report.role} {report.version}, up {report.uptime_s:.0f} s"

    try:
        return Finding("gateway", "ok", trio.run(ask))
    except HyphaError as error:
        return Finding("gateway", "fail", f"{address}: {error}")
