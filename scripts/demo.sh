#!/usr/bin/env bash
# Trains `topk` and `topk_sparse` side by side on a real language model. Options: --help.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec saelens-sparse compare --cache "$root/.cache" "$@"
