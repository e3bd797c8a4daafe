// Gradient of kept weight tiles, fp32: for each tile (out-block, tap, in-block)
//
//   grad[o][c] = sum over pixels p of dy[p][o] * x[p + tap][c]
//
// A chunk of output rows is first packed into panels, one per channel block: dy as [pixel][BH], x as
// [row][column][BW] with the padding filled in. Panels have no power-of-two strides, which would collide in
// the cache, no borders, and serve all tiles and taps.
#ifndef BLOCK_SPARSE_TILE_GRADIENT_F32
#define BLOCK_SPARSE_TILE_GRADIENT_F32

namespace block_sparse {

// VECTORS x LANES input channels by ROWS output channels in registers.
template <int LANES, int VECTORS, int ROWS, int BH, int BW>
struct TileGradient {
  using Vec = Lanes<LANES>;
  using Value = typename Vec::Value;
  static_assert(BH % ROWS == 0 && BW % (VECTORS * LANES) == 0);

  // grad[BH][BW] += dy^T x over `rows` runs of `pixels` pixels.
  BLOCK_SPARSE_INLINE void add(
      float* grad, const float* dy, const float* x, int64_t rows, int64_t pixels, int64_t x_row, int64_t x_step) {
#pragma GCC unroll 1
    for (int o = 0; o < BH; o += ROWS) {
#pragma GCC unroll 1
      for (int c = 0; c < BW; c += VECTORS * LANES) {
        float* const tile = grad + o * BW + c;
        Value acc[ROWS][VECTORS];
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < VECTORS; ++j) acc[i][j] = Vec::load(tile + i * BW + j * LANES);
        }
        const float* d = dy + o;
#pragma GCC unroll 1
        for (int64_t r = 0; r < rows; ++r) {
          const float* xp = x + r * x_row + c;
#pragma GCC unroll 1
          for (int64_t p = 0; p < pixels; ++p, d += BH, xp += x_step) {
            Value xv[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) xv[j] = Vec::load(xp + j * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; ++i) {
              const Value di = Vec::broadcast(d + i);
#pragma GCC unroll 4
              for (int j = 0; j < VECTORS; ++j) acc[i][j] = Vec::multiply_add(di, xv[j], acc[i][j]);
            }
          }
        }
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < VECTORS; ++j) Vec::store(acc[i][j], tile + i * BW + j * LANES);
        }
      }
    }
  }
};

// One pixel's channels, cut into blocks of WIDTH that lie `panel` floats apart.
template <int LANES, int WIDTH>
BLOCK_SPARSE_INLINE void pack_pixel(float* out, int64_t panel, const float* pixel, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH; i += LANES) Lanes<LANES>::store(Lanes<LANES>::load(pixel + b * WIDTH + i), out + b * panel + i);
  }
}

template <int LANES, int WIDTH>
BLOCK_SPARSE_INLINE void pack_zeros(float* out, int64_t panel, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) std::fill_n(out + b * panel, WIDTH, 0.f);
}

// Input rows [row, row + rows * row_step) and columns alike, with zeros outside the image.
struct Window {
  int64_t row, rows, row_step, column, columns, column_step;
};

template <int LANES, int WIDTH>
BLOCK_SPARSE_INLINE void pack_window(
    float* out, int64_t panel, const float* image, int64_t height, int64_t width, int64_t row_stride,
    int64_t pixel_stride, const Window& w, int64_t blocks) {
  for (int64_t r = 0; r < w.rows; ++r) {
    const int64_t h = w.row + r * w.row_step;
    for (int64_t i = 0; i < w.columns; ++i, out += WIDTH) {
      const int64_t c = w.column + i * w.column_step;
      if (h >= 0 && h < height && c >= 0 && c < width) {
        pack_pixel<LANES, WIDTH>(out, panel, image + h * row_stride + c * pixel_stride, blocks);
      } else {
        pack_zeros<LANES, WIDTH>(out, panel, blocks);
      }
    }
  }
}

}  // namespace block_sparse
#endif
