# Sourced by the scripts beside it, by sh or bash: finds a Python, makes the virtual environment, installs jaxgen.
#
#   . launch/setup.sh     needs $root, the repository; sets $venv and $python, which is the Python of $venv
#   set_up [EXTRA ...]    makes both ready; does nothing where that was done before with the same pyproject.toml
#
# $venv/.jaxgen marks the folder as ours and holds a stamp for each installed extra, written after pip succeeded:
# an interrupted installation has none and is done again.

venv=${JAXGEN_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
python=$venv/bin/python

stop() { # the user has something to mend
    printf '%s\n' "$1" >&2
    exit 2
}

is_suitable() { # by running it: a version manager's shim may exist and fail
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

can_make_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

minor_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

choose_python() { # sets $interpreter
    advice="install them (on Debian and Ubuntu: the package python3-venv) or name another Python in the variable PYTHON."
    if [ -n "${PYTHON:-}" ]; then
        interpreter=$PYTHON
        is_suitable "$PYTHON" || stop "PYTHON=$PYTHON is no working Python of version 3.11 or later: name another, or unset it."
        can_make_venv "$PYTHON" || stop "PYTHON=$PYTHON lacks the modules venv and ensurepip: $advice"
        return
    fi
    incomplete=
    for interpreter in python3.13 python3.12 python3.11 python3; do
        is_suitable "$interpreter" || continue
        can_make_venv "$interpreter" && return
        incomplete=$interpreter
    done
    [ -z "$incomplete" ] || stop "$incomplete lacks the modules venv and ensurepip: $advice"
    stop "No Python of version 3.11 or later was found: install one, or name it in the variable PYTHON."
}

make_venv() {
    if is_suitable "$python"; then
        if [ -n "${PYTHON:-}" ] && [ "$(minor_version "$PYTHON")" != "$(minor_version "$python")" ]; then
            stop "$venv holds Python $(minor_version "$python") but PYTHON=$PYTHON is another: remove that folder, set JAXGEN_VENV to another, or unset PYTHON."
        fi
        is_installed base && return
        "$python" -m pip --version >/dev/null 2>&1 && return
    fi
    if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && [ ! -d "$venv/.jaxgen" ]; then
        stop "$venv exists and is no virtual environment with pip and Python 3.11 or later: remove it, or set JAXGEN_VENV to another folder."
    fi
    choose_python
    echo "Making $venv with $("$interpreter" --version)."
    mkdir -p "$venv/.jaxgen" || stop "The folder $venv cannot be made: set JAXGEN_VENV to another."
    # What is left of an interrupted start, or of a Python that is gone.
    for rest in .jaxgen/base .jaxgen/cuda .jaxgen/test .jaxgen/peers bin lib lib64 include pyvenv.cfg; do
        rm -rf "${venv:?}/$rest"
    done
    "$interpreter" -m venv "$venv" || stop "The virtual environment $venv could not be made; the lines above say why."
}

fingerprint() { # what an installation depends on; the folder is part of it, for the installation points to it
    { cat "$root/pyproject.toml" && printf '%s\n' "$root"; } | cksum
}

is_installed() { # EXTRA
    [ "$(cat "$venv/.jaxgen/$1" 2>/dev/null)" = "$(fingerprint)" ]
}

install() { # EXTRA ...
    extras=$(IFS=, && printf '%s' "$*")
    package=.${extras:+[$extras]}
    echo "Installing jaxgen${extras:+[$extras]} and what it needs into $venv: some minutes."
    (
        cd "$root"
        export PIP_QUIET="${PIP_QUIET:-1}" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
        exec "$python" -m pip install --editable "$package"
    ) || stop "The installation failed; the lines above say why, and the same command tries again."
    mkdir -p "$venv/.jaxgen"
    for extra in base "$@"; do
        fingerprint >"$venv/.jaxgen/$extra"
    done
}

set_up() { # EXTRA ...
    make_venv
    for extra in base "$@"; do
        if ! is_installed "$extra"; then
            install "$@"
            return
        fi
    done
}

has_nvidia_gpu() {
    [ "$(uname -s)" = Linux ] && { nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia ]; }
}

# On Linux the usual PyTorch brings gigabytes of CUDA libraries. Its CPU build has +cpu in its version, and pip takes
# it by itself where it is offered; on other systems the usual build is the CPU build.
offers_cpu_torch() {
    [ "$(uname -s)" = Linux ] || return 0
    pinned=$(sed -n 's/.*"torch==\([0-9.]*\)".*/\1/p' "$root/pyproject.toml")
    PIP_QUIET=0 "$python" -m pip index versions torch 2>/dev/null | grep -qF "${pinned:?}+cpu"
}

wants_peers() {
    case ${JAXGEN_PEERS:-auto} in
        1) return 0 ;;
        0) return 1 ;;
        auto) ;;
        *) stop "JAXGEN_PEERS=$JAXGEN_PEERS means nothing: give 1, 0 or auto." ;;
    esac
    make_venv
    if is_installed test; then # decided then
        is_installed peers
        return
    fi
    offers_cpu_torch && return
    echo "Leaving out the comparisons with PyTorch: pip offers this Python no CPU build of it (JAXGEN_PEERS=1 takes the gigabytes)."
    return 1
}
