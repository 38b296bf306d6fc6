#!/bin/sh
# Checks an installed package, from any folder:
#   check_package.sh ENVIRONMENT MAIN [MADE_FOR]
# - the versions are those in MADE_FOR, the file next to Beam's boot binary
# - the launcher's entry point responds
# - the demo succeeds
set -eu
python=$1/bin/python main=$2 made_for=${3:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$python" -m pip check
"$python" -c "import platform, apache_beam; print(platform.python_version()[:4], apache_beam.__version__)" >versions
grep -q '^3\.11 ' versions || { echo "Python and Beam: $(cat versions); allowed: Python 3.11" >&2; exit 1; }
if [ -n "$made_for" ] && ! cmp -s "$made_for" versions; then
    echo "Python and Beam: $(cat versions), but the boot binary was built for $(cat "$made_for")" >&2
    exit 1
fi
if "$python" "$main" 2>said; then
    echo "$main: accepted missing parameters" >&2
    exit 1
fi
grep -q '^pairsift: --recipe: missing' said || { cat said >&2; exit 1; }
"$1/bin/pairsift" demo --output demo
test -s demo/subset.npy
