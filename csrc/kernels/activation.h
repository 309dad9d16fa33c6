// The activations of every table of kernels, by one name each.
#pragma once

namespace nomatmul {

enum class Activation : int { kGelu = 0, kSilu = 1, kRelu = 2, kRelu2 = 3 };

}  // namespace nomatmul
