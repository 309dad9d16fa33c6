// Runs the accelerator's Verilog as a board would: a clock, a memory, a host on the bus.
//
// Standard input has one command a line, "ID WANT FRESH" (WANT: 0 no logits, 1 the largest one,
// 2 all); standard output answers each with one JSON object. Whatever the design does, an answer
// comes: a limit of cycles a token, one of a bus access, and the design's own faults end in an
// object with "error", which names where the design stands, and exit status 3.
//
// Compiled with MEMORY_BITS, ELEMENTS (of a group), VECTOR_BITS, STATE_BITS, PROBE (0 or 1) and
// WAVES (0 none, 1 VCD, 2 FST).

#include <array>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "board.h"
#include "options.h"
#include "registers.h"

namespace {

using Counts = std::array<std::uint64_t, registers::kCounterNames.size()>;

struct Command {
  std::uint32_t id = 0;
  int want = 0;  // 0 no logits, 1 the largest one, 2 all
  bool fresh = false;
};

// False where the line is none.
bool read_command(const std::string& line, Command& command) {
  std::istringstream words(line);
  long long id = 0, want = 0, fresh = 0;
  std::string rest;
  if (!(words >> id >> want >> fresh) || (words >> rest)) return false;
  if (id < 0 || id >= (1LL << 20) || want < 0 || want > 2 || fresh < 0 || fresh > 1) return false;
  command = {static_cast<std::uint32_t>(id), static_cast<int>(want), fresh == 1};
  return true;
}

class Host {
 public:
  Host(const Options& options, Board& board) : board_(board), program_(read_file(options.program)) {
    if (!options.timeline.empty()) {
      timeline_.open(options.timeline);
      if (!timeline_) usage("cannot write " + options.timeline);
    }
    limit_ = options.limit;
    start();
  }

  // Runs one token and returns its answer as JSON.
  std::string token(const Command& command) {
    // what came before the first token, constants that are loaded, belongs to it
    if (answered_) board_.log().restart();
    board_.set_deadline(limit_);
    const std::uint32_t tokens = board_.read(registers::kTokens);
    const std::uint32_t answers = board_.read(registers::kAnswers);
    const std::uint64_t words = board_.memory().delivered(), start = board_.cycle();
    std::uint32_t word = command.id | (command.fresh ? registers::kFresh : 0u);
    if (command.want != 0) word |= registers::kWantLogits;
    if (command.want == 1) word |= registers::kArgmaxOnly;
    board_.write(registers::kControl, 0);  // the counters go on
    board_.write(registers::kToken, word);
    std::vector<std::int32_t> logits;
    const std::uint32_t status = wait(command.want, tokens, answers, logits);
    const std::uint64_t end = board_.cycle();
    board_.write(registers::kControl, registers::kFreeze);
    std::ostringstream out;
    out << "{\"token\":" << command.id << ",\"status\":" << status << ",\"cycle\":" << end
        << ",\"elapsed\":" << end - start << ",\"words\":" << board_.memory().delivered() - words;
    if (command.want != 0) {
      out << ",\"argmax\":" << board_.read(registers::kArgmax) << ",\"argmax_value\":"
          << static_cast<std::int32_t>(board_.read(registers::kArgmaxValue));
    }
    if (command.want == 2) {
      out << ",\"logits\":[";
      for (std::size_t i = 0; i < logits.size(); ++i) out << (i != 0 ? "," : "") << logits[i];
      out << "]";
    }
    add_counts(out);
    out << "}";
    board_.log().flush();
    timeline_.flush();
    answered_ = true;
    return out.str();
  }

  // In the beginning and behind a reset, which may also come while the program is loaded.
  void start() {
    before_ = Counts{};
    answered_ = false;
    board_.log().restart();
    try {
      board_.load(program_);
    } catch (const Stopped&) {
      if (!board_.take_reset()) throw;
      board_.load(program_);
    }
  }

  // Where the design stands, for an answer that says what went wrong.
  std::string where() {
    std::ostringstream out;
    out << ",\"cycle\":" << board_.cycle() << ",\"bursts\":" << board_.memory().bursts();
    board_.set_deadline(1u << 16);
    try {
      out << ",\"instruction\":" << board_.read(registers::kPc)
          << ",\"status\":" << board_.read(registers::kStatus);
      add_counts(out);
    } catch (const Stopped&) {  // the bus is what hangs
      out << ",\"bus\":\"dead\"";
    }
    board_.log().flush();
    return out.str();
  }

 private:
  std::uint32_t wait(int want, std::uint32_t tokens, std::uint32_t answers,
                     std::vector<std::int32_t>& logits) {
    while (true) {
      // in this order: a design that waits for a token may be about to take this one
      const bool taken = board_.read(registers::kTokens) != tokens;
      const std::uint32_t status = board_.read(registers::kStatus);
      if (status & registers::kBadToken) throw Stopped{"the token is not in the vocabulary"};
      if (status & registers::kHalted) throw Stopped{"the design halted"};
      add_timeline();
      const bool answered = want == 0 || board_.read(registers::kAnswers) != answers;
      if (want == 2) {
        for (std::uint32_t n = board_.read(registers::kLogitsWaiting); n != 0; --n) {
          logits.push_back(static_cast<std::int32_t>(board_.read(registers::kLogit)));
        }
      }
      if (taken && answered && (status & registers::kWaiting)) return status;
    }
  }

  // The low halves of the counters as they are now: simulate/plot.py takes the differences.
  void add_timeline() {
    if (!timeline_.is_open()) return;
    timeline_ << board_.cycle() << ' ' << board_.read(registers::kPc);
    for (std::uint32_t i = 0; i < registers::kCounterNames.size(); ++i) {
      timeline_ << ' ' << board_.read(registers::kCounters + 2 * i);
    }
    timeline_ << '\n';
  }

  // The counters since the last answer.
  void add_counts(std::ostringstream& out) {
    out << ",\"counters\":{";
    for (std::uint32_t i = 0; i < before_.size(); ++i) {
      const std::uint32_t at = registers::kCounters + 2 * i;
      std::uint64_t now = board_.read(at);
      now |= static_cast<std::uint64_t>(board_.read(at + 1)) << registers::kCounterHalf;
      out << (i != 0 ? "," : "") << '"' << registers::kCounterNames[i] << "\":" << now - before_[i];
      before_[i] = now;
    }
    out << "}";
  }

  Board& board_;
  const std::vector<std::uint8_t> program_;
  std::ofstream timeline_;
  std::uint64_t limit_ = 0;
  bool answered_ = false;
  Counts before_{};
};

std::string failure(const Stopped& stopped, const std::string& where) {
  return "{\"error\":\"" + stopped.what + "\"" + where + "}";
}

int serve(const Options& options) {
  const Mapped image(options.image);
  Board board(options, image);
  std::unique_ptr<Host> host;
  try {
    host = std::make_unique<Host>(options, board);
  } catch (const Stopped& stopped) {
    std::cout << failure(stopped, "") << std::endl;
    return 3;
  }
  std::string line;
  while (std::getline(std::cin, line)) {
    Command command;
    if (!read_command(line, command)) usage("no command: " + line);
    try {
      std::cout << host->token(command) << std::endl;
    } catch (const Stopped& stopped) {
      if (!board.take_reset()) {
        std::cout << failure(stopped, host->where()) << std::endl;
        return 3;
      }
      host->start();
      std::cout << "{\"reset\":true,\"cycle\":" << board.cycle() << "}" << std::endl;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return serve(parse(argc, argv)); }
