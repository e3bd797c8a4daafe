// Vectors of fp32.
//
// Everything here and in the other headers is always_inline: with literal arguments the strides become address
// constants, and the accumulators stay in registers up to the fused epilogue.
//
// The text is pasted into every generated source, so that compilation caches and packages hold all of it.
#ifndef BLOCK_SPARSE_LANES_H
#define BLOCK_SPARSE_LANES_H
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

}  // namespace block_sparse
#endif
