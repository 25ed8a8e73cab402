#!/bin/sh
# The steps of both recipes (Dockerfile, tmass-dist.def), run as root in Debian 12 by `install.sh system`, `libraries`, `package`:
# Debian's packages; the locked libraries in VENV; this project, beside which its commands find launch/ and shards/.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
VENV=${VENV:-/opt/venv}

case "$1" in
system)
  apt-get update -q
  # gcc and the headers of Python: torch.compile (engine.compile) builds kernels with them.
  apt-get install -y -q --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv
  rm -rf /var/lib/apt/lists/*
  ;;
libraries)
  python3 -m venv "$VENV"
  # Each file must have a checksum of the lock, and nothing outside the lock is installed.
  "$VENV/bin/python" -m pip install --no-cache-dir --require-hashes --no-deps -r "$HERE/requirements.lock"
  ;;
package)
  "$VENV/bin/python" -m pip install --no-cache-dir --no-deps --no-build-isolation -e "$HERE/../.."
  "$VENV/bin/python" -m pip check
  ;;
*)
  echo "usage: install.sh system|libraries|package" >&2
  exit 2
  ;;
esac
