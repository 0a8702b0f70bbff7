// JSON as it stands in the header of a model file: read whole or refused, whoever wrote it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace fastunet::json {

struct Member;

struct Value {
  enum Kind { kNull, kBoolean, kInteger, kReal, kString, kArray, kObject } kind = kNull;
  double number = 0;  // of kInteger below 2**53, which doubles hold exactly
  std::string text;
  std::vector<Value> items;
  std::vector<Member> members;  // in their order; no name comes twice

  const Value* find(std::string_view name) const;  // of an object; null where there is none
};

struct Member {
  std::string name;
  Value value;
};

// Throws std::runtime_error, which says in a few words what is wrong and at which byte.
Value parse(std::string_view text);

}  // namespace fastunet::json
