// Weights and inputs as they lie in memory: fp32, bf16 and fp16 on vectors of fp32, with sums in fp32.
#ifndef BLOCK_SPARSE_OPERANDS_H
#define BLOCK_SPARSE_OPERANDS_H

namespace block_sparse {

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

}  // namespace block_sparse
#endif
