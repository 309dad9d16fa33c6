#!/bin/sh
# Wheels in clean environments of every Python named generate text without a compiler; on x86-64
# also on a CPU without AVX, emulated (Debian: qemu-user), where the text must be the same.
# usage: .ci/test_wheels.sh PYTHON...    in rising order: 3.13 and later take the wheel of 3.12
set -eu
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

generate() {  # arguments: what to put in front of Python, if anything, and Python
  env -i HOME="$work" PATH=/nonexistent CC=/nonexistent CXX=/nonexistent \
    "$@" -I -m nomatmul generate --prompt "The old" --max-tokens 12 --temperature 0 --echo
}

for python in "$@"; do
  name=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  case "$name" in
    3.10 | 3.11 | 3.12) "$python" -m pip wheel -q --no-deps -w "$work" . ;;
  esac
  "$python" -m venv "$work/$name"
  "$work/$name/bin/pip" install -q --only-binary :all: --find-links "$work" "nomatmul==$version"
  text=$(generate "$work/$name/bin/python")
  echo "Python $name: $text"
  if [ "$(uname -m)" = x86_64 ] && qemu=$(command -v qemu-x86_64); then
    old=$(generate "$qemu" -cpu Nehalem "$work/$name/bin/python")
    [ "$old" = "$text" ] || { echo "Python $name on a CPU without AVX: $old" >&2; exit 1; }
  else
    echo "Python $name: not tried on an old CPU (needs x86-64 and Debian's qemu-user)"
  fi
done
