#!/bin/sh
# Creates an environment with this package and its pinned dependencies, as in the image:
#   tools/install_package.sh FOLDER gpu|cpu|cu126
set -eu
folder=$1 processor=$2
cd "$(dirname "$0")/.."
case $processor in
gpu | cpu | cu126) ;;
*)
    echo "PROCESSOR: got $processor; allowed: gpu, cpu, cu126" >&2
    exit 2
    ;;
esac
pinned() { sed -n "s/^$1==//p" constraints.txt; }

python=$(tools/find_python.sh)
"$python" -m venv "$folder"
if [ "$processor" != gpu ]; then # PyPI's torch includes CUDA 13
    "$folder/bin/python" -m pip install --quiet --constraint constraints.txt \
        --extra-index-url "https://download.pytorch.org/whl/$processor" \
        "torch==$(pinned torch)+$processor" "torchvision==$(pinned torchvision)+$processor"
fi
"$folder/bin/python" -m pip install --quiet --constraint constraints.txt .
"$folder/bin/python" -m pip check
