// Block-sparse implicit GEMM on AMX tiles: bf16 in, fp32 sums, channels last.
//
//   sums[p][o] = bias[o] + sum over kept tiles (tap, channels c) of x[p + tap][c] * w[c][o]
//
// Up to 32 output pixels by WIDTH output channels at a time, in two tiles of 16 pixels each:
//
//   tile registers 0 1 | 2 3: sums of the first | second 16 pixels; 4 | 5: their inputs; 6 7: weights
//
// A tile instruction reads rows that lie evenly spaced in memory, so any 16 pixels with evenly spaced inputs will
// do: neighbours of one row, or of one column, or of a panel that holds a part of the input with its padding.
#ifndef BLOCK_SPARSE_AMX
#define BLOCK_SPARSE_AMX
#include <cstdint>
#include <cstring>
#include <stdexcept>
#if defined(__linux__) && !defined(BLOCKSPARSE_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifndef BLOCK_SPARSE_INLINE
#define BLOCK_SPARSE_INLINE __attribute__((always_inline)) static inline
#endif

namespace block_sparse {
namespace amx {

using c10::BFloat16;

constexpr int64_t SIDE = 16;  // rows of a tile register, and fp32 numbers in one of its rows

// ---- instructions ------------------------------------------------------------------------------------------

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(BLOCKSPARSE_EMULATE_AMX)
inline void request_permission() {}
BLOCK_SPARSE_INLINE void load_config(const TileConfig& config) { emulated_amx::load_config(&config); }
BLOCK_SPARSE_INLINE void release() { emulated_amx::release(); }
template <int TILE> BLOCK_SPARSE_INLINE void zero() { emulated_amx::zero(TILE); }
template <int TILE> BLOCK_SPARSE_INLINE void load(const void* p, int64_t stride) { emulated_amx::load(TILE, p, stride); }
template <int TILE> BLOCK_SPARSE_INLINE void store(void* p, int64_t stride) { emulated_amx::store(TILE, p, stride); }
template <int SUMS, int A, int B> BLOCK_SPARSE_INLINE void dot() { emulated_amx::dot(SUMS, A, B); }
#else
// Linux lends the tile registers to a process that asks for them, once. Where the kernel was compiled, Inductor has
// asked; a package that is loaded elsewhere asks here.
inline void request_permission() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  if (!granted) throw std::runtime_error("block-sparse kernel: the system does not permit AMX tiles");
#endif
}
// Not the compiler's intrinsics: gcc 12 believes that they read 8 bytes of the configuration and nothing of a tile,
// and may drop or delay what was stored there before. Here, the operands say what is read.
BLOCK_SPARSE_INLINE void load_config(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
BLOCK_SPARSE_INLINE void release() { asm volatile("tilerelease"); }
template <int TILE> BLOCK_SPARSE_INLINE void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
template <int TILE> BLOCK_SPARSE_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(TILE), "m"(*static_cast<const char(*)[]>(p)));
}
template <int TILE> BLOCK_SPARSE_INLINE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(TILE) : "memory");
}
template <int SUMS, int A, int B> BLOCK_SPARSE_INLINE void dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
}
#endif

// ---- pixels ------------------------------------------------------------------------------------------------

// Up to 16 output pixels whose inputs lie `step` elements apart.
struct PixelTile {
  const BFloat16* x;  // the first pixel's input at tap (0, 0), channel 0
  int64_t step, rows;
};

// The taps that lie inside the image, the same for all pixels of a pair.
struct Taps {
  int32_t kh_begin, kh_end, kw_begin, kw_end;
};

struct PixelPair {
  PixelTile tile[2];
  bool two;
  Taps taps;
  int64_t pixel[2 * SIDE];  // number of each output pixel; -1 for those that are not this pair's to store
};

// Pixels [first, first + 16) of `length`, evenly spaced in input and output. The last tile moves left to stay inside,
// and leaves the pixels that it shares with the tile before to that one.
BLOCK_SPARSE_INLINE void tile_of_run(
    PixelPair& out, int64_t tile, int64_t first, int64_t length, const BFloat16* x, int64_t step, int64_t pixel,
    int64_t pixel_step) {
  const int64_t start = std::max<int64_t>(0, std::min(first, length - SIDE));
  out.tile[tile] = {x + start * step, step, std::min(SIDE, length)};
#pragma GCC unroll 16
  for (int64_t i = 0; i < SIDE; ++i) {
    const bool mine = start + i >= first && start + i < length;
    out.pixel[tile * SIDE + i] = mine ? pixel + (start + i) * pixel_step : -1;
  }
}

// Pair number `pair` of a matrix of `pixels` rows.
BLOCK_SPARSE_INLINE void pair_of_rows(
    PixelPair& out, int64_t pair, int64_t pixels, const BFloat16* x, int64_t step) {
  const int64_t first = pair * 2 * SIDE;
  out.two = first + SIDE < pixels;
  out.taps = {0, 1, 0, 1};
  for (int64_t i = 0; i <= out.two; ++i) tile_of_run(out, i, first + i * SIDE, pixels, x, step, 0, 1);
}

// What a convolution needs to know of its image: sizes in pixels, strides in elements.
struct Image {
  int64_t height, width, image_stride, row_stride, pixel_stride;
  int64_t stride_h, stride_w, pad_top, pad_left;
  int64_t out_height, out_width;
};

// A rectangle of output pixels that have the same taps inside the image, cut into runs along rows or columns.
struct Region {
  int64_t row, rows, column, columns;
  bool along_columns;
  Taps taps;
  int64_t pairs;  // of tiles, an odd last one included
};

// Pair number `pair` of one image, region after region.
BLOCK_SPARSE_INLINE void pair_of_regions(
    PixelPair& out, int64_t pair, const Region* region, const Image& g, const BFloat16* image, int64_t first_pixel) {
  for (; pair >= region->pairs; ++region) pair -= region->pairs;
  const Region& r = *region;
  const int64_t length = r.along_columns ? r.rows : r.columns, runs = r.along_columns ? r.columns : r.rows;
  const int64_t per_run = (length + SIDE - 1) / SIDE;
  const int64_t step = r.along_columns ? g.stride_h * g.row_stride : g.stride_w * g.pixel_stride;
  out.two = 2 * pair + 1 < runs * per_run;
  out.taps = r.taps;
  for (int64_t i = 0; i <= out.two; ++i) {
    const int64_t run = (2 * pair + i) / per_run, first = (2 * pair + i) % per_run * SIDE;
    const int64_t oh = r.row + (r.along_columns ? 0 : run), ow = r.column + (r.along_columns ? run : 0);
    const BFloat16* const x =
        image + (oh * g.stride_h - g.pad_top) * g.row_stride + (ow * g.stride_w - g.pad_left) * g.pixel_stride;
    tile_of_run(out, i, first, length, x, step, first_pixel + oh * g.out_width + ow,
                r.along_columns ? g.out_width : 1);
  }
}

// ---- panels ------------------------------------------------------------------------------------------------
//
// A panel [channel block][phase][line][image][column][BW] holds what a strip of output rows of a few images reads,
// padding included. Strided convolutions read one phase per tap, with stride 1: a phase is every stride-th row and
// column. In a panel, neighbouring output pixels have neighbouring inputs across rows and images, too; the places
// between the rows compute nothing of use.

struct Phase {
  int64_t row, column;  // input row and column of its first place, were there no padding and no stride
  int64_t lines;
  int64_t begin, places;  // in the panel; zeros follow the last line
};

struct Panel {
  int64_t images, rows, pitch;  // of a strip: images side by side, output rows, places between images
  int64_t block_stride;         // elements between channel blocks
};

template <int BW>
BLOCK_SPARSE_INLINE void pack_place(
    BFloat16* out, int64_t block_stride, const BFloat16* pixel, int64_t channels, int64_t blocks) {
  constexpr size_t BYTES = BW * sizeof(BFloat16);
  for (int64_t b = 0; b < blocks - 1; ++b, out += block_stride) std::memcpy(out, pixel + b * BW, BYTES);
  std::memcpy(out, pixel + channels - BW, BYTES);  // a ragged last block starts earlier
}

template <int BW>
BLOCK_SPARSE_INLINE void pack_zeros(BFloat16* out, int64_t block_stride, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b, out += block_stride) std::memset(out, 0, BW * sizeof(BFloat16));
}

// `images` of them, from output row `first_row` on.
template <int BW, int64_t CHANNELS, int PHASES>
BLOCK_SPARSE_INLINE void pack_panel(
    BFloat16* out, const Panel& panel, const Phase (&phases)[PHASES], const Image& g, const BFloat16* image,
    int64_t images, int64_t first_row) {
  constexpr int64_t BLOCKS = (CHANNELS + BW - 1) / BW;
  for (const Phase& phase : phases) {
    BFloat16* place = out + phase.begin * BW;
    for (int64_t line = 0; line < phase.lines; ++line) {
      const int64_t ih = (first_row + line) * g.stride_h + phase.row - g.pad_top;
      const bool inside = ih >= 0 && ih < g.height;
      for (int64_t i = 0; i < panel.images; ++i) {
        const BFloat16* const row = image + i * g.image_stride + ih * g.row_stride;
        for (int64_t column = 0; column < panel.pitch; ++column, place += BW) {
          const int64_t iw = column * g.stride_w + phase.column - g.pad_left;
          if (inside && i < images && iw >= 0 && iw < g.width) {
            pack_place<BW>(place, panel.block_stride, row + iw * g.pixel_stride, CHANNELS, BLOCKS);
          } else {
            pack_zeros<BW>(place, panel.block_stride, BLOCKS);
          }
        }
      }
    }
    for (BFloat16* const end = out + (phase.begin + phase.places) * BW; place < end; place += BW)
      pack_zeros<BW>(place, panel.block_stride, BLOCKS);
  }
}

// Places of a strip from its first output pixel to its last.
BLOCK_SPARSE_INLINE int64_t strip_places(const Panel& panel, int64_t rows, int64_t out_width) {
  return (rows * panel.images - 1) * panel.pitch + out_width;
}

// Pair number `pair` of a strip of `rows` output rows of `images` images. `x`: its panel; `first_pixel`: output pixel
// of the strip's first place.
template <int BW>
BLOCK_SPARSE_INLINE void pair_of_panel(
    PixelPair& out, int64_t pair, const Panel& panel, const Image& g, const BFloat16* x, int64_t images, int64_t rows,
    int64_t first_pixel) {
  const int64_t places = strip_places(panel, rows, g.out_width), first = pair * 2 * SIDE;
  out.two = first + SIDE < places;
  for (int64_t i = 0; i <= out.two; ++i) {
    tile_of_run(out, i, first + i * SIDE, std::max(places, SIDE), x, BW, 0, 1);
    for (int64_t j = i * SIDE; j < (i + 1) * SIDE; ++j) {
      const int64_t place = out.pixel[j], column = place % panel.pitch, segment = place / panel.pitch;
      const int64_t image = segment % panel.images, row = segment / panel.images;
      const bool exists = place >= 0 && column < g.out_width && image < images && row < rows;
      out.pixel[j] = exists ? first_pixel + (image * g.out_height + row) * g.out_width + column : -1;
    }
  }
}

// ---- products ----------------------------------------------------------------------------------------------

// The kept tiles of one block row: `values[b]` is [BW / 2][BH][2]; `row_ptr` has one entry per tap.
struct KeptTiles {
  const BFloat16* values;
  const int32_t* row_ptr;
  const float* bias;  // WIDTH floats, or null
};

// The shape that the tile registers of a thread have now.
struct Configured {
  int64_t rows[2] = {-1, -1};
};

// BW x BH blocks, in products of WIDTH output channels; KW taps in a row of the kernel.
template <int BW, int BH, int WIDTH, int KW>
struct Product {
  static_assert(WIDTH == SIDE || WIDTH == 2 * SIDE, "one or two tiles of weights");
  static_assert(BH % WIDTH == 0 && BW % 2 == 0 && (BW <= 32 || BW % 32 == 0), "blocks that fill tiles");
  static constexpr int DEPTH = BW < 32 ? BW : 32;  // input channels of one tile product
  static constexpr bool WIDE = WIDTH == 2 * SIDE;

  BLOCK_SPARSE_INLINE void configure(Configured& now, const PixelPair& pair) {
    const int64_t first = pair.tile[0].rows, second = pair.two ? pair.tile[1].rows : now.rows[1];
    if (first == now.rows[0] && second == now.rows[1]) return;
    now.rows[0] = first;
    now.rows[1] = second < 0 ? first : second;
    TileConfig config;
    for (const int sums : {0, 1, 2, 3}) {
      config.rows[sums] = now.rows[sums / 2];
      config.bytes[sums] = SIDE * sizeof(float);
    }
    for (const int input : {4, 5}) {
      config.rows[input] = now.rows[input - 4];
      config.bytes[input] = DEPTH * sizeof(BFloat16);
    }
    for (const int weights : {6, 7}) {
      config.rows[weights] = DEPTH / 2;
      config.bytes[weights] = SIDE * sizeof(float);
    }
    load_config(config);
  }

  // All sums start from the bias: a stride of 0 reads the same row again and again.
  BLOCK_SPARSE_INLINE void start(bool two, const float* bias) {
    if (bias) {
      load<0>(bias, 0);
      if (WIDE) load<1>(bias + SIDE, 0);
      if (two) load<2>(bias, 0);
      if (WIDE && two) load<3>(bias + SIDE, 0);
    } else {
      zero<0>();
      if (WIDE) zero<1>();
      if (two) zero<2>();
      if (WIDE && two) zero<3>();
    }
  }

  // One kept tile; `first` and `second`: the inputs of both pixel tiles at its tap and channels.
  BLOCK_SPARSE_INLINE void multiply(
      const PixelPair& pair, const BFloat16* first, const BFloat16* second, const BFloat16* w) {
    constexpr int64_t PITCH = 2 * BH * sizeof(BFloat16);  // of weights, for a pair of input channels
#pragma GCC unroll 4
    for (int k = 0; k < BW; k += DEPTH, w += DEPTH * BH) {
      load<4>(first + k, pair.tile[0].step * sizeof(BFloat16));
      load<6>(w, PITCH);
      dot<0, 4, 6>();
      if (WIDE) {
        load<7>(w + 2 * SIDE, PITCH);
        dot<1, 4, 7>();
      }
      if (pair.two) {
        load<5>(second + k, pair.tile[1].step * sizeof(BFloat16));
        dot<2, 5, 6>();
        if (WIDE) dot<3, 5, 7>();
      }
    }
  }

  // sums[32][WIDTH] of a pair. `offset(b)`: elements from a pixel's first input to those that tile b multiplies.
  // `beside()` runs after each kept tile: ordinary instructions that the processor overlaps with tile products.
  template <class Offset, class Beside>
  BLOCK_SPARSE_INLINE void run(
      float* sums, const PixelPair& pair, const KeptTiles& tiles, const Offset& offset, const Beside& beside) {
    start(pair.two, tiles.bias);
    const Taps taps = pair.taps;
    const bool whole_rows = taps.kw_begin == 0 && taps.kw_end == KW;
#pragma GCC unroll 1
    for (int32_t kh = taps.kh_begin; kh < taps.kh_end; ++kh) {
      const int32_t begin = tiles.row_ptr[kh * KW + taps.kw_begin];
      if (whole_rows) kh = taps.kh_end - 1;  // their tiles lie one behind the other
      const int32_t end = tiles.row_ptr[kh * KW + taps.kw_end];
#pragma GCC unroll 1
      for (int32_t b = begin; b < end; ++b) {
        const int64_t at = offset(b);
        multiply(pair, pair.tile[0].x + at, pair.tile[1].x + at, tiles.values + static_cast<int64_t>(b) * (BW * BH));
        beside();
      }
    }
    constexpr int64_t PITCH = WIDTH * sizeof(float);
    store<0>(sums, PITCH);
    if (WIDE) store<1>(sums + SIDE, PITCH);
    if (pair.two) store<2>(sums + SIDE * WIDTH, PITCH);
    if (WIDE && pair.two) store<3>(sums + SIDE * WIDTH + SIDE, PITCH);
  }
};

// Finished sums that wait to be converted and stored, pixel by pixel, while the next ones are computed.
struct Finished {
  const PixelPair* pair = nullptr;
  int64_t next = 0, end = 0;  // pixels of the pair
  int64_t sums = 0;           // first row of its sums
  int64_t channel = 0;        // first output channel

  template <class Store>
  __attribute__((always_inline)) inline void store_some(int64_t count, const Store& store) {
    for (const int64_t stop = std::min(end, next + count); next < stop; ++next) {
      if (pair->pixel[next] >= 0) store(sums + next, 1, pair->pixel[next], channel);
    }
  }
};

}  // namespace amx
}  // namespace block_sparse
#endif
