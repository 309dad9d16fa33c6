// IEEE half precision in software, rounded to nearest even as the instructions do.
#pragma once

#include <cstdint>
#include <cstring>

namespace nomatmul {
namespace {

inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, size = half & 0x7fff;
  uint32_t bits = sign | ((size << 13) + (112u << 23));
  if (size >= 0x7c00) bits = sign | 0x7f800000 | (size << 13);  // infinity, NaN
  float value;
  std::memcpy(&value, &bits, sizeof value);
  if (size < 0x0400) {  // zero, or below the normal numbers: so many 2^-24
    value = static_cast<float>(size) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  return value;
}

inline uint16_t half_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t size = bits & 0x7fffffff;
  if (size > 0x7f800000) return sign | 0x7e00;
  if (size >= 0x47800000) return sign | 0x7c00;  // from 65536 on
  if (size < 0x38800000) {                       // below 2^-14: adding 0.5 rounds to 2^-24
    float shifted;
    std::memcpy(&shifted, &size, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  // half a unit, or a little less where the last bit that stays is 0; a carry goes into the
  // exponent
  return static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

}  // namespace
}  // namespace nomatmul
