#!/bin/sh
# NEON kernels against the scalar ones: cross-compiled for 64-bit Arm and run under qemu-user.
# Needs (Debian names) g++-aarch64-linux-gnu and qemu-user. CXX_ARM and QEMU_ARM name others.
set -eu
cd "$(dirname "$0")"
cxx=${CXX_ARM:-aarch64-linux-gnu-g++}
qemu=${QEMU_ARM:-qemu-aarch64}
for tool in "$cxx" "$qemu"; do
  command -v "$tool" > /dev/null || { echo "test-arm: $tool is not installed" >&2; exit 1; }
done
out=../build/arm
mkdir -p "$out"
flags="-std=c++17 -O2 -ffp-contract=off -Wall -Wextra -Wno-psabi -DNOMATMUL_HAVE_NEON"
for plain in kernels/scalar kernels/dispatch kernels/scalar_fff kernels/fff_dispatch \
  fff fff_batches memory thread_pool; do
  $cxx $flags -I. -c "$plain.cc" -o "$out/$(basename "$plain").o"
done
for vector in neon neon_fff; do
  $cxx $flags -march=armv8.2-a+dotprod -c "kernels/$vector.cc" -o "$out/$vector.o"
done
$cxx $flags -I. -static test_arm.cc fff_test_arm.cc "$out"/*.o -o "$out/test_arm" -pthread
"$qemu" -cpu max "$out/test_arm" neon
# A CPU without the dot product must fall back, not trap.
"$qemu" -cpu cortex-a53 "$out/test_arm"
