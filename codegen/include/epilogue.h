// What the fused epilogue does by instructions that torch's vectors do without; codegen/epilogue.py puts it in.
#ifndef EPILOGUE_H
#define EPILOGUE_H

#if defined(INDUCTOR_USE_VECTOR_TYPES) && INDUCTOR_USE_VECTOR_TYPES()
namespace block_sparse {

// Rounds sums: one vector, whose result fills half of one, or two.
BLOCK_SPARSE_INLINE auto to_bf16(const at::vec::Vectorized<float>& a) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  return at::vec::Vectorized<at::BFloat16>(_mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(a)));
#else
  return at::vec::convert<at::BFloat16>(a);
#endif
}
BLOCK_SPARSE_INLINE auto to_bf16(const at::vec::VectorizedN<float, 2>& a) {
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
  return at::vec::VectorizedN<at::BFloat16, 1>((__m512i)_mm512_cvtne2ps_pbh(a[1], a[0]));
#else
  return at::vec::convert<at::BFloat16, 1, float, 2>(a);
#endif
}

// Cuts off fractions of numbers that a byte can hold.
template <class Byte>
BLOCK_SPARSE_INLINE auto to_bytes(const at::vec::Vectorized<float>& a) {
#if defined(CPU_CAPABILITY_AVX512)
  return at::vec::Vectorized<Byte>(_mm512_castsi128_si512(_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a))));
#else
  return at::vec::convert<Byte>(a);
#endif
}

// The first COUNT elements of a vector, to and from memory. Torch masks whole vectors, which reach into the next
// cache line, and which the compiler cannot see through, so that a tile of sums would not stay in registers.
template <class T, int COUNT>
BLOCK_SPARSE_INLINE at::vec::Vectorized<T> load_part(const T* p) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int BYTES = COUNT * sizeof(T);
  if constexpr (std::is_same<T, float>::value && COUNT == 8) {
    return _mm512_zextps256_ps512(_mm256_loadu_ps(p));
  } else if constexpr (std::is_same<T, float>::value && COUNT == 4) {
    return _mm512_zextps128_ps512(_mm_loadu_ps(p));
  } else if constexpr (!std::is_same<T, float>::value && BYTES == 32) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  } else if constexpr (!std::is_same<T, float>::value && BYTES == 16) {
    return _mm512_zextsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
#endif
  return at::vec::Vectorized<T>::loadu(p, COUNT);
}
template <int COUNT, class Vectors, class T>
BLOCK_SPARSE_INLINE void store_part(Vectors a, T* p) {
  a.store(p, COUNT);
}
template <int COUNT, class T>
BLOCK_SPARSE_INLINE void store_part(const at::vec::Vectorized<T>& a, T* p) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int BYTES = COUNT * sizeof(T);
  if constexpr (std::is_same<T, float>::value && COUNT == 8) {
    return _mm256_storeu_ps(p, _mm512_castps512_ps256(a));
  } else if constexpr (std::is_same<T, float>::value && COUNT == 4) {
    return _mm_storeu_ps(p, _mm512_castps512_ps128(a));
  } else if constexpr (!std::is_same<T, float>::value && BYTES == 32) {
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(a));
  } else if constexpr (!std::is_same<T, float>::value && BYTES == 16) {
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(a));
  }
#endif
  a.store(p, COUNT);
}

}  // namespace block_sparse
#endif
#endif
