// Block-sparse layers on 8-bit integers. Follows operands.h in the same source.
//
//   out[p][o] = bias[o] + scale[o] * (sum over kept tiles of (x[p + tap][c] - zero point) * w[c][o])
//
// A lane of 32 bits holds four input channels; weights are packed [channels / 4][outputs][4]. Sums are exact.
#ifndef BLOCK_SPARSE_INT8_H
#define BLOCK_SPARSE_INT8_H

namespace block_sparse {

template <int LANES>
struct Quads {
  typedef int32_t Value __attribute__((vector_size(4 * LANES)));
  typedef int32_t Unaligned __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
  typedef int16_t Words __attribute__((vector_size(4 * LANES)));
  BLOCK_SPARSE_INLINE Value load(const void* p) { return *reinterpret_cast<const Unaligned*>(p); }

  // The sums of neighbouring products of words.
  BLOCK_SPARSE_INLINE Value multiply_pairs(const Value& a, const Value& b) {
#if defined(__AVX512BW__)
    if constexpr (LANES == 16) return (Value)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
    if constexpr (LANES == 8) return (Value)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
#if defined(__SSE2__)
    if constexpr (LANES == 4) return (Value)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
  }

  // sum + x[0] * w[0] + ... + x[3] * w[3] in each lane: bytes of x without, of w with a sign. Nothing saturates,
  // unlike in vpmaddubsw, which adds up two products in 16 bits.
  BLOCK_SPARSE_INLINE Value multiply_add(const Value& x, const Value& w, Value sum) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
    // GCC keeps the sums of a tile in memory around the intrinsic, which does not show that it works in place.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
#elif defined(CPU_CAPABILITY_AVX2) && defined(__AVXVNNI__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
#else
    const Value even = x & 0x00ff00ff, odd = (x >> 8) & 0x00ff00ff;
    sum += multiply_pairs(even, (Value)((Words)w << 8 >> 8)) + multiply_pairs(odd, (Value)((Words)w >> 8));
#endif
    return sum;
  }
};

// The kept tiles of one block row, as in BlockRow, and what makes its sums outputs; BH of each.
struct IntegerRow {
  const int8_t* values;
  const int32_t *row_ptr, *channel_offset;
  const float *bias, *scale;  // bias may be null
  const int32_t* weight_sums;
  int32_t zero_point;
};

template <class Input, int LANES>
struct IntegerOperands : Quads<LANES> {
  using Weight = int8_t;
  using Row = IntegerRow;
  using Outputs = Lanes<LANES>;
  using Value = typename Quads<LANES>::Value;
  static constexpr int DEPTH = 4;
  // Signed inputs flip their highest bit, which adds this much and leaves no sign.
  static constexpr int32_t SHIFT = std::is_signed<Input>::value ? 128 : 0;

  BLOCK_SPARSE_INLINE Value weights(const int8_t* p) { return Quads<LANES>::load(p); }
  BLOCK_SPARSE_INLINE Value inputs(const Input* p) {
    int32_t quad;
    std::memcpy(&quad, p, sizeof(quad));
    const Value x = Value{} + quad;
    return SHIFT ? x ^ static_cast<int32_t>(0x80808080u) : x;
  }

  // What the sums of vector j start from: less what the zero point would add to them.
  BLOCK_SPARSE_INLINE Value first(const Row& row, int j) {
    return Quads<LANES>::load(row.weight_sums + j * LANES) * -(row.zero_point + SHIFT);
  }
  struct Last {
    typename Outputs::Value scale, bias;
  };
  template <bool>
  BLOCK_SPARSE_INLINE Last last(const Row& row, int j) {
    return {Outputs::load(row.scale + j * LANES),
            row.bias ? Outputs::load(row.bias + j * LANES) : typename Outputs::Value{}};
  }
  BLOCK_SPARSE_INLINE typename Outputs::Value finish(const Value& sum, const Last& last) {
    typedef float Floats __attribute__((vector_size(4 * LANES)));
    const Floats floats = __builtin_convertvector(sum, Floats);
    typename Outputs::Value y;
    std::memcpy(static_cast<void*>(&y), &floats, sizeof(floats));
    return Outputs::multiply_add(y, last.scale, last.bias);
  }
};

template <int LANES>
struct Operands<uint8_t, LANES, 1> : IntegerOperands<uint8_t, LANES> {};
template <int LANES>
struct Operands<int8_t, LANES, 1> : IntegerOperands<int8_t, LANES> {};

}  // namespace block_sparse
#endif
