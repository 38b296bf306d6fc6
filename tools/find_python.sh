#!/bin/sh
# Prints the path of a Python 3.11 that can create virtual environments. Candidates, in order: $PYTHON (only this one, if
# set); python3.11, python3 and python on the PATH; pyenv's versions; and the one that uv finds. If there is none, prints a
# message and exits with status 1.
set -eu

usable() { # prints the absolute path if it runs, is 3.11, and has venv and ensurepip
    "$1" -c 'import sys, ensurepip, venv; assert sys.version_info[:2] == (3, 11); print(sys.executable)' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && exit
    echo "PYTHON: got $PYTHON; allowed: a Python 3.11 with the modules venv and ensurepip" >&2
    exit 1
fi
for candidate in python3.11 python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.11*/bin/python; do
    usable "$candidate" && exit
done
if command -v uv >/dev/null; then
    candidate=$(uv python find --system 3.11 2>/dev/null) && usable "$candidate" && exit
fi
cat >&2 <<'END'
No Python 3.11 with the modules venv and ensurepip was found on the PATH (python3.11, python3, python), in
~/.pyenv/versions, or by uv. Install one (Debian, Ubuntu: python3.11 and python3.11-venv; pyenv install 3.11;
uv python install 3.11), or name it: make PYTHON=/path/to/python3.11
END
exit 1
