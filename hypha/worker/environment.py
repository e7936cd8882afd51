"""What an executor process finds in its environment: enough to run Python and torch, nothing of ours.

Secrets and settings of the worker (HYPHA_*, OTEL_*, tokens of hubs) stay with the worker: the executor has no network.
"""

from collections.abc import Mapping

# Interpreter, libraries, devices and locale; everything else is dropped.
PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
    "HYPHA_LOG",
)
FIXED = {
    "PYTHONUNBUFFERED": "1",
    # What a job needs is fetched by the worker; an executor that asks a hub would only hang.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def executor_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for executors, drawn from this process's own."""
    return {**{key: environ[key] for key in PASSED_ON if key in environ}, **FIXED}
