#!/bin/sh
# Checks an installed package, wherever it is called from:
#   check_package.sh ENVIRONMENT MAIN [MADE_FOR]
# versions agree with those that MADE_FOR, the file beside Beam's boot binary, names; the launcher's entry point answers;
# the demo runs through.
set -eu
python=$1/bin/python main=$2 made_for=${3:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$python" -m pip check
"$python" -c "import platform, apache_beam; print(platform.python_version()[:4], apache_beam.__version__)" >versions
grep -q '^3\.11 ' versions || { echo "Python and Beam: $(cat versions); allowed: Python 3.11" >&2; exit 1; }
if [ -n "$made_for" ] && ! cmp -s "$made_for" versions; then
    echo "Python and Beam: $(cat versions), but the boot binary is made for $(cat "$made_for")" >&2
    exit 1
fi
if "$python" "$main" 2>said; then
    echo "$main: took no parameters for right" >&2
    exit 1
fi
grep -q '^pairsift: --recipe: missing' said || { cat said >&2; exit 1; }
"$1/bin/pairsift" demo --output demo
test -s demo/subset.npy
