#!/usr/bin/env bash
# Makes .venv with the tested versions. py-libp2p compiles fastecdsa, so a compiler and two headers must be there.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
missing=()
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: Python 3.11 or newer is needed; set PYTHON=" >&2; exit 2; }
command -v gcc >/dev/null || missing+=(gcc)
echo '#include <gmp.h>' | gcc -E -x c - >/dev/null 2>&1 || missing+=(libgmp-dev)
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$include/Python.h" ] || missing+=(python3-dev)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: missing Debian packages: apt-get install ${missing[*]}" >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
# py-libp2p pulls in trio-typing, whose stubs describe a trio of 2021 and would hide trio's own types from mypy.
rm -rf .venv/lib/python*/site-packages/trio-stubs
touch .venv/.installed
