// The instructions that a warp executes as one: shuffles, votes, and the matrix instructions by their true lane
// layouts. Each gathers its lanes' operands, computes once for all of them, and hands every lane its part.
#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

constexpr unsigned all_lanes = 0xFFFFFFFFu;

template <typename Operand>
Operand& of(void* operand) {
  return *static_cast<Operand*>(operand);
}

struct Shuffle {
  unsigned long long value;
  int source;
  unsigned long long received;
};

void perform_shuffle(void* const (&operands)[32], unsigned mask, Site site) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1u)) continue;
    Shuffle& shuffle = of<Shuffle>(operands[lane]);
    if (!(mask >> shuffle.source & 1u)) {
      fail(site, "lane %d shuffles from lane %d, which takes no part in it", lane, shuffle.source);
    }
    shuffle.received = of<Shuffle>(operands[shuffle.source]).value;
  }
}

struct Vote {
  bool predicate;
  unsigned ballot;
};

void perform_vote(void* const (&operands)[32], unsigned mask, Site) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u && of<Vote>(operands[lane]).predicate) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) of<Vote>(operands[lane]).ballot = ballot;
  }
}

struct MatrixLoad {
  unsigned (&matrix)[4];
  unsigned shared;
  const char* name;
  bool transposed;
};

void perform_load(void* const (&operands)[32], unsigned, Site site) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned short elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      const MatrixLoad& load = of<MatrixLoad>(operands[lane]);
      std::memcpy(elements[row], shared_read(load.shared, 16, lane, load.name, site), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const MatrixLoad& load = of<MatrixLoad>(operands[lane]);
      const int i = lane / 4, j = 2 * (lane % 4);
      const unsigned low = load.transposed ? elements[j][i] : elements[i][j];
      const unsigned high = load.transposed ? elements[j + 1][i] : elements[i][j + 1];
      load.matrix[matrix] = high << 16 | low;
    }
  }
}

struct MatrixProduct {
  float (&d)[4];
  const unsigned (&a)[4];
  unsigned b[2];
};

float half_of(unsigned packed, int half) {
  const unsigned bits = half == 0 ? packed << 16 : packed & 0xFFFF0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Products of bfloat16 are exact in float32; the order in which the 16 of them are added is the emulator's own.
void perform_product(void* const (&operands)[32], unsigned, Site) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixProduct& product = of<MatrixProduct>(operands[lane]);
    const int i = lane / 4, j = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int next = 0; next < 2; ++next) {
        a[i][8 * half + j + next] = half_of(product.a[2 * half], next);
        a[i + 8][8 * half + j + next] = half_of(product.a[2 * half + 1], next);
        b[8 * half + j + next][i] = half_of(product.b[half], next);
        d[8 * half + i][j + next] = product.d[2 * half + next];
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixProduct& product = of<MatrixProduct>(operands[lane]);
    const int i = lane / 4, j = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int next = 0; next < 2; ++next) product.d[2 * half + next] = d[8 * half + i][j + next];
    }
  }
}

}  // namespace

unsigned long long shuffle(const char* name, unsigned mask, unsigned long long value, int source, Site site) {
  Shuffle shuffle{value, source, 0};
  collective({name, perform_shuffle}, mask, &shuffle, site);
  return shuffle.received;
}

unsigned vote(const char* name, unsigned mask, bool predicate, Site site) {
  Vote vote{predicate, 0};
  collective({name, perform_vote}, mask, &vote, site);
  return vote.ballot;
}

void load_matrices(const char* name, unsigned (&matrix)[4], unsigned shared, bool transposed, Site site) {
  MatrixLoad load{matrix, shared, name, transposed};
  collective({name, perform_load}, all_lanes, &load, site);
}

void multiply_matrices(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Site site) {
  MatrixProduct product{d, a, {b0, b1}};
  collective({"mma_m16n8k16", perform_product}, all_lanes, &product, site);
}

}  // namespace emulator
