#!/bin/sh
# The native core's tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a build and a
# package copy of their own. PYTHON names the interpreter (default python3); it needs the `dev`
# extra. Further arguments go to pytest.
set -eu
cd "$(dirname "$0")/../../.."
PYTHON=${PYTHON:-python3}
case "$PYTHON" in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac
CXX=${CXX:-c++}
build=build/asan

"$PYTHON" -m pip show -q cmake ninja >/dev/null 2>&1 || true
PATH=$(dirname "$PYTHON"):$PATH
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER="$CXX" \
  -DPython_EXECUTABLE="$PYTHON" -DNOMATMUL_SANITIZE=address,undefined >/dev/null
ninja -C "$build"

# The package's Python files, with the sanitized extension in place of any other.
rm -rf "$build/package"
mkdir -p "$build/package"
cp -R src/nomatmul "$build/package/nomatmul"
rm -f "$build/package/nomatmul"/_native*.so
cp "$build"/_native*.so "$build/package/nomatmul/"

# Python is not built with the sanitizers, so their run-time library has to come first. Leaks are
# not looked for: the interpreter never frees everything.
library=$("$CXX" -print-file-name=libasan.so)
standard=$("$CXX" -print-file-name=libstdc++.so.6)
[ $# -gt 0 ] || set -- tests/engine tests/parity
LD_PRELOAD="$library $standard" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 \
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
PYTHONPATH="$build/package" \
  "$PYTHON" -m pytest -p no:cacheprovider "$@"
