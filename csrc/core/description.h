// What a model is made of, as the caller describes it: a part has a kind, numbers, words, and parts
// of its own. Only the part itself knows which of them it needs.
#pragma once

#include <map>
#include <stdexcept>
#include <string>

namespace nomatmul {

struct Description {
  std::string kind;
  std::map<std::string, double> numbers;
  std::map<std::string, std::string> words;
  std::map<std::string, Description> parts;

  bool has(const std::string& name) const { return parts.count(name) != 0; }

  // All throw std::invalid_argument, naming the value, for one that is missing or out of range.
  double number(const std::string& name) const { return find(numbers, name); }
  const std::string& word(const std::string& name) const { return find(words, name); }
  const Description& part(const std::string& name) const { return find(parts, name); }
  // Whether a number is there and not 0.
  bool flag(const std::string& name) const {
    const auto found = numbers.find(name);
    return found != numbers.end() && found->second != 0;
  }
  int whole(const std::string& name, int least, int most) const {
    const double value = number(name);
    if (value >= least && value <= most && value == static_cast<int>(value)) {
      return static_cast<int>(value);
    }
    throw std::invalid_argument(kind + ": " + name + " is " + std::to_string(value) +
                                ", expected " + std::to_string(least) + " to " +
                                std::to_string(most));
  }

 private:
  template <class T>
  const T& find(const std::map<std::string, T>& values, const std::string& name) const {
    const auto found = values.find(name);
    if (found != values.end()) return found->second;
    throw std::invalid_argument(kind + ": " + name + " is missing");
  }
};

}  // namespace nomatmul
