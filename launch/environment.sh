# shellcheck shell=bash
# Sourced by the scripts that a fresh checkout runs: makes .venv with mslt in it, and enters it. An argument names an
# extra of setup.py, as in `. launch/environment.sh dev`. Does nothing where that is done for this setup.py.
# Needs python3 (3.11 or newer) and a package index, no compiler.

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "mslt needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON to one." >&2
  exit 1
fi

extra=${1:+[$1]}
installed=.venv/installed$extra-$(cat setup.py launch/environment.sh | cksum | tr ' ' '-')
if [ ! -e "$installed" ]; then
  echo "Installing mslt$extra into .venv (once, a few minutes)" >&2
  # A torch that this Python has already (a cluster's module, a vendor's container) is used, not installed over.
  if "$python" -c 'import torch' 2>/dev/null; then
    "$python" -m venv --system-site-packages .venv
  else
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet 'torch==2.13.0'
  fi
  .venv/bin/python -m pip install --quiet --editable ".$extra"
  touch "$installed"
fi
# shellcheck source=/dev/null
. .venv/bin/activate
