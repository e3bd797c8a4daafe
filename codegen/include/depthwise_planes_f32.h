// Depthwise convolution, fp32, channels first: each channel is an image of its own with a filter of its own.
//
//   out[y][x] = bias + sum over taps of in[y * stride_h + tap_y][x * stride_w + tap_x] * w[tap]
//
// A vector holds neighbouring pixels of an output row, and a register tile several rows, which share what they
// read. Columns outside of the image are masked, rows left out; all masks are known to the C++ compiler.
#ifndef DEPTHWISE_PLANES_F32
#define DEPTHWISE_PLANES_F32

namespace block_sparse {

// The geometry of a layer, all of it known.
template <
    int64_t KH_, int64_t KW_, int64_t H_, int64_t W_, int64_t OW_, int64_t STRIDE_H_, int64_t STRIDE_W_,
    int64_t DILATION_H_, int64_t DILATION_W_, int64_t PAD_TOP_, int64_t PAD_LEFT_>
struct PlaneGeometry {
  static constexpr int64_t KH = KH_, KW = KW_, H = H_, W = W_, OW = OW_, STRIDE_H = STRIDE_H_, STRIDE_W = STRIDE_W_;
  static constexpr int64_t DILATION_H = DILATION_H_, DILATION_W = DILATION_W_, PAD_TOP = PAD_TOP_, PAD_LEFT = PAD_LEFT_;
};

// A bit for each of `count` columns from `column` on that lies in the image.
constexpr uint64_t inside(int64_t column, int64_t count, int64_t width) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= uint64_t{column + i >= 0 && column + i < width} << i;
  return bits;
}

// What the taps of one filter row read for LANES output columns: for tap kw the STEP-th columns from kw * DILATION
// on. Columns outside of the image count as zeros, and are not read.
//
// columns[kw]: bits of the columns from the first one of tap kw on.
template <int LANES, int KW, int64_t STEP, int64_t DILATION>
struct RowReader {
  using Value = typename Lanes<LANES>::Value;
  const uint64_t* columns;
  explicit RowReader(const uint64_t* columns) : columns(columns) {}

  inline __attribute__((always_inline)) void read(Value (&taps)[KW], const float* x) const {
    alignas(64) float picked[LANES];
#pragma GCC unroll 16
    for (int64_t kw = 0; kw < KW; ++kw) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) picked[i] = columns[kw] >> (i * STEP) & 1 ? x[kw * DILATION + i * STEP] : 0.0f;
      taps[kw] = Lanes<LANES>::load(picked);
    }
  }
};

#if defined(CPU_CAPABILITY_AVX512)
BLOCK_SPARSE_INLINE Lanes<16>::Value load_masked(uint32_t mask, const float* p, Lanes<16>::Value) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
}
BLOCK_SPARSE_INLINE Lanes<8>::Value load_masked(uint32_t mask, const float* p, Lanes<8>::Value) {
  return _mm256_maskz_loadu_ps(static_cast<__mmask8>(mask), p);
}

// In a mask register, for all rows: the compiler would load it again for each.
BLOCK_SPARSE_INLINE uint32_t pinned(uint64_t mask) {
  uint32_t bits = static_cast<uint32_t>(mask);
  asm("" : "+Yk"(bits));
  return bits;
}

template <int LANES, int KW, int64_t DILATION>
struct RowReader<LANES, KW, 1, DILATION> {
  using Value = typename Lanes<LANES>::Value;
  uint32_t masks[KW];
  inline __attribute__((always_inline)) explicit RowReader(const uint64_t* columns) {
#pragma GCC unroll 16
    for (int64_t kw = 0; kw < KW; ++kw) masks[kw] = pinned(columns[kw]);
  }
  inline __attribute__((always_inline)) void read(Value (&taps)[KW], const float* x) const {
#pragma GCC unroll 16
    for (int64_t kw = 0; kw < KW; ++kw) taps[kw] = load_masked(masks[kw], x + kw * DILATION, Value{});
  }
};

// Every second column: of those that are read, the even ones are for one tap and the odd ones for the next.
template <int KW>
struct RowReader<16, KW, 2, 1> {
  using Value = Lanes<16>::Value;
  static constexpr int PAIRS = (KW + 1) / 2;
  uint32_t low[PAIRS], high[PAIRS];
  inline __attribute__((always_inline)) explicit RowReader(const uint64_t* columns) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < PAIRS; ++i) {
      low[i] = pinned(columns[2 * i] & 0xffff);
      high[i] = pinned(columns[2 * i] >> 16);
    }
  }
  inline __attribute__((always_inline)) void read(Value (&taps)[KW], const float* x) const {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#pragma GCC unroll 16
    for (int64_t i = 0; i < PAIRS; ++i) {
      const __m512 a = load_masked(low[i], x + 2 * i, Value{}), b = load_masked(high[i], x + 2 * i + 16, Value{});
      taps[2 * i] = _mm512_permutex2var_ps(a, even, b);
      if (2 * i + 1 < KW) taps[2 * i + 1] = _mm512_permutex2var_ps(a, odd, b);
    }
  }
};
template <int KW>
struct RowReader<8, KW, 2, 1> {
  using Value = Lanes<8>::Value;
  static constexpr int PAIRS = (KW + 1) / 2;
  uint32_t masks[PAIRS];
  inline __attribute__((always_inline)) explicit RowReader(const uint64_t* columns) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < PAIRS; ++i) masks[i] = pinned(columns[2 * i]);
  }
  inline __attribute__((always_inline)) void read(Value (&taps)[KW], const float* x) const {
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
#pragma GCC unroll 16
    for (int64_t i = 0; i < PAIRS; ++i) {
      const __m512 both = _mm512_permutexvar_ps(order, load_masked(masks[i], x + 2 * i, Lanes<16>::Value{}));
      taps[2 * i] = _mm512_castps512_ps256(both);
      if (2 * i + 1 < KW) taps[2 * i + 1] = _mm512_extractf32x8_ps(both, 1);
    }
  }
};
#elif defined(CPU_CAPABILITY_AVX2)
template <int KW, int64_t DILATION>
struct RowReader<8, KW, 1, DILATION> {
  using Value = Lanes<8>::Value;
  const uint64_t* columns;
  explicit RowReader(const uint64_t* columns) : columns(columns) {}
  inline __attribute__((always_inline)) void read(Value (&taps)[KW], const float* x) const {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
#pragma GCC unroll 16
    for (int64_t kw = 0; kw < KW; ++kw) {
      const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(columns[kw])), bit);
      taps[kw] = _mm256_maskload_ps(x + kw * DILATION, _mm256_cmpeq_epi32(set, bit));
    }
  }
};
#endif

// ROWS output rows by LANES output columns of one plane.
template <class G, int LANES, int ROWS>
struct PlaneTile {
  using Vec = Lanes<LANES>;
  using Value = typename Vec::Value;
  static constexpr int64_t TILES = (G::OW + LANES - 1) / LANES;
  static constexpr int64_t TAPS = G::KH * G::KW;
  // Input rows from the first one that the tile reads to the last.
  static constexpr int64_t REACH = (ROWS - 1) * G::STRIDE_H + (G::KH - 1) * G::DILATION_H + 1;

  struct Columns {
    uint64_t inside[TILES][G::KW];
  };
  static constexpr Columns columns() {
    Columns result{};
    for (int64_t tile = 0; tile < TILES; ++tile)
      for (int64_t kw = 0; kw < G::KW; ++kw) {
        const int64_t first = tile * LANES * G::STRIDE_W - G::PAD_LEFT + kw * G::DILATION_W;
        result.inside[tile][kw] = inside(first, LANES * G::STRIDE_W, G::W);
      }
    return result;
  }
  static_assert(LANES * G::STRIDE_W <= 64, "a bit for each column that a vector passes");

  // acc[ROWS][LANES] from output row `oh` and the columns of `tile` on. w[TAPS]: this channel's filter.
  BLOCK_SPARSE_INLINE void run(
      float* acc, const float* plane, int64_t oh, int64_t tile, const float* w, const float* bias) {
    const int64_t top = oh * G::STRIDE_H - G::PAD_TOP;
    if (top >= 0 && top + REACH <= G::H) {
      sum<false>(acc, plane, top, tile, w, bias);
    } else {
      sum<true>(acc, plane, top, tile, w, bias);
    }
  }

  // CHECKED: some input rows may lie outside of the image.
  template <bool CHECKED>
  BLOCK_SPARSE_INLINE void sum(
      float* acc, const float* plane, int64_t top, int64_t tile, const float* w, const float* bias) {
    const int64_t first = tile * LANES * G::STRIDE_W - G::PAD_LEFT;
    static constexpr Columns in_image = columns();
    const RowReader<LANES, G::KW, G::STRIDE_W, G::DILATION_W> reader(in_image.inside[tile]);
    Value sums[ROWS];
#pragma GCC unroll 16
    for (int o = 0; o < ROWS; ++o) sums[o] = bias ? Vec::broadcast(bias) : Value{};
#pragma GCC unroll 128
    for (int64_t r = 0; r < REACH; ++r) {
      if (CHECKED && (top + r < 0 || top + r >= G::H)) continue;
      if (!is_read(r)) continue;
      Value x[G::KW];
      reader.read(x, plane + (top + r) * G::W + first);
#pragma GCC unroll 16
      for (int64_t o = 0; o < ROWS; ++o) {
        const int64_t below = r - o * G::STRIDE_H, kh = below / G::DILATION_H;
        if (below < 0 || below % G::DILATION_H || kh >= G::KH) continue;
#pragma GCC unroll 16
        for (int64_t kw = 0; kw < G::KW; ++kw)
          sums[o] = Vec::multiply_add(x[kw], Vec::broadcast(w + kh * G::KW + kw), sums[o]);
      }
    }
#pragma GCC unroll 16
    for (int o = 0; o < ROWS; ++o) Vec::store(sums[o], acc + o * LANES);
  }

  // Whether any output row of the tile reads input row r of those that it reaches.
  static constexpr bool is_read(int64_t r) {
    for (int64_t o = 0; o < ROWS; ++o) {
      const int64_t below = r - o * G::STRIDE_H;
      if (below >= 0 && below % G::DILATION_H == 0 && below / G::DILATION_H < G::KH) return true;
    }
    return false;
  }
};

}  // namespace block_sparse
#endif
