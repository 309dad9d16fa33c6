// One instruction set: its tables of kernels. Everything above this header (graph, thread pool,
// bindings) is written once over it.
#pragma once

#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/dense.h"
#include "kernels/panels.h"
#include "kernels/ternary.h"
#include "kernels/trees.h"

namespace nomatmul {

// An instruction set without tables of its own shares those of the next lower one.
struct Isa {
  const char* name;  // "scalar" "avx2" "avx512vnni" "amx" "neon"
  const TernaryKernels* ternary;
  const TreeKernels* trees;
  const DenseKernels* dense;
  const AttentionKernels* attention;
  const PanelKernels* panels;
};

// nullptr if the ISA is unknown, not compiled in, or not supported by this CPU and its OS.
const Isa* find_isa(const char* name);

// Supported ISAs, best first; "scalar" is always the last.
std::vector<std::string> available_isas();

// The best supported ISA, or the one that NOMATMUL_ISA names. nullptr, with the reason in *error,
// if NOMATMUL_ISA names one that is unknown or absent; the reason lists the available ones.
const Isa* best_isa(std::string* error = nullptr);

}  // namespace nomatmul
