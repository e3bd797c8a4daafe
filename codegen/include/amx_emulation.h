// The AMX tile instructions that block_sparse_amx.h uses, in plain C++, for machines without them.
//
// For tests only. Follows Intel's "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2:
// LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS. Where the processor would raise an exception, this throws.
#ifndef BLOCK_SPARSE_AMX_EMULATION
#define BLOCK_SPARSE_AMX_EMULATION
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

namespace block_sparse {
namespace emulated_amx {

constexpr int TILES = 8, MAX_ROWS = 16, MAX_BYTES = 64;

struct TileRegisters {
  bool configured = false;
  int rows[TILES] = {}, bytes[TILES] = {};  // bytes of a row
  alignas(64) uint8_t data[TILES][MAX_ROWS][MAX_BYTES] = {};
};

inline TileRegisters& registers() {
  static thread_local TileRegisters state;
  return state;
}

[[noreturn]] inline void fault(const char* instruction, const std::string& what) {
  throw std::runtime_error(std::string("AMX emulation: ") + instruction + ": " + what);
}

// A tile in use: LDTILECFG has run, and gave it a shape.
inline void check_tile(const char* instruction, int tile) {
  const TileRegisters& state = registers();
  if (!state.configured) fault(instruction, "no tile configuration is loaded");
  if (tile < 0 || tile >= TILES) fault(instruction, "there is no tile " + std::to_string(tile));
  if (!state.rows[tile] || !state.bytes[tile])
    fault(instruction, "tile " + std::to_string(tile) + " is not configured");
}

// The 64 bytes that LDTILECFG reads: palette, start row, 14 reserved, 16 times bytes of a row, 16 times rows.
inline void load_config(const void* memory) {
  uint8_t raw[64];
  std::memcpy(raw, memory, sizeof(raw));
  TileRegisters& state = registers();
  if (raw[0] > 1) fault("ldtilecfg", "palette " + std::to_string(raw[0]) + " does not exist");
  if (raw[0] == 0) {
    state = TileRegisters{};
    return;
  }
  for (int i = 1; i < 16; ++i)
    if (raw[i]) fault("ldtilecfg", "start row and reserved bytes must be zero");
  TileRegisters next;
  next.configured = true;
  for (int tile = 0; tile < 16; ++tile) {
    const int bytes = raw[16 + 2 * tile] | raw[17 + 2 * tile] << 8, rows = raw[48 + tile];
    if (tile >= TILES && (bytes || rows)) fault("ldtilecfg", "tiles beyond 8 must have no shape");
    if (rows > MAX_ROWS) fault("ldtilecfg", std::to_string(rows) + " rows exceed 16");
    if (bytes > MAX_BYTES) fault("ldtilecfg", std::to_string(bytes) + " bytes of a row exceed 64");
    if (!rows != !bytes) fault("ldtilecfg", "a tile has rows without bytes, or bytes without rows");
    if (tile < TILES) next.rows[tile] = rows, next.bytes[tile] = bytes;
  }
  state = next;  // all tiles become zero
}

inline void release() { registers() = TileRegisters{}; }

inline void zero(int tile) {
  check_tile("tilezero", tile);
  std::memset(registers().data[tile], 0, sizeof(registers().data[tile]));
}

inline void load(int tile, const void* memory, int64_t stride) {
  check_tile("tileloadd", tile);
  TileRegisters& state = registers();
  std::memset(state.data[tile], 0, sizeof(state.data[tile]));
  for (int row = 0; row < state.rows[tile]; ++row)
    std::memcpy(state.data[tile][row], static_cast<const char*>(memory) + row * stride, state.bytes[tile]);
}

inline void store(int tile, void* memory, int64_t stride) {
  check_tile("tilestored", tile);
  const TileRegisters& state = registers();
  for (int row = 0; row < state.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(memory) + row * stride, state.data[tile][row], state.bytes[tile]);
}

// Denormals are taken as zero, and become zero.
inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

inline float bfloat16(const uint8_t* bytes) {
  const uint32_t bits = static_cast<uint32_t>(bytes[0]) << 16 | static_cast<uint32_t>(bytes[1]) << 24;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return flush(x);
}

// sums[m][n] += sum over k of a[m][2 * k] * b[k][2 * n] and, apart, of a[m][2 * k + 1] * b[k][2 * n + 1], in
// fused multiply-adds that round to nearest.
inline void dot(int sums, int a, int b) {
  for (const int tile : {sums, a, b}) check_tile("tdpbf16ps", tile);
  if (sums == a || sums == b || a == b) fault("tdpbf16ps", "the three tiles must differ");
  TileRegisters& state = registers();
  if (state.rows[sums] != state.rows[a]) fault("tdpbf16ps", "sums and left factor differ in rows");
  if (state.bytes[sums] != state.bytes[b]) fault("tdpbf16ps", "sums and right factor differ in columns");
  if (state.bytes[a] != 4 * state.rows[b])
    fault("tdpbf16ps", std::to_string(state.bytes[a] / 4) + " pairs in a row of the left factor, but " +
                           std::to_string(state.rows[b]) + " rows of the right one");
  if (state.bytes[a] % 4 || state.bytes[b] % 4) fault("tdpbf16ps", "a row is no multiple of 4 bytes");
  const int pairs = state.rows[b], columns = state.bytes[b] / 4;
  float right[MAX_ROWS][2 * MAX_ROWS];
  for (int k = 0; k < pairs; ++k)
    for (int i = 0; i < 2 * columns; ++i) right[k][i] = bfloat16(state.data[b][k] + 2 * i);
  for (int m = 0; m < state.rows[a]; ++m) {
    float apart[2 * MAX_ROWS] = {};
    for (int k = 0; k < pairs; ++k) {
      const float left[2] = {bfloat16(state.data[a][m] + 4 * k), bfloat16(state.data[a][m] + 4 * k + 2)};
      for (int i = 0; i < 2 * columns; ++i) apart[i] = flush(std::fmaf(left[i % 2], right[k][i], apart[i]));
    }
    for (int n = 0; n < columns; ++n) {
      float sum;
      std::memcpy(&sum, state.data[sums][m] + 4 * n, sizeof(sum));
      sum = flush(flush(sum) + flush(apart[2 * n] + apart[2 * n + 1]));
      std::memcpy(state.data[sums][m] + 4 * n, &sum, sizeof(sum));
    }
  }
}

}  // namespace emulated_amx
}  // namespace block_sparse
#endif
