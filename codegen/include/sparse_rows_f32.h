// Sparse weights by dense pixels, fp32: blocks of one input channel and 1, 2 or 4 output channels.
//
//   out[o][p] = bias[o] + sum over nonzeros (o, c) of w[o][c] * x[c][p]
//
// A vector holds neighbouring pixels, and a nonzero costs one multiply-add per vector. So the pixels of a channel
// must lie side by side. Channels-first memory has them so. Of channels-last input, a panel [channel][pixel] is
// transposed into a cache first, and sums are transposed back for channels-last output.
#ifndef SPARSE_ROWS_F32
#define SPARSE_ROWS_F32

namespace block_sparse {

// Tiles that move between channels-last memory and panels are 16 x 16.
constexpr int64_t SIDE = 16;

// to[j][i] = from[i][j]
#if defined(CPU_CAPABILITY_AVX512)
BLOCK_SPARSE_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const auto pairs = [](const __m512& a) { return _mm512_castps_pd(a); };
  __m512 a[SIDE], b[SIDE];
#pragma GCC unroll 16
  for (int i = 0; i < SIDE; ++i) a[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < SIDE; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < SIDE; i += 4) {
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(b[i]), pairs(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(b[i]), pairs(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(b[i + 1]), pairs(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(b[i + 1]), pairs(b[i + 3])));
  }
  // Each quarter of a[4 * q + j] now holds column j of that quarter, rows 4 * q to 4 * q + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(even01, even23, 0x88));
    _mm512_storeu_ps(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    _mm512_storeu_ps(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}
#else
BLOCK_SPARSE_INLINE void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(CPU_CAPABILITY_AVX2)
  at::vec::transpose_mxn<float, SIDE, SIDE>(from, from_stride, to, to_stride);
#else
  for (int64_t j = 0; j < SIDE; ++j)
    for (int64_t i = 0; i < SIDE; ++i) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}
#endif

// Where output pixels find their inputs, in floats: rows and pixels that a strided convolution reads.
struct Strides {
  int64_t rows, columns;  // of an output image
  int64_t image, row, pixel;
};

// offset[i] of output pixel `first` + i, counted over all images.
BLOCK_SPARSE_INLINE void find_pixels(int64_t* offset, int64_t first, int64_t count, const Strides& s) {
  int64_t column = first % s.columns, row = first / s.columns % s.rows, image = first / s.columns / s.rows;
  for (int64_t i = 0; i < count; ++i) {
    offset[i] = image * s.image + row * s.row + column * s.pixel;
    if (++column < s.columns) continue;
    column = 0;
    if (++row < s.rows) continue;
    row = 0;
    ++image;
  }
}

// panel[channel][PIXELS] of `count` pixels, channels last; zeros beyond them. Pixel p starts at pixel(p); `step`
// floats lie between two, or it is 0 and they lie anywhere.
template <int64_t PIXELS, int64_t CHANNELS, class Pixel>
inline void fill_panel(float* panel, const Pixel& pixel, int64_t step, int64_t count) {
  alignas(64) float edge[SIDE * SIDE];
  for (int64_t p = 0; p < PIXELS; p += SIDE) {
    const int64_t rows = std::max<int64_t>(0, std::min(SIDE, count - p));
    // The last channels move left to stay inside, and some are written twice.
    for (int64_t first = 0; first < CHANNELS; first += SIDE) {
      const int64_t c = std::max<int64_t>(0, std::min(first, CHANNELS - SIDE));
      if (step && rows == SIDE && CHANNELS >= SIDE) {
        transpose(pixel(p) + c, step, panel + c * PIXELS + p, PIXELS);
        continue;
      }
      constexpr int64_t WIDTH = std::min(SIDE, CHANNELS);
      if (rows < SIDE || WIDTH < SIDE) std::fill(edge, edge + SIDE * SIDE, 0.0f);
      for (int64_t i = 0; i < rows; ++i) std::copy(pixel(p + i) + c, pixel(p + i) + c + WIDTH, edge + i * SIDE);
      if (WIDTH == SIDE) {
        transpose(edge, SIDE, panel + c * PIXELS + p, PIXELS);
      } else {
        for (int64_t j = 0; j < WIDTH; ++j)
          for (int64_t i = 0; i < SIDE; ++i) panel[(c + j) * PIXELS + p + i] = edge[i * SIDE + j];
      }
    }
  }
}

// The same, channels first: channels lie `stride` floats apart, and pixel p of each `offset[p]` behind its start.
template <int64_t PIXELS>
inline void gather_panel(
    float* panel, const float* x, const int64_t* offset, int64_t count, int64_t stride, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c, x += stride, panel += PIXELS) {
#pragma GCC unroll 8
    for (int64_t p = 0; p < count; ++p) panel[p] = x[offset[p]];
    std::fill(panel + count, panel + PIXELS, 0.0f);
  }
}

// Vector v of one channel's pixels, of which COUNT may be read: more count as zeros.
template <int LANES, int64_t COUNT>
BLOCK_SPARSE_INLINE typename Lanes<LANES>::Value load_pixels(const float* x, int v) {
  const int64_t count = COUNT - v * LANES;
  if (count >= LANES) return Lanes<LANES>::load(x + v * LANES);
  return count > 0 ? Lanes<LANES>::load(x + v * LANES, count) : typename Lanes<LANES>::Value{};
}

// panel[channel][PIXELS] of COUNT pixels side by side, channels `stride` floats apart; zeros beyond them.
template <int LANES, int64_t PIXELS, int64_t COUNT>
inline void copy_panel(float* panel, const float* x, int64_t stride, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c, x += stride, panel += PIXELS) {
#pragma GCC unroll 32
    for (int v = 0; v < PIXELS / LANES; ++v) Lanes<LANES>::store(load_pixels<LANES, COUNT>(x, v), panel + v * LANES);
  }
}

struct RowWeights {
  const float* values;  // [nonzero column][HEIGHT]
  const int32_t* channel;
};

struct Identity {
  template <class Value>
  inline __attribute__((always_inline)) Value operator()(const Value& x, int, int) const { return x; }
};

// HEIGHT output channels by VECTORS vectors of pixels in registers.
//
// The pixels of input channel c start at x + c * STRIDE, and COUNT of them may be read.
template <int LANES, int HEIGHT, int VECTORS, int64_t STRIDE, int64_t COUNT, int FLUSH>
struct SparseRows {
  using Vec = Lanes<LANES>;
  using Value = typename Vec::Value;
  static constexpr int64_t PIXELS = LANES * VECTORS;
  // Few accumulators would wait for each other: several sets take turns.
  static constexpr int SETS = HEIGHT * VECTORS >= 7 ? 1 : HEIGHT * VECTORS >= 4 ? 2 : 4;
  typedef Value Accumulators[SETS][HEIGHT][VECTORS];

  // acc += w * x for one nonzero column of the block row.
  BLOCK_SPARSE_INLINE void multiply(Value (&acc)[HEIGHT][VECTORS], const float* x, const float* w) {
    Value wr[HEIGHT];
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; ++r) wr[r] = Vec::broadcast(w + r);
#pragma GCC unroll 32
    for (int v = 0; v < VECTORS; ++v) {
      const Value xv = load_pixels<LANES, COUNT>(x, v);
#pragma GCC unroll 8
      for (int r = 0; r < HEIGHT; ++r) acc[r][v] = Vec::multiply_add(xv, wr[r], acc[r][v]);
    }
  }

  // sums = products of the nonzero columns [begin, end) of a block row.
  BLOCK_SPARSE_INLINE void multiply_all(
      Value (&sums)[HEIGHT][VECTORS], const float* x, const RowWeights& w, int32_t begin, int32_t end) {
    Accumulators acc;
#pragma GCC unroll 256
    for (int i = 0; i < SETS * HEIGHT * VECTORS; ++i) acc[i / (HEIGHT * VECTORS)][i / VECTORS % HEIGHT][i % VECTORS] = Value{};
    int32_t n = begin;
#pragma GCC unroll 1
    for (; n + SETS <= end; n += SETS) {
#pragma GCC unroll 4
      for (int s = 0; s < SETS; ++s)
        multiply(acc[s], x + w.channel[n + s] * STRIDE, w.values + static_cast<int64_t>(n + s) * HEIGHT);
    }
#pragma GCC unroll 1
    for (; n < end; ++n) multiply(acc[0], x + w.channel[n] * STRIDE, w.values + static_cast<int64_t>(n) * HEIGHT);
#pragma GCC unroll 256
    for (int i = 0; i < HEIGHT * VECTORS; ++i) {
      Value sum = acc[0][i / VECTORS][i % VECTORS];
#pragma GCC unroll 4
      for (int s = 1; s < SETS; ++s) sum = sum + acc[s][i / VECTORS][i % VECTORS];
      sums[i / VECTORS][i % VECTORS] = sum;
    }
  }

  // out[HEIGHT][OUT_STRIDE] of all but the last columns; where those begin. Many short sums round less than a
  // long one.
  template <int64_t OUT_STRIDE>
  __attribute__((noinline)) static int32_t first_parts(
      float* out, const float* x, const RowWeights& w, int32_t begin, int32_t end) {
    for (bool first = true; end - begin > FLUSH; begin += FLUSH, first = false) {
      Value sums[HEIGHT][VECTORS];
      multiply_all(sums, x, w, begin, begin + FLUSH);
#pragma GCC unroll 256
      for (int i = 0; i < HEIGHT * VECTORS; ++i) {
        const Value sum = sums[i / VECTORS][i % VECTORS];
        float* const y = out + i / VECTORS * OUT_STRIDE + i % VECTORS * LANES;
        Vec::store(first ? sum : sum + Vec::load(y), y);
      }
    }
    return begin;
  }

  // out[HEIGHT][OUT_STRIDE] of one block row: its nonzero columns [begin, end), and HEIGHT biases or null; and
  // a function of the sums, of the row and of the vector.
  template <int64_t OUT_STRIDE = PIXELS, class Activation = Identity>
  BLOCK_SPARSE_INLINE void row(
      float* out, const float* x, const RowWeights& w, int32_t begin, int32_t end, const float* bias,
      const Activation& activate = {}) {
    const bool in_parts = end - begin > FLUSH;
    if (in_parts) begin = first_parts<OUT_STRIDE>(out, x, w, begin, end);
    Value sums[HEIGHT][VECTORS];
    multiply_all(sums, x, w, begin, end);
    if (in_parts) {
#pragma GCC unroll 256
      for (int i = 0; i < HEIGHT * VECTORS; ++i) {
        Value& sum = sums[i / VECTORS][i % VECTORS];
        sum = sum + Vec::load(out + i / VECTORS * OUT_STRIDE + i % VECTORS * LANES);
      }
    }
#pragma GCC unroll 256
    for (int i = 0; i < HEIGHT * VECTORS; ++i) {
      const Value sum = sums[i / VECTORS][i % VECTORS];
      float* const y = out + i / VECTORS * OUT_STRIDE + i % VECTORS * LANES;
      Vec::store(activate(bias ? sum + Vec::broadcast(bias + i / VECTORS) : sum, i / VECTORS, i % VECTORS), y);
    }
  }
};

}  // namespace block_sparse
#endif
