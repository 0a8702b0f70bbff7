#include "json.h"

#include <algorithm>
#include <cmath>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace fastunet::json {
namespace {

constexpr int kDeepest = 8;                             // arrays and objects within each other; a model file has three
constexpr double kLargestInteger = 9007199254740992.0;  // 2**53

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Value document() {
    Value value = this->value(0);
    skip_space();
    if (at_ < text_.size()) fail("the text goes on after its value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(what + " at byte " + std::to_string(at_));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
  }

  bool take(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("'") + c + "' is missing");
  }

  bool take_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Value value(int depth) {
    skip_space();
    Value value;
    if (peek() == '{' || peek() == '[') {
      if (depth == kDeepest) fail("values nest too deeply");
      peek() == '{' ? object(value, depth + 1) : array(value, depth + 1);
    } else if (peek() == '"') {
      value.kind = Value::kString;
      value.text = string();
    } else if (take_word("true") || take_word("false")) {
      value.kind = Value::kBoolean;
    } else if (!take_word("null")) {
      number(value);
    }
    return value;
  }

  template <class Body>
  void elements(char open, char close, const Body& body) {
    expect(open);
    skip_space();
    if (take(close)) return;
    do {
      skip_space();
      body();
      skip_space();
    } while (take(','));
    expect(close);
  }

  void object(Value& value, int depth) {
    value.kind = Value::kObject;
    elements('{', '}', [&] {
      if (peek() != '"') fail("a name is missing");
      std::string name = string();
      skip_space();
      expect(':');
      value.members.push_back({std::move(name), this->value(depth)});
    });
    std::vector<std::string_view> names;
    for (const Member& member : value.members) names.push_back(member.name);
    std::sort(names.begin(), names.end());
    if (std::adjacent_find(names.begin(), names.end()) != names.end()) fail("an object has a name twice, which ends");
  }

  void array(Value& value, int depth) {
    value.kind = Value::kArray;
    elements('[', ']', [&] { value.items.push_back(this->value(depth)); });
  }

  bool digits() {
    const size_t first = at_;
    while (peek() >= '0' && peek() <= '9') ++at_;
    return at_ > first;
  }

  void number(Value& value) {
    const size_t first = at_;
    take('-');
    const bool leading_zero = peek() == '0';
    const size_t first_digit = at_;
    if (!digits() || (leading_zero && at_ > first_digit + 1)) fail("no value begins");
    value.kind = Value::kInteger;
    if (take('.')) {
      value.kind = Value::kReal;
      if (!digits()) fail("a digit is missing");
    }
    if (peek() == 'e' || peek() == 'E') {
      value.kind = Value::kReal;
      ++at_;
      if (!take('+')) take('-');
      if (!digits()) fail("a digit is missing");
    }
    std::istringstream stream{std::string(text_.substr(first, at_ - first))};
    stream.imbue(std::locale::classic());
    if (!(stream >> value.number) || (value.kind == Value::kInteger && std::abs(value.number) >= kLargestInteger))
      fail("a number is too large, which ends");
  }

  unsigned hexadecimal() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("a hexadecimal digit is missing");
      code = 16 * code + static_cast<unsigned>(digit);
      ++at_;
    }
    return code;
  }

  static void append(std::string& result, unsigned code) {
    if (code < 0x80) {
      result += static_cast<char>(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    constexpr unsigned kLead[] = {0, 0xC0, 0xE0, 0xF0};
    result += static_cast<char>(kLead[more] | code >> 6 * more);
    for (int i = more - 1; i >= 0; --i) result += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
  }

  void escape(std::string& result) {
    constexpr std::string_view kEscapes = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    const size_t which = kEscapes.find(peek());
    if (which != kEscapes.npos) {
      ++at_;
      result += kMeant[which];
      return;
    }
    if (!take('u')) fail("an unknown escape begins");
    unsigned code = hexadecimal();
    if (code >= 0xD800 && code < 0xE000) {
      if (code >= 0xDC00 || !take_word("\\u")) fail("half a surrogate pair ends");
      const unsigned low = hexadecimal();
      if (low < 0xDC00 || low >= 0xE000) fail("half a surrogate pair ends");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    append(result, code);
  }

  // A character of UTF-8 of several bytes.
  void multibyte(std::string& result) {
    const auto byte = [&](size_t i) {
      return at_ + i < text_.size() ? static_cast<unsigned char>(text_[at_ + i]) : 0u;
    };
    const unsigned lead = byte(0);
    const size_t more = lead >= 0xC2 && lead < 0xE0   ? 1
                        : lead >= 0xE0 && lead < 0xF0 ? 2
                        : lead >= 0xF0 && lead < 0xF5 ? 3
                                                      : 0;
    unsigned code = more == 1 ? lead & 0x1F : more == 2 ? lead & 0x0F : lead & 0x07;
    bool valid = more > 0;
    for (size_t i = 1; i <= more; ++i) {
      valid = valid && (byte(i) & 0xC0) == 0x80;
      code = code << 6 | (byte(i) & 0x3F);
    }
    constexpr unsigned kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (!valid || code < kLeast[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) fail("no UTF-8 begins");
    result.append(text_.substr(at_, more + 1));
    at_ += more + 1;
  }

  std::string string() {
    std::string result;
    expect('"');
    while (!take('"')) {
      if (at_ == text_.size()) fail("a text does not end");
      const auto c = static_cast<unsigned char>(text_[at_]);
      if (c < 0x20) fail("a text holds a control character");
      if (c >= 0x80) {
        multibyte(result);
      } else if (take('\\')) {
        escape(result);
      } else {
        result += text_[at_++];
      }
    }
    return result;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const Value* Value::find(std::string_view name) const {
  for (const Member& member : members)
    if (member.name == name) return &member.value;
  return nullptr;
}

Value parse(std::string_view text) { return Parser(text).document(); }

}  // namespace fastunet::json
