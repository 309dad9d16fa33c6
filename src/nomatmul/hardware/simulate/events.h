// The log of what the design wrote: events of one size, as simulate/events.py reads them.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>

#include "Vbench.h"
#include "options.h"
#include "verilated.h"

enum Kind : std::uint8_t {
  kVector = 1,
  kActivation,
  kScalar,
  kParameter,
  kState,
  kLogit,
  kRetired
};

struct Event {
  std::uint8_t kind, pad[3];
  std::uint32_t address;
  std::int32_t value, more;
  std::uint8_t data[2 * ELEMENTS];
};
static_assert(sizeof(Event) == 16 + 2 * ELEMENTS);

template <class T, std::enable_if_t<std::is_integral_v<T>, int> = 0>
void get_port(const T& port, std::uint8_t* bytes, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    bytes[i] = static_cast<std::uint8_t>(static_cast<std::uint64_t>(port) >> (8 * i));
  }
}

template <std::size_t N>
void get_port(const VlWide<N>& port, std::uint8_t* bytes, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    bytes[i] = static_cast<std::uint8_t>(port[i / 4] >> (8 * (i % 4)));
  }
}

inline std::int32_t sign_extend(std::uint64_t value, int bits) {
  const std::int64_t sign = std::int64_t{1} << (bits - 1);
  const std::int64_t low = static_cast<std::int64_t>(value) & ((sign << 1) - 1);
  return static_cast<std::int32_t>((low ^ sign) - sign);
}

class Log {
 public:
  explicit Log(const std::string& path) {
    if (path.empty()) return;
    file_ = std::fopen(path.c_str(), "wb");
    if (file_ == nullptr) usage("cannot write " + path);
  }
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;
  ~Log() {
    if (file_ != nullptr) std::fclose(file_);
  }

  // Begins the file anew: its reader has taken what was there.
  void restart() {
    if (file_ == nullptr) return;
    std::rewind(file_);
    if (ftruncate(fileno(file_), 0) != 0) usage("cannot cut the log short");
  }

  void flush() {
    if (file_ != nullptr && std::fflush(file_) != 0) usage("cannot write the log");
  }

  // Before the clock's edge: what it writes.
  void sample([[maybe_unused]] const Vbench& top) {
#if PROBE
    if (file_ == nullptr) return;
    if (top.probe_vector_valid) {
      put(kVector, top.probe_vector_address, sign_extend(top.probe_vector_data, VECTOR_BITS));
    }
    if (top.probe_activation_valid) {
      Event event = of(kActivation, top.probe_activation_address, 0, 0);
      get_port(top.probe_activation_data, event.data, ELEMENTS);
      write(event);
    }
    if (top.probe_scalar_valid) {
      put(kScalar, top.probe_scalar_address, static_cast<std::int32_t>(top.probe_scalar_m),
          sign_extend(top.probe_scalar_e, 10));
    }
    if (top.probe_parameter_valid) {
      const auto mask = static_cast<std::uint32_t>(top.probe_parameter_mask);
      Event event = of(kParameter, top.probe_parameter_address, sign_extend(mask, 32), 0);
      get_port(top.probe_parameter_data, event.data, 2 * ELEMENTS);
      write(event);
    }
    if (top.probe_state_valid) {
      put(kState, top.probe_state_address, sign_extend(top.probe_state_data, STATE_BITS));
    }
    if (top.probe_logit_valid) {
      put(kLogit, top.probe_logit_last, sign_extend(top.probe_logit_value, VECTOR_BITS));
    }
    // last: what an instruction writes in the cycle in which it retires belongs to it
    if (top.probe_retired_valid) put(kRetired, top.probe_retired_index, 0);
#endif
  }

 private:
  static Event of(Kind kind, std::uint32_t address, std::int32_t value, std::int32_t more) {
    Event event{};
    event.kind = kind;
    event.address = address;
    event.value = value;
    event.more = more;
    return event;
  }

  void put(Kind kind, std::uint32_t address, std::int32_t value, std::int32_t more = 0) {
    write(of(kind, address, value, more));
  }

  void write(const Event& event) {
    if (std::fwrite(&event, sizeof event, 1, file_) != 1) usage("cannot write the log");
  }

  std::FILE* file_ = nullptr;
};
