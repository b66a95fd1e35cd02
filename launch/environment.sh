# Sourced by the scripts that a fresh checkout runs: makes .venv with mslt and its tests' tools, and enters it.
# Does nothing where that is done for this setup.py. Needs python3 (3.11 or newer) and a package index, no compiler.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "mslt needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON to one." >&2
  exit 1
fi

installed=.venv/installed-$(cat setup.py launch/environment.sh | cksum | tr ' ' '-')
if [ ! -e "$installed" ]; then
  echo "Installing mslt into .venv (once, a few minutes)" >&2
  # A torch that this Python has already (a cluster's module, a vendor's container) is used, not installed over.
  if "$python" -c 'import torch' 2>/dev/null; then
    "$python" -m venv --system-site-packages .venv
  else
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet 'torch==2.13.0'
  fi
  .venv/bin/python -m pip install --quiet --editable '.[dev]'
  rm -f .venv/installed-*
  touch "$installed"
fi
. .venv/bin/activate
