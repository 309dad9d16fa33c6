// What a run of the simulation is told, and how it complains.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <vector>

struct Options {
  std::string program, image, events, timeline, waves;
  std::uint64_t latency = 30, gap = 0, refresh_every = 0, refresh_cycles = 0, outstanding = 8;
  std::uint64_t limit = 2'000'000'000;  // cycles of a token
  std::uint64_t parent = 0;             // the process that asks; 0: whoever it is
  double bytes_a_cycle = 0;             // 0: a word each cycle
  std::optional<std::uint64_t> stalls;
  std::optional<std::uint64_t> bad_code, error, reset;  // faults: a word, a word, a cycle
};

// Why a run cannot go on; `what` is the value of "error" in the answer.
struct Stopped {
  std::string what;
};

[[noreturn]] inline void usage(const std::string& why) {
  std::cerr << "harness: " << why << std::endl;
  std::exit(2);
}

inline std::uint64_t number(const std::string& name, const std::string& text) {
  if (text.empty() || text.size() > 18 ||
      text.find_first_not_of("0123456789") != std::string::npos) {
    usage(name + " is '" + text + "', not a whole number");
  }
  return std::stoull(text);
}

inline double real(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || *end != '\0' || !(value >= 0) || value > 1e9) {
    usage(name + " is '" + text + "', not a number from 0");
  }
  return value;
}

inline Options parse(int argc, char** argv) {
  static const std::map<std::string, std::string Options::*> texts = {
      {"--program", &Options::program}, {"--image", &Options::image},
      {"--events", &Options::events},   {"--timeline", &Options::timeline},
      {"--waves", &Options::waves},
  };
  static const std::map<std::string, std::uint64_t Options::*> numbers = {
      {"--latency", &Options::latency},
      {"--gap", &Options::gap},
      {"--refresh-every", &Options::refresh_every},
      {"--refresh-cycles", &Options::refresh_cycles},
      {"--outstanding", &Options::outstanding},
      {"--limit", &Options::limit},
      {"--parent", &Options::parent},
  };
  static const std::map<std::string, std::optional<std::uint64_t> Options::*> maybe = {
      {"--stalls", &Options::stalls},
      {"--bad-code", &Options::bad_code},
      {"--error", &Options::error},
      {"--reset", &Options::reset},
  };
  Options o;
  if (argc % 2 == 0) usage("options come as NAME VALUE");
  for (int at = 1; at + 1 < argc; at += 2) {
    const std::string name = argv[at], value = argv[at + 1];
    if (const auto text = texts.find(name); text != texts.end()) {
      o.*(text->second) = value;
    } else if (const auto whole = numbers.find(name); whole != numbers.end()) {
      o.*(whole->second) = number(name, value);
    } else if (const auto given = maybe.find(name); given != maybe.end()) {
      o.*(given->second) = number(name, value);
    } else if (name == "--bytes-a-cycle") {
      o.bytes_a_cycle = real(name, value);
    } else {
      usage("unknown option " + name);
    }
  }
  if (o.program.empty() || o.image.empty()) usage("--program and --image are needed");
  if (o.outstanding == 0) usage("--outstanding is 0");
  if (o.refresh_every != 0 && o.refresh_cycles >= o.refresh_every) usage("refresh never ends");
  return o;
}

inline std::vector<std::uint8_t> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) usage("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}
