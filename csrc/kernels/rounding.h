// How an int8 quantiser rounds what lies half-way.
#pragma once

namespace nomatmul {

enum class Rounding : int { kAway = 0, kEven = 1, kUp = 2 };  // from zero, to even, floor(v + 0.5)

}  // namespace nomatmul
