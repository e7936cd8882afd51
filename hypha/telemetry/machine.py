"""What the machine is doing: processor, memory and GPU, read only when a metric reader or a snapshot asks.

    psutil ─▶ {resource="cpu"} {resource="memory"}      0..1 of the whole machine
    NVML   ─▶ {resource="gpu"} {resource="gpu_memory"}  0..1, mean over the machine's GPUs; absent without a driver

Both libraries are loaded on the first probe: importing telemetry stays cheap, and `--help` never pays for it.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from hypha.telemetry.instruments import Reading

if TYPE_CHECKING:
    import psutil


@cache
def _process() -> "psutil.Process":
    import psutil

    return psutil.Process()


@cache
def _gpus() -> Callable[[], list[Reading]]:
    """Return a reader of all GPUs; one that finds none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        handles = []

    def read() -> list[Reading]:
        try:
            busy = [pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100 for handle in handles]
            memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        except pynvml.NVMLError:
            return []
        if not busy:
            return []
        used = [info.used / info.total for info in memory]
        return [
            ({"resource": "gpu"}, sum(busy) / len(busy)),
            ({"resource": "gpu_memory"}, sum(used) / len(used)),
        ]

    return read


def utilisation() -> Sequence[Reading]:
    """Fractions 0..1 of the machine in use; the processor's is since the previous call, 0 at first."""
    import psutil

    return [
        ({"resource": "cpu"}, psutil.cpu_percent(interval=None) / 100),
        ({"resource": "memory"}, psutil.virtual_memory().percent / 100),
        *_gpus()(),
    ]


def process_memory() -> Sequence[Reading]:
    """Resident set of this process, bytes."""
    return [({}, float(_process().memory_info().rss))]


def process_cpu() -> Sequence[Reading]:
    """Processor time this process has used since it started, seconds, user and system."""
    times = _process().cpu_times()
    return [({}, times.user + times.system)]
