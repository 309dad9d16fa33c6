// The board: a clock, the design, its memory, and a bus on which a host reads and writes registers.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "Vbench.h"
#include "events.h"
#include "memory.h"
#include "options.h"
#include "registers.h"  // written from hardware/registers.py when this is built
#include "verilated.h"
#if WAVES == 1
#include "verilated_vcd_c.h"
using Waves = VerilatedVcdC;
#elif WAVES == 2
#include "verilated_fst_c.h"
using Waves = VerilatedFstC;
#endif

class Board {
 public:
  Board(const Options& options, const Mapped& image)
      : o_(options), memory_(options, image), log_(options.events), top_(&context_, "bench") {
    if (o_.stalls) random_.seed(*o_.stalls + 1);
#if WAVES
    if (!o_.waves.empty()) {
      context_.traceEverOn(true);
      top_.trace(&waves_, 99);
      waves_.open(o_.waves.c_str());
      if (!waves_.isOpen()) usage("cannot write " + o_.waves);
    }
#endif
    reset();
  }
  ~Board() {
    top_.final();
#if WAVES
    if (!o_.waves.empty()) waves_.close();
#endif
  }
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  void load(const std::vector<std::uint8_t>& program) {
    write(registers::kProgramAddress, 0);
    for (std::size_t at = 0; at + 4 <= program.size(); at += 4) {
      std::uint32_t word = 0;
      std::memcpy(&word, program.data() + at, 4);
      write(registers::kProgramData, word);
    }
    write(registers::kControl, registers::kRun | registers::kClear);
  }

  std::uint32_t read(std::uint32_t address) { return access(address, false, 0); }
  void write(std::uint32_t address, std::uint32_t value) { access(address, true, value); }

  std::uint64_t cycle() const { return cycle_; }
  const Memory& memory() const { return memory_; }
  Log& log() { return log_; }
  bool take_reset() { return std::exchange(was_reset_, false); }

  // From now on accesses give up after so many cycles.
  void set_deadline(std::uint64_t cycles) { deadline_ = cycle_ + cycles; }

 private:
  static constexpr std::uint64_t kBusLimit = 4096;  // cycles of one access

  void reset() {
    top_.bus_cyc = top_.bus_stb = top_.bus_we = 0;
    top_.rst = 1;
    for (int i = 0; i < 4; ++i) {
      step();
      memory_.forget();
    }
    top_.rst = 0;
  }

  void step() {
    // whoever asked has gone, however suddenly: nobody reads the answer
    if (cycle_ % 65536 == 0 && o_.parent != 0 && getppid() != static_cast<pid_t>(o_.parent)) {
      std::_Exit(4);
    }
    top_.clk = 0;
    top_.eval();
    dump(0);
    memory_.sample(top_);
    log_.sample(top_);
    acknowledged_ = top_.bus_ack;
    data_ = top_.bus_dat_r;
    top_.clk = 1;
    top_.eval();
    dump(1);
    memory_.drive(top_);
    ++cycle_;
  }

  void dump([[maybe_unused]] std::uint64_t half) {
#if WAVES
    if (!o_.waves.empty()) waves_.dump(2 * cycle_ + half);
#endif
  }

  std::uint32_t access(std::uint32_t address, bool writes, std::uint32_t value) {
    if (o_.reset && cycle_ >= *o_.reset && !reset_done_) {
      reset_done_ = was_reset_ = true;
      reset();
      throw Stopped{"reset"};
    }
    if (o_.stalls) {
      for (std::uint64_t n = random_() % 6; n != 0; --n) step();
    }
    top_.bus_adr = static_cast<std::remove_reference_t<decltype(top_.bus_adr)>>(address);
    top_.bus_dat_w = value;
    top_.bus_we = writes;
    top_.bus_cyc = top_.bus_stb = 1;
    const std::uint64_t end = cycle_ + kBusLimit;
    do {
      if (cycle_ >= end) throw Stopped{"the bus gives no answer"};
      step();
    } while (!acknowledged_);
    top_.bus_cyc = top_.bus_stb = top_.bus_we = 0;
    const std::uint32_t found = data_;
    step();  // a cycle without `stb` between two accesses
    if (cycle_ > deadline_) throw Stopped{"the token takes more cycles than the limit"};
    return found;
  }

  const Options& o_;
  Memory memory_;
  Log log_;
  VerilatedContext context_;
  Vbench top_;
#if WAVES
  Waves waves_;
#endif
  std::uint64_t cycle_ = 0, deadline_ = ~std::uint64_t{0};
  std::uint32_t data_ = 0;
  bool acknowledged_ = false, reset_done_ = false, was_reset_ = false;
  std::mt19937_64 random_;
};
