// Block-sparse implicit GEMM, fp32, channels last: the register tile and the tables around it.
//
//   acc[p][o] = bias[o] + sum over kept tiles (tap, channels) of x[p + tap][c] * w[c][o]
//
// A register tile is SEGMENTS x SEGMENT pixels by VECTORS vectors of output channels. A segment is a run of
// pixels of one output row, so its input pixels of one tap lie `step` floats apart. Everything is
// always_inline: with literal arguments the strides become address constants and the accumulators stay in
// registers up to the fused epilogue.
// The text is pasted into every generated source, so that compilation caches and packages hold all of it.
#ifndef BLOCK_SPARSE_F32
#define BLOCK_SPARSE_F32
#define BLOCK_SPARSE_INLINE __attribute__((always_inline)) static inline

namespace block_sparse {

// A vector of LANES floats: torch's own at its native width, narrower ones for low blocks.
template <int LANES>
struct Vector {
  typedef float Value __attribute__((vector_size(4 * LANES)));
  typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
  Value value;
  BLOCK_SPARSE_INLINE Vector load(const float* p) { return {*reinterpret_cast<const Unaligned*>(p)}; }
  BLOCK_SPARSE_INLINE Vector broadcast(float x) { return {Value{} + x}; }
  BLOCK_SPARSE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return {a.value * b.value + c.value}; }
  BLOCK_SPARSE_INLINE void store(Vector a, float* p) { *reinterpret_cast<Unaligned*>(p) = a.value; }
};

#if defined(INDUCTOR_USE_VECTOR_TYPES) && INDUCTOR_USE_VECTOR_TYPES()
template <>
struct Vector<at::vec::Vectorized<float>::size()> {
  using Value = at::vec::Vectorized<float>;
  Value value;
  BLOCK_SPARSE_INLINE Vector load(const float* p) { return {Value::loadu(p)}; }
  BLOCK_SPARSE_INLINE Vector broadcast(float x) { return {Value(x)}; }
  BLOCK_SPARSE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
    return {at::vec::fmadd(a.value, b.value, c.value)};
  }
  BLOCK_SPARSE_INLINE void store(Vector a, float* p) { a.value.store(p); }
};
#endif

#if defined(CPU_CAPABILITY_AVX512)
template <>
struct Vector<8> {
  __m256 value;
  BLOCK_SPARSE_INLINE Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  BLOCK_SPARSE_INLINE Vector broadcast(float x) { return {_mm256_set1_ps(x)}; }
  BLOCK_SPARSE_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
    return {_mm256_fmadd_ps(a.value, b.value, c.value)};
  }
  BLOCK_SPARSE_INLINE void store(Vector a, float* p) { _mm256_storeu_ps(p, a.value); }
};
#endif

// Which pixels of each segment lie outside the image for the tap at hand.
enum Skip { NONE, FIRST, LAST };

// acc += x * w for one kept tile: BW channels of every pixel, w[BW][BH].
template <int LANES, int SEGMENTS, int SEGMENT, int VECTORS, int BW, int BH, Skip SKIP>
BLOCK_SPARSE_INLINE void multiply_tile(
    Vector<LANES> (&acc)[SEGMENTS * SEGMENT][VECTORS], const float* const (&x)[SEGMENTS], int64_t step, const float* w) {
#pragma GCC unroll 2
  for (int k = 0; k < BW; ++k) {
    Vector<LANES> wk[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) wk[j] = Vector<LANES>::load(w + k * BH + j * LANES);
#pragma GCC unroll 64
    for (int p = 0; p < SEGMENTS * SEGMENT; ++p) {
      const int i = p % SEGMENT;
      if ((SKIP == FIRST && i == 0) || (SKIP == LAST && i == SEGMENT - 1)) continue;
      const auto xp = Vector<LANES>::broadcast(x[p / SEGMENT][i * step + k]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) acc[p][j] = Vector<LANES>::multiply_add(xp, wk[j], acc[p][j]);
    }
  }
}

// All kept tiles of one (block row, tap).
template <int LANES, int SEGMENTS, int SEGMENT, int VECTORS, int BW, int BH, Skip SKIP>
BLOCK_SPARSE_INLINE void multiply_tap(
    Vector<LANES> (&acc)[SEGMENTS * SEGMENT][VECTORS], const float* const (&x)[SEGMENTS], const int64_t (&mask)[SEGMENTS],
    int64_t step, const float* values, const int32_t* channel_offset, int32_t begin, int32_t end) {
  const float* w = values + static_cast<int64_t>(begin) * (BW * BH);
#pragma GCC unroll 1
  for (int32_t b = begin; b < end; ++b, w += BW * BH) {
    const float* xb[SEGMENTS];
#pragma GCC unroll 16
    for (int s = 0; s < SEGMENTS; ++s) xb[s] = x[s] + (channel_offset[b] & mask[s]);
    multiply_tile<LANES, SEGMENTS, SEGMENT, VECTORS, BW, BH, SKIP>(acc, xb, step, w);
  }
}

template <int LANES, int PIXELS, int VECTORS>
BLOCK_SPARSE_INLINE void start_tile(Vector<LANES> (&acc)[PIXELS][VECTORS], const float* bias) {
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; ++j) {
    const Vector<LANES> b = bias ? Vector<LANES>::load(bias + j * LANES) : Vector<LANES>::broadcast(0.0f);
#pragma GCC unroll 64
    for (int p = 0; p < PIXELS; ++p) acc[p][j] = b;
  }
}

template <int LANES, int PIXELS, int VECTORS>
BLOCK_SPARSE_INLINE void finish_tile(const Vector<LANES> (&acc)[PIXELS][VECTORS], float* out) {
#pragma GCC unroll 64
  for (int p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) Vector<LANES>::store(acc[p][j], out + (p * VECTORS + j) * LANES);
  }
}

// One tile of a linear layer or of a 1x1 convolution with stride 1: pixels `step` floats apart from x on.
template <int LANES, int PIXELS, int VECTORS, int BW, int BH>
BLOCK_SPARSE_INLINE void linear_tile(
    float* out, const float* x, int64_t step, const float* values, const int32_t* row_ptr,
    const int32_t* channel_offset, const float* bias) {
  Vector<LANES> acc[PIXELS][VECTORS];
  start_tile(acc, bias);
  multiply_tap<LANES, 1, PIXELS, VECTORS, BW, BH, NONE>(
      acc, {x}, {-1}, step, values, channel_offset, row_ptr[0], row_ptr[1]);
  finish_tile(acc, out);
}

struct Geometry {
  int64_t height, width;              // input
  int64_t row_stride, pixel_stride;   // input, in floats
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

// Where a segment lies: its image, and its output row. All segments of a tile start at the same column.
struct Segment {
  const float* image;
  int64_t row;
};

// One tile of a convolution. A tap may leave the image by at most one pixel per side of a segment.
template <int LANES, int SEGMENTS, int SEGMENT, int VECTORS, int BW, int BH, int KH, int KW, bool LEFT, bool RIGHT>
BLOCK_SPARSE_INLINE void conv_tile(
    float* out, const Segment (&segment)[SEGMENTS], int64_t column, const Geometry& g, const float* zeros,
    const float* values, const int32_t* row_ptr, const int32_t* channel_offset, const float* bias) {
  Vector<LANES> acc[SEGMENTS * SEGMENT][VECTORS];
  start_tile(acc, bias);
  const int64_t step = g.stride_w * g.pixel_stride;
#pragma GCC unroll 1
  for (int kh = 0; kh < KH; ++kh) {
    const float* row[SEGMENTS];
    int64_t mask[SEGMENTS];
    bool any = false;
#pragma GCC unroll 16
    for (int s = 0; s < SEGMENTS; ++s) {
      const int64_t ih = segment[s].row * g.stride_h - g.pad_top + kh * g.dilation_h;
      const bool inside = ih >= 0 && ih < g.height;
      any |= inside;
      mask[s] = -static_cast<int64_t>(inside);
      row[s] = inside || SEGMENTS == 1 ? segment[s].image + ih * g.row_stride : zeros;
    }
    if (!any) continue;
#pragma GCC unroll 1
    for (int kw = 0; kw < KW; ++kw) {
      const int32_t begin = row_ptr[kh * KW + kw], end = row_ptr[kh * KW + kw + 1];
      const int64_t iw = column * g.stride_w - g.pad_left + kw * g.dilation_w;
      const float* x[SEGMENTS];
#pragma GCC unroll 16
      for (int s = 0; s < SEGMENTS; ++s)
        x[s] = row[s] + ((SEGMENTS == 1 ? iw : iw & mask[s]) * g.pixel_stride);
      if (LEFT && iw < 0) {
        if (SEGMENT > 1)
          multiply_tap<LANES, SEGMENTS, SEGMENT, VECTORS, BW, BH, FIRST>(
              acc, x, mask, step, values, channel_offset, begin, end);
      } else if (RIGHT && iw + (SEGMENT - 1) * g.stride_w >= g.width) {
        if (SEGMENT > 1)
          multiply_tap<LANES, SEGMENTS, SEGMENT, VECTORS, BW, BH, LAST>(
              acc, x, mask, step, values, channel_offset, begin, end);
      } else {
        multiply_tap<LANES, SEGMENTS, SEGMENT, VECTORS, BW, BH, NONE>(
            acc, x, mask, step, values, channel_offset, begin, end);
      }
    }
  }
  finish_tile(acc, out);
}

struct Range {
  int64_t begin, end;
};

// The share of n tiles of one of `parts` threads; empty for a thread beyond them.
BLOCK_SPARSE_INLINE Range share(int64_t n, int64_t part, int64_t parts) {
  return {n * std::min(part, parts) / parts, n * std::min(part + 1, parts) / parts};
}

// Block rows [begin, end) of one of `parts` threads, balanced by kept tiles; a row also costs its epilogue,
// about half a tile. The ranges of all parts cover every row, empty ones too.
BLOCK_SPARSE_INLINE int64_t balanced_boundary(
    const int32_t* row_ptr, int64_t rows, int64_t taps, int64_t part, int64_t parts) {
  const auto cost = [&](int64_t r) { return 2 * static_cast<int64_t>(row_ptr[r * taps]) + r; };
  const int64_t target = cost(rows) * part;
  int64_t r = 0;
  while (r < rows && (cost(r) + cost(r + 1)) * parts <= 2 * target) ++r;
  return part == parts ? rows : r;
}

BLOCK_SPARSE_INLINE Range balanced_rows(
    const int32_t* row_ptr, int64_t rows, int64_t taps, int64_t part, int64_t parts) {
  return {balanced_boundary(row_ptr, rows, taps, part, parts),
          balanced_boundary(row_ptr, rows, taps, part + 1, parts)};
}

}  // namespace block_sparse
#endif
