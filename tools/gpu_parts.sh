# What the scripts for a machine with a GPU share: a folder for results, and parts with a time limit
# each. To be sourced; the folder is the script's first argument.
set -uo pipefail
out=${1:?give a folder for the results}
mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONUNBUFFERED=1

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    timeout -k 5 "$limit" bash -c '"$@"' part "$@" >"$out/$name.log" 2>&1
    printf '%-14s exit code %d, %3d s: %s\n' "$name" $? $((SECONDS - begin)) \
        "$(tail -n 1 "$out/$name.log" | cut -c 1-120)"
}

sanitized() { # TOOL ARGUMENTS OF PYTEST...
    local tool=$1
    shift
    # In CuPy's pool of memory, what is beyond an array would be no error.
    compute-sanitizer --tool "$tool" --error-exitcode 9 python -c 'import sys, cupy, pytest
cupy.cuda.set_allocator(None)
sys.exit(pytest.main(sys.argv[1:]))' -q -m gpu "$@"
}
export -f sanitized
