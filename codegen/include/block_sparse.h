// Block-sparse implicit GEMM, channels last, sums in fp32: the register tile and the tables around it.
//
//   out[p][o] = bias[o] + sum over kept tiles (tap, channels c) of x[p + tap][c] * w[c][o]
//
// Everything is always_inline: with literal arguments the strides become address constants, and the
// accumulators stay in registers up to the fused epilogue.
//
// The text is pasted into every generated source, so that compilation caches and packages hold all of it.
#ifndef BLOCK_SPARSE_H
#define BLOCK_SPARSE_H
#define BLOCK_SPARSE_INLINE __attribute__((always_inline)) static inline

namespace block_sparse {

// Operations on vectors of LANES floats: torch's own at its native width, narrower ones for low blocks.
template <int LANES>
struct Lanes {
  typedef float Value __attribute__((vector_size(4 * LANES)));
  typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
  BLOCK_SPARSE_INLINE Value load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
  BLOCK_SPARSE_INLINE Value load(const float* p, int64_t count) {  // zeros beyond `count`, which are not read
    Value value{};
    std::memcpy(&value, p, count * sizeof(float));
    return value;
  }
  BLOCK_SPARSE_INLINE void store(const Value& a, float* p) { *reinterpret_cast<Unaligned*>(p) = a; }
  BLOCK_SPARSE_INLINE void store(const Value& a, float* p, int64_t count) { std::memcpy(p, &a, count * sizeof(float)); }
  BLOCK_SPARSE_INLINE Value broadcast(const float* p) {
    typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
    uint32_t word;  // moved as bits: pairs of bf16 may look like subnormal floats, which arithmetic may flush
    std::memcpy(&word, p, sizeof(word));
    return reinterpret_cast<Value>(Words{} + word);
  }
  BLOCK_SPARSE_INLINE Value multiply_add(const Value& a, const Value& b, const Value& c) { return a * b + c; }
};

#if defined(INDUCTOR_USE_VECTOR_TYPES) && INDUCTOR_USE_VECTOR_TYPES()
template <>
struct Lanes<at::vec::Vectorized<float>::size()> {
  using Value = at::vec::Vectorized<float>;
  BLOCK_SPARSE_INLINE Value load(const float* p) { return Value::loadu(p); }
  BLOCK_SPARSE_INLINE Value load(const float* p, int64_t count) {
#if defined(CPU_CAPABILITY_AVX2)  // torch's own goes through memory
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
#else
    return Value::loadu(p, count);
#endif
  }
  BLOCK_SPARSE_INLINE void store(const Value& a, float* p) { a.store(p); }
  BLOCK_SPARSE_INLINE void store(const Value& a, float* p, int64_t count) { a.store(p, count); }
  BLOCK_SPARSE_INLINE Value broadcast(const float* p) { return Value(*p); }
  BLOCK_SPARSE_INLINE Value multiply_add(const Value& a, const Value& b, const Value& c) {
    return at::vec::fmadd(a, b, c);
  }
};
#endif

#if defined(CPU_CAPABILITY_AVX512)
template <>
struct Lanes<8> {
  using Value = __m256;
  BLOCK_SPARSE_INLINE Value load(const float* p) { return _mm256_loadu_ps(p); }
  BLOCK_SPARSE_INLINE void store(const Value& a, float* p) { _mm256_storeu_ps(p, a); }
  BLOCK_SPARSE_INLINE void store(const Value& a, float* p, int64_t count) {
    _mm256_mask_storeu_ps(p, static_cast<__mmask8>((1u << count) - 1), a);
  }
  BLOCK_SPARSE_INLINE Value broadcast(const float* p) { return _mm256_set1_ps(*p); }
  BLOCK_SPARSE_INLINE Value multiply_add(const Value& a, const Value& b, const Value& c) {
    return _mm256_fmadd_ps(a, b, c);
  }
};
#endif

// How a vector holds LANES / SPLIT output channels: each in SPLIT neighbouring lanes, one for each of SPLIT
// neighbouring input channels. Blocks lower than a vector so use all its lanes.
template <int LANES, int SPLIT>
struct Channels : Lanes<LANES> {
  static_assert(SPLIT == 1);
  using Value = typename Lanes<LANES>::Value;
  using Outputs = Lanes<LANES / SPLIT>;
  // Weights [SPLIT][LANES / SPLIT]; inputs [SPLIT]; sums [LANES / SPLIT].
  BLOCK_SPARSE_INLINE Value weights(const float* p) { return Lanes<LANES>::load(p); }
  BLOCK_SPARSE_INLINE Value inputs(const float* p) { return Lanes<LANES>::broadcast(p); }
  BLOCK_SPARSE_INLINE Value sums(const Value& a) { return a; }
};

#if defined(CPU_CAPABILITY_AVX512)
template <>
struct Channels<16, 2> : Lanes<16> {
  using Outputs = Lanes<8>;
  BLOCK_SPARSE_INLINE Value weights(const float* p) {
    const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
    return _mm512_permutexvar_ps(order, _mm512_loadu_ps(p));
  }
  BLOCK_SPARSE_INLINE Value inputs(const float* p) {
    double pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm512_castpd_ps(_mm512_set1_pd(pair));
  }
  BLOCK_SPARSE_INLINE __m256 sums(const Value& a) {
    const __m512 pairs = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
    return _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, pairs));
  }
};

template <>
struct Channels<16, 4> : Lanes<16> {
  using Outputs = Lanes<4>;
  BLOCK_SPARSE_INLINE Value weights(const float* p) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(order, _mm512_loadu_ps(p));
  }
  BLOCK_SPARSE_INLINE Value inputs(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  BLOCK_SPARSE_INLINE __m128 sums(const Value& a) {
    const __m512 pairs = _mm512_add_ps(a, _mm512_permute_ps(a, 0xb1));
    const __m512 fours = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, fours));
  }
};
#endif

#if defined(CPU_CAPABILITY_AVX2)
template <>
struct Channels<8, 2> : Lanes<8> {
  using Outputs = Lanes<4>;
  BLOCK_SPARSE_INLINE Value weights(const float* p) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), order);
  }
  BLOCK_SPARSE_INLINE Value inputs(const float* p) {
    double pair;
    std::memcpy(&pair, p, sizeof(pair));
    return _mm256_castpd_ps(_mm256_set1_pd(pair));
  }
  BLOCK_SPARSE_INLINE __m128 sums(const Value& a) {
    const __m256 v = a;
    return _mm_hadd_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  }
};
#endif

// The kept tiles of one block row: `values[b]` is [BW][BH], `row_ptr` has one entry per tap.
template <class Element>
struct BlockRow {
  const Element* values;
  const int32_t *row_ptr, *channel_offset;
  const Element* bias;  // BH of them, or null
};

// The same on weights and inputs in memory as Elements: a product consumes DEPTH neighbouring input channels.
template <class Element, int LANES, int SPLIT>
struct Operands;

// Outputs are made of the sums of j-th vectors: `first` is what sums start from, `finish` what comes last.
template <class Element, int LANES, int SPLIT>
struct FloatOperands : Channels<LANES, SPLIT> {
  using Weight = Element;
  using Row = BlockRow<Element>;
  using Value = typename Channels<LANES, SPLIT>::Value;
  using Outputs = typename Channels<LANES, SPLIT>::Outputs;
  static constexpr int CHANNELS = LANES / SPLIT;  // of one vector

  BLOCK_SPARSE_INLINE typename Outputs::Value outputs(const Element* p) {
    if constexpr (std::is_same<Element, float>::value) {
      return Outputs::load(p);
    } else {
      alignas(64) float floats[CHANNELS];
#pragma GCC unroll 16
      for (int i = 0; i < CHANNELS; ++i) floats[i] = static_cast<float>(p[i]);
      return Outputs::load(floats);
    }
  }
  BLOCK_SPARSE_INLINE Value first(const Row& row, int j) {
    return row.bias ? outputs(row.bias + j * CHANNELS) : Value{};
  }
  struct Last {
    bool add;
    typename Outputs::Value bias;
  };
  template <bool BIAS_FIRST>
  BLOCK_SPARSE_INLINE Last last(const Row& row, int j) {
    const bool add = !BIAS_FIRST && row.bias;
    return {add, add ? outputs(row.bias + j * CHANNELS) : typename Outputs::Value{}};
  }
  BLOCK_SPARSE_INLINE typename Outputs::Value finish(const Value& acc, const Last& last) {
    const typename Outputs::Value y = Channels<LANES, SPLIT>::sums(acc);
    return last.add ? y + last.bias : y;
  }
};

template <int LANES, int SPLIT>
struct Operands<float, LANES, SPLIT> : FloatOperands<float, LANES, SPLIT> {
  static constexpr int DEPTH = SPLIT;
};

// bf16: a lane of 32 bits holds a pair of input channels, the second one in its upper half. Weights are packed
// [channels / 2][outputs][2], so that loads and shuffles are those of fp32.
template <int LANES, int SPLIT>
struct Operands<at::BFloat16, LANES, SPLIT> : FloatOperands<at::BFloat16, LANES, SPLIT> {
  static constexpr int DEPTH = 2 * SPLIT;
  using Pairs = Channels<LANES, SPLIT>;
  using Value = typename Pairs::Value;

  BLOCK_SPARSE_INLINE Value weights(const at::BFloat16* p) { return Pairs::weights(reinterpret_cast<const float*>(p)); }
  BLOCK_SPARSE_INLINE Value inputs(const at::BFloat16* p) {
    float pairs[SPLIT];
    std::memcpy(pairs, p, sizeof(pairs));
    return Pairs::inputs(pairs);
  }

  typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
  BLOCK_SPARSE_INLINE Words words(const Value& a) {
    Words bits;
    std::memcpy(&bits, &a, sizeof(bits));
    return bits;
  }
  BLOCK_SPARSE_INLINE Value floats(const Words& bits) {
    Value a;
    std::memcpy(static_cast<void*>(&a), &bits, sizeof(bits));
    return a;
  }
  BLOCK_SPARSE_INLINE Value multiply_add(const Value& a, const Value& b, const Value& c) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
    if constexpr (LANES == 16) return _mm512_dpbf16_ps(c, __m512bh(__m512(b)), __m512bh(__m512(a)));
    if constexpr (LANES == 8) return _mm256_dpbf16_ps(c, __m256bh(__m256(b)), __m256bh(__m256(a)));
#endif
    const Words x = words(a), w = words(b);
    const Value first = Pairs::multiply_add(floats(x << 16), floats(w << 16), c);
    return Pairs::multiply_add(floats(x & 0xffff0000u), floats(w & 0xffff0000u), first);
  }
};

// fp16: converted as it is loaded.
template <int LANES>
struct Operands<at::Half, LANES, 1> : FloatOperands<at::Half, LANES, 1> {
  static constexpr int DEPTH = 1;
  using Value = typename Channels<LANES, 1>::Value;

  BLOCK_SPARSE_INLINE Value weights(const at::Half* p) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (LANES == 16) return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    if constexpr (LANES == 8) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
    alignas(64) float floats[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) floats[i] = static_cast<float>(p[i]);
    return Lanes<LANES>::load(floats);
  }
  BLOCK_SPARSE_INLINE Value inputs(const at::Half* p) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (LANES == 16) return _mm512_cvtph_ps(_mm256_set1_epi16(p->x));
#endif
    const float number = static_cast<float>(*p);
    return Lanes<LANES>::broadcast(&number);
  }
};

// What a convolution needs to know besides its strides along a row. Sizes in pixels, strides in elements.
struct Geometry {
  int64_t height, width;  // input
  int64_t row_stride, pixel_stride;
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

// A run of pixels of one output row. All segments of a tile start at the same column.
template <class Element>
struct Segment {
  const Element* image;
  int64_t row;
};

// How a tap can leave the image within one segment: by its first pixel, by its last, by any number of pixels.
// PADDED, besides WIDE: what lies outside is no zero, but whatever `zeros` holds, and counts.
enum Border { INSIDE = 0, LEFT = 1, RIGHT = 2, WIDE = 4, PADDED = 8 };

// Has three vector registers free at one point of a loop: those that weights and inputs need. Else GCC may hold
// pointers there throughout, and in turn load weights from the stack for every product.
BLOCK_SPARSE_INLINE void free_registers() {
#if defined(__GNUC__) && (defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2))
  __m128 first, second, third;
  asm volatile("" : "=v"(first), "=v"(second), "=v"(third));
#endif
}

// Weights stream through the caches, and hardware prefetchers stop at every page: asked for so many bytes ahead.
constexpr int WEIGHTS_AHEAD = 8192;

BLOCK_SPARSE_INLINE void prefetch_weights(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + WEIGHTS_AHEAD);
}

// Lines of the output are asked for so many bytes before they are stored to: stores that miss the cache wait for
// each other. More would push others out of L1.
constexpr int64_t OUTPUT_AHEAD = 6144;

// So many columns of tiles of PIXELS by WIDTH, in whole tiles.
template <int64_t PIXELS, int64_t WIDTH, class T>
constexpr int64_t columns_ahead() {
  constexpr int64_t TILE = PIXELS * WIDTH * sizeof(T);
  return (OUTPUT_AHEAD + TILE - 1) / TILE * WIDTH;
}

// ROWS by WIDTH elements, from `column` on. Tiles that share lines ask for them once.
template <int ROWS, int WIDTH, class T>
BLOCK_SPARSE_INLINE void prefetch_output(const T* out, int64_t column, int64_t stride) {
  constexpr int LINE = 64 / sizeof(T);
  if (WIDTH < LINE && column % LINE >= WIDTH) return;
#pragma GCC unroll 64
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < WIDTH; j += LINE) __builtin_prefetch(out + i * stride + column + j, 1);
  }
}

// A register tile: SEGMENTS x SEGMENT pixels, STEP elements apart in the input, by VECTORS vectors of channels.
//
// The bias comes last, since a large one would round every product that is added to it, or, for the short sums
// where an addition per output would show, first.
template <class Element, int LANES, int SPLIT, int VECTORS, int SEGMENTS, int SEGMENT, int64_t STEP, int BW, int BH, int FLUSH,
          bool BIAS_FIRST>
struct Tile {
  using Vec = Operands<Element, LANES, SPLIT>;
  using Value = typename Vec::Value;
  using Outputs = typename Vec::Outputs;
  using Weight = typename Vec::Weight;
  using Row = typename Vec::Row;
  static constexpr int CHANNELS = LANES / SPLIT;  // of one vector
  static constexpr int PIXELS = SEGMENTS * SEGMENT;
  static constexpr int DEPTH = Vec::DEPTH;
  static constexpr int WEIGHTS = LANES * DEPTH / SPLIT;  // in one vector
  static_assert(BW % DEPTH == 0 && (SPLIT == 1 || (BH == CHANNELS && !BIAS_FIRST)));
  typedef Value Accumulators[PIXELS][VECTORS];

  BLOCK_SPARSE_INLINE Value weights(const Weight* p) {
    if (PIXELS > 1) prefetch_weights(p);  // a lone pixel leaves enough time for loads to run ahead
    return Vec::weights(p);
  }

  // acc += x * w for one kept tile. SKIP names the pixel of each segment that is outside the image.
  template <int SKIP>
  BLOCK_SPARSE_INLINE void multiply(Accumulators& acc, const Element* const (&x)[SEGMENTS], const Weight* w) {
#pragma GCC unroll 1
    for (int k = 0; k < BW; k += DEPTH) {
      free_registers();
      Value wk[VECTORS];
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) wk[j] = weights(w + k * BH + j * WEIGHTS);
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) {
        const int i = p % SEGMENT;
        if ((SKIP == LEFT && i == 0) || (SKIP == RIGHT && i == SEGMENT - 1)) continue;
        const Value xp = Vec::inputs(x[p / SEGMENT] + i * STEP + k);
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) acc[p][j] = Vec::multiply_add(xp, wk[j], acc[p][j]);
      }
    }
  }

  // The same with any set of pixels outside the image: those read zeros.
  BLOCK_SPARSE_INLINE void multiply_any(Accumulators& acc, const Element* const (&x)[PIXELS], const Weight* w) {
#pragma GCC unroll 1
    for (int k = 0; k < BW; k += DEPTH) {
      free_registers();
      Value wk[VECTORS];
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) wk[j] = weights(w + k * BH + j * WEIGHTS);
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) {
        const Value xp = Vec::inputs(x[p] + k);
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) acc[p][j] = Vec::multiply_add(xp, wk[j], acc[p][j]);
      }
    }
  }

  // All kept tiles [begin, end) of one tap. A segment with mask 0 lies outside the image: x points at zeros.
  template <int SKIP>
  BLOCK_SPARSE_INLINE void multiply_tap(
      Accumulators& acc, const Element* const (&x)[SEGMENTS], const int64_t (&mask)[SEGMENTS], const Row& row,
      int32_t begin, int32_t end) {
#pragma GCC unroll 1
    for (int32_t b = begin; b < end; ++b) {
      const Element* xb[SEGMENTS];
#pragma GCC unroll 32
      for (int s = 0; s < SEGMENTS; ++s) xb[s] = x[s] + (row.channel_offset[b] & mask[s]);
      multiply<SKIP>(acc, xb, row.values + static_cast<int64_t>(b) * (BW * BH));
    }
  }

  // The same where only pixels [first, last) of each segment are inside the image.
  BLOCK_SPARSE_INLINE void multiply_border_tap(
      Accumulators& acc, const Element* const (&x)[SEGMENTS], const int64_t (&mask)[SEGMENTS], int64_t first,
      int64_t last, const Element* zeros, const Row& row, int32_t begin, int32_t end) {
#pragma GCC unroll 1
    for (int32_t b = begin; b < end; ++b) {
      const Element* xb[PIXELS];
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) {
        const int s = p / SEGMENT, i = p % SEGMENT;
        const bool inside = mask[s] && i >= first && i < last;
        xb[p] = inside ? x[s] + i * STEP + row.channel_offset[b] : zeros;
      }
      multiply_any(acc, xb, row.values + static_cast<int64_t>(b) * (BW * BH));
    }
  }

  BLOCK_SPARSE_INLINE void clear(Accumulators& acc) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) acc[p][j] = Value{};
    }
  }

  BLOCK_SPARSE_INLINE void start(Accumulators& acc, const Row& row) {
    clear(acc);
    if constexpr (BIAS_FIRST) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) {
        const Value b = Vec::first(row, j);
#pragma GCC unroll 64
        for (int p = 0; p < PIXELS; ++p) acc[p][j] = b;
      }
    }
  }

  // out[PIXELS][output channels]
  BLOCK_SPARSE_INLINE void finish(const Accumulators& acc, float* out, const Row& row) {
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      const auto last = Vec::template last<BIAS_FIRST>(row, j);
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) Outputs::store(Vec::finish(acc[p][j], last), out + (p * VECTORS + j) * CHANNELS);
    }
  }

  // Sums in parts: every FLUSH tiles the accumulators move to memory and start anew, because many short sums
  // round less than a long one.
  struct PartialSums {
    alignas(64) float total[PIXELS * VECTORS * LANES];
    int32_t tiles = 0;  // in the accumulators
    bool flushed = false;
  };

  BLOCK_SPARSE_INLINE void save(const Accumulators& acc, PartialSums& sums) {
#pragma GCC unroll 64
    for (int p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) Vec::store(acc[p][j], sums.total + (p * VECTORS + j) * LANES);
    }
#if defined(__GNUC__)
    // Whose address is taken stays in memory: GCC holds few of them in registers, and then spills the weights.
    asm volatile("" : : "r"(sums.total) : "memory");
#endif
  }

  BLOCK_SPARSE_INLINE void add(Accumulators& acc, const PartialSums& sums) {
    if constexpr (FLUSH != 0) {
      if (!sums.flushed) return;
#pragma GCC unroll 64
      for (int p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) {
          acc[p][j] = acc[p][j] + Vec::load(sums.total + (p * VECTORS + j) * LANES);
        }
      }
    }
  }

  // The end of the part of tiles [begin, end) that fits the sum at hand; makes room if that is full.
  BLOCK_SPARSE_INLINE int32_t next_part(Accumulators& acc, PartialSums& sums, int32_t begin, int32_t end) {
    if constexpr (FLUSH == 0) {
      return end;
    } else {
      if (sums.tiles == FLUSH) {
        add(acc, sums);
        save(acc, sums);
        clear(acc);
        sums.flushed = true;
        sums.tiles = 0;
      }
      const int32_t stop = std::min(end, begin + FLUSH - sums.tiles);
      sums.tiles += stop - begin;
      return stop;
    }
  }

  // A tile of a linear layer, or of a 1x1 convolution that reads pixel after pixel.
  BLOCK_SPARSE_INLINE void linear(float* out, const Element* x, const Row& row) {
    Accumulators acc;
    PartialSums sums;
    start(acc, row);
    const int32_t end = row.row_ptr[1];
    for (int32_t begin = row.row_ptr[0], stop; begin < end; begin = stop) {
      stop = next_part(acc, sums, begin, end);
      multiply_tap<INSIDE>(acc, {x}, {-1}, row, begin, stop);
    }
    add(acc, sums);
    finish(acc, out, row);
  }

  // A tile of a convolution. `zeros`: BW of them, or (SEGMENT - 1) * STEP + BW for several segments, not PADDED.
  template <int KH, int KW, int BORDER>
  BLOCK_SPARSE_INLINE void conv(
      float* out, const Segment<Element> (&segment)[SEGMENTS], int64_t column, const Geometry& g, const Element* zeros,
      const Row& block_row) {
    Accumulators acc;
    PartialSums sums;
    start(acc, block_row);
#pragma GCC unroll 1
    for (int kh = 0; kh < KH; ++kh) {
      const Element* row[SEGMENTS];
      int64_t mask[SEGMENTS];
      bool any = false, all = true;
#pragma GCC unroll 32
      for (int s = 0; s < SEGMENTS; ++s) {
        const int64_t ih = segment[s].row * g.stride_h - g.pad_top + kh * g.dilation_h;
        const bool inside = ih >= 0 && ih < g.height;
        any |= inside;
        all &= inside;
        mask[s] = SEGMENTS == 1 && !(BORDER & PADDED) ? -1 : -static_cast<int64_t>(inside);
        row[s] = inside ? segment[s].image + ih * g.row_stride : zeros;
      }
      if (!any && !(BORDER & PADDED)) continue;
#pragma GCC unroll 1
      for (int kw = 0; kw < KW; ++kw) {
        int32_t begin = block_row.row_ptr[kh * KW + kw];
        const int32_t end = block_row.row_ptr[kh * KW + kw + 1];
        const int64_t iw = column * g.stride_w - g.pad_left + kw * g.dilation_w;
        const bool left = iw < 0, right = iw + (SEGMENT - 1) * g.stride_w >= g.width;
        const Element* x[SEGMENTS];
#pragma GCC unroll 32
        for (int s = 0; s < SEGMENTS; ++s) x[s] = row[s] + (iw * g.pixel_stride & mask[s]);
        for (int32_t stop; begin < end; begin = stop) {
          stop = next_part(acc, sums, begin, end);
          if (BORDER == INSIDE || !(left || right || (BORDER & PADDED && !all))) {
            multiply_tap<INSIDE>(acc, x, mask, block_row, begin, stop);
          } else if (BORDER & WIDE) {
            const int64_t first = left ? (-iw + g.stride_w - 1) / g.stride_w : 0;
            const int64_t last = (g.width - iw + g.stride_w - 1) / g.stride_w;
            if (BORDER & PADDED || (first < last && first < SEGMENT))
              multiply_border_tap(acc, x, mask, first, last, zeros, block_row, begin, stop);
          } else if (SEGMENT > 1) {
            if ((BORDER & LEFT) && left) multiply_tap<LEFT>(acc, x, mask, block_row, begin, stop);
            if ((BORDER & RIGHT) && right) multiply_tap<RIGHT>(acc, x, mask, block_row, begin, stop);
          }
        }
      }
    }
    add(acc, sums);
    finish(acc, out, block_row);
  }
};

// Memory of a thread, 64-byte aligned, that later calls find warm.
template <class Element>
inline Element* thread_memory(int64_t count) {
  struct Memory {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  const int64_t bytes = (count * sizeof(Element) + 63) / 64 * 64;
  if (memory.bytes < bytes) {
    std::free(memory.data);
    memory.data = std::aligned_alloc(64, bytes);
    memory.bytes = memory.data ? bytes : 0;
    if (!memory.data) throw std::bad_alloc();
  }
  return static_cast<Element*>(memory.data);
}

struct Range {
  int64_t begin, end;
};

// The share of n tiles of one of `parts` threads; empty for a thread beyond them.
BLOCK_SPARSE_INLINE Range share(int64_t n, int64_t part, int64_t parts) {
  return {n * std::min(part, parts) / parts, n * std::min(part + 1, parts) / parts};
}

// Block rows [begin, end) of one of `parts` threads, balanced by kept tiles; a row also costs its epilogue,
// `row_cost` halves of a tile. The ranges of all parts cover every row, empty ones too.
BLOCK_SPARSE_INLINE int64_t balanced_boundary(
    const int32_t* row_ptr, int64_t rows, int64_t taps, int64_t part, int64_t parts, int64_t row_cost) {
  const auto cost = [&](int64_t r) { return 2 * static_cast<int64_t>(row_ptr[r * taps]) + row_cost * r; };
  const int64_t target = cost(rows) * part;
  int64_t low = 0, high = part == parts ? 0 : rows;
  while (low < high) {
    const int64_t r = (low + high) / 2;
    if ((cost(r) + cost(r + 1)) * parts <= 2 * target) {
      low = r + 1;
    } else {
      high = r;
    }
  }
  return part == parts ? rows : low;
}

BLOCK_SPARSE_INLINE Range balanced_rows(
    const int32_t* row_ptr, int64_t rows, int64_t taps, int64_t part, int64_t parts, int64_t row_cost = 1) {
  return {balanced_boundary(row_ptr, rows, taps, part, parts, row_cost),
          balanced_boundary(row_ptr, rows, taps, part + 1, parts, row_cost)};
}

}  // namespace block_sparse
#endif
