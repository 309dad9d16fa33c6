// Which ISAs may run here: compiled in, offered by the CPU, and with their registers saved by the
// operating system. Checked once; the answer cannot change while the process lives.
#include <cstdlib>
#include <cstring>

#include "kernels/isa.h"

// The build defines NOMATMUL_HAVE_<ISA> for each file that its compiler could build.
#if defined(NOMATMUL_HAVE_AVX2) || defined(NOMATMUL_HAVE_AVX512VNNI) || defined(NOMATMUL_HAVE_AMX)
#define NOMATMUL_X86
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(NOMATMUL_HAVE_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace nomatmul {
namespace {

#if defined(NOMATMUL_X86)

// State components that the OS saves on a context switch (Intel SDM 13.1).
constexpr uint64_t kYmmState = 0x6;       // XMM, YMM
constexpr uint64_t kZmmState = 0xe6;      // and opmask, ZMM_Hi256, Hi16_ZMM
constexpr uint64_t kTileState = 0x60000;  // XTILECFG, XTILEDATA
constexpr unsigned long kTileDataFeature = 18;

struct CpuFeatures {
  unsigned leaf1_c = 0, leaf7_b = 0, leaf7_c = 0, leaf7_d = 0;
  uint64_t saved = 0;
};

CpuFeatures read_features() {
  CpuFeatures f;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  f.leaf1_c = c;
  if (f.leaf1_c & bit_OSXSAVE) {
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    f.saved = (static_cast<uint64_t>(high) << 32) | low;
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.leaf7_b = b;
    f.leaf7_c = c;
    f.leaf7_d = d;
  }
  return f;
}

bool has_all(unsigned value, unsigned bits) { return (value & bits) == bits; }
bool saves(const CpuFeatures& f, uint64_t state) { return (f.saved & state) == state; }

// Everything that the build's flags for the files of avx2/ let the compiler use.
bool has_avx2(const CpuFeatures& f) {
  constexpr unsigned kAvx2 = 1u << 5, kBmi2 = 1u << 8;
  return has_all(f.leaf1_c, bit_AVX | bit_FMA | bit_F16C) && has_all(f.leaf7_b, kAvx2 | kBmi2) &&
         saves(f, kYmmState);
}

[[maybe_unused]] bool has_avx512vnni(const CpuFeatures& f) {
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr unsigned kVnni = 1u << 11;
  return has_avx2(f) && has_all(f.leaf7_b, kF | kDq | kBw | kVl) && has_all(f.leaf7_c, kVnni) &&
         saves(f, kZmmState);
}

// Linux hands out tile registers on request only (the answer holds for threads started later too,
// since they inherit it; it is asked for once, here).
bool tile_permission() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileDataFeature) == 0;
#else
  return false;
#endif
}

[[maybe_unused]] bool has_amx(const CpuFeatures& f) {
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  return has_avx512vnni(f) && has_all(f.leaf7_d, kTile | kInt8) && saves(f, kTileState) &&
         tile_permission();
}

#endif

// Best first.
std::vector<Isa> find_supported() {
  std::vector<Isa> found;
#if defined(NOMATMUL_X86)
  const CpuFeatures f = read_features();
#if defined(NOMATMUL_HAVE_AMX)
  if (has_amx(f)) {
    found.push_back({"amx", &kAmxTernary, &kAvx512VnniTrees, &kAvx512VnniDense,
                     &kAvx512VnniAttention, &kAmxPanels});
  }
#endif
#if defined(NOMATMUL_HAVE_AVX512VNNI)
  if (has_avx512vnni(f)) {
    found.push_back({"avx512vnni", &kAvx512VnniTernary, &kAvx512VnniTrees, &kAvx512VnniDense,
                     &kAvx512VnniAttention, &kAvx512VnniPanels});
  }
#endif
#if defined(NOMATMUL_HAVE_AVX2)
  if (has_avx2(f)) {
    found.push_back(
        {"avx2", &kAvx2Ternary, &kAvx2Trees, &kAvx2Dense, &kAvx2Attention, &kAvx2Panels});
  }
#endif
#elif defined(NOMATMUL_HAVE_NEON)
  // Every 64-bit Apple CPU has the dot product.
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP)
#endif
    found.push_back(
        {"neon", &kNeonTernary, &kNeonTrees, &kScalarDense, &kNeonAttention, &kNeonPanels});
#endif
  found.push_back(
      {"scalar", &kScalarTernary, &kScalarTrees, &kScalarDense, &kScalarAttention, &kScalarPanels});
  return found;
}

const std::vector<Isa>& supported() {
  static const std::vector<Isa> found = find_supported();
  return found;
}

}  // namespace

const Isa* find_isa(const char* name) {
  for (const Isa& isa : supported()) {
    if (std::strcmp(isa.name, name) == 0) return &isa;
  }
  return nullptr;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : supported()) names.emplace_back(isa.name);
  return names;
}

const Isa* best_isa(std::string* error) {
  const char* forced = std::getenv("NOMATMUL_ISA");
  if (forced == nullptr || *forced == '\0') return &supported().front();
  const Isa* isa = find_isa(forced);
  if (isa == nullptr && error != nullptr) {
    *error = std::string("NOMATMUL_ISA=") + forced + " is not available here; available:";
    for (const std::string& name : available_isas()) *error += " " + name;
  }
  return isa;
}

}  // namespace nomatmul
