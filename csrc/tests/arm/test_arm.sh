#!/bin/sh
# NEON kernels against the scalar ones: cross-compiled for 64-bit Arm and run under qemu-user.
# Needs (Debian names) g++-aarch64-linux-gnu and qemu-user. CXX_ARM and QEMU_ARM name others.
set -eu
cd "$(dirname "$0")/../.."
cxx=${CXX_ARM:-aarch64-linux-gnu-g++}
qemu=${QEMU_ARM:-qemu-aarch64}
for tool in "$cxx" "$qemu"; do
  command -v "$tool" > /dev/null || { echo "test-arm: $tool is not installed" >&2; exit 1; }
done
out=../build/arm
rm -rf "$out"
mkdir -p "$out"
flags="-std=c++17 -O2 -ffp-contract=off -Wall -Wextra -Wno-psabi -DNOMATMUL_HAVE_NEON -I."
for source in kernels/dispatch.cc kernels/scalar/*.cc kernels/neon/*.cc core/channels/fff.cc \
  core/channels/fff_batches.cc core/linears/panel_weights.cc core/memory.cc core/pages.cc \
  core/thread_pool.cc; do
  case "$source" in kernels/neon/*) isa=-march=armv8.2-a+dotprod ;; *) isa= ;; esac
  $cxx $flags $isa -c "$source" -o "$out/$(echo "$source" | tr / _).o"
done
$cxx $flags -static tests/arm/*.cc "$out"/*.o -o "$out/test_arm" -pthread
"$qemu" -cpu max "$out/test_arm" neon
# A CPU without the dot product must fall back, not trap.
"$qemu" -cpu cortex-a53 "$out/test_arm"
