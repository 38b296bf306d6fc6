#!/bin/sh
# Downloads models from their hub, each at a commit, with weights in safetensors format only:
#   fetch_models.sh FOLDER ORG/NAME@COMMIT …
set -eu
folder=$1
shift
mkdir -p "$folder"
[ $# -gt 0 ] || exit 0
for model in "$@"; do
    case $model in
    */*@*) ;;
    *)
        echo "MODELS: got $model; allowed: ORG/NAME@COMMIT" >&2
        exit 2
        ;;
    esac
done
cd "$(dirname "$0")"
python3.11 -m pip install --quiet --constraint constraints.txt huggingface_hub
for model in "$@"; do
    hf download "${model%@*}" --revision "${model#*@}" --local-dir "$folder/${model%@*}" \
        --include '*.json' --include '*.txt' --include '*.model' --include '*.safetensors'
    ls "$folder/${model%@*}"/*config.json "$folder/${model%@*}"/*.safetensors >/dev/null
    rm -rf "$folder/${model%@*}/.cache"
done
