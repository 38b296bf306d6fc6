#!/bin/sh
# Prints the path of a Python 3.11 that can create virtual environments. Candidates, in order: $PYTHON (alone, if it is
# set), python3.11, python3 and python on the PATH, pyenv's versions, and what uv knows. Exit status 1 and a message if
# there is none.
set -eu

usable() { # its path in full, if it runs, is 3.11 and has venv and pip's wheels
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
No Python 3.11 with the modules venv and ensurepip was found: not as python3.11, python3 or python on the PATH, not in
~/.pyenv/versions, and not by uv. Install one (Debian, Ubuntu: python3.11 and python3.11-venv; pyenv install 3.11;
uv python install 3.11), or name it: make PYTHON=/path/to/python3.11
END
exit 1
